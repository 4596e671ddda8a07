"""What several implementations compute alike.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from allattn.attention.span import MASKED_LOGIT

Array = jax.Array

# Axes that `dot` contracts, the first array's and the second's: x y', and x' y.
NT_DIMENSIONS = (1, 1)
TN_DIMENSIONS = (0, 0)


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
    return jax.lax.dot_general(
        x, y, (((contract[0],), (contract[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def log_sum(top: Array, total: Array) -> Array:
    """log of a sum of weights relative to `top`; of none, so much that the backward pass gives every weight 0."""
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -MASKED_LOGIT)
