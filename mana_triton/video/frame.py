"""What files in and out share: pictures with their times, and errors in plain words."""

import errno
import os
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from av.error import FFmpegError, InvalidDataError
from av.stream import Disposition, Stream

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
        alpha: [H, W] opacity in the type of `rgb`; None if nothing shines through.
        tags: what else is in a picture's file, see images.py.
        damaged: frames of the file, up to this one, that were damaged or missing.
    """

    rgb: np.ndarray
    pts: int
    time_base: Fraction
    duration: int = 0
    name: str | None = None
    alpha: np.ndarray | None = None
    damaged: int = 0
    tags: Mapping[str, bytes] = field(default_factory=dict)


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


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hidden(path: Path) -> Path:
    """A name beside `path` under which it grows; the name of `path` may be as long as names can."""
    return path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")


def is_cover(stream: Stream) -> bool:
    return bool(stream.disposition & Disposition.attached_pic)
