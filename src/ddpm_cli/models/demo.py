"""The pictures of `ddpm demo`: what a model does, shown on two images that it drew itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_cli.data import images
from ddpm_cli.diffusion.interpolation import linear
from ddpm_cli.diffusion.noised_image import from_paper, to_paper
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.models.latents import denoise_alike, mixed, noised
from ddpm_cli.rng import ImageNoise

__all__ = ["Demo", "Plan", "draw"]

_STEPS = 50  # of the way that is shown; more gain nothing that one can see
_SAMPLES = 64
_BETWEEN = 9  # images from one to the other


@dataclass(frozen=True)
class Demo:
    """All images are (N, C, H, W) uint8; t is the paper's.

    ts: of the way from noise to an image, T first and 0 last. noised, states, predictions: for each of them x_t of the
    forward process, x_t of the reverse process, and the x_0 that the model predicts from the latter; of one image.
    pair: the two images; the first is where that way ends. samples: new images. mixtures: for each t, images between
    the pair; t=0 are the mixtures of the pixels.
    """

    ts: list[int]
    noised: Tensor
    states: Tensor
    predictions: Tensor
    pair: Tensor
    samples: Tensor
    mixtures: dict[int, Tensor]


class Plan:
    """How a model is shown. way: the sampling of the pair, which is shown step by step. usual: of the samples.

    mixing: for each t, the sampling of mixtures. evaluations: of the network, for all images together.
    """

    def __init__(self, model: DDPM) -> None:
        T = model.schedule.T
        self.way = model.sampling(steps=min(_STEPS, T), spacing="uniform")
        self.usual = model.sampling()
        mixed_at = sorted({max(1, T * quarter // 4) for quarter in (1, 2, 3)})
        self.mixing = {t: model.sampling(start=from_paper(t)) for t in mixed_at}
        mixing = sum(sampling.evaluations for sampling in self.mixing.values())
        self.evaluations = 2 * self.way.evaluations + _SAMPLES * self.usual.evaluations + _BETWEEN * mixing


def draw(model: DDPM, plan: Plan, seed: int = 0, progress: Callable[[int], None] = lambda done: None) -> Demo:
    """Draw all pictures, as the commands `sample`, `noise`, `denoise-trace` and `interpolate` draw them.

    progress: called after every evaluation of the network with the number of images; see `Plan.evaluations`.
    """
    ts, states, predictions = [], [], []
    noise = ImageNoise(seed, range(2), model.shape)
    for step in model.sample_loop(noise(), plan.way, noise=noise):
        ts.append(to_paper(step.t))
        states.append(images.to_uint8(step.x_t).cpu())
        predictions.append(images.to_uint8(step.x_0[:1]).cpu())
        progress(2 if step.t >= 0 else 0)
    pair = states[-1]
    a, b = torch.split(images.to_float(pair), 1)
    forward = [images.to_uint8(noised(model, a, from_paper(t), seed)) if t else pair[:1] for t in ts]
    samples = torch.cat([*model.sample_batches(range(_SAMPLES), plan.usual, seed, progress=progress)])
    shares = torch.linspace(0, 1, _BETWEEN, dtype=torch.float64)
    mixtures = {0: images.to_uint8(linear(a, b, shares))}
    for t, sampling in plan.mixing.items():
        mixture = mixed(model, a, b, from_paper(t), shares, seed)
        mixtures[t] = torch.cat([*denoise_alike(model, mixture, sampling, seed, progress)])
    way = (torch.cat([state[:1] for state in states]), torch.cat(predictions))
    return Demo(ts, torch.cat(forward), *way, pair, samples, mixtures)
