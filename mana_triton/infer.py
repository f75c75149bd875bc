"""Enlarge videos and pictures four times: the command line of `mana_triton.jobs`."""

from mana_triton import runtime

runtime.configure_process()  # before torch is imported

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from mana_triton.attention import BACKENDS
from mana_triton.checkpoint import CheckpointError, named_weights
from mana_triton.engine.memory import parse_bytes
from mana_triton.engine.upscaler import EngineOptions
from mana_triton.jobs import folder, job
from mana_triton.jobs.options import SEGMENT, JobOptions
from mana_triton.jobs.stop import stop_signals
from mana_triton.model import PRECISIONS
from mana_triton.video.encoder import EncodeOptions
from mana_triton.video.frame import MediaError, reason

DESCRIPTION = "Enlarge a video, a folder of pictures or a folder of videos four times."
EXAMPLES = """\
examples:
  infer film.mp4                       writes film_x4.mp4
  infer film.mp4 -o big.mkv --codec libx265 --crf 20 -e preset=slow
  infer frames/ -o clip.mp4 --start 2 --end 10
  infer film.mp4 --preview 120         one frame as a PNG, to look at first

A stopped job continues with the same command. Progress goes to stderr, the
last line of stdout is JSON. Exit codes: 0 done, 1 failed, 2 wrong usage.
"""
LONGEST = 3.2e9  # seconds, a century: a longer time is a typing error


def parse_options(argv: list[str] | None = None) -> JobOptions:
    """The options that the flags ask for; wrong usage exits with code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.start is not None and args.end is not None and args.start >= args.end:
        parser.error(f"--end must come after --start, got {args.start} and {args.end}")
    return JobOptions(
        args.input, args.output, args.model,
        engine=EngineOptions(
            args.device, args.precision, args.tile, args.backend, memory_budget=args.memory_budget
        ),
        encode=EncodeOptions(args.codec, args.crf, tuple(args.encoder), args.lossless),
        start=args.start, end=args.end, stream=args.stream, limits=not args.no_limits,
        compare=args.compare, preview=args.preview, overwrite=args.overwrite,
        restart=args.restart, segment=args.segment,
    )  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    def formatter(prog: str) -> argparse.HelpFormatter:
        return argparse.RawDescriptionHelpFormatter(prog, max_help_position=25, width=80)

    parser = argparse.ArgumentParser(
        prog="infer",
        usage="python -m mana_triton.infer INPUT [-o OUT] [options]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=formatter,
    )
    add = parser.add_argument
    add("input", type=Path, metavar="INPUT", help="video, folder of pictures or folder of videos")
    add("-o", "--output", type=Path, metavar="OUT", help="video file, or folder for PNG files")
    add("-n", "--model", metavar="NAME", help=f"weights: {', '.join(named_weights())} or a file")

    add = parser.add_argument_group("which frames").add_argument
    add("--start", type=_seconds, metavar="S", help="start at this second")
    add("--end", type=_seconds, metavar="S", help="stop before this second")
    add("--stream", type=int, metavar="N", help="index of the video stream (default: the first)")
    add("--preview", type=_at_least(0), metavar="N", help="write only frame N, as a PNG")
    add("--compare", action="store_true", help="write bicubic and the result side by side")

    add = parser.add_argument_group("encoder").add_argument
    add("--codec", default="libx264", metavar="NAME", help="FFmpeg encoder (default: libx264)")
    add("--crf", type=float, default=18.0, metavar="X", help="lower is better (default: 18)")
    add("-e", dest="encoder", action="append", default=[], type=_pair, metavar="KEY=VALUE",
        help="encoder option, repeatable: -e preset=slow")  # fmt: skip
    add("--lossless", action="store_true", help="keep every bit of the result; large files")

    add = parser.add_argument_group("engine").add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"), metavar="NAME",
        help="auto, cpu or cuda")  # fmt: skip
    add("--precision", default="auto", choices=("auto", *PRECISIONS), metavar="NAME",
        help=f"auto, {', '.join(PRECISIONS)}")  # fmt: skip
    add("--backend", default="auto", choices=BACKENDS, metavar="NAME",
        help=f"of the attention: {', '.join(BACKENDS)}")  # fmt: skip
    add("-t", "--tile", default="auto", type=_tile, metavar="N",
        help="side of the decoder's tiles, 0 for none (default: auto)")  # fmt: skip
    add("--memory-budget", type=_bytes, metavar="SIZE", help="use at most this memory: 8G")

    add = parser.add_argument_group("files").add_argument
    add("--overwrite", action="store_true", help="replace an existing output")
    add("--restart", action="store_true", help="delete unfinished work and start over")
    add("--segment", type=_at_least(1), default=SEGMENT, metavar="N",
        help="frames of a part that survives a stop (default: %(default)s)")  # fmt: skip
    add("--no-limits", action="store_true", help="accept huge pictures and many streams")
    return parser


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"must be {least} or more, got {text}")
        return min(int(text), sys.maxsize)

    return number


def _tile(text: str) -> int | str:
    return text if text == "auto" else _at_least(0)(text)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 <= seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"must be a number of seconds >= 0, got {text}")
    return seconds


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE, got {text!r}")
    return key, value


def main() -> None:
    """The command."""
    options = parse_options()
    stop_signals.install()
    try:
        summary, code = folder.run(options)
    except (MediaError, CheckpointError, OSError, MemoryError, RuntimeError) as error:
        sys.exit(f"error: {job.in_one_line(error, options.input)}")
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
