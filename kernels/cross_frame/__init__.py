"""Cross-frame attention of MANA (Yu et al., CVPR 2022, section 3.2), FlashAttention style.

    a_ij = softmax_j(s q_i . k_j - |p_i - p_j|^2 / (2 sigma^2))       p in pixels
    o_i  = sum_j a_ij v_j          displacement_i = sum_j a_ij (p_j - p_i)

Logits are in base 2: log2(e) s is part of q, and c = log2(e) / (2 sigma^2). For a block of queries
and one of keys whose center is (y, x), with (r, e) = query - center and (b, a) = key - center,

    -c |p_i - p_j|^2 = [2 c e, 2 c r, -c, -c (r^2 + e^2)] . [a, b, a^2 + b^2, 1]

is one more matrix product of 16 columns: the numbers on the right are exact in any half
precision, those on the left, tabulated once per distance of two blocks, are cut in three parts
that together carry 24 bits. One column more keeps the pixels beyond the frame out. The same
key columns give the displacement, and through it the gradient flows back. float32 forms the
Gaussian from the coordinates instead.

Backward, with P = a and delta_i = do_i . o_i + dd_i . displacement_i - dlse_i:

    dS_ij = P_ij (do_i . v_j + dd_i . (p_j - p_i) - delta_i)
    dq = s dS k     dk = s dS^T q     dv = P^T do     ds = sum_ij dS_ij q_i . k_j
    dsigma = sum_ij dS_ij |p_i - p_j|^2 / sigma^3

dq's programs own a block of queries and add over frames, those of dk and dv a block of keys: no
atomics, and equal inputs give equal bits.

Gate form: a_ij = softmax_j(s q_i . k_j) w_ij with the Gaussian w. It is the bias form times
exp(lse_bias - lse_plain). In the backward pass P = exp(s_bias - lse_plain) and delta = 0, while the
plain softmax, dense, adds dS = -P_plain (do . o + dd . displacement - dlse).

What is visited: a tile of 8 x 16 queries sees the tiles of 8 x 16 keys within a halo. The plan
chooses the smallest halo such that what is dropped, bounded by mean and radius of 8 x 8 keys at a
time, is at most eta of the rest (see `tiled.py`), and stays on the device.
"""

# Triton's decorator hides what its functions take and return
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config as tuning
from .layout import (
    PAIR,
    TILE,
    block_at,
    block_height,
    block_origin,
    block_pixels,
    block_shape,
    block_width,
    load_rows,
    store_pixels,
    tiles_in,
    to_tiles,
)

LOG2_E = 1.4426950408889634
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
HEADS = (16, 32, 64, 128)  # supported D
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COLUMNS = tl.constexpr(16)  # of the Gaussian's matrix product, the least a tensor core takes
BEYOND = tl.constexpr(32768.0)  # its square keeps a pixel out; a power of two is exact
FAR = tl.constexpr(-60000.0)  # logits that no weight survives, within float16's range
# c from which on every neighbor's weight is zero; the own block's rows stay above FAR
STEEPEST = 800.0


# --- tables: the 16 columns of both sides


@triton.jit
def _three_parts(x, part, DTYPE: tl.constexpr):
    """Part 0, 1 or 2 of float32 x; the sum of the three is x to 24 bits."""
    high = x.to(DTYPE)
    rest = x - high.to(tl.float32)
    middle = rest.to(DTYPE)
    low = (rest - middle.to(tl.float32)).to(DTYPE)
    return tl.where(part == 0, high, tl.where(part == 1, middle, low))


@triton.jit
def _key_table_kernel(
    table_ptr,  # [K, 16]
    height,
    width,
    tiles_x,
    BLOCK_N: tl.constexpr,
):
    # one program per block of keys
    block = tl.program_id(0)
    top, left = block_origin(block, tiles_x, BLOCK_N)
    y, x = block_pixels(BLOCK_N)
    b = (y - (block_height(BLOCK_N) - 1) / 2)[:, None]
    a = (x - (block_width(BLOCK_N) - 1) / 2)[:, None]
    beyond = ((top + y >= height) | (left + x >= width))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    value = tl.where(column < 3, a, tl.where(column < 6, b, a * a + b * b))
    value = tl.where(column < 9, value, tl.where(column < 12, 1.0, 0.0))
    value = tl.where((column == 12) & beyond, -BEYOND, value)
    rows = (block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    tl.store(table_ptr + rows * COLUMNS + column, value.to(table_ptr.dtype.element_ty))


@triton.jit
def _query_table_kernel(
    table_ptr,  # [cells_y, cells_x, M, 16]
    c_ptr,  # []
    first_row,
    zero_y,  # cell of equal origins
    zero_x,
    cells_x,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # one program per distance between a block of queries and one of keys
    cell = tl.program_id(0)
    smaller: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_N else BLOCK_N
    step_y: tl.constexpr = block_height(smaller)
    step_x: tl.constexpr = block_width(smaller)
    y, x = block_pixels(BLOCK_M)
    center_y = (cell // cells_x - zero_y) * step_y - first_row + (block_height(BLOCK_N) - 1) / 2
    center_x = (cell % cells_x - zero_x) * step_x + (block_width(BLOCK_N) - 1) / 2
    r, e = (y - center_y)[:, None], (x - center_x)[:, None]
    c = tl.load(c_ptr)
    row = -c * (r * r + e * e)
    near = row > FAR
    column = tl.arange(0, COLUMNS)[None, :]
    value = tl.where(column < 3, 2 * c * e, 2 * c * r)
    value = tl.where(near, value, 0.0)
    value = tl.where(column < 6, value, tl.where(column < 9, -c, tl.maximum(row, FAR)))
    value = tl.where(column < 12, value, tl.where(column == 12, BEYOND, 0.0))
    parts = _three_parts(value, tl.where(column < 12, column % 3, 0), table_ptr.dtype.element_ty)
    rows = (cell.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
    tl.store(table_ptr + rows * COLUMNS + column, parts)


@triton.jit
def _cell(key_y, key_x, query_y, query_x, zero_y, zero_x, cells_x,
          BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Cell of the query table for a block of keys and one of queries, by their origins."""
    smaller: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_N else BLOCK_N
    step_y: tl.constexpr = block_height(smaller)
    step_x: tl.constexpr = block_width(smaller)
    return ((key_y - query_y) // step_y + zero_y) * cells_x + (key_x - query_x) // step_x + zero_x


# --- what the kernels share


@triton.jit
def _key_window(halo, top, left, height, width, BLOCK_N: tl.constexpr):
    """Rows and columns of key blocks, in tiles within `halo` pixels of the query tile."""
    # tiles of 8 x 16, whatever the block: all kernels then see the same keys
    first_y = tl.maximum(top - halo, 0) // 8 * 8 // block_height(BLOCK_N)
    last_y = tl.cdiv(tl.minimum(top + 8 + halo, height), 8) * 8 // block_height(BLOCK_N)
    first_x = tl.maximum(left - halo, 0) // 16 * 16 // block_width(BLOCK_N)
    last_x = tl.cdiv(tl.minimum(left + 16 + halo, width), 16) * 16 // block_width(BLOCK_N)
    return first_y, last_y, first_x, last_x


@triton.jit
def _square_distance(query_y, query_x, key_y, key_x):
    """Of pixels, by coordinates that broadcast."""
    dy, dx = (query_y - key_y).to(tl.float32), (query_x - key_x).to(tl.float32)
    return dy * dy + dx * dx


# --- forward


@triton.jit
def _forward_kernel(
    q_ptr,  # [B, Q, D] tiles, times s log2(e)
    k_ptr,  # [B, T, K, D] tiles
    v_ptr,  # [B, T, K, D] tiles
    query_table_ptr,  # [cells_y, cells_x, M, 16]
    key_table_ptr,  # [K, 16]
    c_ptr,  # []
    halo_ptr,  # [B, T, query tiles]
    o_ptr,  # [B, T, h, W, D]
    displacement_ptr,  # [B, T, h, W, 2]
    lse_ptr,  # [B, T, h, W], natural
    B, T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels,
    zero_y, zero_x, cells_x, cells,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OFFSETS: tl.constexpr,
    EXACT: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    # one program per block of queries, frame and clip
    block, frame, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype = k_ptr.dtype.element_ty
    image = clip * T + frame
    top, left = block_origin(block, tiles_x, BLOCK_M)
    y, x = block_pixels(BLOCK_M)
    y, x = y + top, x + left
    halo = tl.load(halo_ptr + image * (q_pixels // 128) + block * BLOCK_M // 128)
    first_y, last_y, first_x, last_x = _key_window(
        halo, first_row + top // 8 * 8, left // 16 * 16, height, width, BLOCK_N
    )
    across = last_x - first_x
    if WARP_SPECIALIZE:
        # every operand by descriptor: one that is not loses the specialization
        q_desc = tl.make_tensor_descriptor(q_ptr, [B * q_pixels, D], [D, 1], [BLOCK_M, D])
        k_desc = tl.make_tensor_descriptor(k_ptr, [B * T * k_pixels, D], [D, 1], [BLOCK_N, D])
        v_desc = tl.make_tensor_descriptor(v_ptr, [B * T * k_pixels, D], [D, 1], [BLOCK_N, D])
        query_desc = tl.make_tensor_descriptor(
            query_table_ptr, [cells * BLOCK_M, COLUMNS], [COLUMNS, 1], [BLOCK_M, COLUMNS]
        )
        key_desc = tl.make_tensor_descriptor(
            key_table_ptr, [k_pixels, COLUMNS], [COLUMNS, 1], [BLOCK_N, COLUMNS]
        )
        q = q_desc.load([clip * q_pixels + block * BLOCK_M, 0])
    else:
        q = load_rows(q_ptr, clip.to(tl.int64) * q_pixels + block * BLOCK_M, BLOCK_M, D)
    c = tl.load(c_ptr)
    b, a = block_pixels(BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    within = tl.zeros([BLOCK_M, COLUMNS], tl.float32)  # sum of p times the key's place in its block
    center_y = tl.zeros([BLOCK_M], tl.float32)  # sum of p times the block's place
    center_x = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(0, across * (last_y - first_y), warp_specialize=WARP_SPECIALIZE):
        row, column = first_y + n // across, first_x + n % across
        key_block = block_at(row, column, tiles_x, BLOCK_N)
        key_y, key_x = row * block_height(BLOCK_N), column * block_width(BLOCK_N)
        cell = _cell(key_y, key_x, top, left, zero_y, zero_x, cells_x, BLOCK_M, BLOCK_N)
        if WARP_SPECIALIZE:
            k = k_desc.load([image * k_pixels + key_block * BLOCK_N, 0])
            key_columns = key_desc.load([key_block * BLOCK_N, 0])
        else:
            first_key = image.to(tl.int64) * k_pixels + key_block * BLOCK_N
            k = load_rows(k_ptr, first_key, BLOCK_N, D)
            key_columns = load_rows(key_table_ptr, key_block * BLOCK_N, BLOCK_N, COLUMNS)
        s = tl.dot(q, k.T, input_precision="ieee")  # [M, N]
        if EXACT:
            distance = _square_distance(
                (first_row + y)[:, None], x[:, None], (key_y + b)[None, :], (key_x + a)[None, :]
            )
            inside = (key_y + b < height) & (key_x + a < width)
            s = tl.where(inside[None, :], s - c * distance, -BEYOND * BEYOND)
        else:
            if WARP_SPECIALIZE:
                query_columns = query_desc.load([cell * BLOCK_M, 0])
            else:
                query_columns = load_rows(
                    query_table_ptr, tl.cast(cell, tl.int64) * BLOCK_M, BLOCK_M, COLUMNS
                )
            s = tl.dot(query_columns, key_columns.T, s)
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        total = tl.sum(p, axis=1)
        l = l * rescale + total
        if WARP_SPECIALIZE:
            v = v_desc.load([image * k_pixels + key_block * BLOCK_N, 0])
        else:
            v = load_rows(v_ptr, first_key, BLOCK_N, D)
        acc = tl.dot(p.to(dtype), v, acc * rescale[:, None], input_precision="ieee")
        if OFFSETS:
            within = tl.dot(
                p.to(dtype), key_columns, within * rescale[:, None], input_precision="ieee"
            )
            center_y = center_y * rescale + (key_y - first_row - top) * total
            center_x = center_x * rescale + (key_x - left) * total
        m = m_new

    image = image.to(tl.int64)
    store_pixels(o_ptr, acc / l[:, None], image, y, x, rows, width, D)
    pixel = (image * rows + y) * width + x
    inside = (y < rows) & (x < width)
    tl.store(lse_ptr + pixel, (m + tl.log2(l)) * LN_2, mask=inside)
    if OFFSETS:
        _store_displacement(
            displacement_ptr, within, center_y, center_x, l, pixel, inside, BLOCK_M, BLOCK_N
        )


@triton.jit
def _store_displacement(ptr, within, center_y, center_x, l, pixel, inside,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write (dy, dx): the sums are relative to where the block of queries begins."""
    y, x = block_pixels(BLOCK_M)
    column = tl.arange(0, COLUMNS)[None, :]
    dy = (tl.sum(tl.where(column == 3, within, 0.0), axis=1) + center_y) / l
    dx = (tl.sum(tl.where(column == 0, within, 0.0), axis=1) + center_x) / l
    tl.store(ptr + 2 * pixel, dy + (block_height(BLOCK_N) - 1) / 2 - y, mask=inside)
    tl.store(ptr + 2 * pixel + 1, dx + (block_width(BLOCK_N) - 1) / 2 - x, mask=inside)


@triton.jit
def _lse_kernel(
    q_ptr,  # [B, Q, D] tiles, times s log2(e)
    k_ptr,  # [B, T, K, D] tiles
    query_table_ptr,  # [M, 16], without a Gaussian
    key_table_ptr,  # [K, 16]
    lse_ptr,  # [B, T, h, W], natural
    T, rows, height, width, tiles_x, q_pixels, k_pixels,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # one program per block of queries, frame and clip, over all keys
    block, frame, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    image = (clip * T + frame).to(tl.int64)
    q = load_rows(q_ptr, clip.to(tl.int64) * q_pixels + block * BLOCK_M, BLOCK_M, D)
    query_columns = load_rows(query_table_ptr, 0, BLOCK_M, COLUMNS)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(0, k_pixels // BLOCK_N):
        k = load_rows(k_ptr, image * k_pixels + n * BLOCK_N, BLOCK_N, D)
        s = tl.dot(q, k.T, input_precision="ieee")  # [M, N]
        if EXACT:
            top, left = block_origin(n, tiles_x, BLOCK_N)
            b, a = block_pixels(BLOCK_N)
            inside = (top + b < height) & (left + a < width)
            s = tl.where(inside[None, :], s, -BEYOND * BEYOND)
        else:
            key_columns = load_rows(key_table_ptr, n * BLOCK_N, BLOCK_N, COLUMNS)
            s = tl.dot(query_columns, key_columns.T, s)
        m_new = tl.maximum(m, tl.max(s, axis=1))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), axis=1)
        m = m_new
    top, left = block_origin(block, tiles_x, BLOCK_M)
    y, x = block_pixels(BLOCK_M)
    y, x = y + top, x + left
    inside = (y < rows) & (x < width)
    tl.store(lse_ptr + (image * rows + y) * width + x, (m + tl.log2(l)) * LN_2, mask=inside)


# --- backward


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
    c_ptr,  # []
    halo_ptr,  # [B, T, query tiles]
    dq_ptr,  # [B, h, W, D] float32, of the scaled q in natural units
    moment_ptr,  # [B, query blocks], sum of dS |p_i - p_j|^2
    T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels, zero_y, zero_x, cells_x,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OFFSETS: tl.constexpr,
    EXACT: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    # one program per block of queries and clip, over all frames
    block, clip = tl.program_id(0), tl.program_id(1)
    dtype = k_ptr.dtype.element_ty
    top, left = block_origin(block, tiles_x, BLOCK_M)
    y, x = block_pixels(BLOCK_M)
    y, x = y + top, x + left
    b, a = block_pixels(BLOCK_N)
    c = tl.load(c_ptr)
    q = load_rows(q_ptr, clip.to(tl.int64) * q_pixels + block * BLOCK_M, BLOCK_M, D)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    moment = tl.zeros([BLOCK_M, COLUMNS], tl.float32)  # by column of the Gaussian's product
    moment_exact = tl.zeros([BLOCK_M], tl.float32)
    here = tl.arange(0, COLUMNS)[None, :]
    counted = (here < 12) & (here % 3 == 0)  # one of each three
    for frame in range(0, T):
        image = (clip * T + frame).to(tl.int64)
        first_query = image * q_pixels + block * BLOCK_M
        halo = tl.load(halo_ptr + image * (q_pixels // 128) + block * BLOCK_M // 128)
        first_y, last_y, first_x, last_x = _key_window(
            halo, first_row + top // 8 * 8, left // 16 * 16, height, width, BLOCK_N
        )
        across = last_x - first_x
        lse = tl.load(lse_ptr + first_query + tl.arange(0, BLOCK_M))
        delta = tl.load(delta_ptr + first_query + tl.arange(0, BLOCK_M))
        if not PLAIN:
            do = load_rows(do_ptr, first_query, BLOCK_M, D)
        if OFFSETS:
            dd = load_rows(dd_ptr, first_query, BLOCK_M, COLUMNS)
            dy, dx = _displacement_gradient(dd)
        for n in tl.range(0, across * (last_y - first_y)):
            row, column = first_y + n // across, first_x + n % across
            key_block = block_at(row, column, tiles_x, BLOCK_N)
            key_y, key_x = row * block_height(BLOCK_N), column * block_width(BLOCK_N)
            first_key = image * k_pixels + key_block * BLOCK_N
            k = load_rows(k_ptr, first_key, BLOCK_N, D)
            key_columns = load_rows(key_table_ptr, key_block * BLOCK_N, BLOCK_N, COLUMNS)
            s = tl.dot(q, k.T, input_precision="ieee")  # [M, N]
            if EXACT:
                distance = _square_distance(
                    (first_row + y)[:, None], x[:, None], (key_y + b)[None, :], (key_x + a)[None, :]
                )
                inside = (key_y + b < height) & (key_x + a < width)
                s = tl.where(inside[None, :], s - c * distance, -BEYOND * BEYOND)
            else:
                if PLAIN:
                    cell = 0
                else:
                    cell = _cell(key_y, key_x, top, left, zero_y, zero_x, cells_x, BLOCK_M, BLOCK_N)
                query_columns = load_rows(
                    query_table_ptr, tl.cast(cell, tl.int64) * BLOCK_M, BLOCK_M, COLUMNS
                )
                s = tl.dot(query_columns, key_columns.T, s)
            p = tl.exp2(s - lse[:, None])
            # from the block's center to the query
            r = first_row + y - key_y - (block_height(BLOCK_N) - 1) / 2
            e = x - key_x - (block_width(BLOCK_N) - 1) / 2
            mean = delta
            if OFFSETS:
                mean += dy * r + dx * e
            if PLAIN:
                ds = (p * -mean[:, None]).to(dtype)
            else:
                v = load_rows(v_ptr, first_key, BLOCK_N, D)
                dp = tl.dot(do, v.T, input_precision="ieee")
                if OFFSETS:
                    dp = tl.dot(dd, key_columns.T, dp, input_precision="ieee")
                ds = (p * (dp - mean[:, None])).to(dtype)
            dq = tl.dot(ds, k, dq, input_precision="ieee")
            if not PLAIN:
                if EXACT:
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
    q_ptr,  # as in _dq_kernel
    k_ptr,
    v_ptr,
    do_ptr,
    dd_ptr,
    lse_ptr,
    delta_ptr,
    query_table_ptr,
    key_table_ptr,
    c_ptr,
    halo_ptr,
    reach_ptr,  # [B, T, key tiles], distance of the farthest query tile that sees a key tile
    dk_ptr,  # [B, T, H, W, D]
    dv_ptr,  # [B, T, H, W, D]
    T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels, zero_y, zero_x, cells_x,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, OFFSETS: tl.constexpr,
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
    c = tl.load(c_ptr)
    reach = tl.max(_per_tile(reach_ptr + image * (k_pixels // 64), block, BLOCK_N), axis=0)
    first_y, last_y, first_x, last_x = _query_window(
        reach, top // 8 * 8 - first_row, left // 16 * 16, rows, width, BLOCK_M
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
        # a query tile that does not see this block has no part in it
        halo = tl.load(halo_ptr + image * (q_pixels // 128) + query_block * BLOCK_M // 128)
        gap = _gap(first_row + query_y // 8 * 8, query_x // 16 * 16, top, left)
        lse = tl.where(gap <= halo, lse, float("inf"))
        s = tl.dot(k, q.T, input_precision="ieee")  # [N, M]
        if EXACT:
            distance = _square_distance(
                (first_row + y)[None, :], x[None, :], (top + b)[:, None], (left + a)[:, None]
            )
            inside = (top + b < height) & (left + a < width)
            s = tl.where(inside[:, None], s - c * distance, -BEYOND * BEYOND)
        else:
            if PLAIN:
                cell = 0
            else:
                cell = _cell(top, left, query_y, query_x, zero_y, zero_x, cells_x, BLOCK_M, BLOCK_N)
            query_columns = load_rows(
                query_table_ptr, tl.cast(cell, tl.int64) * BLOCK_M, BLOCK_M, COLUMNS
            )
            s = tl.dot(key_columns, query_columns.T, s)
        p = tl.exp2(s - lse[None, :])
        if PLAIN:
            ds = (p * -mean[None, :]).to(dtype)
        else:
            do = load_rows(do_ptr, first_query, BLOCK_M, D)
            dv = tl.dot(p.to(dtype), do, dv, input_precision="ieee")
            dp = tl.dot(v, do.T, input_precision="ieee")
            if OFFSETS:
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


@triton.jit
def _per_tile(ptr, block, BLOCK: tl.constexpr):
    """What a block's one or two tiles have in [tiles]."""
    return tl.load(ptr + block * BLOCK // 64 + tl.arange(0, BLOCK // 64 if BLOCK > 64 else 1))


@triton.jit
def _gap(query_y, query_x, key_y, key_x):
    """Distance in pixels of a query tile and the tile a key is in, the larger of its two axes."""
    key_y, key_x = key_y // 8 * 8, key_x // 16 * 16
    y = tl.maximum(key_y - query_y, query_y - key_y) - 7
    x = tl.maximum(key_x - query_x, query_x - key_x) - 15
    return tl.maximum(tl.maximum(y, x), 0)


@triton.jit
def _query_window(reach, top, left, rows, width, BLOCK_M: tl.constexpr):
    """Rows and columns of the query blocks in tiles within `reach` pixels of a key tile.

    `top` counts from the first row of the queries.
    """
    first_y = tl.maximum(top - reach, 0) // 8 * 8 // block_height(BLOCK_M)
    last_y = tl.cdiv(tl.maximum(tl.minimum(top + 8 + reach, rows), 0), 8) * 8
    last_y = tl.maximum(last_y // block_height(BLOCK_M), first_y)
    first_x = tl.maximum(left - reach, 0) // 16 * 16 // block_width(BLOCK_M)
    last_x = tl.cdiv(tl.minimum(left + 16 + reach, width), 16) * 16
    return first_y, last_y, first_x, last_x // block_width(BLOCK_M)


# --- the plan: which key tiles a query tile sees


@triton.jit
def _key_tile_kernel(
    k_ptr,  # [B, T, K, D] tiles
    mean_ptr,  # [B, T, key tiles, D], rounded to the type of k
    radius_ptr,  # [B, T, key tiles], largest distance from the rounded mean
    length_ptr,  # [B, T, key tiles], largest norm
    height,
    width,
    tiles_x,
    D: tl.constexpr,
):
    # one program per key tile
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    tiles = tl.num_programs(0)
    top, left = block_origin(tile, tiles_x, 64)
    y, x = block_pixels(64)
    inside = (top + y < height) & (left + x < width)
    k = load_rows(k_ptr, (image * tiles + tile) * 64, 64, D).to(tl.float32)
    count = tl.maximum(tl.sum(inside.to(tl.float32), axis=0), 1.0)
    mean = (tl.sum(k, axis=0) / count).to(mean_ptr.dtype.element_ty)  # padding is zero
    away = k - mean.to(tl.float32)[None, :]
    radius = tl.sqrt(tl.max(tl.where(inside, tl.sum(away * away, axis=1), 0.0), axis=0))
    tl.store(mean_ptr + (image * tiles + tile) * D + tl.arange(0, D), mean)
    tl.store(radius_ptr + image * tiles + tile, radius)
    tl.store(length_ptr + image * tiles + tile, tl.sqrt(tl.max(tl.sum(k * k, axis=1), axis=0)))


@triton.jit
def _plan_kernel(
    q_ptr,  # [B, Q, D] tiles, times s log2(e)
    k_ptr,  # [B, T, K, D] tiles
    mean_ptr,  # [B, T, key tiles, D]
    radius_ptr,  # [B, T, key tiles]
    longest_ptr,  # [B, T], norm of the longest key
    c_ptr,  # []
    halo_ptr,  # [B, T, query tiles], in pixels
    eta,
    T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels,
    D: tl.constexpr, RINGS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # one program per query tile, frame and clip
    tile, frame, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    image = (clip * T + frame).to(tl.int64)
    c = tl.load(c_ptr)
    top, left = block_origin(tile, tiles_x, 128)
    y, x = block_pixels(128)
    y, x = y + top, x + left
    inside = (y < rows) & (x < width)
    q = load_rows(q_ptr, clip.to(tl.int64) * q_pixels + tile * 128, 128, D)
    length = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1))
    floor = _lse_lower_bound(
        q, k_ptr + image * k_pixels * D, first_row + y, x, c, height, width, tiles_x, D
    )

    # every key as long as the longest and aligned with the query: half of eta
    spread = tl.where(inside, length * tl.load(longest_ptr + image) - floor, float("-inf"))
    spread = tl.max(spread, axis=0)
    ring = tl.arange(0, RINGS)
    nearest = tl.maximum(8.0 * ring - 7, 0)
    # 2^100 is too much in any case, and finite
    mass = tl.exp2(tl.minimum(spread - c * nearest * nearest, 100)) * 64 * (8.0 * ring + 4)
    rings = _rings_to_keep(mass, eta / 2, RINGS)

    # key tile by key tile within: the other half
    first_y, last_y, first_x, last_x = _key_window(
        rings * 8, first_row + top, left, height, width, 64
    )
    chunks = tl.cdiv(last_x - first_x, CHUNK)
    mass = tl.zeros([RINGS], tl.float32)
    for n in range(0, chunks * (last_y - first_y)):
        tile_y = first_y + n // chunks
        tile_x = first_x + n % chunks * CHUNK + tl.arange(0, CHUNK)
        present = tile_x < last_x
        at = image * (k_pixels // 64) + tile_y * tiles_x + tile_x
        mean = tl.load(
            mean_ptr + at[:, None] * D + tl.arange(0, D)[None, :], mask=present[:, None], other=0.0
        )
        radius = tl.load(radius_ptr + at, mask=present, other=0.0)
        bound = tl.dot(q, mean.T, input_precision="ieee") + length[:, None] * radius[None, :]
        dy = tl.maximum(tile_y * 8 - (first_row + y), first_row + y - tile_y * 8 - 7)
        dx = tl.maximum(tile_x[None, :] * 8 - x[:, None], x[:, None] - tile_x[None, :] * 8 - 7)
        dy, dx = tl.maximum(dy, 0).to(tl.float32)[:, None], tl.maximum(dx, 0).to(tl.float32)
        bound = bound - c * (dy * dy + dx * dx) - floor[:, None]
        worst = tl.max(tl.where(inside[:, None], bound, float("-inf")), axis=0)  # [CHUNK]
        gap = _gap(first_row + top, left, tile_y * 8, tile_x * 8)
        its_ring = tl.where(present, (gap + 7) // 8, RINGS)
        here = its_ring[:, None] == ring[None, :]
        its_mass = tl.exp2(tl.minimum(worst, 100)) * 64
        mass += tl.sum(tl.where(here, its_mass[:, None], 0.0), axis=0)
    rings = tl.minimum(rings, _rings_to_keep(mass, eta / 2, RINGS))
    tl.store(halo_ptr + image * (q_pixels // 128) + tile, rings * 8)


@triton.jit
def _rings_to_keep(mass, eta, RINGS: tl.constexpr):
    """Smallest r such that the rings beyond r hold at most eta: mass [RINGS]."""
    from_here = tl.cumsum(mass, axis=0, reverse=True)  # of ring r and beyond
    # ring r is needed if it and what is beyond hold too much; ring 0 always is kept
    needed = (from_here > eta) & (tl.arange(0, RINGS) > 0)
    return tl.sum(needed.to(tl.int32), axis=0)


@triton.jit
def _lse_lower_bound(q, k_ptr, y, x, c, height, width, tiles_x, D: tl.constexpr):
    """Log-sum-exp, base 2, over the 3 x 3 keys around each query: [M]."""
    m = tl.full(y.shape, float("-inf"), tl.float32)
    l = tl.zeros(y.shape, tl.float32)
    for step in range(0, 9):
        # the own key comes first, so that m is finite from then on
        place = (step + 4) % 9
        dy, dx = place // 3 - 1, place % 3 - 1
        key_y, key_x = y + dy, x + dx
        inside = (key_y >= 0) & (key_y < height) & (key_x >= 0) & (key_x < width)
        pixel = (key_y // 8 * tiles_x + key_x // 8) * 64 + key_y % 8 * 8 + key_x % 8
        pointers = k_ptr + pixel.to(tl.int64)[:, None] * D + tl.arange(0, D)[None, :]
        k = tl.load(pointers, mask=inside[:, None], other=0.0)
        s = tl.sum(q.to(tl.float32) * k.to(tl.float32), axis=1) - c * (dy * dy + dx * dx)
        s = tl.where(inside, s, -BEYOND * BEYOND)
        m_new = tl.maximum(m, s)
        l = l * tl.exp2(m - m_new) + tl.exp2(s - m_new)
        m = m_new
    return m + tl.log2(l)


@triton.jit
def _reach_kernel(
    halo_ptr,  # [B, T, query tiles]
    reach_ptr,  # [B, T, key tiles]
    first_row,
    tiles_x,
    query_tiles,
    CHUNK: tl.constexpr,
):
    # one program per key tile and frame
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_y, key_x = block_origin(tile, tiles_x, 64)
    reach = tl.full([CHUNK], -1, tl.int32)
    for start in range(0, query_tiles, CHUNK):
        query_tile = start + tl.arange(0, CHUNK)
        present = query_tile < query_tiles
        halo = tl.load(halo_ptr + image * query_tiles + query_tile, mask=present, other=-1)
        query_y, query_x = block_origin(query_tile, tiles_x, 128)
        gap = _gap(first_row + query_y, query_x, key_y, key_x)
        reach = tl.maximum(reach, tl.where(gap <= halo, gap, -1))
    tl.store(reach_ptr + image * tl.num_programs(0) + tile, tl.max(reach, axis=0))


# --- launches


class _Frames(NamedTuple):
    """Sizes of one call: queries of `rows` rows from first_row on, frames of height x width."""

    B: int
    T: int
    D: int
    rows: int
    height: int
    width: int
    first_row: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, first_row: int) -> "_Frames":
        return cls(k.shape[0], k.shape[1], k.shape[4], q.shape[1], *k.shape[2:4], first_row)

    @property
    def tiles_x(self) -> int:
        return tiles_in(self.height, self.width)[1]

    @property
    def q_pixels(self) -> int:
        return tiles_in(self.rows, self.width)[0] * self.tiles_x * TILE * TILE

    @property
    def k_pixels(self) -> int:
        return tiles_in(self.height, self.width)[0] * self.tiles_x * TILE * TILE

    @property
    def query_tiles(self) -> int:
        return self.q_pixels // (TILE * PAIR)

    @property
    def key_tiles(self) -> int:
        return self.k_pixels // (TILE * TILE)


class _Tables(NamedTuple):
    """Both sides of the Gaussian's matrix product for one pair of block sizes."""

    query: Tensor  # [cells, M, 16]
    key: Tensor  # [K, 16]
    zero_y: int  # the cell at (zero_y, zero_x) is that of equal origins
    zero_x: int
    cells_x: int
    cells: int

    @classmethod
    def build(cls, frames: _Frames, c: Tensor | None, like: Tensor, config: dict) -> "_Tables":
        """Without a Gaussian, c None, one cell serves all blocks."""
        block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
        key = like.new_empty(frames.k_pixels, COLUMNS.value)
        blocks: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n}
        _key_table_kernel[(frames.k_pixels // block_n,)](
            key, frames.height, frames.width, frames.tiles_x, BLOCK_N=blocks["BLOCK_N"]
        )
        if like.dtype == torch.float32:  # forms the Gaussian from the coordinates
            return cls(key, key, 0, 0, 0, 0)
        (height_m, width_m), (height_n, width_n) = block_shape(block_m), block_shape(block_n)
        step_y, step_x = block_shape(min(block_m, block_n))
        rows, height = (tiles_in(n, 1)[0] * TILE for n in (frames.rows, frames.height))
        width = frames.tiles_x * TILE
        zero_y, zero_x = (rows - height_m) // step_y, (width - width_m) // step_x
        cells_x = zero_x + (width - width_n) // step_x + 1
        cells = (zero_y + (height - height_n) // step_y + 1) * cells_x
        if c is None:
            c, cells = _no_gaussian(like), 1
        query = like.new_empty(cells, block_m, COLUMNS.value)
        _query_table_kernel[(cells,)](query, c, frames.first_row, zero_y, zero_x, cells_x, **blocks)
        return cls(query, key, zero_y, zero_x, cells_x, cells)


def _steepness(sigma: Tensor) -> Tensor:
    """The c of this file's head, in float32; 0 for an infinite sigma."""
    return (LOG2_E / 2 / sigma.float().square()).clamp(max=STEEPEST)


def _no_gaussian(like: Tensor) -> Tensor:
    return like.new_zeros((), dtype=torch.float32)


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel makes."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def plan(
    q: Tensor, k: Tensor, c: Tensor, frames: _Frames, tolerance: float, radius: int | None
) -> Tensor:
    """Halo in pixels of every query tile: [B, T, query tiles], int32.

    Args:
        q, k: tiles, q times s log2(e).
        c: see `_steepness`.
        frames: their sizes.
        tolerance: eta; 0 sees all keys.
        radius: a fixed halo instead, if not None.
    """
    everything = max(frames.height, frames.width)
    if radius is not None or tolerance == 0:
        halo = everything if radius is None else min(radius, everything)
        return q.new_full((frames.B, frames.T, frames.query_tiles), halo, dtype=torch.int32)
    images = frames.B * frames.T
    means = k.new_empty(images, frames.key_tiles, frames.D)
    radii, lengths = k.new_empty(2, images, frames.key_tiles, dtype=torch.float32)
    constants: dict[str, Any] = {"D": frames.D}
    _key_tile_kernel[(frames.key_tiles, images)](
        k, means, radii, lengths, frames.height, frames.width, frames.tiles_x, **constants
    )
    constants |= {"RINGS": triton.next_power_of_2(everything // TILE + 2), "CHUNK": 16}
    halo = q.new_empty(frames.B, frames.T, frames.query_tiles, dtype=torch.int32)
    # the lower bound of the lse may count keys that are dropped
    _plan_kernel[(frames.query_tiles, frames.T, frames.B)](
        q, k, means, radii, lengths.amax(1), c, halo, tolerance / (1 + tolerance),
        frames.T, frames.rows, frames.height, frames.width, frames.first_row, frames.tiles_x,
        frames.q_pixels, frames.k_pixels,
        **constants, num_warps=8,
    )  # fmt: skip
    return halo


class Result(NamedTuple):
    """What `forward` computes and `backward` needs."""

    o: Tensor  # [B, T, h, W, D]
    displacement: Tensor  # [B, T, h, W, 2] float32; [0] unless asked for
    lse: Tensor  # [B, T, h, W] float32
    halo: Tensor  # the plan


def visited_fraction(result: Result, q: Tensor, k: Tensor, first_row: int) -> Tensor:
    """Share of the (query, key) pairs that `forward` visited: [] float32, on the device."""
    frames, halo = _Frames.of(q, k, first_row), result.halo
    rows, height, width, first_row = frames[3:]
    tile = torch.arange(frames.query_tiles, device=halo.device)
    across = frames.tiles_x // 2
    top, left = tile // across * TILE, tile % across * PAIR
    queries = (rows - top).clamp(0, TILE) * (width - left).clamp(0, PAIR)

    def keys(start: Tensor, length: int, size: int) -> Tensor:
        first = (start - halo).clamp(min=0) // length * length
        return ((start + length + halo + length - 1) // length * length).clamp(max=size) - first

    pairs = queries * keys(top + first_row, TILE, height) * keys(left, PAIR, width)
    return pairs.sum() / (frames.B * frames.T * rows * width * height * width)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    scale: Tensor,
    *,
    gaussian: str,
    offsets: bool,
    tolerance: float,
    first_row: int,
    radius: int | None = None,
) -> Result:
    """`reference.cross_frame_attention`, exact to the certified tolerance.

    Args:
        q, k, v, sigma, scale, gaussian, offsets, first_row: as in the reference; D is one of
            HEADS, the type one of DTYPES.
        tolerance: eta of the certificate; 0 visits every pair.
        radius: visit the tiles of keys within this many pixels of a query tile instead.
    """
    return attend_tiles(
        to_tiles(_scaled(q, scale)), to_tiles(k), to_tiles(v), sigma,
        rows=q.shape[1], height=k.shape[2], width=k.shape[3], first_row=first_row,
        gaussian=gaussian, offsets=offsets, tolerance=tolerance, radius=radius,
    )  # fmt: skip


def attend_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    *,
    rows: int,
    height: int,
    width: int,
    first_row: int,
    gaussian: str,
    offsets: bool,
    tolerance: float,
    radius: int | None = None,
) -> Result:
    """`forward` of tiles, such as `projection.project` writes and a stream keeps; no gradient.

    Nothing is copied from the host and nothing waits for the device: a CUDA graph may hold it.

    Args:
        q: [B, Q, D] queries as tiles of rows first_row .. first_row + rows - 1, times s log2(e).
        k, v: [B, T, K, D] keys and values as tiles of height x width pixels, of the type of q.
        sigma: [] width of the Gaussian in pixels.
        rows, height, width, first_row: sizes in pixels.
        gaussian, offsets, tolerance, radius: as of `forward`.

    Raises:
        ValueError: when the tensors are not tiles of these sizes, of one type.
    """
    frames = _Frames(*k.shape[:2], k.shape[-1], rows, height, width, first_row)
    c = _steepness(sigma)
    if frames.D not in HEADS:
        raise ValueError(
            f"D must be one of {', '.join(map(str, HEADS))}, got {frames.D}; use backend 'tiled'"
        )
    keys = [frames.B, frames.T, frames.k_pixels, frames.D]
    for name, x, shape in (
        ("q", q, [frames.B, frames.q_pixels, frames.D]),
        ("k", k, keys),
        ("v", v, keys),
    ):
        if list(x.shape) != shape:
            raise ValueError(
                f"{name} must be {shape}, tiles of {rows} rows of {height} x {width} pixels, "
                f"got {list(x.shape)}; see tiles.to_tiles"
            )
        if x.dtype != q.dtype or x.dtype not in DTYPES:
            raise ValueError(
                f"{name} must be float16, bfloat16 or float32 like q, got {x.dtype}; convert it"
            )
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    shape = (frames.B, frames.T, frames.rows, frames.width)
    o = v.new_empty(*shape, frames.D)
    displacement = v.new_empty((*shape, 2) if offsets else 0, dtype=torch.float32)
    lse = v.new_empty(shape, dtype=torch.float32)
    config = _chosen("cross_frame_forward", frames, k)
    if config["WARP_SPECIALIZE"]:
        triton.set_allocator(_workspace)
    with torch.cuda.device_of(q):
        halo = plan(q, k, c, frames, tolerance, radius)
        tables = _Tables.build(frames, c, k, config)
        _forward_kernel[(frames.q_pixels // config["BLOCK_M"], frames.T, frames.B)](
            q, k, v, tables.query, tables.key, c, halo, o, displacement, lse,
            frames.B, frames.T, *frames[3:], frames.tiles_x, frames.q_pixels, frames.k_pixels,
            *tables[2:], **_constants(frames, k, OFFSETS=offsets), **config,
        )  # fmt: skip
        plain = _plain_lse(q, k, frames) if gaussian == "gate" else None
    if plain is None:
        return Result(o, displacement, lse, halo)
    gate = (lse - plain).exp_()[..., None]
    if offsets:
        displacement *= gate
    return Result((o * gate).to(o.dtype), displacement, plain, halo)


def _scaled(q: Tensor, scale: Tensor) -> Tensor:
    """Queries for logits in base 2, rounded once."""
    return (q.float() * (scale * LOG2_E)).to(q.dtype)


def _chosen(kernel: str, frames: _Frames, like: Tensor) -> dict:
    """Launch options of a kernel."""
    return tuning.launch_config(
        kernel, frames.D, like.dtype, frames.height, frames.width, like.device
    )


def _plain_lse(q: Tensor, k: Tensor, frames: _Frames) -> Tensor:
    """Log-sum-exp of the logits without a Gaussian, over all keys: [B, T, h, W]."""
    config = _chosen("cross_frame_lse", frames, k)
    tables = _Tables.build(frames, None, k, config)
    lse = k.new_empty(frames.B, frames.T, frames.rows, frames.width, dtype=torch.float32)
    _lse_kernel[(frames.q_pixels // config["BLOCK_M"], frames.T, frames.B)](
        q, k, tables.query, tables.key, lse, frames.T, frames.rows, frames.height, frames.width,
        frames.tiles_x, frames.q_pixels, frames.k_pixels,
        **_constants(frames, k), **_ordinary(config),
    )  # fmt: skip
    return lse


def _constants(frames: _Frames, like: Tensor, **flags: bool) -> dict[str, Any]:
    """What a kernel is compiled for, apart from its launch options."""
    return {"D": frames.D, "EXACT": like.dtype == torch.float32, **flags}


def _ordinary(config: dict) -> dict:
    """The options of a kernel that has no warp-specialized form."""
    return {key: value for key, value in config.items() if key != "WARP_SPECIALIZE"}


class _Operands(NamedTuple):
    """Tiles, as the backward kernels read them."""

    q: Tensor
    k: Tensor
    v: Tensor
    do: Tensor
    dd: Tensor
    lse: Tensor
    delta: Tensor


class Gradients(NamedTuple):
    """Of what `forward` takes."""

    q: Tensor
    k: Tensor
    v: Tensor
    sigma: Tensor
    scale: Tensor


def backward(
    do: Tensor,
    dd: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    scale: Tensor,
    result: Result,
    *,
    gaussian: str,
    offsets: bool,
    first_row: int,
) -> Gradients:
    """Gradients of `forward`, from those of o, displacement and lse; see the head of this file."""
    frames, c = _Frames.of(q, k, first_row), _steepness(sigma)
    inner = (do.float() * result.o).sum(-1)
    if offsets:
        inner = inner + (dd * result.displacement).sum(-1)
    delta = inner - dlse
    operands = _Operands(
        to_tiles(_scaled(q, scale)), to_tiles(k), to_tiles(v), to_tiles(do),
        to_tiles(_displacement_columns(dd, k)) if offsets else k.new_empty(0),
        to_tiles((result.lse * LOG2_E)[..., None], float("inf")),  # P is zero beyond the frame
        to_tiles((delta if gaussian == "bias" else torch.zeros_like(delta))[..., None]),
    )  # fmt: skip
    halo = result.halo
    dq, moment = _launch_dq(operands, c, halo, frames, offsets)
    wide = torch.float32 if gaussian == "gate" else k.dtype  # two shares are to be added
    dk, dv = _launch_dkv(operands, c, halo, _reach(halo, frames), frames, offsets, wide)
    if gaussian == "gate":
        everything = max(frames.height, frames.width)
        operands = operands._replace(delta=to_tiles(delta[..., None]))
        halo = torch.full_like(halo, everything)
        reach = halo.new_full((frames.B, frames.T, frames.key_tiles), everything)
        dq += _launch_dq(operands, None, halo, frames, False)[0]
        dk += _launch_dkv(operands, None, halo, reach, frames, False, wide)[0]
    dscale = (dq * q).sum()
    dsigma = moment.sum() / sigma**3
    return Gradients((dq * scale).to(q.dtype), dk.to(k.dtype), dv, dsigma, dscale)


def _displacement_columns(dd: Tensor, like: Tensor) -> Tensor:
    """What meets the key table's columns: dx and dy, three parts each: [B, T, h, W, 16]."""
    columns = like.new_zeros(*dd.shape[:-1], COLUMNS.value)
    rest = dd.float().flip(-1)
    for part in range(3):
        columns[..., part:6:3] = rest
        rest = rest - columns[..., part:6:3]
    return columns


def _reach(halo: Tensor, frames: _Frames) -> Tensor:
    """Distance of the farthest query tile that sees a key tile: [B, T, key tiles], int32."""
    reach = halo.new_empty(frames.B, frames.T, frames.key_tiles)
    constants: dict[str, Any] = {"CHUNK": 256}
    _reach_kernel[(frames.key_tiles, frames.B * frames.T)](
        halo, reach, frames.first_row, frames.tiles_x, frames.query_tiles, **constants
    )
    return reach


def _launch_dq(
    operands: _Operands,
    c: Tensor | None,
    halo: Tensor,
    frames: _Frames,
    offsets: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of s q and the sums of dS |p_i - p_j|^2; c None is the plain softmax."""
    k = operands.k
    config = _chosen("cross_frame_dq", frames, k)
    tables = _Tables.build(frames, c, k, config)
    blocks = frames.q_pixels // config["BLOCK_M"]
    shape = (frames.B, frames.rows, frames.width, frames.D)
    dq = k.new_empty(shape, dtype=torch.float32)
    moment = k.new_empty(frames.B, blocks, dtype=torch.float32)
    _dq_kernel[(blocks, frames.B)](
        *operands, tables.query, tables.key, _no_gaussian(k) if c is None else c,
        halo, dq, moment, frames.T, *frames[3:], frames.tiles_x, frames.q_pixels, frames.k_pixels,
        *tables[2:5], **_constants(frames, k, OFFSETS=offsets, PLAIN=c is None),
        **_ordinary(config),
    )  # fmt: skip
    return dq, moment


def _launch_dkv(
    operands: _Operands,
    c: Tensor | None,
    halo: Tensor,
    reach: Tensor,
    frames: _Frames,
    offsets: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gradients of k, in `dtype`, and v; c None is the plain softmax, which v has no part in."""
    k = operands.k
    config = _chosen("cross_frame_dkv", frames, k)
    tables = _Tables.build(frames, c, k, config)
    shape = (frames.B, frames.T, frames.height, frames.width, frames.D)
    dk, dv = k.new_empty(shape, dtype=dtype), k.new_empty(shape if c is not None else 0)
    _dkv_kernel[(frames.k_pixels // config["BLOCK_N"], frames.T, frames.B)](
        *operands, tables.query, tables.key, _no_gaussian(k) if c is None else c,
        halo, reach, dk, dv, frames.T, *frames[3:], frames.tiles_x, frames.q_pixels,
        frames.k_pixels, *tables[2:5], **_constants(frames, k, OFFSETS=offsets, PLAIN=c is None),
        **_ordinary(config),
    )  # fmt: skip
    return dk, dv


# --- compilation without a GPU

_TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
_POINTERS = {  # of another type than q, k and v
    "c_ptr": "fp32",
    "lse_ptr": "fp32",
    "delta_ptr": "fp32",
    "displacement_ptr": "fp32",
    "dq_ptr": "fp32",
    "moment_ptr": "fp32",
    "radius_ptr": "fp32",
    "length_ptr": "fp32",
    "longest_ptr": "fp32",
    "halo_ptr": "i32",
    "reach_ptr": "i32",
}


def compile_jobs(d: int, dtype: torch.dtype, config: dict, arch: str) -> dict[str, tuple]:
    """All that is needed to compile each kernel for a GPU that is not there.

    Args:
        d: channels.
        dtype: of q, k and v.
        config: launch options, the same for every kernel.
        arch: one of tuning.ARCHITECTURES.

    Returns:
        By kernel: the function, the types of its arguments, the values of its constants and the
        names of the arguments that are multiples of 16. A name with a colon is a variant of the
        kernel before the colon, with its configuration: with offsets, and the gate form's second.
    """
    exact = dtype == torch.float32
    blocks = {"D": d, "BLOCK_M": config["BLOCK_M"], "BLOCK_N": config["BLOCK_N"], "EXACT": exact}
    specialize = config.get("WARP_SPECIALIZE", False)
    kernels: dict[str, tuple[Any, dict]] = {"cross_frame_lse": (_lse_kernel, blocks)}
    for variant, offsets, plain in (
        ("", False, False),
        (":offsets", True, False),
        (":gate", False, True),
    ):
        kernels["cross_frame_dq" + variant] = (
            _dq_kernel,
            {**blocks, "OFFSETS": offsets, "PLAIN": plain},
        )
        kernels["cross_frame_dkv" + variant] = (
            _dkv_kernel,
            {**blocks, "OFFSETS": offsets, "PLAIN": plain},
        )
        if not plain:
            kernels["cross_frame_forward" + variant] = (
                _forward_kernel,
                {**blocks, "OFFSETS": offsets, "WARP_SPECIALIZE": specialize},
            )
    return {name: _job(*kernel, dtype) for name, kernel in kernels.items()}


def prepass_jobs(d: int, dtype: torch.dtype) -> dict[str, tuple]:
    """The same of the kernels that run before the attention; they have no configuration."""
    blocks = {"BLOCK_M": 128, "BLOCK_N": 64}
    kernels: dict[str, tuple[Any, dict]] = {
        "key_table": (_key_table_kernel, {"BLOCK_N": 64}),
        "query_table": (_query_table_kernel, blocks),
        "key_tile": (_key_tile_kernel, {"D": d}),
        "plan": (_plan_kernel, {"D": d, "RINGS": 128, "CHUNK": 16}),
        "reach": (_reach_kernel, {"CHUNK": 256}),
    }
    return {name: _job(*kernel, dtype) for name, kernel in kernels.items()}


def _job(kernel: Any, constants: dict, dtype: torch.dtype) -> tuple:
    arguments = [x for x in kernel.arg_names if x not in constants]
    pointers = [x for x in arguments if x.endswith("_ptr")]
    signature = dict.fromkeys(arguments, "i32") | {
        x: f"*{_POINTERS.get(x, _TYPES[dtype])}" for x in pointers
    }
    if "eta" in signature:
        signature["eta"] = "fp32"
    pixels = [x for x in ("q_pixels", "k_pixels") if x in arguments]
    return kernel, signature, constants, [*pointers, *pixels]
