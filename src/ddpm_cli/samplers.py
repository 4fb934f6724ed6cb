"""The reverse process: one loop, and the step functions it can walk with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_cli.schedule import NoiseSchedule

__all__ = ["Step", "ancestral_step", "reverse_process"]


class Step(NamedTuple):
    """A state of the reverse process. t: the network's step, or -1 at the end, where x_t is the sample."""

    t: int
    x_t: Tensor
    x_0: Tensor  # the prediction of the clean image made from x_t, clipped


StepFunction = Callable[[NoiseSchedule, int, Tensor, Tensor, Callable[[], Tensor]], Tensor]


def ancestral_step(schedule: NoiseSchedule, i: int, x_t: Tensor, x_0: Tensor, noise: Callable[[], Tensor]) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t) = N(mu~_t(x_t, x_0), sigma_t^2 I) (Eq. 7; line 4 of Algorithm 2).

    i: the position in `schedule`; x_t, x_0: (B, C, H, W). The mean is formed from x_0 as it is given, clipped or not.
    noise: gives z, like x_t; it is not called at i=0, where the mean itself is the sample.
    """
    mean = schedule.posterior_mean(x_0, x_t, i)
    if i == 0:
        return mean
    return mean + math.exp(0.5 * float(schedule.log_variance[i])) * noise()


def reverse_process(
    unet: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_T: Tensor,
    noise: Callable[[], Tensor],
    step: StepFunction = ancestral_step,
    clip: float | None = 1.0,
) -> Iterator[Step]:
    """Walk from the last step of `schedule` to the clean image (Algorithm 2), and show every state on the way.

    x_T: (B, C, H, W), the state at the schedule's last step: noise, or an image noised to it. To take fewer steps than
    the network was trained with, give a subsequence of its schedule. noise: draws z, (B, C, H, W) on any device.
    clip: predictions of x_0 are clipped to [-clip, clip] before the mean is formed (Appendix B); None leaves them.

    Yields a Step for each step of the schedule, before it is taken, and a last one with t=-1 whose x_t is the sample.
    """
    x_t = x_T
    for i in reversed(range(schedule.T)):
        t = int(schedule.timesteps[i])
        with torch.no_grad():
            eps = unet(x_t, torch.tensor([t], device=x_t.device))
            x_0 = schedule.predict_x_0(x_t, i, eps)
            if clip is not None:
                x_0 = x_0.clamp(-clip, clip)
        yield Step(t, x_t, x_0)
        x_t = step(schedule, i, x_t, x_0, lambda like=x_t: noise().to(like))  # type: ignore[misc]
    yield Step(-1, x_t, x_t)
