"""Several processes that score one checkpoint, and scoring that is interrupted."""

import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from command_line import call, flags
from several_processes import RUN, evaluate, expect, prepared_texts, train, wait_for

pytestmark = pytest.mark.usefixtures("own_data_dir")
LONG = 10_000  # repetitions of a text that make it take ten seconds to score, or longer


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run, by this process; its texts are beside it."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(folder / "prepared"))
        settings = flags(prepared_texts(folder), **RUN, train__steps=4)
        assert call("train", f"--workdir={folder}/run", *settings).code == 0
    return folder / "run"


# Both protocols on a mesh of one process: test_evaluation_on_a_mesh.
@pytest.mark.parametrize("protocol", ["authors", pytest.param("full", marks=pytest.mark.slow)])
def test_several_processes_score_a_checkpoint(trained: Path, protocol: str) -> None:
    """2 processes x 2 devices find what one finds, by the rows that each reads; only process 0 says
    it, and no more.
    """
    words = ("--split=valid", f"--protocol={protocol}")
    expected = call("evaluate", f"--workdir={trained}", *words)
    with evaluate(trained, 2, 2, *words) as both:
        results = both.results()
    assert [result.code for result in (expected, *results)] == [0, 0, 0], results[0].err[-2000:]
    found = results[0].last()
    score = expected.last()
    assert found == score | {
        name: pytest.approx(score[name], rel=1e-6) for name in ("nll", "bpc", "ppl")
    }
    assert [result.out.count("\n") for result in results] == [1, 0]


def refused(each: Any, workdir: Path) -> str:
    """The line with which two processes refuse to score."""
    with evaluate(workdir, 2, 1, each=each) as two:
        results = two.results(60)
    line = results[0].err.strip().splitlines()[-1]
    assert [(result.code, result.err.strip().splitlines()[-1]) for result in results] == [
        (2, line)
    ] * 2
    return line


def test_processes_with_different_splits(trained: Path) -> None:
    """Processes that would score different splits are refused."""
    line = refused(lambda i: [f"--split={('test', 'valid')[i]}"], trained)
    different = (
        r"authors, step 4, valid of (files/byte-\w+/1.0.0) instead of authors, step 4, test of \1"
    )
    assert re.fullmatch(f"allattn: process 1 has another task than process 0: {different}", line), (
        line
    )


@pytest.mark.parametrize("which", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_process_that_alone_would_score_a_text(trained: Path, which: int) -> None:
    text = f"--text={trained.parent}/texts/test.txt"
    line = refused(lambda i: [text] if i == which else [], trained)
    both = ["evaluate by 2 processes", "evaluate of a text by 2 processes"]
    expected = f"{both[which]} instead of {both[1 - which]}"
    assert line == f"allattn: process 1 has another command than process 0: {expected}"


def test_processes_with_different_texts(trained: Path, tmp_path: Path) -> None:
    """Processes that would score different texts are refused.

    Or none: a mistake of one of them ends both at once, with the one line.
    """
    texts = [tmp_path / "0.txt", tmp_path / "1.txt"]
    for i, text in enumerate(texts):
        text.write_bytes((trained.parent / "texts" / "test.txt").read_bytes() * (i + 1))
    line = refused(lambda i: [f"--text={texts[i]}"], trained)
    assert re.search(
        r"has another task than process 0: .*, text \w{16} instead of .*, text \w{16}$", line
    ), line
    texts[1].unlink()
    line = refused(lambda i: [f"--text={texts[i]}"], trained)
    missing = f"--text: expected a file or a folder of files, found none at {texts[1]}"
    assert f"another task than process 0: {missing} instead of" in line


def test_processes_with_different_checkpoints(trained: Path, tmp_path: Path) -> None:
    """Processes that would score different checkpoints are refused.

    Also of other parameters at the same step, or of none.
    """
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    line = refused(lambda i: [f"--workdir={(trained, other)[i]}"], trained)
    assert line.startswith(
        f"allattn: process 1 has another workdir than process 0: {other}/checkpoints instead of"
    )
    line = refused(lambda i: [f"--step={(4, 5)[i]}"], trained)
    assert (
        "another checkpoint than process 0: no checkpoint of step 5 in" in line
        and line.endswith("instead of 4")
    )
    line = refused(lambda i: ["--step=5"], trained)
    assert line.startswith("allattn: no checkpoint of step 5 in")


SCORING = """
from pathlib import Path
from allattn.evaluation import scoring
score_block = scoring.score_block
def tell_and_score(*arguments):
    Path({told!r}).touch()
    return score_block(*arguments)
scoring.score_block = tell_and_score
"""


def test_a_score_that_is_interrupted(trained: Path, tmp_path: Path) -> None:
    """SIGTERM to one of two processes that score: both end with 75."""
    (tmp_path / "long.txt").write_bytes(
        (trained.parent / "texts" / "valid.txt").read_bytes() * LONG
    )
    tell = SCORING.format(told=str(tmp_path / "scores"))
    with evaluate(trained, 2, 1, f"--text={tmp_path}/long.txt", before=tell) as two:
        wait_for(tmp_path, "scores")
        two.running[1].send_signal(signal.SIGTERM)
        results = two.results(60)
    expect(
        results,
        75,
        "allattn: stopped while scoring by SIGTERM or SIGHUP; run again to score",
    )


def test_a_process_stopped_while_it_scores(tmp_path: Path) -> None:
    """A single process is taken away while it scores.

    The state is saved without a score on dev.
    """
    texts = prepared_texts(tmp_path)
    workdir = tmp_path / "run"
    (texts / "valid.txt").write_bytes((texts / "valid.txt").read_bytes() * LONG)
    changes = {"train__steps": 100_000, "evaluate__every": 3, "checkpoint__every": 100_000}
    with train(texts, workdir, 1, 1, **changes) as run:
        wait_for(
            workdir, "metrics.jsonl", lambda path: path.read_text().count("\n") >= 3
        )  # written before scoring
        run.send(signal.SIGTERM)
        (result,) = run.results(60)
    assert result.code == 75 and "stopped at step 3" in result.err
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["3"]
