"""Single pictures and animations: 8 and 16 bits, transparency, orientation.

Pillow reads what has 8 bits per channel. It would silently halve deeper pictures, which FFmpeg
reads and writes. Color profile, EXIF, XMP, texts, resolution and PNG's own tags of colors pass
through, as bytes.
"""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, PngImagePlugin
from PIL.ExifTags import IFD, TAGS

from mana_triton.video.color import alpha_of, to_rgb
from mana_triton.video.yuv import Color

# Pillow's names of what is accepted, and FFmpeg's of those that can be deep. Pillow knows more
# formats by their content, some of which start programs
FORMATS = {"PNG": "png_pipe", "TIFF": "tiff_pipe", "JPEG": None, "WEBP": None, "BMP": None}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp")

Picture = tuple[np.ndarray, np.ndarray | None]  # [H, W, 3] RGB and [H, W] alpha, as in color.py
# "color profile", "EXIF", "XMP" as they are, "texts", "color tags", "resolution" as PNG's chunks
Tags = dict[str, bytes]

# what Pillow raises for damaged files, beside OSError
_DAMAGED = (
    SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error,
    zlib.error, ZeroDivisionError, AttributeError,
)  # fmt: skip
# the part of EXIF that is not about the file: texts, camera, author, times, rating, place
_LASTING = {
    269, 270, 271, 272, 285, 305, 306, 315, 316, 18246, 18249, 33432, *range(40091, 40096),
    IFD.Exif, IFD.GPSInfo,
}  # fmt: skip
# and the part that is about the file alone, or passes in another way: layout, compression, colors
_OF_THE_FILE = {
    *range(254, 267), 273, 274, *range(277, 285), *range(288, 294), 296, 297, 301, *range(317, 333),
    338, 339, 340, 341, 347, *range(512, 533), 559, 700, 33723, 34377, 34665, 34675, 34853, 50341,
}  # fmt: skip
_SIZE = (40962, 40963)  # in pixels, as it was
_TURN = re.compile(rb"""(tiff:Orientation(?:\s*=\s*["']|>)\s*)[2-8]""")
_PNG_HEAD = 33  # bytes of a PNG file before the place of its tags
_COLOR_TAGS = {b"gAMA": 4, b"cHRM": 32, b"cICP": 4, b"sRGB": 1}  # and their bytes
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_RAW = re.compile(rb"Raw profile type ((?!exif\0)[^\0]*)\0")  # as ImageMagick writes them
# what else a PNG file may have that is of no use later, or passes in another way
_PASSED = {b"tRNS", b"bKGD", b"sBIT", b"hIST", b"tIME", b"eXIf", b"acTL", b"fcTL", b"fdAT"}
_MOST = PngImagePlugin.MAX_TEXT_CHUNK  # bytes of a profile or a text that Pillow reads: 1 MiB
_UNREAD = "left out"  # in the info of a picture that was opened without profile and texts


class _File(io.BufferedReader):
    """A file that may be asked for more than it has, as damaged ones do, without reserving it."""

    def __init__(self, file: Path):
        super().__init__(io.FileIO(file))
        self._size = file.stat().st_size

    def read(self, size: int | None = -1, /) -> bytes:
        left = max(self._size - self.tell(), 0)
        return super().read(left if size is None or size < 0 else min(size, left))


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    """The picture; what Pillow raises for damaged files becomes an OSError."""
    try:
        with _File(file) as content, _open(content) as image:
            yield image
    except Image.DecompressionBombError as error:
        raise OSError("the picture is too large; shrink it first") from error
    except _DAMAGED as error:
        raise OSError("it is damaged") from error


def _open(content: _File) -> Image.Image:
    """The picture, without profile and texts where they are too large for Pillow."""
    try:
        return Image.open(content, formats=tuple(FORMATS))
    except ValueError as error:
        if "MAX_TEXT_" not in str(error):
            raise
    content.seek(0)
    data = content.read()
    chunks = (_chunk(*x) for x in _chunks(data) if x[0] not in (b"iCCP", *_TEXTS))
    image = Image.open(io.BytesIO(data[:8] + b"".join(chunks)), formats=["PNG"])
    image.info[_UNREAD] = True
    return image


def _chunks(png: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the parts of a PNG file, up to where it is damaged."""
    at = 8
    while at + 12 <= len(png):
        (length,) = struct.unpack_from(">I", png, at)
        if at + 12 + length > len(png):
            return
        yield png[at + 4 : at + 8], png[at + 8 : at + 8 + length]
        at += 12 + length


def _chunk(kind: bytes, content: bytes) -> bytes:
    body = kind + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def coded_size(file: Path) -> tuple[int, int]:
    """Width and height as stored, without a look at the pixels."""
    with _opened(file) as image:
        return image.size


def picture_size(file: Path) -> tuple[int, int]:
    """Width and height as shown."""
    with _opened(file) as image:
        width, height = image.size
        turned = _orientation(image) >= 5 and image.format != "TIFF"  # which Pillow has done
        return (height, width) if turned else (width, height)


def picture_bits(file: Path) -> int:
    """8 or 16 bits per channel."""
    with _opened(file) as image:
        if image.mode == "F":
            raise OSError("its samples are floating-point numbers; convert it to 16 bits first")
        return 16 if _is_deep(image) else 8


def has_more(file: Path) -> bool:
    """Whether there is more than one picture in the file."""
    with _opened(file) as image:
        return bool(getattr(image, "is_animated", False))


def picture_tags(file: Path, lost: Callable[[str], None]) -> Tags:
    """What else is in the file; `lost` is told what is left out."""
    with _opened(file) as image:
        return _tags(image, file, lost)


def read_picture(
    file: Path, lost: Callable[[str], None] = lambda _: None
) -> tuple[np.ndarray, np.ndarray | None, Tags]:
    """RGB, uint8 or uint16, the opacity if there is any transparency, and what else is in the file.

    `lost` is told what is left out.
    """
    with _opened(file) as image:
        deep, turn = _is_deep(image), _orientation(image)  # in this order: the latter loads
        if deep:
            # by its kind, as a name like a%03d.png would be a pattern of other names
            with av.open(f"file:{file}", format=FORMATS[image.format or ""]) as container:
                frame = next(container.decode(video=0))
            rgb, alpha = to_rgb(frame, Color(full_range=True)), alpha_of(frame)
        else:
            rgb, alpha = _split(image)
            turn = 1 if image.format == "TIFF" else turn  # which Pillow has turned
        tags = _tags(image, file, lost)
    return _upright(rgb, turn), None if alpha is None else _upright(alpha, turn), tags


def _tags(image: Image.Image, file: Path, lost: Callable[[str], None]) -> Tags:
    """What is still true of the picture when it stands upright and is enlarged."""
    tags = {}
    profile = image.info.get("icc_profile") or b""
    if image.info.get(_UNREAD) or len(profile) > _MOST:
        lost(f"color profiles and texts of more than {_MOST >> 20} MiB are left out")
        profile = b""
    if profile[16:20] == b"RGB " and profile[36:40] == b"acsp":
        tags["color profile"] = profile
    elif profile:
        lost("a color profile is left out: it is damaged, or not one of RGB")
    unkept = []
    try:
        exif = image.getexif()
        others = sorted(set(exif) - _LASTING - _OF_THE_FILE)
        unkept += [TAGS.get(tag, f"tag {tag}") for tag in others]
        if lasting := _lasting(exif):
            tags["EXIF"] = lasting
    except _DAMAGED:
        lost("EXIF is damaged and left out")
    if isinstance(xmp := image.info.get("xmp"), bytes):
        tags["XMP"] = _TURN.sub(rb"\g<1>1", xmp)
    if image.format == "PNG" and not image.info.get(_UNREAD):
        unkept += _png_tags(file.read_bytes(), tags)
    elif image.format != "PNG":
        unkept += ["IPTC"] * bool(_has_iptc(image))
        if isinstance(comment := image.info.get("comment"), bytes) and len(comment) < _MOST:
            tags["texts"] = _chunk(b"tEXt", b"Comment\0" + comment.replace(b"\0", b""))
        x, y = image.info.get("dpi", (1, 1))
        if min(x, y) > 1 and max(x, y) < 10**6:
            meters = round(float(x) / 0.0254), round(float(y) / 0.0254), 1
            tags["resolution"] = _chunk(b"pHYs", struct.pack(">IIB", *meters))
    if unkept:
        lost(f"metadata of pictures not kept: {', '.join(unkept)}")
    return tags


def _png_tags(png: bytes, tags: Tags) -> list[str]:
    """Add what stands in a PNG file as it is to stand in the next; returns what is left out."""
    unkept, texts, of_colors = [], b"", b""
    for kind, content in _chunks(png):
        if kind in _TEXTS and not content.startswith(
            (b"XML:com.adobe.xmp\0", b"Raw profile type ")
        ):
            texts += _chunk(kind, content)
        elif kind in _TEXTS and (raw := _RAW.match(content)):
            unkept.append({b"iptc": "IPTC"}.get(raw[1], f"raw profile {raw[1].decode('latin-1')}"))
        elif _COLOR_TAGS.get(kind) == len(content):
            of_colors += _chunk(kind, content)
        elif kind == b"pHYs" and len(content) == 9:
            tags["resolution"] = _chunk(kind, content)
        elif kind[:1].islower() and kind not in {*_PASSED, b"iCCP", *_TEXTS}:
            unkept.append(kind.decode("latin-1"))
    tags |= {name: x for name, x in (("texts", texts), ("color tags", of_colors)) if x}
    return list(dict.fromkeys(unkept))


def _has_iptc(image: Image.Image) -> bool:
    tiff = getattr(image, "tag_v2", {})
    return "photoshop" in image.info or bool({33723, 34377} & set(tiff))


def _lasting(exif: Image.Exif) -> bytes:
    for tag in [tag for tag in exif if tag not in _LASTING]:
        del exif[tag]
    if camera := exif.get_ifd(IFD.Exif):
        exif[IFD.Exif] = {tag: value for tag, value in camera.items() if tag not in _SIZE}
    return exif.tobytes().removeprefix(b"Exif\0\0") if len(exif) else b""


def write_picture(
    file: Path, rgb: np.ndarray, alpha: np.ndarray | None = None, tags: Mapping[str, bytes] = {}
) -> None:
    """A PNG with as many bits as the arrays."""
    data, chunks = _png(rgb if alpha is None else np.dstack([rgb, alpha])), b""
    for kind, head, name in (
        (b"iCCP", b"ICC Profile\0\0", "color profile"),
        (b"eXIf", b"", "EXIF"),
        (b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0", "XMP"),
    ):
        if name in tags:
            content = zlib.compress(tags[name]) if kind == b"iCCP" else tags[name]
            chunks += _chunk(kind, head + content)
    chunks += b"".join(tags.get(name, b"") for name in ("color tags", "resolution", "texts"))
    pixels = data[_PNG_HEAD:]
    if "resolution" in tags:  # FFmpeg writes one of its own
        pixels = b"".join(_chunk(*x) for x in _chunks(data) if x[0] not in (b"IHDR", b"pHYs"))
    file.write_bytes(data[:_PNG_HEAD] + chunks + pixels)


def _png(pixels: np.ndarray) -> bytes:
    if pixels.dtype == np.uint8:
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "png", compress_level=3)
        return data.getvalue()
    frame = av.VideoFrame.from_ndarray(pixels, "rgb48be" if pixels.shape[2] == 3 else "rgba64be")
    encoder = av.CodecContext.create("png", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frame.width, frame.height, frame.format.name
    encoder.options = {"compression_level": "3", "pred": "up"}
    encoder.time_base = Fraction(1)
    return b"".join(bytes(p) for p in (*encoder.encode(frame), *encoder.encode(None)))


def read_animation(
    file: Path, lost: Callable[[str], None]
) -> Iterator[tuple[np.ndarray, np.ndarray | None, int, Tags]]:
    """The pictures of an animation, how many milliseconds each is shown, and what else there is."""
    with _opened(file) as image:
        tags = _tags(image, file, lost)
        for number in range(getattr(image, "n_frames", 1)):
            image.seek(number)
            rgb, alpha = _split(image)
            yield rgb, alpha, int(image.info.get("duration", 0)), tags


def _split(image: Image.Image) -> Picture:
    if image.mode == "RGB" and "transparency" not in image.info:
        return np.array(image), None
    pixels = np.array(image.convert("RGBA"))
    alpha = pixels[..., 3]
    return pixels[..., :3].copy(), None if alpha.min() == 255 else alpha.copy()


def _is_deep(image: Image.Image) -> bool:
    """More than 8 bits per channel, which the mode alone does not tell."""
    # BMP has 16 bits for three channels; JPEG with several pictures is called MPO
    if not FORMATS.get(image.format or ""):
        return False
    return image.mode.startswith(("I", "F")) or ";16" in str(getattr(image, "tile", ""))


def _orientation(image: Image.Image) -> int:
    """How the camera was held, 1 to 8 as in EXIF; upright where that is damaged."""
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
