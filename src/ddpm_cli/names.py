"""The names that options take, and the nearest of them to a name that is not among them.

The command line checks and completes names before it imports anything large, so this imports neither torch nor the
modules that the names belong to.
"""

from __future__ import annotations

from collections.abc import Collection

from ddpm_cli.errors import UsageError

__all__ = [
    "FITS",
    "FORMATS",
    "LOSSES",
    "PRECISIONS",
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "SPACINGS",
    "VARIANCES",
    "WEIGHTS",
    "WITHOUT_VARIANCE",
    "check_name",
    "nearest",
]

FITS = ("crop", "pad", "stretch")
FORMATS = ("png", "safetensors")  # of noised images and latents
PRECISIONS = ("auto", "fp32", "bf16")
WEIGHTS = ("ema", "raw")

SAMPLERS = ("ddpm", "ddim", "dpm++", "langevin")  # the keys of the table in diffusion/samplers; a test compares them
SPACINGS = ("uniform", "quadratic", "logsnr")

# Of the objective. Those that models on disk have too come with their names in diffusers.
PREDICTIONS = {"epsilon": "epsilon", "mean": "mean", "sample": "sample", "v": "v_prediction"}
VARIANCES = {
    "fixed-large": "fixed_large",
    "fixed-small": "fixed_small",
    "learned": "learned_log",
    "learned-range": "learned_range",
}
SCHEDULES = ("linear", "cosine", "quad", "sigmoid", "const", "jsd", "learned")
WITHOUT_VARIANCE = ("simple", "min-snr", "debiased")  # losses that do not depend on a learned variance
LOSSES = (*WITHOUT_VARIANCE, "vlb", "hybrid")

_ALIKE = 0.65  # words that are less alike are no typing errors of each other


def nearest(word: str, names: Collection[str]) -> str | None:
    """The name that a word was probably meant to be, or None if no name is like it. Case does not matter.

    A word that is a part of a name, or has its letters in another order, counts as that name.
    """
    if len(word) < 2 or not names:
        return None
    alike = {name: _alike(word.lower(), name.lower()) for name in names}
    best = max(alike, key=alike.__getitem__)  # the first of several
    return best if alike[best] >= _ALIKE else None


def _alike(word: str, name: str) -> float:
    """How alike two words are, in [0, 1]: the letters that they share, in order, and how much of the beginning.

    The beginning decides for dpm++ and against ddpm where the word is `dpmpp`.
    """
    from difflib import SequenceMatcher  # imported late: most names are right

    if word in name or sorted(word) == sorted(name):
        return 1.0
    shared = SequenceMatcher(None, word, name).ratio()
    beginning = next((i for i, (a, b) in enumerate(zip(word, name, strict=False)) if a != b), min(len(word), len(name)))
    return shared + (1 - shared) * beginning / len(word)


def check_name(flag: str, name: str, names: Collection[str]) -> None:
    """Raises UsageError if the value of a flag is not one of its names; the hint is the nearest one."""
    if name not in names:
        near = nearest(name, names)
        raise UsageError(
            f"{flag} {name} is not one of {', '.join(names)}", f"Did you mean {flag} {near}?" if near else None
        )
