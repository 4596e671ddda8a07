"""The counter-based dropout mask: a pure function of where a weight sits.

A weight is named by (seed, global row, global head, query index in the block, index), where index
is that of a context key counted from the block's first query (query - distance: negative in the
context before the block) or the number of a persistent pair; the two kinds, and features, draw from
domains of their own. Every implementation, tile size, context length and mesh therefore drops the
same weights: how the work is cut changes nothing.

A weight costs three operations, because all mixing is done on the edges of a tile of weights:

                     c       one word of each column: key, pair or feature
             +-----------
        r m  |  (r ^ c) m    two words of each query; a weight stays if this is >= the threshold
        r m  |  (r ^ c) m

The factor m is a word of the query as well. With one factor for all, two queries would share up to
0.75 of their dropped weights; tests/attention/test_dropout.py measures that, and that rows, columns
and triples of this mask are as independent as draws. The words are mixed by the two-multiply
"lowbias32" integer hash (C. Wellons, "Prospecting for Hash Functions", 2018).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array

# Counts the masks that this file has drawn; checkpoints hold it. Raise it with any change of a bit.
GENERATION = 2

# The domains: constants that begin the hash, so that equal indices of two kinds draw independently.
CONTEXT = 0x243F6A88
PERSISTENT = 0x85A308D3
FEATURE = 0x13198A2E  # of an embedding or a hidden state; these have no head
# Set a query's factor and the words of columns apart from a query's word.
_FACTOR = 0x03707344
_COLUMNS = 0xA4093822
# What one index adds to a key: odd, so that index -> index * _STEP is a bijection of 32-bit words.
_STEP = 0x9E3779B9


class QueryWords(NamedTuple):
    """What all weights of a query share, int32 of one shape.

    Attributes:
      word: uniform.
      factor: uniform among the odd words.
    """

    word: Array
    factor: Array


def query_words(
    seed: Array | int, row: Array | int, head: Array | int, query: Array | int, domain: int
) -> QueryWords:
    """The words of queries.

    Args:
      seed, row, head, query: integers that broadcast together; row and head are global.
      domain: CONTEXT, for persistent pairs too, which have columns of their own; or FEATURE.

    Returns:
      Words of the broadcast shape.
    """
    word = mix(_moved(_owner_key(seed, row, head, domain), query))
    factor = mix(word ^ jnp.uint32(_FACTOR)) | jnp.uint32(1)
    return QueryWords(word.astype(jnp.int32), factor.astype(jnp.int32))


def column_words(
    seed: Array | int, row: Array | int, head: Array | int, index: Array | int, domain: int
) -> Array:
    """The words of context keys, persistent pairs or features.

    Args:
      seed, row, head, domain: as in `query_words`.
      index: of a key, counted from the block's first query; of a pair or feature, its number.

    Returns:
      int32 array of the broadcast shape.
    """
    # A key of their own, so that columns and queries draw independently.
    key = mix(_owner_key(seed, row, head, domain) ^ jnp.uint32(_COLUMNS))
    return mix(_moved(key, index)).astype(jnp.int32)


def keep(query: QueryWords, column: Array, rate: float) -> Array:
    """Which weights stay.

    Args:
      query: from `query_words`.
      column: from `column_words`; broadcasts with the query's words.
      rate: probability of dropping, in [0, 1).

    Returns:
      bool array, True with probability 1 - rate.
    """
    return (query.word ^ column) * query.factor >= threshold(rate)


def threshold(rate: float) -> Array:
    """What a weight's word must reach, int32, for the weight to stay."""
    # A word with a sign is uniform in [-2^31, 2^31): the share of those below is the rate.
    return jnp.int32(min(round(rate * 2**32), 2**32 - 1) - 2**31)


def mix(word: Array) -> Array:
    """Hash 32-bit words, elementwise.

    Args:
      word: uint32 array of any shape.

    Returns:
      uint32 array of the same shape, each bit of which depends on every bit of the input.
    """
    word = word ^ (word >> 16)
    word = word * jnp.uint32(0x7FEB352D)
    word = word ^ (word >> 15)
    word = word * jnp.uint32(0x846CA68B)
    return word ^ (word >> 16)


def _owner_key(seed: Array | int, row: Array | int, head: Array | int, domain: int) -> Array:
    """The hash of one head of one row, uint32: queries and columns begin with it."""
    # Chain the hashes, so that exchanging, say, row and head gives another key.
    key = mix(jnp.asarray(seed).astype(jnp.uint32) ^ jnp.uint32(domain))
    for part in (row, head):
        key = mix(_moved(key, part))
    return key


def _moved(key: Array, index: Array | int) -> Array:
    """A key at an index; mixed, the words of all indices are independent."""
    return key + jnp.asarray(index).astype(jnp.uint32) * jnp.uint32(_STEP)


def features(x_BTD: Array, seed: Array, row_B: Array, rate: float, site: int = 0) -> Array:
    """Drop features of embeddings or hidden states and scale the rest.

    By the same rules as attention weights: a state stands for the query, a feature for the column.

    Args:
      x_BTD: states.
      seed: as in `query_words`.
      row_B: global index of every row.
      rate: probability of dropping, in [0, 1).
      site: tells apart places that share a seed; is hashed where weights have the head.

    Returns:
      x_BTD in its dtype.
    """
    # Words of states and of features, then the mask of both.
    _, T, D = x_BTD.shape
    row_B11 = row_B[:, None, None]
    words_BT1 = query_words(seed, row_B11, site, jnp.arange(T)[:, None], FEATURE)
    column_B1D = column_words(seed, row_B11, site, jnp.arange(D), FEATURE)
    keeps_BTD = keep(words_BT1, column_B1D, rate)
    return jnp.where(keeps_BTD, x_BTD / (1 - rate), 0).astype(x_BTD.dtype)
