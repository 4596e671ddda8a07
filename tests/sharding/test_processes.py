"""Several processes on this machine, over gloo: the numbers of one, and an end with a message for
all.

Dimension key: B row of the batch.
"""

import json
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from command_line import Result, call, flags, trainer
from several_processes import (
    RUN,
    Processes,
    expect,
    free_port,
    prepared_texts,
    train,
    wait_for,
)

from allattn import data
from allattn.storage.checkpoint import Checkpointer
from benchmarks.processes import at_once

pytestmark = pytest.mark.usefixtures("own_data_dir")


def losses(workdir: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["nll"] for row in rows if "nll" in row}


COPY = """
from allattn.storage.checkpoint import Checkpointer
from allattn.train import start
restore = start.restore
def restore_and_copy(program, checkpoints):
    state, context_length = restore(program, checkpoints)
    with Checkpointer({place!r}) as copies:
        arrays = (state.params, state.optimizer, state.cache)
        copies.save(int(state.step), *arrays, program.meta(state, context_length))
    return state, context_length
start.restore = restore_and_copy
"""


def arrays(texts: Path, workdir: Path, step: int) -> tuple[Any, Any, Any]:
    """All arrays of a checkpoint, read by this process."""
    with Checkpointer(workdir, create=False) as checkpoints:
        state = trainer(texts, **RUN).abstract_state(checkpoints.restore_meta(step)["bucket"])
        return checkpoints.restore(state.params, state.optimizer, state.cache, step)


def test_killed_and_resumed_on_other_meshes(tmp_path: Path) -> None:
    """2 processes x 4 devices are killed and resume as 4 x 2 and as 1 x 8: the losses of one
    process and one device; of several only process 0 says something.

    What 4 x 2 restore and save at once is, read by one process, what 2 x 4 saved, bit for bit.
    """
    texts = prepared_texts(tmp_path)
    workdir = tmp_path / "run"
    other = tmp_path / "other"
    saved = 8
    # The run that is killed.
    endless = {"train__steps": 100_000, "checkpoint__keep": 1000}
    with train(texts, workdir, 2, 4, mesh__fsdp=2, mesh__tensor=2, **endless) as first:
        wait_for(workdir, f"checkpoints/{saved}/checksums.json")
        first.send(signal.SIGKILL)
        first.results()
    # As if it had been killed at once: what follows has the same programs every time.
    for path in (workdir / "checkpoints").iterdir():
        if path.name.isdecimal() and int(path.name) > saved:
            shutil.rmtree(path)
    shutil.copytree(workdir, other)

    # Runs that resume, and one that was never interrupted.
    whole = {"train__steps": saved + 3}
    copy = COPY.format(place=str(tmp_path / "copy"))
    with (
        train(texts, workdir, 4, 2, before=lambda _: copy, mesh__fsdp=4, **whole) as second,
        train(texts, other, 1, 8, **whole) as third,
    ):
        results = [*second.results(), *third.results()]
    for result in results:
        assert result.code == 0, result.err[-2000:]
    alone = call("train", f"--workdir={tmp_path}/alone", *flags(texts, **RUN, **whole))

    # They are the same.
    assert [result.out for result in results[1:4]] == [""] * 3
    scores = [result.last() for result in (alone, results[0], results[4])]
    assert [score["step"] for score in scores] == [saved + 3] * 3
    same = (arrays(texts, place, saved) for place in (workdir, tmp_path / "copy"))
    jax.tree.map(np.testing.assert_array_equal, *same)
    expected = losses(tmp_path / "alone")
    assert list(expected) == list(range(1, saved + 4))
    for resumed in (workdir, other):
        found = losses(resumed)
        assert {step: found[step] for step in expected} == pytest.approx(expected, rel=2e-5)


TRACED = """
import jax
jax.profiler.start_trace = lambda folder: print("traced")
jax.profiler.stop_trace = lambda: None
"""


class Stopped(NamedTuple):
    """A run of two processes, of which one was told to end."""

    texts: Path
    workdir: Path
    results: list[Result]
    step: int

    def resumed(self, workdir: Path) -> tuple[Result, int]:
        """What a copy says that goes on in this process, and the step at which it is complete."""
        shutil.copytree(self.workdir, workdir)
        data.prepare("files", self.texts, numbering="appearance")
        # A program knows the last step, so few numbers make few programs to compile.
        last = 50 * (1 + self.step // 50)
        changes = {**RUN, "train__steps": last, "checkpoint__every": 100_000}
        return call("train", f"--workdir={workdir}", *flags(self.texts, **changes)), last


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Stopped:
    """2 processes x 2 devices; SIGTERM to process 1 after some steps."""
    folder = tmp_path_factory.mktemp("stopped")
    workdir = folder / "run"
    changes = {"train__steps": 100_000, "checkpoint__every": 100_000, "train__profile": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(folder / "prepared"))
        texts = prepared_texts(folder)
        with train(
            texts, workdir, 2, 2, mesh__tensor=2, before=lambda _: TRACED, **changes
        ) as both:
            wait_for(workdir, "metrics.jsonl", lambda path: path.read_text().count("\n") >= 2)
            both.running[1].send_signal(signal.SIGTERM)
            results = both.results()
    (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    return Stopped(texts, workdir, results, step)


def test_a_machine_that_is_taken_away(stopped: Stopped, tmp_path: Path) -> None:
    """SIGTERM to one of two processes: both save and exit with 75; the run resumes; only process 0
    writes logs.
    """
    line = f"stopped at step {stopped.step} by SIGTERM or SIGHUP; run again to resume"
    for result in stopped.results:
        assert (result.code, result.err.strip().splitlines()[-1]) == (75, f"allattn: {line}")
    assert stopped.results[1].out == "" and len(list(stopped.workdir.glob("events*"))) == 1
    result, last = stopped.resumed(tmp_path / "run")
    assert result.code == 0 and result.last()["step"] == last
    assert sorted(losses(tmp_path / "run")) == list(range(1, last + 1))


# One process handles the same signals in tests/train/test_stopping.py.
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGHUP, 75)])
def test_other_signals(tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Ctrl-C or SIGHUP to one of two processes: both save, at the same step; the one that Ctrl-C
    came to ends with 130.
    """
    changes = {"train__steps": 100_000, "checkpoint__every": 100_000}
    workdir = tmp_path / "run"
    with train(prepared_texts(tmp_path), workdir, 2, 1, **changes) as both:
        wait_for(workdir, "metrics.jsonl", lambda path: path.read_text().count("\n") >= 2)
        both.running[1].send_signal(number)
        results = both.results()
    (step,) = [int(path.name) for path in (workdir / "checkpoints").iterdir()]
    assert [result.code for result in results] == [75, code]
    assert all(f"stopped at step {step}" in result.err for result in results)


def test_different_configurations(tmp_path: Path) -> None:
    texts = prepared_texts(tmp_path)
    workdir = tmp_path / "run"
    with train(
        texts, workdir, 3, 1, each=lambda i: {"seed": int(i == 2), "train__batch": 6}
    ) as three:
        found = "process 2 has another configuration than process 0: seed: 0 on process 0, 1 there"
        expect(three.results(), 2, f"allattn: {found}")
    assert not workdir.exists()


def together(words: Any) -> list[Result]:
    """Two processes, each with words of its own beside the coordinator."""

    def all_words(i: int, started: Processes) -> list[str]:
        return [*words(i), f"--coordinator=localhost:{started.port}", f"--process={i}"]

    with Processes(2, 1, all_words) as two:
        return two.results(60)


def test_different_commands(tmp_path: Path) -> None:
    shared = [f"--workdir={tmp_path}/run", "--processes=2"]
    results = together(
        lambda i: [("train", "evaluate")[i], *shared, *(flags(tmp_path) if i == 0 else [])]
    )
    found = "evaluate by 2 processes instead of train by 2 processes"
    expect(results, 2, f"allattn: process 1 has another command than process 0: {found}")


# One comparison finds this and other commands: test_different_commands.
@pytest.mark.slow
def test_different_numbers_of_processes(tmp_path: Path) -> None:
    results = together(lambda i: ["evaluate", f"--workdir={tmp_path}/run", f"--processes={2 + i}"])
    found = "evaluate by 3 processes instead of evaluate by 2 processes"
    expect(results, 2, f"allattn: process 1 has another command than process 0: {found}")


def test_different_texts(tmp_path: Path) -> None:
    """Each process may have its data in a place of its own, but they must be the same data."""
    texts = [prepared_texts(tmp_path), tmp_path / "other"]
    shutil.copytree(*texts)
    (texts[1] / "valid.txt").write_bytes((texts[0] / "valid.txt").read_bytes()[::-1])
    data.prepare("files", texts[1], numbering="appearance")
    with train(
        texts[0], tmp_path / "run", 2, 1, each=lambda i: {"dataset__data_dir": texts[i]}
    ) as two:
        results = two.results()
    line = results[0].err.strip().splitlines()[-1]
    name = r"files/byte-\w+/1.0.0"
    assert re.fullmatch(
        rf"allattn: process 1 has another data set than process 0: {name} instead of {name}", line
    )
    expect(results, 2, line)
    assert not (tmp_path / "run").exists()


def test_a_mistake_of_one_process_alone(tmp_path: Path) -> None:
    """The others do not wait for it: all end at once, with one line."""
    texts = prepared_texts(tmp_path)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    with train(
        texts, tmp_path / "run", 2, 1, each=lambda i: {"dataset__data_dir": (texts, nothing)[i]}
    ) as two:
        results = two.results(60)
    line = results[0].err.strip().splitlines()[-1]
    assert (
        line.startswith("allattn: process 1 has another data set than process 0: ")
        and "train.txt" in line
    )
    expect(results, 2, line)


# Data that one process cannot read end in the same way: test_a_mistake_of_one_process_alone.
@pytest.mark.slow
def test_data_that_are_damaged_on_one_process(tmp_path: Path) -> None:
    texts = prepared_texts(tmp_path)
    prepared = tmp_path / "prepared"
    other = tmp_path / "other"
    shutil.copytree(prepared, other)
    next(other.rglob("*test*record*")).unlink()
    own = f"import os; os.environ['ALLATTN_DATA_DIR'] = '{other}'"
    with train(texts, tmp_path / "run", 2, 1, before=lambda i: own if i else "") as two:
        results = two.results(60)
    line = results[0].err.strip().splitlines()[-1]
    assert line.startswith(
        f"allattn: process 1 has another data set than process 0: {other}/files/"
    )
    assert "is damaged" in line
    expect(results, 2, line)
    assert not (tmp_path / "run").exists()


SILENT = """
from allattn import errors
from allattn.storage import paths
def silent(folder):
    raise errors.RunError("gs://texts: expected an answer")
paths.is_whole = silent
"""


def test_a_bucket_that_fails_one_process(tmp_path: Path) -> None:
    """A storage bucket does not answer one of the processes.

    All end with the exit code on which a launcher tries again.
    """
    with train(
        prepared_texts(tmp_path), tmp_path / "run", 2, 1, before=lambda i: SILENT if i else ""
    ) as two:
        results = two.results(60)
    line = results[0].err.strip().splitlines()[-1]
    assert (
        "process 1 has another data set than process 0: "
        "gs://texts: expected an answer instead of files/" in line
    )
    expect(results, 1, line)


ALONE = """
from allattn import errors
from allattn.sharding import processes
from allattn.train import start
processes.FINISH_TIMEOUT_MS = 1000
def refuse(*_):
    raise errors.UserError("alone")
start.restore = refuse
"""


@pytest.mark.parametrize("number", [0, 1])
def test_a_mistake_unknown_to_the_others(tmp_path: Path, number: int) -> None:
    """One process makes a mistake of which the others do not learn.

    The process that met it says so at once and keeps its exit code; the other ends as soon as it
    misses it.
    """
    before = {number: ALONE}
    with train(
        prepared_texts(tmp_path), tmp_path / "run", 2, 1, before=lambda i: before.get(i, "")
    ) as two:
        results = two.results(60)
    alone = results[number]
    other = results[1 - number]
    assert (alone.code, alone.err.strip().splitlines()[-1]) == (2, "allattn: alone") and other.code


def test_a_mistake_that_process_0_finds(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with train(tmp_path / "texts", tmp_path / "run", 2, 1) as two:
        results = two.results()
    line = results[0].err.strip().splitlines()[-1]
    assert "train.txt" in line
    expect(results, 2, line)


def test_workdir_that_is_not_shared(tmp_path: Path) -> None:
    texts = prepared_texts(tmp_path)

    def words(i: int, started: Processes) -> list[str]:
        place = [f"--coordinator=localhost:{started.port}", "--processes=2", f"--process={i}"]
        return ["train", f"--workdir={tmp_path}/run{i}", *flags(texts), *place]

    with Processes(2, 1, words) as two:
        there = f"{tmp_path}/run1/checkpoints"
        here = f"{tmp_path}/run0/checkpoints"
        line = f"allattn: process 1 has another workdir than process 0: {there} instead of {here}"
        expect(two.results(), 2, line)


def test_a_process_that_never_comes(tmp_path: Path) -> None:
    """Process 0 of 2 without the other, and process 1 without a coordinator: a message and exit
    code 1, in time.
    """

    def words(i: int, started: Processes) -> list[str]:
        place = [
            f"--coordinator=localhost:{free_port()}",
            "--processes=2",
            f"--process={i}",
            "--wait=1",
        ]
        return ["train", "--config=configs/demo.py", f"--workdir={tmp_path}/run", *place]

    began = time.monotonic()
    with Processes(2, 1, words) as strangers:
        for i, result in enumerate(strangers.results(60)):
            assert result.code == 1 and not (tmp_path / "run").exists()
            assert result.err.startswith(
                f"allattn: process {i} of 2: expected all processes at the coordinator at local"
            )
            assert result.err.count("\n") == 1
    assert time.monotonic() - began < 60


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ("--coordinator=localhost", "--processes=2", "--process=0"),
            "--coordinator: expected HOST:PORT, found 'loc",
        ),
        (
            ("--processes=2", "--process=0"),
            "expected --coordinator, --processes and --process together, or",
        ),
        (
            ("--coordinator=a:1", "--processes=2", "--process=2"),
            "--process: expected a number from 0 to --processes",
        ),
    ],
)
def test_flags_that_do_not_go_together(tmp_path: Path, words: tuple[str, ...], line: str) -> None:
    done = call("train", "--config=configs/demo.py", f"--workdir={tmp_path}/run", *words)
    assert done.code == 2
    assert done.err.startswith(f"allattn: {line}") and done.err.count("\n") == 1


def test_process_0_says_where_it_runs_and_traces(stopped: Stopped, tmp_path: Path) -> None:
    """The other says nothing; a run that resumes says at which step."""
    first, second = stopped.results
    result, _ = stopped.resumed(tmp_path / "run")
    size = json.loads((tmp_path / "run" / "scores.json").read_text())["parameters"]
    rest = f"reference, {size:,} parameters"
    line = f"2 processes, 4 cpu devices (mesh data 2 x fsdp 1 x tensor 2), {rest}; from step 0"
    assert first.out.splitlines()[0] == line and size > 1000
    assert first.out.count("traced\n") == 1 and second.out == ""
    line = f"1 process, 1 cpu device (mesh data 1 x fsdp 1 x tensor 1), {rest}"
    assert result.out.startswith(f"{line}; resumes at step {stopped.step}\n")


ROWS = """
import sys
import jax, numpy as np
from jax.sharding import AxisType, Mesh
from allattn.sharding import processes
from allattn import sharding
processes.start(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1, 1)
rows = sharding.Rows(Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * 3), 8)
assert rows.local.tolist() == ([0, 1, 4, 5], [2, 3, 6, 7])[jax.process_index()]
placed_B = rows.place(10 * rows.local)
for shard in placed_B.addressable_shards:
    assert np.asarray(shard.data).tolist() == [10 * i for i in range(8)[shard.index[0]]], shard
processes.stop(0)
"""


def test_rows_of_a_process_with_others_between() -> None:
    """On a mesh that takes the devices of two processes in turn, each reads its own rows and they
    land in place.
    """
    with Processes(2, 2, lambda i, started: [i, started.port], code=lambda _: ROWS) as two:
        assert [result.code for result in two.results()] == [0, 0]


BENCHMARK = "from benchmarks import processes; processes.main()"
SMALL = ["--config.model.depth=1", "--config.model.width=64", "--config.model.persistent=64"]
SMALL += ["--config.train.block=32", "--config.model.span.limit=32", "--steps=1"]


@pytest.mark.skipif(sys.platform != "linux", reason="CPU seconds of threads are read from Linux")
@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_work_per_process(count: int) -> None:
    """No process has more to do where there are more processes.

    Processes that launch/local.sh starts train together, 8 rows each: the program of each has the
    FLOPs of one by itself.
    """
    words = ["--processes=1", "--alone", *SMALL]
    with Processes(1, 1, lambda *_: words, code=lambda _: BENCHMARK) as one:
        (done,) = one.results()
    alone = json.loads(done.out.splitlines()[-1])["flops"]
    assert alone > 1e5
    assert at_once(count, SMALL)["flops"] == pytest.approx(alone, rel=1e-3)
