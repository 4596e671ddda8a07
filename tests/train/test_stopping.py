"""Runs that are stopped: by the machine (SIGTERM, SIGHUP), by Ctrl-C, before, in and beside the
loop.
"""

import functools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, call, flags, write_texts
from new_process import NewProcess

from allattn import data, signals, train
from allattn.errors import PreemptedError, StoppedByKeyboard
from allattn.sharding.processes import Preemption
from allattn.storage.checkpoint import Checkpointer
from allattn.train.jsonl import read_jsonl

# Waits for ever inside C, where Python calls no handler, and as the libraries do without the lock
# of the interpreter.
DEAF = """
import ctypes, sys
from pathlib import Path
from allattn import signals
from allattn.sharding.processes import Preemption
def wait():
    mutex = ctypes.create_string_buffer(64)
    Path(sys.argv[1]).touch()
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
with signals.ending_at_once():
"""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("stopping")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(folder / "prepared"))
        texts = write_texts(folder)
        data.prepare("files", texts, numbering="appearance")
        yield texts


def calls_first(number: int, original: Callable, action: Callable[[], Any]) -> Callable:
    """The function, before whose call of this number an action is taken."""
    count = 0

    def function(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            action()
        return original(*arguments)

    return function


def run(texts: Path, workdir: Path, **changes: Any) -> Result:
    changes = {"train__steps": 6, "train__finetune_steps": 0, "train__log_every": 4, **changes}
    return call("train", f"--workdir={workdir}", *flags(texts, **changes))


# --- in the loop


def test_stopped_in_the_loop(texts: Path, tmp_path: Path) -> None:
    """The step is saved and in the logs; the same command resumes, and no row is doubled."""
    step = calls_first(3, train.Trainer.step, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "step", step)
        found = run(texts, tmp_path / "run")
    line = "allattn: stopped at step 3 by Ctrl-C; run again to resume\n"
    assert (found.code, found.err) == (130, line)
    assert [row["step"] for row in read_jsonl(str(tmp_path / "run"))] == [3]
    assert run(texts, tmp_path / "run").last()["step"] == 6
    rows = read_jsonl(str(tmp_path / "run"))
    assert [row["step"] for row in rows if "nll" in row] == [3, 4, 6]


def test_stopped_while_it_evaluates(texts: Path, tmp_path: Path) -> None:
    """The step is saved without its score; resuming makes that evaluation, also of the last step,
    so that no score is missing and there is a best checkpoint.
    """
    # In the evaluation of step 4, in the same after resuming, and in the one after that.
    for number, step in ((1, 4), (1, 4), (2, 6)):
        stop = functools.partial(signal.raise_signal, signal.SIGTERM)
        with pytest.MonkeyPatch.context() as patch:
            evaluate = calls_first(number, train.Trainer.evaluate, stop)
            patch.setattr(train.Trainer, "evaluate", evaluate)
            found = run(texts, tmp_path / "run")
        assert found.code == 75 and f"stopped at step {step} by SIGTERM or SIGHUP" in found.err
    assert run(texts, tmp_path / "run").code == 0
    rows = [row for row in read_jsonl(str(tmp_path / "run")) if "dev_nll" in row]
    assert [row["step"] for row in rows] == [4, 6]
    with Checkpointer(str(tmp_path / "run"), create=False) as checkpoints:
        assert [checkpoints.score(row["step"]) for row in rows] == [row["dev_nll"] for row in rows]
        assert checkpoints.resolve("best") in (4, 6)


def test_stopped_before_the_first_step(texts: Path, tmp_path: Path) -> None:
    """Nothing is lost, and there is nothing to save."""
    fresh = calls_first(1, train.Trainer.fresh_state, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "fresh_state", fresh)
        found = run(texts, tmp_path / "run")
    assert found.code == 75 and "stopped at step 0 by SIGTERM or SIGHUP" in found.err


# --- in a program or a notebook


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_machine_taken_away(number: signal.Signals) -> None:
    """A closed terminal stops a run as SIGTERM does."""
    with pytest.raises(PreemptedError, match="^stopped by SIGTERM or SIGHUP; go on$"):
        with Preemption() as preemption:
            signal.raise_signal(number)
            assert preemption()
            raise PreemptedError("stopped", "go on")


def test_ctrl_c_in_a_notebook() -> None:
    """The first is noted and ends as a KeyboardInterrupt; a second one interrupts at once; then all
    is as before.
    """
    before = [signal.getsignal(number) for number in signals.STOPPING]
    with pytest.raises(StoppedByKeyboard, match="^stopped at step 7 by Ctrl-C; go on$") as caught:
        with Preemption() as preemption:
            assert not preemption()
            signal.raise_signal(signal.SIGINT)
            assert preemption()
            raise PreemptedError("stopped at step 7", "go on")
    assert isinstance(caught.value, KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt) as caught, Preemption():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert not isinstance(caught.value, StoppedByKeyboard)
    assert before == [signal.getsignal(number) for number in signals.STOPPING]


def test_commands_that_do_not_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C ends them without advice to resume."""

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "prepare", interrupted)
    found = call("data", "--dataset=stdlib")
    assert (found.code, found.err) == (130, "allattn: interrupted\n")


def test_other_threads_handle_no_signals() -> None:
    before = signal.getsignal(signal.SIGINT)
    found = []

    def enter() -> None:
        with signals.ending_at_once(), Preemption():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert found == [before]


def test_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As under nohup, which has a command ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.ending_at_once(), Preemption() as preemption:
            signal.raise_signal(signal.SIGHUP)
            assert not preemption()
    finally:
        signal.signal(signal.SIGHUP, before)


# --- at once


@pytest.mark.parametrize(
    ("body", "sent", "code", "name"),
    [
        ("    wait()", [signal.SIGTERM], 75, "SIGTERM"),
        ("    wait()", [signal.SIGINT], 130, "Ctrl-C"),
        ("    with Preemption(): wait()", [signal.SIGINT, signal.SIGINT], 130, "Ctrl-C"),
    ],
)
def test_ended_at_once(
    tmp_path: Path, body: str, sent: list[signal.Signals], code: int, name: str
) -> None:
    """By the first signal before the loop and by the second in it, wherever the main thread is."""
    process = NewProcess(DEAF + body, [tmp_path / "waits"])
    while not (tmp_path / "waits").exists():
        time.sleep(0.01)
    for number in sent:
        time.sleep(0.2)
        process.send_signal(number)
    found = process.result(20)
    process.kill()
    line = f"allattn: ended at once by {name}; run again to resume\n"
    assert (found.code, found.err) == (code, line)
