"""Compares what was downloaded from the Hugging Face Hub with the hashes that the Hub lists."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from ddpm_cli.data.cache import cache_folder
from ddpm_cli.errors import DataError, ModelError
from ddpm_cli.files import read_bytes, require_regular, write_file

__all__ = ["verify"]


def verify(folder: Path, names: Sequence[str]) -> None:
    """Compare files of the Hub's cache with their hashes, which huggingface_hub downloads but does not check.

    The cache names a file after its hash and links to it: the SHA-256 of large files, git's SHA-1 of small ones. A
    large file is hashed once; later only its size, times and inode are compared with those at that time.
    If a hash differs, the file is removed, and ModelError is raised.
    """
    for name in names:
        path = folder / name
        if not path.is_symlink():  # a system without links: the hash is not known
            continue
        blob = path.parent / path.readlink()
        if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", blob.name):
            continue
        large = len(blob.name) == 64
        record = cache_folder() / "verified" / blob.name
        stamp = _stamp(blob)
        if large and _recorded(record) == stamp:
            continue
        digest = hashlib.sha256() if large else hashlib.sha1(f"blob {blob.stat().st_size}\0".encode())
        with blob.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        if digest.hexdigest() != blob.name:
            stored = path.resolve()  # the blob, or what it links to in a store that repositories share
            for doomed in (path, blob, stored):
                doomed.unlink(missing_ok=True)
            raise ModelError(
                f"{name}: the download does not have the hash that the Hub lists",
                "It was damaged, and has been removed. Try again.",
            )
        if large:
            with contextlib.suppress(DataError):  # a cache that cannot be written only costs time
                write_file(record, stamp, sync=False)


def _stamp(blob: Path) -> bytes:
    """Values that change if a file is written or replaced. Raises OSError if it is gone."""
    require_regular(blob)
    status = blob.stat()
    values = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return " ".join(map(str, values)).encode()


def _recorded(record: Path) -> bytes | None:
    with contextlib.suppress(OSError):
        return read_bytes(record)
    return None
