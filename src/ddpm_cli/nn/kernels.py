"""What PyTorch's own layers compute slowly on CPUs: attention, dropout, and a convolution after doubling."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Dropout", "attention", "double_and_convolve"]

_SMALL = 1024  # positions, whose attention weights take 2 MB in bf16 for each image and head
_CHANCES = 2**16


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, Eq. 1). q, k, v: (B, heads, N, d) -> the same."""
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[2] <= _SMALL:
        # PyTorch's fused attention takes 1.6 times as long here, and with gradients 2 to 3 times as long.
        return (q @ (k / math.sqrt(k.shape[3])).transpose(2, 3)).softmax(3) @ v
    return F.scaled_dot_product_attention(q, k, v)


def double_and_convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Double H and W by nearest neighbours, then convolve with padding 1. (B, C, H, W) -> (B, C_out, 2H, 2W).

    weight: (C_out, C, 3, 3). Each new pixel sees only 2x2 old ones, so on CPUs this is one transposed convolution
    with 16 products for each of them instead of 36. Only rounding differs.
    """
    if x.device.type != "cpu":
        return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)
    turned = weight.flip(2, 3).transpose(0, 1)
    wide = F.pad(turned, (0, 1)) + F.pad(turned, (1, 0))
    spread = F.pad(wide, (0, 0, 0, 1)) + F.pad(wide, (0, 0, 1, 0))  # (C, C_out, 4, 4)
    return F.conv_transpose2d(x, spread, bias, stride=2, padding=1)


class Dropout(nn.Dropout):
    """Zeros with probability p in training, and x / (1 - p) elsewhere (Srivastava et al. 2014).

    On CPUs one random number of 64 bits decides for four elements, so there p is a multiple of 2^-16. PyTorch's
    dropout draws a number for each, which takes three times as long: 6 % of a training step of the CIFAR-10 model.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: of any shape."""
        dropped = round(self.p * _CHANCES)
        plain = not self.training or dropped in (0, _CHANCES) or torch.compiler.is_compiling()  # which fuses dropout
        if x.device.type != "cpu" or plain:
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - _CHANCES // 2
        return x * kept.to(x.dtype).mul_(_CHANCES / (_CHANCES - dropped))
