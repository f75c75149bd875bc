"""What can be tested of eval/gpu_check.py without a GPU: peers, table, arguments."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from rich.console import Console

from mana_triton import MANAConfig
from mana_triton.kernels import reference

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location("gpu_check", ROOT / "eval" / "gpu_check.py")
assert SPEC is not None and SPEC.loader is not None
gpu_check: Any = importlib.util.module_from_spec(SPEC)
sys.modules["gpu_check"] = gpu_check  # where FlexAttention looks for it
SPEC.loader.exec_module(gpu_check)

F32, BF16 = torch.float32, torch.bfloat16
HEIGHT, WIDTH = 9, 21  # partial tiles in both directions

pytestmark = pytest.mark.usefixtures("one_thread")


def every_tile(height, width):
    """A halo that reaches all keys."""
    halo = torch.full((1, 2, -(-height // 8) * -(-width // 16)), max(height, width))
    return gpu_check.block_mask(halo, height, width)


# uncompiled, FlexAttention computes densely, without a kernel, and says so
PEERS = {
    "eager": gpu_check.eager,
    "masked": gpu_check.masked_sdpa,
    "augmented": gpu_check.augmented_sdpa,
    "flex": gpu_check.flex,
    "flex-blocks": partial(gpu_check.flex_blocks, mask=every_tile(HEIGHT, WIDTH)),
}


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", PEERS)
def test_peers_compute_the_same_operation(name):
    """Outputs and all gradients: what is compared for speed must be the same."""
    inputs = gpu_check.operands(HEIGHT, WIDTH, F32, "cpu", 2)
    upstream = torch.randn(inputs[1].shape, generator=torch.Generator().manual_seed(1))

    def run(function, dtype):
        leaves = [x.to(dtype) for x in inputs]
        if name.startswith("flex"):  # has no backward pass on CPUs
            return [function(*leaves)]
        for x in leaves:
            x.requires_grad_()
        o = function(*leaves)
        return [o.detach(), *torch.autograd.grad(o, leaves, upstream.to(dtype))]

    def definition(*leaves):
        return reference.cross_frame_attention(*leaves).o

    exact = run(definition, torch.float64)
    # the sums cancel: dS = p (dP - sum p dP) times d^2 / sigma^3 or q.k
    q, k, v, sigma, scale = (x.double() for x in inputs)
    q, k, v, do = q.flatten(1, 2)[:, None], *(x.flatten(2, 3) for x in (k, v, upstream.double()))
    place = reference.pixel_coordinates(0, HEIGHT, WIDTH, q)
    distance = torch.cdist(place, place).square()
    p = (scale * q @ k.mT - distance / (2 * sigma**2)).softmax(-1)
    dp = do.abs() @ v.abs().mT
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    terms = {
        "dsigma": (ds * distance).sum() / sigma**3,
        "dscale": (ds * (q.abs() @ k.abs().mT)).sum(),
    }
    names = ("o", "dq", "dk", "dv", "dsigma", "dscale")
    results = run(PEERS[name], F32), run(definition, F32), exact
    for what, x, y, z in zip(names, *results, strict=False):
        assert_as_accurate(what, x, y, z, F32, terms=terms.get(what))


def test_extra_columns_carry_the_gaussian_in_half_precision():
    """At the corners of a large frame the coordinates need more bits than bfloat16 has.

    Products of 240 and 0.0625 at sigma = 4: parts of parts may be dropped only below rounding.
    """
    height, width = 3, 481
    q = torch.zeros(1, height, width, 64, dtype=BF16)
    k, sigma = torch.zeros(1, 1, height, width, 64, dtype=BF16), torch.tensor(4.3)
    v = torch.randn(k.shape, generator=torch.Generator().manual_seed(0)).to(BF16)
    scale = torch.tensor(1.0)
    exact = reference.cross_frame_attention(
        q.double(), k.double(), v.double(), sigma.double(), scale.double()
    ).o
    eager = reference.cross_frame_attention(q.float(), k.float(), v.float(), sigma, scale).o
    eager = eager.to(BF16)
    actual = gpu_check.augmented_sdpa(q, k, v, sigma, scale)
    assert_as_accurate("o", actual, eager, exact, BF16)


def test_a_block_mask_keeps_the_tiles_within_the_halo():
    """Three by three tiles of 8 x 16: eight pixels reach the neighbors, nine the next but one."""
    halo = torch.tensor([8, 8, 8, 8, 8, 9, 0, 16, 17]).reshape(1, 1, 9)
    kept = gpu_check.block_mask(halo, 24, 48).to_dense()[0, 0].bool()
    window = kept.nonzero().tolist()
    tiles = [[j for i, j in window if i == tile] for tile in range(9)]
    assert tiles[:4] == [[0, 1, 3, 4], [0, 1, 2, 3, 4, 5], [1, 2, 4, 5], [0, 1, 3, 4, 6, 7]]
    assert tiles[4] == list(range(9))
    assert tiles[5] == [1, 2, 4, 5, 7, 8]  # 9 of 16 columns
    assert tiles[6] == [6]
    assert tiles[7] == list(range(9))  # two rows up, one column to both sides
    assert tiles[8] == list(range(9))  # 17: two columns to the left


def test_relative_error_is_that_of_the_function():
    inputs = gpu_check.operands(HEIGHT, WIDTH, F32, "cpu", 2)
    assert gpu_check.relative_error(gpu_check.eager, inputs) < 1e-6
    off = gpu_check.relative_error(lambda *x: 1.25 * gpu_check.eager(*x), inputs)
    assert off == pytest.approx(0.25, abs=1e-6)


COMPARE = """
import json, sys
import torch
sys.path.insert(0, "eval")
import gpu_check

def measure(run):
    run()
    return {"ms": 1.0, "p20": 1.0, "p80": 1.0, "peak_mib": 0.0}

gpu_check.DEVICE, gpu_check.DTYPE, gpu_check.FRAMES = "cpu", torch.float16, 1
gpu_check.measure = measure
torch.cuda.mem_get_info = lambda: (1 << 30, 1 << 30)
torch.compile = lambda function, **_: function
print(json.dumps(gpu_check.compare(5, 17, float("inf"))))
"""


def test_comparison_in_the_interpreter():
    """The whole table for a small frame, but for the times: ours and the peers do run."""
    command = [sys.executable, "-W", "ignore", "-c", COMPARE]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = {row["what"]: row for row in json.loads(result.stdout.splitlines()[-1])}
    for name in ("ours, bias", "SDPA, extra columns", "SDPA, mask", "dense eager"):
        assert rows[name]["relative_error"] < 5e-3, rows[name]
    assert 0 < rows["ours, bias"]["visited"] <= 1
    assert rows["ours, gate"]["both"]["ms"] == 1.0
    for name in ("FlexAttention, dense", "FlexAttention, same tiles"):
        assert "does not support backward on CPU" in rows[name]["left_out"]


# --- the output


def figures(ms):
    return {"ms": ms, "p20": 0.9 * ms, "p80": 1.1 * ms, "peak_mib": 100.0}


def made_up():
    size = {"height": 64, "width": 112}
    return {
        "gpu": "NVIDIA Imaginary 90 (80GB)",
        "tests": {"passed": True, "summary": "9 passed"},
        "ceilings": {"copy_gb_s": 4000.0, "matmul_tflop_s": 790.0},
        "models": [
            {"what": "paper", "height": 64, "width": 112, "precision": "bf16", "batch": 7,
             "latency": figures(1.5), "latency_target": 1.2, "ms_per_frame": 0.8, "target": 0.7,
             "floor_ms": 0.4, "of_floor": 0.5, "visited": 0.25, "peak_mib": 900.0,
             "predicted_mib": 1000.0},
            {"what": "paper", "height": 270, "width": 480, "left_out": "no time left"},
        ],
        "operation": [
            {"what": "ours, bias", **size, "forward": figures(0.2), "both": figures(0.8),
             "relative_error": 3e-3, "visited": 0.25},
            {"what": "dense eager", **size, "forward": figures(3.0), "both": figures(10.0),
             "relative_error": 2e-3, "visited": 1.0},
            {"what": "SDPA, mask", **size, "left_out": "needs 900 GiB, 80 free"},
        ],
        "decoder": [
            {"what": "as it is", **size, "batch": 7, "ms": 0.4, "p20": 0.3, "p80": 0.5},
            {"what": "torch.compile", **size, "left_out": "no time left"},
        ],
    }  # fmt: skip


def test_table_of_results(capsys):
    console = Console(width=200)
    console.print(gpu_check.operation_table(made_up()["operation"]))
    lines = capsys.readouterr().out.splitlines()
    ours, dense, left_out = (
        next(line for line in lines if name in line)
        for name in ("ours, bias", "dense eager", "SDPA, mask")
    )
    # 4 D pairs: 4 * 64 * 7 * 7168^2 FLOP, a quarter of them in 0.2 ms
    assert "115" in ours and "1.00" in ours and "25.0%" in ours and "0.2 (0.18-0.22)" in ours
    assert "15.00" in dense and "12.50" in dense and "31" in dense
    assert "needs 900 GiB, 80 free" in left_out


def test_table_of_whole_models(capsys):
    Console(width=200).print(gpu_check.model_table(made_up()["models"]))
    lines = capsys.readouterr().out.splitlines()
    small, large = (next(line for line in lines if size in line) for size in ("448x", "1920x"))
    for cell in ("paper, bf16", "1.5 (1.35-1.65) [1.2]", "0.8 [0.7]", "50%", "25.0%", "1000"):
        assert cell in small
    assert "no time left" in large


def test_whole_models_are_measured(monkeypatch):
    """On a CPU: what is written into a row, but no figure of worth."""
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "TRIES", 8)
    monkeypatch.setattr(gpu_check, "TARGETS", {(12, 16): (1.2, 0.7), (12, 17): (None, None)})
    rows = gpu_check.model_rows("tiny", 0.1, float("inf"), 790.0)
    assert [row["width"] for row in rows] == [16, 17]
    for row in rows:
        assert row["precision"] == "fp32" and 0 < row["visited"] <= 1
        assert 0 < row["latency"]["p20"] <= row["latency"]["ms"] <= row["latency"]["p80"]
        assert row["of_floor"] == row["floor_ms"] / row["ms_per_frame"] > 0
    assert (rows[0]["target"], rows[1]["target"]) == (0.7, None)
    late = gpu_check.model_rows("tiny", 0.1, 0.0, 790.0)
    assert all(row["left_out"] == "no time left" for row in late)


def test_ways_to_run_the_decoder_are_compared(monkeypatch):
    """On a CPU, with what only cuDNN and compiling do replaced by the same in plain PyTorch."""

    def fused(x, weight, bias, stride, padding, dilation, groups):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "TARGETS", {(12, 16): (None, None), (540, 960): (None, None)})
    monkeypatch.setattr(torch, "compile", lambda decode, dynamic: lambda z: decode(z) * 1.01)

    def measure(graph: Callable) -> dict[str, float]:
        graph()
        return {"ms": 6.0, "p20": 5.0, "p80": 7.0, "peak_mib": 1.0}

    monkeypatch.setattr(gpu_check, "measure", measure)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "cudnn_convolution_relu", fused)
        plain, cudnn, compiled = gpu_check.decoder_rows("tiny", float("inf"))
    assert (plain["ms"], plain["batch"]) == (6.0, 1)
    assert "relative_difference" not in plain
    assert cudnn["relative_difference"] < 1e-6
    assert compiled["relative_difference"] == pytest.approx(0.01, rel=1e-3)
    assert "6 (5-7)" in table_of([plain, cudnn, compiled])
    without = gpu_check.decoder_rows("tiny", float("inf"))[1]
    assert without["left_out"].startswith("NotImplementedError")
    late = gpu_check.decoder_rows("tiny", 0.0)
    assert all(row["left_out"] == "no time left" for row in late)
    assert "no time left" in table_of(late)


def table_of(rows: list[dict]) -> str:
    console = Console(width=200)
    with console.capture() as text:
        console.print(gpu_check.decoder_table(rows))
    return text.get()


def test_flops_are_those_of_the_layers():
    config = MANAConfig.preset("paper")
    pixels, d = 64 * 112, 64
    block = 2 * 2 * 9 * 128 * 128
    layers = 2 * 9 * 3 * 128 + 45 * block + 3 * 2 * 128 * d  # first, blocks, q, k, v
    layers += 2 * 7 * d * 128 + 2 * d * 128 + 4 * d * 512  # W_z, W_z1, memory
    layers += 2 * 9 * (128 * 512 + 4 * 128 * 256 + 16 * (64 * 64 + 64 * 3))
    dense = 4 * d * 7 * pixels**2
    assert gpu_check.flops(config, 64, 112, 0.25) == pytest.approx(layers * pixels + dense / 4)


def test_figures_of_a_red_gate_are_marked(capsys):
    results = made_up()
    gpu_check.show(results)
    text = capsys.readouterr().out
    assert "9 passed" in text and "do not count" not in text and "790 TFLOP/s" in text
    results["tests"] = {"passed": False, "summary": "1 failed", "output": "E  assert 1 == 2"}
    gpu_check.show(results)
    text = capsys.readouterr().out
    assert "TESTS FAILED, these figures do not count" in text and "E  assert 1 == 2" in text


def test_results_are_one_file_named_after_the_gpu(monkeypatch, tmp_path):
    (tmp_path / "eval" / "results").mkdir(parents=True)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    path = gpu_check.write(made_up())
    assert path == tmp_path / "eval" / "results" / "nvidia-imaginary-90-80gb.json"
    assert json.loads(path.read_text()) == made_up()
    assert [x.name for x in path.parent.iterdir()] == [path.name]


def test_a_peer_that_fails_is_left_out_and_ours_is_not():
    inputs = gpu_check.operands(HEIGHT, WIDTH, F32, "cpu", 1)

    def fail(*_):
        raise torch.OutOfMemoryError("no memory\nfor this")

    def measure(run):
        run()
        return figures(1.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_check, "measure", measure)
        row = gpu_check.contest("SDPA, mask", fail, inputs, 0.5)
        assert row == {"left_out": "OutOfMemoryError: no memory"}
        with pytest.raises(torch.OutOfMemoryError):
            gpu_check.contest("ours, bias", fail, inputs, 0.5)
        row = gpu_check.contest("dense eager", gpu_check.eager, inputs, 0.5)
    assert row["visited"] == 1.0 and row["relative_error"] < 1e-6


def test_gpu_tests_report_red_and_late(monkeypatch, tmp_path):
    (tmp_path / "test_red.py").write_text("import pytest\n@pytest.mark.gpu\ndef test(): assert 0\n")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "TESTS", ("test_red.py",))
    red = gpu_check.run_tests(100)
    assert not red["passed"] and "1 failed" in red["summary"] and "assert 0" in red["output"]
    assert gpu_check.run_tests(0.01) == {"passed": False, "summary": "not done after 0 s"}


# --- the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks where there is a GPU")
def test_without_a_gpu_there_is_one_clear_line():
    """Also from a bare checkout: neither av nor lpips nor an installed package is needed."""
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['av', 'lpips', 'skimage'])); "
        "sys.argv = ['gpu_check.py']; runpy.run_path('eval/gpu_check.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 1 and not result.stdout
    assert result.stderr == (
        "error: no GPU that PyTorch can use; what needs none is tested by pytest\n"
    )


def test_wrong_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--minutes", "0"])
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main()
    assert stopped.value.code == 2
    assert "--minutes must be > 0, got 0.0" in capsys.readouterr().err
