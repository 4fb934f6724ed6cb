"""The types that every sampler takes and yields."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

__all__ = ["Noise", "Step"]


class Step(NamedTuple):
    """A state of the reverse process. t: the network's step, or -1 at the end, where x_t is the sample."""

    t: int
    x_t: Tensor  # (B, C, H, W)
    x_0: Tensor  # the clean image predicted from x_t


# Returns new noise from N(0, I), (B, C, H, W), on any device and in any dtype.
Noise = Callable[[], Tensor]
