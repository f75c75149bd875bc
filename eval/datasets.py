"""Test sets: what is scored in each, and how the frames of other programs are matched to it.

A set is a folder of videos or of folders of frames, nested in any way. Where some folders are named
after originals (GT, HR, truth, original, target), only those are taken: UDM10 and SPMCS lie beside
their low-resolution versions; a line names what else is left out. Some names, written in any way,
mean more:

    Vimeo-90K           the sequences of sep_testlist.txt, of which only im4 is scored
    Vimeo-90K-Motion    the 6 % of them that move most, by the mean length of their optical flow
    REDS4               clips 000, 011, 015 and 020 of train_sharp, or of folders as above

The flow of the paper's Vimeo-90K-Motion is not published; ours is `mana_triton.metrics.flow`
between all seven frames, so that the two lists need not be equal.
"""

import difflib
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

from mana_triton.files import VIDEOS
from mana_triton.metrics import flow
from mana_triton.training.clips import WINDOW, DataError, Source, find_sources
from mana_triton.video.writer import MediaError, VideoReader

ORIGINALS = frozenset({"gt", "hr", "truth", "original", "target"})
SHRUNK = frozenset({"lr", "lrx4", "x4", "input", "input4", "bix4", "bdx4", "blur4"})
VIMEO, MOTION, REDS4 = "vimeo90k", "vimeo90kmotion", "reds4"
KNOWN = ("Vid4", "SPMCS", "UDM10", "REDS4", "Vimeo-90K", "Vimeo-90K-Motion", "Parkour")
REDS4_CLIPS = ("000", "011", "015", "020")
REDS4_FOLDERS = ORIGINALS | {"train_sharp"}  # val_sharp has clips of these numbers, too
FASTEST = 0.06  # of the test list
# clips and scored frames of the whole set; scores of a part of it cannot be compared
WHOLE = {
    "vid4": (4, 171),
    "spmcs": (30, 930),
    "udm10": (10, 320),
    REDS4: (4, 400),
    VIMEO: (7824, 7824),
    MOTION: (469, 469),
    "parkour": (14, None),
}
MIDDLE = range(WINDOW // 2, WINDOW // 2 + 1)  # what is scored of seven frames
SAVE_EVERY = 100  # sequences whose motion is known
console = Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False)


@dataclass(frozen=True)
class Footage:
    """One clip: [T, H, W, 3] frames, of which `scored` count."""

    name: str
    source: Source
    shape: tuple[int, int, int]  # T, H, W
    scored: range

    @property
    def middle(self) -> int:
        """Number of the scored frame that pictures show."""
        return self.scored[len(self.scored) // 2]

    def identity(self) -> dict:
        """What a stored result depends on, without reading the frames."""
        return identity(self.source) | {"scored": [self.scored[0], len(self.scored)]}


def identity(source: Source) -> dict:
    """Where a clip lies, and what changes when its files do."""
    return {"place": str(source.place.resolve()), **source.stamp()}


def plain(name: str) -> str:
    """A name without case and punctuation: Vimeo-90K and vimeo_90k are one."""
    return re.sub(r"[\W_]", "", name).lower()


def find_test_set(name: str, path: Path, cache: Path, executor: Executor | None) -> list[Footage]:
    """The clips of a set.

    Args:
        name: of the set; see above for the names that mean something.
        path: its folder, or one video.
        cache: folder where the motion of the sequences of Vimeo-90K is kept.
        executor: processes that measure this motion; None measures it here.

    Raises:
        DataError: a missing folder, a name that does not fit it, an unreadable frame.
    """
    if not (path / "sep_testlist.txt").is_file():
        if plain(name) in (VIMEO, MOTION):
            raise DataError(f"{name} must hold sep_testlist.txt and sequences/, {path} does not")
        sources = _reds4(path) if plain(name) == REDS4 else arrange(path, ORIGINALS)
        return [_footage(source) for source in sources]
    if plain(name) not in (VIMEO, MOTION):
        raise DataError(
            f"the name of a folder with sep_testlist.txt must be Vimeo-90K or Vimeo-90K-Motion, "
            f"got '{name}'"
        )
    sources = find_sources(path, "test")
    if plain(name) == MOTION:
        sources = fastest(sources, cache, executor)
    shape = size_of(sources[0])
    return [Footage(s.name, s, (WINDOW, *shape), MIDDLE) for s in sources]


def misspelled(name: str) -> str | None:
    """A line if this is not the name of a well-known set, but nearly."""
    near = difflib.get_close_matches(plain(name), WHOLE, 1, cutoff=0.75)
    if not near or plain(name) in WHOLE:
        return None
    return f"{name} is taken as a set of your own; those with a meaning are {', '.join(KNOWN)}"


def incomplete(name: str, clips: Sequence[Footage]) -> str | None:
    """A line that says so if these are not all clips and frames of a well-known set."""
    expected = WHOLE.get(plain(name))
    frames = sum(len(clip.scored) for clip in clips)
    if expected is None or (len(clips), frames) == (expected[0], expected[1] or frames):
        return None
    whole = f"{expected[0]} clips" + (f" and {expected[1]} frames" if expected[1] else "")
    return f"{name} has {whole}, here are {len(clips)} and {frames}: do not compare the scores"


def arrange(path: Path, wanted: frozenset[str] = frozenset()) -> list[Source]:
    """The clips below a folder, frames in the order of their numbers.

    Args:
        path: see `find_sources`.
        wanted: if folders have one of these names, only what they hold, and without their name.
    """
    found = []
    for source in find_sources(path, "test"):
        parts = source.place.with_suffix("") if _is_video(source) else source.place
        parts = parts.relative_to(path).parts if source.place != path else ()
        files = tuple(sorted(source.files, key=_natural))
        found.append((parts, replace(source, files=files)))
    chosen = [x for x in found if _is_among(x[0], wanted)] or found
    known = wanted | ORIGINALS | SHRUNK
    left = ["-".join(parts) for parts, _ in found if not _is_among(parts, known)]
    if left and len(chosen) < len(found):
        console.print(
            f"note: of {path} only what folders named {', '.join(sorted(wanted))} hold is taken; "
            f"left out: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}"
        )
    sources = []
    for parts, source in chosen:
        name = "-".join(part for part in parts if part.lower() not in wanted)
        own = path.stem if path.is_file() else path.resolve().name
        sources.append(replace(source, name=name or own))
    sources.sort(key=lambda source: _natural(Path(source.name)))
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
    """Every picture as a clip of its own: what programs write that enlarge one frame of each."""
    split = []
    for source in sources:
        for file in source.files:
            name = file.stem if len(sources) == 1 else f"{source.name}-{file.stem}"
            split.append(replace(source, name=name, place=file, files=(file,)))
    return split


def match(clips: Sequence[Footage], sources: Sequence[Source], where: Path) -> dict[str, Source]:
    """Each clip's counterpart: of the same name, else of a name that holds it, else by order.

    A line says so if it is by order.

    Raises:
        DataError: neither names nor numbers agree.
    """
    same = {source.name: source for source in sources}
    alike = {plain(source.name): source for source in sources}
    for choose in (
        same.get,
        lambda name: alike.get(plain(name)),
        lambda name: _holding(plain(name), alike),
    ):
        pairs = {clip.name: choose(clip.name) for clip in clips}
        chosen = [source.place for source in pairs.values() if source]
        if len(chosen) == len(set(chosen)) == len(clips):
            return {name: source for name, source in pairs.items() if source}
    if len(sources) != len(clips):
        missing = [clip.name for clip in clips if plain(clip.name) not in alike]
        raise DataError(
            f"{where} must hold one folder or video for each of {len(clips)} clips, it holds "
            f"{len(sources)}; nothing there is named after {', '.join(missing[:3])}"
        )
    console.print(
        f"note: the names in {where} are not those of the clips, so they are taken in order: "
        f"{clips[0].name} is {sources[0].name}, ..., {clips[-1].name} is {sources[-1].name}"
    )
    return {clip.name: source for clip, source in zip(clips, sources, strict=True)}


def _holding(name: str, sources: dict[str, Source]) -> Source | None:
    """The only source whose name holds this one, or the other way round."""
    near = [source for other, source in sources.items() if name in other or other in name]
    return near[0] if len(near) == 1 else None


def size_of(source: Source) -> tuple[int, int]:
    """Height and width of the first frame."""
    frames = source.frames()
    for frame in frames:
        return frame.shape[0], frame.shape[1]
    raise DataError(f"{source.place} must have frames, it has none; remove it")


def count(source: Source) -> int:
    """Number of frames; a video is read to its end and must be whole."""
    if not _is_video(source):
        return len(source.files)
    try:
        reader = VideoReader(source.files[0])
        frames = sum(1 for _ in reader)
        reader.close()
    except MediaError as error:
        raise DataError(str(error)) from error
    if reader.truncated:
        raise DataError(f"{source.place} must be a whole video, {reader.truncated}; copy it again")
    return frames


def _footage(source: Source) -> Footage:
    frames = count(source)
    return Footage(source.name, source, (frames, *size_of(source)), range(frames))


def _reds4(path: Path) -> list[Source]:
    by_clip: dict[str, Source] = {}
    for source in arrange(path, REDS4_FOLDERS):
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


def _is_video(source: Source) -> bool:
    return source.files[0].suffix.lower() in VIDEOS


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key with numbers in their order: frame 2 before frame 10."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), "") if part.isdigit() else (0, part) for part in parts]


# ---- Vimeo-90K-Motion


def motion(source: Source) -> float:
    """Mean length of the optical flow between neighbor frames, in pixels."""
    frames = list(source.frames())
    lengths = [np.linalg.norm(flow(a, b), axis=0).mean() for a, b in pairwise(frames)]
    return float(np.mean(lengths))


def fastest(sources: list[Source], cache: Path, executor: Executor | None) -> list[Source]:
    """The sequences that move most, in the order of the list; what is measured is kept in cache."""
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
        write_atomically(file, json.dumps(entries).encode())

    if missing:
        columns = (*Progress.get_default_columns(), MofNCompleteColumn())
        try:
            with Progress(*columns, console=console) as progress:
                task = progress.add_task("measuring motion", total=len(missing))
                for source, value in zip(missing, measure(motion, missing), strict=True):
                    known[source.name] = value
                    progress.advance(task)
                    if len(known) % SAVE_EVERY == 0:
                        save()
        finally:
            save()
    number = max(1, round(FASTEST * len(sources)))
    chosen = sorted(sources, key=lambda source: -known[source.name])[:number]
    return [source for source in sources if source in chosen]


def load_json(file: Path) -> dict:
    """The object in a file; empty if there is none, or if it is damaged."""
    try:
        content = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def write_atomically(file: Path, content: bytes) -> None:
    """A file with this name is complete, always."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
