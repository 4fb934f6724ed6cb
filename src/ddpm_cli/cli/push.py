"""`ddpm push`: upload a model to the Hugging Face Hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.errors import ModelError, UsageError
from ddpm_cli.hub_address import NAME, path_of
from ddpm_cli.models.nearby import did_you_mean
from ddpm_cli.text import in_bytes, printable

__all__ = ["EXAMPLES", "push"]

EXAMPLES = """
Examples:
  ddpm push runs/cats me/ddpm-cats
  ddpm push runs/cats me/ddpm-cats --private --yes
"""


def push(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            autocompletion=options.complete_models,
            help="A run, whose newest checkpoint is sent, or a model directory.",
        ),
    ],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the Hugging Face Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private. Default: the setting of its owner.")
    ] = False,
    message: Annotated[
        str | None,
        typer.Option("--message", "-M", metavar="TEXT", help="The commit message. Default: the name of the model."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the model card on the Hub.", rich_help_panel="Common options"),
    ] = False,
) -> None:
    """Upload a model and its model card to the Hugging Face Hub.

    Shows what it will send and asks before it sends anything.
    Everything goes in one commit. Log in with `hf auth login` or set HF_TOKEN first.
    """
    console = Console("push", as_json, quiet)
    if not re.fullmatch(NAME, repository):
        raise UsageError(f"{repository}: not the name of a repository on the Hub", "Write org/name or user/name.")
    if not path_of(model).exists():
        near = did_you_mean(model, Path("runs"))
        raise ModelError(
            f"{model}: no such file or directory", near or "Give a run or a model directory on this machine."
        )
    if not yes and (quiet or not sys.stdin.isatty()):
        raise UsageError(
            "cannot ask before sending, with --quiet or without a terminal", "Add --yes to send without asking."
        )

    from ddpm_cli.models import hub, publish
    from ddpm_cli.models.card import CARD

    located = hub.resolve(model)
    with publish.contents(located, repository) as files:
        remote = publish.look(repository)
        if private and remote.exists and not remote.private:
            message = f"--private: {repository} exists already, and is public"
            raise UsageError(message, "Make it private on its page first.")
        if CARD in remote.files and not force:
            del files[CARD]
        state = "private" if remote.private or (private and not remote.exists) else "public"
        if not (remote.exists or private):
            state += ", unless its owner's default is private"
        console.note(f"{located.origin} -> {repository} ({state}, {'exists already' if remote.exists else 'new'})")
        sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}
        console.table({name: in_bytes(size) for name, size in sizes.items()} | {"total": in_bytes(sum(sizes.values()))})
        if CARD in remote.files and not force:
            console.note(f"  the {CARD} on the Hub stays; --force replaces it")
        if others := sorted(remote.files - files.keys() - {CARD, ".gitattributes"}):
            console.note(f"  these files on the Hub stay too: {', '.join(map(printable, others))}")
        if not yes and not typer.confirm("Send this?", err=True):
            console.note("nothing was sent")
            raise typer.Exit(1)
        message = message or printable(f"{located.folder.resolve().name} from ddpm")
        url, commit = publish.send(repository, files, private, message, quiet=not console.live)
    console.result(url, url=url, commit=commit, files=sizes)
