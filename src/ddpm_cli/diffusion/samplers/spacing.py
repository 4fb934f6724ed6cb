"""Which steps a sampler visits."""

from __future__ import annotations

import torch

from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.names import SPACINGS

__all__ = ["SPACINGS", "spaced"]

# Below this log(alpha / sigma), x_t is noise and the predicted x_0 hardly changes. Schedules such as the cosine one go
# far below it; without a limit, half of the steps would be there. The linear one ends at -5.06.
_NOISE = -5.1


def spaced(schedule: NoiseSchedule, n: int, start: int | None = None, spacing: str = "uniform") -> list[int]:
    """n distinct steps up to `start` (default T-1), as an ascending list of positions.

    They are the upper ends of n equal intervals: of t (uniform; diffusers calls it "trailing"), of sqrt(t) (quadratic,
    as in DDIM), or of log(alpha_t / sigma_t) (logsnr, as in DPM-Solver). So a sampler begins at the noise of `start`,
    and its last prediction is made one interval above the clean image. Places are rounded to integers here, before any
    coefficient is computed, so that the network and the sampler mean the same noise. Where rounded steps coincide, they
    move to the next free ones. Raises ValueError unless 1 <= n <= start + 1.
    """
    start = schedule.T - 1 if start is None else start
    if not 1 <= n <= start + 1:
        raise ValueError(f"steps {n}: must be between 1 and {start + 1}")
    ends = torch.arange(1, n + 1, dtype=torch.float64) / n
    match spacing:
        case "uniform":
            steps = ((start + 1) * ends).round().long() - 1
        case "quadratic":
            steps = ((start + 1) * ends**2).round().long() - 1
        case "logsnr":
            falling = -schedule.lambdas[: start + 1]
            highest = falling[-1].clamp(max=max(-_NOISE, float(falling[0])))
            wanted = falling[0] + ends * (highest - falling[0])
            middles = (falling[1:] + falling[:-1]) / 2
            steps = torch.searchsorted(middles, wanted)  # the nearest
        case _:
            raise ValueError(f"spacing {spacing}: is not one of {', '.join(SPACINGS)}")
    return _distinct(steps.clamp(min=0).tolist(), start)


def _distinct(steps: list[int], start: int) -> list[int]:
    """An ascending list made strictly ascending and to end at `start`: steps move up, or down where no room is left."""
    for i in range(1, len(steps)):
        steps[i] = max(steps[i], steps[i - 1] + 1)
    steps[-1] = start
    for i in reversed(range(len(steps) - 1)):
        steps[i] = min(steps[i], steps[i + 1] - 1)
    return steps
