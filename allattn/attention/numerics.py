"""What several implementations share: the sizes of a call, products, and sums of exponentials.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from allattn.attention.span import MASKED_LOGIT

Array = jax.Array

# Kernels count logits in powers of two, for which TPUs and GPUs have an instruction.
LOG2_E = math.log2(math.e)
# Axes that `dot` contracts, the first array's and the second's: x y', and x' y.
NT_DIMENSIONS = (1, 1)
TN_DIMENSIONS = (0, 0)
# The least maximum that a softmax subtracts: below every real logit, yet above MASKED_LOGIT, so
# that a query that sees nothing gets the weights exp(-9e29) = 0 and not exp(0) = 1.
LEAST_TOP = MASKED_LOGIT / 10


@dataclasses.dataclass(frozen=True)
class CallSizes:
    """Static sizes of one call of a kernel."""

    # The dimension key's sizes; a kernel may round T or K up to what its device holds.
    B: int
    T: int
    S: int
    L: int
    N: int
    H: int
    K: int
    # Queries and keys of one tile.
    query_tile: int
    key_tile: int
    # Whether all heads share one position table.
    shared: bool


def dot(x: Array, y: Array, axes: tuple[int, int] = (1, 0)) -> Array:
    """A product over one axis of each matrix, with float32 sums.

    Args:
      x, y: matrices.
      axes: the axis of x and the axis of y that are summed over.
    """
    return jax.lax.dot_general(
        x, y, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32
    )


def log_sum(top: Array, total: Array) -> Array:
    """The log-sum-exp of a query's logits, from which a backward pass recomputes the weights.

    Args:
      top: what was subtracted from the logits.
      total: the sum of their exponentials; 0 where the query sees nothing.

    Returns:
      top + log(total); where total is 0, so much that the backward pass gives every weight 0.
    """
    return jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1)), -MASKED_LOGIT)
