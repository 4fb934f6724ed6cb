"""States of a model that belong to images and seeds, and images from states that belong together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_cli.data import images
from ddpm_cli.diffusion.interpolation import linear
from ddpm_cli.diffusion.samplers import Noise, Sampling
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.rng import ImageNoise

__all__ = ["Difference", "denoise_alike", "difference", "mixed", "noised"]

_BATCH = 32


class Difference(NamedTuple):
    """How far two images are apart, in the 256 levels of a pixel."""

    rmse: float
    largest: float  # of any pixel; below 0.5, the rounded images are the same
    psnr: float  # 20 log10(255 / rmse) in dB; inf if rmse is 0


def difference(a: Tensor, b: Tensor) -> Difference:
    """Compare images in [-1, 1], of one shape and not yet rounded to 256 levels."""
    levels = 127.5 * (a.cpu().double() - b.cpu().double())
    rmse = float(levels.square().mean().sqrt())
    return Difference(rmse, float(levels.abs().max()), 20 * math.log10(255 / rmse) if rmse else math.inf)


def noised(model: DDPM, x_0: Tensor, t: int, seed: int = 0) -> Tensor:
    """Noise an image to position t of the model's schedule (Eq. 4); a seed has one noise for all images and t.

    x_0: (1, C, H, W) in [-1, 1]. t: in [0, T). Returns x_t, like x_0.
    """
    return model.schedule.q_sample(x_0, t, ImageNoise(seed, [0], model.shape, "forward")().to(x_0))


def mixed(model: DDPM, a: Tensor, b: Tensor, t: int, shares: Tensor, seed: int = 0) -> Tensor:
    """Mixtures of two images that were noised to position t (Section 4.4): (N, C, H, W), one for each lambda.

    Both get the same noise, so each mixture has the right amount of it. a, b: (1, C, H, W) in [-1, 1]. shares: (N,).
    """
    return linear(noised(model, a, t, seed), noised(model, b, t, seed), shares)


def denoise_alike(
    model: DDPM, states: Tensor, sampling: Sampling, seed: int = 0, progress: Callable[[int], None] = lambda done: None
) -> Iterator[Tensor]:
    """Sample from several states with one noise: yields batches of (B, C, H, W) uint8 on the CPU.

    Each state gets the noise of image 0 of `seed`. So similar states give similar images, with any sampler.
    states: (N, C, H, W), at the last of `sampling.timesteps`. progress: called after every evaluation of every batch
    with the number of images in it.
    """
    for batch in torch.split(states, _BATCH):
        noise = _expanded(ImageNoise(seed, [0], model.shape), len(batch))
        for step in model.sample_loop(batch, sampling, noise=noise):
            if step.t >= 0:
                progress(len(batch))
        yield images.to_uint8(step.x_t).cpu()


def _expanded(draw: Noise, n: int) -> Noise:
    return lambda: draw().expand(n, -1, -1, -1)
