"""The help is fast, complete and readable at 80 columns, and its examples are valid commands."""

import importlib
import re
import shlex
import subprocess
import sys

import pytest
import typer

from ddpm_cli import __version__
from ddpm_cli.cli.app import COMMANDS, build

HEAVY = ("torch", "numpy", "PIL", "safetensors", "huggingface_hub", "pydantic", "rich.progress", "ddpm_cli.config")

HELP_OF_ALL = """
import sys
from ddpm_cli.cli.app import COMMANDS, main

def help_of(*command):
    try:
        main([*command, "--help"])
    except SystemExit as end:
        assert end.code == 0

help_of("noise")
print(*sorted(name for name in sys.modules if name.startswith("ddpm_cli.cli.")), file=sys.stderr)
help_of()
for name in COMMANDS:
    help_of(name)
print(*sys.modules, file=sys.stderr)
"""


def examples(epilog: str) -> list[list[str]]:
    """The commands in the epilog of a help, as lists of words."""
    lines = epilog.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("  ")]


def test_help_imports_little():
    """It tests the modules that are imported; benchmarks/startup.py measures the time."""
    result = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for_noise, for_all = result.stderr.splitlines()
    shared = {"app", "console", "options", "output"}
    assert for_noise.split() == sorted(f"ddpm_cli.cli.{name}" for name in {"noise", *shared})
    assert not set(HEAVY) & set(for_all.split())


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_at_80_columns(cli, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = cli(*([command] if command else []), "--help")
    assert (code, err) == (0, "")
    assert max(map(len, out.splitlines())) <= 80
    assert "<bool>" not in out
    epilog = [line.strip() for line in typer.main.get_command(build(command)).epilog.splitlines() if line]
    assert [line.strip() for line in out.splitlines() if line.strip()][-len(epilog) :] == epilog


def test_names_in_brackets_are_not_markup(cli):
    for command in ("info", "sample"):
        assert "org/name[@revision]" in cli(command, "--help")[1]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_examples_are_valid_commands(command):
    found = examples(typer.main.get_command(build(command)).epilog)
    assert found
    for program, name, *args in found:
        assert (program, name) == ("ddpm", command or name)
        typer.main.get_command(build(name)).make_context(name, args)  # raises if it does not parse


def test_the_everyday_options_of_train_come_first(cli):
    out = cli("train", "--help")[1]
    panels = re.split("^╭─ (.*?) ─+╮$", out, flags=re.M)
    by_title = {
        title: re.findall("^│ (--[a-z-]+)", text, re.M) for title, text in zip(panels[1::2], panels[2::2], strict=True)
    }
    assert list(by_title) == [
        "Arguments",
        "Options",
        "Images",
        "Training",
        "Objective",
        "Checkpoints and previews",
        "Common options",
    ]
    everyday = ["--output", "--steps", "--preset", "--size", "--batch-size", "--from", "--resume", "--dry-run"]
    assert by_title["Options"] == [*everyday, "--help"]


def test_version(cli):
    assert cli("-V") == (0, f"ddpm {__version__}\n", "")


def test_ddpm_without_a_command_shows_its_help(cli):
    assert cli()[:2] == cli("--help")[:2]


def test_a_mistyped_command_is_named(cli):
    code, _, err = cli("smaple")
    assert (code, "Did you mean 'sample'" in err, "Hint: ddpm -h" in err) == (2, True, True)


def test_wrong_usage_points_to_the_help_of_the_command(cli):
    assert "Hint: ddpm noise -h" in cli("noise")[2]


@pytest.mark.parametrize(("command", "advice"), [("sample", "--batch-size"), ("denoise-trace", "--device")])
def test_the_hint_for_out_of_memory_names_options_of_the_command(cli, monkeypatch, command, advice):
    """Sampling has no --accumulate."""

    def no_memory(*args):
        raise MemoryError

    for module in ("sample", "trace"):
        monkeypatch.setattr(f"ddpm_cli.cli.{module}.open_model", no_memory)
    code, _, err = cli(command, "-o", "a.png")
    assert (code, err.splitlines()[0]) == (1, "Error: out of memory")
    assert advice in err
    assert "--accumulate" not in err


def test_windows_is_told_where_ddpm_runs(monkeypatch):
    """Instead of failing over a module of Unix that is not there."""
    import ddpm_cli.cli

    monkeypatch.setattr("sys.platform", "win32")
    with pytest.raises(SystemExit, match="Error: ddpm runs on Linux and macOS, not on Windows\nHint: Use WSL"):
        importlib.reload(ddpm_cli.cli)
