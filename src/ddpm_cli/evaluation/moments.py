"""Mean and covariance of any number of features, in float64, from parts that may be computed anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Moments", "Statistics", "moments", "together"]

_ROWS = 1024  # features that are converted to float64 at once


@dataclass(frozen=True)
class Statistics:
    """mu: (D,) float64. sigma: (D, D) float64, the covariance with divisor count - 1. count: None if not known."""

    mu: Tensor
    sigma: Tensor
    count: int | None = None


@dataclass(frozen=True)
class Moments:
    """Sums over a part of the features, on the CPU.

    count: features. mean: (D,) float64. scatter: (D, D) float64, the sum of (f - mean) (f - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @property
    def statistics(self) -> Statistics:
        """Raises ValueError for fewer than two features."""
        if self.count < 2:
            raise ValueError("a covariance needs at least two features")
        return Statistics(self.mean, self.scatter / (self.count - 1), self.count)


def moments(features: Tensor) -> Moments:
    """The moments of (N, D) features."""
    parts = [part.cpu().double() for part in torch.split(features, _ROWS)]
    means = [part.mean(0) for part in parts]
    return together(
        Moments(len(part), mean, (part - mean).T @ (part - mean)) for part, mean in zip(parts, means, strict=True)
    )


def together(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts, one after the other (Chan et al. 1983). Raises ValueError if there are none.

    With n_a and n_b features and d = mean_b - mean_a, the scatter is S_a + S_b + d d^T n_a n_b / (n_a + n_b). Nothing
    large is subtracted, so the result is as precise as if it came from all features at once.
    """
    whole: Moments | None = None
    for part in parts:
        if whole is None:
            whole = part
            continue
        count = whole.count + part.count
        d = part.mean - whole.mean
        scatter = whole.scatter + part.scatter + torch.outer(d, d) * (whole.count * part.count / count)
        whole = Moments(count, whole.mean + d * (part.count / count), scatter)
    if whole is None:
        raise ValueError("there are no features")
    return whole
