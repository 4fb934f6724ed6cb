"""A folder of samples that can be filled in parts: image i of a seed is the file i.png, whoever draws it, and when."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddpm_cli.distributed import restarted_in, sign
from ddpm_cli.errors import DataError, DDPMError, LockedError
from ddpm_cli.files import LOCK, PARTIAL, json_bytes, lock, write_file

__all__ = ["RECORD", "image_name", "opened"]

RECORD = "samples.json"  # what the images were made with


def image_name(i: int) -> str:
    """The file of image number i."""
    return f"{i:06d}.png"


@contextmanager
def opened(folder: Path, n: int, made_with: Mapping[str, Any], force: bool = False) -> Iterator[list[int]]:
    """Fill a folder with images 0..n-1, and nobody else does meanwhile. Gives the numbers of those that are missing.

    made_with: what an image depends on. A folder whose images were made otherwise is refused; or, with `force`, emptied
    of them. Files appear whole, so one that is there is done. Raises DDPMError.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder / LOCK, wait=False):
            for leftover in folder.glob(f"{PARTIAL}*"):  # a killed process's
                leftover.unlink(missing_ok=True)
            if force and not restarted_in(folder / LOCK):  # torchrun calls the same command again
                _clear(folder, n)
            elif differences := _differences(folder / RECORD, made_with):
                raise DDPMError(
                    f"-o {folder}: holds samples that were made otherwise: {', '.join(differences)}",
                    "Name another folder, or use --force to draw these anew.",
                )
            sign(folder / LOCK)
            write_file(folder / RECORD, json_bytes(made_with))
            there = {path.name for path in folder.iterdir()}
            yield [i for i in range(n) if image_name(i) not in there]
    except LockedError:
        raise LockedError(f"-o {folder}: another process is drawing into it", "Wait for it, or name another.") from None
    except OSError as error:
        raise DataError(f"-o {folder}: {error.strerror}") from None


def _clear(folder: Path, n: int) -> None:
    """Remove the images that will be drawn anew; and, in a folder of ours, all images like them."""
    ours = (folder / RECORD).exists()
    for path in folder.iterdir():
        if re.fullmatch(r"\d{6,}\.png", path.name) and (ours or int(path.stem) < n):
            path.unlink(missing_ok=True)


def _differences(record: Path, made_with: Mapping[str, Any]) -> list[str]:
    """What is not as a folder's record has it, in words."""
    if not record.exists():
        return []
    try:
        old = json.loads(record.read_text())
        return [f"{key} {old.get(key)}, not {value}" for key, value in made_with.items() if old.get(key) != value]
    except (ValueError, AttributeError):
        return [f"{record.name} is damaged"]
