"""UniPC, a predictor and corrector for the same flow as DPM-Solver++ (Zhao et al. 2023, Algorithms 1 and 2)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers.step import Noise, Step
from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["unipc"]


def unipc(denoiser: Denoiser, x_T: Tensor, noise: Noise, order: int = 2) -> Iterator[Step]:
    """As `dpm_solver`, but each prediction of x_0 also corrects its state (data prediction, B_2)."""
    schedule, x_t = denoiser.schedule, x_T
    kept: list[Tensor] = []
    before = x_T  # the state at t + 1
    used = 1
    for t in reversed(range(schedule.T)):
        with torch.no_grad():
            x_0 = denoiser(x_t, t).x_0
        if kept:
            x_t = _advance(schedule, before, t + 1, kept[:used], x_0)
        yield Step(int(schedule.timesteps[t]), x_t, x_0)
        kept = [x_0, *kept][:order]
        used = min(len(kept), t + 1)  # the order falls at the end, as the authors advise
        before = x_t
        x_t = _advance(schedule, x_t, t, kept[:used]) if t > 0 else x_0
    yield Step(-1, x_t, x_t)


def _advance(schedule: NoiseSchedule, x: Tensor, t: int, kept: Sequence[Tensor], new: Tensor | None = None) -> Tensor:
    lambdas = schedule.lambdas
    h = float(lambdas[t - 1] - lambdas[t])
    alpha = float(schedule.sqrt_alphas_cumprod[t - 1])
    ratio = float(schedule.sqrt_one_minus_alphas_cumprod[t - 1] / schedule.sqrt_one_minus_alphas_cumprod[t])
    places = [float(lambdas[t + i] - lambdas[t]) / h for i in range(1, len(kept))]
    slopes = [(kept[i + 1] - kept[0]) / r for i, r in enumerate(places)]
    if new is not None:
        places, slopes = [*places, 1.0], [*slopes, new - kept[0]]
    x = ratio * x - alpha * math.expm1(-h) * kept[0]
    for weight, slope in zip(_weights(places, h), slopes, strict=True):
        x = x - alpha * math.expm1(-h) * weight * slope
    return x


def _weights(places: list[float], h: float) -> list[float]:
    if len(places) == 1:
        return [0.5]
    if not places:
        return []
    rows, right = [], []
    phi, factorial = math.expm1(-h) / -h - 1, 1.0
    for i in range(1, len(places) + 1):
        rows.append([r ** (i - 1) for r in places])
        right.append(phi * factorial / math.expm1(-h))
        factorial *= i + 1
        phi = phi / -h - 1 / factorial
    solved: list[float] = torch.linalg.solve(
        torch.tensor(rows, dtype=torch.float64), torch.tensor(right, dtype=torch.float64)
    ).tolist()
    return solved
