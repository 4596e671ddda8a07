"""Pieces of a training step: the cache, and what the backward pass computes again.

Dimension key: X layer, B batch, T position in the block, S cached position, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allattn.train import recomputation
from allattn.train.step import cache_at_start_of_text, shift_cache
from configs import base


def states(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.bfloat16)


@pytest.mark.parametrize("cached", [2, 4, 7, 12])
def test_the_block_becomes_the_newest(cached: int) -> None:
    """As joining both and dropping the oldest, for caches shorter and longer than the block."""
    cache_XBSD = states(3, 2, cached, 5)
    new_XBTD = 2 * states(3, 2, 4, 5)
    expected_XBSD = jnp.concatenate([cache_XBSD, new_XBTD], axis=2)[:, :, 4:]
    np.testing.assert_array_equal(jax.jit(shift_cache)(cache_XBSD, new_XBTD), expected_XBSD)


def test_a_text_begins_with_zeros() -> None:
    """The cache is as it was where something came before."""
    cache_XBSD = states(3, 2, 7, 5)
    run = jax.jit(cache_at_start_of_text)
    assert not run(cache_XBSD, jnp.int32(0)).any()
    np.testing.assert_array_equal(run(cache_XBSD, jnp.int32(512)), cache_XBSD)


@pytest.mark.parametrize(
    ("platform", "context", "feed_forward", "remat", "expected"),
    [
        ("cpu", 8192, 0, "", ""),
        ("tpu", 8192, 0, "", "projections"),
        ("tpu", 8192, 0, "layer", "layer"),
        ("tpu", 8192, 2048, "", "projections"),
        # A short context is kept rather than a feed-forward sublayer computed again.
        ("tpu", 512, 2048, "", ""),
    ],
)
def test_what_is_computed_again(
    platform: str, context: int, feed_forward: int, remat: str, expected: str
) -> None:
    c = base.get_config()
    c.model.feed_forward = feed_forward
    c.train.remat = remat
    assert recomputation(c, context, platform) == expected
