"""Addresses of models: folders, files, runs, and a Hub on 127.0.0.1 over real HTTP."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

import hub_server
from ddpm_cli.errors import ModelError
from ddpm_cli.models import hub
from ddpm_cli.models.ddpm import DDPM

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def server(small_model, tmp_path, monkeypatch):
    """A Hub that has the small model as org/small, with files that are not needed; and an empty cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    with hub_server.serve() as server:
        server.add("org/small", small_model)
        for name in ("README.md", "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.fp16.safetensors"):
            server.repos["org/small"].files[name] = b"not wanted"
        yield server


def refusal(address: str) -> str:
    with pytest.raises(ModelError) as caught:
        hub.resolve(address)
    return f"{caught.value.message} / {caught.value.hint}"


# --- as a user calls it ---


def sample(tmp_path, address: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ddpm_cli", "sample", "-m", address, "--n", "1", "-o", "-"]
    env = {"HF_HOME": str(tmp_path / "home")} | env
    return subprocess.run(command, capture_output=True, env=os.environ | env, timeout=120)


def test_a_model_from_the_hub(server, tmp_path):
    first = sample(tmp_path, "org/small@v1")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith(b"\x89PNG")
    assert f"model org/small@{server.repos['org/small'].sha[:7]}".encode() in first.stderr
    assert server.downloaded() == {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json", WEIGHTS}
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):  # no server is there
        again = sample(tmp_path, "org/small@v1", **env)
        assert again.stdout == first.stdout
        assert b"from the cache; the Hub cannot be reached" in again.stderr


def test_without_a_network(tmp_path):
    result = sample(tmp_path, "org/small", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert result.stdout == b""
    assert result.stderr.startswith(b"Error: org/small: not a directory here, and could not be fetched")
    assert b"Check the network" in result.stderr


# --- addresses ---


def test_nothing_is_downloaded_twice(server):
    first = hub.resolve("org/small")
    server.requests.clear()
    assert hub.resolve("org/small") == first
    assert server.downloaded() == set()


def test_information_needs_no_weights(server):
    located = hub.resolve("org/small", weights=False)
    assert WEIGHTS not in server.downloaded()
    assert located.weight_bytes == len(server.repos["org/small"].files[WEIGHTS])


def test_a_downloaded_model_does_not_need_the_hub(server):
    first = hub.resolve("org/small")
    server.faults[""] = 503
    again = hub.resolve("org/small")
    assert again.weights == first.weights
    assert "from the cache" in again.origin


def test_revisions_and_pages(server):
    sha = server.repos["org/small"].sha
    expected = hub.resolve("org/small")
    for address in (
        f"org/small@{sha}",
        "org/small@v1",
        f"{hub_server.URL}/org/small",
        f"{hub_server.URL}/org/small/tree/v1",
        f"{hub_server.URL}/org/small/tree/refs%2Fpr%2F1",
        f"{hub_server.URL}/org/small/tree/refs/pr/1",
        "org/small@refs/pr/1",
        "hf://org/small@v1",
        f"{hub_server.URL}/org/small/blob/main/unet/config.json?download=true",
        "https://huggingface.co/org/small",
        "https://hf.co/org/small/",
    ):
        assert hub.resolve(address) == expected, address


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("org/none", "neither a directory here nor a public model"),
        ("org/secret", "access to this model"),
        ("org/small@nope", "no revision 'nope'"),
        ("https://example.com/org/small", "not a model's page"),
        ("https://huggingface.co/small", "not a model's page"),
        ("https://huggingface.co/org/small/tree/..", "not a model's page"),
        ("https://[/org/small", "not a model's page"),
    ],
)
def test_refusals_of_the_hub_are_explained(server, small_model, address, expected):
    server.add("org/secret", small_model)
    server.gated.add("org/secret")
    assert expected in refusal(address)


@pytest.mark.parametrize(
    "address",
    ["../../etc", "org/..", "org/../..", "org/small@../../x", "org/.hidden", "org/a/b", "org/small@", "a b/c"],
)
def test_no_name_escapes_the_cache(server, tmp_path, address):
    assert "no such file or directory, and not a name" in refusal(address)
    assert server.requests == []
    assert not (tmp_path / "home").exists()


def test_no_answer_escapes_the_cache(server, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_server.Repo, "sha", "../../../out")
    assert "'../../../out', which is not a commit" in refusal("org/small")
    assert not (tmp_path / "home").exists()


# --- what is downloaded is checked, and large files once ---


def damage(path: Path, keep_times: bool) -> None:
    """Change one byte in the middle of a file."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(status.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    if keep_times:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_weights_are_hashed_once(server, monkeypatch):
    """They are hashed again if the file was replaced or changed, or if there is no record of it."""
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(
        "hashlib.sha256", lambda *data: hashed.extend([1] * (not data)) or sha256(*data)
    )  # not from the Hub

    def times() -> int:
        hashed.clear()
        hub.resolve("org/small")
        return len(hashed)

    hub.resolve("org/small")
    assert times() == 0
    blob = hub.resolve("org/small").weights[0].resolve()
    os.utime(blob)
    assert (times(), times()) == (1, 0)
    blob.write_bytes(blob.read_bytes())
    assert times() == 1
    shutil.rmtree(Path(os.environ["DDPM_CACHE_DIR"]) / "verified")
    assert (times(), times()) == (1, 0)


@pytest.mark.parametrize("keep_times", [False, True])
def test_weights_that_were_damaged_later_are_found(server, keep_times):
    """Even if the modification time is set back, since nobody can set the time of the last change (ctime)."""
    first = hub.resolve("org/small")
    damage(first.weights[0].resolve(), keep_times)
    assert "does not have the hash" in refusal("org/small")
    assert hub.resolve("org/small") == first  # it was removed, and is downloaded again


def test_a_cache_that_cannot_be_written_costs_only_time(server, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DDPM_CACHE_DIR", str(tmp_path / "file"))
    assert hub.resolve("org/small") == hub.resolve("org/small")


# --- what can go wrong ---


def test_a_broken_hub(server):
    server.faults[""] = 500
    assert "the Hub answered 500" in refusal("org/small")


@pytest.mark.parametrize(
    ("file", "fault", "expected"),
    [
        (WEIGHTS, 404, "the Hub answered 404"),
        (WEIGHTS, "drop", "could not be fetched"),
        (WEIGHTS, "short", "should be of size"),
        (WEIGHTS, "flip", "does not have the hash"),
        ("unet/config.json", 403, "the Hub answered 403"),
        ("unet/config.json", "flip", "does not have the hash"),
    ],
)
def test_an_incomplete_download_is_never_loaded(server, file, fault, expected):
    server.faults[file] = fault
    assert expected in refusal("org/small")
    server.faults[""] = 503
    assert "the Hub answered 503" in refusal("org/small")  # the rest of it is not used as the model
    server.faults.clear()
    hub.resolve("org/small")  # and the next try repairs it


def test_a_dropped_download_is_continued(server, small_model):
    server.faults[WEIGHTS] = "drop once"
    assert hub.resolve("org/small").weights[0].read_bytes() == (small_model / WEIGHTS).read_bytes()


def test_an_unsupported_model_is_not_downloaded(server):
    files = server.repos["org/small"].files
    files["model_index.json"] = b'{"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]}'
    assert "org--small" in refusal("org/small")
    assert "generates latents" in refusal("org/small")
    assert WEIGHTS not in server.downloaded()


@pytest.mark.parametrize(
    ("gone", "expected"),
    [
        ("unet/config.json", "org/small: holds no model: no config.json among README.md"),
        ("scheduler/scheduler_config.json", "scheduler_config.json: missing"),
        ("unet/diffusion_pytorch_model", "org/small: has no weights next to unet/config.json"),
    ],
)
def test_a_repository_that_lacks_a_file(server, gone, expected):
    files = server.repos["org/small"].files
    for name in [name for name in files if name.startswith(gone)]:
        del files[name]
    assert expected in refusal("org/small")


@pytest.mark.parametrize("token", ["hf_secret\x0bABC", "hf_s\xe9cret", "hf secret"])
def test_a_damaged_token_is_not_printed(server, monkeypatch, token):
    """The HTTP library would print the header in its error."""
    monkeypatch.setenv("HF_TOKEN", token)
    message = refusal("org/small")
    assert "token for the Hugging Face Hub is damaged" in message
    assert "cret" not in message
    assert server.requests == []


def test_a_partly_cached_sharded_model_is_not_loaded(server):
    """Offline with one of two shards: the error names the network, not the model."""
    files = server.repos["org/small"].files
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for shard in shards:
        files[shard] = files[WEIGHTS] + shard.encode()
    del (
        files[WEIGHTS],
        files["unet/diffusion_pytorch_model.bin"],
        files["unet/diffusion_pytorch_model.fp16.safetensors"],
    )
    server.faults[shards[1]] = 403
    assert "the Hub answered 403" in refusal("org/small")
    assert "hf auth login" in refusal("org/small")
    server.faults[""] = 503
    assert "the Hub answered 503" in refusal("org/small")


def test_a_cached_model_has_the_same_address(server):
    first = hub.resolve("org/small")
    server.faults[""] = 429
    assert hub.resolve("org/small").address == first.address == f"org/small@{server.repos['org/small'].sha}"


# --- on disk ---


def test_folders(small_model, tmp_path, monkeypatch):
    assert hub.resolve(str(small_model)).folder == small_model
    assert hub.resolve().address == "bundled:digits"
    monkeypatch.setenv("DDPM_MODEL", str(small_model))
    assert hub.resolve().folder == small_model
    (tmp_path / "file.safetensors").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / "run" / "metrics.jsonl").touch()
    for address, expected in [
        ("file.safetensors", "no config.json next to it"),
        ("empty", "holds no model"),
        ("run", "no checkpoint yet"),
        ("./none", "no such file or directory"),
        ("~nobody-of-this-name/model", "no such file or directory"),
        ("none", "no such file or directory"),
    ]:
        with pytest.raises(ModelError, match=expected):
            hub.resolve(address)


def test_a_mistyped_run_that_looks_like_a_name_on_the_hub(server, finished_run, tmp_path):
    """The Hub is asked first, and the nearest run comes before its advice."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cats").symlink_to(finished_run)
    assert refusal("runs/cast") == (
        "runs/cast: neither a directory here nor a public model on the Hugging Face Hub / "
        "Did you mean runs/cats? Check the spelling; for a private model: hf auth login"
    )


def test_a_folder_of_runs_gives_a_hint(finished_run, small_model):
    assert hub.resolve(str(finished_run / "checkpoints")).folder.name == "step-00000004"
    assert f"Did you mean {finished_run}?" in refusal(str(finished_run.parent))
    assert "address is empty" in refusal(" ")


def test_an_empty_address_is_not_the_newest_run(cli, finished_run):
    Path("runs").symlink_to(finished_run.parent)
    assert hub.resolve().folder.name == "step-00000004"
    code, _, err = cli("info", "")
    assert (code, "Error: the model's address is empty" in err) == (1, True), err
    with pytest.raises(ModelError, match="address is empty"):
        DDPM.from_pretrained("")
