"""Inputs of the attention that its tests share, and what is computed of them."""

import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracle import assert_as_accurate
from torch import Tensor

from mana_triton import cross_frame_attention
from mana_triton.kernels import reference

NAMES = ("o", "displacement", "lse", "dq", "dk", "dv", "dsigma", "dscale")

# where the tests of the Triton kernels run: in the interpreter bfloat16 products are wrong
INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def run_suite(name: str, interpret: bool) -> None:
    """Run a file of tests of the kernels in a process of its own, in the interpreter or not."""
    suite = Path(__file__).parent / "kernels" / name
    command = [sys.executable, "-m", "pytest", "-q", "-x", str(suite)]
    command += ["-W", "ignore::pytest.PytestConfigWarning"]
    choices = {
        "TRITON_INTERPRET": str(int(interpret)),
        "OMP_NUM_THREADS": "1",
        # the suites' poison comes with deterministic algorithms, for which cuBLAS wants this
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    }
    result = subprocess.run(
        command, cwd=suite.parents[2], env={**os.environ, **choices},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    assert " passed" in result.stdout


class Case(NamedTuple):
    """Inputs and what the gradients are taken with, all exactly representable in one dtype."""

    q: Tensor
    k: Tensor
    v: Tensor
    sigma: Tensor
    scale: Tensor
    do: Tensor
    ddisplacement: Tensor
    dlse: Tensor


def draw(shape, dtype=torch.float32, *, sigma=4.0, scale=None, gain=1.0, seed=0) -> Case:
    """Random inputs; q and k carry `gain` between them."""
    B, T, H, W, D = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, factor=1.0):
        return torch.randn(*size, generator=generator).mul(factor).to(dtype)

    def pixels(*lead, factor=1.0):  # channels first in memory, as the network has them
        return normal(*lead, D, H, W, factor=factor).movedim(-3, -1)

    spread = math.sqrt(gain)
    return Case(
        pixels(B, factor=spread),
        pixels(B, T, factor=spread),
        pixels(B, T),
        torch.tensor(sigma),
        torch.tensor(D**-0.5 if scale is None else scale),
        normal(B, T, H, W, D),
        normal(B, T, H, W, 2),
        normal(B, T, H, W),
    )


def run(
    case: Case, backend: str, *, wide=False, match="dot", bands=None, gradients=True, **options
):
    """The outputs and, if wanted, the gradients, in the order of NAMES.

    Args:
        case: the inputs.
        backend: that computes them.
        wide: in float64.
        match: "cosine" normalizes q and k first.
        bands: rows at which q is cut; each band is one call.
        gradients: of all five inputs, too.
        options: of `cross_frame_attention`.
    """
    inputs = [x.double() if wide else x.clone() for x in case[:5]]
    for x in inputs if gradients else ():
        x.requires_grad_()
    q, k, v, sigma, scale = inputs
    if match == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    edges = [0, *(bands or ()), q.shape[1]]
    parts = [
        cross_frame_attention(
            q[:, top:bottom], k, v, sigma, scale=scale, offsets=True, return_lse=True,
            backend=backend, first_row=top, **options,
        )
        for top, bottom in pairwise(edges)
    ]  # fmt: skip
    outputs = [torch.cat(part, 2) for part in zip(*parts, strict=True)]
    if not gradients:
        return outputs
    grads = [w.to(x.dtype) for w, x in zip(case[5:], outputs, strict=True)]
    return outputs + list(torch.autograd.grad(outputs, inputs, grads))


def absolute_terms(case: Case, gaussian: str, match: str) -> dict[str, Tensor]:
    """Sums of the absolute values of the terms of dsigma and dscale, in float64.

    dsigma = sum_ij g_ij d_ij^2 / sigma^3 and dscale = sum_ij dS_ij q_i.k_j with
    dS = a (dA - ...) + p (... + dLSE); every difference is replaced by a sum.
    """
    q, k, v, sigma, scale, do, dd, dlse = (x.double() for x in case)
    if match == "cosine":
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    pixels = reference.pixel_coordinates(0, q.shape[1], q.shape[2], q)
    offset = (pixels - pixels[:, None]).abs()  # [HW, HW, 2]
    distance = offset.square().sum(-1)
    weight = -distance / (2 * sigma * sigma)
    q, k, v, do, dd = (x.flatten(-3, -2) for x in (q, k, v, do, dd))
    logits = scale * torch.einsum("bid,btjd->btij", q, k)
    p = (logits + weight if gaussian == "bias" else logits).softmax(-1)
    a = p * weight.exp() if gaussian == "gate" else p
    da = torch.einsum("btid,btjd->btij", do.abs(), v.abs())
    da += torch.einsum("btic,ijc->btij", dd.abs(), offset)
    mean = (a * da).sum(-1, keepdim=True) + dlse.flatten(2).abs()[..., None]
    ds = a * da + p * mean
    through_weight = ds if gaussian == "bias" else a * da
    products = torch.einsum("bid,btjd->btij", q.abs(), k.abs())
    return {
        "dsigma": (through_weight * distance).sum() / sigma**3,
        "dscale": (ds * products).sum(),
    }


def assert_case(case: Case, gaussian: str, backend: str, *, match="dot", bands=None) -> None:
    """A backend, dense, is as accurate as the reference in everything."""
    options: dict[str, Any] = {"gaussian": gaussian, "match": match}
    exact = run(case, "reference", wide=True, **options)
    eager = run(case, "reference", **options)
    actual = run(case, backend, bands=bands, tolerance=0, **options)
    terms = absolute_terms(case, gaussian, match)
    for name, x, y, z in zip(NAMES, actual, eager, exact, strict=True):
        assert_as_accurate(name, x, y, z, case.q.dtype, terms=terms.get(name))


# --- the memory bank


def draw_memory(shape, dtype, *, scale=0.37, gain=1.0, seed=0) -> tuple[list[Tensor], Tensor]:
    """q, memory and scale of a shape (B, H, W, D, N), and a gradient of y."""
    B, H, W, D, N = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, factor=1.0):
        return (torch.randn(*size, generator=generator) * factor).to(dtype).to(DEVICE)

    q = normal(B, D, H, W, factor=gain**0.5).movedim(1, -1)  # as the network has it
    memory = normal(D, N, factor=gain**0.5)
    return [q, memory, torch.tensor(scale, device=DEVICE)], normal(B, H, W, D)


def differentiate(function, inputs, do, wide=False) -> list[Tensor]:
    """The output and the gradients of all inputs."""
    inputs = [x.double() if wide else x.clone() for x in inputs]
    for x in inputs:
        x.requires_grad_()
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, do.to(y.dtype))]


def assert_memory(function, inputs, do) -> None:
    """A memory attention is as accurate as the reference in everything."""
    definition = reference.memory_attention
    actual, eager = (differentiate(f, inputs, do) for f in (function, definition))
    exact = differentiate(definition, inputs, do, wide=True)
    q, memory, scale = (x.double() for x in inputs)
    rows, do = q.flatten(0, -2), do.double().flatten(0, -2)
    p = (scale * rows @ memory).softmax(-1)
    # the sums cancel: dS = p (dP - delta), of dq and dscale
    dp = do.abs() @ memory.abs()
    ds = p * (dp + (p * dp).sum(-1, keepdim=True))
    terms = {
        "dscale": (ds * (rows.abs() @ memory.abs())).sum(),
        "dq": (ds @ memory.abs().T).max() * scale.abs(),
    }
    names = ("y", "dq", "dmemory", "dscale")
    for name, x, y, z in zip(names, actual, eager, exact, strict=True):
        assert_as_accurate(name, x, y, z, inputs[0].dtype, terms=terms.get(name))


# --- adversaries of the certificate


def far_cluster(length: float, at: tuple[int, int], size: tuple[int, int]) -> Case:
    """Keys are zero but for an 8 x 8 cluster; it alone has values. Its logit grows with length."""
    H, W = size
    q, k = torch.zeros(1, H, W, 16), torch.zeros(1, 1, H, W, 16)
    q[..., 0] = 1
    k[:, :, at[0] : at[0] + 8, at[1] : at[1] + 8, 0] = length
    v = (k != 0).float()
    return Case(q, k, v, torch.tensor(2.0), torch.tensor(1.0), *[torch.empty(0)] * 3)


def half_plane(length: float) -> Case:
    """Keys are zero in one half and alike in the other, which alone has values.

    Queries far from the border see no long key in the first pass, and the bound assumes just what
    the other half holds: near the radius at which it is dropped, a quarter of it is really there.
    """
    q, k = torch.zeros(1, 40, 64, 16), torch.zeros(1, 1, 40, 64, 16)
    q[..., 0] = 1
    k[..., 30:, 0] = length
    return Case(q, k, (k != 0).float(), torch.tensor(2.0), torch.tensor(1.0), *[torch.empty(0)] * 3)


def wide_cluster(length: float) -> Case:
    """A cluster so far and a Gaussian so wide that its 64 keys weigh nearly the same.

    On the other side each query matches its own key, with a logit of 30, and next to nothing
    else: what the certificate assumes about cluster and neighborhood is nearly what is there.
    """
    q, k = torch.zeros(1, 8, 160, 64), torch.zeros(1, 1, 8, 160, 64)
    codes = torch.randn(1, 8, 16, 63, generator=torch.Generator().manual_seed(0))
    q[:, :, :16, 1:] = k[:, 0, :, :16, 1:] = F.normalize(codes, dim=-1) * 30**0.5
    q[..., 0] = 1
    k[..., 152:, 0] = length
    v = (k == length).float()
    return Case(q, k, v, torch.tensor(28.0), torch.tensor(1.0), *[torch.empty(0)] * 3)


def random_logits(gain: float) -> Case:
    return draw((1, 2, 40, 32, 16), sigma=2.0, gain=gain, seed=7)


def uniform_keys(sigma: float) -> Case:
    """All logits are equal, so that the tail of the Gaussian is all that is dropped."""
    case = draw((1, 1, 40, 32, 16), sigma=sigma, seed=8)
    ones = torch.ones_like(case.q)
    # for some channel all that row 15 drops has the value 1, and all it keeps 0
    y = torch.arange(40)[:, None]
    v = (y >= 16 + torch.arange(16)).float()[:, None].expand_as(case.v)
    return case._replace(q=ones, k=ones[:, None], v=v)


ADVERSARIES = {
    **{f"cluster-{n}": far_cluster(n, (32, 24), (40, 32)) for n in (14.0, 20.0, 26.0, 33.0, 41.0)},
    **{f"row-cluster-{n}": far_cluster(n, (21, 8), (40, 32)) for n in (1.0, 3.0, 5.0, 8.0, 13.0)},
    **{f"half-plane-{n}": half_plane(n) for n in (8.0, 14.0, 22.0, 26.0)},
    **{f"wide-cluster-{n}": wide_cluster(n) for n in (23, 25.5, 30, 32.6, 36)},
    **{f"random-x{n}": random_logits(n) for n in (1, 10, 100)},
    **{f"uniform-{n}": uniform_keys(n) for n in (0.5, 1.0, 2.0, 4.0)},
}
