"""Prepared data sets: made once under a lock, then read lazily."""

import difflib
import fcntl
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from allattn.data.sources import fingerprint, folder_of_texts
from allattn.data.vocabulary import Unit, Vocabulary, check_unit
from allattn.errors import UserError

if TYPE_CHECKING:
    from allattn.data.builders import TextBuilder

DATASETS = ("enwik8", "text8", "wikitext103", "stdlib", "files")
SPLITS = ("train", "valid", "test")


class Tokens:
    """The ids of one split, read from its records when they are asked for.

    Args:
      records: the stored records, each {"tokens": bytes}, all but the last of the same length.
      dtype: of the stored ids.
    """

    def __init__(self, records: Sequence[dict[str, bytes]], dtype: np.dtype) -> None:
        self._records = records
        self._dtype = dtype
        # Small neighbouring slices fall into the same record.
        self._record = functools.lru_cache(maxsize=8)(self._read)
        self._chunk = self._read(0).size
        self._length = (len(records) - 1) * self._chunk + self._read(len(records) - 1).size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: slice) -> np.ndarray:
        """The ids of a stretch, int32, of shape (tokens,); a step other than 1 is refused."""
        start, stop, step = window.indices(self._length)
        if step != 1:
            raise ValueError(f"tokens are read with step 1, found {step}")
        ids = np.empty(max(0, stop - start), np.int32)
        for index in range(start // self._chunk, -(-stop // self._chunk) if ids.size else 0):
            begin = index * self._chunk
            low, high = max(start, begin), min(stop, begin + self._chunk)
            ids[low - start : high - start] = self._record(index)[low - begin : high - begin]
        return ids

    def _read(self, index: int) -> np.ndarray:
        return np.frombuffer(self._records[index]["tokens"], self._dtype)


class Dataset:
    """A prepared data set: `name`, `path` of its records, `vocabulary`, and the tokens of each split."""

    def __init__(self, builder: "TextBuilder") -> None:
        self.name = builder.name
        self.path = Path(builder.data_path)
        self.vocabulary = Vocabulary.from_json(builder.info.metadata["vocabulary"])
        self._builder = builder

    def tokens(self, split: str) -> Tokens:
        """The token source of a split ("train", "valid" or "test"); slices of it are int32 arrays."""
        if split not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
        try:
            return Tokens(self._builder.as_data_source(split), self.vocabulary.dtype)
        except (OSError, LookupError, RuntimeError) as error:
            raise UserError(f"{self.path} is damaged ({error}); remove that folder to prepare it again") from None

    def summary(self) -> dict[str, Any]:
        """Name, path, unit, vocabulary size and tokens per split, ready for JSON."""
        return {
            "dataset": self.name,
            "path": str(self.path),
            "unit": self.vocabulary.unit,
            "vocabulary": self.vocabulary.size,
            "tokens": {split: len(self.tokens(split)) for split in SPLITS},
        }


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    unit: Unit = "byte",
) -> Dataset:
    """Loads a data set, and prepares it first where that has not been done.

    Args:
      name: one of `DATASETS`.
      data_dir: folder of prepared data; None: $ALLATTN_DATA_DIR, else ~/.cache/allattn. For `files` it is the folder
        of the texts, which is only read.
      manual_dir: folder of source files placed by hand, where there is no network.
      unit: "byte" or "word"; `files` only.

    Returns:
      The data set.

    Raises:
      UserError: unknown name, missing or damaged source, a symbol that the training text lacks, a folder that
        cannot be written.
    """
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: {_nearest(name)}")
    make = functools.partial(_builder, name, **_options(name, data_dir, manual_dir, unit))
    builder = make()
    if not _is_prepared(builder):
        with _locked(Path(builder.data_path).parent):
            _prepare_once(make())
        builder = make()
    return Dataset(builder)


def default_data_dir() -> Path:
    """$ALLATTN_DATA_DIR, else ~/.cache/allattn."""
    return Path(os.environ.get("ALLATTN_DATA_DIR") or "~/.cache/allattn").expanduser()


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, DATASETS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(DATASETS)}"


def _folder(what: str, folder: str | os.PathLike[str] | None) -> Path | None:
    if folder is None:
        return None
    if "://" in os.fspath(folder):
        raise UserError(f"{what} must be a local folder (records are read at random), found {os.fspath(folder)}")
    path = Path(folder).expanduser()
    if what == "manual_dir" and not path.is_dir():
        raise UserError(f"manual_dir: {path} is not a folder")
    return path


def _options(name: str, data_dir: str | os.PathLike[str] | None, manual_dir: Any, unit: Unit) -> dict[str, Any]:
    """The builder's arguments."""
    folder, manual, extra = _folder("data_dir", data_dir), _folder("manual_dir", manual_dir), {}
    if name == "files":
        if folder is None:
            raise UserError("data set files needs data_dir, the folder with train.txt, valid.txt and test.txt")
        check_unit(unit)
        extra = {"unit": unit, "variant": f"{unit}-{fingerprint(folder_of_texts(folder))}"}
        folder, manual = None, folder
    root = folder or default_data_dir()
    return {"data_dir": root, "manual_dir": manual, "downloads": root / "downloads", **extra}


def _builder(name: str, **options: Any) -> "TextBuilder":
    # tensorflow_datasets takes a while to import, so it is imported only where data is opened.
    from allattn.data import builders

    return getattr(builders, name.capitalize())(**options)


def _is_prepared(builder: "TextBuilder") -> bool:
    return (Path(builder.data_path) / "dataset_info.json").exists()


def _prepare_once(builder: "TextBuilder") -> None:
    """Prepares unless another process has; to be called under the lock."""
    if _is_prepared(builder):
        return
    # TFDS writes into a folder "incomplete.*" and renames it at the end; those here were left by killed processes.
    for leftover in Path(builder.data_path).parent.glob("incomplete.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    builder.download_and_prepare(download_dir=builder.downloads)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock that the system frees when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): pass another --data_dir or set ALLATTN_DATA_DIR"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
