"""Downloads against a server on this machine: resuming, mirrors, checksums."""

import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from allattn.data.download import fetch
from allattn.errors import UserError

BODY = bytes(range(256)) * 4000
CHECKSUM = f"sha256:{hashlib.sha256(BODY).hexdigest()}"


class Server(http.server.BaseHTTPRequestHandler):
    """Serves BODY; /cut breaks off in the middle once, /whole ignores ranges, /wrong sends other
    bytes.
    """

    requests: list[tuple[str, str | None]] = []

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        first = (self.path, None) not in self.requests
        self.requests.append((self.path, wanted))
        if self.path == "/gone":
            return self.send_error(404)
        begin = (
            int(wanted.removeprefix("bytes=").rstrip("-"))
            if wanted and self.path != "/whole"
            else 0
        )
        if begin >= len(BODY):
            return self.send_error(416)
        body = (BODY if self.path != "/wrong" else BODY[::-1])[begin:]
        self.send_response(206 if begin else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if self.path == "/cut" and first else body)


@pytest.fixture
def url() -> Iterator[str]:
    Server.requests = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_whole_file(url: str, tmp_path: Path) -> None:
    path = fetch([f"{url}/file"], tmp_path / "new" / "file", checksum=CHECKSUM, size=len(BODY))
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["file"]
    fetch([f"{url}/gone"], path)  # it is there: nothing is asked
    assert len(Server.requests) == 1


def test_resumes_after_a_cut(url: str, tmp_path: Path) -> None:
    path = fetch([f"{url}/cut"], tmp_path / "file", checksum=CHECKSUM, pause=0.01)
    assert path.read_bytes() == BODY
    assert Server.requests == [("/cut", None), ("/cut", f"bytes={len(BODY) // 2}-")]


@pytest.mark.parametrize("page", ["file", "whole"])
@pytest.mark.parametrize("kept", [1000, len(BODY)])
def test_goes_on_from_a_part(url: str, tmp_path: Path, page: str, kept: int) -> None:
    (tmp_path / "file.part").write_bytes(BODY[:kept])
    path = fetch([f"{url}/{page}"], tmp_path / "file", checksum=CHECKSUM)
    assert path.read_bytes() == BODY
    assert Server.requests == [(f"/{page}", f"bytes={kept}-")]


def test_a_whole_part_of_known_size_asks_nothing(url: str, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(BODY)
    assert (
        fetch([f"{url}/file"], tmp_path / "file", checksum=CHECKSUM, size=len(BODY)).read_bytes()
        == BODY
    )
    assert Server.requests == []


def test_a_bad_part_is_thrown_away(url: str, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(b"x" * 1000)
    assert (
        fetch([f"{url}/file"], tmp_path / "file", checksum=CHECKSUM, pause=0.01).read_bytes()
        == BODY
    )
    (tmp_path / "long.part").write_bytes(b"x" * (len(BODY) + 1))
    assert (
        fetch([f"{url}/file"], tmp_path / "long", checksum=CHECKSUM, pause=0.01).read_bytes()
        == BODY
    )


@pytest.mark.parametrize("first", ["http://127.0.0.1:9/dead", "{url}/gone", "{url}/wrong"])
def test_next_mirror(url: str, tmp_path: Path, first: str) -> None:
    path = fetch([first.format(url=url), f"{url}/file"], tmp_path / "file", checksum=CHECKSUM)
    assert path.read_bytes() == BODY


def test_wrong_everywhere(url: str, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"could not download file .*/wrong: expected sha256:\w+, found sha256:\w+ .*404",
    ):
        fetch(
            [f"{url}/wrong", f"{url}/gone"],
            tmp_path / "file",
            checksum=CHECKSUM,
            attempts=2,
            pause=0.01,
        )
    assert len(Server.requests) == 4
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=f"expected 5 bytes, found {len(BODY)}"):
        fetch([f"{url}/file"], tmp_path / "file", size=5, attempts=1)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        fetch(["http://127.0.0.1:9/"], tmp_path / "file" / "below" / "x")
