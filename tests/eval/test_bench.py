"""The benchmark: what it times is right, and its table shows what was timed."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from oracle import assert_as_accurate

from eval import accuracy, baselines, bench, gpu_check, run, timing
from mana_triton.kernels import reference
from mana_triton.model import MANA, MANAConfig

CPU = torch.device("cpu")
SIZE = (9, 21)  # partial tiles of 8 x 16 in both directions

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def on() -> bench.Device:
    return bench.Device(CPU, "fp32", timing.Roofline(1e7, 1e6), seconds=0.01)


def inputs(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [x.to(dtype) for x in bench.attention_inputs(SIZE, torch.float32, CPU)]


def every_tile(height: int, width: int):
    radius = torch.full((1, 7, -(-height // 8) * -(-width // 16)), max(height, width))
    return baselines.block_mask(radius, height, width)


BASELINES = {
    "dense": baselines.dense,
    "masked": baselines.masked_sdpa,
    "augmented": baselines.augmented_sdpa,
    "flex": baselines.flex,
    "flex-blocks": partial(baselines.flex, mask=every_tile(*SIZE)),
}


# uncompiled, FlexAttention computes densely and says so
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", BASELINES)
def test_baselines_compute_the_same_attention(name):
    exact = reference.cross_frame_attention(*inputs(torch.float64)).o
    plain = reference.cross_frame_attention(*inputs()).o
    assert_as_accurate(name, BASELINES[name](*inputs()), plain, exact, torch.float32)


def test_dense_gate_is_the_official_form():
    exact = reference.cross_frame_attention(*inputs(torch.float64), gaussian="gate").o
    plain = reference.cross_frame_attention(*inputs(), gaussian="gate").o
    actual = baselines.dense(*inputs(), gaussian="gate")
    assert_as_accurate("gate", actual, plain, exact, torch.float32)


def test_extra_columns_carry_the_gaussian_in_half_precision():
    """At the corners of a large frame the coordinates need more bits than bfloat16 has."""
    shape = (1, 1, 3, 481, 64)
    q = torch.zeros(1, 3, 481, 64, dtype=torch.bfloat16)
    k, sigma = torch.zeros(shape, dtype=torch.bfloat16), torch.tensor(4.3)
    v = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    one = torch.tensor(1.0)
    exact = reference.cross_frame_attention(
        q.double(), k.double(), v.double(), sigma.double(), one.double()
    ).o
    plain = reference.cross_frame_attention(q.float(), k.float(), v.float(), sigma, one).o
    actual = baselines.augmented_sdpa(q, k, v, sigma, one)
    assert_as_accurate("o", actual, plain.bfloat16(), exact, torch.bfloat16)


def test_block_mask_keeps_the_tiles_within_the_radius():
    """Three by three tiles of 8 x 16: 8 pixels reach the next tile down, 9 the one after."""
    radius = torch.tensor([8, 8, 8, 8, 8, 9, 0, 16, 17]).reshape(1, 1, 9)
    kept = baselines.block_mask(radius, 24, 48).to_dense()[0, 0].bool().nonzero().tolist()
    tiles = [[j for i, j in kept if i == tile] for tile in range(9)]
    assert tiles[:4] == [[0, 1, 3, 4], [0, 1, 2, 3, 4, 5], [1, 2, 4, 5], [0, 1, 3, 4, 6, 7]]
    assert tiles[4:] == [list(range(9)), [1, 2, 4, 5, 7, 8], [6], list(range(9)), list(range(9))]


def test_naive_frame_is_the_official_network():
    window = torch.rand(1, 7, 3, *SIZE, generator=torch.Generator().manual_seed(0))
    model = bench.naive_network(MANAConfig.preset("tiny"), CPU, torch.float32)
    assert (model.config.gaussian, model.config.logit_scale) == ("gate", 1.0)
    torch.nn.init.normal_(model.w_z.weight, std=0.3)
    actual = bench.naive_frame(model, window)
    with torch.inference_mode():
        plain = model(window, backend="reference")
        exact = model.double()(window.double(), backend="reference")
    assert_as_accurate("frame", actual, plain, exact, torch.float32)


def test_wrong_result_is_not_timed(monkeypatch, on):
    right = bench.cross_frame_attention

    def wrong(*args, **options):
        return right(*args, **options) if "return_density" in options else 1.001 * right(*args)

    monkeypatch.setattr(bench, "cross_frame_attention", wrong)
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("it was timed"))
    with pytest.raises(bench.BenchError, match=r"ours, tiled must be within .* nothing was timed"):
        bench.attention_rows(SIZE, "tiled", on)


def test_flops_are_those_of_the_layers():
    config = MANAConfig.preset("paper")
    pixels, d = 64 * 112, 64
    block = 2 * 2 * 9 * 128 * 128
    counted = bench.flops(config, (64, 112), 0.25)
    encode = 2 * 9 * 3 * 128 + 5 * block + 3 * 2 * 128 * d
    # folding the normalization into the projections adds a few that do not depend on the size
    assert counted["encode"] == pytest.approx(encode * pixels, rel=1e-5)
    fuse = 2 * 7 * d * 128 + 2 * d * 128 + 4 * d * 512  # W_z, W_z1, memory
    assert counted["fuse"] == fuse * pixels + 4 * d * 7 * pixels**2 / 4
    upsampler = 2 * 9 * (128 * 512 + 4 * 128 * 256 + 16 * (64 * 64 + 64 * 3))
    assert counted["decode"] == (40 * block + upsampler) * pixels


def test_variants_are_timed_several_times_and_summarized():
    calls: list[str] = []
    variants = {name: partial(calls.append, name) for name in ("a", "b")}
    ms = timing.measure(variants, CPU, seconds=0.02)
    assert set(ms) == set(calls) == {"a", "b"} and all(len(times) >= 2 for times in ms.values())
    row = timing.summarize("fast", [50.0, 100.0, 150.0], [100.0, 300.0, 1000.0])
    assert (row["ms"], row["p20"], row["p80"], row["times_faster"]) == (100, 70, 130, 3)


def test_extra_memory_is_that_of_the_run():
    mib = 64
    if (peak := timing.extra_mib(lambda: torch.ones(mib << 18), CPU)) is None:
        pytest.skip("this system does not say")
    assert 0.8 * mib <= peak <= 1.2 * mib


def test_command(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SIZE", (12, 18))
    monkeypatch.setattr(bench, "SMALL_SIZES", ((8, 10), (12, 18)))
    monkeypatch.setattr(bench, "SECONDS", 0.01)
    monkeypatch.setattr(bench, "network", lambda _: MANA(MANAConfig.preset("tiny")))
    monkeypatch.setattr(timing, "ROUNDS", 1)
    gate = [{"what": "bf16", "gate": "missed"}, {"what": "fp32", "gate": "met"}]
    monkeypatch.setattr(accuracy, "gate", lambda *_: gate)
    copy = tmp_path / "bench.json"
    monkeypatch.setattr(sys, "argv", ["run.py", "--bench", "--json", str(copy)])
    with pytest.raises(SystemExit, match=r"error: the accuracy gate is missed by: bf16$"):
        run.main()
    text = capsys.readouterr().out
    assert copy.read_text() == f"{text.splitlines()[-1]}\n"
    result = json.loads(text.splitlines()[-1])
    assert {"device", "precision", "commit", "versions"} <= set(result)
    assert (result["paper_ms"], result["accuracy"]) == (59.0, gate)
    rows = result["rows"]
    published = [row for row in rows if row["what"] == "paper, 2080 Ti, published"]
    assert [(row["ms"], row["dtype"]) for row in published] == [(59.0, None)]
    frames = {(r["preset"], r["width"], r["what"]) for r in rows if r["part"] == "frame"}
    for preset, width in (("paper", 72), ("tiny", 40), ("tiny", 72)):
        for what in ("naive, fp32", "ours, 7 encodes", "ours, latency"):
            assert (preset, width, what) in frames
    attention = {row["what"]: row for row in rows if row["part"] == "attention"}
    assert attention["dense"]["times_faster"] == 1
    assert attention["ours, tiled"]["relative_error"] < 1e-5
    stages = [row["what"] for row in rows if row["part"] == "stage"]
    assert stages == ["encode", "fuse", "decode"] * 2
    assert "random normal" not in text and "shipped weights, frames of the demo clip" in text


# ---- gpu_check.py


def test_gpu_check_reports_red_and_late_tests(monkeypatch, tmp_path):
    (tmp_path / "test_red.py").write_text("import pytest\n@pytest.mark.gpu\ndef test(): assert 0\n")
    (tmp_path / "pyproject.toml").write_text((run.ROOT / "pyproject.toml").read_text())
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "TESTS", ("test_red.py",))
    red = gpu_check.run_tests(100)
    assert not red["passed"] and "1 failed" in red["summary"] and "assert 0" in red["output"]
    assert gpu_check.run_tests(0.01)["summary"] == "not done after 0 s"


@pytest.mark.skipif(torch.cuda.is_available(), reason="checks where there is a GPU")
def test_gpu_check_needs_a_gpu_but_no_extras():
    """From a bare checkout: neither av nor lpips nor scikit-image is needed."""
    code = (
        "import runpy, sys; sys.modules.update(dict.fromkeys(['av', 'lpips', 'skimage'])); "
        "sys.argv = ['gpu_check.py']; runpy.run_path('eval/gpu_check.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=run.ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: no GPU that PyTorch can use")


def test_gpu_check_fuses_relu_without_changing_the_decoder(monkeypatch):
    def fused(x, weight, bias, stride, padding, dilation, groups):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups).relu()

    monkeypatch.setattr(torch, "cudnn_convolution_relu", fused)
    model = MANA(MANAConfig.preset("tiny")).eval()
    z = torch.randn(1, 32, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, other = model.decode(z), gpu_check.with_fused_relu(model).decode(z)
    assert np.allclose(plain, other, atol=1e-6)
