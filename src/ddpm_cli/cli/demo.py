"""`ddpm demo`: a page that shows what a model does."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.output import pick_target
from ddpm_cli.errors import UsageError

__all__ = ["EXAMPLES", "demo"]

EXAMPLES = """
Examples:
  ddpm demo
  ddpm demo -m google/ddpm-cifar10-32 -o cifar10/
"""


def demo(
    model: options.Model = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="DIR", help="The folder to write. Its page is index.html.")
    ] = "demo",
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: options.Seed = 0,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Show what a model does: a page with a slider through time, for a browser.

    Adds noise to an image and removes it step by step,
    draws samples, and mixes two images.
    The page explains what you see, and has the command for each picture.
    """
    console = Console("demo", as_json, quiet)
    if output == "-":
        raise UsageError("-o -: a demo is a folder, not bytes for stdout", "Give -o the name of a folder.")
    folder = pick_target(f"{output.rstrip('/') or '/'}/", "", (), console, force, folders=True).path
    assert folder is not None

    from ddpm_cli.cli.demo_page import PAGE, write_demo
    from ddpm_cli.cli.model import find_model, note_sampling, open_model
    from ddpm_cli.models.demo import Plan, draw

    located = find_model(console, model)
    ddpm = open_model(console, located, device, precision, "ema")
    plan = Plan(ddpm)
    note_sampling(console, ddpm, plan.usual)
    done = 0
    with console.bar("drawing, images x evaluations", plan.evaluations) as update:

        def progress(count: int) -> None:
            nonlocal done
            done += count
            update(done)

        drawn = draw(ddpm, plan, seed, progress)
    # A run may go on training, so the commands name its checkpoint.
    address = located.origin if Path(located.address).is_absolute() else located.address
    chosen = [("-m", address), ("--device", device), ("--precision", precision)]
    repeat = " ".join(f"{flag} {quote(value)}" for flag, value in chosen if value != "auto")
    write_demo(folder, ddpm, plan, drawn, repeat, seed)
    page = str(folder / PAGE)
    console.note("open the page in a browser")
    console.result(page, output=page, model=located.origin, seed=seed)
