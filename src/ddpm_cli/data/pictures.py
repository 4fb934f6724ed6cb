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

__all__ = ["ANIMATION_SUFFIXES", "animate", "captioned", "grid", "npz_bytes", "picture_bytes", "strip"]

ANIMATION_SUFFIXES = (".gif", ".webp")

_PAD = 2  # pixels between the tiles of a grid or strip
_LABEL = 12  # pixels, the smallest size of the labels' font
_TILE = 64  # pixels; in labelled strips, smaller images are enlarged to about this, so that labels fit
_CAPTIONED = 96  # pixels; the same where each image has captions


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


def captioned(
    rows: Sequence[Tensor], captions: Sequence[Sequence[Sequence[str]]], labels: Sequence[str] = ()
) -> Image.Image:
    """Rows of (N, C, H, W) uint8, the first image of each set apart from the others that are compared with it.

    captions: for each image, the lines below it; one that is too long loses its beginning. labels: above the columns.
    """
    scale = max(1, math.ceil(_CAPTIONED / rows[0].shape[-1]))
    tiles = [[_enlarge(to_pil(image), scale) for image in row] for row in rows]
    return _sheet(tiles, labels, captions=captions, apart=tiles[0][0].width // 6)


def _enlarge(image: Image.Image, scale: int) -> Image.Image:
    """Enlarge by nearest neighbour, so that every pixel of the original stays visible."""
    return image if scale == 1 else image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def _sheet(
    rows: list[list[Image.Image]],
    labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    captions: Sequence[Sequence[Sequence[str]]] = (),
    apart: int = 0,
) -> Image.Image:
    """Tiles of one size on white, with labels above the columns and left of the rows, and captions, if there are any.

    captions: lines below each tile. apart: more pixels between the first column and the second.
    """
    first = rows[0][0]
    text = max(_LABEL, first.height // 16)  # readable beside large tiles too
    head = max((label.count("\n") + 1 for label in labels), default=0) * (text + 2 * _PAD)
    font = ImageFont.load_default(text)
    margin = max(2 * text, *(round(font.getlength(label)) + 2 * _PAD for label in row_labels)) if row_labels else 0
    line = text + _PAD
    lines_below = max((len(lines) for row in captions for lines in row), default=0)
    below = lines_below * line + 2 * _PAD if captions else 0
    lefts = [margin + _PAD + x * (first.width + _PAD) + (apart if x else 0) for x in range(len(rows[0]))]
    tops = [head + _PAD + y * (first.height + _PAD + below) for y in range(len(rows))]
    sheet = Image.new(first.mode, (lefts[-1] + first.width + _PAD, tops[-1] + first.height + _PAD + below), "white")
    for top, row in zip(tops, rows, strict=True):
        for left, tile in zip(lefts, row, strict=True):
            sheet.paste(tile, (left, top))
    draw = ImageDraw.Draw(sheet)
    for left, label in zip(lefts, labels, strict=False):
        place = (left + first.width // 2, head // 2 + 1)
        draw.text(place, label, fill="black", font=font, anchor="mm", align="center")
    for top, label in zip(tops, row_labels, strict=False):
        draw.text((margin // 2 + 1, top + first.height // 2), label, fill="black", font=font, anchor="mm")
    for top, captions_of_row in zip(tops, captions, strict=False):
        for left, lines in zip(lefts, captions_of_row, strict=True):
            for i, words in enumerate(lines):
                place = (left + first.width // 2, top + first.height + _PAD + i * line + line // 2)
                draw.text(place, _shorten(words, font, first.width), fill="black", font=font, anchor="mm")
    return sheet


def _shorten(text: str, font: Any, width: int) -> str:
    """The end of a text that is no wider than this, with … for what is left out: file names differ in their ends."""
    rest = text
    while rest and font.getlength(rest if rest == text else f"…{rest}") > width:
        rest = rest[1:]
    return rest if rest == text else f"…{rest}"


def picture_bytes(image: Image.Image, suffix: str = ".png") -> bytes:
    """Encode a picture in the format of a file name's suffix. Raises UsageError if there is no such format."""
    kind = Image.registered_extensions().get(suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise UsageError(f"pictures cannot be written as {suffix or 'a file without a suffix'}", "Use a name in .png.")
    buffer = io.BytesIO()
    lossless: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    image.save(buffer, kind, **lossless.get(kind, {}))
    return buffer.getvalue()


def animate(frames: Sequence[Image.Image], suffix: str, back: bool = False) -> bytes:
    """Encode pictures of one size as a looping GIF or WebP: 80 ms for each, 2 s for the last one.

    back: then they run back to the first one, which is shown for 2 s too.
    """
    buffer = io.BytesIO()
    durations = [80] * (len(frames) - 1) + [2000]
    if back:
        frames, durations = [*frames, *frames[-2::-1]], [*durations, *durations[1:]]
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
