"""Starts or resumes a training run.

`train` does everything. `open_run` does the same in parts, for the command line, which shows them.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.device import pick_dtype
from ddpm_cli.distributed import World, process_group
from ddpm_cli.models.pretrained import read_model
from ddpm_cli.models.runs import checkpoints, step_of
from ddpm_cli.signals import stop_signals
from ddpm_cli.training.events import Event
from ddpm_cli.training.notes import notes
from ddpm_cli.training.objective import OPTIONS
from ddpm_cli.training.opening import Bar, Opening, check_steps, write_left_out
from ddpm_cli.training.presets import usual_interval
from ddpm_cli.training.rehearsal import Rehearsal, measure, rehearse
from ddpm_cli.training.request import Request
from ddpm_cli.training.trainer import Trainer

__all__ = ["Run", "open_run", "train"]

_DATA_FIELDS = {field.name for field in fields(DataConfig)} - {"images"}
_TRAIN_FIELDS = {field.name for field in fields(TrainConfig)} - {"learn_betas"}  # that is schedule="learned"


@contextmanager
def _no_bar(what: str) -> Iterator[OnProgress]:
    yield silent


@dataclass
class Run:
    """An open run: its settings are chosen, its images are decoded, its trainer is ready.

    images: as the user named them. kept_images: names that find them again; a list from a pipe is kept in the folder.
    config: the settings. resuming: whether the run exists already.
    """

    folder: Path
    images: Sequence[str]
    kept_images: Sequence[str]
    config: RunConfig
    resuming: bool
    trainer: Trainer
    _opening: Opening

    def measure(self) -> Rehearsal:
        """Train for some seconds to measure memory, speed and time. The run cannot be trained afterwards."""

        def start() -> int:
            found = checkpoints(self.folder) if self.resuming else []
            step = step_of(found[-1]) if found else 0
            check_steps(self.config.train, step)
            return step

        self.trainer.first_step = self.trainer.step = self.trainer.world.on_main(start)
        return measure(self.trainer, self._sample_every_asked)

    def begin(self) -> None:
        """Load the newest checkpoint, try the largest step, and create the run's folder. Every rank must call it."""
        trainer, world = self.trainer, self.trainer.world
        if self.resuming:
            world.on_main(lambda: self._opening.restore(trainer))
            trainer.first_step = world.on_main(lambda: trainer.step)
        if trainer.first_step < self.config.train.steps:  # the same on all ranks; a step is still rank 0's alone
            rehearse(trainer, self._sample_every_asked)

        def make() -> None:
            self._opening.make_folder(self.config, self.resuming)
            write_left_out(self.folder, trainer.pack)

        world.on_main(make)

    @property
    def _sample_every_asked(self) -> bool:
        """Whether the user chose the interval of previews, now or when the run began."""
        asked = "sample_every" in self._opening.request.train
        return asked or self.config.train.sample_every != usual_interval(self.config)

    def notes(self) -> Iterator[str]:
        """What the user should know before the first step, after `begin`."""
        return notes(self.trainer)

    def events(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train to the last step, after `begin`; see `Trainer.events`."""
        return self.trainer.events(should_stop)

    def rescue(self, error: BaseException) -> None:
        """Save the last step if `error` has ended the loop over `events`."""
        if self.trainer.world.is_main:
            for _ in self.trainer.rescue(error):
                pass


def train(
    images: str | Path | Sequence[str | Path],
    folder: str | Path | None = None,
    *,
    preset: str = "auto",
    start_from: str | None = None,
    resume: bool = False,
    force: bool = False,
    strict: bool = False,
    device: str = "auto",
    precision: str = "auto",
    compiled: bool = False,
    scale: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    on_note: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Path:
    """Train a model on images (Algorithm 1), as `ddpm train` does. Returns the run's folder, an address for `DDPM`.

    images: a folder, or whatever else `ddpm train` takes, or several. folder: the run's, default runs/<name of images>.
    settings: fields of `DataConfig` and `TrainConfig`, such as size=32, flip=False, steps=5000, loss="vlb"; and the
    `objective.OPTIONS`, such as prediction="v", timesteps=100. None is the default.
    scale: of the previews' pixels; None enlarges small images.
    start_from: a model to fine-tune. resume, force, strict, preset: see `Request`. compiled: see `Trainer`.
    on_event: called with every event of `training.events`. on_note: called with notes and warnings, as strings.
    should_stop: called after every step, and before every layer of the network that draws a preview; if it returns
    True, the run saves a checkpoint and stops.
    Under torchrun all processes train one run; on_event and on_note are called on rank 0 only.
    Raises DDPMError; TypeError for an unknown setting or a scale that is no number; ValueError without images. Ctrl-C
    raises KeyboardInterrupt after the current step, and a second Ctrl-C at once. Then, and if on_event raises, a
    checkpoint is saved before. Other signals are left to the caller.
    """
    if unknown := settings.keys() - _DATA_FIELDS - _TRAIN_FIELDS - set(OPTIONS):
        raise TypeError(f"train() has no setting {min(unknown)!r}")
    chosen = {name: value for name, value in settings.items() if value is not None}
    if scale is not None and type(scale) is not int:
        raise TypeError(f"train(): scale must be a whole number or None, not {scale!r}")
    named = [images] if isinstance(images, str | Path) else images
    if not named:
        raise ValueError("train() needs images")
    request = Request(
        images=[str(image) for image in named],
        folder=None if folder is None else Path(folder),
        data={name: value for name, value in chosen.items() if name in _DATA_FIELDS},
        train={name: value for name, value in chosen.items() if name in _TRAIN_FIELDS},
        preset=preset,
        start_from=start_from,
        resume=resume,
        force=force,
        strict=strict,
        objective={name: value for name, value in chosen.items() if name in OPTIONS},
    )
    with (
        process_group() as world,
        open_run(
            request, world, device=device, precision=precision, warn=on_note, scale=scale, compiled=compiled
        ) as run,
    ):
        run.begin()
        for note in run.notes() if world.is_main else ():
            on_note(note)
        with stop_signals(_ctrl_c(), again=lambda number: signal.default_int_handler(number, None)) as caught:
            try:
                for event in run.events(lambda: bool(caught) or should_stop()):
                    if world.is_main:
                        on_event(event)
            except BaseException as error:  # of on_event, or a second Ctrl-C
                run.rescue(error)
                raise
        if caught:
            raise KeyboardInterrupt
        return run.folder


def _ctrl_c() -> list[int]:
    """SIGINT, unless the caller handles it. Only the main thread can catch signals."""
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    return [signal.SIGINT] if usual and threading.current_thread() is threading.main_thread() else []


@contextmanager
def open_run(
    request: Request,
    world: World,
    *,
    device: str = "auto",
    precision: str = "auto",
    dry: bool = False,
    bar: Bar = _no_bar,
    warn: Callable[[str], None] = lambda text: None,
    quiet: bool = True,
    scale: int | None = None,
    compiled: bool = False,
) -> Iterator[Run]:
    """Choose the settings of a run, decode its images, and hold its lock until the block ends. Every rank must call it.

    dry: only for `Run.measure`; nothing is decoded, locked or written. warn: called with warnings, on rank 0.
    quiet: no progress bar for the download of a model. scale: of the previews. compiled: see `Trainer`.
    Raises DDPMError.
    """
    with ExitStack() as held:
        where, dtype = world.on_all(lambda: ((on := world.pick_device(device)), pick_dtype(precision, on)))
        opening = world.on_all(lambda: Opening(request, world, where, dry, bar, warn, held, quiet))
        config, resuming, base = world.on_main(opening.decide)
        if config.schedule.needs_float32:
            dtype = world.on_all(lambda: pick_dtype(precision, where, exact=True))
        pack = opening.blank_pack(config.data) if dry else opening.packs(config.data)

        def trainer_here() -> Trainer:
            weights = read_model(base.folder, base.files)[0].state_dict() if base and world.is_main else None
            return Trainer(opening.folder, config, pack, where, dtype, weights, world, scale, compiled)

        trainer = world.on_all(trainer_here)
        yield Run(opening.folder, request.images, opening.kept_images, config, resuming, trainer, opening)
