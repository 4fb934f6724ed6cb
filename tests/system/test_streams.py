"""Pipes, terminals, and logs on full disks."""

import contextlib
import os
import pty
import re
import signal
from pathlib import Path

import pytest

from conftest import picture
from ddpm_cli.models import runs
from processes import wait_until

RUN = Path("run")


@pytest.fixture
def train(digits, quick_model) -> tuple[object, ...]:
    options = ("--batch-size", 4, "--sample-every", "1M")
    return ("train", digits, "-o", RUN, "--from", quick_model, *options, "--steps")


def is_training() -> bool:
    """Whether it has written its first line of metrics, long before its first checkpoint."""
    metrics = RUN / "metrics.jsonl"
    return metrics.exists() and metrics.stat().st_size > 0


def test_images_go_through_pipes(ddpm, cli, small_model, color_model, emoji):
    assert cli("sample", "-m", small_model, "--n", 2, "-o", "grid.png")[0] == 0
    piped = ddpm("sample", "-m", small_model, "--n", 2)
    assert piped.stdout == Path("grid.png").read_bytes()
    noised = ddpm("noise", "-", "--t", 30, "--format", "safetensors", stdin=emoji.read_bytes())
    assert noised.stderr == b""
    assert cli("noise", emoji, "--t", 30, "--format", "safetensors", "-o", "n.safetensors")[0] == 0
    assert noised.stdout == Path("n.safetensors").read_bytes()
    empty = ddpm("denoise-trace", "-", "-m", color_model, "-o", "t.png")
    assert (empty.returncode, b"stdin" in empty.stderr) == (1, True)
    assert not Path("t.png").exists()


def test_sampling_in_a_terminal(in_a_terminal, small_model):
    """It shows a progress bar, and writes a file instead of image bytes to the terminal."""
    code, seen = in_a_terminal("sample", "-m", small_model, "--n", 2)
    assert code == 0
    assert "samples.png" in seen
    assert "PNG" not in seen.replace("samples.png", "")
    assert "sampling" in seen
    assert picture("samples.png").size == (12 * 22, 12 * 12)
    code, seen = in_a_terminal("sample", "-m", small_model, "-o", "-")
    assert code == 2
    assert "terminal" in seen
    assert in_a_terminal("noise", "-")[0] == 2


def test_training_in_a_terminal_shows_a_bar(in_a_terminal, train):
    code, seen = in_a_terminal(*train, 20)
    assert code == 0
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", seen)
    for shown in ("20/20", "loss", "images/s", "ETA"):
        assert shown in plain


def test_a_closed_stderr_does_not_stop_a_run(start, train):
    """Ctrl-C in `ddpm train … 2>&1 | tee log` ends tee as well."""
    reader, writer = os.pipe()
    process = start(*train, "1M", stderr=writer)
    os.close(writer)
    wait_until(is_training, process)
    os.close(reader)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert len(runs.checkpoints(RUN)) == 1


def test_a_log_on_a_full_disk_does_not_stop_a_run(start, train):
    with Path("/dev/full").open("w") as full:
        process = start(*train, 2, stderr=full.fileno())
        assert process.wait() == 0
    assert process.out == b"run\n"


def test_a_closed_terminal_saves_the_run(start, train):
    """It sends a signal, and later writes to it fail."""
    main, other = pty.openpty()
    process = start(*train, "1M", env={"TERM": "xterm"}, terminal=other)
    os.close(other)
    os.set_blocking(main, False)

    def read_until_training() -> bool:
        with contextlib.suppress(BlockingIOError):
            os.read(main, 65536)
        return is_training()

    wait_until(read_until_training, process)
    os.close(main)
    process.send_signal(signal.SIGHUP)
    assert process.wait() == 129
    assert len(runs.checkpoints(RUN)) == 1
