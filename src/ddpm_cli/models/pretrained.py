"""Reads models in every layout of diffusers: finds the files of a model in a folder or repository, and loads them.

A model is a U-Net's configuration and weights, and a scheduler's configuration. A diffusers pipeline has them in unet/
and scheduler/; old ones, such as google/ddpm-*, have all in one folder. Reading is strict: a setting that is not
supported, a missing tensor and an unexpected tensor are errors that name it.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm_cli.config import ScheduleConfig, UNetConfig, require_match, shown
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.errors import ModelError
from ddpm_cli.files import load_tensors, read_config, read_json, require_regular
from ddpm_cli.nn.unet import UNet
from ddpm_cli.text import printable

__all__ = ["WEIGHTS", "ModelFiles", "fit_weights", "read_configs", "read_model", "read_weights"]

WEIGHTS = "diffusion_pytorch_model"
_SHARD = r"-(?P<shard>\d+)-of-(?P<shards>\d+)"
_WEIGHTS = re.compile(rf"{WEIGHTS}(?P<variant>\.fp16)?(?:{_SHARD})?\.(?P<format>safetensors|bin)")
_INDEX = "model_index.json"
_SCHEDULER = "scheduler_config.json"

# Names of attention parameters before diffusers 0.12, and of parts of the network in its first releases.
_OLD_LAYERS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_OLD_PARTS = {"mid": "mid_block", "downsample_blocks": "down_blocks", "upsample_blocks": "up_blocks"}

# Parts of a pipeline that belong to other kinds of models.
_OTHERS = {
    "text_encoder": "generates images from text",
    "tokenizer": "generates images from text",
    "bert": "generates images from text",
    "prior": "generates images from text",
    "vae": "generates latents, which a second network decodes",
    "vqvae": "generates latents, which a second network decodes",
    "movq": "generates latents, which a second network decodes",
    "transformer": "is a transformer, not a U-Net",
}


@dataclass(frozen=True)
class ModelFiles:
    """The files of a model, relative to a folder or a repository. weights: one file, or its shards in order."""

    config: str
    scheduler: str
    weights: tuple[str, ...]
    index: str | None = None

    @classmethod
    def among(cls, names: Collection[str], weights: str | None = None) -> ModelFiles:
        """Choose a model's files among the names of all files, written with /. Prefers safetensors and float32.

        weights: take this file as the weights. The result may have no weights: see `require_weights`.
        Raises ModelError if there is no configuration.
        """
        nested = "unet/config.json" in names
        config = "unet/config.json" if nested else "config.json"
        if config not in names:
            raise ModelError(f"holds no model: no {config} among {_some(sorted(names))}" if names else "holds no model")
        part = "unet/" if nested else ""
        places = (f"scheduler/{_SCHEDULER}", _SCHEDULER, f"../scheduler/{_SCHEDULER}")
        return cls(
            config=config,
            scheduler=next((name for name in places if name in names), places[0] if nested else places[1]),
            weights=(weights,) if weights else _pick_weights(names, part),
            index=_INDEX if _INDEX in names else None,
        )

    @classmethod
    def in_folder(cls, folder: Path, weights: str | None = None) -> ModelFiles:
        """The model in a folder on disk: a pipeline's, or the unet/ of one. Raises ModelError if there is none."""
        inside = ("*", "unet/*", "scheduler/*") if weights is None else ("*",)  # next to a file of weights
        paths = [path for pattern in inside for path in folder.glob(pattern)]
        names = {path.relative_to(folder).as_posix() for path in paths if path.is_file()}
        outside = f"../scheduler/{_SCHEDULER}"
        return cls.among(names | ({outside} if (folder / outside).is_file() else set()), weights)

    @property
    def small(self) -> list[str]:
        """All files except the weights."""
        return [name for name in (self.index, self.config, self.scheduler) if name]

    def require_weights(self) -> ModelFiles:
        """Raises ModelError if there are no weights."""
        if not self.weights:
            raise ModelError(f"has no weights next to {self.config}", f"Expected {WEIGHTS}.safetensors or .bin there.")
        return self


def _some(names: list[str], n: int = 3) -> str:
    more = f" and {len(names) - n} more" if len(names) > n else ""
    return ", ".join(map(printable, names[:n])) + more


def _pick_weights(names: Collection[str], part: str) -> tuple[str, ...]:
    """The preferred weights in `part`. Raises ModelError if they lack a shard."""
    found = [m for name in names if name.startswith(part) and (m := _WEIGHTS.fullmatch(name.removeprefix(part)))]
    if not found:
        return ()

    def rank(match: re.Match[str]) -> tuple[bool, bool, bool, str]:
        return match["format"] == "bin", bool(match["variant"]), bool(match["shard"]), match["shards"] or ""

    best = min(map(rank, found))
    chosen = sorted((m for m in found if rank(m) == best), key=lambda m: int(m["shard"] or 0))
    if expected := int(chosen[0]["shards"] or 0):
        missing = sorted(set(range(1, expected + 1)) - {int(m["shard"]) for m in chosen})
        if missing:
            raise ModelError(f"lacks shard {missing[0]} of {expected} of its weights")
    return tuple(part + m[0] for m in chosen)


def read_configs(folder: Path, files: ModelFiles) -> tuple[UNetConfig, ScheduleConfig]:
    """The configurations of a model.

    Raises ModelError if a file is missing or damaged, or if it is another kind of model, and names the kind.
    """
    if files.index:
        for part, (library, name) in _parts(read_json(folder / files.index)).items():
            if part in _OTHERS and library and name:
                raise ModelError(
                    f"{folder}: {_OTHERS[part]} ({shown(name)})", "ddpm runs unconditional models of pixels."
                )
    unet = read_config(UNetConfig, folder / files.config)
    schedule = read_config(ScheduleConfig, folder / files.scheduler)
    try:
        require_match(unet, schedule)
        NoiseSchedule.from_config(schedule)
    except ModelError as error:
        raise ModelError(f"{folder / files.scheduler}: {error.message}", error.hint) from None
    return unet, schedule


def read_model(folder: Path, files: ModelFiles, weights: str = "ema") -> tuple[UNet, ScheduleConfig]:
    """Read a model; the network is float32 on the CPU, in eval mode.

    weights: "ema", the model itself; or "raw", the trained weights without averaging, which only a checkpoint has.
    Raises ModelError that names the problem if anything is missing, damaged, not supported or unexpected.
    """
    config, schedule = read_configs(folder, files)
    paths = [folder / name for name in files.require_weights().weights]
    if weights == "raw":
        paths = [folder / "training" / "raw.safetensors"]
        if not paths[0].is_file():
            raise ModelError(f"{folder}: has no raw weights", "Only checkpoints of `ddpm train` do; use --weights ema.")
    return read_network(config, paths), schedule


def _parts(index: Mapping[str, object]) -> dict[str, tuple[object, object]]:
    """The components of a pipeline by name: (library, class)."""
    return {name: (value[0], value[1]) for name, value in index.items() if isinstance(value, list) and len(value) == 2}


def read_network(config: UNetConfig, paths: Iterable[Path]) -> UNet:
    """A U-Net with the weights in one or several files, float32 on the CPU, in eval mode.

    Raises ModelError if a file is damaged, or names the tensors that do not fit the network.
    """
    paths = list(paths)
    tensors: dict[str, Tensor] = {}
    for path in paths:
        tensors |= read_weights(path)
    with torch.device("meta"):  # no memory for parameters: the weights are assigned to them
        unet = UNet(config)
    unet.load_state_dict(fit_weights(unet.state_dict(), tensors, str(paths[0])), assign=True)
    return unet.eval().requires_grad_(False)


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a pickle of tensors and nothing else. Raises ModelError."""
    try:
        require_regular(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}, so it holds no weights") from None
    if path.suffix == ".safetensors":
        return load_tensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything; weights_only keeps it from running code
        raise _unreadable(path, error) from None
    if not (
        isinstance(tensors, dict)
        and tensors
        and all(isinstance(name, str) and isinstance(value, Tensor) for name, value in tensors.items())
    ):
        raise ModelError(f"{path}: holds no state dict of tensors")
    return tensors


def _unreadable(path: Path, error: Exception) -> ModelError:
    """Why torch.load does not take a file, in our words: its own are about its arguments."""
    with path.open("rb") as file:
        is_pickle = file.read(2) in (b"PK", b"\x80\x02")  # in a zip today, a bare one in older files
    if not is_pickle:
        return ModelError(
            f"{path}: cannot be read (it is no file of PyTorch)", "Give the .safetensors, .bin, .pt or .ckpt file."
        )
    if isinstance(error, pickle.UnpicklingError):
        return ModelError(
            f"{path}: holds more than tensors, and reading it could run code; refused",
            "Take the .safetensors of this model, or ask whoever made it for one.",
        )
    return ModelError(f"{path}: cannot be read (it is damaged or incomplete)", "Copy or download it again.")


def fit_weights(expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights with current names, as float32 tensors of the expected shapes. source: their name in messages.

    Raises ModelError that names the first parameters that are missing, unexpected, of another shape or not finite.
    """
    found = _modern(tensors)
    for problem, names in (
        (f"lacks {{}} of the U-Net's {len(expected)} parameters", expected.keys() - found.keys()),
        ("has {} parameters that the U-Net does not have", found.keys() - expected.keys()),
    ):
        if names:
            raise ModelError(
                f"{source}: {problem.format(len(names))}: {_some(sorted(names))}",
                "The weights and the configuration are not of the same network.",
            )
    shapes = [
        f"{name} is {tuple(value.shape)}, not {tuple(expected[name].shape)}"
        for name, value in sorted(found.items())
        if _squeezed(value) != _squeezed(expected[name])
    ]
    if shapes:
        raise ModelError(f"{source}: {_some(shapes)}")
    fitted = {name: found[name].to(torch.float32).view(like.shape) for name, like in expected.items()}
    if broken := [name for name, value in sorted(fitted.items()) if not value.isfinite().all()]:
        raise ModelError(
            f"{source}: {_some(broken)} hold values that are not finite", "The training that made them has failed."
        )
    return fitted


def _squeezed(value: Tensor) -> tuple[int, ...]:
    """The shape without trailing ones: a dense layer may be stored as a 1x1 convolution."""
    shape = tuple(value.shape)
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


def _modern(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the names of current diffusers."""
    found = {}
    for name, value in tensors.items():
        part, _, rest = name.partition(".")
        words = f"{_OLD_PARTS.get(part, part)}.{rest}".split(".") if rest else [part]
        if "attentions" in words and words[-2] in _OLD_LAYERS:
            words[-2] = _OLD_LAYERS[words[-2]]
        if "downsamplers" in words and words[-2] in ("op", "Conv2d_0"):  # the same convolution, sometimes stored twice
            words[-2] = "conv"
        found[".".join(words)] = value
    return found
