"""Performance guard without a GPU: what the compiler makes of every kernel, against a budget.

compile_budget.json holds the instructions per score of every default configuration, by version
of Triton. After a deliberate change, or for another version, write it again with

    python tests/kernels/test_compile_guard.py

By default the kernels that the shipped presets stream with are compiled. The full matrix takes
minutes: pytest -m slow tests/kernels/test_compile_guard.py. float32 is there for correctness: its
products are exact, its compilation takes minutes, and it has no budget. The interpreter replaces
the kernels that it runs by Python, so they are compiled in processes without it.
"""

import json
from collections.abc import Iterable
from itertools import product
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="no Triton on this platform")

from mana_triton.kernels import config, projection  # noqa: E402
from mana_triton.kernels.inspect import (  # noqa: E402
    Compiled,
    Job,
    compile_job,
    jobs,
    prepass_jobs,
    projection_jobs,
)
from mana_triton.kernels.tune import Request, compile_all, compile_pool  # noqa: E402

BUDGET = Path(__file__).with_name("compile_budget.json")
WITHIN = 0.05  # of the instructions per score
NVIDIA = ("sm_80", "sm_89", "sm_90")
AMD = ("gfx942", "gfx90a")
BF16, F16 = torch.bfloat16, torch.float16
SHIPPED = [(16, BF16), (32, BF16)]  # presets tiny and small
ALL = [(d, dtype) for d in (16, 32, 64, 128) for dtype in (BF16, F16)]
STREAMING = ("cross_frame_forward", "memory_forward")
interpreted = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="kernels compile only without the interpreter"
)


def requests(
    archs: Iterable[str], types: list[tuple[int, torch.dtype]], kernels=config.KERNELS
) -> list[Request]:
    """The kernels' default configurations for some architectures and (D, dtype)."""
    return [
        Request(kernel, arch, d, dtype, config.default_config(kernel, arch, d, dtype))
        for arch in archs
        for d, dtype in types
        for kernel in kernels
    ]


def key(request: Request, name: str) -> str:
    """A kernel's line in the budget; `name` tells its variants apart."""
    return f"{name} {request.arch} D={request.d} {config.dtype_name(request.dtype)}"


def violations(request: Request, name: str, result: Compiled | str, budget: dict) -> list[str]:
    """What is wrong with a kernel, each with what was expected."""
    if isinstance(result, str):
        return [result]
    wrong = result.flaws(request.arch)
    if not result.matrix:
        wrong.append("no matrix instructions")
    elif not result.instructions:
        wrong.append("no hot loop found")
    if any(x < 0.99 for x in result.exponentials):  # too many are a flaw of any kernel
        wrong.append(f"{result.exponentials} exponentials per score, at least 1 expected")
    expected = budget.get(key(request, name))
    if (
        expected is None
        or len(expected) != len(result.instructions)
        or any(abs(x / y - 1) > WITHIN for x, y in zip(result.instructions, expected, strict=True))
    ):
        wrong.append(f"{list(result.instructions)} instructions per score, budget {expected}")
    if request.config["WARP_SPECIALIZE"]:
        # unspecialized, the kernel has as many warps as were asked for
        if not result.warp_specialized or result.warps <= request.config["num_warps"]:
            wrong.append("asked for warp specialization, got the ordinary schedule")
        if not result.bulk_copies:
            wrong.append("warp specialization without bulk copies")
    return wrong


@pytest.fixture(scope="module")
def pool():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)
        with compile_pool() as pool:
            yield pool


def budget() -> dict:
    versions = json.loads(BUDGET.read_text())
    if triton.__version__ not in versions:
        pytest.skip(f"no budget for Triton {triton.__version__}: run python {BUDGET.parent.name}/"
                    f"{Path(__file__).name}")  # fmt: skip
    return versions[triton.__version__]


def check(pool, every: list[Request]) -> None:
    expected = budget()
    failures = [
        f"{key(request, name)}: {failure}"
        for request, compiled in zip(every, compile_all(pool, every), strict=True)
        for name, result in compiled.items()
        for failure in violations(request, name, result, expected)
    ]
    assert not failures, "\n".join(failures)


@pytest.mark.timeout(900)
def test_kernels_of_the_shipped_presets_keep_their_budget(pool):
    check(pool, requests(NVIDIA, SHIPPED, STREAMING))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", NVIDIA)
def test_every_kernel_keeps_its_budget(arch, pool):
    check(pool, requests([arch], ALL))


@pytest.mark.slow
@pytest.mark.parametrize("arch", AMD)
def test_default_configurations_compile_for_amd(arch, pool):
    every = requests([arch], [(64, BF16)])
    for request, compiled in zip(every, compile_all(pool, every), strict=True):
        for name, result in compiled.items():
            assert isinstance(result, Compiled), f"{key(request, name)}: {result}"
            assert result.matrix == "mfma", key(request, name)
            assert result.shared <= config.SHARED_MEMORY[arch], key(request, name)


def some_slow(archs: tuple[str, ...]) -> list:
    return [pytest.param(x, marks=() if x == "sm_90" else pytest.mark.slow) for x in archs]


@interpreted
@pytest.mark.parametrize("arch", some_slow((*NVIDIA, *AMD)))
def test_prepasses_compile_without_spills(arch):
    options = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    for name, job in prepass_jobs(128, BF16).items():
        result = compile_job(job, options, arch)
        assert isinstance(result, Compiled), f"{name}: {result}"
        assert result.spills == 0 or arch in AMD, name


@interpreted
@pytest.mark.parametrize("arch", some_slow((*NVIDIA, *AMD)))
def test_projections_compile(arch):
    """They fit into the registers and the shared memory, and use the best matrix units."""
    everything = [*ALL, (128, torch.float32)] if arch in NVIDIA else [(64, BF16)]
    for d, dtype in SHIPPED if arch == "sm_90" else everything:
        options = projection.launch_config(d, dtype, amd=arch in AMD)
        for name, job in projection_jobs(2 * d, d, dtype, options).items():
            result = compile_job(job, {**options, "BLOCK_N": d}, arch)
            where = f"{name} {arch} D={d} {config.dtype_name(dtype)}"
            assert isinstance(result, Compiled), f"{where}: {result}"
            assert not result.flaws(arch), f"{where}: {result.flaws(arch)}"
            if name == "projection":
                # wgmma takes no three products for one of float32
                wide = arch == "sm_90" and dtype != torch.float32
                expected = "mfma" if arch in AMD else "wgmma" if wide else "mma"
                assert result.matrix == expected, where


def test_warp_specialization_is_the_default_where_there_is_any():
    for d, dtype in product((16, 32, 64, 128), (BF16, F16)):
        assert config.default_config("cross_frame_forward", "sm_90", d, dtype)["WARP_SPECIALIZE"]
    for arch in ("sm_80", "sm_89"):
        assert not config.default_config("cross_frame_forward", arch, 64, BF16)["WARP_SPECIALIZE"]


# --- the guard detects a regression


def regressed(kernel: str, arch: str, constexprs: dict | None = None, **changes) -> list[str]:
    """Violations of a kernel compiled with other constants or another configuration."""
    (request,) = (x for x in requests([arch], [(64, BF16)]) if x.kernel == kernel)
    request = request._replace(config={**request.config, **changes})
    function, signature, constants, divisible = jobs(
        kernel, request.d, request.dtype, request.config, arch
    )[kernel]
    job = Job(function, signature, {**constants, **(constexprs or {})}, divisible)
    return violations(request, kernel, compile_job(job, request.config, arch), budget())


REGRESSIONS = {
    # a mask in the inner loop, as for a number of entries that no block divides
    "slower": ("memory_forward", "sm_80", {"EVEN_N": False}, {}, "instructions per score, budget"),
    "double-work": ("memory_forward", "sm_80", {}, {"num_warps": 8}, "exponentials per score"),
    "spills": ("memory_backward", "sm_80", {}, {"BLOCK_M": 128, "BLOCK_N": 64}, "spills"),
    "too-much-memory": (
        "memory_forward", "sm_89", {}, {"BLOCK_N": 128, "num_stages": 8}, "bytes of shared memory",
    ),
    # eight warps lose the specialization without a message
    "ordinary-schedule": (
        "cross_frame_forward", "sm_90", {}, {"num_warps": 8, "WARP_SPECIALIZE": True},
        "asked for warp specialization, got the ordinary schedule",
    ),
}  # fmt: skip


@interpreted
@pytest.mark.parametrize("name", REGRESSIONS)
def test_a_regression_is_detected(name):
    kernel, arch, constexprs, changes, message = REGRESSIONS[name]
    found = regressed(kernel, arch, constexprs, **changes)
    assert any(message in x for x in found), found


def test_scalar_arithmetic_is_detected():
    (request,) = (x for x in requests(["sm_90"], [(64, BF16)]) if x.kernel == "memory_forward")
    scalar = Compiled(
        registers=255, spills=0, shared=0, occupancy=1, matrix=None, instructions=(),
        exponentials=(), bulk_copies=0, warps=4, warp_specialized=False,
    )  # fmt: skip
    assert "no matrix instructions" in violations(request, "memory_forward", scalar, budget())


def write_budget() -> None:
    """Compile the default configurations and write their lines of compile_budget.json."""
    every = requests(NVIDIA, ALL)
    with compile_pool() as pool:
        lines = {
            key(request, name): list(result.instructions)
            for request, compiled in zip(every, compile_all(pool, every), strict=True)
            for name, result in compiled.items()
            if isinstance(result, Compiled)
        }
    versions = json.loads(BUDGET.read_text()) if BUDGET.exists() else {}
    versions[triton.__version__] = lines
    text = ",\n".join(
        f"{json.dumps(version)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(x)}" for name, x in sorted(lines.items()))
        + "\n}"
        for version, lines in sorted(versions.items())
    )
    BUDGET.write_text(f"{{\n{text}\n}}\n")


if __name__ == "__main__":
    write_budget()
