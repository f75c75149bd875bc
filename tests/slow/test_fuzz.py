"""Hostile input: damaged files of every kind end in one line, without crash, hang or bloat."""

import contextlib
import itertools
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import media
import numpy as np
import pytest
import torch
from fuzz import damaged
from PIL import Image

from mana_triton.checkpoint import save
from mana_triton.model import MANA, MANAConfig
from mana_triton.video import images

SCRIPT = Path(__file__).parent / "fuzz.py"
SILENCE = 90  # seconds without a word, after which it is asked whether a case hangs
# containers that are read and not written, and what stands in them
OTHERS = {
    "mpg": "mpeg2video", "flv": "flv", "wmv": "wmv2", "ogg": "libvpx", "mxf": "mpeg2video",
    "wtv": "mpeg2video", "ivf": "libvpx", "y4m": "wrapped_avframe", "h264": "libx264",
    "m4v": "mpeg4", "mjpeg": "mjpeg", "apng": "apng",
}  # fmt: skip
PICTURES = [media.smooth_rgb(16, 24, phase) for phase in range(6)]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> Path:
    """Small files of every container, kind of picture and kind of weights."""
    folder, parts = tmp_path_factory.mktemp("intact"), tmp_path_factory.mktemp("parts")
    rich: dict[str, Any] = {
        "audio": True, "metadata": {"title": "x"}, "chapters": [(0, 100, "a")],
        "aspect": Fraction(4, 3),
    }  # fmt: skip
    for suffix in ("mp4", "mov", "ts"):
        media.write_video(folder / f"{suffix}.{suffix}", PICTURES, rotation=(90, False), **rich)
    media.write_photos(folder / "nut.nut", PICTURES)
    source = media.write_video(parts / "a.mkv", PICTURES, attachment=b"font" * 9, **rich)
    media.add_subtitles(folder / "mkv.mkv", source, [(10, 50, "one"), (60, 100, "two")])
    (folder / "mkv.srt").unlink()
    media.write_video(folder / "webm.webm", PICTURES, codec="libvpx-vp9", options={"cpu-used": "8"})
    ticks = Fraction(1, 25)
    media.write_video(folder / "avi.avi", PICTURES, codec="mpeg4", options={}, time_base=ticks)
    media.write_video(folder / "hevc.mp4", PICTURES, codec="libx265",
        options={"x265-params": "log-level=error"})  # fmt: skip
    media.write_video(folder / "ffv1.mkv", PICTURES, codec="ffv1", options={"level": "3"})
    for suffix, codec in OTHERS.items():
        large = [media.smooth_rgb(32, 48, phase) for phase in range(6)]  # as mxf wants them
        media.write_video(
            folder / f"{suffix}.{suffix}", large, codec=codec, options={"threads": "1"},
            time_base=ticks, audio=suffix in ("flv", "wmv", "wtv"),
            pix_fmt={"apng": "rgb24", "mjpeg": "yuvj420p"}.get(suffix, "yuv420p"),
        )  # fmt: skip
    frames = [Image.fromarray(picture) for picture in PICTURES]
    for suffix in ("gif", "webp"):
        frames[0].save(folder / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=40)
    for suffix in ("png", "jpg", "tif", "bmp"):
        frames[0].save(folder / f"b.{suffix}")
    deep = PICTURES[0].astype(np.uint16) * 257
    images.write_picture(folder / "c.png", deep, deep[..., 0])
    container = av.open(str(folder / "c.tif"), "w", format="image2")
    with container:
        stream: Any = container.add_stream("tiff", 1, width=24, height=16, pix_fmt="rgb48le")
        container.mux(stream.encode(av.VideoFrame.from_ndarray(deep, "rgb48le")))
        container.mux(stream.encode(None))
    torch.manual_seed(0)
    model = MANA(MANAConfig(channels=8, encoder_blocks=1, decoder_blocks=1, memory_slots=8))
    save(model, folder / "w.safetensors")
    torch.save({"state_dict": model.state_dict()}, folder / "w.pt")
    return folder


def run(intact: Path, first: int, last: int, *others: int, script: Path = SCRIPT) -> list[str]:
    """Run the cases, `others` after the rest; returns what went wrong."""
    wrong = []
    while first < last:
        command = [sys.executable, script, intact, *map(str, (first, last, *others))]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as child:
            case, why = _follow(child, wrong, first - 1)
        if not why:
            return wrong
        wrong.append(f"case {case}: {why}")
        first = max(case, first) + 1
    return wrong


def _follow(child: subprocess.Popen, wrong: list[str], case: int) -> tuple[int, str]:
    """Add what the cases of a child report to `wrong`; returns the last one and how it died."""
    lines: queue.Queue[str] = queue.Queue()
    reading = threading.Thread(target=_collect, args=(child.stdout, lines), daemon=True)
    reading.start()
    spent = before = 0.0  # seconds of processor time, at the last word and at the last look
    wait, done = None, False  # until all is loaded
    while True:
        try:
            line = lines.get(timeout=wait)
        except queue.Empty:
            if not _hangs(child.pid, spent, before):
                before = _state(child.pid)[0]
                continue
            child.kill()
            reading.join()
            return case, "hangs"
        wait, spent = SILENCE, (before := _state(child.pid)[0])
        if line.startswith("bad "):
            wrong.append(f"case {case}: {line}")
        elif line.isdecimal():
            case = int(line)
        elif line == "done":
            done = True
        elif not line:
            reading.join()
            failed = child.wait() or not done
            return case, f"exit code {child.returncode}" if failed else ""


def _hangs(pid: int, spent: float, before: float) -> bool:
    """Whether a silent process computes without end, or sleeps all the time.

    It does not if it only gets no processor: others on the machine may leave it none for minutes.
    """
    now, states = _state(pid)
    return now - spent > SILENCE / 2 or (now == before and not states & set("RDTt"))


def _state(pid: int) -> tuple[float, set[str]]:
    """Seconds of processor time of a process, and the states of its threads; none if it is gone."""
    seconds, states = 0.0, set()
    for file in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(OSError):  # the thread ends in between
            fields = file.read_text().rpartition(")")[2].split()
            seconds += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            states.add(fields[0])
    return seconds, states


def _collect(lines: Any, into: queue.Queue) -> None:
    for line in lines:
        into.put(line.rstrip("\n"))
    into.put("")


def summary(intact: Path, cases: range, wrong: list[str]) -> str:
    """A table: how many files of each kind, and what went wrong with them."""
    files = sorted(intact.iterdir())
    kinds = sorted({file.suffix for file in files})
    what_for = ("files", "crashes", "hangs", "tracebacks")
    found: dict[tuple[str, str], int] = dict.fromkeys(itertools.product(kinds, what_for), 0)
    for case in cases:
        found[files[case % len(files)].suffix, "files"] += 1
    for line in wrong:
        number, why = re.fullmatch(r"case (\d+): (exit|hangs|bad).*", line, re.DOTALL).groups()  # pyright: ignore
        what = {"exit": "crashes", "hangs": "hangs", "bad": "tracebacks"}[why]
        found[files[int(number) % len(files)].suffix, what] += 1
    rows = ["| kind | files | crashes | hangs | tracebacks |", "|---|---|---|---|---|"]
    for kind in kinds:
        row = [found[kind, what] for what in what_for]
        rows.append(f"| {kind[1:]} | " + " | ".join(f"{number:,}" for number in row) + " |")
    return "\n".join(rows)


def test_damage_is_repeatable_and_damages():
    data = bytes(range(256)) * 8
    results = {damaged(data, seed) for seed in range(50)}
    assert len(results) > 45
    assert damaged(data, 7) == damaged(data, 7)


def test_a_few_damaged_files(intact):
    # the last ones found something: a duration of two points, a stream that appears on the way, a
    # block of PNG with a length near 2^32, which Pillow reserved, and a time of more than 64 bits
    assert run(intact, 0, 420, 10302, 10427, 16777, 18087) == []


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_thousands_of_damaged_files(intact):
    cases = range(1000, 21000)
    wrong = run(intact, cases[0], cases[-1] + 1)
    print("", summary(intact, cases, wrong), *wrong, sep="\n")
    assert wrong == []


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
        ("import time; time.sleep(999)", "hangs"),
        ("while True: pass", "hangs"),
        ("import os; os._exit(0)", "exit code 0"),
        ("raise ValueError('x')", "ValueError"),
        ("bytearray(2 << 30)", "MemoryError"),
    ],
    ids=["crash", "hang", "endless loop", "early end", "exception", "memory"],
)
def test_the_harness_sees_failures(what, found, intact, tmp_path, monkeypatch):
    """A case that crashes, hangs, raises or takes memory must not pass for a good one."""
    text = SCRIPT.read_text().replace("    if source.suffix in WEIGHTS:", f"    {what}\n    if 0:")
    # what fails before it reads a file does not need the package
    text = re.sub(r"(?m)^(import torch|from mana_triton.*|    torch.*)$", "", text)
    text = text.replace("(MediaError, CheckpointError)", "ZeroDivisionError")
    (tmp_path / "fuzz.py").write_text(text)
    monkeypatch.setattr("test_fuzz.SILENCE", 3)
    [wrong] = run(intact, 0, 1, script=tmp_path / "fuzz.py")
    assert found in wrong
    kind = "| 1 | 0 | 0 | 1 |"
    if found.startswith(("exit", "hangs")):
        kind = "| 1 | 1 | 0 | 0 |" if found.startswith("exit") else "| 1 | 0 | 1 | 0 |"
    first = sorted(intact.iterdir())[0].suffix[1:]
    assert f"| {first} {kind}" in summary(intact, range(1), [wrong])


def test_a_paused_process_does_not_hang():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"]) as child:
        child.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + 30
        while "T" not in _state(child.pid)[1]:
            assert time.monotonic() < deadline
        assert not _hangs(child.pid, *[_state(child.pid)[0]] * 2)
        child.kill()
