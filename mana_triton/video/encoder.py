"""Encoding pictures to packets: encoder, pixel format and options."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import torch
from av.codec.codec import UnknownCodecError, find_best_pix_fmt_of_list
from av.error import FFmpegError
from av.video.reformatter import ColorRange

from mana_triton.video import color as colors
from mana_triton.video.container import TS_CODECS
from mana_triton.video.frame import MP4_LIKE, Frame, MediaError, Notes, Timed, reason
from mana_triton.video.reader import Reader

Pixels = np.ndarray | Sequence[np.ndarray]  # RGB, or the planes that are encoded

ENCODERS = ("libx264", "libx265", "libsvtav1", "libvpx-vp9", "ffv1", "prores_ks", "h264_nvenc")

ENCODER_MEMORY = 256 * 2**20  # bytes of waiting frames that x264 or x265 may hold
# frames that they look ahead by preset; slower ones than these look further than medium
_LOOKAHEAD = {
    "libx264": {"ultrafast": 0, "superfast": 0, "veryfast": 10, "faster": 20, "fast": 30},
    "libx265": {"ultrafast": 5, "superfast": 10, "veryfast": 15, "faster": 15, "fast": 15},
}
# x264's AVX-512 functions give other packets from run to run (13 kinds in 200 runs over the same
# six frames, with one thread as with four); with these instructions it never did
_REPEATABLE = "asm=MMX2,SSE2,SSSE3,SSE4.2,LZCNT,AVX,FMA3,BMI1,BMI2,AVX2"
# of HDR10 metadata: option of the encoder, names of display and light level in it
_HDR_WORDS = {
    "libx265": ("x265-params", "master-display", "max-cll"),
    "libx264": ("x264-params", "mastering-display", "cll"),
    "libsvtav1": ("svtav1-params", "mastering-display", "content-light"),
}
# units of a coordinate of the primaries, and of a cd/m2; svtav1 takes them as they are
_HDR_UNITS = {"G": 50000, "B": 50000, "R": 50000, "WP": 50000, "L": 10000}


@dataclass(frozen=True)
class EncodeOptions:
    """How a video is encoded.

    Attributes:
        codec: FFmpeg encoder.
        crf: constant quality, for encoders that have it; None for their default.
        options: further options as (key, value) pairs; "pix_fmt" overrides `pix_fmt`.
        lossless: keep every bit of the pictures, by what the encoder has for that.
        pix_fmt: pixel format; None for 4:2:0 with the input's bits, or what is closest to it.
    """

    codec: str = "libx264"
    crf: float | None = 18.0
    options: tuple[tuple[str, str], ...] = ()
    lossless: bool = False
    pix_fmt: str | None = None


@dataclass(frozen=True)
class _Lossless:
    """What makes an encoder lossless: pixel format for 8 bits, for more (None: not), options."""

    form: str
    deep_form: str | None = None
    options: dict[str, str] = field(default_factory=dict)


_LOSSLESS = {
    "libx264": _Lossless("rgb24", "yuv444p10le", {"qp": "0"}),  # 8 bits by libx264rgb
    "libx265": _Lossless("gbrp", "gbrp{bits}le", {"x265-params": "lossless=1"}),
    "libvpx-vp9": _Lossless("gbrp", None, {"lossless": "1"}),
    "ffv1": _Lossless("bgr0", "gbrp{bits}le"),
    "h264_nvenc": _Lossless("yuv444p", None, {"tune": "lossless"}),
    "hevc_nvenc": _Lossless("yuv444p", "yuv444p16le", {"tune": "lossless"}),
}


def repeatable(params: str = "") -> str:
    """These "x264-params" with what makes equal pictures equal packets on this machine."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "asm=" in params:
        return params
    return ":".join(filter(None, (_REPEATABLE, params)))


class VideoEncoder:
    """Turns pictures into the packets of one video stream, which starts with a key frame.

    Args:
        path, reader, width, height: as of VideoWriter.
        container: gets the stream; no packet is written into it here.
        options: of the encoder.
        after: `tick` of the encoder of the frames before the first one here, -1 if there are none.

    Attributes:
        stream: of the container.
        headers: what the encoder writes about its stream apart from the packets.
        time_base: of the packets' times, in seconds.
        offset: of the reader, which is subtracted from all times, in seconds.
        planes: makes of a picture [height, width, 3] RGB, uint8 or uint16 on any device, the
            planes that are encoded, see `color.planes_of`.
        tick: time of the last frame of an avi, whose frames must not share one.
        notes: lines the user should see.
    """

    def __init__(
        self,
        path: Path,
        reader: Reader,
        width: int,
        height: int,
        container: Any,
        options: EncodeOptions = EncodeOptions(),
        *,
        after: int = -1,
    ):
        self.path, self._suffix, self.notes = path, path.suffix.lower(), Notes()
        self.width, self.height, self._reader, self._container = width, height, reader, container
        self.time_base = 1 / reader.rate if self._suffix == ".avi" else reader.time_base
        self.offset, self.tick = reader.offset, after
        self._durations: dict[int, int] = {}  # by pts, of the frames the encoder holds
        codec, crf, given = options.codec, options.crf, dict(options.options)
        form = given.pop("pix_fmt", options.pix_fmt)
        if options.lossless:
            crf = None
            codec, given, form = self._lossless(codec, given, form)
        self.stream = self._add_stream(codec, crf, given, form)
        self.headers = bytes(self.stream.codec_context.extradata or b"")

    def _add_stream(
        self, codec: str, crf: float | None, options: dict[str, str], form: str | None
    ) -> av.VideoStream:
        try:
            encoder = av.Codec(codec, "w")
            if encoder.type != "video":
                raise UnknownCodecError(codec)
            if self._suffix == ".ts" and not TS_CODECS.fullmatch(encoder.canonical_name):
                raise ValueError(codec)
            stream = cast(av.VideoStream, self._container.add_stream(codec, self._reader.rate))
        except UnknownCodecError as error:
            known = ", ".join(name for name in ENCODERS if name in av.codecs_available)
            raise MediaError(f"unknown video encoder '{codec}'; use for example {known}") from error
        except ValueError as error:
            raise MediaError(
                f"{self.path}: '{self._suffix}' files cannot hold {codec} video;"
                " choose another --codec or write a .mkv file"
            ) from error
        self._choose_format(encoder, form)
        color, context = self._reader.color, stream.codec_context
        context.width, context.height, context.pix_fmt = self.width, self.height, self._format.name
        context.time_base = stream.time_base = self.time_base
        context.colorspace = 0 if self._format.is_rgb else color.matrix
        context.color_range = self._range
        context.color_primaries, context.color_trc = color.primaries, color.transfer
        if aspect := self._reader.sample_aspect_ratio:
            context.sample_aspect_ratio = aspect
            # PyAV cannot tell it to Matroska, and these codecs have no place for it
            has_no_place = codec in ("libvpx-vp9", "libsvtav1", "prores_ks")
            if aspect != 1 and has_no_place and self._suffix in (".mkv", ".webm"):
                self.notes.add(f"pixel aspect {aspect} is left out: choose another --codec")
        if encoder.canonical_name == "hevc" and self._suffix in MP4_LIKE:
            context.codec_tag = "hvc1"  # Apple's players refuse the default, hev1
        if self._suffix == ".avi":
            context.max_b_frames = 0  # avi has no presentation times to order them by
        self._open(context, crf, options | self._hdr_options(codec, options))
        return stream

    def _lossless(
        self, codec: str, options: dict[str, str], form: str | None
    ) -> tuple[str, dict[str, str], str]:
        """Encoder, options and pixel format that lose nothing."""
        if codec not in _LOSSLESS:
            known = ", ".join(_LOSSLESS)
            raise MediaError(f"{codec} cannot be lossless in full color; use one of {known}")
        how, bits = _LOSSLESS[codec], self._reader.bits
        default = how.form if bits <= 8 else how.deep_form
        if default is None:
            raise MediaError(f"{codec} has 8 bits and the input has {bits}; use libx265 or ffv1")
        # the even number of bits that holds them, or the most that there are
        even = min(-(-bits // 2) * 2, 12 if codec == "libx265" else 16)
        form = form or default.format(bits=even)
        if form.startswith("yuv"):
            self.notes.add(f"{form} rounds the colors once, before the encoder")
        encoder = "libx264rgb" if codec == "libx264" and bits <= 8 else codec
        return encoder, how.options | options, form

    def _hdr_options(self, codec: str, options: dict[str, str]) -> dict[str, str]:
        """HDR10 metadata as options of the encoders that take it."""
        display, light = self._reader.mastering, self._reader.light_level
        if not (display or light):
            return {}
        if codec not in _HDR_WORDS:
            self.notes.add(f"HDR10 mastering metadata is left out: {codec} cannot take it here")
            return {}
        key, display_word, light_word = _HDR_WORDS[codec]
        parts = [options.get(key, "")]
        if display:
            units = dict.fromkeys(display, 1) if codec == "libsvtav1" else _HDR_UNITS
            values = {
                name: ",".join(f"{float(value * units[name]):.10g}" for value in pair)
                for name, pair in display.items()
            }
            parts.append(f"{display_word}=" + "".join(f"{k}({v})" for k, v in values.items()))
        if light:
            parts.append(f"{light_word}={light[0]},{light[1]}")
        self.notes.add("HDR10 mastering metadata is in the video stream, not in the container")
        return {key: ":".join(filter(None, parts))}

    def _choose_format(self, encoder: av.Codec, wanted: str | None) -> None:
        offered = [form.name for form in encoder.video_formats or ()]
        bits = self._reader.bits
        if wanted is None:
            wanted = _closest(offered, bits)
            if (written := colors.bit_depth(av.VideoFormat(wanted))) < bits:
                self.notes.add(f"{encoder.name} writes {written} of the input's {bits} bits")
        elif wanted not in (offered or [wanted]):
            known = " ".join(offered)
            raise MediaError(f"{encoder.name} cannot write pix_fmt '{wanted}'; use one of {known}")
        try:
            self._format = av.VideoFormat(wanted, self.width, self.height)
        except ValueError as error:
            raise MediaError(f"there is no pix_fmt '{wanted}'; use for example yuv420p") from error
        full = self._reader.color.full_range or self._format.is_rgb or wanted.startswith("yuvj")
        self._range = ColorRange.JPEG if full else ColorRange.MPEG
        self.planes = partial(
            colors.planes_of, form=wanted, color=self._reader.color, full_range=full
        )

    def _open(
        self, context: av.VideoCodecContext, crf: float | None, options: dict[str, str]
    ) -> None:
        codec = context.codec
        if crf is not None and "qp" not in options:
            if "crf" in {option.name for option in context.supported_options.private}:
                options = {"crf": f"{crf:g}"} | options
            elif codec.lossy:
                self.notes.add(f"{codec.name} has no crf; it encodes at its default quality")
        given = " ".join(f"{key}={value}" for key, value in options.items())
        context.options = self._bounded(context, options)
        try:
            context.open()
        except FFmpegError as error:
            raise MediaError(
                f"{codec.name} refuses {self.width}x{self.height} {self._format.name}"
                f" {given}: {reason(error)}; choose other options or another --codec"
            ) from error
        if unused := ", ".join(context.options):
            raise MediaError(
                f"{codec.name} has no option {unused}; see ffmpeg -h encoder={codec.name}"
            )

    def _bounded(self, context: av.VideoCodecContext, options: dict[str, str]) -> dict[str, str]:
        """The options with a bound on the frames that x264 and x265 hold; quiet, and repeatable."""
        name, params = context.codec.name, options.get("x265-params", "")
        # measured with x264: 1.5 bytes a pixel for each thread, 3.5 for each frame looked ahead
        room = ENCODER_MEMORY / (self.width * self.height)
        threads = min((os.cpu_count() or 1) * 3 // 2 + 1, max(2, int(room / 2 / 1.5)))
        depth = max(2 if name == "libx264" else 10, int((room - 1.5 * threads) / 3.5))
        usual = _LOOKAHEAD.get(name, {}).get(options.get("preset", "medium"), 40)
        is_chosen = "rc-lookahead" in {*options, *re.findall(r"[\w-]+", params)}
        is_chosen = is_chosen or "zerolatency" in options.get("tune", "")
        is_bounded = name in _LOOKAHEAD and depth < usual and not is_chosen
        bound = {"rc-lookahead": str(depth)} if is_bounded else {}
        if bound and name == "libx264" and depth < 5 and "bf" not in options:
            bound["bf"] = "1"  # B-frames wait, too: with 3 of them 5120x2880 takes 200 MB more
        if bound:
            named = ", ".join(f"{key}={value}" for key, value in bound.items())
            self.notes.add(f"{named} bounds the encoder's memory")
        if not self._format.is_rgb:
            options = {"chroma_sample_location": self._reader.color.siting} | options
        if name == "libx264":
            if "threads" not in options:
                context.thread_count = threads
            params = repeatable(options.get("x264-params", ""))
            return options | ({"x264-params": params} if params else {}) | bound
        if name == "libx265":
            parts = ["log-level=error", f"rc-lookahead={depth}" if is_bounded else "", params]
            return options | {"x265-params": ":".join(filter(None, parts))}
        if name == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # errors only; there is no option for it
        return options

    def encode(self, picture: Pixels, frame: Frame) -> list[Timed]:
        """Take one picture, RGB or its `planes`, at the time of `frame`; returns ready packets."""
        if frame.alpha is not None:
            self.notes.add("transparency is dropped; write a folder of PNG files to keep it")
        for tag in [tag for tag in frame.tags if tag != "resolution"]:  # of no use in a video
            self.notes.add(f"{tag} of pictures is left out; write a folder of PNG files to keep it")
        if isinstance(picture, np.ndarray):
            picture = [plane.numpy() for plane in self.planes(torch.from_numpy(picture))]
        video: Timed = colors.from_planes(picture, self._format.name)
        video.pts, video.duration = self._time_of(frame)
        video.time_base = self.time_base
        self._durations[video.pts] = video.duration
        context = self.stream.codec_context  # ProRes takes these from its frames
        video.colorspace, video.color_range = context.colorspace, context.color_range
        video.color_primaries, video.color_trc = context.color_primaries, context.color_trc
        return self._timed(self.stream.encode(video))

    def finish(self) -> list[Timed]:
        """The packets of the pictures that the encoder still holds."""
        return self._timed(self.stream.encode(None))

    def _time_of(self, frame: Frame) -> tuple[int, int]:
        """Time and duration in ticks of the output; avi only has one tick for each frame."""
        pts = frame.pts - int(self.offset / frame.time_base)
        if self._suffix != ".avi":
            return pts, frame.duration
        exact = pts * frame.time_base * self._reader.rate
        self.tick = max(round(exact), self.tick + 1)
        if abs(self.tick - exact) > Fraction(1, 10):
            self.notes.add("avi holds a constant frame rate only; the times of frames are rounded")
        return self.tick, 1

    def _timed(self, packets: list[Timed]) -> list[Timed]:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, 0) or packet.duration
        return packets


def _closest(offered: list[str], bits: int) -> str:
    """4:2:0 with as many bits, or a few more, or the most there are; else what is closest."""
    for depth in sorted((8, 10, 12, 14, 16), key=lambda depth: (depth < bits, abs(depth - bits))):
        names = ("yuv420p",) if depth == 8 else (f"yuv420p{depth}le", f"p0{depth}le")
        for name in names:
            if name in (offered or ["yuv420p"]):
                return name
        best, _ = find_best_pix_fmt_of_list(offered, names[0]) if offered else (None, 0)
        if best and colors.bit_depth(best) >= bits:
            return best.name
    return offered[0]
