"""Both attentions in plain PyTorch without ever forming HW x HW: CPUs, old GPUs, macOS.

A 16 x 16 tile of queries meets one rectangle of keys, the tile plus a halo. With coordinates
(a, b) of a query and (y, x) of a key relative to the tile's center and c = 1 / (2 sigma^2), four
extra columns put the Gaussian into the matrix product:

    [s q, 2ca, 2cb, -c, -c(a^2 + b^2)] . [k, y, x, y^2 + x^2, 1] = s q.k - c((a - y)^2 + (b - x)^2)

The same four columns beside v give the expected displacement, and a column of ones through which
the gradient of the log-sum-exp enters the backward pass: dS = P (dP - delta + dLSE).
The gradient of the first four columns gives dc, hence dsigma. Windows are rebuilt in the backward
pass instead of being kept.

Which keys a tile can do without is certified (a window is the tile and a halo): with
eta >= sum over dropped 8 x 8 key tiles of n_t exp(b_t - LSE), the error is at most
eta (max|v| + |o|), where b_t = s q.c_t + |s q| r_t - c dmin^2 bounds the logits of a tile with mean
key c_t and radius r_t, and LSE is bounded from below by the 3 x 3 pixels around the query.

Gate form: gate_i = bias_i exp(LSE_bias,i - LSE_plain,i), with the dense LSE_plain in chunks.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .reference import CrossFrame

TILE = 16  # side of a query tile
KEY_TILE = 8  # side of a key tile, and step of the halo
CHUNK = 1 << 20  # elements of the largest temporary of the dense and the bounding passes
LOOSE = 16.0  # nats of slack from which on key tiles are bounded one by one
CACHE = 1 << 19  # elements of a temporary that stays in a core's cache

Window = tuple[slice, slice, slice, slice]  # query rows and columns, key rows and columns


def _flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax(q k^T) v and its log-sum-exp: [G, M, E], [G, M]."""
    if q.device.type == "cpu":
        o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q[:, None], k[:, None], v[:, None], 0.0, False, scale=1.0
        )
        return o[:, 0], lse[:, 0]
    s = q @ k.mT
    lse = s.logsumexp(-1)
    return s.sub_(lse[..., None]).exp_() @ v, lse


def _flash_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v [G, M or N, E], where the logits come with the lse already subtracted.

    Likewise do comes with dlse - delta in the column that meets the ones of v.
    """
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    step = max(CACHE // (q.shape[1] * k.shape[1]), 1)
    for g in range(0, q.shape[0], step):
        at = slice(g, g + step)
        # e^-60 is nothing beside float32's rounding, while denormal numbers are 5x slower
        p = torch.bmm(q[at], k[at].mT).clamp_(min=-60.0).exp_()
        torch.bmm(p.mT, do[at], out=dv[at])
        p.mul_(torch.bmm(do[at], v[at].mT))  # dS
        torch.bmm(p, k[at], out=dq[at])
        torch.bmm(p.mT, q[at], out=dk[at])
    return dq, dk, dv


def _query_columns(rows: slice, cols: slice, c: Tensor) -> Tensor:
    """The Gaussian's columns of a query tile, without the factor c: [M, 4]."""
    a, b = _centered(rows, cols, rows, cols, c)
    return torch.stack([2 * a, 2 * b, -torch.ones_like(a), -(a * a + b * b)], -1)


def _key_columns(window: Window, c: Tensor) -> Tensor:
    """The columns beside the keys and the values of a window: y, x, y^2 + x^2, 1: [N, 4]."""
    rows, cols, key_rows, key_cols = window
    y, x = _centered(key_rows, key_cols, rows, cols, c)
    return torch.stack([y, x, y * y + x * x, torch.ones_like(y)], -1)


def _centered(
    rows: slice, cols: slice, tile_rows: slice, tile_cols: slice, c: Tensor
) -> list[Tensor]:
    """Coordinates of rows x cols relative to the center of a tile: two of [pixels]."""
    axes = (rows, tile_rows), (cols, tile_cols)
    y, x = (
        torch.arange(s.start, s.stop, device=c.device, dtype=c.dtype) - (t.start + t.stop - 1) / 2
        for s, t in axes
    )
    return [z.flatten() for z in torch.meshgrid(y, x, indexing="ij")]


def _windows(
    halos: list[list[int]], rows: int, first_row: int, shape: torch.Size, side: int = TILE
) -> Iterator[Window]:
    """The windows of all query tiles, in parts of `side`; query rows count from first_row."""
    height, width = shape[2:4]
    for i, halo_row in enumerate(halos):
        top, bottom = first_row + i * TILE, first_row + min((i + 1) * TILE, rows)
        for j, halo in enumerate(halo_row):
            left, right = j * TILE, min((j + 1) * TILE, width)
            # the certificate counts on a whole tile's keys, also where a band ends within it
            key_rows = slice(max(top - halo, 0), min(top + TILE + halo, height))
            key_cols = slice(max(left - halo, 0), min(left + TILE + halo, width))
            for y in range(top, bottom, side):
                for x in range(left, right, side):
                    part = slice(y, min(y + side, bottom)), slice(x, min(x + side, right))
                    yield *part, key_rows, key_cols


def _query_side(c: float) -> int:
    """Side of the parts of a query tile: the Gaussian's columns grow to c side^2 and cancel."""
    side = TILE
    while side > 1 and c * side * side > TILE * TILE / 2:  # sigma < 1
        side //= 2
    return side


def _gather(x: Tensor, rows: slice, cols: slice, columns: Tensor) -> Tensor:
    """Pixels of a window with extra columns beside them: [B T, N, D + 4]."""
    window = x[..., rows, cols, :]
    out = columns.new_empty(*window.shape[:-1], x.shape[-1] + 4)
    out[..., :-4] = window
    out[..., -4:] = columns.unflatten(0, window.shape[-3:-1])
    return out.flatten(-3, -2).flatten(0, -3)


class _CrossFrame(torch.autograd.Function):
    """Bias form on scaled queries: (q, k, v, c) -> o, displacement, lse."""

    @staticmethod
    def forward(ctx, q, k, v, c, halos, first_row, side):
        # halves are computed in float32, tile by tile
        work = torch.promote_types(q.dtype, torch.float32)
        (b, rows, width, d), t = q.shape, k.shape[1]
        o = q.new_empty(b, t, rows, width, d)
        displacement = q.new_empty(b, t, rows, width, 2, dtype=work)
        lse = q.new_empty(b, t, rows, width, dtype=work)
        c = c.to(work)
        for window in _windows(halos, rows, first_row, k.shape, side):
            qa, ka, va = _operands(q, k, v, c, window, first_row)
            o_tile, lse_tile = _flash(qa, ka, va)
            at = _output_slices(window, first_row)
            grid = o[at].shape[:-1]
            o[at] = o_tile[..., :d].reshape(*grid, d)
            own = torch.stack(_centered(*window[:2], *window[:2], c), -1)
            displacement[at] = (o_tile[..., d : d + 2] - own).reshape(*grid, 2)
            lse[at] = lse_tile.reshape(grid)
        ctx.save_for_backward(q, k, v, c, o, displacement, lse)
        ctx.halos, ctx.first_row, ctx.side = halos, first_row, side
        return o, displacement, lse

    @staticmethod
    def backward(ctx, *grads):
        q, k, v, c, o, displacement, lse = ctx.saved_tensors
        do, ddisplacement, dlse = grads
        rows, d = q.shape[1], q.shape[-1]
        dq, dk, dv = (torch.zeros_like(x, dtype=c.dtype) for x in (q, k, v))
        dc = torch.zeros_like(c)
        for window in _windows(ctx.halos, rows, ctx.first_row, k.shape, ctx.side):
            qa, ka, va = _operands(q, k, v, c, window, ctx.first_row)
            at = _output_slices(window, ctx.first_row)
            own = torch.stack(_centered(*window[:2], *window[:2], c), -1)
            grid = o[at].shape[:-1]
            # the column of ones takes lse out of the logits and dLSE - delta into dS
            delta = (do[at].to(c.dtype) * o[at]).sum(-1) + (
                ddisplacement[at] * (displacement[at] + own.unflatten(0, grid[-2:]))
            ).sum(-1)
            qa[..., -1] -= lse[at].reshape(qa.shape[:2])
            do_tile = torch.cat(
                [
                    do[at],
                    ddisplacement[at],
                    torch.zeros_like(delta)[..., None],
                    (dlse[at] - delta)[..., None],
                ],
                -1,
            ).reshape(qa.shape)
            dqa, dka, dva = _flash_backward(do_tile, qa, ka, va)
            dc += (dqa[..., d:] * _query_columns(*window[:2], c)).sum()
            tile = dqa[..., :d].reshape(*grid, d).sum(1)
            dq[:, at[2], at[3]] += tile
            for dx, dxa in ((dk, dka), (dv, dva)):
                target = dx[:, :, window[2], window[3]]
                target += dxa[..., :d].reshape(target.shape)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dc, None, None, None


def _output_slices(window: Window, first_row: int) -> tuple[slice, slice, slice, slice]:
    """Where a query tile lies in [B, T, h, W, ...]."""
    rows, cols = window[:2]
    return slice(None), slice(None), slice(rows.start - first_row, rows.stop - first_row), cols


def _operands(
    q: Tensor, k: Tensor, v: Tensor, c: Tensor, window: Window, first_row: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Augmented q [B T, M, D + 4], k and v [B T, N, D + 4] of one window."""
    rows, cols, key_rows, key_cols = window
    at = _output_slices(window, first_row)
    qa = _gather(q[:, None], at[2], at[3], c * _query_columns(rows, cols, c))
    qa = qa.repeat_interleave(k.shape[1], 0)
    columns = _key_columns(window, c)
    return qa, _gather(k, key_rows, key_cols, columns), _gather(v, key_rows, key_cols, columns)


def certified_halos(
    q: Tensor, k: Tensor, c: float, eta: float, first_row: int = 0
) -> list[list[int]]:
    """The smallest certified halo of every query tile, in pixels.

    Args:
        q: [B, h, W, D] scaled queries, rows first_row .. first_row + h - 1.
        k: [B, T, H, W, D] keys.
        c: 1 / (2 sigma^2).
        eta: bound on the dropped part of the softmax, relative to the kept part; 0 keeps all.

    Returns:
        One list per row of tiles; a halo of max(H, W) keeps all keys.
    """
    (rows, width), everything = q.shape[1:3], max(k.shape[2:4])
    bands, tiles = math.ceil(rows / TILE), math.ceil(width / TILE)
    if eta == 0 or c == 0 or k.shape[2] * k.shape[3] <= 4 * TILE * TILE:
        return [[everything] * tiles] * bands
    # the floor below may count pixels that are dropped: relative to it eta becomes eta / (1 + eta)
    eta = eta / (1 + eta)
    work = torch.promote_types(k.dtype, torch.float32)
    norms = torch.linalg.vector_norm(k, dim=-1, dtype=work).float()
    longest = norms.amax((2, 3))[..., None, None]  # [B, T, 1, 1]
    outside = _gaussian_outside(c, everything, q.device)
    key_tiles, shift = None, -first_row % KEY_TILE
    halos = []
    for band in range(bands):
        band_q = q[:, band * TILE : (band + 1) * TILE].float()
        top = first_row + band * TILE
        floor = _lse_lower_bound(band_q, k, c, top)  # [B, T, rows, W]
        length = band_q.square().sum(-1).sqrt()[:, None]  # [B, 1, rows, W]
        spread = (length * longest - floor).amax((0, 1, 2))
        spread = F.pad(spread, (0, -width % TILE), value=-math.inf).unflatten(0, (-1, TILE)).amax(1)
        # every key as long as the longest and aligned with the query: a halo to the pixel;
        # half of eta is for the tiles dropped inside it
        kept = (outside > math.log(eta / 2) - spread[:, None]).sum(-1).clamp(max=everything)
        if spread.max() > LOOSE:
            key_tiles = key_tiles or _key_tiles(k, shift)
            rings = math.ceil(int(kept.max()) / KEY_TILE)
            args = (band_q, floor, length, top + shift, *key_tiles, c, rings, eta / 2)
            kept = torch.minimum(kept, _kept_rings(*args) * KEY_TILE)
        halos.append(kept.tolist())
    return halos


def _gaussian_outside(c: float, longest: int, device: torch.device) -> Tensor:
    """Logarithm of the sum of exp(-c d^2) over all pixels beyond a halo of 0, 1, .. pixels."""
    d = torch.arange(longest + 1, device=device, dtype=torch.float64)
    weight = torch.exp(-c * d * d) * torch.where(d == 0, 1, 2)
    # beyond the frame no pixel counts; within: the square of the axis' sum less the inner square
    tail = weight.flip(0).cumsum(0).flip(0)  # from d on
    beyond = F.pad(tail[1:], (0, 1))
    return (beyond * (2 * tail[0] - beyond)).log()


def _kept_rings(
    q: Tensor, floor: Tensor, length: Tensor, top: int,
    means: Tensor, radii: Tensor, counts: Tensor, c: float, rings: int, eta: float,
) -> Tensor:  # fmt: skip
    """Rings of key tiles that each query tile of a band must keep, from the tiles' own bounds."""
    per_tile = q.shape[0] * means.shape[1] * TILE * TILE * (2 * rings + 2) ** 2
    step = max(CHUNK // per_tile, 1) * TILE
    kept = []
    for left in range(0, q.shape[2], step):
        part = slice(left, left + step)
        tail = _dropped_mass(
            q[:, :, part], floor[..., part], length[..., part], (top, left),
            means, radii, counts, c, rings,
        )  # fmt: skip
        kept.append((tail > eta).sum(-1))
    return torch.cat(kept)


def _key_tiles(k: Tensor, shift: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [B, T, y, x, D], radius [B, T, y, x] and number of keys [y, x] of every key tile.

    The first row of tiles begins `shift` rows above the frame, to be in line with the queries.
    """
    height, width = k.shape[2:4]
    pad = (0, 0, 0, -width % KEY_TILE, shift, -(height + shift) % KEY_TILE)
    pattern = "b t (y m) (x n) d -> b t y x (m n) d"
    tiles = rearrange(F.pad(k.float(), pad), pattern, m=KEY_TILE, n=KEY_TILE)
    inside = F.pad(k.new_ones(1, 1, height, width, 1, dtype=torch.float32), pad)
    inside = rearrange(inside, pattern, m=KEY_TILE, n=KEY_TILE)
    counts = inside.sum(-2)  # [1, 1, y, x, 1]
    means = tiles.sum(-2) / counts
    radii = ((tiles - means[..., None, :]) * inside).square().sum(-1).amax(-1).sqrt()
    return means, radii, counts[0, 0, ..., 0]


def _lse_lower_bound(q: Tensor, k: Tensor, c: float, top: int) -> Tensor:
    """Log-sum-exp over the 3 x 3 pixels around each query of a band: [B, T, rows, W]."""
    rows, width = q.shape[1:3]
    height = k.shape[2]
    floor = q.new_full((k.shape[0], k.shape[1], rows, width), -math.inf)
    for dy in (-1, 0, 1):
        y = slice(max(-top - dy, 0), min(height - top - dy, rows))
        for dx in (-1, 0, 1):
            x = slice(max(-dx, 0), min(width - dx, width))
            near = k[:, :, top + y.start + dy : top + y.stop + dy, x.start + dx : x.stop + dx]
            logits = (q[:, None, y, x] * near).sum(-1) - c * (dy * dy + dx * dx)
            floor[:, :, y, x] = torch.logaddexp(floor[:, :, y, x], logits)
    return floor


def _dropped_mass(
    q: Tensor,
    floor: Tensor,
    length: Tensor,
    origin: tuple[int, int],
    means: Tensor,
    radii: Tensor,
    counts: Tensor,
    c: float,
    rings: int,
) -> Tensor:
    """Bound on the mass beyond each halo, for the tiles of a part of a band: [tiles, rings + 1].

    Column r is the mass outside a halo of r key tiles, of the worst query, clip and frame.
    """
    top, left = origin
    side = TILE // KEY_TILE + 2 * rings
    b, t = means.shape[:2]
    rows, tiles = q.shape[1], math.ceil(q.shape[2] / TILE)
    # key tiles around each query tile; those outside the frame hold no key
    y = torch.arange(side, device=q.device) + top // KEY_TILE - rings
    x = torch.arange(side, device=q.device) + left // KEY_TILE - rings
    x = x + TILE // KEY_TILE * torch.arange(tiles, device=q.device)[:, None]  # [tiles, side]
    inside = ((y >= 0) & (y < counts.shape[0]))[:, None, None] & (x >= 0) & (x < counts.shape[1])
    y, x = y.clamp(0, counts.shape[0] - 1)[:, None, None], x.clamp(0, counts.shape[1] - 1)
    inside = rearrange(inside, "y n x -> n (y x)")
    log_count = torch.where(inside, rearrange(counts[y, x], "y n x -> n (y x)").log(), -math.inf)
    mean = rearrange(means[:, :, y, x], "b t y n x d -> b t n d (y x)")
    radius = rearrange(radii[:, :, y, x], "b t y n x -> b t n 1 (y x)")
    # queries of each tile; the last column repeats to fill the last tile
    column = torch.arange(tiles * TILE, device=q.device).clamp(max=q.shape[2] - 1)
    q = rearrange(q[:, :, column], "b m (n w) d -> b 1 n (m w) d", w=TILE)
    floor, length = (
        rearrange(z[..., column], "b t m (n w) -> b t n (m w) 1", w=TILE) for z in (floor, length)
    )
    # squared distance of each query to the nearest pixel of each key tile
    start = (torch.arange(side, device=q.device) - rings) * KEY_TILE
    pixel = torch.arange(TILE, device=q.device)[:, None]
    gap = torch.maximum(start - pixel, pixel - start - KEY_TILE + 1).clamp(min=0).square()
    distance = rearrange(
        gap[:rows, None, :, None] + gap[None, :, None, :], "m w y x -> (m w) (y x)"
    )
    bound = torch.matmul(q, mean).addcmul_(length, radius).sub_(floor).sub_(c * distance)
    mass = (bound.amax(-2) + log_count).exp()  # [B, T, tiles, y x]
    ring = torch.arange(side, device=q.device) - rings
    ring = torch.maximum(-ring, ring - TILE // KEY_TILE + 1).clamp(min=0)
    ring = torch.maximum(ring[:, None], ring[None]).flatten()
    per_ring = mass.new_zeros(b, t, tiles, rings + 2).index_add_(-1, ring, mass)
    tail = per_ring.flip(-1).cumsum(-1).flip(-1)[..., 1:]  # beyond ring 0, 1, .. rings
    return tail.amax((0, 1))


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
    c = 1 / (2 * sigma.to(torch.promote_types(q.dtype, torch.float32)).square())
    scaled = q * scale
    with torch.no_grad():
        halos = certified_halos(scaled, k, c.item(), tolerance, first_row)
        windows = list(_windows(halos, q.shape[1], first_row, k.shape))
        pairs = sum(math.prod(s.stop - s.start for s in window) for window in windows)
    o, displacement, lse = _CrossFrame.apply(
        scaled, k, v, c, halos, first_row, _query_side(c.item())
    )
    if gaussian == "gate":
        plain = _PlainLSE.apply(scaled, k)
        gate = (lse - plain).exp()[..., None]
        o, displacement, lse = (o * gate).to(v.dtype), displacement * gate, plain
    visited = pairs / (q.shape[1] * q.shape[2] * k.shape[2] * k.shape[3])
    return CrossFrame(o, displacement if offsets else None, lse, visited)


def memory_attention(q: Tensor, memory: Tensor, scale: Tensor) -> Tensor:
    """`reference.memory_attention` through fused attention: q [B, H, W, D], memory [D, N]."""
    entries = memory.mT.expand(q.shape[0], 1, -1, -1)
    o = F.scaled_dot_product_attention(
        (q * scale).flatten(1, 2)[:, None], entries, entries, scale=1.0
    )
    return o[:, 0].unflatten(1, q.shape[1:3])
