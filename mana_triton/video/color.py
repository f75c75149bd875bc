"""Video frames of FFmpeg's formats to RGB and back, by what yuv.py computes.

RGB is full range, uint8 or uint16 (0 .. 65535) for frames of more than 8 bits.
"""

import re
from collections.abc import Sequence
from typing import Any, cast

import av
import numpy as np
import torch
import torch.nn.functional as F
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange
from torch import Tensor

from mana_triton.video.yuv import Color, quantized, rgb_to_yuv, yuv_to_rgb

# width and height of a block of pixels with one chroma sample -> what formats call it
_SUBSAMPLINGS = {
    (1, 1): "444", (2, 1): "422", (2, 2): "420", (4, 1): "411", (4, 4): "410", (1, 2): "440",
}  # fmt: skip
_PLANAR = re.compile(r"(yuvj?|yuva)4\d\dp(\d+le)?|gray(\d+le)?")


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
        return quantized(torch.stack([r, g, b], -1).mul_(65535 / top), 65535).numpy()
    if not _PLANAR.fullmatch(form.name) or any(plane.line_size <= 0 for plane in frame.planes):
        frame = _repacked(frame, planar(form))
    planes = [torch.from_numpy(plane) for plane in _planes(frame)[:3]]
    return yuv_to_rgb(planes, depth(frame.format), color, block(frame.format.name)).numpy()


def with_bits(values: np.ndarray, bits: int) -> np.ndarray:
    """Values of 8 or 16 bits, as uint8 if there are to be 8, else as uint16."""
    if (values.dtype == np.uint8) == (bits <= 8):
        return values
    return (values / 257).round().astype(np.uint8) if bits <= 8 else values.astype(np.uint16) * 257


def from_rgb(rgb: np.ndarray, form: str, color: Color, full_range: bool) -> av.VideoFrame:
    """A frame in any format of [H, W, 3] uint8 or uint16 RGB."""
    planes = planes_of(torch.from_numpy(rgb), form, color, full_range)
    return from_planes([plane.numpy() for plane in planes], form)


def planes_of(rgb: Tensor, form: str, color: Color, full_range: bool) -> list[Tensor]:
    """What `from_planes` makes a frame of: planes of [H, W, 3] uint8 or uint16 RGB, on its device.

    These are Y, Cb and Cr, or Y alone; for a format of RGB green, blue and red, or `rgb` itself
    if both have 8 bits.
    """
    target = av.VideoFormat(form)
    bits = depth(target)
    if not _is_rgb(target):
        name = _planar_on_the_way_to(target)
        gray = name.startswith("gray")
        return rgb_to_yuv(rgb, bits, color, full_range, block(name), gray=gray)
    if rgb.dtype == torch.uint8 and bits <= 8:
        return [rgb]
    white, top = 255 if rgb.dtype == torch.uint8 else 65535, 2 ** min(max(bits, 8), 16) - 1
    red, green, blue = quantized(rgb.float().mul_(top / white), top).unbind(-1)
    return [green, blue, red]


def from_planes(planes: Sequence[np.ndarray], form: str) -> av.VideoFrame:
    """A frame in any format of the planes that `planes_of` gives for it."""
    target = av.VideoFormat(form)
    if planes[0].ndim == 3:
        pixels = np.ascontiguousarray(planes[0])
        return _repacked(av.VideoFrame.from_ndarray(pixels, "rgb24"), form)
    bits = min(max(depth(target), 8), 16)
    rgb = "gbrp" if bits == 8 else f"gbrp{bits}le"
    name = rgb if _is_rgb(target) else _planar_on_the_way_to(target)
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, name)
    for plane, values in zip(frame.planes, planes, strict=True):
        _rows(plane, values.dtype.type)[:] = values
    return _repacked(frame, form)


def _is_rgb(form: av.VideoFormat) -> bool:
    return form.is_rgb or form.has_palette


def _planar_on_the_way_to(form: av.VideoFormat) -> str:
    is_planar = _PLANAR.fullmatch(form.name) and not form.name.startswith("yuva")
    return form.name if is_planar else planar(form)


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


def alpha_of(frame: av.VideoFrame) -> np.ndarray | None:
    """[H, W] opacity in the type of the frame's RGB; None if nothing shines through."""
    form = frame.format
    if not has_alpha(form):
        return None
    bits = depth(form)
    if re.fullmatch(r"(yuva4\d\dp|gbrap)(\d+le)?", form.name):
        alpha = _planes(frame)[3]
        if 8 < bits < 16:
            top = 2**bits - 1
            alpha = quantized(torch.from_numpy(alpha).float() * (65535 / top), 65535).numpy()
    else:
        alpha = _repacked(frame, "rgba" if bits <= 8 else "rgba64le").to_ndarray()[..., 3]
    opaque = alpha.min() == (255 if alpha.dtype == np.uint8 else 65535)
    return None if opaque else alpha.copy()


def enlarge_alpha(alpha: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bicubic enlargement of [H, W] uint8 or uint16."""
    top = np.iinfo(alpha.dtype).max
    values = torch.from_numpy(alpha).float()[None, None]
    large = F.interpolate(values, (height, width), mode="bicubic", align_corners=False)
    return quantized(large[0, 0], top).numpy()
