"""Notes before a run starts: images that were left out, few images, little disk space, a large cache."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

from ddpm_cli.data.cache import cache_folder, pack_sizes
from ddpm_cli.models.runs import checkpoints
from ddpm_cli.text import in_bytes
from ddpm_cli.training.trainer import Trainer

__all__ = ["disk_space", "notes"]

_FEW_IMAGES = 1000  # with fewer, a model memorizes them
_MUCH_SIGNAL = 0.05  # sqrt(abar_T); 0.006 in the paper's schedule
_MUCH_CACHE = 5e9  # bytes of other decoded images
_NAMED = 5  # the most files that were left out that are named


def notes(trainer: Trainer) -> Iterator[str]:
    """The notes of a run that is ready to start or to continue."""
    pack = trainer.pack
    if not trainer.step:  # a resumed run has had these before
        for name, reason in pack.left_out[:_NAMED]:
            yield f"left out {name}: {reason}"
        if len(pack.left_out) > _NAMED:
            listed = trainer.run / "left_out.txt"
            yield f"left out {len(pack.left_out) - _NAMED} more; {listed} lists all of them"
        if len(pack) < _FEW_IMAGES:
            yield f"few images ({len(pack)}): expect the model to memorize them"
        if trainer.config.data.holdout and not pack.held_out:
            yield f"--holdout {trainer.config.data.holdout:g}: no image is held out, since there are so few"
        left = float(trainer.schedule.sqrt_alphas_cumprod[-1])
        if left > _MUCH_SIGNAL:
            yield (
                f"x_T is {left:.0%} of the image and the rest noise, but sampling starts from noise alone, so samples "
                "will differ from the images: a larger --beta-end or more --timesteps leave less"
            )
    need, free, place = disk_space(trainer)
    if need > free:
        yield f"{place} has {in_bytes(free)} free, and the checkpoints need {in_bytes(need)}"
    if (others := _bytes_of_other_images(pack.folder)) > _MUCH_CACHE:
        yield f"the cache has {in_bytes(others)} of other decoded images; ddpm cache lists and removes them"


def disk_space(trainer: Trainer) -> tuple[int, int, Path]:
    """Bytes that the checkpoints of a run will need, bytes that are free, and the folder in which they are free."""
    run = trainer.run
    # One more than it keeps, since an old one is removed after a new one is written.
    missing = max(1, trainer.config.train.keep + 1 - len(checkpoints(run)))
    place = next(folder for folder in (run.absolute(), *run.absolute().parents) if folder.is_dir())
    return missing * trainer.checkpoint_bytes, shutil.disk_usage(place).free, place


def _bytes_of_other_images(pack: Path) -> int:
    """Bytes of the decoded images in the cache, besides those of this run."""
    return sum(size for folder, size in pack_sizes(cache_folder()).items() if folder.name != pack.name)
