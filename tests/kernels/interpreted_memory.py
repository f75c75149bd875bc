"""The memory bank's kernels against float64, on the GPU or in Triton's interpreter.

Run by test_operators.py in a process of its own: the interpreter has to be chosen before the
kernels are defined. It computes bfloat16 products wrongly, so those are for the GPU.
"""

import pytest
import torch
from attention_cases import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    assert_memory,
    differentiate,
    draw_memory,
)
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
LAUNCH = {"num_warps": 4, "num_stages": 2, "WARP_SPECIALIZE": False}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_and_its_gradients(shape, dtype):
    inputs, do = draw_memory(shape, dtype)
    assert_memory(kernels.memory_attention, inputs, do)


@pytest.mark.parametrize("scale", [-0.5, 0.0, 30.0])
def test_any_scale(scale):
    """The largest logit belongs to the smallest product where the scale is negative."""
    inputs, do = draw_memory((1, 5, 7, 16, 40), F32, scale=scale)
    assert_memory(kernels.memory_attention, inputs, do)


def test_large_logits():
    inputs, do = draw_memory((1, 5, 7, 16, 40), F32, gain=100.0)
    assert_memory(kernels.memory_attention, inputs, do)


@pytest.mark.parametrize(
    ("BLOCK_M", "BLOCK_N"), [(16, 16), (16, 128), (128, 16), (32, 64)], ids=lambda x: str(x)
)
def test_any_block_size(BLOCK_M, BLOCK_N):
    options = {"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, **LAUNCH}
    inputs, do = draw_memory((1, 5, 7, 16, 70), F32, seed=BLOCK_M + BLOCK_N)
    with config.pinned("memory_forward", options), config.pinned("memory_backward", options):
        assert_memory(kernels.memory_attention, inputs, do)


def test_chunks_of_pixels_add_up(monkeypatch):
    """Few shares of dm, many, and a last one that is short."""
    inputs, do = draw_memory((1, 9, 9, 16, 20), F32)
    options = {"BLOCK_M": 16, "BLOCK_N": 16, **LAUNCH}
    for programs in (1, 4, 1000):
        monkeypatch.setattr(kernels, "PROGRAMS", programs)
        with config.pinned("memory_backward", options):
            assert_memory(kernels.memory_attention, inputs, do)


def test_equal_inputs_give_equal_bits():
    inputs, do = draw_memory(SHAPES["partial-blocks"], DTYPES[-1])
    first = differentiate(kernels.memory_attention, inputs, do)
    for _ in range(2 if INTERPRETED else 100):
        again = differentiate(kernels.memory_attention, inputs, do)
        assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_operators_are_registered_as_pytorch_expects():
    inputs, do = draw_memory((1, 5, 7, 16, 8), F32)
    inputs = [x.contiguous().requires_grad_() for x in inputs]
    y, lse = (x.detach() for x in kernels._attention(*inputs))
    torch.library.opcheck(kernels._attention, tuple(inputs))
    detached = [x.detach() for x in inputs]
    torch.library.opcheck(kernels._attention_backward, (do, *detached, y, lse))


def test_compiles_without_a_graph_break():
    inputs, do = draw_memory((1, 5, 7, 16, 8), F32)

    def run(q, memory, scale):
        return mana_triton.memory_attention(q, memory, scale=scale, backend="triton")

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    eager = differentiate(run, inputs, do)
    for x, y in zip(differentiate(compiled, inputs, do), eager, strict=True):
        assert torch.equal(x, y)


REFUSED = {
    "channels": ((1, 2, 2, 24, 3), F32, "D in 16, 32, 64, 128"),
    "type": ((1, 2, 2, 16, 3), torch.float64, "float16, bfloat16 or float32, got"),
    "no-entries": ((1, 2, 2, 16, 0), F32, "q and memory must not be empty"),
    "no-pixels": ((1, 0, 2, 16, 3), F32, "q and memory must not be empty"),
}


@pytest.mark.parametrize(("shape", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(shape, dtype, message):
    inputs, _ = draw_memory(shape, dtype)
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
