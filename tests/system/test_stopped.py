"""Commands stop in order after Ctrl-C and other signals."""

import signal
from pathlib import Path

import pytest

from conftest import picture, step_in
from ddpm_cli.models import runs
from ddpm_cli.training import checkpoint
from processes import DDPM, wait_until

# A preview is drawn again and again until it is stopped, so a signal comes during a preview.
ENDLESS_PREVIEW = f"""
from ddpm_cli.training import previews
draw = previews.draw

def draw_until_stopped(*args):
    while draw(*args) is not None:
        pass

previews.draw = draw_until_stopped
{DDPM}
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_run_is_saved_and_resumes(start, cli, digits, quick_model, number):
    """Ctrl-C: exit 130 after a checkpoint, without a traceback; SIGTERM: 143; a terminal that is closed: 129."""
    options = ("--from", quick_model, "--batch-size", 4, "--sample-every", "1M", "--save-every", 5)
    run = Path("runs/digits")
    process = start("train", digits, "--steps", "1M", *options)
    wait_until(lambda: runs.checkpoints(run), process)
    process.send_signal(number)
    assert (process.wait(), process.out) == (128 + number, b"")
    assert "--resume" in process.err
    assert "Traceback" not in process.err
    step = checkpoint.load_training(runs.checkpoints(run)[-1]).step
    assert f"stopped at step {step} of 1000000" in process.err
    code, _, err = cli("train", digits, "--resume", "--steps", step + 2)
    assert (code, f"resuming at step {step}" in err) == (0, True), err


PYTHON = """
import sys
from ddpm_cli import train

train(sys.argv[1], "run", start_from=sys.argv[2], steps=10**6, batch_size=4, sample_every=10**6, save_every=10**6,
      log_every=1, on_event=print)
"""


def test_ctrl_c_in_python_saves_the_last_step(start, digits, quick_model):
    run = Path("run")
    process = start(digits, quick_model, source=PYTHON)
    wait_until(lambda: b"Logged" in process.out, process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT
    assert process.err.endswith("KeyboardInterrupt\n")
    assert f"Finished(step={step_in(run)}, interrupted=True)" in process.out.decode()
    assert checkpoint.load_training(runs.checkpoints(run)[-1]).step > 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_does_not_wait_for_a_preview(start, digits, color_model, number):
    run = Path("runs/digits")
    options = ("--from", color_model, "--batch-size", 2, "--sample-every", 1, "--precision", "fp32")
    process = start("train", digits, "--steps", "1M", *options, source=ENDLESS_PREVIEW)
    wait_until(lambda: "drawing samples" in process.err, process)
    process.send_signal(number)
    assert process.wait() == 128 + number
    step = runs.step_of(runs.checkpoints(run)[-1])
    assert f"the samples of step {step} were skipped, to stop sooner" in process.err
    assert not (run / "samples" / f"step-{step:08d}.png").exists()


def test_ctrl_c_in_sampling(start, small_model):
    process = start("sample", "-m", small_model, "--n", "1M", "-o", "images/")
    wait_until(Path("images/000000.png").exists, process)
    process.send_signal(signal.SIGINT)
    assert (process.wait(), process.out) == (130, b"")
    assert "interrupted: sampling" in process.err
    assert not list(Path("images").glob(".ddpm-*"))
    for path in Path("images").glob("*.png"):
        assert picture(path).size == (8, 8)
