"""Whole frames in batches: rings, padding, and on a GPU its graphs.

What a stream makes of batches is tested in test_stream.py and test_planner.py; this file runs from
a bare checkout on a GPU.
"""

import copy
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mana_triton import MANA, MANAConfig
from mana_triton.engine import upscaler as stream
from mana_triton.engine.feature_cache import Batches, Graph
from mana_triton.engine.upscaler import Upscaler
from mana_triton.video.color import Color, rgb_to_yuv, yuv_to_rgb

CONFIG = MANAConfig(
    channels=32, encoder_blocks=2, decoder_blocks=4, memory_slots=16, match="cosine", offsets=True
)
CPU, BACKENDS = torch.device("cpu"), ("triton", "tiled")
ROUNDING = 1e-5  # of float32 sums in another order, on values of about 1
# bits, where chroma lies, and how many pixels share it
PLANES = [(8, "left", (2, 2)), (10, "topleft", (2, 2)), (16, "center", (1, 1))]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_model() -> MANA:
    """A network in which neighbors and memory matter, unlike in a new one."""
    torch.manual_seed(0)
    model = MANA(CONFIG)
    for layer in (model.w_z, model.w_z1, model.conv_last):
        nn.init.normal_(layer.weight, std=0.05)
    return model.eval()


def clip(length: int, height: int, width: int) -> np.ndarray:
    """[T, H, W, 3] uint8: blobs that move a pixel a frame."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, height // 8 + 2, (width + length) // 8 + 2, generator=generator)
    size = (height, width + length)
    picture = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)[0]
    moving = torch.stack([picture[:, :, n : n + width] for n in range(length)])
    return (255 * moving).round().byte().movedim(1, -1).numpy()


def stacked(upscaler: Upscaler, frames: np.ndarray) -> Tensor:
    """[T, 3, 4H, 4W] in 0..255."""
    return torch.from_numpy(np.stack(list(upscaler.stream(frames)))).movedim(-1, 1).float()


def test_a_function_runs_as_it_is_without_a_gpu():
    calls = []
    graph = Graph(CPU)
    graph(lambda: calls.append(1))
    graph(lambda: calls.append(1))
    assert calls == [1, 1]


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 3])
def test_windows_find_their_frames_in_the_ring(batch):
    model, frames = random_model(), torch.from_numpy(clip(14, 9, 10))
    batches = Batches(model, 9, 10, torch.uint8, batch)
    lr = frames.movedim(-1, 1) / 255
    for start in range(0, 14, batch):
        numbers = list(range(start, min(start + batch, 14)))
        batches.encode([frames[n] for n in numbers], numbers)
        centers = [n for n in range(start - 3, start - 3 + len(numbers)) if n >= 3]
        if not centers:
            continue
        windows = [list(range(n - 3, n + 4)) for n in centers]
        results = batches.enlarge(windows).wait()
        exact = torch.cat([model(lr[window][None]) for window in windows])
        exact = 255 * exact.clamp(0, 1).movedim(1, -1)
        assert len(results) == len(windows)
        assert (torch.stack(results).float() - exact).abs().max() <= 0.5 + 255 * ROUNDING


@torch.no_grad()
def test_results_are_the_callers_own():
    batches = Batches(random_model(), 8, 8, torch.uint8, 2)
    frames = torch.from_numpy(clip(2, 8, 8))
    batches.encode(list(frames), [0, 1])
    first = batches.enlarge([[0] * 7]).wait()[0]
    before = first.clone()
    batches.enlarge([[1] * 7])
    assert torch.equal(first, before)


@pytest.mark.parametrize("fails", [0, 2])
def test_rings_go_with_their_stream(fails, monkeypatch):
    """A cycle kept them, and a GPU's memory, until the garbage was collected."""
    alive, enlarge = [], Batches._enlarge_windows
    failing = iter([True] * fails)

    class Watched(Batches):
        def __init__(self, *args):
            super().__init__(*args)
            before = [x for x in alive if x() is not None]
            alive.append(weakref.ref(self))
            assert not before

        def _enlarge_windows(self):
            if next(failing, False):
                raise torch.OutOfMemoryError("no memory")
            enlarge(self)

    monkeypatch.setattr(stream, "Batches", Watched)
    gc.disable()
    try:
        for _ in range(2):
            assert len(list(Upscaler(random_model(), batch=8).stream(clip(9, 12, 14)))) == 9
    finally:
        gc.enable()
    assert len(alive) == 2 + fails
    assert all(x() is None for x in alive)


def test_only_what_can_be_a_graph_goes_in_batches():
    upscaler = Upscaler(random_model())
    assert upscaler.plan_for(64, 112).batch == 0
    upscaler.device, upscaler.workers = torch.device("cuda"), "auto"
    assert upscaler._most_at_once(64, 112) == 0  # attention by tiled
    upscaler.backend = "triton"
    assert upscaler._most_at_once(64, 112) == 7


# --- on a GPU


@pytest.mark.gpu
@gpu
def test_other_backends_and_frames_on_the_gpu():
    frames, model = clip(9, 40, 52), random_model()
    options = {"device": "cuda", "precision": "fp32", "scene_cuts": False}
    triton, tiled = (stacked(Upscaler(model, backend=x, **options), frames) for x in BACKENDS)
    assert (triton - tiled).abs().max() <= 1
    lr = torch.from_numpy(frames).movedim(-1, 1).float() / 255
    upscaler = Upscaler(model, **options)
    there = [x.cpu() for x in upscaler.stream(lr.cuda())]
    assert all(map(torch.equal, there, upscaler.stream(lr)))


@pytest.mark.gpu
@gpu
@torch.no_grad()
def test_a_replayed_graph_does_what_the_function_does():
    x = torch.zeros(5, device="cuda")
    y = torch.zeros(5, device="cuda")
    graph = Graph(x.device)
    for value in range(4):
        x.fill_(value)
        graph(lambda: y.copy_(2 * x + 1))
        assert torch.equal(y, torch.full_like(y, 2 * value + 1))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("batch", [1, 3, 7])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_graphs_equal_eager_frames(batch, precision, monkeypatch):
    """The same functions without a graph, on the same device."""
    frames = clip(17, 40, 52)
    options = {"device": "cuda", "precision": precision, "batch": batch, "scene_cuts": False}
    upscaler = Upscaler(random_model(), **options)
    replayed = stacked(upscaler, frames)
    monkeypatch.setattr(Graph, "__call__", lambda _, function: function())
    assert torch.equal(replayed, stacked(upscaler, frames))


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("precision", "least"), [("fp32", 60.0), ("bf16", 50.0), ("fp16", 50.0)])
def test_batches_on_a_gpu_are_close_to_the_definition(precision, least):
    model, frames = random_model(), clip(9, 40, 52)
    exact = copy.deepcopy(model).double()
    exact.backend = "reference"
    lr = torch.from_numpy(frames).movedim(-1, 1).double() / 255
    padded = np.pad(np.arange(9), 3, mode="reflect").tolist()
    with torch.no_grad():
        expected = torch.cat([exact(lr[padded[n : n + 7]][None]) for n in range(9)]).clamp(0, 1)
    upscaler = Upscaler(model, device="cuda", precision=precision, batch=4, scene_cuts=False)
    results = torch.stack([torch.as_tensor(x) for x in upscaler.stream(lr.float())]).double()
    mse = (results - expected).square().mean().item()
    assert -10 * np.log10(mse) >= least


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize(("bits", "siting", "block"), PLANES)
def test_planes_on_a_gpu_are_those_of_a_processor(bits, siting, block):
    color = Color(9, siting=siting)
    frames = clip(5, 40, 52)
    if bits > 8:
        frames = frames.astype(np.uint16) * 257

    def planes(picture: Tensor) -> list[Tensor]:
        return rgb_to_yuv(picture, bits, color, False, block)

    def on_gpu(picture: Tensor) -> list[Tensor]:
        assert picture.is_cuda
        return planes(picture)

    upscaler = Upscaler(random_model(), device="cuda", batch=3, scene_cuts=False)
    whole, finished = upscaler.stream(frames), upscaler.stream(frames, finish=on_gpu)
    for picture, parts in zip(list(whole), list(finished), strict=True):
        exact = planes(torch.from_numpy(picture))
        back = yuv_to_rgb([plane.cuda() for plane in exact], bits, color, block).cpu()
        for actual, expected in (
            *((torch.from_numpy(x), y) for x, y in zip(parts, exact, strict=True)),
            (back, yuv_to_rgb(exact, bits, color, block)),
        ):
            # a sum in another order falls to the other side of a half now and then
            off = (actual.int() - expected.int()).abs()
            assert off.max() <= 1
            assert off.float().mean() < (1e-3 if bits < 16 else 0.1)


@pytest.mark.gpu
@gpu
@pytest.mark.parametrize("finish", [None, lambda x: rgb_to_yuv(x, 8, Color(), False, (2, 2))])
def test_memory_does_not_grow_over_a_thousand_frames(finish):
    frames = clip(8, 40, 52)
    results = Upscaler(random_model(), device="cuda").stream(
        (frames[n % 8] for n in itertools.count()), finish=finish
    )
    for _ in range(40):
        next(results)
    held, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(1000):
        next(results)
    assert torch.cuda.memory_allocated() <= held
    assert torch.cuda.memory_reserved() <= reserved
