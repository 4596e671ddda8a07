"""`--text`: from a messy text of one's own to scores and samples, in every unit."""

import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import TINY, Result, call

import allattn
from allattn.config import from_json, to_json

# Both line ends, an empty line, a byte order mark, NUL, four-byte characters, and an end that the
# beginning has not.
MESSY = (
    "\ufeffthe quick brown fox\r\n\r\n\x00jumps over \U0001f600 the lazy dog\nand back again\n"
    * 120
    + "Zebras! \u00e9\n" * 9
).encode()
RUN = {name: value for name, value in TINY.items() if not name.startswith("dataset.")}
RUN |= {"train.block": 8, "train.steps": 6, "model.span.limit": 16, "evaluate.every": 6}


@pytest.fixture(autouse=True, scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all tests, as it keeps compiled programs too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(tmp_path_factory.mktemp("home")))
        yield Path(os.environ["ALLATTN_DATA_DIR"])


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "my.txt").write_bytes(MESSY)
    return tmp_path / "my.txt"


@pytest.fixture
def standard_input(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    def give(content: bytes) -> None:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    return give


def train(workdir: Path, *words: Any, **changes: Any) -> Result:
    """The tiny run on a text; a double underscore stands for a dot."""
    values = RUN | {name.replace("__", "."): value for name, value in changes.items()}
    fields = [f"--config.{name}={value}" for name, value in values.items()]
    return call("train", f"--workdir={workdir}", *fields, *words)


@pytest.mark.parametrize("unit", ["byte", "word", "bpe"])
def test_trains_on_a_messy_text(unit: str, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = train(run, f"--text={text}", dataset__unit=unit, dataset__vocab_size=300)
    assert trained.code == 0, trained.err
    scores = trained.last()
    assert f"score it: allattn evaluate --workdir={run}" in trained.out
    begun, _, done = trained.out.partition("\n")
    assert begun.startswith("preparing files in ") and done.startswith("prepared files: bytes, ")

    # Bits per byte, whatever a token is; of the training rows too.
    summary = call("data", f"--text={text}", f"--unit={unit}", "--vocab_size=300").last()
    for row, split in ((scores, "test"), (first_row(run), "train")):
        bytes_per_token = summary["bytes"][split] / summary["tokens"][split]
        assert row["bpc"] == pytest.approx(row["nll"] / math.log(2) / bytes_per_token)
    assert sum(summary["bytes"].values()) == len(MESSY)

    # From the checkpoint alone: the split, any text, a sample.
    assert call("evaluate", f"--workdir={run}").last() == pytest.approx(scores)
    (tmp_path / "other.txt").write_bytes("\x7f\u00fc never seen\r".encode() * 40)
    other = call("evaluate", f"--workdir={run}", f"--text={tmp_path}/other.txt").last()
    assert other["bpc"] > 0
    sample = call("generate", f"--workdir={run}", "--prompt=the \u00fc", "--length=5")
    assert sample.code == 0 and sample.out.startswith("the \u00fc")


def first_row(run: Path) -> dict[str, float]:
    return json.loads((run / "metrics.jsonl").read_text(encoding="utf8").splitlines()[0])


def test_text_of_a_pipe(
    text: Path, tmp_path: Path, home: Path, standard_input: Callable[[bytes], None]
) -> None:
    """It is kept, so that the run can be scored and resumed without the pipe."""
    standard_input(MESSY)
    first = train(tmp_path / "run", "--text=-")
    assert first.code == 0 and len(list((home / "texts").iterdir())) == 1
    standard_input(b"")
    assert call("evaluate", f"--workdir={tmp_path}/run").last() == pytest.approx(first.last())
    standard_input(MESSY)
    assert train(tmp_path / "run", "--text=-", train__steps=7).last()["step"] == 9
    assert train(tmp_path / "run", f"--text={text}", train__steps=7).last()["step"] == 9
    standard_input(MESSY[:700])
    assert call("evaluate", f"--workdir={tmp_path}/run", "--text=-").last()["tokens"] > 600


def test_text_in_the_python_api(text: Path) -> None:
    c = allattn.load_config("configs/demo.py", {"dataset.unit": "word"}, text=str(text))
    assert (c.dataset.name, c.dataset.data_dir, c.model.vocab_size) == ("files", str(text), 0)
    c = allattn.load_config("configs/demo.py", {"model.vocab_size": "99"}, text="my.txt")
    assert c.model.vocab_size == 99 and c.dataset.data_dir == str(Path("my.txt").resolve())
    c = allattn.load_config("configs/demo.py", text="gs://bucket/my.txt")
    assert c.dataset.data_dir == "gs://bucket/my.txt"


@pytest.mark.parametrize(
    ("content", "changes", "message"),
    [
        (b"", {}, "my.txt: expected a text of at least 100 bytes"),
        (MESSY[:900], {"train__block": 300}, "a row has 203 and needs 301"),
        (MESSY[:900], {}, "split valid: protocol authors: expected at least 72 tokens, found "),
        (MESSY, {"dataset__numbering": "order"}, "numbering must be one of value, appearance"),
        (MESSY, {"dataset__numbering": "appearance"}, "symbols; dataset.numbering=value has a sym"),
        (MESSY, {"dataset__min_count": -1}, "min_count"),
        (
            MESSY,
            {"dataset__unit": "word", "model__adaptive_io__cutoffs": "9,5000"},
            "between 0 and model.vocab_size",
        ),
    ],
)
def test_mistakes(
    content: bytes, changes: dict[str, Any], message: str, text: Path, tmp_path: Path
) -> None:
    text.write_bytes(content)
    found = train(tmp_path / "run", f"--text={text}", **changes)
    assert found.code == 2 and message in found.err.splitlines()[-1]
    assert found.err.count("allattn: ") == 1
    assert not (tmp_path / "run").exists()


def test_text_or_an_experiment(text: Path, tmp_path: Path) -> None:
    assert (
        "expected --config or --text, found neither"
        in call("train", f"--workdir={tmp_path}/run").err
    )
    assert "found an empty name" in train(tmp_path / "run", "--text=").err
    assert "expected --dataset or --text, found neither" in call("data").err
    assert "expected no --dataset" in call("data", f"--text={text}", "--dataset=enwik8").err


def test_old_configurations_keep_their_meaning() -> None:
    """One that was stored before dataset.numbering and min_count."""
    found = {}
    for name, unit in (("files", "byte"), ("files", "word"), ("enwik8", "byte")):
        values = json.loads(to_json(allattn.load_config("configs/base.py")))
        values["dataset"] = {"name": name, "data_dir": "", "unit": unit}
        dataset = from_json(json.dumps(values)).dataset
        found[name, unit] = (dataset.numbering, dataset.min_count)
    assert found == {
        ("files", "byte"): ("appearance", 1),
        ("files", "word"): ("value", 0),
        ("enwik8", "byte"): ("value", 1),
    }
