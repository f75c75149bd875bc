"""The feature cache: ring buffers, padding, and on a GPU its graphs.

This file also runs from a bare checkout on a machine with a GPU.
"""

import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from networks import ROUNDING, lively_network
from torch import Tensor, nn

from mana_triton import MANA, EngineOptions, MANAConfig, Upscaler
from mana_triton.engine import upscaler as engine
from mana_triton.engine.feature_cache import FeatureCache, Graph
from mana_triton.engine.plan import Plan
from mana_triton.video.color import Color, rgb_to_yuv, yuv_to_rgb

CONFIG = MANAConfig(
    channels=32, encoder_blocks=2, decoder_blocks=4, memory_slots=16, match="cosine", offsets=True
)
CPU, BACKENDS = torch.device("cpu"), ("triton", "tiled")
# bits, where chroma lies, and how many pixels share it
PLANES = [(8, "left", (2, 2)), (10, "topleft", (2, 2)), (16, "center", (1, 1))]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(scope="module")
def model() -> MANA:
    return lively_network(CONFIG, std=0.05)


def clip(length: int, height: int, width: int) -> np.ndarray:
    """[T, H, W, 3] uint8: blobs that move a pixel a frame."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8 + 2, (width + length) // 8 + 2, generator=generator)
    size = (height, width + length)
    picture = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[0]
    moving = torch.stack([picture[:, :, n : n + width] for n in range(length)])
    return (255 * moving).round().byte().movedim(1, -1).numpy()


def stacked(model: MANA, frames: np.ndarray | Tensor, **options) -> Tensor:
    """[T, 3, 4H, 4W] in 0..255, or in [0, 1] of tensors, without scene cuts."""
    upscaler = Upscaler(model, EngineOptions(scene_cuts=False, **options))
    results = torch.stack([torch.as_tensor(x.picture) for x in upscaler.stream(frames)])
    return results if isinstance(frames, Tensor) else results.movedim(-1, 1).float()


def test_without_cuda_a_graph_is_a_call():
    graph = Graph(CPU)
    assert [graph(lambda: 1), graph(lambda: 2)] == [1, 2]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_find_their_frames_in_the_ring(batch, model):
    frames = torch.from_numpy(clip(14, 9, 10))
    cache = FeatureCache(model, 9, 10, torch.uint8, Plan(batch=batch), "tiled")
    lr = frames.movedim(-1, 1) / 255
    for start in range(0, 14, batch):
        chunk = frames[start : start + batch]
        cache.encode(list(chunk), start)
        centers = [n for n in range(start - 3, start - 3 + len(chunk)) if n >= 3]
        if not centers:
            continue
        windows = [list(range(n - 3, n + 4)) for n in centers]
        results = cache.enlarge(windows).wait()
        exact = torch.cat([model(lr[window][None]) for window in windows])
        exact = 255 * exact.clamp(0, 1).movedim(1, -1)
        assert len(results) == len(windows)
        assert (torch.stack(results).float() - exact).abs().max() <= 0.5 + 255 * ROUNDING


@torch.no_grad()
def test_results_are_not_overwritten(model):
    cache = FeatureCache(model, 8, 8, torch.uint8, Plan(batch=2), "tiled")
    cache.encode(list(torch.from_numpy(clip(2, 8, 8))), 0)
    first = cache.enlarge([[0] * 7]).wait()[0]
    before = first.clone()
    cache.enlarge([[1] * 7])
    assert torch.equal(first, before)


@pytest.mark.parametrize("fails", [0, 2])
def test_a_cache_is_freed_with_its_stream(fails, model, monkeypatch):
    """Not by the garbage collector, which would keep the memory of a GPU for long."""
    alive = []
    failing = iter([True] * fails)

    class Watched(FeatureCache):
        def __init__(self, *args):
            super().__init__(*args)
            before = [x for x in alive if x() is not None]
            alive.append(weakref.ref(self))
            assert not before

        def enlarge(self, windows):
            if next(failing, False):
                raise torch.OutOfMemoryError("no memory")
            return super().enlarge(windows)

    monkeypatch.setattr(engine, "FeatureCache", Watched)
    gc.disable()
    try:
        for _ in range(2):
            assert len(stacked(model, clip(9, 12, 14), batch=8)) == 9
    finally:
        gc.enable()
    assert len(alive) == 2 + fails
    assert all(x() is None for x in alive)


def test_only_whole_frames_with_triton_are_batched(model):
    for backend, plan, batched in (
        ("triton", Plan(batch=2), True), ("triton", Plan(tile=8), False), ("tiled", Plan(), False),
    ):  # fmt: skip
        cache = FeatureCache(model, 16, 16, torch.uint8, plan, backend)
        assert cache.batched == batched


# --- on a GPU


@pytest.mark.gpu
@gpu
def test_backends_divisions_and_frames_on_the_gpu(model):
    frames, options = clip(9, 40, 52), {"device": "cuda", "precision": "fp32"}
    triton = stacked(model, frames, backend="triton", **options)
    for others in ({"backend": "tiled"}, {"backend": "triton", "tile": 24}, {"batch": 2}):
        assert (stacked(model, frames, **options, **others) - triton).abs().max() <= 1
    lr = torch.from_numpy(frames).movedim(-1, 1).float() / 255
    results = stacked(model, lr.cuda(), **options)
    assert results.is_cuda
    assert torch.equal(results.cpu(), stacked(model, lr, **options))


@pytest.mark.gpu
@gpu
@torch.no_grad()
def test_a_replayed_graph_does_what_the_function_does():
    x = torch.zeros(5, device="cuda")
    graph = Graph(x.device)
    for value in range(4):
        x.fill_(value)
        y = graph(lambda: 2 * x + 1)
        assert torch.equal(y, torch.full_like(y, 2 * value + 1))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graphs_equal_plain_calls(batch, precision, model, monkeypatch):
    options = {"device": "cuda", "precision": precision, "batch": batch}
    replayed = stacked(model, clip(17, 40, 52), **options)
    monkeypatch.setattr(Graph, "__call__", lambda _, function: function())
    assert torch.equal(replayed, stacked(model, clip(17, 40, 52), **options))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("precision", "least"), [("fp32", 60.0), ("bf16", 50.0), ("fp16", 50.0)])
def test_batches_on_a_gpu_are_close_to_the_definition(precision, least, model):
    frames = clip(9, 40, 52)
    exact = lively_network(CONFIG, std=0.05).double()
    lr = torch.from_numpy(frames).movedim(-1, 1).double() / 255
    padded = np.pad(np.arange(9), 3, mode="reflect").tolist()
    with torch.no_grad():
        windows = [lr[padded[n : n + 7]][None] for n in range(9)]
        expected = torch.cat([exact(x, backend="reference") for x in windows]).clamp(0, 1)
    results = stacked(model, lr.float(), device="cuda", precision=precision, batch=4).double()
    mse = (results - expected).square().mean().item()
    assert -10 * np.log10(mse) >= least


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("bits", "siting", "block"), PLANES)
def test_planes_on_a_gpu_are_those_of_a_cpu(bits, siting, block, model):
    color = Color(9, siting=siting)
    frames = clip(5, 40, 52)
    if bits > 8:
        frames = frames.astype(np.uint16) * 257

    def planes(picture: Tensor) -> list[Tensor]:
        return rgb_to_yuv(picture, bits, color, False, block)

    def on_gpu(picture: Tensor) -> list[Tensor]:
        assert picture.is_cuda
        return planes(picture)

    upscaler = Upscaler(model, EngineOptions(device="cuda", batch=3, scene_cuts=False))
    whole, made = upscaler.stream(frames), upscaler.stream(frames, postprocess=on_gpu)
    for (_, picture), (_, parts) in zip(list(whole), list(made), strict=True):
        exact = planes(torch.from_numpy(picture))
        back = yuv_to_rgb([plane.cuda() for plane in exact], bits, color, block).cpu()
        for actual, expected in (
            *((torch.from_numpy(x), y) for x, y in zip(parts, exact, strict=True)),
            (back, yuv_to_rgb(exact, bits, color, block)),
        ):
            # sums in another order may round to the next integer
            off = (actual.int() - expected.int()).abs()
            assert off.max() <= 1
            assert off.float().mean() < (1e-3 if bits < 16 else 0.1)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("postprocess", [None, lambda x: rgb_to_yuv(x, 8, Color(), False, (2, 2))])
def test_gpu_memory_does_not_grow_with_the_number_of_frames(postprocess, model):
    frames = clip(8, 40, 52)
    results = Upscaler(model, EngineOptions(device="cuda")).stream(
        (frames[n % 8] for n in itertools.count()), postprocess=postprocess
    )
    for _ in range(40):
        next(results)
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        next(results)
    assert torch.cuda.memory_allocated() <= held
    assert torch.cuda.memory_reserved() <= reserved
