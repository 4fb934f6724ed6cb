"""`ddpm push` to a Hub on 127.0.0.1 over real HTTP: what is sent, what is shown, and what arrives."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline
from huggingface_hub import ModelCard
from test_field import MODELS, written_by_diffusers

import hub_server
from ddpm_cli import DDPM
from ddpm_cli.models.results import write_results

TOKEN = "hf_thisIsAVerySecretToken"
SENT = {
    "README.md",
    "ddpm.json",
    "model_index.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with hub_server.serve() as server:
        yield server


@pytest.fixture
def run(finished_run):
    return str(shutil.copytree(finished_run, "run"))


def arrived(server, name: str, folder: Path) -> Path:
    for path, data in server.repos[name].files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    return folder


def test_a_run_arrives_and_loads(cli, server, run, tmp_path):
    code, out, err = cli("push", run, "me/digits", "--yes", "--private")
    assert (code, out) == (0, f"{hub_server.URL}/me/digits\n"), err
    assert "run/checkpoints/step-00000004 -> me/digits (private, new)" in err
    repo = server.repos["me/digits"]
    assert repo.private
    assert repo.files.keys() == SENT  # no training state
    assert all(name in err for name in SENT)
    assert len(server.commits) == 1  # all or nothing
    theirs = DDPMPipeline.from_pretrained(arrived(server, "me/digits", tmp_path / "arrived"))
    ours = DDPM.from_pretrained(run, precision="fp32")
    x_t, t = torch.randn(2, *ours.shape), torch.tensor([7, 7])
    with torch.no_grad():
        torch.testing.assert_close(theirs.unet(x_t, t).sample, ours.unet(x_t, t), rtol=1e-4, atol=1e-5)
    card = ModelCard.load(tmp_path / "arrived" / "README.md")
    assert "ddpm sample -m me/digits" in card.text
    assert "![Samples](samples.png)" in card.text
    assert cli("sample", "-m", "me/digits", "--n", "1", "--steps", "2", "-o", "a.png", "-q")[0] == 0


def test_the_results_of_an_evaluation_arrive(cli, server, run):
    model = DDPM.from_pretrained(run, precision="fp32")
    folder = Path(run) / "eval" / "step-00000004"
    folder.mkdir(parents=True)
    result = {"metric": "fid", "set": "digits", "value": 12.5, "how": "5000 samples"}
    write_results(folder, model.fingerprint(), [result])
    assert cli("push", run, "me/digits", "--yes")[0] == 0
    files = server.repos["me/digits"].files
    assert files.keys() == {*SENT, "eval.json"}
    assert "| FID (digits) | 12.500 | 5000 samples |" in files["README.md"].decode()
    write_results(folder, "of another model", [result])
    assert cli("push", run, "me/other", "--yes")[0] == 0
    assert server.repos["me/other"].files.keys() == SENT


def test_the_token_is_sent_and_never_shown_or_kept(cli, server, run, tmp_path):
    code, out, err = cli("push", run, "me/digits", "--yes")
    assert code == 0
    server.read_only = True
    out_2, err_2 = cli("push", run, "me/other", "--yes")[1:]
    assert server.tokens == {f"Bearer {TOKEN}"}
    assert TOKEN not in out + err + out_2 + err_2
    for path in (*tmp_path.rglob("*"), *Path(hub_server.HOME.name).rglob("*")):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_an_existing_repository(cli, server, run):
    """Its card may have been edited, so it stays. Other files stay too, and are listed."""
    server.repos["me/digits"] = hub_server.Repo({"README.md": b"my words", "pytorch_model.bin": b"old"})
    code, _, err = cli("push", run, "me/digits", "--yes", "-M", "better now")
    assert code == 0
    assert "(public, exists already)" in err
    assert "the README.md on the Hub stays" in err
    assert "these files on the Hub stay too: pytorch_model.bin" in err
    assert server.repos["me/digits"].files["README.md"] == b"my words"
    assert server.commits == ["better now"]
    assert cli("push", run, "me/digits", "--yes", "--force")[0] == 0
    assert b"ddpm sample -m me/digits" in server.repos["me/digits"].files["README.md"]


def test_an_edited_card_is_sent_unchanged(cli, server, run):
    (Path(run) / "checkpoints" / "step-00000004" / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    assert cli("push", run, "me/digits", "--yes")[0] == 0
    assert server.repos["me/digits"].files["README.md"] == b"---\nlicense: mit\n---\nMine.\n"


def test_an_old_layout_is_sent_in_the_new_one(cli, server, tmp_path):
    """A flat model with a pickle is sent as a pipeline with safetensors."""
    model = tmp_path / "flat"
    theirs = written_by_diffusers(MODELS["T=200"], model)
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(theirs.unet.state_dict(), weights.with_suffix(".bin"))
    weights.unlink()
    for path in [*(model / "unet").iterdir(), *(model / "scheduler").iterdir()]:
        path.rename(model / path.name)
    assert cli("push", model, "me/old", "--yes")[0] == 0
    assert server.repos["me/old"].files.keys() == SENT - {"samples.png", "ddpm.json"}
    found = DDPMPipeline.from_pretrained(arrived(server, "me/old", tmp_path / "arrived"))
    assert all(torch.equal(a, b) for a, b in zip(found.unet.parameters(), theirs.unet.parameters(), strict=True))


def test_it_asks_first(server, run):
    """At a terminal. Without one it needs --yes."""
    import pty

    command = [sys.executable, "-m", "ddpm_cli", "push", run, "me/digits"]
    for answer, code in ((b"n\n", 1), (b"y\n", 0)):
        parent, child = pty.openpty()
        process = subprocess.Popen(command, stdin=child, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        os.write(parent, answer)
        _, err = process.communicate(timeout=60)
        os.close(parent)
        os.close(child)
        assert b"Send this?" in err
        assert b"total" in err
        assert (b"nothing was sent" in err) == (code == 1)
        assert process.returncode == code, err
        assert ("me/digits" in server.repos) == (code == 0)
    refused = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
    assert refused.returncode == 2
    assert b"Add --yes" in refused.stderr


def test_errors_are_explained(cli, server, run, small_model, monkeypatch):
    def refusal(*args: str, code: int = 1) -> str:
        result = cli("push", *args, "--yes")
        assert (result[0], result[1]) == (code, "")
        return result[2]

    assert "nothing: no such file" in refusal("nothing", "me/digits")
    assert "~nobody-here/x: no such file" in refusal("~nobody-here/x", "me/digits")
    assert "../x: not the name" in refusal(run, "../x", code=2)
    assert "digits: not the name" in refusal(run, "digits", code=2)
    assert "digits--x/a--b: not a name that the Hub takes" in refusal(run, "digits--x/a--b")
    server.faults["upload"] = 400
    assert "me/digits: could not be sent to the Hugging Face Hub (the Hub answered 400)" in refusal(run, "me/digits")
    assert server.repos["me/digits"].files == {}
    server.faults[""] = 500
    assert "the Hub answered 500" in refusal(run, "me/digits")
    server.faults.clear()
    server.read_only = True
    assert "denies access (403)" in refusal(run, "me/new")
    weights = Path(run) / "checkpoints" / "step-00000004" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert "cannot be read" in refusal(run, "me/new")
    monkeypatch.delenv("HF_TOKEN")
    assert "you are not logged in" in refusal(str(small_model), "me/new")


def test_private_with_a_public_repository_is_refused(cli, server, run):
    server.repos["me/open"] = hub_server.Repo()
    code, _, err = cli("push", run, "me/open", "--private", "--yes", "-q")
    assert code == 2
    assert "exists already, and is public" in err
    assert server.repos["me/open"].files == {}


def test_no_path_of_the_machine_is_sent(cli, server, tmp_path):
    written_by_diffusers(MODELS["T=200"], tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(path.read_text().replace("{", '{"_name_or_path": "/home/me/secret",', 1))
    assert cli("push", tmp_path / "model", "me/model", "--yes")[0] == 0
    assert not any(b"secret" in data for data in server.repos["me/model"].files.values())


def test_the_model_is_checked_before_the_login(cli, server, run, monkeypatch):
    """And without consent, a note states that nothing was sent."""
    monkeypatch.delenv("HF_TOKEN")
    weights = Path(run) / "checkpoints" / "step-00000004" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(b"")
    assert "cannot be read" in cli("push", run, "me/x", "--yes")[2]
