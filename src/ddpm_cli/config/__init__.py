"""All settings, as frozen dataclasses that are written to JSON and read back strictly. Does not import torch."""

from ddpm_cli.config.model import DIFFUSERS_VERSION, ScheduleConfig, UNetConfig, require_match
from ddpm_cli.config.run import DataConfig, RunConfig, TrainConfig
from ddpm_cli.config.strict import Count, Strict, between, shown

__all__ = [
    "DIFFUSERS_VERSION",
    "Count",
    "DataConfig",
    "RunConfig",
    "ScheduleConfig",
    "Strict",
    "TrainConfig",
    "UNetConfig",
    "between",
    "require_match",
    "shown",
]
