"""The models that are installed with ddpm, for a first picture without training and without a network."""

from __future__ import annotations

from pathlib import Path

from ddpm_cli.errors import ModelError

__all__ = ["DEFAULT", "PREFIX", "bundled_models", "find_bundled"]

PREFIX = "bundled:"  # of their addresses; neither a folder nor a name on the Hub begins like this
DEFAULT = f"{PREFIX}digits"

_FOLDER = Path(__file__).parent.parent / "bundled"


def bundled_models() -> list[str]:
    """Their addresses."""
    return sorted(PREFIX + path.name for path in _FOLDER.glob("*") if path.is_dir())


def find_bundled(address: str) -> Path:
    """The folder of the model at an address that begins with `PREFIX`. Raises ModelError if there is no such model."""
    if address not in (known := bundled_models()):
        hint = f"There is {' and '.join(known)}." if known else "This copy of ddpm has none: install it again."
        raise ModelError(f"{address}: no such model comes with ddpm", hint)
    return _FOLDER / address.removeprefix(PREFIX)
