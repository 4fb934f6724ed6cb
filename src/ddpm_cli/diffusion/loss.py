"""What the network is trained on."""

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


def training_loss(denoiser: Denoiser, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """L_simple = ||eps - eps_theta(x_t, t)||^2 of each image, as a mean over it (Eq. 14; line 5 of Algorithm 1).

    For a network that predicts x_0 or v, the same error of that. If the network learns the variance too: L_hybrid =
    L_simple + 0.001 L_vlb, in which the bound teaches the variance alone (Nichol and Dhariwal 2021, Eq. 16).

    x_0, eps: (B, C, H, W), x_0 in [-1, 1]; t: (B,) int64 in [0, T). Returns (B,) float32: on average 1 for a network
    that predicts no noise at all, near 0.03 for a good one on photographs.
    """
    schedule = denoiser.schedule
    x_t = schedule.q_sample(x_0, t, eps)
    prediction = denoiser(x_t, t, clip=False)
    loss = F.mse_loss(prediction.output, denoiser.target(x_0, t, eps), reduction="none").flatten(1).mean(1)
    if prediction.values is not None:
        # t is drawn evenly, so T times a term is on average the sum over t that L_vlb is (in bits, as in their code).
        mean, log_variance = prediction.mean.detach(), cast(Tensor, prediction.log_variance)
        loss = loss + LAMBDA * schedule.T * bound_term(schedule, x_0, x_t, t, mean, log_variance) / math.log(2)
    return loss


def bound_term(
    schedule: NoiseSchedule, x_0: Tensor, x_t: Tensor, t: Tensor, mean: Tensor, log_variance: Tensor
) -> Tensor:
    """One term of the bound (Eq. 5): L_{t-1} for t > 0 in code, L_0 for t = 0. (B,), in nats per dimension.

    For a network that predicts eps, and a fixed variance, L_{t-1} is the weighted square of Eq. 12.
    mean, log_variance: of p(x_{t-1} | x_t), like x_0.
    """
    true_mean = schedule.posterior_mean(x_0, x_t, t)
    true_log_variance = schedule.posterior_log_variance.to(x_0)[t].view(-1, 1, 1, 1)
    kl = gaussian_kl(true_mean, true_log_variance, mean, log_variance).flatten(1).mean(1)
    decoder = -discretized_log_likelihood(x_0, mean, 0.5 * log_variance).flatten(1).mean(1)
    return torch.where(t == 0, decoder, kl)


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, variance) || N(other_mean, other_variance)), elementwise, in nats."""
    difference = log_variance - other_log_variance
    return 0.5 * (difference.exp() - 1 - difference + (mean - other_mean) ** 2 * (-other_log_variance).exp())


def discretized_log_likelihood(x_0: Tensor, mean: Tensor, log_sigma: Tensor) -> Tensor:
    """log p(x_0 | x_1) of 8-bit images: the Gaussian's mass on each one's interval of 2/255 (Eq. 13), in nats.

    x_0: in [-1, 1], at the 256 values k / 127.5 - 1; the outermost intervals reach to infinity. Elementwise.
    """
    # A narrower Gaussian lies within one interval anyway, and would overflow where this is computed and not used.
    centred, inverse = x_0 - mean, (-log_sigma.clamp(min=-15)).exp()
    above, below = (inverse * (centred + half) for half in (1 / 255, -1 / 255))
    # The interval is taken on the lower side of the mean, where the difference of two small numbers is exact.
    far, near = (inverse * (half - centred.abs()) for half in (-1 / 255, 1 / 255))
    inside = (torch.special.ndtr(near) - torch.special.ndtr(far)).clamp(min=1e-12).log()
    lowest, highest = torch.special.log_ndtr(above), torch.special.log_ndtr(-below)
    return torch.where(x_0 < -0.999, lowest, torch.where(x_0 > 0.999, highest, inside))
