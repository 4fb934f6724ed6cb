"""The house: who may import whom, and that what exists is documented."""

import ast
import re
from pathlib import Path

import pytest
import typer

from ddpm_cli.cli.app import app

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "ddpm_cli"
# An import only ever points up this list.
ORDER = [
    *("errors", "config", "presets", "files", "device", "distributed", "images", "sources"),
    *("dataset", "plan", "schedule", "noised", "unet", "objective"),
    *("samplers", "ema", "pretrained", "about", "convert", "checkpoint"),
    *(
        "hub",
        "publish",
        "model",
        "events",
        "metrics",
        "board",
        "background",
        "saver",
        "trainer",
        "rehearsal",
        "plot",
        "gallery",
    ),
]


def imports(path: Path) -> set[str]:
    """Modules of the package, and other packages, that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            if node.module in ("ddpm_cli", "ddpm_cli.cli"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def test_the_list_is_whole():
    assert {path.stem for path in SOURCE.glob("*.py")} == {*ORDER, "__init__", "__main__"}


@pytest.mark.parametrize("name", ORDER)
def test_imports_point_up(name):
    for module in imports(SOURCE / f"{name}.py"):
        root, _, rest = module.partition(".")
        assert root not in ("typer", "rich", "click"), f"{name} prints"
        if root == "ddpm_cli" and rest != "__version__":
            assert rest in ORDER[: ORDER.index(name)], f"{name} imports {rest}"


def test_config_and_errors_know_nothing_of_torch():
    for name in ("errors", "config", "presets"):
        assert not {m for m in imports(SOURCE / f"{name}.py") if m.startswith("torch")}


def test_the_core_does_not_print():
    for name in ORDER:
        assert not re.search(r"\bprint\(|sys\.std", (SOURCE / f"{name}.py").read_text()), name


def options_of(command: str) -> set[str]:
    parameters = typer.main.get_command(app).commands[command].params
    return {opt for p in parameters for opt in (*p.opts, *p.secondary_opts) if opt.startswith("--")} - {"--help"}


@pytest.mark.parametrize("command", [command.name for command in app.registered_commands])
def test_every_option_is_documented_and_every_documented_option_exists(command):
    """docs/commands.md has a section for each command and one for what they share, with a table row an option."""
    sections = re.split(r"^## ", (ROOT / "docs" / "commands.md").read_text(), flags=re.M)
    by_title = {section.split("\n")[0]: section for section in sections}

    def rows(title: str) -> set[str]:
        return {
            o for row in re.findall(r"^\| (`-.*?) \|", by_title[title], re.M) for o in re.findall(r"--[a-z-]+", row)
        }

    own, shared = rows(f"ddpm {command}"), rows("Common options")
    exist = options_of(command)
    assert exist <= own | shared
    assert own <= exist
