"""A noised image as a safetensors file: the exact x_t with its t, seed and schedule, to pass between commands."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.config.strict import Strict, at_least
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.errors import DataError, ModelError
from ddpm_cli.files import parse_json

__all__ = ["Noised", "from_paper", "to_paper"]

_LUMA = (0.299, 0.587, 0.114)  # of R, G and B in gray (ITU-R 601), as in Pillow


def from_paper(t: int) -> int:
    """The paper's t (1..T; 0 is the clean image) -> the code's (0..T-1; -1)."""
    return t - 1


def to_paper(t: int) -> int:
    """The code's t (0..T-1; -1 is the clean image) -> the paper's (1..T; 0)."""
    return t + 1


@dataclass(frozen=True)
class Noised:
    """x_t: (1, C, H, W) float32. t: the paper's, 0..T. seed: of its noise. schedule: that of its noise.

    On disk it is a safetensors file with one tensor, `x_t`, and the rest as JSON under the metadata key `ddpm`.
    """

    x_t: Tensor
    t: int
    seed: int
    schedule: ScheduleConfig

    @classmethod
    def make(cls, x_0: Tensor, t: int, seed: int, schedule: ScheduleConfig, noise: Callable[[], Tensor]) -> Noised:
        """Noise a clean image, (1, C, H, W) in [-1, 1], to the paper's t (Eq. 4); t=0 returns it unchanged."""
        x_t = x_0 if t == 0 else NoiseSchedule.from_config(schedule).q_sample(x_0, from_paper(t), noise())
        return cls(x_t, t, seed, schedule)

    @staticmethod
    def looks_like(data: bytes) -> bool:
        """Whether these look like the bytes of a safetensors file: a header length that fits, then JSON."""
        return data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8

    def to_bytes(self) -> bytes:
        about = {"t": self.t, "seed": self.seed, "schedule": self.schedule.to_dict()}
        return save({"x_t": self.x_t.contiguous()}, metadata={"ddpm": json.dumps(about)})

    @classmethod
    def from_bytes(cls, data: bytes, name: str) -> Noised:
        """Read what `to_bytes` wrote. name: of the file, in messages. Raises DataError if it is something else."""
        try:
            about = _NoisedImage.from_dict(_metadata(data))
            NoiseSchedule.from_config(about.schedule)
            return cls(_x_t(data), about.t, about.seed, about.schedule)
        except (SafetensorError, ModelError, ValueError, KeyError) as error:
            raise DataError(
                f"{name}: not a noised image ({error})", "Make one with: ddpm noise IMG --t 300 --format safetensors"
            ) from None

    def fitted(self, channels: int, size: int, noise: Callable[[], Tensor]) -> Noised:
        """The same image at a model's size, again a sample of q(x_t | x_0) for the smaller x_0.

        Averages k x k pixels of the centre, and RGB to gray. That multiplies the variance of the noise by a known g, so
        new noise of the missing variance, (1 - abar_t)(1 - g), is added. noise: returns (1, channels, size, size).
        Returns self if it fits already. Raises DataError if the image is too small, or gray for an RGB model:
        independent noise cannot be enlarged.
        """
        _, c, height, width = self.x_t.shape
        k = min(height, width) // size
        if (c, height, width) == (channels, size, size):
            return self
        if k < 1 or c < channels:
            raise DataError(
                f"the noised image is {width}x{height} {_kind(c)}, too little for a model "
                f"of {size}x{size} {_kind(channels)}",
                "Give the image itself instead: ddpm denoise-trace IMG --t N",
            )
        top, left = (height - k * size) // 2, (width - k * size) // 2
        x = F.avg_pool2d(self.x_t[:, :, top : top + k * size, left : left + k * size], k)
        gain = 1 / k**2
        if c > channels:
            luma = torch.tensor(_LUMA)
            x = (x * luma.view(1, 3, 1, 1)).sum(1, keepdim=True)
            gain *= float((luma**2).sum())
        if self.t > 0:
            abar = float(NoiseSchedule.from_config(self.schedule).alphas_cumprod[from_paper(self.t)])
            x = x + math.sqrt((1 - abar) * (1 - gain)) * noise()
        return Noised(x, self.t, self.seed, self.schedule)


def _kind(channels: int) -> str:
    return "gray" if channels == 1 else "RGB"


@dataclass(frozen=True)
class _NoisedImage(Strict):
    """The JSON of a noised image; its fields are those of `Noised`."""

    t: Annotated[int, at_least(0)]
    seed: int
    schedule: ScheduleConfig

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.t > (T := self.schedule.num_train_timesteps):
            raise ModelError(f"t={self.t}: must be between 0 and {T}, the steps of its schedule")


def _metadata(data: bytes) -> dict[str, object]:
    """The JSON under the metadata key `ddpm` of a safetensors file. Raises ValueError if there is none."""
    match parse_json(data[8 : 8 + int.from_bytes(data[:8], "little")]):
        case {"__metadata__": {"ddpm": str(text)}}:
            about = parse_json(text.encode())
            if isinstance(about, dict):
                return about
    raise ValueError("its metadata has no JSON object called ddpm")


def _x_t(data: bytes) -> Tensor:
    """The tensor of a noised image. Raises ValueError if it cannot be one."""
    x_t = load(data).get("x_t")
    if x_t is None:
        raise ValueError("it has no tensor x_t")
    if x_t.dtype != torch.float32 or x_t.ndim != 4 or len(x_t) != 1 or x_t.shape[1] not in (1, 3) or not x_t.numel():
        raise ValueError(f"x_t is {x_t.dtype} {tuple(x_t.shape)}, not float32 (1, 1 or 3, height, width)")
    if not x_t.isfinite().all():
        raise ValueError("x_t has values that are not finite")
    return x_t
