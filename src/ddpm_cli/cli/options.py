"""Options that several commands share, and parsers for their values. Imports little, since `--help` must be fast."""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm_cli.errors import UsageError
from ddpm_cli.names import PRECISIONS, SAMPLERS, SPACINGS, WEIGHTS, check_name

__all__ = [
    "Background",
    "Device",
    "Eta",
    "Force",
    "Json",
    "Model",
    "ModelArgument",
    "Order",
    "Precision",
    "Preview",
    "Quiet",
    "Run",
    "Sampler",
    "SamplerSteps",
    "Scale",
    "Seed",
    "Spacing",
    "Updates",
    "Weights",
    "complete_models",
    "named",
    "one_model",
    "parse_age",
    "parse_bool",
    "parse_channels",
    "parse_count",
    "parse_scale",
    "parse_sizes",
    "parse_ts",
]


def parse_count(text: str | int) -> int:
    """Parse a whole number above 0: 800000, 800_000, 800k or 1.2M."""
    digits = str(text).strip().replace("_", "").replace(",", "").lower()
    factor = {"k": 1_000, "m": 1_000_000}.get(digits[-1:], 1)
    try:
        value = float(digits[:-1] if factor > 1 else digits) * factor
    except ValueError:
        value = 0.0
    if not math.isfinite(value) or value < 1 or value != int(value):
        raise typer.BadParameter(f"{text!r} is not a whole number above 0; write 5000, 800k or 1.2M")
    return int(value)


def parse_age(text: str) -> float:
    """Parse a length of time: 12h, 30d or 8w. Returns seconds."""
    seconds = {"h": 3600, "d": 86_400, "w": 7 * 86_400}
    number, unit = text.strip()[:-1], text.strip()[-1:].lower()
    if not (number.isascii() and number.isdigit() and unit in seconds):
        raise typer.BadParameter(f"{text!r} is not a length of time; write 12h, 30d or 8w")
    return float(int(number) * seconds[unit])


def parse_ts(text: str, flag: str = "--t") -> list[int]:
    """Parse timesteps of the paper, separated by commas; 0 is the clean image. Raises UsageError."""
    try:
        ts = [int(part) for part in text.split(",")]
    except ValueError:
        ts = [-1]
    if min(ts) < 0:
        raise UsageError(
            f"{flag} {text}: not a timestep or several timesteps separated by commas", "Write 500, or 0,250,500,1000."
        )
    return ts


def parse_bool(text: str) -> bool:
    """Parse True or False, as improved-diffusion writes the values of its flags."""
    known = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in known:
        raise typer.BadParameter(f"{text!r} is neither True nor False")
    return known[text.lower()]


def parse_sizes(text: str) -> tuple[int, ...]:
    """Parse numbers of pixels separated by commas; returns the largest first."""
    return tuple(sorted((parse_count(part) for part in text.split(",")), reverse=True))


def parse_scale(text: str) -> int | None:
    """Parse a scale: a whole number, or auto, which is None."""
    if text == "auto":
        return None
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= _GREATEST_SCALE):
        raise typer.BadParameter(f"{text!r} is neither auto nor a whole number from 1 to {_GREATEST_SCALE}")
    return int(text)


def parse_channels(text: str) -> int:
    """Parse a number of channels, 1 or 3."""
    if text not in ("1", "3"):
        raise typer.BadParameter(f"{text!r} is neither 1 (gray) nor 3 (RGB)")
    return int(text)


_GREATEST_SCALE = 32


def named(flag: str, names: Collection[str], **settings: Any) -> Any:
    """An option that takes one of several names.

    Any other name is a UsageError before the command begins, with the nearest name as advice. Shells complete them.
    """

    def parse(name: str) -> str:
        check_name(flag, name, names)
        return name

    return typer.Option(flag, metavar="NAME", parser=parse, autocompletion=lambda: list(names), **settings)


def complete_models(incomplete: str) -> list[str]:
    """Runs, checkpoints and model directories, for the completion of a shell."""
    from ddpm_cli.models.nearby import completions

    return completions(incomplete)


_COMMON: dict[str, Any] = {"rich_help_panel": "Common options"}

Device = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        envvar="DDPM_DEVICE",
        autocompletion=lambda: ["auto", "cpu", "cuda", "mps"],
        help="auto, cpu, cuda, cuda:N or mps. auto takes cuda if there is one, else mps, else cpu.",
        **_COMMON,
    ),
]
Precision = Annotated[
    str,
    named(
        "--precision",
        PRECISIONS,
        help="auto, fp32 or bf16. auto takes bf16 if the hardware is faster with it.",
        **_COMMON,
    ),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the network first, with torch.compile: minutes at the start, for long runs on a GPU.",
        **_COMMON,
    ),
]
Seed = Annotated[
    int, typer.Option("--seed", min=0, metavar="N", help="The same seed gives the same images.", **_COMMON)
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.", **_COMMON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no notes and no progress bar.", **_COMMON)]
Force = Annotated[bool, typer.Option("--force", help="Overwrite existing files.", **_COMMON)]

# The backslash keeps rich from reading [@revision] as markup.
ADDRESS = r"A run, a model directory, or org/name\[@revision] on the Hugging Face Hub."
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        metavar="MODEL",
        envvar="DDPM_MODEL",
        autocompletion=complete_models,
        help=f"{ADDRESS} Default: the newest run in ./runs, else bundled:digits.",
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        autocompletion=complete_models,
        help=r"A run, a model directory, a file of weights, org/name\[@revision] or a URL on the Hugging Face Hub. "
        "Default: the newest run in ./runs, else bundled:digits.",
    ),
]


def one_model(argument: str | None, option: str | None) -> str | None:
    """The model that was named, by MODEL or by --model. Raises UsageError if both name one.

    The environment also gives --model, and MODEL precedes it.
    """
    if argument is not None and option != os.environ.get("DDPM_MODEL"):
        raise UsageError(f"{argument} and --model {option} are two models", "Give one of them.")
    return option if argument is None else argument


Run = Annotated[
    Path | None,
    typer.Argument(
        metavar="RUN",
        autocompletion=complete_models,
        help="A run of ddpm train. Default: the newest run in ./runs.",
    ),
]
Weights = Annotated[
    str,
    named(
        "--weights",
        WEIGHTS,
        help="ema: the moving average of the weights. raw: the trained weights themselves; only checkpoints have them.",
    ),
]
_SAMPLING: dict[str, Any] = {"rich_help_panel": "Sampling"}

Sampler = Annotated[
    str | None,
    named(
        "--sampler",
        SAMPLERS,
        help="dpm++, ddim, langevin, or ddpm: all steps, as in the paper. Default: dpm++ in 20 steps.",
        **_SAMPLING,
    ),
]
SamplerSteps = Annotated[
    int | None,
    typer.Option(
        "--steps",
        parser=parse_count,
        metavar="N",
        help="Take N steps. Default: the sampler's: 20, ddim 50, langevin 40, ddpm all.",
        **_SAMPLING,
    ),
]
Spacing = Annotated[
    str | None,
    named(
        "--spacing",
        SPACINGS,
        help="How the steps are spread: uniform, quadratic or logsnr. Default: the sampler's, by image size.",
        **_SAMPLING,
    ),
]
Eta = Annotated[
    float | None,
    typer.Option(
        "--eta",
        metavar="X",
        help="The noise of ddim (default 0: none) and dpm++ (default 1: as much as ddpm).",
        **_SAMPLING,
    ),
]
Order = Annotated[
    int | None, typer.Option("--order", metavar="N", help="dpm++: its order, 1, 2 (default) or 3.", **_SAMPLING)
]
Updates = Annotated[
    int | None,
    typer.Option("--updates", metavar="N", help="langevin: updates at each step. Default: 5.", **_SAMPLING),
]
Scale = Annotated[
    int | None,
    typer.Option(
        "--scale",
        parser=parse_scale,
        metavar="N|auto",
        help="Draw each pixel N pixels wide and high. 1: exact pixels. auto (default): small images are enlarged in "
        "sheets of several.",
    ),
]
Preview = Annotated[bool, typer.Option("--preview", help="Show the picture in the terminal too.")]
Background = Annotated[
    str,
    typer.Option("--background", metavar="COLOR", help="The colour behind transparent pixels: a name or #rrggbb."),
]
