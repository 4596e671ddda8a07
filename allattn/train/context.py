"""How far back the heads may look, and when that grows.

A step is compiled for one context length: the cached positions that its heads may look at. Learned
spans (docs/method.md, "Adaptive span") decide how many that must be, and they change with every
update. So that a run compiles a few programs and not thousands, the length is one of

    128, 256, 512, ..., span.limit

and it only grows. The cache is one size longer than the context, which a growing context would
otherwise meet as zeros:

    oldest                                                  newest
    | next length: filled, not looked at | context length: visible | block

Without this, every step would attend span.limit positions. tests/train/test_train.py holds that
growing by one size changes no loss. Spans that grow past the next size between two choices meet
zeros beyond it until the cache is full, span.limit / train.block steps later.

Dimension key: X layer, B batch, S cached position, D model width.
"""

import math

import jax
import jax.numpy as jnp
import ml_collections

from allattn.attention.span import TRIM_STEP

Array = jax.Array

# The shortest context that gets a program of its own, where the limit is not shorter still.
SMALLEST_CONTEXT_LENGTH = 128


def next_context_length(context_length: int, limit: int) -> int:
    """The context length after this one: twice as long, up to the limit."""
    return min(2 * context_length, limit)


def choose_context_length(
    config: ml_collections.ConfigDict, longest_span: float, current: int = 0
) -> int:
    """The smallest context length that holds the longest reach and a margin.

    Args:
      config: the whole configuration.
      longest_span: largest learned span, as a share of the limit in [0, 1].
      current: context length so far, below which the result never falls; 0: none yet.

    Returns:
      One of 128, 256, ..., limit; the limit itself where spans are not learned.
    """
    # Spans that are not learned stay at the limit.
    span = config.model.span
    if not span.adaptive:
        return span.limit

    # The soft mask ends a ramp beyond the span. The margin is how far spans may grow until they
    # are looked at again, `span.check_every` steps later.
    reach = math.ceil(longest_span * span.limit) + span.ramp
    # The papers' normaliser also sees what their code keeps beyond.
    if span.epsilon:
        reach += TRIM_STEP - 1
    needed = min(span.limit, reach + span.margin)

    # Never below the current one: a run that went back and forth would compile each time.
    smallest = min(SMALLEST_CONTEXT_LENGTH, span.limit)
    context_length = max(current, smallest)
    while context_length < needed:
        context_length = next_context_length(context_length, span.limit)
    return context_length


def grow_cache(cache_XBSD: Array, context_length: int, limit: int) -> Array:
    """Make room in the cache for the context length after this one.

    The zeros come on the old side, and real states have moved there before the context grows again
    (`check` demands it of span.check_every).
    """
    room = next_context_length(context_length, limit)
    missing = room - cache_XBSD.shape[2]
    if missing <= 0:
        return cache_XBSD
    return jnp.pad(cache_XBSD, ((0, 0), (0, 0), (missing, 0), (0, 0)))
