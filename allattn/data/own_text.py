"""A text of one's own as three splits: a file, a folder of files, or what standard input gives.

    my.txt                                  |<------ 90 % ------>|<- 5 % ->|<- 5 % ->|
    a folder, its files in sorted order     |<------ 90 % ------>|<- 5 % ->|<- 5 % ->|
    a folder with the three files           train.txt            valid.txt test.txt

Files are joined as they are, byte for byte. The two cuts are moved on to the end of a line where
one is near, so that no line, word or character is torn. Hidden files are left out.
"""

import hashlib
import os
import re
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO

from etils import epath

from allattn.data.sources import CHUNK_BYTES, Text
from allattn.errors import UserError
from allattn.storage import paths

SPLIT_FILES = ("train.txt", "valid.txt", "test.txt")
# Where valid and test begin, in hundredths of a text.
VALID_BEGINS = 90
TEST_BEGINS = 95
# A shorter text has no three splits.
LEAST_BYTES = 100
# How far a cut is moved at most: this many bytes, and a hundredth of the text.
_FARTHEST_CUT = 1 << 16
# Where a text is cut, the better place first: after a line end, after white space, and before a
# character of UTF-8.
_CUTS = (re.compile(rb"\n()"), re.compile(rb"\s()"), re.compile(rb"()[^\x80-\xbf]"))


@dataclass(frozen=True)
class OwnText:
    """Stretches of files, one after the other, that can be read again and again.

    Attributes:
      parts: the stretches.
      as_it_is: its bytes alone count; False: a last line without an end gets one, as in the
        papers' code.
    """

    parts: tuple[Text, ...]
    as_it_is: bool

    def __iter__(self) -> Iterator[bytes]:
        return chain.from_iterable(self.parts)


def find_splits(path: epath.Path) -> dict[str, OwnText]:
    """The three splits of a text.

    Args:
      path: a file or folder, here or in a bucket.

    Raises:
      UserError: nothing is there, one of three files is missing, or there is too little text.
    """
    if path.is_file():
        return _split_in_order(path, [path])
    # A folder is one text, unless it has been split already.
    present = [name for name in SPLIT_FILES if (path / name).is_file()]
    # Two of the three are not taken for a folder of texts: the third was most often forgotten.
    if len(present) < 2 and path.is_dir():
        files = files_below(path)
        if files:
            return _split_in_order(path, files)
    # In a bucket a folder that is empty is not there either.
    if not (paths.is_url(path) or path.exists()):
        expected = "a text file, a folder of texts, or one with train.txt, valid.txt and test.txt"
        raise UserError(f"files: expected {expected}; found nothing at {path}")
    return _three_files(path, present)


def files_below(folder: epath.Path) -> list[epath.Path]:
    """Every regular file in a folder and the folders in it, sorted by path; no hidden ones.

    Folders that are symbolic links are left out, since they may lead back to where they lie.
    """
    # Folders whose content is still to be looked at.
    folders = [folder]
    files: list[epath.Path] = []
    while folders:
        for path in folders.pop().iterdir():
            if path.name.startswith("."):
                continue
            if path.is_file():
                files.append(path)
            elif path.is_dir() and not os.path.islink(path):
                folders.append(path)
    return sorted(files, key=lambda path: path.as_posix())


def _three_files(folder: epath.Path, present: Sequence[str]) -> dict[str, OwnText]:
    """The texts train.txt, valid.txt and test.txt of a folder."""
    # Missing files are named together, so that one message is enough.
    missing = [name for name in SPLIT_FILES if name not in present]
    if missing:
        raise UserError(
            f"files: {folder} needs train.txt, valid.txt and test.txt; "
            f"missing: {', '.join(missing)}; or name a text file, or a folder of them"
        )
    # An empty file is most often one that a copy left behind.
    empty = [name for name in SPLIT_FILES if not (folder / name).stat().length]
    if empty:
        raise UserError(
            f"files: {folder} needs three texts that are not empty; empty: {', '.join(empty)}"
        )
    return {
        name.removesuffix(".txt"): OwnText((Text(folder / name),), as_it_is=False)
        for name in SPLIT_FILES
    }


def _split_in_order(path: epath.Path, files: Sequence[epath.Path]) -> dict[str, OwnText]:
    """Cut files that are read one after the other into train, valid and test."""
    sizes = [file.stat().length for file in files]
    total = sum(sizes)
    if total < LEAST_BYTES:
        raise UserError(
            f"files: {path}: expected a text of at least {LEAST_BYTES} bytes, which is split "
            f"90/5/5 into train, valid and test; found {total} bytes in {len(files)} files"
        )
    # Each cut is searched for in a few bytes after its mark.
    farthest = min(_FARTHEST_CUT, max(4, total // 100))
    cuts = [0]
    for percent in (VALID_BEGINS, TEST_BEGINS):
        mark = total * percent // 100
        after = b"".join(chain.from_iterable(_stretch(files, sizes, mark, mark + farthest)))
        cuts.append(mark + _first_cut(after))
    cuts.append(total)
    # Each split begins where the one before it ends.
    texts = {}
    for number, split in enumerate(("train", "valid", "test")):
        parts = _stretch(files, sizes, cuts[number], cuts[number + 1])
        texts[split] = OwnText(tuple(parts), as_it_is=True)
    return texts


def _stretch(
    files: Sequence[epath.Path], sizes: Sequence[int], start: int, stop: int
) -> Iterator[Text]:
    """The parts of files that lie between two offsets of all of them together."""
    # Offset of each file in all of them.
    begin = 0
    for file, size in zip(files, sizes, strict=True):
        low = max(start, begin)
        high = min(stop, begin + size)
        if low < high:
            yield Text(file, None, low - begin, high - begin)
        begin += size


def _first_cut(text: bytes) -> int:
    """Offset of the first of the best places in a text to cut it; 0 if there is none."""
    for cut in _CUTS:
        if match := cut.search(text):
            return match.start(1)
    return 0


def fingerprint(texts: Mapping[str, OwnText]) -> str:
    """Sixteen hexadecimal digits that change with the content of any split."""
    # Digests of digests, so that text moved from one split to the next changes the result.
    digest = hashlib.sha256()
    for split in sorted(texts):
        part = hashlib.sha256()
        for chunk in texts[split]:
            part.update(chunk)
        digest.update(part.digest())
        # The same bytes are other tokens where a line end is added.
        if texts[split].as_it_is:
            digest.update(b"as it is")
    return digest.hexdigest()[:16]


def keep(stream: IO[bytes], folder: Path) -> Path:
    """Write what a stream gives into a file, which has its name from the content.

    Args:
      stream: such as standard input; it is read to its end.
      folder: where the file is put, here.

    Raises:
      RunError: the folder cannot be written.
    """
    with paths.written(folder):
        folder.mkdir(parents=True, exist_ok=True)
        # Another name until it is whole.
        part = folder / f"{uuid.uuid4().hex}.part"
        digest = hashlib.sha256()
        try:
            with part.open("wb") as file:
                while chunk := stream.read(CHUNK_BYTES):
                    digest.update(chunk)
                    file.write(chunk)
            return part.rename(folder / f"{digest.hexdigest()[:16]}.txt")
        finally:
            part.unlink(missing_ok=True)
