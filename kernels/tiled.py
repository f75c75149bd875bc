"""Both attentions in plain PyTorch without ever forming HW x HW: CPUs, old GPUs, macOS.

A tile of queries meets one window of keys: the tile and the pixels within a window radius. With
coordinates (a, b) of a query and (y, x) of a key relative to a point nearby and
c = 1 / (2 sigma^2), four extra columns put the Gaussian into the matrix product:

    [s q, 2ca, 2cb, -c, -c(a^2 + b^2)] . [k, y, x, y^2 + x^2, 1] = s q.k - c((a - y)^2 + (b - x)^2)

The same four columns after v give the expected displacement, and a column of ones through which
the gradient of the log-sum-exp enters the backward pass: dS = P (dP - delta + dLSE). The gradient
of the first four columns gives dc, hence dsigma. Keys and values are laid out once for a strip of
tiles, whose windows overlap, and again in the backward pass.

Which keys a strip visits, and why that is exact to a tolerance: see `strips.py`.

Gate form: gate_i = bias_i exp(LSE_bias,i - LSE_plain,i), with the dense LSE_plain in chunks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import CrossFrame, inv_2sigma2
from .strips import Certificate, Strip, first_strips, longest_strip, second_strips

CELL = 8  # side of the squares of queries that get a second pass
ROWS_BACKWARD = 4  # of a query tile
CACHE = 1 << 19  # elements of a temporary that stays in a core's cache
CHUNK = 1 << 20  # elements of the largest temporary of the dense pass


# --- one strip


def _append(x: Tensor, columns: Tensor) -> Tensor:
    """Pixels x [.., rows, cols, D] and columns [rows, cols, 4] side by side, in their type."""
    return torch.cat([x.to(columns.dtype), columns.expand(*x.shape[:-1], 4)], -1)


class _Operands:
    """Augmented queries, keys and values of one strip after the other."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, c: Tensor, first_row: int, largest: float):
        self.q, self.k, self.v, self.c, self.first_row = q, k, v, c, first_row
        # nats below 0 at which ten thousand keys add nothing to the pixel's own
        self.masked = largest + math.log(1e4 / torch.finfo(c.dtype).eps)
        self.memory = c.new_empty(0)  # of the windows
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def of(self, strip: Strip) -> tuple[Tensor, Tensor, Tensor]:
        """The operands of a strip.

        Returns:
            Queries [rows, cols, D + 4]; their last columns, without the factor c [rows, cols, 4];
            keys and values [2, T, key rows, key cols, D + 4], valid until the next call.
        """
        query_columns, key_columns = self._columns(strip)
        at = strip.queries(self.first_row)
        queries = _append(self.q[at[0]][at[2:]], self.c * query_columns)
        place, inside = strip.keys(self.k.shape[2])
        k, v = self.k[place], self.v[place]
        shape = (2, k.shape[0], *key_columns.shape[:2], k.shape[-1] + 4)
        if self.memory.numel() < math.prod(shape):
            self.memory = self.c.new_empty(math.prod(shape))
        window = self.memory[: math.prod(shape)].view(shape)
        window[0, :, inside, :, :-4], window[1, :, inside, :, :-4] = k, v
        window[..., -4:] = key_columns
        for beyond in (slice(0, inside.start), slice(inside.stop, shape[2])):
            if beyond.start < beyond.stop:
                window[:, :, beyond, :, :-4] = 0
                window[0, :, beyond, :, -2] += self.masked / self.c
        return queries, query_columns, window

    def _columns(self, strip: Strip) -> tuple[Tensor, Tensor]:
        """The Gaussian's columns: 2a, 2b, -1, -(a^2 + b^2) and y, x, y^2 + x^2, 1."""
        spans = strip.rows, strip.cols, strip.key_rows, strip.key_cols
        origin = strip.rows.start, strip.cols.start
        shape = tuple(
            z - at for s, at in zip(spans, 2 * origin, strict=True) for z in (s.start, s.stop)
        )
        if shape not in self.known:
            a, b = self._centered(strip.rows, strip.cols, strip)
            y, x = self._centered(strip.key_rows, strip.key_cols, strip)
            self.known[shape] = (
                torch.stack([2 * a, 2 * b, -torch.ones_like(a), -(a * a + b * b)], -1),
                torch.stack([y, x, y * y + x * x, torch.ones_like(y)], -1),
            )
        return self.known[shape]

    def _centered(self, rows: slice, cols: slice, strip: Strip) -> Sequence[Tensor]:
        """Coordinates of a rectangle's pixels relative to the center of the queries."""
        axes = (rows, strip.rows), (cols, strip.cols)
        y, x = (
            torch.arange(s.start, s.stop, device=self.c.device, dtype=self.c.dtype)
            - (t.start + t.stop - 1) / 2
            for s, t in axes
        )
        return torch.meshgrid(y, x, indexing="ij")


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax(q k^T) v and its log-sum-exp: [n, T, M, E], [n, T, M]."""
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, scale=1.0
        )
    s = q @ k.mT
    lse = s.logsumexp(-1)
    return s.sub_(lse[..., None]).exp_() @ v, lse


def _attend(
    q: Tensor, window: Tensor, strip: Strip, frame_rows: int
) -> Iterator[tuple[slice, list[int], Tensor, Tensor]]:
    """Attention of a strip's queries q [rows, cols, E], some rows at a time.

    Yields:
        The rows, the number of the frame's keys that the queries of each tile meet,
        o [T, tiles, rows of a tile, cols, E] and lse [T, tiles, rows of a tile, cols].
    """
    (_, cols, e), (_, t, key_rows, key_cols, _) = q.shape, window.shape
    line = key_cols * e
    for own, height, near in strip.runs():
        tiles = (own.stop - own.start) // height
        shape = (tiles, t, (near.stop - near.start) * key_cols, e)
        strides = (height * line, key_rows * line, e, 1)
        ka, va = (
            x.as_strided(shape, strides, x.storage_offset() + near.start * line) for x in window
        )
        qa = q[own].view(tiles, 1, -1, e).expand(-1, t, -1, -1)
        o, lse = _flash(qa, ka, va)
        o, lse = (x.transpose(0, 1).unflatten(2, (height, cols)) for x in (o, lse))
        first = strip.key_rows.start + near.start
        spans = [
            (y, y + near.stop - near.start) for y in range(first, first + tiles * height, height)
        ]
        keys = [(min(last, frame_rows) - max(y, 0)) * key_cols for y, last in spans]
        yield own, keys, o, lse


def _attend_backward(
    do: Tensor, q: Tensor, window: Tensor, dwindow: Tensor, strip: Strip
) -> Tensor:
    """The gradient of a strip's q [T, rows, cols, E]; that of the window is added to dwindow.

    The logits come with the lse already subtracted, and do with dlse - delta in the column that
    meets the ones of the values.
    """
    dq = torch.empty_like(q)
    rows = q.shape[1]
    for y in range(0, rows, ROWS_BACKWARD):
        own = slice(y, min(y + ROWS_BACKWARD, rows))
        near = strip.window(own)
        do_tile, q_tile, dq_tile = (x[:, own].flatten(1, 2) for x in (do, q, dq))
        k, v, dk, dv = (x[:, near].flatten(1, 2) for x in (*window, *dwindow))
        step = max(CACHE // (q_tile.shape[1] * k.shape[1]), 1)
        for t in range(0, q.shape[0], step):
            at = slice(t, t + step)
            # e^-60 is below float32's rounding, while denormal numbers are 5 times slower
            p = torch.bmm(q_tile[at], k[at].mT).clamp_(min=-60.0).exp_()
            dv[at].baddbmm_(p.mT, do_tile[at])
            p.mul_(torch.bmm(do_tile[at], v[at].mT))  # dS
            torch.bmm(p, k[at], out=dq_tile[at])
            dk[at].baddbmm_(p.mT, q_tile[at])
    return dq


# --- the bias form on scaled queries


class _Bias(NamedTuple):
    """Results of the bias form, and what its backward pass needs."""

    o: Tensor  # [B, T, h, W, D]
    displacement: Tensor  # [B, T, h, W, 2]
    lse: Tensor  # [B, T, h, W]
    density: float
    first: list[Strip]
    second: list[Strip]  # they replace results of the first
    largest: float  # bound of all logits


def _bias_forward(q: Tensor, k: Tensor, v: Tensor, c: Tensor, eta: float, first_row: int) -> _Bias:
    (b, rows, width, d), t = q.shape, k.shape[1]
    # halves are computed in float32, strip by strip
    o = q.new_empty(b, t, rows, width, d)
    displacement = c.new_empty(b, t, rows, width, 2)
    lse = c.new_empty(b, t, rows, width)
    visited = torch.empty_like(lse)  # keys per query

    def run(strip: Strip) -> None:
        at = strip.queries(first_row)
        qa, columns, window = operands.of(strip)
        for own, keys, o_own, lse_own in _attend(qa, window, strip, k.shape[2]):
            targets = (x[at][:, own] for x in (o, displacement, lse))
            o_at, displacement_at, lse_at = (x.unflatten(1, lse_own.shape[1:3]) for x in targets)
            place = (columns[own, :, :2] / 2).unflatten(0, lse_own.shape[1:3])
            o_at.copy_(o_own[..., :d])
            torch.sub(o_own[..., d : d + 2], place, out=displacement_at)
            lse_at.copy_(lse_own)
            counts = torch.tensor(keys, dtype=c.dtype, device=q.device)
            visited[at][:, own] = counts.repeat_interleave(lse_own.shape[2])[:, None]

    certificate = Certificate(q, k, c.item(), eta)
    largest = certificate.largest.max().item()
    operands = _Operands(q, k, v, c, first_row, largest)
    longest = longest_strip(c.item(), eta)
    cell = min(CELL, longest)
    first, second = [], []
    for strip in first_strips(certificate, rows, first_row, k.shape, longest):
        run(strip)
        first.append(strip)
        if strip.window_radius < certificate.everything:
            needed = certificate.needed(strip.queries(first_row), lse, cell)
            second += second_strips(needed, strip, k.shape, cell)
    for strip in second:
        run(strip)
    density = visited.mean().item() / (k.shape[2] * k.shape[3])
    return _Bias(o, displacement, lse, density, first, second, largest)


def _bias_backward(
    do: Tensor, dd: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, c: Tensor, bias: _Bias,
    first_row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and c, in the type of c."""
    d = q.shape[-1]
    dq, dk, dv = (torch.zeros_like(x, dtype=c.dtype) for x in (q, k, v))
    dc = torch.zeros_like(c)
    operands = _Operands(q, k, v, c, first_row, bias.largest)
    replaced = torch.zeros_like(bias.lse, dtype=torch.bool)  # by the second pass
    for strip in bias.second:
        replaced[strip.queries(first_row)] = True
    for n, strip in enumerate((*bias.first, *bias.second)):
        at = strip.queries(first_row)
        qa, columns, window = operands.of(strip)
        qa = qa.repeat(window.shape[1], 1, 1, 1)
        # the column of ones takes lse out of the logits and dLSE - delta into dS
        qa[..., -1] -= bias.lse[at]
        do_strip = do[at].to(c.dtype)
        place = bias.displacement[at] + columns[..., :2] / 2
        delta = (do_strip * bias.o[at]).sum(-1) + (dd[at] * place).sum(-1)
        rest = torch.stack([torch.zeros_like(delta), dlse[at] - delta], -1)
        doa = torch.cat([do_strip, dd[at], rest], -1)
        if n < len(bias.first):
            doa.masked_fill_(replaced[at][..., None], 0.0)
        dwindow = torch.zeros_like(window)
        dqa = _attend_backward(doa, qa, window, dwindow, strip)
        dc += (dqa[..., d:] * columns).sum()
        dq[at[0]][at[2:]] += dqa[..., :d].sum(0)
        index, inside = strip.keys(k.shape[2])
        dk[index] += dwindow[0, :, inside, :, :d]
        dv[index] += dwindow[1, :, inside, :, :d]
    return dq, dk, dv, dc


# --- the softmax without a Gaussian, dense in chunks of queries


def _plain_logits(q: Tensor, k: Tensor) -> Iterator[tuple[tuple, Tensor]]:
    """Yield (clip, frame, query pixels) and their logits [queries, H W]."""
    work = torch.promote_types(q.dtype, torch.float32)
    q, k = q.flatten(1, 2), k.flatten(2, 3)
    step = max(CHUNK // k.shape[2], 32)
    for clip in range(k.shape[0]):
        for frame in range(k.shape[1]):
            keys = k[clip, frame].to(work).mT
            for start in range(0, q.shape[1], step):
                pixels = slice(start, start + step)
                yield (clip, frame, pixels), q[clip, pixels].to(work) @ keys


def _plain_lse(q: Tensor, k: Tensor) -> Tensor:
    """Log-sum-exp of q.k over all keys: [B, T, h, W]."""
    (b, rows, width, _), t = q.shape, k.shape[1]
    lse = q.new_empty(b, t, rows * width, dtype=torch.promote_types(q.dtype, torch.float32))
    for at, s in _plain_logits(q, k):
        lse[at] = s.logsumexp(-1)
    return lse.unflatten(-1, (rows, width))


def _add_plain_gradient(
    dq: Tensor, dk: Tensor, dlse: Tensor, q: Tensor, k: Tensor, lse: Tensor
) -> None:
    """Add the gradients of `_plain_lse` to those of q and k."""
    flat_q, flat_k, dlse, lse = q.flatten(1, 2), k.flatten(2, 3), dlse.flatten(2), lse.flatten(2)
    for at, s in _plain_logits(q, k):
        ds = s.sub_(lse[at][:, None]).exp_().mul_(dlse[at][:, None])
        clip, frame, pixels = at
        dq.flatten(1, 2)[clip, pixels] += ds @ flat_k[clip, frame].to(ds.dtype)
        dk.flatten(2, 3)[clip, frame] += ds.mT @ flat_q[clip, pixels].to(ds.dtype)


# --- both forms


def _forward(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor, gaussian: str, eta: float,
    first_row: int,
) -> tuple[CrossFrame, _Bias, Tensor | None]:  # fmt: skip
    """The result, that of the bias form, and the gate form's plain log-sum-exp."""
    scaled = q * scale
    bias = _bias_forward(scaled, k, v, inv_2sigma2(sigma), eta, first_row)
    if gaussian == "bias":
        return CrossFrame(*bias[:4]), bias, None
    plain = _plain_lse(scaled, k)
    gate = (bias.lse - plain).exp()[..., None]
    o = (bias.o * gate).to(v.dtype)
    return CrossFrame(o, bias.displacement * gate, plain, bias.density), bias, plain


def _backward(
    do: Tensor, dd: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, sigma: Tensor,
    scale: Tensor, bias: _Bias, plain: Tensor | None, first_row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v, sigma and scale from those of o, displacement and lse."""
    scaled, dplain = q * scale, None
    if plain is not None:  # through gate = exp(LSE_bias - LSE_plain)
        gate = (bias.lse - plain).exp()[..., None]
        do, dd = do * gate, dd * gate
        through_gate = (do * bias.o).sum(-1) + (dd * bias.displacement).sum(-1)
        dlse, dplain = through_gate, dlse - through_gate
    c = inv_2sigma2(sigma)
    dq, dk, dv, dc = _bias_backward(do, dd, dlse, scaled, k, v, c, bias, first_row)
    if plain is not None:
        _add_plain_gradient(dq, dk, dplain, scaled, k, plain)
    dscale, dsigma = (dq * q).sum(), -dc / sigma**3
    return (dq * scale).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsigma, dscale


class _CrossFrame(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sigma, scale, gaussian, eta, first_row):
        result, bias, plain = _forward(q, k, v, sigma, scale, gaussian, eta, first_row)
        ctx.save_for_backward(q, k, v, sigma, scale, *bias[:3], plain)
        ctx.rest, ctx.first_row = bias[3:], first_row
        return tuple(result)

    @staticmethod
    def backward(ctx, *grads):
        *inputs, o, displacement, lse, plain = ctx.saved_tensors
        bias = _Bias(o, displacement, lse, *ctx.rest)
        return *_backward(*grads[:3], *inputs, bias, plain, ctx.first_row), None, None, None


def cross_frame_attention(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor, *,
    gaussian: str, offsets: bool, tolerance: float, first_row: int,
) -> CrossFrame:  # fmt: skip
    """`reference.cross_frame_attention` in O(HW) memory, exact to the certified tolerance.

    Args:
        q, k, v, sigma, scale, gaussian, offsets, first_row: as in the reference; sigma and scale
            are float32, or float64 like q.
        tolerance: eta of the certificate; 0 visits every pair.
    """
    result = CrossFrame(*_CrossFrame.apply(q, k, v, sigma, scale, gaussian, tolerance, first_row))
    return result if offsets else result._replace(displacement=None)


def backward(
    do: Tensor, dd: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, sigma: Tensor,
    scale: Tensor, *, gaussian: str, offsets: bool, tolerance: float, first_row: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of `cross_frame_attention` where its results were not kept: it runs again."""
    _, bias, plain = _forward(q, k, v, sigma, scale, gaussian, tolerance, first_row)
    dd = dd if offsets else torch.zeros_like(bias.displacement)
    return _backward(do, dd, dlse, q, k, v, sigma, scale, bias, plain, first_row)


def memory_attention(q: Tensor, memory: Tensor, scale: Tensor) -> Tensor:
    """`reference.memory_attention` through fused attention: q [B, H, W, D], memory [D, N]."""
    # a copy: the fused kernel wants the components of an entry to be consecutive
    entries = memory.mT.contiguous().expand(q.shape[0], 1, -1, -1)
    o = F.scaled_dot_product_attention(
        (q * scale).flatten(1, 2)[:, None], entries, entries, scale=1.0
    )
    return o[:, 0].unflatten(1, q.shape[1:3])
