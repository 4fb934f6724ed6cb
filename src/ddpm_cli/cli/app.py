"""`ddpm`: the commands, and how their errors are shown."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated, NoReturn

import typer

from ddpm_cli import __version__
from ddpm_cli.cli import convert, info, noise, plot, push, sample, trace, train
from ddpm_cli.cli.console import print_error
from ddpm_cli.errors import DDPMError, ElsewhereError

app = typer.Typer(
    name="ddpm",
    help="Denoising Diffusion Probabilistic Models on your own images.",
    epilog="Exit codes: 0 done, 1 failed, 2 wrong usage, 129, 130, 143 stopped by SIGHUP, Ctrl-C, SIGTERM. "
    "DDPM_DEBUG=1: tracebacks.",
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ddpm {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _ddpm(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command("train")(train.train)
app.command("sample")(sample.sample)
app.command("noise")(noise.noise)
app.command("denoise-trace")(trace.denoise_trace)
app.command("info")(info.info)
app.command("push")(push.push)
app.command("plot")(plot.plot)
# Names of options may be written with _ too, as improved-diffusion's flags are.
app.command("convert", context_settings={"token_normalize_func": lambda name: name.replace("_", "-")})(convert.convert)


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 130 interrupted, 143 terminated."""
    arguments = sys.argv[1:] if args is None else args
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # photographs have more pixels today
    try:
        code = app(args=arguments, prog_name="ddpm", standalone_mode=False)
    except Exception as error:
        if os.environ.get("DDPM_DEBUG") == "1":
            raise
        code = _explain(error, arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _explain(error: Exception, arguments: list[str]) -> int:
    """Print what went wrong. Returns the exit code."""
    command = next((a for a in arguments if a in _COMMANDS), None)
    memory_hint = _MEMORY_HINTS.get(command or "", "Close other programs, or use another --device.")
    match error:
        case ElsewhereError():
            return error.exit_code
        case DDPMError():
            print_error(error.message, error.hint)
            return error.exit_code
        case typer.TyperException():
            print_error(error.format_message(), f"ddpm {command} -h" if command else "ddpm -h")
            return error.exit_code
        case typer.Abort():
            return 130
        case MemoryError():
            print_error("out of memory", memory_hint)
        case OSError():
            print_error(str(error))
        case _ if type(error).__name__ == "OutOfMemoryError":  # of a GPU; torch need not be imported to name it
            print_error(f"the device is out of memory ({str(error).splitlines()[0]})", memory_hint)
        case RuntimeError() if "can't allocate memory" in str(error):  # of a processor
            print_error("out of memory", memory_hint)
        case _:
            print_error(
                f"{type(error).__name__}: {error}",
                "This looks like a bug in ddpm. DDPM_DEBUG=1 shows where it happened; please report it with that.",
            )
    return 1


_COMMANDS = [command.name for command in app.registered_commands]
_MEMORY_HINTS = {
    "train": "Use --accumulate 2 or more, a smaller --batch-size, or a smaller --size or --preset for a new model.",
    "sample": "Use a smaller --batch-size.",
}
