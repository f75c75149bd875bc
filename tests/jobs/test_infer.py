"""The command line: outputs and what they hold, exit codes, one line for every mistake."""

import json
import os
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import media
import numpy as np
import pytest
import torch
from job_clips import FAST, errors, levels, read_all, write_ramps
from PIL import Image

from mana_triton import infer
from mana_triton.engine.upscaler import upscale
from mana_triton.infer import parse_options
from mana_triton.jobs import folder as folders
from mana_triton.jobs import job
from mana_triton.resize import upscale_bicubic
from mana_triton.video import images
from mana_triton.video.reader import open_reader

ROOT = Path(__file__).parents[2]
KEYS = {
    "output", "frames", "width", "height", "seconds", "ms_per_frame", "peak_mib", "backend",
    "device", "precision", "weights",
}  # fmt: skip


# outputs


def test_video_keeps_sound_times_and_rotation(weights, tmp_path):
    source = write_ramps(tmp_path / "clip.mp4", 6, audio=True, rotation=(90, False))
    command = [sys.executable, "-m", "mana_triton.infer", str(source), "-n", str(weights)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    output = tmp_path / "clip_x4.mp4"
    assert summary.keys() >= KEYS
    assert summary["output"] == str(output)
    assert (summary["frames"], summary["width"], summary["height"]) == (6, 64, 48)
    assert summary["ms_per_frame"] == pytest.approx(1000 * summary["seconds"] / 6, rel=0.01)
    assert 50 < summary["peak_mib"] < 10_000
    assert (summary["backend"], summary["device"]) == ("tiled", "cpu")
    assert summary["weights"] == str(weights)
    assert len(media.packets(source, "audio")) > 5
    assert media.packets(output, "audio") == media.packets(source, "audio")
    assert media.frame_times(output) == media.frame_times(source)
    with open_reader(output) as reader:
        assert (reader.width, reader.height, reader.rotation) == (64, 48, 90)
    lines = result.stderr.splitlines()
    assert lines[0] == f"weights {weights}: as -n says"
    assert re.match(r"cpu, (fp32|bf16) \(.*\), attention by tiled \(.*\); no tiles \(", lines[1])
    assert lines[2] == f"{source} -> {output}, 64x48"
    assert "6 of 6 frames" in result.stderr
    waits = summary["waits"]
    assert set(waits) == {"reading", "network", "writing"}
    assert all(0 <= share <= 1 for share in waits.values()) and max(waits.values()) > 0
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_pictures_become_pictures(folder, weights, cli):
    code, summary, _ = cli(folder)
    output = folder.with_name("frames_x4")
    assert (code, summary["output"]) == (0, str(output))
    assert (summary["frames"], summary["width"], summary["height"]) == (3, 56, 36)
    names = ["frame1.png", "frame2.png", "frame10.png"]
    assert {file.name for file in output.iterdir()} == set(names)
    results = [np.asarray(Image.open(output / name)) for name in names]
    given = [np.asarray(Image.open(folder / name)) for name in names]
    for result, expected in zip(results, upscale(given, weights), strict=True):
        assert np.array_equal(result, expected)


def test_pictures_become_a_video_and_back(folder, bilinear, cli, tmp_path):
    code, summary, _ = cli(folder, "-o", tmp_path / "film.mkv", "--codec", "ffv1", model=bilinear)
    assert (code, summary["frames"]) == (0, 3)
    assert media.frame_times(tmp_path / "film.mkv") == [0, Fraction("0.04"), Fraction("0.08")]
    code, summary, _ = cli(tmp_path / "film.mkv", "-o", tmp_path / "shots", model=bilinear)
    assert (code, summary["width"], summary["height"]) == (0, 4 * 56, 4 * 36)
    shots = sorted((tmp_path / "shots").iterdir())
    assert [file.name for file in shots] == [f"0000000{i}.png" for i in range(3)]
    for shot, source in zip(shots, read_all(folder), strict=True):
        small = np.asarray(Image.open(shot).resize((14, 9), Image.Resampling.BOX), np.float32)
        assert np.abs(small - source).mean() < 4


@pytest.mark.parametrize("bits", [8, 16])
def test_compare_shows_matlab_bicubic_on_the_left(bits, weights, cli, tmp_path):
    """Of 16 bits it was another bicubic than of 8."""
    pictures = [media.smooth_rgb(9, 14, phase) for phase in range(3)]
    if bits == 16:
        noise = np.random.default_rng(0).integers(0, 256, (9, 14, 3)).astype(np.uint16)
        pictures = [(picture.astype(np.uint16) << 8) + noise for picture in pictures]
    source = tmp_path / "in"
    source.mkdir()
    for number, picture in enumerate(pictures):
        images.write_picture(source / f"{number}.png", picture)
    code, summary, _ = cli(source, "--compare")
    assert (code, summary["width"], summary["height"]) == (0, 2 * 56, 36)
    results = read_all(tmp_path / "in_x4")
    for lr, result, ours in zip(read_all(source), results, upscale(pictures, weights), strict=True):
        assert (result.dtype, result.shape) == (lr.dtype, (36, 112, 3))
        assert np.array_equal(result[:, :56], upscale_bicubic(torch.from_numpy(lr)).numpy())
        assert np.array_equal(result[:, 56:], ours)
    eight = upscale_bicubic(torch.from_numpy(media.smooth_rgb(9, 14))).numpy()
    assert np.abs(results[0][:, :56].astype(int) // (1 << bits - 8) - eight).max() <= 1


def test_tile_and_precision_are_used_and_shown(clip, cli):
    code, summary, stderr = cli(clip, *FAST, "-t", "8", "--precision", "bf16", "--device", "cpu")
    assert (code, summary["tile"], summary["precision"]) == (0, 8, "bf16")
    assert "cpu, bf16 (as asked), attention by tiled" in stderr
    assert "; tiles of 8 pixels (" in stderr


def test_encoder_flags_reach_the_encoder(clip, cli, tmp_path):
    for crf in (5, 45):
        arguments = ("--codec", "libx265", "--crf", crf, *FAST, "-e", "g=2")
        assert cli(clip, "-o", tmp_path / f"{crf}.mkv", *arguments)[0] == 0
    sizes = {}
    for crf in (5, 45):
        with av.open(str(tmp_path / f"{crf}.mkv")) as container:
            packets = [packet for packet in container.demux(video=0) if packet.size]
            sizes[crf] = sum(packet.size for packet in packets)
            assert sum(packet.is_keyframe for packet in packets) == 3
            assert container.streams.video[0].codec_context.name == "hevc"
    assert sizes[5] > 1.5 * sizes[45]


@pytest.mark.parametrize(
    ("name", "flags", "expected", "reason"),
    [
        ("clip.mp4", [], "real", "the default for video files"),
        ("videos", [], "real", "the default for video files"),
        ("pictures", [], "tiny", "the default for pictures"),
        ("one.PNG", [], "tiny", "the default for pictures"),
        ("clip.mp4", ["-n", "tiny"], "tiny", "as -n says"),
        ("pictures", ["-n", "x.safetensors"], "x.safetensors", "as -n says"),
    ],
)
def test_default_weights_depend_on_the_input(name, flags, expected, reason, tmp_path):
    for file in ("clip.mp4", "videos/a.mkv", "pictures/1.png", "one.PNG"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    chosen, why = folders.choose_weights(parse_options([str(tmp_path / name), *flags]))
    assert chosen == expected and why.startswith(reason)


# which frames


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        (None, "0.4", 0, 10),  # as floats, 0.4 is more than 2/5 and took frame 10 too
        ("0.4", "0.8", 10, 20),
        ("0.28", None, 7, 24),  # as floats, 0.28 * 25 is more than 7 and lost frame 7
        ("0.5", "100", 13, 24),
    ],
)
def test_start_and_end_choose_frames(start, end, first, last, bilinear, cli, tmp_path):
    source = write_ramps(tmp_path / "clip.mkv", 24)
    limits = [*(["--start", start] if start else []), *(["--end", end] if end else [])]
    output = tmp_path / "out.mkv"
    code, summary, _ = cli(source, "-o", output, *limits, *FAST, model=bilinear)
    assert (code, summary["frames"]) == (0, last - first)
    assert levels(output) == list(range(first, last))
    assert media.frame_times(output)[0] == 0


def test_range_without_frames_is_an_error(clip, cli):
    code, _, stderr = cli(clip, "--start", "7")
    assert (code, len(errors(stderr))) == (1, 1)
    assert "no frame can be decoded from 7.0 s to the end; it ends at 0.20 s" in stderr


# where to


@pytest.mark.parametrize(
    ("name", "is_folder", "expected"),
    [
        ("clip.mp4", False, "clip_x4.mp4"),
        ("clip.v2.mkv", False, "clip.v2_x4.mkv"),
        ("clip.avi", False, "clip_x4.mkv"),  # has no start times
        ("clip.flv", False, "clip_x4.mkv"),  # is not written
        ("clip.webm", False, "clip_x4.mkv"),  # cannot hold H.264
        ("frames", True, "frames_x4"),
        ("2026.05.12", True, "2026_05_12_x4"),  # with a suffix it would ask for a video
        ("frames/../frames", True, "frames_x4"),
    ],
)
def test_default_output_lies_in_the_folder_of_the_input(name, is_folder, expected, tmp_path):
    if is_folder:
        (tmp_path / Path(name).name).mkdir()
    assert job.default_output(tmp_path / name, "libx264") == tmp_path / expected


@pytest.mark.parametrize("kind", ["video", "pictures"])
def test_existing_output_is_not_overwritten_unasked(kind, clip, folder, cli):
    source = clip if kind == "video" else folder
    assert cli(source)[0] == 0
    output = source.with_name(f"{source.stem}_x4{source.suffix}")
    old = output if kind == "video" else output / "frame1.png"
    content = b"precious" if kind == "video" else old.read_bytes()[::-1]
    old.write_bytes(content)
    code, summary, stderr = cli(source)
    assert (code, summary) == (1, {})
    assert errors(stderr) == [f"error: {output}: exists; use --overwrite or choose another output"]
    assert "0 of" not in stderr  # it is said before the work
    assert old.read_bytes() == content
    assert cli(source, "--overwrite")[0] == 0
    assert old.read_bytes() != content
    assert len(read_all(output)) == len(read_all(source))


# what goes wrong


def test_help_fits_one_screen(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 50
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: INPUT"),
        (["x.mp4", "--tile", "-1"], "argument -t/--tile: must be 0 or more, got -1"),
        (["x.mp4", "-t", "big"], "argument -t/--tile: invalid _tile value: 'big'"),
        (["x.mp4", "--start", "-1"], "--start: must be a number of seconds >= 0, got -1"),
        (["x.mp4", "--end", "nan"], "--end: must be a number of seconds >= 0, got nan"),
        (["x.mp4", "--start", "2", "--end", "1"], "--end must come after --start, got 2.0 and 1.0"),
        (["x.mp4", "-e", "preset"], "argument -e: must be KEY=VALUE, got 'preset'"),
        (["x.mp4", "--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        (["x.mp4", "--device", "toaster"], "--device: invalid choice: 'toaster'"),
        (["x.mp4", "--segment", "0"], "--segment: must be 1 or more, got 0"),
        (["x.mp4", "--preview", "-1"], "--preview: must be 0 or more, got -1"),
        (["x.mp4", "--memory-budget", "much"], "must be a size such as 8G or 800M, got 'much'"),
        (["x.mp4", "--faster"], "unrecognized arguments: --faster"),
    ],
)
def test_wrong_usage_exits_with_2(arguments, message, cli):
    code, summary, stderr = cli(*arguments)
    assert (code, summary) == (2, {})
    assert message in stderr.splitlines()[-1]


def bad_input(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad.mp4"
    if kind == "text":
        path.write_text("not a video " * 100)
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            sound: Any = container.add_stream("aac", 48000)
            container.mux(sound.encode(media._noise(0, 1920)))
            container.mux(sound.encode(None))
    elif kind == "half an mp4":
        source = write_ramps(tmp_path / "whole.mp4")
        path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        source.unlink()
    elif kind in ("folder", "mixed sizes"):
        path = tmp_path / "bad"
        path.mkdir()
        (path / ".DS_Store").write_text("of the system")
        for side in (8, 9) if kind == "mixed sizes" else ():
            Image.new("RGB", (side, side)).save(path / f"{side}.png")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "{}: cannot read it as a video: no such file or folder"),
        ("text", "{}: cannot read it as a video: it is not a video, or it is damaged"),
        ("half an mp4", "{}: cannot read it as a video: it is not a video, or it is damaged"),
        ("sound only", "{}: it has no video stream; give another file or convert this one"),
        ("folder", "{}: holds no pictures (.png .jpg .jpeg .webp .tif .tiff .bmp)"),
        ("mixed sizes", "{}/9.png: is 9x9, but 8.png is 8x8; all pictures must have one size"),
    ],
)
def test_unusable_input_is_one_line(kind, message, cli, tmp_path):
    source = bad_input(tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    code, summary, stderr = cli(source)
    assert (code, summary, errors(stderr)) == (1, {}, [f"error: {message.format(source)}"])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "{}/none/out.mp4"], "{}/none/out.mp4: there is no folder {}/none; create it first"),
        (["-o", "{}/out.flv"], "{}/out.flv: cannot write '.flv' files; use one of .mp4 .m4v"),
        (["-o", "{}/clip.mp4"], "{}/clip.mp4: is the input itself; choose another output"),
        (["--codec", "x266"], "unknown video encoder 'x266'; use for example libx264, "),
        (["-e", "speed=9"], "libx264 has no option speed; see ffmpeg -h encoder=libx264"),
        (["-e", "preset=lazy"], "libx264 refuses 64x48 yuv420p crf=18 preset=lazy: "),
        (["-o", "{}/out.webm"], "{}/out.webm: '.webm' files cannot hold libx264 video; choose "),
        (["-o", "{}/out", "-e", "g=1"], "{}/out: a folder of PNG files takes no encoder options"),
        (["--stream", "7"], "{}/clip.mp4: stream 7 is not a video; choose 0 (h264 16x12)"),
        (["-n", "huge"], "weights must be a shipped name ("),
        (["-n", "{}/bad.safetensors"], "{}/bad.safetensors is not a safetensors file ("),
        (["--memory-budget", "9M", "--device", "cpu"], "--memory-budget must be more than 352 MiB"),
    ],
)
def test_impossible_options_fail_before_the_work(arguments, message, clip, cli, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"weights")
    before = sorted(tmp_path.iterdir())
    code, summary, stderr = cli(clip, *(argument.format(tmp_path) for argument in arguments))
    assert (code, summary) == (1, {})
    (line,) = errors(stderr)
    assert line.startswith("error: " + message.replace("{}", str(tmp_path)))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_gpu_is_one_line(clip, cli):
    code, _, stderr = cli(clip, "--device", "cuda")
    assert (code, errors(stderr)) == (1, [stderr.rstrip("\n")])
    assert "cuda" in stderr


def test_summary_that_cannot_be_printed_is_one_line(monkeypatch, clip, weights, capfd):
    class Full:
        def write(self, _: str) -> None:
            raise OSError(28, "No space left on device")

        def flush(self) -> None: ...

        def fileno(self) -> int:
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.setattr(sys, "argv", ["infer", str(clip), "-n", str(weights), *FAST])
    monkeypatch.setattr(sys, "stdout", Full())
    with pytest.raises(SystemExit) as stopped:
        infer.main()
    assert str(stopped.value.code).startswith("error: the work is done, but stdout cannot")
    assert clip.with_name("clip_x4.mp4").exists()
