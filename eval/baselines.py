"""Cross-frame attention as one would write it today with PyTorch alone: what ours is timed against.

Each takes q [B, H, W, D], k and v [B, T, H, W, D], sigma and scale [], and gives o. Runs from a
bare checkout with torch alone.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mana_triton.kernels import reference

TILE_Y, TILE_X = 8, 16  # of FlexAttention's blocks, 128 pixels
COLUMNS = 16  # that carry the Gaussian through SDPA


def eager(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """The definition, dense."""
    return reference.cross_frame_attention(q, k, v, sigma.to(q.dtype), scale.to(q.dtype)).o


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """Fused attention that adds a dense [HW, HW] mask."""
    height, width = q.shape[1:3]
    p = reference.pixel_coordinates(0, height, width, sigma)
    mask = (p[:, None] - p[None]).square_().sum(-1).div(-2 * sigma * sigma).to(q.dtype)
    return _sdpa((q * scale.to(q.dtype)).flatten(1, 2), k.flatten(2, 3), v.flatten(2, 3), mask, k)


def augmented_sdpa(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """Fused attention without a mask: the Gaussian is a product of 16 more columns.

    With coordinates (y, x) from the center of the frame and c = 1 / (2 sigma^2), a logit is
    s q.k + 2c y y' + 2c x x' - c (y'^2 + x'^2) up to a constant of its row. Every factor is cut
    into parts that the type holds, and the products that matter become the columns.
    """
    height, width = q.shape[1:3]
    center = torch.tensor([height - 1, width - 1], device=q.device) / 2
    p = reference.pixel_coordinates(0, height, width, sigma) - center  # [HW, 2]
    c = 1 / (2 * sigma * sigma)
    pairs = []
    for axis in range(2):
        coefficient, place = _parts(2 * c * p[:, axis], q), _parts(p[:, axis], q)
        pairs += [(coefficient[i], place[j]) for i, j in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0))]
    coefficient, square = _parts((-c).expand(len(p)), q), _parts(p.square().sum(-1), q)
    chosen = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0))
    pairs += [(coefficient[i], square[j]) for i, j in chosen]
    left, right = (torch.stack(side, -1) for side in zip(*pairs, strict=True))  # [HW, 16]

    def widen(x: Tensor, columns: Tensor) -> Tensor:
        return torch.cat([x, columns.expand(*x.shape[:-1], COLUMNS)], -1)

    wide_q = widen((q * scale.to(q.dtype)).flatten(1, 2), left)
    wide_v = F.pad(v.flatten(2, 3), (0, COLUMNS))
    o = _sdpa(wide_q, widen(k.flatten(2, 3), right), wide_v, None, k)
    return o[..., : q.shape[-1]]


def _parts(x: Tensor, like: Tensor) -> list[Tensor]:
    """Three numbers of the type of `like` that add up to x, the largest first."""
    parts = []
    for _ in range(3):
        parts.append(x.to(like.dtype))
        x = x - parts[-1].to(x.dtype)
    return parts


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """One query frame [B, HW, E] on k and v [B, T, HW, E], frames in the place of heads."""
    q = q[:, None].expand(-1, k.shape[1], -1, -1)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return o.unflatten(2, like.shape[2:4])


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    scale: Tensor,
    attend: Callable = flex_attention,
) -> Tensor:
    """FlexAttention, dense: the Gaussian as score_mod on row-major pixels."""
    width = q.shape[2]
    # a captured scalar with a gradient fails in FlexAttention's backward pass, a vector does not
    sigmas = sigma.expand(q.shape[0]).contiguous()

    def gaussian(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        dy, dx = i // width - j // width, i % width - j % width
        return score - (dy * dy + dx * dx) / (2 * sigmas[b] * sigmas[b])

    wide_q = (q * scale.to(q.dtype)).flatten(1, 2)[:, None].expand(-1, k.shape[1], -1, -1)
    o = attend(wide_q.contiguous(), k.flatten(2, 3), v.flatten(2, 3), score_mod=gaussian, scale=1.0)
    assert isinstance(o, Tensor)
    return o.unflatten(2, k.shape[2:4])


def flex_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    scale: Tensor,
    attend: Callable = flex_attention,
    *,
    mask: BlockMask,
) -> Tensor:
    """FlexAttention on pixels in tiles of 8 x 16, and only the tiles of a BlockMask."""
    height, width = k.shape[2:4]
    across = math.ceil(width / TILE_X)
    sigmas = sigma.expand(q.shape[0]).contiguous()

    def gaussian(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        (y, x), (key_y, key_x) = _place(i, across), _place(j, across)
        dy, dx = y - key_y, x - key_x
        inside = (key_y < height) & (key_x < width)
        biased = score - (dy * dy + dx * dx) / (2 * sigmas[b] * sigmas[b])
        return torch.where(inside, biased, -float("inf"))

    wide_q = _to_tiles(q * scale.to(q.dtype))[:, None].expand(-1, k.shape[1], -1, -1)
    o = attend(
        wide_q.contiguous(), _to_tiles(k), _to_tiles(v),
        score_mod=gaussian, block_mask=mask, scale=1.0,
    )  # fmt: skip
    assert isinstance(o, Tensor)
    o = o.unflatten(2, (-1, across, TILE_Y, TILE_X)).transpose(3, 4)
    return o.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def _place(index: Tensor, across: int) -> tuple[Tensor, Tensor]:
    """Row and column of a pixel in the order of the tiles."""
    tile, pixel = index // (TILE_Y * TILE_X), index % (TILE_Y * TILE_X)
    y = tile // across * TILE_Y + pixel // TILE_X
    return y, tile % across * TILE_X + pixel % TILE_X


def _to_tiles(x: Tensor) -> Tensor:
    """[..., H, W, D] -> [..., pixels of whole tiles, D]."""
    height, width = x.shape[-3:-1]
    x = F.pad(x, (0, 0, 0, -width % TILE_X, 0, -height % TILE_Y))
    x = x.unflatten(-2, (-1, TILE_X)).unflatten(-4, (-1, TILE_Y)).transpose(-4, -3)
    return x.flatten(-5, -2)


def block_mask(halo: Tensor, height: int, width: int) -> BlockMask:
    """The key tiles within `halo` pixels of each query tile.

    Args:
        halo: [B, T, query tiles], integer.
        height, width: of a frame.
    """
    down, across = math.ceil(height / TILE_Y), math.ceil(width / TILE_X)
    tile = torch.arange(down * across, device=halo.device)
    top, left = tile // across * TILE_Y, tile % across * TILE_X
    halo = halo[..., None]

    def near(start: Tensor, length: int) -> Tensor:
        """Whether a key tile meets the window of a query tile: [B, T, query, key tiles]."""
        begins = start[None, :] < start[:, None] + length + halo
        return begins & (start[None, :] + length > start[:, None] - halo)

    wanted = near(top, TILE_Y) & near(left, TILE_X)
    indices = wanted.int().argsort(dim=-1, descending=True, stable=True).int()
    counts = wanted.sum(-1).int()
    # every pixel of the tiles counts: no mask within a block, as ours has none
    nothing = torch.zeros_like(counts)
    return BlockMask.from_kv_blocks(
        nothing, torch.zeros_like(indices), counts, indices,
        BLOCK_SIZE=TILE_Y * TILE_X, seq_lengths=(tile.numel() * 128, tile.numel() * 128),
    )  # fmt: skip
