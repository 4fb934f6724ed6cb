"""The largest step is tried before a run starts: does it fit into memory?"""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ddpm_cli.config import DataConfig, RunConfig, ScheduleConfig, TrainConfig
from ddpm_cli.errors import TrainingError
from ddpm_cli.training import memory, rehearsal
from ddpm_cli.training.presets import PRESETS
from ddpm_cli.training.rehearsal import BlankPack, rehearse
from ddpm_cli.training.trainer import Trainer


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


def test_the_trainer_is_not_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "free_memory", lambda: None)  # so the step is tried
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


def test_a_batch_that_does_not_fit_is_refused_with_values_that_do(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, batch_size=12)
    monkeypatch.setattr(rehearsal, "free_memory", lambda: int(memory.needed_memory(trainer, 4)))
    with pytest.raises(TrainingError, match="12 images at a time do not fit on cpu") as caught:
        rehearse(trainer)
    assert caught.value.hint == "--accumulate 4 fits, and the gradient is the same. --batch-size 3 fits too."
    rehearse(trainer_of(tmp_path, batch_size=12, accumulate=4))
    rehearse(trainer_of(tmp_path, batch_size=3))
    monkeypatch.setattr(rehearsal, "free_memory", lambda: 1000)
    with pytest.raises(TrainingError) as caught:
        rehearse(trainer)
    assert "Not even one" in (caught.value.hint or "")


def test_a_step_is_tried_unless_the_memory_is_ample(tmp_path, monkeypatch):
    """On a CPU the previews need no measurement: a forward pass is a third of a step."""
    trainer = trainer_of(tmp_path, batch_size=12, accumulate=2)
    needed = memory.needed_memory(trainer, 6)
    tried, plans = [], []
    backward = trainer.backward
    monkeypatch.setattr(trainer, "backward", lambda x_0, t, eps: tried.append(len(x_0)) or backward(x_0, t, eps))
    for free in (None, 1.9 * needed, 2.1 * needed):
        monkeypatch.setattr(rehearsal, "free_memory", lambda free=free: free)
        rehearse(trainer)
        plans.append(trainer.previews)
    assert tried == [6, 6]
    assert plans[0].share == pytest.approx(plans[2].share)


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("GET was unable to find an engine to execute this computation"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("could not create a memory object"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_what_libraries_say_when_memory_runs_out(error, is_one):
    assert memory.is_out_of_memory(error) == is_one


def test_a_slow_step_is_not_tried_for_a_plan(tmp_path, monkeypatch):
    """Its time is estimated from few images, and its memory from what they keep."""
    trainer = trainer_of(tmp_path, batch_size=400, accumulate=2)
    tried = []
    monkeypatch.setattr(trainer, "backward", lambda x_0, t, eps: tried.append(len(x_0)))
    monkeypatch.setattr(rehearsal, "_SECONDS", 0.0)
    monkeypatch.setattr(rehearsal, "_SHORT", math.inf)
    rehearsal.measure(trainer)
    assert tried == [2, 2, 8, 32, 128, 200]  # as many as take a short time
    tried.clear()
    monkeypatch.setattr(rehearsal, "_SHORT", 0.0)
    found = rehearsal.measure(trainer)
    assert tried == [2, 2]
    assert found.memory > memory.needed_memory(trainer, 200)
    assert found.seconds >= 3 / found.steps_per_second > 0
    monkeypatch.setattr(rehearsal, "free_memory", lambda: 1000)
    with pytest.raises(TrainingError, match="200 images at a time do not fit"):
        rehearsal.measure(trainer)
