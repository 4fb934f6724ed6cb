"""DDIM inversion: from an image up to the state from which the sampler `ddim` returns to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers.step import Step
from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["ITERATIONS", "invert"]

ITERATIONS = 30  # most of them stop earlier, at rounding

_KEPT = 5  # iterates that Anderson's method combines
_PATIENCE = 5  # iterations without progress, which is
_PROGRESS = 0.8  # times the error. The rounding of a bf16 network is far above that of the float32 states


def invert(denoiser: Denoiser, x_0: Tensor, iterations: int = ITERATIONS) -> Iterator[Step]:
    """Run the sampler `ddim` (eta = 0) upwards: yield the image, with t = -1, and the state at each step.

    From position s to t the plain inversion (Song et al. 2021, Section 5.4) takes x_0 and eps at s, which it knows. But
    the sampler comes back with those at t. So the x_t that it turns into x_s solves

        x_s = (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x_0(x_t, t),

    with alpha = sqrt(abar), sigma = sqrt(1 - abar), and x_0 clipped as the sampler clips it. The plain x_t is only the
    first guess, and `iterations` at most improve it; 0: plain inversion. They stop at rounding, or where they no longer
    help. The result does not depend on the other images of a batch.

    x_0: (B, C, H, W), images in [-1, 1]. denoiser.schedule: the steps to visit. The x_0 of each Step is the prediction.
    """
    schedule = denoiser.schedule
    x_t, predicted = x_0, x_0
    yield Step(-1, x_t, predicted)
    for t in range(schedule.T):
        if t == 0:
            with torch.no_grad():  # there is no prediction for t=-1, so the image counts as a state at the first step
                guess = x_0 + float(schedule.sqrt_alphas_cumprod[0]) * (x_0 - denoiser(x_0, 0).x_0)
        else:
            guess = _move(schedule, x_t, predicted, t - 1, t)
        x_t, predicted = _solve(denoiser, x_t, guess, t, iterations)
        yield Step(int(schedule.timesteps[t]), x_t, predicted)


def _move(schedule: NoiseSchedule, x: Tensor, x_0: Tensor, start: int, end: int) -> Tensor:
    """DDIM's step between two positions, up or down, for the x_0 predicted at `start`. -1 is the clean image."""
    (alpha, sigma), (to_alpha, to_sigma) = (_marginal(schedule, t) for t in (start, end))
    return to_sigma / sigma * x + (to_alpha - alpha * to_sigma / sigma) * x_0


def _marginal(schedule: NoiseSchedule, t: int) -> tuple[float, float]:
    if t < 0:
        return 1.0, 0.0
    return float(schedule.sqrt_alphas_cumprod[t]), float(schedule.sqrt_one_minus_alphas_cumprod[t])


def _solve(denoiser: Denoiser, x_s: Tensor, guess: Tensor, t: int, iterations: int) -> tuple[Tensor, Tensor]:
    """The state at position t from which one step leads to x_s, the state before; and the x_0 predicted from it.

    For Gaussian data the slope of the step down lies between sigma_s / sigma_t (deviation 0: x_0 does not depend on
    x_t) and alpha_s / alpha_t (infinite deviation: x_0 is x_t / alpha_t). So the error times 2 / (their sum) is a step
    of a fixed-point iteration that converges for any length of the step down: each one leaves at most tanh(h / 2) of
    the error, with h the step's length in log(alpha / sigma). Without the factor it diverges for h > log 2. Anderson's
    method makes it faster. A network's slopes may be larger; then the best iterate is kept.
    """
    schedule = denoiser.schedule
    (alpha_s, sigma_s), (alpha, sigma) = _marginal(schedule, t - 1), _marginal(schedule, t)
    size = (2 if t > 0 else 1) / (sigma_s / sigma + alpha_s / alpha)  # to the image, 2 would be the limit of stability
    rounding = 2 * torch.finfo(x_s.dtype).eps * _rms(x_s)
    smallest, waited = torch.full_like(rounding, torch.inf), torch.zeros_like(rounding)
    going = torch.ones_like(rounding, dtype=torch.bool)  # which images are not done
    best, predicted, x = guess, guess, guess
    tried: list[tuple[Tensor, Tensor]] = []
    for i in range(iterations + 1):
        with torch.no_grad():
            x_0 = denoiser(x, t).x_0
        residual = x_s - _move(schedule, x, x_0, t, t - 1)
        error = _rms(residual)
        finite = error.isfinite()
        waited = torch.where(error < _PROGRESS * smallest, 0, waited + 1)
        better = going & (error < smallest) if i else going
        smallest = torch.where(better, error, smallest)
        best, predicted = torch.where(better, x, best), torch.where(better, x_0, predicted)
        going = going & finite & (smallest > rounding) & (waited < _PATIENCE)
        if i == iterations or not going.any():
            break
        tried = [*tried, (torch.where(finite, x, best), torch.where(finite, residual, 0))][-_KEPT:]
        x = _anderson(tried, size)
    return best, predicted


def _rms(x: Tensor) -> Tensor:
    """The root of the mean square of each image, (B, 1, 1, 1)."""
    return x.square().mean((1, 2, 3), keepdim=True).sqrt()


def _anderson(tried: Sequence[tuple[Tensor, Tensor]], size: float) -> Tensor:
    """The next iterate from earlier ones and their residuals, the newest last: x + size * residual, and combinations.

    Each image gets the combination of its iterates that has the smallest residual if the residual is linear (Walker and
    Ni 2011). In float64 on the CPU, since the differences are small.
    """
    x, residual = tried[-1]
    plain = x + size * residual
    if len(tried) == 1:
        return plain
    of_x, of_residual = (
        torch.stack([(new[i] - old[i]).flatten(1).cpu().double() for old, new in pairwise(tried)], 2) for i in (0, 1)
    )
    wanted = residual.flatten(1).cpu().double().unsqueeze(2)
    weights: Tensor = torch.linalg.lstsq(of_residual, wanted).solution
    combined = ((of_x + size * of_residual) @ weights).view(x.shape)
    return plain - combined.to(x.dtype).to(x.device)
