"""The skew between positions and keys, and back, as the TPU kernels compute it.

Dimension key: R row of a stack of heads' tiles, T query of one head, C key of the tile, W column of
the window.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allattn.attention.tpu import skew

KEYS = 256
QUICK = {"xla_backend_optimization_level": 0}
# Rows of one head, heads, the remainder, and whether it is known only at run time.
CASES = [(128, 2, 0, False), (128, 2, 5, True), (128, 1, 127, True), (16, 3, 0, False)]
CASES += [(16, 2, 0, True), (8, 1, 77, True), (40, 2, 100, True)]
# A CPU compiles the strided rotation of many rows slowly.
STRIDED = [pytest.param(*case, True, marks=[pytest.mark.slow] * (case[0] > 16)) for case in CASES]
every_case = pytest.mark.parametrize(
    ("T", "heads", "remainder", "traced", "strided"), [*STRIDED, *((*c, False) for c in CASES)]
)


def run(function: Any, array: np.ndarray, remainder: int, traced: bool) -> np.ndarray:
    """A function of an array and the remainder, which is known when it is traced or not."""
    if not traced:
        function = functools.partial(function, remainder=remainder)
        return np.asarray(jax.jit(function, compiler_options=QUICK)(array))
    return np.asarray(jax.jit(function, compiler_options=QUICK)(array, jnp.int32(remainder)))


def window_columns(T: int, heads: int, remainder: int) -> np.ndarray:
    """The column of the window that stands above every key of the tile."""
    row_R1 = np.tile(np.arange(T), heads)[:, None]
    return skew.LANES + remainder + np.arange(KEYS) - row_R1


@every_case
def test_skew(T: int, heads: int, remainder: int, traced: bool, strided: bool) -> None:
    """Every key gets the logit of its distance."""
    width = skew.LANES * (KEYS // skew.LANES + 2)
    rng = np.random.default_rng(0)
    window_RW = rng.normal(size=(heads * T, width)).astype(np.float32)

    def skewed(window_RW: Any, remainder: Any) -> Any:
        rotated = []
        for b in range(skew.window_blocks(KEYS, remainder)):
            block_RQ = window_RW[:, b * skew.LANES : (b + 1) * skew.LANES]
            rotated.append(skew.rotate(block_RQ, T, remainder, strided))
        return jnp.concatenate(skew.skewed(rotated, T, remainder), axis=1)

    found_RC = run(skewed, window_RW, remainder, traced)
    column_RC = window_columns(T, heads, remainder)
    np.testing.assert_array_equal(found_RC, np.take_along_axis(window_RW, column_RC, 1))


@every_case
def test_unskew(T: int, heads: int, remainder: int, traced: bool, strided: bool) -> None:
    """And back, in the order of rows that `reversed_rows` gives; the rest of the window is 0."""
    width = skew.LANES * (KEYS // skew.LANES + 2)
    if not traced:
        width -= skew.LANES
    rng = np.random.default_rng(0)
    tile_RC = rng.normal(size=(heads * T, KEYS)).astype(np.float32)

    def unskewed(tile_RC: Any, remainder: Any) -> Any:
        return jnp.concatenate(skew.unskewed(tile_RC, T, remainder, strided), axis=1)

    found_RW = run(unskewed, tile_RC, remainder, traced)
    expected_RW = np.zeros((heads * T, width), np.float32)
    np.put_along_axis(expected_RW, window_columns(T, heads, remainder), tile_RC, 1)
    reversed_RW = np.asarray(skew.reversed_rows(expected_RW, strided))
    np.testing.assert_array_equal(found_RW, reversed_RW)
    assert strided or (reversed_RW == expected_RW).all()
