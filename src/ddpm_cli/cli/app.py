"""`ddpm`: the table of commands, and the handling of errors."""

from __future__ import annotations

import contextlib
import itertools
import os
import sys
import warnings
from importlib import import_module
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand, TyperGroup

from ddpm_cli import __version__
from ddpm_cli.cli.console import print_error
from ddpm_cli.errors import DDPMError, ElsewhereError, UsageError
from ddpm_cli.names import nearest
from ddpm_cli.signals import exit_while_importing

__all__ = ["COMMANDS", "build", "main"]

# Each command, in the order of `ddpm --help`, and its module in `ddpm_cli.cli`. The module holds a function with the
# name of the command and EXAMPLES, the end of its help.
COMMANDS = {
    "demo": "demo",
    "train": "train",
    "sample": "sample",
    "noise": "noise",
    "denoise-trace": "trace",
    "interpolate": "interpolate",
    "invert": "invert",
    "neighbors": "neighbors",
    "compress": "compress",
    "decompress": "decompress",
    "rate-distortion": "rate_distortion",
    "eval": "eval",
    "info": "info",
    "push": "push",
    "plot": "plot",
    "report": "report",
    "convert": "convert",
    "cache": "cache",
}

_ABOUT = "Denoising Diffusion Probabilistic Models on your own images."
_EPILOG = """
Examples:
  ddpm train ./images
  ddpm sample -o grid.png

Exit codes: 0 done, 1 failed, 2 wrong usage, 130 stopped by Ctrl-C,
143 by SIGTERM, 129 by SIGHUP. DDPM_DEBUG=1 shows tracebacks.
"""
_SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"]}
# convert accepts _ for -, as in the flags of improved-diffusion.
_OWN_SETTINGS: dict[str, Any] = {"convert": {"token_normalize_func": lambda name: name.replace("_", "-")}}


def _without_bool(parameters: list[Any]) -> list[Any]:
    """A flag takes no value, so the help shows no `<bool>` after it."""
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_bool(super().get_params(ctx))


class _Group(TyperGroup):
    def get_params(self, ctx: Any) -> list[Any]:
        return _without_bool(super().get_params(ctx))


def _version(wanted: bool) -> None:
    if wanted:
        print(f"ddpm {__version__}")
        raise typer.Exit()


def _ddpm(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())


def build(only: str | None = None) -> typer.Typer:
    """Build the command line: all of `ddpm`, or one command by itself.

    One command by itself starts in half the time. No other command's module is imported, and Typer does not process
    the options of the group, which would import pydantic.
    """
    app = typer.Typer(
        name="ddpm",
        cls=_Group,
        help=_ABOUT,
        epilog=_EPILOG,
        context_settings=_SETTINGS,
        add_completion=only is None,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    if only is None:
        app.callback(invoke_without_command=True)(_ddpm)
    for name in [only] if only else COMMANDS:
        module = import_module(f"ddpm_cli.cli.{COMMANDS[name]}")
        settings = _SETTINGS | _OWN_SETTINGS.get(name, {})
        register = app.command(name, cls=_Command, epilog=module.EXAMPLES, context_settings=settings)
        register(getattr(module, name.replace("-", "_")))
    return app


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 0 done, 1 failed, 2 wrong usage, 128 + N stopped by signal N."""
    arguments = sys.argv[1:] if args is None else args
    warnings.filterwarnings("ignore", message="Image size .* exceeds limit")  # photographs often exceed it
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    if "_DDPM_COMPLETE" in os.environ:
        os.environ["COLUMNS"] = "1000"  # fish takes each line of an option's help for a completion
    try:
        _refuse_empty(arguments)
        with exit_while_importing("torch"):
            if command:
                code = build(command)(args=arguments[1:], prog_name=f"ddpm {command}", standalone_mode=False)
            elif arguments and not arguments[0].startswith("-"):
                raise _unknown_command(arguments[0])
            else:
                code = build()(args=arguments, prog_name="ddpm", standalone_mode=False)
    except Exception as error:
        if os.environ.get("DDPM_DEBUG") == "1":
            raise
        code = _explain(error, command, arguments)
    _exit(code if isinstance(code, int) else 0)


def _exit(code: int) -> NoReturn:
    """End the process. Everything that it had to finish is finished: commands close what they open."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        # Threads of a process group may still free a tensor. That aborts a process whose interpreter is ending.
        with contextlib.suppress(OSError):  # a closed pipe
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _unknown_command(name: str) -> UsageError:
    near = nearest(name, COMMANDS)
    return UsageError(f"{name}: no such command", f"Did you mean ddpm {near}?" if near else "ddpm -h lists them.")


def _refuse_empty(arguments: list[str]) -> None:
    """Raises UsageError for an option with an empty value: `-o "$OUT"` would write into the current folder."""
    for option, value in itertools.pairwise(arguments):
        if option.startswith("-") and option != "-" and not value:
            raise UsageError(f"the value after {option} is empty", "Is a variable not set?")
    for word in arguments:
        if word.startswith("-") and word.endswith("="):
            raise UsageError(f"{word} has no value", "Is a variable not set?")


def _unknown_option(error: Any, arguments: list[str], program: str) -> UsageError:
    # Typer reads -steps as -s and so on, so look for the word that was typed.
    typed = next((word for word in arguments if word.startswith(error.option_name)), error.option_name)
    typed = typed.partition("=")[0]
    options = error.ctx.command.get_params(error.ctx)
    names = [name for option in options for name in (*option.opts, *option.secondary_opts)]
    known = {name.lstrip("-"): name for name in names if name.startswith("--")}
    near = nearest(typed.lstrip("-"), known)
    return UsageError(f"{typed}: no such option", f"Did you mean {known[near]}?" if near else f"{program} -h")


def _explain(error: Exception, command: str | None, arguments: list[str]) -> int:
    """Print what went wrong, and return the exit code."""
    program = f"ddpm {command}" if command else "ddpm"
    if type(error).__name__ == "NoSuchOption":  # by name, since it is a private class of Typer
        error = _unknown_option(error, arguments, program)
    match error:
        case ElsewhereError():
            return error.exit_code
        case DDPMError():
            print_error(error.message, error.hint)
            return error.exit_code
        case typer.TyperException():
            print_error(error.format_message(), f"{program} -h")
            return error.exit_code
        case typer.Abort():
            return 130
        case MemoryError():
            print_error("out of memory", _MEMORY_HINTS.get(command))
        case OSError():
            print_error(str(error))
        case _ if type(error).__name__ == "OutOfMemoryError":  # of a GPU; by name, since torch may not be imported
            print_error(f"the device is out of memory ({str(error).splitlines()[0]})", _MEMORY_HINTS.get(command))
        case RuntimeError() if "can't allocate memory" in str(error):  # of a CPU
            print_error("out of memory", _MEMORY_HINTS.get(command))
        case _ if any(kind.__name__ == "TorchDynamoException" for kind in type(error).__mro__):  # by name, as above
            why = getattr(error, "inner_exception", error)
            reason, _, _ = f"{type(why).__name__}: {why}".partition("\n")
            print_error(
                f"--compile: PyTorch cannot compile the network here ({reason})",
                "Leave it out. It needs a C++ compiler, and for a GPU Triton.",
            )
        case _:
            print_error(
                f"{type(error).__name__}: {error}",
                "This looks like a bug in ddpm. Please report it with its traceback, which DDPM_DEBUG=1 shows.",
            )
    return 1


_MEMORY_HINTS: dict[str | None, str] = {
    "train": "Use --accumulate 2 or more, a smaller --batch-size, or a smaller --size or --preset for a new model.",
    "sample": "Use a smaller --batch-size.",
    "denoise-trace": "Use another --device, or a smaller model.",
    "demo": "Use another --device, or a smaller model.",
    "interpolate": "Use another --device, or a smaller --n or model.",
    "invert": "Use another --device, or a smaller model.",
    "compress": "Use another --device, or a smaller model.",
    "decompress": "Use another --device, or a smaller model.",
    "rate-distortion": "Use a smaller --batch-size.",
    "eval": "Use a smaller --batch-size.",
}
