"""CPUs and memory of the machine, and the limits of containers and batch systems."""

import os
from pathlib import Path

import pytest

from ddpm_cli import machine


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Control groups of this process, as files: groups("0::/job", {"job/cpu.max": "max 100000"})."""
    monkeypatch.setattr(machine, "_MY_GROUPS", tmp_path / "mine")
    monkeypatch.setattr(machine, "_GROUPS", tmp_path / "groups")

    def write(mine: str, files: dict[str, str]) -> None:
        (tmp_path / "mine").write_text(f"{mine}\n")
        for name, text in files.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text}\n")

    return write


@pytest.fixture
def many_cpus(monkeypatch):
    """A machine with 64 CPUs."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)), raising=False)


@pytest.mark.parametrize(
    ("mine", "files", "cpus"),
    [
        ("0::/", {}, 64),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("0::/", {"cpu.max": "200000 100000"}, 2),
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "1000 100000"}, 1),
        ("0::/", {"cpu.max": "9900000 100000"}, 64),
        ("0::/user/job", {"user/job/cpu.max": "max 100000", "user/cpu.max": "300000 100000"}, 3),
        ("5:memory:/job\n4:cpu,cpuacct:/job", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("4:cpu,cpuacct:/job", {"cpu/job/cpu.cfs_quota_us": "400000", "cpu/job/cpu.cfs_period_us": "100000"}, 4),
        # In a container the group has its name on the host, but its files are at the root.
        ("4:cpu:/docker/1f", {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
    ],
)
def test_limits_of_control_groups(groups, many_cpus, mine, files, cpus):
    groups(mine, files)
    assert machine.usable_cpus() == cpus


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system has no affinity")
def test_limits_of_affinity(groups):
    groups("0::/", {})
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert machine.usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert machine.usable_cpus() == len(before)


def test_a_system_without_affinity(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(machine, "_MY_GROUPS", Path("missing"))
    assert machine.usable_cpus() == os.cpu_count()


def test_memory(groups):
    groups("0::/", {})
    total, free = machine.total_memory(), machine.free_memory()
    if total is None or free is None:
        pytest.skip("this system does not report its memory")
    assert 0 < free <= total
    limit = {"memory.max": "1000000", "memory.current": "700000", "memory.stat": "file 250000\ninactive_file 200000"}
    groups("0::/", limit)
    assert machine.total_memory() == 1_000_000
    assert machine.free_memory() == 500_000
    groups("0::/", {"memory.max": "max"})
    assert machine.total_memory() == total


def test_memory_of_older_control_groups(groups):
    groups("0::/", {})
    total, free = machine.total_memory(), machine.free_memory()
    if total is None or free is None:
        pytest.skip("this system does not report its memory")
    limit = {"limit_in_bytes": "1000000", "usage_in_bytes": "700000", "stat": "cache 9\ntotal_inactive_file 200000"}
    groups("5:memory:/job\n4:cpu,cpuacct:/job", {f"memory/job/memory.{name}": text for name, text in limit.items()})
    assert machine.total_memory() == 1_000_000
    assert machine.free_memory() == 500_000
    none = {"limit_in_bytes": "9223372036854771712", "usage_in_bytes": "700000"}
    groups("5:memory:/free", {f"memory/free/memory.{name}": text for name, text in none.items()})
    assert machine.total_memory() == total
    assert machine.free_memory() > 500_000
