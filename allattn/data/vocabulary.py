"""The numbering of a text's symbols.

Bytes are numbered by their value, all 256 of them, so that no text holds one that is unknown.
Byte pairs (bpe.py) are the 256 bytes and sequences of them, in the order in which they were learnt.
Words are numbered by falling count; the rare ones are `<unk>`. Bytes by first appearance, and words
without a `<unk>` of their own, are the orders of the published code: a checkpoint of the papers'
and the golden numbers of tests/golden agree with them on every id. Adaptive input and softmax rest
on the order of words: their clusters are stretches of ids, the frequent ones first.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from allattn.data import bpe
from allattn.errors import UserError

Unit = Literal["byte", "word", "bpe"]
Numbering = Literal["value", "appearance"]

# A line's end is a symbol of its own in all units; rare words have one together.
END_OF_LINE = "\n"
UNKNOWN = "<unk>"
# In bytes: what is longer, without white space, is no word of any language. It is read as `<unk>`,
# so that a line of a gigabyte is not kept in memory as one symbol.
LONGEST_WORD = 1 << 20
# The white space of ASCII; text may be cut after it. Words also end at the others of Unicode.
_SPACES = (b"\t", b"\n", b"\v", b"\f", b"\r", b" ")
_SPACE = re.compile(rb"[\t-\r ]")


class Symbols(NamedTuple):
    """What the symbols of a text are, and which number each has; defaults as in configs/base.py.

    Attributes:
      unit: "byte", "word" or "bpe".
      numbering: of bytes: "value", or "appearance" in the training text, as in the papers' code.
      min_count: of words: how often one must occur in the training text to be a symbol; the others
        are `<unk>`. 0: all are symbols, and there is a `<unk>` only where the text has one, as in
        the papers' code.
      vocab_size: of byte pairs: how many symbols are learnt.
    """

    unit: Unit = "byte"
    numbering: Numbering = "value"
    min_count: int = 1
    vocab_size: int = 4096

    def check(self) -> None:
        """Raise UserError unless each has a value that is known."""
        check_unit(self.unit)
        if self.numbering not in get_args(Numbering):
            raise UserError(
                f"numbering must be one of {', '.join(get_args(Numbering))}, "
                f"found {self.numbering!r}"
            )
        if self.min_count < 0:
            raise UserError(f"min_count must be at least 0, found {self.min_count}")
        if self.vocab_size < 256:
            raise UserError(
                "vocab_size must be at least 256, as every byte is a symbol, "
                f"found {self.vocab_size}"
            )

    def __str__(self) -> str:
        """What tells data that were prepared with these from others."""
        kinds = {"byte": self.numbering, "word": self.min_count, "bpe": self.vocab_size}
        return f"{self.unit}-{kinds[self.unit]}"


# What the papers' code does.
PAPERS_BYTES = Symbols("byte", "appearance")
PAPERS_WORDS = Symbols("word", min_count=0)


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of a text in the order of their numbers; the end of a line is the symbol "\\n".

    Attributes:
      unit: "word", or "byte" or "bpe", whose symbols have a character for each byte, its code.
      symbols: symbol i has id i.
      tokenizer: of byte pairs, Hugging Face's JSON text.
    """

    unit: Unit
    symbols: tuple[str, ...]
    tokenizer: str = ""

    def __post_init__(self) -> None:
        # A stored vocabulary may be damaged or written by hand.
        check_unit(self.unit)
        distinct = len(self._ids) == len(self.symbols)
        if END_OF_LINE not in self._ids or not distinct:
            raise UserError(
                "a vocabulary needs distinct symbols and the end of line, "
                f"found {self.symbols!r:.80}"
            )
        if self.unit == "byte" and not all(len(s) == 1 and ord(s) < 256 for s in self.symbols):
            raise UserError("a byte vocabulary needs symbols of one byte each, found others")

    @classmethod
    def from_text(
        cls,
        text: bytes | Iterable[bytes],
        unit: Unit = "byte",
        numbering: Numbering = "appearance",
        min_count: int = 0,
        vocab_size: int = 4096,
    ) -> "Vocabulary":
        """Number the symbols of a training text; by default as the papers' code does.

        Bytes are numbered by value or in order of first appearance; words by falling count, the
        later first appearance first among equals; byte pairs as they are learnt. The last line of
        a text of bytes by appearance or of words is closed if it is not.

        Args:
          text: the whole text, or its chunks in order, cut anywhere.
          unit, numbering, min_count, vocab_size: as in `Symbols`.

        Raises:
          UserError: the text is empty, is not UTF-8 where words are asked for, or tokenizers is not
            installed where byte pairs are.
        """
        Symbols(unit, numbering, min_count, vocab_size).check()
        # All 256 bytes, whatever the text has.
        if unit == "byte" and numbering == "value":
            return cls(unit, tuple(map(chr, range(256))))

        if isinstance(text, bytes):
            text = [text]
        if unit == "bpe":
            tokenizer = bpe.learn(text, vocab_size)
            return cls(unit, bpe.symbols_of(tokenizer), tokenizer)
        chunks = closed(text, unit)
        if unit == "byte":
            symbols = _bytes_by_appearance(chunks)
        else:
            symbols = _words_by_count(chunks, min_count)
        if not symbols:
            raise UserError("the training text is empty: a vocabulary needs at least one symbol")
        return cls(unit, symbols)

    @property
    def size(self) -> int:
        """Number of symbols."""
        return len(self.symbols)

    @property
    def end_of_line(self) -> int:
        """Id of the end-of-line symbol."""
        return self._ids[END_OF_LINE]

    @property
    def dtype(self) -> np.dtype:
        """The smallest stored type that holds every id (little-endian)."""
        if self.size <= 1 << 8:
            return np.dtype("u1")
        if self.size <= 1 << 16:
            return np.dtype("<u2")
        return np.dtype("<i4")

    # --- text to ids and back ------------------------------------------------------------------

    def encode(self, text: bytes, *, close: bool = False, offset: int = 0) -> np.ndarray:
        """Turn text into ids; each newline becomes the end-of-line symbol.

        Args:
          text: the bytes; for words, UTF-8 split at white space.
          close: append the end-of-line symbol if the text is not empty and does not end in a
            newline.
          offset: where the text begins in its file, in bytes (for messages only).

        Returns:
          ids, int32, of shape (tokens,).

        Raises:
          UserError: a byte, or a word where `<unk>` is no symbol, is not in the vocabulary.
        """
        if close and text and not text.endswith(b"\n"):
            text += b"\n"
        if self.unit == "byte":
            return self._encode_bytes(text, offset)
        if self.unit == "bpe":
            return self._encoder.encode(text)
        return self._encode_words(text, offset)

    def decode(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """Turn ids into text; words are joined by single spaces, lines end in a newline."""
        symbols = [self.symbols[i] for i in np.asarray(ids).tolist()]
        # Character number b stands for byte b, which is what latin-1 says.
        if self.unit != "word":
            return "".join(symbols).encode("latin-1")
        # No line begins or ends with the space that joins its words to the newline.
        return re.sub(" ?\n ?", "\n", " ".join(symbols)).encode()

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols)}

    @cached_property
    def _encoder(self) -> bpe.Encoder:
        return bpe.Encoder(self.tokenizer)

    @cached_property
    def _table(self) -> np.ndarray:
        """The id of each of the 256 bytes; -1 for those that are no symbol."""
        table = np.full(256, -1, np.int32)
        table[[ord(symbol) for symbol in self.symbols]] = np.arange(self.size)
        return table

    def _encode_bytes(self, text: bytes, offset: int) -> np.ndarray:
        # One look into the table for all bytes, then name the first that has no id.
        ids = self._table[np.frombuffer(text, np.uint8)]
        if ids.size and ids.min() < 0:
            first = int(np.argmax(ids < 0))
            byte = text[first : first + 1]
            raise UserError(
                f"byte {byte!r} at offset {offset + first} is none of the vocabulary's "
                f"{self.size} symbols"
            )
        return ids

    def _encode_words(self, text: bytes, offset: int) -> np.ndarray:
        # A word that is no symbol becomes <unk>, or -1 where there is no <unk>.
        unknown = self._ids.get(UNKNOWN, -1)
        words = _words(text, offset)
        ids = np.fromiter(map(self._ids.get, words, repeat(unknown)), np.int32, len(words))
        if unknown < 0 and ids.size and ids.min() < 0:
            first = int(np.argmax(ids < 0))
            raise UserError(
                f"word {words[first]!r} at offset {offset + _offset_of(text, first)} is none of "
                f"the vocabulary's {self.size} symbols, nor is {UNKNOWN}"
            )
        return ids

    # --- stored form ---------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """The vocabulary as plain lists and strings."""
        # The symbols of a tokenizer are in its JSON.
        if self.unit == "bpe":
            return {"unit": self.unit, "tokenizer": self.tokenizer}
        return {"unit": self.unit, "symbols": list(self.symbols)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Vocabulary":
        """The inverse of `to_json`; UserError if `value` is something else."""
        # Byte pairs are their tokenizer.
        if isinstance(value, dict) and value.get("unit") == "bpe":
            symbols = bpe.symbols_of(value.get("tokenizer"))
            return cls("bpe", symbols, value["tokenizer"])
        if not isinstance(value, dict) or not {"unit", "symbols"} <= set(value):
            raise UserError(
                f"a stored vocabulary needs the keys unit and symbols, found {value!r:.80}"
            )
        symbols = value["symbols"]
        if not _are_texts(symbols):
            raise UserError(
                f"a stored vocabulary needs a list of texts as symbols, found {symbols!r:.80}"
            )
        return cls(value["unit"], tuple(symbols))


def _are_texts(symbols: Any) -> bool:
    """Whether this is a list of texts, each of whole characters."""
    if not isinstance(symbols, list) or not all(isinstance(x, str) for x in symbols):
        return False
    # JSON may hold half of a character, which no text can.
    try:
        "".join(symbols).encode()
    except UnicodeEncodeError:
        return False
    return True


def check_unit(unit: str) -> None:
    """Raise UserError unless the unit is one of those that there are."""
    if unit not in get_args(Unit):
        raise UserError(f"unit must be byte or word or bpe, found {unit!r:.80}")


def closed(chunks: Iterable[bytes], unit: Unit) -> Iterator[bytes]:
    """The same text with its last line ended, in pieces as `untorn` makes them."""
    return untorn(_last_line_ended(chunks), unit)


def untorn(chunks: Iterable[bytes], unit: Unit) -> Iterator[bytes]:
    """The same text in pieces that tear no symbol.

    Args:
      chunks: the text in order, cut anywhere; of words it must end in white space.
      unit: "byte": pieces are the chunks; "word": each piece ends after white space; "bpe": each
        piece ends where a symbol must.
    """
    if unit == "bpe":
        return bpe.cut(chunks)
    if unit == "word":
        return _whole_words(chunks)
    return iter(chunks)


def _last_line_ended(chunks: Iterable[bytes]) -> Iterator[bytes]:
    last = b"\n"  # last byte of the text so far; an empty text needs no newline
    for chunk in chunks:
        last = chunk[-1:] or last
        yield chunk
    if last != b"\n":
        yield b"\n"


def _whole_words(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces of a text, each of which ends in white space, as the text must; no endless words."""
    # Parts of a word whose end is in a later chunk, and how long it is so far. They are joined
    # once, so that a long word costs no more than its bytes.
    parts: list[bytes] = []
    length = 0
    for chunk in chunks:
        space = _SPACE.search(chunk)
        # A chunk without white space only makes the word longer; too long a one is not kept.
        if space is None:
            length += len(chunk)
            if length <= LONGEST_WORD:
                parts.append(chunk)
            continue
        # The word that ends here, then what the chunk has until its own last white space.
        first = space.start()
        word = b"".join(parts) + chunk[:first]
        if length + first > LONGEST_WORD:
            word = UNKNOWN.encode()
        cut = 1 + max(chunk.rfind(byte) for byte in _SPACES)
        yield word + chunk[first:cut]
        parts = [chunk[cut:]]
        length = len(chunk) - cut


def _bytes_by_appearance(chunks: Iterable[bytes]) -> tuple[str, ...]:
    order: list[int] = []
    for chunk in chunks:
        # Only bytes not seen so far are searched for, each at the speed of memchr.
        unseen = set(range(256)).difference(order)
        first_positions = {chunk.find(byte): byte for byte in unseen}
        # A byte that does not occur has position -1.
        order += [first_positions[i] for i in sorted(first_positions) if i >= 0]
    return tuple(map(chr, order))


def _words_by_count(chunks: Iterable[bytes], min_count: int) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    offset = 0
    for chunk in chunks:
        counts.update(_words(chunk, offset))
        offset += len(chunk)
    # The rare words together are as frequent as their sum; the end of a line is always a symbol.
    if counts and min_count:
        stay = {END_OF_LINE, UNKNOWN}
        rare = [word for word in counts if counts[word] < min_count and word not in stay]
        counts[UNKNOWN] += sum(counts.pop(word) for word in rare)
    # A Counter keeps the order of first appearance, and sorting is stable.
    return tuple(sorted(reversed(counts), key=lambda word: -counts[word]))


def _words(text: bytes, offset: int) -> list[str]:
    """The words and line ends of a text; `offset` is where it begins, for messages."""
    try:
        *lines, last = text.decode().split("\n")
    except UnicodeDecodeError as error:
        where = f"byte {text[error.start]:#04x} at offset {offset + error.start}"
        raise UserError(
            f"words need UTF-8 text, found {where}; dataset.unit=byte reads any bytes"
        ) from None
    # Lines end at "\n" alone; `str.splitlines` would cut at other characters as well.
    words: list[str] = []
    for line in lines:
        words += line.split()
        words.append(END_OF_LINE)
    return words + last.split()


def _offset_of(text: bytes, index: int) -> int:
    """Offset, in bytes, of the word or newline number `index`."""
    # The same cuts as in `_words`: a newline, or a word between white space.
    decoded = text.decode()
    matches = list(re.finditer(r"\n|\S+", decoded))
    return len(decoded[: matches[index].start()].encode())
