"""How arrays are compared: bit by bit, and with the distribution that they were drawn from."""

import math
from typing import Any

import jax
import numpy as np
import pytest


def assert_same(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def is_normal(array: np.ndarray, deviation: float) -> None:
    array = np.asarray(array, np.float64) / deviation
    assert abs(array.mean()) < 5 / math.sqrt(array.size)
    assert array.std() == pytest.approx(1, abs=4 / math.sqrt(array.size))
    assert (array**4).mean() == pytest.approx(3, rel=0.1), (
        "a normal distribution has a kurtosis of 3"
    )


def is_uniform(array: np.ndarray, bound: float) -> None:
    array = np.asarray(array, np.float64) / bound
    assert abs(array.mean()) < 3 / math.sqrt(array.size)
    assert array.std() == pytest.approx(1 / math.sqrt(3), abs=2 / math.sqrt(array.size))
    assert 1 - 10 / array.size < np.abs(array).max() <= 1 + 1e-6
