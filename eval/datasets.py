"""Test sets: what is scored in each, and how frames of other programs are matched to the clips.

A set is a folder of videos or of folders of frames, nested in any way. If some folders have the
name of originals (GT, HR, truth, original, target), only those are used: UDM10 and SPMCS keep their
low-resolution versions in the same tree. A note names what else is left out. Some names, in any
spelling, mean more:

    Vimeo-90K           the sequences of sep_testlist.txt, of which only im4 is scored
    Vimeo-90K-Motion    the 6 % of them with the largest mean optical flow
    REDS4               clips 000, 011, 015 and 020 of train_sharp, or of folders as above

The paper does not publish the flow behind its Vimeo-90K-Motion; ours is `mana_triton.metrics.flow`
between all seven frames, so the two lists may differ.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from mana_triton.files import is_video, natural_key, write_atomically
from mana_triton.metrics import flow
from mana_triton.training.clips import WINDOW, DataError, Source, find_sources
from mana_triton.video.frame import MediaError
from mana_triton.video.reader import open_reader

ORIGINALS = frozenset({"gt", "hr", "truth", "original", "target"})
LOW_RESOLUTION = frozenset({"lr", "lrx4", "x4", "input", "input4", "bix4", "bdx4", "blur4"})
VIMEO, MOTION, REDS4 = "vimeo90k", "vimeo90kmotion", "reds4"
REDS4_CLIPS = ("000", "011", "015", "020")
REDS4_FOLDERS = ORIGINALS | {"train_sharp"}  # val_sharp has clips with these numbers, too
FASTEST = 0.06  # of the test list
# clips and scored frames of the full set; scores of a part of it are not comparable
FULL_SIZE = {
    "vid4": (4, 171), "spmcs": (30, 930), "udm10": (10, 320), "parkour": (14, None),
    REDS4: (4, 400), VIMEO: (7824, 7824), MOTION: (469, 469),
}  # fmt: skip
MIDDLE = range(WINDOW // 2, WINDOW // 2 + 1)  # the scored frame of seven
SAVE_EVERY = 100  # measured sequences
console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


@dataclass(frozen=True)
class TestClip:
    """One clip: [T, H, W, 3] frames, of which `scored` are compared."""

    __test__ = False  # not a class of tests

    name: str
    source: Source
    shape: tuple[int, int, int]  # T, H, W
    scored: range

    @property
    def middle(self) -> int:
        """Number of the scored frame that the report shows."""
        return self.scored[len(self.scored) // 2]


def identity(source: Source) -> dict:
    """The place of a clip, and what changes with its files."""
    return {"place": str(source.place.resolve()), **source.stamp()}


def plain(name: str) -> str:
    """A name without case and punctuation: Vimeo-90K and vimeo_90k are equal."""
    return re.sub(r"[\W_]", "", name).lower()


def find_test_set(name: str, path: Path, cache: Path, executor: Executor | None) -> list[TestClip]:
    """The clips of a set.

    Args:
        name: of the set; see above for the names that mean something.
        path: its folder, or one video.
        cache: folder where the measured motion of Vimeo-90K is stored.
        executor: processes that measure this motion; None measures it here.

    Raises:
        DataError: a missing folder, a name that does not fit it, an unreadable frame.
    """
    if not (path / "sep_testlist.txt").is_file():
        if plain(name) in (VIMEO, MOTION):
            raise DataError(f"{name} must hold sep_testlist.txt and sequences/, {path} does not")
        sources = _reds4(path) if plain(name) == REDS4 else find_clips(path, ORIGINALS)
        counted = ((source, count(source)) for source in sources)
        return [TestClip(x.name, x, (frames, *size_of(x)), range(frames)) for x, frames in counted]
    if plain(name) not in (VIMEO, MOTION):
        raise DataError(
            f"the name of a folder with sep_testlist.txt must be Vimeo-90K or Vimeo-90K-Motion, "
            f"got '{name}'"
        )
    sources = find_sources(path, "test")
    if plain(name) == MOTION:
        sources = fastest(sources, cache, executor)
    shape = size_of(sources[0])
    return [TestClip(source.name, source, (WINDOW, *shape), MIDDLE) for source in sources]


def incomplete(name: str, clips: Sequence[TestClip]) -> str | None:
    """A line that says so if these are not all clips and frames of a well-known set."""
    expected = FULL_SIZE.get(plain(name))
    frames = sum(len(clip.scored) for clip in clips)
    if expected is None or (len(clips), frames) == (expected[0], expected[1] or frames):
        return None
    full = f"{expected[0]} clips" + (f" and {expected[1]} frames" if expected[1] else "")
    return f"{name} has {full}, here are {len(clips)} and {frames}: do not compare the scores"


def find_clips(path: Path, wanted: frozenset[str] = frozenset()) -> list[Source]:
    """The clips below a folder, in natural order, each with a different name.

    Args:
        path: see `find_sources`.
        wanted: if folders have one of these names, only what they hold, and without their name.
    """
    found = []
    for source in find_sources(path, "test"):
        place = source.place.with_suffix("") if is_video(source.files[0]) else source.place
        parts = place.relative_to(path).parts if source.place != path else ()
        found.append((parts, source))
    chosen = [x for x in found if _is_among(x[0], wanted)] or found
    known = wanted | ORIGINALS | LOW_RESOLUTION
    left_out = ["-".join(parts) for parts, _ in found if not _is_among(parts, known)]
    if left_out and len(chosen) < len(found):
        console.print(
            f"note: of {path} only folders named {', '.join(sorted(wanted))} are used; "
            f"left out: {', '.join(left_out[:3])}{', ...' if len(left_out) > 3 else ''}"
        )
    sources = []
    for parts, source in chosen:
        name = "-".join(part for part in parts if part.lower() not in wanted)
        own = path.stem if path.is_file() else path.resolve().name
        sources.append(replace(source, name=name or own))
    sources.sort(key=lambda source: natural_key(source.name))
    for a, b in pairwise(sources):
        if a.name == b.name:
            raise DataError(
                f"{path} must hold one clip of each name, {a.place} and {b.place} are both "
                f"{a.name}; rename one"
            )
    return sources


def _is_among(parts: Sequence[str], names: frozenset[str]) -> bool:
    return any(part.lower() in names for part in parts)


def singles(sources: Sequence[Source]) -> list[Source]:
    """Every picture as a clip, for programs that write one picture per clip into one folder."""
    split = []
    for source in sources:
        for file in source.files:
            name = file.stem if len(sources) == 1 else f"{source.name}-{file.stem}"
            split.append(replace(source, name=name, place=file, files=(file,)))
    return split


def match(clips: Sequence[TestClip], sources: Sequence[Source], path: Path) -> dict[str, Source]:
    """The source for each clip: of the same name, else of a name that contains it, else by order.

    A note says when it is by order.

    Raises:
        DataError: neither names nor numbers agree.
    """
    same = {source.name: source for source in sources}
    similar = {plain(source.name): source for source in sources}
    for choose in (
        same.get,
        lambda name: similar.get(plain(name)),
        lambda name: _containing(plain(name), similar),
    ):
        pairs = {clip.name: choose(clip.name) for clip in clips}
        chosen = [source.place for source in pairs.values() if source]
        if len(chosen) == len(set(chosen)) == len(clips):
            return {name: source for name, source in pairs.items() if source}
    if len(sources) != len(clips):
        missing = [clip.name for clip in clips if plain(clip.name) not in similar]
        raise DataError(
            f"{path} must hold one folder or video for each of {len(clips)} clips, it holds "
            f"{len(sources)}; nothing there is named after {', '.join(missing[:3])}"
        )
    console.print(
        f"note: the names in {path} are not those of the clips, so they are matched in order: "
        f"{clips[0].name} is {sources[0].name}, ..., {clips[-1].name} is {sources[-1].name}"
    )
    return {clip.name: source for clip, source in zip(clips, sources, strict=True)}


def _containing(name: str, sources: dict[str, Source]) -> Source | None:
    """The only source whose name contains this one, or the other way round."""
    near = [source for other, source in sources.items() if name in other or other in name]
    return near[0] if len(near) == 1 else None


def size_of(source: Source) -> tuple[int, int]:
    """Height and width of the first frame."""
    for frame in source.frames():
        return frame.shape[0], frame.shape[1]
    raise DataError(f"{source.place} must have frames, it has none; remove it")


def count(source: Source) -> int:
    """Number of frames; a video is decoded to its end and must be complete."""
    if not is_video(source.files[0]):
        return len(source.files)
    try:
        with open_reader(source.files[0]) as reader:
            frames = sum(1 for _ in reader)
    except MediaError as error:
        raise DataError(str(error)) from error
    if damage := reader.truncated:
        raise DataError(f"{source.place} must be a complete video, {damage}; copy it again")
    return frames


def _reds4(path: Path) -> list[Source]:
    by_clip: dict[str, Source] = {}
    for source in find_clips(path, REDS4_FOLDERS):
        parts = source.place.relative_to(path).parts
        if len(parts) > 1 and not _is_among(parts, REDS4_FOLDERS):
            continue
        clip = source.name.split("-")[-1]
        if clip in by_clip:
            raise DataError(
                f"REDS4 must hold one clip {clip}, got {by_clip[clip].place} and {source.place}; "
                "pass the folder that holds one of them"
            )
        by_clip[clip] = source
    missing = [clip for clip in REDS4_CLIPS if clip not in by_clip]
    if missing:
        raise DataError(
            f"REDS4 must hold {', '.join(REDS4_CLIPS)} in train_sharp, GT or directly, "
            f"{path} lacks {missing[0]}"
        )
    return [replace(by_clip[clip], name=clip) for clip in REDS4_CLIPS]


# ---- Vimeo-90K-Motion


def motion(source: Source) -> float:
    """Mean length of the optical flow between neighboring frames, in pixels."""
    frames = list(source.frames())
    lengths = [np.linalg.norm(flow(a, b), axis=0).mean() for a, b in pairwise(frames)]
    return float(np.mean(lengths))


def fastest(sources: list[Source], cache: Path, executor: Executor | None) -> list[Source]:
    """The sequences with the most motion, in the order of the list; measurements are cached."""
    names = "\n".join(str(source.place.resolve()) for source in sources)
    file = cache / f"motion-{hashlib.sha256(os.fsencode(names)).hexdigest()[:16]}.json"
    stamps = {source.name: source.stamp() for source in sources}
    known = {
        name: entry["pixels"]
        for name, entry in load_json(file).items()
        if isinstance(entry, dict) and entry.get("stamp") == stamps.get(name)
    }
    missing = [source for source in sources if source.name not in known]
    measure: Callable[..., Iterator[float]] = executor.map if executor else map

    def save() -> None:
        entries = {name: {"stamp": stamps[name], "pixels": known[name]} for name in known}
        cache.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(entries))

    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    try:
        with Progress(*columns, console=console, disable=not missing) as progress:
            values = zip(missing, measure(motion, missing), strict=True)
            for source, value in progress.track(values, len(missing), description="motion"):
                known[source.name] = value
                if len(known) % SAVE_EVERY == 0:
                    save()
    finally:
        save()
    number = max(1, round(FASTEST * len(sources)))
    chosen = sorted(sources, key=lambda source: -known[source.name])[:number]
    return [source for source in sources if source in chosen]


def load_json(file: Path) -> dict:
    """The object in a file; empty if the file is missing or damaged."""
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
