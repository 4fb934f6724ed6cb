"""Memory: what training needs, what its device has, and what was used."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddpm_cli import machine
from ddpm_cli.device import autocast
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.loss import training_loss

if TYPE_CHECKING:
    from ddpm_cli.training.trainer import Trainer

__all__ = ["is_out_of_memory", "needed_memory", "peak_memory", "total_memory"]

# Copies of the parameters that take no memory on a CPU yet: Adam's moments do so when they are first written.
_MOMENTS, _GRADIENTS = 2, 1
_SPARE = 1.4  # measured on CPUs: memory of a step, divided by what it keeps for the backward pass


def is_out_of_memory(error: Exception) -> bool:
    words = ["out of memory", "can't allocate memory", "not enough memory"]
    words += ["could not create a"]  # oneDNN
    words += ["unable to find an engine", "ALLOC_FAILED"]  # cuDNN, whose engines all lack memory to work in; cuBLAS
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


def needed_memory(trainer: Trainer, images: int) -> float:
    """Estimate the bytes that training needs on a CPU, besides those that the trainer has allocated.

    The memory kept for the backward pass has a constant part (weights in another precision) and a part per image. Both
    are measured with batches of one and of two.
    """
    one, two = (_kept(trainer, batch) for batch in (1, 2))
    each = two - one
    copies = (_GRADIENTS + _MOMENTS) * sum(parameter.nbytes for parameter in trainer.parameters)
    return trainer.checkpoint_bytes + copies + one - each + _SPARE * images * each


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
    # A compiled network keeps no more, and would be compiled for each of the two batches.
    with autocast(trainer.device, trainer.dtype), hooks, trainer.not_compiled():
        denoiser = Denoiser(trainer.unet, trainer.schedule, trainer.config.schedule)
        loss = training_loss(denoiser, x_0, t, x_0, trainer.config.train.loss)
    del loss  # only now: a freed address could be used again
    return sum(kept.values())


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory, at most the limit of the container; None if not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return machine.total_memory()


def peak_memory(device: torch.device) -> int:
    """Peak bytes of the device's memory that this process has used."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
