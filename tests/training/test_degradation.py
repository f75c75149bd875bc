"""Degradation of real video: recipes, what they do, the cache, the samples made from it."""

import json
import math
import shutil
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from footage import textured, write_pictures
from PIL import Image

from mana_triton.resize import upscale_bicubic
from mana_triton.training import clips as data
from mana_triton.training import degradation as real
from mana_triton.training.clips import DataError
from mana_triton.training.degradation import Recipe, degrade
from mana_triton.training.sampler import Sampler

FIXTURE = Path(__file__).with_name("matlab_imresize_x4.npz")  # recorded from MATLAB

pytestmark = pytest.mark.usefixtures("one_thread")


def scene(seed: int, T: int, H: int = 83, W: int = 98) -> np.ndarray:
    """A smooth picture [T, H, W, 3] that moves by two pixels a frame."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.normal(size=(1, 3, H // 6 + 2, W // 6 + 2)))
    x = F.interpolate(x, (H, W), mode="bicubic")[0]
    frame = rearrange(128 + 50 * x, "c h w -> h w c").clamp(0, 255).byte().numpy()
    return np.stack([np.roll(frame, 2 * t, 1) for t in range(T)])


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> tuple[list[data.Clip], list[data.Clip]]:
    root = tmp_path_factory.mktemp("decoded")
    index = {}
    for number, (name, kind, T) in enumerate((("walk", "clip", 14), ("tree", "still", 1))):
        frames = scene(number, T)
        np.save(root / f"{name}.npy", frames)
        index[name] = {
            "name": name,
            "kind": kind,
            "file": f"{name}.npy",
            "shape": frames.shape,
            "cuts": [],
        }
    (root / data.INDEX).write_text(json.dumps(index))
    return data.open_clips([root], root), data.open_clips([root], root, kind="still")


def degraded(frames: np.ndarray, recipe: Recipe) -> np.ndarray:
    return np.stack(list(real.degrade_clip(frames, recipe)))


# ---- degradations


def test_matlab_bicubic_reproduces_matlab():
    with np.load(FIXTURE) as fixture:
        hr, lr = torch.from_numpy(fixture["hr"]), fixture["lr"]
    np.testing.assert_array_equal(degrade(hr, "matlab_bicubic").numpy(), lr)
    np.testing.assert_array_equal(degrade(hr.expand(2, 3, -1, -1, -1)).numpy()[1, 2], lr)


def exact_bicubic_row(row: list[int], factor: Fraction, length: int) -> list[Fraction]:
    """Keys' cubic in rational numbers, one output pixel after the other."""
    stretch = max(Fraction(1), 1 / factor)
    out = []
    for i in range(length):
        center = (i + Fraction(1, 2)) / factor - Fraction(1, 2)
        total = norm = Fraction(0)
        for j in range(int(center - 2 * stretch) - 2, int(center + 2 * stretch) + 3):
            x = abs(center - j) / stretch
            if x >= 2:
                continue
            if x <= 1:
                weight = (3 * x**3 - 5 * x**2 + 2) / 2
            else:
                weight = (-(x**3) + 5 * x**2 - 8 * x + 4) / 2
            mirrored = -1 - j if j < 0 else 2 * len(row) - 1 - j if j >= len(row) else j
            total += weight * row[mirrored]
            norm += weight
        out.append(total / norm)
    return out


@pytest.mark.parametrize("factor", [Fraction(1, 4), Fraction(4)], ids=["shrink", "enlarge"])
def test_resizing_equals_rational_arithmetic(factor):
    """The float computation is exact, also at ties, where a last bit decides the rounding."""
    H, W = (16, 20) if factor < 1 else (5, 6)
    picture = np.random.default_rng(1).choice([0, 128, 255], (H, W, 3)).astype(np.uint8)
    resize = degrade if factor < 1 else upscale_bicubic
    actual = resize(torch.from_numpy(picture)).numpy()
    for channel in range(3):
        rows = picture[:, :, channel].tolist()
        rows = [exact_bicubic_row(row, factor, int(W * factor)) for row in rows]
        columns = zip(*rows, strict=True)
        columns = [exact_bicubic_row(list(c), factor, int(H * factor)) for c in columns]
        exact = [[min(255, max(0, int((x + Fraction(1, 2)) // 1))) for x in c] for c in columns]
        np.testing.assert_array_equal(actual[:, :, channel], np.array(exact).T)


def test_pil_bicubic_is_pillows():
    hr = textured(np.random.default_rng(2), 3, 24, 32)
    expected = np.asarray(Image.fromarray(hr[1]).resize((8, 6), Image.Resampling.BICUBIC))
    actual = degrade(torch.from_numpy(hr), "pil_bicubic").numpy()
    np.testing.assert_array_equal(actual[1], expected)


@pytest.mark.parametrize(
    ("hr", "method", "message"),
    [
        (torch.zeros(10, 16, 3, dtype=torch.uint8), "matlab_bicubic", "10x16; crop to 8x16"),
        (torch.zeros(0, 16, 3, dtype=torch.uint8), "matlab_bicubic", "multiples of 4"),
        (torch.zeros(8, 16, 3), "matlab_bicubic", "uint8, got .* torch.float32"),
        (torch.zeros(3, 8, 16, dtype=torch.uint8), "matlab_bicubic", r"got \[3, 8, 16\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), "cubic", "one of matlab_bicubic, pil_bicubic"),
    ],
)
def test_degrade_explains_wrong_input(hr, method, message):
    with pytest.raises(ValueError, match=message):
        degrade(hr, method)


# ---- recipes


def test_recipes_depend_on_name_and_number_alone():
    recipes = [real.draw(name, n) for name in ("walk", "tree") for n in range(200)]
    assert recipes == [real.draw(name, n) for name in ("walk", "tree") for n in range(200)]
    assert len(set(recipes)) == 400
    assert {(r.top, r.left) for r in recipes} == {(y, x) for y in range(4) for x in range(4)}
    assert {r.kernel for r in recipes} == set(real.KERNELS)
    assert {r.codec for r in recipes} == {"libx264", "libx265", None}
    assert {r.crf for r in recipes} == set(range(15, 36))
    # a share p of n recipes has the deviation sqrt(p (1 - p) / n); four of them
    for share, p in (
        ([r.blur is not None for r in recipes], 0.3),
        ([r.noise > 0 for r in recipes], 0.25),
        ([r.codec is None for r in recipes], 0.1),
    ):
        assert abs(np.mean(share) - p) < 4 * math.sqrt(p * (1 - p) / 400)


def test_a_default_recipe_is_matlab_bicubic():
    frames = scene(0, 2)
    expected = degrade(torch.from_numpy(frames[:, 3:83, 1:97]))
    assert np.array_equal(degraded(frames, Recipe(top=3, left=1)), expected)


@pytest.mark.parametrize("first, second, angle", [(1.0, 1.0, 0.0), (2.5, 0.8, 0.7), (0.3, 2.0, 2)])
def test_a_blur_kernel_has_its_standard_deviations(first, second, angle):
    """Measured along its own axes; widths far below a pixel depend on the grid."""
    kernel = real.gaussian(first, second, angle)
    reach = kernel.shape[0] // 2
    axis = torch.arange(-reach, reach + 1).double()
    y, x = axis[:, None], axis[None, :]
    assert kernel.sum() == pytest.approx(1, abs=1e-12)
    # subnormal weights once made a frame take seconds
    assert kernel[kernel > 0].min() > torch.finfo(torch.float32).tiny
    along = x * math.cos(angle) + y * math.sin(angle)
    across = y * math.cos(angle) - x * math.sin(angle)
    for direction, width in ((along, first), (across, second)):
        if min(first, second) >= 0.8:  # cut off at three deviations: 1 % of the probability
            assert (kernel * direction**2).sum() == pytest.approx(width**2, rel=0.04)
    assert (kernel * along * across).sum() == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize("gray", [False, True])
def test_noise_has_its_deviation_and_differs_between_frames(gray):
    flat = np.full((2, 160, 160, 3), 128, np.uint8)
    noise = degraded(flat, Recipe(noise=4.0, gray=gray, seed=5)).astype(float) - 128
    # 3,200 values at least; rounding adds a variance of 1/12
    assert noise.std() == pytest.approx(math.sqrt(16 + 1 / 12), rel=4 / math.sqrt(2 * 3200))
    assert (noise[0] != noise[1]).any()
    assert (noise[..., 0] == noise[..., 1]).all() == gray


@pytest.mark.parametrize("codec", ["libx264", "libx265"])
@pytest.mark.parametrize("size", [(37, 51), (38, 36)], ids=["odd", "narrow"])
def test_a_codec_keeps_frames_and_sizes_and_loses_detail(codec, size):
    frames = scene(1, 9, *size)
    errors = []
    for crf in (10, 30, 45):
        decoded = np.stack(list(real.compress(frames, codec, crf)))
        assert decoded.shape == frames.shape
        assert np.array_equal(decoded, np.stack(list(real.compress(frames, codec, crf))))
        difference = np.abs(decoded.astype(float) - frames)
        errors.append(difference.mean())
        # the frames come in order: each is nearest to its own original
        shifted = np.abs(decoded.astype(float) - np.roll(frames, 1, 0)).mean(axis=(1, 2, 3))
        assert crf == 45 or (difference.mean(axis=(1, 2, 3)) < shifted).all()
    assert 0 < errors[0] < errors[1] < errors[2]


# ---- the cache


def test_a_copied_cache_opens_without_av(clips, tmp_path, monkeypatch):
    low = real.open_low_clips(clips[0] + clips[1], tmp_path / "a", real.training_recipes)
    assert [len(variants) for variants in low.values()] == [real.VARIANTS] * 2
    moved = Path(shutil.copytree(tmp_path / "a", tmp_path / "b"))
    monkeypatch.setitem(sys.modules, "av", None)
    again = real.open_low_clips(clips[0] + clips[1], moved, real.training_recipes)
    for path, variants in low.items():
        for one, other in zip(variants, again[path], strict=True):
            assert np.array_equal(one.frames(), other.frames())
            assert (one.top, one.left) == (other.top, other.left)
    with pytest.raises(DataError, match=r"must be made with PyAV, .* or copy .*missing from where"):
        real.open_low_clips(clips[0], tmp_path / "missing", real.training_recipes)


def test_interrupted_work_is_continued(clips, tmp_path, monkeypatch):
    compress, made = real.compress, []

    def failing(*args):
        made.append(args)
        if len(made) == 2:
            raise KeyboardInterrupt
        return compress(*args)

    recipes = [Recipe(codec="libx264", crf=crf) for crf in (20, 30, 40)]
    with monkeypatch.context() as patch:
        patch.setattr(real, "compress", failing)
        with pytest.raises(KeyboardInterrupt):
            real.open_low_clips(clips[0], tmp_path, lambda name: recipes)
    assert not list(tmp_path.glob("*.part"))
    monkeypatch.setattr(real, "compress", lambda *args: made.append(args) or compress(*args))
    [variants] = real.open_low_clips(clips[0], tmp_path, lambda name: recipes).values()
    assert len(made) == 2 + 2, "the finished variant was made again"
    for recipe, variant in zip(recipes, variants, strict=True):
        assert np.array_equal(variant.frames(), degraded(clips[0][0].frames, recipe))


def test_the_same_data_elsewhere_have_the_same_recipes(tmp_path):
    """Recipes depend on the name of a clip, not on the place of its source."""
    drawn = []
    for place in ("x", "y"):
        for folder, T in (("one", 8), ("two", 9)):
            write_pictures(tmp_path / place / folder / "film", scene(0, T))
        films = [tmp_path / place / "one", tmp_path / place / "two"]
        decoded = data.open_clips(films, tmp_path / place / "cache")
        assert [(clip.name, clip.shape[0]) for clip in decoded] == [("film", 8), ("film", 9)]
        low = real.open_low_clips(decoded, tmp_path / place / "low", lambda name: [draw(name)])
        drawn.append([variant.recipe for variants in low.values() for variant in variants])
    assert drawn[0] == drawn[1]
    assert drawn[0][0] != drawn[0][1], "two clips of one name"


def draw(name: str) -> Recipe:
    """Without a codec, which takes time."""
    return replace(real.draw(name, 0), codec=None)


# ---- samples


@pytest.mark.parametrize("kind", ["clip", "still"])
def test_samples_show_the_same_place_in_both_resolutions(clips, tmp_path, kind):
    """The mean of 4x4 pixels is what the area kernel makes of them."""
    chosen = clips[0] if kind == "clip" else clips[1]
    recipes = [Recipe(top=y, left=x, kernel="area") for y, x in ((0, 0), (3, 2), (1, 3))]
    low = real.open_low_clips(chosen, tmp_path, lambda name: recipes)
    pools = ([], chosen) if kind == "still" else (chosen, [])
    sampler = Sampler(*pools, crop=12, batch=1, seed=3, low=low)
    seen = set()
    for n in range(20):
        lr, hr = sampler.sample(n, 0)
        assert lr.shape == (7, 12, 12, 3) and hr.shape == (48, 48, 3)
        mean = F.avg_pool2d(rearrange(hr, "h w c -> c h w").float(), 4)
        mean = rearrange(mean, "c h w -> h w c").round().byte()
        assert torch.equal(lr[3], mean)
        assert (lr[2] != lr[4]).any()
        seen.add(hr.numpy().tobytes())
        again = sampler.sample(n, 0)
        assert torch.equal(again[0], lr) and torch.equal(again[1], hr)
    assert len(seen) == 20
