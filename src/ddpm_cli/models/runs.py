"""The layout of a run's folder, and how to find its checkpoints. `ddpm train` writes it, every command reads it.

RUN/config.json, RUN/metrics.jsonl     the run's settings and its numbers
RUN/checkpoints/step-00010000/         a model directory with the averaged weights, and training/
RUN/samples/step-00010000.png          previews; step-00010000-raw.png is drawn from the raw weights
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

__all__ = ["checkpoint_folder", "checkpoints", "is_run", "newest_run", "preview_file", "previews", "step_of"]

_CHECKPOINT = re.compile(r"step-(\d{8,})")  # not a copy that a user made
_PREVIEW = re.compile(r"step-(\d{8,})(-raw)?\.png")


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


def preview_file(run: Path, step: int, raw: bool = False) -> Path:
    """The preview of a step, from the averaged or from the raw weights."""
    return run / "samples" / f"step-{step:08d}{'-raw' if raw else ''}.png"


def previews(run: Path) -> list[tuple[int, Path]]:
    """The previews of a run from both kinds of weights, each with its step, oldest first."""
    paths = (run / "samples").glob("step-*.png")
    return sorted((int(m[1]), path) for path in paths if (m := _PREVIEW.fullmatch(path.name)))


def newest_run(runs: Path, newest_file: Callable[[Path], Path | None]) -> Path | None:
    """The newest run under `runs`, by the time of `newest_file(run)`: a file, or None if the run does not count."""
    found = [(path.stat().st_mtime, run) for run in runs.glob("*") if (path := newest_file(run)) and path.exists()]
    return max(found)[1] if found else None
