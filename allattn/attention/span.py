"""The soft span mask m(d) = clip((R - d + 1 + span) / R, 0, 1).

From Sukhbaatar et al. 2019 (arXiv 1905.07799), eq. 4. With a span of 3 and a ramp of R = 4:

    distance d   1    2    3    4    5    6    7    8    9
    position    7/4  6/4  5/4   1   3/4  2/4  1/4   0  -1/4     (R - d + 1 + span) / R
    m(d)         1    1    1    1   3/4  2/4  1/4   0    0
                                ^ near tie          ^ far tie, the last distance within reach

At both ties, where the clip is bent, the derivative is that of the ramp, 1 / R. `contract` draws
the band of queries and keys that this makes.
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# A pair's exp(logit) over the row's sum is its derivative with regard to m. Nothing bounds it where
# m = 0, so it counts as this at most, which it cannot exceed where m is 1e-5 or more: see
# docs/exactness.md.
MAX_MASK_DERIVATIVE = 1e5
# The logit of a pair that does not count: far below any real one, yet finite, so that no inf - inf
# can arise.
MASKED_LOGIT = -1e30

# The papers' code trims distances in steps of so many.
TRIM_STEP = 64


def ramp_position(distance: Array, span: Array, ramp: int) -> Array:
    """Where on the ramp a distance lies: >= 1 before it, 0 at its end, negative beyond.

    Args:
      distance: integer distances in tokens.
      span: learned spans in tokens, broadcasting with distance.
      ramp: length R of the ramp in tokens.

    Returns:
      (R - d + 1 + span) / R, unclipped.
    """
    return (ramp + 1 - distance + span) / ramp


def log_span_mask(distance: Array, span: Array, ramp: int) -> Array:
    """log m(d), finite everywhere: MASKED_LOGIT where m = 0. Arguments as of `ramp_position`."""
    return jnp.maximum(jnp.log(jnp.clip(ramp_position(distance, span, ramp), 0, 1)), MASKED_LOGIT)


def last_distance(span: Array, ramp: int) -> Array:
    """The farthest distance within reach, int32.

    There m is below 1 / ramp, and 0 for a span of whole tokens.
    """
    return jnp.floor(span).astype(jnp.int32) + ramp + 1


def kept_distances(span_H: Array, ramp: int, limit: int) -> Array:
    """How many distances of a layer the papers' code keeps before its softmax, int32.

    It trims what no head reaches in steps of 64, so what is left is congruent to the limit modulo
    64: a shorter table of such a length keeps the same, as long as it has them.

    Args:
      span_H: learned spans in tokens.
      ramp: R in tokens.
      limit: rows of the position table, L.
    """
    size = jnp.ceil(jnp.max(span_H)).astype(jnp.int32) + ramp
    size = jnp.clip(size, 0, limit)
    return size + (limit - size) % TRIM_STEP


def reach(span: Array, ramp: int, first_distance: int, limit: int) -> Array:
    """How many rows of the position table a head needs, the tie at span + ramp + 1 included.

    Args:
      span: learned spans in tokens, any shape.
      ramp: R in tokens.
      first_distance: distance of the table's row 0.
      limit: rows of the table, L.

    Returns:
      int32 of span's shape, in [0, limit].
    """
    return jnp.clip(last_distance(span, ramp) - first_distance + 1, 0, limit)
