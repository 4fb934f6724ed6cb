"""What `ddpm denoise-trace` writes: strips, animations, and folders of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ddpm_cli.data import images, pictures
from ddpm_cli.files import write_file
from ddpm_cli.models.sample_folder import image_name

__all__ = ["FRAMES", "Frame", "Shared", "animation", "shared_sheet", "trace_sheet", "write_shared", "write_trace"]

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


def trace_sheet(frames: Sequence[Frame], rows: Sequence[str], scale: int | None = None) -> Image.Image:
    """Time from left to right, and for each trace these rows (Fig. 6). rows: x_t, x_0 or both."""
    n = len(frames[0].x_t)
    tiles = [torch.stack([frame.row(row)[i] for frame in frames]) for i in range(n) for row in rows]
    return pictures.strip(tiles, [f"t={frame.t}" for frame in frames], [*rows] * n, together=len(rows), scale=scale)


def animation(frames: Sequence[Frame], rows: Sequence[str], suffix: str, scale: int | None) -> bytes:
    """The same as an animation, with the traces side by side."""
    if len(frames[0].x_t) == 1:
        sheets = [
            pictures.strip([torch.cat([frame.row(row) for row in rows])], [f"t={frame.t}", *rows[1:]], scale=scale)
            for frame in frames
        ]
    else:
        sheets = [
            pictures.strip([frame.row(row) for row in rows], [f"t={frame.t}"], rows, scale=scale) for frame in frames
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


def shared_sheet(parts: Sequence[Shared], scale: int | None) -> Image.Image:
    """A row for each t: the shared state, and apart from it the samples (Fig. 7)."""
    tiles = [torch.cat([part.x_t, part.samples]) for part in parts]
    numbers = map(str, range(len(parts[0].samples)))
    return pictures.strip(tiles, ["x_t", *numbers], [f"t={part.t}" for part in parts], apart=True, scale=scale)


def write_shared(folder: Path, parts: Sequence[Shared]) -> None:
    """A folder for each t, with xt.png and the samples."""
    for part in parts:
        where = folder / f"t{part.t:04d}"
        _write(where / "xt.png", part.x_t[0])
        for i, image in enumerate(part.samples):
            _write(where / image_name(i), image)


def _write(path: Path, image: Tensor) -> None:
    write_file(path, pictures.picture_bytes(images.to_pil(image)), sync=False)
