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

__all__ = [
    "ANIMATION_SUFFIXES",
    "animate",
    "captioned",
    "enlarged",
    "evenly",
    "grid",
    "npz_bytes",
    "picture_bytes",
    "scale_for",
    "strip",
]

ANIMATION_SUFFIXES = (".gif", ".webp")

_SEEN = 96  # pixels; the longer side of a tile that is large enough to look at
_MOST = 2048 * 2048  # pixels that the tiles of a sheet may have because of the default scale
_PAD = 2  # pixels of an image, between the tiles of a sheet: enlarged like them
_LABEL = 12  # pixels of the sheet, the smallest size of the labels' font
_SPACE = 2  # pixels of the sheet, around text
_CAPTIONED = 96  # pixels of the sheet, the narrowest column with captions


def evenly(count: int, most: int) -> list[int]:
    """Indices of up to `most` of `count` things, at equal distances, with the first and the last. most: 2 or more."""
    taken = min(count, most)
    return [round(i * (count - 1) / (taken - 1)) for i in range(taken)] if taken > 1 else [0]


def scale_for(width: int, height: int, count: int) -> int:
    """The default scale: how many pixels wide and high each pixel of the images of a sheet is drawn.

    width, height, count: of the images. It is the smallest whole number that makes an image large enough to look at,
    or a smaller one for so many images that the sheet would become huge.
    """
    scale = max(1, math.ceil(_SEEN / max(width, height)))
    while scale > 1 and count * width * height * scale**2 > _MOST:
        scale -= 1
    return scale


def enlarged(image: Image.Image, scale: int | None = None) -> Image.Image:
    """Enlarge by nearest neighbour, so that every pixel stays visible. scale: None is the default for one image."""
    scale = scale or scale_for(image.width, image.height, 1)
    return image if scale == 1 else image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def grid(images: Tensor, scale: int | None = None) -> Image.Image:
    """(N, C, H, W) uint8 -> one picture, row by row, as square as possible. A single image is only itself.

    A grid is that of scale 1, enlarged. scale: None is the default (`scale_for`), and 1 for a single image: people look
    at sheets, but one image may be the input of something else.
    """
    if len(images) == 1:
        return enlarged(to_pil(images[0]), scale or 1)
    columns = math.ceil(math.sqrt(len(images)))
    return _sheet([images[i : i + columns] for i in range(0, len(images), columns)], scale)


def strip(
    rows: Sequence[Tensor],
    labels: Sequence[str],
    row_labels: Sequence[str] = (),
    together: int = 0,
    apart: bool = False,
    scale: int | None = None,
) -> Image.Image:
    """A labelled table of pictures: rows of (N, C, H, W) uint8, with labels above the columns and left.

    Labels above the columns may have several lines. together: so many rows belong together, and are set apart from the
    next ones. apart: so is the first column. scale: None is the default, see `scale_for`.
    """
    return _sheet(rows, scale, labels, row_labels, together=together, apart=apart)


def captioned(
    rows: Sequence[Tensor],
    captions: Sequence[Sequence[Sequence[str]]],
    labels: Sequence[str] = (),
    scale: int | None = None,
) -> Image.Image:
    """Rows of (N, C, H, W) uint8, the first image of each set apart from the others that are compared with it.

    captions: for each image, the lines below it; one that is too long loses its beginning. labels: above the columns.
    scale: None is the default, see `scale_for`.
    """
    return _sheet(rows, scale, labels, captions=captions, apart=True)


def _sheet(
    rows: Sequence[Tensor],
    scale: int | None,
    labels: Sequence[str] = (),
    row_labels: Sequence[str] = (),
    captions: Sequence[Sequence[Sequence[str]]] = (),
    together: int = 0,
    apart: bool = False,
) -> Image.Image:
    """Tiles of one size on white, with labels above the columns and left of the rows, and captions, if there are any.

    captions: lines below each tile. together, apart: see `strip`. Columns and rows have room for their labels.
    """
    *_, height, width = rows[0].shape
    scale = scale or scale_for(width, height, sum(map(len, rows)))
    pad, width, height = _PAD * scale, width * scale, height * scale
    text = max(_LABEL, height // 16)  # readable beside large tiles too
    font = ImageFont.load_default(text)
    head = max((label.count("\n") + 1 for label in labels), default=0) * (text + 2 * _SPACE)
    margin = max(2 * text, *(round(font.getlength(label)) + 2 * _SPACE for label in row_labels)) if row_labels else 0
    words = [line for label in labels for line in label.split("\n")]
    column = max(width, _CAPTIONED if captions else 0, *(math.ceil(font.getlength(line)) for line in words))
    row_height = max(height, text if row_labels else 0)
    line = text + _SPACE
    lines_below = max((len(lines) for row in captions for lines in row), default=0)
    below = lines_below * line + 2 * _SPACE if captions else 0
    gap = column // 6
    lefts = [margin + pad + x * (column + pad) + (gap if apart and x else 0) for x in range(len(rows[0]))]
    gaps = [gap * (y // together) if together > 1 else 0 for y in range(len(rows))]
    tops = [head + pad + y * (row_height + pad + below) + gaps[y] for y in range(len(rows))]
    tiles = [[enlarged(to_pil(image), scale) for image in row] for row in rows]
    size = (lefts[-1] + column + pad, tops[-1] + row_height + pad + below)
    sheet = Image.new(tiles[0][0].mode, size, "white")
    for top, row in zip(tops, tiles, strict=True):
        for left, tile in zip(lefts, row, strict=False):  # the last row of a grid may be shorter
            sheet.paste(tile, (left + (column - width) // 2, top + (row_height - height) // 2))
    draw = ImageDraw.Draw(sheet)
    for left, label in zip(lefts, labels, strict=False):
        place = (left + column // 2, head // 2 + 1)
        draw.text(place, label, fill="black", font=font, anchor="mm", align="center")
    for top, label in zip(tops, row_labels, strict=False):
        draw.text(((margin + pad) // 2, top + row_height // 2), label, fill="black", font=font, anchor="mm")
    for top, captions_of_row in zip(tops, captions, strict=False):
        for left, lines in zip(lefts, captions_of_row, strict=True):
            for i, caption in enumerate(lines):
                place = (left + column // 2, top + row_height + _SPACE + i * line + line // 2)
                draw.text(place, _shorten(caption, font, column), fill="black", font=font, anchor="mm")
    return sheet


def _shorten(text: str, font: Any, width: int) -> str:
    """The end of a text that is no wider than this, with … for what is left out: file names differ in their ends."""
    rest = text
    while rest and font.getlength(rest if rest == text else f"…{rest}") > width:
        rest = rest[1:]
    return rest if rest == text else f"…{rest}"


def picture_bytes(image: Image.Image, suffix: str = ".png") -> bytes:
    """Encode a picture in the format of a file name's suffix.

    Raises UsageError if there is no such format, or the picture is too large for it.
    """
    Image.preinit()  # the usual formats; all others are imported only for a name that needs them
    kind = Image.EXTENSION.get(suffix.lower()) or Image.registered_extensions().get(suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise UsageError(f"pictures cannot be written as {suffix or 'a file without a suffix'}", "Use a name in .png.")
    buffer = io.BytesIO()
    lossless: dict[str, dict[str, Any]] = {"JPEG": {"quality": 95, "subsampling": 0}, "WEBP": {"lossless": True}}
    try:
        image.save(buffer, kind, **lossless.get(kind, {}))
    except (OSError, ValueError):  # WebP has at most 16,383 pixels a side, JPEG 65,500
        size = f"{image.width}x{image.height}"
        raise UsageError(f"{size} pixels cannot be written as {suffix}", "Use .png, or a smaller --scale.") from None
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
