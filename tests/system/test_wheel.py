"""The wheel: the package with its data, and nothing else. `.ci/wheel` installs it; here it is built in this process."""

import re
import shutil
import tomllib
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from ddpm_cli import __version__

ROOT = Path(__file__).parents[2]
CONSTRAINTS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines()[1:])


def build(root: Path, folder: Path) -> zipfile.ZipFile:
    """The wheel of the project in `root`, written into `folder`."""
    (wheel,) = WheelBuilder(str(root)).build(directory=str(folder), versions=["standard"])
    return zipfile.ZipFile(wheel)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_bytes(wheel.read(name))


@pytest.fixture
def project(tmp_path) -> Path:
    """A copy of what the wheel is made of, for tests that add files to it."""
    copy = tmp_path / "project"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def test_the_wheel_is_the_package_and_nothing_else(tmp_path):
    with build(ROOT, tmp_path) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    package = ROOT / "src" / "ddpm_cli"
    files = {path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert names == {f"ddpm_cli/{path.relative_to(package).as_posix()}" for path in files}
    assert {"ddpm_cli/py.typed", "ddpm_cli/cli/app.py"} <= names


def test_data_of_the_package_is_in_the_wheel(tmp_path, project):
    model = project / "src" / "ddpm_cli" / "box" / "digits" / "unet"
    model.mkdir(parents=True)
    for name in ("diffusion_pytorch_model.safetensors", "config.json"):
        (model / name).write_bytes(b"{}")
    (project / "tests").mkdir()
    (project / "tests" / "test_a.py").touch()
    with build(project, tmp_path) as wheel:
        data = [name for name in wheel.namelist() if "box/" in name or "test" in name]
    assert sorted(data) == [
        "ddpm_cli/box/digits/unet/config.json",
        "ddpm_cli/box/digits/unet/diffusion_pytorch_model.safetensors",
    ]


def test_the_metadata_says_what_was_tested(tmp_path):
    with build(ROOT, tmp_path) as wheel:
        about = metadata(wheel)
        licences = [name for name in wheel.namelist() if "/licenses/" in name]
    assert about["Version"] == __version__
    assert [name.rpartition("/")[2] for name in licences] == about.get_all("License-File") == ["LICENSE"]
    classifiers = about.get_all("Classifier")
    assert "Typing :: Typed" in classifiers
    versions = [name.rpartition(" ")[2] for name in classifiers if re.search(r":: 3\.\d+$", name)]
    assert about["Requires-Python"] == f">={min(versions, key=lambda version: int(version[2:]))}"


def test_a_release_names_its_version_everywhere():
    """The newest section of CHANGELOG.md and CITATION.cff have the version of the package."""
    newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest
    assert newest[1] == __version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^version: (.*)$", citation, re.M) == [__version__]
    released = re.findall(r"^date-released: (.*)$", citation, re.M)
    assert released == ([] if newest[2] == "unreleased" else [newest[2]])


def test_constraints_pin_everything_that_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    names = {re.split(r"[\[>]", line)[0] for group in groups for line in group} - {"ddpm-cli"}
    assert names <= set(CONSTRAINTS)
