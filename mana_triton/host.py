"""Settings of the process that long runs on a CPU gain from: a command's business, not a library's.

Imported before torch, because OpenMP reads its settings once.
"""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def tune() -> None:
    """Let idle threads sleep soon, and keep freed memory for the next frame.

    Threads of OpenMP that wait by spinning, its default, take the cores from decoding and
    encoding; threads that sleep at once are late for the next operation. And memory that goes
    back to the system after each operation costs more, page by page, than many an operation on a
    small frame; what a large one takes does go back.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # some tens of microseconds
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 8 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 64 << 20)
