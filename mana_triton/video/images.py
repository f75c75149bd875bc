"""Single pictures: 8 and 16 bits, transparency, orientation, metadata.

Pillow reads and writes 8 bits per channel. It would silently halve deeper pictures, whose pixels
FFmpeg reads and writes. Metadata that stay true of an enlarged picture are kept as `Tags`.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from PIL import Image, PngImagePlugin
from PIL.ExifTags import IFD, TAGS

from mana_triton.video.color import Color, alpha_of, to_rgb
from mana_triton.video.container import check_size

# Pillow's names of what is accepted, and FFmpeg's of those that can be deep. Pillow knows more
# formats by their content, some of which start programs
FORMATS = {"PNG": "png_pipe", "TIFF": "tiff_pipe", "JPEG": None, "WEBP": None, "BMP": None}

# "color profile", "EXIF", "XMP": bytes; "texts": by their names; "color tags": contents of PNG
# chunks by their kind; "resolution": dots per inch (x, y)
Tags = dict[str, Any]

# what Pillow raises for damaged files other than OSError
_DAMAGED = (
    SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error,
    zlib.error, ZeroDivisionError, AttributeError, MemoryError,
)  # fmt: skip
# EXIF that is about the content, not the file: texts, camera, author, times, rating, place
_KEPT_EXIF = {
    269, 270, 271, 272, 285, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096),
    IFD.Exif, IFD.GPSInfo,
}  # fmt: skip
# orientation, and compression, colors and layout of a TIFF file, which pass in another way
_FILE_EXIF = {*range(254, 342), 347, *range(512, 533), 559, 700, 34675, 50341}
_SIZE = (40962, 40963)  # the old one in pixels
_TURN = re.compile(rb"""(tiff:Orientation(?:\s*=\s*["']|>)\s*)[2-8]""")
_COLOR_CHUNKS = {b"gAMA": 4, b"cHRM": 32, b"cICP": 4, b"sRGB": 1}  # with their lengths
_LARGEST = PngImagePlugin.MAX_TEXT_CHUNK  # bytes of a profile or text that Pillow reads: 1 MiB


class Picture(NamedTuple):
    """A decoded picture: [H, W, 3] RGB and [H, W] alpha, uint8 or uint16, and metadata."""

    rgb: np.ndarray
    alpha: np.ndarray | None  # None if fully opaque
    tags: Tags


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """The picture; what Pillow raises for damaged files becomes an OSError."""
    try:
        with Image.open(file, formats=tuple(FORMATS)) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise OSError("the picture is too large; shrink it first") from error
    except _DAMAGED as error:
        raise OSError(f"it is damaged ({error})") from error


class PictureInfo(NamedTuple):
    """What a file holds: width and height as shown, and bits per channel, 8 or 16."""

    width: int
    height: int
    bits: int
    has_more: bool  # pictures than one


def inspect_picture(file: Path, limits: bool) -> PictureInfo:
    """What a file holds; with `limits`, refuses large pictures before it decodes pixels."""
    with _opened(file) as image:
        width, height = image.size
        if limits:
            check_size(file, width, height)
        bits = 16 if _is_deep(image) else 8
        if _orientation(image) >= 5 and image.format != "TIFF":  # Pillow has turned TIFF
            width, height = height, width
        return PictureInfo(width, height, bits, bool(getattr(image, "is_animated", False)))


def read_picture(file: Path, lost: Callable[[str], None] = lambda _: None) -> Picture:
    """A picture as shown; `lost` is told which metadata are left out."""
    with _opened(file) as image:
        is_deep, turn = _is_deep(image), _orientation(image)  # in this order: the latter loads
        if is_deep:
            # by its format, as a name like a%03d.png would be a pattern of other names
            with av.open(f"file:{file}", format=FORMATS[image.format or ""]) as container:
                frame = next(container.decode(video=0))
            rgb, alpha = to_rgb(frame, Color(full_range=True)), alpha_of(frame)
        else:
            rgb, alpha = _split(image)
            turn = 1 if image.format == "TIFF" else turn  # Pillow has turned it
        tags = _tags(image, file, lost)
    return Picture(_upright(rgb, turn), None if alpha is None else _upright(alpha, turn), tags)


def write_picture(
    file: Path, rgb: np.ndarray, alpha: np.ndarray | None = None, tags: Mapping[str, Any] = {}
) -> None:
    """A PNG with as many bits as the arrays."""
    pixels = rgb if alpha is None else np.dstack([rgb, alpha])
    is_deep = pixels.dtype != np.uint8
    info = PngImagePlugin.PngInfo()
    for kind, content in tags.get("color tags", {}).items():
        info.add(kind, content)
    for key, text in tags.get("texts", {}).items():
        info.add_text(key, text)
    if "XMP" in tags:
        info.add_itxt("XML:com.adobe.xmp", tags["XMP"].decode("utf-8", "replace"))
    data, image = (
        io.BytesIO(),
        Image.fromarray(pixels[:1, :1, :3].astype(np.uint8) if is_deep else pixels),
    )
    image.save(
        data, "png", compress_level=3, pnginfo=info, exif=tags.get("EXIF"),
        icc_profile=tags.get("color profile"), dpi=tags.get("resolution"),
    )  # fmt: skip
    png = data.getvalue()
    file.write_bytes(_deep_png(pixels, png if tags else b"") if is_deep else png)


def _deep_png(pixels: np.ndarray, tagged: bytes) -> bytes:
    """A PNG of 16 bits by FFmpeg, with the metadata of another PNG, which Pillow wrote."""
    frame = av.VideoFrame.from_ndarray(pixels, "rgb48be" if pixels.shape[2] == 3 else "rgba64be")
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, frame.format.name
    encoder.options = {"compression_level": "3", "pred": "up"}
    encoder.time_base = Fraction(1)
    png = b"".join(bytes(p) for p in (*encoder.encode(frame), *encoder.encode(None)))
    if not tagged:
        return png
    kept = [chunk for kind, chunk in _chunks(tagged) if kind not in (b"IHDR", b"IDAT", b"IEND")]
    body = [chunk for kind, chunk in _chunks(png) if kind in (b"IDAT", b"IEND")]
    return png[:33] + b"".join([*kept, *body])  # 33: signature and header


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The chunks of a PNG file, each with its kind."""
    at = 8
    while at + 12 <= len(png):
        end = at + 12 + int.from_bytes(png[at : at + 4])
        yield png[at + 4 : at + 8], png[at:end]
        at = end


def _tags(image: Image.Image, file: Path, lost: Callable[[str], None]) -> Tags:
    """What is still true of the picture when it stands upright and is enlarged."""
    tags, unkept = Tags(), []
    profile = image.info.get("icc_profile") or b""
    if len(profile) > _LARGEST:
        lost(f"color profiles of more than {_LARGEST >> 20} MiB are left out")
    elif profile[16:20] == b"RGB " and profile[36:40] == b"acsp":
        tags["color profile"] = profile
    elif profile:
        lost("a color profile is left out: it is damaged, or not one of RGB")
    try:
        exif = image.getexif()
        unkept += [TAGS.get(x, f"tag {x}") for x in sorted(set(exif) - _KEPT_EXIF - _FILE_EXIF)]
        if kept := _kept_exif(exif):
            tags["EXIF"] = kept
    except _DAMAGED:
        lost("EXIF is damaged and left out")
    if isinstance(xmp := image.info.get("xmp"), bytes):
        tags["XMP"] = _TURN.sub(rb"\g<1>1", xmp)
    texts = dict(getattr(image, "text", {}))  # of PNG
    if isinstance(comment := image.info.get("comment"), bytes) and len(comment) < _LARGEST:
        texts["Comment"] = comment.replace(b"\0", b"").decode("latin-1")
    raw = [key for key in texts if key.startswith("Raw profile type ")]  # of ImageMagick
    unkept += [key.lower() for key in raw if key != "Raw profile type exif"]  # Pillow reads that
    if texts := {key: texts[key] for key in texts if key not in (*raw, "XML:com.adobe.xmp")}:
        tags["texts"] = texts
    unkept += [kind.decode("latin-1") for kind, *_ in getattr(image, "private_chunks", ())]
    unkept += ["IPTC"] * ("photoshop" in image.info)
    if image.format == "PNG" and (chunks := _color_chunks(file)):
        tags["color tags"] = chunks
    dpi = image.info.get("dpi", (0, 0))
    if min(dpi) > 1 and max(dpi) < 10**6:
        tags["resolution"] = tuple(map(float, dpi))
    if unkept:
        lost(f"metadata of pictures not kept: {', '.join(dict.fromkeys(unkept))}")
    return tags


def _color_chunks(file: Path) -> dict[bytes, bytes]:
    """The contents of a PNG file's chunks about colors, which Pillow does not keep in full."""
    chunks = dict(_chunks(file.read_bytes()))
    return {
        k: chunks[k][8:-4] for k, n in _COLOR_CHUNKS.items() if len(chunks.get(k, b"")) == n + 12
    }


def _kept_exif(exif: Image.Exif) -> bytes:
    for tag in [tag for tag in exif if tag not in _KEPT_EXIF]:
        del exif[tag]
    if camera := exif.get_ifd(IFD.Exif):
        exif[IFD.Exif] = {tag: value for tag, value in camera.items() if tag not in _SIZE}
    return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else b""


def _split(image: Image.Image) -> tuple[np.ndarray, np.ndarray | None]:
    """RGB and alpha, None if fully opaque."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image), None
    pixels = np.array(image.convert("RGBA"))
    alpha = pixels[..., 3]
    return pixels[..., :3].copy(), None if alpha.min() == 255 else alpha.copy()


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits per channel, which the mode alone does not tell."""
    if image.mode == "F":
        raise OSError("its samples are floating-point numbers; convert it to 16 bits first")
    # BMP has 16 bits for three channels; JPEG with several pictures is called MPO
    if not FORMATS.get(image.format or ""):
        return False
    return image.mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", ""))


def _orientation(image: Image.Image) -> int:
    """EXIF's orientation, 1 to 8; 1 (upright) where it is damaged."""
    try:
        turn = image.getexif().get(0x0112, 1)
    except _DAMAGED:  # the picture itself need not be
        return 1
    return turn if turn in range(1, 9) else 1


def _upright(pixels: np.ndarray, turn: int) -> np.ndarray:
    if turn >= 5:
        pixels = pixels.swapaxes(0, 1)
    if turn in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if turn in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
