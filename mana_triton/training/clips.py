"""Training and validation clips: degradations, a cache of decoded clips, random samples.

Frames are uint8 RGB, sRGB as decoded, channels last ([T, H, W, 3]) until a batch is made. A clip is
a video, a folder of frames, a Vimeo-90K sequence or a still picture; each is decoded once into a
folder with one .npy per clip, opened by memory map, and an index.json, which also says where
scenes change: no sample mixes two of them.

Sample i of iteration n is a function of (seed, n, i) alone, so a training run resumes without any
state of the data, and the number of threads that prepare batches changes nothing.
"""

import hashlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress
from torch import Tensor

from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.resize import SCALE, matlab_bicubic

if TYPE_CHECKING:
    from mana_triton.training.degradation import LowClip

WINDOW = 7
MARGIN = 2  # LR pixels around a crop that x1/4 bicubic reaches into
VIDEOS = {".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".y4m"}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
INDEX = "index.json"


class DataError(ValueError):
    """Data that cannot be used; the message says what to do about it."""


# ---- degradations


def pil_bicubic(hr: Tensor) -> Tensor:
    """Shrink by 4 with Pillow's BICUBIC: [..., H, W, 3] uint8 -> [..., H/4, W/4, 3]."""
    from PIL import Image

    H, W = hr.shape[-3:-1]
    size = (W // SCALE, H // SCALE)
    frames = hr.reshape(-1, H, W, 3).numpy()
    small = [Image.fromarray(f).resize(size, Image.Resampling.BICUBIC) for f in frames]
    lr = torch.from_numpy(np.stack([np.asarray(picture) for picture in small]))
    return lr.reshape(*hr.shape[:-3], *lr.shape[1:])


DEGRADATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "matlab_bicubic": matlab_bicubic,
    "pil_bicubic": pil_bicubic,
}


def degrade(hr: Tensor, method: str = "matlab_bicubic") -> Tensor:
    """Make low-resolution frames.

    Args:
        hr: [..., H, W, 3] uint8; H and W are multiples of 4.
        method: "matlab_bicubic", or on the CPU "pil_bicubic".

    Returns:
        [..., H/4, W/4, 3] uint8.

    Raises:
        ValueError: for another method, layout, type or size.
    """
    if method not in DEGRADATIONS:
        raise ValueError(f"method must be one of {', '.join(DEGRADATIONS)}, got {method!r}")
    if hr.dtype != torch.uint8 or hr.ndim < 3 or hr.shape[-1] != 3:
        raise ValueError(f"hr must be [..., H, W, 3] uint8, got {list(hr.shape)} {hr.dtype}")
    H, W = hr.shape[-3:-1]
    if H % SCALE or W % SCALE or not H or not W:
        raise ValueError(
            f"height and width must be multiples of {SCALE}, got {H}x{W}; "
            f"crop to {H // SCALE * SCALE}x{W // SCALE * SCALE}"
        )
    return DEGRADATIONS[method](hr)


# ---- decoded clips


@dataclass(frozen=True)
class Clip:
    """One decoded clip: `shape` is (T, H, W, 3), `kind` is "clip" or "still".

    `cuts` holds the first frame of every scene but the first.
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
    """[T, H, W, 3] uint8, read-only, mapped from a file that `write_frames` wrote."""
    try:
        return np.load(path, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise DataError(
            f"{path} must be a whole file of decoded frames, got: {error}; delete it, and make or "
            "copy it anew"
        ) from error


_open_npy = lru_cache(maxsize=1024)(open_frames)


@dataclass(frozen=True)
class Source:
    """Something to decode: the files it consists of (one video, or pictures in order)."""

    name: str
    kind: str
    place: Path
    files: tuple[Path, ...]
    one_scene: bool = False  # known to be, so that no cut is looked for

    def stamp(self) -> dict:
        """What identifies the content without reading it."""
        stats = [file.stat() for file in self.files]
        size = sum(stat.st_size for stat in stats)
        return {"files": len(stats), "size": size, "mtime_ns": max(s.st_mtime_ns for s in stats)}

    def frames(self) -> Iterator[np.ndarray]:
        if self.files[0].suffix.lower() in VIDEOS:
            return _read_video(self.files[0])
        return (_read_picture(file) for file in self.files)


def _read_video(path: Path) -> Iterator[np.ndarray]:
    """Frames of the first video stream, [H, W, 3] uint8 RGB."""
    from av.error import FFmpegError

    from mana_triton.video.reader import MediaError, open_container

    try:
        with open_container(path) as container:
            if not container.streams.video:
                raise DataError(f"{path} must have a video stream, it has none; remove it")
            container.streams.video[0].thread_type = "AUTO"
            for frame in container.decode(video=0):
                yield frame.to_ndarray(format="rgb24")
    except (FFmpegError, MediaError) as error:
        raise DataError(f"{path} must be a readable video, got: {error}; remove it") from error


def _read_picture(path: Path) -> np.ndarray:
    """A picture, [H, W, 3] uint8 RGB."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            deep = picture.mode.startswith("I;16") or (picture.mode, picture.format) == ("I", "PNG")
            if deep:  # Pillow would clip 16 bits of gray instead of dividing them
                gray = ((np.asarray(picture).astype(np.uint32) + 128) // 257).astype(np.uint8)
                return np.repeat(gray[:, :, None], 3, axis=2)
            if picture.mode in ("I", "F"):
                raise DataError(
                    f"{path} must have 8 or 16 bits per channel, has 32 (Pillow's mode "
                    f"{picture.mode}); convert it"
                )
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{path} must be a readable picture, got: {error}; remove it") from error


def vimeo_source(root: Path, name: str) -> Source:
    """A sequence of a Vimeo-90K folder by its name in a list, such as 00001/0001."""
    folder = root / "sequences" / name
    files = tuple(folder / f"im{i}.png" for i in range(1, WINDOW + 1))
    return Source(name.replace("/", "-"), "clip", folder, files, one_scene=True)


def _vimeo_sources(root: Path, split: str) -> list[Source]:
    """The sequences of a Vimeo-90K folder that its train or test list names."""
    sources = []
    for name in (root / f"sep_{split}list.txt").read_text().split():
        source = vimeo_source(root, name)
        missing = [file for file in source.files if not file.is_file()]
        if missing:
            raise DataError(f"{root} must hold every listed sequence, {missing[0]} is missing")
        sources.append(source)
    return sources


def find_sources(path: Path, split: str = "train") -> list[Source]:
    """The clips below `path`: videos, folders of frames (any nesting), or Vimeo-90K."""
    if (path / f"sep_{split}list.txt").is_file():
        return _vimeo_sources(path, split)
    folders: dict[Path, list[Path]] = {}
    sources = []
    for file in _files_below(path):
        if file.suffix.lower() in VIDEOS:
            sources.append(Source(file.stem, "clip", file, (file,)))
        elif file.suffix.lower() in PICTURES and file != path:
            folders.setdefault(file.parent, []).append(file)
    for folder, files in folders.items():
        name = "-".join(folder.relative_to(path).parts) or folder.name
        sources.append(Source(name, "clip", folder, tuple(files)))
    if not sources:
        raise DataError(
            f"{path} must hold videos ({' '.join(sorted(VIDEOS))}), folders of frames, Vimeo-90K "
            "or a decoded cache; it holds none; pass another folder"
        )
    return sources


def find_stills(path: Path) -> list[Source]:
    """The pictures below `path`, each a source of its own."""
    files = [file for file in _files_below(path) if file.suffix.lower() in PICTURES]
    if not files:
        raise DataError(
            f"{path} must hold pictures ({' '.join(sorted(PICTURES))}); it holds none; "
            "pass another folder"
        )
    return [Source(file.stem, "still", file, (file,), one_scene=True) for file in files]


def _files_below(path: Path) -> list[Path]:
    if not path.exists():
        raise DataError(f"{path} must exist, there is no such file or folder; check the path")
    if path.is_file():
        return [path]
    return sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))


def open_clips(
    paths: list[Path], cache: Path, *, kind: str = "clip", split: str = "train"
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
        DataError: for a missing path, a folder without clips, or a file that cannot be decoded.
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
    index = read_index(cache)
    entries = [entry for entry in index.values() if entry["kind"] == kind]
    if not entries:
        raise DataError(f"{cache / INDEX} must list at least one {kind}, it lists none")
    for entry in entries:
        if not (cache / entry["file"]).is_file():
            raise DataError(f"{cache / INDEX} lists {entry['file']}, which is missing; copy it")
    older = [entry for entry in entries if "cuts" not in entry]
    with decode_progress() as progress:
        for entry in progress.track(older, description=f"looking for cuts in {cache}"):
            entry["cuts"] = [] if kind == "still" else _find_cuts(cache / entry["file"])
    if older and os.access(cache, os.W_OK):  # else they are looked for again the next time
        write_index(cache, index)
    clips = [_as_clip(cache, entry) for entry in entries]
    return sorted(clips, key=lambda clip: (clip.name, clip.path.name))


def _find_cuts(path: Path) -> list[int]:
    """The first frame of every scene but the first."""
    detector = CutDetector()
    return [number for number, frame in enumerate(_open_npy(path)) if detector.is_cut(frame)]


def read_index(cache: Path) -> dict[str, dict]:
    """Source path -> entry; empty when there is no index."""
    file = cache / INDEX
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise DataError(f"{file} must be JSON, got: {error}; delete it") from error


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
                key = str(source.place.resolve())
                stamp = source.stamp() | {"kind": source.kind}
                entry = index.get(key, {})
                fresh = stamp.items() <= entry.items() and (cache / entry["file"]).is_file()
                if not fresh:
                    index[key] = entry = _decode_one(source, key, cache) | stamp
                if "cuts" not in entry:
                    path = cache / entry["file"]
                    entry["cuts"] = [] if source.one_scene else _find_cuts(path)
                if not fresh and time.monotonic() > saved + 5:
                    write_index(cache, index)
                    saved = time.monotonic()
                clips.append(_as_clip(cache, entry))
    finally:
        write_index(cache, index)
    return clips


def decode_progress() -> Progress:
    """A bar on stderr, on terminals alone."""
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal, transient=True)


def _decode_one(source: Source, key: str, cache: Path) -> dict:
    """Write one .npy, frame by frame; it has its final name only when it is complete."""
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in source.name)
    file = f"{safe}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.npy"
    shape = write_frames(cache / file, source.frames(), str(source.place))
    return {"name": source.name, "file": file, "shape": list(shape)}


def write_frames(path: Path, frames: Iterable[np.ndarray], origin: str) -> tuple[int, ...]:
    """Write frames [H, W, 3] uint8 one by one as an .npy file, complete or not at all.

    Returns:
        The shape (T, H, W, 3).

    Raises:
        DataError: no frames, or frames of several sizes; the message names the origin.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    shape, count = (0, 0, 3), 0
    try:
        with part.open("wb") as out:
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
        part.replace(path)
        _open_npy.cache_clear()
    finally:
        part.unlink(missing_ok=True)
    return (count, *shape)


def _write_npy_header(out, shape: tuple[int, ...]) -> None:
    """NumPy pads the header, so that its length is the same for every number of frames."""
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(out, header)


def write_index(cache: Path, index: dict[str, dict]) -> None:
    """Replace the index of a cache, if it has changed."""
    text = json.dumps(index, indent=1)
    if (cache / INDEX).is_file() and (cache / INDEX).read_text() == text:
        return
    part = cache / f"{INDEX}.{os.getpid()}.part"
    part.write_text(text)
    part.replace(cache / INDEX)


# ---- samples

Batches = Generator[tuple[Tensor, Tensor], None, None]


class Sampler:
    """Random training batches from clips and stills.

    Args:
        clips: moving clips of at least 7 frames; their scenes of fewer are left out.
        stills: pictures; they become clips by synthetic motion.
        crop: LR pixels; every picture must have at least 4 * crop HR pixels each way.
        batch: samples per iteration.
        seed: with the iteration and the sample's index it decides everything.
        degradation: see `degrade`.
        still_fraction: share of samples from stills when there are both kinds.
        low: low-resolution variants of every clip and still by their paths (see
            `real.open_low_clips`); None makes low-resolution frames by `degradation`.

    Raises:
        DataError: for a clip that is too short or too small; the message names it.
    """

    def __init__(
        self,
        clips: list[Clip],
        stills: list[Clip],
        *,
        crop: int,
        batch: int,
        seed: int,
        degradation: str = "matlab_bicubic",
        still_fraction: float = 0.3,
        low: "dict[Path, list[LowClip]] | None" = None,
    ):
        if not clips and not stills:
            raise DataError("there must be at least one clip or still, got none; pass --data")
        for clip in clips:
            if clip.shape[0] < WINDOW:
                raise DataError(
                    f"a training clip must have at least {WINDOW} frames, {clip.name} has "
                    f"{clip.shape[0]}; remove it"
                )
        short = [sum(len(scene) < WINDOW for scene in clip.scenes) for clip in clips]
        self.short_scenes = sum(short)  # left out
        usable = [c for c, n in zip(clips, short, strict=True) if n < len(c.scenes)]
        if clips and not usable:
            raise DataError(
                f"a training clip must have a scene of at least {WINDOW} frames, none of "
                f"{len(clips)} has; pass others as --data"
            )
        clips = usable
        # a variant loses up to three pixels where its grid begins
        needed = SCALE * crop + (SCALE - 1 if low else 0)
        for clip in clips + stills:
            _, H, W, _ = clip.shape
            if min(H, W) < needed:
                raise DataError(
                    f"crops of {crop} need pictures of at least {needed} pixels each way, "
                    f"{clip.name} has {W}x{H}; lower --crop or remove it"
                )
        self.clips, self.stills = clips, stills
        self.crop, self.batch, self.seed = crop, batch, seed
        self.degradation, self.low = degradation, low
        self.still_fraction = still_fraction if clips else 1.0
        self.seconds: deque[float] = deque(maxlen=100)  # that preparing a batch took

    def sample(self, iteration: int, index: int) -> tuple[Tensor, Tensor]:
        """One sample: lr [7, c, c, 3] and the center's hr [4c, 4c, 3], uint8."""
        return self._finish(self._cut(iteration, index), torch.device("cpu"))

    def load(self, iteration: int, share: range | None = None) -> tuple[Tensor, Tensor]:
        """The batch of an iteration: lr [B, 7, 3, c, c], hr [B, 3, 4c, 4c], float32 in [0, 1].

        `share` says which of its samples; None is all of them.
        """
        return self.assemble(self.cuts(iteration, share), torch.device("cpu"))

    def cuts(self, iteration: int, share: range | None = None) -> "list[_Cut]":
        """What `assemble` makes the batch of an iteration of."""
        return [self._cut(iteration, i) for i in (range(self.batch) if share is None else share)]

    def assemble(self, cuts: "list[_Cut]", device: torch.device) -> tuple[Tensor, Tensor]:
        """A batch as `load` returns it, degraded on a device: bit for bit the same on each."""
        lrs, hrs = zip(*(self._finish(cut, device) for cut in cuts), strict=True)
        lr = rearrange(torch.stack(lrs), "b t h w c -> b t c h w")
        hr = rearrange(torch.stack(hrs), "b h w c -> b c h w")
        return lr.contiguous().float() / 255, hr.contiguous().float() / 255

    def _cut(self, iteration: int, index: int) -> "_Cut":
        """Everything random about a sample."""
        rng = np.random.Generator(np.random.Philox(seed=[self.seed, iteration, index]))
        still = bool(self.stills) and rng.random() < self.still_fraction
        pool = self.stills if still else self.clips
        clip = pool[rng.integers(len(pool))]
        if self.low:
            lr, hr = self._cut_variant(clip, self.low[clip.path], rng)
            return _Cut(lr, hr, 0, 0, _draw_turns(rng))
        rows, cols = self._place(clip, rng)
        if still:
            hr = self._moving_still(clip, rows, cols, rng)
        else:
            hr = _clip_frames(clip, rows, cols, rng)
        return _Cut(None, hr, rows.margin, cols.margin, _draw_turns(rng))

    def _finish(self, cut: "_Cut", device: torch.device) -> tuple[Tensor, Tensor]:
        """Degrade, crop and turn: lr [7, c, c, 3] and the center's hr [4c, 4c, 3], uint8."""
        lr, hr = cut.lr, cut.hr.to(device, non_blocking=True)
        if lr is None:
            lr = degrade(hr, self.degradation)
            c, C = self.crop, SCALE * self.crop
            top, left = cut.top, cut.left
            lr = lr[:, top : top + c, left : left + c]
            hr = hr[WINDOW // 2, SCALE * top : SCALE * top + C, SCALE * left : SCALE * left + C]
        return _turn(lr.to(device), hr, cut.turns)

    def per_second(self, workers: int) -> float:
        """Batches per second that the threads can prepare, by the last hundred."""
        return workers * len(self.seconds) / sum(self.seconds)

    def batches(
        self,
        start: int,
        stop: int,
        workers: int = 1,
        share: range | None = None,
        device: torch.device | None = None,
    ) -> Batches:
        """The batches of iterations start..stop-1, prepared ahead in background threads.

        Given a GPU as `device`, they are degraded there where the degradation can be.
        """
        possible = self.degradation == "matlab_bicubic" and not self.low
        there = device if possible and device and device.type != "cpu" else None
        pool = ThreadPoolExecutor(workers, "batches", torch.set_num_threads, (1,))
        pending = deque()
        ahead = iter(range(start, stop))
        try:
            for _ in range(start, stop):
                while len(pending) < workers + 2 and (n := next(ahead, None)) is not None:
                    work = self.cuts if there else self.load
                    pending.append(pool.submit(self._timed, work, n, share))
                batch = pending.popleft().result()
                yield self.assemble(batch, there) if there else batch
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _timed(self, work: Callable, *args) -> Any:
        began = time.monotonic()
        result = work(*args)
        self.seconds.append(time.monotonic() - began)
        return result

    def _cut_variant(
        self, clip: Clip, variants: "list[LowClip]", rng: np.random.Generator
    ) -> tuple[Tensor, Tensor]:
        """A crop of a degraded variant and the same place of the original's center frame."""
        variant = variants[rng.integers(len(variants))]
        frames = variant.frames()
        T, h, w, _ = frames.shape
        times = _choose_times(clip.scenes if clip.kind == "clip" else [range(T)], rng)
        c, C = self.crop, SCALE * self.crop
        y, x = int(rng.integers(h - c + 1)), int(rng.integers(w - c + 1))
        lr = np.array(frames[times, y : y + c, x : x + c])
        center = times[WINDOW // 2] if clip.kind == "clip" else 0
        top, left = variant.top + SCALE * y, variant.left + SCALE * x
        hr = np.array(clip.frames[center, top : top + C, left : left + C])
        return torch.from_numpy(lr), torch.from_numpy(hr)

    def _place(self, clip: Clip, rng: np.random.Generator) -> tuple["_Span", "_Span"]:
        """Where the sample lies: half of all samples come from a picture shrunk by up to 2."""
        _, H, W, _ = clip.shape
        size = SCALE * self.crop
        shrink = 1.0
        if rng.random() < 0.5:
            shrink = rng.uniform(max(0.5, size / min(H, W)), 1)
        rows = _choose_span(H, max(size, int(H * shrink)), self.crop, rng)
        cols = _choose_span(W, max(size, int(W * shrink)), self.crop, rng)
        return rows, cols

    def _moving_still(
        self, clip: Clip, rows: "_Span", cols: "_Span", rng: np.random.Generator
    ) -> Tensor:
        """Frames [7, h, w, 3] of a camera moving over a still, with objects that move by it."""
        maps = _motion(rng, rows.length, cols.length)
        hr = _warp_still(clip, rows, cols, maps)  # [7, 3, h, w]
        for _ in range(rng.choice(3, p=[0.5, 0.3, 0.2])):
            other = self.stills[rng.integers(len(self.stills))]
            _paste(hr, _sprite(other, rng, SCALE * self.crop), rng)
        hr = hr.add_(0.5).clamp_(0, 255).to(torch.uint8)
        return rearrange(hr, "t c h w -> t h w c").contiguous()


class _Cut(NamedTuple):
    """A sample before it is degraded, or one that needs no degradation any more."""

    lr: Tensor | None  # [7, c, c, 3] uint8, if it is there already
    hr: Tensor  # [7, h, w, 3] uint8 with a margin; the center's [4c, 4c, 3] beside an lr
    top: int  # LR pixels of the margin
    left: int
    turns: tuple[bool, bool, bool]


@dataclass(frozen=True)
class _Span:
    """One axis of a crop with its margin, in a picture scaled from `full` to `scaled` pixels."""

    start: int
    length: int
    margin: int  # LR pixels before the crop
    full: int
    scaled: int

    def source(self, start: int, stop: int) -> tuple[int, int]:
        """The pixels of the unscaled picture that scaled pixels start..stop-1 come from."""
        ratio = self.full / self.scaled
        return round(start * ratio), round(stop * ratio)


def _choose_span(full: int, scaled: int, crop: int, rng: np.random.Generator) -> _Span:
    """Place a crop on one of the four grids of LR pixels, with as much margin as there is."""
    phase = rng.integers(min(SCALE, scaled - SCALE * crop + 1))
    cells = (scaled - phase) // SCALE
    first = rng.integers(cells - crop + 1)
    before = min(MARGIN, first)
    after = min(MARGIN, cells - crop - first)
    start = phase + SCALE * (first - before)
    length = SCALE * (before + crop + after)
    return _Span(int(start), int(length), int(before), full, scaled)


def _clip_frames(clip: Clip, rows: _Span, cols: _Span, rng: np.random.Generator) -> Tensor:
    """Seven frames [7, h, w, 3] of a clip."""
    times = _choose_times(clip.scenes, rng)
    y0, y1 = rows.source(rows.start, rows.start + rows.length)
    x0, x1 = cols.source(cols.start, cols.start + cols.length)
    frames = np.array(clip.frames[times, y0:y1, x0:x1])
    return _shrink(torch.from_numpy(frames), rows.length, cols.length)


def _choose_times(scenes: list[range], rng: np.random.Generator) -> np.ndarray:
    """Seven frames of a scene, every second one in a fifth of the samples, in either order."""
    longest = max(len(scene) for scene in scenes)
    stride = 2 if longest >= 2 * WINDOW - 1 and rng.random() < 0.2 else 1
    starts = [scene[: max(0, len(scene) - stride * (WINDOW - 1))] for scene in scenes]
    ends = np.cumsum([len(some) for some in starts])
    n = int(rng.integers(ends[-1]))
    number = int(np.searchsorted(ends, n, side="right"))  # of the scene that the n-th lies in
    start = starts[number][n - int(ends[number])]  # counted from the end of its starts
    times = start + stride * np.arange(WINDOW)
    return times[::-1] if rng.random() < 0.5 else times


def still_frames(clip: Clip, seed: int) -> Iterator[np.ndarray]:
    """A still under synthetic motion: seven frames [H, W, 3] uint8, the still in the middle."""
    _, H, W, _ = clip.shape
    rng = np.random.Generator(np.random.Philox(seed=seed))
    rows, cols = (_Span(start=0, length=n, margin=0, full=n, scaled=n) for n in (H, W))
    hr = _warp_still(clip, rows, cols, _motion(rng, H, W))
    for frame in hr.add_(0.5).clamp_(0, 255).byte():
        yield rearrange(frame, "c h w -> h w c").numpy()


def _shrink(frames: Tensor, height: int, width: int) -> Tensor:
    """Antialiased resize of [T, h, w, 3] uint8, for augmentation only."""
    if frames.shape[1:3] == (height, width):
        return frames
    x = rearrange(frames, "t h w c -> t c h w")
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return rearrange(x, "t c h w -> t h w c").contiguous()


def _draw_turns(rng: np.random.Generator) -> tuple[bool, bool, bool]:
    """Whether to flip rows, columns, and to exchange them."""
    return rng.random() < 0.5, rng.random() < 0.5, rng.random() < 0.5


def _turn(lr: Tensor, hr: Tensor, turns: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor]:
    """The same flips and quarter turn for lr [7, c, c, 3] and hr [4c, 4c, 3]."""
    for axis, flips in ((-3, turns[0]), (-2, turns[1])):
        if flips:
            lr, hr = lr.flip(axis), hr.flip(axis)
    return (lr.transpose(-3, -2), hr.transpose(-3, -2)) if turns[2] else (lr, hr)


# ---- synthetic motion: affine maps [7, 2, 3] from output (x, y, 1) to texture (x, y), in pixels


def _motion(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """A smooth pan, zoom and rotation about the middle of [height, width], with a little shake.

    The center frame stays as it is, so the target of training is never resampled.
    """
    t = np.arange(WINDOW) - WINDOW // 2
    moves, turns, shakes = rng.random(3) < (0.9, 0.4, 0.5)
    angle, zoom = rng.normal(0, 0.01, 2) * turns
    direction = rng.uniform(0, 2 * math.pi)
    speed = 24 * rng.random() ** 2 * moves  # HR pixels per frame
    velocity = speed * np.array([math.cos(direction), math.sin(direction)])
    bend = rng.normal(0, 0.06, 2) * speed
    shift = t[:, None] * velocity + t[:, None] ** 2 * bend
    shift += rng.normal(0, 0.5, (WINDOW, 2)) * shakes * (t != 0)[:, None]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    return _similarity(angle * t, np.exp(zoom * t), middle, middle + shift)


def _similarity(
    angle: np.ndarray, zoom: np.ndarray, origin: np.ndarray, image: np.ndarray
) -> np.ndarray:
    """Maps that turn by angle [7] and scale by zoom [7] and take origin [2] to image [7, 2]."""
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    linear = rearrange(np.stack([cos, -sin, sin, cos]), "(i j) t -> t i j", i=2)
    return np.concatenate([linear, (image - linear @ origin)[:, :, None]], axis=2)


def _warp(texture: Tensor, maps: np.ndarray, height: int, width: int, padding: str) -> Tensor:
    """Sample texture [C, h, w] at maps [7, 2, 3]: [7, C, height, width], bicubic."""
    h, w = texture.shape[1:]
    size = np.array([w, h])[:, None]
    unit = maps * 2 / size  # pixel centers: x -> (2x + 1) / w - 1
    unit[:, :, 2:] += 1 / size - 1
    unit = torch.from_numpy(unit).float()
    y, x = torch.arange(height).float(), torch.arange(width).float()
    along_x = unit[:, None, None, :, 0] * x[:, None]  # [7, 1, width, 2]
    along_y = unit[:, None, None, :, 1] * y[:, None, None] + unit[:, None, None, :, 2]
    texture = texture.expand(WINDOW, -1, -1, -1)
    return F.grid_sample(
        texture, along_x + along_y, mode="bicubic", padding_mode=padding, align_corners=False
    )


def _warp_still(clip: Clip, rows: _Span, cols: _Span, maps: np.ndarray) -> Tensor:
    """The region (rows, cols) of a still under maps; beyond the picture it is mirrored."""
    corners = np.array([[x, y, 1] for x in (0, cols.length) for y in (0, rows.length)]).T
    reached = maps @ corners  # [7, 2, 4]
    low = np.floor(reached.min(axis=(0, 2))).astype(int) - 2
    high = np.ceil(reached.max(axis=(0, 2))).astype(int) + 2
    left, right = max(0, cols.start + low[0]), min(cols.scaled, cols.start + high[0])
    top, bottom = max(0, rows.start + low[1]), min(rows.scaled, rows.start + high[1])
    y0, y1 = rows.source(top, bottom)
    x0, x1 = cols.source(left, right)
    picture = torch.from_numpy(np.array(clip.frames[:, y0:y1, x0:x1]))
    picture = _shrink(picture, bottom - top, right - left)[0]
    maps = maps.copy()
    maps[:, :, 2] += (cols.start - left, rows.start - top)
    texture = rearrange(picture, "h w c -> c h w").float()
    return _warp(texture, maps, rows.length, cols.length, "reflection")


def _sprite(clip: Clip, rng: np.random.Generator, size: int) -> Tensor:
    """A patch of a picture under a soft round or square mask: [4, h, w], RGB and alpha."""
    _, H, W, _ = clip.shape
    h, w = (int(size * rng.uniform(0.2, 0.6)) for _ in range(2))
    y, x = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
    patch = torch.from_numpy(np.array(clip.frames[0, y : y + h, x : x + w]))
    power = rng.uniform(1.5, 6)
    across = torch.linspace(-1, 1, w).abs() ** power
    down = torch.linspace(-1, 1, h).abs() ** power
    inside = 1 - across - down[:, None]
    alpha = (inside * rng.uniform(0.1, 0.5) * min(h, w)).clamp(0, 1)
    return torch.cat([rearrange(patch, "h w c -> c h w").float(), alpha[None]])


def _paste(frames: Tensor, sprite: Tensor, rng: np.random.Generator) -> None:
    """Blend a sprite [4, h, w] that moves on its own path into frames [7, 3, H, W], in place."""
    (H, W), (h, w) = frames.shape[2:], sprite.shape[1:]
    maps = _motion(rng, h, w)
    corner = rng.integers((-w // 2, -h // 2), (W - w // 2, H - h // 2))  # in the center frame
    maps[:, :, 2] -= maps[:, :, :2] @ corner
    # warp only a box around the sprite
    size = int(1.1 * math.hypot(h, w)) + 4
    middle = np.array([w / 2, h / 2]) - maps[:, :, 2]
    middle = np.linalg.solve(maps[:, :, :2], middle[:, :, None])  # [7, 2, 1]
    boxes = np.round(middle[:, :, 0] - size / 2).astype(int)
    maps[:, :, 2:] += maps[:, :, :2] @ boxes[:, :, None]
    warped = _warp(sprite, maps, size, size, "zeros")
    for frame, patch, (x, y) in zip(frames, warped, boxes.tolist(), strict=True):
        below = frame[:, max(0, y) : max(0, y + size), max(0, x) : max(0, x + size)]
        above = patch[:, max(0, -y) : max(0, H - y), max(0, -x) : max(0, W - x)]
        below += above[3:].clamp(0, 1) * (above[:3] - below)


if __name__ == "__main__":
    from mana_triton.training.prepare import main

    main()
