"""Distances between two sets of features, (N, d) each: the Fréchet distance and KID, in float64.

    python benchmarks/distances.py

checks both against cases whose answer is known; `check` does the same at the start of the other scripts.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check", "frechet", "kid"]


def frechet(x: Tensor, y: Tensor) -> float:
    """|mu_x - mu_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)): the distance of two Gaussians with these moments.

    S_x S_y has the eigenvalues of the symmetric R S_y R with R = S_x^(1/2), so only symmetric matrices are decomposed.
    With few images the distance is too large; compare only sets of equal size.
    """
    x, y = x.double(), y.double()
    S_x, S_y = torch.cov(x.T), torch.cov(y.T)
    values, vectors = torch.linalg.eigh(S_x)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ S_y @ root).clamp(min=0).sqrt().sum()
    return float((x.mean(0) - y.mean(0)).square().sum() + S_x.trace() + S_y.trace() - 2 * shared)


def kid(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate of the squared MMD with the kernel (x.y / d + 1)^3 (Bińkowski et al. 2018).

    Its mean is 0 for two sets of one distribution, whatever their sizes; so a single estimate may be negative.
    """
    x, y = x.double(), y.double()
    return _among(x) + _among(y) - 2 * float(_kernel(x, y).mean())


def _among(x: Tensor) -> float:
    """The mean of the kernel over the pairs of two different rows."""
    kernel = _kernel(x, x)
    return float((kernel.sum() - kernel.trace()) / (len(x) * (len(x) - 1)))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def check() -> None:
    """Check both on cases whose answer is known. Raises SystemExit if one is wrong."""
    generator = torch.Generator().manual_seed(0)

    def normal(n: int, deviation: float = 1.0) -> Tensor:
        return deviation * torch.randn(n, 8, dtype=torch.float64, generator=generator)

    x = normal(1000)
    x -= x.mean(0)
    _close("Fréchet distance of a set and itself", frechet(x, x), 0, 1e-6)
    _close("Fréchet distance of a set and itself, moved by 3", frechet(x, x + 3), 8 * 9, 1e-6)
    _close(
        "Fréchet distance of a set and itself, twice as wide", frechet(x, 2 * x), float(torch.cov(x.T).trace()), 1e-6
    )
    halves = torch.tensor([kid(normal(100), normal(100)) for _ in range(200)])
    _close("KID of two halves of one distribution", float(halves.mean()), 0, 3 * float(halves.std()) / 200**0.5)
    # E[(x.y / d + 1)^3] = 1 + 3 E[(x.y)^2] / d^2 for independent centred normals, and E[(x.y)^2] = d a^2 b^2
    wide = torch.tensor([kid(normal(100, 2), normal(100)) for _ in range(200)])
    _close("KID of two deviations", float(wide.mean()), 3 / 8 * (16 + 1 - 8), 3 * float(wide.std()) / 200**0.5)


def _close(what: str, found: float, wanted: float, tolerance: float) -> None:
    if not abs(found - wanted) <= tolerance:
        raise SystemExit(f"{what} is {found:g}, and should be {wanted:g} within {tolerance:.1g}")


if __name__ == "__main__":
    check()
    print("the distances are right where the answer is known")
