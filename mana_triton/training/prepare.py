"""Make clips for training from Vimeo-90K, REDS, and folders of videos or frames.

    python -m mana_triton.training.prepare VIDEOS vimeo_septuplet REDS/train_sharp --out DATA

Every clip is one scene: videos and folders of frames are split where the scene changes. OUT holds
decoded frames as .npy files of at most 56 MiB (or seven frames, where these are larger) with their
checksums in index.json; train with `--data OUT`. The same command continues where it was stopped,
and adds new sources. OUT/report.json lists what was skipped and why; the last line of stdout is a
summary. The four clips of REDS that tests are made of, REDS4, are skipped.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mana_triton.engine.upscaler import CutDetector
from mana_triton.files import content_hash, write_atomically
from mana_triton.training.clips import (
    WINDOW,
    DataError,
    Source,
    decode_progress,
    find_sources,
    missing_file,
    npy_name,
    vimeo_sources,
    write_frames,
    write_index,
)

MAX_BYTES = 56 << 20  # of a file
REDS4 = {"000", "011", "015", "020"}
SOURCES = "sources.json"  # what became of each source
REPORT = "report.json"


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare.

    Attributes:
        sources: Vimeo-90K, folders of videos or of frames, videos.
        out: folder of the clips.
        split: "train" or "test", the list of Vimeo-90K.
        smallest: pixels that a side must have.
        jobs: sources at once.
        verify: compare checksums and make files again that differ.
    """

    sources: tuple[Path, ...]
    out: Path
    split: str = "train"
    smallest: int = 256
    jobs: int = 1
    verify: bool = False

    def __post_init__(self):
        if self.jobs < 1 or self.smallest < 1:
            raise ValueError("--jobs and --smallest must be at least 1")


def find(path: Path, split: str) -> Iterator[tuple[Source, str]]:
    """The sources below a path, each with why it is skipped or ""."""
    vimeo = (path / f"sep_{split}list.txt").is_file()
    for source in vimeo_sources(path, split) if vimeo else find_sources(path, split):
        missing = missing_file(source)
        reds = source.place.parent.name.startswith("train") and source.place.name in REDS4
        if missing:
            yield source, f"{missing.name} is missing"
        else:
            yield source, "one of REDS4, which tests are made of" if reds and not vimeo else ""


def prepare_one(source: Source, options: PrepareOptions) -> dict:
    """Write the scenes of a source; returns its entry of SOURCES."""
    clips, skipped = [], []
    frames = source.frames()
    try:
        for first, part in _parts(frames if source.one_scene else _scenes(frames)):
            height, width = part[0].shape[:2]
            if len(part) < WINDOW:
                what = f"frames {first} to {first + len(part) - 1}"
                skipped.append({"what": what, "why": f"a scene of fewer than {WINDOW} frames"})
            elif min(height, width) < options.smallest:
                why = f"a side of fewer than {options.smallest} pixels"
                skipped.append({"what": f"{width}x{height}", "why": why})
                break
            else:
                clips.append(_write(source, first, part, options.out))
    except DataError as error:
        skipped.append({"what": "the rest" if clips else "all", "why": str(error)})
    split = options.split if source.one_scene else None
    made = {"stamp": source.stamp(), "smallest": options.smallest, "split": split}
    return made | {"clips": clips, "skipped": skipped}


def _scenes(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray | None]:
    """The frames, with None before the first one of each further scene."""
    detector = CutDetector()
    size = None
    for frame in frames:
        cut = detector.is_cut(frame)
        if size not in (None, frame.shape) or cut:
            yield None
        size = frame.shape
        yield frame


def _parts(frames: Iterable[np.ndarray | None]) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(number of the first frame, frames) of each file.

    Every part of a scene but the last holds what fits into a file, seven frames at least. The last
    one overlaps the part before it where it would have fewer.
    """
    first, part, before = 0, [], []
    for frame in frames:
        full = part and frame is not None and len(part) >= max(WINDOW, MAX_BYTES // frame.nbytes)
        if frame is None or full:
            yield _lengthen(first, part, before)
            first, before = first + len(part), part[1 - WINDOW :] if full else []
            part = []
        if frame is not None:
            part.append(frame)
    if part:
        yield _lengthen(first, part, before)


def _lengthen(
    first: int, part: list[np.ndarray], before: list[np.ndarray]
) -> tuple[int, list[np.ndarray]]:
    """A part with as many of the six frames before it as it needs to have seven."""
    missing = min(len(before), max(0, WINDOW - len(part)))
    return first - missing, before[len(before) - missing :] + part


def _write(source: Source, first: int, part: list[np.ndarray], out: Path) -> dict:
    """Write one file; returns its entry of the index."""
    name = f"{source.name}-{first}"
    file = npy_name(name, f"{source.place.resolve()}#{first}")
    shape = write_frames(out / file, part, str(source.place))
    entry = {"name": name, "kind": "clip", "file": file, "shape": list(shape), "cuts": []}
    return entry | {"sha256": content_hash(out / file)}


# ---- all sources


def _is_done(entry: dict | None, source: Source, options: PrepareOptions) -> bool:
    if not entry or entry["stamp"] != source.stamp() or entry["smallest"] != options.smallest:
        return False
    files = [(options.out / clip["file"], clip["sha256"]) for clip in entry["clips"]]
    if not all(file.is_file() for file, _ in files):
        return False
    return not options.verify or all(content_hash(file) == known for file, known in files)


def prepare(options: PrepareOptions) -> dict:
    """Bring OUT up to date.

    Returns:
        The counts that `main` prints.

    Raises:
        DataError: a path holds no clips, or OUT holds the other list of Vimeo-90K.
    """
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    file = out / SOURCES
    known: dict[str, dict] = json.loads(file.read_text()) if file.is_file() else {}
    found = [item for path in options.sources for item in find(path, options.split)]
    sources = {str(source.place.resolve()): source for source, why in found if not why}
    todo = {k: x for k, x in sources.items() if not _is_done(known.get(k), x, options)}
    pool = ThreadPoolExecutor(options.jobs)
    try:
        results = pool.map(partial(prepare_one, options=options), todo.values())
        with decode_progress() as progress:
            tracked = progress.track(results, total=len(todo), description=f"preparing {out}")
            for number, (key, entry) in enumerate(zip(todo, tracked, strict=True)):
                known[key] = entry
                if number % 20 == 0:
                    _save(known, out)
    finally:
        pool.shutdown(cancel_futures=True)
        _save(known, out)
    skipped = [{"source": str(x.place), "what": "all", "why": why} for x, why in found if why]
    for key in sources:
        skipped += [{"source": key, **item} for item in known[key]["skipped"]]
    shapes = [clip["shape"] for key in sources for clip in known[key]["clips"]]
    report = {
        "sources": len(found),
        "clips": len(shapes),
        "frames": sum(shape[0] for shape in shapes),
        "made_now": len(todo),
        "skipped": dict(Counter(item["why"].split(", got")[0] for item in skipped)),
    }
    write_atomically(out / REPORT, json.dumps(report | {"details": skipped}, indent=1))
    return report


def _save(known: dict[str, dict], out: Path) -> None:
    """Write what became of each source, then the index of the clips."""
    write_atomically(out / SOURCES, json.dumps(known, indent=1))
    write_index(out, {clip["file"]: clip for entry in known.values() for clip in entry["clips"]})


# ---- command line


def parse_options(argv: list[str] | None = None) -> PrepareOptions:
    """The flags; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mana_triton.training.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("sources", type=Path, nargs="+", help="Vimeo-90K, folders of videos or of frames, videos")
    add("--out", type=Path, required=True, help="folder of the clips")
    add("--split", choices=("train", "test"), default="train", help="list of Vimeo-90K (train)")
    add("--smallest", type=int, default=256, help="pixels that a side must have (256)")
    add("--jobs", type=int, default=1, help="sources at once (1)")
    add("--verify", action="store_true", help="compare checksums, make files again that differ")
    args = parser.parse_args(argv)
    try:
        return PrepareOptions(**{**vars(args), "sources": tuple(args.sources)})
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    """Command line."""
    options = parse_options()
    try:
        report = prepare(options)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped; run the same command to continue")
    for why, count in report["skipped"].items():
        print(f"skipped {count}: {why}", file=sys.stderr)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
