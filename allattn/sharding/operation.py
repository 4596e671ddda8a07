"""Attention and loss on a mesh: each device computes on its own rows and heads and sends nothing.

XLA's partitioner does not look into a kernel, and would gather what a kernel reads. `shard_map`
says instead that the operation is local: rows over data x fsdp, heads over tensor.

                 tensor 0         tensor 1
    data 0     rows 0, heads 0  rows 0, heads 1      each box calls `all_attention` once, and tells
    data 1     rows 1, heads 0  rows 1, heads 1      it its first row and head for the dropout mask

What a step may send, and that nothing comes from inside the operation, is checked by
`allattn compile` (docs/scaling.md) and by tests/planning/test_compile.py.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width, D model width.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from allattn.attention import all_attention
from allattn.sharding.rows import row_shards
from allattn.sharding.rules import ROWS

Array = jax.Array

# The scope of all that is computed inside the operation on a mesh. It is part of the name of every
# instruction there, by which `allattn compile` recognises a collective that must not be inside.
OPERATION = "all_attention"


def attention_over(mesh: Mesh, rows: int) -> Callable[..., Any]:
    """The operation on a mesh: rows over data x fsdp, heads over tensor, no collective inside.

    Args:
      mesh: from `make_mesh`.
      rows: rows of the whole batch. With accumulation a call sees a part of each device's rows,
        and `row_offset` counts from the first row of each device.

    Returns:
      A function with the arguments of `all_attention`.
    """
    # On one device there is nothing to split.
    if mesh.size == 1:
        return all_attention
    rows_per_shard = rows // row_shards(mesh)
    by_row_head = P(ROWS, None, "tensor", None)  # BTHK, BSHK

    def attention(query_BTHK, key_BSHK, value_BSHK, **options):
        # Each device would find the largest span of its own heads.
        if options.get("span_epsilon") and mesh.shape["tensor"] > 1:
            raise NotImplementedError(
                "span_epsilon: expected all heads of a layer on a device, as mesh.tensor 1 has "
                f"them, for it depends on their largest span; found {mesh.shape['tensor']}"
            )
        # Arrays among the options are split as well; what is left in `options` is the same on all
        # devices, such as the length of the ramp.
        specs = _option_specs(options["position_HLK"])
        names = [name for name in specs if options.get(name) is not None]
        arrays = {name: jnp.asarray(options.pop(name)) for name in names}

        def on_device(query_BTHK, key_BSHK, value_BSHK, arrays):
            # Dropout depends on the row and the head in the whole batch, not on the device.
            first_row = jax.lax.axis_index(ROWS) * rows_per_shard + arrays.pop("row_offset", 0)
            first_head = jax.lax.axis_index("tensor") * query_BTHK.shape[2]
            offsets = {"row_offset": first_row, "head_offset": first_head}
            with jax.named_scope(OPERATION):
                return all_attention(
                    query_BTHK, key_BSHK, value_BSHK, **arrays, **offsets, **options
                )

        # The weight on persistent pairs has no last dimension: BTH.
        out_specs: Any = by_row_head
        if options.get("return_persistent_mass"):
            out_specs = (by_row_head, P(ROWS, None, "tensor"))
        # Unchecked, since a kernel does not say along which axes its result varies.
        split = jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(
                by_row_head,
                by_row_head,
                by_row_head,
                {name: specs[name] for name in arrays},
            ),
            out_specs=out_specs,
            check_vma=False,
        )
        return split(query_BTHK, key_BSHK, value_BSHK, arrays)

    return attention


def _option_specs(position_HLK: Array) -> dict[str, P]:
    """How the arrays among the options of `all_attention` are split, in the order they are passed.

    Args:
      position_HLK: keys of positions; all heads may share one, which is then not split.
    """
    by_row_head = P(ROWS, None, "tensor", None)
    by_head = P("tensor", None, None)
    position_spec = by_head if position_HLK.shape[0] > 1 else P()
    return {
        "position_HLK": position_spec,
        "position_query_BTHK": by_row_head,
        "persistent_key_HNK": by_head,
        "persistent_value_HNK": by_head,
        "persistent_bias_HN": P("tensor", None),
        "span_H": P("tensor"),
        # Numbers.
        "key_start": P(),
        "dropout_seed": P(),
        "row_offset": P(),
    }


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
      Function (io, h_BTD, targets_BT) -> nll_BT, where `io` is the network's input and output.
    """

    def nll(io: Any, h_BTD: Array, targets_BT: Array) -> Array:
        return io.nll(h_BTD, targets_BT)

    if mesh is None or mesh.size == 1:
        return nll
    # `io` is whole on every device: P().
    by_row = P(ROWS)
    return jax.shard_map(
        nll, mesh=mesh, in_specs=(P(), by_row, by_row), out_specs=by_row, check_vma=False
    )
