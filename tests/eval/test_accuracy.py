"""The accuracy gate: it lets the fast paths through, and stops what is wrong."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

from eval import accuracy, run
from mana_triton import export, load
from mana_triton.model import MANA, MANAConfig

CPU = torch.device("cpu")
ONNX = "ONNX file, ONNX Runtime"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips() -> list[accuracy.Clip]:
    """Two frames of a part of the demo clip, large enough that far keys are left out."""
    frames = accuracy.bench.demo_frames((180, 320), 2)[:, :150, :182]
    return [accuracy.clip_of("demo", frames)]


@pytest.fixture(scope="module")
def tiny() -> MANA:
    return load("tiny")


def check(clips, model: MANA, *names: str) -> dict[str, accuracy.Row]:
    chosen = {k: x for k, x in accuracy.paths(model, CPU).items() if not names or k in names}
    chosen.pop(ONNX, None)  # its own test is that of the export
    return {row["what"]: row for row in accuracy.check(clips, model, chosen)}


def test_clips_are_made_as_in_an_evaluation(clips):
    clip = clips[0]
    assert clip.originals.shape == (2, 148, 180, 3)
    assert clip.lr.shape == (2, 3, 37, 45)
    assert torch.equal(clip.lr * 255, (clip.lr * 255).round())


def test_reference_is_the_network(clips, tiny):
    """The same frames as the network gives for each window, all pairs in float64."""
    clip = clips[0]
    lr = clip.lr[:, :, :9, :11].double()
    windows = torch.stack([lr[[1, 0, 1, 0, 1, 0, 1]], lr[[0, 1, 0, 1, 0, 1, 0]]])
    exact = load("tiny").double()
    eager = load("tiny")
    with torch.no_grad():
        truth, plain = (
            model(x, backend="reference").clamp(0, 1)
            for model, x in ((exact, windows), (eager, windows.float()))
        )
    actual = accuracy.reference_frames(tiny, lr.float())
    assert_as_accurate("reference", actual, plain, truth, torch.float32)


@pytest.mark.timeout(900)
def test_every_path_meets_the_gate(clips, tiny):
    rows = check(clips, tiny)
    assert {row["dtype"] for row in rows.values()} == {"fp32", "bf16", "fp16"}
    for name, row in rows.items():
        assert row["gate"] == "met", row
        assert row["psnr_db"] >= accuracy.LEAST[row["dtype"]], name
        assert abs(row["moved_db"]) < accuracy.MOST, name
    # half precision is another computation, not the same one under another name
    assert rows["bf16"]["psnr_db"] < rows["fp16"]["psnr_db"] < rows["fp32"]["psnr_db"]


@pytest.mark.parametrize("harm", ["narrow attention", "noise in the decoder"])
def test_other_frames_are_stopped(clips, tiny, harm):
    other = load("tiny")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if harm == "narrow attention":
            other.sigma.mul_(0.5)
        else:
            for x in other.decoder.parameters():
                x.add_(torch.randn(x.shape, generator=generator) * x.std(), alpha=0.02)
    paths = {"fp32": accuracy.paths(other, CPU)["fp32"]}
    (row,) = accuracy.check(clips, tiny, paths)
    assert row["gate"] == "missed" and row["psnr_db"] < 80
    assert accuracy.missed([row]) == ["fp32"]


@pytest.mark.parametrize(
    ("precision", "step", "gate"),
    [
        ("fp32", 10 ** (-81 / 20), "met"),
        ("fp32", 10 ** (-79 / 20), "missed"),
        ("bf16", 10 ** (-51 / 20), "met"),
        ("bf16", 10 ** (-49 / 20), "missed"),
        ("fp16", 0.0, "met"),
        ("fp32", float("nan"), "missed"),
    ],
)
def test_gate(clips, tiny, monkeypatch, precision, step, gate):
    """One frame of two is off by the same in every pixel; the originals have no say here."""
    monkeypatch.setattr(accuracy, "MOST", 99.0)

    def off(lr: Tensor) -> Tensor:
        frames = accuracy.reference_frames(tiny, lr)
        frames[1] += step
        return frames

    (row,) = accuracy.check(clips, tiny, {"path": accuracy.Fast(precision, off)})
    assert row["gate"] == gate
    json.dumps(row, allow_nan=False)


def test_a_move_against_the_originals_is_stopped(clips, tiny, monkeypatch):
    """Close to the reference, and yet the evaluation would say something else."""
    monkeypatch.setattr(accuracy, "LEAST", {"bf16": 20.0})

    def darker(lr: Tensor) -> Tensor:
        return accuracy.reference_frames(tiny, lr) * 0.99

    (row,) = accuracy.check(clips, tiny, {"path": accuracy.Fast("bf16", darker)})
    assert row["psnr_db"] > 20 and abs(row["moved_db"]) > accuracy.MOST
    assert row["gate"] == "missed"


@pytest.mark.skipif(
    any(find_spec(name) is None for name in export.NEEDED),
    reason=f"needs {', '.join(export.NEEDED)}",
)
@pytest.mark.timeout(900)
def test_exported_frames_meet_the_gate(clips):
    torch.manual_seed(0)
    model = MANA(
        MANAConfig(channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=6, match="cosine")
    ).eval()
    torch.nn.init.normal_(model.w_z.weight, std=0.3)
    clip = clips[0]._replace(lr=clips[0].lr[..., :12], originals=clips[0].originals[:, :, :48])
    (row,) = accuracy.check([clip], model, {ONNX: accuracy.paths(model, CPU)[ONNX]})
    assert row["gate"] == "met" and row["psnr_db"] > 100


def test_what_cannot_run_is_said(clips, tiny, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    path = accuracy.paths(tiny, CPU)[ONNX]
    (row,) = accuracy.check(clips, tiny, {ONNX: path})
    assert row["gate"] is None and row["note"].startswith("not run: ONNX files need onnx")


def test_bench_says_so_and_fails(monkeypatch, capsys):
    rows = [{"what": "bf16", "gate": "missed"}, {"what": "fp32", "gate": "met"}]
    monkeypatch.setattr(run, "benchmark", lambda _: {"rows": [], "accuracy": rows})
    monkeypatch.setattr(sys, "argv", ["run.py", "--bench"])
    with pytest.raises(SystemExit, match=r"error: the accuracy gate is missed by: bf16$"):
        run.main()
    assert json.loads(capsys.readouterr().out)["accuracy"] == rows


def test_command(clips, monkeypatch, capsys):
    monkeypatch.setattr(accuracy, "demo", lambda frames: clips)
    monkeypatch.setattr(sys, "argv", ["accuracy.py"])
    paths = accuracy.paths

    def few(model: MANA, device: torch.device) -> dict[str, accuracy.Fast]:
        return {"bf16": paths(model, device)["bf16"]}

    monkeypatch.setattr(accuracy, "paths", few)
    accuracy.main()
    text = capsys.readouterr().out
    assert "met" in text
    line = json.loads(text.splitlines()[-1])
    assert [(row["what"], row["gate"]) for row in line["rows"]] == [("bf16", "met")]
    monkeypatch.setattr(accuracy, "LEAST", {"bf16": 120.0})
    with pytest.raises(SystemExit, match="error: the accuracy gate is missed by: bf16"):
        accuracy.main()
    assert "missed" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--weights", "none"])
    with pytest.raises(SystemExit, match="error: weights must be a shipped name"):
        accuracy.main()
