"""The house: who may import whom, and that what exists is documented."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import typer

from ddpm_cli.cli.app import app

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "ddpm_cli"
# Who may import whom: a package only what stands above it. The modules of the ground floor come first.
GROUND = {
    *("errors", "text", "hub_address", "config", "files", "device", "rng", "distributed", "threads"),
}
PACKAGES = ["nn", "diffusion", "data", "models", "training", "cli"]
MODULES = sorted(path.relative_to(SOURCE).with_suffix("").as_posix() for path in SOURCE.rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Modules that a file imports anywhere in it, by their full names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module.startswith("ddpm_cli"):
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    """The modules of the package that a module imports, as paths below it."""
    names = {name.removeprefix("ddpm_cli.").replace(".", "/") for name in imports(SOURCE / f"{module}.py")}
    return {name for name in names if name in MODULES} | {
        f"{name}/__init__" for name in names if (SOURCE / name).is_dir()
    }


def test_every_module_has_its_place():
    top = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.name for path in SOURCE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert (top | folders) == (GROUND | set(PACKAGES))


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("__init__", "__main__")])
def test_imports_point_one_way(module):
    floor = module.split("/")[0]
    allowed = GROUND | set(PACKAGES[: PACKAGES.index(floor) + 1] if floor in PACKAGES else [])
    for other in ours(module):
        assert other.split("/")[0] in allowed | {"__init__"}, f"{module} imports {other}"


def test_no_module_imports_itself_by_way_of_others():
    graph = {module: ours(module) - {module} for module in MODULES if not module.endswith("__init__")}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("cli/")])
def test_only_the_command_line_prints(module):
    assert not {name.split(".")[0] for name in imports(SOURCE / f"{module}.py")} & {"typer", "rich", "click"}
    assert not re.search(r"\bprint\(|sys\.std(out|err)", (SOURCE / f"{module}.py").read_text())


def test_settings_know_nothing_of_torch():
    for module in ("errors", "config", "hub_address", "text", "training/presets"):
        assert not {name for name in imports(SOURCE / f"{module}.py") if name.startswith("torch")}


def test_the_tests_mirror_the_packages():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*PACKAGES, "system"}


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
