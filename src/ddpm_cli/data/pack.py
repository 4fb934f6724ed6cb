"""Training images: checked, decoded once into a pack of uint8 pixels on disk, gathered in batches.

A pack is a folder in the cache, named by a hash of its images and settings: index.json, and shards of raw (C, H, W)
images one after another. Each image of a batch is read at its offset, so an epoch needs no decoding, memory does not
grow with the number of images, and a resumed run can read any batch.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ddpm_cli.config import DataConfig
from ddpm_cli.config.strict import Check, Count, Strict, at_least, between
from ddpm_cli.data import images
from ddpm_cli.data.cache import INDEX, pack_folder, pack_lock, remove_unfinished
from ddpm_cli.data.sources.source import Source
from ddpm_cli.data.survey import without_warnings
from ddpm_cli.data.work import Budget, OnProgress, in_threads, silent
from ddpm_cli.errors import DataError, LockedError, ModelError
from ddpm_cli.files import lock, new_directory, open_shared, read_config, require_regular
from ddpm_cli.machine import free_memory
from ddpm_cli.text import and_more, printable
from ddpm_cli.writable import why_not_writable

__all__ = ["Pack", "names_in", "open_pack"]

_PACK_VERSION = 3
_SHARD_BYTES = 2 * 2**30
_BLOCK_BYTES = 2**18  # pixels that are written, and summed as int64, at once
_PIXEL_BYTES = 16  # of memory to decode a pixel; measured: 9 to 16, depending on the type of the image
_PIXELS = 2**28  # decoded at once if the free memory is not known
_Hash = Annotated[str, Check(lambda text: re.fullmatch("[0-9a-f]{64}", text) is not None, "a SHA-256")]
_Printable = Annotated[str, Check(str.isprintable, "printable")]


@dataclass(frozen=True)
class _Index(Strict):
    """A pack's index.json. source: the addresses of the images. For what needs explanation, see `Pack`."""

    count: Count
    shape: tuple[int, ...]
    per_shard: Count
    pixels: _Hash
    mean: tuple[Annotated[float, between(0, 256)], ...]  # rounded, so not always below 255
    left_out: tuple[tuple[_Printable, ...], ...]
    unread: tuple[str, ...]
    source: str
    held_out: Annotated[int, at_least(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(len(entry) != 2 for entry in self.left_out):
            raise ModelError("left_out: must have pairs of a name and a reason")

    def require_shape(self, shape: tuple[int, int, int]) -> None:
        if self.shape != shape or len(self.mean) != shape[0]:
            raise ModelError(f"shape {self.shape}, mean of {len(self.mean)} channels: must be {shape}")


class Pack:
    """Decoded images on disk, read on demand. Several processes may read the same pack.

    fingerprint: a hash of all pixels, in their order. mean: of each channel over all images, in [0, 255]. left_out:
    (file, reason) of files that could not be decoded, printable. unread: names of files that the disk failed to read.
    held_out: how many files of the source are not in it, since they are held out.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        """shape: (C, H, W) of its images. Raises DataError if it is missing, damaged, or of another shape."""
        self.folder = folder
        self.shape = shape
        self._size = math.prod(shape)
        self._shards: list[int] = []
        self._handles: list[int] = []
        weakref.finalize(self, _close, self._handles)
        try:
            self._handles.append(open_shared(folder / INDEX))  # locked, so that the pack is not removed
            index = read_config(_Index, folder / INDEX)
            index.require_shape(shape)
            for first in range(0, index.count, index.per_shard):
                shard = folder / _shard_name(len(self._shards))
                require_regular(shard)
                self._shards.append(os.open(shard, os.O_RDONLY))
                self._handles.append(self._shards[-1])
                if os.fstat(self._shards[-1]).st_size != min(index.per_shard, index.count - first) * self._size:
                    raise ModelError("a shard has the wrong size")
        except (OSError, ModelError) as error:
            raise DataError(f"{folder}: not a pack of decoded images ({error})") from None
        self.fingerprint = index.pixels
        self.mean = list(index.mean)
        self.unread = list(index.unread)
        self.left_out = [(name, reason) for name, reason in index.left_out]
        self.held_out = index.held_out
        self.count = index.count
        self._per_shard = index.per_shard
        _record_use(self._handles[0])

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, indices: Tensor) -> Tensor:
        """Gather images. indices: (B,) int64 in [0, len). Returns (B, C, H, W) uint8. Raises OSError."""
        size = self._size
        pixels = bytearray(len(indices) * size)
        room = memoryview(pixels)
        for i, (shard, start) in enumerate(self._places(indices)):
            if os.preadv(shard, [room[i * size : (i + 1) * size]], start) != size:
                raise OSError(errno.EIO, "a shard of the decoded images is truncated", str(self.folder))
        return torch.frombuffer(pixels, dtype=torch.uint8).view(-1, *self.shape)

    def prefetch(self, indices: Tensor) -> None:
        """Ask the system to read the images of a later batch in the background. indices: (B,) int64."""
        if hasattr(os, "posix_fadvise"):
            for shard, start in self._places(indices):
                os.posix_fadvise(shard, start, self._size, os.POSIX_FADV_WILLNEED)

    def _places(self, indices: Tensor) -> Iterator[tuple[int, int]]:
        """The file descriptor of the shard and the byte offset of each image."""
        for index in indices.tolist():
            shard, place = divmod(index, self._per_shard)
            yield self._shards[shard], place * self._size


def _close(handles: list[int]) -> None:
    for index in handles[:1]:
        _record_use(index)  # again, since a run may have taken weeks
    for handle in handles:
        os.close(handle)


def _record_use(index: int) -> None:
    """Set the modification time of a pack's index to now, if possible. It is the last use that `ddpm cache` shows."""
    with contextlib.suppress(OSError):
        os.utime(index)


def _shard_name(i: int) -> str:
    return f"shard-{i:05d}.u8"


def open_pack(source: Source, config: DataConfig, cache: Path, progress: OnProgress = silent) -> Pack:
    """Open the pack of these images and settings from the cache, or decode the images into a new one.

    Files that cannot be decoded are left out and recorded. If another process is making the same pack, this waits.
    Raises DataError if no image is left.
    """
    what = replace(config, images="", flip=False).to_dict()  # neither changes the pixels
    del what["holdout"]  # the source has that part of the images
    key = hashlib.sha256(json.dumps([_PACK_VERSION, what, source.key]).encode()).hexdigest()[:32]
    folder = pack_folder(cache, key)
    shape = (config.channels, config.size, config.size)
    if pack := _made_already(source, folder, shape):
        return pack
    if reason := why_not_writable(folder.parent):
        raise DataError(f"{reason}, and decoded images are kept there", "Name another folder with DDPM_CACHE_DIR.")
    with _lock(pack_lock(cache, key), progress) as alone:
        if pack := _made_already(source, folder, shape):
            return pack
        if alone:  # so unfinished packs are from killed processes
            remove_unfinished(cache, key)
        _write_pack(source, config, folder, progress)
        return Pack(folder, shape)


def names_in(pack: Pack, source: Source, numbers: Iterable[int]) -> dict[int, str]:
    """The names of the files of some images of a pack, printable. source: what the pack was made from."""
    source.scan()
    failed = [name for name, _ in pack.left_out[len(source.left_out) :]]  # in the order of the files
    wanted = set(numbers)
    found: dict[int, str] = {}
    number = 0
    for name in map(printable, source.names):
        if failed[:1] == [name]:
            del failed[0]
            continue
        if number in wanted:
            found[number] = name
        number += 1
    return found


@contextlib.contextmanager
def _lock(path: Path, progress: OnProgress) -> Iterator[bool]:
    """Hold a lock as in `files.lock`, and report it if another process has it."""
    with contextlib.ExitStack() as held:
        try:
            alone = held.enter_context(lock(path, wait=False))
        except LockedError:
            progress("waiting for another run that decodes these images", 0, None)
            alone = held.enter_context(lock(path))
        yield alone


def _made_already(source: Source, folder: Path, shape: tuple[int, int, int]) -> Pack | None:
    """The pack, if it is complete and the files that the disk failed to read still cannot be read."""
    try:
        pack = Pack(folder, shape)
    except DataError:
        return None  # missing, or damaged by a full disk
    if pack.unread:
        source.scan()
    return None if any(_readable(source, name) for name in pack.unread) else pack


def _readable(source: Source, name: str) -> bool:
    """Whether a file that could not be read before can be read now, after a mount or a change of permissions."""
    try:
        with source.open(name) as file:
            file.read(1)
    except OSError:
        return False
    except Exception:  # the disk can read it, but it is damaged: decode again to record why
        return True
    return True


class _Failure(NamedTuple):
    """Why a file was left out. unread: whether the disk failed to read it."""

    reason: str
    unread: bool


def _write_pack(source: Source, config: DataConfig, folder: Path, progress: OnProgress) -> None:
    """Decode all images into a folder, which gets its final name when it is complete."""
    # A file of some kilobytes may decode to gigabytes, in every thread. All threads share half of the free memory.
    free = free_memory()
    budget = Budget(_PIXELS if free is None else free // 2 // _PIXEL_BYTES)

    def decode(name: str) -> bytes | _Failure:
        try:
            with source.open(name) as file, images.open_image(file) as image, budget.spend(math.prod(image.size)):
                pixels = images.load(image, config.channels, config.background)
                return images.planes(images.fit(pixels, config.size, config.fit, config.background))
        except Exception as error:  # Pillow's plugins, zipfile and decompressors may raise any exception
            return _Failure(printable(images.reason(error)), images.disk_failed(error))

    source.scan(progress)
    tag = folder.parent.parent / "CACHEDIR.TAG"
    if not tag.exists():
        tag.parent.mkdir(parents=True, exist_ok=True)
        tag.write_text("Signature: 8a477f597d28d172789f06886806bc55\n# Made by ddpm; safe to delete.\n")
    left_out = list(source.left_out)
    unread: list[str] = []
    with new_directory(folder) as partial, without_warnings():
        shards = _Shards(partial, (config.channels, config.size, config.size))
        with contextlib.closing(shards):
            for done, (name, result) in enumerate(
                zip(source.names, in_threads(decode, source.names), strict=True), start=1
            ):
                if isinstance(result, _Failure):
                    left_out.append((printable(name), result.reason))
                    unread += [name] * result.unread
                else:
                    shards.add(result)
                progress("decoding images", done, len(source.names))
        if not shards.count:
            example = ": ".join(left_out[0])
            raise DataError(f"{source.path}: none of its image files can be decoded, for example {example}")
        index = shards.index() | {"left_out": left_out, "unread": unread, "source": and_more(source.addresses)}
        index["held_out"] = source.held_out
        (partial / INDEX).write_text(json.dumps(index))


class _Shards:
    """Writes images one after another into files of at most _SHARD_BYTES, and computes their index."""

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.count = 0
        self._folder = folder
        self._shape = shape
        self._per_shard = max(1, _SHARD_BYTES // math.prod(shape))
        self._pixels = hashlib.sha256(repr(shape[:2]).encode())
        self._sums = torch.zeros(shape[0], dtype=torch.int64)
        self._block = bytearray()
        self._file: BinaryIO | None = None

    def add(self, image: bytes) -> None:
        """image: (C, H, W) bytes."""
        self._file = self._file or (self._folder / _shard_name(self.count // self._per_shard)).open("wb")
        self._block += image
        self.count += 1
        if self.count % self._per_shard == 0:
            self.close()
        elif len(self._block) >= _BLOCK_BYTES:
            self._flush()

    def _flush(self) -> None:
        if self._file and self._block:
            self._file.write(self._block)
            self._pixels.update(self._block)
            block = torch.frombuffer(self._block, dtype=torch.uint8).view(-1, self._shape[0], self._numel_of_plane)
            self._sums += block.sum((0, 2), dtype=torch.int64)
            self._block = bytearray()

    @property
    def _numel_of_plane(self) -> int:
        return self._shape[1] * self._shape[2]

    def close(self) -> None:
        """Finish the current shard."""
        self._flush()
        if self._file:
            self._file.close()
        self._file = None

    def index(self) -> dict[str, object]:
        """The fields of index.json that describe the pixels."""
        mean = (self._sums / (self.count * self._numel_of_plane)).tolist()
        values = {"count": self.count, "shape": self._shape, "per_shard": self._per_shard}
        return values | {"pixels": self._pixels.hexdigest(), "mean": mean}
