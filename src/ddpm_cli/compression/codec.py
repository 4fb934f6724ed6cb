"""Progressive lossy coding: Algorithms 3 and 4 of the paper, with `random_coding` for the draws.

Sender and receiver run the same reverse process. Where sampling draws x_{t-1} from p(x_{t-1} | x_t), the sender picks
it near q(x_{t-1} | x_t, x_0) and sends which one it is. The receiver can stop at any step and show the predicted x_0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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


class _Step(NamedTuple):
    """A possible step of the reverse process: to position t, by x_t = mean + sigma z.

    mean, sigma: of p. wanted: from an x_0, the mean of q for this step, (1, C, H, W). first: whether t is T; this
    step cannot be left out.
    """

    t: int
    mean: Tensor
    sigma: float
    wanted: Callable[[Tensor], Tensor]
    first: bool = False


# Returns z of a step, (size,) on the CPU; None leaves the step out. Raises EndOfBitsError if there are no more bits.
_Draw = Callable[[_Step], Tensor | None]


def _chain(denoiser: Denoiser, plan: Plan, like: Tensor, draw: _Draw) -> Iterator[tuple[int, Tensor]]:
    """The reverse process of both sides: yields t and the predicted x_0 after every step that is not left out.

    like: (1, C, H, W), on the device of the network. A step that is left out makes the next one longer. The mean of
    p is that of q for the predicted x_0. Its variance is that of q too, beta~_t, whatever the model samples with:
    then only the mean is left to send. The first step is to x_T, from p(x_T) = N(0, I).
    """
    schedule = denoiser.schedule
    last, *rest = reversed(plan.timesteps(schedule))
    step = _Step(last, torch.zeros_like(like), 1.0, lambda x_0: float(schedule.sqrt_alphas_cumprod[last]) * x_0, True)
    while True:
        try:
            z = draw(step)
        except EndOfBitsError:
            return
        if z is not None:
            t, x_t = step.t, step.mean + step.sigma * z.view_as(like).to(like)
            with torch.no_grad():
                predicted = denoiser(x_t, t).x_0
            yield int(schedule.timesteps[t]), predicted
        if not rest:
            return
        s = rest.pop(0)
        both = schedule.subsequence([s, t])  # from t to s is one step of this schedule
        wanted = partial(both.posterior_mean, x_t=x_t, t=1)
        step = _Step(s, wanted(predicted), math.exp(0.5 * float(both.posterior_log_variance[1])), wanted)


def send(denoiser: Denoiser, x_0: Tensor, plan: Plan, stream: BitWriter) -> Iterator[State]:
    """Algorithm 3: write an image to `stream`, step by step, until its last step or until the stream is full.

    x_0: (1, C, H, W) float32 in [-1, 1], on the device of the network. For each step there is a 0 if it has no blocks;
    else a 1, the change of their number, and the number of a candidate for every block.
    """
    book = CandidateBook(plan.block_bits, x_0.numel())
    ideal, before = 0.0, 1

    def draw(step: _Step) -> Tensor | None:
        nonlocal ideal, before
        v = ((step.wanted(x_0) - step.mean) / step.sigma).flatten().cpu()
        kl = float(v.double().square().sum()) / 2 / math.log(2)
        blocks = book.blocks_for(kl)
        part = BitWriter()
        part.write(int(blocks > 0), 1)
        if blocks:
            part.write_gamma(1 + _to_natural(blocks - before))
            before = blocks
        sent = book.encode(v, blocks, step.t, part) if blocks or step.first else None
        stream.extend(part)
        ideal += kl if sent is not None else 0.0
        return sent

    for t, predicted in _chain(denoiser, plan, x_0, draw):
        yield State(t, predicted, stream.count, ideal)


def receive(denoiser: Denoiser, like: Tensor, plan: Plan, stream: BitReader) -> Iterator[State]:
    """Algorithm 4: the states of `send`, as far as the stream goes. Yields none if it ends within x_T.

    like: (1, C, H, W) float32, on the device of the network. Raises ValueError if the stream is damaged.
    """
    book = CandidateBook(plan.block_bits, like.numel())
    before = 1

    def draw(step: _Step) -> Tensor | None:
        nonlocal before
        if not stream.read(1):
            return book.decode(0, step.t, stream) if step.first else None
        before += _to_integer(stream.read_gamma(2 * book.size + 2) - 1)
        if not 1 <= before <= book.size:
            raise ValueError(f"a step has {before} blocks")
        return book.decode(before, step.t, stream)

    for t, predicted in _chain(denoiser, plan, like, draw):
        yield State(t, predicted, stream.count, 0.0)


def _to_natural(value: int) -> int:
    """0, -1, 1, -2, 2 … -> 0, 1, 2, 3, 4 …"""
    return 2 * value if value >= 0 else -2 * value - 1


def _to_integer(value: int) -> int:
    """The inverse of `_to_natural`."""
    return -(value + 1) // 2 if value % 2 else value // 2
