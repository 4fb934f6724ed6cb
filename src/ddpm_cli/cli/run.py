"""Which run `ddpm train` is about: a new one, planned or started from a model, or one that goes on."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
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
    "begun",
    "blank_pack",
    "check_batch",
    "find_images",
    "go_on",
    "open_packs",
    "prepare",
    "report",
    "start_at",
]

_NAMED = 5  # files that an error names where more were left out


class Beginning(NamedTuple):
    """What a run begins with. base: the model whose weights it starts from, if it does and has none of its own yet."""

    config: RunConfig
    resuming: bool
    base: Located | None


def begun(
    source: Callable[[], Source],
    run: Path,
    where: torch.device,
    wishes: dict[str, dict[str, Any]],
    preset: str | None,
    start_from: str | None,
    resume: bool,
    force: bool,
    console: Console,
    held: ExitStack,
) -> Beginning:
    """Decide everything about a run, and keep other processes from it until `held` ends.

    source: gives the images, which may take a while. Raises DDPMError.
    """
    from ddpm_cli import checkpoint

    old = _old_run(run, resume, force, held)
    if old:
        config = _resumed(old, wishes, preset, start_from)
        base = None if checkpoint.checkpoints(run) else _locate(old.base, console)
    else:
        base = _locate(start_from, console)
        config = _planned(source, where, preset, wishes, base, console)
    config = replace(config, data=replace(config.data, images=source().address))
    return Beginning(config, old is not None, base)


def _old_run(run: Path, resume: bool, force: bool, held: ExitStack) -> RunConfig | None:
    """The configuration of the run to go on with, or None to start one. Raises DDPMError if neither can be."""
    from ddpm_cli.files import read_config

    exists = (run / "config.json").is_file()
    if exists:
        _hold(run, held)
    if resume and exists:
        return read_config(RunConfig, run / "config.json")
    if exists and not force:
        raise _taken(run)
    if run.exists() and not exists and not _is_empty(run):
        raise DDPMError(f"{run}: exists, and is not a run of ddpm", "Name another folder with -o.")
    return None


def _taken(run: Path) -> DDPMError:
    return DDPMError(
        f"{run}: a run is there already", "Go on with it: --resume. Start another: -o RUN. Start anew: --force."
    )


def _hold(run: Path, held: ExitStack) -> None:
    """Be the only process that trains a run, until `held` ends."""
    from ddpm_cli.files import lock

    try:
        held.enter_context(lock(run / ".lock", wait=False))
    except LockedError:
        raise LockedError(
            f"{run}: another process is training this run", "Wait for it, or stop it. ddpm plot shows how far it is."
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


def _planned(
    source: Callable[[], Source],
    where: torch.device,
    preset: str | None,
    wishes: dict[str, dict[str, Any]],
    base: Located | None,
    console: Console,
) -> RunConfig:
    """The configuration of a new run. base: the model that it starts from."""
    from ddpm_cli.dataset import survey
    from ddpm_cli.plan import Base, plan_run
    from ddpm_cli.pretrained import read_configs

    data, train = dict(wishes["data"]), dict(wishes["train"])
    with console.progress("looking at images") as progress:
        found = survey(source(), progress)
    return plan_run(
        found,
        source().address,
        on_gpu=where.type != "cpu",
        preset=preset or "auto",
        size=data.pop("size", None),
        channels=data.pop("channels", None),
        steps=train.pop("steps", None),
        save_every=train.pop("save_every", None),
        sample_every=train.pop("sample_every", None),
        data=data,
        train=train,
        base=Base(base.address, *read_configs(base.folder, base.files)) if base else None,
    )


def _resumed(
    old: RunConfig, wishes: dict[str, dict[str, Any]], preset: str | None, start_from: str | None
) -> RunConfig:
    """The configuration of a run that goes on. Raises UsageError naming what contradicts it."""
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


def find_images(images: str, console: Console) -> Source:
    """Look for the images that IMAGES means, with a bar."""
    from ddpm_cli.sources import open_source

    with console.progress("looking for images") as progress:
        return open_source(images, _cache_dir(), progress)


def _cache_dir() -> Path:
    """$DDPM_CACHE_DIR, else ddpm/ in the user's cache folder."""
    if chosen := os.environ.get("DDPM_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"


def go_on(trainer: Trainer, force: bool, console: Console) -> None:
    """Bring a run back to its newest checkpoint. Raises DDPMError if its images are others now, unless forced."""
    from ddpm_cli import checkpoint

    found = checkpoint.checkpoints(trainer.run)
    if not found:
        console.warn(f"{trainer.run} has no checkpoint yet; starting from step 0")
        return
    if _newest_good(trainer, found, console) != trainer.pack.fingerprint:
        if not force:
            raise DDPMError(
                "--resume: the images are not those that the run was trained on",
                "Give those, or train another run with -o RUN, or add --force to go on with these.",
            )
        console.warn("going on with other images than those that the run was trained on")
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


def check_batch(train: TrainConfig, processes: int) -> None:
    """Raises UsageError if a batch cannot be shared out as it should be."""
    if train.accumulate > train.batch_size:
        raise UsageError(f"--accumulate {train.accumulate}: a batch has only {train.batch_size} images")
    if processes > train.batch_size:
        raise UsageError(f"--batch-size {train.batch_size}: fewer images than the {processes} processes")


def open_packs(world: World, source: Callable[[], Source], data: DataConfig, strict: bool, console: Console) -> Pack:
    """The decoded images, in every process.

    The process that leads decodes them. One on another machine that does not see its cache decodes its own copy.
    Raises DataError if there is none, or another one.
    """
    from ddpm_cli.dataset import Pack, open_pack

    packs: list[Pack] = []

    def decode() -> Pack:
        with console.progress("decoding images") as progress:
            return open_pack(source(), data, _cache_dir(), progress)

    def lead() -> tuple[Path, str]:
        packs.append(decode())
        if strict:
            _require_all(packs[0])
        return packs[0].folder, packs[0].fingerprint

    folder, fingerprint = world.lead(lead)

    def follow() -> Pack:
        if packs:
            return packs[0]
        try:
            pack = Pack(folder)
        except (OSError, ValueError, KeyError, TypeError):
            pack = decode()
        if pack.fingerprint != fingerprint:
            raise DataError(f"{source().path}: not the images that process 0 has on its machine")
        return pack

    return world.together(follow)


def blank_pack(world: World, source: Callable[[], Source], data: DataConfig, console: Console) -> Pack:
    """For --dry-run: as many images of that size, in every process, none of which is decoded."""
    from ddpm_cli.rehearsal import BlankPack

    def count() -> int:
        with console.progress("looking for images") as progress:
            source().scan(progress)
        return len(source().names)

    return BlankPack(world.lead(count), (data.channels, data.size, data.size))


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
    from ddpm_cli.files import write_file

    path = run / "left_out.txt"
    if pack.left_out:
        write_file(path, "".join(f"{name}: {reason}\n" for name, reason in pack.left_out).encode())
    else:
        path.unlink(missing_ok=True)  # of a time when some were


def prepare(run: Path, config: RunConfig, resuming: bool, force: bool, console: Console, held: ExitStack) -> None:
    """Make the run's folder, now that nothing more can be refused."""
    from ddpm_cli import checkpoint

    if force and not resuming and run.exists():
        aside = next(path for i in range(1, 10_000) if not (path := run.with_name(f"{run.name}.old-{i}")).exists())
        run.rename(aside)
        console.note(f"moved the run that was in {run} to {aside}")
    if not resuming:
        _hold(run, held)
        if (run / "config.json").exists():  # since we looked
            raise _taken(run)
    checkpoint.begin_run(run, config)
    checkpoint.tidy(run)
