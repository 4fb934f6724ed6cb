"""ddpm: Denoising Diffusion Probabilistic Models on your own images.

from ddpm_cli import DDPM
model = DDPM.from_pretrained("runs/cats")
images = model.sample(64, seed=0)  # (64, C, H, W) uint8

from ddpm_cli import train
run = train("images", steps=5000, on_event=print)  # the run's folder, which from_pretrained takes
"""

from typing import TYPE_CHECKING, Any

from ddpm_cli.threads import limit_spinning

if TYPE_CHECKING:
    from ddpm_cli.models.ddpm import DDPM as DDPM
    from ddpm_cli.training.run import train as train

__all__ = ["DDPM", "__version__", "train"]

__version__ = "0.1.0"

limit_spinning()  # first, before anything imports PyTorch


def __getattr__(name: str) -> Any:
    # Imported on first use, so that `ddpm --help` does not load PyTorch.
    if name == "DDPM":
        from ddpm_cli.models.ddpm import DDPM

        return DDPM
    if name == "train":
        from ddpm_cli.training.run import train

        return train
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
