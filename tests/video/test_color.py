"""Planes to RGB and back against the definitions of H.273 in float64, to half a code."""

from itertools import product
from typing import Any, cast

import av
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mana_triton.video import color as colors
from mana_triton.video.color import (
    MATRICES,
    SITINGS,
    Color,
    alpha_of,
    enlarge_alpha,
    from_planes,
    to_rgb,
)

# float32 computes with 24 bits, through some ten operations on codes of 16 bits
HALF_A_CODE = {8: 0.5 + 1e-4, 10: 0.5 + 1e-3, 12: 0.5 + 3e-3, 16: 0.5 + 4e-2}
BLOCKS = [(1, 1), (2, 1), (2, 2), (1, 2), (4, 1), (4, 4)]


def rgb_to_yuv(rgb: np.ndarray, *how) -> list[np.ndarray]:
    return [plane.numpy() for plane in colors.rgb_to_yuv(torch.from_numpy(rgb), *how)]


def yuv_to_rgb(planes: list[np.ndarray], *how) -> np.ndarray:
    return colors.yuv_to_rgb([torch.from_numpy(plane) for plane in planes], *how).numpy()


def codes(bits: int, full: bool) -> tuple[float, float, float]:
    """Black, the span of luma, the span of chroma."""
    top, unit = 2**bits - 1, 2 ** (bits - 8)
    return (0, top, top) if full else (16 * unit, 219 * unit, 224 * unit)


def interpolate(plane: np.ndarray, length: int, step: int, place: float, axis: int) -> np.ndarray:
    """Each pixel's chroma by its distance from the two samples around it, one by one."""
    samples = np.moveaxis(plane, axis, 0)
    out = []
    for i in range(length):
        at = (i - place * (step - 1)) / step
        low = int(np.floor(at))
        a, b = (samples[min(max(j, 0), len(samples) - 1)] for j in (low, low + 1))
        out.append(a + (b - a) * (at - low))
    return np.moveaxis(np.array(out), 0, axis)


def average(plane: np.ndarray, step: int, place: float, axis: int) -> np.ndarray:
    """Each chroma sample by the pixels of its block, or by a triangle around its pixel."""
    pixels = np.moveaxis(plane, axis, 0)
    out = []
    for i in range(-(-len(pixels) // step)):
        at = i * step + round(place * (step - 1))
        weights = {at + d: (step - abs(d)) / step**2 for d in range(1 - step, step)}
        if place == 0.5:
            weights = {i * step + d: 1 / step for d in range(step)}
        out.append(sum(w * pixels[min(max(j, 0), len(pixels) - 1)] for j, w in weights.items()))
    return np.moveaxis(np.array(out), 0, axis)


def oracle_rgb(planes: list[np.ndarray], bits: int, color: Color, blocks, top: int) -> np.ndarray:
    _, kr, kb = MATRICES[color.matrix]
    black, span, chroma_span = codes(bits, color.full_range)
    (sx, sy), (x, y) = blocks, SITINGS[color.siting]
    luma = (planes[0].astype(float) - black) / span
    height, width = luma.shape
    cb, cr = (
        interpolate(interpolate(c.astype(float), height, sy, y, 0), width, sx, x, 1)
        for c in planes[1:]
    )
    cb, cr = ((c - 2 ** (bits - 1)) / chroma_span for c in (cb, cr))
    red, blue = luma + (2 - 2 * kr) * cr, luma + (2 - 2 * kb) * cb
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.clip(top * np.stack([red, green, blue], -1), 0, top)


def oracle_yuv(rgb: np.ndarray, bits: int, color: Color, full: bool, blocks) -> list[np.ndarray]:
    _, kr, kb = MATRICES[color.matrix]
    black, span, chroma_span = codes(bits, full)
    (sx, sy), (x, y) = blocks, SITINGS[color.siting]
    r, g, b = np.moveaxis(rgb / float(np.iinfo(rgb.dtype).max), -1, 0)
    luma = kr * r + (1 - kr - kb) * g + kb * b
    chroma = (b - luma) / (2 - 2 * kb), (r - luma) / (2 - 2 * kr)
    cb, cr = (average(average(c, sy, y, 0), sx, x, 1) for c in chroma)
    planes = black + span * luma, *(2 ** (bits - 1) + chroma_span * c for c in (cb, cr))
    return [np.clip(plane, 0, 2**bits - 1) for plane in planes]


def random_rgb(height: int, width: int, bits: int, seed: int = 0) -> np.ndarray:
    kind = np.uint8 if bits == 8 else np.uint16
    return np.random.default_rng(seed).integers(
        0, np.iinfo(kind).max, (height, width, 3), kind, True
    )


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_planes_of_rgb_are_exact_to_half_a_code(bits, full):
    for matrix, blocks, siting in product((1, 6, 9), BLOCKS, SITINGS):
        for height, width in ((70, 37), (1, 1), (3, 2)):  # 70 rows are more than one band
            rgb, color = random_rgb(height, width, bits), Color(matrix, siting=siting)
            exact = oracle_yuv(rgb, bits, color, full, blocks)
            for actual, plane in zip(
                rgb_to_yuv(rgb, bits, color, full, blocks), exact, strict=True
            ):
                assert actual.shape == plane.shape
                assert np.abs(actual - plane).max() <= HALF_A_CODE[bits], (matrix, blocks, siting)


@pytest.mark.parametrize("full", [False, True], ids=["limited", "full"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_rgb_of_planes_is_exact_to_half_a_code(bits, full):
    rng, top = np.random.default_rng(0), 255 if bits == 8 else 65535
    kind = np.uint8 if bits == 8 else np.uint16
    for matrix, blocks, siting in product((1, 6, 9), BLOCKS, SITINGS):
        for height, width in ((70, 37), (1, 1), (3, 2)):
            small = -(-height // blocks[1]), -(-width // blocks[0])
            sizes = (height, width), small, small
            planes = [rng.integers(0, 2**bits, size).astype(kind) for size in sizes]
            color = Color(matrix, full, siting=siting)
            actual = yuv_to_rgb(planes, bits, color, blocks)
            exact = oracle_rgb(planes, bits, color, blocks, top)
            bound = HALF_A_CODE[8 if bits == 8 else 16]
            # limited range stretches the codes by 65535 / 56064, and so their rounding
            assert np.abs(actual - exact).max() <= bound * (1 if bits == 8 else 1.2)


@settings(max_examples=40, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    bits=st.sampled_from([8, 10, 16]),
    full=st.booleans(),
    seed=st.integers(0, 99),
)
def test_colors_survive_both_ways(height, width, bits, full, seed):
    """Without subsampling, RGB comes back within the rounding of the three codes."""
    rgb = random_rgb(height, width, bits, seed)
    planes = rgb_to_yuv(rgb, bits, Color(1, full), full, (1, 1))
    back = yuv_to_rgb(planes, bits, Color(1, full), (1, 1)).astype(int)
    _, span, chroma_span = codes(bits, full)
    worst = np.iinfo(rgb.dtype).max * (0.5 / span + 0.5 * 1.8556 / chroma_span) + 0.54
    assert np.abs(back - rgb).max() <= worst


@pytest.mark.parametrize("siting", SITINGS)
def test_a_slope_of_color_stays_where_it_is(siting):
    """Fails by half a pixel when chroma is taken to lie in the center, as swscale does."""
    ramp = np.zeros((64, 64, 3), np.uint8)
    ramp[...] = 40 + 2 * np.arange(64)[:, None, None] * np.array([1, 0, 0], np.uint8)
    for rgb in (ramp, ramp.swapaxes(0, 1).copy()):
        planes = rgb_to_yuv(rgb, 8, Color(siting=siting), True, (2, 2))
        back = yuv_to_rgb(planes, 8, Color(1, True, siting=siting), (2, 2))
        inner = np.s_[4:-4, 4:-4]
        # one step of the slope is two levels; rounding of Y and Cr is at most 1.3
        assert np.abs(back[inner].astype(int) - rgb[inner]).max() < 2


@pytest.mark.parametrize(
    "form",
    ["yuv420p", "nv12", "yuyv422", "yuv422p10le", "p010le", "p016le", "yuv444p16le", "yuv420p10be",
     "gray", "gray10le", "gray16le", "rgb24", "bgr0", "gbrp", "gbrp10le", "gbrp12le", "gbrp16le",
     "rgb48le", "rgb48be", "yuva420p", "yuvj422p"],
)  # fmt: skip
def test_every_format_is_written_and_read_alike(form):
    """Repacking by swscale must not change samples: what was written is read, by the oracle."""
    bits, color = colors.bit_depth(av.VideoFormat(form)), Color(1)
    rgb = random_rgb(16, 24, 8 if bits == 8 else 16)
    planes = colors.planes_of(torch.from_numpy(rgb), form, color, form.startswith("yuvj"))
    frame = from_planes([plane.numpy() for plane in planes], form)
    assert frame.format.name == form
    back = to_rgb(frame, Color(1, form.startswith("yuvj")))
    top = np.iinfo(back.dtype).max
    assert (top == 255) == (bits == 8)
    if av.VideoFormat(form).is_rgb:
        step = top / (2**bits - 1) / 2
        assert np.abs(back.astype(float) - rgb).max() <= step + 0.5
        return
    exact = [
        np.round(p) for p in oracle_yuv(rgb, bits, color, "j" in form, colors.chroma_block(form))
    ]
    if form.startswith("gray"):
        exact = [exact[0], *[np.full_like(exact[0], 2 ** (bits - 1))] * 2]
    wanted = oracle_rgb(exact, bits, Color(1, "j" in form), colors.chroma_block(form), top)
    # a code may have been rounded the other way where it was a tie
    step = top * (1 / 219 + 1.8556 / 224) / 2 ** (bits - 8)
    assert np.abs(back - wanted).max() <= step
    assert np.median(np.abs(back - wanted)) <= 0.6


def test_alpha_of_frames():
    alpha = np.arange(16 * 8, dtype=np.uint8).reshape(8, 16)
    pixels = np.dstack([random_rgb(8, 16, 8), alpha])
    for form in ("rgba", "bgra"):
        frame = av.VideoFrame.from_ndarray(pixels, "rgba").reformat(format=form)
        assert np.array_equal(cast(Any, alpha_of(frame)), alpha)
    deep = np.dstack([random_rgb(8, 16, 16), alpha.astype(np.uint16) * 257])
    frame = av.VideoFrame.from_ndarray(deep, "rgba64le")
    assert np.array_equal(cast(Any, alpha_of(frame)), deep[..., 3])
    assert np.array_equal(to_rgb(frame, Color()), deep[..., :3])
    pixels[..., 3] = 255
    assert alpha_of(av.VideoFrame.from_ndarray(pixels, "rgba")) is None
    assert alpha_of(av.VideoFrame.from_ndarray(pixels[..., :3].copy(), "rgb24")) is None
    flat = np.full((8, 16), 1000, np.uint16)
    assert np.array_equal(enlarge_alpha(flat, 64, 32), np.full((32, 64), 1000))
