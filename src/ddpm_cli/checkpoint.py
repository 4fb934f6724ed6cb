"""Models and training states on disk: diffusers pipeline directories, written whole or not at all.

A model directory holds model_index.json, unet/ and scheduler/, and loads in `DDPMPipeline.from_pretrained`.
A checkpoint is a model directory with the averaged weights, and beside them training/ with what resuming needs.
A run directory holds checkpoints.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ddpm_cli.about import CARD, PREVIEW, RECIPE, facts, model_card
from ddpm_cli.config import DIFFUSERS_VERSION, RunConfig, ScheduleConfig, UNetConfig
from ddpm_cli.errors import ModelError
from ddpm_cli.files import PARTIAL, json_bytes, load_tensors, new_directory, read_json, renew_file, write_file
from ddpm_cli.pretrained import WEIGHTS

__all__ = [
    "Checkpoint",
    "add_preview",
    "begin_run",
    "checkpoints",
    "configurations",
    "folder_of",
    "is_only_a_model",
    "is_run",
    "load_training",
    "prune",
    "require_run",
    "save_checkpoint",
    "save_model",
    "save_weights",
    "set_aside",
    "step_of",
    "tidy",
]

_CHECKPOINT = re.compile(r"step-(\d{8,})$")  # and no copy that somebody made beside it
_INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}


def configurations(unet: UNetConfig, schedule: ScheduleConfig) -> dict[str, bytes]:
    """The JSON files of a pipeline, by their names."""
    values = {"model_index.json": _INDEX, "unet/config.json": unet.to_dict()}
    values["scheduler/scheduler_config.json"] = schedule.to_dict()
    return {name: json_bytes(value) for name, value in values.items()}


def save_model(
    folder: Path,
    weights: Mapping[str, Tensor],
    unet: UNetConfig,
    schedule: ScheduleConfig,
    recipe: Mapping[str, Any] | None = None,
    preview: bytes | None = None,
) -> None:
    """Fill an existing, empty folder with a diffusers pipeline and a model card, ready for the Hub.

    weights: a UNet's state dict; saved as float32. recipe: see `about.recipe`. preview: a grid of samples, as PNG.
    """
    for name, data in configurations(unet, schedule).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)
    save_weights(folder / "unet" / f"{WEIGHTS}.safetensors", weights)
    if recipe:
        (folder / RECIPE).write_bytes(json_bytes(recipe))
    if preview:
        (folder / PREVIEW).write_bytes(preview)
    (folder / CARD).write_bytes(
        model_card(facts(unet, schedule), recipe, preview is not None).encode("utf-8", "replace")
    )


def save_weights(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Write a state dict as float32."""
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}
    save_file(tensors, path, metadata={"format": "pt"})


def add_preview(
    folder: Path, unet: UNetConfig, schedule: ScheduleConfig, recipe: Mapping[str, Any], preview: bytes
) -> None:
    """Put a grid of samples that was drawn later into a model's folder, and onto its card."""
    write_file(folder / PREVIEW, preview)
    write_file(folder / CARD, model_card(facts(unet, schedule), recipe, True).encode("utf-8", "replace"))


def is_only_a_model(folder: Path) -> bool:
    """Whether a folder holds nothing but what `save_model` writes, or nothing at all."""
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {""}
    ours = {"model_index.json", "unet", "scheduler", CARD, PREVIEW, RECIPE}
    return not names or ("model_index.json" in names and names <= ours)


@dataclass(frozen=True)
class Checkpoint:
    """What a training run goes on from."""

    step: int
    raw: dict[str, Tensor]  # the weights as the optimiser left them
    ema: dict[str, Tensor]
    ema_updates: int
    optimizer: dict[str, Tensor]  # "exp_avg.<parameter>" and so on
    seconds: float  # of training so far
    images: str  # fingerprint of the pack it trained on


def folder_of(run: Path, step: int) -> Path:
    """Where a run has the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def require_run(run: Path) -> None:
    """Raises FileNotFoundError where a run's disk was taken away: what lies below it is no place for a run."""
    if not run.is_dir():
        raise FileNotFoundError(errno.ENOENT, "the run's folder is gone", str(run))


def save_checkpoint(run: Path, config: RunConfig, saved: Checkpoint, recipe: Mapping[str, Any]) -> Path:
    """Write a checkpoint, whole or not at all, and remove the oldest ones beyond those that the run keeps.

    Its tensors are on the CPU, contiguous. Raises OSError and SafetensorError if the disk does not take it.
    """
    require_run(run)
    previews = sorted((run / "samples").glob("step-*[0-9].png"), key=lambda path: (len(path.name), path.name))
    preview = previews[-1].read_bytes() if previews else None
    path = folder_of(run, saved.step)
    with new_directory(path) as partial:
        save_model(partial, saved.ema, config.unet, config.schedule, recipe, preview)
        _save_training(partial, saved)
    prune(run, config.train.keep, config.train.keep_every)
    return path


def _save_training(folder: Path, saved: Checkpoint) -> None:
    """Add training/ to a model directory: the raw weights, the optimiser's tensors, and the rest as JSON."""
    training = folder / "training"
    training.mkdir()
    for name, tensors in (("raw", saved.raw), ("optimizer", saved.optimizer)):
        save_file(tensors, training / f"{name}.safetensors", metadata={"format": "pt"})
    state = {key: getattr(saved, key) for key in ("step", "ema_updates", "seconds", "images")}
    (training / "state.json").write_bytes(json_bytes(state))
    (training / "hashes.json").write_bytes(json_bytes(_hashes(folder)))


def _hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of the files that a checkpoint is; not of its card and preview, which may change later."""
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path for path in files if path.name not in (CARD, PREVIEW)}
    return {name: _hash(path) for name, path in sorted(found.items()) if name != "training/hashes.json"}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _verify(folder: Path) -> None:
    """Raises ModelError if a file of a checkpoint is not as it was written."""
    for name, digest in read_json(folder / "training" / "hashes.json").items():
        try:
            if _hash(folder / name) != digest:
                raise ModelError(f"{folder / name}: is damaged: it has not the hash that it was saved with")
        except OSError as error:
            raise ModelError(f"{folder / name}: cannot be read ({error.strerror})") from None


def load_training(folder: Path) -> Checkpoint:
    """Read what `save_training` and `save_model` wrote. Raises ModelError if something is missing or damaged."""
    _verify(folder)
    training = folder / "training"
    state = read_json(training / "state.json")
    try:
        return Checkpoint(
            raw=load_tensors(training / "raw.safetensors"),
            ema=load_tensors(folder / "unet" / f"{WEIGHTS}.safetensors"),
            optimizer=load_tensors(training / "optimizer.safetensors"),
            **state,
        )
    except TypeError as error:
        raise ModelError(f"{training / 'state.json'}: {error}") from None


def begin_run(run: Path, config: RunConfig) -> None:
    """Make a folder a run, or renew its configuration."""
    renew_file(run / "config.json", json_bytes(config.to_dict()))  # first: it is what --resume looks for
    (run / "metrics.jsonl").touch()


def is_run(folder: Path) -> bool:
    """Whether `ddpm train` has been writing here."""
    return (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), path) for path in (run / "checkpoints").glob("step-*") if (m := _CHECKPOINT.match(path.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step of one of `checkpoints`."""
    return int(checkpoint.name.removeprefix("step-"))


def set_aside(checkpoint: Path) -> None:
    """Rename a damaged checkpoint, so that it is not taken for the newest one any more."""
    with contextlib.suppress(OSError):
        checkpoint.rename(checkpoint.with_name(f"damaged-{checkpoint.name}"))


def prune(run: Path, keep: int, keep_every: int | None = None) -> None:
    """Remove old checkpoints of a run, and what killed processes left half-written.

    What stays are the newest `keep`, and those of every `keep_every`th step.
    """
    for path in checkpoints(run)[:-keep]:
        if keep_every and step_of(path) % keep_every == 0:
            continue
        doomed = path.with_name(f".{path.name}.old")  # first out of sight: what has a final name is complete
        with contextlib.suppress(OSError):
            path.rename(doomed)
    _remove_halves(run)


def tidy(run: Path) -> None:
    """Remove what killed processes left half-written in a run that nobody is training."""
    _remove_halves(run)
    for folder in (run, run / "samples"):
        for leftover in folder.glob(f"{PARTIAL}*"):
            leftover.unlink(missing_ok=True)


def _remove_halves(run: Path) -> None:
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
