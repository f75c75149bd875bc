"""Quality of enlarging methods on clips whose originals are known.

    python eval/run.py --data Vid4=DATA/Vid4 --method bicubic mana:tiny folder:DATA/outputs

Methods: bicubic (MATLAB's kernel); mana:WEIGHTS streams a clip as infer does, WEIGHTS being a
shipped name or a file; center:WEIGHTS gives the network every frame seven times, so that it sees
no neighbors; ensemble:WEIGHTS is the mean over a clip's eight flips and turns, at eight times the
work; folder:PATH takes frames that another program made, one folder or video per clip.
Data sets: any folder of videos or of folders of frames, under any name. The names Vimeo-90K (only
im4 is scored), Vimeo-90K-Motion and REDS4 mean what they do in the literature, and of these, Vid4,
SPMCS, UDM10 and Parkour it is known how many clips and frames are the whole.

Originals are cropped to multiples of 4; low-resolution frames are made from them, and with --crf
compressed as video is (x264, 4:2:0), or read with --lr, and have 8 bits. PSNR (dB) and SSIM in RGB
and in luma (BT.601), LPIPS, and with --temporal tOF (pixels) are means over the frames of a clip,
then over clips; frame_mean is over all frames.
Frames that equal their originals have no PSNR; perfect_frames counts them, means leave them out.
Each finished clip is kept in --results, so that an evaluation that was stopped continues.
The last line of stdout is one JSON object {"rows": [...]}.

    python eval/run.py --bench

times this device instead: against the paper's 59 ms, the naive way and other attentions; before,
the frames of every fast path are compared with the float32 reference (`eval/accuracy.py`).
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from io import BytesIO, TextIOWrapper
from itertools import product, tee
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from eval import accuracy, bench, compare, report
from eval.datasets import (
    MIDDLE,
    SHRUNK,
    Footage,
    arrange,
    console,
    count,
    find_test_set,
    identity,
    incomplete,
    load_json,
    match,
    misspelled,
    singles,
    size_of,
    write_atomically,
)
from mana_triton.checkpoint import WEIGHTS, CheckpointError, named_weights
from mana_triton.engine.scene_cuts import CutDetector, Pixels
from mana_triton.engine.upscaler import TOLERANCE, EngineOptions, Upscaler
from mana_triton.metrics import (
    FLOW_SMALLEST,
    LPIPS,
    LPIPS_SMALLEST,
    SSIM_WINDOW,
    BackboneError,
    LPIPSUnavailable,
    flow,
    psnr,
    ssim,
    tof,
)
from mana_triton.resize import SCALE
from mana_triton.resize import upscale_bicubic as bicubic
from mana_triton.training.clips import DEGRADATIONS, DataError, Source, degrade
from mana_triton.training.degradation import compress

ROOT = Path(__file__).resolve().parents[1]
PADDING = "mirrored at the ends and at scene cuts, end frames not repeated (reflection)"
RESULT = {"clip", "method", "lr_sha256", "worst", "frames", "scores"}  # keys of a kept result
METHODS = "bicubic, mana:WEIGHTS, center:WEIGHTS, ensemble:WEIGHTS or folder:PATH"
NETWORKS = ("mana", "center", "ensemble")
SYMMETRIES = tuple(product(range(4), (False, True)))  # quarter turns, whether mirrored after them
Frames = Iterator[np.ndarray]  # [H, W, 3] uint8 each
Pair = tuple[np.ndarray, np.ndarray]  # original, enlarged
Size = tuple[int, ...]  # height, width


class MethodError(ValueError):
    """A method that does not exist, or that cannot be used with these data."""


class Stopped(Exception):
    """The evaluation was stopped while this clip was computed."""


@dataclass(frozen=True)
class Protocol:
    """What, beside the clip and the method, a score depends on."""

    degradation: str
    crf: int | None  # of x264, which compresses the low-resolution frames
    crop_border: int
    temporal: bool
    lpips: str | None  # hash of the backbone's file, or "torchvision"; None leaves it out
    device: str
    precision: str
    code: str  # hash of the sources


@dataclass(frozen=True)
class Unit:
    """One clip for one method: what is computed and kept as a whole."""

    dataset: str
    clip: Footage
    method: str
    weights: str | None  # hash of the weights file
    protocol: Protocol
    lr: Source | None  # low-resolution frames that are not made from the originals
    output: Source | None  # frames of a folder method
    backbone: Path | None
    results: Path
    pictures: bool

    @property
    def key(self) -> str:
        """Names the result; changes with everything that it depends on."""
        parts = {
            "clip": self.clip.identity(),
            "method": self.method.partition(":")[0],
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
        """The result; empty if there is none, or a damaged one."""
        result = load_json(self.file())
        return result if result.keys() >= RESULT else {}

    def is_done(self) -> bool:
        """Whether nothing is left to compute or to draw."""
        drawn = all(self.file(suffix).is_file() for suffix in (".middle.png", ".worst.png"))
        return bool(self.load()) and (drawn or not self.pictures)


# ---- methods


@lru_cache(maxsize=8)
def _upscaler(weights: str, device: str, precision: str) -> Upscaler:
    return Upscaler(weights, EngineOptions(device=device, precision=precision))


def enlarge(method: str, lr: Frames, scored: range, protocol: Protocol) -> Frames:
    """The enlargements of the frames that are scored, in order."""
    kind, _, weights = method.partition(":")
    if kind == "bicubic":
        for index, frame in enumerate(lr):
            if index in scored:
                yield bicubic(torch.from_numpy(frame)).numpy()
        return
    upscaler = _upscaler(weights, protocol.device, protocol.precision)
    frames = upscaler.model.config.frames
    if kind == "center":
        for index, frame in enumerate(lr):
            if index in scored:
                yield _window(upscaler, [frame] * frames)
    elif kind == "ensemble":
        yield from _ensemble(upscaler, lr, scored)
    elif scored == MIDDLE:  # a Vimeo-90K sequence is one window
        yield _window(upscaler, list(lr))
    else:
        for index, result in enumerate(upscaler.stream(lr)):
            if index in scored:
                yield np.asarray(result.picture)


@torch.inference_mode()
def _window(upscaler: Upscaler, frames: list[np.ndarray]) -> np.ndarray:
    """The enlargement of the middle one of seven frames."""
    x = rearrange(torch.from_numpy(np.stack(frames)), "t h w c -> 1 t c h w")
    x = x.to(upscaler.device).float() / 255
    x = x.to(next(upscaler.model.parameters()).dtype)
    out = upscaler.model(x, backend=upscaler.backend, tolerance=TOLERANCE)[0].float()
    return _to_uint8(out.clamp(0, 1))


def _ensemble(upscaler: Upscaler, lr: Frames, scored: range) -> Frames:
    """The mean of the enlargements of a clip's eight flips and turns, each turned back."""
    frames = (rearrange(torch.from_numpy(x), "h w c -> c h w").float() / 255 for x in lr)
    streams = [
        _turned_stream(upscaler, copy, *symmetry, cuts=scored != MIDDLE)
        for copy, symmetry in zip(tee(frames, len(SYMMETRIES)), SYMMETRIES, strict=True)
    ]
    for index, results in enumerate(zip(*streams, strict=True)):
        if index in scored:
            yield _to_uint8(torch.stack(results).mean(dim=0))


def _turned_stream(
    upscaler: Upscaler, frames: Iterable[Tensor], turns: int, mirrored: bool, cuts: bool
) -> Iterator[Tensor]:
    """Turn frames [3, H, W] in [0, 1], enlarge and turn back; cuts are found before turning."""

    def there(x: Tensor) -> Tensor:
        x = torch.rot90(x, turns, (1, 2))
        return x.flip(2) if mirrored else x

    def back(x: Pixels) -> Tensor:
        x = torch.as_tensor(x)
        return torch.rot90(x.flip(2) if mirrored else x, -turns, (1, 2))

    is_cut = CutDetector().is_cut
    stream = upscaler.stream(map(there, frames), is_cut=lambda x: cuts and is_cut(back(x)))
    return (back(result.picture) for result in stream)


def _to_uint8(frame: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> [H, W, 3] uint8."""
    return rearrange(frame * 255, "c h w -> h w c").round().byte().cpu().numpy()


def check_method(name: str, protocol: Protocol) -> str | None:
    """Hash of the method's weights file, if it has one; MethodError lists the methods."""
    kind, _, value = name.partition(":")
    if name == "bicubic" or (kind == "folder" and value):
        return None
    if kind not in NETWORKS or not value:
        raise MethodError(f"method must be {METHODS}, got '{name}'")
    file = WEIGHTS / f"{value}.safetensors" if value in named_weights() else Path(value)
    try:
        _upscaler(value, protocol.device, protocol.precision)
    except ValueError as error:  # no such device or precision
        raise MethodError(str(error)) from error
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ---- one clip


def originals(clip: Footage) -> Frames:
    """The original frames, cropped to multiples of 4."""
    (height, width), whole = hr_sizes(clip)
    for frame in _of_one_size(clip.source, whole):
        yield frame[:height, :width]


def hr_sizes(clip: Footage) -> tuple[Size, Size]:
    """Cropped to multiples of 4, and whole."""
    _, H, W = clip.shape
    return (H // SCALE * SCALE, W // SCALE * SCALE), (H, W)


def lr_sizes(clip: Footage) -> tuple[Size, Size]:
    """A quarter, rounded down as for the cropped original, and rounded up."""
    _, H, W = clip.shape
    return (H // SCALE, W // SCALE), (-(-H // SCALE), -(-W // SCALE))


def _of_one_size(source: Source, size: Size | None = None) -> Frames:
    """Frames from disk, which must have this size, or else that of the first."""
    for index, frame in enumerate(source.frames()):
        size = size or frame.shape[:2]
        if frame.shape[:2] != size:
            raise DataError(
                f"the frames of {source.place} must have one size, frame {index} has "
                f"{frame.shape[1]}x{frame.shape[0]} after {size[1]}x{size[0]}"
            )
        yield frame


def _sized(source: Source, sizes: tuple[Size, Size]) -> Frames:
    """Frames from disk, all of one of these sizes, cropped to the first."""
    height, width = sizes[0]
    for frame in _of_one_size(source):
        check_size(source, frame.shape[:2], sizes)
        yield frame[:height, :width].copy()


def check_size(source: Source, size: Size, sizes: tuple[Size, Size]) -> None:
    """Raise DataError unless size is one of these."""
    if size not in sizes:
        allowed = " or ".join(f"{width}x{height}" for height, width in dict.fromkeys(sizes))
        raise DataError(
            f"the frames of {source.place} must be {allowed} to go with their originals, "
            f"got {size[1]}x{size[0]}"
        )


def _hashed(frames: Iterable[np.ndarray], digest) -> Frames:
    for frame in frames:
        digest.update(np.array(frame.shape).tobytes() + frame.tobytes())
        yield frame


def pairs(unit: Unit, digest) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, original and enlargement of each scored frame; digest takes the LR frames."""
    hr = originals(unit.clip)
    if unit.output is not None:
        enlarged = _sized(unit.output, hr_sizes(unit.clip))
        if count(unit.output) == unit.clip.shape[0]:
            enlarged = (frame for i, frame in enumerate(enlarged) if i in unit.clip.scored)
    else:
        if unit.lr is not None:
            lr = _hashed(_sized(unit.lr, lr_sizes(unit.clip)), digest)
        else:
            hr, ahead = tee(hr)
            how = unit.protocol.degradation
            small = (degrade(torch.from_numpy(frame.copy()), how).numpy() for frame in ahead)
            if unit.protocol.crf is not None:
                small = compress(small, "libx264", unit.protocol.crf)
            lr = _hashed(small, digest)
        enlarged = enlarge(unit.method, lr, unit.clip.scored, unit.protocol)
    numbered = ((i, frame) for i, frame in enumerate(hr) if i in unit.clip.scored)
    # a strict zip runs both to their ends, so that the digest has seen all frames
    for (index, original), result in zip(numbered, enlarged, strict=True):
        yield index, original, result


@lru_cache(maxsize=1)
def _lpips(backbone: Path | None) -> LPIPS:
    return LPIPS(backbone)


def score_frame(original: np.ndarray, enlarged: np.ndarray, unit: Unit) -> dict[str, float | None]:
    """All scores of one frame but those that need two; no PSNR if it equals the original."""
    border = unit.protocol.crop_border
    scores: dict[str, float | None] = {
        f"{metric.__name__}_{name}": metric(enlarged, original, y_channel=y, crop_border=border)
        for name, y in (("rgb", False), ("y", True))
        for metric in (psnr, ssim)
    }
    scores |= {name: None for name, value in scores.items() if value == float("inf")}
    learned = _lpips(unit.backbone) if unit.protocol.lpips else None
    scores["lpips"] = learned(enlarged, original, crop_border=border) if learned else None
    return scores


def _tof(before: Pair | None, now: Pair, border: int) -> float | None:
    """TOF of a frame and the one before it."""
    if before is None:
        return None
    inside = slice(border, -border or None)
    of_originals, of_enlarged = (
        flow(a[inside, inside], b[inside, inside]) for a, b in zip(before, now, strict=True)
    )
    return tof(of_enlarged, of_originals)


def score(unit: Unit, tick: Callable[[], None]) -> None:
    """Compute one clip and keep the result; tick is called after each frame."""
    digest = hashlib.sha256()
    frames, rows = [], []
    before: Pair | None = None
    middle, worst, lowest = None, None, 0.0
    for index, original, enlarged in pairs(unit, digest):
        row = score_frame(original, enlarged, unit)
        if unit.protocol.temporal:
            row["tof"] = _tof(before, (original, enlarged), unit.protocol.crop_border)
            before = original, enlarged
        psnr_rgb = float("inf") if row["psnr_rgb"] is None else row["psnr_rgb"]
        if worst is None or psnr_rgb < lowest:
            lowest, worst = psnr_rgb, (index, enlarged)
        if index == unit.clip.middle:
            middle = enlarged
        frames.append(index)
        rows.append(row)
        tick()
    if unit.pictures and worst is not None and middle is not None:
        write_atomically(unit.file(".middle.png"), png(middle))
        write_atomically(unit.file(".worst.png"), png(worst[1]))
    result = {
        "clip": unit.clip.name,
        "method": unit.method,
        "lr_sha256": None if unit.output else digest.hexdigest(),
        "worst": worst and worst[0],
        "frames": frames,
        "scores": {name: [row[name] for row in rows] for name in rows[0]},
    }
    write_atomically(unit.file(), json.dumps(result).encode())


def draw(unit: Unit, worst: int, tick: Callable[[], None]) -> None:
    """Keep the pictures of a clip that was scored without them; tick as for `score`."""
    wanted = {unit.clip.middle: [".middle.png"]}
    wanted.setdefault(worst, []).append(".worst.png")
    for index, _, enlarged in pairs(unit, hashlib.sha256()):
        for suffix in wanted.pop(index, []):
            write_atomically(unit.file(suffix), png(enlarged))
        tick()
        if not wanted:
            return


def finish(unit: Unit, tick: Callable[[], None]) -> None:
    """Score a clip, or only draw it if its scores are there."""
    if result := unit.load():
        draw(unit, result["worst"], tick)
    else:
        score(unit, tick)


def png(frame: np.ndarray) -> bytes:
    """A frame as the content of a PNG file."""
    buffer = BytesIO()
    Image.fromarray(frame).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


# ---- what is to be computed


def plan(args: argparse.Namespace, protocol: Protocol) -> list[Unit]:
    """A unit for every clip and method, checked as far as it can be without computing."""
    lr_paths = dict(args.lr)
    for line in filter(None, (misspelled(name) for name, _ in args.data)):
        console.print(f"note: {line}")
    unknown = [name for name in lr_paths if name not in dict(args.data)]
    if unknown:
        valid = ", ".join(name for name, _ in args.data)
        raise DataError(f"the name in --lr must be one of --data ({valid}), got '{unknown[0]}'")
    weights = {method: check_method(method, protocol) for method in args.method}
    units = []
    for name, path in args.data:
        with workers(args.jobs) if args.jobs > 1 else nullcontext() as executor:
            clips = find_test_set(name, path, args.results, executor)
        lr = _match_lr(clips, lr_paths[name]) if name in lr_paths else {}
        if note := incomplete(name, clips):
            console.print(f"note: {note}")
        for clip in clips:
            _check_clip(clip, protocol)
        for method in args.method:
            kind, _, value = method.partition(":")
            outputs = _match_outputs(name, clips, Path(value)) if kind == "folder" else {}
            if kind != "folder" and protocol.degradation == "none" and not lr:
                raise MethodError(
                    f"{method} needs low-resolution frames, --degradation none makes none; "
                    f"pass --lr {name}=PATH"
                )
            units += [
                Unit(name, clip, method, weights[method], protocol, lr.get(clip.name),
                     outputs.get(clip.name), args.lpips_backbone, args.results,
                     bool(args.html) and number < report.PICTURED)
                for number, clip in enumerate(clips)
            ]  # fmt: skip
    return units


def _check_clip(clip: Footage, protocol: Protocol) -> None:
    """Raise DataError if the frames are too small for the metrics; say if they are cropped."""
    (height, width), whole = hr_sizes(clip)
    smallest = max(SSIM_WINDOW, LPIPS_SMALLEST if protocol.lpips else 0)
    smallest = max(smallest, FLOW_SMALLEST * protocol.temporal) + 2 * protocol.crop_border
    if min(height, width) < smallest:
        raise DataError(
            f"frames must have at least {smallest} pixels each way for these metrics, "
            f"{clip.name} has {width}x{height}; leave it out"
        )
    if (height, width) != whole:
        console.print(f"note: {clip.name} is {whole[1]}x{whole[0]}, cropped to {width}x{height}")


def _match_lr(clips: list[Footage], path: Path) -> dict[str, Source]:
    found = match(clips, arrange(path, SHRUNK), path)
    for clip in clips:
        source, T = found[clip.name], clip.shape[0]
        check_size(source, size_of(source), lr_sizes(clip))
        if (frames := count(source)) != T:
            raise DataError(
                f"{source.place} must have as many frames as its original, {T}, it has {frames}"
            )
    return found


def _match_outputs(dataset: str, clips: list[Footage], path: Path) -> dict[str, Source]:
    """The frames of another program for each clip; a folder of the set's name is preferred."""
    path = path / dataset if (path / dataset).is_dir() else path
    sources = arrange(path)
    if len(sources) < len(clips) and all(len(clip.scored) == 1 for clip in clips):
        sources = singles(sources)
    found = match(clips, sources, path)
    for clip in clips:
        source, T = found[clip.name], clip.shape[0]
        check_size(source, size_of(source), hr_sizes(clip))
        if (frames := count(source)) not in (T, len(clip.scored)):
            raise DataError(
                f"{source.place} must have as many frames as {clip.name}, {T}, it has {frames}"
            )
        if source.name != clip.name:
            console.print(f"note: {clip.name} is compared with {source.place}")
    return found


# ---- computing, in this process or in several


def compute(units: list[Unit], jobs: int) -> None:
    """Compute the units whose results are not there yet."""
    waiting = sorted((u for u in units if not u.is_done()), key=lambda u: -len(u.clip.scored))
    if not waiting:
        return
    total = sum(len(unit.clip.scored) for unit in waiting)
    try:
        with _progress(len(units) - len(waiting)) as progress:
            task = progress.add_task("scoring", total=total)
            if min(jobs, len(waiting)) == 1:
                for unit in waiting:
                    finish(unit, lambda: progress.advance(task))
            else:
                _compute_in_processes(
                    waiting, jobs, lambda done: progress.update(task, completed=done)
                )
    except DataError as error:
        raise DataError(f"{error}; finished clips are kept in {units[0].results}") from error


def _progress(kept: int) -> Progress:
    columns = [*Progress.get_default_columns(), TextColumn("{task.completed}/{task.total} frames")]
    if kept:
        console.print(f"note: {kept} results are there from before")
    return Progress(*columns, TimeElapsedColumn(), console=console)


def workers(jobs: int, *shared) -> ProcessPoolExecutor:
    """Processes that share the cores, and end with this one."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, _start_worker, (threads, *shared))


_shared: dict[str, Any] = {}  # what a worker process shares with its parent


def _start_worker(threads: int, counter=None, stop=None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process says when to stop
    torch.set_num_threads(threads)
    _shared.update(counter=counter, stop=stop)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: parent and (parent.join(), os._exit(1)), daemon=True).start()


def _tick() -> None:
    with _shared["counter"].get_lock():
        _shared["counter"].value += 1
    if _shared["stop"].is_set():
        raise Stopped


def _score_in_worker(unit: Unit) -> None:
    finish(unit, _tick)


def _compute_in_processes(units: list[Unit], jobs: int, show: Callable[[int], None]) -> None:
    context = multiprocessing.get_context("spawn")
    counter, stop = context.Value("q", 0), context.Event()
    executor = workers(min(jobs, len(units)), counter, stop)
    pending = {executor.submit(_score_in_worker, unit) for unit in units}
    try:
        while pending:
            done, pending = wait(pending, timeout=0.2, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            show(counter.value)
    except KeyboardInterrupt:
        stop.set()
        raise
    finally:
        # after an error, what is being computed is finished and kept
        executor.shutdown(cancel_futures=True)


# ---- command line


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, Path(path)


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdigit() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a number >= {lowest}, got {text!r}")
        return int(text)

    return number


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", type=_named_path, default=[], metavar="NAME=PATH",
        help="data sets; see above for names with a meaning")  # fmt: skip
    add("--method", nargs="+", default=[], metavar="METHOD", help="see above")
    add("--degradation", choices=(*DEGRADATIONS, "none"), default="matlab_bicubic")
    add("--crf", type=int, choices=range(52), metavar="CRF",
        help="compress the low-resolution frames by x264 with this quality, 0 to 51")  # fmt: skip
    add("--lr", nargs="+", type=_named_path, default=[], metavar="NAME=PATH",
        help="low-resolution frames of a data set, instead of making them")  # fmt: skip
    add("--crop-border", type=_at_least(0), default=0, metavar="PIXELS")
    add("--temporal", action="store_true", help="tOF as well; about 1.5 s per 720x576 frame")
    add("--lpips-backbone", type=Path, metavar="FILE", help=".safetensors of AlexNet's features")
    add("--device", default="auto", help="of the networks (default: %(default)s)")
    add("--precision", default="auto", help="auto, fp32, bf16, fp16 (default: %(default)s)")
    add("--jobs", type=_at_least(1), metavar="N",
        help="processes (default: one per core, one alone if there is a GPU)")  # fmt: skip
    add("--results", type=Path, default=Path("runs/eval"), metavar="DIR",
        help="where finished clips are kept (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the JSON line there")
    add("--html", type=Path, metavar="FILE", help="a page with plots and pictures")
    add("--table1", action="store_true", help="the paper's Table 1 with these measurements")
    add("--table2", action="store_true", help="the paper's Table 2: mana:FILE by memory size")
    add("--bench", action="store_true", help="measure speed and memory; no --data, no --method")
    add("--full", action="store_true",
        help="--bench up to 3840x2160 and with every peer; long on a CPU")  # fmt: skip
    add("--plot", type=Path, default=Path("runs/bench.svg"), metavar="FILE",
        help="ms against frame size, of --bench; .svg or .png (default: %(default)s)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.bench and (args.data or args.method):
        parser.error("--bench takes no --data and no --method")
    if args.plot.suffix not in (".svg", ".png"):
        parser.error(f"--plot must end in .svg or .png, got {args.plot}")
    if not args.bench and not (args.data and args.method):
        parser.error("the following arguments are required: --data, --method (or --bench)")
    if args.crf is not None and (args.lr or args.degradation == "none"):
        parser.error("--crf compresses frames that are made; leave out --lr and --degradation none")
    if args.full and not args.bench:
        parser.error("--full belongs to --bench")
    for flag, names in ("--data", [n for n, _ in args.data]), ("--method", args.method):
        if len(set(names)) < len(names):
            parser.error(f"{flag} must not name one thing twice, got {' '.join(names)}")
    if args.jobs is None:
        args.jobs = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    return args


def _lpips_identity(backbone: Path | None) -> str | None:
    """What the protocol says of LPIPS; None, with a line that says how to get it, without."""
    try:
        _lpips(backbone)
    except LPIPSUnavailable as error:
        console.print(f"note: {error}")
        return None
    return hashlib.sha256(backbone.read_bytes()).hexdigest() if backbone else "torchvision"


def _sources_hash() -> str:
    digest = hashlib.sha256()
    for pattern in ("mana_triton/*.py", "kernels/*.py", "eval/run.py", "eval/datasets.py"):
        for file in sorted(ROOT.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    """Of this checkout, with a + if it was changed; None outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is asked for; the object of the last line."""
    _check_device(args)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    protocol = Protocol(
        args.degradation, args.crf, args.crop_border, args.temporal,
        _lpips_identity(args.lpips_backbone),
        device if args.device == "auto" else args.device, args.precision, _sources_hash(),
    )  # fmt: skip
    commit = _commit()  # of what runs, whatever is committed meanwhile
    _check_results(args.results)
    units = plan(args, protocol)
    compute(units, args.jobs)
    results = [(unit, unit.load()) for unit in units]
    summary = {
        "rows": report.rows(results, _describe(args.method, protocol)),
        "degradation": args.degradation,
        "crf": args.crf,
        "crop_border": args.crop_border,
        "lr_from_disk": sorted(dict(args.lr)),
        "rounding": "8 bits",
        "padding": PADDING,
        "lpips": f"alex, v0.1, backbone {protocol.lpips}" if protocol.lpips else None,
        "commit": commit,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    report.show(summary)
    if args.table1:
        report.show_paper_table("Table 1", report.table1(summary), summary)
    if args.table2:
        report.show_paper_table("Table 2", report.table2(summary), summary)
    if args.html:
        page = report.page(summary, results, originals)
        write_atomically(args.html, page.encode(errors="backslashreplace"))
    return summary


def _check_results(folder: Path) -> None:
    """Raise DataError unless files can be written there, before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"--results must be a folder to write to, got {folder}: {error}") from error


def _check_device(args: argparse.Namespace) -> Upscaler:
    """Raise MethodError unless there is this device, with this precision."""
    try:
        return _upscaler("tiny", args.device, args.precision)
    except ValueError as error:
        raise MethodError(str(error)) from error


def _describe(methods: list[str], protocol: Protocol) -> dict[str, dict]:
    """What a row says of its method, beside its name and the hash of its weights."""
    about = {}
    for method in methods:
        kind, _, weights = method.partition(":")
        about[method] = {"dtype": "uint8", "device": "cpu"} if kind == "bicubic" else {}
        if kind in NETWORKS:
            upscaler = _upscaler(weights, protocol.device, protocol.precision)
            about[method] = {
                "dtype": upscaler.precision,
                "device": upscaler.device.type,
                "memory_slots": upscaler.model.config.memory_slots,
            }
    return about


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
    """Speed and memory of this device; the object of the last line."""
    upscaler = _check_device(args)
    device, commit = upscaler.device, _commit()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )  # fmt: skip
    console.print(f"{name}: {upscaler.description}")
    accurate = accuracy.gate(accuracy.demo(), "tiny", device, "the demo clip")
    rows: list[bench.Row] = []
    for title, caption, table in compare.compare(device, upscaler.precision, args.full):
        bench.show(table, title, caption)
        rows += table
    try:
        write_atomically(args.plot, compare.plot(rows, name, args.plot.suffix[1:]))
    except ModuleNotFoundError:
        console.print("note: no plot without matplotlib; pip install matplotlib")
    else:
        console.print(f"plot: {args.plot}")
    return {
        "rows": rows,
        "accuracy": accurate,
        "paper_ms": compare.PAPER["ms"],
        "device": name,
        "precision": upscaler.precision,
        "commit": commit,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def main() -> None:
    """Command line."""
    args = parse_args()
    for stream in (sys.stdout, sys.stderr):  # names of files may be in no encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # a closed terminal and a polite kill stop it as Ctrl-C does
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        summary = benchmark(args) if args.bench else evaluate(args)
    except (
        DataError,
        CheckpointError,
        MethodError,
        BackboneError,
        compare.BenchError,
        OSError,
    ) as error:
        sys.exit(f"error: {error}")
    except (MemoryError, torch.OutOfMemoryError, BrokenProcessPool):
        again = "" if args.bench else "; the same command with --jobs 1 continues"
        sys.exit(f"error: the memory is too small{again}")
    except (KeyboardInterrupt, Stopped):
        again = "" if args.bench else f"; the same command continues from {args.results}"
        sys.exit(f"error: stopped{again}")
    line = json.dumps(summary, allow_nan=False)
    print(line, flush=True)
    if args.json:
        try:
            write_atomically(args.json, f"{line}\n".encode())
        except OSError as error:
            sys.exit(f"error: --json must be a file that can be written, got: {error}")
    if failed := accuracy.missed(summary.get("accuracy", [])):
        sys.exit(f"error: the accuracy gate is missed by: {', '.join(failed)}")


if __name__ == "__main__":
    main()
