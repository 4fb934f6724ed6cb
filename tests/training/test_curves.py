"""`ddpm plot`: a run's metrics as a picture and as text."""

import json
import math
import os
from pathlib import Path

import pytest
from PIL import Image

from ddpm_cli.data.plots import Chart, _ticks, draw, text
from ddpm_cli.training.curves import charts, read_metrics
from ddpm_cli.training.metrics import forget_after


def metrics(run: Path, lines: list[dict]) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def falling(n: int) -> list[dict]:
    return [
        {"step": 100 * i, "loss": 1 / i, "loss_q1": None, "lr": 1e-4, "grad_norm": 2 / i, "images_per_second": 10.0}
        for i in range(1, n + 1)
    ]


def test_a_run_becomes_a_picture(cli, finished_run):
    code, out, err = cli("plot", finished_run, "-o", "plot.png")
    assert (code, out, err) == (0, "plot.png\n", "")
    picture = Image.open("plot.png").convert("RGB")
    assert picture.size == (1280, 756)
    for left, top in ((0, 36), (640, 36), (0, 396), (640, 396)):  # something blue is drawn in each of the four
        panel = picture.crop((left + 75, top + 41, left + 621, top + 325))
        assert any(b > r + 60 for r, _, b in panel.get_flattened_data())
    code, out, _ = cli("plot", finished_run, "-o", "plot.png", "--force", "--json")
    assert json.loads(out)["step"] == 4
    assert "exists" in cli("plot", finished_run, "-o", "plot.png")[2]


def test_a_curve_is_at_its_values(tmp_path):
    """A loss of 1/i begins at the top, ends at the right edge, and is at the value of the axis in between."""
    [loss, *_] = charts(falling(50))
    picture = draw([loss], "").crop((75, 77, 620, 361))
    pixels = picture.load()
    blue = [
        (x, y) for x in range(picture.width) for y in range(picture.height) if pixels[x, y][2] > pixels[x, y][0] + 60
    ]
    assert min(y for _, y in blue) < 15
    assert max(x for x, _ in blue) > picture.width - 5
    at_half = [y for x, y in blue if abs(x - picture.width // 2) <= 1]
    expected = math.log(1.1 * 25) / math.log(50 * 1.21) * picture.height  # 1/25 between 1.1 and 1/55
    assert sum(at_half) / len(at_half) == pytest.approx(expected, abs=4)


def test_text_for_a_terminal():
    lines = text(charts(falling(50))[0], columns=30, rows=4).splitlines()
    assert lines[0] == "loss: 0.02 at step 5000"
    assert len(lines) == 7
    assert lines[1].startswith("     1.1 │")
    assert all(len(line) == 40 for line in lines[1:5])
    assert lines[4][11:].strip("⠀")  # it reaches the lowest row
    assert lines[6].endswith("5k")


def test_few_points_are_joined():
    """A ramp of three values: every column from the first to the last has a dot, and none is steep."""
    lines = text(Chart("lr", [10, 50, 100], {"lr": [0.0, 4 / 9, 1.0]}), columns=40, rows=4).splitlines()
    rows = [line[10:] for line in lines[1:5]]
    filled = ["".join(column).strip("⠀") for column in zip(*rows, strict=True)]
    assert all(filled[5:39])
    assert all(len(cells) <= 2 for cells in filled)


def test_a_terminal_shows_it(in_a_terminal, finished_run):
    code, seen = in_a_terminal("plot", finished_run, "-o", "a.png")
    assert code == 0
    for title in ("loss", "gradient norm", "learning rate", "images/s"):
        assert f"{title}: " in seen


@pytest.mark.parametrize(
    ("low", "high", "log"), [(0, 1, False), (0, 7e-5, False), (0.011, 0.013, True), (1e-4, 3, True)]
)
def test_ticks_are_round_and_few(low, high, log):
    ticks = _ticks(low, high, log)
    assert 2 <= len(ticks) <= 8
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in ticks)
    assert all(len(f"{tick:.10g}".rstrip("0").replace("0.", "").lstrip("0")) <= 6 for tick in ticks)


def test_unusual_runs_are_drawn(tmp_path):
    for lines in (
        falling(1),
        [{"step": 1, "loss": 0.0, "grad_norm": None, "lr": 0.0, "images_per_second": 0.0}],
        [{"step": 5}],
        [{"step": 1, "loss": 1e-9, "grad_norm": 1e9, "lr": 1, "images_per_second": 1e7}, {"step": 2, "loss": 1e9}],
    ):
        found = charts(read_metrics(metrics(tmp_path / "run", lines)))
        draw(found, "odd")
        for chart in found:
            text(chart)


def test_errors_are_explained(cli, tmp_path):
    assert "there is none in runs/" in cli("plot")[2]
    assert "nowhere: no such folder" in cli("plot", "nowhere")[2]
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "metrics.jsonl").write_text('{"step": 1')  # cut off by a crash
    code, _, err = cli("plot", "-o", "x.png")
    assert code == 1
    assert "has no lines yet" in err


GOOD = b'{"step": 100, "loss": 0.5, "lr": 0.001}'
BAD = [
    b'{"step": 200, "loss": "\xff"}',
    b"[" * 100_000,
    b'{"step": 200, "loss": ' + b"[" * 10_000,
    b'{"step": "x"}',
    b'{"step": null}',
    b'{"step": 1.5}',
    b'{"step": true}',
    b'{"step": -5}',
    b'{"step": Infinity}',
    b'{"step": 1' + b"0" * 400 + b"}",
    b"[1, 2]",
    b"",
    b'{"step": 200',
]
ODD = ["Infinity", "-Infinity", "NaN", '"x"', "[1]", "{}", "true", "1" + "0" * 400, "-1", "1e-320", "1e308"]


@pytest.mark.parametrize("bad", BAD)
def test_a_damaged_line_is_left_out(cli, tmp_path, bad):
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "metrics.jsonl"
    path.write_bytes(b"\n".join([GOOD, bad, GOOD.replace(b"100", b"300"), b""]))
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [100, 300]
    code, out, err = cli("plot", "run", "--json")
    assert (code, json.loads(out)["step"]) == (0, 300), err
    forget_after(path, 250)
    assert path.read_bytes() == GOOD + b"\n"


@pytest.mark.parametrize("odd", ODD)
def test_impossible_values_are_left_out(cli, tmp_path, odd):
    (tmp_path / "run").mkdir()
    line = '{"step": 200, "loss": ODD, "lr": ODD, "grad_norm": ODD, "mean": [ODD], "output": 1, "target": 2}\n'
    (tmp_path / "run" / "metrics.jsonl").write_bytes(GOOD + b"\n" + line.replace("ODD", odd).encode())
    code, out, err = cli("plot", "run", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["step"], found["loss"], found["lr"], found["output"]) == (200, None, None, "run/plot.png")
    for chart in charts(read_metrics(tmp_path / "run")):
        text(chart)


def test_metrics_that_are_not_a_file_are_named(cli, tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "metrics.jsonl")
    code, _, err = cli("plot", "run")
    assert (code, "metrics.jsonl: cannot be read (is a pipe or a device" in err) == (1, True)
    forget_after(tmp_path / "run" / "metrics.jsonl", 5)  # only the curve is missing
    forget_after(tmp_path / "none", 5)


def test_steps_out_of_order_are_drawn(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in (10, 10**12, 5)]
    for chart in charts(read_metrics(metrics(tmp_path / "run", lines))):
        draw([chart], "odd")
        text(chart)
