"""`ddpm convert`: weights of other programs as a model of the field."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.errors import DDPMError, ModelError

__all__ = ["convert"]

_TRAINED: dict[str, Any] = {"rich_help_panel": "How the model was trained (improved-diffusion's flags)"}


def _count(name: str, help: str) -> Any:
    return typer.Option(name, parser=options.parse_count, metavar="N", help=help, **_TRAINED)


def _switch(name: str, help: str) -> Any:
    return typer.Option(name, metavar="True|False", help=help, **_TRAINED)


def _truth(text: str | None) -> bool | None:
    return None if text is None else options.parse_bool(text)


def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="A .ckpt of pytorch_diffusion, or a .pt of improved-diffusion.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The model directory to write.")],
    image_size: Annotated[int | None, _count("--image-size", "Default: as the weights show it.")] = None,
    num_channels: Annotated[int | None, _count("--num-channels", "Checked against the weights.")] = None,
    num_res_blocks: Annotated[int | None, _count("--num-res-blocks", "Checked against the weights.")] = None,
    num_heads: Annotated[int | None, _count("--num-heads", "Attention heads. Default: 4, as theirs.")] = None,
    attention_resolutions: Annotated[
        str | None,
        typer.Option("--attention-resolutions", metavar="N,N", help="Checked against the weights.", **_TRAINED),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option("--dropout", min=0, max=1, metavar="P", help="Matters for further training.", **_TRAINED),
    ] = None,
    learn_sigma: Annotated[str | None, _switch("--learn-sigma", "Checked against the weights.")] = None,
    sigma_small: Annotated[str | None, _switch("--sigma-small", "Whether a fixed variance is beta~_t.")] = None,
    class_cond: Annotated[str | None, _switch("--class-cond", "Class-conditional models are refused.")] = None,
    use_scale_shift_norm: Annotated[
        str | None, _switch("--use-scale-shift-norm", "Checked against the weights.")
    ] = None,
    diffusion_steps: Annotated[int | None, _count("--diffusion-steps", "T. Needed for improved-diffusion.")] = None,
    noise_schedule: Annotated[
        str | None,
        typer.Option(
            "--noise-schedule", metavar="NAME", help="linear or cosine. Needed for improved-diffusion.", **_TRAINED
        ),
    ] = None,
    predict_xstart: Annotated[str | None, _switch("--predict-xstart", "Whether it predicts x_0.")] = None,
    rescale_timesteps: Annotated[
        str | None, _switch("--rescale-timesteps", "Whether it sees t * 1000 / T. Default: True, as theirs.")
    ] = None,
    rescale_learned_sigmas: Annotated[
        str | None, _switch("--rescale-learned-sigmas", "Of their training only; not needed.")
    ] = None,
    use_kl: Annotated[str | None, _switch("--use-kl", "Of their training only; not needed.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Make a model of weights from pytorch_diffusion (.ckpt: the paper's) or OpenAI's improved-diffusion (.pt).

    The flags may be pasted as improved-diffusion's README lists them, with _ for -.
    What the weights show need not be said, and is checked if it is.
    """
    console = Console("convert", as_json, quiet)
    from ddpm_cli.files import new_directory
    from ddpm_cli.models import pipeline
    from ddpm_cli.models.convert import Flags
    from ddpm_cli.models.convert import convert as convert_file
    from ddpm_cli.models.facts import facts, words

    if output.exists():
        is_model = pipeline.is_only_a_model(output)
        if not is_model or (any(output.iterdir()) and not force):
            raise DDPMError(f"-o {output}: exists", f"Name another folder{', or use --force' if is_model else ''}.")
    flags = Flags(
        image_size=image_size,
        num_channels=num_channels,
        num_res_blocks=num_res_blocks,
        num_heads=num_heads,
        attention_resolutions=options.parse_sizes(attention_resolutions) if attention_resolutions else None,
        dropout=dropout,
        learn_sigma=_truth(learn_sigma),
        sigma_small=_truth(sigma_small),
        class_cond=_truth(class_cond),
        use_scale_shift_norm=_truth(use_scale_shift_norm),
        diffusion_steps=diffusion_steps,
        noise_schedule=noise_schedule,
        predict_xstart=_truth(predict_xstart),
        rescale_timesteps=_truth(rescale_timesteps),
    )
    try:
        converted = convert_file(file, flags)
    except ModelError as error:
        message = error.message if error.message.startswith(str(file)) else f"{file}: {error.message}"
        raise ModelError(message, error.hint) from None
    with new_directory(output) as partial:
        pipeline.save_model(partial, converted.weights, converted.unet, converted.schedule)
    model = facts(converted.unet, converted.schedule)
    console.note(f"{file}: weights of {converted.origin}")
    console.table(words(model))
    if isinstance(converted.unet.attention_head_dim, tuple):
        console.warn(
            "its attention has as many heads at every width, which diffusers' UNet2DModel cannot; ddpm alone runs it"
        )
    console.note(f"try it: ddpm sample -m {output} --n 16 --steps 100 -o grid.png")
    console.result(str(output), output=str(output), origin=converted.origin, **model)
