"""Files and folders that are written whole or not at all, and read with errors that name them."""

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
    "parse_json",
    "read_bytes",
    "read_config",
    "read_json",
    "remove_partials",
    "renew_file",
    "require_regular",
    "write_file",
]


LOCK = ".lock"  # the file that is locked in a folder which only one command at a time may fill
_PARTIAL = ".ddpm-"  # the beginning of the names of files that are being written


class _FromDict(Protocol):
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self: ...


_Config = TypeVar("_Config", bound=_FromDict)


def write_file(path: Path, data: bytes, sync: bool = True) -> None:
    """Write a file whole or not at all: under another name in the same folder, then renamed. Makes the folder.

    Links are followed, and nothing but a file is replaced: a link may lead to a device. sync: wait until the file is
    safe on the disk. Without it a power failure may lose the file, which is right for what can be made again, and many
    times faster. Raises DataError.
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
            partial.unlink(missing_ok=True)  # it is gone already if all went well


def _behind_links(path: Path) -> Path:
    """Where a path leads: a link stays, and what it names is written. `Path.resolve` raises RuntimeError on a link to
    itself; here it is OSError, when the path is used."""
    return Path(os.path.realpath(path))


def renew_file(path: Path, data: bytes) -> None:
    """Write a file, unless it has this content already: then a full disk does not matter."""
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
    """A new folder to fill. It gets the name `path` when the block ends well, and is removed when it does not.

    So a folder with its final name is always complete. An existing `path` is replaced, and removed only when the new
    one is in its place. Where the system can exchange two names in one step (Linux, on most file systems), this holds
    for killed processes too. Elsewhere a process that is killed between two renames leaves the old folder under the
    name `.NAME.TOKEN.old`. What a killed process was writing is called `.NAME.TOKEN.partial`. Raises DataError.
    """
    path = _behind_links(path)
    if path == Path.cwd():
        raise DataError(f"{path}: is the folder you are in, which cannot be replaced", "Name another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")  # two processes never fill one folder
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
    """Give two folders each other's name, in one step. False where the system cannot do that."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0)


def _replace(new: Path, path: Path, old: Path) -> None:
    """Give a folder the name `path` in two steps; the one that has it gets the name `old`, or keeps its name."""
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
    with contextlib.suppress(*[OSError] if path.is_dir() else []):  # not every file system can do that with folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Be the only process in the block. Gives True; False where the file system has no locks or takes no new file.

    path: a file to lock. It is made, and never removed; only the lock on it counts, which ends with the process. wait:
    until the lock is free; otherwise raise LockedError.
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
    """Raises ValueError on what is not JSON in UTF-8, or is nested too deep."""
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelError, naming the file, if it is missing or is not a JSON object."""
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
    """Settings from their JSON file. Raises ModelError, naming the file, if they cannot be used."""
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
            if file.read(12) == b"version http":  # what a clone without Git LFS has in the place of large files
                raise ModelError(f"{path}: is a pointer of Git LFS, not the weights", "git lfs pull") from None
        raise ModelError(f"{path}: cannot be read ({error})", "The file is damaged or incomplete.") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from None
