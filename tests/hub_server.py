"""A Hugging Face Hub on 127.0.0.1: the part of its HTTP interface that finds, downloads and uploads models.

huggingface_hub reads its environment when it is imported. So import this module first: it points the test session to
this server, with its own home folder and no token.
"""

import base64
import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

__all__ = ["URL", "Hub", "Repo", "serve"]


def git_sha(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


@dataclass
class Repo:
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False

    @property
    def sha(self) -> str:
        return hashlib.sha1("".join(git_sha(data) for data in self.files.values()).encode()).hexdigest()


@dataclass
class Hub:
    """The repositories of the server, its faults, and a record of requests.

    faults: file name -> 500, "drop" (the connection, in the middle), "drop once", "short" (fewer bytes than announced,
    and the announcement changed), "flip" (one bit), 404; the key "" is for the information about a repository.
    """

    repos: dict[str, Repo] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    read_only: bool = False
    faults: dict[str, object] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)  # "GET /path"
    tokens: set[str] = field(default_factory=set)  # tokens of requests
    uploads: dict[str, bytes] = field(default_factory=dict)  # LFS files by their SHA-256
    commits: list[str] = field(default_factory=list)  # commit messages

    def add(self, name: str, folder: Path) -> None:
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        self.repos[name] = Repo({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})

    def downloaded(self) -> set[str]:
        """Names of the files whose contents were requested."""
        marked = [request for request in self.requests if request.startswith("GET ") and "/resolve/" in request]
        return {request.partition("/resolve/")[2].partition("/")[2] for request in marked}


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".png"))


class Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, code: int, body: bytes | dict | list = b"", **headers: str) -> None:
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
            headers["Content_Type"] = "application/json"
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", headers.get("Content_Length", str(len(body))))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_GET(self):
        path = self.path.split("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        if token := self.headers.get("Authorization"):
            self.hub.tokens.add(token)
        words = path.strip("/").split("/")
        if words[:2] == ["api", "models"]:
            self.information("/".join(words[2:4]), words[4:])
        elif words[:2] == ["api", "datasets"]:
            self.information("/".join(words[1:4]), words[4:])
        elif words[:1] == ["datasets"] and "resolve" in words[3:4]:
            self.contents("/".join(words[:3]), words[4], "/".join(words[5:]))
        elif "resolve" in words[2:3]:
            self.contents("/".join(words[:2]), words[3], "/".join(words[4:]))
        elif words[:2] == ["api", "whoami-v2"]:
            self.answer(200, {"name": "me", "type": "user", "orgs": []})
        else:
            self.answer(404)

    do_HEAD = do_GET  # noqa: N815

    def do_POST(self):
        path = self.path.split("?")[0]
        self.hub.requests.append(f"POST {path}")
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        body = self.body()
        words = path.strip("/").split("/")
        name = "/".join(words[2:4])
        if path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if self.hub.read_only:
            return self.answer(403, {"error": "You may not."})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization', 'me')}/{asked['name']}"
            if name in self.hub.repos:
                return self.answer(409, {"error": "You already created this model repo", "url": f"{URL}/{name}"})
            self.hub.repos[name] = Repo(private=asked.get("visibility") == "private" or bool(asked.get("private")))
            return self.answer(200, {"url": f"{URL}/{name}"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            upload = [{**o, "actions": {"upload": {"href": f"{URL}/upload/{o['oid']}"}}} for o in objects]
            return self.answer(200, {"transfer": "basic", "objects": upload})
        if words[4:5] == ["paths-info"]:
            files = self.hub.repos["/".join(words[1:4])].files
            asked = parse_qs(body.decode())["paths"]
            return self.answer(200, [self.entry(path, files[path]) for path in asked if path in files])
        if words[4:5] == ["preupload"]:
            modes = [
                {"path": f["path"], "uploadMode": "lfs" if is_lfs(f["path"]) else "regular", "shouldIgnore": False}
                for f in json.loads(body)["files"]
            ]
            return self.answer(200, {"files": modes})
        if words[4:5] == ["commit"]:
            return self.commit(name, [json.loads(line) for line in body.splitlines()])
        return self.answer(404)

    def do_PUT(self):
        data = self.body()
        oid = self.path.removeprefix("/upload/")
        if fault := self.hub.faults.get("upload"):
            return self.answer(int(fault))
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.uploads[oid] = data
        return self.answer(200)

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def commit(self, name: str, operations: list[dict]) -> None:
        files = self.hub.repos[name].files
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            else:
                self.hub.commits.append(value["summary"])
        sha = self.hub.repos[name].sha
        self.answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{URL}/{name}/commit/{sha}"})

    def information(self, name: str, rest: list[str]) -> None:
        repo = self.hub.repos.get(name)
        if fault := self.hub.faults.get(""):
            self.answer(int(fault))
        elif repo is None:
            self.answer(401, X_Error_Code="RepoNotFound")
        elif rest[:1] == ["tree"]:
            below = "".join(f"{part}/" for part in rest[2:])
            files = {path: data for path, data in repo.files.items() if path.startswith(below)}
            folders = {below + path[len(below) :].split("/")[0] for path in files if "/" in path[len(below) :]}
            if "recursive=true" not in self.path.lower():
                files = {path: data for path, data in files.items() if "/" not in path[len(below) :]}
            found = [{"type": "directory", "path": path, "oid": git_sha(path.encode())} for path in sorted(folders)]
            found += [self.entry(path, data) for path, data in files.items()]
            if found:
                self.answer(200, found)
            else:
                self.answer(404, X_Error_Code="EntryNotFound")
        elif rest[:1] == ["revision"] and rest[1] not in ("main", "v1", "refs%2Fpr%2F1", repo.sha):
            self.answer(404, X_Error_Code="RevisionNotFound")
        else:
            siblings = [{"rfilename": path} | self.entry(path, data) for path, data in repo.files.items()]
            self.answer(200, {"id": name, "sha": repo.sha, "siblings": siblings, "private": repo.private})

    def entry(self, path: str, data: bytes) -> dict:
        found = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data), "blobId": git_sha(data)}
        if is_lfs(path):
            sha = hashlib.sha256(data).hexdigest()
            found["lfs"] = {"oid": sha, "sha256": sha, "size": len(data), "pointerSize": 130}
        return found

    def contents(self, name: str, revision: str, path: str) -> None:
        repo = self.hub.repos[name]
        fault = self.hub.faults.get(path)
        if name in self.hub.gated:
            return self.answer(403, X_Error_Code="GatedRepo")
        if fault == 404 or path not in repo.files:
            return self.answer(404, X_Error_Code="EntryNotFound")
        if isinstance(fault, int):
            return self.answer(fault)
        data = repo.files[path]
        etag = hashlib.sha256(data).hexdigest() if is_lfs(path) else git_sha(data)
        headers = {"X_Repo_Commit": repo.sha, "ETag": f'"{etag}"', "Accept_Ranges": "bytes"}
        if self.command == "HEAD":
            return self.answer(200, b"", **headers, Content_Length=str(len(data)))
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if fault == "flip":
            data = data[:-1] + bytes([data[-1] ^ 1])
        elif fault == "short":
            data = data[: len(data) // 2]
        whole, data = len(data), data[start:]
        if fault in ("drop", "drop once"):
            if fault == "drop once":
                del self.hub.faults[path]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2])
            self.wfile.flush()
            self.close_connection = True
            return None
        if start:
            return self.answer(206, data, **headers, Content_Range=f"bytes {start}-{whole - 1}/{whole}")
        return self.answer(200, data, **headers)


SERVER = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
SERVER.daemon_threads = True
HOME = tempfile.TemporaryDirectory()
URL = f"http://127.0.0.1:{SERVER.server_port}"
os.environ |= {"HF_ENDPOINT": URL, "HF_HOME": HOME.name, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"):
    os.environ.pop(variable, None)


@contextmanager
def serve() -> Iterator[Hub]:
    """A Hub without repositories, at URL."""
    Handler.hub = Hub()
    thread = threading.Thread(target=SERVER.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield Handler.hub
    finally:
        SERVER.shutdown()
        thread.join()
