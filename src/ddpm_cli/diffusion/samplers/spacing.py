"""Which steps a sampler visits."""

from __future__ import annotations

import torch

from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["SPACINGS", "spaced"]

SPACINGS = ("uniform", "quadratic", "logsnr")

# Below this log(alpha / sigma), x_t is noise and the predicted x_0 hardly changes. Schedules such as the cosine one go
# far below it; without a limit, half of the steps would be there. The linear one ends at -5.06.
_NOISE = -5.1


def spaced(schedule: NoiseSchedule, n: int, start: int | None = None, spacing: str = "uniform") -> list[int]:
    """n distinct steps from 0 to `start` (default T-1), both ends included, as an ascending list of positions.

    uniform: evenly spread in t. quadratic: evenly in sqrt(t) (DDIM; here up to t=T-1, where x_T is noise, and not to
    0.8 T). logsnr: evenly in log(alpha_t / sigma_t) (DPM-Solver). Places are rounded to integers here, before any
    coefficient is computed, so that the network and the sampler mean the same noise. Where rounded steps coincide, they
    move to the next free ones. Raises ValueError unless 1 <= n <= start + 1.
    """
    start = schedule.T - 1 if start is None else start
    if not 1 <= n <= start + 1:
        raise ValueError(f"steps {n}: must be between 1 and {start + 1}")
    if n == 1:
        return [start]
    parts = torch.linspace(0, 1, n, dtype=torch.float64)
    match spacing:
        case "uniform":
            return [round(i * start / (n - 1)) for i in range(n)]
        case "quadratic":
            steps = (start * parts**2).round().long().tolist()
        case "logsnr":
            lambdas = schedule.lambdas[: start + 1]
            lowest = torch.clamp(lambdas[-1], min=torch.tensor(_NOISE, dtype=torch.float64))
            wanted = lambdas[0] + parts * (torch.minimum(lowest, lambdas[0]) - lambdas[0])
            steps = [int((lambdas - value).abs().argmin()) for value in wanted]
        case _:
            raise ValueError(f"spacing {spacing}: is not one of {', '.join(SPACINGS)}")
    return _distinct(steps, start)


def _distinct(steps: list[int], start: int) -> list[int]:
    """An ascending list made strictly ascending and to end at `start`: steps move up, or down where no room is left."""
    for i in range(1, len(steps)):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    steps[-1] = start
    for i in reversed(range(len(steps) - 1)):
        steps[i] = min(steps[i], steps[i + 1] - 1)
    return steps
