"""The objective of a run: what the network predicts, its variance, the noise schedule and the loss (Table 2).

The names are those of the options of `ddpm train`. Models on disk have diffusers' names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ddpm_cli.config import LARGEST_BETA, ScheduleConfig, jsd_betas
from ddpm_cli.errors import UsageError
from ddpm_cli.names import LOSSES, PREDICTIONS, SCHEDULES, VARIANCES, WITHOUT_VARIANCE, check_name

__all__ = ["OPTIONS", "check_names", "contradictions", "loss_for", "named", "schedule_for"]

# Of a request, besides `loss`. timesteps: T. beta_start, beta_end: of the schedules between two betas.
OPTIONS = ("prediction", "variance", "schedule", "timesteps", "beta_start", "beta_end")

_BETWEEN = {"linear": "linear", "quad": "scaled_linear", "sigmoid": "sigmoid"}  # schedules from beta_start to beta_end
_BETAS = (1e-4, 0.02)  # of the paper, for 1000 steps


def check_names(asked: Mapping[str, Any], loss: str | None) -> None:
    """Raises UsageError for a value that is not a name of its option. asked: `OPTIONS` by name."""
    known = {"prediction": PREDICTIONS, "variance": VARIANCES, "schedule": SCHEDULES, "loss": LOSSES}
    for option, value in {**asked, "loss": loss}.items():
        if option in known and value is not None:
            check_name(f"--{option}", value, known[option])


def schedule_for(asked: Mapping[str, Any], preset: ScheduleConfig) -> ScheduleConfig:
    """The schedule of a new run, with the prediction and the variance of the preset where the user chose none.

    The betas of the paper are for 1000 steps. With T steps the default ones are 1000/T times as large, as in Nichol and
    Dhariwal's code, so that x_T is noise for every T. Those that the user chose are taken as they are.
    Raises UsageError for options that do not fit together.
    """
    config = replace(
        preset,
        num_train_timesteps=asked.get("timesteps", preset.num_train_timesteps),
        prediction_type=PREDICTIONS.get(asked.get("prediction", ""), preset.prediction_type),
        variance_type=VARIANCES.get(asked.get("variance", ""), preset.variance_type),
    )
    name, T = asked.get("schedule", "linear"), config.num_train_timesteps
    takes = {"const": ("beta_end",), "cosine": (), "jsd": (), "learned": ()}.get(name, ("beta_start", "beta_end"))
    for option in ("beta_start", "beta_end"):
        if option in asked and option not in takes:
            why = {"const": "has one beta for all steps: --beta-end", "learned": "starts with the default betas"}.get(
                name, "has betas of its own, from T alone"
            )
            raise UsageError(f"{_flag(option, asked[option])}: --schedule {name} {why}", "Leave it out.")
        if option in asked and not 0 < asked[option] < 1:
            raise UsageError(f"{_flag(option, asked[option])}: a beta is between 0 and 1, both excluded")
    start, end = (
        asked.get(option, min(beta * 1000 / T, LARGEST_BETA))
        for option, beta in zip(("beta_start", "beta_end"), _BETAS, strict=True)
    )
    if name == "cosine":
        return replace(config, beta_schedule="squaredcos_cap_v2")
    if name == "jsd":
        return replace(config, trained_betas=jsd_betas(T))
    if name == "learned":  # what it starts with
        return replace(config, trained_betas=tuple(start + (end - start) * t / max(1, T - 1) for t in range(T)))
    if name == "const":
        return replace(config, beta_start=end, beta_end=end)
    if start >= end:
        raise UsageError(
            f"--beta-start {start:g}: is not below --beta-end {end:g}", "--schedule const has one beta for all steps."
        )
    return replace(config, beta_schedule=_BETWEEN[name], beta_start=start, beta_end=end)


def loss_for(asked: str | None, config: ScheduleConfig, learns_betas: bool = False, preset: str = "simple") -> str:
    """The loss of a run: the preset's, and L_hybrid for a learned variance, unless the user chose another.

    Raises UsageError if the chosen one would not train the variance or the betas, or needs a variance that is learned.
    """
    if learns_betas and asked != "vlb":
        raise UsageError(
            "--schedule learned: only the bound depends on the betas in a way that can train them",
            "Add --loss vlb, or choose another schedule.",
        )
    if asked in WITHOUT_VARIANCE and config.learns_variance:
        raise UsageError(
            f"--loss {asked}: does not train the variance, which this model learns",
            "Use --loss hybrid, which trains it with the bound, or --loss vlb.",
        )
    if asked == "hybrid" and not config.learns_variance:
        raise UsageError(
            "--loss hybrid: its part of the bound trains only the variance, and this one is fixed",
            "Add --variance learned-range, or use --loss vlb, or one for a fixed variance: "
            f"{', '.join(WITHOUT_VARIANCE)}.",
        )
    return asked or ("hybrid" if config.learns_variance else preset)


def named(config: ScheduleConfig) -> dict[str, Any]:
    """A model's schedule as `OPTIONS`. A beta is None if the schedule does not have it."""
    name = config.schedule_name
    between = name in _BETWEEN
    return {
        "prediction": _name(PREDICTIONS, config.prediction_type),
        # diffusers' `learned` is the variance itself. Both are a learned diagonal.
        "variance": "learned" if config.variance_type == "learned" else _name(VARIANCES, config.variance_type),
        "schedule": name,
        "timesteps": config.num_train_timesteps,
        "beta_start": config.beta_start if between else None,
        "beta_end": config.beta_end if between or name == "const" else None,
    }


def contradictions(asked: Mapping[str, Any], config: ScheduleConfig, whose: str) -> Iterator[str]:
    """The options that differ from those of an existing model or run, as text. whose: the model or the run."""
    has = named(config)
    for option, value in asked.items():
        if value != has[option]:
            yield f"{_flag(option, value)} ({whose} has {'none' if has[option] is None else has[option]})"


def _name(names: Mapping[str, str], value: str) -> str:
    return next(name for name, theirs in names.items() if theirs == value)


def _flag(option: str, value: object) -> str:
    return f"--{option.replace('_', '-')} {value}"
