"""Samplers of the reverse process, one per file.

To add one, write its generator, a row in `SAMPLERS`, and its name in names.py.
"""

from ddpm_cli.diffusion.samplers.sampling import SAMPLERS, Sampler, Sampling, plan_sampling
from ddpm_cli.diffusion.samplers.spacing import SPACINGS, spaced
from ddpm_cli.diffusion.samplers.step import Noise, Step

__all__ = ["SAMPLERS", "SPACINGS", "Noise", "Sampler", "Sampling", "Step", "plan_sampling", "spaced"]
