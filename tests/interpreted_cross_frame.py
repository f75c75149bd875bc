"""The cross-frame kernels against float64, on the GPU or in Triton's interpreter.

Run by test_cross_frame_kernel.py in a process of its own: the interpreter has to be chosen before
the kernels are defined. It computes bfloat16 products wrongly, so those are for the GPU.
"""

import math
import random
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from attention_cases import (
    ADVERSARIES,
    DEVICE,
    DTYPES,
    INTERPRETED,
    NAMES,
    Case,
    absolute_terms,
    assert_case,
    draw,
    run,
)
from oracle import assert_as_accurate
from torch.library import opcheck
from triton.runtime import interpreter

from mana_triton import MANA, MANAConfig, cross_frame_attention
from mana_triton.attention import choose_backend
from mana_triton.kernels import cross_frame, reference, tuning

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = ("cross_frame_forward", "cross_frame_lse", "cross_frame_dq", "cross_frame_dkv")
FORMS = pytest.mark.parametrize("gaussian", ["bias", "gate"])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = {  # B, T, H, W, D
    "one-pixel": (1, 1, 1, 1, 16),
    "one-row": (1, 2, 1, 21, 32),
    "one-column": (1, 1, 19, 1, 16),
    "batch-of-four": (4, 1, 7, 3, 16),
    "seven-frames": (1, 7, 3, 5, 16),
    "odd-size": (1, 1, 17, 31, 64),
    "whole-tiles": (1, 1, 8, 32, 16),
    "widest": (1, 1, 6, 11, 128),
}
BLOCKS = ((64, 64), (64, 128), (128, 64), (128, 128))  # the interpreter is slow with small ones


@pytest.fixture(autouse=True)
def poisoned():
    """Uninitialized memory holds NaN: an element that a kernel forgets shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # pyright: ignore[reportAttributeAccessIssue]
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def unchecked(request):
    """Only one test needs every integer checked for overflow, a third of the interpreter's time."""
    if not INTERPRETED or request.node.name == "test_far_addresses":
        yield
        return
    builder = interpreter.interpreter_builder
    options = builder.options
    builder.options = replace(options, sanitize_overflow=False)
    yield
    builder.options = options


@pytest.fixture
def blocks(request):
    """Each kernel runs with blocks of its own, drawn by the name of the test."""
    with ExitStack() as stack:
        choose = random.Random(request.node.name).choice
        for kernel in KERNELS:
            pin(stack, kernel, *choose(BLOCKS))
        yield


def pin(stack: ExitStack, kernel: str, block_m: int, block_n: int, specialize=False) -> None:
    config = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
    stack.enter_context(tuning.pinned(kernel, {**config, "WARP_SPECIALIZE": specialize}))


def on_device(case: Case) -> Case:
    return Case(*(x.to(DEVICE) for x in case))


@TYPES
@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, gaussian, dtype, blocks):
    assert_case(on_device(draw(SHAPES[shape], dtype)), gaussian, "triton")


@TYPES
@FORMS
def test_cosine_matching(gaussian, dtype, blocks):
    assert_case(
        on_device(draw((1, 2, 9, 14, 32), dtype, scale=12.0, seed=1)),
        gaussian,
        "triton",
        match="cosine",
    )


@TYPES
@pytest.mark.parametrize("sigma", [0.3, 100.0, 1e6])
def test_any_width_of_the_gaussian(sigma, dtype, blocks):
    assert_case(on_device(draw((1, 1, 9, 19, 16), dtype, sigma=sigma, seed=2)), "bias", "triton")


@TYPES
@FORMS
def test_large_logits(gaussian, dtype, blocks):
    """A hundred times those of the other tests: next to a hard maximum."""
    assert_case(on_device(draw((1, 1, 9, 19, 16), dtype, gain=100, seed=3)), gaussian, "triton")


@TYPES
@FORMS
def test_infinite_width_is_plain_attention(gaussian, dtype, blocks):
    case = on_device(draw((1, 2, 7, 18, 16), dtype, sigma=math.inf, seed=4))
    actual = cross_frame_attention(*case[:4], gaussian=gaussian, backend="triton")

    def plain(*tensors):
        q, k, v = (x.flatten(-3, -2) for x in tensors)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).unflatten(2, (7, 18))

    inputs = (case.q[:, None].expand(case.k.shape), case.k, case.v)
    exact = plain(*(x.double() for x in inputs))
    assert_as_accurate("o", actual, plain(*inputs), exact, dtype)


@pytest.mark.parametrize(("bands", "gaussian"), [([8], "bias"), ([5, 9], "bias"), ([5], "gate")])
def test_bands_of_rows_are_the_whole_frame(bands, gaussian, blocks):
    """Also where a band begins within a tile of the keys."""
    assert_case(
        on_device(draw((1, 1, 13, 17, 16), sigma=2.0, seed=5)), gaussian, "triton", bands=bands
    )


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("block", [64, 128])
def test_descriptors(block, dtype):
    """The form that sm_90 specializes; float32 has none."""
    if not INTERPRETED and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs Hopper's tensor memory accelerator")
    case = on_device(draw((1, 1, 9, 18, 16), dtype, seed=6))
    with ExitStack() as stack:
        pin(stack, "cross_frame_forward", 128, block, specialize=True)
        actual = run(case, "triton", tolerance=0, gradients=False)
    exact = run(case, "reference", wide=True, gradients=False)
    eager = run(case, "reference", gradients=False)
    for name, x, y, z in zip(NAMES, actual, eager, exact, strict=False):
        assert_as_accurate(name, x, y, z, dtype)


# --- what is visited


def masked_reference(case: Case, halo: torch.Tensor):
    """Bias form in float64 where a query tile sees the key tiles in its halo, and no others."""
    q, k, v, sigma, scale = (x.double().requires_grad_() for x in case[:5])
    height, width = k.shape[2:4]
    pixels = reference.pixel_coordinates(0, height, width, q)
    y, x = pixels.long().unbind(-1)
    halo = halo[..., y // 8 * -(-width // 16) + x // 16][..., None]  # [B, T, HW, 1]
    gap_y = torch.maximum(
        y // 8 * 8 - (y[:, None] // 8 * 8 + 7), y[:, None] // 8 * 8 - y // 8 * 8 - 7
    )
    gap_x = torch.maximum(
        x // 8 * 8 - (x[:, None] // 16 * 16 + 15), x[:, None] // 16 * 16 - x // 8 * 8 - 7
    )
    distance = (pixels[:, None] - pixels).square().sum(-1)
    logits = scale * torch.einsum("bid,btjd->btij", q.flatten(1, 2), k.flatten(2, 3))
    logits = logits - distance / (2 * sigma**2)
    logits = logits.masked_fill(torch.maximum(gap_y, gap_x) > halo, -math.inf)
    a = logits.softmax(-1)
    o = (a @ v.flatten(2, 3)).unflatten(2, (height, width))
    displacement = (a @ pixels - pixels).unflatten(2, (height, width))
    outputs = [o, displacement, logits.logsumexp(-1).unflatten(2, (height, width))]
    grads = [w.double() for w in case[5:]]
    fraction = (torch.maximum(gap_y, gap_x) <= halo).double().mean()
    return outputs + list(torch.autograd.grad(outputs, [q, k, v, sigma, scale], grads)), fraction


@pytest.mark.parametrize(
    ("sizes", "dtype"), [((64, 64, 64), F16), ((128, 64, 32), F32), ((128, 32, 64), F16)], ids=str
)
def test_any_plan(sizes, dtype, monkeypatch):
    """Whatever halos a plan gives, forward and backward visit the same pairs."""
    case = on_device(draw((1, 1, 18, 20, 16), dtype, sigma=3.0, seed=7))
    generator = torch.Generator().manual_seed(0)
    halo = (torch.randint(0, 3, (1, 1, 6), generator=generator) * 8).int().to(DEVICE)
    monkeypatch.setattr(cross_frame, "plan", lambda *args: halo)
    exact, fraction = masked_reference(case, halo)
    eager = run(case, "reference")
    forward, moving, still = sizes
    with ExitStack() as stack:
        pin(stack, "cross_frame_forward", forward, 64)
        pin(stack, "cross_frame_dq", still, moving)
        pin(stack, "cross_frame_dkv", moving, still)
        actual = run(case, "triton")
        visited = cross_frame_attention(*case[:4], backend="triton", return_visited=True)[1]
    assert visited == pytest.approx(fraction.item(), abs=1e-6) and visited < 0.8
    terms = absolute_terms(case, "bias", "dot")
    dense = run(case, "reference", wide=True)
    for name, x, y, z, whole in zip(NAMES, actual, eager, exact, dense, strict=True):
        # the reference's own error, of the dense attention, is the yardstick
        y = y.double() - whole + z
        assert_as_accurate(name, x, y, z, dtype, terms=terms.get(name))


@pytest.mark.parametrize("radius", [0, 8])
def test_fixed_radius(radius):
    case = on_device(draw((1, 1, 17, 33, 16), seed=8))
    with ExitStack() as stack:
        pin(stack, "cross_frame_forward", 128, 64)
        result = cross_frame.forward(
            *case[:5], gaussian="bias", offsets=True, tolerance=0, first_row=0, radius=radius
        )
    exact, fraction = masked_reference(case, result.halo)
    assert (result.halo == radius).all()
    eager = run(case, "reference", gradients=False)
    dense = run(case, "reference", wide=True, gradients=False)
    for name, x, y, z, whole in zip(NAMES, result[:3], eager, exact[:3], dense, strict=False):
        assert_as_accurate(name, x, y.double() - whole + z, z, F32)
    visited = cross_frame.visited_fraction(result, case.q, case.k, 0)
    assert visited.item() == pytest.approx(fraction.item(), abs=1e-6) and visited < 1


@pytest.mark.parametrize(
    ("name", "eta", "gaussian"),
    [
        ("cluster-20.0", 0.5, "bias"),
        ("row-cluster-5.0", 1e-3, "bias"),
        ("uniform-1.0", 0.5, "bias"),
        ("random-x1", 1e-3, "gate"),
        ("random-x100", 1e-3, "bias"),
    ],
)
def test_certificate(name, eta, gaussian):
    """What is dropped changes o by at most eta (max|v| + |o|); see test_attention.py."""
    case = on_device(ADVERSARIES[name])
    options: dict[str, Any] = {"gaussian": gaussian, "gradients": False}
    exact = run(case, "reference", wide=True, **options)
    eager = run(case, "reference", **options)
    with ExitStack() as stack:
        for kernel in KERNELS[:2]:
            pin(stack, kernel, 128, 64)
        result = cross_frame.forward(
            *case[:5], gaussian=gaussian, offsets=True, tolerance=eta, first_row=0
        )
    actual = result[:3]
    visited = cross_frame.visited_fraction(result, case.q, case.k, 0).item()
    assert visited == 1 if name == "random-x100" else visited < 1
    size = max(case.q.shape[1:3])
    promised = [eta * (case.v.abs().max() + actual[0].abs()), eta * (size + actual[1].abs()), eta]
    for label, x, y, z, most in zip(NAMES, actual, eager, exact, promised, strict=False):
        # the truth is finite even where the frame's far side decides
        assert_as_accurate(label, x, y, z, F32, promised=most)


@pytest.mark.parametrize("dtype", DTYPES[:1], ids=str)
def test_the_plan_is_as_tight_as_the_other_backend(dtype):
    """No looser than twice the pairs that the PyTorch path visits, at logits of a trained model."""
    case = on_device(draw((1, 1, 56, 72, 16), dtype, sigma=1.5, seed=9))
    normalize = torch.nn.functional.normalize
    q, k = normalize(case.q, dim=-1), normalize(case.k, dim=-1)
    c = cross_frame._steepness(case.sigma)
    frames = cross_frame._Frames.of(q, k, 0)
    scale = torch.tensor(4.0, device=DEVICE)
    halo = cross_frame.plan(
        cross_frame.to_tiles(cross_frame._scaled(q, scale)), cross_frame.to_tiles(k), c, frames,
        1e-3, None,
    )  # fmt: skip
    empty = torch.empty(0)
    result = cross_frame.Result(empty, empty, empty, empty, halo)
    visited = cross_frame.visited_fraction(result, q, k, 0).item()
    _, tiled = cross_frame_attention(
        q, k, case.v, case.sigma, scale=4.0, tolerance=1e-3, backend="tiled", return_visited=True
    )
    assert 0.05 < visited < 2 * tiled < 1


# --- the rest


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@FORMS
def test_equal_inputs_give_equal_bits(gaussian, dtype, blocks):
    case = on_device(draw((1, 2, 9, 15, 16), dtype, seed=10))
    first = run(case, "triton", gaussian=gaussian)
    for _ in range(1 if INTERPRETED else 100):
        for name, x, y in zip(NAMES, first, run(case, "triton", gaussian=gaussian), strict=True):
            assert torch.equal(x, y), name


@FORMS
@pytest.mark.parametrize("offsets", [True, False])
def test_operator(offsets, gaussian):
    """Fake implementation, autograd and schema agree with what the kernels do."""
    case = on_device(draw((1, 2, 5, 6, 16), seed=11))
    inputs = [x.clone().requires_grad_() for x in case[:5]]
    arguments = (*inputs, gaussian, offsets, 1e-6, 0, "triton", True)
    opcheck(torch.ops.mana.cross_frame_attention.default, arguments)


def test_far_addresses():
    """Two clips whose keys lie more than 2^31 elements apart, as at 540 x 960 with D = 128."""
    D, pixels = 64, (1 << 25) + 128
    torch.use_deterministic_algorithms(False)  # else 4 GiB would be filled; hardly any is touched
    huge = torch.empty((pixels + 128) * D, dtype=F16, device=DEVICE)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 128, D, generator=generator).half().to(DEVICE)
    huge[: 128 * D] = values[0].flatten()
    huge[pixels * D :] = values[1].flatten()
    q = (values[1:] * 0.2).repeat(2, 1, 1)
    c = torch.zeros((), device=DEVICE)
    frames = cross_frame._Frames(2, 1, D, 8, 8, 16, 0)
    config = {"BLOCK_M": 128, "BLOCK_N": 128}
    tables = cross_frame._Tables.build(frames, c, q, config)
    o = torch.empty(2, 1, 8, 16, D, dtype=F16, device=DEVICE)
    lse = torch.empty(2, 1, 8, 16, device=DEVICE)
    halo = torch.full((2, 1, 1), 16, dtype=torch.int32, device=DEVICE)
    constants: dict[str, Any] = {"D": D, "OFFSETS": False, "EXACT": False, "num_warps": 8}
    kernel: Any = cross_frame._forward_kernel
    kernel[(1, 1, 2)](
        q, huge, huge, tables.query, tables.key, c, halo, o, lse, lse,
        2, 1, 8, 8, 16, 0, 2, 128, pixels, *tables[2:], WARP_SPECIALIZE=False,
        **constants, **config,
    )  # fmt: skip
    p = torch.softmax(q.double() @ values.double().mT * math.log(2), -1)
    expected = cross_frame.to_tiles(o[:, 0])
    exact = p @ values.double()
    assert_as_accurate("o", expected, exact.half(), exact, F16)


def test_the_network(blocks):
    config = MANAConfig(
        channels=32, encoder_blocks=1, decoder_blocks=1, memory_slots=4, frames=3,
        match="cosine", offsets=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = MANA(config).to(DEVICE)
    torch.nn.init.normal_(model.w_z.weight)
    frames = torch.rand(1, 3, 3, 9, 12, device=DEVICE)
    results = []
    for backend in ("tiled", "triton", "reference"):
        model.backend = backend
        enlarged = model(frames)
        parameters = [x for name, x in model.named_parameters()]
        results.append([enlarged, *torch.autograd.grad(enlarged.square().mean(), parameters)])
    for tiled, ours, eager in zip(*results, strict=True):
        # three ways to round: no farther from one than the other two are from each other
        scale = eager.abs().max()
        assert (ours - eager).abs().max() <= 4 * (tiled - eager).abs().max() + 1e-5 * scale


REFUSED = {
    "channels": ((1, 1, 3, 4, 24), F32, "D in 16, 32, 64, 128"),
    "float64": ((1, 1, 3, 4, 16), torch.float64, "float16, bfloat16 or float32"),
}


@pytest.mark.parametrize(("shape", "dtype", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(shape, dtype, message):
    case = on_device(draw(shape, dtype))
    with pytest.raises(ValueError, match=message):
        cross_frame_attention(*case[:4], backend="triton")


def test_backend():
    assert choose_backend("triton", torch.device(DEVICE)) == ("triton", "as asked")
