"""Writers whose finished segments survive a stop.

A segment of a video ends where the encoder writes a key frame anyway: at a scene cut, or 250 frames
after the last key frame. So segments cost no key frames, and as they do not depend on the clock, a
stopped run continued gives the bytes of an uninterrupted one.

Packets are stored length-prefixed: no container holds the exact presentation times, decoding times
and durations of every codec. Matroska rounds them, NUT has only the first.
"""

import hashlib
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Self

import av

from mana_triton.files import sync
from mana_triton.jobs.options import SEGMENT, JobOptions
from mana_triton.jobs.resume import PartsFolder, Tracked, input_hash, remove_leftovers
from mana_triton.video.encoder import Pixels, VideoEncoder
from mana_triton.video.frame import MediaError, explained
from mana_triton.video.reader import Reader
from mana_triton.video.writer import ImageFolderWriter, VideoWriter, open_writer

PICTURES = 8  # pictures of a segment at most: separating them costs nothing
_HEADER = struct.Struct("<qqqI?")  # pts, dts, duration, bytes, is it a key frame


class ResumableWriter:
    """Writes a video; its finished segments survive a stop.

    Args:
        path, reader: output and input.
        size: width and height of the pictures to be written.
        job: everything that must be the same for unfinished work to continue, except the input.
        options: encode, overwrite, restart and segment are used.

    Attributes:
        parts: the finished segments.
        length: frames of a segment at least.
        notes: for the user.
        planes: of the encoder, see `VideoEncoder`; None where pictures are written as RGB.

    Raises:
        MediaError: the output cannot be written as asked, or unfinished work is refused.
    """

    def __init__(
        self, path: Path, reader: Reader, size: tuple[int, int], job: dict, options: JobOptions
    ):
        self.path, self._reader, self._size, self._options = path, reader, size, options
        self.length, self._input = options.segment, input_hash(reader.files)
        with explained(path, "write"):
            remove_leftovers(path)
        with tempfile.TemporaryDirectory(prefix="mana_triton-") as folder:  # fail early
            part = Path(folder) / f"trial{path.suffix.lower()}"
            trial: Any = open_writer(
                path, reader, *size, options.encode, overwrite=options.overwrite, part=part
            )
            trial.abort()
        # segments can be joined if their encoders say the same about the stream
        headers = hashlib.sha256(trial.headers if path.suffix else b"").hexdigest()
        job = job | {"input": self._input, "encoder headers": headers}
        self.parts = PartsFolder(path, job, options.restart)
        self.notes = [*trial.notes, *self.parts.notes, *self.parts.point.notes]
        self.planes, self._point = trial.planes, self.parts.point
        self._encoder: VideoEncoder | None = None
        self._since_key = 0

    def write(self, picture: Pixels, source: Tracked) -> None:
        """Write one picture, [height, width, 3] RGB or its `planes`, at the time of its source."""
        with explained(self.path, "write"):
            is_key = source.is_cut or self._since_key % min(self.length, SEGMENT) == 0
            if is_key and source.point.number > self.parts.point.number + self.length:
                self._end_segment()
            if not self._encoder:
                self._start_segment()
            assert self._encoder
            self._store(self._encoder.encode(picture, source.frame))
            self._since_key = 1 if source.is_cut else self._since_key + 1
            self._point = source.point

    def _start_segment(self) -> None:
        path = self.parts.path / f"{len(self.parts.segments):06d}.packets"
        # tells the encoder which kind of packets is wanted; nothing is written to it
        self._container = av.open(f"file:{self.parts.joined}", "w")
        self._file, self._since_key = path.open("wb"), 0
        self._encoder = VideoEncoder(
            self.path, self._reader, *self._size, self._container, self._options.encode,
            after=self.parts.point.tick,
        )  # fmt: skip

    def _store(self, packets: list[Any]) -> None:
        for packet in packets:
            dts = packet.pts if packet.dts is None else packet.dts
            times = packet.pts, dts, packet.duration or 0
            self._file.write(_HEADER.pack(*times, packet.size, packet.is_keyframe))
            self._file.write(packet)

    def _end_segment(self) -> None:
        encoder = self._encoder
        assert encoder
        self._store(encoder.finish())
        self._close_segment()
        self.notes += encoder.notes
        self._record([Path(self._file.name)], encoder.tick)

    def _close_segment(self) -> None:
        self._encoder = None
        self._container.close()
        self._file.close()

    def _record(self, files: list[Path], tick: int = -1) -> None:
        notes = list(dict.fromkeys([*self._reader.notes, *self.notes]))
        self.parts.add(files, replace(self._point, notes=notes, tick=tick))

    def close(self) -> None:
        """Finish the last segment, join all of them and give the output its name."""
        with explained(self.path, "write"):
            if self._point.number > self.parts.point.number:
                self._end_segment()
            self._check_input()
            self._publish()
            sync(self.path.parent)
            self.parts.release(keep=False)

    def _check_input(self) -> None:
        """MediaError if sound and pictures may come from different files."""
        if input_hash(self._reader.files) != self._input:
            raise MediaError(
                f"{self._reader.path}: has changed while it was enlarged; "
                "use --restart to start over"
            )

    def _publish(self) -> None:
        encode, overwrite = self._options.encode, self._options.overwrite
        writer = VideoWriter(
            self.path,
            self._reader,
            *self._size,
            encode,
            overwrite=overwrite,
            part=self.parts.joined,
        )
        try:
            for packet in self._packets(writer.time_base):
                writer.put(packet)
            writer.complete()
            self._check_input()
        except BaseException:
            writer.abort()
            raise
        self.notes += writer.notes
        self.parts.complete()
        self.parts.joined.replace(self.path)

    def _packets(self, time_base: Fraction) -> Iterator[av.Packet]:
        """The packets of all segments, as one encoder would have made them."""
        last = None
        for name in [name for files in self.parts.segments for name in files]:
            with (self.parts.path / name).open("rb") as file:
                while header := file.read(_HEADER.size):
                    pts, dts, duration, size, is_keyframe = _HEADER.unpack(header)
                    packet = av.Packet(file.read(size))
                    # an encoder's first packets are decoded ahead of time; at irregular rates
                    # that may be before the last ones of the segment before
                    last = dts if last is None else max(dts, last + 1)
                    packet.pts, packet.dts, packet.duration = pts, last, duration
                    packet.time_base, packet.is_keyframe = time_base, is_keyframe
                    yield packet

    def abort(self) -> None:
        """Keep the finished segments for a later run; nothing to do after close."""
        if self._encoder:
            with suppress(OSError):  # the disk may be full
                self._close_segment()
        self.parts.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self.close()
        finally:
            self.abort()


class ResumablePictures(ResumableWriter):
    """Writes a folder of PNG files, a few of them to a segment."""

    def __init__(
        self, path: Path, reader: Reader, size: tuple[int, int], job: dict, options: JobOptions
    ):
        super().__init__(path, reader, size, job, options)
        self.length = min(self.length, PICTURES)
        self._writer = ImageFolderWriter(
            path, reader, *size, overwrite=options.overwrite, part=self.parts.joined,
            count=self._point.number,
        )  # fmt: skip
        self._files: list[Path] = []

    def write(self, picture: Pixels, source: Tracked) -> None:
        """Write one picture, [height, width, 3] RGB."""
        self._files.append(self._writer.write(picture, source.frame))
        self._point = source.point
        if len(self._files) == self.length:
            with explained(self.path, "write"):
                self._end_segment()

    def _end_segment(self) -> None:
        self.notes += self._writer.notes
        self._record(self._files)
        self._files = []

    def _publish(self) -> None:
        self.parts.complete()
        self._writer.close()


def open_resumable(
    path: Path, reader: Reader, size: tuple[int, int], job: dict[str, Any], options: JobOptions
) -> ResumableWriter:
    """A ResumableWriter if the path has a suffix, else ResumablePictures; arguments as theirs."""
    kind = ResumableWriter if path.suffix else ResumablePictures
    return kind(path, reader, size, job, options)
