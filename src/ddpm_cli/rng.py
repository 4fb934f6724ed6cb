"""Random numbers: each one depends only on the seed, its use, and its index within that use.

So no generator state is saved. A resumed run and a run in several processes draw the same numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ImageNoise", "data_order", "image_uniforms", "seed_everything", "shared_normals", "training_noise"]

_BLOCK = 64  # rows of a batch that share one generator


def _generator_seed(index: int, *key: object) -> int:
    """A 32-bit seed for item `index` of the stream named by `key`; different items of a stream never share one.

    PyTorch's CPU generator uses 32 bits of its seed. A hash of the index would collide by the birthday paradox within
    50,000 images. So only the stream is hashed, to a start value modulo 2**32, and its items count up from there.
    """
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")
    return (start + index) % 2**32


def seed_everything(seed: int, use: str, index: int = 0) -> None:
    """Seed PyTorch's global generators from (seed, use, index)."""
    torch.manual_seed(_generator_seed(index, use, seed))


def training_noise(
    seed: int, step: int, batch_size: int, rows: range, shape: tuple[int, int, int], T: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw flips, t and eps of Algorithm 1 for some rows of a step's batch.

    Returns `mirrored` (B,) bool, each True with probability 1/2; t (B,) int64, uniform in [0, T); eps (B, C, H, W) from
    N(0, I). Row i of step k depends only on (seed, k, i) and the batch size. So several processes draw the same as one,
    and a resumed run the same as one that never stopped. Rows are drawn in blocks, so few are drawn in vain.
    """
    generator = torch.Generator(device)
    blocks = range(rows.start // _BLOCK, -(-rows.stop // _BLOCK))
    drawn = []
    for block in blocks:
        generator.manual_seed(_generator_seed(step * -(-batch_size // _BLOCK) + block, "train", seed))
        n = min(_BLOCK, batch_size - block * _BLOCK)
        mirrored = torch.rand(n, device=device, generator=generator) < 0.5
        t = torch.randint(T, (n,), device=device, generator=generator)
        eps = torch.randn((n, *shape), device=device, generator=generator)
        mine = slice(max(rows.start - block * _BLOCK, 0), rows.stop - block * _BLOCK)
        drawn.append((mirrored[mine], t[mine], eps[mine]))
    mirrored, t, eps = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return mirrored, t, eps


class ImageNoise:
    """The noise of some images of one seed: each call draws the next (B, C, H, W), float32 on the CPU, from N(0, I).

    Image i has its own generator, so its noise depends only on (seed, i), not on its batch or the device. `stream` is
    the name of the use; two uses of one seed are independent.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int], stream: str = "reverse") -> None:
        self.shape = shape
        self._generators = [torch.Generator().manual_seed(_generator_seed(index, stream, seed)) for index in indices]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self._generators])


def image_uniforms(seed: int, indices: Sequence[int], stream: str) -> Tensor:
    """One number from [0, 1) for each image of a seed, (B,) float64. It depends only on (seed, i) and the stream."""
    generators = (torch.Generator().manual_seed(_generator_seed(index, stream, seed)) for index in indices)
    drawn = [torch.rand((), generator=generator, dtype=torch.float64) for generator in generators]
    return torch.stack(drawn) if drawn else torch.empty(0, dtype=torch.float64)


def data_order(seed: int, epoch: int, count: int) -> Tensor:
    """The order of the images in an epoch: a permutation of 0..count-1, (count,) int64."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**32)  # no hash: old runs must resume
    return torch.randperm(count, generator=generator)


def shared_normals(use: str, index: int, shape: tuple[int, ...]) -> Tensor:
    """Numbers from N(0, I) that need no seed: every process draws the same for a use and an index. float32, CPU."""
    generator = torch.Generator().manual_seed(_generator_seed(index, "shared", use))
    return torch.randn(shape, generator=generator)
