"""What a video says of its colors: matrix, range, chroma location and HDR10 metadata."""

import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorRange

from mana_triton.video.color import MATRICES, SITINGS, Color
from mana_triton.video.container import description
from mana_triton.video.frame import MediaError, Notes

_UNSPECIFIED = 2  # in H.273


class ColorTags(NamedTuple):
    """H.273 codes of a frame, and whether its range is full; None if it does not say."""

    matrix: int
    full_range: bool | None
    primaries: int
    transfer: int


def color_tags(frame: av.VideoFrame) -> ColorTags:
    """What a frame says of its colors."""
    full = frame.color_range == ColorRange.JPEG
    if frame.color_range == ColorRange.UNSPECIFIED:
        full = True if frame.format.name.startswith("yuvj") else None
    return ColorTags(frame.colorspace, full, frame.color_primaries, frame.color_trc)


def color_of_stream(path: Path, first: av.VideoFrame, siting: str, notes: Notes) -> Color:
    """The colors of a stream with this first frame; guessed by size if it does not say.

    Raises:
        MediaError: the matrix is unknown.
    """
    matrix, full, primaries, transfer = color_tags(first)
    is_gray = first.format.name.startswith("gray")
    if is_gray or first.format.is_rgb or first.format.has_palette:
        primaries, transfer = (1 if x == _UNSPECIFIED else x for x in (primaries, transfer))
        return Color(9 if primaries == 9 else 1, bool(full) and is_gray, primaries, transfer)
    if matrix == _UNSPECIFIED:  # as players guess
        code = 1 if first.height >= 720 else 6
        guess = Color(code, bool(full), code, code, guessed=True, siting=siting)
        notes.add(f"the file does not say which colors it uses; taken as {guess.name}")
        return guess
    if matrix not in MATRICES:
        raise MediaError(
            f"{path}: color matrix {matrix} is not supported; convert it to BT.709 first"
        )
    return Color(matrix, bool(full), primaries, transfer, siting=siting)


def color_of_frame(frame: av.VideoFrame, first: ColorTags, color: Color, notes: Notes) -> Color:
    """The colors of a frame: those of its stream, unless it says another matrix or range."""
    if (tags := color_tags(frame)) == first:
        return color
    known = (0, _UNSPECIFIED)  # 0 is reserved
    codes = zip(tags[2:], (color.primaries, color.transfer), strict=True)
    if any(code not in known and code != before for code, before in codes):
        notes.add(
            "primaries or transfer of the colors change: the codes are kept, and the output has"
            " the tags of its first frame; enlarge the parts one by one (--start, --end)"
        )
    matrix = tags.matrix if tags.matrix in MATRICES else color.matrix
    if tags.matrix not in (*known, matrix) and not frame.format.is_rgb:
        notes.add(f"color matrix {tags.matrix} midway is not supported; taken as {color.name}")
    full = color.full_range if tags.full_range is None else tags.full_range
    own = replace(color, matrix=matrix, full_range=full)
    if (own.name, full) != (color.name, color.full_range):
        notes.add("matrix or range of the colors change; each frame is decoded by its own")
    return own


def chroma_siting(container: InputContainer, stream: int, form: str) -> str:
    """Where chroma lies in a stream of this pixel format, one of SITINGS."""
    line = re.search(rf"Stream #0:{stream}\b.*Video: .*", description(container))
    names = "|".join(sorted(SITINGS, key=len, reverse=True))
    found = re.search(rf"{form}\([^)]*\b({names})\)", line[0]) if line else None
    return found[1] if found else "left"


def mastering_display(data: bytes) -> dict[str, tuple[Fraction, ...]] | None:
    """Primaries and white point (x, y) and luminance (high, low in cd/m2) of side data."""
    if len(data) < 88:
        return None
    *ratios, has_primaries, has_luminance = np.frombuffer(data[:88], np.int32).tolist()
    if not (has_primaries and has_luminance and all(ratios[1::2])):
        return None
    values = [Fraction(a, b) for a, b in zip(ratios[::2], ratios[1::2], strict=True)]
    red, green, blue, white, (low, high) = zip(values[::2], values[1::2], strict=True)
    return {"G": green, "B": blue, "R": red, "WP": white, "L": (high, low)}


def light_level(data: bytes) -> tuple[int, int] | None:
    """Brightest pixel and brightest mean of a frame (MaxCLL, MaxFALL), cd/m2, of side data."""
    if len(data) < 8:
        return None
    brightest, mean = np.frombuffer(data[:8], np.uint32).tolist()
    return brightest, mean
