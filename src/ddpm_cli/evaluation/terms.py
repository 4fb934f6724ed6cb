"""The terms of the variational bound (Eq. 5) of a batch of images, in float64, from a network in float32."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ddpm_cli.data.images import to_float
from ddpm_cli.device import send
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import bound_term
from ddpm_cli.diffusion.noised_image import to_paper
from ddpm_cli.errors import ModelError

__all__ = ["Clean", "require_finite"]


class Clean:
    """A batch of clean images and the terms of their bound.

    x_0: (B, C, H, W), what the network gets. exact: the same in float64, on a device that has it.
    """

    def __init__(self, x_0: Tensor) -> None:
        """x_0: (B, C, H, W) on the device of the network, uint8, or float in [-1, 1]."""
        if x_0.is_floating_point():
            self.x_0, self.exact = x_0, _wide(x_0)
        else:
            self.x_0, self.exact = to_float(x_0), _wide(x_0) / 127.5 - 1

    def terms(self, denoiser: Denoiser, t: Tensor | int, eps: Tensor) -> tuple[Tensor, Tensor]:
        """L_{t-1} of Eq. 5 at x_t, or L_0 for t = 0; and the mean square error of the x_0 predicted from x_t.

        t: a position in the schedule, (B,) int64, or one int for all. eps: (B, C, H, W). One evaluation of the network;
        x_0 is clipped as the model's configuration specifies. Returns (B,) float64 twice: nats per dimension, and the
        error of images in [-1, 1]. They stay on the device, so that it need not wait.
        """
        x_t = denoiser.schedule.q_sample(self.x_0, t, send(eps, self.x_0))
        with torch.no_grad():
            found = denoiser(x_t, t)
        here = self.exact.device
        t = t if isinstance(t, int) else t.to(here)
        found = replace(found, x_t=_wide(x_t), t=t, raw=_wide(found.raw))  # all that follows the network, in float64
        term = bound_term(denoiser.schedule, self.exact, found.x_t, t, found.mean, found.log_variance)
        return term, (found.x_0 - self.exact).square().flatten(1).mean(1)


def require_finite(terms: Tensor, t: Tensor) -> None:
    """Raises ModelError, naming a step, if a term is infinite or no number.

    terms: on the CPU, in any shape. t: that of each of them, int64, the network's; like terms, or to be expanded to it.
    """
    if wrong := t.expand_as(terms)[~terms.isfinite()].tolist():
        raise ModelError(
            f"the model has no finite bound: its term at t={to_paper(wrong[0])} overflows",
            "Its variance or its prediction is far off there. Has the training failed, or hardly begun?",
        )


def _wide(values: Tensor) -> Tensor:
    """In float64; on the CPU if they are on MPS, which has no float64."""
    return (values.cpu() if values.device.type == "mps" else values).double()
