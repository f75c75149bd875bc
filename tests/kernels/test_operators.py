"""The operators: Triton's kernels in a process of their own, compiler, exporter, backends.

The tests of the kernels are in the files interpreted_*.py.
"""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attention_cases import draw, run_suite
from oracle import assert_as_accurate
from torch import nn
from torch.library import opcheck

from mana_triton import MANA, MANAConfig, cross_frame_attention, upscale
from mana_triton.attention import choose_backend

SUITES = pytest.mark.parametrize("kernel", ["cross_frame", "memory", "projection"])
FORMS = pytest.mark.parametrize("gaussian", ["bias", "gate"])

pytestmark = pytest.mark.usefixtures("one_thread")


@SUITES
@pytest.mark.timeout(900)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the same tests")
def test_in_the_interpreter(kernel):
    pytest.importorskip("triton", reason="no Triton on this platform")
    run_suite(f"interpreted_{kernel}.py", interpret=True)


@SUITES
@pytest.mark.gpu
@pytest.mark.timeout(900)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_the_gpu(kernel):
    run_suite(f"interpreted_{kernel}.py", interpret=False)


# --- one operator for every backend


@FORMS
@pytest.mark.parametrize("offsets", [True, False])
def test_operator(offsets, gaussian):
    """Fake implementation, autograd and schema agree with what is computed."""
    case = draw((1, 2, 5, 6, 16))
    inputs = [x.clone().requires_grad_() for x in case[:5]]
    arguments = (*inputs, gaussian, offsets, 1e-6, 0, "tiled")
    opcheck(torch.ops.mana.cross_frame_attention.default, arguments)


class Attention(nn.Module):
    """All that cross_frame_attention returns."""

    def __init__(self, backend: str, gaussian: str):
        super().__init__()
        self.backend, self.gaussian = backend, gaussian

    def forward(self, q, k, v, sigma, scale):
        return cross_frame_attention(
            q, k, v, sigma, scale=scale, tolerance=1e-3, offsets=True, return_lse=True,
            return_density=True, backend=self.backend, gaussian=self.gaussian,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("gaussian", "backend"), [("bias", "tiled"), ("gate", "tiled"), ("bias", "reference")]
)
def test_compile(gaussian, backend):
    """No graph break, and equal values and gradients, although the work depends on the data."""
    case = draw((1, 2, 40, 33, 16), sigma=1.0, gain=0.1)
    attend = Attention(backend, gaussian)
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    results = []
    for function in (attend, compiled):
        inputs = [x.clone().requires_grad_() for x in case[:5]]
        *outputs, density = function(*inputs)
        grads = torch.autograd.grad(outputs, inputs, case[5:])
        results.append([*outputs, *grads, torch.as_tensor(density, dtype=torch.float64)])
    for x, y in zip(*results, strict=True):
        assert_as_accurate("compiled", y, x, x.double(), torch.float32)
    if backend == "tiled":
        assert results[0][-1] == results[1][-1] < 1


@pytest.mark.parametrize(
    ("strict", "backend"), [(True, "tiled"), (False, "tiled"), (False, "reference")]
)
def test_export(strict, backend):
    case = draw((1, 2, 9, 12, 16))
    attend = Attention(backend, "gate")
    program = torch.export.export(attend, case[:5], strict=strict)
    nodes = [node.target for node in program.graph.nodes]
    operator = torch.ops.mana.cross_frame_attention.default
    assert nodes.count(operator) == (backend == "tiled")
    for x, y in zip(attend(*case[:5]), program.module()(*case[:5]), strict=True):
        assert torch.equal(torch.as_tensor(x), torch.as_tensor(y))


@pytest.mark.parametrize("match", ["dot", "cosine"])
def test_the_network_compiles_and_exports(match):
    config = MANAConfig(
        channels=32, encoder_blocks=1, decoder_blocks=1, memory_slots=8, frames=3, match=match,
        offsets=match == "cosine",
    )  # fmt: skip
    torch.manual_seed(0)
    model, frames = MANA(config), torch.rand(1, 3, 3, 10, 12)
    nn.init.normal_(model.w_z.weight)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # a softmax does not see one logit more for all keys: that gradient is rounding alone
    parameters = [x for name, x in model.named_parameters() if name != "theta.bias"]
    results = []
    for function in (model, compiled):
        enlarged = function(frames, backend="tiled")
        grads = torch.autograd.grad(enlarged.square().mean(), parameters)
        results.append([enlarged, *grads])
    for x, y in zip(*results, strict=True):
        # the compiler merges operations: equal up to rounding
        assert (x - y).abs().max() <= 1e-4 * x.abs().max()
    options = {"backend": "tiled"}
    program = torch.export.export(model.eval(), (frames,), options)
    assert torch.equal(program.module()(frames, **options), model(frames, **options))


# --- which backend


def test_backends(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    gpu = torch.device("cuda", 0)
    assert choose_backend("triton", gpu) == ("triton", "as asked")
    assert choose_backend("auto", gpu)[0] == "triton"
    assert choose_backend("tiled", gpu)[0] == "tiled"
    assert choose_backend("auto", torch.device("cpu"))[0] == "tiled"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    assert choose_backend("auto", gpu)[0] == "tiled"
    with pytest.raises(ValueError, match=r"needs compute capability 8\.0 or newer, got 7\.5"):
        choose_backend("triton", gpu)


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_triton_needs_a_gpu(device):
    message = f"backend 'triton' is not available on {device}: it needs an NVIDIA or AMD GPU"
    with pytest.raises(ValueError, match=message):
        choose_backend("triton", torch.device(device))


def test_nothing_imports_triton_before_it_is_needed():
    """Neither the package nor the PyTorch path: macOS and Windows have no Triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, mana_triton\n"
        "q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 4, 5, 16)\n"
        "mana_triton.cross_frame_attention(q, k, k, 2.0)\n"
        "mana_triton.memory_attention(q, torch.randn(16, 3))\n"
        "mana_triton.MANA\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(
        command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


# --- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_twenty_steps_of_training_agree():
    """The loss curves of triton and tiled: rounding apart, the same network learns."""
    config = MANAConfig(
        channels=32, encoder_blocks=2, decoder_blocks=2, memory_slots=16, match="cosine",
        offsets=True,
    )  # fmt: skip
    curves = []
    for backend in ("tiled", "triton"):
        torch.manual_seed(0)
        model = MANA(config).cuda()
        adam = torch.optim.Adam(model.parameters(), 1e-4)
        curve = []
        for _ in range(20):
            frames = torch.rand(2, 7, 3, 24, 32, device="cuda")
            target = torch.rand(2, 3, 96, 128, device="cuda")
            loss = nn.functional.l1_loss(model(frames, backend=backend), target)
            adam.zero_grad()
            loss.backward()
            adam.step()
            curve.append(loss.item())
        curves.append(torch.tensor(curve))
    assert curves[0][-1] < curves[0][0]
    # both certify 1e-6; Adam turns rounding of small gradients into steps of its rate
    assert (curves[0] - curves[1]).abs().max() < 1e-3 * curves[0].max()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_enlarged_frames_agree(monkeypatch):
    """The streaming engine on the GPU, as `infer --backend triton` runs it, and on the CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    config = MANAConfig(
        channels=32, encoder_blocks=2, decoder_blocks=2, memory_slots=16, match="cosine",
        offsets=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MANA(config)
    nn.init.normal_(model.w_z.weight, std=0.1)
    frames = torch.randint(0, 256, (5, 24, 40, 3), dtype=torch.uint8).numpy()
    gpu = upscale(frames, model, device="cuda", precision="fp32", backend="triton")
    cpu = upscale(frames, model, device="cpu", precision="fp32", backend="tiled")
    for x, y in zip(gpu, cpu, strict=True):
        # a step where rounding falls to the other side
        assert np.abs(np.asarray(x, int) - y).max() <= 1
