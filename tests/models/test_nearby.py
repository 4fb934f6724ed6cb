"""Runs and model directories near an address."""

import subprocess
import sys
from pathlib import Path

import pytest

from ddpm_cli.errors import DataError, ModelError
from ddpm_cli.models import hub
from ddpm_cli.models.nearby import completions, did_you_mean, models_in
from ddpm_cli.training.curves import read_metrics


@pytest.fixture
def _models(tmp_path):
    """The names of files are enough."""
    for name in (
        *("runs/cats/config.json", "runs/dogs/config.json", "runs/notes/readme.txt"),
        *(
            "runs/cats/checkpoints/step-00000010/model_index.json",
            "runs/cats/checkpoints/step-00000020/model_index.json",
        ),
        *("flat/config.json", "pipeline/model_index.json", "pipeline/unet/config.json", "elsewhere/mine/config.json"),
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


@pytest.mark.usefixtures("_models")
def test_models_in_a_folder():
    assert models_in(Path()) == [Path("flat"), Path("pipeline")]
    assert models_in(Path("runs")) == [Path("runs/cats"), Path("runs/dogs")]
    assert models_in(Path("nowhere")) == []
    assert models_in(Path("flat/config.json")) == []


@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("", ["flat", "pipeline", "runs/cats", "runs/dogs"]),
        ("ru", ["flat", "pipeline", "runs/cats", "runs/dogs"]),  # the command line leaves out what begins otherwise
        ("runs/", ["runs/cats", "runs/dogs"]),
        ("./runs/c", ["./runs/cats", "./runs/dogs"]),
        ("runs/cats/", ["runs/cats/checkpoints/step-00000010", "runs/cats/checkpoints/step-00000020"]),
        ("runs/cats/checkpoints/s", [f"runs/cats/checkpoints/step-000000{n}0" for n in (1, 2)]),
        ("pipeline/", ["pipeline/unet"]),
        ("elsewhere/m", ["elsewhere/mine"]),
        ("~/", ["~/flat", "~/pipeline", "~/runs/cats", "~/runs/dogs"]),
        ("google/", []),
    ],
)
def test_completions(typed, found, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert completions(typed) == found


@pytest.mark.parametrize(
    "name", ["my cats", "$(touch x)", "\\$(touch x)", "`x`", "a'b", 'a"b', "a;b", "*", "-m", ".x", "a\nb"]
)
def test_names_that_a_shell_may_evaluate_are_not_offered(name, tmp_path):
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.json").touch()
    assert models_in(Path())
    assert completions("") == []


@pytest.mark.usefixtures("_models")
@pytest.mark.parametrize(
    ("address", "meant"),
    [
        ("cats", "runs/cats"),
        ("runs/cast", "runs/cats"),
        ("rnus/cats", "runs/cats"),
        ("runs/cats/checkpoints/step-00000030", "runs/cats/checkpoints/step-00000010"),
        ("pipelin", "pipeline"),
        ("elsewhere/mien", "elsewhere/mine"),
    ],
)
def test_the_nearest_model_is_named(address, meant):
    assert did_you_mean(address, Path("runs")) == f"Did you mean {meant}?"


@pytest.mark.usefixtures("_models")
def test_the_error_for_an_address_names_it():
    with pytest.raises(ModelError) as error:
        hub.resolve("cats")
    assert error.value.hint == "Did you mean runs/cats?"


@pytest.mark.usefixtures("_models")
def test_an_address_like_no_other():
    assert did_you_mean("google/ddpm-cifar10-32", Path("runs")) is None
    assert did_you_mean("google/ddpm-cifar10-32", Path("runs"), "Check the network.") == "Check the network."
    assert did_you_mean("runs/horses", Path("runs")) == "runs has cats and 1 more."
    assert did_you_mean("horses", Path("runs")) is None
    assert did_you_mean("rnus/cats", Path("runs"), "Check it.") == "Did you mean runs/cats? Check it."


@pytest.mark.usefixtures("_models")
def test_a_run_to_plot_or_to_send(cli):
    with pytest.raises(DataError) as error:
        read_metrics(Path("runs/cast"))
    assert error.value.hint == "Did you mean runs/cats?"
    assert "Hint: Did you mean runs/cats?" in cli("push", "cats", "me/cats", "--yes")[2]


def test_it_imports_no_torch():
    code = "import sys, ddpm_cli.models.nearby; assert not {'torch', 'numpy', 'huggingface_hub'} & {*sys.modules}"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
