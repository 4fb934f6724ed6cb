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
    assert cli("smaple") == (2, "", "Error: smaple: no such command\nHint: Did you mean ddpm sample?\n")
    assert cli("paint") == (2, "", "Error: paint: no such command\nHint: ddpm -h lists them.\n")


@pytest.mark.parametrize(
    ("args", "typed", "meant"),
    [
        (("--versoin",), "--versoin", "--version"),
        (("sample", "--smapler", "ddim"), "--smapler", "--sampler"),
        (("sample", "--batch_size=3"), "--batch_size", "--batch-size"),
        (("sample", "-steps", "5"), "-steps", "--steps"),
        (("train", ".", "--no-flop"), "--no-flop", "--no-flip"),
        (("convert", "a.pt", "--image_sice", "3"), "--image-sice", "--image-size"),
    ],
)
def test_a_mistyped_option_is_named(cli, args, typed, meant):
    assert cli(*args) == (2, "", f"Error: {typed}: no such option\nHint: Did you mean {meant}?\n")


def test_an_option_like_no_other_points_to_the_help(cli):
    assert cli("sample", "-z")[2] == "Error: -z: no such option\nHint: ddpm sample -h\n"


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (("sample", "--sampler", "dpmpp"), "--sampler dpm++"),
        (("sample", "--spacing", "quad"), "--spacing quadratic"),
        (("sample", "--weights", "rwa"), "--weights raw"),
        (("sample", "--precision", "bfloat16"), "--precision bf16"),
        (("train", ".", "--preset", "cifar"), "--preset cifar10"),
        (("train", ".", "--fit", "padding"), "--fit pad"),
        (("train", ".", "--prediction", "eps"), "--prediction epsilon"),
        (("train", ".", "--loss", "vbl"), "--loss vlb"),
        (("train", ".", "--variance", "large"), "--variance fixed-large"),
        (("train", ".", "--schedule", "cosin"), "--schedule cosine"),
        (("eval", "--metrics", "bpd,fdi"), "--metrics fid"),
        (("eval", "--fit", "crpo"), "--fit crop"),
        (("neighbors", "a", "--fit", "crpo"), "--fit crop"),
        (("noise", "a.png", "--format", "tensors"), "--format safetensors"),
        (("denoise-trace", "--show", "botg"), "--show both"),
        (("interpolate", "a", "b", "--via", "latents"), "--via latent"),
        (("convert", "a.pt", "-o", "b", "--noise-schedule", "cosin"), "--noise-schedule cosine"),
    ],
)
def test_a_mistyped_name_is_named_before_any_work(cli, args, meant):
    """There is no model, run or image, so a later check would find another mistake."""
    code, out, err = cli(*args)
    assert (code, out, err.splitlines()[1:]) == (2, "", [f"Hint: Did you mean {meant}?"])


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
