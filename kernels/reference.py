"""The definition of both attentions of MANA (Yu et al., CVPR 2022), dense and in any dtype.

Cross-frame attention of pixel i of the center frame over the pixels j of one neighbor frame:

    bias form:  a_ij = softmax_j(s q_i . k_j - |p_i - p_j|^2 / (2 sigma^2))
    gate form:  a_ij = softmax_j(s q_i . k_j) exp(-|p_i - p_j|^2 / (2 sigma^2))
    o_i = sum_j a_ij v_j        displacement_i = sum_j a_ij (p_j - p_i)

The gate form is not renormalized. The log-sum-exp is that of the softmax's own logits. Memory
grows with (HW)^2: this file is the specification and the float64 truth of the tests.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class CrossFrame(NamedTuple):
    """What every backend returns: B clips, T frames, h query rows of a frame of H x W pixels."""

    o: Tensor  # [B, T, h, W, D]
    displacement: Tensor | None  # [B, T, h, W, 2], (dy, dx) in pixels
    lse: Tensor  # [B, T, h, W], natural logarithm
    density: float | Tensor  # fraction of the (query, key) pairs that were visited, in (0, 1]


def inv_2sigma2(sigma: Tensor) -> Tensor:
    """1 / (2 sigma^2) of a sigma > 0 in pixels, 0 for an infinite one; at 1e-15 it stays finite."""
    return 1 / (2 * sigma.clamp(min=1e-15).square())


def pixel_coordinates(first_row: int, rows: int, width: int, like: Tensor) -> Tensor:
    """(y, x) of the pixels of rows first_row .. first_row + rows - 1, row-major: [rows * W, 2]."""
    y = torch.arange(first_row, first_row + rows, device=like.device)
    x = torch.arange(width, device=like.device)
    return torch.cartesian_prod(y, x).to(like.dtype).reshape(-1, 2)


def cross_frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    scale: Tensor,
    *,
    gaussian: str = "bias",
    offsets: bool = False,
    first_row: int = 0,
) -> CrossFrame:
    """Dense cross-frame attention; autograd gives every gradient.

    Args:
        q: [B, h, W, D] queries, rows first_row .. first_row + h - 1 of the center frame.
        k, v: [B, T, H, W, D] keys and values of the T frames.
        sigma, scale: [] width of the Gaussian in pixels, factor of the dot product.
        gaussian: "bias" or "gate".
        offsets: also return the expected displacement.
        first_row: row of the frame that q starts at.
    """
    rows, width = q.shape[1:3]
    p_q = pixel_coordinates(first_row, rows, width, q)
    p_k = pixel_coordinates(0, k.shape[2], width, q)
    distance = (p_q[:, None] - p_k[None]).square().sum(-1)  # [h W, H W]
    log_weight = -distance * inv_2sigma2(sigma)

    logits = torch.einsum("bid,btjd->btij", q.flatten(1, 2) * scale, k.flatten(2, 3))
    if gaussian == "bias":
        logits = logits + log_weight
    lse = logits.logsumexp(-1)
    a = torch.exp(logits - lse[..., None])
    if gaussian == "gate":
        a = a * log_weight.exp()

    o = a @ v.flatten(2, 3)
    displacement = a @ p_k - a.sum(-1, keepdim=True) * p_q if offsets else None
    grid = (rows, width)
    return CrossFrame(
        o.unflatten(2, grid),
        None if displacement is None else displacement.unflatten(2, grid),
        lse.unflatten(2, grid),
        density=1.0,
    )


def memory_attention(q: Tensor, memory: Tensor, scale: Tensor) -> Tensor:
    """Softmax(scale q M) M^T, the paper's memory bank (section 3.3).

    Args:
        q: [B, H, W, D] queries.
        memory: [D, N] learned entries.
        scale: [] factor of the dot product.
    """
    return torch.softmax(q @ memory * scale, dim=-1) @ memory.T
