"""What `ddpm denoise-trace` writes: strips, animations, and folders of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddpm_cli.data import images, pictures
from ddpm_cli.files import write_file
from ddpm_cli.models.sample_folder import image_name

__all__ = [
    "FRAMES",
    "Frame",
    "Shared",
    "frame_numbers",
    "shared_picture",
    "trace_picture",
    "write_shared",
    "write_trace",
]

FRAMES = 10  # in a strip, unless the user asks for more


class Frame(NamedTuple):
    """A moment of n traces. t: the paper's. x_t, x_0: (n, C, H, W) uint8."""

    t: int
    x_t: Tensor
    x_0: Tensor

    def row(self, name: str) -> Tensor:
        return self.x_t if name == "x_t" else self.x_0


class Shared(NamedTuple):
    """A state and samples from it. t: the paper's. x_t: (1, C, H, W) uint8. samples: (n, C, H, W) uint8."""

    t: int
    x_t: Tensor
    samples: Tensor


def frame_numbers(evaluations: int, frames: int) -> list[int]:
    """The numbers of the steps to show, at most `frames`, evenly spread from the first one to the last one."""
    count = min(frames, evaluations + 1)
    return sorted({round(i * evaluations / (count - 1)) for i in range(count)})


def trace_picture(frames: Sequence[Frame], rows: Sequence[str], suffix: str) -> bytes:
    """Time from left to right, and for each trace these rows (Fig. 6); or an animation, by the suffix.

    rows: x_t, x_0 or both. In an animation the traces are side by side.
    """
    labels = [f"t={frame.t}" for frame in frames]
    n = len(frames[0].x_t)
    if suffix not in pictures.ANIMATION_SUFFIXES:
        tiles = [torch.stack([frame.row(row)[i] for frame in frames]) for i in range(n) for row in rows]
        sheet = pictures.strip(tiles, labels, [*rows] * n, together=len(rows))
        return pictures.picture_bytes(sheet, suffix)
    if n == 1:
        sheets = [
            pictures.strip([torch.cat([frame.row(row) for row in rows])], [label, *rows[1:]])
            for frame, label in zip(frames, labels, strict=True)
        ]
    else:
        sheets = [
            pictures.strip([frame.row(row) for row in rows], [label], rows)
            for frame, label in zip(frames, labels, strict=True)
        ]
    return pictures.animate(sheets, suffix)


def write_trace(folder: Path, frames: Sequence[Frame], rows: Sequence[str]) -> None:
    """One PNG per frame and row; of several traces, each in its own folder, with the number of the image."""
    n = len(frames[0].x_t)
    for i in range(n):
        where = folder if n == 1 else folder / Path(image_name(i)).stem
        for number, frame in enumerate(frames):
            for row in rows:
                _write(where / f"{number:03d}-t{frame.t:04d}-{row.replace('_', '')}.png", frame.row(row)[i])


def shared_picture(parts: Sequence[Shared], suffix: str) -> bytes:
    """A row for each t: the shared state, and apart from it the samples (Fig. 7)."""
    tiles = [torch.cat([part.x_t, part.samples]) for part in parts]
    numbers = map(str, range(len(parts[0].samples)))
    sheet = pictures.strip(tiles, ["x_t", *numbers], [f"t={part.t}" for part in parts], apart=True)
    return pictures.picture_bytes(sheet, suffix)


def write_shared(folder: Path, parts: Sequence[Shared]) -> None:
    """A folder for each t, with xt.png and the samples."""
    for part in parts:
        where = folder / f"t{part.t:04d}"
        _write(where / "xt.png", part.x_t[0])
        for i, image in enumerate(part.samples):
            _write(where / image_name(i), image)


def _write(path: Path, image: Tensor) -> None:
    write_file(path, pictures.picture_bytes(images.to_pil(image)), sync=False)
