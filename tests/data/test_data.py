"""Vocabularies, builders and prepared data sets."""

import fcntl
import json
import multiprocessing
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allattn.data import DATASETS, Dataset, Stream, Tokens, Vocabulary, prepare
from allattn.data.vocabulary import closed
from allattn.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "data_pipeline.json").read_text())
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Nothing is written outside tmp_path."""
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "home"))
    return tmp_path / "home"


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not on this machine")
    return SHARED / name


def write_texts(folder: Path, train: bytes, valid: bytes = b"ab\n", test: bytes = b"ba\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for split, text in (("train", train), ("valid", valid), ("test", test)):
        (folder / f"{split}.txt").write_bytes(text)
    return folder


def golden_texts(case: str) -> dict[str, bytes]:
    if case == "words":
        return {split: text.encode() for split, text in GOLDEN[case]["texts"].items()}
    # The byte case holds numbers: one word per byte, each line's newline standing for itself.
    lines = {split: text.split("\n") for split, text in GOLDEN[case]["texts"].items()}
    return {
        split: b"\n".join(bytes(map(int, line.split())) for line in text)
        for split, text in lines.items()
    }


def golden_symbols(case: str) -> tuple[str, ...]:
    symbols = GOLDEN[case]["idx2word"]
    return tuple("\n" if s == "<eos>" else chr(int(s)) if case == "bytes" else s for s in symbols)


@pytest.mark.parametrize("case", ["bytes", "words"])
@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_vocabulary_golden(case: str, cut: int) -> None:
    texts = golden_texts(case)
    unit = case[:-1]
    train = texts["train"]
    vocabulary = Vocabulary.from_text((train[i : i + cut] for i in range(0, len(train), cut)), unit)
    assert vocabulary.symbols == golden_symbols(case)
    assert vocabulary.symbols[vocabulary.end_of_line] == "\n"
    for split, text in texts.items():
        ids = vocabulary.encode(text, close=True)
        assert ids.dtype == np.int32
        assert ids.tolist() == GOLDEN[case][split]


@pytest.mark.parametrize("case", ["bytes", "words"])
def test_files_golden(case: str, tmp_path: Path) -> None:
    texts = golden_texts(case)
    folder = write_texts(tmp_path / "texts", **texts)
    data = prepare("files", folder, unit=case[:-1], numbering="appearance", min_count=0)
    assert data.vocabulary.symbols == golden_symbols(case)
    for split in texts:
        assert data.tokens(split)[:].tolist() == GOLDEN[case][split]
    batch = GOLDEN[case]["batch_size"]
    rows = GOLDEN[case]["train_rows"]
    first = Stream(data.tokens("train"), batch, 4).block(0)
    assert first.inputs_BT.tolist() == [row[:4] for row in rows]
    assert first.targets_BT.tolist() == [row[1:5] for row in rows]


@pytest.mark.parametrize("unit", ["byte", "word"])
@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a b", b"a b\n\n c ", b"x\n \ny\n", b" "])
def test_closed_keeps_the_text(unit: str, text: bytes) -> None:
    for cut in range(1, 5):
        joined = b"".join(closed((text[i : i + cut] for i in range(0, len(text), cut)), unit))
        assert joined == text + (b"\n" if text and not text.endswith(b"\n") else b"")


def test_closed_never_tears_a_word() -> None:
    text = random.Random(0).choices(b"ab \n", k=500)
    pieces = list(closed((bytes(text[i : i + 7]) for i in range(0, 500, 7)), "word"))
    assert sum((piece.split() for piece in pieces), []) == bytes(text).split()


@pytest.mark.parametrize("unit", ["byte", "word"])
def test_round_trip(unit: str) -> None:
    text = b"the cat\n\nsat on\nthe mat\n"
    vocabulary = Vocabulary.from_text(text, unit)
    again = Vocabulary.from_json(json.loads(json.dumps(vocabulary.to_json())))
    assert again == vocabulary
    assert again.decode(again.encode(text)) == text


def test_every_byte_round_trips() -> None:
    text = bytes(range(256)) + b"\n"
    vocabulary = Vocabulary.from_text(text)
    assert vocabulary.size == 256
    assert vocabulary.decode(vocabulary.encode(text)) == text


def test_encode_closes_only_on_request() -> None:
    vocabulary = Vocabulary.from_text(b"ab")
    assert vocabulary.encode(b"ab").tolist() == [0, 1]
    assert vocabulary.encode(b"ab", close=True).tolist() == [0, 1, 2]
    assert vocabulary.encode(b"ab\n", close=True).tolist() == [0, 1, 2]
    assert vocabulary.encode(b"", close=True).tolist() == []


def test_lines_of_spaces() -> None:
    """A line of spaces holds only the end of the line."""
    vocabulary = Vocabulary.from_text(" \n = a = \n \n\u00a0b\u2003c\n".encode(), "word")
    ids = vocabulary.encode(" \nb\u00a0c \n".encode())
    assert [vocabulary.symbols[i] for i in ids] == ["\n", "b", "c", "\n"]


def test_unknown_symbols() -> None:
    with pytest.raises(
        UserError, match=r"byte b'\\xe9' at offset 12 is none of the vocabulary's 3 symbols"
    ):
        Vocabulary.from_text(b"ab").encode(b"ab\xe9", offset=10)
    with pytest.raises(UserError, match=r"word 'dog' at offset 8 .* 3 symbols"):
        Vocabulary.from_text(b"the \xc3\xa9", "word").encode(b"the\n\xc3\xa9 \ndog")
    with_unknown = Vocabulary.from_text(b"the <unk>", "word")
    assert with_unknown.decode(with_unknown.encode(b"the dog\n")) == b"the <unk>\n"
    with pytest.raises(UserError, match="UTF-8 text, found byte 0xff at offset 3"):
        Vocabulary.from_text(b"ab \xff", "word")


@pytest.mark.parametrize(
    "value",
    [
        None,
        {},
        {"unit": "byte", "symbols": ["a"]},
        {"unit": "char", "symbols": ["\n"]},
        {"unit": "byte", "symbols": ["\n", "ab"]},
        {"unit": "word", "symbols": ["\n", "\n"]},
    ],
)
def test_bad_stored_vocabulary(value: Any) -> None:
    with pytest.raises(UserError):
        Vocabulary.from_json(value)


@pytest.mark.parametrize(
    ("size", "dtype"), [(256, "u1"), (257, "<u2"), (65_536, "<u2"), (65_537, "<i4")]
)
def test_smallest_dtype(size: int, dtype: str) -> None:
    assert Vocabulary("word", ("\n", *map(str, range(size - 1)))).dtype == np.dtype(dtype)


def test_many_records(tmp_path: Path) -> None:
    text = bytes(np.random.default_rng(0).integers(97, 123, 200_000, np.uint8)) + b"\n"
    data = prepare("files", write_texts(tmp_path / "texts", text))
    tokens = data.tokens("train")
    expected = data.vocabulary.encode(text)
    assert len(tokens) == 200_001
    for window in (
        slice(None),
        slice(65_535, 65_537),
        slice(65_536, 131_072),
        slice(-3, None),
        slice(5, 5),
        slice(9, 3),
    ):
        np.testing.assert_array_equal(tokens[window], expected[window])
    assert tokens[:3].dtype == np.int32
    with pytest.raises(ValueError, match="step"):
        tokens[::2]
    stored = sum(f.stat().st_size for f in data.path.glob("*train*"))
    assert stored < 1.1 * len(text), "a byte should be stored as a byte"


def test_wide_vocabulary_is_stored(tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(70_000)).encode()
    data = prepare("files", write_texts(tmp_path / "texts", words, b"w69999", b"w0"), unit="word")
    np.testing.assert_array_equal(
        data.tokens("train")[:], data.vocabulary.encode(words, close=True)
    )
    assert data.summary()["tokens"] == {"train": 70_001, "valid": 2, "test": 2}


def test_files_folder_is_only_read(tmp_path: Path, home: Path) -> None:
    folder = write_texts(tmp_path / "texts", b"abc\n")
    folder.chmod(0o500)
    data = prepare("files", folder)
    assert sorted(p.name for p in folder.iterdir()) == ["test.txt", "train.txt", "valid.txt"]
    assert data.path.is_relative_to(home)


def test_changed_texts_are_prepared_anew(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", b"abc\n")
    before = prepare("files", folder)
    assert prepare("files", folder).path == before.path
    write_texts(folder, b"abcd\n")
    after = prepare("files", folder)
    assert after.path != before.path and after.summary()["tokens"]["train"] == 5
    assert prepare("files", folder).path == after.path


def test_files_bad_input(tmp_path: Path, home: Path) -> None:
    folder = write_texts(tmp_path / "texts", b"abc\n", valid=b"ab\nabZ\n")
    with pytest.raises(
        UserError,
        match=r"files, split valid: byte b'Z' at offset 5 .* 4 symbols; dataset.numbering=value",
    ):
        prepare("files", folder, numbering="appearance")
    assert not list(home.rglob("dataset_info.json")) and not list(home.rglob("incomplete*"))
    with pytest.raises(UserError, match="needs data_dir"):
        prepare("files")
    with pytest.raises(UserError, match="unit must be byte or word"):
        prepare("files", folder, unit="char")
    (folder / "test.txt").write_bytes(b"")
    with pytest.raises(UserError, match=r"empty: test\.txt"):
        prepare("files", folder)
    (folder / "test.txt").unlink()
    with pytest.raises(UserError, match=r"missing: test\.txt"):
        prepare("files", folder)


def test_names_and_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'enwik8'"):
        prepare("enwiki8")
    with pytest.raises(UserError, match=", ".join(DATASETS)):
        prepare("zzz")
    with pytest.raises(
        UserError,
        match="data_dir: expected a path, or a URL that begins with gs://.*, found nosuch://",
    ):
        prepare("stdlib", "nosuch://bucket/data")
    with pytest.raises(UserError, match="manual_dir: .* is not a folder"):
        prepare("enwik8", manual_dir=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to .*ALLATTN_DATA_DIR"):
        prepare("stdlib", tmp_path / "file" / "data")


def test_killed_preparation(tmp_path: Path, home: Path) -> None:
    """What a killed preparation leaves is not taken for a whole data set."""
    folder = write_texts(tmp_path / "texts", b"abc\n")
    whole = prepare("files", folder)
    half = whole.path.with_name("incomplete.ABCDEF_1.0.0")
    whole.path.rename(half)  # what a process killed before the final rename leaves
    (half / "dataset_info.json").unlink()
    assert prepare("files", folder).summary() == whole.summary()
    assert not half.exists()


def test_damaged_records(tmp_path: Path) -> None:
    data = prepare("files", write_texts(tmp_path / "texts", b"abc\n"))
    next(data.path.glob("*valid*record*")).unlink()
    with pytest.raises(UserError, match="is damaged .*remove that folder"):
        prepare("files", tmp_path / "texts").tokens("valid")
    with pytest.raises(UserError, match="split must be one of train, valid, test, found 'dev'"):
        data.tokens("dev")


def prepare_in_process(folder: Path, queue: multiprocessing.Queue) -> None:
    queue.put(prepare("files", folder).summary())


def test_two_processes_prepare_once(tmp_path: Path, home: Path) -> None:
    folder = write_texts(tmp_path / "texts", b"abcdefgh\n" * 50_000)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    processes = [context.Process(target=prepare_in_process, args=(folder, queue)) for _ in range(2)]
    for process in processes:
        process.start()
    summaries = [queue.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
    assert [process.exitcode for process in processes] == [0, 0]
    assert summaries[0] == summaries[1] and summaries[0]["tokens"]["train"] == 450_000
    assert len(list(home.rglob("dataset_info.json"))) == 1 and not list(home.rglob("incomplete*"))


def test_prepared_data_needs_no_lock(tmp_path: Path) -> None:
    folder = write_texts(tmp_path / "texts", b"abc\n")
    data = prepare("files", folder)
    with (data.path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert prepare("files", folder).summary() == data.summary()


def test_wikitext2(tmp_path: Path) -> None:
    data = prepare("files", shared("wikitext2"), unit="word", min_count=0)
    assert data.vocabulary.size == 33_278
    assert data.summary()["tokens"] == {"train": 2_088_628, "valid": 217_646, "test": 245_569}


@pytest.mark.parametrize("name", ["enwik8_slice", "text8_slice"])
def test_slices(name: str) -> None:
    folder = shared(name)
    data = prepare("files", folder, numbering="appearance")
    for split, count in data.summary()["tokens"].items():
        text = (folder / f"{split}.txt").read_bytes()
        assert data.vocabulary.decode(data.tokens(split)[:]) == text + b"\n" * (count - len(text))
        assert count == len(text) + (not text.endswith(b"\n"))
    assert name != "text8_slice" or data.vocabulary.size == 28


def test_default_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    from allattn.data import default_data_dir

    monkeypatch.delenv("ALLATTN_DATA_DIR")
    assert default_data_dir() == Path(os.path.expanduser("~")) / ".cache" / "allattn"


def test_types_are_public(tmp_path: Path) -> None:
    data = prepare("files", write_texts(tmp_path / "texts", b"abc\n"))
    assert isinstance(data, Dataset) and isinstance(data.tokens("train"), Tokens)
    assert json.loads(json.dumps(data.summary()))["dataset"] == data.name == "files"


@pytest.mark.usefixtures("own_data_dir")
def test_no_remarks_of_the_library(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A notebook shows no warning about what is as it should be."""
    for split in ("train", "valid", "test"):
        (tmp_path / f"{split}.txt").write_text("a\n" * 9)
    with caplog.at_level("WARNING"):
        prepare("files", tmp_path)
    assert not [record for record in caplog.records if record.name == "absl"]
