"""What every implementation of the operation receives.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Static:
    """What is fixed when the operation is traced."""

    first_distance: int
    ramp: int
    dropout_rate: float
    scale: float
    whole_context: bool  # query_start is S - T and key_start 0, known when tracing
    one_query: bool  # the position logits use the same queries
    tiles: Any  # tile sizes of the implementation, from `tuning`


class Dynamic(NamedTuple):
    """Integers known only at run time."""

    query_start_B: Array
    key_start_B: Array
    dropout_seed: Array
    row_offset: Array
    head_offset: Array


class Inputs(NamedTuple):
    """Everything that has a gradient."""

    query_BTHK: Array
    position_query_BTHK: Array
    key_BSHK: Array
    value_BSHK: Array
    position_HLK: Array
    persistent_key_HNK: Array
    persistent_value_HNK: Array
    span_H: Array


def pack(
    query_BTHK, key_BSHK, value_BSHK, *, position_query_BTHK, position_HLK, persistent_key_HNK, persistent_value_HNK,
    span_H, first_distance, ramp, dropout_rate, scale, whole_context, one_query, tiles, **dynamic,
) -> tuple[Static, Inputs, Dynamic]:  # fmt: skip
    """The arguments of the operation by what an implementation does with them."""
    if (
        span_H is None
    ):  # every distance counts fully: a span of L puts the ramp behind the table's end
        span_H = jax.lax.stop_gradient(
            jnp.full(query_BTHK.shape[2], float(position_HLK.shape[1] + 1))
        )
        ramp = 1
    pairs = (persistent_key_HNK, persistent_value_HNK)
    inputs = Inputs(
        query_BTHK, position_query_BTHK, key_BSHK, value_BSHK, position_HLK, *pairs, span_H
    )
    static = Static(first_distance, ramp, dropout_rate, scale, whole_context, one_query, tiles)
    return static, inputs, Dynamic(**dynamic)


def seed_and_offsets(dynamic: Dynamic) -> Array:
    """Dropout seed, row offset and head offset as the kernels read them, int32 of shape (3,)."""
    # A seed of 32 bits keeps them all; its value as an integer may become negative.
    seed = jax.lax.bitcast_convert_type(dynamic.dropout_seed.astype(jnp.uint32), jnp.int32)
    return jnp.stack([seed, dynamic.row_offset, dynamic.head_offset]).astype(jnp.int32)
