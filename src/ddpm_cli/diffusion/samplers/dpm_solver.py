"""DPM-Solver++, the multistep solver in data prediction (Lu et al. 2022, Algorithm 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddpm_cli.device import send
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers.step import Noise, Step
from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["dpm_solver"]

_FEW = 15  # below this many steps, the order falls to the number of steps that are left


def dpm_solver(denoiser: Denoiser, x_T: Tensor, noise: Noise, order: int, eta: float) -> Iterator[Step]:
    """Solve the reverse process from x_T to an image, with one evaluation of the network a step.

    In lambda = log(alpha / sigma), with alpha = sqrt(abar) and sigma = sqrt(1 - abar), the probability flow from s to t
    is

        x_t = (sigma_t / sigma_s) x_s + sigma_t * integral of e^lambda x_0(lambda), from lambda_s to lambda_t

    and the solver replaces x_0(lambda) by a polynomial through the last `order` predictions (1: DDIM; 2: 2M; 3: 3M).
    The first steps have fewer predictions, hence a lower order. x_0 is clipped before it is kept: at t=T an error of
    eps is 157 times as large in x_0. The last step, to no noise, is x_0.

    x_T: (B, C, H, W), the state at the last step of `denoiser.schedule`.
    eta: in [0, 1], the noise of each step, as in DDIM: its variance is eta^2 beta~_t. 0 is the flow. 1 is
    SDE-DPM-Solver++ (Lu et al. 2022, Eq. 19): ancestral sampling of order 2. Order 3 has no noise.
    """
    schedule, x_t = denoiser.schedule, x_T
    kept: list[Tensor] = []  # the last predictions of x_0, the newest first
    for t in reversed(range(schedule.T)):
        with torch.no_grad():
            x_0 = denoiser(x_t, t).x_0
        yield Step(int(schedule.timesteps[t]), x_t, x_0)
        kept = [x_0, *kept][:order]
        usable = min(len(kept), t + 1) if schedule.T < _FEW else len(kept)
        x_t = advance(schedule, x_t, t, kept[:usable], eta) if t > 0 else x_0
        if eta > 0 and t > 0:
            x_t = x_t + eta * math.sqrt(schedule.posterior_variance[t]) * send(noise(), x_t)
    yield Step(-1, x_t, x_t)


def advance(schedule: NoiseSchedule, x_t: Tensor, t: int, kept: Sequence[Tensor], eta: float = 0.0) -> Tensor:
    """The state at position t - 1 without its noise, from that at t > 0: (B, C, H, W).

    kept: the predictions of x_0 at t, t + 1, …; as many as the order. Orders 1 and 2 are those of diffusers'
    `DPMSolverMultistepScheduler` ("midpoint"). Order 3 has a factor of 2 in the second derivative that is missing in
    the authors' code and in diffusers: without it, the order is only 2.
    """
    lambdas = schedule.lambdas
    h = float(lambdas[t - 1] - lambdas[t])
    alpha = float(schedule.sqrt_alphas_cumprod[t - 1])
    ratio = float(schedule.sqrt_one_minus_alphas_cumprod[t - 1] / schedule.sqrt_one_minus_alphas_cumprod[t])
    old = math.sqrt(1 + eta**2 * math.expm1(-2 * h))  # how much of the noise is old; beta~_t = sigma^2 (1 - e^-2h)
    gain = alpha * (1 - old * math.exp(-h) if eta > 0 else -math.expm1(-h))
    x = ratio * old * x_t + gain * kept[0]
    if len(kept) == 1:
        return x
    r_0 = float(lambdas[t] - lambdas[t + 1]) / h
    slope = (kept[0] - kept[1]) / r_0  # h times the derivative of x_0 in lambda, from two predictions
    if len(kept) == 2:
        return x + 0.5 * gain * slope
    r_1 = float(lambdas[t + 1] - lambdas[t + 2]) / h
    change = slope - (kept[1] - kept[2]) / r_1
    first, second = slope + r_0 / (r_0 + r_1) * change, 2 * change / (r_0 + r_1)  # h and h^2 times the derivatives
    # The integrals of e^-(h - u) u / h and of half its square, for u from 0 to h.
    x = x + alpha * (math.expm1(-h) / h + 1) * first
    return x - alpha * ((math.expm1(-h) + h) / h**2 - 0.5) * second
