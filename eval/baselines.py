"""Cross-frame attention in plain PyTorch, in the ways one would write it today.

Each takes q [B, H, W, D], k and v [B, T, H, W, D], sigma and scale [], and returns o. Needs only
torch.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mana_triton.kernels import reference

TILE_Y, TILE_X = 8, 16  # of FlexAttention's blocks, 128 pixels
COLUMNS = 16  # that carry the Gaussian through SDPA


@lru_cache(maxsize=1)
def squared_distances(height: int, width: int, device: torch.device) -> Tensor:
    """[HW, HW] of all pairs of pixels, as in the official code."""
    p = reference.pixel_coordinates(0, height, width, torch.empty(0, device=device))
    y, x = (p[:, None, axis] - p[:, axis] for axis in (0, 1))
    return y.square_().add_(x.square_())


def dense(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor, gaussian: str = "bias"
) -> Tensor:
    """Dense softmax, one frame after the other, with a table of distances as the official code."""
    height, width = q.shape[1:3]
    weight = squared_distances(height, width, q.device) * (-0.5 / sigma.square())
    weight = (weight if gaussian == "bias" else weight.exp()).to(q.dtype)
    q = q.flatten(1, 2) * scale.to(q.dtype)
    frames = []
    for k_t, v_t in zip(k.flatten(2, 3).unbind(1), v.flatten(2, 3).unbind(1), strict=True):
        logits = q @ k_t.mT
        a = (logits + weight).softmax(-1) if gaussian == "bias" else logits.softmax(-1) * weight
        frames.append(a @ v_t)
    return torch.stack(frames, 1).unflatten(2, (height, width))


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """Fused attention with a dense [HW, HW] mask."""
    height, width = q.shape[1:3]
    mask = (squared_distances(height, width, q.device) / (-2 * sigma * sigma)).to(q.dtype)
    return _sdpa((q * scale.to(q.dtype)).flatten(1, 2), k.flatten(2, 3), v.flatten(2, 3), mask, k)


def augmented_sdpa(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor) -> Tensor:
    """Fused attention without a mask: the Gaussian is a dot product of 16 extra columns.

    With coordinates (y, x) from the center of the frame and c = 1 / (2 sigma^2), a logit is
    s q.k + 2c y y' + 2c x x' - c (y'^2 + x'^2) up to a constant of its row. Every factor is split
    into parts that the type can represent, and the significant products become the columns.
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
    """Three numbers of the type of `like` with the sum x, the largest first."""
    parts = []
    for _ in range(3):
        parts.append(x.to(like.dtype))
        x = x - parts[-1].to(x.dtype)
    return parts


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, like: Tensor) -> Tensor:
    """One query frame [B, HW, E], k and v [B, T, HW, E]; frames take the place of heads."""
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
    mask: BlockMask | None = None,
) -> Tensor:
    """FlexAttention on tiles of 8 x 16 pixels, of all key tiles or those of a BlockMask."""
    height, width = k.shape[2:4]
    across = math.ceil(width / TILE_X)
    # a captured scalar with a gradient fails in FlexAttention's backward pass, a vector does not
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
    """Row and column of a pixel in tile order."""
    tile, pixel = index // (TILE_Y * TILE_X), index % (TILE_Y * TILE_X)
    y = tile // across * TILE_Y + pixel // TILE_X
    return y, tile % across * TILE_X + pixel % TILE_X


def _to_tiles(x: Tensor) -> Tensor:
    """[..., H, W, D] -> [..., pixels of whole tiles, D]."""
    height, width = x.shape[-3:-1]
    x = F.pad(x, (0, 0, 0, -width % TILE_X, 0, -height % TILE_Y))
    x = x.unflatten(-2, (-1, TILE_X)).unflatten(-4, (-1, TILE_Y)).transpose(-4, -3)
    return x.flatten(-5, -2)


def block_mask(window_radius: Tensor, height: int, width: int) -> BlockMask:
    """The key tiles within a radius of each query tile.

    Args:
        window_radius: [B, T, query tiles], integer, in pixels.
        height, width: of a frame.
    """
    down, across = math.ceil(height / TILE_Y), math.ceil(width / TILE_X)
    tile = torch.arange(down * across, device=window_radius.device)
    top, left = tile // across * TILE_Y, tile % across * TILE_X
    radius = window_radius[..., None]

    def overlaps(start: Tensor, length: int) -> Tensor:
        """Whether a key tile meets the window of a query tile: [B, T, query, key tiles]."""
        before_end = start[None, :] < start[:, None] + length + radius
        return before_end & (start[None, :] + length > start[:, None] - radius)

    wanted = overlaps(top, TILE_Y) & overlaps(left, TILE_X)
    indices = wanted.int().argsort(dim=-1, descending=True, stable=True).int()
    counts = wanted.sum(-1).int()
    # full blocks only: every pixel of a tile counts, as in our kernels
    nothing = torch.zeros_like(counts)
    return BlockMask.from_kv_blocks(
        nothing, torch.zeros_like(indices), counts, indices,
        BLOCK_SIZE=TILE_Y * TILE_X, seq_lengths=(tile.numel() * 128, tile.numel() * 128),
    )  # fmt: skip
