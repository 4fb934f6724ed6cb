"""`ddpm demo`: a folder with a page, whose commands draw its pictures again."""

import shlex
from pathlib import Path

from pages import Page, check_alone


def demo_page(folder: Path) -> Page:
    return Page((folder / "index.html").read_bytes())


def test_the_commands_on_the_page_draw_its_pictures(cli, color_model):
    code, out, err = cli("demo", "-m", color_model, "--seed", 3, "-o", "it's a demo")
    assert (code, out) == (0, "it's a demo/index.html\n"), err
    folder = Path("it's a demo")
    page = demo_page(folder)
    check_alone(page, folder)
    drawn = set()
    for command in page.commands:
        program, name, *args = shlex.split(command)
        assert program == "ddpm"
        if name == "train":
            continue
        code, out, err = cli(name, *args)
        assert code == 0, err
        made = Path(args[args.index("-o") + 1])
        for file in sorted(made.glob("*.png")) if made.is_dir() else [made]:
            shown = folder / (f"noise/t{int(args[args.index('--t') + 1]):04d}.png" if made.name == "x_t.png" else file)
            assert shown.read_bytes() == file.read_bytes(), command
            drawn.add(shown)
    everything = {path for path in folder.rglob("*.png") if path.parent.name != "noise"}
    assert {path for path in drawn if path.parent.name != "noise"} == everything


def test_the_slider_goes_from_noise_to_the_image(cli, color_model):
    assert cli("demo", "-m", color_model, "-q")[::2] == (0, "")
    [slider] = demo_page(Path("demo")).sliders
    ts = [int(caption.partition(":")[0].removeprefix("t = ")) for caption in slider["captions"]]
    assert ts == list(range(1000, -1, -20))
    assert slider["captions"][-1].endswith("x_t = 1.000 x_0 + 0.000 eps")
    for row in slider["rows"]:
        assert [f"t{t:04d}" in source for t, source in zip(ts, row, strict=True)] == [True] * len(ts)
    last = {(Path("demo") / row[-1]).read_bytes() for row in slider["rows"]}
    assert last == {Path("demo/images/000000.png").read_bytes()}
    first = [(Path("demo") / row[0]).read_bytes() for row in slider["rows"]]
    assert len(set(first)) == 3


def test_a_model_with_another_schedule(cli, small_model):
    """`ddpm noise` has the paper's schedule, so the page does not name it."""
    code, out, _ = cli("demo", "-m", small_model, "-o", "d/")
    assert (code, out) == (0, "d/index.html\n")
    page = demo_page(Path("d"))
    check_alone(page, Path("d"))
    assert len(page.sliders[0]["captions"]) == 21
    assert not [command for command in page.commands if command.startswith("ddpm noise")]


def test_where_it_writes(cli, small_model):
    assert "is a folder" in cli("demo", "-m", small_model, "-o", "-")[2]
    Path("demo").mkdir()
    Path("demo/mine.txt").touch()
    assert "not empty" in cli("demo", "-m", small_model)[2]
    assert cli("demo", "-m", small_model, "--force")[0] == 0
    assert Path("demo/mine.txt").exists()
    Path("file").touch()
    assert "not a folder" in cli("demo", "-m", small_model, "-o", "file")[2]
