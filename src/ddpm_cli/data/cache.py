"""The cache of decoded images and of what is computed from them: its location, its contents, and how to remove them.

packs/KEY/      decoded images. index.json describes them, and its modification time is their last use. A process that
                uses them holds a shared lock on it; see `pack.Pack`.
packs/.KEY.*    an unfinished pack: a process is writing it, or was killed.
locks/KEY       a file that a process locks while it makes or removes this pack.
statistics/     features of images that samples are compared with, by evaluation/reference.py.
extractors/     networks that were downloaded, by evaluation/fetch.py. In both, the modification time is the last use.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import time
from collections import defaultdict
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ddpm_cli.errors import LockedError
from ddpm_cli.files import lock, parse_json, read_bytes

__all__ = [
    "INDEX",
    "CachedFile",
    "CachedPack",
    "Outcome",
    "cache_folder",
    "extractors_folder",
    "list_files",
    "list_packs",
    "pack_folder",
    "pack_lock",
    "pack_sizes",
    "prune",
    "prune_files",
    "remove_all_unfinished",
    "remove_unfinished",
    "statistics_folder",
    "unfinished_bytes",
]

INDEX = "index.json"
_HOUR = 3600.0
_KEY = r"[0-9a-f]{32}"
_UNFINISHED = re.compile(rf"\.({_KEY})\.[0-9a-f]{{8}}\.(?:partial|old)")  # the names of files.new_directory


def cache_folder() -> Path:
    """$DDPM_CACHE_DIR, else ddpm/ in the user's cache folder."""
    if chosen := os.environ.get("DDPM_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"


def pack_folder(cache: Path, key: str) -> Path:
    return cache / "packs" / key


def statistics_folder(cache: Path) -> Path:
    """For the statistics of images that samples are compared with."""
    return cache / "statistics"


def extractors_folder(cache: Path) -> Path:
    """For networks that were downloaded."""
    return cache / "extractors"


def pack_lock(cache: Path, key: str) -> Path:
    return cache / "locks" / key


@dataclass(frozen=True)
class CachedFile:
    """A file of statistics or of an extractor. bytes: on disk. last_use: seconds since the epoch."""

    path: Path
    bytes: int
    last_use: float

    def unused(self, now: float) -> float:
        """Seconds since its last use; 0 if the clock of another machine is ahead."""
        return max(0.0, now - self.last_use)


def list_files(cache: Path) -> list[CachedFile]:
    """All statistics and extractors, also unfinished ones, the last used one first."""
    paths = [path for folder in (statistics_folder(cache), extractors_folder(cache)) for path in folder.glob("*")]
    found = [
        CachedFile(path, status.st_size, status.st_mtime)
        for path in paths
        if path.suffix != ".lock" and path.is_file() and not path.is_symlink() and (status := _status(path))
    ]
    return sorted(found, key=lambda file: file.last_use, reverse=True)


def prune_files(cache: Path, unused: float) -> list[CachedFile]:
    """Remove the statistics and extractors that were not used for `unused` seconds. Returns those that were removed.

    A process that has opened one can go on reading it. An unfinished one is left alone for an hour.
    """
    now = time.time()
    removed = []
    for file in list_files(cache):
        if file.unused(now) >= (max(unused, _HOUR) if file.path.name.startswith(".") else unused):
            with contextlib.suppress(OSError):
                file.path.unlink()
                removed.append(file)
    return removed


@dataclass(frozen=True)
class CachedPack:
    """Decoded images in the cache.

    bytes: on disk. last_use: seconds since the epoch. count: images. shape: (C, H, W). source: the address of the
    images. None: not known, since the pack is damaged or from an older version.
    """

    folder: Path
    bytes: int
    last_use: float
    count: int | None
    shape: tuple[int, int, int] | None
    source: str | None

    def unused(self, now: float) -> float:
        """Seconds since its last use; 0 if the clock of another machine is ahead."""
        return max(0.0, now - self.last_use)


def pack_sizes(cache: Path) -> dict[Path, int]:
    """The bytes of each pack, by its folder. A pack has few files, so this is quick."""
    return {path: _bytes_in(path) for path in _folders(cache) if re.fullmatch(_KEY, path.name)}


def list_packs(cache: Path) -> list[CachedPack]:
    """All packs, the last used one first."""
    found = [_describe(folder, size) for folder, size in pack_sizes(cache).items()]
    return sorted(found, key=lambda pack: pack.last_use, reverse=True)


def _describe(folder: Path, size: int) -> CachedPack:
    facts: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        values = parse_json(read_bytes(folder / INDEX))
        facts = values if isinstance(values, dict) else {}
    shape: tuple[int, int, int] | None = None
    match facts.get("shape"):
        case [int(channels), int(height), int(width)]:
            shape = (channels, height, width)
    count, source = facts.get("count"), facts.get("source")
    return CachedPack(
        folder,
        size,
        _last_change(folder / INDEX, folder),
        count if isinstance(count, int) else None,
        shape,
        source if isinstance(source, str) else None,
    )


def unfinished_bytes(cache: Path) -> int:
    """Bytes of all unfinished packs, including those that a process is writing."""
    return sum(_bytes_in(path) for paths in _unfinished(cache).values() for path in paths)


def remove_unfinished(cache: Path, key: str) -> int:
    """Remove the unfinished packs of a key. The caller must hold its `pack_lock`. Returns the bytes freed."""
    return sum(_remove(path) for path in _unfinished(cache)[key])


def remove_all_unfinished(cache: Path) -> int:
    """Remove all unfinished packs that no process is writing. Returns the bytes freed."""
    freed = 0
    for key in _unfinished(cache):
        with contextlib.suppress(LockedError), lock(pack_lock(cache, key), wait=False) as alone:
            freed += remove_unfinished(cache, key) if alone else 0
    return freed


class Outcome(Enum):
    """The result of `prune` for a pack."""

    REMOVED = "removed"
    RECENT = "recent"  # used too recently
    IN_USE = "in_use"  # read or made by a process now
    STUCK = "stuck"  # it cannot be removed, or it cannot be locked, so it may be in use


def prune(cache: Path, unused: float) -> dict[Outcome, list[CachedPack]]:
    """Remove the packs that no process has used for `unused` seconds. Returns all packs, by outcome."""
    now = time.time()
    packs: dict[Outcome, list[CachedPack]] = {outcome: [] for outcome in Outcome}
    for pack in list_packs(cache):
        packs[Outcome.RECENT if pack.unused(now) < unused else _remove_pack(cache, pack.folder)].append(pack)
    return packs


def _remove_pack(cache: Path, folder: Path) -> Outcome:
    """Remove a pack, unless a process uses it."""
    try:
        with (
            lock(pack_lock(cache, folder.name), wait=False) as not_made,
            lock(folder / INDEX, wait=False) as not_read,
        ):
            if not (not_made and not_read):
                return Outcome.STUCK
            # Rename it first: a pack is complete or missing, even if this process is killed.
            doomed = folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old"))
            _remove(doomed)
            return Outcome.STUCK if doomed.exists() else Outcome.REMOVED
    except LockedError:
        return Outcome.IN_USE
    except OSError:
        return Outcome.STUCK


def _remove(folder: Path) -> int:
    """Remove as much of a folder as possible. Returns the bytes freed."""
    before = _bytes_in(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return before - _bytes_in(folder)


def _unfinished(cache: Path) -> defaultdict[str, list[Path]]:
    """The folders of unfinished packs, by key."""
    found = defaultdict(list)
    for folder in _folders(cache):
        if match := _UNFINISHED.fullmatch(folder.name):
            found[match[1]].append(folder)
    return found


def _folders(cache: Path) -> list[Path]:
    return [path for path in (cache / "packs").glob("*") if path.is_dir() and not path.is_symlink()]


def _bytes_in(folder: Path) -> int:
    return sum(status.st_size for path in folder.glob("*") if (status := _status(path)))


def _last_change(*paths: Path) -> float:
    """The modification time of the first path that exists, else 0."""
    return next((status.st_mtime for path in paths if (status := _status(path))), 0.0)


def _status(path: Path) -> os.stat_result | None:
    """None if the file does not exist."""
    try:
        return path.stat()
    except OSError:
        return None
