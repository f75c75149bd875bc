"""Containers as FFmpeg opens them: which are accepted, and their packets."""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import av
from av import logging
from av.container import InputContainer
from av.error import ArgumentError
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition, Stream

from mana_triton.video.frame import MediaError, Timed, reason

MAX_PIXELS = 2**26  # of a picture of the input: 8192x8192; ours has sixteen times as many

# FFmpeg's formats that are accepted: those that hold all of their data themselves. Playlists
# (hls, concat, image2, ...) would open other files, and the network
CONTAINERS = (
    "mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "mpegvideo", "flv", "asf", "ogg",
    "nut", "mxf", "gxf", "dv", "ivf", "rm", "wtv", "gif", "apng", "h264", "hevc", "m4v", "mjpeg",
    "obu", "yuv4mpegpipe", "png_pipe", "jpeg_pipe", "webp_pipe", "tiff_pipe", "bmp_pipe",
)  # fmt: skip

# codecs that a transport stream can name; FFmpeg writes others as data that nobody can read
TS_CODECS = re.compile(
    "h264|hevc|mpeg[124]video|mpeg4|vc1|aac|aac_latm|mp[123]|e?ac3|dts|truehd|opus|s302m"
    "|dvb_subtitle|dvb_teletext|hdmv_pgs_subtitle|klv|scte_35|timed_id3"
)


def _unknown_kind(kinds: type[SideData], value: object) -> SideData:
    """A name for side data that PyAV does not list, as EXIF; it would raise for all of a frame."""
    kind = object.__new__(kinds)
    kind._name_, kind._value_ = f"KIND_{value}", value
    return kind


SideData._missing_ = classmethod(_unknown_kind)  # pyright: ignore[reportAttributeAccessIssue]


def open_container(path: Path) -> InputContainer:
    """Open a file of one of the CONTAINERS; FFmpeg may open nothing else.

    Raises:
        MediaError: it is of another format.
        FFmpegError, OSError: it cannot be read.
    """
    allowed = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}

    def opened() -> InputContainer:
        return av.open(f"file:{path}", container_options=allowed, metadata_errors="replace")

    try:
        return opened()
    except ArgumentError:  # only FFmpeg's log names the format
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
            f"{path}: is of the format '{kind}', not a video that holds its own data; accepted are"
            f" {' '.join(CONTAINERS)}"
        ) from None


def demuxed(path: Path, container: InputContainer, *streams: Stream) -> Iterator[Timed]:
    """The packets of a container that `open_container` opened from this path.

    Raises:
        MediaError: the system failed to read the file.
        FFmpegError: the file is damaged.
    """
    packets: Any = container.demux(*streams)
    try:
        yield from packets
    except IndexError:  # at the end PyAV asks for streams that only appeared on the way
        return
    except PermissionError:  # a demuxer's word for damage, as an open file may be read
        raise
    except OSError as error:  # FFmpeg has other errors for damage
        raise MediaError(
            f"{path}: cannot read on: {reason(error)}; check the disk or the connection to it"
        ) from error


def description(container: InputContainer) -> str:
    """FFmpeg's text about a file: a line for each stream has what PyAV does not tell."""
    level = logging.get_level()
    logging.set_libav_level(logging.VERBOSE)
    logging.set_level(logging.VERBOSE)
    try:
        return cast(Any, container).dumps_format()
    finally:
        logging.set_libav_level(logging.INFO)  # FFmpeg's default
        logging.set_level(level)


def check_size(path: Path, width: int, height: int) -> None:
    """MediaError if pictures of this size have more than MAX_PIXELS."""
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{path}: pictures of {width}x{height} are larger than {MAX_PIXELS} pixels;"
            " use --no-limits if you trust the file and have the memory"
        )


def is_cover(stream: Stream) -> bool:
    """Whether a video stream is a cover picture."""
    return bool(stream.disposition & Disposition.attached_pic)
