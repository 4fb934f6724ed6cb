"""The cache of decoded images: where it is, what it holds, and what of it can be removed.

packs/KEY/      decoded images. index.json describes them, its time is that of their last use, and whoever uses them
                holds a shared lock on it; see `pack.Pack`.
packs/.KEY.*    what a process is writing, or was writing when it was killed.
locks/KEY       a file that is locked by a process that makes or removes this pack.
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
    "CachedPack",
    "Outcome",
    "cache_folder",
    "list_packs",
    "pack_folder",
    "pack_lock",
    "pack_sizes",
    "prune",
    "remove_all_unfinished",
    "remove_unfinished",
    "unfinished_bytes",
]

INDEX = "index.json"
_KEY = r"[0-9a-f]{32}"
_UNFINISHED = re.compile(rf"\.({_KEY})\.[0-9a-f]{{8}}\.(?:partial|old)")  # the names of files.new_directory


def cache_folder() -> Path:
    """$DDPM_CACHE_DIR, else ddpm/ in the user's cache folder."""
    if chosen := os.environ.get("DDPM_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"


def pack_folder(cache: Path, key: str) -> Path:
    return cache / "packs" / key


def pack_lock(cache: Path, key: str) -> Path:
    return cache / "locks" / key


@dataclass(frozen=True)
class CachedPack:
    """Decoded images in the cache.

    bytes: on disk. last_use: seconds since the epoch. count: images. shape: (C, H, W). source: the address of what was
    decoded. None: not known, since the pack is damaged or from an older version.
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
    """The folders of all decoded images, and their bytes. A pack has few files, so this is quick."""
    return {path: _bytes_in(path) for path in _folders(cache) if re.fullmatch(_KEY, path.name)}


def list_packs(cache: Path) -> list[CachedPack]:
    """All decoded images, the last used ones first."""
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
    """Bytes of what processes are writing, or were writing when they were killed."""
    return sum(_bytes_in(path) for paths in _unfinished(cache).values() for path in paths)


def remove_unfinished(cache: Path, key: str) -> int:
    """Remove what killed processes left of a pack. The caller must hold its `pack_lock`. Returns the bytes."""
    return sum(_remove(path) for path in _unfinished(cache)[key])


def remove_all_unfinished(cache: Path) -> int:
    """Remove what killed processes left, and nothing that one is writing now. Returns the bytes."""
    freed = 0
    for key in _unfinished(cache):
        with contextlib.suppress(LockedError), lock(pack_lock(cache, key), wait=False) as alone:
            freed += remove_unfinished(cache, key) if alone else 0
    return freed


class Outcome(Enum):
    """What becomes of a pack that is to be removed."""

    REMOVED = "removed"
    RECENT = "recent"  # used too recently
    IN_USE = "in_use"  # read or made by a process now
    STUCK = "stuck"  # it cannot be locked, so nobody knows whether it is used; or not be removed


def prune(cache: Path, unused: float) -> dict[Outcome, list[CachedPack]]:
    """Remove the packs that no process uses, and that none has used for `unused` seconds. Tells all packs' outcomes."""
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
            # Under another name first: a pack is whole or not there, even if this process is killed.
            doomed = folder.rename(folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.old"))
            _remove(doomed)
            return Outcome.STUCK if doomed.exists() else Outcome.REMOVED
    except LockedError:
        return Outcome.IN_USE
    except OSError:
        return Outcome.STUCK


def _remove(folder: Path) -> int:
    """Remove a folder as far as that is possible. Returns the bytes."""
    before = _bytes_in(folder)
    shutil.rmtree(folder, ignore_errors=True)
    return before - _bytes_in(folder)


def _unfinished(cache: Path) -> defaultdict[str, list[Path]]:
    """What is being written, or was when its process was killed, by the pack's key."""
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
    """The time of the first of these that is there."""
    return next((status.st_mtime for path in paths if (status := _status(path))), 0.0)


def _status(path: Path) -> os.stat_result | None:
    """None if there is no such file, or no longer."""
    try:
        return path.stat()
    except OSError:
        return None
