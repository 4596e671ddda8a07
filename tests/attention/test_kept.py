"""Dropout's mask on a TPU that multiplies no whole numbers: products of words as products of
matrices.

Dimension key: T query, Q column, U bit of a column's word, once for each of two bytes.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allattn.attention import dropout
from allattn.attention.tpu import kept

# Words whose products have many bits or few.
SPECIAL = np.array([-1, 0, 1, -(2**31), 2**31 - 1], np.int32)


@pytest.fixture(scope="module")
def words() -> tuple[dropout.QueryWords, jax.Array]:
    """Words of 128 queries (1, T) and 128 columns (1, Q)."""
    rng = np.random.default_rng(0)
    word, factor, column = rng.integers(-(2**31), 2**31, (3, 1, 128)).astype(np.int32)
    for array in (word, factor, column):
        array[0, : len(SPECIAL)] = SPECIAL
    return dropout.QueryWords(jnp.asarray(word), jnp.asarray(factor | 1)), jnp.asarray(column)


@pytest.mark.parametrize("rate", [1e-9, 0.3, 0.999])
def test_products_are_exact(words: tuple[dropout.QueryWords, jax.Array], rate: float) -> None:
    """The matrix unit keeps the weights that whole numbers keep."""
    query, column_1Q = words
    bits_UQ = kept.column_bits(column_1Q).astype(jnp.bfloat16)
    halves = []
    for half in range(2):
        factors_UT = kept.query_factors(query, half).astype(jnp.bfloat16)
        product_TQ = jnp.dot(factors_UT.T, bits_UQ, preferred_element_type=jnp.float32)
        halves.append(product_TQ + kept.query_offsets(query, half).T)
    found_TQ = kept.keep(halves[0], halves[1], rate)
    columns = dropout.QueryWords(query.word.T, query.factor.T)
    np.testing.assert_array_equal(found_TQ, dropout.keep(columns, column_1Q, rate))


def test_bytes_are_exact(words: tuple[dropout.QueryWords, jax.Array]) -> None:
    """Every factor has eight bits, and sums stay below what a float32 holds."""
    query, _ = words
    for half in range(2):
        factors_UT = kept.query_factors(query, half)
        np.testing.assert_array_equal(factors_UT, factors_UT.astype(jnp.bfloat16))
        assert factors_UT.sum(0).max() + 2**16 < 2**22
