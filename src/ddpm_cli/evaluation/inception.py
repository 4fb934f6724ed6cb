"""The network of FID: InceptionV3 with the weights of TensorFlow (Szegedy et al. 2016; Heusel et al. 2017).

The names of the parameters are those of the file `pt_inception-2015-12-05-6726825d.pth`, which pytorch-fid published
and torch-fidelity uses too. TensorFlow's graph differs in three places from PyTorch's usual InceptionV3:

- images are resized without half-pixel centres;
- averages near the border do not count the padding;
- the last block takes the maximum where the others take the average.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["SIDE", "Inception", "resize"]

SIDE = 299  # pixels of the images that the network sees
_CLASSES = 1008  # of ImageNet, and a few that TensorFlow did not use


class Inception(nn.Module):
    """Images to features and logits. Put it in evaluation mode: the batch norms use the averages of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, _Layer(32, 3, stride=2))
        self.Conv2d_2a_3x3 = _Convolution(32, _Layer(32, 3, padded=False))
        self.Conv2d_2b_3x3 = _Convolution(32, _Layer(64, 3))
        self.Conv2d_3b_1x1 = _Convolution(64, _Layer(80, 1))
        self.Conv2d_4a_3x3 = _Convolution(80, _Layer(192, 3, padded=False))
        self.Mixed_5b = _Mixed(192, _block_a(32))
        self.Mixed_5c = _Mixed(256, _block_a(64))
        self.Mixed_5d = _Mixed(288, _block_a(64))
        self.Mixed_6a = _Mixed(288, _block_b())
        self.Mixed_6b = _Mixed(768, _block_c(128))
        self.Mixed_6c = _Mixed(768, _block_c(160))
        self.Mixed_6d = _Mixed(768, _block_c(160))
        self.Mixed_6e = _Mixed(768, _block_c(192))
        self.Mixed_7a = _Mixed(768, _block_d())
        self.Mixed_7b = _Mixed(1280, _block_e())
        self.Mixed_7c = _Mixed(2048, _block_e(), average=False)
        self.fc = nn.Linear(2048, _CLASSES)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) uint8 -> features (B, 2048) of the last pooling, and logits (B, 1008) without their bias.

        FID, KID, precision and recall use the features. The Inception score uses the logits, and its authors left out
        the bias.
        """
        x = (resize(images.to(self.fc.weight.dtype), SIDE) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, 2)
        for block in self.children():
            if isinstance(block, _Mixed):
                x = block(x)
        features = x.mean((2, 3))
        return features, features @ self.fc.weight.T


def resize(images: Tensor, side: int) -> Tensor:
    """Resize as TensorFlow 1 does, bilinear without half-pixel centres: pixel i is at i * size / side of the original.

    images: (B, C, H, W) float. Returns (B, C, side, side). Larger images are not smoothed first. Positions are rounded
    to float32, as there.
    """
    top, bottom, down = _neighbours(images.shape[2], side, images)
    left, right, across = _neighbours(images.shape[3], side, images)
    images = images[..., left] + (images[..., right] - images[..., left]) * across
    return images[:, :, top] + (images[:, :, bottom] - images[:, :, top]) * down[:, None]


def _neighbours(size: int, side: int, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The pixels between which each new one is, (side,) int64 each, and its distance from the first, in [0, 1)."""
    place = torch.arange(side, device=like.device, dtype=torch.float32) * torch.tensor(size / side, dtype=torch.float32)
    first = place.long().clamp(max=size - 1)
    return first, (first + 1).clamp(max=size - 1), (place - first).to(like.dtype)


class _Layer(NamedTuple):
    """A convolution. kernel: the side of a square, or (height, width). padded: whether the size stays the same."""

    width: int
    kernel: int | tuple[int, int]
    stride: int = 1
    padded: bool = True


# Branches by their names. A branch is a sequence of steps; a step of two layers computes both, and joins the results.
_Branches = dict[str, Sequence[Sequence[_Layer]]]


class _Convolution(nn.Module):
    def __init__(self, channels: int, layer: _Layer) -> None:
        super().__init__()
        height, width = (layer.kernel, layer.kernel) if isinstance(layer.kernel, int) else layer.kernel
        padding = (height // 2, width // 2) if layer.padded and layer.stride == 1 else 0
        self.conv = nn.Conv2d(channels, layer.width, (height, width), layer.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(layer.width, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class _Mixed(nn.Module):
    """Branches side by side, whose results are joined (Szegedy et al. 2016, Fig. 5 to 10), and a pooling.

    The pooling halves the image if the branches do. Otherwise a convolution follows it, which is in the branches under
    the name `branch_pool`. average: whether it takes the average there.
    """

    def __init__(self, channels: int, branches: _Branches, average: bool = True) -> None:
        super().__init__()
        self.average = average
        self.names: list[list[list[str]]] = []  # of the layers, by branch and step
        for branch, steps in branches.items():
            width = channels
            self.names.append([])
            for i, step in enumerate(steps, 1):
                prefix = branch if len(steps) == 1 else f"{branch}_{i}"
                names = [prefix] if len(step) == 1 else [f"{prefix}{letter}" for letter in "ab"]
                for name, layer in zip(names, step, strict=True):
                    self.add_module(name, _Convolution(width, layer))
                self.names[-1].append(names)
                width = sum(layer.width for layer in step)

    def forward(self, x: Tensor) -> Tensor:
        *branches, last = self.names
        pooled = hasattr(self, "branch_pool")
        results = [self._follow(names, x) for names in (branches if pooled else self.names)]
        if not pooled:
            return torch.cat([*results, F.max_pool2d(x, 3, 2)], 1)
        around = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False) if self.average else F.max_pool2d(x, 3, 1, 1)
        return torch.cat([*results, self._follow(last, around)], 1)

    def _follow(self, branch: list[list[str]], x: Tensor) -> Tensor:
        for names in branch:
            x = torch.cat([getattr(self, name)(x) for name in names], 1)
        return x


def _block_a(pooled: int) -> _Branches:
    return {
        "branch1x1": [[_Layer(64, 1)]],
        "branch5x5": [[_Layer(48, 1)], [_Layer(64, 5)]],
        "branch3x3dbl": [[_Layer(64, 1)], [_Layer(96, 3)], [_Layer(96, 3)]],
        "branch_pool": [[_Layer(pooled, 1)]],
    }


def _block_b() -> _Branches:
    return {
        "branch3x3": [[_Layer(384, 3, stride=2)]],
        "branch3x3dbl": [[_Layer(64, 1)], [_Layer(96, 3)], [_Layer(96, 3, stride=2)]],
    }


def _block_c(width: int) -> _Branches:
    """A 7x7 convolution as a row and a column."""
    row, column = _Layer(width, (1, 7)), _Layer(width, (7, 1))
    return {
        "branch1x1": [[_Layer(192, 1)]],
        "branch7x7": [[_Layer(width, 1)], [row], [_Layer(192, (7, 1))]],
        "branch7x7dbl": [[_Layer(width, 1)], [column], [row], [column], [_Layer(192, (1, 7))]],
        "branch_pool": [[_Layer(192, 1)]],
    }


def _block_d() -> _Branches:
    return {
        "branch3x3": [[_Layer(192, 1)], [_Layer(320, 3, stride=2)]],
        "branch7x7x3": [
            [_Layer(192, 1)],
            [_Layer(192, (1, 7))],
            [_Layer(192, (7, 1))],
            [_Layer(192, 3, stride=2)],
        ],
    }


def _block_e() -> _Branches:
    """A 3x3 convolution as a row beside a column."""
    both = [_Layer(384, (1, 3)), _Layer(384, (3, 1))]
    return {
        "branch1x1": [[_Layer(320, 1)]],
        "branch3x3": [[_Layer(384, 1)], both],
        "branch3x3dbl": [[_Layer(448, 1)], [_Layer(384, 3)], both],
        "branch_pool": [[_Layer(192, 1)]],
    }
