"""Where every array lives on a mesh, and how several processes work as one run.

Read `rules.py` first: its table says how each array is split. Then `mesh.py` (the devices),
`rows.py` (the rows of a batch), `operation.py` (attention and loss on a mesh), `cpu.py` (devices
of a CPU), `processes.py` (agreement and common end of processes) and `compilation_cache.py`.
"""

from allattn.sharding.cpu import use_cores, use_cores_for
from allattn.sharding.mesh import heads_to_spread, make_mesh, mesh_over_rows
from allattn.sharding.operation import OPERATION, attention_over, nll_over
from allattn.sharding.rows import Rows, row_sharding, row_shards
from allattn.sharding.rules import (
    AXES,
    ROWS,
    RULES,
    constrain,
    gather_tables,
    put_on_mesh,
    shardings,
)

__all__ = [
    "AXES",
    "OPERATION",
    "ROWS",
    "RULES",
    "Rows",
    "attention_over",
    "constrain",
    "gather_tables",
    "heads_to_spread",
    "make_mesh",
    "mesh_over_rows",
    "nll_over",
    "put_on_mesh",
    "row_sharding",
    "row_shards",
    "shardings",
    "use_cores",
    "use_cores_for",
]
