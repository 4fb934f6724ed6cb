"""Progressive lossy coding: Algorithms 3 and 4 of the paper, with `random_coding` for the draws.

Sender and receiver run the same reverse process. Where sampling draws x_{t-1} from p(x_{t-1} | x_t), the sender picks
it near q(x_{t-1} | x_t, x_0) and sends which one it is. The receiver can stop at any step and show the predicted x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_cli.compression.bits import BitReader, BitWriter, EndOfBitsError
from ddpm_cli.compression.random_coding import CandidateBook
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.schedule import NoiseSchedule

__all__ = ["Plan", "State", "receive", "send"]


@dataclass(frozen=True)
class Plan:
    """What sender and receiver agree on before the first bit.

    block_bits: of the number of a candidate. steps: how many. last: the position in the schedule of the last one.
    """

    block_bits: int
    steps: int
    last: int

    def timesteps(self, schedule: NoiseSchedule) -> list[int]:
        """The steps, ascending, from `last` to T-1: even in log(1 + SNR), where SNR_t = abar_t / (1 - abar_t).

        For a Gaussian image, that is even in the rate. Steps that fall on the same t are one.
        """
        heights = -(1 - schedule.alphas_cumprod).log()  # log(1 + SNR), since 1 + SNR = 1 / (1 - abar); descending
        wanted = torch.linspace(float(heights[-1]), float(heights[self.last]), self.steps, dtype=torch.float64)
        return sorted({int((heights - height).abs().argmin()) for height in wanted})


class State(NamedTuple):
    """t: the network's step. x_0: the clean image predicted from x_t, (1, C, H, W). bits: of the code up to x_t.

    ideal: bits of the ideal code for this chain, the sum of KL(q || p) of its steps; 0 for the receiver.
    """

    t: int
    x_0: Tensor
    bits: int
    ideal: float


# Returns z of x_{t-1} = mean + sigma z, (size,) on the CPU. Arguments: the position of the step in the schedule, x_t
# (None before x_T), mean, sigma. Raises EndOfBitsError if there are no more bits.
_Draw = Callable[[int, Tensor | None, Tensor, float], Tensor]


def _chain(denoiser: Denoiser, x: Tensor, draw: _Draw) -> Iterator[tuple[int, Tensor]]:
    """The reverse process with draws of both sides: yields t and the predicted x_0 at every step.

    x: zeros, (1, C, H, W), on the device of the network. p has the variance beta~_t, that of q, whatever the model's
    own choice for sampling is: only the mean differs then, and the mean is all there is to send. The first draw is x_T,
    from p(x_T) = N(0, I).
    """
    schedule = denoiser.schedule
    mean, sigma, x_t = x, 1.0, None
    for t in reversed(range(schedule.T)):
        try:
            x_t = mean + sigma * draw(t, x_t, mean, sigma).view_as(x).to(x)
        except EndOfBitsError:
            return
        with torch.no_grad():
            prediction = denoiser(x_t, t)
        yield int(schedule.timesteps[t]), prediction.x_0
        mean, sigma = prediction.mean, math.exp(0.5 * float(schedule.posterior_log_variance[t]))


def send(denoiser: Denoiser, x_0: Tensor, plan: Plan, stream: BitWriter) -> Iterator[State]:
    """Algorithm 3: write an image to `stream`, step by step, until its last step or until the stream is full.

    x_0: (1, C, H, W) float32 in [-1, 1], on the device of the network. Each step is the number of its blocks, as a
    difference, and the number of a candidate for every block.
    """
    denoiser = denoiser.subsequence(plan.timesteps(denoiser.schedule))
    schedule = denoiser.schedule
    book = CandidateBook(plan.block_bits, x_0.numel())
    ideal, before = 0.0, 0

    def draw(t: int, x_t: Tensor | None, mean: Tensor, sigma: float) -> Tensor:
        nonlocal ideal, before
        if x_t is None:  # q(x_T | x_0); its variance 1 - abar_T counts as 1
            wanted = float(schedule.sqrt_alphas_cumprod[t]) * x_0
        else:
            wanted = schedule.posterior_mean(x_0, x_t, t + 1)
        v = ((wanted - mean) / sigma).flatten().cpu()
        kl = float(v.double().square().sum()) / 2 / math.log(2)
        blocks = book.blocks_for(kl)
        part = BitWriter()
        part.write_gamma(1 + _to_natural(blocks - before))
        z = book.encode(v, blocks, t, part)
        stream.extend(part)
        ideal, before = ideal + kl, blocks
        return z

    for t, predicted in _chain(denoiser, torch.zeros_like(x_0), draw):
        yield State(t, predicted, stream.count, ideal)


def receive(denoiser: Denoiser, like: Tensor, plan: Plan, stream: BitReader) -> Iterator[State]:
    """Algorithm 4: the states of `send`, as far as the stream goes. Yields none if it ends within x_T.

    like: (1, C, H, W) float32 zeros, on the device of the network. Raises ValueError if the stream is damaged.
    """
    denoiser = denoiser.subsequence(plan.timesteps(denoiser.schedule))
    book = CandidateBook(plan.block_bits, like.numel())
    before = 0

    def draw(t: int, x_t: Tensor | None, mean: Tensor, sigma: float) -> Tensor:
        nonlocal before
        blocks = before + _to_integer(stream.read_gamma(2 * book.size + 2) - 1)
        if not 0 <= blocks <= book.size:
            raise ValueError(f"a step has {blocks} blocks")
        before = blocks
        return book.decode(blocks, t, stream)

    for t, predicted in _chain(denoiser, like, draw):
        yield State(t, predicted, stream.count, 0.0)


def _to_natural(value: int) -> int:
    """0, -1, 1, -2, 2 … -> 0, 1, 2, 3, 4 …"""
    return 2 * value if value >= 0 else -2 * value - 1


def _to_integer(value: int) -> int:
    """The inverse of `_to_natural`."""
    return -(value + 1) // 2 if value % 2 else value // 2
