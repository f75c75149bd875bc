"""Bicubic resizing by 4 as MATLAB's imresize computes it, exact on 8 and 16 bits."""

import math
from functools import lru_cache

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

SCALE = 4  # of the network, and of every resize here
MAX_VALUE = {torch.uint8: 255, torch.uint16: 65535, torch.float32: 1}  # what white is


@lru_cache(maxsize=256)
def resize_weights(length: int, out_length: int) -> Tensor:
    """Bicubic resampling of one axis as a matrix, as MATLAB's imresize computes it.

    Keys' cubic with a = -1/2, stretched by the factor when shrinking (antialiasing), rows of sum 1,
    the picture mirrored at its edges with the edge pixel repeated. For the factors 1/4 and 4 every
    weight is a multiple of 2^-12, so products with 8-bit pixels are exact in float32.

    Returns:
        [out_length, length] float64.
    """
    factor = out_length / length
    stretch = max(1.0, 1 / factor)
    centers = (np.arange(out_length) + 0.5) / factor - 0.5
    first = np.floor(centers - 2 * stretch).astype(int)
    taps = first[:, None] + np.arange(math.ceil(4 * stretch) + 2)  # [out_length, taps]
    x = np.abs(centers[:, None] - taps) / stretch
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x <= 1, near, np.where(x <= 2, far, 0))
    weights /= weights.sum(axis=1, keepdims=True)
    folded = taps % (2 * length)
    folded = np.minimum(folded, 2 * length - 1 - folded)
    matrix = np.zeros((out_length, length))
    np.add.at(matrix, (np.arange(out_length)[:, None], folded), weights)
    return torch.from_numpy(matrix)


def _resize_exact(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize [..., H, W, 3] uint8 or uint16 by 1/4 or 4, rounding half up once at the end.

    Of 8 bits the first axis needs 20 and runs in float32, the second needs 33 and runs in float64,
    as both do for 16 bits: all are exact, so the result depends on no order of summation.
    """
    H, W = frames.shape[-3:-1]
    first = torch.float32 if frames.dtype == torch.uint8 else torch.float64
    rows = resize_weights(H, height).to(frames.device, first)
    cols = resize_weights(W, width).to(frames.device)
    x = rows @ rearrange(frames, "... h w c -> ... h (w c)").to(first)  # [..., height, W * 3]
    x = rearrange(x, "... h (w c) -> ... h c w", c=3).double() @ cols.T
    x = x.add_(0.5).floor_().clamp_(0, MAX_VALUE[frames.dtype]).to(frames.dtype)
    return rearrange(x, "... h c w -> ... h w c").contiguous()


def matlab_bicubic(hr: Tensor) -> Tensor:
    """Shrink by 4 as MATLAB's imresize does: [..., H, W, 3] uint8 or uint16."""
    return _resize_exact(hr, hr.shape[-3] // SCALE, hr.shape[-2] // SCALE)


def upscale_bicubic(lr: Tensor) -> Tensor:
    """Enlarge by 4 with MATLAB's bicubic: [..., H, W, 3] uint8 or uint16."""
    return _resize_exact(lr, lr.shape[-3] * SCALE, lr.shape[-2] * SCALE)
