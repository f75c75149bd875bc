"""The two attentions of MANA: argument checks and choice of backend."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BACKENDS = ("auto", "triton", "tiled", "reference")
GAUSSIANS = ("bias", "gate")
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
}


def choose_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """The backend that will run and the reason; ValueError if it was asked for and cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        raise ValueError("backend 'triton' is not available in this version; use 'tiled'")
    if backend == "auto":
        return "tiled", f"no Triton kernel for {device.type}"
    return backend, "as asked"


def cross_frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor | float,
    *,
    gaussian: str = "bias",
    scale: Tensor | float | None = None,
    tolerance: float | None = None,
    offsets: bool = False,
    backend: str = "auto",
    first_row: int = 0,
    return_lse: bool = False,
    return_visited: bool = False,
) -> Any:
    """Attend from every pixel of the center frame to T frames, favoring nearby pixels.

    Paper section 3.2: o_i = sum_j a_ij v_j with one softmax per frame. In the bias form
    a_ij = softmax_j(s q_i.k_j - |p_i - p_j|^2 / (2 sigma^2)); in the gate form the Gaussian
    multiplies the softmax of s q_i.k_j instead and the product is not renormalized.

    Args:
        q: [B, H, W, D] queries of the center frame; or [B, h, W, D], a band of its rows.
        k, v: [B, T, H, W, D] keys and values.
        sigma: [] standard deviation of the Gaussian in pixels, > 0; infinity is plain attention.
        gaussian: "bias" or "gate".
        scale: [] factor s of the dot product; None is 1 / sqrt(D).
        tolerance: bound eta on the part of the softmax that far keys may carry unseen, relative
            to the part kept: the error is at most eta (max|v| + |o|). None is 1e-6 for float32
            and 1e-3 for half precision; 0 visits every pair.
        offsets: also return the expected displacement sum_j a_ij (p_j - p_i).
        backend: "auto", "triton", "tiled" or "reference".
        first_row: row of the frame at which a band of queries starts.
        return_lse: also return the natural log-sum-exp of the softmax's logits.
        return_visited: also return the fraction of (query, key) pairs that were computed.

    Returns:
        o [B, T, H, W, D]; or a tuple of it and, as asked for and in this order, displacement
        [B, T, H, W, 2] as (dy, dx) in pixels, lse [B, T, H, W], visited (float).

    Raises:
        ValueError: shapes, devices or types that do not fit; sigma or tolerance out of range.
    """
    _check_frames(q, k, v, first_row)
    if gaussian not in GAUSSIANS:
        raise ValueError(f"gaussian must be one of {', '.join(GAUSSIANS)}, got {gaussian!r}")
    if tolerance is None:
        tolerance = TOLERANCE[q.dtype]
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    sigma = _scalar("sigma", sigma, q)
    if q.device.type == "cpu" and not sigma.item() > 0:
        raise ValueError(f"sigma must be > 0 (infinity allowed), got {sigma.item()}")
    scale = _scalar("scale", q.shape[-1] ** -0.5 if scale is None else scale, q)
    name, _ = choose_backend(backend, q.device)
    if name == "reference":
        from .kernels import reference

        result = reference.cross_frame_attention(
            q, k, v, sigma, scale, gaussian=gaussian, offsets=offsets, first_row=first_row
        )
    else:
        from .kernels import tiled

        result = tiled.cross_frame_attention(
            q, k, v, sigma, scale,
            gaussian=gaussian, offsets=offsets, tolerance=tolerance, first_row=first_row,
        )  # fmt: skip
    wanted = (True, offsets, return_lse, return_visited)
    outputs = [x for x, want in zip(result, wanted, strict=True) if want]
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def memory_attention(
    q: Tensor, memory: Tensor, *, scale: Tensor | float | None = None, backend: str = "auto"
) -> Tensor:
    """Attend from every pixel to the learned memory bank: softmax(s q M) M^T (section 3.3).

    Args:
        q: [B, H, W, D] queries.
        memory: [D, N] learned entries.
        scale: [] factor s; None is 1 / sqrt(D).
        backend: "auto", "triton", "tiled" or "reference".

    Returns:
        [B, H, W, D].

    Raises:
        ValueError: shapes, devices or types that do not fit.
    """
    scale = _check_memory(q, memory, scale)
    name, _ = choose_backend(backend, q.device)
    if name == "triton":
        from .kernels.memory import memory_attention as attend
    elif name == "reference":
        from .kernels.reference import memory_attention as attend
    else:
        from .kernels.tiled import memory_attention as attend
    return attend(q, memory, scale)


def memory_loss(
    q: Tensor, memory: Tensor, *, scale: Tensor | float | None = None, backend: str = "auto"
) -> Tensor:
    """Mean |y - q| [] of y = memory_attention(q, memory): how well the memory bank knows q.

    The loss of training stage 2 (section 3.4); arguments and errors are `memory_attention`'s.
    """
    if choose_backend(backend, q.device)[0] != "triton":
        return F.l1_loss(memory_attention(q, memory, scale=scale, backend=backend), q)
    from .kernels.memory import memory_loss as attend

    return attend(q, memory, _check_memory(q, memory, scale))


def _check_memory(q: Tensor, memory: Tensor, scale: Tensor | float | None) -> Tensor:
    """The scale as a tensor; ValueError if the operands of the memory bank do not fit."""
    if q.ndim != 4 or memory.ndim != 2 or memory.shape[0] != q.shape[-1]:
        raise ValueError(
            "q must be [B, H, W, D] and memory [D, N], "
            f"got {list(q.shape)} and {list(memory.shape)}"
        )
    _check_like("memory", memory, q)
    return _scalar("scale", q.shape[-1] ** -0.5 if scale is None else scale, q)


def _check_frames(q: Tensor, k: Tensor, v: Tensor, first_row: int) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, H, W, D], got {list(q.shape)}")
    if q.dtype not in TOLERANCE:
        raise ValueError(f"q must be a floating-point tensor, got {q.dtype}")
    b, rows, width, d = q.shape
    for name, x in (("k", k), ("v", v)):
        _check_like(name, x, q)
        fits = x.ndim == 5 and (x.shape[0], *x.shape[3:]) == (b, width, d) and x.shape[1] > 0
        if not fits:
            raise ValueError(
                f"{name} must be [B, T, H, W, D] with B={b}, W={width}, D={d} as in q, "
                f"got {list(x.shape)}"
            )
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {list(k.shape)} and {list(v.shape)}")
    if not 0 <= first_row <= k.shape[2] - rows:
        raise ValueError(
            f"rows first_row .. first_row + h - 1 of q must lie in a frame of {k.shape[2]} rows, "
            f"got {first_row=} and h={rows}"
        )


def _check_like(name: str, x: Tensor, q: Tensor) -> None:
    if (x.dtype, x.device) != (q.dtype, q.device):
        raise ValueError(
            f"{name} must have the type and device of q, {q.dtype} on {q.device}, "
            f"got {x.dtype} on {x.device}"
        )


def _scalar(name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """A number or one-element tensor as [] in at least float32 on the device of `like`."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {list(value.shape)}")
        value = value.reshape(())
    elif math.isnan(value):
        raise ValueError(f"{name} must be a number, got nan")
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.as_tensor(value, dtype=dtype, device=like.device)
