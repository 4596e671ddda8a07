"""Byte pairs: symbols that are sequences of bytes, learnt from a text by Hugging Face's tokenizers.

    text        b"a na\\xc3\\xafve idea\\n"
    stretches   b"a", b" na\\xc3\\xafve", b" idea", b"\\n"        no symbol reaches over their ends
    symbols     b"a", b" na", b"\\xc3\\xaf", b"ve", b" idea", b"\\n"

Learning begins with the 256 bytes and joins the most frequent pair of neighbours into a new symbol,
again and again, until there are as many symbols as were asked for or no pair occurs twice. All
bytes are symbols, so every text can be encoded and is the same when it is decoded, UTF-8 or not:
byte b stands in the tokenizer's strings as character number b.

Stretches are found here and not by the tokenizer, for two reasons: a text that is read in pieces
has the same stretches wherever the pieces end, and none is longer than LONGEST_STRETCH, so that a
line of a gigabyte takes no more memory than a short one.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from allattn.errors import UserError

# Bytes of a stretch, without a space before it.
LONGEST_STRETCH = 64
# A stretch: letters (every byte of a character beyond ASCII counts as one), digits or other signs,
# each with a space before it if there is just one; or white space. Nothing looks ahead, so that a
# stretch is the same at the end of a piece.
_STRETCH = re.compile(
    rb" ?[A-Za-z\x80-\xff]{1,64}| ?[0-9]{1,64}| ?[^A-Za-z0-9\x80-\xff\t-\r ]{1,64}|[\t-\r ]{1,64}"
)
# At most so much of the training text is learnt from, in pieces spread over all of it.
LEARNT_BYTES = 1 << 26
# Stretches whose symbols are kept in memory while a text is encoded.
_KEPT_STRETCHES = 1 << 16
# Of learning: stretches that are handed over at once.
_HANDED_OVER = 1 << 14


def learn(chunks: Iterable[bytes], size: int) -> str:
    """Learn byte pairs from a training text.

    Args:
      chunks: the text in order, cut anywhere; read twice.
      size: number of symbols; a text with too few pairs gives fewer.

    Returns:
      The tokenizer as JSON text.

    Raises:
      UserError: tokenizers is not installed.
    """
    tokenizers = _tokenizers()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        show_progress=False,
        initial_alphabet=list(map(chr, range(256))),
    )
    stretches = _handed_over(cut(_spread(chunks)))
    tokenizer.train_from_iterator(stretches, trainer)
    return tokenizer.to_str()


def cut(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The same text in pieces that begin and end where stretches do."""
    # The last stretch of a piece may go on in the next one.
    rest = b""
    for chunk in chunks:
        text = rest + chunk
        last = 0
        for match in _STRETCH.finditer(text):
            last = match.start()
        if last:
            yield text[:last]
        rest = text[last:]
    if rest:
        yield rest


def symbols_of(tokenizer: Any) -> tuple[str, ...]:
    """The symbols of a tokenizer in the order of their ids, one character for each byte.

    Raises:
      UserError: it is damaged.
    """
    try:
        ids = json.loads(tokenizer)["model"]["vocab"]
        symbols = tuple(sorted(ids, key=ids.__getitem__))
        whole = list(map(ids.__getitem__, symbols)) == list(range(len(symbols)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"a stored tokenizer cannot be read: {error}") from None
    if not whole or set(map(chr, range(256))) - set(symbols):
        raise UserError("a stored tokenizer needs a number for each of the 256 bytes")
    return symbols


class Encoder:
    """Turns text into ids.

    Args:
      tokenizer: as JSON text.

    Raises:
      UserError: tokenizers is not installed, or it cannot read this.
    """

    def __init__(self, tokenizer: str) -> None:
        # Its errors have no class of their own.
        try:
            self._model = _tokenizers().Tokenizer.from_str(tokenizer).model
        except UserError:
            raise
        except Exception as error:
            raise UserError(f"a stored tokenizer cannot be read: {error}") from None
        # Most stretches of a text are words that it has many times.
        self._ids = functools.lru_cache(_KEPT_STRETCHES)(self._encode_stretch)

    def encode(self, text: bytes) -> np.ndarray:
        """The ids of a text, int32, of shape (tokens,)."""
        ids = chain.from_iterable(map(self._ids, _STRETCH.findall(text)))
        return np.fromiter(ids, np.int32)

    def _encode_stretch(self, stretch: bytes) -> tuple[int, ...]:
        return tuple(token.id for token in self._model.tokenize(stretch.decode("latin-1")))


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            "dataset.unit=bpe needs Hugging Face's tokenizers: pip install 'allattn[bpe]'"
        ) from None
    return tokenizers


def _spread(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Every so many-th chunk of a text, such that they are LEARNT_BYTES together, or all."""
    size = sum(map(len, chunks))
    every = -(-size // LEARNT_BYTES)
    for number, chunk in enumerate(chunks):
        if number % max(1, every) == 0:
            yield chunk


def _handed_over(pieces: Iterable[bytes]) -> Iterator[list[str]]:
    """The stretches of a text as strings, many at once."""
    for piece in pieces:
        stretches = [stretch.decode("latin-1") for stretch in _STRETCH.findall(piece)]
        for begin in range(0, len(stretches), _HANDED_OVER):
            yield stretches[begin : begin + _HANDED_OVER]
