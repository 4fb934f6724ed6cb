"""`ddpm plot`: the metrics of a run as curves."""

from __future__ import annotations

from typing import Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.output import deliver, pick_target
from ddpm_cli.text import printable

__all__ = ["EXAMPLES", "plot"]

EXAMPLES = """
Examples:
  ddpm plot
  ddpm plot runs/cats -o curves.png
"""

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def plot(
    run: options.Run = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="A .png, .jpg or .webp file, or - for stdout. Default: RUN/plot.png at a terminal, stdout in a pipe.",
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Plot a run's loss, gradient norm, learning rate and speed.

    Writes a picture, and at a terminal also prints the curves as text.
    Works while the run is training.
    """
    console = Console("plot", as_json, quiet)
    from ddpm_cli.cli.model import find_run
    from ddpm_cli.data import plots
    from ddpm_cli.training import curves

    run = find_run("plot", run)
    lines = curves.read_metrics(run)
    # RUN/plot.png may be replaced; a file that the user named may not.
    target = pick_target(output, str(run / "plot.png"), _SUFFIXES, console, force or output is None)
    charts = curves.charts(lines)
    from ddpm_cli.data.pictures import picture_bytes

    if console.live:
        columns = max(20, min(console.width - 12, 100))
        for chart in charts:
            console.note(plots.text(chart, columns))
            console.note()
    title = printable(f"{run.resolve().name}, step {lines[-1]['step']}")
    data = picture_bytes(plots.draw(charts, title), target.suffix)
    deliver(target, data, console, run=str(run), **lines[-1])
