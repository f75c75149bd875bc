"""Hostile input: damaged files of every kind end in one line, without crash, hang or bloat."""

import queue
import subprocess
import sys
import threading
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

from mana_triton import images
from mana_triton.checkpoint import save
from mana_triton.model import MANA, MANAConfig

SCRIPT = Path(__file__).parent / "fuzz.py"
SILENCE = 90  # seconds without a word from a case that hangs; others on this machine may pause it
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
    for suffix in ("mp4", "mov", "nut", "ts"):
        media.write_video(folder / f"{suffix}.{suffix}", PICTURES, rotation=(90, False), **rich)
    source = media.write_video(parts / "a.mkv", PICTURES, attachment=b"font" * 9, **rich)
    media.add_subtitles(folder / "mkv.mkv", source, [(10, 50, "one"), (60, 100, "two")])
    (folder / "mkv.srt").unlink()
    media.write_video(folder / "webm.webm", PICTURES, codec="libvpx-vp9", options={"cpu-used": "8"})
    ticks = Fraction(1, 25)
    media.write_video(folder / "avi.avi", PICTURES, codec="mpeg4", options={}, time_base=ticks)
    media.write_video(folder / "hevc.mp4", PICTURES, codec="libx265",
        options={"x265-params": "log-level=error"})  # fmt: skip
    media.write_video(folder / "ffv1.mkv", PICTURES, codec="ffv1", options={"level": "3"})
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


def run(intact: Path, first: int, last: int, script: Path = SCRIPT) -> list[str]:
    """Run the cases; returns what went wrong."""
    wrong = []
    while first < last:
        command = [sys.executable, script, intact, str(first), str(last)]
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
    try:
        while line := lines.get(timeout=SILENCE):
            if line.startswith("bad "):
                wrong.append(f"case {case}: {line}")
            else:
                case = int(line)
    except queue.Empty:
        child.kill()
        return case, "hangs"
    finally:
        reading.join()
    return case, f"exit code {child.returncode}" if child.wait() else ""


def _collect(lines: Any, into: queue.Queue) -> None:
    for line in lines:
        into.put(line.rstrip("\n"))
    into.put("")


def test_damage_is_repeatable_and_damages():
    data = bytes(range(256)) * 8
    results = {damaged(data, seed) for seed in range(50)}
    assert len(results) > 45
    assert damaged(data, 7) == damaged(data, 7)


def test_a_few_damaged_files(intact):
    assert run(intact, 0, 420) == []


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
def test_thousands_of_damaged_files(intact):
    assert run(intact, 1000, 21000) == []


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
        ("import time; time.sleep(99)", "hangs"),
        ("raise ValueError('x')", "ValueError"),
        ("bytearray(2 << 30)", "MemoryError"),
    ],
    ids=["crash", "hang", "exception", "memory"],
)
def test_the_harness_sees_failures(what, found, intact, tmp_path, monkeypatch):
    """A case that crashes, hangs, raises or takes memory must not pass for a good one."""
    text = SCRIPT.read_text().replace("    if source.suffix in WEIGHTS:", f"    {what}\n    if 0:")
    text = text.replace("Path(__file__).parents[1]", f"Path({str(SCRIPT.parents[1])!r})")
    (tmp_path / "fuzz.py").write_text(text)
    monkeypatch.setattr("test_fuzz.SILENCE", 20)
    [wrong] = run(intact, 0, 1, tmp_path / "fuzz.py")
    assert found in wrong
