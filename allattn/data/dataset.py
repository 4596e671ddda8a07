"""Prepared data sets: written once under a lock, then read lazily.

Data is in three locations:

    sources          a download, a folder of files placed by hand, or the interpreter's library
    wanted folder    what the user asked for: `default_data_dir` or --data_dir, a folder or a bucket
    local folder     what is read: the wanted folder, or where that is a bucket its copy here

A folder is whole or absent: it is filled under another name and renamed, so that a process that is
killed leaves nothing that looks prepared. To add a data set: write a builder in builders.py whose
class name is the capitalised name, and enter the name in DATASETS.
"""

import difflib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np
from etils import epath

from allattn.data.own_text import find_splits, fingerprint
from allattn.data.vocabulary import Numbering, Symbols, Unit, Vocabulary
from allattn.errors import RunError, UserError, first_line
from allattn.sharding.processes import first_on_leader
from allattn.storage import paths

if TYPE_CHECKING:
    from allattn.data.builders import TextBuilder

# Names that --dataset takes; builders.py has a class for each.
DATASETS = ("enwik8", "text8", "wikitext103", "stdlib", "files")
SPLITS = ("train", "valid", "test")
# What a message keeps of an error of another library.
MESSAGE_LENGTH = 200


class Tokens:
    """The ids of one split, read from its records when they are asked for.

    Args:
      records: the stored records, each {"tokens": bytes}, all but the last of the same length.
      vocabulary: of the stored ids.
      path: folder of the records, for messages.
    """

    def __init__(
        self, records: Sequence[dict[str, bytes]], vocabulary: Vocabulary, path: Path
    ) -> None:
        self._records = records
        self._vocabulary = vocabulary
        self._path = path
        # Small neighbouring slices fall into the same record.
        self._record = functools.lru_cache(maxsize=8)(self._read)
        # All records but the last have the length of the first.
        self._chunk = self._read(0).size
        last = len(records) - 1
        self._length = last * self._chunk + self._read(last).size

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, window: slice) -> np.ndarray:
        """The ids of a stretch, int32, of shape (tokens,); a step other than 1 is refused."""
        start, stop, step = window.indices(self._length)
        if step != 1:
            raise ValueError(f"tokens are read with step 1, found {step}")
        ids = np.empty(max(0, stop - start), np.int32)
        if not ids.size:
            return ids
        # Copy from every record that the stretch meets what the two have in common.
        for index in range(start // self._chunk, -(-stop // self._chunk)):
            begin = index * self._chunk
            low = max(start, begin)
            high = min(stop, begin + self._chunk)
            ids[low - start : high - start] = self._record(index)[low - begin : high - begin]
        return ids

    def _read(self, index: int) -> np.ndarray:
        # Records are checked when they are read, which may be long after the first.
        size = self._vocabulary.size
        with _refused_if_damaged(self._path):
            ids = np.frombuffer(self._records[index]["tokens"], self._vocabulary.dtype)
            if ids.size and not 0 <= ids.min() <= ids.max() < size:
                raise ValueError(f"an id is outside of the {size} symbols")
        return ids


class Dataset:
    """A prepared data set.

    Attributes:
      name: one of DATASETS.
      full_name: tells it from all others; that of `files` by the contents of the texts, and of
        byte pairs by the tokenizer.
      path: folder of its records.
      vocabulary: made from the training text.
    """

    def __init__(self, builder: "TextBuilder") -> None:
        self.name = builder.name
        self.full_name = builder.info.full_name
        self.path = Path(builder.data_path)
        # Stored beside the records, so that reading needs no text.
        with _refused_if_damaged(self.path):
            self.vocabulary = Vocabulary.from_json(builder.info.metadata["vocabulary"])
        self._builder = builder
        # Machines that prepare the same text learn the same byte pairs, unless they have another
        # version of the library.
        if self.vocabulary.unit == "bpe":
            digest = hashlib.sha256(self.vocabulary.tokenizer.encode()).hexdigest()[:16]
            self.full_name += f", tokenizer {digest}"

    def tokens(self, split: str) -> Tokens:
        """The token source of a split ("train", "valid" or "test"); slices of it are int32."""
        if split not in SPLITS:
            raise UserError(f"split must be one of {', '.join(SPLITS)}, found {split!r}")
        with _refused_if_damaged(self.path):
            records = self._builder.as_data_source(split)
            return Tokens(records, self.vocabulary, self.path)

    def bytes_per_token(self, split: str) -> float:
        """How many bytes of text a token of a split ("train", "valid" or "test") stands for."""
        # Data of bytes that were prepared before bytes were counted have no count.
        if self.vocabulary.unit == "byte":
            return 1.0
        with _refused_if_damaged(self.path):
            return int(self._builder.info.metadata["bytes"][split]) / len(self.tokens(split))

    def summary(self) -> dict[str, Any]:
        """Name, path, unit, vocabulary size, tokens and bytes per split, ready for JSON."""
        tokens = {split: len(self.tokens(split)) for split in SPLITS}
        return {
            "dataset": self.name,
            "path": str(self.path),
            "unit": self.vocabulary.unit,
            "vocabulary": self.vocabulary.size,
            "tokens": tokens,
            "bytes": {
                split: round(count * self.bytes_per_token(split)) for split, count in tokens.items()
            },
        }


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Within, TensorFlow Datasets does not warn that a data set's configuration is ours."""
    logger = logging.getLogger("absl")

    def is_none(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith("Using custom data configuration")

    # Other programs in this process keep their logs as they are.
    logger.addFilter(is_none)
    try:
        yield
    finally:
        logger.removeFilter(is_none)


@contextmanager
def _refused_if_damaged(folder: Path) -> Iterator[None]:
    """Turns what reading a damaged folder raises within into one line.

    The data set library, its records and JSON each raise kinds of their own.
    """
    try:
        yield
    except (UserError, RunError, ImportError):
        raise
    except Exception as error:
        found = first_line(error)[:MESSAGE_LENGTH]
        # A system that refuses is no damage, and nothing to remove; a file that is gone is.
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise UserError(f"{folder}: expected a folder to read, found {found}") from error
        raise UserError(
            f"{folder} is damaged ({found}); remove that folder to prepare it again"
        ) from error


# --- names and folders -------------------------------------------------------------------------


def prepare(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    manual_dir: str | os.PathLike[str] | None = None,
    unit: Unit = "byte",
    numbering: Numbering = "value",
    min_count: int = 1,
    vocab_size: int = 4096,
) -> Dataset:
    """Load a data set, and prepare it first where that has not been done.

    What lies in a bucket is copied to this machine once and read there; what the bucket lacks is
    prepared here and put into the bucket. Of several processes the first prepares while the others
    wait.

    Args:
      name: one of `DATASETS`.
      data_dir: folder or bucket URL of prepared data; None: `default_data_dir`. For `files` it is
        the text, a file or a folder, which is only read; it is prepared in `default_data_dir`.
      manual_dir: folder or bucket URL of source files placed by hand, where there is no network.
      unit: "byte", "word" or "bpe"; `files` only.
      numbering: of bytes, "value" or "appearance"; `files` and `stdlib` only.
      min_count: of words, how often one must occur to be a symbol; `files` only.
      vocab_size: of byte pairs, how many symbols are learnt; `files` only.

    Returns:
      The data set.

    Raises:
      UserError: unknown name, missing or damaged source, a folder that cannot be written, no such
        bucket; in the papers' numbering also a symbol that the training text lacks.
      RunError: the bucket does not answer.
    """
    # Every process refuses a wrong name by itself, before they wait for each other.
    if name not in DATASETS:
        raise UserError(f"unknown data set {name!r}: {_nearest(name)}")
    symbols = Symbols(unit, numbering, min_count, vocab_size)
    return first_on_leader("data", lambda: _prepare(name, data_dir, manual_dir, symbols))


def prepare_configured(
    config: ml_collections.ConfigDict, data_dir: str | os.PathLike[str] | None = None
) -> Dataset:
    """`prepare` the data set of a configuration.

    Args:
      config: the whole configuration.
      data_dir: where the data set is, if not where the configuration has it.
    """
    c = config.dataset
    return prepare(
        c.name,
        data_dir or c.data_dir or None,
        unit=c.unit,
        numbering=c.numbering,
        min_count=c.min_count,
        vocab_size=c.vocab_size,
    )


def default_data_dir() -> epath.Path:
    """$ALLATTN_DATA_DIR, else ~/.cache/allattn."""
    return paths.parse("ALLATTN_DATA_DIR", os.environ.get("ALLATTN_DATA_DIR") or "~/.cache/allattn")


def cache_dir() -> Path:
    """`default_data_dir`, or ~/.cache/allattn where that is a bucket."""
    default = default_data_dir()
    if paths.is_url(default):
        return Path("~/.cache/allattn").expanduser()
    return Path(default)


def _local(root: epath.Path) -> Path:
    """The folder on this machine for data sets that are asked for at `root`.

    A bucket has a folder of its own in `cache_dir`.
    """
    if not paths.is_url(root):
        return Path(root)
    return cache_dir() / str(root).replace("://", "/")


def _nearest(name: str) -> str:
    close = difflib.get_close_matches(name, DATASETS, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(DATASETS)}"


# --- preparing ---------------------------------------------------------------------------------


def _prepare(name: str, data_dir: Any, manual_dir: Any, symbols: Symbols) -> Dataset:
    root, options = _options(name, data_dir, manual_dir, symbols)
    local = _local(root)
    make_builder = functools.partial(
        _builder, name, data_dir=local, downloads=local / "downloads", **options
    )

    # The same path below both roots: the builder's name, configuration and version.
    folder = epath.Path(make_builder().data_path)
    wanted = root / folder.relative_to(local) if paths.is_url(root) else folder
    # What is whole is read without the lock.
    if not (paths.is_whole(folder) and paths.is_whole(wanted)):
        with _locked(Path(folder.parent)):
            _prepare_once(make_builder(), folder, wanted)
    # Another builder, since one knows only what was there when it was constructed.
    return Dataset(make_builder())


def _options(
    name: str, data_dir: Any, manual_dir: Any, symbols: Symbols
) -> tuple[epath.Path, dict[str, Any]]:
    """Where the data set is to be prepared, and the builder's other arguments."""
    asked = None if data_dir is None else paths.parse("data_dir", data_dir)
    symbols.check()
    options: dict[str, Any] = {"manual_dir": _manual(manual_dir)}
    # The papers' sets have the papers' symbols.
    if name == "stdlib":
        options["symbols"] = Symbols("byte", symbols.numbering)
    if name != "files":
        return asked or default_data_dir(), options

    # A text of one's own is only read. Its content names the prepared data, so that texts which
    # have changed are prepared again.
    if asked is None:
        raise UserError("data set files needs data_dir, a text: a file, or a folder of files")
    with paths.reached(asked):
        texts = find_splits(asked)
        variant = f"{symbols}_{fingerprint(texts)}"
    return default_data_dir(), options | {"texts": texts, "symbols": symbols, "variant": variant}


def _manual(folder: str | os.PathLike[str] | None) -> epath.Path | None:
    if folder is None:
        return None
    path = paths.parse("manual_dir", folder)
    with paths.reached(path):
        if not path.is_dir():
            raise UserError(f"manual_dir: {path} is not a folder")
    return path


def _builder(name: str, **options: Any) -> "TextBuilder":
    # tensorflow_datasets takes a while to import, so it is imported only where data is opened.
    from allattn.data import builders

    # It reads what was prepared before.
    with _refused_if_damaged(options["data_dir"] / name), _without_remarks():
        return getattr(builders, name.capitalize())(**options)


def _prepare_once(builder: "TextBuilder", folder: epath.Path, wanted: epath.Path) -> None:
    """Fill both folders unless another process has; to be called under the lock."""
    if not paths.is_whole(folder):
        # Both ways write into a folder "incomplete.*" and rename it; those here were left by killed
        # processes.
        for leftover in paths.matching(folder.parent, "incomplete.*"):
            leftover.rmtree()
        if paths.is_whole(wanted):
            return paths.fetch(wanted, folder)
        # A bucket that refuses is found out before the hour that preparing may take.
        if paths.is_url(wanted):
            paths.check_writable(wanted.parent)
        # The folder appears whole or not at all, also where the disk is full.
        with _bars_on_terminals_only(), paths.written(folder):
            builder.download_and_prepare(download_dir=builder.downloads)
    # Also where this machine had the data and the bucket did not.
    if not paths.is_whole(wanted):
        paths.put(folder, wanted)


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Within, TFDS shows no bars where they would fill a file with escape codes."""
    if sys.stderr.isatty():
        yield
        return
    from tensorflow_datasets.core import utils

    # As TFDS's own switch does, which does not say how it stood before.
    with utils.temporary_assignment(utils.tqdm_utils, "_active", False):
        yield


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a lock that the system frees when the process ends, however it ends."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("wb")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder} ({error.strerror}): "
            "pass another --data_dir or set ALLATTN_DATA_DIR"
        ) from None
    # Closing the file frees the lock, and so does the end of the process.
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
