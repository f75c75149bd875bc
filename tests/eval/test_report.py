"""The report: the paper's tables, crops and plots, and the page in a real browser.

The browser tests need chromium and chromedriver (Debian's packages chromium, chromium-driver).
"""

import json
import math
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import report, run
from mana_triton.metrics import LPIPSUnavailable

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and shutil.which("chromedriver")), reason="needs chromium and chromedriver"
)


# ---- the paper's tables


def row(dataset: str, method: str, psnr: float, **more) -> dict:
    scores = {"psnr_rgb": psnr, "ssim_rgb": 0.5, "psnr_y": psnr + 1, "ssim_y": 0.6, "lpips": None}
    known = {"clips": 1, "frames": 2, "perfect_frames": 0, "incomplete": None}
    return {"dataset": dataset, "method": method, **scores, **known, **more}


def test_table1_puts_measured_cells_beside_published_ones():
    rows = [row("vid4", "bicubic", 22.3568), row("Vimeo90K", "mana:x", 30.1, lpips=0.25)]
    header, lines = report.table1({"rows": rows})
    table = {line[0]: dict(zip(header, line, strict=True)) for line in lines}
    assert header[1:] == ["Vimeo-90K", "Vimeo-90K-Motion", "Vid4", "SPMCS", "Parkour"]
    assert table["MANA (published)"]["Vid4"] == "25.21 0.7816 missing"
    assert table["EDVR (published)"]["Vimeo-90K"] == "35.68 0.9372 missing"
    assert table["EDVR (published)"]["Parkour"] == "missing"
    assert table["bicubic (measured)"]["Vid4"] == "22.36 0.5000 -"
    assert table["mana:x (measured)"]["Vimeo-90K"] == "30.10 0.5000 0.2500"
    assert table["mana:x (measured)"]["Vid4"] == "not measured"
    for method in ("PFNL", "TGA"):
        (name,) = [name for name in table if name.startswith(method)]
        assert "inputs blurred" in name


def test_table2_orders_checkpoints_by_their_memory():
    rows = [
        row("a", "bicubic", 20),
        row("a", "mana:big", 23, memory_slots=512),
        row("b", "mana:big", 24, memory_slots=512),
        row("a", "mana:none", 21, memory_slots=0),
        row("a", "center:big", 22, memory_slots=512),
    ]
    header, lines = report.table2({"rows": rows})
    assert header == ["memory", "source", "a", "b"]
    assert [line[0] for line in lines[::2]] == ["0", "128", "256", "512", "1024"]
    assert [line[2:] for line in lines[::2]] == [["missing", "missing"]] * 5
    assert lines[1][1:] == ["mana:none (measured)", "21.00 0.5000 -", "not measured"]
    assert lines[7][1:] == ["mana:big (measured)", "23.00 0.5000 -", "24.00 0.5000 -"]
    assert lines[9][1:] == ["measured", "not measured", "not measured"]


def test_table2_names_checkpoints_of_other_sizes(capsys):
    rows = [row("a", "mana:x", 20, memory_slots=64, degradation="pil_bicubic")]
    summary = {"rows": rows, "crop_border": 0, "lr_from_disk": []}
    report.show_paper_table("Table 2", report.table2(summary), summary)
    assert "of other memory sizes, not in the table: mana:x (64)" in capsys.readouterr().out


# ---- pictures


def test_the_crop_is_where_the_error_is_largest():
    original = np.zeros((200, 300, 3), np.uint8)
    enlarged = original.copy()
    enlarged[5:20, 5:20] = 30
    enlarged[140:150, 220:230] = 200
    top, left = report.hardest(original, enlarged)
    assert top <= 140 and top + report.CROP >= 150
    assert left <= 220 and left + report.CROP >= 230
    assert report.hardest(original[:40, :50], enlarged[:40, :50]) == (0, 0)


def test_whole_frames_shrink_where_there_are_many():
    frame = np.zeros((400, 1000, 3), np.uint8)
    sizes = []
    for form in (report.LARGE, report.SMALL):
        content = b64decode(report._whole(frame, **form).partition(",")[2])
        sizes.append(Image.open(BytesIO(content)).size)
    assert sizes == [(1000, 400), (640, 256)]


def test_plot_has_a_point_for_every_frame_and_stays_inside():
    series = {"a": [20.0, 25.5, None], "<b>": [30.0, 31.0, 29.9]}
    svg = report.plot(series, [3, 4, 5], "PSNR")
    lines = re.findall(r'points="([^"]+)"', svg)
    points = [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]
    assert [[x for x, _ in line] for line in points] == [[44, 378, 712]] * 2
    assert all(20 <= y <= 180 for line in points for _, y in line)
    (low, middle, infinite), _ = points
    assert low[1] > middle[1] > infinite[1] == 20
    assert "<b>" not in svg and "&lt;b&gt;" in svg


# ---- the page


def unavailable(_):
    raise LPIPSUnavailable("LPIPS is left out of this test")


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The report of two clips, one with markup in its name, and three methods."""
    root = tmp_path_factory.mktemp("report")
    y, x = np.mgrid[:180, :240]
    for name, period in ("<i>one & two", 5), ("clip10", 9), ("clip9", 3):
        (root / "set" / name).mkdir(parents=True)
        (root / "ours" / name).mkdir(parents=True)
        for t in range(4):
            wave = np.sin((x + 2 * t) / period) + np.cos(y / period)
            frame = np.repeat((128 + 50 * wave).astype(np.uint8)[:, :, None], 3, axis=2)
            Image.fromarray(frame).save(root / "set" / name / f"{t}.png")
            Image.fromarray(frame // 2 + 60).save(root / "ours" / name / f"{t}.png")
    words = ["--data", f"toy={root / 'set'}", "--method", "bicubic", f"folder:{root / 'ours'}"]
    words += [f"folder:{root / 'set'}", "--html", root / "report.html", "--jobs", "1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_lpips", unavailable)
        run.evaluate(run.parse_args([*map(str, words), "--results", str(root / "results")]))
    return root / "report.html"


def test_the_page_is_one_file(page):
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert "<i>one" not in text and "&lt;i&gt;one &amp; two" in text
    assert text.count("<svg") == 3


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Browser:
    """A headless Chromium, driven through chromedriver by the WebDriver protocol."""

    def __init__(self, port: int, profile: Path):
        self.base = f"http://127.0.0.1:{port}"
        switches = (
            "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync "
            "disable-background-networking disable-component-update disable-dev-shm-usage"
        )
        switches = [f"--{switch}" for switch in switches.split()]
        options = {"binary": CHROMIUM, "args": [*switches, f"--user-data-dir={profile}"]}
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        session = self.call("/session", {"capabilities": {"alwaysMatch": wanted}})
        self.base += f"/session/{session['sessionId']}"

    def call(self, path: str, data: dict | None = None, method: str = "POST") -> Any:
        body = json.dumps(data or {}).encode() if method == "POST" else None
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.base + path, body, head, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def run(self, script: str, *arguments) -> Any:
        return self.call("/execute/sync", {"script": script, "args": arguments})

    def click(self, selector: str) -> None:
        found = self.call("/element", {"using": "css selector", "value": selector})
        self.call(f"/element/{next(iter(found.values()))}/click")

    def press(self, selector: str, keys: str) -> None:
        found = self.call("/element", {"using": "css selector", "value": selector})
        self.call(f"/element/{next(iter(found.values()))}/value", {"text": keys})

    def width(self, pixels: int, height: int) -> None:
        size = {"width": pixels, "height": height, "deviceScaleFactor": 1, "mobile": pixels < 600}
        command = {"cmd": "Emulation.setDeviceMetricsOverride", "params": size}
        self.call("/goog/cdp/execute", command)

    def log(self, kind: str) -> list[dict]:
        return self.call("/se/log", {"type": kind})


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    """A browser without a page."""
    port = free_port()
    driver = subprocess.Popen(
        ["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    opened = None
    try:
        while opened is None:
            try:
                opened = Browser(port, tmp_path_factory.mktemp("profile"))
            except urllib.error.URLError as error:
                if isinstance(error, urllib.error.HTTPError) or time.monotonic() > deadline:
                    raise
                time.sleep(0.2)
        yield opened
        opened.call("", method="DELETE")
    finally:
        driver.terminate()
        driver.wait(timeout=30)


@pytest.fixture
def browser(chromium, page):
    """The page, freshly opened."""
    chromium.call("/url", {"url": page.as_uri()})
    return chromium


def column(browser: Browser, table: int, index: int) -> list[str]:
    return browser.run(
        "return [...document.querySelectorAll('table')[arguments[0]].tBodies[0].rows]"
        ".map(row => row.cells[arguments[1]].textContent)",
        table,
        index,
    )


@needs_browser
def test_tables_sort_by_number_and_by_name(browser):
    head = ".scroll:nth-of-type(2) th:nth-child({})"
    before = column(browser, 1, 2)
    assert before.count("inf") == 3  # the originals themselves

    def number(text):
        return math.inf if text == "inf" else float(text)

    browser.click(f"{head.format(3)} button")
    assert [number(x) for x in column(browser, 1, 2)] == sorted(map(number, before))
    browser.click(f"{head.format(3)} button")
    assert [number(x) for x in column(browser, 1, 2)] == sorted(map(number, before), reverse=True)
    script = "return document.querySelector(arguments[0]).getAttribute('aria-sort')"
    assert browser.run(script, head.format(3)) == "descending"
    browser.click(f"{head.format(1)} button")
    assert browser.run(script, head.format(3)) is None
    # clip 9 before clip 10
    assert [name for name in column(browser, 1, 0) if name.startswith("clip")] == (
        ["clip9"] * 3 + ["clip10"] * 3
    )
    # what has no value stays last, either way
    for _ in range(2):
        browser.click(f"{head.format(7)} button")
        assert column(browser, 1, 6) == ["-"] * 9


@needs_browser
def test_the_slider_moves_the_border_and_the_choices_change_the_pictures(browser):
    clip = "return getComputedStyle(document.querySelector('.compare img.right')).clipPath"
    assert browser.run(clip) == "inset(0px 0px 0px 50%)"
    right = "\ue014"
    browser.press(".compare input", right * 7)
    assert browser.run(clip) == "inset(0px 0px 0px 57%)"
    names = browser.run(
        "return [...document.querySelector('.compare select').options].map(x => x.text)"
    )
    assert len(names) == 4 and names[0] == "bicubic" and names[-1] == "original"
    visible = (
        "return [...document.querySelector('.stack').children]"
        ".filter(x => x.offsetWidth).map(x => x.dataset.name)"
    )
    assert browser.run(visible) == [names[0], names[2]]
    browser.press(".compare select[aria-label=right]", "original")
    assert browser.run(visible) == [names[0], "original"]
    # one picture on both sides is still there
    browser.press(".compare select[aria-label=left]", "original")
    assert browser.run(visible) == ["original"]
    assert browser.run("return document.querySelector('.stack').offsetHeight") > 100


@needs_browser
@pytest.mark.parametrize("size", [(390, 844), (1280, 900)], ids=["phone", "desktop"])
def test_the_page_fits(browser, size):
    browser.width(*size)
    page = "document.documentElement"
    assert browser.run("return innerWidth") == size[0]
    assert browser.run(f"return {page}.scrollWidth") == browser.run(f"return {page}.clientWidth")
    pictures = browser.run(
        "return [...document.images].filter(x => x.offsetWidth)"
        ".map(x => [x.naturalWidth, x.getBoundingClientRect().right])"
    )
    assert len(pictures) >= 3 * (2 + 4 + 6)
    assert all(natural > 0 and right <= size[0] for natural, right in pictures)


@needs_browser
def test_the_page_asks_for_nothing_and_complains_of_nothing(browser, page):
    assert [entry for entry in browser.log("browser") if entry["level"] != "INFO"] == []
    requested = set()
    for entry in browser.log("performance"):
        message = json.loads(entry["message"])["message"]
        sent = message["method"] == "Network.requestWillBeSent"
        if sent and message["params"]["documentURL"].startswith(page.as_uri()):
            requested.add(message["params"]["request"]["url"])
    assert page.as_uri() in requested
    assert not [url for url in requested if not url.startswith(("data:", page.as_uri()))]
