"""Models and training states on disk: diffusers pipeline directories, written whole or not at all.

A model directory holds model_index.json, unet/ and scheduler/, and loads in `DDPMPipeline.from_pretrained`.
A checkpoint is a model directory with the averaged weights, and beside them training/ with what resuming needs.
A run directory holds checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ddpm_cli.config import DIFFUSERS_VERSION, RunConfig, ScheduleConfig, UNetConfig
from ddpm_cli.errors import ModelError
from ddpm_cli.unet import UNet

__all__ = [
    "Checkpoint",
    "checkpoints",
    "is_model",
    "is_only_a_model",
    "is_run",
    "json_bytes",
    "load_model",
    "load_training",
    "new_directory",
    "prune",
    "read_config",
    "read_json",
    "save_model",
    "save_training",
]

_Config = TypeVar("_Config", UNetConfig, ScheduleConfig, RunConfig)
_WEIGHTS = "diffusion_pytorch_model"
_CHECKPOINT = re.compile(r"step-(\d{8,})$")  # and no copy that somebody made beside it
_INDEX = {
    "_class_name": "DDPMPipeline",
    "_diffusers_version": DIFFUSERS_VERSION,
    "scheduler": ["diffusers", "DDPMScheduler"],
    "unet": ["diffusers", "UNet2DModel"],
}
# What attention's parameters were called before diffusers 0.12.
_OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill, that gets its name `path` when the block ends well, and is removed when it does not.

    So a folder with a final name is complete, whatever happened while it was written. An existing `path` is moved
    aside when the new one is complete, and then removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on: a rename must not outrun them."""
    with contextlib.suppress(PermissionError):  # folders cannot be opened on every system
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """JSON for people to read."""
    return json.dumps(values, indent=2).encode() + b"\n"


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelError, naming the file, if it is missing or no JSON object."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return values


def read_config(kind: type[_Config], path: Path) -> _Config:
    """A configuration from its JSON file. Raises ModelError, naming the file, if it cannot be honoured."""
    try:
        return kind.from_dict(read_json(path))
    except ModelError as error:
        raise ModelError(f"{path}: {error.message.removeprefix(f'{path}: ')}", error.hint) from None
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:  # values of another kind than they should be
        raise ModelError(f"{path}: is damaged ({error})") from None


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: cannot be read ({error})", "The file is damaged or incomplete.") from None


def save_model(folder: Path, weights: Mapping[str, Tensor], unet: UNetConfig, schedule: ScheduleConfig) -> None:
    """Fill an existing, empty folder with a diffusers pipeline. weights: a UNet's state dict; saved as float32."""
    (folder / "unet").mkdir()
    (folder / "scheduler").mkdir()
    (folder / "model_index.json").write_bytes(json_bytes(_INDEX))
    (folder / "unet" / "config.json").write_bytes(json_bytes(unet.to_dict()))
    (folder / "scheduler" / "scheduler_config.json").write_bytes(json_bytes(schedule.to_dict()))
    tensors = {name: value.detach().to("cpu", torch.float32).contiguous() for name, value in weights.items()}
    save_file(tensors, folder / "unet" / f"{_WEIGHTS}.safetensors", metadata={"format": "pt"})


def _part(folder: Path) -> Path:
    """Where the U-Net is: unet/ today; the folder itself in the flat layout of the first diffusers releases."""
    return folder / "unet" if (folder / "unet").is_dir() else folder


def _weights_file(folder: Path) -> Path | None:
    candidates = (_part(folder) / f"{_WEIGHTS}{suffix}" for suffix in (".safetensors", ".fp16.safetensors", ".bin"))
    return next((path for path in candidates if path.is_file()), None)


def is_model(folder: Path) -> bool:
    """Whether a folder holds a model with its weights, in either layout."""
    return _weights_file(folder) is not None and (_part(folder) / "config.json").is_file()


def is_only_a_model(folder: Path) -> bool:
    """Whether a folder holds nothing but what `save_model` writes, or nothing at all."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {"model_index.json", "unet", "scheduler"}


def load_model(folder: Path, weights: str = "ema") -> tuple[UNet, ScheduleConfig]:
    """Read a model directory; the network is float32 on the CPU, in eval mode.

    weights: "ema", the model itself; or "raw", the weights as the optimiser left them, which only a checkpoint has.
    Raises ModelError if anything is missing, damaged, superfluous or not supported, and names it.
    """
    part = _part(folder)
    config = read_config(UNetConfig, part / "config.json")
    scheduler = folder if part == folder else folder / "scheduler"
    schedule = read_config(ScheduleConfig, scheduler / "scheduler_config.json")
    if weights == "raw":
        file = folder / "training" / "raw.safetensors"
        if not file.is_file():
            raise ModelError(f"{folder}: has no raw weights", "Only checkpoints of `ddpm train` do; use --weights ema.")
    else:
        file = _weights_file(folder) or part / f"{_WEIGHTS}.safetensors"
    tensors = _read_weights(file)
    unet = _empty_unet(config)
    expected, found = unet.state_dict(), {_new_name(name): value for name, value in tensors.items()}
    for problem, names in (("lacks", expected.keys() - found.keys()), ("has unknown", found.keys() - expected.keys())):
        if names:
            raise ModelError(f"{file}: {problem} {len(names)} of the U-Net's parameters, such as {min(names)}")
    for name, value in found.items():
        if value.numel() != expected[name].numel():
            raise ModelError(f"{file}: {name} is {tuple(value.shape)}, not {tuple(expected[name].shape)}")
        found[name] = value.to(torch.float32).view(expected[name].shape)
    unet.load_state_dict(found, assign=True)
    return unet.eval().requires_grad_(False), schedule


def _read_weights(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ModelError(f"{file}: missing")
    if file.suffix == ".safetensors":
        return _load_tensors(file)
    try:
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a pickle can fail in any way; weights_only keeps it from running code
        raise ModelError(f"{file}: cannot be read ({error})") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ModelError(f"{file}: holds no state dict")
    return tensors


def _empty_unet(config: UNetConfig) -> UNet:
    """A U-Net whose parameters take no memory and no time, for weights to be assigned to."""
    with torch.device("meta"):
        return UNet(config)


def _new_name(name: str) -> str:
    head, _, kind = name.rpartition(".")
    head, _, last = head.rpartition(".")
    return f"{head}.{_OLD_NAMES.get(last, last)}.{kind}" if ".attentions." in name else name


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


def save_training(folder: Path, unet: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Add training/ to a model directory: the raw weights, the optimiser's tensors, and `state` as JSON."""
    training = folder / "training"
    training.mkdir()
    raw = {name: value.detach().to("cpu").contiguous() for name, value in unet.state_dict().items()}
    save_file(raw, training / "raw.safetensors", metadata={"format": "pt"})
    tensors = {
        f"{key}.{name}": value.detach().to("cpu").contiguous()
        for name, parameter in unet.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
    save_file(tensors, training / "optimizer.safetensors", metadata={"format": "pt"})
    (training / "state.json").write_bytes(json_bytes(state))


def load_training(folder: Path) -> Checkpoint:
    """Read what `save_training` and `save_model` wrote. Raises ModelError if something is missing or damaged."""
    training = folder / "training"
    state = read_json(training / "state.json")
    try:
        return Checkpoint(
            raw=_load_tensors(training / "raw.safetensors"),
            ema=_load_tensors(folder / "unet" / f"{_WEIGHTS}.safetensors"),
            optimizer=_load_tensors(training / "optimizer.safetensors"),
            **state,
        )
    except TypeError as error:
        raise ModelError(f"{training / 'state.json'}: {error}") from None


def is_run(folder: Path) -> bool:
    """Whether `ddpm train` has been writing here."""
    return (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [(int(m[1]), path) for path in (run / "checkpoints").glob("step-*") if (m := _CHECKPOINT.match(path.name))]
    return [path for _, path in sorted(found)]


def prune(run: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints of a run, and what killed processes left half-written."""
    for path in checkpoints(run)[:-keep]:
        doomed = path.with_name(f".{path.name}.old")  # first out of sight: what has a final name is complete
        with contextlib.suppress(OSError):
            path.rename(doomed)
    for leftover in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)
