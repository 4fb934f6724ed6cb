"""Objectives: the options become a model's configuration, and every meaningful combination learns."""

import json
import math
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import SMALL, write_model
from ddpm_cli.config import ScheduleConfig, jsd_betas
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import training_loss
from ddpm_cli.diffusion.schedule import make_betas
from ddpm_cli.errors import UsageError
from ddpm_cli.models import runs
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.objective import contradictions, loss_for, named, schedule_for

PRESET = ScheduleConfig(variance_type="fixed_large", prediction_type="v_prediction")
QUICK = ("--batch-size", 4, "--steps", 2, "-q")

PREDICTIONS = ("epsilon", "mean", "sample", "v")
FIXED, LEARNED = ("fixed-large", "fixed-small"), ("learned", "learned-range")
MEANINGFUL = [
    *product(PREDICTIONS, FIXED, ("simple", "vlb")),
    *product(PREDICTIONS, ("fixed-small",), ("min-snr", "debiased")),
    *product(PREDICTIONS, LEARNED, ("hybrid", "vlb")),
]


def refusal(**asked) -> str:
    with pytest.raises(UsageError) as caught:
        schedule_for(asked, PRESET)
    return caught.value.message


def test_nothing_asked_is_the_preset():
    assert schedule_for({}, PRESET) == PRESET


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"schedule": "cosine"}, replace(PRESET, beta_schedule="squaredcos_cap_v2")),
        ({"schedule": "quad"}, replace(PRESET, beta_schedule="scaled_linear")),
        ({"schedule": "sigmoid", "beta_end": 0.1}, replace(PRESET, beta_schedule="sigmoid", beta_end=0.1)),
        ({"schedule": "const"}, replace(PRESET, beta_start=0.02)),
        ({"schedule": "const", "beta_end": 0.3}, replace(PRESET, beta_start=0.3, beta_end=0.3)),
        ({"schedule": "jsd", "timesteps": 50}, replace(PRESET, num_train_timesteps=50, trained_betas=jsd_betas(50))),
        ({"prediction": "mean"}, replace(PRESET, prediction_type="mean")),
        ({"variance": "learned"}, replace(PRESET, variance_type="learned_log")),
        ({"beta_start": 0.001}, replace(PRESET, beta_start=0.001)),
    ],
)
def test_options_in_the_terms_of_diffusers(asked, expected):
    config = schedule_for(asked, PRESET)
    assert config == expected
    assert named(config) | asked == named(config)
    assert list(contradictions(asked, config, "the run")) == []


@pytest.mark.parametrize("name", ["linear", "quad", "sigmoid", "const"])
@pytest.mark.parametrize("T", [1, 5, 20, 100, 4000])
def test_default_betas_leave_the_same_noise_for_every_number_of_steps(name, T):
    betas = make_betas(schedule_for({"schedule": name, "timesteps": T}, PRESET))
    assert ((betas > 0) & (betas < 1)).all()
    if T >= 50:
        whole = make_betas(schedule_for({"schedule": name}, PRESET))
        assert betas.sum().item() == pytest.approx(whole.sum().item(), rel=0.05)


def test_meaningless_schedules_are_refused():
    for name in ("cosine", "jsd"):
        assert f"--beta-end 0.1: --schedule {name} has betas of its own" in refusal(schedule=name, beta_end=0.1)
    assert "--beta-start 0.1: --schedule const has one beta" in refusal(schedule="const", beta_start=0.1)
    assert "--beta-start 0.05: is not below --beta-end 0.02" in refusal(beta_start=0.05)
    for beta in (0.0, 1.0, -1.0, math.nan):
        assert f"--beta-end {beta}: a beta is between 0 and 1" in refusal(beta_end=beta)


def test_the_loss_fits_the_variance():
    fixed, learned = ScheduleConfig(), ScheduleConfig(variance_type="learned_range")
    assert [loss_for(None, fixed), loss_for(None, learned)] == ["simple", "hybrid"]
    assert loss_for("vlb", fixed) == loss_for("vlb", learned) == "vlb"
    assert [loss_for(None, config, preset="min-snr") for config in (fixed, learned)] == ["min-snr", "hybrid"]
    untrained = "does not train the variance"
    for asked, config, why in (
        ("simple", learned, untrained),
        ("min-snr", learned, untrained),
        ("debiased", learned, untrained),
        ("hybrid", fixed, "is fixed"),
    ):
        with pytest.raises(UsageError, match=f"--loss {asked}: .*{why}"):
            loss_for(asked, config)


@pytest.fixture(scope="module")
def pixels(digits) -> torch.Tensor:
    """8 digits at 8x8, in the values of 8-bit images."""
    files = sorted(digits.rglob("*.png"))[:8]
    values = [np.asarray(Image.open(file).convert("L").resize((8, 8))) for file in files]
    return torch.from_numpy(np.stack(values))[:, None] / 127.5 - 1


@pytest.mark.parametrize(("prediction", "variance", "loss"), MEANINGFUL)
def test_every_objective_lowers_its_own_bound(pixels, prediction, variance, loss):
    config = schedule_for({"prediction": prediction, "variance": variance, "timesteps": 10}, PRESET)
    torch.manual_seed(0)
    channels = {"in_channels": 1, "out_channels": 2 if config.learns_variance else 1}
    one_level = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = UNet(replace(SMALL, **one_level, **channels))
    unet.reset_parameters()
    denoiser = Denoiser.from_config(unet, config)
    optimizer = torch.optim.Adam(unet.parameters(), lr=5e-3)
    t, eps = torch.arange(10).repeat(8), torch.randn(80, 1, 8, 8)

    def whole() -> float:
        """The loss over all t, with the same noise each time."""
        with torch.no_grad():
            return training_loss(denoiser, pixels.repeat_interleave(10, 0), t, eps, loss).mean().item()

    before = whole()
    for _ in range(20):
        steps, noise = torch.randint(10, (8,)), torch.randn_like(pixels)
        optimizer.zero_grad()
        training_loss(denoiser, pixels, steps, noise, loss).mean().backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
    assert whole() < 0.9 * before


@pytest.mark.parametrize(
    "options",
    [
        ("--prediction", "mean", "--loss", "vlb", "--variance", "learned", "--schedule", "jsd"),  # Sohl-Dickstein
        ("--prediction", "sample", "--variance", "learned-range", "--schedule", "cosine"),
    ],
)
def test_a_run_with_an_objective(cli, digits, options):
    """It trains, samples and evaluates, in 12 steps; ddpm info tells what it is."""
    args = ("train", digits, "-o", "run", "--size", 8, "--timesteps", 12, *options)
    code, _, err = cli(*args, *QUICK)
    assert code == 0, err
    asked = dict(zip(options[::2], options[1::2], strict=True))
    found = json.loads(cli("info", "run", "--json")[1])
    assert (found["T"], found["schedule"]) == (12, asked["--schedule"])
    assert found["trained"]["train"]["loss"] == asked.get("--loss", "hybrid")
    text = cli("info", "run")[1]
    assert {"vlb": "the variational bound", "hybrid": "hybrid, L_simple and"}[asked.get("--loss", "hybrid")] in text
    for steps in (4, 12):
        code, _, err = cli("sample", "-m", "run", "--n", 2, "--steps", steps, "-o", f"{steps}.png")
        assert code == 0, err
    code, _, err = cli("rate-distortion", digits, "-m", "run", "-n", 2, "--steps", 4, "-o", "rate.png")
    assert code == 0, err
    assert cli(*args, "--batch-size", 4, "--steps", 4, "--resume", "-q")[0] == 0  # the same options fit the run
    again = cli("train", digits, "-o", "run", "--resume", "--timesteps", 13, "--loss", "simple", "--prediction", "x")
    assert (again[0], "--prediction x is not one of epsilon, mean, sample, v" in again[2]) == (2, True)
    code, _, err = cli("train", digits, "-o", "run", "--resume", "--timesteps", 13, "--loss", "simple")
    assert code == 2
    assert "--timesteps 13 (the run has 12)" in err
    assert "--loss simple (the run has" in err


def test_a_predicted_mean_needs_float32(cli, digits):
    """The rounding of x_t to bf16 costs 0.25 bits per dimension, and all of x_0 where t is large."""
    train = ("train", digits, "-o", "run", "--size", 8, "--timesteps", 4, "--prediction", "mean", *QUICK[:-1])
    code, _, err = cli(*train, "--precision", "bf16")
    assert (code, "--precision bf16: a network that predicts the mean" in err) == (2, True)
    assert not Path("run").exists()
    code, _, err = cli(*train)
    assert (code, re.search(r"device +cpu .*fp32", err) is not None) == (0, True)
    sample = ("sample", "-m", "run", "--n", 1, "-o", "one.png")
    code, _, err = cli(*sample, "--precision", "bf16")
    assert (code, "--precision bf16" in err) == (2, True)
    assert cli(*sample)[0] == 0


def test_objectives_with_from(cli, digits, tmp_path):
    unet = replace(SMALL, out_channels=2)
    base = write_model(tmp_path / "base", unet, ScheduleConfig(10, variance_type="learned_log"))
    train = ("train", digits, "-o", "run", "--from", base)
    code, _, err = cli(*train, "--prediction", "v", "--variance", "learned", "--schedule", "cosine")
    assert code == 2
    assert "--prediction v (the model of --from has epsilon)" in err
    assert "--schedule cosine (the model of --from has linear)" in err
    assert "--variance" not in err
    code, _, err = cli(*train, "--loss", "simple")
    assert (code, "--loss simple: does not train the variance" in err) == (2, True)
    assert cli(*train, "--loss", "vlb", "--variance", "learned", "--timesteps", 10, *QUICK)[0] == 0


def test_betas_that_leave_no_signal_or_much_are_named(cli, digits):
    train = ("train", digits, "-o", "run", "--size", 8)
    code, _, err = cli(*train, "--schedule", "const", "--beta-end", 0.9)
    assert code == 2
    assert "alphas_cumprod becomes 0" in err
    assert not Path("run").exists()
    code, _, err = cli(*train, "--timesteps", 10, "--beta-end", 0.02, "--batch-size", 4, "--steps", 1)
    assert code == 0
    assert "x_T is 93% of the image" in err


def test_a_run_from_before_there_was_a_choice_of_the_loss(cli, digits, tmp_path):
    base = write_model(
        tmp_path / "base", replace(SMALL, out_channels=2), ScheduleConfig(4, variance_type="learned_range")
    )
    assert cli("train", digits, "-o", "run", "--from", base, *QUICK)[0] == 0
    values = json.loads(Path("run/config.json").read_text())
    assert values["train"].pop("loss") == "hybrid"
    Path("run/config.json").write_text(json.dumps(values))
    code, _, err = cli("train", digits, "-o", "run", "--resume", "--steps", 4, "-q")
    assert code == 0, err
    assert json.loads(Path("run/config.json").read_text())["train"]["loss"] == "hybrid"
    assert runs.checkpoints(Path("run"))[-1].name == "step-00000004"
