"""The schedule against the paper's equations, by other derivations, and against diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.errors import ModelError
from ddpm_cli.schedule import NoiseSchedule, make_betas

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


@pytest.mark.parametrize("t", [0, 1, 250, 999])
def test_q_sample_is_what_single_steps_add_up_to(t):
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


def test_equation_7_after_15_is_equation_11():
    x_t, eps = draw(4, 3, 4, 4), draw(4, 3, 4, 4, seed=1)
    t = torch.tensor([0, 1, 500, 999])
    beta, alpha, abar = (v[t].view(-1, 1, 1, 1) for v in (PAPER.betas, PAPER.alphas, PAPER.alphas_cumprod))
    equation_11 = (x_t - beta / (1 - abar).sqrt() * eps) / alpha.sqrt()
    mean = PAPER.posterior_mean(PAPER.predict_x_0(x_t, t, eps), x_t, t)
    torch.testing.assert_close(mean, equation_11, rtol=1e-9, atol=1e-9)


def test_equation_12_is_equation_8():
    """The weight on the eps error equals the distance of the means over 2 sigma^2."""
    for kind in ("fixed_small", "fixed_large"):
        schedule = NoiseSchedule(PAPER.betas, variance_type=kind)
        x_t, eps, other = draw(1, 1, 1, 1), draw(1, 1, 1, 1, seed=1), draw(1, 1, 1, 1, seed=2)
        for t in (1, 100, 999):
            means = [schedule.posterior_mean(schedule.predict_x_0(x_t, t, e), x_t, t) for e in (eps, other)]
            equation_8 = (means[0] - means[1]) ** 2 / (2 * schedule.log_variance[t].exp())
            torch.testing.assert_close(schedule.eps_weight[t] * (eps - other) ** 2, equation_8, rtol=1e-8, atol=0)


def test_predictions_invert_q_sample():
    x_0, eps = draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    t = torch.tensor([0, 500, 999])
    x_t = PAPER.q_sample(x_0, t, eps)
    torch.testing.assert_close(PAPER.predict_x_0(x_t, t, eps), x_0, rtol=0, atol=1e-10)
    torch.testing.assert_close(PAPER.predict_eps(x_t, t, x_0), eps, rtol=0, atol=1e-10)
    one_by_one = torch.cat([PAPER.q_sample(x_0[i : i + 1], int(t[i]), eps[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(x_t, one_by_one)


@pytest.mark.parametrize("kind", ["fixed_small", "fixed_large"])
def test_variances_are_those_of_diffusers(kind):
    theirs = DDPMScheduler(variance_type=kind)
    theirs.set_timesteps(1000)
    ours = NoiseSchedule(PAPER.betas, variance_type=kind).log_variance.exp()
    for t in (1, 2, 500, 999):
        assert ours[t].item() == pytest.approx(theirs._get_variance(t).item(), rel=1e-3)
    assert ours[0].item() == pytest.approx(PAPER.posterior_variance[1].item())  # the authors' first variance, for both


def test_subsequence_keeps_the_marginals():
    chosen = PAPER.spaced(50)
    assert (len(chosen), chosen[0], chosen[-1]) == (50, 0, 999)
    short = PAPER.subsequence(chosen)
    torch.testing.assert_close(short.alphas_cumprod, PAPER.alphas_cumprod[chosen], rtol=1e-12, atol=0)
    assert short.timesteps.tolist() == chosen
    whole = PAPER.subsequence(range(1000))
    torch.testing.assert_close(whole.betas, PAPER.betas, rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [1, 2, 7, 600, 999, 1000])
def test_spaced_gives_as_many_steps_as_asked_for(n):
    chosen = PAPER.spaced(n)
    assert len(set(chosen)) == n
    assert chosen[-1] == 999


@pytest.mark.parametrize("kind", ScheduleConfig.PREDICTION_TYPES)
def test_every_prediction_leads_back_to_x_0(kind):
    """What the network is trained to say, said without an error, gives x_0 again."""
    schedule = NoiseSchedule.from_config(ScheduleConfig(prediction_type=kind))
    x_0, eps = draw(4, 3, 2, 2), draw(4, 3, 2, 2, seed=1)
    t = torch.tensor([0, 10, 500, 999])
    x_t = schedule.q_sample(x_0, t, eps)
    torch.testing.assert_close(schedule.predict_x_0(x_t, t, schedule.target(x_0, t, eps)), x_0, rtol=0, atol=1e-10)


def test_v_is_that_of_diffusers():
    schedule, theirs = NoiseSchedule.from_config(ScheduleConfig(prediction_type="v_prediction")), DDPMScheduler()
    x_0, eps, t = draw(3, 1, 2, 2), draw(3, 1, 2, 2, seed=1), torch.tensor([0, 500, 999])
    expected = theirs.get_velocity(x_0, eps, t)
    torch.testing.assert_close(schedule.target(x_0, t, eps), expected, rtol=1e-4, atol=1e-5)


def test_a_learned_variance_is_that_of_diffusers():
    """learned_range: from log beta~_t at -1 to log beta_t at 1, and beyond; learned: the variance itself."""
    values, theirs = draw(2, 3, 2, 2), DDPMScheduler()
    ranged = NoiseSchedule(PAPER.betas, variance_type="learned_range")
    for t in (1, 500, 999):
        expected = theirs._get_variance(t, predicted_variance=values, variance_type="learned_range")
        torch.testing.assert_close(ranged.learned_log_variance(values, t), expected, rtol=1e-4, atol=1e-5)
        small, large = (ranged.learned_log_variance(torch.full((1, 1, 1, 1), v), t).item() for v in (-1.0, 1.0))
        assert small == pytest.approx(PAPER.posterior_variance[t].log().item(), rel=1e-6)
        assert large == pytest.approx(PAPER.betas[t].log().item(), rel=1e-6)
    plain = NoiseSchedule(PAPER.betas, variance_type="learned")
    variance = values.abs() + 0.1
    expected = theirs._get_variance(500, predicted_variance=variance, variance_type="learned")
    torch.testing.assert_close(plain.learned_log_variance(variance, 500).exp(), expected)
    assert plain.learned_log_variance(-variance, 500).isfinite().all()  # where theirs is not a number


def test_misuse_is_refused():
    for n in (0, 1001):
        with pytest.raises(ValueError, match="between 1 and 1000"):
            PAPER.spaced(n)
    for steps in ([], [3, 2], [1, 1], [-1], [1000]):
        with pytest.raises(ValueError, match="strictly ascending"):
            PAPER.subsequence(steps)
    with pytest.raises(ValueError, match="eps is"):
        PAPER.q_sample(draw(1, 1, 2, 2), 0, draw(1, 1, 2, 3))
    with pytest.raises(ModelError, match="beta_schedule='spiral'"):
        NoiseSchedule.from_config(ScheduleConfig(beta_schedule="spiral"))
    with pytest.raises(ModelError, match="between 0 and 1"):
        NoiseSchedule.from_config(ScheduleConfig(2, trained_betas=(0.1, 1.5)))
