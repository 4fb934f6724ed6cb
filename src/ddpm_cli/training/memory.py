"""Memory of a device: what training needs, what is free, and what was used."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_cli.device import autocast
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import training_loss

if TYPE_CHECKING:
    from ddpm_cli.training.trainer import Trainer

__all__ = ["free_memory", "is_out_of_memory", "needed_memory", "peak_memory", "total_memory"]

# Copies of the parameters that take no memory on a CPU yet: Adam's moments do so when they are first written.
_MOMENTS, _GRADIENTS = 2, 1
_SPARE = 1.4  # measured on CPUs: memory of a step, divided by what it keeps for the backward pass


def is_out_of_memory(error: Exception) -> bool:
    words = ("out of memory", "can't allocate memory", "not enough memory", "could not create a")  # the last is oneDNN
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def needed_memory(trainer: Trainer, images: int) -> float:
    """Estimate the bytes that training needs on a CPU, besides those that the trainer has allocated.

    The memory kept for the backward pass has a constant part (weights in another precision) and a part per image. Both
    are measured with batches of two and of four.
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
    del loss  # only now: a freed address could be used again
    return sum(kept.values())


def free_memory() -> int | None:
    """Bytes that this process can still allocate, by machine, container and process limits; None if not known."""
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
            shared.append(most - used + cache)  # the system can free the file cache
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))  # processes of this run on this machine
    return min((*own, *(size // neighbours for size in shared if size is not None)), default=None)


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory, at most the limit of the container; None if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    sizes = [_in_meminfo("MemTotal:"), *(_number(group / "memory.max") for group in _control_groups())]
    return min((size for size in sizes if size is not None), default=None)


def _control_groups() -> Iterator[Path]:
    """The folders of this process's Linux control groups, for example of a container or a batch job."""
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


def peak_memory(device: torch.device) -> int:
    """Peak bytes of the device's memory that this process has used."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
