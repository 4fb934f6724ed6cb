"""How processor threads wait for one another; set before PyTorch is loaded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import MutableMapping
from pathlib import Path

__all__ = ["limit_spinning"]

# Rounds of a waiting loop, after which a thread sleeps. libgomp's own 300,000 fill a time slice: beside other processes
# a thread then spins while the one it waits for cannot run, and training is up to twenty times slower. 10,000 (0.1 ms)
# cost nothing on an idle machine, and 1,000 are better on a busy one (benchmarks/busy.py).
_IDLE, _BUSY = "10000", "1000"
_CHOSEN_BY_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def limit_spinning(environment: MutableMapping[str, str] = os.environ, load: Path = Path("/proc/loadavg")) -> None:
    """Have OpenMP threads sleep soon when they wait, unless the user has chosen otherwise.

    It takes effect only if PyTorch, which brings OpenMP, has not been loaded yet; child processes inherit it. How
    threads wait changes no result.
    """
    if not any(name in environment for name in _CHOSEN_BY_THE_USER):
        environment["GOMP_SPINCOUNT"] = _BUSY if _is_busy(load) else _IDLE


def _is_busy(load: Path) -> bool:
    """Whether other processes use half of the processors or more at this moment; no, where the system cannot tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        running = int(load.read_text().split()[3].partition("/")[0])
        return 2 * (running - 1) >= (os.cpu_count() or 1)
    return False
