"""The networks of two other programs, rewritten from their definitions, to test `ddpm convert` against.

Each is a function of its weights under that program's names. `Weights` creates a random tensor when a missing one is
read, so running the function once also makes a state dict of the right shapes.
"""

import math

import torch
import torch.nn.functional as F


class Weights(dict):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def of(self, name: str, *shape: int) -> torch.Tensor:
        if name not in self:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 4
            self[name] = torch.randn(shape, generator=self.generator) / fan_in**0.5
        return self[name]

    def norm(self, name: str, x, eps: float):
        c = x.shape[1]
        return F.group_norm(x, 32, self.of(f"{name}.weight", c), self.of(f"{name}.bias", c), eps)

    def conv(self, name: str, x, c_out: int, size: int = 3, **how):
        weight = self.of(f"{name}.weight", c_out, x.shape[1], *[size] * (x.ndim - 2))
        op = F.conv2d if x.ndim == 4 else F.conv1d
        return op(x, weight, self.of(f"{name}.bias", c_out), **how)

    def dense(self, name: str, x, c_out: int):
        return F.linear(x, self.of(f"{name}.weight", c_out, x.shape[1]), self.of(f"{name}.bias", c_out))


def double(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


# --- pesser/pytorch_diffusion: the authors' U-Net ---


def pesser(w: Weights, x, t, ch: int, mults: tuple[int, ...], blocks: int, attention: set[int]):
    """attention: the resolutions that have it, in pixels."""
    half = ch // 2
    angles = t[:, None].float() * torch.exp(torch.arange(half) * -(math.log(10000) / (half - 1)))
    temb = w.dense("temb.dense.0", torch.cat([angles.sin(), angles.cos()], 1), 4 * ch)
    temb = w.dense("temb.dense.1", F.silu(temb), 4 * ch)

    def resnet(name, x, c_out):
        h = w.conv(f"{name}.conv1", F.silu(w.norm(f"{name}.norm1", x, 1e-6)), c_out, padding=1)
        h = h + w.dense(f"{name}.temb_proj", F.silu(temb), c_out)[:, :, None, None]
        h = w.conv(f"{name}.conv2", F.silu(w.norm(f"{name}.norm2", h, 1e-6)), c_out, padding=1)
        return h + (x if x.shape[1] == c_out else w.conv(f"{name}.nin_shortcut", x, c_out, 1))

    def attend(name, x):
        c, h = x.shape[1], w.norm(f"{name}.norm", x, 1e-6)
        q, k, v = (w.conv(f"{name}.{part}", h, c, 1).flatten(2) for part in "qkv")
        weights = torch.softmax(q.transpose(1, 2) @ k / c**0.5, dim=2)
        return x + w.conv(f"{name}.proj_out", (v @ weights.transpose(1, 2)).view_as(x), c, 1)

    skips = [w.conv("conv_in", x, ch, padding=1)]
    last = len(mults) - 1
    for level, mult in enumerate(mults):
        for i in range(blocks):
            h = resnet(f"down.{level}.block.{i}", skips[-1], ch * mult)
            skips.append(attend(f"down.{level}.attn.{i}", h) if h.shape[-1] in attention else h)
        if level < last:
            padded = F.pad(skips[-1], (0, 1, 0, 1))
            skips.append(w.conv(f"down.{level}.downsample.conv", padded, ch * mult, stride=2))
    h = resnet("mid.block_1", skips[-1], ch * mults[-1])
    h = resnet("mid.block_2", attend("mid.attn_1", h), ch * mults[-1])
    for level in range(last, -1, -1):
        for i in range(blocks + 1):
            h = resnet(f"up.{level}.block.{i}", torch.cat([h, skips.pop()], 1), ch * mults[level])
            h = attend(f"up.{level}.attn.{i}", h) if h.shape[-1] in attention else h
        if level:
            h = w.conv(f"up.{level}.upsample.conv", double(h), ch * mults[level], padding=1)
    return w.conv("conv_out", F.silu(w.norm("norm_out", h, 1e-6)), 3, padding=1)


# --- openai/improved-diffusion ---


def openai(w: Weights, x, t, ch, mults, blocks, attention: set[int], heads=4, scale_shift=True, c_last=3):
    """t: as the network sees it, which with rescaled timesteps is t * 1000 / T."""
    half = ch // 2
    angles = t[:, None].float() * torch.exp(torch.arange(half) * -(math.log(10000) / half))
    emb = w.dense("time_embed.0", torch.cat([angles.cos(), angles.sin()], 1), 4 * ch)
    emb = w.dense("time_embed.2", F.silu(emb), 4 * ch)

    def resnet(name, x, c_out):
        h = w.conv(f"{name}.in_layers.2", F.silu(w.norm(f"{name}.in_layers.0", x, 1e-5)), c_out, padding=1)
        e = w.dense(f"{name}.emb_layers.1", F.silu(emb), c_out * (1 + scale_shift))[:, :, None, None]
        if scale_shift:
            h = w.norm(f"{name}.out_layers.0", h, 1e-5) * (1 + e[:, :c_out]) + e[:, c_out:]
        else:
            h = w.norm(f"{name}.out_layers.0", h + e, 1e-5)
        h = w.conv(f"{name}.out_layers.3", F.silu(h), c_out, padding=1)
        return h + (x if x.shape[1] == c_out else w.conv(f"{name}.skip_connection", x, c_out, 1))

    def attend(name, x):
        c = x.shape[1]
        qkv = w.conv(f"{name}.qkv", w.norm(f"{name}.norm", x.flatten(2), 1e-5), 3 * c, 1)
        mixed = []
        for head in qkv.chunk(heads, dim=1):  # q, k and v of each head are stored together
            q, k, v = head.chunk(3, dim=1)
            mixed.append(v @ torch.softmax(q.transpose(1, 2) @ k / q.shape[1] ** 0.5, dim=2).transpose(1, 2))
        return x + w.conv(f"{name}.proj_out", torch.cat(mixed, 1), c, 1).view_as(x)

    h = w.conv("input_blocks.0.0", x, ch, padding=1)
    skips, k, last = [h], 1, len(mults) - 1
    for level, mult in enumerate(mults):
        for _ in range(blocks):
            h = resnet(f"input_blocks.{k}.0", h, ch * mult)
            h = attend(f"input_blocks.{k}.1", h) if h.shape[-1] in attention else h
            skips.append(h)
            k += 1
        if level < last:
            h = w.conv(f"input_blocks.{k}.0.op", h, ch * mult, stride=2, padding=1)
            skips.append(h)
            k += 1
    h = attend("middle_block.1", resnet("middle_block.0", h, ch * mults[-1]))
    h = resnet("middle_block.2", h, ch * mults[-1])
    k = 0
    for level in range(last, -1, -1):
        for i in range(blocks + 1):
            h = resnet(f"output_blocks.{k}.0", torch.cat([h, skips.pop()], 1), ch * mults[level])
            part = 1
            if h.shape[-1] in attention:
                h, part = attend(f"output_blocks.{k}.1", h), 2
            if level and i == blocks:
                h = w.conv(f"output_blocks.{k}.{part}.conv", double(h), ch * mults[level], padding=1)
            k += 1
    return w.conv("out.2", F.silu(w.norm("out.0", h, 1e-5)), c_last, padding=1)
