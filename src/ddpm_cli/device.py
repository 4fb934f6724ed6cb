"""Where and how tensors are computed: the device, the precision, and the random numbers.

Everything is chosen by asking the machine what it can do, never by the name of its platform.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddpm_cli.errors import UsageError

__all__ = [
    "ImageNoise",
    "autocast",
    "describe",
    "memory_format",
    "pick_device",
    "pick_dtype",
    "place",
    "seed_everything",
    "synchronize",
    "training_noise",
]

_Module = TypeVar("_Module", bound=nn.Module)
_BLOCK = 64  # rows of a batch whose noise comes from one generator


def pick_device(name: str = "auto") -> torch.device:
    """auto | cpu | cuda | cuda:N | mps -> a device that is there; auto takes cuda before mps before cpu.

    Raises UsageError if the device asked for is not on this machine.
    """
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


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """auto | fp32 | bf16 -> the dtype that a network computes in: its weights, to sample; under autocast, to train.

    auto is bf16 where the hardware multiplies it faster than float32: CUDA devices with bf16 units, processors with AMX
    tiles or AVX512-BF16 dot products. Raises UsageError on another word.
    """
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision {precision} is not a precision", "Use auto, fp32 or bf16.")
    if precision != "auto":
        return torch.float32 if precision == "fp32" else torch.bfloat16
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
        fast = any(units.get(unit, False) for unit in ("amx_bf16", "avx512_bf16"))
    return torch.bfloat16 if fast else torch.float32


def memory_format(device: torch.device) -> torch.memory_format:
    """channels_last where tensor cores want it; on a CPU it measured no faster, and rounds by batch size."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def place(module: _Module, device: torch.device, dtype: torch.dtype = torch.float32) -> _Module:
    """Move a network to its device, in the dtype and the memory format it runs best in there."""
    return module.to(device=device, dtype=dtype, memory_format=memory_format(device))  # type: ignore[call-overload, no-any-return]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Matrix products in `dtype` over float32 weights: how a network is trained in bf16."""
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def describe(device: torch.device, dtype: torch.dtype) -> str:
    """The device and precision in words, for the header of a command: `cpu (2 threads), bf16`."""
    words = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)}), {words}"
    threads = torch.get_num_threads()
    cpu = f"{device} ({threads} thread{'s' if threads > 1 else ''}), {words}"
    return cpu if device.type == "cpu" else f"{device}, {words}"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given, so that a clock can be read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _generator_seed(index: int, *key: object) -> int:
    """A 32-bit seed for item `index` of the stream named by `key`; different items of a stream never share one.

    PyTorch's CPU generator uses 32 bits of its seed. A hash of the index would collide by the birthday paradox within
    50,000 images, so the stream is hashed to a place in the ring of seeds, and its items follow one another there.
    """
    start = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=4).digest(), "big")
    return (start + index) % 2**32


def seed_everything(seed: int, use: str, index: int = 0) -> None:
    """Make what is drawn from PyTorch's own generators a function of (seed, use, index)."""
    torch.manual_seed(_generator_seed(index, use, seed))


def training_noise(
    seed: int, step: int, batch_size: int, rows: range, shape: tuple[int, int, int], T: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """What Algorithm 1 draws for some rows of the batch of a step.

    Returns `mirrored` (B,) bool, each with probability 1/2; t (B,) int64, uniform in [0, T); eps (B, C, H, W) from
    N(0, I). Row i of step k gets what (seed, k, i) says, whoever draws it: several processes draw what one would, and a
    resumed run what the unbroken one did. Rows are drawn in blocks, so nobody draws much more than his own.
    """
    generator = torch.Generator(device)
    blocks = range(rows.start // _BLOCK, -(-rows.stop // _BLOCK))
    drawn = []
    for block in blocks:
        generator.manual_seed(_generator_seed(step * -(-batch_size // _BLOCK) + block, "train", seed))
        n = min(_BLOCK, batch_size - block * _BLOCK)
        mirrored = torch.rand(n, device=device, generator=generator) < 0.5
        t = torch.randint(T, (n,), device=device, generator=generator)
        eps = torch.randn((n, *shape), device=device, generator=generator)
        mine = slice(max(rows.start - block * _BLOCK, 0), rows.stop - block * _BLOCK)
        drawn.append((mirrored[mine], t[mine], eps[mine]))
    mirrored, t, eps = (torch.cat(parts) for parts in zip(*drawn, strict=True))
    return mirrored, t, eps


class ImageNoise:
    """The noise of some images of one seed: each call draws the next (B, C, H, W), float32 on the CPU, from N(0, I).

    Image i has a generator of its own, so what it gets depends on (seed, i) alone: not on the batch it is in, nor on
    the device. `stream` names the use; two uses of one seed are independent.
    """

    def __init__(self, seed: int, indices: Sequence[int], shape: tuple[int, int, int], stream: str = "reverse") -> None:
        self.shape = shape
        self._generators = [torch.Generator().manual_seed(_generator_seed(index, stream, seed)) for index in indices]

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=generator) for generator in self._generators])
