"""Clips for training and validation: where they come from, and a cache of decoded frames.

Frames are uint8 RGB, sRGB as decoded, channels last ([T, H, W, 3]). A clip is a video, a folder of
frames, a Vimeo-90K sequence or a still picture. Each is decoded once into a folder with one .npy
per clip, opened by memory map, and an index.json, which also lists the scene cuts.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.files import (
    PICTURES,
    VIDEOS,
    atomic,
    is_picture,
    is_video,
    visible_below,
    write_atomically,
)
from mana_triton.model import MANAConfig

WINDOW = MANAConfig.frames  # frames of a sample
INDEX = "index.json"


class DataError(ValueError):
    """Data that cannot be used; the message says what to do about it."""


@dataclass(frozen=True)
class Clip:
    """One decoded clip.

    Attributes:
        name: of the source.
        kind: "clip" or "still".
        path: its .npy file.
        shape: (T, H, W, 3).
        cuts: the first frame of every scene but the first.
    """

    name: str
    kind: str
    path: Path
    shape: tuple[int, int, int, int]
    cuts: tuple[int, ...] = ()

    @property
    def scenes(self) -> list[range]:
        """The frames of each scene."""
        edges = (0, *self.cuts, self.shape[0])
        return [range(first, end) for first, end in pairwise(edges)]

    @property
    def frames(self) -> np.ndarray:
        """[T, H, W, 3] uint8, read-only, mapped from the file."""
        return _open_npy(self.path)


def open_frames(path: Path) -> np.ndarray:
    """[T, H, W, 3] uint8, read-only, mapped from a file of `write_frames`."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{path} must be a complete file of decoded frames, got: {error}; delete it, then "
            "decode or copy it again"
        ) from error


_open_npy = lru_cache(maxsize=1024)(open_frames)


# ---- sources


@dataclass(frozen=True)
class Source:
    """Something to decode.

    Attributes:
        name: for people; several sources may share one.
        kind: "clip" or "still".
        place: the file or folder.
        files: one video, or pictures in order.
        one_scene: known to have no cut.
    """

    name: str
    kind: str
    place: Path
    files: tuple[Path, ...]
    one_scene: bool = False

    @property
    def key(self) -> str:
        """What tells it from all other sources."""
        return str(self.place.resolve())

    def stamp(self) -> dict:
        """What identifies the content without reading it."""
        stats = [file.stat() for file in self.files]
        size, time = sum(s.st_size for s in stats), max(s.st_mtime_ns for s in stats)
        return {"kind": self.kind, "files": len(stats), "size": size, "mtime_ns": time}

    def frames(self) -> Iterator[np.ndarray]:
        """The frames [H, W, 3] uint8 RGB, with the colors and fields that `infer` decodes.

        Raises:
            DataError: a file is unreadable or damaged.
        """
        return (
            _read_video(self.place) if is_video(self.files[0]) else map(_read_picture, self.files)
        )


def _read_video(path: Path) -> Iterator[np.ndarray]:
    from mana_triton.video.frame import MediaError
    from mana_triton.video.reader import open_reader

    try:
        with open_reader(path) as reader:
            for frame in reader:
                yield _to_8_bits(frame.rgb)
            damage = reader.truncated
    except MediaError as error:
        raise DataError(f"{path} must be a readable video, got: {error}; remove it") from error
    if damage:
        raise DataError(f"{path} must be an undamaged video, got: {damage}; remove it")


def _read_picture(path: Path) -> np.ndarray:
    from mana_triton.video.frame import MediaError, explained
    from mana_triton.video.images import read_picture

    try:
        with explained(path, "read the picture"):
            return _to_8_bits(read_picture(path).rgb)
    except MediaError as error:
        raise DataError(f"{path} must be a readable picture, got: {error}; remove it") from error


def _to_8_bits(rgb: np.ndarray) -> np.ndarray:
    """8 or 16 bits as 8, rounded."""
    if rgb.dtype == np.uint8:
        return rgb
    return ((rgb.astype(np.uint32) + 128) // 257).astype(np.uint8)


def find_sources(path: Path, split: str = "train") -> list[Source]:
    """The clips below `path`: videos, folders of frames at any depth, or Vimeo-90K.

    Args:
        path: a video or a folder.
        split: "train" or "test", which list of Vimeo-90K to use.

    Raises:
        DataError: no such path, nothing in it, or a sequence of the list is incomplete.
    """
    if (path / f"sep_{split}list.txt").is_file():
        sources = list(vimeo_sources(path, split))
        for source in sources:
            if missing := missing_file(source):
                raise DataError(f"{path} must hold every listed sequence, {missing} is missing")
        return sources
    folders: dict[Path, list[Path]] = {}
    sources = []
    for file in _files_below(path):
        if is_video(file):
            sources.append(Source(file.stem, "clip", file, (file,)))
        elif is_picture(file) and file != path:
            folders.setdefault(file.parent, []).append(file)
    for folder, files in folders.items():
        name = "-".join(folder.relative_to(path).parts) or folder.name
        sources.append(Source(name, "clip", folder, tuple(files)))
    if not sources:
        raise DataError(
            f"{path} must hold videos ({' '.join(VIDEOS)}), folders of frames, Vimeo-90K "
            "or a decoded cache; it holds none; pass another folder"
        )
    return sources


def vimeo_sources(root: Path, split: str) -> Iterator[Source]:
    """The sequences of a Vimeo-90K folder that its train or test list names."""
    for name in (root / f"sep_{split}list.txt").read_text().split():
        folder = root / "sequences" / name
        files = tuple(folder / f"im{i}.png" for i in range(1, WINDOW + 1))
        yield Source(name.replace("/", "-"), "clip", folder, files, one_scene=True)


def missing_file(source: Source) -> Path | None:
    """The first file of a source that does not exist."""
    return next((file for file in source.files if not file.is_file()), None)


def find_stills(path: Path) -> list[Source]:
    """The pictures below `path`, each a source of its own."""
    files = [file for file in _files_below(path) if is_picture(file)]
    if not files:
        raise DataError(
            f"{path} must hold pictures ({' '.join(PICTURES)}); it holds none; pass another folder"
        )
    return [Source(file.stem, "still", file, (file,), one_scene=True) for file in files]


def _files_below(path: Path) -> Iterable[Path]:
    if not path.exists():
        raise DataError(f"{path} must exist, there is no such file or folder; check the path")
    return visible_below(path) if path.is_dir() else [path]


# ---- the cache


def open_clips(
    paths: Iterable[Path], cache: Path, *, kind: str = "clip", split: str = "train"
) -> list[Clip]:
    """Decode what is not yet in `cache` and open all clips (or stills) of `paths`.

    A path that is itself such a cache is opened as it is, without its sources.

    Args:
        paths: videos, folders of videos or frames, Vimeo-90K, or decoded caches; for
            kind="still" pictures, folders of pictures, or decoded caches.
        cache: folder for the decoded clips; made when needed. Interrupted work is continued.
        kind: "clip" or "still".
        split: "train" or "test", which list of Vimeo-90K to use.

    Raises:
        DataError: a missing path, a folder without clips, or a file that cannot be decoded.
    """
    clips, sources = [], []
    for path in paths:
        if (path / INDEX).is_file():
            clips += _read_cache(path, kind)
        else:
            sources += find_stills(path) if kind == "still" else find_sources(path, split)
    return clips + (_decode(sources, cache) if sources else [])


def _read_cache(cache: Path, kind: str) -> list[Clip]:
    """All clips (or stills) of a cache, by its index alone."""
    entries = [entry for entry in read_index(cache).values() if entry["kind"] == kind]
    if not entries:
        raise DataError(f"{cache / INDEX} must list at least one {kind}, it lists none")
    for entry in entries:
        if not (cache / entry["file"]).is_file():
            raise DataError(f"{cache / INDEX} lists {entry['file']}, which is missing; copy it")
    clips = [_as_clip(cache, entry) for entry in entries]
    return sorted(clips, key=lambda clip: (clip.name, clip.path.name))


def read_index(cache: Path) -> dict[str, dict]:
    """The entries of a cache by the paths of their sources; empty when there is no index."""
    file = cache / INDEX
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{file} must be JSON, got: {error}; delete it") from error


def write_index(cache: Path, index: dict[str, dict]) -> None:
    """Replace the index of a cache, if it has changed."""
    if read_index(cache) != index:
        write_atomically(cache / INDEX, json.dumps(index, indent=1))


def _as_clip(cache: Path, entry: dict) -> Clip:
    shape, cuts = tuple(entry["shape"]), tuple(entry["cuts"])
    return Clip(entry["name"], entry["kind"], cache / entry["file"], shape, cuts)


def _decode(sources: list[Source], cache: Path) -> list[Clip]:
    """Bring the cache up to date with the sources and open them."""
    cache.mkdir(parents=True, exist_ok=True)
    index = read_index(cache)
    clips = []
    saved = time.monotonic()
    try:
        with decode_progress() as progress:
            for source in progress.track(sources, description=f"decoding into {cache}"):
                entry = decoded(source, index, cache)
                if entry is None:
                    index[source.key] = entry = decode(source, cache)
                    if time.monotonic() > saved + 5:
                        write_index(cache, index)
                        saved = time.monotonic()
                clips.append(_as_clip(cache, entry))
    finally:
        write_index(cache, index)
    return clips


def decoded(source: Source, index: dict[str, dict], cache: Path) -> dict | None:
    """The entry of a source in the index, if its file is there and the source did not change."""
    entry = index.get(source.key, {})
    fresh = source.stamp().items() <= entry.items() and (cache / entry["file"]).is_file()
    return entry if fresh else None


def decode(source: Source, cache: Path, smallest: int = 1, shortest: int = 1) -> dict:
    """Decode a source into the cache, and look for its cuts.

    Returns:
        Its entry of the index.

    Raises:
        DataError: the source is unreadable, a side has fewer than `smallest` pixels, or there are
            fewer than `shortest` frames.
    """
    detector = CutDetector()
    cuts: list[int] = []

    def checked() -> Iterator[np.ndarray]:
        number = -1
        for number, frame in enumerate(source.frames()):
            if min(frame.shape[:2]) < smallest:
                raise DataError(f"a side of fewer than {smallest} pixels")
            yield frame  # whose size is checked where it is written
            if not source.one_scene and detector.is_cut(frame):
                cuts.append(number)
        if number + 1 < shortest:
            raise DataError(f"fewer than {shortest} frames")

    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in source.name)
    file = f"{safe}-{hashlib.sha256(source.key.encode()).hexdigest()[:8]}.npy"
    shape = write_frames(cache / file, checked(), str(source.place))
    entry = {"name": source.name, "file": file, "shape": list(shape), "cuts": cuts}
    return entry | source.stamp()


def decode_progress() -> Progress:
    """A progress bar on stderr, only on a terminal."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def write_frames(path: Path, frames: Iterable[np.ndarray], origin: str) -> tuple[int, ...]:
    """Write frames [H, W, 3] uint8 one by one as an .npy file, complete or not at all.

    Returns:
        The shape (T, H, W, 3).

    Raises:
        DataError: no frames, or frames of several sizes; the message names the origin.
    """
    shape, count = (0, 0, 3), 0
    with atomic(path) as part, part.open("wb") as out:
        for frame in frames:
            if not count:
                shape = frame.shape
                _write_npy_header(out, (1, *shape))
            if frame.shape != shape:
                raise DataError(
                    f"the frames of {origin} must have one size, frame {count} has "
                    f"{frame.shape[1]}x{frame.shape[0]} after {shape[1]}x{shape[0]}"
                )
            out.write(np.ascontiguousarray(frame).data)
            count += 1
        if not count:
            raise DataError(f"{origin} must have frames, it has none; remove it")
        out.seek(0)
        _write_npy_header(out, (count, *shape))
    _open_npy.cache_clear()
    return (count, *shape)


def _write_npy_header(out, shape: tuple[int, ...]) -> None:
    """NumPy pads the header, so its length is the same for every number of frames."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)
