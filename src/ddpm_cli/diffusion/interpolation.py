"""Mixtures of two states: linear, and along the sphere on which Gaussian noise lies."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear", "spherical"]


def linear(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """(1 - lambda) a + lambda b (Section 4.4).

    a, b: (1, C, H, W), any two states of one step, or images. shares: (N,), each lambda. Returns (N, C, H, W), like a;
    lambda = 0 gives a exactly, and 1 gives b.

    If both were noised to t with the same eps, the mixture is again a draw of q(x_t | x_0), with that eps and the
    mixture of the images: Eq. 4 is linear. With two draws of eps it would have too little noise, half the variance in
    the middle.
    """
    share = _shaped(shares, a)
    return (1 - share) * a + share * b


def spherical(a: Tensor, b: Tensor, shares: Tensor) -> Tensor:
    """sin((1 - lambda) theta) / sin(theta) a + sin(lambda theta) / sin(theta) b, with theta the angle between a and b.

    (Shoemake 1985; DDIM, Section 5.3.) Shapes as in `linear`. It keeps the length of noise, where the linear mixture
    of two independent draws is too short. If they have the same or opposite directions, it is the linear mixture.
    """
    flat_a, flat_b = a.flatten().cpu().double(), b.flatten().cpu().double()
    cosine = (flat_a @ flat_b / (flat_a.norm() * flat_b.norm())).clamp(-1, 1)
    theta = torch.arccos(cosine)
    if not theta.sin() > 1e-6:  # also for an end that is 0, which has no direction
        return linear(a, b, shares)
    share = shares.to(theta)
    of_a, of_b = (torch.sin(part * theta) / theta.sin() for part in (1 - share, share))
    return _shaped(of_a, a) * a + _shaped(of_b, a) * b


def _shaped(shares: Tensor, like: Tensor) -> Tensor:
    return shares.to(like.dtype).to(like.device).view(-1, 1, 1, 1)
