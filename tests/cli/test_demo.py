"""`ddpm demo`: a folder with a page, whose commands draw its pictures again."""

import json
import shlex
from pathlib import Path

import pytest

from pages import Page, check_alone


def demo_page(folder: Path) -> Page:
    return Page((folder / "index.html").read_bytes())


@pytest.fixture(scope="module")
def demo(color_model, tmp_path_factory) -> Path:
    """The folder of a demo. Tests must not change it."""
    from ddpm_cli.cli.app import main

    folder = tmp_path_factory.mktemp("demos") / "it's a demo"
    with pytest.raises(SystemExit, match=r"^0$"):
        main(["demo", "-m", str(color_model), "--seed", "3", "--precision", "fp32", "-o", str(folder), "-q"])
    return folder


def test_the_commands_on_the_page_draw_its_pictures(cli, demo):
    page = demo_page(demo)
    check_alone(page, demo)
    drawn = set()
    for command in page.commands:
        program, name, *args = shlex.split(command)
        assert program == "ddpm"
        if name == "train":
            continue
        code, out, err = cli(name, *args)
        assert (code, out) == (0, f"{args[args.index('-o') + 1]}\n".replace("/\n", "\n")), err
        made = Path(args[args.index("-o") + 1])
        for file in sorted(made.glob("*.png")) if made.is_dir() else [made]:
            shown = f"noise/t{int(args[args.index('--t') + 1]):04d}.png" if made.name == "x_t.png" else file
            assert (demo / shown).read_bytes() == file.read_bytes(), command
            drawn.add(demo / shown)
    assert {path for path in demo.rglob("*.png") if path.parent.name != "noise"} < drawn


def test_the_slider_goes_from_noise_to_the_image(demo):
    [slider] = demo_page(demo).sliders
    ts = [int(caption.partition(":")[0].removeprefix("t = ")) for caption in slider["captions"]]
    assert ts == list(range(1000, -1, -20))
    assert slider["captions"][-1].endswith("x_t = 1.000 x_0 + 0.000 eps")
    for row in slider["rows"]:
        assert [f"t{t:04d}" in source for t, source in zip(ts, row, strict=True)] == [True] * len(ts)
    last = {(demo / row[-1]).read_bytes() for row in slider["rows"]}
    assert last == {(demo / "images" / "000000.png").read_bytes()}
    assert len({(demo / row[0]).read_bytes() for row in slider["rows"]}) == 3


def test_a_model_with_another_schedule(cli, small_model):
    """`ddpm noise` has the paper's schedule, so the page does not name it."""
    Path("demo").mkdir()
    Path("demo/mine.txt").touch()
    assert "not empty" in cli("demo", "-m", small_model)[2]
    code, out, _ = cli("demo", "-m", small_model, "--force", "--json")
    assert (code, json.loads(out)["output"]) == (0, "demo/index.html")
    assert Path("demo/mine.txt").exists()
    page = demo_page(Path("demo"))
    check_alone(page, Path("demo"))
    assert len(page.sliders[0]["captions"]) == 21
    assert not [command for command in page.commands if command.startswith("ddpm noise")]


def test_it_needs_a_folder(cli, small_model):
    assert "-o -: a demo is a folder" in cli("demo", "-m", small_model, "-o", "-")[2]
    Path("file").touch()
    assert "not a folder" in cli("demo", "-m", small_model, "-o", "file")[2]
