"""What a terminal can show: which way of drawing pictures it knows, and how large its characters are."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import sys
import termios
import time
import tty
from collections.abc import Callable, Mapping
from typing import Literal

__all__ = ["Way", "cell_size", "has_sixel", "pick_way"]

Way = Literal["kitty", "iterm2", "sixel", "blocks"]

_SECONDS = 0.1  # for the terminal's answer
_USUAL_CELL = (8, 16)  # pixels; of terminals that do not know
_ANSWER = re.compile(rb"\x1b\[\?([0-9;]*)c")
_LONGEST = 256  # bytes to read in search of an answer


def pick_way(environ: Mapping[str, str], has_sixel: Callable[[], bool]) -> Way:
    """How to draw in this terminal: by its name in the environment, else by asking for sixel, else half blocks.

    tmux and screen keep the variables of the terminal that they were started in, but do not pass its pictures on. So
    in them only the answer counts, which is their own.
    """
    term, program = environ.get("TERM", ""), environ.get("TERM_PROGRAM", "")
    if "TMUX" not in environ and not term.startswith(("tmux", "screen")):
        if "KITTY_WINDOW_ID" in environ or term in ("xterm-kitty", "xterm-ghostty") or program == "ghostty":
            return "kitty"
        if program in ("iTerm.app", "WezTerm") or environ.get("LC_TERMINAL") == "iTerm2":
            return "iterm2"
    return "sixel" if has_sixel() else "blocks"


def has_sixel() -> bool:
    """Ask the terminal at stdin and stderr whether it draws sixels, for at most 100 ms. What is typed then is lost.

    It is not asked unless both streams are terminals and this process is in the foreground: in the background, changing
    the terminal's mode would stop the process.
    """
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    source = sys.stdin.fileno()
    try:
        if os.tcgetpgrp(source) != os.getpgrp():
            return False
        mode = termios.tcgetattr(source)
        try:
            tty.setcbreak(source, termios.TCSANOW)  # the answer has no line break, and must not be echoed
            os.write(sys.stderr.fileno(), b"\x1b[c")  # Primary Device Attributes (DA1)
            return answers_sixel(_reader(source))
        finally:
            termios.tcsetattr(source, termios.TCSANOW, mode)
    except (OSError, termios.error):
        return False


def _reader(source: int) -> Callable[[], bytes]:
    """Reads what is there, waiting for it; b"" when the time is over."""
    deadline = time.monotonic() + _SECONDS

    def read() -> bytes:
        left = deadline - time.monotonic()
        return os.read(source, 64) if left > 0 and select.select([source], [], [], left)[0] else b""

    return read


def answers_sixel(read: Callable[[], bytes]) -> bool:
    """Whether the answer to DA1 has the attribute 4, sixel. read: returns b"" at the end."""
    seen = b""
    while len(seen) < _LONGEST and (part := read()):
        seen += part
        if answer := _ANSWER.search(seen):
            return b"4" in answer[1].split(b";")[1:]  # the first number is the class of the terminal
    return False


def cell_size(terminal: int) -> tuple[int, int]:
    """Width and height of a character in pixels. terminal: a file descriptor."""
    try:
        size = fcntl.ioctl(terminal, termios.TIOCGWINSZ, bytes(8))
    except OSError:
        return _USUAL_CELL
    lines, columns, width, height = struct.unpack("HHHH", size)
    return (width // columns, height // lines) if min(lines, columns, width, height) > 0 else _USUAL_CELL
