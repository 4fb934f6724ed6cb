"""Ancestral sampling: Algorithm 2 of the paper."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_cli.device import send
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers.step import Noise, Step

__all__ = ["ancestral"]


def ancestral(denoiser: Denoiser, x_T: Tensor, noise: Noise) -> Iterator[Step]:
    """Draw x_{t-1} from p(x_{t-1} | x_t) = N(mu_theta(x_t, t), sigma_t^2 I), from the last step down (Algorithm 2).

    x_T: (B, C, H, W), noise, or an image noised to the last step of `denoiser.schedule`. The mean is computed from the
    clipped x_0, as in the authors' code. The last step adds no noise: its mean is the sample.
    """
    x_t = x_T
    for t in reversed(range(denoiser.schedule.T)):
        with torch.no_grad():
            prediction = denoiser(x_t, t)
            mean, log_variance = prediction.mean, prediction.log_variance
        yield Step(int(denoiser.schedule.timesteps[t]), x_t, prediction.x_0)
        x_t = mean if t == 0 else mean + _sigma(log_variance) * send(noise(), x_t)
    yield Step(-1, x_t, x_t)


def _sigma(log_variance: Tensor | float) -> Tensor | float:
    half = 0.5 * log_variance
    return half.exp() if isinstance(half, Tensor) else math.exp(half)
