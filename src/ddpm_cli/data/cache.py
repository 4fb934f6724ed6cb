"""The cache of decoded images."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """$DDPM_CACHE_DIR, else ddpm/ in the user's cache folder."""
    if chosen := os.environ.get("DDPM_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ddpm"
