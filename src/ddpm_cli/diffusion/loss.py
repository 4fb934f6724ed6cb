"""The training loss: L_simple, one weighted by the SNR, L_vlb or L_hybrid; and the terms of the variational bound."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["bound_term", "discretized_log_likelihood", "gaussian_kl", "prior", "training_loss"]

LAMBDA = 0.001  # the weight of L_vlb in L_hybrid (Nichol and Dhariwal 2021, Section 3.1)
GAMMA = 5.0  # the largest weight of min-SNR (Hang et al. 2023)


def training_loss(denoiser: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor, loss: str = "simple") -> Tensor:
    """The loss of each image, by its name in `TrainConfig`: (B,) float32.

    simple   L_simple: (eps - eps_theta(x_t, t))^2, averaged over the values (Eq. 14; line 5 of Algorithm 1). For
             another prediction, the same error of x_0, v or mu~_t. On average 1 for a network that predicts eps = 0,
             near 0.03 for a good one on photographs. It does not train a learned variance.
    min-snr  min(SNR, 5) (x_0 - x_theta(x_t, t))^2, where SNR = abar_t / (1 - abar_t), for every prediction (Hang et al.
             2023). The steps of least noise count less than in L_simple of eps, and those of most noise less than in
             that of x_0 or v. It does not train a learned variance either.
    debiased sqrt(SNR) (x_0 - x_theta(x_t, t))^2, which is 1 / sqrt(SNR) times L_simple of eps (Yu et al. 2023), for
             every prediction. As min-snr, but with more of the steps of least and of most noise.
    vlb      L_vlb: the bound of Eq. 5 in bits per dimension, estimated by T times its term at t. Without L_T.
    hybrid   L_simple + 0.001 L_vlb, where L_vlb trains only the variance (Nichol and Dhariwal 2021, Eq. 16).

    x_0, eps: (B, C, H, W), x_0 in [-1, 1]; t: (B,) int64 in [0, T), uniform.
    """
    schedule = denoiser.schedule
    x_t = schedule.q_sample(x_0, t, eps)
    prediction = denoiser(x_t, t, clip=False)

    def vlb(mean: Tensor) -> Tensor:
        term = bound_term(schedule, x_0, x_t, t, mean, prediction.log_variance)
        return schedule.T * term / math.log(2)

    if loss == "vlb":
        return vlb(prediction.mean)
    if loss in ("min-snr", "debiased"):
        signal, noise = schedule.marginal(t, x_0)
        root = signal / noise  # of the SNR
        weight = root if loss == "debiased" else (root**2).clamp(max=GAMMA)  # type: ignore[union-attr]  # a tensor
        return (weight * (x_0 - prediction.x_0) ** 2).flatten(1).mean(1)
    simple = F.mse_loss(prediction.output, denoiser.target(x_0, t, eps), reduction="none").flatten(1).mean(1)
    return simple + LAMBDA * vlb(prediction.mean.detach()) if loss == "hybrid" else simple


def bound_term(
    schedule: NoiseSchedule,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    mean: Tensor,
    log_variance: Tensor | float,
) -> Tensor:
    """One term of the bound (Eq. 5): L_{t-1} for t > 0 in code, L_0 for t = 0. (B,), in nats per dimension.

    For a fixed variance, L_{t-1} is Eq. 8, and for a network that predicts eps Eq. 12, up to a constant.
    x_0, x_t: (B, C, H, W). t: (B,) int64, or one int for all. mean, log_variance: of p(x_{t-1} | x_t), like x_0 or to
    be expanded to it. The result has the dtype of x_0: for values of the bound use float64.
    """

    def tensor(value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(x_0)
        return torch.full((), value, dtype=x_0.dtype, device=x_0.device)  # torch.as_tensor would wait for CUDA

    log_variance = tensor(log_variance)

    def transition() -> Tensor:  # KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t))
        true_log_variance = tensor(schedule.log_variance(t, x_0, large=False))
        true_mean = schedule.posterior_mean(x_0, x_t, t)
        return gaussian_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)

    def decoder() -> Tensor:  # -log p(x_0 | x_1)
        return -discretized_log_likelihood(x_0, mean, 0.5 * log_variance).flatten(1).mean(1)

    if isinstance(t, int):
        return transition() if t > 0 else decoder()
    return torch.where(t == 0, decoder(), transition())


def prior(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of Eq. 5, in nats per dimension. x_0: (B, C, H, W). Returns (B,)."""
    abar = schedule.alphas_cumprod[-1].to(x_0)
    zero = torch.zeros_like(abar)
    return gaussian_kl(abar.sqrt() * x_0, (1 - abar).log(), zero, zero).flatten(1).mean(1)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)), elementwise, in nats."""
    difference = log_variance - other_log_variance
    return 0.5 * (difference.exp() - 1 - difference + (mean - other_mean) ** 2 * (-other_log_variance).exp())


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log p(x_0 | x_1) of 8-bit images: the log of the Gaussian's mass on each value's interval (Eq. 13), in nats.

    x_0: the 256 values k / 127.5 - 1. Intervals are 2/255 wide; the outermost extend to infinity. Elementwise.
    The mass is never rounded up to a smallest value, as in the authors' code (1e-12), so the bound stays a bound for
    any mean. Gradients are finite.
    """
    # A narrower Gaussian lies within one interval anyway. The limit prevents overflow in entries that are not used.
    centred, inverse = x_0 - mean, (-log_sigma.clamp(min=-15)).exp()
    above, below = (inverse * (centred + half) for half in (1 / 255, -1 / 255))
    # Mirror the interval to below the mean: there the logarithms of both masses are precise.
    far, near = (_log_cdf(inverse * (half - centred.abs())) for half in (-1 / 255, 1 / 255))
    # log(e^near - e^far). Where rounding makes both equal, the smallest difference keeps the logarithm finite.
    apart = (near - far).clamp(min=torch.finfo(near.dtype).tiny)
    inside = near + (-torch.expm1(-apart)).log()
    lowest, highest = _log_cdf(above), _log_cdf(-below)
    return torch.where(x_0 < -0.999, lowest, torch.where(x_0 > 0.999, highest, inside))


def _log_cdf(x: Tensor) -> Tensor:
    """The logarithm of the standard normal distribution function, elementwise.

    torch.special.log_ndtr does not exist on MPS. Its gradient subtracts two numbers near x^2 / 2, so in float32 it is
    wrong below x = -1000.
    """
    u = x / 2**0.5
    below = (torch.special.erfcx(-u.clamp(max=0)) / 2).log() - u.clamp(max=0) ** 2
    return torch.where(x < 0, below, torch.log1p(-torch.special.erfc(u.clamp(min=0)) / 2))
