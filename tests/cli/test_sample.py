"""`ddpm sample`: its outputs and options."""

import json
from pathlib import Path

import numpy as np
import pytest

from conftest import picture

PNG = b"\x89PNG"


def test_every_kind_of_output(cli, small_model, tmp_path):
    common = ("-m", small_model, "--n", 5, "--seed", 3)
    assert cli("sample", *common, "-o", "grid.png")[1] == "grid.png\n"
    assert cli("sample", *common, "-o", "images/")[1] == "images\n"
    assert cli("sample", *common, "-o", "x.npz")[1] == "x.npz\n"
    array = np.load("x.npz")["arr_0"]
    assert array.shape == (5, 8, 8, 1)
    for i in range(5):
        assert np.array_equal(np.asarray(picture(f"images/{i:06d}.png")), array[i, :, :, 0])
    assert cli("sample", *common, "--scale", 1, "-o", "exact.png")[0] == 0
    grid = np.asarray(picture("exact.png"))
    assert np.array_equal(grid[2:10, 12:20], array[1, :, :, 0])
    assert np.array_equal(np.asarray(picture("grid.png")), grid.repeat(12, 0).repeat(12, 1))  # 8 pixels become 96
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exact.png", "grid.png", "images", "x.npz"]


def test_one_image_is_not_a_sheet(cli, small_model):
    """It has the size of the model, without a border, so that it can be the input of other commands."""
    assert cli("sample", "-m", small_model, "--n", 1, "-o", "one.png")[0] == 0
    assert cli("sample", "-m", small_model, "--n", 1, "-o", "one/")[0] == 0
    assert picture("one.png").tobytes() == picture("one/000000.png").tobytes()
    assert cli("sample", "-m", small_model, "--n", 1, "--scale", 3, "-o", "large.png")[0] == 0
    assert picture("large.png").size == (24, 24)


def test_a_scale_is_for_pictures(cli, small_model):
    for output, names in [("x/", "a folder has the exact pixels"), ("x.npz", ".npz has the exact pixels")]:
        code, _, err = cli("sample", "-m", small_model, "--scale", 2, "-o", output)
        assert (code, names in err) == (2, True), err
    for scale in ("0", "33", "1.5", "x", "-1", "²"):
        code, _, err = cli("sample", "-m", small_model, "--scale", scale, "-o", "x.png")
        assert (code, "neither auto nor a whole number" in err) == (2, True), err
    assert cli("sample", "-m", small_model, "--n", 1, "--scale", "auto", "-o", "x/")[0] == 0


def test_nothing_is_overwritten_unless_forced(cli, small_model):
    Path("grid.png").write_text("precious")
    Path("images").mkdir()
    Path("images/000000.png").write_text("precious")
    for output in ("grid.png", "images/"):
        code, _, err = cli("sample", "-m", small_model, "--n", 1, "-o", output)
        assert code == 1
        assert "--force" in err
    assert Path("grid.png").read_text() == Path("images/000000.png").read_text() == "precious"
    assert cli("sample", "-m", small_model, "--n", 1, "-o", "grid.png", "--force")[0] == 0
    assert Path("grid.png").read_bytes().startswith(PNG)


def test_sample_options(cli, small_model):
    code, out, err = cli(
        "sample", "-m", small_model, "--n", 3, "--steps", 5, "--json", "-o", "a.png", "--batch-size", 2
    )
    result = json.loads(out)
    assert code == 0
    assert (result["n"], result["steps"], result["seed"], result["output"]) == (3, 5, 0, "a.png")
    assert str(small_model) in err  # the note names the model
    assert cli("sample", "-m", small_model, "--n", 1, "-q", "-o", "b.png") == (0, "b.png\n", "")
    code, _, err = cli("sample", "-m", small_model, "--steps", 21, "-o", "c.png")
    assert code == 2
    assert "--steps 21" in err


def test_the_sampler_is_named(cli, color_model):
    """Without --sampler it is dpm++ in 20 steps, and a note says how to get Algorithm 2."""
    common = ("sample", "-m", color_model, "--n", 1, "--json", "--force", "-o", "a.png")
    _, out, err = cli(*common)
    result = json.loads(out)
    assert (result["sampler"], result["steps"], result["order"], result["evaluations"]) == ("dpm++", 20, 2, 20)
    assert "sampler dpm++, 20 logsnr steps, order 2, eta 1 (--sampler ddpm takes all 1000, as the paper does)" in err
    result = json.loads(cli(*common, "--sampler", "langevin", "--steps", 3, "--updates", 2)[1])
    assert (result["sampler"], result["steps"], result["evaluations"]) == ("langevin", 3, 7)
    assert "take 30 or more --steps" in cli(*common, "--sampler", "langevin", "--steps", 3, "--updates", 1)[2]
    assert "--steps" not in cli(*common, "--sampler", "langevin", "--steps", 30, "--updates", 1)[2]
    _, _, err = cli(*common, "--sampler", "ddpm", "--steps", 4)
    assert "sampler ddpm, 4 uniform steps\n" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sampler", "euler"), "--sampler euler is not one of ddpm, ddim, dpm++"),
        (("--eta", 0.5, "--sampler", "ddpm"), "--eta 0.5: is a setting of ddim and dpm++, not of ddpm"),
        (("--order", 9), "--order 9: must be between 1 and 3"),
        (("--spacing", "odd"), "--spacing odd is not one of uniform, quadratic, logsnr"),
    ],
)
def test_settings_that_do_not_fit_the_sampler_are_refused(cli, color_model, options, message):
    code, out, err = cli("sample", "-m", color_model, *options, "-o", "a.png")
    assert (code, out) == (2, "")
    assert message in err
    assert not Path("a.png").exists()


def test_a_folder_never_mixes_two_samplers(cli, color_model):
    common = ("sample", "-m", color_model, "--n", 1, "-o", "images/")
    assert cli(*common)[0] == 0
    code, _, err = cli(*common, "--order", 3)
    assert code == 1
    assert "order 2, not 3" in err
    assert cli(*common)[0] == 0


def test_the_model_may_come_from_the_environment(cli, small_model, monkeypatch):
    monkeypatch.setenv("DDPM_MODEL", str(small_model))
    assert cli("sample", "--n", 1, "-o", "a.png")[0] == 0
    assert Path("a.png").read_bytes().startswith(PNG)
