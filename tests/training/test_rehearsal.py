"""The largest step is tried before the first one, and a plan can be had without a run."""

import json
import re
import resource
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import DIGITS
from ddpm_cli.config import DataConfig, RunConfig, ScheduleConfig, TrainConfig
from ddpm_cli.errors import TrainingError
from ddpm_cli.training import memory, rehearsal
from ddpm_cli.training.presets import PRESETS
from ddpm_cli.training.rehearsal import BlankPack, rehearse
from ddpm_cli.training.trainer import Trainer

LIMIT = 1_500_000_000  # bytes; 512 images of 28x28 need more in `tiny`, and 128 do not


def trainer_of(tmp_path: Path, batch_size: int = 8, **train) -> Trainer:
    config = RunConfig(
        version="test",
        preset="tiny",
        data=DataConfig(images="", size=16, channels=1),
        train=TrainConfig(steps=3, batch_size=batch_size, lr=1e-3, **train),
        unet=replace(PRESETS["tiny"].unet(16, 1), dropout=0.1),
        schedule=ScheduleConfig(num_train_timesteps=20),
    )
    return Trainer(tmp_path, config, BlankPack(20, (1, 16, 16)), torch.device("cpu"), torch.float32)


def test_it_leaves_no_trace(tmp_path):
    trained = []
    for rehearsed in (False, True):
        trainer = trainer_of(tmp_path)
        if rehearsed:
            rehearse(trainer)
        for _ in range(2):
            trainer.train_step()
        trained.append(trainer)
    one, other = trained
    for a, b in zip(one.parameters, other.parameters, strict=True):
        assert torch.equal(a, b)


def test_what_does_not_fit_is_refused_with_what_would(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, batch_size=12)
    monkeypatch.setattr(rehearsal, "free_memory", lambda: int(memory.needed_memory(trainer, 4)))
    with pytest.raises(TrainingError, match="12 images at a time do not fit on cpu") as caught:
        rehearse(trainer)
    assert caught.value.hint == "--accumulate 4 fits, and learns the same. --batch-size 3 fits too."
    rehearse(trainer_of(tmp_path, batch_size=12, accumulate=4))
    rehearse(trainer_of(tmp_path, batch_size=3))
    monkeypatch.setattr(rehearsal, "free_memory", lambda: 1000)
    with pytest.raises(TrainingError) as caught:
        rehearse(trainer)
    assert "Not even one" in (caught.value.hint or "")


def limited(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ddpm_cli", "train", str(DIGITS), "--precision", "fp32", *map(str, args)]
    limit = lambda: resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))  # noqa: E731
    return subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold processes to RLIMIT_DATA")
def test_a_process_that_runs_out_of_memory_says_so_before_step_0(tmp_path):
    options = ("--preset", "tiny", "--steps", 1, "--batch-size", 512)
    result = limited(*options)
    assert result.returncode == 1
    assert "Error: out of memory: 512 images at a time do not fit on cpu" in result.stderr
    assert not Path("runs").exists()
    advice = re.search(r"--accumulate (\d+) fits", result.stderr)
    assert advice, result.stderr
    assert limited(*options, "--accumulate", advice[1]).returncode == 0


MEASURE = """
import resource, sys, torch
from pathlib import Path
from ddpm_cli.training.memory import needed_memory
sys.path[:0] = sys.argv[1:]
from test_rehearsal import trainer_of
trainer = trainer_of(Path(), batch_size=2)
trainer.train_step()  # what is there after this is not the batch's
trainer = trainer_of(Path(), batch_size=1500)
need = needed_memory(trainer, 1500) - trainer.checkpoint_bytes  # no checkpoint is copied here
before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
trainer.train_step()
print(need, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_estimate_for_processors_is_near_what_a_step_takes():
    command = [sys.executable, "-c", MEASURE, str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    need, rise = map(float, done.stdout.split())
    assert rise > 500e6  # else it measures nothing
    assert 0.8 < need / rise < 1.8


def test_memory_of_the_machine_and_its_containers(tmp_path, monkeypatch):
    total = memory.total_memory(torch.device("cpu"))
    free = memory.free_memory()
    if total is None or free is None:
        pytest.skip("this system does not say")
    assert 0 < free <= total
    group = tmp_path / "group"
    group.mkdir()
    for name, text in {
        "memory.max": "1000000",
        "memory.current": "700000",
        "memory.stat": "file 250000\ninactive_file 200000",
    }.items():
        (group / name).write_text(f"{text}\n")
    monkeypatch.setattr(memory, "_control_groups", lambda: [group])
    assert memory.total_memory(torch.device("cpu")) == 1_000_000
    assert memory.free_memory() == 500_000
    (group / "memory.max").write_text("max\n")
    assert memory.total_memory(torch.device("cpu")) == total


def test_a_step_that_takes_long_is_not_tried_for_a_plan(tmp_path, monkeypatch):
    """Its time is estimated from few images, and its memory from what they keep."""
    trainer = trainer_of(tmp_path, batch_size=400, accumulate=2)
    tried = []
    monkeypatch.setattr(trainer, "backward", lambda x_0, t, eps: tried.append(len(x_0)))
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.0)
    found = rehearsal.measure(trainer)
    assert tried == [2, 2]
    assert found.memory > memory.needed_memory(trainer, 200)
    assert found.seconds >= 3 / found.steps_per_second > 0
    monkeypatch.setattr(rehearsal, "free_memory", lambda: 1000)
    with pytest.raises(TrainingError, match="200 images at a time do not fit"):
        rehearsal.measure(trainer)


def test_dry_run(cli, digits, tmp_path, monkeypatch):
    """It says what would be, and writes nothing."""
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.1)
    options = ("--size", 8, "--batch-size", 4, "--steps", 40, "--precision", "fp32")
    code, out, err = cli("train", digits, "--dry-run", *options)
    assert code == 0, err
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    names = "run images prepared model training previews device memory speed time disk"
    assert list(rows) == names.split()
    assert "1.2M parameters" in rows["model"]
    assert re.fullmatch(r"[\d.]+ steps/s, [\d.e+]+ images/s", rows["speed"])
    assert rows["time"].endswith("for 40 steps and their previews")
    assert not list(tmp_path.iterdir())

    assert cli("train", digits, *options, "--steps", 4, "--save-every", 2, "-q")[0] == 0
    before = sorted((path, path.stat().st_mtime_ns) for path in Path("runs").rglob("*"))
    code, out, _ = cli("train", digits, "--dry-run", "--resume", "--steps", 400, "--json")
    plan = json.loads(out)
    assert (code, plan["start"], plan["config"]["train"]["steps"]) == (0, 4, 400)
    assert plan["seconds"] > 396 / plan["steps_per_second"] > 0
    weights = sum(path.stat().st_size for path in Path("runs").glob("*/checkpoints/step-00000004/*/*.safetensors"))
    assert plan["checkpoint_bytes"] == 16 * plan["parameters"] == pytest.approx(weights, rel=0.01)
    after = sorted((path, path.stat().st_mtime_ns) for path in Path("runs").rglob("*"))
    assert after == before
    assert cli("train", digits, "--dry-run", *options)[0] == 1  # as the run itself would be refused
