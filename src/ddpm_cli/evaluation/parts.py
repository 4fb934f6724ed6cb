"""Results for many images, kept on disk in parts: work that goes on after it was stopped, and that processes share."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from ddpm_cli.distributed import World
from ddpm_cli.errors import DataError, ModelError
from ddpm_cli.files import load_tensors, remove_partials, write_file

__all__ = ["Part", "any_part", "complete", "place_of"]

Part = Mapping[str, Tensor]  # numbers: (B,) int64, the images it is about; other tensors as the work has them


def place_of(folder: Path, *what: object) -> Path:
    """Where parts are kept that depend on all of this. folder: of one kind of work. what: is written as JSON."""
    return folder / hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def complete(
    folder: Path,
    numbers: Sequence[int],
    work: Callable[[Sequence[int]], Iterator[Part]],
    world: World | None = None,
    again: bool = False,
) -> Iterator[Part]:
    """The parts that are about exactly these images, from the files of a folder and from new work. On rank 0 only.

    folder: see `place_of`, since a file is used for what its numbers say. Every rank must see it. work: yields parts
    for some images, which are written at once. again: remove what is there. Every rank must call this, and all but
    rank 0 get nothing. All work is done before this returns. The files are then read one by one, so memory does not
    grow with their number; that raises DataError if some cannot be read any more.
    """
    world = world or World()

    def look() -> list[int]:
        if again:
            shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
        remove_partials(folder)
        done = {number for part in _usable(folder, numbers) for number in part["numbers"].tolist()}
        return [number for number in numbers if number not in done]

    left = world.on_main(look)
    rows = world.rows(len(left))
    for part in work(left[rows.start : rows.stop]) if len(rows) else ():
        tensors = {name: tensor.contiguous() for name, tensor in part.items()}
        write_file(folder / f"{int(part['numbers'][0]):08d}.safetensors", save(tensors), sync=False)
    world.barrier()
    return _all_of(folder, numbers) if world.is_main else iter(())


def any_part(folder: Path) -> Part | None:
    """One of the parts in the folder, whatever images it is about; None without any."""
    for path in sorted(folder.glob("*.safetensors")):
        with contextlib.suppress(ModelError):
            return load_tensors(path)
    return None


def _all_of(folder: Path, numbers: Sequence[int]) -> Iterator[Part]:
    missing = len(numbers)
    for part in _usable(folder, numbers):
        missing -= len(part["numbers"])
        yield part
    if missing:
        raise DataError(f"{folder}: the results of {missing} images cannot be read", "Run the same command again.")


def _usable(folder: Path, numbers: Sequence[int]) -> Iterator[Part]:
    """The parts about these images and no others, none of them twice. A damaged file is removed."""
    wanted = set(numbers)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            part = load_tensors(path)
            found = set(part["numbers"].tolist())
        except (ModelError, OSError, KeyError):
            path.unlink(missing_ok=True)
            continue
        if found <= wanted:
            wanted -= found
            yield part
