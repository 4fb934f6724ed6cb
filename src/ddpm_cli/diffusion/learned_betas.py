"""A noise schedule that is trained with the network, on the variational bound."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["LearnedBetas"]


class LearnedBetas(nn.Module):
    """Betas as parameters (Sohl-Dickstein et al. 2015, Section 2.4.1).

    The forward process has no parameters in the paper. Here the bound also trains beta_2 to beta_T, through x_t, whose
    noise is held (the reparameterization of Eq. 4). beta_1 stays as it is: a smaller one would always lower the bound
    of 8-bit images. The prior's term L_T depends on the betas, so it belongs to the loss.
    """

    first: Tensor

    def __init__(self, betas: Tensor) -> None:
        """betas: (T,) in (0, 1), with which the training starts."""
        super().__init__()
        betas = betas.to("cpu", torch.float64)
        self.register_buffer("first", betas[:1])
        self.logits = nn.Parameter(torch.logit(betas[1:]).float())  # keeps each beta in (0, 1)

    @property
    def betas(self) -> Tensor:
        """(T,) float64 on the CPU. Gradients flow to the logits."""
        return torch.cat([self.first, torch.sigmoid(self.logits.double())])

    def forward(self) -> NoiseSchedule:
        """The schedule of these betas. Gradients flow through its tables."""
        return NoiseSchedule(self.betas)
