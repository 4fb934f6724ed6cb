"""A page about a run: curves, previews, settings and evaluations, from the files of the run alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_cli.config import RunConfig
from ddpm_cli.data import html, plots
from ddpm_cli.data.html import Picture
from ddpm_cli.data.plots import Chart
from ddpm_cli.data.sources import name_of
from ddpm_cli.errors import DataError
from ddpm_cli.evaluation import bound
from ddpm_cli.files import read_bytes, read_config
from ddpm_cli.models.card import PREVIEW
from ddpm_cli.models.facts import facts, words
from ddpm_cli.models.recipe import read_recipe, recipe, recipe_in_words
from ddpm_cli.models.results import in_words, kept_results
from ddpm_cli.models.runs import checkpoints, evaluations, preview_file, previews, step_of
from ddpm_cli.run_folder import CONFIG
from ddpm_cli.text import counted, duration
from ddpm_cli.training import curves
from ddpm_cli.training.repeat import command_of, command_to_resume

__all__ = ["last_step", "report"]

_MOST = 60  # previews of each kind that a page has
_PREVIEW_WIDTH = 448  # pixels
_BOUND = ("bound.csv", "bound.png")  # of `ddpm eval`


def last_step(run: Path, lines: Sequence[Mapping[str, Any]]) -> int:
    """The last step that a run has a trace of. A run that was stopped has a checkpoint after its last line of metrics.

    lines: `curves.read_metrics`.
    """
    logged: int = lines[-1]["step"]
    return max([logged, *map(step_of, checkpoints(run))])


def report(run: Path, lines: Sequence[Mapping[str, Any]]) -> bytes:
    """The page as HTML, in one file. It needs no model, so it also works while the run is training.

    lines: `curves.read_metrics`. Pictures that cannot be read are left out. Raises ModelError if the settings of the
    run are damaged.
    """
    config = read_config(RunConfig, run / CONFIG)
    step, steps = last_step(run, lines), config.train.steps
    done = step >= steps
    model = facts(config.unet, config.schedule)
    about = words(model)
    trained = recipe_in_words(_recipe(run, config, step)) | _time(lines)
    lead = f"Step {step} of {steps}. {about['images']} images, {about['network']}, {about['schedule']}."
    body = [
        html.paragraph(lead),
        "" if done else _unfinished(config, run),
        html.section("Samples", _previews(run) or ("" if done else html.paragraph("There are no previews yet."))),
        html.section("Curves", _curves(lines)),
        html.section("Evaluation", *_evaluation(run)),
        html.section("Model", html.table([*about.items()])),
        html.section("Training", html.table([*trained.items()])),
        html.section(
            "Repeat",
            html.paragraph(
                f"This trains a model with the same settings, with ddpm {config.version}. "
                "It is the same model, unless --resume has changed the number of steps."
            ),
            html.code(command_of(config, run)),
            html.fold("All settings", html.code(json.dumps(config.to_dict(), indent=2))),
        ),
    ]
    return html.page(run.resolve().name, "ddpm report", "".join(body))


def _unfinished(config: RunConfig, run: Path) -> str:
    return html.paragraph("The run is not finished. If it is not training now, this continues it:") + html.code(
        command_to_resume(config, run)
    )


def _time(lines: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """How long the training took, up to the last line that says it."""
    known = [(line["step"], line["seconds"]) for line in lines if line.get("seconds") is not None]
    return {"time": f"{duration(known[-1][1])} for {counted(known[-1][0], 'step')}"} if known else {}


def _recipe(run: Path, config: RunConfig, step: int) -> dict[str, Any]:
    """How the run is trained. Only a checkpoint knows the number of images."""
    paths = [config.data.images] if isinstance(config.data.images, str) else [*config.data.images]
    found = recipe(config, name_of(paths), 0, step)
    kept = [known for path in checkpoints(run)[-1:] if (known := read_recipe(path))]
    count = kept[0]["images"].get("count") if kept else None
    return found | {"images": found["images"] | {"count": count}}


def _previews(run: Path) -> str:
    """The previews of both weights with a slider over the steps; else the picture of the newest checkpoint."""
    steps = sorted({step for step, _ in previews(run)})
    shown = []
    for step in _spread(steps, _MOST):
        averaged, raw = (_picture(preview_file(run, step, raw)) for raw in (False, True))
        if averaged and raw:
            shown.append((step, averaged, raw))
    if not shown:
        newest = [picture for path in checkpoints(run)[-1:] if (picture := _picture(path / PREVIEW))]
        return "".join(html.image(picture, "samples", _PREVIEW_WIDTH) for picture in newest)
    rows = {
        "averaged weights (EMA)": [averaged for _, averaged, _ in shown],
        "raw weights": [raw for *_, raw in shown],
    }
    captions = [f"step {step}" for step, *_ in shown]
    left_out = f", {len(shown)} of {len(steps)} previews" if len(shown) < len(steps) else ""
    return html.paragraph(f"Always from the same noise{left_out}.") + html.slider(
        rows, captions, len(shown) - 1, _PREVIEW_WIDTH, (captions[0], captions[-1]), "step"
    )


def _spread(values: Sequence[int], most: int) -> list[int]:
    """At most so many values, evenly spread, with the first and the last one."""
    if len(values) <= most:
        return [*values]
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _picture(path: Path) -> Picture | None:
    """A picture of the run. None if it is missing or damaged: the rest of the page is worth having."""
    try:
        return html.embedded(read_bytes(path), str(path))
    except (OSError, DataError):
        return None


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    shown = [*curves.charts(lines), *curves.colours(lines)]
    quarters = "The loss is shown as a whole, and by quarter of t: t 1/4 has the least noise."
    return (html.paragraph(quarters) if len(shown[0].curves) > 1 else "") + _drawn(shown)


def _drawn(shown: Sequence[Chart]) -> str:
    return f'<div class="charts">{"".join(map(plots.svg, shown))}</div>\n'


def _evaluation(run: Path) -> list[str]:
    """The results of all evaluated checkpoints, the newest first, and the newest bound."""
    rows: list[tuple[str, str, str]] = []
    measured: list[str] = []
    bounds: list[str] = []
    for folder in reversed(evaluations(run)):
        for name, value, how in in_words(kept_results(folder)):
            rows.append((f"step {step_of(folder)}", name, value))
            measured.append(how)
        caption = f"The variational bound by t, at step {step_of(folder)}"
        if not bounds and (shown := _bound(folder, caption)):
            bounds = [html.paragraph(f"{caption}:"), shown]
    return [html.table(rows, ("checkpoint", "metric", "value"), measured), *bounds]


def _bound(folder: Path, caption: str) -> str:
    """The charts of an evaluation's bound; without its table, the picture. Empty if both are missing or damaged."""
    table, picture = (folder / name for name in _BOUND)
    try:
        return _drawn(bound.charts(read_bytes(table)))
    except (OSError, ValueError):
        return html.sheet(found, caption) if (found := _picture(picture)) else ""
