"""The metrics of a training run: sums over steps, and the lines of metrics.jsonl."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddpm_cli.config import RunConfig
from ddpm_cli.distributed import World
from ddpm_cli.errors import TrainingError
from ddpm_cli.files import parse_json, read_bytes, renew_file
from ddpm_cli.training.events import Progress

__all__ = ["Done", "Window", "forget_after", "read_line"]


class Done(NamedTuple):
    """A training step: loss and t of each image on this rank, both (B,), and the gradient norm of the batch, ()."""

    losses: Tensor
    t: Tensor
    grad_norm: Tensor


class Window:
    """Sums since the last line of metrics.jsonl. They stay on the device until they are read.

    Each rank sums over its own images. All ranks must read the sums at the same step.
    """

    def __init__(
        self, config: RunConfig, run: Path, device: torch.device, world: World, step: int, seconds: float
    ) -> None:
        self._config = config
        self._run = run
        self._device = device
        self._world = world
        self._rate: float | None = None  # steps a second, smoothed
        self._seen = (step, seconds)
        self._reported = time.monotonic()
        self.reset(step, seconds)

    def reset(self, step: int, seconds: float) -> None:
        """Start new sums after `step` steps and `seconds` seconds of training."""
        self._start = (step, seconds)
        # The sum of the losses, the same by quarter of t, and the number of images in each quarter.
        self._loss = torch.zeros(1, device=self._device)
        self._by_t = torch.zeros(4, device=self._device)
        self._images = torch.zeros(4, device=self._device)
        self._grad_norm = torch.zeros((), device=self._device)
        self._bad = torch.full((2,), math.inf, device=self._device)  # first step with a bad loss, and a bad gradient

    def add(self, done: Done, step: int) -> None:
        """Add a step. step: its number, counted from 1."""
        loss = done.losses.sum()
        self._loss += loss
        self._grad_norm += done.grad_norm
        quarter = done.t * 4 // self._config.schedule.num_train_timesteps
        self._by_t.index_add_(0, quarter, done.losses)
        self._images.index_add_(0, quarter, torch.ones_like(done.losses))
        finite = torch.stack([loss, done.grad_norm]).isfinite()
        self._bad = torch.where(finite, self._bad, self._bad.clamp(max=step))

    def age(self) -> float:
        """Seconds since `progress` was last called."""
        return time.monotonic() - self._reported

    @property
    def sound(self) -> bool:
        """Whether all losses and gradients since the last line were finite."""
        return bool(self._bad.isinf().all())

    def check(self, step: int) -> None:
        """Raises TrainingError if a loss or a gradient was not finite."""
        if step > self._start[0]:
            self._means(step)

    def _means(self, step: int) -> tuple[float, float, list[float | None]]:
        """The means of the loss, of the gradient norm, and of the loss by quarter of t (None if it has no images).

        Raises TrainingError if they are not finite. The bad step changed no weights, but later steps were done since.
        """
        steps = step - self._start[0]
        sums = self._world.reduce_sum(torch.cat([self._loss, self._by_t, self._images])).tolist()
        loss = sums[0] / (steps * self._config.train.batch_size)
        grad_norm = self._grad_norm.item() / steps
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            bad_loss, bad_gradient = self._world.reduce_min(self._bad).tolist()
            cause = "loss" if bad_loss <= bad_gradient else "gradient"
            message = f"the {cause} is not finite at step {min(bad_loss, bad_gradient):.0f}"
            advice = "Try --precision fp32, or a new run with a smaller --lr."
            raise self._world.reported_once(TrainingError(message, advice))
        return loss, grad_norm, [sum_ / n if n else None for sum_, n in zip(sums[1:5], sums[5:], strict=True)]

    def progress(self, step: int, seconds: float, previews: float) -> Progress:
        """The progress after `step` steps and `seconds` seconds of training. previews: their share of the time."""
        rate = (step - self._seen[0]) / max(seconds - self._seen[1], 1e-9)
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        self._seen = (step, seconds)
        self._reported = time.monotonic()
        settings = self._config.train
        return Progress(
            step=step,
            loss=self._means(step)[0],
            images_per_second=self._rate * settings.batch_size,
            seconds_left=(settings.steps - step) / self._rate / (1 - previews),
        )

    def line(self, step: int, seconds: float, lr: float) -> dict[str, Any]:
        """A line of metrics.jsonl. loss_q1..4: the loss by quarter of t, least noise first."""
        loss, grad_norm, by_t = self._means(step)
        rate = (step - self._start[0]) / max(seconds - self._start[1], 1e-9)
        return {
            "step": step,
            "loss": round(loss, 6),
            **{f"loss_q{i}": None if mean is None else round(mean, 6) for i, mean in enumerate(by_t, 1)},
            "lr": lr,
            "grad_norm": round(grad_norm, 6),
            "images_per_second": round(rate * self._config.train.batch_size, 2),
            "seconds": round(seconds, 3),
        }


def forget_after(path: Path, step: int) -> None:
    """Remove lines of metrics.jsonl after `step`, since these steps will be done again, and damaged lines.

    A file that cannot be read is left unchanged: that costs the curves, but not the run.
    """
    try:
        lines = read_bytes(path).splitlines(keepends=True)
    except OSError:
        return
    kept = [line for line in lines if (values := read_line(line)) and values["step"] <= step]
    renew_file(path, b"".join(line.rstrip(b"\r\n") + b"\n" for line in kept))


_NUMBERS = ("loss", "loss_q1", "loss_q2", "loss_q3", "loss_q4", "lr", "grad_norm", "images_per_second", "seconds")
_COLOURS = ("mean", "raw_mean", "data_mean")  # of previews: a number for each channel


def read_line(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl: its step and its valid values. None if it is damaged or has no step."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    if not isinstance(values, dict) or type(step := values.get("step")) is not int or not 0 < step <= 10**12:
        return None
    found = {key: value if _is_sound(value) else None for key, value in values.items() if key in _NUMBERS}
    colours = {
        key: value
        for key, value in values.items()
        if key in _COLOURS and isinstance(value, list) and len(value) in (1, 3) and all(map(_is_sound, value))
    }
    return {"step": step, **found, **colours}


def _is_sound(value: object) -> bool:
    """Whether a value is a number that a run can write: all of them are 0 or more."""
    return type(value) in (int, float) and (value == 0 or 1e-30 <= value <= 1e30)  # type: ignore[operator]
