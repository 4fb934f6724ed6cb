"""Several processes, as torchrun starts them: they learn what one does, on one machine or several, and stop."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_killed import command, finish, step_in, train, wait_for_step, weights_in

from conftest import TORCHRUN


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_that_is_stopped_saves(torchrun, digits, number):
    run = Path("stopped")
    process = train(torchrun, digits, run, "1M")
    wait_for_step(run, 3)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert "stopped at step" in err
    step = step_in(run)
    assert f"stopped at step {step} of 1000000" in err
    assert err.count("go on with: ") == 1


def test_two_processes_learn_what_one_does(torchrun, digits):
    """Half of each batch in each of them, for fifty steps."""
    options = ("--batch-size", "32", "--size", "16", "--sample-every", "50", "--save-every", "50")
    process = torchrun("train", digits, "-o", "two", "--steps", 50, "--precision", "fp32", *options)
    one = [sys.executable, "-m", "ddpm_cli", "train", str(digits), "-o", "one", "--steps", "50", "--precision", "fp32"]
    assert subprocess.run([*one, *options], capture_output=True).returncode == 0
    err = finish(process)
    assert "32 images (16 in each of 2 processes)" in err
    assert "in 2 processes" in err
    curves = []
    for run in ("one", "two"):
        lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
        curves.append([line["loss"] for line in lines])
    assert len(curves[0]) == len(curves[1]) == 25
    assert curves[0][-1] < 0.8 * curves[0][0]
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_two_machines(digits, torchrun, tmp_path):
    """Each with a cache of its own: the second one decodes its own copy of the images. They share the run's folder."""
    meeting = f"--rdzv-backend c10d --rdzv-endpoint 127.0.0.1:{free_port()} --rdzv-id test --nnodes 2".split()
    run = tmp_path / "two"
    for name in ("0", "1"):
        Path(name).mkdir()
    machines = [
        subprocess.Popen(
            [*TORCHRUN, "--nproc-per-node", "1", *meeting, "-m", "ddpm_cli", *command(digits, run, 12)[3:]],
            env=os.environ | {"DDPM_CACHE_DIR": "cache", "OMP_NUM_THREADS": "1"},  # as torchrun sets it for two
            cwd=name,
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in ("0", "1")
    ]
    said = [finish(process) for process in machines]
    assert sum("in 2 processes" in err for err in said) == 1
    assert len(list(tmp_path.glob("[01]/cache/packs/*/index.json"))) == 2
    finish(train(torchrun, digits, Path("one"), 12))
    assert weights_in(run) == weights_in(Path("one"))


def test_a_restart_before_the_run_began_does_not_take_the_old_one(cli, digits, monkeypatch):
    """--force means the same in the second try; and where the run was begun already, the try goes on with it."""
    options = ("-o", "run", "--preset", "tiny", "--size", 8, "--batch-size", 4)
    assert cli("train", digits, *options, "--steps", 2)[0] == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    code, _, err = cli("train", digits, *options, "--steps", 3, "--force")
    assert (code, "moved the run that was in run" in err, "resuming" in err) == (0, True, False)
    code, _, err = cli("train", digits, *options, "--steps", 4, "--force")
    assert (code, "moved" in err, "resuming at step 3" in err) == (0, False, True)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another job")
    assert cli("train", digits, *options, "--steps", 5)[0] == 1


def test_force_does_not_take_a_run_from_under_its_process(tmp_path):
    """It was no run when the command looked, and is one that is trained when it is about to begin."""
    from ddpm_cli.distributed import World
    from ddpm_cli.errors import LockedError
    from ddpm_cli.files import lock
    from ddpm_cli.training.run import Request, _Opening

    run = tmp_path / "run"
    with lock(run / ".lock"), contextlib.ExitStack() as held:
        request = Request(["images"], run, force=True)
        opening = _Opening(request, World(), torch.device("cpu"), False, None, print, held)
        with pytest.raises(LockedError, match="another process is training this run"):
            opening.make_folder(None, resuming=False)
    assert run.exists()


def test_errors_are_said_once(torchrun, digits):
    """By one process of those that come to the same error, and by the one that has it otherwise."""
    for options, message in [
        (("--batch-size", 1), "--batch-size 1: fewer images than the 2 processes"),
        (("--size", 30), "--size 30 is not a multiple"),
        (("--lr", 1e30, "--steps", 300), "is not finite at step"),
        (("--device", "mps"), "--device mps is one device for 2 processes"),
    ]:
        process = torchrun("train", digits, "-o", "run", "--preset", "tiny", "--force", *options)
        _, err = process.communicate(timeout=120)
        assert process.returncode == 1
        assert message in err
        assert f"\n{err}".count("\nError: ") == 1, err
