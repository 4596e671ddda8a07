"""The GPU kernels of the backward pass, in the order in which they run.

The logits are recomputed (as in FlashAttention, Dao et al. 2022, arXiv 2205.14135) from one
log-sum-exp per query. With weights p, their gradients dp and delta = sum(p dp) = out . d_out, a
logit's gradient is p (dp - delta).

    key_gradients         visits every logit once: gradients of keys, values and span; the gradient
                          of the logit, before the scale, replaces its part by position in the
                          scratch array, for the next two
    query_gradients       gradients of the queries
    position_gradients    partial sums of the gradient of the position table
    position_sums         their sum, once at the end
    persistent_gradients  gradients of persistent keys and values, once at the end

No two programs add to the same number, so results do not depend on the order in which programs run.
`tests/attention` compares every gradient with that of the reference. A kernel's name is that of its
function: profiles show it.

Dimension key: T query of the tile, C key of the tile, D distance of the tile (farthest first), N
persistent pair of the tile, K head width, X any.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from allattn.attention.contract import Static
from allattn.attention.gpu.forward import pair_logits
from allattn.attention.gpu.head_row import (
    HeadRow,
    Sizes,
    TileRange,
    for_each_tile,
    for_head_row,
    indices,
)
from allattn.attention.gpu.memory import (
    Refs,
    exp2,
    load,
    load_by_column,
    load_by_key,
    load_keys,
    load_pairs,
    load_positions,
    load_queries,
    load_statistic,
    store,
    store_at,
    zeros,
)
from allattn.attention.numerics import LOG2_E, NT_DIMENSIONS, TN_DIMENSIONS, dot
from allattn.attention.span import MAX_MASK_DERIVATIVE

Array = jax.Array

# Of weights that no maximum bounds: so that inf x 0, which is not a number, cannot arise.
LARGEST_WEIGHT = 1e30


# --- what several kernels share -------------------------------------------------------------------


class QueryTile(NamedTuple):
    """A tile of queries, with what the backward pass knows of each."""

    query_T1: Array
    query_TK: Array
    d_out_TK: Array
    lse_T1: Array
    delta_T1: Array


def _load_query_tile(inputs: Any, head_row: HeadRow, tile: Array) -> QueryTile:
    query_T1 = head_row.queries(tile)
    return QueryTile(
        query_T1=query_T1,
        query_TK=load_queries(inputs.query, head_row, query_T1),
        d_out_TK=load_queries(inputs.d_out, head_row, query_T1),
        lse_T1=load_statistic(inputs.lse, head_row, query_T1),
        delta_T1=load_statistic(inputs.delta, head_row, query_T1),
    )


def _before_dropout(static: Static, keeps: Array | None, d_weight: Array) -> Array:
    """Gradients of the weights before dropout from those of the weights after it."""
    if keeps is None:
        return d_weight
    return jnp.where(keeps, d_weight, 0) * (1 / (1 - static.dropout_rate))


class PairTile(NamedTuple):
    """A tile of persistent pairs."""

    tile: Array
    key_NK: Array
    value_NK: Array
    # reference to what is added to the logits, (H N); None: nothing is
    bias: Any


def _pair_gradients(head_row: HeadRow, pairs: PairTile, queries: QueryTile) -> tuple[Array, Array]:
    """Gradients of a tile of logits of persistent pairs, and the weights.

    Args:
      head_row: whose queries and pairs.
      pairs: a tile of pairs.
      queries: a tile of queries.

    Returns:
      d_logits_TN, before the scale, in float32, and the weights that dropout keeps, in the values'
      dtype.
    """
    static = head_row.static
    sizes = head_row.sizes
    pair_1N = indices(pairs.tile, sizes.key_tile, 1)
    keeps_TN = head_row.keeps_pairs(queries.query_T1, pair_1N)

    # The weights again, from the log-sum-exp.
    logits_TN = pair_logits(head_row, pair_1N, queries.query_TK, pairs.key_NK, pairs.bias)
    weight_TN = exp2(sizes, logits_TN - queries.lse_T1 * LOG2_E)

    # Their gradients, and those of the logits.
    d_kept_TN = dot(queries.d_out_TK, pairs.value_NK, NT_DIMENSIONS)
    d_weight_TN = _before_dropout(static, keeps_TN, d_kept_TN)
    d_logits_TN = weight_TN * (d_weight_TN - queries.delta_T1)
    kept_TN = weight_TN
    if keeps_TN is not None:
        kept_TN = jnp.where(keeps_TN, weight_TN, 0)
    return d_logits_TN, kept_TN.astype(pairs.value_NK.dtype)


# --- keys, values and span ------------------------------------------------------------------------


class KeyGradientInputs(NamedTuple):
    """What `key_gradients` reads."""

    # (B T, H K) and (B S, H K)
    query: Any
    key: Any
    value: Any
    d_out: Any
    # (B H T)
    lse: Any
    delta: Any


class KeyGradientOutputs(NamedTuple):
    """What `key_gradients` writes."""

    # (B S, H K)
    d_key: Any
    d_value: Any
    # (B H, programs of a head row), times the ramp
    d_span: Any
    # the scratch array: gradients of logits, before the scale, replace the logits by position
    logits: Any = None


KeyRefs = Refs[KeyGradientInputs, KeyGradientOutputs]


class KeyTile(NamedTuple):
    """A tile of context keys, with their values."""

    key_C1: Array
    key_CK: Array
    value_CK: Array


class KeySums(NamedTuple):
    """What adds up over the queries of a tile of keys, before scale and dropout."""

    d_key_CK: Array
    d_value_CK: Array
    # a scalar, over all tiles of keys of the program
    d_span: Array


def key_gradients(static: Static, sizes: Sizes, refs: KeyRefs) -> None:
    """Grid (program, head row): gradients of keys and values, tile by tile, and of the span.

    Tiles of pairs are held with keys in rows, so that no weight is transposed for the products over
    queries. The tiles of keys are dealt out to the programs of a head row one by one.
    """
    programs = pl.num_programs(0)
    for_head_row(static, sizes, refs.scalars, functools.partial(_key_gradients, refs, programs))


def _key_gradients(refs: KeyRefs, programs: Any, head_row: HeadRow, program: Array) -> None:
    sizes = head_row.sizes
    first, last = head_row.tiles_between(head_row.oldest, head_row.newest)

    # The program's tiles within reach.
    def within_reach(i: Array, d_span: Array) -> Array:
        return _one_key_tile(refs, head_row, first + program + i * programs, d_span)

    tiles = _share(last - first + 1, program, programs)
    d_span = jax.lax.fori_loop(0, tiles, within_reach, jnp.float32(0))
    refs.outputs.d_span[head_row.number, program] = d_span

    # Keys that no query can see: their gradients are 0.
    def beyond_reach(i: Array, _: None) -> None:
        tile = program + i * programs

        @pl.when((tile < first) | (tile > last))
        def _store_zeros() -> None:
            zeros_CK = zeros(sizes, sizes.key_tile)
            _store_keys(refs, head_row, tile, zeros_CK, zeros_CK)

    tiles = _share(pl.cdiv(sizes.S, sizes.key_tile), program, programs)
    jax.lax.fori_loop(0, tiles, beyond_reach, None)


def _share(tiles: Any, program: Array, programs: Any) -> Array:
    """How many of some tiles are a program's, if programs take them in turn."""
    return jax.lax.div(jnp.maximum(tiles - program + programs - 1, 0), programs)


def _one_key_tile(refs: KeyRefs, head_row: HeadRow, tile: Array, d_span: Array) -> Array:
    """Store the gradients of a tile of keys and values, and add to the sum of the span's."""
    static = head_row.static
    sizes = head_row.sizes
    key_C1 = indices(tile, sizes.key_tile, 0)
    key_CK = load_keys(refs.inputs.key, head_row, key_C1)
    value_CK = load_keys(refs.inputs.value, head_row, key_C1)

    # Over all queries that see a key of the tile.
    keys = KeyTile(key_C1, key_CK, value_CK)
    add_queries = functools.partial(_add_queries, refs, head_row, keys)
    zeros_CK = zeros(sizes, sizes.key_tile)
    sums = KeySums(zeros_CK, zeros_CK, d_span)
    tiles = head_row.query_tiles(tile)
    unmasked = head_row.unmasked_query_tiles(tile)
    sums = for_each_tile(tiles, unmasked, add_queries, sums)

    d_key_CK = sums.d_key_CK * static.scale
    d_value_CK = sums.d_value_CK / (1 - static.dropout_rate)
    _store_keys(refs, head_row, tile, d_key_CK, d_value_CK)
    return sums.d_span


def _add_queries(
    refs: KeyRefs, head_row: HeadRow, keys: KeyTile, masked: bool, query_tile: Array, sums: KeySums
) -> KeySums:
    """The sums of a tile of keys with a tile of queries more."""
    static = head_row.static
    sizes = head_row.sizes
    inputs = refs.inputs
    scratch = refs.outputs.logits
    key_C1 = keys.key_C1

    # The queries, and what the backward pass knows of them.
    query_T1 = indices(query_tile, sizes.query_tile, 0)
    query_1T = indices(query_tile, sizes.query_tile, 1)
    query_TK = load_queries(inputs.query, head_row, query_T1)
    d_out_TK = load_queries(inputs.d_out, head_row, query_T1)
    lse_1T = load_statistic(inputs.lse, head_row, query_1T)
    delta_1T = load_statistic(inputs.delta, head_row, query_1T)

    # The weights again, before the span mask.
    keeps_CT = head_row.keeps_keys(query_1T, key_C1)
    exists_CT = head_row.exists(query_1T, key_C1) if masked else None
    by_position_CT = load_by_key(scratch, head_row, query_1T, key_C1, exists_CT)
    by_content_CT = dot(keys.key_CK, query_TK, NT_DIMENSIONS)
    logits_CT = (by_content_CT + by_position_CT) * (static.scale * LOG2_E)
    weight_CT = exp2(sizes, logits_CT - lse_1T * LOG2_E)

    # Gradients of the weights, less delta.
    d_kept_CT = dot(keys.value_CK, d_out_TK, NT_DIMENSIONS)
    d_weight_CT = _before_dropout(static, keeps_CT, d_kept_CT) - delta_1T

    # The mask m and its gradient, if it is not 1 everywhere. Where m = 0 nothing bounds the logit.
    d_span = sums.d_span
    if exists_CT is not None:
        ramp_CT = head_row.ramp(query_1T, key_C1, exists_CT)
        bare_CT = jnp.where(ramp_CT >= 0, jnp.minimum(weight_CT, LARGEST_WEIGHT), 0)
        d_mask_CT = jnp.minimum(bare_CT, MAX_MASK_DERIVATIVE) * d_weight_CT
        d_span += jnp.sum(jnp.where(ramp_CT <= 1, d_mask_CT, 0))
        weight_CT = bare_CT * jnp.minimum(ramp_CT, 1)

    # Gradients of the logits replace the logits by position, which nothing reads again.
    d_logits_CT = (weight_CT * d_weight_CT).astype(scratch.dtype)
    store_at(scratch, head_row.address(query_1T, key_C1), exists_CT, d_logits_CT)

    # Products over queries.
    kept_CT = weight_CT
    if keeps_CT is not None:
        kept_CT = jnp.where(keeps_CT, weight_CT, 0)
    d_key_CK = sums.d_key_CK + dot(d_logits_CT, query_TK)
    d_value_CK = sums.d_value_CK + dot(kept_CT.astype(d_out_TK.dtype), d_out_TK)
    return KeySums(d_key_CK, d_value_CK, d_span)


def _store_keys(
    refs: KeyRefs, head_row: HeadRow, tile: Array, d_key_CK: Array, d_value_CK: Array
) -> None:
    """Store the gradients of a tile of keys and values."""
    sizes = head_row.sizes
    key_C1 = indices(tile, sizes.key_tile, 0)
    for ref, value_CK in ((refs.outputs.d_key, d_key_CK), (refs.outputs.d_value, d_value_CK)):
        row_C1 = head_row.row * sizes.S + key_C1
        store(ref, sizes, head_row.head, row_C1, key_C1 < sizes.S, value_CK)


# --- queries --------------------------------------------------------------------------------------


class QueryGradientInputs(NamedTuple):
    """What `query_gradients` reads."""

    # (B T, H K), (B S, H K), and (H L, K), or (L, K) if heads share the table
    query: Any
    key: Any
    position: Any
    # (H N, K)
    persistent_key: Any
    persistent_value: Any
    # (B T, H K) and (B H T)
    d_out: Any
    lse: Any
    delta: Any
    # the scratch array, as `key_gradients` left it
    d_logits: Any
    # (H N); None: nothing is added to the pairs' logits
    persistent_bias: Any = None


class QueryGradientOutputs(NamedTuple):
    """What `query_gradients` writes, both (B T, H K)."""

    d_query: Any
    # None where the same queries ask keys and positions: d_query then has both parts
    d_position_query: Any = None


QueryRefs = Refs[QueryGradientInputs, QueryGradientOutputs]


def query_gradients(static: Static, sizes: Sizes, refs: QueryRefs) -> None:
    """Grid (query tile, head row): gradients of queries, from what `key_gradients` left."""
    for_head_row(static, sizes, refs.scalars, functools.partial(_query_gradients, refs))


def _query_gradients(refs: QueryRefs, head_row: HeadRow, query_tile: Array) -> None:
    static = head_row.static
    sizes = head_row.sizes
    inputs = refs.inputs
    queries = _load_query_tile(inputs, head_row, query_tile)

    def add_pairs(tile: Array, sum_TK: Array) -> Array:
        pair_N1 = indices(tile, sizes.key_tile, 0)
        key_NK = load_pairs(inputs.persistent_key, sizes, head_row.head, pair_N1)
        value_NK = load_pairs(inputs.persistent_value, sizes, head_row.head, pair_N1)
        pairs = PairTile(tile, key_NK, value_NK, inputs.persistent_bias)
        d_logits_TN, _ = _pair_gradients(head_row, pairs, queries)
        return sum_TK + dot(d_logits_TN.astype(key_NK.dtype), key_NK)

    def add_keys(masked: bool, tile: Array, sum_TK: Array) -> Array:
        key_C1 = indices(tile, sizes.key_tile, 0)
        key_1C = indices(tile, sizes.key_tile, 1)
        exists_TC = head_row.exists(queries.query_T1, key_1C) if masked else None
        d_logits_TC = load_by_key(inputs.d_logits, head_row, queries.query_T1, key_1C, exists_TC)
        return sum_TK + dot(d_logits_TC, load_keys(inputs.key, head_row, key_C1))

    def add_positions(masked: bool, tile: Array, sum_TK: Array) -> Array:
        column_D1 = indices(tile, sizes.key_tile, 0)
        column_1D = indices(tile, sizes.key_tile, 1)
        d_logits_TD = load_by_column(masked, inputs.d_logits, head_row, queries.query_T1, column_1D)
        return sum_TK + dot(d_logits_TD, load_positions(inputs.position, head_row, column_D1))

    # Persistent pairs and context keys.
    pair_tiles = pl.cdiv(sizes.N, sizes.key_tile)
    sum_TK = jax.lax.fori_loop(0, pair_tiles, add_pairs, zeros(sizes, sizes.query_tile))
    tiles = head_row.key_tiles(query_tile)
    sum_TK = for_each_tile(tiles, head_row.unmasked_key_tiles(query_tile), add_keys, sum_TK)

    # Position keys: in the same sum, unless queries of their own asked them.
    position_sum_TK = sum_TK if static.one_query else jnp.zeros_like(sum_TK)
    columns = TileRange(0, head_row.column_tiles - 1)
    unmasked = head_row.unmasked_column_tiles(query_tile)
    position_sum_TK = for_each_tile(columns, unmasked, add_positions, position_sum_TK)

    row_T1 = head_row.row * sizes.T + queries.query_T1
    exists_T1 = queries.query_T1 < sizes.T
    position_output = refs.outputs.d_query
    if not static.one_query:
        d_query_TK = sum_TK * static.scale
        store(refs.outputs.d_query, sizes, head_row.head, row_T1, exists_T1, d_query_TK)
        position_output = refs.outputs.d_position_query
    d_position_query_TK = position_sum_TK * static.scale
    store(position_output, sizes, head_row.head, row_T1, exists_T1, d_position_query_TK)


# --- position table -------------------------------------------------------------------------------


class PositionGradientInputs(NamedTuple):
    """What `position_gradients` reads."""

    # (B T, H K)
    position_query: Any
    # the scratch array, as `key_gradients` left it
    d_logits: Any


class PositionSums(NamedTuple):
    """Partial sums of the table's gradient: (H times partial sums of a head times key tile, K)."""

    sums: Any


class TableOutputs(NamedTuple):
    """What `position_sums` writes: (H L, K)."""

    d_table: Any


def position_gradients(
    static: Static, sizes: Sizes, refs: Refs[PositionGradientInputs, PositionSums]
) -> None:
    """Grid (partial sum, head): add a chunk of head rows to sums of the position table's gradient.

    The partial sums of a head are dealt out to the tiles of distances within reach: the fewer tiles
    there are, the more programs share the rows of each.
    """
    scalars = refs.scalars
    number = pl.program_id(0)
    head = pl.program_id(1)
    first = scalars.chunk[0]
    head_rows = scalars.chunk[1]
    tiles = pl.cdiv(scalars.reach_H[head], sizes.key_tile)
    parts = jax.lax.div(pl.num_programs(0), jnp.maximum(tiles, 1))

    @pl.when(number < tiles * parts)
    def _add_rows() -> None:
        tile = jax.lax.rem(number, tiles)
        part = jax.lax.div(number, tiles)
        column_1D = indices(tile, sizes.key_tile, 1)

        def add_row(row: Array, sum_DK: Array) -> Array:
            head_row = HeadRow.load(static, sizes, scalars, row * sizes.H + head)

            def add_queries(masked: bool, query_tile: Array, sum_DK: Array) -> Array:
                query_T1 = head_row.queries(query_tile)
                d_logits_TD = load_by_column(
                    masked, refs.inputs.d_logits, head_row, query_T1, column_1D
                )
                query_TK = load_queries(refs.inputs.position_query, head_row, query_T1)
                return sum_DK + dot(d_logits_TD, query_TK, TN_DIMENSIONS)

            query_tiles = TileRange(0, pl.cdiv(sizes.T, sizes.query_tile) - 1)
            unmasked = head_row.unmasked_query_tiles_of_columns(tile)
            return for_each_tile(query_tiles, unmasked, add_queries, sum_DK)

        # The chunk's rows of this head, and this part's share of them.
        end_head_row = first + head_rows
        first_row = _rows_before(sizes, head, first)
        end_row = _rows_before(sizes, head, end_head_row)
        next_part = part + 1
        begin = first_row + jax.lax.div((end_row - first_row) * part, parts)
        end = first_row + jax.lax.div((end_row - first_row) * next_part, parts)
        sum_DK = jax.lax.fori_loop(begin, end, add_row, zeros(sizes, sizes.key_tile))

        row_D1, exists_D1 = _rows_of_sum(sizes, head, number, pl.num_programs(0))
        before_DK = load(refs.before.sums, sizes, 0, row_D1, exists_D1)
        store(refs.outputs.sums, sizes, 0, row_D1, exists_D1, before_DK + sum_DK)


def _rows_before(sizes: Sizes, head: Array, head_row: Array) -> Array:
    """How many rows have this head before a head row: they are row * H + head."""
    return jax.lax.div(jnp.maximum(head_row - head + sizes.H - 1, 0), sizes.H)


def _rows_of_sum(sizes: Sizes, head: Array, number: Array, sums: Any) -> tuple[Array, Array]:
    """Where a partial sum lies, one row for each distance of its tile, and that it exists."""
    row_D1 = indices(head * sums + number, sizes.key_tile, 0)
    return row_D1, row_D1 >= 0


def position_sums(static: Static, sizes: Sizes, refs: Refs[PositionSums, TableOutputs]) -> None:
    """Grid (tile of distances, head): the gradient of the position table from its partial sums."""
    sums = refs.inputs.sums
    tile = pl.program_id(0)
    head = pl.program_id(1)
    sums_of_head = sums.shape[0] // sizes.H // sizes.key_tile
    reach = refs.scalars.reach_H[head]
    tiles = pl.cdiv(reach, sizes.key_tile)

    def add_part(part: Array, sum_DK: Array) -> Array:
        number = part * tiles + tile
        row_D1, exists_D1 = _rows_of_sum(sizes, head, number, sums_of_head)
        return sum_DK + load(sums, sizes, 0, row_D1, exists_D1)

    parts = jnp.where(tile < tiles, jax.lax.div(sums_of_head, jnp.maximum(tiles, 1)), 0)
    sum_DK = jax.lax.fori_loop(0, parts, add_part, zeros(sizes, sizes.key_tile))

    # Column 0 is the farthest distance within reach, row reach - 1 of the table. The tiles beyond
    # reach hold the rows from `reach` on, where the gradient is 0.
    column_D1 = indices(tile, sizes.key_tile, 0)
    beyond_D1 = column_D1 - tiles * sizes.key_tile + reach
    distance_D1 = jnp.where(tile < tiles, reach - 1 - column_D1, beyond_D1)
    exists_D1 = (distance_D1 >= 0) & (distance_D1 < sizes.L)
    row_D1 = head * sizes.L + distance_D1
    store(refs.outputs.d_table, sizes, 0, row_D1, exists_D1, sum_DK * static.scale)


# --- persistent pairs -----------------------------------------------------------------------------


class PersistentGradientInputs(NamedTuple):
    """What `persistent_gradients` reads."""

    # (B T, H K)
    query: Any
    # (H N, K)
    persistent_key: Any
    persistent_value: Any
    # (B T, H K) and (B H T)
    d_out: Any
    lse: Any
    delta: Any
    # (H N); None: nothing is added to the pairs' logits
    persistent_bias: Any = None


class PersistentGradientOutputs(NamedTuple):
    """What `persistent_gradients` writes."""

    # (groups H N, K)
    d_key: Any
    d_value: Any
    # (groups H N); None: nothing is added to the pairs' logits
    d_bias: Any = None


class PersistentSums(NamedTuple):
    """What adds up over queries, before scale and dropout."""

    d_key_NK: Array
    d_value_NK: Array
    d_bias_1N: Array | None


def persistent_gradients(
    static: Static, sizes: Sizes, refs: Refs[PersistentGradientInputs, PersistentGradientOutputs]
) -> None:
    """Grid (tile of pairs, head, group of rows): gradients of persistent pairs, by group."""
    inputs = refs.inputs
    tile = pl.program_id(0)
    head = pl.program_id(1)
    group = pl.program_id(2)
    groups = pl.num_programs(2)
    pair_N1 = indices(tile, sizes.key_tile, 0)
    key_NK = load_pairs(inputs.persistent_key, sizes, head, pair_N1)
    value_NK = load_pairs(inputs.persistent_value, sizes, head, pair_N1)
    pairs = PairTile(tile, key_NK, value_NK, inputs.persistent_bias)
    query_tiles = pl.cdiv(sizes.T, sizes.query_tile)

    def add_queries(i: Array, sums: PersistentSums) -> PersistentSums:
        row = jax.lax.div(i, query_tiles)
        query_tile = jax.lax.rem(i, query_tiles)
        head_row = HeadRow.load(static, sizes, refs.scalars, row * sizes.H + head)
        queries = _load_query_tile(inputs, head_row, query_tile)
        d_logits_TN, kept_TN = _pair_gradients(head_row, pairs, queries)
        factor_TN = d_logits_TN.astype(key_NK.dtype)
        d_key_NK = sums.d_key_NK + dot(factor_TN, queries.query_TK, TN_DIMENSIONS)
        d_value_NK = sums.d_value_NK + dot(kept_TN, queries.d_out_TK, TN_DIMENSIONS)
        d_bias_1N = None
        if sums.d_bias_1N is not None:
            d_bias_1N = sums.d_bias_1N + jnp.sum(d_logits_TN, axis=0, keepdims=True)
        return PersistentSums(d_key_NK, d_value_NK, d_bias_1N)

    # All tiles of queries of the group's rows.
    next_group = group + 1
    begin = jax.lax.div(group * sizes.B, groups) * query_tiles
    end = jax.lax.div(next_group * sizes.B, groups) * query_tiles
    zeros_NK = zeros(sizes, sizes.key_tile)
    # Sums over queries; of offsets only where there are some.
    d_bias_1N = None
    if inputs.persistent_bias is not None:
        d_bias_1N = jnp.zeros((1, sizes.key_tile), jnp.float32)
    sums = PersistentSums(zeros_NK, zeros_NK, d_bias_1N)
    sums = jax.lax.fori_loop(begin, end, add_queries, sums)

    row_N1 = (group * sizes.H + head) * sizes.N + pair_N1
    exists_N1 = pair_N1 < sizes.N
    d_key_NK = sums.d_key_NK * static.scale
    store(refs.outputs.d_key, sizes, 0, row_N1, exists_N1, d_key_NK)
    d_value_NK = sums.d_value_NK / (1 - static.dropout_rate)
    store(refs.outputs.d_value, sizes, 0, row_N1, exists_N1, d_value_NK)
    # Offsets have one number for each pair, head by head as the rows.
    if sums.d_bias_1N is not None:
        pair_1N = indices(tile, sizes.key_tile, 1)
        index_1N = (group * sizes.H + head) * sizes.N + pair_1N
        store_at(refs.outputs.d_bias, index_1N, pair_1N < sizes.N, sums.d_bias_1N)
