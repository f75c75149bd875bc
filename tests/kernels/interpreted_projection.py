"""Projections to tiles, and the attention of tiles, against float64.

Run by test_operators.py in a process of its own, on the GPU or in Triton's interpreter,
which has to be chosen before the kernels are defined. It computes bfloat16 products wrongly, so
those are for the GPU.
"""

import math
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from attention_cases import DEVICE, DTYPES, INTERPRETED
from einops import rearrange
from oracle import assert_as_accurate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

from mana_triton import MANA, MANAConfig, upscale
from mana_triton.kernels import config, cross_frame, projection, reference
from mana_triton.kernels.layout import TILE, tiles_in, to_tiles

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = {  # N, H, W, C, D
    "one-pixel": (1, 1, 1, 32, 16),
    "odd-size": (2, 9, 17, 64, 32),
    "paper": (1, 6, 14, 128, 64),
    "widest": (1, 3, 5, 256, 128),
}


@pytest.fixture(autouse=True)
def unchecked():
    """Integers are not checked for overflow, a third of the interpreter's time."""
    builder = interpreter.interpreter_builder
    options = builder.options
    builder.options = replace(options, sanitize_overflow=not INTERPRETED)
    yield
    builder.options = options


@pytest.fixture
def blocks():
    """The attention's blocks are large where the interpreter runs them one after the other."""
    with ExitStack() as stack:
        for kernel in ("cross_frame_forward", "cross_frame_lse") if INTERPRETED else ():
            options = {"BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 1}
            stack.enter_context(config.pinned(kernel, {**options, "WARP_SPECIALIZE": False}))
        yield


class Case(NamedTuple):
    """Arguments of `project` but the last two; features and weights are exact in one type."""

    f: Tensor
    norm: tuple[Tensor, Tensor]
    weights: list[Tensor]
    biases: list[Tensor]


def draw(shape, dtype, count=3, mean=0.0, seed=0) -> Case:
    """Random features with a mean and norms that differ from frame to frame."""
    N, H, W, C, D = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*size, generator=generator)

    f = (normal(N, C, H, W) + mean).to(dtype).to(DEVICE)
    scale, shift = 2 ** normal(N, C), normal(N, C) - mean
    weights = [(normal(D, C) / math.sqrt(C)).to(dtype).to(DEVICE) for _ in range(count)]
    biases = [normal(D).to(dtype).to(DEVICE) for _ in range(count)]
    return Case(
        f.contiguous(memory_format=torch.channels_last), (scale.to(DEVICE), shift.to(DEVICE)),
        weights, biases,
    )  # fmt: skip


def factor(value: float) -> Tensor:
    return torch.tensor(value, device=DEVICE)


def definition(case: Case, normalize, factors, dtype) -> list[Tensor]:
    """The rows [N, H, W, D] of every projection, each step rounded to `dtype`."""
    wide = torch.promote_types(dtype, F32)
    scale, shift = (x.to(wide)[:, None, None] for x in case.norm)
    normed = (rearrange(case.f.to(wide), "n c h w -> n h w c") * scale + shift).to(dtype)
    rows = []
    for w, b, unit, by in zip(case.weights, case.biases, normalize, factors, strict=True):
        y = F.linear(normed, w.to(dtype), b.to(dtype))
        y = F.normalize(y, dim=-1) if unit else y
        rows.append(y if by is None else (y.to(wide) * by.to(wide)).to(dtype))
    return rows


def absolute_terms(case: Case, normalize, factors) -> list[Tensor]:
    """What the rounding of the folded weights is in proportion to, of every projection.

    Each weight is off by at most half an eps of itself, and so a row y by half an eps of
    sum_c |W_dc a_c f_c|, plus what y itself is rounded by. Dividing y by its length divides the
    length of that error, too, and takes away its part along y.
    """
    scale, shift = (x.double()[:, :, None, None] for x in case.norm)
    terms = []
    for w, b, unit, by in zip(case.weights, case.biases, normalize, factors, strict=True):
        w, b = w.double(), b.double()
        y = torch.einsum("dc,nchw->nhwd", w, case.f.double() * scale + shift) + b
        most = torch.einsum("dc,nchw->nhwd", w.abs(), (case.f.double() * scale).abs() + shift.abs())
        most += b.abs()
        if unit:
            most = most.norm(dim=-1) / y.norm(dim=-1)
        terms.append(most if by is None else most * by.double().abs())
    return terms


def check(case: Case, normalize, factors) -> None:
    """Compare with the definition in float64 and in the same type; zeros surround the frame."""
    dtype = case.f.dtype
    actual = projection.project(*case, normalize, factors)
    eager = definition(case, normalize, factors, dtype)
    exact = definition(case, normalize, factors, torch.float64)
    terms = absolute_terms(case, normalize, factors)
    beyond = to_tiles(torch.ones_like(exact[0])) == 0
    for j, (x, y, z, most) in enumerate(zip(actual, eager, exact, terms, strict=True)):
        assert x.dtype == dtype and x.is_contiguous()
        assert_as_accurate(f"projection {j}", x, to_tiles(y), to_tiles(z), dtype, terms=most)
        assert (x[beyond] == 0).all()


@TYPES
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_accuracy(shape, dtype):
    check(draw(shape, dtype), (True, False, False), (factor(3.7), None, factor(-0.2)))


@TYPES
@pytest.mark.parametrize("count", [1, 2, 3])
def test_any_number_of_projections(count, dtype):
    case = draw((1, 5, 11, 32, 16), dtype, count, seed=count)
    for unit, by in product((False, True), (None, factor(12.0))):
        check(case, [unit] * count, [by] * count)


@TYPES
def test_features_far_from_zero(dtype):
    """A mean of 30 deviations, which the norm takes away: its terms cancel."""
    check(draw((2, 9, 9, 64, 32), dtype, mean=30.0), (False, True, False), [None] * 3)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_weights_are_rounded_once(dtype):
    """1 + eps / 2 alone rounds to 1; times the scale 3 / 2 it rounds to 3 / 2 + eps."""
    eps = torch.finfo(dtype).eps
    f = torch.ones(1, 32, 8, 16, dtype=dtype, device=DEVICE)
    zeros = torch.zeros(1, 32, device=DEVICE)
    weight = torch.full((16, 32), 1 + eps / 2, device=DEVICE)
    (y,) = projection.project(f, (zeros + 1.5, zeros), [weight], [zeros[0, :16]], [False], [None])
    assert (y == 32 * (1.5 + eps)).all()


def test_a_row_of_length_zero_stays_zero():
    case = draw((1, 3, 4, 32, 16), F32, 1)
    zero = torch.zeros_like(case.norm[0])
    (y,) = projection.project(
        case.f, (zero, zero), case.weights, [torch.zeros_like(case.biases[0])], [True], [None]
    )
    assert (y == 0).all()


def test_the_order_in_memory_changes_nothing():
    """Channels first, and rows cut from a frame."""
    case = draw((2, 12, 18, 32, 16), F16)
    options = (True, False, False), [None] * 3
    whole = projection.project(*case, *options)
    again = projection.project(case.f.contiguous(), *case[1:], *options)
    assert all(torch.equal(x, y) for x, y in zip(whole, again, strict=True))
    rows = projection.project(case.f[:, :, 8:12], *case[1:], *options)
    last = tiles_in(4, 18)[1] * TILE * TILE
    assert all(torch.equal(x[:, -last:], y) for x, y in zip(whole, rows, strict=True))


# --- with GroupNorm and the attention, as in the network


def group_norm(C: int, generator: torch.Generator) -> nn.GroupNorm:
    norm = nn.GroupNorm(C // 4, C, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(C, generator=generator))
        norm.bias.copy_(torch.randn(C, generator=generator))
    return norm.to(DEVICE).requires_grad_(False)


def statistics(f: Tensor, norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """GroupNorm as a scale and a shift of every channel, as of `MANA.normalization`."""
    groups = rearrange(f.float(), "n (g c) h w -> n g (c h w)", g=norm.num_groups)
    each = norm.num_channels // norm.num_groups
    variance, mean = torch.var_mean(groups, 2, correction=0)
    deviation = (variance + norm.eps).sqrt().repeat_interleave(each, 1)
    scale = norm.weight / deviation
    return scale, norm.bias - mean.repeat_interleave(each, 1) * scale


def draw_clip(dtype, seed=0, size=(9, 13)):
    """Features of 2 frames, GroupNorm's numbers of each, weights of q, k and v."""
    case = draw((2, *size, 32, 16), dtype, seed=seed)
    norm = group_norm(32, torch.Generator().manual_seed(seed))
    return case._replace(norm=statistics(case.f, norm))


def attend(case: Case, sigma, scale, unit, first_row, rows, **options):
    """Attention of some rows of frame 1 on all frames, through tiles alone."""
    height, width = case.f.shape[2:]
    k, v = projection.project(
        *case[:2], case.weights[1:], case.biases[1:], (unit, False), (None, None)
    )
    center = case.f[1:2, :, first_row : first_row + rows]
    (q,) = projection.project(
        center, (case.norm[0][1:2], case.norm[1][1:2]), case.weights[:1], case.biases[:1],
        (unit,), (scale * cross_frame.LOG2_E,),
    )  # fmt: skip
    return cross_frame.attend_tiles(
        q, k[None], v[None], sigma,
        rows=rows, height=height, width=width, first_row=first_row, **options,
    )  # fmt: skip


@TYPES
@pytest.mark.parametrize(
    ("gaussian", "unit", "first_row", "rows"), [("bias", True, 0, 9), ("gate", False, 3, 5)]
)
def test_attention_of_projections(gaussian, unit, first_row, rows, dtype, blocks):
    case = draw_clip(dtype, seed=2)
    sigma, scale = factor(2.0), factor(6.0 if unit else 0.25)
    options: dict[str, Any] = {"gaussian": gaussian, "offsets": True}
    actual = attend(case, sigma, scale, unit, first_row, rows, tolerance=0, **options)
    expected = []
    for wide in (dtype, torch.float64):
        q, k, v = definition(case, (unit, unit, False), [None] * 3, wide)
        result = reference.cross_frame_attention(
            q[1:2, first_row : first_row + rows], k[None], v[None], sigma.to(wide), scale.to(wide),
            first_row=first_row, **options,
        )  # fmt: skip
        expected.append((result.o, result.displacement, result.lse))
    for name, x, y, z in zip(("o", "displacement", "lse"), actual, *expected, strict=False):
        assert_as_accurate(name, x, y, z, dtype)


class Operators(TorchDispatchMode):
    """Names of the operators of PyTorch that run within."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket._qualified_op_name)
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(blocks):
    """No value goes to the host, no number comes from it: a CUDA graph may hold all of it."""
    case = draw_clip(F16, size=(5, 11))
    norm = group_norm(32, torch.Generator().manual_seed(4))
    sigma, scale = factor(2.0), factor(0.25)

    def run():
        clip = case._replace(norm=statistics(case.f, norm))
        attend(clip, sigma, scale, True, 0, 5, gaussian="gate", offsets=True, tolerance=1e-3)

    with Operators() as operators:
        run()
    assert "aten::var_mean" in operators.names
    # what item, torch.tensor, boolean indexing and to do
    waits = ("_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal")
    assert not operators.names & {f"aten::{x}" for x in waits}


def test_far_addresses():
    """Two frames whose elements lie more than 2^31 apart, as in a batch of large ones."""
    torch.use_deterministic_algorithms(False)  # else all would be filled; hardly any is touched
    C, D, rows = 64, 32, (1 << 21) + 8
    case = draw((2, 8, 16, C, D), F16, 1)
    (expected,) = projection.project(*case, [False], [None])
    f = torch.empty(2, rows, 16, C, dtype=F16, device=DEVICE)
    f[:, :8] = rearrange(case.f, "n c h w -> n h w c")
    folded = case.weights[0].float() * case.norm[0][:, None]
    offset = case.biases[0] + (case.weights[0].float() * case.norm[1][:, None]).sum(-1)
    y = torch.empty(2, rows * 16, D, dtype=F16, device=DEVICE)
    kernel: Any = projection._project_kernel
    kernel[(1, 2)](
        f, folded[:, None].half(), offset[:, None], (None,), (y,), rows, 16, 2, rows * 16,
        C=C, D=D, J=1, NORMALIZE=(False,), **projection.launch_config(D, F16),
    )  # fmt: skip
    assert_as_accurate("y", y[:, :128], expected, expected.double(), F16)


REFUSED: list[tuple[dict, str]] = [
    (
        {"f": torch.zeros(1, 32, 2, 3).double()},
        "bfloat16 or float32, got D=16",
    ),
    ({"f": torch.zeros(1, 24, 2, 3)}, "C one of 32, 64, 128, 256"),
    ({"f": torch.zeros(1, 32, 0, 3)}, "not empty"),
    ({"biases": [torch.ones(16, requires_grad=True)]}, "must be called without gradients"),
    ({"norm": (torch.ones(32), torch.ones(32))}, r"norm must be \[1, 32\], got \[32\]"),
    ({"factors": [None] * 2}, "equally many, 1 to 3, got 1, 1, 1, 2"),
    ({"weights": [torch.ones(24, 32)]}, "D in 16, 32, 64, 128 and .*, got D=24"),
    ({"biases": [torch.ones(32)]}, r"biases must be \[16\], got \[32\]"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes, message):
    arguments = draw((1, 2, 3, 32, 16), F32, 1)._asdict()
    arguments |= {"normalize": [False], "factors": [None]} | changes
    with pytest.raises(ValueError, match=message):
        projection.project(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 128, 32)}, r"q must be \[1, 256, 16\], tiles of 9 rows"),
        ({"v": torch.zeros(1, 2, 128, 16)}, r"v must be \[1, 3, 256, 16\]"),
        ({"height": 17}, r"k must be \[1, 3, 384, 16\], tiles of 9 rows of 17 x 16 pixels"),
        (
            {"v": torch.zeros(1, 3, 256, 16).half()},
            "v must be torch.float32 like q",
        ),
        ({"k": torch.zeros(1, 3, 256, 24)}, "D in 16, 32, 64, 128 and .*, got D=24"),
    ],
)
def test_refused_tiles(changes, message):
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 256, 16), "k": torch.zeros(1, 3, 256, 16),
        "v": torch.zeros(1, 3, 256, 16), "rows": 9, "height": 9, "width": 16,
    } | changes  # fmt: skip
    with pytest.raises(ValueError, match=message):
        cross_frame.attend_tiles(
            **arguments, sigma=torch.tensor(1.0), first_row=0, gaussian="bias", offsets=False,
            tolerance=0,
        )  # fmt: skip


@pytest.mark.skipif(not INTERPRETED, reason="test_operators.py compares streams on a GPU")
@pytest.mark.parametrize(
    "options",
    [{"match": "cosine", "offsets": True}, {"gaussian": "gate", "memory_slots": 0}],
    ids=str,
)
def test_batches_of_tiles_equal_a_stream_without_triton(options, blocks):
    """Rings of tiles, projections that write them, attention that reads them: a whole stream."""
    torch.manual_seed(0)
    sizes = {"channels": 32, "encoder_blocks": 1, "decoder_blocks": 1, "memory_slots": 8}
    model = MANA(MANAConfig(**sizes | options))
    for layer in (model.w_z, model.conv_last):
        nn.init.normal_(layer.weight, std=0.1)
    frames = torch.rand(3, 3, 5, 17)

    def enlarged(frames: Tensor, **how: Any) -> Tensor:
        pictures = upscale(frames, model, device=DEVICE, scene_cuts=False, **how)
        return torch.stack([torch.as_tensor(x) for x in pictures])

    rows, frozen = (enlarged(x, backend="tiled") for x in (frames, frames[:1]))
    assert (frozen[0] - rows[0]).abs().max() > 1e-3, "neighbors must matter here"
    tiles = enlarged(frames, backend="triton", batch=2)
    assert (tiles - rows).abs().max() <= 1e-5  # of float32 sums in another order
