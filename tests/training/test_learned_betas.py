"""`--schedule learned`: the gradient of the betas, runs that learn them, and models that have them."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline

from conftest import step_in, weights_in
from ddpm_cli import DDPM
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.learned_betas import LearnedBetas
from ddpm_cli.diffusion.loss import prior, training_loss
from ddpm_cli.diffusion.schedule import NoiseSchedule, make_betas
from ddpm_cli.models import runs

CONFIG = ScheduleConfig(8, beta_start=0.05, beta_end=0.4, clip_sample=False)
LEARNED = ("--timesteps", 8, "--loss", "vlb", "--schedule", "learned", "--precision", "fp32")


def gaussian_network(schedule, variance=0.25):
    """eps for independent pixels from N(0, 1/4), which is known in closed form."""

    def network(x_t, t):
        abar = schedule.alphas_cumprod[t].view(-1, 1, 1, 1)
        return x_t * (1 - abar).sqrt() / (abar * variance + 1 - abar)

    return network


def bound(schedule):
    """The bound of some Gaussian images, in float64, with the same noise each time."""
    generator = torch.Generator().manual_seed(0)
    x_0 = 0.5 * torch.randn(64, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.arange(8).repeat(8)
    eps = torch.randn(64, 1, 2, 2, generator=generator, dtype=torch.float64)
    denoiser = Denoiser(gaussian_network(schedule), schedule, CONFIG)
    return (training_loss(denoiser, x_0, t, eps, "vlb") + prior(schedule, x_0) / math.log(2)).mean()


def test_they_start_with_the_given_ones_and_the_first_stays():
    betas = make_betas(CONFIG)
    learned = LearnedBetas(betas)
    torch.testing.assert_close(learned.betas, betas, rtol=1e-6, atol=0)
    assert learned.betas[0] == betas[0]
    assert [name for name, _ in learned.named_parameters()] == ["logits"]


def test_the_gradient_is_that_of_finite_differences():
    """Through x_t, the posterior, the variance, the decoder and the prior."""
    learned = LearnedBetas(make_betas(CONFIG))
    bound(learned()).backward()
    for i in range(7):
        values = []
        for step in (-1e-4, 1e-4):
            logits = learned.logits.detach().double().clone()
            logits[i] += step
            values.append(bound(NoiseSchedule(torch.cat([learned.first, torch.sigmoid(logits)]))).item())
        assert learned.logits.grad[i].item() == pytest.approx((values[1] - values[0]) / 2e-4, rel=1e-4)


def test_learning_lowers_the_bound_of_an_ideal_model():
    learned = LearnedBetas(make_betas(CONFIG))
    optimizer = torch.optim.Adam(learned.parameters(), lr=0.02)
    before = bound(learned()).item()
    for _ in range(50):
        optimizer.zero_grad()
        bound(learned()).backward()
        optimizer.step()
    assert bound(learned()).item() < before - 0.05


def betas_of(run) -> list[float]:
    path = runs.checkpoints(Path(run))[-1] / "scheduler" / "scheduler_config.json"
    return json.loads(path.read_text())["trained_betas"]


def test_a_run_learns_its_betas_and_resumes_bit_for_bit(cli, digits):
    train = ("train", digits, "--size", 8, "--batch-size", 4, "--save-every", 2, "--sample-every", "1M", *LEARNED)
    assert cli(*train, "-o", "whole", "--steps", 5, "-q")[0] == 0
    for steps in (2, 5):
        code, _, err = cli(*train, "-o", "parts", "--steps", steps, "--resume", "-q")
        assert code == 0, err
    assert step_in(Path("parts")) == 5
    assert weights_in(Path("parts")) == weights_in(Path("whole"))
    start = json.loads(Path("whole/config.json").read_text())["schedule"]["trained_betas"]
    learned = betas_of("whole")
    assert learned == betas_of("parts")
    assert learned[0] == start[0]
    assert all(a != b for a, b in zip(learned[1:], start[1:], strict=True))
    found = DDPM.from_pretrained("whole", precision="fp32")
    assert found.schedule.betas.tolist() == learned
    assert DDPMPipeline.from_pretrained(runs.checkpoints(Path("whole"))[-1]).scheduler.config.trained_betas == learned
    info = cli("info", "whole")[1]
    assert "8 steps, a list of betas" in info
    assert "learned with the network" in info


def test_two_processes_learn_the_betas_of_one(cli, pair, digits):
    train = ("train", digits, "--size", 8, "--batch-size", 4, "--steps", 4, "--sample-every", "1M", *LEARNED)
    assert cli(*train, "-o", "one", "-q")[0] == 0
    first, second = pair(*train, "-o", "two", "-q")
    assert first.wait() == second.wait() == 0, first.err + second.err
    assert betas_of("two") == pytest.approx(betas_of("one"), rel=1e-4)


def test_what_cannot_train_them_is_refused(cli, digits):
    train = ("train", digits, "-o", "run", "--schedule", "learned")
    for loss in ((), ("--loss", "simple")):
        code, _, err = cli(*train, *loss)
        assert code == 2
        assert "--schedule learned: only the bound depends on the betas" in err
    code, _, err = cli(*train, "--loss", "vlb", "--beta-end", 0.1)
    assert (code, "--beta-end 0.1: --schedule learned starts with the default betas" in err) == (2, True)
    assert not Path("run").exists()
