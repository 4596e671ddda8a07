"""Byte pairs: any bytes and back, the same wherever a text is cut and whoever learns them."""

import hashlib
import json
import random
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allattn.data import Vocabulary, bpe, prepare
from allattn.errors import UserError

TEXT = "".join(
    f"The quick brown fox no. {i}\r\n\tjumps  over \U0001f600, na\u00efve!\n\n" for i in range(300)
).encode()
RANDOM = np.random.default_rng(0).integers(0, 256, 20_000, np.uint8).tobytes()


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary.from_text(TEXT, "bpe", vocab_size=300)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "home"))


@pytest.mark.parametrize(
    "text",
    [TEXT, RANDOM, b"", b"\x00", b" ", b"\xff\xfe\xed\xa0\x80", b"   \r\n\r\r\n\n  x", bytes(256)],
    ids=lambda text: repr(text[:8]),
)
def test_any_bytes_and_back(text: bytes, vocabulary: Vocabulary) -> None:
    ids = vocabulary.encode(text)
    assert ids.dtype == np.int32 and vocabulary.decode(ids) == text
    again = Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert again == vocabulary and again.encode(text).tolist() == ids.tolist()


def test_symbols(vocabulary: Vocabulary) -> None:
    """The bytes by their value, then what was learnt: fewer tokens for such a text."""
    assert vocabulary.size == 300
    assert vocabulary.symbols[:256] == tuple(map(chr, range(256)))
    assert len(vocabulary.encode(TEXT)) < len(TEXT) / 2
    assert Vocabulary.from_text(b"abc", "bpe").size == 256


@pytest.mark.parametrize(
    "text", [TEXT[:3000], RANDOM[:3000], b"a" * 999, b" " * 999, b"\n \t" * 99]
)
def test_cut_anywhere(text: bytes, vocabulary: Vocabulary) -> None:
    whole = vocabulary.encode(text).tolist()
    for seed in range(5):
        places = sorted(random.Random(seed).choices(range(len(text)), k=60 * seed))
        bounds = zip([0, *places], [*places, len(text)], strict=True)
        pieces = list(bpe.cut(text[begin:end] for begin, end in bounds))
        assert b"".join(pieces) == text
        assert sum((vocabulary.encode(piece).tolist() for piece in pieces), []) == whole


def test_learns_the_same_everywhere() -> None:
    """In other processes, whose hashes have other seeds, and on other machines."""
    symbols = Vocabulary.from_text([TEXT, RANDOM], "bpe", vocab_size=700).symbols
    assert hashlib.sha256(repr(symbols).encode()).hexdigest()[:16] == "a64a637704565a2b"


def test_prepared(tmp_path: Path) -> None:
    """Of the training split alone; kept with the data, and named by its size."""
    text = TEXT + b"Zebra zebra zebra\n" * 5
    (tmp_path / "my.txt").write_bytes(text)
    data = prepare("files", tmp_path / "my.txt", unit="bpe", vocab_size=300)
    splits = [data.tokens(split)[:] for split in ("train", "valid", "test")]
    assert b"".join(map(data.vocabulary.decode, splits)) == text
    assert data.vocabulary.size == 300 and not any("Z" in s[1:] for s in data.vocabulary.symbols)
    assert sum(data.summary()["bytes"].values()) == len(text)
    other = prepare("files", tmp_path / "my.txt", unit="bpe", vocab_size=301)
    assert other.path != data.path and other.full_name != data.full_name
    assert prepare("files", tmp_path / "my.txt", unit="bpe", vocab_size=300).path == data.path


def test_a_line_of_megabytes(tmp_path: Path) -> None:
    size = 3_000_000
    (tmp_path / "my.txt").write_bytes(b"abc" * (size // 3))
    tracemalloc.start()
    data = prepare("files", tmp_path / "my.txt", unit="bpe", vocab_size=300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Pieces of a megabyte, and their stretches.
    assert peak < 4 * size
    assert data.summary()["tokens"]["train"] < size / 10


def test_only_some_of_a_long_text_is_learnt_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces from all over it."""
    monkeypatch.setattr(bpe, "LEARNT_BYTES", 2000)
    chunks = [b"ab" * 500, b"cd" * 500, b"ef" * 500, b"gh" * 500]
    symbols = Vocabulary.from_text(chunks, "bpe").symbols
    assert "ab" in symbols and "ef" in symbols and "cd" not in symbols


def test_without_the_library(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says how to get it; what needs no tokenizer works without."""
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    again = Vocabulary.from_json(vocabulary.to_json())
    assert again.decode([72, 105]) == b"Hi"
    for use in (lambda: again.encode(b"Hi"), lambda: Vocabulary.from_text(TEXT, "bpe")):
        with pytest.raises(UserError, match=r"needs .* tokenizers: pip install 'allattn\[bpe\]'"):
            use()


@pytest.mark.parametrize(
    "tokenizer",
    [None, "", "[]", "{}", '{"model": {"vocab": {"a": 0}}}', '{"model": {"vocab": {"a": "b"}}}'],
)
def test_damaged_tokenizer(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="a stored tokenizer "):
        Vocabulary.from_json({"unit": "bpe", "tokenizer": tokenizer})


def test_tokenizer_without_merges(vocabulary: Vocabulary) -> None:
    damaged = json.loads(vocabulary.tokenizer)
    del damaged["model"]["merges"]
    stored = Vocabulary("bpe", vocabulary.symbols, json.dumps(damaged))
    with pytest.raises(UserError, match="a stored tokenizer cannot be read"):
        stored.encode(b"a")
