"""The evaluation: layouts, scores against their definitions, resume, and every mistake's line.

LPIPS against official scores, and the published Vid4 rows, need files that are not in this project;
they run where `../shared/data` holds metrics/, weights/ and Vid4/ (four folders of PNG).
"""

import csv
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from footage import write_video
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from eval import datasets, report, run
from mana_triton import checkpoint, metrics
from mana_triton.engine.upscaler import upscale
from mana_triton.model import MANA, MANAConfig
from mana_triton.resize import upscale_bicubic
from mana_triton.training.clips import DataError
from mana_triton.training.degradation import compress, degrade

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(__file__).parents[3] / "shared" / "data"
VID4 = DATA / "Vid4"
ALEXNET = DATA / "weights" / "alexnet-features.safetensors"
SHAPES = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
BORDER = ("--crop-border", "2")
SCORES = ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y")
needs_lpips = pytest.mark.skipif(find_spec("lpips") is None, reason="lpips is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")


def moving(frames: int, height: int, width: int, speed: int = 1, seed: int = 0) -> np.ndarray:
    """A texture that moves right by `speed` pixels per frame: [T, H, W, 3] uint8."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(height, width + speed * frames, 3))
    for axis in (0, 1):
        x = x + 2 * np.roll(x, 1, axis) + 2 * np.roll(x, 3, axis)
    x = np.clip(128 + 14 * x, 0, 255).astype(np.uint8)
    starts = range(speed * frames, 0, -speed) if speed else [0] * frames
    return np.stack([x[:, start : start + width] for start in starts])


def write(folder: Path, frames: np.ndarray, name: str = "{:04d}.png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / name.format(index))


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    return {"one": moving(8, 68, 76), "two": moving(5, 70, 77, speed=2, seed=1)}


@pytest.fixture(scope="module")
def folder(clips, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    for name, frames in clips.items():
        write(path / name, frames)
    return path


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    """Features of an AlexNet with random weights, so that nothing is fetched."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, (out, inputs, side) in SHAPES.items():
        weight = torch.randn(out, inputs, side, side, generator=generator)
        state[f"features.{index}.weight"] = weight / math.sqrt(inputs * side**2 / 2)
        state[f"features.{index}.bias"] = 0.1 * torch.randn(out, generator=generator)
    file = tmp_path_factory.mktemp("alexnet") / "features.safetensors"
    save_file(state, file)
    return file


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small random network in which neighbors matter."""
    torch.manual_seed(0)
    model = MANA(MANAConfig(channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=128))
    nn.init.normal_(model.w_z.weight, std=0.3)
    path = tmp_path_factory.mktemp("weights") / "random.safetensors"
    checkpoint.save(model, path)
    return path


@pytest.fixture
def evaluate(backbone, tmp_path):
    """Runs the command in this process; gives the object of the last line."""

    def call(*argv: str | Path, jobs: int = 1) -> dict:
        known = ("--lpips-backbone", backbone, "--results", tmp_path / "results", "--jobs", jobs)
        return run.evaluate(run.parse_args([str(word) for word in (*argv, *known)]))

    return call


def only(summary: dict) -> dict:
    (row,) = summary["rows"]
    return row


def shrunk(frames: np.ndarray, how: str = "matlab_bicubic") -> np.ndarray:
    height, width = (n // 4 * 4 for n in frames.shape[1:3])
    return degrade(torch.from_numpy(frames[:, :height, :width].copy()), how).numpy()


def enlarged(frames: np.ndarray, how: str = "matlab_bicubic") -> np.ndarray:
    return upscale_bicubic(torch.from_numpy(shrunk(frames, how))).numpy()


def hash_of(clips: Iterable[np.ndarray]) -> str:
    """What a row says of its low-resolution frames."""
    hashes = []
    for frames in clips:
        digest = hashlib.sha256()
        for frame in frames:
            digest.update(np.array(frame.shape).tobytes() + frame.tobytes())
        hashes.append(digest.hexdigest())
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


# ---- scores


def psnr(a, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(a, float) - b) ** 2)))


@pytest.mark.parametrize("border", [0, 3])
def test_bicubic_scores_are_means_over_frames_and_then_clips(evaluate, folder, clips, border):
    row = only(
        evaluate("--data", f"toy={folder}", "--method", "bicubic", "--crop-border", str(border))
    )
    inside = slice(border, -border or None)
    expected = {}
    for name, frames in clips.items():
        hr = frames[:, :68, :76][:, inside, inside]
        results = enlarged(frames)[:, inside, inside]
        pairs = list(zip(results, hr, strict=True))
        expected[name] = [
            [psnr(a, b) for a, b in pairs],
            [metrics.ssim(a, b) for a, b in pairs],
            [psnr(metrics.rgb_to_y(a), metrics.rgb_to_y(b)) for a, b in pairs],
            [metrics.ssim(a, b, y_channel=True) for a, b in pairs],
        ]
    assert (row["dataset"], row["method"], row["clips"], row["frames"]) == ("toy", "bicubic", 2, 13)
    for i, score in enumerate(SCORES):
        means = {name: np.mean(values[i]) for name, values in expected.items()}
        for name, mean in means.items():
            assert row["per_clip"][name][score] == pytest.approx(mean, abs=1e-9)
        assert row[score] == pytest.approx(np.mean(list(means.values())), abs=1e-9)
        frames = expected["one"][i] + expected["two"][i]
        assert row["frame_mean"][score] == pytest.approx(np.mean(frames), abs=1e-9)
        assert row["frame_mean"][score] != pytest.approx(row[score], abs=1e-9)


def test_frames_that_equal_their_originals_are_left_out_and_named(
    evaluate, clips, tmp_path, capsys
):
    out = clips["one"] // 2 + 60
    out[[2, 5]] = clips["one"][[2, 5]]
    write(tmp_path / "hr" / "one", clips["one"])
    write(tmp_path / "out" / "one", out)
    words = ("--data", f"a={tmp_path / 'hr'}", "--method", f"folder:{tmp_path / 'out'}")
    summary = evaluate(*words)
    row = only(summary)
    others = [psnr(out[i], clips["one"][i]) for i in (0, 1, 3, 4, 6, 7)]
    assert row["psnr_rgb"] == pytest.approx(np.mean(others), abs=1e-9)
    assert (row["frames"], row["perfect_frames"]) == (8, 2)
    json.dumps(summary, allow_nan=False)
    assert "2 frames equal their originals (2 of one)" in capsys.readouterr().out
    kept = next((tmp_path / "results").glob("*.json")).read_text()
    assert "Infinity" not in kept and json.loads(kept)["worst"] not in (2, 5)


def test_the_paper_table_states_what_was_measured(evaluate, folder, clips, tmp_path, capsys):
    for name, frames in clips.items():
        write(tmp_path / "lr" / name, shrunk(frames, "pil_bicubic"))
    lr = f"Vid4={tmp_path / 'lr'}"
    words = ("--data", f"Vid4={folder}", "--method", "bicubic", "--table1", "--crop-border", "2")
    summary = evaluate(*words, "--lr", lr)
    assert "here it is of Vid4 read from disk, 8 bits. Here 2 pixels" in capsys.readouterr().out
    header, lines = report.table1(summary)
    cell = lines[-1][header.index("Vid4")]
    assert cell.startswith(f"{only(summary)['psnr_rgb']:.2f} ")
    assert cell.endswith(" (part: 2 clips, 13 frames)")
    evaluate(*words[:-3], f"folder:{folder}", "--table1", "--degradation", "pil_bicubic")
    text = capsys.readouterr().out
    assert "here it is pil_bicubic x1/4, 8 bits; of folder: methods unknown" in text
    assert "paper, RGB, pil_bicubic" in text and "field, Y, LR unknown" in text
    assert "the field's tables are made with matlab_bicubic: do not compare them with" in text
    assert "bicubic: uint8 on cpu" in text


def test_networks_are_streamed_and_center_sees_no_neighbors(evaluate, folder, clips, weights):
    methods = (f"mana:{weights}", f"center:{weights}")
    summary = evaluate("--data", f"toy={folder}", "--method", *methods)
    streamed, center = summary["rows"]
    for name, frames in clips.items():
        hr = frames[:, :68, :76]
        lr = shrunk(frames)
        expected = np.mean([psnr(a, b) for a, b in zip(upscale(lr, weights), hr, strict=True)])
        assert streamed["per_clip"][name]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)
        # one frame alone is its own neighbor everywhere
        alone = [psnr(next(iter(upscale(lr[i : i + 1], weights))), hr[i]) for i in range(len(hr))]
        # up to pixels that rounding to 8 bits decides
        assert center["per_clip"][name]["psnr_rgb"] == pytest.approx(np.mean(alone), abs=1e-3)
    assert streamed["psnr_rgb"] != center["psnr_rgb"]
    assert streamed["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (streamed["dtype"], streamed["device"], streamed["memory_slots"]) == ("fp32", "cpu", 128)


def ensemble(frames: np.ndarray, weights: Path, **options) -> np.ndarray:
    """Self-ensemble by hand: [T, 4H, 4W, 3] in 0..255, not rounded."""
    results = []
    for clip, back in (
        (frames, lambda x: x),
        (frames[:, ::-1], lambda x: x[:, ::-1]),
        (frames[:, :, ::-1], lambda x: x[:, :, ::-1]),
        (frames[:, ::-1, ::-1], lambda x: x[:, ::-1, ::-1]),
    ):
        for transposed in (False, True):
            x = clip.swapaxes(1, 2) if transposed else clip
            x = torch.from_numpy(x.copy()).permute(0, 3, 1, 2) / 255
            large = np.stack([np.asarray(y) for y in upscale(x, weights, **options)])
            large = large.transpose(0, 3, 2, 1) if transposed else large.transpose(0, 2, 3, 1)
            results.append(back(large.astype(float)))
    return 255 * np.mean(results, axis=0)


def test_the_ensemble_is_the_mean_over_flips_and_turns(evaluate, folder, clips, weights):
    methods = (f"mana:{weights}", f"ensemble:{weights}")
    summary = evaluate("--data", f"toy={folder}", "--method", *methods)
    streamed, mean = summary["rows"]
    for name, frames in clips.items():
        large = ensemble(shrunk(frames), weights).round()
        expected = np.mean([psnr(a, b) for a, b in zip(large, frames[:, :68, :76], strict=True)])
        # up to pixels that rounding to 8 bits decides
        assert mean["per_clip"][name]["psnr_rgb"] == pytest.approx(expected, abs=1e-3)
    assert mean["psnr_rgb"] > streamed["psnr_rgb"] + 0.01
    assert (mean["weights_sha256"], mean["dtype"]) == (streamed["weights_sha256"], "fp32")


def enlarge(method: str, lr: np.ndarray, scored: range) -> np.ndarray:
    protocol = run.Protocol("matlab_bicubic", None, 0, False, None, "cpu", "fp32", "")
    return np.stack(list(run.enlarge(method, iter(lr.copy()), scored, protocol))).astype(int)


def test_the_ensemble_of_a_turned_clip_is_the_turned_ensemble(clips, weights):
    lr = shrunk(clips["two"])
    for method, follows in (("mana", False), ("ensemble", True)):
        plain = enlarge(f"{method}:{weights}", lr, range(5))
        for turn in (lambda x: x[:, ::-1], lambda x: x[:, :, ::-1], lambda x: x.swapaxes(1, 2)):
            turned = enlarge(f"{method}:{weights}", turn(lr), range(5))
            difference = np.abs(turned - turn(plain))
            # sums in another order: few pixels lie so near to a half that it rounds them elsewhere
            few = difference.max() <= 1 and np.mean(difference > 0) < 1e-3
            assert few == follows


def test_the_ensemble_of_a_vimeo_window_knows_no_cuts(clips, weights):
    lr = shrunk(clips["one"][:7])
    lr[5:] = 255 - lr[5:]  # would be a cut
    (middle,) = enlarge(f"ensemble:{weights}", lr, datasets.MIDDLE)
    expected, cut = (ensemble(lr, weights, scene_cuts=cuts)[3] for cuts in (False, True))
    assert np.abs(middle - expected).max() <= 0.5 + 1e-3  # rounding, and sums in another order
    assert np.abs(middle - cut).max() > 1


@pytest.mark.parametrize("how", ["matlab_bicubic", "pil_bicubic"])
def test_hash_is_that_of_the_low_resolution_frames(evaluate, folder, clips, how):
    row = only(evaluate("--data", f"a={folder}", "--method", "bicubic", "--degradation", how))
    assert row["lr_sha256"] == hash_of(shrunk(frames, how) for frames in clips.values())
    hr = clips["one"]
    expected = np.mean([psnr(a, b) for a, b in zip(enlarged(hr, how), hr, strict=True)])
    assert row["per_clip"]["one"]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)


def test_low_resolution_frames_are_compressed(evaluate, folder, clips):
    summary = evaluate("--data", f"a={folder}", "--method", "bicubic", "--crf", "28")
    lr = [np.stack(list(compress(shrunk(frames), "libx264", 28))) for frames in clips.values()]
    row = only(summary)
    assert row["lr_sha256"] == hash_of(lr)
    assert (summary["crf"], row["degradation"]) == (28, "matlab_bicubic + x264 crf 28")
    results = upscale_bicubic(torch.from_numpy(lr[0])).numpy()
    expected = np.mean([psnr(a, b) for a, b in zip(results, clips["one"], strict=True)])
    assert row["per_clip"]["one"]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)
    assert "matlab_bicubic x1/4 + x264 crf 28, 8 bits" in report._low_resolution(summary)


def test_low_resolution_frames_from_disk_replace_made_ones(evaluate, folder, clips, tmp_path):
    for name, frames in clips.items():
        write(tmp_path / "lr" / name, shrunk(frames, "pil_bicubic"))
    common = ("--data", f"toy={folder}", "--method", "bicubic")
    made = evaluate(*common, "--degradation", "pil_bicubic")
    read = evaluate(*common, "--degradation", "none", "--lr", f"toy={tmp_path / 'lr'}")
    assert only(read) == only(made) | {"degradation": report.FROM_DISK}
    assert only(evaluate(*common)) != only(made)
    assert (read["lr_from_disk"], read["degradation"]) == (["toy"], "none")


def test_tof_is_small_where_the_motion_is_right(evaluate, folder, clips, tmp_path):
    frozen = {name: np.repeat(frames[:1], len(frames), 0) for name, frames in clips.items()}
    for name in clips:
        write(tmp_path / "frozen" / name, frozen[name])
        write(tmp_path / "same" / name, clips[name])
    methods = [f"folder:{tmp_path / kind}" for kind in ("same", "frozen")]
    same, still = evaluate("--data", f"toy={folder}", "--method", *methods, "--temporal")["rows"]
    assert same["tof"] == 0
    # the textures move by 1 and by 2 pixels per frame, and the frozen ones by none
    assert [round(still["per_clip"][name]["tof"]) for name in clips] == [1, 2]
    inside = evaluate("--data", f"toy={folder}", "--method", *methods, "--temporal", *BORDER)
    assert inside["rows"][1]["tof"] != still["tof"]
    frames = [x[2:-2, 2:-2] for x in (clips["one"][0, :68, :76], clips["one"][1, :68, :76])]
    expected = metrics.tof(metrics.flow(frames[0], frames[0]), metrics.flow(*frames))
    kept = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("*.json")]
    assert expected in [result["scores"]["tof"][1] for result in kept if len(result["frames"]) == 8]
    assert still["frame_mean"]["tof"] == pytest.approx(
        (7 * still["per_clip"]["one"]["tof"] + 4 * still["per_clip"]["two"]["tof"]) / 11
    )


def test_videos_are_scored_as_their_frames_are(evaluate, folder, clips, tmp_path):
    for name, frames in clips.items():
        (tmp_path / "videos").mkdir(exist_ok=True)
        write_video(tmp_path / "videos" / f"{name}.mkv", frames)  # lossless
    methods = ("bicubic", f"folder:{tmp_path / 'videos'}")
    read, same = evaluate("--data", f"a={tmp_path / 'videos'}", "--method", *methods)["rows"]
    assert read == only(evaluate("--data", f"a={folder}", "--method", "bicubic"))
    assert (same["psnr_rgb"], same["perfect_frames"]) == (None, 13)


def test_pictures_are_kept_of_as_many_clips_as_the_page_shows(
    evaluate, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(report, "PICTURED", 1)
    html = tmp_path / "report.html"
    evaluate("--data", f"toy={folder}", "--method", "bicubic", "--html", html)
    assert "Pictures of the first 1 of 2 clips." in html.read_text()
    assert len(list((tmp_path / "results").glob("*.png"))) == 2  # the middle and the worst


# ---- frames of other programs


def test_identical_frames_of_another_program_are_perfect(evaluate, folder):
    row = only(evaluate("--data", f"toy={folder}", "--method", f"folder:{folder}"))
    assert row["psnr_rgb"] is row["psnr_y"] is None
    assert (row["frames"], row["perfect_frames"]) == (13, 13)
    assert row["ssim_rgb"] == row["ssim_y"] == 1
    assert row["lr_sha256"] is None  # nobody knows what that program was given


@pytest.mark.parametrize(
    "names",
    [("one", "two"), ("Out_One", "Out_Two"), ("toy/one", "toy/two"), ("x", "y")],
    ids=["same-name", "name-within", "folder-of-the-set", "order"],
)
def test_frames_of_another_program_are_found(evaluate, folder, clips, tmp_path, names):
    for name, frames in zip(names, clips.values(), strict=True):
        # numbers without leading zeros, and more than ten frames sort wrongly as text
        write(tmp_path / "out" / name, enlarged(frames), "Frame {}.png")
    methods = ("bicubic", f"folder:{tmp_path / 'out'}")
    ours, theirs = evaluate("--data", f"toy={folder}", "--method", *methods)["rows"]
    assert {name: theirs[name] for name in SCORES} == {name: ours[name] for name in SCORES}


def test_clips_whose_names_differ_in_punctuation_are_told_apart(evaluate, clips, tmp_path, capsys):
    for number, name in enumerate(("clip_1", "clip1")):
        frames = clips["one"][number : number + 2]
        write(tmp_path / "hr" / name, frames)
        write(tmp_path / "out" / name, frames)
    row = only(evaluate("--data", f"a={tmp_path / 'hr'}", "--method", f"folder:{tmp_path / 'out'}"))
    assert row["perfect_frames"] == 4
    assert "in order" not in capsys.readouterr().err


def test_one_file_per_clip_is_enough_where_one_frame_is_scored(evaluate, vimeo, tmp_path, capsys):
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "sequences").symlink_to(vimeo / "sequences")
    (tmp_path / "part" / "sep_testlist.txt").write_text("00001/0005\n00001/0007\n")
    for folder, names in {"named": ("00001_0005", "00001_0007"), "numbered": ("x1", "x2")}.items():
        for number, name in zip((5, 7), names, strict=True):
            frame = vimeo / "sequences" / "00001" / f"000{number}" / "im4.png"
            (tmp_path / folder).mkdir(exist_ok=True)
            shutil.copy(frame, tmp_path / folder / f"{name}.png")
    for folder, ordered in ("named", False), ("numbered", True):
        method = f"folder:{tmp_path / folder}"
        row = only(evaluate("--data", f"Vimeo-90K={tmp_path / 'part'}", "--method", method))
        assert (row["frames"], row["perfect_frames"]) == (2, 2)
        assert ("taken in order" in capsys.readouterr().err) is ordered


@pytest.mark.parametrize(
    ("size", "fits"),
    [((70, 77), True), ((68, 76), True), ((68, 77), False), ((71, 79), False), ((72, 80), False)],
)
def test_outputs_are_as_large_as_the_original_or_its_crop(evaluate, clips, tmp_path, size, fits):
    write(tmp_path / "hr" / "two", clips["two"])
    padded = np.pad(clips["two"], ((0, 0), (0, 2), (0, 3), (0, 0)))
    write(tmp_path / "out" / "two", padded[:, : size[0], : size[1]])
    words = ("--data", f"a={tmp_path / 'hr'}", "--method", f"folder:{tmp_path / 'out'}")
    if fits:
        assert only(evaluate(*words))["perfect_frames"] == 5
    else:
        with pytest.raises(DataError, match=r"must be 76x68 or 77x70 to go with"):
            evaluate(*words)


@pytest.mark.parametrize(("size", "fits"), [((17, 19), True), ((18, 20), True), ((17, 20), False)])
def test_low_resolution_is_a_quarter_rounded_down_or_up(evaluate, clips, tmp_path, size, fits):
    write(tmp_path / "hr" / "two", clips["two"])
    lr = np.pad(shrunk(clips["two"]), ((0, 0), (0, 1), (0, 1), (0, 0)))
    write(tmp_path / "lr" / "two", lr[:, : size[0], : size[1]])
    words = ("--data", f"a={tmp_path / 'hr'}", "--method", "bicubic")
    if fits:
        row = only(evaluate(*words, "--lr", f"a={tmp_path / 'lr'}"))
        assert row["psnr_rgb"] == only(evaluate(*words))["psnr_rgb"]
        assert row["degradation"] == report.FROM_DISK
    else:
        with pytest.raises(DataError, match=r"must be 19x17 or 20x18 to go with"):
            evaluate(*words, "--lr", f"a={tmp_path / 'lr'}")


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    frames = np.arange(12, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    write(tmp_path / "a.b", frames, "f{}.png")
    (source,) = datasets.arrange(tmp_path / "a.b")
    assert source.name == "a.b"
    assert [int(frame.item(0)) for frame in source.frames()] == list(range(12))


def test_counterparts_are_not_guessed(tmp_path):
    frame = np.zeros((1, 12, 12, 3), np.uint8)
    for name in ("scene1", "scene10"):
        write(tmp_path / "hr" / name, frame)
    write(tmp_path / "out" / "scene10-ours", frame)
    clips = datasets.find_test_set("x", tmp_path / "hr", tmp_path, None)
    with pytest.raises(DataError, match=r"each of 2 clips, it holds 1; .* after scene1, scene10"):
        datasets.match(clips, datasets.arrange(tmp_path / "out"), tmp_path / "out")


# ---- layouts


def names_in(name: str, path: Path, cache: Path) -> list[str]:
    return [clip.name for clip in datasets.find_test_set(name, path, cache, None)]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["calendar", "city"], ["calendar", "city"]),
        (["GT/calendar", "BIx4/calendar", "GT/city"], ["calendar", "city"]),
        (["car05/truth", "car05/input4", "hdclub/a/truth"], ["car05", "hdclub-a"]),
        (["a/b/c", "a/d"], ["a-b-c", "a-d"]),
        (["clip10", "clip9"], ["clip9", "clip10"]),
    ],
    ids=["vid4", "udm10", "spmcs", "nested", "numbers"],
)
def test_layouts(tmp_path, files, expected):
    for file in files:
        write(tmp_path / "set" / file, np.zeros((2, 12, 12, 3), np.uint8))
    assert names_in("Vid4", tmp_path / "set", tmp_path) == expected


def test_reds4_is_four_of_the_clips(tmp_path):
    for clip in ("000", "001", "011", "015", "020"):
        write(tmp_path / "train_sharp" / clip, np.zeros((1, 12, 12, 3), np.uint8))
    assert names_in("REDS4", tmp_path, tmp_path) == ["000", "011", "015", "020"]
    shutil.rmtree(tmp_path / "train_sharp" / "015")
    with pytest.raises(DataError, match=r"must hold 000, 011, 015, 020 .* lacks 015"):
        names_in("reds-4", tmp_path, tmp_path)


def test_reds4_is_not_taken_from_other_folders_with_these_numbers(tmp_path):
    root = tmp_path / "REDS"
    for clip in ("000", "001", "011", "015", "020"):
        for folder in ("train/train_sharp", "train/train_sharp_bicubic/X4", "val/val_sharp"):
            write(root / folder / clip, np.zeros((1, 12, 12, 3), np.uint8))
    clips = datasets.find_test_set("REDS4", root, tmp_path, None)
    sharp = root / "train" / "train_sharp"
    assert [clip.source.place for clip in clips] == [sharp / c for c in datasets.REDS4_CLIPS]
    with pytest.raises(DataError, match="lacks 000"):
        names_in("REDS4", root / "val", tmp_path)
    write(root / "GT" / "011", np.zeros((1, 12, 12, 3), np.uint8))
    with pytest.raises(
        DataError, match=r"GT/011 and .*train_sharp/011|train_sharp/011 and .*GT/011"
    ):
        names_in("REDS4", root, tmp_path)


def test_clips_that_are_left_out_are_named(tmp_path, capsys):
    for name in ("target", "city"):  # clips, by chance named as originals are
        write(tmp_path / "plain" / name, np.zeros((1, 12, 12, 3), np.uint8))
        write(tmp_path / "pairs" / name / "truth", np.zeros((1, 12, 12, 3), np.uint8))
        write(tmp_path / "pairs" / name / "input4", np.zeros((1, 3, 3, 3), np.uint8))
    names_in("a", tmp_path / "pairs", tmp_path)
    assert not capsys.readouterr().err
    names_in("a", tmp_path / "plain", tmp_path)
    assert re.search(r"note: of .* only .* left out: city\n", capsys.readouterr().err)


def test_a_truncated_video_is_refused(tmp_path):
    video = tmp_path / "clip.mkv"
    write_video(video, moving(40, 64, 64))
    assert datasets.find_test_set("a", video, tmp_path, None)[0].shape == (40, 64, 64)
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(DataError, match=r"clip.mkv must be a whole video, .*\d s; copy it again"):
        datasets.find_test_set("a", video, tmp_path, None)


def test_a_folder_called_dot_has_a_name(tmp_path, monkeypatch):
    write(tmp_path / "dune", np.zeros((1, 12, 12, 3), np.uint8))
    monkeypatch.chdir(tmp_path / "dune")
    assert names_in("a", Path(), tmp_path) == ["dune"]


@pytest.mark.parametrize(
    ("name", "line"),
    [("Vid44", True), ("reds", True), ("vimeo90", True), ("vid_4", False), ("holiday", False)],
)
def test_a_misspelled_set_is_noticed(name, line):
    assert bool(datasets.misspelled(name)) is line


@pytest.fixture(scope="module")
def vimeo(tmp_path_factory) -> Path:
    """34 sequences, of which numbers 5 and 20 move; the 6 % that move most are two."""
    root = tmp_path_factory.mktemp("vimeo")
    names = [f"{1 + n // 20:05d}/{n:04d}" for n in range(34)]
    for n, name in enumerate(names):
        frames = moving(7, 64, 64, speed=2 if n in (5, 20) else 0, seed=n)
        for i, frame in enumerate(frames, 1):
            (root / "sequences" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame).save(root / "sequences" / name / f"im{i}.png")
    (root / "sep_testlist.txt").write_text("\n".join(names))
    return root


def test_vimeo_scores_the_middle_frame(evaluate, vimeo, weights, tmp_path):
    (tmp_path / "part" / "sequences").mkdir(parents=True)
    (tmp_path / "part" / "sequences" / "00001").symlink_to(vimeo / "sequences" / "00001")
    (tmp_path / "part" / "sep_testlist.txt").write_text("00001/0005\n00001/0007\n")
    methods = ("bicubic", f"mana:{weights}")
    html = tmp_path / "report.html"
    data = f"Vimeo90K={tmp_path / 'part'}"
    summary = evaluate("--data", data, "--method", *methods, "--html", html)
    plain, ours = summary["rows"]
    assert (plain["clips"], plain["frames"], ours["frames"]) == (2, 2, 2)
    hr = np.stack([moving(7, 64, 64, 2, 5), moving(7, 64, 64, 0, 7)])
    expected = [psnr(enlarged(frames)[3], frames[3]) for frames in hr]
    assert plain["psnr_rgb"] == pytest.approx(np.mean(expected), abs=1e-9)
    # the frames that are not scored count, they are what the network saw
    assert plain["lr_sha256"] == ours["lr_sha256"] == hash_of(map(shrunk, hr))
    lines = re.findall(r'points="([^"]+)"', html.read_text())
    assert [len(line.split()) for line in lines] == [2, 2]  # one plot, over the clips
    windows = [list(upscale(shrunk(frames), weights, scene_cuts=False))[3] for frames in hr]
    expected = [psnr(a, frames[3]) for a, frames in zip(windows, hr, strict=True)]
    # up to pixels that rounding to 8 bits decides
    assert ours["psnr_rgb"] == pytest.approx(np.mean(expected), abs=1e-3)


def test_vimeo_motion_is_the_six_percent_that_move_most(vimeo, tmp_path, monkeypatch, capsys):
    expected = ["00001-0005", "00002-0020"]
    assert names_in("Vimeo-90K-Motion", vimeo, tmp_path) == expected
    measured, motion = [], datasets.motion
    monkeypatch.setattr(datasets, "motion", lambda s: measured.append(s.name) or motion(s))
    assert names_in("vimeo_90k_motion", vimeo, tmp_path) == expected
    assert not measured  # what was measured is not measured again
    changed = vimeo / "sequences" / "00001" / "0003" / "im4.png"
    os.utime(changed, ns=(0, 4 * 10**18))
    assert names_in("Vimeo-90K-Motion", vimeo, tmp_path) == expected
    assert measured == ["00001-0003"]  # unless it is another now
    (cache,) = tmp_path.glob("motion-*.json")
    cache.write_bytes(b"\xff{")  # damaged
    assert names_in("Vimeo-90K-Motion", vimeo, tmp_path) == expected
    assert len(measured) == 35
    assert "34/34" in capsys.readouterr().err


def test_motion_that_was_measured_survives_an_unreadable_frame(vimeo, tmp_path, monkeypatch):
    broken = tmp_path / "vimeo"
    shutil.copytree(vimeo, broken)
    frame = broken / "sequences" / "00001" / "0009" / "im3.png"
    frame.write_bytes(frame.read_bytes()[:100])
    with pytest.raises(DataError, match=r"im3.png must be a readable picture"):
        names_in("Vimeo-90K-Motion", broken, tmp_path)
    shutil.copy(vimeo / "sequences" / "00001" / "0009" / "im3.png", frame)
    measured, motion = [], datasets.motion
    monkeypatch.setattr(datasets, "motion", lambda s: measured.append(s.name) or motion(s))
    assert len(names_in("Vimeo-90K-Motion", broken, tmp_path)) == 2
    assert measured == [f"{1 + n // 20:05d}-{n:04d}" for n in range(9, 34)]


@pytest.mark.parametrize(
    ("name", "line"),
    [("vid4", "vid4 has 4 clips and 171 frames, here are 2 and 13"), ("mine", None)],
)
def test_a_part_of_a_known_set_is_named_as_such(folder, tmp_path, name, line):
    clips = datasets.find_test_set(name, folder, tmp_path, None)
    assert (datasets.incomplete(name, clips) or "").startswith(line or "")
    assert (datasets.incomplete(name, clips) is None) == (line is None)


# ---- resume and processes


def test_finished_clips_are_not_computed_again(evaluate, folder, weights, tmp_path, monkeypatch):
    common = ("--data", f"toy={folder}", "--method", "bicubic", f"mana:{weights}")
    first = evaluate(*common)
    computed, score = [], run.score
    monkeypatch.setattr(
        run, "score", lambda unit, tick: computed.append(unit.method) or score(unit, tick)
    )
    assert evaluate(*common)["rows"] == first["rows"]
    assert not computed
    evaluate(*common, "--crop-border", "1")
    assert len(computed) == 4
    # other weights under the same name
    model = checkpoint.load(weights)
    nn.init.normal_(model.w_z.weight, std=0.1)
    other = tmp_path / "other.safetensors"
    shutil.copy(weights, other)
    computed.clear()
    evaluate("--data", f"toy={folder}", "--method", f"mana:{other}")
    assert not computed  # the same weights under another name
    checkpoint.save(model, other)
    run._upscaler.cache_clear()
    evaluate("--data", f"toy={folder}", "--method", f"mana:{other}")
    assert len(computed) == 2


def test_damaged_results_are_computed_again(evaluate, folder, tmp_path):
    words = ("--data", f"toy={folder}", "--method", "bicubic")
    first = evaluate(*words)
    one, two = (tmp_path / "results").glob("*.json")
    one.write_bytes(one.read_bytes()[:100])
    two.write_text("[]")
    assert evaluate(*words)["rows"] == first["rows"]


def test_a_page_needs_no_second_scoring(evaluate, folder, tmp_path, monkeypatch):
    words = ("--data", f"toy={folder}", "--method", "bicubic")
    at_once, later = tmp_path / "at-once.html", tmp_path / "later.html"
    evaluate(*words, "--html", at_once)
    for picture in (tmp_path / "results").glob("*.png"):
        picture.unlink()
    monkeypatch.setattr(run, "score_frame", lambda *_: pytest.fail("it was scored again"))
    evaluate(*words, "--html", later)
    assert later.read_text() == at_once.read_text()


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_unreadable_frame_loses_nothing(evaluate, folder, tmp_path, monkeypatch, jobs):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    frame = broken / "two" / "0003.png"
    content = frame.read_bytes()
    frame.write_bytes(content[: len(content) // 2])
    arguments = ("--data", f"toy={broken}", "--method", "bicubic")
    with pytest.raises(DataError, match=r"0003.png must be a readable picture.* are kept in"):
        evaluate(*arguments, jobs=jobs)
    frame.write_bytes(content)
    computed, score = [], run.score
    monkeypatch.setattr(
        run, "score", lambda unit, tick: computed.append(unit.clip.name) or score(unit, tick)
    )
    row = only(evaluate(*arguments))
    assert computed == ["two"]
    assert row == only(evaluate("--data", f"toy={folder}", "--method", "bicubic"))


def test_processes_change_nothing(evaluate, folder, weights, tmp_path):
    common = ("--data", f"toy={folder}", "--method", "bicubic", f"mana:{weights}", "--temporal")
    common = (*common, "--precision", "fp32")
    alone = evaluate(*common)
    shutil.rmtree(tmp_path / "results")
    assert evaluate(*common, jobs=2)["rows"] == alone["rows"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_a_killed_evaluation_continues(tmp_path, evaluate, backbone, how):
    for index in range(6):
        write(tmp_path / "set" / f"clip{index}", moving(6 * (6 - index), 96, 128, seed=index))
    arguments = ("--data", f"toy={tmp_path / 'set'}", "--method", "bicubic")
    words = (*arguments, "--jobs", "2", "--results", tmp_path / "results")
    words = (*words, "--lpips-backbone", backbone)
    command = [sys.executable, str(ROOT / "eval" / "run.py"), *map(str, words)]
    process = subprocess.Popen(
        command, cwd=ROOT, text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "results").glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    while _alive(process.pid):  # its workers end with it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if how == signal.SIGTERM:
        assert process.returncode == 1
        assert errors.strip().splitlines()[-1].startswith("error: stopped; the same command")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "results").glob("*.json")}
    assert 0 < len(kept) < 6
    row = only(evaluate(*arguments))
    assert all(file.stat().st_mtime_ns == when for file, when in kept.items())
    assert not list((tmp_path / "results").glob("*.part")) or how == signal.SIGKILL
    shutil.rmtree(tmp_path / "results")
    assert only(evaluate(*arguments)) == row


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---- speed: 171 frames of 720x576, bicubic, all metrics but LPIPS, in 90 s on two cores


def without_lpips(_):
    raise metrics.LPIPSUnavailable("LPIPS is left out of this test")


@pytest.fixture
def speed(tmp_path, monkeypatch):
    """Seconds, by this clock, of an evaluation of two clips of so many frames each."""

    def call(clock, frames: int, jobs: int) -> float:
        for number in range(2):
            write(tmp_path / "set" / f"clip{number}", moving(frames, 576, 720))
        monkeypatch.setattr(run, "_lpips", without_lpips)
        words = ["--data", f"a={tmp_path / 'set'}", "--method", "bicubic", "--jobs", str(jobs)]
        args = run.parse_args([*words, "--results", str(tmp_path / "results")])
        began = clock()
        assert only(run.evaluate(args))["frames"] == 2 * frames
        return clock() - began

    return call


def test_two_frames_take_their_part_of_the_cpu_time(speed):
    # other processes hardly change CPU time; all imports are made before
    metrics.ssim(*moving(2, 16, 16))
    assert speed(time.process_time, frames=1, jobs=1) <= 2 * (2 * 90 / 171)


@pytest.mark.slow
def test_172_frames_take_less_than_90_seconds(speed):
    assert speed(time.perf_counter, frames=86, jobs=2) < 90


# ---- mistakes


@pytest.fixture
def mistakes(folder, tmp_path, clips) -> dict[str, str]:
    """Placeholders of the arguments below."""
    short, small = tmp_path / "short", tmp_path / "small"
    for name, frames in clips.items():
        write(short / name, frames[: 4 if name == "two" else None, :68, :76])
        write(small / name, frames[:, :60, :76])
    tiny = tmp_path / "tiny"
    write(tiny / "a", np.zeros((2, 8, 40, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    mixed = tmp_path / "mixed"
    shutil.copytree(folder, mixed)
    Image.fromarray(clips["one"][3, :, :72]).save(mixed / "one" / "0003.png")
    (tmp_path / "file").write_text("")
    listed = tmp_path / "listed"
    listed.mkdir()
    (listed / "sep_testlist.txt").write_text("00001/0001\n")
    sizes = tmp_path / "sizes"
    write(sizes / "a", np.zeros((3, 40, 40, 3), np.uint8))
    Image.new("RGB", (44, 40)).save(sizes / "a" / "0001.png")
    notes = tmp_path / "notes.safetensors"
    notes.write_text("not weights")
    return {
        "FOLDER": str(folder), "SHORT": str(short), "SMALL": str(small), "TINY": str(tiny),
        "EMPTY": str(tmp_path / "empty"), "LISTED": str(listed), "SIZES": str(sizes),
        "NOTES": str(notes), "MIXED": str(mixed), "FILE": str(tmp_path / "file"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--data a=nowhere --method bicubic", "nowhere must exist"),
        ("--data a=EMPTY --method bicubic", "must hold videos"),
        ("--data a=FOLDER --method bicubik", "must be bicubic, mana:WEIGHTS, center:WEIGHTS, "),
        ("--data a=FOLDER --method mana:", "method must be bicubic, mana:WEIGHTS"),
        ("--data a=FOLDER --method ensemble:", r"ensemble:WEIGHTS or folder:PATH, got 'ensemble:'"),
        ("--data a=FOLDER --method mana:huge", r"shipped name \(.*tiny.*\) or an existing file"),
        ("--data a=FOLDER --method mana:NOTES", "is not a safetensors file"),
        ("--data a=FOLDER --method mana:tiny --precision fp8", "precision must be auto, fp32"),
        ("--data a=FOLDER --method folder:SHORT", "as many frames as two, 5, it has 4"),
        ("--data a=FOLDER --method folder:SMALL", "must be 76x68 to go with .* got 76x60"),
        ("--data a=FOLDER --method folder:MIXED", "one size, frame 3 has 72x68 after 76x68"),
        ("--data a=FOLDER --method bicubic --device gpu9", "device must be auto, cpu or cuda"),
        ("--data a=FOLDER --method bicubic --results FILE", "--results must be a folder to write"),
        ("--data a=FOLDER --method folder:EMPTY", "must hold videos"),
        ("--data a=FOLDER --lr b=FOLDER --method bicubic", r"one of --data \(a\), got 'b'"),
        ("--data a=FOLDER --lr a=FOLDER --method bicubic", "must be 19x17 .* got 76x68"),
        ("--data a=FOLDER --degradation none --method bicubic", "pass --lr a=PATH"),
        ("--data a=LISTED --method bicubic", "Vimeo-90K or Vimeo-90K-Motion, got 'a'"),
        ("--data vimeo90k=FOLDER --method bicubic", "must hold sep_testlist.txt"),
        ("--data vimeo90k=LISTED --method bicubic", "im1.png is missing"),
        ("--data a=TINY --method bicubic", "at least (11|31) pixels .* a has 40x8"),
        ("--data a=SIZES --method bicubic", "one size, frame 1 has 44x40 after 40x40"),
    ],
)
def test_mistakes_are_one_line(mistakes, arguments, line, tmp_path, backbone, monkeypatch, capsys):
    words = re.sub("[A-Z]{4,}", lambda match: mistakes[match[0]], arguments).split()
    words = ["--results", str(tmp_path / "results"), *words, "--lpips-backbone", str(backbone)]
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--jobs", "1"])
    with pytest.raises(SystemExit) as caught:
        run.main()
    message = str(caught.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert re.search(line, message), message
    assert "{" not in capsys.readouterr().out


def test_names_are_shown_as_they_are(tmp_path, backbone, monkeypatch, capsys):
    """Markup, emoji and bytes in no encoding, on both streams and on the page."""
    odd = os.fsdecode("[b]ö[i] :x: \udcff\\".encode("utf-8", "surrogateescape"))
    write(tmp_path / odd / odd, moving(2, 33, 34))
    known = ["--results", "results", "--lpips-backbone", str(backbone), "--jobs", "1"]
    words = ["--data", f"{odd}={odd}", "--method", f"folder:{odd}", *known, "--html", "report.html"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    run.main()
    out, err = capsys.readouterr()
    name = r"[b]ö[i] :x: \udcff" + "\\"
    assert f"│ {name} " in out and f"mean of {name}" in out
    assert f"note: {name} is 34x33" in err
    assert f"<td>{name}</td>" in Path("report.html").read_text()
    json.loads(out.splitlines()[-1])


def test_the_line_comes_before_a_file_that_cannot_be_written(
    folder, tmp_path, backbone, monkeypatch, capsys
):
    (tmp_path / "file").write_text("")
    words = ["--data", f"a={folder}", "--method", "bicubic", "--jobs", "1"]
    words += ["--results", str(tmp_path / "results"), "--lpips-backbone", str(backbone)]
    words += ["--json", str(tmp_path / "file" / "out.json")]
    monkeypatch.setattr(sys, "argv", ["run.py", *words])
    with pytest.raises(SystemExit, match=r"^error: --json must be a file that can be written"):
        run.main()
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


def test_the_command(folder, tmp_path, backbone):
    """Last line of stdout is one JSON object; a mistake ends with 1, wrong usage with 2."""

    def command(*words):
        known = ("--results", tmp_path / "results", "--lpips-backbone", backbone, "--jobs", 1)
        line = [sys.executable, ROOT / "eval" / "run.py", *words, *known]
        return subprocess.run(
            [str(word) for word in line], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    data = f"toy={folder}"
    done = command("--data", data, "--method", "bicubic", "--json", "out.json", "--table1")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    (row,) = json.loads(lines[-1])["rows"]
    assert {"dataset", "method", "clips", "frames", "lpips", *SCORES} <= set(row)
    assert (tmp_path / "out.json").read_text() == lines[-1] + "\n"
    assert f"mean of toy │ bicubic │ {row['psnr_rgb']:.3f}" in done.stdout
    assert "two is 77x70, cropped to 76x68" in done.stderr
    failed = command("--data", data, "--method", "nearest")
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1].startswith("error: method must be bicubic")
    assert not failed.stdout
    assert command("--data", "toy", "--method", "bicubic").returncode == 2
    assert command("--data", data, data, "--method", "bicubic").returncode == 2


# ---- LPIPS


def direct_lpips(a: np.ndarray, b: np.ndarray, state: dict, lines: list[torch.Tensor]) -> float:
    """LPIPS from its definition, in float64."""
    shift = torch.tensor([-0.030, -0.088, -0.188], dtype=torch.float64)[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450], dtype=torch.float64)[:, None, None]
    total = 0.0
    x, y = (
        ((torch.from_numpy(z.copy()).double().permute(2, 0, 1) / 127.5 - 1 - shift) / scale)[None]
        for z in (a, b)
    )
    for place, line in zip(SHAPES, lines, strict=True):
        features = []
        for z in (x, y):
            if place in (3, 6):
                z = nn.functional.max_pool2d(z, 3, 2)
            weight, bias = (state[f"features.{place}.{k}"].double() for k in ("weight", "bias"))
            stride, padding = (4, 2) if place == 0 else (1, weight.shape[-1] // 2)
            features.append(nn.functional.conv2d(z, weight, bias, stride, padding).relu())
        x, y = features
        unit = [z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in features]
        total += float(((unit[0] - unit[1]) ** 2 * line.double()).sum(1).mean())
    return total


@needs_lpips
def test_lpips_is_its_definition(backbone):
    from safetensors.torch import load_file

    metric = metrics.LPIPS(backbone)
    a, b = moving(1, 70, 90)[0], moving(1, 70, 90, seed=1)[0]
    lines = [getattr(metric.net, f"lin{i}").model[1].weight.detach() for i in range(5)]
    exact = direct_lpips(a, b, load_file(backbone), lines)
    # 2^-24 per operation of float32; sums of up to 3456 terms and five layers stay below 1e-5
    assert metric(a, b) == pytest.approx(exact, rel=1e-5)
    assert exact > 0.01
    assert metric(a, a.copy()) == 0
    inside = direct_lpips(a[4:-4, 4:-4], b[4:-4, 4:-4], load_file(backbone), lines)
    assert metric(a, b, crop_border=4) == pytest.approx(inside, rel=1e-5)


@needs_lpips
@pytest.mark.skipif(not ALEXNET.is_file(), reason=f"needs {ALEXNET.relative_to(DATA.parents[1])}")
def test_lpips_reproduces_the_official_scores():
    metric = metrics.LPIPS(ALEXNET)
    with (DATA / "metrics" / "lpips.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        pair = (DATA / "metrics" / f"{row['pair']}-{kind}.png" for kind in ("ref", "dist"))
        a, b = (np.asarray(Image.open(file).convert("RGB")) for file in pair)
        assert f"{metric(a, b):.4g}" == f"{float(row['lpips_alex_v0.1']):.4g}", row["pair"]


@needs_lpips
def test_lpips_is_in_the_rows(evaluate, folder, clips, backbone):
    row = only(evaluate("--data", f"toy={folder}", "--method", "bicubic"))
    metric = metrics.LPIPS(backbone)
    for name, frames in clips.items():
        pairs = zip(enlarged(frames), frames[:, :68, :76], strict=True)
        expected = np.mean([metric(a, b) for a, b in pairs])
        assert row["per_clip"][name]["lpips"] == pytest.approx(expected, rel=1e-6)


@needs_lpips
def test_without_weights_lpips_is_empty_and_a_line_says_why(folder, tmp_path, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    run._lpips.cache_clear()
    words = ["--data", f"toy={folder}", "--method", "bicubic", "--jobs", "1"]
    summary = run.evaluate(run.parse_args([*words, "--results", str(tmp_path)]))
    assert only(summary)["lpips"] is None
    assert summary["lpips"] is None
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "LPIPS" in x]
    assert "fetching them failed (no network)" in line
    assert "--lpips-backbone FILE.safetensors" in line


@needs_lpips
@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"must be a readable .safetensors file"),
        ({"features.0.weight": torch.zeros(64, 3, 11, 11)}, r"features.0.bias \[64\], got no such"),
        ({"features.0.weight": torch.zeros(64, 3, 7, 7)}, r"11, 11\], got \[64, 3, 7, 7\]"),
    ],
    ids=["not-safetensors", "missing", "shape"],
)
def test_a_wrong_backbone_is_refused(tmp_path, state, message):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"x" * 50)
    if state is not None:
        save_file(state, file)
    with pytest.raises(metrics.BackboneError, match=message):
        metrics.LPIPS(file)


def test_flow_points_from_one_frame_to_the_next():
    a, b = moving(2, 96, 128, speed=3)
    flow = metrics.flow(a, b)
    assert flow.shape == (2, 48, 64)
    inside = flow[:, 8:-8, 8:-8]
    assert np.round(np.median(inside, axis=(1, 2))).tolist() == [0, 3]
    assert metrics.tof(flow, flow) == 0
    assert metrics.tof(flow + np.array([3, 4])[:, None, None], flow) == pytest.approx(5, rel=1e-6)


# ---- published rows


@pytest.mark.slow
@pytest.mark.skipif(not VID4.is_dir(), reason="needs ../shared/data/Vid4")
@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("matlab_bicubic", {"psnr_rgb": 22.3686, "ssim_rgb": 0.6098, "psnr_y": 23.7836,
                            "ssim_y": 0.6347}),
        ("pil_bicubic", {"psnr_rgb": 22.3568, "ssim_rgb": 0.6097}),
    ],
)  # fmt: skip
def test_bicubic_on_vid4(evaluate, how, expected):
    row = only(evaluate("--data", f"Vid4={VID4}", "--method", "bicubic", "--degradation", how))
    assert (row["clips"], row["frames"]) == (4, 171)
    for name, value in expected.items():
        assert row[name] == pytest.approx(value, abs=6e-5), name


def test_readme_shows_the_kept_measurement():
    kept = json.loads((ROOT / "eval" / "results" / "val-tiny.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for row in kept["rows"]:
        for name, scores in {**row["per_clip"], "**mean**": row}.items():
            cells = [f"{scores[s]:.{3 if 'psnr' in s else 4}f}" for s in (*SCORES, "lpips")]
            assert f"| {name} | {row['method']} | {' | '.join(cells)} |" in readme


def test_readme_shows_the_kept_measurements_of_compressed_clips():
    kept = [
        json.loads((ROOT / "eval" / "results" / f"val-crf-{crf}.json").read_text())
        for crf in (18, 23, 28, 33)
    ]
    assert [summary["crf"] for summary in kept] == [18, 23, 28, 33]
    readme = (ROOT / "README.md").read_text()
    methods = [row["method"] for row in kept[0]["rows"]]
    assert methods == ["bicubic", "mana:tiny", "mana:tiny-real"]
    for number, method in enumerate(methods):
        cells = [f"{summary['rows'][number]['psnr_rgb']:.3f}" for summary in kept]
        assert f"| {method} | {' | '.join(cells)} |" in readme
