"""The memory bank's kernels against float64, on the GPU or in Triton's interpreter.

Run by test_small_kernels.py in a process of its own: the interpreter has to be chosen before the
kernels are defined. It computes bfloat16 products wrongly, so those are for the GPU.
"""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DEVICE, DTYPES, INTERPRETED
from oracle import assert_as_accurate

import mana_triton
from mana_triton.attention import memory_loss
from mana_triton.kernels import config as tuning
from mana_triton.kernels import memory as kernels
from mana_triton.kernels import reference

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = {  # B, H, W, D, N
    "one-pixel": (1, 1, 1, 16, 3),
    "one-entry": (2, 5, 7, 16, 1),
    "odd-size": (2, 9, 17, 32, 3),
    "paper": (1, 6, 14, 64, 512),
    "partial-blocks": (1, 11, 13, 64, 100),
    "wide": (1, 3, 5, 128, 128),
    "largest": (1, 3, 3, 16, 4096),
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


def reference_loss(q, memory, scale):
    return F.l1_loss(reference.memory_attention(q, memory, scale).to(q.dtype), q)


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_loss_and_its_gradients(shape, dtype):
    inputs, _ = draw(shape, dtype, seed=1)
    check(kernels.memory_loss, reference_loss, inputs, torch.tensor(3.0, device=DEVICE))


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
    config = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, **LAUNCH}
    inputs, do = draw((1, 5, 7, 16, 70), F32, seed=BLOCK_M + BLOCK_N)
    with tuning.pinned("memory_forward", config), tuning.pinned("memory_backward", config):
        check(kernels.memory_attention, reference.memory_attention, inputs, do)
        upstream = torch.tensor(1.0, device=DEVICE)
        check(kernels.memory_loss, reference_loss, inputs, upstream)


def test_chunks_of_pixels_add_up(monkeypatch):
    """Few shares of dm, many, and a last one that is short."""
    inputs, do = draw((1, 9, 9, 16, 20), F32)
    config = {"BLOCK_M": 16, "BLOCK_N": 16, **LAUNCH}
    for programs in (1, 4, 1000):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        with tuning.pinned("memory_backward", config):
            check(kernels.memory_attention, reference.memory_attention, inputs, do)


def test_equal_inputs_give_equal_bits():
    inputs, do = draw(SHAPES["partial-blocks"], DTYPES[-1])
    first = differentiate(kernels.memory_attention, inputs, do)
    for _ in range(2 if INTERPRETED else 100):
        again = differentiate(kernels.memory_attention, inputs, do)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_public_operations_take_the_kernels(monkeypatch):
    inputs, _ = draw((1, 5, 7, 16, 8), F32)
    calls = []
    for name in ("memory_attention", "memory_loss"):
        whole = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *x, f=whole: calls.append(f) or f(*x))
    q, memory, scale = inputs
    y = mana_triton.memory_attention(q, memory, scale=scale, backend="triton")
    loss = memory_loss(q, memory, scale=scale, backend="triton")
    assert [f.__name__ for f in calls] == ["memory_attention", "memory_loss"]
    assert torch.equal(y, kernels._attention(*inputs)[0])
    assert torch.equal(loss, kernels._loss(*inputs)[0])
    for backend in ("tiled", "reference"):
        other = memory_loss(q, memory, scale=scale, backend=backend)
        assert_as_accurate("loss", loss, other, reference_loss(*map(torch.Tensor.double, inputs)),
                           F32)  # fmt: skip


def test_operators_are_registered_as_pytorch_expects():
    inputs, do = draw((1, 5, 7, 16, 8), F32)
    inputs = [x.contiguous().requires_grad_() for x in inputs]
    y, lse = (x.detach() for x in kernels._attention(*inputs))
    loss, *saved = (x.detach() for x in kernels._loss(*inputs))
    detached = [x.detach() for x in inputs]
    for operator, arguments in (
        (kernels._attention, inputs),
        (kernels._loss, inputs),
        (kernels._attention_backward, [do, *detached, y, lse]),
        (kernels._loss_backward, [loss, *detached, *saved]),
    ):
        torch.library.opcheck(operator, tuple(arguments))


@pytest.mark.parametrize("name", ["memory_attention", "memory_loss"])
def test_compiles_without_a_graph_break(name):
    function = partial(getattr(mana_triton.attention, name), backend="triton")
    inputs, do = draw((1, 5, 7, 16, 8), F32)
    upstream = do if name == "memory_attention" else torch.tensor(1.0, device=DEVICE)

    def run(q, memory, scale):
        return function(q, memory, scale=scale)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    eager = differentiate(run, inputs, upstream)
    for x, y in zip(differentiate(compiled, inputs, upstream), eager, strict=True):
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
    for function in (kernels.memory_attention, kernels.memory_loss):
        with pytest.raises(ValueError, match=message):
            function(*inputs)


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
