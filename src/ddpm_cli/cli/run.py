"""Which run `ddpm train` is about: a new one, planned or started from a model, or one that goes on."""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit

from ddpm_cli.cli.console import Console
from ddpm_cli.config import RunConfig, TrainConfig
from ddpm_cli.errors import DataError, DDPMError, LockedError, ModelError, UsageError

if TYPE_CHECKING:
    import torch

    from ddpm_cli.config import DataConfig
    from ddpm_cli.dataset import Pack
    from ddpm_cli.distributed import World
    from ddpm_cli.hub import Located
    from ddpm_cli.sources import Source
    from ddpm_cli.trainer import Trainer

__all__ = [
    "Beginning",
    "Job",
    "begun",
    "blank_pack",
    "go_on",
    "open_packs",
    "prepare",
    "report",
    "start_at",
]

_NAMED = 5  # files that an error names where more were left out


@dataclass
class Job:
    """What `ddpm train` was asked for, and what is there while it does it.

    images: as they were named. wishes: what was asked for of a run's settings, by part. start_from: --from. world: the
    processes that do it together. held: what the run holds on to until it ends.
    """

    images: str
    run: Path
    wishes: dict[str, dict[str, Any]]
    preset: str | None
    start_from: str | None
    resume: bool
    force: bool
    strict: bool
    world: World
    console: Console
    held: ExitStack
    holds: bool = False  # whether it has the run's lock

    @cached_property
    def source(self) -> Source:
        """The images that IMAGES means; finding them may take a while."""
        from ddpm_cli.sources import open_source

        with self.console.progress("looking for images") as progress:
            return open_source(self.images, _cache_dir(), progress)


class Beginning(NamedTuple):
    """What a run begins with. base: the model whose weights it starts from, if it does and has none of its own yet."""

    config: RunConfig
    resuming: bool
    base: Located | None


def begun(job: Job, where: torch.device) -> Beginning:
    """Decide everything about a run, and keep other processes from it. Raises DDPMError."""
    from ddpm_cli import checkpoint

    old = _old_run(job)
    if old:
        config = _resumed(old, job)
        base = None if checkpoint.checkpoints(job.run) else _locate(old.base, job.console)
    else:
        base = _locate(job.start_from, job.console)
        config = _planned(job, where, base)
    config = replace(config, data=replace(config.data, images=job.source.address))
    _check_batch(config.train, job.world.size)
    return Beginning(config, old is not None, base)


def _old_run(job: Job) -> RunConfig | None:
    """The configuration of the run to go on with, or None to start one. Raises DDPMError if neither can be."""
    from ddpm_cli.distributed import restarted_in
    from ddpm_cli.files import LOCK, read_config

    run = job.run
    exists = (run / "config.json").is_file()
    if exists:
        _hold(job)
        if restarted_in(run / LOCK):  # torchrun calls the same command again, and what it began is there now
            job.resume, job.force = True, job.force and job.resume
    if job.resume and exists:
        return read_config(RunConfig, run / "config.json")
    if exists and not job.force:
        raise _taken(run)
    if run.exists() and not exists and not _is_empty(run):
        raise DDPMError(f"{run}: exists, and is not a run of ddpm", "Name another folder with -o.")
    return None


def _taken(run: Path) -> DDPMError:
    return DDPMError(
        f"{run}: a run is there already", "Go on with it: --resume. Start another: -o RUN. Start anew: --force."
    )


def _hold(job: Job) -> None:
    """Be the only one that trains a run, until the job ends."""
    from ddpm_cli.files import LOCK, lock

    try:
        job.held.enter_context(lock(job.run / LOCK, wait=False))
        job.holds = True
    except LockedError:
        raise LockedError(
            f"{job.run}: another process is training this run",
            "Wait for it, or stop it. ddpm plot shows how far it is.",
        ) from None


def _is_empty(folder: Path) -> bool:
    """Whether a folder has nothing but what a killed process left half-written."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def _locate(address: str | None, console: Console) -> Located | None:
    """Find the model whose weights a run starts from, if it starts from one."""
    if address is None:
        return None
    from ddpm_cli import hub

    return hub.resolve(address, quiet=not console.live)


def _planned(job: Job, where: torch.device, base: Located | None) -> RunConfig:
    """The configuration of a new run. base: the model that it starts from."""
    from ddpm_cli.dataset import survey
    from ddpm_cli.plan import Base, plan_run
    from ddpm_cli.pretrained import read_configs

    data, train = dict(job.wishes["data"]), dict(job.wishes["train"])
    with job.console.progress("looking at images") as progress:
        found = survey(job.source, progress)
    return plan_run(
        found,
        job.source.address,
        on_gpu=where.type != "cpu",
        preset=job.preset or "auto",
        size=data.pop("size", None),
        channels=data.pop("channels", None),
        steps=train.pop("steps", None),
        save_every=train.pop("save_every", None),
        sample_every=train.pop("sample_every", None),
        data=data,
        train=train,
        base=Base(base.address, *read_configs(base.folder, base.files)) if base else None,
    )


def _resumed(old: RunConfig, job: Job) -> RunConfig:
    """The configuration of a run that goes on. Raises UsageError naming what contradicts it."""
    wishes, preset, start_from = job.wishes, job.preset, job.start_from
    contradictions = [
        f"--{key.replace('_', '-')} {value} (the run has {getattr(getattr(old, part), key)})"
        for part, asked in wishes.items()
        for key, value in asked.items()
        if key not in TrainConfig.FREE and value != getattr(getattr(old, part), key)
    ]
    if preset not in (None, "auto", old.preset):
        contradictions.append(f"--preset {preset} (the run has {old.preset})")
    if start_from is not None and not _same_model(start_from, old.base):
        contradictions.append(f"--from {start_from} (the run {f'has {old.base}' if old.base else 'has none'})")
    if contradictions:
        raise UsageError(
            f"--resume: contradicts the run: {', '.join(contradictions)}",
            "Leave these out to go on with the run, or start another with -o RUN.",
        )
    free = {key: value for key, value in wishes["train"].items() if key in TrainConfig.FREE}
    return replace(old, train=replace(old.train, **free))


def _same_model(address: str, base: str | None) -> bool:
    """Whether an address may be that of the model that a run started from; a revision may have moved on since."""
    if base is None:
        return False
    path = Path(address).expanduser()
    if path.exists():
        here = path.resolve()
        return Path(base) in (here, here.parent) or Path(base).parent in (here, here / "checkpoints")
    name = "/".join(urlsplit(address).path.strip("/").split("/")[:2]) if "://" in address else address.partition("@")[0]
    return name == base.partition("@")[0]


def _cache_dir() -> Path:
    """$DDPM_CACHE_DIR, else ddpm/ in the user's cache folder."""
    if chosen := os.environ.get("DDPM_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"


def go_on(job: Job, trainer: Trainer) -> None:
    """Bring a run back to its newest checkpoint. Raises DDPMError if its images are others now, unless forced."""
    from ddpm_cli import checkpoint

    found = checkpoint.checkpoints(trainer.run)
    if not found:
        job.console.warn(f"{trainer.run} has no checkpoint yet; starting from step 0")
        return
    if _newest_good(trainer, found, job.console) != trainer.pack.fingerprint:
        if not job.force:
            raise DDPMError(
                "--resume: the images are not those that the run was trained on",
                "Give those, or train another run with -o RUN, or add --force to go on with these.",
            )
        job.console.warn("going on with other images than those that the run was trained on")
    if trainer.step > trainer.config.train.steps:
        raise UsageError(
            f"--steps {trainer.config.train.steps}: the run has done {trainer.step} already",
            "--steps is the total, resumed or not.",
        )


def start_at(trainer: Trainer, resuming: bool) -> int:
    """For --dry-run: set and return the step that a run would go on from, without reading its checkpoint."""
    from ddpm_cli import checkpoint

    found = checkpoint.checkpoints(trainer.run) if resuming else []
    trainer.step = trainer.world.lead(lambda: checkpoint.step_of(found[-1]) if found else 0)
    return trainer.step


def _newest_good(trainer: Trainer, found: list[Path], console: Console) -> str:
    """Load the newest checkpoint that is whole, and set damaged newer ones aside. Returns its images' fingerprint."""
    from ddpm_cli import checkpoint

    damaged = []
    for path in reversed(found):
        try:
            images = trainer.resume(path)
        except ModelError as error:
            console.warn(error.message)
            damaged.append(path)
            continue
        for newer in damaged:
            checkpoint.set_aside(newer)
            console.warn(f"{newer.name} is damaged, and set aside; going on from {path.name}")
        return images
    raise ModelError(
        f"{trainer.run}: none of its checkpoints can be read", "--force starts anew, and keeps the old run."
    )


def _check_batch(train: TrainConfig, processes: int) -> None:
    """Raises UsageError if a batch cannot be shared out as it should be."""
    if train.accumulate > train.batch_size:
        raise UsageError(f"--accumulate {train.accumulate}: a batch has only {train.batch_size} images")
    if processes > train.batch_size:
        raise UsageError(f"--batch-size {train.batch_size}: fewer images than the {processes} processes")


def open_packs(job: Job, data: DataConfig) -> Pack:
    """The decoded images, in every process.

    The process that leads decodes them. One on another machine that does not see its cache decodes its own copy.
    Raises DataError if there is none, or another one.
    """
    from ddpm_cli.dataset import Pack, open_pack

    packs: list[Pack] = []

    def decode() -> Pack:
        with job.console.progress("decoding images") as progress:
            return open_pack(job.source, data, _cache_dir(), progress)

    def lead() -> tuple[Path, str]:
        packs.append(decode())
        if job.strict:
            _require_all(packs[0])
        return packs[0].folder, packs[0].fingerprint

    folder, fingerprint = job.world.lead(lead)

    def follow() -> Pack:
        if packs:
            return packs[0]
        try:
            pack = Pack(folder)
        except (OSError, ValueError, KeyError, TypeError):
            pack = decode()
        if pack.fingerprint != fingerprint:
            raise DataError(f"{job.images}: not the images that process 0 has on its machine")
        return pack

    return job.world.together(follow)


def blank_pack(job: Job, data: DataConfig) -> Pack:
    """For --dry-run: as many images of that size, in every process, none of which is decoded."""
    from ddpm_cli.rehearsal import BlankPack

    def count() -> int:
        with job.console.progress("looking for images") as progress:
            job.source.scan(progress)
        return len(job.source.names)

    return BlankPack(job.world.lead(count), (data.channels, data.size, data.size))


def _require_all(pack: Pack) -> None:
    """For --strict: raises DataError, naming some of them, if images were left out."""
    if pack.left_out:
        named = [f"\n  {name}: {reason}" for name, reason in pack.left_out[:_NAMED]]
        more = f"\n  and {rest} more" if (rest := len(pack.left_out) - _NAMED) > 0 else ""
        raise DataError(
            f"--strict: {len(pack.left_out)} images cannot be used{''.join(named)}{more}",
            "Mend or remove them. Without --strict a run leaves them out and lists them in its left_out.txt.",
        )


def report(run: Path, pack: Pack) -> None:
    """Write which images were left out, and why, into the run's folder: `name: reason`, a line each."""
    from ddpm_cli.files import renew_file

    path = run / "left_out.txt"
    if pack.left_out:
        renew_file(path, "".join(f"{name}: {reason}\n" for name, reason in pack.left_out).encode())
    else:
        path.unlink(missing_ok=True)  # of a time when some were


def prepare(job: Job, config: RunConfig, resuming: bool) -> None:
    """Make the run's folder, now that nothing more can be refused."""
    from ddpm_cli import checkpoint
    from ddpm_cli.distributed import sign
    from ddpm_cli.files import LOCK

    run = job.run
    if job.force and not resuming and run.exists():
        if not job.holds:  # it was no run when we looked, and another process may be training it now
            _hold(job)
        aside = next(path for i in range(1, 10_000) if not (path := run.with_name(f"{run.name}.old-{i}")).exists())
        run.rename(aside)
        job.console.note(f"moved the run that was in {run} to {aside}")
    if not resuming:
        _hold(job)
        if (run / "config.json").exists():  # since we looked
            raise _taken(run)
    sign(run / LOCK)
    checkpoint.begin_run(run, config)
    checkpoint.tidy(run)
