"""Which keys a tile of queries visits: the certificate, on the device.

A tile of 8 x 16 queries visits the tiles of 8 x 16 keys within its window radius. The kernel
`select_key_tiles` chooses the smallest radius, in rings of 8 pixels, such that the keys beyond it
hold at most eta of the softmax. It bounds them twice, each time for half of eta:

    ring by ring   every key as long as the longest of the frame and aligned with the query
    tile by tile   q . mean + |q| deviation - c distance^2 of 8 x 8 keys, within the first radius

Both are relative to a lower bound of the query's log-sum-exp: that of the 3 x 3 keys around it.
See `tiled.py` for the error that follows from eta. Logits are in base 2 here.
"""

# Triton's decorator hides what its functions take and return
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import (
    PAIR,
    TILE,
    Sizes,
    block_height,
    block_origin,
    block_pixels,
    block_width,
    load_rows,
)
from .gaussian import BEYOND

# --- for forward and backward


@triton.jit
def key_window(window_radius, top, left, height, width, BLOCK_N: tl.constexpr):
    """Rows and columns of key blocks, in tiles within `window_radius` pixels of a query tile."""
    # tiles of 8 x 16, whatever the block: all kernels then visit the same keys
    first_y = tl.maximum(top - window_radius, 0) // 8 * 8 // block_height(BLOCK_N)
    last_y = tl.cdiv(tl.minimum(top + 8 + window_radius, height), 8) * 8 // block_height(BLOCK_N)
    first_x = tl.maximum(left - window_radius, 0) // 16 * 16 // block_width(BLOCK_N)
    last_x = tl.cdiv(tl.minimum(left + 16 + window_radius, width), 16) * 16 // block_width(BLOCK_N)
    return first_y, last_y, first_x, last_x


@triton.jit
def query_window(reverse_radius, top, left, rows, width, BLOCK_M: tl.constexpr):
    """Rows and columns of query blocks, in tiles within `reverse_radius` pixels of a key tile.

    `top` counts from the first row of the queries.
    """
    first_y = tl.maximum(top - reverse_radius, 0) // 8 * 8 // block_height(BLOCK_M)
    last_y = tl.cdiv(tl.maximum(tl.minimum(top + 8 + reverse_radius, rows), 0), 8) * 8
    last_y = tl.maximum(last_y // block_height(BLOCK_M), first_y)
    first_x = tl.maximum(left - reverse_radius, 0) // 16 * 16 // block_width(BLOCK_M)
    last_x = tl.cdiv(tl.minimum(left + 16 + reverse_radius, width), 16) * 16
    return first_y, last_y, first_x, last_x // block_width(BLOCK_M)


@triton.jit
def gap(query_y, query_x, key_y, key_x):
    """Pixels between a query tile and the tile that holds a key, the larger of the two axes."""
    key_y, key_x = key_y // 8 * 8, key_x // 16 * 16
    y = tl.maximum(key_y - query_y, query_y - key_y) - 7
    x = tl.maximum(key_x - query_x, query_x - key_x) - 15
    return tl.maximum(tl.maximum(y, x), 0)


@triton.jit
def farthest_query(ptr, block, BLOCK: tl.constexpr):
    """Reverse radius of a block of keys: the larger of its one or two tiles' in [key tiles]."""
    tiles = ptr + block * BLOCK // 64 + tl.arange(0, BLOCK // 64 if BLOCK > 64 else 1)
    return tl.max(tl.load(tiles), axis=0)


# --- the choice


@triton.jit
def _key_tile_kernel(
    k_ptr,  # [B, T, K, D] tiles
    mean_ptr,  # [B, T, key tiles, D], rounded to the type of k
    deviation_ptr,  # [B, T, key tiles], largest distance from the rounded mean
    length_ptr,  # [B, T, key tiles], largest norm
    height, width, tiles_x, D: tl.constexpr,
):  # fmt: skip
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
    deviation = tl.sqrt(tl.max(tl.where(inside, tl.sum(away * away, axis=1), 0.0), axis=0))
    tl.store(mean_ptr + (image * tiles + tile) * D + tl.arange(0, D), mean)
    tl.store(deviation_ptr + image * tiles + tile, deviation)
    tl.store(length_ptr + image * tiles + tile, tl.sqrt(tl.max(tl.sum(k * k, axis=1), axis=0)))


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
        # the query's own place comes first, so that m is finite from then on
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
def _select_key_tiles_kernel(
    q_ptr,  # [B, Q, D] tiles, times s log2(e)
    k_ptr,  # [B, T, K, D] tiles
    mean_ptr,  # [B, T, key tiles, D]
    deviation_ptr,  # [B, T, key tiles]
    longest_ptr,  # [B, T], norm of the longest key
    inv_2sigma2_ptr,  # [], times log2(e)
    window_radius_ptr,  # [B, T, query tiles], in pixels
    eta,
    T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels,
    D: tl.constexpr, RINGS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # one program per query tile, frame and clip
    tile, frame, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    image = (clip * T + frame).to(tl.int64)
    c = tl.load(inv_2sigma2_ptr)
    top, left = block_origin(tile, tiles_x, 128)
    y, x = block_pixels(128)
    y, x = y + top, x + left
    inside = (y < rows) & (x < width)
    q = load_rows(q_ptr, clip.to(tl.int64) * q_pixels + tile * 128, 128, D)
    length = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), axis=1))
    lse = _lse_lower_bound(
        q, k_ptr + image * k_pixels * D, first_row + y, x, c, height, width, tiles_x, D
    )

    # every key as long as the longest and aligned with the query: half of eta
    spread = tl.where(inside, length * tl.load(longest_ptr + image) - lse, float("-inf"))
    spread = tl.max(spread, axis=0)
    ring = tl.arange(0, RINGS)
    nearest = tl.maximum(8.0 * ring - 7, 0)
    # 2^100 is too much in any case, and finite
    mass = tl.exp2(tl.minimum(spread - c * nearest * nearest, 100)) * 64 * (8.0 * ring + 4)
    rings = _rings_to_keep(mass, eta / 2, RINGS)

    # the key tiles within that radius one by one: the other half
    first_y, last_y, first_x, last_x = key_window(
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
        deviation = tl.load(deviation_ptr + at, mask=present, other=0.0)
        bound = tl.dot(q, mean.T, input_precision="ieee") + length[:, None] * deviation[None, :]
        dy = tl.maximum(tile_y * 8 - (first_row + y), first_row + y - tile_y * 8 - 7)
        dx = tl.maximum(tile_x[None, :] * 8 - x[:, None], x[:, None] - tile_x[None, :] * 8 - 7)
        dy, dx = tl.maximum(dy, 0).to(tl.float32)[:, None], tl.maximum(dx, 0).to(tl.float32)
        bound = bound - c * (dy * dy + dx * dx) - lse[:, None]
        worst = tl.max(tl.where(inside[:, None], bound, float("-inf")), axis=0)  # [CHUNK]
        distance = gap(first_row + top, left, tile_y * 8, tile_x * 8)
        its_ring = tl.where(present, (distance + 7) // 8, RINGS)
        here = its_ring[:, None] == ring[None, :]
        its_mass = tl.exp2(tl.minimum(worst, 100)) * 64
        mass += tl.sum(tl.where(here, its_mass[:, None], 0.0), axis=0)
    rings = tl.minimum(rings, _rings_to_keep(mass, eta / 2, RINGS))
    tl.store(window_radius_ptr + image * (q_pixels // 128) + tile, rings * 8)


@triton.jit
def _reverse_kernel(
    window_radius_ptr,  # [B, T, query tiles]
    reverse_radius_ptr,  # [B, T, key tiles]
    first_row, tiles_x, query_tiles, CHUNK: tl.constexpr,
):  # fmt: skip
    # one program per key tile and frame
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_y, key_x = block_origin(tile, tiles_x, 64)
    farthest = tl.full([CHUNK], -1, tl.int32)
    for start in range(0, query_tiles, CHUNK):
        query_tile = start + tl.arange(0, CHUNK)
        present = query_tile < query_tiles
        window_radius = tl.load(
            window_radius_ptr + image * query_tiles + query_tile, mask=present, other=-1
        )
        query_y, query_x = block_origin(query_tile, tiles_x, 128)
        distance = gap(first_row + query_y, query_x, key_y, key_x)
        farthest = tl.maximum(farthest, tl.where(distance <= window_radius, distance, -1))
    tl.store(reverse_radius_ptr + image * tl.num_programs(0) + tile, tl.max(farthest, axis=0))


def select_key_tiles(q: Tensor, k: Tensor, c: Tensor, sizes: Sizes, tolerance: float) -> Tensor:
    """Window radius in pixels of every query tile: [B, T, query tiles], int32.

    Args:
        q, k: tiles, q times s log2(e).
        c: see `gaussian.inv_2sigma2_base_2`.
        sizes: of the call.
        tolerance: eta; 0 visits all keys.
    """
    everything = max(sizes.height, sizes.width)
    shape = (sizes.B, sizes.T, sizes.query_tiles)
    if tolerance == 0:
        return q.new_full(shape, everything, dtype=torch.int32)
    images = sizes.B * sizes.T
    means = k.new_empty(images, sizes.key_tiles, sizes.D)
    deviations, lengths = k.new_empty(2, images, sizes.key_tiles, dtype=torch.float32)
    constants: dict[str, Any] = {"D": sizes.D}
    _key_tile_kernel[(sizes.key_tiles, images)](
        k, means, deviations, lengths, sizes.height, sizes.width, sizes.tiles_x, **constants
    )
    constants |= {"RINGS": triton.next_power_of_2(everything // TILE + 2), "CHUNK": 16}
    window_radius = q.new_empty(shape, dtype=torch.int32)
    # the lower bound of the lse may count keys that are dropped
    _select_key_tiles_kernel[(sizes.query_tiles, sizes.T, sizes.B)](
        q, k, means, deviations, lengths.amax(1), c, window_radius, tolerance / (1 + tolerance),
        sizes.T, *sizes.pixels, **constants, num_warps=8,
    )  # fmt: skip
    return window_radius


def reverse_radius(window_radius: Tensor, sizes: Sizes) -> Tensor:
    """Distance of the farthest query tile that visits a key tile, -1: none; [B, T, key tiles]."""
    farthest = window_radius.new_empty(sizes.B, sizes.T, sizes.key_tiles)
    constants: dict[str, Any] = {"CHUNK": 256}
    _reverse_kernel[(sizes.key_tiles, sizes.B * sizes.T)](
        window_radius, farthest, sizes.first_row, sizes.tiles_x, sizes.query_tiles, **constants
    )
    return farthest


def density(window_radius: Tensor, sizes: Sizes) -> Tensor:
    """Fraction of the (query, key) pairs that are visited: [] float32, on the device."""
    rows, height, width, first_row = sizes[3:]
    tile = torch.arange(sizes.query_tiles, device=window_radius.device)
    across = sizes.tiles_x // 2
    top, left = tile // across * TILE, tile % across * PAIR
    queries = (rows - top).clamp(0, TILE) * (width - left).clamp(0, PAIR)

    def keys(start: Tensor, length: int, size: int) -> Tensor:
        first = (start - window_radius).clamp(min=0) // length * length
        last = (start + length + window_radius + length - 1) // length * length
        return last.clamp(max=size) - first

    pairs = queries * keys(top + first_row, TILE, height) * keys(left, PAIR, width)
    return pairs.sum() / (sizes.B * sizes.T * rows * width * height * width)
