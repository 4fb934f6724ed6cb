"""The interface of a source of images: names in a fixed order, and files to open."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

from ddpm_cli.data.images import IMAGE_SUFFIXES
from ddpm_cli.data.work import OnProgress, silent
from ddpm_cli.errors import DataError

__all__ = ["LARGEST", "Source", "check_size", "could_be_image", "has_image_suffix", "is_hidden", "open_file"]

LARGEST = 2**30  # bytes of a file; larger ones are left out


class Source:
    """Image files in a fixed order.

    path: as the user gave it. addresses: find the images from any folder. key: changes if a file does. names: of
    the files, after `scan`. left_out: (name, reason) of folders and members that could not be read, after `scan`.
    held_out: how many files are not in it because a run does not train on them, after `scan`. prefix: of the names if
    there are several sources.
    """

    def __init__(self, path: str, *addresses: str) -> None:
        self.path = path
        self.addresses = addresses
        self.prefix = f"{path.rstrip('/')}/"
        self.key = ""
        self.names: Sequence[str] = []
        self.left_out: list[tuple[str, str]] = []
        self.held_out = 0

    def scan(self, progress: OnProgress = silent) -> None:
        """Find the names, if they are not known yet. Raises DataError if there are none."""

    def own_names(self) -> Iterable[str]:
        """The names in the same order, without what changes if the source moves or others join it. After `scan`."""
        return self.names

    def open(self, name: str) -> IO[bytes]:
        """Open a file for reading. Raises OSError with an errno if the disk fails; DataError, or any exception of
        zipfile and decompressors, if the file is damaged."""
        raise NotImplementedError

    def require_names(self) -> None:
        if not self.names:
            first = f"; {self.left_out[0][0]} {self.left_out[0][1]}" if self.left_out else ""
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise DataError(f"{self.path}: no image files in it{first}", f"Looked for {suffixes}, in subfolders too.")


def could_be_image(name: str) -> bool:
    """Whether a member of an archive may be an image, by its name: it has an image suffix and is not hidden."""
    return has_image_suffix(name) and not any(is_hidden(part) for part in name.split("/") if part != ".")


def has_image_suffix(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def is_hidden(name: str) -> bool:
    """Whether a file or a folder is hidden, or is what macOS adds to archives, by its name."""
    return name.startswith((".", "__MACOSX"))


def check_size(size: int) -> None:
    if not size:
        raise DataError("is empty")
    if size > LARGEST:
        raise DataError(f"too large for an image ({size / 2**30:.1f} GiB)")


def open_file(path: Path) -> IO[bytes]:
    """Open a file on this machine that may be an image. Raises OSError, and DataError if it cannot be one."""
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):  # a pipe may block, and /dev/zero never ends
        raise DataError("not a file but a folder, pipe or device")
    check_size(status.st_size)
    return path.open("rb")
