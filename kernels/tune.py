"""An autotuning run: the fastest launch configuration of every attention kernel on this GPU.

    python -m mana_triton.kernels.tune
    python -m mana_triton.kernels.tune --kernels memory_forward memory_backward --minutes 3
    python -m mana_triton.kernels.tune --compile-only sm_80,sm_90          needs no GPU

Every candidate is compiled first and dropped if it spills registers, does not fit into shared
memory or computes scores twice. Then its results are compared with float64, then it is timed, most
promising first. The winners are written to tuned.json, which the kernels read. An interrupted run
continues: what this GPU and these versions have measured is not measured again. Progress is
printed to stderr; the last line of stdout is one JSON object.
"""

import argparse
import json
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from . import config, cross_frame, memory, reference
from .inspect import Compiled, compile_job, jobs

SHAPES = ((64, 112), (144, 180), (270, 480))  # low-resolution rows and columns
FRAMES, ENTRIES, SIGMA = 7, 512, 4.0
CHECK = (24, 40)  # frame of the comparison with float64: whole and partial tiles
SLACK = {False: 2, True: 3}  # times the error of PyTorch in the same type; of gradients
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Case(NamedTuple):
    """A kernel and the operands that a configuration is searched for."""

    kernel: str
    d: int
    dtype: torch.dtype
    height: int
    width: int

    def __str__(self) -> str:
        name = config.dtype_name(self.dtype)
        return f"{self.kernel} {self.height}x{self.width} D={self.d} {name}"


def candidates(kernel: str, arch: str, d: int, dtype: torch.dtype) -> list[dict]:
    """The configurations worth compiling, the default first."""
    default = config.default_config(kernel, arch, d, dtype)
    flags = (False, True) if arch == "sm_90" and kernel == "cross_frame_forward" else (False,)
    amd = arch.startswith("gfx")  # twice as wide a warp
    warp, warps, stages = (64, (2, 4), (1, 2)) if amd else (32, (4, 8), (2, 3))
    sizes = (32, 64, 128)
    found = [default]
    for m, n, w, stage, flag in product(sizes, sizes, warps, stages, flags):
        # fewer than 16 scores leave a thread idle, more than 128 do not fit into its registers
        if not 16 <= m * n // (warp * w) <= 128 or (flag and (m, w) != (128, 4)):
            continue
        options = config.launch_options(m, n, w, stage, flag)
        if options != default:
            found.append(options)
    return found


# --- compilation


class Request(NamedTuple):
    """One compilation: a kernel with a configuration on an architecture."""

    kernel: str
    arch: str
    d: int
    dtype: torch.dtype
    config: dict


def compile_request(request: Request) -> dict[str, Compiled | str]:
    """The kernel and its variants, by name; a string says why one does not compile."""
    kernel, arch, d, dtype, options = request
    every = jobs(kernel, d, dtype, options, arch)
    return {name: compile_job(job, options, arch) for name, job in every.items()}


def compile_pool() -> ProcessPoolExecutor:
    """Processes that compile, as many as there are cores."""
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=context)


def compile_all(
    pool: ProcessPoolExecutor, requests: list[Request]
) -> Iterator[dict[str, Compiled | str]]:
    """The results of the requests, in their order."""
    return pool.map(compile_request, requests)


def verdict(compiled: dict[str, Compiled | str], arch: str) -> str:
    """Why a configuration is dropped; empty if it is not."""
    for name, result in compiled.items():
        flaws = [result] if isinstance(result, str) else result.flaws(arch)
        if flaws:
            return f"{name}: {', '.join(flaws)}"
    return ""


def cost(compiled: dict[str, Compiled | str]) -> float:
    """Instructions per score of all hot loops: the expected speed before anything is timed."""
    return sum(sum(x.instructions) for x in compiled.values() if isinstance(x, Compiled))


def sound_candidates(
    key: tuple[str, int, torch.dtype], arch: str, compile_all: Callable
) -> list[tuple[dict, Compiled]]:
    """The candidates without flaws and their compilations, most promising first."""
    kernel, d, dtype = key
    options = candidates(kernel, arch, d, dtype)
    requests = [Request(kernel, arch, d, dtype, x) for x in options]
    sound = []
    for option, compiled in zip(options, compile_all(requests), strict=True):
        if reason := verdict(compiled, arch):
            report(f"dropped {kernel} {describe(option)}: {reason}")
        else:
            sound.append((cost(compiled), option, compiled[kernel]))
    sound.sort(key=lambda x: x[0])
    return [(option, result) for _, option, result in sound]


# --- the operations


class Problem(NamedTuple):
    """What launches a kernel, and what its results are compared with; both give a list."""

    run: Callable[[], list[Tensor]]
    reference: Callable[[bool], list[Tensor]]  # in float64 (True) or in the type of the case


def make_problem(case: Case, height: int, width: int, device: torch.device, exact: bool) -> Problem:
    """Random operands; a backward kernel gives gradients, `exact` visits every pair."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        x = torch.randn(*size, case.d, generator=generator, device=device)
        return x.to(case.dtype)

    q, scale = normal(1, height, width), torch.tensor(case.d**-0.5, device=device)
    if case.kernel.startswith("memory"):
        return _memory_problem(case.kernel, [q, normal(ENTRIES).T.contiguous(), scale])
    k, v = (normal(1, FRAMES, height, width) for _ in range(2))
    inputs = [q, k, v, torch.tensor(SIGMA, device=device), scale]
    return _cross_frame_problem(case.kernel, inputs, 0.0 if exact else 1e-3)


def _memory_problem(kernel: str, inputs: list[Tensor]) -> Problem:
    q = inputs[0]
    do, wanted = torch.randn_like(q), 2 if is_backward(kernel) else 0
    definition = partial(_reference, reference.memory_attention, inputs, do, wanted)
    y, lse = memory.forward(*inputs, memory.launch_config("memory_forward", q))

    def run() -> list[Tensor]:
        options = memory.launch_config(kernel, q)
        if is_backward(kernel):
            return [*memory.backward(do, *inputs, y, lse, options)[:2]]
        return [memory.forward(*inputs, options)[0]]

    return Problem(run, definition)


def _cross_frame_problem(kernel: str, inputs: list[Tensor], tolerance: float) -> Problem:
    options: dict[str, Any] = {"offsets": False, "first_row": 0}
    options["gaussian"] = "gate" if kernel == "cross_frame_lse" else "bias"
    do, wanted = torch.randn_like(inputs[2]), 3 if is_backward(kernel) else 0
    operation = partial(reference.cross_frame_attention, **options)
    definition = partial(_reference, lambda *x: operation(*x).o, inputs, do, wanted)
    forward = partial(cross_frame.forward, *inputs, **options, tolerance=tolerance)
    if not is_backward(kernel):
        return Problem(lambda: [forward().o], definition)
    result = forward()
    dlse = torch.zeros_like(result.lse)
    backward = partial(cross_frame.backward, do, dlse, dlse, *inputs, result, **options)
    return Problem(lambda: [*backward()[:3]], definition)


def _reference(
    function: Callable[..., Tensor], inputs: list[Tensor], do: Tensor, wanted: int, wide: bool
) -> list[Tensor]:
    """The output of a definition, or the gradients of its first `wanted` inputs."""
    inputs = [x.double() if wide else x.clone() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs[:wanted]]
    o = function(*inputs)
    return [*torch.autograd.grad(o, leaves, do.to(o.dtype))] if wanted else [o]


def is_backward(kernel: str) -> bool:
    """Whether the kernel runs in the backward pass."""
    return kernel.endswith(("dq", "dkv", "backward"))


def wrong(case: Case, device: torch.device) -> str:
    """How the results differ from float64 beyond rounding; empty if they do not."""
    problem = make_problem(case, *CHECK, device, exact=True)
    eager, exact = problem.reference(False), problem.reference(True)
    for x, y, z in zip(problem.run(), eager, exact, strict=True):
        rounding = torch.finfo(case.dtype).eps / 2 * z.abs().max()
        budget = SLACK[is_backward(case.kernel)] * ((y - z).abs().max() + rounding)
        error = (x - z).abs().max()
        if not error <= budget:
            return f"wrong by {error:.2e}, {budget:.2e} allowed"
    return ""


def measure(case: Case, device: torch.device) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the operation, or of its backward pass, in ms."""
    run = make_problem(case, case.height, case.width, device, exact=False).run
    times = np.array(triton.testing.do_bench(run, warmup=25, rep=100, return_mode="all"))
    low, ms, high = np.percentile(times, [20, 50, 80]).tolist()
    return ms, low, high


# --- the search


def tune(
    cases: list[Case],
    device: torch.device,
    deadline: float,
    compile_all: Callable,
    measure: Callable = measure,
    wrong: Callable = wrong,
) -> list[dict]:
    """Search, write tuned.json after every case, and return the entries of these cases.

    Args:
        cases: what to find configurations for.
        device: the GPU.
        deadline: of time.monotonic(), past which no further candidate is tried.
        compile_all: `compile_all` with a pool.
        measure, wrong: the other two steps.
    """
    gpu, arch = torch.cuda.get_device_name(device), config.architecture(device)
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    sound: dict[tuple, list[tuple[dict, Compiled]]] = {}
    entries = []
    for n, case in enumerate(cases, 1):
        fields = {"gpu": gpu, **case._asdict(), "dtype": config.dtype_name(case.dtype)}
        same = [x for x in config.tuned() if fields.items() <= x.items()]
        entry = next((x for x in same if x["complete"] and versions.items() <= x.items()), None)
        if entry is None:
            key = case[:3]
            if key not in sound:
                sound[key] = sound_candidates(key, arch, compile_all)
            found = search(case, sound[key], device, deadline, measure, wrong)
            if found is None:
                continue
            entry = {**fields, **found, **versions}
            config.record(entry)
        report(f"{n}/{len(cases)} {case}: {describe(entry['config'])} {entry['ms']:.4g} ms")
        entries.append(entry)
    return entries


def search(
    case: Case,
    sound: list[tuple[dict, Compiled]],
    device: torch.device,
    deadline: float,
    measure: Callable,
    wrong: Callable,
) -> dict | None:
    """The fastest of the candidates as fields of an entry; None if there was no time for any."""
    best, complete = None, True
    for option, compiled in sound:
        if time.monotonic() > deadline:
            complete = False
            break
        with config.pinned(case.kernel, option):
            if reason := wrong(case, device):
                report(f"dropped {case} {describe(option)}: {reason}")
                continue
            ms, p20, p80 = measure(case, device)
        if best is None or ms < best["ms"]:
            best = {
                "config": option, "ms": ms, "p20": p20, "p80": p80,
                "registers": compiled.registers, "shared": compiled.shared,
            }  # fmt: skip
    if best is None and complete:
        raise RuntimeError(f"no candidate of {case} compiles without flaws and is right")
    return best and {**best, "complete": complete}


def report(line: str) -> None:
    """Print progress."""
    print(line, file=sys.stderr, flush=True)


def describe(options: dict) -> str:
    """A configuration in a few characters: 128x64 w4 s2 ws."""
    m, n, warps, stages, specialize = options.values()
    return f"{m}x{n} w{warps} s{stages}{' ws' if specialize else ''}"


# --- the command


def compile_only(kernels: list[str], archs: list[str], ds: list[int], dtypes: list[str]) -> dict:
    """Compile every candidate, print a line for each, and return the same as one object."""
    requests = [
        Request(kernel, arch, d, DTYPES[name], options)
        for kernel, arch, d, name in product(kernels, archs, ds, dtypes)
        for options in candidates(kernel, arch, d, DTYPES[name])
    ]
    rows = []
    with compile_pool() as pool:
        for request, compiled in zip(requests, compile_all(pool, requests), strict=True):
            for name, result in compiled.items():
                failed = isinstance(result, str)
                row = {
                    "kernel": name, "arch": request.arch, "d": request.d,
                    "dtype": config.dtype_name(request.dtype), "config": request.config,
                    **({} if failed else vars(result)),
                    "flaws": [result] if failed else result.flaws(request.arch),
                }  # fmt: skip
                rows.append(row)
                head = f"{name} {request.arch} D={request.d} {row['dtype']}"
                figures = "" if failed else (
                    f" {result.registers} registers, {result.shared} bytes shared, "
                    f"{' + '.join(f'{x:.2f}' for x in result.instructions)} instructions/score"
                )  # fmt: skip
                flaws = "; ".join(row["flaws"]) or "ok"
                print(f"{head} {describe(request.config)}:{figures} {flaws}", flush=True)
    return {"rows": rows, "triton": triton.__version__}


def shapes(text: str) -> list[tuple[int, int]]:
    """A list such as 64x112,270x480: rows x columns of low-resolution frames."""
    pairs = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if not all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
        raise ValueError(text)
    return pairs  # pyright: ignore[reportReturnType]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mana_triton.kernels.tune", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    kernels, archs = ", ".join(config.KERNELS), ", ".join(config.ARCHITECTURES)
    add("--kernels", nargs="+", choices=config.KERNELS, default=config.KERNELS, metavar="KERNEL",
        help=f"of {kernels}; all by default")  # fmt: skip
    add("--shapes", type=shapes, default=SHAPES, metavar="HxW,...",
        help="low-resolution frames (default: 64x112,144x180,270x480)")  # fmt: skip
    add("--d", nargs="+", type=int, choices=(16, 32, 64, 128), default=[64],
        help="channels of q, k, v (default: 64)")  # fmt: skip
    add("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], help="default: bfloat16")
    add("--minutes", type=float, default=math.inf, help="stop measuring after this long")
    add("--compile-only", metavar="ARCH,...", type=lambda text: text.split(","),
        help=f"compile every candidate, no GPU needed: {archs}")  # fmt: skip
    args = parser.parse_args()
    if unknown := set(args.compile_only or ()) - set(config.ARCHITECTURES):
        parser.error(f"ARCH must be one of {archs}, got {', '.join(unknown)}")
    return args


def main() -> None:
    """Command line."""
    args = parse()
    if args.compile_only:
        result = compile_only(args.kernels, args.compile_only, args.d, args.dtypes)
        print(json.dumps(result))
        return
    if not torch.cuda.is_available():
        sys.exit("error: tuning needs a GPU; --compile-only sm_80,sm_89,sm_90 does not")
    device = torch.device("cuda", torch.cuda.current_device())
    cases = [
        Case(kernel, d, DTYPES[name], *shape)
        for d, name, kernel, shape in product(args.d, args.dtypes, args.kernels, args.shapes)
    ]
    with compile_pool() as pool:
        deadline = time.monotonic() + 60 * args.minutes
        entries = tune(cases, device, deadline, partial(compile_all, pool))
    complete = len(entries) == len(cases) and all(entry["complete"] for entry in entries)
    print(json.dumps({"entries": entries, "complete": complete}))


if __name__ == "__main__":
    main()
