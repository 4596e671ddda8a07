"""Where every array lives: one mesh, one table from path pattern to PartitionSpec.

Dimension key: X layer, B batch, T query position, S context key, L distance, N persistent pair, H
head, K head width, E all heads side by side, D model width, F inner unit, V vocabulary or cluster
of it, d width of a cluster's vectors.
"""

import contextlib
import math
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from allattn.attention import all_attention
from allattn.errors import UserError
from allattn.sharding import processes

Array = jax.Array

AXES = ("data", "fsdp", "tensor")
ROWS = (
    "data",
    "fsdp",
)  # the axes over which rows of the batch, and of the cache with them, are spread

# The first pattern found in an array's path decides. Optimizer state lies under the path of its
# parameter.
RULES: tuple[tuple[str, P], ...] = (
    (r"layers/(query|key|value)$", P(None, "fsdp", "tensor", None)),  # XDHK
    # what it projects has no rows: split by D, it would be summed over fsdp in place of being
    # gathered
    (r"layers/relative$", P(None, None, "tensor", None)),  # XDHK
    (r"layers/output$", P(None, "tensor", None, "fsdp")),  # XHKD
    (r"layers/persistent_(key|value)$", P(None, "tensor", "fsdp", None)),  # XHNK
    (r"layers/span$", P(None, "tensor")),  # XH
    (r"layers/(feed_forward/)?norm_(scale|bias)$", P()),  # XD
    (r"feed_forward/inner$", P(None, "fsdp", "tensor")),  # XDF
    (r"feed_forward/inner_bias$", P(None, "tensor")),  # XF
    (r"feed_forward/outer$", P(None, "tensor", "fsdp")),  # XFD
    (r"feed_forward/outer_bias$", P()),  # XD
    (r"io/(embedding|kernel)(/\d+)?$", P(None, "fsdp")),  # VD, Vd
    (r"io/(output_)?projection/\d+$", P("fsdp", None)),  # Dd
    (r"io/tail_kernel$", P(None, "fsdp")),  # one row of D for each tail
    (r"io/(bias(/\d+)?|tail_bias)$", P()),  # V
    (r"position/table$", P("fsdp", None)),  # LK
    (r"position/(content|distance)$", P("tensor", None)),  # HK
    (r"^cache$", P(None, ROWS)),  # XBSD
    (r"^(key|value)_XBSE$", P(None, ROWS, None, "tensor")),
    (r"(^step|^key|count|made)$", P()),
)

OPERATION = "all_attention"  # stands in the name of all that a mesh computes inside the operation

# The rarest words have a table that is narrower than fsdp may be wide, and small: every device then
# holds it whole.
NARROW = re.compile(r"io/(embedding|kernel)/\d+$")
# Looked up, or read by all layers: every device holds them whole while it computes.
TABLES = re.compile(r"io/|position/table$")

# XLA aborts a process whose CPU devices wait more than 40 s for each other, which those of a large
# model on CPU may.
PATIENCE = " ".join(
    f"--xla_cpu_collective_call_{what}_timeout_seconds=100000"
    for what in ("warn_stuck", "terminate")
)


def use_cores(rows: int, parts: int = 1, processes: int = 1) -> None:
    """Make one device per CPU core; call it before JAX is first used, later it has no effect.

    XLA runs most operations of one CPU device one after another, small ones on one core. With the
    rows spread over a
    device per core, all cores are busy: two cores then train 1.05 to 1.2 times as fast. GPUs and
      TPUs are not
    affected, and a number of CPU devices that the user has chosen stays.

    Args:
      rows: rows of the batch, a multiple of the number of devices of all processes.
      parts: divisor of that number.
      processes: how many there are; each has the same number of devices.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if (
        jax.config.values["jax_num_cpu_devices"] > 0
        or "xla_force_host_platform_device_count" in flags
    ):
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    fits = (n for n in range(1, cores + 1) if rows % (n * processes) == n * processes % parts == 0)
    devices = max(fits, default=1)
    with contextlib.suppress(RuntimeError):  # JAX runs already, as in a notebook: its devices stay
        jax.config.update("jax_num_cpu_devices", devices)
        os.environ["XLA_FLAGS"] = f"{flags} {PATIENCE}".strip()  # read when JAX is first used


def use_cores_for(config: ml_collections.ConfigDict) -> None:
    """`use_cores` for training: as many as the mesh names, or as cores and batch allow where it leaves that open."""
    sizes = [config.mesh[axis] for axis in AXES]
    parts = math.prod(size for size in sizes if size > 0)
    rows = config.train.batch // config.train.accumulation
    use_cores(rows if -1 in sizes else parts, parts, processes.count())


def mesh_over_rows() -> Mesh:
    """All devices, rows spread over them and parameters replicated."""
    return _mesh((jax.device_count(), 1, 1), jax.devices())


def _mesh(sizes: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """Devices of several TPU slices, which only a slower network joins, differ along `data` before anything else."""
    parts = (
        len({getattr(d, "slice_index", 0) for d in devices}) if devices[0].platform == "tpu" else 1
    )
    if sizes[0] % parts:
        raise UserError(f"mesh.data: expected a multiple of {parts} slices, found {sizes[0]}")
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    if parts > 1:
        array = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // parts, *sizes[1:]), (parts, 1, 1), **options
        )
    else:
        array = mesh_utils.create_device_mesh(tuple(sizes), **options)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def make_mesh(config: ml_collections.ConfigDict, chips: Sequence[Any] | None = None) -> Mesh:
    """The mesh data x fsdp x tensor; one axis of -1 takes what the others leave.

    Args:
      config: the whole configuration.
      chips: devices of the mesh, which need not be here; None: all that JAX sees.

    Returns:
      The mesh.

    Raises:
      UserError: the product does not fit the devices, the heads, the rows or the slices.
    """
    chips = jax.devices() if chips is None else chips
    sizes, devices = [config.mesh[axis] for axis in AXES], len(chips)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(
            f"mesh: expected positive sizes and at most one -1, found {dict(zip(AXES, sizes, strict=True))}"
        )
    rest = math.prod(size for size in sizes if size != -1)
    written, sizes = sizes, [devices // rest if size == -1 else size for size in sizes]
    if math.prod(sizes) != devices:
        found = " x ".join(map(str, written))
        raise UserError(f"mesh: expected data x fsdp x tensor = {devices} devices, found {found}")
    rows, heads = sizes[0] * sizes[1], heads_to_spread(config)
    if config.train.batch % (rows * config.train.accumulation):
        parts = f"data x fsdp x accumulation = {rows * config.train.accumulation}"
        raise UserError(f"train.batch: expected a multiple of {parts}, found {config.train.batch}")
    if heads % sizes[2]:
        two = f"1, as {config.model.integration} has heads of two kinds"
        expected = two if heads != config.model.heads else f"a divisor of {heads} heads"
        raise UserError(f"mesh.tensor: expected {expected}, found {sizes[2]}")
    return _mesh(sizes, chips)


def heads_to_spread(config: ml_collections.ConfigDict) -> int:
    """Heads that may be spread over `tensor`.

    Where the context and the persistent pairs have heads of their own, none: what a query projects
      would be sent from
    the devices of the ones to those of the others, in every layer.
    """
    return 1 if config.model.integration in ("head_split", "single_head") else config.model.heads


def shardings(mesh: Mesh, tree: Any) -> Any:
    """A NamedSharding for every array of a tree, by the table.

    Args:
      mesh: from `make_mesh`.
      tree: arrays or ShapeDtypeStructs.

    Returns:
      The same tree of NamedSharding.

    Raises:
      UserError: an axis of the mesh does not divide the dimension that it should split, other than
        of `NARROW`.
    """

    def sharding(path: tuple, array: Any) -> NamedSharding:
        name = _name(path)
        spec = next((spec for pattern, spec in RULES if re.search(pattern, name)), None)
        if spec is None:
            raise LookupError(f"{name}: no rule in sharding.RULES")
        for size, axes in zip(array.shape, spec, strict=False):
            parts = math.prod(
                mesh.shape[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ())
            )
            if size % parts and NARROW.search(name):
                spec = P()
            elif size % parts:
                raise UserError(
                    f"{name}: expected a dimension divisible by mesh axis {axes} = {parts}, found {size}"
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _name(path: tuple) -> str:
    return "/".join(
        str(getattr(key, "key", getattr(key, "name", getattr(key, "idx", "")))) for key in path
    )


def put_on_mesh(mesh: Mesh, tree: Any) -> Any:
    """Put arrays that every process holds whole on the mesh, by the table.

    Args:
      mesh: from `make_mesh` or `mesh_over_rows`.
      tree: arrays, the same on every process.

    Returns:
      The same tree of arrays over all processes.

    Raises:
      UserError: as `shardings`.
    """

    def placed(x: Array, sharding: NamedSharding) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)

    return jax.tree.map(placed, tree, shardings(mesh, tree))


def constrain(mesh: Mesh, tree: Any) -> Any:
    """Place values inside jitted code by the table."""
    return jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def gather_tables(mesh: Mesh | None, params: Any) -> Any:
    """Parameters inside jitted code, of which every device is to hold the tables whole from here on.

    Tables that are looked up must be: a lookup in a table whose columns are split would leave the
      partitioner to
    bring the columns of hidden states together. So is that of positions, which otherwise is
    gathered by its users.
    """
    if mesh is None:
        return params

    def whole(path: tuple, x: Array) -> Array:
        return (
            jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
            if TABLES.match(_name(path))
            else x
        )

    return jax.tree_util.tree_map_with_path(whole, params)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Of arrays whose leading dimension is rows."""
    return NamedSharding(mesh, P(ROWS))


def row_shards(mesh: Mesh) -> int:
    """Over how many groups of devices rows are spread."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


class Rows:
    """The rows of a batch on a mesh: which of them this process reads, and how they become one array.

    Args:
      mesh: from `make_mesh`.
      batch: rows over all processes.
    """

    def __init__(self, mesh: Mesh, batch: int) -> None:
        self._sharding, self._batch = row_sharding(mesh), batch
        places = self._sharding.addressable_devices_indices_map((batch,)).values()
        # In order, but not always without gaps: a mesh may give a process any rows.
        self.local = np.unique(
            np.concatenate([np.arange(batch)[index] for index in places if index is not None])
        )

    def place(self, local: np.ndarray) -> Array:
        """What this process read, an entry for each of its rows, as its part of the global array."""

        def shard(index: Any) -> np.ndarray:
            return local[np.searchsorted(self.local, np.arange(self._batch)[index[0]])]

        return jax.make_array_from_callback((self._batch, *local.shape[1:]), self._sharding, shard)


def attention_over(mesh: Mesh, rows: int) -> Callable[..., Any]:
    """The operation on a mesh: rows over data x fsdp, heads over tensor, no collective inside.

    Args:
      mesh: from `make_mesh`.
      rows: rows of the whole batch; with accumulation a call sees a part of each device's rows, and
        `row_offset` counts from the first row of each device.

    Returns:
      A function with the arguments of `all_attention`.
    """
    if mesh.size == 1:
        return all_attention
    rows_per_shard = rows // row_shards(mesh)

    def attention(query_BTHK, key_BSHK, value_BSHK, **options):
        by_row_head, by_head = P(ROWS, None, "tensor", None), P("tensor", None, None)
        specs = {
            "position_HLK": by_head if options["position_HLK"].shape[0] > 1 else P(),
            "position_query_BTHK": by_row_head,
            "persistent_key_HNK": by_head,
            "persistent_value_HNK": by_head,
            "span_H": P("tensor"),
            "key_start": P(),
            "dropout_seed": P(),
            "row_offset": P(),
        }
        arrays = {name: options.pop(name) for name in specs if options.get(name) is not None}
        arrays = {name: jax.numpy.asarray(array) for name, array in arrays.items()}

        def local(query_BTHK, key_BSHK, value_BSHK, arrays):
            first_row = jax.lax.axis_index(ROWS) * rows_per_shard + arrays.pop("row_offset", 0)
            first_head = jax.lax.axis_index("tensor") * query_BTHK.shape[2]
            offsets = {"row_offset": first_row, "head_offset": first_head}
            with jax.named_scope(OPERATION):
                return all_attention(
                    query_BTHK, key_BSHK, value_BSHK, **arrays, **offsets, **options
                )

        in_specs = (by_row_head, by_row_head, by_row_head, {name: specs[name] for name in arrays})
        out_specs = (
            (by_row_head, P(ROWS, None, "tensor"))
            if options.get("return_persistent_mass")
            else by_row_head
        )
        return jax.shard_map(
            local, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )(query_BTHK, key_BSHK, value_BSHK, arrays)

    return attention


def nll_over(mesh: Mesh | None) -> Callable[[Any, Array, Array], Array]:
    """The loss of every token on a mesh: rows over data x fsdp, no collective inside.

    Adaptive softmax gathers the tokens of all rows that belong to a tail. Left to the partitioner,
    that gather would collect rows from every device; here each device gathers among its own rows,
    and makes as many rounds as those need. The parameters of `io` are whole inside, and their
    gradients are summed over the devices on the way out. Devices along `tensor` repeat each other's
    work.

    Args:
      mesh: from `make_mesh`; None: one device.

    Returns:
      Function (io, h_BTD, targets_BT) -> nll_BT.
    """

    def local(io: Any, h_BTD: Array, targets_BT: Array) -> Array:
        return io.nll(h_BTD, targets_BT)

    if mesh is None or mesh.size == 1:
        return local
    rows = P(ROWS)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows, check_vma=False
    )
