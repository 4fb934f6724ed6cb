"""The benchmarks of speed in small sizes. Those of gpu.py run the same code on a CPU as the large ones on a GPU."""

import importlib
import json
import math
import subprocess
import sys

import pytest
import torch

from conftest import ROOT


@pytest.fixture
def script(monkeypatch):
    """A module of benchmarks/."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


@pytest.fixture
def start_script():
    """Run a script of benchmarks/ in a process, and return what it prints."""

    def run(name, *options):
        command = [sys.executable, ROOT / "benchmarks" / name, *options]
        return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout

    return run


@pytest.mark.parametrize(
    ("parts", "checks", "contests"),
    [
        (["waits", "few-steps"], 0, 1),
        pytest.param(
            ["network", "samples", "waits", "training", "few-steps", "large-training"], 13, 3, marks=pytest.mark.long
        ),
    ],
)
def test_small_sizes(script, monkeypatch, tmp_path, capfd, parts, checks, contests):
    """All but the parts that start processes."""
    out = tmp_path / "table.md"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--out", str(out), "--only", *parts])
    with pytest.raises(SystemExit) as ended:
        script("gpu").main()
    text = out.read_text()
    assert ended.value.code == 0, text
    lines = text.splitlines()
    assert sum("| passed |" in line for line in lines) == checks
    assert "FAILED" not in text
    assert sum("| ddpm |" in line for line in lines) - 1 == contests  # one more row has the version
    assert "- processes: not asked for" in lines
    assert f"wrote {out}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("left", "expected"),
    [(10_000, (1000, 5)), (75, (1000, 3)), (25, (1000, 1)), (5, (200, 1)), (-1, (1, 1))],
)
def test_rounds_fit_into_the_time(script, left, expected):
    """25 ms a step."""
    assert script("gpu_speed").plan(1000, 5, 0.025, left) == expected


def test_a_side_that_needs_a_compiler_may_fail(script, capsys):
    speed = script("gpu_speed")

    def broken():
        raise RuntimeError("no compiler")

    def idle():
        return lambda steps: None

    sides = [speed.Side("ours", idle), speed.Side("theirs", broken, optional=True), speed.Side("as used", idle, 0.1)]
    found = speed.contest(sides, 50, 2, 60.0, torch.device("cpu"))
    assert [(side.name, side.rounds, side.steps) for side in found] == [("ours", 2, 50), ("as used", 2, 5)]
    assert "theirs: not measured: no compiler" in capsys.readouterr().err


def test_a_batch_that_does_not_fit_is_halved(script):
    speed = script("gpu_speed")

    def measure(batch):
        if batch > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return []

    assert speed.largest_that_fits(16, measure, torch.device("cpu")) == (4, [])


def test_the_table(script):
    """Targets are for the full sizes. A check that fails, or ends with an error, is a failure of the script."""
    gpu, checks, speed = script("gpu"), script("gpu_checks"), script("gpu_speed")
    assert not checks.Check("", math.nan, 1, "").passed

    def errs():
        yield checks.Check("first", 0, 0, "why")
        raise ValueError("out of\nluck")

    outcomes = list(checks.attempt("name", errs))
    assert outcomes[1:] == [checks.Failed("name", "out of luck")]
    names = (speed.OURS, speed.TUNED, speed.USUAL)
    sides = [speed.Measured(name, 0.008 * i, i, 3, 1000 // i, 2 * 10**9) for i, name in enumerate(names, 1)]
    for full in (True, False):
        report = gpu.Report({"device": "a card"}, None, full)
        report.add(outcomes[0])
        assert not report.failed
        report.add(outcomes[1])
        assert report.failed
        report.add_race("sampling", gpu.Race("256 samples", 256, 1000, sides))
        text = report.markdown()
        assert "| name | — | — | FAILED | out of luck |" in text
        assert "|  | diffusers, as used | 24 s | 10.7 | 3.00 | 2.0 GB | 3 x 333 steps, scaled to 1000 |" in text
        target = "| 256 samples, 1000 steps | at most 8 s (17) |"
        assert f"{target} 8 s | yes |" in text if full else f"{target} — | not measured |" in text
        assert "| training of the CIFAR-10 model, batch 128 | at least 60 steps/s (21) | — | not measured |" in text


@pytest.mark.long
def test_a_comparison_with_diffusers(start_script):
    """Each program in a process of its own."""
    small = ("--preset", "tiny", "--size", "8", "--batch-size", "2", "--rounds", "2", "--steps", "2", "--device", "cpu")
    rows = [json.loads(line) for line in start_script("vs_diffusers.py", *small, "--json").splitlines()]
    assert [row["work"] for row in rows] == ["sampling", "training", "memory"]
    for row in rows:
        assert row["ours"] > 0
        assert row["diffusers"] > 0
    assert all(row["least"] <= row["ratio"] <= row["most"] for row in rows[:2])
