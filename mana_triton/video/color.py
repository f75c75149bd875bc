"""Exact conversion between video frames of FFmpeg's formats and RGB, on any device.

With R, G, B in 0 .. 1 and n bits, H.273 (section 8.3) defines

    Y = Kr R + Kg G + Kb B      Cb = (B - Y) / (2 - 2 Kb)      Cr = (R - Y) / (2 - 2 Kr)
    limited range: 2^(n-8) (219 Y + 16), 2^(n-8) (224 C + 128)
    full range:    (2^n - 1) Y,          (2^n - 1) C + 2^(n-1)

RGB is full range, uint8, or uint16 (0 .. 65535) for frames of more than 8 bits. All is computed in
float32 and rounded once. Chroma lies where the file says (mostly left, between two rows): it is
read by linear interpolation and written by the mean of the pixels around it. swscale places it in
the center, which moves the colors of a 4x enlargement by 1.5 pixels.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange
from torch import Tensor

from mana_triton.video.frame import Notes

# pixels at once: rows that stay in a CPU's cache, and what fills a GPU
BAND_ROWS = 64
BAND_PIXELS = 1 << 22

# H.273 matrix number, which is also FFmpeg's -> name, Kr, Kb
MATRICES = {
    1: ("bt709", 0.2126, 0.0722), 4: ("fcc", 0.30, 0.11), 5: ("bt601", 0.299, 0.114),
    6: ("bt601", 0.299, 0.114), 7: ("smpte240m", 0.212, 0.087), 9: ("bt2020", 0.2627, 0.0593),
}  # fmt: skip
# where a chroma sample lies in its block of pixels: (x, y), 0 first, 0.5 center, 1 last
SITINGS = {
    "left": (0.0, 0.5), "center": (0.5, 0.5), "topleft": (0.0, 0.0), "top": (0.5, 0.0),
    "bottomleft": (0.0, 1.0), "bottom": (0.5, 1.0),
}  # fmt: skip
# width and height of the block of pixels with one chroma sample -> its name in pixel formats
_SUBSAMPLINGS = {
    (1, 1): "444", (2, 1): "422", (2, 2): "420", (4, 1): "411", (4, 4): "410", (1, 2): "440",
}  # fmt: skip
_PLANAR = re.compile(r"(yuvj?|yuva)4\d\dp(\d+le)?|gray(\d+le)?")


@dataclass(frozen=True)
class Color:
    """What the numbers of a file mean, in H.273 code points; 2 = unspecified.

    Attributes:
        guessed: whether the file does not say it.
        siting: where chroma lies in subsampled formats, one of SITINGS.
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
        planes: integers [H, W], and [ceil(H / y), ceil(W / x)] for chroma blocks of x by y pixels.
        bits: of their numbers.
        color: what these mean.
        chroma_block: x, y.
    """
    _, kr, kb = MATRICES[color.matrix]
    kg, white = 1 - kr - kb, 255 if bits <= 8 else 65535
    black, span, chroma_span = _spans(bits, color.full_range)
    luma, *chroma = planes
    height, width = luma.shape
    if not chroma:
        gray = luma.float().sub_(black).mul_(white / span)
        return quantized(gray[..., None].expand(-1, -1, 3), white)
    x, y = SITINGS[color.siting]
    device = luma.device
    left, right, part = _neighbors(width, chroma_block[0], x, chroma[0].shape[1], device)
    above, below, share = _neighbors(height, chroma_block[1], y, chroma[0].shape[0], device)
    share = share[:, None]
    rgb = torch.empty(height, width, 3, dtype=integer_type(white), device=device)
    for rows in _bands(luma, 1):
        light = luma[rows].float().sub_(black).mul_(white / span).add_(0.5)  # rounds
        cb, cr = (
            torch.lerp(_rows(c, above[rows]).float(), _rows(c, below[rows]).float(), share[rows])
            .sub_(2 ** (bits - 1))
            .mul_(white / chroma_span)
            for c in chroma
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
            rgb[rows, :, channel] = values.clamp_(0, white + 0.5)
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
    black, span, chroma_span = _spans(bits, full_range)
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
    luma = rgb.new_empty(height, width, dtype=integer_type(top))
    chroma = luma.new_empty(2, *size)
    for rows in _bands(luma, step_y):
        start, end = rows.start, -(-rows.stop // step_y) * step_y
        around = torch.arange(start - lead, end + trail, device=rgb.device).clamp_(0, height - 1)
        # a slice where possible: picking rows by number copies them
        some = rgb[rows] if len(around) == rows.stop - start else _rows(rgb, around)
        channels = luma.new_empty(3, *some.shape[:2], dtype=torch.float32)
        channels.copy_(some.permute(2, 0, 1))
        luma[rows] = _mixed(channels[:, lead : lead + rows.stop - start], to_luma, black + 0.5)
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
    return (values + 0.5).clamp_(0, top + 0.5).to(integer_type(top))


def integer_type(top: int) -> torch.dtype:
    """The type of numbers up to top."""
    return torch.uint8 if top <= 255 else torch.uint16


def _rows(pixels: Tensor, numbers: Tensor) -> Tensor:
    """Rows by their numbers; CUDA cannot index uint16."""
    if pixels.dtype != torch.uint16:
        return pixels[numbers]
    return pixels.view(torch.int16)[numbers].view(torch.uint16)


def _mixed(channels: Tensor, factors: Sequence[float], offset: float) -> Tensor:
    """Weighted sum of three channels [3, h, w], plus a number."""
    out = torch.mul(channels[0], factors[0]).add_(channels[1], alpha=factors[1])
    return out.add_(channels[2], alpha=factors[2]).add_(offset)


def _spans(bits: int, full_range: bool) -> tuple[float, float, float]:
    """The code of black, and how many codes Y and C range over."""
    if full_range:
        return 0, 2**bits - 1, 2**bits - 1
    unit = 2 ** (bits - 8)
    return 16 * unit, 219 * unit, 224 * unit


def _bands(plane: Tensor, step: int) -> Iterator[slice]:
    """Rows to compute at once of a plane [H, W]: a multiple of `step`."""
    height, width = plane.shape
    rows = BAND_ROWS if plane.device.type == "cpu" else max(BAND_PIXELS // width, BAND_ROWS)
    rows -= rows % step
    for start in range(0, height, rows):
        yield slice(start, min(start + rows, height))


def _neighbors(
    length: int, step: int, place: float, count: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel the chroma samples before and after it, and the weight of the second."""
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
    """Weighted sums of every step-th slice along `dim`, which starts `lead` before the first."""
    if taps == [(0, 1.0)]:
        return x
    count = (x.shape[dim] - lead - taps[-1][0] - 1) // step + 1
    total = None
    for first, weight in ((lead + offset, weight) for offset, weight in taps):
        chosen = (slice(None),) * dim + (slice(first, first + (count - 1) * step + 1, step),)
        total = x[chosen] * weight if total is None else total.add_(x[chosen], alpha=weight)
    assert total is not None
    return total


def bit_depth(form: av.VideoFormat) -> int:
    """Bits of a channel."""
    return max((component.bits for component in form.components), default=8)


def has_alpha(form: av.VideoFormat) -> bool:
    """Whether the format has an opacity."""
    return form.has_palette or any(component.is_alpha for component in form.components)


def chroma_block(form: str) -> tuple[int, int]:
    """Width and height of the pixels that share a chroma sample."""
    components: Any = av.VideoFormat(form, 64, 64).components
    chroma = components[1] if len(components) > 2 else components[0]
    return 64 // chroma.width, 64 // chroma.height


def to_rgb(frame: av.VideoFrame, color: Color) -> np.ndarray:
    """[H, W, 3] uint8, or uint16 where the frame has more than 8 bits."""
    form = frame.format
    if _is_rgb(form) or form.name.startswith(("xyz", "bayer", "mono")):
        if bit_depth(form) <= 8:
            return _repacked(frame, "rgb24").to_ndarray()
        if not re.fullmatch(r"gbra?p\d+le", form.name):
            return _repacked(frame, "rgb48le").to_ndarray()
        top = 2 ** bit_depth(form) - 1
        g, b, r = (torch.from_numpy(plane).float() for plane in _planes(frame)[:3])
        return quantized(torch.stack([r, g, b], -1).mul_(65535 / top), 65535).numpy()
    if not _PLANAR.fullmatch(form.name) or any(plane.line_size <= 0 for plane in frame.planes):
        frame = _repacked(frame, _planar(form))
    planes = [torch.from_numpy(plane) for plane in _planes(frame)[:3]]
    block = chroma_block(frame.format.name)
    return yuv_to_rgb(planes, bit_depth(frame.format), color, block).numpy()


def with_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of 8 or 16 bits, as uint8 if there are to be 8, else as uint16."""
    if (values.dtype == np.uint8) == (bits <= 8):
        return values
    return (values / 257).round().astype(np.uint8) if bits <= 8 else values.astype(np.uint16) * 257


def with_uniform_bits(
    rgb: np.ndarray, alpha: np.ndarray | None, bits: int, notes: Notes
) -> tuple[np.ndarray, np.ndarray | None]:
    """A picture with the bits that its reader announced."""
    if (rgb.dtype == np.uint8) != (bits <= 8):
        notes.add(f"some pictures have 8 bits, some more; all are taken with {bits}")
    return with_bits(rgb, bits), None if alpha is None else with_bits(alpha, bits)


def planes_of(rgb: Tensor, form: str, color: Color, full_range: bool) -> list[Tensor]:
    """The planes of [H, W, 3] uint8 or uint16 RGB, on its device, as `from_planes` takes them.

    These are Y, Cb and Cr, or Y alone; for an RGB format green, blue and red, or `rgb` itself if
    both have 8 bits.
    """
    target = av.VideoFormat(form)
    bits = bit_depth(target)
    if not _is_rgb(target):
        name = _intermediate(target)
        gray = name.startswith("gray")
        return rgb_to_yuv(rgb, bits, color, full_range, chroma_block(name), gray=gray)
    if rgb.dtype == torch.uint8 and bits <= 8:
        return [rgb]
    white, top = 255 if rgb.dtype == torch.uint8 else 65535, 2 ** min(max(bits, 8), 16) - 1
    red, green, blue = quantized(rgb.float().mul_(top / white), top).unbind(-1)
    return [green, blue, red]


def from_planes(planes: Sequence[np.ndarray], form: str) -> av.VideoFrame:
    """A frame in any format of the planes that `planes_of` gives for it."""
    if planes[0].ndim == 3:
        pixels = np.ascontiguousarray(planes[0])
        return _repacked(av.VideoFrame.from_ndarray(pixels, "rgb24"), form)
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, _intermediate(av.VideoFormat(form)))
    for plane, values in zip(frame.planes, planes, strict=True):
        _samples(plane, values.dtype.type)[:] = values
    return _repacked(frame, form)


def alpha_of(frame: av.VideoFrame) -> np.ndarray | None:
    """[H, W] opacity in the type of the frame's RGB; None if fully opaque."""
    form = frame.format
    if not has_alpha(form):
        return None
    bits = bit_depth(form)
    if re.fullmatch(r"(yuva4\d\dp|gbrap)(\d+le)?", form.name):
        alpha = _planes(frame)[3]
        if 8 < bits < 16:
            top = 2**bits - 1
            alpha = quantized(torch.from_numpy(alpha).float() * (65535 / top), 65535).numpy()
    else:
        alpha = _repacked(frame, "rgba" if bits <= 8 else "rgba64le").to_ndarray()[..., 3]
    return None if alpha.min() == (255 if bits <= 8 else 65535) else alpha.copy()


def enlarge_alpha(alpha: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic enlargement of [H, W] uint8 or uint16."""
    values = torch.from_numpy(alpha).float()[None, None]
    large = F.interpolate(values, (height, width), mode="bicubic", align_corners=False)
    return quantized(large[0, 0], np.iinfo(alpha.dtype).max).numpy()


def _is_rgb(form: av.VideoFormat) -> bool:
    return form.is_rgb or form.has_palette


def _planar(form: av.VideoFormat) -> str:
    """The format that holds the same samples, each channel by itself, little-endian."""
    bits = bit_depth(form)
    suffix = f"{bits}le" if bits > 8 else ""
    if len(form.components) <= 2:
        return f"gray{suffix}"
    return f"yuv{_SUBSAMPLINGS[chroma_block(form.name)]}p{suffix}"


def _intermediate(form: av.VideoFormat) -> str:
    """The planar format from which frames of this one are packed."""
    if _is_rgb(form):
        bits = min(max(bit_depth(form), 8), 16)
        return "gbrp" if bits == 8 else f"gbrp{bits}le"
    is_planar = _PLANAR.fullmatch(form.name) and not form.name.startswith("yuva")
    return form.name if is_planar else _planar(form)


def _repacked(frame: av.VideoFrame, form: str) -> av.VideoFrame:
    """The same samples in another order; no change of color, as range and matrix stay."""
    if frame.format.name == form:
        return frame
    same = ColorRange.JPEG
    # with more threads swscale spoils 1 in 600 small frames of yuv420p10le to p010le and back
    return frame.reformat(format=form, src_color_range=same, dst_color_range=same, threads=1)


def _samples(plane: VideoPlane, kind: type) -> np.ndarray:
    """[height, width] view of a plane's samples."""
    return np.frombuffer(cast(Any, plane), kind).reshape(plane.height, -1)[:, : plane.width]


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    kind = np.uint16 if bit_depth(frame.format) > 8 else np.uint8
    return [_samples(plane, kind) for plane in frame.planes]
