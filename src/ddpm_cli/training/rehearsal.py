"""Tries a run before it starts: do a step and a preview fit into memory, and how long will the run take?"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_cli.data.pack import Pack
from ddpm_cli.device import autocast, memory_format, synchronize
from ddpm_cli.diffusion.samplers import plan_sampling
from ddpm_cli.errors import TrainingError
from ddpm_cli.machine import free_memory
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.training import previews
from ddpm_cli.training.memory import is_out_of_memory, needed_memory, peak_memory
from ddpm_cli.training.trainer import Trainer

__all__ = ["BlankPack", "Rehearsal", "measure", "rehearse"]

_SECONDS = 3.0  # the time for measuring steps; a step that takes longer is not tried twice
_SHORT = 0.5  # seconds of a step of few images that are short enough to try more images
_FEW = 2  # images of a small step, from which the time of a slow step is estimated
_AMPLE = 2  # times the memory that a step needs, by the estimate: with so much, it is not tried on a CPU


class BlankPack(Pack):
    """Black images, for measurements that do not depend on the content."""

    def __init__(self, count: int, shape: tuple[int, int, int], held_out: int = 0) -> None:
        self.folder, self.fingerprint = Path(), ""
        self.held_out = held_out
        self.count, self.shape = count, shape
        self.mean = [0.0] * shape[0]
        self.left_out, self.unread = [], []

    def __getitem__(self, indices: Tensor) -> Tensor:
        return torch.zeros((len(indices), *self.shape), dtype=torch.uint8)

    def prefetch(self, indices: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Rehearsal:
    """The measurements of a run. first_step: where it starts or resumes. memory: peak bytes of this process.
    steps_per_second: of training. seconds: for the rest of the run, with its previews."""

    first_step: int
    memory: int
    steps_per_second: float
    seconds: float


class _Seconds(NamedTuple):
    """Times on this rank, or their ratio. step: of a training step. sample: of a sampler step of a preview."""

    step: float
    sample: float


def rehearse(trainer: Trainer, sample_every_asked: bool = False) -> None:
    """Try the operations that need the most memory, undo them, and plan the previews. Every rank must call it.

    Raises TrainingError if they do not fit, with values of --accumulate and --batch-size that do. On CPUs with ample
    memory it only estimates what they need. A network that is compiled is compiled here.
    """
    images, parts = _largest_part(trainer)
    seconds = _require_memory(trainer, images, parts, compute=True)
    # On a GPU the first try is many times slower than the next, and so is one that compiles the network.
    on_gpu = trainer.device.type != "cpu"
    if on_gpu and (trainer.compiled or trainer.world.on_main(lambda: seconds.step < _SECONDS)):
        seconds = trainer.world.on_all(lambda: _try(trainer, images))
    _plan_previews(trainer, _Seconds(seconds.step * parts, seconds.sample), sample_every_asked)


def measure(trainer: Trainer, sample_every_asked: bool = False) -> Rehearsal:
    """Measure the memory, the speed and the time of a run. Every rank must call it.

    The trainer cannot be used afterwards. A step that is slow on a CPU is not tried: its time is estimated from a step
    of few images, unless the network is compiled, which takes longer. Raises TrainingError as `rehearse` does.
    """
    images, parts = _largest_part(trainer)
    slow = False
    if trainer.device.type == "cpu" and not trainer.compiled:
        _require_memory(trainer, images, parts, compute=False)
        few = min(_FEW, images)
        _try(trainer, few)  # the first one is slow
        found = _try(trainer, few)
        while few < images and found.step < _SHORT:  # the more images, the better the estimate
            few = min(4 * few, images)
            found = _try(trainer, few)
        seconds = _Seconds(found.step * images * parts / few, found.sample)
        slow = trainer.world.on_main(lambda: seconds.step > _SECONDS)
    if slow:
        _plan_previews(trainer, seconds, sample_every_asked)
        memory = peak_memory(trainer.device) + round(needed_memory(trainer, images))
        rate = 1 / trainer.world.on_main(lambda: seconds.step)
    else:
        rehearse(trainer, sample_every_asked)
        rate = _steps_per_second(trainer)
        copied = trainer.checkpoint_bytes if trainer.device.type == "cpu" else 0  # while a checkpoint is written
        memory = peak_memory(trainer.device) + copied
    settings, first = trainer.config.train, trainer.first_step
    share = trainer.previews.share or 0.0
    return Rehearsal(first, memory, rate, (settings.steps - first) / rate / (1 - share))


def _largest_part(trainer: Trainer) -> tuple[int, int]:
    """The largest number of images in a forward pass of a rank, and the number of parts of its batch."""
    settings = trainer.config.train
    rows = math.ceil(settings.batch_size / trainer.world.size)  # the same on all ranks
    parts = min(settings.accumulate, rows)
    return math.ceil(rows / parts), parts


def _steps_per_second(trainer: Trainer) -> float:
    """Train for some seconds to measure the speed."""
    trainer.unite()
    trainer.train_step()  # the first one is slow
    synchronize(trainer.device)
    started, steps = time.perf_counter(), 0
    enough = False
    while not enough:
        trainer.train_step()
        synchronize(trainer.device)
        steps += 1
        [enough] = trainer.world.any(trainer.world.is_main and time.perf_counter() - started > _SECONDS)
    return steps / (time.perf_counter() - started)


def _plan_previews(trainer: Trainer, seconds: _Seconds, asked: bool) -> None:
    """Plan the previews from the times on rank 0."""
    evaluations = plan_sampling(trainer.schedule, trainer.pack.shape[-1]).evaluations
    cost = trainer.world.on_main(lambda: evaluations * seconds.sample / seconds.step)
    trainer.previews = previews.plan_previews(trainer.config.train, trainer.first_step, cost, asked)


def _require_memory(trainer: Trainer, images: int, parts: int, compute: bool) -> _Seconds:
    """Raises TrainingError if this many images at a time do not fit, with values that do. Returns the times."""
    if seconds := _fits(trainer, images, compute):
        return seconds
    world, settings = trainer.world, trainer.config.train
    rows = images * parts
    message = f"out of memory: {images} images at a time do not fit on {trainer.device}"
    advice = "Not even one image fits: a new run with a smaller --size or --preset needs less."
    while parts < rows:
        parts = min(2 * parts, rows)
        fewer = math.ceil(rows / parts)
        if _fits(trainer, fewer, compute):
            smaller = max(1, settings.batch_size * fewer // images)
            advice = f"--accumulate {parts} fits, and the gradient is the same. --batch-size {smaller} fits too."
            break
    raise world.reported_once(TrainingError(message, advice))


def _fits(trainer: Trainer, images: int, compute: bool) -> _Seconds | None:
    """Whether every rank can compute this many images at a time, and a preview while the gradients are in memory.

    compute: try it if the memory is not ample, and return the times on this rank; else only compare the estimate with
    the free memory. Returns None if it does not fit.
    """

    def fits_here() -> _Seconds | None:
        try:
            ample = _require_free(trainer, images) and not trainer.compiled
            return _try(trainer, images) if compute and not ample else _usual(images)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return None

    seconds = trainer.world.on_all(fits_here)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    [fails_somewhere] = trainer.world.any(seconds is None)
    return None if fails_somewhere else seconds


def _require_free(trainer: Trainer, images: int) -> bool:
    """Returns whether a CPU has ample memory, by the estimate.

    Raises MemoryError if it lacks memory: allocating would succeed, and using it would kill the process.
    """
    free = free_memory() if trainer.device.type == "cpu" else None
    if free is None:
        return False
    needed = needed_memory(trainer, images)
    if needed > free:
        raise MemoryError
    return _AMPLE * needed <= free


def _usual(images: int, step: float = 1.0) -> _Seconds:
    """A step on a CPU. A sampler step of a preview is a forward pass, which takes a third of a training step."""
    return _Seconds(step, step / 3 * previews.IMAGES / images)


def _try(trainer: Trainer, images: int) -> _Seconds:
    """Do a forward and a backward pass and a sampler step, and return their times.

    On CPUs the sampler step is not done, since it needs no memory to speak of.
    """
    try:
        started = time.perf_counter()
        x_0 = torch.zeros((images, *trainer.pack.shape), device=trainer.device)
        x_0 = x_0.contiguous(memory_format=memory_format(trainer.device))  # as in training, or it is compiled again
        trainer.backward(x_0, torch.zeros(images, dtype=torch.int64, device=trainer.device), torch.randn_like(x_0))
        synchronize(trainer.device)
        step = time.perf_counter() - started
        on_cpu = trainer.device.type == "cpu"
        return _usual(images, step) if on_cpu else _Seconds(step, _sampler_seconds(trainer))
    finally:
        trainer.zero_grad()


def _sampler_seconds(trainer: Trainer) -> float:
    """The time of a sampler step of a preview."""
    model = DDPM(trainer.averaged, trainer.config.schedule)
    x_T = torch.zeros(previews.IMAGES, *model.shape)
    started = time.perf_counter()
    with autocast(trainer.device, trainer.dtype):
        for _ in model.sample_loop(x_T, "dpm++", steps=1):
            pass
    synchronize(trainer.device)
    return time.perf_counter() - started
