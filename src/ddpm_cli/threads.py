"""Limits how long OpenMP threads spin while they wait. Must run before PyTorch is loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["limit_spinning"]

# Iterations of the waiting loop before a thread sleeps. libgomp's default, 300,000, can fill a time slice. On a busy
# machine a thread then spins while the thread that it waits for cannot run, and training is up to twenty times slower.
# 10,000 (0.1 ms) cost nothing on an idle machine; 1,000 are better on a busy one (benchmarks/busy.py).
_IDLE, _BUSY = "10000", "1000"
_CHOSEN_BY_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning(environment: MutableMapping[str, str] = os.environ, load: Path = Path("/proc/loadavg")) -> None:
    """Make waiting OpenMP threads sleep soon, unless the user has chosen otherwise.

    It works only before PyTorch, which brings OpenMP, is loaded. Child processes inherit it. Results do not change.
    """
    if not any(name in environment for name in _CHOSEN_BY_THE_USER):
        environment["GOMP_SPINCOUNT"] = _BUSY if _is_busy(load) else _IDLE


def _is_busy(load: Path) -> bool:
    """Whether other processes use at least half of the processors now; False if the system does not report it."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        running = int(load.read_text().split()[3].partition("/")[0])
        return 2 * (running - 1) >= (os.cpu_count() or 1)
    return False
