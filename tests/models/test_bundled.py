"""The models that are installed with ddpm."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, picture
from ddpm_cli import DDPM
from ddpm_cli.data.images import from_pil
from ddpm_cli.data.pictures import grid
from ddpm_cli.errors import ModelError
from ddpm_cli.models import hub
from ddpm_cli.models.bundled import bundled_models, find_bundled
from ddpm_cli.models.recipe import read_recipe


@pytest.fixture(scope="module")
def samples():
    """The images of `ddpm sample` without any option."""
    return DDPM.from_pretrained(device="cpu").sample(64)


@pytest.mark.parametrize("address", bundled_models())
def test_each_is_small_and_whole(address):
    folder = find_bundled(address)
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 5e6
    assert read_recipe(folder)["images"]["name"] == f"{address.removeprefix('bundled:')}.zip"
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "\nlicense: " in card
    assert "| bits/dim (" in card
    assert "-m path/to" not in card
    for name in ("samples.png", "curve.png"):
        assert f"({name})" in card
        picture(folder / name)


def test_the_digits_can_be_read(samples):
    """A classifier of real digits takes 95 % of them for one digit rather than all others, and finds all ten."""
    network = torch.jit.load(str(ROOT / "examples" / "digits-features.pt"))
    sure, digits = network(samples)[1].softmax(1).max(1)
    assert (sure > 0.5).float().mean() > 0.95
    assert set(digits.tolist()) == set(range(10))


def test_the_picture_in_the_readme_is_the_first_grid(samples):
    shown = from_pil(picture(ROOT / "docs" / "digits.png"))
    drawn = from_pil(grid(samples))
    assert shown.shape == drawn.shape
    assert (shown.float() - drawn.float()).abs().mean() < 6  # another processor rounds in another way


def test_it_is_the_default_where_there_is_no_run(finished_run, small_model, tmp_path, monkeypatch):
    assert hub.resolve().fallback
    assert hub.resolve().address == hub.resolve("bundled:digits").address == "bundled:digits"
    assert not hub.resolve("bundled:digits").fallback
    shutil.copytree(finished_run, tmp_path / "runs" / "mine")
    assert hub.resolve().folder.parts[-4:-2] == ("runs", "mine")
    monkeypatch.setenv("DDPM_MODEL", str(small_model))
    assert hub.resolve().folder == small_model


def test_commands_say_that_they_take_it(cli, tmp_path):
    code, out, err = cli("sample", "-n", "1", "--steps", "1", "-o", "a.png")
    assert (code, out) == (0, "a.png\n"), err
    assert "this is the bundled model" in err
    assert picture("a.png").size == (28, 28)
    code, _, err = cli("sample", "-m", "bundled:digits", "-n", "1", "--steps", "1", "-o", "b.png")
    assert code == 0
    assert "this is the bundled model" not in err
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert "this is the bundled model" in cli("info")[2]
    (tmp_path / "runs" / "new").mkdir(parents=True)  # as it is before the first checkpoint
    (tmp_path / "runs" / "new" / "config.json").touch()
    assert "no run in runs/ has a checkpoint, so this is the bundled model" in cli("info")[2]


def test_an_evaluation_of_it_has_a_folder_with_its_name():
    assert hub.resolve("bundled:digits").name == "digits"


def test_an_unknown_one_names_the_others():
    with pytest.raises(ModelError, match="bundled:cats: no such model") as caught:
        hub.resolve("bundled:cats")
    assert "bundled:digits" in caught.value.hint


def test_a_missing_one_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr("ddpm_cli.models.bundled._FOLDER", tmp_path)
    with pytest.raises(ModelError, match="bundled:digits") as caught:
        hub.resolve()
    assert "install it again" in caught.value.hint


def test_training_can_start_from_it_and_continue(cli, digits):
    command = ("train", digits, "-o", "run", "--from", "bundled:digits", "--batch-size", 2, "-q", "--resume")
    for _ in range(2):
        code, _, err = cli(*command, "--steps", 1)
        assert code == 0, err
    assert read_recipe(hub.resolve("run").folder)["base"] == "bundled:digits"
