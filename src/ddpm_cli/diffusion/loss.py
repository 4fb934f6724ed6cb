"""The training loss, L_simple, L_vlb or L_hybrid, and the terms of the variational bound."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["bound_term", "discretized_log_likelihood", "gaussian_kl", "training_loss"]

LAMBDA = 0.001  # the weight of L_vlb in L_hybrid (Nichol and Dhariwal 2021, Section 3.1)


def training_loss(denoiser: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor, loss: str = "simple") -> Tensor:
    """The loss of each image, by its name in `TrainConfig`: (B,) float32.

    simple   L_simple: (eps - eps_theta(x_t, t))^2, averaged over the values (Eq. 14; line 5 of Algorithm 1). For
             another prediction, the same error of x_0, v or mu~_t. On average 1 for a network that predicts eps = 0,
             near 0.03 for a good one on photographs. It does not train a learned variance.
    vlb      L_vlb: the bound of Eq. 5 in bits per dimension, estimated by T times its term at t. Without L_T.
    hybrid   L_simple + 0.001 L_vlb, where L_vlb trains only the variance (Nichol and Dhariwal 2021, Eq. 16).

    x_0, eps: (B, C, H, W), x_0 in [-1, 1]; t: (B,) int64 in [0, T), uniform.
    """
    schedule = denoiser.schedule
    x_t = schedule.q_sample(x_0, t, eps)
    prediction = denoiser(x_t, t, clip=False)

    def vlb(mean: Tensor) -> Tensor:
        term = bound_term(schedule, x_0, x_t, t, mean, cast(Tensor, prediction.log_variance))
        return schedule.T * term / math.log(2)

    if loss == "vlb":
        return vlb(prediction.mean)
    simple = F.mse_loss(prediction.output, denoiser.target(x_0, t, eps), reduction="none").flatten(1).mean(1)
    return simple + LAMBDA * vlb(prediction.mean.detach()) if loss == "hybrid" else simple


def bound_term(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Tensor, mean: Tensor, log_variance: Tensor
) -> Tensor:
    """One term of the bound (Eq. 5): L_{t-1} for t > 0 in code, L_0 for t = 0. (B,), in nats per dimension.

    For a fixed variance, L_{t-1} is Eq. 8, and for a network that predicts eps Eq. 12, up to a constant.
    mean, log_variance: of p(x_{t-1} | x_t), like x_0.
    """
    true_mean = schedule.posterior_mean(x_0, x_t, t)
    true_log_variance = cast(Tensor, schedule.log_variance(t, x_0, large=False))
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
    decoder = -discretized_log_likelihood(x_0, mean, 0.5 * log_variance).flatten(1).mean(1)
    return torch.where(t == 0, decoder, kl)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)), elementwise, in nats."""
    difference = log_variance - other_log_variance
    return 0.5 * (difference.exp() - 1 - difference + (mean - other_mean) ** 2 * (-other_log_variance).exp())


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log p(x_0 | x_1) of 8-bit images: the log of the Gaussian's mass on each value's interval (Eq. 13), in nats.

    x_0: the 256 values k / 127.5 - 1. Intervals are 2/255 wide; the outermost extend to infinity. Elementwise.
    """
    # A narrower Gaussian lies within one interval anyway. The limit prevents overflow in entries that are not used.
    centred, inverse = x_0 - mean, (-log_sigma.clamp(min=-15)).exp()
    above, below = (inverse * (centred + half) for half in (1 / 255, -1 / 255))
    # Mirror the interval to below the mean: there the difference of two small numbers is precise. In logarithms it also
    # has a gradient where the mass is below the smallest number, as at the start of a training on the bound.
    far, near = (_log_ndtr(inverse * (half - centred.abs())) for half in (-1 / 255, 1 / 255))
    inside = near + (-torch.expm1(far - near)).clamp(min=1e-12).log()
    lowest, highest = _log_ndtr(above), _log_ndtr(-below)
    return torch.where(x_0 < -0.999, lowest, torch.where(x_0 > 0.999, highest, inside))


def _log_ndtr(x: Tensor) -> Tensor:
    """log of the normal distribution function. The gradient of torch's is wrong far below 0: 6.5 times at -10,000."""
    below = x.clamp(max=0)
    tail = (torch.special.erfcx(-below / math.sqrt(2)) / 2).log() - below.square() / 2
    return torch.where(x < 0, tail, torch.special.log_ndtr(x.clamp(min=0)))
