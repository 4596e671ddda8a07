"""Checkpoints by Orbax: params, optimizer, cache and meta, written together or not at all."""

import functools
import importlib.metadata
import logging
import math
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from allattn.config import to_json
from allattn.data import Vocabulary
from allattn.errors import RunError, UserError
from allattn.sharding import processes
from allattn.storage import paths

ARRAYS = ("params", "optimizer", "cache")
Step = int | str | None  # a number, "best" or None for the newest
Restored = tuple[Any, Any, Any, dict[str, Any]]  # params, optimizer, cache, meta


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries that decide what the stored numbers mean."""
    return {
        name: importlib.metadata.version(name)
        for name in ("jax", "flax", "optax", "orbax-checkpoint")
    }


def describe(
    step: int, config: ml_collections.ConfigDict, vocabulary: Vocabulary
) -> dict[str, Any]:
    """What every checkpoint says besides its arrays."""
    texts = {"config": to_json(config), "vocabulary": vocabulary.to_json(), "versions": versions()}
    return {"step": step, **texts}


class DamagedError(UserError):
    """A checkpoint that is there but cannot be read."""


def _score(metrics: dict[str, float | None]) -> float:
    """What decides the best checkpoint: lower is better, and those without a score come last."""
    score = metrics["dev_nll"]
    return math.inf if score is None else score


class _Manager(ocp.CheckpointManager):
    """Takes a checkpoint whose score cannot be read for one without a score, instead of refusing the whole workdir."""

    def metrics(self, step: int) -> Any:
        try:
            return super().metrics(step)
        except ValueError:  # JSON's and Unicode's errors
            return None

    def reached_preemption(self, step: int) -> bool:
        """No: the training loop asks for itself, and to ask twice would move the step that the processes agree on."""
        return False


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Arrays are written as they are: to compress them saves little space, and is a fifth of the work of a save."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ARRAYS:
        registry.add(item, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
        registry.add(item, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
    return registry


def _place(workdir: str) -> epath.Path:
    """Where the checkpoints of a workdir lie: a URL as it is, a path made absolute, since Orbax refuses others."""
    remote = paths.is_url(workdir)
    if remote and not workdir.startswith("gs://"):
        expected = "a folder or a URL such as gs://bucket/run, since Orbax writes into no other kind of bucket"
        raise UserError(f"workdir: expected {expected}; found {workdir}")
    return (epath.Path(workdir) if remote else epath.Path(workdir).absolute()) / "checkpoints"


def has_begun(workdir: str) -> bool:
    """Whether the workdir holds a run, perhaps one that has no checkpoint yet; the same on every process.

    Raises:
      UserError, RunError: it cannot be a workdir, or not be reached.
    """

    def begun() -> bool:
        folder = _place(workdir)
        with paths.reached(folder):
            return folder.exists()

    found = processes.first_on_leader(
        "run", lambda: not processes.index() and begun()
    )  # process 0 may go on and make it
    return bool(multihost_utils.broadcast_one_to_all(found))


def _folder(workdir: str, create: bool) -> epath.Path:
    """Makes the folder of checkpoints, or finds it."""
    folder, remote = _place(workdir), paths.is_url(workdir)
    if processes.index():
        return folder  # process 0 makes it, or finds it
    with paths.reached(folder):
        if create and remote:
            paths.check_writable(folder.parent)
        elif create:
            folder.mkdir(parents=True, exist_ok=True)
        elif not folder.exists():
            expected = f"expected {folder}; `allattn train` makes it"
            if folder.parent.name == folder.name and folder.parent.exists():
                expected = f"expected the folder that holds it, {folder.parent.parent}"
            raise UserError(f"no checkpoint in {workdir}: {expected}")
    return folder


def _unshared(theirs: str, mine: str) -> str:
    """What is wrong with the folder of a process beside that of process 0, which has made or found it."""
    there = paths.is_url(theirs) or epath.Path(theirs).exists()
    return processes.describe_difference(theirs, mine) or (
        "" if there else f"expected a folder that all processes share, found no {theirs} there"
    )


class Checkpointer:
    """The checkpoints of one workdir: the last few, and the best on dev.

    Args:
      workdir: folder or bucket URL of the run; the checkpoints lie under `checkpoints`.
      keep: how many of the newest are kept.
      create: make the folder; False for readers, which refuse a workdir without one.

    Raises:
      UserError: a reader finds no checkpoint, or the workdir cannot be one.
    """

    def __init__(self, workdir: str | os.PathLike[str], keep: int = 3, create: bool = True):
        self.workdir = os.fspath(workdir)
        self.folder = processes.first_on_leader(
            "workdir", functools.partial(_folder, self.workdir, create)
        )
        processes.require_same_text("workdir", str(self.folder), _unshared)
        policies = ocp.checkpoint_managers
        best = policies.BestN(
            get_metric_fn=_score, reverse=True, n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            create=create,
            preservation_policy=policies.AnyPreservationPolicy([policies.LatestN(n=keep), best]),
            best_fn=_score,
            best_mode="min",
            cleanup_tmp_directories=create,
        )
        self._writes, self._worker = create, ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._memory: list[np.ndarray] = []  # of the last copy
        self._manager = _Manager(self.folder, options=options, handler_registry=_handlers())

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        if processes.count() == 1 or error is None or isinstance(error, RunError):
            self.close()
        # else another process may be gone, and would be waited for

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self._wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first; waits for one that is being written."""
        self._wait()
        self._manager.wait_until_finished()
        return sorted(self._manager.all_steps())

    def save(
        self,
        step: int,
        params: Any,
        optimizer: Any,
        cache: Any,
        meta: dict[str, Any],
        dev_nll: float | None = None,
    ) -> None:
        """Write a checkpoint in the background; nothing is written at or before the newest that exists.

        Args:
          step: updates made.
          params, optimizer, cache: trees of arrays.
          meta: what JSON can hold.
          dev_nll: score on dev in nats, if this step has one; it decides which checkpoint is the
            best.
        """
        score = dev_nll if dev_nll is not None and math.isfinite(dev_nll) else None
        trees = dict(zip(ARRAYS, (params, optimizer, {"states": cache}), strict=True))
        self._wait()
        if processes.count() > 1:
            self._write(
                step, trees, meta, score
            )  # which makes the processes wait for each other on their devices
        else:
            copies = self._copy(trees)  # the loop gives its arrays away in the next step
            self._pending = self._worker.submit(self._write, step, copies, meta, score, whole=True)

    def save_params(self, step: int, params: Any, meta: dict[str, Any]) -> None:
        """Write a checkpoint of parameters alone, from which a run can start.

        Args:
          step: which checkpoint.
          params: tree of arrays.
          meta: what JSON can hold, with "params_only": True.
        """
        self._wait()
        self._write(step, {"params": params}, meta, None)

    def _copy(self, trees: dict[str, Any]) -> dict[str, Any]:
        """The arrays on the host, in the memory of the copy before: new pages would cost more than the copying."""
        arrays, structure = jax.tree.flatten(trees)
        if [(x.shape, x.dtype) for x in arrays] != [(x.shape, x.dtype) for x in self._memory]:
            self._memory = [np.empty(x.shape, x.dtype) for x in arrays]
        for array, memory in zip(arrays, self._memory, strict=True):
            for shard in array.addressable_shards:
                if shard.replica_id == 0:
                    memory[shard.index] = shard.data
        return jax.tree.unflatten(structure, self._memory)

    def _write(
        self,
        step: int,
        trees: dict[str, Any],
        meta: dict[str, Any],
        score: float | None,
        whole: bool = False,
    ) -> None:
        """Hand a checkpoint to Orbax; `whole`: and see it written, for then its memory is free."""
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        composite = ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=composite, metrics={"dev_nll": score})
        if whole:
            self._manager.wait_until_finished()

    def _wait(self) -> None:
        """Wait for what the loop has handed over; raises what went wrong there."""
        pending, self._pending = self._pending, None
        if pending:
            pending.result()

    def resolve(self, step: Step = None) -> int:
        """The number of the checkpoint asked for: the newest, "best" or a step.

        Raises:
          UserError: it is not there.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.workdir}: expected one under {self.folder}")
        if step is None:
            return steps[-1]
        if step == "best":
            best = self._manager.best_step()
            if best is None or _score(self._manager.metrics(best)) == math.inf:
                raise UserError(
                    f"no best checkpoint in {self.workdir}: none of {steps} has a score on dev"
                )
            return best
        if not str(step).isdecimal() or int(step) not in steps:
            raise UserError(
                f"no checkpoint of step {step} in {self.workdir}: expected best or one of {steps}"
            )
        return int(step)

    def restore_newest(
        self, abstract: Callable[[dict[str, Any]], tuple[Any, Any, Any]]
    ) -> Restored | None:
        """The newest checkpoint that can be read.

        Damaged ones are passed over with a warning. Once an older one is read they are removed,
        since the run is about to write these steps again and Orbax writes no step at or before its
        newest.

        Args:
          abstract: from meta to the abstract params, optimizer and cache.

        Returns:
          params, optimizer, cache and meta; None if there is no checkpoint at all. Where parameters
          alone were saved, optimizer and cache are None.

        Raises:
          UserError: there are checkpoints and all are damaged; also what `abstract` raises.
        """
        damaged: list[int] = []
        for step in reversed(self.steps()):
            try:
                meta = self.restore_meta(step)
                expected, alone = abstract(meta), meta.get("params_only")
                restored = (
                    (self.restore_params(expected[0], step), None, None)
                    if alone
                    else self.restore(*expected, step)
                )
            except DamagedError as error:
                logging.warning("passed over: %s", error)
                damaged.append(step)
                continue
            self._remove(damaged)
            return *restored, meta
        if damaged:
            raise UserError(
                f"no checkpoint in {self.workdir} can be read: tried {damaged} under {self.folder}"
            )
        return None

    def _remove(self, steps: list[int]) -> None:
        for step in steps if self._writes else []:
            self._manager.delete(step)

    def restore_meta(self, step: Step = None) -> dict[str, Any]:
        """What a checkpoint says besides its arrays.

        Raises:
          UserError: no such checkpoint, or it cannot be read.
        """
        return self._restore(self.resolve(step), meta=ocp.args.JsonRestore())["meta"]

    def restore(
        self, params: Any, optimizer: Any, cache: Any, step: Step = None
    ) -> tuple[Any, Any, Any]:
        """The arrays of a checkpoint, on the shardings of the given abstract ones.

        Args:
          params, optimizer, cache: trees of jax.ShapeDtypeStruct with shardings.
          step: which checkpoint.

        Returns:
          params, optimizer and cache.

        Raises:
          UserError: no such checkpoint, or it cannot be read.
        """
        trees = dict(zip(ARRAYS, (params, optimizer, {"states": cache}), strict=True))
        items = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
        restored = self._restore(self.resolve(step), **items)
        return restored["params"], restored["optimizer"], restored["cache"]["states"]

    def restore_params(self, params: Any, step: Step = None) -> Any:
        """The parameters alone, whatever mesh they were written on.

        Args:
          params: tree of jax.ShapeDtypeStruct with shardings.
          step: which checkpoint.

        Raises:
          UserError: no such checkpoint, or it cannot be read.
        """
        return self._restore(self.resolve(step), params=ocp.args.StandardRestore(params))["params"]

    def _restore(self, step: int, **items: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (
            Exception
        ) as error:  # Orbax, TensorStore and JSON each raise their own kinds for a damaged file
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DamagedError(
                f"checkpoint {step} in {self.workdir} cannot be read: {first_line[:200]}"
            ) from error


def on_one_device(tree: Any) -> Any:
    """Shapes and dtypes of a tree, placed whole on the first device."""
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
