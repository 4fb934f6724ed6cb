"""How far `ddpm compress` is from the ideal code, by the size of its blocks.

    python benchmarks/codec.py MODEL IMAGES --images 16 --bits 8 12 14 16

The ideal code draws x_{t-1} from q(x_{t-1} | x_t, x_0) and is charged the KL from p, in many steps. For each size of
blocks, as means over the images: bits per dimension of our code, without the header; the ideal code's for the same
chain; the RMSE at the end, and the steps taken; how many more bits than the ideal code ours takes at the same RMSE; and
seconds to compress and to decompress an image, each with its own draw of the candidates.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from ddpm_cli import DDPM
from ddpm_cli.compression.bits import BitReader, BitWriter
from ddpm_cli.compression.codec import Plan, State, receive, send
from ddpm_cli.compression.compress import STEPS, default_t
from ddpm_cli.data import images
from ddpm_cli.data.cache import cache_folder
from ddpm_cli.data.selection import read_some
from ddpm_cli.data.sources import open_sources
from ddpm_cli.diffusion.denoiser import Denoiser

LEVELS = (20, 10, 5)  # RMSE of 255
IDEAL_STEPS = 128


def ideal(denoiser: Denoiser, x_0: Tensor, plan: Plan, seed: int) -> Iterable[tuple[float, Tensor]]:
    """Bits and predicted x_0 of the ideal code at every step."""
    denoiser = denoiser.subsequence(plan.timesteps(denoiser.schedule))
    schedule = denoiser.schedule
    generator = torch.Generator().manual_seed(seed)
    mean, sigma, bits = torch.zeros_like(x_0), 1.0, 0.0
    wanted = float(schedule.sqrt_alphas_cumprod[-1]) * x_0
    for t in reversed(range(schedule.T)):
        bits += float(((wanted - mean) / sigma).double().square().sum()) / 2 / math.log(2)
        x_t = wanted + sigma * torch.randn(x_0.shape, generator=generator)
        with torch.no_grad():
            prediction = denoiser(x_t, t)
        yield bits, prediction.x_0
        mean, wanted = prediction.mean, schedule.posterior_mean(x_0, x_t, t)
        sigma = math.exp(0.5 * float(schedule.posterior_log_variance[t]))


def at_levels(curve: list[tuple[float, float]]) -> list[float]:
    """The rate at each level of distortion: linear in log RMSE. curve: (rate, RMSE); a worse image than before counts
    as that before, since the receiver keeps the best."""
    found = []
    for level in LEVELS:
        before = (0.0, 127.5)
        for rate, rmse in curve:
            if rmse <= level:
                part = math.log(before[1] / level) / math.log(before[1] / rmse)
                found.append(before[0] + part * (rate - before[0]))
                break
            before = (rate, min(rmse, before[1]))
        else:
            found.append(math.nan)
    return found


def means(rows: list[list[float]]) -> list[float]:
    return torch.tensor(rows, dtype=torch.float64).mean(0).tolist()  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--images", dest="n", type=int, default=16)
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 12, 14, 16])
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args()

    model = DDPM.from_pretrained(args.model, "cpu", "fp32")
    channels, size, _ = model.shape
    chosen, _ = read_some(open_sources(args.images, cache_folder()), args.n, channels, size)
    x_0s = [images.to_float(image)[None] for image in chosen]
    values = x_0s[0].numel()
    last = default_t(model.schedule.T) - 1

    def point(bits: float, x: Tensor, x_0: Tensor) -> tuple[float, float]:
        return bits / values, 127.5 * float((x - x_0).square().mean()) ** 0.5

    plan = Plan(1, IDEAL_STEPS, last)
    best = means(
        [at_levels([point(b, x, x_0) for b, x in ideal(model.denoiser, x_0, plan, i)]) for i, x_0 in enumerate(x_0s)]
    )
    shown = (f"{rate:.3f} at {level}" for rate, level in zip(best, LEVELS, strict=True))
    print(f"ideal code in {IDEAL_STEPS} steps, bits/dim:", *shown)
    print("bits of a block | bits/dim | ideal for the chain | RMSE | steps | more than ideal at", *LEVELS, "| seconds")
    for bits in args.bits:
        plan = Plan(bits, args.steps, last)
        levels, totals = [], []
        for x_0 in x_0s:
            stream = BitWriter()
            started = time.perf_counter()
            states: list[State] = list(send(model.denoiser, x_0, plan, stream))
            between = time.perf_counter()
            list(receive(model.denoiser, torch.zeros_like(x_0), plan, BitReader(stream.to_bytes())))
            seconds = [between - started, time.perf_counter() - between]
            curve = [point(state.bits, state.x_0, x_0) for state in states]
            levels.append(at_levels(curve))
            totals.append([*curve[-1], states[-1].ideal / values, len(states), *seconds])
        rate, rmse, chain, steps, sending, receiving = means(totals)
        more = " ".join(f"{ours / other - 1:+.0%}" for ours, other in zip(means(levels), best, strict=True))
        print(
            f"{bits} | {rate:.3f} | {chain:.3f} | {rmse:.2f} | {steps:.0f} | {more} | {sending:.1f} {receiving:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
