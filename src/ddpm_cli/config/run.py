"""The settings of a training run: its `config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from ddpm_cli.config.model import ImageSize, ScheduleConfig, UNetConfig, require_match
from ddpm_cli.config.strict import Check, Count, Positive, Strict, at_least, between, one_of
from ddpm_cli.errors import ModelError
from ddpm_cli.names import FITS, LOSSES, WITHOUT_VARIANCE

__all__ = ["DataConfig", "RunConfig", "TrainConfig"]


def _is_colour(text: str) -> bool:
    from PIL import ImageColor  # imported late: `ddpm --help` does not need it

    try:
        ImageColor.getrgb(text)
    except ValueError:
        return False
    return True


_FRACTION = Check(lambda value: 0 <= value < 1, "a number from 0 to below 1")


@dataclass(frozen=True)
class DataConfig(Strict):
    """The training images, and how they are prepared."""

    images: str | tuple[str, ...]  # folders or files, absolute, or addresses of data sets on the Hub
    size: ImageSize
    channels: Annotated[int, one_of(1, 3)]  # gray or RGB
    fit: Annotated[str, one_of(*FITS)] = "crop"  # how an image that is not square becomes square
    background: Annotated[str, Check(_is_colour, "a colour")] = "white"  # behind transparency, and around fit=pad
    flip: bool = True  # mirror half of the images at random
    holdout: Annotated[float, _FRACTION] = 0.0  # of the images that are never trained on, see data/split.py


@dataclass(frozen=True)
class TrainConfig(Strict):
    """Settings of the training (Algorithm 1)."""

    steps: Count  # total, also of a resumed run
    batch_size: Count
    lr: Positive  # of Adam, after the warm-up
    loss: Annotated[str, one_of(*LOSSES)] = "simple"  # see `training_loss`
    learn_betas: bool = False  # whether the betas are trained too; the schedule has those that it starts with
    accumulate: Count = 1  # parts of each batch, for gradient accumulation
    lr_warmup: Annotated[int, between(0, 10**12)] = 5000  # steps over which lr rises linearly from 0
    lr_decay: Annotated[float, between(0, 1)] = 0.0  # the last part of the steps, over which lr falls linearly to 0
    ema_decay: Annotated[float, between(0, 1)] = 0.9999
    grad_clip: Positive = 1.0  # largest norm of the gradient
    seed: Annotated[int, at_least(0)] = 0
    save_every: Count = 10_000  # steps between checkpoints
    sample_every: Count = 10_000  # steps between previews
    log_every: Count = 100  # steps between lines of metrics.jsonl
    keep: Count = 3  # number of newest checkpoints to keep
    keep_every: Count | None = None  # also keep those of every Nth step

    # Settings that may change when a run resumes. They do not affect what is learned, but for a decay of lr.
    FREE = ("steps", "save_every", "sample_every", "keep", "keep_every", "accumulate")

    def lr_at(self, step: int) -> float:
        """The learning rate of the step that comes after so many."""
        risen = (step + 1) / max(1, self.lr_warmup)
        left = (self.steps - step) / max(1, self.lr_decay * self.steps)
        return self.lr * min(1.0, risen, left)


@dataclass(frozen=True)
class RunConfig(Strict):
    """Everything that is needed to repeat a run."""

    version: str  # of ddpm, when the run started
    preset: str
    data: DataConfig
    train: TrainConfig
    unet: UNetConfig
    schedule: ScheduleConfig
    base: str | None = None  # address of the model that it fine-tunes

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, here, there in (
            ("size", self.data.size, self.unet.sample_size),
            ("channels", self.data.channels, self.unet.in_channels),
        ):
            if here != there:
                raise ModelError(f"data: {name}={here}: the network (unet) is made for {there}")
        require_match(self.unet, self.schedule)
        if (self.train.loss in WITHOUT_VARIANCE and self.schedule.learns_variance) or (
            self.train.loss == "hybrid" and not self.schedule.learns_variance
        ):
            raise ModelError(
                f"train: loss={self.train.loss!r}: does not fit variance_type={self.schedule.variance_type!r}"
            )

        if self.train.learn_betas and (self.train.loss != "vlb" or self.schedule.trained_betas is None):
            raise ModelError("train: learn_betas needs loss='vlb' and trained_betas")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        train, schedule = values.get("train"), values.get("schedule")
        if isinstance(train, Mapping) and "loss" not in train and isinstance(schedule, Mapping):
            # A run that began before there was a choice.
            learned = str(schedule.get("variance_type")).startswith("learned")
            values = {**values, "train": {**train, "loss": "hybrid" if learned else "simple"}}
        return super().from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).to_dict() for name in ("data", "train", "unet", "schedule")}
        return {"version": self.version, "preset": self.preset, "base": self.base} | parts
