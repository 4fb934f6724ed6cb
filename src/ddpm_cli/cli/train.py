"""`ddpm train`: a model from a folder of images."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.follow import finish, follow, header, show_plan
from ddpm_cli.cli.run import (
    Beginning,
    Job,
    begun,
    blank_pack,
    go_on,
    open_packs,
    prepare,
    report,
    start_at,
)
from ddpm_cli.errors import UsageError
from ddpm_cli.presets import PRESETS

if TYPE_CHECKING:
    from ddpm_cli.trainer import Trainer

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
    run = output or Path("runs") / _name(images)
    wishes: dict[str, dict[str, Any]] = {
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
    wishes = {part: {key: value for key, value in asked.items() if value is not None} for part, asked in wishes.items()}

    from ddpm_cli.distributed import joined

    with ExitStack() as held, joined() as world:
        console = Console("train", as_json, quiet or not world.leads)
        job = Job(images, run, wishes, preset, start_from, resume, force, strict, world, console, held)
        code = _train(job, device, precision, tensorboard, dry_run)
    raise typer.Exit(code)  # only now: a run that was stopped is no error, and its processes part in order


def _train(job: Job, device: str, precision: str, tensorboard: bool, dry_run: bool) -> int:
    """What every process does. Whatever may fail is done together, or by the one that leads. Returns the exit code."""
    from ddpm_cli.board import require_tensorboard
    from ddpm_cli.device import describe, pick_dtype
    from ddpm_cli.pretrained import load_model
    from ddpm_cli.rehearsal import measure, rehearse
    from ddpm_cli.trainer import Trainer

    world, console = job.world, job.console
    where, dtype = world.together(lambda: ((on := world.pick_device(device)), pick_dtype(precision, on)))

    def begin() -> Beginning:
        _check(job.wishes)
        if tensorboard:
            require_tensorboard()
        return begun(job, where)

    config, resuming, base = world.lead(begin)
    pack = blank_pack(job, config.data) if dry_run else open_packs(job, config.data)

    def trainer_here() -> Trainer:
        weights = load_model(base.folder, base.files)[0].state_dict() if base and world.leads else None
        return Trainer(job.run, config, pack, where, dtype, weights, world)

    trainer = world.together(trainer_here)
    machine = describe(where, dtype)
    if dry_run:
        start = start_at(trainer, resuming)
        with console.bar("trying it", None):
            plan = measure(trainer)
        if world.leads:
            show_plan(console, job.images, trainer, machine, start, plan)
        return 0
    with console.bar("trying the largest step", None):
        rehearse(trainer)

    def get_ready() -> None:
        if resuming:
            go_on(job, trainer)
        prepare(job, config, resuming)
        report(job.run, pack)
        header(console, job.images, trainer, machine)

    world.lead(get_ready)
    loss, stopped_by = follow(console, trainer, tensorboard)
    return finish(console, job.images, trainer, loss, stopped_by)


def _name(images: str) -> str:
    """What a run on these images is called: their folder's name, a file's without its suffix, a data set's."""
    if "://" in images:
        from ddpm_cli.sources import parse_address

        return parse_address(images)[0].rpartition("/")[2]
    return re.sub(r"(\.tar)?\.(zip|tar|tgz|tbz2?|txz|gz|bz2|xz|txt|lst)$", "", Path(images).resolve().name, flags=re.I)


def _check(wishes: dict[str, dict[str, Any]]) -> None:
    """Raises UsageError on values that no run can have."""
    if wishes["data"].get("fit", "crop") not in ("crop", "pad", "stretch"):
        raise UsageError(f"--fit {wishes['data']['fit']} is not crop, pad or stretch")
    if not 0 < wishes["train"].get("lr", 1.0) < math.inf:
        raise UsageError(f"--lr {wishes['train']['lr']} is not a number above 0")
    if "background" in wishes["data"]:
        from ddpm_cli import images

        images.check_background(wishes["data"]["background"])
