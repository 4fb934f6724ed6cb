"""Whether a folder can be written to: asked before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["why_not_writable"]


def why_not_writable(folder: Path) -> str | None:
    """Why nothing can be written into a folder, which may be missing; None if it seems possible."""
    path = folder.absolute()
    there = next((place for place in (path, *path.parents) if place.exists()), Path("/"))
    if not there.is_dir():
        return f"{there} is not a folder"
    return None if os.access(there, os.W_OK | os.X_OK) else f"{there} is not writable"
