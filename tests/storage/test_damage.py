"""Damage to a checkpoint's files is noticed before they are read, whatever the damage and the file:
never a wrong number without a word, and nothing is deleted because it could not be read.
"""

import errno
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import command_line
import pytest
import several_processes
from comparison import assert_same
from test_checkpoint import abstract, fill, save, trees

from allattn.errors import RunError, UserError
from allattn.storage import checksums
from allattn.storage.checkpoint import Checkpointer

ITEMS = ("params", "optimizer", "cache", "meta", "metrics")


# --- what may happen to a file -------------------------------------------------------------------


def flip(file: Path) -> None:
    """Another value of one bit, at a random place that is the same in every run of the tests."""
    content = bytearray(file.read_bytes())
    bit = random.Random(f"{file.name} {len(content)}").randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def zero(file: Path) -> None:
    """As a power cut leaves it."""
    file.write_bytes(bytes(file.stat().st_size))


def empty(file: Path) -> None:
    file.write_bytes(b"")


def shorten(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def become_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES = (flip, zero, empty, shorten, os.unlink, become_folder)


# --- every file ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir with two checkpoints, the older the better one."""
    workdir = tmp_path_factory.mktemp("written")
    fill(workdir, {10: 1.0, 20: 2.0})
    return workdir


@pytest.fixture
def workdir(written: Path, tmp_path: Path) -> Path:
    """A copy of them, to be damaged."""
    return Path(shutil.copytree(written, tmp_path / "run"))


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_any_file_is_found(workdir: Path, damage: Callable[[Path], None]) -> None:
    """Arrays, Orbax's descriptions of them, meta, score, and the checksums themselves."""
    folder = workdir / "checkpoints" / "20"
    files = [file for file in files_of(folder) if file.stat().st_size]
    assert {file.relative_to(folder).parts[0] for file in files} >= {*ITEMS, checksums.NAME}
    for file in files:
        content = file.read_bytes()
        damage(file)
        name = re.escape(str(file.relative_to(workdir)))
        with pytest.raises(checksums.DamagedError, match=f"^{name} is "):
            checksums.verify(checksums.epath.Path(folder), ITEMS)
        if file.is_dir():
            file.rmdir()
        file.write_bytes(content)
    assert checksums.verify(checksums.epath.Path(folder), ITEMS)


@pytest.mark.parametrize("place", ["params/d", "optimizer/d", "cache/_METADATA", "meta", "_CHECK"])
def test_a_flipped_bit_costs_one_checkpoint(workdir: Path, place: str, caplog: Any) -> None:
    """Resuming takes the one before and keeps the damaged one under another name."""
    folder = workdir / "checkpoints" / "20"
    file = next(
        file for file in files_of(folder) if str(file.relative_to(folder)).startswith(place)
    )
    flip(file)
    content = file.read_bytes()
    with Checkpointer(workdir) as checkpoints:
        *arrays, meta = checkpoints.restore_newest(abstract)
        assert_same(tuple(arrays), trees(10))
        assert meta["step"] == 10
        save(checkpoints, 20)
    assert str(file.relative_to(workdir)) in caplog.text
    aside = workdir / "checkpoints-damaged" / "20" / file.relative_to(folder)
    assert aside.read_bytes() == content and "checkpoints-damaged/20" in caplog.text
    with Checkpointer(workdir) as checkpoints:
        assert checkpoints.steps() == [10, 20]
        assert_same(checkpoints.restore(*abstract({})), trees(20))


def test_damaged_twice(workdir: Path) -> None:
    for _ in range(2):
        flip(files_of(workdir / "checkpoints/20/params")[0])
        with Checkpointer(workdir) as checkpoints:
            assert checkpoints.restore_newest(abstract)[-1]["step"] == 10
            save(checkpoints, 20)
    assert sorted(os.listdir(workdir / "checkpoints-damaged")) == ["20", "20-2"]


def test_a_damaged_score_is_no_score(workdir: Path, caplog: Any) -> None:
    """A flipped bit makes another number of it, and so another checkpoint the best."""
    score = workdir / "checkpoints/10/metrics/metrics"
    score.write_text(score.read_text().replace("1", "3"))
    with Checkpointer(workdir, keep=1) as checkpoints:
        assert checkpoints.resolve("best") == 20
        save(checkpoints, 30, 1.5)
        # It may be the best, so it is kept.
        assert checkpoints.steps() == [10, 30]
    assert "checkpoints/10/metrics/metrics" in caplog.text


# --- checkpoints that are not finished, and those of before --------------------------------------


def test_a_kill_before_the_checksums(workdir: Path, caplog: Any) -> None:
    (workdir / "checkpoints/20" / checksums.NAME).unlink()
    with Checkpointer(workdir, create=False) as checkpoints:
        assert checkpoints.resolve() == checkpoints.restore_meta()["step"] == 10
        assert f"checkpoint 20 in {workdir} is unfinished" in caplog.text
    with Checkpointer(workdir) as checkpoints:
        assert checkpoints.restore_newest(abstract)[-1]["step"] == 10
        save(checkpoints, 15)
        assert checkpoints.steps() == [10, 15]


def test_a_kill_before_the_first_checksums(workdir: Path) -> None:
    """Nothing is lost by starting again, and a launcher does so without being told."""
    shutil.rmtree(workdir / "checkpoints/10")
    (workdir / "checkpoints/20" / checksums.NAME).unlink()
    with Checkpointer(workdir, create=False) as checkpoints:
        with pytest.raises(UserError, match="that of step 20 is unfinished"):
            checkpoints.resolve()
    with Checkpointer(workdir) as checkpoints:
        assert checkpoints.restore_newest(abstract) is None
        save(checkpoints, 5)
        assert checkpoints.steps() == [5]


def without_checksums(workdir: Path, step: int) -> Path:
    """Make a checkpoint one of before; returns its meta."""
    folder = workdir / "checkpoints" / str(step)
    (folder / checksums.NAME).unlink()
    file = folder / "meta" / "metadata"
    meta = json.loads(file.read_text())
    del meta[checksums.FLAG]
    file.write_text(json.dumps(meta))
    return file


def test_checkpoints_of_before_are_read(workdir: Path) -> None:
    without_checksums(workdir, 20)
    with Checkpointer(workdir) as checkpoints:
        assert checkpoints.resolve() == 20
        assert checkpoints.resolve("sound") == 10
        *arrays, meta = checkpoints.restore_newest(abstract)
        assert_same(tuple(arrays), trees(20))


@pytest.mark.parametrize(
    "changes",
    [
        {"step": 21},
        {"config": "{"},
        {"config": 3},
        {"vocabulary": 3},
        {"bucket": "a"},
        {"key": {"a": 1}},
    ],
)
def test_nonsense_in_meta_is_damage(workdir: Path, changes: dict[str, Any]) -> None:
    file = without_checksums(workdir, 20)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with Checkpointer(workdir, create=False) as checkpoints:
        with pytest.raises(UserError, match="checkpoint 20 in .*: checkpoints/20/meta makes no"):
            checkpoints.restore_meta()
        assert checkpoints.restore_newest(abstract)[-1]["step"] == 10


# --- failures that are no damage -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.EACCES, UserError), (errno.EMFILE, RunError), (errno.EIO, RunError)]
)
def test_what_is_out_of_reach_is_not_damaged(
    workdir: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    """No older checkpoint is taken in its place, and nothing is moved."""
    path = type(checksums.epath.Path("/"))
    opened = path.open

    def refuse(self: Any, *arguments: Any, **options: Any) -> Any:
        if "20/params" in str(self):
            raise OSError(number, os.strerror(number))
        return opened(self, *arguments, **options)

    before = files_of(workdir)
    with Checkpointer(workdir) as checkpoints:
        monkeypatch.setattr(path, "open", refuse)
        with pytest.raises(kind, match=f"20/params.*{os.strerror(number)}"):
            checkpoints.restore_newest(abstract)
    assert files_of(workdir) == before


# --- the commands --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A run with checkpoints of steps 4, 8 and 10, and the flags that train it."""
    folder = tmp_path_factory.mktemp("trained")
    flags = command_line.flags(
        command_line.write_texts(folder), train__steps=10, train__finetune_steps=0
    )
    done = command_line.call("train", f"--workdir={folder / 'run'}", *flags)
    assert done.code == 0, done.err
    return folder / "run", flags


@pytest.mark.parametrize("place", ["params/d", "meta", "params/manifest.ocdbt", checksums.NAME])
def test_scoring_names_damage_and_what_is_sound(
    trained: tuple[Path, list[str]], tmp_path: Path, place: str
) -> None:
    workdir = shutil.copytree(trained[0], tmp_path / "run")
    file = sorted((workdir / "checkpoints/10").glob(f"{place}*"))[0]
    file = file if file.is_file() else files_of(file)[0]
    flip(file)
    name = file.relative_to(workdir)
    for command in (["evaluate"], ["generate", "--prompt=a", "--length=2"]):
        found = command_line.call(*command, f"--workdir={workdir}")
        assert (found.code, found.out, found.err.count("\n")) == (2, "", 1)
        assert f"checkpoint 10 in {workdir} cannot be read: {name} is not as it was" in found.err
        assert "step 8 is sound: --step=sound takes it" in found.err
    assert command_line.call("evaluate", f"--workdir={workdir}", "--step=sound").last()["step"] == 8


def test_training_goes_on_from_what_is_sound(
    trained: tuple[Path, list[str]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And ends as the undamaged run."""
    before, flags = trained
    workdir = shutil.copytree(before, tmp_path / "run")
    flip(files_of(workdir / "checkpoints/10/params/d")[0])
    with caplog.at_level(logging.WARNING):
        done = command_line.call("train", f"--workdir={workdir}", *flags)
    assert done.code == 0 and "resumes at step 8" in done.out + done.err
    assert "checkpoints/10/params/d" in caplog.text
    scores = [json.loads((folder / "scores.json").read_text()) for folder in (before, workdir)]
    assert scores[0] == scores[1]


def test_a_score_that_is_added(workdir: Path) -> None:
    """Its checksum changes with it."""
    with Checkpointer(workdir) as checkpoints:
        checkpoints.add_score(20, 0.5)
        assert checkpoints.resolve("best") == 20
    folder = checksums.epath.Path(workdir / "checkpoints/20")
    assert checksums.verify(folder, ITEMS)


@pytest.mark.slow
def test_two_processes_pass_over_damage(tmp_path: Path, own_data_dir: None) -> None:
    """Process 0 compares the files, and both go on from the same checkpoint."""
    texts = several_processes.prepared_texts(tmp_path)
    workdir = tmp_path / "run"
    settings = several_processes.RUN | {"train__steps": 8}
    assert command_line.call(
        "train", f"--workdir={workdir}", *command_line.flags(texts, **settings)
    )
    flip(files_of(workdir / "checkpoints/8/params/d")[0])
    evaluation = several_processes.evaluate(workdir, 2, 1)
    with evaluation as both:
        for result in both.results():
            assert result.code == 2 and "step 4 is sound" in result.err, result.err
    with several_processes.train(texts, workdir, 2, 1, train__steps=8) as both:
        for result in both.results():
            assert result.code == 0, result.err[-2000:]
    assert os.listdir(workdir / "checkpoints-damaged") == ["8"]
    assert not (workdir / "lock.json").exists()
