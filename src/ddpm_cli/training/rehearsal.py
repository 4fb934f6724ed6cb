"""A run tried before it begins: do its largest step and a preview fit into memory, and how long will it all take?"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm_cli.data.pack import Pack
from ddpm_cli.device import autocast, synchronize
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import training_loss
from ddpm_cli.errors import TrainingError
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.training.trainer import PREVIEW_IMAGES, PREVIEW_STEPS, Trainer

__all__ = ["BlankPack", "Rehearsal", "measure", "rehearse", "total_memory"]

# Copies of the parameters that are not in memory yet on a processor: Adam's moments before they are first written to.
_MOMENTS, _GRADIENTS = 2, 1
_SPARE = 1.4  # what a step was seen to need on a processor, over what is saved for the backward pass
_SECONDS = 3.0  # that steps are timed for


class BlankPack(Pack):
    """Images that are all black, where nobody needs what is in them."""

    def __init__(self, count: int, shape: tuple[int, int, int]) -> None:
        self.folder, self.fingerprint = Path(), ""
        self.count, self.shape = count, shape
        self.mean = [0.0] * shape[0]
        self.left_out, self.unread = [], []

    def __getitem__(self, indices: Tensor) -> Tensor:
        return torch.zeros((len(indices), *self.shape), dtype=torch.uint8)

    def prefetch(self, indices: Tensor) -> None:
        pass


@dataclass(frozen=True)
class Rehearsal:
    """first_step: where the run goes on. memory: bytes at the peak, of this process. steps_per_second: of training.
    seconds: of what is left of the run, with its previews."""

    first_step: int
    memory: int
    steps_per_second: float
    seconds: float


def rehearse(trainer: Trainer) -> None:
    """Do what needs the most memory, and leave no trace of it. All processes must call it.

    Raises TrainingError, with the parts and the size of a batch that would fit, if it does not.
    """
    world, settings = trainer.world, trainer.config.train
    rows = math.ceil(settings.batch_size / world.size)  # the same number in all, so that all try the same
    parts = min(settings.accumulate, rows)
    images = math.ceil(rows / parts)
    if _fits(trainer, images):
        return
    message = f"out of memory: {images} images at a time do not fit on {trainer.device}"
    while parts < rows:
        parts = min(2 * parts, rows)
        fewer = math.ceil(rows / parts)
        if _fits(trainer, fewer):
            smaller = max(1, settings.batch_size * fewer // images)
            advice = f"--accumulate {parts} fits, and learns the same. --batch-size {smaller} fits too."
            break
    else:
        advice = "Not even one does: a new run with a smaller --size or --preset needs less."
    raise world.reported_once(TrainingError(message, advice))


def measure(trainer: Trainer) -> Rehearsal:
    """Rehearse, and train for some seconds: the trainer is of no other use afterwards. All processes must call it."""
    settings = trainer.config.train
    first = trainer.step
    rehearse(trainer)
    preview = min(PREVIEW_STEPS, trainer.schedule.T) * _sampler_seconds(trainer)
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
    rate = steps / (time.perf_counter() - started)
    previews = math.ceil(settings.steps / settings.sample_every) - first // settings.sample_every
    copied = trainer.checkpoint_bytes if trainer.device.type == "cpu" else 0  # while a checkpoint is written
    return Rehearsal(
        first_step=first,
        memory=_peak(trainer.device) + copied,
        steps_per_second=rate,
        seconds=(settings.steps - first) / rate + previews * 2 * preview,
    )


def _fits(trainer: Trainer, images: int) -> bool:
    """Whether every process can compute so many images at a time, and a preview with the gradients in memory."""

    def fits_here() -> bool:
        try:
            _try(trainer, images)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            return False
        finally:
            trainer.optimizer.zero_grad(set_to_none=True)
        return True

    fits = trainer.world.on_all(fits_here)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    return not trainer.world.any(not fits)[0]


def _try(trainer: Trainer, images: int) -> None:
    if trainer.device.type == "cpu" and (free := _free()) is not None and _need(trainer, images) > free:
        raise MemoryError  # asking for it would succeed, and using it would have the process killed
    x_0 = torch.zeros((images, *trainer.pack.shape), device=trainer.device)
    trainer.backward(x_0, torch.zeros(images, dtype=torch.int64, device=trainer.device), torch.randn_like(x_0))
    _sampler_seconds(trainer)


def _sampler_seconds(trainer: Trainer) -> float:
    """How long a step of a preview takes."""
    model = DDPM(trainer.averaged, trainer.config.schedule)
    x_T = torch.zeros(PREVIEW_IMAGES, *model.shape)
    started = time.perf_counter()
    with autocast(trainer.device, trainer.dtype):
        for _ in model.sample_loop(x_T, steps=1, noise=lambda: x_T):
            pass
    synchronize(trainer.device)
    return time.perf_counter() - started


def _is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "could not create a")  # the last is oneDNN
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def _need(trainer: Trainer, images: int) -> float:
    """Bytes that training needs on a processor, besides those that the trainer has: an estimate.

    What is kept for the backward pass is a part that does not depend on the images (weights in another precision), and
    one that grows with them: seen from batches of two and of four.
    """
    two, four = (_kept(trainer, batch) for batch in (2, 4))
    each = (four - two) / 2
    copies = (_GRADIENTS + _MOMENTS) * sum(parameter.nbytes for parameter in trainer.parameters)
    return trainer.checkpoint_bytes + copies + two - 2 * each + _SPARE * images * each


def _kept(trainer: Trainer, images: int) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    own = {parameter.untyped_storage().data_ptr() for parameter in trainer.parameters}
    kept: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    x_0, t = torch.zeros((images, *trainer.pack.shape)), torch.zeros(images, dtype=torch.int64)
    hooks = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
    with autocast(trainer.device, trainer.dtype), hooks:
        loss = training_loss(Denoiser(trainer.unet, trainer.schedule, trainer.config.schedule), x_0, t, x_0)
    del loss  # not before: of what is freed the address may come again
    return sum(kept.values())


def _free() -> int | None:
    """Bytes that this process can still get, of the machine, of its containers, of its limits; None if nobody says."""
    shared = [_in_meminfo("MemAvailable:")]
    used_of = dict(_pairs(Path("/proc/self/status")))
    own = []
    for kind, key in ((resource.RLIMIT_AS, "VmSize:"), (resource.RLIMIT_DATA, "VmData:")):
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY and key in used_of:
            own.append(limit - used_of[key] * 1024)
    for group in _control_groups():
        most, used = (_number(group / f"memory.{name}") for name in ("max", "current"))
        if most is not None and used is not None:
            cache = next((size for key, size in _pairs(group / "memory.stat") if key == "inactive_file"), 0)
            shared.append(most - used + cache)  # the cache of files makes room when it is asked to
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this run on this machine
    return min((*own, *(size // neighbours for size in shared if size is not None)), default=None)


def total_memory(device: torch.device) -> int | None:
    """Bytes of memory that the device has, and that this process may have; None if nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    sizes = [_in_meminfo("MemTotal:"), *(_number(group / "memory.max") for group in _control_groups())]
    return min((size for size in sizes if size is not None), default=None)


def _control_groups() -> Iterator[Path]:
    """The folders of Linux's control groups that this process is in: a container's, a batch job's."""
    root = Path("/sys/fs/cgroup")
    for line in _lines(Path("/proc/self/cgroup")):
        if line.startswith("0::/"):
            group = root / line.removeprefix("0::/")
            yield from (folder for folder in (group, *group.parents) if folder.is_relative_to(root))


def _in_meminfo(key: str) -> int | None:
    return next((size * 1024 for name, size in _pairs(Path("/proc/meminfo")) if name == key), None)


def _number(path: Path) -> int | None:
    return next((int(line) for line in _lines(path) if line.isdigit()), None)  # `max` where there is no limit


def _pairs(path: Path) -> Iterator[tuple[str, int]]:
    for line in _lines(path):
        match line.split():
            case [key, number, *_] if number.isdigit():
                yield key, int(number)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # no Linux, or an older one
        return []


def _peak(device: torch.device) -> int:
    """Bytes of the device's memory that this process has had at its peak."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
