"""What cannot be written ends a run in one line, and what was written before is still there.

Paths of any kind are in here, too: what is written under them can be read again.
"""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import command_line
import jax.numpy as jnp
import pytest
from comparison import assert_same
from test_checkpoint import abstract, save, trees

from allattn import sweep
from allattn.errors import RunError, UserError
from allattn.storage import paths
from allattn.storage.checkpoint import Checkpointer
from allattn.train import event_files, jsonl

# --- failures of writing -------------------------------------------------------------------------


def test_a_checkpoint_cannot_be_written(tmp_path: Path, small_files: None, capfd: Any) -> None:
    large = {"x": jnp.ones(1_000_000)}
    reason = f"{tmp_path}/checkpoints cannot be written: File too large"
    with pytest.raises(RunError, match=f"^{reason}$"):
        with Checkpointer(tmp_path) as checkpoints:
            save(checkpoints, 10)
            checkpoints.save(20, large, large, large["x"], {})
            save(checkpoints, 30)
    assert "Traceback" not in capfd.readouterr().err
    with Checkpointer(tmp_path) as checkpoints:
        assert_same(checkpoints.restore_newest(abstract)[:3], trees(10))
        save(checkpoints, 20)
        assert checkpoints.steps() == [10, 20]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk that takes one checkpoint of the tiny run, and not a second one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs the rights of root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk(small_disk: Path, tmp_path: Path, capfd: Any) -> None:
    """One line, exit code 1, and the last good checkpoint can be scored."""
    flags = command_line.flags(command_line.write_texts(tmp_path), evaluate__every=100)
    found = command_line.call("train", f"--workdir={small_disk / 'run'}", *flags)
    said = capfd.readouterr().err
    assert (found.code, "Traceback" in said) == (1, False), said
    # The rest is progress.
    last = found.err.splitlines()[-1]
    assert "No space" not in said + found.err.removesuffix(last + "\n")
    assert last.startswith(f"allattn: {small_disk}/run") and last.endswith(
        "No space left on device"
    )
    # One checkpoint or two have fitted before.
    assert command_line.call("evaluate", f"--workdir={small_disk / 'run'}").last()["step"] in (4, 8)


@pytest.mark.parametrize("writer", [jsonl.JsonlWriter, event_files.EventFileWriter])
def test_a_log_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: type
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(writer, "write_scalars", refuse)
    flags = command_line.flags(command_line.write_texts(tmp_path))
    found = command_line.call("train", f"--workdir={tmp_path}/run", *flags)
    line = f"allattn: {tmp_path}/run cannot be written: {os.strerror(errno.EDQUOT)}"
    assert (found.code, found.err.splitlines()[-1]) == (1, line)


def test_a_table_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"^{tmp_path}/gone cannot be written: No such file"):
        sweep.write(paths.epath.Path(tmp_path / "gone"), [])


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.ESTALE, errno.ENOTCONN])
@pytest.mark.parametrize("wrapped", [False, True])
def test_reasons_why_writing_fails(number: int, wrapped: bool) -> None:
    """As the system says them, and as TensorStore repeats them."""
    error: Exception = OSError(number, os.strerror(number))
    if wrapped:
        error = ValueError(f"UNKNOWN: Error writing /a/b: {os.strerror(number)} [source='x.cc']")
    with pytest.raises(RunError, match=f"^/a/b cannot be written: {os.strerror(number)}$"):
        with paths.written("/a/b"):
            raise error


# --- paths that look like something else ---------------------------------------------------------

NAMES = ["run [v2]", "[!a]", "a*b", "what?", "back\\slash", "new\nline", "%41 #1 é", "gs:", "~"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_pattern(tmp_path: Path, name: str) -> None:
    workdir = tmp_path / name
    with Checkpointer(workdir) as checkpoints:
        save(checkpoints, 10, 1.0)
    with Checkpointer(workdir, create=False) as checkpoints:
        assert checkpoints.resolve("sound") == checkpoints.resolve("best") == 10
        assert_same(checkpoints.restore(*abstract({})), trees(10))
    assert os.listdir(tmp_path) == [name] and os.listdir(workdir) == ["checkpoints"]


def test_a_bucket_whose_name_is_a_pattern() -> None:
    """A bucket has no links, so such a name is refused before anything is done."""
    with pytest.raises(
        UserError, match=r"workdir: expected a URL without .*found gs://b/run \[2\]"
    ):
        Checkpointer("gs://b/run [2]")


@pytest.mark.parametrize("name", ["run [v2]", "back\\slash\nand line"])
def test_a_run_under_any_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Trained, resumed, scored, sampled; its texts, its prepared data and its metrics read."""
    folder = tmp_path / name
    folder.mkdir()
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(folder / "prepared"))
    texts = command_line.write_texts(folder)
    workdir = f"--workdir={folder / 'run'}"
    for steps in (4, 8):
        flags = command_line.flags(texts, train__steps=steps, train__finetune_steps=0)
        done = command_line.call("train", workdir, *flags)
        assert done.code == 0, done.err
    assert command_line.call("evaluate", workdir).last() == done.last()
    assert command_line.call("generate", workdir, "--prompt=a", "--length=2").code == 0
    rows = jsonl.read_jsonl(str(folder / "run"))
    assert [row["step"] for row in rows if "nll" in row] == list(range(1, 9))
    assert os.listdir(tmp_path) == [name]
