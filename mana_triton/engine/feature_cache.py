"""Batches of frames through the network: what a GPU is given at once.

A small frame fills a fraction of a large GPU, and launching its some 400 kernels one by one takes
longer than running them. So several frames are encoded together and several windows enlarged
together, each as one CUDA graph: a fixed sequence of kernels on fixed memory, launched as one.

Features of the last frames lie in rings: frame n in place n modulo their number; for the Triton
backend keys and values as the tiles that it reads, written by the projections themselves. What
changes from batch to batch, pictures, their places and those of the windows, is written into
tensors that the graphs read. A batch that is not full repeats its last frame: one graph serves all.
Pictures come and go as integers through pinned memory; a result is copied out by a stream of its
own, while the next frames are encoded.

On a CPU the same functions run as they are.
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from mana_triton.attention import TOLERANCE
from mana_triton.model import MANA
from mana_triton.resize import MAX_VALUE, SCALE

# what is made of a picture [4H, 4W, 3] where it lies, such as the planes of a video
Finish = Callable[[Tensor], Sequence[Tensor]]


class Graph:
    """A function without arguments, as a CUDA graph once it has been called.

    It must be the same at every call, read and write the same tensors, and leave the choice of what
    it does to their values. It must not wait for the GPU. (It is not kept: as its owner's method it
    would keep the owner, and the memory of the GPU, until the garbage is collected.)

    Args:
        device: where it works.
        beside: a graph that never runs at the same time: both use the same memory in between.
    """

    def __init__(self, device: torch.device, beside: "Graph | None" = None):
        self._device, self._beside = device, beside
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, function: Callable[[], object]) -> None:
        if self._device.type != "cuda":
            function()
            return
        if self._graph is None:
            with torch.cuda.device(self._device):
                self._graph = self._captured(function)
        self._graph.replay()

    def _captured(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        other = self._beside and self._beside._graph
        pool = other.pool() if other else None
        # first in earnest: kernels are compiled
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(aside)
        # other threads may go on with what a capture forbids
        with torch.cuda.graph(graph, pool, aside, capture_error_mode="thread_local"):
            function()
        return graph


class Results:
    """Enlarged pictures on their way out of the device."""

    def __init__(self, pictures: list, copied: torch.cuda.Event | None):
        self._pictures, self._copied = pictures, copied

    def wait(self) -> list:
        """The pictures [4H, 4W, 3], or what was made of each, when they are there."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._pictures


class Batches:
    """Encodes and enlarges frames of one size and kind, up to `batch` at once.

    Args:
        model: on its device, in its precision.
        height, width: of the frames.
        kind: of their numbers: torch.uint8, torch.uint16 or torch.float32 in [0, 1].
        batch: frames at once.
        finish: of pictures of that kind.
    """

    def __init__(
        self,
        model: MANA,
        height: int,
        width: int,
        kind: torch.dtype,
        batch: int,
        finish: Finish | None = None,
    ):
        weight = model.conv_first.weight
        c, t, device = model.config.channels, model.config.frames, weight.device
        self.tiles = model.backend == "triton"
        self.model, self.batch, self.device, self.finish = model, batch, device, finish
        self.ring = batch + 2 * (t // 2)
        slots = torch.zeros(batch, dtype=torch.long, device=device)
        self._slots, self._windows = slots, slots[:, None].repeat(1, t)
        self._given = torch.zeros(batch, height, width, 3, dtype=kind, device=device)
        self._out = self._given.new_zeros(batch, SCALE * height, SCALE * width, 3)
        attended: tuple[int, ...] = (height, width, c // 2)
        rows: dict[str, tuple[int, ...]] = {"f": (height, width, c), "q": attended}
        if self.tiles:
            from mana_triton.kernels.layout import PIXELS, tiles_in

            attended = (math.prod(tiles_in(height, width)) * PIXELS, c // 2)
            rows["tiles"] = attended  # queries for the attention; q are those for the memory
        rows |= {"k": attended, "v": attended}
        self._kept = {name: weight.new_zeros(self.ring, *size) for name, size in rows.items()}
        self._lr = torch.zeros(self.ring, height, width, 3, device=device)
        self._encode = Graph(device)
        self._enlarge = Graph(device, beside=self._encode)
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def encode(self, pictures: Sequence[Tensor], numbers: Sequence[int]) -> None:
        """Encode pictures [H, W, 3], at most a batch, and keep their features under their numbers.

        Those of `batch` + 2 (T // 2) frames before are forgotten.
        """
        given = [*pictures, *[pictures[-1]] * (self.batch - len(pictures))]
        _put(torch.stack(given), self._given)
        self._put_places(numbers, self._slots)
        self._encode(self._encode_given)

    def enlarge(self, windows: Sequence[Sequence[int]]) -> Results:
        """Enlarge the centers of windows, at most a batch, by the numbers of their T frames."""
        self._put_places(windows, self._windows)
        self._enlarge(self._enlarge_windows)
        enlarged = self._out[: len(windows)]
        if self._copies is None:
            return Results(self._finished(enlarged), None)
        enlarged = enlarged.clone()  # the next batch may follow at once
        enlarged.record_stream(self._copies)
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            pictures = self._finished(enlarged)
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        return Results(pictures, copied)

    def _finished(self, enlarged: Tensor) -> list:
        """Enlarged pictures, or what is made of them, on their way to the caller."""
        if self.finish is None:
            return [_taken(picture) for picture in enlarged]
        return [[_taken(part) for part in self.finish(picture)] for picture in enlarged]

    def _put_places(self, numbers: Sequence, target: Tensor) -> None:
        places = torch.tensor([*numbers, *[numbers[-1]] * (self.batch - len(numbers))])
        _put(places % self.ring, target)

    def _encode_given(self) -> None:
        lr = self._given.float() / MAX_VALUE[self._given.dtype]
        # channels last, as it lies
        pixels = rearrange(lr.to(self._kept["f"].dtype), "n h w c -> n c h w")
        rows = self._tiles_of(pixels) if self.tiles else self._rows_of(pixels)
        rows["f"] = rearrange(rows["f"], "n c h w -> n h w c")
        for name, value in rows.items():
            self._kept[name].index_copy_(0, self._slots, value)
        self._lr.index_copy_(0, self._slots, lr)

    def _rows_of(self, frames: Tensor) -> dict[str, Tensor]:
        """What is kept of frames [N, 3, H, W]."""
        f, k, v, *norm = self.model.encode(frames)
        return {"f": f, "q": self.model.queries(f, *norm), "k": k, "v": v}

    def _tiles_of(self, frames: Tensor) -> dict[str, Tensor]:
        """The same for the Triton backend."""
        from mana_triton.kernels import cross_frame, projection

        model, cosine = self.model, self.model.config.match == "cosine"
        f = model.extract(frames)
        norm = model.normalization(f)
        # written by the device: a copy cannot be part of a graph
        factor = f.new_ones((), dtype=torch.float32) * (model.scale * cross_frame.LOG2_E)
        layers = (model.phi, model.theta, model.g)
        tiles, k, v = projection.project(
            f, norm, [x.weight.flatten(1) for x in layers],
            [x.bias for x in layers],  # pyright: ignore[reportArgumentType]
            normalize=(cosine, cosine, False), factors=(factor, None, None),
        )  # fmt: skip
        return {"f": f, "q": model.queries(f, *norm), "tiles": tiles, "k": k, "v": v}

    def _enlarge_windows(self) -> None:
        windows = self._windows
        centers = windows[:, windows.shape[1] // 2]
        f, q = self._kept["f"][centers], self._kept["q"][centers]
        k, v = self._kept["k"][windows], self._kept["v"][windows]
        f = rearrange(f, "n h w c -> n c h w")
        z = self._attended(f, q, centers, k, v) if self.tiles else self.model.fuse(f, q, k, v)
        lr = rearrange(self._lr[centers], "n h w c -> n c h w")
        large = self.model.decode(z).float() + self.model.skip(lr)
        large = rearrange(large, "n c h w -> n h w c").clamp_(0, 1)
        if (white := MAX_VALUE[self._out.dtype]) > 1:
            large = large.mul_(white).round_()
        self._out.copy_(large)

    def _attended(self, f: Tensor, q: Tensor, centers: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`MANA.fuse` with keys and values as tiles."""
        from mana_triton.kernels import cross_frame

        model, config = self.model, self.model.config
        height, width = f.shape[2:]
        tolerance = TOLERANCE[f.dtype] if model.tolerance is None else model.tolerance
        x, displacement, *_ = cross_frame.attend_tiles(
            self._kept["tiles"][centers], k, v, model.sigma,
            rows=height, height=height, width=width, first_row=0,
            gaussian=config.gaussian, offsets=config.offsets, tolerance=tolerance,
        )  # fmt: skip
        return model.combine(f, q, x, displacement if config.offsets else None)


def _taken(values: Tensor) -> Tensor:
    """A copy outside of the device, without waiting for it."""
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)
    return copy.copy_(values, non_blocking=True)


def _put(values: Tensor, target: Tensor) -> None:
    """Copy into a tensor on a device without waiting for it."""
    pinned = values.pin_memory() if target.is_cuda and not values.is_cuda else values
    target.copy_(pinned, non_blocking=True)
