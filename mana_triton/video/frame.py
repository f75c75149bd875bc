"""What readers and writers share: frames with their times, errors in plain words, notes."""

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from av.error import FFmpegError, InvalidDataError

MP4_LIKE = (".mp4", ".m4v", ".mov")

# av.VideoFrame or av.Packet; PyAV's stubs let their times be None where that cannot be
Timed = Any


class MediaError(Exception):
    """A file cannot be read or written; the message is one line for the user."""


@dataclass(frozen=True)
class Frame:
    """A picture and when it is shown.

    Attributes:
        rgb: [H, W, 3] full-range RGB, uint8 or, of more than 8 bits, uint16 (0 .. 65535).
        pts: presentation time, in units of `time_base` seconds.
        duration: in the same units, 0 if unknown.
        name: file stem in an image folder, else None.
        alpha: [H, W] opacity in the type of `rgb`; None if fully opaque.
        damaged: frames of the file, up to this one, that were damaged or missing.
        tags: metadata of a picture's file, see images.py.
    """

    rgb: np.ndarray
    pts: int
    time_base: Fraction
    duration: int = 0
    name: str | None = None
    alpha: np.ndarray | None = None
    damaged: int = 0
    tags: Mapping[str, Any] = field(default_factory=dict)


class Notes(list[str]):
    """Lines the user should see, each once."""

    def add(self, line: str) -> None:
        """Append a line unless it is there already."""
        if line not in self:
            self.append(line)


@contextmanager
def explained(path: Path, action: str) -> Iterator[None]:
    """Turn FFmpeg's and the system's errors into a MediaError about `path`."""
    try:
        yield
    except (FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot {action}: {reason(error)}") from error


def reason(error: OSError | FFmpegError) -> str:
    """A system or FFmpeg error in plain words."""
    if isinstance(error, InvalidDataError):
        return "it is not a video, or it is damaged"
    known = {
        errno.ENOENT: "no such file or folder",
        errno.EACCES: "permission denied",
        errno.ENOSPC: "the disk is full; free some space or write elsewhere",
        errno.EFBIG: "disk full or file too large; write elsewhere",
        errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    }
    return known.get(error.errno or 0, error.strerror or str(error))


def exact_seconds(seconds: float) -> Fraction:
    """The decimal number that was meant: 0.4 is 2/5, the float nearest to it is a little more."""
    return Fraction(str(seconds))
