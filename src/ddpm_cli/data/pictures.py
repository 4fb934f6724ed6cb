"""Pictures made of several images: grids, labelled strips, animations; and their file formats."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ddpm_cli.data.images import to_pil
from ddpm_cli.errors import UsageError

__all__ = ["ANIMATION_SUFFIXES", "animate", "grid", "npz_bytes", "picture_bytes", "strip"]

ANIMATION_SUFFIXES = (".gif", ".webp")

_PAD = 2  # pixels between the tiles of a grid or strip
_LABEL = 12  # pixels, the smallest size of the labels' font
_TILE = 64  # pixels; in labelled strips, smaller images are enlarged to about this, so that labels fit


def grid(images: Tensor) -> Image.Image:
    """(N, C, H, W) uint8 -> one picture, row by row, as square as possible."""
    tiles = [to_pil(image) for image in images]
    columns = math.ceil(math.sqrt(len(tiles)))
    return _sheet([tiles[i : i + columns] for i in range(0, len(tiles), columns)])


def strip(rows: Sequence[Tensor], labels: Sequence[str], row_labels: Sequence[str] = ()) -> Image.Image:
    """A labelled table of pictures: rows of (N, C, H, W) uint8, with labels above the columns and left.

    Labels above the columns may have several lines.
    """
    scale = max(1, math.ceil(_TILE / rows[0].shape[-1]))
    return _sheet([[_enlarge(to_pil(image), scale) for image in row] for row in rows], labels, row_labels)


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    """Enlarge by nearest neighbour, so that every pixel of the original stays visible."""
    return image if scale == 1 else image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _sheet(rows: list[list[Image.Image]], labels: Sequence[str] = (), row_labels: Sequence[str] = ()) -> Image.Image:
    """Tiles of one size on white, with labels above the columns and left of the rows if there are any."""
    first = rows[0][0]
    text = max(_LABEL, first.height // 16)  # readable beside large tiles too
    lines = max((label.count("\n") + 1 for label in labels), default=0)
    head = lines * (text + 2 * _PAD)
    margin = 2 * text if row_labels else 0
    width = margin + len(rows[0]) * (first.width + _PAD) + _PAD
    sheet = Image.new(first.mode, (width, len(rows) * (first.height + _PAD) + _PAD + head), "white")
    for y, row in enumerate(rows):
        for x, tile in enumerate(row):
            sheet.paste(tile, (margin + _PAD + x * (first.width + _PAD), head + _PAD + y * (first.height + _PAD)))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(text)
    for x, label in enumerate(labels):
        centre = margin + _PAD + x * (first.width + _PAD) + first.width // 2
        draw.text((centre, head // 2 + 1), label, fill="black", font=font, anchor="mm", align="center")
    for y, label in enumerate(row_labels):
        middle = head + _PAD + y * (first.height + _PAD) + first.height // 2
        draw.text((margin // 2 + 1, middle), label, fill="black", font=font, anchor="mm")
    return sheet


def picture_bytes(image: Image.Image, suffix: str = ".png") -> bytes:
    """Encode a picture in the format of a file name's suffix. Raises UsageError if there is no such format."""
    kind = Image.registered_extensions().get(suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise UsageError(f"pictures cannot be written as {suffix or 'a file without a suffix'}", "Use a name in .png.")
    buffer = io.BytesIO()
    lossless: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    image.save(buffer, kind, **lossless.get(kind, {}))
    return buffer.getvalue()


def animate(frames: Sequence[Image.Image], suffix: str) -> bytes:
    """Encode pictures of one size as a looping GIF or WebP: 80 ms for each, 2 s for the last one."""
    buffer = io.BytesIO()
    durations = [80] * (len(frames) - 1) + [2000]
    kind = "GIF" if suffix.lower() == ".gif" else "WEBP"
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:], duration=durations, loop=0, lossless=True)
    return buffer.getvalue()


def npz_bytes(images: Iterable[Tensor], count: int) -> bytes:
    """Batches of (B, C, H, W) uint8, `count` images in all -> NumPy's .npz with one (N, H, W, C) array `arr_0`.

    Evaluation scripts, such as improved-diffusion's, read this layout. The batches are written one by one, so that
    they need not fit into memory together.
    """
    buffer = io.BytesIO()
    archive = zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED)
    with archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        for i, batch in enumerate(images):
            pixels = batch.permute(0, 2, 3, 1).numpy()
            if i == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pixels.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            file.write(pixels.tobytes())
    return buffer.getvalue()
