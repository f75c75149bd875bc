"""Frames in, enlarged frames out: window, scene cuts, cached features, tiles, threads.

A stream encodes every frame once and keeps the features of seven frames. Frame c is enlarged when
frame c + 3 has arrived (or the stream has ended). The window is mirrored at the ends of the
stream and at scene cuts, without repeating the end frame: nothing is taken from another scene.

The decoder works in tiles, which carry its receptive field as a halo. Features are those of whole
frames, as long as there is memory for them; otherwise bands of rows are made from neighborhoods
that are encoded anew, as far as the attention's certificate and all receptive fields reach, with
the whole frame's normalization. Neither changes anything but rounding and what the certificate's
tolerance leaves. When memory runs out all the same, half of the largest part is tried.

On a CPU small frames are enlarged side by side, each by its share of the threads: the operations
of one small frame are too short for several cores. A GPU takes whole frames in batches, see
`batches.py`; when its memory runs out the stream goes back to the frames whose results are still
to come, with smaller batches and at last with one frame after the other.
"""

import contextlib
import copy
import math
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mana_triton.attention import STREAM_TOLERANCE, choose_backend
from mana_triton.checkpoint import load
from mana_triton.engine import plan as planner
from mana_triton.engine.feature_cache import Batches, Finish, Results
from mana_triton.engine.plan import Plan
from mana_triton.kernels.reference import inv_2sigma2
from mana_triton.kernels.strips import certified_radius, log_gaussian_outside
from mana_triton.model import MANA, Features
from mana_triton.resize import MAX_VALUE, SCALE

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Picture = np.ndarray | Tensor
P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


def _plain(function: Callable[P, R]) -> Callable[P, R]:
    """Without gradients, and out of the inference mode that a caller may be in."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class _Given(NamedTuple):
    """One frame as it came."""

    number: int
    frame: Picture
    pixels: Tensor  # [H, W, 3], a copy
    cut: bool  # whether it begins a scene


@dataclass
class _Encoded:
    """One frame of a stream."""

    frame: Picture
    lr: Tensor  # [1, 3, H, W] in [0, 1]
    number: int
    scene: int  # number of the scene's first frame
    f: Tensor | None = None  # [1, C, H, W] encoder features while it waits to be enlarged
    norm: tuple[Tensor, Tensor] | None = None  # `MANA.normalization` [1, C], if known
    longest: float | None = None  # length of its longest key, if it was measured for bands


@dataclass
class _Window:
    """What it takes to enlarge one frame."""

    center: _Encoded
    order: list[int]  # which of the S frames stands at each of the T places
    frames: list[_Encoded]  # the S different ones
    f: Tensor | None = None  # [1, C, H, W] features of the center, z from the top on; None: anew
    q: Tensor | None = None  # [1, H, W, D]
    k: Tensor | None = None  # [1, S, H, W, D]
    v: Tensor | None = None  # [1, S, H, W, D]
    fused: int = 0  # rows of f that are z


class _Keys:
    """Keys and values of the last frames: frame n lies in place n modulo their number."""

    def __init__(self, frames: int):
        self.frames = frames
        self.k = self.v = torch.empty(0)

    @_plain
    def put(self, number: int, features: Features) -> None:
        if not self.k.numel():
            # places that no frame has taken yet are never looked at
            shape = (1, self.frames, *features.k.shape[1:])
            self.k, self.v = features.k.new_empty(shape), features.v.new_empty(shape)
        self.k[:, number % self.frames] = features.k
        self.v[:, number % self.frames] = features.v

    def window(self, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """K and v [1, S, H, W, D] of frames in the order of their places."""
        places = [number % self.frames for number in numbers]
        return (
            (self.k, self.v)
            if len(places) == self.frames
            else (self.k[:, places], self.v[:, places])
        )

    def forget(self) -> None:
        self.k = self.v = torch.empty(0)


class Upscaler:
    """Enlarges streams of frames four times with one model.

    Args:
        model: a MANA, or what `mana_triton.load` takes.
        device: "auto" (a CUDA GPU if there is one), "cpu", "cuda" or any torch device.
        precision: "fp32", "bf16", "fp16" or "auto": fp32 on a CPU; on a GPU bf16 where it is
            native, else fp16.
        tile: side of the decoder's tiles in pixels of the input, 0 for the whole frame, "auto"
            to bound the memory.
        backend: of the attentions, see `cross_frame_attention`.
        scene_cuts: keep the window inside a scene.
        batch: whole frames that go through the network at once; 0: frame after frame, or
            `workers`; "auto": on a GPU up to seven, as memory allows, 0 on a CPU, which gains
            nothing. Several read as many frames further ahead.
        workers: frames that are enlarged side by side; "auto" takes as many as the memory of
            one large frame holds, up to the threads of PyTorch on a CPU, and one on a GPU. Several
            read as many frames further ahead.
        memory_budget: bytes that the process may hold at its peak (on a GPU: of its memory), which
            decides about tile and workers where these are "auto"; None: four fifths of what the
            computer has.

    Raises:
        ValueError: a value out of range, or a device or backend that is not there; from `stream`:
            frames that do not fit the memory budget.
        CheckpointError: from `load`.
    """

    def __init__(
        self,
        model: MANA | str | Path = "tiny",
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        tile: int | str = "auto",
        backend: str = "auto",
        scene_cuts: bool = True,
        batch: int | str = "auto",
        workers: int | str = "auto",
        memory_budget: int | None = None,
    ):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise ValueError(f"device must be auto, cpu or cuda, got {device!r}") from error
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda needs a CUDA GPU, there is none; use device cpu")
        self.precision, why = _choose_precision(precision, self.device)
        if tile != "auto" and not (isinstance(tile, int) and tile >= 0):
            raise ValueError(f"tile must be 'auto' or a number of pixels >= 0, got {tile!r}")
        if batch != "auto" and not (isinstance(batch, int) and batch >= 0):
            raise ValueError(f"batch must be 'auto' or a number of frames >= 0, got {batch!r}")
        if workers != "auto" and not (isinstance(workers, int) and workers >= 1):
            raise ValueError(f"workers must be 'auto' or a number >= 1, got {workers!r}")
        if memory_budget is not None and not (isinstance(memory_budget, int) and memory_budget > 0):
            raise ValueError(
                f"memory_budget must be None or a number of bytes > 0, got {memory_budget!r}"
            )
        if batch not in ("auto", 0) and (tile not in ("auto", 0) or workers not in ("auto", 1)):
            raise ValueError(
                f"a batch is of whole frames and has one worker, got {batch=}, {tile=} and "
                f"{workers=}; leave out tile and workers, or take batch 0"
            )
        self.memory_budget = memory_budget
        self.plans: dict[tuple[int, int], Plan] = {}  # by height and width
        self.radius = planner.RADIUS  # of bands' neighborhoods: what the last one needed
        self.backend, reason = choose_backend(backend, self.device)
        if batch not in ("auto", 0) and (self.device.type, self.backend) == ("cuda", "tiled"):
            raise ValueError("batches on a GPU need backend triton, got tiled; take batch 0")
        self.tile, self.scene_cuts = tile, scene_cuts
        self.batch, self.workers = batch, workers
        self.model = copy.deepcopy(model) if isinstance(model, MANA) else load(model)
        self.model.eval().to(self.device, DTYPES[self.precision])
        self.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.model.backend, self.model.tolerance = self.backend, STREAM_TOLERANCE
        self.description = (
            f"{self.device.type}, {self.precision} ({why}), attention by {self.backend} ({reason})"
        )

    def stream(
        self,
        frames: Iterable[Picture],
        *,
        first: int = 0,
        is_cut: Callable[[Picture], bool] | None = None,
        finish: Finish | None = None,
    ) -> Iterator[Any]:
        """Enlarge frames one after the other; memory does not grow with their number.

        Args:
            frames: arrays [H, W, 3] uint8 or uint16 (0 .. 65535) or tensors [3, H, W] in [0, 1],
                all of one size.
            first: number of the first frame, where an interrupted stream is continued: given the
                frames from `reach` before on, and the same cuts, the results are the same, bit by
                bit, from the frame after those on.
            is_cut: whether a frame begins a new scene, asked once for each in order; None: a
                CutDetector's opinion, or never if there are to be no scene cuts.
            finish: what to make of each enlarged picture [4H, 4W, 3] while it is on the device.

        Yields:
            For each frame, in order, its enlargement in the type it was given, or the tensors that
            `finish` made of it, as arrays.

        Raises:
            ValueError: a frame of another kind or size.
        """
        given = self._given(frames, first, is_cut or self._cuts())
        if (head := next(given, None)) is None:
            return
        given = chain([head], given)
        if self.plan_for(*head.pixels.shape[:2]).batch:
            yield from self._in_batches(given, first, finish)
        else:
            yield from self._one_by_one(given, finish)

    def _given(
        self, frames: Iterable[Picture], first: int, is_cut: Callable[[Picture], bool]
    ) -> Iterator[_Given]:
        like = None
        for number, frame in enumerate(frames, first):
            pixels = _pixels(frame)
            like = pixels if like is None else like
            if pixels.shape != like.shape:
                raise ValueError(
                    f"all frames must have one size, {like.shape[1]}x{like.shape[0]} as the first, "
                    f"got {pixels.shape[1]}x{pixels.shape[0]} at frame {number}"
                )
            if pixels.dtype != like.dtype:
                raise ValueError(
                    f"all frames must have one type, {like.dtype} as the first, "
                    f"got {pixels.dtype} at frame {number}"
                )
            yield _Given(number, frame, pixels, is_cut(frame))

    def _one_by_one(self, given: Iterator[_Given], finish: Finish | None) -> Iterator[Any]:
        """Enlarge frame by frame, or by several workers."""
        if (head := next(given, None)) is None:
            return
        workers = self.plan_for(*head.pixels.shape[:2]).workers
        windows = self._windows(chain([head], given), shared=workers > 1)

        def enlarge(window: _Window) -> Any:
            return _as_given(self._enlarge(window), window.center.frame, finish)

        if workers > 1:
            yield from side_by_side(enlarge, windows, workers)
        else:
            yield from map(enlarge, windows)

    def _in_batches(
        self, given: Iterator[_Given], first: int, finish: Finish | None
    ) -> Iterator[Any]:
        """Enlarge batch by batch; when memory runs out, again from the first result to come."""
        recent: deque[_Given] = deque()  # what its window needs, and what was read since
        failed = False  # to read

        def remembered() -> Iterator[_Given]:
            nonlocal failed
            failed = True
            for item in given:
                failed = False
                recent.append(item)
                yield item
                failed = True
            failed = False

        number = begin = first
        while True:
            source = chain(list(recent), remembered())
            begin = recent[0].number if recent else begin
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            results = self._batches(source, finish)
            try:
                for result in islice(results, number - begin, None):
                    while recent[0].number < number + 1 - self.reach:
                        recent.popleft()
                    number += 1
                    yield result
                return
            except (MemoryError, RuntimeError) as error:
                if failed:
                    raise
                self._halve(recent[0].pixels.shape[:2], error)

    def _batches(self, given: Iterator[_Given], finish: Finish | None) -> Iterator[Any]:
        """Enlarge by what is planned now."""
        if (head := next(given, None)) is None:
            return
        given = chain([head], given)
        height, width = head.pixels.shape[:2]
        batch = self.plan_for(height, width).batch
        if not batch:
            yield from self._one_by_one(given, finish)
            return
        kind = head.pixels.dtype
        batches = _plain(lambda: Batches(self.model, height, width, kind, batch, finish))()
        encode, enlarge = _plain(batches.encode), _plain(batches.enlarge)
        waiting: deque[tuple[_Given, int]] = deque()
        pending: deque[tuple[list[_Given], Results]] = deque()
        scene = head.number
        while chunk := list(islice(given, batch)):
            encode([item.pixels for item in chunk], [item.number for item in chunk])
            for item in chunk:
                scene = item.number if item.cut else scene
                waiting.append((item, scene))
            if len(waiting) > self.reach:
                ready = len(waiting) - self.reach
                pending.append(self._launched(enlarge, waiting, ready))
            if len(pending) > 1:  # while the GPU works on the next
                yield from _pictures(*pending.popleft())
        while waiting:
            pending.append(self._launched(enlarge, waiting, min(len(waiting), batch)))
        while pending:
            yield from _pictures(*pending.popleft())

    def _launched(
        self,
        enlarge: Callable[[list[list[int]]], Results],
        waiting: deque[tuple[_Given, int]],
        count: int,
    ) -> tuple[list[_Given], Results]:
        """The first `count` of the frames that wait, which leave them, and their results."""
        last = {scene: item.number for item, scene in waiting}
        ready = [waiting.popleft() for _ in range(count)]
        length = self.model.config.frames
        windows = [window_numbers(item.number, scene, last[scene], length) for item, scene in ready]
        return [item for item, _ in ready], enlarge(windows)

    @property
    def reach(self) -> int:
        """How many frames before and after it a frame is enlarged with."""
        return self.model.config.frames // 2

    def plan_for(self, height: int, width: int) -> Plan:
        """How the work on frames of this size is divided.

        Raises:
            ValueError: it does not fit the memory budget.
        """
        if (height, width) not in self.plans:
            asked = self.memory_budget is not None
            total = self.memory_budget if asked else planner.size(self.device)
            share = 1 if asked else planner.SHARE
            room = int(share * total) - planner.held(self.device) if total else sys.maxsize
            single = self.device.type != "cpu" and self.workers == "auto"
            self.plans[height, width] = planner.choose(
                self.model.config,
                DTYPES[self.precision].itemsize,
                height,
                width,
                room=room,
                asked=asked,
                workers=1 if single else None if self.workers == "auto" else int(self.workers),
                tile=None if self.tile == "auto" else int(self.tile),
                threads=torch.get_num_threads(),
                batch=self._most_at_once(height, width),
            )
        return self.plans[height, width]

    def _most_at_once(self, height: int, width: int) -> int:
        """Frames of a batch, at most; 0 for none."""
        if self.batch != "auto":
            return int(self.batch)
        # the other backends wait for the GPU in between, and so cannot be a graph
        is_graph = self.device.type == "cuda" and self.backend == "triton"
        if not is_graph or self.tile not in ("auto", 0) or self.workers != "auto":
            return 0
        config, itemsize = self.model.config, DTYPES[self.precision].itemsize
        fill = planner.BATCH_BYTES // planner.activations(config, itemsize, height, width)
        return max(min(fill, config.frames), 1)

    def _halve(self, size: Sequence[int], error: BaseException) -> None:
        """Plan for less memory from here on; raises the error if it is another or nothing is left.

        size: height and width of the frames.
        """
        height, width = size
        if not planner.out_of_memory(error):
            raise error
        less = self.plan_for(height, width).halved(height, width)
        if less is None or (less.rows and not planner.is_local(self.model.config)):
            raise error
        self.plans[height, width] = less
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _cuts(self) -> Callable[[Picture], bool]:
        return CutDetector().is_cut if self.scene_cuts else lambda _: False

    def _windows(self, given: Iterator[_Given], shared: bool) -> Iterator[_Window]:
        """One window for each frame; `shared` ones outlive the next."""
        keys = _Keys(self.model.config.frames)
        recent: deque[_Encoded] = deque(maxlen=self.model.config.frames)
        waiting: deque[_Encoded] = deque()
        for encoded, features in self._encode(given):
            if features is None:
                keys.forget()
                for frame in recent:
                    frame.f = None
            else:
                keys.put(encoded.number, features)
                encoded.f, encoded.norm = features.f, (features.scale, features.shift)
            recent.append(encoded)
            waiting.append(encoded)
            del features  # the copy in keys is enough
            if len(waiting) > self.reach:
                yield self._window(waiting, recent, keys, shared)
        while waiting:
            yield self._window(waiting, recent, keys, shared)

    @_plain
    def _window(
        self, waiting: deque[_Encoded], recent: deque[_Encoded], keys: _Keys, shared: bool
    ) -> _Window:
        """The window of the first of the frames that wait, which leaves them."""
        end = max(e.number for e in waiting if e.scene == waiting[0].scene)
        center = waiting.popleft()
        numbers = window_numbers(center.number, center.scene, end, self.model.config.frames)
        different = sorted(set(numbers), key=lambda number: number % self.model.config.frames)
        frames = [next(e for e in recent if e.number == number) for number in different]
        window = _Window(center, [different.index(number) for number in numbers], frames)
        if keys.k.numel():
            window.f, center.f = center.f, None
            k, v = keys.window(different)
            window.k, window.v = (k.clone(), v.clone()) if shared else (k, v)
        return window

    def _encode(self, given: Iterator[_Given]) -> Iterator[tuple[_Encoded, Features | None]]:
        scene = None
        for number, frame, pixels, cut in given:
            scene = number if cut or scene is None else scene
            lr = _in_unit(pixels).to(self.device)[None]
            yield _Encoded(frame, lr, number, scene), self._features(lr)

    @_plain
    def _features(self, lr: Tensor) -> Features | None:
        """Features of a frame [1, 3, H, W]; None if frames are to be encoded by bands."""
        while not self.plan_for(*lr.shape[2:]).rows:
            try:
                return self.model.encode(self._input(lr))
            except (MemoryError, RuntimeError) as error:
                self._halve(lr.shape[2:], error)
        return None

    def _input(self, lr: Tensor) -> Tensor:
        return lr.to(DTYPES[self.precision]).contiguous(memory_format=torch.channels_last)

    @_plain
    def _enlarge(self, window: _Window) -> Tensor:
        """The center frame of a window [4H, 4W, 3], in smaller parts each time memory runs out."""
        lr = window.center.lr
        out = self._canvas(window.center)
        while True:
            plan = self.plan_for(*lr.shape[2:])
            if plan.rows:
                window.f = window.k = window.v = window.q = None
            try:
                if window.f is None:
                    self._enlarge_anew(out, window, plan)
                else:
                    z = self._fuse(window, plan.band)
                    self._decode(out, z, lr, slice(0, lr.shape[2]), plan.tile)
                break
            except (MemoryError, RuntimeError) as error:
                self._halve(lr.shape[2:], error)
        return out

    def _fuse(self, window: _Window, band: int) -> Tensor:
        """The decoder's z of a whole frame: takes the place of the center's features by bands."""
        z, k, v, norm = window.f, window.k, window.v, window.center.norm
        assert z is not None and k is not None and v is not None and norm is not None
        if window.q is None:
            window.q = self.model.queries(z, *norm)
        while window.fused < z.shape[2]:
            rows = slice(window.fused, window.fused + band)
            z[:, :, rows] = self.model.fuse(
                z[:, :, rows], window.q[:, rows], k, v, first_row=rows.start, order=window.order
            )
            window.fused = min(rows.stop, z.shape[2])
        return z

    def _enlarge_anew(self, out: Tensor, window: _Window, plan: Plan) -> None:
        """Enlarge by bands of rows from neighborhoods that are encoded for them."""
        lr = window.center.lr
        height, halo = lr.shape[2], self.model.receptive_field
        for frame in window.frames:
            if frame.longest is None:
                self._measure(frame, plan.rows)
        for y0, y1 in _spans(height, plan.rows):
            top, bottom = max(y0 - halo, 0), min(y1 + halo, height)
            z = self._fuse_anew(window, top, bottom, plan.band)
            part = out[SCALE * top : SCALE * bottom]
            self._decode(part, z, lr[:, :, top:bottom], slice(y0 - top, y1 - top), plan.tile)

    def _fuse_anew(self, window: _Window, top: int, bottom: int, band: int) -> Tensor:
        """The decoder's z [1, C, bottom - top, W] of the rows top .. bottom."""
        model, height = self.model, window.center.lr.shape[2]
        cosine = model.config.match == "cosine"
        longest = torch.tensor([[frame.longest for frame in window.frames]])
        f = self._rows(window.center, top, bottom)
        q = model.queries(f, *_norm_of(window.center))
        reach = self.radius
        while True:
            first, last = max(top - reach, 0), min(bottom + reach, height)
            parts = [
                model.keys_values(self._rows(frame, first, last), *_norm_of(frame))
                for frame in window.frames
            ]
            k, v = (torch.stack(x, 1) for x in zip(*parts, strict=True))
            del parts
            radius = _radius_of_rows(
                F.normalize(q, dim=-1) if cosine else q,
                k[:, :, top - first : bottom - first],
                longest.to(k.device),
                model.sigma,
                torch.as_tensor(model.scale, device=k.device),
                STREAM_TOLERANCE,
            )
            if radius <= reach or (first == 0 and last == height):
                break
            self.radius = reach = radius
        for start in range(0, bottom - top, band):
            rows = slice(start, start + band)
            f[:, :, rows] = model.fuse(
                f[:, :, rows], q[:, rows], k, v,
                first_row=top - first + start, order=window.order,
            )  # fmt: skip
        return f

    def _rows(self, frame: _Encoded, first: int, last: int) -> Tensor:
        """Encoder features [1, C, last - first, W] of some rows of a frame."""
        start = max(first - self.model.encoder_reach, 0)
        x = self._input(frame.lr[:, :, start : last + self.model.encoder_reach])
        return self.model.extract(x)[:, :, first - start : last - start]

    def _measure(self, frame: _Encoded, rows: int) -> None:
        """Find the normalization of a whole frame, and its longest key, band by band."""
        height, groups = frame.lr.shape[2], self.model.norm.num_groups
        sums = torch.zeros(2, groups, dtype=torch.float64, device=self.device)
        for first, last in _spans(height, rows):
            f = rearrange(self._rows(frame, first, last), "1 (g c) h w -> g (c h w)", g=groups)
            sums += torch.stack([f.sum(1, dtype=torch.float64), (f.double().square()).sum(1)])
        number = frame.lr[0, 0].numel() * self.model.norm.num_channels / groups
        mean = sums[:1] / number
        scale, shift = self.model.affine(mean, sums[1:] / number - mean.square())
        found = scale.float(), shift.float()
        longest = 0.0
        for first, last in _spans(height, rows):
            k, _ = self.model.keys_values(self._rows(frame, first, last), *found)
            length = torch.linalg.vector_norm(k, dim=-1, dtype=torch.float32).amax().item()
            longest = max(longest, length)
        frame.norm = found
        frame.longest = longest  # last: another worker takes it for the sign that all is there

    def _canvas(self, center: _Encoded) -> Tensor:
        """Room for an enlarged frame [4H, 4W, 3], of integers as given or in [0, 1]."""
        height, width = center.lr.shape[2:]
        like = center.frame
        white = None if isinstance(like, Tensor) else np.iinfo(like.dtype).max
        kind = next(kind for kind, value in MAX_VALUE.items() if value == (white or 1))
        return torch.empty(SCALE * height, SCALE * width, 3, dtype=kind)

    def _decode(self, out: Tensor, z: Tensor, lr: Tensor, wanted: slice, tile: int) -> None:
        """Decode some rows of z [1, C, h, W] and lr [1, 3, h, W], tile by tile, into out."""
        width, white = z.shape[3], MAX_VALUE[out.dtype]
        halo = self.model.receptive_field
        for first, last in _spans(wanted.stop - wanted.start, tile):
            y0, y1 = wanted.start + first, wanted.start + last
            for x0, x1 in _spans(width, tile):
                top, left = max(y0 - halo, 0), max(x0 - halo, 0)
                region = (..., slice(top, y1 + halo), slice(left, x1 + halo))
                part = self.model.decode(z[region]).float() + self.model.skip(lr[region])
                rows = slice(SCALE * (y0 - top), SCALE * (y1 - top))
                part = part[0, :, rows, SCALE * (x0 - left) : SCALE * (x1 - left)]
                part = rearrange(part, "c h w -> h w c").clamp_(0, 1)
                if white > 1:
                    part = part.mul_(white).round_()
                out[SCALE * y0 : SCALE * y1, SCALE * x0 : SCALE * x1] = part


def upscale(
    frames: Iterable[Picture], model: MANA | str | Path = "tiny", **options
) -> Iterator[Picture]:
    """Enlarge the frames of a video four times.

    Args:
        frames: an array [T, H, W, 3] uint8 or uint16 (0 .. 65535), a tensor [T, 3, H, W] in
            [0, 1], or any iterable of such frames, which is read as the result is consumed.
        model: shipped weights ("tiny"), a weights file, or a MANA.
        options: device, precision, tile, backend, scene_cuts, batch, workers, memory_budget: see
            `Upscaler`.

    Returns:
        An iterator of the enlarged frames, [4H, 4W, 3] in that type or [3, 4H, 4W] in [0, 1].

    Raises:
        ValueError, CheckpointError: see `Upscaler`.
    """
    return Upscaler(model, **options).stream(frames)


def mirror(index: int, first: int, last: int) -> int:
    """The frame that stands for `index` in first .. last: mirrored, ends not repeated."""
    period = max(2 * (last - first), 1)
    offset = (index - first) % period
    return first + min(offset, period - offset) if last > first else first


def window_numbers(center: int, first: int, last: int, length: int) -> list[int]:
    """The frames at the `length` places of a window, in a scene from first to last."""
    start = center - length // 2
    return [mirror(i, first, last) for i in range(start, start + length)]


def _spans(length: int, tile: int) -> Iterator[tuple[int, int]]:
    """Equal parts of 0 .. length, none longer than tile (0: one part)."""
    parts = math.ceil(length / tile) if tile else 1
    for i in range(parts):
        yield length * i // parts, length * (i + 1) // parts


def _norm_of(frame: _Encoded) -> tuple[Tensor, Tensor]:
    """The normalization of a whole frame whose rows are encoded anew."""
    assert frame.norm is not None
    return frame.norm


def _pixels(frame: Picture) -> Tensor:
    """A copy [H, W, 3] uint8, uint16 or float32 in [0, 1]."""
    if isinstance(frame, Tensor):
        fits = frame.ndim == 3 and frame.shape[0] == 3 and frame.numel()
        if not (fits and frame.is_floating_point()):
            raise ValueError(
                "a tensor frame must be [3, H, W] in [0, 1], "
                f"got {list(frame.shape)} of {frame.dtype}"
            )
        return rearrange(frame.detach().to(torch.float32, copy=True), "c h w -> h w c")
    if not (isinstance(frame, np.ndarray) and frame.dtype in (np.uint8, np.uint16)):
        kind = frame.dtype if isinstance(frame, np.ndarray) else type(frame).__name__
        raise ValueError(f"a frame must be a uint8 or uint16 array or a float tensor, got {kind}")
    if not (frame.ndim == 3 and frame.shape[2] == 3 and frame.size):
        raise ValueError(f"an array frame must be [H, W, 3], got {list(frame.shape)}")
    return torch.from_numpy(frame.copy())


def _in_unit(pixels: Tensor) -> Tensor:
    """[H, W, 3] -> [3, H, W] float32 in [0, 1]."""
    return rearrange(pixels, "h w c -> c h w").float().div(MAX_VALUE[pixels.dtype])


def _pictures(frames: list[_Given], results: Results) -> Iterator[Any]:
    """Results as `stream` yields them."""
    for item, large in zip(frames, results.wait(), strict=True):
        if isinstance(large, Tensor):
            yield _as_given(large, item.frame, None)
        else:
            yield [part.numpy() for part in large]


@_plain
def _as_given(large: Tensor, frame: Picture, finish: Finish | None) -> Any:
    """An enlarged picture [4H, 4W, 3] as `stream` yields it for this frame."""
    if finish:
        return [part.numpy() for part in finish(large)]
    if isinstance(frame, Tensor):
        return rearrange(large, "h w c -> c h w").to(frame).contiguous()
    return large.numpy()


def _choose_precision(precision: str, device: torch.device) -> tuple[str, str]:
    if precision not in ("auto", *DTYPES):
        raise ValueError(f"precision must be auto, {', '.join(DTYPES)}, got {precision!r}")
    if precision != "auto":
        return precision, "as asked"
    if device.type != "cuda":
        return fastest_on_a_processor() if device.type == "cpu" else ("fp32", "safe on any device")
    native = torch.cuda.get_device_capability(device)[0] >= 8
    return ("bf16", "native on this GPU") if native else ("fp16", "this GPU has no bf16")


def fastest_on_a_processor() -> tuple[str, str]:
    """The precision of convolutions that take least time, and why.

    Instructions for bfloat16 alone do not tell: against float32 the convolutions of `paper` took
    half the time on an AMD EPYC with AVX512-BF16, and 1.5 times as long on an Intel Xeon with it.
    """
    known = getattr(torch.cpu, "get_capabilities", dict)()  # which older PyTorch does not have
    if known.get("amx_bf16"):
        return "bf16", "by this processor's AMX"
    if known.get("avx512_bf16") and "AMD" in known.get("cpu_name", ""):
        return "bf16", "by this processor's AVX512-BF16"
    return "fp32", "the fastest here"


class CutDetector:
    """Finds the first frame of each new scene from thumbnails of luma.

    The score of a frame is the mean difference of its thumbnail from the one before (levels of
    0..255) times one minus their correlation. A cut scores high, and far above the frames just
    before it, which tells it from a shaking camera. Measured on 62 scenes: 2 of 3,205 frames
    inside a scene taken for cuts, 3 % of 3,782 joints between scenes missed.
    """

    SIDE = 32  # of the thumbnail
    THRESHOLD = 12.0
    RATIO = 2.5  # over the largest of the RECENT scores before
    RECENT = 3

    def __init__(self):
        self.previous: np.ndarray | None = None
        self.scores: deque[float] = deque(maxlen=self.RECENT)

    def is_cut(self, frame: Picture) -> bool:
        """True if the frame does not continue the one given before."""
        thumbnail, self.previous = self.previous, _thumbnail(frame, self.SIDE)
        if thumbnail is None:
            return False
        score = self._score(thumbnail, self.previous)
        usual = max(self.scores, default=0.0)
        self.scores.append(score)
        if score <= self.THRESHOLD or score <= self.RATIO * usual:
            return False
        self.scores.clear()
        return True

    @staticmethod
    def _score(a: np.ndarray, b: np.ndarray) -> float:
        spread = float(a.std() * b.std())
        covariance = float(((a - a.mean()) * (b - b.mean())).mean())
        correlation = covariance / spread if spread > 1e-6 else 0.0
        return float(np.abs(a - b).mean()) * (1 - correlation)


def _thumbnail(frame: Picture, side: int) -> np.ndarray:
    """Mean luma of blocks, 0..255: at most [side, side]."""
    if isinstance(frame, Tensor):
        frame = rearrange(frame.detach().float().cpu() * 255, "c h w -> h w c").numpy()
    luma = frame @ np.array([0.299, 0.587, 0.114], np.float32)
    if frame.dtype == np.uint16:
        luma /= 257
    y, x = (np.linspace(0, n, min(n, side) + 1).astype(int) for n in luma.shape)
    sums = np.add.reduceat(np.add.reduceat(luma, y[:-1], 0), x[:-1], 1)
    return sums / np.outer(np.diff(y), np.diff(x))


def side_by_side(function: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """Map in threads that share the cores of PyTorch, in order, a few items ahead."""
    threads = torch.get_num_threads()
    running: deque[Future[R]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        _share_threads(pool, workers, threads)
        ends: list[BaseException] = []

        def until_the_end() -> Iterator[T]:
            try:
                yield from items
            except Exception as error:  # raised again when what came before it is done
                ends.append(error)

        try:
            for item in until_the_end():
                running.append(pool.submit(function, item))
                if len(running) > workers:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()
    if ends:
        raise ends[0]


def _share_threads(pool: ThreadPoolExecutor, workers: int, threads: int) -> None:
    """Give each worker of the pool its part of PyTorch's threads."""
    met = threading.Barrier(workers + 1)
    try:
        for _ in range(workers):
            pool.submit(_take_threads, max(threads // workers, 1), met)
        met.wait()
    except BaseException:
        met.abort()  # nobody waits for a worker that could not start
        raise
    # the number of threads is one's own, but new threads copy it from whoever set it last
    torch.set_num_threads(threads)


def _take_threads(number: int, met: threading.Barrier) -> None:
    torch.get_num_threads()  # a thread's first question would overwrite what is set before it
    torch.set_num_threads(number)
    met.wait()


@dataclass
class Waits:
    """Seconds that both ends of a queue of items waited."""

    for_room: float = 0.0  # the producer
    for_items: float = 0.0  # the consumer


def in_thread(items: Iterable, depth: int = 4, waits: Waits | None = None) -> Generator:
    """Iterate in a background thread, at most `depth` items ahead; `waits` is added to.

    An exception of the iterable is raised here, in its place; closing this iterator closes the
    iterable in its thread.
    """
    ready: queue.Queue = queue.Queue(depth)
    stopped, waits = threading.Event(), waits or Waits()
    arguments = iter(items), ready, stopped, waits
    thread = threading.Thread(target=_produce, args=arguments, daemon=True)
    thread.start()
    try:
        while True:
            began = time.perf_counter()
            item, error = ready.get()
            waits.for_items += time.perf_counter() - began
            if error is not None:
                if isinstance(error, _Finished):
                    return
                raise error
            yield item
    finally:
        stopped.set()
        while thread.is_alive():  # it may wait for room
            with contextlib.suppress(queue.Empty):
                ready.get_nowait()
            thread.join(0.01)


class _Finished(Exception):
    """The end of the items in a thread's queue."""


def _produce(items: Iterator, ready: queue.Queue, stopped: threading.Event, waits: Waits) -> None:
    try:
        for item in items:
            began = time.perf_counter()
            ready.put((item, None))
            waits.for_room += time.perf_counter() - began
            if stopped.is_set():
                break
    except BaseException as error:  # raised again in the consumer's thread
        ready.put((None, error))
    else:
        ready.put((None, _Finished()))
    finally:
        if isinstance(items, Generator):
            items.close()


def _radius_of_rows(
    q: Tensor, k: Tensor, longest: Tensor, sigma: Tensor, scale: Tensor, eta: float
) -> int:
    """The certified window radius of queries q [B, h, W, D] by the keys k of the same pixels."""
    length = torch.linalg.vector_norm(q, dim=-1, dtype=torch.float64)
    spread = torch.tensor(0.0, dtype=torch.float64)
    for t in range(k.shape[1]):
        own = (q * k[:, t]).sum(-1, dtype=torch.float64)
        most = length * longest[:, t, None, None] - own
        spread = torch.maximum(spread, (most * scale).amax().cpu())
    # far beyond what any radius is: where the Gaussian alone is below eta
    enough = math.ceil(math.sqrt(2 * (spread.item() - math.log(eta) + 40)) * sigma.item()) + 1
    outside = log_gaussian_outside(inv_2sigma2(sigma.double()).item(), enough)
    return int(certified_radius(spread, outside, eta))
