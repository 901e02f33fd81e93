"""Memory that training frees at every step and needs again at the next.

glibc gives large blocks back to the kernel as soon as they are freed, and each step of a large pack gets them anew,
page by page, zeroed: up to a fifth of its time on a CPU. A worker that does nothing else may keep them.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Has the C library keep what is freed for the process's own next use, from now on.

    The process stays as large as it was at its largest. Does nothing but with glibc.

    Returns:
        Whether it did.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    # No blocks of their own in the kernel's hands, and none at the end of the heap given back.
    return all([library.mallopt(_M_MMAP_MAX, 0), library.mallopt(_M_TRIM_THRESHOLD, -1)])
