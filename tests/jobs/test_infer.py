"""The command line: outputs and what they hold, exit codes, one line for every mistake."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, cast

import av
import media
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mana_triton import checkpoint, infer
from mana_triton.engine import upscaler as stream
from mana_triton.engine.upscaler import upscale
from mana_triton.infer import parse_args, plan
from mana_triton.jobs import preview
from mana_triton.jobs.resume import open_resumable
from mana_triton.model import MANA, MANAConfig
from mana_triton.video import color
from mana_triton.video.writer import open_reader

ROOT = Path(__file__).parents[2]
CONFIG = MANAConfig(
    channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=8, match="cosine", offsets=True
)
KEYS = {
    "output", "frames", "width", "height", "seconds", "ms_per_frame", "peak_mib", "backend",
    "device", "weights",
}  # fmt: skip
FAST = ("-e", "preset=ultrafast")
# what `python -m mana_triton.infer` does, also where the shell ignores Ctrl-C in the background
SCRIPT = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("mana_triton.infer", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small random network in which neighbors matter."""
    torch.manual_seed(0)
    model = MANA(CONFIG)
    for layer in (model.w_z, model.w_z1):
        nn.init.normal_(layer.weight, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    checkpoint.save(model, path)
    return path


@pytest.fixture(scope="module")
def bilinear(tmp_path_factory) -> Path:
    """A network that adds nothing to bilinear interpolation."""
    model = MANA(CONFIG)
    nn.init.zeros_(model.conv_last.weight)
    nn.init.zeros_(model.conv_last.bias)  # pyright: ignore[reportArgumentType]
    path = tmp_path_factory.mktemp("weights") / "bilinear.safetensors"
    checkpoint.save(model, path)
    return path


def write_clip(path: Path, count: int = 5, **settings: Any) -> Path:
    """Frame i is gray, 20 + 5 i in its middle."""
    ramp = np.linspace(-15, 15, 16)[None, :, None] * np.ones((12, 1, 3))
    pictures = [(20 + 5 * i + ramp).clip(0).round().astype(np.uint8) for i in range(count)]
    lossless = {"preset": "ultrafast", "qp": "0"}
    return media.write_video(path, pictures, options=lossless, **settings)


@pytest.fixture
def clip(tmp_path) -> Path:
    return write_clip(tmp_path / "clip.mp4")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Pictures frame1, frame2, frame10: natural order is not that of their names' letters."""
    path = tmp_path / "frames"
    path.mkdir()
    for index, number in enumerate((1, 2, 10)):
        picture = Image.fromarray(media.smooth_rgb(9, 14, 2 * index))
        picture.save(path / f"frame{number}.png")
    return path


@pytest.fixture
def cli(monkeypatch, capfd, weights):
    """Run the command in this process: (exit code, last line of stdout as JSON, stderr)."""

    def run(*arguments: object, model: Path = weights) -> tuple[int, dict, str]:
        capfd.readouterr()
        argv = ["infer", *map(str, arguments)]
        if "-n" not in argv:
            argv += ["-n", str(model)]
        monkeypatch.setattr(sys, "argv", argv)
        threads = threading.active_count()
        with pytest.raises(SystemExit) as stopped:
            infer.main()
        deadline = time.monotonic() + 30
        while threading.active_count() > threads:  # decoder, network and progress end
            assert time.monotonic() < deadline
            time.sleep(0.005)
        out, err = capfd.readouterr()
        code = stopped.value.code
        if isinstance(code, str):  # what the interpreter prints at exit
            code, err = 1, f"{err}{code}\n"
        assert isinstance(code, int)
        assert "Traceback" not in err
        return code, json.loads(out.splitlines()[-1]) if out else {}, err

    return run


def read_all(path: Path) -> list[np.ndarray]:
    with open_reader(path) as reader:
        return [frame.rgb for frame in reader]


def levels(path: Path) -> list[int]:
    """The numbers of the frames of `write_clip` that a video shows."""
    numbers = [(picture.mean() - 20) / 5 for picture in read_all(path)]
    assert all(abs(number - round(number)) < 0.4 for number in numbers)
    return [round(number) for number in numbers]


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


# the whole way


def test_a_video_with_sound_and_rotation(weights, tmp_path):
    source = write_clip(tmp_path / "clip.mp4", 6, audio=True, rotation=(90, False))
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
    assert lines[0] == f"{source} -> {output}, 64x48"
    assert lines[2] == f"weights {weights}: as -n says"
    division, size = lines[1].rsplit("; ", 1)
    assert re.fullmatch(r"about \d\.\d GiB beside the program", size)
    precision, rest = division.split("), ", 1)
    assert precision in (
        "cpu, fp32 (the fastest here", "cpu, bf16 (by this processor's AMX",
        "cpu, bf16 (by this processor's AVX512-BF16",
    )  # fmt: skip
    assert rest == (
        "attention by tiled (not triton: it needs an NVIDIA or AMD GPU, got cpu);"
        f" no tiles (the whole frame fits); {summary['workers']} frame"
        + ("s at once" if summary["workers"] > 1 else " at once")
    )
    assert "6 of 6 frames" in result.stderr
    waits = summary["waits"]
    assert set(waits) == {"reading", "network", "writing"}
    assert all(0 <= share <= 1 for share in waits.values()) and max(waits.values()) > 0
    assert f"waited: reading {waits['reading']:.0%}, network" in result.stderr
    assert sorted(tmp_path.iterdir()) == [source, output]


def test_pictures_become_pictures(folder, weights, cli):
    code, summary, stderr = cli(folder)
    assert code == 0
    output = folder.with_name("frames_x4")
    assert summary["output"] == str(output)
    assert (summary["frames"], summary["width"], summary["height"]) == (3, 56, 36)
    assert "; no tiles (the whole frame fits)" in stderr
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


@pytest.mark.parametrize(
    ("name", "flags", "expected", "reason"),
    [
        ("clip.mp4", [], "tiny-real", "the default for video files"),
        ("videos", [], "tiny-real", "the default for video files"),
        ("pictures", [], "tiny", "the default for pictures"),
        ("one.PNG", [], "tiny", "the default for pictures"),
        ("clip.mp4", ["-n", "tiny"], "tiny", "as -n says"),
        ("pictures", ["-n", "x.safetensors"], "x.safetensors", "as -n says"),
    ],
)
def test_default_weights_are_those_for_the_input(name, flags, expected, reason, tmp_path):
    for file in ("clip.mp4", "videos/a.mkv", "pictures/1.png", "one.PNG"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    chosen, why = infer.choose_weights(parse_args([str(tmp_path / name), *flags]))
    assert chosen == expected and why.startswith(reason)


@pytest.mark.parametrize(
    "flags",
    [FAST, ("--codec", "ffv1", "--lossless"), (*FAST, "-e", "pix_fmt=yuv444p10le"), ("--compare",)],
)
def test_planes_of_a_video_are_made_where_batches_are(flags, clip, weights, tmp_path, monkeypatch):
    """In batches, as on a GPU, not by the thread that writes; the video is the same."""
    threads: list[int] = []
    planes_of = color.planes_of

    def made(rgb: Tensor, **how) -> list[Tensor]:
        threads.append(threading.get_ident())
        return planes_of(rgb, **how)

    class Pictures(stream.Upscaler):
        def stream(self, *frames, postprocess, **how):
            assert bool(postprocess) == ("--compare" not in flags)
            return super().stream(*frames, **how)

    monkeypatch.setattr(color, "planes_of", made)
    videos = []
    for kind in (stream.Upscaler, Pictures):
        args = parse_args([str(clip), *flags])
        output = tmp_path / f"{kind.__name__}.mkv"
        infer.enlarge(
            clip, output, kind(weights, stream.EngineOptions(batch=2, scene_cuts=False)), args
        )
        with av.open(str(output)) as video:
            videos.append([bytes(packet) for packet in video.demux(video=0)])
        is_written_here = kind == Pictures or "--compare" in flags
        assert len(threads) == 5
        assert (threading.get_ident() in threads) == is_written_here
        threads.clear()
    assert videos[0] == videos[1]
    assert len(videos[0]) >= 5


def test_compare_shows_bicubic_on_the_left(folder, weights, cli):
    code, summary, _ = cli(folder, "--compare")
    assert (code, summary["width"], summary["height"]) == (0, 2 * 56, 36)
    sources, results = read_all(folder), read_all(folder.with_name("frames_x4"))
    ours = upscale(sources, weights)
    for source, result, enlarged in zip(sources, results, ours, strict=True):
        assert result.shape == (36, 112, 3)
        bicubic = Image.fromarray(source).resize((56, 36), Image.Resampling.BICUBIC)
        difference = result[:, :56].astype(int) - np.asarray(bicubic)
        assert np.abs(difference[8:-8, 8:-8]).max() <= 1  # edges are treated differently
        assert np.array_equal(result[:, 56:], enlarged)


def test_tiles_and_precision_are_as_asked_and_told(clip, cli):
    code, summary, stderr = cli(clip, *FAST, "-t", "8", "--precision", "bf16", "--device", "cpu")
    assert (code, summary["tile"], summary["precision"]) == (0, 8, "bf16")
    assert "cpu, bf16 (as asked), attention by tiled" in stderr
    assert "; tiles of 8 pixels (as asked)" in stderr


# which frames


@pytest.mark.parametrize(
    ("start", "end", "first", "last"),
    [
        (None, "0.4", 0, 10),  # as floats, 0.4 is more than 2/5 and took frame 10 too
        ("0.4", "0.8", 10, 20),
        ("0.28", None, 7, 24),  # as floats, 0.28 * 25 is more than 7 and lost frame 7
        (None, "0.401", 0, 11),
        ("0.5", "100", 13, 24),
    ],
)
@pytest.mark.parametrize("kind", ["video", "pictures"])
def test_start_and_end_choose_frames(kind, start, end, first, last, bilinear, cli, tmp_path):
    source = write_clip(tmp_path / "clip.mkv", 24)
    output = tmp_path / "out.mkv"
    if kind == "pictures":
        pictures, source = read_all(source), tmp_path / "pictures"
        source.mkdir()
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(source / f"{index}.png")
    limits = [*(["--start", start] if start else []), *(["--end", end] if end else [])]
    code, summary, _ = cli(source, "-o", output, *limits, *FAST, model=bilinear)
    assert (code, summary["frames"]) == (0, last - first)
    assert levels(output) == list(range(first, last))
    assert media.frame_times(output)[0] == 0


def test_demo_up_to_a_time():
    args = parse_args([str(ROOT / "examples" / "demo.mp4"), "--end", "0.4"])
    with open_reader(args.input, args.start, args.end) as reader:
        assert sum(1 for _ in reader) == 10


def test_a_range_without_frames(clip, cli):
    code, _, stderr = cli(clip, "--start", "7")
    assert code == 1
    assert stderr == (
        f"error: {clip}: no frame can be decoded from 7.0 s to the end; it ends at 0.20 s\n"
    )


# where to


@pytest.mark.parametrize(
    ("name", "is_folder", "expected"),
    [
        ("clip.mp4", False, "clip_x4.mp4"),
        ("clip.v2.mkv", False, "clip.v2_x4.mkv"),
        ("clip.avi", False, "clip_x4.mkv"),  # not a container that is written
        ("clip.webm", False, "clip_x4.mkv"),  # it cannot hold H.264
        ("frames", True, "frames_x4"),
        ("2026.05.12", True, "2026_05_12_x4"),  # with a suffix it would ask for a video
    ],
)
def test_default_output_is_beside_the_input(name, is_folder, expected, tmp_path):
    if is_folder:
        (tmp_path / name).mkdir()
    args = parse_args([str(tmp_path / name)])
    assert plan(args) == [(tmp_path / name, tmp_path / expected)]


@pytest.mark.parametrize("name", [".", "frames/..", "../frames"])
def test_default_output_of_folders_without_a_name(name, folder, monkeypatch):
    monkeypatch.chdir(folder if name != "frames/.." else folder.parent)
    ((_, output),) = plan(parse_args([name]))
    assert output == (folder if name != "frames/.." else folder.parent).with_name(output.name)
    assert output.name == (folder.name if name != "frames/.." else folder.parent.name) + "_x4"


@pytest.mark.parametrize("kind", ["video", "pictures"])
def test_nothing_is_overwritten_unasked(kind, clip, folder, cli, monkeypatch):
    source = clip if kind == "video" else folder
    assert cli(source)[0] == 0
    output = source.with_name(f"{source.stem}_x4{source.suffix}")
    old = output if kind == "video" else output / "frame1.png"
    content = b"precious" if kind == "video" else old.read_bytes()[::-1]
    old.write_bytes(content)
    with monkeypatch.context() as patch:
        patch.setattr(stream.Upscaler, "stream", None)  # fails if anything is computed
        code, summary, stderr = cli(source)
    assert (code, summary) == (1, {})
    assert stderr == f"error: {output}: exists; use --overwrite or choose another output\n"
    assert old.read_bytes() == content
    assert cli(source, "--overwrite")[0] == 0
    assert old.read_bytes() != content
    assert len(read_all(output)) == len(read_all(source))


# the encoder


def keyframes(path: Path) -> int:
    with av.open(str(path)) as container:
        return sum(packet.is_keyframe for packet in container.demux(video=0) if packet.size)


def test_options_reach_the_encoder(clip, cli, tmp_path):
    for name, options in {"plain": [], "intra": ["-e", "g=1"]}.items():
        assert cli(clip, "-o", tmp_path / f"{name}.mp4", *FAST, *options)[0] == 0
    assert keyframes(tmp_path / "plain.mp4") == 1
    assert keyframes(tmp_path / "intra.mp4") == 5


def test_codec_and_quality_reach_the_encoder(clip, cli, tmp_path):
    for crf in (5, 45):
        arguments = ("--codec", "libx265", "--crf", crf, *FAST)
        assert cli(clip, "-o", tmp_path / f"{crf}.mkv", *arguments)[0] == 0
    sizes = [sum(map(len, video_packets(tmp_path / f"{crf}.mkv"))) for crf in (5, 45)]
    assert sizes[0] > 1.5 * sizes[1]
    with av.open(str(tmp_path / "5.mkv")) as container:
        assert container.streams.video[0].codec_context.name == "hevc"


def video_packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.size]


# what goes wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: INPUT"),
        (["x.mp4", "--tile", "-1"], "argument -t/--tile: must be 0 or more, got -1"),
        (["x.mp4", "-t", "big"], "argument -t/--tile: invalid _tile value: 'big'"),
        (["x.mp4", "--start", "-1"], "--start: must be a number of seconds >= 0, got -1"),
        (["x.mp4", "--end", "nan"], "--end: must be a number of seconds >= 0, got nan"),
        (["x.mp4", "--end", "inf"], "--end: must be a number of seconds >= 0, got inf"),
        (["x.mp4", "--start", "2", "--end", "1"], "--end must come after --start, got 2.0 and 1.0"),
        (["x.mp4", "-e", "preset"], "argument -e: must be KEY=VALUE, got 'preset'"),
        (["x.mp4", "-e", "=slow"], "argument -e: must be KEY=VALUE, got '=slow'"),
        (["x.mp4", "--precision", "fp8"], "--precision: invalid choice: 'fp8'"),
        (["x.mp4", "--device", "toaster"], "--device: invalid choice: 'toaster'"),
        (["x.mp4", "--segment", "0"], "--segment: must be 1 or more, got 0"),
        (["x.mp4", "--preview", "-1"], "--preview: must be 0 or more, got -1"),
        (["x.mp4", "--preview", "1", "--benchmark"], "not allowed with argument --preview"),
        (["x.mp4", "--faster"], "unrecognized arguments: --faster"),
        (["x.mp4", "y.mp4"], "unrecognized arguments: y.mp4"),
    ],
)
def test_wrong_usage(arguments, message, cli):
    code, summary, stderr = cli(*arguments)
    assert (code, summary) == (2, {})
    assert message in stderr.splitlines()[-1]


def bad_input(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "bad.mp4"
    if kind == "text":
        path.write_text("not a video " * 100)
    elif kind == "empty":
        path.touch()
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            sound: Any = container.add_stream("aac", 48000)
            container.mux(sound.encode(media._noise(0, 1920)))
            container.mux(sound.encode(None))
    elif kind == "half an mp4":
        source = write_clip(tmp_path / "whole.mp4")
        path.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
        source.unlink()
    elif kind == "folder":
        path = tmp_path / "bad"
        path.mkdir()
        (path / "notes.txt").write_text("no pictures")
    elif kind == "mixed sizes":
        path = tmp_path / "bad"
        path.mkdir()
        for side in (8, 9):
            Image.new("RGB", (side, side)).save(path / f"{side}.png")
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "{}: cannot read it as a video: no such file or folder"),
        ("text", "{}: cannot read it as a video: it is not a video, or it is damaged"),
        ("empty", "{}: cannot read it as a video: it is not a video, or it is damaged"),
        ("half an mp4", "{}: cannot read it as a video: it is not a video, or it is damaged"),
        ("sound only", "{}: it has no video stream; give another file or convert this one"),
        ("folder", "{}: holds no pictures (.png .jpg .jpeg .webp .tif .tiff .bmp)"),
        ("mixed sizes", "{}/9.png: is 9x9, but 8.png is 8x8; all pictures must have one size"),
    ],
)
def test_unusable_input(kind, message, cli, tmp_path):
    source = bad_input(tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    assert cli(source) == (1, {}, f"error: {message.format(source)}\n")
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
        (["-n", "huge"], "weights must be a shipped name ("),
        (["-n", "{}/clip.mp4"], "{}/clip.mp4 must be a .safetensors file or a PyTorch file of"),
        (["-n", "{}/bad.safetensors"], "{}/bad.safetensors is not a safetensors file ("),
    ],
)
def test_impossible_wishes(arguments, message, clip, cli, tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"weights")
    before = sorted(tmp_path.iterdir())
    arguments = [argument.format(tmp_path) for argument in arguments]
    code, summary, stderr = cli(clip, *arguments)
    assert (code, summary) == (1, {})
    # x264 has a word of its own about presets
    (line,) = [line for line in stderr.splitlines() if not line.startswith("x264 [error]")]
    assert line.startswith("error: " + message.replace("{}", str(tmp_path)))
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_one_line(clip, cli):
    message = "error: device cuda needs a CUDA GPU, there is none; use device cpu\n"
    assert cli(clip, "--device", "cuda") == (1, {}, message)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do anything")
@pytest.mark.parametrize("what", ["input", "output"])
def test_permission_denied(what, clip, cli, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if what == "input":
        clip.chmod(0)
    code, summary, stderr = cli(clip, "-o", locked / "out.mp4")
    locked.chmod(0o700)
    assert (code, summary) == (1, {})
    assert stderr.startswith("error: ") and stderr.endswith("permission denied\n")
    assert not any(locked.iterdir())


def test_a_truncated_video_is_enlarged_as_far_as_it_decodes(cli, tmp_path):
    source = write_clip(tmp_path / "clip.mkv", 30)
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 6 // 10])
    code, summary, stderr = cli(source, *FAST)
    assert code == 0
    assert 5 < summary["frames"] < 30
    assert len(read_all(tmp_path / "clip_x4.mkv")) == summary["frames"]
    warnings = [line for line in stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 1
    assert re.search(r"the video stops at 0\.\d+ s instead of 1\.20 s|frames damaged", warnings[0])
    assert errors(stderr) == []


def test_a_bad_picture_leaves_nothing_behind(folder, cli):
    path = folder / "frame10.png"
    path.write_bytes(path.read_bytes()[:80])  # the header is whole
    code, summary, stderr = cli(folder)
    assert (code, summary) == (1, {})
    assert errors(stderr) == [stderr.splitlines()[-1]]
    assert stderr.splitlines()[-1].startswith(f"error: {path}: cannot read the picture: ")
    assert sorted(folder.parent.iterdir()) == [folder]


# folders of videos


def test_a_folder_of_videos_with_a_bad_one(cli, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    write_clip(folder / "a.mp4", 3)
    (folder / "b.mp4").write_text("not a video")
    write_clip(folder / "c.mkv", 4)
    (folder / "notes.txt").write_text("not a video either")
    for name in ("a_x4.mp4", "c_x4.mkv"):
        (folder / name).write_text("an older result, not an input")
    code, summary, stderr = cli(folder, *FAST, "--overwrite")
    assert code == 1
    assert summary.keys() >= KEYS
    assert (summary["output"], summary["frames"]) == (str(folder), 7)
    assert (summary["width"], summary["height"]) == (64, 48)
    assert summary["failed"] == [str(folder / "b.mp4")]
    outputs = {str(folder / "a_x4.mp4"): 3, str(folder / "c_x4.mkv"): 4}
    assert {file["output"]: file["frames"] for file in summary["files"]} == outputs
    assert {output: len(read_all(Path(output))) for output in outputs} == outputs
    assert errors(stderr) == [
        f"error: {folder / 'b.mp4'}: cannot read it as a video: it is not a video, or it is damaged"
    ]
    assert len(list(folder.iterdir())) == 6


def test_a_folder_of_videos_to_another_folder(cli, tmp_path):
    films, results = tmp_path / "films", tmp_path / "results" / "today"
    films.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_clip(films / name, 2)
    code, summary, _ = cli(films, "-o", results, *FAST)
    assert (code, summary["output"], summary["failed"]) == (0, str(results), [])
    assert {file.name for file in results.iterdir()} == {"a_x4.mp4", "b_x4.mp4"}
    assert len(list(films.iterdir())) == 2
    for output in (tmp_path / "one.mp4", films / "a.mp4"):
        code, _, stderr = cli(films, "-o", output)
        assert code == 1
        assert stderr == f"error: {output}: must be a folder, as {films} holds 2 videos\n"
    assert not (tmp_path / "one.mp4").exists()


def test_videos_called_as_results_are_enlarged_to_another_folder(cli, tmp_path):
    """They were left alone without a word."""
    films, results = tmp_path / "films", tmp_path / "results"
    films.mkdir()
    for name in ("a.mp4", "b_x4.mp4"):
        write_clip(films / name, 2)
    code, _, stderr = cli(films, *FAST)
    assert code == 0
    assert "note: taken for results and left alone: b_x4.mp4" in stderr
    assert not (films / "b_x4_x4.mp4").exists()
    code, _, stderr = cli(films, "-o", results, *FAST)
    assert (code, "left alone" in stderr) == (0, False)
    assert {"a_x4.mp4", "b_x4_x4.mp4"} <= {file.name for file in results.iterdir()}


def test_two_videos_of_a_folder_may_not_become_one(cli, tmp_path):
    """They fail, the rest is done; nor may their previews, whose names end alike."""
    for name in ("a.avi", "a.mkv", "a.mp4", "b.mp4"):
        write_clip(tmp_path / name, 2)
    code, summary, stderr = cli(tmp_path, *FAST)
    assert code == 1
    assert summary["failed"] == [str(tmp_path / name) for name in ("a.avi", "a.mkv")]
    assert [Path(done["output"]).name for done in summary["files"]] == ["a_x4.mp4", "b_x4.mp4"]
    assert errors(stderr) == [
        f"error: {tmp_path / 'a.avi'}: would become a_x4.mkv, as would a.mkv; rename one of them",
        f"error: {tmp_path / 'a.mkv'}: would become a_x4.mkv, as would a.avi; rename one of them",
    ]
    assert not (tmp_path / "a_x4.mkv").exists()
    code, summary, stderr = cli(tmp_path, "--preview", "0")
    assert (code, len(summary["failed"])) == (1, 3)
    assert "would become a_x4_preview_0.png, as would a.mkv, a.mp4; rename" in stderr
    assert [path.name for path in tmp_path.glob("*.png")] == ["b_x4_preview_0.png"]


def test_a_folder_of_videos_skips_what_is_done(cli, tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4"):
        write_clip(folder / name, 3)
    (folder / "bad.mp4").write_text("not a video")
    assert cli(folder, *FAST)[0] == 1
    done = (folder / "a_x4.mp4").read_bytes()
    (folder / "b_x4.mp4").unlink()
    code, summary, stderr = cli(folder, *FAST)
    assert code == 1
    assert summary["done_before"] == [str(folder / "a_x4.mp4")]
    assert [file["output"] for file in summary["files"]] == [str(folder / "b_x4.mp4")]
    assert summary["failed"] == [str(folder / "bad.mp4")]
    assert (folder / "a_x4.mp4").read_bytes() == done
    table = [line for line in stderr.splitlines() if "│" in line]
    assert [line.split("│")[1].strip() for line in table] == ["a.mp4", "b.mp4", "bad.mp4"]
    assert ["done before" in table[0], "b_x4.mp4" in table[1], "failed" in table[2]] == [True] * 3
    (folder / "bad.mp4").unlink()
    code, summary, _ = cli(folder, *FAST)
    assert (code, len(summary["done_before"]), summary["frames"]) == (0, 2, 0)
    assert summary.keys() >= KEYS


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["Python", "GPU", "CPU"],
)
def test_a_folder_of_videos_with_one_too_large(error, cli, tmp_path, monkeypatch):
    """Memory that is too small for one video does not stop the rest; other errors do."""
    folder = tmp_path / "films"
    folder.mkdir()
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        write_clip(folder / name, 3, rate=30 if name == "b.mp4" else 25)
    work = infer.enlarge

    def fail(source: Path, *rest: Any) -> dict:
        if source.name == "b.mp4":
            raise error
        return work(source, *rest)

    monkeypatch.setattr(infer, "enlarge", fail)
    code, summary, stderr = cli(folder, *FAST)
    assert (code, summary["failed"]) == (1, [str(folder / "b.mp4")])
    done = [str(folder / "a_x4.mp4"), str(folder / "c_x4.mp4")]
    assert [file["output"] for file in summary["files"]] == done
    advice = "the memory is too small for this frame size, even in the smallest parts"
    assert errors(stderr) == [f"error: {folder / 'b.mp4'}: {advice}"]
    assert cli(folder / "b.mp4") == (1, {}, f"error: {folder / 'b.mp4'}: {advice}\n")
    error = ZeroDivisionError("a mistake of the program")
    with pytest.raises(ZeroDivisionError):
        cli(folder, *FAST)
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    with pytest.raises(RuntimeError, match="mat1"):
        cli(folder, *FAST)


# before hours of work


@pytest.mark.parametrize("number", [0, 9, 12, 29])
def test_preview_is_a_frame_of_the_whole_run(number, weights, tmp_path, cli):
    """The windows are those of the whole run, also beside a cut and at the ends."""
    rng = np.random.default_rng(0)
    scenes = [rng.integers(0, 256, (16, 20, 3), np.uint8) for _ in range(3)]
    pictures = [np.roll(scenes[i // 10], i, axis=1) for i in range(30)]
    lossless = {"preset": "ultrafast", "qp": "0"}
    clip = media.write_video(tmp_path / "clip.mkv", pictures, options=lossless)
    expected = list(upscale(read_all(clip), weights))[number]
    with open_reader(clip) as reader:
        lr, shown = preview.enlarged_frame(reader, stream.Upscaler(weights), number)
    assert np.array_equal(lr, read_all(clip)[number])
    assert np.array_equal(shown, expected)
    code, summary, _ = cli(clip, "--preview", number)
    output = tmp_path / f"clip_x4_preview_{number}.png"
    assert (code, summary["output"], summary["frames"]) == (0, str(output), 1)
    assert set(tmp_path.iterdir()) == {clip, output}
    sheet = np.asarray(Image.open(output))
    # the zoomed crops, pixel by pixel as they are in the picture
    side = max(min(*lr.shape[:2], 16), 1)
    ((y, x),) = preview.detailed(lr, side, 1)
    zoom = -(-preview.ZOOMED // (4 * side))
    crop = expected[4 * y : 4 * (y + side), 4 * x : 4 * (x + side)]
    square = crop.repeat(zoom, 0).repeat(zoom, 1)[4:-4, 4:-4]  # without its colored edge
    left = 2 * preview.GAP + 3 * (square.shape[0] + 8) + 2 * preview.GAP + 4
    bottom = sheet.shape[0] - preview.GAP - 4
    found = sheet[bottom - square.shape[0] : bottom, left : left + square.shape[1]]
    assert np.array_equal(found, square)


def test_detail_is_where_it_is():
    rgb = np.full((60, 90, 3), 128, np.uint8)
    rng = np.random.default_rng(0)
    rgb[30:46, 50:66] = rng.integers(0, 256, (16, 16, 3))
    rgb[2:18, 4:20] = rng.integers(96, 160, (16, 16, 3))
    first, second, third = preview.detailed(rgb, 16, 3)
    assert np.abs(np.subtract(first, (30, 50))).max() <= 1
    assert np.abs(np.subtract(second, (2, 4))).max() <= 1
    for one, other in itertools.combinations((first, second, third), 2):
        assert np.abs(np.subtract(one, other)).max() >= 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preview", "5"], "{}/clip.mp4: has 5 frames, numbered from 0; there is no 5"),
        (["--preview", "9" * 20], "{}/clip.mp4: has 5 frames, numbered from 0; there is no 9"),
        (["--preview", "1", "-o", "{}/x.mp4"], "{}/x.mp4: must end in .png, as --preview writes"),
        (["--preview", "1", "-o", "{}/old.png"], "{}/old.png: exists; use --overwrite"),
    ],
)
def test_impossible_previews(arguments, message, clip, cli, tmp_path):
    (tmp_path / "old.png").write_text("precious")
    before = sorted(tmp_path.iterdir())
    code, _, stderr = cli(clip, *(argument.format(tmp_path) for argument in arguments))
    assert code == 1
    assert errors(stderr)[0].startswith("error: " + message.format(*[tmp_path] * 2))
    assert sorted(tmp_path.iterdir()) == before


def test_previews_of_a_folder_of_videos(cli, tmp_path):
    """A later run makes those that are missing, says so of the others, and stops at none."""
    for name in ("a.mp4", "b.mp4"):
        write_clip(tmp_path / name, 3)
    assert cli(tmp_path, "--preview", 1)[0] == 0
    first, second = (tmp_path / f"{name}_x4_preview_1.png" for name in "ab")
    before = first.read_bytes()
    first.write_bytes(b"an older one")
    second.unlink()
    code, summary, stderr = cli(tmp_path, "--preview", 1)
    assert (code, summary["failed"], summary["done_before"]) == (0, [], [str(first)])
    assert (first.read_bytes(), second.exists()) == (b"an older one", True)
    assert "done before" in stderr and not errors(stderr)
    assert cli(tmp_path, "--preview", 1, "--overwrite")[1]["done_before"] == []
    assert first.read_bytes() == before


def test_names_as_long_as_names_can_be(cli, tmp_path):
    """255 bytes, of characters of three each: the names while files grow must not be longer."""
    clip = write_clip(tmp_path / f"{'影' * 79}.mp4", 3)
    assert len(f"{clip.stem}_x4_preview_1.png".encode()) == 254
    code, summary, _ = cli(clip, "--preview", 1)
    assert (code, Path(summary["output"]).name) == (0, f"{clip.stem}_x4_preview_1.png")
    assert cli(clip, *FAST)[0] == 0
    assert len(list(tmp_path.iterdir())) == 3
    clip = clip.rename(tmp_path / f"{'影' * 83}.mp4")
    for arguments in (["--preview", 1], FAST, ["-o", tmp_path / f"{'x' * 300}.mp4"]):
        code, _, stderr = cli(clip, *arguments)
        (line,) = errors(stderr)
        assert code == 1
        assert line.endswith(": cannot write: the name is too long; choose a shorter one")


def test_benchmark_writes_nothing(clip, cli, tmp_path):
    code, summary, stderr = cli(clip, "--benchmark")
    assert code == 0
    assert summary.keys() >= KEYS
    assert (summary["output"], summary["frames"]) == (None, 5)
    stages = summary["stages_ms"]
    assert set(stages) == set(infer.STAGES.values())
    assert all(ms > 0 for ms in stages.values())
    assert sum(stages.values()) < summary["workers"] * summary["ms_per_frame"] * 2
    assert all(name in stderr for name in stages)
    assert list(tmp_path.iterdir()) == [clip]


# Ctrl-C


@pytest.mark.parametrize(
    ("output", "kept"), [("out.mp4", 4), ("shots", 4), ("one.mp4", 0), ("none", 0)]
)
def test_interruption_keeps_whole_segments(output, kept, cli, tmp_path, monkeypatch):
    clip = write_clip(tmp_path / "clip.mp4", 30)  # more than the threads read ahead
    output = tmp_path / output
    arguments = (clip, "-o", output, "--segment", 4 if kept else 30)
    fewer = 30 if output.suffix else 8  # pictures are kept in eights at most

    def opened(*args, **settings):
        writer = open_resumable(*args, **settings)
        write, written = writer.write, itertools.count(1)

        def write_seven(rgb, frame, seen) -> None:
            if next(written) == 8:
                raise KeyboardInterrupt
            write(rgb, frame, seen)

        monkeypatch.setattr(writer, "write", write_seven)
        return writer

    with monkeypatch.context() as patch:
        patch.setattr(infer, "open_resumable", opened)
        code, summary, stderr = cli(*arguments)
    assert (code, summary) == (1, {})
    assert errors(stderr) == ["error: stopped; the same command continues"]
    parts = tmp_path / f"{output.name}.parts"
    assert set(tmp_path.iterdir()) == ({clip, parts} if kept else {clip})
    assert (f"note: {kept} frames are kept" in stderr) == (kept > 0)
    nothing = f"note: nothing is kept, as fewer than the {fewer} frames of a segment were done"
    assert (nothing in stderr) == (kept == 0)
    code, summary, stderr = cli(*arguments)
    assert (code, summary["frames"], summary["resumed"]) == (0, 30, kept)
    assert (f"continuing after {kept} frames" in stderr) == (kept > 0)
    assert len(read_all(output)) == 30
    assert set(tmp_path.iterdir()) == {clip, output}


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_while_computing(weights, tmp_path):
    """The signal itself, which may come anywhere."""
    pictures = [media.smooth_rgb(48, 64, i / 9) for i in range(600)]
    source = media.write_video(tmp_path / "long.mp4", pictures)
    command = [sys.executable, "-c", SCRIPT, str(source), "-n", str(weights), "--segment", "20"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    parts = tmp_path / "long_x4.mp4.parts"
    while process.poll() is None and not (parts / "000001.packets").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 1, err
    assert out == ""
    assert errors(err) == ["error: stopped; the same command continues"]
    assert re.search(r"note: \d+ frames are kept", err)
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == [source, parts]


def test_ten_bits_another_stream_and_no_loss(cli, tmp_path):
    """The second video of a file, 10 bits, through the network, side by side, without loss."""
    rng = np.random.default_rng(0)
    deep = rng.integers(64, 940, (3, 12, 16)).astype(np.uint16)
    source = media.write_video(
        tmp_path / "deep.mkv", [deep] * 3, "yuv444p10le", pix_fmt="yuv444p10le", codec="ffv1",
        options={"level": "3"}, color=(9, 9, 16, 1),
    )  # fmt: skip
    flat = write_clip(tmp_path / "flat.mkv", 3)
    both = tmp_path / "both 影.mkv"
    with av.open(str(both), "w") as out:
        for path in (flat, source):
            with av.open(str(path)) as container:
                out.add_stream_from_template(container.streams.video[0], opaque=True)
        for index, path in enumerate((flat, source)):
            with av.open(str(path)) as container:
                for packet in container.demux(video=0):
                    if packet.size:
                        cast(Any, packet).stream = out.streams[index]
                        out.mux(packet)
    arguments = ["--stream", 1, "--codec", "ffv1", "--lossless", "--compare", "--no-limits"]
    code, summary, _ = cli(both, *arguments, "-o", tmp_path / "out.mkv")
    assert (code, summary["frames"], summary["width"]) == (0, 3, 128)
    with open_reader(tmp_path / "out.mkv") as reader:
        assert (reader.bits, reader.color.transfer) == (10, 16)
        assert next(iter(reader)).rgb.dtype == np.uint16
    assert media.packets(tmp_path / "out.mkv", "video", 1) == media.packets(flat, "video")
    code, summary, _ = cli(both, "--stream", 1, "--benchmark")
    assert (code, summary["frames"], summary["width"]) == (0, 3, 64)
    code, summary, _ = cli(both, "--stream", 1, "--preview", 1, "-o", tmp_path / "one.png")
    assert (code, summary["output"]) == (0, str(tmp_path / "one.png"))
    code, _, err = cli(both, "--stream", 7)
    assert code == 1
    assert "stream 7 is not a video; choose 0 (h264 16x12), 1 (ffv1 16x12)" in err


def test_a_preview_of_sixteen_bits_is_that_of_eight():
    small, large = (media.smooth_rgb(height, 2 * height) for height in (24, 96))
    deep = [picture.astype(np.uint16) * 257 for picture in (small, large)]
    assert preview.sheet(*deep).tobytes() == preview.sheet(small, large).tobytes()


def test_no_part_of_the_package_starts_programs():
    """File names are only ever opened: no shell sees them."""
    for file in (ROOT / "mana_triton").glob("*.py"):
        assert not re.search(r"subprocess|os\.(system|popen|exec|spawn)|shell=", file.read_text())


def test_a_preview_is_not_written_over_its_input(folder, cli):
    picture = folder / "frame2.png"
    before = picture.read_bytes()
    code, _, stderr = cli(folder, "--preview", "0", "-o", picture, "--overwrite")
    assert (code, picture.read_bytes()) == (1, before)
    assert errors(stderr) == [f"error: {picture}: is the input itself; choose another output"]
    link = folder.parent / "link.png"
    link.symlink_to(picture)
    code, _, stderr = cli(folder, "--preview", "0", "-o", link, "--overwrite")
    assert (code, link.is_symlink()) == (1, True)
    assert errors(stderr) == [f"error: {link}: is a symbolic link; give the file's own name"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="read from Linux")
def test_peak_memory_is_not_that_of_the_program_that_started_it():
    inner = "from mana_triton.infer import _peak_mib; print(_peak_mib())"
    outer = (
        "import subprocess, sys; large = bytearray(b'x') * (1 << 30); "
        f"subprocess.run([sys.executable, '-c', {inner!r}], check=True)"
    )
    result = subprocess.run(
        [sys.executable, "-c", outer], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 50 < float(result.stdout) < 1000


@pytest.mark.parametrize("status", ["VmRSS:\t  5 kB\n", "VmPeak: 1 kB\nVmHWM:\t    2048 kB\n"])
def test_peak_memory_is_unknown_where_the_system_does_not_tell(status, monkeypatch):
    monkeypatch.setattr(Path, "exists", lambda _: True)
    monkeypatch.setattr(Path, "read_text", lambda _: status)
    assert infer._peak_mib() == (2.0 if "VmHWM" in status else None)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_summary_that_cannot_be_printed_is_one_line(clip, weights):
    command = [sys.executable, "-m", "mana_triton.infer", clip, "-n", weights, *FAST]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(
            command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: the work is done, but stdout cannot")
    assert clip.with_name("clip_x4.mp4").exists()
