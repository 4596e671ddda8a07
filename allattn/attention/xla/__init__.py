"""The operation in plain XLA: one head, one row and one tile of queries at a time, with a hand-written backward pass.

A tile of queries meets a window of consecutive keys. Its relative-position logits are computed by
distance, one product with the reversed table, and skewed into the window by padding and reshaping;
the soft span enters as log m(d), added to them before the skew, whose padding masks everything
outside the band. Per head, the number of distances is the smallest static bucket that holds the
head's reach, chosen at run time: farther keys are not touched. The backward pass keeps the output
and one log-sum-exp per query, and recomputes the weights.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width; inside one tile also: G row of the group, C column of the window of keys, R distance in
the bucket (farthest first), P the same padded to R + T + 1, A width and the span's bias.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from allattn.attention import dropout
from allattn.attention.autodiff import forbid_second_derivative, name_for_remat
from allattn.attention.contract import Dynamic, Inputs, Static
from allattn.attention.numerics import log_sum
from allattn.attention.span import (
    MASKED_LOGIT,
    MAX_MASK_DERIVATIVE,
    last_distance,
    ramp_position,
    reach,
)
from allattn.attention.xla.tiles import (
    Head,
    Shape,
    Tile,
    padded_positions,
    reach_sizes,
    select_head,
    select_tile,
    skew,
    unskew,
    work_shape,
)

Array = jax.Array


def all_attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments, as out and mass."""
    return _attention(static, inputs, dynamic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    return _attention_forward(static, inputs, dynamic)[0]


def _attention_forward(static, inputs, dynamic):
    out_HBTK, mass_HBT, lse_HBT = _for_each_head(static, inputs, dynamic, _head_forward, ())
    out_BTHK, lse_HBT = name_for_remat(
        out_HBTK.transpose(1, 2, 0, 3).astype(inputs.query_BTHK.dtype), lse_HBT
    )
    return (out_BTHK, mass_HBT.transpose(1, 2, 0)), (inputs, out_BTHK, lse_HBT, dynamic)


def _attention_backward(static, residuals, cotangents):
    (inputs, out_BTHK, lse_HBT, d_out_BTHK), dynamic = (
        forbid_second_derivative((*residuals[:3], cotangents[0])),
        residuals[3],
    )
    dtype = lse_HBT.dtype
    delta_HBT = jnp.sum(d_out_BTHK.astype(dtype) * out_BTHK.astype(dtype), axis=-1).transpose(
        2, 0, 1
    )
    gradients = _for_each_head(
        static, inputs, dynamic, _head_backward, (d_out_BTHK, lse_HBT, delta_HBT)
    )
    rows, (position_HLK, *by_head) = gradients[:4], gradients[4:]
    if inputs.position_HLK.shape[0] == 1:
        position_HLK = position_HLK.sum(0, keepdims=True)
    gradients = Inputs._make(
        (*(x_HBTK.transpose(1, 2, 0, 3) for x_HBTK in rows), position_HLK, *by_head)
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, inputs), None


_attention.defvjp(_attention_forward, _attention_backward)


def _for_each_head(static: Static, inputs: Inputs, dynamic: Dynamic, work: Callable, extra: tuple):
    """Run `work` on every head with the code of the bucket that its span needs; outputs gain a leading head axis."""
    L, shape = inputs.position_HLK.shape[1], work_shape(static, inputs)
    sizes = reach_sizes(L)

    def one_head(head: Array):
        selected = select_head(static, inputs, shape, head)
        needed = reach(selected.span, static.ramp, static.first_distance, L)
        bucket = jnp.searchsorted(jnp.array(sizes), needed)
        branches = [functools.partial(work, static, shape, size) for size in sizes]
        return jax.lax.switch(bucket, branches, selected, dynamic, extra)

    return jax.lax.map(one_head, jnp.arange(inputs.query_BTHK.shape[2]))


def _dot(equation: str, *operands: Array) -> Array:
    """A product of float32 (or float64) operands: XLA on CPU lacks bfloat16 products with float32 sums."""
    return jnp.einsum(equation, *operands)


def _dot_rows(x_GTK: Array, y_GTN: Array) -> Array:
    """The sum over all queries of x times y, as (K, N).

    XLA on CPU runs a product over the first dimension of both on one core; with one of them
    transposed before, on all.
    """
    queries = x_GTK.shape[0] * x_GTK.shape[1]
    x_KX = jax.lax.optimization_barrier(x_GTK.reshape(queries, x_GTK.shape[2]).T)
    return _dot("kx,xn->kn", x_KX, y_GTN.reshape(queries, y_GTN.shape[2]))


def _logits(tile: Tile, position_AP: Array, head: Head) -> tuple[Array, Array]:
    context_GTC = _dot("gtk,gkc->gtc", tile.query_GTK, tile.key_GKC)
    context_GTC += skew(_dot("gta,ap->gtp", tile.position_query_GTA, position_AP))
    if tile.absent_C is not None:
        context_GTC += tile.absent_C
    return context_GTC, _dot("gtk,kn->gtn", tile.query_GTK, head.persistent_key_KN)


def _factors(
    static: Static, tile: Tile, head: Head, dynamic: Dynamic, domain: int, index_TX: Array
) -> Array:
    """Dropout's factors of weights that each query of a tile knows by an index, as factors_GTX."""
    G, T = tile.query_GTK.shape[:2]
    row_G1 = (dynamic.row_offset + tile.first_row + jnp.arange(G))[:, None]
    place = (
        dynamic.dropout_seed,
        row_G1,
        dynamic.head_offset + head.number,
        tile.first_query + jnp.arange(T),
    )
    kept_GTX = dropout.keep(
        dropout.query_key(*place, domain)[..., None], index_TX, static.dropout_rate
    )
    return kept_GTX / (1 - static.dropout_rate)


def _kept(
    static: Static, shape: Shape, R: int, tile: Tile, head: Head, dynamic: Dynamic
) -> tuple[Array, Array]:
    """Dropout's factors, 0 or 1 / (1 - rate), for the windows and for the persistent pairs."""
    T, C = shape.tile(R), R + shape.tile(R)
    distance_TC = static.first_distance + R - 1 + jnp.arange(T)[:, None] - jnp.arange(C)
    return (
        _factors(static, tile, head, dynamic, dropout.CONTEXT, distance_TC),
        _factors(static, tile, head, dynamic, dropout.PERSISTENT, jnp.arange(shape.N)[None]),
    )


def _head_forward(static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, extra: tuple):
    """Returns out_BTK, mass_BT and lse_BT of one head, given R, the number of distances that it needs."""
    position_AP = padded_positions(static, shape, R, head)

    def one_tile(number: Array):
        tile = select_tile(static, shape, R, head, dynamic, number)
        context_GTC, persistent_GTN = _logits(tile, position_AP, head)
        top_GT1 = jnp.max(context_GTC, axis=2, keepdims=True)
        top_GT1 = jnp.maximum(
            top_GT1, jnp.max(persistent_GTN, axis=2, keepdims=True, initial=MASKED_LOGIT)
        )
        top_GT1 = jnp.maximum(
            top_GT1, MASKED_LOGIT / 10
        )  # a query that sees nothing gets weights exp(-9e29) = 0
        context_GTC, persistent_GTN = (
            jnp.exp(context_GTC - top_GT1),
            jnp.exp(persistent_GTN - top_GT1),
        )
        persistent_GT1 = persistent_GTN.sum(2, keepdims=True)
        total_GT1 = context_GTC.sum(2, keepdims=True) + persistent_GT1
        lse_GT1 = log_sum(top_GT1, total_GT1)
        total_GT1 = jnp.where(total_GT1 > 0, total_GT1, 1)
        if static.dropout_rate:
            kept_GTC, kept_GTN = _kept(static, shape, R, tile, head, dynamic)
            context_GTC, persistent_GTN = context_GTC * kept_GTC, persistent_GTN * kept_GTN
        out_GTK = _dot("gtc,gkc->gtk", context_GTC, tile.value_GKC)
        out_GTK += _dot("gtn,kn->gtk", persistent_GTN, head.persistent_value_KN)
        return out_GTK / total_GT1, (persistent_GT1 / total_GT1)[..., 0], lse_GT1[..., 0]

    results = jax.lax.map(one_tile, jnp.arange(shape.tiles(R)))
    return tuple(_from_tiles(shape, x) for x in results)


def _from_tiles(shape: Shape, x_XGTK: Array) -> Array:
    """(groups x tiles, rows of a group, queries of a tile, ...) to (B, T, ...)."""
    G, T = x_XGTK.shape[1:3]
    x_GXTK = jnp.moveaxis(x_XGTK.reshape(shape.B // G, shape.length // T, *x_XGTK.shape[1:]), 2, 1)
    return x_GXTK.reshape(shape.B, shape.length, *x_XGTK.shape[3:])[:, : shape.T]


def _to_tiles(shape: Shape, R: int, x_BTK: Array) -> Array:
    """The inverse of `_from_tiles`; a query beyond the row's end gets zeros."""
    G, T = shape.rows(R), shape.tile(R)
    beyond = ((0, 0), (0, shape.length - shape.T), (0, 0))
    x_GXTK = jnp.pad(x_BTK, beyond).reshape(shape.B // G, G, shape.length // T, T, x_BTK.shape[2])
    return jnp.moveaxis(x_GXTK, 2, 1).reshape(-1, G, T, x_BTK.shape[2])


class Sums(NamedTuple):
    """Gradients of one head that tiles add to."""

    key_BKS: Array
    value_BKS: Array
    position_AP: Array
    persistent_key_KN: Array
    persistent_value_KN: Array


def _head_backward(
    static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, extra: tuple
):
    """Returns the gradients of one head's inputs, in the order of `Inputs`."""
    position_AP = padded_positions(static, shape, R, head)
    d_out_BTHK, lse_HBT, delta_HBT = extra
    d_out_BTK = jax.lax.dynamic_index_in_dim(d_out_BTHK, head.number, 2, keepdims=False).astype(
        lse_HBT.dtype
    )
    by_row = (d_out_BTK, lse_HBT[head.number][..., None], delta_HBT[head.number][..., None])
    by_tile = tuple(_to_tiles(shape, R, x) for x in by_row)

    def one_tile(sums: Sums, taken: tuple) -> tuple[Sums, tuple]:
        number, (d_out_GTK, lse_GT1, delta_GT1) = taken
        tile = select_tile(static, shape, R, head, dynamic, number)
        context_GTC, persistent_GTN = (
            jnp.exp(x - lse_GT1) for x in _logits(tile, position_AP, head)
        )
        d_context_GTC = _dot("gtk,gkc->gtc", d_out_GTK, tile.value_GKC)
        d_persistent_GTN = _dot("gtk,kn->gtn", d_out_GTK, head.persistent_value_KN)
        kept_GTC = kept_GTN = jnp.ones((), lse_GT1.dtype)
        if static.dropout_rate:
            kept_GTC, kept_GTN = _kept(static, shape, R, tile, head, dynamic)
        dropped_GTC, dropped_GTN = context_GTC * kept_GTC, persistent_GTN * kept_GTN
        d_context_GTC = context_GTC * (d_context_GTC * kept_GTC - delta_GT1)
        d_persistent_GTN = persistent_GTN * (d_persistent_GTN * kept_GTN - delta_GT1)
        d_position_GTP = unskew(d_context_GTC)
        d_query_GTK = _dot("gtc,gkc->gtk", d_context_GTC, tile.key_GKC)
        d_query_GTK += _dot("gtn,kn->gtk", d_persistent_GTN, head.persistent_key_KN)
        d_position_query_GTK = _dot("gtp,kp->gtk", d_position_GTP, position_AP[:-1])
        if static.one_query:
            d_query_GTK, d_position_query_GTK = (
                d_query_GTK + d_position_query_GTK,
                jnp.zeros_like(d_query_GTK),
            )
        sums = Sums(
            key_BKS=_add_at(
                sums.key_BKS, tile, _dot("gtk,gtc->gkc", tile.query_GTK, d_context_GTC)
            ),
            value_BKS=_add_at(sums.value_BKS, tile, _dot("gtk,gtc->gkc", d_out_GTK, dropped_GTC)),
            position_AP=sums.position_AP + _dot_rows(tile.position_query_GTA, d_position_GTP),
            persistent_key_KN=sums.persistent_key_KN + _dot_rows(tile.query_GTK, d_persistent_GTN),
            persistent_value_KN=sums.persistent_value_KN + _dot_rows(d_out_GTK, dropped_GTN),
        )
        return sums, (d_query_GTK * static.scale, d_position_query_GTK * static.scale)

    of = (
        head.key_BKS,
        head.value_BKS,
        position_AP,
        head.persistent_key_KN,
        head.persistent_value_KN,
    )
    zeros = Sums._make(jnp.zeros(x.shape, position_AP.dtype) for x in of)
    sums, d_queries = jax.lax.scan(one_tile, zeros, (jnp.arange(by_tile[0].shape[0]), by_tile))
    d_mask = _end_gradient(static, shape, R, head, dynamic, position_AP, by_tile)
    real = slice(shape.left, shape.left + shape.S)
    return (
        *(_from_tiles(shape, x) for x in d_queries),
        sums.key_BKS[:, :, real].transpose(0, 2, 1),
        sums.value_BKS[:, :, real].transpose(0, 2, 1),
        jnp.pad(sums.position_AP[:-1, :R][:, ::-1].T, ((0, head.position_KL.shape[1] - R), (0, 0))),
        sums.persistent_key_KN.T,
        sums.persistent_value_KN.T,
        _span_gradient(static, R, head.span, sums.position_AP[-1, :R]) + d_mask / static.ramp,
    )


def _add_at(sum_BKS: Array, tile: Tile, window_GKC: Array) -> Array:
    start = (tile.first_row, 0, tile.first_column)
    window_GKC = window_GKC + jax.lax.dynamic_slice(sum_BKS, start, window_GKC.shape)
    return jax.lax.dynamic_update_slice(sum_BKS, window_GKC, start)


def _span_gradient(static: Static, R: int, span: Array, d_bias_R: Array) -> Array:
    """d loss / d span through log m: 1 / (ramp m) on the ramp, its near end included, where m is not almost 0."""
    position_R = ramp_position(static.first_distance + R - 1 - jnp.arange(R), span, static.ramp)
    on_ramp_R = (position_R >= 1 / MAX_MASK_DERIVATIVE) & (position_R <= 1)
    slope_R = 1 / (static.ramp * jnp.where(on_ramp_R, position_R, 1))
    return jnp.sum(jnp.where(on_ramp_R, d_bias_R * slope_R, 0))


def _end_gradient(
    static: Static,
    shape: Shape,
    R: int,
    head: Head,
    dynamic: Dynamic,
    position_AP: Array,
    by_tile: tuple,
) -> Array:
    """d loss / d m at the last distance, if m is almost 0: through log m nothing would limit it."""
    last = last_distance(head.span, static.ramp)
    column = (
        static.first_distance + R - 1 - last
    )  # of query 0; below 0, the table ends before the ramp does

    def one_tile(taken: tuple) -> Array:
        number, (d_out_GTK, lse_GT1, delta_GT1) = taken
        tile, (T, K) = select_tile(static, shape, R, head, dynamic, number), d_out_GTK.shape[1:]
        key_GKT, value_GKT = (
            jax.lax.dynamic_slice_in_dim(x, column, T, 2) for x in (tile.key_GKC, tile.value_GKC)
        )
        position_K = jax.lax.dynamic_index_in_dim(position_AP, column, 1, keepdims=False)[:K]
        logits_GT = _dot("gtk,gkt->gt", tile.query_GTK, key_GKT)
        logits_GT += _dot("gtk,k->gt", tile.position_query_GTA[..., :K], position_K)
        if tile.absent_C is not None:
            logits_GT += jax.lax.dynamic_slice_in_dim(tile.absent_C, column, T)
        d_weight_GT = _dot("gtk,gkt->gt", d_out_GTK, value_GKT)
        if static.dropout_rate:
            d_weight_GT *= _factors(static, tile, head, dynamic, dropout.CONTEXT, last[None, None])[
                ..., 0
            ]
        bare_GT = jnp.exp(jnp.minimum(logits_GT - lse_GT1[..., 0], math.log(MAX_MASK_DERIVATIVE)))
        return jnp.sum(bare_GT * (d_weight_GT - delta_GT1[..., 0]))

    def all_tiles() -> Array:
        return jax.lax.map(one_tile, (jnp.arange(by_tile[0].shape[0]), by_tile)).sum()

    almost_0 = ramp_position(last, head.span, static.ramp) < 1 / MAX_MASK_DERIVATIVE
    return jax.lax.cond(almost_0 & (column >= 0), all_tiles, lambda: jnp.zeros_like(head.span))
