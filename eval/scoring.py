"""Scores of one clip: its low-resolution frames, per-frame metrics, kept results, processes."""

import hashlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from functools import lru_cache
from io import BytesIO
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from eval.datasets import TestClip, console, count
from eval.methods import Frames, enlarge
from eval.units import MIDDLE_PICTURE, WORST_PICTURE, Size, Unit, check_size, hr_sizes, lr_sizes
from mana_triton.files import write_atomically
from mana_triton.metrics import LPIPS, flow, psnr, ssim, tof, warping_error
from mana_triton.training.clips import DataError, Source
from mana_triton.training.degradation import compress, degrade

Pair = tuple[np.ndarray, np.ndarray]  # original, enlarged


class Stopped(Exception):
    """The evaluation was stopped while this clip was computed."""


# ---- frames


def originals(clip: TestClip) -> Frames:
    """The original frames, cropped to multiples of 4."""
    cropped, full = hr_sizes(clip)
    return _frames(clip.source, cropped, full)


def _frames(source: Source, cropped: Size, *sizes: Size) -> Frames:
    """Frames from disk, all of one of these sizes, cropped to the first."""
    size = None
    for index, frame in enumerate(source.frames()):
        if size is None:
            size = frame.shape[:2]
            check_size(source, size, (cropped, *sizes))
        if frame.shape[:2] != size:
            raise DataError(
                f"the frames of {source.place} must have one size, frame {index} has "
                f"{frame.shape[1]}x{frame.shape[0]} after {size[1]}x{size[0]}"
            )
        yield frame[: cropped[0], : cropped[1]].copy()


def _hashed(frames: Iterable[np.ndarray], digest) -> Frames:
    for frame in frames:
        digest.update(np.array(frame.shape).tobytes() + frame.tobytes())
        yield frame


def pairs(unit: Unit, digest) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Number, original and enlarged frame for each scored frame; digest takes the LR frames."""
    clip, protocol = unit.clip, unit.protocol
    hr = originals(clip)
    if unit.output is not None:
        enlarged = _frames(unit.output, *hr_sizes(clip))
        if count(unit.output) == clip.shape[0]:
            enlarged = (frame for i, frame in enumerate(enlarged) if i in clip.scored)
    else:
        if unit.lr is not None:
            lr = _frames(unit.lr, *lr_sizes(clip))
        else:
            hr, ahead = tee(hr)
            how = protocol.degradation
            lr = (degrade(torch.from_numpy(frame), how).numpy() for frame in ahead)
            if protocol.crf is not None:
                lr = compress(lr, "libx264", protocol.crf)
        lr = _hashed(lr, digest)
        enlarged = enlarge(unit.method, lr, clip.scored, protocol.device, protocol.precision)
    numbered = ((i, frame) for i, frame in enumerate(hr) if i in clip.scored)
    # a strict zip runs both to their ends, so the digest sees all frames
    for (index, original), result in zip(numbered, enlarged, strict=True):
        yield index, original, result


# ---- scores


@lru_cache(maxsize=1)
def lpips_of(backbone: Path | None) -> LPIPS:
    """The metric, built once per process."""
    return LPIPS(backbone)


def score_frame(original: np.ndarray, enlarged: np.ndarray, unit: Unit) -> dict[str, float | None]:
    """The scores of a single frame; PSNR is None if the frames are equal."""
    border = unit.protocol.crop_border
    scores: dict[str, float | None] = {
        f"{metric.__name__}_{name}": metric(enlarged, original, y_channel=y, crop_border=border)
        for name, y in (("rgb", False), ("y", True))
        for metric in (psnr, ssim)
    }
    scores |= {name: None for name, value in scores.items() if value == float("inf")}
    metric = lpips_of(unit.backbone) if unit.protocol.lpips else None
    scores["lpips"] = metric(enlarged, original, crop_border=border) if metric else None
    return scores


def score_steadiness(before: Pair | None, now: Pair, border: int) -> dict[str, float | None]:
    """The scores that compare a frame with the one before it; None for the first frame."""
    if before is None:
        return {"tof": None, "warping_error": None}
    inside = slice(border, -border or None)
    frames = [(a[inside, inside], b[inside, inside]) for a, b in zip(before, now, strict=True)]
    of_originals, of_enlarged = (flow(*neighbors) for neighbors in frames)
    return {
        "tof": tof(of_enlarged, of_originals),
        "warping_error": warping_error(enlarged=frames[1], originals=frames[0]),
    }


def score(unit: Unit, tick: Callable[[], None]) -> None:
    """Compute one clip and keep the result; tick is called after each frame."""
    digest = hashlib.sha256()
    frames, rows = [], []
    before: Pair | None = None
    middle, worst, lowest = None, None, 0.0
    for index, original, enlarged in pairs(unit, digest):
        row = score_frame(original, enlarged, unit)
        if unit.protocol.temporal:
            row |= score_steadiness(before, (original, enlarged), unit.protocol.crop_border)
            before = original, enlarged
        value = float("inf") if row["psnr_rgb"] is None else row["psnr_rgb"]
        if worst is None or value < lowest:
            lowest, worst = value, (index, enlarged)
        if index == unit.clip.middle:
            middle = enlarged
        frames.append(index)
        rows.append(row)
        tick()
    if unit.pictures and worst is not None and middle is not None:
        for suffix, frame in (MIDDLE_PICTURE, middle), (WORST_PICTURE, worst[1]):
            buffer = BytesIO()
            Image.fromarray(frame).save(buffer, "png", compress_level=1)
            write_atomically(unit.file(suffix), buffer.getvalue())
    result = {
        "clip": unit.clip.name,
        "method": unit.method,
        "lr_sha256": None if unit.output else digest.hexdigest(),
        "worst": worst and worst[0],
        "frames": frames,
        "scores": {name: [row[name] for row in rows] for name in rows[0]},
    }
    write_atomically(unit.file(), json.dumps(result))


# ---- processes


def compute(units: list[Unit], jobs: int) -> None:
    """Compute the units without a kept result, in this process or in several."""
    waiting = sorted((u for u in units if not u.is_done()), key=lambda u: -len(u.clip.scored))
    if not waiting:
        return
    if kept := len(units) - len(waiting):
        console.print(f"note: {kept} results are kept from before")
    columns = (*Progress.get_default_columns(), TextColumn("{task.completed}/{task.total} frames"))
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            task = progress.add_task("scoring", total=sum(len(u.clip.scored) for u in waiting))
            if min(jobs, len(waiting)) == 1:
                for unit in waiting:
                    score(unit, lambda: progress.advance(task))
            else:
                _compute_in_processes(
                    waiting, jobs, lambda done: progress.update(task, completed=done)
                )
    except DataError as error:
        raise DataError(f"{error}; finished clips are kept in {units[0].results}") from error


def workers(jobs: int, *shared) -> ProcessPoolExecutor:
    """Processes that share the cores and end with this one."""
    threads = max(1, (os.cpu_count() or 1) // jobs)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(jobs, context, _start_worker, (threads, *shared))


_shared: dict[str, Any] = {}  # what a worker process shares with its parent


def _start_worker(threads: int, counter=None, stop=None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process tells workers to stop
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
    score(unit, _tick)


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
        # after an error, clips in progress are finished and kept
        executor.shutdown(cancel_futures=True)
