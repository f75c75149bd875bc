"""Unfinished work on the disk, and what it takes to continue there.

While an output is made, its finished segments lie in a folder `<output>.parts`, see docs/resume.md.
A segment counts once its .json exists, which is written after the segment's bytes are on the disk.
The next run deletes all that no .json names.
"""

import hashlib
import itertools
import json
import re
import shutil
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout

from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.files import content_hash, sync, visible, write_atomically
from mana_triton.video.frame import Frame, MediaError, explained, reason
from mana_triton.video.reader import Reader

FORMAT = 3  # of the folder; raised, too, when the same input and weights give other frames
SAMPLES, SAMPLE = 64, 1 << 16  # of the input that are hashed: evenly spaced pieces, their bytes
_NAMES = re.compile(
    r"lock|complete|manifest|(job|\d{6})\.json|\d{6}\.packets|joined\.\w+|frames(\.old)?"
)


@dataclass(frozen=True)
class ResumePoint:
    """The state of a job after some frames: enough to continue as if it had never stopped.

    Attributes:
        number: of frames done.
        context: the last frames, as many as a window reaches back: time stamp, hash of the
            pixels, whether the frame starts a scene.
        scores: of the CutDetector.
        damaged: frames so far that were damaged or missing.
        notes: that the user saw.
        tick: of the encoder, see `VideoEncoder`.
    """

    number: int = 0
    context: Sequence[tuple[int, str, bool]] = ()
    scores: Sequence[float] = ()
    damaged: int = 0
    notes: Sequence[str] = ()
    tick: int = -1

    @property
    def start(self) -> int:
        """Number of the first frame of the context."""
        return self.number - len(self.context)


START = ResumePoint()


class Tracked(NamedTuple):
    """A frame on its way to the engine."""

    frame: Frame
    is_cut: bool  # whether it starts a scene
    point: ResumePoint  # after this frame


def track_scenes(
    frames: Iterable[Frame], window_radius: int, point: ResumePoint = START
) -> Iterator[Tracked]:
    """Find scene cuts, and the resume point after each frame.

    Args:
        frames: from `point.start` on.
        window_radius: frames on each side that a frame is enlarged with.
        point: where the work continues.
    """
    detector, known = CutDetector(), deque(is_cut for *_, is_cut in point.context)
    context: deque[tuple[int, str, bool]] = deque(maxlen=window_radius)
    for number, frame in enumerate(frames, point.start + 1):
        is_cut = known.popleft() if known else detector.is_cut(frame.rgb)
        if number == point.number:
            detector.is_cut(frame.rgb)  # the frame that the next one is compared with
            detector.scores.extend(point.scores)
        context.append((frame.pts, _pixel_hash(frame), is_cut))
        state = tuple(context), tuple(detector.scores), frame.damaged
        yield Tracked(frame, is_cut, ResumePoint(number, *state))


def frames_from(reader: Reader, point: ResumePoint) -> Iterator[Frame]:
    """The context of a resume point and all frames after it.

    Raises:
        MediaError: the input decodes to other pictures than before.
    """
    if not point.context:
        return iter(reader)
    reader.seek(point.context[0][0])
    frames = iter(reader)
    if (found := _recognize(frames, point)) is None:
        reader.notes.append("seeking in this file is not exact; it is decoded from its start")
        reader.seek(None)
        frames = itertools.islice(iter(reader), point.start, None)
        if (found := _recognize(frames, point)) is None:
            raise MediaError(
                f"{reader.path}: decodes to other pictures than before; use --restart to start over"
            )
    reader.damaged = point.damaged  # do not count the frames of the context twice
    return itertools.chain(found, frames)


def _recognize(frames: Iterator[Frame], point: ResumePoint) -> list[Frame] | None:
    """The context of a resume point, if the next frames are it."""
    found = list(itertools.islice(frames, len(point.context)))
    seen = [(frame.pts, _pixel_hash(frame)) for frame in found]
    return found if seen == [(pts, sha256) for pts, sha256, _ in point.context] else None


def _pixel_hash(frame: Frame) -> str:
    digest = hashlib.sha256(np.ascontiguousarray(frame.rgb).data)
    if frame.alpha is not None:
        digest.update(np.ascontiguousarray(frame.alpha).data)
    return digest.hexdigest()


def input_hash(files: Sequence[Path]) -> str:
    """SHA-256 of names, sizes, times of the last change and samples of the content.

    A film that was encoded again differs in all of them, and not all of a large file is read.
    """
    digest = hashlib.sha256()
    for file in files:
        with explained(file, "read"), file.open("rb") as content:
            size, changed = file.stat().st_size, file.stat().st_mtime_ns
            digest.update(f"{file.name}/{size}/{changed}\n".encode())
            step = max(size * len(files) // SAMPLES, SAMPLE)
            for place in range(0, size, step):
                content.seek(place)
                digest.update(content.read(SAMPLE))
    return digest.hexdigest()


class PartsFolder:
    """The folder of an output's unfinished work, locked.

    Args:
        output: the final name.
        job: everything that must be the same for the work to continue.
        restart: delete earlier work.

    Attributes:
        path: of the folder; `joined` is where the output lies until it gets its name.
        segments: names of the files of each finished segment.
        point: where the work continues.
        notes: for the user.

    Raises:
        MediaError: another process works there, or the work belongs to another job.
    """

    def __init__(self, output: Path, job: dict[str, Any], restart: bool = False):
        self.path, self.joined = parts_path(output), _joined(output)
        self.segments: list[list[str]] = []
        self.point, self.notes = START, []
        with explained(self.path, "continue"):
            _check_names(self.path)
            self._lock = _lock(output).lock
            try:
                if restart:
                    self._tidy()
                    (self.path / "job.json").unlink(missing_ok=True)
                self._load({"format": FORMAT} | json.loads(json.dumps(job)))
            except BaseException:
                self._lock.release()
                raise

    def _load(self, job: dict[str, Any]) -> None:
        before = _read_json(self.path / "job.json")
        is_other = before and before.get("format") != FORMAT
        if is_other or (not before and any(x.name != "lock" for x in visible(self.path))):
            raise MediaError(
                f"{self.path}: is damaged or of another version of this program; use --restart "
                "to start over"
            )
        if before and (changes := "; ".join(_changes(before, job))):
            raise MediaError(
                f"{self.path}: was started with {changes}; repeat that command with the same "
                "weights and input, or use --restart to start over"
            )
        (self.path / "complete").unlink(missing_ok=True)
        while (state := _read_json(self._next())) and self._is_intact(state["files"]):
            self.segments.append(list(state["files"]))
            self.point = ResumePoint(**state["point"])
        self._tidy()
        _write_json(self.path / "job.json", job)

    def _next(self) -> Path:
        return self.path / f"{len(self.segments):06d}.json"

    def _is_intact(self, files: dict[str, str]) -> bool:
        for name, digest in files.items():
            file = self.path / name
            if not file.is_file() or content_hash(file) != digest:
                self.notes.append(f"{file} is damaged; continuing from frame {self.point.number}")
                return False
        return True

    def _tidy(self) -> None:
        """Delete what belongs to no finished segment."""
        kept = {"lock", "frames", "job.json"}
        for number, files in enumerate(self.segments):
            kept |= {f"{number:06d}.json", *files}
        for file in {*self.path.glob("frames/*"), *self.path.iterdir()}:
            if file.relative_to(self.path).as_posix() not in kept:
                _delete(file)

    def add(self, files: Sequence[Path], point: ResumePoint) -> None:
        """Record a finished segment, whose files are closed, and the point after it."""
        for file in files:
            sync(file)
        sync(files[0].parent)
        hashes = {file.relative_to(self.path).as_posix(): content_hash(file) for file in files}
        _write_json(self._next(), {"files": hashes, "point": asdict(point)})
        self.segments.append(list(hashes))
        self.point = point

    def complete(self) -> None:
        """Record that the output is about to be moved out of the folder."""
        (self.path / "complete").touch()
        sync(self.path)

    def release(self, keep: bool = True) -> None:
        """Let another process continue; the folder is deleted if nothing is to be kept."""
        if self._lock.is_locked and not (keep and self.segments):
            if sys.platform == "win32":  # where open files cannot be deleted
                self._lock.release()
            _remove(self.path)
        self._lock.release()


def parts_path(output: Path) -> Path:
    """The folder of an output's unfinished work."""
    return output.with_name(f"{output.name}.parts")


def _joined(output: Path) -> Path:
    return parts_path(output) / (f"joined{output.suffix.lower()}" if output.suffix else "frames")


def remove_leftovers(output: Path) -> None:
    """Delete the folder of a run that died after it had named its output.

    If it died between moving an older output folder away and naming the new one, the older one
    gets its name back.
    """
    folder = parts_path(output)
    if not folder.is_dir():
        return
    _check_names(folder)
    with _lock(output):
        if not output.exists() and (folder / "frames.old").exists():
            (folder / "frames.old").replace(output)
        is_named = (folder / "complete").exists() and not _joined(output).exists()
        is_empty = all(file.name == "lock" for file in visible(folder))
        if output.exists() and (is_named or is_empty):
            _remove(folder)


def _check_names(folder: Path) -> None:
    """MediaError if the folder holds what this program did not put there: it may delete all."""
    for path in (folder, *(visible(folder) if folder.is_dir() else ())):
        if path.is_symlink():
            raise MediaError(f"{path}: is a symbolic link; move it elsewhere")
        if path != folder and not _NAMES.fullmatch(path.name):
            raise MediaError(f"{path}: is no part of unfinished work; move it elsewhere")


def _lock(output: Path) -> AcquireReturnProxy:
    """The lock of an output's folder, held; makes the folder if there is none."""
    lock = FileLock(parts_path(output) / "lock", timeout=0)
    try:
        return lock.acquire()
    except Timeout:
        raise MediaError(f"{output}: another process is writing it; wait for it to end") from None
    except OSError as error:
        raise MediaError(
            f"{lock.lock_file}: cannot be locked: {reason(error)}; write to a disk that allows it"
        ) from error


def _remove(folder: Path) -> None:
    """Delete the folder; the marker late, so that `remove_leftovers` can finish at any point."""
    for file in folder.iterdir():
        if file.name not in ("complete", "lock"):
            _delete(file)
    (folder / "complete").unlink(missing_ok=True)
    shutil.rmtree(folder)


def _delete(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def _read_json(path: Path) -> dict[str, Any]:
    """The content of a file; nothing if the file is missing or damaged."""
    try:
        return json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content))
    sync(path.parent)


def _changes(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """What was different before, as "crf 18.0 (now 20.0)"."""
    for key in sorted({*before, *now}):
        old, new = before.get(key), now.get(key)
        if old != new:
            is_long = max(len(str(old)), len(str(new))) > 40
            yield f"other {key}" if is_long else f"{key} {old} (now {new})"
