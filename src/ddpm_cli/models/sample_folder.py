"""A folder of samples that can be filled in parts: image i of a seed is always the same file, i.png."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_cli.config import shown
from ddpm_cli.data import images, pictures
from ddpm_cli.diffusion.samplers import Sampling
from ddpm_cli.distributed import restarted_in, sign
from ddpm_cli.errors import DataError, DDPMError, LockedError, ModelError
from ddpm_cli.files import LOCK, json_bytes, lock, read_bytes, read_json, remove_partials, write_file
from ddpm_cli.models.ddpm import DDPM

__all__ = ["RECORD", "Drawn", "fill", "image_name", "made_with", "opened", "require_made_with"]

RECORD = "samples.json"  # the model and the settings of the images


def image_name(i: int) -> str:
    """The file of image number i."""
    return f"{i:06d}.png"


def made_with(model: DDPM, sampling: Sampling, seed: int) -> dict[str, Any]:
    """The values that an image depends on, besides its number: for the record."""
    precision = str(model.unet.conv_in.weight.dtype).removeprefix("torch.")
    return {"model": model.fingerprint(), "seed": seed, **sampling.facts(), "precision": precision}


def fill(folder: Path, numbers: Sequence[int], batches: Iterable[Tensor]) -> None:
    """Write images of an opened folder. batches: (B, C, H, W) uint8, in the order of their numbers."""
    rest = iter(numbers)
    for batch in batches:
        for image, i in zip(batch, rest, strict=False):  # in this order: at the end of a batch, zip takes no number
            write_file(folder / image_name(i), pictures.picture_bytes(images.to_pil(image)), sync=False)


class Drawn:
    """Images 0..n-1 of a folder that is filled, read on demand. shape: (C, H, W) of each."""

    def __init__(self, folder: Path, n: int, shape: tuple[int, int, int]) -> None:
        self.folder = folder
        self.shape = shape
        self._count = n

    @property
    def fingerprint(self) -> str:
        """A hash of all that the images depend on, besides their numbers."""
        return hashlib.sha256(read_bytes(self.folder / RECORD)).hexdigest()

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Gather images. indices: (B,) int64 in [0, len). Returns (B, C, H, W) uint8. Raises DataError."""
        return torch.stack([self._image(self.folder / image_name(i)) for i in indices.tolist()])

    def _image(self, path: Path) -> Tensor:
        try:
            image = images.from_pil(images.decode(path, str(path), self.shape[0]))
            if image.shape != self.shape:
                raise DataError(f"{path}: is not an image of this model")
            return image
        except DataError as error:
            raise DataError(error.message, "Remove it, and it is drawn again.") from None


@contextmanager
def opened(
    folder: Path,
    n: int,
    record: Mapping[str, Any],
    force: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> Iterator[list[int]]:
    """Lock a folder to fill it with images 0..n-1. Yields the numbers of the missing images.

    record: what `made_with` returns. A folder with other values is refused; with `force`, its images are
    removed. Files are written atomically, so a file that exists is complete. warn: called if the folder cannot be
    locked. Raises DDPMError.
    """
    with ExitStack() as held:
        try:
            missing = _open(folder, n, record, force, warn, held)
        except LockedError:
            raise LockedError(
                f"{folder}: another process is writing to it", "Wait for it, or name another folder with -o."
            ) from None
        except OSError as error:
            place = error.filename or folder
            raise DataError(f"{place}: {error.strerror}", "Name another folder with -o.") from None
        yield missing


def _open(
    folder: Path, n: int, record: Mapping[str, Any], force: bool, warn: Callable[[str], None], held: ExitStack
) -> list[int]:
    """Lock a folder, check it, and list its missing images. held: holds the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    if not held.enter_context(lock(folder / LOCK, wait=False)):
        warn(f"{folder}: cannot be locked here; do not let a second command write to it at the same time")
    remove_partials(folder)
    if force and not restarted_in(folder / LOCK):  # torchrun runs the same command again
        _clear(folder, n)
    else:
        require_made_with(folder, record)
    sign(folder / LOCK)
    write_file(folder / RECORD, json_bytes(record))
    # A power failure may leave empty files.
    there = {path.name for path in folder.iterdir() if path.is_file() and path.stat().st_size}
    return [i for i in range(n) if image_name(i) not in there]


def require_made_with(folder: Path, record: Mapping[str, Any]) -> None:
    """Raises DDPMError if a folder has samples with another record, see `made_with`."""
    if differences := _differences(folder / RECORD, record):
        raise DDPMError(
            f"{folder}: holds samples that were made differently: {', '.join(differences)}",
            "Name another folder with -o, or use --force to draw these again.",
        )


def _clear(folder: Path, n: int) -> None:
    """Remove images 0..n-1, and all other numbered images if the folder has a record."""
    ours = (folder / RECORD).exists()
    for path in folder.iterdir():
        if re.fullmatch(r"\d{6,}\.png", path.name) and (ours or int(path.stem) < n):
            path.unlink(missing_ok=True)


def _differences(file: Path, record: Mapping[str, Any]) -> list[str]:
    """How the record in a file differs from this one, in words."""
    if not file.exists():
        return []
    try:
        old = read_json(file)
    except ModelError:
        return [f"{file.name} is damaged"]
    return [f"{key} {shown(old.get(key))}, not {value!r}" for key, value in record.items() if old.get(key) != value]
