"""On a CPU, memory that was freed is used again without page faults, and the user's settings are respected."""

import os
import subprocess
import sys

import pytest

from ddpm_cli.heap import keep_freed_memory

CODE = """
import resource
from ddpm_cli.device import pick_device
device = pick_device("cpu")
import torch

def allocate():  # tensors of 24 and 48 MB, as the activations of a step
    kept = [torch.ones(size << 18, device=device) for size in (24, 48, 24)]

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

allocate()
before = faults()
allocate()
allocate()
print(faults() - before)
"""


def page_faults(**environment: str) -> int:
    unset = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=unset | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.fixture
def forget(monkeypatch):
    keep_freed_memory.cache_clear()
    yield monkeypatch
    keep_freed_memory.cache_clear()


@pytest.mark.skipif(not keep_freed_memory(), reason="not glibc, or chosen by the user")
def test_memory_is_used_again_without_page_faults():
    assert page_faults() + 50 < page_faults(MALLOC_MMAP_THRESHOLD_="1000000")


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_choice_stays(forget, name):
    forget.setenv(name, "")
    assert not keep_freed_memory()


def test_another_c_library_is_left_alone(forget):
    forget.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()
