"""Small clips for the tests of training."""

from pathlib import Path

import av
import numpy as np
from PIL import Image


def textured(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Smooth noise with detail at all scales, uint8 [*shape, 3]."""
    x = rng.normal(size=(*shape, 3))
    for axis in (-3, -2):
        x = x + 2 * np.roll(x, 1, axis) + 2 * np.roll(x, 3, axis)
    return np.clip(128 + 14 * x, 0, 255).astype(np.uint8)


def film(*lengths: int) -> np.ndarray:
    """Scenes of one color each: [T, 40, 40, 3]."""
    colors = np.array([(200, 30, 30), (30, 160, 60), (40, 60, 220)], np.uint8)
    frames = [np.tile(colors[i % 3], (n, 40, 40, 1)) for i, n in enumerate(lengths)]
    return np.concatenate(frames)


def write_video(path: Path, frames: np.ndarray) -> None:
    """A lossless RGB video."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_pictures(folder: Path, frames: np.ndarray) -> None:
    folder.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i:03d}.png")
