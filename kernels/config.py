"""Launch configurations: what was measured on this GPU, else a default of its architecture.

A configuration holds the block sizes of a kernel (BLOCK_M queries, BLOCK_N keys or memory
entries), num_warps, num_stages and WARP_SPECIALIZE. `python -m mana_triton.kernels.tune` measures
them and writes tuned.json next to this file.
"""

import json
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

TUNED = Path(__file__).parent / "tuned.json"
KERNELS = (
    "cross_frame_forward",
    "cross_frame_lse",
    "cross_frame_dq",
    "cross_frame_dkv",
    "memory_forward",
    "memory_backward",
)
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "gfx942", "gfx90a")
SHARED_MEMORY = {  # bytes a program may have
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "gfx942": 64 << 10,
    "gfx90a": 64 << 10,
}

# (BLOCK_M, BLOCK_N, num_warps, num_stages) by kernel, in the order of KERNELS; none spills, see
# tests/kernels/compile_budget.json
_HOPPER = (
    (128, 128, 4, 2), (128, 128, 4, 2), (128, 128, 8, 2), (64, 64, 4, 2),
    (64, 64, 4, 3), (64, 64, 4, 2),
)  # fmt: skip
_HOPPER_128 = (  # D = 128
    (128, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2), (32, 64, 4, 2),
    (128, 64, 8, 2), (64, 32, 4, 2),
)  # fmt: skip
_AMPERE_32 = (  # D = 16 and 32
    (128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 2), (32, 64, 4, 2),
    (64, 64, 4, 2), (64, 64, 4, 2),
)  # fmt: skip
_AMPERE = (
    (128, 64, 4, 2), (128, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2),
    (64, 64, 4, 2), (64, 64, 4, 2),
)  # fmt: skip
_AMPERE_128 = (
    (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 64, 4, 2),
    (128, 32, 8, 2), (64, 64, 8, 2),
)  # fmt: skip
_FLOAT = ((32, 32, 4, 1),) * 6
_AMD = ((64, 64, 2, 1),) * 6  # a warp is 64 threads wide
_AMD_128 = ((32, 32, 1, 1),) * 6
_INTERPRETER = ((64, 64, 4, 1),) * 4 + ((64, 256, 4, 1),) * 2

_pinned: dict[str, dict] = {}  # see `pinned`
_warned: set[str] = set()  # GPUs


def launch_config(
    kernel: str, d: int, dtype: torch.dtype, height: int, width: int, device: torch.device
) -> dict:
    """The launch options of a kernel: block sizes, num_warps, num_stages, WARP_SPECIALIZE.

    Args:
        kernel: one of KERNELS.
        d: channels of q, k and v.
        dtype: of q, k and v.
        height, width: of a frame; the nearest measured size counts.
        device: where the kernel will run; "cpu" means the interpreter.
    """
    if kernel in _pinned:
        return dict(_pinned[kernel])
    return dict(_launch_config(kernel, d, dtype, height, width, torch.device(device)))


@contextmanager
def pinned(kernel: str, config: dict) -> Iterator[None]:
    """Within this context the kernel runs with this configuration: for tuning and for tests."""
    before = _pinned.copy()
    _pinned[kernel] = config
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


@cache
def _launch_config(kernel, d, dtype, height, width, device) -> dict:
    if device.type == "cpu":
        return default_config(kernel, "cpu", d, dtype)
    gpu = torch.cuda.get_device_name(device)
    key = (gpu, kernel, d, dtype_name(dtype))
    matching = [x for x in tuned() if (x["gpu"], x["kernel"], x["d"], x["dtype"]) == key]
    if not matching:
        _warn_untuned(kernel, gpu)
        return default_config(kernel, architecture(device), d, dtype)
    pixels = height * width
    nearest = min(matching, key=lambda x: abs(math.log(x["height"] * x["width"] / pixels)))
    return nearest["config"]


def _warn_untuned(kernel: str, gpu: str) -> None:
    if gpu in _warned:
        return
    _warned.add(gpu)
    warnings.warn(
        f"no tuned configuration of {kernel} for {gpu}: using the default, which may be slow. "
        "Run: python -m mana_triton.kernels.tune",
        stacklevel=2,
    )


@cache
def tuned() -> list[dict]:
    """The entries of tuned.json; none if it was never written."""
    return json.loads(TUNED.read_text()) if TUNED.exists() else []


def record(entry: dict) -> None:
    """Write an entry to tuned.json; it replaces an older one of its case."""

    def case(x: dict) -> tuple:
        return tuple(x[key] for key in ("gpu", "kernel", "d", "dtype", "height", "width"))

    entries = [x for x in tuned() if case(x) != case(entry)] + [entry]
    lines = ",\n".join(json.dumps(x) for x in sorted(entries, key=case))
    draft = TUNED.with_suffix(".tmp")
    draft.write_text(f"[\n{lines}\n]\n")
    draft.replace(TUNED)
    forget()


def forget() -> None:
    """Read tuned.json, and warn, again at the next lookup."""
    _warned.clear()
    tuned.cache_clear()
    _launch_config.cache_clear()


def default_config(kernel: str, arch: str, d: int, dtype: torch.dtype) -> dict:
    """A configuration that compiles without spilling on an architecture or, for "cpu", runs.

    Args:
        kernel: one of KERNELS.
        arch: one of ARCHITECTURES, or "cpu" for the interpreter.
        d: channels of q, k and v.
        dtype: of q, k and v.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if arch not in (*ARCHITECTURES, "cpu"):
        raise ValueError(f"arch must be one of {', '.join(ARCHITECTURES)} or cpu, got {arch!r}")
    if arch == "cpu":
        table = _INTERPRETER
    elif arch.startswith("gfx"):
        table = _AMD if d <= 64 and dtype != torch.float32 else _AMD_128
    elif dtype == torch.float32:
        table = _FLOAT
    elif arch == "sm_90":
        table = _HOPPER if d <= 64 else _HOPPER_128
    else:
        table = _AMPERE_32 if d <= 32 else _AMPERE if d == 64 else _AMPERE_128
    specialize = kernel == "cross_frame_forward" and table in (_HOPPER, _HOPPER_128)
    return launch_options(*table[KERNELS.index(kernel)], specialize)


def launch_options(
    block_m: int, block_n: int, warps: int, stages: int, specialize: bool = False
) -> dict:
    """A configuration: options of one launch."""
    return {
        "BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages,
        "WARP_SPECIALIZE": specialize,
    }  # fmt: skip


def architecture(device: torch.device) -> str:
    """The architecture whose defaults suit a GPU: one of ARCHITECTURES.

    A newer or smaller GPU of NVIDIA's takes those of the one with as much shared memory; warp
    specialization is for sm_90 alone.
    """
    if torch.version.hip:
        name = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return name if name in ARCHITECTURES else "gfx90a"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        raise ValueError(
            "the Triton kernels need compute capability 8.0 or newer, "
            f"got {'.'.join(map(str, capability))}; use backend 'tiled'"
        )
    if capability[0] == 9:
        return "sm_90"
    return "sm_80" if capability in ((8, 0), (10, 0), (10, 3)) else "sm_89"


def dtype_name(dtype: torch.dtype) -> str:
    """As in tuned.json: "bfloat16"."""
    return str(dtype).removeprefix("torch.")
