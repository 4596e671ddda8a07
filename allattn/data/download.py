"""Downloads that resume, try several mirrors, and are complete and checked, or absent.

The life of a file: its bytes gather in NAME.part, a later attempt asks the server for the bytes
that are lacking, and only a part of the right size and checksum is renamed to NAME. A part that
fails the check is deleted, since nobody knows which of its bytes are wrong.
"""

import hashlib
import http.client
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from allattn.errors import UserError

# Of silence, after which a connection counts as broken.
_TIMEOUT_SECONDS = 30.0
# Read, written and shown as progress at once.
_CHUNK_BYTES = 1 << 18

# Answers after which the next mirror is asked.
_REFUSED = (
    urllib.error.URLError,
    http.client.HTTPException,
    ssl.SSLError,
    ConnectionError,
    TimeoutError,
)


def fetch(
    urls: Sequence[str],
    destination: Path,
    *,
    checksum: str | None = None,
    size: int | None = None,
    attempts: int = 3,
    pause: float = 1.0,
) -> Path:
    """Download one file; an interrupted download resumes where it stopped.

    The bytes gather in DESTINATION.part and get their name only when whole and checked; an existing
    file is returned as it is.

    Args:
      urls: mirrors of the same file, tried in turn; all of them are tried `attempts` times.
      destination: path of the file.
      checksum: "md5:...", "sha1:..." or "sha256:..." of the file; None: not checked.
      size: of the file, in bytes; None: not checked.
      attempts: rounds over the mirrors.
      pause: seconds before the second round, doubled before each one after it.

    Returns:
      destination.

    Raises:
      UserError: no mirror gave the file; says what each of them answered in the last round.
    """
    # A file with its final name was checked when it got it.
    destination = Path(destination)
    if destination.exists():
        return destination
    _make_folder(destination.parent)
    failures: list[str] = []
    for attempt in range(attempts):
        # Wait before every round but the first, twice as long each time.
        if attempt > 0:
            time.sleep(pause * 2 ** (attempt - 1))
        # Only the answers of the last round are reported.
        failures = []
        for url in urls:
            try:
                return _fetch_from(url, destination, checksum, size)
            except (UserError, *_REFUSED) as error:
                failures.append(f"{url}: {error}")
    raise UserError(f"could not download {destination.name} ({'; '.join(failures)})")


def digest_of(chunks: Iterable[bytes], checksum: str) -> tuple[str, int]:
    """Digest and length of some bytes.

    Args:
      chunks: the bytes in order.
      checksum: "KIND:HEX"; its kind is the digest's.

    Returns:
      The digest as "KIND:HEX", and the number of bytes.
    """
    kind = checksum.partition(":")[0]
    digest = hashlib.new(kind, usedforsecurity=False)
    length = 0
    for chunk in chunks:
        digest.update(chunk)
        length += len(chunk)
    return f"{digest.name}:{digest.hexdigest()}", length


def _fetch_from(url: str, destination: Path, checksum: str | None, size: int | None) -> Path:
    """Download from one mirror; the part stays where the connection breaks."""
    part = destination.with_name(destination.name + ".part")
    # A part that is already whole must not be asked to continue.
    if size is None or not part.exists() or part.stat().st_size != size:
        _receive(url, part, destination.name)
    try:
        _check(part, checksum, size)
    except UserError:
        part.unlink()  # its bytes cannot be trusted: the next attempt starts afresh
        raise
    return part.replace(destination)


def _receive(url: str, part: Path, label: str) -> None:
    """Append to the part what it lacks; raises ConnectionError if the answer breaks off."""
    # Ask for the bytes after those that are here.
    begin = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "allattn"}
    if begin:
        headers["Range"] = f"bytes={begin}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise
        error.close()
        return  # nothing is lacking, or the part is too long: the check decides

    # Write them, and compare with the length that the server announced.
    with answer:
        if begin and answer.status != http.HTTPStatus.PARTIAL_CONTENT:
            begin = 0  # the server ignores ranges and sends the whole file
        # The header counts the bytes of this answer, not of the file.
        length = answer.headers.get("Content-Length")
        total = begin + int(length) if length else None
        _copy(answer, part, begin, total, label)
    if total is not None and part.stat().st_size < total:
        raise ConnectionError(f"connection closed after {part.stat().st_size} of {total} bytes")


def _copy(answer: Any, part: Path, begin: int, total: int | None, label: str) -> None:
    """Write an answer from offset `begin` of the part on, under a progress bar."""
    columns = (
        TextColumn(label),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    # From 0 on the part is written anew, whatever it held.
    mode = "ab" if begin else "wb"
    with (
        part.open(mode) as file,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task(label, total=total, completed=begin)
        while chunk := answer.read(_CHUNK_BYTES):
            file.write(chunk)
            progress.advance(task, len(chunk))


def _check(path: Path, checksum: str | None, size: int | None) -> None:
    # The size first: it costs nothing.
    length = path.stat().st_size
    if size is not None and length != size:
        raise UserError(f"expected {size} bytes, found {length}")
    if checksum is None:
        return
    with path.open("rb") as file:
        chunks = iter(partial(file.read, _CHUNK_BYTES), b"")
        actual, _ = digest_of(chunks, checksum)
    if actual != checksum:
        raise UserError(f"expected {checksum}, found {actual} ({length} bytes)")


def _make_folder(folder: Path) -> None:
    # What the system says goes into a message of one line.
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from None
