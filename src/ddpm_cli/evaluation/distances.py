"""Distances between sets of features: the Fréchet distance, KID, the Inception score, precision and recall.

Everything is in float64, on the CPU if the features are on a device that lacks it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.evaluation.moments import Statistics

__all__ = ["Estimate", "PrecisionRecall", "frechet", "inception_score", "kid", "precision_recall", "squared_mmd"]

_ROWS, _COLUMNS = 1024, 8192  # distances that are computed at once: 64 MiB
_EQUAL = 1e-12  # of the squared lengths of two vectors: a squared distance that may be rounding


class Estimate(NamedTuple):
    """mean and deviation: over parts of the data, as the field reports them (the divisor is the number of parts)."""

    mean: float
    deviation: float


class PrecisionRecall(NamedTuple):
    """Fractions, in [0, 1]: of fake images that are among the real ones, and of real ones among the fake ones."""

    precision: float
    recall: float


def frechet(a: Statistics, b: Statistics) -> float:
    """The Fréchet distance of two Gaussians with these moments (Heusel et al. 2017, Eq. 6). It is FID in features of
    `Inception`.

    |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). With R_a = S_a^(1/2), the trace of the root is the sum of the
    singular values of R_a R_b. So only symmetric matrices are decomposed, and nothing is wrong with singular ones.
    Raises ValueError if the numbers of features differ.
    """
    if a.mu.shape != b.mu.shape:
        raise ValueError(f"{len(a.mu)} and {len(b.mu)} features cannot be compared")
    shared = torch.linalg.svdvals(_root(a.sigma) @ _root(b.sigma)).sum()
    distance = (a.mu - b.mu).double().square().sum() + a.sigma.double().trace() + b.sigma.double().trace() - 2 * shared
    return max(0.0, float(distance))  # rounding may make it negative


def _root(sigma: Tensor) -> Tensor:
    """The symmetric root of a covariance. Rounding may have made its eigenvalues negative; they count as 0."""
    values, vectors = torch.linalg.eigh(sigma.double())
    return torch.mm(vectors * values.clamp(min=0).sqrt(), vectors.T)


def kid(x: Tensor, y: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Estimate:
    """The kernel distance of features (N, D) and (M, D) (Bińkowski et al. 2018): `squared_mmd` of random subsets.

    Subsets are drawn without repetition, and are as large as the smaller set if that has fewer than `subset_size`.
    Raises ValueError if one has fewer than two.
    """
    size = min(subset_size, len(x), len(y))
    generator = torch.Generator().manual_seed(seed)

    def some(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size].to(features.device)]

    return _estimate([squared_mmd(some(x), some(y)) for _ in range(subsets)])


def squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared MMD with the kernel (x.y / D + 1)^3, of features (N, D) and (M, D).

    Its mean is 0 for two sets of one distribution, whatever their sizes, so a single estimate may be negative.
    Raises ValueError if one has fewer than two.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError("at least two features are needed")
    x, y = _precise(x), _precise(y)
    return _among(x) + _among(y) - 2 * float(_kernel(x, y).mean())


def _among(x: Tensor) -> float:
    """The mean of the kernel over the pairs of two different rows."""
    kernel = _kernel(x, x)
    return float((kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def inception_score(logits: Tensor, splits: int = 10, seed: int = 0) -> Estimate:
    """exp of the mean KL divergence of p(y | x) from p(y) (Salimans et al. 2016), of each of some equal parts.

    logits: (N, K). The images are put in random order first, since those of a data set may be sorted by class.
    Raises ValueError if there are fewer images than parts.
    """
    if len(logits) < splits:
        raise ValueError(f"{len(logits)} images cannot make {splits} parts")
    order = torch.randperm(len(logits), generator=torch.Generator().manual_seed(seed))
    scores = []
    for i in range(splits):
        rows = order[i * len(logits) // splits : (i + 1) * len(logits) // splits]
        log_p = _precise(logits[rows.to(logits.device)]).log_softmax(1)
        p = log_p.exp()
        mean = p.mean(0)
        divergence = (p * log_p).sum(1).mean() - torch.xlogy(mean, mean).sum()
        scores.append(float(divergence.exp()))
    return _estimate(scores)


def precision_recall(real: Tensor, fake: Tensor, k: int = 3, progress: OnProgress = silent) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019) of features (N, D) and (M, D).

    A feature is among those of a set if it is in the ball around one of them that reaches its k-th nearest neighbour
    in that set. Distances are computed block by block, so they need little memory, on the device of the features.
    Raises ValueError if a set has at most k features.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"more than {k} features are needed")
    real, fake = _precise(real), _precise(fake)
    total = len(real) ** 2 + len(fake) ** 2 + len(real) * len(fake)
    done = 0

    def count(pairs: int) -> None:
        nonlocal done
        done += pairs
        progress("comparing features", done, total)

    real_radii, fake_radii = (_radii(features, k, count) for features in (real, fake))
    fake_found, real_found = (torch.zeros(len(x), dtype=torch.bool, device=x.device) for x in (fake, real))
    for rows in _slices(len(fake), _ROWS):
        for columns in _slices(len(real), _COLUMNS):
            distances = _squared_distances(fake[rows], real[columns])
            fake_found[rows] |= (distances <= real_radii[columns]).any(1)
            real_found[columns] |= (distances <= fake_radii[rows, None]).any(0)
            count(distances.numel())
    return PrecisionRecall(float(fake_found.double().mean()), float(real_found.double().mean()))


def _radii(features: Tensor, k: int, count: Callable[[int], None]) -> Tensor:
    """The squared distance of each feature to its k-th nearest neighbour, (N,)."""
    found = []
    for rows in _slices(len(features), _ROWS):
        nearest = features.new_empty(len(features[rows]), 0)
        for columns in _slices(len(features), _COLUMNS):
            distances = _squared_distances(features[rows], features[columns])
            nearest = torch.cat([nearest, distances], 1)
            nearest = nearest.topk(min(k + 1, nearest.shape[1]), 1, largest=False).values  # the first is itself
            count(distances.numel())
        found.append(nearest[:, k])
    return torch.cat(found)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(A, D) and (B, D) -> (A, B): |a|^2 - 2ab + |b|^2, and 0 if that is no more than rounding."""
    lengths = a.square().sum(1)[:, None] + b.square().sum(1)
    distances = lengths - 2 * (a @ b.T)
    return distances.masked_fill(distances <= _EQUAL * lengths, 0.0)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(first, first + size) for first in range(0, count, size)]


def _precise(values: Tensor) -> Tensor:
    """In float64, which MPS does not have."""
    return (values.cpu() if values.device.type == "mps" else values).double()


def _estimate(values: list[float]) -> Estimate:
    found = torch.tensor(values, dtype=torch.float64)
    return Estimate(float(found.mean()), float(found.std(correction=0)))
