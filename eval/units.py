"""What an evaluation computes: one unit for every clip and method."""

import hashlib
import json
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.datasets import (
    LOW_RESOLUTION,
    TestClip,
    console,
    count,
    find_clips,
    find_test_set,
    identity,
    incomplete,
    load_json,
    match,
    singles,
    size_of,
)
from eval.methods import MethodError, describe, split, weights_hash
from mana_triton.metrics import FLOW_SMALLEST, LPIPS_SMALLEST, SSIM_WINDOW
from mana_triton.resize import SCALE
from mana_triton.training.clips import DataError, Source

RESULT = {"clip", "method", "lr_sha256", "worst", "frames", "scores"}  # keys of a kept result
MIDDLE_PICTURE, WORST_PICTURE = ".middle.png", ".worst.png"
Size = tuple[int, ...]  # height, width


@dataclass(frozen=True)
class Options:
    """The flags, see `run.parse_args`."""

    data: dict[str, Path]
    method: list[str]
    degradation: str
    crf: int | None
    lr: dict[str, Path]
    crop_border: int
    temporal: bool
    lpips_backbone: Path | None
    device: str
    precision: str
    jobs: int
    results: Path
    json: Path | None
    html: Path | None
    table1: bool
    table2: bool
    bench: bool
    full: bool


@dataclass(frozen=True)
class Protocol:
    """What a score depends on, apart from clip and method."""

    degradation: str
    crf: int | None  # of x264, which compresses the low-resolution frames
    crop_border: int
    temporal: bool
    lpips: str | None  # hash of the backbone's file, or "torchvision"; None leaves LPIPS out
    device: str
    precision: str
    code: str  # hash of the sources


@dataclass(frozen=True)
class Unit:
    """One clip for one method, computed and kept as a whole."""

    dataset: str
    clip: TestClip
    method: str
    weights: str | None  # hash of the weights file
    protocol: Protocol
    lr: Source | None  # low-resolution frames that are not made from the originals
    output: Source | None  # frames of a folder: method
    backbone: Path | None
    results: Path
    pictures: bool

    @property
    def key(self) -> str:
        """Name of the result; changes with everything that the result depends on."""
        parts = {
            "clip": identity(self.clip.source),
            "scored": [self.clip.scored[0], len(self.clip.scored)],
            "method": split(self.method)[0],
            "weights": self.weights,
            "protocol": asdict(self.protocol),
            "lr": self.lr and identity(self.lr),
            "output": self.output and identity(self.output),
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]

    def file(self, suffix: str = ".json") -> Path:
        """Where the result, or a picture, is kept."""
        return self.results / f"{self.key}{suffix}"

    def load(self) -> dict:
        """The kept result; empty if it is missing or damaged."""
        result = load_json(self.file())
        return result if result.keys() >= RESULT else {}

    def is_done(self) -> bool:
        """Whether the result, and the pictures if they are wanted, are kept."""
        drawn = all(self.file(suffix).is_file() for suffix in (MIDDLE_PICTURE, WORST_PICTURE))
        return bool(self.load()) and (drawn or not self.pictures)


# ---- checks and counterparts


def hr_sizes(clip: TestClip) -> tuple[Size, Size]:
    """The original size cropped to multiples of 4, and the full one."""
    _, H, W = clip.shape
    return (H // SCALE * SCALE, W // SCALE * SCALE), (H, W)


def lr_sizes(clip: TestClip) -> tuple[Size, Size]:
    """A quarter of the original size, rounded down as for the crop, and rounded up."""
    _, H, W = clip.shape
    return (H // SCALE, W // SCALE), (-(-H // SCALE), -(-W // SCALE))


def check_size(source: Source, size: Size, sizes: tuple[Size, ...]) -> None:
    """Raise DataError unless size is one of these."""
    if size not in sizes:
        allowed = " or ".join(f"{width}x{height}" for height, width in dict.fromkeys(sizes))
        raise DataError(
            f"the frames of {source.place} must be {allowed} to go with their originals, "
            f"got {size[1]}x{size[0]}"
        )


def plan(
    options: Options, protocol: Protocol, executor: Executor | None, pictured: int
) -> list[Unit]:
    """A unit for every clip and method, checked as far as possible without computing.

    Args:
        options, protocol: of the evaluation.
        executor: processes for what has to be measured in a set; None: this one.
        pictured: number of clips of a set whose pictures are kept.
    """
    unknown = [name for name in options.lr if name not in options.data]
    if unknown:
        valid = ", ".join(options.data)
        raise DataError(f"the name in --lr must be one of --data ({valid}), got '{unknown[0]}'")
    weights = {method: weights_hash(method) for method in options.method}
    for method in options.method:
        describe(method, protocol.device, protocol.precision)  # loads the weights
    units = []
    for name, path in options.data.items():
        clips = find_test_set(name, path, options.results, executor)
        lr = _match_lr(clips, options.lr[name]) if name in options.lr else {}
        if note := incomplete(name, clips):
            console.print(f"note: {note}")
        for clip in clips:
            _check_clip(clip, protocol)
        for method in options.method:
            kind, value = split(method)
            outputs = _match_outputs(name, clips, Path(value)) if kind == "folder" else {}
            if kind != "folder" and protocol.degradation == "none" and not lr:
                raise MethodError(
                    f"{method} needs low-resolution frames, --degradation none makes none; "
                    f"pass --lr {name}=PATH"
                )
            units += [
                Unit(name, clip, method, weights[method], protocol, lr.get(clip.name),
                     outputs.get(clip.name), options.lpips_backbone, options.results,
                     number < pictured)
                for number, clip in enumerate(clips)
            ]  # fmt: skip
    return units


def _check_clip(clip: TestClip, protocol: Protocol) -> None:
    """Raise DataError if the frames are too small for the metrics; note if they are cropped."""
    (height, width), full = hr_sizes(clip)
    smallest = max(SSIM_WINDOW, LPIPS_SMALLEST if protocol.lpips else 0)
    smallest = max(smallest, FLOW_SMALLEST * protocol.temporal) + 2 * protocol.crop_border
    if min(height, width) < smallest:
        raise DataError(
            f"frames must have at least {smallest} pixels each way for these metrics, "
            f"{clip.name} has {width}x{height}; leave it out"
        )
    if (height, width) != full:
        console.print(f"note: {clip.name} is {full[1]}x{full[0]}, cropped to {width}x{height}")


def _match_lr(clips: list[TestClip], path: Path) -> dict[str, Source]:
    found = match(clips, find_clips(path, LOW_RESOLUTION), path)
    for clip in clips:
        check_size(found[clip.name], size_of(found[clip.name]), lr_sizes(clip))
        _check_length(found[clip.name], clip, (clip.shape[0],))
    return found


def _match_outputs(dataset: str, clips: list[TestClip], path: Path) -> dict[str, Source]:
    """The frames of another program for each clip; a folder with the set's name is preferred."""
    path = path / dataset if (path / dataset).is_dir() else path
    sources = find_clips(path)
    if len(sources) < len(clips) and all(len(clip.scored) == 1 for clip in clips):
        sources = singles(sources)
    found = match(clips, sources, path)
    for clip in clips:
        source = found[clip.name]
        check_size(source, size_of(source), hr_sizes(clip))
        _check_length(source, clip, (clip.shape[0], len(clip.scored)))
        if source.name != clip.name:
            console.print(f"note: {clip.name} is compared with {source.place}")
    return found


def _check_length(source: Source, clip: TestClip, allowed: tuple[int, ...]) -> None:
    if (frames := count(source)) not in allowed:
        raise DataError(
            f"{source.place} must have as many frames as {clip.name}, {allowed[0]}, it has {frames}"
        )
