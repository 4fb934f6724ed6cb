"""What `ddpm denoise-trace` starts from: an image, or one that was noised before."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ddpm_cli.cli.model import fitted_image
from ddpm_cli.diffusion.noised_image import Noised, from_paper
from ddpm_cli.diffusion.schedule import make_betas
from ddpm_cli.errors import UsageError
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.rng import ImageNoise

__all__ = ["Start"]


class Start:
    """The states x_t of an image, at the size of a model."""

    def __init__(
        self, ddpm: DDPM, data: bytes, name: str, seed: int, background: str, note: Callable[[str], None]
    ) -> None:
        """data: an image file, or the bytes of `ddpm noise --format safetensors`. name: of the file, in messages.

        Raises DataError if it is neither.
        """
        self._ddpm = ddpm
        self._name = name
        self._seed = seed
        self._note = note
        self._noised = Noised.from_bytes(data, name) if Noised.looks_like(data) else None
        if self._noised is None:
            self._x_0 = fitted_image(ddpm, data, name, background)

    def at(self, flag: str, t: int | None, n: int) -> tuple[int, Tensor]:
        """The paper's t, and n states (n, C, H, W): the image with other noise each, or n times what was noised before.

        flag: the option that t is from. t: the paper's, 1..T; None: that of the noised image, or half of all steps.
        Raises UsageError if t is another than that of the noised image, or its schedule another than the model's.
        """
        if self._noised is None:
            t = t or max(1, self._ddpm.schedule.T // 2)
            eps = ImageNoise(self._seed, range(n), self._ddpm.shape, "forward")()
            return t, self._ddpm.schedule.q_sample(self._x_0.expand_as(eps), from_paper(t), eps)
        if t not in (None, self._noised.t):
            raise UsageError(
                f"{flag} {t}: {self._name} was noised to t={self._noised.t}", f"Use {flag} {self._noised.t}."
            )
        return self._noised.t, self._fitted(self._noised).expand(n, -1, -1, -1)

    def _fitted(self, noised: Noised) -> Tensor:
        """The noised image at the size of the model."""
        if noised.t == 0:
            raise UsageError(f"{self._name}: was noised to t=0, so there is nothing to denoise")
        if not make_betas(noised.schedule).equal(make_betas(self._ddpm.schedule_config)):
            raise UsageError(
                f"{self._name}: was noised with another schedule than this model's",
                "Give the image itself: ddpm denoise-trace IMG --t N",
            )
        channels, size, _ = self._ddpm.shape
        small = noised.fitted(channels, size, ImageNoise(noised.seed, [0], self._ddpm.shape, "fit"))
        if small is not noised:
            _, _, height, width = noised.x_t.shape
            self._note(
                f"{self._name}: reduced from {width}x{height} to the model's {size}x{size}, "
                f"with noise added to stay at t={noised.t}"
            )
        return small.x_t
