"""The operation in plain XLA: one head, one row and one tile of queries at a time, with a hand-written backward pass.

A tile of queries meets a window of consecutive keys. Its relative-position logits are computed by distance, one
product with the reversed table, and skewed into the window by padding and reshaping; the soft span enters as
log m(d), added to them before the skew, whose padding masks everything outside the band. Per head, the number of
distances is the smallest static bucket that holds the head's reach, chosen at run time: farther keys are not touched.
The backward pass keeps the output and one log-sum-exp per query, and recomputes the weights.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K head width;
inside one tile also: C column of the window of keys, R distance in the bucket (farthest first).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from allattn.attention import dropout
from allattn.attention.span import NOTHING, TIE, log_span_mask, ramp_position, reach

Array = jax.Array

TILE = 256
SMALLEST_BUCKET = 64


@dataclasses.dataclass(frozen=True)
class Static:
    """What is fixed when the operation is traced."""

    first_distance: int
    ramp: int
    dropout_rate: float
    scale: float
    whole_context: bool  # query_start is S - T and key_start 0, known when tracing
    one_query: bool  # the position logits use the same queries


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


def all_attention(
    query_BTHK, key_BSHK, value_BSHK, *, position_query_BTHK, position_HLK, persistent_key_HNK, persistent_value_HNK,
    span_H, first_distance, ramp, dropout_rate, scale, whole_context, one_query, **dynamic,
) -> tuple[Array, Array]:  # fmt: skip
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments."""
    L = position_HLK.shape[1]
    if span_H is None:  # every distance counts fully: a span of L puts the ramp behind the table's end
        span_H = jax.lax.stop_gradient(jnp.full(query_BTHK.shape[2], float(L + 1)))
    static = Static(first_distance, ramp, dropout_rate, scale, whole_context, one_query)
    inputs = Inputs(
        query_BTHK,
        position_query_BTHK,
        key_BSHK,
        value_BSHK,
        position_HLK,
        persistent_key_HNK,
        persistent_value_HNK,
        span_H,
    )
    return _attention(static, inputs, Dynamic(**dynamic))


def buckets(limit: int) -> tuple[int, ...]:
    """Numbers of distances for which code is compiled: powers of two and, from 512 on, the steps halfway between."""
    sizes, size = [], SMALLEST_BUCKET
    while size < limit:
        sizes += [size, size * 3 // 2] if size >= 512 else [size]
        size *= 2
    return (*(s for s in sizes if s < limit), limit)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    return _attention_forward(static, inputs, dynamic)[0]


def _attention_forward(static, inputs, dynamic):
    out_HBTK, mass_HBT, lse_HBT = _for_each_head(static, inputs, dynamic, _head_forward, ())
    out_BTHK = out_HBTK.transpose(1, 2, 0, 3)
    return (out_BTHK, mass_HBT.transpose(1, 2, 0)), (inputs, dynamic, out_BTHK, lse_HBT)


def _attention_backward(static, residuals, cotangents):
    inputs, dynamic, out_BTHK, lse_HBT = residuals
    dtype, d_out_BTHK = lse_HBT.dtype, cotangents[0]
    delta_HBT = jnp.einsum("bthk,bthk->hbt", d_out_BTHK, out_BTHK, preferred_element_type=dtype)
    gradients = _for_each_head(static, inputs, dynamic, _head_backward, (d_out_BTHK, lse_HBT, delta_HBT))
    rows, (position_HLK, *by_head) = gradients[:4], gradients[4:]
    if inputs.position_HLK.shape[0] == 1:
        position_HLK = position_HLK.sum(0, keepdims=True)
    gradients = Inputs._make((*(x_HBTK.transpose(1, 2, 0, 3) for x_HBTK in rows), position_HLK, *by_head))
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, inputs), None


_attention.defvjp(_attention_forward, _attention_backward)


class Shape(NamedTuple):
    """Static sizes of the work on one head."""

    B: int
    T: int
    tile: int  # queries in a tile
    tiles: int  # tiles in a row; the last may reach beyond T
    S: int
    left: int  # zero keys before the first, so that every window lies inside
    right: int
    masked: bool  # whether a window can hold keys that do not exist


def _shape(static: Static, B: int, T: int, S: int, L: int) -> Shape:
    tile = min(T, TILE)
    tiles = -(-T // tile)
    farthest = static.first_distance + L - 1
    left = max(0, farthest - (S - T)) if static.whole_context else farthest
    right = tiles * tile + 1 - static.first_distance - (T if static.whole_context else 0)
    return Shape(B, T, tile, tiles, S, left, right, masked=left > 0 or not static.whole_context)


class Head(NamedTuple):
    """One head's arrays, keys and values padded so that every window lies inside them.

    Keys and values have their width first: the products with them then run up to twice as fast on a CPU.
    """

    query_BTK: Array
    position_query_BTK: Array
    key_BKS: Array
    value_BKS: Array
    position_KL: Array
    persistent_key_KN: Array
    persistent_value_KN: Array
    span: Array
    number: Array


def _select_head(inputs: Inputs, shape: Shape, head: Array) -> Head:
    def rows(x_BXHK: Array, before: int, after: int) -> Array:
        x_BXK = jax.lax.dynamic_index_in_dim(x_BXHK, head, 2, keepdims=False)
        return jnp.pad(x_BXK, ((0, 0), (before, after), (0, 0)))

    position_head = jnp.minimum(head, inputs.position_HLK.shape[0] - 1)
    beyond = shape.tiles * shape.tile - shape.T
    return Head(
        query_BTK=rows(inputs.query_BTHK, 0, beyond),
        position_query_BTK=rows(inputs.position_query_BTHK, 0, beyond),
        key_BKS=rows(inputs.key_BSHK, shape.left, shape.right).transpose(0, 2, 1),
        value_BKS=rows(inputs.value_BSHK, shape.left, shape.right).transpose(0, 2, 1),
        position_KL=inputs.position_HLK[position_head].T,
        persistent_key_KN=inputs.persistent_key_HNK[head].T,
        persistent_value_KN=inputs.persistent_value_HNK[head].T,
        span=inputs.span_H[head],
        number=head,
    )


def _for_each_head(static: Static, inputs: Inputs, dynamic: Dynamic, work: Callable, extra: tuple):
    """Run `work` on every head with the code of the bucket that its span needs; outputs gain a leading head axis."""
    (B, T, H, _), S, L = inputs.query_BTHK.shape, inputs.key_BSHK.shape[1], inputs.position_HLK.shape[1]
    shape, sizes = _shape(static, B, T, S, L), buckets(L)

    def one_head(head: Array):
        selected = _select_head(inputs, shape, head)
        needed = reach(selected.span, static.ramp, static.first_distance, L)
        bucket = jnp.searchsorted(jnp.array(sizes), needed)
        branches = [functools.partial(work, static, shape, size) for size in sizes]
        return jax.lax.switch(bucket, branches, selected, dynamic, extra)

    return jax.lax.map(one_head, jnp.arange(H))


class Tile(NamedTuple):
    """One tile of queries and its window of keys."""

    query_TK: Array
    position_query_TK: Array
    key_KC: Array
    value_KC: Array
    absent_C: Array | None  # 0 where a key exists, NOTHING elsewhere
    row: Array
    first_query: Array
    first_column: Array


def _select_tile(static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, number: Array) -> Tile:
    row, first_query = number // shape.tiles, number % shape.tiles * shape.tile
    oldest = dynamic.query_start_B[row] + first_query - (static.first_distance + R - 1)
    first_column = oldest + shape.left

    def queries(x_BTK: Array) -> Array:
        return jax.lax.dynamic_slice(x_BTK, (row, first_query, 0), (1, shape.tile, x_BTK.shape[2]))[0]

    def window(x_BKS: Array) -> Array:
        return jax.lax.dynamic_slice(x_BKS, (row, 0, first_column), (1, x_BKS.shape[1], R + shape.tile))[0]

    absent_C = None
    if shape.masked:
        index_C = oldest + jnp.arange(R + shape.tile)
        exists_C = (index_C >= jnp.maximum(dynamic.key_start_B[row], 0)) & (index_C < shape.S)
        absent_C = jnp.where(exists_C, 0.0, NOTHING)
    return Tile(
        query_TK=queries(head.query_BTK),
        position_query_TK=queries(head.position_query_BTK),
        key_KC=window(head.key_BKS),
        value_KC=window(head.value_BKS),
        absent_C=absent_C,
        row=row,
        first_query=first_query,
        first_column=first_column,
    )


def _skew(by_distance_TR: Array) -> Array:
    """Move row t right by t places: (T, R) by distance, farthest first, to (T, R + T) by column of the window."""
    T, R = by_distance_TR.shape
    padded_TX = jnp.pad(by_distance_TR, ((0, 0), (0, T + 1)), constant_values=NOTHING)
    return padded_TX.reshape(-1)[: T * (R + T)].reshape(T, R + T)


def _unskew(by_column_TC: Array) -> Array:
    """The inverse of `_skew`, dropping what lies outside the band."""
    T, C = by_column_TC.shape
    return jnp.pad(by_column_TC.reshape(-1), (0, T)).reshape(T, C + 1)[:, : C - T]


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """Contract one axis of each matrix, accumulating at least in float32."""
    dtype = jnp.promote_types(a.dtype, jnp.float32)
    return jax.lax.dot_general(a, b, (((axis_a,), (axis_b,)), ((), ())), preferred_element_type=dtype)


def _span_bias(static: Static, R: int, span: Array) -> tuple[Array, Array]:
    """Distances of a bucket, farthest first, and log m of each."""
    distance_R = static.first_distance + R - 1 - jnp.arange(R)
    return distance_R, log_span_mask(distance_R, span, static.ramp)


def _logits(static: Static, tile: Tile, position_KR: Array, bias_R: Array, head: Head) -> tuple[Array, Array]:
    position_TR = _dot(tile.position_query_TK, position_KR, 1, 0) * static.scale + bias_R
    context_TC = _dot(tile.query_TK, tile.key_KC, 1, 0) * static.scale + _skew(position_TR)
    if tile.absent_C is not None:
        context_TC += tile.absent_C.astype(context_TC.dtype)
    return context_TC, _dot(tile.query_TK, head.persistent_key_KN, 1, 0) * static.scale


def _kept(static: Static, R: int, tile: Tile, head: Head, dynamic: Dynamic, N: int) -> tuple[Array, Array]:
    """Dropout's factors, 0 or 1 / (1 - rate), for the window and for the persistent pairs."""
    T, C = tile.query_TK.shape[0], tile.key_KC.shape[1]
    query_T = tile.first_query + jnp.arange(T)
    place = (dynamic.dropout_seed, dynamic.row_offset + tile.row, dynamic.head_offset + head.number, query_T)
    context_T, persistent_T = (dropout.query_key(*place, domain) for domain in (dropout.CONTEXT, dropout.PERSISTENT))
    distance_TC = static.first_distance + R - 1 + jnp.arange(T)[:, None] - jnp.arange(C)
    rate = static.dropout_rate
    return (
        dropout.keep(context_T[:, None], distance_TC, rate) / (1 - rate),
        dropout.keep(persistent_T[:, None], jnp.arange(N), rate) / (1 - rate),
    )


def _head_forward(static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, extra: tuple):
    """Returns out_BTK, mass_BT and lse_BT of one head, given R, the number of distances that it needs."""
    position_KR = head.position_KL[:, :R][:, ::-1]
    _, bias_R = _span_bias(static, R, head.span)

    def one_tile(number: Array):
        tile = _select_tile(static, shape, R, head, dynamic, number)
        context_TC, persistent_TN = _logits(static, tile, position_KR, bias_R, head)
        top_T = jnp.max(context_TC, axis=1)
        top_T = jnp.maximum(top_T, jnp.max(persistent_TN, axis=1, initial=NOTHING))
        top_T = jnp.maximum(top_T, NOTHING / 10)  # a query that sees nothing gets weights exp(-9e29) = 0
        context_TC = jnp.exp(context_TC - top_T[:, None])
        persistent_TN = jnp.exp(persistent_TN - top_T[:, None])
        persistent_T = persistent_TN.sum(1)
        total_T = context_TC.sum(1) + persistent_T
        total_T = jnp.where(total_T > 0, total_T, 1)
        if static.dropout_rate:
            kept_TC, kept_TN = _kept(static, R, tile, head, dynamic, persistent_TN.shape[1])
            context_TC, persistent_TN = context_TC * kept_TC, persistent_TN * kept_TN
        dtype = tile.value_KC.dtype
        out_TK = _dot(context_TC.astype(dtype), tile.value_KC, 1, 1)
        out_TK += _dot(persistent_TN.astype(dtype), head.persistent_value_KN, 1, 1)
        out_TK = (out_TK / total_T[:, None]).astype(tile.query_TK.dtype)
        return out_TK, persistent_T / total_T, top_T + jnp.log(total_T)

    results = jax.lax.map(one_tile, jnp.arange(shape.B * shape.tiles))
    return tuple(_rows(shape, x) for x in results)


def _rows(shape: Shape, x_XTK: Array) -> Array:
    """Tiles to rows: (rows x tiles, tile, ...) to (B, T, ...)."""
    return x_XTK.reshape(shape.B, shape.tiles * shape.tile, *x_XTK.shape[2:])[:, : shape.T]


class Sums(NamedTuple):
    """Gradients of one head that tiles add to; keys, positions and persistent keys still lack the scale."""

    key_BKS: Array
    value_BKS: Array
    position_KR: Array
    persistent_key_KN: Array
    persistent_value_KN: Array
    bias_R: Array


def _head_backward(static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, extra: tuple):
    """Returns the gradients of one head's inputs, in the order of `Inputs`."""
    position_KR = head.position_KL[:, :R][:, ::-1]
    distance_R, bias_R = _span_bias(static, R, head.span)
    rows = _select_rows(shape, head.number, *extra)

    def one_tile(sums: Sums, number: Array):
        tile = _select_tile(static, shape, R, head, dynamic, number)
        d_out_TK, lse_T, delta_T = (x[number] for x in rows)
        context_TC, persistent_TN = (
            jnp.exp(x - lse_T[:, None]) for x in _logits(static, tile, position_KR, bias_R, head)
        )
        d_context_TC = _dot(d_out_TK, tile.value_KC, 1, 0)
        d_persistent_TN = _dot(d_out_TK, head.persistent_value_KN, 1, 0)
        kept_TC, kept_TN = jnp.ones((), lse_T.dtype), jnp.ones((), lse_T.dtype)
        if static.dropout_rate:
            kept_TC, kept_TN = _kept(static, R, tile, head, dynamic, persistent_TN.shape[1])
        d_value_KC = _dot(d_out_TK, (context_TC * kept_TC).astype(d_out_TK.dtype), 0, 0)
        d_persistent_value_KN = _dot(d_out_TK, (persistent_TN * kept_TN).astype(d_out_TK.dtype), 0, 0)
        d_context_TC = context_TC * (d_context_TC * kept_TC - delta_T[:, None])
        d_persistent_TN = persistent_TN * (d_persistent_TN * kept_TN - delta_T[:, None])
        d_position_TR = _unskew(d_context_TC)
        d_bias_R = d_position_TR.sum(0)

        dtype = tile.query_TK.dtype
        d_context_TC, d_persistent_TN, d_position_TR = (
            x.astype(dtype) for x in (d_context_TC, d_persistent_TN, d_position_TR)
        )
        d_query_TK = _dot(d_context_TC, tile.key_KC, 1, 1) + _dot(d_persistent_TN, head.persistent_key_KN, 1, 1)
        d_position_query_TK = _dot(d_position_TR, position_KR, 1, 1)
        if static.one_query:
            d_query_TK, d_position_query_TK = d_query_TK + d_position_query_TK, jnp.zeros_like(d_query_TK)
        sums = Sums(
            key_BKS=_add_at(sums.key_BKS, tile, _dot(tile.query_TK, d_context_TC, 0, 0)),
            value_BKS=_add_at(sums.value_BKS, tile, d_value_KC),
            position_KR=sums.position_KR + _dot(tile.position_query_TK, d_position_TR, 0, 0),
            persistent_key_KN=sums.persistent_key_KN + _dot(tile.query_TK, d_persistent_TN, 0, 0),
            persistent_value_KN=sums.persistent_value_KN + d_persistent_value_KN,
            bias_R=sums.bias_R + d_bias_R,
        )
        return sums, (d_query_TK * static.scale, d_position_query_TK * static.scale)

    of = (head.key_BKS, head.value_BKS, position_KR, head.persistent_key_KN, head.persistent_value_KN, bias_R)
    zeros = Sums._make(jnp.zeros(x.shape, bias_R.dtype) for x in of)
    sums, by_tile = jax.lax.scan(one_tile, zeros, jnp.arange(shape.B * shape.tiles))
    real = slice(shape.left, shape.left + shape.S)
    unseen = ((0, head.position_KL.shape[1] - R), (0, 0))
    return (
        *(_rows(shape, x) for x in by_tile),
        sums.key_BKS[:, :, real].transpose(0, 2, 1) * static.scale,
        sums.value_BKS[:, :, real].transpose(0, 2, 1),
        jnp.pad(sums.position_KR[:, ::-1].T, unseen) * static.scale,
        sums.persistent_key_KN.T * static.scale,
        sums.persistent_value_KN.T,
        _span_gradient(static, distance_R, head.span, sums.bias_R),
    )


def _select_rows(shape: Shape, head: Array, d_out_BTHK: Array, lse_HBT: Array, delta_HBT: Array):
    """One head's cotangents and statistics, tile by tile; a query beyond the row's end has cotangent 0."""
    beyond = ((0, 0), (0, shape.tiles * shape.tile - shape.T))
    d_out_BTK = jnp.pad(jax.lax.dynamic_index_in_dim(d_out_BTHK, head, 2, keepdims=False), (*beyond, (0, 0)))
    lse_BT, delta_BT = jnp.pad(lse_HBT[head], beyond), jnp.pad(delta_HBT[head], beyond)
    split = (shape.B * shape.tiles, shape.tile)
    return d_out_BTK.reshape(*split, -1), lse_BT.reshape(split), delta_BT.reshape(split)


def _add_at(sum_BKS: Array, tile: Tile, window_KC: Array) -> Array:
    start = (tile.row, 0, tile.first_column)
    window_BKC = window_KC[None] + jax.lax.dynamic_slice(sum_BKS, start, (1, *window_KC.shape))
    return jax.lax.dynamic_update_slice(sum_BKS, window_BKC, start)


def _span_gradient(static: Static, distance_R: Array, span: Array, d_bias_R: Array) -> Array:
    """d loss / d span through log m: 1 / (R m) on the ramp, both of its ends included, 0 elsewhere."""
    position_R = ramp_position(distance_R, span, static.ramp)
    on_ramp_R = (position_R >= 0) & (position_R <= 1)
    slope_R = 1 / (static.ramp * jnp.clip(position_R, TIE, 1))
    return jnp.sum(jnp.where(on_ramp_R, d_bias_R * slope_R, 0))
