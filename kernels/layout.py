"""The layout the Triton kernels read: frames cut into tiles of 8 x 8 pixels.

    [..., H, W, C]  ->  [..., rows of tiles, tiles in a row, 8, 8, C]  ->  [..., pixels, C]

A tile is 64 consecutive pixels, and so a block of 32, 64 or 128 pixels is half a tile, a tile or
two tiles side by side: one contiguous piece of memory, close together in the picture. The frame
is padded with zeros to whole tiles and to an even number of tiles in a row.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from torch import Tensor

TILE = 8  # side of a tile, of the keys' part in the choice of what is visited
PAIR = 16  # width of two tiles, which share one decision about the keys they visit
PIXELS = TILE * TILE


def tiles_in(height: int, width: int) -> tuple[int, int]:
    """Rows of tiles and tiles in a row, padding included."""
    return -(-height // TILE), -(-width // PAIR) * 2


def to_tiles(x: Tensor, value: float = 0.0) -> Tensor:
    """[..., H, W, C] -> [..., pixels, C], padded with `value`."""
    height, width = x.shape[-3:-1]
    tiles_y, tiles_x = tiles_in(height, width)
    x = F.pad(x, (0, 0, 0, tiles_x * TILE - width, 0, tiles_y * TILE - height), value=value)
    pattern = "... (y m) (x n) c -> ... (y x m n) c"
    return rearrange(x, pattern, m=TILE, n=TILE).contiguous()


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
    """Row and column of the frame at which a block begins."""
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
    """Row and column of every pixel of a block, relative to where it begins: two of [BLOCK]."""
    pixel = tl.arange(0, BLOCK)
    return pixel % 64 // 8, pixel // 64 * 8 + pixel % 8


@triton.jit
def load_rows(ptr, first, BLOCK: tl.constexpr, C: tl.constexpr):
    """Rows first .. first + BLOCK - 1 of a [pixels, C] matrix."""
    offsets = tl.arange(0, BLOCK)[:, None] * C + tl.arange(0, C)[None, :]
    return tl.load(ptr + tl.cast(first, tl.int64) * C + offsets)


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
