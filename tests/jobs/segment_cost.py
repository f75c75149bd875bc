"""Print what it costs that work survives a stop: runs with segments against runs without.

    python tests/jobs/segment_cost.py [ROUNDS]

The clip is examples/demo.mp4, shrunk and played to and fro, and the network a very small one that
gives bilinear enlargements: segments cost the largest share where frames cost little. Each round
runs both in turn, and both again in the other order; a ratio is the median of all pairs. Encoders
other than the default run once, for the size alone.
"""

import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT)]

import media
import numpy as np
import torch
from PIL import Image

from mana_triton import infer
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.jobs.resume import LENGTH
from mana_triton.model import MANA, MANAConfig
from mana_triton.video.writer import open_reader, open_writer

COUNT, SIZE = 4 * LENGTH + 2, (48, 28)
OTHERS = (
    ("libx265", ".mp4", "preset=fast"),
    ("libsvtav1", ".mp4", "preset=10"),
    ("libvpx-vp9", ".mkv", "cpu-used=8"),
    ("ffv1", ".mkv", "level=3"),
)


class Plain:
    """A writer without segments, used as one with them."""

    number, done = 0, None

    def __init__(self, path: Path, reader: Any, *size: int, **settings: Any):
        self.length = settings.pop("length")
        del settings["job"], settings["restart"]
        self._writer = open_writer(path, reader, *size, **settings)
        self.notes = self._writer.notes

    def write(self, rgb: Any, frame: Any, seen: Any) -> None:
        self._writer.write(rgb, frame)

    def __enter__(self) -> "Plain":
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)


def make_clip(folder: Path) -> Path:
    with open_reader(ROOT / "examples" / "demo.mp4") as reader:
        rgbs = [frame.rgb for frame in reader]
    small = [np.asarray(Image.fromarray(rgb).resize(SIZE)) for rgb in rgbs]
    period = [*small, *reversed(small)]
    pictures = [period[i % len(period)] for i in range(COUNT)]
    return media.write_video(folder / "clip.mp4", pictures, color=(1, 1, 1, 1), audio=True)


def small_network() -> MANA:
    model = MANA(MANAConfig(channels=8, encoder_blocks=1, decoder_blocks=1, memory_slots=8))
    torch.nn.init.zeros_(model.conv_last.weight)
    torch.nn.init.zeros_(model.conv_last.bias)  # pyright: ignore[reportArgumentType]
    return model.eval()


def run(clip: Path, upscaler: Upscaler, flags: list[str], suffix: str, plain: bool) -> list[float]:
    """Seconds on the clock, seconds of the processor, and bytes."""
    output = clip.with_name(f"out{suffix}")
    args = infer.parse_args([str(clip), "-o", str(output), *flags])
    writer = Plain if plain else infer.open_resumable
    with patch.object(infer, "open_resumable", writer):
        began = time.perf_counter(), time.process_time()
        infer.enlarge(clip, output, upscaler, args)
        took = [time.perf_counter() - began[0], time.process_time() - began[1]]
    took.append(output.stat().st_size)
    output.unlink()
    return took


def percent(pairs: list[tuple[list[float], list[float]]], index: int) -> str:
    return f"{100 * (median(ours[index] / plain[index] for ours, plain in pairs) - 1):+.2f} %"


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    infer.console.quiet = True
    rows = [f"| {COUNT} frames, {SIZE[0]}x{SIZE[1]} | time | processor time | size |"]
    rows.append("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        clip = make_clip(Path(name))
        upscaler = Upscaler(small_network(), EngineOptions(tile=0, workers=1))
        run(clip, upscaler, [], ".mp4", True)  # warms up
        pairs = []
        for number in range(2 * rounds):
            order = (False, True) if number % 2 else (True, False)
            took = {plain: run(clip, upscaler, [], ".mp4", plain) for plain in order}
            pairs.append((took[False], took[True]))
        rows.append(f"| libx264, {len(pairs)} pairs | " + " | ".join(
            percent(pairs, index) for index in range(3)) + " |")  # fmt: skip
        for codec, suffix, option in OTHERS:
            flags = ["--codec", codec, "-e", option]
            pair = [run(clip, upscaler, flags, suffix, plain) for plain in (False, True)]
            rows.append(f"| {codec}, 1 pair | | | {percent([(pair[0], pair[1])], 2)} |")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
