"""Images: files <-> uint8 tensors <-> floats in [-1, 1].

A tensor of one image is (C, H, W), of several (N, C, H, W), with C 1 (gray) or 3 (RGB).
"""

from __future__ import annotations

import errno
import functools
import io
import logging
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import ExifTags, Image, ImageChops, ImageColor, ImageOps, UnidentifiedImageError
from torch import Tensor

from ddpm_cli.errors import DataError, UsageError

__all__ = [
    "IMAGE_SUFFIXES",
    "check_background",
    "decode",
    "disk_failed",
    "fit",
    "flatten",
    "from_pil",
    "is_gray",
    "load",
    "mean",
    "open_image",
    "planes",
    "reason",
    "to_float",
    "to_pil",
    "to_uint8",
]

# Folders and archives are searched for these suffixes. The format is detected from the content.
IMAGE_SUFFIXES = frozenset(
    (
        ".avif",
        ".bmp",
        ".gif",
        ".jfif",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".pbm",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    )
)

_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else its messages about odd files go to stderr


def to_float(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]: v / 127.5 - 1 (Section 3.3). `to_uint8` gives all 256 values back."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8, rounded to the nearest integer and clamped."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def mean(images: Tensor) -> list[float]:
    """The mean of each channel of (N, C, H, W) uint8, in [0, 255], rounded to 2 decimals."""
    return [round(value, 2) for value in images.double().mean((0, 2, 3)).tolist()]


def check_background(color: str) -> str:
    """Return a colour that is a CSS name or #rrggbb. Raises UsageError for any other."""
    try:
        ImageColor.getrgb(color)
    except ValueError:
        raise UsageError(f"--background {color} is not a colour", "Use a name such as white, or #rrggbb.") from None
    return color


def decode(source: Path | bytes, name: str, channels: int | None = None, background: str = "white") -> Image.Image:
    """An image file -> an upright image (EXIF): "L" for 1 channel, "RGB" for 3; None: as in the file.

    name: used in errors. Raises DataError if it is not an image, is damaged, or has floating point pixels.
    """
    try:
        with open_image(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return load(image, channels, background)
    except Exception as error:
        raise DataError(f"{name}: {reason(error)}") from None


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """Read the header of an image file. May raise any exception if it is not an image."""
    return Image.open(file, formats=_formats())


@functools.cache
def _formats() -> tuple[str, ...]:
    """All formats that Pillow reads except PostScript: Ghostscript would run it as a program, which may never end.

    All plugins are loaded here: threads that open their first images at the same time could miss some otherwise.
    """
    Image.preinit()  # the common ones come first
    Image.init()
    return tuple(name for name in Image.ID if name != "EPS")


def load(image: Image.Image, channels: int | None = None, background: str = "white") -> Image.Image:
    """Decode the pixels of an opened image, like `decode`. May raise any exception on a damaged file."""
    image.load()
    if image.mode == "P" and not image.getpalette():
        raise DataError("has no palette")  # Pillow would show it black
    upright = _upright(image)
    return flatten(upright, channels or (1 if is_gray(upright) else 3), background)


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Pillow's own function also rewrites the EXIF, which often fails."""
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # the metadata is damaged, the pixels may not be
        return image
    return image if turn is None else image.transpose(turn)


def disk_failed(error: Exception) -> bool:
    """Whether the disk caused a read error. EINVAL means a damaged file: Pillow seeks to an invalid offset."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def reason(error: Exception) -> str:
    """Why an image cannot be used, as text. Pillow's plugins may raise any exception on a damaged file."""
    match error:
        case DataError():
            return error.message
        case FileNotFoundError():
            return "no such file"
        case UnidentifiedImageError():
            return "not an image in a supported format"
        case OSError() if disk_failed(error):
            return f"cannot be read ({error.strerror})"
    return f"cannot be read as an image ({error or type(error).__name__})"


def is_gray(image: Image.Image) -> bool:
    """Whether the image has one channel, not counting transparency."""
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith("I")


def flatten(image: Image.Image, channels: int, background: str = "white") -> Image.Image:
    """Any mode -> "L" for 1 channel or "RGB" for 3. 16 bits are scaled to 8; transparency shows `background`.

    Raises DataError on floating point pixels, since no file gives their range.
    """
    if image.mode == "F":
        raise DataError("floating point pixels are not supported")
    if image.mode.startswith("I"):
        image = _eight_bits(image.convert("I"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image.convert("L" if channels == 1 else "RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit gray, in mode "I" -> "L", or "LA" if one gray value is transparent. 65535 is white."""
    gray = image.point(lambda v: v * (1 / 257) + 0.5).convert("L")
    clear = gray.info.pop("transparency", None)
    if clear is not None:  # a 16-bit value too
        above = image.point(lambda v: v * 1 - clear).convert("L")
        below = image.point(lambda v: v * -1 + clear).convert("L")
        gray.putalpha(ImageChops.add(above, below).point(lambda v: 255 * (v > 0)))
    return gray


def fit(image: Image.Image, size: int, how: str = "crop", background: str = "white") -> Image.Image:
    """Make an image `size` pixels square: crop its centre, pad it with `background`, or stretch it (bicubic)."""
    if image.size == (size, size):
        return image
    match how:
        case "crop":
            return ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        case "pad":
            return ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC, color=background)
        case "stretch":
            return image.resize((size, size), Image.Resampling.BICUBIC)
    raise ValueError(f"how must be crop, pad or stretch, not {how!r}")


def from_pil(image: Image.Image) -> Tensor:
    """An "L" or "RGB" image -> (C, H, W) uint8."""
    pixels = torch.from_numpy(np.array(image))
    return pixels.view(image.height, image.width, -1).permute(2, 0, 1).contiguous()


def planes(image: Image.Image) -> bytes:
    """The pixels of an image as (C, H, W) bytes."""
    return b"".join(band.tobytes() for band in image.split())


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) uint8 -> an "L" or "RGB" image."""
    pixels = image.permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
