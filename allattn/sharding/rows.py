"""The rows of a batch on a mesh: how they are spread, and which of them a process reads.

Rows are spread over the axes data and fsdp, and are the same along tensor. With eight rows on a
mesh of data 2 x fsdp 2 x tensor 1, on two processes of two devices each:

    device     0      1      2      3
    process    0      0      1      1
    rows      0,1    2,3    4,5    6,7

Each process reads its own rows alone (`Rows.local`); no process ever holds the whole batch.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from allattn.sharding.rules import ROWS


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first dimension is batch rows."""
    return NamedSharding(mesh, P(ROWS))


def row_shards(mesh: Mesh) -> int:
    """The number of groups of devices over which the rows of a batch are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class Rows:
    """The rows of a batch that this process reads, and the global array that all processes form.

    Args:
      mesh: from `make_mesh`.
      batch: rows over all processes.

    Attributes:
      local: indices of the rows of this process, ascending, int64.
    """

    def __init__(self, mesh: Mesh, batch: int) -> None:
        self._batch = batch
        self._sharding = row_sharding(mesh)
        # A slice of the batch for each device of this process.
        slices = self._sharding.addressable_devices_indices_map((batch,)).values()
        indices = [np.arange(batch)[index] for index in slices if index is not None]
        # Sorted, and once where devices along `tensor` share rows. There may be gaps: a mesh may
        # give a process any rows.
        self.local = np.unique(np.concatenate(indices))

    def place(self, local: np.ndarray) -> jax.Array:
        """The global array of which this process holds its own rows.

        Args:
          local: an entry for each row of `self.local`, in that order.

        Returns:
          Array of `batch` rows over all processes, split by `row_sharding`.
        """

        def rows_of_device(index: Any) -> np.ndarray:
            # From rows of the whole batch to entries of what this process has read.
            rows = np.arange(self._batch)[index[0]]
            return local[np.searchsorted(self.local, rows)]

        shape = (self._batch, *local.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, rows_of_device)
