"""Process settings that speed up long runs on a CPU: how threads wait, how memory is kept.

Commands call `configure_process` before they import torch, because OpenMP reads its settings once,
when torch loads it. The library itself changes nothing of the process that imports it.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def configure_process() -> None:
    """Let idle OpenMP threads sleep soon, and keep freed memory for the next frame.

    Threads of OpenMP wait by spinning, which takes the cores from video decoding and encoding;
    threads that sleep at once are slow to start the next operation. GOMP_SPINCOUNT sets a spin of
    some tens of microseconds.

    Blocks of up to 8 MiB are kept by malloc, and up to 64 MiB of free memory: giving memory back
    to the system after each operation, and faulting it in again page by page, costs more than many
    operations on a small frame. Larger blocks do go back.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 8 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
