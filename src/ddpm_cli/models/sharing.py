"""Samples that share a state of the reverse process (Fig. 7 of the paper)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ddpm_cli.data import images
from ddpm_cli.diffusion.samplers import Sampling
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.rng import ImageNoise

__all__ = ["above", "below", "evaluations_to", "sample_from", "state_at"]


def above(sampling: Sampling, t: int) -> Sampling:
    """The same plan with a step at t (in [0, T)), where it may have none."""
    return replace(sampling, timesteps=sorted({*sampling.timesteps, t}))


def below(sampling: Sampling, t: int) -> Sampling:
    """The part of a plan that is left at t (in [0, T)), beginning there."""
    return replace(sampling, timesteps=[*(step for step in sampling.timesteps if step < t), t])


def evaluations_to(sampling: Sampling, t: int) -> int:
    """How often `state_at` evaluates the network for an image: once at t, where it stops."""
    updates: int = sampling.settings.get("updates", 1)
    return updates * sum(step > t for step in sampling.timesteps) + 1


def state_at(
    ddpm: DDPM, t: int, sampling: Sampling, seed: int = 0, progress: Callable[[int], None] = lambda done: None
) -> Tensor:
    """The state x_t of image 0 of a seed, on its way from pure noise: (1, C, H, W).

    t: in [0, T). sampling: the plan from pure noise. It gets a step at t if it has none, so states at different t are
    on the same way, but for the last step to each. progress: called with 1 after every evaluation of the network.
    Raises ValueError if there is no step t.
    """
    noise = ImageNoise(seed, [0], ddpm.shape)
    for step in ddpm.sample_loop(noise(), above(sampling, t), noise=noise):
        progress(1)
        if step.t == t:
            return step.x_t
    raise AssertionError("the plan has a step at t")


def sample_from(
    ddpm: DDPM,
    x_t: Tensor,
    t: int,
    n: int,
    sampling: Sampling,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """n samples of p(x_0 | x_t): the reverse process from one state, with other noise each. (n, C, H, W) uint8, CPU.

    x_t: (1, C, H, W), the state at t (in [0, T)). sampling: the plan from pure noise, of which the steps below t are
    taken. It must draw noise, or all samples are the same. Sample i depends only on x_t, t, the plan, and (seed, i).
    progress: called with n after every evaluation of the network.
    """
    noise = ImageNoise(seed, range(n), ddpm.shape, f"from t={t}")
    for step in ddpm.sample_loop(x_t.expand(n, -1, -1, -1), below(sampling, t), noise=noise):
        if step.t >= 0:
            progress(n)
    return images.to_uint8(step.x_t).cpu()
