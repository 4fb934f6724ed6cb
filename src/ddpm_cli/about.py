"""What a model is, in facts and in words: for `ddpm info`, and for the model cards that go with models to the Hub."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ddpm_cli.config import RunConfig, ScheduleConfig, UNetConfig
from ddpm_cli.unet import UNet

__all__ = [
    "CARD",
    "PREVIEW",
    "RECIPE",
    "facts",
    "is_generated",
    "model_card",
    "recipe",
    "recipe_in_words",
    "trained",
    "words",
]

# Files beside a model: for people, their picture, and for programs.
CARD, PREVIEW, RECIPE = "README.md", "samples.png", "ddpm.json"

_PREDICTS = {"epsilon": "the noise, eps", "sample": "the clean image, x_0", "v_prediction": "the velocity, v"}
_VARIANCE = {
    "fixed_small": "fixed, the small one (beta~_t)",
    "fixed_large": "fixed, the large one (beta_t)",
    "learned": "learned",
    "learned_range": "learned, between beta~_t and beta_t",
}


def facts(unet: UNetConfig, schedule: ScheduleConfig) -> dict[str, Any]:
    """A model as JSON values."""
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in UNet(unet).parameters())
    levels = range(len(unet.block_out_channels))
    attending = [level for level in levels if unet.down_block_types[level].startswith("Attn")]
    if unet.add_attention:
        attending.append(levels[-1])  # in the middle
    attention = sorted({unet.sample_size >> level for level in attending}, reverse=True)
    return {
        "size": unet.sample_size,
        "channels": unet.in_channels,
        "parameters": parameters,
        "block_out_channels": list(unet.block_out_channels),
        "layers_per_block": unet.layers_per_block,
        "attention": attention,
        "attention_head_dim": unet.attention_head_dim,
        "dropout": unet.dropout,
        "T": schedule.num_train_timesteps,
        "beta_schedule": "trained_betas" if schedule.trained_betas else schedule.beta_schedule,
        "beta_start": schedule.beta_start,
        "beta_end": schedule.beta_end,
        "prediction_type": schedule.prediction_type,
        "variance_type": schedule.variance_type,
        "clip_sample": schedule.clip_sample,
        "clip_sample_range": schedule.clip_sample_range,
        "thresholding": schedule.thresholding,
    }


def words(model: Mapping[str, Any]) -> dict[str, str]:
    """The facts for people, a line each."""
    channels = ", ".join(map(str, model["block_out_channels"]))
    attention = ", ".join(f"{size}x{size}" for size in model["attention"]) or "no resolution"
    betas = f", beta from {model['beta_start']:g} to {model['beta_end']:g}" if "_" not in _kind(model) else ""
    count = f"{model['parameters'] / 1e6:.1f}M" if model["parameters"] >= 1e5 else str(model["parameters"])
    blocks = model["layers_per_block"]
    limits = "left as they are"
    if model["thresholding"]:
        limits = "scaled into [-1, 1] by dynamic thresholding"
    elif model["clip_sample"]:
        limits = f"clipped to [-{model['clip_sample_range']:g}, {model['clip_sample_range']:g}]"
    return {
        "images": f"{model['size']}x{model['size']} {'gray' if model['channels'] == 1 else 'RGB'}",
        "network": f"{count} parameters, {blocks} block{'s' if blocks > 1 else ''} a level",
        "channels": channels,
        "attention": f"at {attention}, {_heads(model['attention_head_dim'])}",
        "predicts": _PREDICTS[model["prediction_type"]],
        "schedule": f"{model['T']} steps, {_kind(model)}{betas}",
        "variance": _VARIANCE[model["variance_type"]],
        "x_0": limits,
    }


def _heads(head_dim: int | Sequence[int] | None) -> str:
    if head_dim is None:
        return "one head"
    return f"heads of {head_dim if isinstance(head_dim, int) else ', '.join(map(str, head_dim))} channels"


def _kind(model: Mapping[str, Any]) -> str:
    """squaredcos_cap_v2 and trained_betas have no beta_start and beta_end, and scaled_linear is written as linear."""
    return {"scaled_linear": "linear in sqrt(beta)"}.get(model["beta_schedule"], str(model["beta_schedule"]))


def recipe(config: RunConfig, name: str, images: int, step: int) -> dict[str, Any]:
    """How a model was trained, as JSON values: ddpm.json. No paths of the machine it was trained on.

    name: what the data set is called. images: how many. step: steps done.
    """
    data = {key: value for key, value in config.data.to_dict().items() if key != "images"}
    return {
        "version": config.version,
        "preset": config.preset,
        "base": _published(config.base),
        "step": step,
        "images": {"name": name, "count": images} | data,
        "train": config.train.to_dict(),
    }


def _published(base: str | None) -> str | None:
    """A model's address without the folders of the machine: org/name@commit as it is, a run's `cats, step-00010000`."""
    if base is None or not Path(base).is_absolute():
        return base
    *_, run, checkpoints, name = ("", "", *Path(base).parts)
    return f"{run}, {name}" if checkpoints == "checkpoints" else name


def recipe_in_words(values: Mapping[str, Any]) -> dict[str, str]:
    """A recipe for people. It comes from anywhere, so whatever it lacks is left out."""
    parts = {key: values[key] if isinstance(values.get(key), dict) else {} for key in ("images", "train")}
    images, train = parts["images"], parts["train"]
    shown = {
        "steps": _joined("{} of {}", values.get("step"), train.get("steps")),
        "data": _joined("{} images, {}", images.get("count"), images.get("name")),
        "made": _joined("{0}x{0}, {1}", images.get("size"), images.get("fit")),
        "mirrored": {"True": "half of them", "False": "never"}.get(str(images.get("flip"))),
        "batch size": train.get("batch_size"),
        "learning rate": _joined("{}, linear warm-up over {} steps", train.get("lr"), train.get("lr_warmup")),
        "EMA decay": train.get("ema_decay"),
        "seed": train.get("seed"),
        "started from": values.get("base"),
        "trained by": _joined("ddpm {}", values.get("version")),
    }
    return {key: _printable(str(value)) for key, value in shown.items() if value is not None}


def _printable(text: str) -> str:
    """Without control codes, which a terminal would obey."""
    return "".join(letter for letter in text if letter.isprintable())


def _joined(form: str, *values: object) -> str | None:
    return None if None in values else form.format(*values)


def trained(folder: Path) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """How the model in a folder was trained: its recipe, if it is one of ours, and otherwise what its card says."""
    with contextlib.suppress(OSError, ValueError):  # a damaged one, or another program's, is none
        values = json.loads((folder / RECIPE).read_text(encoding="utf-8"))
        if isinstance(values, dict) and all(isinstance(values.get(key), dict) for key in ("images", "train")):
            return values, {}
    try:
        return None, _said_in_card((folder / CARD).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None, {}


_FRONT_MATTER = re.compile(r"\A---\n(?P<yaml>.*?)\n---\n", re.S)
_HYPERPARAMETER = re.compile(r"^[-*] +(?P<key>[A-Za-z][\w ]*): +(?P<value>\S.*)$", re.M)


def _said_in_card(text: str) -> dict[str, str]:
    """What a model card of the field says of the training: its data set, its licence, its list of hyperparameters."""
    found = {}
    if front := _FRONT_MATTER.match(text):
        for key in ("license", "datasets", "base_model"):
            if said := re.search(rf"^{key}: *(?P<value>.*(?:\n *- .*)*)", front["yaml"], re.M):
                value = re.sub(r"\n *- ", ", ", said["value"]).strip(", '\"")
                if value:
                    found[key] = value
    section = re.search(r"^#+ [^\n]*hyper-?parameters[^\n]*$(?P<body>.*?)(?=^#|\Z)", text, re.M | re.S | re.I)
    if section:
        found |= {match["key"]: match["value"].strip() for match in _HYPERPARAMETER.finditer(section["body"])}
    return {_printable(key): _printable(value) for key, value in found.items()}


_DIFFUSERS = """\
```python
from diffusers import DDPMPipeline

image = DDPMPipeline.from_pretrained({})().images[0]
```"""


def model_card(
    model: Mapping[str, Any], trained: Mapping[str, Any] | None, preview: bool, address: str | None = None
) -> str:
    """README.md of a model: the Hub's metadata, the preview, the recipe, and how to use it.

    model: `facts`. trained: a `recipe`, if it is known. preview: whether there is a grid of samples beside it.
    address: where it will be on the Hub, org/name.
    """
    title = address.split("/")[-1] if address else "A denoising diffusion model"
    base = str((trained or {}).get("base") or "")
    on = f" of {words(model)['images']} images"
    if trained:
        how = f"fine-tuned from {base.split('@')[0]}" if base else "trained"
        on += f", {how} on {trained['images'].get('count')} images ({trained['images'].get('name')})"
    where = address or "path/to/this/folder"
    in_diffusers = not isinstance(model["attention_head_dim"], tuple)  # which would be an error there
    metadata = [
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
        "tags:",
        *(f"- {tag}" for tag in ("ddpm", "diffusion", "unconditional-image-generation", "ddpm-cli")),
        *([f"base_model: {json.dumps(base.split('@')[0])}"] if base and "/" in base else []),
    ]
    parts = [
        "\n".join(["---", *metadata, "---"]),
        f"# {title}",
        f"A [denoising diffusion probabilistic model](https://arxiv.org/abs/2006.11239){on}.",
        *([f"![Samples]({PREVIEW})"] if preview else []),
        "## Use",
        f"```sh\npip install ddpm-cli\nddpm sample -m {where} --n 64 -o grid.png\n"
        f"ddpm denoise-trace -m {where} -o trace.gif\n```",
        *(["or in Python, with diffusers:", _DIFFUSERS.format(json.dumps(where))] if in_diffusers else []),
        "## The model",
        _table(words(model)),
        *(["## Training", _table(recipe_in_words(trained))] if trained else []),
    ]
    text = "\n\n".join(parts) + "\n"
    return text + _MARK.format(_digest(text))


_MARK = "\n<!-- written by ddpm, {} -->\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def is_generated(card: str) -> bool:
    """Whether a model card is as `model_card` wrote it, in whatever version, and no hand has changed it."""
    text, mark, rest = card.rpartition(_MARK.partition("{}")[0])
    return bool(mark) and rest.startswith(_digest(text))


def _table(rows: Mapping[str, str]) -> str:
    cells = (f"| {key} | {value.replace('|', chr(92) + '|')} |" for key, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *cells])
