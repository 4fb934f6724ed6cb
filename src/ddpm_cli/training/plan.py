"""Chooses the settings of a new run: from the images, the machine and the user's options to a RunConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ddpm_cli import __version__
from ddpm_cli.config import DataConfig, RunConfig, ScheduleConfig, TrainConfig, UNetConfig
from ddpm_cli.data.survey import Survey
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.errors import ModelError, UsageError
from ddpm_cli.names import check_name
from ddpm_cli.training.objective import contradictions, loss_for, schedule_for
from ddpm_cli.training.presets import FINE_TUNING, PRESETS, Preset, interval

__all__ = ["Base", "plan_run"]

_SIZES = (32, 64, 128, 256)
_TINY_SIZE = 32  # the largest that two CPU cores train in minutes


def _standard_size(side: int) -> int:
    """The largest standard size that does not enlarge images of this side, or the smallest one."""
    return max((size for size in _SIZES if size <= side), default=_SIZES[0])


def _pick_preset(name: str, size: int, on_gpu: bool) -> tuple[str, Preset]:
    if name == "auto":
        fitting = (n for n, p in PRESETS.items() if p.size and size <= p.size)
        name = next(fitting, "256") if on_gpu else "tiny"
    check_name("--preset", name, ("auto", *PRESETS))
    return name, PRESETS[name]


def _pick_size(preset: Preset, named: bool, survey: Survey) -> int:
    """The size of a preset that was named; else that of the images if all have the same; else a standard size."""
    if named and preset.size:
        return preset.size
    largest = preset.size or _TINY_SIZE
    side = survey.square_side
    if side and side <= largest and side % preset.size_multiple == 0:
        return side
    return _standard_size(min(survey.median_side, largest))


class Base(NamedTuple):
    """A model to fine-tune. address: to find it again."""

    address: str
    unet: UNetConfig
    schedule: ScheduleConfig


def _recipe_for(base: Base, preset: str, on_gpu: bool) -> Preset:
    """The settings of fine-tuning, with the batch size of the preset for this model's image size."""
    if preset != "auto":
        raise UsageError(f"--preset {preset}: --from brings the network", "Leave one of the two out.")
    return replace(_pick_preset("auto", base.unet.sample_size, on_gpu)[1], **FINE_TUNING)


def _fit_to(base: Base, size: int | None, channels: int | None) -> tuple[int, int]:
    """The size and the channels of the images. The network is convolutional, so other sizes are possible."""
    multiple = base.unet.size_multiple
    if size is not None and size % multiple:
        raise UsageError(
            f"--size {size} is not a multiple of {multiple}, which the model of --from needs",
            f"It was trained at --size {base.unet.sample_size}.",
        )
    if channels not in (None, base.unet.in_channels):
        raise UsageError(f"--channels {channels}: the model of --from has {base.unet.in_channels}")
    return base.unet.sample_size if size is None else size, base.unet.in_channels


def _require_signal(schedule: ScheduleConfig) -> None:
    """Raises UsageError if the betas that the user chose leave nothing of the image."""
    try:
        NoiseSchedule.from_config(schedule)
    except ModelError as error:
        raise UsageError(f"the noise schedule: {error.message}", "Choose a smaller --beta-end.") from None


def plan_run(
    survey: Survey,
    images: str | tuple[str, ...],
    on_gpu: bool,
    preset: str = "auto",
    data: Mapping[str, Any] | None = None,
    train: Mapping[str, Any] | None = None,
    objective: Mapping[str, Any] | None = None,
    base: Base | None = None,
) -> RunConfig:
    """Choose the settings that the user left open. images: their address.

    Without a GPU the preset is tiny; with one, the smallest for the size of the images. data, train: the fields of
    DataConfig and TrainConfig that the user chose. objective: `objective.OPTIONS` that the user chose. base: a model to
    fine-tune, which determines the architecture, the schedule, the size and the channels. Raises UsageError if options
    contradict each other, and ModelError for a value that is not valid.
    """
    data, train, objective = dict(data or {}), dict(train or {}), dict(objective or {})
    size, channels = data.get("size"), data.get("channels")
    if base:
        name, recipe = "fine-tuning", _recipe_for(base, preset, on_gpu)
        size, channels = _fit_to(base, size, channels)
        unet, schedule = replace(base.unet, sample_size=size), base.schedule
        if wrong := list(contradictions(objective, schedule, "the model of --from")):
            raise UsageError(", ".join(wrong), "A model keeps its objective, except for --loss. Leave the option out.")
    else:
        name, recipe = _pick_preset(preset, _standard_size(survey.median_side) if size is None else size, on_gpu)
        size = _pick_size(recipe, preset != "auto", survey) if size is None else size
        channels = survey.channels if channels is None else channels
        unet, schedule = recipe.unet(size, channels), schedule_for(objective, recipe.schedule())
        if schedule.learns_variance:
            unet = replace(unet, out_channels=2 * channels)
        _require_signal(schedule)
    learns_betas = objective.get("schedule") == "learned"
    every = interval(recipe.every, train.get("steps", recipe.steps))
    settings: dict[str, Any] = {
        "steps": recipe.steps,
        "batch_size": recipe.batch_size,
        "lr": recipe.lr,
        "lr_warmup": recipe.lr_warmup,
        "lr_decay": recipe.lr_decay,
        "loss": loss_for(train.get("loss"), schedule, learns_betas, recipe.loss),
        "learn_betas": learns_betas,
        "save_every": every,
        "sample_every": every,
        "log_every": max(1, min(100, every // 5)),
    }
    return RunConfig(
        version=__version__,
        preset=name,
        data=DataConfig(images=images, **(data | {"size": size, "channels": channels})),
        train=TrainConfig(**(settings | train)),
        unet=unet,
        schedule=schedule,
        base=base.address if base else None,
    )
