"""Minimal random coding: a vector near a given Gaussian, for about as many bits as its KL from N(0, I).

Sender and receiver know the same candidates from N(0, I). The sender names one that suits N(v, I) (Havasi et al. 2019,
used by Algorithms 3 and 4 of the paper). A vector is coded in blocks, so that 2**bits candidates suffice for each.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ddpm_cli.compression.bits import BitReader, BitWriter
from ddpm_cli.rng import shared_normals

__all__ = ["CandidateBook", "block_rate"]

_WIDEST = 1024  # dimensions of a block, so that a book of 16 bits takes 256 MiB


def block_rate(bits: int) -> float:
    """The KL in bits that one block can carry with 2**bits candidates.

    The best of n candidates has a projection of E[max of n normals] = m on the direction of v. With |v| = m it is where
    N(v, I) has its mean, and its KL is m^2 / 2 nats. m is taken from the median-like quantile 0.5264^(1/n), which is
    right within 1 %.
    """
    quantile = torch.tensor(0.5264, dtype=torch.float64) ** (1 / 2**bits)
    return float(torch.special.ndtri(quantile)) ** 2 / 2 / math.log(2)


class CandidateBook:
    """The candidates that sender and receiver share, for vectors of one size.

    bits: of the number of a candidate. size: of the vectors. Both sides draw the same book from `rng.shared_normals`.
    """

    def __init__(self, bits: int, size: int) -> None:
        self.bits = bits
        self.size = size
        self.rate = block_rate(bits)
        self._width = min(size, _WIDEST)
        # (width, candidates): a block uses some of the rows.
        self._book = shared_normals("candidates", 0, (self._width, 2**bits))

    def blocks_for(self, kl: float) -> int:
        """In how many blocks to code a vector with this KL from N(0, I), in bits: 0 if it is too little for them."""
        least = -(-self.size // self._width)
        return 0 if kl < least * self.rate / 2 else min(self.size, max(least, round(kl / self.rate)))

    def encode(self, v: Tensor, blocks: int, step: int, stream: BitWriter) -> Tensor:
        """Code a vector from about N(v, I), and return it: what `decode` will return.

        v: (size,) float32 on the CPU. blocks: see `blocks_for`; none makes the vector N(0, I), without a bit. step:
        picks the rotation. For each block, the candidate z with the largest weight N(z; v, I) / N(z; 0, I), whose
        logarithm is z.v - |v|^2 / 2, is written to `stream`.
        """
        target = self._rotate(v, step)
        chosen = []
        for place in self._places(blocks):
            best = int((target[place] @ self._rows(place)).argmax())
            stream.write(best, self.bits)
            chosen.append(best)
        return self._vector(chosen, step)

    def decode(self, blocks: int, step: int, stream: BitReader) -> Tensor:
        """The vector that `encode` returned. Raises EndOfBitsError if the stream is too short."""
        return self._vector([stream.read(self.bits) for _ in range(blocks)], step)

    def _vector(self, chosen: list[int], step: int) -> Tensor:
        if not chosen:
            return shared_normals("uncoded", step, (self.size,))
        parts = [self._rows(place)[:, best] for place, best in zip(self._places(len(chosen)), chosen, strict=True)]
        return self._rotate_back(torch.cat(parts), step)

    def _places(self, blocks: int) -> list[slice]:
        """Blocks of about equal size that make up the vector."""
        edges = [self.size * i // blocks for i in range(blocks + 1)] if blocks else []
        return [slice(first, end) for first, end in itertools.pairwise(edges)]

    def _rows(self, place: slice) -> Tensor:
        """The part of the book for a block: its own rows, unless the vector is wider than the book."""
        length = place.stop - place.start
        first = place.start % (self._width - length + 1)
        return self._book[first : first + length]

    def _rotate(self, v: Tensor, step: int) -> Tensor:
        """Spread a vector evenly over all dimensions, so that every block gets the same share of its KL.

        Random signs, then Hartley's transform, which is orthogonal and its own inverse. The signs differ from step to
        step, so the same candidates are other vectors.
        """
        return _hartley(self._signs(step) * v)

    def _rotate_back(self, v: Tensor, step: int) -> Tensor:
        return self._signs(step) * _hartley(v)

    def _signs(self, step: int) -> Tensor:
        return torch.where(shared_normals("signs", step, (self.size,)) < 0, -1.0, 1.0)


def _hartley(v: Tensor) -> Tensor:
    spectrum = torch.fft.fft(v.double())
    transformed: Tensor = (spectrum.real - spectrum.imag) / math.sqrt(len(v))
    return transformed.float()
