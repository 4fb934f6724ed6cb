"""What happens to disks and checkpoints: full ones, read-only ones, damaged ones."""

import contextlib
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_cli.models import runs

TRAIN = ("--batch-size", "4", "--size", "8", "--save-every", "2", "--sample-every", "100", "--precision", "fp32")
RUN = Path("run")
MAIN = "import sys; from ddpm_cli.cli.app import main; main(sys.argv[1:])"


def train(cli, digits, *options: object) -> tuple[int, str]:
    code, _, err = cli("train", digits, "-o", RUN, "--resume", *TRAIN, *options)
    return code, err


def files_of(step: int) -> list[Path]:
    folder = RUN / "checkpoints" / f"step-{step:08d}"
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut, Path.unlink])
@pytest.mark.parametrize(
    "name", ["raw.safetensors", "optimizer.safetensors", "diffusion_pytorch_model.safetensors", "state.json"]
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(cli, digits, finished_run, tmp_path, damage, name):
    shutil.copytree(finished_run, RUN)
    whole = {path.name: path.read_bytes() for path in files_of(4)}
    [path] = [path for path in files_of(4) if path.name == name]
    damage(path)
    code, err = cli("train", digits, "-o", RUN, "--resume", "--steps", "4")[::2]
    assert code == 0, err
    assert name in err
    assert "step-00000004 is damaged, and set aside; going on from step-00000002" in err
    assert "resuming at step 2" in err
    assert (RUN / "checkpoints" / "damaged-step-00000004").is_dir()
    again = {path.name: path.read_bytes() for path in files_of(4)}
    assert again["raw.safetensors"] == whole["raw.safetensors"]  # and the steps that were lost come out the same


def test_a_card_that_was_edited_is_no_damage(cli, digits, finished_run):
    shutil.copytree(finished_run, RUN)
    (RUN / "checkpoints" / "step-00000004" / "README.md").write_text("my own words")
    assert "damaged" not in cli("train", digits, "-o", RUN, "--resume", "--steps", "5")[2]


def test_where_all_are_damaged_nothing_is_touched(cli, digits):
    assert train(cli, digits, "--steps", 4)[0] == 0
    for step in (2, 4):
        for path in files_of(step):
            if path.name == "raw.safetensors":
                flip(path)
    code, err = train(cli, digits, "--steps", 6)
    assert code == 1
    assert "none of its checkpoints can be read" in err
    assert [path.name for path in runs.checkpoints(RUN)] == ["step-00000002", "step-00000004"]


def test_every_kth_checkpoint_stays(cli, digits):
    assert train(cli, digits, "--steps", 14, "--keep", 2, "--keep-every", 4)[0] == 0
    assert [int(path.name[5:]) for path in runs.checkpoints(RUN)] == [4, 8, 12, 14]


def process(digits, cwd: Path, *options: object, limit: int | None = None) -> subprocess.CompletedProcess:
    """A training process; limit: bytes that a file may have, beyond which writing fails as on a full disk."""

    def restrict() -> None:
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    command = [sys.executable, "-m", "ddpm_cli", "train", str(digits), "-o", str(cwd / "run"), "--resume", *TRAIN]
    return subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, timeout=120, preexec_fn=restrict
    )


def test_a_file_that_cannot_grow_ends_no_run_before_its_end(digits, tmp_path):
    assert process(digits, tmp_path, "--steps", 2).returncode == 0
    result = process(digits, tmp_path, "--steps", 7, limit=1_000_000)
    assert result.returncode == 1
    assert "step 4 could not be saved" in result.stderr
    assert "training goes on" in result.stderr
    assert "Error: step 7 could not be saved" in result.stderr
    assert "step-00000002 is safe" in result.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]  # and no halves
    assert process(digits, tmp_path, "--steps", 7).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk(digits, small_disk):
    """Room for one checkpoint of 21 MB and no second; then somebody makes room."""
    result = process(digits, small_disk, "--steps", 4, "--keep", 1)
    assert result.returncode == 1
    assert re.search(r"Error: step 4 could not be saved \(.*No space left", result.stderr), result.stderr
    assert "step-00000002 is safe" in result.stderr
    assert [path.name for path in (small_disk / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    subprocess.run(["mount", "-o", "remount,size=90m", str(small_disk)], check=True)
    result = process(digits, small_disk, "--steps", 4)
    assert result.returncode == 0, result.stderr
    assert "resuming at step 2" in result.stderr


def test_a_disk_that_is_full_already_when_a_run_goes_on(digits, small_disk):
    """Nothing has to be written for that."""
    assert process(digits, small_disk, "--steps", 2, "--keep", 1).returncode == 0
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    result = process(digits, small_disk, "--steps", 2, "--keep", 1)
    assert result.returncode == 0, result.stderr
    assert "0.0 MB free, and the checkpoints need" in result.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a disk of its own")
def test_a_read_only_disk(digits, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = process(digits, small_disk, "--steps", 2)
    assert result.returncode == 1
    assert result.stderr.count("Error: ") == 1
    assert "Read-only file system" in result.stderr


@pytest.fixture
def lost_disk(tmp_path):
    """A mounted folder, and what takes it away and brings it back while a process goes on."""
    disk, store = tmp_path / "disk", tmp_path / "store"
    disk.mkdir()
    store.mkdir()

    def mount() -> int:
        return subprocess.run(["mount", "--bind", str(store), str(disk)], capture_output=True).returncode

    def unmount() -> int:
        return subprocess.run(["umount", "-l", str(disk)], capture_output=True).returncode

    if mount():
        pytest.skip("mounting needs root")
    yield disk, mount, unmount
    unmount()


def test_a_disk_that_goes_away_and_comes_back(digits, lost_disk):
    """Nothing is written below the place where it was, training goes on, and saves when it is there again."""
    disk, mount, unmount = lost_disk
    run = disk / "run"
    command = [sys.executable, "-c", f"import ddpm_cli.training.checkpointer as s; s.RETRY_SECONDS = 0.1\n{MAIN}"]
    options = ["train", str(digits), "-o", str(run), *TRAIN, "--steps", "1M", "--save-every", "50", "--keep", "1"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if "checkpoints/step-" in line:
            break
    unmount()
    for line in process.stderr:
        if "could not be saved" in line:
            break
    assert "the run's folder is gone" in line
    assert "training goes on" in line
    assert not list(disk.iterdir())
    mount()
    for line in process.stderr:
        if "checkpoints/step-" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert run / "config.json" in run.iterdir()
    assert len(runs.checkpoints(run)) == 1


def test_a_run_whose_folder_was_removed_is_saved_in_the_end(digits, tmp_path):
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ddpm_cli",
            "train",
            str(digits),
            "-o",
            "run",
            *TRAIN,
            "--steps",
            "1M",
            "--save-every",
            "99",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    for line in process.stderr:
        if "checkpoints/step-" in line:
            break
    while RUN.exists():  # it may be writing just then
        shutil.rmtree(RUN, ignore_errors=True)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    result = subprocess.run(
        [sys.executable, "-m", "ddpm_cli", "train", str(digits), "-o", "run", "--resume", "--dry-run", "--json"],
        capture_output=True,
    )
    assert result.returncode == 0, result.stderr


def test_a_folder_with_a_name_of_any_bytes(cli, digits, tmp_path):
    """The name goes onto the model card, which must never cost a checkpoint."""
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(digits, folder)
    code, _, err = cli("train", folder, "-o", RUN, "--steps", 2, *TRAIN)
    assert code == 0, err
    assert "caf\ufffd" in (RUN / "checkpoints" / "step-00000002" / "README.md").read_text()
