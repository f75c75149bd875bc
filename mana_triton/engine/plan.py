"""How a stream's work is divided so that its memory fits.

Features of whole frames are kept as long as there is room: then every frame is encoded once, and
only attention (by rows) and decoder (by tiles) are divided. Where even that is too much, all work
goes by bands of rows, whose neighborhoods are encoded anew for every frame of a window: slower,
but its memory grows with the width of a frame only. Either way the result is that of whole frames,
up to rounding and the tolerance of the attention's certificate.

Peak memory is predicted as a sum of what the tensors take, each with a factor that
`python eval/bench.py plan` measures.
"""

import math
import os
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mana_triton.model import MANAConfig
from mana_triton.resize import SCALE

TILE_BYTES = 256 << 20  # activations of the decoder that are alive at once, if there is room
BATCH_BYTES = 1 << 30  # the same of a batch: one frame of this size fills a GPU
BAND = 64  # rows of the attention's queries at once
RADIUS = 24  # pixels of neighborhood that the bands of a plan are reckoned with
SMALLEST_TILE, SMALLEST_BAND, SMALLEST_ROWS = 32, 8, 16
SHARE = 0.8  # of the memory that a stream plans with unless it is told

# what the terms of `predict` take, in multiples of their tensors
ENCODER, ATTENTION, PICTURES, BANDS, BATCHED = 4, 5, 4, 1.25, 0.8
ALWAYS = 24 << 20  # bytes of threads and the allocator


@dataclass(frozen=True)
class Plan:
    """How the work on frames of one size is divided.

    Attributes:
        workers: frames that are enlarged side by side.
        tile: side of the decoder's tiles in input pixels, 0 for the whole frame.
        band: rows of queries that attend at once.
        rows: rows that are made at once from frames encoded anew; 0: features are kept.
        batch: whole frames that go through the network at once, see `batches.py`; 0: none.
        peak: predicted bytes, beyond what the process held before.
        why: what decided.
    """

    workers: int
    tile: int
    band: int = BAND
    rows: int = 0
    batch: int = 0
    peak: int = 0
    why: str = ""

    def halved(self, height: int, width: int) -> "Plan | None":
        """What to try when the memory ran out: half of the largest part, None after the last."""
        why = "halved, as the memory ran out"
        if self.batch:
            return replace(self, batch=self.batch // 2, why=why)
        if self.rows:
            rows = self.rows // 2
            return replace(self, rows=rows, why=why) if rows >= SMALLEST_ROWS else None
        tile = (self.tile or max(height, width)) // 2
        if tile >= SMALLEST_TILE:
            band = max(self.band // 2, SMALLEST_BAND)
            return replace(self, tile=tile, band=band, why=why)
        rows = max(min(BAND, height), SMALLEST_ROWS)
        return replace(self, tile=SMALLEST_TILE, rows=rows, band=SMALLEST_BAND, why=why)


def predict(config: MANAConfig, itemsize: int, height: int, width: int, plan: Plan) -> int:
    """Peak bytes of a stream beyond what its process holds before.

    Args:
        config: of the network.
        itemsize: bytes of a number, 4 for float32.
        height, width: of the input.
        plan: its workers, tile, band, rows and batch count.
    """
    c, t, reach = config.channels, config.frames, config.frames // 2
    d = c // 2 * itemsize
    pixels, values = height * width, d + (2 * itemsize if config.offsets else 0)
    pictures = (plan.workers + PICTURES) * 3 * SCALE**2 * pixels
    lr = (t + 1) * 15 * pixels
    if plan.batch:
        n = plan.batch
        kept = (n + t - 1) * (c * itemsize + 3 * d + 12) * pixels + 2 * n * t * d * pixels
        decoder = BATCHED * activations(config, itemsize, 1, pixels)
        enlarging = c * itemsize * pixels + max(ATTENTION * t * values * pixels, decoder)
        large = 3 * SCALE**2 * pixels * (4 + 4 + 2)  # in float32, clamped, and as integers
        return int(ALWAYS + kept + n * (max(ENCODER * c * itemsize * pixels, enlarging) + large))
    margin = 2 * config.decoder_blocks + 3
    side = plan.tile + 2 * margin if plan.tile else max(height, width)
    tile = min(side, width) * min(side, height)
    attention = ATTENTION * t * values * min(plan.band, height) * width
    if plan.rows:
        inner = min(plan.rows + 2 * margin, height)
        outer = min(inner + 2 * RADIUS + 4 * config.encoder_blocks + 2, height)
        kept = (2 * t * d * outer + 2 * c * itemsize * inner) * width
        part = min(side, width) * min(plan.rows + 2 * margin, height)
        decoder = activations(config, itemsize, 1, part)
        encoder = ENCODER * c * itemsize * outer * width
        stacked = 2 * t * d * outer * width
        work = BANDS * (kept + max(encoder, stacked, attention, decoder))
        return int(ALWAYS + pictures + lr + plan.workers * work)
    kept = (2 * t * d + (reach + 2) * c * itemsize) * pixels
    encoder = ENCODER * c * itemsize * pixels
    work = d * pixels + max(attention, activations(config, itemsize, 1, tile))
    if plan.workers > 1:  # each holds the keys and values of its window
        shared = (plan.workers + 1) * 2 * t * d * pixels
        return ALWAYS + pictures + lr + kept + shared + encoder + plan.workers * work
    mirrored = 2 * (t - 1) * d * pixels  # a copy of keys and values at the ends of a scene
    return ALWAYS + pictures + lr + kept + max(encoder, mirrored + work)


def is_local(config: MANAConfig) -> bool:
    """Whether attention can do without far rows; the gate's denominator and no Gaussian cannot."""
    return config.gaussian == "bias" and not math.isinf(config.sigma)


def activations(config: MANAConfig, itemsize: int, height: int, width: int) -> int:
    """Bytes of the decoder's widest layers: 4C channels at x1, 2C at x2 and C/2 twice at x4."""
    return height * width * (4 + 8 + 16) * config.channels * itemsize


def choose(
    config: MANAConfig,
    itemsize: int,
    height: int,
    width: int,
    *,
    room: int,
    asked: bool,
    workers: int | None,
    tile: int | None,
    threads: int,
    batch: int,
) -> Plan:
    """The fastest plan for frames of one size whose predicted peak is at most `room` bytes.

    Args:
        config, itemsize, height, width: as of `predict`.
        room: bytes that the stream may take beyond what the process holds.
        asked: whether somebody set this bound; if not, the smallest plan is tried all the same.
        workers, tile: as asked for, None to choose.
        threads: workers at most.
        batch: frames of a batch at most; 0 for none.

    Raises:
        ValueError: nothing fits; names the bytes that would.
    """
    whole = activations(config, itemsize, height, width)
    if tile is None:
        side = int(math.sqrt(TILE_BYTES // activations(config, itemsize, 1, 1)))
        inner = max(side - 2 * (2 * config.decoder_blocks + 3), SMALLEST_TILE)
        start, why = (0, "the whole frame fits")
        if whole > TILE_BYTES:
            start, why = inner, f"{TILE_BYTES >> 20} MiB at once"
    else:
        start, why = tile, "as asked"
    most = workers or max(min(TILE_BYTES // whole, threads), 1)
    candidates = [Plan(1, 0, batch=n, why="whole frames fit") for n in range(batch, 0, -1)]
    candidates.append(Plan(most, start, why=why))
    if workers is None and most > 1:
        candidates.append(Plan(1, start, why=why))
    few = workers or 1
    tight = "to fit the memory"
    if tile is None:
        size = (start or max(height, width)) // 2
        while size >= SMALLEST_TILE:
            candidates.append(Plan(few, size, max(BAND // 2, SMALLEST_BAND), why=tight))
            size //= 2
    rows = 4 * BAND
    while is_local(config) and rows >= SMALLEST_ROWS:
        if rows < height:
            size = start if tile is not None else min(start or rows, rows)
            candidates.append(Plan(few, size, SMALLEST_BAND * 2, rows, why=tight))
        rows //= 2
    plans = [
        replace(plan, peak=predict(config, itemsize, height, width, plan)) for plan in candidates
    ]
    fitting = [plan for plan in plans if plan.peak <= room]
    if fitting:
        return fitting[0]
    least = min(plans, key=lambda plan: plan.peak)
    if asked:
        raise ValueError(
            f"{width}x{height} frames need {least.peak / 2**30:.2f} GiB beside what the process"
            f" holds, the memory budget leaves {max(room, 0) / 2**30:.2f}; raise it, or use half"
            " precision or a smaller network"
        )
    return replace(least, why="the smallest; it may not fit this memory")


# --- memory of this machine


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 8G, 1.5GiB or 800M (powers of 1024; plain numbers are bytes).

    Raises:
        ValueError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"must be a size such as 8G or 800M, got {text!r}")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def held(device: torch.device) -> int:
    """Bytes that this process holds now, in the memory of a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def size(device: torch.device) -> int | None:
    """Bytes of memory that this process may use; None where the system does not tell.

    All there are, or the limit of the control group, so that the same job is divided alike
    whatever else is running.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    sizes = []
    if (status := Path("/proc/meminfo")).exists():
        found = re.search(r"MemTotal:\s+(\d+) kB", status.read_text())
        sizes += [int(found[1]) * 1024] if found else []
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        sizes.append(int(text))
    return min(sizes, default=None)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory.

    PyTorch has a type for its own allocator of a GPU; a CPU's, CUDA, its libraries and Triton say
    it in words.
    """
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    words = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return known or (isinstance(error, RuntimeError) and any(x in str(error) for x in words))
