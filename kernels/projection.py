"""Queries, keys and values of MANA (Yu et al., CVPR 2022) from encoder features, written as tiles.

    y_j = W_j (a f + b) + b_j        a, b [C]: GroupNorm's scale and shift in this frame
        = W'_j f + b'_j              W'_j = W_j diag(a), b'_j = b_j + W_j b

A second form normalizes: y_j / max(|y_j|, 1e-12). Either is then multiplied by a factor.

Why the weights take the norm: they are J D C numbers of a frame, the features H W C, so nothing is
left to do for a pixel. And it rounds once: W_j a is formed in float32, and b'_j stays there, where
normalized features would be rounded in addition to the weights. A relative error u of W_j a costs
up to u sum_c |W_jc a_c f_c|, as much as the encoder's own rounding of f has cost already, on
whichever side the norm is. It is of the order of y's own rounding unless a group's mean is far
larger than its deviation.

One program owns a block of pixels and reads its features once, for all projections.
"""

# Triton's decorator hides what its functions take and return
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

from .layout import (
    AMD,
    PIXELS,
    block_origin,
    block_pixels,
    check_operands,
    precision,
    store_rows,
    tiles_in,
)

CHANNELS = (32, 64, 128, 256)  # supported C
MOST = 3  # projections; the sums of more do not fit into the registers
SHORTEST = tl.constexpr(1e-12)  # length that a row is divided by, as in F.normalize
ROWS = 16  # of W that a program folds


@triton.jit
def _fold_kernel(
    weights,  # J of [D, C]
    biases,  # J of [D]
    scale_ptr,  # [N, C], a
    shift_ptr,  # [N, C], b
    folded_ptr,  # [N, J, D, C], W'
    offset_ptr,  # [N, J, D], b'
    C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # one program per ROWS rows of every W_j and frame
    frame = tl.program_id(1)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.arange(0, C)
    scale = tl.load(scale_ptr + frame * C + channels)[None, :]
    shift = tl.load(shift_ptr + frame * C + channels)[None, :]
    within = rows[:, None] * C + channels[None, :]
    for j in tl.static_range(J):
        w = tl.load(weights[j] + within).to(tl.float32)
        folded = (w * scale).to(folded_ptr.dtype.element_ty)
        tl.store(folded_ptr + (frame * J + j) * D * C + within, folded)
        offset = tl.load(biases[j] + rows).to(tl.float32) + tl.sum(w * shift, axis=1)
        tl.store(offset_ptr + (frame * J + j) * D + rows, offset)


@triton.jit
def _project_kernel(
    f_ptr,  # [N, H, W, C]
    folded_ptr,  # [N, J, D, C]
    offset_ptr,  # [N, J, D]
    factors,  # J of [] or None
    outputs,  # J of [N, pixels, D] tiles
    height, width, tiles_x, pixels,
    C: tl.constexpr, D: tl.constexpr, J: tl.constexpr, NORMALIZE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program per block of pixels and frame
    block, frame = tl.program_id(0), tl.program_id(1).to(tl.int64)
    top, left = block_origin(block, tiles_x, BLOCK_M)
    y, x = block_pixels(BLOCK_M)
    y, x = y + top, x + left
    inside = ((y < height) & (x < width))[:, None]
    pixel = ((frame * height + y) * width + x)[:, None]
    k, d = tl.arange(0, BLOCK_K), tl.arange(0, D)
    rows = (frame * J * D + d)[None, :] * C
    accs = ()  # J of [M, D]
    for _ in tl.static_range(J):
        accs += (tl.zeros([BLOCK_M, D], tl.float32),)
    for start in tl.range(0, C, BLOCK_K):
        channels = start + k
        f = tl.load(f_ptr + pixel * C + channels[None, :], mask=inside, other=0.0)  # [M, K]
        sums = ()
        for j in tl.static_range(J):
            w = tl.load(folded_ptr + rows + j * D * C + channels[:, None])  # [K, D]
            sums += (tl.dot(f, w, accs[j], input_precision=PRECISION),)
        accs = sums
    for j in tl.static_range(J):
        acc = accs[j] + tl.load(offset_ptr + (frame * J + j) * D + d)[None, :]
        if NORMALIZE[j]:
            length = tl.sqrt(tl.sum(acc * acc, axis=1))
            acc /= tl.maximum(length, SHORTEST)[:, None]
        if factors[j] is not None:
            acc *= tl.load(factors[j])
        acc = tl.where(inside, acc, 0.0)
        store_rows(outputs[j], acc, frame * pixels + block * BLOCK_M, BLOCK_M, D)


def launch_config(d: int, dtype: torch.dtype, amd: bool = AMD) -> dict[str, Any]:
    """Block sizes and launch options of the projection: M pixels, K channels at a time.

    Constants, not tuned: the kernel's time is that of reading features and writing tiles once, and
    what a program does depends on no frame's size. M is as large as leaves the sums of all
    projections in the registers of eight warps: the folded weights, read again by every program,
    then cost little. tests/kernels/test_compile_guard.py keeps them from spilling.
    """
    block_m, block_k = (32, 16) if dtype == torch.float32 else (128 if d <= 64 else 64, 32)
    return {
        "BLOCK_M": block_m, "BLOCK_K": block_k, "PRECISION": precision(dtype, amd),
        "num_warps": 8, "num_stages": 3 if d <= 64 else 2,
    }  # fmt: skip


def project(
    f: Tensor,
    norm: tuple[Tensor, Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    normalize: Sequence[bool],
    factors: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Project features to queries, keys, values, as the tiles that `attend_tiles` reads.

    Nothing is copied from the host and nothing waits for the device: a CUDA graph may hold it.
    There is no gradient.

    Args:
        f: [N, C, H, W] encoder features, channels_last in memory (another order is copied);
            float16, bfloat16 or float32, C one of CHANNELS. Rows of a frame are features, too: the
            tiles then start at the first of them.
        norm: scale and shift of each frame, [N, C] float32; see `MANA.normalization`.
        weights: at most MOST of [D, C], D one of HEAD_DIMS; float32 or the type of f.
        biases: as many of [D].
        normalize: which of them give rows of length 1.
        factors: [] float32 that the rows of each are multiplied with at last; None is 1. Queries of
            `attend_tiles` take its s log2(e).

    Returns:
        Of each projection [N, pixels, D] in the type of f: tiles, zero beyond the frame.

    Raises:
        ValueError: for sizes or types other than these, and where a gradient is expected.
    """
    _check(f, norm, weights, biases, normalize, factors)
    f = rearrange(f, "n c h w -> n h w c").contiguous()
    scale, shift = (x.contiguous() for x in norm)
    weights, biases = (tuple(x.contiguous() for x in part) for part in (weights, biases))
    n, height, width, c = f.shape
    j, d = len(weights), weights[0].shape[0]
    tiles_y, tiles_x = tiles_in(height, width)
    pixels = tiles_y * tiles_x * PIXELS
    folded = f.new_empty(n, j, d, c)
    offset = scale.new_empty(n, j, d)
    outputs = tuple(f.new_empty(n, pixels, d) for _ in weights)
    config = launch_config(d, f.dtype)
    sizes: dict[str, Any] = {"C": c, "D": d, "J": j}
    with torch.cuda.device_of(f):
        _fold_kernel[(d // ROWS, n)](
            weights, biases, scale, shift, folded, offset, **sizes, ROWS=ROWS
        )
        _project_kernel[(pixels // config["BLOCK_M"], n)](
            f, folded, offset, tuple(factors), outputs, height, width, tiles_x, pixels,
            **sizes, NORMALIZE=tuple(map(bool, normalize)), **config,
        )  # fmt: skip
    return outputs


def _check(f: Tensor, norm: Sequence, weights: Sequence, biases: Sequence, *rest: Sequence) -> None:
    tensors = f, *norm, *weights, *biases
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        raise ValueError(
            "project must be called without gradients, got a tensor that requires one; "
            "use torch.no_grad() or the modules of the network"
        )
    n, c = f.shape[:2]
    if c not in CHANNELS or not f.numel():
        raise ValueError(
            f"f must be [N, C, H, W], not empty, C one of {', '.join(map(str, CHANNELS))}, "
            f"got {list(f.shape)}; use the modules of the network"
        )
    counts = [len(x) for x in (weights, biases, *rest)]
    if not 1 <= counts[0] <= MOST or len(set(counts)) > 1:
        raise ValueError(
            f"weights, biases, normalize and factors must be equally many, 1 to {MOST}, "
            f"got {', '.join(map(str, counts))}; call once for each group"
        )
    d = weights[0].shape[0]
    check_operands(d, f.dtype)
    for name, group, shape in (
        ("norm", norm, [n, c]), ("weights", weights, [d, c]), ("biases", biases, [d])
    ):  # fmt: skip
        for x in group:
            if list(x.shape) != shape:
                raise ValueError(f"{name} must be {shape}, got {list(x.shape)}; reshape them")
