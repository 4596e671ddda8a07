"""Which weights dropout keeps, for the tiles of the TPU kernels.

A weight stays if (r ^ c) m reaches a threshold: r and m are words of its query, c of its column
(`allattn.attention.dropout`). TPUs since v5 multiply whole numbers, so `Words` needs three
operations for 1,024 weights. To a v4 such a product is 30 operations; its matrix unit is idle most
of the time, and makes the products of `Products`: with the bits c_b of the column's word,

    (r ^ c) m  =  r m  +  sum over b of  c_b u_b        u_b = m 2^b, negative if r has bit b

modulo 2^32, a row of 32 numbers of the query times a column of 32 bits. The matrix unit's factors
have eight bits and its sums 24, so u_b is cut into bytes, and there are two sums: of the two lower
bytes of all u_b, and of the two upper ones. Every number in them is a whole one below 2^22, so they
are exact in whatever order they are added.

Dimension key: P head of the group, T query of the tile, R row of the stack (T queries of each
head), Q column of a block of 128, U bit of a column's word, once for each of two bytes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from allattn.attention import dropout
from allattn.attention.numerics import dot
from allattn.attention.tpu.skew import LANES, SUBLANES
from allattn.attention.tpu.tile import Sizes, Tile, in_all_lanes, round_up, stacked

Array = jax.Array

# Bits of a word, and what a head's factors have of them: each for a lower and an upper byte.
BITS = 32
WIDTH = 2 * BITS
# Added to a whole number below 2^22 it leaves that number in the last bits of the float.
_WHOLE = 3 * 2**22
# The bits of that float; what is shifted into the upper half has to make up for its upper half.
_BITS_OF_WHOLE = 0x4B400000


class Words(NamedTuple):
    """References to words of the tile's queries, int32 (R, 128), the same in all lanes."""

    word: Any
    factor: Any

    def lay_out(self, tile: Tile) -> None:
        """Write the words of a tile's queries."""
        words_RQ = tile.query_words()
        self.word[...] = words_RQ.word
        self.factor[...] = words_RQ.factor

    def of_rows(self, rows: Any) -> "Words":
        """Those of some rows."""
        return Words(self.word.at[rows], self.factor.at[rows])

    def keeps(
        self, tile: Tile, domain: int, first: Array | int, blocks: int
    ) -> Callable[[int], Array]:
        """Which weights stay.

        Args:
          tile: of queries.
          domain: `dropout.CONTEXT` or `dropout.PERSISTENT`.
          first: number of the first key or pair.
          blocks: how many blocks of 128 of them there are.

        Returns:
          A function of the number of a block, bool (R, 128).
        """

        def of_block(block: int) -> Array:
            query = dropout.QueryWords(self.word[...], self.factor[...])
            column_RQ = tile.column_words(first + block * LANES, domain)
            return dropout.keep(query, column_RQ, tile.static.dropout_rate)

        return of_block


class Products(NamedTuple):
    """References to what the matrix unit multiplies; the same methods as `Words`."""

    # of lower and upper halves of words: (2, R, P U), each row zero in other heads' columns
    factors: Any
    # (2, R, 128), the same in all lanes: r m
    offsets: Any
    # the words of a tile's columns, (P, 8 or more, 128), a block in each row
    columns: Any

    def lay_out(self, tile: Tile) -> None:
        """Write the factors of a tile's queries."""
        query_1T = tile.queries()
        words = [dropout.query_words(*owner, query_1T, dropout.CONTEXT) for owner in tile.owners()]
        sizes = dataclasses.replace(tile.sizes, K=WIDTH)
        for half in range(2):
            factors_UT = jnp.concatenate([query_factors(word, half) for word in words])
            factors_RU = stacked(sizes, factors_UT.T)
            self.factors[half] = factors_RU.astype(self.factors.dtype)
            offsets = [in_all_lanes(query_offsets(word, half)) for word in words]
            self.offsets[half] = jnp.concatenate(offsets)

    def of_rows(self, rows: Any) -> "Products":
        """Those of some rows."""
        return Products(self.factors.at[:, rows], self.offsets.at[:, rows], self.columns)

    def keeps(
        self, tile: Tile, domain: int, first: Array | int, blocks: int
    ) -> Callable[[int], Array]:
        """As of `Words`."""
        # The words of all blocks at once, a block in each row.
        shape = (round_up(blocks, SUBLANES), LANES)
        number = jax.lax.broadcasted_iota(jnp.int32, shape, 0) * LANES
        number += jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        index = tile.column_index(first, domain) + number
        owners = tile.owners()
        for p, owner in enumerate(owners):
            self.columns[p, : shape[0]] = dropout.column_words(*owner, index, domain)

        def of_block(block: int) -> Array:
            # One head alone has factors in its own columns, wherever they are.
            heads = self.factors.shape[2] // WIDTH
            found = [min(p, len(owners) - 1) for p in range(heads)]
            words = [self.columns[p, block : block + 1] for p in found]
            bits_UQ = jnp.concatenate([column_bits(word_1Q) for word_1Q in words])
            bits_UQ = bits_UQ.astype(self.factors.dtype)
            halves = [dot(self.factors[half], bits_UQ) + self.offsets[half] for half in range(2)]
            return keep(halves[0], halves[1], tile.static.dropout_rate)

        return of_block


def can_multiply() -> bool:
    """Whether the TPU that the code is traced for multiplies whole numbers."""
    try:
        return pltpu.get_tpu_info().generation > 4
    except ValueError:
        return True


def scratch(sizes: Sizes, columns: int) -> Words | Products:
    """The memory for tiles of so many keys or pairs at most."""
    if sizes.multiplies:
        words = pltpu.VMEM((sizes.rows, LANES), jnp.int32)
        return Words(words, words)
    return Products(
        factors=pltpu.VMEM((2, sizes.rows, sizes.heads * WIDTH), jnp.bfloat16),
        offsets=pltpu.VMEM((2, sizes.rows, LANES), jnp.float32),
        columns=pltpu.VMEM((sizes.heads, round_up(columns // LANES, SUBLANES), LANES), jnp.int32),
    )


# --- products of words as products of matrices ----------------------------------------------------


def query_factors(query: dropout.QueryWords, half: int) -> Array:
    """Two bytes of every u_b.

    Args:
      query: words, (1, T).
      half: 0 for the lower ones, 1 for the upper ones.

    Returns:
      float32 (U, T): the lower byte for each b, then the upper one times 256.
    """
    T = query.word.shape[1]
    row_UT = jax.lax.broadcasted_iota(jnp.int32, (WIDTH, T), 0)
    bit_UT = row_UT & (BITS - 1)
    moved_UT = jnp.broadcast_to(query.factor, (WIDTH, T)) << bit_UT
    is_set_UT = (jnp.broadcast_to(query.word, (WIDTH, T)) >> bit_UT) & 1 == 1
    signed_UT = jnp.where(is_set_UT, -moved_UT, moved_UT) >> (16 * half)
    return (signed_UT & jnp.where(row_UT < BITS, 0xFF, 0xFF00)).astype(jnp.float32)


def query_offsets(query: dropout.QueryWords, half: int) -> Array:
    """Half of r m, and what makes the sum's last bits a whole number: float32 (1, T)."""
    product_1T = ((query.word * query.factor) >> (16 * half)) & 0xFFFF
    return product_1T.astype(jnp.float32) + (_WHOLE - half * (_BITS_OF_WHOLE >> 16))


def column_bits(word_1Q: Array) -> Array:
    """The bits of columns' words (1, Q), once for each byte: float32 (U, Q)."""
    shape = (WIDTH, word_1Q.shape[1])
    bit_UQ = jax.lax.broadcasted_iota(jnp.int32, shape, 0) & (BITS - 1)
    return ((jnp.broadcast_to(word_1Q, shape) >> bit_UQ) & 1).astype(jnp.float32)


def keep(lower: Array, upper: Array, rate: float) -> Array:
    """Which weights stay, as `dropout.keep`.

    Args:
      lower, upper: products of factors and bits, with the offsets.
      rate: probability of dropping.
    """
    word = jax.lax.bitcast_convert_type(lower, jnp.int32)
    word += jax.lax.bitcast_convert_type(upper, jnp.int32) << 16
    return word >= dropout.threshold(rate)
