"""The output and the input of commands: files, folders, pipes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from ddpm_cli.cli.console import Console
from ddpm_cli.errors import DataError, DDPMError, UsageError
from ddpm_cli.writable import why_not_writable

__all__ = ["Target", "check_scale", "deliver", "pick_target", "read_input"]


class Target(NamedTuple):
    """path: None for stdout. folder: whether the path is a folder, which may not exist yet."""

    path: Path | None
    folder: bool = False

    @property
    def suffix(self) -> str:
        return ".png" if self.path is None else self.path.suffix.lower()


def pick_target(
    output: str | None,
    default: str,
    suffixes: tuple[str, ...],
    console: Console,
    force: bool,
    folders: bool = False,
    goes_on: str | None = None,
    piped: bool = True,
) -> Target:
    """Decide where the result goes, before any work is done.

    output: the value of -o: `-` for stdout, a file, or (if `folders`) a folder, which ends in / or has no suffix.
    None: the file `default` at a terminal, with --json or if not `piped`, else stdout.
    suffixes: those that can be written. goes_on: a folder with a file of this name is continued.
    Raises UsageError if -o does not fit the command, DDPMError if the path exists or cannot be written.
    """
    named = f"-o {output}"
    if output is None and (console.as_json or sys.stdout.isatty() or not piped):
        named = output = default
    if output is None or output == "-":
        if console.as_json:
            raise UsageError("--json and -o - both write to stdout", "Give -o a file name.")
        if sys.stdout.isatty():
            raise UsageError("-o -: the result is not written to a terminal", "Give -o a file name, or use a pipe.")
        return Target(None)
    path = Path(output)
    if reason := why_not_writable(path.absolute().parent):
        raise DDPMError(f"{named}: {reason}", "Name another place with -o.")
    if folders and (output.endswith("/") or path.is_dir() or not path.suffix):
        if path.exists() and not path.is_dir():
            raise DDPMError(f"{named}: exists and is not a folder")
        begun = goes_on is not None and (path / goes_on).is_file()
        if path.is_dir() and any(path.iterdir()) and not force and not begun:
            raise DDPMError(
                f"{named}: the folder is not empty", "Name another folder, or use --force to overwrite files in it."
            )
        return Target(path, folder=True)
    if path.is_dir():
        raise UsageError(f"{named}: is a folder", "Give a file name with -o.")
    if path.suffix.lower() not in suffixes:
        raise UsageError(
            f"{named}: this command cannot write {path.suffix or 'a file without a suffix'}",
            f"Use {', '.join(suffixes)}{', a folder,' if folders else ''} or - for stdout.",
        )
    if path.exists() and not force:
        raise DDPMError(f"{named}: exists already", "Name another file with -o, or use --force to overwrite it.")
    return Target(path)


def check_scale(scale: int | None, target: Target, form: str = "png") -> None:
    """Raises UsageError if there is a scale, but no picture to draw. form: the value of --format."""
    exact = "a folder" if target.folder else "safetensors" if form == "safetensors" else target.suffix
    if scale is not None and exact in ("a folder", "safetensors", ".npz"):
        raise UsageError(f"--scale {scale}: {exact} has the exact pixels", "Leave it out, or write a .png.")


def deliver(target: Target, data: bytes, console: Console, **fields: object) -> None:
    """Write the bytes, and print the path as the result."""
    from ddpm_cli.files import write_file

    if target.path is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    else:
        write_file(target.path, data)
        console.result(str(target.path), output=str(target.path), **fields)


def read_input(name: str) -> tuple[bytes, str]:
    """The bytes of a file, or of stdin for `-`, and their name for messages. Raises DataError or UsageError."""
    if name == "-":
        if sys.stdin.isatty():
            raise UsageError("-: stdin is a terminal", "Give a file name, or use a pipe: cat image.png | ddpm …")
        data = sys.stdin.buffer.read()
        if not data:
            raise DataError("stdin is empty", "Did the command before the pipe fail?")
        return data, "stdin"
    try:
        return Path(name).read_bytes(), name
    except FileNotFoundError:
        raise DataError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{name}: is a folder, not an image") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read ({error.strerror})") from None
