"""The counter-based dropout mask: a pure function of where a weight sits.

A weight is named by (seed, global row, global head, query index in the block, index), where index
is the distance of a context key or the number of a persistent pair; the two kinds, and features,
draw from domains of their own. Every implementation, tile size, context length and mesh therefore
drops the same weights: how the work is cut changes nothing. The mixing function is the two-multiply
"lowbias32" integer hash (C. Wellons, "Prospecting for Hash Functions", 2018).
"""

import jax
import jax.numpy as jnp

Array = jax.Array

# The domains: constants that begin the hash, so that equal indices of two kinds draw independently.
CONTEXT = 0x243F6A88
PERSISTENT = 0x85A308D3
FEATURE = 0x13198A2E  # of an embedding or a hidden state; these have no head
# What one index adds to a key: odd, so that index -> index * _STEP is a bijection of 32-bit words.
_STEP = 0x9E3779B9


def mix(word: Array) -> Array:
    """Hash 32-bit words, elementwise.

    Args:
      word: uint32 array of any shape.

    Returns:
      uint32 array of the same shape, each bit of which depends on every bit of the input.
    """
    # The last step spreads the upper 16 bits, which are the best mixed, over the lower ones.
    word = _multiplied(word)
    return word ^ (word >> 16)


def _multiplied(word: Array) -> Array:
    """The mix but for its last step, which leaves the upper 16 bits alone."""
    word = word ^ (word >> 16)
    word = word * jnp.uint32(0x7FEB352D)
    word = word ^ (word >> 15)
    return word * jnp.uint32(0x846CA68B)


def query_key(
    seed: Array | int, row: Array | int, head: Array | int, query: Array | int, domain: int
) -> Array:
    """The hash that all weights of one query share.

    Args:
      seed, row, head, query: integers that broadcast together; row and head are global.
      domain: CONTEXT or PERSISTENT.

    Returns:
      uint32 array of the broadcast shape.
    """
    # Chain the hashes, so that exchanging, say, row and head gives another key.
    word = mix(jnp.asarray(seed).astype(jnp.uint32) ^ jnp.uint32(domain))
    for part in (row, head, query):
        word = mix(word + jnp.asarray(part).astype(jnp.uint32) * jnp.uint32(_STEP))
    return word


def moved(key: Array, index: Array) -> Array:
    """Count a key's indices from another origin.

    Args:
      key: uint32 from `query_key`.
      index: integers that broadcast with key.

    Returns:
      uint32 of the broadcast shape: for these keys index 0 means what `index` means for `key`.
    """
    return key + jnp.asarray(index).astype(jnp.uint32) * jnp.uint32(_STEP)


def keep(key: Array, index: Array, rate: float) -> Array:
    """Which weights stay.

    Args:
      key: uint32 from `query_key`.
      index: integer distance or persistent index; broadcasts with key.
      rate: probability of dropping, in [0, 1).

    Returns:
      bool array, True with probability 1 - rate.
    """
    # A word is uniform in [0, 2^32): the share of those below the threshold is the rate.
    threshold = jnp.uint32(min(round(rate * 2**32), 2**32 - 1))
    # A comparison looks at the upper bits, and this line runs for every weight: skip the last step.
    return _multiplied(moved(key, index)) >= threshold


def features(x_BTD: Array, seed: Array, row_B: Array, rate: float, site: int = 0) -> Array:
    """Drop features of embeddings or hidden states and scale the rest.

    By the same rules as attention weights.

    Args:
      x_BTD: states.
      seed: as in `query_key`.
      row_B: global index of every row.
      rate: probability of dropping, in [0, 1).
      site: tells apart places that share a seed; is hashed where weights have the head.

    Returns:
      x_BTD in its dtype.
    """
    _, T, D = x_BTD.shape
    row_B11 = row_B[:, None, None]
    # One key per state, and the feature's number as the index.
    key_BT1 = query_key(seed, row_B11, site, jnp.arange(T)[:, None], FEATURE)
    return jnp.where(keep(key_BT1, jnp.arange(D), rate), x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
