"""Reads and writes checkpoints: writes are atomic, and hashes are checked when a checkpoint is read.

A checkpoint is a model directory with the averaged weights, and a folder training/ with the state for resuming.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from safetensors.torch import save_file
from torch import Tensor

from ddpm_cli.config import Count, RunConfig, ScheduleConfig, Strict, between, shown
from ddpm_cli.errors import DDPMError, ModelError
from ddpm_cli.files import (
    json_bytes,
    load_tensors,
    new_directory,
    read_bytes,
    read_config,
    read_json,
    remove_partials,
    renew_file,
    require_regular,
)
from ddpm_cli.models.card import CARD, PREVIEW
from ddpm_cli.models.pipeline import save_model
from ddpm_cli.models.pretrained import WEIGHTS
from ddpm_cli.models.runs import checkpoint_folder, checkpoints, preview_file, previews, step_of
from ddpm_cli.run_folder import CHECKPOINTS, CONFIG, METRICS, SAMPLES
from ddpm_cli.writable import why_not_writable

__all__ = [
    "AVERAGED",
    "OPTIMIZER",
    "RAW",
    "Checkpoint",
    "begin_run",
    "check_folders",
    "forget_previews_after",
    "load_training",
    "prune",
    "require_run",
    "save_checkpoint",
    "set_aside",
    "tidy",
    "trained_on",
]


# The files of a checkpoint that training resumes from.
RAW, OPTIMIZER = "training/raw.safetensors", "training/optimizer.safetensors"
_STATE, _HASHES = "training/state.json", "training/hashes.json"
AVERAGED = f"unet/{WEIGHTS}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state from which training resumes."""

    step: int
    raw: dict[str, Tensor]  # the trained weights, not averaged
    ema: dict[str, Tensor]
    ema_updates: int
    optimizer: dict[str, Tensor]  # "exp_avg.<parameter>" and so on
    seconds: float  # of training so far
    fingerprint: str  # of the images it trained on
    schedule: ScheduleConfig | None = None  # of the model, if it is not that of the run; not read again


@dataclass(frozen=True)
class _State(Strict):
    """training/state.json: the fields of a Checkpoint that are not tensors. images: the fingerprint."""

    step: Count
    ema_updates: Annotated[int, between(0, 10**12)]
    seconds: Annotated[float, between(0, 1e12)]
    images: str


def require_run(run: Path) -> None:
    """Raises FileNotFoundError if a run's folder is gone, for example with its disk: then nothing is written."""
    if not run.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the run's folder is gone", str(run))


def save_checkpoint(run: Path, config: RunConfig, saved: Checkpoint, recipe: Mapping[str, Any]) -> Path:
    """Write a checkpoint atomically, and remove old ones that the run does not keep.

    saved: its tensors are on the CPU and contiguous. Raises OSError or SafetensorError if it cannot be written.
    """
    require_run(run)
    path = checkpoint_folder(run, saved.step)
    with new_directory(path) as partial:
        schedule = saved.schedule or config.schedule
        save_model(partial, saved.ema, config.unet, schedule, recipe, _newest_preview(run, saved.step))
        _save_training(partial, saved)
    prune(run, config.train.keep, config.train.keep_every)
    return path


def _newest_preview(run: Path, last: int) -> bytes | None:
    """The newest preview up to a step that can be read, for the model's card.

    A damaged preview must not prevent a checkpoint.
    """
    for step, path in reversed(previews(run)):
        if step <= last and path == preview_file(run, step):
            with contextlib.suppress(OSError):
                return read_bytes(path)
    return None


def forget_previews_after(run: Path, step: int) -> None:
    """Remove previews after `step`, since these steps will be done again."""
    for drawn, path in previews(run):
        if drawn > step:
            with contextlib.suppress(OSError):
                path.unlink()


def _save_training(folder: Path, saved: Checkpoint) -> None:
    """Add training/ to a model directory: the raw weights, the optimiser's tensors, and the rest as JSON."""
    (folder / "training").mkdir()
    for name, tensors in ((RAW, saved.raw), (OPTIMIZER, saved.optimizer)):
        save_file(tensors, folder / name, metadata={"format": "pt"})
    state = _State(saved.step, saved.ema_updates, saved.seconds, images=saved.fingerprint)
    (folder / _STATE).write_bytes(json_bytes(state.to_dict()))
    (folder / _HASHES).write_bytes(json_bytes(_hashes(folder)))


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files of a checkpoint, except its card and preview, which may change later."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path for path in files if path.name not in (CARD, PREVIEW)}
    return {name: _hash(path) for name, path in sorted(found.items()) if name != _HASHES}


def _hash(path: Path) -> str:
    require_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path) -> None:
    """Raises ModelError if a file of a checkpoint has changed since it was written."""
    hashes = read_json(folder / _HASHES)
    for name in (RAW, OPTIMIZER, _STATE, AVERAGED):
        if name not in hashes:
            raise ModelError(f"{folder / _HASHES}: is damaged: it lacks {name}")
    for name, digest in hashes.items():
        path = folder / name
        try:
            if not path.resolve().is_relative_to(folder.resolve()):
                raise ModelError(f"{folder / _HASHES}: is damaged: it names {shown(name)}, outside the checkpoint")
            if _hash(path) != digest:
                raise ModelError(f"{path}: is damaged: its hash is not that of the saved file")
        except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself
            raise ModelError(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
        except ValueError:
            raise ModelError(f"{folder / _HASHES}: is damaged: {shown(name)} cannot be a file's name") from None


def trained_on(folder: Path) -> str | None:
    """The fingerprint of the images that a checkpoint was trained on; None if it does not say."""
    try:
        return read_config(_State, folder / _STATE).images
    except ModelError:
        return None


def load_training(folder: Path) -> Checkpoint:
    """Read what `save_checkpoint` wrote. Raises ModelError if something is missing or damaged."""
    _verify(folder)
    state = read_config(_State, folder / _STATE)
    return Checkpoint(
        step=state.step,
        raw=load_tensors(folder / RAW),
        ema=load_tensors(folder / AVERAGED),
        ema_updates=state.ema_updates,
        optimizer=load_tensors(folder / OPTIMIZER),
        seconds=state.seconds,
        fingerprint=state.images,
    )


def begin_run(run: Path, config: RunConfig) -> None:
    """Create the files of a run, or update its configuration."""
    renew_file(run / CONFIG, json_bytes(config.to_dict()))  # first: it is what --resume looks for
    (run / METRICS).touch()


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that it no longer counts as the newest one."""
    with contextlib.suppress(OSError):
        checkpoint.rename(checkpoint.with_name(f"damaged-{checkpoint.name}"))


def prune(run: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove old checkpoints of a run, and unfinished ones of killed processes.

    Keeps the newest `keep`, and those of every `keep_every`th step.
    """
    for path in checkpoints(run)[:-keep]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        doomed = path.with_name(f".{path.name}.old")  # rename first: a folder with its final name is complete
        with contextlib.suppress(OSError):
            path.rename(doomed)
    _remove_halves(run)


def tidy(run: Path) -> None:
    """Remove unfinished files of killed processes. The caller holds the lock of the run."""
    _remove_halves(run)
    for folder in (run, run / SAMPLES):
        remove_partials(folder)


def _remove_halves(run: Path) -> None:
    for leftover in (run / CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def check_folders(run: Path) -> None:
    """Raises DDPMError, before any work is done, if the run could not write its files later."""
    if not run.exists() and (reason := why_not_writable(run)):
        raise DDPMError(f"{run}: cannot be made: {reason}", "Name another folder with -o.")
    for folder in (run, run / CHECKPOINTS, run / SAMPLES):
        if os.path.lexists(folder) and not folder.is_dir():
            raise DDPMError(f"{folder}: is not a folder, where a run needs one", "Move it away, or name another run.")
        if folder.is_dir() and not os.access(folder, os.W_OK | os.X_OK):
            raise DDPMError(f"{folder}: cannot be written to", "Check its permissions, or name another run with -o.")
    for file in (run / CONFIG, run / METRICS, run / "left_out.txt"):
        if os.path.lexists(file) and not (file.is_file() and os.access(file, os.W_OK)):
            raise DDPMError(f"{file}: is not a file that can be written", "Move it away, or name another run.")
