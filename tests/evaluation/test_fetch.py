"""Downloads from a server on 127.0.0.1: they continue, are checked, and happen once."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from ddpm_cli.errors import ModelError
from ddpm_cli.evaluation.fetch import Published, fetch

CONTENT = bytes(range(256)) * 20_000
INSTEAD = "Take it elsewhere."


class Server(ThreadingHTTPServer):
    """Serves CONTENT. answers: for each request what to do; whole once it is empty. asked: the Range of each."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.asked = [], []

    def published(self, content=CONTENT):
        return Published(
            f"http://127.0.0.1:{self.server_port}/some.pth", len(content), hashlib.sha256(content).hexdigest()
        )


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.headers.get("Range"))
        answer = self.server.answers.pop(0) if self.server.answers else "whole"
        if isinstance(answer, int):
            self.send_error(answer)
            return
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers and answer != "from the start" else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        self.end_headers()
        body = CONTENT[start:]
        self.wfile.write(body[: len(body) // 2] if answer == "half" else body)


@pytest.fixture
def server():
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_file_is_downloaded_once(server, tmp_path):
    seen = []
    path = fetch(server.published(), tmp_path / "new", INSTEAD, lambda *now: seen.append(now))
    assert path.read_bytes() == CONTENT
    assert seen[-1] == ("downloading some.pth", len(CONTENT), len(CONTENT))
    assert fetch(server.published(), tmp_path / "new", INSTEAD) == path
    assert server.asked == [None]


@pytest.mark.parametrize(("then", "ranges"), [("whole", 1), ("from the start", 1), ("half", 2)])
def test_a_download_that_broke_off_continues(server, tmp_path, then, ranges):
    server.answers = ["half", then]
    file = server.published()
    for _ in range(1 + (then == "half")):
        with pytest.raises(ModelError, match=r"some\.pth: cannot be downloaded") as caught:
            fetch(file, tmp_path, INSTEAD)
        assert caught.value.hint == INSTEAD
        assert not (tmp_path / "some.pth").exists()
    assert fetch(file, tmp_path, INSTEAD).read_bytes() == CONTENT
    half = len(CONTENT) // 2
    assert server.asked == [None, f"bytes={half}-", f"bytes={half + half // 2}-"][: ranges + 1]


def test_another_content_is_refused_and_removed(server, tmp_path):
    for content in (CONTENT[::-1], CONTENT[:-1], CONTENT[:1000]):
        with pytest.raises(ModelError, match="has the SHA-256"):
            fetch(server.published(content), tmp_path, INSTEAD)
        assert [path.name for path in tmp_path.iterdir()] == [".some.pth.lock"]
    with pytest.raises(ModelError, match=f"lost after {len(CONTENT)} of {len(CONTENT) + 1} bytes"):
        fetch(server.published(CONTENT + b"."), tmp_path, INSTEAD)


def test_a_longer_file_on_the_server_does_not_fill_the_disk(server, tmp_path):
    seen = []
    with pytest.raises(ModelError, match="has the SHA-256"):
        fetch(server.published(b"short"), tmp_path, INSTEAD, lambda *now: seen.append(now))
    assert len(seen) == 1  # after the first block


def test_the_reason_is_said(server, tmp_path):
    server.answers = [404]
    with pytest.raises(ModelError, match="the server answered 404"):
        fetch(server.published(), tmp_path, INSTEAD)
    nowhere = Published("http://127.0.0.1:1/some.pth", 1, "0" * 64)
    with pytest.raises(ModelError, match=r"\(Connection refused\)"):
        fetch(nowhere, tmp_path, INSTEAD)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot be downloaded"):
        fetch(server.published(), tmp_path / "file", INSTEAD)


def test_several_processes_download_it_once(server, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fetch(server.published(), tmp_path, INSTEAD))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "some.pth"] * 4
    assert server.asked == [None]
