"""Small clips for the tests of the evaluation."""

from pathlib import Path

import numpy as np
from media import write_video
from PIL import Image

# out and input channels and side of AlexNet's convolutions
ALEXNET = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}


def moving(frames: int, height: int, width: int, speed: int = 1, seed: int = 0) -> np.ndarray:
    """A texture that moves right by `speed` pixels per frame: [T, H, W, 3] uint8."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(height, width + speed * frames, 3))
    for axis in (0, 1):
        x = x + 2 * np.roll(x, 1, axis) + 2 * np.roll(x, 3, axis)
    x = np.clip(128 + 14 * x, 0, 255).astype(np.uint8)
    starts = range(speed * frames, 0, -speed) if speed else [0] * frames
    return np.stack([x[:, start : start + width] for start in starts])


def write(folder: Path, frames: np.ndarray, name: str = "{:04d}.png", first: int = 0) -> None:
    """Frames as pictures in a folder, numbered from `first`."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames, first):
        Image.fromarray(frame).save(folder / name.format(index))


def write_black(folder: Path, frames: int = 1) -> None:
    """A clip of small black frames."""
    write(folder, np.zeros((frames, 12, 12, 3), np.uint8))


def write_lossless(path: Path, frames: np.ndarray) -> None:
    """Frames as an RGB video without loss."""
    write_video(path, list(frames), codec="ffv1", pix_fmt="bgr0", options={"level": "3"})
