"""The GPU kernels of the forward pass: logits by position, then one softmax for each query.

Relative-position logits need a skew: query t and key j meet at distance t - j, and Triton cannot
skew a tile in registers. So `logits_by_position` writes one plain product, queries times position
keys, to a scratch array, and `forward` reads it along its diagonals. The softmax is online (Milakov
and Gimelshein 2018, arXiv 1805.02867): it starts from the persistent pairs and continues over the
tiles of keys within reach. `tests/attention` compares both with the reference.

A kernel's name is that of its function: profiles show it.

Dimension key: T query of the tile, C key of the tile, D distance of the tile (farthest first), N
persistent pair of the tile, K head width, X any.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from allattn.attention.contract import Static
from allattn.attention.gpu.head_row import HeadRow, Sizes, for_each_tile, for_head_row, indices
from allattn.attention.gpu.memory import (
    Refs,
    exp2,
    load_by_key,
    load_keys,
    load_pair_bias,
    load_pairs,
    load_positions,
    load_queries,
    store,
    store_at,
    zeros,
)
from allattn.attention.numerics import LEAST_TOP, LOG2_E, NT_DIMENSIONS, dot, log_sum
from allattn.attention.span import MASKED_LOGIT

Array = jax.Array


def allocate(static: Static, sizes: Sizes, refs: Refs) -> None:
    """Grid (1,): do nothing; the outputs are arrays that were not written yet."""


# --- logits by position ---------------------------------------------------------------------------


class PositionLogitsInputs(NamedTuple):
    """What `logits_by_position` reads."""

    # (B T, H K) and (H L, K), or (L, K) if heads share the table
    position_query: Any
    position: Any


class PositionLogitsOutputs(NamedTuple):
    """What `logits_by_position` writes: the scratch array."""

    logits: Any


def logits_by_position(
    static: Static, sizes: Sizes, refs: Refs[PositionLogitsInputs, PositionLogitsOutputs]
) -> None:
    """Grid (query tile, head row): query times position key for all of the head row's distances."""
    work = functools.partial(_logits_by_position, refs)
    for_head_row(static, sizes, refs.scalars, work)


def _logits_by_position(
    refs: Refs[PositionLogitsInputs, PositionLogitsOutputs], head_row: HeadRow, query_tile: Array
) -> None:
    key_tile = head_row.sizes.key_tile
    logits = refs.outputs.logits
    query_T1 = head_row.queries(query_tile)
    query_TK = load_queries(refs.inputs.position_query, head_row, query_T1)

    def write_columns(tile: Array, _: None) -> None:
        # One tile of columns of the product; columns beyond reach belong to the next query.
        column_D1 = indices(tile, key_tile, 0)
        position_DK = load_positions(refs.inputs.position, head_row, column_D1)
        product_TD = dot(query_TK, position_DK, NT_DIMENSIONS)
        column_1D = indices(tile, key_tile, 1)
        address_TD = head_row.address_of_column(query_T1, column_1D)
        exists_TD = jnp.broadcast_to(column_1D < head_row.reach, address_TD.shape)
        store_at(logits, address_TD, exists_TD, product_TD.astype(logits.dtype))

    jax.lax.fori_loop(0, head_row.column_tiles, write_columns, None)


# --- forward --------------------------------------------------------------------------------------


class ForwardInputs(NamedTuple):
    """What `forward` reads."""

    # (B T, H K) and (B S, H K)
    query: Any
    key: Any
    value: Any
    # (H N, K)
    persistent_key: Any
    persistent_value: Any
    # the scratch array, as `logits_by_position` left it
    logits: Any
    # (H N); None: nothing is added to the pairs' logits
    persistent_bias: Any = None


class ForwardOutputs(NamedTuple):
    """What `forward` writes."""

    # (B T, H K)
    out: Any
    # (B H T): log-sum-exp, and the share of the weight on persistent pairs
    lse: Any
    mass: Any


class Softmax(NamedTuple):
    """The state of an online softmax, whose weights are 2^logit relative to the running maximum."""

    top_T1: Array
    # sums of weights, before dropout, and of weighted values, after it
    total_T1: Array
    sum_TK: Array

    def add(
        self,
        sizes: Sizes,
        logits_TX: Array,
        mask_TX: Array | None,
        keeps_TX: Array | None,
        value_XK: Array,
    ) -> "Softmax":
        """The state with a tile of keys or persistent pairs more.

        Args:
          sizes: static sizes of the call.
          logits_TX: logits times log2(e), float32; MASKED_LOGIT where a pair does not count.
          mask_TX: the span mask m; None: 1.
          keeps_TX: which weights dropout keeps; None: all.
          value_XK: values.

        Returns:
          The new state.
        """
        # Weights relative to the new maximum; what was summed so far shrinks with it.
        top_T1 = jnp.maximum(self.top_T1, jnp.max(logits_TX, axis=1, keepdims=True))
        weight_TX = exp2(sizes, logits_TX - top_T1)
        shrink_T1 = exp2(sizes, self.top_T1 - top_T1)
        if mask_TX is not None:
            weight_TX = weight_TX * mask_TX
        total_T1 = self.total_T1 * shrink_T1 + jnp.sum(weight_TX, axis=1, keepdims=True)

        # Dropout comes after the normalisation: a dropped weight stays in the total.
        if keeps_TX is not None:
            weight_TX = jnp.where(keeps_TX, weight_TX, 0)
        sum_TK = self.sum_TK * shrink_T1 + dot(weight_TX.astype(value_XK.dtype), value_XK)
        return Softmax(top_T1, total_T1, sum_TK)

    def log_sum(self) -> Array:
        """The natural logarithm of the sum of exp(logit)."""
        return log_sum(self.top_T1 / LOG2_E, self.total_T1)


class Queries(NamedTuple):
    """A tile of queries: their numbers and themselves."""

    query_T1: Array
    query_TK: Array


def forward(static: Static, sizes: Sizes, refs: Refs[ForwardInputs, ForwardOutputs]) -> None:
    """Grid (query tile, head row): one softmax over persistent pairs and every key within reach."""
    work = functools.partial(_forward, refs)
    for_head_row(static, sizes, refs.scalars, work)


def _forward(
    refs: Refs[ForwardInputs, ForwardOutputs], head_row: HeadRow, query_tile: Array
) -> None:
    sizes = head_row.sizes
    outputs = refs.outputs
    query_T1 = head_row.queries(query_tile)
    queries = Queries(query_T1, load_queries(refs.inputs.query, head_row, query_T1))

    # An empty softmax.
    top_T1 = jnp.full((sizes.query_tile, 1), LEAST_TOP, jnp.float32)
    softmax = Softmax(top_T1, jnp.zeros_like(top_T1), zeros(sizes, sizes.query_tile))

    # The persistent pairs come first, and what they amount to is kept.
    add_pairs = functools.partial(_add_pairs, refs.inputs, head_row, queries)
    softmax = jax.lax.fori_loop(0, pl.cdiv(sizes.N, sizes.key_tile), add_pairs, softmax)
    persistent_T1 = jnp.where(softmax.total_T1 > 0, softmax.log_sum(), MASKED_LOGIT)

    # Then the context keys within reach.
    add_keys = functools.partial(_add_keys, refs.inputs, head_row, queries)
    tiles = head_row.key_tiles(query_tile)
    unmasked = head_row.unmasked_key_tiles(query_tile)
    softmax = for_each_tile(tiles, unmasked, add_keys, softmax)

    # Divide by the sum. A query without any pair has the output 0.
    lse_T1 = softmax.log_sum()
    kept = 1 - head_row.static.dropout_rate
    total_T1 = jnp.where(softmax.total_T1 > 0, softmax.total_T1 * kept, 1)
    row_T1 = head_row.row * sizes.T + query_T1
    exists_T1 = query_T1 < sizes.T
    out_TK = softmax.sum_TK / total_T1
    store(outputs.out, sizes, head_row.head, row_T1, exists_T1, out_TK)

    # The statistics lie head row by head row.
    index_T1 = head_row.number * sizes.T + query_T1
    plgpu.store(outputs.lse.at[index_T1], lse_T1, mask=exists_T1)
    mass_T1 = jnp.exp(persistent_T1 - lse_T1)
    plgpu.store(outputs.mass.at[index_T1], mass_T1, mask=exists_T1)


def _add_pairs(
    inputs: ForwardInputs, head_row: HeadRow, queries: Queries, tile: Array, softmax: Softmax
) -> Softmax:
    """The softmax with a tile of persistent pairs more."""
    sizes = head_row.sizes
    pair_N1 = indices(tile, sizes.key_tile, 0)
    pair_1N = indices(tile, sizes.key_tile, 1)
    key_NK = load_pairs(inputs.persistent_key, sizes, head_row.head, pair_N1)
    logits_TN = pair_logits(head_row, pair_1N, queries.query_TK, key_NK, inputs.persistent_bias)
    keeps_TN = head_row.keeps_pairs(queries.query_T1, pair_1N)
    value_NK = load_pairs(inputs.persistent_value, sizes, head_row.head, pair_N1)
    return softmax.add(sizes, logits_TN, None, keeps_TN, value_NK)


def _add_keys(
    inputs: ForwardInputs,
    head_row: HeadRow,
    queries: Queries,
    masked: bool,
    tile: Array,
    softmax: Softmax,
) -> Softmax:
    """The softmax with a tile of context keys more."""
    sizes = head_row.sizes
    static = head_row.static
    query_T1 = queries.query_T1
    key_C1 = indices(tile, sizes.key_tile, 0)
    key_1C = indices(tile, sizes.key_tile, 1)

    # Logits by position and by content.
    exists_TC = head_row.exists(query_T1, key_1C) if masked else None
    by_position_TC = load_by_key(inputs.logits, head_row, query_T1, key_1C, exists_TC)
    key_CK = load_keys(inputs.key, head_row, key_C1)
    by_content_TC = dot(queries.query_TK, key_CK, NT_DIMENSIONS)
    logits_TC = (by_content_TC + by_position_TC) * (static.scale * LOG2_E)

    # The soft mask m of the span, where it is not 1 everywhere.
    mask_TC = None
    keeps_TC = head_row.keeps_keys(query_T1, key_1C)
    if exists_TC is not None:
        mask_TC = jnp.clip(head_row.ramp(query_T1, key_1C, exists_TC), 0, 1)
        logits_TC = jnp.where(mask_TC > 0, logits_TC, MASKED_LOGIT)
    value_CK = load_keys(inputs.value, head_row, key_C1)
    return softmax.add(sizes, logits_TC, mask_TC, keeps_TC, value_CK)


def pair_logits(
    head_row: HeadRow, pair_1N: Array, query_TK: Array, key_NK: Array, bias: Any
) -> Array:
    """Logits of a tile of persistent pairs times log2(e), without weight beyond the last one.

    Args:
      head_row: whose queries and pairs.
      pair_1N: numbers of the pairs.
      query_TK, key_NK: the queries and the pairs' keys.
      bias: reference to what is added, (H N); None: nothing is.
    """
    sizes = head_row.sizes
    logits_TN = dot(query_TK, key_NK, NT_DIMENSIONS) * (head_row.static.scale * LOG2_E)
    # A pair that does not exist is one that an offset removes.
    if bias is not None:
        return logits_TN + load_pair_bias(bias, sizes, head_row.head, pair_1N) * LOG2_E
    if sizes.N % sizes.key_tile == 0:
        return logits_TN
    return jnp.where(pair_1N < sizes.N, logits_TN, MASKED_LOGIT)
