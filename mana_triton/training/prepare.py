# ruff: noqa: RUF009  (`flag` makes a field)
"""Decode Vimeo-90K, REDS, and folders of videos or frames for training.

    python -m mana_triton.training.prepare VIDEOS vimeo_septuplet REDS/train_sharp --out DATA

Training decodes its data itself; this does it in advance, on a machine with PyAV, and skips what
cannot be used. Train with `--data DATA`. The same command continues where it was stopped, and adds
new sources. The last line of stdout is a summary. The four clips of REDS that tests are made of,
REDS4, are skipped.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mana_triton.training.clips import (
    WINDOW,
    DataError,
    Source,
    decode,
    decode_progress,
    decoded,
    find_sources,
    missing_file,
    read_index,
    vimeo_sources,
    write_index,
)
from mana_triton.training.options import flag, parse_options

REDS4 = {"000", "011", "015", "020"}


@dataclass(frozen=True)
class PrepareOptions:
    """What to decode, and where to."""

    sources: tuple[Path, ...] = flag(..., "Vimeo-90K, folders of videos or of frames, videos")
    out: Path = flag(..., "folder of the clips")
    split: str = flag("train", "list of Vimeo-90K", "train", "test")
    smallest: int = flag(256, "pixels that a side must have")
    jobs: int = flag(1, "sources at once")

    def __post_init__(self):
        if self.jobs < 1 or self.smallest < 1:
            raise ValueError("--jobs and --smallest must be at least 1")


def find(path: Path, split: str) -> Iterator[tuple[Source, str]]:
    """The sources below a path, each with why it is skipped, or ""."""
    vimeo = (path / f"sep_{split}list.txt").is_file()
    for source in vimeo_sources(path, split) if vimeo else find_sources(path, split):
        reds = source.place.parent.name.startswith("train") and source.place.name in REDS4
        if missing := missing_file(source):
            yield source, f"{missing.name} is missing"
        else:
            yield source, "one of REDS4, which tests are made of" if reds and not vimeo else ""


def prepare(options: PrepareOptions) -> dict:
    """Bring OUT up to date.

    Returns:
        The counts that `main` prints, and what was skipped.

    Raises:
        DataError: a path holds no clips.
    """
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    index = read_index(out)
    found = [item for path in options.sources for item in find(path, options.split)]

    def entry_of(item: tuple[Source, str]) -> dict | str:
        source, why = item
        if why:
            return why
        try:
            entry = decoded(source, index, out)
            if entry and min(entry["shape"][1:3]) >= options.smallest:
                return entry
            return decode(source, out, options.smallest, WINDOW)
        except DataError as error:
            return str(error)

    skipped, kept = {}, []
    pool = ThreadPoolExecutor(options.jobs)
    try:
        with decode_progress() as progress:
            entries = progress.track(pool.map(entry_of, found), len(found), description=str(out))
            for number, ((source, _), entry) in enumerate(zip(found, entries, strict=True)):
                if isinstance(entry, str):
                    skipped[str(source.place)] = entry
                    index.pop(source.key, None)
                else:
                    index[source.key] = entry
                    kept.append(entry)
                if number % 20 == 0:
                    write_index(out, index)
    finally:
        pool.shutdown(cancel_futures=True)
        write_index(out, index)
    frames = sum(entry["shape"][0] for entry in kept)
    return {"sources": len(found), "clips": len(kept), "frames": frames, "skipped": skipped}


def main() -> None:
    """Command line."""
    program = "python -m mana_triton.training.prepare"
    options = parse_options(PrepareOptions, program, __doc__, None)
    try:
        report = prepare(options)
    except (DataError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("error: stopped; run the same command to continue")
    for place, why in report["skipped"].items():
        print(f"skipped {place}: {why}", file=sys.stderr)
    reasons = Counter(why.split(", got")[0] for why in report["skipped"].values())
    print(json.dumps(report | {"skipped": reasons}))


if __name__ == "__main__":
    main()
