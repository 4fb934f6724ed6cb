"""Completion by shells, through the protocol that the installed scripts use."""

import os
import shutil
import subprocess
import sys

import pytest

from ddpm_cli import names
from ddpm_cli.cli.app import COMMANDS
from ddpm_cli.training.presets import PRESETS

# What the command line imports for a completion, on stderr.
IMPORTS = """
import sys
from ddpm_cli.cli.app import main
try:
    main([])
finally:
    print(*sys.modules, file=sys.stderr)
"""


def environment(line: str, shell: str) -> dict[str, str]:
    """What a shell asks for the end of a line."""
    words = line.split(" ")
    if shell == "bash":
        question = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    else:
        question = {"_TYPER_COMPLETE_ARGS": line, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    return question | {"_DDPM_COMPLETE": f"complete_{shell}"}


def complete(line: str, shell: str = "bash", code: str = "from ddpm_cli.cli.app import main; main()"):
    """The process that a shell starts at the end of a line."""
    env = os.environ | environment(line, shell)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=60)


@pytest.fixture
def _runs(tmp_path):
    for name in ("runs/cats/config.json", "runs/my dogs/config.json", "celeba/model_index.json", "images/1.png"):
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        file.touch()


@pytest.mark.usefixtures("_runs")
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("ddpm ", list(COMMANDS)),
        ("ddpm de", ["demo", "denoise-trace", "decompress"]),
        ("ddpm sample --sp", ["--spacing"]),
        ("ddpm train . --no-", ["--no-flip"]),
        ("ddpm sample --sampler ", list(names.SAMPLERS)),
        ("ddpm denoise-trace --spacing q", ["quadratic"]),
        ("ddpm train . --preset ", ["auto", *PRESETS]),
        ("ddpm train . --fit ", list(names.FITS)),
        ("ddpm train . --prediction ", list(names.PREDICTIONS)),
        ("ddpm train . --variance fixed-l", ["fixed-large"]),
        ("ddpm sample --device c", ["cpu", "cuda"]),
        ("ddpm sample --precision ", list(names.PRECISIONS)),
        ("ddpm eval --metrics f", ["fid"]),
        ("ddpm eval --metrics bpd,fid,", ["bpd,fid,kid", "bpd,fid,is", "bpd,fid,pr"]),
        ("ddpm sample -m ", ["celeba", "runs/cats"]),
        ("ddpm sample --model runs/", ["runs/cats"]),
        ("ddpm train images --from c", ["celeba"]),
        ("ddpm eval r", ["runs/cats"]),
        ("ddpm plot r", ["runs/cats"]),
        ("ddpm push c", ["celeba"]),
        ("ddpm train i", []),  # the shell completes files
        ("ddpm sample -m 'un", []),
        ("ddpm nonsense --n", []),
    ],
)
def test_bash(cli, monkeypatch, line, expected):
    for name, value in environment(line, "bash").items():
        monkeypatch.setenv(name, value)
    code, out, err = cli()
    assert (code, sorted(out.split()), err) == (0, sorted(expected), "")


@pytest.mark.usefixtures("_runs")
def test_zsh_and_fish():
    """They also show what commands and options do."""
    assert complete("ddpm sample --sampler dd", "zsh").stdout == '_arguments \'*: :(("ddpm"\n"ddim"))\'\n'
    assert complete("ddpm sample -m r", "zsh").stdout == "_arguments '*: :((\"runs/cats\"))'\n"
    assert complete("ddpm train i", "zsh").stdout == "_files\n"
    assert complete("ddpm sample --sampler dd", "fish").stdout == "ddpm\nddim\n"
    assert complete("ddpm samp", "fish").stdout == "sample\tSample new images from a model.\n"
    options = complete("ddpm sample --s", "fish").stdout.splitlines()  # with texts of several lines in a help
    assert [line.split("\t")[0] for line in options] == ["--sampler", "--steps", "--spacing", "--scale", "--seed"]


@pytest.mark.parametrize("line", ["ddpm ", "ddpm train . --preset ", "ddpm sample -m ", "ddpm eval --metrics "])
def test_it_imports_little(line):
    result = complete(line, code=IMPORTS)
    assert result.returncode == 0
    assert not {"torch", "numpy", "PIL", "safetensors", "huggingface_hub"} & set(result.stderr.split())


@pytest.mark.usefixtures("_runs")
@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
def test_the_script_that_is_installed(tmp_path):
    """bash runs it as it does when a user presses Tab."""
    home = tmp_path / "home"
    home.mkdir()
    env = os.environ | {"HOME": str(home), "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    env["_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION"] = "1"  # the tests may run in another shell, or in none
    (tmp_path / "bin").mkdir()
    ddpm = tmp_path / "bin" / "ddpm"
    ddpm.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ddpm_cli "$@"\n')
    ddpm.chmod(0o755)
    subprocess.run([ddpm, "--install-completion", "bash"], env=env, check=True, capture_output=True, timeout=60)
    press_tab = (
        'source ~/.bashrc; COMP_WORDS=(ddpm sample -m r); COMP_CWORD=3; _ddpm_completion ddpm; echo "${COMPREPLY[@]}"'
    )
    result = subprocess.run(
        ["bash", "--norc", "-c", press_tab], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (result.stdout, result.stderr) == ("runs/cats\n", "")
