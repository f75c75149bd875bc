"""Strips of queries and their windows of keys, as `tiled.py` visits them, and the certificate.

With S the kept keys and eta >= the sum over the dropped keys of exp(b - LSE_S), the error is at
most eta (max|v| + |o|), where no dropped key's logit exceeds b = |s q| max|k| - c d^2 with
c = 1 / (2 sigma^2). The first strip of tiles takes the radius that suffices when queries are
matched well. Each later one takes what LSE_S certified for most of the strip before. Where a
strip's own LSE_S demands more, a second pass takes the radius that it certifies. (Bounding keys
tile by tile, by mean and deviation, shrank the radii of trained and of random features by 0 to
4 %, less than it costs.)
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

STRIP = 64  # rows of queries in a strip, at most
WIDE = 26  # window radius from which on tiles are 16 x 16 instead of 4 x 8
SLACK = 4.0  # nats by which the first strip lets a query's LSE stay below its largest logit
ENOUGH = 0.95  # share of a strip's cells for which the next strip's radius would have sufficed
SMALL = 1024  # pixels of a frame whose keys are all kept
ROUNDING = 8e-6  # of the logits, from the Gaussian's columns
WINDOW = 1 << 20  # elements of the keys and values that are laid out at once


class Strip(NamedTuple):
    """A rectangle of queries of some frames, and the rectangle of keys that they meet.

    A window takes whole rows of the rectangle of keys, which are consecutive in memory: it needs
    no copy. Where a strip is long enough, its rows of keys continue beyond the frame, masked, so
    that all its tiles are alike.
    """

    clip: int
    frames: slice
    rows: slice  # of the queries
    cols: slice
    window_radius: int
    step: int  # rows of a query tile
    key_rows: slice
    key_cols: slice

    @classmethod
    def of(
        cls, clip: int, frames: slice, rows: slice, cols: slice, radius: int, step: int,
        shape: torch.Size,
    ) -> "Strip":  # fmt: skip
        """The queries rows x cols with the keys [B, T, H, W, D] around them."""
        key_rows, key_cols = (
            slice(max(x.start - radius, 0), min(x.stop + radius, size))
            for x, size in ((rows, shape[2]), (cols, shape[3]))
        )
        if 2 * radius <= rows.stop - rows.start:
            key_rows = slice(rows.start - radius, rows.stop + radius)
        return cls(clip, frames, rows, cols, radius, step, key_rows, key_cols)

    def keys(self, height: int) -> tuple[tuple, slice]:
        """The keys' index into [B, T, H, W, ..], and their rows among those of the rectangle."""
        first, last = max(self.key_rows.start, 0), min(self.key_rows.stop, height)
        inside = slice(first - self.key_rows.start, last - self.key_rows.start)
        return (self.clip, self.frames, slice(first, last), self.key_cols), inside

    def queries(self, first_row: int) -> tuple:
        """The queries' index into [B, T, h, W, ..], which starts at first_row of the frame."""
        rows = slice(self.rows.start - first_row, self.rows.stop - first_row)
        return self.clip, self.frames, rows, self.cols

    def runs(self) -> list[tuple[slice, int, slice]]:
        """Tiles whose windows are alike: each starts as many rows below the last as a tile has.

        Returns:
            The rows of the queries, the rows of one tile, and the rows of the first tile's keys,
            all counted from the strip's own first. A tile at an edge of the frame has fewer rows.
        """
        rows, step = self.rows.stop - self.rows.start, self.step
        above, below = self.rows.start - self.key_rows.start, self.key_rows.stop - self.rows.stop
        top = min(math.ceil((self.window_radius - above) / step) * step, rows)
        bottom = top + max((rows - top - self.window_radius + below) // step, 0) * step
        result = []
        for first, last, height in ((0, top, top), (top, bottom, step), (bottom, rows, rows)):
            if first < last:
                height = min(height, last - first)
                window = self.window(slice(first, first + height))
                result.append((slice(first, last), height, window))
        return result

    def window(self, own: slice) -> slice:
        """The rows of the window of a tile, both counted from the strip's first."""
        above = self.rows.start - self.key_rows.start
        return slice(
            max(own.start - self.window_radius + above, 0),
            min(own.stop + self.window_radius + above, self.key_rows.stop - self.key_rows.start),
        )


def longest_strip(c: float, eta: float) -> int:
    """Rows of queries laid out together, a power of two; below 16 only for small sigma.

    The Gaussian's columns grow to c y^2 and cancel, which leaves some four roundings of that.
    """
    largest = max(ROUNDING, eta / 10) * 2.0**22
    rows = STRIP
    while rows > 1 and c * (rows / 2) ** 2 > largest:
        rows //= 2
    return rows


def first_strips(
    certificate: "Certificate", rows: int, first_row: int, shape: torch.Size, longest: int
) -> Iterator[Strip]:
    """All queries, each strip with the certificate's window radius at that time.

    shape is that of the keys [B, T, H, W, D].
    """
    clips, frames, height, width, d = shape
    start = radius = certificate.window_radius
    step, across = (4, 8) if radius < WIDE else (16, 16)
    if radius >= max(height, width):
        step = STRIP  # all tiles meet the same keys
    step, across = min(step, longest), min(across, longest)
    elements = min(longest + 2 * radius, height) * min(across + 2 * radius, width) * 2 * (d + 4)
    some = max(WINDOW // elements, 1)
    for clip in range(clips):
        for t in range(0, frames, some):
            for top in range(first_row, first_row + rows, longest):
                certificate.window_radius = start  # a row of strips depends on no other row
                for left in range(0, width, across):
                    yield Strip.of(
                        clip, slice(t, min(t + some, frames)),
                        slice(top, min(top + longest, first_row + rows)),
                        slice(left, min(left + across, width)),
                        certificate.window_radius, step, shape,
                    )  # fmt: skip


def second_strips(needed: Tensor, strip: Strip, shape: torch.Size, cell: int) -> Iterator[Strip]:
    """The cells [T, y, x] of a strip's queries that need more than its window radius."""
    for t, y, x in (needed > strip.window_radius).nonzero().tolist():
        frame = strip.frames.start + t
        top, left = strip.rows.start + y * cell, strip.cols.start + x * cell
        rows = slice(top, min(top + cell, strip.rows.stop))
        cols = slice(left, min(left + cell, strip.cols.stop))
        radius = int(needed[t, y, x])
        yield Strip.of(strip.clip, slice(frame, frame + 1), rows, cols, radius, cell, shape)


# --- the certificate


def log_gaussian_outside(c: float, longest: int) -> Tensor:
    """Logarithm of the sum of exp(-c d^2) over all pixels beyond a radius of 0, 1, .. longest."""
    d = torch.arange(longest + 1, dtype=torch.float64)
    weight = torch.exp(-c * d * d) * torch.where(d == 0, 1, 2)
    # beyond the frame no pixel counts; within: the square of the axis' sum less the inner square
    tail = weight.flip(0).cumsum(0).flip(0)  # from d on
    beyond = F.pad(tail[1:], (0, 1))
    return (beyond * (2 * tail[0] - beyond)).log()


def certified_radius(spread: Tensor, outside: Tensor, eta: float) -> Tensor:
    """Pixels beyond which keys hold less than eta of the softmax, whatever the keys are.

    Args:
        spread: by how much a logit without its Gaussian may exceed the log-sum-exp of the kept.
        outside: see `log_gaussian_outside`; its last radius is the answer where none suffices.
        eta: bound on the dropped part, relative to the kept part.
    """
    radius = torch.searchsorted(-outside, spread.double() - math.log(eta))
    return radius.clamp_(max=len(outside) - 1)


class Certificate:
    """Window radii for strips of queries; see the head of this file.

    Args:
        q: [B, h, W, D] scaled queries.
        k: [B, T, H, W, D] keys.
        c: 1 / (2 sigma^2).
        eta: bound on the dropped part of the softmax, relative to the kept part; 0 keeps all.

    Attributes:
        window_radius: of the next strip in the first pass; max(H, W) keeps all keys.
        largest: [B, T, h, W] bound of a query's logits in a frame.
    """

    def __init__(self, q: Tensor, k: Tensor, c: float, eta: float):
        self.everything = self.window_radius = max(k.shape[2:4])
        work = torch.promote_types(q.dtype, torch.float32)
        length = torch.linalg.vector_norm(q, dim=-1, dtype=work)  # [B, h, W]
        longest = torch.linalg.vector_norm(k, dim=-1, dtype=work).amax((2, 3))  # [B, T]
        self.largest = length[:, None] * longest[..., None, None]
        if eta == 0 or c == 0 or k.shape[2] * k.shape[3] <= SMALL:
            return
        self.eta, self.outside = eta, log_gaussian_outside(c, self.everything)
        self.window_radius = int(certified_radius(torch.tensor(SLACK), self.outside, eta))

    def needed(self, at: tuple, lse: Tensor, cell: int) -> Tensor:
        """The radii [T, y, x] that the cells of a strip need by the lse [B, T, h, W] of its keys.

        The next strip's radius is the one that sufficed for most of these cells.
        """
        spread = F.max_pool2d(self.largest[at] - lse[at], cell, ceil_mode=True)
        radii = certified_radius(spread.cpu(), self.outside, self.eta)
        share = math.ceil(ENOUGH * radii.numel())
        self.window_radius = int(radii.flatten().kthvalue(share).values)
        return radii
