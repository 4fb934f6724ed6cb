"""Control characters in the files of a run or a model, in names and in answers of the Hub reach no terminal."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

import hub_server

# Colours, the title of the window, the same with one byte, line breaks of all kinds, text that runs backwards.
ODD = "\x1b[31m\x1b]0;title\x07\x9b31m\x85\x08\x7f\r\u2028\u202e\ud800"
NAME = os.fsdecode(b"\x1b[31m\x07\n\xc2\x9b31m\x7f\xe2\x80\xae\xff")  # what a file can be called; \xff is no UTF-8


@pytest.fixture
def printed(cli):
    """Run the command line: printed("info", "model") -> (code, all that it printed), which is printable."""

    def run(*args: object) -> tuple[int, str]:
        code, out, err = cli(*args)
        assert all(line.isprintable() for line in (out + err).split("\n")), (out, err)
        assert "This looks like a bug" not in err
        if code == 0 and "--json" in args:
            json.loads(out)
        return code, out + err

    return run


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.fixture
def run(quick_run) -> Path:
    """A run with odd text in every place that may have text, in a folder with an odd name."""
    run = Path(shutil.copytree(quick_run, NAME))
    edit(run / "config.json", preset=ODD, version=ODD, base=ODD)
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 5, ODD: 1, "loss": ODD}) + "\n" + ODD.encode(errors="replace").decode())
    for step in (2, 4):
        spoil(run / "checkpoints" / f"step-{step:08d}")
    for folder in (run, run / "samples", run / "checkpoints"):
        (folder / f"step-{NAME}.png").touch()
    return run


@pytest.fixture
def model(small_model) -> Path:
    model = Path(shutil.copytree(small_model, f"m{NAME}"))
    spoil(model)
    return model


def spoil(model: Path) -> None:
    edit(model / "model_index.json", unet=[ODD, ODD], scheduler=[ODD], **{ODD: [ODD, ODD]})
    edit(model / "unet" / "config.json", _name_or_path=ODD, **{f"_{ODD}": ODD})
    edit(model / "scheduler" / "scheduler_config.json", _name_or_path=ODD)
    images = {"name": ODD, "count": ODD, "size": ODD, "fit": ODD, ODD: ODD}
    train = {"steps": ODD, "batch_size": ODD, "lr": ODD, "lr_warmup": ODD, "ema_decay": ODD, "seed": ODD}
    recipe = {"version": ODD, "preset": ODD, "base": ODD, "step": ODD, "images": images, "train": train}
    (model / "ddpm.json").write_text(json.dumps(recipe))
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(save(load(weights.read_bytes()), metadata={"format": "pt", "x": "\x1b[31m\x9b"}))
    (model / NAME).touch()


def test_a_run(printed, run, digits):
    assert printed("plot", run, "-o", "a.png")[0] == printed("plot", run, "--json")[0] == 0
    assert printed("report", run)[0] == printed("report", run, "--json")[0] == 0
    Path("images").mkdir()
    shutil.copy(next(digits.rglob("*.png")), f"images/{NAME}.png")
    (Path("images") / f"bad{NAME}.png").touch()
    code, shown = printed("train", "images", "-o", run, "--resume", "--steps", 6)
    assert (code, "none of its checkpoints can be read" in shown) == (1, True)  # their hashes differ
    shutil.rmtree(run / "checkpoints")
    code, shown = printed("train", "images", "-o", run, "--resume", "--steps", 1, "--force")
    assert (code, r"\x1b[31m" in shown) == (1, True)  # the model that it started from is nowhere
    edit(run / "config.json", base=None)
    assert printed("train", "images", "-o", run, "--resume", "--steps", 1, "--force", "--json")[0] == 0


def test_a_terminal(in_a_terminal, run, model):
    """Only the colours and bars of ddpm itself are printed."""
    code, seen = in_a_terminal("plot", run)
    assert (code, r"\x1b[31m\x07" in seen) == (0, True)
    seen += in_a_terminal("sample", "-m", model, "--n", 1, "--steps", 1)[1] + in_a_terminal("info", f"x{NAME}")[1]
    assert not {"\x1b[31m", "\x1b]", "\x9b", "\x07", "\u202e", "\x7f"} & {
        seen[i : i + n] for i in range(len(seen)) for n in (1, 2, 5)
    }


def test_a_model(printed, model, digits):
    for more in ((), ("--json",)):
        code, shown = printed("info", model, *more)
        assert (code, r"\x1b[31m" in shown or r"\u001b[31m" in shown) == (0, True)
    assert printed("sample", "-m", model, "--n", 1, "--steps", 1, "-o", f"grid{NAME}.png", "--json")[0] == 0
    for _ in range(2):
        assert printed("sample", "-m", model, "--n", 1, "--steps", 1, "-o", f"folder{NAME}/")[0] == 0
    edit(Path(f"folder{NAME}/samples.json"), seed=ODD, precision=[ODD])
    assert printed("sample", "-m", model, "--n", 1, "--steps", 1, "-o", f"folder{NAME}/")[0] == 1
    options = ("--from", model, "--batch-size", 2, "--sample-every", 99)
    assert printed("train", digits, "-o", f"run{NAME}", "--steps", 1, *options)[0] == 0
    card = Path("run" + NAME) / "checkpoints" / "step-00000001" / "README.md"
    assert all(line.isprintable() for line in card.read_text().split("\n"))


@pytest.mark.parametrize(
    ("file", "values"),
    [
        ("model_index.json", {"vae": [ODD, ODD]}),
        ("unet/config.json", {"_class_name": ODD}),
        ("unet/config.json", {ODD: 1}),
        ("unet/config.json", {"down_block_types": [ODD]}),
        ("unet/config.json", {"act_fn": ODD}),
        ("unet/config.json", {"sample_size": ODD}),
        ("scheduler/scheduler_config.json", {"_class_name": ODD}),
        ("scheduler/scheduler_config.json", {"beta_schedule": [ODD]}),
    ],
)
def test_what_is_wrong_with_a_model(printed, model, file, values):
    edit(model / file, **values)
    for command in (("info", model), ("sample", "-m", model), ("push", model, "me/x", "--yes")):
        assert printed(*command)[0] == 1


def test_a_card(printed, model):
    (model / "ddpm.json").unlink()
    hyperparameters = f"## Hyperparameters\n- rate: {ODD}\n- a b: \x1b[31m\n".encode(errors="replace")
    (model / "README.md").write_bytes(b'---\nlicense: "\\e[31m\\x9B"\ndatasets: ["\\a\\r"]\n---\n' + hyperparameters)
    assert "license" in printed("info", model)[1]
    assert printed("info", model, "--json")[0] == 0


def test_tensors(printed, model):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(save(load(weights.read_bytes()) | {"\x1b[31m\x9b": torch.zeros(1)}))
    assert r"\x1b[31m" in printed("info", model)[1]
    torch.save({"\x1b[31m\x9b": torch.zeros(1)}, f"{NAME}.ckpt")
    assert r"\x1b[31m" in printed("convert", f"{NAME}.ckpt", "-o", "out")[1]


@pytest.mark.parametrize("address", ["none" + NAME, f"org/{NAME}", f"https://huggingface.co/{NAME}/{NAME}"])
def test_addresses(printed, address):
    for command in ("info", "plot", "report"):
        assert printed(command, address)[0] == 1
    for command in ("sample", "demo"):
        assert printed(command, "-m", address)[0] == 1
    assert printed("push", address, "me/x", "--yes")[0] == 1
    assert printed("train", address)[0] == 1
    assert printed("noise", address)[0] == 1
    assert printed("sample", f"--{NAME}")[0] == printed(NAME)[0] == printed("push", "x", address)[0] == 2


def test_the_hub(printed, model, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server.serve() as server:
        server.repos["me/there"] = hub_server.Repo({"README.md": b"", "\x1b[31m\x9b": b"", "a\nb": b""})
        code, shown = printed("push", model, "me/there", "--yes")
        assert (code, r"stay too: \x1b[31m\x9b, a\nb" in shown) == (0, True), shown
        assert server.commits == [f"{model.name} from ddpm".encode("unicode_escape").decode()]
        assert printed("info", "me/there")[0] == 0
        monkeypatch.setattr(hub_server.Handler, "information", refuse)
        assert printed("info", "me/other")[0] == 1
        assert printed("push", model, "me/there", "--yes")[0] == 1


def refuse(self, name, rest):
    """The Hub answers with a body and headers of its choice."""
    error = "\x1b[31m\x9b\x07"
    self.answer(400, {"error": error}, X_Error_Message=error, X_Error_Code=error)


def test_json_is_json(printed, small_model):
    """DEL is the only control character that JSON may contain unescaped."""
    code, shown = printed("sample", "-m", small_model, "--n", 1, "--steps", 1, "-o", "a\x7f.png", "--json", "-q")
    assert (code, json.loads(shown)["output"]) == (0, "a\x7f.png")


def test_a_picture_of_a_run_with_an_odd_name(cli, run):
    assert cli("plot", run, "-o", run / "plot.png")[0] == 0
    with Image.open(run / "plot.png") as picture:
        assert picture.size == (1280, 756)
