"""`ddpm info`: the facts about a model."""

from __future__ import annotations

from typing import Any

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console, aligned

__all__ = ["EXAMPLES", "info"]

EXAMPLES = """
Examples:
  ddpm info runs/cats
  ddpm info google/ddpm-cifar10-32
"""


def info(
    model: options.ModelArgument = None,
    address: options.Model = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Show the facts about a model: images, network, schedule, variance and training.

    Weights on this machine are read and checked.
    From the Hub only the configuration is downloaded.
    """
    console = Console("info", as_json, quiet)
    from ddpm_cli.cli.model import note_fallback
    from ddpm_cli.models import hub
    from ddpm_cli.models.card import read_card
    from ddpm_cli.models.facts import facts, words
    from ddpm_cli.models.pretrained import read_configs, read_model
    from ddpm_cli.models.recipe import read_recipe, recipe_in_words

    located = hub.resolve(options.one_model(model, address), quiet=not console.live, weights=False)
    note_fallback(console, located)
    unet, schedule = read_configs(located.folder, located.files)
    here = bool(located.weights) and all(path.is_file() for path in located.weights)
    if here:
        read_model(located.folder, located.files)
    model_facts = facts(unet, schedule)
    recipe = read_recipe(located.folder)
    card = {} if recipe else read_card(located.folder)
    weights = [name.rpartition("/")[2] for name in located.files.weights]
    fields: dict[str, Any] = {
        "model": located.origin,
        "folder": str(located.folder),
        "weights": weights,
        "weight_bytes": located.weight_bytes,
    }
    if as_json:
        console.result("", **fields, **model_facts, trained=recipe or card or None)
        return
    files = [*(weights if len(weights) == 1 else [f"{len(weights)} shards"]), f"{located.weight_bytes / 1e6:.1f} MB"]
    about_weights = [*(files if weights else []), *([] if here else ["not downloaded, so not checked"])]
    rows = {"model": located.origin} | words(model_facts) | {"weights": ", ".join(about_weights)}
    training = recipe_in_words(recipe) if recipe else card
    rows |= {key: value for key, value in training.items() if key not in rows}
    console.result("\n".join(aligned(rows)))
