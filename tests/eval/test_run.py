"""The evaluation: scores against their definitions, resume, processes, and every user error."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import moving, write
from PIL import Image
from torch import nn

from eval import datasets, methods, page, report, run, scoring
from mana_triton import checkpoint, metrics
from mana_triton.engine.upscaler import upscale
from mana_triton.resize import upscale_bicubic
from mana_triton.training.clips import DataError
from mana_triton.training.degradation import compress, degrade

SCORES = ("psnr_rgb", "ssim_rgb", "psnr_y", "ssim_y")
needs_lpips = pytest.mark.skipif(find_spec("lpips") is None, reason="lpips is not installed")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips() -> dict[str, np.ndarray]:
    return {"one": moving(5, 68, 76), "two": moving(3, 70, 77, speed=2, seed=1)}


@pytest.fixture(scope="module")
def folder(clips, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clips")
    for name, frames in clips.items():
        write(path / name, frames)
    return path


@pytest.fixture
def evaluate(tmp_path, monkeypatch):
    """Runs the command in this process, without LPIPS; returns the object of the last line."""

    def unavailable(_):
        raise metrics.LPIPSUnavailable("LPIPS is left out of this test")

    def call(*argv: str | Path, jobs: int = 1, lpips: bool = False) -> dict:
        if not lpips:
            monkeypatch.setattr(scoring, "lpips_of", unavailable)
        known = ("--results", tmp_path / "results", "--jobs", jobs)
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
    """The hash in a row for these low-resolution clips."""
    hashes = []
    for frames in clips:
        digest = hashlib.sha256()
        for frame in frames:
            digest.update(np.array(frame.shape).tobytes() + frame.tobytes())
        hashes.append(digest.hexdigest())
    return hashlib.sha256("".join(hashes).encode()).hexdigest()


def psnr(a, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((np.asarray(a, float) - b) ** 2)))


# ---- scores


@pytest.mark.parametrize("border", [0, 3])
def test_scores_are_means_over_frames_then_clips(evaluate, folder, clips, border):
    row = only(evaluate("--data", f"toy={folder}", "--method", "bicubic", "--crop-border", border))
    inside = slice(border, -border or None)
    expected = {}
    for name, frames in clips.items():
        hr = frames[:, :68, :76][:, inside, inside]
        pairs = list(zip(enlarged(frames)[:, inside, inside], hr, strict=True))
        expected[name] = [
            [psnr(a, b) for a, b in pairs],
            [metrics.ssim(a, b) for a, b in pairs],
            [psnr(metrics.rgb_to_y(a), metrics.rgb_to_y(b)) for a, b in pairs],
            [metrics.ssim(a, b, y_channel=True) for a, b in pairs],
        ]
    assert (row["dataset"], row["method"], row["clips"], row["frames"]) == ("toy", "bicubic", 2, 8)
    assert row["lr_sha256"] == hash_of(map(shrunk, clips.values()))
    for i, score in enumerate(SCORES):
        means = {name: np.mean(values[i]) for name, values in expected.items()}
        for name, mean in means.items():
            assert row["per_clip"][name][score] == pytest.approx(mean, abs=1e-9)
        assert row[score] == pytest.approx(np.mean(list(means.values())), abs=1e-9)
        frames = expected["one"][i] + expected["two"][i]
        assert row["frame_mean"][score] == pytest.approx(np.mean(frames), abs=1e-9)


def test_frames_equal_to_originals_are_counted_and_left_out(evaluate, clips, tmp_path, capsys):
    out = clips["one"] // 2 + 60
    out[[2, 4]] = clips["one"][[2, 4]]
    write(tmp_path / "hr" / "one", clips["one"])
    write(tmp_path / "out" / "one", out)
    words = ("--data", f"a={tmp_path / 'hr'}", "--method", f"folder:{tmp_path / 'out'}")
    summary = evaluate(*words)
    row = only(summary)
    others = [psnr(out[i], clips["one"][i]) for i in (0, 1, 3)]
    assert row["psnr_rgb"] == pytest.approx(np.mean(others), abs=1e-9)
    assert (row["frames"], row["perfect_frames"]) == (5, 2)
    assert row["lr_sha256"] is None  # unknown for another program
    json.dumps(summary, allow_nan=False)
    assert "2 frames equal their originals (2 of one)" in capsys.readouterr().out


def test_networks_are_streamed_and_center_sees_no_neighbors(evaluate, folder, clips, weights):
    names = (f"mana:{weights}", f"center:{weights}")
    streamed, center = evaluate("--data", f"toy={folder}", "--method", *names)["rows"]
    for name, frames in clips.items():
        hr, lr = frames[:, :68, :76], shrunk(frames)
        expected = np.mean([psnr(a, b) for a, b in zip(upscale(lr, weights), hr, strict=True)])
        assert streamed["per_clip"][name]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)
        alone = [psnr(next(iter(upscale(lr[i : i + 1], weights))), hr[i]) for i in range(len(hr))]
        assert center["per_clip"][name]["psnr_rgb"] == pytest.approx(np.mean(alone), abs=1e-9)
    assert streamed["psnr_rgb"] != center["psnr_rgb"]
    assert streamed["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (streamed["dtype"], streamed["device"], streamed["memory_slots"]) == ("fp32", "cpu", 128)


def ensemble(frames: np.ndarray, weights: Path, **options) -> np.ndarray:
    """Self-ensemble by hand: [T, 4H, 4W, 3] in 0..255, not rounded."""
    results = []
    for down, right, transposed in product((1, -1), (1, -1), (False, True)):
        x = frames[:, ::down, ::right]
        x = x.swapaxes(1, 2) if transposed else x
        x = torch.from_numpy(x.copy()).permute(0, 3, 1, 2) / 255
        large = np.stack([np.asarray(y) for y in upscale(x, weights, **options)])
        large = large.transpose(0, 3, 2, 1) if transposed else large.transpose(0, 2, 3, 1)
        results.append(large[:, ::down, ::right].astype(float))
    return 255 * np.mean(results, axis=0)


def test_ensemble_is_the_mean_over_flips_and_turns(clips, weights):
    lr = shrunk(clips["two"])
    method = f"ensemble:{weights}"
    large = np.stack(list(methods.enlarge(method, iter(lr), range(3), "cpu", "fp32")))
    # rounding, and sums in another order
    assert np.abs(large - ensemble(lr, weights)).max() <= 0.5 + 1e-3


def test_vimeo_window_has_no_cuts(clips, weights):
    lr = np.concatenate([shrunk(clips["one"]), 255 - shrunk(clips["one"][:2])])  # frame 5 is a cut
    middle, other = (
        next(methods.enlarge(f"{kind}:{weights}", iter(lr), datasets.MIDDLE, "cpu", "fp32"))
        for kind in ("mana", "ensemble")
    )
    assert np.array_equal(middle, list(upscale(lr, weights, scene_cuts=False))[3])
    assert not np.array_equal(middle, list(upscale(lr, weights))[3])
    expected = ensemble(lr, weights, scene_cuts=False)[3]
    assert np.abs(other - expected).max() <= 0.5 + 1e-3


def test_vimeo_scores_the_middle_frame(evaluate, tmp_path):
    hr = np.stack([moving(7, 64, 64, 2, 5), moving(7, 64, 64, 0, 7)])
    for n, frames in enumerate(hr):
        write(tmp_path / "vimeo" / "sequences" / "00001" / f"000{n}", frames, "im{}.png", first=1)
    (tmp_path / "vimeo" / "sep_testlist.txt").write_text("00001/0000\n00001/0001\n")
    html = tmp_path / "report.html"
    data = f"Vimeo90K={tmp_path / 'vimeo'}"
    row = only(evaluate("--data", data, "--method", "bicubic", "--html", html))
    expected = [psnr(enlarged(frames)[3], frames[3]) for frames in hr]
    assert (row["clips"], row["frames"]) == (2, 2)
    assert row["psnr_rgb"] == pytest.approx(np.mean(expected), abs=1e-9)
    assert row["lr_sha256"] == hash_of(map(shrunk, hr))  # the network also sees unscored frames
    lines = re.findall(r'points="([^"]+)"', html.read_text())
    assert [len(line.split()) for line in lines] == [2]  # one plot, over the clips


def test_low_resolution_frames_are_compressed(evaluate, folder, clips):
    summary = evaluate("--data", f"a={folder}", "--method", "bicubic", "--crf", "28")
    lr = [np.stack(list(compress(shrunk(frames), "libx264", 28))) for frames in clips.values()]
    row = only(summary)
    assert row["lr_sha256"] == hash_of(lr)
    assert (summary["crf"], row["degradation"]) == (28, "matlab_bicubic + x264 crf 28")
    results = upscale_bicubic(torch.from_numpy(lr[0])).numpy()
    expected = np.mean([psnr(a, b) for a, b in zip(results, clips["one"], strict=True)])
    assert row["per_clip"]["one"]["psnr_rgb"] == pytest.approx(expected, abs=1e-9)


def test_low_resolution_frames_from_disk_replace_made_ones(evaluate, folder, clips, tmp_path):
    for name, frames in clips.items():  # a quarter of the original, rounded up
        lr = shrunk(frames, "pil_bicubic")
        write(
            tmp_path / "lr" / name,
            np.pad(lr, ((0, 0), (0, name == "two"), (0, name == "two"), (0, 0))),
        )
    common = ("--data", f"toy={folder}", "--method", "bicubic")
    made = evaluate(*common, "--degradation", "pil_bicubic")
    read = evaluate(*common, "--degradation", "none", "--lr", f"toy={tmp_path / 'lr'}")
    assert only(read) == only(made) | {"degradation": report.FROM_DISK}
    assert (read["lr_from_disk"], read["degradation"]) == (["toy"], "none")


def test_steadiness_is_scored_from_the_second_frame(evaluate, folder, clips, tmp_path):
    for name, frames in clips.items():
        write(tmp_path / "frozen" / name, np.repeat(frames[:1], len(frames), 0))
    names = [f"folder:{path}" for path in (folder, tmp_path / "frozen")]
    same, still = evaluate("--data", f"toy={folder}", "--method", *names, "--temporal")["rows"]
    assert same["tof"] == 0 and same["warping_error"] > 0
    # the textures move by 1 and by 2 pixels per frame, the frozen ones by none
    assert [round(still["per_clip"][name]["tof"]) for name in clips] == [1, 2]
    kept = [json.loads(file.read_text()) for file in (tmp_path / "results").glob("*.json")]
    pair = clips["one"][0, :68, :76], clips["one"][1, :68, :76]
    expected = metrics.warping_error(pair, pair)
    found = [result["scores"]["warping_error"] for result in kept if len(result["frames"]) == 5]
    assert all(values[0] is None for values in found)
    assert expected in [values[1] for values in found]


@needs_lpips
def test_lpips_is_in_the_rows(evaluate, folder, clips, backbone):
    words = ("--data", f"toy={folder}", "--method", "bicubic", "--lpips-backbone", backbone)
    row = only(evaluate(*words, lpips=True))
    metric = metrics.LPIPS(backbone)
    for name, frames in clips.items():
        pairs = zip(enlarged(frames), frames[:, :68, :76], strict=True)
        expected = np.mean([metric(a, b) for a, b in pairs])
        assert row["per_clip"][name]["lpips"] == pytest.approx(expected, rel=1e-6)


@needs_lpips
def test_missing_lpips_weights_are_reported(evaluate, folder, monkeypatch, capsys):
    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    scoring.lpips_of.cache_clear()
    summary = evaluate("--data", f"toy={folder}", "--method", "bicubic", lpips=True)
    assert only(summary)["lpips"] is None and summary["lpips"] is None
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "LPIPS" in x]
    assert "download failed (no network)" in line and "--lpips-backbone FILE" in line


# ---- frames of other programs


@pytest.mark.parametrize(
    ("size", "fits"), [((70, 77), True), ((68, 76), True), ((68, 77), False), ((72, 80), False)]
)
def test_outputs_have_the_size_of_the_original_or_its_crop(evaluate, clips, tmp_path, size, fits):
    write(tmp_path / "hr" / "two", clips["two"])
    padded = np.pad(clips["two"], ((0, 0), (0, 2), (0, 3), (0, 0)))
    write(tmp_path / "out" / "two", padded[:, : size[0], : size[1]])
    words = ("--data", f"a={tmp_path / 'hr'}", "--method", f"folder:{tmp_path / 'out'}")
    if fits:
        assert only(evaluate(*words))["perfect_frames"] == 3
    else:
        with pytest.raises(DataError, match=r"must be 76x68 or 77x70 to go with"):
            evaluate(*words)


# ---- resume and processes


def test_finished_clips_are_kept(evaluate, folder, weights, tmp_path, monkeypatch):
    common = ("--data", f"toy={folder}", "--method", "bicubic", f"mana:{weights}")
    first = evaluate(*common)
    computed, score = [], scoring.score
    monkeypatch.setattr(
        scoring, "score", lambda unit, tick: computed.append(unit.method) or score(unit, tick)
    )
    assert evaluate(*common)["rows"] == first["rows"]
    assert not computed
    damaged = next((tmp_path / "results").glob("*.json"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    assert evaluate(*common)["rows"] == first["rows"]
    assert len(computed) == 1
    computed.clear()
    evaluate(*common, "--crop-border", "1")
    assert len(computed) == 4
    computed.clear()
    other = tmp_path / "other.safetensors"
    shutil.copy(weights, other)
    evaluate("--data", f"toy={folder}", "--method", f"mana:{other}")
    assert not computed  # the same weights under another name
    model = checkpoint.load(weights)
    nn.init.normal_(model.w_z.weight, std=0.1)
    checkpoint.save(model, other)
    methods.upscaler_of.cache_clear()
    evaluate("--data", f"toy={folder}", "--method", f"mana:{other}")
    assert len(computed) == 2


def test_pictures_are_kept_for_as_many_clips_as_the_page_shows(
    evaluate, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(page, "PICTURED", 1)
    words = ("--data", f"toy={folder}", "--method", "bicubic")
    evaluate(*words)
    assert not list((tmp_path / "results").glob("*.png"))
    html = tmp_path / "page.html"
    evaluate(*words, "--html", html)
    assert len(list((tmp_path / "results").glob("*.png"))) == 2  # the middle and the worst
    assert "Pictures of the first 1 of 2 clips." in html.read_text()


def test_unreadable_frame_loses_no_finished_clip(evaluate, folder, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    frame = broken / "two" / "0002.png"
    content = frame.read_bytes()
    frame.write_bytes(content[: len(content) // 2])
    arguments = ("--data", f"toy={broken}", "--method", "bicubic")
    with pytest.raises(DataError, match=r"0002.png must be a readable picture.* are kept in"):
        evaluate(*arguments)
    frame.write_bytes(content)
    computed, score = [], scoring.score
    monkeypatch.setattr(
        scoring, "score", lambda unit, tick: computed.append(unit.clip.name) or score(unit, tick)
    )
    evaluate(*arguments)
    assert computed == ["two"]


def test_number_of_processes_changes_nothing(evaluate, folder, weights, tmp_path):
    common = ("--data", f"toy={folder}", "--method", "bicubic", f"mana:{weights}")
    common = (*common, "--precision", "fp32")
    alone = evaluate(*common)
    shutil.rmtree(tmp_path / "results")
    assert evaluate(*common, jobs=2)["rows"] == alone["rows"]


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="process groups are POSIX")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_killed_evaluation_continues(tmp_path, evaluate, how):
    for index in range(6):
        write(tmp_path / "set" / f"clip{index}", moving(6 * (6 - index), 96, 128, seed=index))
    arguments = ("--data", f"toy={tmp_path / 'set'}", "--method", "bicubic")
    words = (*arguments, "--jobs", "2", "--results", tmp_path / "results")
    process = subprocess.Popen(
        [sys.executable, str(run.ROOT / "eval" / "run.py"), *map(str, words)],
        text=True, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not list((tmp_path / "results").glob("*.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    while _is_alive(process.pid):  # its workers end with it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    if how == signal.SIGTERM:
        assert process.returncode == 1
        assert errors.strip().splitlines()[-1].startswith("error: stopped; the same command")
    kept = list((tmp_path / "results").glob("[!.]*.json"))
    assert 0 < len(kept) < 6
    row = only(evaluate(*arguments))
    shutil.rmtree(tmp_path / "results")
    assert only(evaluate(*arguments)) == row


def _is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# ---- user errors


@pytest.fixture
def places(folder, tmp_path, clips) -> dict[str, str]:
    """What the words in capitals of the arguments below stand for."""
    for name, frames in clips.items():
        write(tmp_path / "SHORT" / name, frames[: 2 if name == "two" else None, :68, :76])
        write(tmp_path / "SMALL" / name, frames[:, :60, :76])
    write(tmp_path / "TINY" / "a", np.zeros((2, 8, 40, 3), np.uint8))
    shutil.copytree(folder, tmp_path / "MIXED")
    Image.fromarray(clips["one"][3, :, :72]).save(tmp_path / "MIXED" / "one" / "0003.png")
    for name in ("EMPTY", "LISTED"):
        (tmp_path / name).mkdir()
    (tmp_path / "LISTED" / "sep_testlist.txt").write_text("00001/0001\n")
    (tmp_path / "NOTES").write_text("not weights")
    names = ("SHORT", "SMALL", "TINY", "MIXED", "EMPTY", "LISTED", "NOTES")
    return {"FOLDER": str(folder)} | {name: str(tmp_path / name) for name in names}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--data a=nowhere --method bicubic", "nowhere must exist"),
        ("--data a=EMPTY --method bicubic", "must hold videos"),
        ("--data a=FOLDER --method bicubik", "must be bicubic, mana:WEIGHTS, center:WEIGHTS, "),
        ("--data a=FOLDER --method mana:", "method must be bicubic, mana:WEIGHTS"),
        ("--data a=FOLDER --method mana:huge", r"shipped name \(.*tiny.*\) or an existing file"),
        ("--data a=FOLDER --method mana:NOTES", "NOTES must be a .safetensors file"),
        ("--data a=FOLDER --method mana:tiny --precision fp8", "precision must be auto, fp32"),
        ("--data a=FOLDER --method folder:SHORT", "as many frames as two, 3, it has 2"),
        ("--data a=FOLDER --method folder:SMALL", "must be 76x68 to go with .* got 76x60"),
        ("--data a=FOLDER --method folder:MIXED", "one size, frame 3 has 72x68 after 76x68"),
        ("--data a=FOLDER --method bicubic --device gpu9", "device must be auto, cpu or cuda"),
        ("--data a=FOLDER --method bicubic --results NOTES", "--results must be a folder to write"),
        ("--data a=FOLDER --lr b=FOLDER --method bicubic", r"one of --data \(a\), got 'b'"),
        ("--data a=FOLDER --lr a=FOLDER --method bicubic", "must be 19x17 .* got 76x68"),
        ("--data a=FOLDER --degradation none --method bicubic", "pass --lr a=PATH"),
        ("--data a=LISTED --method bicubic", "Vimeo-90K or Vimeo-90K-Motion, got 'a'"),
        ("--data vimeo90k=FOLDER --method bicubic", "must hold sep_testlist.txt"),
        ("--data vimeo90k=LISTED --method bicubic", "im1.png is missing"),
        ("--data a=TINY --method bicubic", "at least (11|31) pixels .* a has 40x8"),
    ],
)
def test_user_errors_are_one_line(places, arguments, line, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_lpips_identity", lambda _: None)
    words = re.sub("[A-Z]{4,}", lambda match: places[match[0]], arguments).split()
    words = ["--results", str(tmp_path / "results"), *words]
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--jobs", "1"])
    with pytest.raises(SystemExit) as caught:
        run.main()
    message = str(caught.value.code)
    assert message.startswith("error: ") and "\n" not in message
    assert re.search(line, message), message
    assert "{" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["--bench", "--data", "a=b"], "--bench takes no --data"),
        (["--method", "bicubic"], "--data, --method (or --bench)"),
        (["--full", "--data", "a=b", "--method", "bicubic"], "--full belongs to --bench"),
        (["--data", "toy", "--method", "bicubic"], "must be NAME=PATH, got 'toy'"),
        (["--data", "a=b", "a=c", "--method", "bicubic"], "must not name one thing twice"),
    ],
)
def test_wrong_usage_exits_2(argv, line, capsys):
    with pytest.raises(SystemExit) as stop:
        run.parse_args(argv)
    assert stop.value.code == 2
    assert line in capsys.readouterr().err


def test_names_are_shown_as_they_are(tmp_path, monkeypatch, capsys):
    """Markup, emoji and bytes in no encoding, on both streams and on the page."""
    odd = os.fsdecode("[b]ö[i] :x: \udcff\\".encode("utf-8", "surrogateescape"))
    write(tmp_path / odd / odd, moving(2, 33, 34))
    words = ["--data", f"{odd}={odd}", "--method", f"folder:{odd}", "--jobs", "1"]
    monkeypatch.setattr(run, "_lpips_identity", lambda _: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", *words, "--results", "kept", "--html", "page.html"])
    run.main()
    out, err = capsys.readouterr()
    name = r"[b]ö[i] :x: \udcff" + "\\"
    assert f"│ {name} " in out and f"mean of {name}" in out
    assert f"note: {name} is 34x33" in err
    assert f"<td>{name}</td>" in Path("page.html").read_text()
    json.loads(out.splitlines()[-1])


def test_command_ends_in_one_json_line(folder, tmp_path, backbone):
    """Also where the folder of --json is missing: the line comes first, then the error."""
    words = ["--data", f"toy={folder}", "--method", "bicubic", "--json", "none/out.json", "--jobs"]
    words += ["1", "--table1", "--lpips-backbone", str(backbone)]
    done = subprocess.run(
        [sys.executable, str(run.ROOT / "eval" / "run.py"), *words],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: --json must be a file that can be wri")
    (row,) = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {"dataset", "method", "clips", "frames", "lpips", *SCORES} <= set(row)
    assert f"mean of toy │ bicubic │ {row['psnr_rgb']:.3f}" in done.stdout
    assert "two is 77x70, cropped to 76x68" in done.stderr
