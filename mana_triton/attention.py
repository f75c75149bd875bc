"""The two attentions of MANA: argument checks and choice of backend."""

import math
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mana_triton.kernels import reference, tiled
from mana_triton.kernels.reference import CrossFrame

BACKENDS = ("auto", "triton", "tiled", "reference")
GAUSSIANS = ("bias", "gate")
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 1e-3,
}
STREAM_TOLERANCE = 0.03  # of streams; on real clips below 0.001 of a step of 8 bits


def choose_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """The backend that will run and the reason; ValueError if it was asked for and cannot."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in ("tiled", "reference"):
        return backend, "as asked"
    refusal = _refusal_of_triton(device.type, device.index, backend == "triton")
    if backend == "auto":
        return ("tiled", f"not triton: {refusal}") if refusal else ("triton", "a GPU")
    if refusal:
        raise ValueError(
            f"backend 'triton' is not available on {device}: {refusal}; use 'tiled' or 'auto'"
        )
    return backend, "as asked"


@torch.compiler.assume_constant_result
def _refusal_of_triton(kind: str, index: int | None, interpreted: bool) -> str:
    """Why the Triton kernels cannot run on a device, "" if they can.

    Args:
        kind, index: of the device.
        interpreted: a CPU will do where Triton's interpreter was chosen for this process.
    """
    if kind not in ("cuda", "cpu") or (kind == "cpu" and not interpreted):
        return f"it needs an NVIDIA or AMD GPU, got {kind}"
    if find_spec("triton") is None:
        return "the package triton is not installed"
    if kind == "cpu":
        from triton import knobs

        return "" if knobs.runtime.interpret else "it needs an NVIDIA or AMD GPU, got cpu"
    capability = torch.cuda.get_device_capability(index)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, got {capability[0]}.{capability[1]}"
    return ""


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
    return_density: bool = False,
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
        tolerance: bound eta on the part of the softmax that dropped keys hold, relative to the
            part that kept keys hold: the error is at most eta (max|v| + |o|). None is 1e-6 for
            float32 and 1e-3 for half precision; 0 visits every pair.
        offsets: also return the expected displacement sum_j a_ij (p_j - p_i).
        backend: "auto", "triton", "tiled" or "reference".
        first_row: first row of a band of queries in the frame.
        return_lse: also return the natural log-sum-exp of the softmax's logits.
        return_density: also return the fraction of (query, key) pairs that were visited.

    Returns:
        o [B, T, H, W, D]; or a tuple of it and, as asked for and in this order, displacement
        [B, T, H, W, 2] as (dy, dx) in pixels, lse [B, T, H, W], density (float).

    Raises:
        ValueError: shapes, devices or types that do not fit; sigma or tolerance out of range.
    """
    tolerance = _check_options(q, k, v, gaussian, tolerance, first_row)
    sigma, scale = _check_sigma(sigma, q), _scale(scale, q)
    inputs, options = (q, k, v, sigma, scale), (gaussian, offsets, tolerance, first_row)
    result = _on_backend(choose_backend(backend, q.device)[0], inputs, options, return_density)
    wanted = (True, offsets, return_lse, return_density)
    outputs = [x for x, want in zip(result, wanted, strict=True) if want]
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


def _on_backend(
    name: str,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    options: tuple,
    return_density: bool,
) -> CrossFrame:
    """What the backend returns for q, k, v, sigma, scale and the operator's options."""
    gaussian, offsets, tolerance, first_row = options
    if name == "reference":
        return reference.cross_frame_attention(
            *inputs, gaussian=gaussian, offsets=offsets, first_row=first_row
        )
    if name == "triton":
        from mana_triton.kernels.layout import check_operands

        check_operands(inputs[0].shape[-1], inputs[0].dtype)
    elif not torch.compiler.is_compiling():
        return tiled.cross_frame_attention(
            *inputs, gaussian=gaussian, offsets=offsets, tolerance=tolerance, first_row=first_row
        )
    o, displacement, lse, density, window_radius = _attend(*inputs, *options, name)
    if return_density and name == "triton":
        from mana_triton.kernels import cross_frame

        density = cross_frame.density(window_radius, inputs[0], inputs[1], first_row)
    if return_density and not torch.compiler.is_compiling():
        density = density.item()
    return CrossFrame(o, displacement, lse, density)


# --- the operator: one node with a gradient for PyTorch's compiler and exporter


@torch.library.custom_op("mana::cross_frame_attention", mutates_args=())
def _attend(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor, gaussian: str, offsets: bool,
    tolerance: float, first_row: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`cross_frame_attention` on checked arguments: o, displacement, lse, density, window radius.

    The displacement is [0] without `offsets`, the window radius on backend "tiled", where the
    density is known; backend "triton" gives -1, and the window radius of each query tile.
    """
    options = {"gaussian": gaussian, "offsets": offsets, "tolerance": tolerance}
    if backend == "triton":
        from mana_triton.kernels import cross_frame

        with torch.cuda.device_of(q):
            result = cross_frame.forward(q, k, v, sigma, scale, **options, first_row=first_row)
        return *result[:3], q.new_full((), -1.0, dtype=torch.float64), result.window_radius
    o, displacement, lse, density = tiled.cross_frame_attention(
        q, k, v, sigma, scale, **options, first_row=first_row
    )
    displacement = lse.new_empty(0) if displacement is None else displacement
    density = torch.as_tensor(density, dtype=torch.float64, device=q.device)
    return o, displacement, lse, density, q.new_empty(0, dtype=torch.int32)


@_attend.register_fake
def _(q, k, v, sigma, scale, gaussian, offsets, tolerance, first_row, backend):
    b, rows, width, d = q.shape
    shape = (b, k.shape[1], rows, width)
    window_radius: tuple[int, ...] = (0,)
    if backend == "triton":
        from mana_triton.kernels.layout import query_tiles

        window_radius = (b, k.shape[1], query_tiles(rows, width))
    return (
        q.new_empty(*shape, d),
        sigma.new_empty((*shape, 2) if offsets else (0,)),
        sigma.new_empty(shape),
        sigma.new_empty((), dtype=torch.float64),
        q.new_empty(window_radius, dtype=torch.int32),
    )


@torch.library.custom_op("mana::cross_frame_attention_backward", mutates_args=())
def _attend_backward(
    do: Tensor, dd: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, sigma: Tensor,
    scale: Tensor, o: Tensor, displacement: Tensor, lse: Tensor, window_radius: Tensor,
    gaussian: str, offsets: bool, tolerance: float, first_row: int, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, sigma and scale from those of o, displacement and lse."""
    grads, inputs = (do, dd, dlse), (q, k, v, sigma, scale)
    options = {"gaussian": gaussian, "offsets": offsets, "first_row": first_row}
    if backend == "triton":
        from mana_triton.kernels import cross_frame

        result = cross_frame.Result(o, displacement, lse, window_radius)
        with torch.cuda.device_of(q):
            return cross_frame.backward(*grads, *inputs, result, **options)
    return tiled.backward(*grads, *inputs, **options, tolerance=tolerance)


@_attend_backward.register_fake
def _(do, dd, dlse, q, k, v, sigma, scale, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, sigma, scale))


def _save(ctx, inputs, output):
    *tensors, gaussian, offsets, tolerance, first_row, backend = inputs
    o, displacement, lse, density, window_radius = output
    ctx.save_for_backward(*tensors, o, displacement, lse, window_radius)
    ctx.options = gaussian, offsets, tolerance, first_row, backend
    ctx.mark_non_differentiable(density, window_radius)


def _differentiate(ctx, *grads):
    backward = torch.ops.mana.cross_frame_attention_backward
    return *backward(*grads[:3], *ctx.saved_tensors, *ctx.options), *[None] * 5


_attend.register_autograd(_differentiate, setup_context=_save)


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
    name, _ = choose_backend(backend, q.device)
    scale = _check_memory(q, memory, scale)
    if name == "triton":
        from mana_triton.kernels.memory import memory_attention as attend
    else:
        attend = (reference if name == "reference" else tiled).memory_attention
    return attend(q, memory, scale)


def memory_loss(
    q: Tensor, memory: Tensor, *, scale: Tensor | float | None = None, backend: str = "auto"
) -> Tensor:
    """Mean |y - q| [] of y = memory_attention(q, memory), the loss of training stage 2."""
    return F.l1_loss(memory_attention(q, memory, scale=scale, backend=backend), q)


def _check_memory(q: Tensor, memory: Tensor, scale: Tensor | float | None) -> Tensor:
    """The scale as a tensor; ValueError if the operands of the memory bank do not fit."""
    if q.ndim != 4 or memory.ndim != 2 or memory.shape[0] != q.shape[-1]:
        raise ValueError(
            "q must be [B, H, W, D] and memory [D, N], "
            f"got {list(q.shape)} and {list(memory.shape)}"
        )
    _check_like("memory", memory, q)
    return _scale(scale, q)


def _check_options(
    q: Tensor, k: Tensor, v: Tensor, gaussian: str, tolerance: float | None, first_row: int
) -> float:
    """The tolerance; ValueError if operands or options of the cross-frame attention do not fit."""
    _check_frames(q, k, v, first_row)
    if gaussian not in GAUSSIANS:
        raise ValueError(f"gaussian must be one of {', '.join(GAUSSIANS)}, got {gaussian!r}")
    if tolerance is None:
        tolerance = TOLERANCE[q.dtype]
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1), got {tolerance}")
    return tolerance


def _check_sigma(sigma: Tensor | float, q: Tensor) -> Tensor:
    # a compiled graph cannot look at a tensor's value, and a GPU would be waited for
    hidden = isinstance(sigma, Tensor) and (
        sigma.device.type != "cpu" or torch.compiler.is_compiling()
    )
    checked = _scalar("sigma", sigma, q)
    if not hidden and not sigma > 0:
        raise ValueError(f"sigma must be > 0 (infinity allowed), got {float(sigma)}")
    return checked


def _scale(scale: Tensor | float | None, q: Tensor) -> Tensor:
    return _scalar("scale", q.shape[-1] ** -0.5 if scale is None else scale, q)


def _check_frames(q: Tensor, k: Tensor, v: Tensor, first_row: int) -> None:
    if q.ndim != 4:
        raise ValueError(f"q must be [B, H, W, D], got {list(q.shape)}")
    if q.dtype not in TOLERANCE:
        raise ValueError(f"q must be a floating-point tensor, got {q.dtype}")
    b, rows, width, d = q.shape
    if not width * d:
        raise ValueError(f"q must be [B, H, W, D] with W and D at least 1, got {list(q.shape)}")
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
    if isinstance(value, Tensor):
        return value.to(like.device, dtype)
    # written by the device: a copy would wait for it, and cannot be part of a CUDA graph
    return torch.full((), value, dtype=dtype, device=like.device)
