"""The numbering of a text's symbols: bytes by first appearance, words by falling count.

Both orders are those of the published code, so that a stored vocabulary, a checkpoint of the
papers' and the golden numbers of tests/golden agree on every id. Adaptive input and softmax rest on
the order of words: their clusters are stretches of ids, the frequent ones first.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import repeat
from typing import Any, Literal, get_args

import numpy as np

from allattn.errors import UserError

Unit = Literal["byte", "word"]

# A line's end is a symbol of its own in both units; WikiText has a symbol for rare words.
END_OF_LINE = "\n"
UNKNOWN = "<unk>"


@dataclass(frozen=True)
class Vocabulary:
    """The symbols of a text in the order of their numbers; the end of a line is the symbol "\\n".

    Attributes:
      unit: "byte" (each symbol is one character whose code is the byte) or "word".
      symbols: symbol i has id i.
    """

    unit: Unit
    symbols: tuple[str, ...]

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
    def from_text(cls, text: bytes | Iterable[bytes], unit: Unit = "byte") -> "Vocabulary":
        """Number the symbols of a training text.

        Bytes are numbered in order of first appearance; words by falling count, the later first
        appearance first among equals. The text's last line is closed if it is not.

        Args:
          text: the whole text, or its chunks in order, cut anywhere.
          unit: "byte" or "word".

        Raises:
          UserError: the text is empty, or is not UTF-8 where words are asked for.
        """
        check_unit(unit)
        if isinstance(text, bytes):
            text = [text]
        chunks = closed(text, unit)
        symbols = _bytes_by_appearance(chunks) if unit == "byte" else _words_by_count(chunks)
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
        return self._encode_words(text, offset)

    def decode(self, ids: Iterable[int] | np.ndarray) -> bytes:
        """Turn ids into text; words are joined by single spaces, lines end in a newline."""
        symbols = [self.symbols[i] for i in np.asarray(ids).tolist()]
        # Character number b stands for byte b, which is what latin-1 says.
        if self.unit == "byte":
            return "".join(symbols).encode("latin-1")
        # No line begins or ends with the space that joins its words to the newline.
        return re.sub(" ?\n ?", "\n", " ".join(symbols)).encode()

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {symbol: i for i, symbol in enumerate(self.symbols)}

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
        return {"unit": self.unit, "symbols": list(self.symbols)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Vocabulary":
        """The inverse of `to_json`; UserError if `value` is something else."""
        if not isinstance(value, dict) or not {"unit", "symbols"} <= set(value):
            raise UserError(
                f"a stored vocabulary needs the keys unit and symbols, found {value!r:.80}"
            )
        return cls(value["unit"], tuple(value["symbols"]))


def check_unit(unit: str) -> None:
    """Raise UserError unless the unit is one of the two."""
    if unit not in get_args(Unit):
        raise UserError(f"unit must be byte or word, found {unit!r}")


def closed(chunks: Iterable[bytes], unit: Unit) -> Iterator[bytes]:
    """The same text with its last line ended, in pieces that tear no word.

    Args:
      chunks: the text in order, cut anywhere.
      unit: "byte": pieces are the chunks; "word": each piece ends after white space.
    """
    rest = b""  # the beginning of a word whose end is in a later chunk
    last = b"\n"  # last byte of the text so far; an empty text needs no newline
    for chunk in chunks:
        last = chunk[-1:] or last
        cut = len(chunk) if unit == "byte" else _end_of_words(chunk)
        # A chunk without white space only makes the rest longer.
        if cut:
            yield rest + chunk[:cut]
            rest = b""
        rest += chunk[cut:]
    if last != b"\n":
        yield rest + b"\n"


def _end_of_words(chunk: bytes) -> int:
    """How many bytes of a chunk end before a word that its next chunk may complete."""
    return max(chunk.rfind(b"\n"), chunk.rfind(b" ")) + 1


def _bytes_by_appearance(chunks: Iterable[bytes]) -> tuple[str, ...]:
    order: list[int] = []
    for chunk in chunks:
        # Only bytes not seen so far are searched for, each at the speed of memchr.
        unseen = set(range(256)).difference(order)
        first_positions = {chunk.find(byte): byte for byte in unseen}
        # A byte that does not occur has position -1.
        order += [first_positions[i] for i in sorted(first_positions) if i >= 0]
    return tuple(map(chr, order))


def _words_by_count(chunks: Iterable[bytes]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    offset = 0
    for chunk in chunks:
        counts.update(_words(chunk, offset))
        offset += len(chunk)
    # A Counter keeps the order of first appearance, and sorting is stable.
    return tuple(sorted(reversed(counts), key=lambda word: -counts[word]))


def _words(text: bytes, offset: int) -> list[str]:
    """The words and line ends of a text; `offset` is where it begins, for messages."""
    try:
        *lines, last = text.decode().split("\n")
    except UnicodeDecodeError as error:
        where = f"byte {text[error.start]:#04x} at offset {offset + error.start}"
        raise UserError(f"words need UTF-8 text, found {where}") from None
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
