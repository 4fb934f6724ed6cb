"""Every setting, as frozen dataclasses that go to JSON and come back strictly. Knows nothing of torch.

`UNetConfig` and `ScheduleConfig` are diffusers' own configuration files (`unet/config.json` and
`scheduler/scheduler_config.json`), field by field, so that what we write is what the field reads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ddpm_cli.errors import ModelError, UsageError

__all__ = ["PRESETS", "DataConfig", "Preset", "RunConfig", "ScheduleConfig", "TrainConfig", "UNetConfig"]

# The release of diffusers whose file formats we write; its readers only look at the class names.
DIFFUSERS_VERSION = "0.42.1"


class _Strict:
    """`to_dict` and `from_dict` for a dataclass; a key nobody knows is an error, never dropped."""

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)  # type: ignore[call-overload, no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ModelError naming the first key that is unknown."""
        known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise ModelError(
                f"unknown setting {unknown[0]!r} in a {cls.__name__}", "Was this written by a newer version of ddpm?"
            )
        required = (f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING)  # type: ignore[arg-type]
        if missing := sorted(set(required) - set(values)):
            raise ModelError(f"setting {missing[0]!r} is missing in a {cls.__name__}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _drop_fixed(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Remove the keys for which only one behaviour is implemented, after checking that it is the one asked for."""
    rest = {k: v for k, v in values.items() if not k.startswith("_")}
    for key, allowed in fixed.items():
        if key in rest and rest.pop(key) not in allowed:
            raise ModelError(
                f"{key}={values[key]!r} is not supported",
                f"ddpm runs models with {key}={allowed[0]!r}.",
            )
    return rest


@dataclass(frozen=True)
class UNetConfig(_Strict):
    """The hyper-parameters of diffusers' UNet2DModel; the defaults are the CIFAR-10 model of the paper (Appendix B).

    A key that a file lacks takes diffusers' default, not ours: see `from_dict`.
    """

    sample_size: int = 32
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 256)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    layers_per_block: int = 2
    dropout: float = 0.0
    attention_head_dim: int | None = None  # None: a single head
    norm_num_groups: int = 32
    norm_eps: float = 1e-6
    downsample_padding: int = 0  # 0 pads right and bottom, as TensorFlow's SAME does
    flip_sin_to_cos: bool = False
    freq_shift: int = 1
    mid_block_scale_factor: float = 1
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True  # in the middle block

    # Keys of UNet2DModel for which we run only the value that DDPMs use.
    _FIXED = {  # noqa: RUF012
        "center_input_sample": (False,),
        "time_embedding_type": ("positional",),
        "time_embedding_dim": (None,),
        "mid_block_type": ("UNetMidBlock2D", None),
        "downsample_type": ("conv", None),
        "upsample_type": ("conv", None),
        "act_fn": ("silu", "swish"),
        "attn_norm_num_groups": (None,),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
        "num_train_timesteps": (None,),
    }
    _DIFFUSERS_DEFAULTS = {  # noqa: RUF012
        "block_out_channels": (224, 448, 672, 896),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 8,
        "norm_eps": 1e-5,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
    }

    def __post_init__(self) -> None:
        levels = len(self.block_out_channels)
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ModelError("block_out_channels, down_block_types and up_block_types must have the same length")
        for kind in self.down_block_types + self.up_block_types:
            if kind not in ("DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"):
                raise ModelError(f"U-Net block type {kind!r} is not supported")
        if self.in_channels != self.out_channels:
            raise ModelError(f"a U-Net from {self.in_channels} to {self.out_channels} channels does not predict eps")
        if self.resnet_time_scale_shift not in ("default", "scale_shift"):
            raise ModelError(f"resnet_time_scale_shift={self.resnet_time_scale_shift!r} is not supported")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ModelError(f"{channels} channels do not divide into {self.norm_num_groups} groups")

    @property
    def size_multiple(self) -> int:
        """Images must be a multiple of this many pixels high and wide: each level but the last halves them."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a UNet2DModel's config.json. Raises ModelError on a key or a value we cannot honour."""
        rest = _drop_fixed(values, cls._FIXED)
        size = rest.get("sample_size")
        if isinstance(size, list | tuple):
            if len(set(size)) != 1:
                raise ModelError(f"sample_size={size} is not square, which is not supported")
            rest["sample_size"] = size[0]
        elif size is None:
            raise ModelError("sample_size is missing, so the size of the images is not known")
        return super().from_dict(cls._DIFFUSERS_DEFAULTS | rest)

    def to_dict(self) -> dict[str, Any]:
        fixed = {key: allowed[0] for key, allowed in self._FIXED.items()}
        header = {"_class_name": "UNet2DModel", "_diffusers_version": DIFFUSERS_VERSION}
        return header | super().to_dict() | fixed


@dataclass(frozen=True)
class ScheduleConfig(_Strict):
    """The noise schedule and the reverse process's variance, as diffusers' DDPMScheduler writes them."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"  # linear | scaled_linear | squaredcos_cap_v2 | sigmoid
    trained_betas: tuple[float, ...] | None = None  # replaces the four above
    variance_type: str = "fixed_small"  # fixed_small: beta~_t, fixed_large: beta_t (Section 3.2)
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    _FIXED = {  # noqa: RUF012
        "prediction_type": ("epsilon",),
        "thresholding": (False,),
        "rescale_betas_zero_snr": (False,),
    }
    # Keys that say how diffusers samples, which the caller decides here, or that carry no meaning any more.
    _IGNORED = frozenset(
        (
            "dynamic_thresholding_ratio",
            "predict_epsilon",
            "sample_max_value",
            "set_alpha_to_one",
            "skip_prk_steps",
            "steps_offset",
            "tensor_format",
            "timestep_spacing",
        )
    )

    def __post_init__(self) -> None:
        if self.variance_type not in ("fixed_small", "fixed_large"):
            raise ModelError(f"variance_type={self.variance_type!r} is not supported")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a scheduler_config.json. Raises ModelError on a key or a value we cannot honour."""
        rest = _drop_fixed(values, cls._FIXED)
        rest = {k: v for k, v in rest.items() if k not in cls._IGNORED}
        if rest.get("variance_type") == "fixed_small_log":  # the same variance, computed by way of its logarithm
            rest["variance_type"] = "fixed_small"
        return super().from_dict(rest)

    def to_dict(self) -> dict[str, Any]:
        fixed = {key: allowed[0] for key, allowed in self._FIXED.items()}
        header = {"_class_name": "DDPMScheduler", "_diffusers_version": DIFFUSERS_VERSION}
        # linspace is the spacing of `NoiseSchedule.spaced`, so that diffusers with fewer steps visits the same ones.
        return header | super().to_dict() | fixed | {"timestep_spacing": "linspace", "steps_offset": 0}


@dataclass(frozen=True)
class DataConfig(_Strict):
    """What the training images are and what is made of them."""

    images: str  # a folder or a .zip, absolute
    size: int  # pixels, square
    channels: int  # 1 gray, 3 RGB
    fit: str = "crop"  # crop | pad | stretch: how an image that is not square becomes square
    background: str = "white"  # what shows through transparent pixels, and fills the borders of fit=pad
    flip: bool = True  # mirror half of the images at random


@dataclass(frozen=True)
class TrainConfig(_Strict):
    """Algorithm 1 and what surrounds it."""

    steps: int  # in all, resumed or not
    batch_size: int
    lr: float  # Adam's, after the warm-up
    lr_warmup: int = 5000  # steps over which lr rises linearly from 0
    ema_decay: float = 0.9999
    grad_clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    save_every: int = 10_000  # steps between checkpoints
    sample_every: int = 10_000  # steps between previews
    log_every: int = 100  # steps between lines of metrics.jsonl
    keep: int = 3  # newest checkpoints that stay on disk

    # What may differ between the parts of a resumed run: it changes when and where, never what is learned.
    FREE = ("steps", "save_every", "sample_every", "keep")


@dataclass(frozen=True)
class RunConfig(_Strict):
    """All that is needed to repeat a run: the run's `config.json`."""

    version: str  # of ddpm, that started it
    preset: str
    data: DataConfig
    train: TrainConfig
    unet: UNetConfig
    schedule: ScheduleConfig

    def to_dict(self) -> dict[str, Any]:
        parts = {name: getattr(self, name).to_dict() for name in ("data", "train", "unet", "schedule")}
        return {"version": self.version, "preset": self.preset} | parts

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        kinds: dict[str, type[_Strict]] = {
            "data": DataConfig,
            "train": TrainConfig,
            "unet": UNetConfig,
            "schedule": ScheduleConfig,
        }
        parts = {name: kind.from_dict(values[name]) for name, kind in kinds.items() if name in values}
        return super().from_dict({**values, **parts})


@dataclass(frozen=True)
class Preset:
    """A recipe: an architecture for any image size it divides, and the settings it trains well with."""

    about: str
    size: int | None  # pixels; None: the images' own size, up to 32
    channel_mult: tuple[int, ...]
    steps: int
    batch_size: int
    lr: float
    base_channels: int = 128
    layers_per_block: int = 2
    dropout: float = 0.0
    lr_warmup: int = 5000
    variance_type: str = "fixed_small"
    every: int = 10_000  # steps between checkpoints, and between previews
    smaller: str | None = None  # the preset to try where this one takes too long
    norm_num_groups: int = 32
    attention_size: int = 16  # pixels; attention where the maps are nearest to this size

    @property
    def size_multiple(self) -> int:
        """The image sizes that this architecture takes are the multiples of this many pixels."""
        return int(2 ** (len(self.channel_mult) - 1))

    def unet(self, size: int, channels: int) -> UNetConfig:
        """The U-Net for images of `size` pixels and `channels` channels; whatever else the preset says.

        Raises UsageError if the levels do not divide the size.
        """
        if size % self.size_multiple or size < self.size_multiple:
            raise UsageError(
                f"--size {size} is not a multiple of {self.size_multiple}, which this preset needs",
                f"Try --size {max(1, round(size / self.size_multiple)) * self.size_multiple}.",
            )
        levels = len(self.channel_mult)
        with_attention = min(range(levels), key=lambda level: abs((size >> level) - self.attention_size))
        down = tuple("AttnDownBlock2D" if i == with_attention else "DownBlock2D" for i in range(levels))
        return UNetConfig(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(self.base_channels * m for m in self.channel_mult),
            down_block_types=down,
            up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(down)),
            layers_per_block=self.layers_per_block,
            dropout=self.dropout,
            norm_num_groups=self.norm_num_groups,
        )

    def schedule(self) -> ScheduleConfig:
        """The paper's schedule: T=1000, betas linear from 1e-4 to 0.02."""
        return ScheduleConfig(variance_type=self.variance_type)


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        about="1.3M parameters, minutes on two CPU cores",
        size=None,
        channel_mult=(1, 2, 6),  # few channels where maps are large: twice as fast as even ones, and as good
        base_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        attention_size=8,
        steps=5_000,
        batch_size=32,
        lr=1e-3,
        lr_warmup=100,
        every=500,
    ),
    "cifar10": Preset(
        about="the paper's CIFAR-10 model, 35.7M parameters",
        size=32,
        channel_mult=(1, 2, 2, 2),
        dropout=0.1,
        steps=800_000,
        batch_size=128,
        lr=2e-4,
        variance_type="fixed_large",
        smaller="tiny",
    ),
    "64": Preset(
        about="between the paper's two models",
        size=64,
        channel_mult=(1, 2, 2, 2),
        dropout=0.1,
        steps=800_000,
        batch_size=128,
        lr=1e-4,
        smaller="cifar10",
    ),
    "128": Preset(
        about="between the paper's two models",
        size=128,
        channel_mult=(1, 1, 2, 2, 4),
        steps=600_000,
        batch_size=64,
        lr=5e-5,
        smaller="64",
    ),
    "256": Preset(
        about="the paper's CelebA-HQ and LSUN model, 114M parameters",
        size=256,
        channel_mult=(1, 1, 2, 2, 4, 4),
        steps=500_000,
        batch_size=64,
        lr=2e-5,
        smaller="128",
    ),
}
