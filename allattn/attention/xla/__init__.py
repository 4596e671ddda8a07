"""The operation in plain XLA: one head, a group of rows and one tile of queries at a time.

A tile of queries meets a window of consecutive keys. Its relative-position logits are computed by
distance, one product with the reversed table, and skewed into the window by padding and reshaping;
the soft span enters as log m(d), added to them before the skew, whose padding masks everything
outside the band (`tiles.skew` has a picture). Per head, the number of distances is the smallest of
`tiles.reach_sizes` that holds the head's reach, chosen at run time: farther keys are not touched.
The backward pass is written by hand. It keeps the output and one log-sum-exp per query and
recomputes the weights, so that no array of T x S x H ever exists: ordinary differentiation would
keep several (tests/attention/test_attention.py, test_memory).

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width; inside one tile also: G row of the group, C column of the window of keys, R distance in
reach (farthest first), P the same padded to R + T + 1, A head width and one column more, which
carries log m.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from allattn.attention import dropout
from allattn.attention.autodiff import forbid_second_derivative, name_for_remat
from allattn.attention.contract import Dynamic, Inputs, Static
from allattn.attention.numerics import LEAST_TOP, log_sum
from allattn.attention.span import (
    MASKED_LOGIT,
    MAX_MASK_DERIVATIVE,
    kept_distances,
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
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments.

    Returns:
      out_BTHK in the query's dtype and mass_BTH in the dtype of the statistics.
    """
    out_BTHK, mass_BTH, lse_BTH = _attention(static, inputs, dynamic)
    if not static.span_epsilon:
        return out_BTHK, mass_BTH
    # The papers' normaliser makes all weights of a query smaller by the same factor.
    factor_BTH = _epsilon_factor(static, inputs, dynamic, lse_BTH)
    scaled_BTHK = out_BTHK.astype(factor_BTH.dtype) * factor_BTH[..., None]
    mass_BTH = mass_BTH * jax.lax.stop_gradient(factor_BTH)
    return scaled_BTHK.astype(out_BTHK.dtype), mass_BTH


def _epsilon_factor(static: Static, inputs: Inputs, dynamic: Dynamic, lse_BTH: Array) -> Array:
    """masked sum / (masked sum + epsilon x unmasked sum), of every query.

    Args:
      static, inputs, dynamic: of the call.
      lse_BTH: log of the masked sums.
    """
    # All that are kept count fully, and nothing beyond: a ramp of 1 behind them.
    kept = kept_distances(inputs.span_H, static.ramp, inputs.position_HLK.shape[1])
    span = (static.first_distance + kept - 2).astype(inputs.span_H.dtype)
    unmasked = inputs._replace(span_H=jnp.full_like(inputs.span_H, span))
    unmasked_static = dataclasses.replace(static, ramp=1, dropout_rate=0.0)
    _, _, unmasked_lse_BTH = _attention(unmasked_static, unmasked, dynamic)

    # Where nothing has a weight there is no logarithm, and nothing to divide.
    is_any_BTH = lse_BTH < -MASKED_LOGIT / 2
    excess_BTH = jnp.where(is_any_BTH, lse_BTH - unmasked_lse_BTH, 0)
    share_BTH = jnp.exp(excess_BTH)
    return share_BTH / (share_BTH + static.span_epsilon)


# --- all heads -----------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array, Array]:
    """Output, persistent mass, and lse_BTH, the log-sum-exp with a gradient where it is used."""
    return _attention_forward(static, inputs, dynamic)[0]


def _attention_forward(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[tuple, tuple]:
    # A head at a time; then heads go where the contract has them.
    out_HBTK, mass_HBT, lse_HBT = _for_each_head(static, inputs, dynamic, _head_forward, ())
    out_BTHK = _heads_third(out_HBTK).astype(inputs.query_BTHK.dtype)
    out_BTHK, lse_HBT = name_for_remat(out_BTHK, lse_HBT)
    results = (out_BTHK, mass_HBT.transpose(1, 2, 0), lse_HBT.transpose(1, 2, 0))
    return results, (inputs, out_BTHK, lse_HBT, dynamic)


def _attention_backward(static: Static, residuals: tuple, cotangents: tuple) -> tuple:
    inputs, out_BTHK, lse_HBT, dynamic = residuals
    d_out_BTHK, _, d_lse_BTH = cotangents
    inputs, out_BTHK, lse_HBT, d_out_BTHK = forbid_second_derivative(
        (inputs, out_BTHK, lse_HBT, d_out_BTHK)
    )
    # The sum of weight times gradient of the weight, which softmax's derivative subtracts.
    dtype = lse_HBT.dtype
    delta_BTH = jnp.sum(d_out_BTHK.astype(dtype) * out_BTHK.astype(dtype), axis=-1)
    # A logit's gradient of the log-sum-exp is its weight.
    if static.span_epsilon:
        delta_BTH -= d_lse_BTH
    delta_HBT = delta_BTH.transpose(2, 0, 1)
    by_head = _for_each_head(
        static, inputs, dynamic, _head_backward, (d_out_BTHK, lse_HBT, delta_HBT)
    )
    # A table shared by all heads gets the sum of their gradients.
    position_HLK = by_head.position_LK
    if inputs.position_HLK.shape[0] == 1:
        position_HLK = position_HLK.sum(0, keepdims=True)
    gradients = Inputs(
        query_BTHK=_heads_third(by_head.query_BTK),
        position_query_BTHK=_heads_third(by_head.position_query_BTK),
        key_BSHK=_heads_third(by_head.key_BSK),
        value_BSHK=_heads_third(by_head.value_BSK),
        position_HLK=position_HLK,
        persistent_key_HNK=by_head.persistent_key_NK,
        persistent_value_HNK=by_head.persistent_value_NK,
        span_H=by_head.span,
        persistent_bias_HN=by_head.persistent_bias_N,
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, inputs), None


_attention.defvjp(_attention_forward, _attention_backward)


def _heads_third(x_HBTK: Array) -> Array:
    """(H, B, T, K) to (B, T, H, K)."""
    return x_HBTK.transpose(1, 2, 0, 3)


def _for_each_head(
    static: Static, inputs: Inputs, dynamic: Dynamic, work: Callable, extra: tuple
) -> Any:
    """Run `work` on every head, with the code for as many distances as its span needs.

    Returns:
      What `work` returns, with a leading dimension for heads.
    """
    L = inputs.position_HLK.shape[1]
    H = inputs.query_BTHK.shape[2]
    shape = work_shape(static, inputs)
    sizes = reach_sizes(L)

    # One branch is compiled per size, and the head's span chooses among them when the code runs.
    def one_head(head: Array) -> Any:
        selected = select_head(static, inputs, shape, head)
        needed = reach(selected.span, static.ramp, static.first_distance, L)
        choice = jnp.searchsorted(jnp.array(sizes), needed)
        branches = [functools.partial(work, static, shape, size) for size in sizes]
        return jax.lax.switch(choice, branches, selected, dynamic, extra)

    return jax.lax.map(one_head, jnp.arange(H))


# --- one head ------------------------------------------------------------------------------------


class Mask(NamedTuple):
    """Dropout's words of one head (`dropout.keep` makes the mask of them), for all rows."""

    # words (B, T rounded up to whole tiles), those of all windows of keys, and of persistent pairs
    query: dropout.QueryWords
    column_BC: Array
    pair_BN: Array


class Work(NamedTuple):
    """What every tile of one head needs, given R, the number of distances that the head sees."""

    static: Static
    shape: Shape
    R: int
    head: Head
    dynamic: Dynamic
    position_AP: Array  # from `padded_positions`
    mask: Mask | None  # from `_mask`

    def select(self, number: Array) -> Tile:
        """Tile `number` of the head."""
        return select_tile(self.static, self.shape, self.R, self.head, self.dynamic, number)


def _dot(equation: str, *operands: Array) -> Array:
    """A product of float32 or float64 arrays.

    On a CPU without instructions for bfloat16, products of such arrays with float32 sums take 1.1
    to 2 times as long.
    """
    return jnp.einsum(equation, *operands)


def _dot_rows(x_GTK: Array, y_GTN: Array) -> Array:
    """The sum over all queries of x times y, as (K, N).

    XLA on CPU runs a product over the first dimension of both on one core; with one of them
    transposed before, on all.
    """
    # The barrier keeps XLA from folding the transposition back into the product.
    queries = x_GTK.shape[0] * x_GTK.shape[1]
    x_KX = jax.lax.optimization_barrier(x_GTK.reshape(queries, x_GTK.shape[2]).T)
    return _dot("kx,xn->kn", x_KX, y_GTN.reshape(queries, y_GTN.shape[2]))


def _logits(work: Work, tile: Tile) -> tuple[Array, Array]:
    """Logits of a tile's windows, MASKED_LOGIT outside the band, and of the persistent pairs."""
    # By content, then by position with log m, skewed from distances to columns.
    context_GTC = _dot("gtk,gkc->gtc", tile.query_GTK, tile.key_GKC)
    context_GTC += skew(_dot("gta,ap->gtp", tile.position_query_GTA, work.position_AP))
    # Keys before key_start or beyond the last one.
    if tile.absent_C is not None:
        context_GTC += tile.absent_C
    persistent_GTN = _dot("gtk,kn->gtn", tile.query_GTK, work.head.persistent_key_KN)
    if work.head.persistent_bias_N is not None:
        persistent_GTN += work.head.persistent_bias_N
    return context_GTC, persistent_GTN


def _mask(static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic) -> Mask | None:
    """What dropout's mask of one head is made from; None: nothing is dropped.

    Computed before the tiles, so that it is in memory: XLA would hash again for every weight.
    """
    if not static.dropout_rate:
        return None
    # Global row and head, and the query's place in the block: they name a weight on any mesh.
    row_B1 = (dynamic.row_offset + jnp.arange(shape.B))[:, None]
    owner = (dynamic.dropout_seed, row_B1, dynamic.head_offset + head.number)
    query_T = jnp.arange(shape.length)
    # From the farthest key of the first query; keys count from the block's first query.
    farthest = static.first_distance + R - 1
    index_C = jnp.arange(R + shape.length) - farthest
    return Mask(
        query=dropout.query_words(*owner, query_T, dropout.CONTEXT),
        column_BC=dropout.column_words(*owner, index_C, dropout.CONTEXT),
        pair_BN=dropout.column_words(*owner, jnp.arange(shape.N), dropout.PERSISTENT),
    )


def _queries_of(tile: Tile, words: dropout.QueryWords) -> dropout.QueryWords:
    """Words of a tile's queries, both (G, T, 1), from those of all queries of the head."""
    G, T, _ = tile.query_GTK.shape
    start = (tile.first_row, tile.first_query)
    return jax.tree.map(lambda x_BT: jax.lax.dynamic_slice(x_BT, start, (G, T))[..., None], words)


def _after_dropout(
    work: Work, tile: Tile, context_GTC: Array, persistent_GTN: Array
) -> tuple[Array, Array]:
    """Weights of the windows and of the persistent pairs, or their gradients, with 0 for dropped.

    Those that stay are not yet divided by 1 - rate.
    """
    mask = work.mask
    if mask is None:
        return context_GTC, persistent_GTN
    rate = work.static.dropout_rate
    G, _, C = context_GTC.shape
    # The window begins at the farthest key of the tile's first query.
    start = (tile.first_row, tile.first_query)
    column_GC = jax.lax.dynamic_slice(mask.column_BC, start, (G, C))
    query_GT1 = _queries_of(tile, mask.query)
    kept_GTC = dropout.keep(query_GT1, column_GC[:, None], rate)
    # Pairs are the same for every tile of the row.
    pair_GN = jax.lax.dynamic_slice_in_dim(mask.pair_BN, tile.first_row, G)
    kept_GTN = dropout.keep(query_GT1, pair_GN[:, None], rate)
    return jnp.where(kept_GTC, context_GTC, 0), jnp.where(kept_GTN, persistent_GTN, 0)


def _work(static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic) -> Work:
    """What the tiles of a head that sees R distances need."""
    positions_AP = padded_positions(static, shape, R, head)
    return Work(
        static, shape, R, head, dynamic, positions_AP, _mask(static, shape, R, head, dynamic)
    )


def _head_forward(
    static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, extra: tuple
) -> tuple[Array, ...]:
    """out_BTK, mass_BT and lse_BT of one head, given R, the number of distances that it needs."""
    del extra
    work = _work(static, shape, R, head, dynamic)
    by_tile = jax.lax.map(functools.partial(_tile_forward, work), jnp.arange(shape.tiles(R)))
    return tuple(_from_tiles(shape, x) for x in by_tile)


def _tile_forward(work: Work, number: Array) -> tuple[Array, Array, Array]:
    """out_GTK, mass_GT and lse_GT of one tile."""
    tile = work.select(number)
    context_GTC, persistent_GTN = _logits(work, tile)

    # One softmax over the window and the persistent pairs, not yet divided by its sum.
    top_GT1 = jnp.max(context_GTC, axis=2, keepdims=True)
    persistent_top_GT1 = jnp.max(persistent_GTN, axis=2, keepdims=True, initial=MASKED_LOGIT)
    top_GT1 = jnp.maximum(top_GT1, persistent_top_GT1)
    top_GT1 = jnp.maximum(top_GT1, LEAST_TOP)
    context_GTC = jnp.exp(context_GTC - top_GT1)
    persistent_GTN = jnp.exp(persistent_GTN - top_GT1)
    persistent_GT1 = persistent_GTN.sum(2, keepdims=True)
    total_GT1 = context_GTC.sum(2, keepdims=True) + persistent_GT1
    lse_GT1 = log_sum(top_GT1, total_GT1)
    total_GT1 = jnp.where(total_GT1 > 0, total_GT1, 1)

    # Dropout acts on the weights and not on their sum.
    context_GTC, persistent_GTN = _after_dropout(work, tile, context_GTC, persistent_GTN)

    # The divisions come last, where there are fewer numbers.
    out_GTK = _dot("gtc,gkc->gtk", context_GTC, tile.value_GKC)
    out_GTK += _dot("gtn,kn->gtk", persistent_GTN, work.head.persistent_value_KN)
    out_GTK = out_GTK / (total_GT1 * (1 - work.static.dropout_rate))
    return out_GTK, (persistent_GT1 / total_GT1)[..., 0], lse_GT1[..., 0]


def _from_tiles(shape: Shape, x_XGTK: Array) -> Array:
    """(groups x tiles, rows of a group, queries of a tile, ...) to (B, T, ...)."""
    G, T = x_XGTK.shape[1:3]
    groups = shape.B // G
    tiles = shape.length // T
    x_GXTK = jnp.moveaxis(x_XGTK.reshape(groups, tiles, *x_XGTK.shape[1:]), 2, 1)
    return x_GXTK.reshape(shape.B, shape.length, *x_XGTK.shape[3:])[:, : shape.T]


def _to_tiles(shape: Shape, R: int, x_BTK: Array) -> Array:
    """The inverse of `_from_tiles`; a query beyond the row's end gets zeros."""
    G = shape.rows(R)
    T = shape.tile(R)
    K = x_BTK.shape[2]
    beyond = ((0, 0), (0, shape.length - shape.T), (0, 0))
    x_BTK = jnp.pad(x_BTK, beyond)
    x_GXTK = x_BTK.reshape(shape.B // G, G, shape.length // T, T, K)
    return jnp.moveaxis(x_GXTK, 2, 1).reshape(-1, G, T, K)


class Sums(NamedTuple):
    """Gradients of one head that tiles add to, in the layout of `Head`."""

    key_BKS: Array
    value_BKS: Array
    position_AP: Array
    persistent_key_KN: Array
    persistent_value_KN: Array
    persistent_bias_N: Array | None


class HeadGradients(NamedTuple):
    """Gradients of one head's inputs, in the order of `Inputs`."""

    query_BTK: Array
    position_query_BTK: Array
    key_BSK: Array
    value_BSK: Array
    position_LK: Array
    persistent_key_NK: Array
    persistent_value_NK: Array
    span: Array
    persistent_bias_N: Array | None


def _head_backward(
    static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, extra: tuple
) -> HeadGradients:
    """Gradients of one head's inputs, given R, the number of distances that it needs."""
    work = _work(static, shape, R, head, dynamic)

    # Cut what the forward pass left and the output's gradient into tiles.
    d_out_BTHK, lse_HBT, delta_HBT = extra
    d_out_BTK = jax.lax.dynamic_index_in_dim(d_out_BTHK, head.number, 2, keepdims=False)
    # Only weights that dropout keeps meet it: their scale is taken in here.
    d_out_BTK = d_out_BTK.astype(lse_HBT.dtype) / (1 - static.dropout_rate)
    lse_BT1 = lse_HBT[head.number][..., None]
    delta_BT1 = delta_HBT[head.number][..., None]
    by_tile = tuple(_to_tiles(shape, R, x) for x in (d_out_BTK, lse_BT1, delta_BT1))

    # Tiles come one after the other, and each adds to the sums.
    zeros = Sums(
        key_BKS=jnp.zeros_like(head.key_BKS),
        value_BKS=jnp.zeros_like(head.value_BKS),
        position_AP=jnp.zeros_like(work.position_AP),
        persistent_key_KN=jnp.zeros_like(head.persistent_key_KN),
        persistent_value_KN=jnp.zeros_like(head.persistent_value_KN),
        persistent_bias_N=jax.tree.map(jnp.zeros_like, head.persistent_bias_N),
    )
    tiles = (jnp.arange(by_tile[0].shape[0]), by_tile)
    sums, d_queries = jax.lax.scan(functools.partial(_tile_backward, work), zeros, tiles)
    d_mask = _end_gradient(work, by_tile)

    # Take the padding off, and turn back what lies farthest first or width first.
    d_query_XGTK, d_position_query_XGTK = d_queries
    real = slice(shape.left, shape.left + shape.S)
    beyond_reach = ((0, head.position_KL.shape[1] - R), (0, 0))
    return HeadGradients(
        query_BTK=_from_tiles(shape, d_query_XGTK),
        position_query_BTK=_from_tiles(shape, d_position_query_XGTK),
        key_BSK=sums.key_BKS[:, :, real].transpose(0, 2, 1),
        value_BSK=sums.value_BKS[:, :, real].transpose(0, 2, 1),
        position_LK=jnp.pad(sums.position_AP[:-1, :R][:, ::-1].T, beyond_reach),
        persistent_key_NK=sums.persistent_key_KN.T,
        persistent_value_NK=sums.persistent_value_KN.T,
        span=_span_gradient(static, R, head.span, sums.position_AP[-1, :R]) + d_mask / static.ramp,
        persistent_bias_N=sums.persistent_bias_N,
    )


def _tile_backward(work: Work, sums: Sums, operands: tuple) -> tuple[Sums, tuple[Array, Array]]:
    """Add one tile's part to the sums, and return the gradients of its queries."""
    static = work.static
    head = work.head
    number, (d_out_GTK, lse_GT1, delta_GT1) = operands
    tile = work.select(number)

    # Recompute the weights, normalised by the log-sum-exp.
    context_GTC, persistent_GTN = _logits(work, tile)
    context_GTC = jnp.exp(context_GTC - lse_GT1)
    persistent_GTN = jnp.exp(persistent_GTN - lse_GT1)

    # Gradients of the weights, 0 for those that were dropped; then of the logits: w (d_w - delta).
    d_context_GTC = _dot("gtk,gkc->gtc", d_out_GTK, tile.value_GKC)
    d_persistent_GTN = _dot("gtk,kn->gtn", d_out_GTK, head.persistent_value_KN)
    d_context_GTC, d_persistent_GTN = _after_dropout(work, tile, d_context_GTC, d_persistent_GTN)
    dropped_GTC, dropped_GTN = _after_dropout(work, tile, context_GTC, persistent_GTN)
    d_context_GTC = context_GTC * (d_context_GTC - delta_GT1)
    d_persistent_GTN = persistent_GTN * (d_persistent_GTN - delta_GT1)

    # Gradients of the queries. One query that serves both products gets the sum of its gradients.
    d_position_GTP = unskew(d_context_GTC)
    d_query_GTK = _dot("gtc,gkc->gtk", d_context_GTC, tile.key_GKC)
    d_query_GTK += _dot("gtn,kn->gtk", d_persistent_GTN, head.persistent_key_KN)
    d_position_query_GTK = _dot("gtp,kp->gtk", d_position_GTP, work.position_AP[:-1])
    if static.one_query:
        d_query_GTK = d_query_GTK + d_position_query_GTK
        d_position_query_GTK = jnp.zeros_like(d_query_GTK)

    # What all tiles share.
    d_bias_N = None
    if sums.persistent_bias_N is not None:
        d_bias_N = sums.persistent_bias_N + d_persistent_GTN.sum((0, 1))
    d_key_GKC = _dot("gtk,gtc->gkc", tile.query_GTK, d_context_GTC)
    key_BKS = _add_at(sums.key_BKS, tile, d_key_GKC)
    d_value_GKC = _dot("gtk,gtc->gkc", d_out_GTK, dropped_GTC)
    value_BKS = _add_at(sums.value_BKS, tile, d_value_GKC)
    sums = Sums(
        key_BKS=key_BKS,
        value_BKS=value_BKS,
        position_AP=sums.position_AP + _dot_rows(tile.position_query_GTA, d_position_GTP),
        persistent_key_KN=sums.persistent_key_KN + _dot_rows(tile.query_GTK, d_persistent_GTN),
        persistent_value_KN=sums.persistent_value_KN + _dot_rows(d_out_GTK, dropped_GTN),
        persistent_bias_N=d_bias_N,
    )
    # The queries of a tile are scaled, those of the inputs are not.
    return sums, (d_query_GTK * static.scale, d_position_query_GTK * static.scale)


def _add_at(sum_BKS: Array, tile: Tile, window_GKC: Array) -> Array:
    """Add a tile's window to the sum over all windows, which overlap."""
    # The tile's rows, and its window among the padded keys.
    start = (tile.first_row, 0, tile.first_column)
    window_GKC = window_GKC + jax.lax.dynamic_slice(sum_BKS, start, window_GKC.shape)
    return jax.lax.dynamic_update_slice(sum_BKS, window_GKC, start)


def _span_gradient(static: Static, R: int, span: Array, d_bias_R: Array) -> Array:
    """d loss / d span through log m.

    That is 1 / (ramp m) on the ramp, its near end included, where m is not almost 0.
    """
    position_R = ramp_position(static.first_distance + R - 1 - jnp.arange(R), span, static.ramp)
    # Where m is almost 0, `_end_gradient` takes over.
    on_ramp_R = (position_R >= 1 / MAX_MASK_DERIVATIVE) & (position_R <= 1)
    slope_R = 1 / (static.ramp * jnp.where(on_ramp_R, position_R, 1))
    return jnp.sum(jnp.where(on_ramp_R, d_bias_R * slope_R, 0))


def _end_gradient(work: Work, by_tile: tuple[Array, ...]) -> Array:
    """d loss / d m at the last distance, if m is almost 0: through log m nothing would limit it.

    Args:
      work: of the head.
      by_tile: the output's gradient, log-sum-exp and delta of every tile.
    """
    static = work.static
    span = work.head.span
    last = last_distance(span, static.ramp)
    # The window's column of the last distance, for query 0; below 0, the table ends before the
    # ramp does.
    column = static.first_distance + work.R - 1 - last

    def all_tiles() -> Array:
        one_tile = functools.partial(_tile_end_gradient, work, column)
        return jax.lax.map(one_tile, (jnp.arange(by_tile[0].shape[0]), by_tile)).sum()

    almost_0 = ramp_position(last, span, static.ramp) < 1 / MAX_MASK_DERIVATIVE
    return jax.lax.cond(almost_0 & (column >= 0), all_tiles, lambda: jnp.zeros_like(span))


def _tile_end_gradient(work: Work, column: Array, operands: tuple) -> Array:
    """One tile's part of `_end_gradient`: a single key for each query, along a diagonal."""
    number, (d_out_GTK, lse_GT1, delta_GT1) = operands
    tile = work.select(number)
    G, T, K = d_out_GTK.shape
    # The keys and values at the last distance, one query after the other.
    key_GKT = jax.lax.dynamic_slice_in_dim(tile.key_GKC, column, T, 2)
    value_GKT = jax.lax.dynamic_slice_in_dim(tile.value_GKC, column, T, 2)
    position_K = jax.lax.dynamic_index_in_dim(work.position_AP, column, 1, keepdims=False)[:K]
    # Their logits, without the log m that position_AP has as its last row.
    logits_GT = _dot("gtk,gkt->gt", tile.query_GTK, key_GKT)
    logits_GT += _dot("gtk,k->gt", tile.position_query_GTA[..., :K], position_K)
    if tile.absent_C is not None:
        logits_GT += jax.lax.dynamic_slice_in_dim(tile.absent_C, column, T)
    d_weight_GT = _dot("gtk,gkt->gt", d_out_GTK, value_GKT)
    if work.mask is not None:
        start = (tile.first_row, tile.first_query + column)
        column_GT = jax.lax.dynamic_slice(work.mask.column_BC, start, (G, T))
        query_words = _queries_of(tile, work.mask.query)
        kept_GT1 = dropout.keep(query_words, column_GT[..., None], work.static.dropout_rate)
        d_weight_GT = jnp.where(kept_GT1[..., 0], d_weight_GT, 0)
    # A weight over m, which is what counts for m's derivative, with its bound.
    excess_GT = logits_GT - lse_GT1[..., 0]
    bare_GT = jnp.exp(jnp.minimum(excess_GT, math.log(MAX_MASK_DERIVATIVE)))
    return jnp.sum(bare_GT * (d_weight_GT - delta_GT1[..., 0]))
