"""Compresses an image with a model, and decodes what was compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm_cli.compression.bits import BitReader, BitWriter
from ddpm_cli.compression.codec import Plan, State, receive, send
from ddpm_cli.compression.container import Container, header_size
from ddpm_cli.data import images
from ddpm_cli.device import memory_format
from ddpm_cli.diffusion.noised_image import from_paper, to_paper
from ddpm_cli.errors import DataError
from ddpm_cli.models.ddpm import DDPM

__all__ = ["BLOCK_BITS", "STEPS", "Compressed", "compress", "decompress", "default_t"]

BLOCK_BITS = 14  # more would save few bits for much time, see docs/compression.md
OnStep = Callable[[int, int], None]  # called with the steps that are done and all steps
STEPS = 64  # those that carry too few bits are left out


@dataclass(frozen=True)
class Compressed:
    """data: the file. image: what it decodes to, (C, H, W) uint8. bits: of the code, without the header.

    t: the paper's, of the last step that was coded. ideal: bits of the ideal code for the same chain.
    """

    data: bytes
    image: Tensor
    bits: int
    t: int
    ideal: float


def default_t(T: int) -> int:
    """How far down the code goes if nobody says, the paper's t. Below 1 % of T, bits buy little that can be seen."""
    return max(1, T // 100)


def compress(
    model: DDPM,
    image: Tensor,
    t: int | None = None,
    most_bytes: int | None = None,
    block_bits: int = BLOCK_BITS,
    steps: int = STEPS,
    progress: OnStep = lambda done, total: None,
) -> Compressed:
    """Compress an image, (C, H, W) uint8 of the model's shape.

    t: the paper's, 1..T; code down to x_t. Default: `default_t`. most_bytes: of the file; it ends before a step that
    does not fit. block_bits: of the number of a candidate. steps: at most so many evaluations of the network.
    progress: called with the steps that are done and all steps. Raises DataError if not even the first step fits,
    ValueError if the shape is not the model's.
    """
    if tuple(image.shape) != model.shape:
        raise ValueError(f"the image is {tuple(image.shape)}, and the model's are {model.shape}")
    schedule = model.schedule
    plan = Plan(block_bits, min(steps, schedule.T), from_paper(default_t(schedule.T) if t is None else t))
    fingerprint = model.fingerprint()
    room = None if most_bytes is None else 8 * max(0, most_bytes - header_size(plan, most_bytes))
    stream = BitWriter(room)
    x_0 = _to_device(images.to_float(image)[None], model)
    total = len(plan.timesteps(schedule))
    states = []
    for state in send(model.denoiser, x_0, plan, stream):
        states.append(state)
        progress(len(states), total)
    if not states:
        raise DataError(f"--bytes {most_bytes}: too few for the header of a file and a first step")
    last = states[-1]
    data = Container(fingerprint, plan, stream.to_bytes()).to_bytes()
    return Compressed(data, _pixels(last), stream.count, to_paper(last.t), last.ideal)


def decompress(
    model: DDPM, file: Container, name: str, progress: OnStep = lambda done, total: None
) -> Iterator[tuple[State, Tensor]]:
    """The states of a compressed image, and the image that each shows, (C, H, W) uint8: the last is the best.

    name: of the file, in messages. Raises DataError if another model made it, or it is damaged or too short.
    """
    if not file.is_of(model.fingerprint()):
        raise DataError(
            f"{name}: was made with another model: its fingerprint is {file.fingerprint}…, "
            f"and that of this model is {model.fingerprint()[: len(file.fingerprint)]}…",
            "Give the model that compressed it with -m.",
        )
    if file.plan.last >= model.schedule.T or file.plan.steps > model.schedule.T:
        raise DataError(f"{name}: is damaged: its steps are not those of a model with T = {model.schedule.T}")
    like = _to_device(torch.zeros(1, *model.shape), model)
    total = len(file.plan.timesteps(model.schedule))
    states = receive(model.denoiser, like, file.plan, BitReader(file.stream))
    done = 0
    try:
        for done, state in enumerate(states, start=1):
            progress(done, total)
            yield state, _pixels(state)
    except ValueError as error:
        raise DataError(f"{name}: is damaged ({error})") from None
    if not done:
        raise DataError(f"{name}: ends before its first step")


def _to_device(x: Tensor, model: DDPM) -> Tensor:
    return x.to(model.device, memory_format=memory_format(model.device))


def _pixels(state: State) -> Tensor:
    return images.to_uint8(state.x_0)[0].cpu()
