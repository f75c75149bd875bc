"""The cross-frame kernels against float64, on the GPU or in Triton's interpreter.

Run by test_operators.py in a process of its own: the interpreter has to be chosen before
the kernels are defined. It computes bfloat16 products wrongly, so those are for the GPU.
"""

import math
import random
import sys
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

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
from mana_triton.kernels import config, cross_frame, reference
from mana_triton.kernels.cross_frame import gaussian as gaussian_tables
from mana_triton.kernels.cross_frame.backward import _dkv_kernel, scaled
from mana_triton.kernels.cross_frame.forward import _forward_kernel, attend_tiles
from mana_triton.kernels.cross_frame.window import select_key_tiles
from mana_triton.kernels.layout import Sizes, to_tiles

pytestmark = pytest.mark.usefixtures("poisoned")

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
KERNELS = ("cross_frame_forward", "cross_frame_lse", "cross_frame_dq", "cross_frame_dkv")
FORMS = pytest.mark.parametrize("gaussian", ["bias", "gate"])
TYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SHAPES = {  # B, T, H, W, D
    "one-pixel": (1, 1, 1, 1, 16),
    "one-row": (1, 2, 1, 21, 32),
    "two-clips": (2, 3, 7, 3, 16),
    "odd-size": (1, 1, 11, 19, 64),
    "widest": (1, 1, 6, 11, 128),
}
BLOCKS = ((64, 64), (64, 128), (128, 64), (128, 128))  # the interpreter is slow with small ones
SMALL_BLOCKS = ((32, 32), (32, 64), (64, 32))  # what a GPU with 99 KiB has room for in float32


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
        given = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        large = given.get("dtype", F32) == F32 or given.get("shape") == "widest"
        for kernel in KERNELS:
            pin(stack, kernel, *choose(SMALL_BLOCKS if large and not INTERPRETED else BLOCKS))
        yield


def pin(stack: ExitStack, kernel: str, block_m: int, block_n: int, specialize=False) -> None:
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4, "num_stages": 1}
    stack.enter_context(config.pinned(kernel, {**options, "WARP_SPECIALIZE": specialize}))


def on_device(case: Case) -> Case:
    return Case(*(x.to(DEVICE) for x in case))


@TYPES
@FORMS
@pytest.mark.parametrize("shape", SHAPES)
def test_accuracy(shape, gaussian, dtype, blocks):
    assert_case(on_device(draw(SHAPES[shape], dtype)), gaussian, "triton")


@TYPES
def test_cosine_matching(dtype, blocks):
    case = draw((1, 2, 9, 14, 32), dtype, scale=12.0, seed=1)
    assert_case(on_device(case), "bias", "triton", match="cosine")


@TYPES
@pytest.mark.parametrize("sigma", [0.3, 1e6])
def test_any_sigma(sigma, dtype, blocks):
    assert_case(on_device(draw((1, 1, 9, 19, 16), dtype, sigma=sigma, seed=2)), "bias", "triton")


@TYPES
def test_a_gaussian_far_narrower_than_a_pixel(dtype, blocks):
    """Every pixel sees itself alone."""
    case = on_device(draw((1, 1, 9, 19, 16), dtype, sigma=0.005, seed=2))
    actual = cross_frame_attention(*case[:4], backend="triton")
    assert torch.equal(actual, case.v)


@TYPES
@pytest.mark.parametrize(("sigma", "gaussian"), [(0.3, "gate"), (4.0, "bias")])
def test_large_logits(sigma, gaussian, dtype, blocks):
    """A hundred times those of the other tests: nearly a hard maximum."""
    case = draw((1, 1, 9, 19, 16), dtype, sigma=sigma, gain=100, seed=3)
    assert_case(on_device(case), gaussian, "triton")


@FORMS
def test_infinite_sigma_gives_plain_attention(gaussian, blocks):
    case = on_device(draw((1, 2, 7, 18, 16), F16, sigma=math.inf, seed=4))
    actual = cross_frame_attention(*case[:4], gaussian=gaussian, backend="triton")

    def plain(*tensors):
        q, k, v = (x.flatten(-3, -2) for x in tensors)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v).unflatten(2, (7, 18))

    inputs = (case.q[:, None].expand(case.k.shape), case.k, case.v)
    exact = plain(*(x.double() for x in inputs))
    assert_as_accurate("o", actual, plain(*inputs), exact, F16)


@pytest.mark.parametrize(("bands", "gaussian"), [([5, 9], "bias"), ([8], "gate")])
def test_bands_of_rows_equal_the_whole_frame(bands, gaussian, blocks):
    """Also where a band starts inside a tile of the keys."""
    case = on_device(draw((1, 1, 13, 17, 16), sigma=2.0, seed=5))
    assert_case(case, gaussian, "triton", bands=bands)


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


# --- what is density


def masked_reference(case: Case, radius: torch.Tensor):
    """Bias form in float64 where a tile of queries sees the tiles in its radius, and no others."""
    q, k, v, sigma, scale = (x.double().requires_grad_() for x in case[:5])
    height, width = k.shape[2:4]
    pixels = reference.pixel_coordinates(0, height, width, q)
    y, x = pixels.long().unbind(-1)
    radius = radius[..., y // 8 * -(-width // 16) + x // 16][..., None]  # [B, T, HW, 1]
    gap_y = (y // 8 * 8 - y[:, None] // 8 * 8).abs() - 7
    gap_x = (x // 16 * 16 - x[:, None] // 16 * 16).abs() - 15
    distance = (pixels[:, None] - pixels).square().sum(-1)
    logits = scale * torch.einsum("bid,btjd->btij", q.flatten(1, 2), k.flatten(2, 3))
    logits = logits - distance / (2 * sigma**2)
    logits = logits.masked_fill(torch.maximum(gap_y, gap_x) > radius, -math.inf)
    a = logits.softmax(-1)
    o = (a @ v.flatten(2, 3)).unflatten(2, (height, width))
    displacement = (a @ pixels - pixels).unflatten(2, (height, width))
    outputs = [o, displacement, logits.logsumexp(-1).unflatten(2, (height, width))]
    grads = [w.double() for w in case[5:]]
    fraction = (torch.maximum(gap_y, gap_x) <= radius).double().mean()
    return outputs + list(torch.autograd.grad(outputs, [q, k, v, sigma, scale], grads)), fraction


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [((128, 64, 64), F16), ((64, 32, 128), F32)],
    ids=str,
)
def test_forward_and_backward_visit_the_same_pairs(sizes, dtype, monkeypatch):
    """For any window radii."""
    case = on_device(draw((1, 1, 18, 40, 16), dtype, sigma=3.0, seed=7))
    generator = torch.Generator().manual_seed(0)
    radius = (torch.randint(0, 3, (1, 1, 9), generator=generator) * 8).int().to(DEVICE)
    monkeypatch.setattr(
        sys.modules[attend_tiles.__module__], "select_key_tiles", lambda *args: radius
    )
    exact, fraction = masked_reference(case, radius)
    eager = run(case, "reference")
    queries, moving, still = sizes
    with ExitStack() as stack:
        pin(stack, "cross_frame_forward", queries, max(still, 64))
        pin(stack, "cross_frame_dq", still, moving)
        pin(stack, "cross_frame_dkv", moving, still)
        actual = run(case, "triton")
        density = cross_frame_attention(*case[:4], backend="triton", return_density=True)[1]
    assert density == pytest.approx(fraction.item(), abs=1e-6) and density < 0.8
    terms = absolute_terms(case, "bias", "dot")
    dense = run(case, "reference", wide=True)
    for name, x, y, z, whole in zip(NAMES, actual, eager, exact, dense, strict=True):
        # the reference's own error, of the dense attention, is the yardstick
        y = y.double() - whole + z
        assert_as_accurate(name, x, y, z, dtype, terms=terms.get(name))


@pytest.mark.parametrize(
    ("name", "eta", "gaussian"),
    [
        ("cluster-20.0", 0.5, "bias"),
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
    density = cross_frame.density(result.window_radius, case.q, case.k, 0).item()
    assert density == 1 if name == "random-x100" else density < 1
    size = max(case.q.shape[1:3])
    promised = [eta * (case.v.abs().max() + actual[0].abs()), eta * (size + actual[1].abs()), eta]
    for label, x, y, z, most in zip(NAMES, actual, eager, exact, promised, strict=False):
        # the truth is finite even where the frame's far side decides
        assert_as_accurate(label, x, y, z, F32, promised=most)


class Masses(NamedTuple):
    """What a tile of queries may lose by the certificate's definition, by ring, before / eta.

    A ring r holds the tiles whose distance lies in (8 (r - 1), 8 r].
    """

    rings: torch.Tensor  # every key as long as the longest, and pointing where the query does
    tiles: torch.Tensor  # 8 x 8 keys at a time, by their mean and radius

    def radius(self, eta: float) -> int:
        """Half of eta / (1 + eta) is for either; the second has no say beyond the first's ring."""
        half = eta / (1 + eta) / 2
        kept = int((_beyond(self.rings)[1:] > half).sum())
        tiles = self.tiles.where(torch.arange(len(self.tiles)) <= kept, 0.0)
        return 8 * min(kept, int((_beyond(tiles)[1:] > half).sum()))


def _beyond(mass: torch.Tensor) -> torch.Tensor:
    return mass.flip(0).cumsum(0).flip(0)


def stated_masses(case: Case) -> list[Masses]:
    """Of every tile of queries, one number at a time; B = T = 1."""
    q, keys = case.q[0].double() * case.scale.double(), case.k[0, 0].double()
    height, width = q.shape[:2]
    steep = 1 / (2 * case.sigma.double() ** 2)
    ring = torch.arange(max(height, width) // 8 + 2)
    nearest = (8 * ring - 7).clamp(min=0)
    masses = []
    for top, left in product(range(0, height, 8), range(0, width, 16)):
        spread, mass = -math.inf, torch.zeros(len(ring), dtype=torch.float64)
        bounds: dict[tuple[int, int], float] = {}
        for y, x in product(range(top, min(top + 8, height)), range(left, min(left + 16, width))):
            around = [
                q[y, x] @ keys[y + dy, x + dx] - steep * (dy * dy + dx * dx)
                for dy, dx in product((-1, 0, 1), repeat=2)
                if 0 <= y + dy < height and 0 <= x + dx < width
            ]
            lse = torch.stack(around).logsumexp(0)
            length = q[y, x].norm()
            spread = max(spread, float(length * keys.norm(dim=-1).max() - lse))
            for tile_y, tile_x in product(range(0, height, 8), range(0, width, 8)):
                tile = keys[tile_y : tile_y + 8, tile_x : tile_x + 8].flatten(0, 1)
                mean = tile.mean(0)
                dy = max(tile_y - y, y - tile_y - 7, 0)
                dx = max(tile_x - x, x - tile_x - 7, 0)
                bound = q[y, x] @ mean + length * (tile - mean).norm(dim=-1).max()
                bound = float(bound - lse - steep * (dy * dy + dx * dx))
                at = tile_y, tile_x
                bounds[at] = max(bounds.get(at, -math.inf), bound)
        for (tile_y, tile_x), bound in bounds.items():
            gap = max(abs(tile_y - top) - 7, abs(tile_x // 16 * 16 - left) - 15, 0)
            mass[(gap + 7) // 8] += 64 * math.exp(bound)
        first = 64 * (8 * ring + 4) * (spread - steep * nearest**2).exp()
        masses.append(Masses(first, mass))
    return masses


@pytest.mark.parametrize("part", ["rings", "tiles"])
def test_the_radius_is_that_of_the_stated_certificate(part):
    """Just above and just below what lets a ring go."""
    case = draw((1, 1, 16, 48, 16), sigma=4.0, gain=0.5, seed=12)
    if part == "rings":  # a zero among equal keys doubles the bound of its tile
        case.k[:] = 3 * case.k[:, :, :1, :1]
        case.q[:] = case.k[:, 0]
        case.k[:, :, ::8, ::8] = 0
    masses = stated_masses(case)
    beyond = _beyond(getattr(masses[0], part))
    limit = float(beyond[(beyond < 0.2)][0])
    case = on_device(case)
    c, frames = gaussian_tables.inv_2sigma2_base_2(case.sigma), Sizes.of(case.q, case.k, 0)
    q = to_tiles(scaled(case.q, case.scale))
    radii = []
    for half in (0.99 * limit, 1.01 * limit):
        eta = 2 * half / (1 - 2 * half)
        radius = select_key_tiles(q, to_tiles(case.k), c, frames, eta).flatten()
        assert radius.tolist() == [mass.radius(eta) for mass in masses]
        radii.append(radius[0].item())
    assert radii[0] > radii[1]


def test_density_is_close_to_the_tiled_backends():
    """Not three times the pairs of the PyTorch path, whose tiles have a fourth of the pixels."""
    case = on_device(draw((1, 1, 56, 72, 16), sigma=1.5, seed=9))
    normalize = torch.nn.functional.normalize
    q, k = normalize(case.q, dim=-1), normalize(case.k, dim=-1)
    c = gaussian_tables.inv_2sigma2_base_2(case.sigma)
    frames = Sizes.of(q, k, 0)
    scale = torch.tensor(4.0, device=DEVICE)
    radius = select_key_tiles(
        to_tiles(scaled(q, scale)), to_tiles(k), c, frames, 1e-3,
    )  # fmt: skip
    density = cross_frame.density(radius, q, k, 0).item()
    _, tiled = cross_frame_attention(
        q, k, case.v, case.sigma, scale=4.0, tolerance=1e-3, backend="tiled", return_density=True
    )
    assert 0.05 < density < 3 * tiled < 1


# --- the rest


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@FORMS
def test_equal_inputs_give_equal_bits(gaussian, dtype, blocks):
    case = on_device(draw((1, 2, 9, 15, 16), dtype, seed=10))
    first = run(case, "triton", gaussian=gaussian)
    for _ in range(1 if INTERPRETED else 100):
        for name, x, y in zip(NAMES, first, run(case, "triton", gaussian=gaussian), strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize(("offsets", "gaussian"), [(True, "bias"), (False, "gate")])
def test_operator(offsets, gaussian):
    """Fake implementation, autograd and schema agree with what the kernels do."""
    case = on_device(draw((1, 2, 5, 6, 16), seed=11))
    inputs = [x.clone().requires_grad_() for x in case[:5]]
    arguments = (*inputs, gaussian, offsets, 1e-6, 0, "triton")
    opcheck(torch.ops.mana.cross_frame_attention.default, arguments)


@pytest.mark.parametrize("gaussian", ["gate"])
def test_compile_and_export(gaussian):
    """No graph break, equal bits, forward and backward; and the backward's own operator."""
    case = on_device(draw((1, 2, 9, 12, 16), sigma=2.0, seed=13))

    def attend(q, k, v, sigma, scale):
        return cross_frame_attention(
            q, k, v, sigma, scale=scale, gaussian=gaussian, offsets=True, return_lse=True,
            backend="triton",
        )  # fmt: skip

    results = []
    for function in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in case[:5]]
        outputs = function(*inputs)
        results.append([*outputs, *torch.autograd.grad(outputs, inputs, case[5:])])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))

    class Attention(torch.nn.Module):
        forward = staticmethod(attend)

    program = torch.export.export(Attention(), case[:5])
    assert all(
        torch.equal(x, y) for x, y in zip(results[0], program.module()(*case[:5]), strict=False)
    )
    saved = torch.ops.mana.cross_frame_attention(*case[:5], gaussian, True, 1e-6, 0, "triton")
    opcheck(
        torch.ops.mana.cross_frame_attention_backward.default,
        (*case[5:], *case[:5], *saved[:3], saved[4], gaussian, True, 1e-6, 0, "triton"),
    )


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
def test_a_cuda_graph_replays():
    """Nothing waits for the device or depends on a value: the same graph serves other inputs."""
    torch.use_deterministic_algorithms(False)  # filling is not part of the graph
    first, second = (on_device(draw((1, 2, 24, 33, 64), F16, seed=n)) for n in (14, 15))
    q, k, v, sigma = (x.clone() for x in first[:4])

    def attend(*inputs):
        return cross_frame_attention(*inputs, offsets=True, backend="triton")

    attend(q, k, v, sigma)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = attend(q, k, v, sigma)
    for x, y in zip((q, k, v, sigma), second[:4], strict=True):
        x.copy_(y)
    graph.replay()
    for x, y in zip(outputs, attend(*second[:4]), strict=True):
        assert torch.equal(x, y)


def test_far_addresses():
    """Two clips whose elements lie more than 2^31 apart, as at 540 x 960 with D = 128."""
    D, rows = 64, (1 << 21) + 8
    torch.use_deterministic_algorithms(False)  # else all would be filled; hardly any is touched
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2, 128, D, generator=generator).half().to(DEVICE)
    huge = torch.empty(2, rows * 16, D, dtype=F16, device=DEVICE)
    huge[:, :128] = values
    q = values * 0.2
    radius = torch.zeros(2, 1, 1, dtype=torch.int32, device=DEVICE)  # the first tile alone
    reverse = radius.new_zeros(2, 1, rows // 4)
    blocks = {"BLOCK_M": 128, "BLOCK_N": 128}
    c = torch.zeros((), device=DEVICE)
    tables = gaussian_tables.Tables.build(Sizes(2, 1, D, 8, 8, 16, 0), c, q, blocks)
    constants: dict[str, Any] = {"D": D, "DISPLACEMENT": False, "EXACT": False, "num_warps": 8}
    sizes = (rows, rows, 16, 0, 2, 128, rows * 16)
    o, dk, dv = (torch.empty(2, 1, rows, 16, D, dtype=F16, device=DEVICE) for _ in range(3))
    lse = torch.empty(2, 1, rows, 16, device=DEVICE)
    forward: Any = _forward_kernel
    forward[(1, 1, 2)](
        q, huge, huge, tables.query, tables.key, c, radius, o, lse, lse,
        2, 1, *sizes, *tables[2:], WARP_SPECIALIZE=False, **constants, **blocks,
    )  # fmt: skip
    near = to_tiles(lse[:, :, :8, :, None] / math.log(2))
    delta = (q.float() * to_tiles(o[:, 0, :8])).sum(-1)
    backward: Any = _dkv_kernel
    backward[(1, 1, 2)](
        q, huge, huge, q, q, near, delta,
        tables.query, tables.key, c, radius, reverse, dk, dv,
        1, 8, *sizes[1:], *tables[2:5], PLAIN=False, **constants, **blocks,
    )  # fmt: skip
    first = [to_tiles(x[:, 0, :8]) for x in (o, dk, dv)]

    def dense(dtype: torch.dtype) -> list[torch.Tensor]:
        k, v = (values.to(dtype).requires_grad_() for _ in range(2))
        dense = torch.softmax(q.to(dtype) @ k.mT * math.log(2), -1) @ v
        return [dense.detach(), *torch.autograd.grad(dense, (k, v), q.to(dtype))]

    names = ("o", "dk", "dv")
    for name, x, y, z in zip(names, first, dense(F16), dense(torch.float64), strict=True):
        assert_as_accurate(name, x, y, z, F16)


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
        enlarged = model(frames, backend=backend)
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
