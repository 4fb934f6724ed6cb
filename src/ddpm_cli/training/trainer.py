"""The training loop (Algorithm 1). It writes the run's files and yields events; it prints nothing."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_cli.config import RunConfig, ScheduleConfig
from ddpm_cli.data import images, pictures
from ddpm_cli.data.batches import Batches
from ddpm_cli.data.pack import Pack
from ddpm_cli.device import autocast, memory_format, place, synchronize
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.learned_betas import LearnedBetas
from ddpm_cli.diffusion.loss import prior, training_loss
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.distributed import World, is_lost, lost_process, no_sync
from ddpm_cli.errors import DataError, LostProcessError, TrainingError, reason
from ddpm_cli.files import write_file
from ddpm_cli.models import runs
from ddpm_cli.models.pretrained import fit_weights
from ddpm_cli.nn.ema import EMA
from ddpm_cli.nn.unet import UNet
from ddpm_cli.rng import seed_everything, training_noise
from ddpm_cli.run_folder import METRICS
from ddpm_cli.training import checkpoint, previews
from ddpm_cli.training.checkpointer import Saver
from ddpm_cli.training.events import Event, Finished, Logged, NotSaved, Previewed, Previewing
from ddpm_cli.training.metrics import Done, Window, forget_after
from ddpm_cli.training.previews import Previews

__all__ = ["Trainer"]

_EVENT_SECONDS = 0.25
_BETAS_LR = 10.0  # times the learning rate of the weights: the logits of betas have far to go


class Trainer:
    """A run: its networks, its optimiser, its folder. All random numbers of step k depend only on (seed, k).

    Every rank has a Trainer with the same weights, and computes its rows of every batch. Rank 0 writes the files.
    """

    def __init__(
        self,
        run: Path,
        config: RunConfig,
        pack: Pack,
        device: torch.device,
        dtype: torch.dtype,
        weights: Mapping[str, Tensor] | None = None,
        world: World | None = None,
        scale: int | None = None,
        compiled: bool = False,
    ) -> None:
        """weights: of a model to start from, on rank 0; None starts from random ones.

        dtype: of the matrix products; weights, averages and the optimiser are float32.
        scale: of the previews, see `pictures.grid`.
        compiled: whether `torch.compile` compiles the network when it is first used. Previews use it uncompiled.
        """
        self.run = run
        self.config = config
        self.pack = pack
        self.device = device
        self.dtype = dtype
        self.world = world or World()
        self.first_step = 0  # where it started or resumed
        self.step = 0  # steps done
        self.seconds = 0.0  # spent in them
        self.schedule = NoiseSchedule.from_config(config.schedule)
        self.batches = Batches(len(pack), config.train.batch_size, config.train.seed)
        self.rows = self.world.rows(config.train.batch_size)  # of every batch, on this rank

        seed_everything(config.train.seed, "weights")
        unet = UNet(config.unet)
        if weights is None:
            unet.reset_parameters()
        else:
            unet.load_state_dict(weights)
        self.unet = place(unet, device).train()
        self.compiled = compiled
        if compiled:
            self.unet.compile(dynamic=False)
        self.network: nn.Module = self.unet  # the U-Net, in DistributedDataParallel if there are several ranks
        averaged = UNet(config.unet)
        averaged.load_state_dict(unet.state_dict())
        self.averaged = place(averaged, device).eval().requires_grad_(False)
        self.parameters = list(self.unet.parameters())
        self.ema = EMA(self.averaged.parameters(), config.train.ema_decay)
        self.optimizer = _adam(self.parameters, config.train.lr)
        self.betas = LearnedBetas(self.schedule.betas) if config.train.learn_betas else None  # on the CPU
        self.betas_optimizer = _adam([self.betas.logits], config.train.lr) if self.betas else None
        self.previews = Previews(config.train.sample_every)
        self.scale = scale
        self.saver = Saver(run, config, len(pack))
        self._colours: dict[str, list[float]] = {}  # of the previews since the last line of metrics.jsonl
        self._updating = False  # whether a step is changing the weights
        self._window: Window | None = None  # sums over the steps; None before the first one

    def _moments(self) -> dict[str, Tensor]:
        """The optimiser's tensors: "exp_avg.<parameter>" and so on. Learned betas are among them, as "betas"."""
        found = {
            f"{key}.{name}": value
            for name, parameter in self.unet.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        if self.betas and self.betas_optimizer:
            state = self.betas_optimizer.state[self.betas.logits]
            found |= {"betas": self.betas.logits.detach()} | {f"{key}.betas": value for key, value in state.items()}
        return found

    @property
    def schedule_config(self) -> ScheduleConfig:
        """The model's schedule, with the betas as they are now if they are learned."""
        if self.betas is None:
            return self.config.schedule
        return replace(self.config.schedule, trained_betas=tuple(self.betas.betas.tolist()))

    @property
    def checkpoint_bytes(self) -> int:
        """About the size of a checkpoint: the averages, the raw weights and Adam's two moments."""
        return 4 * sum(parameter.nbytes for parameter in self.parameters)

    def resume(self, folder: Path) -> str:
        """Load a checkpoint. Returns the fingerprint of the images it was trained on.

        Raises ModelError if it is damaged, or is not of this run's network.
        """
        saved = checkpoint.load_training(folder)
        raw, averaged, moments = self.unet.state_dict(), self.averaged.state_dict(), self._moments()
        for here, found, file in (
            (raw, saved.raw, checkpoint.RAW),
            (averaged, saved.ema, checkpoint.AVERAGED),
            (moments, saved.optimizer, checkpoint.OPTIMIZER),
        ):
            for name, value in fit_weights(here, found, str(folder / file)).items():
                here[name].copy_(value)
        self.ema.updates = saved.ema_updates
        self.first_step = self.step = self.saver.saved = saved.step
        self.seconds = saved.seconds
        return saved.fingerprint

    def unite(self) -> None:
        """Copy the state of rank 0 to all ranks, and set up DistributedDataParallel."""
        self.step, self.seconds, self.ema.updates = self.world.on_main(
            lambda: (self.step, self.seconds, self.ema.updates)
        )
        self.world.broadcast([*self.unet.parameters(), *self.averaged.parameters(), *self._moments().values()])
        self.network = self.world.data_parallel(self.unet, self.device)

    def train_step(self) -> Done:
        """One iteration of Algorithm 1, and the update of the EMA (Appendix B)."""
        settings = self.config.train
        x_0, t, eps = self._batch()
        seed_everything(settings.seed, f"dropout {self.world.rank}", self.step)
        self.zero_grad()
        losses = []
        # Gradient accumulation. The random numbers do not depend on the parts.
        *first, last = zip(*(whole.chunk(settings.accumulate) for whole in (x_0, t, eps)), strict=True)
        for part in first:
            with no_sync(self.network):
                losses.append(self.backward(*part))
        losses.append(self.backward(*last))
        self._updating = True
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.grad_clip)
        self.optimizer.param_groups[0]["lr"] = settings.lr_at(self.step)
        # A gradient that is not finite changes neither weights nor averages. Fused Adam skips a step with found_inf,
        # so the CPU does not wait for the device. On MPS it ignores found_inf, so there the CPU checks.
        finite = grad_norm.isfinite()
        self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        if self.device.type != "mps" or finite:
            self.optimizer.step()
        self._update_betas(finite)
        self.ema.update(self.parameters, finite)
        self.step += 1
        self._updating = False
        return Done(torch.cat(losses), t, grad_norm)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in (self.optimizer, self.betas_optimizer):
            if optimizer:
                optimizer.zero_grad(set_to_none=True)

    def _update_betas(self, finite: Tensor) -> None:
        """A step of the learned betas, if there are any. finite: whether the gradient of the weights is."""
        if self.betas is None or self.betas_optimizer is None:
            return
        gradient = self.betas.logits.grad
        assert gradient is not None
        self.world.reduce_sum(gradient)  # DistributedDataParallel averages only the gradients of the network
        gradient /= self.world.size
        norm = torch.nn.utils.clip_grad_norm_([self.betas.logits], self.config.train.grad_clip)
        if finite and norm.isfinite():
            self.betas_optimizer.param_groups[0]["lr"] = _BETAS_LR * self.config.train.lr_at(self.step)
            self.betas_optimizer.step()

    def _batch(self) -> tuple[Tensor, Tensor, Tensor]:
        """This rank's rows of the step's x_0, t and eps."""
        settings = self.config.train
        try:
            batch = self.pack[self._mine(self.step)]
            self.pack.prefetch(self._mine(self.step + 1))
        except OSError as error:
            raise TrainingError(f"{self.pack.folder}: the images cannot be read any more ({reason(error)})") from None
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        x_0 = images.to_float(batch.to(self.device, non_blocking=True, memory_format=memory_format(self.device)))
        mirrored, t, eps = training_noise(
            settings.seed, self.step, settings.batch_size, self.rows, self.pack.shape, self.schedule.T, self.device
        )
        if self.config.data.flip:
            x_0 = torch.where(mirrored.view(-1, 1, 1, 1), x_0.flip(3), x_0)
        return x_0, t, eps.contiguous(memory_format=memory_format(self.device))

    def _mine(self, step: int) -> Tensor:
        """The indices of the images in this rank's rows of a step's batch."""
        return self.batches[step][self.rows.start : self.rows.stop]

    def backward(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Add the gradient of a part of the batch. Returns the loss of each image, (B,)."""
        with autocast(self.device, self.dtype):
            schedule = self.betas() if self.betas else self.schedule
            denoiser = Denoiser(self.network, schedule, self.config.schedule)
            loss = training_loss(denoiser, x_0, t, eps, self.config.train.loss)
            if self.betas:
                loss = loss + prior(schedule, x_0) / math.log(2)  # L_T, which only the betas change
        # DistributedDataParallel averages over ranks; this scale gives the gradient of the mean over the whole batch.
        (loss.sum() * (self.world.size / self.config.train.batch_size)).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _snapshot(self) -> checkpoint.Checkpoint:
        """A copy of the state on the CPU, which training does not change."""
        ema, raw, moments = map(_copied, (self.averaged.state_dict(), self.unet.state_dict(), self._moments()))
        return checkpoint.Checkpoint(
            step=self.step,
            raw=raw,
            ema=ema,
            ema_updates=self.ema.updates,
            optimizer=moments,
            seconds=round(self.seconds, 3),
            fingerprint=self.pack.fingerprint,
            schedule=self.schedule_config,
        )

    def preview(self, should_stop: Callable[[], bool] = lambda: False) -> Previewed | None:
        """Draw a grid of samples from the averaged weights, and one from the raw ones, always from the same noise.

        Returns None if `should_stop` stopped it.
        """
        samples = self._draw(self.averaged, should_stop)
        self.unet.eval()
        raw = None if samples is None else self._draw(self.unet, should_stop)
        self.unet.train()
        if samples is None or raw is None:
            return None
        path, raw_path = (runs.preview_file(self.run, self.step, raw) for raw in (False, True))
        data = [round(mean, 2) for mean in self.pack.mean]
        checkpoint.require_run(self.run)
        write_file(path, pictures.picture_bytes(pictures.grid(samples, self.scale)))
        write_file(raw_path, pictures.picture_bytes(pictures.grid(raw, self.scale)))
        return Previewed(self.step, path, raw_path, images.mean(samples), images.mean(raw), data, samples)

    def not_compiled(self) -> AbstractContextManager[None]:
        """Use the network as if it was not compiled: for work that would compile it anew, in another mode or size."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    def _draw(self, unet: UNet, should_stop: Callable[[], bool]) -> Tensor | None:
        with autocast(self.device, self.dtype), self.not_compiled():
            return previews.draw(unet, self.schedule_config, self.config.train.seed, should_stop)

    def events(self, should_stop: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Train to the last step, and write metrics, previews and checkpoints.

        should_stop: called after every step, and before every layer of a preview; if it returns True on any rank, a
        checkpoint is written and the run ends.
        Raises TrainingError if a loss or gradient is not finite; earlier checkpoints stay. For other errors, a
        checkpoint of the last good step is written first, if possible.
        """
        self.unite()
        self.world.on_main(self._forget_lost_steps)
        window = self._window = Window(self.config, self.run, self.device, self.world, self.step, self.seconds)
        try:
            yield from self._steps(window, should_stop)
            window.check(self.step)
        except Exception as error:
            if isinstance(error, RuntimeError) and self.world.size > 1 and is_lost(error):
                error = lost_process(error)
            if self.world.is_main:
                yield from self.rescue(error)
            if isinstance(error, TrainingError) and (kept := runs.checkpoints(self.run)):
                error.hint = f"{error.hint or ''} {kept[-1]} is safe: --resume continues from it.".strip()
            raise error
        yield from self.world.on_all(lambda: list(self._finish_saving()) if self.world.is_main else [])
        yield Finished(self.step, interrupted=self.step < self.config.train.steps)

    def _forget_lost_steps(self) -> None:
        """Remove what a run wrote after the checkpoint from which it resumes."""
        forget_after(self.run / METRICS, self.step)
        checkpoint.forget_previews_after(self.run, self.step)

    def _steps(self, window: Window, should_stop: Callable[[], bool]) -> Iterator[Event]:
        settings, world = self.config.train, self.world
        [stop] = world.any(should_stop())
        while self.step < settings.steps and not stop:
            started = time.perf_counter()
            window.add(self.train_step(), self.step)
            # The clock of rank 0 decides for all ranks.
            stop, overdue, report = world.any(
                should_stop(),
                world.is_main and self.saver.overdue,
                world.is_main and window.age() > _EVENT_SECONDS,
            )
            done = self.step == settings.steps
            log = done or self.step % settings.log_every == 0
            save = done or self.step % settings.save_every == 0 or overdue
            draw = done or self.previews.is_due(self.step)
            if log or save or draw or report:
                synchronize(self.device)
            self.seconds += time.perf_counter() - started
            if log or save or draw or report:
                yield window.progress(self.step, self.seconds, self.previews.share or 0.0)
            if world.is_main:
                yield from self.saver.outcome(wait=save)
                if save:
                    self.saver.begin(self._snapshot())
                if draw:
                    yield Previewing(self.step)
                    yield from self._previewed(should_stop)
            if save or draw:  # wait here: the next step's all-reduce times out after minutes
                [stop] = world.any(stop or should_stop())
            if log:
                line = window.line(self.step, self.seconds, self.optimizer.param_groups[0]["lr"]) | self._colours
                window.reset(self.step, self.seconds)
                self._colours = {}
                if world.is_main:
                    yield self._log(line)

    def _finish_saving(self) -> Iterator[Event]:
        """Write the last checkpoint, unless it exists."""
        return self.saver.finish(self.step, self._snapshot)

    def _is_sound(self, window: Window) -> bool:
        """Whether the weights are finite and those after a whole step, and no step was skipped as not finite."""
        try:
            finite = window.sound and all(bool(parameter.isfinite().all()) for parameter in self.parameters)
        except RuntimeError:  # the device has failed
            return False
        return finite and not self._updating

    def rescue(self, error: BaseException) -> Iterator[Event]:
        """Save what is possible of a run that an error ends: the checkpoint that is being written, and the last step.

        Nothing is written twice. Call it on rank 0.
        """
        # Without the other processes, a GPU may wait for them forever, or have computed without them.
        alone = self.world.size > 1 and (isinstance(error, LostProcessError) or not isinstance(error, Exception))
        try:
            if self._window and not (alone and self.device.type == "cuda") and self._is_sound(self._window):
                yield from self._finish_saving()
            else:
                yield from self.saver.outcome(wait=True)
        except Exception as failed:  # only the error that ends the run is raised
            yield NotSaved(self.step, reason(failed), goes_on=False)

    def _previewed(self, should_stop: Callable[[], bool]) -> Iterator[Event]:
        """Draw a preview, keep its mean colours for the metrics, and add it to the card of this step's checkpoint."""
        try:
            preview = self.preview(should_stop)
        except (OSError, DataError) as error:
            yield NotSaved(self.step, reason(error))
            return
        if preview is None:
            return
        yield preview
        self._colours = {"mean": preview.mean, "raw_mean": preview.raw_mean, "data_mean": preview.data}
        yield from self.saver.add_preview(self.step, preview.path)

    def _log(self, line: dict[str, Any]) -> Event:
        try:
            with (self.run / METRICS).open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            return NotSaved(self.step, reason(error))
        return Logged(line)


def _adam(parameters: list[nn.Parameter], lr: float) -> torch.optim.Adam:
    optimizer = torch.optim.Adam(parameters, lr=lr, fused=True)
    for parameter in parameters:  # Adam would allocate them in its first step; memory should run out now
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
