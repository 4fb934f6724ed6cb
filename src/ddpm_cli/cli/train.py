"""`ddpm train`: train a model on images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.names import FITS, LOSSES, PREDICTIONS, SCHEDULES, VARIANCES
from ddpm_cli.training.presets import PRESETS

if TYPE_CHECKING:
    from ddpm_cli.distributed import World
    from ddpm_cli.training.request import Request

__all__ = ["EXAMPLES", "train"]

EXAMPLES = """
Examples:
  ddpm train ./images
  ddpm train cats/*.jpg dogs.zip -o runs/pets
  ddpm train digits.zip --preset tiny --size 16 --no-flip --steps 1400
  ddpm train ./images --from google/ddpm-celebahq-256
  ddpm train ./images --prediction mean --loss vlb --variance learned
"""

# Panels of the help. The options that most runs need come before them, without a panel.
_IMAGES: dict[str, Any] = {"rich_help_panel": "Images"}
_TRAINING: dict[str, Any] = {"rich_help_panel": "Training"}
_OBJECTIVE: dict[str, Any] = {"rich_help_panel": "Objective"}
_CHECKPOINTS: dict[str, Any] = {"rich_help_panel": "Checkpoints and previews"}


def train(
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES",
            help="Folders of images (subfolders too), image files, .zip or .tar files, lists of paths (- is a list on "
            "stdin), or hf://org/name, a data set of the Hub.",
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RUN", help="The folder of the run. Default: runs/<name of IMAGES>."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            parser=options.parse_count,
            metavar="N",
            help="Total number of steps, also of a resumed run: 800000 or 800k. Default: the preset's.",
        ),
    ] = None,
    preset: Annotated[
        str | None,
        options.named(
            "--preset",
            ("auto", *PRESETS),
            help=f"{', '.join(PRESETS)} or auto. auto takes tiny without a GPU, else the preset for the image size.",
        ),
    ] = None,
    size: Annotated[
        int | None,
        typer.Option(
            "--size",
            parser=options.parse_count,
            metavar="PIXELS",
            help="The images become squares of this size. Default: chosen from the images.",
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", parser=options.parse_count, metavar="N", help="Images per step. Default: the preset's."
        ),
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            autocompletion=options.complete_models,
            help="Fine-tune a model: a run, a model directory, or org/name on the Hugging Face Hub.",
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue this run from its newest checkpoint, or start it.")
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Try a few steps and print the plan: model, memory, speed, time. Writes nothing."
        ),
    ] = False,
    channels: Annotated[
        int | None,
        typer.Option(
            "--channels",
            parser=options.parse_channels,
            metavar="N",
            help="1 for gray, 3 for RGB. Default: 1 if all images are gray.",
            **_IMAGES,
        ),
    ] = None,
    fit: Annotated[
        str | None,
        options.named("--fit", FITS, help="How to make an image square: crop (default), pad or stretch.", **_IMAGES),
    ] = None,
    background: Annotated[
        str | None,
        typer.Option(
            "--background",
            metavar="COLOR",
            help="The colour behind transparent pixels and of the padding: a name or #rrggbb. Default: white.",
            **_IMAGES,
        ),
    ] = None,
    flip: Annotated[
        bool | None,
        typer.Option(
            "--flip/--no-flip",
            help="Mirror half of the images at random (default). Use --no-flip for digits and text.",
            **_IMAGES,
        ),
    ] = None,
    holdout: Annotated[
        float | None,
        typer.Option(
            "--holdout",
            metavar="FRACTION",
            help="Never train on this fraction of the images, such as 0.1, to evaluate the model on them. Default: 0.",
            **_IMAGES,
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop if an image cannot be used, instead of leaving it out.", **_IMAGES)
    ] = False,
    lr: Annotated[
        float | None,
        typer.Option(
            "--lr", metavar="RATE", help="Learning rate of Adam after the warm-up. Default: the preset's.", **_TRAINING
        ),
    ] = None,
    lr_decay: Annotated[
        float | None,
        typer.Option(
            "--lr-decay",
            metavar="FRACTION",
            help="Let the learning rate fall to 0 over this last part of the steps, such as 0.5. Default: the "
            "preset's.",
            **_TRAINING,
        ),
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(
            "--accumulate",
            parser=options.parse_count,
            metavar="N",
            help="Accumulate gradients over N parts of each batch. Takes less memory, and is slower.",
            **_TRAINING,
        ),
    ] = None,
    prediction: Annotated[
        str | None,
        options.named(
            "--prediction",
            PREDICTIONS,
            help="What the network predicts: epsilon (the noise), sample (x_0), v, or mean (of x_{t-1}). "
            "Default: the preset's.",
            **_OBJECTIVE,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        options.named(
            "--loss",
            LOSSES,
            help="simple (Eq. 14), min-snr (Hang et al. 2023), debiased (Yu et al. 2023), vlb (the bound, Eq. 5) or "
            "hybrid (simple, and the bound for the variance). Default: the preset's; hybrid if the variance is "
            "learned.",
            **_OBJECTIVE,
        ),
    ] = None,
    variance: Annotated[
        str | None,
        options.named(
            "--variance",
            VARIANCES,
            help="Of the reverse process: fixed-large, fixed-small, learned or learned-range. Default: the preset's.",
            **_OBJECTIVE,
        ),
    ] = None,
    schedule: Annotated[
        str | None,
        options.named(
            "--schedule",
            SCHEDULES,
            help="The noise schedule: linear (default), cosine, quad, sigmoid, const, jsd, or learned with the "
            "network.",
            **_OBJECTIVE,
        ),
    ] = None,
    timesteps: Annotated[
        int | None,
        typer.Option(
            "--timesteps",
            parser=options.parse_count,
            metavar="T",
            help="Steps of the diffusion. Default: 1000.",
            **_OBJECTIVE,
        ),
    ] = None,
    beta_start: Annotated[
        float | None,
        typer.Option("--beta-start", metavar="BETA", help="The first beta. Default: 1e-4, times 1000/T.", **_OBJECTIVE),
    ] = None,
    beta_end: Annotated[
        float | None,
        typer.Option("--beta-end", metavar="BETA", help="The last beta. Default: 0.02, times 1000/T.", **_OBJECTIVE),
    ] = None,
    save_every: Annotated[
        int | None,
        typer.Option(
            "--save-every",
            parser=options.parse_count,
            metavar="N",
            help="Steps between checkpoints. There is at least one every half hour.",
            **_CHECKPOINTS,
        ),
    ] = None,
    sample_every: Annotated[
        int | None,
        typer.Option(
            "--sample-every", parser=options.parse_count, metavar="N", help="Steps between previews.", **_CHECKPOINTS
        ),
    ] = None,
    keep: Annotated[
        int | None,
        typer.Option(
            "--keep",
            parser=options.parse_count,
            metavar="N",
            help="Keep the N newest checkpoints. Default: 3.",
            **_CHECKPOINTS,
        ),
    ] = None,
    keep_every: Annotated[
        int | None,
        typer.Option(
            "--keep-every",
            parser=options.parse_count,
            metavar="N",
            help="Also keep the checkpoint of every Nth step.",
            **_CHECKPOINTS,
        ),
    ] = None,
    tensorboard: Annotated[
        bool,
        typer.Option(
            "--tensorboard", help="Write curves and previews to RUN/tensorboard for TensorBoard.", **_CHECKPOINTS
        ),
    ] = False,
    scale: Annotated[
        int | None,
        typer.Option(
            "--scale",
            parser=options.parse_scale,
            metavar="N|auto",
            help="Draw each pixel of a preview N pixels wide and high. 1: exact pixels. auto (default): small images "
            "are enlarged.",
            **_CHECKPOINTS,
        ),
    ] = None,
    preview: Annotated[
        bool, typer.Option("--preview", help="Show each preview in the terminal too.", **_CHECKPOINTS)
    ] = False,
    device: options.Device = "auto",
    precision: options.Precision = "auto",
    compiled: options.Compile = False,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            metavar="N",
            help="The same seed gives the same model. Default: 0.",
            rich_help_panel="Common options",
        ),
    ] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Start over, and rename an existing run to RUN.old-1. With --resume: accept other images.",
            rich_help_panel="Common options",
        ),
    ] = False,
) -> None:
    """Train a model on your images (Algorithm 1).

    Settings that you leave out are chosen from the images and the machine.
    Ctrl-C saves a checkpoint and stops. --resume continues.
    Judge a run by the pictures in RUN/samples: the loss soon stops falling,
    while the pictures still get better.
    """
    asked: dict[str, dict[str, Any]] = {
        "data": {
            "size": size,
            "channels": channels,
            "fit": fit,
            "background": background,
            "flip": flip,
            "holdout": holdout,
        },
        "train": {
            "steps": steps,
            "batch_size": batch_size,
            "accumulate": accumulate,
            "lr": lr,
            "lr_decay": lr_decay,
            "loss": loss,
            "seed": seed,
            "save_every": save_every,
            "sample_every": sample_every,
            "keep": keep,
            "keep_every": keep_every,
        },
        "objective": {
            "prediction": prediction,
            "variance": variance,
            "schedule": schedule,
            "timesteps": timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
        },
    }
    data, settings, objective = (
        {key: value for key, value in asked[part].items() if value is not None} for part in asked
    )

    from ddpm_cli.distributed import process_group
    from ddpm_cli.training.request import Request

    request = Request(images, output, data, settings, preset, start_from, resume, force, strict, objective)
    with process_group() as world:
        console = Console("train", as_json, quiet or not world.is_main, preview)
        code = _train(request, world, console, device, precision, scale, tensorboard, dry_run, compiled)
    raise typer.Exit(code)  # after the block: a stopped run is not an error, so the process group ends normally


def _train(
    request: Request,
    world: World,
    console: Console,
    device: str,
    precision: str,
    scale: int | None,
    tensorboard: bool,
    dry_run: bool,
    compiled: bool,
) -> int:
    """Open the run, show its settings and train it, in every process. Returns the exit code."""
    from ddpm_cli.cli.follow import finish, follow, header, show_plan
    from ddpm_cli.device import describe
    from ddpm_cli.training.run import open_run
    from ddpm_cli.training.tensorboard import require_tensorboard

    if tensorboard:
        world.on_main(lambda: require_tensorboard() and None)
    with open_run(
        request,
        world,
        device=device,
        precision=precision,
        dry=dry_run,
        bar=console.progress,
        warn=console.warn,
        quiet=not console.live,
        scale=scale,
        compiled=compiled,
    ) as run:
        machine = describe(run.trainer.device, run.trainer.dtype)
        first = "compiling the network, and " if compiled else ""
        if dry_run:
            with console.trial(f"{first}measuring training steps"):
                plan = run.measure()
            if world.is_main:
                show_plan(console, run, machine, plan)
            return 0
        with console.trial(f"{first}checking that a step fits into memory"):
            run.begin()
        if world.is_main:
            left = run.config.train.steps - run.trainer.step
            if left:
                header(console, run, machine)
            else:
                console.note(f"{run.folder}: has its {run.config.train.steps} steps already; more --steps train it on")
        loss, stopped_by = follow(console, run, tensorboard)
        return finish(console, run, loss, stopped_by)
