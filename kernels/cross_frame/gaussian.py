"""The Gaussian of the cross-frame attention as 16 more columns of the matrix product q k^T.

For a block of queries and a block of keys whose center is (y, x), with (r, e) = query - center and
(b, a) = key - center,

    -c |p_i - p_j|^2 = [2 c e, 2 c r, -c, -c (r^2 + e^2)] . [a, b, a^2 + b^2, 1]

with c = log2(e) / (2 sigma^2). The numbers on the right are exact in any half precision. Those on
the left depend on the distance of the two blocks alone. They are tabulated once per distance, as
three parts that together carry 24 bits. A 13th column masks the pixels beyond the frame. float32
computes the Gaussian from the coordinates instead.
"""

# Triton's decorator hides what its functions take and return
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import (
    LOG2_E,
    TILE,
    Sizes,
    block_height,
    block_origin,
    block_pixels,
    block_shape,
    block_width,
    load_rows,
    tiles_in,
)
from ..reference import inv_2sigma2

COLUMNS = tl.constexpr(16)  # the smallest inner dimension of a tensor core
BEYOND = tl.constexpr(32768.0)  # its square masks a pixel; a power of two is exact
FAR = tl.constexpr(-60000.0)  # a logit whose weight is zero, within float16's range
# c from which on every neighbor's weight is zero; a block's own rows stay above FAR
STEEPEST = 800.0


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
    height, width, tiles_x, BLOCK_N: tl.constexpr,
):  # fmt: skip
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
    inv_2sigma2_ptr,  # [], times log2(e)
    first_row,
    zero_y, zero_x,  # the cell of equal origins
    cells_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # one program per distance between a block of queries and one of keys
    cell = tl.program_id(0)
    smaller: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_N else BLOCK_N
    step_y: tl.constexpr = block_height(smaller)
    step_x: tl.constexpr = block_width(smaller)
    y, x = block_pixels(BLOCK_M)
    center_y = (cell // cells_x - zero_y) * step_y - first_row + (block_height(BLOCK_N) - 1) / 2
    center_x = (cell % cells_x - zero_x) * step_x + (block_width(BLOCK_N) - 1) / 2
    r, e = (y - center_y)[:, None], (x - center_x)[:, None]
    c = tl.load(inv_2sigma2_ptr)
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
def table_row(key_y, key_x, query_y, query_x, zero_y, zero_x, cells_x,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """First row of the query table for a block of keys and one of queries, by their origins."""
    smaller: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_N else BLOCK_N
    step_y: tl.constexpr = block_height(smaller)
    step_x: tl.constexpr = block_width(smaller)
    cell = ((key_y - query_y) // step_y + zero_y) * cells_x + (key_x - query_x) // step_x + zero_x
    return cell.to(tl.int64) * BLOCK_M


@triton.jit
def square_distance(query_y, query_x, key_y, key_x):
    """Of pixels, by coordinates that broadcast."""
    dy, dx = (query_y - key_y).to(tl.float32), (query_x - key_x).to(tl.float32)
    return dy * dy + dx * dx


@triton.jit
def scores(q, k, query_table, row, key_columns, query_y, query_x, key_y, key_x, c, height, width,
           BLOCK_M: tl.constexpr, EXACT: tl.constexpr, KEYS_FIRST: tl.constexpr = False,
           DESCRIPTOR: tl.constexpr = False):  # fmt: skip
    """Logits in base 2 of a block of queries and one of keys: [M, N], or [N, M] with KEYS_FIRST.

    s log2(e) is part of q [M, D]. The Gaussian and the mask are in the key's columns [N, 16] and
    the query table's from a row on; with EXACT they follow from the coordinates [M] and [N].
    """
    if KEYS_FIRST:
        s = tl.dot(k, q.T, input_precision="ieee")
    else:
        s = tl.dot(q, k.T, input_precision="ieee")
    if EXACT:
        if KEYS_FIRST:
            inside = ((key_y < height) & (key_x < width))[:, None]
            distance = square_distance(
                query_y[None, :], query_x[None, :], key_y[:, None], key_x[:, None]
            )
        else:
            inside = ((key_y < height) & (key_x < width))[None, :]
            distance = square_distance(
                query_y[:, None], query_x[:, None], key_y[None, :], key_x[None, :]
            )
        s = tl.where(inside, s - c * distance, -BEYOND * BEYOND)
    else:
        query_columns = load_rows(query_table, row, BLOCK_M, COLUMNS, DESCRIPTOR)
        if KEYS_FIRST:
            s = tl.dot(key_columns, query_columns.T, s)
        else:
            s = tl.dot(query_columns, key_columns.T, s)
    return s


class Tables(NamedTuple):
    """Both sides of the Gaussian's matrix product for one pair of block sizes."""

    query: Tensor  # [cells, M, 16]
    key: Tensor  # [K, 16]
    zero_y: int  # (zero_y, zero_x) is the cell of equal origins
    zero_x: int
    cells_x: int
    cells: int

    @classmethod
    def build(cls, sizes: Sizes, c: Tensor | None, like: Tensor, config: dict) -> "Tables":
        """Launch the two kernels; without a Gaussian (c None) one cell serves all blocks."""
        block_m, block_n = config["BLOCK_M"], config["BLOCK_N"]
        key = like.new_empty(sizes.k_pixels, COLUMNS.value)
        blocks: dict[str, Any] = {"BLOCK_M": block_m, "BLOCK_N": block_n}
        _key_table_kernel[(sizes.k_pixels // block_n,)](
            key, sizes.height, sizes.width, sizes.tiles_x, BLOCK_N=blocks["BLOCK_N"]
        )
        if like.dtype == torch.float32:  # computes the Gaussian from the coordinates
            return cls(key, key, 0, 0, 0, 0)
        (height_m, width_m), (height_n, width_n) = block_shape(block_m), block_shape(block_n)
        step_y, step_x = block_shape(min(block_m, block_n))
        rows, height = (tiles_in(n, 1)[0] * TILE for n in (sizes.rows, sizes.height))
        width = sizes.tiles_x * TILE
        zero_y, zero_x = (rows - height_m) // step_y, (width - width_m) // step_x
        cells_x = zero_x + (width - width_n) // step_x + 1
        cells = (zero_y + (height - height_n) // step_y + 1) * cells_x
        if c is None:
            c, cells = no_gaussian(like), 1
        query = like.new_empty(cells, block_m, COLUMNS.value)
        _query_table_kernel[(cells,)](query, c, sizes.first_row, zero_y, zero_x, cells_x, **blocks)
        return cls(query, key, zero_y, zero_x, cells_x, cells)


def inv_2sigma2_base_2(sigma: Tensor) -> Tensor:
    """The c of this file's head: [] float32, 0 for an infinite sigma."""
    return (LOG2_E * inv_2sigma2(sigma.float())).clamp(max=STEEPEST)


def no_gaussian(like: Tensor) -> Tensor:
    """The c of plain attention."""
    return like.new_zeros((), dtype=torch.float32)
