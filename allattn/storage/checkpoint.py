"""Checkpoints by Orbax: params, optimizer, cache and meta, written together or not at all.

    workdir/checkpoints/STEP/    params  optimizer  cache  meta  metrics

What this file adds to Orbax:
- a save copies the arrays and writes in the background, since the loop gives its arrays to the next
  step (one process; several must wait for each other and write at once)
- a damaged checkpoint is passed over for the one before it (`restore_newest`)
- the best checkpoint on dev is kept besides the newest ones
- every mistake ends with one line, the same on all processes

tests/storage/test_checkpoint.py kills processes in the middle of a save and damages files.
"""

import functools
import importlib.metadata
import json
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
from allattn.errors import RunError, UserError, first_line
from allattn.sharding import processes
from allattn.storage import paths

# The parts of a checkpoint that are trees of arrays; beside them lie meta and Orbax's metrics.
ARRAYS = ("params", "optimizer", "cache")
# A number, "best" or None for the newest.
Step = int | str | None
# params, optimizer, cache, meta
Restored = tuple[Any, Any, Any, dict[str, Any]]

# Libraries that decide what the stored numbers mean.
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint")
# What a message keeps of an error of another library.
MESSAGE_LENGTH = 200


# --- what a checkpoint says ----------------------------------------------------------------------


@functools.cache
def versions() -> dict[str, str]:
    """Versions of the libraries that decide what the stored numbers mean."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def describe(
    step: int, config: ml_collections.ConfigDict, vocabulary: dict[str, Any]
) -> dict[str, Any]:
    """What every checkpoint says besides its arrays, its "meta".

    Args:
      step: updates made.
      config: the whole configuration.
      vocabulary: as JSON can hold it, from `Vocabulary.to_json()`.
    """
    return {
        "step": step,
        "config": to_json(config),
        "vocabulary": vocabulary,
        "versions": versions(),
    }


# --- Orbax, configured ---------------------------------------------------------------------------


class DamagedError(UserError):
    """A checkpoint that is there but cannot be read."""


def _score(metrics: dict[str, float | None]) -> float:
    """What decides the best checkpoint: lower is better, and those without a score come last."""
    score = metrics["dev_nll"]
    if score is None:
        return math.inf
    return score


class _Manager(ocp.CheckpointManager):
    """Orbax's manager, but for two of its answers."""

    def metrics(self, step: int) -> Any:
        """A score that cannot be read counts as none; Orbax would refuse the whole workdir."""
        try:
            return super().metrics(step)
        except ValueError:  # JSON's and Unicode's errors
            return None

    def reached_preemption(self, step: int) -> bool:
        """No: the training loop asks for itself.

        To ask twice would move the step that the processes agree on.
        """
        return False


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Arrays are written as they are: compressing saves little and takes a fifth of a save."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ARRAYS:
        # One kind of handler saves any tree; the other restores on the shardings it is shown.
        registry.add(item, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
        registry.add(item, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
    return registry


def _options(keep: int, create: bool) -> ocp.CheckpointManagerOptions:
    """Keep the last few, and besides them the best on dev; only who writes may clean up."""
    policies = ocp.checkpoint_managers
    # To Orbax the best is the largest, so the order is reversed: the lowest loss.
    best = policies.BestN(
        get_metric_fn=_score, reverse=True, n=1, keep_checkpoints_without_metrics=False
    )
    newest = policies.LatestN(n=keep)
    return ocp.CheckpointManagerOptions(
        create=create,
        preservation_policy=policies.AnyPreservationPolicy([newest, best]),
        best_fn=_score,
        best_mode="min",
        cleanup_tmp_directories=create,
    )


# --- the folder ----------------------------------------------------------------------------------


def _folder_path(workdir: str) -> epath.Path:
    """Path of a workdir's checkpoints: a URL as it is, a path made absolute, as Orbax demands.

    Raises:
      UserError: a kind of bucket that Orbax does not write into.
    """
    remote = paths.is_url(workdir)
    if remote and not workdir.startswith("gs://"):
        expected = (
            "a folder or a URL such as gs://bucket/run, "
            "since Orbax writes into no other kind of bucket"
        )
        raise UserError(f"workdir: expected {expected}; found {workdir}")
    # A URL has no relative form.
    path = epath.Path(workdir)
    if not remote:
        path = path.absolute()
    return path / "checkpoints"


def has_begun(workdir: str) -> bool:
    """Whether the workdir holds a run, perhaps one that has no checkpoint yet.

    Returns:
      The same on every process: what process 0 saw, before it may go on and make the folder.

    Raises:
      UserError, RunError: it cannot be a workdir, or not be reached.
    """

    def leader_sees_folder() -> bool:
        if processes.index():
            return False
        folder = _folder_path(workdir)
        with paths.reached(folder):
            return folder.exists()

    # first_on_leader brings an error to all processes, the broadcast brings the answer.
    begun = processes.first_on_leader("run", leader_sees_folder)
    return bool(multihost_utils.broadcast_one_to_all(begun))


def _prepare_folder(workdir: str, create: bool) -> epath.Path:
    """Process 0 makes the folder of checkpoints, or refuses that there is none; others name it.

    Raises:
      UserError, RunError: as `Checkpointer`.
    """
    folder = _folder_path(workdir)
    if processes.index():
        return folder
    # Readers first: they change nothing.
    with paths.reached(folder):
        if not create:
            _refuse_missing(folder, workdir)
        elif paths.is_url(workdir):
            # A bucket has no folders to make, but its right to write may be missing.
            paths.check_writable(folder.parent)
        else:
            folder.mkdir(parents=True, exist_ok=True)
    return folder


def _refuse_missing(folder: epath.Path, workdir: str) -> None:
    """Refuse a workdir without checkpoints, with the likely mistake."""
    if folder.exists():
        return
    expected = f"expected {folder}; `allattn train` makes it"
    # The user named workdir/checkpoints.
    if folder.parent.name == folder.name and folder.parent.exists():
        expected = f"expected the folder that holds it, {folder.parent.parent}"
    raise UserError(f"no checkpoint in {workdir}: {expected}")


def _folder_differences(leader: str, own: str) -> str:
    """What is wrong with the folder of a process beside that of process 0, which has made it."""
    difference = processes.describe_difference(leader, own)
    if difference:
        return difference
    # The same path on another machine may be another disk, on which process 0 has made nothing.
    if paths.is_url(leader) or epath.Path(leader).exists():
        return ""
    return f"expected a folder that all processes share, found no {leader} there"


# --- the checkpoints -----------------------------------------------------------------------------


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
        # Process 0 makes or misses the folder first; then all must see the same one.
        prepare = functools.partial(_prepare_folder, self.workdir, create)
        self.folder = processes.first_on_leader("workdir", prepare)
        processes.require_same_text("workdir", str(self.folder), _folder_differences)
        self._writes = create
        self._manager = _Manager(
            self.folder, options=_options(keep, create), handler_registry=_handlers()
        )

        # One save at a time is written in the background, from memory that the next one reuses.
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._memory: list[np.ndarray] = []

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        # After any other error another process may be gone, and closing would wait for it.
        if processes.count() == 1 or error is None or isinstance(error, RunError):
            self.close()

    def close(self) -> None:
        """Finish what is being written."""
        try:
            self._wait()
        finally:
            self._worker.shutdown()
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first; waits for one that is being written."""
        # The copy may still be on its way to Orbax, and Orbax's files on their way to the disk.
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
        """Write a checkpoint in the background.

        Orbax writes nothing at or before the newest that exists.

        Args:
          step: updates made.
          params, optimizer, cache: trees of arrays.
          meta: what JSON can hold.
          dev_nll: score on dev in nats, if this step has one; it decides which checkpoint is the
            best.
        """
        # JSON has no word for NaN, and a NaN is no score.
        score = dev_nll
        if score is not None and not math.isfinite(score):
            score = None
        trees = _by_name(params, optimizer, cache)
        self._wait()

        # Several processes write at once: Orbax makes them wait for each other on their devices,
        # which must come in the same order as the steps of the loop.
        if processes.count() > 1:
            self._write(step, trees, meta, score)
            return

        # One process copies, as the loop gives its arrays to the next step, and writes meanwhile.
        copies = self._copy(trees)
        self._pending = self._worker.submit(
            self._write, step, copies, meta, score, until_written=True
        )

    def score(self, step: int) -> float | None:
        """The score on dev of a checkpoint, in nats; None: it has none."""
        score = _score(self._manager.metrics(step) or {"dev_nll": None})
        return score if math.isfinite(score) else None

    def add_score(self, step: int, dev_nll: float) -> None:
        """Give a checkpoint the score that it was saved without; it decides which is the best."""
        self._wait()
        # JSON has no word for NaN, and a NaN is no score.
        if not math.isfinite(dev_nll):
            return

        def write() -> None:
            if not processes.index():
                path = self.folder / str(step) / "metrics" / "metrics"
                with paths.reached(path):
                    path.write_text(json.dumps({"dev_nll": dev_nll}))

        # Orbax reads it again once it is there.
        processes.first_on_leader("score", write)
        self._manager.reload()

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
        """The arrays on the host, in the memory of the last copy.

        New pages would cost more time than the copying.
        """
        arrays, structure = jax.tree.flatten(trees)
        kinds = [(array.shape, array.dtype) for array in arrays]
        # A cache that has grown no longer fits.
        if kinds != [(memory.shape, memory.dtype) for memory in self._memory]:
            self._memory = [np.empty(shape, dtype) for shape, dtype in kinds]
        # Shard by shard, straight into that memory; of replicas the first.
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
        until_written: bool = False,
    ) -> None:
        """Hand a checkpoint to Orbax; `until_written`: and wait, after which its memory is free."""
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        composite = ocp.args.Composite(**items, meta=ocp.args.JsonSave(meta))
        self._manager.save(step, args=composite, metrics={"dev_nll": score})
        if until_written:
            self._manager.wait_until_finished()

    def _wait(self) -> None:
        """Wait for what the loop has handed over; raises what went wrong there."""
        # Forgotten before it is asked, so that its error is raised once.
        pending = self._pending
        self._pending = None
        if pending:
            pending.result()

    def resolve(self, step: Step = None) -> int:
        """The number of the checkpoint asked for: the newest, "best" or a step.

        Args:
          step: as `Step` says, also as text.

        Raises:
          UserError: it is not there.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.workdir}: expected one under {self.folder}")
        if step is None:
            return steps[-1]
        if step == "best":
            # Orbax calls a checkpoint best even where none has a score.
            best = self._manager.best_step()
            if best is None or _score(self._manager.metrics(best)) == math.inf:
                raise UserError(
                    f"no best checkpoint in {self.workdir}: none of {steps} has a score on dev"
                )
            return best
        # A command line brings the number as text.
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
        # From the newest to the oldest, until one can be read.
        damaged: list[int] = []
        for step in reversed(self.steps()):
            try:
                meta = self.restore_meta(step)
                params, optimizer, cache = abstract(meta)
                # Converted from another implementation: parameters alone.
                if meta.get("params_only"):
                    restored = (self.restore_params(params, step), None, None)
                else:
                    restored = self.restore(params, optimizer, cache, step)
            except DamagedError as error:
                logging.warning("passed over: %s", error)
                damaged.append(step)
                continue
            self._remove(damaged)
            return *restored, meta

        # A new workdir, or one where nothing is left to resume from.
        if damaged:
            raise UserError(
                f"no checkpoint in {self.workdir} can be read: tried {damaged} under {self.folder}"
            )
        return None

    def _remove(self, steps: list[int]) -> None:
        """Remove checkpoints; readers leave everything as it is."""
        if not self._writes:
            return
        for step in steps:
            self._manager.delete(step)

    def restore_meta(self, step: Step = None) -> dict[str, Any]:
        """What a checkpoint says besides its arrays, from `describe`.

        Args:
          step: which checkpoint.

        Raises:
          UserError: no such checkpoint, or it cannot be read.
        """
        return self._restore(self.resolve(step), meta=ocp.args.JsonRestore())["meta"]

    def restore(
        self, params: Any, optimizer: Any, cache: Any, step: Step = None
    ) -> tuple[Any, Any, Any]:
        """The arrays of a checkpoint, on the shardings that are asked for.

        Args:
          params, optimizer, cache: trees of jax.ShapeDtypeStruct with shardings.
          step: which checkpoint.

        Returns:
          params, optimizer and cache.

        Raises:
          UserError: no such checkpoint, or it cannot be read.
        """
        trees = _by_name(params, optimizer, cache)
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
        # Orbax, TensorStore and JSON each raise their own kinds for a damaged file.
        except Exception as error:
            message = first_line(error)[:MESSAGE_LENGTH]
            raise DamagedError(
                f"checkpoint {step} in {self.workdir} cannot be read: {message}"
            ) from error


def _by_name(params: Any, optimizer: Any, cache: Any) -> dict[str, Any]:
    """The arrays as Orbax stores them; it stores trees, and the cache is a single array."""
    return {"params": params, "optimizer": optimizer, "cache": {"states": cache}}


def on_one_device(tree: Any) -> Any:
    """The same tree as jax.ShapeDtypeStruct, each array whole on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
