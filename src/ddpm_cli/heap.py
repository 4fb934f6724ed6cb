"""Keeps the memory that PyTorch frees on a CPU for its next tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os

__all__ = ["keep_freed_memory"]

# Parameters of glibc's mallopt, see man 3 mallopt.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_CHOSEN_BY_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@functools.cache
def keep_freed_memory() -> bool:
    """Let glibc keep what this process frees, unless the user has chosen otherwise. Returns whether it does.

    glibc gives large blocks back to the kernel, and gets empty pages for the next tensor: a page fault for each 4 kB.
    The activations of a network have the same sizes at every step, so kept blocks fit again. The peak of memory may
    be higher (by 13 % in the worst case that we measured), and after it the process does not shrink. Other C libraries
    are left alone.
    """
    if any(name in os.environ for name in _CHOSEN_BY_THE_USER):
        return False
    with contextlib.suppress(OSError, AttributeError, TypeError):  # not Linux, or not glibc
        mallopt = ctypes.CDLL(None).mallopt
        blocks = mallopt(_MMAP_THRESHOLD, 1 << 30) or mallopt(_MMAP_THRESHOLD, 32 << 20)  # 32 MB: before glibc 2.35
        return bool(blocks and mallopt(_TRIM_THRESHOLD, -1))
    return False
