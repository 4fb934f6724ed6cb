"""The loss against independent derivations: torch's distributions, sums of probabilities, and zero gradients."""

import math

import mpmath
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import bound_term, discretized_log_likelihood, gaussian_kl, training_loss
from ddpm_cli.diffusion.schedule import NoiseSchedule

PAPER = NoiseSchedule.from_config(ScheduleConfig())
LEARNED = ScheduleConfig(variance_type="learned_range")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pixels(*shape):
    values = torch.randint(256, shape, generator=torch.Generator().manual_seed(9))
    return values.double() / 127.5 - 1


def test_kl_of_gaussians():
    a, b, c, d = (draw(50, seed=seed) for seed in range(4))
    expected = kl_divergence(Normal(a, (b / 2).exp()), Normal(c, (d / 2).exp()))
    torch.testing.assert_close(gaussian_kl(a, b, c, d), expected)


VALUES = torch.arange(256).double() / 127.5 - 1


def likelihood(mean, sigma, values=VALUES):
    mean, sigma = (torch.full_like(values, value) for value in (mean, sigma))
    return discretized_log_likelihood(values, mean, sigma.log())


@pytest.mark.parametrize("sigma", [1e-4, 0.001, 0.05, 0.5, 3.0, 10.0])
@pytest.mark.parametrize("mean", [-30.0, -1.2, 0.013, 1.0, 1.7])
def test_the_256_values_have_mass_one(mean, sigma):
    log = likelihood(mean, sigma)
    assert log.exp().sum().item() == pytest.approx(1, abs=1e-12)
    inner = Normal(mean, sigma)
    expected = inner.cdf(VALUES[1:-1] + 1 / 255) - inner.cdf(VALUES[1:-1] - 1 / 255)
    torch.testing.assert_close(log[1:-1].exp(), expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("sigma", [1e-3, 0.007, 0.05, 2.0])
@pytest.mark.parametrize("far", [0.5, 7, 50, 1000])
@pytest.mark.parametrize("k", [0, 1, 128, 254, 255])
def test_the_likelihood_is_precise_in_the_tails(sigma, far, k):
    """Against 60 digits, with the mean up to a thousand sigma away: a smallest mass would end at 1e-12."""
    for mean in (float(VALUES[k]) - far * sigma, float(VALUES[k]) + far * sigma):
        with mpmath.workdps(60):
            at, half = mpmath.mpf(float(VALUES[k])) - mpmath.mpf(mean), mpmath.mpf(1) / 255
            # Both ends are turned to the side where the normal distribution is small, or the digits do not suffice.
            low = -mpmath.inf if k == 0 else (at - half) / sigma
            high = mpmath.inf if k == 255 else (at + half) / sigma
            low, high = (-high, -low) if low > 0 else (low, high)
            expected = float(mpmath.log(mpmath.ncdf(high) - mpmath.ncdf(low)))
        assert likelihood(mean, sigma)[k].item() == pytest.approx(expected, rel=1e-10, abs=1e-13)


@pytest.mark.parametrize("sigma", [1e-9, 1e-3, 0.01, 0.5, 20.0])
def test_the_likelihood_has_finite_gradients_in_float32(sigma):
    """Also where it is not used: torch.where would make NaN of an infinite gradient of the other side."""
    mean = torch.linspace(-30, 30, 241)[:, None].expand(-1, 256).clone().requires_grad_()
    log_sigma = torch.full_like(mean, math.log(sigma)).requires_grad_()
    log = discretized_log_likelihood(VALUES.float().expand(241, -1), mean, log_sigma)
    log.sum().backward()
    assert all(value.isfinite().all() for value in (log, mean.grad, log_sigma.grad))
    assert (log <= 0).all()
    # In the tails the mean is pulled to the value by its distance from the interval's edge, over the variance.
    wide, gap = max(sigma, math.exp(-15)), mean.detach()[:, 128] - VALUES.float()[128] - 1 / 255
    tails = gap > 20 * wide
    torch.testing.assert_close(mean.grad[tails, 128], -gap[tails] / wide**2, rtol=0.02, atol=0)


@pytest.mark.parametrize("x_0", [-1.0, 0.5 / 127.5, 1.0])
@pytest.mark.parametrize("z", [20, 200, 5000, 5e5])
def test_the_decoder_has_a_gradient_however_far_off_the_mean_is(x_0, z):
    """Far below the density's peak, log p(x) is that of the near edge: -z^2 / 2, with slope z / sigma."""
    sigma = 1e-3
    edge = 1 / 255 if x_0 < 1 else -1 / 255
    mean = torch.tensor(x_0 + edge + (z if x_0 < 1 else -z) * sigma, requires_grad=True)
    log = discretized_log_likelihood(torch.tensor(x_0), mean, torch.tensor(math.log(sigma)))
    log.backward()
    expected = -(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi))  # Mills' ratio
    assert log.item() == pytest.approx(expected, rel=2e-3)
    assert abs(mean.grad.item()) == pytest.approx(z / sigma, rel=0.05)


@pytest.mark.parametrize("log_sigma", [-40.0, -15.0, 5.0, 80.0])
@pytest.mark.parametrize("mean", [-50.0, 0.0, 3.0])
def test_the_decoder_is_finite_for_every_variance(mean, log_sigma):
    x_0 = torch.tensor([-1.0, 0.5 / 127.5, 1.0])
    inputs = [torch.full((3,), value, requires_grad=True) for value in (mean, log_sigma)]
    log = discretized_log_likelihood(x_0, *inputs)
    log.sum().backward()
    assert all(value.isfinite().all() for value in (log, *(tensor.grad for tensor in inputs)))


def test_the_bound_is_zero_where_the_model_is_the_posterior():
    x_0, eps, t = pixels(3, 1, 4, 4), draw(3, 1, 4, 4), torch.tensor([1, 500, 999])
    x_t = PAPER.q_sample(x_0, t, eps)
    log_variance = PAPER.posterior_log_variance[t].view(-1, 1, 1, 1).expand_as(x_0)
    exact = bound_term(PAPER, x_0, x_t, t, PAPER.posterior_mean(x_0, x_t, t), log_variance)
    torch.testing.assert_close(exact, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_term_at_one_t_is_that_of_a_tensor_of_them():
    x_0, eps, wrong = pixels(3, 1, 4, 4), draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    for variance_type in ("fixed_small", "fixed_large"):
        denoiser = Denoiser.from_config(lambda x_t, t: wrong, ScheduleConfig(variance_type=variance_type))
        for t in (0, 1, 999):
            x_t, times = PAPER.q_sample(x_0, t, eps), torch.full((3,), t)
            one, many = denoiser(x_t, t), denoiser(x_t, times)
            expected = bound_term(PAPER, x_0, x_t, times, many.mean, many.log_variance)
            torch.testing.assert_close(bound_term(PAPER, x_0, x_t, t, one.mean, one.log_variance), expected)


def test_the_bound_of_a_wrong_eps_is_equation_12():
    """L_{t-1} = beta^2 / (2 sigma^2 alpha (1 - abar)) ||eps - eps_theta||^2, for the variance of the posterior."""
    x_0, eps, wrong = pixels(3, 1, 4, 4), draw(3, 1, 4, 4), draw(3, 1, 4, 4, seed=1)
    t = torch.tensor([1, 500, 999])
    x_t = PAPER.q_sample(x_0, t, eps)
    mean = Denoiser.from_config(lambda x_t, t: wrong, ScheduleConfig())(x_t, t, clip=False).mean
    log_variance = PAPER.posterior_log_variance[t].view(-1, 1, 1, 1).expand_as(x_0)
    betas, alphas, abar = PAPER.betas[t], PAPER.alphas[t], PAPER.alphas_cumprod[t]
    weight = betas**2 / (2 * PAPER.posterior_variance[t] * alphas * (1 - abar))
    expected = weight * ((eps - wrong) ** 2).flatten(1).mean(1)
    torch.testing.assert_close(bound_term(PAPER, x_0, x_t, t, mean, log_variance), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "mean"])
def test_the_loss_is_the_error_of_what_is_predicted(kind):
    x_0, eps, t = pixels(4, 1, 4, 4), draw(4, 1, 4, 4), torch.tensor([0, 5, 500, 999])
    off = 0.0
    denoiser = Denoiser.from_config(lambda x, t: target + off, ScheduleConfig(prediction_type=kind))
    target = denoiser.target(x_0, t, eps)
    assert training_loss(denoiser, x_0, t, eps).mean().item() == pytest.approx(0, abs=1e-12)
    off = 0.5
    assert training_loss(denoiser, x_0, t, eps).mean().item() == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "kind", "weight"),  # of the error of what is predicted, by the SNR
    [
        ("min-snr", "epsilon", lambda snr: snr.clamp(max=5) / snr),  # Hang et al. 2023
        ("min-snr", "sample", lambda snr: snr.clamp(max=5)),
        ("min-snr", "v_prediction", lambda snr: snr.clamp(max=5) / (snr + 1)),
        ("debiased", "epsilon", lambda snr: 1 / snr.sqrt()),  # Yu et al. 2023
        ("debiased", "sample", lambda snr: snr.sqrt()),
        ("debiased", "v_prediction", lambda snr: snr.sqrt() / (snr + 1)),
    ],
)
def test_losses_weighted_by_the_snr_weight_every_prediction_alike(loss, kind, weight):
    """The same loss, whether it is written as an error of x_0 or of what the network predicts."""
    x_0, eps, t = pixels(4, 1, 4, 4), draw(4, 1, 4, 4), torch.tensor([0, 100, 300, 999])
    output = draw(4, 1, 4, 4, seed=1)
    denoiser = Denoiser.from_config(lambda x, t: output, ScheduleConfig(prediction_type=kind))
    abar = denoiser.schedule.alphas_cumprod[t]
    error = (output - denoiser.target(x_0, t, eps)).square().flatten(1).mean(1)
    expected = weight(abar / (1 - abar)) * error
    torch.testing.assert_close(training_loss(denoiser, x_0, t, eps, loss), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_log", "learned_range"])
def test_the_vlb_is_the_sum_of_its_terms(variance):
    """Over all t, the mean of T times a term is the sum of the terms: KL divergences, and the decoder at t=0."""
    T = 5
    config = ScheduleConfig(T, beta_end=0.5, variance_type=variance)
    x_0, eps, output = pixels(1, 1, 4, 4).repeat(T, 1, 1, 1), draw(T, 1, 4, 4), draw(T, 2, 4, 4, seed=1)
    denoiser = Denoiser.from_config(lambda x, t: output if config.learns_variance else output[:, :1], config)
    t, schedule = torch.arange(T), denoiser.schedule
    x_t = schedule.q_sample(x_0, t, eps)
    seen = denoiser(x_t, t, clip=False)
    bits = 0.0
    for i in range(T):
        one = Normal(seen.mean[i], (seen.log_variance.expand_as(x_0)[i] / 2).exp())
        if i:
            mean = schedule.posterior_mean(x_0[i], x_t[i], i)
            nats = kl_divergence(Normal(mean, schedule.posterior_variance[i].sqrt()), one)
        else:
            nats = -discretized_log_likelihood(x_0[0], one.loc, one.scale.log())
        bits += nats.mean().item() / math.log(2)
    assert training_loss(denoiser, x_0, t, eps, "vlb").mean().item() == pytest.approx(bits, rel=1e-9)


def test_the_bound_trains_only_the_variance():
    """L_hybrid: the prediction has the gradient of L_simple, and the variance has that of the bound."""
    x_0, eps, t = pixels(4, 1, 4, 4), draw(4, 1, 4, 4), torch.tensor([0, 5, 500, 999])
    output = draw(4, 2, 4, 4, seed=2).requires_grad_()
    training_loss(Denoiser.from_config(lambda x, t: output, LEARNED), x_0, t, eps, "hybrid").mean().backward()
    hybrid = output.grad.clone()
    output.grad = None
    torch.nn.functional.mse_loss(output[:, :1], eps).backward()
    torch.testing.assert_close(hybrid[:, :1], output.grad[:, :1], rtol=1e-5, atol=1e-9)
    assert (hybrid[:, 1:] != 0).any(dim=(1, 2, 3)).all()  # every t; t=0 uses Eq. 13


def test_learning_the_variance_finds_the_right_one():
    """For a network that sees x_0 the best variance is the posterior's, -1 in learned_range."""
    x_0, eps, t = pixels(8, 1, 4, 4), draw(8, 1, 4, 4), torch.full((8,), 3)
    values = torch.zeros(8, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    denoiser = Denoiser.from_config(lambda x, t: torch.cat([eps, values], 1), LEARNED)
    optimizer = torch.optim.Adam([values], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        training_loss(denoiser, x_0, t, eps, "hybrid").mean().backward()
        optimizer.step()
    assert values.mean().item() == pytest.approx(-1, abs=0.05)
