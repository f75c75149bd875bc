"""Enlarge a video four times.

INPUT is a video, a folder of pictures (one clip), or a folder of videos (each is enlarged).
The result is written beside it as <name>_x4.<ext> unless -o says otherwise; -o video.mp4 makes a
video of a folder of pictures, -o with a name without suffix makes a folder of PNG files of a
video. Sound, subtitles, other streams, chapters, timestamps, rotation, colors and more than 8 bits
are kept; what the container cannot hold is named. Interlaced video is deinterlaced.

    python -m mana_triton.infer holiday.mp4
    python -m mana_triton.infer holiday.mp4 -o big.mkv --codec libx265 --crf 20 -e preset=slow
    python -m mana_triton.infer frames/ -o clip.mp4 --start 2 --end 10
    python -m mana_triton.infer holiday.mp4 --preview 120     # one PNG, before hours of work
    python -m mana_triton.infer holiday.mp4 --benchmark       # time per stage, nothing is written

A long job can be stopped (Ctrl-C, kill, a crash, a full disk): finished segments lie in
<output>.parts, and the same command continues there. The result is the same as that of a run that
was not stopped. If the flags that matter, the weights, the input or the software have changed, one
line says what; --restart begins anew. In a folder of videos a bad one does not stop the rest, and
a later run leaves alone what is done.

Progress goes to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 1 failed
or stopped (one line says why), 2 wrong usage.
"""

from mana_triton import runtime

runtime.configure_process()  # before torch is imported

import argparse
import contextlib
import copy
import hashlib
import json
import os
import re
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mana_triton.attention import BACKENDS
from mana_triton.checkpoint import CheckpointError, named_weights
from mana_triton.engine import memory
from mana_triton.engine.plan import Plan
from mana_triton.engine.prefetch import StallTimes, prefetch
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.jobs import preview
from mana_triton.jobs import resume as segments
from mana_triton.jobs.resume import Seen, Trail, frames_after, open_resumable
from mana_triton.model import MANA, PRECISIONS
from mana_triton.resize import SCALE
from mana_triton.video.encoder import ENCODER_MEMORY
from mana_triton.video.frame import explained, reason
from mana_triton.video.images import SUFFIXES
from mana_triton.video.writer import (
    VIDEO_SUFFIXES,
    Frame,
    MediaError,
    Reader,
    VideoReader,
    open_reader,
)

READABLE = (*VIDEO_SUFFIXES, ".gif", ".flv", ".wmv", ".mpg", ".mpeg", ".m2ts", ".3gp", ".ogv")

CENTURY = 3.2e9  # seconds; what a time of a video may be at most
AHEAD = 64 << 20  # bytes of enlarged frames that wait for the encoder
BESIDE = ENCODER_MEMORY + (96 << 20)  # bytes that decoder, encoder and their threads take
# flags that do not change a frame of the result; all others must stay as they were to continue
PASSING = (
    "input",
    "output",
    "overwrite",
    "restart",
    "preview",
    "benchmark",
    "model",
    "backend",
    "tile",
    "memory_budget",
)
# methods that --benchmark times, and what they do
STAGES = {"read": "decode video", "encode": "features", "fuse": "attention", "decode": "decoder"}

console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The flags; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m mana_triton.infer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="a video, or a folder of pictures or videos")
    add("-o", "--output", type=Path, metavar="OUT", help="default: <name>_x4.<ext> beside INPUT")
    shipped = ", ".join(named_weights())
    help_model = f"shipped weights ({shipped}) or a file (default: tiny-real; tiny for pictures)"
    add("-n", "--model", metavar="NAME|FILE", help=help_model)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--backend", default="auto", choices=BACKENDS, help="of the attention (default: auto)")
    add("--precision", default="auto", choices=("auto", *PRECISIONS))
    add("--memory-budget", type=_bytes, metavar="SIZE", help="bytes to take at most, as 8G; tiles"
        " and frames at once follow (default: four fifths of the memory)")  # fmt: skip
    help_tile = "side of the decoder's tiles in input pixels, 0: whole frame (default: auto)"
    add("-t", "--tile", default="auto", type=_tile, metavar="TILE|auto|0", help=help_tile)
    add("--codec", default="libx264", help="an FFmpeg video encoder (default: libx264)")
    add(
        "--crf",
        type=float,
        default=18,
        help="quality of the encoder, lower is better (default: 18)",
    )
    add("-e", dest="options", action="append", default=[], type=_option, metavar="KEY=VALUE",
        help="an option of the encoder; repeatable")  # fmt: skip
    add("--lossless", action="store_true", help="keep every bit of the result; large files")
    add("--stream", type=int, metavar="N", help="enlarge this stream of the file (default: the"
        " first video; other videos are copied)")  # fmt: skip
    add("--no-limits", action="store_true", help="take very large pictures and many streams, too")
    add("--start", type=_seconds, metavar="S", help="begin at this second")
    add("--end", type=_seconds, metavar="S", help="stop before this second")
    add("--compare", action="store_true", help="write bicubic and the result side by side")
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--restart", action="store_true", help="throw the unfinished work of an earlier run away")
    help_segment = "frames, at least, of a part that survives a stop (default: %(default)s)"
    add("--segment", type=_frames, default=segments.LENGTH, metavar="N", help=help_segment)
    only = parser.add_mutually_exclusive_group()
    help_preview = "write one PNG: frame N (from 0, after --start), bicubic | ours, with details"
    only.add_argument("--preview", type=_number, metavar="N", help=help_preview)
    help_benchmark = "decode and compute without writing; print the time per stage"
    only.add_argument("--benchmark", action="store_true", help=help_benchmark)
    args = parser.parse_args(argv)
    if args.start is not None and args.end is not None and args.start >= args.end:
        parser.error(f"--end must come after --start, got {args.start} and {args.end}")
    return args


def _tile(text: str) -> int | str:
    if text == "auto":
        return text
    tile = int(text)
    if tile < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {tile}")
    return tile


def _bytes(text: str) -> int:
    try:
        return memory.parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must be 0 or more, got {number}")
    return min(number, sys.maxsize)


def _frames(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, got {number}")
    return number


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= CENTURY:
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0, got {text}")
    return seconds


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    return key, value


def enlarge(source: Path, output: Path, upscaler: Upscaler, args: argparse.Namespace) -> dict:
    """Enlarge one video or folder of pictures; returns what the JSON line says of it.

    Raises:
        MediaError: the input cannot be read or the output not written.
    """
    began = time.perf_counter()
    with _open(source, args) as reader:
        _plan(source, reader, upscaler)
        width, height = SCALE * reader.width, SCALE * reader.height
        sides = 2 if args.compare else 1
        settings = {
            "codec": args.codec, "crf": args.crf, "options": dict(args.options),
            "lossless": args.lossless, "overwrite": args.overwrite, "restart": args.restart,
            "length": args.segment, "job": _job(reader, upscaler, args),
        }  # fmt: skip
        writer = open_resumable(output, reader, sides * width, height, **settings)
        resumed = writer.number
        with _kept(writer), writer:
            console.print(f"{source} -> {output}, {width}x{height}", markup=False)
            _describe(reader, upscaler, args)
            shown = _show_notes([*reader.notes, *writer.notes])
            if resumed:
                console.print(f"continuing after {resumed} frames", markup=False)
            size = (3 if reader.bits <= 8 else 6) * sides * width * height
            ahead = max(min(AHEAD // size, 4), 1)
            read, written = StallTimes(), StallTimes()  # for frames to enlarge, and to write
            pictures = _enlarged(reader, upscaler, writer, args.compare, read)
            enlarged = prefetch(pictures, ahead, written)
            started = time.perf_counter()
            with (
                contextlib.closing(enlarged),
                contextlib.closing(
                    _with_progress(enlarged, reader.frame_count, resumed)
                ) as results,
            ):
                frames = resumed
                for picture, frame, seen in results:
                    with _whole():
                        writer.write(picture, frame, seen)
                    frames += 1
            waits = _shares(read, written, time.perf_counter() - started)
        _show_notes([*reader.notes, *writer.notes], shown)
        console.print("waited: {}".format(", ".join(f"{k} {v:.0%}" for k, v in waits.items())))
        if reader.truncated:
            console.print(f"warning: {reader.truncated}", markup=False)
    seconds = time.perf_counter() - began
    return {
        "output": str(output),
        "frames": frames,
        "resumed": resumed,
        "width": sides * width,
        "height": height,
        "seconds": round(seconds, 3),
        "ms_per_frame": round(1000 * seconds / max(frames - resumed, 1), 2),
        "waits": {stage: round(share, 3) for stage, share in waits.items()},
        **_division(reader, upscaler),
    }


def _shares(read: StallTimes, written: StallTimes, seconds: float) -> dict[str, float]:
    """The part of the time for which each stage of the work waited for the others."""
    waited = {
        "reading": read.for_room, "network": read.for_items + written.for_room,
        "writing": written.for_items,
    }  # fmt: skip
    return {stage: min(x / seconds, 1.0) for stage, x in waited.items()}


def _open(source: Path, args: argparse.Namespace) -> Reader:
    chosen = {"stream": args.stream, "limits": not args.no_limits}
    return open_reader(source, args.start, args.end, **chosen)


def _job(reader, upscaler: Upscaler, args: argparse.Namespace) -> dict[str, Any]:
    """What must be the same, beside the input, for unfinished work to continue."""
    flags = {key: value for key, value in vars(args).items() if key not in PASSING}
    engine = {
        "device": upscaler.device.type, "precision": upscaler.precision,
        "backend": upscaler.backend, **_division(reader, upscaler),
        "band": upscaler.plan(reader.height, reader.width).band,
    }  # fmt: skip
    # what sums in another order or decodes in another way; Pillow does the latter for pictures
    software = (torch, av, np) if isinstance(reader, VideoReader) else (torch, av, np, PIL)
    processor = {"cpu": torch.backends.cpu.get_cpu_capability()}
    if upscaler.device.type == "cuda":
        processor["gpu"] = torch.cuda.get_device_name(upscaler.device)
    return {
        "settings": flags | engine | {"options": dict(args.options)},
        "weights": _weights_hash(upscaler.model),
        # sums are added in another order by another number of threads
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count()},
        "processor": processor,
        "software": {x.__name__: x.__version__ for x in software} | {"ours": segments.OURS},
    }


def _weights_hash(model: MANA) -> str:
    digest = hashlib.sha256(repr(model.config).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextlib.contextmanager
def _kept(writer) -> Iterator[None]:
    """If what is done in here fails or is stopped, say what remains of it."""
    try:
        yield
    except BaseException:
        if writer.number:
            kept = f"{writer.number} frames are kept; the same command continues there"
        else:
            few = f"fewer than the {writer.length} frames of a segment were done"
            kept = f"nothing is kept, as {few}"
        console.print(f"note: {kept}", markup=False)
        raise


def _describe(reader, upscaler: Upscaler, args: argparse.Namespace) -> None:
    plan = upscaler.plan(reader.height, reader.width)
    parts = [f"tiles of {plan.tile} pixels" if plan.tile else "no tiles"]
    together = max(plan.batch, plan.workers)
    console.print(
        f"{upscaler.description}; {', '.join(parts)} ({plan.why}); "
        f"{together} frame{'s' * (together > 1)} at once; "
        f"about {plan.peak / 2**30:.1f} GiB beside the program",
        markup=False,
    )
    console.print("weights {}: {}".format(*choose_weights(args)), markup=False)


def _plan(source: Path, reader, upscaler: Upscaler) -> Plan:
    try:
        return upscaler.plan(reader.height, reader.width)
    except ValueError as error:
        raise MediaError(f"{source}: {error}") from error


def _division(reader, upscaler: Upscaler) -> dict[str, int]:
    plan = upscaler.plan(reader.height, reader.width)
    return {
        "tile": plan.tile, "workers": plan.workers, "batch": plan.batch,
    }  # fmt: skip


def _show_notes(notes: Sequence[str], shown: Sequence[str] = ()) -> Sequence[str]:
    """Print the notes that were not shown yet; returns all of them."""
    for note in dict.fromkeys(notes):
        if note not in shown:
            console.print(f"note: {note}", markup=False)
    return notes


def _enlarged(
    reader: Reader, upscaler: Upscaler, writer, compare: bool, waits: StallTimes
) -> Iterator[tuple[Any, Frame, Seen]]:
    """What is to be written, with the frames it comes from; decoding runs in its own thread.

    A GPU makes the planes of a video, too; a processor does so while it writes.
    """
    done = writer.done
    batched = upscaler.plan(reader.height, reader.width).batch > 1
    finish = writer.planes if batched and not compare else None
    trail = Trail(upscaler.window_radius, done)
    with contextlib.closing(prefetch(frames_after(reader, done), stalls=waits)) as frames:
        results = upscaler.stream(
            ((frame, *trail.see(frame)) for frame in frames),
            pixels=lambda x: x[0].rgb, is_cut=lambda x: x[1],
            start=trail.first, skip=trail.skip, postprocess=finish,
        )  # fmt: skip
        for (frame, _, seen), picture in results:
            yield (_side_by_side(frame.rgb, picture) if compare else picture), frame, seen


def _side_by_side(lr: np.ndarray, enlarged: Any) -> np.ndarray:
    """Bicubic enlargement and ours: [4H, 8W, 3]."""
    from mana_triton.resize import upscale_bicubic

    if lr.dtype == np.uint16:
        pixels = torch.from_numpy(lr).permute(2, 0, 1)[None].double().div_(65535)
        large = F.interpolate(pixels, scale_factor=SCALE, mode="bicubic", align_corners=False)
        bicubic = large[0].clamp_(0, 1).mul_(65535).round_().permute(1, 2, 0).numpy()
        return np.concatenate([bicubic.astype(np.uint16), enlarged], 1)
    return np.concatenate([upscale_bicubic(torch.from_numpy(lr.copy())).numpy(), enlarged], 1)


def _with_progress(results: Iterator, total: int | None, resumed: int = 0) -> Generator:
    """The results, with a bar of frames, frames per second and ETA on stderr."""
    columns = (
        TextColumn("{task.completed} of {task.fields[of]} frames"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, completed=resumed, of=total or "?", rate="")
        began = time.perf_counter()
        for done, result in enumerate(results, 1):
            yield result
            fps = done / (time.perf_counter() - began)
            progress.update(task, completed=resumed + done, rate=f"{fps:.2f} fps")
        # containers only estimate their number of frames
        completed = progress.tasks[task].completed
        progress.update(task, total=completed, of=completed)


def plan(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """The (input, output) pairs that the flags ask for.

    Raises:
        MediaError: several videos and one output file.
    """
    source: Path = args.input
    videos = _videos_of(args)
    if not videos:
        return [(source, args.output or _default_output(source, args.codec))]
    folder = args.output or source
    if folder.suffix.lower() in VIDEO_SUFFIXES or folder.is_file():
        raise MediaError(f"{folder}: must be a folder, as {source} holds {len(videos)} videos")
    if left := [video.name for video in _videos_in(source) if video not in videos]:
        console.print(f"note: taken for results and left alone: {', '.join(left)}", markup=False)
    jobs = [(video, folder / _default_output(video, args.codec).name) for video in videos]
    if args.output and not args.benchmark:
        folder.mkdir(parents=True, exist_ok=True)
    return jobs


def _videos_of(args: argparse.Namespace) -> list[Path]:
    """The videos of a folder; none of those called as our results, if these come there, too."""
    source, output = args.input, args.output or args.input
    if not source.is_dir():
        return []
    is_same = output.resolve() == source.resolve()
    return [x for x in _videos_in(source) if not (is_same and x.stem.endswith(f"_x{SCALE}"))]


def _videos_in(folder: Path) -> list[Path]:
    """Videos of a folder, without hidden files."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in READABLE and not file.name.startswith(".") and file.is_file()
    ]


def _default_output(source: Path, codec: str) -> Path:
    if source.is_dir():  # "." and ".." have no name; a suffix would ask for a video
        source = source.resolve()
        return source.with_name(f"{source.name}_x{SCALE}".replace(".", "_"))
    # Matroska holds every codec and every kind of sound
    webm = ("libvpx-vp9", "libvpx", "libaom-av1", "libsvtav1")
    kept = (
        source.suffix.lower() in VIDEO_SUFFIXES
        and source.suffix.lower() != ".avi"
        and (source.suffix.lower() != ".webm" or codec in webm)
    )
    return source.with_name(f"{source.stem}_x{SCALE}{source.suffix if kept else '.mkv'}")


def choose_weights(args: argparse.Namespace) -> tuple[str, str]:
    """Name or file of the weights, and why."""
    if args.model:
        return args.model, "as -n says"
    if args.input.suffix.lower() in SUFFIXES or (args.input.is_dir() and not _videos_of(args)):
        return "tiny", "the default for pictures"
    return "tiny-real", "the default for video files, trained on compressed video; -n chooses"


def run(args: argparse.Namespace) -> tuple[dict, int]:
    """Do what the flags ask for; returns the JSON line and the exit code."""
    jobs = plan(args)
    model, _ = choose_weights(args)
    try:
        upscaler = Upscaler(
            model,
            EngineOptions(
                device=args.device, precision=args.precision, tile=args.tile,
                backend=args.backend, memory_budget=_streams_share(args),
            ),
        )  # fmt: skip
    except ValueError as error:  # no GPU
        sys.exit(f"error: {error}")
    if len(jobs) == 1 and not _videos_of(args):
        summary, code = _work(*jobs[0], upscaler, args), 0
    else:
        summary, code = _run_folder(jobs, upscaler, args)
    summary |= {
        "peak_mib": _peak_mib(),
        "backend": upscaler.backend,
        "device": str(upscaler.device),
        "precision": upscaler.precision,
        "weights": model,
    }
    return summary, code


def _streams_share(args: argparse.Namespace) -> int | None:
    """What --memory-budget leaves for the stream; on a CPU the encoder needs some of it, too."""
    budget = args.memory_budget
    on_gpu = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    if budget is None or on_gpu:
        return budget
    if budget <= BESIDE:
        least = f"{BESIDE >> 20} MiB for the encoder"
        raise MediaError(f"--memory-budget must be more than {least}, got {budget >> 20} MiB")
    return budget - BESIDE


def _work(source: Path, output: Path, upscaler: Upscaler, args: argparse.Namespace) -> dict:
    if args.preview is not None:
        return _preview(source, output, upscaler, args)
    return (_benchmark if args.benchmark else enlarge)(source, output, upscaler, args)


def _run_folder(
    jobs: Sequence[tuple[Path, Path]], upscaler: Upscaler, args: argparse.Namespace
) -> tuple[dict, int]:
    """Every job in turn; one that fails does not stop the rest."""
    done, failed, before = [], [], []
    table = Table("video", "result", "frames", "ms/frame", title=escape(str(args.input)))
    results = {
        source: output if args.preview is None else _preview_path(output, args.preview)
        for source, output in jobs
    }
    for source, output in jobs:
        name, wanted = escape(source.name), results[source]
        try:
            if not args.benchmark:
                _check_name(source, results)
            with explained(wanted, "write"):
                is_there = wanted.exists()
            if is_there and not args.overwrite and not args.benchmark:
                if args.preview is None:
                    segments.sweep(output)
                before.append(str(wanted))
                table.add_row(name, "done before", "", "")
                continue
            done.append(_work(source, output, upscaler, args))
        except (MediaError, OSError, MemoryError, RuntimeError) as error:
            console.print(f"error: {_in_words(error, source)}", markup=False)
            failed.append(str(source))
            table.add_row(name, "[red]failed[/], see above", "", "")
        else:
            row = done[-1]
            result = escape(Path(row["output"]).name) if row["output"] else "timed"
            table.add_row(name, result, str(row["frames"]), str(row["ms_per_frame"]))
    console.print(table)
    total = {key: sum(result[key] for result in done) for key in ("frames", "seconds")}
    new = total["frames"] - sum(result.get("resumed", 0) for result in done)
    return {
        "output": str(args.output or args.input), **total, "files": done, "failed": failed,
        "done_before": before,
        "width": max((result["width"] for result in done), default=0),
        "height": max((result["height"] for result in done), default=0),
        "ms_per_frame": round(1000 * total["seconds"] / max(new, 1), 2),
    }, 1 if failed else 0  # fmt: skip


def _check_name(source: Path, results: dict[Path, Path]) -> None:
    """MediaError if other videos would become the same file as this one."""
    wanted = results[source]
    if others := [x.name for x, result in results.items() if result == wanted and x != source]:
        raise MediaError(
            f"{source}: would become {wanted.name}, as would {', '.join(others)};"
            " rename one of them"
        )


def _preview(source: Path, output: Path, upscaler: Upscaler, args: argparse.Namespace) -> dict:
    """One frame as the whole run would show it, beside bicubic."""
    began = time.perf_counter()
    picture = _preview_path(output, args.preview)
    if args.output and not _videos_of(args):
        picture = args.output
    if picture.suffix.lower() != ".png":
        raise MediaError(f"{picture}: must end in .png, as --preview writes one picture")
    with explained(picture, "write"):
        is_link, is_there = picture.is_symlink(), picture.exists()
    if is_link:
        raise MediaError(f"{picture}: is a symbolic link; give the file's own name")
    if is_there and not args.overwrite:
        raise MediaError(f"{picture}: exists; use --overwrite or choose another output")
    with _open(source, args) as reader:
        if is_there and any(map(picture.samefile, getattr(reader, "files", [source]))):
            raise MediaError(f"{picture}: is the input itself; choose another output")
        _plan(source, reader, upscaler)
        _describe(reader, upscaler, args)
        sheet = preview.sheet(*preview.enlarged_frame(reader, upscaler, args.preview))
        _show_notes(reader.notes)
        preview.save(sheet, picture)
        console.print(f"{source} frame {args.preview} -> {picture}", markup=False)
        size = {"width": SCALE * reader.width, "height": SCALE * reader.height}
        division = _division(reader, upscaler)
    seconds = time.perf_counter() - began
    return {
        "output": str(picture), "frames": 1, **size, "seconds": round(seconds, 3),
        "ms_per_frame": round(1000 * seconds, 2), **division,
    }  # fmt: skip


def _preview_path(output: Path, number: int) -> Path:
    return output.with_name(f"{output.stem}_preview_{number}.png")


def _benchmark(source: Path, output: Path, upscaler: Upscaler, args: argparse.Namespace) -> dict:
    """Decode and compute as for `output`, write nothing, and time the stages."""
    clock = _Clock(upscaler.device)
    model = copy.copy(upscaler.model)
    for stage in ("encode", "fuse", "decode"):
        setattr(model, stage, clock.timed(stage, getattr(model, stage)))
    timed = copy.copy(upscaler)
    timed.model = model
    began = time.perf_counter()
    with _open(source, args) as reader:
        _plan(source, reader, upscaler)
        console.print(f"{source} -> nothing is written", markup=False)
        _describe(reader, upscaler, args)
        frames = iter(reader)
        read = clock.timed("read", lambda: next(frames, None))
        with contextlib.closing(prefetch(iter(read, None))) as decoded:
            results = timed.stream(frame.rgb for frame in decoded)
            with contextlib.closing(_with_progress(results, reader.frame_count)) as enlarged:
                count = sum(1 for _ in enlarged)
        _show_notes(reader.notes)
        size = {"width": SCALE * reader.width, "height": SCALE * reader.height}
        division = _division(reader, upscaler)
    seconds = time.perf_counter() - began
    stages = {name: round(1000 * clock.seconds[stage] / count, 2) for stage, name in STAGES.items()}
    table = Table("stage", "ms a frame", title="busy time, summed over threads")
    for name, ms in stages.items():
        table.add_row(name, f"{ms:.2f}")
    table.add_row("all, on the clock", f"{1000 * seconds / count:.2f}")
    console.print(table)
    return {
        "output": None, "frames": count, **size, "seconds": round(seconds, 3),
        "ms_per_frame": round(1000 * seconds / count, 2), "stages_ms": stages, **division,
    }  # fmt: skip


class _Clock:
    """Adds up how long functions take, also when they run in several threads."""

    def __init__(self, device: torch.device):
        self.seconds: dict[str, float] = defaultdict(float)
        self._device, self._lock = device, threading.Lock()

    def timed(self, stage: str, function: Callable) -> Callable:
        def run(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            with self._lock:
                self.seconds[stage] += time.perf_counter() - began
            return result

        return run


def _peak_mib() -> float | None:
    """Peak resident memory of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # what follows would count the program that started this one, too
        peak = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        return round(int(peak[1]) / (1 << 10), 1) if peak else None
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def _in_words(error: Exception, source: Path) -> str:
    """One line for an error that ends the work on a file; raises all others again."""
    if isinstance(error, MediaError | CheckpointError | OSError):
        return str(error)
    if not memory.out_of_memory(error):
        raise error
    return f"{source}: the memory is too small for this frame size, even in the smallest parts"


# a closed terminal and a polite kill clean up as Ctrl-C does
SIGNALS = [getattr(signal, x) for x in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, x)]


def _stop(*_: object) -> None:
    """Of the signals: stop, once; impatience must not disturb the clean-up."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


@contextlib.contextmanager
def _whole() -> Iterator[None]:
    """What is done in here is not interrupted by a signal that would stop it; that comes after."""
    waiting: list[object] = []
    handled = [number for number in SIGNALS if signal.getsignal(number) == _stop]
    for number in handled:
        signal.signal(number, lambda *_: waiting.append(_))
    try:
        yield
    finally:
        for number in handled:
            signal.signal(number, _stop)
        if waiting:
            _stop()


def main() -> None:
    """Command line."""
    args = parse_args()
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as nohup wants it
            signal.signal(number, _stop)
    try:
        summary, code = run(args)
    except (MediaError, CheckpointError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"error: {_in_words(error, args.input)}")
    except KeyboardInterrupt:
        sys.exit("error: stopped; the same command continues")
    try:
        print(json.dumps(summary), flush=True)
    except OSError as error:
        # else the interpreter would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(f"error: the work is done, but stdout cannot take its summary: {reason(error)}")
    sys.exit(code)


if __name__ == "__main__":
    main()
