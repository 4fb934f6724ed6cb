"""Text for people: safe to print, with numbers in readable units."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["and_more", "counted", "duration", "in_bytes", "printable", "safe"]

_DAY = 86_400  # seconds


def safe(text: str) -> str:
    """Text of several lines with its control characters escaped, so that a terminal does not act on them."""
    return "\n".join(map(printable, text.split("\n")))


def printable(text: str) -> str:
    """Text on one line, safe for every file and terminal: line breaks, escape codes and stray bytes are written as
    `\\n`, `\\x1b` and the like."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def and_more(names: Sequence[str]) -> str:
    """The first of several names, and how many follow: `cats and 2 more`."""
    first, *rest = names
    return f"{first} and {len(rest)} more" if rest else first


def counted(count: int, name: str) -> str:
    """A number of things: `1 image`, `2 images`."""
    return f"{count} {name}{'' if count == 1 else 's'}"


def in_bytes(count: float) -> str:
    """A number of bytes in units: 3.2 kB, 45.1 MB, 1.7 GB."""
    for size, unit in ((1e9, "GB"), (1e5, "MB")):
        if count >= size:
            return f"{count / {'GB': 1e9, 'MB': 1e6}[unit]:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"


def duration(seconds: float) -> str:
    """A time in hours, minutes and seconds, 1:02:03, or from two days on in days."""
    if seconds >= 2 * _DAY:
        return f"{seconds / _DAY:.0f} days"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
