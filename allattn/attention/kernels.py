"""What several implementations compute alike.

Dimension key: T query of the tile, N persistent pair, K head width, X any.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from allattn.attention import dropout
from allattn.attention.span import NOTHING
from allattn.attention.tiles import Static

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class CallSizes:
    """Static sizes of one call."""

    B: int
    T: int
    S: int
    L: int
    N: int
    H: int
    K: int
    query_tile: int
    key_tile: int
    shared: bool  # one position table for all heads


def dot(x: Array, y: Array, contract: tuple[int, int] = (1, 0)) -> Array:
    """A product over one axis of each, with float32 sums."""
    return jax.lax.dot_general(x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32)


def log_sum(top: Array, total: Array) -> Array:
    """log of a sum of weights relative to `top`; of none, so much that the backward pass gives every weight 0."""
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -NOTHING)


def dropout_factors(static: Static, numbers: Any, row, head, query: Array, domain: int, index: Array) -> Array:
    """Dropout's factors, 0 or 1 / (1 - rate), of one head of one row; numbers are seed, row_offset and head_offset."""
    key = dropout.query_key(numbers[0], numbers[1] + row, numbers[2] + head, query, domain)
    return jnp.where(dropout.keep(key, index, static.dropout_rate), 1 / (1 - static.dropout_rate), 0.0)


def pair_gradients(logits_TN, lse_T1, delta_T1, d_out_TK, value_NK, factors_TN) -> tuple[Array, Array]:
    """From the logits of persistent pairs: their gradients and the weights after dropout, in the values' dtype."""
    weight_TN = jnp.exp(logits_TN - lse_T1)
    d_weight_TN, dropped_TN = dot(d_out_TK, value_NK, (1, 1)), weight_TN
    if factors_TN is not None:
        d_weight_TN, dropped_TN = d_weight_TN * factors_TN, weight_TN * factors_TN
    return (weight_TN * (d_weight_TN - delta_T1)).astype(value_NK.dtype), dropped_TN.astype(value_NK.dtype)
