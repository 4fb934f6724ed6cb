"""Reads and writes model cards: the README.md of a model, for people and for the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_cli.files import read_bytes
from ddpm_cli.models.facts import words
from ddpm_cli.models.recipe import recipe_in_words
from ddpm_cli.models.results import METRICS, in_words
from ddpm_cli.text import printable

__all__ = ["CARD", "PREVIEW", "is_generated", "model_card", "read_card"]

CARD, PREVIEW = "README.md", "samples.png"  # files in a model's folder: the card, and its picture

_LONGEST = 1_000_000  # bytes that are read of a card
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.S)
_HYPERPARAMETERS = re.compile(r"^#+ [^\n]*hyper-?parameters[^\n]*$(?P<body>.*?)(?=^#|\Z)", re.M | re.S | re.I)
_HYPERPARAMETER = re.compile(r"^[-*] +(?P<key>[A-Za-z][\w ]*): +(?P<value>\S.*)$", re.M)


def read_card(folder: Path) -> dict[str, str]:
    """What a model's card contains about its training: data set, licence, list of hyperparameters."""
    from huggingface_hub import ModelCard  # late: it takes a third of a second

    try:
        text = read_bytes(folder / CARD)[:_LONGEST].decode(errors="replace").replace("\r\n", "\n")
    except OSError:
        return {}
    found: dict[str, str] = {}
    if _FRONT_MATTER.match(text):
        with contextlib.suppress(Exception):  # metadata that is not YAML is left out
            metadata = ModelCard(text, ignore_metadata_errors=True).data.to_dict()  # type: ignore[no-untyped-call]
            for key in ("license", "datasets", "base_model"):
                value = metadata.get(key)
                names = value if isinstance(value, list) else [value]
                if names and all(isinstance(name, str) for name in names):  # YAML can expand to any size
                    found[key] = ", ".join(names)
    if section := _HYPERPARAMETERS.search(text):
        found |= {match["key"]: match["value"].strip() for match in _HYPERPARAMETER.finditer(section["body"])}
    return found


_DIFFUSERS = """\
```python
from diffusers import DDPMPipeline

image = DDPMPipeline.from_pretrained({})().images[0]
```"""


def model_card(
    model: Mapping[str, Any],
    trained: Mapping[str, Any] | None,
    preview: bool,
    address: str | None = None,
    results: Sequence[Mapping[str, Any]] = (),
) -> str:
    """README.md of a model: the Hub's metadata, the preview, the recipe, and how to use it. All of it is printable.

    model: `facts`. trained: a `recipe`, if it is known. preview: whether the folder has a grid of samples.
    address: where it will be on the Hub, org/name. results: of `ddpm eval`, see `results`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    title = address.split("/")[-1] if address else "A denoising diffusion model"
    base = printable(str((trained or {}).get("base") or ""))
    on = f" of {words(model)['images']} images"
    if trained:
        how = f"fine-tuned from {base.split('@')[0]}" if base else "trained"
        on += printable(f", {how} on {trained['images'].get('count')} images ({trained['images'].get('name')})")
    where = address or "path/to/this/folder"
    in_diffusers = model["in_diffusers"]
    metadata = ModelCardData(
        library_name="diffusers" if in_diffusers else "ddpm-cli",
        pipeline_tag="unconditional-image-generation",
        tags=["ddpm", "diffusion", "unconditional-image-generation", "ddpm-cli"],
        base_model=base.split("@")[0] if "/" in base else None,
        model_name=printable(title),
        eval_results=[
            EvalResult(
                task_type="unconditional-image-generation",
                dataset_type="image-folder",
                dataset_name=printable(result["set"]),
                metric_type=result["metric"],
                metric_value=result["value"],
                metric_name=METRICS[result["metric"]][0],
            )
            for result in results
        ]
        or None,
    )
    parts = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        f"A [denoising diffusion probabilistic model](https://arxiv.org/abs/2006.11239){on}.",
        *([f"![Samples]({PREVIEW})"] if preview else []),
        "## Use",
        f"```sh\npip install ddpm-cli\nddpm sample -m {where} --n 64 -o grid.png\n"
        f"ddpm denoise-trace -m {where} -o trace.gif\n```",
        *(["or in Python, with diffusers:", _DIFFUSERS.format(json.dumps(where))] if in_diffusers else []),
        "## The model",
        _table(words(model)),
        *(["## Training", _table(recipe_in_words(trained))] if trained else []),
        *(["## Evaluation", _results_table(results)] if results else []),
    ]
    text = "\n\n".join(parts) + "\n"
    return text + _MARK.format(_digest(text))


_MARK = "\n<!-- written by ddpm, {} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_generated(card: str) -> bool:
    """Whether `model_card` of any version wrote this card, and nobody has changed it."""
    text, mark, rest = card.rpartition(_MARK.partition("{}")[0])
    return bool(mark) and rest.startswith(_digest(text))


def _table(rows: Mapping[str, str]) -> str:
    cells = (f"| {key} | {_cell(value)} |" for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])


def _results_table(results: Sequence[Mapping[str, Any]]) -> str:
    rows = (f"| {' | '.join(map(_cell, row))} |" for row in in_words(results))
    return "\n".join(["| metric | value | measured |", "|---|---|---|", *rows])


def _cell(text: str) -> str:
    return text.replace("|", r"\|")
