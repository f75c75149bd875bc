"""Remuxing: other streams are copied packet by packet, with chapters and tags."""

import io
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
from av.container import OutputContainer
from av.error import FFmpegError, InvalidDataError
from av.format import Flags
from av.stream import Stream

from mana_triton.video.container import TS_CODECS, demuxed, description, is_cover, open_container
from mana_triton.video.frame import MP4_LIKE, MediaError, Notes, Timed, explained, reason
from mana_triton.video.reader import VideoReader

# codec of text subtitles in each container
_SUBTITLES = {
    ".mp4": "mov_text", ".m4v": "mov_text", ".mov": "mov_text", ".mkv": "subrip", ".webm": "webvtt",
}  # fmt: skip
# languages with two codes in ISO 639-2, of which QuickTime knows the other one
_QUICKTIME_LANGUAGES = {"deu": "ger", "nld": "dut", "ell": "gre", "isl": "ice", "zho": "chi"}
# tags that describe the input file rather than its content
_STALE_TAG = re.compile(
    "major_brand|minor_version|compatible_brands|encoder|duration|bps|number_of_(frames|bytes)"
    "|bps-.*|number_of_(frames|bytes)-.*|_statistics_.*|vendor_id|alpha_mode",
    re.IGNORECASE,
)
# tags that mp4 stores where every player looks; others need a newer place that few read
_CLASSIC_TAG = re.compile(
    "title|artist|album_artist|album|composer|date|comment|genre|copyright|grouping|lyrics"
    "|description|synopsis|show|episode_id|network|keywords|creation_time|location|track|disc"
)


class Remuxer:
    """Copies everything but the enlarged video from the reader's file.

    Args:
        reader: of the frames; its file is opened a second time.
        path: of the output, for its suffix and for messages.
        output: the container, before its header is written.
        video: its stream of enlarged frames, which gets the tags of the old one.
        notes: receives what cannot be kept.
    """

    def __init__(
        self,
        reader: VideoReader,
        path: Path,
        output: OutputContainer,
        video: av.VideoStream,
        notes: Notes,
    ):
        self._reader, self._path, self._output, self._notes = reader, path, output, notes
        self._suffix = path.suffix.lower()
        with explained(reader.path, "read it again"):
            self._source = open_container(reader.path)
        self._copy_tags(video)
        self._targets: dict[int, Any] = {}
        self._converted: dict[int, Any] = {}  # subtitles
        for stream in self._source.streams:
            if stream.index != reader.stream_index:
                self._add(stream)
        if reader.start and not reader.discontinuities.count:
            with suppress(FFmpegError):  # without seeking it only takes longer
                self._source.seek(int((reader.offset - 1) * av.time_base))
        streams = [self._source.streams[index] for index in self._targets]
        packets = demuxed(reader.path, self._source, *streams) if streams else iter(())
        self._packets = reader.discontinuities.corrected(packets)
        self._waiting: Timed = None
        # the earliest decoding time of each stream's next packet, in ticks of the output
        self._earliest: dict[int, int] = {}
        self._is_strict = not output.format.flags & Flags.ts_nonstrict.value

    def _copy_tags(self, video: av.VideoStream) -> None:
        tags = _kept(self._source.metadata)
        self._output.metadata.update(tags)
        if self._suffix in MP4_LIKE and not all(map(_CLASSIC_TAG.fullmatch, tags)):
            self._output.container_options["movflags"] = "use_metadata_tags"
        picture = self._source.streams[self._reader.stream_index]
        video.metadata.update(_kept(picture.metadata))
        video.disposition = picture.disposition
        stop, chapters = self._reader.stop, []
        for chapter in cast(list[Any], self._source.chapters()):
            tick = chapter["time_base"]
            shift = round(self._reader.offset / tick)
            end = chapter["end"] if stop is None else min(chapter["end"], round(stop / tick))
            if end - shift > max(0, chapter["start"] - shift):
                start = max(0, chapter["start"] - shift)
                chapters.append(chapter | {"start": start, "end": end - shift})
        lost = {".ts": ("chapters", "tags"), ".avi": ("chapters",)}.get(self._suffix, ())
        for what in [name for name in lost if {"chapters": chapters, "tags": tags}[name]]:
            self._notes.add(f"{self._suffix} files cannot hold {what}")
        if chapters:
            self._output.set_chapters(chapters)

    def _add(self, stream: Any) -> None:
        """Make a stream of the output that takes this one's packets, or note that it cannot be."""
        codec = getattr(stream, "name", None)  # a stream of unknown codec has no such attribute
        if stream.type == "data" and self._source.chapters() and self._is_chapters(stream):
            return  # mp4 stores chapters so; they are written from `chapters`
        if stream.type == "data" and "timecode" in stream.metadata and self._suffix in MP4_LIKE:
            return  # written from the tag of the video
        name = f"{stream.type} stream {stream.index} ({codec or 'unknown'})"
        if stream.type == "audio" and codec and not stream.codec_context.sample_rate:
            self._notes.add(f"{name} is left out: FFmpeg finds no sample rate near its start")
            return
        if not self._can_hold(stream):
            if stream.type == "audio" and codec:
                raise MediaError(
                    f"{self._path}: '{self._suffix}' files cannot hold the input's {name};"
                    " write a .mkv file"
                )
            if stream.type == "subtitle" and codec and (kind := self._text_kind(stream)):
                target: Any = self._output.add_stream(kind)
                self._converted[stream.index] = target
                target.codec_context.subtitle_header = stream.codec_context.subtitle_header
                target.codec_context.time_base = target.time_base = stream.time_base
                self._describe(target, stream)
                self._notes.add(f"{name} is converted to {kind}; its styles may be lost")
            else:
                self._notes.add(f"{name} is left out")
            return
        target: Any = self._output.add_stream_from_template(stream, opaque=True)
        if stream.type == "video" and stream.sample_aspect_ratio:  # no parameter of the codec
            target.sample_aspect_ratio = stream.sample_aspect_ratio
        self._describe(target, stream)

    def _is_chapters(self, stream: Any) -> bool:
        """Whether a data stream of mp4 is its chapters, which only the tag in the file tells."""
        line = rf"Stream #0:{stream.index}\b.*Data: bin_data \(text /"
        return bool(re.search(line, description(self._source)))

    def _describe(self, target: Any, stream: Any) -> None:
        target.metadata.update(_kept(stream.metadata))
        language = target.metadata.get("language", "")
        if self._suffix == ".mov" and language in _QUICKTIME_LANGUAGES:
            target.metadata["language"] = _QUICKTIME_LANGUAGES[language]
        target.disposition = stream.disposition
        if stream.type != "attachment":
            self._targets[stream.index] = target

    def _can_hold(self, stream: Stream) -> bool:
        """Whether a file like the output with this stream alone gets a header."""
        codec = getattr(stream.codec_context, "codec", None)
        if stream.type == "attachment":
            return self._suffix == ".mkv"
        if self._suffix == ".avi" and stream.type != "audio":
            return False
        name = codec.canonical_name if codec else getattr(stream, "name", None) or ""
        if self._suffix == ".ts" and not TS_CODECS.fullmatch(name):
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
        return _SUBTITLES.get(self._suffix) if stream.codec_context.subtitle_header else None

    def until(self, seconds: Fraction | None) -> None:
        """Copy the packets up to this time of the input; None copies all that is left."""
        while packet := self._waiting or self._next():
            self._waiting = packet
            stamp = packet.pts if packet.dts is None else packet.dts
            if None not in (seconds, stamp) and stamp * packet.time_base > seconds:
                return
            self._waiting = None
            if self._is_in_range(packet):
                is_text = packet.stream.index in self._converted
                for ready in self._as_text(packet) if is_text else [packet]:
                    self._mux(ready, packet.stream.index)

    def _next(self) -> Timed:
        try:
            return next((p for p in self._packets if p.size and not p.is_corrupt), None)
        except FFmpegError as error:
            self._notes.add(f"copying of other streams stopped: {reason(error)}")
            return None

    def _is_in_range(self, packet: Timed) -> bool:
        if packet.pts is None or is_cover(packet.stream):
            return True
        time, stop = packet.pts * packet.time_base, self._reader.stop
        # avi has no negative times, and would delay the picture by a whole frame instead
        cut = self._reader.start or self._suffix == ".avi"
        after_start = not cut or time >= self._reader.offset
        return after_start and (stop is None or time < stop)

    def _as_text(self, packet: Timed) -> Iterator[Timed]:
        """The packet in the output's kind of subtitles; nothing for an empty one."""
        try:
            lines = packet.stream.codec_context.decode2(packet)
            if lines is None or not len(lines):
                return
            text = self._converted[packet.stream.index].codec_context.encode_subtitle(lines)
        except FFmpegError as error:
            self._notes.add(f"a subtitle was left out: {reason(error)}")
            return
        text.pts = text.dts = packet.pts
        text.time_base, text.duration = packet.time_base, packet.duration
        yield text

    def _mux(self, packet: Timed, index: int) -> None:
        if shift := round(self._reader.offset / packet.time_base):
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
        self._keep_order(packet, index)
        packet.stream = self._targets[index]
        try:
            self._output.mux_one(packet)
        except InvalidDataError:  # the input's fault, not the disk's
            self._notes.add("damaged sound was left out")

    def _keep_order(self, packet: Timed, index: int) -> None:
        """Move a packet that would come before the last one, which no container takes."""
        if packet.dts is None:
            return
        target = self._targets[index]
        ticks = packet.time_base / cast(Fraction, target.time_base)
        dts, least = math.floor(packet.dts * ticks + Fraction(1, 2)), self._earliest.get(index)
        if least is not None and dts < least:
            pts = dts if packet.pts is None else math.floor(packet.pts * ticks + Fraction(1, 2))
            packet.duration = round((packet.duration or 0) * ticks)
            packet.dts, packet.pts, packet.time_base = least, max(pts, least), target.time_base
            dts = least
            self._notes.add(f"times of stream {index} that ran backwards were corrected")
        self._earliest[index] = dts + (self._is_strict and target.type in ("audio", "video"))

    def close(self) -> None:
        """Close the input."""
        self._source.close()


def _kept(metadata: Mapping[str, str]) -> dict[str, str]:
    """The tags that are still true of the output."""
    tags = {key: value for key, value in metadata.items() if not _STALE_TAG.fullmatch(key)}
    if "name" in tags:  # how FFmpeg reads, but does not write, a track title in mp4
        tags.setdefault("title", tags.pop("name"))
    return tags
