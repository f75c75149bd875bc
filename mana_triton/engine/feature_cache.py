"""Features of a stream's last frames, and the enlarging of frames from them.

Every frame is encoded once. Its features lie in ring buffers: frame n in slot n modulo their size.

With PyTorch's attention the frames of a window are enlarged one window at a time, the attention in
bands of rows and the decoder in tiles as the plan says. Several threads may do so at once.

With the Triton kernels and whole frames, `batch` frames are encoded at once and `batch` windows
enlarged at once, each as one CUDA graph: a fixed sequence of kernels on fixed memory, launched as
one. A small frame fills a fraction of a large GPU, and launching its some 400 kernels one by one
takes longer than running them. Keys and values are stored as the tiles that the kernels read. What
changes from batch to batch is written into tensors that the graphs read; a batch that is not full
repeats its last frame. Frames come and go through pinned memory; a result is copied by a CUDA
stream of its own while the next frames are encoded.
"""

import math
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from einops import rearrange
from torch import Tensor

from mana_triton.attention import TOLERANCE
from mana_triton.engine.plan import Plan
from mana_triton.model import MANA
from mana_triton.resize import MAX_VALUE, SCALE

Postprocess = Callable[[Tensor], Sequence[Tensor]]  # of an enlarged frame [4H, 4W, 3]
P = ParamSpec("P")
R = TypeVar("R")


def _without_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """No gradients, but ordinary tensors even if the caller is in inference mode."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class Graph:
    """A function without arguments that is a CUDA graph from its first call on.

    It must do the same at every call: read and write the same tensors, decide nothing by their
    values on the host, and never wait for the GPU. The function is not stored: a method of the
    graph's owner would keep the owner, and its GPU memory, alive until the next garbage collection.

    Args:
        device: where it runs; elsewhere than on a CUDA device the function is called as it is.
        shared: a graph that never runs at the same time; both use the same memory for temporaries.
    """

    def __init__(self, device: torch.device, shared: "Graph | None" = None):
        self._device, self._shared = device, shared
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: object = None

    def __call__(self, function: Callable[[], R]) -> R:
        """The function's result; a CUDA graph overwrites it at its next call."""
        if self._device.type != "cuda":
            return function()
        if self._graph is None:
            with torch.cuda.device(self._device):
                self._graph = self._capture(function)
        self._graph.replay()
        return self._result  # pyright: ignore[reportReturnType]

    def _capture(self, function: Callable[[], object]) -> torch.cuda.CUDAGraph:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        shared = self._shared and self._shared._graph
        pool = shared.pool() if shared else None
        # warm up first: Triton compiles here
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        # other threads may do meanwhile what a capture forbids
        with torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"):
            self._result = function()
        return graph


class Results:
    """Enlarged frames on their way from the device."""

    def __init__(self, pictures: list, copied: torch.cuda.Event | None = None):
        self._pictures, self._copied = pictures, copied

    def wait(self) -> list:
        """For each frame [4H, 4W, 3], or the list of tensors that `postprocess` made of it."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._pictures


class FeatureCache:
    """Encodes frames of one size and type, and enlarges them from the features of their windows.

    Args:
        model: on its device, in its precision.
        height, width: of the frames.
        dtype: of the frames: torch.uint8, torch.uint16, or torch.float32 in [0, 1].
        plan: batch, workers, tile and band.
        backend: of the attentions, "auto" excluded.
        tolerance: of the cross-frame attention.
        postprocess: what to make of each enlarged frame [4H, 4W, 3] on the device.

    Attributes:
        batched: whether a batch of windows is enlarged at once; one at a time otherwise.
    """

    @_without_gradients
    def __init__(
        self,
        model: MANA,
        height: int,
        width: int,
        dtype: torch.dtype,
        plan: Plan,
        backend: str,
        tolerance: float | None = None,
        postprocess: Postprocess | None = None,
    ):
        weight, config = model.conv_first.weight, model.config
        c, t, self.device = config.channels, config.frames, weight.device
        self.model, self.plan, self.postprocess = model, plan, postprocess
        self.height, self.width, self.dtype = height, width, dtype
        self.backend = backend
        self.tolerance = TOLERANCE[weight.dtype] if tolerance is None else tolerance
        self.batched = backend == "triton" and not plan.tile
        # frames of the windows that other threads are still enlarging, besides those of the next
        ahead = plan.workers if plan.workers > 1 else 0
        frames = plan.batch + t - 1 + ahead  # with keys and values
        centers = frames - t // 2  # with what only the center of a window needs
        self._rings = {
            "f": weight.new_zeros(centers, height, width, c),
            "lr": torch.zeros(centers, 3, height, width, device=self.device),
            "scale": torch.zeros(centers, c, device=self.device),
            "shift": torch.zeros(centers, c, device=self.device),
        }
        shape: tuple[int, ...] = (height, width, c // 2)
        if self.batched:
            from mana_triton.kernels.layout import PIXELS, tiles_in

            shape = (math.prod(tiles_in(height, width)) * PIXELS, c // 2)
            self._rings["tiles"] = weight.new_zeros(centers, *shape)  # scaled queries
        self._rings |= {name: weight.new_zeros(frames, *shape) for name in "kv"}
        if self.batched:
            self._pixels = torch.zeros(plan.batch, height, width, 3, dtype=dtype).to(self.device)
            self._numbers = torch.zeros(plan.batch, dtype=torch.long, device=self.device)
            self._windows = self._numbers[:, None].repeat(1, t)
            self._encode_graph = Graph(self.device)
            self._enlarge_graph = Graph(self.device, shared=self._encode_graph)
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @_without_gradients
    def encode(self, pixels: Sequence[Tensor], first: int) -> None:
        """Encode frames [H, W, 3], at most a batch, with the numbers from `first` on."""
        numbers = range(first, first + len(pixels))
        if self.batched:
            missing = self.plan.batch - len(pixels)
            _upload(torch.stack([*pixels, *[pixels[-1]] * missing]), self._pixels)
            _upload(torch.tensor([*numbers, *[numbers[-1]] * missing]), self._numbers)
            self._encode_graph(self._encode_batch)
            return
        lr = rearrange(torch.stack(list(pixels)).to(self.device), "n h w c -> n c h w")
        lr = lr.float().div_(MAX_VALUE[self.dtype])
        f, k, v, scale, shift = self.model.encode(self._input(lr))
        values = {"f": rearrange(f, "n c h w -> n h w c"), "lr": lr, "k": k, "v": v}
        values |= {"scale": scale, "shift": shift}
        for name, value in values.items():
            ring = self._rings[name]
            for i, number in enumerate(numbers):
                ring[number % len(ring)] = value[i]

    @_without_gradients
    def enlarge(self, windows: Sequence[Sequence[int]]) -> Results:
        """Enlarge the centers of windows, each given as the numbers of its T frames."""
        if self.batched:
            missing = self.plan.batch - len(windows)
            _upload(torch.tensor([*windows, *[windows[-1]] * missing]), self._windows)
            enlarged = self._enlarge_graph(self._enlarge_batch)[: len(windows)]
            # the next batch overwrites the memory of a graph
            pictures = list(enlarged.clone() if self.device.type == "cuda" else enlarged)
        else:
            pictures = [self._enlarge_window(window)[0] for window in windows]
        if self._copies is None:
            return Results([self._finished(picture) for picture in pictures])
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            results = [self._finished(picture) for picture in pictures]
            for picture in pictures:
                picture.record_stream(self._copies)
            copied = torch.cuda.Event(blocking=True)
            copied.record()
        return Results(results, copied)

    def _finished(self, picture: Tensor) -> Tensor | list[Tensor]:
        """An enlarged frame, or what is made of it, on its way from the device."""
        if self.postprocess is None:
            return _download(picture)
        return [_download(part) for part in self.postprocess(picture)]

    def _input(self, lr: Tensor) -> Tensor:
        return lr.to(self._rings["f"].dtype).contiguous(memory_format=torch.channels_last)

    # --- one window at a time, with PyTorch's attention

    def _enlarge_window(self, numbers: Sequence[int]) -> Tensor:
        """The center of a window, [1, 4H, 4W, 3]."""
        center, t = [numbers[len(numbers) // 2]], len(numbers)
        # the attention's rounding depends on the order of the frames: one for any size of the ring
        frames = sorted(set(numbers), key=lambda number: number % t)
        order = [frames.index(number) for number in numbers]
        f = rearrange(self._load("f", center), "1 h w c -> 1 c h w")
        k, v = (self._load(name, frames)[None] for name in "kv")
        q = self.model.queries(f, self._load("scale", center), self._load("shift", center))
        for first in range(0, self.height, self.plan.band):
            rows = slice(first, first + self.plan.band)
            # in place: features of a center are not needed again
            f[:, :, rows] = self.model.fuse(
                f[:, :, rows], q[:, rows], k, v, first, order,
                backend=self.backend, tolerance=self.tolerance,
            )  # fmt: skip
        return self._decode(f, self._load("lr", center))

    def _load(self, name: str, numbers: Sequence[int]) -> Tensor:
        """What is stored of frames; a view where they lie side by side."""
        ring = self._rings[name]
        slots = [number % len(ring) for number in numbers]
        if slots == list(range(slots[0], slots[0] + len(slots))):
            return ring[slots[0] : slots[0] + len(slots)]
        return ring[slots]

    # --- a batch of windows, with the Triton kernels

    def _encode_batch(self) -> None:
        from mana_triton.kernels import cross_frame, projection

        model, cosine = self.model, self.model.config.match == "cosine"
        lr = rearrange(self._pixels, "n h w c -> n c h w").float() / MAX_VALUE[self.dtype]
        f = model.extract(self._input(lr))
        scale, shift = model.normalization(f)
        # written by the device: a copy cannot be part of a graph
        factor = f.new_ones((), dtype=torch.float32) * (model.scale * cross_frame.LOG2_E)
        layers = (model.phi, model.theta, model.g)
        tiles, k, v = projection.project(
            f, (scale, shift), [x.weight.flatten(1) for x in layers],
            [x.bias for x in layers],  # pyright: ignore[reportArgumentType]
            normalize=(cosine, cosine, False), factors=(factor, None, None),
        )  # fmt: skip
        values = {"f": rearrange(f, "n c h w -> n h w c"), "lr": lr, "tiles": tiles, "k": k, "v": v}
        values |= {"scale": scale, "shift": shift}
        for name, value in values.items():
            ring = self._rings[name]
            ring.index_copy_(0, self._numbers % len(ring), value)

    def _enlarge_batch(self) -> Tensor:
        """[batch, 4H, 4W, 3]."""
        from mana_triton.kernels import cross_frame

        model, config = self.model, self.model.config
        windows = self._windows % len(self._rings["k"])
        centers = self._windows[:, config.frames // 2] % len(self._rings["f"])
        names = ("f", "tiles", "lr", "scale", "shift")
        f, tiles, lr, scale, shift = (self._rings[name][centers] for name in names)
        f = rearrange(f, "n h w c -> n c h w")
        k, v = (self._rings[name][windows] for name in "kv")
        x, displacement, *_ = cross_frame.attend_tiles(
            tiles, k, v, model.sigma,
            rows=self.height, height=self.height, width=self.width, first_row=0,
            gaussian=config.gaussian, offsets=config.offsets, tolerance=self.tolerance,
        )  # fmt: skip
        displacement = displacement if config.offsets else None
        q = model.queries(f, scale, shift)
        return self._decode(model.combine(f, q, x, displacement, backend="triton"), lr)

    # --- both

    def _decode(self, z: Tensor, lr: Tensor) -> Tensor:
        """Decode z [N, C, H, W] over lr [N, 3, H, W], tile by tile: [N, 4H, 4W, 3]."""
        out = z.new_empty(len(z), SCALE * self.height, SCALE * self.width, 3, dtype=self.dtype)
        largest, halo = MAX_VALUE[self.dtype], self.model.receptive_field
        for y0, y1 in _spans(self.height, self.plan.tile):
            for x0, x1 in _spans(self.width, self.plan.tile):
                top, left = max(y0 - halo, 0), max(x0 - halo, 0)
                region = (..., slice(top, y1 + halo), slice(left, x1 + halo))
                part = self.model.decode(z[region]).float() + self.model.skip(lr[region])
                rows = slice(SCALE * (y0 - top), SCALE * (y1 - top))
                part = part[..., rows, SCALE * (x0 - left) : SCALE * (x1 - left)]
                part = rearrange(part, "n c h w -> n h w c").clamp_(0, 1)
                if largest > 1:
                    part = part.mul_(largest).round_()
                out[:, SCALE * y0 : SCALE * y1, SCALE * x0 : SCALE * x1] = part
        return out


def _spans(length: int, tile: int) -> list[tuple[int, int]]:
    """Equal parts of 0 .. length, none longer than tile (0: one part)."""
    parts = math.ceil(length / tile) if tile else 1
    return [(length * i // parts, length * (i + 1) // parts) for i in range(parts)]


def _download(values: Tensor) -> Tensor:
    """A copy in main memory; from CUDA without waiting for it."""
    if not values.is_cuda:
        return values.cpu()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(
        values, non_blocking=True
    )


def _upload(values: Tensor, target: Tensor) -> None:
    """Copy into a tensor on a device without waiting for it."""
    pinned = values.pin_memory() if target.is_cuda and not values.is_cuda else values
    target.copy_(pinned, non_blocking=True)
