"""`ddpm train`: a model from a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.follow import finish, follow, header, show_plan
from ddpm_cli.training.presets import PRESETS

if TYPE_CHECKING:
    from ddpm_cli.distributed import World
    from ddpm_cli.training.run import Request

__all__ = ["train"]


def train(
    images: Annotated[
        str,
        typer.Argument(
            help="A folder of images (subfolders too), a .zip or .tar, a text file of paths, or hf://org/name, a data "
            "set of the Hub."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RUN", help="The run's folder. Default: runs/<name of IMAGES>."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", parser=options.parse_count, metavar="N", help="Steps in all, resumed or not: 800k."),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(
            "--preset",
            metavar="NAME",
            help=f"{', '.join(PRESETS)} or auto. auto: tiny without a GPU, else by the images' size.",
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            help="Go on from the weights and the schedule of a model: a run, a model directory, org/name on the Hub.",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option("--size", min=1, metavar="PIXELS", help="Images are made this size. Default: by the images."),
    ] = None,
    channels: Annotated[
        int | None,
        typer.Option(
            "--channels",
            parser=options.parse_channels,
            metavar="1|3",
            help="1 gray, 3 RGB. Default: 1 if all images are gray.",
        ),
    ] = None,
    fit: Annotated[
        str | None, typer.Option("--fit", metavar="HOW", help="Non-square images: crop (default), pad or stretch.")
    ] = None,
    background: Annotated[
        str | None,
        typer.Option("--background", metavar="COLOR", help="Behind transparency and padding. Default: white."),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option("--flip/--no-flip", help="Mirror half of the images at random (default). Not for digits or text."),
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", parser=options.parse_count, metavar="N", help="Images a step.")
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            "--accumulate",
            parser=options.parse_count,
            metavar="N",
            help="Put a batch through the network in N parts: as good, slower, and in less memory.",
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="RATE", help="Adam's learning rate after its warm-up.")
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every",
            parser=options.parse_count,
            metavar="N",
            help="Steps between checkpoints; there is one every half hour at least.",
        ),
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option("--sample-every", parser=options.parse_count, metavar="N", help="Steps between previews."),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option("--keep", parser=options.parse_count, metavar="N", help="Newest checkpoints that stay on disk."),
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(
            "--keep-every",
            parser=options.parse_count,
            metavar="N",
            help="Also keep the checkpoints of every Nth step, for good.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with this run from its newest checkpoint, or start it.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop if an image cannot be used, instead of leaving it out.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write curves and previews for TensorBoard into RUN/tensorboard.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the plan: what is trained, its memory, speed and time. Tries it, writes nothing."
        ),
    ] = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, help="Default: 0.", rich_help_panel="Common options")
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Start anew; a run of that name is moved aside, not lost. With --resume: go on with other images.",
            rich_help_panel="Common options",
        ),
    ] = False,
) -> None:
    """Train a model on a folder of images (Algorithm 1).

    Chooses what is not asked for from the images and the machine.
    Ctrl-C saves a checkpoint and stops; --resume goes on.
    Judge a run by the pictures in RUN/samples: the loss falls quickly to a few hundredths and then hardly moves.
    """
    asked: dict[str, dict[str, Any]] = {
        "data": {"size": size, "channels": channels, "fit": fit, "background": background, "flip": flip},
        "train": {
            "steps": steps,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "lr": lr,
            "seed": seed,
            "save_every": save_every,
            "sample_every": sample_every,
            "keep": keep,
            "keep_every": keep_every,
        },
    }
    data, settings = ({key: value for key, value in asked[part].items() if value is not None} for part in asked)

    from ddpm_cli.distributed import process_group
    from ddpm_cli.training.run import Request

    request = Request([images], output, data, settings, preset, start_from, resume, force, strict)
    with process_group() as world:
        console = Console("train", as_json, quiet or not world.is_main)
        code = _train(request, world, console, device, precision, tensorboard, dry_run)
    raise typer.Exit(code)  # only now: a run that was stopped is no error, and its processes part in order


def _train(
    request: Request, world: World, console: Console, device: str, precision: str, tensorboard: bool, dry_run: bool
) -> int:
    """Open the run, show it and train it, in every process. Returns the exit code."""
    from ddpm_cli.device import describe
    from ddpm_cli.training.run import open_run
    from ddpm_cli.training.tensorboard import require_tensorboard

    if tensorboard:
        world.on_main(lambda: require_tensorboard() and None)
    with open_run(request, world, device, precision, dry_run, console.progress, console.warn) as run:
        machine = describe(run.trainer.device, run.trainer.dtype)
        if dry_run:
            with console.trial("trying a training step and a preview"):
                plan = run.measure()
            if world.is_main:
                show_plan(console, run, machine, plan)
            return 0
        with console.trial("trying the largest step and a preview"):
            run.begin()
        if world.is_main:
            header(console, run, machine)
        loss, stopped_by = follow(console, run, tensorboard)
        return finish(console, run, loss, stopped_by)
