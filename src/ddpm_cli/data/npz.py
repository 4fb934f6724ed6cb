"""The images of an .npz file, as `ddpm sample -o x.npz` and the scripts of other projects write them."""

from __future__ import annotations

import errno
import functools
import hashlib
import math
import os
import shutil
import tempfile
import weakref
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from ddpm_cli.errors import DataError

__all__ = ["Npz"]

_ARRAY = "arr_0.npy"
_COPIED = 2**20  # bytes at once


class Npz:
    """The array `arr_0` of an .npz file, (N, H, W, C) uint8, as images that are read on demand.

    It is unpacked into an unnamed temporary file, which the system removes at exit. So memory does not grow with the
    number of images. Nothing in it is unpickled. shape: (C, H, W) of each image.
    """

    def __init__(self, path: Path, cache: Path) -> None:
        """cache: a folder for the temporary file. Raises DataError if it is not such a file."""
        try:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive, archive.open(_ARRAY) as member:
                self._count, height, width, channels = _shape(member)
                self.shape = (channels, height, width)
                size = archive.getinfo(_ARRAY).file_size - member.tell()
                if size != self._count * math.prod(self.shape):
                    raise DataError("its size does not fit its shape")
                cache.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=cache) as unpacked:
                    shutil.copyfileobj(member, unpacked, _COPIED)  # checks the CRC too
                    unpacked.flush()
                    self._handle = os.dup(unpacked.fileno())
        except Exception as error:  # zipfile and NumPy may raise any exception on a damaged file
            raise DataError(
                f"{path}: {_reason(error)}", "ddpm sample -o samples.npz writes such files: arr_0, (N, H, W, C) uint8."
            ) from None
        weakref.finalize(self, os.close, self._handle)

    def __len__(self) -> int:
        return self._count

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all pixels, in their order. Raises OSError."""
        digest = hashlib.sha256(repr(self.shape).encode())
        offset = 0
        while block := os.pread(self._handle, _COPIED, offset):
            digest.update(block)
            offset += len(block)
        return digest.hexdigest()

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Gather images. indices: (B,) int64 in [0, len). Returns (B, C, H, W) uint8. Raises OSError."""
        channels, height, width = self.shape
        size = math.prod(self.shape)
        pixels = bytearray(len(indices) * size)
        room = memoryview(pixels)
        for i, index in enumerate(indices.tolist()):
            if os.preadv(self._handle, [room[i * size : (i + 1) * size]], index * size) != size:
                raise OSError(errno.EIO, "the unpacked images are truncated")
        return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, channels).permute(0, 3, 1, 2)


def _shape(member: IO[bytes]) -> tuple[int, int, int, int]:
    """Read the header of the array. Raises DataError unless it is images."""
    version = np.lib.format.read_magic(member)
    if version not in ((1, 0), (2, 0)):
        raise DataError("is of an unknown version of NumPy's format")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = read(member)
    if dtype != np.uint8 or by_columns:
        raise DataError(f"arr_0 is {dtype}{' in Fortran order' if by_columns else ''}, not uint8")
    match shape:
        case (int(count), int(height), int(width), 1 | 3 as channels) if min(count, height, width) > 0:
            return count, height, width, channels
    raise DataError(f"arr_0 has the shape {shape}, not (N, H, W, 1 or 3)")


def _reason(error: Exception) -> str:
    match error:
        case DataError():
            return error.message
        case KeyError():
            return "has no arr_0"
        case OSError() if error.strerror:
            return f"cannot be read ({error.strerror})"
    return f"not an .npz file, or damaged ({error or type(error).__name__})"
