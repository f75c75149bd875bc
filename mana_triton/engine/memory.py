"""Memory of this machine: how much there is, how much is held, and whether it ran out."""

import os
import re
import sys
from pathlib import Path

import torch


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 8G, 1.5GiB or 800M (powers of 1024; plain numbers are bytes).

    Raises:
        ValueError: the text is not a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise ValueError(f"must be a size such as 8G or 800M, got {text!r}")
    return int(float(match[1]) * 1024 ** " kmgt".index(match[2].lower() or " "))


def held_bytes(device: torch.device) -> int:
    """Bytes that this process holds now, in the memory of a device."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


def total_bytes(device: torch.device) -> int | None:
    """Bytes of memory that this process may use; None where the system does not tell.

    All there are, or the limit of the control group: the same job gets the same plan whatever
    else is running.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    sizes = []
    if (status := Path("/proc/meminfo")).exists():
        found = re.search(r"MemTotal:\s+(\d+) kB", status.read_text())
        sizes += [int(found[1]) * 1024] if found else []
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        sizes.append(int(text))
    return min(sizes, default=None)


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no memory.

    PyTorch has a type for its own GPU allocator only; the CPU's, CUDA, its libraries and Triton
    say it in words.
    """
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    words = ("can't allocate memory", "out of memory", "STATUS_ALLOC_FAILED")
    return known or (isinstance(error, RuntimeError) and any(x in str(error) for x in words))
