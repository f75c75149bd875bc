"""Enlarge a video four times.

INPUT is a video, a folder of pictures (one clip), or a folder of videos (each is enlarged).
The result is written beside it as <name>_x4.<ext> unless -o says otherwise; -o video.mp4 makes a
video of a folder of pictures, -o with a name without suffix makes a folder of PNG files of a
video. Sound, subtitles, other streams, chapters, timestamps, rotation, colors and more than 8 bits
are kept; what the container cannot hold is named. Interlaced video is deinterlaced.

    python -m mana_triton.infer holiday.mp4
    python -m mana_triton.infer holiday.mp4 -o big.mkv --codec libx265 --crf 20 -e preset=slow
    python -m mana_triton.infer frames/ -o clip.mp4 --start 2 --end 10

Progress goes to stderr; the last line of stdout is one JSON object. Exit codes: 0 done, 1 failed
(one line says why), 2 wrong usage.
"""

from . import host

host.tune()  # before torch is imported

import argparse
import contextlib
import json
import signal
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .attention import BACKENDS
from .checkpoint import CheckpointError, named_weights
from .model import SCALE
from .stream import DTYPES, Upscaler, in_thread
from .video import VIDEO_SUFFIXES, Frame, MediaError, open_reader, open_writer

READABLE = (*VIDEO_SUFFIXES, ".gif", ".flv", ".wmv", ".mpg", ".mpeg", ".m2ts", ".3gp", ".ogv")

AHEAD = 64 << 20  # bytes of enlarged frames that wait for the encoder

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
    help_model = f"shipped weights ({shipped}) or a file (default: tiny)"
    add("-n", "--model", default="tiny", metavar="NAME|FILE", help=help_model)
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--backend", default="auto", choices=BACKENDS, help="of the attention (default: auto)")
    add("--precision", default="auto", choices=("auto", *DTYPES))
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


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds < float("inf"):
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
    chosen = {"stream": args.stream, "limits": not args.no_limits}
    with open_reader(source, args.start, args.end, **chosen) as reader:
        width, height = SCALE * reader.width, SCALE * reader.height
        sides = 2 if args.compare else 1
        settings = {
            "codec": args.codec, "crf": args.crf, "options": dict(args.options),
            "overwrite": args.overwrite, "lossless": args.lossless,
        }  # fmt: skip
        tile, why = upscaler.tile_for(reader.height, reader.width)
        workers = upscaler.workers_for(reader.height, reader.width)
        with open_writer(output, reader, sides * width, height, **settings) as writer:
            console.print(f"{source} -> {output}, {width}x{height}", markup=False)
            console.print(
                f"{upscaler.description}; "
                + (f"tiles of {tile} pixels" if tile else "no tiles")
                + f" ({why}); {workers} frame{'s' * (workers > 1)} at once",
                markup=False,
            )
            shown = _show_notes(reader, writer)
            frames = 0
            size = (3 if reader.bits <= 8 else 6) * sides * width * height
            ahead = max(min(AHEAD // size, 4), 1)
            enlarged = in_thread(_enlarged(reader, upscaler, args.compare), ahead)
            with (
                contextlib.closing(enlarged),
                contextlib.closing(_with_progress(enlarged, reader.frame_count)) as results,
            ):
                for rgb, frame in results:
                    writer.write(rgb, frame)
                    frames += 1
        _show_notes(reader, writer, shown)
        if reader.truncated:
            console.print(f"warning: {reader.truncated}", markup=False)
    seconds = time.perf_counter() - began
    return {
        "output": str(output),
        "frames": frames,
        "width": sides * width,
        "height": height,
        "seconds": round(seconds, 3),
        "ms_per_frame": round(1000 * seconds / max(frames, 1), 2),
        "tile": tile,
        "workers": workers,
    }


def _show_notes(reader, writer, shown: Sequence[str] = ()) -> list[str]:
    """Print the notes that were not shown yet; returns all of them."""
    notes = [*reader.notes, *writer.notes]
    for note in notes:
        if note not in shown:
            console.print(f"note: {note}", markup=False)
    return notes


def _enlarged(reader, upscaler: Upscaler, compare: bool) -> Iterator[tuple[Any, Frame]]:
    """Enlarged pictures with the frames they come from; decoding runs in a thread of its own."""
    waiting: deque[Frame] = deque()

    def pictures(frames: Iterator[Frame]) -> Iterator[np.ndarray]:
        for frame in frames:
            waiting.append(frame)
            yield frame.rgb

    with contextlib.closing(in_thread(reader)) as frames:
        for rgb in upscaler.stream(pictures(frames)):
            frame = waiting.popleft()
            yield (_side_by_side(frame.rgb, rgb) if compare else rgb), frame


def _side_by_side(lr: np.ndarray, enlarged: Any) -> np.ndarray:
    """Bicubic enlargement and ours: [4H, 8W, 3]."""
    from .data import upscale_bicubic

    if lr.dtype == np.uint16:
        pixels = torch.from_numpy(lr).permute(2, 0, 1)[None].double().div_(65535)
        large = F.interpolate(pixels, scale_factor=SCALE, mode="bicubic", align_corners=False)
        bicubic = large[0].clamp_(0, 1).mul_(65535).round_().permute(1, 2, 0).numpy()
        return np.concatenate([bicubic.astype(np.uint16), enlarged], 1)
    return np.concatenate([upscale_bicubic(torch.from_numpy(lr.copy())).numpy(), enlarged], 1)


def _with_progress(results: Iterator, total: int | None) -> Generator:
    """The results, with a bar of frames, frames per second and ETA on stderr."""
    columns = (
        TextColumn("{task.completed} of {task.fields[of]} frames"),
        BarColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=total, of=total or "?", rate="")
        began = time.perf_counter()
        for done, result in enumerate(results, 1):
            yield result
            fps = done / (time.perf_counter() - began)
            progress.update(task, completed=done, rate=f"{fps:.2f} fps")
        # containers only estimate their number of frames
        progress.update(task, total=progress.tasks[task].completed)


def plan(args: argparse.Namespace) -> list[tuple[Path, Path]]:
    """The (input, output) pairs that the flags ask for.

    Raises:
        MediaError: several videos and one output file.
    """
    source: Path = args.input
    videos = _videos_in(source) if source.is_dir() else []
    if not videos:
        return [(source, args.output or _default_output(source, args.codec))]
    folder = args.output or source
    if folder.suffix.lower() in VIDEO_SUFFIXES or folder.is_file():
        raise MediaError(f"{folder}: must be a folder, as {source} holds {len(videos)} videos")
    if args.output:
        folder.mkdir(parents=True, exist_ok=True)
    return [(video, folder / _default_output(video, args.codec).name) for video in videos]


def _videos_in(folder: Path) -> list[Path]:
    """Videos of a folder, without hidden files and our own results."""
    return [
        file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in READABLE
        and not file.name.startswith(".")
        and not file.stem.endswith(f"_x{SCALE}")
        and file.is_file()
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


def run(args: argparse.Namespace) -> tuple[dict, int]:
    """Do what the flags ask for; returns the JSON line and the exit code."""
    jobs = plan(args)
    try:
        upscaler = Upscaler(
            args.model, device=args.device, precision=args.precision, tile=args.tile,
            backend=args.backend,
        )  # fmt: skip
    except ValueError as error:  # no GPU
        sys.exit(f"error: {error}")
    done, failed = [], []
    for source, output in jobs:
        try:
            done.append(enlarge(source, output, upscaler, args))
        except MediaError as error:
            if len(jobs) == 1:
                raise
            console.print(f"error: {error}", markup=False)
            failed.append(str(source))
    total = {key: sum(result[key] for result in done) for key in ("frames", "seconds")}
    summary = done[0] if len(jobs) == 1 else {
        "output": str(args.output or args.input), **total, "files": done, "failed": failed,
        "width": max((result["width"] for result in done), default=0),
        "height": max((result["height"] for result in done), default=0),
        "ms_per_frame": round(1000 * total["seconds"] / max(total["frames"], 1), 2),
    }  # fmt: skip
    summary |= {
        "peak_mib": _peak_mib(),
        "backend": upscaler.backend,
        "device": str(upscaler.device),
        "precision": upscaler.precision,
        "weights": args.model,
    }
    return summary, 1 if failed else 0


def _peak_mib() -> float | None:
    """Peak resident memory of this process; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def main() -> None:
    """Command line."""
    args = parse_args()
    # a closed terminal and a polite kill clean up as Ctrl-C does
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        summary, code = run(args)
    except (MediaError, CheckpointError, OSError) as error:
        sys.exit(f"error: {error}")
    except (MemoryError, RuntimeError) as error:
        # PyTorch says so with a type of its own on a GPU only
        memory = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not (memory or "can't allocate memory" in str(error)):
            raise
        sys.exit("error: the memory is too small for this frame size; use a smaller -t, as -t 64")
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # impatience must not disturb the clean-up
        sys.exit("error: stopped; the unfinished output was removed")
    print(json.dumps(summary))
    sys.exit(code)


if __name__ == "__main__":
    main()
