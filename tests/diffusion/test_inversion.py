"""DDIM inversion: against the closed form for Gaussian data, and there and back with a real network."""

import math

import pytest
import torch

from ddpm_cli import DDPM
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.inversion import invert
from ddpm_cli.diffusion.samplers import spaced
from ddpm_cli.diffusion.samplers.ddim import ddim
from ddpm_cli.diffusion.schedule import NoiseSchedule

T1000 = NoiseSchedule.from_config(ScheduleConfig())


def draw(seed: int, n: int = 2, size: int = 8) -> torch.Tensor:
    return torch.randn(n, 1, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def denoiser(network, steps: int, spacing: str, **config) -> Denoiser:
    schedule = T1000.subsequence(spaced(T1000, steps, None, spacing))
    return Denoiser(network, schedule, ScheduleConfig(prediction_type="sample", **config))


def gaussian(mean: float, std: float | torch.Tensor):
    """The ideal network for data that is N(mean, std^2): E[x_0 | x_t]."""

    def x_0(x_t, t):
        abar = T1000.alphas_cumprod[int(t)].item()
        return mean + abar**0.5 * std**2 / (abar * std**2 + 1 - abar) * (x_t - abar**0.5 * mean)

    return x_0


def exact(x: torch.Tensor, steps: list[int], mean: float, std: float) -> list[torch.Tensor]:
    """The states from which DDIM comes to x: each of its steps multiplies the distance from the mean by a number."""
    states, alpha_s, sigma_s = [], 1.0, 0.0
    for t in steps:
        abar = T1000.alphas_cumprod[t].item()
        alpha, sigma = math.sqrt(abar), math.sqrt(1 - abar)
        gain = alpha * std**2 / (abar * std**2 + 1 - abar)
        slope = sigma_s / sigma + (alpha_s - alpha * sigma_s / sigma) * gain
        x = alpha * mean + (x - alpha_s * mean) / slope
        states.append(x)
        alpha_s, sigma_s = alpha, sigma
    return states


@pytest.mark.parametrize("std", [0.02, 0.5, 30.0])
@pytest.mark.parametrize(("steps", "spacing"), [(5, "uniform"), (10, "quadratic"), (100, "uniform")])
def test_gaussian_data_in_closed_form(steps, spacing, std):
    """Also where five steps are so long that an iteration without a factor would diverge."""
    ideal = denoiser(gaussian(0.3, std), steps, spacing, clip_sample=False)
    x = 0.3 + std * draw(0)
    found = list(invert(ideal, x))
    expected = exact(x, ideal.schedule.timesteps.tolist(), 0.3, std)
    assert [state.t for state in found] == [-1, *ideal.schedule.timesteps.tolist()]
    assert torch.equal(found[0].x_t, x)
    for state, wanted in zip(found[1:], expected, strict=True):
        torch.testing.assert_close(state.x_t, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_pixels_of_all_deviations_return(steps):
    """An image has pixels that never change and pixels that change much, and each converges at its own rate."""
    std = torch.logspace(-1.5, 0.5, 64, dtype=torch.float64).view(1, 1, 8, 8)
    ideal = denoiser(gaussian(0.0, std), steps, "quadratic", clip_sample=False)
    x = std * draw(1)
    *_, plain = invert(ideal, x, iterations=0)
    *_, top = invert(ideal, x, iterations=200)
    *_, there = ddim(ideal, top.x_t, draw, eta=0)
    *_, drifted = ddim(ideal, plain.x_t, draw, eta=0)
    torch.testing.assert_close(there.x_t, x, rtol=0, atol=1e-10)
    assert (drifted.x_t - x).abs().max() > 0.003


def test_without_iterations_it_is_plain_inversion():
    """x_t = alpha_t x_0 + sigma_t eps, with both predicted at the state before (Song et al. 2021, Section 5.4)."""
    ideal = denoiser(gaussian(0.1, 0.4), 10, "quadratic", clip_sample=False)
    x = 0.1 + 0.4 * draw(2)
    states = [state.x_t for state in invert(ideal, x, iterations=0)]
    for i, found in enumerate(states[1:]):
        before = ideal(states[i], max(i - 1, 0))
        x_0 = before.x_0 if i else x  # the image itself is known
        abar = ideal.schedule.alphas_cumprod[i].item()
        torch.testing.assert_close(found, abar**0.5 * x_0 + (1 - abar) ** 0.5 * before.eps, rtol=1e-9, atol=1e-9)


def test_a_network_brings_the_image_back(small_model):
    """Black and white pixels are at the limit where x_0 is clipped, and return too."""
    model = DDPM.from_pretrained(small_model, precision="fp32")
    x_0 = torch.cat([draw(3).float().clamp(-1, 1), torch.ones(1, 1, 8, 8), -torch.ones(1, 1, 8, 8)])
    plan = model.sampling("ddim", 10)
    errors = []
    for iterations in (0, 30):
        *_, top = model.invert(x_0, plan, iterations)
        *_, back = model.sample_loop(top.x_t, plan)
        errors.append(127.5 * (back.x_t - x_0).abs().amax((1, 2, 3)))
    assert errors[1].max() < 0.01
    assert errors[0].max() > 1


def test_an_image_does_not_depend_on_its_batch(small_model):
    model = DDPM.from_pretrained(small_model, precision="fp32")
    x_0 = draw(4, 3).float().clamp(-1, 1)
    *_, together = model.invert(x_0)
    for i in range(3):
        *_, alone = model.invert(x_0[i : i + 1])
        assert torch.equal(alone.x_t[0], together.x_t[i])


def test_an_image_that_fails_does_not_stop_the_others():
    def partly(x_t, t):
        x_0 = gaussian(0.0, 0.5)(x_t, t)
        return torch.where(x_t.mean((1, 2, 3), keepdim=True) > 0.5, torch.inf, x_0)

    x_0 = torch.cat([draw(4, 1).clamp(-1, 1), torch.full((1, 1, 8, 8), 0.9, dtype=torch.float64)])
    *_, both = invert(denoiser(partly, 5, "uniform", clip_sample=False), x_0)
    *_, alone = invert(denoiser(partly, 5, "uniform", clip_sample=False), x_0[:1])
    assert not both.x_t[1].isfinite().any()
    assert torch.allclose(both.x_t[0], alone.x_t[0], rtol=0, atol=1e-12)


def test_it_ends_where_nothing_helps():
    """With a network that is rounded to three bits, the steps have no exact solution."""
    asked = []

    def coarse(x_t, t):
        asked.append(int(t))
        return torch.round(4 * gaussian(0.0, 0.5)(x_t, t)) / 4

    *_, top = invert(denoiser(coarse, 5, "quadratic"), draw(5).clamp(-1, 1), iterations=1000)
    assert len(asked) < 500
    assert top.x_t.isfinite().all()


def test_a_broken_network_is_no_endless_loop():
    *_, top = invert(denoiser(lambda x_t, t: x_t * torch.nan, 5, "uniform"), draw(6))
    assert top.x_t.isnan().all()


def test_pixels_are_not_inverted(small_model):
    model = DDPM.from_pretrained(str(small_model))
    with pytest.raises(ValueError, match=r"values in \[-1, 1\], not torch.uint8 pixels"):
        model.invert(model.sample(2))
    with pytest.raises(ValueError, match="n must be at least 1, not 0"):
        model.sample(0)


def test_only_ddim_without_noise_is_inverted(small_model):
    model = DDPM.from_pretrained(small_model)
    for plan in (model.sampling("dpm++"), model.sampling("ddim", eta=0.5)):
        with pytest.raises(ValueError, match="only the sampler ddim with eta=0"):
            model.invert(torch.zeros(1, 1, 8, 8), plan)
