"""What every implementation of the operation receives.

`all_attention` in `allattn.attention` checks its arguments, fills in the defaults and packs them
into three objects, sorted by what an implementation may do with them:

- `Static` is known when the code is traced and decides which code is built; it can be hashed.
- `Inputs` are the arrays that have a gradient. A backward pass returns one `Inputs` of gradients.
- `Dynamic` are integers known only when the code runs: they cost no recompilation and have no
  gradient.

The pairs of query and key that count form a band. Here T = 4 queries stand at the end of S = 12
keys, so query_start = 8; first_distance = 1, the table has L = 8 distances, the span is 3 and the
ramp R = 2. Time runs to the right:

    key j          0  1  2  3  4  5  6  7  8  9 10 11
    query 0        .  .  0  /  #  #  #  #  q             #  m = 1: the span
    query 1           .  .  0  /  #  #  #  #  q          /  0 < m < 1: on the ramp
    query 2              .  .  0  /  #  #  #  #  q       0  m = 0: the ramp's end, the last one
    query 3                 .  .  0  /  #  #  #  #  q       within reach: it has a gradient
                                                         .  in the table, but beyond the reach
    distance       8  7  6  5  4  3  2  1  0             q  the query itself: distance 0 is not
    (of query 0)                                            attended, as first_distance is 1

Keys before key_start and beyond S are missing from the band. Persistent pairs are not part of it:
every query sees all of them.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width.
"""

import dataclasses
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from allattn.attention.tuning import GpuTiles, TpuTiles, XlaTiles

Array = jax.Array

# The tile sizes of one implementation. `Static` without a parameter leaves open of which.
Tiles = TypeVar("Tiles", XlaTiles, TpuTiles, GpuTiles)


@dataclasses.dataclass(frozen=True)
class Static(Generic[Tiles]):
    """What is fixed when the operation is traced."""

    # The distance of the position table's row 0: 1, or 0 if the current token is attended.
    first_distance: int
    # Length R of the span's soft end, in tokens.
    ramp: int
    # Probability of dropping a weight after normalisation; 0: the code draws nothing.
    dropout_rate: float
    # Share of the sum without the span mask that the normaliser gains; 0: the code has no such sum.
    span_epsilon: float
    # Factor of every logit, persistent ones included.
    scale: float
    # Whether query_start is S - T and key_start 0: then the last T keys belong to the queries, and
    # every row's band lies at the same place.
    whole_context: bool
    # Whether position_query_BTHK is query_BTHK: then its gradient belongs to the query's, and the
    # position query's own is 0.
    one_query: bool
    # Tile sizes of the implementation, from `tuning.tiles`.
    tiles: Tiles


class Dynamic(NamedTuple):
    """Integers known only at run time."""

    # Where a row's first query and its first existing key lie among the keys; int32.
    query_start_B: Array
    key_start_B: Array
    # What dropout draws from; uint32 scalar.
    dropout_seed: Array
    # Global index of row 0 and of head 0, so that parts of a batch drop what the whole would.
    row_offset: Array
    head_offset: Array


class Inputs(NamedTuple):
    """Everything that has a gradient."""

    # What asks: the context and the persistent pairs, and (Transformer-XL) the position table.
    query_BTHK: Array
    position_query_BTHK: Array
    # The context, oldest first.
    key_BSHK: Array
    value_BSHK: Array
    # Row i is for distance first_distance + i; its H may be 1, shared by all heads.
    position_HLK: Array
    # The head's persistent pairs; N may be 0.
    persistent_key_HNK: Array
    persistent_value_HNK: Array
    # Learned spans in tokens, float32; L + 1 with a ramp of 1 where no span is learned.
    span_H: Array
    # Added to the pairs' logits, after the scale; None: nothing is, and no code is built for it.
    persistent_bias_HN: Array | None = None


def pack(
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    *,
    position_query_BTHK: Array,
    position_HLK: Array,
    persistent_key_HNK: Array,
    persistent_value_HNK: Array,
    persistent_bias_HN: Array | None,
    span_H: Array | None,
    first_distance: int,
    ramp: int,
    dropout_rate: float,
    span_epsilon: float,
    scale: float,
    whole_context: bool,
    one_query: bool,
    tiles: Tiles,
    **dynamic: Array,
) -> tuple[Static[Tiles], Inputs, Dynamic]:
    """Sort the operation's arguments by what an implementation does with them.

    Args: those of `all_attention`, checked and with values for all defaults, and the fields of
      `Static`; **dynamic are the fields of `Dynamic`.

    Returns:
      What an implementation's `all_attention(static, inputs, dynamic)` receives.
    """
    # Without spans every distance counts fully: a span of L + 1 puts the ramp behind the table.
    if span_H is None:
        heads = query_BTHK.shape[2]
        beyond_table = float(position_HLK.shape[1] + 1)
        span_H = jax.lax.stop_gradient(jnp.full(heads, beyond_table))
        ramp = 1
    static = Static(
        first_distance=first_distance,
        ramp=ramp,
        dropout_rate=dropout_rate,
        span_epsilon=span_epsilon,
        scale=scale,
        whole_context=whole_context,
        one_query=one_query,
        tiles=tiles,
    )
    inputs = Inputs(
        query_BTHK=query_BTHK,
        position_query_BTHK=position_query_BTHK,
        key_BSHK=key_BSHK,
        value_BSHK=value_BSHK,
        position_HLK=position_HLK,
        persistent_key_HNK=persistent_key_HNK,
        persistent_value_HNK=persistent_value_HNK,
        span_H=span_H,
        persistent_bias_HN=persistent_bias_HN,
    )
    return static, inputs, Dynamic(**dynamic)


def refuse_what_kernels_lack(name: str, static: Static, inputs: Inputs) -> None:
    """Refuse a call that no kernel supports.

    Args:
      name: of the implementation, for the message.
      static, inputs: of the call.

    Raises:
      NotImplementedError: there is a span_epsilon, or the dtype is neither float32 nor bfloat16.
    """
    if static.span_epsilon:
        raise NotImplementedError(f"{name}: expected span_epsilon 0, found {static.span_epsilon}")
    dtype = inputs.query_BTHK.dtype
    if dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"{name}: expected dtype float32 or bfloat16, found {dtype}")


def seed_and_offsets(dynamic: Dynamic) -> Array:
    """Dropout seed, row offset and head offset as the kernels read them, int32 of shape (3,)."""
    # A seed of 32 bits keeps them all; its value as an integer may become negative.
    seed = jax.lax.bitcast_convert_type(dynamic.dropout_seed.astype(jnp.uint32), jnp.int32)
    return jnp.stack([seed, dynamic.row_offset, dynamic.head_offset]).astype(jnp.int32)
