"""Reads and writes files and folders: writes are atomic, and errors name the file."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load, load_file
from torch import Tensor

from ddpm_cli.errors import DataError, LockedError, ModelError

__all__ = [
    "LOCK",
    "json_bytes",
    "load_tensors",
    "lock",
    "new_directory",
    "open_shared",
    "parse_json",
    "read_bytes",
    "read_config",
    "read_json",
    "remove_partials",
    "renew_file",
    "require_regular",
    "write_file",
]


LOCK = ".lock"  # the lock file of a folder that one command at a time may fill
_PARTIAL = ".ddpm-"  # prefix of the names of files that are being written


class _FromDict(Protocol):
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self: ...


_Config = TypeVar("_Config", bound=_FromDict)


def write_file(path: Path, data: bytes | memoryview, sync: bool = True) -> None:
    """Write a file atomically: under a temporary name in the same folder, which is then renamed. Creates the folder.

    Links are followed, and only regular files are replaced: a link may lead to a device. sync: wait until the file is
    on the disk. Without it, writing is many times faster, but a power failure may lose the file: use that for files
    that can be made again. Raises DataError.
    """
    partial = None
    try:
        path = _behind_links(path)
        with contextlib.suppress(FileNotFoundError):
            require_regular(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The name is chosen before the file exists, because Ctrl-C may come at any time.
        partial = path.with_name(f"{_PARTIAL}{secrets.token_hex(8)}")
        partial.write_bytes(data)
        if sync:
            _flush(partial)
        partial.replace(path)
        if sync:
            _flush(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if partial:
            partial.unlink(missing_ok=True)  # missing if all went well


def _behind_links(path: Path) -> Path:
    """Where a path leads: a link stays, and what it names is written. `Path.resolve` raises RuntimeError on a link to
    itself; here it is OSError, when the path is used."""
    return Path(os.path.realpath(path))


def renew_file(path: Path, data: bytes) -> None:
    """Write a file unless it has this content already, so that a full disk does not matter then."""
    try:
        same = read_bytes(path) == data
    except OSError:
        same = False
    if not same:
        write_file(path, data)


def remove_partials(folder: Path) -> None:
    """Remove the files that a killed process was writing in a folder."""
    for partial in folder.glob(f"{_PARTIAL}*"):
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A new folder to fill. It is renamed to `path` if the block succeeds, and removed if it fails.

    So a folder with its final name is always complete. An existing `path` is removed only after the new folder has
    replaced it. If the system can exchange two names in one step (Linux, on most file systems), a kill cannot break
    this. Elsewhere a process that is killed between two renames leaves the old folder as `.NAME.TOKEN.old`. The
    unfinished folder of a killed process is called `.NAME.TOKEN.partial`. Raises DataError.
    """
    path = _behind_links(path)
    if path == Path.cwd():
        raise DataError(f"{path}: is the folder you are in, which cannot be replaced", "Name another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # unique, so two processes never share it
    old = partial.with_suffix(".old")
    partial.mkdir()
    try:
        yield partial
        for part in partial.rglob("*"):
            _flush(part)
        _flush(partial)
        if not path.exists():
            partial.rename(path)
        elif not _exchange(partial, path):
            _replace(partial, path, old)
        _flush(path.parent)
    finally:
        if path.exists() or not old.exists():  # otherwise both may be needed
            for doomed in (partial, old):
                shutil.rmtree(doomed, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange the names of two folders in one step. False if the system cannot do that."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def _replace(new: Path, path: Path, old: Path) -> None:
    """Rename `path` to `old`, then `new` to `path`. If the second step fails, undo the first."""
    try:
        path.rename(old)
        new.rename(path)
    except BaseException:
        if old.exists() and not path.exists():
            try:
                old.rename(path)
            except OSError as error:
                raise DataError(
                    f"{path}: cannot be replaced ({error.strerror}). The old folder is now {old}, the new one is {new}",
                    f"Rename one of them to {path.name}.",
                ) from None
        raise


def _flush(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    with contextlib.suppress(*[OSError] if path.is_dir() else []):  # some file systems cannot do that for folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock in the block. Yields True, or False if the file system has no locks or the file cannot be created.

    path: the lock file. It is created and never deleted; only the lock (flock) counts, which ends with the process.
    wait: wait until the lock is free; else raises LockedError.
    """
    handle = None
    held = False
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            raise LockedError(f"{path}: another process has locked it") from None
        except OSError:
            pass
        yield held
    finally:
        if handle is not None:
            os.close(handle)


def open_shared(path: Path) -> int:
    """Open a file for reading, and keep `lock` from it until the handle is closed. Returns the handle.

    Waits while the file is locked. Where the file system has no locks, the file is only opened. Raises OSError if it is
    not a regular file, or was removed or replaced while its lock was waited for.
    """
    require_regular(path)
    handle = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_SH)
        if not os.path.samestat(os.fstat(handle), path.stat()):
            raise FileNotFoundError(errno.ENOENT, "was replaced", str(path))
    except BaseException:
        os.close(handle)
        raise
    return handle


def json_bytes(values: Mapping[str, Any]) -> bytes:
    """Indented JSON."""
    return json.dumps(values, indent=2).encode() + b"\n"


def require_regular(path: Path) -> None:
    """Raises OSError if a file is missing, or is a pipe or a device: reading these may never end."""
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "is a pipe or a device, not a file", str(path))


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises OSError; see `require_regular`."""
    require_regular(path)
    return path.read_bytes()


def parse_json(data: bytes) -> Any:
    """The value of JSON in UTF-8. Raises ValueError if it is not that, or is nested too deep."""
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ModelError, naming the file, if it is missing or not a JSON object."""
    try:
        values = parse_json(read_bytes(path))
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return values


def read_config(kind: type[_Config], path: Path) -> _Config:
    """Settings from their JSON file. Raises ModelError, naming the file, if they are not valid."""
    values = read_json(path)
    try:
        return kind.from_dict(values)
    except ModelError as error:
        raise ModelError(f"{path}: {error.message}", error.hint) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ModelError, naming it, if it cannot be read."""
    try:
        require_regular(path)
        try:
            str(path).encode()
        except UnicodeEncodeError:  # names may be any bytes, and safetensors opens only those in UTF-8
            return load(path.read_bytes())
        return load_file(path)
    except SafetensorError as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(12) == b"version http":  # a clone without Git LFS has this instead
                raise ModelError(f"{path}: is a pointer of Git LFS, not the weights", "git lfs pull") from None
        raise ModelError(f"{path}: cannot be read ({error})", "The file is damaged or incomplete.") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
