"""`ddpm report`: a run as one page."""

import json
import os
import re
import shlex
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from ddpm_cli.data.plots import Chart, svg
from ddpm_cli.models.results import write_results
from ddpm_cli.models.runs import preview_file
from ddpm_cli.training.curves import colours
from pages import Page, check_alone

HOSTILE = "</script><script>alert(1)</script>\x1b[31m"


@pytest.fixture
def run(quick_run, tmp_path) -> Path:
    return Path(shutil.copytree(quick_run, tmp_path / "cats & dogs"))


def page_of(cli, run: Path) -> Page:
    code, out, err = cli("report", run)
    assert (code, out, err) == (0, f"{run}/report.html\n", "")
    page = Page((run / "report.html").read_bytes())
    check_alone(page)
    return page


def test_a_run_becomes_a_page(cli, run):
    page = page_of(cli, run)
    assert page.texts["h1"] == ["cats & dogs"]
    assert page.texts["h2"] == ["Samples", "Curves", "Model", "Training", "Repeat"]
    assert page.texts["p"][0].startswith("Step 4 of 4. 8x8 gray images")
    assert page.texts["title"] == ["cats & dogs - ddpm report"]
    assert (page.sliders, len(page.images), page.texts["p"][2]) == ([], 2, "step 4")  # one preview is no choice
    titles = [about["aria-label"] for name, about in page.elements if name == "svg"]
    assert titles == ["loss", "gradient norm", "learning rate", "images/s", "mean colour of previews"]
    facts = dict(zip(page.texts["th"], page.texts["td"], strict=True))
    assert facts["data"] == "60 images, digits"
    assert facts["batch size"] == "4"
    assert page.commands[0].startswith("ddpm train ")
    assert json.loads(page.texts["details"][0].partition("{")[1] + page.texts["details"][0].partition("{")[2]) == (
        json.loads((run / "config.json").read_text())
    )


def test_a_run_that_is_not_finished(cli, run):
    """Its newest checkpoint is after the last line of its metrics, and the command on the page continues it."""
    config = json.loads((run / "config.json").read_text())
    config["train"] |= {"steps": 5, "sample_every": 99}
    (run / "config.json").write_text(json.dumps(config))
    (run / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0, "seconds": 3723.4}\n{"step": 3, "seconds": null}\n')
    shutil.rmtree(run / "samples")
    (run / "checkpoints" / "step-00000004" / "samples.png").unlink()
    page = page_of(cli, run)
    assert page.texts["p"][0].startswith("Step 4 of 5. 8x8 gray images")
    assert "not finished" in page.texts["p"][1]
    assert page.texts["p"][2] == "There are no previews yet."
    facts = dict(zip(page.texts["th"], page.texts["td"], strict=True))
    assert (facts["steps"], facts["time"]) == ("4 of 5", "1:02:03 for 3 steps")
    assert json.loads(cli("report", run, "--json")[1])["step"] == 4
    code, _, err = cli(*shlex.split(page.commands[0])[1:])
    assert (code, "resuming at step 4" in err) == (0, True), err
    assert page_of(cli, run).texts["p"][0].startswith("Step 5 of 5.")


def test_the_page_is_replaced_but_no_other_file(cli, run):
    first = cli("report", run, "--json")[1]
    assert json.loads(first) == json.loads(cli("report", run, "--json")[1])
    assert json.loads(first)["bytes"] == (run / "report.html").stat().st_size
    assert cli("report", run, "-o", "a.html")[0] == 0
    assert Path("a.html").read_bytes() == (run / "report.html").read_bytes()
    assert "exists" in cli("report", run, "-o", "a.html")[2]
    assert cli("report", run, "-o", "a.png")[0] == 2
    assert cli("report", run, "-o", "-")[1].startswith("<!doctype html>")


def test_the_newest_run_is_the_default(cli, run):
    assert "ddpm report RUN" in cli("report")[2]
    shutil.copytree(run, "runs/a")
    assert cli("report")[1] == "runs/a/report.html\n"


def test_many_previews_are_thinned_out_and_damaged_ones_left_out(cli, run):
    steps = range(10, 2010, 10)
    for step in steps:
        for raw in (False, True):
            Image.new("L", (8, 8), step // 10).save(preview_file(run, step, raw))
    preview_file(run, 2000).write_bytes(b"no picture")
    preview_file(run, 1990).unlink()
    os.mkfifo(preview_file(run, 1990))
    page = page_of(cli, run)
    [slider] = page.sliders
    shown = [int(caption.split()[1]) for caption in slider["captions"]]
    assert shown[0] == 4
    assert 50 < len(shown) <= 60
    assert shown[-1] < 1990
    assert {after - before for before, after in pairwise(shown[1:])} <= {30, 40}
    assert page.images[0]["src"] == slider["rows"][0][-1]  # without the script, the newest is shown
    assert "of 201 previews" in page.texts["p"][1]


def test_without_previews_the_checkpoint_has_a_picture(cli, run):
    shutil.rmtree(run / "samples")
    page = page_of(cli, run)
    assert (len(page.images), page.sliders) == (1, [])
    shutil.rmtree(run / "checkpoints")
    page = page_of(cli, run)
    assert (page.images, page.texts["h2"]) == ([], ["Curves", "Model", "Training", "Repeat"])


def test_evaluations_are_shown(cli, run):
    fid = {"metric": "fid", "set": "cats", "value": 3.17, "how": f"4 samples {HOSTILE}"}
    write_results(run / "eval" / "step-00000002", "a", [fid | {"value": 5.0}])
    write_results(run / "eval" / "step-00000004", "b", [fid])
    Image.new("L", (8, 8)).save(run / "eval" / "step-00000002" / "bound.png")
    (run / "eval" / "step-00000006").mkdir()
    (run / "eval" / "step-00000006" / "eval.json").write_text("[")
    (run / "eval" / "step-00000006" / "bound.png").write_text("[")
    page = page_of(cli, run)
    how = "4 samples </script><script>alert(1)</script>\\x1b[31m"
    assert page.texts["td"][:6] == ["FID (cats)", "3.170", how, "FID (cats)", "5.000", how]
    rows = [text for text in page.texts["tr"] if "FID" in text or how in text]
    assert rows == ["step 4FID (cats)3.170", how, "step 2FID (cats)5.000", how]
    assert "at step 2" in page.images[-1]["alt"]
    table = "set,t,bits,rate\n<&\x1b,2,0.1,0.2\n<&\x1b,1,0.3,0.4\nb,2,0.1,0.2\nb,1,,0.4\n"
    (run / "eval" / "step-00000002" / "bound.csv").write_text(table)
    page = page_of(cli, run)
    assert len(page.images) == 2  # only the previews
    titles = [about["aria-label"] for name, about in page.elements if name == "svg"]
    assert titles[-2:] == ["the term of each t (bits/dim)", "rate up to each t (bits/dim)"]
    assert page.texts["tspan"][-2:] == ["<&\\x1b", "b"]


def test_hostile_text_is_only_text(cli, run):
    """In settings, metrics, recipes and names of files."""
    name = "<img src=x onerror=alert(1)>\x1b[31m"
    hostile = Path(shutil.copytree(run, name))
    config = json.loads((run / "config.json").read_text())
    config["data"]["images"] = f"/{HOSTILE}"
    (hostile / "config.json").write_text(json.dumps(config | {"version": HOSTILE, "preset": HOSTILE, "base": HOSTILE}))
    with (hostile / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, HOSTILE: 1, "loss": HOSTILE}) + "\n")
    for folder in (hostile / "checkpoints").iterdir():
        values = json.loads((folder / "ddpm.json").read_text())
        values["images"]["count"] = values["version"] = HOSTILE
        (folder / "ddpm.json").write_text(json.dumps(values))
    assert cli("report", hostile, "-o", "a.html")[0] == 0
    data = Path("a.html").read_bytes()
    page = Page(data)
    check_alone(page)
    assert page.texts["h1"] == [name.replace("\x1b", "\\x1b")]
    assert len(page.texts["script"]) == 1
    assert re.search(rb"[\x00-\x09\x0b-\x1f\x7f]", data) is None


def test_damaged_settings_are_named(cli, run):
    (run / "config.json").write_text("{}")
    code, _, err = cli("report", run)
    assert (code, "config.json" in err) == (1, True)


def points(drawn: str) -> list[list[tuple[float, float]]]:
    """The curves of a chart, as points."""
    lines = re.findall(r'<path d="M([^"]*)" style=', drawn)
    return [[tuple(map(float, point.split())) for point in line.split("L")] for line in lines]


def test_a_curve_of_svg_is_at_its_values():
    drawn = svg(Chart("a", [0, 50, 100], {"a": [0.0, 1.0, 2.0]}, over="steps & t"))
    assert "steps & t" in Page(drawn.encode()).texts["text"]
    [line] = points(drawn)
    (left, bottom), (middle, half), (right, top), last = line
    assert last == (right, top)
    assert middle == pytest.approx((left + right) / 2, abs=0.1)
    assert half == pytest.approx((bottom + top) / 2, abs=0.1)
    assert bottom - top == pytest.approx((280 - 40 - 34) / 1.05, abs=0.1)


def test_a_long_curve_keeps_its_peaks():
    values = [1.0] * 20_000
    values[7777], values[12_345] = 9.0, 0.5
    drawn = svg(Chart("a", range(20_000), {"a": values}))
    [line] = points(drawn)
    assert len(line) < 1000
    heights = [y for _, y in line]
    assert sum(y < min(heights) + 1 for y in heights) == 1
    assert sum(y > max(heights) - 1 for y in heights) == 1


def test_odd_charts_are_drawn():
    for chart in (
        Chart("<&", [1], {"<a>": [None]}, log=True),
        Chart("b", [10, 10**12, 5], {"x": [1.0, float("nan"), 0.0], "y": [1.0, 2.0, 3.0]}, log=True),
    ):
        Page(svg(chart).encode())


def test_colours_of_previews():
    line = {"step": 5, "mean": [1.0, 2.0, 3.0], "raw_mean": [4.0, 5.0, 6.0], "data_mean": [7.0, 8.0, 9.0]}
    red, _, blue = colours([{"step": 1}, line, {"step": 7, "mean": [1.0]}])
    assert (red.title, red.curves) == ("mean red of previews", {"EMA": [1.0], "raw": [4.0], "images": [7.0]})
    assert blue.curves["raw"] == [6.0]
    assert colours([{"step": 1}]) == []
