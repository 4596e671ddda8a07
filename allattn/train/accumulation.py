"""Mean gradients of a batch, which may be computed in parts one after another.

A batch whose activations do not fit in memory is cut into `parts`, whose gradients are added. On a
mesh the rows lie spread over `shards` devices, and a part takes an equal share of every device's
rows, so that no row moves and no device waits. 8 rows on 2 shards in 2 parts:

    rows of the batch       0 1   2 3   |   4 5   6 7        (rows,)
    reshape               [[0 1] [2 3]] | [[4 5] [6 7]]      (shards, parts, rows of a cell)
    parts first           [[0 1] | [4 5]] , [[2 3] | [6 7]]  (parts, shards, rows of a cell)
    reshape                 0 1  |  4 5   ,   2 3  |  6 7    (parts, rows of a part)

where | is the border between the devices. Cut in the order of the batch, part 0 would be rows 0 to
3: the first device would have all of it and the second nothing. tests/train/test_train.py holds
that accumulation changes no loss, and tests/planning/test_compile.py that it moves no rows.

Dimension key: X layer, A part of an accumulated batch, B batch rows, T position in the block, S
cached position, D model width.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from allattn.model import Params

Array = jax.Array


class BatchRows(NamedTuple):
    """What the loss reads of some rows of a batch."""

    cache_XBSD: Array
    inputs_BT: Array
    targets_BT: Array


class RowOutputs(NamedTuple):
    """What the loss gives besides its gradients, row by row; nothing here is differentiated."""

    # Mean negative log-likelihood of a row, in nats.
    nll_B: Array
    # Mean share of the attention weight on persistent pairs.
    mass_B: Array
    # Inputs of every layer, which the cache gains.
    new_XBTD: Array


# From params, rows and the index of each row in the whole batch to gradients and outputs.
GradientFn = Callable[[Params, BatchRows, Array], tuple[Params, RowOutputs]]


def mean_gradients(
    gradient_fn: GradientFn, params: Params, rows: BatchRows, parts: int, shards: int
) -> tuple[Params, RowOutputs]:
    """Gradients of the mean loss over all rows.

    Args:
      gradient_fn: gradients and outputs of some rows, whose loss is a mean over them.
      params: where the gradients are taken.
      rows: of the whole batch, B a multiple of parts x shards.
      parts: how many times `gradient_fn` runs, each time with B / parts rows.
      shards: devices that the rows are spread over.

    Returns:
      Gradients like params, and the outputs of all rows. With several parts nll_B and mass_B are
      (parts, rows of a part), in the order of the parts; new_XBTD is in the order of the batch.
    """
    zeros = jax.tree.map(jnp.zeros_like, params)
    # Dropout draws by the index in the whole batch, and so drops the same in any number of parts.
    row_B = jnp.arange(rows.inputs_BT.shape[0])

    def add_part(total: Params, part: tuple[BatchRows, Array]) -> tuple[Params, RowOutputs]:
        gradients, outputs = gradient_fn(params, *part)
        return jax.tree.map(jnp.add, total, gradients), outputs

    if parts == 1:
        return add_part(zeros, (rows, row_B))

    # One part after another: the scan keeps the activations of a single part.
    rows_by_part = BatchRows(
        split_rows(rows.cache_XBSD, parts, shards, axis=1),
        split_rows(rows.inputs_BT, parts, shards),
        split_rows(rows.targets_BT, parts, shards),
    )
    row_AB = split_rows(row_B, parts, shards)
    gradients, outputs = jax.lax.scan(add_part, zeros, (rows_by_part, row_AB))

    # The parts are equally large, so the mean of their means is the mean over all rows.
    gradients = jax.tree.map(lambda gradient: gradient / parts, gradients)
    new_XBTD = join_rows(outputs.new_XBTD, shards, axis=1)
    return gradients, outputs._replace(new_XBTD=new_XBTD)


def split_rows(x_BX: Array, parts: int, shards: int, axis: int = 0) -> Array:
    """Cut the rows, on `axis`, into parts on a new first axis; every shard keeps its rows."""
    before = x_BX.shape[:axis]
    after = x_BX.shape[axis + 1 :]
    rows = x_BX.shape[axis] // (shards * parts)

    # (shards, parts, rows of a cell) -> (parts, shards, rows of a cell), as in the picture above
    x_BX = x_BX.reshape(*before, shards, parts, rows, *after)
    x_AX = jnp.moveaxis(x_BX, axis + 1, 0)
    return x_AX.reshape(parts, *before, shards * rows, *after)


def join_rows(x_AX: Array, shards: int, axis: int = 0) -> Array:
    """The inverse of `split_rows`: parts on the first axis to rows on `axis` of the result."""
    parts = x_AX.shape[0]
    before = x_AX.shape[1 : axis + 1]
    after = x_AX.shape[axis + 2 :]
    rows = x_AX.shape[axis + 1] // shards

    # (parts, shards, rows of a cell) -> (shards, parts, rows of a cell)
    x_AX = x_AX.reshape(parts, *before, shards, rows, *after)
    x_BX = jnp.moveaxis(x_AX, 0, axis + 1)
    return x_BX.reshape(*before, parts * shards * rows, *after)
