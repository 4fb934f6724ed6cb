"""The schedule against other derivations of the paper's equations, and against diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_cli.config import ScheduleConfig, jsd_betas
from ddpm_cli.diffusion.samplers import spaced
from ddpm_cli.diffusion.schedule import NoiseSchedule, make_betas
from ddpm_cli.errors import ModelError

PAPER = NoiseSchedule.from_config(ScheduleConfig())


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_papers_betas():
    assert PAPER.T == 1000
    assert PAPER.betas.dtype == torch.float64
    assert PAPER.betas[0].item() == pytest.approx(1e-4, rel=1e-12)
    assert PAPER.betas[-1].item() == pytest.approx(0.02, rel=1e-12)
    assert 3.9e-5 < PAPER.alphas_cumprod[-1] < 4.1e-5  # so that L_T is near 1e-5 bits per dimension (Section 4)


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
def test_betas_are_those_of_diffusers(kind):
    theirs = DDPMScheduler(beta_schedule=kind).betas
    ours = make_betas(ScheduleConfig(beta_schedule=kind))
    torch.testing.assert_close(ours.float(), theirs, rtol=3e-4, atol=1e-7)  # theirs are float32


@pytest.mark.parametrize("T", [1, 2, 10, 1000])
def test_the_betas_of_sohl_dickstein_remove_the_signal_evenly(T):
    """beta_t = 1 / (T - t + 1) leaves (T - t) / T of the signal's variance; the last one is 0.999 and not 1."""
    config = ScheduleConfig(T, trained_betas=jsd_betas(T))
    left = (T - 1 - torch.arange(T, dtype=torch.float64)) / T
    left[-1] = 0.001 / T
    torch.testing.assert_close(NoiseSchedule.from_config(config).alphas_cumprod, left, rtol=1e-10, atol=0)
    assert config.schedule_name == "jsd"


@pytest.mark.parametrize("t", [0, 1, 250, 999])
def test_q_sample_is_the_composition_of_single_steps(t):
    """Eq. 4 against Eq. 2, by the algebra of Gaussians: means multiply, variances accumulate."""
    mean, variance = 1.0, 0.0
    for beta in PAPER.betas[: t + 1].tolist():
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    assert PAPER.q_sample(one, t, zero).item() == pytest.approx(mean, rel=1e-12)
    assert PAPER.q_sample(zero, t, one).item() ** 2 == pytest.approx(variance, rel=1e-9)


def test_q_sample_has_the_moments_of_equation_4():
    x_0 = torch.full((1, 1, 500, 400), 0.6, dtype=torch.float64)
    for t in (10, 300, 900):
        x_t = PAPER.q_sample(x_0, torch.tensor([t]), draw(*x_0.shape))
        abar = PAPER.alphas_cumprod[t]
        assert x_t.mean().item() == pytest.approx((abar**0.5 * 0.6).item(), abs=0.01)
        assert x_t.var().item() == pytest.approx((1 - abar).item(), rel=0.02)


def test_posterior_is_bayes_rule():
    """Eq. 6-7 from the product of q(x_t | x_{t-1}) and q(x_{t-1} | x_0), by precision-weighted means."""
    x_0, x_t = draw(5, 1, 2, 2), draw(5, 1, 2, 2, seed=1)
    t = torch.tensor([1, 2, 10, 500, 999])
    beta, abar_prev = PAPER.betas[t].view(-1, 1, 1, 1), PAPER.alphas_cumprod_prev[t].view(-1, 1, 1, 1)
    precision = (1 - beta) / beta + 1 / (1 - abar_prev)
    mean = ((1 - beta).sqrt() / beta * x_t + abar_prev.sqrt() / (1 - abar_prev) * x_0) / precision
    torch.testing.assert_close(PAPER.posterior_mean(x_0, x_t, t), mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(PAPER.posterior_variance[t], 1 / precision.flatten(), rtol=1e-9, atol=0)


def test_one_t_for_all_equals_one_t_each():
    x_0, eps = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    t = torch.tensor([0, 500, 999])
    x_t = PAPER.q_sample(x_0, t, eps)
    one_by_one = torch.cat([PAPER.q_sample(x_0[i : i + 1], int(t[i]), eps[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(x_t, one_by_one)


def test_subsequence_keeps_the_marginals():
    chosen = spaced(PAPER, 50)
    assert (len(chosen), chosen[0], chosen[-1]) == (50, 19, 999)
    short = PAPER.subsequence(chosen)
    torch.testing.assert_close(short.alphas_cumprod, PAPER.alphas_cumprod[chosen], rtol=1e-12, atol=0)
    assert short.timesteps.tolist() == chosen
    whole = PAPER.subsequence(range(1000))
    torch.testing.assert_close(whole.betas, PAPER.betas, rtol=1e-9, atol=0)


def test_one_step_may_cover_a_schedule_that_leaves_almost_nothing():
    """alphas_cumprod is 3e-18 after 4000 steps of linear betas, and 1 - 3e-18 rounds to 1."""
    long = NoiseSchedule.from_config(ScheduleConfig(num_train_timesteps=4000))
    assert long.subsequence([3999]).betas.item() == pytest.approx(1)
    torch.testing.assert_close(long.subsequence(range(4000)).betas, long.betas, rtol=1e-9, atol=0)
    with pytest.raises(ModelError, match="becomes 0"):
        NoiseSchedule.from_config(ScheduleConfig(num_train_timesteps=1_000_000))


def test_misuse_is_refused():
    for steps in ([], [3, 2], [1, 1], [-1], [1000]):
        with pytest.raises(ValueError, match="strictly ascending"):
            PAPER.subsequence(steps)
    with pytest.raises(ValueError, match="eps is"):
        PAPER.q_sample(draw(1, 1, 2, 2), 0, draw(1, 1, 2, 3))
    with pytest.raises(ModelError, match="beta_schedule='spiral'"):
        NoiseSchedule.from_config(ScheduleConfig(beta_schedule="spiral"))
    with pytest.raises(ModelError, match="between 0 and 1"):
        NoiseSchedule.from_config(ScheduleConfig(2, trained_betas=(0.1, 1.5)))
