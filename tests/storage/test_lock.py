"""One run at a time writes into a workdir; what a process has left that is gone does not count."""

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import pytest
from test_checkpoint import abstract, save

from allattn.errors import RunError, UserError
from allattn.storage import lock
from allattn.storage.checkpoint import Checkpointer


@pytest.fixture(autouse=True)
def short_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("BEAT", 0.05), ("WATCH", 0.5), ("SETTLE", 0.05)):
        monkeypatch.setattr(lock, name, seconds)


def write_lock(workdir: Path, **changes: Any) -> lock.Holder:
    """A lock as another process would have written it."""
    holder = dataclasses.replace(lock._this_process(), host="there", **changes)
    (workdir / lock.NAME).write_text(json.dumps(dataclasses.asdict(holder)))
    return holder


def dead_process() -> int:
    """The number of a process that is gone."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_second_run_is_refused(tmp_path: Path) -> None:
    """Before it clears away what the first is writing; and the next one may begin when it ends."""
    with Checkpointer(tmp_path) as first:
        # Orbax has cleared away what an earlier run left when the first save is done.
        save(first, 10)
        first.steps()
        half = first.folder / "30.orbax-checkpoint-tmp"
        half.mkdir()
        with pytest.raises(UserError, match=f"found process {os.getpid()} on .*--force"):
            Checkpointer(tmp_path)
        assert half.exists()
        Checkpointer(tmp_path, create=False).close()
        save(first, 20)
    assert not (tmp_path / lock.NAME).exists()
    Checkpointer(tmp_path).close()


@pytest.mark.parametrize("left", ["gone", "another has its number", "half a lock"])
def test_what_a_kill_leaves_is_taken_over(
    tmp_path: Path, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once, so that a launcher may start again."""
    monkeypatch.setattr(lock, "WATCH", 1000)
    if left == "gone":
        write_lock(tmp_path, process=dead_process())
    elif left == "another has its number":
        write_lock(tmp_path, began="1")
    else:
        (tmp_path / lock.NAME).write_text('{"host": ')
    Checkpointer(tmp_path).close()
    assert not (tmp_path / lock.NAME).exists()


def test_a_killed_trainer(tmp_path: Path) -> None:
    """A zombie does not hold the lock either."""
    code = "import os\nfrom allattn.storage.lock import WorkdirLock\n"
    code += (
        f"WorkdirLock({str(tmp_path)!r}).__enter__()\nprint(flush=True)\nos.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "PYTHONPATH": command_line.TEST_PATH}
    child = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert child.stdout.read() == b"\n"
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / lock.NAME).exists()
    Checkpointer(tmp_path).close()
    child.wait()


def test_a_dead_run_of_another_machine(tmp_path: Path, caplog: Any) -> None:
    """Its heartbeat is watched for a while, and a line says so."""
    write_lock(tmp_path, place="elsewhere")
    begin = time.monotonic()
    Checkpointer(tmp_path).close()
    assert time.monotonic() - begin > lock.WATCH
    assert "watching for 0.5 s whether process" in caplog.text


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[None]:
    """A run on another machine that is alive."""
    stop = threading.Event()

    def beat() -> None:
        holder = write_lock(tmp_path, place="elsewhere")
        while not stop.wait(0.02):
            holder = dataclasses.replace(holder, beat=holder.beat + 1)
            lock.paths.replace(lock.epath.Path(tmp_path / lock.NAME), json.dumps(vars(holder)))

    thread = threading.Thread(target=beat)
    thread.start()
    while not (tmp_path / lock.NAME).exists():
        time.sleep(0.01)
    yield
    stop.set()
    thread.join()


def test_a_living_run_of_another_machine(tmp_path: Path, elsewhere: None) -> None:
    with pytest.raises(UserError, match=f"{tmp_path}: expected no other .* on there, since"):
        Checkpointer(tmp_path)


def test_force(tmp_path: Path) -> None:
    """The run that lost its workdir writes nothing more, and leaves the other's lock alone."""
    with pytest.raises(RunError, match=f"{tmp_path} was taken over by process {os.getpid()}"):
        with Checkpointer(tmp_path) as first:
            save(first, 10)
            first.steps()
            with Checkpointer(tmp_path, force=True) as second:
                assert second.restore_newest(abstract)[-1]["step"] == 10
                save(second, 20)
                second.steps()
                with pytest.raises(RunError, match="was taken over"):
                    save(first, 30)
                    first.steps()
                assert json.loads((tmp_path / lock.NAME).read_text())["process"] == os.getpid()
                save(first, 30)
                first.close()
    with Checkpointer(tmp_path) as checkpoints:
        assert checkpoints.steps() == [10, 20]


def test_force_against_a_heartbeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heartbeat that had read the lock before it was taken over writes it once more."""
    monkeypatch.setattr(lock, "BEAT", 1000)
    holder = write_lock(tmp_path)
    replace = lock.paths.replace
    written = []

    def overtaken(path: Any, text: str) -> None:
        replace(path, text)
        written.append(text)
        if len(written) == 1:
            write_lock(tmp_path, token=holder.token, beat=1)

    monkeypatch.setattr(lock.paths, "replace", overtaken)
    with Checkpointer(tmp_path, force=True):
        assert json.loads((tmp_path / lock.NAME).read_text())["token"] != holder.token
    assert len(written) == 2


def test_two_take_over_by_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The later has it, and the earlier does not write again."""
    write_lock(tmp_path)
    monkeypatch.setattr(lock.paths, "replace", lambda path, text: write_lock(tmp_path, token="b"))
    with pytest.raises(UserError, match="expected no other run there"):
        Checkpointer(tmp_path, force=True)


def test_the_lock_on_the_command_line(tmp_path: Path, caplog: Any) -> None:
    flags = command_line.flags(command_line.write_texts(tmp_path), train__steps=1)
    workdir = tmp_path / "run"
    with Checkpointer(workdir):
        found = command_line.call("train", f"--workdir={workdir}", *flags)
        assert found.code == 2 and found.err.count("\n") == 1, found.err
        assert f"process {os.getpid()} on " in found.err
        with caplog.at_level(logging.ERROR):
            found = command_line.call("train", f"--workdir={workdir}", "--force", *flags)
        assert found.code == 0, found.err
