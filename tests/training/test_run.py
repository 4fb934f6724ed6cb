"""`from ddpm_cli import train`: runs for Python, with the same files as the command line's."""

import errno
import fcntl
import os
import shutil
from dataclasses import fields
from pathlib import Path

import pytest

from conftest import step_in, weights_in
from ddpm_cli import DDPM, train
from ddpm_cli.config import TrainConfig
from ddpm_cli.errors import DDPMError, LockedError
from ddpm_cli.files import lock, read_json
from ddpm_cli.nn.ema import EMA
from ddpm_cli.training import checkpoint
from ddpm_cli.training.events import Finished, Logged, Previewed, Saved

# A value of each setting of the training that is not its default.
SETTINGS = {
    "steps": 2,
    "batch_size": 3,
    "lr": 0.5,
    "loss": "vlb",
    "accumulate": 2,
    "lr_warmup": 7,
    "lr_decay": 0.5,
    "ema_decay": 0.5,
    "grad_clip": 2.0,
    "seed": 3,
    "save_every": 2,
    "sample_every": 2,
    "log_every": 2,
    "keep": 1,
    "keep_every": 2,
}


@pytest.fixture
def start(digits, quick_model):
    """Train quick_model's network on the digits, in fp32, with a preview at the end only."""

    def run(folder: str, **options) -> Path:
        settings = {"start_from": str(quick_model), "batch_size": 4, "sample_every": 99, "precision": "fp32"}
        return train(digits, folder, **(settings | options))

    return run


def test_it_trains_as_the_command_line_does(cli, digits, quick_model, start):
    events = []
    assert start("python", steps=4, seed=7, flip=False, on_event=events.append) == Path("python")
    options = ("--from", quick_model, "--batch-size", 4, "--precision", "fp32", "--sample-every", 99)
    assert cli("train", digits, "-o", "shell", "--steps", 4, "--seed", 7, "--no-flip", *options)[0] == 0
    assert weights_in(Path("python")) == weights_in(Path("shell"))
    assert Path("python/config.json").read_bytes() == Path("shell/config.json").read_bytes()
    assert {type(event) for event in events} >= {Logged, Previewed, Saved, Finished}
    assert events[-1] == Finished(4, interrupted=False)
    assert DDPM.from_pretrained("python").sample(1).shape == (1, 1, 8, 8)


def test_notes_are_the_same_in_python_and_in_the_shell(cli, digits, quick_model, monkeypatch):
    """Images that were left out, few images, few steps (4) of diffusion, a small disk and a large cache."""
    shutil.copytree(digits, "images")
    for i in range(7):
        Path(f"images/bad-{i}.png").write_bytes(b"bad")
    monkeypatch.setattr("ddpm_cli.training.notes._MUCH_CACHE", -1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    options = {"start_from": str(quick_model), "steps": 1, "batch_size": 4, "precision": "fp32"}
    found = []
    train("images", "run", on_note=found.append, **options)
    assert [note.split()[0] for note in found] == [*["left"] * 6, "few", "x_T", str(Path.cwd() / "run"), "the"]
    _, _, err = cli(
        *("train", "images", "-o", "run", "--from", quick_model, "--steps", 1, "--batch-size", 4, "--force"),
        *("--precision", "fp32"),
    )
    assert [line for line in err.splitlines() if line.startswith("Note: ") and "moved" not in line] == [
        f"Note: {note}" for note in found
    ]


def test_a_stopped_run_can_be_resumed(start):
    start("whole", steps=5)
    events = []
    start("parts", steps=5, on_event=events.append, should_stop=lambda: any(isinstance(e, Logged) for e in events))
    assert events[-1].interrupted
    with pytest.raises(DDPMError, match="a run exists already"):
        start("parts", steps=5)
    start("parts", steps=5, resume=True)
    assert weights_in(Path("parts")) == weights_in(Path("whole"))


def test_more_steps_that_raise_the_learning_rate_are_told(start):
    """But not in the warm-up."""
    told = []
    for folder, lr_warmup in (("run", 1), ("warm-up", 100)):
        start(folder, steps=4, lr=0.5, lr_decay=0.5, lr_warmup=lr_warmup)
        found = []
        start(folder, steps=8, resume=True, on_note=found.append)
        told += [note for note in found if "learning rate" in note]
    assert told == [
        "--steps 8: the learning rate, which had fallen to 0.25 by step 4, rises to 0.5. Samples may become worse "
        "before they become better"
    ]


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_a_callback_that_raises_does_not_lose_the_run(start, kind):
    """A checkpoint of the last step is saved, and the error goes on."""

    def fail(event) -> None:
        if event.step == 3:
            raise kind

    start("whole", steps=5)
    with pytest.raises(kind):
        start("parts", steps=5, on_event=fail)
    assert step_in(Path("parts")) == 3
    start("parts", steps=5, resume=True)
    assert weights_in(Path("parts")) == weights_in(Path("whole"))


def test_a_step_that_is_interrupted_half_way_is_not_saved(start, monkeypatch):
    """The weights are those of step 4, but their averages still those of step 3."""
    update = EMA.update

    def interrupted(ema: EMA, *args) -> None:
        if ema.updates == 3:
            raise KeyboardInterrupt
        update(ema, *args)

    monkeypatch.setattr(EMA, "update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start("run", steps=5, save_every=2)
    assert step_in(Path("run")) == 2


def test_the_folder_is_named_after_the_images(digits, start):
    assert start(None, steps=1) == Path("runs") / digits.name


def test_an_unknown_setting_is_a_type_error(start):
    with pytest.raises(ValueError, match="needs images"):
        train([])
    with pytest.raises(TypeError, match="train\\(\\) has no setting 'stepz'"):
        start("run", stepz=4)
    with pytest.raises(TypeError, match="scale must be a whole number or None, not 'auto'"):
        start("run", scale="auto")
    assert not Path("run").exists()


@pytest.mark.parametrize("name", [field.name for field in fields(TrainConfig) if field.name != "learn_betas"])
def test_every_setting_of_the_training_can_be_chosen(start, name):
    start("run", **({"steps": 1} | {name: SETTINGS[name]}))
    assert read_json(Path("run/config.json"))["train"][name] == SETTINGS[name]


@pytest.mark.parametrize("name", ["steps", "save_every", "sample_every", "log_every", "size", "channels", "lr"])
def test_zero_is_refused_and_none_is_open(start, name):
    with pytest.raises(DDPMError, match=r"\b0\b"):
        start("run", **({"steps": 1} | {name: 0}))
    assert not Path("run").exists()
    if name != "steps":
        start("run", **({"steps": 1} | {name: None}))


@pytest.mark.parametrize("name", ["checkpoints", "samples", "config.json", "metrics.jsonl"])
@pytest.mark.parametrize("obstacle", ["a file or a folder", "a pipe", "a link to itself", "a link to nothing"])
def test_obstacles_are_named_at_the_start(start, quick_run, name, obstacle):
    run = Path(shutil.copytree(quick_run, "run"))
    place = run / name
    was_folder = place.is_dir()
    place.rename("aside")
    match obstacle:
        case "a file or a folder":
            place.touch() if was_folder else place.mkdir()
        case "a pipe":
            os.mkfifo(place)
        case "a link to itself":
            place.symlink_to(place.name)
        case _:
            place.symlink_to("a disk that is not there")
    with pytest.raises(DDPMError, match=f"{place}: is"):
        checkpoint.check_folders(run)


def test_where_there_are_no_locks_a_run_warns(start, monkeypatch):
    """As on some network file systems. The run continues, since most runs have one process."""

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    notes = []
    start("run", steps=1, on_note=notes.append)
    assert any("run: this file system has no locks" in note for note in notes)


def test_a_run_that_another_process_trains(cli, digits, quick_run, monkeypatch):
    """It is refused, except with --dry-run."""
    monkeypatch.setattr("ddpm_cli.training.rehearsal._SECONDS", 0.0)
    run = Path(shutil.copytree(quick_run, "run"))
    with lock(run / ".lock"):
        with pytest.raises(LockedError, match="another process is training this run"):
            train(digits, run, resume=True)
        code, out, err = cli("train", digits, "-o", run, "--resume", "--dry-run", "--steps", 8)
    assert (code, "from step 4 on" in out) == (0, True), err
