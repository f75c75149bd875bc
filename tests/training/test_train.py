"""Training: the stages, exact resume after any kind of stop, validation, what is written."""

import copy
import json
import os
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
from mana_triton.training.degradation import degrade
from mana_triton.training.losses import StageLoss
from mana_triton.training.options import TrainingOptions
from mana_triton.training.progress import TrainingError
from mana_triton.training.sampler import Sampler
from mana_triton.training.trainer import Trainer
from mana_triton.training.validation import Validation

ROOT = Path(__file__).parents[2]
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

FLOAT64 = """
from mana_triton.training import sampler, trainer
load, new_model = sampler.Sampler.load, trainer._new_model
sampler.Sampler.load = lambda *args, **more: tuple(x.double() for x in load(*args, **more))
trainer._new_model = lambda *args: new_model(*args).double()
"""


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
    summary = run(options(cache, out))
    assert summary["finished"] and summary["iterations"] == 12
    return out


# ---- resume


@pytest.mark.parametrize("iteration", [1, 6, 8])
def test_resume_continues_after_ctrl_c(cache, tmp_path, uninterrupted, monkeypatch, iteration):
    """In the middle of a stage, at its end, and twice in one run."""
    for stop in (iteration, 11):
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(TrainingError, match=f"stopped at iteration {stop} of 12, saved in"):
                run(options(cache, tmp_path))
        assert state_of(tmp_path)["iteration"] == stop
    assert run(options(cache, tmp_path))["finished"]
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_resume_continues_after_sigkill(cache, tmp_path, uninterrupted):
    """Up to a tenth of a second after a random step; every step takes that long."""
    script = SCRIPT.replace(
        "train.main()",
        """
import os, random, threading, time
from mana_triton.training.trainer import Trainer
step, victim = Trainer._step, random.randrange(1, 11)

def slow_step(trainer, *args):
    step(trainer, *args)
    if trainer.iteration == victim:
        threading.Timer(random.uniform(0, 0.1), os.kill, (os.getpid(), 9)).start()
    time.sleep(0.1)

Trainer._step = slow_step
train.main()
""",
    )
    command = [sys.executable, "-c", script, "av,lpips", *flags(cache, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr.decode()
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"iteration": 5, "psn')
    assert run(options(cache, tmp_path, "--workers", 2))["finished"]
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("fatal", [5, 6], ids=["optimizer", "weights"])
def test_a_kill_while_saving_keeps_the_last_state(
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
        run(options(cache, tmp_path))
    assert state_of(tmp_path)["iteration"] == 4
    assert run(options(cache, tmp_path))["finished"]
    assert_same_run(tmp_path, uninterrupted)


def test_changed_settings_are_refused_and_named(cache, uninterrupted):
    with pytest.raises(TrainingError) as caught:
        run(options(cache, uninterrupted, "--batch", 3, "--lr", 1e-4))
    message = str(caught.value)
    assert "--batch (was 2, now 3), --lr (was 0.001, now 0.0001); use the same" in message
    assert "\n" not in message
    with pytest.raises(TrainingError, match="other settings: --preset; use"):
        other = MANAConfig(channels=16, encoder_blocks=2, decoder_blocks=1, memory_slots=8)
        run(options(cache, uninterrupted), other)
    with pytest.raises(TrainingError, match=r"other settings: --stills; use"):
        run(replace(options(cache, uninterrupted), stills=()))
    # these do not change the result, and a finished run is not trained further
    before = (uninterrupted / "last.pt").read_bytes()
    free = ("--workers", 2, "--val-every", 3, "--save-every", 5, "--minutes", 9)
    assert run(options(cache, uninterrupted, *free))["finished"]
    assert (uninterrupted / "last.pt").read_bytes() == before


def test_a_file_that_is_no_saved_run_is_refused(cache, tmp_path):
    (tmp_path / "last.pt").write_bytes(b"nothing")
    with pytest.raises(TrainingError, match=r"last\.pt is not a saved run; use another --out"):
        run(options(cache, tmp_path))


def test_a_missing_optimizer_is_named(cache, tmp_path):
    run(options(cache, tmp_path, "--minutes", 1e-6))
    (tmp_path / "optimizer-1.pt").unlink()
    with pytest.raises(TrainingError, match=r"optimizer-1\.pt must hold .* --init-from .*best"):
        run(options(cache, tmp_path))


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


@pytest.mark.slow
def test_two_processes_train_as_one(cache, tmp_path, monkeypatch):
    """One process starts the run and two go on; in float64, where only rounding differs.

    Gradients differ by some 1e-15; Adam divides them by at least 1e-8, times a rate of 1e-3 in 12
    iterations. There is no validation: whole frames are not in float64.
    """
    script = SCRIPT.replace("train.main()", FLOAT64 + "train.main()")
    (tmp_path / "train.py").write_text(script)
    one, two = (
        replace(options(cache, tmp_path / x, "--batch", 4, "--backend", "reference"), val=())
        for x in ("one", "two")
    )
    with monkeypatch.context() as patch:
        load, new_model = Sampler.load, training._new_model
        patch.setattr(Sampler, "load", lambda *a, **b: tuple(x.double() for x in load(*a, **b)))
        patch.setattr(training, "_new_model", lambda *args: new_model(*args).double())
        assert run(replace(one, accumulate=2))["finished"]
        assert run(replace(two, minutes=1e-6))["iterations"] == 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    command += ["2", str(tmp_path / "train.py"), "lpips"]
    command += flags(cache, tmp_path / "two", "--batch", 4, "--backend", "reference")
    i = command.index("--val")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command[:i] + command[i + 2 :], env=environment, capture_output=True, timeout=250
    )
    assert done.returncode == 0, done.stderr.decode()
    assert len(done.stdout.decode().splitlines()) == 1, "one process prints the summary"
    expected, actual = (flatten(state_of(tmp_path / x)) for x in ("one", "two"))
    assert expected[".iteration"] == actual[".iteration"] == 12
    for name, x in expected.items():
        if isinstance(x, torch.Tensor):
            error = (actual[name] - x).abs().max()
            assert error <= 12 * 1e-3 * 1e-15 / 1e-8, f"{name}: {error}"


def test_a_batch_that_cannot_be_split_is_refused(cache, tmp_path, monkeypatch):
    three = SimpleNamespace(rank=0, local_rank=0, count=3)
    monkeypatch.setattr(training, "Processes", lambda: three)
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


def test_the_average_forgets_its_start_faster_at_first(cache, tmp_path):
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


def test_an_infinite_sigma_is_left_alone(cache, tmp_path):
    """Neither stepped nor averaged, which would make it NaN. Without --val the last is exported."""
    config = MANAConfig(**{**vars(CONFIG), "sigma": float("inf")})
    summary = run(replace(options(cache, tmp_path), val=()), config)
    assert summary["best_psnr_db"] is None and summary["best_iteration"] == 12
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


def test_a_batch_in_parts_has_the_gradient_of_the_whole(cache, tmp_path):
    """In float64, where nothing but the order of summation differs."""
    gradients = []
    for parts in (1, 4):
        args = options(cache, tmp_path, "--batch", 8, "--accumulate", parts, "--ema", 0)
        trainer = Trainer(args, CONFIG)
        trainer.model.double()
        trainer._start_stage(1)
        lr, hr = trainer.sampler.load(0)
        trainer._step(lr.double(), hr.double(), 1e-3)
        gradients.append([p.grad for p in trainer.model.parameters() if p.requires_grad])
    for whole, summed in zip(*gradients, strict=True):
        assert whole is not None or summed is None
        if whole is not None:
            torch.testing.assert_close(summed, whole, rtol=1e-9, atol=1e-12)


def test_training_learns_and_the_average_follows(cache, tmp_path):
    """A few steps beat the initial weights on the training data themselves."""
    more = ("--stage1", 60, "--stage2", 0, "--stage3", 0, "--val-every", 1000, "--save-every", 1000)
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
    assert checkpoint.metadata(tmp_path / "best.safetensors")["iteration"] == "60"


def test_a_nan_loss_stops_and_keeps_the_last_good_state(cache, tmp_path, monkeypatch):
    forward, losses = StageLoss.forward, []

    def failing(*args):
        losses.append(forward(*args))
        return losses[-1] * (float("nan") if len(losses) == 6 else 1)

    monkeypatch.setattr(StageLoss, "forward", failing)
    with pytest.raises(TrainingError, match="the loss is nan at iteration 6; use another --out"):
        run(options(cache, tmp_path, "--save-every", 5))
    state = state_of(tmp_path)
    assert state["iteration"] == 5
    assert all(x.isfinite().all() for part in ("model", "ema") for x in state[part].values())
    monkeypatch.undo()
    assert run(options(cache, tmp_path))["finished"]


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
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setattr(training, "LOG_EVERY", 4)
    run(options(cache, tmp_path))
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(e["iteration"], "loss" in e) for e in entries] == [
        (4, True), (5, False), (8, True), (10, False), (12, True), (12, False)
    ]  # fmt: skip
    assert [e["stage"] for e in entries if "loss" in e] == [1, 2, 3]
    assert {"psnr_db", "center_only_psnr_db", "bicubic_psnr_db"} <= entries[-1].keys()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert {"loss", "rate", "sigma", "psnr_db"} <= set(events.Tags()["scalars"])
    [name] = events.Tags()["images"]
    shown = [(p.step, p.height, p.width) for p in events.Images(name)]
    assert shown == [(n, 60, 3 * 68) for n in (5, 10, 12)]


def test_the_average_is_what_is_validated(cache, tmp_path, monkeypatch):
    """As a file of float16 holds it."""
    measure, seen = Validation.measure, []

    def noting(validation, model, device):
        seen.append(copy.deepcopy(model.state_dict()))
        return measure(validation, model, device)

    monkeypatch.setattr(Validation, "measure", noting)
    run(options(cache, tmp_path))
    state = state_of(tmp_path)
    for name, x in state["ema"].items():
        assert torch.equal(seen[-1][name], x.half().float()), name
    raw = state["model"]["conv_last.weight"].half().float()
    assert not torch.equal(seen[-1]["conv_last.weight"], raw)


def test_minutes_end_in_a_validated_checkpoint(cache, tmp_path):
    summary = run(options(cache, tmp_path, "--minutes", 1e-6))
    assert (summary["iterations"], summary["finished"]) == (1, False)
    assert summary["best_psnr_db"] > 0 and state_of(tmp_path)["iteration"] == 1
    assert isinstance(checkpoint.load(summary["weights"]), MANA)
    assert run(options(cache, tmp_path))["finished"]


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
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}


def test_training_on_degraded_video(cache, tmp_path):
    """Both the samples and the validation come from the cache of degraded clips."""
    more = ("--degradation", "real", "--cache", tmp_path / "cache")
    summary = run(options(cache, tmp_path / "real", *more))
    assert summary["finished"]
    clean = Validation(data.open_clips([cache], cache), 2, "matlab_bicubic")
    assert summary["bicubic_psnr_db"] < clean.bicubic_psnr - 0.1
    assert len(list((tmp_path / "cache" / "real").glob("*.npy"))) == 4 + 4 + 1
    with pytest.raises(TrainingError, match=r"--degradation \(was real, now matlab_bicubic\)"):
        run(options(cache, tmp_path / "real"))


# ---- the command


def test_the_command_prints_one_json_line(cache, tmp_path):
    """Without the packages that a training machine may lack; not a terminal: plain lines."""
    without = "av,lpips,skimage,tensorboard,torch.utils.tensorboard"
    command = [sys.executable, "-c", SCRIPT, without, *flags(cache, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [line] = done.stdout.splitlines()
    summary = json.loads(line)
    assert summary["iterations"] == 12 and Path(summary["weights"]).is_file()
    assert {"best_psnr_db", "bicubic_psnr_db", "center_only_psnr_db", "seconds"} <= summary.keys()
    assert "validation" in done.stderr and "\x1b" not in done.stderr


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
