"""The report: the paper's tables next to ours, crops, plots and the page."""

import re
from base64 import b64decode
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from clips import moving, write
from PIL import Image

from eval import page, report, run, scoring
from mana_triton.metrics import LPIPSUnavailable

# ---- the paper's tables


def row(dataset: str, method: str, psnr: float, **more) -> dict:
    scores = {"psnr_rgb": psnr, "ssim_rgb": 0.5, "psnr_y": psnr + 1, "ssim_y": 0.6, "lpips": None}
    known = {"clips": 1, "frames": 2, "perfect_frames": 0, "incomplete": None}
    return {"dataset": dataset, "method": method, **scores, **known, **more}


def as_dicts(table: tuple[list[str], list[list[str]]]) -> list[dict[str, str]]:
    header, lines = table
    return [dict(zip(header, line, strict=True)) for line in lines]


def test_table1_prints_published_cells_next_to_ours():
    rows = [row("spmcs", "bicubic", 25.6), row("Vimeo90K", "mana:x", 30.1, lpips=0.25)]
    rows.append(row("mine", "mana:x", 20.0, incomplete="yes"))
    lines = as_dicts(report.paper_table("Table 1", {"rows": rows}))
    sets = ["Parkour", "Vimeo-90K-Motion", "Vimeo-90K", "SPMCS"]
    assert list(lines[0]) == ["method", *sets, "mine"]
    cells = {line["method"]: line for line in lines}
    assert len(cells) == 8 + 2
    assert cells["Bicubic (paper)"]["Parkour"] == "29.51 0.8712 0.3101"
    assert cells["MANA (paper)"]["Vimeo-90K-Motion"] == "38.86 0.9630 0.0853"
    assert cells["EDVR (paper)"]["Vimeo-90K"] == "35.68 0.9372 0.1019"
    assert cells["CSNLN (single image) (paper)"]["SPMCS"] == "28.79 0.8275 0.2343"
    assert cells["PFNL (BD) (paper)"]["mine"] == "-"
    assert cells["bicubic (here)"]["SPMCS"] == "25.60 0.5000 -"
    assert cells["mana:x (here)"]["Vimeo-90K"] == "30.10 0.5000 0.2500"
    assert cells["mana:x (here)"]["mine"] == "20.00 0.5000 - (part: 1 clips, 2 frames)"
    assert cells["mana:x (here)"]["SPMCS"] == "-"


def test_table2_orders_checkpoints_by_their_memory(capsys):
    rows = [
        row("Vid4", "bicubic", 20),
        row("Vid4", "mana:big", 23, memory_slots=512),
        row("SPMC S", "mana:big", 24, memory_slots=512),
        row("Vid4", "mana:none", 21, memory_slots=0),
        row("Vid4", "center:big", 22, memory_slots=512),
        row("Vid4", "mana:odd", 22, memory_slots=64),
    ]
    lines = as_dicts(report.paper_table("Table 2", {"rows": rows}))
    assert list(lines[0]) == ["memory", "method", "Parkour", "Vimeo-90K", "Vid4", "SPMCS"]
    assert [(line["memory"], line["method"]) for line in lines] == [
        ("0", "MANA (paper)"),
        ("0", "mana:none (here)"),
        ("128", "MANA (paper)"),
        ("256", "MANA (paper)"),
        ("512", "MANA (paper)"),
        ("512", "mana:big (here)"),
        ("1024", "MANA (paper)"),
    ]
    assert lines[0]["Vid4"] == "25.02 0.7739 0.2942"
    assert lines[4]["Vimeo-90K"] == "34.84 0.9404 0.1076"
    assert lines[6]["SPMCS"] == "29.25 0.8447 0.2234"
    assert (lines[5]["Vid4"], lines[5]["SPMCS"]) == ("23.00 0.5000 -", "24.00 0.5000 -")
    labeled = [x | {"degradation": "pil_bicubic"} for x in rows]
    summary = {"rows": labeled, "crop_border": 0, "lr_from_disk": []}
    report.show_paper_table("Table 2", summary)
    text = capsys.readouterr().out
    assert "other memory sizes, not in the table: mana:odd (64)" in text
    assert "here it is pil_bicubic x1/4, 8 bits. Here 0 pixels of border" in text


def test_published_tables_are_complete():
    for title, methods, sets in ("Table 1", 8, 4), ("Table 2", 5, 4):
        table = report.PAPER[title]
        assert len(table) == methods
        assert all(len(cells) == sets for cells in table.values())
        for psnr, ssim, lpips in (cell for cells in table.values() for cell in cells.values()):
            assert 24 < psnr < 40 and 0.7 < ssim < 1 and 0.08 < lpips < 0.43
    for dataset in ("Parkour", "Vimeo-90K", "SPMCS"):  # MANA has 512 memory entries in Table 1
        cells = [report.PAPER["Table 1"]["MANA"], report.PAPER["Table 2"]["512"]]
        assert cells[0][dataset] == cells[1][dataset]


# ---- pictures


def test_crop_is_where_the_error_is_largest():
    original = np.zeros((200, 300, 3), np.uint8)
    enlarged = original.copy()
    enlarged[5:20, 5:20] = 30
    enlarged[140:150, 220:230] = 200
    top, left = page.hardest(original, enlarged)
    assert top <= 140 and top + page.CROP >= 150
    assert left <= 220 and left + page.CROP >= 230
    assert page.hardest(original[:40, :50], enlarged[:40, :50]) == (0, 0)


def test_plot_has_a_point_for_every_frame_and_stays_inside():
    series = {"a": [20.0, 25.5, None], "<b>": [30.0, 31.0, 29.9]}
    svg = page.plot(series, [3, 4, 5], "PSNR")
    lines = re.findall(r'points="([^"]+)"', svg)
    points = [[tuple(map(float, p.split(","))) for p in line.split()] for line in lines]
    assert [[x for x, _ in line] for line in points] == [[44, 378, 712]] * 2
    assert all(20 <= y <= 180 for line in points for _, y in line)
    (low, middle, infinite), _ = points
    assert low[1] > middle[1] > infinite[1] == 20
    assert "<b>" not in svg and "&lt;b&gt;" in svg


@pytest.fixture(scope="module")
def document(tmp_path_factory) -> str:
    """The page of two clips, one with markup in its name, and three methods."""
    root = tmp_path_factory.mktemp("report")
    for name in ("<i>one & two", "clip"):
        frames = moving(3, 90, 700)
        write(root / "set" / name, frames)
        write(root / "ours" / name, frames // 2 + 60)
    words = ["--data", f"toy={root / 'set'}", "--method", "bicubic", f"folder:{root / 'ours'}"]
    words += [f"folder:{root / 'set'}", "--html", root / "report.html", "--jobs", "1"]

    def unavailable(_):
        raise LPIPSUnavailable("LPIPS is left out of this test")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "lpips_of", unavailable)
        patch.setattr(page, "LISTED", 1)  # more clips have small pictures
        run.evaluate(run.parse_args([*map(str, words), "--results", str(root / "results")]))
    return Path(root / "report.html").read_text()


def test_page_is_one_file_with_escaped_names(document):
    assert not re.findall(r'(?:src|href)="(?!data:)', document)
    assert not re.search(r"https?://|@import|url\(", document)
    assert "<i>one" not in document and "&lt;i&gt;one &amp; two" in document
    assert document.count("<svg") == 2
    assert document.count("<section>") == 2
    assert document.count("<table>") == 2


def test_page_shows_small_frames_and_exact_crops(document):
    frames = re.findall(r'src="data:image/jpeg;base64,([^"]+)" alt="bicubic"', document)
    sizes = [Image.open(BytesIO(b64decode(content))).size for content in frames]
    assert sizes == [(640, 80)] * 2  # of 700x88
    crops = re.findall(r'src="data:image/png;base64,([^"]+)"', document)
    sizes = {Image.open(BytesIO(b64decode(content))).size for content in crops}
    assert sizes == {(page.CROP, page.CROP)}
