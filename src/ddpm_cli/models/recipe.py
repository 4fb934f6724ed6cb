"""The recipe of a model, `ddpm.json`: how it was trained, as JSON values and in words."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddpm_cli.config import RunConfig
from ddpm_cli.files import parse_json, read_bytes
from ddpm_cli.run_folder import CHECKPOINTS
from ddpm_cli.text import printable

__all__ = ["RECIPE", "read_recipe", "recipe", "recipe_in_words"]

RECIPE = "ddpm.json"  # a file in a model's folder


def recipe(config: RunConfig, name: str, images: int, step: int) -> dict[str, Any]:
    """How a model was trained, as JSON values, without paths of this machine.

    name: of the data set. images: how many. step: steps done.
    """
    data = {key: value for key, value in config.data.to_dict().items() if key != "images"}
    return {
        "version": config.version,
        "preset": config.preset,
        "base": _published(config.base),
        "step": step,
        "images": {"name": name, "count": images} | data,
        "train": config.train.to_dict(),
    }


def _published(base: str | None) -> str | None:
    """A model's address without paths of this machine: org/name@commit unchanged; for a run `cats, step-00010000`."""
    if base is None or not Path(base).is_absolute():
        return base
    *_, run, checkpoints, name = ("", "", *Path(base).parts)
    return f"{run}, {name}" if checkpoints == CHECKPOINTS else name


_LOSSES = {
    "simple": "L_simple",
    "min-snr": "min-SNR, with 5 as the largest weight",
    "debiased": "debiased, L_simple of eps divided by sqrt(SNR)",
    "vlb": "the variational bound",
    "hybrid": "hybrid, L_simple and the variational bound for the variance",
}


def recipe_in_words(values: Mapping[str, Any]) -> dict[str, str]:
    """A recipe in words, one line for each value. Missing values are left out."""
    images, train = values.get("images", {}), values.get("train", {})
    last = _percent(train.get("lr_decay"))
    shown = {
        "steps": _joined("{} of {}", values.get("step"), train.get("steps")),
        "data": _joined("{} images, {}", images.get("count"), images.get("name")),
        "prepared": _joined("{0}x{0}, {1}", images.get("size"), images.get("fit")),
        "held out": _joined("{} of all images", images.get("holdout") or None),
        "mirrored": {"True": "half of them", "False": "never"}.get(str(images.get("flip"))),
        "loss": _LOSSES.get(str(train.get("loss"))),
        "betas": "learned with the network" if train.get("learn_betas") is True else None,
        "batch size": train.get("batch_size"),
        "learning rate": _joined("{}, linear warm-up over {} steps", train.get("lr"), train.get("lr_warmup")),
        "learning rate at the end": _joined("falls to 0 over the last {} of the steps", last),
        "EMA decay": train.get("ema_decay"),
        "seed": train.get("seed"),
        "started from": values.get("base"),
        "trained by": _joined("ddpm {}", values.get("version")),
    }
    return {key: printable(str(value)) for key, value in shown.items() if value is not None}


def _percent(part: object) -> str | None:
    """A part as text. None for nothing, and for what is not a part."""
    return f"{100 * part:g} %" if isinstance(part, int | float) and 0 < part <= 1 else None


def _joined(form: str, *values: object) -> str | None:
    return None if None in values else form.format(*values)


def read_recipe(folder: Path) -> dict[str, Any] | None:
    """The recipe of the model in a folder. None if it has none, or one that is damaged or of another program.

    Values that ddpm does not write, such as lists, are left out.
    """
    with contextlib.suppress(OSError, ValueError):
        values = parse_json(read_bytes(folder / RECIPE))
        if isinstance(values, dict) and all(isinstance(values.get(key), dict) for key in ("images", "train")):
            parts = {key: _plain(values[key]) for key in ("images", "train")}
            return {key: parts.get(key, value) for key, value in values.items() if key in parts or _is_plain(value)}
    return None


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if _is_plain(value)}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
