"""Samplers of the reverse process, one per file. To add one, write its generator and add it to `SAMPLERS`."""

from ddpm_cli.diffusion.samplers.ancestral import ancestral
from ddpm_cli.diffusion.samplers.step import Noise, Sampler, Step

__all__ = ["SAMPLERS", "Noise", "Sampler", "Step"]

SAMPLERS: dict[str, Sampler] = {"ddpm": ancestral}
