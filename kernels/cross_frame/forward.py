"""The forward pass: online softmax over the visited key blocks, FlashAttention style."""

# Triton's decorator hides what its functions take and return
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import config
from ..layout import (
    LN_2,
    Sizes,
    block_at,
    block_height,
    block_origin,
    block_pixels,
    block_width,
    check_operands,
    load_rows,
    store_pixels,
)
from .gaussian import COLUMNS, Tables, inv_2sigma2_base_2, scores, table_row
from .window import key_window, select_key_tiles


@triton.jit
def _forward_kernel(
    q_ptr,  # [B, Q, D] tiles, times s log2(e)
    k_ptr,  # [B, T, K, D] tiles
    v_ptr,  # [B, T, K, D] tiles
    query_table_ptr,  # [cells_y, cells_x, M, 16]
    key_table_ptr,  # [K, 16]
    inv_2sigma2_ptr,  # [], times log2(e)
    window_radius_ptr,  # [B, T, query tiles]
    o_ptr,  # [B, T, h, W, D]
    displacement_ptr,  # [B, T, h, W, 2]
    lse_ptr,  # [B, T, h, W], natural
    B, T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels,
    zero_y, zero_x, cells_x, cells,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DISPLACEMENT: tl.constexpr,
    EXACT: tl.constexpr, WARP_SPECIALIZE: tl.constexpr,
):  # fmt: skip
    # one program per block of queries, frame and clip
    block, frame, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    dtype = k_ptr.dtype.element_ty
    image = clip * T + frame
    top, left = block_origin(block, tiles_x, BLOCK_M)
    y, x = block_pixels(BLOCK_M)
    y, x = y + top, x + left
    window_radius = tl.load(window_radius_ptr + image * (q_pixels // 128) + block * BLOCK_M // 128)
    first_y, last_y, first_x, last_x = key_window(
        window_radius, first_row + top // 8 * 8, left // 16 * 16, height, width, BLOCK_N
    )
    across = last_x - first_x
    q_rows, k_rows, v_rows = q_ptr, k_ptr, v_ptr
    query_table, key_table = query_table_ptr, key_table_ptr
    if WARP_SPECIALIZE:
        # every operand by descriptor: one that is not loses the specialization
        q_rows = tl.make_tensor_descriptor(q_ptr, [B * q_pixels, D], [D, 1], [BLOCK_M, D])
        k_rows = tl.make_tensor_descriptor(k_ptr, [B * T * k_pixels, D], [D, 1], [BLOCK_N, D])
        v_rows = tl.make_tensor_descriptor(v_ptr, [B * T * k_pixels, D], [D, 1], [BLOCK_N, D])
        query_table = tl.make_tensor_descriptor(
            query_table_ptr, [cells * BLOCK_M, COLUMNS], [COLUMNS, 1], [BLOCK_M, COLUMNS]
        )
        key_table = tl.make_tensor_descriptor(
            key_table_ptr, [k_pixels, COLUMNS], [COLUMNS, 1], [BLOCK_N, COLUMNS]
        )
    else:
        clip, image = clip.to(tl.int64), image.to(tl.int64)  # descriptors count in 32 bits
    q = load_rows(q_rows, clip * q_pixels + block * BLOCK_M, BLOCK_M, D, WARP_SPECIALIZE)
    c = tl.load(inv_2sigma2_ptr)
    b, a = block_pixels(BLOCK_N)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    within = tl.zeros([BLOCK_M, COLUMNS], tl.float32)  # sum of p times the key's place in its block
    center_y = tl.zeros([BLOCK_M], tl.float32)  # sum of p times the block's place
    center_x = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(0, across * (last_y - first_y), warp_specialize=WARP_SPECIALIZE):
        row, column = first_y + n // across, first_x + n % across
        key_block = block_at(row, column, tiles_x, BLOCK_N)
        key_y, key_x = row * block_height(BLOCK_N), column * block_width(BLOCK_N)
        first_key = image * k_pixels + key_block * BLOCK_N
        table = table_row(key_y, key_x, top, left, zero_y, zero_x, cells_x, BLOCK_M, BLOCK_N)
        k = load_rows(k_rows, first_key, BLOCK_N, D, WARP_SPECIALIZE)
        key_columns = load_rows(key_table, key_block * BLOCK_N, BLOCK_N, COLUMNS, WARP_SPECIALIZE)
        s = scores(
            q, k, query_table, table, key_columns, first_row + y, x, key_y + b, key_x + a, c,
            height, width, BLOCK_M, EXACT, DESCRIPTOR=WARP_SPECIALIZE,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, axis=1))
        p = tl.exp2(s - m_new[:, None])
        rescale = tl.exp2(m - m_new)
        total = tl.sum(p, axis=1)
        l = l * rescale + total
        v = load_rows(v_rows, first_key, BLOCK_N, D, WARP_SPECIALIZE)
        acc = tl.dot(p.to(dtype), v, acc * rescale[:, None], input_precision="ieee")
        if DISPLACEMENT:
            within = tl.dot(
                p.to(dtype), key_columns, within * rescale[:, None], input_precision="ieee"
            )
            center_y = center_y * rescale + (key_y - first_row - top) * total
            center_x = center_x * rescale + (key_x - left) * total
        m = m_new

    image = image.to(tl.int64)
    store_pixels(o_ptr, acc / l[:, None], image, y, x, rows, width, D)
    pixel = (image * rows + y) * width + x
    inside = (y < rows) & (x < width)
    tl.store(lse_ptr + pixel, (m + tl.log2(l)) * LN_2, mask=inside)
    if DISPLACEMENT:
        _store_displacement(
            displacement_ptr, within, center_y, center_x, l, pixel, inside, BLOCK_M, BLOCK_N
        )


@triton.jit
def _store_displacement(ptr, within, center_y, center_x, l, pixel, inside,
                        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Write (dy, dx): the sums are relative to the origin of the block of queries."""
    y, x = block_pixels(BLOCK_M)
    column = tl.arange(0, COLUMNS)[None, :]
    dy = (tl.sum(tl.where(column == 3, within, 0.0), axis=1) + center_y) / l
    dx = (tl.sum(tl.where(column == 0, within, 0.0), axis=1) + center_x) / l
    tl.store(ptr + 2 * pixel, dy + (block_height(BLOCK_N) - 1) / 2 - y, mask=inside)
    tl.store(ptr + 2 * pixel + 1, dx + (block_width(BLOCK_N) - 1) / 2 - x, mask=inside)


@triton.jit
def _lse_kernel(
    q_ptr,  # [B, Q, D] tiles, times s log2(e)
    k_ptr,  # [B, T, K, D] tiles
    query_table_ptr,  # [M, 16], without a Gaussian
    key_table_ptr,  # [K, 16]
    lse_ptr,  # [B, T, h, W], natural
    T, rows, height, width, first_row, tiles_x, q_pixels, k_pixels,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    # one program per block of queries, frame and clip, over all keys
    block, frame, clip = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    image = (clip * T + frame).to(tl.int64)
    q = load_rows(q_ptr, clip.to(tl.int64) * q_pixels + block * BLOCK_M, BLOCK_M, D)
    top, left = block_origin(block, tiles_x, BLOCK_M)
    y, x = block_pixels(BLOCK_M)
    y, x = y + top, x + left
    b, a = block_pixels(BLOCK_N)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for n in tl.range(0, k_pixels // BLOCK_N):
        key_y, key_x = block_origin(n, tiles_x, BLOCK_N)
        k = load_rows(k_ptr, image * k_pixels + n * BLOCK_N, BLOCK_N, D)
        key_columns = load_rows(key_table_ptr, n * BLOCK_N, BLOCK_N, COLUMNS)
        s = scores(
            q, k, query_table_ptr, 0, key_columns, y, x, key_y + b, key_x + a, 0.0,
            height, width, BLOCK_M, EXACT,
        )  # fmt: skip
        m_new = tl.maximum(m, tl.max(s, axis=1))
        l = l * tl.exp2(m - m_new) + tl.sum(tl.exp2(s - m_new[:, None]), axis=1)
        m = m_new
    inside = (y < rows) & (x < width)
    tl.store(lse_ptr + (image * rows + y) * width + x, (m + tl.log2(l)) * LN_2, mask=inside)


class Result(NamedTuple):
    """What the forward pass computes and the backward pass needs."""

    o: Tensor  # [B, T, h, W, D]
    displacement: Tensor  # [B, T, h, W, 2] float32; [0] unless asked for
    lse: Tensor  # [B, T, h, W] float32
    window_radius: Tensor  # [B, T, query tiles] int32; see window.py


def attend_tiles(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, *, rows: int, height: int, width: int,
    first_row: int, gaussian: str, offsets: bool, tolerance: float,
) -> Result:  # fmt: skip
    """Attention of tiles, such as `projection.project` writes and a stream keeps; no gradient.

    Nothing is copied from the host and nothing waits for the device: a CUDA graph may hold it.

    Args:
        q: [B, Q, D] queries as tiles of rows first_row .. first_row + rows - 1, times s log2(e).
        k, v: [B, T, K, D] keys and values as tiles of height x width pixels, of the type of q.
        sigma: [] width of the Gaussian in pixels.
        rows, height, width, first_row: sizes in pixels.
        gaussian, offsets, tolerance: as of `cross_frame.forward`.

    Raises:
        ValueError: when the tensors are not tiles of these sizes, of one type.
    """
    sizes = Sizes(*k.shape[:2], k.shape[-1], rows, height, width, first_row)
    _check_tiles(q, k, v, sizes)
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    shape = (sizes.B, sizes.T, sizes.rows, sizes.width)
    o = v.new_empty(*shape, sizes.D)
    displacement = v.new_empty((*shape, 2) if offsets else 0, dtype=torch.float32)
    lse = v.new_empty(shape, dtype=torch.float32)
    with torch.cuda.device_of(q):
        c = inv_2sigma2_base_2(sigma)
        window_radius = select_key_tiles(q, k, c, sizes, tolerance)
        options = kernel_options("cross_frame_forward", sizes, k, DISPLACEMENT=offsets)
        if options["WARP_SPECIALIZE"]:
            triton.set_allocator(_workspace)
        tables = Tables.build(sizes, c, k, options)
        _forward_kernel[(sizes.q_pixels // options["BLOCK_M"], sizes.T, sizes.B)](
            q, k, v, tables.query, tables.key, c, window_radius, o, displacement, lse,
            sizes.B, sizes.T, *sizes.pixels, *tables[2:], **options,
        )  # fmt: skip
        plain = _plain_lse(q, k, sizes) if gaussian == "gate" else None
    if plain is None:
        return Result(o, displacement, lse, window_radius)
    gate = (lse - plain).exp_()[..., None]
    if offsets:
        displacement *= gate
    return Result((o * gate).to(o.dtype), displacement, plain, window_radius)


def _check_tiles(q: Tensor, k: Tensor, v: Tensor, sizes: Sizes) -> None:
    check_operands(sizes.D, q.dtype)
    keys = [sizes.B, sizes.T, sizes.k_pixels, sizes.D]
    for name, x, shape in (
        ("q", q, [sizes.B, sizes.q_pixels, sizes.D]),
        ("k", k, keys),
        ("v", v, keys),
    ):
        if list(x.shape) != shape:
            raise ValueError(
                f"{name} must be {shape}, tiles of {sizes.rows} rows of {sizes.height} x "
                f"{sizes.width} pixels, got {list(x.shape)}; see layout.to_tiles"
            )
        if x.dtype != q.dtype:
            raise ValueError(f"{name} must be {q.dtype} like q, got {x.dtype}; convert it")


def kernel_options(kernel: str, sizes: Sizes, like: Tensor, **flags: bool) -> dict[str, Any]:
    """The constants and launch options of a kernel; only the forward kernel is specialized."""
    options = config.launch_config(
        kernel, sizes.D, like.dtype, sizes.height, sizes.width, like.device
    )
    if kernel != "cross_frame_forward":
        options.pop("WARP_SPECIALIZE")
    return {"D": sizes.D, "EXACT": like.dtype == torch.float32, **flags, **options}


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Memory for the descriptors that a kernel makes."""
    return torch.empty(size, device="cuda", dtype=torch.int8)


def _plain_lse(q: Tensor, k: Tensor, sizes: Sizes) -> Tensor:
    """Log-sum-exp of the logits without a Gaussian, over all keys: [B, T, h, W]."""
    options = kernel_options("cross_frame_lse", sizes, k)
    tables = Tables.build(sizes, None, k, options)
    lse = k.new_empty(sizes.B, sizes.T, sizes.rows, sizes.width, dtype=torch.float32)
    _lse_kernel[(sizes.q_pixels // options["BLOCK_M"], sizes.T, sizes.B)](
        q, k, tables.query, tables.key, lse, sizes.T, *sizes.pixels, **options
    )
    return lse
