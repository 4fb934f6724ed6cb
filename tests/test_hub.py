"""Addresses of models: folders, runs, and a Hub of our own on 127.0.0.1."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ddpm_cli import hub
from ddpm_cli.errors import ModelError

SHA = "a" * 40


@pytest.fixture
def hub_server(small_model):
    """Serves the small model as org/small; org/secret is gated. Gives the address and the list of requests."""
    files = {
        path.relative_to(small_model).as_posix(): path.read_bytes() for path in small_model.rglob("*") if path.is_file()
    }
    files["README.md"] = b"not wanted"
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, code, body=b"", **headers):
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.split("?")[0]
            asked.append(path)
            if path.startswith("/api/models/org/secret"):
                self.answer(403, X_Error_Code="GatedRepo")
            elif not path.startswith(("/api/models/org/small/", "/org/small/")):
                self.answer(401, X_Error_Code="RepoNotFound")
            elif path.endswith("/revision/nope"):
                self.answer(404, X_Error_Code="RevisionNotFound")
            elif "/revision/" in path:
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, json.dumps({"id": "org/small", "sha": SHA, "siblings": siblings}).encode())
            elif "/tree/" in path:
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in files.items()
                ]
                self.answer(200, json.dumps(tree).encode())
            elif (name := path.partition("/resolve/")[2].partition("/")[2]) in files:
                data = files[name]
                self.answer(200, data, X_Repo_Commit=SHA, ETag=f'"{hashlib.sha1(data).hexdigest()}"')
            else:
                self.answer(404, X_Error_Code="EntryNotFound")

        do_HEAD = do_GET  # noqa: N815

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def sample(address: str, endpoint: str, home: Path, **env: str) -> subprocess.CompletedProcess:
    """In a process of its own, since huggingface_hub reads its environment once, at import."""
    settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | env
    command = [sys.executable, "-m", "ddpm_cli", "sample", "-m", address, "--n", "1", "-o", "-"]
    return subprocess.run(command, capture_output=True, env=os.environ | settings, timeout=120)


def test_a_model_from_the_hub(hub_server, tmp_path):
    endpoint, asked = hub_server
    result = sample("org/small", endpoint, tmp_path / "home")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(b"\x89PNG")
    assert not any("README" in path for path in asked if "/resolve/" in path)
    again = sample("org/small", "http://127.0.0.1:9", tmp_path / "home", HF_HUB_OFFLINE="1")  # from its cache
    assert again.stdout == result.stdout


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("org/none", "neither a directory here nor a public model"),
        ("org/secret", "access to this model"),
        ("org/small@nope", "no revision 'nope'"),
    ],
)
def test_what_the_hub_refuses_is_explained(hub_server, tmp_path, address, said):
    result = sample(address, hub_server[0], tmp_path / "home")
    assert result.returncode == 1
    assert said in result.stderr.decode()
    assert result.stderr.startswith(b"Error: ")


def test_without_a_network(tmp_path):
    result = sample("org/small", "http://127.0.0.1:9", tmp_path / "home")
    assert result.returncode == 1
    assert b"cannot be reached" in result.stderr


def test_folders(small_model, tmp_path, monkeypatch):
    assert hub.resolve(str(small_model)) == small_model
    with pytest.raises(ModelError, match="no trained run"):
        hub.resolve()
    monkeypatch.setenv("DDPM_MODEL", str(small_model))
    assert hub.resolve() == small_model
    (tmp_path / "file.safetensors").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    (tmp_path / "run" / "metrics.jsonl").touch()
    for address, said in [
        ("file.safetensors", "is a file"),
        ("empty", "holds no model"),
        ("run", "no checkpoint yet"),
        ("./none", "no such directory"),
        ("none", "no such directory"),
    ]:
        with pytest.raises(ModelError, match=said):
            hub.resolve(address)
