"""The types that every sampler takes and yields."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from ddpm_cli.diffusion.denoiser import Denoiser

__all__ = ["Noise", "Sampler", "Step"]


class Step(NamedTuple):
    """A state of the reverse process. t: the network's step, or -1 at the end, where x_t is the sample."""

    t: int
    x_t: Tensor  # (B, C, H, W)
    x_0: Tensor  # the clean image predicted from x_t


# Returns new noise from N(0, I), (B, C, H, W), on any device and in any dtype.
Noise = Callable[[], Tensor]

# A generator over (denoiser, x, noise). `denoiser.schedule` holds the steps to visit; x is the state at the last one.
# It yields a Step before each step that it takes, and one with t=-1 at the end. It controls its loop: it may keep
# earlier predictions, add noise or not, go upwards, or update several times at one step.
Sampler = Callable[[Denoiser, Tensor, Noise], Iterator[Step]]
