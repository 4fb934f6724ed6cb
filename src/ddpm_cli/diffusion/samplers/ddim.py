"""Denoising diffusion implicit models (Song, Meng and Ermon 2021)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_cli.device import send
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers.step import Noise, Step

__all__ = ["ddim"]


def ddim(denoiser: Denoiser, x_T: Tensor, noise: Noise, eta: float) -> Iterator[Step]:
    """Move from the predicted x_0 and eps of one step to the next one (Eq. 12 of DDIM).

        x_{t-1} = sqrt(abar_{t-1}) x_0 + sqrt(1 - abar_{t-1} - sigma^2) eps + sigma z,   sigma^2 = eta^2 beta~_t

    x_T: (B, C, H, W), the state at the last step of `denoiser.schedule`. eta: in [0, 1]. 0 draws no noise: an image is
    a function of x_T. 1 is ancestral sampling with the variance beta~_t. eps is the noise that belongs to the clipped
    x_0, so that both are a state that can exist. (diffusers does this with `use_clipped_model_output`.)
    """
    schedule, x_t = denoiser.schedule, x_T
    for t in reversed(range(schedule.T)):
        with torch.no_grad():
            prediction = denoiser(x_t, t)
        yield Step(int(schedule.timesteps[t]), x_t, prediction.x_0)
        abar = float(schedule.alphas_cumprod_prev[t])
        variance = eta**2 * float(schedule.posterior_variance[t])  # 0 at t=0, so the last state is x_0
        x_t = math.sqrt(abar) * prediction.x_0 + math.sqrt(max(0.0, 1 - abar - variance)) * prediction.eps
        if variance > 0:
            x_t = x_t + math.sqrt(variance) * send(noise(), x_t)
    yield Step(-1, x_t, x_t)
