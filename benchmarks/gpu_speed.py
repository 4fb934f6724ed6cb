"""The part of gpu.py that measures speed: ddpm, diffusers tuned by hand, and diffusers as its users run it, in turn.

A contest has several sides, which do the same work with the same network. Every round lets each side do some steps, so
that a machine with changing speed slows all of them. The result is the median.

- ddpm: the loop of `ddpm train` between two checkpoints, with its reading of images, metrics and averages; and
  `DDPM.sample_batches`, with its noise from the CPU. With --precision auto.
- diffusers: the loops of `diffusers_loops`, tuned by hand and as its users run it.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

import diffusers_loops
from ddpm_cli import device as machine
from ddpm_cli.config import DataConfig, RunConfig, TrainConfig, UNetConfig
from ddpm_cli.data.pack import open_pack
from ddpm_cli.data.sources import open_source
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.nn.unet import UNet
from ddpm_cli.training.memory import is_out_of_memory
from ddpm_cli.training.metrics import Window
from ddpm_cli.training.presets import Preset
from ddpm_cli.training.trainer import Trainer
from diffusers_loops import Work, tf32

__all__ = [
    "OURS",
    "OURS_COMPILED",
    "TUNED",
    "USUAL",
    "Measured",
    "Model",
    "Side",
    "contest",
    "largest_that_fits",
    "open_trainer",
    "our_model",
    "plan",
    "sampling",
    "training",
]

OURS, OURS_COMPILED = "ddpm", "ddpm --compile"
TUNED, COMPILED, USUAL = "diffusers, tuned", "diffusers, tuned and compiled", "diffusers, as used"
_WARM = 3  # steps before anything is measured, in which libraries choose their kernels
_NEVER = 10**9


class Model(NamedTuple):
    """The network of a contest. size: of its images. images: to train on."""

    name: str
    preset: Preset
    size: int
    images: Path
    device: torch.device

    @property
    def config(self) -> UNetConfig:
        return self.preset.unet(self.size, 3)

    @property
    def network(self) -> dict[str, Any]:
        """The same, for diffusers."""
        return {name: value for name, value in self.config.to_dict().items() if not name.startswith("_")}


class Side(NamedTuple):
    """One side of a contest. build: loads its networks and returns its work, so that its memory can be measured.

    share: of the steps of a round that it does; the time of the others is computed from them. optional: whether the
    others are measured without it if it fails.
    """

    name: str
    build: Callable[[], Work]
    share: float = 1.0
    optional: bool = False


@dataclass(frozen=True)
class Measured:
    """What a side took. seconds: of a step, the median of the rounds. ratio: to ours, above 1 if ours is faster.

    steps: in a round, of those that were wanted. memory: peak bytes on the device; None on a CPU.
    """

    name: str
    seconds: float
    ratio: float
    rounds: int
    steps: int
    memory: int | None


def plan(steps: int, rounds: int, step_seconds: float, left: float) -> tuple[int, int]:
    """Steps of a round and rounds that fit into `left` seconds: first fewer rounds, then fewer steps; at least one.

    step_seconds: of a step of all sides together.
    """
    whole = steps * step_seconds
    if whole <= left:
        return steps, min(rounds, int(left / whole))
    return max(1, min(steps, int(left / step_seconds))), 1


def contest(sides: Sequence[Side], steps: int, rounds: int, seconds: float, device: torch.device) -> list[Measured]:
    """Measure all sides in turn, for about so many seconds. The first side is ours."""
    started = time.monotonic()
    ready = [one for side in sides if (one := _warm_up(side, device))]
    left = seconds - (time.monotonic() - started)
    done, rounds = plan(steps, rounds, sum(one.side.share * one.seconds for one in ready), left)
    counts = [max(1, round(one.side.share * done)) for one in ready]
    times: list[list[float]] = [[] for _ in ready]
    for _ in range(rounds):
        for one, count, taken in zip(ready, counts, times, strict=True):
            taken.append(_timed(one.work, count, device) / count)
    medians = [statistics.median(taken) for taken in times]
    ratios = [statistics.median(b / a for a, b in zip(times[0], taken, strict=True)) for taken in times]
    return [
        Measured(one.side.name, median, ratio, rounds, count, one.memory)
        for one, median, ratio, count in zip(ready, medians, ratios, counts, strict=True)
    ]


class _Ready(NamedTuple):
    """A side that is warm. seconds: of a step, about. memory: as in Measured."""

    side: Side
    work: Work
    seconds: float
    memory: int | None


def _warm_up(side: Side, device: torch.device) -> _Ready | None:
    """Build a side, and do its first steps. Returns None if it is optional and fails."""
    before = _reset_peak(device)
    try:
        work = side.build()
        work(_WARM)
        peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else None
        return _Ready(side, work, _timed(work, _WARM, device) / _WARM, peak)
    except Exception as error:
        if not side.optional:
            raise
        print(f"{side.name}: not measured: {error}", file=sys.stderr)
        return None


def _timed(work: Work, steps: int, device: torch.device) -> float:
    machine.synchronize(device)
    started = time.perf_counter()
    work(steps)
    machine.synchronize(device)
    return time.perf_counter() - started


def _reset_peak(device: torch.device) -> int:
    """Start to measure the peak memory of a device. Returns the bytes in use now."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def largest_that_fits(batch: int, measure: Callable[[int], list[Measured]], device: torch.device) -> tuple[int, Any]:
    """Measure with a batch, or with half of it if memory runs out, and so on. Returns the batch, and what was found."""
    while True:
        try:
            return batch, measure(batch)
        except (RuntimeError, MemoryError) as error:
            if batch == 1 or not is_out_of_memory(error):
                raise
        batch //= 2
        _reset_peak(device)  # after the error, which holds the tensors of all frames


def _sides(
    ours: Callable[[bool], Work], theirs: Callable[[bool, bool], Work], compiled: bool, share: float
) -> list[Side]:
    """The sides of a contest. ours: compiled -> work. theirs: (tuned, compiled) -> work.

    share: of the steps that diffusers as used does.
    """
    sides = [Side(OURS, lambda: ours(False)), Side(TUNED, lambda: theirs(True, False))]
    if compiled:
        sides.append(Side(OURS_COMPILED, lambda: ours(True), optional=True))
        sides.append(Side(COMPILED, lambda: theirs(True, True), optional=True))
    return [*sides, Side(USUAL, lambda: theirs(False, False), share)]


def training(model: Model, batch: int, folder: Path, compiled: bool) -> list[Side]:
    """The sides of a contest in training steps. folder: for temporary files."""

    def theirs(tuned: bool, compiled: bool) -> Work:
        return diffusers_loops.training(model.network, batch, model.device, tuned, compiled)

    return _sides(lambda compiled: _our_training(model, batch, folder, compiled), theirs, compiled, share=0.5)


def sampling(model: Model, images: int, sampler: str | None, compiled: bool) -> list[Side]:
    """The sides of a contest in steps of the reverse process. Theirs is always ancestral sampling (DDPMScheduler).

    sampler: ours; None is the default one.
    """

    def theirs(tuned: bool, compiled: bool) -> Work:
        return diffusers_loops.sampling(model.network, images, model.device, tuned, compiled)

    return _sides(lambda compiled: _our_sampling(model, images, sampler, compiled), theirs, compiled, share=0.1)


def open_trainer(model: Model, batch: int, folder: Path, compiled: bool = False) -> tuple[Trainer, Window]:
    """A run that neither saves nor draws, and the sums of its metrics."""
    data = DataConfig(images=str(model.images), size=model.size, channels=3)
    pack = open_pack(open_source(model.images, folder), data, folder)
    preset = model.preset
    settings = TrainConfig(steps=_NEVER, batch_size=batch, lr=preset.lr, save_every=_NEVER, sample_every=_NEVER)
    config = RunConfig("benchmark", "benchmark", data, settings, model.config, preset.schedule())
    dtype = machine.pick_dtype("auto", model.device)
    trainer = Trainer(folder, config, pack, model.device, dtype, compiled=compiled)
    return trainer, Window(config, folder, model.device, trainer.world, 0, 0.0)


def _our_training(model: Model, batch: int, folder: Path, compiled: bool) -> Work:
    trainer, window = open_trainer(model, batch, folder, compiled)

    def work(steps: int) -> None:
        last = trainer.step + steps
        with tf32(products=False):
            for _ in trainer._steps(window, lambda: trainer.step >= last):
                pass

    return work


def our_model(model: Model) -> DDPM:
    """With PyTorch's initial weights, in the precision that `ddpm sample` chooses."""
    unet = UNet(model.config).eval().requires_grad_(False)
    dtype = machine.pick_dtype("auto", model.device)
    return DDPM(machine.place(unet, model.device, dtype), model.preset.schedule())


def _our_sampling(model: Model, images: int, sampler: str | None, compiled: bool) -> Work:
    drawn = our_model(model)
    if compiled:
        drawn.compile()

    def work(steps: int) -> None:
        plan = drawn.sampling(sampler or "dpm++", steps)
        with tf32(products=False):
            for _ in drawn.sample_batches(range(images), plan, batch_size=images):
                pass

    return work
