"""Frames in, frames four times larger out: the loop around the network.

Every frame is encoded once, and the features of the last frames are cached. A frame is enlarged
from its window of seven frames as soon as the three after it have been encoded, or the input has
ended. The window is mirrored at the ends of the input and at scene cuts, without repeating the end
frame: nothing is taken from another scene.

On a CPU several small frames are enlarged at the same time, each by its share of the threads: the
operations of one small frame are too short for several cores. A GPU enlarges whole frames in
batches. See `feature_cache.py` for both, and `plan.py` for how the work is divided. When memory
runs out, the work goes on from the first frame that has no result yet, in parts of half the size.
"""

import contextlib
import copy
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mana_triton.attention import STREAM_TOLERANCE, choose_backend
from mana_triton.checkpoint import load
from mana_triton.engine import memory
from mana_triton.engine.device import choose_device, choose_precision
from mana_triton.engine.feature_cache import FeatureCache, Postprocess, Results
from mana_triton.engine.frames import NumberedFrame, Replayable, as_given, numbered_frames
from mana_triton.engine.plan import Plan, first_plan, fit
from mana_triton.engine.prefetch import parallel_map
from mana_triton.engine.scene_cuts import Pixels
from mana_triton.engine.window import window_numbers
from mana_triton.model import MANA, PRECISIONS

SHARE = 0.8  # of this machine's memory that is used where no budget is given


@dataclass(frozen=True)
class EngineOptions:
    """How frames are enlarged.

    Attributes:
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda" or any torch device.
        precision: "fp32", "bf16", "fp16" or "auto": the fastest on a CPU; on a GPU bf16 where it
            is native, else fp16.
        tile: side of the decoder's tiles in pixels of the input, 0 for the whole frame, "auto" to
            bound the memory.
        backend: of the attentions, see `cross_frame_attention`.
        scene_cuts: keep each window inside its scene.
        batch: frames that go through the network at once; "auto": on a GPU up to seven, as memory
            allows, and one on a CPU, which gains nothing. As many frames are read ahead.
        workers: threads that enlarge one frame each; "auto": on a CPU as many as the memory of one
            large frame allows, up to the number of PyTorch's threads, and one on a GPU. As many
            frames are read ahead.
        memory_budget: bytes that the process (on a GPU: its GPU memory) may hold at its peak, which
            decides about what is "auto" above; None: four fifths of what the machine has.

    Raises:
        ValueError: a value is out of range.
    """

    device: str | torch.device = "auto"
    precision: str = "auto"
    tile: int | str = "auto"
    backend: str = "auto"
    scene_cuts: bool = True
    batch: int | str = "auto"
    workers: int | str = "auto"
    memory_budget: int | None = None

    def __post_init__(self):
        if self.precision not in ("auto", *PRECISIONS):
            allowed = ", ".join(PRECISIONS)
            raise ValueError(f"precision must be auto, {allowed}, got {self.precision!r}")
        for name, least in (("tile", 0), ("batch", 1), ("workers", 1)):
            value = getattr(self, name)
            if value != "auto" and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{name} must be 'auto' or an integer >= {least}, got {value!r}")
        budget = self.memory_budget
        if budget is not None and not (isinstance(budget, int) and budget > 0):
            raise ValueError(f"memory_budget must be None or bytes > 0, got {budget!r}")


class Enlarged(NamedTuple):
    """A result of `Upscaler.stream`."""

    source: Any
    picture: Any  # [4H, 4W, 3] in the type given, [3, 4H, 4W] of tensors, or `postprocess`'s


class _Window(NamedTuple):
    """What to enlarge: a frame, and the numbers of the T frames around it."""

    center: NumberedFrame
    numbers: list[int]


class Upscaler:
    """Enlarges streams of frames four times with one model.

    Args:
        model: a MANA, or what `mana_triton.load` takes.
        options: see EngineOptions.

    Attributes:
        model: the model on its device, in its precision.
        device, precision, backend: what the options came to.
        description: these in words, with the reasons.

    Raises:
        ValueError: the device or backend is not available.
        CheckpointError: from `load`.
    """

    def __init__(
        self,
        model: MANA | str | Path = "tiny",
        options: EngineOptions = EngineOptions(),
    ):
        self.options = options
        self.device = choose_device(options.device)
        self.precision, why = choose_precision(options.precision, self.device)
        self.backend, reason = choose_backend(options.backend, self.device)
        if options.workers not in ("auto", 1) and not self._can_share():
            raise ValueError(
                f"several workers need a CPU and PyTorch's attention, got {options.workers} with "
                f"{self.device.type} and backend {self.backend}; use workers 1"
            )
        self.model = copy.deepcopy(model) if isinstance(model, MANA) else load(model)
        self.model.eval().to(self.device, PRECISIONS[self.precision])
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.description = (
            f"{self.device.type}, {self.precision} ({why}), attention by {self.backend} ({reason})"
        )
        self._plans: dict[tuple[int, int], Plan] = {}

    @property
    def window_radius(self) -> int:
        """Number of frames on each side that a frame is enlarged with."""
        return self.model.config.frames // 2

    def plan(self, height: int, width: int) -> Plan:
        """How the work on frames of this size is divided; made once.

        Raises:
            ValueError: it does not fit the memory.
        """
        if (height, width) not in self._plans:
            options, config = self.options, self.model.config
            itemsize = PRECISIONS[self.precision].itemsize
            total = options.memory_budget or int(SHARE * (memory.total_bytes(self.device) or 0))
            room = total - memory.held_bytes(self.device) if total else sys.maxsize
            asked = {name: getattr(options, name) for name in ("tile", "batch", "workers")}
            asked = {name: value for name, value in asked.items() if value != "auto"}
            batched = self.device.type == "cuda" and self.backend == "triton"
            plan = first_plan(
                config, itemsize, height, width,
                threads=torch.get_num_threads() if self._can_share() else 1,
                batched=batched and not asked.get("tile"),
            )  # fmt: skip
            self._plans[height, width] = fit(plan, asked, room, config, itemsize, height, width)
        return self._plans[height, width]

    def _can_share(self) -> bool:
        """Whether several threads can enlarge frames at the same time."""
        return self.device.type == "cpu" and self.backend != "triton"

    def stream(
        self,
        sources: Iterable[Any],
        *,
        pixels: Callable[[Any], Pixels] = lambda source: source,
        is_cut: Callable[[Any], bool] | None = None,
        start: int = 0,
        skip: int = 0,
        postprocess: Postprocess | None = None,
    ) -> Generator[Enlarged, None, None]:
        """Enlarge frames one after the other; memory does not grow with their number.

        To continue a stream that was interrupted before frame n, give the frames from
        n - `window_radius` on, `start` as the number of the first of them, how many of them come
        before n as `skip`, and the same cuts: the results are bit for bit those of one stream.

        Args:
            sources: what the frames come from, read as late as possible.
            pixels: the frame of a source: an array [H, W, 3] uint8 or uint16 (0 .. 65535) or a
                tensor [3, H, W] in [0, 1], all of one size and type.
            is_cut: whether the frame of a source starts a new scene, asked once for each in
                order; None: what CutDetector says, or never without `scene_cuts`.
            start: number of the first source.
            skip: number of first sources that are context only: not enlarged, not yielded.
            postprocess: what to make of each enlarged frame [4H, 4W, 3] on the device.

        Yields:
            For each source its frame enlarged, in the type it was given, or the arrays that
            `postprocess` made of it.

        Raises:
            ValueError: a frame of another kind, size or type; frames that do not fit the memory.
        """
        if is_cut is None and not self.options.scene_cuts:
            is_cut = _never
        done = start + skip  # frames before this number need no result
        numbered = numbered_frames(sources, pixels, is_cut, start)
        given = Replayable(x for x in numbered if x.number >= done - self.window_radius)
        while True:
            frames = iter(given)
            if (head := next(frames, None)) is None:
                return
            height, width = head.pixels.shape[:2]
            try:
                with contextlib.closing(
                    self._enlarged(chain([head], frames), head.pixels, done, postprocess)
                ) as results:
                    for frame, picture in results:
                        done = frame.number + 1
                        given.drop_before(done - self.window_radius)
                        yield Enlarged(frame.source, picture)
                return
            except (MemoryError, RuntimeError) as error:
                smaller = self.plan(height, width).halved(height, width)
                if given.failed or smaller is None or not memory.out_of_memory(error):
                    raise
                smaller = replace(smaller, why="halved, as the memory ran out")
                self._plans[height, width] = smaller
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _enlarged(
        self,
        frames: Iterator[NumberedFrame],
        like: Tensor,
        done: int,
        postprocess: Postprocess | None,
    ) -> Generator[tuple[NumberedFrame, Any], None, None]:
        """Frames from the number `done` on, and their results, by the present plan."""
        height, width = like.shape[:2]
        plan = self.plan(height, width)
        cache = FeatureCache(
            self.model, height, width, like.dtype, plan, self.backend, STREAM_TOLERANCE, postprocess
        )

        def enlarge(launch: list[_Window]) -> tuple[list[_Window], Results]:
            return launch, cache.enlarge([window.numbers for window in launch])

        # on a GPU the next batch is launched before waiting for the results of one
        ahead = 1 if self.device.type == "cuda" else 0
        pending: deque[tuple[list[_Window], Results]] = deque()
        launches = self._launches(frames, cache, done)
        with contextlib.closing(parallel_map(enlarge, launches, plan.workers)) as launched:
            for launch in launched:
                pending.append(launch)
                if len(pending) > ahead:
                    yield from _pictures(*pending.popleft())
        while pending:
            yield from _pictures(*pending.popleft())

    def _launches(
        self, frames: Iterator[NumberedFrame], cache: FeatureCache, done: int
    ) -> Iterator[list[_Window]]:
        """Encode frames, and yield the windows that are complete, as many as are enlarged at once.

        The features of a window stay in the cache until `plan.workers` more windows were taken.
        """
        waiting: deque[NumberedFrame] = deque()
        while chunk := list(islice(frames, cache.plan.batch)):
            cache.encode([frame.pixels for frame in chunk], chunk[0].number)
            waiting.extend(chunk)
            yield from self._windows(waiting, len(waiting) - self.window_radius, cache, done)
        while waiting:
            yield from self._windows(waiting, cache.plan.batch, cache, done)

    def _windows(
        self, waiting: deque[NumberedFrame], count: int, cache: FeatureCache, done: int
    ) -> Iterator[list[_Window]]:
        """The windows of the first `count` frames that wait, which are taken out."""
        last = {frame.scene: frame.number for frame in waiting}
        length = self.model.config.frames
        ready = [waiting.popleft() for _ in range(min(count, len(waiting)))]
        windows = [
            _Window(x, window_numbers(x.number, x.scene, last[x.scene], length))
            for x in ready
            if x.number >= done
        ]
        step = cache.plan.batch if cache.batched else 1
        for i in range(0, len(windows), step):
            yield windows[i : i + step]


def upscale(
    frames: Iterable[Pixels], model: MANA | str | Path = "tiny", **options: Any
) -> Iterator[Pixels]:
    """Enlarge the frames of a video four times.

    Args:
        frames: an array [T, H, W, 3] uint8 or uint16 (0 .. 65535), a tensor [T, 3, H, W] in
            [0, 1], or any iterable of such frames, which is read as the results are consumed.
        model: shipped weights ("tiny"), a weights file, or a MANA.
        options: the fields of EngineOptions.

    Returns:
        An iterator of the enlarged frames, [4H, 4W, 3] in that type or [3, 4H, 4W] in [0, 1].

    Raises:
        ValueError, CheckpointError: see `Upscaler`.
    """
    upscaler = Upscaler(model, EngineOptions(**options))
    return (result.picture for result in upscaler.stream(frames))


def _pictures(launch: list[_Window], results: Results) -> Iterator[tuple[NumberedFrame, Any]]:
    """Results as `stream` yields them."""
    for (frame, _), picture in zip(launch, results.wait(), strict=True):
        if isinstance(picture, Tensor):
            yield frame, as_given(picture, frame.given)
        else:
            yield frame, [part.numpy() for part in picture]


def _never(source: Any) -> bool:
    return False
