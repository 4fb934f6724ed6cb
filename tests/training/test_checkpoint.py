"""Checkpoints: everything is checked before it is used, and an error names the file and the key."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from ddpm_cli.errors import ModelError
from ddpm_cli.models import runs
from ddpm_cli.training import checkpoint


@pytest.fixture
def saved(finished_run, tmp_path) -> Path:
    return shutil.copytree(finished_run / "checkpoints" / "step-00000004", tmp_path / "saved")


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        checkpoint.load_training(folder)
    return caught.value.message


def edit_hashes(folder: Path, change) -> None:
    path = folder / "training" / "hashes.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_checkpoint_survives_a_round_trip(saved):
    found = checkpoint.load_training(saved)
    assert (found.step, found.ema_updates) == (4, 4)
    assert found.seconds > 0
    assert found.raw.keys() == found.ema.keys()


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("step", ["x", None, 1.5, 0, -1, True, [4]]),
        ("seconds", [float("nan"), float("inf"), -1, None, "x"]),
        ("ema_updates", [-1, None, 0.5]),
        ("images", [None, 5]),
    ],
)
def test_every_value_of_its_state_is_checked(saved, key, values):
    path = saved / "training" / "state.json"
    state = json.loads(path.read_text())
    for value in values:
        path.write_text(json.dumps(state | {key: value}))
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edit_hashes(saved, lambda hashes, digest=digest: hashes.update({"training/state.json": digest}))
        assert f"training/state.json: {key}=" in refusal(saved)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/dev/zero", "outside the checkpoint"),
        ("../../secret", "outside the checkpoint"),
        ("training/../../other", "outside the checkpoint"),
        ("link", "outside the checkpoint"),
        ("", "is a folder"),
        ("training", "is a folder"),
        ("pipe", "is a pipe or a device"),
        ("none", "cannot be read"),
        ("itself", "cannot be read"),
        ("a\0b", "cannot be a file's name"),
        ("\ud800", "cannot be a file's name"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_hashes_are_of_files_in_the_checkpoint(saved, name, expected):
    (saved / "link").symlink_to("/dev/zero")
    (saved / "itself").symlink_to("itself")
    os.mkfifo(saved / "pipe")
    edit_hashes(saved, lambda hashes: hashes.update({name: "0"}))
    assert expected in refusal(saved)


@pytest.mark.parametrize("value", [None, 5, "0", ["x"]])
def test_hashes_are_compared(saved, value):
    edit_hashes(saved, lambda hashes: hashes.update({"training/state.json": value}))
    assert "state.json: is damaged" in refusal(saved)


def test_hashes_cover_the_state_for_resuming(saved):
    edit_hashes(saved, lambda hashes: hashes.pop("training/raw.safetensors"))
    assert "hashes.json: is damaged: it lacks training/raw.safetensors" in refusal(saved)


def test_old_checkpoints_are_removed(tmp_path):
    for step in (5, 100, 20, 123_456_789):
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".step-00000007.partial").mkdir()  # a process was killed while it wrote this
    (tmp_path / "checkpoints" / "step-00000005-best").mkdir()  # a copy that a user keeps
    checkpoint.prune(tmp_path, 2)
    assert [p.name for p in runs.checkpoints(tmp_path)] == ["step-00000100", "step-123456789"]
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-00000005-best", "step-00000100", "step-123456789"]


@pytest.mark.parametrize("junk", [b"\xff\xfe", b"[" * 100_000, b'{"step": Infinity}\n'])
def test_metrics_that_cannot_be_read_do_not_stop_a_run(cli, digits, finished_run, junk):
    shutil.copytree(finished_run, "run")
    path = Path("run/metrics.jsonl")
    whole = path.read_bytes()
    path.write_bytes(whole + junk)
    code, _, err = cli("train", digits, "-o", "run", "--resume", "--steps", "4")
    assert code == 0, err
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        ("train", "accumulate", 0),
        ("train", "lr", float("nan")),
        ("data", "size", 1_000_000),
        ("data", "channels", 2),
        ("data", "fit", "x"),
        ("schedule", "beta_end", -0.02),
    ],
)
def test_invalid_settings_are_named(cli, digits, finished_run, part, key, value):
    shutil.copytree(finished_run, "run")
    path = Path("run/config.json")
    config = json.loads(path.read_text())
    config[part][key] = value
    path.write_text(json.dumps(config))
    code, _, err = cli("train", digits, "-o", "run", "--resume", "--steps", "4")
    assert code == 1
    assert err.startswith(f"Error: run/config.json: {part}: {key}={value!r}: must be ")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_train_timesteps": 1_000_000}, "schedule: alphas_cumprod becomes 0 before the last step"),
        ({"beta_start": 0}, "schedule: betas must be a vector of numbers between 0 and 1"),
    ],
)
def test_a_schedule_that_is_none_is_named(cli, digits, quick_run, values, message):
    """Of a run, and of its model: there with any number of steps."""
    shutil.copytree(quick_run, "run")
    config = json.loads(Path("run/config.json").read_text())
    Path("run/config.json").write_text(json.dumps(config | {"schedule": config["schedule"] | values}))
    code, _, err = cli("train", digits, "-o", "run", "--resume", "--steps", "6")
    assert (code, err.startswith(f"Error: run/config.json: {message}")) == (1, True), err
    scheduler = Path("run/checkpoints/step-00000004/scheduler/scheduler_config.json")
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | values))
    code, _, err = cli("sample", "-m", "run", "--n", 1, "--steps", 1, "-o", "a.png")
    assert (code, f"Error: {scheduler}: {message.removeprefix('schedule: ')}" in err) == (1, True), err
