"""Writes a model as a diffusers pipeline directory, with a model card for the Hub.

It has model_index.json, unet/ and scheduler/, and `DDPMPipeline.from_pretrained` loads it, or refuses it if diffusers
cannot sample it (`ScheduleConfig.in_diffusers`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddpm_cli.config import DIFFUSERS_VERSION, ScheduleConfig, UNetConfig
from ddpm_cli.files import json_bytes, write_file
from ddpm_cli.models.card import CARD, PREVIEW, model_card
from ddpm_cli.models.facts import facts
from ddpm_cli.models.pretrained import WEIGHTS
from ddpm_cli.models.recipe import RECIPE

__all__ = ["add_preview", "configurations", "is_only_a_model", "save_model", "save_weights"]

_INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}

# Instead of the scheduler, for a model that diffusers cannot sample: then its pipelines refuse to load it.
# Their scheduler refuses `mean` only at its first step, and a learned_log only by the shape of what follows.
_OURS = ["ddpm_cli", "NoiseSchedule"]


def configurations(unet: UNetConfig, schedule: ScheduleConfig) -> dict[str, bytes]:
    """The JSON files of a pipeline, by name."""
    values = {"model_index.json": _INDEX, "unet/config.json": unet.to_dict()}
    if not schedule.in_diffusers:
        values["model_index.json"] = _INDEX | {"scheduler": _OURS}
    values["scheduler/scheduler_config.json"] = schedule.to_dict()
    return {name: json_bytes(value) for name, value in values.items()}


def save_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    unet: UNetConfig,
    schedule: ScheduleConfig,
    recipe: Mapping[str, Any] | None = None,
    preview: bytes | None = None,
) -> None:
    """Fill an existing, empty folder with a diffusers pipeline and a model card, ready for the Hub.

    weights: a UNet's state dict; saved as float32. recipe: see `recipe.recipe`. preview: a grid of samples, as PNG.
    """
    for name, data in configurations(unet, schedule).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    save_weights(folder / "unet" / f"{WEIGHTS}.safetensors", weights)
    if recipe:
        (folder / RECIPE).write_bytes(json_bytes(recipe))
    if preview:
        (folder / PREVIEW).write_bytes(preview)
    (folder / CARD).write_bytes(model_card(facts(unet, schedule), recipe, preview is not None).encode())


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a state dict as float32."""
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def add_preview(
    folder: Path, unet: UNetConfig, schedule: ScheduleConfig, recipe: Mapping[str, Any], preview: bytes
) -> None:
    """Add a grid of samples to a model's folder and to its card."""
    write_file(folder / PREVIEW, preview)
    write_file(folder / CARD, model_card(facts(unet, schedule), recipe, True).encode())


def is_only_a_model(folder: Path) -> bool:
    """Whether a folder holds nothing but what `save_model` writes, or nothing at all."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    ours = {"model_index.json", "unet", "scheduler", CARD, PREVIEW, RECIPE}
    return not names or ("model_index.json" in names and names <= ours)
