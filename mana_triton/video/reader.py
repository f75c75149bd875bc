"""Files in: the frames of videos, folders of pictures and animations, in order and with times."""

import itertools
import math
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, Self, cast

import av
import av.filter
import numpy as np
from av import logging
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.format import Flags as FormatFlags
from av.sidedata.sidedata import Type as SideData
from av.stream import Stream
from av.video.reformatter import ColorRange, Interpolation
from PIL import Image

from mana_triton.video import color as colors
from mana_triton.video import images
from mana_triton.video.frame import Frame, MediaError, Timed, explained, is_cover, reason
from mana_triton.video.timeline import Timeline
from mana_triton.video.yuv import MATRICES, SITINGS, Color

MAX_PIXELS = 2**26  # of one picture of the input: 8192x8192; ours has sixteen times as many
MAX_STREAMS = 100

# FFmpeg's kinds of files that are accepted: those that hold all of their data themselves. Playlists
# (hls, concat, image2, ...) would open other files, and the network
CONTAINERS = (
    "mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg",
    "nut", "mxf", "gxf", "dv", "ivf", "rm", "wtv", "gif", "apng", "h264", "hevc", "m4v", "mjpeg",
    "obu", "yuv4mpegpipe", "png_pipe", "jpeg_pipe", "webp_pipe", "tiff_pipe", "bmp_pipe",
)  # fmt: skip

_CHAINED = ("gif", "apng")  # formats whose pictures build on all before: they are never skipped


def _nameless(kinds: type[SideData], value: object) -> SideData:
    """A name for side data of a kind that is newer than PyAV's list of them, as EXIF is.

    Beside such a frame PyAV would raise for all of its side data.
    """
    kind = object.__new__(kinds)
    kind._name_, kind._value_ = f"KIND_{value}", value
    return kind


SideData._missing_ = classmethod(_nameless)  # pyright: ignore[reportAttributeAccessIssue]


class Reader(Protocol):
    """Frames of a video, an animation or a folder of pictures, in presentation order.

    A context manager that closes the files.

    Attributes:
        path: as given; `files` are those that are read.
        start, end: seconds of the range as given; None for all.
        width, height: pixels as coded, before `rotation` (degrees counterclockwise) is applied.
        rate: nominal frames per second; the timestamps may be irregular.
        time_base: unit of the frames' times, in seconds.
        offset: seconds of the input that are zero of the output; not 0 if the start is cut.
        frame_count: expected number of frames, for progress only; None if unknown.
        bits: of a channel.
        color: what the numbers of the file mean; `colorspace`, `color_range`, `color_guessed` in
            words: "bt709", "limited", and whether that is a guess because the file does not say.
        mastering, light_level: HDR10 metadata as in the file, None if there is none.
        display_matrix, sample_aspect_ratio: as in the file, None if there is none.
        notes: lines the user should see.
        damaged: frames so far that were damaged or missing.
        truncated: after iterating, why frames are missing or damaged; None if all is well.
    """

    path: Path
    files: list[Path]
    start: float | None
    end: float | None
    width: int
    height: int
    rate: Fraction
    time_base: Fraction
    offset: Fraction
    frame_count: int | None
    bits: int
    color: Color
    colorspace: str
    color_range: str
    color_guessed: bool
    rotation: int
    display_matrix: list[int] | None
    sample_aspect_ratio: Fraction | None
    mastering: dict[str, tuple[Fraction, ...]] | None
    light_level: tuple[int, int] | None
    notes: list[str]
    damaged: int
    truncated: str | None

    def __iter__(self) -> Iterator[Frame]: ...

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first frame of the range."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class _Reader:
    """What both kinds of reader share: notes and the context manager."""

    notes: list[str]
    bits: int
    damaged = 0
    mastering: dict[str, tuple[Fraction, ...]] | None = None
    light_level: tuple[int, int] | None = None
    display_matrix: list[int] | None = None
    sample_aspect_ratio: Fraction | None = None
    truncated: str | None = None

    def _note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)

    def _announced(self, rgb: np.ndarray, alpha: np.ndarray | None) -> images.Picture:
        """The picture with the bits that are announced."""
        if (rgb.dtype == np.uint8) != (self.bits <= 8):
            self._note(f"some pictures have 8 bits, some more; all are taken with {self.bits}")
        alpha = None if alpha is None else colors.with_bits(alpha, self.bits)
        return colors.with_bits(rgb, self.bits), alpha

    def close(self) -> None:
        """Close what is open."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_container(path: Path) -> InputContainer:
    """Open a file of one of the CONTAINERS; FFmpeg may open nothing beside it.

    Raises:
        MediaError: it is of another kind.
        FFmpegError, OSError: it cannot be read.
    """
    allowed = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}

    def opened() -> InputContainer:
        return av.open(f"file:{path}", container_options=allowed, metadata_errors="replace")

    try:
        return opened()
    except ArgumentError:  # which kind it is stands in FFmpeg's log alone
        level = logging.get_level()
        logging.set_level(logging.ERROR)
        try:
            with logging.Capture() as logs, suppress(ArgumentError):
                return opened()
        finally:
            logging.set_level(level)
        kind = next((name for _, name, line in logs if "not on whitelist" in line), None)
        if kind is None:
            raise
        raise MediaError(
            f"{path}: is of the kind '{kind}', not a video that holds its own data; accepted are"
            f" {' '.join(CONTAINERS)}"
        ) from None


def description(container: InputContainer) -> str:
    """What FFmpeg says of a file: a line for each stream has what PyAV does not tell."""
    level = logging.get_level()
    logging.set_libav_level(logging.VERBOSE)
    logging.set_level(logging.VERBOSE)
    try:
        return cast(Any, container).dumps_format()
    finally:
        logging.set_libav_level(logging.INFO)  # FFmpeg's default
        logging.set_level(level)


def demuxed(path: Path, container: InputContainer, *streams: Stream) -> Iterator[Timed]:
    """The packets of a container that `open_container` opened from this path.

    Raises:
        MediaError: the system failed to read the file.
        FFmpegError: the file is damaged.
    """
    packets: Any = container.demux(*streams)
    chosen, last = [stream.index for stream in streams], None
    while True:
        try:
            packet = next(packets, None)
        except FFmpegError as error:
            # FFmpeg has numbers of its own for damage, and reports a failed read by the system's.
            # Reading an open file is always permitted: that one is a demuxer's word for damage
            if isinstance(error, OSError) and not isinstance(error, PermissionError):
                _refuse_failed_read(path, chosen, last, error)
            raise
        except IndexError:  # at the end PyAV asks for streams that only appeared on the way
            return
        if packet is None:
            return
        last = _mark(packet) if packet.size else last
        yield packet


def _refuse_failed_read(path: Path, chosen: list[int], last: Any, error: FFmpegError) -> None:
    """MediaError unless a demuxer chose the system's words for damage that it met.

    Then the file can be read without FFmpeg, and FFmpeg stops behind the same packet again; what
    ends elsewhere this time was a failure that has passed.
    """
    again, cause = None, cast(FFmpegError | OSError, error)
    try:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass
        with open_container(path) as container:
            for packet in container.demux([s for s in container.streams if s.index in chosen]):
                again = _mark(packet) if packet.size else again
    except (FFmpegError, OSError) as met:
        cause = met
        if isinstance(met, FFmpegError) and met.errno == error.errno and again == last:
            return
    raise MediaError(
        f"{path}: cannot read on: {reason(cause)}; check the disk or the connection to it"
    ) from error


def _mark(packet: Timed) -> tuple[object, ...]:
    """What tells a packet from all others of its file."""
    return packet.stream.index, packet.pos, packet.dts, packet.pts, packet.size


class VideoReader(_Reader):
    """Frames of a video stream of a file, in presentation order; iterate once.

    Args:
        path: a file of one of the CONTAINERS, in a codec that FFmpeg can decode.
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
        damaged: frames so far that were damaged or missing.
        truncated: after iterating, why frames are missing or damaged; None if all is well.
        timeline: where the file's times begin anew; those of frames go on there.

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
        self._wanted, self._limits, self.files = stream, limits, [self.path]
        self.notes, self.truncated = [], None
        self._open()
        try:
            self.timeline = Timeline(self._container, demuxed(self.path, self._container))
            if joints := self.timeline.joints:
                self._note(
                    f"times begin anew at {joints} place{'s' * (joints > 1)}, as of joined"
                    " recordings; what follows is moved, sound and picture by the same amount"
                )
            self._reopen()
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
        with explained(self.path, "read it as a video"):
            self._container = open_container(self.path)
        try:
            self._stream = stream = self._choose_stream()
        except BaseException:
            self._container.close()
            raise
        stream.thread_type = "SLICE"  # frame threads hold frames, and lose them at damaged ends
        self.damaged = 0
        self.stream_index, self.time_base = stream.index, stream.time_base or 1 / Fraction(90000)
        rates = (stream.average_rate, stream.guessed_rate)
        self.rate = next((rate for rate in rates if rate and 1 <= rate <= 1000), Fraction(25))
        # broadcast recordings start at an arbitrary time; other files start when they say
        self._origin = Fraction(0)
        if self._container.format.flags & FormatFlags.ts_discont.value:
            ticks = Fraction(self._container.start_time or 0, av.time_base) // self.time_base
            self._origin = ticks * self.time_base
        self.stop = None if self.end is None else _exact(self.end) + self._origin

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def _choose_stream(self) -> av.VideoStream:
        streams, wanted = self._container.streams, self._wanted
        if self._limits and len(streams) > MAX_STREAMS:
            raise MediaError(
                f"{self.path}: has {len(streams)} streams, more than {MAX_STREAMS};"
                " use --no-limits if you trust it"
            )
        videos = [s for s in streams.video if not is_cover(s)]
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
        """When the video ends, in seconds, as far as the file says; None if they do not say."""
        stream, container = self._stream, self._container
        if self.timeline.joints:  # headers are those of one recording
            return float(self.timeline.ends[stream.index])
        if stream.duration:
            return float(((stream.start_time or 0) + stream.duration) * self.time_base)
        clock = re.fullmatch(r"(\d+):(\d+):(\d+(\.\d*)?)", stream.metadata.get("DURATION", ""))
        if clock:
            return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])  # Matroska
        length = container.duration if len(container.streams) == 1 else None
        return length / av.time_base if length else None

    def _describe(self, first: Timed) -> None:
        self.width, self.height, self.rotation = first.width, first.height, first.rotation
        side_data = {data.type.name: bytes(data) for data in self._beside(first)}
        if first.rotation and not side_data:
            self._note("the picture is not turned, though its EXIF asks for it")
        matrix = side_data.get("DISPLAYMATRIX")
        self.display_matrix = None if matrix is None else np.frombuffer(matrix, np.int32).tolist()
        self.sample_aspect_ratio = self._stream.sample_aspect_ratio or None
        self._said = _color_tags(first)
        self.color, self.bits = self._find_color(first), colors.depth(first.format)
        tags = {key.lower(): value for key, value in self._stream.metadata.items()}
        if tags.get("alpha_mode") == "1" and not colors.has_alpha(first.format):
            self._note("transparency is lost: this codec's decoder does not read it")
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
        self._name_lost_tags()

    def _beside(self, frame: Timed) -> Iterable[Any]:
        """A frame's side data; none of PNG.

        PyAV frees the name of a profile that side data hold although it is the frame's, and PNG's
        decoder is the one that names them.
        """
        return () if self._stream.codec_context.name in ("png", "apng") else frame.side_data

    def _name_lost_data(self, frame: Timed) -> None:
        """Note what stands beside the pixels of single frames and cannot be written."""
        kinds = {data.type.name for data in self._beside(frame)}
        if {"DOVI_METADATA", "DYNAMIC_HDR_PLUS", "DYNAMIC_HDR_VIVID"} & kinds:
            self._note("HDR metadata of single frames (Dolby Vision, HDR10+) is left out")
        if "A53_CC" in kinds:
            self._note("closed captions (CEA-608, CEA-708) inside the pictures are left out")

    def _name_lost_tags(self) -> None:
        """Note what a picture that is read as a video loses."""
        if not self._container.format.name.endswith("_pipe"):
            return
        with suppress(OSError):  # FFmpeg may read what Pillow cannot
            tags = images.picture_tags(self.path, self._note)
            if named := ", ".join(what for what in tags if what != "resolution"):
                self._note(f"{named} of a single picture left out; put it into a folder")

    def _find_color(self, first: av.VideoFrame) -> Color:
        name, matrix = first.format.name, first.colorspace
        full = bool(_color_tags(first)[1])
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
        if matrix not in MATRICES:
            raise MediaError(
                f"{self.path}: color matrix {matrix} is not supported; convert it to BT.709 first"
            )
        return Color(matrix, full, first.color_primaries, first.color_trc, siting=siting)

    def _color_of(self, frame: av.VideoFrame) -> Color:
        """How this frame is decoded: as the first, unless it says otherwise of matrix or range."""
        if (said := _color_tags(frame)) == self._said:
            return self.color
        color, known = self.color, (0, 2)  # H.273: reserved, and unspecified
        if any(
            code not in known and code != before
            for code, before in zip(said[2:], (color.primaries, color.transfer), strict=True)
        ):
            self._note(
                "primaries or transfer of the colors change: the codes are kept, and the output has"
                " the tags of its first frame; enlarge the parts one by one (--start, --end)"
            )
        matrix = said[0] if said[0] in MATRICES else color.matrix
        if said[0] not in (*known, matrix) and not frame.format.is_rgb:
            self._note(f"color matrix {said[0]} midway is not supported; taken as {color.name}")
        full = color.full_range if said[1] is None else said[1]
        own = replace(color, matrix=matrix, full_range=full)
        if (own.name, full) != (color.name, color.full_range):
            self._note("matrix or range of the colors change; each frame is decoded by its own")
        return own

    def _find_siting(self, form: str) -> str:
        """Where chroma lies."""
        described = description(self._container)
        line = re.search(rf"Stream #0:{self.stream_index}\b.*Video: .*", described)
        names = "|".join(sorted(SITINGS, key=len, reverse=True))
        said = re.search(rf"{form}\([^)]*\b({names})\)", line[0]) if line else None
        return said[1] if said else "left"

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first frame of the range."""
        self._reopen()
        self._frames = self._in_range(None if pts is None else pts * self.time_base)

    def _in_range(self, begin: Fraction | None = None) -> Iterator[Timed]:
        frames = self._progressive()
        start = self._origin + _exact(self.start or 0) if begin is None else begin
        seekable = self._container.format.name not in _CHAINED and not self.timeline.joints
        if (self.start or begin is not None) and seekable:
            with suppress(FFmpegError):
                # one second early, because seeking goes by decoding time, which B frames shift
                self._container.seek(int((start - 1) / self.time_base), stream=self._stream)
            first = next(frames, None)
            if first is None or first.pts * self.time_base > start:  # failed or overshot
                self._reopen()
                frames = self._progressive()
            else:
                frames = itertools.chain([first], frames)
        for frame in frames:
            time = frame.pts * self.time_base
            if self.stop is not None and time >= self.stop:
                return
            if time >= start:
                self.damaged += frame.is_corrupt
                yield frame

    def _progressive(self) -> Iterator[Timed]:
        """All frames from here on, the interlaced ones deinterlaced."""
        graph: _Deinterlacer | None = None
        last: Timed = None
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

    def _decoded(self) -> Iterator[Timed]:
        """All frames from here on, with increasing timestamps; damage is counted and skipped."""
        packets = self.timeline.along(demuxed(self.path, self._container, self._stream))
        last, lasts, stopped = None, 0, None
        while True:
            try:
                packet = next((p for p in packets if p.size), None)
            except FFmpegError as error:
                packet, stopped = None, reason(error)
            try:
                frames = self._stream.decode(packet)
            except FFmpegError:
                self.damaged += 1
                frames = []
            for frame in frames:
                last, lasts = self._increasing(frame, last), frame.duration
                frame.pts = last
                yield frame
            if packet is None:
                self._judge_end(last, lasts, stopped)
                return

    def _increasing(self, frame: Timed, last: int | None) -> int:
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
        elif self.damaged:
            self.truncated = f"frames damaged or missing: {self.damaged}"

    def __iter__(self) -> Iterator[Frame]:
        for picture in self._frames:
            frame, color = picture, self._color_of(picture)
            self._name_lost_data(picture)
            if (frame.width, frame.height) != (self.width, self.height):
                self._note(f"the picture size changes; all is scaled to {self.width}x{self.height}")
                size = self.width, self.height
                frame = frame.reformat(*size, interpolation=Interpolation.BICUBIC, threads=1)
            rgb, alpha = self._announced(colors.to_rgb(frame, color), colors.alpha_of(frame))
            times = picture.pts, self.time_base, picture.duration
            yield Frame(rgb, *times, alpha=alpha, damaged=self.damaged)

    def close(self) -> None:
        """Close the file."""
        self._container.close()


class _Deinterlacer:
    """FFmpeg's bwdif: one progressive frame for each frame; progressive ones pass unchanged.

    A frame depends on itself and its two neighbors alone, so that decoding may begin anywhere:
    the filter is given all frames as interlaced ones, and `before`, if there was a frame of that
    kind before the first. Left to skip the progressive ones, it would treat an interlaced one after
    them otherwise at the start of a file than in its middle.
    """

    def __init__(self, frame: Timed, time_base: Fraction, before: Timed):
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
        self._held: deque[Timed] = deque()  # frames in the filter; None where it is in no result
        if before is not None and self.takes(before):
            self._graph.vpush(before)
            self._held.append(None)

    def takes(self, frame: Timed) -> bool:
        return (frame.width, frame.height, frame.format.name) == self._kind

    def push(self, frame: Timed) -> Iterator[Timed]:
        """Put in one frame, None at the end, and take out what is ready."""
        self._graph.vpush(frame)
        if frame is not None:
            self._held.append(frame)
        while True:
            try:
                done: Timed = self._graph.vpull()
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

    rotation = 0
    frame_count: int | None
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
        with explained(self.path, "list the folder"):
            names = sorted(self.path.iterdir(), key=_natural)
        self.files = [
            file
            for file in names
            if file.suffix.lower() in images.SUFFIXES
            and not file.name.startswith(".")
            and file.is_file()
        ]
        if not self.files:
            raise MediaError(f"{path}: holds no pictures ({' '.join(images.SUFFIXES)})")
        first = 0 if start is None else math.ceil(_exact(start) * self.rate)
        last = None if end is None else math.ceil(_exact(end) * self.rate)
        self.files = self.files[first:last]
        if not self.files:
            raise MediaError(f"{path}: has no pictures from {start or 0} s to {end or 'the end'}")
        self.frame_count, self._first = len(self.files), 0
        if not limits:
            Image.MAX_IMAGE_PIXELS = None  # Pillow has a limit of its own
        self.width, self.height = _picture_size(self.files[0], limits)
        self.bits, more = 8, 0
        for file in self.files:  # now rather than after hours of work
            size = _picture_size(file, limits)
            with explained(file, "read the picture"):
                self.bits = max(self.bits, images.picture_bits(file))
                more += images.has_more(file)
            if size != (self.width, self.height):
                raise MediaError(
                    f"{file}: is {size[0]}x{size[1]}, but {self.files[0].name} is"
                    f" {self.width}x{self.height}; all pictures must have one size"
                )
        if more:
            self._note(f"{more} of the files hold several pictures; the first of each is taken")

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first one."""
        self._first = pts or 0

    def __iter__(self) -> Iterator[Frame]:
        for index, file in enumerate(self.files[self._first :], self._first):
            with explained(file, "read the picture"):
                rgb, alpha, tags = images.read_picture(file, self._note)
            rgb, alpha = self._announced(rgb, alpha)
            if rgb.shape[:2] != (self.height, self.width):
                raise MediaError(
                    f"{file}: was {self.width}x{self.height} when the work began, and is"
                    f" {rgb.shape[1]}x{rgb.shape[0]} now; put back the pictures of before"
                )
            yield Frame(rgb, index, self.time_base, 1, file.stem, alpha, tags=tags)


class AnimationReader(_Reader):
    """The pictures of an animated WebP, which FFmpeg cannot read; attributes as VideoReader's."""

    rotation, bits = 0, 8
    frame_count: int | None
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
        self.offset, self.frame_count, self.files = _exact(start or 0), None, [self.path]
        if not limits:
            Image.MAX_IMAGE_PIXELS = None  # Pillow has a limit of its own
        self.width, self.height = _picture_size(self.path, limits)
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
        with explained(self.path, "read the animation"):
            for rgb, alpha, duration, tags in images.read_animation(self.path, self._note):
                if stop is not None and pts >= stop:
                    return
                if pts >= self._first:
                    yield Frame(rgb, pts, self.time_base, duration, alpha=alpha, tags=tags)
                pts += duration or 40


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


def _picture_size(file: Path, limits: bool) -> tuple[int, int]:
    with explained(file, "read the picture"):
        if limits:  # before the pixels are unpacked
            _check_size(file, *images.coded_size(file))
        return images.picture_size(file)


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path}: pictures of {width}x{height} are larger than {MAX_PIXELS} pixels;"
            " use --no-limits if you trust the file and have the memory"
        )


def _color_tags(frame: av.VideoFrame) -> tuple[int, bool | None, int, int]:
    """Matrix, whether the range is full (None: not said), primaries and transfer."""
    full = frame.color_range == ColorRange.JPEG
    if frame.color_range == ColorRange.UNSPECIFIED:
        full = True if frame.format.name.startswith("yuvj") else None
    return frame.colorspace, full, frame.color_primaries, frame.color_trc


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


def _natural(file: Path) -> list[tuple[int, str]]:
    """Sort key under which frame2 comes before frame10."""
    parts = re.split(r"([0-9]+)", file.name)  # text and numbers alternate
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]


def _exact(seconds: float) -> Fraction:
    """The decimal number that was meant: 0.4 is 2/5, the float nearest to it is a little more."""
    return Fraction(str(seconds))
