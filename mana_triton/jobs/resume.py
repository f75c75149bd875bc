"""Outputs that survive a crash: work lies in finished segments, and the same command goes on.

    with open_reader("in.mp4") as reader, open_resumable(path, reader, w, h, ...) as writer:
        trail = Trail(reach, writer.done)
        for frame in frames_after(reader, writer.done):
            cut, seen = trail.see(frame)
            writer.write(enlarge(frame.rgb), frame, seen)

While it is made, the output is a folder `<output>.parts`:

    manifest        line 1: format, settings, input; then one line per finished segment, each
                    behind its hash
    lock            held by the running process, released by the system when it dies
    000000.packets  a segment of a video: the packets of an encoder of its own
    frames/         the pictures of an output folder, in segments of a few

A segment counts once its line is in the manifest, which happens after its bytes are on the disk;
the line has their hashes, and where and with what memory the next segment begins. What a crash
leaves beyond the last line is thrown away. The first line appears with the file, by renaming;
later ones are appended, so that a long job does not write its history again and again, and a line
that was cut off is no line.

A segment ends where an encoder begins anew at any rate: at a scene cut, or LENGTH frames after the
last key frame. So it costs no key frame. Were it cut by the clock, a run that was interrupted would
give other frames than one that was not.

Segments keep packets in a form of their own because no container holds the exact presentation
and decoding times and durations of every codec: Matroska rounds them, NUT has only the first.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import struct
import sys
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import av
import numpy as np

from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.video.encoder import Picture, VideoEncoder
from mana_triton.video.frame import Frame, MediaError, explained, reason, sync
from mana_triton.video.reader import ImageFolderReader, Reader
from mana_triton.video.writer import ImageFolderWriter, VideoWriter, _Writer

FORMAT = 2
LENGTH = 250  # frames of a segment at least, and from key frame to key frame in x264 and x265
PICTURES = 8  # the same for PNG files, which cost nothing to part
OURS = 2  # raised when the same input and weights begin to give other frames
SAMPLES, SAMPLE = 64, 1 << 16  # how much of the input is hashed: 4 MiB, evenly spread
# what a system says of a lock that another process holds; Windows has words of its own
_LOCKED = (errno.EAGAIN, errno.EWOULDBLOCK)
if sys.platform == "win32":
    _LOCKED = (errno.EACCES, errno.EDEADLK)
OLDER = "frames.old"  # an older output folder, until the new one has its name
_RECORD = struct.Struct("<qqqI?")  # pts, dts, duration, bytes, is it a key frame
_OURS = re.compile(r"lock|manifest(\.new)?|\d{6}\.packets|joined\.\w+|frames(\.old)?")


class Changed(MediaError):
    """Unfinished work belongs to another command, program or input."""


class Busy(MediaError):
    """Another process is at the same output."""


@dataclass(frozen=True)
class Seen:
    """What must be known after `number` frames to go on as if nothing had happened.

    Attributes:
        context: the last frames, each with whether it begins a scene.
        scores: of the CutDetector.
    """

    number: int
    context: tuple[tuple[Frame, bool], ...]
    scores: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """As it stands in the manifest: frames by their times and hashes."""
        context = [[frame.pts, _picture_hash(frame), cut] for frame, cut in self.context]
        damaged = self.context[-1][0].damaged
        scores = list(self.scores)
        return {"number": self.number, "context": context, "scores": scores, "damaged": damaged}


class Trail:
    """Watches the frames on their way to the engine.

    Args:
        reach: how many frames before and after it a frame is enlarged with.
        done: where the work continues (`Seen.to_json`), None at the beginning.
    """

    def __init__(self, reach: int, done: Mapping[str, Any] | None = None):
        self._known: deque[bool] = deque(cut for *_, cut in done["context"]) if done else deque()
        self.number = self.first = done["number"] - len(self._known) if done else 0
        self.skip = len(self._known)  # frames that only give the engine its memory back
        self._scores = done["scores"] if done else []
        self._detector = CutDetector()
        self._last: deque[tuple[Frame, bool]] = deque(maxlen=reach)

    def see(self, frame: Frame) -> tuple[bool, Seen]:
        """Whether the frame begins a scene, and what is known after it."""
        if self._known:
            cut = self._known.popleft()
            if not self._known:
                self._detector.is_cut(frame.rgb)  # the first it sees
                self._detector.scores.extend(self._scores)
        else:
            cut = self._detector.is_cut(frame.rgb)
        self._last.append((frame, cut))
        self.number += 1
        return cut, Seen(self.number, tuple(self._last), tuple(self._detector.scores))


def frames_after(reader: Reader, done: Mapping[str, Any] | None) -> Iterator[Frame]:
    """The context of the first frame that is not done, then all frames from there on.

    Raises:
        Changed: the input decodes to other pictures than before.
    """
    if not done:
        return iter(reader)
    context = [(pts, digest) for pts, digest, _ in done["context"]]
    reader.seek(context[0][0])
    frames = iter(reader)
    if (found := _recognized(frames, context)) is None:
        reader.notes.append("seeking in this file is not exact; it is decoded from its start")
        reader.seek(None)
        frames = islice(iter(reader), done["number"] - len(context), None)
        if (found := _recognized(frames, context)) is None:
            raise Changed(
                f"{reader.path}: decodes to other pictures than before; use --restart to begin anew"
            )
    reader.damaged = done["damaged"]  # what was met before, and not once more what was now
    return chain(found, frames)


def _recognized(frames: Iterator[Frame], context: list[tuple[int, str]]) -> list[Frame] | None:
    found = list(islice(frames, len(context)))
    seen = [(frame.pts, _picture_hash(frame)) for frame in found]
    return found if seen == context else None


def _picture_hash(frame: Frame) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(frame.rgb).data)
    if frame.alpha is not None:
        digest.update(np.ascontiguousarray(frame.alpha).data)
    return digest.hexdigest()


def input_identity(reader: Reader) -> dict[str, Any]:
    """What tells one input from another without reading all of a large file.

    The size, the time of the last change, and a hash of pieces that are spread over the whole
    file: a film that was encoded again differs in all of them. Changes within an uncompressed
    file that spare the pieces are given away by the time.
    """
    files = reader.files if isinstance(reader, ImageFolderReader) else [reader.path]
    digest = hashlib.sha256()
    size = modified = 0
    for file in files:
        with explained(file, "read"):
            stat = file.stat()
        size, modified = size + stat.st_size, max(modified, stat.st_mtime_ns)
        if len(files) > 1:  # as many as a film has frames: their names and times must do
            digest.update(f"{file.name}/{stat.st_size}/{stat.st_mtime_ns}\n".encode())
    for file in dict.fromkeys((files[0], files[-1])):
        with explained(file, "read"), file.open("rb") as content:
            last = max(file.stat().st_size - SAMPLE, 0)
            for i in range(SAMPLES):
                content.seek(last * i // (SAMPLES - 1))
                digest.update(content.read(SAMPLE))
    return {"bytes": size, "modified": modified, "content": digest.hexdigest()}


class Parts:
    """The folder of unfinished work: lock, manifest, verified segments.

    Args:
        output: the final name.
        job: what must be the same for the work to continue, as JSON.
        restart: throw older work away.

    Attributes:
        path: the folder.
        segments: the finished ones, as in the manifest.
        notes: lines the user should see.

    Raises:
        Changed: the work there belongs to another job.
        Busy: another process is at it.
        MediaError: the folder cannot be locked, or holds what is not ours.
    """

    def __init__(self, output: Path, job: dict[str, Any], restart: bool):
        self.path = parts_of(output)
        self.segments: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self._manifest = self.path / "manifest"
        job = {"format": FORMAT} | json.loads(json.dumps(job))
        with explained(self.path, "write"):
            _refuse_links(self.path)
            is_new = not self.path.exists()
            self.path.mkdir(exist_ok=True)
            try:
                self._lock = _lock(self.path, output)
            except Busy:
                raise
            except (MediaError, OSError):
                if is_new:
                    shutil.rmtree(self.path)
                raise
        try:
            with explained(self.path, "continue"):
                lines = self._read()
                if not (lines or restart) and self._manifest.exists():
                    raise MediaError(f"{self._manifest}: is damaged; use --restart to begin anew")
                if lines and not restart:
                    self._check_job(lines[0], job)
                    self._verify(line for line in lines[1:] if "files" in line)
                self._tidy()
                self._start(job)
        except BaseException:
            if is_new:
                _remove(self.path, self._lock)
            self._lock.close()
            raise

    @property
    def done(self) -> dict[str, Any] | None:
        """Where the work continues (`Seen.to_json`); None at the beginning."""
        return self.segments[-1]["then"] if self.segments else None

    @property
    def number(self) -> int:
        """How many frames are done."""
        return self.done["number"] if self.done else 0

    def _read(self) -> list[dict[str, Any]]:
        for file in self.path.iterdir():
            if not _OURS.fullmatch(file.name):
                raise MediaError(f"{file}: is not ours; move it elsewhere")
        return _lines(self._manifest)

    def _check_job(self, before: dict[str, Any], job: dict[str, Any]) -> None:
        if changes := "; ".join(_differences(before, job)):
            raise Changed(
                f"{self.path}: was begun with {changes}; give the command, weights and input of"
                " before, or --restart to begin anew"
            )

    def _verify(self, segments: Iterable[dict[str, Any]]) -> None:
        for segment in segments:
            for name, digest in segment["files"].items():
                file = self.path / name
                if not file.is_file() or _file_hash(file) != digest:
                    self.notes.append(f"{file} is damaged; continuing from frame {self.number}")
                    return
            self.segments.append(segment)

    def _tidy(self) -> None:
        """Remove what no finished segment holds."""
        kept = {self.path / name for segment in self.segments for name in segment["files"]}
        for file in [*self.path.glob("frames/*"), *self.path.iterdir()]:
            if file not in kept and file.name not in ("lock", "manifest", "frames"):
                shutil.rmtree(file) if file.is_dir() else file.unlink()

    def _start(self, job: dict[str, Any]) -> None:
        new = self.path / "manifest.new"
        new.write_bytes(b"".join(map(_line, (job, *self.segments))))
        sync(new)
        new.replace(self._manifest)
        sync(self.path)
        sync(self.path.parent)

    def add(self, files: list[Path], then: dict[str, Any]) -> None:
        """Make a segment of these files, which are closed, count."""
        hashes = {}
        for file in files:
            sync(file)
            hashes[file.relative_to(self.path).as_posix()] = _file_hash(file)
        sync(files[0].parent)
        segment = {"files": hashes, "frames": then["number"] - self.number, "then": then}
        self._append(segment)
        self.segments.append(segment)

    def complete(self, name: str) -> None:
        """Record that the output waits in the folder under this name, to be moved from there."""
        self._append({"complete": name, "identity": _lasting(self.path / name)})

    def _append(self, line: dict[str, Any]) -> None:
        with self._manifest.open("ab") as manifest:
            manifest.write(_line(line))
        sync(self._manifest)

    def remove(self) -> None:
        """Delete the folder and let it go."""
        _remove(self.path, self._lock)

    def release(self) -> None:
        """Let another process continue; without a finished segment there is nothing to keep."""
        if not self._lock.closed:
            if not self.segments:
                self.remove()
            self._lock.close()


def parts_of(output: Path) -> Path:
    """The folder of an output's unfinished work."""
    return output.with_name(f"{output.name}.parts")


def sweep(output: Path) -> None:
    """Remove what is left if a process died after it named its output and before it cleaned up.

    If it died before, when an older output had made way for it, that one gets its name back.
    """
    folder = parts_of(output)
    if not folder.is_dir():
        return
    _refuse_links(folder)
    if not output.exists() and (folder / OLDER).exists():  # it was not replaced after all
        with _lock(folder, output):
            (folder / OLDER).replace(output)
    if not output.exists():
        return
    lines = _lines(folder / "manifest")
    last = lines[-1] if lines else {}
    is_named = (
        "complete" in last
        and not (folder / last["complete"]).exists()
        and last.get("identity") == _lasting(output)  # else it is an older output
    )
    if is_named or all(file.name == "lock" for file in folder.iterdir()):
        with explained(folder, "remove"):
            _remove(folder, _lock(folder, output))


def _lasting(output: Path) -> list[int]:
    """What tells a finished output from an older one of its name, and lasts when it is renamed.

    Of a folder nothing does everywhere; but its pictures are never deleted where they wait.
    """
    stat = output.stat()
    return [] if output.is_dir() else [stat.st_size, stat.st_mtime_ns]


def _refuse_links(folder: Path) -> None:
    """MediaError if the folder is a symbolic link or holds one: what it leads to is not ours."""
    if folder.is_symlink():
        raise MediaError(f"{folder}: is a symbolic link; move it elsewhere")
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_symlink():
            raise MediaError(f"{entry}: is a symbolic link; remove it")


def _remove(folder: Path, lock: IO) -> None:
    """Delete the folder; its manifest goes last, so that `sweep` can take over at any point."""
    files = sorted(
        folder.iterdir(), key=lambda file: (file.name == "lock", file.name == "manifest")
    )
    if sys.platform == "win32":  # where open files cannot be deleted
        lock.close()
    for file in files:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    folder.rmdir()
    lock.close()


def _lock(folder: Path, output: Path) -> IO:
    """The folder's lock file, locked for as long as it is open."""
    file = (folder / "lock").open("a+b")
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), (folder / "lock").stat()):
            return file
    except OSError as error:
        file.close()
        # the last: the process that had it has finished and removed it
        if error.errno not in (*_LOCKED, errno.ENOENT):
            raise MediaError(
                f"{folder}: cannot be locked: {reason(error)}; write to a disk that allows it"
            ) from error
    file.close()
    raise Busy(f"{output}: another process is writing it; wait for that one")


def _lines(manifest: Path) -> list[dict[str, Any]]:
    """The whole lines of a manifest; what a crash or damage left behind them does not count."""
    lines = []
    if manifest.exists():
        for line in manifest.read_bytes().splitlines(keepends=True):
            digest, _, content = line.partition(b" ")
            if not line.endswith(b"\n") or digest != _digest(content):
                break
            lines.append(json.loads(content))
    return lines


def _line(content: dict[str, Any]) -> bytes:
    text = json.dumps(content).encode() + b"\n"
    return _digest(text) + b" " + text


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _differences(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What was different before, as "crf 18 (now 20)"."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            for difference in _differences(old, new):
                yield f"{key} {difference}"
        elif old != new:
            long = max(len(str(old)), len(str(new))) > 40
            yield f"other {key}" if long else f"{key} {old} (now {new})"


def _file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


class _Resumable(_Writer):
    """What both kinds of resumable writer share."""

    _parts: Parts
    _length: int
    _seen: Seen

    def __init__(self, path: str | Path, reader: Reader, width: int, height: int):
        super().__init__(path, reader, width, height)
        self._input = input_identity(reader)

    def _check_input(self) -> None:
        """Changed if the pictures may be those of another file than the sound."""
        if input_identity(self._reader) != self._input:
            raise Changed(
                f"{self._reader.path}: has changed while it was enlarged;"
                " use --restart to begin anew"
            )

    @property
    def number(self) -> int:
        """How many frames are done, for good."""
        return self._parts.number

    @property
    def done(self) -> dict[str, Any] | None:
        """Where the work continues, for `Trail` and `frames_after`."""
        return self._parts.done

    @property
    def length(self) -> int:
        """Frames of a segment at least."""
        return self._length

    def _then(self) -> dict[str, Any]:
        """What the manifest says behind a segment; a later run has the notes of this one, too."""
        notes = dict.fromkeys([*self._reader.notes, *self.notes])
        return self._seen.to_json() | {"notes": list(notes)}

    def _add_notes(self, notes: Iterable[str]) -> None:
        self.notes += [note for note in dict.fromkeys(notes) if note not in self.notes]

    def _recall(self) -> None:
        self._add_notes([*self._parts.notes, *(self.done["notes"] if self.done else ())])


class ResumableVideo(_Resumable):
    """A VideoWriter whose work survives; arguments that are not below are those of VideoWriter.

    Args:
        job: what must be the same for the work to continue, beside the input, as JSON.
        restart: throw older work away.
        length: frames of a segment at least.

    Attributes:
        planes: of the encoders, see VideoEncoder.
        notes: lines the user should see.
    """

    def __init__(
        self,
        path: str | Path,
        reader: Reader,
        width: int,
        height: int,
        *,
        job: dict[str, Any],
        restart: bool = False,
        overwrite: bool = False,
        length: int = LENGTH,
        **encoding: Any,
    ):
        super().__init__(path, reader, width, height)
        self._overwrite, self._length, self._encoding = overwrite, length, encoding
        with tempfile.TemporaryDirectory(prefix="mana_triton-") as folder:
            trial = self._new_writer(Path(folder))  # what cannot be written is said before the work
            trial.abort()
        self.notes, self.planes = trial.notes, trial.planes
        headers = hashlib.sha256(trial.headers).hexdigest()  # equal ones let packets be joined
        job = job | {"input": self._input, "segment": length, "encoder headers": headers}
        self._parts = Parts(self.path, job, restart)
        self._recall()
        self._tick = self.done["tick"] if self.done else -1
        self._encoder: VideoEncoder | None = None

    def _new_writer(self, folder: Path) -> VideoWriter:
        part = folder / f"joined{self.suffix}"
        size = self.width, self.height
        return VideoWriter(
            self.path, self._reader, *size, overwrite=self._overwrite, part=part, **self._encoding
        )

    def write(self, picture: Picture, frame: Frame, seen: Seen) -> None:
        """Encode one picture, [height, width, 3] RGB or its `planes`, at the time of `frame`."""
        self._check(picture)
        with explained(self.path, "write"):
            is_cut = seen.context[-1][1]
            if self._encoder and self._is_due(is_cut):
                self._finish()
            if not self._encoder:
                self._begin()
            assert self._encoder
            self._keep(self._encoder.encode(picture, frame))
            self._since_key = 1 if is_cut else self._since_key + 1
            self._seen = seen

    def _is_due(self, is_cut: bool) -> bool:
        """Whether the next frame begins a segment."""
        is_key = is_cut or self._since_key % min(self._length, LENGTH) == 0
        return is_key and self._seen.number - self.number >= self._length

    def _begin(self) -> None:
        # says which kind of packets are wanted; nothing is ever written to it
        self._container = av.open(f"file:{self._parts.path / 'none'}{self.suffix}", "w")
        self._file = (self._parts.path / f"{len(self._parts.segments):06d}.packets").open("wb")
        self._since_key, size = 0, (self.width, self.height)
        self._encoder = VideoEncoder(
            self.path, self._reader, *size, self._container, after=self._tick, **self._encoding
        )

    def _keep(self, packets: list[Any]) -> None:
        for packet in packets:
            dts = packet.pts if packet.dts is None else packet.dts
            times = packet.pts, dts, packet.duration or 0
            self._file.write(_RECORD.pack(*times, packet.size, packet.is_keyframe))
            self._file.write(packet)

    def _finish(self) -> None:
        assert self._encoder
        self._keep(self._encoder.finish())
        self._tick = self._encoder.tick
        self._add_notes(self._encoder.notes)
        self._close_segment()
        self._parts.add([Path(self._file.name)], self._then() | {"tick": self._tick})

    def _close_segment(self) -> None:
        self._encoder = None
        self._container.close()
        self._file.close()

    def close(self) -> None:
        """Finish the last segment, join all of them and give the result its name."""
        try:
            with explained(self.path, "write"):
                if self._encoder:
                    self._finish()
                self._check_input()
                with self._new_writer(self._parts.path) as writer:
                    for packet in self._packets(writer.time_base):
                        writer.put(packet)
                    writer.complete()
                    self._check_input()
                    self._parts.complete(f"joined{self.suffix}")
                self._add_notes(writer.notes)
                self._parts.remove()
        except BaseException:
            self.abort()
            raise

    def _packets(self, time_base: Fraction) -> Iterator[av.Packet]:
        """The packets of all segments, as one encoder would have made them."""
        last = None
        for segment in self._parts.segments:
            for name in segment["files"]:
                with (self._parts.path / name).open("rb") as file:
                    while header := file.read(_RECORD.size):
                        pts, dts, duration, size, is_keyframe = _RECORD.unpack(header)
                        packet = av.Packet(file.read(size))
                        # an encoder's first packets are decoded ahead of time; at irregular rates
                        # that may be before the last ones of the segment before
                        last = dts if last is None else max(dts, last + 1)
                        packet.pts, packet.dts, packet.duration = pts, last, duration
                        packet.time_base = time_base
                        packet.is_keyframe = is_keyframe
                        yield packet

    def abort(self) -> None:
        """Keep the finished segments for another time; nothing to do after close."""
        if self._encoder:
            with suppress(OSError):  # it may be the disk that is full
                self._close_segment()
        self._parts.release()


class ResumablePictures(_Resumable):
    """An ImageFolderWriter whose work survives; see ResumableVideo."""

    planes = None  # PNG files hold RGB

    def __init__(
        self,
        path: str | Path,
        reader: Reader,
        width: int,
        height: int,
        *,
        job: dict[str, Any],
        restart: bool = False,
        overwrite: bool = False,
        length: int = LENGTH,
    ):
        super().__init__(path, reader, width, height)
        size = width, height
        with tempfile.TemporaryDirectory(prefix="mana_triton-") as folder:
            ImageFolderWriter(path, reader, *size, overwrite=overwrite, part=Path(folder))
        self._parts = Parts(self.path, job | {"input": self._input}, restart)
        self._length = min(length, PICTURES)
        self._writer = ImageFolderWriter(
            path, reader, *size, overwrite=overwrite, part=self._parts.path / "frames",
            count=self.number,
        )  # fmt: skip
        self.notes = self._writer.notes  # one list, as both go on adding to it
        self._recall()
        self._files: list[Path] = []

    def write(self, rgb: np.ndarray, frame: Frame, seen: Seen) -> None:
        """Write one picture, [height, width, 3] RGB, under the name of `frame`."""
        self._files.append(self._writer.write(rgb, frame))
        self._seen = seen
        if len(self._files) == self._length:
            self._finish()

    def _finish(self) -> None:
        with explained(self.path, "write"):
            self._parts.add(self._files, self._then())
        self._files = []

    def close(self) -> None:
        """Give the folder its name."""
        try:
            if self._files:
                self._finish()
            self._check_input()
            with explained(self.path, "write"):
                self._parts.complete("frames")
                self._writer.close()
                sync(self.path.parent)
                self._parts.remove()
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Keep the finished pictures for another time; nothing to do after close."""
        self._parts.release()


def open_resumable(
    path: str | Path, reader: Reader, width: int, height: int, **settings: Any
) -> ResumableVideo | ResumablePictures:
    """A ResumableVideo if the path has a suffix, else ResumablePictures; settings as theirs."""
    with explained(Path(path), "write"):
        sweep(Path(path))
    if Path(path).suffix:
        return ResumableVideo(path, reader, width, height, **settings)
    if settings.pop("options", None) or settings.pop("lossless", False):
        raise MediaError(f"{path}: a folder of PNG files takes no encoder options")
    kept = ("job", "restart", "overwrite", "length")
    settings = {key: value for key, value in settings.items() if key in kept}
    return ResumablePictures(path, reader, width, height, **settings)
