"""A storage bucket in memory behind HTTP: as much of Google Cloud Storage's JSON API as a run
needs.

Command: python tests/support/fake_bucket.py PORT_FILE. Serves until it is killed; the port is
written into PORT_FILE. There are no folders and no appending, as in a real bucket, and the only
bucket is called "bucket"; none may read "private".
"""

import base64
import hashlib
import json
import logging
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BUCKET = "/storage/v1/b/bucket"
OBJECT = f"{BUCKET}/o"


class Bucket:
    """Objects by name: contents and the number of the write that made them."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.writes = 0
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, bytes] = {}

    def write(self, name: str, data: bytes) -> dict[str, Any]:
        with self.lock:
            self.writes += 1
            self.objects[name] = data, self.writes
            return self.describe(name)

    def describe(self, name: str) -> dict[str, Any]:
        data, generation = self.objects[name]
        moment = "2026-01-01T00:00:00.000Z"
        found = {
            "name": name,
            "bucket": "bucket",
            "id": name,
            "size": str(len(data)),
            "generation": str(generation),
        }
        found |= {
            "metageneration": "1",
            "updated": moment,
            "timeCreated": moment,
            "etag": str(generation),
        }
        return {**found, "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode()}

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        prefix = query.get("prefix", "")
        delimiter = query.get("delimiter")
        first = query.get("startOffset", "")
        end = query.get("endOffset") or "\U0010ffff"
        items = []
        prefixes = set()
        for name in sorted(n for n in self.objects if n.startswith(prefix) and first <= n < end):
            head, found, _ = name[len(prefix) :].partition(delimiter or "\0")
            if found:
                prefixes.add(prefix + head + found)
            else:
                items.append(self.describe(name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket = Bucket()

    def log_message(self, format: str, *values: Any) -> None:
        """Requests are shown where a test fails, and not in between."""
        logging.getLogger("fake_bucket").info(format, *values)

    def reply(self, code: int, body: bytes | dict = b"", **headers: str) -> None:
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        if isinstance(body, dict):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(data)

    def missing(self) -> None:
        code, message = (
            (403, "Forbidden") if "/b/private/" in self.path else (404, "No such object")
        )
        self.reply(code, {"error": {"code": code, "message": message}})

    def request_parts(self) -> tuple[str, dict[str, str], bytes]:
        url = urlsplit(self.path)
        query = {
            name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()
        }
        return url.path, query, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def do_GET(self) -> None:
        path, query, _ = self.request_parts()
        found = re.fullmatch(rf"(?:/download)?{OBJECT}(?:/(.*))?", path)
        bucket = self.bucket
        with bucket.lock:
            if path == BUCKET:
                self.reply(200, {"kind": "storage#bucket", "name": "bucket"})
            elif not found:
                self.missing()
            elif not found[1]:
                self.reply(200, bucket.list(query))
            elif (name := unquote(found[1])) not in bucket.objects:
                self.missing()
            elif query.get("alt") != "media":
                self.reply(200, bucket.describe(name))
            else:
                self.send_contents(*bucket.objects[name])

    def send_contents(self, data: bytes, generation: int) -> None:
        part = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if not part:
            return self.reply(200, data, x_goog_generation=str(generation))
        begin = int(part[1]) if part[1] else max(0, len(data) - int(part[2]))
        last = min(int(part[2]), len(data) - 1) if part[1] and part[2] else len(data) - 1
        place = f"bytes {begin}-{last}/{len(data)}"
        self.reply(
            206, data[begin : last + 1], Content_Range=place, x_goog_generation=str(generation)
        )

    def do_POST(self) -> None:
        path, query, data = self.request_parts()
        moved = re.fullmatch(rf"{OBJECT}/(.+)/(?:rewriteTo|copyTo)/b/[^/]+/o/(.+)", path)
        if path.startswith("/session/"):
            self.continue_upload(path, data)
        elif OBJECT not in path:
            self.missing()
        elif moved:
            resource = self.bucket.write(
                unquote(moved[2]), self.bucket.objects[unquote(moved[1])][0]
            )
            self.reply(200, {"done": True, "resource": resource})
        elif query["uploadType"] == "resumable":
            name = query.get("name") or json.loads(data)["name"]
            self.bucket.uploads[name] = b""
            self.reply(200, Location=f"http://{self.headers['Host']}/session/{name}")
        elif query["uploadType"] == "media":
            self.reply(200, self.bucket.write(query["name"], data))
        else:
            self.reply(200, self.bucket.write(*self.multipart(data)))

    def multipart(self, data: bytes) -> tuple[str, bytes]:
        """The two parts of an upload: a JSON description and the contents."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()  # type: ignore[index]
        description, contents = (
            re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1]
            for part in data.split(b"--" + boundary)[1:3]
        )
        return json.loads(description)["name"], re.sub(rb"\r?\n\Z", b"", contents)

    def do_PUT(self) -> None:
        path, _, data = self.request_parts()
        self.continue_upload(path, data)

    def continue_upload(self, path: str, data: bytes) -> None:
        name = unquote(path.removeprefix("/session/"))
        uploads = self.bucket.uploads
        uploads[name] += data
        if (self.headers.get("Content-Range") or "").endswith("/*"):
            return self.reply(308, Range=f"bytes=0-{len(uploads[name]) - 1}")
        self.reply(200, self.bucket.write(name, uploads.pop(name)))

    def do_DELETE(self) -> None:
        path, _, _ = self.request_parts()
        name = unquote(path.partition("/o/")[2])
        with self.bucket.lock:
            self.reply(204) if self.bucket.objects.pop(name, None) else self.missing()


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Path(sys.argv[1]).write_text(str(server.server_address[1]))
    server.serve_forever()
