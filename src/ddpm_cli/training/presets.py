"""Presets: an architecture for any image size, and settings to train it.

`ddpm train --help` lists their names, so this module imports neither torch nor the configurations until a preset is
used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddpm_cli.errors import UsageError

if TYPE_CHECKING:
    from ddpm_cli.config import RunConfig, ScheduleConfig, UNetConfig

__all__ = ["FINE_TUNING", "INTERVALS", "PRESETS", "Preset", "interval", "recipe_of", "usual_interval"]


@dataclass(frozen=True)
class Preset:
    """An architecture for all image sizes that it divides, and settings to train it."""

    size: int | None  # pixels; None: the size of the images, up to 32
    channel_mult: tuple[int, ...]
    steps: int
    batch_size: int
    lr: float
    base_channels: int = 128
    layers_per_block: int = 2
    dropout: float = 0.0
    lr_warmup: int = 5000
    lr_decay: float = 0.0
    variance_type: str = "fixed_small"
    prediction_type: str = "epsilon"
    loss: str = "simple"  # of a fixed variance
    every: int = 10_000  # steps between checkpoints, and between previews
    smaller: str | None = None  # the preset to try if this one takes too long
    norm_num_groups: int = 32
    attention_size: int = 16  # pixels; the level whose feature maps are nearest to this size has attention

    @property
    def size_multiple(self) -> int:
        """The sides of the images must be a multiple of this many pixels."""
        return int(2 ** (len(self.channel_mult) - 1))

    def unet(self, size: int, channels: int) -> UNetConfig:
        """The U-Net for square images of `size` pixels and `channels` channels.

        Raises UsageError if the levels of the U-Net do not divide the size.
        """
        from ddpm_cli.config import UNetConfig

        if size % self.size_multiple or size < self.size_multiple:
            raise UsageError(
                f"--size {size} is not a multiple of {self.size_multiple}, which this preset needs",
                f"Try --size {max(1, round(size / self.size_multiple)) * self.size_multiple}.",
            )
        levels = len(self.channel_mult)
        with_attention = min(range(levels), key=lambda level: abs((size >> level) - self.attention_size))
        down = tuple("AttnDownBlock2D" if i == with_attention else "DownBlock2D" for i in range(levels))
        return UNetConfig(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(self.base_channels * m for m in self.channel_mult),
            down_block_types=down,
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
            layers_per_block=self.layers_per_block,
            dropout=self.dropout,
            norm_num_groups=self.norm_num_groups,
        )

    def schedule(self) -> ScheduleConfig:
        """The paper's schedule: T=1000, betas linear from 1e-4 to 0.02."""
        from ddpm_cli.config import ScheduleConfig

        return ScheduleConfig(variance_type=self.variance_type, prediction_type=self.prediction_type)


# Settings for fine-tuning, which keeps the model's architecture: fewer steps, and a learning rate low enough to keep
# what the model has learned. The batch size is that of the preset for the model's image size.
FINE_TUNING: dict[str, Any] = {
    "steps": 10_000,
    "lr": 5e-5,
    "lr_warmup": 500,
    "lr_decay": 0.0,
    "loss": "simple",
    "every": 1000,
}


INTERVALS = ("save_every", "sample_every")  # settings of a run that depend on its number of steps


def interval(every: int, steps: int) -> int:
    """Steps between checkpoints, and between previews: those of the recipe, or fewer, so that every run has several."""
    return max(1, min(every, steps // 4))


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        # 1.3M parameters, minutes on two CPU cores
        size=None,
        channel_mult=(1, 2, 6),  # few channels in large feature maps: twice as fast as 32·(1, 2, 2), and as good
        base_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        attention_size=8,
        steps=5_000,
        batch_size=32,
        lr=2e-3,
        lr_warmup=100,
        lr_decay=0.5,  # better samples of both bundled data sets after the same time (docs/ablation.md)
        loss="debiased",  # better samples of both data sets after 1,200 and 5,000 steps (docs/ablation.md)
        prediction_type="v_prediction",  # better shapes than with eps after a short training (docs/architecture.md)
        every=500,
    ),
    "cifar10": Preset(
        # the paper's CIFAR-10 model, 35.7M parameters
        size=32,
        channel_mult=(1, 2, 2, 2),
        dropout=0.1,
        steps=800_000,
        batch_size=128,
        lr=2e-4,
        variance_type="fixed_large",
        smaller="tiny",
    ),
    "64": Preset(
        # between the paper's two models
        size=64,
        channel_mult=(1, 2, 2, 2),
        dropout=0.1,
        steps=800_000,
        batch_size=128,
        lr=1e-4,
        smaller="cifar10",
    ),
    "128": Preset(
        # between the paper's two models
        size=128,
        channel_mult=(1, 1, 2, 2, 4),
        steps=600_000,
        batch_size=64,
        lr=5e-5,
        smaller="64",
    ),
    "256": Preset(
        # the paper's CelebA-HQ and LSUN model, 114M parameters
        size=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        steps=500_000,
        batch_size=64,
        lr=2e-5,
        smaller="128",
    ),
}


def recipe_of(config: RunConfig) -> Mapping[str, Any]:
    """The settings that a run was planned from: those of fine-tuning or of its preset, if this version has it."""
    if config.base is not None:
        return FINE_TUNING
    preset = PRESETS.get(config.preset)
    return vars(preset) if preset else {}


def usual_interval(config: RunConfig) -> int | None:
    """Steps between checkpoints, and between previews, if the user names none. None: this version does not know."""
    recipe = recipe_of(config)
    return interval(recipe["every"], config.train.steps) if recipe else None
