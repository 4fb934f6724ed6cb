"""The memory that training takes, its estimate, and the error if there is less."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from processes import DDPM

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and limits memory as only Linux does")


@pytest.mark.long
def test_ten_thousand_images_need_no_more_memory_than_one_thousand():
    """Their pixels take 31 MB. Only names (0.1 KB each) and memory that malloc keeps may grow."""
    command = [sys.executable, str(ROOT / "benchmarks" / "memory.py"), "--counts", "1000", "10000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    few, many = (json.loads(line) for line in done.stdout.splitlines() if '"packing"' in line)
    assert many["packing"] < few["packing"] + 15
    assert many["training"] < few["training"] + 15


# Runs the command line with a limit slightly above the memory that it has before any computation.
LITTLE = f"""
import re, resource
from pathlib import Path
used = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (used + 150_000_000,) * 2)
{DDPM}
"""


@linux_only
def test_a_process_that_runs_out_of_memory_reports_it_before_step_0(start, digits, quick_model):
    options = ("train", digits, "--from", quick_model, "--precision", "fp32", "--steps", 1, "--batch-size", 8192)
    process = start(*options, source=LITTLE)
    assert process.wait() == 1
    assert "Error: out of memory: 8192 images at a time do not fit on cpu" in process.err
    assert not Path("runs").exists()
    advice = re.search(r"--accumulate (\d+) fits", process.err)
    assert advice, process.err
    start(*options, "--accumulate", advice[1], source=LITTLE).finish()


MEASURE = """
import resource, sys, torch
from pathlib import Path
from ddpm_cli.training.memory import needed_memory
sys.path[:0] = sys.argv[1:]
from test_rehearsal import trainer_of
trainer = trainer_of(Path(), batch_size=2)
trainer.train_step()  # what is there after this is not the batch's
trainer = trainer_of(Path(), batch_size=300)
need = needed_memory(trainer, 300) - trainer.checkpoint_bytes  # no checkpoint is copied here
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
trainer.train_step()
print(need, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@linux_only
def test_the_estimate_for_cpus_is_near_the_memory_of_a_step(start):
    process = start(ROOT / "tests" / "training", ROOT / "tests", source=MEASURE)
    process.finish()
    need, rise = map(float, process.out.split())
    assert rise > 100e6  # otherwise nothing is measured
    assert 0.8 < need / rise < 1.8, (need, rise)
