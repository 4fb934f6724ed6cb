"""Chooses the device, the precision and the memory format of tensors.

Choices depend on what the hardware reports, never on the name of the platform.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddpm_cli.errors import UsageError
from ddpm_cli.heap import keep_freed_memory
from ddpm_cli.names import PRECISIONS, check_name
from ddpm_cli.text import counted

__all__ = [
    "autocast",
    "describe",
    "memory_format",
    "pick_device",
    "pick_dtype",
    "place",
    "send",
    "synchronize",
]

_Module = TypeVar("_Module", bound=nn.Module)


def pick_device(name: str = "auto") -> torch.device:
    """auto | cpu | cuda | cuda:N | mps -> an available device; auto prefers cuda, then mps, then cpu.

    For a CPU, the process keeps the memory that it frees from now on (`heap`).
    Raises UsageError if this machine does not have the device.
    """
    device = _find_device(name)
    if device.type == "cpu":
        keep_freed_memory()
    return device


def _find_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UsageError(f"--device {name} is not a device", "Use auto, cpu, cuda, cuda:N or mps.")
    if device.type == "cuda" and not (torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()):
        raise UsageError(
            f"--device {name}: PyTorch finds {torch.cuda.device_count()} CUDA devices here",
            "Use --device cpu, or install a CUDA build of PyTorch and check nvidia-smi.",
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch finds no Apple GPU here", "Use --device cpu.")
    return device


def pick_dtype(precision: str, device: torch.device, exact: bool = False) -> torch.dtype:
    """auto | fp32 | bf16 -> the dtype of matrix products: of the weights for sampling, of autocast for training.

    auto is bf16 if the hardware multiplies it faster than float32: CUDA devices with bf16 units, CPUs with AMX tiles or
    AVX512-BF16 dot products. fp32 also turns TF32 off in this process, which makes convolutions on CUDA devices more
    precise and slower. exact: the network needs float32 (`ScheduleConfig.needs_float32`), so auto is fp32.
    Raises UsageError for another name, and for bf16 if the network needs float32.
    """
    check_name("--precision", precision, PRECISIONS)
    if exact and precision == "bf16":
        raise UsageError("--precision bf16: a network that predicts the mean of x_{t-1} needs float32", "Leave it out.")
    if precision == "fp32" or exact:
        # TF32 rounds the inputs of products to a mantissa of 10 bits, which is not float32.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        # PyTorch before 2.10 does not report the units of a CPU. float32 works everywhere, but is slower on some.
        known = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")
        units = torch.cpu.get_capabilities() if known else {}
        fast = any(units.get(unit, False) for unit in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last on CUDA, for tensor cores. On CPUs it is no faster, and rounds differently for each batch size."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def place(module: _Module, device: torch.device, dtype: torch.dtype = torch.float32) -> _Module:
    """Move a network to a device, with this dtype and the memory format of the device."""
    return module.to(device=device, dtype=dtype, memory_format=memory_format(device))  # type: ignore[call-overload, no-any-return]


def send(x: Tensor, like: Tensor) -> Tensor:
    """A tensor on the device and in the dtype of another one.

    On the way from the CPU to a CUDA device nobody waits: the CPU goes on, and the device copies in its turn.
    """
    if x.device.type == "cpu" and like.device.type == "cuda":
        return x.pin_memory().to(like, non_blocking=True)  # from pageable memory, CUDA would wait for earlier work
    return x.to(like)


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """A context for matrix products in `dtype` with float32 weights, to train in bf16."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """The device and precision in words, for the header of a command: `cpu (2 threads), bf16`."""
    words = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)}), {words}"
    threads = torch.get_num_threads()
    cpu = f"{device} ({counted(threads, 'thread')}), {words}"
    return cpu if device.type == "cpu" else f"{device}, {words}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that time can be measured."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
