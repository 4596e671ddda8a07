"""What a start in a workdir compares: everything that gives the numbers their meaning."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import Result, call, flags, trainer

import allattn
from allattn.attention import dropout
from allattn.storage.checkpoint import Checkpointer
from allattn.train import start

WORDS = {"dataset__unit": "word", "train__steps": 2, "train__finetune_steps": 0}


def write_words(folder: Path, order: str) -> Path:
    """Texts of four words, which are numbered in this order, the most frequent first."""
    folder.mkdir()
    words = [word for i, word in enumerate(order) for _ in range(200 - 40 * i)]
    for split in ("train", "valid", "test"):
        np.random.default_rng(len(split)).shuffle(words)
        lines = [" ".join(words[i : i + 8]) for i in range(0, len(words), 8)]
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of two steps, and texts of the same words in another order and in the same."""
    folder = tmp_path_factory.mktemp("start")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(folder / "prepared"))
        for name, order in (("texts", "abcd"), ("renumbered", "bacd")):
            write_words(folder / name, order)
        shutil.copytree(folder / "texts", folder / "other")
        (folder / "other" / "valid.txt").write_text("a b c d\n" * 100)
        assert run(folder / "run", folder / "texts").code == 0
        yield folder


def run(workdir: Path, texts: Path, **changes: object) -> Result:
    return call("train", f"--workdir={workdir}", *flags(texts, **{**WORDS, **changes}))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_other_numbers_of_the_symbols(place: Path) -> None:
    """Refused, by the first symbol that differs; nothing is overwritten."""
    before = contents(place / "run")
    found = run(place / "run", place / "renumbered", train__steps=4)
    assert found.code == 2
    line = "was made with another vocabulary: symbol 0 is 'a' in the workdir, 'b' now."
    assert line in found.err.splitlines()[-1] and contents(place / "run") == before


def test_other_text_of_a_complete_run(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is left to train, so its scores stay those of its text; a score of another warns."""
    before = contents(place / "run")
    found = run(place / "run", place / "other")
    assert found.code == 2 and "is complete, 2 of 2 steps: expected its text, files/" in found.err
    assert contents(place / "run") == before
    # The same folder with another text in it.
    scored = call("evaluate", f"--workdir={place / 'run'}", f"--data_dir={place / 'other'}")
    assert scored.code == 0 and "other text than this run was trained on" in caplog.text


def test_other_symbols_of_parameters_alone(place: Path, tmp_path: Path) -> None:
    """A converted workdir is refused likewise."""
    with Checkpointer(str(place / "run"), create=False) as checkpoints:
        meta = checkpoints.restore_meta() | {"params_only": True, "step": 0}
    with Checkpointer(str(tmp_path / "run")) as checkpoints:
        checkpoints.save_params(0, allattn.load(place / "run").params, meta)
    found = run(tmp_path / "run", place / "renumbered")
    assert found.code == 2 and "symbol 0 is 'a' in the workdir, 'b' now." in found.err


def test_other_symbols_of_a_warm_start(place: Path, tmp_path: Path) -> None:
    changes = {"train__init_from": place / "run"}
    found = run(tmp_path / "run", place / "renumbered", **changes)
    assert found.code == 2 and "found another: symbol 0 is 'a' there, 'b' here" in found.err


def test_other_text_in_the_same_symbols(place: Path, tmp_path: Path) -> None:
    """The user's choice, which a line tells."""
    shutil.copytree(place / "run", tmp_path / "run")
    found = run(tmp_path / "run", place / "other", train__steps=3)
    line = "other text than this run was trained on so far, in the same symbols: files/"
    assert found.code == 0 and line in found.out
    # From now on it is the text of this run.
    with Checkpointer(str(tmp_path / "run"), create=False) as checkpoints:
        assert f"{checkpoints.restore_meta()['dataset']} from now on\n" in found.out


@pytest.mark.parametrize("rate", [0.25, 0.0])
def test_another_mask_of_dropout(
    rate: float, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A run with dropout that an older version began says that it goes on with other draws."""
    by = trainer(place / "texts", **WORDS, model__embedding_dropout=rate)
    state, context_length = by.fresh_state()
    meta = by.meta(state, context_length)

    def told(name: str, **changes: Any) -> list[str]:
        """What a start says of a checkpoint whose meta has these changes."""
        with Checkpointer(str(tmp_path / name)) as checkpoints:
            arrays = (state.params, state.optimizer, state.cache)
            stored = {name: x for name, x in {**meta, **changes}.items() if x is not None}
            checkpoints.save(changes["step"], *arrays, stored)
            caplog.clear()
            assert start.restore(by, checkpoints) is not None
        return [line for line in caplog.messages if "dropout" in line]

    # Without the entry, as checkpoints were before masks were counted.
    line = (
        f"{tmp_path / 'older'}: dropout's mask was of generation 1 until step 1, and is of "
        f"generation {dropout.GENERATION} from now on: the same distribution, other draws"
    )
    assert told("older", step=1, dropout_mask=None) == [line] * bool(rate)
    assert told("same", step=1) == []
    # Nothing is left to train.
    assert told("complete", step=2, dropout_mask=None) == []
