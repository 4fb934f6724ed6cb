"""Files and folders that are there whole or not at all, and reading them with errors that name them."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ddpm_cli.errors import DataError, LockedError, ModelError

__all__ = [
    "LOCK",
    "PARTIAL",
    "json_bytes",
    "load_tensors",
    "lock",
    "new_directory",
    "read_config",
    "read_json",
    "renew_file",
    "write_file",
]


LOCK = ".lock"  # in a folder that only one command at a time may fill
PARTIAL = ".ddpm-"  # how the names of files begin that are being written


class _FromDict(Protocol):
    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self: ...


_Config = TypeVar("_Config", bound=_FromDict)


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: beside, then renamed into place. Makes its folder. Raises DataError."""
    partial = None
    try:
        path = path.resolve()  # a link is written through
        path.parent.mkdir(parents=True, exist_ok=True)
        # Known before it exists: Ctrl-C may come at any time.
        partial = path.with_name(f"{PARTIAL}{secrets.token_hex(8)}")
        partial.write_bytes(data)
        _flush(partial)
        partial.replace(path)
        _flush(path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        if partial:
            partial.unlink(missing_ok=True)  # gone already if all went well


def renew_file(path: Path, data: bytes) -> None:
    """`write_file`, unless that is in it already: a full disk does not matter then."""
    try:
        same = path.read_bytes() == data
    except OSError:
        same = False
    if not same:
        write_file(path, data)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A folder to fill, that gets its name `path` when the block ends well, and is removed when it does not.

    So a folder with a final name is complete, whatever happened while it was written. An existing `path` is moved
    aside when the new one is complete, and then removed. What a killed process leaves is called `.<name>.….partial`.
    """
    path = path.absolute()
    if path == Path.cwd():
        raise DataError(f"{path}: is the folder you are in, which cannot be replaced", "Name another folder.")
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)  # two processes must never fill one folder
    partial = path.with_name(f".{path.name}.{token}.partial")
    partial.mkdir()
    try:
        yield partial
        for part in partial.rglob("*"):
            _flush(part)
        _flush(partial)
        if path.exists():
            old = path.with_name(f".{path.name}.{token}.old")
            path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            partial.rename(path)
        _flush(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _flush(path: Path) -> None:
    """Have a file's bytes, or a folder's names, on the disk before going on: a rename must not outrun them."""
    with contextlib.suppress(*[OSError] if path.is_dir() else []):  # not every file system can do that with folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def lock(path: Path, wait: bool = True) -> Iterator[bool]:
    """Be the only process in the block. Gives True; or False where the file system has no locks, or no place for one.

    path: a file for the lock, which is made, and stays. The lock itself dies with its process, however that ends. wait:
    until it is free, or else raise LockedError.
    """
    handle = None
    held = False
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
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
    """JSON for people to read."""
    return json.dumps(values, indent=2).encode() + b"\n"


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelError, naming the file, if it is missing or no JSON object."""
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise ModelError(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from None
    if not isinstance(values, dict):
        raise ModelError(f"{path}: not a JSON object")
    return values


def read_config(kind: type[_Config], path: Path) -> _Config:
    """A configuration from its JSON file. Raises ModelError, naming the file, if it cannot be honoured."""
    try:
        return kind.from_dict(read_json(path))
    except ModelError as error:
        raise ModelError(f"{path}: {error.message.removeprefix(f'{path}: ')}", error.hint) from None
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
    ) as error:  # values of another kind than they should be
        raise ModelError(f"{path}: is damaged ({error})") from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ModelError, naming it, if it cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError), path.open("rb") as file:
            if file.read(12) == b"version http":  # what a clone without Git LFS has in the place of large files
                raise ModelError(f"{path}: is a pointer of Git LFS, not the weights", "git lfs pull") from None
        raise ModelError(f"{path}: cannot be read ({error})", "The file is damaged or incomplete.") from None
