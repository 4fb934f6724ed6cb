"""`ddpm train --from`: fine-tuning with the weights and the schedule of another model."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
from safetensors.torch import load_file

import hub_server
from conftest import SMALL, write_model
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.distributed import World
from ddpm_cli.models import runs
from ddpm_cli.training.request import Request
from ddpm_cli.training.run import open_run

WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = ("--batch-size", "4", "-q")


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(runs.checkpoints(run)[-1] / "unet" / WEIGHTS)


def config_of(run: Path) -> dict:
    return json.loads((run / "config.json").read_text())


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


def test_it_starts_from_the_models_weights(cli, digits, small_model):
    code, _, err = cli("train", digits, "-o", "run", "--from", small_model, "--steps", "2", "--batch-size", "4")
    assert code == 0, err
    assert f"from {small_model}" in err
    moved = distance(weights_of(Path("run")), load_file(small_model / "unet" / WEIGHTS))
    assert 0 < moved < 1e-5  # two steps of a warm-up to 5e-5
    config = config_of(Path("run"))
    assert config["base"] == str(small_model)
    assert config["schedule"]["num_train_timesteps"] == 20
    assert (config["data"]["size"], config["data"]["channels"]) == (8, 1)
    recipe = json.loads((runs.checkpoints(Path("run"))[-1] / "ddpm.json").read_text())
    assert recipe["base"] == small_model.name  # not its path on this machine


@pytest.mark.parametrize(
    "schedule",
    [
        ScheduleConfig(10, prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
        ScheduleConfig(10, prediction_type="sample"),
        ScheduleConfig(10, variance_type="learned_range"),
        ScheduleConfig(10, variance_type="fixed_large"),
    ],
)
def test_every_kind_of_model_learns_and_keeps_its_kind(cli, digits, tmp_path, schedule):
    unet = replace(SMALL, out_channels=2) if schedule.learns_variance else SMALL
    base = write_model(tmp_path / "base", unet, schedule)
    steps = ("--steps", "40", "--lr", "1e-2", "--save-every", "40", "--sample-every", "40")
    assert cli("train", digits, "-o", "run", "--from", base, *steps, "--batch-size", "16", "-q")[0] == 0
    losses = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.9 * losses[0]
    newest = runs.checkpoints(Path("run"))[-1]
    theirs = DDPMPipeline.from_pretrained(newest)
    assert theirs.scheduler.config.prediction_type == schedule.prediction_type
    assert theirs.scheduler.config.variance_type == schedule.variance_type
    assert theirs.unet.config.out_channels == unet.out_channels
    if schedule.learns_variance:  # the bound has trained the variance too
        before, after = (load_file(folder / "unet" / WEIGHTS)["conv_out.weight"][1] for folder in (base, newest))
        assert (before - after).abs().max() > 1e-4


def test_a_model_of_the_hub(cli, digits, quick_model, tmp_path, monkeypatch):
    """A run records the commit that it started from, and does not need the Hub after its first checkpoint."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server.serve() as server:
        server.add("org/small", quick_model)
        assert cli("train", digits, "-o", "run", "--from", "org/small", "--steps", "1", *QUICK)[0] == 0
        address = f"org/small@{server.repos['org/small'].sha}"
        assert config_of(Path("run"))["base"] == address
        assert "base_model: org/small" in (runs.checkpoints(Path("run"))[-1] / "README.md").read_text()
        server.faults[""] = 500
        again = ("train", digits, "-o", "run", "--resume", "--from", "org/small", "--steps", "2", "-q")
        assert cli(*again)[0] == 0


@pytest.mark.parametrize("quiet", [True, False])
def test_the_download_of_a_model_has_a_progress_bar(digits, quick_model, tmp_path, monkeypatch, quiet):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    enable_progress_bars()
    with hub_server.serve() as server:
        server.add("org/small", quick_model)
        request = Request([str(digits)], Path("run"), start_from="org/small")
        with open_run(request, World(), quiet=quiet):
            assert are_progress_bars_disabled() == quiet


def test_a_run_without_a_checkpoint_starts_from_the_model_again(cli, digits, quick_model):
    train = ("train", digits, "-o", "run", "--from", quick_model, "--steps", "2", *QUICK)
    assert cli(*train)[0] == 0
    expected = weights_of(Path("run"))
    shutil.rmtree("run/checkpoints")
    assert cli("train", digits, "-o", "run", "--resume", "-q")[0] == 0
    assert distance(weights_of(Path("run")), expected) == 0


def test_options_with_from(cli, digits, small_model, color_model, finished_run):
    def refusal(*flags: object, code: int = 2) -> str:
        result = cli("train", digits, "-o", "run", *flags)
        assert result[0] == code
        assert not Path("run").exists() or flags[0] == "--resume"
        return result[2]

    assert "--preset tiny: --from brings the network" in refusal("--from", small_model, "--preset", "tiny")
    assert "--channels 3: the model of --from has 1" in refusal("--from", small_model, "--channels", "3")
    assert "--size 10 is not a multiple of 4" in refusal("--from", small_model, "--size", "10")
    assert "no such file or directory" in refusal("--from", "nothing", code=1)
    assert cli("train", digits, "-o", "run", "--from", small_model, "--size", "12", "--steps", "1", *QUICK)[0] == 0
    assert config_of(Path("run"))["unet"]["sample_size"] == 12
    assert f"--from {color_model} (the run has {small_model})" in refusal("--resume", "--from", color_model)
    assert "--from ~nobody-here/x (the run has" in refusal("--resume", "--from", "~nobody-here/x")
    assert cli("train", digits, "-o", "run", "--resume", "--from", small_model, "--steps", "2", "-q")[0] == 0
    shutil.copytree(finished_run, "other")
    code, _, err = cli("train", digits, "-o", "other", "--resume", "--from", small_model)
    assert code == 2
    assert "(the run has none)" in err
