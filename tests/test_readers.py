"""Every reader of bytes from outside: it reads them, or refuses them with one line.

Nothing in a file runs, nothing is written, and memory stays bounded.
"""

import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import damage
import jax
import numpy as np
import pytest
from command_line import call, flags, write_texts
from etils import epath
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import geometry, random_params

from allattn import config, data, sweep
from allattn.attention import tuning
from allattn.data import Vocabulary
from allattn.data.sources import Text
from allattn.errors import UserError
from allattn.interchange import paper_checkpoints
from allattn.interchange.paper_state_dicts import SOURCES
from allattn.model import Model, ModelConfig
from allattn.plots import plot_curves
from allattn.train.jsonl import read_jsonl
from configs import base

MODEL = Model(geometry(depth=1, vocab_size=9))
TABLE = SOURCES["adaptive-span"]
ROWS = [{"step": 1, "nll": 2.5, "bpc": 3.6}, {"step": 1, "dev_nll": 2.6}, {"step": 2, "nll": None}]
SCORES = {
    "split": "test",
    "protocol": "authors",
    "step": 10,
    "nll": 2.1,
    "bpc": 3.0,
    "ppl": 8.2,
    "tokens": 300,
    "parameters": 5000,
    "trained_tokens": 640,
}
TEXT = b"one two\nthree\n\n\xc3\xa4 \xf0\x9f\x98\x80 <unk>\r\n"
BYTES = Vocabulary.from_text(TEXT)
WORDS = Vocabulary.from_text(TEXT, "word")


def npz() -> bytes:
    """A state dict of a tiny network as a file."""
    params = jax.tree.map(np.asarray, random_params(MODEL))
    state: dict[str, Any] = paper_checkpoints.to_theirs(params, TABLE.entries(MODEL.config))
    file = io.BytesIO()
    np.savez(file, **state)
    return file.getvalue()


def jsonl() -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def archive() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("texts/a.txt", TEXT * 50)
    return file.getvalue()


# --- what reads a file, and what it must have made of it -----------------------------------------


def read_npz(file: Path) -> None:
    """Parameters that are numbers."""
    state = paper_checkpoints._read(str(file), TABLE, MODEL)
    assert all(x.dtype == np.float32 and np.isfinite(x).all() for x in state.values())


def read_metrics(file: Path) -> list[int]:
    """The steps of the rows, in their order."""
    steps = [row["step"] for row in read_jsonl(str(file.parent))]
    assert steps == sorted(steps) and all(type(step) is int for step in steps)
    return steps


def read_scores(file: Path) -> dict[str, Any] | None:
    """Numbers that a table can be made of, or nothing, as of a run that has not ended."""
    job = sweep.Job(Path("x.py"), 0, epath.Path(file.parent))
    scores = sweep._scores(job)
    if scores:
        numbers = [scores[name] for name in ("step", "bpc", "ppl", "trained_tokens", "parameters")]
        assert all(math.isfinite(x) and not isinstance(x, bool) for x in numbers)
        assert sweep.Result(job, scores, [], "").tokens_per_step >= 0
    return scores


def read_archive(file: Path) -> None:
    text = Text(epath.Path(file), "texts/a.txt")
    assert all(len(chunk) <= 1 << 20 for chunk in text)


READERS: dict[str, tuple[Callable[[], bytes], str, Callable[[Path], Any]]] = {
    "npz": (npz, "x.npz", read_npz),
    "metrics": (jsonl, "metrics.jsonl", read_metrics),
    "scores": (lambda: json.dumps(SCORES).encode(), "scores.json", read_scores),
    "archive": (archive, "x.zip", read_archive),
}


@pytest.mark.parametrize("name", READERS)
@damage.both
def test_damaged_files(name: str, profile: settings, tmp_path: Path) -> None:
    make, file_name, read = READERS[name]
    content = make()
    file = tmp_path / file_name
    file.write_bytes(content)
    read(file)

    @given(damage.damaged(content))
    def reads(changed: bytes) -> None:
        file.write_bytes(changed)
        damage.refuses_or_reads(lambda: read(file))
        assert [path.name for path in tmp_path.iterdir()] == [file_name]

    damage.run(profile, reads)


# --- files that are something else ---------------------------------------------------------------


def a_folder(path: Path) -> None:
    path.mkdir()


def not_unicode(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")


def foreign(path: Path) -> None:
    path.write_text('[1]\n3\n{"nll": 2}\n{"step": "x"}\n{"step": 1e999}\nnull\n' + "[" * 90_000)


@pytest.mark.parametrize("make", [a_folder, not_unicode, foreign])
def test_logs_and_scores_that_are_none(make: Callable, tmp_path: Path) -> None:
    """A reader passes them over or names them; a run that has ended does not fail on them."""
    place = tmp_path / "run"
    place.mkdir()
    words = flags(write_texts(tmp_path), train__steps=0, train__finetune_steps=0)
    for name in ("metrics.jsonl", "scores.json"):
        make(place / name)
        assert read_jsonl(str(place)) == [] and plot_curves(place)._repr_png_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "prepared"))
        found = call("train", *words, f"--workdir={place}")
    # Where there is a folder no file can be written.
    if make is a_folder:
        assert found.code == 2 and "scores.json" in found.err and found.err.count("\n") == 1
        with pytest.raises(UserError, match="scores.json"):
            read_scores(place / "scores.json")
    else:
        assert found.code == 0 and json.loads((place / "scores.json").read_text())["step"] == 0


def test_a_bomb_in_an_archive(tmp_path: Path) -> None:
    """What a member announces is compared before any of it is unpacked, and zipfile stops there."""
    announced = (len(TEXT) * 50).to_bytes(4, "little")
    (tmp_path / "x.zip").write_bytes(archive().replace(announced, b"\xff\xff\xff\xf0"))
    with pytest.raises(UserError, match="expected at most 2147483648 bytes, found 4043309055"):
        read_archive(tmp_path / "x.zip")


def test_names_in_an_archive(tmp_path: Path) -> None:
    """Members are read by their names and never unpacked beside the archive."""
    inside = tmp_path / "inside"
    inside.mkdir()
    with zipfile.ZipFile(inside / "x.zip", "w") as opened:
        for name in ("../a.txt", "/a.txt", "texts/a.txt"):
            opened.writestr(name, TEXT)
    for member in ("../a.txt", "/a.txt", "texts/a.txt"):
        assert b"".join(Text(epath.Path(inside / "x.zip"), member)) == TEXT
    assert [path.name for path in tmp_path.rglob("*")] == ["inside", "x.zip"]


@damage.both
def test_damaged_prepared_data(
    profile: settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids are those that were prepared, or at least symbols of the vocabulary that is read."""
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "prepared"))
    texts = write_texts(tmp_path)
    files = {path: path.read_bytes() for path in data.prepare("files", texts).path.iterdir()}

    def read() -> None:
        dataset = data.prepare("files", texts)
        assert dataset.summary()["vocabulary"] == dataset.vocabulary.size
        for split in data.SPLITS:
            assert dataset.tokens(split)[:].max() < dataset.vocabulary.size

    @given(st.sampled_from(sorted(files)), st.data())
    def reads(path: Path, drawn: st.DataObject) -> None:
        path.write_bytes(drawn.draw(damage.damaged(files[path])))
        damage.refuses_or_reads(read)
        path.write_bytes(files[path])

    damage.run(profile, reads)


# --- JSON of another structure -------------------------------------------------------------------


@damage.both
def test_scores_of_another_structure(profile: settings, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"

    @given(damage.damaged_json(SCORES))
    def reads(changed: Any) -> None:
        file.write_text(json.dumps(changed))
        scores = damage.refuses_or_reads(lambda: read_scores(file))
        assert not scores or scores.items() <= changed.items()

    damage.run(profile, reads)


@damage.both
def test_metrics_of_another_structure(profile: settings, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"

    @given(st.lists(damage.damaged_json(ROWS[0]), max_size=4))
    def reads(rows: list[Any]) -> None:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        steps = damage.refuses_or_reads(lambda: read_metrics(file))
        written = [row["step"] for row in rows if isinstance(row, dict) and "step" in row]
        assert steps is not None and all(step in written for step in steps)

    damage.run(profile, reads)


@damage.both
def test_vocabularies_of_another_structure(profile: settings) -> None:
    """One that is read gives every symbol its number."""

    @given(damage.damaged_json(BYTES.to_json()) | damage.damaged_json(WORDS.to_json()))
    def reads(changed: Any) -> None:
        def read() -> None:
            vocabulary = Vocabulary.from_json(changed)
            ids = vocabulary.encode(vocabulary.decode(range(vocabulary.size)))
            assert vocabulary.unit == "word" or ids.tolist() == list(range(vocabulary.size))
            assert vocabulary.to_json().items() <= changed.items()

        damage.refuses_or_reads(read)

    damage.run(profile, reads)


@damage.both
def test_configurations_of_another_structure(profile: settings) -> None:
    """A network can be described from one that is read."""
    stored = json.loads(config.to_json(base.get_config()))

    @given(damage.damaged_json(stored))
    def reads(changed: Any) -> None:
        def read() -> None:
            found = config.from_json(json.dumps(changed))
            assert ModelConfig.from_config(found).depth == found.model.depth

        damage.refuses_or_reads(read)

    damage.run(profile, reads)


def test_a_configuration_is_strict_json() -> None:
    """Of a field that is NaN or infinite there is no JSON."""
    c = base.get_config()
    c.optimizer.clip = math.inf
    with pytest.raises(UserError, match=r"optimizer.clip: expected a finite number, found inf"):
        config.to_json(c)


@damage.both
def test_tables_of_tiles_of_another_structure(profile: settings) -> None:
    """Any call gets tiles from one that is read."""
    rows = tuning.TABLE[:2]
    sizes = {"T": 128, "L": 256, "N": 0, "K": 64}

    @given(damage.damaged_json(rows).map(json.dumps) | damage.damaged_text(json.dumps(rows)))
    def reads(text: str) -> None:
        def read() -> None:
            with mock.patch.object(tuning, "TABLE", tuning.read_table(text)):
                assert min(tuning.tiles("xla", **sizes)) > 0

        damage.refuses_or_reads(read)

    damage.run(profile, reads)


# --- prompts and texts ---------------------------------------------------------------------------


@pytest.mark.parametrize("vocabulary", [BYTES, WORDS], ids=["byte", "word"])
@damage.both
def test_any_bytes_are_a_text(vocabulary: Vocabulary, profile: settings) -> None:
    @given(st.binary(max_size=200) | damage.damaged(TEXT))
    def reads(text: bytes) -> None:
        ids = damage.refuses_or_reads(lambda: vocabulary.encode(text, close=True))
        assert ids is None or ids.size == 0 or 0 <= ids.min() <= ids.max() < vocabulary.size
        damage.refuses_or_reads(lambda: Vocabulary.from_text(text, vocabulary.unit))

    damage.run(profile, reads)
