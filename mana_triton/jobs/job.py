"""One file's work: read, enlarge, write, with progress on stderr and a summary for stdout."""

import contextlib
import hashlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import av
import numpy as np
import PIL
import safetensors.torch
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mana_triton.checkpoint import CheckpointError
from mana_triton.engine.memory import out_of_memory
from mana_triton.engine.plan import Plan
from mana_triton.engine.prefetch import StallTimes, prefetch
from mana_triton.engine.upscaler import Enlarged, Upscaler
from mana_triton.files import WRITABLE_VIDEOS
from mana_triton.jobs.options import JobOptions
from mana_triton.jobs.resume import frames_from, track_scenes
from mana_triton.jobs.segments import ResumableWriter, open_resumable
from mana_triton.jobs.stop import stop_signals
from mana_triton.resize import SCALE, upscale_bicubic
from mana_triton.video.encoder import ENCODER_MEMORY
from mana_triton.video.frame import MediaError
from mana_triton.video.reader import Reader, open_reader

AHEAD = 64 << 20  # bytes of enlarged frames that wait for the encoder
OVERHEAD = ENCODER_MEMORY + (96 << 20)  # bytes that decoder, encoder and their threads take
WEBM = ("libvpx-vp9", "libvpx", "libaom-av1", "libsvtav1")  # encoders whose video webm holds

console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def say(line: str) -> None:
    """Print a line on stderr as it is."""
    console.print(line, markup=False)


def make_upscaler(options: JobOptions, model: str) -> Upscaler:
    """The engine of a run.

    Raises:
        MediaError: the machine does not have what the options ask for.
    """
    engine, budget = options.engine, options.engine.memory_budget
    on_gpu = engine.device == "cuda" or (engine.device == "auto" and torch.cuda.is_available())
    if budget is not None and not on_gpu:  # on a CPU the encoder needs a part
        if budget <= OVERHEAD:
            least = f"{OVERHEAD >> 20} MiB for the encoder"
            raise MediaError(f"--memory-budget must be more than {least}, got {budget >> 20} MiB")
        engine = replace(engine, memory_budget=budget - OVERHEAD)
    try:
        return Upscaler(model, engine)
    except ValueError as error:
        raise MediaError(str(error)) from error


def default_output(source: Path, codec: str) -> Path:
    """`<name>_x4.<ext>` in the folder of the input."""
    if source.is_dir():  # "." and ".." have no name; a suffix would ask for a video
        source = source.resolve()
        return source.with_name(f"{source.name}_x{SCALE}".replace(".", "_"))
    suffix = source.suffix.lower()
    is_kept = suffix in WRITABLE_VIDEOS and suffix != ".avi"
    if not is_kept or (suffix == ".webm" and codec not in WEBM):
        return source.with_name(f"{source.stem}_x{SCALE}.mkv")  # holds every codec and sound
    return source.with_name(f"{source.stem}_x{SCALE}{source.suffix}")


def open_input(source: Path, options: JobOptions) -> Reader:
    """The reader of a job's input."""
    limits = options.limits
    return open_reader(source, options.start, options.end, stream=options.stream, limits=limits)


def make_plan(source: Path, reader: Reader, upscaler: Upscaler) -> Plan:
    """How the work on the reader's frames is divided; says it, too.

    Raises:
        MediaError: they do not fit the memory.
    """
    try:
        plan = upscaler.plan(reader.height, reader.width)
    except ValueError as error:
        raise MediaError(f"{source}: {error}") from error
    tiles = f"tiles of {plan.tile} pixels" if plan.tile else "no tiles"
    together = max(plan.batch, plan.workers)
    say(
        f"{upscaler.description}; {tiles} ({plan.why}); {together} frame{'s' * (together > 1)} "
        f"at once; about {plan.peak / 2**30:.1f} GiB for frames and features"
    )
    return plan


def enlarge(source: Path, output: Path, upscaler: Upscaler, options: JobOptions) -> dict[str, Any]:
    """Enlarge one video or folder of pictures; returns the summary.

    Raises:
        MediaError: the input cannot be read or the output not written.
    """
    started = time.perf_counter()
    with open_input(source, options) as reader:
        plan = make_plan(source, reader, upscaler)
        size = SCALE * reader.width * (2 if options.compare else 1), SCALE * reader.height
        job = identity(upscaler, plan, options)
        writer = open_resumable(output, reader, size, job, options)
        resumed = writer.parts.point.number
        with _say_what_is_kept(writer), writer:
            say(f"{source} -> {output}, {size[0]}x{size[1]}")
            shown = show_notes([*reader.notes, *writer.notes])
            if resumed:
                say(f"continuing after {resumed} frames")
            frames, waits = _enlarge_all(reader, upscaler, writer, options)
        show_notes([*reader.notes, *writer.notes], shown)
        say("waited: {}".format(", ".join(f"{k} {v:.0%}" for k, v in waits.items())))
        if reader.truncated:
            say(f"warning: {reader.truncated}")
    seconds = time.perf_counter() - started
    return {
        "output": str(output), "frames": frames, "resumed": resumed,
        "width": size[0], "height": size[1], "seconds": round(seconds, 3),
        "ms_per_frame": round(1000 * seconds / max(frames - resumed, 1), 2),
        "waits": {stage: round(share, 3) for stage, share in waits.items()}, **division(plan),
    }  # fmt: skip


def _enlarge_all(
    reader: Reader, upscaler: Upscaler, writer: ResumableWriter, options: JobOptions
) -> tuple[int, dict[str, float]]:
    """Enlarge and write all frames; returns their number and how long each stage waited."""
    size = (2 if options.compare else 1) * 48 * reader.width * reader.height * -(-reader.bits // 8)
    read, written = StallTimes(), StallTimes()
    results = _enlarged(reader, upscaler, writer, options, read)
    results = prefetch(results, max(min(AHEAD // size, 4), 1), written)
    resumed = frames = writer.parts.point.number
    total, started = reader.frame_count, time.perf_counter()
    columns = (
        TextColumn("{task.completed} of {task.fields[of]} frames"), BarColumn(),
        TextColumn("{task.fields[rate]:.2f} fps"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress, contextlib.closing(results):
        task = progress.add_task("", total=total, completed=frames, of=total or "?", rate=0)
        for source, picture in results:
            with stop_signals:
                writer.write(picture, source)
            frames += 1
            fps = (frames - resumed) / (time.perf_counter() - started)
            progress.update(task, completed=frames, rate=fps)
        progress.update(task, total=frames, of=frames)  # containers only estimate it
    seconds = time.perf_counter() - started
    waited = {
        "reading": read.for_room,
        "network": read.for_items + written.for_room,
        "writing": written.for_items,
    }
    return frames, {stage: min(x / seconds, 1.0) for stage, x in waited.items()}


def _enlarged(
    reader: Reader,
    upscaler: Upscaler,
    writer: ResumableWriter,
    options: JobOptions,
    stalls: StallTimes,
) -> Iterator[Enlarged]:
    """What is to be written, and the frames it comes from; decoding runs in a thread of its own."""
    point = writer.parts.point
    # a GPU also makes the planes of a video; a CPU does so in the thread that writes
    on_gpu = upscaler.device.type == "cuda"
    tracked = track_scenes(frames_from(reader, point), upscaler.window_radius, point)
    with contextlib.closing(prefetch(tracked, stalls=stalls)) as sources:
        for source, picture in upscaler.stream(
            sources,
            pixels=lambda source: source.frame.rgb,
            is_cut=lambda source: source.is_cut,
            start=point.start,
            skip=len(point.context),
            postprocess=writer.planes if on_gpu and not options.compare else None,
        ):
            if options.compare:
                bicubic = upscale_bicubic(torch.from_numpy(source.frame.rgb.copy())).numpy()
                picture = np.concatenate([bicubic, picture], 1)
            yield Enlarged(source, picture)


def identity(upscaler: Upscaler, plan: Plan, options: JobOptions) -> dict[str, object]:
    """What must be the same, besides the input, for unfinished work to continue.

    Another device, processor, number of threads or version of the software adds sums in another
    order; other versions may also decode to other pixels.
    """
    names = ("start", "end", "stream", "limits", "compare", "segment")
    encode = asdict(options.encode)
    job: dict[str, object] = {name: getattr(options, name) for name in names}
    job |= {f"-e {key}": value for key, value in encode.pop("options")} | encode
    job |= {f"version of {x.__name__}": x.__version__ for x in (torch, av, np, PIL)}
    tensors = {key: x.contiguous() for key, x in upscaler.model.state_dict().items()}
    weights = safetensors.torch.save(tensors, {"config": repr(upscaler.model.config)})
    is_cuda = upscaler.device.type == "cuda"
    return job | division(plan) | {
        "band": plan.band,
        "precision": upscaler.precision,
        "backend": upscaler.backend,
        "device": torch.cuda.get_device_name(upscaler.device) if is_cuda else upscaler.device.type,
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processors": os.cpu_count(),
        "weights": hashlib.sha256(weights).hexdigest(),
    }  # fmt: skip


def division(plan: Plan) -> dict[str, int]:
    """What the summary says of a plan."""
    return {"tile": plan.tile, "workers": plan.workers, "batch": plan.batch}


def show_notes(notes: Sequence[str], shown: Sequence[str] = ()) -> Sequence[str]:
    """Print the notes that were not shown yet; returns all of them."""
    for note in dict.fromkeys(notes):
        if note not in shown:
            say(f"note: {note}")
    return notes


@contextlib.contextmanager
def _say_what_is_kept(writer: ResumableWriter) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if number := writer.parts.point.number:
            say(f"note: {number} frames are kept; the same command continues there")
        else:
            say(f"note: nothing is kept: the first segment of {writer.length} frames is not done")
        raise


def peak_mib() -> float | None:
    """Peak resident memory of this process; None where the system does not tell."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count the program that started this one, too
        peak = re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)
        return round(int(peak[1]) / (1 << 10), 1) if peak else None
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10), 1)


def in_one_line(error: Exception, source: Path) -> str:
    """The message of an error that ends the work on a file; raises all others again."""
    if isinstance(error, MediaError | CheckpointError | OSError):
        return str(error)
    if not out_of_memory(error):
        raise error
    return f"{source}: the memory is too small for this frame size, even in the smallest parts"
