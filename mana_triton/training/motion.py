"""Clips from stills: a camera that pans, zooms and turns, and objects that move on their own paths.

A path is seven affine maps [7, 2, 3] from output (x, y, 1) to texture (x, y), in pixels. The center
frame of a camera path is the still itself, so the target of training is never resampled.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from mana_triton.training.clips import WINDOW, Clip


@dataclass(frozen=True)
class Span:
    """One axis of a crop with its margin, in a picture scaled from `full` to `scaled` pixels."""

    start: int
    length: int
    margin: int  # LR pixels before the crop
    full: int
    scaled: int

    def source(self, start: int, stop: int) -> tuple[int, int]:
        """The pixels of the unscaled picture that scaled pixels start..stop-1 come from."""
        ratio = self.full / self.scaled
        return round(start * ratio), round(stop * ratio)


def still_frames(clip: Clip, seed: int) -> Iterator[np.ndarray]:
    """A still under synthetic camera motion: seven frames [H, W, 3] uint8."""
    _, H, W, _ = clip.shape
    rng = np.random.Generator(np.random.Philox(seed=seed))
    rows, cols = (Span(start=0, length=n, margin=0, full=n, scaled=n) for n in (H, W))
    yield from _to_uint8(_warp_still(clip, rows, cols, _motion(rng, H, W))).numpy()


def moving_still(
    clip: Clip, others: list[Clip], rows: Span, cols: Span, size: int, rng: np.random.Generator
) -> Tensor:
    """A region of a still under camera motion, with up to two objects from other stills.

    Args:
        clip: the still.
        others: stills that objects are cut from.
        rows, cols: the region.
        size: pixels of the crop without its margin; objects are a fifth to three fifths as large.
        rng: source of all random choices.

    Returns:
        [7, h, w, 3] uint8.
    """
    hr = _warp_still(clip, rows, cols, _motion(rng, rows.length, cols.length))
    for _ in range(rng.choice(3, p=[0.5, 0.3, 0.2])):
        other = others[rng.integers(len(others))]
        _paste(hr, _sprite(other, rng, size), rng)
    return _to_uint8(hr)


def _to_uint8(frames: Tensor) -> Tensor:
    """[7, 3, H, W] in 0..255 -> [7, H, W, 3] uint8, in place."""
    frames = frames.add_(0.5).clamp_(0, 255).to(torch.uint8)
    return rearrange(frames, "t c h w -> t h w c").contiguous()


def shrink(frames: Tensor, height: int, width: int) -> Tensor:
    """Antialiased resize of [T, h, w, 3] uint8, for augmentation only."""
    if frames.shape[1:3] == (height, width):
        return frames
    x = rearrange(frames, "t h w c -> t c h w")
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True)
    return rearrange(x, "t c h w -> t h w c").contiguous()


def _motion(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Maps [7, 2, 3]: a smooth pan, zoom and rotation about the middle, with a little shake."""
    t = np.arange(WINDOW) - WINDOW // 2
    moves, turns, shakes = rng.random(3) < (0.9, 0.4, 0.5)
    angle, zoom = rng.normal(0, 0.01, 2) * turns
    direction = rng.uniform(0, 2 * math.pi)
    speed = 24 * rng.random() ** 2 * moves  # HR pixels per frame
    velocity = speed * np.array([math.cos(direction), math.sin(direction)])
    bend = rng.normal(0, 0.06, 2) * speed
    shift = t[:, None] * velocity + t[:, None] ** 2 * bend
    shift += rng.normal(0, 0.5, (WINDOW, 2)) * shakes * (t != 0)[:, None]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    return _similarity(angle * t, np.exp(zoom * t), middle, middle + shift)


def _similarity(
    angle: np.ndarray, zoom: np.ndarray, origin: np.ndarray, image: np.ndarray
) -> np.ndarray:
    """Maps that turn by angle [7], scale by zoom [7] and take origin [2] to image [7, 2]."""
    cos, sin = zoom * np.cos(angle), zoom * np.sin(angle)
    linear = rearrange(np.stack([cos, -sin, sin, cos]), "(i j) t -> t i j", i=2)
    return np.concatenate([linear, (image - linear @ origin)[:, :, None]], axis=2)


def _warp(texture: Tensor, maps: np.ndarray, height: int, width: int, padding: str) -> Tensor:
    """Sample texture [C, h, w] at maps [7, 2, 3]: [7, C, height, width], bicubic."""
    h, w = texture.shape[1:]
    size = np.array([w, h])[:, None]
    unit = maps * 2 / size  # pixel centers: x -> (2x + 1) / w - 1
    unit[:, :, 2:] += 1 / size - 1
    unit = torch.from_numpy(unit).float()
    y, x = torch.arange(height).float(), torch.arange(width).float()
    along_x = unit[:, None, None, :, 0] * x[:, None]  # [7, 1, width, 2]
    along_y = unit[:, None, None, :, 1] * y[:, None, None] + unit[:, None, None, :, 2]
    texture = texture.expand(WINDOW, -1, -1, -1)
    return F.grid_sample(
        texture, along_x + along_y, mode="bicubic", padding_mode=padding, align_corners=False
    )


def _warp_still(clip: Clip, rows: Span, cols: Span, maps: np.ndarray) -> Tensor:
    """The region of a still under maps, [7, 3, h, w] in 0..255; mirrored beyond the picture."""
    corners = np.array([[x, y, 1] for x in (0, cols.length) for y in (0, rows.length)]).T
    reached = maps @ corners  # [7, 2, 4]
    low = np.floor(reached.min(axis=(0, 2))).astype(int) - 2
    high = np.ceil(reached.max(axis=(0, 2))).astype(int) + 2
    left, right = max(0, cols.start + low[0]), min(cols.scaled, cols.start + high[0])
    top, bottom = max(0, rows.start + low[1]), min(rows.scaled, rows.start + high[1])
    y0, y1 = rows.source(top, bottom)
    x0, x1 = cols.source(left, right)
    picture = torch.from_numpy(np.array(clip.frames[:, y0:y1, x0:x1]))
    picture = shrink(picture, bottom - top, right - left)[0]
    maps = maps.copy()
    maps[:, :, 2] += (cols.start - left, rows.start - top)
    texture = rearrange(picture, "h w c -> c h w").float()
    return _warp(texture, maps, rows.length, cols.length, "reflection")


def _sprite(clip: Clip, rng: np.random.Generator, size: int) -> Tensor:
    """A patch of a picture under a soft round or square mask: [4, h, w], RGB and alpha."""
    _, H, W, _ = clip.shape
    h, w = (int(size * rng.uniform(0.2, 0.6)) for _ in range(2))
    y, x = int(rng.integers(H - h + 1)), int(rng.integers(W - w + 1))
    patch = torch.from_numpy(np.array(clip.frames[0, y : y + h, x : x + w]))
    power = rng.uniform(1.5, 6)
    across = torch.linspace(-1, 1, w).abs() ** power
    down = torch.linspace(-1, 1, h).abs() ** power
    inside = 1 - across - down[:, None]
    alpha = (inside * rng.uniform(0.1, 0.5) * min(h, w)).clamp(0, 1)
    return torch.cat([rearrange(patch, "h w c -> c h w").float(), alpha[None]])


def _paste(frames: Tensor, sprite: Tensor, rng: np.random.Generator) -> None:
    """Blend a sprite [4, h, w] that moves on its own path into frames [7, 3, H, W], in place."""
    (H, W), (h, w) = frames.shape[2:], sprite.shape[1:]
    maps = _motion(rng, h, w)
    corner = rng.integers((-w // 2, -h // 2), (W - w // 2, H - h // 2))  # in the center frame
    maps[:, :, 2] -= maps[:, :, :2] @ corner
    # warp only a box around the sprite
    size = int(1.1 * math.hypot(h, w)) + 4
    middle = np.array([w / 2, h / 2]) - maps[:, :, 2]
    middle = np.linalg.solve(maps[:, :, :2], middle[:, :, None])  # [7, 2, 1]
    boxes = np.round(middle[:, :, 0] - size / 2).astype(int)
    maps[:, :, 2:] += maps[:, :, :2] @ boxes[:, :, None]
    warped = _warp(sprite, maps, size, size, "zeros")
    for frame, patch, (x, y) in zip(frames, warped, boxes.tolist(), strict=True):
        below = frame[:, max(0, y) : max(0, y + size), max(0, x) : max(0, x + size)]
        above = patch[:, max(0, -y) : max(0, H - y), max(0, -x) : max(0, W - x)]
        below += above[3:].clamp(0, 1) * (above[:3] - below)
