"""How well images return from their DDIM latents: plain inversion, and the one that solves each step.

    python benchmarks/inversion.py runs/digits held-out/*.png --steps 10,20,50,100

It prints, for each number of steps, the evaluations of the network per image on the way up, and the error of the way
back of all images together and of the worst one, before pixels are rounded.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from ddpm_cli import DDPM
from ddpm_cli.data import images
from ddpm_cli.diffusion.inversion import ITERATIONS
from ddpm_cli.models.latents import difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", nargs="+", type=Path)
    parser.add_argument("--steps", default="10,20,50,100")
    parser.add_argument("--spacing")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()

    model = DDPM.from_pretrained(args.model, precision=args.precision)
    channels, size, _ = model.shape
    x_0 = torch.stack(
        [
            images.to_float(images.from_pil(images.fit(images.decode(path, str(path), channels), size)))
            for path in args.images
        ]
    )
    evaluations, network = 0, model.denoiser.network

    def counted(x_t: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return network(x_t, t)

    model.denoiser.network = counted
    for steps in map(int, args.steps.split(",")):
        plan = model.sampling("ddim", steps, spacing=args.spacing)
        for iterations in (0, ITERATIONS):
            evaluations = 0
            *_, top = model.invert(x_0, plan, iterations)
            up = evaluations
            *_, end = model.sample_loop(top.x_t, plan)
            all_, worst = difference(end.x_t, x_0), max(map(difference, end.x_t, x_0))
            print(
                f"{len(x_0)} images, {plan.describe()}, {iterations} iterations: {up} evaluations, "
                f"RMSE {all_.rmse:.2g}, PSNR {all_.psnr:.1f} dB; worst image {worst.rmse:.2g}, {worst.psnr:.1f} dB; "
                f"worst pixel {all_.largest:.2g}",
                flush=True,
            )


if __name__ == "__main__":
    main()
