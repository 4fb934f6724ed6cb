"""Writes a run's metrics and previews for TensorBoard; needs the extra `ddpm-cli[tensorboard]`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ddpm_cli.data import images
from ddpm_cli.errors import DataError, UsageError, reason
from ddpm_cli.training.events import Event, Logged, Previewed

__all__ = ["Board", "require_tensorboard"]


def require_tensorboard() -> Any:
    """The module torch.utils.tensorboard. Raises UsageError if tensorboard is not installed."""
    try:
        return importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise UsageError(
            "--tensorboard: needs the library tensorboard", "pip install 'ddpm-cli[tensorboard]'"
        ) from None


class Board:
    """Writes to RUN/tensorboard. Raises DataError if that fails."""

    def __init__(self, run: Path, step: int) -> None:
        """step: where the run continues. Values of later steps are hidden, since these steps will be done again."""
        self._folder = run / "tensorboard"
        try:
            self._writer = require_tensorboard().SummaryWriter(str(self._folder), purge_step=step + 1)
        except Exception as error:
            raise self._failure(error) from None

    def add(self, event: Event) -> None:
        """Write an event: fields of metrics.jsonl as curves, previews as images. Other events are ignored."""
        try:
            match event:
                case Logged(line=line):
                    for key, value in line.items():
                        for i, number in enumerate(value if isinstance(value, list) else [value]):
                            if number is not None and key != "step":
                                name = f"{key}/{i}" if isinstance(value, list) else key
                                self._writer.add_scalar(name, number, event.step)
                case Previewed():
                    for name, path in (("samples/ema", event.path), ("samples/raw", event.raw_path)):
                        picture = images.decode(path, path.name)
                        self._writer.add_image(name, images.from_pil(picture), event.step)
                case _:
                    return
            self._writer.flush()
        except Exception as error:  # an error of this library must not end a run
            raise self._failure(error) from None

    def close(self) -> None:
        """Write what is buffered, and close the files."""
        try:
            self._writer.close()
        except Exception as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> DataError:
        return DataError(f"{self._folder}: cannot be written ({reason(error)})")
