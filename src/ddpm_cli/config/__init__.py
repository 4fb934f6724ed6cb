"""All settings, as frozen dataclasses that are written to JSON and read back strictly. Does not import torch."""

from ddpm_cli.config.model import DIFFUSERS_VERSION, LARGEST_BETA, ScheduleConfig, UNetConfig, jsd_betas, require_match
from ddpm_cli.config.run import DataConfig, RunConfig, TrainConfig
from ddpm_cli.config.strict import Count, Strict, between, shown

__all__ = [
    "DIFFUSERS_VERSION",
    "LARGEST_BETA",
    "Count",
    "DataConfig",
    "RunConfig",
    "ScheduleConfig",
    "Strict",
    "TrainConfig",
    "UNetConfig",
    "between",
    "jsd_betas",
    "require_match",
    "shown",
]
