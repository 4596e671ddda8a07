"""Where the texts come from: files placed by hand, archives, the standard library.

Every text is read in chunks, so that none has to fit in memory, and a published one is checked
against its checksum before any of it is used.
"""

import sysconfig
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from etils import epath

from allattn.data.download import digest_of, fetch
from allattn.errors import RunError, UserError
from allattn.storage import paths

# Bytes of a text that are in memory at once.
CHUNK_BYTES = 1 << 20

# No published text is larger, in bytes.
LARGEST_MEMBER = 1 << 31

# The text of the standard library: as much of it as is used, and of that for valid and test each.
STDLIB_BYTES = 8_000_000
STDLIB_HELD_OUT = 100_000
# Every byte that a file of it may have, and folders that differ from one machine to another.
_PLAIN = bytes(range(32, 127)) + b"\n"
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Text:
    """A stretch of a file, or of a file within a zip archive, that can be read again and again.

    Attributes:
      path: the file, or the archive; it may lie in a bucket.
      member: name within the archive; None for a plain file.
      start, stop: the stretch, in bytes; stop None means the end of the file.
    """

    path: epath.Path
    member: str | None = None
    start: int = 0
    stop: int | None = None

    def __iter__(self) -> Iterator[bytes]:
        # A member of an archive is unpacked up to the start, too.
        with self._opened() as file:
            file.seek(self.start)
            if self.stop is None:
                while chunk := file.read(CHUNK_BYTES):
                    yield chunk
                return
            left = self.stop - self.start
            while chunk := file.read(min(CHUNK_BYTES, left)):
                left -= len(chunk)
                yield chunk

    def __str__(self) -> str:
        return f"{self.path}" if self.member is None else f"{self.member} in {self.path}"

    def check(self, checksum: str, size: int | None = None) -> None:
        """Raise UserError unless the text has this checksum ("md5:..." or another of hashlib's)."""
        actual, length = digest_of(self, checksum)
        if actual != checksum:
            expected = checksum if size is None else f"{checksum} ({size} bytes)"
            raise UserError(
                f"{self} is damaged: expected {expected}, found {actual} ({length} bytes); "
                "replace it, or remove it to download it again"
            )

    @contextmanager
    def _opened(self) -> Iterator[IO[bytes]]:
        """The file or the archive's member; what an archive's fault means is said in one line."""
        with paths.reached(self.path), self.path.open("rb") as file:
            if self.member is None:
                yield file
                return
            # An archive may be another one, or cut short by a download outside of this program.
            try:
                with zipfile.ZipFile(file) as archive:
                    _refuse_bomb(self, archive.getinfo(self.member))
                    with archive.open(self.member) as member:
                        yield member
            except (UserError, RunError):
                raise
            except KeyError:
                raise UserError(
                    f"{self.path} holds no {self.member}; expected the original archive"
                ) from None
            # The last two are what zipfile raises about passwords and other ways to compress.
            except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, RuntimeError) as error:
                size = self.path.stat().length
                raise UserError(
                    f"{self.path} is not a whole zip archive ({size} bytes found): {error}; "
                    "replace it, or remove it to download it again"
                ) from None


def _refuse_bomb(text: Text, member: zipfile.ZipInfo) -> None:
    """Refuse a member that would be unpacked for hours before its checksum told that it is another.

    zipfile reads no more of it than it announces.
    """
    if member.file_size > LARGEST_MEMBER:
        raise UserError(
            f"{text}: expected at most {LARGEST_MEMBER} bytes, found {member.file_size} announced"
        )


@dataclass(frozen=True)
class Corpus:
    """A published text: one archive, and the files in it.

    Attributes:
      name: of the data set.
      archive: file name of the archive.
      urls: where the archive can be had, tried in turn.
      checksum, size: of the archive, in bytes.
      members: path in the archive -> (checksum, size in bytes, None where it is not known).
    """

    name: str
    archive: str
    urls: tuple[str, ...]
    checksum: str
    size: int | None
    members: Mapping[str, tuple[str, int | None]]

    def find(self, manual_dir: epath.Path | None, downloads: Path) -> dict[str, Text]:
        """Find the texts, or download them, and check them.

        Args:
          manual_dir: folder of files placed by hand (the archive or its files); None: use, or fill,
            `downloads`.
          downloads: folder for downloaded archives.

        Returns:
          file name (without the archive's folder) -> text.

        Raises:
          UserError: a file is missing or damaged, or no mirror answers.
        """
        texts = self._present(manual_dir or epath.Path(downloads))
        # Who names a folder wants what lies there: nothing else is downloaded.
        if texts is None and manual_dir is not None:
            raise UserError(
                f"{self.name}: {self._missing(manual_dir)} in {manual_dir}; {self._advice()}"
            )
        if texts is None:
            self._download(downloads)
            texts = self._in_archive(epath.Path(downloads) / self.archive)
        # Even a file that was downloaded earlier may have been damaged since.
        for member, (checksum, size) in self.members.items():
            texts[Path(member).name].check(checksum, size)
        return texts

    def _present(self, folder: epath.Path) -> dict[str, Text] | None:
        """The texts of a folder; None if it lacks one."""
        # The files themselves, in the folder or in the one that unpacking the archive makes.
        unpacked = [folder / Path(member).parent for member in self.members]
        for base in [folder, *unpacked]:
            files = [base / Path(member).name for member in self.members]
            if all(file.is_file() for file in files):
                return {file.name: Text(file) for file in files}
        # Else the archive, which is read without unpacking it.
        archive = folder / self.archive
        return self._in_archive(archive) if archive.is_file() else None

    def _in_archive(self, path: epath.Path) -> dict[str, Text]:
        return {Path(member).name: Text(path, member) for member in self.members}

    def _missing(self, folder: epath.Path) -> str:
        names = [Path(member).name for member in self.members]
        missing = [name for name in names if not (folder / name).is_file()]
        return f"no {', '.join(missing)}, and no {self.archive},"

    def _advice(self) -> str:
        names = ", ".join(Path(member).name for member in self.members)
        return f"put {self.archive} (or {names}) into a folder and pass --manual_dir=DIR"

    def _download(self, downloads: Path) -> None:
        try:
            fetch(self.urls, downloads / self.archive, checksum=self.checksum, size=self.size)
        except UserError as error:
            raise UserError(f"{self.name}: {error}; without a network, {self._advice()}") from None


def standard_library(folder: Path | None = None) -> bytes:
    """The first 8,000,000 bytes of the standard library's source text, by sorted relative path.

    Left out: tests, installed packages, generated files that differ from one machine to another,
    and every file with a byte other than printable ASCII or newline: where bytes are numbered by
    appearance, the short end of the text must hold no byte that the long beginning lacks.

    Args:
      folder: the library's folder; None: the running interpreter's.

    Returns:
      The text.

    Raises:
      UserError: the folder holds too little source text.
    """
    # Sorted, so that every machine with this interpreter has the same text.
    root = folder or Path(sysconfig.get_paths()["stdlib"])
    files = [path for path in root.rglob("*.py") if _is_library(path.relative_to(root))]
    files.sort(key=lambda path: path.as_posix())

    parts: list[bytes] = []
    size = 0
    for file in files:
        text = file.read_bytes()
        # A file counts if nothing is left of it without the plain bytes.
        if not text.translate(None, _PLAIN):
            parts.append(text)
            size += len(text)
        # Files after these are not even read.
        if size >= STDLIB_BYTES:
            break
    if size < 10 * STDLIB_HELD_OUT:
        raise UserError(
            f"stdlib: {root} holds {size} bytes of source text, "
            f"expected at least {10 * STDLIB_HELD_OUT}"
        )
    return b"".join(parts)[:STDLIB_BYTES]


def _is_library(path: Path) -> bool:
    if _NOT_LIBRARY.intersection(path.parts):
        return False
    # Generated when the interpreter was built, with the paths of that machine.
    return not path.parts[0].startswith(("config-", "_sysconfigdata"))
