"""Rules of the project: allowed imports, documented options, short lines in Markdown."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import typer

from ddpm_cli.cli.app import COMMANDS, build

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "ddpm_cli"
# A package may import only what is above it. The modules of the ground floor come first.
GROUND = {
    *("errors", "text", "hub_address", "config", "files", "device", "rng", "distributed", "threads", "heap", "machine"),
    *("run_folder", "signals", "names", "writable"),
}
PACKAGES = ["nn", "diffusion", "data", "models", "evaluation", "compression", "training", "cli"]
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


def test_every_module_is_in_the_order():
    top = {path.stem for path in SOURCE.glob("*.py")} - {"__init__", "__main__"}
    folders = {path.name for path in SOURCE.iterdir() if any(path.glob("*.py"))}
    assert (top | folders) == (GROUND | set(PACKAGES))


@pytest.mark.parametrize("module", [module for module in MODULES if module not in ("__init__", "__main__")])
def test_imports_point_one_way(module):
    floor = module.split("/")[0]
    allowed = GROUND | set(PACKAGES[: PACKAGES.index(floor) + 1] if floor in PACKAGES else [])
    for other in ours(module):
        assert other.split("/")[0] in allowed | {"__init__"}, f"{module} imports {other}"


def test_there_are_no_import_cycles():
    graph = {module: ours(module) - {module} for module in MODULES if not module.endswith("__init__")}
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names them


@pytest.mark.parametrize("module", [module for module in MODULES if not module.startswith("cli/")])
def test_only_the_command_line_prints(module):
    assert not {name.split(".")[0] for name in imports(SOURCE / f"{module}.py")} & {"typer", "rich", "click"}
    assert not re.search(r"\bprint\(|sys\.std(out|err)", (SOURCE / f"{module}.py").read_text())


def test_settings_do_not_import_torch():
    settings = [module for module in MODULES if module.startswith("config/")]
    for module in ("errors", *settings, "hub_address", "text", "training/presets"):
        assert not {name for name in imports(SOURCE / f"{module}.py") if name.startswith("torch")}


def test_the_tests_mirror_the_packages():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == {*PACKAGES, "system"}


def test_the_map_names_every_module():
    table = (ROOT / "docs" / "architecture.md").read_text().partition("\n\n## ")[0]
    named = set(re.findall(r"`(\w+)/?`", table))
    for module in MODULES:
        package, _, rest = module.rpartition("/")
        if module.startswith("cli/") or rest.startswith("__"):
            continue
        below = package.partition("/")[2] or (package if package not in PACKAGES else "")  # samplers/, config/
        assert (below or rest) in named, f"docs/architecture.md does not name {module}"


def options_of(command: str) -> set[str]:
    parameters = typer.main.get_command(build(command)).params
    return {opt for p in parameters for opt in (*p.opts, *p.secondary_opts) if opt.startswith("--")} - {"--help"}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_documented_and_every_documented_option_exists(command):
    """docs/commands.md has a section per command and two for common options, with a table row per option."""
    sections = re.split(r"^## ", (ROOT / "docs" / "commands.md").read_text(), flags=re.M)
    by_title = {section.split("\n")[0]: section for section in sections}

    def rows(title: str) -> set[str]:
        return {
            o for row in re.findall(r"^\| (`-.*?) \|", by_title[title], re.M) for o in re.findall(r"--[a-z-]+", row)
        }

    own, shared = rows(f"ddpm {command}"), rows("Common options") | rows("Sampling")
    exist = options_of(command)
    assert exist <= own | shared
    assert own <= exist


MARKDOWN = [
    path.relative_to(ROOT).as_posix() for folder in ("docs", "examples") for path in ROOT.glob(f"{folder}/*.md")
]


def long_lines(markdown: str) -> list[str]:
    """Lines of more than 100 columns and more than one sentence, outside code and tables.

    The addresses of links do not count, nor does a heading in bold at the start of a line.
    """
    found, fenced = [], False
    for line in markdown.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not fenced and not line.startswith(("    ", "|", "<!--")):
            text = re.sub(r"\]\([^)]*\)|<?https?://\S+", "]", line)
            body = re.sub(r"^([-*]|\d+\.)? *\*\*.*?\*\* ", "", text)
            if len(text) > 100 and re.search(r"[.!?]\)?\*{0,2} +[A-Z`*\[(]", body):
                found.append(line)
    return found


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *MARKDOWN])
def test_markdown_has_short_lines_or_one_sentence_a_line(name):
    assert not long_lines((ROOT / name).read_text())


def test_a_long_line_is_found():
    sentence = "word " * 21 + "end."
    assert long_lines(f"{sentence} Another one.") == [f"{sentence} Another one."]
    assert not long_lines(f"{sentence}\nShort. Lines.\n    {sentence} Code.\n| {sentence} Table. |\n")
    assert not long_lines(f"See [this](https://example.org/{'x' * 99}). It is short.")
