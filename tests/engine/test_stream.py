"""A stream gives what the network gives on whole clips, for any length, size, chunk and tile."""

import copy
import itertools
import subprocess
import sys
import textwrap
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mana_triton
from mana_triton import checkpoint
from mana_triton.checkpoint import CheckpointError
from mana_triton.engine import plan as planner
from mana_triton.engine import upscaler as stream
from mana_triton.engine.upscaler import (
    CutDetector,
    Upscaler,
    Waits,
    fastest_on_a_processor,
    in_thread,
    mirror,
    upscale,
)
from mana_triton.model import MANA, Features, MANAConfig
from mana_triton.video.color import Color, rgb_to_yuv
from mana_triton.video.reader import open_reader

ROOT = Path(__file__).parents[2]
DEMO = ROOT.parent / "shared" / "data" / "demo"
CONFIG = MANAConfig(
    channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=8, match="cosine", offsets=True
)
REACH = CONFIG.frames // 2
ROUNDING = 1e-5  # of float32 sums in another order, on values of about 1


def random_model(config: MANAConfig = CONFIG) -> MANA:
    """A network in which neighbors and memory matter, unlike in a new one."""
    torch.manual_seed(0)
    model = MANA(config)
    for layer in (model.w_z, model.w_z1, model.conv_last):
        nn.init.normal_(layer.weight, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MANA:
    return random_model()


@pytest.fixture(scope="module")
def bilinear() -> MANA:
    """A network that adds nothing to bilinear interpolation."""
    model = random_model()
    nn.init.zeros_(model.conv_last.weight)
    nn.init.zeros_(model.conv_last.bias)  # pyright: ignore[reportArgumentType]
    return model


def noise(length: int, height: int, width: int) -> Tensor:
    """[T, 3, H, W] in [0, 1]; every frame looks like a new scene."""
    return torch.rand(length, 3, height, width, generator=torch.Generator().manual_seed(length))


def texture(seed: int, side: int = 400) -> np.ndarray:
    """[side, side, 3] random blobs of some 40 pixels, 0..255."""
    rng = np.random.default_rng(seed)
    picture = rng.normal(size=(side, side, 3)) + rng.normal(size=(side, side, 1))
    for axis in (0, 1):
        spectrum = np.fft.fft(picture, axis=axis)
        shape = [-1 if i == axis else 1 for i in range(3)]
        picture = np.fft.ifft(
            spectrum * np.exp(-((24 * np.pi * np.fft.fftfreq(side)) ** 2) / 2).reshape(shape),
            axis=axis,
        ).real
    level = rng.uniform(100, 150, 3)
    return np.clip(level + 45 * picture / picture.std(), 0, 255)


def pan(seed: int, length: int, height: int = 48, width: int = 64, speed: int = 1) -> np.ndarray:
    """[T, H, W, 3] uint8: a camera moving over a texture."""
    picture = texture(seed).round().astype(np.uint8)
    starts = [speed * i for i in range(length)]
    return np.stack([picture[i : i + height, i : i + width] for i in starts])


def windows(length: int) -> list[list[int]]:
    """The frames that each center sees, by numpy's own reflection."""
    padded = np.pad(np.arange(length), REACH, mode="reflect").tolist()
    return [padded[center : center + CONFIG.frames] for center in range(length)]


def whole_clip(model: MANA, frames: Tensor, one_by_one: bool = True) -> Tensor:
    """MANA.forward on the window of each frame of [T, 3, H, W].

    With `one_by_one` the encoder takes single frames: a convolution may round differently for
    another number of pictures.
    """
    reference = Upscaler(copy.deepcopy(model)).model  # with its tolerance and memory layout
    if one_by_one:
        encode = reference.encode
        reference.encode = lambda frames: Features(
            *map(torch.cat, zip(*(encode(frame[None]) for frame in frames), strict=True))
        )
    with torch.inference_mode():
        return torch.cat([reference(frames[window][None]) for window in windows(len(frames))])


def run(model: MANA, frames, **options) -> Tensor:
    """The results of a stream as one tensor."""
    return torch.stack([torch.as_tensor(x) for x in upscale(frames, model, **options)])


# the window


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [0, 0, 0, 0, 0, 0, 0]),
        (2, [1, 0, 1, 0, 1, 0, 1, 0]),
        (3, [1, 2, 1, 0, 1, 2, 1, 0, 1]),
        (4, [3, 2, 1, 0, 1, 2, 3, 2, 1, 0]),
        (8, [3, 2, 1, 0, 1, 2, 3, 4, 5, 6, 7, 6, 5, 4]),
    ],
)
def test_window_is_mirrored_without_repeating_the_end(length, expected):
    for first in (0, 5):
        last = first + length - 1
        window = [mirror(i, first, last) - first for i in range(first - 3, last + 4)]
        assert window == expected
        assert window == np.pad(np.arange(length), 3, mode="reflect").tolist()


# streaming and whole clips


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    ("length", "height", "width"),
    [(1, 12, 16), (2, 12, 16), (3, 12, 16), (4, 7, 5), (9, 12, 16), (5, 1, 1), (2, 70, 19)],
)
@pytest.mark.usefixtures("one_thread")  # convolutions round differently for another number
def test_stream_equals_the_whole_clip_bit_for_bit(length, height, width, workers, model):
    frames = noise(length, height, width)
    exact = whole_clip(model, frames)
    frozen = whole_clip(model, frames[:1].expand_as(frames))
    assert length == 1 or (exact - frozen)[0].abs().max() > 0.01, "neighbors must matter here"
    if frames.numel() > 1000:
        assert exact.min() < 0 and exact.max() > 1, "values must need their limits here"
    result = run(model, frames, workers=workers, scene_cuts=False)
    assert torch.equal(result, exact.clamp(0, 1))
    together = whole_clip(model, frames, one_by_one=False)
    assert (together - exact).abs().max() <= ROUNDING


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("cut", [None, 2, 5])
def test_batches_do_not_change_results(batch, cut, model):
    frames = noise(9, 12, 16)

    def enlarged(batch: int) -> Tensor:
        cuts = (number == cut for number in itertools.count())
        results = Upscaler(model, batch=batch).stream(frames, is_cut=lambda _: next(cuts))
        return torch.stack([torch.as_tensor(x) for x in results])

    exact, batched = enlarged(0), enlarged(batch)
    assert (batched - exact).abs().max() <= ROUNDING


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_batches_of_arrays(kind, model):
    top = np.iinfo(kind).max
    frames = (pan(1, 8, 12, 16) / 255 * top).astype(kind)
    exact, batched = (np.stack(list(upscale(frames, model, batch=n))) for n in (0, 3))
    assert batched.dtype == kind
    # rounding may tip a number to the next integer
    assert np.abs(batched.astype(int) - exact).max() <= max(1, ROUNDING * top)


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}, {"batch": 2}, {"tile": 8}])
def test_pictures_are_finished_where_they_are(options, model):
    frames, options = pan(0, 5, 12, 16), {"scene_cuts": False} | options
    whole = list(Upscaler(model, **options).stream(frames))
    color = Color(9, siting="topleft")

    def planes(picture: Tensor) -> list[Tensor]:
        return rgb_to_yuv(picture, 10, color, False, (2, 2))

    finished = list(Upscaler(model, **options).stream(frames, finish=planes))
    assert len(finished) == len(whole) == 5
    for parts, picture in zip(finished, whole, strict=True):
        for part, plane in zip(parts, planes(torch.from_numpy(picture)), strict=True):
            assert part.dtype == np.uint16
            assert np.array_equal(part, plane.numpy())


def test_backends_agree(model):
    frames = noise(5, 19, 23)
    tiled, reference = (run(model, frames, backend=name) for name in ("tiled", "reference"))
    assert 0 < (tiled - reference).abs().max() < 2e-3


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, "bf16 (by this proc"),
        ({"amx_bf16": False, "avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16 (by this proc"),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, "fp32 (the fastest here)"),
        ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, "fp32 (the fastest here)"),
        ({"bf16": True, "architecture": "aarch64"}, "fp32 (the fastest here)"),
    ],
)  # fmt: skip
def test_bfloat16_is_chosen_where_it_is_faster(known, expected, model, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    monkeypatch.setattr(stream, "fastest_on_a_processor", fastest_on_a_processor)
    assert Upscaler(model, device="cpu").description.startswith(f"cpu, {expected}")
    assert Upscaler(model, device="cpu", precision="fp32").precision == "fp32"


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_close(precision, model):
    frames = noise(3, 9, 11)
    half = run(copy.deepcopy(model), frames, precision=precision)
    assert half.dtype == torch.float32
    assert 0 < (half - run(model, frames)).abs().max() < 0.1


# tiles


@pytest.mark.parametrize(("height", "width"), [(19, 23), (33, 7), (1, 1), (3, 40)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_tiles_change_nothing_but_rounding(blocks, height, width):
    config = MANAConfig(**(vars(CONFIG) | {"decoder_blocks": blocks}))
    model, frames = random_model(config), noise(2, height, width)
    whole = run(model, frames, tile=0)
    for tile in (1, 4, 7, 16, 100):
        assert (run(model, frames, tile=tile) - whole).abs().max() <= ROUNDING, f"{tile=}"


def test_tiles_bound_what_the_decoder_sees(model, monkeypatch):
    seen, decode = [], model.decode
    monkeypatch.setattr(model, "decode", lambda z: seen.append(z.shape[2:]) or decode(z))
    run(model, noise(1, 50, 31), tile=8)
    largest = 8 + 2 * model.receptive_field
    assert len(seen) == 7 * 4  # of ceil(50 / 8) * ceil(31 / 8)
    assert max(max(shape) for shape in seen) == largest


def test_automatic_tiles_bound_the_activations(model, monkeypatch):
    frames = noise(1, 70, 90)
    plan = Upscaler(model).plan_for(70, 90)
    assert (plan.tile, plan.why) == (0, "the whole frame fits")
    plan = Upscaler(model).plan_for(2160, 3840)
    side = plan.tile + 2 * model.receptive_field
    # activations of the widest layers: 4C at x1, 2C at x2, C/2 twice at x4, float32
    assert 0.9 * 2**28 < side**2 * 28 * CONFIG.channels * 4 <= 2**28
    assert plan.why == "256 MiB at once"
    plan = Upscaler(model, tile=48).plan_for(2160, 3840)
    assert (plan.tile, plan.why) == (48, "as asked")
    whole = run(model, frames)
    monkeypatch.setattr(planner, "TILE_BYTES", 1 << 20)
    assert 0 < Upscaler(model).plan_for(70, 90).tile < 70
    assert (run(model, frames) - whole).abs().max() <= ROUNDING


# sizes, order and types


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 10),
    height=st.integers(1, 20),
    width=st.integers(1, 20),
    division=st.fixed_dictionaries({"tile": st.sampled_from([0, 3, 8, "auto"])})
    | st.fixed_dictionaries({"batch": st.integers(1, 11)}),
    scene_cuts=st.booleans(),
    arrays=st.booleans(),
)
def test_any_clip_gives_as_many_frames_in_order(
    bilinear, length, height, width, division, scene_cuts, arrays
):
    frames = (255 * noise(length, height, width)).round() / 255
    exact = nn.functional.interpolate(frames, scale_factor=4, mode="bilinear", align_corners=False)
    given_frames = (255 * frames.movedim(1, -1)).round().byte().numpy() if arrays else frames
    results = list(upscale(given_frames, bilinear, scene_cuts=scene_cuts, **division))
    assert len(results) == length
    for result, expected in zip(results, exact, strict=True):
        if arrays:
            assert isinstance(result, np.ndarray) and result.dtype == np.uint8
            assert result.shape == (4 * height, 4 * width, 3)
            error = torch.as_tensor(result).movedim(-1, 0) - 255 * expected
            assert error.abs().max() <= 0.5 + 255 * ROUNDING
        else:
            assert isinstance(result, Tensor) and result.dtype == torch.float32
            assert result.shape == (3, 4 * height, 4 * width)
            assert (result - expected).abs().max() <= ROUNDING


def test_arrays_are_rounded_tensors(model):
    arrays = pan(2, 5, 12, 16)
    tensors = torch.from_numpy(arrays).movedim(-1, 1) / 255
    from_arrays, from_tensors = run(model, arrays), run(model, tensors)
    assert from_tensors.min() >= 0 and from_tensors.max() <= 1
    error = from_arrays - 255 * from_tensors.movedim(1, -1)
    assert error.abs().max() <= 0.5 + 255 * ROUNDING
    assert run(model, tensors.double()).sub(from_tensors).abs().max() <= ROUNDING


def test_deep_arrays_are_rounded_tensors(model):
    """16 bits in, 16 bits out, of the same frames and cuts as 8 bits."""
    arrays = pan(2, 5, 12, 16).astype(np.uint16) * 257
    arrays[3:] = 65535 - arrays[3:]
    tensors = torch.from_numpy(arrays.astype(np.float32) / 65535).movedim(-1, 1)
    results = list(upscale(arrays, model))
    assert {result.dtype for result in results} == {np.dtype(np.uint16)}
    deep = torch.from_numpy(np.stack(results).astype(np.float64)).movedim(-1, 1)
    exact = run(model, tensors).double() * 65535
    assert (deep - exact).abs().max() <= 0.5 + 65535 * ROUNDING
    assert (deep % 257 != 0).any()
    for clip in (arrays, (arrays // 257).astype(np.uint8)):
        detector = CutDetector()
        assert [detector.is_cut(frame) for frame in clip] == [False, False, False, True, False]


@pytest.mark.parametrize("kind", [iter, list, tuple, lambda frames: (x for x in frames)])
def test_any_iterable_of_frames_will_do(kind, model):
    arrays = pan(3, 4, 12, 16)
    before = arrays.copy()
    whole = run(model, arrays)
    assert torch.equal(run(model, kind(arrays)), whole)
    assert np.array_equal(arrays, before)
    tensors = torch.from_numpy(arrays).movedim(-1, 1) / 255
    assert torch.equal(run(model, kind(tensors)), run(model, tensors))


def test_views_and_read_only_arrays_will_do(model):
    arrays = pan(3, 3, 12, 16)
    wide = np.repeat(arrays, 2, 2)
    wide.flags.writeable = False
    assert torch.equal(run(model, wide[:, :, ::2]), run(model, arrays))


def test_a_stream_without_frames_is_empty(model):
    assert list(upscale([], model)) == []


def test_models_come_from_files_too(model, tmp_path):
    checkpoint.save(model, tmp_path / "net.safetensors")
    frames = noise(2, 5, 6)
    for name in (tmp_path / "net.safetensors", str(tmp_path / "net.safetensors")):
        results = list(mana_triton.upscale(frames, model=name))
        assert torch.equal(torch.stack([torch.as_tensor(x) for x in results]), run(model, frames))


# laziness and memory


@pytest.mark.parametrize(
    ("options", "ahead"),
    # a batch is read while the results of the one before are fetched
    [({}, 2), ({"workers": 1}, 0), ({"workers": 3}, 3), ({"batch": 4}, 7)],
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
        needed = min(center + REACH + 1, 30)
        assert needed <= read <= min(needed + ahead, 30)


def test_endless_streams_work(model):
    frame = noise(1, 4, 5)[0]
    assert len(list(itertools.islice(upscale(itertools.repeat(frame), model), 20))) == 20


@pytest.mark.parametrize("batch", [0, 5])
def test_each_frame_is_encoded_once_and_forgotten(batch, monkeypatch):
    model, features, encoded = random_model(), [], 0

    def encode(frames: Tensor) -> Features:
        nonlocal encoded
        encoded += len(frames)
        result = MANA.encode(model, frames)
        features.extend(map(weakref.ref, result))
        return result

    monkeypatch.setattr(model, "encode", encode)
    for _ in upscale(noise(25, 4, 5), model, batch=batch):
        alive = sum(reference() is not None for reference in features)
        assert alive <= (CONFIG.frames + 1) * len(Features._fields)
    assert encoded == 25
    assert all(reference() is None for reference in features)


@pytest.mark.skipif(sys.platform == "win32", reason="needs the resource module")
def test_memory_does_not_grow_with_length(tmp_path, model):
    """The features and pictures of 900 frames would be 50 MB."""
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

        short = peak(100)
        unit = 1 << 20 if sys.platform == "darwin" else 1 << 10
        print((peak(1000) - short) / unit)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "net.safetensors")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) < 15  # MB


# scene cuts


def find_cuts(frames) -> list[int]:
    detector = CutDetector()
    return [i for i, frame in enumerate(frames) if detector.is_cut(frame)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("form", ["array", "tensor"])
def test_joints_of_scenes_are_found(seed, form):
    scenes = [pan(10 * seed + i, length) for i, length in enumerate((9, 4, 1, 12, 6))]
    frames = np.concatenate(scenes)
    if form == "tensor":
        frames = torch.from_numpy(frames).movedim(-1, 1) / 255
    assert find_cuts(frames) == [9, 13, 14, 26]


@pytest.mark.parametrize("speed", [0, 1, 3])
@pytest.mark.parametrize("size", [(48, 64), (180, 120), (5, 7)])
def test_smooth_pan_is_one_scene(speed, size):
    assert find_cuts(pan(3, 40, *size, speed=speed)) == []


def test_shaking_camera_is_one_scene():
    """Here two frames in a row differ as much as those of a cut, but not suddenly."""
    picture = texture(4).round().astype(np.uint8)
    tops = [100 + round(min(1.25**i, 12)) * (-1) ** i for i in range(40)]
    frames = [picture[top : top + 96, 100:228] for top in tops]
    assert find_cuts(frames) == []
    assert find_cuts(frames[-2:]) == [1]


def test_slow_fade_is_one_scene():
    frame = texture(5)[:48, :64]
    assert find_cuts((frame * (1 - i / 30)).astype(np.uint8) for i in range(31)) == []


@pytest.mark.skipif(not DEMO.is_dir(), reason="the demo clips are not here")
@pytest.mark.parametrize(
    ("name", "end", "cuts"),
    [
        ("bikes-five-cuts.mp4", None, [30, 76, 137, 187, 242]),
        ("nasa.mp4", None, [202]),
        ("car-detection.mp4", 8, []),
        ("friday.mp4", None, []),
        ("walk.mkv", None, []),
    ],
)
def test_cuts_of_real_films(name, end, cuts):
    with open_reader(DEMO / name, end=end) as reader:
        assert find_cuts(frame.rgb for frame in reader) == cuts


def test_nothing_comes_from_the_other_side_of_a_cut(model):
    first, second, other = (pan(seed, 6, 24, 32) for seed in (20, 21, 22))
    clips = {
        "both": np.concatenate([first, second]),
        "other end": np.concatenate([first, other]),
        "other start": np.concatenate([other, second]),
    }
    assert all(find_cuts(clip) == [6] for clip in clips.values())
    kept = {name: run(model, clip) for name, clip in clips.items()}
    assert torch.equal(kept["both"][:6], kept["other end"][:6])
    assert torch.equal(kept["both"][6:], kept["other start"][6:])
    mixed = {name: run(model, clip, scene_cuts=False) for name, clip in clips.items()}
    for i in range(12):
        name = "other end" if i < 6 else "other start"
        near = 6 - REACH <= i < 6 + REACH
        assert torch.equal(mixed["both"][i], mixed[name][i]) != near
        assert torch.equal(mixed["both"][i], kept["both"][i]) != near


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_every_scene_is_enlarged_as_if_alone(model, lengths):
    frames = noise(sum(lengths), 5, 6)
    joints = set(np.cumsum(lengths).tolist())

    class Told(CutDetector):
        """Knows the joints."""

        def __init__(self):
            self.number = -1

        def is_cut(self, frame) -> bool:
            self.number += 1
            return self.number in joints

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "CutDetector", Told)
        together = run(model, frames)
    scenes = torch.split(frames, lengths)
    alone = torch.cat([run(model, scene, scene_cuts=False) for scene in scenes])
    assert torch.equal(together, alone)


# what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": -1}, "tile must be 'auto' or a number of pixels >= 0, got -1"),
        ({"tile": 2.5}, "tile must be 'auto' or a number of pixels >= 0, got 2.5"),
        ({"tile": "8"}, "tile must be 'auto' or a number of pixels >= 0, got '8'"),
        ({"batch": -1}, "batch must be 'auto' or a number of frames >= 0, got -1"),
        ({"batch": 1.5}, "batch must be 'auto' or a number of frames >= 0, got 1.5"),
        ({"batch": 2, "tile": 8}, "a batch is of whole frames and has one worker, got batch=2"),
        ({"batch": 2, "workers": 2}, "leave out tile and workers, or take batch 0"),
        ({"precision": "fp8"}, "precision must be auto, fp32, bf16, fp16, got 'fp8'"),
        ({"device": "toaster"}, "device must be auto, cpu or cuda, got 'toaster'"),
        ({"backend": "cudnn"}, "backend must be one of auto, triton, tiled, reference"),
        ({"backend": "triton", "device": "cpu"}, "backend 'triton' is not available"),
    ],
)
def test_wrong_options_are_named(options, message, model):
    with pytest.raises(ValueError) as caught:
        upscale([], model, **options)
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_named(model):
    with pytest.raises(ValueError, match="device cuda needs a CUDA GPU, there is none; use device"):
        Upscaler(model, device="cuda")


def test_unknown_weights_are_named():
    with pytest.raises(CheckpointError, match=r"a shipped name .* or an existing file, got 'huge'"):
        upscale([], "huge")


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
        (torch.zeros(1, 3, 4, 5), "[3, H, W] in [0, 1], got [1, 3, 4, 5]"),
        ("frame.png", "uint8 or uint16 array or a float tensor, got str"),
    ],
)
def test_wrong_frames_are_named(frame, message, model):
    with pytest.raises(ValueError) as caught:
        list(upscale([frame], model))
    assert message in str(caught.value)


@pytest.mark.parametrize("batch", [0, 2, 9])
def test_mixed_sizes_are_named(batch, model):
    """The number of the frame, not of the batch it is in."""
    frames = [*noise(5, 4, 6), *noise(1, 6, 4), *noise(2, 4, 6)]
    results = upscale(frames, model, batch=batch)
    message = "one size, 6x4 as the first, got 4x6 at frame 5$"
    with pytest.raises(ValueError, match=message):
        list(results)


# threads


class Source:
    """Numbers that count how far they were read, and notice when they are closed."""

    def __init__(self, fail_at: int | None = None):
        self.read, self.fail_at = 0, fail_at
        self.threads: set[threading.Thread] = set()
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[int]:
        try:
            for number in range(1000):
                self.threads.add(threading.current_thread())
                if number == self.fail_at:
                    raise OSError(f"no number {number}")
                self.read += 1
                yield number
        finally:
            self.closed.set()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


@pytest.mark.parametrize("depth", [1, 4])
def test_thread_keeps_the_order(depth):
    source = Source()
    assert list(in_thread(source, depth)) == list(range(1000))
    assert list(in_thread([3, 1, 2], depth)) == [3, 1, 2]
    assert list(in_thread([], depth)) == []
    assert threading.current_thread() not in source.threads
    assert not any(thread.is_alive() for thread in source.threads)


def test_waits_are_those_of_the_slower_end():
    slow, waits = 0.05, [Waits(), Waits()]

    def source():
        for n in range(6):
            time.sleep(slow)
            yield n

    list(in_thread(source(), 1, waits[0]))
    for _ in in_thread(iter(range(6)), 1, waits[1]):
        time.sleep(slow)
    assert waits[0].for_items > 4 * slow > waits[0].for_room
    assert waits[1].for_room > 2 * slow > waits[1].for_items


@pytest.mark.parametrize("fail_at", [0, 1, 7])
def test_exception_comes_in_its_place(fail_at):
    source, got = Source(fail_at), []
    with pytest.raises(OSError, match=f"no number {fail_at}"):
        for number in in_thread(source):
            got.append(number)
    assert got == list(range(fail_at))
    assert not any(thread.is_alive() for thread in source.threads)


@pytest.mark.parametrize("depth", [1, 3])
def test_read_ahead_is_bounded(depth):
    source = Source()
    numbers = in_thread(source, depth)
    assert source.read == 0
    for taken in range(1, 4):
        next(numbers)
        # `depth` wait in the queue and one more in the hand of the thread
        wait_for(lambda: source.read >= taken + depth)  # noqa: B023
        time.sleep(0.05)
        assert source.read <= taken + depth + 1
    numbers.close()


@pytest.mark.parametrize("taken", [1, 5])
def test_closing_early_stops_the_thread_and_its_generator(taken):
    source = Source()
    generator = iter(source)  # held here, so that it does not end by being forgotten
    numbers = in_thread(generator, 2)
    assert list(itertools.islice(numbers, taken)) == list(range(taken))
    numbers.close()
    assert source.closed.is_set()
    assert source.read < 1000
    assert not any(thread.is_alive() for thread in source.threads)


def test_a_failing_consumer_stops_the_thread():
    source = Source()

    def consume() -> None:
        for number in in_thread(source):
            if number == 3:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        consume()
    wait_for(source.closed.is_set)
    wait_for(lambda: not any(thread.is_alive() for thread in source.threads))


# --- frames side by side


def test_side_by_side_changes_nothing(model):
    """One thread each: the same operations on the same numbers, in the order of the frames."""
    frames = noise(9, 12, 16)
    alone = run(model, frames, workers=1)
    for workers in (2, 3, 12):
        assert torch.equal(run(model, frames, workers=workers), alone), workers


def test_side_by_side_keeps_the_callers_threads(model):
    before = torch.get_num_threads()
    stream = upscale(noise(5, 8, 8), model, workers=3)
    next(stream)
    assert torch.get_num_threads() == before
    seen = []
    thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert seen == [before]


def test_side_by_side_workers_share_the_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        shares = stream.side_by_side(lambda _: torch.get_num_threads(), range(6), 2)
        assert set(shares) == {2}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("at", [1, 6])
def test_side_by_side_an_error_comes_through_and_the_threads_end(model, at):
    running = threading.active_count()

    def frames():
        for i, frame in enumerate(noise(9, 8, 8)):
            if i == at:
                raise OSError("the camera fell off")
            yield frame

    with pytest.raises(OSError, match="fell off"):
        list(upscale(frames(), model, workers=2))
    assert threading.active_count() == running
    stream = upscale(noise(9, 8, 8), model, workers=2)
    next(stream)
    assert threading.active_count() > running
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    assert threading.active_count() == running


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_side_by_side_what_came_before_an_error_is_given(model, workers):
    frames = noise(9, 8, 8)

    def broken():
        yield from frames
        raise OSError("the camera fell off")

    given = []
    with pytest.raises(OSError, match="fell off"):
        for picture in upscale(broken(), model, workers=workers):
            given.append(picture)
    assert len(given) == 9 - REACH
    assert torch.equal(torch.stack(given), run(model, frames, workers=workers)[: 9 - REACH])


@pytest.mark.parametrize("options", [{"workers": 1}, {"workers": 2}, {"batch": 2}])
def test_results_are_ordinary_tensors(model, options):
    """Whatever mode the caller is in, now and then."""
    results = upscale(noise(9, 8, 8), model, **options)
    with torch.inference_mode():
        first = torch.as_tensor(next(results))
    scale = torch.ones((), requires_grad=True)
    for result in (first, torch.as_tensor(next(results))):
        (result.mul_(255) * scale).sum().backward()
    assert scale.grad is not None
    assert len(list(results)) == 7


def test_side_by_side_only_what_fits(model, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    small, large = Upscaler(model), Upscaler(MANA(MANAConfig.preset("paper")))
    assert small.plan_for(8, 8).workers == 4
    assert large.plan_for(64, 112).workers == 2  # 103 MB each of 256 MiB
    assert large.plan_for(1080, 1920).workers == 1
    assert Upscaler(model, workers=3).plan_for(1080, 1920).workers == 3
    with pytest.raises(ValueError, match="workers must be 'auto' or a number >= 1, got 0"):
        Upscaler(model, workers=0)
