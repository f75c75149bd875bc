"""How the work on frames of one size is divided so that it fits the memory.

A plan starts from parts of a fixed size: decoder tiles of 256 MiB of activations, batches of 1 GiB.
While its estimated peak exceeds the memory, the largest part is halved.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mana_triton.model import MANAConfig
from mana_triton.resize import SCALE

TILE_BYTES = 256 << 20  # decoder activations of a tile, or of all workers together
BATCH_BYTES = 1 << 30  # the same of a batch: enough to keep a GPU busy
BAND = 64
SMALLEST_TILE, SMALLEST_BAND = 32, 8


@dataclass(frozen=True)
class Plan:
    """How the work on frames of one size is divided.

    Attributes:
        tile: side of the decoder's tiles in input pixels, 0 for the whole frame.
        batch: frames that are encoded at once; a CUDA graph also enlarges as many at once.
        workers: threads that enlarge one frame each.
        band: rows of queries that attend at once.
        peak: estimated bytes, in addition to what the process holds before.
        why: what decided.
    """

    tile: int = 0
    batch: int = 1
    workers: int = 1
    band: int = BAND
    peak: int = 0
    why: str = ""

    def halved(self, height: int, width: int) -> "Plan | None":
        """The plan with half of its largest part; None if the parts are the smallest."""
        if self.batch > 1:
            return replace(self, batch=self.batch // 2)
        if self.workers > 1:
            return replace(self, workers=self.workers // 2)
        tile = (self.tile or max(height, width)) // 2
        if tile < SMALLEST_TILE:
            return None
        return replace(self, tile=tile, band=max(self.band // 2, SMALLEST_BAND))


def activations(config: MANAConfig, itemsize: int, pixels: int) -> int:
    """Bytes of the decoder's widest layers: 4C channels at x1, 2C at x2 and C/2 twice at x4."""
    return pixels * (4 + 8 + 16) * config.channels * itemsize


def first_plan(
    config: MANAConfig, itemsize: int, height: int, width: int, threads: int, batched: bool
) -> Plan:
    """The plan where memory is plentiful; `threads` and `batched` say what the device can do."""
    whole = activations(config, itemsize, height * width)
    if batched:
        batch = max(min(BATCH_BYTES // whole, config.frames), 1)
        return Plan(batch=batch, band=height, why="whole frames fit")
    if whole <= TILE_BYTES:
        workers = max(min(TILE_BYTES // whole, threads), 1)
        return Plan(workers=workers, why="the whole frame fits")
    side = math.isqrt(TILE_BYTES // activations(config, itemsize, 1))
    tile = max(side - 2 * (2 * config.decoder_blocks + 3), SMALLEST_TILE)
    return Plan(tile, why=f"{TILE_BYTES >> 20} MiB at once")


def estimate(config: MANAConfig, itemsize: int, height: int, width: int, plan: Plan) -> int:
    """Peak bytes of a stream in addition to what its process holds before."""
    c, t, pixels = config.channels, config.frames, height * width
    d = c // 2 * itemsize
    together = max(plan.batch, plan.workers)
    cached = t - 1 + plan.batch + (plan.workers if plan.workers > 1 else 0)
    features = (2 * d * cached + c * itemsize * (cached - t // 2)) * pixels
    encoder = 4 * c * itemsize * plan.batch * pixels
    window = (2 * t + 1) * d * pixels
    attention = 5 * t * (d + 2 * itemsize) * min(plan.band, height) * width
    side = plan.tile + 2 * (2 * config.decoder_blocks + 3) if plan.tile else max(height, width)
    decoder = activations(config, itemsize, min(side, height) * min(side, width))
    pictures = (together + 4) * 3 * SCALE**2 * pixels
    return features + max(encoder, together * (window + max(attention, decoder))) + pictures


def fit(
    plan: Plan, asked: Mapping[str, int], room: int, config: MANAConfig, itemsize: int,
    height: int, width: int,
) -> Plan:  # fmt: skip
    """Halve a plan until its estimated peak is at most `room` bytes; `asked` parts stay.

    Raises:
        ValueError: it does not fit.
    """
    plan = replace(plan, **asked, why="as asked" if "tile" in asked else plan.why)
    while (peak := estimate(config, itemsize, height, width, plan)) > room:
        smaller = plan.halved(height, width)
        if smaller is None or any(getattr(smaller, name) != asked[name] for name in asked):
            raise ValueError(
                f"{width}x{height} frames need {peak / 2**30:.2f} GiB in addition to what the "
                f"process holds, the memory budget leaves {max(room, 0) / 2**30:.2f}; raise it, "
                "or use half precision or a smaller network"
            )
        plan = replace(smaller, why="to fit the memory")
    return replace(plan, peak=peak)
