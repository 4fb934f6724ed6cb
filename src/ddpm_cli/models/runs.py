"""The layout of a run's folder, and how to find its checkpoints. `ddpm train` writes it, every command reads it.

RUN/config.json, RUN/metrics.jsonl     the run's settings and its numbers
RUN/checkpoints/step-00010000/         a model directory with the averaged weights, and training/
RUN/samples/step-00010000.png          previews
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["checkpoint_folder", "checkpoints", "is_run", "newest_run", "step_of"]

_CHECKPOINT = re.compile(r"step-(\d{8,})")  # not a copy that a user made


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run of `ddpm train`."""
    return (folder / "config.json").is_file() and (folder / "metrics.jsonl").is_file()


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    paths = (run / "checkpoints").glob("step-*")
    found = [(int(m[1]), path) for path in paths if (m := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step of one of `checkpoints`."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_run(runs: Path, newest_file: Callable[[Path], Path | None]) -> Path | None:
    """The newest run under `runs`, by the time of `newest_file(run)`: a file, or None if the run does not count."""
    found = [(path.stat().st_mtime, run) for run in runs.glob("*") if (path := newest_file(run)) and path.exists()]
    return max(found)[1] if found else None
