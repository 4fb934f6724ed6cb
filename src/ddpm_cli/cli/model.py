"""Loads the model of a command, and checks the number of steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpm_cli.cli.console import Console
from ddpm_cli.errors import UsageError

if TYPE_CHECKING:
    from ddpm_cli.distributed import World
    from ddpm_cli.models.ddpm import DDPM
    from ddpm_cli.models.hub import Located

__all__ = ["check_steps", "open_model"]


def open_model(
    console: Console, address: str | None, device: str, precision: str, weights: str, world: World | None = None
) -> DDPM:
    """Find and load a model, and print a note with its name and device.

    world: the processes that need it. All of them get the model that the main process finds.
    """
    from ddpm_cli.device import describe
    from ddpm_cli.distributed import World
    from ddpm_cli.models import hub
    from ddpm_cli.models.ddpm import DDPM

    world = world or World()

    def find() -> Located:
        if weights not in ("ema", "raw"):
            raise UsageError(f"--weights {weights} is neither ema nor raw")
        return hub.resolve(address, quiet=not console.live)

    located = world.on_main(find)

    def load() -> DDPM:
        # A process on another machine has its own cache of the Hub.
        here = located if located.folder.is_dir() else hub.resolve(located.address)
        return DDPM.load(here, str(world.pick_device(device)), precision, weights)

    model = world.on_all(load)
    channels, height, width = model.shape
    console.note(
        f"model {located.origin} ({width}x{height} {'gray' if channels == 1 else 'RGB'}, {weights} weights) "
        f"on {describe(model.device, model.unet.conv_in.weight.dtype)}"
    )
    return model


def check_steps(model: DDPM, steps: int | None, start: int) -> list[int]:
    """The steps that the sampler takes from `start` down to 0. Raises UsageError if there are fewer than `steps`."""
    if steps is not None and steps > start + 1:
        raise UsageError(f"--steps {steps}: there are only {start + 1} steps from t={start + 1} down to 0")
    return model.timesteps(steps, start)
