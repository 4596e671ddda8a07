"""Where the texts come from: files placed by hand, archives, the standard library; missing and
damaged ones.
"""

import dataclasses
import hashlib
import lzma
import zipfile
from pathlib import Path

import pytest

from allattn.data import Vocabulary, prepare
from allattn.data.sources import standard_library
from allattn.errors import UserError

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


def test_standard_library() -> None:
    data = prepare("stdlib")
    summary = data.summary()["tokens"]
    text = standard_library()
    assert data.vocabulary.size == 256 and "python3." in str(data.path)
    assert prepare("stdlib", numbering="appearance").vocabulary.size <= 96
    assert 99_999 <= summary["valid"] <= 100_001 and 99_999 <= summary["test"] <= 100_001
    assert summary["train"] >= 700_000
    assert data.vocabulary.decode(data.tokens("test")[:]).startswith(text[-100_000:])


def test_standard_library_leaves_out(tmp_path: Path) -> None:
    kept = {"a.py": b"a", "b/c.py": b"c", "b-c.py": b"-", "latest.py": b"l"}
    dropped = (
        "test/x.py",
        "b/tests/x.py",
        "idlelib/idle_test/x.py",
        "site-packages/x.py",
        "__pycache__/x.py",
        "config-3/x.py",
        "_sysconfigdata_linux.py",
        "x.txt",
    )
    for name in (*kept, *dropped, "accent.py", "feed.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(kept.get(name, b"X") * 300_000)
    (tmp_path / "accent.py").write_bytes("é".encode())
    (tmp_path / "feed.py").write_bytes(b"\x0c")
    assert (
        standard_library(tmp_path)
        == b"a" * 300_000 + b"-" * 300_000 + b"c" * 300_000 + b"l" * 300_000
    )
    with pytest.raises(UserError, match="holds 0 bytes of source text"):
        standard_library(tmp_path / "site-packages" / "nothing")


@pytest.fixture
def small_enwik8(monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A text of 1,000 bytes in the place of enwik8."""
    from allattn.data.builders import Enwik8

    text = bytes(range(97, 107)) * 99 + b"\nabcdefghi"
    members = {"enwik8": (f"md5:{hashlib.md5(text).hexdigest()}", len(text))}
    monkeypatch.setattr(
        Enwik8, "corpus", dataclasses.replace(Enwik8.corpus, members=members, urls=())
    )
    monkeypatch.setattr(Enwik8, "sizes", (900, 50, 50))
    monkeypatch.setattr(Enwik8, "expected_size", None)
    return text


def zipped(path: Path, name: str, text: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, text)
    return path


@pytest.mark.parametrize("accepted", ["enwik8", "enwik8.zip", "downloads"])
def test_enwik8_by_hand(accepted: str, small_enwik8: bytes, tmp_path: Path, home: Path) -> None:
    manual = tmp_path / "manual"
    manual.mkdir()
    if accepted == "enwik8":
        (manual / "enwik8").write_bytes(small_enwik8)
    else:
        zipped(
            (manual if accepted == "enwik8.zip" else home / "downloads") / "enwik8.zip",
            "enwik8",
            small_enwik8,
        )
    data = prepare("enwik8", manual_dir=None if accepted == "downloads" else manual)
    assert data.summary()["tokens"] == {"train": 901, "valid": 51, "test": 51}
    assert data.vocabulary.decode(data.tokens("test")[:]) == small_enwik8[-50:] + b"\n"


def test_enwik8_bad_sources(
    small_enwik8: bytes, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("allattn.data.download.time.sleep", lambda seconds: None)
    manual = tmp_path / "manual"
    manual.mkdir()
    with pytest.raises(
        UserError, match=r"enwik8: no enwik8, and no enwik8\.zip, in .*manual.*--manual_dir=DIR"
    ):
        prepare("enwik8", manual_dir=manual)
    with pytest.raises(UserError, match=r"could not download enwik8\.zip .*--manual_dir=DIR"):
        prepare("enwik8")
    (manual / "enwik8").write_bytes(small_enwik8[:-1])
    with pytest.raises(
        UserError,
        match=r"enwik8 is damaged: expected md5:\w+ \(1000 bytes\), found md5:\w+ \(999 bytes\)",
    ):
        prepare("enwik8", manual_dir=manual)
    (manual / "enwik8").unlink()
    whole = zipped(manual / "enwik8.zip", "enwik8", small_enwik8)
    whole.write_bytes(whole.read_bytes()[:-30])
    with pytest.raises(
        UserError, match=r"enwik8\.zip is not a whole zip archive \(\d+ bytes found\)"
    ):
        prepare("enwik8", manual_dir=manual)
    zipped(whole, "other", b"")
    with pytest.raises(UserError, match=r"enwik8\.zip holds no enwik8"):
        prepare("enwik8", manual_dir=manual)
    body = bytearray(zipped(whole, "enwik8", small_enwik8).read_bytes())
    body[50] ^= 255
    whole.write_bytes(body)
    with pytest.raises(UserError, match=r"not a whole zip archive|is damaged"):
        prepare("enwik8", manual_dir=manual)
    assert not list(home.rglob("dataset_info.json"))


@pytest.fixture
def small_wikitext(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Three short texts in the place of WikiText-103's."""
    from allattn.data.builders import Wikitext103

    texts = {"train": b" \n = a b = \n \n a <unk> \n", "valid": b" \n a zebra \n", "test": b" b \n"}
    members = {
        f"wikitext-103/wiki.{split}.tokens": (f"sha1:{hashlib.sha1(text).hexdigest()}", None)
        for split, text in texts.items()
    }
    monkeypatch.setattr(
        Wikitext103, "corpus", dataclasses.replace(Wikitext103.corpus, members=members)
    )
    monkeypatch.setattr(Wikitext103, "expected_size", 5)
    monkeypatch.setattr(Wikitext103, "expected_tokens", {"train": 10, "valid": 4, "test": 2})
    return texts


@pytest.mark.parametrize("layout", ["flat", "folder", "zip"])
def test_wikitext103_by_hand(layout: str, small_wikitext: dict[str, bytes], tmp_path: Path) -> None:
    manual = tmp_path / "manual"
    folder = manual / "wikitext-103" if layout == "folder" else manual
    folder.mkdir(parents=True)
    with zipfile.ZipFile(manual / "wikitext-103-v1.zip", "w") as archive:
        for split, text in small_wikitext.items():
            archive.writestr(f"wikitext-103/wiki.{split}.tokens", text)
    if layout != "zip":
        (manual / "wikitext-103-v1.zip").unlink()
        for split, text in small_wikitext.items():
            (folder / f"wiki.{split}.tokens").write_bytes(text)
    data = prepare("wikitext103", manual_dir=manual)
    assert data.vocabulary.decode(data.tokens("valid")[:]) == b"\na <unk>\n"


def test_wikitext103_bad_sources(
    small_wikitext: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from allattn.data.builders import Wikitext103

    manual = tmp_path / "manual"
    manual.mkdir()
    for split in ("train", "valid"):
        (manual / f"wiki.{split}.tokens").write_bytes(small_wikitext[split])
    with pytest.raises(UserError, match=r"no wiki\.test\.tokens, and no wikitext-103-v1\.zip, in "):
        prepare("wikitext103", manual_dir=manual)
    (manual / "wiki.test.tokens").write_bytes(small_wikitext["test"])
    monkeypatch.setattr(Wikitext103, "expected_tokens", {"valid": 5})
    with pytest.raises(UserError, match="expected 5 valid tokens, found 4"):
        prepare("wikitext103", manual_dir=manual)
    monkeypatch.setattr(Wikitext103, "expected_size", 6)
    with pytest.raises(UserError, match="expected a vocabulary of 6, found 5"):
        prepare("wikitext103", manual_dir=manual)


def test_published_wikitext103_token_counts() -> None:
    from allattn.data.builders import Wikitext103
    from allattn.data.sources import Text

    folder = shared("wikitext103_eval")
    for split in ("valid", "test"):
        text = Text(folder / f"wiki.{split}.tokens")
        text.check(*Wikitext103.corpus.members[f"wikitext-103/wiki.{split}.tokens"])
        vocabulary = Vocabulary.from_text(text, "word")
        assert vocabulary.encode(text.path.read_bytes()).size == Wikitext103.expected_tokens[split]


def test_text8_sized_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first 10 MB of a text like text8, through text8's own builder."""
    from allattn.data.builders import Text8

    with lzma.open(shared("wiki100m") / "wiki100m.txt.xz") as file:
        text = file.read(10_000_000)
    (tmp_path / "text8").write_bytes(text)
    members = {"text8": (f"md5:{hashlib.md5(text).hexdigest()}", len(text))}
    monkeypatch.setattr(Text8, "corpus", dataclasses.replace(Text8.corpus, members=members))
    monkeypatch.setattr(Text8, "sizes", (9_000_000, 500_000, 500_000))
    data = prepare("text8", manual_dir=tmp_path)
    assert data.vocabulary.size == 28
    assert data.summary()["tokens"] == {"train": 9_000_001, "valid": 500_001, "test": 500_001}
