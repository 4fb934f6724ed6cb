"""Lists of paths, in files and from pipes."""

from __future__ import annotations

import os
import re
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ddpm_cli.errors import DataError, UsageError

__all__ = ["Listed", "could_be_list", "is_stream", "list_bytes", "parse_list", "read_stream", "read_streams"]

STDIN = "-"
_HINT = "Did the command before the pipe fail?"


def could_be_list(file: Path) -> bool:
    """Whether a file may be a list: it has no NULs, or paths that end with a NUL, of which the first one exists."""
    with file.open("rb") as opened:
        first, *more = opened.read(2**16).split(b"\0", 1)
    return not more or os.path.isfile(file.parent / os.fsdecode(first))  # noqa: PTH113  the path may be any bytes


def parse_list(data: bytes) -> list[str]:
    """The paths in a list: one per line, or with a NUL after each, as `find -print0` writes them.

    In lines, spaces around a path are ignored, and so are empty lines and lines that begin with #. With NULs, a path
    may have any characters.
    """
    if b"\0" in data:
        return [os.fsdecode(path) for path in data.split(b"\0") if path]
    lines = re.split(r"\r\n?|\n", data.decode("utf-8-sig", "surrogateescape"))
    return [path for line in lines if (path := line.strip()) and not path.startswith("#")]


def list_bytes(paths: Sequence[str]) -> bytes:
    """A list that `parse_list` reads: one path per line if possible, else with NULs."""
    lines = "".join(f"{path}\n" for path in paths).encode("utf-8", "surrogateescape")
    return lines if parse_list(lines) == list(paths) else b"".join(os.fsencode(path) + b"\0" for path in paths)


@dataclass(frozen=True)
class Listed:
    """The contents of a list that can be read only once.

    path: the list's name in messages. names: absolute paths. address: of a file that will hold the list.
    """

    path: str
    names: list[str]
    address: str


def is_stream(path: str) -> bool:
    """Whether a path is a list that can be read only once: - for stdin, a FIFO, or a pipe in /dev/fd."""
    try:
        return path == STDIN or stat.S_ISFIFO(Path(path).stat().st_mode)
    except (OSError, ValueError):
        return False


def read_stream(path: str, address: str) -> Listed:
    """Read a list to its end. Relative paths in it start at the current folder. Raises DataError or UsageError."""
    try:
        name, data = ("stdin", _read_stdin()) if path == STDIN else (path, Path(path).read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    here = Path.cwd()
    names = [str(here / path) for path in parse_list(data)]
    if not names:
        raise DataError(f"{name}: no paths in it", _HINT)
    return Listed(name, names, address)


def read_streams(paths: Sequence[str | Listed]) -> list[str | Listed]:
    """The paths, with the contents of those that can be read only once, see `read_stream`."""
    return [read_stream(path, path) if isinstance(path, str) and is_stream(path) else path for path in paths]


def _read_stdin() -> bytes:
    if sys.stdin is None:  # it was closed
        raise DataError("-: stdin is closed", "Use a pipe: find photos -name '*.jpg' | ddpm train -")
    if sys.stdin.isatty():
        raise UsageError("-: stdin is a terminal", "Use a pipe: find photos -name '*.jpg' | ddpm train -")
    return sys.stdin.buffer.read()
