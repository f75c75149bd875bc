"""Perceptual training: its losses, and exact resume."""

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from footage import textured, write_pictures
from safetensors.torch import save_file

from mana_triton import checkpoint
from mana_triton.model import MANA, MANAConfig
from mana_triton.training import perceptual
from mana_triton.training.losses import PatchDiscriminator, optical_flow, temporal_loss, warp
from mana_triton.training.perceptual import PerceptualOptions, PerceptualTrainer, neighbors
from mana_triton.training.progress import TrainingError

pytestmark = pytest.mark.usefixtures("one_thread")
RNG = np.random.default_rng(0)
CONFIG = MANAConfig(
    channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=8, match="cosine", offsets=True
)


def units(frames: np.ndarray) -> torch.Tensor:
    """[B, 2, H, W, 3] uint8 -> [B, 2, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frames).movedim(-1, 2).float() / 255


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> PerceptualOptions:
    """Tiny data, and an AlexNet of random weights."""
    root = tmp_path_factory.mktemp("perceptual")
    frame = textured(RNG, 96, 100)
    write_pictures(root / "clips" / "a", np.stack([np.roll(frame, 2 * t, 1) for t in range(10)]))
    write_pictures(root / "stills", textured(RNG, 2, 80, 90))
    torch.manual_seed(0)
    checkpoint.save(MANA(CONFIG), root / "start.safetensors")
    shapes = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3)}
    shapes[10] = (256, 256, 3, 3)
    weights = {f"features.{n}.weight": 0.05 * torch.randn(shape) for n, shape in shapes.items()}
    biases = {f"features.{n}.bias": torch.zeros(shape[0]) for n, shape in shapes.items()}
    save_file(weights | biases, root / "alexnet.safetensors")
    return PerceptualOptions(
        init=str(root / "start.safetensors"),
        data=(root / "clips",),
        stills=(root / "stills",),
        lpips_backbone=root / "alexnet.safetensors",
        out=root / "out",
        cache=root / "cache",
        variants=1,
        iterations=5,
        crop=12,
        pairs=1,
        singles=1,
    )


@pytest.fixture(scope="module")
def uninterrupted(options) -> Path:
    summary = PerceptualTrainer(options).run()
    assert summary["iterations"] == 5
    return options.out


# ---- losses


def test_a_translated_pair_does_not_flicker():
    """Errors that move with the picture cost nothing; errors that stay where they are do."""
    wide = textured(RNG, 64, 70)
    hr = np.stack([wide[:, 3:67], wide[:, 0:64]])[None]  # moves right by 3
    flow = torch.zeros(1, 64, 64, 2)
    flow[..., 0] = 3
    y = units(hr)
    _, inside = warp(y[:, 1], flow)
    error = torch.rand(1, 3, 64, 70)
    moving = torch.stack([error[..., 3:67], error[..., 0:64]], 1)
    assert temporal_loss(y + moving, y, flow, inside.float()) < 1e-6
    fixed = torch.stack([error[..., :64]] * 2, 1)
    assert temporal_loss(y + fixed, y, flow, inside.float()) > 0.1


def test_the_flow_of_a_translation_is_found_and_its_edge_is_masked():
    wide = np.repeat(textured(RNG, 64, 66), 1, 0)
    hr = np.stack([wide[:, 2:66], wide[:, 0:64]])[None]
    flow, mask = optical_flow(hr)
    inner = flow[0, 16:48, 16:40]
    assert (inner - torch.tensor([2.0, 0.0])).abs().mean() < 0.3
    assert mask.shape == (1, 1, 64, 64) and mask[..., 16:48, 16:40].mean() > 0.5
    assert mask[..., 63].sum() == 0, "what leaves the picture has no counterpart"


def test_a_discriminator_judges_patches():
    critic = PatchDiscriminator()
    assert critic(torch.rand(2, 3, 64, 48)).shape == (2, 1, 8, 6)
    weight = cast(torch.nn.Conv2d, critic[0]).weight.detach()
    largest = torch.linalg.matrix_norm(weight.flatten(1), 2)
    assert largest == pytest.approx(1, abs=0.3)


def test_neighbors_are_the_outputs_of_both_windows():
    torch.manual_seed(0)
    model, frames = MANA(CONFIG).eval(), torch.rand(1, 8, 3, 12, 12)
    with torch.no_grad():
        both = neighbors(model, frames)
        for n in (0, 1):
            torch.testing.assert_close(both[:, n], model(frames[:, n : n + 7]))


# ---- the run


@pytest.mark.parametrize("stop", [1, 3])
def test_resume_equals_an_uninterrupted_run(options, uninterrupted, tmp_path, monkeypatch, stop):
    options = replace(options, out=tmp_path)
    step = PerceptualTrainer._step

    def stopping(trainer, *batch):
        step(trainer, *batch)
        if trainer.iteration == stop:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(perceptual, "SAVE_EVERY", 1 if stop == 1 else 2)
        patch.setattr(PerceptualTrainer, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            PerceptualTrainer(options).run()
    PerceptualTrainer(options).run()
    states = [torch.load(out / "last.pt") for out in (tmp_path, uninterrupted)]
    assert states[0]["sums"] == states[1]["sums"]
    for part in ("model", "ema", "discriminator"):
        for name, x in states[1][part].items():
            assert torch.equal(states[0][part][name], x), name
    assert states[0]["optimizer"]["state"].keys() == states[1]["optimizer"]["state"].keys()


def test_the_average_is_exported_and_losses_are_logged(options, tmp_path, monkeypatch):
    monkeypatch.setattr(perceptual, "LOG_EVERY", 2)
    PerceptualTrainer(replace(options, out=tmp_path, iterations=4)).run()
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [entry["iteration"] for entry in entries] == [2, 4]
    assert set(perceptual.TERMS) <= entries[0].keys()
    exported = checkpoint.load(tmp_path / "ema.safetensors").state_dict()
    state = torch.load(tmp_path / "last.pt")
    assert all(torch.equal(exported[name], x) for name, x in state["ema"].items())
    assert not torch.equal(exported["conv_last.weight"], state["model"]["conv_last.weight"])


def test_other_settings_are_refused(options, uninterrupted):
    with pytest.raises(TrainingError, match=r"other settings: --crop \(was 12, now 10\); use"):
        PerceptualTrainer(replace(options, crop=10))


def test_a_loss_that_is_not_finite_stops_in_one_line(options, tmp_path, monkeypatch, capsys):
    argv = ["perceptual", "--init", options.init, "--data", options.data[0]]
    argv += ["--stills", options.stills[0], "--lpips-backbone", options.lpips_backbone]
    argv += ["--out", tmp_path, "--cache", options.cache, "--variants", 1, "--iterations", 3]
    argv += ["--crop", 12, "--pairs", 1, "--singles", 1]
    nan = torch.tensor(float("nan"))
    monkeypatch.setattr(perceptual, "shifted_lpips", lambda *_: nan)
    monkeypatch.setattr("sys.argv", [str(x) for x in argv])
    with pytest.raises(SystemExit, match="error: a loss is not finite at iteration 1; use") as e:
        perceptual.main()
    assert "\n" not in str(e.value)
