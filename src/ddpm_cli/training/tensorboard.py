"""A run's numbers and previews in TensorBoard, through the extra `ddpm-cli[tensorboard]`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ddpm_cli.data import images
from ddpm_cli.errors import DataError, UsageError
from ddpm_cli.training.events import Event, Logged, Previewed

__all__ = ["Board", "require_tensorboard"]


def require_tensorboard() -> Any:
    """The module that writes what TensorBoard reads. Raises UsageError if the library is not there."""
    try:
        return importlib.import_module("torch.utils.tensorboard")
    except ImportError:
        raise UsageError(
            "--tensorboard: needs the library tensorboard", "pip install 'ddpm-cli[tensorboard]'"
        ) from None


class Board:
    """Writes into RUN/tensorboard. Raises DataError when that cannot be written any more."""

    def __init__(self, run: Path, step: int) -> None:
        """step: where the run goes on; what was written of later steps is hidden, as they will be done again."""
        self._folder = run / "tensorboard"
        try:
            self._writer = require_tensorboard().SummaryWriter(str(self._folder), purge_step=step + 1)
        except Exception as error:
            raise self._failure(error) from None

    def add(self, event: Event) -> None:
        """Write what is to be seen of an event: the fields of a line of metrics.jsonl as curves, previews as images."""
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
        except Exception as error:  # of a library that nothing depends on
            raise self._failure(error) from None

    def close(self) -> None:
        """Write the rest."""
        try:
            self._writer.close()
        except Exception as error:
            raise self._failure(error) from None

    def _failure(self, error: Exception) -> DataError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return DataError(f"{self._folder}: cannot be written ({reason})")
