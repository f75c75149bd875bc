"""The frames of a stream: checked, numbered, and kept as long as they may be needed again."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mana_triton.engine.scene_cuts import CutDetector, Pixels


@dataclass
class NumberedFrame:
    """A frame of a stream."""

    source: Any
    given: Pixels
    pixels: Tensor  # [H, W, 3] uint8, uint16 or float32 in [0, 1], a copy
    number: int
    scene: int  # number of the scene's first frame


def numbered_frames(
    sources: Iterable[Any],
    pixels: Callable[[Any], Pixels],
    is_cut: Callable[[Any], bool] | None,
    start: int,
) -> Iterator[NumberedFrame]:
    """The frames of sources; arguments as of `Upscaler.stream`.

    Raises:
        ValueError: a frame of another kind, size or type.
    """
    detector, first, scene = CutDetector(), None, start
    for number, source in enumerate(sources, start):
        given = pixels(source)
        copied = _copied(given)
        first = copied if first is None else first
        if copied.shape != first.shape:
            raise ValueError(
                f"all frames must have one size, {first.shape[1]}x{first.shape[0]} as the first, "
                f"got {copied.shape[1]}x{copied.shape[0]} at frame {number}"
            )
        if copied.dtype != first.dtype:
            raise ValueError(
                f"all frames must have one type, {first.dtype} as the first, "
                f"got {copied.dtype} at frame {number}"
            )
        if detector.is_cut(given) if is_cut is None else is_cut(source):
            scene = number
        yield NumberedFrame(source, given, copied, number, scene)


class Replayable:
    """Frames that can be iterated over again, from the oldest that is still kept.

    Attributes:
        failed: whether reading a new frame raised an exception.
    """

    def __init__(self, frames: Iterator[NumberedFrame]):
        self._frames, self._kept = frames, deque[NumberedFrame]()
        self.failed = False

    def __iter__(self) -> Iterator[NumberedFrame]:
        yield from list(self._kept)
        while True:
            self.failed = True
            frame = next(self._frames, None)
            self.failed = False
            if frame is None:
                return
            self._kept.append(frame)
            yield frame

    def drop_before(self, number: int) -> None:
        """Do not keep frames with smaller numbers."""
        while self._kept and self._kept[0].number < number:
            self._kept.popleft()


def _copied(frame: Pixels) -> Tensor:
    """A copy [H, W, 3] uint8, uint16 or float32 in [0, 1]."""
    if isinstance(frame, Tensor):
        fits = frame.ndim == 3 and frame.shape[0] == 3 and frame.numel()
        if not (fits and frame.is_floating_point()):
            raise ValueError(
                "a tensor frame must be [3, H, W] in [0, 1], "
                f"got {list(frame.shape)} of {frame.dtype}"
            )
        return rearrange(frame.detach().to(torch.float32, copy=True), "c h w -> h w c")
    if not (isinstance(frame, np.ndarray) and frame.dtype in (np.uint8, np.uint16)):
        kind = frame.dtype if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"a frame must be a uint8 or uint16 array or a float tensor, got {kind}")
    if not (frame.ndim == 3 and frame.shape[2] == 3 and frame.size):
        raise ValueError(f"an array frame must be [H, W, 3], got {list(frame.shape)}")
    return torch.from_numpy(frame.copy())


@torch.inference_mode(False)
def as_given(picture: Tensor, given: Pixels) -> Pixels:
    """An enlarged frame [4H, 4W, 3] in the form, type and place of the frame that was given."""
    if isinstance(given, Tensor):
        return rearrange(picture, "h w c -> c h w").to(given).contiguous()
    return picture.numpy()
