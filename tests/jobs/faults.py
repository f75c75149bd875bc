"""Runs of the command that die where a test wants them to.

A process that has imported everything forks one child for each run, so that a run costs no start.
A child can be killed at its n-th operation on files or after a time, write only small files, or
have its input or its encoder fail at a frame.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from av.error import ExternalError
from av.error import OSError as ReadError

ROOT = Path(__file__).parents[2]
OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate")


class Run(NamedTuple):
    """How a run ended: exit code, or minus the signal's number, and what it printed."""

    code: int
    out: str
    err: str
    operations: int  # on files below the watched folder

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class FailingContainer:
    """A container whose disk fails once at a packet, as FFmpeg reports it."""

    def __init__(self, container: Any, packet: int, failed: list[bool]):
        self._container, self._packet, self._failed = container, packet, failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def demux(self, *streams: Any) -> Iterator[Any]:
        for number, packet in enumerate(self._container.demux(*streams)):
            if number == self._packet and not self._failed:
                self._failed.append(True)
                raise ReadError(errno.EIO, "Input/output error")
            yield packet


class Runner:
    """The process that forks; close it."""

    def __init__(self, watched: Path):
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__)), str(watched)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: object, **fault: float | str) -> Run:
        """One run with these arguments; the faults are those of `_fail`."""
        assert self._process.stdin and self._process.stdout
        order = {"argv": list(map(str, arguments)), **fault}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Run(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def _serve(watched: str) -> None:
    """Fork a child for each order on stdin."""
    import tempfile

    import torch

    import mana_triton.infer

    torch.set_num_threads(1)
    tempfile.tempdir = watched  # temporary files are watched, too
    for line in sys.stdin:
        order = json.loads(line)
        with tempfile.TemporaryDirectory(dir="/tmp") as folder:
            files = [Path(folder) / name for name in ("out", "err", "count")]
            child = os.fork()
            if not child:
                _run(order, watched, files, mana_triton.infer)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = [file.read_text() if file.exists() else "" for file in files]
        answer = Run(status, texts[0], texts[1], int(texts[2] or 0))
        print(json.dumps(answer._asdict()), flush=True)


def _run(order: dict, watched: str, files: list[Path], infer: Any) -> None:
    """What the child does; it never returns."""
    import traceback

    from rich.console import Console

    for number, file in enumerate(files[:2], 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    infer.job.console = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests, too, may run under nohup
    count = _fail(order, watched)
    sys.argv = ["infer", *order["argv"]]
    code = 1
    try:
        infer.main()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
        print("" if isinstance(stopped.code, int) else stopped.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    files[2].write_text(str(count[0]))
    os._exit(code)


def _fail(order: dict, watched: str) -> list[int]:
    """Arrange the faults of an order; returns the number of operations on files, as it grows.

    kill_at: SIGKILL, or `signal`, before this operation. after: the same after so many seconds.
    ignored: a signal that is ignored from the start, as under nohup. largest: bytes of a file.
    read: the packet at which the input's disk fails once, when frames are read (look 0) or sound
    is copied (look 1). encode: the frame at which the encoder of video or PNG files fails.
    """
    count = [0]

    def watch(event: str, arguments: tuple) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(watched):
            count[0] += 1
            if count[0] == order.get("kill_at"):
                os.kill(os.getpid(), getattr(signal, order.get("signal", "SIGKILL")))

    sys.addaudithook(watch)
    if "ignored" in order:
        signal.signal(getattr(signal, order["ignored"]), signal.SIG_IGN)
    if "after" in order:
        _kill_later(order["after"], getattr(signal, order["signal"]))
    if "largest" in order:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["largest"], order["largest"]))
    if "read" in order:
        from mana_triton.video import reader, remux

        module, failed = [reader, remux][order["look"]], []
        opened = module.open_container
        module.open_container = lambda path: FailingContainer(opened(path), order["read"], failed)
    if "encode" in order:
        _fail_encoder(order["encode"])
    return count


def _kill_later(seconds: float, number: int) -> None:
    parent = os.getpid()
    if not os.fork():  # a thread or timer would end with the process it is to kill
        time.sleep(seconds)
        if os.getppid() == parent:
            os.kill(parent, number)
        os._exit(0)


def _fail_encoder(at: int) -> None:
    from mana_triton.video import images
    from mana_triton.video.encoder import VideoEncoder

    calls = iter(range(1 << 30))
    encode, write = VideoEncoder.encode, images.write_picture

    def fail(self, picture, frame):
        if next(calls) == at:
            raise ExternalError(-542398533, "Generic error in an external library")
        return encode(self, picture, frame)

    def fail_picture(*picture):
        if next(calls) == at:
            raise OSError(errno.EIO, "Input/output error")
        write(*picture)

    VideoEncoder.encode, images.write_picture = fail, fail_picture


if __name__ == "__main__":
    _serve(sys.argv[1])
