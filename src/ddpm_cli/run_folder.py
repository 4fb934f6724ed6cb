"""The folder of a run: what `ddpm train` writes there, and how to know such a folder.

RUN/config.json, RUN/metrics.jsonl     the run's settings and its numbers
RUN/checkpoints/step-00010000/         a model directory with the averaged weights, and training/
RUN/samples/step-00010000.png          previews
RUN/eval/step-00010000/                the evaluation of a checkpoint, by `ddpm eval`
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["CHECKPOINTS", "CONFIG", "EVALUATIONS", "METRICS", "SAMPLES", "is_run"]

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
EVALUATIONS = "eval"


def is_run(folder: Path) -> bool:
    """Whether this is the folder of a run of `ddpm train`."""
    return (folder / CONFIG).is_file() and (folder / METRICS).is_file()
