"""Downloads from a server on this machine that is cut, lies, or is not there: whole and checked, or nothing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock

from mirai_ds.cli.main import main
from mirai_ds.runtime import download, published_files
from mirai_ds.runtime.launch import free_port
from mirai_ds.runtime.published_files import PUBLISHED, PublishedFile

CONTENT = bytes(range(256)) * 400
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """What it does next: `cuts` are numbers of bytes after which a connection is cut; `asked` are the ranges."""

    def __init__(self) -> None:
        self.cuts: list[int] = []
        self.asked: list[str | None] = []
        self.ranges, self.status = True, 200

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range")
        self.asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if self.status != 200:
            return handler.send_error(self.status)
        if wanted and self.ranges and start >= len(CONTENT):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            handler.send_header("Content-Length", "0")
            return handler.end_headers()
        body = CONTENT[start:]
        handler.send_response(206 if wanted and self.ranges else 200)
        if wanted and self.ranges:
            handler.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body[: self.cuts.pop(0)] if self.cuts else body)
        return None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """`thing` is published there, with size and digest; `other` without."""
    behaviour = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            behaviour.answer(self)

        def log_message(self, *_: Any) -> None:
            return

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}/folder/thing.bin"
    monkeypatch.setitem(PUBLISHED, "thing", PublishedFile(url, "a thing", DIGEST, len(CONTENT)))
    monkeypatch.setitem(PUBLISHED, "other", PublishedFile(url, "another", about="102 kB", saved_as="other.bin"))
    monkeypatch.setattr(download, "PAUSE_SECONDS", 0)
    monkeypatch.setattr(download, "CHUNK", 5000)
    yield behaviour
    httpd.shutdown()
    httpd.server_close()


def fetch(folder: Path, *names: str) -> Result:
    return CliRunner().invoke(main, ["fetch", *names, "--to", str(folder)], catch_exceptions=False)


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_a_file_comes_whole(server: Server, tmp_path: Path) -> None:
    done = fetch(tmp_path / "new" / "folder", "thing", "other")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "new" / "folder"
    assert (folder / "thing.bin").read_bytes() == (folder / "other.bin").read_bytes() == CONTENT
    assert done.output.splitlines() == [
        f"{folder}/thing.bin: fetched, sha256 {DIGEST}, as published",
        f"{folder}/other.bin: fetched, sha256 {DIGEST}, none is known to compare with",
    ]
    assert files(folder) == ["other.bin", "thing.bin"]
    assert server.asked == [None, None]


def test_a_cut_connection_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    server.cuts = [30_000, 0, 20_000]
    done = fetch(tmp_path, "thing")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "thing.bin").read_bytes() == CONTENT
    assert server.asked == [None, "bytes=30000-", "bytes=30000-", "bytes=50000-"]


def test_a_killed_download_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".thing.bin.part").write_bytes(CONTENT[:70_000])
    assert fetch(tmp_path, "thing").exit_code == 0
    assert server.asked == ["bytes=70000-"]
    assert (tmp_path / "thing.bin").read_bytes() == CONTENT


def test_one_that_was_killed_before_its_name(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".thing.bin.part").write_bytes(CONTENT)
    assert fetch(tmp_path, "thing").exit_code == 0
    assert (tmp_path / "thing.bin").read_bytes() == CONTENT


def test_a_server_that_knows_no_ranges_begins_anew(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / ".thing.bin.part").write_bytes(b"x" * 70_000)
    assert fetch(tmp_path, "thing").exit_code == 0
    assert (tmp_path / "thing.bin").read_bytes() == CONTENT


def test_a_connection_that_is_always_cut(server: Server, tmp_path: Path) -> None:
    server.cuts = [30_000] + [0] * 20
    done = fetch(tmp_path, "thing")
    assert done.exit_code == 2
    assert "was cut 5 times in a row, 30,000 bytes are here; give the same command again" in done.output
    assert files(tmp_path) == [".thing.bin.part"]


@pytest.mark.parametrize(("wrong", "part"), [(CONTENT[:-1] + b"x", "has sha256"), (CONTENT + b"x", "bytes, http")])
def test_a_wrong_file_is_no_file(
    wrong: bytes, part: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.offline.test_fetch.CONTENT", wrong)
    done = fetch(tmp_path, "thing")
    assert done.exit_code == 2
    assert part in done.output
    assert len(done.output.strip().splitlines()) == 1
    assert files(tmp_path) == []


def test_a_file_that_is_there(server: Server, tmp_path: Path) -> None:
    (tmp_path / "thing.bin").write_bytes(CONTENT)
    done = fetch(tmp_path, "thing")
    assert (done.exit_code, done.output) == (0, f"{tmp_path}/thing.bin: was there, sha256 {DIGEST}, as published\n")
    (tmp_path / "thing.bin").write_bytes(b"mine")
    done = fetch(tmp_path, "thing")
    assert done.exit_code == 2
    assert "move it away to fetch it anew: has 4 bytes" in done.output
    assert (tmp_path / "thing.bin").read_bytes() == b"mine"
    assert server.asked == []


def test_what_a_server_refuses(server: Server, tmp_path: Path) -> None:
    server.status = 403
    done = fetch(tmp_path, "thing")
    assert done.exit_code == 2
    assert "the server answers 403 Forbidden" in done.output


def test_no_network_says_what_to_bring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"http://127.0.0.1:{free_port()}/thing.bin"
    for name in ("thing", "other"):
        monkeypatch.setitem(
            published_files.PUBLISHED, name, PublishedFile(url, "a thing", DIGEST, 7, "", f"{name}.bin")
        )
    done = fetch(tmp_path, "thing", "other")
    assert done.exit_code == 3
    lines = done.output.splitlines()
    assert "cannot be reached ([Errno 111] Connection refused); fetch on a machine with a network and copy:" in lines[0]
    assert lines[1:] == [
        url,
        f"  as {tmp_path}/thing.bin (0 MB, sha256 {DIGEST})",
        url,
        f"  as {tmp_path}/other.bin (0 MB, sha256 {DIGEST})",
    ]
    asked = CliRunner().invoke(main, ["fetch", "thing", "other", "--to", str(tmp_path), "--urls"])
    assert (asked.exit_code, asked.output.splitlines()) == (0, lines[1:])


def test_two_at_once_are_told(server: Server, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".thing.bin.lock"):
        done = fetch(tmp_path, "thing")
    assert done.exit_code == 2
    assert "another process is fetching it" in done.output


def test_a_folder_that_cannot_be_made(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = fetch(tmp_path / "file" / "in", "thing")
    assert done.exit_code == 2
    assert "Not a directory; choose another folder (--to)" in done.output


def test_names_that_are_not_known(tmp_path: Path) -> None:
    done = fetch(tmp_path, "vq61")
    assert done.exit_code == 2
    assert "vq61: no such file is known; did you mean 'vq16'?" in done.output


def test_the_list_has_every_name() -> None:
    done = CliRunner().invoke(main, ["fetch"])
    assert [line.split()[0] for line in done.output.splitlines()] == list(PUBLISHED)
    for name, file in PUBLISHED.items():
        assert file.url.startswith("https://"), name
        assert file.size_in_words, name
        assert file.sha256 is None or len(file.sha256) == 64, name
    assert PUBLISHED["inception"].sha256 is not None
    assert PUBLISHED["inception"].sha256[:8] in PUBLISHED["inception"].name  # its release's own word
