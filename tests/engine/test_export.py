"""The network compiled, exported, and as an ONNX file."""

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch
from oracle import assert_as_accurate
from torch import Tensor

from mana_triton import export
from mana_triton.attention import TOLERANCE
from mana_triton.checkpoint import named_weights, save
from mana_triton.kernels import reference
from mana_triton.model import MANA, MANAConfig

SMALL = MANAConfig(channels=16, encoder_blocks=1, decoder_blocks=1, memory_slots=6, frames=3)
VARIANTS = {
    "windows": replace(SMALL, match="cosine", offsets=True, sigma=0.8),
    "every-pair": replace(SMALL, offsets=True),
    "gate": replace(SMALL, gaussian="gate", logit_scale=1.0, memory_slots=0),
}
SIZE = (20, 35)  # neither is a multiple of a square's side
MISSING = [name for name in export.NEEDED if find_spec(name) is None]
needs_onnx = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")

pytestmark = pytest.mark.usefixtures("one_thread")


def build(config: MANAConfig) -> MANA:
    """A network whose attention matters, with logits that stay small."""
    torch.manual_seed(0)
    model = MANA(config).eval().requires_grad_(False)
    torch.nn.init.normal_(model.w_z.weight, std=0.3)
    if config.match == "cosine":
        model.temperature.fill_(2.0)
    return model


def window(config: MANAConfig, batch: int, size: tuple[int, int] = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, config.frames, 3, *size, generator=generator)


def assert_same_frames(name: str, actual: Tensor, model: MANA, frames: Tensor) -> None:
    eager = model(frames)
    exact = MANA(model.config).double()
    exact.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_as_accurate(
            name, actual, eager, exact(frames.double(), backend="reference"), torch.float32
        )


@pytest.mark.skipif(shutil.which("g++") is None, reason="the compiler needs g++, there is none")
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own modules
def test_compiled():
    model = build(VARIANTS["windows"])
    frames = window(model.config, 1)
    compiled = torch.compile(model, fullgraph=True)
    assert_same_frames("compiled", compiled(frames), model, frames)


@pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")  # PyTorch's own
def test_exported_with_its_operator(tmp_path):
    model = build(VARIANTS["windows"])
    frames = window(model.config, 1)
    torch.export.save(torch.export.export(model, (frames,)), tmp_path / "model.pt2")
    program = torch.export.load(tmp_path / "model.pt2")
    operators = [node.target for node in program.graph.nodes]
    assert torch.ops.mana.cross_frame_attention.default in operators
    assert torch.equal(program.module()(frames), model(frames))


def opposed(size: tuple[int, int], tau: float, radius: int) -> list[Tensor]:
    """The worst case of cosine matching: keys within the radius oppose q, the others agree."""
    (height, width), side = size, export.SIDE
    near = torch.zeros(size, dtype=torch.bool)
    near[side - radius : 2 * side + radius, side - radius : 2 * side + radius] = True
    k = torch.where(near, -1.0, 1.0).double().view(1, 1, height, width, 1)
    q = torch.ones(1, height, width, 1, dtype=torch.float64)
    return [q, k, -k, torch.tensor(1.0).double(), torch.tensor(tau).double()]


@pytest.mark.parametrize("tau", [2.0, 12.0])
def test_the_radius_holds_for_any_frames(tau):
    size = (48, 49)
    model = build(replace(VARIANTS["windows"], sigma=1.0))
    model.temperature.fill_(tau)
    certified = export.window_radius(model, max(size))
    assert 2 < certified < export.SIDE

    def excess(radius: int) -> Tensor:
        inputs = opposed(size, tau, radius)
        exact = reference.cross_frame_attention(*inputs).o
        division = export.Layout(radius, 0)
        q, k, v, sigma, scale = inputs
        attended = export.static_attention(q, k, v, sigma, scale, "bias", False, division=division)
        o = attended[0]
        promised = TOLERANCE[torch.float32] * (1 + exact.abs())
        return ((o - exact).abs() - promised).max()

    assert excess(certified) <= 1e-12
    # and it is not much larger than necessary
    assert excess(certified - 2) > 1e-12


def test_without_a_bound_every_key_is_visited():
    for name in ("every-pair", "gate"):
        assert export.window_radius(build(VARIANTS[name]), 300) == 300
    plain = build(replace(VARIANTS["windows"], sigma=math.inf))
    assert export.window_radius(plain, 300) == 300
    assert export.window_radius(build(VARIANTS["windows"]), 3) == 3


@needs_onnx
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "size"), [("windows", SIZE), ("every-pair", (7, 18)), ("gate", (17, 16))]
)
def test_onnx(name, size):
    import onnx  # pyright: ignore[reportMissingImports]

    model = build(VARIANTS[name])
    assert (export.window_radius(model, max(size)) < min(size) / 2) == (name == "windows")
    content, worst = export.export(model, size[0], size[1], ".onnx", {"weights": "noise"})
    assert worst < 1e-5
    for batch in (1, 2):
        frames = window(model.config, batch, size)
        assert_same_frames(name, export.open_onnx(content)(frames), model, frames)
    file = onnx.load_from_string(content)
    assert [(x.domain, x.version) for x in file.opset_import if not x.domain] == [("", 18)]
    assert {node.domain for node in file.graph.node} == {""}  # no operators of others
    about = {x.key: x.value for x in file.metadata_props}
    assert MANAConfig(**json.loads(about["config"])) == model.config
    assert (about["weights"], about["scale"]) == ("noise", "4")


LOAD = """
import json, sys, torch
extra = {"about.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra)
frames, expected = torch.load(sys.argv[2])
print((program.module()(frames) - expected).abs().max().item())
print(json.loads(extra["about.json"])["scale"], "mana_triton" in sys.modules)
"""


@pytest.mark.timeout(900)
def test_command_writes_a_program_that_needs_only_pytorch(tmp_path, monkeypatch, capsys):
    model = build(VARIANTS["windows"])
    save(model, tmp_path / "noise.safetensors")
    output = tmp_path / "model.pt2"
    arguments = [str(tmp_path / "noise.safetensors"), "-o", str(output), "--size", "35x20"]
    monkeypatch.setattr(sys, "argv", ["export", *arguments])
    export.main()
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (line["bytes"], line["opset"]) == (output.stat().st_size, None)
    assert line["input"] == ["batch", 3, 3, 20, 35]
    assert line["output_shape"] == ["batch", 3, 80, 140]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["model.pt2", "noise.safetensors"]
    frames = window(model.config, 2)
    torch.save((frames, model(frames)), tmp_path / "frames.pt")
    command = [sys.executable, "-c", LOAD, output, tmp_path / "frames.pt"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    difference, facts = result.stdout.splitlines()
    assert float(difference) <= export.ALLOWED / 10
    assert facts == "4 False"
    # an existing file is not replaced
    with pytest.raises(SystemExit, match=r"error: .*model\.pt2 exists; pass --overwrite"):
        export.main()


def test_refusals(tmp_path, monkeypatch):
    def refusal(*arguments) -> str:
        monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            export.main()
        assert not list(tmp_path.glob("*.onnx"))
        return str(stop.value.code)

    save(build(VARIANTS["every-pair"]), tmp_path / "dot.safetensors")
    output = tmp_path / "model.onnx"
    line = refusal(tmp_path / "dot.safetensors", "-o", output, "--size", "960x540")
    assert line.startswith("error: the attention must take at most 1 GiB at once")
    line = refusal("tiny", "-o", tmp_path / "none" / "model.onnx", "--size", "35x20")
    assert line.startswith("error: -o must lie in an existing folder")
    line = refusal("none", "-o", output, "--size", "35x20")
    shipped = ", ".join(named_weights())
    assert line.startswith(f"error: weights must be a shipped name ({shipped}) or an existing")
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    line = refusal("tiny", "-o", output, "--size", "35x20")
    assert line.startswith("error: ONNX files need onnx, onnxscript, onnxruntime, there is no onnx")


def test_wrong_usage(capsys):
    for arguments, line in (
        (["-o", "model.zip", "--size", "8x8"], "must end in .onnx or .pt2, got 'model.zip'"),
        (["-o", "model.onnx", "--size", "8"], "must be WIDTHxHEIGHT as 112x64, got '8'"),
        (["-o", "model.onnx", "--size", "8x0"], "must be WIDTHxHEIGHT as 112x64, got '8x0'"),
        (["-o", "model.onnx"], "required: --size"),
    ):
        with pytest.raises(SystemExit) as stop:
            export.parse_args(["tiny", *arguments])
        assert stop.value.code == 2
        assert line in capsys.readouterr().err
