"""TensorBoard shows the numbers of metrics.jsonl and the previews."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from ddpm_cli.training.events import Logged
from ddpm_cli.training.tensorboard import Board

OPTIONS = ("--batch-size", 4, "--precision", "fp32")


def read(run: Path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(str(run / "tensorboard")).Reload()


def test_curves_and_previews(cli, digits, quick_model):
    train = ("train", digits, "-o", "run", "--resume", "--tensorboard", "--from", quick_model, *OPTIONS)
    for steps in (8, 12):
        code, _, err = cli(*train, "--steps", steps, "--sample-every", 4)
        assert code == 0, err
    board = read(Path("run"))
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "lr", "grad_norm", "images_per_second"):
        assert [(event.step, event.value) for event in board.Scalars(key)] == [
            (line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines
        ]
    assert [event.step for event in board.Scalars("mean/0")] == [4, 8, 12]
    for name in ("samples/ema", "samples/raw"):
        assert [(event.step, event.width, event.height) for event in board.Images(name)] == [
            (step, 12 * 42, 12 * 42) for step in (4, 8, 12)
        ]


def test_repeated_steps_are_hidden(tmp_path):
    for start in (0, 4):
        board = Board(tmp_path, start)
        for step in range(start + 1, start + 7):
            board.add(Logged({"step": step, "loss": float(start), "loss_q1": None}))
        board.close()
    assert [(event.step, event.value) for event in read(tmp_path).Scalars("loss")] == [
        *((step, 0.0) for step in range(1, 5)),
        *((step, 4.0) for step in range(5, 11)),
    ]


def test_without_the_library(cli, digits, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    code, _, err = cli("train", digits, "-o", "run", "--steps", 1, "--tensorboard", *OPTIONS)
    assert code == 2
    assert "pip install 'ddpm-cli[tensorboard]'" in err
    assert not Path("run").exists()


def test_a_folder_that_cannot_be_written_does_not_end_a_run(cli, digits, quick_run):
    shutil.copytree(quick_run, "run")
    Path("run/tensorboard").touch()
    code, _, err = cli("train", digits, "-o", "run", "--steps", 5, "--resume", "--tensorboard")
    assert code == 0
    assert "tensorboard: cannot be written" in err
    assert "continues without TensorBoard" in err
