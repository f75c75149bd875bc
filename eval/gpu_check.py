"""Everything that needs a GPU, in one command: tests, roofline, tuning, speed.

    python eval/gpu_check.py [--minutes 8]

1. the kernels' GPU tests; 2. the fastest copy and matrix product of this GPU; 3. an autotuning run
at the main sizes, which writes kernels/tuned.json; 4. whole frames of `paper`, streamed, and their
stages; 5. cross-frame attention against what PyTorch offers, forward and forward + backward;
6. the decoder of `paper` as it is, with ReLU fused into cuDNN's convolutions, and compiled.

It runs from a bare checkout with torch, triton, einops, numpy, rich, pytest and safetensors. The
results go to eval/results/<gpu>.json; the last line of stdout is the same as one JSON object.
"""

import argparse
import copy
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from eval import bench
from eval.timing import Row, find_roofline, measure, show, summarize
from mana_triton.engine.feature_cache import Graph
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.files import write_atomically
from mana_triton.model import MANA, ResidualBlock

ROOT = Path(__file__).resolve().parents[1]
TESTS = ("tests/kernels", "tests/engine")
ATTENTION_SIZES = ((64, 112), (144, 180), (270, 480))
FRAME_SIZES = ((64, 112), (270, 480), (540, 960))
# share of the time by which each part must start its last measurement
SHARES = {"tests": 0.35, "tuning": 0.55, "frames": 0.7, "attention": 0.9, "decoder": 1.0}


def run_tests(seconds: float) -> dict[str, Any]:
    """The GPU tests of the kernels, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *TESTS]
    command += ["-p", "no:cacheprovider", "-W", "ignore::pytest.PytestConfigWarning"]
    # deterministic algorithms, with which the tests poison memory, need this for cuBLAS
    environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    try:
        result = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=seconds,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"passed": False, "summary": f"not done after {seconds:.0f} s", "output": ""}
    lines = result.stdout.strip().splitlines() or result.stderr.strip().splitlines() or [""]
    passed = result.returncode == 0
    return {"passed": passed, "summary": lines[-1], "output": "" if passed else result.stdout}


def run_tuning(deadline: float) -> list[dict]:
    """Tune every kernel at the main sizes; the entries that tuned.json now holds for them."""
    from mana_triton.kernels import config, tune

    cases = [
        tune.Case(kernel, bench.CHANNELS, torch.bfloat16, *size)
        for size in ATTENTION_SIZES
        for kernel in config.KERNELS
    ]
    device = torch.device("cuda", torch.cuda.current_device())
    with tune.compile_pool() as pool:
        return tune.tune(cases, device, deadline, partial(tune.compile_all, pool))


def decoder_rows(preset: str, size: tuple[int, int], on: bench.Device) -> list[Row]:
    """Ways to run the decoder's convolutions, each as one CUDA graph: milliseconds per frame."""
    upscaler = Upscaler(bench.network(preset), EngineOptions(on.device, on.precision))
    model, batch = upscaler.model, max(upscaler.plan(*size).batch, 1)
    z = torch.randn(batch, model.config.channels, *size, device=on.device)
    z = z.to(on.dtype, memory_format=torch.channels_last)
    ways = {
        "as it is": model.decode,
        "ReLU fused by cuDNN": with_fused_relu(model).decode,
        "torch.compile": torch.compile(model.decode, dynamic=False),
    }
    with torch.no_grad():
        exact = model.decode(z)
        rows = [_decode_row(name, decode, z, exact, on) for name, decode in ways.items()]
    return [row | {"batch": batch} for row in rows]


def _decode_row(name: str, decode: Callable, z: Tensor, exact: Tensor, on: bench.Device) -> Row:
    try:
        out = decode(z)
        graph = Graph(z.device)
        replay = {name: lambda: graph(lambda: out.copy_(decode(z)))}
        ms = measure(replay, on.device, on.seconds / 10)[name]
    except RuntimeError as error:
        if name == "as it is":
            raise
        return {"what": name, "ms": None, "note": f"not run: {str(error).splitlines()[0]}"}
    error = float((out - exact).norm() / exact.norm())
    return summarize(name, [x / len(z) for x in ms]) | {"relative_error": error}


def with_fused_relu(model: MANA) -> MANA:
    """A copy of the model with ReLU and bias in the first convolution of each block."""
    model = copy.deepcopy(model)
    for block in model.modules():
        if isinstance(block, ResidualBlock):
            block.forward = partial(_fused_block, block)
    return model


def _fused_block(block: ResidualBlock, x: Tensor) -> Tensor:
    first = block.conv1
    y = torch.cudnn_convolution_relu(x, first.weight, first.bias, (1, 1), (1, 1), (1, 1), 1)
    return block.conv2(y).add_(x)


def tables(on: bench.Device, seconds: Callable[[str], float]) -> Iterator[tuple[str, list[Row]]]:
    """Title and rows of each table; `seconds` says how much time a part has left."""
    for size in FRAME_SIZES:
        if seconds("frames") > 0:
            pixels = np.random.default_rng(0).integers(0, 256, (7, *size, 3), np.uint8)
            rows = bench.frame_rows("paper", pixels, on) + bench.stage_rows("paper", pixels, on)
            yield f"paper, {4 * size[1]}x{4 * size[0]} output", rows
    for size in ATTENTION_SIZES:
        for backward in (False, True):
            if seconds("attention") > 0:
                passes = "forward + backward" if backward else "forward"
                rows = bench.attention_rows(size, "triton", on, backward)
                yield f"attention, {size[0]}x{size[1]}, {passes}", rows
    for size in FRAME_SIZES[:2]:
        if seconds("decoder") > 0:
            yield f"decoder, {4 * size[1]}x{4 * size[0]} output", decoder_rows("paper", size, on)


def write(results: dict[str, Any]) -> Path:
    """Store the results under the name of the GPU."""
    name = re.sub(r"[^a-z0-9]+", "-", results["gpu"].lower()).strip("-")
    path = ROOT / "eval" / "results" / f"{name}.json"
    write_atomically(path, json.dumps(results, indent=1) + "\n")
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
        sys.exit("error: no GPU that PyTorch can use; pytest tests what needs none")
    import triton

    began = time.monotonic()

    def seconds(part: str) -> float:
        return SHARES[part] * 60 * args.minutes + began - time.monotonic()

    tests = run_tests(seconds("tests"))
    device = torch.device("cuda")
    roofline, rows = find_roofline(device, torch.bfloat16)
    results: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name(),
        "capability": list(torch.cuda.get_device_capability()),
        "versions": {
            "python": sys.version.split()[0], "torch": torch.__version__,
            "triton": triton.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip,
        },
        "tests": tests,
        "tuned": run_tuning(time.monotonic() + seconds("tuning")),
        "tables": {"roofline": rows},
    }  # fmt: skip
    print(f"{results['gpu']}: tests {tests['summary']}\n{tests['output']}")
    caption = "bf16" if tests["passed"] else "TESTS FAILED, these numbers do not count"
    show(rows, "Roofline", caption)
    for title, rows in tables(bench.Device(device, "bf16", roofline, 6.0), seconds):
        results["tables"][title] = rows
        show(rows, title, caption)
    results["seconds"] = time.monotonic() - began
    print(f"written to {write(results)}")
    print(json.dumps(results))
    if not tests["passed"]:
        sys.exit("error: GPU tests failed; see above")


if __name__ == "__main__":
    main()
