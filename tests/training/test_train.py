"""Training: the stages, exact resume after any kind of stop, validation, what is written."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mana_triton import checkpoint, train
from mana_triton.metrics import psnr
from mana_triton.model import MANA, MANAConfig
from mana_triton.resize import upscale_bicubic
from mana_triton.train import options_of
from mana_triton.training import clips as data
from mana_triton.training import trainer as training
from mana_triton.training.degradation import Recipe, degrade
from mana_triton.training.losses import StageLoss
from mana_triton.training.options import TrainingOptions
from mana_triton.training.progress import TrainingError
from mana_triton.training.trainer import Trainer
from mana_triton.training.validation import Validation

CONFIG = MANAConfig(
    channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=8, match="cosine", offsets=True
)
FLAGS = {
    "--crop": 8, "--batch": 2, "--stage1": 6, "--stage2": 3, "--stage3": 3, "--lr": 1e-3,
    "--lr2": 1e-3, "--warmup": 2, "--schedule": "cosine", "--clip-grad": 1, "--val-every": 5,
    "--val-frames": 2, "--save-every": 2, "--threads": 1,
}  # fmt: skip
# what `python -m mana_triton.train` does, with the small model
SCRIPT = f"""
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
del sys.argv[1]
from mana_triton import train
from mana_triton.model import MANAConfig
config = {CONFIG!r}
MANAConfig.preset = classmethod(lambda cls, name: config)
train.main()
"""


# the same in float64, where only the order of summation tells processes apart
EXACT_SCRIPT = SCRIPT.replace(
    "train.main()",
    """
from mana_triton.training import sampler, trainer
load, new_model = sampler.Sampler.load, trainer._new_model
sampler.Sampler.load = lambda *args, **more: tuple(x.double() for x in load(*args, **more))
trainer._new_model = lambda *args: new_model(*args).double()
train.main()
""",
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """A decoded clip and a still, as `data.open_clips` leaves them."""
    root = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    index = {}
    for name, kind, T in (("ball", "clip", 12), ("tree", "still", 1)):
        frame = rng.normal(size=(60, 70, 3))
        for axis in (0, 1, 0, 1):
            frame = frame + np.roll(frame, 1, axis) + np.roll(frame, 2, axis)
        frame = np.clip(128 + 6 * frame, 0, 255).astype(np.uint8)
        frames = np.stack([np.roll(frame, 2 * t, 1) for t in range(T)])
        np.save(root / f"{name}.npy", frames)
        entry = {"name": name, "kind": kind, "file": f"{name}.npy", "shape": frames.shape}
        index[name] = entry | {"cuts": []}
    (root / data.INDEX).write_text(json.dumps(index))
    return root


def flags(cache: Path, out: Path, *more: object) -> list[str]:
    paths = ["--data", cache, "--stills", cache, "--val", cache, "--out", out]
    usual = [text for item in FLAGS.items() for text in item]
    return [str(text) for text in (*paths, *usual, *more)]


def options(cache: Path, out: Path, *more: object) -> TrainingOptions:
    return options_of(flags(cache, out, *more))


def run(options: TrainingOptions, config: MANAConfig = CONFIG) -> dict:
    summary = Trainer(options, config).run()
    assert summary
    return summary


def start(cache: Path, out: Path, *more: object, without: str = "av,lpips") -> subprocess.Popen:
    command = [sys.executable, "-c", SCRIPT, without, *flags(cache, out, *more)]
    return subprocess.Popen(
        command, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def stop_after(monkeypatch, iteration: int) -> None:
    """Ctrl-C during that iteration."""
    step = Trainer._step

    def interrupted_step(trainer, *args):
        if trainer.iteration + 1 == iteration:
            os.kill(os.getpid(), signal.SIGINT)
        step(trainer, *args)

    monkeypatch.setattr(Trainer, "_step", interrupted_step)


def state_of(out: Path) -> dict:
    return torch.load(out / "last.pt", weights_only=True)


def optimizer_of(out: Path) -> dict:
    """Of the one iteration whose state is kept."""
    [path] = out.glob("optimizer-*.pt")
    assert path.name == f"optimizer-{state_of(out)['iteration']}.pt"
    return {"optimizer": torch.load(path, weights_only=True)}


def flatten(state: object, name: str = "") -> dict[str, Any]:
    if isinstance(state, dict | list):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {k: v for key, x in items for k, v in flatten(x, f"{name}.{key}").items()}
    return {name: state}


def assert_same_run(actual: Path, expected: Path) -> None:
    """Everything that a run keeps is bit-equal, and so are the exported weights and the log."""
    a, b = ({**state_of(out), **optimizer_of(out), **exported(out)} for out in (actual, expected))
    a, b = flatten(a), flatten(b)
    assert a.keys() == b.keys()
    for name, x in b.items():
        y = a[name]
        same = y == x
        assert same.all() if isinstance(same, torch.Tensor) else same, name
    assert (actual / "log.jsonl").read_text() == (expected / "log.jsonl").read_text()


def exported(out: Path) -> dict:
    """Weights and metadata of the best checkpoint."""
    path = out / "best.safetensors"
    return {"best weights": checkpoint.load(path).state_dict(), "meta": checkpoint.metadata(path)}


@pytest.fixture(scope="module")
def uninterrupted(cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted")
    summary = run(options(cache, out), CONFIG)
    assert summary["finished"] and summary["iterations"] == 12
    return out


# ---- resume


@pytest.mark.parametrize("iteration", [1, 6, 8, 11])
def test_ctrl_c_and_the_same_command_again_change_nothing(
    cache, tmp_path, uninterrupted, monkeypatch, iteration
):
    """In the middle of a stage, at its end, and twice in one run."""
    for stop in (iteration, 11) if iteration < 11 else (11,):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(TrainingError, match=f"stopped at iteration {stop} of 12, saved in"):
                run(options(cache, tmp_path), CONFIG)
        assert state_of(tmp_path)["iteration"] == stop
    assert run(options(cache, tmp_path), CONFIG)["finished"]
    assert_same_run(tmp_path, uninterrupted)


# kill -9 by itself, up to a tenth of a second after a step; every step takes that long
KILLED_SCRIPT = SCRIPT.replace(
    "train.main()",
    """
import os, random, threading, time
from mana_triton.training.trainer import Trainer
step, victim = Trainer._step, int(sys.argv.pop(1))

def slow_step(trainer, *args):
    step(trainer, *args)
    if trainer.iteration == victim:
        threading.Timer(random.uniform(0, 0.1), os.kill, (os.getpid(), 9)).start()
    time.sleep(0.1)

Trainer._step = slow_step
train.main()
""",
)


def test_sigkill_at_random_steps_changes_nothing(cache, tmp_path, uninterrupted):
    for victim in sorted(random.sample(range(1, 11), 2)):
        command = [sys.executable, "-c", KILLED_SCRIPT, "av,lpips", str(victim)]
        done = subprocess.run(
            command + flags(cache, tmp_path), cwd=Path(__file__).parents[2], capture_output=True
        )
        assert done.returncode == -9, done.stderr.decode()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"iteration": 5, "psn')
    assert run(options(cache, tmp_path, "--workers", 2), CONFIG)["finished"]
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("fatal", [5, 6], ids=["optimizer", "weights"])
def test_a_kill_while_saving_leaves_the_last_state(
    cache, tmp_path, uninterrupted, monkeypatch, fatal
):
    save, saves = torch.save, []

    def failing_save(state, path):
        saves.append(path)
        if len(saves) == fatal:
            Path(path).write_bytes(b"half of a checkpoint")
            raise KeyboardInterrupt
        save(state, path)

    monkeypatch.setattr(torch, "save", failing_save)
    with pytest.raises(KeyboardInterrupt):
        run(options(cache, tmp_path), CONFIG)
    assert state_of(tmp_path)["iteration"] == 4
    assert run(options(cache, tmp_path), CONFIG)["finished"]
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_is_not_trained_further(cache, tmp_path, uninterrupted):
    before = state_of(uninterrupted)["iteration"], (uninterrupted / "last.pt").read_bytes()
    summary = run(options(cache, uninterrupted), CONFIG)
    assert summary["finished"] and summary["best_psnr_db"] > 0
    assert before == (12, (uninterrupted / "last.pt").read_bytes())


def test_changed_settings_are_refused_and_named(cache, uninterrupted):
    with pytest.raises(TrainingError) as caught:
        run(options(cache, uninterrupted, "--batch", 3, "--lr", 1e-4), CONFIG)
    message = str(caught.value)
    assert "--batch (was 2, now 3), --lr (was 0.001, now 0.0001); use the same" in message
    assert "\n" not in message
    with pytest.raises(TrainingError, match="other settings: --preset; use"):
        other = MANAConfig(channels=16, encoder_blocks=2, decoder_blocks=1, memory_slots=8)
        run(options(cache, uninterrupted), other)
    # these do not change the result
    free = ("--workers", 2, "--val-every", 3, "--save-every", 5, "--minutes", 9)
    assert run(options(cache, uninterrupted, *free), CONFIG)["finished"]


def test_a_file_that_is_no_saved_run_is_refused(cache, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"last\.pt is not a saved run; use another --out"):
        run(options(cache, tmp_path), CONFIG)


def test_a_missing_optimizer_is_named(cache, tmp_path):
    run(options(cache, tmp_path, "--minutes", 1e-6), CONFIG)
    (tmp_path / "optimizer-1.pt").unlink()
    with pytest.raises(TrainingError, match=r"optimizer-1\.pt must hold .* --init-from .*best"):
        run(options(cache, tmp_path), CONFIG)


def test_moved_initial_weights_are_known_again(cache, tmp_path, uninterrupted):
    """A run goes on where its folders have other names; other weights are refused."""
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    first.write_bytes((uninterrupted / "best.safetensors").read_bytes())
    out = tmp_path / "out"
    run(options(cache, out, "--init-from", first, "--minutes", 1e-6), CONFIG)
    first.rename(second)
    run(options(cache, out, "--init-from", second, "--minutes", 1e-6), CONFIG)
    assert state_of(out)["iteration"] == 2
    checkpoint.save(MANA(CONFIG), first)
    with pytest.raises(TrainingError, match=r"other settings: --init-from \(was"):
        run(options(cache, out, "--init-from", first), CONFIG)


def test_other_data_are_refused(cache, tmp_path, uninterrupted):
    args = options(cache, uninterrupted)
    args = replace(args, stills=())
    with pytest.raises(TrainingError, match=r"other settings: --stills; use"):
        run(args, CONFIG)


# ---- stages


def test_each_stage_trains_its_own_parameters(cache, tmp_path):
    trainer = Trainer(options(cache, tmp_path), CONFIG)
    branch = {"memory", "w_z1.weight", "w_z1.bias"}
    everything = {name for name, _ in trainer.model.named_parameters()}
    for stage, trained in ((1, everything - branch), (2, {"memory"}), (3, everything)):
        trainer.iteration = (0, 6, 9)[stage - 1]
        assert trainer.stage() == (stage, trainer.iteration)
        trainer._start_stage(stage)
        free = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
        assert free == trained
        before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
        trainer._step(*trainer.sampler.load(0), 1e-3)
        after = trainer.model.state_dict()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed and changed <= trained


def launch(processes: int, script: Path, cache: Path, out: Path, *more: object) -> None:
    """Train by `EXACT_SCRIPT`, without validation: whole frames are not in float64."""
    script.write_text(EXACT_SCRIPT)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(processes), str(script), "lpips"]
    usual = flags(cache, out, "--batch", 4, "--backend", "reference", *more)
    del usual[usual.index("--val") : usual.index("--val") + 2]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(command + usual, env=environment, capture_output=True, timeout=250)
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout.decode().splitlines()) == 1, "one process prints the summary"


def test_two_processes_train_as_one(cache, tmp_path):
    """From the start, and going on with another number of them.

    Gradients differ by rounding, some 1e-15; Adam divides them by at least 1e-8, times a rate of
    1e-3 in 12 iterations.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    launch(1, tmp_path / "train.py", cache, one, "--accumulate", 2)
    launch(2, tmp_path / "train.py", cache, two, "--minutes", 1e-6)
    assert state_of(two)["iteration"] == 1
    launch(1, tmp_path / "train.py", cache, two, "--minutes", 1e-6)
    assert state_of(two)["iteration"] == 2
    launch(2, tmp_path / "train.py", cache, two)
    expected, actual = flatten(state_of(one)), flatten(state_of(two))
    assert expected[".iteration"] == actual[".iteration"] == 12
    for name, x in expected.items():
        if isinstance(x, torch.Tensor):
            error = (actual[name] - x).abs().max()
            assert error <= 12 * 1e-3 * 1e-15 / 1e-8, f"{name}: {error}"


def test_a_batch_that_cannot_be_split_is_refused(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(
        training, "Processes", lambda: SimpleNamespace(rank=0, local_rank=0, count=3)
    )
    with pytest.raises(TrainingError, match="processes, got 2, 1 and 3; change"):
        Trainer(options(cache, tmp_path), CONFIG)


def test_gradients_are_clipped(cache, tmp_path):
    norms = []
    for limit in (0, 1e-3):
        args = options(cache, tmp_path, "--clip-grad", limit)
        trainer = Trainer(args, CONFIG)
        trainer._start_stage(1)
        trainer._step(*trainer.sampler.load(0), 1e-3)
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(gradients).item())
    assert norms[0] > 1e-2
    # the norm is divided by 1e-6 more than itself, and all is rounded a few times
    eps = torch.finfo(torch.float32).eps
    assert norms[1] == pytest.approx(1e-3, rel=1e-6 / norms[0] + 16 * eps)


def test_adam_has_the_betas_of_the_command(cache, tmp_path):
    trainer = Trainer(options(cache, tmp_path, "--betas", 0.8, 0.95), CONFIG)
    trainer._start_stage(1)
    assert [group["betas"] for group in trainer.optimizer.param_groups] == [(0.8, 0.95)]


def test_the_average_of_a_young_run_forgets(cache, tmp_path):
    trainer = Trainer(options(cache, tmp_path, "--ema", 0.999, "--warmup", 0), CONFIG)
    trainer._start_stage(1)
    expected = [p.detach().clone() for p in trainer.model.parameters()]
    for n in (1, 2, 3):
        trainer._step(*trainer.sampler.load(n), 1e-3)
        decay = (1 + n) / (10 + n)
        pairs = zip(expected, trainer.model.parameters(), strict=True)
        expected = [decay * a + (1 - decay) * p.detach() for a, p in pairs]
    for actual, x in zip(trainer.ema.parameters(), expected, strict=True):
        torch.testing.assert_close(actual.detach(), x)


def test_the_average_of_equal_steps_keeps_a_power_of_its_decay(cache, tmp_path):
    """Far into a run: after n steps without change the first weights keep decay^n."""
    trainer = Trainer(options(cache, tmp_path, "--ema", 0.9, "--stage1", 2000), CONFIG)
    trainer._start_stage(1)
    trainer.iteration = 1000
    with torch.no_grad():
        for p in trainer.ema.parameters():
            p += 1
    for n in (1, 2, 3):
        trainer._step(*trainer.sampler.load(n), rate=0.0)
    for average, p in zip(trainer.ema.parameters(), trainer.model.parameters(), strict=True):
        # subtracting equal weights loses the last bits of the larger one
        error = ((average - p) - 0.9**3).abs().max()
        assert error <= 16 * torch.finfo(torch.float32).eps * p.abs().max().clamp(min=1)


def test_an_infinite_sigma_is_left_alone(cache, tmp_path):
    """It was stepped to a number that is none, and its average was none at once."""
    config = MANAConfig(**{**vars(CONFIG), "sigma": float("inf")})
    assert run(options(cache, tmp_path), config)["finished"]
    assert checkpoint.load(tmp_path / "best.safetensors").sigma == float("inf")


def test_a_stage_without_anything_to_train_is_refused(cache, tmp_path):
    config = MANAConfig(**{**vars(CONFIG), "memory_slots": 0})
    with pytest.raises(TrainingError, match="has none; pass --stage2 0"):
        run(options(cache, tmp_path, "--stage1", 0), config)
    assert run(options(cache, tmp_path, "--stage2", 0), config)["finished"]


def test_rates_warm_up_and_follow_the_cosine(cache, tmp_path):
    trainer = Trainer(options(cache, tmp_path, "--stage1", 101, "--warmup", 4), CONFIG)

    def rate(iteration: int) -> float:
        trainer.iteration = iteration
        return trainer._rate(*trainer.stage())

    assert rate(0) == pytest.approx(1e-3 / 4)
    assert rate(1) == pytest.approx(1e-3 / 2, rel=1e-3)
    assert rate(50) == pytest.approx(1e-3 * (0.01 + 0.99 / 2), rel=0.02)
    assert rate(100) == pytest.approx(1e-5, rel=0.05)
    assert rate(101) == pytest.approx(1e-3 / 4)
    trainer.options = replace(trainer.options, schedule="constant")
    assert rate(100) == 1e-3


@pytest.mark.parametrize("stage", [1, 2])
def test_a_batch_in_parts_has_the_gradient_of_the_whole(cache, tmp_path, monkeypatch, stage):
    """In float64, where nothing but the order of summation differs."""
    gradients = []
    for parts in (1, 4):
        args = options(cache, tmp_path, "--batch", 8, "--accumulate", parts, "--ema", 0)
        trainer = Trainer(args, CONFIG)
        trainer.model.double()
        trainer._start_stage(stage)
        lr, hr = trainer.sampler.load(0)
        trainer._step(lr.double(), hr.double(), 1e-3)
        gradients.append([p.grad for p in trainer.model.parameters() if p.requires_grad])
    for whole, summed in zip(*gradients, strict=True):
        assert whole is not None or summed is None
        if whole is not None:
            torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-12)


def test_training_learns_and_the_average_follows(cache, tmp_path):
    """A few steps beat the initial weights on the training data themselves."""
    more = ("--stage1", 80, "--stage2", 0, "--stage3", 0, "--val-every", 1000, "--save-every", 1000)
    args = options(cache, tmp_path, *more, "--schedule", "constant", "--ema", 0.9)
    first = Trainer(args, CONFIG)
    assert first.validation
    before = first.validation.measure(first.model, first.device)["psnr_db"]
    summary = run(args, CONFIG)
    assert summary["best_psnr_db"] > before + 0.3
    state = state_of(tmp_path)
    distance = (state["ema"]["conv_last.weight"] - state["model"]["conv_last.weight"]).abs().max()
    assert 0 < distance < 0.01
    weights = checkpoint.load(tmp_path / "best.safetensors").state_dict()
    assert all(torch.equal(weights[name], x.half().float()) for name, x in state["ema"].items())
    assert checkpoint.metadata(tmp_path / "best.safetensors")["iteration"] == "80"


def test_a_diverging_run_stops_and_keeps_the_last_good_state(cache, tmp_path, monkeypatch):
    step = Trainer._step

    def diverging(trainer, *args):
        step(trainer, *args)
        if trainer.iteration == 5:
            with torch.no_grad():
                trainer.model.conv_last.weight.fill_(float("nan"))

    monkeypatch.setattr(Trainer, "_step", diverging)
    with pytest.raises(TrainingError, match="no longer finite at iteration 5; use another --out"):
        run(options(cache, tmp_path), CONFIG)
    assert state_of(tmp_path)["iteration"] == 4


def test_a_network_can_learn_one_clip_by_heart(tmp_path):
    """One sample without change, memory and all: 500 steps reach 57 dB and more."""
    rng = np.random.default_rng(0)
    frame = rng.normal(size=(32, 32, 3))
    for axis in (0, 1, 0, 1):
        frame = frame + np.roll(frame, 1, axis) + np.roll(frame, 2, axis)
    frame = np.clip(128 + 6 * frame, 0, 255).astype(np.uint8)
    frames = np.stack([np.roll(frame, 2 * t, 1) for t in range(7)])
    np.save(tmp_path / "one.npy", frames)
    entry = {"name": "one", "kind": "clip", "file": "one.npy", "shape": frames.shape, "cuts": []}
    (tmp_path / data.INDEX).write_text(json.dumps({"one": entry}))
    more = ["--batch", 1, "--stage1", 0, "--stage2", 0, "--stage3", 500, "--lr3", 2e-3]
    args = options(tmp_path, tmp_path / "out", *more, "--betas", 0.9, 0.99, "--warmup", 20)
    args = replace(args, stills=(), val=())
    config = MANAConfig(
        channels=64, encoder_blocks=1, decoder_blocks=2, memory_slots=8,
        match="cosine", offsets=True,
    )  # fmt: skip
    trainer = Trainer(args, config)
    trainer._start_stage(3)
    lr, hr = trainer.sampler.load(0)
    for _ in range(500):
        trainer._step(lr, hr, trainer._rate(3, 0))
    with torch.no_grad():
        mse = (trainer.model(lr) - hr).square().mean()
    assert -10 * mse.log10() > 45


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(cache, tmp_path, monkeypatch):
    forward, losses = StageLoss.forward, []

    def failing(*args):
        losses.append(forward(*args))
        return losses[-1] * (float("nan") if len(losses) == 6 else 1)

    monkeypatch.setattr(StageLoss, "forward", failing)
    with pytest.raises(TrainingError, match="the loss is nan at iteration 6; use another --out"):
        run(options(cache, tmp_path, "--save-every", 5), CONFIG)
    state = state_of(tmp_path)
    assert state["iteration"] == 5
    assert all(x.isfinite().all() for part in ("model", "ema") for x in state[part].values())
    monkeypatch.undo()
    assert run(options(cache, tmp_path), CONFIG)["finished"]


# ---- validation and outputs


class Nearest(torch.nn.Module):
    """Repeats pixels of the first frame of the window, so that a lone center frame is visible."""

    def forward(self, frames):
        return frames[:, 0].repeat_interleave(4, -1).repeat_interleave(4, -2)


def test_validation_scores_whole_frames(cache):
    clips = data.open_clips([cache], Path("unused"))
    frames = clips[0].frames[:, :, :68]
    scores = Validation(clips, 3, "matlab_bicubic").measure(Nearest(), torch.device("cpu"))
    lr = degrade(torch.from_numpy(np.array(frames))).numpy()
    expected = {"psnr_db": [], "center_only_psnr_db": [], "bicubic_psnr_db": []}
    for t, before in ((0, 3), (6, 3), (11, 8)):  # mirrored at the beginning
        first = lr[before]
        enlarged = upscale_bicubic(torch.from_numpy(lr[t])).numpy()
        for name, picture in (
            ("psnr_db", first.repeat(4, 0).repeat(4, 1)),
            ("center_only_psnr_db", lr[t].repeat(4, 0).repeat(4, 1)),
            ("bicubic_psnr_db", enlarged),
        ):
            expected[name].append(psnr(picture, frames[t]))
    for name, values in expected.items():
        assert scores[name] == pytest.approx(np.mean(values), abs=1e-9), name


def test_the_log_holds_validations_and_losses(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "LOG_EVERY", 4)
    run(options(cache, tmp_path), CONFIG)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["iteration"], "loss" in e) for e in entries] == [
        (4, True), (5, False), (8, True), (10, False), (12, True), (12, False)
    ]  # fmt: skip
    assert [e["stage"] for e in entries if "loss" in e] == [1, 2, 3]
    assert {"psnr_db", "center_only_psnr_db", "bicubic_psnr_db"} <= entries[-1].keys()
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_other_recipes_are_refused(cache, tmp_path, monkeypatch):
    """A run that goes on with other degradations of the same clips has other samples."""
    some = [Recipe(kernel="area"), Recipe(noise=2.0)]
    args = options(cache, tmp_path, "--degradation", "real", "--minutes", 1e-6)
    args = replace(args, val=())
    monkeypatch.setattr(training, "training_recipes", lambda name: some[:1])
    run(args, CONFIG)
    run(args, CONFIG)
    monkeypatch.setattr(training, "training_recipes", lambda name: some[1:])
    with pytest.raises(TrainingError, match="other settings: --data, --stills; use"):
        run(args, CONFIG)


def test_every_validation_leaves_a_picture(cache, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(options(cache, tmp_path), CONFIG)
    events = EventAccumulator(str(tmp_path)).Reload()
    [name] = events.Tags()["images"]
    pictures = events.Images(name)
    assert [(p.step, p.height, p.width) for p in pictures] == [
        (n, 60, 3 * 68) for n in (5, 10, 12)
    ]  # fmt: skip


def test_the_average_is_what_is_validated(cache, tmp_path, monkeypatch):
    """As a file of float16 holds it."""
    measure, seen = Validation.measure, []

    def noting(validation, model, device):
        seen.append(copy.deepcopy(model.state_dict()))
        return measure(validation, model, device)

    monkeypatch.setattr(Validation, "measure", noting)
    run(options(cache, tmp_path), CONFIG)
    state = state_of(tmp_path)
    for name, x in state["ema"].items():
        assert torch.equal(seen[-1][name], x.half().float()), name
    raw = state["model"]["conv_last.weight"].half().float()
    assert not torch.equal(seen[-1]["conv_last.weight"], raw)


def test_minutes_end_in_a_validated_checkpoint(cache, tmp_path):
    summary = run(options(cache, tmp_path, "--minutes", 1e-6), CONFIG)
    assert (summary["iterations"], summary["finished"]) == (1, False)
    assert summary["best_psnr_db"] > 0 and state_of(tmp_path)["iteration"] == 1
    assert isinstance(checkpoint.load(summary["weights"]), MANA)
    assert run(options(cache, tmp_path), CONFIG)["finished"]


def test_without_validation_the_last_average_is_exported(cache, tmp_path):
    args = options(cache, tmp_path, "--ema", 0)
    args = replace(args, val=())
    summary = run(args, CONFIG)
    assert summary["best_psnr_db"] is None and summary["best_iteration"] == 12
    weights = checkpoint.load(tmp_path / "best.safetensors").state_dict()
    for name, x in state_of(tmp_path)["model"].items():
        assert torch.equal(weights[name], x.half().float())


def test_init_from_starts_from_a_file(cache, tmp_path, uninterrupted):
    weights = uninterrupted / "best.safetensors"
    trainer = Trainer(options(cache, tmp_path, "--init-from", weights), CONFIG)
    loaded = checkpoint.load(weights).state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in trainer.model.state_dict().items())
    with pytest.raises(TrainingError, match="must hold a model of --preset tiny"):
        Trainer(options(cache, tmp_path, "--init-from", "tiny"), CONFIG)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_network_trains_as_well(cache, tmp_path):
    losses = []
    for more in ([], ["--compile"]):
        args = options(cache, tmp_path / str(len(losses)), "--schedule", "constant", *more)
        trainer = Trainer(args, CONFIG)
        trainer._start_stage(1)
        for n in range(3):
            trainer._step(*trainer.sampler.load(n), 1e-3)
        losses.append(torch.stack(trainer.losses))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=0)


def test_bf16_iterations_keep_fp32_weights(cache, tmp_path):
    args = options(cache, tmp_path, "--precision", "bf16", "--stage3", 1)
    assert run(args, CONFIG)["finished"]
    assert {x.dtype for x in state_of(tmp_path)["model"].values()} == {torch.float32}


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_iterations_run_in_their_precision(cache, tmp_path, precision, dtype):
    trainer = Trainer(options(cache, tmp_path, "--precision", precision), CONFIG)
    trainer._start_stage(1)
    seen = set()
    trainer.model.conv_first.register_forward_hook(lambda layer, x, y: seen.add(y.dtype))
    trainer._step(*trainer.sampler.load(0), 1e-3)
    assert seen == {dtype}


def test_training_on_degraded_video(cache, tmp_path):
    """Both the samples and the validation come from the cache of degraded clips."""
    more = ("--degradation", "real", "--cache", tmp_path / "cache")
    summary = run(options(cache, tmp_path / "real", *more), CONFIG)
    assert summary["finished"]
    clean = Validation(data.open_clips([cache], cache), 2, "matlab_bicubic")
    assert summary["bicubic_psnr_db"] < clean.bicubic_psnr - 0.1
    assert len(list((tmp_path / "cache" / "real").glob("*.npy"))) == 4 + 4 + 1
    with pytest.raises(TrainingError, match=r"--degradation \(was real, now matlab_bicubic\)"):
        run(options(cache, tmp_path / "real"), CONFIG)


# ---- the command


def test_the_command_prints_one_json_line(cache, tmp_path):
    """Without the packages that a training machine may lack; not a terminal: plain lines."""
    without = "av,lpips,skimage,tensorboard,torch.utils.tensorboard"
    process = start(cache, tmp_path, without=without)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 0, stderr.decode()
    [line] = stdout.decode().splitlines()
    summary = json.loads(line)
    assert summary["iterations"] == 12 and Path(summary["weights"]).is_file()
    assert {"best_psnr_db", "bicubic_psnr_db", "center_only_psnr_db", "seconds"} <= summary.keys()
    assert "validation" in stderr.decode() and "\x1b" not in stderr.decode()


def test_failures_are_one_line_and_exit_1(tmp_path, monkeypatch, capsys):
    command = ["train", "--data", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as caught:
        train.main()
    assert str(caught.value).startswith("error: ") and "must exist" in str(caught.value)
    assert "\n" not in str(caught.value)
    if not torch.cuda.is_available():
        monkeypatch.setattr(sys, "argv", [*command, "--device", "cuda"])
        with pytest.raises(SystemExit, match="error: --device cuda needs"):
            train.main()


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--data", "x", "--crop", "0"],
        ["--data", "x", "--batch", "6", "--accumulate", "4"],
        ["--data", "x", "--ema", "1"],
        ["--data", "x", "--clip-grad", "-1"],
        ["--data", "x", "--clip-grad", "nan"],
        ["--data", "x", "--nope"],
    ],
)
def test_wrong_usage_exits_2(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        options_of(argv)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err
