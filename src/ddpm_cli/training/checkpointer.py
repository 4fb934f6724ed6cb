"""Writes the checkpoints of a run in the background during training, and tries again if the disk fails."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ddpm_cli.config import RunConfig
from ddpm_cli.data.sources import name_of
from ddpm_cli.errors import DataError, TrainingError, reason
from ddpm_cli.models import pipeline, runs
from ddpm_cli.models.recipe import recipe
from ddpm_cli.training import checkpoint
from ddpm_cli.training.background import Background
from ddpm_cli.training.checkpoint import Checkpoint
from ddpm_cli.training.events import Event, NotSaved, Saved

__all__ = ["Saver"]

SAVE_SECONDS = 1800.0  # the longest time between checkpoints: at most half an hour of training can be lost
RETRY_SECONDS = 60.0  # until a failed checkpoint is tried again


class Saver:
    """Writes checkpoints of a run, one at a time.

    saved: the step of the newest one that is complete.
    """

    def __init__(self, run: Path, config: RunConfig, images: int) -> None:
        """images: the number of training images, for the model card."""
        self.saved = 0
        self._run = run
        self._config = config
        self._images = images
        self._work: Background[Path] = Background()
        self._begun = 0  # the step of the last one that was started
        self._due = time.monotonic() + SAVE_SECONDS

    @property
    def overdue(self) -> bool:
        """Whether a checkpoint is due by the clock."""
        return time.monotonic() > self._due

    def begin(self, snapshot: Checkpoint) -> None:
        """Start to write a checkpoint. The outcome of the previous one must have been taken."""
        self._begun, self._due = snapshot.step, math.inf
        self._work.start(lambda: self._write(snapshot))

    def _write(self, snapshot: Checkpoint) -> Path:
        if not all(bool(value.isfinite().all()) for value in (*snapshot.raw.values(), *snapshot.ema.values())):
            # Possible with finite gradients and a far too large --lr; the loss shows it only in the next step.
            raise TrainingError(f"the weights are not finite at step {snapshot.step}", "Try a smaller --lr.")
        return checkpoint.save_checkpoint(self._run, self._config, snapshot, self._recipe(snapshot.step))

    def _recipe(self, step: int) -> dict[str, Any]:
        images = self._config.data.images
        name = Path(images).name if isinstance(images, str) else name_of(images)
        name = os.fsencode(name).decode("utf-8", "replace")  # names may be any bytes
        return recipe(self._config, name, self._images, step)

    def outcome(self, wait: bool) -> Iterator[Event]:
        """The event of the checkpoint that is being written, if it is done. wait: until it is done."""
        match outcome := self._work.outcome(wait):
            case None:
                return
            case Path():
                self.saved, self._due = self._begun, time.monotonic() + SAVE_SECONDS
                yield Saved(self._begun, outcome)
            case OSError() | SafetensorError() | DataError():
                # A full or failing disk must not end a run whose state is in memory.
                self._due = time.monotonic() + RETRY_SECONDS
                yield NotSaved(self._begun, reason(outcome))
            case Exception():
                raise outcome

    def finish(self, step: int, snapshot: Callable[[], Checkpoint]) -> Iterator[Event]:
        """Write the last checkpoint of a run, unless it exists. Raises TrainingError if it cannot be written.

        If the run's folder is gone it is created again: this is the last chance to save the weights.
        """
        yield from self.outcome(wait=True)
        if step == self.saved:
            return
        try:
            if not self._run.is_dir():
                checkpoint.begin_run(self._run, self._config)
            yield Saved(step, self._write(snapshot()))
        except (OSError, SafetensorError, DataError) as error:
            kept = runs.checkpoints(self._run)
            hint = f"{kept[-1]} is safe: make room, and --resume continues from it." if kept else "Make room first."
            raise TrainingError(f"step {step} could not be saved ({reason(error)})", hint) from None

    def add_preview(self, step: int, picture: Path) -> Iterator[Event]:
        """Add a preview to the model card of the checkpoint of its step, if there is one."""
        if self._begun == step:
            yield from self.outcome(wait=True)
        folder = runs.checkpoint_folder(self._run, step)
        if folder.is_dir():
            config = self._config
            try:
                pipeline.add_preview(folder, config.unet, config.schedule, self._recipe(step), picture.read_bytes())
            except (OSError, DataError) as error:
                yield NotSaved(step, reason(error))
