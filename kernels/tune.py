"""An autotuning run: the fastest launch configuration of every attention kernel on this GPU.

    python -m mana_triton.kernels.tune
    python -m mana_triton.kernels.tune --kernels memory_forward memory_backward --minutes 3
    python -m mana_triton.kernels.tune --compile-only sm_80,sm_90          needs no GPU

Every candidate is compiled first and dropped if it spills registers, does not fit into shared
memory or computes scores twice; then its results are compared with float64; then it is timed,
through the public operation, most promising first. The winners go into tuned.json, which the
kernels read. A run that was stopped goes on where it was: what this GPU and these versions have
measured is not measured again. The last line of stdout is one JSON object.
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
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from . import config, cross_frame, memory, reference
from .inspect import Compiled, compile_job, jobs

SHAPES = ((64, 112), (144, 180), (270, 480))  # low-resolution rows and columns
FRAMES, ENTRIES, SIGMA = 7, 512, 4.0
CHECK = (24, 40)  # frame of the comparison with float64: whole and partial tiles
SLACK = {False: 2, True: 3}  # times the error of PyTorch in the same type; of gradients
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Case(NamedTuple):
    """What a configuration is sought for."""

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
        options = {
            "BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": stage,
            "WARP_SPECIALIZE": flag,
        }  # fmt: skip
        if options != default:
            found.append(options)
    return found


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
    """What becomes of each request, in their order."""
    return pool.map(compile_request, requests)


def verdict(compiled: dict[str, Compiled | str], arch: str) -> str:
    """Why a configuration is dropped; empty if it is not."""
    for name, result in compiled.items():
        flaws = [result] if isinstance(result, str) else result.flaws(arch)
        if flaws:
            return f"{name}: {', '.join(flaws)}"
    return ""


def cost(compiled: dict[str, Compiled | str]) -> float:
    """Instructions per score of all hot loops: what promises speed before anything is timed."""
    return sum(sum(x.instructions) for x in compiled.values() if isinstance(x, Compiled))


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
        entries = normal(ENTRIES).T.contiguous()
        return _memory_problem(case.kernel, q, entries, scale)
    k, v = (normal(1, FRAMES, height, width) for _ in range(2))
    inputs = [q, k, v, torch.tensor(SIGMA, device=device), scale]
    return _cross_frame_problem(case.kernel, inputs, 0.0 if exact else 1e-3)


def _memory_problem(kernel: str, q: Tensor, entries: Tensor, scale: Tensor) -> Problem:
    do = torch.randn_like(q)

    def differentiated(wide: bool) -> list[Tensor]:
        inputs = [x.double() if wide else x for x in (q, entries, scale)]
        return _reference(reference.memory_attention, inputs, do, 2 if is_backward(kernel) else 0)

    height, width, d = q.shape[1:]
    options = partial(config.launch_config, d=d, dtype=q.dtype, height=height, width=width)
    forward = partial(memory.forward, q, entries, scale)
    if not is_backward(kernel):
        return Problem(
            lambda: [forward(options("memory_forward", device=q.device))[0]], differentiated
        )
    y, lse = forward(options("memory_forward", device=q.device))

    def run() -> list[Tensor]:
        launch = options("memory_backward", device=q.device)
        return [*memory.backward(do, q, entries, scale, y, lse, launch)[:2]]

    return Problem(run, differentiated)


def _cross_frame_problem(kernel: str, inputs: list[Tensor], tolerance: float) -> Problem:
    options: dict[str, Any] = {"offsets": False, "first_row": 0}
    options["gaussian"] = "gate" if kernel == "cross_frame_lse" else "bias"
    do = torch.randn_like(inputs[2])

    def definition(*x: Tensor) -> Tensor:
        return reference.cross_frame_attention(*x, **options).o

    def differentiated(wide: bool) -> list[Tensor]:
        wanted = 3 if is_backward(kernel) else 0
        return _reference(definition, [x.double() if wide else x for x in inputs], do, wanted)

    forward = partial(cross_frame.forward, *inputs, **options, tolerance=tolerance)
    if not is_backward(kernel):
        return Problem(lambda: [forward().o], differentiated)
    result = forward()
    dlse = torch.zeros_like(result.lse)

    def run() -> list[Tensor]:
        return [*cross_frame.backward(do, dlse, dlse, *inputs, result, **options)[:3]]

    return Problem(run, differentiated)


def _reference(
    function: Callable[..., Tensor], inputs: list[Tensor], do: Tensor, differentiable: int
) -> list[Tensor]:
    """The output, or the gradients of the first inputs."""
    inputs = [x.detach().requires_grad_(n < differentiable) for n, x in enumerate(inputs)]
    o = function(*inputs)
    if not differentiable:
        return [o]
    return [*torch.autograd.grad(o, inputs[:differentiable], do.to(o.dtype))]


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
    console = Console(stderr=True)
    sound: dict[tuple, list[tuple[dict, Compiled]]] = {}
    entries = []
    columns = *Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        whole = progress.add_task("cases", total=len(cases))
        for case in cases:
            entry = find(config.tuned(), gpu, case)
            if not (entry and entry["complete"] and versions.items() <= entry.items()):
                key = case[:3]
                if key not in sound:
                    sound[key] = check_candidates(key, arch, compile_all, console)
                found = search(case, sound[key], device, deadline, progress, measure, wrong)
                if found is None:
                    continue
                entry = {"gpu": gpu, **_fields(case), **found, **versions}
                record(entry)
            entries.append(entry)
            progress.advance(whole)
    return entries


def check_candidates(
    key: tuple, arch: str, compile_all: Callable, console: Console
) -> list[tuple[dict, Compiled]]:
    """The candidates without flaws and what they compile to, most promising first."""
    kernel, d, dtype = key
    configs = candidates(kernel, arch, d, dtype)
    requests = [Request(kernel, arch, d, dtype, options) for options in configs]
    sound = []
    for options, compiled in zip(configs, compile_all(requests), strict=True):
        if reason := verdict(compiled, arch):
            console.print(f"dropped {kernel} {describe(options)}: {reason}", highlight=False)
        else:
            sound.append((cost(compiled), options, compiled[kernel]))
    sound.sort(key=lambda x: x[0])
    return [(options, result) for _, options, result in sound]


def search(
    case: Case,
    sound: list[tuple[dict, Compiled]],
    device: torch.device,
    deadline: float,
    progress: Progress,
    measure: Callable,
    wrong: Callable,
) -> dict | None:
    """The fastest of the candidates as fields of an entry; None if there was no time for any."""
    best, complete = None, True
    task = progress.add_task(str(case), total=len(sound))
    for options, compiled in sound:
        if time.monotonic() > deadline:
            complete = False
            break
        with config.pinned(case.kernel, options):
            if reason := wrong(case, device):
                progress.console.print(f"dropped {case} {describe(options)}: {reason}")
            else:
                ms, p20, p80 = measure(case, device)
                if best is None or ms < best["ms"]:
                    best = {
                        "config": options, "ms": ms, "p20": p20, "p80": p80,
                        "registers": compiled.registers, "shared": compiled.shared,
                    }  # fmt: skip
        progress.advance(task)
    progress.remove_task(task)
    if best is None and complete:
        raise RuntimeError(f"no candidate of {case} compiles without flaws and is right")
    return best and {**best, "complete": complete}


def _fields(case: Case) -> dict:
    return {**case._asdict(), "dtype": config.dtype_name(case.dtype)}


def find(entries: list[dict], gpu: str, case: Case) -> dict | None:
    """The entry of exactly this case."""
    fields = {"gpu": gpu, **_fields(case)}
    return next((entry for entry in entries if fields.items() <= entry.items()), None)


def record(entry: dict) -> None:
    """Put an entry into tuned.json, in the place of an older one of its case."""
    keys = ("gpu", "kernel", "d", "dtype", "height", "width")

    def place(x: dict) -> tuple:
        return tuple(x[key] for key in keys)

    entries = [x for x in config.tuned() if place(x) != place(entry)] + [entry]
    lines = ",\n".join(json.dumps(x) for x in sorted(entries, key=place))
    draft = config.TUNED.with_suffix(".tmp")
    draft.write_text(f"[\n{lines}\n]\n")
    draft.replace(config.TUNED)
    config.forget()


def describe(config: dict) -> str:
    """A configuration in a few characters: 128x64 w4 s2 ws."""
    flag = " ws" if config["WARP_SPECIALIZE"] else ""
    return (
        f"{config['BLOCK_M']}x{config['BLOCK_N']} w{config['num_warps']} s{config['num_stages']}"
        f"{flag}"
    )


def show(entries: list[dict]) -> None:
    """The winners, on stdout."""
    table = Table("kernel", "frame", "D", "type", "configuration", "ms", "p20", "p80", "registers")
    for entry in entries:
        table.add_row(
            entry["kernel"], f"{entry['height']}x{entry['width']}", str(entry["d"]),
            entry["dtype"], describe(entry["config"]), *(f"{entry[x]:.4g}" for x in ("ms", "p20",
            "p80")), str(entry["registers"]),
        )  # fmt: skip
    Console(width=140).print(table)


def compile_only(kernels: list[str], archs: list[str], ds: list[int], dtypes: list[str]) -> dict:
    """Compile every candidate, print what it became, and return the same as one object."""
    requests = [
        Request(kernel, arch, d, DTYPES[name], options)
        for kernel, arch, d, name in product(kernels, archs, ds, dtypes)
        for options in candidates(kernel, arch, d, DTYPES[name])
    ]
    table = Table(
        "kernel", "arch", "D", "type", "configuration", "registers", "spills", "shared KiB",
        "programs/core", "matrix", "instructions/score", "verdict",
    )  # fmt: skip
    rows = []
    with compile_pool() as pool, Progress(console=Console(stderr=True)) as progress:
        results = progress.track(compile_all(pool, requests), total=len(requests))
        for request, compiled in zip(requests, results, strict=True):
            for name, result in compiled.items():
                where = {
                    "kernel": name, "arch": request.arch, "d": request.d,
                    "dtype": config.dtype_name(request.dtype), "config": request.config,
                }  # fmt: skip
                if isinstance(result, str):
                    figures, flaws = {}, [result]
                else:
                    figures, flaws = vars(result), result.flaws(request.arch)
                rows.append({**where, **figures, "flaws": flaws})
                table.add_row(*_cells(rows[-1]))
    Console(width=190).print(table)
    return {"rows": rows, "triton": triton.__version__}


def _cells(row: dict) -> list[str]:
    cells = [row["kernel"], row["arch"], str(row["d"]), row["dtype"], describe(row["config"])]
    if "registers" in row:
        cells += [
            str(row["registers"]), str(row["spills"]), f"{row['shared'] / 1024:.1f}",
            str(row["occupancy"] or "-"), row["matrix"] or "none",
            " + ".join(f"{x:.2f}" for x in row["instructions"]),
        ]  # fmt: skip
    else:
        cells += [""] * 6
    return [*cells, "; ".join(row["flaws"]) or "ok"]


def shapes(text: str) -> list[tuple[int, int]]:
    """A list such as 64x112,270x480: rows x columns of low-resolution frames."""
    pairs = [tuple(map(int, part.split("x"))) for part in text.split(",")]
    if not all(len(pair) == 2 and min(pair) > 0 for pair in pairs):
        raise ValueError(text)
    return pairs  # pyright: ignore[reportReturnType]


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m mana_triton.kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
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
    show(entries)
    complete = len(entries) == len(cases) and all(entry["complete"] for entry in entries)
    print(json.dumps({"entries": entries, "complete": complete}))


if __name__ == "__main__":
    main()
