"""The memory bank's kernels against float64, on the GPU or in Triton's interpreter.

Run by test_operators.py in a process of its own: the interpreter has to be chosen before the
kernels are defined. It computes bfloat16 products wrongly, so those are for the GPU.
"""

import math

import pytest
import torch
from attention_cases import DEVICE, DTYPES, INTERPRETED
from oracle import assert_as_accurate

import mana_triton
from mana_triton.kernels import config, reference
from mana_triton.kernels import memory as kernels

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = {  # B, H, W, D, N
    "one-pixel": (1, 1, 1, 16, 3),
    "one-entry": (2, 5, 7, 16, 1),
    "odd-size": (2, 9, 17, 32, 3),
    "paper": (1, 6, 14, 64, 512),
    "partial-blocks": (1, 11, 13, 64, 100),
}
NAMES = ("y", "dq", "dmemory", "dscale")
LAUNCH = {"num_warps": 4, "num_stages": 2, "WARP_SPECIALIZE": False}


def draw(shape, dtype, scale=0.37, gain=1.0, seed=0):
    """q, memory and scale, and a gradient of y."""
    B, H, W, D, N = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator).to(dtype).to(DEVICE)

    q = (normal(B, D, H, W) * math.sqrt(gain)).movedim(1, -1)  # as the network has it
    memory = normal(D, N) * math.sqrt(gain)
    return [q, memory, torch.tensor(scale, device=DEVICE)], normal(B, H, W, D)


def differentiate(function, inputs, upstream, wide=False):
    """The output and the gradients of all inputs."""
    inputs = [x.double() if wide else x.clone() for x in inputs]
    for x in inputs:
        x.requires_grad_()
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, upstream.to(y.dtype))]


def check(function, definition, inputs, upstream):
    """Compare with the definition in float64 and in the same type."""
    q, memory, scale = (x.double() for x in inputs)
    rows, do = q.flatten(0, -2), upstream.double()
    do = do.expand(q.shape) / q.numel() if upstream.ndim == 0 else do
    do = do.flatten(0, -2)
    p = (scale * rows @ memory).softmax(-1)
    # the sums cancel: dS = p (dP - delta), of dq and dscale
    dp = do.abs() @ memory.abs()
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    terms = {
        "dscale": (ds * (rows.abs() @ memory.abs())).sum(),
        "dq": (ds @ memory.abs().T).max() * scale.abs() + do.abs().max() * (upstream.ndim == 0),
    }
    actual = differentiate(function, inputs, upstream)
    eager = differentiate(definition, inputs, upstream)
    exact = differentiate(definition, inputs, upstream, wide=True)
    for name, x, y, z in zip(NAMES, actual, eager, exact, strict=True):
        assert_as_accurate(name, x, y, z, inputs[0].dtype, terms=terms.get(name))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_and_its_gradients(shape, dtype):
    inputs, do = draw(shape, dtype)
    check(kernels.memory_attention, reference.memory_attention, inputs, do)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 30.0])
def test_any_scale(scale):
    """The largest logit belongs to the smallest product where the scale is negative."""
    inputs, do = draw((1, 5, 7, 16, 40), F32, scale=scale)
    check(kernels.memory_attention, reference.memory_attention, inputs, do)


def test_logits_a_hundred_times_larger():
    inputs, do = draw((1, 5, 7, 16, 40), F32, gain=100.0)
    check(kernels.memory_attention, reference.memory_attention, inputs, do)


@pytest.mark.parametrize(
    ("BLOCK_M", "BLOCK_N"), [(16, 16), (16, 128), (128, 16), (32, 64)], ids=lambda x: str(x)
)
def test_any_block_size(BLOCK_M, BLOCK_N):
    options = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, **LAUNCH}
    inputs, do = draw((1, 5, 7, 16, 70), F32, seed=BLOCK_M + BLOCK_N)
    with config.pinned("memory_forward", options), config.pinned("memory_backward", options):
        check(kernels.memory_attention, reference.memory_attention, inputs, do)


def test_chunks_of_pixels_add_up(monkeypatch):
    """Few shares of dm, many, and a last one that is short."""
    inputs, do = draw((1, 9, 9, 16, 20), F32)
    options = {"BLOCK_M": 16, "BLOCK_N": 16, **LAUNCH}
    for programs in (1, 4, 1000):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        with config.pinned("memory_backward", options):
            check(kernels.memory_attention, reference.memory_attention, inputs, do)


def test_equal_inputs_give_equal_bits():
    inputs, do = draw(SHAPES["partial-blocks"], DTYPES[-1])
    first = differentiate(kernels.memory_attention, inputs, do)
    for _ in range(2 if INTERPRETED else 100):
        again = differentiate(kernels.memory_attention, inputs, do)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_operators_are_registered_as_pytorch_expects():
    inputs, do = draw((1, 5, 7, 16, 8), F32)
    inputs = [x.contiguous().requires_grad_() for x in inputs]
    y, lse = (x.detach() for x in kernels._attention(*inputs))
    torch.library.opcheck(kernels._attention, tuple(inputs))
    detached = [x.detach() for x in inputs]
    torch.library.opcheck(kernels._attention_backward, (do, *detached, y, lse))


def test_compiles_without_a_graph_break():
    inputs, do = draw((1, 5, 7, 16, 8), F32)

    def run(q, memory, scale):
        return mana_triton.memory_attention(q, memory, scale=scale, backend="triton")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    eager = differentiate(run, inputs, do)
    for x, y in zip(differentiate(compiled, inputs, do), eager, strict=True):
        assert torch.equal(x, y)


REFUSED = {
    "channels": ((1, 2, 2, 24, 3), F32, "D must be one of 16, 32, 64, 128"),
    "type": ((1, 2, 2, 16, 3), torch.float64, "q must be float16, bfloat16 or float32"),
    "no-entries": ((1, 2, 2, 16, 0), F32, "q and memory must not be empty"),
    "no-pixels": ((1, 0, 2, 16, 3), F32, "q and memory must not be empty"),
}


@pytest.mark.parametrize(("shape", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(shape, dtype, message):
    inputs, _ = draw(shape, dtype)
    with pytest.raises(ValueError, match=message):
        kernels.memory_attention(*inputs)


@pytest.mark.skipif(INTERPRETED, reason="needs 9 GB of GPU memory")
def test_more_elements_than_a_32_bit_offset_reaches():
    q = torch.zeros(1, 4200, 4000, 128, dtype=F16, device=DEVICE)
    memory = torch.randn(128, 128, device=DEVICE).half()
    q[0, -1] = torch.randn(4000, 128, device=DEVICE).half()
    scale = torch.tensor(0.1, device=DEVICE)
    y = kernels.memory_attention(q, memory, scale)[:, -1:]
    last = q[:, -1:]
    eager, exact = (
        reference.memory_attention(x(last), x(memory), scale.to(x(last).dtype))
        for x in (torch.Tensor.clone, torch.Tensor.double)
    )
    assert_as_accurate("y", y, eager, exact, F16)
