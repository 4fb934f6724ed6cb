"""What `ddpm demo` writes: the pictures as the commands write them, and a page that explains them."""

from __future__ import annotations

from pathlib import Path
from shlex import quote

import torch
from torch import Tensor

from ddpm_cli.cli.trace_output import FRAMES, Frame, trace_sheet, write_trace
from ddpm_cli.config import ScheduleConfig
from ddpm_cli.data import html, images, pictures
from ddpm_cli.data.html import Picture
from ddpm_cli.diffusion.noised_image import from_paper
from ddpm_cli.diffusion.schedule import make_betas
from ddpm_cli.files import write_file
from ddpm_cli.models.ddpm import DDPM
from ddpm_cli.models.demo import Demo, Plan
from ddpm_cli.models.sample_folder import image_name

__all__ = ["PAGE", "write_demo"]

PAGE = "index.html"
_WIDTH, _GRID_WIDTH = 256, 640  # pixels of a picture that the slider changes, and of the samples
_ROWS = ("x_t", "x_0")


def write_demo(folder: Path, model: DDPM, plan: Plan, demo: Demo, options: str, seed: int) -> None:
    """Write the pictures, and then the page. options: those of the commands on it, such as `-m runs/cats`."""
    frames = [
        Frame(t, state[None], prediction[None])
        for t, state, prediction in zip(demo.ts, demo.states, demo.predictions, strict=True)
    ]
    shown = pictures.evenly(len(frames), FRAMES)
    columns = shown[::-1]  # of the forward process
    forward = pictures.strip([demo.noised[columns]], [f"t={demo.ts[i]}" for i in columns])
    shares = torch.linspace(0, 1, len(demo.mixtures[0]), dtype=torch.float64).tolist()
    between = pictures.strip(
        [*demo.mixtures.values()], [f"{share:.3g}" for share in shares], [f"t={t}" for t in demo.mixtures]
    )
    sheets = {
        "samples": pictures.picture_bytes(pictures.grid(demo.samples)),
        "noise": pictures.picture_bytes(forward),
        "trace": pictures.picture_bytes(trace_sheet([frames[i] for i in shown], _ROWS)),
        "interpolation": pictures.picture_bytes(between),
    }
    for i, image in enumerate(demo.pair):
        _write(folder / "images" / image_name(i), image)
    for t, image in zip(demo.ts, demo.noised, strict=True):
        _write(folder / "noise" / f"t{t:04d}.png", image)
    write_trace(folder / "trace", frames, _ROWS)
    found = {}
    for name, data in sheets.items():
        write_file(folder / f"{name}.png", data, sync=False)
        found[name] = Picture(f"{name}.png", *images.decode(data, name).size)
    write_file(folder / PAGE, _page(folder, model, plan, demo, found, options, seed))


def _write(path: Path, image: Tensor) -> None:
    write_file(path, pictures.picture_bytes(images.to_pil(image)), sync=False)


def _page(
    folder: Path, model: DDPM, plan: Plan, demo: Demo, sheets: dict[str, Picture], options: str, seed: int
) -> bytes:
    """sheets: the pictures of several images, by the names of their files."""
    T, (channels, size, _) = model.schedule.T, model.shape
    also = f" --seed {seed}" if seed else ""
    way = f"--steps {len(plan.way.timesteps)} --spacing {plan.way.spacing}"
    a, b = (quote(str(folder / "images" / image_name(i))) for i in range(2))
    columns = ",".join(str(demo.ts[i]) for i in pictures.evenly(len(demo.ts), FRAMES)[::-1])
    draw = f"ddpm sample {options} --n 2 {way}{also} -o images/"
    trace = f"ddpm denoise-trace {options} {way} --frames {len(demo.ts)}{also} -o trace/"
    forward = f"ddpm noise {a} --t"
    of_paper = make_betas(model.schedule_config).equal(make_betas(ScheduleConfig()))  # else it is not `ddpm noise`
    start = min(range(len(demo.ts)), key=lambda i: abs(demo.ts[i] - 0.4 * T))  # of the slider: neither noise nor image
    noised = f"{forward} {demo.ts[start]}{also} -o x_t.png"
    about_it = f" The second command adds noise to it, at t={demo.ts[start]}." if of_paper else ""
    body = [
        html.paragraph(
            f"A diffusion model learns to remove noise from images, and so to make images from nothing but noise. "
            f"This one makes {size}x{size} {'gray' if channels == 1 else 'RGB'} images in at most {T} steps. "
            "All images on this page come from the model; the commands below a picture draw it again."
        ),
        html.section(
            "Through time",
            html.paragraph(
                "The forward process adds noise to an image: a little at small t, until nothing of the image is left "
                f"at t={T}. It needs no model. The reverse process begins with noise alone, and the model takes it "
                "away. At every step it looks at x_t and guesses the clean image, x_0: blurred at first, and then "
                "with more and more detail. The sampler goes a little way towards the guess, and asks again. "
                "At t=0 all three pictures are the same. The slider adds noise to the left, and removes it to the "
                "right."
            ),
            _through_time(model, demo, start),
            html.paragraph(f"These draw two images, and every step on the way to the first one.{about_it}"),
            html.code("\n".join([draw, *([noised] if of_paper else []), trace])),
        ),
        html.section(
            "The forward process",
            html.paragraph(
                "One image and the same noise, eps, at several t: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps "
                "(Eq. 4). abar_t is 1 at t=0, and falls as t grows."
            ),
            html.sheet(sheets["noise"], "an image with more and more noise"),
            html.code(f"{forward} {columns}{also} -o noise.png") if of_paper else "",
        ),
        html.section(
            "The reverse process",
            html.paragraph(
                "From noise to the image. Above the states x_t, below the image that the model predicts from each: "
                "what is large is decided early, and details late (Fig. 6)."
            ),
            html.sheet(sheets["trace"], "states of the reverse process, and predictions of the image"),
            html.code(f"ddpm denoise-trace {options} {way}{also} -o trace.png"),
        ),
        html.section(
            "Samples",
            html.paragraph(
                f"{len(demo.samples)} new images, each from noise of its own. The default sampler takes "
                f"{len(plan.usual.timesteps)} steps; `--sampler ddpm` takes all {T}, as the paper does."
            ),
            html.image(sheets["samples"], "new images from the model", _GRID_WIDTH),
            html.code(f"ddpm sample {options} --n {len(demo.samples)}{also} -o samples.png"),
        ),
        html.section(
            "Between two images",
            html.paragraph(
                "Both images are noised to t, mixed, and denoised (Fig. 8). The row t=0 is the plain mixture of the "
                "pixels: two images on top of each other. With more noise, less is left of the two, and the model "
                "invents more: at large t the noise, which is the same for all, decides what the images show."
            ),
            html.sheet(sheets["interpolation"], "images between two images, by t"),
            html.code(f"ddpm interpolate {a} {b} {options}{also} -o interpolation.png"),
        ),
        html.section(
            "Your own images",
            html.paragraph("`noise`, `denoise-trace` and `interpolate` take any image file. To train a model:"),
            html.code("ddpm train ./images"),
        ),
    ]
    return html.page("What a diffusion model does", "ddpm demo", "".join(body))


def _through_time(model: DDPM, demo: Demo, start: int) -> str:
    """The slider, with the three images at each t."""
    size, schedule = model.shape[-1], model.schedule
    trace = [f"trace/{i:03d}-t{t:04d}" for i, t in enumerate(demo.ts)]
    sources = {
        "forward: x_t, the image with noise": [f"noise/t{t:04d}.png" for t in demo.ts],
        "reverse: x_t, on the way to the image": [f"{name}-xt.png" for name in trace],
        "the image that the model predicts from it, x_0": [f"{name}-x0.png" for name in trace],
    }
    captions = []
    for t in demo.ts:
        tables = (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        signal, noise = (float(table[from_paper(t)]) for table in tables) if t else (1.0, 0.0)
        captions.append(f"t = {t}: forward, x_t = {signal:.3f} x_0 + {noise:.3f} eps")
    rows = {name: [Picture(path, size, size) for path in paths] for name, paths in sources.items()}
    return html.slider(rows, captions, start, _WIDTH, (f"t = {demo.ts[0]}", f"t = {demo.ts[-1]}"))
