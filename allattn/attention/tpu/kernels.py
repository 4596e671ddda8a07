"""The two TPU kernels: what one program does with its tile of queries and its tile of keys.

Relative-position logits are one product of the queries with a window of the reversed position
table, skewed in registers: row t moves t columns to the right. With 3 queries, 2 keys and numbers
that are distances (query t and key j are t - j + 5 apart),

    window of every query          skewed            of query t and key j
    t = 0   7  6 [5  4] 3          5  4
    t = 1   7 [6  5] 4  3    ->    6  5
    t = 2  [7  6] 5  4  3          7  6

The window begins at a whole register's column; where (query 0, key 0) lies in it is its `offset`, 2
here. The forward pass is an online softmax (Milakov and Gimelshein 2018, arXiv 1805.02867) that
starts from the persistent pairs. The backward pass recomputes the weights from one log-sum-exp per
query (as in FlashAttention, Dao et al. 2022, arXiv 2205.14135). `tests/attention` compares both
with the reference. Of a tile of queries `oldest` and `newest` are the first and the last key that
any of them can reach; gpu/head_row.py draws the band of queries and keys.

Dimension key: T query of the tile, C key of the tile, W column of the window of positions, N
persistent pair, K head width, X any; B row, H head, P head of the group that shares lanes, E the
group's heads side by side.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from allattn.attention import dropout
from allattn.attention.contract import Static
from allattn.attention.numerics import (
    LEAST_TOP,
    NT_DIMENSIONS,
    TN_DIMENSIONS,
    CallSizes,
    dot,
    log_sum,
)
from allattn.attention.span import MASKED_LOGIT, MAX_MASK_DERIVATIVE, ramp_position

Array = jax.Array

# Columns of a register.
LANES = 128
# Of a logit less the log-sum-exp, where the span mask is 0 and nothing bounds it: exp(80) x 0 is 0,
# inf x 0 is not a number.
LARGEST_EXCESS = 80


@dataclasses.dataclass(frozen=True)
class Sizes(CallSizes):
    """Static sizes of one call, T padded to whole tiles."""

    # P, side by side in one block
    heads: int

    @property
    def window(self) -> int:
        """Positions that a tile of queries and one of keys can need, from an aligned start."""
        return round_up(self.query_tile + self.key_tile, LANES) + LANES

    @property
    def left(self) -> int:
        """Rows of the position table before its first, so that every window lies inside."""
        return round_up(self.query_tile + self.key_tile, LANES)

    @property
    def positions(self) -> int:
        """Rows of the padded position table."""
        return round_up(self.left + self.L + self.query_tile + self.key_tile + self.window, LANES)

    @property
    def key_tiles(self) -> int:
        """Tiles of all keys."""
        return -(-self.S // self.key_tile)

    @property
    def key_steps(self) -> int:
        """The most key tiles that one query tile can reach."""
        return min(self.key_tiles, -(-(self.L + self.query_tile - 1) // self.key_tile) + 1)


def round_up(number: int, multiple: int) -> int:
    """The next multiple that is not below a number."""
    return -(-number // multiple) * multiple


# --- references -----------------------------------------------------------------------------------
# Each of these holds arrays, shapes or blocks in the caller, references to blocks in the kernel.


class Scalars(NamedTuple):
    """What is known before a kernel runs (scalar prefetch): small int32 arrays, float32 spans."""

    reach_H: Any
    span_H: Any
    query_start_B: Any
    key_start_B: Any
    # dropout seed, row offset, head offset
    seed_and_offsets: Any


class ForwardInputs(NamedTuple):
    """What the forward pass reads."""

    # (T, E) and (C, E)
    query: Any
    position_query: Any
    key: Any
    value: Any
    # (P, K, positions), reversed; or (1, K, positions) if heads share it
    position: Any
    # (P, N, K)
    persistent_key: Any
    persistent_value: Any


class ForwardOutputs(NamedTuple):
    """What the forward pass writes."""

    # (T, E)
    out: Any
    # (T, P): log-sum-exp, and the share of the weight on persistent pairs
    lse: Any
    mass: Any


class ForwardScratch(NamedTuple):
    """The state of the online softmax of a tile of queries, float32."""

    # (P, T, 1): running maximum, sum of weights, and log-sum-exp of the persistent pairs alone
    top: Any
    total: Any
    persistent_lse: Any
    # (P, T, K): weighted sum of values
    sums: Any


class BackwardInputs(NamedTuple):
    """What the backward pass reads: the inputs of the forward pass, and three more."""

    query: Any
    position_query: Any
    key: Any
    value: Any
    position: Any
    persistent_key: Any
    persistent_value: Any
    # (T, E)
    d_out: Any
    # (T, P): log-sum-exp, and out . d_out
    lse: Any
    delta: Any


class BackwardOutputs(NamedTuple):
    """What the backward pass writes; all but gradients of keys and values in float32."""

    # (all T, E)
    d_query: Any
    # (C, E)
    d_key: Any
    d_value: Any
    # (P, K, positions), or (1, K, positions) if heads share the table
    d_position: Any
    # (P, N, K)
    d_persistent_key: Any
    d_persistent_value: Any
    # (P, LANES), of which all columns are alike
    d_span: Any
    # (all T, E); None where the same queries ask keys and positions: d_query then has both parts
    d_position_query: Any = None


class BackwardScratch(NamedTuple):
    """Sums over queries for a tile of keys, (C, E) in float32."""

    d_key: Any
    d_value: Any


# --- what both kernels share ----------------------------------------------------------------------


class TilePosition:
    """Where one head's tile of queries lies among the keys.

    Attributes:
      first_query: number of the tile's first query.
      begin: key index at which that query sits.
      oldest, newest: keys within reach of any query of the tile; newest is -1 if there is none.
    """

    def __init__(
        self,
        static: Static,
        sizes: Sizes,
        scalars: Scalars,
        row: Array,
        query_tile: Array | int,
        head_reach: Array,
    ):
        self.static = static
        self.sizes = sizes
        self.first_query = query_tile * sizes.query_tile
        self.begin = scalars.query_start_B[row] + self.first_query
        # From the farthest key of the first query to the nearest of the last, if they exist.
        farthest = self.begin - (static.first_distance + head_reach - 1)
        newest = jnp.minimum(self.begin + sizes.query_tile - 1 - static.first_distance, sizes.S - 1)
        self.oldest = jnp.maximum(jnp.maximum(farthest, scalars.key_start_B[row]), 0)
        self.newest = jnp.where(head_reach > 0, newest, -1)

    def key_tile(self, step: Array | int) -> Array:
        """Tile of keys of a step, clamped to those within reach, so that nothing else is loaded."""
        last = jax.lax.div(jnp.maximum(self.newest, 0), self.sizes.key_tile)
        return jnp.minimum(jax.lax.div(self.oldest, self.sizes.key_tile) + step, last)

    def reaches(self, key_tile: Array) -> Array:
        """Whether any key of a tile is within reach of any query."""
        first = key_tile * self.sizes.key_tile
        oldest = jnp.maximum(self.oldest, first)
        newest = jnp.minimum(self.newest, first + self.sizes.key_tile - 1)
        return oldest <= newest

    def window(self, key_tile: Array) -> tuple[Array, Array]:
        """First row of the window in the padded, reversed table, and its offset.

        The offset is the column of (query 0, key 0) in the window.
        """
        nearest = self.begin - key_tile * self.sizes.key_tile - self.static.first_distance
        row = self.sizes.left + self.sizes.L - 1 - nearest
        first = jax.lax.div(row - (self.sizes.query_tile - 1), LANES) * LANES
        return pl.multiple_of(first, LANES), row - first

    def keys(self, key_tile: Array, x_CK: Array) -> Array:
        """Keys or values, zero where no query looks: what lies there may be anything."""
        first = key_tile * self.sizes.key_tile
        index_C1 = first + jax.lax.broadcasted_iota(jnp.int32, (x_CK.shape[0], 1), 0)
        return jnp.where((index_C1 >= self.oldest) & (index_C1 <= self.newest), x_CK, 0)

    def from_first_query(self, key_tile: Array) -> Array:
        """Indices of a tile's keys, counted from the block's first query, as (1, C)."""
        index_1C = jax.lax.broadcasted_iota(jnp.int32, (1, self.sizes.key_tile), 1)
        query_start = self.begin - self.first_query
        return key_tile * self.sizes.key_tile - query_start + index_1C

    def distances(self, key_tile: Array) -> tuple[Array, Array]:
        """Distance of every pair, and whether it exists."""
        shape = (self.sizes.query_tile, self.sizes.key_tile)
        row_TC = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        column_TC = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        index_TC = key_tile * self.sizes.key_tile + column_TC
        distance_TC = self.begin + row_TC - index_TC
        nearest = self.static.first_distance
        exists_TC = (distance_TC >= nearest) & (distance_TC < nearest + self.sizes.L)
        return distance_TC, exists_TC & (index_TC >= self.oldest) & (index_TC <= self.newest)


def group_reach(sizes: Sizes, reach_H: Any, group: Array) -> Array:
    """The farthest reach of a group of heads."""
    reaches = [reach_H[group * sizes.heads + p] for p in range(sizes.heads)]
    return functools.reduce(jnp.maximum, reaches)


def _rotate_rows(x_TW: Array, sign: int) -> Array:
    """Rotate row i by i columns to the right (sign 1) or left (-1).

    In two parts, i = 8 a + b: three rotations under a mask for b, and one of every eight rows by a
    fixed number of columns for a. Every TPU can do that; rotations with a stride v4 lacks, and no
    TPU has them to the left.
    """
    T, W = x_TW.shape
    row_TW = jax.lax.broadcasted_iota(jnp.int32, (T, W), 0)
    # b, bit by bit
    for bit in range(3):
        rotated_TW = pltpu.roll(x_TW, sign * (1 << bit) % W, 1)
        x_TW = jnp.where((row_TW >> bit) & 1 == 1, rotated_TW, x_TW)
    # a
    eights = [x_TW[row : row + 8] for row in range(0, T, 8)]
    return jnp.concatenate(
        [pltpu.roll(x, sign * 8 * a % W, 1) if a else x for a, x in enumerate(eights)]
    )


def _skew(x_TW: Array, offset: Any, columns: int) -> Array:
    """From the window's columns to the keys': out[i, c] = x[i, offset + c - i]."""
    return _rotate_rows(pltpu.roll(x_TW, x_TW.shape[1] - offset, 1), 1)[:, :columns]


def _unskew(x_TC: Array, offset: Any, window: int) -> Array:
    """The inverse of `_skew`, with zeros elsewhere."""
    T, C = x_TC.shape
    x_TW = jnp.concatenate([x_TC, jnp.zeros((T, window - C), x_TC.dtype)], axis=1)
    return pltpu.roll(_rotate_rows(x_TW, -1), offset, 1)


def _logits(
    static: Static,
    query_TK: Array,
    position_query_TK: Array,
    key_CK: Array,
    position_KW: Array,
    offset: Array,
) -> Array:
    """Logits of all pairs of a tile of queries and a tile of keys, as (T, C)."""
    by_position_TC = _skew(dot(position_query_TK, position_KW), offset, key_CK.shape[0])
    return (dot(query_TK, key_CK, NT_DIMENSIONS) + by_position_TC) * static.scale


def _dropout_factors(
    static: Static,
    tile: TilePosition,
    seed_and_offsets: Any,
    row: Array,
    head: Array,
    domain: int,
    index_1X: Array,
) -> Array:
    """Factors of the weights, 0 or 1 / (1 - rate)."""
    row_T1 = jax.lax.broadcasted_iota(jnp.int32, (tile.sizes.query_tile, 1), 0)
    query_T1 = tile.first_query + row_T1
    owner = (seed_and_offsets[0], seed_and_offsets[1] + row, seed_and_offsets[2] + head)
    # Hash the edges of the tile alone: a weight then costs three operations.
    words_T1 = dropout.query_words(*owner, query_T1, domain)
    column_1X = dropout.column_words(*owner, index_1X, domain)
    keeps_TX = dropout.keep(words_T1, column_1X, static.dropout_rate)
    return jnp.where(keeps_TX, 1 / (1 - static.dropout_rate), 0.0)


def _pair_gradients(
    logits_TN: Array,
    lse_T1: Array,
    delta_T1: Array,
    d_out_TK: Array,
    value_NK: Array,
    factor_TN: Array | None,
) -> tuple[Array, Array]:
    """Gradients of the logits of persistent pairs, and the weights.

    Args:
      logits_TN: logits of persistent pairs.
      lse_T1, delta_T1: log-sum-exp and out . d_out of every query.
      d_out_TK: gradients of the output.
      value_NK: persistent values.
      factor_TN: dropout's factors; None: 1.

    Returns:
      d_logits_TN and the weights after dropout, in the values' dtype.
    """
    weight_TN = jnp.exp(logits_TN - lse_T1)
    d_weight_TN = dot(d_out_TK, value_NK, NT_DIMENSIONS)
    dropped_TN = weight_TN
    if factor_TN is not None:
        d_weight_TN = d_weight_TN * factor_TN
        dropped_TN = weight_TN * factor_TN
    d_logits_TN = (weight_TN * (d_weight_TN - delta_T1)).astype(value_NK.dtype)
    return d_logits_TN, dropped_TN.astype(value_NK.dtype)


def _lanes(sizes: Sizes, p: int) -> slice:
    """The columns of the group's head p."""
    return slice(p * sizes.K, (p + 1) * sizes.K)


def _pair_index(sizes: Sizes) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (1, sizes.N), 1)


# --- forward --------------------------------------------------------------------------------------


def forward_kernel(
    static: Static,
    sizes: Sizes,
    scalars: Scalars,
    inputs: ForwardInputs,
    outputs: ForwardOutputs,
    scratch: ForwardScratch,
) -> None:
    """Grid (group, row, query tile, step over key tiles): an online softmax for each head."""
    top = scratch.top
    total = scratch.total
    sums = scratch.sums
    dtype = inputs.value.dtype
    group, row, query_tile, step = (pl.program_id(axis) for axis in range(4))

    # The steps of all heads of the group begin at the oldest key that any of them reaches.
    farthest = group_reach(sizes, scalars.reach_H, group)
    group_tile = TilePosition(static, sizes, scalars, row, query_tile, farthest)
    key_tile = group_tile.key_tile(0) + step

    def one_head(p: int) -> None:
        head = group * sizes.heads + p
        lanes = _lanes(sizes, p)
        tile = TilePosition(static, sizes, scalars, row, query_tile, scalars.reach_H[head])

        # First step: the softmax over the persistent pairs alone.
        @pl.when(step == 0)
        def _persistent() -> None:
            # An empty softmax.
            top[p] = jnp.full_like(top[p], LEAST_TOP)
            zeros_T1 = jnp.zeros_like(total[p])
            zeros_TK = jnp.zeros_like(sums[p])
            total[p] = zeros_T1
            sums[p] = zeros_TK
            scratch.persistent_lse[p] = jnp.full_like(top[p], MASKED_LOGIT)
            if sizes.N:
                query_TK = inputs.query[:, lanes]
                logits_TN = dot(query_TK, inputs.persistent_key[p], NT_DIMENSIONS) * static.scale
                top_T1 = jnp.max(logits_TN, axis=1, keepdims=True)
                weight_TN = jnp.exp(logits_TN - top_T1)
                total_T1 = jnp.sum(weight_TN, axis=1, keepdims=True)
                top[p] = top_T1
                total[p] = total_T1
                scratch.persistent_lse[p] = top_T1 + jnp.log(total[p])
                # Dropout comes after the normalisation: a dropped weight stays in the total.
                if static.dropout_rate:
                    weight_TN *= _dropout_factors(
                        static,
                        tile,
                        scalars.seed_and_offsets,
                        row,
                        head,
                        dropout.PERSISTENT,
                        _pair_index(sizes),
                    )
                sums[p] = dot(weight_TN.astype(dtype), inputs.persistent_value[p])

        # Every step whose tile of keys is within the head's reach.
        @pl.when(tile.reaches(key_tile))
        def _context() -> None:
            # Logits by content and by position.
            first, offset = tile.window(key_tile)
            table = 0 if sizes.shared else p
            position_KW = inputs.position[table, :, pl.ds(first, sizes.window)]
            key_CK = tile.keys(key_tile, inputs.key[:, lanes])
            value_CK = tile.keys(key_tile, inputs.value[:, lanes])
            query_TK = inputs.query[:, lanes]
            position_query_TK = inputs.position_query[:, lanes]
            logits_TC = _logits(static, query_TK, position_query_TK, key_CK, position_KW, offset)

            # The soft mask m of the span.
            distance_TC, exists_TC = tile.distances(key_tile)
            ramp_TC = ramp_position(distance_TC, scalars.span_H[head], static.ramp)
            mask_TC = jnp.where(exists_TC, jnp.clip(ramp_TC, 0, 1), 0)
            logits_TC = jnp.where(mask_TC > 0, logits_TC, MASKED_LOGIT)

            # Weights relative to the new maximum; what was summed so far shrinks with it.
            top_T1 = jnp.maximum(top[p], jnp.max(logits_TC, axis=1, keepdims=True))
            weight_TC = jnp.exp(logits_TC - top_T1) * mask_TC
            shrink_T1 = jnp.exp(top[p] - top_T1)
            total_T1 = total[p] * shrink_T1 + jnp.sum(weight_TC, axis=1, keepdims=True)
            top[p] = top_T1
            total[p] = total_T1
            if static.dropout_rate:
                weight_TC *= _dropout_factors(
                    static,
                    tile,
                    scalars.seed_and_offsets,
                    row,
                    head,
                    dropout.CONTEXT,
                    tile.from_first_query(key_tile),
                )
            sums[p] = sums[p] * shrink_T1 + dot(weight_TC.astype(dtype), value_CK)

        # Last step: divide by the sum. A query without any pair has the output 0.
        @pl.when(step == sizes.key_steps - 1)
        def _finish() -> None:
            total_T1 = jnp.where(total[p] > 0, total[p], 1)
            lse_T1 = log_sum(top[p], total[p])
            outputs.out[:, lanes] = (sums[p] / total_T1).astype(outputs.out.dtype)
            mass_T1 = jnp.exp(scratch.persistent_lse[p] - lse_T1)
            outputs.lse[:, p : p + 1] = lse_T1
            outputs.mass[:, p : p + 1] = mass_T1

    for p in range(sizes.heads):
        one_head(p)


# --- backward -------------------------------------------------------------------------------------


def backward_kernel(
    static: Static,
    sizes: Sizes,
    scalars: Scalars,
    inputs: BackwardInputs,
    outputs: BackwardOutputs,
    scratch: BackwardScratch,
) -> None:
    """Grid (group, row, key tile, query tile): all gradients, each for every head of the group.

    Gradients of keys and values add up over the queries of one key tile, which follow each other;
    every other gradient adds up over several key tiles.
    """
    dtype = inputs.query.dtype
    group, row, key_tile, query_tile = (pl.program_id(axis) for axis in range(4))
    first_query = pl.multiple_of(query_tile * sizes.query_tile, sizes.query_tile)
    rows = pl.ds(first_query, sizes.query_tile)
    # Where the same queries ask keys and positions, both parts of their gradient add up in one
    # array.
    d_query_outputs = [outputs.d_query]
    if outputs.d_position_query is not None:
        d_query_outputs.append(outputs.d_position_query)
    d_position_query = d_query_outputs[-1]

    # The sums begin at 0: those of the group, of the tile of keys, of the tile of queries.
    @pl.when((row == 0) & (key_tile == 0) & (query_tile == 0))
    def _start_group() -> None:
        for output in (
            outputs.d_position,
            outputs.d_persistent_key,
            outputs.d_persistent_value,
            outputs.d_span,
        ):
            output[...] = jnp.zeros_like(output)

    @pl.when(query_tile == 0)
    def _start_keys() -> None:
        zeros_key_CE = jnp.zeros_like(scratch.d_key)
        zeros_value_CE = jnp.zeros_like(scratch.d_value)
        scratch.d_key[...] = zeros_key_CE
        scratch.d_value[...] = zeros_value_CE

    @pl.when(key_tile == 0)
    def _start_queries() -> None:
        zeros_TE = jnp.zeros((sizes.query_tile, sizes.heads * sizes.K), jnp.float32)
        for output in d_query_outputs:
            output[rows] = zeros_TE

    def one_head(p: int) -> None:
        head = group * sizes.heads + p
        lanes = _lanes(sizes, p)
        tile = TilePosition(static, sizes, scalars, row, query_tile, scalars.reach_H[head])
        lse_T1 = inputs.lse[:, p : p + 1]
        delta_T1 = inputs.delta[:, p : p + 1]

        def persistent() -> None:
            query_TK = inputs.query[:, lanes]
            logits_TN = dot(query_TK, inputs.persistent_key[p], NT_DIMENSIONS) * static.scale
            factor_TN = None
            if static.dropout_rate:
                factor_TN = _dropout_factors(
                    static,
                    tile,
                    scalars.seed_and_offsets,
                    row,
                    head,
                    dropout.PERSISTENT,
                    _pair_index(sizes),
                )
            d_out_TK = inputs.d_out[:, lanes]
            value_NK = inputs.persistent_value[p]
            d_logits_TN, dropped_TN = _pair_gradients(
                logits_TN, lse_T1, delta_T1, d_out_TK, value_NK, factor_TN
            )
            outputs.d_query[rows, lanes] += (
                dot(d_logits_TN, inputs.persistent_key[p]) * static.scale
            )
            outputs.d_persistent_key[p] += (
                dot(d_logits_TN, inputs.query[:, lanes], TN_DIMENSIONS) * static.scale
            )
            outputs.d_persistent_value[p] += dot(dropped_TN, inputs.d_out[:, lanes], TN_DIMENSIONS)

        # The persistent pairs, once for every tile of queries.
        if sizes.N:
            pl.when(key_tile == 0)(persistent)

        # The tile of keys, if it is within the head's reach.
        @pl.when(tile.reaches(key_tile))
        def _context() -> None:
            # Logits again.
            first, offset = tile.window(key_tile)
            table = 0 if sizes.shared else p
            window = pl.ds(first, sizes.window)
            key_CK = tile.keys(key_tile, inputs.key[:, lanes])
            value_CK = tile.keys(key_tile, inputs.value[:, lanes])
            position_KW = inputs.position[table, :, window]
            query_TK = inputs.query[:, lanes]
            position_query_TK = inputs.position_query[:, lanes]
            logits_TC = _logits(static, query_TK, position_query_TK, key_CK, position_KW, offset)

            # Weights before the span mask m, then with it.
            distance_TC, exists_TC = tile.distances(key_tile)
            ramp_TC = ramp_position(distance_TC, scalars.span_H[head], static.ramp)
            counts_TC = exists_TC & (ramp_TC >= 0)
            excess_TC = jnp.minimum(logits_TC - lse_T1, LARGEST_EXCESS)
            bare_TC = jnp.where(counts_TC, jnp.exp(excess_TC), 0)
            weight_TC = bare_TC * jnp.clip(ramp_TC, 0, 1)

            # Gradients of the weights.
            d_weight_TC = dot(inputs.d_out[:, lanes], value_CK, NT_DIMENSIONS)
            dropped_TC = weight_TC
            if static.dropout_rate:
                factor_TC = _dropout_factors(
                    static,
                    tile,
                    scalars.seed_and_offsets,
                    row,
                    head,
                    dropout.CONTEXT,
                    tile.from_first_query(key_tile),
                )
                d_weight_TC = d_weight_TC * factor_TC
                dropped_TC = weight_TC * factor_TC

            # Gradient of the span, from the pairs on the ramp.
            d_mask_TC = jnp.minimum(bare_TC, MAX_MASK_DERIVATIVE) * (d_weight_TC - delta_T1)
            d_mask_TC = jnp.where((ramp_TC >= 0) & (ramp_TC <= 1), d_mask_TC, 0)
            outputs.d_span[p : p + 1] += jnp.sum(d_mask_TC) / static.ramp

            # Gradients of the logits, and by them those of what they are products of.
            d_logits_TC = weight_TC * (d_weight_TC - delta_T1) * static.scale
            d_window_TW = _unskew(d_logits_TC, offset, sizes.window).astype(dtype)
            outputs.d_query[rows, lanes] += dot(d_logits_TC.astype(dtype), key_CK)
            d_position_query[rows, lanes] += dot(d_window_TW, position_KW, NT_DIMENSIONS)
            outputs.d_position[table, :, window] += dot(
                inputs.position_query[:, lanes], d_window_TW, TN_DIMENSIONS
            )
            scratch.d_key[:, lanes] += dot(
                d_logits_TC.astype(dtype), inputs.query[:, lanes], TN_DIMENSIONS
            )
            scratch.d_value[:, lanes] += dot(
                dropped_TC.astype(dtype), inputs.d_out[:, lanes], TN_DIMENSIONS
            )

    for p in range(sizes.heads):
        one_head(p)

    # The last tile of queries completes the gradients of keys and values.
    @pl.when(query_tile == sizes.T // sizes.query_tile - 1)
    def _finish_keys() -> None:
        d_key_CE = scratch.d_key[...].astype(outputs.d_key.dtype)
        d_value_CE = scratch.d_value[...].astype(outputs.d_value.dtype)
        outputs.d_key[...] = d_key_CE
        outputs.d_value[...] = d_value_CE
