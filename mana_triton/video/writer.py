"""Writing frames to video files and folders of PNG files, with everything else of the input.

    with open_reader("in.mp4") as reader, open_writer("out.mp4", reader, width, height) as writer:
        for frame in reader:
            writer.write(enlarge(frame.rgb), frame)

Timestamps are the input's. An output has its final name only once it is complete.
"""

import itertools
import secrets
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol, Self

import av
import numpy as np
from av.error import FFmpegError
from torch import Tensor

from mana_triton.files import WRITABLE_VIDEOS, sync
from mana_triton.video import images
from mana_triton.video.color import enlarge_alpha
from mana_triton.video.encoder import EncodeOptions, Pixels, VideoEncoder
from mana_triton.video.frame import MP4_LIKE, Frame, MediaError, Notes, Timed, explained
from mana_triton.video.reader import Reader, VideoReader
from mana_triton.video.remux import Remuxer


class Writer(Protocol):
    """Writes frames; as a context manager it calls `close`, or `abort` after an error."""

    path: Path
    notes: Notes  # lines the user should see
    # makes of [height, width, 3] RGB, on any device, the planes that `write` takes as well;
    # None where only RGB is written
    planes: Callable[[Tensor], list[Tensor]] | None

    def write(self, picture: Pixels, frame: Frame) -> object:
        """Write one picture, [height, width, 3] RGB or its `planes`, at the time of `frame`."""
        ...

    def close(self) -> None:
        """Finish the output and give it its name."""
        ...

    def abort(self) -> None:
        """Delete what was written so far; nothing to do after close."""
        ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class VideoWriter(Writer):
    """Encodes frames and copies all other streams of the reader's file.

    Args:
        path: output; its suffix chooses the container.
        reader: where the frames come from: timestamps, colors, rotation, audio, tags.
        width, height: of the frames to be written, pixels.
        options: of the encoder.
        overwrite: replace an existing output.
        part: name of the file while it grows, on the disk of `path`; None: a hidden one next to it.

    Attributes:
        headers, time_base, planes: of the encoder, see VideoEncoder.

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
        self.path, self._size, self._remuxer = Path(path), (width, height), None
        self._has_frames = self._is_complete = self._is_done = False
        suffix = self.path.suffix.lower()
        if suffix not in WRITABLE_VIDEOS:
            known = " ".join(WRITABLE_VIDEOS)
            raise MediaError(f"{path}: cannot write '{suffix}' files; use one of {known}")
        if self.path.is_dir():
            raise MediaError(f"{path}: is a folder; give a file name")
        _check_free(self.path, reader.path, overwrite)
        self._part = part or _hidden(self.path)
        self._container = av.open(f"file:{self._part}", "w")  # creates no file yet
        try:
            with explained(self.path, "write"):
                self._open(reader, options)
        except BaseException:
            self.abort()
            raise

    def _open(self, reader: Reader, options: EncodeOptions) -> None:
        suffix, (width, height) = self.path.suffix.lower(), self._size
        if suffix in MP4_LIKE:  # start offsets are rounded to this; FFmpeg's default is 1 ms
            ticks = str(max(1000, reader.time_base.denominator))
            self._container.container_options["movie_timescale"] = ticks
        encoder = VideoEncoder(self.path, reader, width, height, self._container, options)
        self._encoder, self.headers, self.notes = encoder, encoder.headers, encoder.notes
        self.time_base, self.planes = encoder.time_base, encoder.planes
        if suffix == ".avi":
            self.notes.add("avi has no start times: sound may be off by up to a frame")
        if isinstance(reader, VideoReader):
            if reader.display_matrix and suffix in (".avi", ".ts"):
                self.notes.add(f"{suffix} files cannot hold rotation")
            if reader.display_matrix:  # before the header; its translation is in pixels
                matrix = list(reader.display_matrix)
                limit = 2**31 - 1  # damaged files exceed it
                matrix[6] = min(max(matrix[6] * width // reader.width, -limit), limit)
                matrix[7] = min(max(matrix[7] * height // reader.height, -limit), limit)
                encoder.stream.set_display_matrix(matrix)
            self._remuxer = Remuxer(reader, self.path, self._container, encoder.stream, self.notes)
        self._container.start_encoding()

    def write(self, picture: Pixels, frame: Frame) -> None:
        """Encode one picture, [height, width, 3] RGB or its `planes`, at the time of `frame`."""
        check_pixels(picture, *self._size)
        self._has_frames = True
        with explained(self.path, "write"):
            if self._remuxer:
                self._remuxer.until(frame.pts * frame.time_base)
            for packet in self._encoder.encode(picture, frame):
                self._container.mux_one(packet)

    def put(self, packet: Timed) -> None:
        """Write a packet of an encoder with the same settings; not to be mixed with `write`."""
        with explained(self.path, "write"):
            if self._remuxer:
                self._remuxer.until(packet.dts * packet.time_base + self._encoder.offset)
            packet.stream = self._encoder.stream
            self._container.mux_one(packet)

    def complete(self) -> None:
        """Finish the file under its temporary name and make sure that it is on the disk."""
        if self._is_complete or self._is_done:
            return
        try:
            with explained(self.path, "write"):
                if self._has_frames:
                    for packet in self._encoder.finish():
                        self._container.mux_one(packet)
                if self._remuxer:
                    self._remuxer.until(None)
                    self._remuxer.close()
                self._container.close()
                sync(self._part)
        except BaseException:
            self.abort()
            raise
        self._is_complete = True

    def close(self) -> None:
        """Finish the file and give it its name."""
        self.complete()
        if self._is_done:
            return
        try:
            with explained(self.path, "write"):
                self._part.replace(self.path)
        except BaseException:
            self.abort()
            raise
        self._is_done = True
        sync(self.path.parent)

    def abort(self) -> None:
        """Delete what was written so far; nothing to do after close."""
        if self._is_done:
            return
        self._is_done = True
        if self._remuxer:
            self._remuxer.close()
        with suppress(FFmpegError, OSError):  # the disk may be full
            self._container.close()
        self._part.unlink(missing_ok=True)


class ImageFolderWriter(Writer):
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
        self.path, self._reader, self.notes = Path(path), reader, Notes()
        self._size, self._overwrite, self._count = (width, height), overwrite, count
        self._check_place()
        stems = sorted(file.stem for file in reader.files)
        for one, next_one in itertools.pairwise(stems):
            if one == next_one:
                raise MediaError(f"{reader.path}: two pictures are called '{one}'; rename one")
        self._part = part or _hidden(self.path)
        with explained(self.path, "write"):
            self._part.mkdir(exist_ok=part is not None)

    def _check_place(self) -> None:
        path = self.path
        if path.is_file():
            raise MediaError(f"{path}: is a file; give a folder or a video file name")
        if path.is_dir() and any(file.suffix != ".png" for file in path.iterdir()):
            raise MediaError(f"{path}: holds other things than PNG files; choose another folder")
        _check_free(path, self._reader.path, self._overwrite)

    def write(self, picture: Pixels, frame: Frame) -> Path:
        """Write one picture, [height, width, 3] RGB; returns its file, named after `frame`."""
        rgb, alpha = np.asarray(picture), frame.alpha
        check_pixels(rgb, *self._size)
        if alpha is not None:
            alpha = self._enlarged(alpha)
        file = self._part / f"{frame.name or f'{self._count:08d}'}.png"
        self._count += 1
        with explained(self.path, "write"):
            images.write_picture(file, rgb, alpha, frame.tags)
        return file

    def _enlarged(self, alpha: np.ndarray) -> np.ndarray | None:
        width, height = self._size
        if width * alpha.shape[0] != height * alpha.shape[1]:  # with --compare
            self.notes.add("transparency is dropped")
            return None
        self.notes.add("transparency is enlarged by bicubic interpolation")
        return enlarge_alpha(alpha, width, height)

    def close(self) -> None:
        """Give the folder its name, in place of an older one."""
        if not self._part.exists():
            return
        self._check_place()  # again, as something may have been put there
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


def check_pixels(pixels: Pixels, width: int, height: int) -> None:
    """ValueError unless a picture, RGB or planes, has this size and a type of integers."""
    first = pixels if isinstance(pixels, np.ndarray) else pixels[0]
    wanted = height, width, *((3,) if first is pixels else first.shape[2:])
    if first.shape != wanted or first.dtype not in (np.uint8, np.uint16):
        raise ValueError(
            f"a picture must be {list(wanted)} uint8 or uint16,"
            f" got {list(first.shape)} {first.dtype}"
        )


def _hidden(path: Path) -> Path:
    """A name next to `path`, which itself may be as long as names can be."""
    return path.with_name(f".{secrets.token_hex(8)}.part{path.suffix}")


def _check_free(path: Path, source: Path, overwrite: bool) -> None:
    """MediaError unless an output may be written here."""
    if path.is_symlink():
        raise MediaError(f"{path}: is a symbolic link; give the file's own name")
    if path.exists():
        if path.samefile(source):
            raise MediaError(f"{path}: is the input itself; choose another output")
        if not overwrite and not (path.is_dir() and not any(path.iterdir())):
            raise MediaError(f"{path}: exists; use --overwrite or choose another output")
    if not path.parent.is_dir():
        raise MediaError(f"{path}: there is no folder {path.parent}; create it first")
