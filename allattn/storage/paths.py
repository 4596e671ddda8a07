"""Paths that may lie in a storage bucket, and prepared data sets that go in and out of one whole."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from allattn.errors import RunError, UserError
from allattn.urls import is_url as is_url

MARKER = "dataset_info.json"
"""The file of a prepared data set that is written last: a folder that has it is whole."""


def parse(what: str, folder: str | os.PathLike[str]) -> epath.Path:
    """The path of a folder or file, or of one in a bucket.

    Args:
      what: what it is, for the message.
      folder: a path, or a URL such as gs://bucket/data.

    Raises:
      UserError: a URL of a kind that is not known.
    """
    try:
        return epath.Path(folder).expanduser()
    except KeyError:  # epath's answer to an unknown scheme
        expected = "a path, or a URL that begins with gs://, s3:// or az://"
        raise UserError(f"{what}: expected {expected}, found {os.fspath(folder)}") from None


@contextmanager
def reached(path: epath.Path) -> Iterator[None]:
    """Makes one line of what a file system or the client of a bucket raises within.

    Raises:
      UserError: it is not there, there is no right to it, or the bucket's client is not installed.
      RunError: anything else, such as a network that is down.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:  # each client has errors of its own
        found = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        kind = UserError if _is_mistake(error) else RunError
        raise kind(
            f"{path}: expected a place that this machine can reach, found {found}"
        ) from error


def _is_mistake(error: Exception) -> bool:
    """Whether trying again is no use."""
    wrong_place = (
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    )
    forbidden = type(error) is OSError and error.errno is None  # as gcsfs says it
    return forbidden or isinstance(error, (*wrong_place, ImportError, ValueError))


def is_whole(folder: epath.Path) -> bool:
    """Whether a folder holds a whole prepared data set."""
    with reached(folder):
        return (folder / MARKER).exists()


def check_writable(folder: epath.Path) -> None:
    """Writes a file and removes it, so that a mistake is found before the work whose outcome is to go there."""
    with reached(folder):
        probe = folder / f"probe-{uuid.uuid4().hex}"  # others may be doing the same
        probe.write_bytes(b"\n")
        probe.unlink(missing_ok=True)


def put(folder: epath.Path, there: epath.Path) -> None:
    """Copies a prepared data set into a bucket."""
    with reached(there):
        for file in sorted(folder.iterdir(), key=lambda file: file.name == MARKER):
            file.copy(there / file.name, overwrite=True)


def fetch(there: epath.Path, folder: epath.Path) -> None:
    """Copies a prepared data set out of a bucket; the folder gets its name when it is whole."""
    part = folder.parent / f"incomplete.{folder.name}"
    part.mkdir(parents=True)
    with reached(there):
        for file in there.iterdir():
            file.copy(part / file.name)
    part.rename(folder)
