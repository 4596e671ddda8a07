"""The definition of the operation: whole arrays, ordinary differentiation, nothing clever.

Read `all_attention` from top to bottom; the functions before it are its steps. The other
implementations agree with it within the bounds of tests/attention/test_attention.py.

Dimension key: B batch, T query position in the block, S context key, L distance, N persistent pair,
H head, K head width.
"""

import jax
import jax.numpy as jnp

from allattn.attention import dropout
from allattn.attention.span import MAX_MASK_DERIVATIVE, kept_distances, ramp_position

Array = jax.Array


def context_logits(
    query_BTHK: Array,
    position_query_BTHK: Array,
    key_BSHK: Array,
    position_HLK: Array,
    row_BTS: Array,
    scale: float,
) -> Array:
    """(query . key + position query . position key) * scale for every pair, as logits_BHTS.

    Args:
      row_BTS: the position table's row of every pair; a pair outside the table gets the nearest
        row, and is masked later.
    """
    content_BHTS = jnp.einsum("bthk,bshk->bhts", query_BTHK, key_BSHK)
    # Logits by distance, then of every pair the one at its distance.
    position_HLK = jnp.broadcast_to(position_HLK, (query_BTHK.shape[2], *position_HLK.shape[1:]))
    by_distance_BHTL = jnp.einsum("bthk,hlk->bhtl", position_query_BTHK, position_HLK)
    row_BTS = jnp.clip(row_BTS, 0, position_HLK.shape[1] - 1)
    return (content_BHTS + jnp.take_along_axis(by_distance_BHTL, row_BTS[:, None], axis=-1)) * scale


def span_mask(distance: Array, span_H: Array | None, ramp: int) -> tuple[Array, Array]:
    """m(d) per head with the full gradient at both ties, and where the ramp has not ended.

    Args:
      distance: distances (..., T, S), broadcasting with a dimension H before T.
      span_H: spans in tokens; None: every distance counts fully.
      ramp: R in tokens.

    Returns:
      m and whether d is within reach, both (..., H, T, S).
    """
    if span_H is None:
        return jnp.ones_like(distance, jnp.float32), jnp.ones_like(distance, bool)
    position = ramp_position(distance, span_H[:, None, None], ramp)
    # jnp.clip would halve the gradient at the ties: choose by hand where there is one.
    on_ramp = (position >= 0) & (position <= 1)
    clipped = jax.lax.stop_gradient(jnp.clip(position, 0, 1))
    return jnp.where(on_ramp, position, clipped), position >= 0


def largest_logit(weighed_BHTS: Array, logits_BHTS: Array, persistent_BHTN: Array) -> Array:
    """The largest logit of every query's context and pairs, 0 without any; has no gradient."""
    top_BHT = jnp.max(jnp.where(weighed_BHTS, logits_BHTS, -jnp.inf), axis=-1, initial=-jnp.inf)
    top_BHT = jnp.maximum(top_BHT, jnp.max(persistent_BHTN, axis=-1, initial=-jnp.inf))
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(top_BHT), top_BHT, 0))[..., None]


def masked_exponentials(
    excess_BHTS: Array, counts_BHTS: Array, mask_BHTS: Array, persistent_BHTN: Array
) -> Array:
    """m(d) exp(logit - top), whose derivative with regard to m is exp(logit - top), with a bound.

    Args:
      excess_BHTS: logit - top.
      counts_BHTS: which pairs count.
      mask_BHTS: m(d).
      persistent_BHTN: exp(logit - top) of the persistent pairs.
    """
    bare_BHTS = jnp.exp(jnp.where(counts_BHTS, excess_BHTS, 0))  # before the mask m
    mask_BHTS = jnp.where(counts_BHTS, mask_BHTS, 0)
    context_BHTS = bare_BHTS * jax.lax.stop_gradient(mask_BHTS)
    # The bound is on the exponential over the sum of weights.
    total_BHT = jax.lax.stop_gradient(
        context_BHTS.sum(-1, keepdims=True) + persistent_BHTN.sum(-1, keepdims=True)
    )
    slope_BHTS = jax.lax.stop_gradient(jnp.minimum(bare_BHTS, MAX_MASK_DERIVATIVE * total_BHT))
    # The second factor is 0 and has the derivative of m.
    context_BHTS += slope_BHTS * (mask_BHTS - jax.lax.stop_gradient(mask_BHTS))
    return context_BHTS


def all_attention(
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    *,
    position_HLK: Array,
    position_query_BTHK: Array,
    first_distance: int,
    persistent_key_HNK: Array,
    persistent_value_HNK: Array,
    persistent_bias_HN: Array | None,
    span_H: Array | None,
    ramp: int,
    query_start_B: Array,
    key_start_B: Array,
    dropout_rate: float,
    dropout_seed: Array,
    row_offset: Array,
    head_offset: Array,
    span_epsilon: float,
    scale: float,
) -> tuple[Array, Array]:
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments.

    Returns:
      out_BTHK in the query's dtype and mass_BTH in the dtype of the statistics.
    """
    # Statistics and sums are in float32, or in float64 if the query is.
    out_dtype = query_BTHK.dtype
    dtype = jnp.promote_types(out_dtype, jnp.float32)
    query_BTHK = query_BTHK.astype(dtype)
    position_query_BTHK = position_query_BTHK.astype(dtype)
    key_BSHK = key_BSHK.astype(dtype)
    value_BSHK = value_BSHK.astype(dtype)
    position_HLK = position_HLK.astype(dtype)
    persistent_key_HNK = persistent_key_HNK.astype(dtype)
    persistent_value_HNK = persistent_value_HNK.astype(dtype)

    B, T, H, _ = query_BTHK.shape
    L = position_HLK.shape[1]
    N = persistent_key_HNK.shape[1]
    # If no distance counts, there might as well be no key.
    if L == 0:
        key_BSHK = key_BSHK[:, :0]
        value_BSHK = value_BSHK[:, :0]
    S = key_BSHK.shape[1]

    # Which pairs of query and key count: those in the table, not before the first key, and within
    # reach of the head's span.
    query_T = jnp.arange(T)
    key_S = jnp.arange(S)
    distance_BTS = query_start_B[:, None, None] + query_T[:, None] - key_S
    exists_BTS = (distance_BTS >= first_distance) & (distance_BTS < first_distance + L)
    exists_BTS &= key_S >= key_start_B[:, None, None]
    mask_BHTS, in_reach_BHTS = span_mask(distance_BTS[:, None], span_H, ramp)
    counts_BHTS = exists_BTS[:, None] & in_reach_BHTS

    # Logits of the context, by content and position, and of the persistent pairs.
    logits_BHTS = jnp.zeros((B, H, T, 0), dtype)
    if S:
        row_BTS = distance_BTS - first_distance
        logits_BHTS = context_logits(
            query_BTHK, position_query_BTHK, key_BSHK, position_HLK, row_BTS, scale
        )
    persistent_BHTN = jnp.einsum("bthk,hnk->bhtn", query_BTHK, persistent_key_HNK) * scale
    if persistent_bias_HN is not None:
        persistent_BHTN += persistent_bias_HN.astype(dtype)[:, None]

    # Exponentials less the largest logit that enters a sum; those of the context times m.
    weighed_BHTS = counts_BHTS & (mask_BHTS > 0)
    # So does what the papers' code keeps, if its sum is asked for.
    if span_epsilon and span_H is not None:
        beyond_kept = first_distance + kept_distances(span_H, ramp, L)
        kept_B1TS = (exists_BTS & (distance_BTS < beyond_kept))[:, None]
        weighed_BHTS |= kept_B1TS
    top_BHT1 = largest_logit(weighed_BHTS, logits_BHTS, persistent_BHTN)
    persistent_BHTN = jnp.exp(persistent_BHTN - top_BHT1)
    # A logit where the ramp touches 0 has no weight, so it may exceed the top without bound, and
    # inf 0 is NaN.
    excess_BHTS = jnp.minimum(logits_BHTS - top_BHT1, 80)
    context_BHTS = masked_exponentials(excess_BHTS, counts_BHTS, mask_BHTS, persistent_BHTN)

    # One softmax over both. No key at all and N = 0: weights, output and gradients are 0.
    total_BHT1 = context_BHTS.sum(-1, keepdims=True) + persistent_BHTN.sum(-1, keepdims=True)
    # The papers' code adds to it a share of what the mask takes away.
    if span_epsilon and span_H is not None:
        unmasked_BHTS = jnp.exp(jnp.where(kept_B1TS, excess_BHTS, -jnp.inf))
        unmasked_BHT1 = unmasked_BHTS.sum(-1, keepdims=True)
        unmasked_BHT1 += persistent_BHTN.sum(-1, keepdims=True)
        total_BHT1 += span_epsilon * unmasked_BHT1
    total_BHT1 = jnp.where(total_BHT1 > 0, total_BHT1, 1)
    context_BHTS = context_BHTS / total_BHT1
    persistent_BHTN = persistent_BHTN / total_BHT1
    mass_BTH = jax.lax.stop_gradient(persistent_BHTN.sum(-1).transpose(0, 2, 1))

    # Dropout acts on the normalised weights, context and pairs alike.
    if dropout_rate:
        row_B111 = row_offset + jnp.arange(B)[:, None, None, None]
        head_H11 = head_offset + jnp.arange(H)[:, None, None]
        # A key counts from its row's first query.
        index_B11S = (key_S - query_start_B[:, None])[:, None, None]

        owner = (dropout_seed, row_B111, head_H11)
        query_words = dropout.query_words(*owner, query_T[:, None], dropout.CONTEXT)

        def kept(index: Array, domain: int) -> Array:
            column_words = dropout.column_words(*owner, index, domain)
            return dropout.keep(query_words, column_words, dropout_rate)

        context_BHTS *= kept(index_B11S, dropout.CONTEXT) / (1 - dropout_rate)
        persistent_BHTN *= kept(jnp.arange(N), dropout.PERSISTENT) / (1 - dropout_rate)

    # The weighted sum of values.
    out_BTHK = jnp.einsum("bhts,bshk->bthk", context_BHTS, value_BSHK)
    out_BTHK += jnp.einsum("bhtn,hnk->bthk", persistent_BHTN, persistent_value_HNK)
    return out_BTHK.astype(out_dtype), mass_BTH
