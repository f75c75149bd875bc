"""Pictures to packets: which encoder, format and options, and what each encoder is told."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
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
from mana_triton.video.frame import MP4_LIKE, Frame, MediaError, Timed, reason
from mana_triton.video.reader import Reader
from mana_triton.video.remux import IN_TS

Pixels = np.ndarray | Sequence[np.ndarray]  # RGB, or the planes that are encoded

ENCODERS = ("libx264", "libx265", "libsvtav1", "libvpx-vp9", "ffv1", "prores_ks", "h264_nvenc")

ENCODER_MEMORY = 256 * 2**20  # bytes of waiting frames that x264 or x265 may hold
# frames that they look ahead by preset; slower ones than these look further than medium
_LOOKAHEAD = {
    "libx264": {"ultrafast": 0, "superfast": 0, "veryfast": 10, "faster": 20, "fast": 30},
    "libx265": {"ultrafast": 5, "superfast": 10, "veryfast": 15, "faster": 15, "fast": 15},
}
# what makes an encoder lossless: encoder for 8 bits, for more bits; formats; options
_LOSSLESS = {
    "libx264": ("libx264rgb", "rgb24", "libx264", "yuv444p10le", {"qp": "0"}),
    "libx265": ("libx265", "gbrp", "libx265", "gbrp{bits}le", {"x265-params": "lossless=1"}),
    "libvpx-vp9": ("libvpx-vp9", "gbrp", None, "", {"lossless": "1"}),
    "ffv1": ("ffv1", "bgr0", "ffv1", "gbrp{bits}le", {}),
    "h264_nvenc": ("h264_nvenc", "yuv444p", None, "", {"tune": "lossless"}),
    "hevc_nvenc": ("hevc_nvenc", "yuv444p", "hevc_nvenc", "yuv444p16le", {"tune": "lossless"}),
}
# x264's functions for AVX-512 give other packets from run to run (13 kinds in 200 runs over the
# same six frames, with one thread as with four); with these instructions it never did
_REPEATABLE = "asm=MMX2,SSE2,SSSE3,SSE4.2,LZCNT,AVX,FMA3,BMI1,BMI2,AVX2"
# how many of an encoder's units a coordinate of the primaries and a cd/m2 have
_HDR_UNITS = {"G": 50000, "B": 50000, "R": 50000, "WP": 50000, "L": 10000}


def repeatable(params: str = "") -> str:
    """These "x264-params" with what makes equal pictures equal packets on this machine."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or "asm=" in params:
        return params
    return ":".join(filter(None, (_REPEATABLE, params)))


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


class VideoEncoder:
    """Turns pictures into the packets of one video stream, which starts with a key frame.

    Args:
        path, reader, width, height: as of VideoWriter.
        container: gets the stream; no packet is written into it here.
        encode: encoder and settings.
        after: `tick` of the encoder of the frames before the first one here, -1 if there are none.

    Attributes:
        stream: of the container.
        headers: what the encoder says about its stream beside the packets.
        time_base: of the packets' times, in seconds.
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
        encode: EncodeOptions = EncodeOptions(),
        *,
        after: int = -1,
    ):
        self.path, self.suffix, self.notes = path, path.suffix.lower(), []
        self.width, self.height, self._reader, self._container = width, height, reader, container
        self.time_base = 1 / reader.rate if self.suffix == ".avi" else reader.time_base
        self.tick = after
        self._durations: dict[int, int] = {}  # by pts, of the frames the encoder holds
        codec, crf, options = encode.codec, encode.crf, dict(encode.options)
        pix_fmt = options.pop("pix_fmt", encode.pix_fmt)
        if encode.lossless:
            codec, crf, options, pix_fmt = self._without_loss(codec, options, pix_fmt)
        self.stream = self._add_video(codec, crf, options, pix_fmt)
        self.headers = bytes(self.stream.codec_context.extradata or b"")

    def _add_video(
        self, codec: str, crf: float | None, options: dict, pix_fmt: str | None
    ) -> av.VideoStream:
        try:
            encoder = av.Codec(codec, "w")
            if encoder.type != "video":
                raise UnknownCodecError(codec)
            if self.suffix == ".ts" and not IN_TS.fullmatch(encoder.canonical_name):
                raise ValueError(codec)  # FFmpeg would write it as data that no player reads
            stream = cast(av.VideoStream, self._container.add_stream(codec, self._reader.rate))
        except UnknownCodecError as error:
            known = ", ".join(name for name in ENCODERS if name in av.codecs_available)
            raise MediaError(f"unknown video encoder '{codec}'; use for example {known}") from error
        except ValueError as error:
            raise MediaError(
                f"{self.path}: '{self.suffix}' files cannot hold {codec} video;"
                " choose another --codec or write a .mkv file"
            ) from error
        self._choose_format(encoder, pix_fmt)
        color, context = self._reader.color, stream.codec_context
        context.width, context.height, context.pix_fmt = self.width, self.height, self._format.name
        context.time_base = stream.time_base = self.time_base
        context.colorspace = 0 if self._format.is_rgb else color.matrix
        context.color_range = self._range
        context.color_primaries, context.color_trc = color.primaries, color.transfer
        if aspect := self._reader.sample_aspect_ratio:
            context.sample_aspect_ratio = aspect
            # PyAV cannot tell it to Matroska, and these codecs have no place for it
            placeless = codec in ("libvpx-vp9", "libsvtav1", "prores_ks")
            if aspect != 1 and placeless and self.suffix in (".mkv", ".webm"):
                self.notes.append(f"pixel aspect {aspect} is left out: choose another --codec")
        if encoder.canonical_name == "hevc" and self.suffix in MP4_LIKE:
            context.codec_tag = "hvc1"  # Apple's players refuse the default, hev1
        if self.suffix == ".avi":
            context.max_b_frames = 0  # it has no times of presentation to put them in order
        self._open_encoder(context, crf, options | self._hdr_options(codec, options))
        return stream

    def _without_loss(
        self, codec: str, options: dict[str, str], pix_fmt: str | None
    ) -> tuple[str, None, dict[str, str], str]:
        """Encoder, crf, options and format under which an encoder loses nothing."""
        if codec not in _LOSSLESS:
            known = ", ".join(_LOSSLESS)
            raise MediaError(f"{codec} cannot be lossless in full color; use one of {known}")
        small, small_format, large, large_format, given = _LOSSLESS[codec]
        bits = self._reader.bits
        if bits > 8 and large is None:
            raise MediaError(f"{codec} has 8 bits and the input has {bits}; use libx265 or ffv1")
        encoder, form = (small, small_format) if bits <= 8 else (large, large_format)
        # the even number of bits that holds them, or the most that there are
        bits = min(-(-bits // 2) * 2, 12 if codec == "libx265" else 16)
        form = pix_fmt or form.format(bits=bits)
        if form.startswith("yuv"):
            self.notes.append(f"{form} rounds the colors once, before the encoder")
        return encoder, None, given | options, form

    def _hdr_options(self, codec: str, options: dict[str, str]) -> dict[str, str]:
        """HDR10 metadata in the words of the encoders that take it."""
        display, light = self._reader.mastering, self._reader.light_level
        if not (display or light):
            return {}
        words = {
            "libx265": ("x265-params", "master-display", "max-cll"),
            "libx264": ("x264-params", "mastering-display", "cll"),
            "libsvtav1": ("svtav1-params", "mastering-display", "content-light"),
        }
        if codec not in words:
            self.notes.append(f"HDR10 mastering metadata is left out: {codec} cannot take it here")
            return {}
        key, display_word, light_word = words[codec]
        parts = [options.get(key, "")]
        if display:
            scale = dict.fromkeys(display, 1) if codec == "libsvtav1" else _HDR_UNITS
            values = {
                name: ",".join(f"{float(value * scale[name]):.10g}" for value in pair)
                for name, pair in display.items()
            }
            parts.append(f"{display_word}=" + "".join(f"{k}({v})" for k, v in values.items()))
        if light:
            parts.append(f"{light_word}={light[0]},{light[1]}")
        self.notes.append("HDR10 mastering metadata is in the video stream, not in the container")
        return {key: ":".join(filter(None, parts))}

    def _choose_format(self, encoder: av.Codec, wanted: str | None) -> None:
        offered = [form.name for form in encoder.video_formats or ()]
        bits = self._reader.bits
        if wanted is None:
            wanted = _closest(offered, bits)
            if (written := colors.depth(av.VideoFormat(wanted))) < bits:
                self.notes.append(f"{encoder.name} writes {written} of the input's {bits} bits")
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

    def _open_encoder(
        self, context: av.VideoCodecContext, crf: float | None, options: dict[str, str]
    ) -> None:
        codec = context.codec
        if crf is not None and "qp" not in options:
            if "crf" in {option.name for option in context.supported_options.private}:
                options = {"crf": f"{crf:g}"} | options
            elif codec.lossy:
                self.notes.append(f"{codec.name} has no crf; it encodes at its default quality")
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
        chosen = "rc-lookahead" in {*options, *re.findall(r"[\w-]+", params)}
        chosen = chosen or "zerolatency" in options.get("tune", "")
        bounded = name in _LOOKAHEAD and depth < usual and not chosen
        tight = {"rc-lookahead": str(depth)} if bounded else {}
        if tight and name == "libx264" and depth < 5 and "bf" not in options:
            tight["bf"] = "1"  # B-frames wait, too: with 3 of them 5120x2880 takes 200 MB more
        if tight:
            named = ", ".join(f"{key}={value}" for key, value in tight.items())
            self.notes.append(f"{named} bounds the encoder's memory")
        if not self._format.is_rgb:
            options = {"chroma_sample_location": self._reader.color.siting} | options
        if name == "libx264":
            if "threads" not in options:
                context.thread_count = threads
            params = repeatable(options.get("x264-params", ""))
            return options | ({"x264-params": params} if params else {}) | tight
        if name == "libx265":
            parts = ["log-level=error", f"rc-lookahead={depth}" if bounded else "", params]
            return options | {"x265-params": ":".join(filter(None, parts))}
        if name == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # errors only; there is no option for it
        return options

    def encode(self, picture: Pixels, frame: Frame) -> list[Timed]:
        """Take one picture, at the time of `frame`; returns the packets that are ready.

        picture: RGB, or the `planes` of it.
        """
        if frame.alpha is not None:
            self._note("transparency is dropped; write a folder of PNG files to keep it")
        for what in [name for name in frame.tags if name != "resolution"]:  # of no use in a video
            self._note(f"{what} of pictures is left out; write a folder of PNG files to keep it")
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
        pts = frame.pts - int(self._reader.offset / frame.time_base)
        if self.suffix != ".avi":
            return pts, frame.duration
        exact = pts * frame.time_base * self._reader.rate
        tick = max(round(exact), self.tick + 1)
        if abs(tick - exact) > Fraction(1, 10):
            self._note("avi holds a constant frame rate only; the times of frames are rounded")
        self.tick = tick
        return tick, 1

    def _timed(self, packets: list[Timed]) -> list[Timed]:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, 0) or packet.duration
        return packets

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


def _closest(offered: list[str], bits: int) -> str:
    """4:2:0 with as many bits, or a few more, or the most there are; else what is closest."""
    for depth in sorted((8, 10, 12, 14, 16), key=lambda depth: (depth < bits, abs(depth - bits))):
        names = ("yuv420p",) if depth == 8 else (f"yuv420p{depth}le", f"p0{depth}le")
        for name in names:
            if name in (offered or ["yuv420p"]):
                return name
        best, _ = find_best_pix_fmt_of_list(offered, names[0]) if offered else (None, 0)
        if best and colors.depth(best) >= bits:
            return best.name
    return offered[0]
