"""The one place that prints: results to stdout, everything else to stderr.

Names and settings may come from hostile files, so `safe` escapes all text before it is printed.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, cast

from rich.console import Console as RichConsole

from ddpm_cli.text import printable, safe

if TYPE_CHECKING:
    from ddpm_cli.cli.terminal import Way
    from ddpm_cli.cli.terminal_pictures import Draw

__all__ = ["Console", "aligned", "columns", "print_error"]

_SCHEMA = 1  # version of the JSON objects; it grows when a field changes its meaning


class _Stderr(io.TextIOBase):
    """sys.stderr, but a failed write does not end the run: after it, stderr is /dev/null.

    A write fails if the pipe or the terminal is closed, or the disk is full.
    """

    def __init__(self) -> None:
        self._file = sys.stderr  # stored, since rich replaces sys.stderr while it shows a progress bar

    def write(self, text: str) -> int:
        with self._forgiving():
            self._file.write(text)
        return len(text)

    def flush(self) -> None:
        with self._forgiving():
            self._file.flush()

    def close(self) -> None:
        """Leave sys.stderr as it is, which may be closed already when this object is collected."""

    @contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the rest of the buffer is written there

    def isatty(self) -> bool:
        return self._file.isatty()

    def fileno(self) -> int:
        return self._file.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._file.encoding


def _stderr() -> RichConsole:
    # soft_wrap: a path stays on one line, so that it can be copied. No markup or highlighting of users' file names.
    return RichConsole(file=cast(IO[str], _Stderr()), soft_wrap=True, markup=False, highlight=False, emoji=False)


def print_error(message: str, hint: str | None = None) -> None:
    """Print `Error: …` and `Hint: …` on stderr, with --quiet too."""
    console = _stderr()
    console.print("Error:", style="bold red", end=" ")
    console.print(safe(message))
    if hint:
        console.print("Hint:", style="bold", end=" ")
        console.print(safe(hint))


def aligned(rows: Mapping[str, str]) -> list[str]:
    """Rows of two columns, the first as wide as its widest entry."""
    return columns(list(rows.items()))


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of a table, each column as wide as its widest entry. Each row is one line: line breaks are escaped."""
    lines = [list(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]


class Console:
    """The output of one command.

    as_json: the result is one JSON object. quiet: only the result and errors are printed. preview: pictures are shown.
    """

    def __init__(self, command: str, as_json: bool, quiet: bool, preview: bool = False) -> None:
        self.command = command
        self.as_json = as_json
        self.quiet = quiet
        self._err = _stderr()
        self.width = self._err.width  # columns of the terminal
        self.live = self._err.is_terminal and not quiet  # whether progress bars are shown
        # The terminal is asked here, before there is a bar.
        self._way: Way | None = self._pick_way() if preview and not quiet else None

    def _pick_way(self) -> Way | None:
        """How pictures are shown in the terminal. If they cannot be, prints a note and returns None."""
        from ddpm_cli.cli.terminal import has_sixel, pick_way

        if not sys.stderr.isatty():
            self.warn("--preview: stderr is not a terminal, so no picture is shown")
            return None
        way = pick_way(os.environ, has_sixel)
        if way == "blocks" and (self._err.no_color or not self._err.color_system or self._err.encoding != "utf-8"):
            self.warn("--preview: this terminal shows no colours or no UTF-8, so no picture is shown")
            return None
        return way

    def show(self, draw: Draw) -> None:
        """Show a picture in the terminal, if the user wants previews. draw: draws it at a scale, None for the default.

        A terminal has another size than a file, so the scale is not the user's.
        """
        if self._way:
            from ddpm_cli.cli.terminal import cell_size
            from ddpm_cli.cli.terminal_pictures import Shown

            self._err.print(Shown(draw, self._way, cell_size(self._err.file.fileno())))

    def note(self, text: str = "", style: str | None = None) -> None:
        if not self.quiet:
            self._err.print(safe(text), style=style)

    def warn(self, text: str) -> None:
        self.note(f"Note: {text}", style="yellow")

    def table(self, rows: Mapping[str, str]) -> None:
        """Print notes in two columns."""
        for line in aligned(rows):
            self.note(f"  {line}")

    def result(self, text: str, **fields: Any) -> None:
        """Print the result on stdout: `text`, or with --json the fields as one JSON object."""
        if self.as_json:
            text = json.dumps({"schema": _SCHEMA, "command": self.command, **fields})
            text = text.replace("\x7f", r"\u007f")  # the one control character that JSON does not escape
        print(safe(text), flush=True)

    @contextmanager
    def bar(self, what: str, total: int | None, eta: bool = True) -> Iterator[Callable[..., None]]:
        """Show a progress bar if stderr is a terminal. Yields update(completed, what=…, total=…, status=…).

        eta: whether the bar estimates the time left; otherwise the status may contain it.
        Ctrl-C inside prints a note and is raised again.
        """
        try:
            with self._bar(what, total, eta) as update:
                yield update
        except KeyboardInterrupt:
            self.note(f"interrupted: {what}")
            raise

    @contextmanager
    def trial(self, what: str) -> Iterator[None]:
        """Show a bar, or print a line if there are no bars, for work that does not report its progress."""
        if not self.live:
            self.note(what)
        with self.bar(what, None):
            yield

    @contextmanager
    def progress(self, what: str) -> Iterator[Callable[[str, int, int | None], None]]:
        """Show a bar for work in several named parts. Yields update(what, done, total or None)."""
        with self.bar(what, None) as update:
            yield lambda what, done, total: update(done, what=what, total=total)

    @contextmanager
    def _bar(self, what: str, total: int | None, eta: bool) -> Iterator[Callable[..., None]]:
        if not self.live:
            yield lambda completed, **values: None
            return
        # Imported here: `--help` shows no bar, and must be fast.
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        from rich.table import Column

        bar = Progress(
            TextColumn("{task.fields[what]}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),  # so a narrow terminal shortens the bar first
            TextColumn("{task.fields[status]}", markup=False),
            *([TimeRemainingColumn()] if eta else []),
            console=self._err,
            expand=True,
            transient=True,
        )
        with bar:
            task = bar.add_task("", total=total, what=safe(what), status="")

            def update(completed: int, **values: Any) -> None:
                shown: dict[str, Any] = {
                    key: safe(value) if isinstance(value, str) else value for key, value in values.items()
                }
                bar.update(task, completed=completed, **shown)

            yield update
