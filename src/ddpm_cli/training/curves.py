"""The metrics of a run as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddpm_cli.data.plots import Chart
from ddpm_cli.errors import DataError
from ddpm_cli.files import read_bytes
from ddpm_cli.models.nearby import did_you_mean
from ddpm_cli.run_folder import METRICS
from ddpm_cli.training.metrics import read_line

__all__ = ["charts", "colours", "read_metrics"]


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, oldest first, without those that are damaged. Raises DataError."""
    path = run / METRICS
    try:
        lines = read_bytes(path).splitlines()
    except FileNotFoundError:
        if not run.exists():
            near = did_you_mean(str(run), Path("runs"))
            raise DataError(f"{run}: no such folder", near or "Give the folder of a run of ddpm train.") from None
        raise DataError(f"{run}: not a run of ddpm train (it has no metrics.jsonl)") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    found = [values for line in lines if (values := read_line(line))]
    if not found:
        raise DataError(f"{path}: has no lines yet", "The first one comes after a few steps.")
    return found


def charts(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """Loss (also by quarter of t), gradient norm, learning rate and speed over the steps."""
    steps = [line["step"] for line in lines]

    def curves(**names: str) -> dict[str, list[float | None]]:
        return {shown: [line.get(key) for line in lines] for shown, key in names.items()}

    quarters = {f"t {i}/4": [line.get(f"loss_q{i}") for line in lines] for i in (1, 2, 3, 4)}
    by_quarter = quarters if any(value is not None for values in quarters.values() for value in values) else {}
    return [
        Chart("loss", steps, curves(loss="loss") | by_quarter, log=True, over="step"),
        Chart("gradient norm", steps, curves(grad_norm="grad_norm"), log=True, over="step"),
        Chart("learning rate", steps, curves(lr="lr"), over="step"),
        Chart("images/s", steps, curves(speed="images_per_second"), over="step"),
    ]


def colours(lines: Sequence[Mapping[str, Any]]) -> list[Chart]:
    """The mean of each colour in the previews, beside that of the images. None without previews.

    A model that is not trained enough is off by the same colour in all of its samples.
    """
    drawn = [line for line in lines if all(key in line for key in ("mean", "raw_mean", "data_mean"))]
    names = {1: ["colour"], 3: ["red", "green", "blue"]}
    channels = min((len(line[key]) for line in drawn for key in ("mean", "raw_mean", "data_mean")), default=0)
    return [
        Chart(
            f"mean {name} of previews",
            [line["step"] for line in drawn],
            {shown: [line[key][i] for line in drawn] for shown, key in _WEIGHTS.items()},
            over="step",
        )
        for i, name in enumerate(names.get(channels, []))
    ]


_WEIGHTS = {"EMA": "mean", "raw": "raw_mean", "images": "data_mean"}
