"""Reading videos: frames in order, with times, in RGB."""

import itertools
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol, Self

import av
import numpy as np
from av.error import FFmpegError
from av.format import Flags as FormatFlags
from av.video.reformatter import Interpolation

from mana_triton.video import color as colors
from mana_triton.video import images
from mana_triton.video.color import Color
from mana_triton.video.color_tags import (
    chroma_siting,
    color_of_frame,
    color_of_stream,
    color_tags,
    light_level,
    mastering_display,
)
from mana_triton.video.container import MAX_PIXELS, check_size, demuxed, is_cover, open_container
from mana_triton.video.deinterlace import Deinterlacer
from mana_triton.video.frame import (
    Frame,
    MediaError,
    Notes,
    Timed,
    exact_seconds,
    explained,
    reason,
)
from mana_triton.video.image_reader import ImageFolderReader
from mana_triton.video.timestamps import Discontinuities

MAX_STREAMS = 100

_CHAINED = ("gif", "apng")  # formats whose pictures build on all before: no seeking


class Reader(Protocol):
    """Frames of a video or of a folder of pictures, in presentation order."""

    path: Path
    files: list[Path]  # that are read
    width: int  # pixels as coded, before `rotation` is applied
    height: int
    rotation: int  # degrees counterclockwise
    display_matrix: list[int] | None  # as in the file
    sample_aspect_ratio: Fraction | None
    rate: Fraction  # nominal frames per second; the timestamps may be irregular
    time_base: Fraction  # unit of the frames' times, in seconds
    offset: Fraction  # seconds of the input that are zero of the output
    frame_count: int | None  # expected number of frames, for progress only
    bits: int  # of a channel
    color: Color
    mastering: dict[str, tuple[Fraction, ...]] | None  # HDR10 metadata as in the file
    light_level: tuple[int, int] | None
    notes: Notes
    damaged: int  # frames so far that were damaged or missing
    truncated: str | None  # after iterating, why frames are missing or damaged

    def __iter__(self) -> Iterator[Frame]: ...

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first frame of the range."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class VideoReader:
    """A video stream of a file as a Reader; iterate once after opening or `seek`.

    Args:
        path: a file of one of the CONTAINERS, in a codec that FFmpeg can decode.
        start: leave out frames before this many seconds (by seeking, not by decoding all).
        end: leave out frames at or after this many seconds.
        stream: index of the video stream in the file; None for the first.
        limits: refuse files of more than MAX_STREAMS streams or MAX_PIXELS pixels a picture.

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
        self.notes, self.truncated = Notes(), None
        self._open()
        try:
            packets = demuxed(self.path, self._container)
            self.discontinuities = Discontinuities(self._container, packets)
            if joints := self.discontinuities.count:
                self.notes.add(
                    f"timestamps are discontinuous at {joints} place{'s' * (joints > 1)}, as in"
                    " joined recordings; what follows is shifted, audio and video alike"
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
        self.stop = None if self.end is None else exact_seconds(self.end) + self._origin

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
            check_size(self.path, videos[0].width, videos[0].height)
            videos[0].codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        return videos[0]

    def _range_hint(self) -> str:
        if self.start is None and self.end is None:
            return "; the file is empty or damaged"
        lasts = f"; it ends at {self._end - self._origin:.2f} s" if self._end else ""
        return f" from {self.start or 0} s to {'the end' if self.end is None else self.end}{lasts}"

    @property
    def _end(self) -> float | None:
        """When the video ends, in seconds; None if the file does not say."""
        stream, container = self._stream, self._container
        if self.discontinuities.count:  # headers are those of one recording
            return float(self.discontinuities.ends[stream.index])
        if stream.duration:
            return float(((stream.start_time or 0) + stream.duration) * self.time_base)
        clock = re.fullmatch(r"(\d+):(\d+):(\d+(\.\d*)?)", stream.metadata.get("DURATION", ""))
        if clock:
            return int(clock[1]) * 3600 + int(clock[2]) * 60 + float(clock[3])  # Matroska
        length = container.duration if len(container.streams) == 1 else None
        return length / av.time_base if length else None

    def _describe(self, first: Timed) -> None:
        self.width, self.height, self.rotation = first.width, first.height, first.rotation
        side_data = {data.type.name: bytes(data) for data in self._side_data(first)}
        if first.rotation and not side_data:
            self.notes.add("the picture is not turned, though its EXIF asks for it")
        matrix = side_data.get("DISPLAYMATRIX")
        self.display_matrix = None if matrix is None else np.frombuffer(matrix, np.int32).tolist()
        self.sample_aspect_ratio = self._stream.sample_aspect_ratio or None
        siting = chroma_siting(self._container, self.stream_index, first.format.name)
        self.color = color_of_stream(self.path, first, siting, self.notes)
        self._first_tags, self.bits = color_tags(first), colors.bit_depth(first.format)
        tags = {key.lower(): value for key, value in self._stream.metadata.items()}
        if tags.get("alpha_mode") == "1" and not colors.has_alpha(first.format):
            self.notes.add("transparency is lost: this codec's decoder does not read it")
        self.mastering = mastering_display(side_data.get("MASTERING_DISPLAY_METADATA", b""))
        self.light_level = light_level(side_data.get("CONTENT_LIGHT_LEVEL", b""))
        self.offset = first.pts * self.time_base if self.start else self._origin
        self.frame_count = None
        if self.start is None and self.end is None and self._stream.frames:
            self.frame_count = self._stream.frames
        elif self._end:
            end = min(self._end, self._end if self.stop is None else float(self.stop))
            self.frame_count = max(1, round((end - float(first.pts * self.time_base)) * self.rate))
        self._note_lost_tags()

    def _side_data(self, frame: Timed) -> Iterable[Any]:
        """A frame's side data; none of PNG, where PyAV frees the name of a profile twice."""
        return () if self._stream.codec_context.name in ("png", "apng") else frame.side_data

    def _note_lost_data(self, frame: Timed) -> None:
        """Note what single frames carry and the output cannot."""
        kinds = {data.type.name for data in self._side_data(frame)}
        if {"DOVI_METADATA", "DYNAMIC_HDR_PLUS", "DYNAMIC_HDR_VIVID"} & kinds:
            self.notes.add("HDR metadata of single frames (Dolby Vision, HDR10+) is left out")
        if "A53_CC" in kinds:
            self.notes.add("closed captions (CEA-608, CEA-708) inside the pictures are left out")

    def _note_lost_tags(self) -> None:
        """Note which metadata a picture loses that is read as a video."""
        if self._container.format.name.endswith("_pipe"):
            with suppress(OSError):  # FFmpeg may read what Pillow cannot
                tags = images.read_picture(self.path, self.notes.add).tags
                if lost := ", ".join(name for name in tags if name != "resolution"):
                    self.notes.add(f"{lost} of a single picture left out; put it into a folder")

    def seek(self, pts: int | None) -> None:
        """Iterate from the frame with this time on; None: from the first frame of the range."""
        self._reopen()
        self._frames = self._in_range(None if pts is None else pts * self.time_base)

    def _in_range(self, begin: Fraction | None = None) -> Iterator[Timed]:
        frames = self._progressive()
        start = self._origin + exact_seconds(self.start or 0) if begin is None else begin
        seekable = self._container.format.name not in _CHAINED and not self.discontinuities.count
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
        graph: Deinterlacer | None = None
        last: Timed = None
        for frame in self._decoded():
            if graph and not graph.takes(frame):
                yield from graph.push(None)
                graph = None
            if graph is None and frame.interlaced_frame and min(frame.width, frame.height) >= 16:
                self.notes.add("the video is interlaced; deinterlaced by bwdif, frame by frame")
                graph = Deinterlacer(frame, self.time_base, last)
            yield from graph.push(frame) if graph else [frame]
            last = frame
        if graph:
            yield from graph.push(None)

    def _decoded(self) -> Iterator[Timed]:
        """All frames from here on, with increasing timestamps; damage is counted and skipped."""
        packets = self.discontinuities.corrected(demuxed(self.path, self._container, self._stream))
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
            self.notes.add("timestamps that ran backwards were corrected; check the audio sync")
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
            frame, color = (
                picture,
                color_of_frame(picture, self._first_tags, self.color, self.notes),
            )
            self._note_lost_data(picture)
            if (frame.width, frame.height) != (self.width, self.height):
                size = self.width, self.height
                self.notes.add("the picture size changes; all is scaled to {}x{}".format(*size))
                frame = frame.reformat(*size, interpolation=Interpolation.BICUBIC, threads=1)
            rgb, alpha = colors.with_uniform_bits(
                colors.to_rgb(frame, color), colors.alpha_of(frame), self.bits, self.notes
            )
            times = picture.pts, self.time_base, picture.duration
            yield Frame(rgb, *times, alpha=alpha, damaged=self.damaged)

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_reader(
    path: str | Path,
    start: float | None = None,
    end: float | None = None,
    *,
    stream: int | None = None,
    limits: bool = True,
) -> Reader:
    """A reader for a video file or a folder of pictures; arguments as of VideoReader."""
    if not Path(path).is_dir():
        return VideoReader(path, start, end, stream=stream, limits=limits)
    if stream is not None:
        raise MediaError(f"{path}: has no streams to choose from")
    return ImageFolderReader(path, start, end, limits=limits)
