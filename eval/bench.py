"""Speed and memory of this machine's PyTorch path, as ratios measured in one process.

    python eval/bench.py                   all parts, about eight minutes on two cores
    python eval/bench.py attention import  some of them

Parts: attention (tiled against dense eager at 64x112, D=64, T=7, sigma=4; logits q.k/sqrt(D) and,
as in the study, unscaled ones), model (the paper preset streamed against 7 encodes per frame and
dense eager attention), pipeline (tiny at 448x256 output, with decoding and encoding), memory (peak
of 1280x720 input, and of 1000 frames against 100), import. Variants alternate; times are medians,
with the 20th and 80th percentiles. Peak memory is that of a process of its own. The last line of
stdout is one JSON object.

`python eval/run.py --bench` is the device against the paper's 59 ms: see compare.py.
"""

import argparse
import ctypes
import functools
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mana_triton import MANA, MANAConfig, cross_frame_attention, runtime
from mana_triton.engine.plan import Plan, estimate
from mana_triton.engine.upscaler import EngineOptions, Upscaler
from mana_triton.kernels import reference

DEMO = Path(__file__).parents[1] / "examples" / "demo.mp4"
PARTS = ("attention", "model", "pipeline", "plan", "memory", "import")
SIZE = (64, 112)  # low-resolution rows and columns of the paper's 448x256 frames
Row = dict[str, Any]


def interleave(variants: dict[str, Callable], runs: int) -> dict[str, list[float]]:
    """Milliseconds of each variant in turn, after one uncounted round."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for counted in [False] + [True] * runs:
        for name, run in variants.items():
            began = time.perf_counter()
            run()
            if counted:
                times[name].append(1000 * (time.perf_counter() - began))
    return times


def summarize(name: str, ms: list[float], baseline: list[float] | None = None) -> Row:
    """A row of the table: median, percentiles and the ratio to a baseline."""
    low, high = np.percentile(ms, [20, 80])
    row: Row = {"what": name, "ms": statistics.median(ms), "p20": float(low), "p80": float(high)}
    if baseline:
        row["times_faster"] = statistics.median(baseline) / statistics.median(ms)
    return row


def bench_attention(threads: int) -> list[Row]:
    """Forward, forward + backward, error and extra memory of tiled against dense eager."""
    variants = {"dense eager": eager, "tiled": _tiled}
    rows: list[Row] = []
    for logits, scale in (("q.k/8", 0.125), ("q.k", 1.0)):
        inputs = [*_attention_inputs(), torch.tensor(scale)]
        with torch.no_grad():
            ms = interleave(
                {name: functools.partial(f, *inputs) for name, f in variants.items()}, 5
            )
            exact, fast = eager(*inputs), _tiled(*inputs)
        for name in variants:
            rows.append(summarize(f"forward, {logits}, {name}", ms[name], ms["dense eager"]))
        rows[-1]["relative_error"] = float((fast - exact).norm() / exact.norm())
    rows[1]["extra_mib"] = peak_of("_forward_peak", threads)
    inputs = [x.requires_grad_() for x in _attention_inputs()]
    upstream = torch.randn_like(inputs[1])
    ms = interleave(
        {name: functools.partial(_backward, f, inputs, upstream) for name, f in variants.items()}, 3
    )
    for name in variants:
        rows.append(summarize(f"forward + backward, q.k/8, {name}", ms[name], ms["dense eager"]))
    rows[-1]["extra_mib"] = peak_of("_backward_peak", threads)
    return rows


def _attention_inputs() -> list[Tensor]:
    """Q, k, v of normal entries, those of q and k at 0.6 as in the study, and sigma."""
    torch.manual_seed(0)
    h, w = SIZE
    q, k = torch.randn(1, h, w, 64) * 0.6, torch.randn(1, 7, h, w, 64) * 0.6
    return [q, k, torch.randn(1, 7, h, w, 64), torch.tensor(4.0)]


DEFAULT_SCALE = torch.tensor(64**-0.5)


def _tiled(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor = DEFAULT_SCALE) -> Tensor:
    return cross_frame_attention(q, k, v, sigma, scale=scale, backend="tiled")


@functools.lru_cache(maxsize=1)
def squared_distances(height: int, width: int, device: torch.device) -> Tensor:
    """[HW, HW] of all pairs of pixels: a table, as in the official code."""
    places = reference.pixel_coordinates(0, height, width, torch.empty(0, device=device))
    y, x = (places[:, None, axis] - places[:, axis] for axis in (0, 1))
    return y.square_().add_(x.square_())


def eager(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, scale: Tensor = DEFAULT_SCALE) -> Tensor:
    """Dense softmax of one frame after the other, as people write it."""
    size = q.shape[1:3]
    bias = (squared_distances(*size, q.device) * (-0.5 / sigma.square())).to(q.dtype)
    q = q[0].flatten(0, 1) * scale.to(q)
    frames = [
        torch.softmax(q @ k_t.flatten(0, 1).mT + bias, -1) @ v_t.flatten(0, 1)
        for k_t, v_t in zip(k[0], v[0], strict=True)
    ]
    return torch.stack(frames).unflatten(1, size)[None]


def _eager_in_model(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, **_: object) -> Tensor:
    return eager(q, k, v, sigma)


def _backward(attention: Callable, inputs: list[Tensor], upstream: Tensor) -> None:
    for x in inputs:
        x.grad = None
    attention(*inputs).backward(upstream)


def _forward_peak() -> float:
    inputs = _attention_inputs()
    with torch.no_grad():
        return _extra_mib(lambda: _tiled(*inputs))


def _backward_peak() -> float:
    inputs = [x.requires_grad_() for x in _attention_inputs()]
    upstream = torch.randn_like(inputs[1])
    return _extra_mib(lambda: _backward(_tiled, inputs, upstream))


def _extra_mib(run: Callable) -> float:
    """Peak resident memory during a run over that before it; a small run warms up first."""
    small = [torch.randn(1, 33, 33, 64), *(torch.randn(1, 7, 33, 33, 64) for _ in range(2))]
    with torch.enable_grad():
        inputs = [*(x.requires_grad_() for x in small), torch.tensor(4.0)]
        _backward(_tiled, inputs, small[1].detach())
    return resident_peak(run)


def resident_peak(run: Callable) -> float:
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that is free already would not count
    status, clear = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    clear.write_text("5")  # the peak starts again from here
    before = _status_mib(status, "VmRSS")
    run()
    return _status_mib(status, "VmHWM") - before


def _status_mib(status: Path, key: str) -> float:
    return int(status.read_text().split(f"{key}:")[1].split()[0]) / 1024


def peak_of(function: str, threads: int) -> float:
    """Result of a function of this file in a fresh process."""
    call = function if function.endswith(")") else f"{function}()"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench, torch; "
        f"torch.set_num_threads({threads}); print(bench.{call})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


def bench_model(threads: int) -> list[Row]:
    """The paper preset in float32: streamed, against the same network run the naive way."""
    torch.manual_seed(0)
    model = MANA(MANAConfig.preset("paper"))
    torch.nn.init.normal_(model.w_z.weight, std=0.01)
    upscaler = Upscaler(model, EngineOptions(device="cpu", precision="fp32", scene_cuts=False))
    clip = demo_frames(SIZE, 20)
    window = window_of(clip[:7])

    def naive() -> None:
        dense = mock.patch("mana_triton.model.cross_frame_attention", _eager_in_model)
        with dense, torch.inference_mode():
            model(window)

    def streamed() -> None:
        for _ in upscaler.stream(iter(clip)):
            pass

    ms = interleave({"naive": naive, "streamed": streamed}, 3)
    ms["streamed"] = [x / len(clip) for x in ms["streamed"]]
    name = {"naive": "7 encodes, dense eager", "streamed": "streamed, tiled"}
    return [summarize(f"paper fp32, {name[key]}", ms[key], ms["naive"]) for key in ms]


def bench_pipeline(threads: int) -> list[Row]:
    """Tiny at 448x256 output: the command's own figure, from decoding to the written file."""
    with tempfile.TemporaryDirectory() as folder:
        clip = Path(folder) / "clip.mp4"
        write_clip(clip, *SIZE, frames=120)
        results = [run_infer(clip, threads) for _ in range(3)]
    return [summarize("tiny, whole pipeline", [result["ms_per_frame"] for result in results])]


def bench_memory(threads: int) -> list[Row]:
    """Peak memory of the command on large frames, and on few and many small ones."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for height, width, frames in ((720, 1280, 8), (*SIZE, 100), (*SIZE, 1000)):
            clip = Path(folder) / f"{height}-{frames}.mp4"
            write_clip(clip, height, width, frames)
            result = run_infer(clip, threads)
            rows.append(
                {
                    "what": f"tiny, {frames} frames of {width}x{height}",
                    "ms": result["ms_per_frame"],
                    "peak_mib": result["peak_mib"],
                }
            )
    return rows


# preset, height, width and plan, as tile, batch, workers and band, whose peaks are measured
PLANS = (
    ("tiny", 128, 224, (0, 1, 2, 64)),
    ("tiny", 180, 320, (0, 1, 1, 64)),
    ("tiny", 270, 480, (64, 1, 1, 32)),
    ("tiny", 270, 480, (128, 1, 1, 64)),
    ("small", 128, 224, (0, 1, 1, 64)),
    ("small", 180, 320, (48, 1, 1, 32)),
    ("tiny", 128, 224, (0, 3, 1, 64)),
)


def bench_plan(threads: int) -> list[Row]:
    """Peak memory that the planner predicts for a stream, and what it takes."""
    rows: list[Row] = []
    for preset, height, width, plan in PLANS:
        predicted = estimate(MANAConfig.preset(preset), 4, height, width, Plan(*plan)) / 2**20
        call = f"plan_peak({preset!r}, {height}, {width}, {plan})"
        measured = peak_of(call, threads)
        division = ", ".join(map(str, plan))
        rows.append(
            {
                "what": f"{preset}, {width}x{height}, tile, batch, workers, band {division}",
                "predicted_mib": predicted,
                "extra_mib": measured,
                "predicted_share": predicted / measured,
            }
        )
    return rows


def plan_peak(preset: str, height: int, width: int, plan: tuple[int, int, int, int]) -> float:
    """MiB that a stream of nine frames takes at its peak beyond what the process held before."""
    runtime.configure_process()
    torch.manual_seed(0)
    model = MANA(MANAConfig.preset(preset))
    torch.nn.init.normal_(model.w_z.weight, std=0.01)
    upscaler = Upscaler(model, EngineOptions(device="cpu", precision="fp32", scene_cuts=False))
    list(upscaler.stream(demo_frames((32, 40), 8)))  # what the first call alone takes
    clip = demo_frames((height, width), 9)
    upscaler._plans[height, width] = Plan(*plan)

    def run() -> None:
        for _ in upscaler.stream(iter(clip)):
            pass

    return resident_peak(run)


def bench_import(threads: int) -> list[Row]:
    """Time of `import mana_triton` over that of `import torch`."""

    def run(statement: str) -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, cwd=Path(__file__).parents[1])

    ms = interleave(
        {"torch": lambda: run("import torch"), "ours": lambda: run("import torch, mana_triton")}, 5
    )
    over = statistics.median(ms["ours"]) - statistics.median(ms["torch"])
    return [
        summarize("import torch", ms["torch"]),
        {**summarize("import torch, mana_triton", ms["ours"]), "over_torch_ms": over},
    ]


def write_clip(path: Path, height: int, width: int, frames: int) -> None:
    """The demo clip at another size as a file of this many frames."""
    import av

    with av.open(str(path), "w") as target:
        stream = target.add_stream("libx264", rate=25, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i, picture in enumerate(_demo((height, width), frames, "yuv420p")):
            picture.pts, picture.time_base = i, Fraction(1, 25)
            target.mux(stream.encode(picture))
        target.mux(stream.encode(None))


def _demo(size: tuple[int, int], count: int, pixel_format: str) -> Iterator[Any]:
    """Frames of the demo clip at another size, forwards and backwards until there are enough."""
    import av

    with av.open(str(DEMO)) as source:
        pictures = [x.reformat(size[1], size[0], pixel_format) for x in source.decode(video=0)]
    yield from itertools.islice(itertools.cycle(pictures + pictures[-2:0:-1]), count)


def demo_frames(size: tuple[int, int], count: int) -> np.ndarray:
    """[count, H, W, 3] uint8 of the demo clip: how far attention reaches depends on the content."""
    return np.stack([picture.to_ndarray() for picture in _demo(size, count, "rgb24")])


def window_of(frames: np.ndarray) -> Tensor:
    """[T, H, W, 3] uint8 -> [1, T, 3, H, W] in [0, 1]."""
    return rearrange(torch.from_numpy(frames), "t h w c -> 1 t c h w") / 255


def run_infer(clip: Path, threads: int) -> dict:
    """The JSON line of the command on a clip, in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "mana_triton.infer", str(clip), "-n", "tiny", "--overwrite"],
        cwd=Path(__file__).parents[1], env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True,
    )  # fmt: skip
    return json.loads(result.stdout.splitlines()[-1])


def show(rows: list[Row], title: str | None = None, caption: str | None = None) -> None:
    """The table, on stdout, with a line under it."""
    units = {
        "ms": "ms", "p20": "p20", "p80": "p80", "runs": "runs", "fps": "fps",
        "gflop_per_s": "GFLOP/s", "gb_per_s": "GB/s",
        "times_faster": "x faster", "noise_percent": "noise %", "percent_of_floor": "% of floor",
        "predicted_mib": "predicted MiB", "extra_mib": "extra MiB", "predicted_share": "ratio",
        "peak_mib": "peak MiB", "relative_error": "rel. error", "over_torch_ms": "over torch, ms",
        "note": "",
    }  # fmt: skip
    used = [key for key in units if any(row.get(key) is not None for row in rows)]
    table = Table("", *(units[key] for key in used), title=title, title_justify="left")
    table.caption, table.caption_justify = caption, "left"
    for row in rows:
        cells = ("" if (x := row.get(key)) is None else x for key in used)
        table.add_row(
            str(row["what"]),
            *(
                x
                if isinstance(x, str)
                else f"{x:.{0 if x >= 1000 else 4}{'f' if x >= 1000 else 'g'}}"
                for x in cells
            ),
        )
    Console(width=140).print(table)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2, help="of PyTorch (default: 2)")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"PART must be one of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    for part in args.parts or PARTS:
        rows += globals()[f"bench_{part}"](args.threads)
    show(rows)
    versions = {"torch": torch.__version__, "python": platform.python_version()}
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"rows": rows, "threads": args.threads, "cpu": capability, **versions}))


if __name__ == "__main__":
    main()
