"""The two TPU kernels of `allattn.attention.pallas_tpu`: what one program does with its tile of queries and of keys.

Relative-position logits are one product of the queries with a window of the reversed table, skewed
in registers by rotating row i by i places. The forward pass is an online softmax that starts from
the persistent pairs; the backward pass recomputes the weights from one log-sum-exp per query.

Dimension key: T query of the tile, C key of the tile, W column of the window of positions, N
persistent pair, K head width, H head, P head of the group that shares lanes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from allattn.attention import dropout
from allattn.attention.contract import Static
from allattn.attention.numerics import CallSizes, dot, log_sum
from allattn.attention.span import MASKED_LOGIT, MAX_MASK_DERIVATIVE, ramp_position

Array = jax.Array

LANES = 128


@dataclasses.dataclass(frozen=True)
class Sizes(CallSizes):
    """Static sizes of one call, T padded to whole tiles."""

    heads: int  # P, side by side in one block

    @property
    def window(self) -> int:
        """Positions that a tile can meet, from an aligned start."""
        return round_up(self.query_tile + self.key_tile, LANES) + LANES

    @property
    def left(self) -> int:
        """Rows of the position table before its first, so that every window lies inside."""
        return round_up(self.query_tile + self.key_tile, LANES)

    @property
    def positions(self) -> int:
        return round_up(self.left + self.L + self.query_tile + self.key_tile + self.window, LANES)

    @property
    def key_tiles(self) -> int:
        return -(-self.S // self.key_tile)

    @property
    def key_steps(self) -> int:
        """The most key tiles that one query tile can meet."""
        return min(self.key_tiles, -(-(self.L + self.query_tile - 1) // self.key_tile) + 1)


def round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


# --- what both kernels share
# -------------------------------------------------------------------------------------


class Place:
    """Where one head's tile of queries and tile of keys lie, from the scalars that are known before the kernel."""

    def __init__(self, static: Static, sizes: Sizes, scalars: tuple, row, query_tile, head_reach):
        _, _, query_start_B, key_start_B, _ = scalars
        self.static, self.sizes = static, sizes
        self.first_query = query_tile * sizes.query_tile
        self.begin = (
            query_start_B[row] + self.first_query
        )  # key index at which the first query sits
        farthest = self.begin - (static.first_distance + head_reach - 1)
        newest = jnp.minimum(self.begin + sizes.query_tile - 1 - static.first_distance, sizes.S - 1)
        self.oldest = jnp.maximum(jnp.maximum(farthest, key_start_B[row]), 0)
        self.newest = jnp.where(head_reach > 0, newest, -1)

    def key_tile(self, step) -> Array:
        """Tile of keys of a step, clamped to those within reach, so that nothing else is loaded."""
        last = jax.lax.div(jnp.maximum(self.newest, 0), self.sizes.key_tile)
        return jnp.minimum(jax.lax.div(self.oldest, self.sizes.key_tile) + step, last)

    def meets(self, key_tile) -> Array:
        """Whether any key of the tile is within reach of any query."""
        first = key_tile * self.sizes.key_tile
        oldest, newest = (
            jnp.maximum(self.oldest, first),
            jnp.minimum(self.newest, first + self.sizes.key_tile - 1),
        )
        return oldest <= newest

    def window(self, key_tile) -> tuple[Array, Array]:
        """First row of the window in the padded, reversed table, and the column of (query 0, key 0) in it."""
        nearest = self.begin - key_tile * self.sizes.key_tile - self.static.first_distance
        place = self.sizes.left + self.sizes.L - 1 - nearest
        first = jax.lax.div(place - (self.sizes.query_tile - 1), LANES) * LANES
        return pl.multiple_of(first, LANES), place - first

    def keys(self, key_tile, x_CK: Array) -> Array:
        """Keys or values, zero where no query looks: what lies there may be anything."""
        index_C1 = key_tile * self.sizes.key_tile + jax.lax.broadcasted_iota(
            jnp.int32, (x_CK.shape[0], 1), 0
        )
        return jnp.where((index_C1 >= self.oldest) & (index_C1 <= self.newest), x_CK, 0)

    def distances(self, key_tile) -> tuple[Array, Array]:
        """Distance of every pair, and whether it exists."""
        shape = (self.sizes.query_tile, self.sizes.key_tile)
        row_TC, column_TC = (jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in (0, 1))
        index_TC = key_tile * self.sizes.key_tile + column_TC
        distance_TC = self.begin + row_TC - index_TC
        nearest = self.static.first_distance
        exists_TC = (distance_TC >= nearest) & (distance_TC < nearest + self.sizes.L)
        return distance_TC, exists_TC & (index_TC >= self.oldest) & (index_TC <= self.newest)


def group_reach(sizes: Sizes, reach_H, group) -> Array:
    reaches = [reach_H[group * sizes.heads + p] for p in range(sizes.heads)]
    return functools.reduce(jnp.maximum, reaches)


def _rotate_rows(x_TW: Array, sign: int) -> Array:
    """Rotate row i by i places to the right (sign 1) or left (-1).

    In two parts, i = 8 a + b: three rotations under a mask for b, and one of every eight rows by a
    fixed number of places for a. Every TPU can do that; rotations with a stride v4 lacks, and no
    TPU has them to the left.
    """
    T, W = x_TW.shape
    row_TW = jax.lax.broadcasted_iota(jnp.int32, (T, W), 0)
    for bit in range(3):
        rotated_TW = pltpu.roll(x_TW, sign * (1 << bit) % W, 1)
        x_TW = jnp.where((row_TW >> bit) & 1 == 1, rotated_TW, x_TW)
    eights = [x_TW[row : row + 8] for row in range(0, T, 8)]
    return jnp.concatenate(
        [pltpu.roll(x, sign * 8 * a % W, 1) if a else x for a, x in enumerate(eights)]
    )


def _skew(x_TW: Array, place, columns: int) -> Array:
    """From the window's columns to the keys': out[i, c] = x[i, place + c - i]."""
    return _rotate_rows(pltpu.roll(x_TW, x_TW.shape[1] - place, 1), 1)[:, :columns]


def _unskew(x_TC: Array, place, window: int) -> Array:
    """The inverse of `_skew`, with zeros elsewhere."""
    T, C = x_TC.shape
    x_TW = jnp.concatenate([x_TC, jnp.zeros((T, window - C), x_TC.dtype)], axis=1)
    return pltpu.roll(_rotate_rows(x_TW, -1), place, 1)


def _logits(static: Static, query_TK, position_query_TK, key_CK, position_KW, place) -> Array:
    by_position_TC = _skew(dot(position_query_TK, position_KW), place, key_CK.shape[0])
    return (dot(query_TK, key_CK, (1, 1)) + by_position_TC) * static.scale


def _kept(static: Static, place: Place, numbers, row, head, domain: int, index_TX: Array) -> Array:
    """Dropout's factors, 0 or 1 / (1 - rate)."""
    query_T1 = place.first_query + jax.lax.broadcasted_iota(jnp.int32, (index_TX.shape[0], 1), 0)
    key_T1 = dropout.query_key(numbers[0], numbers[1] + row, numbers[2] + head, query_T1, domain)
    return jnp.where(
        dropout.keep(key_T1, index_TX, static.dropout_rate), 1 / (1 - static.dropout_rate), 0.0
    )


def _pair_gradients(
    logits_TN, lse_T1, delta_T1, d_out_TK, value_NK, kept_TN
) -> tuple[Array, Array]:
    """From the logits of persistent pairs: their gradients and the weights after dropout, in the values' dtype."""
    weight_TN = jnp.exp(logits_TN - lse_T1)
    d_weight_TN, dropped_TN = dot(d_out_TK, value_NK, (1, 1)), weight_TN
    if kept_TN is not None:
        d_weight_TN, dropped_TN = d_weight_TN * kept_TN, weight_TN * kept_TN
    return (weight_TN * (d_weight_TN - delta_T1)).astype(value_NK.dtype), dropped_TN.astype(
        value_NK.dtype
    )


def _lanes(sizes: Sizes, p: int) -> slice:
    return slice(p * sizes.K, (p + 1) * sizes.K)


def _pair_index(sizes: Sizes) -> Array:
    return jax.lax.broadcasted_iota(jnp.int32, (sizes.query_tile, sizes.N), 1)


# --- forward
#
#
# -----------------------------------------------------------------------------------------------------


def forward_kernel(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (group, row, query tile, step over key tiles): an online softmax for each head of the group."""
    scalars = refs[:5]
    query, position_query, key, value, position, persistent_key, persistent_value = refs[5:12]
    out, lse, mass, top, total, persistent_lse, sums = refs[12:]
    reach_H, span_H, *_, numbers = scalars
    group, row, query_tile, step = (pl.program_id(axis) for axis in range(4))
    key_tile = (
        Place(static, sizes, scalars, row, query_tile, group_reach(sizes, reach_H, group)).key_tile(
            0
        )
        + step
    )

    def one_head(p: int) -> None:
        head, lanes = group * sizes.heads + p, _lanes(sizes, p)
        place = Place(static, sizes, scalars, row, query_tile, reach_H[head])

        @pl.when(step == 0)
        def _persistent() -> None:
            top[p] = jnp.full_like(top[p], MASKED_LOGIT / 10)
            total[p], sums[p] = jnp.zeros_like(total[p]), jnp.zeros_like(sums[p])
            persistent_lse[p] = jnp.full_like(top[p], MASKED_LOGIT)
            if sizes.N:
                logits_TN = dot(query[:, lanes], persistent_key[p], (1, 1)) * static.scale
                top_T1 = jnp.max(logits_TN, axis=1, keepdims=True)
                weight_TN = jnp.exp(logits_TN - top_T1)
                top[p], total[p] = top_T1, jnp.sum(weight_TN, axis=1, keepdims=True)
                persistent_lse[p] = top_T1 + jnp.log(total[p])
                if static.dropout_rate:
                    weight_TN *= _kept(
                        static, place, numbers, row, head, dropout.PERSISTENT, _pair_index(sizes)
                    )
                sums[p] = dot(weight_TN.astype(value.dtype), persistent_value[p])

        @pl.when(place.meets(key_tile))
        def _context() -> None:
            first, offset = place.window(key_tile)
            position_KW = position[0 if sizes.shared else p, :, pl.ds(first, sizes.window)]
            key_CK, value_CK = (place.keys(key_tile, x[:, lanes]) for x in (key, value))
            logits_TC = _logits(
                static, query[:, lanes], position_query[:, lanes], key_CK, position_KW, offset
            )
            distance_TC, exists_TC = place.distances(key_tile)
            mask_TC = jnp.where(
                exists_TC, jnp.clip(ramp_position(distance_TC, span_H[head], static.ramp), 0, 1), 0
            )
            logits_TC = jnp.where(mask_TC > 0, logits_TC, MASKED_LOGIT)
            top_T1 = jnp.maximum(top[p], jnp.max(logits_TC, axis=1, keepdims=True))
            weight_TC, shrink_T1 = jnp.exp(logits_TC - top_T1) * mask_TC, jnp.exp(top[p] - top_T1)
            top[p], total[p] = (
                top_T1,
                total[p] * shrink_T1 + jnp.sum(weight_TC, axis=1, keepdims=True),
            )
            if static.dropout_rate:
                weight_TC *= _kept(static, place, numbers, row, head, dropout.CONTEXT, distance_TC)
            sums[p] = sums[p] * shrink_T1 + dot(weight_TC.astype(value.dtype), value_CK)

        @pl.when(step == sizes.key_steps - 1)
        def _finish() -> None:
            total_T1 = jnp.where(total[p] > 0, total[p], 1)
            lse_T1 = log_sum(top[p], total[p])
            out[:, lanes] = (sums[p] / total_T1).astype(out.dtype)
            lse[:, p : p + 1], mass[:, p : p + 1] = lse_T1, jnp.exp(persistent_lse[p] - lse_T1)

    for p in range(sizes.heads):
        one_head(p)


# --- backward
#
#
# ----------------------------------------------------------------------------------------------------


def backward_kernel(static: Static, sizes: Sizes, *refs: Any) -> None:
    """Grid (group, row, key tile, query tile); every gradient but the keys' and values' adds up over several steps."""
    scalars = refs[:5]
    (
        query,
        position_query,
        key,
        value,
        position,
        persistent_key,
        persistent_value,
        d_out,
        lse,
        delta,
    ) = refs[5:15]
    d_query, d_key, d_value, d_position, d_persistent_key, d_persistent_value, d_span = refs[15:22]
    *other, key_sum, value_sum = refs[22:]  # first the second query's gradient, if there is one
    d_position_query = other[0] if other else d_query
    reach_H, span_H, *_, numbers = scalars
    group, row, key_tile, query_tile = (pl.program_id(axis) for axis in range(4))
    rows = pl.ds(pl.multiple_of(query_tile * sizes.query_tile, sizes.query_tile), sizes.query_tile)

    @pl.when((row == 0) & (key_tile == 0) & (query_tile == 0))
    def _start_group() -> None:
        for x in (d_position, d_persistent_key, d_persistent_value, d_span):
            x[...] = jnp.zeros_like(x)

    @pl.when(query_tile == 0)
    def _start_keys() -> None:
        key_sum[...], value_sum[...] = jnp.zeros_like(key_sum), jnp.zeros_like(value_sum)

    @pl.when(key_tile == 0)
    def _start_queries() -> None:
        zeros = jnp.zeros((sizes.query_tile, sizes.heads * sizes.K), jnp.float32)
        for x in (d_query, *other):
            x[rows] = zeros

    def one_head(p: int) -> None:
        head, lanes = group * sizes.heads + p, _lanes(sizes, p)
        place = Place(static, sizes, scalars, row, query_tile, reach_H[head])
        lse_T1, delta_T1 = lse[:, p : p + 1], delta[:, p : p + 1]
        dtype = query.dtype

        def persistent() -> None:
            logits_TN = dot(query[:, lanes], persistent_key[p], (1, 1)) * static.scale
            kept_TN = None
            if static.dropout_rate:
                kept_TN = _kept(
                    static, place, numbers, row, head, dropout.PERSISTENT, _pair_index(sizes)
                )
            gradients = _pair_gradients(
                logits_TN, lse_T1, delta_T1, d_out[:, lanes], persistent_value[p], kept_TN
            )
            d_logits_TN, dropped_TN = gradients
            d_query[rows, lanes] += dot(d_logits_TN, persistent_key[p]) * static.scale
            d_persistent_key[p] += dot(d_logits_TN, query[:, lanes], (0, 0)) * static.scale
            d_persistent_value[p] += dot(dropped_TN, d_out[:, lanes], (0, 0))

        if sizes.N:
            pl.when(key_tile == 0)(persistent)

        @pl.when(place.meets(key_tile))
        def _context() -> None:
            (first, offset), table = place.window(key_tile), 0 if sizes.shared else p
            window = pl.ds(first, sizes.window)
            key_CK, value_CK = (place.keys(key_tile, x[:, lanes]) for x in (key, value))
            position_KW = position[table, :, window]
            logits_TC = _logits(
                static, query[:, lanes], position_query[:, lanes], key_CK, position_KW, offset
            )
            distance_TC, exists_TC = place.distances(key_tile)
            ramp_TC = ramp_position(distance_TC, span_H[head], static.ramp)
            # before the mask m; where m = 0 nothing bounds the logit, and inf x 0 is not a number
            bare_TC = jnp.where(
                exists_TC & (ramp_TC >= 0), jnp.exp(jnp.minimum(logits_TC - lse_T1, 80)), 0
            )
            weight_TC = bare_TC * jnp.clip(ramp_TC, 0, 1)
            d_weight_TC, dropped_TC = dot(d_out[:, lanes], value_CK, (1, 1)), weight_TC
            if static.dropout_rate:
                kept_TC = _kept(static, place, numbers, row, head, dropout.CONTEXT, distance_TC)
                d_weight_TC, dropped_TC = d_weight_TC * kept_TC, weight_TC * kept_TC
            d_mask_TC = jnp.minimum(bare_TC, MAX_MASK_DERIVATIVE) * (d_weight_TC - delta_T1)
            d_mask_TC = jnp.where((ramp_TC >= 0) & (ramp_TC <= 1), d_mask_TC, 0)
            d_span[p : p + 1] += jnp.sum(d_mask_TC) / static.ramp
            d_logits_TC = weight_TC * (d_weight_TC - delta_T1) * static.scale
            d_window_TW = _unskew(d_logits_TC, offset, sizes.window).astype(dtype)
            d_query[rows, lanes] += dot(d_logits_TC.astype(dtype), key_CK)
            d_position_query[rows, lanes] += dot(d_window_TW, position_KW, (1, 1))
            d_position[table, :, window] += dot(position_query[:, lanes], d_window_TW, (0, 0))
            key_sum[:, lanes] += dot(d_logits_TC.astype(dtype), query[:, lanes], (0, 0))
            value_sum[:, lanes] += dot(dropped_TC.astype(dtype), d_out[:, lanes], (0, 0))

    for p in range(sizes.heads):
        one_head(p)

    @pl.when(query_tile == sizes.T // sizes.query_tile - 1)
    def _finish_keys() -> None:
        d_key[...], d_value[...] = (
            key_sum[...].astype(d_key.dtype),
            value_sum[...].astype(d_value.dtype),
        )
