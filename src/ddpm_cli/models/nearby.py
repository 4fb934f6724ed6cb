"""Runs and model directories near an address: for the completion of a shell, and for an address with a typing error.

It looks at names only, and imports no torch.
"""

from __future__ import annotations

import re
from pathlib import Path

from ddpm_cli.hub_address import path_of
from ddpm_cli.models.bundled import PREFIX, bundled_models
from ddpm_cli.names import nearest
from ddpm_cli.run_folder import CHECKPOINTS, CONFIG
from ddpm_cli.text import and_more

__all__ = ["completions", "did_you_mean", "models_in"]

# Shells evaluate some of what a completion prints. Names that need quotes are left to the shell's own completion.
_PLAIN = re.compile(r"\w[\w.+-]*")


def models_in(folder: Path) -> list[Path]:
    """The runs and model directories directly in a folder, by name. They have a config.json or a model_index.json."""
    return sorted({file.parent for name in (CONFIG, "model_index.json") for file in folder.glob(f"*/{name}")})


def completions(incomplete: str) -> list[str]:
    """What the beginning of an address may become: models in its folder, and in runs/ or checkpoints/ there."""
    folder = incomplete[: incomplete.rfind("/") + 1]
    return [
        f"{folder}{below}{path.name}"
        for below in ("", "runs/", f"{CHECKPOINTS}/")
        for path in models_in(path_of(f"{folder}{below}" or "."))
        if _PLAIN.fullmatch(path.name)
    ]


def did_you_mean(address: str, runs: Path, otherwise: str | None = None) -> str | None:
    """A hint that names the model whose name is nearest to that of an address where there is none.

    Such a model is in the folder of the address, in `runs`, or bundled. If no name is near, it names all in the folder
    of the address. otherwise: the hint if there are none; where both are useful, it follows.
    """
    path = path_of(address)
    found = {model.removeprefix(PREFIX): model for model in bundled_models()}
    found |= {model.name: str(model) for folder in (runs, path.parent) for model in models_in(folder)}
    near, beside = nearest(path.name, found), models_in(path.parent) if path.parent.name else []
    hint = None
    if near:
        hint = f"Did you mean {found[near]}?"
    elif beside:
        hint = f"{path.parent} has {and_more([model.name for model in beside])}."
    return " ".join(filter(None, [hint, otherwise])) or None
