"""The settings of a model: the fields of diffusers' configuration files, so that diffusers can read what we write.

`UNetConfig` is `unet/config.json`, and `ScheduleConfig` is `scheduler/scheduler_config.json`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from ddpm_cli.config.strict import Positive, Strict, between, one_of, shown
from ddpm_cli.errors import ModelError

__all__ = [
    "DIFFUSERS_VERSION",
    "LARGEST_BETA",
    "ImageSize",
    "ScheduleConfig",
    "UNetConfig",
    "jsd_betas",
    "require_match",
]

# Far larger than known models. A larger value could use up all memory before an error is reported.
ImageSize = Annotated[int, between(1, 4096)]  # pixels, square
_Channels = Annotated[int, between(1, 8192)]
_Steps = Annotated[int, between(1, 1_000_000)]
_Fraction = Annotated[float, between(0, 1)]

# The release of diffusers whose file formats we write; its readers only look at the class names.
DIFFUSERS_VERSION = "0.42.1"

# The names of some settings in the first releases of diffusers (2022).
_OLD_UNET_KEYS = {
    "image_size": "sample_size",
    "num_res_blocks": "layers_per_block",
    "block_channels": "block_out_channels",
    "down_blocks": "down_block_types",
    "up_blocks": "up_block_types",
    "downscale_freq_shift": "freq_shift",
    "resnet_num_groups": "norm_num_groups",
    "resnet_act_fn": "act_fn",
    "resnet_eps": "norm_eps",
    "num_head_channels": "attention_head_dim",
}
_OLD_SCHEDULE_KEYS = {"timesteps": "num_train_timesteps"}


def _drop_fixed(values: Mapping[str, Any], fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """Remove keys of which only one behaviour is implemented. Raises ModelError if a value asks for another one."""
    rest = {k: v for k, v in values.items() if not k.startswith("_")}
    for key, allowed in fixed.items():
        if key in rest and rest.pop(key) not in allowed:
            raise ModelError(
                f"{key}={shown(values[key])} is not supported",
                f"ddpm runs models with {key}={allowed[0]!r}.",
            )
    return rest


@dataclass(frozen=True)
class UNetConfig(Strict):
    """The hyper-parameters of diffusers' UNet2DModel; the defaults are the CIFAR-10 model of the paper (Appendix B).

    `from_dict` gives a missing key diffusers' default, not ours.
    """

    sample_size: ImageSize = 32
    in_channels: int = 3
    out_channels: int = 3  # twice in_channels if the variance is learned
    block_out_channels: tuple[_Channels, ...] = (128, 256, 256, 256)
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D")
    up_block_types: tuple[str, ...] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    layers_per_block: Annotated[int, between(1, 64)] = 2
    dropout: _Fraction = 0.0
    attention_head_dim: int | tuple[int, ...] | None = None  # None: one head; a tuple: one per level (not in diffusers)
    norm_num_groups: _Channels = 32
    norm_eps: _Fraction = 1e-6
    downsample_padding: Annotated[int, one_of(0, 1)] = 0  # 0 pads right and bottom, as TensorFlow's SAME does
    flip_sin_to_cos: bool = False
    freq_shift: Annotated[int, one_of(0, 1)] = 1
    mid_block_scale_factor: Positive = 1
    resnet_time_scale_shift: Annotated[str, one_of("default", "scale_shift")] = "default"
    add_attention: bool = True  # in the middle block
    attn_norm_num_groups: _Channels | None = None  # of that attention; None: as elsewhere, or no norm with scale_shift
    downsample_type: Annotated[str, one_of("conv", "resnet")] = "conv"  # how blocks with attention change the size
    upsample_type: Annotated[str, one_of("conv", "resnet")] = "conv"
    time_embedding_type: Annotated[str, one_of("positional", "learned")] = "positional"  # learned: one row per step
    time_embedding_dim: Annotated[int, between(1, 65536)] | None = None  # None: 4 block_out_channels[0]
    num_train_timesteps: _Steps | None = None  # rows of that table

    # Keys of UNet2DModel of which only the values of unconditional DDPMs are supported.
    _FIXED = {  # noqa: RUF012
        "center_input_sample": (False,),
        "mid_block_type": ("UNetMidBlock2D",),
        "act_fn": ("silu", "swish"),
        "class_embed_type": (None,),
        "num_class_embeds": (None,),
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
    _DOWN_BLOCKS = frozenset(("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"))
    _UP_BLOCKS = frozenset(("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"))

    # Keys that diffusers' EMAModel adds. They describe how the weights were averaged, so they do not matter here.
    _IGNORED = frozenset(
        ("decay", "inv_gamma", "min_decay", "optimization_step", "power", "update_after_step", "use_ema_warmup")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        levels = len(self.block_out_channels)
        if not levels:
            raise ModelError("block_out_channels is empty")
        if not len(self.down_block_types) == len(self.up_block_types) == levels:
            raise ModelError("block_out_channels, down_block_types and up_block_types must have the same length")
        for blocks, known in ((self.down_block_types, self._DOWN_BLOCKS), (self.up_block_types, self._UP_BLOCKS)):
            for kind in blocks:
                if kind not in known:
                    raise ModelError(f"U-Net block type {shown(kind)} is not supported", _why_not(kind))
        if self.in_channels not in (1, 3):
            raise ModelError(
                f"in_channels={self.in_channels}: ddpm makes gray (1) and RGB (3) images",
                "Models with other channels mostly generate latents of another network.",
            )
        if self.out_channels not in (self.in_channels, 2 * self.in_channels):
            raise ModelError(f"a U-Net from {self.in_channels} to {self.out_channels} channels is not a DDPM")
        if self.sample_size % self.size_multiple:
            raise ModelError(
                f"sample_size={self.sample_size}: is not a multiple of {self.size_multiple}, "
                f"so {levels} levels cannot halve the image"
            )
        if self.time_embedding_type == "learned" and not self.num_train_timesteps:
            raise ModelError("time_embedding_type='learned' needs num_train_timesteps")
        pairs = zip(self.down_block_types, reversed(self.up_block_types), strict=True)
        attends = ["Attn" in down + up for down, up in pairs]
        attends[-1] |= self.add_attention
        for channels, head_dim, attention in zip(self.block_out_channels, self.head_dims, attends, strict=True):
            if channels % self.norm_num_groups:
                raise ModelError(f"{channels} channels do not divide into {self.norm_num_groups} groups")
            if attention and not 0 < head_dim <= channels:
                raise ModelError(f"attention heads of {head_dim} channels do not fit into {channels}")
        if self.block_out_channels[-1] % (self.attn_norm_num_groups or 1):
            raise ModelError(f"attn_norm_num_groups={self.attn_norm_num_groups}: does not divide the channels")
        if self.time_embedding_type == "positional" and self.block_out_channels[0] // 2 <= self.freq_shift:
            raise ModelError(f"block_out_channels: {self.block_out_channels[0]} are too few for the time embedding")

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Channels of an attention head, per level."""
        dims = self.attention_head_dim
        if isinstance(dims, tuple):
            if len(dims) != len(self.block_out_channels):
                raise ModelError("attention_head_dim must be one number, or one per level")
            return dims
        return tuple(dims or channels for channels in self.block_out_channels)

    @property
    def size_multiple(self) -> int:
        """Images must be a multiple of this many pixels high and wide: each level but the last halves them."""
        return int(2 ** (len(self.block_out_channels) - 1))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a UNet2DModel's config.json. Raises ModelError for a key or a value that is not supported."""
        name = values.get("_class_name", "UNet2DModel")
        if name not in ("UNet2DModel", "UNetUnconditionalModel"):
            raise ModelError(f"its network is a {shown(name)}, not a UNet2DModel", _why_not(name))
        if values.get("num_class_embeds") is not None or values.get("class_embed_type") is not None:
            raise ModelError("it is class-conditional, and ddpm runs unconditional models")
        values = {_OLD_UNET_KEYS.get(key, key): value for key, value in values.items() if key not in cls._IGNORED}
        if values.get("time_embedding_type") == "fourier":
            raise ModelError("it is a score-based SDE model, not a DDPM (time_embedding_type='fourier')")
        rest: dict[str, Any] = cls._DIFFUSERS_DEFAULTS | _drop_fixed(values, cls._FIXED)
        for key in ("down_block_types", "up_block_types"):
            if isinstance(rest[key], list | tuple):
                rest[key] = [kind.removeprefix("UNetRes") if isinstance(kind, str) else kind for kind in rest[key]]
        for key in ("downsample_type", "upsample_type"):
            rest[key] = rest.get(key) or "conv"
        size = rest.get("sample_size")
        if isinstance(size, list | tuple):
            if not size or size.count(size[0]) != len(size):
                raise ModelError(f"sample_size={shown(list(size))}: ddpm makes square images")
            rest["sample_size"] = size[0]
        elif size is None:
            raise ModelError("sample_size is missing, so the size of the images is not known")
        return super().from_dict(rest)

    def to_dict(self) -> dict[str, Any]:
        fixed = {key: allowed[0] for key, allowed in self._FIXED.items()}
        header = {"_class_name": "UNet2DModel", "_diffusers_version": DIFFUSERS_VERSION}
        return header | super().to_dict() | fixed


def _why_not(kind: object) -> str | None:
    """The kind of model that has this block or network, in words; None if unknown."""
    text = str(kind)
    if "CrossAttn" in text or "Condition" in text:
        return "It generates images from text or another condition; ddpm runs unconditional models."
    if "Skip" in text:
        return "It is a score-based SDE model (NCSN++), not a DDPM."
    return "ddpm runs the unconditional UNet2DModel of diffusers." if "Model" in text else None


# The betas by diffusers' names, see `schedule.make_betas`, and what people call them.
_BETA_SCHEDULES = {"linear": "linear", "scaled_linear": "quad", "squaredcos_cap_v2": "cosine", "sigmoid": "sigmoid"}
LARGEST_BETA = 0.999  # where a formula gives 1; the cap of the cosine schedule (Nichol and Dhariwal 2021, Section 3.2)
# sigma_t^2 of the reverse process. fixed_small: beta~_t, fixed_large: beta_t (Section 3.2 of the paper).
# learned: the second half of the network's channels is the variance itself, as in diffusers. learned_range: it
# interpolates log sigma_t^2 from log beta~_t at -1 to log beta_t at 1 (Nichol and Dhariwal 2021, Eq. 15).
# learned_log, which diffusers does not have: it is log(sigma_t^2 / beta_t).
_VARIANCE_TYPES = ("fixed_small", "fixed_large", "learned", "learned_range", "learned_log")
# epsilon: the noise (the paper). sample: the clean image x_0.
# v_prediction: sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 (Salimans and Ho 2022).
# mean, which diffusers does not have: mu~_t (Eq. 7), the mean of x_{t-1}.
_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction", "mean")


@dataclass(frozen=True)
class ScheduleConfig(Strict):
    """The noise schedule, and what the network predicts: the fields of diffusers' DDPMScheduler."""

    num_train_timesteps: _Steps = 1000
    beta_start: _Fraction = 1e-4
    beta_end: _Fraction = 0.02
    beta_schedule: Annotated[str, one_of(*_BETA_SCHEDULES)] = "linear"
    trained_betas: tuple[_Fraction, ...] | None = None  # replaces the four above
    variance_type: Annotated[str, one_of(*_VARIANCE_TYPES)] = "fixed_small"
    prediction_type: Annotated[str, one_of(*_PREDICTION_TYPES)] = "epsilon"
    clip_sample: bool = True  # predictions of x_0, to [-clip_sample_range, clip_sample_range]
    clip_sample_range: Positive = 1.0
    thresholding: bool = False  # instead of clipping: dynamic thresholding (Saharia et al. 2022, Section 2.3)
    dynamic_thresholding_ratio: _Fraction = 0.995  # the quantile of |x_0| that is its range
    sample_max_value: Positive = 1.0  # upper limit of this range

    _FIXED = {  # noqa: RUF012
        "rescale_betas_zero_snr": (False,),
        "timestep_values": (None,),
    }
    # Keys for how diffusers samples, which the caller decides here, and keys without a meaning today.
    _IGNORED = frozenset(
        ("set_alpha_to_one", "skip_prk_steps", "steps_offset", "tensor_format", "timestep_spacing", "predict_epsilon")
    )
    # Schedulers of other samplers. Only the noise schedule is taken from their settings.
    _SAMPLERS = frozenset(
        f"{name}Scheduler"
        for name in (
            *("DDIM", "DDIMParallel", "DDPMParallel", "PNDM", "DPMSolverMultistep", "DPMSolverSinglestep"),
            *("UniPCMultistep", "DEISMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete"),
            *("LMSDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        )
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_betas is not None and len(self.trained_betas) != self.num_train_timesteps:
            raise ModelError(f"{len(self.trained_betas)} trained_betas for {self.num_train_timesteps} steps")

    @property
    def learns_variance(self) -> bool:
        """Whether the second half of the network's channels is for the variance."""
        return self.variance_type.startswith("learned")

    @property
    def in_diffusers(self) -> bool:
        """Whether diffusers can sample such a model. It stops with an error at the others."""
        return self.prediction_type != "mean" and self.variance_type != "learned_log"

    @property
    def needs_float32(self) -> bool:
        """Whether bf16 and TF32 spoil the prediction.

        mu~_t is x_t but for a small difference, which is all that matters, and which their rounding of x_t hides.
        """
        return self.prediction_type == "mean"

    @property
    def schedule_name(self) -> str:
        """What people call the betas: linear, quad, cosine, sigmoid, const, jsd, or learned for a list of others."""
        if self.trained_betas is not None:
            return "jsd" if self.trained_betas == jsd_betas(self.num_train_timesteps) else "learned"
        constant = self.beta_schedule == "linear" and self.beta_start == self.beta_end
        return "const" if constant else _BETA_SCHEDULES[self.beta_schedule]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read a scheduler_config.json. Raises ModelError for a key or a value that is not supported."""
        name = values.get("_class_name", "DDPMScheduler")
        values = {_OLD_SCHEDULE_KEYS.get(key, key): value for key, value in values.items()}
        if values.get("predict_epsilon") is False:  # until 2022 this meant that the model predicts x_0
            values = {"prediction_type": "sample"} | values
        if isinstance(name, str) and name in cls._SAMPLERS:
            known = {f.name for f in dataclasses.fields(cls)} | cls._FIXED.keys()
            values = {key: value for key, value in values.items() if key in known}
        elif name != "DDPMScheduler":
            raise ModelError(
                f"its scheduler is a {shown(name)}, so it is not a denoising diffusion probabilistic model",
                "ddpm runs models with the discrete noise schedule of a DDPMScheduler.",
            )
        rest = _drop_fixed(values, cls._FIXED)
        rest = {key: value for key, value in rest.items() if key not in cls._IGNORED}
        if rest.get("variance_type", "") is None:  # from solvers, which have no variance
            del rest["variance_type"]
        elif rest.get("variance_type") in ("fixed_small_log", "fixed_large_log"):
            rest["variance_type"] = rest["variance_type"].removesuffix("_log")  # the same, from its logarithm
        return super().from_dict(rest)

    def to_dict(self) -> dict[str, Any]:
        header = {"_class_name": "DDPMScheduler", "_diffusers_version": DIFFUSERS_VERSION}
        # The sampler `ddpm` takes the same steps as diffusers with this.
        spacing = {"rescale_betas_zero_snr": False, "timestep_spacing": "trailing", "steps_offset": 0}
        return header | super().to_dict() | spacing


def jsd_betas(T: int) -> tuple[float, ...]:
    """1/T, 1/(T-1), …, 1: each step removes the same part of the signal (Sohl-Dickstein et al. 2015, Section 2.4.1).

    So alphas_cumprod falls linearly to 0. The last beta is capped, since a beta of 1 would leave no signal at all.
    """
    return tuple(min(1 / (T - t), LARGEST_BETA) for t in range(T))


def require_match(unet: UNetConfig, schedule: ScheduleConfig) -> None:
    """Raises ModelError if a schedule does not fit a network."""
    if schedule.learns_variance != (unet.out_channels == 2 * unet.in_channels):
        raise ModelError(
            f"variance_type={schedule.variance_type!r} does not fit a U-Net from {unet.in_channels} to "
            f"{unet.out_channels} channels",
            "Only a learned variance needs twice the channels.",
        )
    if unet.num_train_timesteps and unet.num_train_timesteps < schedule.num_train_timesteps:
        raise ModelError(
            f"the network has {unet.num_train_timesteps} steps, but the schedule has {schedule.num_train_timesteps}"
        )
