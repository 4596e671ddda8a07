"""How every array is split over the mesh: one table from an array's path to its PartitionSpec.

This is the page to review when the memory or the communication of a mesh changes. A mesh has three
axes:

    axis     what is spread over it                   what it costs in a step
    data     rows of the batch                        gradients are summed over it
    fsdp     rows, and a dimension of most arrays     parameters are gathered before they are used
    tensor   heads, and units of the feed-forward     activations are summed over it in every layer

The path of an array is its keys joined by "/", such as `layers/query` or `io/embedding/0`. The
first pattern that matches in it decides. The state of the optimizer lies under the path of its
parameter, so it is split like that parameter.

To add an array: add a row here. `test_one_rule_per_array` (tests/sharding/test_sharding.py) fails
for an array that no row or more than one row matches, and for a row that matches nothing. What the
change makes a step send is printed by `allattn compile` (docs/scaling.md).

Dimension key: X layer, B batch, S context key, L distance, N persistent pair, H head, K head width,
E all heads side by side, D model width, F inner unit, V vocabulary or cluster of it, d width of a
cluster's vectors.
"""

import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from allattn.errors import UserError

Array = jax.Array

# Every mesh has these axes, in this order; an axis that is not used has size 1.
AXES = ("data", "fsdp", "tensor")

# Rows of the batch, and of the cache with them, are spread over both of these.
ROWS = ("data", "fsdp")

RULES: tuple[tuple[str, P], ...] = (
    # Attention: heads over `tensor`, the model width over `fsdp`.
    (r"layers/(query|key|value)$", P(None, "fsdp", "tensor", None)),  # XDHK
    # The position projection of Transformer-XL has an input without rows. Split by D, its output
    # would be summed over `fsdp` instead of its kernel being gathered.
    (r"layers/relative$", P(None, None, "tensor", None)),  # XDHK
    (r"layers/output$", P(None, "tensor", None, "fsdp")),  # XHKD
    (r"layers/persistent_(key|value)$", P(None, "tensor", "fsdp", None)),  # XHNK
    (r"layers/(persistent|sink)_bias$", P(None, "tensor")),  # XHN
    (r"layers/(span|(persistent_)?(query|key)_gain|persistent_gain)$", P(None, "tensor")),  # XH
    (r"layers/gate$", P(None, "fsdp", "tensor")),  # XDH
    # Norms and scalars are small, so every device has them whole.
    (r"(layers|feed_forward|persistent_sublayer|final)/norm_(scale|bias)$", P()),  # XD, D
    (r"layers/.*(residual|branch|embedding)_scale$", P()),  # X
    # Feed-forward: inner units over `tensor`, as heads are.
    (r"feed_forward/inner$", P(None, "fsdp", "tensor")),  # XDF
    (r"feed_forward/inner_bias$", P(None, "tensor")),  # XF
    (r"feed_forward/outer$", P(None, "tensor", "fsdp")),  # XFD
    (r"feed_forward/outer_bias$", P()),  # XD
    # Input and output, plain (one table) or adaptive (a table for every cluster of words).
    (r"io/(embedding|kernel)(/\d+)?$", P(None, "fsdp")),  # VD, Vd
    (r"io/(output_)?projection/\d+$", P("fsdp", None)),  # Dd
    (r"io/tail_kernel$", P(None, "fsdp")),  # one row of D for each tail
    (r"io/(bias(/\d+)?|tail_bias)$", P()),  # V
    # Positions: distances over `fsdp`; what Transformer-XL adds to queries is one vector per head.
    (r"position/table$", P("fsdp", None)),  # LK
    (r"position/(content|distance)$", P("tensor", None)),  # HK
    # The cache of training (hidden states), and of scoring and generation (keys and values).
    (r"^cache$", P(None, ROWS)),  # XBSD
    (r"^(key|value)_XBSE$", P(None, ROWS, None, "tensor")),
    # Counters of the step and the optimizer, the coefficients that Muon keeps, and the key of the
    # random numbers.
    (r"(^step|^key|count|made|ns_coeffs)$", P()),
)

# The tables of the rarest words are small, and may be narrower than `fsdp` is wide. Where the axis
# does not divide them, every device has them whole.
NARROW = re.compile(r"io/(embedding|kernel)/\d+$")

# Tables that are looked up or that all layers read: whole on every device while it computes.
TABLES = re.compile(r"io/|position/table$")


# --- the table applied ---------------------------------------------------------------------------


def shardings(mesh: Mesh, tree: Any) -> Any:
    """The sharding of every array of a tree, by `RULES`.

    Args:
      mesh: a mesh with the axes `AXES`, which may be abstract.
      tree: arrays or ShapeDtypeStructs.

    Returns:
      The same tree of NamedSharding.

    Raises:
      UserError: an axis of the mesh does not divide the dimension that it should split, and the
        array is not one of `NARROW`.
      LookupError: no pattern matches the path of an array.
    """

    def sharding_of(path: tuple, array: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(mesh, _name(path), array.shape))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def put_on_mesh(mesh: Mesh, tree: Any) -> Any:
    """Put arrays that every process holds whole on the mesh, by `RULES`.

    Args:
      mesh: from `make_mesh` or `mesh_over_rows`.
      tree: arrays, the same on every process.

    Returns:
      The same tree of arrays over all processes.

    Raises:
      UserError: as `shardings`.
    """

    def put(x: Array, sharding: NamedSharding) -> Array:
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        # With several processes each one hands over the parts of its own devices.
        return jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__)

    return jax.tree.map(put, tree, shardings(mesh, tree))


def constrain(mesh: Mesh, tree: Any) -> Any:
    """Arrays inside jitted code, split by `RULES` from here on.

    Args:
      mesh: from `make_mesh` or `mesh_over_rows`.
      tree: traced arrays.

    Returns:
      The same tree of arrays with a sharding constraint on each.

    Raises:
      UserError: as `shardings`.
    """
    return jax.lax.with_sharding_constraint(tree, shardings(mesh, tree))


def gather_tables(mesh: Mesh | None, params: Any) -> Any:
    """Parameters inside jitted code, with the tables whole on every device from here on.

    A lookup in a table whose columns are split would make the partitioner gather the columns of
    the hidden states. The position table is gathered here too; otherwise every layer would gather
    it.

    Args:
      mesh: from `make_mesh`; None: one device, where there is nothing to gather.
      params: traced parameters, their paths beginning with `io`, `layers` or `position`.

    Returns:
      The same tree; arrays that `TABLES` matches have a sharding constraint.
    """
    if mesh is None:
        return params

    def gather(path: tuple, x: Array) -> Array:
        if TABLES.match(_name(path)):
            return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
        return x

    return jax.tree_util.tree_map_with_path(gather, params)


# --- looking an array up -------------------------------------------------------------------------


def _spec(mesh: Mesh, name: str, shape: tuple[int, ...]) -> P:
    """The PartitionSpec of the array of this name, whose dimensions the mesh must divide."""
    spec = _rule(name)
    # A spec may be shorter than the shape: the dimensions behind it are not split.
    for size, axes in zip(shape, spec, strict=False):
        parts = _parts(mesh, axes)
        if size % parts == 0:
            continue
        if NARROW.search(name):
            return P()
        raise UserError(
            f"{name}: expected a dimension divisible by mesh axis {axes} = {parts}, found {size}"
        )
    return spec


def _rule(name: str) -> P:
    """The spec of the first pattern in the table that matches in this name."""
    for pattern, spec in RULES:
        if re.search(pattern, name):
            return spec
    raise LookupError(f"{name}: no rule in sharding.RULES")


def _parts(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """The number of parts that an entry of a spec splits a dimension into."""
    if axes is None:
        return 1
    if isinstance(axes, str):
        return mesh.shape[axes]
    return math.prod(mesh.shape[axis] for axis in axes)


def _name(path: tuple) -> str:
    """A path of JAX's tree functions as text, its keys joined by "/"."""
    return "/".join(_key(key) for key in path)


def _key(key: Any) -> str:
    """One key of a path: of a dict, an attribute, or an index of a sequence."""
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return ""
