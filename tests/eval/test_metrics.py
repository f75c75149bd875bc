"""The metrics equal their definitions, written here once more from scratch."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mana_triton.metrics import psnr, rgb_to_y, ssim


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


def test_ssim_of_flat_frames_is_the_luminance_term():
    a, b = (np.full((12, 14, 3), value, np.uint8) for value in (100, 110))
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 110 + c1) / (100**2 + 110**2 + c1), abs=1e-9)


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


@pytest.mark.parametrize("y_channel", [False, True], ids=["rgb", "y"])
def test_identical_frames(y_channel):
    a, _ = noisy_pair(16, 20)
    assert psnr(a, a.copy(), y_channel=y_channel) == math.inf
    assert ssim(a, a.copy(), y_channel=y_channel) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("metric", [psnr, ssim])
@settings(max_examples=15, deadline=None)
@given(
    height=st.integers(11, 20),
    width=st.integers(11, 20),
    border=st.integers(0, 8),
    y_channel=st.booleans(),
    seed=st.integers(0, 9),
)
def test_crop_border_leaves_out_exactly_the_border(metric, height, width, border, y_channel, seed):
    inner = noisy_pair(height, width, seed)
    a, b = (
        np.pad(x, ((border, border), (border, border), (0, 0)), constant_values=fill)
        for x, fill in zip(inner, (0, 255), strict=True)
    )
    expected = metric(*inner, y_channel=y_channel)
    assert metric(a, b, y_channel=y_channel, crop_border=border) == pytest.approx(expected)
    assert metric(b, a, y_channel=y_channel, crop_border=border) == pytest.approx(expected)
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


def test_ssim_needs_a_whole_window():
    frame = np.zeros((16, 10, 3), np.uint8)
    with pytest.raises(ValueError, match="at least 11x11 pixels must remain"):
        ssim(frame, frame)


def test_luma_of_floats_is_refused():
    with pytest.raises(ValueError, match=r"rgb must be uint8 .*got float32 \[2, 3\].*round"):
        rgb_to_y(np.zeros((2, 3), np.float32))
