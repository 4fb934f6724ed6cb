"""Samplers of the reverse process, one a file. To add one, write its generator and give it a name in `SAMPLERS`."""

from ddpm_cli.diffusion.samplers.ancestral import ancestral
from ddpm_cli.diffusion.samplers.step import Noise, Sampler, Step

__all__ = ["SAMPLERS", "Noise", "Sampler", "Step"]

SAMPLERS: dict[str, Sampler] = {"ddpm": ancestral}
