"""The GPU kernels of `allattn.attention.pallas_gpu`: what one program does with its queries, keys or distances.

Logits by position are one plain product, `logits_by_position`, written to a scratch array; the
other kernels read them along its diagonals. In the backward pass `key_gradients` puts the logits'
gradients in their place, for the two kernels after it. No two programs add to the same number, so
results do not depend on the order in which programs run.

Dimension key: T query of the tile, C key of the tile, D distance of the tile (farthest first), N
persistent pair of the tile, K head width, X any; B row, H head, U unit.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from allattn.attention.contract import Static
from allattn.attention.gpu.memory import (
    LOG2_E,
    SCALARS,
    Scalars,
    Sizes,
    Unit,
    exp2,
    for_tiles,
    for_unit,
    iota,
    load,
    load_by_distance,
    load_diagonal,
    load_keys,
    load_pairs,
    load_positions,
    load_queries,
    load_statistic,
    store,
    write,
    zeros,
)
from allattn.attention.numerics import dot, log_sum
from allattn.attention.span import MASKED_LOGIT, MAX_MASK_DERIVATIVE

Array = jax.Array


def allocate(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (1,): nothing; its outputs are arrays that were not written yet."""


# --- logits by position
# ------------------------------------------------------------------------------------------


def logits_by_position(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (query tile, unit): query times position key for all of the unit's distances."""
    scalars, (position_query, position, *_, logits) = Scalars(*refs[:SCALARS]), refs[SCALARS:]

    def work(unit: Unit, query_tile: Array) -> None:
        query_T1 = unit.queries(query_tile)
        query_TK = load_queries(position_query, sizes, unit, query_T1)

        def step(tile, _):
            column_D1 = tile * sizes.key_tile + iota(sizes.key_tile, 0)
            product_TD = dot(query_TK, load_positions(position, sizes, unit, column_D1), (1, 1))
            column_1D = tile * sizes.key_tile + iota(sizes.key_tile, 1)
            place = unit.place_of_column(query_T1, column_1D)
            write(
                logits,
                place,
                jnp.broadcast_to(column_1D < unit.reach, place.shape),
                product_TD.astype(logits.dtype),
            )

        jax.lax.fori_loop(0, unit.column_tiles, step, None)

    for_unit(static, sizes, scalars, work)


# --- forward
#
#
# -----------------------------------------------------------------------------------------------------


class Softmax(NamedTuple):
    """An online softmax: the running maximum, sum of weights, and weighted sum of values; weights are 2^logit."""

    top_T1: Array
    total_T1: Array
    sum_TK: Array

    def add(
        self,
        sizes: Sizes,
        logits_TX: Array,
        mask_TX: Array | None,
        keeps_TX: Array | None,
        value_XK,
    ) -> "Softmax":
        top_T1 = jnp.maximum(self.top_T1, jnp.max(logits_TX, axis=1, keepdims=True))
        weight_TX, shrink_T1 = exp2(sizes, logits_TX - top_T1), exp2(sizes, self.top_T1 - top_T1)
        weight_TX = weight_TX if mask_TX is None else weight_TX * mask_TX
        total_T1 = self.total_T1 * shrink_T1 + jnp.sum(weight_TX, axis=1, keepdims=True)
        weight_TX = weight_TX if keeps_TX is None else jnp.where(keeps_TX, weight_TX, 0)
        return Softmax(
            top_T1,
            total_T1,
            self.sum_TK * shrink_T1 + dot(weight_TX.astype(value_XK.dtype), value_XK),
        )

    def log_sum(self) -> Array:
        return log_sum(self.top_T1 / LOG2_E, self.total_T1)


def forward(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (query tile, unit): one softmax over the persistent pairs and every key within reach."""
    scalars = Scalars(*refs[:SCALARS])
    query, key, value, persistent_key, persistent_value, by_position, *_, out, lse, mass = refs[
        SCALARS:
    ]
    scale = static.scale * LOG2_E

    def work(unit: Unit, query_tile: Array) -> None:
        query_T1 = unit.queries(query_tile)
        query_TK = load_queries(query, sizes, unit, query_T1)

        def persistent(tile, softmax: Softmax) -> Softmax:
            pair_N1, pair_1N = (
                tile * sizes.key_tile + iota(sizes.key_tile, axis) for axis in (0, 1)
            )
            logits_TN = (
                dot(query_TK, load_pairs(persistent_key, sizes, unit.head, pair_N1), (1, 1)) * scale
            )
            logits_TN, keeps_TN = (
                _only_pairs(sizes, pair_1N, logits_TN),
                unit.keeps(query_T1, pair=pair_1N),
            )
            return softmax.add(
                sizes,
                logits_TN,
                None,
                keeps_TN,
                load_pairs(persistent_value, sizes, unit.head, pair_N1),
            )

        def context(masked: bool, tile, softmax: Softmax) -> Softmax:
            key_C1, key_1C = (tile * sizes.key_tile + iota(sizes.key_tile, axis) for axis in (0, 1))
            exists_TC = unit.exists(query_T1, key_1C) if masked else None
            by_position_TC = load_diagonal(by_position, unit, query_T1, key_1C, exists_TC)
            logits_TC = (
                dot(query_TK, load_keys(key, sizes, unit, key_C1), (1, 1)) + by_position_TC
            ) * scale
            mask_TC, keeps_TC = None, unit.keeps(query_T1, key_1C)
            if exists_TC is not None:
                mask_TC = jnp.clip(unit.ramp(query_T1, key_1C, exists_TC), 0, 1)
                logits_TC = jnp.where(mask_TC > 0, logits_TC, MASKED_LOGIT)
            return softmax.add(
                sizes, logits_TC, mask_TC, keeps_TC, load_keys(value, sizes, unit, key_C1)
            )

        top_T1 = jnp.full((sizes.query_tile, 1), MASKED_LOGIT / 10, jnp.float32)
        softmax = Softmax(top_T1, jnp.zeros_like(top_T1), zeros(sizes, sizes.query_tile))
        softmax = jax.lax.fori_loop(0, pl.cdiv(sizes.N, sizes.key_tile), persistent, softmax)
        persistent_T1 = jnp.where(softmax.total_T1 > 0, softmax.log_sum(), MASKED_LOGIT)
        softmax = for_tiles(unit.keys_of(query_tile), unit.inside(query_tile), context, softmax)
        lse_T1, kept = softmax.log_sum(), 1 - static.dropout_rate
        total_T1 = jnp.where(softmax.total_T1 > 0, softmax.total_T1 * kept, 1)
        row_T1, exists_T1 = unit.row * sizes.T + query_T1, query_T1 < sizes.T
        store(out, sizes, unit.head, row_T1, exists_T1, softmax.sum_TK / total_T1)
        place_T1 = unit.number * sizes.T + query_T1
        plgpu.store(lse.at[place_T1], lse_T1, mask=exists_T1)
        plgpu.store(mass.at[place_T1], jnp.exp(persistent_T1 - lse_T1), mask=exists_T1)

    for_unit(static, sizes, scalars, work)


def _only_pairs(sizes: Sizes, pair: Array, logits: Array) -> Array:
    """Logits of persistent pairs, MASKED_LOGIT beyond the last one."""
    return jnp.where(pair < sizes.N, logits, MASKED_LOGIT) if sizes.N % sizes.key_tile else logits


# --- backward
#
#
# ----------------------------------------------------------------------------------------------------


def key_gradients(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (program, unit): gradients of keys and values, tile by tile, and of the unit's span.

    Every logit is visited once; its gradient, before the scale, takes the place of its part by
    position. Tiles are held with keys in rows, so that no weight is transposed for the products
    over queries.
    """
    scalars = Scalars(*refs[:SCALARS])
    query, key, value, d_out, lse, delta, *_ = refs[SCALARS:]
    d_key, d_value, d_span, by_position = refs[-4:]
    programs = pl.num_programs(0)

    def work(unit: Unit, program: Array) -> None:
        def keys(i, d_span: Array) -> Array:
            tile = first + program + i * programs
            key_C1 = tile * sizes.key_tile + iota(sizes.key_tile, 0)
            key_CK, value_CK = (load_keys(x, sizes, unit, key_C1) for x in (key, value))

            def queries(masked: bool, query_tile, sums: tuple) -> tuple:
                d_key_CK, d_value_CK, d_span = sums
                query_T1, query_1T = (
                    query_tile * sizes.query_tile + iota(sizes.query_tile, axis) for axis in (0, 1)
                )
                query_TK, d_out_TK = (
                    load_queries(x, sizes, unit, query_T1) for x in (query, d_out)
                )
                lse_1T, delta_1T = (load_statistic(x, sizes, unit, query_1T) for x in (lse, delta))
                keeps_CT = unit.keeps(query_1T, key_C1)
                exists_CT = unit.exists(query_1T, key_C1) if masked else None
                by_position_CT = load_diagonal(by_position, unit, query_1T, key_C1, exists_CT)
                logits_CT = (dot(key_CK, query_TK, (1, 1)) + by_position_CT) * (
                    static.scale * LOG2_E
                )
                weight_CT = exp2(sizes, logits_CT - lse_1T * LOG2_E)
                d_weight_CT = _kept(static, keeps_CT, dot(value_CK, d_out_TK, (1, 1))) - delta_1T
                if (
                    exists_CT is not None
                ):  # where m = 0 nothing bounds the logit, and inf x 0 is not a number
                    ramp_CT = unit.ramp(query_1T, key_C1, exists_CT)
                    bare_CT = jnp.where(ramp_CT >= 0, jnp.minimum(weight_CT, 1e30), 0)
                    d_mask_CT = jnp.minimum(bare_CT, MAX_MASK_DERIVATIVE) * d_weight_CT
                    d_span += jnp.sum(jnp.where(ramp_CT <= 1, d_mask_CT, 0))
                    weight_CT = bare_CT * jnp.minimum(ramp_CT, 1)
                d_logits_CT = (weight_CT * d_weight_CT).astype(by_position.dtype)
                write(by_position, unit.place(query_1T, key_C1), exists_CT, d_logits_CT)
                dropped_CT = weight_CT if keeps_CT is None else jnp.where(keeps_CT, weight_CT, 0)
                d_key_CK += dot(d_logits_CT, query_TK)
                d_value_CK += dot(dropped_CT.astype(d_out_TK.dtype), d_out_TK)
                return d_key_CK, d_value_CK, d_span

            zeros_CK = zeros(sizes, sizes.key_tile)
            sums = for_tiles(
                unit.queries_of(tile),
                unit.queries_inside(tile),
                queries,
                (zeros_CK, zeros_CK, d_span),
            )
            finish(tile, sums[0] * static.scale, sums[1] / (1 - static.dropout_rate))
            return sums[2]

        def finish(tile, d_key_CK: Array, d_value_CK: Array) -> None:
            key_C1 = tile * sizes.key_tile + iota(sizes.key_tile, 0)
            for ref, value_CK in ((d_key, d_key_CK), (d_value, d_value_CK)):
                store(
                    ref, sizes, unit.head, unit.row * sizes.S + key_C1, key_C1 < sizes.S, value_CK
                )

        def beyond_reach(i, _: Any) -> None:
            tile = program + i * programs

            @pl.when((tile < first) | (tile > last))
            def nothing_there() -> None:
                finish(tile, *[zeros(sizes, sizes.key_tile)] * 2)

        def share(tiles) -> Array:
            return jax.lax.div(jnp.maximum(tiles - program + programs - 1, 0), programs)

        first, last = unit.tiles(unit.oldest, unit.newest)
        d_span[unit.number, program] = jax.lax.fori_loop(
            0, share(last - first + 1), keys, jnp.float32(0)
        )
        jax.lax.fori_loop(0, share(pl.cdiv(sizes.S, sizes.key_tile)), beyond_reach, None)

    for_unit(static, sizes, scalars, work)


def query_gradients(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (query tile, unit): gradients of the queries, from the logits' gradients that `key_gradients` left."""
    scalars, refs = Scalars(*refs[:SCALARS]), refs[SCALARS:]
    query, key, position, persistent_key, persistent_value, d_out, lse, delta, d_logits, *_ = refs
    d_query, d_position_query = refs[-1 if static.one_query else -2], refs[-1]

    def work(unit: Unit, query_tile: Array) -> None:
        query_T1 = unit.queries(query_tile)
        query_TK, d_out_TK = (load_queries(x, sizes, unit, query_T1) for x in (query, d_out))
        statistics = tuple(load_statistic(x, sizes, unit, query_T1) for x in (lse, delta))

        def persistent(tile, sum_TK: Array) -> Array:
            pair_N1 = tile * sizes.key_tile + iota(sizes.key_tile, 0)
            key_NK, value_NK = (
                load_pairs(x, sizes, unit.head, pair_N1) for x in (persistent_key, persistent_value)
            )
            d_logits_TN, _ = _pairs(
                static,
                sizes,
                unit,
                tile,
                query_T1,
                query_TK,
                d_out_TK,
                statistics,
                key_NK,
                value_NK,
            )
            return sum_TK + dot(d_logits_TN, key_NK)

        def context(masked: bool, tile, sum_TK: Array) -> Array:
            key_C1, key_1C = (tile * sizes.key_tile + iota(sizes.key_tile, axis) for axis in (0, 1))
            exists_TC = unit.exists(query_T1, key_1C) if masked else None
            d_logits_TC = load_diagonal(d_logits, unit, query_T1, key_1C, exists_TC)
            return sum_TK + dot(d_logits_TC, load_keys(key, sizes, unit, key_C1))

        def positions(masked: bool, tile, sum_TK: Array) -> Array:
            column_D1, column_1D = (
                tile * sizes.key_tile + iota(sizes.key_tile, axis) for axis in (0, 1)
            )
            d_logits_TD = load_by_distance(masked, d_logits, unit, query_T1, column_1D)
            return sum_TK + dot(d_logits_TD, load_positions(position, sizes, unit, column_D1))

        sum_TK = jax.lax.fori_loop(
            0, pl.cdiv(sizes.N, sizes.key_tile), persistent, zeros(sizes, sizes.query_tile)
        )
        sum_TK = for_tiles(unit.keys_of(query_tile), unit.inside(query_tile), context, sum_TK)
        other_TK = sum_TK if static.one_query else jnp.zeros_like(sum_TK)
        other_TK = for_tiles(
            (0, unit.column_tiles - 1), unit.columns_inside(query_tile), positions, other_TK
        )
        row_T1, exists_T1 = unit.row * sizes.T + query_T1, query_T1 < sizes.T
        if not static.one_query:
            store(d_query, sizes, unit.head, row_T1, exists_T1, sum_TK * static.scale)
        store(d_position_query, sizes, unit.head, row_T1, exists_T1, other_TK * static.scale)

    for_unit(static, sizes, scalars, work)


def _kept(static: Static, keeps: Array | None, d_weight: Array) -> Array:
    """Gradients of weights from those of the weights after dropout."""
    return (
        d_weight
        if keeps is None
        else jnp.where(keeps, d_weight, 0) * (1 / (1 - static.dropout_rate))
    )


def _pairs(
    static, sizes, unit, tile, query_T1, query_TK, d_out_TK, statistics, key_NK, value_NK
) -> tuple[Array, Array]:
    """Gradients of the logits of persistent pairs, before the scale, and the weights that dropout keeps."""
    pair_1N = tile * sizes.key_tile + iota(sizes.key_tile, 1)
    keeps_TN, (lse_T1, delta_T1) = unit.keeps(query_T1, pair=pair_1N), statistics
    logits_TN = dot(query_TK, key_NK, (1, 1)) * (static.scale * LOG2_E)
    weight_TN = exp2(sizes, _only_pairs(sizes, pair_1N, logits_TN) - lse_T1 * LOG2_E)
    d_logits_TN = weight_TN * (_kept(static, keeps_TN, dot(d_out_TK, value_NK, (1, 1))) - delta_T1)
    kept_TN = weight_TN if keeps_TN is None else jnp.where(keeps_TN, weight_TN, 0)
    return d_logits_TN.astype(value_NK.dtype), kept_TN.astype(value_NK.dtype)


def position_gradients(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (place for a sum, head): adds to sums over rows of the gradient of the position table.

    The places are dealt out to the tiles of distances within reach: the fewer there are, the more
      take part in each.
    """
    scalars = Scalars(*refs[:SCALARS])
    position_query, d_logits, sums, d_sums = refs[SCALARS:]
    place, head = pl.program_id(0), pl.program_id(1)
    first, units = scalars.chunk[0], scalars.chunk[1]
    tiles = pl.cdiv(scalars.reach_H[head], sizes.key_tile)
    parts = jax.lax.div(pl.num_programs(0), jnp.maximum(tiles, 1))

    @pl.when(place < tiles * parts)
    def _() -> None:
        tile, part = jax.lax.rem(place, tiles), jax.lax.div(place, tiles)
        column_1D = tile * sizes.key_tile + iota(sizes.key_tile, 1)

        def rows(row, sum_DK: Array) -> Array:
            unit = Unit(static, sizes, scalars, row * sizes.H + head)

            def queries(masked: bool, query_tile, sum_DK: Array) -> Array:
                query_T1 = unit.queries(query_tile)
                d_logits_TD = load_by_distance(masked, d_logits, unit, query_T1, column_1D)
                return sum_DK + dot(
                    d_logits_TD, load_queries(position_query, sizes, unit, query_T1), (0, 0)
                )

            query_tiles = 0, pl.cdiv(sizes.T, sizes.query_tile) - 1
            return for_tiles(query_tiles, unit.queries_with_columns(tile), queries, sum_DK)

        begin, end = (
            jax.lax.div(jnp.maximum(x - head + sizes.H - 1, 0), sizes.H)
            for x in (first, first + units)
        )
        begin, end = (begin + jax.lax.div((end - begin) * x, parts) for x in (part, part + 1))
        sum_DK = jax.lax.fori_loop(begin, end, rows, zeros(sizes, sizes.key_tile))
        row_D1, exists_D1 = _rows_of_place(sizes, head, place, pl.num_programs(0))
        store(d_sums, sizes, 0, row_D1, exists_D1, load(sums, sizes, 0, row_D1, exists_D1) + sum_DK)


def _rows_of_place(sizes: Sizes, head, place, places) -> tuple[Array, Array]:
    """Where the sum of a place lies, one row for each distance of its tile."""
    row_D1 = (head * places + place) * sizes.key_tile + iota(sizes.key_tile, 0)
    return row_D1, row_D1 >= 0


def position_sums(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (tile of distances, head): the gradient of the position table from the sums over rows."""
    scalars, (sums, *_, d_table) = Scalars(*refs[:SCALARS]), refs[SCALARS:]
    tile, head = pl.program_id(0), pl.program_id(1)
    places, reach = sums.shape[0] // sizes.H // sizes.key_tile, scalars.reach_H[head]
    tiles = pl.cdiv(reach, sizes.key_tile)

    def add(part, sum_DK: Array) -> Array:
        return sum_DK + load(
            sums, sizes, 0, *_rows_of_place(sizes, head, part * tiles + tile, places)
        )

    parts = jnp.where(tile < tiles, jax.lax.div(places, jnp.maximum(tiles, 1)), 0)
    sum_DK = jax.lax.fori_loop(0, parts, add, zeros(sizes, sizes.key_tile))
    # the farthest distance within reach is column 0; the tiles beyond reach hold the distances from
    # there on
    column_D1 = tile * sizes.key_tile + iota(sizes.key_tile, 0)
    beyond_D1 = column_D1 - tiles * sizes.key_tile + reach
    distance_D1 = jnp.where(tile < tiles, reach - 1 - column_D1, beyond_D1)
    exists_D1 = (distance_D1 >= 0) & (distance_D1 < sizes.L)
    store(d_table, sizes, 0, head * sizes.L + distance_D1, exists_D1, sum_DK * static.scale)


def persistent_gradients(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (tile of pairs, head, group of rows): gradients of persistent keys and values, by group."""
    scalars, refs = Scalars(*refs[:SCALARS]), refs[SCALARS:]
    query, persistent_key, persistent_value, d_out, lse, delta, *_, d_key, d_value = refs
    tile, head, group, groups = (
        pl.program_id(0),
        pl.program_id(1),
        pl.program_id(2),
        pl.num_programs(2),
    )
    pair_N1 = tile * sizes.key_tile + iota(sizes.key_tile, 0)
    key_NK, value_NK = (
        load_pairs(x, sizes, head, pair_N1) for x in (persistent_key, persistent_value)
    )
    tiles = pl.cdiv(sizes.T, sizes.query_tile)

    def queries(i, sums: tuple) -> tuple:
        d_key_NK, d_value_NK = sums
        row, query_tile = jax.lax.div(i, tiles), jax.lax.rem(i, tiles)
        unit = Unit(static, sizes, scalars, row * sizes.H + head)
        query_T1 = unit.queries(query_tile)
        query_TK, d_out_TK = (load_queries(x, sizes, unit, query_T1) for x in (query, d_out))
        statistics = tuple(load_statistic(x, sizes, unit, query_T1) for x in (lse, delta))
        gradients = _pairs(
            static, sizes, unit, tile, query_T1, query_TK, d_out_TK, statistics, key_NK, value_NK
        )
        d_logits_TN, weight_TN = gradients
        return d_key_NK + dot(d_logits_TN, query_TK, (0, 0)), d_value_NK + dot(
            weight_TN, d_out_TK, (0, 0)
        )

    begin, end = (jax.lax.div(g * sizes.B, groups) * tiles for g in (group, group + 1))
    zeros_NK = zeros(sizes, sizes.key_tile)
    d_key_NK, d_value_NK = jax.lax.fori_loop(begin, end, queries, (zeros_NK, zeros_NK))
    row_N1, exists_N1 = (group * sizes.H + head) * sizes.N + pair_N1, pair_N1 < sizes.N
    store(d_key, sizes, 0, row_N1, exists_N1, d_key_NK * static.scale)
    store(d_value, sizes, 0, row_N1, exists_N1, d_value_NK / (1 - static.dropout_rate))
