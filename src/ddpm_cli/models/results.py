"""The results of `ddpm eval`, `eval.json`: measured numbers with what they were measured on, as values and in words.

A result is a dictionary. metric: a name in `METRICS`. value, and error or deviation, if it has one. set: the
images that it is about: train, held-out, a name, or samples for what is about these alone. how: a sentence about
everything that the number depends on. The other entries depend on the metric.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_cli.errors import DataError
from ddpm_cli.files import json_bytes, parse_json, read_bytes, write_file
from ddpm_cli.run_folder import CHECKPOINTS, EVALUATIONS
from ddpm_cli.text import printable

__all__ = [
    "METRICS",
    "RESULTS",
    "default_folder",
    "in_words",
    "kept_results",
    "read_results",
    "require_results_of",
    "write_results",
]

RESULTS = "eval.json"

# The name of each metric for people, and the number of its decimals.
METRICS = {
    "bits_per_dim": ("bits/dim", 4),
    "fid": ("FID", 3),
    "frechet": ("Fréchet distance", 3),
    "kid": ("KID x 1000", 3),
    "inception_score": ("Inception score", 3),
    "precision": ("precision", 4),
    "recall": ("recall", 4),
}

Result = dict[str, Any]


def default_folder(model: Path, name: str, weights: str = "ema") -> Path:
    """Where the evaluation of a model is kept: in its run, else in a folder of this name in the current one.

    Those of its averaged and of its raw weights are apart, since they are two models.
    """
    end = "-raw" if weights == "raw" else ""
    if model.parent.name == CHECKPOINTS:
        return model.parent.parent / EVALUATIONS / f"{model.name}{end}"
    return Path("eval") / f"{name}{end}"


def read_results(folder: Path, fingerprint: str) -> list[Result]:
    """The results in a folder; none if it has no such file, or one that is damaged or of something else.

    fingerprint: of the model, `DDPM.fingerprint`; or of the images, if they were evaluated without a model.
    """
    what, found = _read(folder)
    return found if what == fingerprint else []


def require_results_of(folder: Path, fingerprint: str) -> None:
    """Raises DataError if a folder has results of another model or of other images. See `read_results`."""
    what, found = _read(folder)
    if found and what != fingerprint:
        raise DataError(
            f"{folder}: has results of another model, or of other images",
            "Name another folder with -o, or use --force to replace them.",
        )


def kept_results(folder: Path) -> list[Result]:
    """The results in a folder, whatever model or images they are of; none if it has no such file, or a damaged one."""
    return _read(folder)[1]


def _read(folder: Path) -> tuple[object, list[Result]]:
    """The fingerprint of what was evaluated, and the results."""
    with contextlib.suppress(OSError, ValueError):
        values = parse_json(read_bytes(folder / RESULTS))
        if isinstance(values, dict) and isinstance(found := values.get("results"), list):
            return values.get("fingerprint"), [result for result in found if _is_result(result)]
    return None, []


def write_results(folder: Path, fingerprint: str, results: Sequence[Result], **about: Any) -> list[Result]:
    """Add results to those in a folder; they replace those of the same metric and set. Returns all of them.

    Results of anything else are dropped, see `require_results_of`. about: more values for the file.
    """
    new = {_key(result): result for result in results}
    kept = {_key(result): result for result in read_results(folder, fingerprint)}
    both = [*(kept | new).values()]
    write_file(folder / RESULTS, json_bytes({**about, "fingerprint": fingerprint, "results": both}))
    return both


def in_words(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows of a table: the metric and its images, the value with its error, and how it was measured. Printable."""
    rows = []
    for result in results:
        name, digits = METRICS[result["metric"]]
        factor = 1000 if result["metric"] == "kid" else 1
        value = f"{factor * result['value']:.{digits}f}"
        spread = result.get("error", result.get("deviation"))
        if _is_number(spread):
            value += f" ± {factor * spread:.{digits}f}"
        rows.append((f"{name} ({result['set']})", value, str(result.get("how", ""))))
    return [(printable(name), value, printable(how)) for name, value, how in rows]


def _key(result: Mapping[str, Any]) -> tuple[str, str]:
    return result["metric"], result["set"]


def _is_result(value: object) -> bool:
    return (
        isinstance(value, dict)
        and str(value.get("metric")) in METRICS
        and isinstance(value.get("set"), str)
        and _is_number(value.get("value"))
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
