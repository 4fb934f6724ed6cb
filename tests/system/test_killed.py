"""Runs that are really killed, at random moments and at the worst ones, end as the run that was not."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import kill_all, workers
from ddpm_cli.models import runs

SEED = 4  # of the moments
KILLS = 10
OPTIONS = (
    *("--resume", "--preset", "tiny", "--size", "8", "--batch-size", "4", "--precision", "fp32"),
    *("--save-every", "3", "--sample-every", "40", "--keep", "2"),
)


def weights_in(run: Path) -> dict[str, bytes]:
    """Raw weights, averages, moments of the newest checkpoint."""
    newest = runs.checkpoints(run)[-1]
    return {path.name: path.read_bytes() for path in newest.rglob("*.safetensors")} | {"step": newest.name.encode()}


def command(digits: Path, run: Path, steps: int | str) -> list[str]:
    return [sys.executable, "-m", "ddpm_cli", "train", str(digits), "-o", str(run), *OPTIONS, "--steps", str(steps)]


def step_in(run: Path) -> int:
    found = runs.checkpoints(run)
    return runs.step_of(found[-1]) if found else 0


def wait_for_step(run: Path, step: int, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while step_in(run) < step:
        assert time.monotonic() < deadline, "it does not get on"
        time.sleep(0.01)


def test_killed_ten_times(digits):
    """SIGKILL between the start of the process and some steps of training, then --resume; ten times."""
    moments = random.Random(SEED)
    run = Path("killed")
    started = time.monotonic()
    process = subprocess.Popen(command(digits, run, "1M"), stderr=subprocess.DEVNULL)
    wait_for_step(run, 3)
    until_training = time.monotonic() - started
    reached = []
    for kill in range(KILLS):
        if kill:
            process = subprocess.Popen(command(digits, run, "1M"), stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.5, 1.6) * until_training)
        assert process.poll() is None
        process.kill()
        process.wait()
        reached.append(step_in(run))
    assert reached == sorted(reached)
    assert len(set(reached)) > 3, "the moments are badly chosen"
    last = reached[-1] + 4
    assert subprocess.run(command(digits, run, last), capture_output=True).returncode == 0
    assert subprocess.run(command(digits, Path("unbroken"), last), capture_output=True).returncode == 0
    assert weights_in(run) == weights_in(Path("unbroken"))
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))
    assert [path.name for path in run.rglob(".*")] == [".lock"]


def train(torchrun, digits: Path, run: Path, steps: int | str, *options: str) -> subprocess.Popen:
    return torchrun(*command(digits, run, steps)[3:], options=options)


def finish(process: subprocess.Popen) -> str:
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return err


def test_two_processes_killed_ten_times(torchrun, digits):
    moments = random.Random(SEED)
    run = Path("killed")
    started = time.monotonic()
    process = train(torchrun, digits, run, "1M")
    wait_for_step(run, 3)
    until_training = time.monotonic() - started
    reached = []
    for kill in range(KILLS):
        if kill:
            process = train(torchrun, digits, run, "1M")
        time.sleep(moments.uniform(0.5, 1.6) * until_training)
        assert process.poll() is None
        kill_all(process)
        reached.append(step_in(run))
    assert len(set(reached)) > 3, "the moments are badly chosen"
    last = reached[-1] + 4
    finish(train(torchrun, digits, run, last))
    finish(train(torchrun, digits, Path("unbroken"), last))
    assert weights_in(run) == weights_in(Path("unbroken"))


def test_a_worker_that_dies_is_started_again_and_goes_on(torchrun, digits):
    """Elastic restarts call the same command, here without --resume, and it goes on from the newest checkpoint.

    Several times, the leading worker and the other one: each time they have to find one another again.
    """
    run = Path("restarted")
    arguments = [argument for argument in command(digits, run, 90)[3:] if argument != "--resume"]
    process = torchrun(*arguments, "--sample-every", "1000", options=("--max-restarts", "3"))
    for kill in range(3):
        wait_for_step(run, step_in(run) + 6)
        os.kill(workers(process)[kill % 2], signal.SIGKILL)
    err = finish(process)
    assert err.count("resuming at step") == 3
    finish(train(torchrun, digits, Path("unbroken"), 90))
    assert weights_in(run) == weights_in(Path("unbroken"))


# Where a process kills itself: what is called, by its module and name, and how often before.
WORST = {
    "a checkpoint, between two files": ("ddpm_cli.training.checkpoint", "save_file", 4),
    "a checkpoint, before it gets its name": ("ddpm_cli.files", "_flush", 12),
    "a checkpoint, before the old ones go": ("ddpm_cli.training.checkpoint", "prune", 1),
    "a preview, as it is drawn": ("ddpm_cli.data.images", "to_uint8", 0),
    "a preview, before it gets its name": ("ddpm_cli.data.images", "picture_bytes", 1),
    "the images, as they are packed": ("ddpm_cli.data.images", "planes", 30),
    "the numbers": ("ddpm_cli.training.trainer", "Trainer._log", 0),
}
KILLER = """
import importlib, os, signal, sys
module, name, calls = sys.argv[1], sys.argv[2].split("."), int(sys.argv[3])
from ddpm_cli.training import trainer
place = importlib.import_module(module)
for part in name[:-1]:
    place = getattr(place, part)
real = getattr(place, name[-1])
def deadly(*args, **keywords):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **keywords)
setattr(place, name[-1], deadly)
from ddpm_cli.cli.app import main
main(sys.argv[4:])
"""


@pytest.fixture(scope="module")
def unbroken(digits, tmp_path_factory) -> dict[str, bytes]:
    run = tmp_path_factory.mktemp("runs") / "unbroken"
    done = subprocess.run(worst_command(digits, run), capture_output=True, cwd=run.parent)
    assert done.returncode == 0, done.stderr
    return weights_in(run)


def worst_command(digits: Path, run: Path) -> list[str]:
    return [*command(digits, run, 6), "--sample-every", "4"]


@pytest.mark.parametrize("moment", WORST)
def test_killed_in_the_middle_of(moment, digits, unbroken):
    module, name, calls = WORST[moment]
    arguments = worst_command(digits, Path("run"))
    killed = subprocess.run([sys.executable, "-c", KILLER, module, name, str(calls), *arguments[3:]])
    assert killed.returncode == -signal.SIGKILL
    whole = subprocess.run(arguments, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert "damaged" not in whole.stderr
    assert weights_in(Path("run")) == unbroken
    assert [path.name for path in Path().rglob(".*")] == [".lock"]  # nothing half-made, in the cache neither
    assert len(list(Path("cache/packs").iterdir())) == 1


def test_two_runs_that_pack_at_once_make_one_pack(digits):
    """They begin together; one decodes, the other waits for it."""
    shutil.copytree(digits, "images")
    for i in range(20):
        shutil.copytree(digits, f"images/more {i}")
    arguments = [command(Path("images"), Path(name), 1) for name in ("a", "b")]
    slow = KILLER.replace("os.kill(os.getpid(), signal.SIGKILL)", "import time; time.sleep(0.001)")
    both = [
        subprocess.Popen(
            [sys.executable, "-c", slow, "ddpm_cli.data.images", "planes", "0", *argument[3:]],
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for argument in arguments
    ]
    for process in both:
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    [pack] = Path("cache/packs").iterdir()
    assert json.loads((pack / "index.json").read_text())["count"] == 60 * 21
    assert weights_in(Path("a")) == weights_in(Path("b"))
