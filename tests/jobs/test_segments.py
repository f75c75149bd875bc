"""Work that survives: whatever stops a run, the next one ends with the same result."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import faults
import media
import numpy as np
import PIL
import pytest
import torch
from faults import Runner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from mana_triton import checkpoint, infer
from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.jobs.resume import (
    LENGTH,
    Changed,
    Parts,
    Trail,
    _differences,
    frames_after,
    input_identity,
    open_resumable,
    sweep,
)
from mana_triton.model import MANA, MANAConfig
from mana_triton.video import images
from mana_triton.video.writer import (
    Frame,
    MediaError,
    VideoEncoder,
    VideoWriter,
    open_reader,
)

pytestmark = pytest.mark.skipif(not hasattr(faults.os, "fork"), reason="needs fork")

ENCODER = ("-e", "preset=veryfast")  # with B frames, which leave the encoder in another order
VERYFAST = {"preset": "veryfast"}
SEGMENT = ("--segment", "6")
COUNT, STARTS = 26, (0, 11, 15)


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A tiny random network in which neighbors matter."""
    torch.manual_seed(0)
    model = MANA(
        MANAConfig(
            channels=8,
            encoder_blocks=1,
            decoder_blocks=1,
            memory_slots=8,
            match="cosine",
            offsets=True,
        )
    )
    for layer in (model.w_z, model.w_z1):
        nn.init.normal_(layer.weight, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    checkpoint.save(model, path)
    return path


def pictures(count: int = COUNT, size: tuple[int, int] = (16, 24)) -> list[np.ndarray]:
    """Three scenes that begin at STARTS, of blocks that move; one is shorter than a window."""
    rng = np.random.default_rng(5)
    block = np.ones((size[0] // 4, size[1] // 4, 1))
    scenes = [np.kron(rng.integers(0, 256, (4, 4, 3)), block) for _ in STARTS]
    frames = []
    for number in range(count):
        scene = scenes[sum(start <= number for start in STARTS) - 1]
        frames.append(np.roll(scene, number // 2, axis=1).astype(np.uint8))
    return frames


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """Sound, B frames, key frames now and then, and irregular times with large gaps."""
    steps = np.random.default_rng(3).choice([900, 3600, 20000], COUNT)
    return media.write_video(
        tmp_path_factory.mktemp("clip") / "clip.mp4",
        pictures(),
        pts=np.cumsum(steps).tolist(),
        options={"g": "7", "bf": "2", "crf": "12"},
        audio=True,
        color=(1, 1, 1, 1),
    )


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Iterator[Runner]:
    """Forks runs; its children's operations on files of the module's folders are counted."""
    runner = Runner(tmp_path_factory.getbasetemp())
    yield runner
    runner.close()


def content(path: Path) -> list[Any]:
    """What a viewer gets: every picture with its time, and every packet of sound."""
    if path.is_dir():
        return [(f.name, f.read_bytes()) for f in sorted(path.iterdir())]
    with av.open(str(path)) as container:
        frames = [
            (frame.pts, hashlib.sha256(_samples(frame)).hexdigest())
            for frame in container.decode(video=0)
        ]
        sounds = len(container.streams.audio)
    return [frames, *(media.packets(path, "audio", index) for index in range(sounds))]


def _samples(frame: av.VideoFrame) -> bytes:
    if frame.format.name == "bgr0":  # which PyAV does not turn into an array
        frame = frame.reformat(format="bgr24", threads=1)
    return frame.to_ndarray().tobytes()


def command(clip: Path, weights: Path, output: Path) -> list[object]:
    encoder = ENCODER if output.suffix else ()
    # here and in the tests' own process, whatever the processor
    return [clip, "-o", output, "-n", weights, "--precision", "fp32", *SEGMENT, *encoder]


@pytest.fixture(scope="module")
def whole(clip, weights, runner, tmp_path_factory) -> dict[str, Any]:
    """The results of runs that nothing stopped, by the output's suffix."""
    results = {}
    for suffix in (".mp4", ""):
        output = tmp_path_factory.mktemp("whole") / f"clip_x4{suffix}"
        run = runner(*command(clip, weights, output))
        assert run.code == 0, run.err
        assert run.summary["frames"] == COUNT
        assert [file.name for file in output.parent.iterdir()] == [output.name]
        results[suffix] = content(output)
        results.setdefault("bytes", output.stat().st_size)
    return results


def put_older(output: Path) -> None:
    """Another output of the same name, which --overwrite is to replace."""
    if output.suffix:
        output.write_bytes(b"older")
    else:
        output.mkdir()
        (output / "older.png").write_bytes(b"older")


def is_older(output: Path) -> bool:
    file = output if output.suffix else output / "older.png"
    return file.is_file() and file.read_bytes() == b"older"


def assert_survives(arguments: list[object], output: Path, runner: Runner, expected: list) -> int:
    """The output is absent, whole or the older one, and the same command gives what is expected.

    Returns how many frames the second run found done.
    """
    was_done = output.exists() and not is_older(output)
    if was_done:
        assert content(output) == expected
    parts = output.with_name(f"{output.name}.parts")
    run = runner(*arguments)
    if was_done and "--overwrite" not in arguments:
        assert run.code == 1
        assert "exists; use --overwrite" in run.err
    else:
        assert run.code == 0, run.err
    assert content(output) == expected
    assert not parts.exists()
    assert [file.name for file in output.parent.iterdir()] == [output.name]
    return COUNT if was_done else run.summary["resumed"]


# what the engine must remember


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 29), st.integers(0, 2**32))
def test_the_trail_continues(at, seed):
    """Scene cuts after any frame are those of a detector that saw all frames."""
    rng = np.random.default_rng(seed)
    frames, picture = [], None
    for number in range(30):
        if picture is None or rng.random() < 0.25:
            picture = rng.integers(0, 256, (12, 16, 3)).astype(np.float64)
        picture = (picture + rng.normal(0, 15, picture.shape)).clip(0, 255)
        frames.append(media_frame(picture.astype(np.uint8), number))
    detector, trail = CutDetector(), Trail(3)
    expected = [detector.is_cut(frame.rgb) for frame in frames]
    seen = [trail.see(frame) for frame in frames]
    assert [cut for cut, _ in seen] == expected
    done = json.loads(json.dumps(seen[at - 1][1].to_json()))
    assert done["number"] == at
    trail = Trail(3, done)
    again = [trail.see(frame) for frame in frames[trail.first :]]
    assert [cut for cut, _ in again] == expected[trail.first :]
    for (_, before), (_, after) in zip(seen[at:], again[trail.skip :], strict=True):
        assert (before.number, before.scores) == (after.number, after.scores)


def media_frame(rgb: np.ndarray, number: int):
    return Frame(rgb, number, Fraction(1, 25), 1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stream_continues_bit_by_bit(weights, workers):
    """At every frame, also just before and after cuts and in a scene shorter than the window."""
    frames = [media_frame(rgb, i) for i, rgb in enumerate(pictures())]
    upscaler = Upscaler(weights, EngineOptions(workers=workers))
    expected = [x.picture for x in upscaler.stream(frame.rgb for frame in frames)]
    trail = Trail(upscaler.window_radius)
    cuts_seen, seen = zip(*map(trail.see, frames), strict=True)
    assert tuple(i for i, cut in enumerate(cuts_seen) if cut) == STARTS[1:]
    for at in (1, 2, 4, 10, 11, 12, 14, 15, 17, 18, 22, 25):
        trail = Trail(upscaler.window_radius, seen[at - 1].to_json())
        rest = frames[trail.first :]
        cuts = iter([trail.see(frame)[0] for frame in rest])
        results = upscaler.stream(
            rest, pixels=lambda frame: frame.rgb, start=trail.first, skip=trail.skip,
            is_cut=lambda _, c=cuts: next(c),
        )  # fmt: skip
        results = list(results)
        assert len(results) == len(frames) - at
        for number, (frame, picture) in enumerate(results, at):
            assert frame is frames[number]
            assert np.array_equal(picture, expected[number]), (at, number)


# the whole way


@pytest.mark.parametrize("suffix", [".mp4", ""], ids=["video", "pictures"])
def test_killed_at_operations_on_files(suffix, clip, weights, runner, whole, tmp_path):
    """Some of all the points; -m slow tries every one."""
    try_points(suffix, clip, weights, runner, whole, tmp_path, tries=5)


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("suffix", [".mp4", ""], ids=["video", "pictures"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["new", "overwrite"])
def test_killed_at_every_operation_on_files(flags, suffix, clip, weights, runner, whole, tmp_path):
    try_points(suffix, clip, weights, runner, whole, tmp_path, 1 << 30, flags)


@pytest.mark.parametrize("suffix", [".mp4", ""], ids=["video", "pictures"])
def test_killed_while_an_older_output_is_replaced(suffix, clip, weights, runner, whole, tmp_path):
    try_points(suffix, clip, weights, runner, whole, tmp_path, 3, ("--overwrite",))


@pytest.mark.parametrize("fault", ["stopped", "no naming", "no renaming"])
@pytest.mark.parametrize("name", ["clip_x4.mp4", "clip_x4"])
def test_an_older_output_is_not_taken_for_the_finished_one(
    name, fault, clip, tmp_path, monkeypatch
):
    """Finished segments were deleted as what is left of a run that had named its output.

    Nor is it lost when it made way for one that cannot be named: --restart deleted it.
    """
    output = tmp_path / name
    put_older(output)
    settings: dict[str, Any] = {"job": {}, "length": 6, "overwrite": True}
    settings |= {"options": VERYFAST} if output.suffix else {}
    complete, replace = Parts.complete, Path.replace

    def stopped(parts, name) -> None:
        complete(parts, name)
        raise KeyboardInterrupt

    def refused(path, target) -> Path:
        if target == output and (path.suffix != ".old" or fault == "no renaming"):
            raise PermissionError(1, "Operation not permitted")
        return replace(path, target)

    def work() -> int:
        with open_reader(clip) as reader:
            writer = open_resumable(output, reader, reader.width, reader.height, **settings)
            found, trail = writer.number, Trail(3, writer.done)
            for frame in frames_after(reader, writer.done):
                seen = trail.see(frame)[1]
                if seen.number > found:
                    writer.write(frame.rgb, frame, seen)
            writer.close()
        return found

    with monkeypatch.context() as faulty:
        if fault == "stopped":
            faulty.setattr(Parts, "complete", stopped)
        else:
            faulty.setattr(Path, "replace", refused)
        with pytest.raises((KeyboardInterrupt, MediaError)):
            work()
    if fault == "no renaming" and not output.suffix:
        assert not output.exists()
        sweep(output)
    assert is_older(output)
    assert work() == COUNT
    assert not is_older(output)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def try_points(suffix, clip, weights, runner, whole, tmp_path, tries, flags=()) -> None:
    output = tmp_path / "probe" / f"clip_x4{suffix}"
    output.parent.mkdir()
    total = runner(*command(clip, weights, output)).operations
    assert total > 20
    points = range(1, total + 1)
    chosen = sorted(random.Random(1).sample(points, min(tries, total)))
    resumed = []
    for point in chosen:
        output = tmp_path / str(point) / f"clip_x4{suffix}"
        output.parent.mkdir()
        if flags:
            put_older(output)
        arguments = [*command(clip, weights, output), *flags]
        run = runner(*arguments, kill_at=point)
        assert run.code == -9, (point, run)
        resumed.append(assert_survives(arguments, output, runner, whole[suffix]))
    assert resumed == sorted(resumed)  # later deaths lose no more than earlier ones
    assert max(resumed) >= 6
    print(f"killed at {len(chosen)} of {total} operations on files, all survived: {resumed}")


def test_killed_again_and_again(clip, weights, runner, whole, tmp_path):
    """Every run gets a little further: a resumed run can itself be resumed."""
    output = tmp_path / "clip_x4.mp4"
    arguments = command(clip, weights, output)
    found = []
    for _ in range(12):
        run = runner(*arguments, encode=10)
        if run.code == 0:
            break
        assert run.err.count("error: ") == 1
        found.append(int(run.err.split("note: ")[-1].split()[0]))
    assert found == [6, 15, 21]
    assert content(output) == whole[".mp4"]


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT", "SIGTERM"])
def test_stopped_at_random_times(name, clip, weights, runner, whole, tmp_path):
    probe = tmp_path / "clip_x4.mp4"
    began = time.monotonic()
    assert runner(*command(clip, weights, probe)).code == 0
    lasts, chance = time.monotonic() - began, random.Random(name)
    resumed = []
    for point in range(50):
        output = tmp_path / str(point) / "clip_x4.mp4"
        output.parent.mkdir()
        arguments = command(clip, weights, output)
        run = runner(*arguments, signal=name, after=chance.uniform(0, lasts))
        if run.code == -15 and name == "SIGTERM":  # before the program could listen
            assert not any(output.parent.iterdir())
        else:
            assert run.code in ((-9, 0) if name == "SIGKILL" else (1, 0)), run
        assert "Traceback" not in run.err
        resumed.append(assert_survives(arguments, output, runner, whole[".mp4"]))
    print(f"{name} at {len(resumed)} random times, all survived: {sorted(resumed)}")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_stopped_by_a_signal(name, clip, weights, runner, whole, tmp_path):
    output = tmp_path / "clip_x4.mp4"
    arguments = command(clip, weights, output)
    run = runner(*arguments, signal=name, kill_at=32)
    assert run.code == 1, run.err
    assert "note: 21 frames are kept" in run.err
    assert run.err.splitlines()[-1] == "error: stopped; the same command continues"
    assert assert_survives(arguments, output, runner, whole[".mp4"]) == 21


def test_stopped_at_lines_of_the_writer(clip, weights, runner, whole, tmp_path):
    """Some of all the lines between which a signal can come; -m slow tries a hundred."""
    stop_at_lines(5, clip, weights, runner, whole, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_stopped_at_a_hundred_lines_of_the_writer(clip, weights, runner, whole, tmp_path):
    stop_at_lines(100, clip, weights, runner, whole, tmp_path)


def stop_at_lines(tries, clip, weights, runner, whole, tmp_path) -> None:
    (tmp_path / "probe").mkdir()
    probe = runner(*command(clip, weights, tmp_path / "probe" / "clip_x4.mp4"), line=0)
    assert probe.operations > 500
    resumed = []
    for line in sorted(random.Random(2).sample(range(1, probe.operations), tries)):
        output = tmp_path / str(line) / "clip_x4.mp4"
        output.parent.mkdir()
        arguments = command(clip, weights, output)
        run = runner(*arguments, signal="SIGINT", line=line)
        assert (run.code, "Traceback" in run.err) == (1, False), run
        assert run.err.splitlines()[-1] == "error: stopped; the same command continues"
        resumed.append(assert_survives(arguments, output, runner, whole[".mp4"]))
    assert resumed == sorted(resumed)
    print(f"SIGINT at {tries} of {probe.operations} lines, all survived: {resumed}")


@pytest.mark.parametrize("name", ["_begin", "add"])
def test_stopped_where_the_state_changes(name, clip, weights, runner, whole, tmp_path):
    """At every third line of the functions that begin and end the first segment."""
    (tmp_path / "probe").mkdir()
    arguments = command(clip, weights, tmp_path / "probe" / "clip_x4.mp4")
    total = runner(*arguments, inside=name, line=0).operations
    assert total >= 4 * 4  # segments, lines
    for line in range(2, total // 4 + 1, 3):
        output = tmp_path / str(line) / "clip_x4.mp4"
        output.parent.mkdir()
        arguments = command(clip, weights, output)
        run = runner(*arguments, signal="SIGINT", inside=name, line=line)
        assert (run.code, "Traceback" in run.err) == (1, False), run
        resumed = assert_survives(arguments, output, runner, whole[".mp4"])
        assert resumed == (0 if name == "_begin" else 6)


def test_a_hangup_does_not_stop_what_ignores_it(clip, weights, runner, whole, tmp_path):
    """As nohup wants it; other signals still stop the run."""
    output = tmp_path / "clip_x4.mp4"
    arguments = command(clip, weights, output)
    run = runner(*arguments, signal="SIGTERM", ignored="SIGHUP", kill_at=32)
    assert (run.code, "error: stopped" in run.err) == (1, True)
    run = runner(*arguments, signal="SIGHUP", ignored="SIGHUP", kill_at=12)
    assert run.operations > 12
    assert (run.code, run.summary["resumed"]) == (0, 21), run.err
    assert content(output) == whole[".mp4"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"largest": 0.1}, "cannot write: disk full or file too large"),
        ({"largest": 0.8}, "cannot write: disk full or file too large"),
        ({"read": 15, "look": 0}, "clip.mp4: cannot read on: Input/output error"),
        ({"read": 15, "look": 1}, "clip.mp4: cannot read on: Input/output error"),
        ({"encode": 20}, "cannot write: Generic error in an external library"),
    ],
    ids=["full disk in a segment", "full disk while joining", "reading", "copying", "encoding"],
)
def test_failures_keep_what_is_done(fault, message, clip, weights, runner, whole, tmp_path):
    output = tmp_path / "clip_x4.mp4"
    arguments = command(clip, weights, output)
    if share := fault.get("largest"):
        fault = {"largest": int(share * whole["bytes"])}
    run = runner(*arguments, **fault)
    assert run.code == 1
    lines = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in run.err
    assert not output.exists()
    resumed = assert_survives(arguments, output, runner, whole[".mp4"])
    assert resumed == {0.1: 0, 0.8: COUNT, None: [6, COUNT, 15][fault.get("look", 2)]}[share]


@pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler, to replace read()")
@pytest.mark.parametrize(
    ("since", "place"), [("000000.packets", 0.75), ("joined.mkv", 0.5)], ids=["reading", "joining"]
)
def test_a_failing_disk_ends_the_run(since, place, weights, runner, tmp_path):
    """An output without the rest of the film, or of its sound, got its name."""
    clip = media.write_video(tmp_path / "clip.mkv", pictures(60), audio="pcm_s16le")
    output, whole = tmp_path / "out" / "clip_x4.mkv", tmp_path / "whole" / "clip_x4.mkv"
    for file in (output, whole):
        file.parent.mkdir()
    parts = output.with_name(f"{output.name}.parts")
    arguments = command(clip, weights, output)
    place = int(place * clip.stat().st_size)
    run = subprocess.run(
        [sys.executable, "-m", "mana_triton.infer", *map(str, arguments)],
        env=faults.failing_disk(tmp_path, clip, place, parts / since) | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert run.returncode == 1
    [line] = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert f"{clip}: cannot read on: Input/output error" in line
    assert "Traceback" not in run.stderr
    assert runner(*command(clip, weights, whole)).code == 0
    resumed = assert_survives(arguments, output, runner, content(whole))
    assert resumed == 60 if since == "joined.mkv" else 0 < resumed < 45


# what must be the same


@pytest.fixture
def begun(clip, weights, runner, tmp_path):
    """A command whose run was stopped when 15 frames were done."""
    source = tmp_path / "in.mp4"
    source.write_bytes(clip.read_bytes())
    arguments = command(source, weights, tmp_path / "clip_x4.mp4")
    assert runner(*arguments, encode=20).code == 1
    return arguments


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--crf", "20"], "settings crf 18 (now 20.0)"),
        (["-e", "preset=medium"], "settings options preset veryfast (now medium)"),
        (["--segment", "7"], "segment 6 (now 7)"),
        (["--end", "9"], "settings end None (now 9.0)"),
        (["--compare"], "settings compare False (now True)"),
        (["--lossless"], "settings lossless False (now True)"),
        (["--stream", "0"], "settings stream None (now 0)"),
        (["--no-limits"], "settings no_limits False (now True)"),
        (["--precision", "bf16"], "settings precision fp32 (now bf16)"),
    ],
)
def test_changed_settings_are_refused(flags, changed, begun, runner, whole, tmp_path):
    parts = tmp_path / "clip_x4.mp4.parts"
    before = {file: file.read_bytes() for file in parts.iterdir()}
    run = runner(*begun, *flags)
    assert_refused(run, changed, parts)
    assert {file: file.read_bytes() for file in parts.iterdir()} == before
    run = runner(*begun)
    assert (run.code, run.summary["resumed"]) == (0, 15)
    assert content(tmp_path / "clip_x4.mp4") == whole[".mp4"]


def assert_refused(run: faults.Run, changed: str, parts: Path) -> None:
    (line,) = [line for line in run.err.splitlines() if line.startswith("error: ")]
    assert run.code == 1
    assert line.startswith(f"error: {parts}: was begun with ")
    assert changed in line
    assert line.endswith(
        "; give the command, weights and input of before, or --restart to begin anew"
    )


def test_changed_weights_are_refused(begun, runner, tmp_path):
    torch.manual_seed(1)
    other = MANA(MANAConfig(channels=8, encoder_blocks=1, decoder_blocks=1, memory_slots=8))
    checkpoint.save(other, tmp_path / "other.safetensors")
    run = runner(*begun, "-n", tmp_path / "other.safetensors")
    assert_refused(run, "other weights", tmp_path / "clip_x4.mp4.parts")


def test_another_processor_or_program_is_another_job(clip, weights, tmp_path, monkeypatch):
    """Work that was begun on a processor with AVX-512 went on, with other frames, without it."""
    (tmp_path / "pictures").mkdir()
    Image.fromarray(pictures()[0]).save(tmp_path / "pictures" / "a.png")
    args, upscaler = infer.parse_args([str(clip)]), Upscaler(weights, EngineOptions(device="cpu"))

    def jobs() -> list[dict[str, Any]]:
        found = []
        for source in (clip, tmp_path / "pictures"):
            with open_reader(source) as reader:
                found.append(infer._job(reader, upscaler, args))
        return found

    before = jobs()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
    monkeypatch.setattr(PIL, "__version__", "0")
    video, folder = ("; ".join(_differences(*pair)) for pair in zip(before, jobs(), strict=True))
    assert re.fullmatch(r"processor cpu \w+ \(now other\)", video)
    assert re.fullmatch(r"processor cpu \w+ \(now other\); software PIL [\d.]+ \(now 0\)", folder)


@pytest.mark.parametrize("change", ["content", "time", "length"])
def test_a_changed_input_is_refused_or_restarted(change, begun, runner, whole, tmp_path):
    source = tmp_path / "in.mp4"
    times = source.stat()
    data = bytearray(source.read_bytes())
    if change == "content":
        data[len(data) // 2] ^= 1
    source.write_bytes(data + (b"\0" if change == "length" else b""))
    if change != "time":
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    else:
        os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    parts = tmp_path / "clip_x4.mp4.parts"
    named = {"content": "input other content", "time": "input modified", "length": "input bytes"}
    assert_refused(runner(*begun), named[change], parts)
    run = runner(*begun, "--restart")
    assert (run.code, run.summary["resumed"]) == (0, 0)
    assert not parts.exists()
    assert change == "content" or content(tmp_path / "clip_x4.mp4") == whole[".mp4"]


@pytest.mark.parametrize(
    "damage",
    ["a bit", "missing", "torn manifest", "manifest of zeros", "another number in the manifest"],
)
def test_damaged_work_is_done_again(damage, begun, runner, whole, tmp_path):
    parts = tmp_path / "clip_x4.mp4.parts"
    segment, manifest = parts / "000001.packets", parts / "manifest"
    if damage == "a bit":
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 16
        segment.write_bytes(data)
    elif damage == "missing":
        segment.unlink()
    else:
        lines = manifest.read_bytes().splitlines(keepends=True)
        half = lines[2][: len(lines[2]) // 2]
        damaged = {"torn manifest": half, "manifest of zeros": b"\0" * 512}
        lines[2:] = [damaged.get(damage, lines[2].replace(b'"number": ', b'"number": 1'))]
        manifest.write_bytes(b"".join(lines))
    run = runner(*begun)
    assert (run.code, run.summary["resumed"]) == (0, 6)
    assert ("is damaged; continuing from frame 6" in run.err) == ("manifest" not in damage)
    assert content(tmp_path / "clip_x4.mp4") == whole[".mp4"]


def test_a_manifest_without_its_beginning_is_not_thrown_away(begun, runner, tmp_path):
    manifest = tmp_path / "clip_x4.mp4.parts" / "manifest"
    manifest.write_bytes(b"x" + manifest.read_bytes()[1:])
    before = sorted(manifest.parent.iterdir())
    run = runner(*begun)
    assert (run.code, sorted(manifest.parent.iterdir())) == (1, before)
    assert "manifest: is damaged; use --restart to begin anew" in run.err


def test_pictures_are_recognized_wherever_they_lie(tmp_path):
    """The order of a set of paths is another in each folder, as it is in each process."""
    seen = set()
    for number in range(16):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, color in (("first", "red"), ("last", "blue")):
            Image.new("RGB", (4, 4), color).save(folder / f"{name}.png")
            os.utime(folder / f"{name}.png", (1, 1))
        with open_reader(folder) as reader:
            seen.add(input_identity(reader)["content"])
    assert len(seen) == 1


def test_an_input_that_cannot_be_read_is_named(clip, tmp_path, monkeypatch):
    def failing(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with open_reader(clip) as reader:
        monkeypatch.setattr(Path, "open", failing)
        with pytest.raises(MediaError, match=rf"{clip}: cannot read: Input/output error"):
            input_identity(reader)


@pytest.mark.parametrize("when", ["before", "joining"])
@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_an_input_that_changes_meanwhile_is_refused(name, when, clip, tmp_path, monkeypatch):
    """The pictures of one film came with the sound of another, and exit code 0."""
    source, output = tmp_path / "in.mp4", tmp_path / name
    source.write_bytes(clip.read_bytes())
    other = media.write_video(tmp_path / "other.mp4", pictures(9), audio=True)
    complete = VideoWriter.complete

    def replaced(writer: VideoWriter) -> None:
        complete(writer)
        other.replace(source)

    def opened(reader) -> Any:
        encoding = {"options": VERYFAST} if output.suffix else {}
        size = reader.width, reader.height
        return open_resumable(output, reader, *size, job={}, length=6, **encoding)

    with open_reader(source) as reader, pytest.raises(Changed) as caught, opened(reader) as writer:
        trail = Trail(3)
        for frame in reader:
            writer.write(frame.rgb, frame, trail.see(frame)[1])
        if when == "joining" and output.suffix:
            monkeypatch.setattr(VideoWriter, "complete", replaced)
        else:
            other.replace(source)
    assert str(caught.value) == (
        f"{source}: has changed while it was enlarged; use --restart to begin anew"
    )
    assert not output.exists()
    with open_reader(source) as reader, pytest.raises(Changed, match="input bytes"):
        opened(reader)


def test_two_runs_at_once(begun, runner, whole, tmp_path):
    parts = tmp_path / "clip_x4.mp4.parts"
    with (parts / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = runner(*begun)
        assert run.code == 1
        output = tmp_path / "clip_x4.mp4"
        assert run.err == f"error: {output}: another process is writing it; wait for that one\n"
    assert runner(*begun).summary["resumed"] == 15


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.EAGAIN, "{}: another process is writing it; wait for that one"),
        (errno.EWOULDBLOCK, "{}: another process is writing it; wait for that one"),
        (errno.ENOLCK, "{}.parts: cannot be locked: No locks available; write to a disk that allo"),
        (errno.EOPNOTSUPP, "{}.parts: cannot be locked: Operation not supported; write to a disk "),
        (errno.EACCES, "{}.parts: cannot be locked: permission denied; write to a disk that allow"),
    ],
)
def test_a_lock_that_fails_says_why(code, message, tmp_path, monkeypatch):
    output, parts = tmp_path / "out.mp4", tmp_path / "out.mp4.parts"

    def flock(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", flock)
        with pytest.raises(MediaError) as caught:
            Parts(output, {}, False)
    assert str(caught.value).startswith(message.format(output))
    # what another process may have begun stays
    assert parts.exists() == ("another" in message)


@pytest.mark.parametrize("flags", [[], ["--restart"]])
def test_a_folder_that_is_not_ours(flags, clip, weights, runner, tmp_path):
    output = tmp_path / "clip_x4.mp4"
    letter = tmp_path / "clip_x4.mp4.parts" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("precious")
    run = runner(*command(clip, weights, output), *flags)
    assert (run.code, run.err) == (1, f"error: {letter}: is not ours; move it elsewhere\n")
    assert letter.read_text() == "precious"


def test_unfinished_work_is_not_put_behind_a_link(clip, weights, runner, tmp_path):
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "clip_x4.mp4"
    elsewhere.mkdir()
    (tmp_path / "clip_x4.mp4.parts").symlink_to(elsewhere)
    run = runner(*command(clip, weights, output))
    assert (run.code, list(elsewhere.iterdir())) == (1, [])
    assert run.err == f"error: {output}.parts: is a symbolic link; move it elsewhere\n"


@pytest.mark.parametrize("flags", [[], ["--restart"]])
@pytest.mark.parametrize("name", ["frames", "lock", "manifest"])
def test_links_in_unfinished_work_are_not_followed(name, flags, clip, weights, runner, tmp_path):
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "clip_x4.mp4"
    (elsewhere / "folder").mkdir(parents=True)
    (elsewhere / "letter.txt").write_text("precious")
    parts = tmp_path / "clip_x4.mp4.parts"
    parts.mkdir()
    link = parts / name
    link.symlink_to(elsewhere if name == "frames" else elsewhere / "new")
    run = runner(*command(clip, weights, output), *flags)
    assert (run.code, run.err) == (1, f"error: {link}: is a symbolic link; remove it\n")
    assert (elsewhere / "letter.txt").read_text() == "precious"
    assert sorted(file.name for file in elsewhere.iterdir()) == ["folder", "letter.txt"]


# inputs and outputs of other kinds


@pytest.mark.parametrize("name", ["a.h264", "a.avi", "a.mkv", "a.ts"])
def test_every_input_continues(name, weights, runner, tmp_path):
    """A bare H.264 stream has no times, and AVI's run backwards if there are B frames."""
    source = media.write_video(
        tmp_path / name,
        pictures(70, (8, 12)),
        options={"g": "9", "bf": "2", "crf": "12"},
        time_base=Fraction(1, 25),
        color=(1, 1, 1, 1),
    )
    assert runner(*command(source, weights, tmp_path / "whole.mp4")).code == 0
    arguments = command(source, weights, tmp_path / "out.mp4")
    assert runner(*arguments, encode=64).code == 1
    run = runner(*arguments)
    assert (run.code, run.summary["resumed"], run.summary["frames"]) == (0, 63, 70)
    assert content(tmp_path / "out.mp4") == content(tmp_path / "whole.mp4")


def test_joined_recordings_continue(weights, runner, tmp_path):
    """The times of a seek would be found in the first recording, too."""
    options = {"g": "7", "bf": "2", "crf": "12"}
    part = media.write_video(
        tmp_path / "a.ts", pictures(), options=options, audio=True, color=(1, 1, 1, 1)
    )
    source = tmp_path / "in.ts"
    source.write_bytes(2 * part.read_bytes())
    results = []
    for name in ("whole", "resumed"):
        output = tmp_path / name / "clip_x4.mp4"
        output.parent.mkdir()
        if name == "resumed":
            assert runner(*command(source, weights, output), encode=45).code == 1
        run = runner(*command(source, weights, output))
        assert (run.code, run.summary["frames"]) == (0, 2 * COUNT), run.err
        assert (run.summary["resumed"] > COUNT) == (name == "resumed")
        assert "note: times begin anew at 1 place, as of joined" in run.err
        results.append(content(output))
    assert results[0] == results[1]
    assert len(results[0][1]) == 2 * len(media.packets(part, "audio"))


def ten_bits(folder: Path) -> Path:
    deep = [media.rgb_to_yuv(rgb, "bt2020", False, 10) for rgb in pictures()]
    return media.write_video(
        folder / "in.mkv", deep, "yuv444p10le", pix_fmt="yuv444p10le", codec="ffv1",
        options={"level": "3"}, color=(9, 9, 16, 1),
    )  # fmt: skip


def fields(folder: Path) -> Path:
    """Interlaced frames, then progressive ones for more than a second, then interlaced ones."""
    parts = []
    kinds = ("interlace,setfield=tff", "fps=25", "interlace,setfield=tff")
    for kind, start, lasts in zip(kinds, (0, 0.4, 2), (0.4, 1.6, 0.4), strict=True):
        part = folder / "part.ts"
        flags = ("-flags", "+ildct+ilme") if "interlace" in kind else ()
        moving = ("-f", "lavfi", "-i", f"testsrc2=s=40x24:d={lasts}:r=50")
        moving += ("-output_ts_offset", start)
        media.ffmpeg(*moving, "-vf", kind, "-c:v", "mpeg2video", "-q:v", 2, "-g", 4, *flags, part)
        parts.append(part.read_bytes())
        part.unlink()
    (folder / "in.ts").write_bytes(b"".join(parts))
    return folder / "in.ts"


def see_through(folder: Path) -> Path:
    (folder / "in").mkdir()
    rng = np.random.default_rng(2)
    for number, rgb in enumerate(pictures()):
        alpha = rng.integers(0, 65536, rgb.shape[:2]).astype(np.uint16)
        images.write_picture(
            folder / "in" / f"{number:02d}.png", rgb.astype(np.uint16) * 257, alpha
        )
    return folder / "in"


def animation(path: Path) -> Path:
    """Every picture shows another time; those of a GIF only hold what has changed."""
    frames = []
    for number, rgb in enumerate(pictures()):
        rgb[0] = 9 * number  # Pillow joins frames that are equal
        frames.append(Image.fromarray(rgb))
    times = [40 + 10 * (number % 5) for number in range(COUNT)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, lossless=True)
    return path


LOSSLESS = ["--codec", "ffv1", "--lossless"]


@pytest.mark.parametrize(
    ("make", "name", "flags"),
    [
        pytest.param(ten_bits, "out.mkv", LOSSLESS, id="10 bits without loss"),
        pytest.param(ten_bits, "out.mp4", ["--compare", *ENCODER], id="10 bits beside bicubic"),
        pytest.param(fields, "out.mkv", LOSSLESS, id="fields"),
        pytest.param(see_through, "out", [], id="16 bits and transparency"),
        pytest.param(see_through, "out.mkv", LOSSLESS, id="16 bits to a video"),
        pytest.param(lambda x: animation(x / "in.gif"), "out.mkv", LOSSLESS, id="gif"),
        pytest.param(lambda x: animation(x / "in.webp"), "out", [], id="animated webp"),
    ],
)
def test_what_is_kept_is_kept_by_a_resumed_run(make, name, flags, weights, runner, tmp_path):
    source = make(tmp_path)
    results = []
    for folder in ("whole", "resumed"):
        output = tmp_path / folder / name
        output.parent.mkdir()
        arguments = [source, "-o", output, "-n", weights, *SEGMENT, *flags]
        if folder == "resumed":
            run = runner(*arguments, encode=22)
            assert (run.code, "Traceback" in run.err) == (1, False), run.err
        run = runner(*arguments)
        assert run.code == 0, run.err
        assert (run.summary["resumed"] >= 12) == (folder == "resumed")
        results.append(content(output))
    assert results[0] == results[1]


def test_avi_keeps_its_constant_rate(clip, weights, runner, tmp_path):
    """Times that are closer than a tick move on, and must do so over the end of a segment."""
    times = np.cumsum([0, *[40, 5, 5, 5, 5, 400] * 5])[:COUNT].tolist()
    source = media.write_video(
        tmp_path / "in.mkv", pictures(), pts=times, time_base=Fraction(1, 1000), audio=True,
        color=(1, 1, 1, 1),
    )  # fmt: skip
    results = []
    for name in ("whole", "parts"):
        output = tmp_path / name / "clip.avi"
        output.parent.mkdir()
        arguments = command(source, weights, output)
        if name == "parts":
            assert runner(*arguments, encode=17).code == 1
        run = runner(*arguments)
        assert (run.code, run.summary["frames"]) == (0, COUNT), run.err
        assert "note: avi holds a constant frame rate only" in run.err
        assert (run.summary["resumed"] > 0) == (name == "parts")
        with av.open(str(output)) as container:  # whose frames are told apart by order, dts
            packets = [packet for packet in container.demux(video=0) if packet.size]
            results.append((content(output), [p.dts * p.time_base for p in cast(Any, packets)]))
    assert results[0] == results[1]
    with open_reader(source) as reader:
        ticks, last = [], -1
        for time in times:
            last = max(round(time * reader.rate / 1000), last + 1)
            ticks.append(last / reader.rate)
    assert results[0][1] == ticks


def test_seeking_among_fields(tmp_path):
    """Wherever decoding begins, an interlaced frame is made of the same neighbors."""
    source = fields(tmp_path)
    with open_reader(source) as reader:
        frames = list(reader)
        assert any("interlaced" in note for note in reader.notes)
        assert len(frames) == 10 + 40 + 10
        for first in range(0, len(frames), 3):
            reader.seek(frames[first].pts)
            again = list(reader)
            assert [f.pts for f in again] == [f.pts for f in frames[first:]]
            for a, b in zip(again, frames[first:], strict=True):
                assert np.array_equal(a.rgb, b.rgb), first


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_seeking_in_an_animation(suffix, tmp_path):
    """Pictures that hold only what has changed come out whole."""
    with open_reader(animation(tmp_path / f"in{suffix}")) as reader:
        frames = list(reader)
        for first in (0, 1, 13, COUNT - 1):
            reader.seek(frames[first].pts)
            again = list(reader)
            assert [f.pts for f in again] == [f.pts for f in frames[first:]]
            for a, b in zip(again, frames[first:], strict=True):
                assert np.array_equal(a.rgb, b.rgb)


def test_seeking_is_not_relied_on(clip, monkeypatch):
    """A seek that ends elsewhere is noticed, and so is another picture at the right place."""
    with open_reader(clip) as reader:
        trail, frames = Trail(3), list(reader)
        seen = [trail.see(frame)[1] for frame in frames]
    done = seen[19].to_json()
    with open_reader(clip) as reader:
        assert [f.pts for f in frames_after(reader, done)] == [f.pts for f in frames[17:]]
        assert not reader.notes
    with open_reader(clip) as reader:
        seek = reader.seek
        later = frames[18].pts
        monkeypatch.setattr(reader, "seek", lambda pts: seek(pts if pts is None else later))
        found = list(frames_after(reader, done))
        assert [f.pts for f in found] == [f.pts for f in frames[17:]]
        assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(found, frames[17:], strict=True))
        assert reader.notes == ["seeking in this file is not exact; it is decoded from its start"]
    done["context"][1][1] = "0" * 64
    with open_reader(clip) as reader, pytest.raises(Changed, match="decodes to other pictures"):
        frames_after(reader, done)


def test_warnings_of_an_earlier_run_are_kept(weights, runner, tmp_path):
    """Damage before the place where the second run continues."""
    options = {"g": "5", "bf": "0", "qp": "0", "preset": "ultrafast"}
    frames = pictures(size=(24, 40))
    source = media.write_video(tmp_path / "in.mkv", frames, options=options, color=(1, 1, 1, 1))
    with av.open(str(source)) as container:
        starts = [packet.pos or 0 for packet in container.demux(video=0) if packet.size]
    data = bytearray(source.read_bytes())
    data[starts[5] + 30 : starts[6]] = bytes(starts[6] - starts[5] - 30)  # a key frame
    source.write_bytes(data)
    warnings = []
    for name in ("whole", "resumed"):
        arguments = command(source, weights, tmp_path / f"{name}.mkv")
        if name == "resumed":
            assert runner(*arguments, encode=15).code == 1
        run = runner(*arguments)
        assert (run.code, run.summary["resumed"] >= 6) == (0, name == "resumed"), run.err
        warnings.append([line for line in run.err.splitlines() if line.startswith("warning: ")])
    assert warnings[0] == warnings[1]
    assert "damaged or missing: " in warnings[0][0]


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_notes_of_an_earlier_run_are_kept(name, clip, tmp_path):
    """What was said once, of a frame that the second run does not see."""
    encoding: dict[str, Any] = {"options": VERYFAST} if name == "out.mp4" else {}
    with open_reader(clip) as reader:
        size = reader.width, reader.height
        writer = open_resumable(tmp_path / name, reader, *size, job={}, length=6, **encoding)
        trail, frames = Trail(3), list(reader)[:20]
        for frame in frames:
            writer.write(frame.rgb, frame, trail.see(frame)[1])
            reader.notes += ["said of a frame"] * (frame is frames[2])
        writer.abort()
    with open_reader(clip) as reader:
        writer = open_resumable(tmp_path / name, reader, *size, job={}, length=6, **encoding)
        assert writer.number >= 15
        assert writer.notes.count("said of a frame") == 1
        writer.abort()


def test_another_transparency_is_another_picture(tmp_path):
    """A folder of pictures whose opacity alone has changed does not pass for the same."""
    frames = list(pictures(4))
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        for number, rgb in enumerate(frames):
            alpha = np.full(rgb.shape[:2], 90 if (name, number) == ("after", 2) else 100, np.uint8)
            images.write_picture(tmp_path / name / f"{number}.png", rgb, alpha)
    with open_reader(tmp_path / "before") as reader:
        trail = Trail(3)
        done = [trail.see(frame)[1] for frame in reader][-1].to_json()
        list(frames_after(reader, done))
    with open_reader(tmp_path / "after") as reader, pytest.raises(Changed, match="other pictures"):
        frames_after(reader, done)


def test_a_part_of_the_input(clip, weights, runner, tmp_path):
    limits = ("--start", "0.5", "--end", "2")
    assert runner(*command(clip, weights, tmp_path / "whole.mp4"), *limits).code == 0
    arguments = [*command(clip, weights, tmp_path / "out.mp4"), *limits]
    assert runner(*arguments, encode=9).code == 1
    assert runner(*arguments).summary["resumed"] >= 6
    assert content(tmp_path / "out.mp4") == content(tmp_path / "whole.mp4")


@pytest.mark.parametrize(
    ("codec", "suffix", "option"),
    [
        ("libx264", ".ts", "preset=veryfast"),
        ("libx264", ".mkv", "preset=veryfast"),
        ("libx265", ".mp4", "preset=ultrafast"),
        ("libsvtav1", ".mp4", "preset=12"),
        ("libvpx-vp9", ".webm", "cpu-used=8"),
        ("ffv1", ".mkv", "level=3"),
        ("prores_ks", ".mov", "vendor=apl0"),
    ],
)
def test_joined_segments_are_one_video(codec, suffix, option, weights, runner, tmp_path):
    """As many frames at the same times, of the same stream, as one encoder makes."""
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    source = media.write_video(tmp_path / "in.mkv", pictures(12), color=(1, 1, 1, 1))
    results = []
    for name, length in (("whole", 12), ("parts", 4)):
        output = tmp_path / f"{name}{suffix}"
        arguments = [source, "-o", output, "-n", weights, "--codec", codec, "--segment", length]
        arguments += ["-e", option]
        if name == "parts":
            assert runner(*arguments, encode=6).code == 1
        run = runner(*arguments)
        assert run.code == 0, run.err
        with av.open(str(output)) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            frames = list(container.decode(stream))
            headers = stream.codec_context.extradata, context.pix_fmt, context.colorspace
            results.append(([frame.pts for frame in frames], headers, stream.time_base, frames))
    (*whole, first), (*parts, second) = results
    assert whole == parts
    for one, other in zip(first, second, strict=True):
        difference = one.to_ndarray(format="gray").astype(int) - other.to_ndarray(format="gray")
        assert np.abs(difference).mean() < (0.01 if codec in ("ffv1", "prores_ks") else 6)


def test_x264_is_repeatable(clip, weights):
    """Fails with x264's functions for AVX-512, which gave 13 different results in 200."""
    results = set()
    with open_reader(clip) as reader:
        frames = list(reader)[:6]
        for _ in range(40):
            container = av.open(str(clip.with_name("none.mp4")), "w")  # never written
            encoder = VideoEncoder(Path("out.mp4"), reader, 160, 96, container, options=VERYFAST)
            packets = []
            for frame in frames:
                packets += encoder.encode(frame.rgb.repeat(4, 0).repeat(4, 1), frame)
            results.add(tuple(map(bytes, packets + encoder.finish())))
            container.close()
    assert len(results) == 1


@pytest.mark.slow
def test_a_full_file_system(clip, weights, runner, whole, tmp_path):
    """A small tmpfs; room is made between the runs."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={4 * whole['bytes']}", "tmpfs", str(disk)],
        check=False,
        capture_output=True,
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    try:
        for room in (0.1, 0.4, 0.7, 0.9, 1.5):  # of the output: first segment ... while joining
            (disk / "filler").write_bytes(bytes(int((4 - room) * whole["bytes"])))
            output = disk / "clip_x4.mp4"
            run = runner(*command(clip, weights, output))
            assert run.code == 1, room
            assert "the disk is full; free some space" in run.err
            assert not output.exists()
            (disk / "filler").unlink()
        assert runner(*command(clip, weights, output)).code == 0
        assert content(output) == whole[".mp4"]
        assert [file.name for file in disk.iterdir()] == [output.name]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_memory_is_constant_over_twenty_thousand_frames(weights, tmp_path):
    """The resident memory of a run, sampled: its slope over the second half is about none."""
    picture = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    frames = [np.roll(picture, i, axis=1) for i in range(16)] * 1250
    clip = media.write_video(tmp_path / "long.mp4", frames)
    arguments = [clip, "-o", tmp_path / "out.mkv", "-n", weights, *ENCODER]
    command = [sys.executable, "-m", "mana_triton.infer", *map(str, arguments)]
    samples = []  # frames done, MiB
    with subprocess.Popen(
        command, cwd=faults.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            time.sleep(0.5)
            manifest = tmp_path / "out.mkv.parts" / "manifest"
            status = Path(f"/proc/{process.pid}/status")
            with contextlib.suppress(OSError):  # the process ends in between
                done = max(len(manifest.read_bytes().splitlines()) - 1, 0) * LENGTH
                resident = [x for x in status.read_text().splitlines() if x.startswith("VmRSS")]
                samples += [(done, int(line.split()[1]) / 1024) for line in resident]
        assert process.stdout
        assert json.loads(process.stdout.read().splitlines()[-1])["frames"] == 20000
    later = np.array([sample for sample in samples if sample[0] >= 10000])
    assert len(later) >= 10
    slope = np.polyfit(later[:, 0], later[:, 1], 1)[0] * 10000
    print(f"RSS {later[0, 1]:.0f} to {later[-1, 1]:.0f} MiB, {slope:+.2f} MiB in 10,000 frames")
    assert abs(slope) < 8  # 0.8 kB a frame
