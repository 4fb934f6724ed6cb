"""The class DDPM: a trained model, to load, to sample from and to save."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ddpm_cli.config import ScheduleConfig
from ddpm_cli.data import images
from ddpm_cli.device import memory_format, pick_device, pick_dtype, place
from ddpm_cli.diffusion import inversion
from ddpm_cli.diffusion.denoiser import Denoiser
from ddpm_cli.diffusion.samplers import Noise, Sampling, Step, plan_sampling
from ddpm_cli.diffusion.schedule import NoiseSchedule
from ddpm_cli.errors import ModelError
from ddpm_cli.files import new_directory
from ddpm_cli.models import hub, pipeline
from ddpm_cli.models.pretrained import read_model
from ddpm_cli.models.recipe import read_recipe
from ddpm_cli.nn.unet import UNet
from ddpm_cli.rng import ImageNoise

__all__ = ["DDPM"]

_ALIKE = 8  # images: on one thread, even batches up to this size round the same


class DDPM:
    """A trained model. unet: on its device, in its precision. schedule: of its training. shape: (C, H, W) of images."""

    def __init__(
        self,
        unet: UNet,
        schedule_config: ScheduleConfig,
        weights: Mapping[str, Tensor] | None = None,
        recipe: Mapping[str, Any] | None = None,
    ) -> None:
        """weights: float32 weights for `save_pretrained`, if the U-Net was cast to a lower precision.

        recipe: how it was trained, see `recipe.recipe`.
        """
        self.recipe = recipe
        self.unet = unet
        self._weights = weights or unet.state_dict()
        self.schedule_config = schedule_config
        self.denoiser = Denoiser.from_config(self._network, schedule_config)
        self.device = unet.conv_in.weight.device
        size = unet.config.sample_size
        self.shape = (unet.config.in_channels, size, size)
        self._compiled: int | None = None  # the batch size of the compiled network; None: it is not compiled

    @classmethod
    def from_pretrained(
        cls, address: str | Path | None = None, device: str = "auto", precision: str = "auto", weights: str = "ema"
    ) -> DDPM:
        """Load a model from a directory, a run, or the Hugging Face Hub.

        address: see `hub.resolve`. device: auto, cpu, cuda, cuda:N or mps. precision: auto, fp32 or bf16.
        weights: "ema", or "raw" for the trained weights of a checkpoint, not averaged. Raises ModelError or UsageError.
        """
        return cls.load(hub.resolve(None if address is None else str(address)), device, precision, weights)

    @classmethod
    def load(cls, located: hub.Located, device: str = "auto", precision: str = "auto", weights: str = "ema") -> DDPM:
        """Load a model that `hub.resolve` found; the other arguments are those of `from_pretrained`."""
        where = pick_device(device)
        unet, schedule = read_model(located.folder, located.files, weights)
        dtype = pick_dtype(precision, where, schedule.needs_float32)
        original = unet.state_dict()
        return cls(place(unet, where, dtype), schedule, original, read_recipe(located.folder))

    def compile(self) -> None:
        """Compile the network when it is first used, with `torch.compile`: for long samplings on a GPU.

        This takes minutes the first time, and seconds from PyTorch's cache. Smaller batches are filled up, since each
        size would be compiled anew.
        """
        self.unet.compile(dynamic=False)
        self._compiled = 0

    def fingerprint(self) -> str:
        """A hash of the network, its weights and its schedule: models with the same hash draw the same images.

        Files keep it, so it has nothing that only describes the files of this version, as `to_dict` has.
        """
        what = json.dumps([dataclasses.asdict(config) for config in (self.unet.config, self.schedule_config)])
        weights = {name: value.contiguous() for name, value in self._weights.items()}
        return hashlib.sha256(what.encode() + save(weights)).hexdigest()[:16]

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a diffusers pipeline directory, in float32. An existing model is replaced.

        Raises ModelError if the folder has other files, which would be lost.
        """
        path = Path(folder)
        if path.exists() and not pipeline.is_only_a_model(path):
            raise ModelError(f"{path}: exists and is not just a model", "Name a new folder.")
        with new_directory(path) as partial:
            pipeline.save_model(partial, self._weights, self.unet.config, self.schedule_config, self.recipe)

    def _network(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The U-Net, in batch sizes that round the same, so that an image does not depend on its batch."""
        if x_t.device.type == "cpu" and torch.get_num_threads() == 1 and len(x_t) > _ALIKE:
            groups = torch.split(x_t, _ALIKE)
            times = torch.split(t, _ALIKE) if len(t) > 1 else [t] * len(groups)  # one t for each image, or for all
            return torch.cat([self._network(*both) for both in zip(groups, times, strict=True)])
        more = self._batch_size(x_t, t) - len(x_t)
        padded = torch.cat([x_t, *[x_t[-1:]] * more]) if more else x_t
        t = torch.cat([t, *[t[-1:]] * more]) if more and len(t) > 1 else t
        return self.unet(padded, t)[: len(x_t)]  # type: ignore[no-any-return]

    def _batch_size(self, x_t: Tensor, t: Tensor) -> int:
        """The size to which a batch is filled up. A compiled network keeps to the largest so far.

        On CPUs routines are chosen by batch size. Convolutions round differently on one thread above 12 images, and on
        two threads for some odd batches; the time embeddings of several t do so below 4.
        """
        size = len(x_t)
        if x_t.device.type == "cpu":
            size += -size % (2 if len(t) == 1 else 4)
        if self._compiled is not None:
            size = self._compiled = max(self._compiled, size)
        return size

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule of its training."""
        return self.denoiser.schedule

    def sampling(
        self,
        sampler: str | None = None,
        steps: int | None = None,
        start: int | None = None,
        *,
        spacing: str | None = None,
        eta: float | None = None,
        order: int | None = None,
        updates: int | None = None,
    ) -> Sampling:
        """Plan a sampling: the steps that a sampler visits, and its settings. What is None is chosen.

        sampler: a name in `diffusion.samplers.SAMPLERS`; default dpm++, and ddpm (Algorithm 2) where dpm++ would take
        all steps. steps: how many, default the sampler's. start: the first one, in [0, T), default T-1. spacing: a name
        in `diffusion.samplers.SPACINGS`. eta: the noise of ddim and dpm++, in [0, 1]. order: of dpm++, 1 to 3. updates:
        of langevin, at each step. Raises ValueError, beginning with the name of the bad value.
        """
        own = {"eta": eta, "order": order, "updates": updates}
        return plan_sampling(self.schedule, self.shape[-1], sampler, steps, start, spacing, **own)

    def sample_loop(
        self,
        x_T: Tensor,
        sampler: str | Sampling | None = None,
        steps: int | None = None,
        seed: int = 0,
        start: int | None = None,
        noise: Noise | None = None,
        **settings: Any,
    ) -> Iterator[Step]:
        """Run the reverse process from x_T and yield every Step, the sample last.

        x_T: (B, C, H, W) float, the state at step `start` (in [0, T), default T-1).
        sampler, steps, settings: see `sampling`; or a plan that it returned, instead of all of them.
        noise: returns z of each step; default the noise of images 0..B-1 of `seed`.
        """
        plan = sampler if isinstance(sampler, Sampling) else self.sampling(sampler, steps, start, **settings)
        noise = noise or ImageNoise(seed, range(len(x_T)), self.shape)
        x_T = x_T.to(self.device, torch.float32, memory_format=memory_format(self.device))
        return plan.run(self.denoiser, x_T, noise)

    def invert(
        self, x_0: Tensor, sampling: Sampling | None = None, iterations: int = inversion.ITERATIONS
    ) -> Iterator[Step]:
        """Run the sampler ddim from images up to its first step: yield every Step, the latent last.

        `sample_loop(latent, sampling)` returns the images. x_0: (B, C, H, W) in [-1, 1].
        sampling: a plan of ddim with eta=0, default `sampling("ddim")`. iterations: see `diffusion.inversion.invert`.
        """
        plan = sampling or self.sampling("ddim")
        if plan.sampler != "ddim" or plan.is_random:
            raise ValueError("only the sampler ddim with eta=0 can be inverted")
        if not x_0.is_floating_point():
            raise ValueError(f"x_0 must have values in [-1, 1], not {x_0.dtype} pixels")
        x_0 = x_0.to(self.device, torch.float32, memory_format=memory_format(self.device))
        return inversion.invert(self.denoiser.subsequence(plan.timesteps), x_0, iterations)

    def sample_batches(
        self,
        indices: Sequence[int],
        sampling: Sampling,
        seed: int = 0,
        batch_size: int = 64,
        progress: Callable[[int], None] = lambda done: None,
    ) -> Iterator[Tensor]:
        """Sample the images with these indices of a seed in batches: yields (B, C, H, W) uint8 on the CPU.

        Image i does not depend on the other images, nor on batch_size. progress: called after every evaluation of every
        batch with the number of images in it; the sum is the number of images times `sampling.evaluations`.
        """
        for first in range(0, len(indices), batch_size):
            batch = indices[first : first + batch_size]
            noise = ImageNoise(seed, batch, self.shape)
            for step in self.sample_loop(noise(), sampling, noise=noise):
                if step.t >= 0:
                    progress(len(batch))
            yield images.to_uint8(step.x_t).cpu()

    def sample(
        self,
        n: int = 1,
        seed: int = 0,
        steps: int | None = None,
        batch_size: int = 64,
        sampler: str | None = None,
        **settings: Any,
    ) -> Tensor:
        """Sample images 0..n-1 of a seed: (n, C, H, W) uint8 on the CPU.

        sampler, steps, settings: see `sampling`. Image i does not depend on n and batch_size. Raises ValueError if n is
        below 1.
        """
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        sampling = self.sampling(sampler, steps, **settings)
        return torch.cat(list(self.sample_batches(range(n), sampling, seed, batch_size)))
