"""`ddpm train`: a model from a folder of images."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ddpm_cli import __version__
from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.cli.run import go_on, locate, old_run, planned, prepare, report, require_all, resumed
from ddpm_cli.config import RunConfig
from ddpm_cli.errors import UsageError
from ddpm_cli.presets import PRESETS

if TYPE_CHECKING:
    from ddpm_cli.dataset import Pack
    from ddpm_cli.sources import Source
    from ddpm_cli.trainer import Event, Trainer

__all__ = ["train"]

_FEW_IMAGES = 1000  # below this a model learns its images by heart sooner than it learns what they have in common
_DAY = 86_400
_LOG_SECONDS = 30  # between lines where there is no bar
_NAMED = 5  # files that are named where more were left out


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
    console = Console("train", as_json, quiet)
    run = output or Path("runs") / _name(images)
    wishes: dict[str, Any] = {
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
    _check(wishes)
    old = old_run(run, resume, force)

    from ddpm_cli import checkpoint
    from ddpm_cli.dataset import open_pack
    from ddpm_cli.device import describe, pick_device, pick_dtype
    from ddpm_cli.pretrained import load_model
    from ddpm_cli.sources import open_source
    from ddpm_cli.trainer import Trainer

    where = pick_device(device)
    dtype = pick_dtype(precision, where)
    with console.progress("looking for images") as progress:
        source = open_source(images, _cache_dir(), progress)
    if old:
        config = resumed(old, wishes, preset, start_from)
        base = None if checkpoint.checkpoints(run) else locate(old.base, console)
    else:
        base = locate(start_from, console)
        config = planned(source, where, preset, wishes, base, console)
    with console.progress("decoding images") as progress:
        pack = open_pack(source, config.data, _cache_dir(), progress)
    if strict:
        require_all(pack)

    if config.train.accumulate > config.train.batch_size:
        raise UsageError(f"--accumulate {config.train.accumulate}: a batch has only {config.train.batch_size} images")
    weights = load_model(base.folder, base.files)[0].state_dict() if base else None
    trainer = Trainer(run, config, pack, where, dtype, weights)
    if old:
        go_on(trainer, force, console)
    if trainer.step > config.train.steps:
        raise UsageError(
            f"--steps {config.train.steps}: the run has done {trainer.step} already",
            "--steps is the total, resumed or not.",
        )
    config = replace(config, data=replace(config.data, images=source.address))
    prepare(run, config, bool(old), force, console)
    report(run, pack)
    _header(console, run, config, source, pack, trainer, describe(where, dtype))
    loss, stopped_by = _follow(console, trainer)
    _finish(console, run, images, trainer, loss, stopped_by)


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


def _cache_dir() -> Path:
    """$DDPM_CACHE_DIR, else ddpm/ in the user's cache folder."""
    if chosen := os.environ.get("DDPM_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"


def _header(
    console: Console, run: Path, config: RunConfig, source: Source, pack: Pack, trainer: Trainer, machine: str
) -> None:
    data, train = config.data, config.train
    parameters = sum(parameter.numel() for parameter in trainer.parameters)
    doing = f"resuming at step {trainer.step}" if trainer.step else "training"
    console.note(f"ddpm {__version__}: {doing}, run {run}", style="bold")
    console.note(f"  images   {len(pack)} in {source.path}, {len(pack.left_out)} left out")
    colours = "gray" if data.channels == 1 else f"RGB on {data.background}"
    flips = "half of them mirrored (--no-flip to leave that out)" if data.flip else "never mirrored"
    console.note(f"  made     {data.size}x{data.size} {colours}, {data.fit}, {flips}")
    about = f"{config.preset}: {parameters / 1e6:.1f}M parameters, T={config.schedule.num_train_timesteps}"
    console.note(f"  model    {about}{f', from {config.base}' if config.base else ''}")
    parts = f" in {train.accumulate} parts" if train.accumulate > 1 else ""
    console.note(
        f"  training {train.steps} steps of {train.batch_size} images{parts}, lr {train.lr:g}, seed {train.seed}"
    )
    console.note(f"  device   {machine}")
    for name, reason in pack.left_out[:_NAMED]:
        console.warn(f"left out {name}: {reason}")
    if len(pack.left_out) > _NAMED:
        console.warn(f"and left out {len(pack.left_out) - _NAMED} more; all are in {run / 'left_out.txt'}")
    if len(pack) < _FEW_IMAGES:
        console.warn(f"few images ({len(pack)}); expect the model to learn them by heart")
    console.note("  Ctrl-C saves and stops")


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Turn the first Ctrl-C or SIGTERM into an entry of the list that this gives; a second one stops at once."""
    caught: list[int] = []

    def remember(number: int, frame: object) -> None:
        if caught:
            sys.exit(128 + number)
        caught.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _follow(console: Console, trainer: Trainer) -> tuple[float | None, int | None]:
    """Train, and show it. Returns the last loss, and the signal that stopped it, if any."""
    from ddpm_cli.trainer import Finished, NotSaved, Previewing, Progress, Saved

    total = trainer.config.train.steps
    loss: float | None = None
    estimated = False
    started = said = time.monotonic()
    event: Event
    with _stop_signals() as caught, console.bar("training", total, eta=False) as update:
        update(trainer.step)
        for event in trainer.events(lambda: bool(caught)):
            match event:
                case Progress():
                    loss = event.loss
                    speed = f"{event.images_per_second:.0f} images/s"
                    status = f"loss {loss:.4f}  {speed}  ETA {_duration(event.seconds_left)}"
                    what = "stopping" if caught else "training"
                    update(event.step, what=what, status=status)
                    if not estimated and time.monotonic() - started > 5:
                        estimated = True
                        _warn_if_long(console, trainer, event.seconds_left)
                    if not console.live and time.monotonic() - said > _LOG_SECONDS:
                        said = time.monotonic()
                        console.note(f"step {event.step}/{total}  {status}")
                case Previewing():
                    update(event.step, what="drawing samples")
                case Saved():
                    console.note(f"step {event.step}: {event.path}")
                case NotSaved():
                    console.warn(f"step {event.step} could not be saved: {event.reason}; training goes on")
                case Finished():
                    pass
    return loss, caught[0] if caught else None


def _warn_if_long(console: Console, trainer: Trainer, seconds: float) -> None:
    if seconds < _DAY:
        return
    smaller = PRESETS[trainer.config.preset].smaller if trainer.config.preset in PRESETS else None
    advice = f"--preset {smaller} is smaller" if smaller else "fewer --steps take less"
    console.warn(f"at this speed this takes {_duration(seconds)}; {advice}. It can be stopped and resumed at any time.")


def _duration(seconds: float) -> str:
    if seconds >= 2 * _DAY:
        return f"{seconds / _DAY:.0f} days"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _finish(
    console: Console, run: Path, images: str, trainer: Trainer, loss: float | None, stopped_by: int | None
) -> None:
    total = trainer.config.train.steps
    if trainer.step < total:
        console.note(f"stopped at step {trainer.step} of {total}; everything is in {run}")
        console.note(f"go on with: ddpm train {quote(images)} -o {quote(str(run))} --resume")
        raise typer.Exit(128 + (stopped_by or signal.SIGINT))
    console.note(
        f"done: {total} steps in {_duration(trainer.seconds)}. Now: ddpm sample -m {quote(str(run))} -o grid.png"
    )
    console.result(str(run), run=str(run), steps=total, loss=loss, seconds=round(trainer.seconds, 3))
