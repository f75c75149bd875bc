"""Times and memory of variants of one computation, and the fastest this device can be."""

import ctypes
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import Timer

Row = dict[str, Any]
Variants = dict[str, Callable[[], Any]]
ROUNDS = 2  # in which the variants take turns on a CPU, so that a slow minute hits all of them
UNITS = {
    "dtype": "type", "psnr_db": "dB to reference", "moved_db": "dB moved", "gate": "gate",
    "ms": "ms", "p20": "p20", "p80": "p80", "fps": "fps", "tflop_per_s": "TFLOP/s",
    "gb_per_s": "GB/s", "times_faster": "x faster", "percent_of_roofline": "% of roofline",
    "extra_mib": "extra MiB", "relative_error": "rel. error", "note": "",
}  # fmt: skip


class Roofline(NamedTuple):
    """What this device reaches: a large matrix product, a large copy."""

    flop_per_ms: float
    bytes_per_ms: float


def measure(variants: Variants, device: torch.device, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each variant, several times.

    A GPU is timed by `triton.testing.do_bench`, with a cold L2 cache, a CPU by
    `torch.utils.benchmark`.

    Args:
        variants: computations by name.
        device: where they run.
        seconds: for all variants together; each runs at least twice.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    if device.type == "cuda":
        from triton.testing import do_bench

        rep = int(1000 * seconds / len(variants))  # in milliseconds
        for name, run in variants.items():
            times[name] += do_bench(run, warmup=rep // 4, rep=rep, return_mode="all") or []
        return times
    threads = torch.get_num_threads()
    share = seconds / ROUNDS / len(variants)
    for _ in range(ROUNDS):
        for name, run in variants.items():
            timer = Timer("run()", globals={"run": run}, num_threads=threads)
            measured = timer.blocked_autorange(min_run_time=share)
            times[name] += [1000 * time for time in measured.times]
    return times


def summarize(name: str, ms: list[float], baseline: list[float] | None = None) -> Row:
    """A row of the table: median, 20th and 80th percentile, and the ratio to a baseline."""
    low, high = np.percentile(ms, [20, 80])
    row: Row = {"what": name, "ms": statistics.median(ms), "p20": float(low), "p80": float(high)}
    if baseline:
        row["times_faster"] = statistics.median(baseline) / row["ms"]
    return row


def extra_mib(run: Callable[[], Any], device: torch.device) -> float | None:
    """Peak memory of a run beyond what was allocated before; None where the system has no count."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        run()
        return None
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # reused free memory would not count
    reset.write_text("5")  # restarts the peak
    before = _status_mib("VmRSS")
    run()
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


def find_roofline(device: torch.device, dtype: torch.dtype) -> tuple[Roofline, list[Row]]:
    """The fastest square matrix product and copy, and rows that show them."""
    side, length = (8192, 1 << 30) if device.type == "cuda" else (1536, 1 << 26)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.zeros(length, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    variants = {"product": lambda: torch.mm(a, b), "copy": lambda: target.copy_(source)}
    product, copy = (min(ms) for ms in measure(variants, device, 2.0).values())
    roofline = Roofline(2 * side**3 / product, 2 * length / copy)
    return roofline, [
        {
            "what": f"product, {side}x{side}",
            "ms": product,
            "tflop_per_s": roofline.flop_per_ms / 1e9,
        },
        {"what": f"copy, {length >> 20} MiB", "ms": copy, "gb_per_s": roofline.bytes_per_ms / 1e6},
    ]


def show(rows: list[Row], title: str, caption: str) -> None:
    """The table on stdout."""
    used = [key for key in UNITS if any(row.get(key) is not None for row in rows)]
    table = Table("", *(UNITS[key] for key in used), title=title, title_justify="left")
    table.caption, table.caption_justify = caption, "left"
    for row in rows:
        table.add_row(str(row["what"]), *(_text(row.get(key)) for key in used))
    Console(width=140).print(table)


def _text(value: float | str | None) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"
