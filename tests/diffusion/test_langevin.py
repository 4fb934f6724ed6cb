"""Annealed Langevin dynamics: the right mean, variance and weights, for data whose score is known."""

import math

import pytest
import torch

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers import spaced
from ddpm_cli.diffusion.samplers.langevin import langevin, step_size
from ddpm_cli.diffusion.schedule import NoiseSchedule

T1000 = NoiseSchedule.from_config(ScheduleConfig())


def mixture_eps(means: list[float], stds: list[float], weights: list[float]):
    """The ideal network for a mixture of Gaussians, in one dimension: eps = -sqrt(1 - abar) grad log q(x_t)."""

    def eps(x_t, t):
        abar = T1000.alphas_cumprod[int(t)].item()
        log_q, slopes = [], []
        for mean, std, weight in zip(means, stds, weights, strict=True):
            variance = abar * std**2 + 1 - abar
            away = x_t - math.sqrt(abar) * mean
            log_q.append(math.log(weight) - 0.5 * math.log(variance) - away**2 / (2 * variance))
            slopes.append(-away / variance)
        share = torch.stack(log_q).softmax(0)
        return -math.sqrt(1 - abar) * (share * torch.stack(slopes)).sum(0)

    return eps


def sampled(eps, steps: int, updates: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(1, 1, 100, 200, dtype=torch.float64, generator=generator)

    chosen = spaced(T1000, steps, spacing="logsnr")
    ideal = Denoiser(eps, T1000.subsequence(chosen), ScheduleConfig(clip_sample=False))
    *_, last = langevin(ideal, noise(), noise, updates)
    return last.x_t


@pytest.mark.parametrize(("steps", "updates"), [(40, 5), (40, 10)])
def test_a_gaussian_is_sampled(steps, updates):
    found = sampled(mixture_eps([0.3], [0.5], [1.0]), steps, updates)
    # 20,000 samples: three standard errors are 0.011 for the mean and 1.5 % for the deviation. The rest is the bias of
    # steps of finite size.
    assert found.mean().item() == pytest.approx(0.3, abs=0.02)
    assert found.std().item() == pytest.approx(0.5, rel=0.03)


def test_a_mixture_gets_its_weights():
    """At low noise no update crosses from one mode to the other, so the levels above must get the weights right."""
    found = sampled(mixture_eps([-0.8, 0.6], [0.1, 0.2], [0.2, 0.8]), 40, 5)
    low = found < -0.3
    assert low.double().mean().item() == pytest.approx(0.2, abs=0.02)
    assert found[low].mean().item() == pytest.approx(-0.8, abs=0.01)
    assert found[low].std().item() == pytest.approx(0.1, rel=0.05)
    assert found[~low].mean().item() == pytest.approx(0.6, abs=0.01)
    assert found[~low].std().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize(("ratio", "updates"), [(1.27, 5), (1.05, 3), (2.0, 100), (1.0, 1)])
def test_the_step_size_leaves_a_hundredth_of_the_noise_above(ratio, updates):
    """Update by update: for a point, the variance of the noise becomes (1 - d)^2 times it + 1 - (1 - d)^2."""
    d = step_size(ratio, updates)
    assert 0 < d < 1
    variance = ratio**2
    for _ in range(updates):
        variance = (1 - d) ** 2 * variance + 1 - (1 - d) ** 2
    assert variance <= 1.01 + 1e-9
    assert ratio == 1 or variance == pytest.approx(1.01, rel=1e-9)


def test_a_level_keeps_its_law():
    """Many updates at one level: a Gaussian's noised law is stationary, for steps as small as NCSN's."""
    t, std = 400, 0.5
    model = Denoiser(mixture_eps([0.3], [std], [1.0]), T1000.subsequence([t]), ScheduleConfig(clip_sample=False))
    abar = T1000.alphas_cumprod[t].item()
    generator = torch.Generator().manual_seed(1)

    def noise():
        return torch.randn(1, 1, 100, 200, dtype=torch.float64, generator=generator)

    mean, deviation = math.sqrt(abar) * 0.3, math.sqrt(abar * std**2 + 1 - abar)
    *_, before, _ = langevin(model, mean + deviation * noise(), noise, updates=200)
    assert before.x_t.mean().item() == pytest.approx(mean, abs=0.02)
    assert before.x_t.std().item() == pytest.approx(deviation, rel=0.02)


def test_it_updates_at_every_level_and_denoises_at_the_end():
    asked = []

    def network(x_t, t):
        asked.append(int(t))
        return torch.zeros_like(x_t)

    model = Denoiser(network, T1000.subsequence([0, 10, 500]), ScheduleConfig())
    steps = list(langevin(model, torch.randn(2, 1, 4, 4), lambda: torch.randn(2, 1, 4, 4), updates=2))
    assert [step.t for step in steps] == [500, 500, 10, 10, 0, 0, 0, -1]
    assert asked == [500, 500, 10, 10, 0, 0, 0]
    assert torch.equal(steps[-1].x_t, steps[-2].x_0)
