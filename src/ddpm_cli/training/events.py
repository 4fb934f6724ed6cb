"""The events that a training run yields, for the command line and for callers of `train`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Event", "Finished", "Logged", "NotSaved", "Previewed", "Previewing", "Progress", "Saved"]


@dataclass(frozen=True)
class Progress:
    """Some steps were done. loss: the mean since the last line of metrics.jsonl.

    seconds_left: until the end of the run, with its previews, about.
    """

    step: int
    loss: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Logged:
    """A new line of metrics.jsonl. line: its fields, see `metrics.Window.line`."""

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
    """Previews were drawn from the averaged and the raw weights: the grids, and the mean colour of each.

    Means are per channel, in [0, 255]; `data` is that of the training images.
    samples: those from the averaged weights, (N, C, H, W) uint8.
    """

    step: int
    path: Path
    raw_path: Path
    mean: list[float]
    raw_mean: list[float]
    data: list[float]
    samples: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class NotSaved:
    """Something could not be written, for example to a full disk. goes_on: whether training continues and tries again;
    False for the last checkpoint of a run that an error ends."""

    step: int
    reason: str
    goes_on: bool = True


@dataclass(frozen=True)
class Finished:
    """The last event: all steps are done, or the run was asked to stop and has saved a checkpoint."""

    step: int
    interrupted: bool


Event = Progress | Logged | Previewing | Previewed | Saved | NotSaved | Finished
