"""`ddpm push`: a model to the Hugging Face Hub."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.errors import ModelError, UsageError
from ddpm_cli.hub_address import NAME
from ddpm_cli.text import in_bytes

__all__ = ["push"]


def push(
    model: Annotated[str, typer.Argument(metavar="RUN", help="A run (its newest checkpoint) or a model directory.")],
    repository: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to put it on the Hugging Face Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private. Default: as its owner has it set.")
    ] = False,
    message: Annotated[
        str | None, typer.Option("--message", "-M", metavar="TEXT", help="Of the commit. Default: what is sent.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Send without asking.")] = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace a model card that is there already.", rich_help_panel="Common options"),
    ] = False,
) -> None:
    """Upload a model to the Hugging Face Hub, with its model card, in one commit.

    Shows what it will send and where, and asks first. Uses the login of `hf auth login`, or HF_TOKEN.
    """
    console = Console("push", as_json, quiet)
    if not re.fullmatch(NAME, repository):
        raise UsageError(f"{repository}: not a name on the Hub", "Write org/name, or your user name for org.")
    if not Path(model).expanduser().exists():
        raise ModelError(f"{model}: no such file or directory", "Give a run or a model directory on this machine.")
    if not yes and (quiet or not sys.stdin.isatty()):
        raise UsageError("--yes is needed where nobody can be asked, or is told what is sent")

    from ddpm_cli.models import hub, publish
    from ddpm_cli.models.card import CARD

    located = hub.resolve(model)
    with publish.contents(located, repository) as files:
        remote = publish.look(repository)
        if private and remote.exists and not remote.private:
            message = f"--private: {repository} is there already, and public"
            raise UsageError(message, "Make it private on its page first.")
        if CARD in remote.files and not force:
            del files[CARD]
        state = "private" if remote.private or (private and not remote.exists) else "public"
        if not (remote.exists or private):
            state += ", unless its owner has set otherwise"
        console.note(f"{located.origin} -> {repository} ({state}, {'is there already' if remote.exists else 'new'})")
        sizes = {name: len(data) if isinstance(data, bytes) else data.stat().st_size for name, data in files.items()}
        console.table(
            {name: in_bytes(size) for name, size in sizes.items()} | {"in all": in_bytes(sum(sizes.values()))}
        )
        if CARD in remote.files and not force:
            console.note(f"  the {CARD} that is there stays (--force replaces it)")
        if others := sorted(remote.files - files.keys() - {CARD, ".gitattributes"}):
            console.note(f"  stays there too: {', '.join(others)}")
        if not yes and not typer.confirm("send this?", err=True):
            console.note("nothing was sent")
            raise typer.Exit(1)
        message = message or f"{located.folder.resolve().name} from ddpm"
        url, commit = publish.send(repository, files, private, message, quiet=not console.live)
    console.result(url, url=url, commit=commit, files=sizes)
