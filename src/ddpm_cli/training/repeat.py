"""The commands that train a run again, and that continue it, from its settings."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import Any

from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
from ddpm_cli.training.objective import loss_for, named, schedule_for
from ddpm_cli.training.presets import INTERVALS, PRESETS, recipe_of, usual_interval

__all__ = ["command_of", "command_to_resume"]

# Settings of the paper that only `ddpm_cli.train` has, not the command line.
_IN_PYTHON = ("lr_warmup", "ema_decay", "grad_clip")
_ELSEWHERE = ("images", "loss", "learn_betas", "log_every")  # given otherwise, or without an effect on the model
_ALWAYS = ("size", "channels", "steps", "batch_size", "lr", "seed")


def command_of(config: RunConfig, run: Path) -> str:
    """The command that trains a run again; in Python, if it has settings that the command line lacks.

    It names what a new run would choose by its images or its machine, and what differs from the defaults.
    run: the folder of the run.
    """
    images, chosen = _images(config), _chosen(config)
    if special := _special(config):
        first = [images[0] if len(images) == 1 else images, str(run)]
        arguments = [*map(repr, first), *(f"{key}={value!r}" for key, value in (chosen | special).items())]
        return "from ddpm_cli import train\n\ntrain({})".format(", ".join(arguments))
    words = _words(config, run)
    for key, value in chosen.items():
        flag = "from" if key == "start_from" else key.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", quote(str(value))]
    return " ".join(words)


def command_to_resume(config: RunConfig, run: Path) -> str:
    """The command that continues a run, which has its settings in its folder. run: the folder."""
    return " ".join([*_words(config, run), "--resume"])


def _words(config: RunConfig, run: Path) -> list[str]:
    return ["ddpm", "train", *map(quote, _images(config)), "-o", quote(str(run))]


def _images(config: RunConfig) -> list[str]:
    return [config.data.images] if isinstance(config.data.images, str) else [*config.data.images]


def _chosen(config: RunConfig) -> dict[str, Any]:
    """The settings to name, by their names in Python."""
    found: dict[str, Any] = {}
    if config.base is not None:
        found["start_from"] = config.base
    elif config.preset in PRESETS:
        found["preset"] = config.preset
    for part in (config.data, config.train):
        for name, usual in _usual(part, config).items():
            value = getattr(part, name)
            if (name in _ALWAYS or value != usual) and name not in (*_ELSEWHERE, *_IN_PYTHON):
                found[name] = value
    if config.train.loss != loss_for(None, config.schedule, preset=recipe_of(config).get("loss", "simple")):
        found["loss"] = config.train.loss
    return found | _objective(config)


def _objective(config: RunConfig) -> dict[str, Any]:
    """The `objective.OPTIONS` that the preset, or the model to fine-tune, does not have."""
    if config.base is not None:
        return {"schedule": "learned"} if config.train.learn_betas else {}
    usual = PRESETS.get(config.preset, PRESETS["cifar10"]).schedule()
    has = {key: value for key, value in named(config.schedule).items() if value is not None}
    if has["schedule"] == "learned" and not config.train.learn_betas:  # a list of betas, which no option gives
        return {}
    found = {
        key: has[key] for key in ("prediction", "variance", "schedule", "timesteps") if has[key] != named(usual)[key]
    }
    without = named(schedule_for(found, usual))  # the default betas depend on T
    return found | {key: has[key] for key in ("beta_start", "beta_end") if key in has and has[key] != without[key]}


def _special(config: RunConfig) -> dict[str, Any]:
    """The settings `_IN_PYTHON` that differ from the defaults."""
    usual = _usual(config.train, config)
    has = {name: getattr(config.train, name) for name in _IN_PYTHON}
    return {name: value for name, value in has.items() if value != usual[name]}


def _usual(part: DataConfig | TrainConfig, config: RunConfig) -> dict[str, Any]:
    """The settings of a new run that names none: the defaults, and those of the preset that do not vary by machine."""
    usual: dict[str, Any] = {field.name: field.default for field in fields(part)}
    recipe = recipe_of(config)
    if isinstance(part, TrainConfig) and recipe:
        # Not named if it need not be: an interval of previews that is named is kept, even if they take too long.
        usual |= {"lr_warmup": recipe["lr_warmup"], "lr_decay": recipe["lr_decay"]}
        usual |= dict.fromkeys(INTERVALS, usual_interval(config))
    return usual
