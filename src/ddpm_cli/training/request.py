"""What a user asks of a training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddpm_cli.data import images
from ddpm_cli.errors import UsageError
from ddpm_cli.names import FITS, check_name
from ddpm_cli.training.objective import check_names

__all__ = ["Request"]


@dataclass(frozen=True)
class Request:
    """The options of a run. The others are chosen from the images and the machine; a resumed run keeps its settings.

    images: folders, archives, lists, image files, or hf://org/name, see `data.sources.open_source`; - is a list on
    stdin. folder: the run's; None is runs/<name of the images>.
    data, train: fields of `DataConfig` and `TrainConfig`. objective: `objective.OPTIONS`. preset: a name in
    `presets.PRESETS`, or auto. start_from: the address of a model to fine-tune.
    resume: continue the run if it exists. force: rename an existing run and start over; with resume, accept other
    images. strict: raise an error for images that cannot be used, instead of leaving them out.
    """

    images: Sequence[str]
    folder: Path | None = None
    data: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    preset: str | None = None
    start_from: str | None = None
    resume: bool = False
    force: bool = False
    strict: bool = False
    objective: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raises UsageError for values that are not valid."""
        check_name("--fit", self.data.get("fit", "crop"), FITS)
        if not 0 < self.train.get("lr", 1.0) < math.inf:
            raise UsageError(f"--lr {self.train['lr']} is not a number above 0")
        if not 0 <= self.train.get("lr_decay", 0.0) <= 1:
            raise UsageError(f"--lr-decay {self.train['lr_decay']} is not a number from 0 to 1")
        if not 0 <= self.data.get("holdout", 0.0) < 1:
            raise UsageError(f"--holdout {self.data['holdout']} is not a number from 0 to below 1")
        check_names(self.objective, self.train.get("loss"))
        if "background" in self.data:
            images.check_background(self.data["background"])
