"""Finds the run of a command; loads its model, fits images to it, and plans its sampling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm_cli.cli.console import Console
from ddpm_cli.errors import DataError, UsageError
from ddpm_cli.run_folder import METRICS

if TYPE_CHECKING:
    from torch import Tensor

    from ddpm_cli.diffusion.samplers import Sampling
    from ddpm_cli.distributed import World
    from ddpm_cli.models.ddpm import DDPM
    from ddpm_cli.models.hub import Located

__all__ = [
    "check_t",
    "find_model",
    "find_run",
    "fitted_image",
    "note_fallback",
    "note_sampling",
    "open_model",
    "pick_sampling",
]

_LEVELS = 30  # measured in docs/samplers.md: 40 are enough, 20 are poor and 10 give noise


def find_run(command: str, run: Path | None, runs: Path = Path("runs")) -> Path:
    """The run that a user named, else the newest one under `runs`. Raises DataError if there is none."""
    from ddpm_cli.models.runs import newest_run

    if found := run or newest_run(runs, lambda run: run / METRICS):
        return found
    raise DataError(f"no run was given, and there is none in {runs}/", f"ddpm {command} RUN")


def find_model(console: Console, address: str | None, world: World | None = None) -> Located:
    """Find a model. world: the processes that need it. All of them get what the main process finds."""
    from ddpm_cli.distributed import World
    from ddpm_cli.models import hub

    located = (world or World()).on_main(lambda: hub.resolve(address, quiet=not console.live))
    note_fallback(console, located)
    return located


def note_fallback(console: Console, located: Located) -> None:
    """Say so if nobody named this model."""
    if located.fallback:
        console.note("no run in runs/ has a checkpoint, so this is the bundled model; -m names another one")


def open_model(
    console: Console,
    address: str | Located | None,
    device: str,
    precision: str,
    weights: str,
    world: World | None = None,
    compiled: bool = False,
) -> DDPM:
    """Find and load a model, and print a note with its name and device. address: may be what `find_model` found.

    compiled: whether its network is compiled when it is first used.
    """
    from ddpm_cli.device import describe
    from ddpm_cli.distributed import World
    from ddpm_cli.models import hub
    from ddpm_cli.models.ddpm import DDPM

    world = world or World()
    located = address if isinstance(address, hub.Located) else find_model(console, address, world)

    def load() -> DDPM:
        # A process on another machine has its own cache of the Hub.
        here = located if located.folder.is_dir() else hub.resolve(located.address)
        return DDPM.load(here, str(world.pick_device(device)), precision, weights)

    model = world.on_all(load)
    if compiled:
        model.compile()
    channels, height, width = model.shape
    console.note(
        f"model {located.origin} ({width}x{height} {'gray' if channels == 1 else 'RGB'}, {weights} weights) "
        f"on {describe(model.device, model.unet.conv_in.weight.dtype)}"
    )
    return model


def check_t(model: DDPM, t: int | None, flag: str = "--t") -> None:
    """Raises UsageError if the model has no step t of the paper's. None is allowed."""
    if t is not None and t > model.schedule.T:
        raise UsageError(f"{flag} {t}: the last step of this model is t={model.schedule.T}, pure noise")


def pick_sampling(
    model: DDPM, sampler: str | None, steps: int | None, start: int | None = None, **settings: Any
) -> Sampling:
    """The plan of a sampling, see `DDPM.sampling`. Raises UsageError for values that make none."""
    try:
        return model.sampling(sampler, steps, start, **settings)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def note_sampling(console: Console, model: DDPM, sampling: Sampling) -> None:
    """Print the sampler, and what it does not do as the paper does."""
    exact = len(sampling.timesteps) == sampling.timesteps[-1] + 1
    advice = "" if exact else f" (--sampler ddpm takes all {sampling.timesteps[-1] + 1}, as the paper does)"
    console.note(f"sampler {sampling.describe()}{advice if sampling.sampler == 'dpm++' else ''}")
    if sampling.sampler == "langevin" and len(sampling.timesteps) < _LEVELS and not exact:
        console.warn(f"langevin needs levels of noise that are close together; take {_LEVELS} or more --steps")
    if sampling.sampler == "ddpm" and model.denoiser.subsequence(sampling.timesteps).config != model.denoiser.config:
        console.note("fewer steps than the model was trained with, so the variance is the fixed small one, beta~_t")


def fitted_image(model: DDPM, data: bytes, name: str, background: str) -> Tensor:
    """An image file as a model's image: (1, C, H, W) float32 in [-1, 1]. Raises DataError if it is none."""
    from ddpm_cli.data import images

    channels, size, _ = model.shape
    return images.to_float(images.from_pil(images.fit(images.decode(data, name, channels, background), size)))[None]
