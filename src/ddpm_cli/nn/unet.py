"""The U-Net of the paper (Appendix B), with the parameter names of diffusers' UNet2DModel.

The two have the same state dict, so models need no conversion in either direction.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_cli.config import UNetConfig
from ddpm_cli.nn.kernels import Dropout, attention, double_and_convolve

__all__ = ["UNet", "timestep_embedding"]


def timestep_embedding(t: Tensor, dim: int, flip_sin_to_cos: bool, freq_shift: float) -> Tensor:
    """The Transformer's sinusoidal position embedding of t. t: (B,) -> (B, dim) float32: sines and cosines."""
    half = dim // 2
    freqs = torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    )
    angles = t[:, None].float() * freqs
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


def _emb_dim(config: UNetConfig) -> int:
    """Channels of the time embedding."""
    return config.time_embedding_dim or 4 * config.block_out_channels[0]


class TimestepEmbedding(nn.Module):
    """(B, ch) -> (B, emb_dim): two dense layers with a swish between them."""

    def __init__(self, channels: int, emb_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, emb_dim)
        self.linear_2 = nn.Linear(emb_dim, emb_dim)

    def forward(self, emb: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(emb)))  # type: ignore[no-any-return]


class ResnetBlock(nn.Module):
    """norm, swish, conv, + time, norm, swish, dropout, conv, + input. (B, C_in, H, W) -> (B, C_out, H, W).

    With scale_shift the time embedding scales and shifts the second norm instead (Nichol and Dhariwal 2021).
    resample: "down" halves H and W by averaging, "up" doubles them, before the first convolution and in the shortcut
    (the residual resampling of Brock et al. 2019).
    """

    def __init__(
        self, config: UNetConfig, c_in: int, c_out: int, divide_by: float = 1.0, resample: str | None = None
    ) -> None:
        super().__init__()
        self.scale_shift = config.resnet_time_scale_shift == "scale_shift"
        self.divide_by = divide_by
        self.resample = resample
        self.norm1 = nn.GroupNorm(config.norm_num_groups, c_in, config.norm_eps)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_emb_proj = nn.Linear(_emb_dim(config), c_out * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(config.norm_num_groups, c_out, config.norm_eps)
        self.dropout = Dropout(config.dropout)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """emb: (B or 1, emb_dim), the time embedding after its swish."""
        h = F.silu(self.norm1(x))
        if self.resample == "down":
            h, x = F.avg_pool2d(h, 2), F.avg_pool2d(x, 2)
        elif self.resample == "up":
            h, x = _double(h), _double(x)
        h = self.conv1(h)
        time = self.time_emb_proj(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        h = h + (x if self.conv_shortcut is None else self.conv_shortcut(x))
        return h / self.divide_by if self.divide_by != 1 else h  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Self-attention over the H*W positions, with a norm before it and a residual connection. Keeps (B, C, H, W)."""

    def __init__(self, config: UNetConfig, level: int, divide_by: float = 1.0, norm_groups: int | None = None) -> None:
        """norm_groups: 0 for no norm; None for `config.norm_num_groups`."""
        super().__init__()
        channels, self.head_dim = config.block_out_channels[level], config.head_dims[level]
        self.heads = channels // self.head_dim
        self.divide_by = divide_by
        groups = config.norm_num_groups if norm_groups is None else norm_groups
        self.group_norm = nn.GroupNorm(groups, channels, config.norm_eps) if groups else None
        inner = self.heads * self.head_dim  # fewer than `channels` if heads do not divide them
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels), nn.Dropout(0.0)])  # diffusers' names

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        h = x if self.group_norm is None else self.group_norm(x)
        h = h.flatten(2).transpose(1, 2).contiguous()  # (B, HW, C)
        # One matmul for the three projections; the parameters stay separate, with the names of diffusers.
        projections = (self.to_q, self.to_k, self.to_v)
        weight = torch.cat([layer.weight for layer in projections])
        bias = torch.cat([layer.bias for layer in projections])
        q, k, v = F.linear(h, weight, bias).view(B, H * W, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        h = attention(q, k, v)  # (B, heads, HW, head_dim)
        h = self.to_out[0](h.transpose(1, 2).flatten(2))
        h = x + h.transpose(1, 2).reshape(B, C, H, W)  # the sum has the memory format of x, which comes first
        return h / self.divide_by if self.divide_by != 1 else h  # type: ignore[no-any-return]


class Downsample(nn.Module):
    """(B, C, H, W) -> (B, C, H/2, W/2) by a strided 3x3 convolution."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """emb is not used. It is a parameter because a ResnetBlock, which uses it, can replace this layer."""
        # Padding 0 means TensorFlow's SAME: one pixel to the right and one below.
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbours, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """emb is not used, see Downsample."""
        return double_and_convolve(x, self.conv.weight, self.conv.bias)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class DownBlock(nn.Module):
    """One level of the down path. Appends every intermediate feature map to `skips`."""

    def __init__(self, config: UNetConfig, level: int) -> None:
        super().__init__()
        channels, kind = config.block_out_channels, config.down_block_types[level]
        c_in, c_out = channels[max(level - 1, 0)], channels[level]
        n = config.layers_per_block
        self.resnets = nn.ModuleList(ResnetBlock(config, c_in if i == 0 else c_out, c_out) for i in range(n))
        if kind == "AttnDownBlock2D":
            self.attentions = nn.ModuleList(Attention(config, level) for _ in range(n))
        if level < len(channels) - 1:
            down: nn.Module = Downsample(c_out, config.downsample_padding)
            if kind == "ResnetDownsampleBlock2D" or (kind == "AttnDownBlock2D" and config.downsample_type == "resnet"):
                down = ResnetBlock(config, c_out, c_out, resample="down")
            self.downsamplers = nn.ModuleList([down])

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(h, emb)
            if hasattr(self, "attentions"):
                h = self.attentions[i](h)
            skips.append(h)
        if hasattr(self, "downsamplers"):
            h = self.downsamplers[0](h, emb)
            skips.append(h)
        return h


class MidBlock(nn.Module):
    """resnet, attention, resnet at the lowest resolution."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        channels, divide_by = config.block_out_channels[-1], config.mid_block_scale_factor
        self.resnets = nn.ModuleList(ResnetBlock(config, channels, channels, divide_by) for _ in range(2))
        if config.add_attention:
            groups = config.attn_norm_num_groups
            if groups is None and config.resnet_time_scale_shift == "scale_shift":
                groups = 0  # diffusers has no norm there
            last = len(config.block_out_channels) - 1
            self.attentions = nn.ModuleList([Attention(config, last, divide_by, groups)])

    def forward(self, h: Tensor, emb: Tensor) -> Tensor:
        h = self.resnets[0](h, emb)
        if hasattr(self, "attentions"):
            h = self.attentions[0](h)
        return self.resnets[1](h, emb)  # type: ignore[no-any-return]


class UpBlock(nn.Module):
    """One level of the up path; `index` 0 is the lowest. Each resnet also takes one feature map from `skips`."""

    def __init__(self, config: UNetConfig, index: int) -> None:
        super().__init__()
        reverse, kind = config.block_out_channels[::-1], config.up_block_types[index]
        c_out, c_below, c_above = reverse[index], reverse[max(index - 1, 0)], reverse[min(index + 1, len(reverse) - 1)]
        n = config.layers_per_block + 1
        c_ins = [c_below if i == 0 else c_out for i in range(n)]
        c_skips = [c_above if i == n - 1 else c_out for i in range(n)]
        self.resnets = nn.ModuleList(
            ResnetBlock(config, c_in + c_skip, c_out) for c_in, c_skip in zip(c_ins, c_skips, strict=True)
        )
        if kind == "AttnUpBlock2D":
            self.attentions = nn.ModuleList(Attention(config, len(reverse) - 1 - index) for _ in range(n))
        if index < len(reverse) - 1:
            up: nn.Module = Upsample(c_out)
            if kind == "ResnetUpsampleBlock2D" or (kind == "AttnUpBlock2D" and config.upsample_type == "resnet"):
                up = ResnetBlock(config, c_out, c_out, resample="up")
            self.upsamplers = nn.ModuleList([up])

    def forward(self, h: Tensor, emb: Tensor, skips: list[Tensor]) -> Tensor:
        for i, resnet in enumerate(self.resnets):
            h = resnet(torch.cat([h, skips.pop()], dim=1), emb)
            if hasattr(self, "attentions"):
                h = self.attentions[i](h)
        return self.upsamplers[0](h, emb) if hasattr(self, "upsamplers") else h


class UNet(nn.Module):
    """eps_theta(x_t, t) of Eq. 11: predicts the noise in x_t, or x_0 or v, see `prediction_type` of the schedule.

    If config.out_channels = 2 in_channels, the second half of the output is for the variance.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.block_out_channels
        levels = range(len(channels))
        self.conv_in = nn.Conv2d(config.in_channels, channels[0], 3, padding=1)
        if config.time_embedding_type == "learned":
            assert config.num_train_timesteps is not None
            self.time_proj = nn.Embedding(config.num_train_timesteps, channels[0])
        self.time_embedding = TimestepEmbedding(channels[0], _emb_dim(config))
        self.down_blocks = nn.ModuleList(DownBlock(config, level) for level in levels)
        self.mid_block = MidBlock(config)
        self.up_blocks = nn.ModuleList(UpBlock(config, index) for index in levels)
        self.conv_norm_out = nn.GroupNorm(config.norm_num_groups, channels[0], config.norm_eps)
        self.conv_out = nn.Conv2d(channels[0], config.out_channels, 3, padding=1)

    def reset_parameters(self) -> None:
        """Initialise as the authors do: variance scaling, fan_avg, uniform (Xavier), biases zero.

        The last layer of each residual branch and the output layer start at almost zero (scale 1e-10), so that every
        block starts as the identity and the first prediction is eps = 0.
        """
        nearly_zero = {id(self.conv_out)}
        for module in self.modules():
            if isinstance(module, ResnetBlock):
                nearly_zero.add(id(module.conv2))
            elif isinstance(module, Attention):
                nearly_zero.add(id(module.to_out[0]))
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight, gain=1e-5 if id(module) in nearly_zero else 1.0)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Predict eps. x_t: (B, C, H, W), H and W multiples of `config.size_multiple`; t: (B,) int64 in [0, T).

        t may also be (1,), one step for the whole batch: then the time embedding is computed once, and an image's
        prediction does not depend on the size of its batch. Returns (B, out_channels, H, W) in the dtype of x_t.
        Raises ValueError if t has another shape.
        """
        config = self.config
        if t.shape not in ((1,), (len(x_t),)):
            raise ValueError(f"t must have shape (1,) or ({len(x_t)},), not {tuple(t.shape)}")
        dtype = self.conv_in.weight.dtype
        if config.time_embedding_type == "learned":
            emb = self.time_proj(t)
        else:
            emb = timestep_embedding(t, config.block_out_channels[0], config.flip_sin_to_cos, config.freq_shift)
        emb = F.silu(self.time_embedding(emb.to(dtype)))  # every block starts with this swish, so do it once

        h = self.conv_in(x_t.to(dtype))
        skips = [h]
        for down in self.down_blocks:
            h = down(h, emb, skips)
        h = self.mid_block(h, emb)
        for up in self.up_blocks:
            h = up(h, emb, skips)
        return self.conv_out(F.silu(self.conv_norm_out(h))).to(x_t.dtype)  # type: ignore[no-any-return]
