"""Quality of enlarging methods on clips whose originals are known.

    python eval/run.py --data Vid4=DATA/Vid4 --method bicubic mana:tiny folder:DATA/outputs

Methods: bicubic (MATLAB's kernel); mana:WEIGHTS streams a clip as infer does, WEIGHTS being a
shipped name or a file; center:WEIGHTS gives the network the center frame seven times, so it sees no
neighbors; ensemble:WEIGHTS is the mean over a clip's eight flips and turns, at eight times the
cost; folder:PATH reads frames that another program made, one folder or video per clip.
Data sets: any folder of videos or of folders of frames, under any name. The names Vimeo-90K (only
im4 is scored), Vimeo-90K-Motion and REDS4 mean what they do in the literature; for these, Vid4,
SPMCS, UDM10 and Parkour the number of clips and frames is checked.

Originals are cropped to multiples of 4. Low-resolution frames of 8 bits are made from them, with
--crf compressed as video (x264, 4:2:0), or read with --lr. PSNR (dB) and SSIM in RGB and in luma
(BT.601), LPIPS, and with --temporal tOF (pixels) and the warping error (steps of 8 bits) are means
over the frames of a clip, then over clips; frame_mean is over all frames.
Frames that equal their originals have no PSNR: perfect_frames counts them, means leave them out.
Each finished clip is kept in --results, so a stopped evaluation continues with the same command.
The last line of stdout is one JSON object {"rows": [...]}.

    python eval/run.py --bench

measures the speed of this device instead: milliseconds per frame against the paper's 59 and against
other attentions. Before that, it compares the frames of every fast path with the float32 reference
(`eval/accuracy.py`).
"""

import argparse
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from io import TextIOWrapper
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from eval import accuracy, bench, page, report, scoring, timing
from eval.datasets import console
from eval.methods import MethodError, describe, upscaler_of
from eval.units import Options, Protocol, plan
from mana_triton import runtime
from mana_triton.checkpoint import CheckpointError
from mana_triton.files import content_hash, write_atomically
from mana_triton.metrics import BackboneError, LPIPSUnavailable
from mana_triton.training.clips import DataError
from mana_triton.training.degradation import DEGRADATIONS

ROOT = Path(__file__).resolve().parents[1]
PADDING = "mirrored at the ends and at scene cuts, end frames not repeated (reflection)"


def _named_path(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"must be NAME=PATH, got {text!r}")
    return name, Path(path)


def _at_least(lowest: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        if not text.isdecimal() or int(text) < lowest:
            raise argparse.ArgumentTypeError(f"must be a number >= {lowest}, got {text!r}")
        return int(text)

    return number


def parse_args(argv: list[str] | None = None) -> Options:
    """The flags; wrong usage exits with code 2."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", nargs="+", type=_named_path, default=[], metavar="NAME=PATH",
        help="data sets; see above for names with a meaning")  # fmt: skip
    add("--method", nargs="+", default=[], metavar="METHOD", help="see above")
    add("--degradation", choices=(*DEGRADATIONS, "none"), default="matlab_bicubic")
    add("--crf", type=int, choices=range(52), metavar="CRF",
        help="compress the low-resolution frames with x264 at this quality, 0 to 51")  # fmt: skip
    add("--lr", nargs="+", type=_named_path, default=[], metavar="NAME=PATH",
        help="low-resolution frames of a data set, instead of making them")  # fmt: skip
    add("--crop-border", type=_at_least(0), default=0, metavar="PIXELS")
    add("--temporal", action="store_true",
        help="tOF and warping error as well; slow")  # fmt: skip
    add("--lpips-backbone", type=Path, metavar="FILE", help=".safetensors of AlexNet's features")
    add("--device", default="auto", help="of the networks (default: %(default)s)")
    add("--precision", default="auto", help="auto, fp32, bf16, fp16 (default: %(default)s)")
    add("--jobs", type=_at_least(1), metavar="N",
        default=1 if torch.cuda.is_available() else os.cpu_count() or 1,
        help="processes (default: one per core, one with a GPU)")  # fmt: skip
    add("--results", type=Path, default=Path("runs/eval"), metavar="DIR",
        help="where finished clips are kept (default: %(default)s)")  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="also write the JSON line there")
    add("--html", type=Path, metavar="FILE", help="a page with plots and pictures")
    add("--table1", action="store_true", help="the paper's Table 1 with these measurements")
    add("--table2", action="store_true", help="the paper's Table 2: mana:FILE by memory size")
    add("--bench", action="store_true", help="measure speed and memory; no --data, no --method")
    add("--full", action="store_true",
        help="--bench with the backward pass and up to 3840x2160; long on a CPU")  # fmt: skip
    args = parser.parse_args(argv)
    if args.bench and (args.data or args.method):
        parser.error("--bench takes no --data and no --method")
    if not args.bench and not (args.data and args.method):
        parser.error("the following arguments are required: --data, --method (or --bench)")
    if args.crf is not None and (args.lr or args.degradation == "none"):
        parser.error("--crf compresses frames that are made; omit --lr and --degradation none")
    if args.full and not args.bench:
        parser.error("--full belongs to --bench")
    for flag, names in ("--data", [n for n, _ in args.data]), ("--method", args.method):
        if len(set(names)) < len(names):
            parser.error(f"{flag} must not name one thing twice, got {' '.join(names)}")
    args.data, args.lr = dict(args.data), dict(args.lr)
    return Options(**vars(args))


# ---- evaluation and benchmark


def _lpips_identity(backbone: Path | None) -> str | None:
    """What the protocol says about LPIPS; None, with a note that says how to get it, without."""
    try:
        scoring.lpips_of(backbone)
    except LPIPSUnavailable as error:
        console.print(f"note: {error}")
        return None
    return content_hash(backbone) if backbone else "torchvision"


def _sources_hash() -> str:
    digest = hashlib.sha256()
    files = [*ROOT.glob("mana_triton/**/*.py"), *ROOT.glob("kernels/**/*.py")]
    files += [ROOT / "eval" / f"{name}.py" for name in ("datasets", "methods", "units", "scoring")]
    for file in sorted(files):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _commit() -> str | None:
    """Of this checkout, with a + if files were changed; None outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty=+"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return result.stdout.strip() or None


def evaluate(options: Options) -> dict[str, Any]:
    """Score all methods on all sets, print the tables; the object of the last line."""
    upscaler_of("tiny", options.device, options.precision)  # is there such a device?
    device = "cuda" if torch.cuda.is_available() else "cpu"
    protocol = Protocol(
        options.degradation, options.crf, options.crop_border, options.temporal,
        _lpips_identity(options.lpips_backbone),
        device if options.device == "auto" else options.device, options.precision, _sources_hash(),
    )  # fmt: skip
    commit = _commit()  # of what runs, whatever is committed meanwhile
    _check_results(options.results)
    with scoring.workers(options.jobs) if options.jobs > 1 else nullcontext() as executor:
        units = plan(options, protocol, executor, page.PICTURED if options.html else 0)
    scoring.compute(units, options.jobs)
    results = [(unit, unit.load()) for unit in units]
    about = {m: describe(m, protocol.device, protocol.precision) for m in options.method}
    summary = {
        "rows": report.rows(results, about),
        "degradation": options.degradation,
        "crf": options.crf,
        "crop_border": options.crop_border,
        "lr_from_disk": sorted(options.lr),
        "rounding": "8 bits",
        "padding": PADDING,
        "lpips": f"alex, v0.1, backbone {protocol.lpips}" if protocol.lpips else None,
        "commit": commit,
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
    report.show(summary)
    for title, wanted in ("Table 1", options.table1), ("Table 2", options.table2):
        if wanted:
            report.show_paper_table(title, summary)
    if options.html:
        document = page.render(summary, results, scoring.originals)
        write_atomically(options.html, document.encode(errors="backslashreplace"))
    return summary


def _check_results(folder: Path) -> None:
    """Raise DataError unless files can be written there, before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise DataError(f"--results must be a folder to write to, got {folder}: {error}") from error


def benchmark(options: Options) -> dict[str, Any]:
    """Measure speed and memory of this device; the object of the last line."""
    upscaler = upscaler_of("tiny", options.device, options.precision)
    device, commit = upscaler.device, _commit()
    if device.type == "cpu":
        runtime.configure_process()  # as the command does
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else (
        f"CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    )  # fmt: skip
    console.print(f"{name}: {upscaler.description}")
    accurate = accuracy.gate(accuracy.demo(), "tiny", device, "the demo clip")
    rows: list[timing.Row] = []
    tables = bench.tables(device, upscaler.precision, upscaler.backend, options.full)
    for title, caption, table in tables:
        timing.show(table, title, caption)
        rows += table
    return {
        "rows": rows,
        "accuracy": accurate,
        "paper_ms": bench.PAPER["ms"],
        "device": name,
        "precision": upscaler.precision,
        "commit": commit,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
    }


def main() -> None:
    """Command line."""
    options = parse_args()
    for stream in (sys.stdout, sys.stderr):  # file names may be in no encoding
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # a closed terminal and SIGTERM stop it as Ctrl-C does
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        summary = benchmark(options) if options.bench else evaluate(options)
    except (
        DataError, CheckpointError, MethodError, BackboneError, bench.BenchError, OSError,
    ) as error:  # fmt: skip
        sys.exit(f"error: {error}")
    except (MemoryError, torch.OutOfMemoryError, BrokenProcessPool):
        again = "" if options.bench else "; the same command with --jobs 1 continues"
        sys.exit(f"error: out of memory{again}")
    except (KeyboardInterrupt, scoring.Stopped):
        again = "" if options.bench else f"; the same command continues from {options.results}"
        sys.exit(f"error: stopped{again}")
    line = json.dumps(summary, allow_nan=False)
    print(line, flush=True)
    if options.json:
        try:
            write_atomically(options.json, f"{line}\n")
        except OSError as error:
            sys.exit(f"error: --json must be a file that can be written, got: {error}")
    if failed := accuracy.missed(summary.get("accuracy", [])):
        sys.exit(f"error: the accuracy gate is missed by: {', '.join(failed)}")


if __name__ == "__main__":
    main()
