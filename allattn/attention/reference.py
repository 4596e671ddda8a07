"""The definition of the operation: whole arrays, ordinary differentiation, nothing clever.

Dimension key: B batch, T query position in the block, S context key, L distance, N persistent pair,
H head, K head width.
"""

import jax
import jax.numpy as jnp

from allattn.attention import dropout
from allattn.attention.span import MAX_MASK_DERIVATIVE, ramp_position

Array = jax.Array


def context_logits(
    query_BTHK, position_query_BTHK, key_BSHK, position_HLK, distance_BTS, scale: float
) -> Array:
    """(query . key + position query . position) * scale for every pair, as logits_BHTS."""
    content_BHTS = jnp.einsum("bthk,bshk->bhts", query_BTHK, key_BSHK)
    position_HLK = jnp.broadcast_to(position_HLK, (query_BTHK.shape[2], *position_HLK.shape[1:]))
    by_distance_BHTL = jnp.einsum("bthk,hlk->bhtl", position_query_BTHK, position_HLK)
    row_BTS = jnp.clip(distance_BTS, 0, position_HLK.shape[1] - 1)
    return (content_BHTS + jnp.take_along_axis(by_distance_BHTL, row_BTS[:, None], axis=-1)) * scale


def span_mask(distance, span_H: Array | None, ramp: int) -> tuple[Array, Array]:
    """m(d) per head with the full gradient at both ties, and where the ramp has not ended, as (..., H, T, S)."""
    if span_H is None:
        return jnp.ones_like(distance, jnp.float32), jnp.ones_like(distance, bool)
    position = ramp_position(distance, span_H[:, None, None], ramp)
    inside = (position >= 0) & (position <= 1)
    return jnp.where(
        inside, position, jax.lax.stop_gradient(jnp.clip(position, 0, 1))
    ), position >= 0


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
    span_H: Array | None,
    ramp: int,
    query_start_B: Array,
    key_start_B: Array,
    dropout_rate: float,
    dropout_seed: Array,
    row_offset: Array,
    head_offset: Array,
    scale: float,
) -> tuple[Array, Array]:
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments.

    Returns:
      out_BTHK in the query's dtype and mass_BTH in the dtype of the statistics.
    """
    out_dtype, dtype = query_BTHK.dtype, jnp.promote_types(query_BTHK.dtype, jnp.float32)
    (
        query_BTHK,
        position_query_BTHK,
        key_BSHK,
        value_BSHK,
        position_HLK,
        persistent_key_HNK,
        persistent_value_HNK,
    ) = (
        x.astype(dtype)
        for x in (
            *(query_BTHK, position_query_BTHK, key_BSHK, value_BSHK),
            *(position_HLK, persistent_key_HNK, persistent_value_HNK),
        )
    )
    (B, T, H, _), S = query_BTHK.shape, key_BSHK.shape[1]
    L, N = position_HLK.shape[1], persistent_key_HNK.shape[1]
    if L == 0:  # no distance counts: the same as having no key
        key_BSHK, value_BSHK, S = key_BSHK[:, :0], value_BSHK[:, :0], 0

    query_T, key_S = jnp.arange(T), jnp.arange(S)
    distance_BTS = query_start_B[:, None, None] + query_T[:, None] - key_S
    exists_BTS = (distance_BTS >= first_distance) & (distance_BTS < first_distance + L)
    exists_BTS &= key_S >= key_start_B[:, None, None]
    mask_BHTS, in_reach_BHTS = span_mask(distance_BTS[:, None], span_H, ramp)
    counts_BHTS = exists_BTS[:, None] & in_reach_BHTS

    logits_BHTS = jnp.zeros((B, H, T, 0), dtype)
    if S:
        row_BTS = distance_BTS - first_distance
        logits_BHTS = context_logits(
            query_BTHK, position_query_BTHK, key_BSHK, position_HLK, row_BTS, scale
        )
    persistent_BHTN = jnp.einsum("bthk,hnk->bhtn", query_BTHK, persistent_key_HNK) * scale

    weighed_BHTS = counts_BHTS & (mask_BHTS > 0)
    top_BHT = jnp.max(jnp.where(weighed_BHTS, logits_BHTS, -jnp.inf), axis=-1, initial=-jnp.inf)
    top_BHT = jnp.maximum(top_BHT, jnp.max(persistent_BHTN, axis=-1, initial=-jnp.inf))
    top_BHT = jax.lax.stop_gradient(jnp.where(jnp.isfinite(top_BHT), top_BHT, 0))[..., None]
    persistent_BHTN = jnp.exp(persistent_BHTN - top_BHT)
    excess_BHTS = jnp.minimum(
        logits_BHTS - top_BHT, 80
    )  # where the ramp touches 0 it is unbounded, and inf 0 is NaN
    bare_BHTS = jnp.exp(jnp.where(counts_BHTS, excess_BHTS, 0))  # before the mask m
    mask_BHTS = jnp.where(counts_BHTS, mask_BHTS, 0)
    context_BHTS = bare_BHTS * jax.lax.stop_gradient(mask_BHTS)
    total_BHT = jax.lax.stop_gradient(
        context_BHTS.sum(-1, keepdims=True) + persistent_BHTN.sum(-1, keepdims=True)
    )
    slope_BHTS = jax.lax.stop_gradient(jnp.minimum(bare_BHTS, MAX_MASK_DERIVATIVE * total_BHT))
    context_BHTS += slope_BHTS * (
        mask_BHTS - jax.lax.stop_gradient(mask_BHTS)
    )  # 0, with the derivative for m

    total_BHT = context_BHTS.sum(-1, keepdims=True) + persistent_BHTN.sum(-1, keepdims=True)
    total_BHT = jnp.where(
        total_BHT > 0, total_BHT, 1
    )  # no key at all and N = 0: weights, output and gradients are 0
    context_BHTS, persistent_BHTN = context_BHTS / total_BHT, persistent_BHTN / total_BHT
    mass_BTH = jax.lax.stop_gradient(persistent_BHTN.sum(-1).transpose(0, 2, 1))

    if dropout_rate:
        row = row_offset + jnp.arange(B)[:, None, None, None]
        head = head_offset + jnp.arange(H)[:, None, None]
        context_key, persistent_key = (
            dropout.query_key(dropout_seed, row, head, query_T[:, None], domain)
            for domain in (dropout.CONTEXT, dropout.PERSISTENT)
        )
        context_BHTS *= dropout.keep(context_key, distance_BTS[:, None], dropout_rate) / (
            1 - dropout_rate
        )
        persistent_BHTN *= dropout.keep(persistent_key, jnp.arange(N), dropout_rate) / (
            1 - dropout_rate
        )
    out_BTHK = jnp.einsum("bhts,bshk->bthk", context_BHTS, value_BSHK)
    out_BTHK += jnp.einsum("bhtn,hnk->bthk", persistent_BHTN, persistent_value_HNK)
    return out_BTHK.astype(out_dtype), mass_BTH
