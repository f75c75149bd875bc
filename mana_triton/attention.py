"""The two attentions of MANA: argument checks and choice of backend."""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
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
        return_visited: also return the fraction of (query, key) pairs that the result rests on.

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
    # a compiled graph cannot look at a tensor's value, and a GPU would be waited for
    hidden = isinstance(sigma, Tensor) and (
        sigma.device.type != "cpu" or torch.compiler.is_compiling()
    )
    given, sigma = sigma, _scalar("sigma", sigma, q)
    scale = _scalar("scale", q.shape[-1] ** -0.5 if scale is None else scale, q)
    if not hidden and not given > 0:
        raise ValueError(f"sigma must be > 0 (infinity allowed), got {float(given)}")
    name, _ = choose_backend(backend, q.device)
    if name == "triton":
        _check_triton(q)
    if name == "triton" or (name == "tiled" and torch.compiler.is_compiling()):
        result = _attend(
            q, k, v, sigma, scale, gaussian, offsets, tolerance, first_row, name, return_visited
        )[:4]
        if return_visited and not torch.compiler.is_compiling():
            result = (*result[:3], result[3].item())
    elif name == "reference":
        from mana_triton.kernels import reference

        result = reference.cross_frame_attention(
            q, k, v, sigma, scale, gaussian=gaussian, offsets=offsets, first_row=first_row
        )
    else:
        from mana_triton.kernels import tiled

        result = tiled.cross_frame_attention(
            q, k, v, sigma, scale,
            gaussian=gaussian, offsets=offsets, tolerance=tolerance, first_row=first_row,
        )  # fmt: skip
    wanted = (True, offsets, return_lse, return_visited)
    outputs = [x for x, want in zip(result, wanted, strict=True) if want]
    return tuple(outputs) if len(outputs) > 1 else outputs[0]


# --- the operator: what PyTorch's compiler and exporter see, one node with a gradient


@torch.library.custom_op("mana::cross_frame_attention", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    scale: Tensor,
    gaussian: str,
    offsets: bool,
    tolerance: float,
    first_row: int,
    backend: str,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`cross_frame_attention` on checked arguments: o, displacement, lse, visited, Triton's plan.

    The displacement is [0] without `offsets`, visited is not a number without `count`, the plan
    is [0] on other backends.
    """
    options = {"gaussian": gaussian, "offsets": offsets, "first_row": first_row}
    if backend == "triton":
        from mana_triton.kernels import cross_frame

        with torch.cuda.device_of(q):
            result = cross_frame.forward(q, k, v, sigma, scale, tolerance=tolerance, **options)
            visited = cross_frame.visited_fraction(result, q, k, first_row) if count else None
        return *result[:3], _visited(visited, q), result.halo
    attend, options = _in_pytorch(backend, options, tolerance)
    o, displacement, lse, visited = attend(q, k, v, sigma, scale, **options)
    displacement = lse.new_empty(0) if displacement is None else displacement.to(sigma.dtype)
    return (
        o.contiguous(), displacement.contiguous(), lse.to(sigma.dtype).contiguous(),
        _visited(visited, q), q.new_empty(0, dtype=torch.int32),
    )  # fmt: skip


def _visited(fraction: Tensor | float | None, like: Tensor) -> Tensor:
    fraction = math.nan if fraction is None else fraction
    return torch.as_tensor(fraction, dtype=torch.float64, device=like.device)


def _in_pytorch(backend: str, options: dict, tolerance: float) -> tuple[Callable, dict]:
    """The function of a backend that autograd differentiates, and its options."""
    if backend == "reference":
        from mana_triton.kernels import reference

        return reference.cross_frame_attention, options
    from mana_triton.kernels import tiled

    return tiled.cross_frame_attention, {**options, "tolerance": tolerance}


@_attend.register_fake
def _(q, k, v, sigma, scale, gaussian, offsets, tolerance, first_row, backend, count):
    b, rows, width, d = q.shape
    shape = (b, k.shape[1], rows, width)
    triton = backend == "triton"
    tiles = (rows + 7) // 8 * ((width + 15) // 16)
    return (
        q.new_empty(*shape, d),
        sigma.new_empty((*shape, 2) if offsets else (0,)),
        sigma.new_empty(shape),
        sigma.new_empty((), dtype=torch.float64),
        q.new_empty((b, k.shape[1], tiles) if triton else (0,), dtype=torch.int32),
    )


@torch.library.custom_op("mana::cross_frame_attention_backward", mutates_args=())
def _attend_backward(
    do: Tensor,
    dd: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    scale: Tensor,
    o: Tensor,
    displacement: Tensor,
    lse: Tensor,
    plan: Tensor,
    gaussian: str,
    offsets: bool,
    tolerance: float,
    first_row: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, sigma and scale from those of o, displacement and lse."""
    inputs = (q, k, v, sigma, scale)
    options = {"gaussian": gaussian, "offsets": offsets, "first_row": first_row}
    if backend == "triton":
        from mana_triton.kernels import cross_frame

        result = cross_frame.Result(o, displacement, lse, plan)
        with torch.cuda.device_of(q):
            return cross_frame.backward(do, dd, dlse, *inputs, result, **options)
    attend, options = _in_pytorch(backend, options, tolerance)

    def differentiate() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = attend(*leaves, **options)[:3]
        pairs = [(x, w) for x, w in zip(outputs, (do, dd, dlse), strict=True) if x is not None]
        weights = [w.to(x.dtype) for x, w in pairs]
        grads = torch.autograd.grad([x for x, _ in pairs], leaves, weights)
        return tuple(x.contiguous() for x in grads)

    # inside an operator nothing is recorded for autograd, on another thread it is
    with ThreadPoolExecutor(1) as thread:
        dq, dk, dv, dsigma, dscale = thread.submit(differentiate).result()
    return dq, dk, dv, dsigma, dscale


@_attend_backward.register_fake
def _(do, dd, dlse, q, k, v, sigma, scale, *rest):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, sigma, scale))


def _save(ctx, inputs, output):
    *tensors, gaussian, offsets, tolerance, first_row, backend, _ = inputs
    o, displacement, lse, visited, plan = output
    ctx.save_for_backward(*tensors, o, displacement, lse, plan)
    ctx.options = gaussian, offsets, tolerance, first_row, backend
    ctx.mark_non_differentiable(visited, plan)


def _differentiate(ctx, *grads):
    backward = torch.ops.mana.cross_frame_attention_backward
    return *backward(*grads[:3], *ctx.saved_tensors, *ctx.options), *[None] * 6


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
    scale = _check_memory(q, memory, scale)
    name, _ = choose_backend(backend, q.device)
    if name == "triton":
        from mana_triton.kernels.memory import memory_attention as attend
    elif name == "reference":
        from mana_triton.kernels.reference import memory_attention as attend
    else:
        from mana_triton.kernels.tiled import memory_attention as attend
    return attend(q, memory, scale)


def memory_loss(
    q: Tensor, memory: Tensor, *, scale: Tensor | float | None = None, backend: str = "auto"
) -> Tensor:
    """Mean |y - q| [] of y = memory_attention(q, memory): how well the memory bank knows q.

    The loss of training stage 2 (section 3.4); arguments and errors are `memory_attention`'s.
    """
    if choose_backend(backend, q.device)[0] != "triton":
        return F.l1_loss(memory_attention(q, memory, scale=scale, backend=backend), q)
    from mana_triton.kernels.memory import memory_loss as attend

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


def _check_triton(q: Tensor) -> None:
    from mana_triton.kernels.cross_frame import DTYPES, HEADS

    if q.shape[-1] not in HEADS or q.dtype not in DTYPES:
        raise ValueError(
            f"backend 'triton' needs D in {', '.join(map(str, HEADS))} and float16, bfloat16 or "
            f"float32, got D={q.shape[-1]} and {q.dtype}; use backend 'tiled'"
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
