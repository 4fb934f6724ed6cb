"""Starts or resumes a training run.

`train` does everything. `open_run` does the same in parts, for the command line, which shows them.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
from ddpm_cli.data import images
from ddpm_cli.data.cache import cache_folder
from ddpm_cli.data.pack import Pack, open_pack
from ddpm_cli.data.sources import Listed, Source, is_stream, list_bytes, name_of, open_sources, read_stream
from ddpm_cli.data.survey import survey
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.device import pick_dtype
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.distributed import World, process_group, restarted_in, sign
from ddpm_cli.errors import DataError, DDPMError, LockedError, ModelError, UsageError
from ddpm_cli.files import LOCK, lock, read_config, renew_file
from ddpm_cli.hub_address import parse_name, parse_url, path_of
from ddpm_cli.models import hub
from ddpm_cli.models.pretrained import read_configs, read_model
from ddpm_cli.models.runs import checkpoints, step_of
from ddpm_cli.run_folder import CHECKPOINTS, CONFIG
from ddpm_cli.signals import stop_signals
from ddpm_cli.text import and_more
from ddpm_cli.training import checkpoint
from ddpm_cli.training.events import Event
from ddpm_cli.training.notes import notes
from ddpm_cli.training.plan import Base, plan_run
from ddpm_cli.training.rehearsal import BlankPack, Rehearsal, measure, rehearse
from ddpm_cli.training.trainer import Trainer

__all__ = ["Bar", "Request", "Run", "open_run", "train"]

_NAMED = 5  # the most files that an error names
_DATA_FIELDS = {field.name for field in fields(DataConfig)} - {"images"}
_TRAIN_FIELDS = {field.name for field in fields(TrainConfig)}

# A context with a progress bar for a task; the argument describes the task.
Bar = Callable[[str], AbstractContextManager[OnProgress]]


@contextmanager
def _no_bar(what: str) -> Iterator[OnProgress]:
    yield silent


@dataclass(frozen=True)
class Request:
    """The options of a run. The others are chosen from the images and the machine; a resumed run keeps its settings.

    images: folders, archives, lists, image files, or hf://org/name, see `data.sources.open_source`; - is a list on
    stdin. folder: the run's; None is runs/<name of the images>.
    data, train: fields of `DataConfig` and `TrainConfig`. preset: a name in `presets.PRESETS`, or auto.
    start_from: the address of a model to fine-tune.
    resume: continue the run if it exists. force: rename an existing run and start over; with resume, accept other
    images. strict: raise an error for images that cannot be used, instead of leaving them out.
    """

    images: Sequence[str]
    folder: Path | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    start_from: str | None = None
    resume: bool = False
    force: bool = False
    strict: bool = False

    def check(self) -> None:
        """Raises UsageError for values that are not valid."""
        if self.data.get("fit", "crop") not in ("crop", "pad", "stretch"):
            raise UsageError(f"--fit {self.data['fit']} is not crop, pad or stretch")
        if not 0 < self.train.get("lr", 1.0) < math.inf:
            raise UsageError(f"--lr {self.train['lr']} is not a number above 0")
        if "background" in self.data:
            images.check_background(self.data["background"])


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
    _opening: _Opening

    def measure(self) -> Rehearsal:
        """Train for some seconds to measure memory, speed and time. The run cannot be trained afterwards."""

        def start() -> int:
            found = checkpoints(self.folder) if self.resuming else []
            step = step_of(found[-1]) if found else 0
            _check_steps(self.config.train, step)
            return step

        self.trainer.first_step = self.trainer.step = self.trainer.world.on_main(start)
        return measure(self.trainer, self._sample_every_asked)

    def begin(self) -> None:
        """Load the newest checkpoint, try the largest step, and create the run's folder. Every rank must call it."""
        trainer, world = self.trainer, self.trainer.world
        if self.resuming:
            world.on_main(lambda: self._opening.restore(trainer))
            trainer.first_step = world.on_main(lambda: trainer.step)
        rehearse(trainer, self._sample_every_asked)

        def make() -> None:
            self._opening.make_folder(self.config, self.resuming)
            _write_left_out(self.folder, trainer.pack)

        world.on_main(make)

    @property
    def _sample_every_asked(self) -> bool:
        return "sample_every" in self._opening.request.train

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
    on_event: Callable[[Event], None] = lambda event: None,
    on_note: Callable[[str], None] = lambda text: None,
    should_stop: Callable[[], bool] = lambda: False,
    **settings: Any,
) -> Path:
    """Train a model on images (Algorithm 1), as `ddpm train` does. Returns the run's folder, an address for `DDPM`.

    images: a folder, or whatever else `ddpm train` takes, or several. folder: the run's, default runs/<name of images>.
    settings: fields of `DataConfig` and `TrainConfig`, such as size=32, flip=False, steps=5000. None is the default.
    start_from: a model to fine-tune. resume, force, strict, preset: see `Request`.
    on_event: called with every event of `training.events`. on_note: called with notes and warnings, as strings.
    should_stop: called after every step, and before every layer of the network that draws a preview; if it returns
    True, the run saves a checkpoint and stops.
    Under torchrun all processes train one run; on_event and on_note are called on rank 0 only.
    Raises DDPMError; TypeError for an unknown setting; ValueError without images. Ctrl-C raises KeyboardInterrupt after
    the current step, and a second Ctrl-C at once. Then, and if on_event raises, a checkpoint is saved before.
    """
    if unknown := settings.keys() - _DATA_FIELDS - _TRAIN_FIELDS:
        raise TypeError(f"train() has no setting {min(unknown)!r}")
    chosen = {name: value for name, value in settings.items() if value is not None}
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
    )
    with process_group() as world, open_run(request, world, device, precision, warn=on_note) as run:
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
    device: str = "auto",
    precision: str = "auto",
    dry: bool = False,
    bar: Bar = _no_bar,
    warn: Callable[[str], None] = lambda text: None,
    quiet: bool = True,
) -> Iterator[Run]:
    """Choose the settings of a run, decode its images, and hold its lock until the block ends. Every rank must call it.

    dry: only for `Run.measure`; nothing is decoded, locked or written. warn: called with warnings, on rank 0.
    quiet: no progress bar for the download of a model. Raises DDPMError.
    """
    with ExitStack() as held:
        where, dtype = world.on_all(lambda: ((on := world.pick_device(device)), pick_dtype(precision, on)))
        opening = world.on_all(lambda: _Opening(request, world, where, dry, bar, warn, held, quiet))
        config, resuming, base = world.on_main(opening.decide)
        pack = opening.blank_pack(config.data) if dry else opening.packs(config.data)

        def trainer_here() -> Trainer:
            weights = read_model(base.folder, base.files)[0].state_dict() if base and world.is_main else None
            return Trainer(opening.folder, config, pack, where, dtype, weights, world)

        trainer = world.on_all(trainer_here)
        yield Run(opening.folder, request.images, opening.kept_images, config, resuming, trainer, opening)


class _Decision(NamedTuple):
    """base: the model to fine-tune; None if there is none, or if the run has a checkpoint."""

    config: RunConfig
    resuming: bool
    base: hub.Located | None


class _Opening:
    """Turns a Request into a Run. Its methods run on rank 0 only, unless their docstring names every rank."""

    def __init__(
        self,
        request: Request,
        world: World,
        where: torch.device,
        dry: bool,
        bar: Bar,
        warn: Callable[[str], None],
        held: ExitStack,
        quiet: bool,
    ) -> None:
        """held: contexts that stay open until the run ends, such as its lock."""
        self.folder = request.folder or Path("runs") / name_of(request.images)
        self.request = request
        self._world = world
        self._where = where
        self._dry = dry
        self._bar = bar
        self._warn = warn
        self._held = held
        self._quiet = quiet
        self._locked = False
        self._resume = request.resume
        self._force = request.force
        self._restarted = False
        self._source: Source | None = None
        self.kept_images = _kept(request.images, self.folder)
        self._lists: dict[Path, list[str]] = {}  # what was read from pipes, and the files that will hold it

    @property
    def source(self) -> Source:
        """The images that the user named. To find them may take a while."""
        if self._source is None:
            with self._bar("looking for images") as progress:
                both = zip(self.request.images, self.kept_images, strict=True)
                named = [image if image == kept else self._read(image, kept) for image, kept in both]
                self._source = open_sources(named, cache_folder(), progress)
        return self._source

    def _read(self, image: str, kept: str) -> Listed | str:
        """Read a list from a pipe, which only the main process can do, and only once."""
        if self._restarted and Path(kept).is_file():
            return kept  # the process before this one has read the pipe
        if not self._world.is_main:
            raise DataError(
                f"{image}: this process cannot read the list that process 0 has read",
                "Write the list to a file, and name that instead.",
            )
        listed = read_stream(image, str(Path(kept).resolve()))
        self._lists[Path(kept)] = listed.names
        return listed

    def decide(self) -> _Decision:
        """Choose the settings of the run, and lock it if it exists. Raises DDPMError."""
        self.request.check()
        old = self._old_config()
        if old:
            config = self._resumed(old)
            base = None if checkpoints(self.folder) else self._locate(old.base)
        else:
            base = self._locate(self.request.start_from)
            config = self._planned(base)
        config = replace(config, data=replace(config.data, images=_images(self.source)))
        _check_batch(config.train, self._world.size)
        return _Decision(config, old is not None, base)

    def _old_config(self) -> RunConfig | None:
        """The configuration of the run to resume, or None for a new run. Raises DDPMError if neither is possible."""
        exists = (self.folder / CONFIG).is_file()
        checkpoint.check_folders(self.folder)
        if exists and not self._dry:
            self._lock()
            if restarted_in(self.folder / LOCK):  # torchrun runs the same command again, and its run exists now
                self._restarted = True
                self._resume, self._force = True, self._force and self._resume
        if self._resume and exists:
            return _config_of(self.folder)
        if exists and not self._force:
            raise _taken(self.folder)
        if self.folder.exists() and not exists and not _is_empty(self.folder):
            raise DDPMError(f"{self.folder}: exists, and is not a run of ddpm", "Name another folder with -o.")
        return None

    def _lock(self) -> None:
        """Lock this run until it ends."""
        try:
            self._locked = True
            if not self._held.enter_context(lock(self.folder / LOCK, wait=False)):
                self._warn(
                    f"{self.folder}: this file system has no locks. Do not let a second process train this run at the "
                    "same time: that would damage it"
                )
        except LockedError:
            raise LockedError(
                f"{self.folder}: another process is training this run",
                "Wait for it, or stop it. ddpm plot shows its progress.",
            ) from None

    def _locate(self, address: str | None) -> hub.Located | None:
        """Find the model to fine-tune, if there is one."""
        return None if address is None else hub.resolve(address, quiet=self._quiet)

    def _planned(self, base: hub.Located | None) -> RunConfig:
        """The configuration of a new run. base: the model to fine-tune."""
        with self._bar("reading headers") as progress:
            found = survey(self.source, progress)
        return plan_run(
            found,
            _images(self.source),
            on_gpu=self._where.type != "cpu",
            preset=self.request.preset or "auto",
            data=self.request.data,
            train=self.request.train,
            base=Base(base.address, *read_configs(base.folder, base.files)) if base else None,
        )

    def _resumed(self, old: RunConfig) -> RunConfig:
        """The configuration of a resumed run. Raises UsageError that names contradicting options."""
        preset, start_from = self.request.preset, self.request.start_from
        contradictions = [
            f"{_as_flag(key, value)} (the run has {_as_flag(key, has) if isinstance(has, bool) else has})"
            for kept, asked in ((old.data, self.request.data), (old.train, self.request.train))
            for key, value in asked.items()
            if key not in TrainConfig.FREE and value != (has := getattr(kept, key))
        ]
        if preset not in (None, "auto", old.preset):
            contradictions.append(f"--preset {preset} (the run has {old.preset})")
        if start_from is not None and not _same_model(start_from, old.base):
            contradictions.append(f"--from {start_from} (the run {f'has {old.base}' if old.base else 'has none'})")
        if contradictions:
            raise UsageError(
                f"--resume: contradicts the run: {', '.join(contradictions)}",
                "Leave these out to continue the run, or start another with -o RUN.",
            )
        free = {key: value for key, value in self.request.train.items() if key in TrainConfig.FREE}
        return replace(old, train=replace(old.train, **free))

    def packs(self, data: DataConfig) -> Pack:
        """The decoded images. Every rank must call it.

        Rank 0 decodes them. A rank on a machine without access to the cache of rank 0 decodes its own copy.
        Raises DataError if there are none, or if they are not those of rank 0.
        """
        found: list[Pack] = []

        def decode() -> Pack:
            with self._bar("decoding images") as progress:
                return open_pack(self.source, data, cache_folder(), progress)

        def on_main() -> tuple[Path, str]:
            found.append(decode())
            if self.request.strict:
                _require_all(found[0])
            return found[0].folder, found[0].fingerprint

        folder, fingerprint = self._world.on_main(on_main)

        def here() -> Pack:
            if found:
                return found[0]
            try:
                pack = Pack(folder, (data.channels, data.size, data.size))
            except DataError:
                pack = decode()
            if pack.fingerprint != fingerprint:
                raise DataError(f"{and_more(self.request.images)}: not the images that rank 0 has on its machine")
            return pack

        return self._world.on_all(here)

    def blank_pack(self, data: DataConfig) -> Pack:
        """Black images of the same number and size, without decoding. Every rank must call it."""

        def count() -> int:
            with self._bar("looking for images") as progress:
                self.source.scan(progress)
            return len(self.source.names)

        return BlankPack(self._world.on_main(count), (data.channels, data.size, data.size))

    def restore(self, trainer: Trainer) -> None:
        """Load the newest checkpoint. Raises DDPMError if the images have changed, unless forced."""
        found = checkpoints(self.folder)
        if not found:
            self._warn(f"{self.folder} has no checkpoint yet; starting from step 0")
            return
        if self._newest_good(trainer, found) != trainer.pack.fingerprint:
            if not self._force:
                raise DDPMError(
                    "--resume: the images are not those that the run was trained on",
                    "Give those, or train another run with -o RUN, or add --force to continue with these.",
                )
            self._warn("continuing with other images than those that the run was trained on")
        _check_steps(trainer.config.train, trainer.step)

    def _newest_good(self, trainer: Trainer, found: list[Path]) -> str:
        """Load the newest intact checkpoint, and rename damaged newer ones. Returns its pack's fingerprint."""
        damaged = []
        for path in reversed(found):
            try:
                fingerprint = trainer.resume(path)
            except ModelError as error:
                self._warn(error.message)
                damaged.append(path)
                continue
            for newer in damaged:
                checkpoint.set_aside(newer)
                self._warn(f"{newer.name} is damaged and was renamed; continuing from {path.name}")
            return fingerprint
        raise ModelError(
            f"{self.folder}: none of its checkpoints can be read", "--force starts over, and keeps the old run."
        )

    def make_folder(self, config: RunConfig, resuming: bool) -> None:
        """Create the run's folder. This comes last, when nothing can be refused any more."""
        run = self.folder
        if self._force and not resuming and run.exists():
            if not self._locked:  # it was not a run at the first check, but may be trained now
                self._lock()
            aside = next(path for i in range(1, 10_000) if not (path := run.with_name(f"{run.name}.old-{i}")).exists())
            run.rename(aside)
            self._warn(f"moved the run that was in {run} to {aside}")
        if not resuming:
            self._lock()
            if (run / CONFIG).exists():  # since the first check
                raise _taken(run)
        sign(run / LOCK)
        checkpoint.begin_run(run, config)
        for path, names in self._lists.items():
            renew_file(path, list_bytes(names))
        checkpoint.tidy(run)


def _images(source: Source) -> str | tuple[str, ...]:
    """Where the images are, as the configuration has it."""
    return source.addresses[0] if len(source.addresses) == 1 else source.addresses


def _kept(images: Sequence[str], run: Path) -> list[str]:
    """The images as they were named, but for a list from a pipe the file in which the run keeps it."""
    places = (str(run / f"list{number}.txt") for number in ("", *range(2, len(images) + 1)))
    return [next(places) if is_stream(image) else image for image in images]


def _config_of(run: Path) -> RunConfig:
    """The configuration of a run. Raises ModelError, naming the file, if it cannot be used."""
    path = run / CONFIG
    config = read_config(RunConfig, path)
    try:
        NoiseSchedule.from_config(config.schedule)
    except ModelError as error:
        raise ModelError(f"{path}: schedule: {error.message}", error.hint) from None
    return config


def _taken(run: Path) -> DDPMError:
    return DDPMError(
        f"{run}: a run exists already", "Continue it: --resume. Start another: -o RUN. Start over: --force."
    )


def _is_empty(folder: Path) -> bool:
    """Whether a folder has nothing but unfinished files of a killed process."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def _same_model(address: str, base: str | None) -> bool:
    """Whether an address may be that of the model that a run fine-tunes. A branch may have newer commits by now."""
    if base is None:
        return False
    path = path_of(address)
    if path.exists():
        here = path.resolve()
        return Path(base) in (here, here.parent) or Path(base).parent in (here, here / CHECKPOINTS)
    found = parse_url(address) if "://" in address else parse_name(address)
    return found is not None and found.name == base.partition("@")[0]


def _check_batch(settings: TrainConfig, processes: int) -> None:
    """Raises UsageError if a batch cannot be split over its parts or ranks."""
    if settings.accumulate > settings.batch_size:
        raise UsageError(f"--accumulate {settings.accumulate}: a batch has only {settings.batch_size} images")
    if processes > settings.batch_size:
        raise UsageError(f"--batch-size {settings.batch_size}: fewer images than the {processes} processes")


def _as_flag(key: str, value: object) -> str:
    """A setting as the command line writes it: --batch-size 4, --flip, --no-flip."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return f"--{name}" if value else f"--no-{name}"
    return f"--{name} {value}"


def _check_steps(settings: TrainConfig, done: int) -> None:
    """Raises UsageError if a run has done more steps than it shall."""
    if done > settings.steps:
        raise UsageError(
            f"--steps {settings.steps}: the run has done {done} already", "--steps is the total, also of a resumed run."
        )


def _require_all(pack: Pack) -> None:
    """For --strict: raises DataError, naming some of them, if images were left out."""
    if pack.left_out:
        named = [f"\n  {name}: {reason}" for name, reason in pack.left_out[:_NAMED]]
        more = f"\n  and {rest} more" if (rest := len(pack.left_out) - _NAMED) > 0 else ""
        raise DataError(
            f"--strict: {len(pack.left_out)} images cannot be used{''.join(named)}{more}",
            "Repair or remove them. Without --strict a run leaves them out and lists them in its left_out.txt.",
        )


def _write_left_out(run: Path, pack: Pack) -> None:
    """Write into the run's folder which images were left out, and why: `name: reason`, a line each."""
    path = run / "left_out.txt"
    if pack.left_out:
        renew_file(path, "".join(f"{name}: {reason}\n" for name, reason in pack.left_out).encode())
    else:
        path.unlink(missing_ok=True)  # from an earlier start
