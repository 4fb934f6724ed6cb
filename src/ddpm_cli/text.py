"""Text for people: safe to print, and numbers in words."""

from __future__ import annotations

__all__ = ["in_bytes", "printable", "safe"]


def safe(text: str) -> str:
    """Text of several lines without the control characters that a terminal would obey."""
    return "\n".join(map(printable, text.split("\n")))


def printable(text: str) -> str:
    """Text in one line that any file and terminal takes: names may hold line breaks, escape codes, stray bytes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def in_bytes(count: float) -> str:
    """A number of bytes in words: 3.2 kB, 45.1 MB, 1.7 GB."""
    for size, unit in ((1e9, "GB"), (1e5, "MB")):
        if count >= size:
            return f"{count / {'GB': 1e9, 'MB': 1e6}[unit]:.1f} {unit}"
    return f"{count / 1e3:.1f} kB"
