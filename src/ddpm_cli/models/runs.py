"""Finds runs, and the checkpoints in the folder of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ddpm_cli.run_folder import CHECKPOINTS

__all__ = ["checkpoint_folder", "checkpoints", "newest_run", "step_of"]

_CHECKPOINT = re.compile(r"step-(\d{8,})")  # not a copy that a user made


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    paths = (run / CHECKPOINTS).glob("step-*")
    found = [(int(m[1]), path) for path in paths if (m := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(checkpoint: Path) -> int:
    """The step of one of `checkpoints`."""
    return int(checkpoint.name.removeprefix("step-"))


def newest_run(runs: Path, newest_file: Callable[[Path], Path | None]) -> Path | None:
    """The newest run under `runs`, by the time of `newest_file(run)`: a file, or None if the run does not count."""
    found = [(path.stat().st_mtime, run) for run in runs.glob("*") if (path := newest_file(run)) and path.exists()]
    return max(found)[1] if found else None
