"""The reverse process: one loop, and the step functions it can walk with."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.schedule import NoiseSchedule

__all__ = ["Step", "ancestral_step", "limit_x_0", "reverse_process"]


class Step(NamedTuple):
    """A state of the reverse process. t: the network's step, or -1 at the end, where x_t is the sample."""

    t: int
    x_t: Tensor
    x_0: Tensor  # the prediction of the clean image made from x_t, within the range of images


StepFunction = Callable[[NoiseSchedule, int, Tensor, Tensor, Tensor | float, Callable[[], Tensor]], Tensor]


def ancestral_step(
    schedule: NoiseSchedule,
    i: int,
    x_t: Tensor,
    x_0: Tensor,
    log_variance: Tensor | float,
    noise: Callable[[], Tensor],
) -> Tensor:
    """Draw x_{t-1} from p(x_{t-1} | x_t) = N(mu~_t(x_t, x_0), sigma_t^2 I) (Eq. 7; line 4 of Algorithm 2).

    i: the position in `schedule`; x_t, x_0: (B, C, H, W). The mean is formed from x_0 as it is given, clipped or not.
    log_variance: log sigma_t^2, one number or like x_t. noise: gives z, like x_t; it is not called at i=0, where the
    mean itself is the sample.
    """
    mean = schedule.posterior_mean(x_0, x_t, i)
    if i == 0:
        return mean
    half = 0.5 * log_variance
    sigma = half.exp() if isinstance(half, Tensor) else math.exp(half)
    return mean + sigma * noise()


def limit_x_0(x_0: Tensor, config: ScheduleConfig) -> Tensor:
    """Keep a prediction of x_0 in the range of images, as a model's configuration says. x_0: (B, C, H, W).

    By clipping (Appendix B); by dynamic thresholding, which scales an image down by a quantile of its absolute values
    where that is above 1 (Saharia et al. 2022, Section 2.3); or not at all.
    """
    if config.thresholding:
        extent = torch.quantile(x_0.flatten(1).abs(), config.dynamic_thresholding_ratio, dim=1)
        extent = extent.clamp(min=1, max=config.sample_max_value).view(-1, 1, 1, 1)
        return x_0.clamp(-extent, extent) / extent
    if config.clip_sample:
        return x_0.clamp(-config.clip_sample_range, config.clip_sample_range)
    return x_0


def reverse_process(
    unet: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    x_T: Tensor,
    noise: Callable[[], Tensor],
    step: StepFunction = ancestral_step,
    limit: Callable[[Tensor], Tensor] = lambda x_0: x_0.clamp(-1, 1),
) -> Iterator[Step]:
    """Walk from the last step of `schedule` to the clean image (Algorithm 2), and show every state on the way.

    unet: (x_t, t) -> (B, C, H, W), what `schedule.prediction_type` says; (B, 2C, H, W) if the variance is learned.
    x_T: (B, C, H, W), the state at the schedule's last step: noise, or an image noised to it. To take fewer steps than
    the network was trained with, give a subsequence of its schedule. noise: draws z, (B, C, H, W) on any device.
    limit: what becomes of a prediction of x_0 before the mean is formed from it; it is clipped to [-1, 1] (Appendix B).

    Yields a Step for each step of the schedule, before it is taken, and a last one with t=-1 whose x_t is the sample.
    """
    x_t = x_T
    channels = x_T.shape[1]
    for i in reversed(range(schedule.T)):
        t = int(schedule.timesteps[i])
        with torch.no_grad():
            output = unet(x_t, torch.tensor([t], device=x_t.device))
            x_0 = limit(schedule.predict_x_0(x_t, i, output[:, :channels]))
            log_variance: Tensor | float = float(schedule.log_variance[i])
            if output.shape[1] > channels:
                log_variance = schedule.learned_log_variance(output[:, channels:], i)
        yield Step(t, x_t, x_0)
        x_t = step(schedule, i, x_t, x_0, log_variance, lambda like=x_t: noise().to(like))  # type: ignore[misc]
    yield Step(-1, x_t, x_t)
