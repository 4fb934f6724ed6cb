"""`ddpm convert`: weights of other programs as a diffusers pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ddpm_cli.cli import options
from ddpm_cli.cli.console import Console
from ddpm_cli.errors import DDPMError, ModelError

__all__ = ["EXAMPLES", "convert"]

EXAMPLES = """
Examples:
  ddpm convert model-4432000.ckpt -o lsun-church
  ddpm convert cifar10_uncond_50M_500K.pt -o cifar10 --num_res_blocks 3 \\
    --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine
"""

_TRAINED: dict[str, Any] = {"rich_help_panel": "How the model was trained (flags of improved-diffusion)"}


def _count(name: str, help: str) -> Any:
    return typer.Option(name, parser=options.parse_count, metavar="N", help=help, **_TRAINED)


def _switch(name: str, help: str) -> Any:
    return typer.Option(name, metavar="True|False", help=help, **_TRAINED)


def _truth(text: str | None) -> bool | None:
    return None if text is None else options.parse_bool(text)


def convert(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="A .ckpt file of pytorch_diffusion, or a .pt file of improved-diffusion."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The model directory to write.")],
    image_size: Annotated[int | None, _count("--image-size", "Pixels. Default: taken from the weights.")] = None,
    num_channels: Annotated[int | None, _count("--num-channels", "Must match the weights.")] = None,
    num_res_blocks: Annotated[int | None, _count("--num-res-blocks", "Must match the weights.")] = None,
    num_heads: Annotated[int | None, _count("--num-heads", "Attention heads. Default: 4.")] = None,
    attention_resolutions: Annotated[
        str | None,
        typer.Option("--attention-resolutions", metavar="N,N", help="Must match the weights.", **_TRAINED),
    ] = None,
    dropout: Annotated[
        float | None,
        typer.Option("--dropout", min=0, max=1, metavar="P", help="Used only for more training.", **_TRAINED),
    ] = None,
    learn_sigma: Annotated[str | None, _switch("--learn-sigma", "Must match the weights.")] = None,
    sigma_small: Annotated[
        str | None, _switch("--sigma-small", "Whether a fixed variance is the small one, beta~_t.")
    ] = None,
    class_cond: Annotated[
        str | None, _switch("--class-cond", "Must be False: ddpm has no class-conditional models.")
    ] = None,
    use_scale_shift_norm: Annotated[str | None, _switch("--use-scale-shift-norm", "Must match the weights.")] = None,
    diffusion_steps: Annotated[int | None, _count("--diffusion-steps", "T. Required for improved-diffusion.")] = None,
    noise_schedule: Annotated[
        str | None,
        options.named(
            "--noise-schedule",
            ("linear", "cosine"),
            help="linear or cosine. Required for improved-diffusion.",
            **_TRAINED,
        ),
    ] = None,
    predict_xstart: Annotated[str | None, _switch("--predict-xstart", "Whether the network predicts x_0.")] = None,
    rescale_timesteps: Annotated[
        str | None, _switch("--rescale-timesteps", "Whether the network sees t * 1000 / T. Default: True.")
    ] = None,
    rescale_learned_sigmas: Annotated[
        str | None, _switch("--rescale-learned-sigmas", "Accepted and ignored: matters only in training.")
    ] = None,
    use_kl: Annotated[str | None, _switch("--use-kl", "Accepted and ignored: matters only in training.")] = None,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
    force: options.Force = False,
) -> None:
    """Convert weights of pytorch_diffusion or improved-diffusion to a model.

    pytorch_diffusion (.ckpt) has the models of the paper.
    improved-diffusion (.pt) is by OpenAI. You can paste the flags of its README.
    A flag that the weights determine is optional, and must match them.
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
            raise DDPMError(
                f"-o {output}: exists already", f"Name another folder{', or use --force' if is_model else ''}."
            )
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
            "this model has the same number of attention heads at every width, which UNet2DModel of diffusers does not "
            "support; it runs only in ddpm"
        )
    console.note(f"Try it: ddpm sample -m {output} --n 16 --steps 100 -o grid.png")
    console.result(str(output), output=str(output), origin=converted.origin, **model)
