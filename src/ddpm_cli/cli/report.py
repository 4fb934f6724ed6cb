"""`ddpm report`: a run as a page for a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.output import deliver, pick_target

__all__ = ["EXAMPLES", "report"]

EXAMPLES = """
Examples:
  ddpm report
  ddpm report runs/cats -o cats.html
"""


def report(
    run: options.Run = None,
    output: Annotated[
        str | None,
        typer.Option("--output", "-o", metavar="PATH", help="A .html file, or - for stdout. Default: RUN/report.html."),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Write a page about a run: previews over time, curves, evaluations, settings.

    It is one file, to open in a browser, to keep or to send.
    Works while the run is training.
    """
    console = Console("report", as_json, quiet)
    from ddpm_cli.cli.model import find_run
    from ddpm_cli.training.curves import read_metrics
    from ddpm_cli.training.report import last_step
    from ddpm_cli.training.report import report as page_of

    run = find_run("report", run)
    lines = read_metrics(run)
    # RUN/report.html may be replaced; a file that the user named may not.
    may_replace = force or output is None
    target = pick_target(output, str(run / "report.html"), (".html",), console, may_replace, piped=False)
    page = page_of(run, lines)
    deliver(target, page, console, run=str(run), step=last_step(run, lines), bytes=len(page))
