"""The CPUs and the memory that this process may use, within the limits of containers and batch jobs."""

from __future__ import annotations

import math
import os
import resource
from collections.abc import Iterator
from pathlib import Path

__all__ = ["free_memory", "total_memory", "usable_cpus"]

_MY_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """The number of CPUs that this process may use, at least 1.

    CPU affinity and control groups limit it. A fractional limit, as in `docker run --cpus 1.5`, is rounded up.
    """
    counts = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    return max(1, min(counts + [math.ceil(quota) for quota in _cpu_quotas()]))


def _cpu_quotas() -> Iterator[float]:
    """The limit of each control group that has one, in CPUs."""
    for group in _control_groups():
        match " ".join(_lines(group / "cpu.max")).split():
            case [quota, period] if quota.isdigit():
                yield int(quota) / int(period)
    for group in _control_groups("cpu"):
        quota_us, period_us = (_number(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota_us and period_us:  # the quota is -1 if there is no limit
            yield quota_us / period_us


def free_memory() -> int | None:
    """Bytes that this process can still allocate, by machine, container and process limits; None if not known."""
    shared = [_in_meminfo("MemAvailable:")]
    used_of = dict(_pairs(Path("/proc/self/status")))
    own = []
    for kind, key in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and key in used_of:
            own.append(limit - used_of[key] * 1024)
    shared += [free for _, free in _memory_limits()]
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this run on this machine
    return min((*own, *(size // neighbours for size in shared if size is not None)), default=None)


def total_memory() -> int | None:
    """Bytes of memory of the machine, at most the limit of its containers; None if not known."""
    sizes = [_in_meminfo("MemTotal:"), *(limit for limit, _ in _memory_limits())]
    return min((size for size in sizes if size is not None), default=None)


def _memory_limits() -> Iterator[tuple[int, int]]:
    """The limit of each control group that has one, and the part of it that is free, in bytes.

    Version 1 always has a limit: a huge one, far above the memory of the machine, means none.
    """
    for controller, names, cached in (
        ("", ("max", "current"), "inactive_file"),
        ("memory", ("limit_in_bytes", "usage_in_bytes"), "total_inactive_file"),
    ):
        for group in _control_groups(controller):
            limit, used = (_number(group / f"memory.{name}") for name in names)
            if limit is not None and used is not None:
                cache = next((size for key, size in _pairs(group / "memory.stat") if key == cached), 0)
                yield limit, limit - used + cache  # the kernel frees cached files when memory is needed


def _control_groups(controller: str = "") -> Iterator[Path]:
    """The folders of the Linux control groups of this process, for instance of its container or batch job.

    controller: for version 1, in which each controller has its own groups; empty for version 2.
    """
    root = _GROUPS / controller
    for line in _lines(_MY_GROUPS):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = root / path.lstrip("/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _in_meminfo(key: str) -> int | None:
    return next((size * 1024 for name, size in _pairs(Path("/proc/meminfo")) if name == key), None)


def _number(path: Path) -> int | None:
    return next((int(line) for line in _lines(path) if line.isdigit()), None)  # `max` if there is no limit


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    for line in _lines(path):
        match line.split():
            case [key, number, *_] if number.isdigit():
                yield key, int(number)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # not Linux, or an older version
        return []
