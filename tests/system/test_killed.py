"""Runs that are killed, also at the worst moments, end with the same weights as a run that was not killed."""

import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from conftest import step_in, weights_in
from processes import DDPM, Process, kill_together, wait_until

RUN = Path("killed")
Command = Callable[[Path, object], tuple[object, ...]]


@pytest.fixture
def command(digits, quick_model) -> Command:
    """The arguments of a training with frequent checkpoints: command(run, steps)."""
    options = ("--from", quick_model, "--batch-size", 4, "--precision", "fp32")

    def arguments(run: Path, steps: object) -> tuple[object, ...]:
        often = ("--save-every", 3, "--sample-every", 40, "--keep", 2)
        return ("train", digits, "-o", run, "--resume", *options, *often, "--steps", steps)

    return arguments


def check(run: Path, begin: Callable[..., tuple[Process, ...]], command: Command) -> None:
    """Continue a run for some steps, and compare it with an uninterrupted run."""
    last = step_in(run) + 4
    for folder in (run, Path("unbroken")):
        for process in begin(*command(folder, last)):
            process.finish()
    assert weights_in(run) == weights_in(Path("unbroken"))
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == sorted(set(lines))
    assert [path.name for path in run.rglob(".*")] == [".lock"]  # no unfinished files are left


# Conditions to wait for before a kill, from the processes and the last known step.
MOMENTS: list[Callable[[tuple[Process, ...], int], object]] = [
    lambda started, reached: step_in(RUN) > reached + 3,
    lambda started, reached: list(RUN.glob("checkpoints/.step-*")),
    lambda started, reached: "resuming" in started[0].err,
    lambda started, reached: step_in(RUN) > reached,
]


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_again_and_again(start, pair, command, processes):
    """Killed after two checkpoints, during the next one, before another one, and after one."""
    begin = pair if processes == 2 else lambda *args: (start(*args),)
    reached = 0
    for happened in MOMENTS:
        started = begin(*command(RUN, "1M"))
        wait_until(partial(happened, started, reached), *started)
        kill_together(*started)
        assert step_in(RUN) >= reached
        reached = step_in(RUN)
    check(RUN, begin, command)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_a_hundred_times(start, pair, command, processes):
    """At random moments between the start of the process and some checkpoints later."""
    begin = pair if processes == 2 else lambda *args: (start(*args),)
    moments = random.Random(4)
    before = time.monotonic()
    started = begin(*command(RUN, "1M"))
    wait_until(lambda: step_in(RUN) >= 3, *started)
    until_training = time.monotonic() - before
    reached = 0
    for _ in range(100):
        time.sleep(moments.uniform(0.0, 1.6) * until_training)
        kill_together(*started)
        assert step_in(RUN) >= reached
        reached = step_in(RUN)
        started = begin(*command(RUN, "1M"))
    kill_together(*started)
    check(RUN, begin, command)


# Where a process kills itself: the module and name of a function, and the number of earlier calls.
WORST = {
    "a checkpoint, between two files": ("ddpm_cli.training.checkpoint", "save_file", 3),
    "a checkpoint, before it gets its name": ("ddpm_cli.files", "_flush", 12),
    "a checkpoint, before the old ones go": ("ddpm_cli.training.checkpoint", "prune", 1),
    "a preview, as it is drawn": ("ddpm_cli.data.images", "to_uint8", 0),
    "a preview, before it gets its name": ("ddpm_cli.data.pictures", "picture_bytes", 1),
    "the images, as they are packed": ("ddpm_cli.data.images", "planes", 30),
    "the numbers": ("ddpm_cli.training.trainer", "Trainer._log", 0),
}
# Runs the command line with one of its functions replaced.
HOOK = f"""
import importlib, os, signal, time
def hook(module, name, calls, act):
    *path, last = name.split(".")
    place = importlib.import_module(module)
    for part in path:
        place = getattr(place, part)
    real = getattr(place, last)
    def hooked(*args, **keywords):
        nonlocal calls
        calls -= 1
        if calls < 0:
            act()
        return real(*args, **keywords)
    setattr(place, last, hooked)
hook(*{{where}}, lambda: {{act}})
{DDPM}
"""
DIE = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.fixture(scope="module")
def unbroken(digits, quick_model, tmp_path_factory) -> dict[str, bytes]:
    """The weights of the run below without a kill."""
    from ddpm_cli import train

    run = tmp_path_factory.mktemp("runs") / "unbroken"
    settings = {"batch_size": 4, "precision": "fp32", "save_every": 3, "sample_every": 4}
    return weights_in(train(digits, run, start_from=str(quick_model), steps=6, **settings))


@pytest.mark.parametrize("moment", WORST)
def test_killed_in_the_middle_of(moment, start, cli, command, unbroken):
    arguments = (*command(RUN, 6), "--sample-every", 4)
    killed = start(*arguments, source=HOOK.format(where=WORST[moment], act=DIE))
    assert killed.wait() == -signal.SIGKILL, killed.err
    code, _, err = cli(*arguments)
    assert code == 0, err
    assert "damaged" not in err
    assert weights_in(RUN) == unbroken
    assert [path.name for path in Path().rglob(".*")] == [".lock"]  # no unfinished files, also not in the cache
    assert len(list(Path("cache/packs").iterdir())) == 1


def test_two_runs_at_the_same_time_make_one_pack(start, digits, command):
    """The first one decodes; the second one waits for it."""
    shutil.copytree(digits, "images")
    arguments = [("train", "images", *command(Path(name), 1)[2:]) for name in ("a", "b")]
    Path("wait").touch()
    waiting = "[None for _ in iter(lambda: time.sleep(0.01) or os.path.exists('wait'), False)]"
    first = start(*arguments[0], source=HOOK.format(where=("ddpm_cli.data.images", "planes", 0), act=waiting))
    wait_until(lambda: list(Path("cache").rglob("*.partial")), first)
    second = start(
        *arguments[1], source=HOOK.format(where=("ddpm_cli.files", "fcntl.flock", 0), act="open('asked', 'w')")
    )
    wait_until(Path("asked").exists, first, second)
    Path("wait").unlink()
    first.finish()
    second.finish()
    [pack] = Path("cache/packs").iterdir()
    assert json.loads((pack / "index.json").read_text())["count"] == 60
    assert weights_in(Path("a")) == weights_in(Path("b"))
