"""Annealed Langevin dynamics on the learned score (Song and Ermon 2019; Section 3.2 of the paper links the two)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_cli.device import send
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers.step import Noise, Step

__all__ = ["langevin", "step_size"]

_EXCESS = 0.01


def langevin(denoiser: Denoiser, x_T: Tensor, noise: Noise, updates: int) -> Iterator[Step]:
    """Walk down the noise levels, with some updates of Langevin dynamics at each, and denoise at the end.

    In the coordinates of NCSN, y = x_t / sqrt(abar_t), the noise has the standard deviation s = sqrt(1 - abar_t) /
    sqrt(abar_t), and the score is grad log q(y) = (x_0 - y) / s^2 with x_0 = E[x_0 | y], which is Eq. 15. Langevin
    dynamics dy = score dtau + sqrt(2) dw keep q(y). With x_0 held for a time tau, they are solved exactly:

        y <- y + d (x_0 - y) + s sqrt(1 - (1 - d)^2) z,   d = 1 - exp(-tau / s^2)

    For small d this is NCSN's update, y + a score + sqrt(2 a) z with a = d s^2. That one adds too much noise for large
    d: it multiplies the variance of a level by up to 1 / (1 - d / 2). In x_t, with eps from x_0:

        x_t <- x_t - sqrt(1 - abar_t) (d eps - sqrt(1 - (1 - d)^2) z)

    Between two levels y stays. d is from `step_size`. The last evaluation is at the lowest level, and its x_0 is the
    sample: the mean of x_0 given x_t (Tweedie's formula; Jolicoeur-Martineau et al. 2021).

    x_T: (B, C, H, W), the state at the last step of `denoiser.schedule`. updates: at each step.
    """
    schedule, x_t = denoiser.schedule, x_T
    ratios = (schedule.lambdas[:-1] - schedule.lambdas[1:]).exp().tolist()  # s of a step, by s of the one below
    ratios = [*ratios, *(ratios[-1:] or [1.0])]  # nothing is above the first level; it takes the next one's
    for t in reversed(range(schedule.T)):
        sigma = float(schedule.sqrt_one_minus_alphas_cumprod[t])
        d = step_size(ratios[t], updates)
        for _ in range(updates):
            with torch.no_grad():
                prediction = denoiser(x_t, t)
            yield Step(int(schedule.timesteps[t]), x_t, prediction.x_0)
            x_t = x_t - sigma * (d * prediction.eps - math.sqrt(d * (2 - d)) * send(noise(), x_t))
        if t > 0:
            x_t = float(schedule.sqrt_alphas_cumprod[t - 1] / schedule.sqrt_alphas_cumprod[t]) * x_t
    with torch.no_grad():
        x_0 = denoiser(x_t, 0).x_0
    yield Step(int(schedule.timesteps[0]), x_t, x_0)
    yield Step(-1, x_0, x_0)


def step_size(ratio: float, updates: int) -> float:
    """d of a level, in (0, 1): the smallest with which the noise of the level above is gone after the updates.

    ratio: the noise s of the level above, divided by that of this level, at least 1. K updates take the excess of the
    variance, ratio^2 - 1 in units of this level's own, to (1 - d)^(2K) of it; d is such that 1 % of a unit is left.
    This is NCSNv2's condition (Song and Ermon 2020, Technique 4), which has a closed form for the exact update.
    """
    excess = max(ratio**2 - 1, 2 * _EXCESS)
    return float(1 - (_EXCESS / excess) ** (1 / (2 * updates)))
