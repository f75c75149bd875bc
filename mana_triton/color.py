"""Colors: what the numbers of a file mean, and the exact way between its planes and RGB.

With R, G, B in 0 .. 1 and n bits, H.273 (section 8.3) defines

    Y = Kr R + Kg G + Kb B      Cb = (B - Y) / (2 - 2 Kb)      Cr = (R - Y) / (2 - 2 Kr)
    limited range: 2^(n-8) (219 Y + 16), 2^(n-8) (224 C + 128)
    full range:    (2^n - 1) Y,          (2^n - 1) C + 2^(n-1)

RGB is full range, uint8 or uint16 (0 .. 65535) for files of more than 8 bits. All is computed in
float32 and rounded once. Chroma lies where the file says (mostly left, between two rows): it is
read by linear interpolation and written by the mean of what surrounds it. swscale takes it to lie
in the center, which moves the colors of a 4x enlargement by 1.5 pixels.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange
from torch import Tensor

BAND = 64  # rows at once: they stay in the processor's cache

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
# width and height of a block of pixels with one chroma sample -> what formats call it
_SUBSAMPLINGS = {
    (1, 1): "444", (2, 1): "422", (2, 2): "420", (4, 1): "411", (4, 4): "410", (1, 2): "440",
}  # fmt: skip
_PLANAR = re.compile(r"(yuvj?|yuva)4\d\dp(\d+le)?|gray(\d+le)?")


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


def depth(form: av.VideoFormat) -> int:
    """Bits of a channel."""
    bits = [component.bits for component in form.components]
    return max(bits, default=8)


def has_alpha(form: av.VideoFormat) -> bool:
    return form.has_palette or any(component.is_alpha for component in form.components)


def block(form: str) -> tuple[int, int]:
    """Width and height of the pixels that share a chroma sample."""
    components: Any = av.VideoFormat(form, 64, 64).components
    chroma = components[1] if len(components) > 2 else components[0]
    return 64 // chroma.width, 64 // chroma.height


def planar(form: av.VideoFormat) -> str:
    """The format that holds the same samples, each channel by itself, little-endian."""
    bits = depth(form)
    suffix = f"{bits}le" if bits > 8 else ""
    if len(form.components) <= 2:
        return f"gray{suffix}"
    return f"yuv{_SUBSAMPLINGS[block(form.name)]}p{suffix}"


def to_rgb(frame: av.VideoFrame, color: Color) -> np.ndarray:
    """[H, W, 3] uint8, or uint16 where the frame has more than 8 bits."""
    form = frame.format
    if form.is_rgb or form.has_palette or form.name.startswith(("xyz", "bayer", "mono")):
        if depth(form) <= 8:
            return _repacked(frame, "rgb24").to_ndarray()
        if not re.fullmatch(r"gbra?p\d+le", form.name):
            return _repacked(frame, "rgb48le").to_ndarray()
        top = 2 ** depth(form) - 1
        g, b, r = (torch.from_numpy(plane).float() for plane in _planes(frame)[:3])
        return _quantized(torch.stack([r, g, b], -1).mul_(65535 / top), 65535)
    if not _PLANAR.fullmatch(form.name) or any(plane.line_size <= 0 for plane in frame.planes):
        frame = _repacked(frame, planar(form))
    return yuv_to_rgb(_planes(frame)[:3], depth(frame.format), color, block(frame.format.name))


def with_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of 8 or 16 bits, as uint8 if there are to be 8, else as uint16."""
    if (values.dtype == np.uint8) == (bits <= 8):
        return values
    return (values / 257).round().astype(np.uint8) if bits <= 8 else values.astype(np.uint16) * 257


def yuv_to_rgb(
    planes: list[np.ndarray], bits: int, color: Color, chroma_block: tuple[int, int]
) -> np.ndarray:
    """[H, W, 3] full-range RGB of one plane (gray) or three, Y, Cb and Cr."""
    _, kr, kb = MATRICES[color.matrix]
    kg, top = 1 - kr - kb, 255 if bits <= 8 else 65535
    zero, span, chroma_span = _spans(bits, color.full_range)
    height, width = planes[0].shape
    if len(planes) < 3:
        gray = torch.from_numpy(planes[0]).float().sub_(zero).mul_(top / span)
        return _quantized(gray[..., None].expand(-1, -1, 3), top)
    luma, *chroma = (torch.from_numpy(plane) for plane in planes)
    x, y = SITINGS[color.siting]
    left, right, part = _neighbors(width, chroma_block[0], x, chroma[0].shape[1])
    above, below, share = _neighbors(height, chroma_block[1], y, chroma[0].shape[0])
    rgb = torch.empty(height, width, 3, dtype=_kind(top))
    for rows in _bands(height):
        light = luma[rows].float().sub_(zero).mul_(top / span).add_(0.5)  # rounds
        cb, cr = (
            torch.lerp(plane[above[rows]].float(), plane[below[rows]].float(), share[rows, None])
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
    return rgb.numpy()


def from_rgb(rgb: np.ndarray, form: str, color: Color, full_range: bool) -> av.VideoFrame:
    """A frame in any format of [H, W, 3] uint8 or uint16 RGB."""
    target = av.VideoFormat(form)
    bits = depth(target)
    if target.is_rgb or target.has_palette:
        if rgb.dtype == np.uint8 and bits <= 8:
            return _repacked(av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), "rgb24"), form)
        bits = min(max(bits, 8), 16)
        top = 2**bits - 1
        values = torch.from_numpy(rgb).float().mul_(top / np.iinfo(rgb.dtype).max)
        r, g, b = np.moveaxis(_quantized(values, top), -1, 0)
        name = "gbrp" if bits == 8 else f"gbrp{bits}le"
        return _repacked(_frame([g, b, r], name), form)
    name = form if _PLANAR.fullmatch(form) and not form.startswith("yuva") else planar(target)
    planes = rgb_to_yuv(rgb, bits, color, full_range, block(name), gray=name.startswith("gray"))
    return _repacked(_frame(planes, name), form)


def rgb_to_yuv(
    rgb: np.ndarray,
    bits: int,
    color: Color,
    full_range: bool,
    chroma_block: tuple[int, int],
    gray: bool = False,
) -> list[np.ndarray]:
    """Y, Cb and Cr planes (or Y alone) of [H, W, 3] full-range RGB."""
    top = 2**bits - 1
    _, kr, kb = MATRICES[color.matrix]
    weights = torch.tensor([kr, 1 - kr - kb, kb], dtype=torch.float64) / np.iinfo(rgb.dtype).max
    zero, span, chroma_span = _spans(bits, full_range)
    blue, red = torch.tensor([[0, 0, 1], [1, 0, 0]]) / np.iinfo(rgb.dtype).max
    differences = torch.stack([(blue - weights) / (2 - 2 * kb), (red - weights) / (2 - 2 * kr)])
    to_luma = (weights * span).tolist()
    to_chroma = (differences * chroma_span).float()
    height, width = rgb.shape[:2]
    (step_x, step_y), (x, y) = chroma_block, SITINGS[color.siting]
    across, down = _taps(step_x, x), _taps(step_y, y)
    lead, trail = max(0, -down[0][0]), max(0, down[-1][0] - step_y + 1)
    size = -(-height // step_y), -(-width // step_x)
    luma = torch.empty(height, width, dtype=_kind(top))
    chroma = torch.empty(2, *size, dtype=luma.dtype)
    pixels = torch.from_numpy(rgb)
    for rows in _bands(height):
        start, end = rows.start, -(-rows.stop // step_y) * step_y
        around = torch.arange(start - lead, end + trail).clamp_(0, height - 1)
        # a slice where it can be: picking rows by number copies them
        some = pixels[rows] if len(around) == rows.stop - start else pixels[around]
        channels = torch.empty(3, *some.shape[:2]).copy_(some.permute(2, 0, 1))
        center = channels[:, lead : lead + rows.stop - start]
        light = torch.mul(center[0], to_luma[0]).add_(center[1], alpha=to_luma[1])
        light.add_(center[2], alpha=to_luma[2]).add_(zero + 0.5)
        luma[rows] = light
        if gray:
            continue
        channels = _weighted(channels, 1, down, step_y, lead)
        before, after = max(0, -across[0][0]), across[-1][0] + size[1] * step_x - step_x
        if before or after >= width:
            edges = before, max(0, after + 1 - width)
            channels = F.pad(channels, edges, mode="replicate")
        channels = _weighted(channels, 2, across, step_x, before)[..., : size[1]]
        codes = (to_chroma @ channels.reshape(3, -1)).add_(2 ** (bits - 1) + 0.5)
        codes = codes.clamp_(0, top + 0.5).view(2, -1, size[1])
        chroma[:, start // step_y : end // step_y] = codes
    return [plane.numpy() for plane in ([luma] if gray else [luma, *chroma])]


def _spans(bits: int, full_range: bool) -> tuple[float, float, float]:
    """The code of black, and how many codes Y and C range over."""
    if full_range:
        return 0, 2**bits - 1, 2**bits - 1
    unit = 2 ** (bits - 8)
    return 16 * unit, 219 * unit, 224 * unit


def _bands(height: int) -> Iterator[slice]:
    for start in range(0, height, BAND):
        yield slice(start, min(start + BAND, height))


def _neighbors(length: int, step: int, place: float, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel the chroma samples before and after it, and how far the second counts."""
    position = (torch.arange(length, dtype=torch.float64) - place * (step - 1)) / step
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


def _quantized(values: Tensor, top: int) -> np.ndarray:
    """Values of 0 .. top as integers."""
    return (values + 0.5).clamp_(0, top + 0.5).to(_kind(top)).numpy()


def _kind(top: int) -> torch.dtype:
    return torch.uint8 if top <= 255 else torch.uint16


def _repacked(frame: av.VideoFrame, form: str) -> av.VideoFrame:
    """The same samples in another order; no change of color, as ranges and matrix stay."""
    if frame.format.name == form:
        return frame
    same = ColorRange.JPEG
    # with more threads swscale spoils 1 in 600 small frames of yuv420p10le to p010le and back
    return frame.reformat(format=form, src_color_range=same, dst_color_range=same, threads=1)


def _rows(plane: VideoPlane, kind: type) -> np.ndarray:
    """[height, width] view of a plane's samples."""
    return np.frombuffer(cast(Any, plane), kind).reshape(plane.height, -1)[:, : plane.width]


def _planes(frame: av.VideoFrame) -> list[np.ndarray]:
    kind = np.uint16 if depth(frame.format) > 8 else np.uint8
    return [_rows(plane, kind) for plane in frame.planes]


def _frame(planes: list[np.ndarray], form: str) -> av.VideoFrame:
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, form)
    for plane, values in zip(frame.planes, planes, strict=True):
        _rows(plane, values.dtype.type)[:] = values
    return frame


def alpha_of(frame: av.VideoFrame) -> np.ndarray | None:
    """[H, W] opacity in the type of the frame's RGB; None if nothing shines through."""
    form = frame.format
    if not has_alpha(form):
        return None
    bits = depth(form)
    if re.fullmatch(r"(yuva4\d\dp|gbrap)(\d+le)?", form.name):
        alpha = _planes(frame)[3]
        if 8 < bits < 16:
            alpha = _quantized(torch.from_numpy(alpha).float() * (65535 / (2**bits - 1)), 65535)
    else:
        alpha = _repacked(frame, "rgba" if bits <= 8 else "rgba64le").to_ndarray()[..., 3]
    opaque = alpha.min() == (255 if alpha.dtype == np.uint8 else 65535)
    return None if opaque else alpha.copy()


def enlarge_alpha(alpha: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic enlargement of [H, W] uint8 or uint16."""
    top = np.iinfo(alpha.dtype).max
    values = torch.from_numpy(alpha).float()[None, None]
    large = F.interpolate(values, (height, width), mode="bicubic", align_corners=False)
    return _quantized(large[0, 0], top)
