"""Kinds of files, their order, and writing them whole or not at all."""

import hashlib
import os
import re
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

WRITABLE_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".nut")
VIDEOS = (
    *WRITABLE_VIDEOS, ".3gp", ".asf", ".divx", ".dv", ".f4v", ".flv", ".gif", ".m2ts", ".mpeg",
    ".mpg", ".mts", ".mxf", ".ogv", ".vob", ".wmv", ".y4m",
)  # fmt: skip
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")
SERVICE_NAMES = {"@eadir", "__macosx", "thumbs.db", "desktop.ini"}  # of systems, not of people


def is_video(path: Path) -> bool:
    """Whether the name says that the file is a video."""
    return path.suffix.lower() in VIDEOS


def is_picture(path: Path) -> bool:
    """Whether the name says that the file is a picture."""
    return path.suffix.lower() in PICTURES


def natural_key(name: str | Path) -> list[tuple[int, str]]:
    """Sort key that puts "frame 2" before "frame 10"."""
    parts = re.split(r"(\d+)", Path(name).name)
    return [(int(part), "") if part.isdecimal() else (0, part) for part in parts]


def is_hidden(path: Path) -> bool:
    """Whether a file belongs to the system: .DS_Store, Thumbs.db, @eaDir and the like."""
    return path.name.startswith(".") or path.name.lower() in SERVICE_NAMES


def visible(folder: Path) -> list[Path]:
    """What a folder holds, in natural order, without files of the system."""
    return sorted((path for path in folder.iterdir() if not is_hidden(path)), key=natural_key)


def visible_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, in natural order, none inside a folder of the system."""
    for path in visible(folder):
        if path.is_dir():
            yield from visible_below(path)
        elif path.is_file():
            yield path


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`; once on the disk, the file gets its own name."""
    # the name of `path` may be as long as names can be
    part = path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")
    try:
        yield part
        sync(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file whole or not at all.

    Args:
        path: its name; an older file of that name is replaced.
        content: what it holds, or a function that writes to the path it is given.
    """
    with atomic(path) as part:
        if callable(content):
            content(part)
        elif isinstance(content, str):
            part.write_text(content)
        else:
            part.write_bytes(content)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def content_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
