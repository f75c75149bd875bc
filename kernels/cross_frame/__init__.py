"""Cross-frame attention of MANA (Yu et al., CVPR 2022, section 3.2) in Triton kernels.

    a_ij = softmax_j(s q_i . k_j - |p_i - p_j|^2 / (2 sigma^2))       p in pixels
    o_i  = sum_j a_ij v_j          displacement_i = sum_j a_ij (p_j - p_i)

gaussian.py puts the Gaussian into the matrix product, window.py chooses which keys a tile of
queries visits, forward.py and backward.py hold the two passes. docs/kernels.md tells the whole.
Logits are in base 2: log2(e) s is part of q, and log2(e) / (2 sigma^2) is the Gaussian's factor.
"""

from torch import Tensor

from ..layout import LOG2_E, Sizes, to_tiles
from . import window
from .backward import Gradients, backward, scaled
from .forward import Result, attend_tiles

__all__ = ["LOG2_E", "Gradients", "Result", "attend_tiles", "backward", "density", "forward"]


def forward(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor, *,
    gaussian: str, offsets: bool, tolerance: float, first_row: int,
) -> Result:  # fmt: skip
    """`reference.cross_frame_attention`, exact to the certified tolerance.

    Args:
        q, k, v, sigma, scale, gaussian, offsets, first_row: as in the reference; D is one of
            HEAD_DIMS, the type one of DTYPES.
        tolerance: eta of the certificate; 0 visits every pair.
    """
    return attend_tiles(
        to_tiles(scaled(q, scale)), to_tiles(k), to_tiles(v), sigma,
        rows=q.shape[1], height=k.shape[2], width=k.shape[3], first_row=first_row,
        gaussian=gaussian, offsets=offsets, tolerance=tolerance,
    )  # fmt: skip


def density(window_radius: Tensor, q: Tensor, k: Tensor, first_row: int) -> Tensor:
    """Fraction of the (query, key) pairs that `forward` visited: [] float32, on the device."""
    return window.density(window_radius, Sizes.of(q, k, first_row))
