"""`ddpm sample`: its outputs and options."""

import json
from pathlib import Path

import numpy as np

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
    grid = np.asarray(picture("grid.png"))
    assert np.array_equal(grid[2:10, 12:20], array[1, :, :, 0])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["grid.png", "images", "x.npz"]


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


def test_the_model_may_come_from_the_environment(cli, small_model, monkeypatch):
    monkeypatch.setenv("DDPM_MODEL", str(small_model))
    assert cli("sample", "--n", 1, "-o", "a.png")[0] == 0
    assert Path("a.png").read_bytes().startswith(PNG)
