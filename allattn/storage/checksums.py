"""Checksums over every file of a checkpoint, so that damage is noticed before it is read.

    workdir/checkpoints/STEP/checksums.json
        {"crc32": checksum of the text of "files",
         "files": {"params/d/0123": [bytes, checksum], ...}}

Process 0 writes them when Orbax has written all else and before it removes an older checkpoint. To
make them every file is read back, which costs a core about a second per gigabyte and the disk or
bucket the reading, in the background of the training; to verify them costs as much before a
checkpoint is restored.

A checkpoint says in its meta that it has checksums. Without the file such a one is not finished: a
process died in between. Checkpoints of before say nothing there, and are read unverified.
"""

import json
import zlib
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from allattn.errors import UserError
from allattn.storage import paths

NAME = "checksums.json"
"""The file of a checkpoint that is written last."""

FLAG = "checksums"
"""The entry of a checkpoint's meta that says that the file belongs to it."""

# Bytes that are read at once.
CHUNK = 1 << 22
# Files that are read at once, which hides the latency of a bucket.
THREADS = 8

# From the name of a file below the checkpoint's folder to its size and checksum.
Sums = dict[str, list[int]]


class DamagedError(UserError):
    """A checkpoint that is there but not as it was written."""


class UnfinishedError(DamagedError):
    """A checkpoint whose process died before it was finished."""


# --- writing -------------------------------------------------------------------------------------


def write(folder: epath.Path) -> None:
    """Write the checksums of all files that a checkpoint's folder holds.

    Args:
      folder: of one checkpoint, whole but for its checksums.
    """
    # An older file of checksums is none of the checkpoint's content.
    names = [name for name in paths.files_below(folder) if name != NAME]
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda name: _sum(folder / name), names))
    _write_sums(folder, dict(zip(names, found, strict=True)))


def replace_file(folder: epath.Path, name: str, text: str) -> None:
    """Write one file of a checkpoint again, and its checksum.

    Args:
      folder: of one checkpoint.
      name: of the file, relative to the folder.
      text: its new content.
    """
    sums = _read(folder)
    paths.replace(folder / name, text)
    # A kill here leaves a file that is damaged, and may be written once more.
    if sums is not None:
        _write_sums(folder, {**sums, name: _sum(folder / name)})


def _write_sums(folder: epath.Path, sums: Sums) -> None:
    # They appear at once, with a checksum of their own.
    text = json.dumps({"crc32": _sum_of(sums), "files": sums}) + "\n"
    paths.replace(folder / NAME, text)


def _sum(path: epath.Path) -> list[int]:
    """Size in bytes and CRC-32 of a file."""
    size = 0
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def _sum_of(sums: Any) -> int:
    """CRC-32 of the checksums themselves."""
    return zlib.crc32(json.dumps(sums, sort_keys=True).encode())


# --- verifying -----------------------------------------------------------------------------------


def verify(folder: epath.Path, items: Collection[str]) -> bool:
    """Compare files of a checkpoint with their checksums; older checkpoints have none.

    Args:
      folder: of one checkpoint.
      items: the parts that are about to be read; what belongs to all of them is verified as well.

    Returns:
      Whether there are checksums.

    Raises:
      DamagedError: names a file that is missing or not as it was written.
      UnfinishedError: there ought to be checksums, and there are none.
      UserError, RunError: a file cannot be reached, which says nothing of its content.
    """
    sums = _read(folder)
    if sums is None:
        _refuse_unfinished(folder)
        return False
    # Files directly in the folder are Orbax's and tell of all parts.
    names = [name for name in sums if "/" not in name or name.partition("/")[0] in items]
    # A part that was never written has no files to compare.
    missing = set(items).difference(name.partition("/")[0] for name in sums)
    if missing:
        raise DamagedError(f"{place(folder)}/{min(missing)} is missing")
    # The first damage found ends it.
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(lambda name: _compare(folder, name, sums[name]), names):
            pass
    return True


def is_unfinished(folder: epath.Path) -> bool:
    """Whether a checkpoint ought to have checksums and has none."""
    try:
        if _read(folder) is None:
            _refuse_unfinished(folder)
    except UnfinishedError:
        return True
    except DamagedError:
        pass
    return False


def place(folder: epath.Path) -> str:
    """A checkpoint's folder as a message names it, relative to the workdir."""
    return f"{folder.parent.name}/{folder.name}"


def _read(folder: epath.Path) -> Sums | None:
    """The checksums of a checkpoint; None if it has none."""
    try:
        with paths.reached(folder / NAME, may_be_absent=True):
            content = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return None
    # Whatever damage does to the text, it no longer fits its own checksum.
    try:
        found = json.loads(content)
        sums = found["files"]
        if _sum_of(sums) == found["crc32"]:
            return sums
    except (ValueError, TypeError, KeyError):
        pass
    raise DamagedError(f"{place(folder)}/{NAME} is not as it was written")


def _refuse_unfinished(folder: epath.Path) -> None:
    """Refuse a checkpoint without checksums whose meta says that it has some."""
    # Orbax's name for the file of a JSON item.
    file = folder / "meta" / "metadata"
    try:
        with paths.reached(file, may_be_absent=True):
            content = file.read_bytes()
        meta = json.loads(content)
    except FileNotFoundError:
        raise DamagedError(f"{place(folder)}/meta/metadata is missing") from None
    except ValueError:
        raise DamagedError(f"{place(folder)}/meta/metadata is not as it was written") from None
    # A checkpoint of before knows nothing of checksums.
    if isinstance(meta, dict) and FLAG in meta:
        raise UnfinishedError(f"{place(folder)}/{NAME} is missing, which is written last")


def _compare(folder: epath.Path, name: str, expected: list[int]) -> None:
    """Compare one file with its size and checksum."""
    # What cannot be reached may be sound.
    path = folder / name
    try:
        with paths.reached(path, may_be_absent=True):
            found = _sum(path)
    except FileNotFoundError:
        raise DamagedError(f"{place(folder)}/{name} is missing") from None
    if found != expected:
        raise DamagedError(f"{place(folder)}/{name} is not as it was written")
