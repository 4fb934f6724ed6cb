"""The training images that are nearest to each sample, and which samples are memorised."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ddpm_cli.data.work import OnProgress, silent

__all__ = ["Neighbors", "Pixels", "nearest", "squared_distances"]

_EXACT = 1024  # values whose products float32 adds without rounding, see `squared_distances`
_ROWS = 512  # samples that are compared at once
_COLUMNS = 2048  # images that they are compared with at once
_BLOCK_BYTES = 2**25  # the most pixels of either


class Pixels(Protocol):
    """Images on disk that are read on demand, such as a `Pack`. shape: (C, H, W) of each."""

    shape: tuple[int, int, int]

    @property
    def fingerprint(self) -> str:
        """A hash of all pixels, in their order."""

    def __len__(self) -> int: ...

    def __getitem__(self, indices: Tensor, /) -> Tensor:
        """indices: (B,) int64. Returns (B, C, H, W) uint8."""


class Neighbors(NamedTuple):
    """The k nearest images of each of N samples, the nearest first; of equally near ones the first image.

    indices: (N, k) int64. distances: (N, k) float64, the root mean square difference of the values, in [0, 255].
    mirrored: (N, k) bool, whether the mirrored image is the nearer one.
    ratio: (N,) float64 in [0, 1], the distance to the nearest image over that to the second nearest. It is 0 for an
    exact copy, even if there are two of it, and NaN if there is no second image.
    memorised: (N,) bool, whether the ratio is below 1/3 (Bonnaire et al. 2025).
    """

    indices: Tensor
    distances: Tensor
    mirrored: Tensor
    ratio: Tensor
    memorised: Tensor


def nearest(
    samples: Pixels, images: Pixels, k: int = 5, mirror: bool = True, progress: OnProgress = silent
) -> Neighbors:
    """Find the k nearest images of each sample by Euclidean distance in pixels. If there are fewer, k is smaller.

    mirror: also compare with each image mirrored left to right; an image counts once, by the nearer of both.
    The result is exact. Every block of samples is compared with every block of images, so memory does not grow with
    their number. Raises ValueError if there are none, or if the shapes differ.
    """
    if samples.shape != images.shape:
        raise ValueError(f"samples are {samples.shape}, but images are {images.shape}")
    if not len(samples) or not len(images) or k < 1:
        raise ValueError("there must be samples, images, and k >= 1")
    count, values = len(images), math.prod(images.shape)
    if 2 * count * (255**2 * values + 1) >= 2**63:
        raise ValueError(f"{count} images of {values} values are too many")
    total = len(samples) * count
    done = 0
    found = []
    for rows in _blocks(len(samples), _ROWS, values):
        block = samples[rows]
        best = torch.empty(len(rows), 0, dtype=torch.int64)
        for columns in _blocks(count, _COLUMNS, values):
            keys = torch.cat([best, _keys(block, images[columns], columns, count, mirror)], 1)
            best = keys.topk(min(max(k, 2), keys.shape[1]), 1, largest=False).values
            done += len(rows) * len(columns)
            progress("comparing samples with images", done, total)
        found.append(best)
    return _neighbors(torch.cat(found), count, k, values)


def _blocks(count: int, most: int, values: int) -> Iterator[Tensor]:
    """0..count-1 in blocks of at most `most` images of so many values: (B,) int64 each."""
    yield from torch.split(torch.arange(count), max(1, min(most, _BLOCK_BYTES // values)))


def _keys(samples: Tensor, images: Tensor, numbers: Tensor, count: int, mirror: bool) -> Tensor:
    """Sort keys of all pairs, (A, B) int64: by distance, then by the image's number, then mirrored ones last.

    No two keys of a sample are equal, so the k smallest do not depend on blocks or on the sorting.
    """
    both = torch.cat([samples, samples.flip(3)]) if mirror else samples
    keys = 2 * (count * squared_distances(both.flatten(1), images.flatten(1)) + numbers)
    return torch.minimum(keys[: len(samples)], keys[-len(samples) :] + mirror)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """The squared Euclidean distances of rows: (A, D) and (B, D) uint8 -> (A, B) int64, exact.

    It is |a|^2 - 2ab + |b|^2 of the values minus 128, which changes no distance. A product of two is at most 2^14 then,
    so a sum of 1024 is at most 2^24. Up to there float32 holds every integer: the matrix product is exact in whatever
    order it adds. float64 adds up these sums, and is exact up to 2^53.
    """
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    a_squared, b_squared = (torch.zeros(len(rows), dtype=torch.float64) for rows in (a, b))
    for part_a, part_b in zip(torch.split(a, _EXACT, 1), torch.split(b, _EXACT, 1), strict=True):
        x, y = part_a.float() - 128, part_b.float() - 128
        total -= 2 * (x @ y.T)
        a_squared += x.square().sum(1)
        b_squared += y.square().sum(1)
    return (total + a_squared[:, None] + b_squared).long()


def _neighbors(keys: Tensor, count: int, k: int, values: int) -> Neighbors:
    """keys: (N, at least k, or all) int64, sorted; see `_keys`."""
    squares = keys // (2 * count)
    distances = (squares.double() / values).sqrt()
    if count == 1:
        second = torch.full_like(squares[:, 0], -1)
        ratio = torch.full_like(distances[:, 0], math.nan)
    else:
        second = squares[:, 1]
        ratio = distances[:, 0] / distances[:, 1]
    copied = squares[:, 0] == 0
    return Neighbors(
        indices=(keys // 2 % count)[:, :k],
        distances=distances[:, :k],
        mirrored=(keys % 2 == 1)[:, :k],
        ratio=ratio.masked_fill(copied, 0.0),
        memorised=copied | (9 * squares[:, 0] < second),
    )
