"""Which run `ddpm train` is about: a new one, planned or started from a model, or one that goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ddpm_cli.cli.console import Console
from ddpm_cli.config import RunConfig, TrainConfig
from ddpm_cli.errors import DataError, DDPMError, ModelError, UsageError

if TYPE_CHECKING:
    import torch

    from ddpm_cli.dataset import Pack
    from ddpm_cli.hub import Located
    from ddpm_cli.sources import Source
    from ddpm_cli.trainer import Trainer

__all__ = ["go_on", "locate", "old_run", "planned", "prepare", "report", "require_all", "resumed"]

_NAMED = 5  # files that an error names where more were left out


def old_run(run: Path, resume: bool, force: bool) -> RunConfig | None:
    """The configuration of the run to go on with, or None to start one. Raises DDPMError if neither can be."""
    from ddpm_cli.files import read_config

    exists = (run / "config.json").is_file()
    if resume and exists:
        return read_config(RunConfig, run / "config.json")
    if exists and not force:
        raise DDPMError(
            f"{run}: a run is there already", "Go on with it: --resume. Start another: -o RUN. Start anew: --force."
        )
    if run.exists() and not exists and not _is_empty(run):
        raise DDPMError(f"{run}: exists, and is not a run of ddpm", "Name another folder with -o.")
    return None


def _is_empty(folder: Path) -> bool:
    """Whether a folder has nothing but what a killed process left half-written."""
    return folder.is_dir() and all(path.name.startswith(".") for path in folder.iterdir())


def locate(address: str | None, console: Console) -> Located | None:
    """Find the model whose weights a run starts from, if it starts from one."""
    if address is None:
        return None
    from ddpm_cli import hub

    return hub.resolve(address, quiet=not console.live)


def planned(
    source: Source,
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
        found = survey(source, progress)
    return plan_run(
        found,
        source.address,
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


def resumed(old: RunConfig, wishes: dict[str, dict[str, Any]], preset: str | None, start_from: str | None) -> RunConfig:
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


def require_all(pack: Pack) -> None:
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


def prepare(run: Path, config: RunConfig, resuming: bool, force: bool, console: Console) -> None:
    """Make the run's folder, now that nothing more can be refused."""
    from ddpm_cli.files import json_bytes, write_file

    if force and not resuming and run.exists():
        aside = next(path for i in range(1, 10_000) if not (path := run.with_name(f"{run.name}.old-{i}")).exists())
        run.rename(aside)
        console.note(f"moved the run that was in {run} to {aside}")
    write_file(run / "config.json", json_bytes(config.to_dict()))  # first: it makes a folder a run
    (run / "metrics.jsonl").touch()
