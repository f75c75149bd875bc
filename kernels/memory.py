"""The memory bank of MANA (Yu et al., CVPR 2022, section 3.3), FlashAttention style.

    p_in = softmax_n(s q_i . m_n)          N learned entries, the same for every pixel
    y_i  = sum_n p_in m_n                  the entries are both the keys and the values

Backward, with delta_i = do_i . y_i and dS_in = p_in (do_i . m_n - delta_i):

    dq_i = s sum_n dS_in m_n     dm_n = sum_i p_in do_i + s sum_i dS_in q_i
    ds   = sum_i q_i . sum_n dS_in m_n

One launch forward, one backward: its first programs own a tile of pixels and give dq and a share
of ds, the others own a tile of entries and a chunk of the pixels and give a share of dm. Shares
are added afterwards in a fixed order, so that equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import config, layout
from .layout import AMD

LOG2_E = tl.constexpr(layout.LOG2_E)
LOW = tl.constexpr(-1e30)  # below every logit, and finite times any scale
PROGRAMS = 256  # that share the pixels of dm, about two for each core of a large GPU


@triton.jit
def _load_pixels(ptr, rows, P, D: tl.constexpr):
    """Rows of a [P, D] matrix; rows past the end read as zero."""
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(ptr + offsets, mask=rows[:, None] < P, other=0.0)


@triton.jit
def _load_entries(m_ptr, cols, N, D: tl.constexpr, EVEN_N: tl.constexpr):
    """Columns of the [D, N] memory; columns past the end read as zero."""
    pointers = m_ptr + tl.arange(0, D)[:, None] * N + cols[None, :]
    if EVEN_N:
        return tl.load(pointers)
    return tl.load(pointers, mask=cols[None, :] < N, other=0.0)


@triton.jit
def _forward_kernel(
    q_ptr,  # [P, D]
    m_ptr,  # [D, N]
    scale_ptr,  # []
    y_ptr,  # [P, D]
    lse_ptr,  # [P], base 2
    P, N, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # one program per BLOCK_M pixels
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows < P
    q = _load_pixels(q_ptr, rows, P, D)  # [M, D]
    scale = tl.load(scale_ptr)
    # the sign goes to q, so that the largest logit is c times the largest product
    signed_q = tl.where(scale < 0, -q, q)
    c = tl.abs(scale) * LOG2_E
    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        m = _load_entries(m_ptr, cols, N, D, EVEN_N)  # [D, N]
        s = tl.dot(signed_q, m, input_precision=PRECISION)  # [M, N]
        if not EVEN_N:
            s = tl.where(cols[None, :] < N, s, LOW)
        m_new = tl.maximum(m_i, tl.max(s, axis=1) * c)
        p = tl.exp2(s * c - m_new[:, None])
        if not EVEN_N:  # c may be zero
            p = tl.where(cols[None, :] < N, p, 0.0)
        rescale = tl.exp2(m_i - m_new)
        l = l * rescale + tl.sum(p, axis=1)
        acc = tl.dot(p.to(m.dtype), m.T, acc * rescale[:, None], input_precision=PRECISION)
        m_i = m_new
    y = acc / l[:, None]
    tl.store(lse_ptr + rows, m_i + tl.log2(l), mask=inside)
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside[:, None])


@triton.jit
def _load_upstream(do_ptr, y_ptr, rows, P, D: tl.constexpr):
    """Do [M, D] and delta [M] of some pixels."""
    do = _load_pixels(do_ptr, rows, P, D)
    y = _load_pixels(y_ptr, rows, P, D)
    return do, tl.sum(do.to(tl.float32) * y.to(tl.float32), axis=1)


@triton.jit
def _dq_tile(
    q_ptr, m_ptr, do_ptr, y_ptr, lse_ptr, dq_ptr, dscale_ptr, scale, P, N,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of dq and its share of dscale."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    q = _load_pixels(q_ptr, rows, P, D)  # [M, D]
    do, delta = _load_upstream(do_ptr, y_ptr, rows, P, D)
    # past the end p = exp2(-inf) = 0
    lse = tl.load(lse_ptr + rows, mask=rows < P, other=float("inf"))
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for start in range(0, N, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)
        m = _load_entries(m_ptr, cols, N, D, EVEN_N)  # [D, N]
        s = tl.dot(q, m, input_precision=PRECISION)  # [M, N]
        p = tl.exp2(s * (scale * LOG2_E) - lse[:, None])
        if not EVEN_N:
            p = tl.where(cols[None, :] < N, p, 0.0)
        dp = tl.dot(do, m, input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(m.dtype), m.T, dq, input_precision=PRECISION)
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(dq * q.to(tl.float32)))
    dq *= scale
    offsets = rows[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(dq_ptr + offsets, dq.to(dq_ptr.dtype.element_ty), mask=rows[:, None] < P)


@triton.jit
def _dm_tile(
    q_ptr, m_ptr, do_ptr, y_ptr, lse_ptr, dm_ptr, scale, P, N,
    program, chunk_tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The share of one chunk of pixels in the gradient of one tile of entries."""
    tiles = tl.cdiv(N, BLOCK_N)
    chunk = (program // tiles).to(tl.int64)
    cols = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    m = _load_entries(m_ptr, cols, N, D, EVEN_N).T  # [N, D]
    dm = tl.zeros([BLOCK_N, D], tl.float32)
    for tile in range(0, chunk_tiles):
        rows = (chunk * chunk_tiles + tile) * BLOCK_M + tl.arange(0, BLOCK_M)
        q = _load_pixels(q_ptr, rows, P, D)  # [M, D]
        do, delta = _load_upstream(do_ptr, y_ptr, rows, P, D)
        lse = tl.load(lse_ptr + rows, mask=rows < P, other=float("inf"))
        s = tl.dot(m, q.T, input_precision=PRECISION)  # [N, M]
        p = tl.exp2(s * (scale * LOG2_E) - lse[None, :])
        dm = tl.dot(p.to(q.dtype), do, dm, input_precision=PRECISION)
        dp = tl.dot(m, do.T, input_precision=PRECISION)
        ds = p * (dp * scale - (delta * scale)[None, :])
        dm = tl.dot(ds.to(q.dtype), q, dm, input_precision=PRECISION)
    offsets = tl.arange(0, D)[None, :] * N + cols[:, None]
    tl.store(dm_ptr + chunk * N * D + offsets, dm, mask=cols[:, None] < N)


@triton.jit
def _backward_kernel(
    q_ptr,  # [P, D]
    m_ptr,  # [D, N]
    scale_ptr,  # []
    do_ptr,  # [P, D]
    y_ptr,  # [P, D]
    lse_ptr,  # [P], base 2
    dq_ptr,  # [P, D]
    dm_ptr,  # [chunks, D, N]
    dscale_ptr,  # [pixel tiles]
    P, N, pixel_tiles, chunk_tiles,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    # one program per BLOCK_M pixels, then one per BLOCK_N entries and chunk of pixels
    scale = tl.load(scale_ptr)
    program = tl.program_id(0)
    if program < pixel_tiles:
        _dq_tile(
            q_ptr, m_ptr, do_ptr, y_ptr, lse_ptr, dq_ptr, dscale_ptr, scale, P, N,
            D, BLOCK_M, BLOCK_N, EVEN_N, PRECISION,
        )  # fmt: skip
    else:
        _dm_tile(
            q_ptr, m_ptr, do_ptr, y_ptr, lse_ptr, dm_ptr, scale, P, N,
            program - pixel_tiles, chunk_tiles, D, BLOCK_M, BLOCK_N, EVEN_N, PRECISION,
        )  # fmt: skip


def options(config: dict, n: int, dtype: torch.dtype, amd: bool = AMD) -> dict:
    """The constexprs of both kernels but D, and the launch options."""
    launch = {name: value for name, value in config.items() if name != "WARP_SPECIALIZE"}
    even = n % config["BLOCK_N"] == 0
    return {**launch, "EVEN_N": even, "PRECISION": layout.precision(dtype, amd)}


def forward(q: Tensor, memory: Tensor, scale: Tensor, config: dict) -> tuple[Tensor, Tensor]:
    """Launch the forward kernel: y [..., D] and lse [...] in base 2.

    Args:
        q: [..., D] contiguous queries.
        memory: [D, N] contiguous entries.
        scale: [] float32, factor of the dot product.
        config: launch configuration of "memory_forward".
    """
    (d, n), pixels = memory.shape, q.shape[:-1]
    y, lse = torch.empty_like(q), q.new_empty(pixels, dtype=torch.float32)
    with torch.cuda.device_of(q):
        _forward_kernel[(triton.cdiv(pixels.numel(), config["BLOCK_M"]),)](
            q, memory, scale, y, lse, pixels.numel(), n, D=d, **options(config, n, q.dtype)
        )
    return y, lse


def backward(
    do: Tensor, q: Tensor, memory: Tensor, scale: Tensor, y: Tensor, lse: Tensor, config: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch the backward kernel: dq [..., D], dmemory [D, N], dscale [].

    Args:
        do: [..., D] gradient of y.
        q, memory, scale, y, lse: see `forward`.
        config: launch configuration of "memory_backward".
    """
    (d, n), pixels = memory.shape, lse.numel()
    pixel_tiles = triton.cdiv(pixels, config["BLOCK_M"])
    entry_tiles = triton.cdiv(n, config["BLOCK_N"])
    chunk_tiles = triton.cdiv(pixel_tiles, triton.cdiv(PROGRAMS, entry_tiles))
    chunks = triton.cdiv(pixel_tiles, chunk_tiles)
    dq = torch.empty_like(q)
    dm = lse.new_empty(chunks, d, n)
    dscale = lse.new_empty(pixel_tiles)
    with torch.cuda.device_of(q):
        _backward_kernel[(pixel_tiles + chunks * entry_tiles,)](
            q, memory, scale, do, y, lse, dq, dm, dscale, pixels, n, pixel_tiles, chunk_tiles,
            D=d, **options(config, n, q.dtype),
        )  # fmt: skip
    return dq, dm.sum(0).to(memory.dtype), dscale.sum()


def launch_config(kernel: str, q: Tensor) -> dict:
    """Launch options of a kernel for queries [B, H, W, D]."""
    height, width, d = q.shape[1:]
    return config.launch_config(kernel, d, q.dtype, height, width, q.device)


@torch.library.custom_op("mana::memory_attention", mutates_args=())
def _attention(q: Tensor, memory: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    q, memory = q.contiguous(), memory.contiguous()
    return forward(q, memory, scale, launch_config("memory_forward", q))


@_attention.register_fake
def _(q, memory, scale):
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("mana::memory_attention_backward", mutates_args=())
def _attention_backward(
    do: Tensor, q: Tensor, memory: Tensor, scale: Tensor, y: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    do, q, memory, y = (x.contiguous() for x in (do, q, memory, y))
    return backward(do, q, memory, scale, y, lse, launch_config("memory_backward", q))


@_attention_backward.register_fake
def _(do, q, memory, scale, y, lse):
    return q.new_empty(q.shape), memory.new_empty(memory.shape), torch.empty_like(scale)


def _save_attention(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _differentiate_attention(ctx, do, _):
    return _attention_backward(do, *ctx.saved_tensors)


_attention.register_autograd(_differentiate_attention, setup_context=_save_attention)


def memory_attention(q: Tensor, memory: Tensor, scale: Tensor) -> Tensor:
    """`reference.memory_attention` in one launch: q [B, H, W, D], memory [D, N], scale []."""
    layout.check_operands(q.shape[-1], q.dtype)
    if not memory.shape[1] or not q.numel():
        raise ValueError(
            f"q and memory must not be empty, got {list(q.shape)} and {list(memory.shape)}; "
            "use backend 'tiled'"
        )
    return _attention(q, memory, scale)[0]
