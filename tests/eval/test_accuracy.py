"""The accuracy gate passes the fast paths and stops wrong ones."""

import json
import sys
from importlib.util import find_spec

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

from eval import accuracy, bench
from mana_triton import export, load
from mana_triton.model import MANA, MANAConfig

CPU = torch.device("cpu")
ONNX = "ONNX file, ONNX Runtime"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def clips() -> list[accuracy.Clip]:
    """Two frames of a part of the demo clip, large enough that far keys are skipped."""
    frames = bench.demo_frames((180, 320), 2)[:, :118, :142]
    return [accuracy.clip_of("demo", frames)]


@pytest.fixture(scope="module")
def tiny() -> MANA:
    return load("tiny")


@pytest.fixture(scope="module")
def reference(clips, tiny) -> Tensor:
    return accuracy.reference_frames(tiny, clips[0].lr)


def test_clips_are_made_as_in_an_evaluation(clips):
    clip = clips[0]
    assert clip.originals.shape == (2, 116, 140, 3)
    assert clip.lr.shape == (2, 3, 29, 35)
    assert torch.equal(clip.lr * 255, (clip.lr * 255).round())


def test_reference_is_the_network(clips, tiny):
    """The same frames as the network gives for each window, all pairs in float64."""
    lr = clips[0].lr[:, :, :9, :11].double()
    windows = torch.stack([lr[[1, 0, 1, 0, 1, 0, 1]], lr[[0, 1, 0, 1, 0, 1, 0]]])
    with torch.no_grad():
        truth = load("tiny").double()(windows, backend="reference").clamp(0, 1)
        plain = tiny(windows.float(), backend="reference").clamp(0, 1)
    actual = accuracy.reference_frames(tiny, lr.float())
    assert_as_accurate("reference", actual, plain, truth, torch.float32)


@pytest.mark.timeout(900)
def test_every_path_meets_the_gate(clips, tiny):
    paths = accuracy.paths(tiny, CPU)
    del paths[ONNX]  # has a test of its own
    rows = {row["what"]: row for row in accuracy.check(clips, tiny, paths)}
    assert {row["dtype"] for row in rows.values()} == {"fp32", "bf16", "fp16"}
    for name, row in rows.items():
        assert row["gate"] == "met", row
        assert row["psnr_db"] >= accuracy.LEAST[row["dtype"]], name
        assert abs(row["moved_db"]) < accuracy.MOST, name
    # half precision is another computation, not the same one under another name
    assert rows["bf16"]["psnr_db"] < rows["fp16"]["psnr_db"] < rows["fp32"]["psnr_db"]


def test_another_network_misses_the_gate(clips, tiny):
    other = load("tiny")
    with torch.no_grad():
        other.sigma.mul_(0.5)
    paths = {"fp32": accuracy.paths(other, CPU)["fp32"]}
    (row,) = accuracy.check(clips, tiny, paths)
    assert row["gate"] == "missed" and row["psnr_db"] < 80
    assert accuracy.missed([row]) == ["fp32"]


@pytest.mark.parametrize(
    ("precision", "decibel", "gate"),
    [
        ("fp32", 81, "met"),
        ("fp32", 79, "missed"),
        ("bf16", 51, "met"),
        ("bf16", 49, "missed"),
        ("fp16", float("inf"), "met"),
        ("fp32", float("nan"), "missed"),
    ],
)
def test_gate_is_at_the_worst_frame(clips, tiny, reference, monkeypatch, precision, decibel, gate):
    """One frame of two is off by a constant; the originals do not decide here."""
    monkeypatch.setattr(accuracy, "MOST", 99.0)
    monkeypatch.setattr(accuracy, "reference_frames", lambda *_: reference)
    off = reference.clone()
    off[1] += 10 ** (-decibel / 20)
    path = accuracy.Fast(precision, lambda _: off)
    (row,) = accuracy.check(clips, tiny, {"path": path})
    assert row["gate"] == gate
    json.dumps(row, allow_nan=False)


def test_a_change_against_the_originals_misses_the_gate(clips, tiny, reference, monkeypatch):
    """Close to the reference, but the evaluation would report another PSNR."""
    monkeypatch.setattr(accuracy, "LEAST", {"bf16": 20.0})
    monkeypatch.setattr(accuracy, "reference_frames", lambda *_: reference)
    path = accuracy.Fast("bf16", lambda _: reference * 0.99)
    (row,) = accuracy.check(clips, tiny, {"path": path})
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


def test_missing_onnx_is_reported(clips, tiny, reference, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    monkeypatch.setattr(accuracy, "reference_frames", lambda *_: reference)
    (row,) = accuracy.check(clips, tiny, {ONNX: accuracy.paths(tiny, CPU)[ONNX]})
    assert row["gate"] is None and row["note"].startswith("not run: ONNX files need onnx")


def test_command(clips, reference, monkeypatch, capsys):
    paths = accuracy.paths
    monkeypatch.setattr(accuracy, "demo", lambda frames: clips)
    monkeypatch.setattr(accuracy, "reference_frames", lambda *_: reference)
    monkeypatch.setattr(accuracy, "paths", lambda *of: {"bf16": paths(*of)["bf16"]})
    monkeypatch.setattr(sys, "argv", ["accuracy.py"])
    accuracy.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(row["what"], row["gate"]) for row in line["rows"]] == [("bf16", "met")]
    monkeypatch.setattr(accuracy, "LEAST", {"bf16": 120.0})
    with pytest.raises(SystemExit, match="error: the accuracy gate is missed by: bf16"):
        accuracy.main()
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--weights", "none"])
    with pytest.raises(SystemExit, match="error: weights must be a shipped name"):
        accuracy.main()
