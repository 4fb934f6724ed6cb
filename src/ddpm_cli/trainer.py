"""The training loop (Algorithm 1). It writes the run's files and yields events; it prints nothing."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor

from ddpm_cli import checkpoint, images
from ddpm_cli.about import recipe
from ddpm_cli.config import RunConfig
from ddpm_cli.dataset import Batches, Pack
from ddpm_cli.device import ImageNoise, autocast, memory_format, place, seed_everything, synchronize
from ddpm_cli.ema import EMA
from ddpm_cli.errors import DataError, ModelError, TrainingError
from ddpm_cli.files import new_directory, write_file
from ddpm_cli.model import DDPM
from ddpm_cli.objective import training_loss
from ddpm_cli.schedule import NoiseSchedule
from ddpm_cli.unet import UNet

__all__ = ["Event", "Finished", "NotSaved", "Previewing", "Progress", "Saved", "Trainer"]

PREVIEW_IMAGES = 16
PREVIEW_STEPS = 100  # of the sampler: enough to judge by, a tenth of the time
SAVE_SECONDS = 1800.0  # a checkpoint at least this often, however slow the machine: half an hour is what can be lost
RETRY_SECONDS = 60.0  # after a checkpoint could not be written
_EVENT_SECONDS = 0.25


@dataclass(frozen=True)
class Progress:
    """Some steps were done. loss: the mean since the last line of metrics.jsonl."""

    step: int
    loss: float
    images_per_second: float
    seconds_left: float


@dataclass(frozen=True)
class Previewing:
    """A preview is being drawn, which takes a while."""

    step: int


@dataclass(frozen=True)
class Saved:
    """A checkpoint or a preview is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True)
class NotSaved:
    """Something could not be written, for want of space or of a disk; training goes on, and tries again."""

    step: int
    reason: str


@dataclass(frozen=True)
class Finished:
    """The last event: all steps are done, or the run was asked to stop and is safe."""

    step: int
    interrupted: bool


Event = Progress | Previewing | Saved | NotSaved | Finished


def _step_of(line: str) -> float:
    """The step of a line of metrics.jsonl; a line that was cut off belongs to no step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class _Done(NamedTuple):
    """A training step: the loss of each image and its t, both (B,), and the norm of the gradient before clipping."""

    losses: Tensor
    t: Tensor
    grad_norm: Tensor


class _Window:
    """Means since the last line of metrics.jsonl. The sums stay on the device until somebody looks at them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._rate: float | None = None  # steps a second, smoothed
        self._seen = (trainer.step, trainer.seconds)
        self._looked = time.monotonic()
        self.reset()

    def reset(self) -> None:
        self._start = (self._trainer.step, self._trainer.seconds)
        device = self._trainer.device
        self._loss = torch.zeros((), device=device)
        self._grad_norm = torch.zeros((), device=device)
        self._by_t = torch.zeros(4, device=device)  # losses of the images with t in each quarter
        self._images = torch.zeros(4, device=device)  # and how many they were
        self._bad = torch.full((2,), math.inf, device=device)  # the first step with a bad loss, and a bad gradient

    def add(self, done: _Done) -> None:
        loss = done.losses.mean()
        self._loss += loss
        self._grad_norm += done.grad_norm
        quarter = done.t * 4 // self._trainer.schedule.T
        self._by_t.index_add_(0, quarter, done.losses)
        self._images.index_add_(0, quarter, torch.ones_like(done.losses))
        finite = torch.stack([loss, done.grad_norm]).isfinite()
        self._bad = torch.where(finite, self._bad, self._bad.clamp(max=self._trainer.step))

    def age(self) -> float:
        """Seconds since `progress` was last called."""
        return time.monotonic() - self._looked

    def check(self) -> None:
        """Raises TrainingError if a loss or a gradient was not finite, as the weights are not any more then."""
        if self._trainer.step > self._start[0]:
            self._means()

    def _means(self) -> tuple[float, float]:
        """Raises TrainingError if they are not finite: the weights are lost, the last checkpoint is not."""
        trainer = self._trainer
        steps = trainer.step - self._start[0]
        loss, grad_norm = self._loss.item() / steps, self._grad_norm.item() / steps
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            bad_loss, bad_gradient = self._bad.tolist()
            cause = "loss" if bad_loss <= bad_gradient else "gradient"
            kept = checkpoint.checkpoints(trainer.run)
            raise TrainingError(
                f"the {cause} is not finite at step {min(bad_loss, bad_gradient):.0f}",
                (f"{kept[-1]} is safe: --resume goes on from there. " if kept else "")
                + "Try --precision fp32, or a new run with a smaller --lr.",
            )
        return loss, grad_norm

    def progress(self) -> Progress:
        trainer = self._trainer
        step, seconds = self._seen
        rate = (trainer.step - step) / max(trainer.seconds - seconds, 1e-9)
        self._rate = rate if self._rate is None else 0.9 * self._rate + 0.1 * rate
        self._seen = (trainer.step, trainer.seconds)
        self._looked = time.monotonic()
        settings = trainer.config.train
        return Progress(
            step=trainer.step,
            loss=self._means()[0],
            images_per_second=self._rate * settings.batch_size,
            seconds_left=(settings.steps - trainer.step) / self._rate,
        )

    def line(self, lr: float) -> dict[str, float | None]:
        """A line of metrics.jsonl. loss_q1..4: of the images whose t was in that quarter, least noise first."""
        trainer = self._trainer
        loss, grad_norm = self._means()
        quarters = zip(self._by_t.tolist(), self._images.tolist(), strict=True)
        step, seconds = self._start
        rate = (trainer.step - step) / max(trainer.seconds - seconds, 1e-9)
        return {
            "step": trainer.step,
            "loss": round(loss, 6),
            **{f"loss_q{i}": round(sum_ / n, 6) if n else None for i, (sum_, n) in enumerate(quarters, 1)},
            "lr": lr,
            "grad_norm": round(grad_norm, 6),
            "images_per_second": round(rate * trainer.config.train.batch_size, 2),
            "seconds": round(trainer.seconds, 3),
        }


class Trainer:
    """One run: its networks, its optimiser, its folder. Everything random in step k depends on (seed, k) alone."""

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        pack: Pack,
        device: torch.device,
        dtype: torch.dtype,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Start from the weights of a model, or from fresh ones.

        dtype: of the matrix products; weights, averages and the optimiser are float32.
        """
        self.run = run
        self.config = config
        self.pack = pack
        self.device = device
        self.dtype = dtype
        self.step = 0  # steps done
        self.seconds = 0.0  # spent in them
        self.schedule = NoiseSchedule.from_config(config.schedule)
        self.batches = Batches(len(pack), config.train.batch_size, config.train.seed)

        seed_everything(config.train.seed, -1)  # the step before the first
        unet = UNet(config.unet)
        if weights is None:
            unet.reset_parameters()
        else:
            unet.load_state_dict(weights)
        self.unet = place(unet, device).train()
        averaged = UNet(config.unet)
        averaged.load_state_dict(unet.state_dict())
        self.averaged = place(averaged, device).eval().requires_grad_(False)
        self.parameters = list(self.unet.parameters())
        self.ema = EMA(self.averaged.parameters(), config.train.ema_decay)
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.train.lr, fused=True)

    def resume(self, folder: Path) -> str:
        """Go on from a checkpoint. Returns the fingerprint of the images it was trained on.

        Raises ModelError if it is damaged.
        """
        saved = checkpoint.load_training(folder)
        try:
            self.unet.load_state_dict(saved.raw)
            self.averaged.load_state_dict(saved.ema)
            self._restore_optimizer(saved.optimizer)
        except (KeyError, RuntimeError) as error:
            raise ModelError(f"{folder}: does not belong to the configuration of its run ({error})") from None
        self.ema.updates = saved.ema_updates
        self.step = saved.step
        self.seconds = saved.seconds
        return saved.images

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        state = {}
        for i, (name, parameter) in enumerate(self.unet.named_parameters()):
            # Like the parameter in its memory format too, which the fused kernels want.
            moments = {
                key: torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"]) for key in ("exp_avg", "exp_avg_sq")
            }
            state[i] = moments | {"step": tensors[f"step.{name}"]}
        self.optimizer.load_state_dict({"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]})

    def _forget_later_metrics(self) -> None:
        """Drop the lines of steps that will be done again."""
        path = self.run / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step_of(line) <= self.step]
            write_file(path, "".join(f"{line}\n" for line in lines).encode())

    def train_step(self) -> _Done:
        """One pass of Algorithm 1's loop, and the average of Section 4."""
        settings = self.config.train
        seed_everything(settings.seed, self.step)
        batch = self.pack[self.batches[self.step]]
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        x_0 = images.to_float(batch.to(self.device, non_blocking=True, memory_format=memory_format(self.device)))
        if self.config.data.flip:
            mirrored = torch.rand(len(x_0), 1, 1, 1, device=self.device) < 0.5
            x_0 = torch.where(mirrored, x_0.flip(3), x_0)
        t = torch.randint(self.schedule.T, (len(x_0),), device=self.device)
        eps = torch.randn_like(x_0)

        self.optimizer.zero_grad(set_to_none=True)
        losses = []
        # The gradient of the whole batch, from parts of it that fit into memory: what is drawn does not depend on them.
        parts = zip(*(whole.chunk(settings.accumulate) for whole in (x_0, t, eps)), strict=True)
        for part in parts:
            with autocast(self.device, self.dtype):
                loss = training_loss(self.unet, self.schedule, *part)
            (loss.sum() / len(x_0)).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.grad_clip)
        self.optimizer.param_groups[0]["lr"] = self._lr()
        self.optimizer.step()
        self.ema.update(self.parameters)
        self.step += 1
        return _Done(torch.cat(losses), t, grad_norm)

    def _lr(self) -> float:
        settings = self.config.train
        return settings.lr * min(1.0, (self.step + 1) / max(1, settings.lr_warmup))

    def save(self) -> Path:
        """Write a checkpoint of the current step, and remove the oldest ones beyond `keep`."""
        path = self.run / "checkpoints" / f"step-{self.step:08d}"
        state = {
            "step": self.step,
            "ema_updates": self.ema.updates,
            "seconds": round(self.seconds, 3),
            "images": self.pack.fingerprint,
        }
        config = self.config
        previews = sorted((self.run / "samples").glob("step-*.png"), key=lambda path: (len(path.name), path.name))
        preview = previews[-1].read_bytes() if previews else None
        with new_directory(path) as partial:
            checkpoint.save_model(
                partial, self.averaged.state_dict(), config.unet, config.schedule, self._recipe(), preview
            )
            checkpoint.save_training(partial, self.unet, self.optimizer, state)
        checkpoint.prune(self.run, self.config.train.keep, self.config.train.keep_every)
        return path

    def _recipe(self) -> dict[str, Any]:
        name = os.fsencode(Path(self.config.data.images).name).decode("utf-8", "replace")  # names may be any bytes
        return recipe(self.config, name, len(self.pack), self.step)

    def preview(self, should_stop: Callable[[], bool] = lambda: False) -> Path | None:
        """Draw a grid of samples, from the same noise every time. Returns None if it was asked to stop before."""
        model = DDPM(self.averaged, self.config.schedule)
        noise = ImageNoise(self.config.train.seed, range(PREVIEW_IMAGES), model.shape)
        with autocast(self.device, self.dtype):
            for step in model.sample_loop(noise(), min(PREVIEW_STEPS, model.schedule.T), noise=noise):
                if should_stop():
                    return None
                x_t = step.x_t
        path = self.run / "samples" / f"step-{self.step:08d}.png"
        write_file(path, images.picture_bytes(images.grid(images.to_uint8(x_t))))
        return path

    def _preview_with_card(self, should_stop: Callable[[], bool]) -> Path | None:
        """Draw a preview, and show it on the card of the checkpoint of this step, which was saved before."""
        preview = self.preview(should_stop)
        folder = self.run / "checkpoints" / f"step-{self.step:08d}"
        if preview and folder.is_dir():
            config = self.config
            checkpoint.add_preview(folder, config.unet, config.schedule, self._recipe(), preview.read_bytes())
        return preview

    def events(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train to the last step, writing metrics, previews and checkpoints on the way.

        should_stop: asked after every step; when it says so, a checkpoint is written and the run ends.
        Raises TrainingError at a loss that is not finite, with the checkpoints before it untouched.
        """
        settings = self.config.train
        self._forget_later_metrics()
        window = _Window(self)
        save_at = time.monotonic() + SAVE_SECONDS
        saved_step = self.step
        while self.step < settings.steps and not should_stop():
            started = time.perf_counter()
            window.add(self.train_step())
            done = self.step == settings.steps
            log = done or self.step % settings.log_every == 0
            save = done or self.step % settings.save_every == 0 or time.monotonic() > save_at
            show = log or save or window.age() > _EVENT_SECONDS
            if show:
                synchronize(self.device)
            self.seconds += time.perf_counter() - started
            if show:
                yield window.progress()
            if log:
                line = json.dumps(window.line(self.optimizer.param_groups[0]["lr"])) + "\n"
                yield from self._attempt(lambda line=line: self._log(line))  # type: ignore[misc]
                window.reset()
            if save:
                save_at = time.monotonic() + RETRY_SECONDS
                for event in self._attempt(self.save):
                    if isinstance(event, Saved):
                        saved_step, save_at = self.step, time.monotonic() + SAVE_SECONDS
                    yield event
            if done or self.step % settings.sample_every == 0:
                yield Previewing(self.step)
                yield from self._attempt(lambda: self._preview_with_card(should_stop))
        if self.step > saved_step:
            window.check()
            yield self._save_at_last()
        yield Finished(self.step, interrupted=self.step < settings.steps)

    def _attempt(self, write: Callable[[], Path | None]) -> Iterator[Event]:
        """Do something that writes; a disk that fails or is full must not end a run that lives in memory."""
        try:
            if path := write():
                yield Saved(self.step, path)
        except (OSError, SafetensorError, DataError) as error:
            yield NotSaved(self.step, str(error))

    def _save_at_last(self) -> Saved:
        """The checkpoint with which a run ends. Raises TrainingError if it cannot be written."""
        try:
            return Saved(self.step, self.save())
        except (OSError, SafetensorError) as error:
            kept = checkpoint.checkpoints(self.run)
            hint = f"{kept[-1]} is safe: make room, and --resume goes on from there." if kept else "Make room first."
            raise TrainingError(f"step {self.step} could not be saved ({error})", hint) from None

    def _log(self, line: str) -> None:
        with (self.run / "metrics.jsonl").open("a") as file:
            file.write(line)
