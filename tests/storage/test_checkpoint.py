"""Checkpoints: what goes in comes out on any mesh, the right ones are kept, and damage costs one
checkpoint at most.
"""

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import command_line
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparison import assert_same

from allattn.errors import UserError
from allattn.storage.checkpoint import Checkpointer, on_one_device

ROOT = Path(__file__).parents[2]


def trees(value: float) -> tuple[Any, Any, Any]:
    """Params, optimizer and cache that differ from value to value; sizes that 8 devices can
    share.
    """
    params = {
        "layers": {"kv": jnp.full((8, 4), value)},
        "bias": jnp.arange(16, dtype=jnp.bfloat16) + value,
    }
    optimizer = optax.adam(1e-3)
    _, state = optimizer.update(params, optimizer.init(params))
    return params, state, jnp.full((2, 8, 3), value + 0.5)


def abstract(_: dict[str, Any]) -> tuple[Any, Any, Any]:
    return tuple(on_one_device(tree) for tree in trees(0))


def save(checkpoints: Checkpointer, step: int, dev_nll: float | None = None) -> None:
    checkpoints.save(step, *trees(step), {"step": step, "name": "é"}, dev_nll)


def fill(workdir: Path, scores: dict[int, float | None], keep: int = 3) -> str:
    with Checkpointer(str(workdir), keep=keep) as checkpoints:
        for step, dev_nll in scores.items():
            save(checkpoints, step, dev_nll)
    return str(workdir)


def damage(workdir: str, step: int, item: str) -> None:
    """Cut every file of an item of a checkpoint to half its length."""
    files = [
        path for path in Path(workdir, "checkpoints", str(step), item).rglob("*") if path.is_file()
    ]
    assert files
    for path in files:
        os.truncate(path, path.stat().st_size // 2)


def run_child(code: str, devices: int = 1, **options: Any) -> subprocess.Popen:
    flags = f"--xla_force_host_platform_device_count={devices}"
    path = command_line.TEST_PATH
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **options)


def test_everything_comes_back(tmp_path: Path) -> None:
    workdir = fill(tmp_path, {10: None})
    with Checkpointer(workdir, create=False) as checkpoints:
        assert_same(checkpoints.restore(*abstract({})), trees(10))
        assert checkpoints.restore_meta() == {"step": 10, "name": "é"}


def test_arrays_are_not_compressed(tmp_path: Path) -> None:
    """The cores that would compress them are those that train."""
    with Checkpointer(str(tmp_path)) as checkpoints:
        zeros = {"x": jnp.zeros((500, 500))}
        checkpoints.save(1, zeros, zeros, zeros["x"], {})
    assert (
        sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
        > 3 * zeros["x"].nbytes
    )


def test_reading_waits_for_writing(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpoints:
        save(checkpoints, 10, dev_nll=1.0)
        assert checkpoints.resolve("best") == 10
        save(checkpoints, 20)
        assert_same(checkpoints.restore(*abstract({})), trees(20))


def test_saves_in_a_row_do_not_mix(tmp_path: Path) -> None:
    """Their copies share memory, so each must be on disk before the next begins."""
    with Checkpointer(str(tmp_path), keep=4) as checkpoints:
        for step in range(1, 5):
            large = {"w": jnp.full((2048, 2048), float(step))}
            checkpoints.save(step, large, {"m": jnp.full((2048,), -float(step))}, jnp.ones(2), {})
            assert {
                int(path.name) for path in checkpoints.folder.iterdir() if path.name.isdecimal()
            } >= set(range(1, step))
        for step in range(1, 5):
            shapes = on_one_device((large, {"m": jnp.ones(2048)}, jnp.ones(2)))
            params, optimizer, _ = checkpoints.restore(*shapes, step)
            assert (np.asarray(params["w"]) == step).all() and (
                np.asarray(optimizer["m"]) == -step
            ).all()


OTHER_MESHES = """
import math, jax
from allattn import sharding, train
from allattn.storage.checkpoint import Checkpointer
from command_line import trained, trainer
from comparison import assert_same

changes = {"model__heads": 4, "train__batch": 8, "model__dtype": "bfloat16"}
changes["model__adaptive_io__cutoffs"] = (4, 7)
first = trainer(TEXTS, **changes, mesh__fsdp=2, mesh__tensor=2)
state, bucket, _ = trained(first, 3)
arrays = (state.params, state.optimizer, state.cache)
expected = jax.device_get(arrays)
with Checkpointer(WORKDIR) as checkpoints:
    for step, sizes in enumerate([(8, 1, 1), (1, 4, 2), (1, 1, 1), (2, 2, 2)]):
        checkpoints.save(step, *arrays, {})
        with first.config.unlocked():
            first.config.mesh.update(dict(zip(sharding.AXES, sizes, strict=True)))
        mesh = sharding.make_mesh(first.config, jax.devices()[: math.prod(sizes)])
        wanted = train.TrainProgram(first.config, mesh).abstract_state(bucket)
        wanted = (wanted.params, wanted.optimizer, wanted.cache)
        arrays = checkpoints.restore(*wanted)
        shardings = [[x.sharding for x in jax.tree.leaves(tree)] for tree in (arrays, wanted)]
        assert shardings[0] == shardings[1]
        assert_same(jax.device_get(arrays), expected)
"""


def test_other_meshes(tmp_path: Path, own_data_dir: None) -> None:
    """Trained on 2 x 2 x 2 devices, and passed on bit by bit to 8 x 1 x 1, 1 x 4 x 2, one device,
    and back.
    """
    texts = command_line.write_texts(tmp_path)
    code = OTHER_MESHES.replace("WORKDIR", repr(str(tmp_path / "run"))).replace(
        "TEXTS", repr(str(texts))
    )
    child = run_child(code, devices=8, stderr=subprocess.PIPE)
    _, errors = child.communicate(timeout=200)
    assert child.returncode == 0, errors[-2000:]


@pytest.mark.parametrize(
    "scores,keep,kept",
    [
        ({10: 3.0, 20: 1.0, 30: 2.0, 40: 2.5, 50: 2.2}, 2, [20, 40, 50]),
        ({10: None, 20: 1.0, 30: None, 40: 2.5, 50: None, 60: None}, 2, [20, 50, 60]),
        ({10: 1.0, 20: None, 30: 0.5, 40: float("nan"), 50: None}, 1, [30, 50]),
        ({10: None, 20: None, 30: None}, 2, [20, 30]),
        ({10: None, 20: None, 30: 1.0}, 1, [30]),
    ],
)
def test_the_last_and_the_best_are_kept(
    tmp_path: Path, scores: dict, keep: int, kept: list[int]
) -> None:
    workdir = fill(tmp_path, scores, keep)
    with Checkpointer(workdir, create=False) as checkpoints:
        assert checkpoints.steps() == kept


def test_retention_goes_on_after_a_restart(tmp_path: Path) -> None:
    """The scores of earlier starts are read back."""
    fill(tmp_path, {10: 1.0, 20: None, 30: 2.0}, keep=1)
    workdir = fill(tmp_path, {40: 1.5, 50: None}, keep=1)
    with Checkpointer(workdir, create=False) as checkpoints:
        assert checkpoints.steps() == [10, 50]
        assert checkpoints.resolve("best") == 10


def test_which_checkpoint(tmp_path: Path) -> None:
    workdir = fill(tmp_path, {10: 2.0, 20: 1.0, 30: None})
    with Checkpointer(workdir, create=False) as checkpoints:
        named = [checkpoints.resolve(step) for step in (None, "best", 10, "20")]
        assert named == [30, 20, 10, 20]
        for step, number in ((None, 30), ("best", 20), (10, 10)):
            assert checkpoints.restore_meta(step)["step"] == number
            assert_same(checkpoints.restore_params(abstract({})[0], step), trees(number)[0])
        for step in (40, "41", "worst", -10, "²"):
            with pytest.raises(
                UserError, match=rf"no checkpoint of step {step} in {workdir}: .*\[10, 20, 30\]"
            ):
                checkpoints.resolve(step)


def test_no_score_no_best(tmp_path: Path) -> None:
    workdir = fill(tmp_path, {10: None, 20: float("inf")})
    with Checkpointer(workdir, create=False) as checkpoints:
        with pytest.raises(UserError, match=f"no best checkpoint in {workdir}"):
            checkpoints.resolve("best")


def test_no_checkpoint(tmp_path: Path) -> None:
    workdir = str(tmp_path / "run")
    with pytest.raises(UserError, match=f"no checkpoint in {workdir}.*allattn train"):
        Checkpointer(workdir, create=False)
    assert not Path(workdir).exists(), "a reader makes no folder"
    with Checkpointer(workdir) as checkpoints:
        assert checkpoints.restore_newest(abstract) is None
        with pytest.raises(UserError, match=f"no checkpoint in {workdir}"):
            checkpoints.resolve()


def test_a_relative_workdir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `make demo`; and the process may change its folder while it runs."""
    monkeypatch.chdir(tmp_path)
    with Checkpointer("runs/demo") as checkpoints:
        monkeypatch.chdir("/")
        save(checkpoints, 10)
    monkeypatch.chdir(tmp_path)
    with Checkpointer("runs/demo", create=False) as checkpoints:
        assert_same(checkpoints.restore(*abstract({})), trees(10))
    assert os.listdir(tmp_path / "runs" / "demo" / "checkpoints") == ["10"]


WHERE = "a place that this machine can reach"
KIND = "a folder or a URL such as gs://bucket/run"


@pytest.mark.parametrize(
    ("workdir", "expected"),
    [("FILE", WHERE), ("FILE/run", WHERE), ("nosuch://bucket/run", KIND), ("s3://b/run", KIND)],
)
def test_a_workdir_that_cannot_be_one(tmp_path: Path, workdir: str, expected: str) -> None:
    (tmp_path / "FILE").write_text("")
    workdir = workdir.replace("FILE", str(tmp_path / "FILE"))
    with pytest.raises(UserError, match=f"(?=.*{workdir}).*expected {expected}"):
        Checkpointer(workdir)
    assert sorted(os.listdir(tmp_path)) == ["FILE"]


def test_meta_holds_any_number(tmp_path: Path) -> None:
    with Checkpointer(str(tmp_path)) as checkpoints:
        checkpoints.save(
            10, *trees(10), {"values": [math.nan, math.inf, -math.inf, 2**63, None, 0.1]}
        )
        found = checkpoints.restore_meta()["values"]
    assert math.isnan(found[0]) and found[1:] == [math.inf, -math.inf, 2**63, None, 0.1]


@pytest.mark.parametrize("item", ["params", "optimizer", "cache", "meta"])
def test_resuming_past_a_damaged_checkpoint(tmp_path: Path, item: str, caplog) -> None:
    """Resuming passes over a damaged checkpoint.

    It goes on from the one before, and can then write the damaged step again.
    """
    workdir = fill(tmp_path, {10: None, 20: None, 30: None})
    damage(workdir, 30, item)
    with Checkpointer(workdir) as checkpoints:
        *arrays, meta = checkpoints.restore_newest(abstract)
        assert_same(tuple(arrays), trees(20))
        assert meta["step"] == 20
        save(checkpoints, 25)
        save(checkpoints, 30)
    warnings = [record.getMessage() for record in caplog.records if workdir in record.getMessage()]
    assert len(warnings) == 1 and "checkpoint 30" in warnings[0] and "\n" not in warnings[0]
    with Checkpointer(workdir, create=False) as checkpoints:
        assert checkpoints.steps() == [20, 25, 30]
        assert_same(checkpoints.restore(*abstract({})), trees(30))


def test_all_are_damaged(tmp_path: Path) -> None:
    workdir = fill(tmp_path, {10: None, 20: None})
    damage(workdir, 10, "meta")
    damage(workdir, 20, "params")
    with Checkpointer(workdir) as checkpoints:
        with pytest.raises(
            UserError, match=rf"no checkpoint in {workdir} can be read: tried \[20, 10\]"
        ):
            checkpoints.restore_newest(abstract)
        assert checkpoints.steps() == [10, 20], "nothing is removed that has no sound one before it"


def test_a_reader_changes_nothing(tmp_path: Path) -> None:
    """Neither what is damaged nor what another process is writing."""
    workdir = fill(tmp_path, {10: None, 20: None})
    damage(workdir, 20, "params")
    (tmp_path / "checkpoints" / "30.orbax-checkpoint-tmp").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with Checkpointer(workdir, create=False) as checkpoints:
        with pytest.raises(UserError, match=f"checkpoint 20 in {workdir} cannot be read"):
            checkpoints.restore_params(abstract({})[0])
        assert checkpoints.restore_newest(abstract)[-1]["step"] == 10
        assert checkpoints.steps() == [10, 20]
    assert sorted(tmp_path.rglob("*")) == before


def test_what_the_caller_refuses_is_no_damage(tmp_path: Path) -> None:
    workdir = fill(tmp_path, {10: None, 20: None})

    def refuse(meta: dict[str, Any]) -> tuple[Any, Any, Any]:
        raise UserError(f"another configuration at {meta['step']}")

    with Checkpointer(workdir) as checkpoints:
        with pytest.raises(UserError, match="another configuration at 20"):
            checkpoints.restore_newest(refuse)
        assert checkpoints.steps() == [10, 20]


def test_a_damaged_score(tmp_path: Path) -> None:
    """It costs the score, not the workdir."""
    workdir = fill(tmp_path, {10: 1.0, 20: 2.0})
    damage(workdir, 10, "metrics")
    with Checkpointer(workdir) as checkpoints:
        assert checkpoints.resolve("best") == 20
        assert_same(checkpoints.restore(*abstract({}), 10), trees(10))


def test_a_step_is_written_once(tmp_path: Path) -> None:
    workdir = fill(tmp_path, {10: 1.0})
    with Checkpointer(workdir) as checkpoints:
        checkpoints.save(10, *trees(99), {"step": 99}, 0.5)
        assert checkpoints.restore_meta()["step"] == 10
        assert_same(checkpoints.restore(*abstract({})), trees(10))


def test_params_alone(tmp_path: Path) -> None:
    """Sampling needs neither optimizer nor cache."""
    workdir = fill(tmp_path, {10: None})
    for item in ("optimizer", "cache"):
        shutil.rmtree(tmp_path / "checkpoints" / "10" / item)
    with Checkpointer(workdir, create=False) as checkpoints:
        assert_same(checkpoints.restore_params(abstract({})[0]), trees(10)[0])
        with pytest.raises(UserError, match=f"checkpoint 10 in {workdir} cannot be read"):
            checkpoints.restore(*abstract({}))


SAVES = """
import itertools
import jax.numpy as jnp
from allattn.storage.checkpoint import Checkpointer

with Checkpointer(WORKDIR, keep=100) as checkpoints:
    for step in itertools.count(1):
        big = {"x": jnp.full((1000, 1000), step)}
        checkpoints.save(step, big, big, big, {"step": step}, 1.0)
"""


def wait_for_a_save(folder: Path, child: subprocess.Popen) -> None:
    """Until 3 checkpoints are whole and another is being written."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and child.poll() is None:
        names = os.listdir(folder) if folder.exists() else []
        if sum(name.isdigit() for name in names) >= 3 and any("tmp" in name for name in names):
            return
    child.kill()
    raise AssertionError("the child wrote no checkpoints")


def test_a_kill_in_the_middle_of_saving(tmp_path: Path) -> None:
    child = run_child(SAVES.replace("WORKDIR", repr(str(tmp_path))))
    wait_for_a_save(tmp_path / "checkpoints", child)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    shapes = {"x": jax.ShapeDtypeStruct((1000, 1000), jnp.int32)}
    place = on_one_device(shapes)
    with Checkpointer(str(tmp_path)) as checkpoints:
        steps = checkpoints.steps()
        assert len(steps) >= 3
        for step in steps:
            assert checkpoints.restore_meta(step)["step"] == step
            for tree in checkpoints.restore(place, place, place, step):
                assert (tree["x"] == step).all()
        save(checkpoints, steps[-1] + 10)
    left = [name for name in os.listdir(tmp_path / "checkpoints") if not name.isdigit()]
    assert not left, "a writer clears away what was half written"
