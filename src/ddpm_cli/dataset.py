"""Training images: scanned, checked, decoded once into a pack of uint8 pixels on disk, gathered in batches.

A pack is a folder in the cache, named after a hash of what was asked for: index.json, and shards of raw (C, H, W)
images one after another, which training maps into memory. So an epoch reads pixels at the disk's speed, without
worker processes, and any batch of a run can be had again from its number alone.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import statistics
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import torch
from PIL import ExifTags, Image
from torch import Tensor

from ddpm_cli import images
from ddpm_cli.config import DataConfig
from ddpm_cli.errors import DataError

__all__ = ["Batches", "Pack", "Source", "Survey", "open_pack", "survey"]

_PACK_VERSION = 1
_SHARD_BYTES = 512 * 2**20
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")
Progress = Callable[[str, int, int], None]  # what, done, total


def _silent(what: str, done: int, total: int) -> None:
    pass


def _map(work: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
    """`map` in threads, in order, never far ahead of the consumer. Pillow decodes outside the interpreter's lock."""
    workers = os.cpu_count() or 1
    with ThreadPoolExecutor(workers) as pool:
        pending: list[Future[_Result]] = []
        rest = iter(items)
        try:
            while pending or (pending := [pool.submit(work, item) for item in itertools.islice(rest, 4 * workers)]):
                yield pending.pop(0).result()
                pending += [pool.submit(work, item) for item in itertools.islice(rest, 1)]
        finally:
            for future in pending:
                future.cancel()


class Source:
    """The image files of a folder (recursive) or a .zip, in a fixed order.

    files: (name, stamp) of each, sorted by name; the stamp changes when the file does. Raises DataError if there is no
    such folder or archive, or no file in it that could be an image.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise DataError(f"{path}: no such folder or .zip", "IMAGES is the folder that holds your images.")
        if path.is_dir():
            found = self._scan_folder()
        elif zipfile.is_zipfile(path):
            try:
                self._archive = zipfile.ZipFile(path)  # threads may read from it side by side
            except (zipfile.BadZipFile, OSError) as error:
                raise DataError(f"{path}: damaged ({error})") from None
            found = self._scan_zip()
        else:
            raise DataError(f"{path}: neither a folder nor a .zip", "Give the folder that holds your images.")
        self.files: list[tuple[str, str]] = sorted(found)
        if not self.files:
            suffixes = " ".join(sorted(images.IMAGE_SUFFIXES))
            raise DataError(f"{path}: no image files in it", f"Looked for {suffixes}, in subfolders too.")

    @staticmethod
    def _wanted(name: str) -> bool:
        path = Path(name)
        hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
        return not hidden and path.suffix.lower() in images.IMAGE_SUFFIXES

    def _scan_folder(self) -> Iterator[tuple[str, str]]:
        visited = set()
        for folder, subfolders, names in os.walk(self.path, followlinks=True):
            status = Path(folder).stat()
            is_run = "metrics.jsonl" in names and "config.json" in names  # with previews in it, for `ddpm train .`
            if (status.st_dev, status.st_ino) in visited or is_run:
                subfolders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))  # links may go round in circles
            subfolders.sort()
            for name in names:
                path = Path(folder, name)
                relative = path.relative_to(self.path).as_posix()
                if self._wanted(relative):
                    try:
                        status = path.stat()
                        yield relative, f"{status.st_size}-{status.st_mtime_ns}"
                    except OSError:  # a dangling link: named as left out when it is opened
                        yield relative, "missing"

    def _scan_zip(self) -> Iterator[tuple[str, str]]:
        for info in self._archive.infolist():
            if not info.is_dir() and self._wanted(info.filename):
                yield info.filename, f"{info.file_size}-{info.CRC}"

    def open(self, name: str) -> BinaryIO:
        """One of the files, for reading. Raises OSError, or what zipfile raises."""
        if self.path.is_dir():
            return (self.path / name).open("rb")
        return self._archive.open(name)  # type: ignore[return-value]

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DataError if it cannot be read."""
        try:
            with self.open(name) as file:
                return file.read()
        except Exception as error:  # zipfile and what it unpacks with raise their own
            raise DataError(f"{name}: cannot be read ({error})") from None


@dataclass(frozen=True)
class Survey:
    """What the headers of the images say, for choosing the size and the channels of a model."""

    files: int  # that could be images
    readable: int  # whose header makes sense
    gray: int  # of those, with one channel
    median_side: int  # pixels, of the shorter sides
    square_side: int | None  # pixels, if all images are squares of this one size

    @property
    def channels(self) -> int:
        """1 if every image is gray, else 3."""
        return 1 if self.gray == self.readable else 3


def survey(source: Source, progress: Progress = _silent) -> Survey:
    """Read the header of every image. Raises DataError if none makes sense."""

    def header(name: str) -> tuple[tuple[int, int], bool] | None:
        try:
            with source.open(name) as file, Image.open(file) as image:
                turned = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
                return image.size[::-1] if turned else image.size, images.is_gray(image)
        except Exception:  # Pillow's plugins raise anything on a damaged file
            return None

    total = len(source.files)
    headers = []
    for done, found in enumerate(_map(header, [name for name, _ in source.files]), 1):
        if found:
            headers.append(found)
        progress("looking at images", done, total)
    if not headers:
        raise DataError(f"{source.path}: none of its {total} image files can be read")
    sizes = {size for size, _ in headers}
    width, height = next(iter(sizes))
    return Survey(
        files=total,
        readable=len(headers),
        gray=sum(gray for _, gray in headers),
        median_side=int(statistics.median(min(size) for size, _ in headers)),
        square_side=width if len(sizes) == 1 and width == height else None,
    )


class Pack:
    """Decoded images on disk, mapped into memory.

    left_out: (file, reason) of those that could not be decoded. fingerprint: a hash of all pixels, in their order.
    Raises OSError, ValueError, KeyError, TypeError or RuntimeError if it is damaged.
    """

    def __init__(self, folder: Path) -> None:
        index = json.loads((folder / "index.json").read_text())
        self.folder = folder
        self.fingerprint: str = index["pixels"]
        self.unread: list[str] = index["unread"]  # files left out because the disk did not give them
        self.count: int = index["count"]
        self.shape: tuple[int, int, int] = tuple(index["shape"])
        self.left_out: list[tuple[str, str]] = [(name, reason) for name, reason in index["left_out"]]
        self._per_shard: int = index["per_shard"]
        self._shards = [
            torch.from_file(
                str(folder / _shard_name(i)),
                size=min(self._per_shard, self.count - i * self._per_shard) * _numel(self.shape),
                dtype=torch.uint8,
            ).view(-1, *self.shape)
            for i in range(-(-self.count // self._per_shard))
        ]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Gather images. indices: (B,) int64 in [0, len). Returns (B, C, H, W) uint8."""
        shard_of = indices // self._per_shard
        batch = torch.empty((len(indices), *self.shape), dtype=torch.uint8)
        for i in set(shard_of.tolist()):
            here = shard_of == i
            batch[here] = self._shards[i][indices[here] - i * self._per_shard]
        return batch


def _numel(shape: tuple[int, int, int]) -> int:
    return shape[0] * shape[1] * shape[2]


def _shard_name(i: int) -> str:
    return f"shard-{i:05d}.u8"


def open_pack(source: Source, config: DataConfig, cache: Path, progress: Progress = _silent) -> Pack:
    """The pack of these images under these settings: from the cache, or decoded now.

    Files that cannot be decoded are left out and remembered. Raises DataError if none is left.
    """
    what = replace(config, images="", flip=False).to_dict()  # neither changes a pixel of the pack
    key = hashlib.sha256(json.dumps([_PACK_VERSION, what, source.files]).encode()).hexdigest()[:32]
    folder = cache / "packs" / key
    try:
        pack = Pack(folder)
        if not any(_readable(source, name) for name in pack.unread):
            return pack
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):
        pass  # not there yet; or cut short by a full disk, or cleaned up in part
    shutil.rmtree(folder, ignore_errors=True)
    _write_pack(source, config, folder, progress)
    return Pack(folder)


def _readable(source: Source, name: str) -> bool:
    """Whether a file that could not be read once can be now: a disk came back, permissions were mended."""
    try:
        source.read(name)
    except DataError:
        return False
    return True


def _write_pack(source: Source, config: DataConfig, folder: Path, progress: Progress) -> None:
    """Decode everything into a folder beside, and rename it into place when it is complete."""
    unread: list[str] = []

    def decode(name: str) -> bytes | DataError:
        try:
            data = source.read(name)
        except DataError as error:
            unread.append(name)
            return error
        try:
            image = images.decode(data, name, config.channels, config.background)
            return images.planes(images.fit(image, config.size, config.fit, config.background))
        except DataError as error:
            return error

    pixels = hashlib.sha256(repr((config.channels, config.size)).encode())

    shape = (config.channels, config.size, config.size)
    per_shard = max(1, _SHARD_BYTES // _numel(shape))
    folder.parent.mkdir(parents=True, exist_ok=True)
    tag = folder.parent.parent / "CACHEDIR.TAG"
    if not tag.exists():
        tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n# Made by ddpm; safe to delete.\n")
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        count = 0
        left_out: list[tuple[str, str]] = []
        names = [name for name, _ in source.files]
        for name, result in zip(names, _map(decode, names), strict=True):
            if isinstance(result, DataError):
                left_out.append((name, result.message.removeprefix(f"{name}: ")))
            else:
                with (partial / _shard_name(count // per_shard)).open("ab") as shard:
                    shard.write(result)
                pixels.update(result)
                count += 1
            progress("decoding images", count + len(left_out), len(names))
        if not count:
            example = ": ".join(left_out[0])
            raise DataError(f"{source.path}: none of its image files can be decoded, for example {example}")
        index = {"count": count, "shape": shape, "per_shard": per_shard, "left_out": left_out}
        index |= {"unread": unread, "pixels": pixels.hexdigest()}
        (partial / "index.json").write_text(json.dumps(index))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():  # else another process packed the same images meanwhile
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class Batches:
    """The order in which a run sees its images: a new permutation every epoch, one epoch running into the next.

    Batch number `step` depends on (seed, step) and the sizes alone, so a resumed run goes on where it was.
    """

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self._orders: dict[int, Tensor] = {}

    def _order(self, epoch: int) -> Tensor:
        if epoch not in self._orders:
            self._orders = {e: order for e, order in self._orders.items() if e == epoch - 1}
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
            self._orders[epoch] = torch.randperm(self.count, generator=generator)
        return self._orders[epoch]

    def __getitem__(self, step: int) -> Tensor:
        """The images of training step `step`, counted from 0: (batch_size,) int64."""
        start, end = step * self.batch_size, (step + 1) * self.batch_size
        epochs = range(start // self.count, (end - 1) // self.count + 1)
        runs = (self._order(e)[max(start - e * self.count, 0) : end - e * self.count] for e in epochs)
        return torch.cat(list(runs))
