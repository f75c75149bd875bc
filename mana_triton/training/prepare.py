"""Make clips for training from Vimeo-90K, REDS, and folders of videos or frames.

    python -m mana_triton.training.clips prepare VIDEOS vimeo_septuplet REDS/train_sharp --out DATA

Every clip is one scene: videos and folders of frames are split where the scene changes. OUT holds
decoded frames as .npy files of at most 56 MiB where seven frames fit, with their checksums in
index.json, and trains by `--data OUT`. The same command goes on where it was stopped, and adds what
is new. OUT/report.json says what was skipped, and why; the last line of stdout counts it. The four
clips of REDS that tests are made of, REDS4, are left out.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.training.clips import (
    WINDOW,
    DataError,
    Source,
    decode_progress,
    find_sources,
    vimeo_source,
    write_frames,
    write_index,
)

PART = 56 << 20  # bytes of a file
REDS4 = {"000", "011", "015", "020"}
SOURCES = "sources.json"  # what became of each source
REPORT = "report.json"


def find(path: Path, split: str) -> Iterator[tuple[Source | None, str, str]]:
    """(source, its place, why it is skipped): the source is None where there is a reason."""
    if not (path / f"sep_{split}list.txt").is_file():
        for source in find_sources(path, split):
            reds = source.place.parent.name.startswith("train") and source.place.name in REDS4
            why = "one of REDS4, which tests are made of" if reds else ""
            yield (None if why else source), str(source.place), why
        return
    for name in (path / f"sep_{split}list.txt").read_text().split():
        source = vimeo_source(path, name)
        missing = [file.name for file in source.files if not file.is_file()]
        why = f"{missing[0]} is missing" if missing else ""
        yield (None if why else source), str(source.place), why


def prepare(source: Source, out: Path, smallest: int, split: str) -> dict:
    """Write the scenes of a source; returns its entry of SOURCES."""
    clips, skipped = [], []
    frames = source.frames()
    parts = _parts(frames if source.one_scene else _scenes(frames))
    try:
        for first, part in parts:
            span = f"frames {first} to {first + len(part) - 1}"
            height, width = part[0].shape[:2]
            if len(part) < WINDOW:
                skipped.append({"what": span, "why": f"a scene of fewer than {WINDOW} frames"})
            elif min(height, width) < smallest:
                why = f"a side of fewer than {smallest} pixels"
                skipped.append({"what": f"{width}x{height}", "why": why})
                break
            else:
                clips.append(_write(source, first, part, out))
    except DataError as error:
        skipped.append({"what": "the rest" if clips else "all", "why": str(error)})
    made = {"smallest": smallest, "split": split if source.one_scene else None}
    return {"stamp": source.stamp(), **made, "clips": clips, "skipped": skipped}


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
    """(number of the first frame, frames) of what goes into one file each.

    Every part of a scene but the last holds what fits into a file, seven frames at least. The last
    one begins within the part before it where it would have fewer.
    """
    first, part, before = 0, [], []
    for frame in frames:
        if frame is None:
            yield _lengthened(first, part, before)
            first, part, before = first + len(part), [], []
            continue
        if part and len(part) == max(WINDOW, PART // frame.nbytes):
            yield first, part
            first, part, before = first + len(part), [], part[1 - WINDOW :]
        part.append(frame)
    if part:
        yield _lengthened(first, part, before)


def _lengthened(
    first: int, part: list[np.ndarray], before: list[np.ndarray]
) -> tuple[int, list[np.ndarray]]:
    """The last part of a scene with as many of the six frames before it as it needs."""
    missing = min(len(before), max(0, WINDOW - len(part)))
    return first - missing, before[len(before) - missing :] + part


def _write(source: Source, first: int, part: list[np.ndarray], out: Path) -> dict:
    """One file of the cache: its entry in the index."""
    key = f"{source.place.resolve()}#{first}"
    safe = "".join(c if c.isalnum() or c in "-_." else "_" for c in source.name)
    file = f"{safe}-{first}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.npy"
    shape = write_frames(out / file, part, str(source.place))
    entry = {"name": f"{source.name}-{first}", "kind": "clip", "file": file, "shape": list(shape)}
    return entry | {"cuts": [], "sha256": checksum(out / file)}


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- all sources


def _is_done(entry: dict | None, source: Source, args: argparse.Namespace) -> bool:
    if not entry or entry["stamp"] != source.stamp():
        return False
    # older entries do not say
    if entry.get("smallest", args.smallest) != args.smallest:
        return False
    files = [(args.out / clip["file"], clip["sha256"]) for clip in entry["clips"]]
    if not all(file.is_file() for file, _ in files):
        return False
    return not args.verify or all(checksum(file) == known for file, known in files)


def _refuse_another_list(known: dict[str, dict], sources: dict[str, Source], split: str) -> None:
    """The train and the test list of Vimeo-90K must not come together in one folder."""
    splits = {entry.get("split") for entry in known.values()} - {None, split}
    if splits and any(source.one_scene for source in sources.values()):
        raise DataError(
            f"--out must hold one list of Vimeo-90K, it holds {splits.pop()} and --split is "
            f"{split}; pass another --out"
        )


def prepare_all(args: argparse.Namespace) -> dict:
    """Bring OUT up to date; returns the counts that main() prints."""
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / SOURCES
    known: dict[str, dict] = json.loads(file.read_text()) if file.is_file() else {}
    found = [item for path in args.sources for item in find(path, args.split)]
    sources = {str(source.place.resolve()): source for source, _, _ in found if source}
    _refuse_another_list(known, sources, args.split)
    todo = [
        (key, source)
        for key, source in sources.items()
        if not _is_done(known.get(key), source, args)
    ]
    work = partial(prepare, out=args.out, smallest=args.smallest, split=args.split)
    pool = ThreadPoolExecutor(args.jobs)
    try:
        results = pool.map(work, [source for _, source in todo])
        with decode_progress() as progress:
            ready = zip(todo, results, strict=True)
            for number, ((key, _), result) in enumerate(
                progress.track(ready, total=len(todo), description=f"preparing {args.out}")
            ):
                known[key] = result
                if number % 20 == 0:
                    _save(known, args.out)
    finally:
        pool.shutdown(cancel_futures=True)
        _save(known, args.out)
    shapes = [clip["shape"] for key in sources for clip in known[key]["clips"]]
    skipped = [{"source": place, "what": "all", "why": why} for _, place, why in found if why]
    for key in sources:
        skipped += [{"source": key, **item} for item in known[key]["skipped"]]
    report = {
        "sources": len(found),
        "clips": len(shapes),
        "frames": sum(shape[0] for shape in shapes),
        "clips_over_56_mib": sum(math.prod(shape) > PART for shape in shapes),
        "made_now": len(todo),
        "skipped": dict(Counter(item["why"].split(", got")[0] for item in skipped)),
    }
    text = json.dumps(report | {"details": skipped}, indent=1)
    (args.out / REPORT).write_text(text)
    return report


def _save(known: dict[str, dict], out: Path) -> None:
    """The index of the clips, and before it what became of each source."""
    part = out / f"{SOURCES}.{os.getpid()}.part"
    part.write_text(json.dumps(known, indent=1))
    part.replace(out / SOURCES)
    write_index(out, {clip["file"]: clip for entry in known.values() for clip in entry["clips"]})


# ---- command line


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mana_triton.training.clips",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("command", choices=["prepare"], help="what to do")
    add("sources", type=Path, nargs="+", help="Vimeo-90K, folders of videos or of frames, videos")
    add("--out", type=Path, required=True, help="folder of the clips")
    add("--split", choices=("train", "test"), default="train", help="list of Vimeo-90K (train)")
    add("--smallest", type=int, default=256, help="pixels that a side must have (256)")
    add("--jobs", type=int, default=1, help="sources at once (1)")
    add("--verify", action="store_true", help="compare checksums, make anew what differs")
    args = parser.parse_args(argv)
    if args.jobs < 1 or args.smallest < 1:
        parser.error("--jobs and --smallest must be at least 1")
    return args


def main() -> None:
    """Command line."""
    args = parse_args()
    try:
        report = prepare_all(args)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped; run the same command to go on")
    for why, count in report["skipped"].items():
        print(f"skipped {count}: {why}", file=sys.stderr)
    if count := report["clips_over_56_mib"]:
        print(f"larger than 56 MiB {count}: seven frames do not fit", file=sys.stderr)
    print(json.dumps(report))
