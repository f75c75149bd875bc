"""The studies of quality: what the ablations train, and what the motion test measures."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import moving, write
from PIL import Image

from eval.run import ROOT
from eval.studies import ablate, motion
from mana_triton import checkpoint
from mana_triton.model import MANA, MANAConfig

CONFIG = MANAConfig(
    channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=8, match="cosine", offsets=True
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("study", ["ablate", "motion"])
def test_studies_run_as_programs(study, tmp_path):
    command = [sys.executable, ROOT / "eval" / "studies" / f"{study}.py"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "error: pass --" in result.stderr


# ---- ablations


def test_variants_differ_in_what_they_are_named_after():
    configs = {name: config for group in ablate.GROUPS.values() for name, config in group.items()}
    assert [configs[f"memory-{n}"].memory_slots for n in (0, 128, 1024)] == [0, 128, 1024]
    assert configs["none"].sigma == float("inf") and configs["gate"].gaussian == "gate"
    assert (configs["dot"].match, configs["dot"].offsets) == ("dot", False)
    assert (configs["cosine-offsets"].match, configs["cosine-offsets"].offsets) == ("cosine", True)


def test_stages_have_the_papers_shares():
    assert ablate.stages(150, CONFIG) == (90, 30, 30)
    assert ablate.stages(150, replace(CONFIG, memory_slots=0)) == (90, 0, 60)


def test_equal_configurations_are_trained_once():
    names = [ablate.run_name(c) for group in ablate.GROUPS.values() for c in group.values()]
    assert len(names) == 12 and len(set(names)) == 10
    assert names.count("memory-128") == 3  # bias, and cosine-offsets


@pytest.mark.parametrize("trained", [None, "tiny"])
def test_variants_start_with_equal_weights(trained):
    """Drawing the memory first would change the decoder, and chance would make the difference."""
    states = []
    for config in (c for group in ablate.GROUPS.values() for c in group.values()):
        states.append(ablate.first_weights(config, 0, trained).state_dict())
    other = ablate.first_weights(ablate.TINY, 1, trained).state_dict()
    for name in states[0]:
        owned = name.split(".")[0] in ablate.ATTENTION
        if not owned or name.split(".")[0] in ("phi", "g"):
            assert all(torch.equal(states[0][name], state[name]) for state in states), name
        if name == "phi.weight" or (name == "conv_last.weight" and not trained):
            assert not torch.equal(states[0][name], other[name])
    if trained:
        kept = checkpoint.load(trained).state_dict()
        assert torch.equal(states[3]["decoder.3.conv1.weight"], kept["decoder.3.conv1.weight"])
        assert not torch.equal(states[1]["w_z.weight"], kept["w_z.weight"])
    assert not states[1]["w_z.weight"].any()


def test_ablation_writes_its_table_and_is_not_repeated(tmp_path, monkeypatch, capsys):
    small = {"bias": CONFIG, "none": replace(CONFIG, sigma=float("inf"))}
    monkeypatch.setattr(ablate, "GROUPS", {"memory": {}, "weighting": small, "matching": {}})
    monkeypatch.setattr("mana_triton.training.trainer.LOG_EVERY", 2)
    write(tmp_path / "data" / "clip", moving(9, 60, 72))
    out = tmp_path / "out"
    command = ["ablate", "--data", tmp_path / "data", "--val", tmp_path / "data", "--out", out]
    command += ["--iterations", 5, "--crop", 8, "--batch", 2, "--val-frames", 2, "--threads", 1]
    command += ["--groups", "weighting", "--seeds", 0, 1]
    monkeypatch.setattr(sys, "argv", [str(x) for x in command])
    ablate.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    runs = [(row["variant"], row["seed"]) for row in rows]
    assert runs == [("bias", 0), ("bias", 1), ("none", 0), ("none", 1)]
    paths = {"bias": {"sigma", "temperature"}, "none": {"temperature"}}
    for row in rows:
        weights = checkpoint.load(out / f"{row['variant']}-{row['seed']}" / "best.safetensors")
        assert row["parameters"] == sum(p.numel() for p in weights.parameters())
        assert set(row["paths"]) == paths[row["variant"]]
        assert weights.sigma.isfinite() == (row["variant"] == "bias")
    text = (out / "ablation.md").read_text()
    # 5 iterations of 2 crops of 8x8, against 150,000 of 16 of 64x64
    assert "1/15,360,000 of the paper's pixels" in text and "Deviation between seeds" in text
    before = (out / "bias-0" / "last.pt").stat().st_mtime_ns
    ablate.main()
    assert (out / "bias-0" / "last.pt").stat().st_mtime_ns == before, "a finished run was repeated"
    checkpoint.save(MANA(CONFIG), tmp_path / "other.safetensors")
    other = ["--init-from", str(tmp_path / "other.safetensors")]
    monkeypatch.setattr(sys, "argv", [*sys.argv, *other])
    with pytest.raises(SystemExit, match="it holds others; choose another --out"):
        ablate.main()


# ---- motion


def picture(seed: int = 0, size: int = 320) -> np.ndarray:
    """Smooth blobs, whose motion optical flow can find."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (size // 16, size // 16, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def test_windows_hold_one_center_and_shifted_neighbors():
    frames = {}
    for shift in (0, 8, 40):
        frames[shift] = motion.window(picture(), shift, 96, np.random.default_rng(3))
        assert np.array_equal(frames[shift][3], frames[0][3])
    assert all(np.array_equal(frame, frames[0][3]) for frame in frames[0])
    whole = picture().astype(int)

    def place(crop: np.ndarray) -> np.ndarray:
        """The row and column of the picture at which a crop starts."""
        corners = np.argwhere((whole == crop[0, 0]).all(-1))
        (found,) = [c for c in corners if (whole[c[0] :, c[1] :][:96, :96] == crop).all()]
        return found

    center = place(frames[0][3])
    for shift in (8, 40):
        for t in (0, 1, 2, 4, 5, 6):
            distance = np.hypot(*(place(frames[shift][t]) - center))
            assert abs(distance - shift) <= np.sqrt(0.5)  # coordinates are rounded


def test_flow_brings_neighbors_back():
    hr = motion.window(picture(), 12, 128, np.random.default_rng(3))
    lr = hr[:, 2::4, 2::4].copy()
    inner = (slice(None), slice(6, -6), slice(6, -6))
    before = np.abs(lr[inner].astype(int) - lr[3][inner[1:]]).mean()
    after = np.abs(motion.aligned(lr)[inner].astype(int) - lr[3][inner[1:]]).mean()
    assert after < before / 3
    assert np.array_equal(motion.aligned(lr)[3], lr[3])


def test_curves_of_a_network(tmp_path, monkeypatch, capsys):
    """At no shift the neighbors are copies, so real and copied neighbors score alike."""
    Image.fromarray(picture()).save(tmp_path / "blobs.png")
    checkpoint.save(MANA(CONFIG), tmp_path / "net.safetensors")
    command = ["motion", "--stills", tmp_path / "blobs.png", "--size", 128, "--no-flow"]
    command += ["--weights", f"net={tmp_path / 'net.safetensors'}", "--cache", tmp_path / "cache"]
    command += ["--plot", tmp_path / "curves.svg"]
    monkeypatch.setattr(sys, "argv", [str(x) for x in command])
    monkeypatch.setattr(motion, "SHIFTS", (0, 8))
    motion.main()
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    scores = {row["method"]: row["psnr_db"] for row in rows}
    assert list(scores) == ["bicubic", "net", "net, center alone"]
    assert scores["net"]["0"] == pytest.approx(scores["net, center alone"]["0"], abs=1e-9)
    assert scores["bicubic"]["0"] == scores["bicubic"]["8"]
    assert "<svg" in Path(tmp_path / "curves.svg").read_text()


def test_frames_of_clips_are_evenly_spaced(tmp_path):
    for clip, T in (("one", 5), ("two", 9), ("small", 3)):
        (tmp_path / clip).mkdir()
        for i in range(T):
            pixels = np.full((200 if clip != "small" else 100, 210, 3), 10 * i, np.uint8)
            Image.fromarray(pixels).save(tmp_path / clip / f"{i}.png")
    options = motion.MotionOptions(
        ("tiny",), clips=(tmp_path,), size=96, pictures=7, cache=tmp_path / "cache"
    )
    levels = [int(x.max()) for x in motion.pictures(options)]
    assert levels == [0, 20, 40, 0, 40, 80]  # three of each, since a fourth would be too many


@pytest.mark.parametrize("wrong", [{"size": 90}, {"size": 64}, {"pictures": 0}, {"weights": ()}])
def test_wrong_options_are_refused(wrong):
    with pytest.raises(ValueError, match="--"):
        motion.MotionOptions(**{"weights": ("tiny",), "stills": (Path("x"),)} | wrong)
