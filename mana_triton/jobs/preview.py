"""One frame as a PNG, before hours of work: bicubic, ours, and the most detailed places zoomed."""

import sys
import time
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mana_triton.engine.upscaler import Upscaler
from mana_triton.files import write_atomically
from mana_triton.jobs import job
from mana_triton.jobs.options import JobOptions
from mana_triton.jobs.resume import Tracked, track_scenes
from mana_triton.resize import SCALE, upscale_bicubic
from mana_triton.video.color import with_bits
from mana_triton.video.frame import MediaError, explained
from mana_triton.video.reader import Reader

CROPS = 3
ZOOMED = 220  # pixels; the least width of a zoomed crop
GAP, TEXT = 8, 20  # pixels between pictures, and for the labels above them
COLORS = ("#ff4040", "#40c040", "#4080ff")  # of the crops' outlines


def default_path(output: Path, number: int) -> Path:
    """Where the preview of a job lies that would write `output`."""
    return output.with_name(f"{output.stem}_preview_{number}.png")


def write_preview(
    source: Path, output: Path, upscaler: Upscaler, options: JobOptions
) -> dict[str, Any]:
    """Write one frame as the whole job would show it; returns the summary.

    Raises:
        MediaError: there is no such frame, or the PNG cannot be written.
    """
    started, number = time.perf_counter(), options.preview or 0
    with job.open_input(source, options) as reader:
        _check_output(output, reader, options.overwrite)
        plan = job.make_plan(source, reader, upscaler)
        picture = sheet(*enlarged_frame(reader, upscaler, number))
        job.show_notes(reader.notes)
        with explained(output, "write"):
            write_atomically(output, picture.save)
        job.say(f"{source} frame {number} -> {output}")
        size = {"width": SCALE * reader.width, "height": SCALE * reader.height}
    seconds = time.perf_counter() - started
    return {
        "output": str(output), "frames": 1, **size, "seconds": round(seconds, 3),
        "ms_per_frame": round(1000 * seconds, 2), **job.division(plan),
    }  # fmt: skip


def _check_output(output: Path, reader: Reader, overwrite: bool) -> None:
    if output.suffix.lower() != ".png":
        raise MediaError(f"{output}: must end in .png, as --preview writes one picture")
    with explained(output, "write"):
        is_link, exists = output.is_symlink(), output.exists()
    if is_link:
        raise MediaError(f"{output}: is a symbolic link; give the file's own name")
    if exists and any(map(output.samefile, reader.files)):
        raise MediaError(f"{output}: is the input itself; choose another output")
    if exists and not overwrite:
        raise MediaError(f"{output}: exists; use --overwrite or choose another output")


def enlarged_frame(reader: Reader, upscaler: Upscaler, number: int) -> tuple[np.ndarray, Any]:
    """Frame `number` (from 0) of the reader, and what a job over all frames makes of it.

    Raises:
        MediaError: there are not that many frames.
    """
    radius = upscaler.window_radius
    last = min(number + radius + 1, sys.maxsize)
    window: deque[Tracked] = deque(maxlen=2 * radius + 1)
    window.extend(track_scenes(islice(iter(reader), last), radius))
    total = window[-1].point.number if window else 0
    if total <= number:
        raise MediaError(
            f"{reader.path}: has {total} frames, numbered from 0; there is no {number}"
        )
    first = total - len(window)
    results = upscaler.stream(
        window,
        pixels=lambda source: source.frame.rgb,
        is_cut=lambda source: source.is_cut,
        start=first,
        skip=number - first,
    )
    source, picture = next(iter(results))
    return source.frame.rgb, picture


def detailed(rgb: np.ndarray, side: int, count: int) -> list[tuple[int, int]]:
    """Top left corners of the squares that hold most detail and do not overlap.

    Detail is the sum of the squared differences of neighboring luma values.
    """
    luma = rgb.astype(np.float64) @ (0.299, 0.587, 0.114)
    energy = np.zeros_like(luma)
    energy[1:] += np.diff(luma, axis=0) ** 2
    energy[:, 1:] += np.diff(luma, axis=1) ** 2
    sums = np.zeros((luma.shape[0] + 1, luma.shape[1] + 1))
    sums[1:, 1:] = energy.cumsum(0).cumsum(1)
    squares = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
    corners = []
    while len(corners) < count and squares.max() >= 0:
        y, x = (int(i) for i in np.unravel_index(squares.argmax(), squares.shape))
        corners.append((y, x))
        squares[max(y - side + 1, 0) : y + side, max(x - side + 1, 0) : x + side] = -1
    return corners


def sheet(lr: np.ndarray, enlarged: np.ndarray) -> Image.Image:
    """Bicubic on the left, ours on the right: whole, and below the most detailed squares."""
    lr, enlarged = (with_bits(picture, 8) for picture in (lr, enlarged))
    bicubic = upscale_bicubic(torch.from_numpy(lr.copy())).numpy()
    side = max(min(lr.shape[0], lr.shape[1], max(min(lr.shape[:2]) // 5, 16)), 1)
    corners = detailed(lr, side, CROPS)
    zoom = -(-ZOOMED // (SCALE * side))
    square = zoom * SCALE * side
    width = CROPS * square + (CROPS - 1) * GAP
    height = max(round(width * lr.shape[0] / lr.shape[1]), 1)
    canvas = Image.new("RGB", (2 * width + 3 * GAP, height + square + 2 * TEXT + 3 * GAP), "black")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    columns = zip(("bicubic", "mana_triton"), (bicubic, enlarged), strict=True)
    for column, (label, picture) in enumerate(columns):
        left, top = GAP + column * (width + GAP), GAP + TEXT
        image = Image.fromarray(picture)
        draw.text((left, GAP), f"{label}, {image.width}x{image.height}", "white", font)
        canvas.paste(image.resize((width, height), Image.Resampling.LANCZOS), (left, top))
        ratio, below = width / lr.shape[1], top + height + GAP
        draw.text((left, below), f"detail, {100 * zoom} %", "white", font)
        for i, ((y, x), color) in enumerate(zip(corners, COLORS, strict=False)):
            box = [left + x * ratio, top + y * ratio]
            draw.rectangle([*box, *(edge + side * ratio for edge in box)], outline=color, width=2)
            crop = image.crop([SCALE * n for n in (x, y, x + side, y + side)])  # pyright: ignore
            place = left + i * (square + GAP), below + TEXT
            canvas.paste(crop.resize((square, square), Image.Resampling.NEAREST), place)
            draw.rectangle([*place, *(edge + square - 1 for edge in place)], outline=color, width=2)
    return canvas
