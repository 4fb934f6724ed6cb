"""Predictions: x_0, eps and the variance are consistent, for every kind of network."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_cli.config import ScheduleConfig, jsd_betas
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.schedule import NoiseSchedule

PAPER = NoiseSchedule.from_config(ScheduleConfig())


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def constant(output, **config) -> Denoiser:
    """A denoiser whose network always returns this output."""
    return Denoiser.from_config(lambda x_t, t: output, ScheduleConfig(**config))


@pytest.mark.parametrize("t", [0, 500, 999, torch.tensor([0, 5, 999])])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "mean"])
def test_targets_give_back_the_image_and_the_noise(kind, t):
    """For every prediction type, the target converts back to the x_0 and eps that it was computed from."""
    x_0, eps = draw(3, 1, 4, 4).clamp(-1, 1), draw(3, 1, 4, 4, seed=1)
    denoiser = Denoiser.from_config(lambda x_t, t: target, ScheduleConfig(prediction_type=kind))
    target = denoiser.target(x_0, t, eps)
    seen = denoiser(denoiser.schedule.q_sample(x_0, t, eps), t)
    torch.testing.assert_close(seen.x_0, x_0, rtol=0, atol=1e-9)
    torch.testing.assert_close(seen.eps, eps, rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2", "jsd"])
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "mean"])
@pytest.mark.parametrize("steps", [range(200), [4, 50, 130, 199]])
def test_an_ideal_network_of_every_kind_gives_the_same_x_0(schedule, kind, steps):
    """Also where a sampler takes few steps: the network still predicts for the schedule of its training."""
    betas = {"trained_betas": jsd_betas(200)} if schedule == "jsd" else {"beta_schedule": schedule}
    config = ScheduleConfig(200, prediction_type=kind, **betas)
    x_0, eps = draw(4, 1, 4, 4).clamp(-1, 1), draw(4, 1, 4, 4, seed=1)
    whole = Denoiser.from_config(lambda x_t, t: whole.target(x_0, t.expand(4), eps), config)
    denoiser, last = whole.subsequence(steps), len(steps) - 1
    for t in (0, 1, last, torch.tensor([0, 1, 2, last])):
        x_t = denoiser.schedule.q_sample(x_0, t, eps)
        seen = denoiser(x_t, t)
        torch.testing.assert_close(seen.x_0, x_0, rtol=0, atol=1e-8)
        torch.testing.assert_close(seen.mean, denoiser.schedule.posterior_mean(x_0, x_t, t), rtol=0, atol=1e-8)


@pytest.mark.parametrize("t", [0, 1, 999, torch.tensor([0, 1, 999])])
def test_a_predicted_mean_is_the_mean(t):
    x_t, mean = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    seen = constant(mean, prediction_type="mean")(x_t, t, clip=False)
    torch.testing.assert_close(seen.mean, mean, rtol=0, atol=1e-12)
    # In Eq. 7 the posterior of the first step has no variance, so its mean is the image.
    torch.testing.assert_close(constant(mean, prediction_type="mean")(x_t, 0, clip=False).x_0, mean)


def test_a_learned_logarithm_is_relative_to_beta():
    x_t, values = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    denoiser = constant(torch.cat([x_t, values], 1), variance_type="learned_log")
    for t in (0, 1, 999):
        expected = values.exp() * PAPER.betas[t]
        torch.testing.assert_close(denoiser(x_t, t).log_variance.exp(), expected)
        torch.testing.assert_close(denoiser(x_t, torch.full((3,), t)).log_variance.exp(), expected)
    few = denoiser.subsequence([0, 10, 500])
    assert few.config.variance_type == "fixed_small"


def test_clipped_or_not():
    denoiser = Denoiser.from_config(lambda x_t, t: x_t, ScheduleConfig(prediction_type="sample"))
    x_t = torch.full((1, 1, 2, 2), 3.0)
    assert denoiser(x_t, 5).x_0.max() == 1
    assert denoiser(x_t, 5, clip=False).x_0.max() == 3


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_one_t_and_many_have_the_same_variance(kind):
    denoiser = Denoiser.from_config(lambda x_t, t: x_t, ScheduleConfig(variance_type=kind))
    schedule, x_t, ts = denoiser.schedule, draw(4, 1, 2, 2), torch.tensor([0, 1, 500, 999])
    many = denoiser(x_t, ts).log_variance.flatten().tolist()
    assert many == [denoiser(x_t, int(t)).log_variance for t in ts]
    # At t=0 it is the posterior's of t=1 in both cases, as in the authors' code.
    first = schedule.posterior_variance[1]
    rest = schedule.betas[ts[1:]] if kind == "fixed_large" else schedule.posterior_variance[ts[1:]]
    assert many == pytest.approx(torch.cat([first[None], rest]).log().tolist())


@pytest.mark.parametrize(("value", "table"), [(-1.0, "posterior_variance"), (1.0, "betas")])
def test_a_learned_range_lies_between_the_two_variances(value, table):
    denoiser = Denoiser.from_config(
        lambda x_t, t: torch.cat([x_t, torch.full_like(x_t, value)], 1), ScheduleConfig(variance_type="learned_range")
    )
    expected = math.log(float(getattr(denoiser.schedule, table)[500]))
    assert denoiser(draw(1, 3, 2, 2), 500).log_variance.mean().item() == pytest.approx(expected)


def test_the_network_gets_the_steps_it_was_trained_with():
    asked = []

    def network(x_t, t):
        asked.append(t.tolist())
        return x_t

    few = Denoiser.from_config(network, ScheduleConfig()).subsequence([0, 10, 500])
    few(torch.zeros(2, 1, 2, 2), 1)
    few(torch.zeros(2, 1, 2, 2), torch.tensor([2, 0]))
    assert asked == [[10], [500, 0]]


def test_few_steps_have_the_small_variance():
    large = Denoiser.from_config(lambda x_t, t: x_t, ScheduleConfig(variance_type="fixed_large"))
    assert large.subsequence([0, 10, 500]).config.variance_type == "fixed_small"
    assert large.subsequence(range(501)).config.variance_type == "fixed_large"  # no step is left out
    learned = Denoiser.from_config(lambda x_t, t: x_t, ScheduleConfig(variance_type="learned_range"))
    assert learned.subsequence([0, 10, 500]).config.variance_type == "learned_range"


def test_few_steps_do_not_have_the_learned_variance_of_a_single_step():
    network, x_t = lambda x_t, t: torch.cat([x_t, torch.full_like(x_t, 1e-6)], 1), torch.zeros(2, 1, 2, 2)
    learned = Denoiser.from_config(network, ScheduleConfig(variance_type="learned"))
    few = learned.subsequence([0, 10, 500])
    assert few(x_t, 2).log_variance == few.schedule.log_variance(2, x_t, large=False)
    assert torch.equal(few(x_t, 2).output, x_t)
    whole = learned.subsequence(range(501))
    torch.testing.assert_close(whole(x_t, 2).log_variance.exp(), torch.full_like(x_t, 1e-6))


def test_equation_7_after_15_is_equation_11():
    x_t, eps = draw(4, 3, 4, 4), draw(4, 3, 4, 4, seed=1)
    t = torch.tensor([0, 1, 500, 999])
    beta, alpha, abar = (v[t].view(-1, 1, 1, 1) for v in (PAPER.betas, PAPER.alphas, PAPER.alphas_cumprod))
    equation_11 = (x_t - beta / (1 - abar).sqrt() * eps) / alpha.sqrt()
    mean = constant(eps)(x_t, t, clip=False).mean
    torch.testing.assert_close(mean, equation_11, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("t", [1, 100, 999])
def test_equation_12_is_equation_8(kind, t):
    """The error of the mean (Eq. 8) is that of eps times beta^2 / (2 sigma^2 alpha (1 - abar)) (Eq. 12)."""
    x_t, eps, other = draw(1, 1, 1, 1), draw(1, 1, 1, 1, seed=1), draw(1, 1, 1, 1, seed=2)
    one, two = (constant(e, variance_type=kind)(x_t, t, clip=False) for e in (eps, other))
    sigma2 = math.exp(one.log_variance)
    weight = PAPER.betas[t] ** 2 / (2 * sigma2 * PAPER.alphas[t] * (1 - PAPER.alphas_cumprod[t]))
    torch.testing.assert_close(
        weight * (eps - other) ** 2, (one.mean - two.mean) ** 2 / (2 * sigma2), rtol=1e-8, atol=0
    )


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_variances_are_those_of_diffusers(kind):
    theirs = DDPMScheduler(variance_type=kind)
    theirs.set_timesteps(1000)
    x_t = draw(1, 1, 2, 2)
    for t in (1, 2, 500, 999):
        ours = math.exp(constant(x_t, variance_type=kind)(x_t, t).log_variance)
        assert ours == pytest.approx(theirs._get_variance(t).item(), rel=1e-3)


def test_v_is_that_of_diffusers():
    x_0, eps, t = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1), torch.tensor([0, 500, 999])
    expected = DDPMScheduler().get_velocity(x_0, eps, t)
    found = constant(x_0, prediction_type="v_prediction").target(x_0, t, eps)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_learned_variance_is_that_of_diffusers():
    """learned_range: from log beta~_t at -1 to log beta_t at 1, and beyond; learned: the variance itself."""
    x_t, values, theirs = draw(2, 3, 2, 2), draw(2, 3, 2, 2, seed=1), DDPMScheduler()

    def ours(values, t, kind):
        return constant(torch.cat([x_t, values], 1), variance_type=kind)(x_t, t).log_variance

    for t in (1, 500, 999):
        expected = theirs._get_variance(t, predicted_variance=values, variance_type="learned_range")
        torch.testing.assert_close(ours(values, t, "learned_range"), expected, rtol=1e-4, atol=1e-5)
    variance = values.abs() + 0.1
    expected = theirs._get_variance(500, predicted_variance=variance, variance_type="learned")
    torch.testing.assert_close(ours(variance, 500, "learned").exp(), expected)
    assert ours(-variance, 500, "learned").isfinite().all()  # theirs is NaN there
