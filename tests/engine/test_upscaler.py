"""A stream gives what the network gives on whole clips, for any length, size, division and type."""

import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import CONFIG, ROUNDING, lively_network, noise, pan
from torch import Tensor, nn

from mana_triton import checkpoint
from mana_triton.attention import STREAM_TOLERANCE
from mana_triton.engine import device
from mana_triton.engine.device import fastest_on_cpu
from mana_triton.engine.upscaler import EngineOptions, Upscaler, upscale
from mana_triton.engine.window import mirror, window_numbers
from mana_triton.model import MANA, Features
from mana_triton.video.color import Color, rgb_to_yuv

ROOT = Path(__file__).parents[2]
RADIUS = CONFIG.frames // 2
KINDS = ("array", "deep", "tensor")


@pytest.fixture(scope="module")
def model() -> MANA:
    return lively_network()


@pytest.fixture(scope="module")
def bilinear() -> MANA:
    """A network that adds nothing to bilinear interpolation."""
    model = lively_network()
    nn.init.zeros_(model.conv_last.weight)
    nn.init.zeros_(model.conv_last.bias)  # pyright: ignore[reportArgumentType]
    return model


def run(model: MANA, frames, **options) -> Tensor:
    """The results of a stream as one tensor."""
    return torch.stack([torch.as_tensor(x) for x in upscale(frames, model, **options)])


def with_cuts(model: MANA, frames, cuts, **options) -> Tensor:
    """The same with cuts before the frames of these numbers."""
    upscaler = Upscaler(model, EngineOptions(**options))
    numbered = upscaler.stream(
        enumerate(frames), pixels=lambda x: x[1], is_cut=lambda x: x[0] in cuts
    )
    return torch.stack([torch.as_tensor(result.picture) for result in numbered])


def whole_clip(model: MANA, frames: Tensor) -> Tensor:
    """MANA.forward on the window of each frame of [T, 3, H, W].

    Frames are encoded one by one: a convolution may round differently for several.
    """
    reference = Upscaler(model).model  # with its memory layout
    encode = reference.encode
    reference.encode = lambda frames: Features(
        *map(torch.cat, zip(*(encode(frame[None]) for frame in frames), strict=True))
    )
    padded = np.pad(np.arange(len(frames)), RADIUS, mode="reflect").tolist()
    windows = [padded[center : center + CONFIG.frames] for center in range(len(frames))]
    with torch.inference_mode():
        return torch.cat(
            [reference(frames[window][None], tolerance=STREAM_TOLERANCE) for window in windows]
        )


# --- what a stream computes


@pytest.mark.parametrize("length", [1, 2, 3, 4, 8])
def test_windows_are_mirrored_without_repeating_the_end(length):
    expected = np.pad(np.arange(length), 3, mode="reflect").tolist()
    for first in (0, 5):
        last = first + length - 1
        assert [mirror(i, first, last) - first for i in range(first - 3, last + 4)] == expected
        assert window_numbers(first, first, last, 7) == [first + i for i in expected[:7]]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("length", "height", "width"),
    [(1, 12, 16), (2, 12, 16), (4, 7, 5), (9, 12, 16), (5, 1, 1), (2, 70, 19)],
)
@pytest.mark.usefixtures("one_thread")  # convolutions round differently with another number
def test_stream_equals_the_whole_clip_bit_for_bit(length, height, width, workers, model):
    frames = noise(length, height, width)
    exact = whole_clip(model, frames)
    frozen = whole_clip(model, frames[:1].expand_as(frames))
    assert length == 1 or (exact - frozen)[0].abs().max() > 0.01, "neighbors must matter here"
    if frames.numel() > 1000:
        assert exact.min() < 0 and exact.max() > 1, "values must need clamping here"
    result = run(model, frames, workers=workers, scene_cuts=False)
    assert torch.equal(result, exact.clamp(0, 1))


def test_workers_do_not_change_results(model):
    """Not a bit: each has one thread here."""
    frames = noise(12, 12, 16)
    alone = with_cuts(model, frames, {5, 7}, workers=1)
    for workers in (2, 3, 12):
        assert torch.equal(with_cuts(model, frames, {5, 7}, workers=workers), alone), workers


@pytest.mark.parametrize("batch", [2, 3, 20])
@pytest.mark.parametrize("options", [{}, {"workers": 2}, {"tile": 8}], ids=str)
def test_batches_do_not_change_results(batch, options, model):
    frames = noise(9, 12, 16)
    for cuts in ({}, {2}, {5}):
        exact = with_cuts(model, frames, cuts, workers=1)
        batched = with_cuts(model, frames, cuts, batch=batch, **options)
        assert (batched - exact).abs().max() <= ROUNDING


@pytest.mark.parametrize(
    ("options", "most"), [({"backend": "reference"}, 2e-3), ({"precision": "bf16"}, 0.1)], ids=str
)
def test_backends_and_precisions_agree(options, most, model):
    frames = noise(3, 19, 23)
    results = run(model, frames, **options)
    assert results.dtype == torch.float32
    assert 0 < (results - run(model, frames)).abs().max() < most


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"amx_bf16": True, "cpu_name": "Intel Xeon"}, "bf16 (by this proc"),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16 (by this processor's AVX512"),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "fp32 (the fastest here)"),
    ],
)
def test_bf16_is_chosen_where_it_is_faster(known, expected, model, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(device, "fastest_on_cpu", fastest_on_cpu)
    assert Upscaler(model, EngineOptions(device="cpu")).description.startswith(f"cpu, {expected}")
    assert Upscaler(model, EngineOptions(device="cpu", precision="fp32")).precision == "fp32"


@pytest.mark.parametrize(("height", "width"), [(19, 23), (33, 7), (1, 1), (3, 40)])
def test_tiles_change_nothing_but_rounding(height, width, model):
    frames = noise(2, height, width)
    whole = run(model, frames, tile=0)
    for tile in (1, 4, 7, 16, 100):
        assert (run(model, frames, tile=tile) - whole).abs().max() <= ROUNDING, f"{tile=}"


# --- sizes and types


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 10),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    options=st.fixed_dictionaries(
        {
            "tile": st.sampled_from([0, 3, 8, "auto"]),
            "batch": st.integers(1, 11),
            "scene_cuts": st.booleans(),
        }
    ),
    kind=st.sampled_from(KINDS),
)
def test_any_clip_gives_as_many_frames_in_order(bilinear, length, height, width, options, kind):
    frames = (255 * noise(length, height, width)).round() / 255
    exact = nn.functional.interpolate(frames, scale_factor=4, mode="bilinear", align_corners=False)
    given_frames, largest = frames, 1
    if kind != "tensor":
        largest, dtype = (255, np.uint8) if kind == "array" else (65535, np.uint16)
        given_frames = (largest * frames).round().movedim(1, -1).numpy().astype(dtype)
    results = list(upscale(given_frames, bilinear, **options))
    assert len(results) == length
    for result, expected in zip(results, exact, strict=True):
        if kind == "tensor":
            assert isinstance(result, Tensor) and result.dtype == torch.float32
            assert (result - expected).abs().max() <= ROUNDING
            continue
        assert isinstance(result, np.ndarray) and result.dtype == given_frames.dtype
        assert result.shape == (4 * height, 4 * width, 3)
        error = torch.as_tensor(result.astype(np.float32)).movedim(-1, 0) - largest * expected
        assert error.abs().max() <= 0.5 + largest * ROUNDING


def test_any_iterable_and_views_are_accepted(model):
    arrays = pan(3, 3, 12, 16)
    before, expected = arrays.copy(), run(model, arrays)
    wide = np.repeat(arrays, 2, 2)
    wide.flags.writeable = False
    for frames in (list(arrays), iter(arrays), wide[:, :, ::2]):
        assert torch.equal(run(model, frames), expected)
    assert np.array_equal(arrays, before)
    assert list(upscale([], model)) == []


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}, {"batch": 2}], ids=str)
def test_results_are_ordinary_tensors(model, options):
    """Whichever mode the caller is in, and changing it."""
    results = upscale(noise(9, 8, 8), model, **options)
    with torch.inference_mode():
        first = torch.as_tensor(next(results))
    scale = torch.ones((), requires_grad=True)
    for result in (first, torch.as_tensor(next(results))):
        (result.mul_(255) * scale).sum().backward()
    assert scale.grad is not None
    assert len(list(results)) == 7


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}, {"batch": 2}, {"tile": 8}])
def test_postprocess_gets_the_enlarged_frames(options, model):
    frames, color = pan(0, 5, 12, 16), Color(9, siting="topleft")
    upscaler = Upscaler(model, EngineOptions(scene_cuts=False, **options))

    def planes(picture: Tensor) -> list[Tensor]:
        return rgb_to_yuv(picture, 10, color, False, (2, 2))

    whole = list(upscaler.stream(frames))
    made = list(upscaler.stream(frames, postprocess=planes))
    assert len(made) == len(whole) == 5
    for (_, parts), (_, picture) in zip(made, whole, strict=True):
        for part, plane in zip(parts, planes(torch.from_numpy(picture)), strict=True):
            assert part.dtype == np.uint16
            assert np.array_equal(part, plane.numpy())


# --- sources, and streams that are continued


def test_results_come_with_their_sources(model):
    frames = pan(1, 6, 12, 16)
    sources = [{"rgb": frame, "number": number} for number, frame in enumerate(frames)]
    asked = []
    results = list(
        Upscaler(model).stream(
            sources, pixels=lambda x: x["rgb"], is_cut=lambda x: bool(asked.append(x["number"]))
        )
    )
    assert [x.source for x in results] == sources
    assert asked == list(range(6))
    assert np.array_equal(
        np.stack([x.picture for x in results]), run(model, frames, scene_cuts=False)
    )


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.usefixtures("one_thread")
def test_a_continued_stream_gives_the_same_bits(workers, model):
    frames, cuts = noise(16, 9, 10), {0, 6, 8}
    whole = with_cuts(model, frames, cuts, workers=workers)
    upscaler = Upscaler(model, EngineOptions(workers=workers))
    assert upscaler.window_radius == RADIUS
    for done in (1, 5, 6, 7, 9, 15):
        start = max(done - RADIUS, 0)
        rest = upscaler.stream(
            range(start, 16), pixels=lambda n: frames[n], is_cut=lambda n: n in cuts,
            start=start, skip=done - start,
        )  # fmt: skip
        results = list(rest)
        assert [x.source for x in results] == list(range(done, 16))
        for number, picture in results:
            assert torch.equal(picture, whole[number]), (done, number)


def test_skipped_frames_are_not_enlarged(model, monkeypatch):
    """And those outside of all windows are not encoded."""
    calls = {"encode": 0, "decode": 0}
    for name in calls:

        def counted(x: Tensor, name=name):
            calls[name] += 1
            return getattr(MANA, name)(model, x)

        monkeypatch.setattr(model, name, counted)
    assert len(list(Upscaler(model).stream(noise(9, 8, 8), start=20, skip=5))) == 4
    assert calls == {"encode": 4 + RADIUS, "decode": 4}


# --- laziness and memory


@pytest.mark.parametrize(
    ("options", "ahead"),
    [({"workers": 1}, 0), ({"workers": 3}, 3), ({"batch": 4, "workers": 1}, 3)],
    ids=str,
)
def test_frames_are_read_as_late_as_possible(options, ahead, model):
    read = 0

    def source() -> Iterator[Tensor]:
        nonlocal read
        for frame in noise(30, 4, 5):
            read += 1
            yield frame

    results = upscale(source(), model, **options)
    assert read == 0
    for center in range(30):
        next(results)
        needed = min(center + RADIUS + 1, 30)
        assert needed <= read <= min(needed + ahead, 30)


@pytest.mark.parametrize("batch", [1, 5])
def test_each_frame_is_encoded_once_and_forgotten(batch, monkeypatch):
    model, features, encoded = lively_network(), [], 0

    def encode(frames: Tensor) -> Features:
        nonlocal encoded
        encoded += len(frames)
        result = MANA.encode(model, frames)
        features.extend(map(weakref.ref, result))
        return result

    monkeypatch.setattr(model, "encode", encode)
    for _ in upscale(noise(25, 4, 5), model, batch=batch):
        assert sum(reference() is not None for reference in features) <= len(Features._fields)
    assert encoded == 25


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_does_not_grow_with_the_number_of_frames(tmp_path, model):
    """The features and pictures of 400 frames would be 22 MB."""
    checkpoint.save(model, tmp_path / "net.safetensors")
    code = """
        import resource, sys
        import numpy as np, torch
        from mana_triton import upscale
        torch.set_num_threads(1)

        def peak(count):
            frames = (np.full((16, 16, 3), i % 256, np.uint8) for i in range(count))
            assert sum(1 for _ in upscale(frames, sys.argv[1])) == count
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

        short = peak(60)
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        print((peak(460) - short) / unit)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "net.safetensors")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 8  # MB


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_the_source_come_after_the_results_before_them(model, workers):
    running = threading.active_count()

    def broken():
        yield from noise(9, 8, 8)
        raise OSError("the camera is gone")

    results = []
    with pytest.raises(OSError, match="is gone"):
        for picture in upscale(broken(), model, workers=workers):
            results.append(picture)
    assert len(results) == 9 - RADIUS
    assert torch.equal(torch.stack(results), run(model, noise(9, 8, 8))[: 9 - RADIUS])
    assert threading.active_count() == running


# --- scene cuts


def test_scene_cuts_are_found_and_kept(model):
    scenes = [pan(seed, 6, 24, 32) for seed in (20, 21)]
    alone = torch.cat([run(model, scene) for scene in scenes])
    clip = np.concatenate(scenes)
    assert torch.equal(run(model, clip), alone)
    assert not torch.equal(run(model, clip, scene_cuts=False), alone)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), workers=st.integers(1, 2))
def test_every_scene_is_enlarged_as_if_alone(model, lengths, workers):
    frames = noise(sum(lengths), 5, 6)
    together = with_cuts(model, frames, set(np.cumsum(lengths).tolist()), workers=workers)
    scenes = torch.split(frames, lengths)
    alone = torch.cat([run(model, scene, scene_cuts=False, workers=1) for scene in scenes])
    assert torch.equal(together, alone)


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": -1}, "tile must be 'auto' or an integer >= 0, got -1"),
        ({"tile": 2.5}, "tile must be 'auto' or an integer >= 0, got 2.5"),
        ({"tile": "8"}, "tile must be 'auto' or an integer >= 0, got '8'"),
        ({"batch": 0}, "batch must be 'auto' or an integer >= 1, got 0"),
        ({"workers": 0}, "workers must be 'auto' or an integer >= 1, got 0"),
        ({"memory_budget": -1}, "memory_budget must be None or bytes > 0, got -1"),
        ({"precision": "fp8"}, "precision must be auto, fp32, bf16, fp16, got 'fp8'"),
        ({"device": "toaster"}, "device must be auto, cpu or cuda, got 'toaster'"),
        ({"device": "meta", "workers": 2}, "several workers need a CPU and PyTorch's attention"),
        ({"backend": "cudnn"}, "backend must be one of auto, triton, tiled, reference"),
        ({"backend": "triton", "device": "cpu"}, "backend 'triton' is not available"),
        ({"device": "cuda"}, "device cuda needs a CUDA GPU, there is none; use device cpu"),
    ],
)
def test_wrong_options_are_named(options, message, model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError) as caught:
        upscale([], model, **options)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), "uint8 or uint16 array or a float tensor, got float32"),
        (np.zeros((4, 5), np.uint8), "must be [H, W, 3], got [4, 5]"),
        (np.zeros((4, 5, 4), np.uint8), "must be [H, W, 3], got [4, 5, 4]"),
        (np.zeros((0, 5, 3), np.uint8), "must be [H, W, 3], got [0, 5, 3]"),
        (torch.zeros(3, 4, 5, dtype=torch.uint8), "[3, H, W] in [0, 1], got [3, 4, 5] of torch.ui"),
        (torch.zeros(4, 5, 3), "[3, H, W] in [0, 1], got [4, 5, 3] of torch.float32"),
        (torch.zeros(3, 4, 0), "[3, H, W] in [0, 1], got [3, 4, 0] of torch.float32"),
        ("frame.png", "uint8 or uint16 array or a float tensor, got str"),
    ],
)
def test_wrong_frames_are_named(frame, message, model):
    with pytest.raises(ValueError) as caught:
        list(upscale([frame], model))
    assert message in str(caught.value)


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_mixed_sizes_and_types_are_named(batch, model):
    frames = [*noise(5, 4, 6), *noise(1, 6, 4), *noise(2, 4, 6)]
    with pytest.raises(ValueError, match=r"one size, 6x4 as the first, got 4x6 at frame 5$"):
        list(upscale(frames, model, batch=batch))
    mixed = [*pan(0, 2, 4, 6), *pan(0, 1, 4, 6).astype(np.uint16)]
    with pytest.raises(ValueError, match=r"one type, torch\.uint8 as the first, got torch\.uint16"):
        list(upscale(mixed, model, batch=batch))
