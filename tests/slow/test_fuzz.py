"""Damaged files of every kind end in one line, without crash, hang or excessive memory."""

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

from mana_triton.checkpoint import save
from mana_triton.model import MANA, MANAConfig
from mana_triton.video import images

SCRIPT, ROOT = Path(__file__).parent / "fuzz.py", Path(__file__).parents[2]
SILENCE = 600  # seconds without a line, after which a case is taken to hang
# containers that are read and not written, and what stands in them
OTHERS = {
    "mpg": "mpeg2video", "flv": "flv", "wmv": "wmv2", "ogg": "libvpx", "mxf": "mpeg2video",
    "wtv": "mpeg2video", "ivf": "libvpx", "y4m": "wrapped_avframe", "h264": "libx264",
    "m4v": "mpeg4", "mjpeg": "mjpeg", "apng": "apng",
}  # fmt: skip
PICTURES = [media.smooth_rgb(16, 24, phase) for phase in range(6)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS"),
]


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
    for suffix in ("gif",):
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


def run(intact: Path, first: int, last: int, *others: int) -> list[str]:
    """Run the cases, `others` after the rest; returns what went wrong."""
    wrong: list[str] = []
    while first < last:
        command = [sys.executable, SCRIPT, intact, *map(str, (first, last, *others))]
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
    last, wait = "", None  # until all is loaded
    while True:
        try:
            line = lines.get(timeout=wait)
        except queue.Empty:
            child.kill()
            reading.join()
            return case, "hangs"
        if line.startswith("bad "):
            wrong.append(f"case {case}: {line}")
        elif line.isdecimal():
            case = int(line)
        elif not line:
            reading.join()
            failed = child.wait() or last != "done"
            return case, f"exit code {child.returncode}" if failed else ""
        last, wait = line, SILENCE


def _collect(lines: Any, into: queue.Queue) -> None:
    for line in lines:
        into.put(line.rstrip("\n"))
    into.put("")


def test_damage_is_repeatable_and_damages():
    data = bytes(range(256)) * 8
    results = {damaged(data, seed) for seed in range(50)}
    assert len(results) > 45
    assert damaged(data, 7) == damaged(data, 7)


def test_hundreds_of_damaged_files(intact):
    # the last ones found something: a duration of two points, a stream that appears on the way, a
    # block of PNG with a length near 2^32, which Pillow reserved, and a time of more than 64 bits
    assert run(intact, 0, 420, 10302, 10427, 16777, 18087) == []


@pytest.mark.timeout(6 * 3600)
def test_thousands_of_damaged_files(intact):
    cases = range(1000, 21000)
    wrong = run(intact, cases[0], cases[-1] + 1)
    print(f"{len(cases)} damaged files of {len(list(intact.iterdir()))} kinds", *wrong, sep="\n")
    assert wrong == []


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("import os; os.kill(os.getpid(), 11)", "exit code -11"),
        ("while True: pass", "hangs"),
        ("import os; os._exit(0)", "exit code 0"),
        ("raise ValueError('x')", "ValueError"),
        ("bytearray(2 << 30)", "MemoryError"),
    ],
    ids=["crash", "hang", "early end", "exception", "memory"],
)
def test_harness_sees_failures(what, found, intact, tmp_path, monkeypatch):
    text = SCRIPT.read_text().replace("    if source.suffix in WEIGHTS:", f"    {what}\n    if 0:")
    (tmp_path / "fuzz.py").write_text(text.replace("parents[2]", f"parents[0] / '{ROOT}'"))
    monkeypatch.setattr("test_fuzz.SILENCE", 30)
    monkeypatch.setattr("test_fuzz.SCRIPT", tmp_path / "fuzz.py")
    [wrong] = run(intact, 0, 1)
    assert found in wrong
