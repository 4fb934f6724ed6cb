"""Finds runs, and the checkpoints, previews and evaluations in the folder of a run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ddpm_cli.run_folder import CHECKPOINTS, EVALUATIONS, SAMPLES

__all__ = ["checkpoint_folder", "checkpoints", "evaluations", "newest_run", "preview_file", "previews", "step_of"]

_CHECKPOINT = re.compile(r"step-(\d{8,})")  # not a copy that a user made
_PREVIEW = re.compile(r"step-(\d{8,})(-raw)?\.png")


def checkpoint_folder(run: Path, step: int) -> Path:
    """The folder of the checkpoint of a step."""
    return run / CHECKPOINTS / f"step-{step:08d}"


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return _by_step(run / CHECKPOINTS)


def evaluations(run: Path) -> list[Path]:
    """The folders of evaluations of a run's checkpoints, by step. Such a checkpoint may be removed since."""
    return _by_step(run / EVALUATIONS)


def _by_step(folder: Path) -> list[Path]:
    found = [(int(m[1]), path) for path in folder.glob("step-*") if (m := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def step_of(folder: Path) -> int:
    """The step of one of `checkpoints` or `evaluations`."""
    return int(folder.name.removeprefix("step-"))


def preview_file(run: Path, step: int, raw: bool = False) -> Path:
    """The preview of a step, from the averaged or from the raw weights."""
    return run / SAMPLES / f"step-{step:08d}{'-raw' if raw else ''}.png"


def previews(run: Path) -> list[tuple[int, Path]]:
    """The previews of a run from both kinds of weights, each with its step, oldest first."""
    paths = (run / SAMPLES).glob("step-*.png")
    return sorted((int(m[1]), path) for path in paths if (m := _PREVIEW.fullmatch(path.name)))


def newest_run(runs: Path, newest_file: Callable[[Path], Path | None]) -> Path | None:
    """The newest run under `runs`, by the time of `newest_file(run)`: a file, or None if the run does not count."""
    found = [(path.stat().st_mtime, run) for run in runs.glob("*") if (path := newest_file(run)) and path.exists()]
    return max(found)[1] if found else None
