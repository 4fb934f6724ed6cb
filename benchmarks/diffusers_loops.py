"""diffusers' loops: as its users run them, in float32, and tuned by hand. Nothing here uses ddpm.

Both are the loop of its example `train_unconditional.py` and that of `DDPMPipeline`. Tuned: bf16 (in training by
autocast), channels-last, fused AdamW, the average of all weights at once, images that are on the device already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

__all__ = ["Work", "sampling", "tf32", "training"]

Work = Callable[[int], object]  # does so many steps


@contextmanager
def tf32(products: bool) -> Iterator[None]:
    """TF32 for convolutions, PyTorch's default, and for matrix products too if wanted."""
    convolutions, others = torch.backends.cudnn, torch.backends.cuda.matmul
    before = convolutions.allow_tf32, others.allow_tf32
    convolutions.allow_tf32, others.allow_tf32 = True, products
    try:
        yield
    finally:
        convolutions.allow_tf32, others.allow_tf32 = before


def training(
    network: Mapping[str, Any], batch: int, device: torch.device, tuned: bool = False, compiled: bool = False
) -> Work:
    """Training steps. network: the arguments of `UNet2DModel`."""
    layout = torch.channels_last if tuned else torch.contiguous_format
    unet: Any = UNet2DModel(**network).to(device).to(memory_format=layout).train()  # type: ignore[call-overload]
    model: Any = torch.compile(unet) if compiled else unet
    scheduler: Any = DDPMScheduler()
    settings: dict[str, Any] = {"betas": (0.95, 0.999), "weight_decay": 1e-6}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4, fused=tuned or None, **settings)
    warm_up: dict[str, Any] = {"use_ema_warmup": True, "inv_gamma": 1.0, "power": 3 / 4}
    average = EMAModel(unet.parameters(), decay=0.9999, foreach=tuned, **warm_up)
    pixels = torch.rand(_shape(network, batch)) * 2 - 1
    resident = pixels.to(device, memory_format=layout)

    def work(steps: int) -> None:
        with tf32(products=tuned):
            for _ in range(steps):
                clean = resident if tuned else pixels.to(device)
                eps = torch.randn_like(clean)
                t = torch.randint(0, 1000, (batch,), device=device)
                with torch.autocast(device.type, torch.bfloat16, enabled=tuned):
                    loss = F.mse_loss(model(scheduler.add_noise(clean, eps, t), t).sample.float(), eps)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                average.step(unet.parameters())

    return work


def sampling(
    network: Mapping[str, Any], images: int, device: torch.device, tuned: bool = False, compiled: bool = False
) -> Work:
    """Steps of the reverse process. network: the arguments of `UNet2DModel`."""
    dtype = torch.bfloat16 if tuned else torch.float32
    layout = torch.channels_last if tuned else torch.contiguous_format
    unet: Any = UNet2DModel(**network).to(device).eval().requires_grad_(False)
    if tuned:  # not with .to(dtype), of which diffusers warns
        unet = unet.bfloat16().to(memory_format=layout)
    model: Any = torch.compile(unet) if compiled else unet
    scheduler: Any = DDPMScheduler()

    @torch.no_grad()
    def work(steps: int) -> Tensor:
        scheduler.set_timesteps(steps)
        here = scheduler.timesteps.to(device)  # the scheduler wants its steps on the CPU, the network on the device
        with tf32(products=tuned):
            x = torch.randn(_shape(network, images), device=device, dtype=dtype).to(memory_format=layout)
            for i, t in enumerate(scheduler.timesteps):
                x = scheduler.step(model(x, here[i] if tuned else t).sample, t, x).prev_sample
            return ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).cpu()

    return work


def _shape(network: Mapping[str, Any], images: int) -> tuple[int, int, int, int]:
    return images, network["in_channels"], network["sample_size"], network["sample_size"]
