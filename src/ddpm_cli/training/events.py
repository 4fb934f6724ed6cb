"""What a training run tells whoever follows it; it prints nothing itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Event", "Finished", "Logged", "NotSaved", "Previewed", "Previewing", "Progress", "Saved"]


@dataclass(frozen=True)
class Progress:
    """Some steps were done. loss: the mean since the last line of metrics.jsonl."""

    step: int
    loss: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Logged:
    """A line of metrics.jsonl was due. line: its fields, see `metrics.Window.line`."""

    line: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.line["step"])


@dataclass(frozen=True)
class Previewing:
    """A preview is being drawn, which takes a while."""

    step: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class Previewed:
    """Samples were drawn, of the averaged weights and of the raw ones: the grids, and the mean colour of each.

    Means are of each channel, in [0, 255]; `data` is that of the training images.
    """

    step: int
    path: Path
    raw_path: Path
    mean: list[float]
    raw_mean: list[float]
    data: list[float]


@dataclass(frozen=True)
class NotSaved:
    """Something could not be written, for want of space or of a disk. goes_on: whether the training does, and tries
    again; or an error ends it, whose last checkpoint this was."""

    step: int
    reason: str
    goes_on: bool = True


@dataclass(frozen=True)
class Finished:
    """The last event: all steps are done, or the run was asked to stop and is safe."""

    step: int
    interrupted: bool


Event = Progress | Logged | Previewing | Previewed | Saved | NotSaved | Finished
