"""The memory layout that the Triton kernels read: frames cut into tiles of 8 x 8 pixels.

    [..., H, W, C]  ->  [..., rows of tiles, tiles in a row, 8, 8, C]  ->  [..., pixels, C]

A tile is 64 consecutive pixels, so a block of 32, 64 or 128 pixels is half a tile, a tile or two
tiles side by side: one contiguous piece of memory and one compact patch of the frame. The frame is
padded with zeros to whole tiles and to an even number of tiles in a row.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

HEAD_DIMS = (16, 32, 64, 128)  # supported D
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
TILE = 8  # side of a tile: keys are bounded tile by tile
PAIR = 16  # width of two tiles: queries choose their keys for 8 x 16 pixels at a time
PIXELS = TILE * TILE
LOG2_E = 1.4426950408889634
LN_2 = tl.constexpr(0.6931471805599453)
AMD = torch.version.hip is not None


def check_operands(d: int, dtype: torch.dtype) -> None:
    """ValueError unless the kernels take D channels of a type."""
    if d not in HEAD_DIMS or dtype not in DTYPES:
        raise ValueError(
            f"backend 'triton' needs D in {', '.join(map(str, HEAD_DIMS))} and float16, bfloat16 "
            f"or float32, got D={d} and {dtype}; use backend 'tiled'"
        )


def tiles_in(height: int, width: int) -> tuple[int, int]:
    """Rows of tiles and tiles in a row, padding included."""
    return -(-height // TILE), -(-width // PAIR) * 2


def query_tiles(rows: int, width: int) -> int:
    """Pairs of tiles of the queries; each pair chooses the keys that it visits."""
    tiles_y, tiles_x = tiles_in(rows, width)
    return tiles_y * (tiles_x // 2)


def to_tiles(x: Tensor, value: float = 0.0) -> Tensor:
    """[..., H, W, C] -> [..., pixels, C], padded with `value`."""
    height, width = x.shape[-3:-1]
    tiles_y, tiles_x = tiles_in(height, width)
    x = F.pad(x, (0, 0, 0, tiles_x * TILE - width, 0, tiles_y * TILE - height), value=value)
    pattern = "... (y m) (x n) c -> ... (y x m n) c"
    return rearrange(x, pattern, m=TILE, n=TILE).contiguous()


def precision(dtype: torch.dtype, amd: bool = AMD) -> str:
    """How matrix products of a type are computed: float32 as three tensor-core products.

    AMD's matrix units take float32 as it is.
    """
    return "tf32x3" if dtype == torch.float32 and not amd else "ieee"


class Sizes(NamedTuple):
    """One call: queries of `rows` rows from first_row on, T frames of height x width pixels."""

    B: int
    T: int
    D: int
    rows: int
    height: int
    width: int
    first_row: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, first_row: int) -> "Sizes":
        """Of q [B, h, W, D] and k [B, T, H, W, D]."""
        return cls(k.shape[0], k.shape[1], k.shape[4], q.shape[1], *k.shape[2:4], first_row)

    @property
    def tiles_x(self) -> int:
        return tiles_in(self.height, self.width)[1]

    @property
    def q_pixels(self) -> int:
        return tiles_in(self.rows, self.width)[0] * self.tiles_x * PIXELS

    @property
    def k_pixels(self) -> int:
        return tiles_in(self.height, self.width)[0] * self.tiles_x * PIXELS

    @property
    def pixels(self) -> tuple[int, ...]:
        """The sizes in pixels, and tiles_x, as the kernels take them."""
        return *self[3:], self.tiles_x, self.q_pixels, self.k_pixels

    @property
    def query_tiles(self) -> int:
        return query_tiles(self.rows, self.width)

    @property
    def key_tiles(self) -> int:
        return self.k_pixels // PIXELS


@triton.constexpr_function
def block_height(block: int) -> int:
    """Rows of a block of 16, 32, 64 or 128 pixels."""
    return min(block // TILE, TILE)


@triton.constexpr_function
def block_width(block: int) -> int:
    """Columns of a block."""
    return max(block // TILE, TILE)


def block_shape(block: int) -> tuple[int, int]:
    """Rows and columns of a block."""
    return int(block_height(block)), int(block_width(block))


@triton.jit
def block_origin(block, tiles_x, BLOCK: tl.constexpr):
    """Row and column of a block's first pixel."""
    tile = block * BLOCK // 64
    return tile // tiles_x * 8 + block * BLOCK % 64 // 8, tile % tiles_x * 8


@triton.jit
def block_at(row, column, tiles_x, BLOCK: tl.constexpr):
    """Index of the block in a row and a column of blocks."""
    if BLOCK < 64:
        index = (row // (64 // BLOCK) * tiles_x + column) * (64 // BLOCK) + row % (64 // BLOCK)
    else:
        index = row * (tiles_x // (BLOCK // 64)) + column
    return index


@triton.jit
def block_pixels(BLOCK: tl.constexpr):
    """Row and column of every pixel of a block, relative to its first: two of [BLOCK]."""
    pixel = tl.arange(0, BLOCK)
    return pixel % 64 // 8, pixel // 64 * 8 + pixel % 8


@triton.jit
def load_rows(
    source, first, BLOCK: tl.constexpr, C: tl.constexpr, DESCRIPTOR: tl.constexpr = False
):
    """Rows first .. first + BLOCK - 1 of a [pixels, C] matrix, by its pointer or descriptor."""
    if DESCRIPTOR:
        rows = source.load([tl.cast(first, tl.int32), 0])
    else:
        offsets = tl.arange(0, BLOCK)[:, None] * C + tl.arange(0, C)[None, :]
        rows = tl.load(source + tl.cast(first, tl.int64) * C + offsets)
    return rows


@triton.jit
def store_rows(ptr, value, first, BLOCK: tl.constexpr, C: tl.constexpr):
    """Write [BLOCK, C] to rows first .. first + BLOCK - 1 of a [pixels, C] matrix."""
    offsets = tl.arange(0, BLOCK)[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(ptr + tl.cast(first, tl.int64) * C + offsets, value.to(ptr.dtype.element_ty))


@triton.jit
def store_pixels(ptr, value, frame, y, x, height, width, C: tl.constexpr):
    """Write [BLOCK, C] to pixels (y, x) of frame `frame` (int64) of [frames, height, width, C]."""
    pixel = (frame * height + y) * width + x
    inside = (y < height) & (x < width)
    offsets = pixel[:, None] * C + tl.arange(0, C)[None, :]
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=inside[:, None])
