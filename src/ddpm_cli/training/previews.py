"""Previews: samples that a run draws as it trains, always from the same noise, in a small share of its time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_pre_hook

from ddpm_cli.config import ScheduleConfig, TrainConfig
from ddpm_cli.data import images
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.nn.unet import UNet
from ddpm_cli.rng import ImageNoise

__all__ = ["IMAGES", "Previews", "draw", "plan_previews"]

IMAGES = 16
_SHARE = 0.05  # of a run's time: what previews may take


@dataclass(frozen=True)
class Previews:
    """When a run draws previews, besides the one at its end. every: training steps between them.

    share: their estimated share of the run's time, in [0, 1]; None if it was not measured.
    """

    every: int
    share: float | None = None

    def is_due(self, step: int) -> bool:
        return step % self.every == 0


def plan_previews(settings: TrainConfig, first_step: int, cost: float, asked: bool) -> Previews:
    """Fit the previews into `_SHARE` of a run's time, by drawing fewer of them.

    cost: the time of a preview of one network (there are two, EMA and raw), divided by that of a training step. asked:
    the user chose `sample_every`, so it is kept. The last preview is always drawn. So they can take more than their
    share.
    """
    left = max(1, settings.steps - first_step)
    every = settings.sample_every

    def spent() -> float:
        count = settings.steps // every - first_step // every + (settings.steps % every != 0)
        return 2 * cost * max(1, count)

    while not asked and every < settings.steps and spent() > _SHARE / (1 - _SHARE) * left:
        every += settings.sample_every
    return Previews(every, spent() / (left + spent()))


class _StoppedError(Exception):
    pass


def draw(unet: UNet, schedule: ScheduleConfig, seed: int, should_stop: Callable[[], bool]) -> Tensor | None:
    """Sample the images of a preview: (IMAGES, C, H, W) uint8 on the CPU; None if it was stopped.

    It takes the default sampler, which needs few evaluations.
    should_stop: called before every layer, since one sampler step may take many seconds on a slow machine.
    """

    def check(module: torch.nn.Module, args: object) -> None:
        if should_stop():
            raise _StoppedError

    model = DDPM(unet, schedule)
    noise = ImageNoise(seed, range(IMAGES), model.shape)
    hook = register_module_forward_pre_hook(check)
    try:
        *_, last = model.sample_loop(noise(), noise=noise)
    except _StoppedError:
        return None
    finally:
        hook.remove()
    return images.to_uint8(last.x_t).cpu()
