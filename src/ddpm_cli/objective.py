"""What the network is trained on."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ddpm_cli.schedule import NoiseSchedule

__all__ = ["simple_loss"]


def simple_loss(
    unet: Callable[[Tensor, Tensor], Tensor], schedule: NoiseSchedule, x_0: Tensor, t: Tensor, eps: Tensor
) -> Tensor:
    """L_simple = E ||eps - eps_theta(x_t, t)||^2, as a mean over everything (Eq. 14; lines 5 of Algorithm 1).

    x_0, eps: (B, C, H, W), x_0 in [-1, 1]; t: (B,) int64 in [0, T). Returns a float32 scalar: 1 for a network that
    predicts nothing, near 0.03 for a good one on photographs.
    """
    return F.mse_loss(unet(schedule.q_sample(x_0, t, eps), t).float(), eps)
