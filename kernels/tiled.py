"""Both attentions in plain PyTorch without ever forming HW x HW: CPUs, old GPUs, macOS.

A tile of queries meets one rectangle of keys, the tile plus a halo. With coordinates (a, b) of a
query and (y, x) of a key relative to a point nearby and c = 1 / (2 sigma^2), four extra columns
put the Gaussian into the matrix product:

    [s q, 2ca, 2cb, -c, -c(a^2 + b^2)] . [k, y, x, y^2 + x^2, 1] = s q.k - c((a - y)^2 + (b - x)^2)

The same four columns beside v give the expected displacement, and a column of ones through which
the gradient of the log-sum-exp enters the backward pass: dS = P (dP - delta + dLSE).
The gradient of the first four columns gives dc, hence dsigma. Keys and values are laid out once
for a strip of tiles, whose windows overlap, and again in the backward pass.

Which keys a tile can do without is certified: with S the kept keys and eta >= the sum over the
dropped ones of exp(b - LSE_S), the error is at most eta (max|v| + |o|), where no dropped key's
logit exceeds b = |s q| max|k| - c d^2. The first strip of tiles takes the halo that suffices when
queries are matched well, and each later one what LSE_S certified for most of the strip before;
where a strip's own LSE_S says otherwise, a second pass takes the halo that it certifies.
(Bounding keys tile by tile, by mean and radius, shrank the halos of trained and of random
features by 0 to 4 %, less than it costs.)

Gate form: gate_i = bias_i exp(LSE_bias,i - LSE_plain,i), with the dense LSE_plain in chunks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import CrossFrame

STRIP = 64  # rows of queries in a strip, at most
CELL = 8  # side of the squares of queries that get a second pass
ROWS_BACKWARD = 4  # of a query tile
NEAR = 26  # halo from which on tiles are 16 x 16 instead of 4 x 8
SLACK = 4.0  # nats by which the first strip lets a query's LSE stay below its largest logit
ENOUGH = 0.95  # share of the last strip's cells for which the next strip's halo would have sufficed
SMALL = 1024  # pixels of a frame whose keys are all kept
ROUNDING = 8e-6  # of the logits, from the Gaussian's columns
WINDOW = 1 << 20  # elements of the keys and values that lie ready at once
CACHE = 1 << 19  # elements of a temporary that stays in a core's cache
CHUNK = 1 << 20  # elements of the largest temporary of the dense pass


class _Strip(NamedTuple):
    """A rectangle of queries of some frames, and the rectangle of keys that they meet.

    The rows of keys lie one after the other in memory, and a window takes their full width: it is
    a part of the rectangle that needs no copy. Where a strip is long enough, its rows of keys go
    on beyond the frame, as nothing that counts, so that all its tiles are alike.
    """

    clip: int
    frames: slice
    rows: slice  # of the queries
    cols: slice
    halo: int
    step: int  # rows of a query tile
    key_rows: slice
    key_cols: slice

    def keys(self, height: int) -> tuple[tuple, slice]:
        """Where the keys lie in [B, T, H, W, ..], and their rows among those of the rectangle."""
        first, last = max(self.key_rows.start, 0), min(self.key_rows.stop, height)
        inside = slice(first - self.key_rows.start, last - self.key_rows.start)
        return (self.clip, self.frames, slice(first, last), self.key_cols), inside

    def queries(self, first_row: int) -> tuple:
        """Where the queries lie in [B, T, h, W, ..], which starts at first_row of the frame."""
        rows = slice(self.rows.start - first_row, self.rows.stop - first_row)
        return self.clip, self.frames, rows, self.cols

    def runs(self, step: int) -> list[tuple[slice, int, slice]]:
        """Tiles whose windows are alike: each begins as many rows below the last as a tile has.

        Args:
            step: rows of a tile away from the frame's edges; there a tile takes what is cut.

        Returns:
            The rows of the queries, the rows of one tile, and the rows of the first tile's keys,
            all counted from the strip's own first.
        """
        rows = self.rows.stop - self.rows.start
        above, below = self.rows.start - self.key_rows.start, self.key_rows.stop - self.rows.stop
        top = min(math.ceil((self.halo - above) / step) * step, rows)
        bottom = top + max((rows - top - self.halo + below) // step, 0) * step
        result = []
        for first, last, height in ((0, top, top), (top, bottom, step), (bottom, rows, rows)):
            if first < last:
                height = min(height, last - first)
                result.append((slice(first, last), height, self.near(slice(first, first + height))))
        return result

    def near(self, own: slice) -> slice:
        """The rows of the window of a tile, both counted from the strip's first."""
        above = self.rows.start - self.key_rows.start
        return slice(
            max(own.start - self.halo + above, 0),
            min(own.stop + self.halo + above, self.key_rows.stop - self.key_rows.start),
        )


def _strip(
    clip: int, frames: slice, top: int, left: int, bottom: int, right: int,
    halo: int, step: int, shape: torch.Size,
) -> _Strip:  # fmt: skip
    """The queries top .. bottom, left .. right with the keys [B, T, H, W, D] around them."""
    near = [
        slice(max(first - halo, 0), min(last + halo, size))
        for first, last, size in ((top, bottom, shape[2]), (left, right, shape[3]))
    ]
    if 2 * halo <= bottom - top:
        near[0] = slice(top - halo, bottom + halo)
    return _Strip(clip, frames, slice(top, bottom), slice(left, right), halo, step, *near)


def _longest(c: float, eta: float) -> int:
    """Rows of queries laid out together, a power of two; below 16 only for small sigma.

    The Gaussian's columns grow to c y^2 and cancel, which leaves some four roundings of that.
    """
    largest = max(ROUNDING, eta / 10) * 2.0**22
    rows = STRIP
    while rows > 1 and c * (rows / 2) ** 2 > largest:
        rows //= 2
    return rows


def _first_strips(
    certificate: "_Certificate", rows: int, first_row: int, shape: torch.Size, longest: int
) -> Iterator[_Strip]:
    """All queries, each strip with the halo that the certificate holds by then.

    shape is that of the keys [B, T, H, W, D].
    """
    clips, frames, height, width, d = shape
    start = halo = certificate.halo
    step, across = (4, 8) if halo < NEAR else (16, 16)
    if halo >= max(height, width):
        step = STRIP  # all tiles meet the same keys
    step, across = min(step, longest), min(across, longest)
    elements = min(longest + 2 * halo, height) * min(across + 2 * halo, width) * 2 * (d + 4)
    some = max(WINDOW // elements, 1)
    for clip in range(clips):
        for t in range(0, frames, some):
            for top in range(first_row, first_row + rows, longest):
                certificate.halo = start  # rows of strips alike, whatever came before them
                for left in range(0, width, across):
                    bottom, right = min(top + longest, first_row + rows), min(left + across, width)
                    at, halo = slice(t, min(t + some, frames)), certificate.halo
                    yield _strip(clip, at, top, left, bottom, right, halo, step, shape)


def _second_strips(needed: Tensor, strip: _Strip, shape: torch.Size, cell: int) -> Iterator[_Strip]:
    """The cells [T, y, x] of a strip's queries that need more than its halo."""
    for t, y, x in (needed > strip.halo).nonzero().tolist():
        frame = strip.frames.start + t
        top, left = strip.rows.start + y * cell, strip.cols.start + x * cell
        bottom, right = min(top + cell, strip.rows.stop), min(left + cell, strip.cols.stop)
        at, halo = slice(frame, frame + 1), int(needed[t, y, x])
        yield _strip(strip.clip, at, top, left, bottom, right, halo, cell, shape)


def _beside(x: Tensor, columns: Tensor) -> Tensor:
    """Pixels x [.., rows, cols, D] with columns [rows, cols, 4] beside them, in their type."""
    return torch.cat([x.to(columns.dtype), columns.expand(*x.shape[:-1], 4)], -1)


class _Operands:
    """Augmented queries, keys and values of one strip after the other."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, c: Tensor, first_row: int, largest: float):
        self.q, self.k, self.v, self.c, self.first_row = q, k, v, c, first_row
        # nats below 0 at which ten thousand keys are nothing beside the pixel's own
        self.nothing = largest + math.log(1e4 / torch.finfo(c.dtype).eps)
        self.memory = c.new_empty(0)  # of the windows
        self.known: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def of(self, strip: _Strip) -> tuple[Tensor, Tensor, Tensor]:
        """The operands of a strip.

        Returns:
            Queries [rows, cols, D + 4]; the columns beside them, without the factor c
            [rows, cols, 4]; keys and values [2, T, key rows, key cols, D + 4], until the next
            call.
        """
        query_columns, key_columns = self._columns(strip)
        at = strip.queries(self.first_row)
        queries = _beside(self.q[at[0]][at[2:]], self.c * query_columns)
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
                window[0, :, beyond, :, -2] += self.nothing / self.c
        return queries, query_columns, window

    def _columns(self, strip: _Strip) -> tuple[Tensor, Tensor]:
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

    def _centered(self, rows: slice, cols: slice, strip: _Strip) -> Sequence[Tensor]:
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
    q: Tensor, window: Tensor, strip: _Strip, frame_rows: int
) -> Iterator[tuple[slice, list[int], Tensor, Tensor]]:
    """Attention of a strip's queries q [rows, cols, E], some rows at a time.

    Yields:
        The rows, the number of the frame's keys that the queries of each tile meet,
        o [T, tiles, rows of a tile, cols, E] and lse [T, tiles, rows of a tile, cols].
    """
    (_, cols, e), (_, t, key_rows, key_cols, _) = q.shape, window.shape
    line = key_cols * e
    for own, height, near in strip.runs(strip.step):
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
    do: Tensor, q: Tensor, window: Tensor, dwindow: Tensor, strip: _Strip
) -> Tensor:
    """The gradient of a strip's q [T, rows, cols, E]; that of the window is added to dwindow.

    The logits come with the lse already subtracted, and do with dlse - delta in the column that
    meets the ones of the values.
    """
    dq = torch.empty_like(q)
    rows = q.shape[1]
    for y in range(0, rows, ROWS_BACKWARD):
        own = slice(y, min(y + ROWS_BACKWARD, rows))
        near = strip.near(own)
        do_tile, q_tile, dq_tile = (x[:, own].flatten(1, 2) for x in (do, q, dq))
        k, v, dk, dv = (x[:, near].flatten(1, 2) for x in (*window, *dwindow))
        step = max(CACHE // (q_tile.shape[1] * k.shape[1]), 1)
        for t in range(0, q.shape[0], step):
            at = slice(t, t + step)
            # e^-60 is nothing beside float32's rounding, while denormal numbers are 5x slower
            p = torch.bmm(q_tile[at], k[at].mT).clamp_(min=-60.0).exp_()
            dv[at].baddbmm_(p.mT, do_tile[at])
            p.mul_(torch.bmm(do_tile[at], v[at].mT))  # dS
            torch.bmm(p, k[at], out=dq_tile[at])
            dk[at].baddbmm_(p.mT, q_tile[at])
    return dq


class _CrossFrame(torch.autograd.Function):
    """Bias form on scaled queries: (q, k, v, c) -> o, displacement, lse, visited fraction."""

    @staticmethod
    def forward(ctx, q, k, v, c, eta, first_row):
        (b, rows, width, d), t = q.shape, k.shape[1]
        # halves are computed in float32, strip by strip
        work = torch.promote_types(q.dtype, torch.float32)
        o = q.new_empty(b, t, rows, width, d)
        displacement = q.new_empty(b, t, rows, width, 2, dtype=work)
        lse = q.new_empty(b, t, rows, width, dtype=work)
        visited = torch.empty_like(lse)  # keys per query

        def run(strip: _Strip) -> None:
            at = strip.queries(first_row)
            qa, columns, window = operands.of(strip)
            for own, keys, o_own, lse_own in _attend(qa, window, strip, k.shape[2]):
                targets = (x[at][:, own] for x in (o, displacement, lse))
                o_at, displacement_at, lse_at = (
                    x.unflatten(1, lse_own.shape[1:3]) for x in targets
                )
                place = (columns[own, :, :2] / 2).unflatten(0, lse_own.shape[1:3])
                o_at.copy_(o_own[..., :d])
                torch.sub(o_own[..., d : d + 2], place, out=displacement_at)
                lse_at.copy_(lse_own)
                counts = torch.tensor(keys, dtype=work, device=q.device)
                visited[at][:, own] = counts.repeat_interleave(lse_own.shape[2])[:, None]

        certificate = _Certificate(q, k, c.item(), eta)
        largest = certificate.largest.max().item()
        operands = _Operands(q, k, v, c, first_row, largest)
        longest = _longest(c.item(), eta)
        cell = min(CELL, longest)
        first, second = [], []
        for strip in _first_strips(certificate, rows, first_row, k.shape, longest):
            run(strip)
            first.append(strip)
            if strip.halo < certificate.everything:
                needed = certificate.needed(strip.queries(first_row), lse, cell)
                second += _second_strips(needed, strip, k.shape, cell)
        for strip in second:
            run(strip)
        ctx.save_for_backward(q, k, v, c, o, displacement, lse)
        ctx.first, ctx.second, ctx.first_row, ctx.largest = first, second, first_row, largest
        return o, displacement, lse, visited.mean().item() / (k.shape[2] * k.shape[3])

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, c, o, displacement, lse = ctx.saved_tensors
        do, ddisplacement, dlse, _ = grads
        d = q.shape[-1]
        dq, dk, dv = (torch.zeros_like(x, dtype=c.dtype) for x in (q, k, v))
        dc = torch.zeros_like(c)
        operands = _Operands(q, k, v, c, ctx.first_row, ctx.largest)
        replaced = torch.zeros_like(lse, dtype=torch.bool)  # by the second pass
        for strip in ctx.second:
            replaced[strip.queries(ctx.first_row)] = True
        for n, strip in enumerate((*ctx.first, *ctx.second)):
            at = strip.queries(ctx.first_row)
            qa, columns, window = operands.of(strip)
            qa = qa.repeat(window.shape[1], 1, 1, 1)
            # the column of ones takes lse out of the logits and dLSE - delta into dS
            qa[..., -1] -= lse[at]
            do_strip = do[at].to(c.dtype)
            delta = (do_strip * o[at]).sum(-1) + (
                ddisplacement[at] * (displacement[at] + columns[..., :2] / 2)
            ).sum(-1)
            rest = torch.stack([torch.zeros_like(delta), dlse[at] - delta], -1)
            doa = torch.cat([do_strip, ddisplacement[at], rest], -1)
            if n < len(ctx.first):
                doa.masked_fill_(replaced[at][..., None], 0.0)
            dwindow = torch.zeros_like(window)
            dqa = _attend_backward(doa, qa, window, dwindow, strip)
            dc += (dqa[..., d:] * columns).sum()
            dq[at[0]][at[2:]] += dqa[..., :d].sum(0)
            place, inside = strip.keys(k.shape[2])
            dk[place] += dwindow[0, :, inside, :, :d]
            dv[place] += dwindow[1, :, inside, :, :d]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dc, None, None


class _Certificate:
    """Halos beyond which the softmax keeps less than eta of what lies within.

    Args:
        q: [B, h, W, D] scaled queries.
        k: [B, T, H, W, D] keys.
        c: 1 / (2 sigma^2).
        eta: bound on the dropped part of the softmax, relative to the kept part; 0 keeps all.

    Attributes:
        halo: pixels around the next tile in the first pass; max(H, W) keeps all keys.
    """

    def __init__(self, q: Tensor, k: Tensor, c: float, eta: float):
        self.everything = max(k.shape[2:4])
        self.halo = self.everything
        work = torch.promote_types(q.dtype, torch.float32)
        length = torch.linalg.vector_norm(q, dim=-1, dtype=work)  # [B, h, W]
        longest = torch.linalg.vector_norm(k, dim=-1, dtype=work).amax((2, 3))  # [B, T]
        self.largest = length[:, None] * longest[..., None, None]  # logit of any query and frame
        if eta == 0 or c == 0 or k.shape[2] * k.shape[3] <= SMALL:
            return
        self.least = math.log(eta)
        self.outside = _gaussian_outside(c, self.everything)
        self.halo = int(self._halos(torch.tensor(SLACK)))

    def needed(self, at: tuple, lse: Tensor, cell: int) -> Tensor:
        """The halos [T, y, x] that the cells of a strip need by the lse [B, T, h, W] over its keys.

        The next strip's halo is the one that sufficed for most of these cells.
        """
        spread = F.max_pool2d(self.largest[at] - lse[at], cell, ceil_mode=True)
        halos = self._halos(spread.cpu())
        share = math.ceil(ENOUGH * halos.numel())
        self.halo = int(halos.flatten().kthvalue(share).values)
        return halos

    def _halos(self, spread: Tensor) -> Tensor:
        """Pixels beyond which keys weigh less than eta, if logits exceed the LSE by `spread`."""
        return torch.searchsorted(-self.outside, spread.double() - self.least).clamp_(
            max=self.everything
        )


def _gaussian_outside(c: float, longest: int) -> Tensor:
    """Logarithm of the sum of exp(-c d^2) over all pixels beyond a halo of 0, 1, .. pixels."""
    d = torch.arange(longest + 1, dtype=torch.float64)
    weight = torch.exp(-c * d * d) * torch.where(d == 0, 1, 2)
    # beyond the frame no pixel counts; within: the square of the axis' sum less the inner square
    tail = weight.flip(0).cumsum(0).flip(0)  # from d on
    beyond = F.pad(tail[1:], (0, 1))
    return (beyond * (2 * tail[0] - beyond)).log()


def certified_radius(
    q: Tensor, k: Tensor, longest: Tensor, sigma: Tensor, scale: Tensor, eta: float
) -> int:
    """Pixels around queries beyond which no key of a frame of any size counts.

    Beyond it the softmax of the bias form keeps less than eta of what lies within, whatever the
    keys there are: the log-sum-exp is at least the logit of a query's own pixel.

    Args:
        q: [B, h, W, D] queries.
        k: [B, T, h, W, D] keys of the same pixels.
        longest: [B, T] norm of the longest key of each frame.
        sigma, scale: [], as of `cross_frame_attention`; sigma is finite.
        eta: as its tolerance, > 0.
    """
    c = 1 / (2 * sigma.double().square())
    length = torch.linalg.vector_norm(q, dim=-1, dtype=torch.float64)
    spread = torch.tensor(0.0, dtype=torch.float64)
    for t in range(k.shape[1]):
        own = (q * k[:, t]).sum(-1, dtype=torch.float64)
        most = length * longest[:, t, None, None] - own
        spread = torch.maximum(spread, (most * scale).amax().cpu())
    # far beyond what any radius is: where the Gaussian alone is below eta
    enough = math.ceil(math.sqrt(2 * (spread.item() - math.log(eta) + 40)) * sigma.item()) + 1
    outside = _gaussian_outside(c.item(), enough)
    return int(torch.searchsorted(-outside, spread - math.log(eta)))


class _PlainLSE(torch.autograd.Function):
    """Log-sum-exp of q.k over all keys, dense in chunks of queries: [B, T, h, W]."""

    @staticmethod
    def forward(ctx, q, k):
        (b, rows, width, _), t = q.shape, k.shape[1]
        lse = q.new_empty(b, t, rows * width, dtype=torch.promote_types(q.dtype, torch.float32))
        for at, s in _PlainLSE.logits(q, k):
            lse[at] = s.logsumexp(-1)
        ctx.save_for_backward(q, k, lse)
        return lse.unflatten(-1, (rows, width))

    @staticmethod
    def backward(ctx, *grads):
        q, k, lse = ctx.saved_tensors
        dq, dk = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, k))
        flat_q, flat_k, grad = q.flatten(1, 2), k.flatten(2, 3), grads[0].flatten(2)
        for at, s in _PlainLSE.logits(q, k):
            ds = s.sub_(lse[at][:, None]).exp_().mul_(grad[at][:, None])
            clip, frame, pixels = at
            dq.flatten(1, 2)[clip, pixels] += ds @ flat_k[clip, frame].to(ds.dtype)
            dk.flatten(2, 3)[clip, frame] += ds.mT @ flat_q[clip, pixels].to(ds.dtype)
        return dq.to(q.dtype), dk.to(k.dtype)

    @staticmethod
    def logits(q: Tensor, k: Tensor):
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


def cross_frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sigma: Tensor,
    scale: Tensor,
    *,
    gaussian: str = "bias",
    offsets: bool = False,
    tolerance: float = 1e-6,
    first_row: int = 0,
) -> CrossFrame:
    """`reference.cross_frame_attention` in O(HW) memory, exact to the certified tolerance.

    Args:
        q, k, v, sigma, scale, gaussian, offsets, first_row: as in the reference.
        tolerance: eta of the certificate above; 0 visits every pair.
    """
    # narrower than any pixel, c would overflow
    sigma = sigma.to(torch.promote_types(q.dtype, torch.float32)).clamp(min=1e-15)
    c = 1 / (2 * sigma.square())
    scaled = q * scale
    o, displacement, lse, visited = _CrossFrame.apply(scaled, k, v, c, tolerance, first_row)
    if gaussian == "gate":
        plain = _PlainLSE.apply(scaled, k)
        gate = (lse - plain).exp()[..., None]
        o, displacement, lse = (o * gate).to(v.dtype), displacement * gate, plain
    return CrossFrame(o, displacement if offsets else None, lse, visited)


def memory_attention(q: Tensor, memory: Tensor, scale: Tensor) -> Tensor:
    """`reference.memory_attention` through fused attention: q [B, H, W, D], memory [D, N]."""
    # a copy: the fused kernel wants the entries' components side by side
    entries = memory.mT.contiguous().expand(q.shape[0], 1, -1, -1)
    o = F.scaled_dot_product_attention(
        (q * scale).flatten(1, 2)[:, None], entries, entries, scale=1.0
    )
    return o[:, 0].unflatten(1, q.shape[1:3])
