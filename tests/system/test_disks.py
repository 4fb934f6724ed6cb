"""Disks that are full, read-only, or disappear during training."""

import contextlib
import math
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from ddpm_cli.models import runs
from processes import DDPM, Process, wait_until

RUN = Path("run")
OPTIONS = ("--resume", "--batch-size", 4, "--sample-every", "1M", "--precision", "fp32")
SMALL_FILES = 10_000  # bytes: larger than all files of a run except the weights
LIMIT = f"""
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({SMALL_FILES}, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
{DDPM}
"""


@pytest.fixture
def train(start, digits, quick_model):
    """Train in a process, with a checkpoint at every second step: train(run, …) -> Process."""

    def run(folder: Path, *options: object, **how: str) -> Process:
        chosen = ("--from", quick_model, *OPTIONS, "--save-every", 2)
        return start("train", digits, "-o", folder, *chosen, *options, **how)

    return run


def test_a_limit_on_file_size_does_not_stop_training(train):
    train(RUN, "--steps", 2).finish()
    process = train(RUN, "--steps", 7, source=LIMIT)
    assert process.wait() == 1
    assert "step 4 could not be saved" in process.err
    assert "training continues" in process.err
    assert "Error: step 7 could not be saved" in process.err
    assert "step-00000002 is safe" in process.err
    assert [path.name for path in (RUN / "checkpoints").iterdir()] == ["step-00000002"]  # and no unfinished files
    train(RUN, "--steps", 7).finish()


@pytest.fixture
def small_disk(tmp_path, quick_run):
    """A disk with space for one checkpoint, but not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    files = (path for path in (quick_run / "checkpoints" / "step-00000004").rglob("*") if path.is_file())
    size = sum(4096 * math.ceil(path.stat().st_size / 4096) for path in files)
    options = ["-t", "tmpfs", "-o", f"size={int(1.7 * size)}"]
    if subprocess.run(["mount", *options, "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(train, small_disk):
    """The run fails at its end, and resumes when there is space."""
    run = small_disk / "run"
    process = train(run, "--steps", 4, "--keep", 1)
    assert process.wait() == 1
    assert re.search(r"Error: step 4 could not be saved \(.*No space left", process.err), process.err
    assert "step-00000002 is safe" in process.err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000002"]
    subprocess.run(["mount", "-o", "remount,size=90m", small_disk], check=True)
    assert "resuming at step 2" in train(run, "--steps", 4).finish()


def test_a_run_resumes_on_a_full_disk(train, small_disk):
    """Resuming does not need to write. A note says that there will be no room for checkpoints."""
    options = (small_disk / "run", "--steps", 4, "--keep", 1)
    assert train(*options).wait() == 1  # its second checkpoint does not fit
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    process = train(*options)
    assert process.wait() == 1
    assert "resuming at step 2" in process.err
    assert re.search(r"0\.0 [kM]B free, and the checkpoints need", process.err)


def test_a_read_only_disk(train, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    process = train(small_disk / "run", "--steps", 2)
    assert process.wait() == 1
    assert process.err.count("Error: ") == 1
    assert f"{small_disk} is not writable" in process.err
    assert "fits into memory" not in process.err  # before any work


def test_a_page_about_a_run_that_cannot_be_written_to(cli, small_disk, quick_run):
    """The place was not chosen with -o, so the error does not name that option."""
    run = shutil.copytree(quick_run, small_disk / "run", ignore=shutil.ignore_patterns("*.safetensors"))
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for command in (("report", run), ("plot", run, "--json")):
        code, _, err = cli(*command)
        assert (code, f"Error: {run}/" in err, "with -o" in err) == (1, True, True), err
    assert cli("report", run, "-o", "page.html")[0] == 0


@pytest.fixture
def lost_disk(tmp_path):
    """A mounted folder, and functions to unmount it and mount it again while a process runs."""
    disk, store = tmp_path / "disk", tmp_path / "store"
    disk.mkdir()
    store.mkdir()

    def mount() -> int:
        return subprocess.run(["mount", "--bind", store, disk], capture_output=True).returncode

    def unmount() -> int:
        return subprocess.run(["umount", "-l", disk], capture_output=True).returncode

    if mount():
        pytest.skip("mounting needs root")
    yield disk, mount, unmount
    unmount()


def test_a_disk_that_disappears_and_comes_back(train, lost_disk):
    """Nothing is written to the empty mount point. Training continues, and saves when the disk is back."""
    disk, mount, unmount = lost_disk
    run = disk / "run"
    source = f"import ddpm_cli.training.checkpointer as s; s.RETRY_SECONDS = 0.0; {DDPM}"
    process = train(run, "--steps", "1M", "--save-every", 20, "--keep", 1, source=source)
    wait_until(lambda: "checkpoints/step-" in process.err, process)
    unmount()
    wait_until(
        lambda: re.search("could not be saved.*the run's folder is gone.*training continues", process.err), process
    )
    assert not list(disk.iterdir())
    lost = len(process.err)
    mount()
    wait_until(lambda: "checkpoints/step-" in process.err[lost:], process)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 143
    assert run / "config.json" in run.iterdir()
    assert len(runs.checkpoints(run)) == 1


def test_a_run_whose_folder_was_removed_is_saved_at_its_end(train, cli, digits):
    process = train(RUN, "--steps", "1M", "--save-every", 20)
    wait_until(lambda: "checkpoints/step-" in process.err, process)
    while RUN.exists():  # it may be writing just then
        shutil.rmtree(RUN, ignore_errors=True)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    code, _, err = cli("train", digits, "-o", RUN, "--resume", "--dry-run", "--json")
    assert code == 0, err
