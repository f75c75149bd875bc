"""One frame beside its bicubic enlargement, with the most detailed places zoomed, as a PNG."""

import sys
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from mana_triton.engine.upscaler import Upscaler
from mana_triton.jobs.resume import Trail
from mana_triton.resize import SCALE, upscale_bicubic
from mana_triton.video.color import with_bits
from mana_triton.video.frame import MediaError, explained, hidden, sync
from mana_triton.video.reader import Reader

CROPS = 3
ZOOMED = 220  # pixels that a zoomed crop measures at least
GAP, TEXT = 8, 20  # pixels between pictures, and for the labels above them
COLORS = ("#ff4040", "#40c040", "#4080ff")  # of the crops' frames


def enlarged_frame(reader: Reader, upscaler: Upscaler, number: int) -> tuple[np.ndarray, Any]:
    """Frame `number` (from 0) of the reader, and what a run over all frames makes of it.

    Raises:
        MediaError: there are not that many frames.
    """
    trail = Trail(upscaler.window_radius)
    window: deque[tuple[np.ndarray, bool]] = deque(maxlen=2 * upscaler.window_radius + 1)
    for frame in islice(iter(reader), min(number + upscaler.window_radius + 1, sys.maxsize)):
        window.append((frame.rgb, trail.see(frame)[0]))
    if trail.number <= number:
        raise MediaError(
            f"{reader.path}: has {trail.number} frames, numbered from 0; there is no {number}"
        )
    first = trail.number - len(window)
    results = upscaler.stream(
        window, pixels=lambda x: x[0], is_cut=lambda x: x[1], start=first, skip=number - first
    )
    (rgb, _), picture = next(iter(results))
    return rgb, picture


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
        draw.text((left, below), f"most detail, {SCALE}x, shown {zoom} times larger", "white", font)
        for i, ((y, x), color) in enumerate(zip(corners, COLORS, strict=False)):
            box = [left + x * ratio, top + y * ratio]
            draw.rectangle([*box, *(edge + side * ratio for edge in box)], outline=color, width=2)
            crop = image.crop([SCALE * n for n in (x, y, x + side, y + side)])  # pyright: ignore
            place = left + i * (square + GAP), below + TEXT
            canvas.paste(crop.resize((square, square), Image.Resampling.NEAREST), place)
            draw.rectangle([*place, *(edge + square - 1 for edge in place)], outline=color, width=2)
    return canvas


def save(picture: Image.Image, path: Path) -> None:
    """Write a PNG that has its name only when it is complete."""
    part = hidden(path)
    try:
        with explained(path, "write"):
            picture.save(part)
            sync(part)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
