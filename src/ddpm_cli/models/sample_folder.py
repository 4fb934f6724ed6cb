"""A folder of samples that can be filled in parts: image i of a seed is always the same file, i.png."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ddpm_cli.config import shown
from ddpm_cli.distributed import restarted_in, sign
from ddpm_cli.errors import DataError, DDPMError, LockedError, ModelError
from ddpm_cli.files import LOCK, json_bytes, lock, read_json, remove_partials, write_file

__all__ = ["RECORD", "image_name", "opened"]

RECORD = "samples.json"  # the model and the settings of the images


def image_name(i: int) -> str:
    """The file of image number i."""
    return f"{i:06d}.png"


@contextmanager
def opened(
    folder: Path,
    n: int,
    made_with: Mapping[str, Any],
    force: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[list[int]]:
    """Lock a folder to fill it with images 0..n-1. Yields the numbers of the missing images.

    made_with: the values that an image depends on. A folder with other values is refused; with `force`, its images are
    removed. Files are written atomically, so a file that exists is complete. warn: called if the folder cannot be
    locked. Raises DDPMError.
    """
    with ExitStack() as held:
        try:
            missing = _open(folder, n, made_with, force, warn, held)
        except LockedError:
            raise LockedError(
                f"-o {folder}: another process is writing to it", "Wait for it, or name another folder."
            ) from None
        except OSError as error:
            raise DataError(f"-o {error.filename or folder}: {error.strerror}") from None
        yield missing


def _open(
    folder: Path, n: int, made_with: Mapping[str, Any], force: bool, warn: Callable[[str], None], held: ExitStack
) -> list[int]:
    """Lock a folder, check it, and list its missing images. held: holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    if not held.enter_context(lock(folder / LOCK, wait=False)):
        warn(f"{folder}: cannot be locked here; do not let a second command write to it at the same time")
    remove_partials(folder)
    if force and not restarted_in(folder / LOCK):  # torchrun runs the same command again
        _clear(folder, n)
    elif differences := _differences(folder / RECORD, made_with):
        raise DDPMError(
            f"-o {folder}: holds samples that were made differently: {', '.join(differences)}",
            "Name another folder, or use --force to draw these again.",
        )
    sign(folder / LOCK)
    write_file(folder / RECORD, json_bytes(made_with))
    # A power failure may leave empty files.
    there = {path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size}
    return [i for i in range(n) if image_name(i) not in there]


def _clear(folder: Path, n: int) -> None:
    """Remove images 0..n-1, and all other numbered images if the folder has a record."""
    ours = (folder / RECORD).exists()
    for path in folder.iterdir():
        if re.fullmatch(r"\d{6,}\.png", path.name) and (ours or int(path.stem) < n):
            path.unlink(missing_ok=True)


def _differences(record: Path, made_with: Mapping[str, Any]) -> list[str]:
    """How a folder's record differs from `made_with`, in words."""
    if not record.exists():
        return []
    try:
        old = read_json(record)
    except ModelError:
        return [f"{record.name} is damaged"]
    return [f"{key} {shown(old.get(key))}, not {value!r}" for key, value in made_with.items() if old.get(key) != value]
