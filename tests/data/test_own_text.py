"""A text of one's own, as messy as it may be: found, split, numbered and read back."""

import io
import os
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import process

from allattn.data import Dataset, Vocabulary, own_text, prepare
from allattn.data.vocabulary import LONGEST_WORD, closed
from allattn.errors import RunError, UserError

# Empty lines, both line ends, a byte order mark, NUL, four-byte characters, tabs, no last line end.
MESSY = (
    "\ufeffone two\r\n\r\n\n\x00three\tfour \U0001f600\U00010348 five\n"
    "a\rb\r\n  indented\u00a0space\u2028here\n" * 40 + "the end"
).encode()
NOT_UTF8 = bytes(range(256)) * 4 + b"\xff\xfe\xed\xa0\x80" + MESSY


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is written outside tmp_path."""
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "home"))
    return tmp_path / "home"


def read_back(data: Dataset) -> bytes:
    """The three splits, one after the other."""
    splits = (data.tokens(split)[:] for split in ("train", "valid", "test"))
    return b"".join(map(data.vocabulary.decode, splits))


def in_file(folder: Path, text: bytes) -> Path:
    (folder / "my.txt").write_bytes(text)
    return folder / "my.txt"


# --- what is read ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [MESSY, NOT_UTF8], ids=["messy", "not UTF-8"])
def test_bytes_as_they_are(text: bytes, tmp_path: Path) -> None:
    data = prepare("files", in_file(tmp_path, text))
    assert data.vocabulary.symbols == tuple(map(chr, range(256)))
    assert read_back(data) == text
    assert data.tokens("train")[:].tolist() == list(text[: len(data.tokens("train"))])
    summary = data.summary()
    assert summary["bytes"] == summary["tokens"] and sum(summary["bytes"].values()) == len(text)
    assert 0.89 < summary["tokens"]["train"] / len(text) < 0.92


def test_splits_end_with_a_line(tmp_path: Path) -> None:
    data = prepare("files", in_file(tmp_path, MESSY))
    for split in ("train", "valid"):
        assert data.vocabulary.decode(data.tokens(split)[-1:]) == b"\n"


@pytest.mark.parametrize(
    ("text", "torn"),
    [(b"word " * 300, rb"word$"), ("\U0001f600".encode() * 300, "never")],
    ids=["words", "characters"],
)
def test_splits_tear_nothing(text: bytes, torn: str, tmp_path: Path) -> None:
    """One line: a cut falls between words, or at least between characters."""
    data = prepare("files", in_file(tmp_path, text))
    for split in ("train", "valid", "test"):
        part = data.vocabulary.decode(data.tokens(split)[:])
        assert part.decode().strip() and (b" " not in text or part.endswith(b"word "))


def test_folder_of_files(tmp_path: Path) -> None:
    """Every regular file below it in sorted order, whatever its name; hidden ones are skipped."""
    folder = tmp_path / "texts"
    parts = {"a.txt": b"first\n", "b-c": b"second", "b/a.bin": NOT_UTF8, "b/d/e.md": b"\xe9"}
    parts["test.txt"] = b"a name that is also a split's\n"
    for name, text in {**parts, ".git/config": b"hidden", "b/.x": b"hidden"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    (folder / "b" / "loop").symlink_to(folder)
    os.mkfifo(folder / "pipe")
    assert read_back(prepare("files", folder)) == b"".join(parts.values())


def test_text_in_three_files(tmp_path: Path) -> None:
    """Their last lines are ended, as in the papers' code."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_bytes(split.encode())
    (tmp_path / "notes.txt").write_bytes(b"not read")
    data = prepare("files", tmp_path)
    assert read_back(data) == b"train\nvalid\ntest\n"
    (tmp_path / "valid.txt").unlink()
    with pytest.raises(UserError, match=r"missing: valid\.txt; or name a text file, or a folder"):
        prepare("files", tmp_path)


@pytest.mark.parametrize("text", [b"", b"too short\n"])
def test_too_little_text(text: bytes, tmp_path: Path) -> None:
    line = f"my.txt: expected a text of at least 100 bytes, .* 90/5/5 .* found {len(text)} bytes"
    with pytest.raises(UserError, match=line):
        prepare("files", in_file(tmp_path, text))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty needs train.txt, .* or name a text file"):
        prepare("files", tmp_path / "empty")
    with pytest.raises(UserError, match="expected a text file, .* found nothing at .*gone"):
        prepare("files", tmp_path / "gone")


def test_a_kept_stream(tmp_path: Path) -> None:
    """Its name says its content, so that the same text is the same file."""
    files = [own_text.keep(io.BytesIO(text), tmp_path / "kept") for text in (MESSY, b"a", MESSY)]
    assert files[0] == files[2] != files[1]
    assert files[0].read_bytes() == MESSY and len(list((tmp_path / "kept").iterdir())) == 2


# --- words ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_count", [0, 1, 2, 4, 9])
def test_rare_words(min_count: int) -> None:
    """Numbered by falling count; the rare ones together are as frequent as their sum."""
    text = b"a a a a b b b c"
    found = Vocabulary.from_text(text, "word", min_count=min_count).symbols
    counts = {"a": 4, "b": 3, "c": 1, "\n": 1}
    kept = {word for word, count in counts.items() if count >= min_count or word == "\n"}
    assert set(found) == kept | ({"<unk>"} if min_count else set())
    weight = counts | {"<unk>": sum(n for w, n in counts.items() if w not in kept)}
    assert [weight[word] for word in found] == sorted((weight[w] for w in found), reverse=True)


def test_words_that_train_lacks(tmp_path: Path) -> None:
    text = b"the cat sat on the mat\n" * 50 + b"a dog ran\n" * 9
    data = prepare("files", in_file(tmp_path, text), unit="word")
    assert data.vocabulary.decode(data.tokens("test")[:]).startswith(b"<unk> <unk> <unk>\n")
    assert sum(data.summary()["bytes"].values()) == len(text)
    rare = prepare("files", in_file(tmp_path, text), unit="word", min_count=60)
    assert set(rare.vocabulary.symbols) == {"the", "<unk>", "\n"}
    with pytest.raises(UserError, match="byte 0xff at offset 0; dataset.unit=byte reads any bytes"):
        prepare("files", in_file(tmp_path, b"\xff" + text), unit="word")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"\xef\xbb\xbfa b\n" * 99, "a byte order mark, which is read as part of its first word"),
        (b"a b\rc d\r" * 99, "carriage returns alone, which are read as white space"),
        (b"a b\r\nc d\r\n" * 99, ""),
    ],
)
def test_says_how_words_are_read(
    text: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    prepare("files", in_file(tmp_path, text), unit="word")
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == bool(said)
    prepare("files", in_file(tmp_path, text))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("cut", [7, 1 << 16, 1 << 20])
def test_a_word_without_end(cut: int) -> None:
    """It is no symbol, wherever its pieces end."""
    text = b"a " + b"x" * LONGEST_WORD + b"\t" + b"y" * (LONGEST_WORD + 1) + b"\rb"
    if cut < 100:
        text = text.replace(b"y" * LONGEST_WORD, b"y" * 1000).replace(b"x" * LONGEST_WORD, b"x")
    chunks = [text[i : i + cut] for i in range(0, len(text), cut)]
    words = b"".join(closed(chunks, "word")).split()
    assert words[0] == b"a" and words[-1] == b"b"
    assert words[2] == (b"<unk>" if len(text) > LONGEST_WORD else b"y" * 1001)


# --- what a preparation costs and leaves ----------------------------------------------------------


@pytest.mark.parametrize("unit", ["byte", "word"])
def test_a_line_of_megabytes(unit: str, tmp_path: Path) -> None:
    """In pieces: TFDS keeps the tokens until they are written, and nothing else does."""
    size = 24_000_000
    path = in_file(tmp_path, b"")
    path.write_bytes(b"a" * size)
    tracemalloc.start()
    data = prepare("files", path, unit=unit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.7 * size
    tokens = data.summary()["tokens"]
    assert tokens == {"byte": tokens, "word": {"train": 2, "valid": 2, "test": 2}}[unit]


def test_leaves_nothing_and_no_codes(tmp_path: Path, home: Path) -> None:
    """A preparation in a process of its own, with a temporary folder of its own."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(temporary))
        found = process("data", f"--text={in_file(tmp_path, MESSY)}")
    assert found.code == 0 and found.last()["dataset"] == "files"
    assert list(temporary.iterdir()) == []
    assert "\x1b" not in found.out + found.err and "\r" not in found.out + found.err
    begun, done, _ = found.out.splitlines()
    assert begun.startswith("preparing files in ") and done.startswith("prepared files: bytes, ")
    assert found.err == ""


@pytest.mark.parametrize("unit", ["byte", "word"])
def test_a_full_disk(unit: str, tmp_path: Path, home: Path, request: Any) -> None:
    """One line, and nothing that looks prepared."""
    path = in_file(tmp_path, np.random.default_rng(0).bytes(300_000).hex(" ").encode())
    request.getfixturevalue("small_files")
    with pytest.raises(RunError, match=r"^\S+ cannot be written: File too large$"):
        prepare("files", path, unit=unit)
    assert not list(home.rglob("dataset_info.json")) and not list(home.rglob("incomplete*"))
    with pytest.raises(RunError, match="texts cannot be written: File too large"):
        own_text.keep(io.BytesIO(bytes(300_000)), home / "texts")
    assert not list((home / "texts").iterdir())


def test_temporary_folder_in_this_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    for _ in range(2):
        prepare("files", in_file(tmp_path, MESSY))
    assert list((tmp_path / "tmp").iterdir()) == []


def test_random_bytes_round_trip(tmp_path: Path) -> None:
    text = np.random.default_rng(0).integers(0, 256, 200_000, np.uint8).tobytes()
    assert read_back(prepare("files", in_file(tmp_path, text))) == text
