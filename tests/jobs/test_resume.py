"""Exact resume: what continues gives the bytes of an uninterrupted run, what differs is refused."""

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import job_clips as clips
import media
import numpy as np
import pytest
import torch
from faults import Run
from hypothesis import given, settings
from hypothesis import strategies as st
from job_clips import COUNT, ENCODER, SEGMENT, STARTS, command, content, scene_pictures
from PIL import Image

from mana_triton import checkpoint
from mana_triton.engine.scene_cuts import CutDetector
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.infer import parse_options
from mana_triton.jobs import job, resume
from mana_triton.jobs.options import JobOptions
from mana_triton.jobs.resume import (
    PartsFolder,
    ResumePoint,
    frames_from,
    input_hash,
    parts_path,
    track_scenes,
)
from mana_triton.jobs.segments import ResumableWriter, open_resumable
from mana_triton.model import MANA, MANAConfig
from mana_triton.video import images
from mana_triton.video.encoder import EncodeOptions, VideoEncoder
from mana_triton.video.frame import Frame, MediaError
from mana_triton.video.reader import Reader, open_reader
from mana_triton.video.writer import VideoWriter

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

VERYFAST = EncodeOptions(options=(("preset", "veryfast"),))
LOSSLESS = ["--codec", "ffv1", "--lossless"]


def frame_of(rgb: np.ndarray, number: int) -> Frame:
    return Frame(rgb, number, Fraction(1, 25), 1)


def saved(point: ResumePoint) -> ResumePoint:
    return ResumePoint(**json.loads(json.dumps(asdict(point))))


def open_output(output: Path, reader: Reader, **options: Any) -> ResumableWriter:
    """A writer of frames as they are read, in segments of six."""
    encode = VERYFAST if output.suffix else EncodeOptions()
    given = JobOptions(reader.path, output, segment=6, encode=encode, **options)
    return open_resumable(output, reader, (reader.width, reader.height), {}, given)


# what is remembered


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 29), st.integers(0, 2**32))
def test_scene_cuts_continue_after_any_frame(at, seed):
    rng = np.random.default_rng(seed)
    frames, picture = [], None
    for number in range(30):
        if picture is None or rng.random() < 0.25:
            picture = rng.integers(0, 256, (12, 16, 3)).astype(np.float64)
        picture = (picture + rng.normal(0, 15, picture.shape)).clip(0, 255)
        frames.append(frame_of(picture.astype(np.uint8), number))
    detector = CutDetector()
    expected = [detector.is_cut(frame.rgb) for frame in frames]
    tracked = list(track_scenes(frames, 3))
    assert [x.is_cut for x in tracked] == expected
    point = saved(tracked[at - 1].point)
    assert point.number == at
    again = list(track_scenes(frames[point.start :], 3, point))
    assert [x.is_cut for x in again] == expected[point.start :]
    for before, after in zip(tracked[at:], again[len(point.context) :], strict=True):
        assert before.point.number == after.point.number
        assert list(before.point.scores) == list(after.point.scores)


@pytest.mark.parametrize("workers", [1, 2])
def test_stream_continues_bit_by_bit(weights, workers):
    """At cuts, near them, and in a scene shorter than the window."""
    frames = [frame_of(rgb, i) for i, rgb in enumerate(scene_pictures())]
    upscaler = Upscaler(weights, EngineOptions(workers=workers))
    expected = [picture for _, picture in upscaler.stream(frame.rgb for frame in frames)]
    tracked = list(track_scenes(frames, upscaler.window_radius))
    assert tuple(i for i, x in enumerate(tracked) if x.is_cut) == STARTS[1:]
    for at in (1, 2, 4, 10, 11, 14, 15, 17, 25):
        point = saved(tracked[at - 1].point)
        results = upscaler.stream(
            track_scenes(frames[point.start :], upscaler.window_radius, point),
            pixels=lambda source: source.frame.rgb,
            is_cut=lambda source: source.is_cut,
            start=point.start,
            skip=len(point.context),
        )
        results = [picture for _, picture in results]
        assert len(results) == COUNT - at
        for number, result in enumerate(results, at):
            assert np.array_equal(result, expected[number]), (at, number)


def test_input_hash_is_the_same_wherever_the_files_lie(tmp_path):
    hashes = set()
    for number in range(8):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, color in (("first", "red"), ("last", "blue")):
            Image.new("RGB", (4, 4), color).save(folder / f"{name}.png")
            os.utime(folder / f"{name}.png", (1, 1))
        with open_reader(folder) as reader:
            hashes.add(input_hash(reader.files))
    assert len(hashes) == 1


# what must be the same


@pytest.mark.parametrize(
    ("flags", "changed"),
    [
        (["--crf", "20"], "crf 18.0 (now 20.0)"),
        (["-e", "preset=fast"], "-e preset None (now fast)"),
        (["--segment", "7"], "segment 250 (now 7)"),
        (["--end", "9"], "end None (now 9.0)"),
        (["--compare"], "compare False (now True)"),
        (["--lossless"], "lossless False (now True)"),
        (["--stream", "0"], "stream None (now 0)"),
        (["--no-limits"], "limits True (now False)"),
        (["--precision", "bf16"], "precision fp32 (now bf16)"),
    ],
)
def test_other_settings_are_another_job(flags, changed, weights, tmp_path):
    jobs = []
    for arguments in ([], flags):
        options = parse_options(["in.mp4", *arguments])
        upscaler = Upscaler(weights, options.engine)
        jobs.append(job.identity(upscaler, upscaler.plan(12, 16), options))
    PartsFolder(tmp_path / "out.mp4", jobs[0])._lock.release()
    with pytest.raises(MediaError, match=f": was started with {re.escape(changed)}; "):
        PartsFolder(tmp_path / "out.mp4", jobs[1])


def test_refused_work_is_kept(started, runner, whole, tmp_path):
    parts = tmp_path / "clip_x4.mp4.parts"
    before = {file: file.read_bytes() for file in parts.iterdir()}
    assert_refused(runner(*started, "--crf", 20), "crf 18.0 (now 20.0)", parts)
    assert {file: file.read_bytes() for file in parts.iterdir()} == before
    run = runner(*started)
    assert (run.code, run.summary["resumed"]) == (0, 15)
    assert content(tmp_path / "clip_x4.mp4") == whole[".mp4"]


def assert_refused(run: Run, changed: str, parts: Path) -> None:
    (line,) = run.errors
    assert run.code == 1
    assert line.startswith(f"error: {parts}: was started with ")
    assert changed in line
    assert line.endswith(
        "; repeat that command with the same weights and input, or use --restart to start over"
    )


def test_other_weights_are_refused(started, runner, tmp_path):
    torch.manual_seed(1)
    other = MANA(MANAConfig(channels=8, encoder_blocks=1, decoder_blocks=1, memory_slots=8))
    checkpoint.save(other, tmp_path / "other.safetensors")
    run = runner(*started, "-n", tmp_path / "other.safetensors")
    assert_refused(run, "other weights", tmp_path / "clip_x4.mp4.parts")


def test_another_processor_or_software_is_another_job(weights, tmp_path, monkeypatch):
    """AVX-512 and AVX2 add sums in another order."""
    upscaler, options = Upscaler(weights, EngineOptions(device="cpu")), JobOptions(tmp_path)
    plan = upscaler.plan(12, 16)
    before = job.identity(upscaler, plan, options)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "other")
    monkeypatch.setattr(av, "__version__", "0")
    after = job.identity(upscaler, plan, options)
    assert {key for key in before if before[key] != after[key]} == {"processor", "version of av"}
    PartsFolder(tmp_path / "out.mp4", before).complete()
    with pytest.raises(MediaError, match=r"processor \w+ \(now other\); version of av [\d.]+ \(no"):
        PartsFolder(tmp_path / "out.mp4", after)


@pytest.mark.parametrize("change", ["content", "time", "length"])
def test_changed_input_is_refused_or_restarted(change, started, runner, whole, tmp_path):
    source = tmp_path / "in.mp4"
    times = source.stat()
    data = bytearray(source.read_bytes())
    if change == "content":
        data[len(data) // 2] ^= 1
    source.write_bytes(data + (b"\0" if change == "length" else b""))
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns + (change == "time")))
    parts = tmp_path / "clip_x4.mp4.parts"
    assert_refused(runner(*started), "other input", parts)
    run = runner(*started, "--restart")
    assert (run.code, run.summary["resumed"]) == (0, 0)
    assert not parts.exists()
    assert change == "content" or content(tmp_path / "clip_x4.mp4") == whole[".mp4"]


@pytest.mark.parametrize("damage", ["a bit", "missing", "torn state", "state of zeros"])
def test_damaged_segment_is_made_again(damage, started, runner, whole, tmp_path):
    parts = tmp_path / "clip_x4.mp4.parts"
    segment, state = parts / "000001.packets", parts / "000001.json"
    if damage == "a bit":
        data = bytearray(segment.read_bytes())
        data[len(data) // 2] ^= 16
        segment.write_bytes(data)
    elif damage == "missing":
        segment.unlink()
    else:
        state.write_bytes(state.read_bytes()[:90] if damage == "torn state" else b"\0" * 512)
    (parts / ".DS_Store").write_text("of the system")
    run = runner(*started)
    assert (run.code, run.summary["resumed"]) == (0, 6)
    assert ("is damaged; continuing from frame 6" in run.err) == ("state" not in damage)
    assert content(tmp_path / "clip_x4.mp4") == whole[".mp4"]


def test_tidying_may_be_interrupted(tmp_path, monkeypatch):
    """Work without a finished segment must not look like that of another version."""
    output, delete = tmp_path / "out.mp4", resume._delete

    def delete_one(path: Path) -> None:
        delete(path)
        raise KeyboardInterrupt

    PartsFolder(output, {})._lock.release()
    for name in ("000000.packets", "joined.mp4", "000003.json"):
        (parts_path(output) / name).touch()
    monkeypatch.setattr(resume, "_delete", delete_one)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            PartsFolder(output, {})
    assert PartsFolder(output, {}).segments == []
    assert {x.name for x in parts_path(output).iterdir()} == {"lock", "job.json"}


@pytest.mark.parametrize("how", ["damaged", "older", "oldest"])
def test_work_of_another_version_is_refused(how, started, runner, whole, tmp_path):
    parts = tmp_path / "clip_x4.mp4.parts"
    state = parts / "job.json"
    if how == "oldest":  # which had a manifest instead
        state.rename(parts / "manifest")
    else:
        text = state.read_text()
        state.write_text(
            text[:50] if how == "damaged" else text.replace('"format": 3', '"format": 2')
        )
    before = sorted(parts.iterdir())
    run = runner(*started)
    assert (run.code, sorted(parts.iterdir())) == (1, before)
    assert run.errors == [
        f"error: {parts}: is damaged or of another version of this program; use --restart to start "
        "over"
    ]
    run = runner(*started, "--restart")
    assert (run.code, run.summary["resumed"], parts.exists()) == (0, 0, False)
    assert content(tmp_path / "clip_x4.mp4") == whole[".mp4"]


@pytest.mark.parametrize("when", ["before", "joining"])
@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_input_that_changes_meanwhile_is_refused(name, when, scenes, tmp_path, monkeypatch):
    """Or the pictures of one film would come with the sound of another."""
    source, output = tmp_path / "in.mp4", tmp_path / name
    source.write_bytes(scenes.read_bytes())
    other = media.write_video(tmp_path / "other.mp4", scene_pictures(9), audio=True)
    complete = VideoWriter.complete

    def replaced(writer: VideoWriter) -> None:
        complete(writer)
        other.replace(source)

    with (
        open_reader(source) as reader,
        pytest.raises(MediaError) as caught,
        open_output(output, reader) as writer,
    ):
        for tracked in track_scenes(reader, 3):
            writer.write(tracked.frame.rgb, tracked)
        if when == "joining" and output.suffix:
            monkeypatch.setattr(VideoWriter, "complete", replaced)
        else:
            other.replace(source)
    assert str(caught.value) == (
        f"{source}: has changed while it was enlarged; use --restart to start over"
    )
    assert not output.exists()
    with open_reader(source) as reader, pytest.raises(MediaError, match="other input"):
        open_output(output, reader)


def test_two_runs_at_once_are_refused(started, runner, tmp_path):
    with (tmp_path / "clip_x4.mp4.parts" / "lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = runner(*started)
        output = tmp_path / "clip_x4.mp4"
        assert run.code == 1
        assert run.errors == [f"error: {output}: another process is writing it; wait for it to end"]
    assert runner(*started).summary["resumed"] == 15


def test_lock_that_fails_says_why(tmp_path, monkeypatch):
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(MediaError, match=r"cannot be locked: No locks available; write to a disk"):
        PartsFolder(tmp_path / "out.mp4", {})


@pytest.mark.parametrize("flags", [[], ["--restart"]])
def test_foreign_files_are_not_deleted(flags, scenes, weights, runner, tmp_path):
    output = tmp_path / "clip_x4.mp4"
    letter = tmp_path / "clip_x4.mp4.parts" / "letter.txt"
    letter.parent.mkdir()
    letter.write_text("precious")
    run = runner(*command(scenes, weights, output), *flags)
    assert run.errors == [f"error: {letter}: is no part of unfinished work; move it elsewhere"]
    assert (run.code, letter.read_text()) == (1, "precious")


@pytest.mark.parametrize("name", ["", "frames", "lock", "job.json"])
def test_symbolic_links_are_not_followed(name, scenes, weights, runner, tmp_path):
    elsewhere, output = tmp_path / "elsewhere", tmp_path / "clip_x4.mp4"
    elsewhere.mkdir()
    (elsewhere / "letter.txt").write_text("precious")
    parts = tmp_path / "clip_x4.mp4.parts"
    if name:
        parts.mkdir()
    link = parts / name
    link.symlink_to(elsewhere if name in ("", "frames") else elsewhere / "new")
    run = runner(*command(scenes, weights, output), "--restart")
    assert run.errors == [f"error: {link}: is a symbolic link; move it elsewhere"]
    assert [file.name for file in elsewhere.iterdir()] == ["letter.txt"]


# inputs and outputs of other kinds


def plain(name: str, **settings: Any) -> Callable[[Path], Path]:
    """A bare H.264 stream has no times, and AVI's run backwards if there are B frames."""
    options = {"g": "9", "bf": "2", "crf": "12"}
    settings = {"time_base": Fraction(1, 25), "options": options, "color": (1, 1, 1, 1)} | settings
    return lambda folder: media.write_video(folder / name, scene_pictures(), **settings)


def joined(folder: Path) -> Path:
    """Two recordings in one file: the time of a seek is found in the first one, too."""
    part = plain("a.ts", time_base=media.TICK, audio=True)(folder)
    (folder / "in.ts").write_bytes(2 * part.read_bytes())
    return folder / "in.ts"


def ten_bits(folder: Path) -> Path:
    deep = [media.rgb_to_yuv(rgb, "bt2020", False, 10) for rgb in scene_pictures()]
    return media.write_video(
        folder / "in.mkv", deep, "yuv444p10le", pix_fmt="yuv444p10le", codec="ffv1",
        options={"level": "3"}, color=(9, 9, 16, 1),
    )  # fmt: skip


FIELDS = {"g": "9", "bf": "2", "crf": "12", "x264-params": "tff=1:interlaced=1"}
fields = plain("fields.mkv", options=FIELDS)  # deinterlaced with their neighbors


def see_through(folder: Path) -> Path:
    (folder / "in").mkdir()
    rng = np.random.default_rng(2)
    for number, rgb in enumerate(scene_pictures()):
        alpha = rng.integers(0, 65536, rgb.shape[:2]).astype(np.uint16)
        deep = rgb.astype(np.uint16) * 257
        images.write_picture(folder / "in" / f"{number:02d}.png", deep, alpha)
    return folder / "in"


def animation(path: Path) -> Path:
    """Every picture shows another time; those of a GIF only hold what has changed."""
    frames = []
    for number, rgb in enumerate(scene_pictures()):
        rgb[0] = 9 * number  # Pillow joins frames that are equal
        frames.append(Image.fromarray(rgb))
    times = [40 + 10 * (number % 5) for number in range(COUNT)]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, lossless=True)
    return path


UNEVEN = np.cumsum([0, *[40, 5, 5, 5, 5, 400] * 5])[:COUNT].tolist()  # ms, some within a tick


@pytest.mark.parametrize(
    ("make", "name", "flags", "fails_at"),
    [
        pytest.param(plain("a.h264"), "out.mp4", [*ENCODER], 22, id="no times"),
        pytest.param(plain("a.avi"), "out.mp4", [*ENCODER], 22, id="avi"),
        pytest.param(joined, "out.mp4", [], 45, id="joined recordings"),
        pytest.param(plain("a.mkv", pts=UNEVEN, time_base=media.MS, audio=True), "out.avi",
            [*ENCODER], 17, id="to constant rate"),
        pytest.param(ten_bits, "out.mkv", LOSSLESS, 22, id="10 bits without loss"),
        pytest.param(ten_bits, "out.mp4", ["--compare", *ENCODER], 22, id="10 bits and bicubic"),
        pytest.param(fields, "out.mkv", LOSSLESS, 22, id="fields"),
        pytest.param(see_through, "out", [], 22, id="16 bits and transparency"),
        pytest.param(lambda x: animation(x / "in.gif"), "out.mkv", LOSSLESS, 22, id="gif"),
        pytest.param(lambda x: clips.write_scenes(x / "in.mp4"), "out.mp4",
            ["--start", "0.3", "--end", "3"], 9, id="a part of the input"),
    ],
)  # fmt: skip
def test_every_kind_of_input_continues(make, name, flags, fails_at, weights, runner, tmp_path):
    source = make(tmp_path)
    results = []
    for folder in ("whole", "resumed"):
        output = tmp_path / folder / name
        output.parent.mkdir()
        arguments = [source, "-o", output, "-n", weights, *SEGMENT, *flags]
        if folder == "resumed":
            run = runner(*arguments, encode=fails_at)
            assert (run.code, "Traceback" in run.err) == (1, False), run.err
        run = runner(*arguments)
        assert run.code == 0, run.err
        assert (run.summary["resumed"] >= 6) == (folder == "resumed")
        results.append(content(output))
    assert results[0] == results[1]


@pytest.mark.parametrize("make", [fields, lambda x: animation(x / "in.gif")], ids=["fields", "gif"])
def test_seeking_gives_the_frames_of_decoding_all(make, tmp_path):
    """An interlaced frame is made of the same neighbors, a GIF's pictures come out whole."""
    with open_reader(make(tmp_path)) as reader:
        frames = list(reader)
        for first in range(0, len(frames), 3):
            reader.seek(frames[first].pts)
            again = list(reader)
            assert [f.pts for f in again] == [f.pts for f in frames[first:]]
            for a, b in zip(again, frames[first:], strict=True):
                assert np.array_equal(a.rgb, b.rgb), first


def test_seek_that_ends_elsewhere_is_noticed(scenes, monkeypatch):
    """And so is another picture at the right place."""
    with open_reader(scenes) as reader:
        frames = list(reader)
    point = list(track_scenes(frames, 3))[19].point
    with open_reader(scenes) as reader:
        assert [f.pts for f in frames_from(reader, point)] == [f.pts for f in frames[17:]]
        assert not reader.notes
    with open_reader(scenes) as reader:
        seek = reader.seek
        later = frames[18].pts
        monkeypatch.setattr(reader, "seek", lambda pts: seek(pts if pts is None else later))
        found = list(frames_from(reader, point))
        assert [f.pts for f in found] == [f.pts for f in frames[17:]]
        assert all(np.array_equal(a.rgb, b.rgb) for a, b in zip(found, frames[17:], strict=True))
        assert reader.notes == ["seeking in this file is not exact; it is decoded from its start"]
    state = asdict(point)
    state["context"] = [(pts, "0" * 64, is_cut) for pts, _, is_cut in point.context]
    with (
        open_reader(scenes) as reader,
        pytest.raises(MediaError, match="to other pictures"),
    ):
        frames_from(reader, ResumePoint(**state))


@pytest.mark.parametrize("name", ["out.mp4", "out"])
def test_notes_and_damage_of_an_earlier_run_are_repeated(name, scenes, tmp_path):
    with open_reader(scenes) as reader:
        writer = open_output(tmp_path / name, reader)
        for tracked in list(track_scenes(reader, 3))[:20]:
            writer.write(tracked.frame.rgb, tracked)
            reader.notes += ["said of a frame"] * (tracked.point.number == 3)
        writer.abort()
    with open_reader(scenes) as reader:
        writer = open_output(tmp_path / name, reader)
        assert writer.parts.point.number >= 15
        assert writer.notes.count("said of a frame") == 1
        writer.abort()
        next(frames_from(reader, replace(writer.parts.point, damaged=2)))
        assert reader.damaged == 2


# what is written


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
def test_joined_segments_are_one_video(codec, suffix, option, weights, cli, tmp_path):
    """As many frames at the same times, of the same stream, as one encoder makes."""
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    source = media.write_video(tmp_path / "in.mkv", scene_pictures(12), color=(1, 1, 1, 1))
    results = []
    for length in (12, 4):
        output = tmp_path / f"{length}{suffix}"
        assert (
            cli(source, "-o", output, "--codec", codec, "--segment", length, "-e", option)[0] == 0
        )
        with av.open(str(output)) as container:
            stream = container.streams.video[0]
            context = stream.codec_context
            frames = list(container.decode(stream))
            headers = stream.codec_context.extradata, context.pix_fmt, context.colorspace
            results.append(([frame.pts for frame in frames], headers, stream.time_base, frames))
    (*one, first), (*several, second) = results
    assert one == several
    for a, b in zip(first, second, strict=True):
        difference = a.to_ndarray(format="gray").astype(int) - b.to_ndarray(format="gray")
        assert np.abs(difference).mean() < (0.01 if codec in ("ffv1", "prores_ks") else 6)


def test_x264_is_repeatable(scenes):
    """Fails with x264's functions for AVX-512, which gave 13 different results in 200."""
    results = set()
    with open_reader(scenes) as reader:
        frames = list(reader)[:6]
        for _ in range(40):
            container = av.open(str(scenes.with_name("none.mp4")), "w")  # never written
            encoder = VideoEncoder(Path("out.mp4"), reader, 160, 96, container, VERYFAST)
            packets = []
            for frame in frames:
                packets += encoder.encode(frame.rgb.repeat(4, 0).repeat(4, 1), frame)
            digest = hashlib.sha256()
            for packet in packets + encoder.finish():
                digest.update(packet)
            results.add(digest.hexdigest())
            container.close()
    assert len(results) == 1


@pytest.mark.parametrize("fault", ["stopped", "no naming", "no renaming"])
@pytest.mark.parametrize("name", ["clip_x4.mp4", "clip_x4"])
def test_older_output_is_not_taken_for_the_finished_one(name, fault, scenes, tmp_path, monkeypatch):
    """Nor is it lost when it made way for one that cannot be named."""
    output = tmp_path / name
    clips.put_older(output)
    complete, replace = PartsFolder.complete, Path.replace

    def stopped(parts: PartsFolder) -> None:
        complete(parts)
        raise KeyboardInterrupt

    def refused(path: Path, target: Path) -> Path:
        if target == output and (path.suffix != ".old" or fault == "no renaming"):
            raise PermissionError(1, "Operation not permitted")
        return replace(path, target)

    def work() -> int:
        with open_reader(scenes) as reader, open_output(output, reader, overwrite=True) as writer:
            point = writer.parts.point
            tracked = list(track_scenes(frames_from(reader, point), 3, point))
            for source in tracked[len(point.context) :]:
                writer.write(source.frame.rgb, source)
        return point.number

    with monkeypatch.context() as faulty:
        if fault == "stopped":
            faulty.setattr(PartsFolder, "complete", stopped)
        else:
            faulty.setattr(Path, "replace", refused)
        with pytest.raises((KeyboardInterrupt, MediaError)):
            work()
    assert clips.is_older(output) or (fault == "no renaming" and not output.suffix)
    assert work() == COUNT
    assert not clips.is_older(output)
    assert [file.name for file in tmp_path.iterdir()] == [name]
