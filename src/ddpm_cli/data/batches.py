"""The order in which a run sees its images."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_cli.rng import data_order

__all__ = ["Batches"]


class Batches:
    """The order in which a run sees its images: a new permutation every epoch, one epoch running into the next.

    Batch number `step` depends only on (seed, step) and the sizes, so a resumed run continues where it stopped.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            self._orders[epoch] = data_order(self.seed, epoch, self.count)
        return self._orders[epoch]

    def __getitem__(self, step: int) -> Tensor:
        """The images of training step `step`, counted from 0: (batch_size,) int64."""
        start, end = step * self.batch_size, (step + 1) * self.batch_size
        epochs = range(start // self.count, (end - 1) // self.count + 1)
        runs = (self._order(e)[max(start - e * self.count, 0) : end - e * self.count] for e in epochs)
        return torch.cat(list(runs))
