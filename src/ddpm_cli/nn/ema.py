"""The exponential moving average (EMA) of the weights, which is what samples are drawn from."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["EMA"]


class EMA:
    """average <- decay * average + (1 - decay) * weights, after every training step (Appendix B).

    The decay warms up as (1 + n) / (10 + n) over n updates: without that, the average of a short run is still mostly
    the random initialisation, and its samples are noise. With the paper's 0.9999 the warm-up lasts 90,000 updates.
    """

    def __init__(self, average: Iterable[Tensor], decay: float = 0.9999, updates: int = 0) -> None:
        """average: the float32 tensors to keep up to date, in place. updates: the number of earlier updates."""
        self.average = list(average)
        self.decay = decay
        self.updates = updates

    def decay_at(self, updates: int) -> float:
        """The decay of update number `updates`, counted from 0."""
        return min(self.decay, (1 + updates) / (10 + updates))

    @torch.no_grad()
    def update(self, weights: Iterable[Tensor], finite: Tensor) -> None:
        """Update the average after a step. weights: in the order of `average`.

        finite: () bool on the device of the weights, whether the gradient was finite. If not, the average does not
        change. `updates` counts such a step too, since reading `finite` would wait for the device.
        """
        share = finite * (1 - self.decay_at(self.updates))  # 0 for a step that was skipped
        if share.device.type == "cuda":
            _lerp_together(self.average, list(weights), share)
        else:
            for average, weight in zip(self.average, weights, strict=True):
                average.lerp_(weight, share)
        self.updates += 1


def _lerp_together(average: list[Tensor], weights: list[Tensor], share: Tensor) -> None:
    """`lerp_` of all tensors in a few CUDA kernels, instead of one for each, which takes longer to start than to run.

    It needs a second copy of the weights for a moment. (torch._foreach_lerp_ takes no share that is on the device.)
    """
    change = torch._foreach_sub(weights, average)
    torch._foreach_mul_(change, share)
    torch._foreach_add_(average, change)
