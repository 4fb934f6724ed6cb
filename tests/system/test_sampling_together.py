"""A folder of samples that several processes fill has the same images as from one call."""

import json
import shutil
from pathlib import Path

import pytest

from processes import kill_together, wait_until

COMMON = ("sample", "-o", "images/", "--batch-size", 2)


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("images").glob("*.png")}


@pytest.fixture
def whole(cli, small_model) -> dict[str, bytes]:
    """Seven images from one call."""
    assert cli(*COMMON, "-m", small_model, "--n", 7, "-q")[0] == 0
    drawn = files()
    shutil.rmtree("images")
    return drawn


def test_two_processes_draw_what_one_does(pair, small_model, whole):
    first, second = pair(*COMMON, "-m", small_model, "-n", 7, "--json")
    first.finish()
    second.finish()
    assert json.loads(first.out + second.out)["drawn"] == 7  # one of them reports it
    assert files() == whole


def test_the_same_command_continues_after_a_kill(pair, cli, small_model, whole):
    """Two processes are killed, and then one draws the rest."""
    both = pair(*COMMON, "-m", small_model, "-n", "100k")
    # The second process has the second half.
    wait_until(lambda: len(drawn := files()) >= 4 and max(drawn) > "000006.png", *both)
    kill_together(*both)
    assert len(files()) < 100_000
    assert cli(*COMMON, "-m", small_model, "--n", 7)[0] == 0
    assert {name: data for name, data in files().items() if name in whole} == whole
    assert not list(Path("images").glob(".ddpm-*"))


def test_only_one_command_at_a_time_fills_a_folder(start, cli, small_model):
    process = start(*COMMON, "-m", small_model, "--n", "1M")
    wait_until(Path("images/000000.png").exists, process)
    code, _, err = cli(*COMMON, "-m", small_model, "--n", 3)
    assert (code, "another process is writing to it" in err) == (1, True)


def test_several_processes_write_no_file(pair, small_model):
    first, second = pair("sample", "-m", small_model, "-o", "grid.png")
    assert first.wait() == second.wait() != 0
    assert (first.err + second.err).count("Error: 2 processes can only write into a folder") == 1
    assert not Path("grid.png").exists()
