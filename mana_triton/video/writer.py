"""Video files and image folders in and out, through PyAV: exact pixels, everything else kept.

    with open_reader("in.mp4") as reader, open_writer("out.mp4", reader, width, height) as writer:
        for frame in reader:
            writer.write(enlarge(frame.rgb), frame)

Here are the writers; readers.py, encoder.py and copier.py do the rest.

Pixels are full-range RGB, uint8, or uint16 if the file has more than 8 bits; color.py converts
them. Timestamps are the input's. Audio, subtitles, fonts, other streams, chapters and tags are
copied without re-encoding; subtitles that the container cannot hold as they are become its own
kind of text. Interlaced frames are deinterlaced, one for one. An output has its final name only
once it is complete.
"""

import itertools
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

import av
import numpy as np
from av.error import FFmpegError
from torch import Tensor

from mana_triton.video import color as colors
from mana_triton.video import images
from mana_triton.video.encoder import ENCODERS, EncodeOptions, Pixels, VideoEncoder
from mana_triton.video.frame import MP4_LIKE, Frame, MediaError, Timed, explained, hidden, sync
from mana_triton.video.reader import (
    MAX_PIXELS,
    MAX_STREAMS,
    AnimationReader,
    ImageFolderReader,
    Reader,
    VideoReader,
    open_reader,
)
from mana_triton.video.remux import Copier

__all__ = [
    "ENCODERS",
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "MAX_STREAMS",
    "VIDEO_SUFFIXES",
    "AnimationReader",
    "Frame",
    "ImageFolderReader",
    "ImageFolderWriter",
    "MediaError",
    "Reader",
    "VideoEncoder",
    "VideoReader",
    "VideoWriter",
    "open_reader",
    "open_writer",
]

# that can be written
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".ts", ".nut")
IMAGE_SUFFIXES = images.SUFFIXES


class Writer(Protocol):
    """Writes frames; a context manager that finishes the output, or deletes it after an error.

    Attributes:
        path: the final name.
        notes: lines the user should see.
        planes: makes of a picture [height, width, 3] RGB, on any device, the planes that `write`
            takes as well; None where only RGB is written.
    """

    path: Path
    notes: list[str]

    @property
    def planes(self) -> Callable[[Tensor], list[Tensor]] | None: ...

    def write(self, picture: Pixels, frame: Frame) -> object:
        """Write one picture, [height, width, 3] RGB or its `planes`, at the time of `frame`."""
        ...

    def close(self) -> None:
        """Finish the output and give it its name."""
        ...

    def abort(self) -> None:
        """Delete what was written so far; nothing to do after close."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type | None, *_: object) -> None: ...


def check_picture(picture: Pixels, width: int, height: int) -> None:
    """ValueError unless the picture, RGB or planes, has this size and an integer type."""
    first = picture if isinstance(picture, np.ndarray) else picture[0]
    channels = (3,) if first is picture else first.shape[2:]
    wanted = height, width, *channels
    if first.shape != wanted or first.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"a picture must be {list(wanted)} uint8 or uint16, got {list(first.shape)}"
            f" {first.dtype}"
        )


class _Writer:
    """What both kinds of writer share: checks, the temporary name and the context manager."""

    notes: list[str]

    def __init__(self, path: str | Path, reader: Reader, width: int, height: int):
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
        return part or hidden(path)

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


class VideoWriter(_Writer):
    """Encodes frames; copies everything else of the reader's file beside them.

    Args:
        path: output; its suffix chooses the container.
        reader: where the frames come from: timestamps, colors, rotation, audio, tags.
        width, height: of the frames to be written, pixels.
        options: encoder and settings.
        overwrite: replace an existing output.
        part: name of the file while it grows, on the disk of `path`; None: a hidden one beside.

    Attributes:
        time_base, headers, planes: of the encoder, see VideoEncoder.
        notes: lines the user should see.

    Raises:
        MediaError: the output cannot be written as asked; nothing is left behind.
    """

    def __init__(
        self,
        path: str | Path,
        reader: Reader,
        width: int,
        height: int,
        options: EncodeOptions = EncodeOptions(),
        *,
        overwrite: bool = False,
        part: Path | None = None,
    ):
        super().__init__(path, reader, width, height)
        self._copier: Copier | None = None
        self._encoded = self._completed = self._finished = False
        if self.suffix not in VIDEO_SUFFIXES:
            known = " ".join(VIDEO_SUFFIXES)
            raise MediaError(f"{path}: cannot write '{self.suffix}' files; use one of {known}")
        if self.path.is_dir():
            raise MediaError(f"{path}: is a folder; give a file name")
        self._part = self._claim(overwrite, part)
        self._container = av.open(f"file:{self._part}", "w")  # creates no file yet
        try:
            with explained(self.path, "write"):
                self._open(options)
        except BaseException:
            self.abort()
            raise

    def _open(self, options: EncodeOptions) -> None:
        reader = self._reader
        if self.suffix in MP4_LIKE:  # start offsets are rounded to this; FFmpeg's default is 1 ms
            ticks = str(max(1000, reader.time_base.denominator))
            self._container.container_options["movie_timescale"] = ticks
        size = self.width, self.height
        self._encoder = VideoEncoder(self.path, reader, *size, self._container, options)
        self._stream, self.headers = self._encoder.stream, self._encoder.headers
        self.time_base, self.planes = self._encoder.time_base, self._encoder.planes
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
            self._copier = Copier(reader, self)
        self._container.start_encoding()

    def write(self, picture: Pixels, frame: Frame) -> None:
        """Encode one picture, [height, width, 3] RGB or its `planes`, at the time of `frame`."""
        check_picture(picture, self.width, self.height)
        self._encoded = True
        with explained(self.path, "write"):
            if self._copier:
                self._copier.until(frame.pts * frame.time_base)
            for packet in self._encoder.encode(picture, frame):
                self._container.mux_one(packet)

    def put(self, packet: Timed) -> None:
        """Write a packet that an encoder with the same settings made; no `write` beside it."""
        with explained(self.path, "write"):
            if self._copier:
                self._copier.until(packet.dts * packet.time_base + self._reader.offset)
            packet.stream = self._stream
            self._container.mux_one(packet)

    def complete(self) -> None:
        """Finish the file, under the name it grew with, and make sure that it is on the disk."""
        if self._completed or self._finished:
            return
        try:
            with explained(self.path, "write"):
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
            with explained(self.path, "write"):
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


class ImageFolderWriter(_Writer):
    """Writes frames as PNG files into a folder that gets its name when it is complete.

    Pictures have the bits of the input; transparency is enlarged by bicubic interpolation.

    Args are those of VideoWriter. Files are named as the input's pictures, or 00000000.png, ...;
    `part` may be a folder that holds the first `count` of them.
    """

    planes = None

    def __init__(
        self,
        path: str | Path,
        reader: Reader,
        width: int,
        height: int,
        *,
        overwrite: bool = False,
        part: Path | None = None,
        count: int = 0,
    ):
        super().__init__(path, reader, width, height)
        self._count, self._overwrite = count, overwrite
        self._check_place()
        stems = sorted(file.stem for file in reader.files)
        for one, next_one in itertools.pairwise(stems):
            if one == next_one:
                raise MediaError(f"{reader.path}: two pictures are called '{one}'; rename one")
        self._part = self._claim(overwrite, part)
        with explained(self.path, "write"):
            self._part.mkdir(exist_ok=part is not None)

    def _check_place(self) -> None:
        path = self.path
        if path.is_file():
            raise MediaError(f"{path}: is a file; give a folder or a video file name")
        if path.is_dir() and any(file.suffix != ".png" for file in path.iterdir()):
            raise MediaError(f"{path}: holds other things than PNG files; choose another folder")

    def write(self, picture: Pixels, frame: Frame) -> Path:
        """Write one picture, [height, width, 3] RGB, under the name of `frame`."""
        rgb = np.asarray(picture)
        check_picture(rgb, self.width, self.height)
        alpha = frame.alpha
        if alpha is not None:
            alpha = self._enlarged(alpha)
        name = frame.name or f"{self._count:08d}"
        self._count += 1
        with explained(self.path, "write"):
            images.write_picture(self._part / f"{name}.png", rgb, alpha, frame.tags)
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
        # somebody may have put something there in the meantime
        self._check_place()
        self._claim(self._overwrite)
        with explained(self.path, "write"):
            old = self._part.with_suffix(".old")
            if self.path.exists():
                self.path.replace(old)
            try:
                self._part.replace(self.path)
            except OSError:
                if old.exists():
                    old.replace(self.path)
                raise
            shutil.rmtree(old, ignore_errors=True)

    def abort(self) -> None:
        """Delete what was written so far; nothing to do after close."""
        shutil.rmtree(self._part, ignore_errors=True)


def open_writer(
    path: str | Path,
    reader: Reader,
    width: int,
    height: int,
    options: EncodeOptions = EncodeOptions(),
    *,
    overwrite: bool = False,
    part: Path | None = None,
) -> Writer:
    """A VideoWriter if the path has a suffix, else an ImageFolderWriter; arguments as theirs."""
    if Path(path).suffix:
        return VideoWriter(path, reader, width, height, options, overwrite=overwrite, part=part)
    if options.options or options.lossless:
        raise MediaError(f"{path}: a folder of PNG files takes no encoder options")
    return ImageFolderWriter(path, reader, width, height, overwrite=overwrite, part=part)
