"""The output of `ddpm train`: a header, the progress, and the end of a run."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from shlex import quote
from typing import TYPE_CHECKING

from ddpm_cli import __version__
from ddpm_cli.cli.console import Console, aligned
from ddpm_cli.errors import DataError
from ddpm_cli.signals import stop_signals
from ddpm_cli.text import and_more, counted, duration, in_bytes
from ddpm_cli.training.objective import named
from ddpm_cli.training.presets import PRESETS

if TYPE_CHECKING:
    from ddpm_cli.config import RunConfig
    from ddpm_cli.training.events import Event
    from ddpm_cli.training.rehearsal import Rehearsal
    from ddpm_cli.training.run import Run
    from ddpm_cli.training.trainer import Trainer

__all__ = ["finish", "follow", "header", "show_plan"]

_DAY = 86_400
_LOG_SECONDS = 30  # between lines of progress if there is no bar
_NAMED = 5  # the most IMAGES that are printed in the command to continue


def header(console: Console, run: Run, machine: str) -> None:
    """Print the images and the settings of a run."""
    trainer, folder = run.trainer, run.folder
    pack = trainer.pack
    doing = f"resuming at step {trainer.step}" if trainer.step else "training"
    console.note(f"ddpm {__version__}: {doing}, run {folder}", style="bold")
    rows = {"images": f"{len(pack)} in {_named(run)}, {len(pack.left_out)} left out{_held_out(run)}"}
    console.table(rows | _plan(trainer, machine))
    for note in run.notes():
        console.warn(note)
    console.note("  Ctrl-C saves a checkpoint and stops")


def _plan(trainer: Trainer, machine: str) -> dict[str, str]:
    """The settings of a run, as rows of a table."""
    config, world = trainer.config, trainer.world
    data, train = config.data, config.train
    colours = "gray" if data.channels == 1 else f"RGB on {data.background}"
    flips = "half of them mirrored (--no-flip turns this off)" if data.flip else "never mirrored"
    about = f"{config.preset}: {_parameters(trainer) / 1e6:.1f}M parameters, T={config.schedule.num_train_timesteps}"
    steps, images = counted(train.steps, "step"), counted(train.batch_size, "image")
    split = _split(train.batch_size, world.size, train.accumulate)
    rate = f"lr {train.lr:g}"
    if train.lr_decay:
        rate += f" that falls to 0 from step {round(train.steps * (1 - train.lr_decay))}"
    return {
        "prepared": f"{data.size}x{data.size} {colours}, {data.fit}, {flips}",
        "model": f"{about}{f', from {config.base}' if config.base else ''}",
        "objective": _objective(config),
        "training": f"{steps} of {images}{split}, {rate}, seed {train.seed}",
        "previews": _previews(trainer),
        "device": f"{machine}{f', in {world.size} processes' if world.size > 1 else ''}",
    }


def _objective(config: RunConfig) -> str:
    """The loss and the schedule in the words of the options."""
    has = named(config.schedule)
    betas = [f"{has[key]:g}" for key in ("beta_start", "beta_end") if has[key] is not None]
    schedule = " ".join([has["schedule"], *([f"({' to '.join(betas)})"] if betas else [])])
    return f"{config.train.loss} loss, predicts {has['prediction']}, variance {has['variance']}, schedule {schedule}"


def _previews(trainer: Trainer) -> str:
    """The sampler, interval and cost of previews."""
    from ddpm_cli.diffusion.samplers import plan_sampling
    from ddpm_cli.training.previews import IMAGES

    plan, steps = trainer.previews, trainer.config.train.steps
    when = f"every {plan.every} steps" if plan.every < steps else "at the end"
    cost = "" if plan.share is None else f", about {max(1, round(100 * plan.share))} % of the time"
    sampling = plan_sampling(trainer.schedule, trainer.pack.shape[-1])
    return f"{IMAGES} images in {len(sampling.timesteps)} steps of {sampling.sampler}, {when}{cost}"


def _parameters(trainer: Trainer) -> int:
    return sum(parameter.numel() for parameter in trainer.parameters)


def show_plan(console: Console, run: Run, machine: str, found: Rehearsal) -> None:
    """Print the result of --dry-run: the settings, and the memory, time and disk space that they need."""
    from ddpm_cli.training.memory import total_memory
    from ddpm_cli.training.notes import disk_space

    trainer, folder, start = run.trainer, run.folder, found.first_step
    train, pack = run.config.train, trainer.pack
    memory, each = total_memory(trainer.device), " in each process" if trainer.world.size > 1 else ""
    need, free, place = disk_space(trainer)
    pixels = len(pack) * math.prod(pack.shape)
    images_per_second = found.steps_per_second * train.batch_size
    seconds = f"{duration(found.seconds)} for {counted(train.steps - start, 'step')}, with previews"
    rows = {
        "run": f"{folder}{f', from step {start} on' if start else ''}",
        "images": f"{len(pack)} in {_named(run)}{_held_out(run)}",
        **_plan(trainer, machine),
        "memory": f"{in_bytes(found.memory)}{f' of {in_bytes(memory)}' if memory else ''}{each}",
        "speed": f"{found.steps_per_second:.3g} steps/s, {images_per_second:.3g} images/s",
        "time": seconds,
        "disk": f"{in_bytes(need)} for checkpoints of {in_bytes(trainer.checkpoint_bytes)}, {in_bytes(free)} free in "
        f"{place}{', which is too little' if need > free else ''}; {in_bytes(pixels)} of decoded images in the cache",
    }
    fields = {
        "run": str(folder),
        "start": start,
        "images": len(pack),
        "held_out": pack.held_out,
        "config": trainer.config.to_dict(),
        "parameters": _parameters(trainer),
        "processes": trainer.world.size,
        "device": machine,
        "memory_bytes": found.memory,
        "steps_per_second": found.steps_per_second,
        "images_per_second": images_per_second,
        "seconds": found.seconds,
        "checkpoint_bytes": trainer.checkpoint_bytes,
    }
    console.result("\n".join(aligned(rows)), **fields)


def _named(run: Run) -> str:
    """The IMAGES of the command, as text."""
    return and_more(["stdin" if image == "-" else image for image in run.images])


def _held_out(run: Run) -> str:
    return f", {run.trainer.pack.held_out} held out" if run.config.data.holdout else ""


def _split(batch_size: int, processes: int, parts: int) -> str:
    """How a batch is divided, as text."""
    least, more = divmod(batch_size, processes)
    each = f"{least} or {least + 1}" if more else str(least)
    shared = f" ({each} in each of {processes} processes)" if processes > 1 else ""
    return shared + (f" in {parts} parts" if parts > 1 else "")


def _stop_numbers() -> list[int]:
    """SIGINT (Ctrl-C), SIGTERM, and SIGHUP (a closed terminal) unless it is ignored, as by nohup."""
    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if ignored else [signal.SIGHUP])]


@contextmanager
def _board(console: Console, trainer: Trainer, wanted: bool) -> Iterator[Callable[[Event], None]]:
    """Yield a function that writes an event for TensorBoard. On failure it prints a note, and training continues."""
    from ddpm_cli.training.tensorboard import Board

    board: Board | None = None

    def attempt(work: Callable[[], None]) -> None:
        nonlocal board
        try:
            work()
        except DataError as error:
            board = None
            console.warn(f"{error.message}; training continues without TensorBoard")

    def begin() -> None:
        nonlocal board
        board = Board(trainer.run, trainer.step)

    def show(event: Event) -> None:
        if board:
            board.add(event)

    if wanted and trainer.world.is_main:
        attempt(begin)
    yield lambda event: attempt(lambda: show(event))
    if board:
        attempt(board.close)


def follow(console: Console, run: Run, tensorboard: bool) -> tuple[float | None, int | None]:
    """Train the run and show its progress. Returns the last loss, and the signal that stopped the run or None."""
    from ddpm_cli.data.pictures import grid
    from ddpm_cli.training.events import Finished, Logged, NotSaved, Previewed, Previewing, Progress, Saved

    trainer = run.trainer
    total = run.config.train.steps
    loss: float | None = None
    unit = " bits/dim" if run.config.train.loss == "vlb" else ""
    estimated = False
    drawing: int | None = None  # the step whose samples are being drawn
    started = printed = time.monotonic()
    event: Event
    show_on_board = _board(console, trainer, tensorboard)
    stopping = stop_signals(_stop_numbers(), again=lambda number: sys.exit(128 + number))
    with stopping as caught, show_on_board as show, console.bar("training", total, eta=False) as update:
        update(trainer.step)
        for event in run.events(lambda: bool(caught)):
            show(event)
            match event:
                case Progress():
                    drawing = None
                    loss = event.loss
                    speed = f"{event.images_per_second:.0f} images/s"
                    status = f"loss {loss:.4f}{unit}  {speed}  ETA {duration(event.seconds_left)}"
                    what = "stopping" if caught else "training"
                    update(event.step, what=what, status=status)
                    if not estimated and time.monotonic() - started > 5:
                        estimated = True
                        _warn_if_long(console, trainer, event.seconds_left)
                    if not console.live and time.monotonic() - printed > _LOG_SECONDS:
                        printed = time.monotonic()
                        console.note(f"step {event.step}/{total}  {status}")
                case Previewing():
                    update(event.step, what="drawing samples")
                    drawing = event.step
                    if not console.live:
                        console.note(f"step {event.step}: drawing samples")
                case Saved():
                    console.note(f"step {event.step}: {event.path}")
                case NotSaved():
                    goes_on = "; training continues" if event.goes_on else ""
                    console.warn(f"step {event.step} could not be saved: {event.reason}{goes_on}")
                case Previewed():
                    drawing = None
                    colours = f"mean colour {_colour(event.mean)}, of the images {_colour(event.data)}"
                    console.note(f"step {event.step}: {event.path} ({colours})")
                    console.show(partial(grid, event.samples))
                case Finished(interrupted=True) if drawing:
                    console.warn(f"the samples of step {drawing} were skipped, to stop sooner")
                case Logged() | Finished():
                    pass
        return loss, max(trainer.world.all_gather(caught[0] if caught else 0)) or None


def _colour(means: list[float]) -> str:
    return "/".join(f"{mean:.0f}" for mean in means)


def _warn_if_long(console: Console, trainer: Trainer, seconds: float) -> None:
    if seconds < _DAY:
        return
    smaller = PRESETS[trainer.config.preset].smaller if trainer.config.preset in PRESETS else None
    advice = f"--preset {smaller} is smaller" if smaller else "fewer --steps take less time"
    console.warn(f"at this speed the run takes {duration(seconds)}; {advice}. You can stop and resume it any time.")


def finish(console: Console, run: Run, loss: float | None, stopped_by: int | None) -> int:
    """Print how a run ended and what to do next. Returns the exit code."""
    trainer, total = run.trainer, run.config.train.steps
    folder = quote(str(run.folder))
    if trainer.step < total:
        console.note(f"stopped at step {trainer.step} of {total}; the run is in {run.folder}")
        command = f"ddpm train {' '.join(map(quote, run.kept_images))} -o {folder}"
        # The command also has torchrun's options, which are not known here; and a thousand names are too many to print.
        again = "the same command, and" if trainer.world.size > 1 or len(run.images) > _NAMED else command
        console.note(f"continue with: {again} --resume")
        return 128 + (stopped_by or signal.SIGINT)
    following = f"ddpm sample -m {folder} -o grid.png"
    console.note(f"done: {counted(total, 'step')}, {duration(trainer.seconds)} of training. Next: {following}")
    if trainer.world.is_main:
        console.result(str(run.folder), run=str(run.folder), steps=total, loss=loss, seconds=round(trainer.seconds, 3))
    return 0
