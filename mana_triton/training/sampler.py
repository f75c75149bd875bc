"""Random training batches from clips and stills.

Sample i of iteration n is a function of (seed, n, i) alone, so a training run resumes without any
state of the data, and the number of threads that prepare batches changes nothing.
"""

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from mana_triton.resize import SCALE
from mana_triton.training.clips import WINDOW, Clip, DataError
from mana_triton.training.degradation import LowClip, degrade
from mana_triton.training.losses import LUMA, optical_flow
from mana_triton.training.motion import Span, moving_still, shrink

GRAY = 0.05  # share of gray samples among pairs
MARGIN = 2  # LR pixels around a crop that x1/4 bicubic reaches into

T = TypeVar("T")


class Sampler:
    """Random training batches from clips and stills.

    Args:
        clips: moving clips of at least 7 frames; their scenes of fewer are left out.
        stills: pictures; they become clips by synthetic motion.
        crop: LR pixels; every picture must have at least 4 * crop HR pixels each way.
        batch: samples per iteration.
        seed: with the iteration and the sample's index it decides everything.
        degradation: see `degrade`.
        still_fraction: share of samples from stills when there are both kinds.
        low: low-resolution variants of every clip and still by their paths (see
            `open_low_clips`); None makes low-resolution frames by `degradation`.

    Raises:
        DataError: a clip is too short or too small; the message names it.
    """

    def __init__(
        self,
        clips: list[Clip],
        stills: list[Clip],
        *,
        crop: int,
        batch: int,
        seed: int,
        degradation: str = "matlab_bicubic",
        still_fraction: float = 0.3,
        low: dict[Path, list[LowClip]] | None = None,
    ):
        if not clips and not stills:
            raise DataError("there must be at least one clip or still, got none; pass --data")
        self.clips, self.stills = long_enough(clips, WINDOW), stills
        self.short_scenes = sum(len(x) < WINDOW for clip in clips for x in clip.scenes)
        refuse_small(clips + stills, crop, exact=low is None)
        self.crop, self.batch, self.seed = crop, batch, seed
        self.degradation, self.low = degradation, low
        self.still_fraction = still_fraction if clips else 1.0

    def load(self, iteration: int, share: range | None = None) -> tuple[Tensor, Tensor]:
        """The batch of an iteration: lr [B, 7, 3, c, c], hr [B, 3, 4c, 4c], float32 in [0, 1].

        `share` says which of its samples; None is all of them.
        """
        numbers = range(self.batch) if share is None else share
        lrs, hrs = zip(*(self.sample(iteration, i) for i in numbers), strict=True)
        lr = rearrange(torch.stack(lrs), "b t h w c -> b t c h w")
        hr = rearrange(torch.stack(hrs), "b h w c -> b c h w")
        return lr.contiguous().float() / 255, hr.contiguous().float() / 255

    def sample(self, iteration: int, index: int) -> tuple[Tensor, Tensor]:
        """One sample: lr [7, c, c, 3] and the center's hr [4c, 4c, 3], uint8."""
        rng = np.random.Generator(np.random.Philox(seed=[self.seed, iteration, index]))
        still = bool(self.stills) and rng.random() < self.still_fraction
        pool = self.stills if still else self.clips
        clip = pool[rng.integers(len(pool))]
        if self.low:
            variants = self.low[clip.path]
            variant = variants[rng.integers(len(variants))]
            times = _choose_times([range(WINDOW)] if still else clip.scenes, rng)
            lr, hr = crop_variant(clip, variant, times, 1, self.crop, rng)
            lr, hr = torch.from_numpy(lr), torch.from_numpy(hr[0])
        else:
            lr, hr = self._degraded(clip, still, rng)
        return _turn(lr, hr, rng)

    def _degraded(self, clip: Clip, still: bool, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """A crop of a clip or still, degraded with a margin."""
        rows, cols = self._place(clip, rng)
        if still:
            hr = moving_still(clip, self.stills, rows, cols, SCALE * self.crop, rng)
        else:
            hr = _clip_frames(clip, rows, cols, rng)
        lr = degrade(hr, self.degradation)
        c, C = self.crop, SCALE * self.crop
        top, left = rows.margin, cols.margin
        lr = lr[:, top : top + c, left : left + c]
        return lr, hr[WINDOW // 2, SCALE * top : SCALE * top + C, SCALE * left : SCALE * left + C]

    def batches(
        self, start: int, stop: int, workers: int = 1, share: range | None = None
    ) -> Generator[tuple[Tensor, Tensor], None, None]:
        """The batches of iterations start..stop-1, prepared ahead in background threads."""
        return prepared(partial(self.load, share=share), start, stop, workers)

    def _place(self, clip: Clip, rng: np.random.Generator) -> tuple[Span, Span]:
        """Where the sample lies: half of all samples come from a picture shrunk by up to 2."""
        _, H, W, _ = clip.shape
        size = SCALE * self.crop
        scale = 1.0
        if rng.random() < 0.5:
            scale = rng.uniform(max(0.5, size / min(H, W)), 1)
        rows = _choose_span(H, max(size, int(H * scale)), self.crop, rng)
        cols = _choose_span(W, max(size, int(W * scale)), self.crop, rng)
        return rows, cols


class Pairs:
    """Batches of neighboring windows from clips, and of single windows from stills."""

    def __init__(
        self,
        clips: list[Clip],
        stills: list[Clip],
        low: dict[Path, list[LowClip]],
        *,
        crop: int,
        pairs: int,
        singles: int,
        seed: int,
    ):
        refuse_small(clips + stills, crop, exact=False)
        self.clips, self.stills = long_enough(clips, WINDOW + 1), stills
        self.low, self.crop = low, crop
        self.pairs, self.singles, self.seed = pairs, singles, seed

    def load(self, iteration: int) -> tuple[Tensor, ...]:
        """The batch of an iteration; its random choices depend on the seed and that alone.

        Returns:
            lr [P, 8, 3, c, c] and hr [P, 2, 3, 4c, 4c] in [0, 1] with the flow [P, 4c, 4c, 2] and
            its mask [P, 1, 4c, 4c]; lr [S, 7, 3, c, c] and hr [S, 1, 3, 4c, 4c] of stills.
        """
        rng = np.random.Generator(np.random.Philox(seed=[self.seed, iteration]))
        moving = [self._sample(self.clips, 2, rng) for _ in range(self.pairs)]
        still = [self._sample(self.stills, 1, rng) for _ in range(self.singles)]
        flow, mask = optical_flow(np.stack([hr for _, hr in moving]))
        return *_tensors(moving), flow, mask, *_tensors(still)

    def _sample(
        self, pool: list[Clip], outputs: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Lr [6 + outputs, c, c, 3] and hr [outputs, 4c, 4c, 3], uint8."""
        clip = pool[rng.integers(len(pool))]
        variants = self.low[clip.path]
        variant = variants[rng.integers(len(variants))]
        count, start = WINDOW - 1 + outputs, 0
        if clip.kind == "clip":
            starts = [n for scene in clip.scenes for n in scene[: max(0, len(scene) - count + 1)]]
            start = starts[rng.integers(len(starts))]
        times = np.arange(start, start + count)
        if rng.random() < 0.5:
            times = times[::-1]
        lr, hr = crop_variant(clip, variant, times, outputs, self.crop, rng)
        for axis in (2, 1):
            if rng.random() < 0.5:
                lr, hr = np.flip(lr, axis), np.flip(hr, axis)
        if rng.random() < 0.5:
            lr, hr = lr.swapaxes(1, 2), hr.swapaxes(1, 2)
        if rng.random() < GRAY:
            lr, hr = _gray(lr), _gray(hr)
        return np.ascontiguousarray(lr), np.ascontiguousarray(hr)


def _gray(rgb: np.ndarray) -> np.ndarray:
    """[..., 3] uint8 with three equal channels."""
    gray = np.rint(rgb @ LUMA).astype(np.uint8)
    return np.broadcast_to(gray[..., None], rgb.shape)


def _tensors(samples: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Tensor, ...]:
    return tuple(
        rearrange(torch.from_numpy(np.stack(x)), "b t h w c -> b t c h w").float() / 255
        for x in zip(*samples, strict=True)
    )


def prepared(
    load: Callable[[int], T], start: int, stop: int, workers: int
) -> Generator[T, None, None]:
    """load(start), ..., load(stop - 1) in order, computed ahead in threads."""
    pool = ThreadPoolExecutor(workers, "batches", torch.set_num_threads, (1,))
    pending = deque()
    try:
        for n in range(start, stop):
            pending.append(pool.submit(load, n))
            if len(pending) == workers + 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def long_enough(clips: list[Clip], frames: int) -> list[Clip]:
    """The clips that have a scene of so many frames.

    Raises:
        DataError: a clip has fewer frames in all, or no clip has such a scene.
    """
    for clip in clips:
        if clip.shape[0] < WINDOW:
            raise DataError(
                f"a training clip must have at least {WINDOW} frames, {clip.name} has "
                f"{clip.shape[0]}; remove it"
            )
    usable = [clip for clip in clips if max(len(scene) for scene in clip.scenes) >= frames]
    if clips and not usable:
        raise DataError(
            f"a training clip must have a scene of at least {frames} frames, none of "
            f"{len(clips)} has; pass others as --data"
        )
    return usable


def refuse_small(clips: list[Clip], crop: int, exact: bool) -> None:
    """DataError if a crop does not fit; a variant may lack the first three pixels."""
    needed = SCALE * crop + (0 if exact else SCALE - 1)
    for clip in clips:
        _, H, W, _ = clip.shape
        if min(H, W) < needed:
            raise DataError(
                f"crops of {crop} need pictures of at least {needed} pixels each way, "
                f"{clip.name} has {W}x{H}; lower --crop or remove it"
            )


def crop_variant(
    clip: Clip,
    variant: LowClip,
    times: np.ndarray,
    outputs: int,
    crop: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """A random crop of a degraded variant, and the same place of the originals.

    Args:
        clip: the original.
        variant: its low-resolution frames.
        times: the frames to take, 6 + outputs.
        outputs: how many windows of seven they are.
        crop: LR pixels.
        rng: source of the place.

    Returns:
        lr [len(times), c, c, 3] and the center frames' hr [outputs, 4c, 4c, 3], uint8.
    """
    frames = variant.frames()
    c, C = crop, SCALE * crop
    y, x = (int(rng.integers(n - c + 1)) for n in frames.shape[1:3])
    lr = np.array(frames[times, y : y + c, x : x + c])
    middle = WINDOW // 2
    centers = times[middle : middle + outputs] * (clip.kind == "clip")
    top, left = variant.top + SCALE * y, variant.left + SCALE * x
    return lr, np.array(clip.frames[centers, top : top + C, left : left + C])


def _choose_span(full: int, scaled: int, crop: int, rng: np.random.Generator) -> Span:
    """Place a crop on one of the four grids of LR pixels, with as much margin as there is."""
    phase = rng.integers(min(SCALE, scaled - SCALE * crop + 1))
    cells = (scaled - phase) // SCALE
    first = rng.integers(cells - crop + 1)
    before = min(MARGIN, first)
    after = min(MARGIN, cells - crop - first)
    start = phase + SCALE * (first - before)
    length = SCALE * (before + crop + after)
    return Span(int(start), int(length), int(before), full, scaled)


def _clip_frames(clip: Clip, rows: Span, cols: Span, rng: np.random.Generator) -> Tensor:
    """Seven frames [7, h, w, 3] of a clip."""
    times = _choose_times(clip.scenes, rng)
    y0, y1 = rows.source(rows.start, rows.start + rows.length)
    x0, x1 = cols.source(cols.start, cols.start + cols.length)
    frames = np.array(clip.frames[times, y0:y1, x0:x1])
    return shrink(torch.from_numpy(frames), rows.length, cols.length)


def _choose_times(scenes: list[range], rng: np.random.Generator) -> np.ndarray:
    """Seven frames of a scene, every second one in a fifth of the samples, in either order."""
    longest = max(len(scene) for scene in scenes)
    stride = 2 if longest >= 2 * WINDOW - 1 and rng.random() < 0.2 else 1
    starts = [n for scene in scenes for n in scene[: max(0, len(scene) - stride * (WINDOW - 1))]]
    times = starts[rng.integers(len(starts))] + stride * np.arange(WINDOW)
    return times[::-1] if rng.random() < 0.5 else times


def _turn(lr: Tensor, hr: Tensor, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """The same random flips and transposition of lr [7, c, c, 3] and hr [4c, 4c, 3]."""
    for axis in (-3, -2):
        if rng.random() < 0.5:
            lr, hr = lr.flip(axis), hr.flip(axis)
    return (lr.transpose(-3, -2), hr.transpose(-3, -2)) if rng.random() < 0.5 else (lr, hr)
