"""Everything that takes a GPU, in one command: tests, ceilings, tuning, the operation's speed.

    python eval/gpu_check.py [--minutes 8]

1. the kernels' GPU tests; 2. what this GPU reaches at best: copying, an 8192^3 bfloat16 product;
3. an autotuning run at the main sizes, which writes kernels/tuned.json; 4. the whole `paper` model
as a stream runs it: pictures in, planes of an 8-bit video out, latency of one frame and throughput,
beside the time that its arithmetic takes at the measured product's rate; 5. cross-frame attention
(T = 7, D = 64, sigma = 4, bfloat16) against what one would use today, in the same process:
dense eager, SDPA with a mask, SDPA with the Gaussian in extra columns, FlexAttention without and
with a BlockMask of the very key tiles that ours visits, of the forward pass and of forward +
backward, ours with its choice of tiles; 6. the decoder of `paper` as it is, with ReLU fused into
cuDNN's convolutions, and compiled. Times are medians with the 20th and 80th percentiles.

It runs from a bare checkout with torch, triton, einops, numpy, rich, pytest and safetensors. The
results go to eval/results/<gpu>.json; the last line of stdout is the same as one JSON object.
"""

import argparse
import copy
import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import FlopCounterMode

from eval.baselines import augmented_sdpa, block_mask, eager, flex, flex_blocks, masked_sdpa
from mana_triton import MANA, MANAConfig, cross_frame_attention
from mana_triton.engine.feature_cache import Batches, Graph
from mana_triton.engine.upscaler import Upscaler, window_numbers
from mana_triton.kernels import reference
from mana_triton.model import ResidualBlock
from mana_triton.video.yuv import Color, rgb_to_yuv

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "tests/kernels/test_operators.py",
    "tests/engine/test_batches.py",
)
SIZES = ((64, 112), (144, 180), (270, 480))
FRAMES, CHANNELS, SIGMA, TOLERANCE = 7, 64, 4.0, 1e-3
DEVICE, DTYPE = "cuda", torch.bfloat16
# low-resolution size: ms of latency and ms a frame that an H200 is to reach
TARGETS = {(64, 112): (1.2, 0.7), (270, 480): (None, 14.0), (540, 960): (None, 55.0)}
TRIES = 200  # frames that the latency is measured on
# of the time, at which testing, tuning, whole models and the operation must have ended
SHARES = 0.35, 0.55, 0.7, 0.9


def ours(
    q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor, gaussian: str = "bias"
) -> Tensor:
    """The Triton kernels."""
    return cross_frame_attention(
        q, k, v, sigma, scale=scale, tolerance=TOLERANCE, gaussian=gaussian, backend="triton"
    )


# --- measurement


def operands(height: int, width: int, dtype: torch.dtype, device: str, frames: int) -> list[Tensor]:
    """Random q, k, v of one clip, sigma and scale."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        x = torch.randn(1, *size, height, width, CHANNELS, generator=generator, device=device)
        return x.to(dtype)

    sigma, scale = torch.tensor([SIGMA, CHANNELS**-0.5], device=device)
    return [normal(), normal(frames), normal(frames), sigma, scale]


def relative_error(function: Callable, inputs: list[Tensor]) -> float:
    """Error of the first frame's middle row, relative to its float64 value's root mean square."""
    q, k, v, sigma, scale = inputs
    row = q.shape[1] // 2
    with torch.no_grad():
        wide = q[:, row : row + 1].double(), k[:, :1].double(), v[:, :1].double()
        exact = reference.cross_frame_attention(
            *wide, sigma.double(), scale.double(), first_row=row
        ).o
        actual = function(*inputs)[:, :1, row : row + 1].double()
    return float((actual - exact).norm() / exact.norm())


def measure(run: Callable[[], Any]) -> dict[str, float]:
    """Median and percentiles in ms, and the memory that a run takes beyond what is there."""
    from triton.testing import do_bench

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    times = np.array(do_bench(run, warmup=50, rep=200, return_mode="all"))
    p20, ms, p80 = np.percentile(times, [20, 50, 80]).tolist()
    return {"ms": ms, "p20": p20, "p80": p80, "peak_mib": peak}


def ceilings() -> dict[str, float]:
    """What the GPU reaches: GB/s of a copy, TFLOP/s of an 8192^3 bfloat16 product."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source))["ms"]
    a, b = torch.randn(2, 8192, 8192, device="cuda").to(torch.bfloat16)
    product = measure(lambda: a @ b)["ms"]
    return {"copy_gb_s": 2 * 2**30 / copy / 1e6, "matmul_tflop_s": 2 * 8192**3 / product / 1e9}


def run_tests(seconds: float) -> dict[str, Any]:
    """The GPU tests of the kernels, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS]
    command += ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]
    # deterministic algorithms, which the tests poison memory with, ask cuBLAS for this
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not done after {seconds:.0f} s"}
    lines = result.stdout.strip().splitlines() or result.stderr.strip().splitlines() or [""]
    passed = result.returncode == 0
    return {"passed": passed, "summary": lines[-1], "output": "" if passed else result.stdout}


def run_tuning(deadline: float) -> list[dict]:
    """Tune every kernel at the main sizes; the entries that tuned.json now holds for them."""
    from mana_triton.kernels import config as tuning
    from mana_triton.kernels import tune

    cases = [
        tune.Case(kernel, CHANNELS, torch.bfloat16, *size)
        for size in SIZES
        for kernel in tuning.KERNELS
    ]
    device = torch.device("cuda", torch.cuda.current_device())
    with tune.compile_pool() as pool:
        return tune.tune(cases, device, deadline, partial(tune.compile_all, pool))


def compare(height: int, width: int, deadline: float) -> list[dict[str, Any]]:
    """Rows of the operation table for one size."""
    from mana_triton.kernels import cross_frame

    inputs = operands(height, width, DTYPE, DEVICE, FRAMES)
    q, k, v, sigma, scale = inputs
    with torch.no_grad():
        result = cross_frame.forward(
            q, k, v, sigma, scale,
            gaussian="bias", offsets=False, tolerance=TOLERANCE, first_row=0,
        )  # fmt: skip
        visited = float(cross_frame.density(result.window_radius, q, k, 0))
    compiled = torch.compile(flex_attention, dynamic=False)
    mask = block_mask(result.window_radius, height, width)
    dense = FRAMES * (height * width) ** 2
    # bytes of the [HW, HW] temporaries, forward and backward
    contestants: dict[str, tuple[Callable, int]] = {
        "ours, bias": (ours, 0),
        "ours, gate": (partial(ours, gaussian="gate"), 0),
        "FlexAttention, same tiles": (partial(flex_blocks, attend=compiled, mask=mask), 0),
        "SDPA, extra columns": (augmented_sdpa, 0),
        "SDPA, mask": (masked_sdpa, 20 * dense // FRAMES),
        "FlexAttention, dense": (partial(flex, attend=compiled), 0),
        "dense eager": (eager, 14 * dense),
    }
    rows = []
    for name, (function, size) in contestants.items():
        row: dict[str, Any] = {"what": name, "height": height, "width": width}
        free = torch.cuda.mem_get_info()[0]
        if time.monotonic() > deadline:
            row["left_out"] = "no time left"
        elif size > 0.8 * free:
            row["left_out"] = f"needs {size / 2**30:.0f} GiB, {free / 2**30:.0f} free"
        else:
            row |= contest(name, function, inputs, visited)
        torch.cuda.empty_cache()
        rows.append(row)
    return rows


def contest(name: str, function: Callable, inputs: list[Tensor], visited: float) -> dict[str, Any]:
    """The figures of one implementation; of a peer that fails, the reason."""
    differentiable = inputs[:4]
    upstream = torch.randn_like(inputs[1])

    def forward() -> Tensor:
        with torch.no_grad():
            return function(*inputs)

    def both() -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in differentiable]
        return torch.autograd.grad(function(*leaves, inputs[4]), leaves, upstream)

    try:
        figures: dict[str, Any] = {"forward": measure(forward), "both": measure(both)}
        if name != "ours, gate":
            figures["relative_error"] = relative_error(function, inputs)
    except RuntimeError as error:
        if name.startswith("ours"):
            raise
        return {"left_out": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    figures["visited"] = visited if name in ("ours, bias", "FlexAttention, same tiles") else 1.0
    return figures


def tflop_s(row: dict[str, Any], passes: str) -> float:
    """Visited pairs as matrix products: 4 D FLOP each forward, 14 D forward + backward.

    Two products forward; five more backward, which is how FlashAttention counts.
    """
    pairs = row["visited"] * FRAMES * (row["height"] * row["width"]) ** 2
    return (4 if passes == "forward" else 14) * CHANNELS * pairs / row[passes]["ms"] / 1e9


# --- the whole model


def model_rows(preset: str, seconds: float, deadline: float, matmul: float) -> list[dict[str, Any]]:
    """Rows of the table of whole models; `seconds` are spent on the throughput of each size.

    matmul: TFLOP/s of the measured product.
    """
    rows = []
    for size in TARGETS:
        if time.monotonic() > deadline:
            rows.append({"what": preset, "height": size[0], "width": size[1],
                         "left_out": "no time left"})  # fmt: skip
        else:
            rows.append(model_row(preset, *size, seconds, matmul))
    return rows


def model_row(
    preset: str, height: int, width: int, seconds: float, matmul: float
) -> dict[str, Any]:
    """What a stream of pictures takes with untrained weights: latency, throughput, floor."""
    torch.manual_seed(0)
    model = MANA(MANAConfig.preset(preset))
    upscaler = Upscaler(model, device=DEVICE, scene_cuts=False)
    plan = upscaler.plan_for(height, width)
    pictures = np.random.default_rng(0).integers(0, 256, (16, height, width, 3), np.uint8)
    one = latency(upscaler.model, pictures)
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stream = upscaler.stream(
        (pictures[n % len(pictures)] for n in itertools.count()),
        finish=partial(rgb_to_yuv, bits=8, color=Color(), full_range=False, chroma_block=(2, 2)),
    )
    for _ in range(3 * max(plan.batch, 1)):  # until everything is compiled
        next(stream)
    began, frames = time.perf_counter(), 0
    while (took := time.perf_counter() - began) < seconds:
        for _ in range(max(plan.batch, 1)):
            next(stream)
        frames += max(plan.batch, 1)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    visited = visited_by(upscaler.model, pictures)
    floor = flops(model.config, height, width, visited) / matmul / 1e9
    ms = 1000 * took / frames
    latency_target, target = TARGETS.get((height, width), (None, None))
    peak = torch.cuda.max_memory_reserved() / 2**20 if DEVICE == "cuda" else None
    return {
        "what": preset, "height": height, "width": width, "precision": upscaler.precision,
        "batch": plan.batch, "latency": one, "latency_target": latency_target,
        "ms_per_frame": ms, "target": target, "floor_ms": floor, "of_floor": floor / ms,
        "visited": visited, "peak_mib": peak, "predicted_mib": plan.peak / 2**20,
    }  # fmt: skip


@torch.no_grad()
def latency(model: MANA, pictures: np.ndarray) -> dict[str, float]:
    """Milliseconds from a picture in memory to the enlarged one: median, percentiles."""
    frames, t = torch.from_numpy(pictures), model.config.frames
    height, width = pictures.shape[1:3]
    batches = Batches(model, height, width, frames.dtype, 1)
    times = []
    for n in range(TRIES):
        began = time.perf_counter()
        batches.encode([frames[n % len(frames)]], [n])
        batches.enlarge([window_numbers(n - t // 2, 0, n, t)]).wait()
        times.append(1000 * (time.perf_counter() - began))
    p20, ms, p80 = np.percentile(times[TRIES // 4 :], [20, 50, 80]).tolist()
    return {"ms": ms, "p20": p20, "p80": p80}


@torch.no_grad()
def visited_by(model: MANA, pictures: np.ndarray) -> float:
    """Share of the (query, key) pairs that the attention of a window visits."""
    like, config = model.conv_first.weight, model.config
    frames = torch.from_numpy(pictures[: config.frames]).movedim(3, 1).to(like) / 255
    f, k, v, *norm = model.encode(frames)
    q = model.queries(f, *norm)[:1]
    return cross_frame_attention(
        q, k[None], v[None], model.sigma, scale=model.scale,
        tolerance=model.tolerance, backend=model.backend, return_density=True,
    )[1]  # fmt: skip


@torch.no_grad()
def flops(config: MANAConfig, height: int, width: int, visited: float) -> float:
    """Of one frame, with the features of the others kept: products of network and attention."""
    with torch.device("meta"):
        model = MANA(config)
        frame = torch.empty(1, 3, height, width)
        x = torch.empty(1, model.w_z.in_channels, height, width)
    with FlopCounterMode(display=False) as counter:
        f, _, _, *norm = model.encode(frame)
        model.queries(f, *norm)
        model.decode(model.w_z(x))
    pixels, d = height * width, config.channels // 2
    memory = (4 * d * config.memory_slots + 2 * d * config.channels) * pixels
    return counter.get_total_flops() + memory + 4 * d * config.frames * visited * pixels**2


# --- convolutions


def decoder_rows(preset: str, deadline: float) -> list[dict[str, Any]]:
    """Ways to run the decoder's convolutions, each as one graph, at the sizes of 2K and less."""
    rows = []
    for height, width in [size for size in TARGETS if max(size) <= 512]:
        upscaler = Upscaler(MANA(MANAConfig.preset(preset)), device=DEVICE)
        model, batch = upscaler.model, max(upscaler.plan_for(height, width).batch, 1)
        generator = torch.Generator(DEVICE).manual_seed(0)
        z = torch.randn(
            batch, model.config.channels, height, width, generator=generator, device=DEVICE
        ).to(model.conv_first.weight.dtype, memory_format=torch.channels_last)
        ways = {
            "as it is": model.decode,
            "ReLU fused by cuDNN": with_fused_relu(model).decode,
            "torch.compile": torch.compile(model.decode, dynamic=False),
        }
        for name, decode in ways.items():
            row: dict[str, Any] = {"what": name, "height": height, "width": width, "batch": batch}
            if time.monotonic() > deadline:
                row["left_out"] = "no time left"
            else:
                row |= decoding(decode, z, model.decode if decode != model.decode else None)
            rows.append(row)
    return rows


def with_fused_relu(model: MANA) -> MANA:
    """The model, with ReLU and bias in the first convolution of each block."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            block.forward = partial(_fused_block, block)
    return model


def _fused_block(block: ResidualBlock, x: Tensor) -> Tensor:
    first = block.conv1
    y = torch.cudnn_convolution_relu(x, first.weight, first.bias, (1, 1), (1, 1), (1, 1), 1)
    return block.conv2(y).add_(x)


@torch.no_grad()
def decoding(decode: Callable, z: Tensor, reference: Callable | None) -> dict[str, Any]:
    """Milliseconds a frame, and the difference from the reference; of a way that fails, why."""
    try:
        out = decode(z)
        graph = Graph(z.device)
        times = measure(lambda: graph(lambda: out.copy_(decode(z))))
        figures = {key: x / len(z) for key, x in times.items() if key != "peak_mib"}
    except RuntimeError as error:
        if reference is None:
            raise
        return {"left_out": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    if reference is not None:
        exact = reference(z)
        figures["relative_difference"] = float((out - exact).norm() / exact.norm())
    return figures


def _measured(rows: list[dict[str, Any]], table: Table) -> Iterator[tuple[str, dict[str, Any]]]:
    """Size of the output and row of what was measured; why others were not, goes in the table."""
    for row in rows:
        size = f"{4 * row['width']}x{4 * row['height']}"
        if "left_out" in row:
            table.add_row(size, row["what"], row["left_out"])
        else:
            yield size, row


def decoder_table(rows: list[dict[str, Any]]) -> Table:
    """The table of the convolutions."""
    table = Table(
        "output", "decoder", "frames at once", "ms/frame", "x", "rel. difference",
        title="the decoder's convolutions, as one graph",
    )  # fmt: skip
    for size, row in _measured(rows, table):
        first = next(
            (x for x in rows if x["what"] == "as it is" and x["height"] == row["height"]), row
        )
        times, difference = row["ms"] / first.get("ms", math.nan), row.get("relative_difference")
        table.add_row(
            size, row["what"], str(row["batch"]),
            f"{row['ms']:.3g} ({row['p20']:.3g}-{row['p80']:.3g})", f"{times:.2f}",
            "" if difference is None else f"{difference:.1e}",
        )  # fmt: skip
    return table


# --- the tables


def model_table(rows: list[dict[str, Any]]) -> Table:
    """The table of whole models."""
    table = Table(
        "output", "model", "frames at once", "latency ms", "ms/frame", "floor ms", "of it",
        "pairs", "peak MiB", "predicted",
        title="whole model, pictures in, planes out; in brackets what is aimed at",
    )  # fmt: skip
    for size, row in _measured(rows, table):
        one, peak = row["latency"], row["peak_mib"]

        def aimed(target: float | None) -> str:
            return "" if target is None else f" [{target:g}]"

        table.add_row(
            size, f"{row['what']}, {row['precision']}", str(row["batch"]),
            escape(f"{one['ms']:.3g} ({one['p20']:.3g}-{one['p80']:.3g})"
                   f"{aimed(row['latency_target'])}"),
            escape(f"{row['ms_per_frame']:.3g}{aimed(row['target'])}"),
            f"{row['floor_ms']:.3g}", f"{row['of_floor']:.0%}", f"{row['visited']:.1%}",
            "" if peak is None else f"{peak:.0f}", f"{row['predicted_mib']:.0f}",
        )  # fmt: skip
    return table


def operation_table(rows: list[dict[str, Any]], note: str = "") -> Table:
    """The table of the comparison; speedups are those of ours, bias, at the same size."""
    table = Table(
        "frame", "implementation", "forward ms", "x", "TFLOP/s", "forward + backward ms", "x",
        "TFLOP/s", "extra MiB", "rel. error", "pairs",
        title=f"T={FRAMES}, D={CHANNELS}, sigma={SIGMA:g}, bfloat16{note}",
    )  # fmt: skip
    for row in rows:
        size = f"{row['height']}x{row['width']}"
        if "left_out" in row:
            table.add_row(size, row["what"], row["left_out"])
            continue
        first = next(
            x for x in rows
            if x["what"] == "ours, bias" and f"{x['height']}x{x['width']}" == size
        )  # fmt: skip
        cells = []
        for passes in ("forward", "both"):
            figures = row[passes]
            times = figures["ms"] / first[passes]["ms"] if passes in first else math.nan
            cells += [
                f"{figures['ms']:.3g} ({figures['p20']:.3g}-{figures['p80']:.3g})",
                "" if math.isnan(times) else f"{times:.2f}",
                f"{tflop_s(row, passes):.0f}",
            ]
        error = row.get("relative_error")
        table.add_row(
            size, row["what"], *cells, f"{row['both']['peak_mib']:.0f}",
            "" if error is None else f"{error:.1e}", f"{row['visited']:.1%}",
        )  # fmt: skip
    return table


def show(results: dict[str, Any]) -> None:
    """All results, on stdout."""
    console = Console(width=170)
    console.print(f"{results['gpu']}: tests {results['tests']['summary']}", highlight=False)
    if not results["tests"]["passed"]:
        console.print(results["tests"].get("output", ""), highlight=False, markup=False)
    best = results["ceilings"]
    console.print(f"copy {best['copy_gb_s']:.0f} GB/s, matmul {best['matmul_tflop_s']:.0f} TFLOP/s")
    note = "" if results["tests"]["passed"] else "; TESTS FAILED, these figures do not count"
    console.print(model_table(results["models"]))
    console.print(operation_table(results["operation"], note))
    console.print(decoder_table(results["decoder"]))


def write(results: dict[str, Any]) -> Path:
    """Put the results where they are committed."""
    name = re.sub(r"[^a-z0-9]+", "-", results["gpu"].lower()).strip("-")
    path = ROOT / "eval" / "results" / f"{name}.json"
    draft = path.with_suffix(".tmp")
    draft.write_text(json.dumps(results, indent=1) + "\n")
    draft.replace(path)
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything (default: 8)")
    args = parser.parse_args()
    if not args.minutes > 0:
        parser.error(f"--minutes must be > 0, got {args.minutes}")
    if not torch.cuda.is_available():
        sys.exit("error: no GPU that PyTorch can use; what needs none is tested by pytest")
    import triton

    began, seconds = time.monotonic(), 60 * args.minutes
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "versions": {
            "python": sys.version.split()[0], "torch": torch.__version__,
            "triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
        },
        "tests": run_tests(SHARES[0] * seconds),
        "ceilings": ceilings(),
        "tuned": run_tuning(began + SHARES[1] * seconds),
    }  # fmt: skip
    results["models"] = model_rows(
        "paper", 3.0, began + SHARES[2] * seconds, results["ceilings"]["matmul_tflop_s"]
    )
    until = began + SHARES[3] * seconds
    results["operation"] = [row for size in SIZES for row in compare(*size, until)]
    results["decoder"] = decoder_rows("paper", began + seconds)
    results["seconds"] = time.monotonic() - began
    show(results)
    print(f"written to {write(results)}")
    print(json.dumps(results))
    if not results["tests"]["passed"]:
        sys.exit("error: GPU tests failed; see above")


if __name__ == "__main__":
    main()
