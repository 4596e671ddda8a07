"""Checkpoints by Orbax: params, optimizer, cache and meta, written together or not at all.

    workdir/checkpoints/STEP/    params  optimizer  cache  meta  metrics  checksums.json
    workdir/checkpoints-damaged/STEP/    what could not be read when a run was resumed

What this file adds to Orbax, which manager.py configures:
- a save copies the arrays and writes in the background, since the loop gives its arrays to the next
  step (one process; several must wait for each other and write at once)
- what is restored is compared with its checksums before (checksums.py)
- a damaged checkpoint is passed over for the one before it (`restore_newest`), and never deleted
- the best checkpoint on dev is kept besides the newest ones
- every mistake ends with one line, the same on all processes

tests/storage/test_checkpoint.py kills processes in the middle of a save and damages files.
"""

import contextlib
import functools
import importlib.metadata
import itertools
import json
import logging
import math
import os
from collections.abc import Callable, Collection, Iterator
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
from allattn.storage import checksums, paths
from allattn.storage.checksums import DamagedError
from allattn.storage.lock import WorkdirLock
from allattn.storage.manager import Manager, is_plain, plain, quiet, score

# A number, "best", "sound" or None for the newest.
Step = int | str | None
# params, optimizer, cache, meta
Restored = tuple[Any, Any, Any, dict[str, Any]]

# What scoring and sampling read.
MODEL = ("meta", "params")

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
    # On a disk a link stands for a path that Orbax would take for a pattern.
    path = epath.Path(workdir)
    if remote and not is_plain(path):
        raise UserError(f"workdir: expected a URL without * ? [ ] and \\, found {workdir}")
    # A URL has no relative form.
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
      create: make the folder, and hold the workdir's lock; False for readers, which refuse a
        workdir without one.
      force: take the lock over, whoever holds it.

    Raises:
      UserError: a reader finds no checkpoint, the workdir cannot be one, or another run holds it.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        keep: int = 3,
        create: bool = True,
        force: bool = False,
    ):
        self.workdir = os.fspath(workdir)
        # Process 0 makes or misses the folder first; then all must see the same one.
        prepare = functools.partial(_prepare_folder, self.workdir, create)
        self.folder = processes.first_on_leader("workdir", prepare)
        processes.require_same_text("workdir", str(self.folder), _folder_differences)
        self._writes = create
        self._lock: WorkdirLock | None = None
        # Before Orbax, which clears away what another run may be writing.
        with contextlib.ExitStack() as opened:
            if create:
                self._lock = opened.enter_context(WorkdirLock(self.workdir, force))
                opened.enter_context(quiet())
            folder = opened.enter_context(plain(self.folder))
            with paths.reached(self.folder):
                self._manager = Manager(folder, keep, create)
            self._opened = opened.pop_all()
        # Steps and items whose files are known to be as they were written.
        self._verified: set[tuple[int, str]] = set()

        # One save at a time is written in the background, from memory that the next one reuses.
        self._worker = ThreadPoolExecutor(1)
        self._pending: Future | None = None
        self._memory: list[np.ndarray] = []

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, _: object, error: BaseException | None, *__: object) -> None:
        # After any other error another process may be gone, and closing would wait for it.
        if not (processes.count() == 1 or error is None or isinstance(error, RunError)):
            self._opened.close()
            return
        # What ended the run is what its user is told, and not what followed from it.
        try:
            self.close()
        except RunError as failure:
            if error is None:
                raise
            # Orbax may say once more what has just been said.
            if str(failure) != str(error):
                logging.warning("%s", failure)

    def close(self) -> None:
        """Finish what is being written.

        Raises:
          RunError: it cannot be written.
        """
        # Whatever fails, the rest is closed.
        with self._opened, paths.written(self.folder):
            try:
                self._wait()
            finally:
                self._worker.shutdown()
                self._manager.close()

    def steps(self) -> list[int]:
        """Steps that have a whole checkpoint, oldest first; waits for one that is being written."""
        # The copy may still be on its way to Orbax, and Orbax's files on their way to the disk.
        self._wait()
        with paths.written(self.folder):
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

        Raises:
          RunError: this checkpoint or the one before it cannot be written; those before are whole.
        """
        # JSON has no word for NaN, and a NaN is no score.
        if dev_nll is not None and not math.isfinite(dev_nll):
            dev_nll = None
        trees = _by_name(params, optimizer, cache)
        self._wait()

        # Several processes write at once: Orbax makes them wait for each other on their devices,
        # which must come in the same order as the steps of the loop.
        if processes.count() > 1:
            self._write(step, trees, meta, dev_nll)
            return

        # One process copies, as the loop gives its arrays to the next step, and writes meanwhile.
        copies = self._copy(trees)
        self._pending = self._worker.submit(
            self._write, step, copies, meta, dev_nll, until_written=True
        )

    def score(self, step: int) -> float | None:
        """The score on dev of a checkpoint, in nats; None: it has none."""
        found = score(self._manager.metrics(step) or {"dev_nll": None})
        return found if math.isfinite(found) else None

    def add_score(self, step: int, dev_nll: float) -> None:
        """Give a checkpoint the score that it was saved without; it decides which is the best."""
        self._wait()
        # JSON has no word for NaN, and a NaN is no score.
        if not math.isfinite(dev_nll):
            return

        def write() -> None:
            if not processes.index():
                folder = self.folder / str(step)
                with paths.written(folder):
                    text = json.dumps({"dev_nll": dev_nll})
                    checksums.replace_file(folder, "metrics/metrics", text)

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
        dev_nll: float | None,
        until_written: bool = False,
    ) -> None:
        """Hand a checkpoint to Orbax; `until_written`: and wait, after which its memory is free."""
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        if self._lock is not None:
            self._lock.require_held()
        # From now on a missing file of checksums means that this checkpoint is not finished.
        told = {**meta, checksums.FLAG: True}
        composite = ocp.args.Composite(**items, meta=ocp.args.JsonSave(told))
        with paths.written(self.folder):
            self._manager.save(step, args=composite, metrics={"dev_nll": dev_nll})
            if until_written:
                self._manager.wait_until_finished()

    def _wait(self) -> None:
        """Wait for what the loop has handed over; raises what went wrong there."""
        # Forgotten before it is asked, so that its error is raised once.
        pending = self._pending
        self._pending = None
        if pending:
            pending.result()

    # --- which one

    def resolve(self, step: Step = None) -> int:
        """The number of the checkpoint asked for.

        Args:
          step: as `Step` says, also as text. The newest is the newest that is finished; "sound" is
            the newest whose files are as they were written.

        Raises:
          UserError: it is not there.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"no checkpoint in {self.workdir}: expected one under {self.folder}")
        if step is None:
            return self._newest(steps)
        if step == "best":
            return self._best(steps)
        if step == "sound":
            return self._sound(steps)
        # A command line brings the number as text.
        if not str(step).isdecimal() or int(step) not in steps:
            raise UserError(
                f"no checkpoint of step {step} in {self.workdir}: "
                f"expected best, sound or one of {steps}"
            )
        return int(step)

    def _newest(self, steps: list[int]) -> int:
        """The newest step, but for one whose process died before it was finished."""
        # Only the last one can be: a run goes on when the one before is finished.
        newest = steps[-1]
        if not checksums.is_unfinished(self.folder / str(newest)):
            return newest
        if len(steps) == 1:
            raise UserError(f"no checkpoint in {self.workdir}: that of step {newest} is unfinished")
        logging.warning("passed over: checkpoint %d in %s is unfinished", newest, self.workdir)
        return steps[-2]

    def _best(self, steps: list[int]) -> int:
        # Orbax calls a checkpoint best even where none has a score.
        best = self._manager.best_step()
        if best is None or score(self._manager.metrics(best)) == math.inf:
            raise UserError(
                f"no best checkpoint in {self.workdir}: none of {steps} has a score on dev"
            )
        return best

    def _sound(self, steps: list[int]) -> int:
        sound = self.sound_step(steps)
        if sound is None:
            raise UserError(
                f"no sound checkpoint in {self.workdir}: "
                f"expected one whose files are as their checksums say, found none among {steps}"
            )
        return sound

    def sound_step(self, steps: list[int]) -> int | None:
        """The newest of some steps whose model is as it was written, as process 0 sees it."""

        def find() -> str:
            for step in reversed(steps):
                with contextlib.suppress(DamagedError):
                    if checksums.verify(self.folder / str(step), MODEL):
                        return str(step)
            return ""

        found = processes.text_of_leader("sound", find)
        return int(found) if found else None

    # --- damage

    def _require_sound(self, step: int, items: Collection[str]) -> None:
        """Refuse, on every process, items whose files are not as they were written.

        Raises:
          DamagedError: names the file.
          UserError, RunError: a file cannot be reached.
        """
        # Each file is read once for this, however often it is restored.
        unknown = [item for item in items if (step, item) not in self._verified]
        if not unknown:
            return

        def find() -> str:
            try:
                checksums.verify(self.folder / str(step), unknown)
            except DamagedError as error:
                return str(error)
            return ""

        damage = processes.text_of_leader("checksums", find)
        if damage:
            raise self._damaged(step, damage)
        self._verified.update((step, item) for item in unknown)

    def _damaged(self, step: int, message: str) -> DamagedError:
        return DamagedError(f"checkpoint {step} in {self.workdir} cannot be read: {message}")

    @contextlib.contextmanager
    def parsing(self, step: int) -> Iterator[None]:
        """What the meta of a checkpoint says is parsed within; what makes no sense is damage.

        Args:
          step: of that checkpoint.

        Raises:
          DamagedError: in the place of the errors that nonsense causes.
        """
        try:
            yield
        except (UserError, RunError):
            raise
        except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            message = first_line(error)[:MESSAGE_LENGTH]
            place = checksums.place(self.folder / str(step))
            raise self._damaged(step, f"{place}/meta makes no sense: {message}") from error

    def restore_newest(
        self, abstract: Callable[[dict[str, Any]], tuple[Any, Any, Any]]
    ) -> Restored | None:
        """The newest checkpoint that can be read.

        Damaged and unfinished ones are passed over with a warning. Once an older one is read they
        are set aside, since the run is about to write these steps again and Orbax writes no step at
        or before its newest.

        Args:
          abstract: from meta to the abstract params, optimizer and cache.

        Returns:
          params, optimizer, cache and meta; None if there is no checkpoint at all, or only one that
          a process left unfinished. Where parameters alone were saved, optimizer and cache are
          None.

        Raises:
          UserError: there are checkpoints and all are damaged; also what `abstract` raises.
          RunError: a file cannot be reached, which says nothing of its content.
        """
        # From the newest to the oldest, until one can be read.
        steps = self.steps()
        damaged: list[int] = []
        for step in reversed(steps):
            try:
                restored = self._restore_whole(step, abstract)
            except DamagedError as error:
                logging.warning("passed over: %s", error)
                damaged.append(step)
                continue
            self._set_aside(damaged)
            return restored

        # A new workdir, one whose first checkpoint was never finished, or one where nothing is left
        # to resume from. The checkpoint of step 0 comes from elsewhere and cannot be made again.
        if damaged and not (len(steps) == 1 and steps[0] and self._left_unfinished(steps[0])):
            raise UserError(
                f"no checkpoint in {self.workdir} can be read: "
                f"tried {damaged} under {self.folder}; "
                f"put back a copy, or begin anew in another --workdir"
            )
        self._set_aside(damaged)
        return None

    def _left_unfinished(self, step: int) -> bool:
        """Whether process 0 sees that a process died before this checkpoint was finished."""
        folder = self.folder / str(step)
        found = processes.text_of_leader(
            "unfinished", lambda: "yes" * checksums.is_unfinished(folder)
        )
        return found == "yes"

    def _restore_whole(
        self, step: int, abstract: Callable[[dict[str, Any]], tuple[Any, Any, Any]]
    ) -> Restored:
        """All of one checkpoint, or its parameters where it has nothing else."""
        # What it says of itself gives the shapes to expect.
        meta = self.restore_meta(step)
        with self.parsing(step):
            params, optimizer, cache = abstract(meta)
        # Converted from another implementation: parameters alone.
        if meta.get("params_only"):
            return self.restore_params(params, step), None, None, meta
        return *self.restore(params, optimizer, cache, step), meta

    def _set_aside(self, steps: list[int]) -> None:
        """Move checkpoints that cannot be read out of the way; readers leave all as it is."""
        if not (self._writes and steps):
            return

        def move() -> None:
            if processes.index():
                return
            for step in steps:
                with paths.written(self.folder / str(step)):
                    place = _move_aside(self.folder / str(step))
                logging.warning("checkpoint %d is kept as %s", step, place)

        processes.first_on_leader("damaged", move)
        # Orbax knew them.
        self._manager.reload()
        self._verified = {known for known in self._verified if known[0] not in steps}

    def set_aside_from(self, step: int) -> None:
        """Move checkpoints out of the way whose parameters may be spoiled.

        Args:
          step: the first of them.

        Raises:
          RunError: one cannot be moved.
        """
        self._set_aside([known for known in self.steps() if known >= step])

    def restore_meta(self, step: Step = None) -> dict[str, Any]:
        """What a checkpoint says besides its arrays, from `describe`.

        Args:
          step: which checkpoint.

        Raises:
          UserError: no such checkpoint, or it cannot be read.
        """
        number = self.resolve(step)
        meta = self._restore(number, meta=ocp.args.JsonRestore())["meta"]
        with self.parsing(number):
            _check_meta(meta, number)
        meta.pop(checksums.FLAG, None)
        return meta

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
        """Items of a checkpoint by Orbax, once their files are known to be sound."""
        self._require_sound(step, items)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        # Orbax, TensorStore and JSON each raise their own kinds for a damaged file.
        except Exception as error:
            message = first_line(error)[:MESSAGE_LENGTH]
            if _is_out_of_reach(error):
                place = self.folder / str(step)
                raise RunError(f"{place}: expected to read it, found {message}") from error
            raise self._damaged(step, message) from error


def _is_out_of_reach(error: BaseException) -> bool:
    """Whether an error says nothing of a file's content, such as a permission that is missing."""
    if isinstance(error, OSError | MemoryError):
        return not isinstance(error, paths.ABSENT)
    # How TensorStore's messages begin.
    kind = str(error).partition(":")[0]
    return kind in ("PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED")


def _check_meta(meta: Any, step: int) -> None:
    """Raise ValueError or TypeError for what `describe` and the training loop cannot have written.

    A checkpoint with checksums has been verified; this is for those of before.
    """
    # A folder that was renamed, or a number that was changed.
    found = meta.get("step", step)
    if found != step:
        raise ValueError(f"expected step {step}, found {found}")
    if "config" in meta:
        json.loads(meta["config"])
    # The rest where it is there: numbers, lists of numbers, and an object.
    int(meta.get("bucket", 1))
    np.asarray(meta.get("key", []), np.uint32)
    dict(meta.get("vocabulary", {}))
    for number in dict(meta.get("spikes", {})).values():
        float(number)


def _move_aside(folder: epath.Path) -> str:
    """Move a checkpoint's folder into checkpoints-damaged; returns where it is, in the workdir."""
    aside = folder.parent.parent / f"{folder.parent.name}-damaged"
    # The same step may have been damaged before.
    target = aside / folder.name
    for number in itertools.count(2):
        if not target.exists():
            break
        target = aside / f"{folder.name}-{number}"
    paths.move(folder, target)
    return checksums.place(target)


def _by_name(params: Any, optimizer: Any, cache: Any) -> dict[str, Any]:
    """The arrays as Orbax stores them; it stores trees, and the cache is a single array."""
    return {"params": params, "optimizer": optimizer, "cache": {"states": cache}}


def on_one_device(tree: Any) -> Any:
    """The same tree as jax.ShapeDtypeStruct, each array whole on the first device."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree)
