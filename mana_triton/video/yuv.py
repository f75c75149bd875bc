"""The exact way between Y, Cb and Cr planes and RGB, on any device.

With R, G, B in 0 .. 1 and n bits, H.273 (section 8.3) defines

    Y = Kr R + Kg G + Kb B      Cb = (B - Y) / (2 - 2 Kb)      Cr = (R - Y) / (2 - 2 Kr)
    limited range: 2^(n-8) (219 Y + 16), 2^(n-8) (224 C + 128)
    full range:    (2^n - 1) Y,          (2^n - 1) C + 2^(n-1)

RGB is full range, uint8 or uint16 (0 .. 65535) for planes of more than 8 bits. All is computed in
float32 and rounded once. Chroma lies where the file says (mostly left, between two rows): it is
read by linear interpolation and written by the mean of what surrounds it. swscale takes it to lie
in the center, which moves the colors of a 4x enlargement by 1.5 pixels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# pixels at once: rows that stay in a processor's cache, and what fills a GPU
BAND_ROWS = 64
BAND_PIXELS = 1 << 22

# H.273 matrix number, which is also FFmpeg's -> our name, Kr, Kb
MATRICES = {
    1: ("bt709", 0.2126, 0.0722),
    4: ("fcc", 0.30, 0.11),
    5: ("bt601", 0.299, 0.114),
    6: ("bt601", 0.299, 0.114),
    7: ("smpte240m", 0.212, 0.087),
    9: ("bt2020", 0.2627, 0.0593),
}
# where a chroma sample lies in its block of pixels: (x, y), 0 first, 0.5 center, 1 last
SITINGS = {
    "left": (0.0, 0.5),
    "center": (0.5, 0.5),
    "topleft": (0.0, 0.0),
    "top": (0.5, 0.0),
    "bottomleft": (0.0, 1.0),
    "bottom": (0.5, 1.0),
}


@dataclass(frozen=True)
class Color:
    """What a file's numbers mean: H.273 code points, 2 = unspecified.

    `siting` is where chroma lies in subsampled formats, one of SITINGS.
    """

    matrix: int = 1
    full_range: bool = False
    primaries: int = 1
    transfer: int = 1
    guessed: bool = False
    siting: str = "left"

    @property
    def name(self) -> str:
        """bt601, bt709, bt2020, ..."""
        return MATRICES[self.matrix][0]


def yuv_to_rgb(
    planes: Sequence[Tensor], bits: int, color: Color, chroma_block: tuple[int, int]
) -> Tensor:
    """[H, W, 3] full-range RGB of one plane (gray) or three, Y, Cb and Cr.

    Args:
        planes: integers [H, W], and [ceil(H / y), ceil(W / x)] where a chroma sample is that of
            x times y pixels.
        bits: of their numbers.
        color: what these mean.
        chroma_block: x, y.
    """
    _, kr, kb = MATRICES[color.matrix]
    kg, top = 1 - kr - kb, 255 if bits <= 8 else 65535
    zero, span, chroma_span = _spans(bits, color.full_range)
    luma, *chroma = planes
    height, width = luma.shape
    if not chroma:
        gray = luma.float().sub_(zero).mul_(top / span)
        return quantized(gray[..., None].expand(-1, -1, 3), top)
    x, y = SITINGS[color.siting]
    device = luma.device
    left, right, part = _neighbors(width, chroma_block[0], x, chroma[0].shape[1], device)
    above, below, share = _neighbors(height, chroma_block[1], y, chroma[0].shape[0], device)
    rgb = torch.empty(height, width, 3, dtype=integers(top), device=device)
    for rows in _bands(luma, 1):
        light = luma[rows].float().sub_(zero).mul_(top / span).add_(0.5)  # rounds
        cb, cr = (
            torch.lerp(
                _rows(plane, above[rows]).float(),
                _rows(plane, below[rows]).float(),
                share[rows, None],
            )
            .sub_(2 ** (bits - 1))
            .mul_(top / chroma_span)
            for plane in chroma
        )
        if chroma_block[0] > 1:
            cb, cr = (
                torch.lerp(c.index_select(1, left), c.index_select(1, right), part)
                for c in (cb, cr)
            )
        green = torch.add(light, cb, alpha=-kb * (2 - 2 * kb) / kg)
        green.add_(cr, alpha=-kr * (2 - 2 * kr) / kg)
        red, blue = light.add(cr, alpha=2 - 2 * kr), light.add_(cb, alpha=2 - 2 * kb)
        for channel, values in enumerate((red, green, blue)):
            rgb[rows, :, channel] = values.clamp_(0, top + 0.5)
    return rgb


def rgb_to_yuv(
    rgb: Tensor,
    bits: int,
    color: Color,
    full_range: bool,
    chroma_block: tuple[int, int],
    gray: bool = False,
) -> list[Tensor]:
    """Y, Cb and Cr planes (or Y alone) of [H, W, 3] full-range RGB, uint8 or uint16.

    Other arguments and the planes' sizes are those of `yuv_to_rgb`.
    """
    top, white = 2**bits - 1, 255 if rgb.dtype == torch.uint8 else 65535
    _, kr, kb = MATRICES[color.matrix]
    weights = kr, 1 - kr - kb, kb
    zero, span, chroma_span = _spans(bits, full_range)
    to_luma = [weight * span / white for weight in weights]
    to_chroma = [
        [
            ((channel == main) - weight) / (2 - 2 * weights[main]) * chroma_span / white
            for channel, weight in enumerate(weights)
        ]
        for main in (2, 0)
    ]
    height, width = rgb.shape[:2]
    (step_x, step_y), (x, y) = chroma_block, SITINGS[color.siting]
    across, down = _taps(step_x, x), _taps(step_y, y)
    lead, trail = max(0, -down[0][0]), max(0, down[-1][0] - step_y + 1)
    size = -(-height // step_y), -(-width // step_x)
    luma = rgb.new_empty(height, width, dtype=integers(top))
    chroma = luma.new_empty(2, *size)
    for rows in _bands(luma, step_y):
        start, end = rows.start, -(-rows.stop // step_y) * step_y
        around = torch.arange(start - lead, end + trail, device=rgb.device).clamp_(0, height - 1)
        # a slice where it can be: picking rows by number copies them
        some = rgb[rows] if len(around) == rows.stop - start else _rows(rgb, around)
        channels = luma.new_empty(3, *some.shape[:2], dtype=torch.float32)
        channels.copy_(some.permute(2, 0, 1))
        luma[rows] = _mixed(channels[:, lead : lead + rows.stop - start], to_luma, zero + 0.5)
        if gray:
            continue
        channels = _weighted(channels, 1, down, step_y, lead)
        before, after = max(0, -across[0][0]), across[-1][0] + size[1] * step_x - step_x
        if before or after >= width:
            edges = before, max(0, after + 1 - width)
            channels = F.pad(channels, edges, mode="replicate")
        channels = _weighted(channels, 2, across, step_x, before)[..., : size[1]]
        for plane, factors in zip(chroma, to_chroma, strict=True):
            codes = _mixed(channels, factors, 2 ** (bits - 1) + 0.5).clamp_(0, top + 0.5)
            plane[start // step_y : end // step_y] = codes
    return [luma] if gray else [luma, *chroma]


def quantized(values: Tensor, top: int) -> Tensor:
    """Values of 0 .. top as integers."""
    return (values + 0.5).clamp_(0, top + 0.5).to(integers(top))


def integers(top: int) -> torch.dtype:
    """The type of numbers up to top."""
    return torch.uint8 if top <= 255 else torch.uint16


def _rows(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Rows by their numbers; CUDA does not pick among uint16."""
    if pixels.dtype != torch.uint16:
        return pixels[numbers]
    return pixels.view(torch.int16)[numbers].view(torch.uint16)


def _mixed(channels: Tensor, factors: Sequence[float], offset: float) -> Tensor:
    """Weighted sum of three channels [3, h, w], and a number more."""
    out = torch.mul(channels[0], factors[0]).add_(channels[1], alpha=factors[1])
    return out.add_(channels[2], alpha=factors[2]).add_(offset)


def _spans(bits: int, full_range: bool) -> tuple[float, float, float]:
    """The code of black, and how many codes Y and C range over."""
    if full_range:
        return 0, 2**bits - 1, 2**bits - 1
    unit = 2 ** (bits - 8)
    return 16 * unit, 219 * unit, 224 * unit


def _bands(plane: Tensor, step: int) -> Iterator[slice]:
    """Rows at once of a plane [H, W]: a multiple of `step`."""
    height, width = plane.shape
    rows = BAND_ROWS if plane.device.type == "cpu" else max(BAND_PIXELS // width, BAND_ROWS)
    rows -= rows % step
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def _neighbors(
    length: int, step: int, place: float, count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel the chroma samples before and after it, and how far the second counts."""
    pixels = torch.arange(length, dtype=torch.float64, device=device)
    position = (pixels - place * (step - 1)) / step
    first = position.floor()
    part = (position - first).float()
    before, after = (i.long().clamp_(0, count - 1) for i in (first, first + 1))
    return before, after, part


def _taps(step: int, place: float) -> list[tuple[int, float]]:
    """Pixels whose mean is a chroma sample, relative to its block: (offset, weight)."""
    if place == 0.5:
        return [(offset, 1 / step) for offset in range(step)]
    at = round(place * (step - 1))
    return [(at + d, (step - abs(d)) / step**2) for d in range(1 - step, step)]


def _weighted(x: Tensor, dim: int, taps: list[tuple[int, float]], step: int, lead: int) -> Tensor:
    """Weighted sums of every step-th slice along `dim`, which begins `lead` before the first."""
    if taps == [(0, 1.0)]:
        return x
    count = (x.shape[dim] - lead - taps[-1][0] - 1) // step + 1
    total = None
    for offset, weight in taps:
        first = lead + offset
        chosen = (slice(None),) * dim + (slice(first, first + (count - 1) * step + 1, step),)
        total = x[chosen] * weight if total is None else total.add_(x[chosen], alpha=weight)
    assert total is not None
    return total
