"""Both attentions against their definition in float64: outputs, gradients, certificate, errors."""

import math
import os
import re
import subprocess
import sys
from itertools import chain, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from attention_cases import (
    ADVERSARIES,
    NAMES,
    Case,
    assert_case,
    assert_memory,
    draw,
    draw_memory,
    random_logits,
    run,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_as_accurate

from mana_triton import cross_frame_attention, memory_attention
from mana_triton.kernels import tiled

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
FORMS = pytest.mark.parametrize("gaussian", ["bias", "gate"])
SHAPES = {  # B, T, H, W, D
    "one-pixel": (1, 1, 1, 1, 16),
    "batch-7x3": (2, 7, 7, 3, 16),
    "odd-size": (1, 2, 17, 31, 64),
    "several-tiles": (1, 2, 33, 35, 16),
}
LARGE = (64, 112)  # the paper's frame


pytestmark = pytest.mark.usefixtures("one_thread")


@FORMS
@pytest.mark.parametrize("match", ["dot", "cosine"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_float32(shape, match, gaussian):
    assert_case(
        draw(shape, scale=12.0 if match == "cosine" else None), gaussian, "tiled", match=match
    )


@FORMS
@pytest.mark.parametrize("dtype", [F16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["batch-7x3", "several-tiles"])
def test_half(name, dtype, gaussian):
    assert_case(draw(SHAPES[name], dtype, scale=12.0, seed=1), gaussian, "tiled", match="cosine")


@FORMS
@pytest.mark.parametrize("sigma", [0.3, 0.9, 2.0, 1e6])
def test_any_sigma(sigma, gaussian):
    """Below 1 pixel the Gaussian's columns are large and cancel: a tile of 16 lost 8 bits."""
    assert_case(draw((1, 2, 17, 31, 16), sigma=sigma, seed=2), gaussian, "tiled")


@FORMS
@pytest.mark.parametrize("bands", [[16], [5, 12, 13]], ids=str)
def test_bands_of_rows_equal_the_whole_frame(bands, gaussian):
    assert_case(draw(SHAPES["several-tiles"], sigma=2.0, seed=3), gaussian, "tiled", bands=bands)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    shape=st.tuples(*(st.integers(1, n) for n in (2, 7, 19, 19)), st.sampled_from([16, 64])),
    sigma=st.floats(0.3125, 32, width=32),
    gaussian=st.sampled_from(["bias", "gate"]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_shape_and_band(shape, sigma, gaussian, seed, data):
    case = draw(shape, sigma=sigma, seed=seed)
    cut = data.draw(st.integers(0, shape[2] - 1))
    options: dict[str, Any] = {"gaussian": gaussian, "gradients": False}
    exact = run(case, "reference", wide=True, **options)
    eager = run(case, "reference", **options)
    actual = run(case, "tiled", bands=[cut] if cut else None, tolerance=0, **options)
    # the outputs of few pixels may cancel to nothing: a logit is a sum over channels
    logit = case.q.norm(dim=-1).max() * case.k.norm(dim=-1).max() * case.scale
    terms = case.v.abs().max(), torch.tensor(max(shape[2:4])), logit
    for name, x, y, z, term in zip(NAMES[:3], actual, eager, exact, terms, strict=True):
        assert_as_accurate(name, x, y, z, F32, terms=term)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@FORMS
def test_definition_one_pixel_at_a_time(gaussian, backend):
    """The formula of the paper in loops over pixels; nothing of it is shared with the code."""
    T, H, W, D, sigma, scale, first_row = 2, 4, 3, 16, 1.3, 0.6, 1
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, W, D, generator=generator, dtype=torch.float64)
    k, v = torch.randn(2, 1, T, H, W, D, generator=generator, dtype=torch.float64)
    o, displacement, lse = cross_frame_attention(
        q, k, v, sigma, scale=scale, gaussian=gaussian, offsets=True, return_lse=True,
        tolerance=0, backend=backend, first_row=first_row,
    )  # fmt: skip
    for t, y, x in product(range(T), range(2), range(W)):
        places = list(product(range(H), range(W)))
        steps = torch.tensor([(ky - y - first_row, kx - x) for ky, kx in places]).double()
        bias = [-(dy * dy + dx * dx) / (2 * sigma**2) for dy, dx in steps.tolist()]
        logits = [scale * float(q[0, y, x] @ k[0, t, ky, kx]) for ky, kx in places]
        if gaussian == "bias":
            logits = [a + b for a, b in zip(logits, bias, strict=True)]
        total = sum(map(math.exp, logits))
        a = torch.tensor([math.exp(s) / total for s in logits], dtype=torch.float64)
        if gaussian == "gate":
            a *= torch.tensor(bias, dtype=torch.float64).exp()
        values = torch.stack([v[0, t, ky, kx] for ky, kx in places])
        for actual, expected in (
            (o[0, t, y, x], a @ values),
            (displacement[0, t, y, x], a @ steps),
            (lse[0, t, y, x], torch.tensor(math.log(total), dtype=torch.float64)),
        ):
            assert (actual - expected).abs().max() < 1e-12


def test_displacement_points_at_the_match():
    """Every pixel has its own direction; the frame is moved by (dy, dx) = (3, -2)."""
    H, W, D = 20, 40, 64
    q = F.normalize(torch.randn(1, H, W, D, generator=torch.Generator().manual_seed(0)), dim=-1)
    k = q.roll((3, -2), (1, 2))[:, None]
    _, displacement = cross_frame_attention(q, k, k, 30.0, scale=200.0, offsets=True)
    inner = displacement[0, 0, : H - 3, 2:]
    assert (inner - torch.tensor([3.0, -2.0])).abs().max() < 1e-3


@pytest.mark.parametrize("backend", ["reference", "tiled"])
@FORMS
@pytest.mark.parametrize("sigma", [math.inf, 1e6], ids=str)
def test_a_wide_gaussian_gives_plain_attention(sigma, gaussian, backend):
    """At a sigma of 1e6 the weights differ from 1 by 1e-9, less than float32 resolves."""
    case = draw((2, 3, 9, 14, 16), seed=4)

    def plain(q, k, v):
        q, k, v = (x.flatten(-3, -2) for x in (q[:, None].expand(k.shape), k, v))
        return F.scaled_dot_product_attention(q, k, v).unflatten(2, (9, 14))

    actual = cross_frame_attention(*case[:3], sigma, gaussian=gaussian, backend=backend)
    exact = plain(*(x.double() for x in case[:3]))
    assert_as_accurate("o", actual, plain(*case[:3]), exact, F32)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(order=st.permutations(range(5)), gaussian=st.sampled_from(["bias", "gate"]))
def test_permuting_frames_permutes_outputs(order, gaussian):
    case = draw((1, 5, 33, 32, 16), sigma=1.0, seed=5)
    options: dict[str, Any] = {
        "gaussian": gaussian,
        "offsets": True,
        "return_lse": True,
        "return_density": True,
    }
    *once, density = cross_frame_attention(*case[:4], **options)
    q, k, v, sigma = case[:4]
    *again, density_again = cross_frame_attention(q, k[:, order], v[:, order], sigma, **options)
    for name, x, y in zip(NAMES, once, again, strict=False):
        assert torch.equal(x[:, order], y), name
    assert density == density_again < 1


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 36), st.integers(1, 36)),
    sigma=st.floats(0.3125, 1e6, width=32),
    tolerance=st.sampled_from([0, 1e-6, 0.5]),
    gain=st.sampled_from([0, 1, 100]),
)
def test_a_constant_frame_gives_its_value(size, sigma, tolerance, gain):
    case = draw((1, 1, *size, 16), gain=gain, seed=6)
    value = torch.linspace(-3, 3, 16)
    v = value.expand_as(case.v)
    actual = cross_frame_attention(case.q, case.k, v, sigma, tolerance=tolerance)
    eager = cross_frame_attention(case.q, case.k, v, sigma, backend="reference")
    assert_as_accurate("o", actual, eager, v.double(), F32)


# --- the certificate: float64 shows what was dropped, nothing else


@FORMS
@pytest.mark.parametrize("name", ADVERSARIES)
def test_certificate(name, gaussian):
    """What is dropped changes o by at most eta (max|v| + |o|), in bands of any height, too.

    With e <= eta the dropped mass relative to the kept: |o - o'| <= e/(1 + e) (max|v| + |o'|); the
    displacement is an o whose values are at most the frame's size, and the lse loses log(1 + e).
    """
    case = ADVERSARIES[name]
    size = torch.tensor(max(case.q.shape[1:3]))
    largest = case.v.abs().max(), size, None
    wide = case._replace(**{x: getattr(case, x).double() for x in ("q", "k", "v")})
    options: dict[str, Any] = {"gaussian": gaussian, "gradients": False}
    exact = run(case, "reference", wide=True, **options)
    for eta, bands in product((0.5, 1e-3, 1e-6), (None, [3], [4, 20, 36])):
        if bands is None or bands[-1] < case.q.shape[1]:
            actual = run(wide, "tiled", tolerance=eta, bands=bands, **options)
            for label, most, x, y in zip(NAMES, largest, actual, exact, strict=False):
                error = (x - y).abs()
                bound = eta * (1 if most is None else most + x.abs())
                if label == "lse" and gaussian == "gate":
                    bound = 0  # of all logits: nothing is dropped
                excess = (error - bound).max()
                assert excess <= 1e-12 * y.abs().max(), (label, eta, bands, error.max())


def test_adversaries_challenge_the_certificate():
    """Somewhere among the adversaries mass is dropped, and a good part of what is allowed."""
    share, fractions = {}, []
    for name, case in ADVERSARIES.items():
        q, k, v = (x.double() for x in case[:3])
        exact = cross_frame_attention(q, k, v, case.sigma, scale=case.scale, backend="reference")
        for eta in (0.5, 1e-3, 1e-6):
            o, density = cross_frame_attention(
                q, k, v, case.sigma, scale=case.scale, tolerance=eta, return_density=True
            )
            bound = eta * (v.abs().max() + o.abs())
            share[name, eta] = ((o - exact).abs() / bound).max().item()
            fractions.append(density)
    assert max(share.values()) > 0.1, share
    assert all(max(share[name, eta] for name in ADVERSARIES) > 1e-3 for eta in (0.5, 1e-3, 1e-6))
    assert min(fractions) < 0.3 and max(fractions) == 1


@FORMS
@pytest.mark.parametrize("gain", [1, 10, 100])
def test_certificate_and_rounding_together(gain, gaussian):
    """float32, each tolerance: the error is the certificate's and the rounding's."""
    case = random_logits(gain)
    options: dict[str, Any] = {"gaussian": gaussian, "gradients": False}
    exact = run(case, "reference", wide=True, **options)[0]
    eager = run(case, "reference", **options)[0]
    for eta in (0.1, 1e-3, None):
        actual = run(case, "tiled", tolerance=eta, **options)[0]
        promised = (1e-6 if eta is None else eta) * (case.v.abs().max() + actual.abs())
        assert_as_accurate("o", actual, eager, exact, F32, promised=promised)


def test_gradient_under_a_certificate():
    """In exact arithmetic dq = s cov_p(x, k) with x_j = do.v_j.

    Dropping the mass e moves each of E[xk], E[x] and E[k] by at most 2 e of its largest value:
    the covariance by at most 6 e max|x| max|k|.
    """
    case = random_logits(1)._replace(ddisplacement=torch.tensor(0.0), dlse=torch.tensor(0.0))
    k, v = case.k.double(), case.v.double()
    results = []
    for backend in ("reference", "tiled"):
        q = case.q.double().requires_grad_()
        o, density = cross_frame_attention(
            q, k, v, 1.0, tolerance=1e-3, backend=backend, return_density=True
        )
        results.append(torch.autograd.grad(o, q, case.do.double())[0])
    assert density < 0.7
    x = case.do.norm(dim=-1).max() * case.v.norm(dim=-1).max()
    T, D = case.k.shape[1], case.k.shape[-1]
    error = (results[0] - results[1]).abs().max()
    assert 0 < error <= T * 6 * 1e-3 * x * case.k.abs().max() * D**-0.5


def mixed_matches(shape, seed=12) -> Case:
    """Cosine-like queries of which a quarter find nothing alike: those need a second pass."""
    case = draw(shape, sigma=1.5, scale=12.0, seed=seed)
    k = F.normalize(case.k, dim=-1)
    q = k[:, 0].clone()
    q[:, : q.shape[1] // 2, : q.shape[2] // 2] *= -1
    return case._replace(q=q.contiguous(), k=k)


@FORMS
@pytest.mark.parametrize("bands", [None, [16]], ids=["whole", "bands"])
def test_gradients_where_some_queries_need_a_second_pass(bands, gaussian, monkeypatch):
    """In float64 every gradient is the definition's, up to what a tolerance of 1e-13 leaves."""
    shape = (2, 1, 33, 49, 16)
    case = mixed_matches(shape)
    passes = []
    strips = tiled.second_strips

    def second(*args):
        passes.append(list(strips(*args)))
        return iter(passes[-1])

    monkeypatch.setattr(tiled, "second_strips", second)
    exact = run(case, "reference", wide=True, gaussian=gaussian)
    actual = run(case, "tiled", wide=True, gaussian=gaussian, tolerance=1e-13, bands=bands)
    queries = [
        math.prod(z.stop - z.start for z in (strip.frames, strip.rows, strip.cols))
        for strip in chain.from_iterable(passes)
    ]
    assert 0 < sum(queries) < math.prod(shape[:4]), "some, and not all, must need it"
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        assert (x - y).abs().max() <= 1e-10 * y.abs().max(), name


@FORMS
def test_gradients_of_the_papers_frame(gaussian):
    """64 x 112 in float32 at the default tolerance, against float64 of the same windows.

    The definition in float64 would take gigabytes; the test above ties float64 to it.
    """
    case = mixed_matches((1, 1, *LARGE, 16))
    options: dict[str, Any] = {"gaussian": gaussian}
    exact = run(case, "tiled", wide=True, tolerance=1e-13, **options)
    actual = run(case, "tiled", **options)
    for name, x, y in zip(NAMES, actual, exact, strict=True):
        # displacements of exact matches are small against the pixels they are made of, and the two
        # numbers are sums over 51 million pairs that cancel
        size = case.sigma * y.numel() ** 0.5 if name == "displacement" else y.norm()
        share = 1e-3 if y.ndim == 0 else 1e-5
        assert (x - y).norm() <= share * size, name


def test_density():
    case = draw((1, 2, 48, 80, 16), seed=9)
    inputs = [F.normalize(case.q, dim=-1), F.normalize(case.k, dim=-1), case.v]

    def density(tolerance, dtype=F32, rows=slice(None), **options):
        q, k, v = (x.to(dtype) for x in inputs)
        return cross_frame_attention(
            q[:, rows], k, v, 2.0, scale=1.0, tolerance=tolerance, return_density=True, **options
        )[1]

    dense, _, default, coarse, _ = fractions = [density(eta) for eta in (0, 1e-9, 1e-6, 1e-3, 0.5)]
    assert dense == 1 and all(a > b for a, b in pairwise(fractions))
    assert density(None) == default and density(None, BF16) == density(1e-3, BF16) < default
    # sigma 2: a tile and 8 pixels around it, at most 32 x 32 of 48 x 80
    assert 16 * 16 / (48 * 80) < coarse < 32 * 32 / (48 * 80)
    assert density(0, rows=slice(7, 19), first_row=7) == density(None, backend="reference") == 1


@FORMS
def test_the_papers_frame(gaussian):
    """64 x 112 at the default tolerance; the definition is evaluated on some of the rows."""
    case = draw((1, 1, *LARGE, 64), sigma=4.0, seed=10)
    actual = run(case, "tiled", gradients=False, gaussian=gaussian)
    options: dict[str, Any] = {
        "gaussian": gaussian,
        "offsets": True,
        "return_lse": True,
        "backend": "reference",
    }
    for rows in (slice(0, 2), slice(31, 33), slice(62, 64)):
        q, k, v = case.q[:, rows], case.k, case.v
        eager = cross_frame_attention(q, k, v, 4.0, first_row=rows.start, **options)
        q, k, v = q.double(), k.double(), v.double()
        exact = cross_frame_attention(q, k, v, 4.0, first_row=rows.start, **options)
        most = case.v.abs().max(), max(LARGE), 1
        for name, m, x, y, z in zip(NAMES, most, actual, eager, exact, strict=False):
            part = x[:, :, rows]
            promised = 1e-6 * (m + (part.abs() if name != "lse" else 0))
            assert_as_accurate(name, part, y, z, F32, promised=promised)


PEAK = """
import torch
from mana_triton import cross_frame_attention

def status(field):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return int(lines[field].split()[0])

torch.set_num_threads(1)
H, W, T, D = 64, 112, 7, 64
q, (k, v) = torch.randn(1, H, W, D), torch.randn(2, 1, T, H, W, D)
small = [x[..., :16, :16, :] for x in (q, k, v)]
with torch.no_grad():
    for gaussian in ("bias", "gate"):
        cross_frame_attention(*small, 4.0, gaussian=gaussian)  # loads the libraries
        open("/proc/self/clear_refs", "w").write("5")  # the peak starts again
        before = status("VmRSS")
        o = cross_frame_attention(q, k, v, 4.0, gaussian=gaussian)
        print((status("VmHWM") - before) / 1024)
        del o
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_peak_memory_does_not_grow_with_the_square_of_the_frame():
    """Seven 64 x 112 frames of 64 channels, of which the result is 13 MB; HW x HW is 205 MB."""
    # freed memory goes back at once, so that the resident set is what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [sys.executable, "-c", PEAK], cwd=Path(__file__).parents[2], env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for mib in map(float, result.stdout.split()):
        assert 12 < mib < 60


# --- the memory bank


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 16, 1), (2, 7, 3, 16, 5), (1, 17, 31, 64, 128)])
def test_memory(shape, dtype):
    inputs, do = draw_memory(shape, dtype)
    inputs, do = [x.cpu() for x in inputs], do.cpu()

    def attend(q, memory, scale):
        return memory_attention(q, memory, scale=scale, backend="tiled")

    assert_memory(attend, inputs, do)


@pytest.mark.parametrize("backend", ["reference", "tiled"])
def test_memory_one_pixel_at_a_time(backend):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 3, 16, generator=generator, dtype=torch.float64)
    memory = torch.randn(16, 5, generator=generator, dtype=torch.float64)
    y = memory_attention(q, memory, backend=backend)
    for pixel, result in zip(q.reshape(6, 16), y.reshape(6, 16), strict=True):
        p = [math.exp(float(pixel @ memory[:, n]) / 4) for n in range(5)]  # sqrt(D) = 4
        expected = memory @ torch.tensor(p, dtype=torch.float64) / sum(p)
        assert result.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


# --- arguments


def test_what_is_returned_and_the_defaults():
    case = draw((1, 2, 5, 6, 16), seed=11)
    q, k, v = case[:3]
    alone = cross_frame_attention(q, k, v, 4.0)
    everything = cross_frame_attention(
        q, k, v, torch.tensor([4.0], dtype=torch.float64), gaussian="bias",
        scale=torch.tensor(0.25), tolerance=1e-6, offsets=True, backend="tiled", first_row=0,
        return_lse=True, return_density=True,
    )  # fmt: skip
    assert [tuple(x.shape) for x in everything[:3]] == [
        (1, 2, 5, 6, 16),
        (1, 2, 5, 6, 2),
        (1, 2, 5, 6),
    ]
    assert everything[3] == 1.0
    assert torch.equal(alone, everything[0])
    o, lse = cross_frame_attention(q, k, v, 4.0, return_lse=True)
    assert torch.equal(o, alone) and torch.equal(lse, everything[2])
    # of half-precision inputs only o is rounded
    half = cross_frame_attention(
        q.half(), k.half(), v.half(), 4.0, offsets=True, return_lse=True, backend="tiled"
    )
    assert [x.dtype for x in half] == [F16, F32, F32]
    memory = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        memory_attention(q, memory), memory_attention(q, memory, scale=0.25, backend="tiled")
    )


def arguments(**changes) -> dict[str, Any]:
    """Valid arguments of cross_frame_attention, but for the changes."""
    k = torch.zeros(1, 2, 4, 5, 16)
    return {"q": torch.zeros(1, 4, 5, 16), "k": k, "v": k, "sigma": 4.0} | changes


FRAME = "must be [B, T, H, W, D] with B=1, W=5, D=16 as in q, got"
HALF = torch.zeros(1, 2, 4, 5, 16, dtype=F16)
META = torch.zeros(1, 2, 4, 5, 16, device="meta")
REFUSED = [
    ({"q": torch.zeros(4, 5, 16)}, "q must be [B, H, W, D], got [4, 5, 16]"),
    ({"q": torch.zeros(1, 4, 5, 16).long()}, "q must be a floating-point tensor, got torch.int64"),
    ({"q": torch.zeros(1, 4, 0, 16)}, "W and D at least 1, got [1, 4, 0, 16]"),
    ({"k": torch.zeros(1, 4, 5, 16)}, f"k {FRAME} [1, 4, 5, 16]"),
    ({"k": torch.zeros(2, 2, 4, 5, 16)}, f"k {FRAME} [2, 2, 4, 5, 16]"),
    ({"k": torch.zeros(1, 2, 4, 6, 16)}, f"k {FRAME} [1, 2, 4, 6, 16]"),
    ({"k": torch.zeros(1, 0, 4, 5, 16)}, f"k {FRAME} [1, 0, 4, 5, 16]"),
    ({"v": torch.zeros(1, 2, 4, 5, 18)}, f"v {FRAME} [1, 2, 4, 5, 18]"),
    ({"v": torch.zeros(1, 3, 4, 5, 16)}, "k and v must have one shape, got [1, 2, 4, 5, 16] and"),
    ({"k": HALF}, "k must have the type and device of q, torch.float32 on cpu, got torch.float16"),
    ({"v": META}, "torch.float32 on cpu, got torch.float32 on meta"),
    (dict.fromkeys("kv", HALF[:, :, :3].float()), "must lie in a frame of 3 rows, got first_row=0"),
    ({"first_row": -1}, "must lie in a frame of 4 rows, got first_row=-1 and h=4"),
    ({"sigma": 0.0}, "sigma must be > 0 (infinity allowed), got 0.0"),
    ({"sigma": torch.tensor(-1.5)}, "sigma must be > 0 (infinity allowed), got -1.5"),
    ({"q": META[:, 0], "k": META, "v": META, "sigma": -1.5}, "sigma must be > 0"),
    ({"sigma": math.nan}, "sigma must be a number, got nan"),
    ({"sigma": torch.tensor(math.nan)}, "sigma must be > 0 (infinity allowed), got nan"),
    ({"sigma": torch.ones(2)}, "sigma must be one number, got shape [2]"),
    ({"scale": math.nan}, "scale must be a number, got nan"),
    ({"scale": torch.ones(16)}, "scale must be one number, got shape [16]"),
    ({"tolerance": -1e-9}, "tolerance must be in [0, 1), got -1e-09"),
    ({"tolerance": math.nan}, "tolerance must be in [0, 1), got nan"),
    ({"gaussian": "gates"}, "gaussian must be one of bias, gate, got 'gates'"),
    ({"backend": "cuda"}, "backend must be one of auto, triton, tiled, reference, got 'cuda'"),
    ({"backend": "triton"}, "backend 'triton' is not available"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_refused(changes, message):
    cross_frame_attention(**arguments())
    with pytest.raises(ValueError, match=re.escape(message)):
        cross_frame_attention(**arguments(**changes))


MEMORY_REFUSED = [
    ({"q": torch.zeros(4, 5, 16)}, "got [4, 5, 16] and [16, 3]"),
    ({"memory": torch.zeros(16)}, "got [1, 4, 5, 16] and [16]"),
    ({"memory": torch.zeros(3, 16)}, "q must be [B, H, W, D] and memory [D, N], got"),
    ({"memory": torch.zeros(16, 3, dtype=BF16)}, "memory must have the type and device of q"),
    ({"scale": torch.ones(1, 2)}, "scale must be one number, got shape [1, 2]"),
    ({"scale": math.nan}, "scale must be a number, got nan"),
    ({"backend": "sdpa"}, "backend must be one of auto, triton, tiled, reference"),
    ({"backend": "triton"}, "backend 'triton' is not available"),
]


@pytest.mark.parametrize(("changes", "message"), MEMORY_REFUSED)
def test_memory_refused(changes, message):
    valid: dict[str, Any] = {"q": torch.zeros(1, 4, 5, 16), "memory": torch.zeros(16, 3)}
    memory_attention(**valid)
    with pytest.raises(ValueError, match=re.escape(message)):
        memory_attention(**(valid | changes))
