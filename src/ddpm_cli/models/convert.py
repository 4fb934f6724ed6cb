"""Converts weights of other programs to a diffusers model: the same network with other parameter names.

It reads the authors' TensorFlow weights as stored by pesser/pytorch_diffusion (`.ckpt`), and unconditional models of
OpenAI's improved-diffusion (`.pt`). The shapes of the weights show the architecture. Flags give the rest, such as the
noise schedule of an improved-diffusion model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm_cli.config import ScheduleConfig, UNetConfig
from ddpm_cli.errors import ModelError, UsageError
from ddpm_cli.models.pretrained import fit_weights, read_weights
from ddpm_cli.names import check_name
from ddpm_cli.nn.unet import UNet, timestep_embedding
from ddpm_cli.text import printable

__all__ = ["Flags", "convert"]


@dataclass(frozen=True)
class Flags:
    """How a model was trained: flags of improved-diffusion. None if a flag was not given."""

    image_size: int | None = None
    num_channels: int | None = None
    num_res_blocks: int | None = None
    num_heads: int | None = None
    attention_resolutions: tuple[int, ...] | None = None  # pixels
    dropout: float | None = None
    learn_sigma: bool | None = None
    sigma_small: bool | None = None
    class_cond: bool | None = None
    use_scale_shift_norm: bool | None = None
    diffusion_steps: int | None = None
    noise_schedule: str | None = None  # linear | cosine
    predict_xstart: bool | None = None
    rescale_timesteps: bool | None = None


@dataclass(frozen=True)
class Converted:
    """A converted model. origin: the program that wrote its weights."""

    origin: str
    unet: UNetConfig
    schedule: ScheduleConfig
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class _Level:
    """One resolution of a U-Net, as its weights show it."""

    channels: int
    resnets: int
    attention: bool


def convert(path: Path, flags: Flags) -> Converted:
    """Read a file of weights of another program.

    Raises ModelError if the program is not supported, and UsageError if a flag is missing or contradicts the weights.
    """
    try:
        tensors = read_weights(path)
    except ModelError as error:
        hint = "Files of lucidrains' and other trainers hold other networks, which cannot be converted."
        raise ModelError(error.message, hint if "state dict" in error.message else error.hint) from None
    if "temb.dense.0.weight" in tensors:
        converted = _from_pytorch_diffusion(tensors, flags)
    elif "input_blocks.0.0.weight" in tensors:
        converted = _from_improved_diffusion(tensors, flags)
    elif "time_embedding.linear_1.weight" in tensors:
        raise ModelError(f"{path}: is a file of diffusers already", "Use it, or its folder, with -m.")
    else:
        some = ", ".join(map(printable, sorted(tensors)[:3]))
        raise ModelError(f"{path}: neither of pytorch_diffusion nor of improved-diffusion (it has {some})")
    with torch.device("meta"):
        expected = UNet(converted.unet).state_dict()
    return dataclasses.replace(converted, weights=fit_weights(expected, converted.weights, str(path)))


def _check(flags: Flags, **shown: object) -> None:
    """Raises UsageError if a flag contradicts the weights."""
    for name, value in shown.items():
        if (given := getattr(flags, name)) not in (None, value):
            raise UsageError(f"--{name.replace('_', '-')} {given}: the weights show {value}")


def _unet(levels: list[_Level], size: int, heads: int, **settings: object) -> UNetConfig:
    """The configuration of a U-Net with these levels, and this number of heads at each."""
    resnets = {level.resnets for level in levels}
    if len(resnets) != 1:
        raise ModelError(f"the levels of this U-Net have {sorted(resnets)} blocks, which no UNet2DModel has")
    for channels in {level.channels for level in levels if level.attention} | {levels[-1].channels}:
        if channels % heads:
            raise UsageError(f"--num-heads {heads} does not divide this network's {channels} channels")
    dims = tuple(level.channels // heads for level in levels)
    used = {dim for dim, level in zip(dims, levels, strict=True) if level.attention} | {dims[-1]}
    down = tuple("AttnDownBlock2D" if level.attention else "DownBlock2D" for level in levels)
    return UNetConfig(
        sample_size=size,
        block_out_channels=tuple(level.channels for level in levels),
        down_block_types=down,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        layers_per_block=resnets.pop(),
        attention_head_dim=None if heads == 1 else dims[-1] if len(used) == 1 else dims,
        **settings,  # type: ignore[arg-type]
    )


# --- pesser/pytorch_diffusion ---

_PESSER_RESNET = {"temb_proj": "time_emb_proj", "nin_shortcut": "conv_shortcut"}
_PESSER_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_PESSER_TOP = {"temb.dense.0": "time_embedding.linear_1", "temb.dense.1": "time_embedding.linear_2"}
_PESSER_TOP |= {"norm_out": "conv_norm_out"}
_PESSER_MID = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}


def _from_pytorch_diffusion(tensors: Mapping[str, Tensor], flags: Flags) -> Converted:
    """The paper's models. Their attention is at 16x16, which shows the size of the images."""
    count = len({name.split(".")[1] for name in tensors if name.startswith("down.")})
    levels = [
        _Level(
            channels=tensors[f"down.{i}.block.0.conv1.weight"].shape[0],
            resnets=sum(name.startswith(f"down.{i}.block.") and name.endswith("conv1.weight") for name in tensors),
            attention=f"down.{i}.attn.0.q.weight" in tensors,
        )
        for i in range(count)
    ]
    where = [i for i, level in enumerate(levels) if level.attention]
    size = flags.image_size or (16 << where[0] if len(where) == 1 else None)
    if size is None:
        raise UsageError("--image-size is needed: these weights do not show it")
    resolutions = tuple(size >> i for i in where)
    _check(flags, num_channels=tensors["conv_in.weight"].shape[0], num_res_blocks=levels[0].resnets, num_heads=1)
    _check(flags, learn_sigma=False, class_cond=False, use_scale_shift_norm=False, predict_xstart=False)
    _check(flags, diffusion_steps=1000, noise_schedule="linear", attention_resolutions=resolutions)
    cifar10 = size == 32
    small = flags.sigma_small if flags.sigma_small is not None else not cifar10
    return Converted(
        origin="pytorch_diffusion",
        unet=_unet(levels, size, 1, dropout=flags.dropout if flags.dropout is not None else 0.1 if cifar10 else 0.0),
        schedule=ScheduleConfig(variance_type="fixed_small" if small else "fixed_large"),
        weights=dict(_pesser_names(tensors, len(levels))),
    )


def _pesser_names(tensors: Mapping[str, Tensor], levels: int) -> Iterator[tuple[str, Tensor]]:
    resample = {"downsample": "downsamplers.0", "upsample": "upsamplers.0"}
    for name, value in tensors.items():
        words = name.split(".")
        if words[0] in ("down", "up"):
            level = int(words[1]) if words[0] == "down" else levels - 1 - int(words[1])
            head = f"{words[0]}_blocks.{level}"
            if words[2] in resample:
                yield f"{head}.{resample[words[2]]}.{'.'.join(words[3:])}", value
                continue
            kind, layers = ("resnets", _PESSER_RESNET) if words[2] == "block" else ("attentions", _PESSER_ATTENTION)
            yield f"{head}.{kind}.{words[3]}.{layers.get(words[4], words[4])}.{words[5]}", value
        elif words[0] == "mid":
            layers = _PESSER_ATTENTION if words[1].startswith("attn") else _PESSER_RESNET
            yield f"mid_block.{_PESSER_MID[words[1]]}.{layers.get(words[2], words[2])}.{words[3]}", value
        else:
            layer, _, kind = name.rpartition(".")
            yield f"{_PESSER_TOP.get(layer, layer)}.{kind}", value


# --- openai/improved-diffusion ---

_OPENAI_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OPENAI_ATTENTION = {"norm": "group_norm", "proj_out": "to_out.0"}
_OPENAI_TOP = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
# Their script has one list of multipliers per image size, so the multipliers show the size.
_OPENAI_SIZES = {(1, 1, 2, 2, 4, 4): 256, (1, 2, 3, 4): 64, (1, 2, 2, 2): 32}
_ASK = "It is among the flags that the model was trained with; its README or model card lists them."


def _from_improved_diffusion(tensors: Mapping[str, Tensor], flags: Flags) -> Converted:
    if flags.class_cond or "label_emb.weight" in tensors:
        raise ModelError("this improved-diffusion model is class-conditional, and ddpm runs unconditional ones")
    levels = _openai_levels(tensors)
    base, channels = tensors["input_blocks.0.0.weight"].shape[:2]
    size = flags.image_size or _OPENAI_SIZES.get(tuple(level.channels // base for level in levels))
    if channels != 3:
        raise ModelError(f"this improved-diffusion model takes {channels} channels: it enlarges or completes images")
    for flag, value in (
        ("image-size", size),
        ("diffusion-steps", flags.diffusion_steps),
        ("noise-schedule", flags.noise_schedule),
    ):
        if value is None:
            raise UsageError(f"--{flag} is needed: an improved-diffusion file does not contain it", _ASK)
    assert size is not None
    assert flags.diffusion_steps is not None
    out = tensors["out.2.weight"].shape[0]
    first = tensors["input_blocks.1.0.emb_layers.1.weight"].shape[0]
    scale_shift = first == 2 * levels[0].channels
    heads = flags.num_heads or 4  # their default
    _check(
        flags,
        num_channels=base,
        num_res_blocks=levels[0].resnets,
        learn_sigma=out == 2 * channels,
        use_scale_shift_norm=scale_shift,
        attention_resolutions=tuple(size >> i for i, level in enumerate(levels) if level.attention),
    )
    # Their networks get t * 1000 / T by default. A table of time embeddings does the same in diffusers.
    T = flags.diffusion_steps
    table = flags.rescale_timesteps is not False and T != 1000
    config = _unet(
        levels,
        size,
        heads,
        out_channels=out,
        dropout=flags.dropout or 0.0,
        norm_eps=1e-5,
        downsample_padding=1,
        flip_sin_to_cos=True,
        freq_shift=0,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        attn_norm_num_groups=32,
        time_embedding_type="learned" if table else "positional",
        num_train_timesteps=T if table else None,
    )
    weights = dict(_openai_names(tensors, config, heads))
    if table:
        weights["time_proj.weight"] = timestep_embedding(torch.arange(T) * (1000 / T), base, True, 0)
    return Converted("improved-diffusion", config, _openai_schedule(flags, T, out == 2 * channels), weights)


def _openai_schedule(flags: Flags, T: int, learned: bool) -> ScheduleConfig:
    """Their linear schedule keeps its shape with other T; cosine is Eq. 17 of Nichol and Dhariwal 2021."""
    check_name("--noise-schedule", flags.noise_schedule or "", ("linear", "cosine"))
    variance = "learned_range" if learned else "fixed_small" if flags.sigma_small else "fixed_large"
    prediction = "sample" if flags.predict_xstart else "epsilon"
    if flags.noise_schedule == "cosine":
        return ScheduleConfig(T, beta_schedule="squaredcos_cap_v2", variance_type=variance, prediction_type=prediction)
    scale = 1000 / T
    return ScheduleConfig(T, 1e-4 * scale, 0.02 * scale, variance_type=variance, prediction_type=prediction)


def _openai_levels(tensors: Mapping[str, Tensor]) -> list[_Level]:
    """Cut the flat list of input blocks into levels, which end in a strided convolution."""
    levels: list[_Level] = []
    blocks: list[tuple[int, bool]] = []  # channels, attention

    def close() -> None:
        if len(set(blocks)) != 1:
            raise ModelError("the blocks of a level differ, as in guided-diffusion; in improved-diffusion they do not")
        levels.append(_Level(blocks[0][0], len(blocks), blocks[0][1]))
        blocks.clear()

    k = 1
    while any(name.startswith(f"input_blocks.{k}.") for name in tensors):
        if f"input_blocks.{k}.0.op.weight" in tensors:
            close()
        else:
            convolution = tensors.get(f"input_blocks.{k}.0.in_layers.2.weight")
            if convolution is None:
                raise ModelError(f"input_blocks.{k} is not a block of improved-diffusion")
            blocks.append((convolution.shape[0], f"input_blocks.{k}.1.qkv.weight" in tensors))
        k += 1
    close()
    return levels


def _openai_names(tensors: Mapping[str, Tensor], config: UNetConfig, heads: int) -> Iterator[tuple[str, Tensor]]:
    """Walk both networks in the order of computation, and give each tensor its diffusers name."""

    left = dict(tensors)

    def layers(theirs: str, ours: str, names: Mapping[str, str]) -> Iterator[tuple[str, Tensor]]:
        for whole in [name for name in left if name.startswith(theirs + ".")]:
            value = left.pop(whole)
            layer, _, kind = whole.removeprefix(theirs + ".").rpartition(".")
            name = f"{names.get(layer, layer)}.{kind}" if layer else kind
            if layer == "qkv":  # q, k and v of each head
                split = value.squeeze(-1) if value.ndim == 3 else value
                split = split.view(heads, 3, -1, *split.shape[1:])
                for i, to in enumerate(("to_q", "to_k", "to_v")):
                    yield f"{ours}.{to}.{kind}", split[:, i].flatten(0, 1)
            else:
                yield f"{ours}.{name}", value

    for theirs, ours in _OPENAI_TOP.items():
        yield from layers(theirs, ours, {})
    levels, n = len(config.block_out_channels), config.layers_per_block
    k = 1
    for level, kind in enumerate(config.down_block_types):
        for i in range(n):
            yield from layers(f"input_blocks.{k}.0", f"down_blocks.{level}.resnets.{i}", _OPENAI_RESNET)
            if kind.startswith("Attn"):
                yield from layers(f"input_blocks.{k}.1", f"down_blocks.{level}.attentions.{i}", _OPENAI_ATTENTION)
            k += 1
        if level < levels - 1:
            yield from layers(f"input_blocks.{k}.0.op", f"down_blocks.{level}.downsamplers.0.conv", {})
            k += 1
    yield from layers("middle_block.0", "mid_block.resnets.0", _OPENAI_RESNET)
    yield from layers("middle_block.1", "mid_block.attentions.0", _OPENAI_ATTENTION)
    yield from layers("middle_block.2", "mid_block.resnets.1", _OPENAI_RESNET)
    k = 0
    for index, kind in enumerate(config.up_block_types):
        for i in range(n + 1):
            yield from layers(f"output_blocks.{k}.0", f"up_blocks.{index}.resnets.{i}", _OPENAI_RESNET)
            last = 1
            if kind.startswith("Attn"):
                yield from layers(f"output_blocks.{k}.1", f"up_blocks.{index}.attentions.{i}", _OPENAI_ATTENTION)
                last = 2
            if i == n and index < levels - 1:
                yield from layers(f"output_blocks.{k}.{last}.conv", f"up_blocks.{index}.upsamplers.0.conv", {})
            k += 1
    if left:
        raise ModelError(
            f"has {len(left)} tensors that no improved-diffusion model has, such as {printable(min(left))}"
        )
