"""The backward pass, from the gradients of o, displacement and lse.

With P = a and delta_i = do_i . o_i + dd_i . displacement_i - dlse_i:

    dS_ij = P_ij (do_i . v_j + dd_i . (p_j - p_i) - delta_i)
    dq = s dS k     dk = s dS^T q     dv = P^T do     ds = sum_ij dS_ij q_i . k_j
    dsigma = sum_ij dS_ij |p_i - p_j|^2 / sigma^3

A program of dq owns a block of queries and adds over frames, one of dk and dv a block of keys: no
atomics, so equal inputs give equal bits. The gradient of the displacement flows through the key
columns of the Gaussian's product.

Gate form: a_ij = softmax_j(s q_i . k_j) w_ij is the bias form times exp(lse_bias - lse_plain). So
P = exp(s_bias - lse_plain) and delta = 0, and the plain softmax, dense, adds
dS = -P_plain (do . o + dd . displacement - dlse). The kernels compute that part with PLAIN.
"""

# Triton's decorator hides what its functions take and return
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import (
    LN_2,
    LOG2_E,
    Sizes,
    block_at,
    block_height,
    block_origin,
    block_pixels,
    block_width,
    load_rows,
    store_pixels,
    to_tiles,
)
from .forward import Result, kernel_options
from .gaussian import (
    COLUMNS,
    Tables,
    inv_2sigma2_base_2,
    no_gaussian,
    scores,
    square_distance,
    table_row,
)
from .window import farthest_query, gap, key_window, query_window, reverse_radius


@triton.jit
def _dq_kernel(
    q_ptr,  # [B, Q, D] tiles, times s log2(e)
    k_ptr,  # [B, T, K, D] tiles
    v_ptr,  # [B, T, K, D] tiles
    do_ptr,  # [B, T, Q, D] tiles
    dd_ptr,  # [B, T, Q, 16] tiles, the displacement's gradient in three parts, dx before dy
    lse_ptr,  # [B, T, Q] tiles, base 2, infinite beyond the frame
    delta_ptr,  # [B, T, Q] tiles
    query_table_ptr,  # [cells_y, cells_x, M, 16]
    key_table_ptr,  # [K, 16]
    inv_2sigma2_ptr,  # [], times log2(e)
    window_radius_ptr,  # [B, T, query tiles]
    dq_ptr,  # [B, h, W, D] float32, of the scaled q in natural units
    moment_ptr,  # [B, query blocks], sum of dS |p_i - p_j|^2
    T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels, zero_y, zero_x, cells_x,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DISPLACEMENT: tl.constexpr,
    EXACT: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    # one program per block of queries and clip, over all frames
    block, clip = tl.program_id(0), tl.program_id(1)
    dtype = k_ptr.dtype.element_ty
    top, left = block_origin(block, tiles_x, BLOCK_M)
    y, x = block_pixels(BLOCK_M)
    y, x = y + top, x + left
    b, a = block_pixels(BLOCK_N)
    c = tl.load(inv_2sigma2_ptr)
    q = load_rows(q_ptr, clip.to(tl.int64) * q_pixels + block * BLOCK_M, BLOCK_M, D)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    moment = tl.zeros([BLOCK_M, COLUMNS], tl.float32)  # by column of the Gaussian's product
    moment_exact = tl.zeros([BLOCK_M], tl.float32)
    here = tl.arange(0, COLUMNS)[None, :]
    counted = (here < 12) & (here % 3 == 0)  # one of each three parts
    for frame in range(0, T):
        image = (clip * T + frame).to(tl.int64)
        first_query = image * q_pixels + block * BLOCK_M
        window_radius = tl.load(
            window_radius_ptr + image * (q_pixels // 128) + block * BLOCK_M // 128
        )
        first_y, last_y, first_x, last_x = key_window(
            window_radius, first_row + top // 8 * 8, left // 16 * 16, height, width, BLOCK_N
        )
        across = last_x - first_x
        lse = tl.load(lse_ptr + first_query + tl.arange(0, BLOCK_M))
        delta = tl.load(delta_ptr + first_query + tl.arange(0, BLOCK_M))
        if not PLAIN:
            do = load_rows(do_ptr, first_query, BLOCK_M, D)
        if DISPLACEMENT:
            dd = load_rows(dd_ptr, first_query, BLOCK_M, COLUMNS)
            dy, dx = _displacement_gradient(dd)
        for n in tl.range(0, across * (last_y - first_y)):
            row, column = first_y + n // across, first_x + n % across
            key_block = block_at(row, column, tiles_x, BLOCK_N)
            key_y, key_x = row * block_height(BLOCK_N), column * block_width(BLOCK_N)
            first_key = image * k_pixels + key_block * BLOCK_N
            k = load_rows(k_ptr, first_key, BLOCK_N, D)
            key_columns = load_rows(key_table_ptr, key_block * BLOCK_N, BLOCK_N, COLUMNS)
            table = 0
            if not PLAIN:
                table = table_row(
                    key_y, key_x, top, left, zero_y, zero_x, cells_x, BLOCK_M, BLOCK_N
                )
            s = scores(
                q, k, query_table_ptr, table, key_columns, first_row + y, x, key_y + b, key_x + a,
                c, height, width, BLOCK_M, EXACT,
            )  # fmt: skip
            p = tl.exp2(s - lse[:, None])
            # from the block's center to the query
            r = first_row + y - key_y - (block_height(BLOCK_N) - 1) / 2
            e = x - key_x - (block_width(BLOCK_N) - 1) / 2
            mean = delta
            if DISPLACEMENT:
                mean += dy * r + dx * e
            if PLAIN:
                ds = (p * -mean[:, None]).to(dtype)
            else:
                v = load_rows(v_ptr, first_key, BLOCK_N, D)
                dp = tl.dot(do, v.T, input_precision="ieee")
                if DISPLACEMENT:
                    dp = tl.dot(dd, key_columns.T, dp, input_precision="ieee")
                ds = (p * (dp - mean[:, None])).to(dtype)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
            if not PLAIN:
                if EXACT:
                    distance = square_distance(
                        (first_row + y)[:, None], x[:, None],
                        (key_y + b)[None, :], (key_x + a)[None, :],
                    )  # fmt: skip
                    moment_exact += tl.sum(ds * distance, axis=1)
                else:
                    # |p_i - p_j|^2 by column; every factor is exact in float32
                    factor = tl.where(here == 0, -2 * e[:, None], -2 * r[:, None])
                    factor = tl.where(here == 9, (r * r + e * e)[:, None], factor)
                    factor = tl.where(here == 6, 1.0, factor)
                    moment += tl.dot(ds, key_columns) * tl.where(counted, factor, 0.0)
    store_pixels(dq_ptr, dq, clip.to(tl.int64), y, x, rows, width, D)
    if not PLAIN:
        total = tl.sum(moment_exact, axis=0) + tl.sum(tl.sum(moment, axis=1), axis=0)
        tl.store(moment_ptr + clip * tl.num_programs(0) + block, total)


@triton.jit
def _displacement_gradient(dd):
    """(dy, dx) of [M, 16] rows of three parts each."""
    column = tl.arange(0, COLUMNS)[None, :]
    dd = dd.to(tl.float32)
    dy = tl.sum(tl.where((column >= 3) & (column < 6), dd, 0.0), axis=1)
    return dy, tl.sum(tl.where(column < 3, dd, 0.0), axis=1)


@triton.jit
def _dkv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, dd_ptr, lse_ptr, delta_ptr,  # as in _dq_kernel
    query_table_ptr, key_table_ptr, inv_2sigma2_ptr, window_radius_ptr,
    reverse_radius_ptr,  # [B, T, key tiles], see window.py
    dk_ptr,  # [B, T, H, W, D]
    dv_ptr,  # [B, T, H, W, D]
    T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels, zero_y, zero_x, cells_x,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DISPLACEMENT: tl.constexpr,
    EXACT: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    # one program per block of keys, frame and clip
    block, frame, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype = k_ptr.dtype.element_ty
    image = (clip * T + frame).to(tl.int64)
    top, left = block_origin(block, tiles_x, BLOCK_N)
    b, a = block_pixels(BLOCK_N)
    first_key = image * k_pixels + block * BLOCK_N
    k = load_rows(k_ptr, first_key, BLOCK_N, D)
    if not PLAIN:
        v = load_rows(v_ptr, first_key, BLOCK_N, D)
    key_columns = load_rows(key_table_ptr, block * BLOCK_N, BLOCK_N, COLUMNS)
    c = tl.load(inv_2sigma2_ptr)
    farthest = farthest_query(reverse_radius_ptr + image * (k_pixels // 64), block, BLOCK_N)
    first_y, last_y, first_x, last_x = query_window(
        farthest, top // 8 * 8 - first_row, left // 16 * 16, rows, width, BLOCK_M
    )
    across = last_x - first_x
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, D], tl.float32)
    for n in tl.range(0, across * (last_y - first_y)):
        row, column = first_y + n // across, first_x + n % across
        query_block = block_at(row, column, tiles_x, BLOCK_M)
        query_y, query_x = row * block_height(BLOCK_M), column * block_width(BLOCK_M)
        y, x = block_pixels(BLOCK_M)
        y, x = y + query_y, x + query_x
        first_query = image * q_pixels + query_block * BLOCK_M
        q = load_rows(q_ptr, clip.to(tl.int64) * q_pixels + query_block * BLOCK_M, BLOCK_M, D)
        lse = tl.load(lse_ptr + first_query + tl.arange(0, BLOCK_M))
        mean = tl.load(delta_ptr + first_query + tl.arange(0, BLOCK_M))
        # a query tile that does not visit this block has no part in it
        window_radius = tl.load(
            window_radius_ptr + image * (q_pixels // 128) + query_block * BLOCK_M // 128
        )
        distance = gap(first_row + query_y // 8 * 8, query_x // 16 * 16, top, left)
        lse = tl.where(distance <= window_radius, lse, float("inf"))
        table = 0
        if not PLAIN:
            table = table_row(
                top, left, query_y, query_x, zero_y, zero_x, cells_x, BLOCK_M, BLOCK_N
            )
        s = scores(
            q, k, query_table_ptr, table, key_columns, first_row + y, x, top + b, left + a, c,
            height, width, BLOCK_M, EXACT, KEYS_FIRST=True,
        )  # fmt: skip
        p = tl.exp2(s - lse[None, :])
        if PLAIN:
            ds = (p * -mean[None, :]).to(dtype)
        else:
            do = load_rows(do_ptr, first_query, BLOCK_M, D)
            dv = tl.dot(p.to(dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, do.T, input_precision="ieee")
            if DISPLACEMENT:
                dd = load_rows(dd_ptr, first_query, BLOCK_M, COLUMNS)
                dy, dx = _displacement_gradient(dd)
                mean -= dy * (top + (block_height(BLOCK_N) - 1) / 2 - first_row - y)
                mean -= dx * (left + (block_width(BLOCK_N) - 1) / 2 - x)
                dp = tl.dot(key_columns, dd.T, dp, input_precision="ieee")
            ds = (p * (dp - mean[None, :])).to(dtype)
        dk = tl.dot(ds, q, dk, input_precision="ieee")
    # q carries log2(e)
    store_pixels(dk_ptr, dk * LN_2, image, top + b, left + a, height, width, D)
    if not PLAIN:
        store_pixels(dv_ptr, dv, image, top + b, left + a, height, width, D)


class Gradients(NamedTuple):
    """Of the operands of `cross_frame.forward`."""

    q: Tensor
    k: Tensor
    v: Tensor
    sigma: Tensor
    scale: Tensor


def scaled(q: Tensor, scale: Tensor) -> Tensor:
    """Queries for logits in base 2, rounded once."""
    return (q.float() * (scale * LOG2_E)).to(q.dtype)


def backward(
    do: Tensor, dd: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, sigma: Tensor,
    scale: Tensor, result: Result, *, gaussian: str, offsets: bool, first_row: int,
) -> Gradients:  # fmt: skip
    """Gradients of `cross_frame.forward`, from those of o, displacement and lse."""
    sizes, c = Sizes.of(q, k, first_row), inv_2sigma2_base_2(sigma)
    inner = (do.float() * result.o).sum(-1)
    if offsets:
        inner = inner + (dd * result.displacement).sum(-1)
    delta = inner - dlse
    tiles = [
        to_tiles(scaled(q, scale)), to_tiles(k), to_tiles(v), to_tiles(do),
        to_tiles(_displacement_columns(dd, k)) if offsets else k.new_empty(0),
        to_tiles((result.lse * LOG2_E)[..., None], float("inf")),  # P is zero beyond the frame
    ]  # fmt: skip
    # the gate form's delta belongs to its plain part
    plain_delta = to_tiles(delta[..., None])
    operands = *tiles, plain_delta if gaussian == "bias" else torch.zeros_like(plain_delta)
    windows = result.window_radius, reverse_radius(result.window_radius, sizes)
    dq, moment = _launch_dq(operands, c, windows[0], sizes, offsets)
    wide = torch.float32 if gaussian == "gate" else k.dtype  # two parts are to be added
    dk, dv = _launch_dkv(operands, c, windows, sizes, offsets, wide)
    if gaussian == "gate":
        operands = *tiles, plain_delta
        everything = max(sizes.height, sizes.width)
        near, far = (torch.full_like(x, everything) for x in windows)
        dq += _launch_dq(operands, None, near, sizes, False)[0]
        dk += _launch_dkv(operands, None, (near, far), sizes, False, wide)[0]
    dscale = (dq * q).sum()
    dsigma = moment.sum() / sigma**3
    return Gradients((dq * scale).to(q.dtype), dk.to(k.dtype), dv, dsigma, dscale)


def _displacement_columns(dd: Tensor, like: Tensor) -> Tensor:
    """The factors of the key table's columns: dx and dy, three parts each: [B, T, h, W, 16]."""
    columns = like.new_zeros(*dd.shape[:-1], COLUMNS.value)
    rest = dd.float().flip(-1)
    for part in range(3):
        columns[..., part:6:3] = rest
        rest = rest - columns[..., part:6:3]
    return columns


def _launch_dq(
    operands: tuple[Tensor, ...], c: Tensor | None, window_radius: Tensor, sizes: Sizes,
    offsets: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradient of s q and the sums of dS |p_i - p_j|^2; c None is the plain softmax."""
    k = operands[1]
    options = kernel_options("cross_frame_dq", sizes, k, DISPLACEMENT=offsets, PLAIN=c is None)
    tables = Tables.build(sizes, c, k, options)
    blocks = sizes.q_pixels // options["BLOCK_M"]
    dq = k.new_empty(sizes.B, sizes.rows, sizes.width, sizes.D, dtype=torch.float32)
    moment = k.new_empty(sizes.B, blocks, dtype=torch.float32)
    _dq_kernel[(blocks, sizes.B)](
        *operands, tables.query, tables.key, no_gaussian(k) if c is None else c, window_radius,
        dq, moment, sizes.T, *sizes.pixels, *tables[2:5], **options,
    )  # fmt: skip
    return dq, moment


def _launch_dkv(
    operands: tuple[Tensor, ...], c: Tensor | None, windows: tuple[Tensor, Tensor], sizes: Sizes,
    offsets: bool, dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of k, in `dtype`, and v; c None is the plain softmax, which does not involve v."""
    k = operands[1]
    options = kernel_options("cross_frame_dkv", sizes, k, DISPLACEMENT=offsets, PLAIN=c is None)
    tables = Tables.build(sizes, c, k, options)
    shape = (sizes.B, sizes.T, sizes.height, sizes.width, sizes.D)
    dk, dv = k.new_empty(shape, dtype=dtype), k.new_empty(shape if c is not None else 0)
    _dkv_kernel[(sizes.k_pixels // options["BLOCK_N"], sizes.T, sizes.B)](
        *operands, tables.query, tables.key, no_gaussian(k) if c is None else c, *windows,
        dk, dv, sizes.T, *sizes.pixels, *tables[2:5], **options,
    )  # fmt: skip
    return dk, dv
