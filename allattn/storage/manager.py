"""Orbax's manager of checkpoints, configured for this program.

- arrays are written as they are, not compressed
- the last few checkpoints are kept, and the best on dev; none is removed because its score cannot
  be read, nor before the newer one has its checksums (checksums.py)
- the path that Orbax sees has no character that it or TensorStore would take for something else
- what its threads say of a write that fails is left to the error itself, which names the reason
"""

import contextlib
import functools
import logging
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from allattn.sharding import processes
from allattn.storage import checksums

# The parts of a checkpoint that are trees of arrays; beside them lie meta and Orbax's metrics.
ARRAYS = ("params", "optimizer", "cache")

# Orbax finds files by patterns, and TensorStore turns a backslash into a slash and parses URLs.
NOT_PLAIN = ("[", "]", "*", "?", "\\", "gs:/")


# --- the path ------------------------------------------------------------------------------------


def is_plain(path: epath.Path) -> bool:
    """Whether Orbax and TensorStore take a path, or what follows gs://, as it is."""
    text = os.fspath(path).removeprefix("gs://")
    return not any(part in text for part in NOT_PLAIN)


@contextlib.contextmanager
def plain(folder: epath.Path) -> Iterator[epath.Path]:
    """The folder under a plain name: where it has none, by a link from the temporary folder."""
    if is_plain(folder):
        yield folder
        return
    # The link is gone when the checkpoints are closed.
    with tempfile.TemporaryDirectory(prefix="allattn-") as links:
        link = epath.Path(links) / folder.name
        os.symlink(folder, link)
        yield link


# --- failures of writing -------------------------------------------------------------------------


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave what a failing write says of itself to the error that is raised in the end.

    Orbax logs a traceback in each thread that comes to know of it.
    """
    _silence_late_writes()
    logger = logging.getLogger("absl")
    logger.addFilter(_is_no_traceback_of_orbax)
    try:
        yield
    finally:
        logger.removeFilter(_is_no_traceback_of_orbax)


@functools.cache
def _silence_late_writes() -> None:
    """Print nothing of writes that end when nobody waits for them any more.

    After one write has failed, Orbax gives the others up while TensorStore still makes them. Each
    then finds its event loop closed, the last ones when the process is about to end: so this stays.
    """
    show = sys.unraisablehook

    def show_others(told: Any) -> None:
        if str(told.exc_value) != "Event loop is closed":
            show(told)

    sys.unraisablehook = show_others
    logging.getLogger("asyncio").addFilter(_is_no_late_write)


def _is_no_late_write(record: logging.LogRecord) -> bool:
    # "OCDBT" is the format of TensorStore in which Orbax writes arrays.
    message = record.getMessage()
    return not ("exception was never retrieved" in message and "OCDBT" in message)


def _is_no_traceback_of_orbax(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "orbax" in record.pathname)


# --- scores and retention ------------------------------------------------------------------------


def score(metrics: dict[str, float | None]) -> float:
    """What decides the best checkpoint: lower is better, and those without a score come last."""
    value = metrics["dev_nll"]
    if value is None:
        return math.inf
    return value


class Manager(ocp.CheckpointManager):
    """Orbax's manager, but for some of its answers.

    Args:
      folder: of the checkpoints, under a plain name.
      keep: how many of the newest are kept.
      writes: False: nothing is changed, and what another process left half-written stays.
    """

    def __init__(self, folder: epath.Path, keep: int, writes: bool) -> None:
        super().__init__(folder, options=_options(keep, writes), handler_registry=_handlers())

    def metrics(self, step: int) -> Any:
        """A score that cannot be read counts as none; Orbax would refuse the whole workdir."""
        # A flipped bit makes another number of it, and another checkpoint the best.
        folder = self.directory / str(step)
        try:
            checksums.verify(folder, ["metrics"])
        except checksums.UnfinishedError:
            pass
        except checksums.DamagedError as error:
            logging.warning("a score counts as none: %s", error)
            return None
        try:
            return super().metrics(step)
        except ValueError:  # JSON's and Unicode's errors
            return None

    def close(self) -> None:
        """End Orbax's threads; one that failed says so at the first attempt, and stays."""
        try:
            super().close()
        except Exception:
            super().close()
            raise

    def reached_preemption(self, step: int) -> bool:
        """No: the training loop asks for itself.

        To ask twice would move the step that the processes agree on.
        """
        return False

    def _finalize_checkpoint(self, step: int) -> None:
        """Orbax has written this checkpoint and is about to remove older ones."""
        super()._finalize_checkpoint(step)
        # Its error ends the save before anything is removed.
        if not processes.index():
            checksums.write(self.directory / str(step))


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Arrays are written as they are: compressing saves little and takes a fifth of a save."""
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item in ARRAYS:
        # One kind of handler saves any tree; the other restores on the shardings it is shown.
        registry.add(item, ocp.args.PyTreeSave, ocp.PyTreeCheckpointHandler(use_compression=False))
        registry.add(item, ocp.args.StandardRestore, ocp.StandardCheckpointHandler())
    return registry


def _options(keep: int, writes: bool) -> ocp.CheckpointManagerOptions:
    """Keep the last few, and besides them the best on dev; only who writes may clean up."""
    policies = ocp.checkpoint_managers
    # To Orbax the best is the largest, so the order is reversed: the lowest loss. One whose score
    # cannot be read may be the best.
    best = policies.BestN(
        get_metric_fn=score, reverse=True, n=1, keep_checkpoints_without_metrics=True
    )
    newest = policies.LatestN(n=keep)
    return ocp.CheckpointManagerOptions(
        create=writes,
        preservation_policy=policies.AnyPreservationPolicy([newest, best]),
        best_fn=score,
        best_mode="min",
        cleanup_tmp_directories=writes,
    )
