"""The metrics equal their definitions, written here a second time."""

import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from clips import ALEXNET, moving
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from mana_triton import metrics
from mana_triton.metrics import psnr, rgb_to_y, ssim

needs_lpips = pytest.mark.skipif(find_spec("lpips") is None, reason="lpips is not installed")


def noisy_pair(height, width, seed=0):
    """A smooth random picture and a distorted copy: [H, W, 3] uint8 each."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 3 + c) + np.cos(y / 4 - c) for c in range(3)], axis=-1)
    a = np.clip(128 + 50 * waves + rng.normal(0, 20, waves.shape), 0, 255)
    b = np.clip(a * 0.9 + rng.normal(0, 15, a.shape), 0, 255)
    return a.round().astype(np.uint8), b.round().astype(np.uint8)


def direct_ssim(a, b):
    """SSIM of [H, W] float64, one window at a time: every 11x11 window inside the frame."""
    bell = [math.exp(-(d**2) / (2 * 1.5**2)) for d in range(-5, 6)]
    weight = np.outer(bell, bell) / sum(bell) ** 2
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    values = []
    for i in range(a.shape[0] - 10):
        for j in range(a.shape[1] - 10):
            p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
            mp, mq = (weight * p).sum(), (weight * q).sum()
            vp, vq = (weight * (p - mp) ** 2).sum(), (weight * (q - mq) ** 2).sum()
            cov = (weight * (p - mp) * (q - mq)).sum()
            luminance = (2 * mp * mq + c1) / (mp**2 + mq**2 + c1)
            values.append(luminance * (2 * cov + c2) / (vp + vq + c2))
    return sum(values) / len(values)


@pytest.mark.parametrize("size", [(11, 11), (17, 24), (30, 13)], ids=str)
def test_ssim_is_the_mean_over_whole_windows(size):
    a, b = noisy_pair(*size)
    rgb = np.mean([direct_ssim(a[..., c].astype(float), b[..., c].astype(float)) for c in range(3)])
    assert ssim(a, b) == pytest.approx(rgb, abs=1e-12)
    assert ssim(a, b, y_channel=True) == pytest.approx(
        direct_ssim(rgb_to_y(a), rgb_to_y(b)), abs=1e-12
    )
    assert 0.3 < rgb < 0.99


@pytest.mark.parametrize(
    ("rgb", "y"),
    [
        ((0, 0, 0), 16),
        ((255, 255, 255), 235),
        ((255, 0, 0), 81.481),
        ((0, 255, 0), 144.553),
        ((0, 0, 255), 40.966),
        ((10, 20, 30), 16 + (654.81 + 2571.06 + 748.98) / 255),
    ],
    ids=str,
)
def test_luma(rgb, y):
    result = rgb_to_y(np.array([[rgb]], np.uint8))
    assert result.dtype == np.float64
    assert result.shape == (1, 1)
    assert result.item() == pytest.approx(y, abs=1e-9)


def test_psnr_of_known_errors():
    a = np.full((6, 8, 3), 100, np.uint8)
    assert psnr(a, a.copy()) == math.inf
    assert psnr(a, a + np.uint8(1)) == pytest.approx(20 * math.log10(255), abs=1e-9)
    # 255 apart would wrap around in uint8 arithmetic
    assert psnr(np.zeros_like(a), np.full_like(a, 255)) == pytest.approx(0, abs=1e-9)
    one_pixel = a.copy()
    one_pixel[2, 3, 1] += 12
    assert psnr(a, one_pixel) == pytest.approx(10 * math.log10(255**2 * 144 / 144), abs=1e-9)
    luma = 128.553 * 12 / 255
    assert psnr(a, one_pixel, y_channel=True) == pytest.approx(
        10 * math.log10(255**2 * 48 / luma**2), abs=1e-9
    )


@settings(max_examples=15, deadline=None)
@given(
    metric=st.sampled_from([psnr, ssim]),
    size=st.tuples(st.integers(11, 20), st.integers(11, 20)),
    border=st.integers(0, 8),
    y_channel=st.booleans(),
)
def test_crop_border_leaves_out_exactly_the_border(metric, size, border, y_channel):
    inner = noisy_pair(*size)
    a, b = (
        np.pad(x, ((border, border), (border, border), (0, 0)), constant_values=fill)
        for x, fill in zip(inner, (0, 255), strict=True)
    )
    expected = metric(*inner, y_channel=y_channel)
    assert metric(a, b, y_channel=y_channel, crop_border=border) == pytest.approx(expected)
    if border:
        assert metric(a, b, y_channel=y_channel) < expected


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize(
    ("a", "b", "crop_border", "message"),
    [
        (np.zeros((16, 16, 3)), None, 0, r"a must be .*uint8 \[H, W, 3\], got float64 \[16, 16, 3"),
        (None, np.zeros((16, 16), np.uint8), 0, r"b must be one frame.*got uint8 \[16, 16\]"),
        (None, np.zeros((2, 16, 16, 3), np.uint8), 0, r"b must be one frame.*one at a time"),
        (None, np.zeros((16, 18, 3), np.uint8), 0, r"same size, got uint8 \[16, 16, 3\] and .*18"),
        (None, None, 8, r"must remain after cropping, got uint8 \[16, 16, 3\] and crop_border=8"),
        (None, None, -1, r"must remain after cropping.*crop_border=-1"),
    ],
    ids=["float", "gray", "clip", "sizes", "nothing-left", "negative-border"],
)
def test_wrong_frames_are_refused(metric, a, b, crop_border, message):
    frame = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        metric(frame if a is None else a, frame if b is None else b, crop_border=crop_border)


# ---- LPIPS


def direct_lpips(a: np.ndarray, b: np.ndarray, state: dict, lines: list[torch.Tensor]) -> float:
    """LPIPS from its definition, in float64."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    total = 0.0
    x, y = (
        ((torch.from_numpy(z.copy()).double().permute(2, 0, 1) / 127.5 - 1 - shift) / scale)[None]
        for z in (a, b)
    )
    for place, line in zip(ALEXNET, lines, strict=True):
        features = []
        for z in (x, y):
            if place in (3, 6):
                z = nn.functional.max_pool2d(z, 3, 2)
            weight, bias = (state[f"features.{place}.{k}"].double() for k in ("weight", "bias"))
            stride, padding = (4, 2) if place == 0 else (1, weight.shape[-1] // 2)
            features.append(nn.functional.conv2d(z, weight, bias, stride, padding).relu())
        x, y = features
        unit = [z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in features]
        total += float(((unit[0] - unit[1]) ** 2 * line.double()).sum(1).mean())
    return total


@needs_lpips
def test_lpips_is_its_definition(backbone):
    metric = metrics.LPIPS(backbone)
    a, b = moving(1, 70, 90)[0], moving(1, 70, 90, seed=1)[0]
    lines = [getattr(metric.net, f"lin{i}").model[1].weight.detach() for i in range(5)]
    exact = direct_lpips(a, b, load_file(backbone), lines)
    # 2^-24 per operation of float32; sums of up to 3456 terms and five layers stay below 1e-5
    assert metric(a, b) == pytest.approx(exact, rel=1e-5)
    assert exact > 0.01
    assert metric(a, a.copy()) == 0
    inside = direct_lpips(a[4:-4, 4:-4], b[4:-4, 4:-4], load_file(backbone), lines)
    assert metric(a, b, crop_border=4) == pytest.approx(inside, rel=1e-5)


@needs_lpips
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"must be a readable .safetensors file"),
        ({"features.0.weight": torch.zeros(64, 3, 11, 11)}, r"must hold .* 'features.0.bias'"),
        ({}, r"must hold the features.\* of torchvision's AlexNet"),
    ],
    ids=["not-safetensors", "incomplete", "empty"],
)
def test_wrong_backbone_is_refused(tmp_path, state, message):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"x" * 50)
    if state is not None:
        save_file(state, file)
    with pytest.raises(metrics.BackboneError, match=message):
        metrics.LPIPS(file)


# ---- steadiness


def test_flow_points_from_one_frame_to_the_next():
    flow = metrics.flow(*moving(2, 96, 128, speed=3))
    assert flow.shape == (2, 48, 64)
    inside = flow[:, 8:-8, 8:-8]
    assert np.round(np.median(inside, axis=(1, 2))).tolist() == [0, 3]
    assert metrics.tof(flow, flow) == 0
    assert metrics.tof(flow + np.array([3, 4])[:, None, None], flow) == pytest.approx(5, rel=1e-6)


def test_warping_error_compensates_motion():
    """A flicker of 6 steps is found, although every pixel moves by 2 pixels a frame."""
    y, x = np.mgrid[:96, :130]
    wave = 128 + 40 * np.sin(x / 6) + 40 * np.cos(y / 7)
    frames = [np.repeat(wave[:, n : n + 128, None].round().astype(np.uint8), 3, 2) for n in (2, 0)]
    before, after = frames
    still = metrics.warping_error((before, after), (before, after))
    assert np.abs(before.astype(int) - after).mean() > 5  # without compensation
    assert still is not None and still < 1
    brighter = after + np.uint8(6)
    assert metrics.warping_error((before, brighter), (before, after)) == pytest.approx(6, abs=0.6)


def test_warping_error_ignores_pixels_that_disagree():
    """The right half of the original is replaced: errors there do not count."""
    before = moving(1, 96, 128, seed=1)[0]
    after = before.copy()
    after[:, 80:] = 255 - after[:, 80:] // 2
    enlarged = after.copy()
    enlarged[:, 90:] = 0
    error = metrics.warping_error((before, enlarged), (before, after))
    assert error is not None and error < 4
    assert metrics.warping_error((before, before), (0 * before, 0 * before + 255)) is None
