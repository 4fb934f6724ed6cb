"""Rate against distortion of the ideal progressive code (Section 4.3; Fig. 5 and Table 4 of the paper)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import bound_term, gaussian_kl
from ddpm_cli.rng import ImageNoise

__all__ = ["Depth", "rate_distortion"]


@dataclass(frozen=True)
class Depth:
    """What the ideal code has sent when the receiver knows x_t, averaged over images.

    t: the network's. rate: in bits per dimension, up to x_t. mse: of the predicted x_0, with images in [-1, 1].
    """

    t: int
    rate: float
    mse: float

    @property
    def rmse(self) -> float:
        """The root of the mean square error, on the scale of 0 to 255. The mean is taken before the root."""
        return 127.5 * math.sqrt(self.mse)


def rate_distortion(
    denoiser: Denoiser,
    x_0: Tensor,
    seed: int = 0,
    batch_size: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Depth]:
    """The depths of the progressive code of some images, from x_T down to x_1.

    x_0: (N, C, H, W) float32 in [-1, 1], on the device of the network. The rate up to x_t is the prior's term L_T of
    Eq. 5 and the terms L_{s-1} of all steps s > t; the mse is that of the x_0 predicted from x_t. One draw of
    noise for each image and t makes each term an unbiased estimate. Sums are in float64. progress: called with the
    number of images times steps that are done.
    """
    schedule = denoiser.schedule
    terms = torch.zeros(schedule.T, dtype=torch.float64)  # L_{t-1} in bits per dimension; entry 0, L_0, stays 0
    errors = torch.zeros(schedule.T, dtype=torch.float64)
    prior, done = 0.0, 0
    _, channels, height, width = x_0.shape
    shape = (channels, height, width)
    for first in range(0, len(x_0), batch_size):
        batch = x_0[first : first + batch_size]
        exact = batch.cpu().double()
        noise = ImageNoise(seed, range(first, first + len(batch)), shape, "rate")
        prior += float(_prior(denoiser, exact).sum())
        for t in reversed(range(schedule.T)):
            eps = noise().to(batch)
            x_t = schedule.q_sample(batch, t, eps)
            with torch.no_grad():
                prediction = denoiser(x_t, t)
            x_t, predicted = x_t.cpu().double(), prediction.x_0.cpu().double()
            errors[t] += (predicted - exact).square().flatten(1).mean(1).sum()
            if t > 0:
                log_variance = _exactly(prediction.log_variance)
                mean = schedule.posterior_mean(predicted, x_t, t)  # again, in float64
                terms[t] += bound_term(schedule, exact, x_t, torch.tensor(t), mean, log_variance).sum()
            done += len(batch)
            progress(done)
    bits = 1 / (math.log(2) * len(x_0))
    sent = (prior + terms.flip(0).cumsum(0).flip(0)) * bits  # after the steps down to t, x_{t-1} is known
    rates = [*sent[1:].tolist(), prior * bits]
    times, mse = schedule.timesteps.tolist(), (errors / len(x_0)).tolist()
    return [Depth(*values) for values in zip(times, rates, mse, strict=True)][::-1]


def _exactly(value: Tensor | float) -> Tensor:
    """In float64 on the CPU, where it is converted: MPS has no float64."""
    return value.cpu().double() if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)


def _prior(denoiser: Denoiser, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of Eq. 5, in nats per dimension, (B,)."""
    abar = denoiser.schedule.alphas_cumprod[-1]
    zero = torch.zeros((), dtype=torch.float64)
    return gaussian_kl(abar.sqrt() * x_0, (1 - abar).log(), zero, zero).flatten(1).mean(1)
