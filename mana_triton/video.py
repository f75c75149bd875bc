"""Video files and image folders in and out, through PyAV: exact pixels, everything else kept.

    with open_reader("in.mp4") as reader, open_writer("out.mp4", reader, width, height) as writer:
        for frame in reader:
            writer.write(enlarge(frame.rgb), frame)

Pixels are full-range RGB, uint8, or uint16 if the file has more than 8 bits; color.py converts
them. Timestamps are the input's. Audio, subtitles, fonts, other streams, chapters and tags are
copied without re-encoding; subtitles that the container cannot hold as they are become its own
kind of text. Interlaced frames are deinterlaced, one for one. An output has its final name only
once it is complete.
"""

import errno
import io
import itertools
import math
import os
import re
import secrets
import shutil
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Self, cast

import av
import av.filter
import numpy as np
import torch
from av import logging
from av.codec.codec import UnknownCodecError, find_best_pix_fmt_of_list
from av.error import FFmpegError, InvalidDataError
from av.format import Flags as FormatFlags
from av.stream import Disposition, Stream
from av.video.reformatter import ColorRange, Interpolation
from PIL import Image

from . import color as colors
from . import images
from .color import Color

# that can be written
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".nut")
IMAGE_SUFFIXES = images.SUFFIXES
MAX_PIXELS = 2**26  # of one picture of the input: 8192x8192; ours has sixteen times as many
MAX_STREAMS = 100
ENCODERS = ("libx264", "libx265", "libsvtav1", "libvpx-vp9", "ffv1", "prores_ks", "h264_nvenc")

_MP4_LIKE = (".mp4", ".m4v", ".mov")
_CHAINED = ("gif", "apng")  # formats whose pictures build on all before: they are never skipped
_ENCODER_MEMORY = 256 * 2**20  # bytes of waiting frames that x264 or x265 may hold
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
# subtitles as text, in the words of each kind of container
_SUBTITLES = {
    ".mp4": "mov_text", ".m4v": "mov_text", ".mov": "mov_text", ".mkv": "subrip", ".webm": "webvtt",
}  # fmt: skip
# what a transport stream names; it takes all else, too, but nobody could tell what it is
_IN_TS = re.compile(
    "h264|hevc|mpeg[124]video|mpeg4|vc1|aac|aac_latm|mp[123]|e?ac3|dts|truehd|opus|s302m"
    "|dvb_subtitle|dvb_teletext|hdmv_pgs_subtitle|klv|scte_35|timed_id3"
)
# ISO 639-2 has two codes for some languages; QuickTime knows the other one
_QUICKTIME_LANGUAGES = {"deu": "ger", "nld": "dut", "ell": "gre", "isl": "ice", "zho": "chi"}
# how many of an encoder's units a coordinate of the primaries and a cd/m2 have
_HDR_UNITS = {"G": 50000, "B": 50000, "R": 50000, "WP": 50000, "L": 10000}
# tags that describe the input file rather than its content
_STALE_TAG = re.compile(
    "major_brand|minor_version|compatible_brands|encoder|duration|bps|number_of_(frames|bytes)"
    "|_statistics_.*|vendor_id",
    re.IGNORECASE,
)
# tags that mp4 stores where every player looks; others need a newer place that few look at
_CLASSIC_TAG = re.compile(
    "title|artist|album_artist|album|composer|date|comment|genre|copyright|grouping|lyrics"
    "|description|synopsis|show|episode_id|network|keywords|creation_time|location|track|disc"
)

# av.VideoFrame or av.Packet; PyAV's stubs let their times be None where that cannot be
_Timed = Any


class MediaError(Exception):
    """A file cannot be read or written; the message is one line for the user."""


@dataclass(frozen=True)
class Frame:
    """A picture and when it is shown.

    Attributes:
        rgb: [H, W, 3] full-range RGB, uint8 or, of more than 8 bits, uint16 (0 .. 65535).
        pts: presentation time, in units of `time_base` seconds.
        duration: in the same units, 0 if unknown.
        name: file stem in an image folder, else None.
        alpha: [H, W] opacity in the type of `rgb`; None if nothing shines through.
    """

    rgb: np.ndarray
    pts: int
    time_base: Fraction
    duration: int = 0
    name: str | None = None
    alpha: np.ndarray | None = None


@contextmanager
def _explained(path: Path, action: str) -> Iterator[None]:
    """Turn FFmpeg's and the system's errors into a MediaError about `path`."""
    try:
        yield
    except (FFmpegError, OSError) as error:
        raise MediaError(f"{path}: cannot {action}: {_reason(error)}") from error


def _reason(error: OSError | FFmpegError) -> str:
    """A system or FFmpeg error in plain words."""
    if isinstance(error, InvalidDataError):
        return "it is not a video, or it is damaged"
    known = {
        errno.ENOENT: "no such file or folder",
        errno.EACCES: "permission denied",
        errno.ENOSPC: "the disk is full; free some space or write elsewhere",
        errno.EFBIG: "disk full or file too large; write elsewhere",
    }
    return known.get(error.errno or 0, error.strerror or str(error))


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    if path.is_dir() and sys.platform == "win32":
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exact(seconds: float) -> Fraction:
    """The decimal number that was meant: 0.4 is 2/5, the float nearest to it is a little more."""
    return Fraction(str(seconds))


def _is_cover(stream: Stream) -> bool:
    return bool(stream.disposition & Disposition.attached_pic)


def _lasting(metadata: Mapping[str, str]) -> dict[str, str]:
    """The tags that are still true of the output."""
    tags = {key: value for key, value in metadata.items() if not _STALE_TAG.fullmatch(key)}
    if "name" in tags:  # how FFmpeg reads, but does not write, a track title in mp4
        tags.setdefault("title", tags.pop("name"))
    return tags


class _Reader:
    """What both kinds of reader share: notes and the context manager."""

    notes: list[str]

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def close(self) -> None:
        """Close what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VideoReader(_Reader):
    """Frames of a video stream of a file, in presentation order; iterate once.

    Args:
        path: any file FFmpeg can decode.
        start: leave out frames before this many seconds (by seeking, not by decoding all).
        end: leave out frames at or after this many seconds.
        stream: index of the video stream in the file; None for the first.
        limits: refuse files of more than MAX_STREAMS streams or MAX_PIXELS pixels a picture.

    Attributes:
        width, height: pixels as coded, before `rotation` (degrees counterclockwise) is applied.
        rate: nominal frames per second; the timestamps may be irregular.
        frame_count: expected number of frames, for progress only; None if unknown.
        bits: of a channel in the file.
        mastering, light_level: HDR10 metadata as in the file, None if there is none.
        colorspace, color_range, color_guessed: how YUV is decoded ("bt709", "limited"), and
            whether that is a guess because the file does not say; `color` has all tags.
        offset: seconds of the input that are zero of the output; not 0 if the start is cut.
        notes: lines the user should see.
        truncated: after iterating, why frames are missing or damaged; None if all is well.

    Raises:
        MediaError: the file is missing, unreadable, not a video, or has no frame in the range.
    """

    def __init__(
        self,
        path: str | Path,
        start: float | None = None,
        end: float | None = None,
        *,
        stream: int | None = None,
        limits: bool = True,
    ):
        self.path, self.start, self.end = Path(path), start or None, end
        self._wanted, self._limits = stream, limits
        self.notes, self.truncated = [], None
        self._open()
        try:
            self._frames = self._in_range()
            first = next(self._frames, None)
            if first is None:
                raise MediaError(f"{path}: no frame can be decoded{self._range_hint()}")
            self._describe(first)
            self._frames = itertools.chain([first], self._frames)
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        with _explained(self.path, "read it as a video"):
            self._container = av.open(f"file:{self.path}", metadata_errors="replace")
        try:
            self._stream = stream = self._choose_stream()
        except BaseException:
            self._container.close()
            raise
        stream.thread_type = "SLICE"  # frame threads hold frames, and lose them at damaged ends
        self._damaged = 0
        self.stream_index, self.time_base = stream.index, stream.time_base or 1 / Fraction(90000)
        rates = (stream.average_rate, stream.guessed_rate)
        self.rate = next((rate for rate in rates if rate and 1 <= rate <= 1000), Fraction(25))
        # broadcast recordings start at an arbitrary time; other files start when they say
        self._origin = Fraction(0)
        if self._container.format.flags & FormatFlags.ts_discont.value:
            ticks = Fraction(self._container.start_time or 0, av.time_base) // self.time_base
            self._origin = ticks * self.time_base
        self.stop = None if self.end is None else _exact(self.end) + self._origin

    def _choose_stream(self) -> av.VideoStream:
        streams, wanted = self._container.streams, self._wanted
        if self._limits and len(streams) > MAX_STREAMS:
            raise MediaError(
                f"{self.path}: has {len(streams)} streams, more than {MAX_STREAMS};"
                " use --no-limits if you trust it"
            )
        videos = [s for s in streams.video if not _is_cover(s)]
        if videos and wanted is not None:
            known = [s for s in videos if s.codec_context]
            videos = [s for s in videos if s.index == wanted]
            if not videos:
                choices = ", ".join(f"{s.index} ({s.name} {s.width}x{s.height})" for s in known)
                raise MediaError(f"{self.path}: stream {wanted} is not a video; choose {choices}")
        if not videos or videos[0].codec_context is None:
            what = "its video codec is unknown" if videos else "it has no video stream"
            if not streams:
                what = "it is not a video, or it is damaged"
            raise MediaError(f"{self.path}: {what}; give another file or convert this one")
        if self._limits:
            _check_size(self.path, videos[0].width, videos[0].height)
            videos[0].codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return videos[0]

    def _range_hint(self) -> str:
        if self.start is None and self.end is None:
            return "; the file is empty or damaged"
        lasts = f"; it ends at {self._end - self._origin:.2f} s" if self._end else ""
        return f" from {self.start or 0} s to {'the end' if self.end is None else self.end}{lasts}"

    @property
    def _end(self) -> float | None:
        """When the video ends, in seconds, according to the headers; None if they do not say."""
        stream, container = self._stream, self._container
        if stream.duration:
            return float(((stream.start_time or 0) + stream.duration) * self.time_base)
        if clock := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):
            return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])  # Matroska
        length = container.duration if len(container.streams) == 1 else None
        return length / av.time_base if length else None

    def _describe(self, first: _Timed) -> None:
        self.width, self.height, self.rotation = first.width, first.height, first.rotation
        matrix = first.side_data.get("DISPLAYMATRIX")
        self.display_matrix = None if matrix is None else np.frombuffer(matrix, np.int32).tolist()
        self.sample_aspect_ratio = self._stream.sample_aspect_ratio or None
        self.color, self.bits = self._find_color(first), colors.depth(first.format)
        side_data = {data.type.name: bytes(data) for data in first.side_data}
        self.mastering = _mastering(side_data.get("MASTERING_DISPLAY_METADATA", b""))
        self.light_level = _light_level(side_data.get("CONTENT_LIGHT_LEVEL", b""))
        self.colorspace, self.color_guessed = self.color.name, self.color.guessed
        self.color_range = "full" if self.color.full_range else "limited"
        self.offset = first.pts * self.time_base if self.start else self._origin
        self.frame_count = None
        if self.start is None and self.end is None and self._stream.frames:
            self.frame_count = self._stream.frames
        elif self._end:
            end = min(self._end, self._end if self.stop is None else float(self.stop))
            self.frame_count = max(1, round((end - float(first.pts * self.time_base)) * self.rate))
        if {"DOVI_METADATA", "DYNAMIC_HDR_PLUS", "DYNAMIC_HDR_VIVID"} & set(side_data):
            self._note("HDR metadata of single frames (Dolby Vision, HDR10+) is left out")

    def _find_color(self, first: av.VideoFrame) -> Color:
        name, matrix = first.format.name, first.colorspace
        full = first.color_range == ColorRange.JPEG or name.startswith("yuvj")
        primaries, transfer = (1 if x == 2 else x for x in (first.color_primaries, first.color_trc))
        if first.format.is_rgb or first.format.has_palette or name.startswith("gray"):
            code = 9 if primaries == 9 else 1
            is_gray = name.startswith("gray")
            return Color(code, full and is_gray, primaries, transfer)
        siting = self._find_siting(name)
        if matrix == 2:  # unspecified: what players assume, by size
            code = 1 if first.height >= 720 else 6
            guess = Color(code, full, code, code, guessed=True, siting=siting)
            self._note(f"the file does not say which colors it uses; taken as {guess.name}")
            return guess
        if matrix not in colors.MATRICES:
            raise MediaError(
                f"{self.path}: color matrix {matrix} is not supported; convert it to BT.709 first"
            )
        return Color(matrix, full, first.color_primaries, first.color_trc, siting=siting)

    def _find_siting(self, form: str) -> str:
        """Where chroma lies; PyAV tells only in a verbose description of the file."""
        level = logging.get_level()
        logging.set_libav_level(logging.VERBOSE)
        logging.set_level(logging.VERBOSE)
        try:
            described = cast(Any, self._container).dumps_format()
        finally:
            logging.set_libav_level(logging.INFO)  # FFmpeg's default
            logging.set_level(level)
        line = re.search(rf"Stream #0:{self.stream_index}\b.*Video: .*", described)
        names = "|".join(sorted(colors.SITINGS, key=len, reverse=True))
        said = re.search(rf"{form}\([^)]*\b({names})\)", line[0]) if line else None
        return said[1] if said else "left"

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first frame of the range."""
        self._container.close()
        self._open()
        self._frames = self._in_range(None if pts is None else pts * self.time_base)

    def _in_range(self, begin: Fraction | None = None) -> Iterator[_Timed]:
        frames = self._progressive()
        start = self._origin + _exact(self.start or 0) if begin is None else begin
        if (self.start or begin is not None) and self._container.format.name not in _CHAINED:
            with suppress(FFmpegError):
                # one second early, because seeking goes by decoding time, which B frames shift
                self._container.seek(int((start - 1) / self.time_base), stream=self._stream)
            first = next(frames, None)
            if first is None or first.pts * self.time_base > start:  # failed or overshot
                self._container.close()
                self._open()
                frames = self._progressive()
            else:
                frames = itertools.chain([first], frames)
        for frame in frames:
            time = frame.pts * self.time_base
            if self.stop is not None and time >= self.stop:
                return
            if time >= start:
                self._damaged += frame.is_corrupt
                yield frame

    def _progressive(self) -> Iterator[_Timed]:
        """All frames from here on, the interlaced ones deinterlaced."""
        graph: _Deinterlacer | None = None
        last: _Timed = None
        for frame in self._decoded():
            if graph and not graph.takes(frame):
                yield from graph.push(None)
                graph = None
            if graph is None and frame.interlaced_frame and min(frame.width, frame.height) >= 16:
                self._note("the video is interlaced; deinterlaced by bwdif, frame by frame")
                graph = _Deinterlacer(frame, self.time_base, last)
            yield from graph.push(frame) if graph else [frame]
            last = frame
        if graph:
            yield from graph.push(None)

    def _decoded(self) -> Iterator[_Timed]:
        """All frames from here on, with increasing timestamps; damage is counted and skipped."""
        packets = self._container.demux(self._stream)
        last, lasts, stopped = None, 0, None
        while True:
            try:
                packet = next((p for p in packets if p.size), None)
            except FFmpegError as error:
                packet, stopped = None, _reason(error)
            try:
                frames = self._stream.decode(packet)
            except FFmpegError:
                self._damaged += 1
                frames = []
            for frame in frames:
                last, lasts = self._increasing(frame, last), frame.duration
                frame.pts = last
                yield frame
            if packet is None:
                self._judge_end(last, lasts, stopped)
                return

    def _increasing(self, frame: _Timed, last: int | None) -> int:
        """The frame's timestamp, replaced if it is missing or not after the last one."""
        if frame.pts is None:
            period = max(1, round(1 / (self.rate * self.time_base)))
            return (self._stream.start_time or 0) if last is None else last + period
        if last is not None and frame.pts <= last:
            self._note("timestamps that ran backwards were corrected; check sound against picture")
            return last + 1
        return frame.pts

    def _judge_end(self, last: int | None, lasts: int, stopped: str | None) -> None:
        """Set `truncated` if frames were lost; the last one came at `last` for `lasts` ticks."""
        if last is None:
            return
        seconds, end = float((last + lasts) * self.time_base), self._end or 0
        if stopped:
            self.truncated = f"reading stopped after {seconds:.2f} s: {stopped}"
        elif end - seconds > 2.5 / self.rate:
            self.truncated = f"the video stops at {seconds:.2f} s instead of {end:.2f} s"
        elif self._damaged:
            self.truncated = f"frames damaged or missing: {self._damaged}"

    def __iter__(self) -> Iterator[Frame]:
        for picture in self._frames:
            frame = picture
            if (frame.width, frame.height) != (self.width, self.height):
                self._note(f"the picture size changes; all is scaled to {self.width}x{self.height}")
                size = self.width, self.height
                frame = frame.reformat(*size, interpolation=Interpolation.BICUBIC, threads=1)
            rgb, alpha = colors.to_rgb(frame, self.color), colors.alpha_of(frame)
            yield Frame(rgb, picture.pts, self.time_base, picture.duration, alpha=alpha)

    def close(self) -> None:
        """Close the file."""
        self._container.close()


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path}: pictures of {width}x{height} are larger than {MAX_PIXELS} pixels;"
            " use --no-limits if you trust the file and have the memory"
        )


def _mastering(data: bytes) -> dict[str, tuple[Fraction, ...]] | None:
    """Primaries and white point (x, y) and luminance (cd/m2) of the display it was made on."""
    if len(data) < 88:
        return None
    *ratios, has_primaries, has_luminance = np.frombuffer(data[:88], np.int32).tolist()
    if not (has_primaries and has_luminance and all(ratios[1::2])):
        return None
    values = [Fraction(a, b) for a, b in zip(ratios[::2], ratios[1::2], strict=True)]
    red, green, blue, white, (low, high) = zip(values[::2], values[1::2], strict=True)
    return {"G": green, "B": blue, "R": red, "WP": white, "L": (high, low)}


def _light_level(data: bytes) -> tuple[int, int] | None:
    """Brightest pixel and brightest mean of a frame, cd/m2."""
    if len(data) < 8:
        return None
    brightest, mean = np.frombuffer(data[:8], np.uint32).tolist()
    return brightest, mean


class _Deinterlacer:
    """FFmpeg's bwdif: one progressive frame for each frame; progressive ones pass unchanged.

    A frame depends on itself and its two neighbors alone, so that decoding may begin anywhere:
    the filter is given all frames as interlaced ones, and `before`, if there was a frame of that
    kind before the first. Left to skip the progressive ones, it would treat an interlaced one after
    them otherwise at the start of a file than in its middle.
    """

    def __init__(self, frame: _Timed, time_base: Fraction, before: _Timed):
        self._kind, self._time_base = (frame.width, frame.height, frame.format.name), time_base
        self._graph = av.filter.Graph()
        width, height, form = self._kind
        source = self._graph.add_buffer(
            width=width, height=height, format=form, time_base=time_base
        )
        bwdif = self._graph.add("bwdif", "mode=send_frame:deint=all")
        sink = self._graph.add("buffersink")
        source.link_to(bwdif)
        bwdif.link_to(sink)
        self._graph.configure()
        self._held: deque[_Timed] = deque()  # frames in the filter; None where it is in no result
        if before is not None and self.takes(before):
            self._graph.vpush(before)
            self._held.append(None)

    def takes(self, frame: _Timed) -> bool:
        return (frame.width, frame.height, frame.format.name) == self._kind

    def push(self, frame: _Timed) -> Iterator[_Timed]:
        """Put in one frame, None at the end, and take out what is ready."""
        self._graph.vpush(frame)
        if frame is not None:
            self._held.append(frame)
        while True:
            try:
                done: _Timed = self._graph.vpull()
            except (BlockingIOError, EOFError):
                return
            held = self._held.popleft()
            if held is None:
                continue
            if not held.interlaced_frame:
                yield held
                continue
            done.pts, done.duration, done.time_base = held.pts, held.duration, self._time_base
            yield done


class _Copier:
    """Copies everything but the pictures from a second look at the input, packet by packet."""

    def __init__(self, reader: VideoReader, writer: "VideoWriter"):
        self._reader, self._output, self._writer = reader, writer._container, writer
        self._source = av.open(f"file:{reader.path}", metadata_errors="replace")
        self._copy_tags()
        self._targets: dict[int, Stream] = {}
        self._converted: dict[int, Any] = {}
        for stream in self._source.streams:
            if stream.index != reader.stream_index:
                self._add(stream)
        if reader.start:
            with suppress(FFmpegError):  # without seeking it only takes longer
                self._source.seek(int((reader.offset - 1) * av.time_base))
        streams = [self._source.streams[index] for index in self._targets]
        self._packets = self._source.demux(*streams) if streams else iter(())
        self._waiting: _Timed = None

    def _copy_tags(self) -> None:
        tags = _lasting(self._source.metadata)
        self._output.metadata.update(tags)
        if self._writer.suffix in _MP4_LIKE and not all(map(_CLASSIC_TAG.fullmatch, tags)):
            self._output.container_options["movflags"] = "use_metadata_tags"
        picture, video = self._source.streams[self._reader.stream_index], self._writer._stream
        video.metadata.update(_lasting(picture.metadata))
        video.disposition = picture.disposition
        stop, chapters = self._reader.stop, []
        for chapter in cast(list[Any], self._source.chapters()):
            tick = chapter["time_base"]
            shift = round(self._reader.offset / tick)
            end = chapter["end"] if stop is None else min(chapter["end"], round(stop / tick))
            if end - shift > max(0, chapter["start"] - shift):
                start = max(0, chapter["start"] - shift)
                chapters.append(chapter | {"start": start, "end": end - shift})
        lost = {".ts": ("chapters", "tags"), ".avi": ("chapters",)}.get(self._writer.suffix, ())
        for what in [name for name in lost if {"chapters": chapters, "tags": tags}[name]]:
            self._writer.notes.append(f"{self._writer.suffix} files cannot hold {what}")
        if chapters:
            self._output.set_chapters(chapters)

    def _add(self, stream: Any) -> None:
        """Make a stream of the output that takes this one's packets, or note that it cannot be."""
        codec = getattr(stream, "name", None)  # a stream of unknown codec has no such attribute
        suffix = self._writer.suffix
        if stream.type == "data" and self._source.chapters() and codec == "bin_data":
            return  # this is how mp4 stores chapters; they are written anew
        if stream.type == "data" and "timecode" in stream.metadata and suffix in _MP4_LIKE:
            return  # written anew from the tag of the video
        name = f"{stream.type} stream {stream.index} ({codec or 'unknown'})"
        if not self._can_hold(stream):
            if stream.type == "audio" and codec:
                raise MediaError(
                    f"{self._writer.path}: '{suffix}' files cannot hold the input's {name};"
                    " write a .mkv file"
                )
            if stream.type == "subtitle" and codec and (kind := self._text_kind(stream)):
                target: Any = self._output.add_stream(kind)
                self._converted[stream.index] = target
                target.codec_context.subtitle_header = stream.codec_context.subtitle_header
                target.codec_context.time_base = target.time_base = stream.time_base
                self._describe(target, stream)
                self._writer.notes.append(f"{name} is converted to {kind}; its styles may be lost")
            else:
                self._writer.notes.append(f"{name} is left out")
            return
        target = cast(Any, self._output.add_stream_from_template(stream, opaque=True))
        if (
            stream.type == "video" and stream.sample_aspect_ratio
        ):  # not among the codec's parameters
            target.sample_aspect_ratio = stream.sample_aspect_ratio
        self._describe(target, stream)

    def _describe(self, target: Any, stream: Any) -> None:
        target.metadata.update(_lasting(stream.metadata))
        language = target.metadata.get("language", "")
        if self._writer.suffix == ".mov" and language in _QUICKTIME_LANGUAGES:
            target.metadata["language"] = _QUICKTIME_LANGUAGES[language]
        target.disposition = stream.disposition
        if stream.type != "attachment":
            self._targets[stream.index] = target

    def _can_hold(self, stream: Stream) -> bool:
        """Whether a file like the output with this stream alone gets a header."""
        suffix, codec = self._writer.suffix, getattr(stream.codec_context, "codec", None)
        if stream.type == "attachment":
            return suffix == ".mkv"
        if suffix == ".avi" and stream.type != "audio":
            return False
        name = codec.canonical_name if codec else getattr(stream, "name", None) or ""
        if suffix == ".ts" and not _IN_TS.fullmatch(name):
            return False
        try:
            with av.open(io.BytesIO(), "w", format=self._output.format.name) as trial:
                trial.add_stream_from_template(stream, opaque=True)
                trial.start_encoding()
        except (ValueError, FFmpegError):
            return False
        return True

    def _text_kind(self, stream: Any) -> str | None:
        """The container's kind of subtitles if these are text."""
        stream.codec_context.open(strict=False)
        return _SUBTITLES.get(self._writer.suffix) if stream.codec_context.subtitle_header else None

    def until(self, seconds: Fraction | None) -> None:
        """Copy the packets up to this time of the input; None copies all that is left."""
        while packet := self._waiting or self._next():
            self._waiting = packet
            stamp = packet.pts if packet.dts is None else packet.dts
            if None not in (seconds, stamp) and stamp * packet.time_base > seconds:
                return
            self._waiting = None
            if self._is_in_range(packet):
                for ready in self._as_text(packet) if self._is_text(packet) else [packet]:
                    self._mux(ready, packet.stream.index)

    def _next(self) -> _Timed:
        try:
            return next((p for p in self._packets if p.size and not p.is_corrupt), None)
        except FFmpegError as error:
            self._writer.notes.append(f"copying sound and the like stopped: {_reason(error)}")
            return None

    def _is_in_range(self, packet: _Timed) -> bool:
        if packet.pts is None or _is_cover(packet.stream):
            return True
        time, stop = packet.pts * packet.time_base, self._reader.stop
        # avi has no negative times, and would delay the picture by a whole frame instead
        cut = self._reader.start or self._writer.suffix == ".avi"
        after_start = not cut or time >= self._reader.offset
        return after_start and (stop is None or time < stop)

    def _is_text(self, packet: _Timed) -> bool:
        return packet.stream.index in self._converted

    def _as_text(self, packet: _Timed) -> Iterator[_Timed]:
        """The packet in the output's kind of subtitles; nothing for an empty one."""
        try:
            lines = packet.stream.codec_context.decode2(packet)
            if lines is None or not len(lines):
                return
            text = self._converted[packet.stream.index].codec_context.encode_subtitle(lines)
        except FFmpegError as error:
            self._writer.notes.append(f"a subtitle was left out: {_reason(error)}")
            return
        text.pts = text.dts = packet.pts
        text.time_base, text.duration = packet.time_base, packet.duration
        yield text

    def _mux(self, packet: _Timed, index: int) -> None:
        if shift := round(self._reader.offset / packet.time_base):
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
        packet.stream = self._targets[index]
        try:
            self._output.mux_one(packet)
        except InvalidDataError:  # the input's fault, not the disk's
            note = "damaged sound was left out"
            if note not in self._writer.notes:
                self._writer.notes.append(note)

    def close(self) -> None:
        """Close the second look at the input."""
        self._source.close()


class _Writer:
    """What both kinds of writer share: checks, the temporary name and the context manager."""

    notes: list[str]

    def __init__(self, path: str | Path, reader: "Reader", width: int, height: int):
        self.path, self.notes = Path(path), []
        self.suffix = self.path.suffix.lower()
        self.width, self.height, self._reader = width, height, reader

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _claim(self, overwrite: bool, part: Path | None = None) -> Path:
        """The name while it grows, after checking that the output may be written."""
        path = self.path
        if path.is_symlink():
            raise MediaError(f"{path}: is a symbolic link; give the file's own name")
        if path.exists():
            if path.samefile(self._reader.path):
                raise MediaError(f"{path}: is the input itself; choose another output")
            if not overwrite and not (path.is_dir() and not any(path.iterdir())):
                raise MediaError(f"{path}: exists; use --overwrite or choose another output")
        if not path.parent.is_dir():
            raise MediaError(f"{path}: there is no folder {path.parent}; create it first")
        hidden = path.with_name(f".{path.stem[:80]}.{secrets.token_hex(4)}.part{path.suffix}")
        return part or hidden

    def _check(self, rgb: np.ndarray) -> None:
        if rgb.shape != (self.height, self.width, 3) or rgb.dtype not in (np.uint8, np.uint16):
            raise ValueError(
                f"rgb must be [{self.height}, {self.width}, 3] uint8 or uint16,"
                f" got {rgb.shape} {rgb.dtype}"
            )

    def close(self) -> None:
        """Finish the output and give it its name."""
        raise NotImplementedError

    def abort(self) -> None:
        """Delete what was written so far; nothing to do after close."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class VideoEncoder:
    """Turns pictures into the packets of one video stream, which starts with a key frame.

    Args:
        path, reader, width, height: as of VideoWriter.
        container: gets the stream; no packet is written into it here.
        codec, crf, options, pix_fmt, lossless: as of VideoWriter.
        after: `tick` of the encoder of the frames before the first one here, -1 if there are none.

    Attributes:
        stream: of the container.
        headers: what the encoder says about its stream beside the packets.
        time_base: of the packets' times, in seconds.
        tick: time of the last frame of an avi, whose frames must not share one.
        notes: lines the user should see.
    """

    def __init__(
        self,
        path: Path,
        reader: "Reader",
        width: int,
        height: int,
        container: Any,
        *,
        codec: str = "libx264",
        crf: float | None = 18,
        options: Mapping[str, str] | None = None,
        pix_fmt: str | None = None,
        lossless: bool = False,
        after: int = -1,
    ):
        self.path, self.suffix, self.notes = path, path.suffix.lower(), []
        self.width, self.height, self._reader, self._container = width, height, reader, container
        self.time_base = 1 / reader.rate if self.suffix == ".avi" else reader.time_base
        self.tick = after
        self._durations: dict[int, int] = {}  # by pts, of the frames the encoder holds
        options = {key: str(value) for key, value in (options or {}).items()}
        pix_fmt = options.pop("pix_fmt", pix_fmt)
        if lossless:
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
        if encoder.canonical_name == "hevc" and self.suffix in _MP4_LIKE:
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
        display, light = (getattr(self._reader, key, None) for key in ("mastering", "light_level"))
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
        self._format = av.VideoFormat(wanted, self.width, self.height)
        full = self._reader.color.full_range or self._format.is_rgb or wanted.startswith("yuvj")
        self._range = ColorRange.JPEG if full else ColorRange.MPEG

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
                f" {given}: {_reason(error)}; choose other options or another --codec"
            ) from error
        if unused := ", ".join(context.options):
            raise MediaError(
                f"{codec.name} has no option {unused}; see ffmpeg -h encoder={codec.name}"
            )

    def _bounded(self, context: av.VideoCodecContext, options: dict[str, str]) -> dict[str, str]:
        """The options with a bound on the frames that x264 and x265 hold; quiet, and repeatable."""
        name, params = context.codec.name, options.get("x265-params", "")
        # measured with x264: 1.5 bytes a pixel for each thread, 3.5 for each frame looked ahead
        room = _ENCODER_MEMORY / (self.width * self.height)
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
            given = options.get("x264-params", "")
            if torch.backends.cpu.get_cpu_capability() == "AVX512" and "asm=" not in given:
                options = options | {"x264-params": ":".join(filter(None, (_REPEATABLE, given)))}
            return options | tight
        if name == "libx265":
            parts = ["log-level=error", f"rc-lookahead={depth}" if bounded else "", params]
            return options | {"x265-params": ":".join(filter(None, parts))}
        if name == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # errors only; there is no option for it
        return options

    def encode(self, rgb: np.ndarray, frame: Frame) -> list[_Timed]:
        """Take one picture, at the time of `frame`; returns the packets that are ready."""
        if frame.alpha is not None:
            self._note("transparency is dropped; write a folder of PNG files to keep it")
        full = self._range == ColorRange.JPEG
        picture: _Timed = colors.from_rgb(rgb, self._format.name, self._reader.color, full)
        picture.pts, picture.duration = self._time_of(frame)
        picture.time_base = self.time_base
        self._durations[picture.pts] = picture.duration
        context = self.stream.codec_context  # ProRes takes these from its frames
        picture.colorspace, picture.color_range = context.colorspace, context.color_range
        picture.color_primaries, picture.color_trc = context.color_primaries, context.color_trc
        return self._timed(self.stream.encode(picture))

    def finish(self) -> list[_Timed]:
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

    def _timed(self, packets: list[_Timed]) -> list[_Timed]:
        for packet in packets:
            packet.duration = self._durations.pop(packet.pts, 0) or packet.duration
        return packets

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


class VideoWriter(_Writer):
    """Encodes frames; copies everything else of the reader's file beside them.

    Args:
        path: output; its suffix chooses the container.
        reader: where the frames come from: timestamps, colors, rotation, audio, tags.
        width, height: of the frames to be written, pixels.
        overwrite: replace an existing output.
        part: name of the file while it grows, on the disk of `path`; None: a hidden one beside.
        encoding: codec: FFmpeg encoder; crf: constant quality, for encoders that have it, None for
            their default; options: further encoder options, where "pix_fmt" is taken as the
            argument of that name; pix_fmt: None means yuv420p with the input's bits, or what the
            encoder has closest to it; lossless: keep every bit of the pictures, by what the
            encoder has for that.

    Attributes:
        time_base, headers: of the encoder, see VideoEncoder.
        notes: lines the user should see.

    Raises:
        MediaError: the output cannot be written as asked; nothing is left behind.
    """

    def __init__(
        self,
        path: str | Path,
        reader: "Reader",
        width: int,
        height: int,
        *,
        overwrite: bool = False,
        part: Path | None = None,
        **encoding: Any,
    ):
        super().__init__(path, reader, width, height)
        self._copier: _Copier | None = None
        self._encoded = self._completed = self._finished = False
        if self.suffix not in VIDEO_SUFFIXES:
            known = " ".join(VIDEO_SUFFIXES)
            raise MediaError(f"{path}: cannot write '{self.suffix}' files; use one of {known}")
        if self.path.is_dir():
            raise MediaError(f"{path}: is a folder; give a file name")
        self._part = self._claim(overwrite, part)
        self._container = av.open(f"file:{self._part}", "w")  # creates no file yet
        try:
            with _explained(self.path, "write"):
                self._open(encoding)
        except BaseException:
            self.abort()
            raise

    def _open(self, encoding: dict[str, Any]) -> None:
        reader = self._reader
        if self.suffix in _MP4_LIKE:  # start offsets are rounded to this; FFmpeg's default is 1 ms
            ticks = str(max(1000, reader.time_base.denominator))
            self._container.container_options["movie_timescale"] = ticks
        size = self.width, self.height
        self._encoder = VideoEncoder(self.path, reader, *size, self._container, **encoding)
        self._stream, self.headers = self._encoder.stream, self._encoder.headers
        self.time_base = self._encoder.time_base
        self.notes = self._encoder.notes  # one list, as both go on adding to it
        if self.suffix == ".avi":
            self.notes.append("avi has no start times: sound may be off by up to a frame")
        if isinstance(reader, VideoReader):
            if reader.display_matrix and self.suffix in (".avi", ".ts"):
                self.notes.append(f"{self.suffix} files cannot hold rotation")
            if reader.display_matrix:  # before the header; its translation is in pixels
                matrix = list(reader.display_matrix)
                limit = 2**31 - 1  # which only a damaged file's numbers exceed
                matrix[6] = min(max(matrix[6] * self.width // reader.width, -limit), limit)
                matrix[7] = min(max(matrix[7] * self.height // reader.height, -limit), limit)
                self._stream.set_display_matrix(matrix)
            self._copier = _Copier(reader, self)
        self._container.start_encoding()

    def write(self, rgb: np.ndarray, frame: Frame) -> None:
        """Encode one picture, [height, width, 3] RGB, at the time of `frame`."""
        self._check(rgb)
        self._encoded = True
        with _explained(self.path, "write"):
            if self._copier:
                self._copier.until(frame.pts * frame.time_base)
            for packet in self._encoder.encode(rgb, frame):
                self._container.mux_one(packet)

    def put(self, packet: _Timed) -> None:
        """Write a packet that an encoder with the same settings made; no `write` beside it."""
        with _explained(self.path, "write"):
            if self._copier:
                self._copier.until(packet.dts * packet.time_base + self._reader.offset)
            packet.stream = self._stream
            self._container.mux_one(packet)

    def complete(self) -> None:
        """Finish the file, under the name it grew with, and make sure that it is on the disk."""
        if self._completed or self._finished:
            return
        try:
            with _explained(self.path, "write"):
                if self._encoded:
                    for packet in self._encoder.finish():
                        self._container.mux_one(packet)
                if self._copier:
                    self._copier.until(None)
                    self._copier.close()
                self._container.close()
                sync(self._part)
        except BaseException:
            self.abort()
            raise
        self._completed = True

    def close(self) -> None:
        """Finish the file and give it its name."""
        self.complete()
        if self._finished:
            return
        try:
            with _explained(self.path, "write"):
                self._part.replace(self.path)
        except BaseException:
            self.abort()
            raise
        self._finished = True
        sync(self.path.parent)

    def abort(self) -> None:
        """Delete what was written so far; nothing to do after close."""
        if self._finished:
            return
        self._finished = True
        if self._copier:
            self._copier.close()
        with suppress(FFmpegError, OSError):  # it may be the disk that is full
            self._container.close()
        self._part.unlink(missing_ok=True)


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


class ImageFolderReader(_Reader):
    """The pictures of a folder as frames, in natural order of their names (2 before 10).

    Args:
        path: folder of PNG, JPEG, WebP, TIFF or BMP files, 8 or 16 bits, all of one size.
        start, end: seconds, as of a video with `rate` frames per second.
        rate: frames per second.
        limits: refuse pictures of more than MAX_PIXELS pixels.

    Attributes are those of VideoReader; `files` are the pictures.

    Raises:
        MediaError: no picture, an unreadable one, or different sizes.
    """

    rotation, display_matrix, sample_aspect_ratio, truncated = 0, None, None, None
    color, colorspace, color_range, color_guessed = Color(), "bt709", "limited", False
    offset = Fraction(0)

    def __init__(
        self,
        path: str | Path,
        start: float | None = None,
        end: float | None = None,
        rate: Fraction | int = 25,
        *,
        limits: bool = True,
    ):
        self.path, self.start, self.end, self.notes = Path(path), start, end, []
        self.rate, self.time_base = Fraction(rate), 1 / Fraction(rate)
        with _explained(self.path, "list the folder"):
            names = sorted(self.path.iterdir(), key=_natural)
        self.files = [
            file
            for file in names
            if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".")
        ]
        if not self.files:
            raise MediaError(f"{path}: holds no pictures ({' '.join(IMAGE_SUFFIXES)})")
        first = 0 if start is None else math.ceil(_exact(start) * self.rate)
        last = None if end is None else math.ceil(_exact(end) * self.rate)
        self.files = self.files[first:last]
        if not self.files:
            raise MediaError(f"{path}: has no pictures from {start or 0} s to {end or 'the end'}")
        self.frame_count, self._first = len(self.files), 0
        if not limits:
            Image.MAX_IMAGE_PIXELS = None  # Pillow has a limit of its own
        with _explained(self.files[0], "read the picture"):
            self.width, self.height = images.picture_size(self.files[0])
            self.bits = images.picture_bits(self.files[0])
        if limits:
            _check_size(self.files[0], self.width, self.height)
        for file in self.files:  # now rather than after hours of work
            with _explained(file, "read the picture"):
                size = images.picture_size(file)
            if size != (self.width, self.height):
                raise MediaError(
                    f"{file}: is {size[0]}x{size[1]}, but {self.files[0].name} is"
                    f" {self.width}x{self.height}; all pictures must have one size"
                )

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first one."""
        self._first = pts or 0

    def __iter__(self) -> Iterator[Frame]:
        for index, file in enumerate(self.files[self._first :], self._first):
            with _explained(file, "read the picture"):
                rgb, alpha = images.read_picture(file)
            yield Frame(rgb, index, self.time_base, 1, file.stem, alpha)


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key under which frame2 comes before frame10."""
    parts = re.split(r"([0-9]+)", file.name)  # text and numbers alternate
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]


class ImageFolderWriter(_Writer):
    """Writes frames as PNG files into a folder that gets its name when it is complete.

    Pictures have the bits of the input; transparency is enlarged by bicubic interpolation.

    Args are those of VideoWriter. Files are named as the input's pictures, or 00000000.png, ...;
    `part` may be a folder that holds the first `count` of them.
    """

    def __init__(
        self,
        path: str | Path,
        reader: "Reader",
        width: int,
        height: int,
        *,
        overwrite: bool = False,
        part: Path | None = None,
        count: int = 0,
    ):
        super().__init__(path, reader, width, height)
        self._count = count
        if self.path.is_file():
            raise MediaError(f"{path}: is a file; give a folder or a video file name")
        if self.path.is_dir() and any(file.suffix != ".png" for file in self.path.iterdir()):
            raise MediaError(f"{path}: holds other things than PNG files; choose another folder")
        stems = sorted(file.stem for file in getattr(reader, "files", ()))
        for one, next_one in itertools.pairwise(stems):
            if one == next_one:
                raise MediaError(f"{reader.path}: two pictures are called '{one}'; rename one")
        self._part = self._claim(overwrite, part)
        with _explained(self.path, "write"):
            self._part.mkdir(exist_ok=part is not None)

    def write(self, rgb: np.ndarray, frame: Frame) -> Path:
        """Write one picture, [height, width, 3] RGB, under the name of `frame`."""
        self._check(rgb)
        alpha = frame.alpha
        if alpha is not None:
            alpha = self._enlarged(alpha)
        name = frame.name or f"{self._count:08d}"
        self._count += 1
        with _explained(self.path, "write"):
            images.write_picture(self._part / f"{name}.png", rgb, alpha)
        return self._part / f"{name}.png"

    def _enlarged(self, alpha: np.ndarray) -> np.ndarray | None:
        height, width = alpha.shape
        if self.width * height != self.height * width:  # two pictures side by side
            self._note("transparency is dropped")
            return None
        self._note("transparency is enlarged by bicubic interpolation")
        return colors.enlarge_alpha(alpha, self.width, self.height)

    def close(self) -> None:
        """Give the folder its name, in place of an older one."""
        if not self._part.exists():
            return
        with _explained(self.path, "write"):
            old = self._part.with_suffix(".old")
            if self.path.exists():
                self.path.replace(old)
            self._part.replace(self.path)
            shutil.rmtree(old, ignore_errors=True)

    def abort(self) -> None:
        """Delete what was written so far; nothing to do after close."""
        shutil.rmtree(self._part, ignore_errors=True)


class AnimationReader(_Reader):
    """The pictures of an animated WebP, which FFmpeg cannot read; attributes as VideoReader's."""

    rotation, display_matrix, sample_aspect_ratio, truncated, bits = 0, None, None, None, 8
    color, colorspace, color_range, color_guessed = Color(), "bt709", "limited", False
    time_base = Fraction(1, 1000)

    def __init__(
        self,
        path: str | Path,
        start: float | None = None,
        end: float | None = None,
        *,
        limits: bool = True,
    ):
        self.path, self.start, self.end, self.notes = Path(path), start, end, []
        self.offset, self.frame_count = _exact(start or 0), None
        if not limits:
            Image.MAX_IMAGE_PIXELS = None  # Pillow has a limit of its own
        with _explained(self.path, "read the animation"):
            self.width, self.height = images.picture_size(self.path)
        if limits:
            _check_size(self.path, self.width, self.height)
        self._first = 1000 * self.offset
        first = next(iter(self), None)
        if first is None:
            raise MediaError(f"{path}: no frame from {start or 0} s to {end or 'the end'}")
        self.rate = Fraction(1000, first.duration or 40)

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first frame of the range."""
        self._first = 1000 * self.offset if pts is None else pts

    def __iter__(self) -> Iterator[Frame]:
        pts, stop = 0, None if self.end is None else 1000 * _exact(self.end)
        with _explained(self.path, "read the animation"):
            for rgb, alpha, duration in images.read_animation(self.path):
                if stop is not None and pts >= stop:
                    return
                if pts >= self._first:
                    yield Frame(rgb, pts, self.time_base, duration, alpha=alpha)
                pts += duration or 40


Reader = VideoReader | ImageFolderReader | AnimationReader


def open_reader(
    path: str | Path,
    start: float | None = None,
    end: float | None = None,
    *,
    stream: int | None = None,
    limits: bool = True,
) -> Reader:
    """A reader for a video file, an animation or a folder of pictures."""
    if Path(path).is_dir() or Path(path).suffix.lower() == ".webp":
        if stream is not None:
            raise MediaError(f"{path}: has no streams to choose from")
        kind = ImageFolderReader if Path(path).is_dir() else AnimationReader
        return kind(path, start, end, limits=limits)
    return VideoReader(path, start, end, stream=stream, limits=limits)


def open_writer(
    path: str | Path, reader: "Reader", width: int, height: int, **settings
) -> VideoWriter | ImageFolderWriter:
    """A VideoWriter if the path has a suffix, else an ImageFolderWriter; settings as theirs."""
    if Path(path).suffix:
        return VideoWriter(path, reader, width, height, **settings)
    if settings.get("options") or settings.get("lossless"):
        raise MediaError(f"{path}: a folder of PNG files takes no encoder options")
    overwrite = settings.get("overwrite", False)
    return ImageFolderWriter(path, reader, width, height, overwrite=overwrite)
