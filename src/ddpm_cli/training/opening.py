"""Turns a request into a run: finds the images and the settings, holds the lock, and loads checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ddpm_cli.config import DataConfig, RunConfig, TrainConfig
from ddpm_cli.data.cache import cache_folder
from ddpm_cli.data.pack import Pack, open_pack
from ddpm_cli.data.sources import Listed, Source, is_stream, list_bytes, name_of, open_sources, read_stream
from ddpm_cli.data.split import training_part
from ddpm_cli.data.survey import survey
from ddpm_cli.data.work import OnProgress
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.distributed import World, restarted_in, sign
from ddpm_cli.errors import DataError, DDPMError, LockedError, ModelError, UsageError
from ddpm_cli.files import LOCK, lock, read_config, renew_file
from ddpm_cli.hub_address import parse_name, parse_url, path_of
from ddpm_cli.models import hub
from ddpm_cli.models.pretrained import read_configs
from ddpm_cli.models.runs import checkpoints, step_of
from ddpm_cli.run_folder import CHECKPOINTS, CONFIG
from ddpm_cli.text import and_more
from ddpm_cli.training import checkpoint, objective
from ddpm_cli.training.plan import Base, plan_run
from ddpm_cli.training.presets import INTERVALS, usual_interval
from ddpm_cli.training.rehearsal import BlankPack
from ddpm_cli.training.request import Request
from ddpm_cli.training.trainer import Trainer

__all__ = ["Bar", "Decision", "Opening", "check_steps", "write_left_out"]

_NAMED = 5  # the most files that an error names

# A context with a progress bar for a task; the argument describes the task.
Bar = Callable[[str], AbstractContextManager[OnProgress]]


class Decision(NamedTuple):
    """base: the model to fine-tune; None if there is none, or if the run has a checkpoint."""

    config: RunConfig
    resuming: bool
    base: hub.Located | None


class Opening:
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

    def decide(self) -> Decision:
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
        return Decision(config, old is not None, base)

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
        holdout = self.request.data.get("holdout", 0.0)
        with self._bar("reading headers") as progress:
            found = survey(training_part(self.source, holdout), progress)
        return plan_run(
            found,
            _images(self.source),
            on_gpu=self._where.type != "cpu",
            preset=self.request.preset or "auto",
            data=self.request.data,
            train=self.request.train,
            objective=self.request.objective,
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
        contradictions += objective.contradictions(self.request.objective, old.schedule, "the run")
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
        new = replace(old, train=replace(old.train, **free))
        usual = {key: usual_interval(new) for key in INTERVALS if getattr(old.train, key) == usual_interval(old)}
        self._tell_of_a_rise(old.train, new.train)
        return replace(new, train=replace(new.train, **(usual | free)))

    def _tell_of_a_rise(self, old: TrainConfig, new: TrainConfig) -> None:
        """Warn if more steps raise a learning rate that had begun to fall."""
        done = step_of(found[-1]) if (found := checkpoints(self.folder)) else 0
        before, after = old.lr_at(max(0, done - 1)), new.lr_at(done)
        if after - before > old.lr / 10:
            self._warn(
                f"--steps {new.steps}: the learning rate, which had fallen to {before:.2g} by step {done}, rises to "
                f"{after:.2g}. Samples may become worse before they become better"
            )

    def packs(self, data: DataConfig) -> Pack:
        """The decoded images. Every rank must call it.

        Rank 0 decodes them. A rank on a machine without access to the cache of rank 0 decodes its own copy.
        Raises DataError if there are none, or if they are not those of rank 0.
        """
        found: list[Pack] = []

        def decode() -> Pack:
            with self._bar("decoding images") as progress:
                return open_pack(training_part(self.source, data.holdout), data, cache_folder(), progress)

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

        def count() -> tuple[int, int]:
            with self._bar("looking for images") as progress:
                source = training_part(self.source, data.holdout)
                source.scan(progress)
            return len(source.names), source.held_out

        images, held_out = self._world.on_main(count)
        return BlankPack(images, (data.channels, data.size, data.size), held_out)

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
        check_steps(trainer.config.train, trainer.step)

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
    if address == base:  # a bundled model, whose address is all that it has
        return True
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


def check_steps(settings: TrainConfig, done: int) -> None:
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


def write_left_out(run: Path, pack: Pack) -> None:
    """Write into the run's folder which images were left out, and why: `name: reason`, a line each."""
    path = run / "left_out.txt"
    if pack.left_out:
        renew_file(path, "".join(f"{name}: {reason}\n" for name, reason in pack.left_out).encode())
    else:
        path.unlink(missing_ok=True)  # from an earlier start
