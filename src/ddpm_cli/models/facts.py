"""The facts about a model: its images, network, schedule and prediction, as JSON values and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ddpm_cli.config import ScheduleConfig, UNetConfig
from ddpm_cli.nn.unet import UNet
from ddpm_cli.text import counted

__all__ = ["facts", "words"]

_PREDICTS = {
    "epsilon": "the noise, eps",
    "sample": "the clean image, x_0",
    "v_prediction": "the velocity, v",
    "mean": "the mean of x_{t-1}, mu~_t",
}
_VARIANCE = {
    "fixed_small": "fixed, the small one (beta~_t)",
    "fixed_large": "fixed, the large one (beta_t)",
    "learned": "learned",
    "learned_range": "learned, between beta~_t and beta_t",
    "learned_log": "learned, as log(sigma_t^2 / beta_t)",
}


def facts(unet: UNetConfig, schedule: ScheduleConfig) -> dict[str, Any]:
    """The facts as JSON values."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in UNet(unet).parameters())
    levels = range(len(unet.block_out_channels))
    attending = [level for level in levels if unet.down_block_types[level].startswith("Attn")]
    if unet.add_attention:
        attending.append(levels[-1])  # in the middle block
    attention = sorted({unet.sample_size >> level for level in attending}, reverse=True)
    return {
        "size": unet.sample_size,
        "channels": unet.in_channels,
        "parameters": parameters,
        "block_out_channels": list(unet.block_out_channels),
        "layers_per_block": unet.layers_per_block,
        "attention": attention,
        "attention_head_dim": unet.attention_head_dim,
        "dropout": unet.dropout,
        "T": schedule.num_train_timesteps,
        "schedule": schedule.schedule_name,
        "beta_schedule": "trained_betas" if schedule.trained_betas else schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": schedule.prediction_type,
        "variance_type": schedule.variance_type,
        "clip_sample": schedule.clip_sample,
        "clip_sample_range": schedule.clip_sample_range,
        "thresholding": schedule.thresholding,
        "in_diffusers": schedule.in_diffusers and not isinstance(unet.attention_head_dim, tuple),
    }


def words(model: Mapping[str, Any]) -> dict[str, str]:
    """The facts in words, one line each."""
    channels = ", ".join(map(str, model["block_out_channels"]))
    attention = ", ".join(f"{size}x{size}" for size in model["attention"]) or "no resolution"
    count = f"{model['parameters'] / 1e6:.1f}M" if model["parameters"] >= 1e5 else str(model["parameters"])
    blocks = model["layers_per_block"]
    limits = "not limited"
    if model["thresholding"]:
        limits = "scaled into [-1, 1] by dynamic thresholding"
    elif model["clip_sample"]:
        limits = f"clipped to [-{model['clip_sample_range']:g}, {model['clip_sample_range']:g}]"
    return {
        "images": f"{model['size']}x{model['size']} {'gray' if model['channels'] == 1 else 'RGB'}",
        "network": f"{count} parameters, {counted(blocks, 'block')} a level",
        "channels": channels,
        "attention": f"at {attention}, {_heads(model['attention_head_dim'])}",
        "predicts": _PREDICTS[model["prediction_type"]],
        "schedule": f"{model['T']} steps, {_betas(model)}",
        "variance": _VARIANCE[model["variance_type"]],
        "x_0": limits,
    }


def _heads(head_dim: int | Sequence[int] | None) -> str:
    if head_dim is None:
        return "one head"
    return f"heads of {head_dim if isinstance(head_dim, int) else ', '.join(map(str, head_dim))} channels"


def _betas(model: Mapping[str, Any]) -> str:
    """The noise schedule in words."""
    between = f"beta from {model['beta_start']:g} to {model['beta_end']:g}"
    return {
        "linear": f"linear, {between}",
        "quad": f"linear in sqrt(beta), {between}",
        "sigmoid": f"sigmoid, {between}",
        "cosine": "cosine",
        "const": f"constant, beta {model['beta_end']:g}",
        "jsd": "beta_t = 1 / (T - t + 1)",
        "learned": "a list of betas",
    }[model["schedule"]]
