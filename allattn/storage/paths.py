"""Paths that may lie in a storage bucket, and prepared data sets that are copied in and out of one.

A path here is a folder or file of this machine, or a URL such as gs://bucket/run. Two things differ
in a bucket: nothing can be appended, and a folder does not get its name at once, since it is only
the beginning of its files' names. So whether a prepared data set is whole is told by a marker: the
file that is written after all others. A folder with the marker is whole; one without it is being
written, or was left by a process that died, and is made again.
"""

import errno
import fnmatch
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from allattn.errors import RunError, UserError
from allattn.urls import is_url as is_url

MARKER = "dataset_info.json"
"""The file of a prepared data set that is written last: a folder that has it is whole."""

# What a message keeps of an error of another library.
MESSAGE_LENGTH = 300

# How a file system says that something is not there.
ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)

# Why writing fails where nothing is wrong with what is written.
WRITING_FAILURES = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EACCES,
    errno.EMFILE,
    errno.EIO,
    errno.ESTALE,
    errno.ENOTCONN,
)


# --- paths ---------------------------------------------------------------------------------------


def parse(what: str, folder: str | os.PathLike[str]) -> epath.Path:
    """The path of a folder or file, here or in a bucket.

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
def reached(path: epath.Path, may_be_absent: bool = False) -> Iterator[None]:
    """Turns what a file system or the client of a bucket raises within into an error of one line.

    Args:
      path: what is read or written within, for the message.
      may_be_absent: let FileNotFoundError through, for a caller that has an answer to it.

    Raises:
      FileNotFoundError: it `may_be_absent`, and no such file or folder is there.
      UserError: it is not there, there is no right to it, or the bucket's client is not installed.
      RunError: anything else, such as a network that is down.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:  # each client has errors of its own
        if may_be_absent and isinstance(error, ABSENT):
            raise FileNotFoundError(str(path)) from error
        message = " ".join(f"{type(error).__name__}: {error}".split())
        kind = UserError if _is_mistake(error) else RunError
        raise kind(
            f"{path}: expected a place that this machine can reach, "
            f"found {message[:MESSAGE_LENGTH]}"
        ) from error


@contextmanager
def written(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what fails while something is written into an error of one line.

    Such as a full disk, a quota, a file system that has become read-only, a network that is down.

    Args:
      path: what is written within, for the message.

    Raises:
      RunError: names the path and the reason.
    """
    try:
        yield
    except (UserError, RunError):
        raise
    except Exception as error:  # each client has errors of its own
        raise RunError(f"{os.fspath(path)} cannot be written: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """What the system said, where another library wraps it in a message of its own."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    for number in WRITING_FAILURES:
        if os.strerror(number) in text:
            return os.strerror(number)
    return text[:MESSAGE_LENGTH]


def replace(path: epath.Path, text: str) -> None:
    """Write a file that appears whole or not at all; a reader never sees half of it."""
    # An object in a bucket does so by itself.
    if is_url(path):
        path.write_text(text, encoding="utf8")
        return
    part = path.parent / f"{path.name}.{uuid.uuid4().hex}.part"
    try:
        part.write_text(text, encoding="utf8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def matching(folder: epath.Path, pattern: str) -> list[epath.Path]:
    """The entries of a folder whose names match a pattern, sorted; the folder's name is none.

    `glob` would take the brackets of a folder such as "run [2]" for a pattern as well.
    """
    if not folder.exists():
        return []
    return sorted(path for path in folder.iterdir() if fnmatch.fnmatchcase(path.name, pattern))


def files_below(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The files in a folder and in its folders, by their names relative to it."""
    for path in sorted(folder.iterdir()):
        name = f"{prefix}{path.name}"
        if path.is_dir():
            yield from files_below(path, f"{name}/")
        else:
            yield name


def move(folder: epath.Path, target: epath.Path) -> None:
    """Give a folder another name; in a bucket its files are copied, and then removed."""
    if not is_url(folder):
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.rename(target)
        return
    for name in files_below(folder):
        (folder / name).copy(target / name)
    folder.rmtree()


def _is_mistake(error: Exception) -> bool:
    """Whether trying again is no use."""
    mistakes = (
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
        # No client for this kind of bucket.
        ImportError,
        # A name that the client refuses.
        ValueError,
    )
    # How gcsfs says that access is denied: an OSError without a number.
    denied = type(error) is OSError and error.errno is None
    return denied or isinstance(error, mistakes)


def check_writable(folder: epath.Path) -> None:
    """Write a file and remove it again, so that a mistake is found before the work and not after.

    Raises:
      UserError, RunError: as `reached`.
    """
    with reached(folder):
        # Other processes may be doing the same, each with a name of its own.
        probe = folder / f"probe-{uuid.uuid4().hex}"
        probe.write_bytes(b"\n")
        probe.unlink(missing_ok=True)


# --- prepared data sets --------------------------------------------------------------------------


def is_whole(folder: epath.Path) -> bool:
    """Whether a folder holds a whole prepared data set."""
    with reached(folder):
        return (folder / MARKER).exists()


def put(folder: epath.Path, remote: epath.Path) -> None:
    """Copy a prepared data set into a bucket, the marker last."""
    # A reader that sees the marker may rely on the rest.
    with reached(remote):
        for file in sorted(folder.iterdir(), key=lambda file: file.name == MARKER):
            file.copy(remote / file.name, overwrite=True)


def fetch(remote: epath.Path, folder: epath.Path) -> None:
    """Copy a prepared data set out of a bucket; the folder gets its name when it is whole."""
    # On a disk a renamed folder appears whole.
    part = folder.parent / f"incomplete.{folder.name}"
    part.mkdir(parents=True)
    with reached(remote):
        for file in remote.iterdir():
            file.copy(part / file.name)
    part.rename(folder)
