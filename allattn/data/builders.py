"""TFDS builders of the data sets: from texts to stored ids.

Each split is stored as records of CHUNK_TOKENS ids in the smallest type that holds them, the
vocabulary in the builder's metadata. Nothing here needs TensorFlow: records are written as
ArrayRecord and read back with `as_data_source`.

To add a data set: subclass `TextBuilder`, say in `texts` where the three texts are (a `Corpus` for
a published archive), state the sizes that are published, and enter the name in
`dataset.DATASETS`.
"""

import abc
import codecs
import platform
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from allattn.data.own_text import OwnText
from allattn.data.sources import STDLIB_HELD_OUT, Corpus, Text, standard_library
from allattn.data.vocabulary import PAPERS_BYTES, PAPERS_WORDS, Symbols, Vocabulary, closed, untorn
from allattn.errors import UserError

CHUNK_TOKENS = 65_536  # of a record; it is the least that is read from disk


class LocalInfo(tfds.core.DatasetInfo):
    """The description of a data set that is prepared here; TFDS looks for its own in a bucket."""

    def initialize_from_bucket(self) -> None:
        """Do nothing: what would be found there is kept in a temporary folder that stays."""


class TextBuilder(tfds.core.GeneratorBasedBuilder):
    """Prepares the three splits of a text; a subclass says only where the texts are.

    Args:
      manual_dir: folder or bucket of files placed by hand; None: download.
      downloads: folder for downloaded archives.
      **options: TFDS's own (data_dir, config).
    """

    VERSION = tfds.core.Version("1.0.0")
    symbols: Symbols = PAPERS_BYTES
    # Ends a message on a symbol that the training text lacks.
    advice = ""
    # What is published of the data set, and checked: size of the vocabulary, tokens of each split.
    expected_size: ClassVar[int | None] = None
    expected_tokens: ClassVar[dict[str, int]] = {}

    def __init__(
        self, *, manual_dir: epath.Path | None = None, downloads: Path, **options: Any
    ) -> None:
        # Files placed by hand are used where there are any, else those of `downloads`.
        self.manual_dir = manual_dir
        self.downloads = downloads
        super().__init__(file_format="array_record", **options)

    def _log_download_bytes(self) -> None:
        """Say what is prepared; TFDS would tell of a download, of unknown size."""
        print(f"preparing {self.name} in {self.data_dir}", flush=True)

    def _log_download_done(self) -> None:
        """Say what was prepared."""
        sizes = [f"{size:,} of {split}" for split, size in self.info.metadata["bytes"].items()]
        print(f"prepared {self.name}: bytes, {', '.join(sizes)}", flush=True)

    @abc.abstractmethod
    def texts(self) -> dict[str, Iterable[bytes]]:
        """The chunks of each split, which can be read twice."""

    def _info(self) -> tfds.core.DatasetInfo:
        return LocalInfo(
            builder=self,
            description=self.__doc__,
            # A record is one byte string; `Tokens` knows the type of the ids in it.
            features=tfds.features.FeaturesDict(
                {"tokens": tfds.features.Tensor(shape=(), dtype=np.object_)}
            ),
            # Records are stretches of a text: their order is the data.
            disable_shuffling=True,
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict]]]:
        # The training text alone makes the vocabulary; the others are read with it.
        texts = self.texts()
        vocabulary = Vocabulary.from_text(texts["train"], *self.symbols)
        if self.expected_size not in (None, vocabulary.size):
            raise UserError(
                f"{self.name}: expected a vocabulary of {self.expected_size}, "
                f"found {vocabulary.size}"
            )
        # The vocabulary is stored in the description of the data set, beside the records, and so
        # are the bytes that the tokens of each split stand for.
        self.info.metadata["vocabulary"] = vocabulary.to_json()
        self.info.metadata["bytes"] = {}
        return {
            split: self._generate_examples(split, text, vocabulary) for split, text in texts.items()
        }

    def _generate_examples(
        self, split: str, text: Iterable[bytes], vocabulary: Vocabulary
    ) -> Iterator[tuple[int, dict[str, bytes]]]:
        # One record after another, so that no split has to fit in memory.
        count = 0
        for key, ids in enumerate(_records(self._encoded(split, text, vocabulary))):
            count += ids.size
            yield key, {"tokens": ids.astype(vocabulary.dtype).tobytes()}
        if count != self.expected_tokens.get(split, count):
            expected = self.expected_tokens[split]
            raise UserError(f"{self.name}: expected {expected} {split} tokens, found {count}")

    def _encoded(
        self, split: str, text: Iterable[bytes], vocabulary: Vocabulary
    ) -> Iterator[np.ndarray]:
        """The ids of a text, piece by piece."""
        # The offset in the whole text, so that a message can say where an unknown symbol is.
        offset = 0
        for piece in self.pieces(text):
            try:
                yield vocabulary.encode(piece, offset=offset)
            except UserError as error:
                raise UserError(f"{self.name}, split {split}: {error}{self.advice}") from None
            offset += len(piece)
        self.info.metadata["bytes"][split] = offset

    def pieces(self, text: Iterable[bytes]) -> Iterator[bytes]:
        """A text in pieces that tear no symbol."""
        return closed(text, self.symbols.unit)


class Enwik8(TextBuilder):
    """The first 100,000,000 bytes of an English Wikipedia dump, 90M / 5M / 5M bytes."""

    name = "enwik8"
    expected_size = 205
    # Bytes of train, valid and test, in this order in the file.
    sizes: ClassVar[tuple[int, int, int]] = (90_000_000, 5_000_000, 5_000_000)
    corpus = Corpus(
        name="enwik8",
        archive="enwik8.zip",
        urls=(
            "https://mattmahoney.net/dc/enwik8.zip",
            "http://mattmahoney.net/dc/enwik8.zip",
            "https://data.deepai.org/enwik8.zip",
        ),
        checksum="sha256:547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
        size=36_445_475,
        members={"enwik8": ("md5:a1fa5ffddb56f4953e226637dabbb36a", 100_000_000)},
    )

    def texts(self) -> dict[str, Iterable[bytes]]:
        """The three stretches of the one file."""
        (text,) = self.corpus.find(self.manual_dir, self.downloads).values()
        train, valid, test = self.sizes
        ends = {"train": train, "valid": train + valid, "test": train + valid + test}
        # Each split begins where the one before it ends.
        texts: dict[str, Iterable[bytes]] = {}
        start = 0
        for split, stop in ends.items():
            texts[split] = Text(text.path, text.member, start, stop)
            start = stop
        return texts


class Text8(Enwik8):
    """100,000,000 characters of cleaned Wikipedia text, a-z and space, 90M / 5M / 5M."""

    name = "text8"
    expected_size = 28
    corpus = Corpus(
        name="text8",
        archive="text8.zip",
        urls=("https://mattmahoney.net/dc/text8.zip", "http://mattmahoney.net/dc/text8.zip"),
        checksum="sha256:a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
        size=31_344_016,
        members={"text8": ("md5:3bea1919949baf155f99411df5fada7e", 100_000_000)},
    )


class Wikitext103(TextBuilder):
    """WikiText-103, word by word, with its official splits."""

    name = "wikitext103"
    # Since the bytes of each split are counted.
    VERSION = tfds.core.Version("1.1.0")
    symbols = PAPERS_WORDS
    expected_size = 267_735
    expected_tokens: ClassVar[dict[str, int]] = {
        "train": 103_227_021,
        "valid": 217_646,
        "test": 245_569,
    }
    corpus = Corpus(
        name="wikitext103",
        archive="wikitext-103-v1.zip",
        # The original bucket (the second) no longer answers everywhere; the first is the author's
        # own copy.
        urls=(
            "https://wikitext.smerity.com/wikitext-103-v1.zip",
            "https://s3.amazonaws.com/research.metamind.io/wikitext/wikitext-103-v1.zip",
        ),
        checksum="sha256:242ba0f20b329cfdf1ccc61e9e9e5b59becf189db7f7a81cd2a0e2fc31539590",
        size=None,
        members={
            "wikitext-103/wiki.train.tokens": (
                "sha1:b7497e2dfe77e72cfef5e3dbc61b7b53712ac211",
                None,
            ),
            "wikitext-103/wiki.valid.tokens": (
                "sha1:c326ac59dc587676d58c422eb8a03e119582f92b",
                1_142_309,
            ),
            "wikitext-103/wiki.test.tokens": (
                "sha1:8a5befc548865cec54ed4273cf87dbbad60d1e47",
                1_281_077,
            ),
        },
    )

    def texts(self) -> dict[str, Iterable[bytes]]:
        """The three files."""
        texts = self.corpus.find(self.manual_dir, self.downloads)
        return {split: texts[f"wiki.{split}.tokens"] for split in ("train", "valid", "test")}


class Stdlib(TextBuilder):
    """Source text of the interpreter's standard library: real text that every machine has.

    The configuration's name is the interpreter's version, since another has another text, and the
    numbering.
    """

    name = "stdlib"

    def __init__(self, *, symbols: Symbols, **options: Any) -> None:
        self.symbols = symbols
        variant = f"python{platform.python_version()}"
        # By appearance is how it was first prepared, and has no name.
        if symbols.numbering != "appearance":
            variant += f"-{symbols.numbering}"
        super().__init__(config=tfds.core.BuilderConfig(name=variant), **options)

    def texts(self) -> dict[str, Iterable[bytes]]:
        """The last 200 kB are valid and test."""
        # The last files in sorted order, so no file is in two splits but the two that are cut.
        text = standard_library()
        test = len(text) - STDLIB_HELD_OUT
        valid = test - STDLIB_HELD_OUT
        return {"train": [text[:valid]], "valid": [text[valid:test]], "test": [text[test:]]}


class Files(TextBuilder):
    """A text of one's own.

    Args:
      texts: its splits.
      symbols: what the vocabulary is made of.
      variant: the configuration's name, which tells the texts and their symbols from others.
      **options: those of `TextBuilder`.
    """

    name = "files"

    def __init__(
        self, *, texts: Mapping[str, OwnText], symbols: Symbols, variant: str, **options: Any
    ) -> None:
        self._texts = texts
        self.symbols = symbols
        if symbols.unit == "byte":
            self.advice = "; dataset.numbering=value has a symbol for each of the 256 bytes"
        super().__init__(config=tfds.core.BuilderConfig(name=variant), **options)

    def texts(self) -> dict[str, Iterable[bytes]]:
        """The three splits."""
        if self.symbols.unit == "word":
            _tell_how_words_are_read(self._texts["train"])
        return dict(self._texts)

    def pieces(self, text: Iterable[bytes]) -> Iterator[bytes]:
        """A text in pieces that tear no symbol; one that was cut into splits is its bytes alone."""
        assert isinstance(text, OwnText)
        if self.symbols.unit != "word" and text.as_it_is:
            return untorn(text, self.symbols.unit)
        return super().pieces(text)


def _tell_how_words_are_read(text: Iterable[bytes]) -> None:
    """Say of two beginnings of a text what a reader may not expect."""
    first = next(iter(text), b"")
    if first.startswith(codecs.BOM_UTF8):
        _tell("the text begins with a byte order mark, which is read as part of its first word")
    if b"\r" in first and b"\n" not in first:
        _tell("the text has carriage returns alone, which are read as white space, not line ends")


def _tell(what: str) -> None:
    print(f"files: {what}", file=sys.stderr, flush=True)


def _records(arrays: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Cut ids anew into arrays of CHUNK_TOKENS; only the last may be shorter."""
    # Ids that do not fill a record yet.
    rest = np.zeros(0, np.int32)
    for ids in arrays:
        rest = np.concatenate([rest, ids])
        whole = rest.size // CHUNK_TOKENS * CHUNK_TOKENS
        yield from rest[:whole].reshape(-1, CHUNK_TOKENS)
        rest = rest[whole:]
    if rest.size:
        yield rest
