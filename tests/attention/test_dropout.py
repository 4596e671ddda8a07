"""The dropout mask against independent draws.

Kept weights of T queries and C columns are standardised (mean 0, variance 1 if they are drawn), so
that sums over n independent ones, divided by sqrt(n), are close to standard normal numbers: their
standard deviation is 1 and the largest of them is known. What implementations do with the mask is
compared in test_attention.py, by equality.

Dimension key: B row, T query, C column, D feature; Z a set of z-scores.
"""

import functools
import itertools
import statistics
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allattn.attention import dropout
from allattn.attention.dropout import CONTEXT, FEATURE, PERSISTENT, QueryWords

RATE = 0.3
LAGS = (1, 2, 3, 5, 8, 16, 128)

Keep = Callable[[QueryWords, jax.Array, float], jax.Array]


# --- measures -------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("domain", "T", "C", "keep"))
def kept(
    seed: int = 1,
    row: int = 0,
    head: int = 0,
    domain: int = CONTEXT,
    T: int = 256,
    C: int = 1024,
    keep: Keep = dropout.keep,
) -> jax.Array:
    """Which weights of one head of one row stay, as kept_TC."""
    # Queries have the same words for keys and pairs.
    of_queries = CONTEXT if domain == PERSISTENT else domain
    words_T1 = dropout.query_words(seed, row, head, jnp.arange(T)[:, None], of_queries)
    # Keys of the context before the block come first.
    index_C = jnp.arange(C) - C // 2
    return keep(words_T1, dropout.column_words(seed, row, head, index_C, domain), RATE)


def standardised(kept_TC: jax.Array, rate: float = RATE) -> np.ndarray:
    """A mask with mean 0 and variance 1."""
    return (np.asarray(kept_TC, np.float32) - (1 - rate)) / np.sqrt(rate * (1 - rate))


def z_scores(x_TC: np.ndarray) -> dict[str, np.ndarray]:
    """Sums over a standardised mask, by what they measure."""
    T, C = x_TC.shape
    draws = np.random.default_rng(0)
    triples = np.array([draws.choice(T, 3, replace=False) for _ in range(2000)])
    products = (x_TC[triples[:, 0]] * x_TC[triples[:, 1]] * x_TC[triples[:, 2]]).sum(1)
    # Query t and key t + i are at one distance.
    distances = [np.diagonal(x_TC, i).sum() for i in range(C - T)]
    lags = [(x_TC[:, :-lag] * x_TC[:, lag:]).sum(1) / np.sqrt(C - lag) for lag in LAGS]
    return {
        "rates of rows": x_TC.sum(1) / np.sqrt(C),
        "rates of columns": x_TC.sum(0) / np.sqrt(T),
        "rates of distances": np.array(distances) / np.sqrt(T),
        "pairs of rows": (x_TC @ x_TC.T)[np.triu_indices(T, 1)] / np.sqrt(C),
        "pairs of columns": (x_TC.T @ x_TC)[np.triu_indices(C, 1)] / np.sqrt(T),
        "triples of rows": products / np.sqrt(C),
        "lags": np.concatenate(lags),
    }


def unlike_draws(masks: Iterable[np.ndarray]) -> list[str]:
    """What of masks is not as in independent draws, as lines."""
    by_measure = [z_scores(x_TC) for x_TC in masks]
    return [
        line
        for name in by_measure[0]
        for line in far_from_normal(name, np.concatenate([scores[name] for scores in by_measure]))
    ]


def far_from_normal(name: str, z_Z: np.ndarray) -> list[str]:
    """What of z-scores is not as in draws of a normal distribution, as lines."""
    lines = []
    # The standard error of a deviation from n draws is 1 / sqrt(2 n).
    allowed = 0.01 + 4 / np.sqrt(2 * z_Z.size)
    deviation = np.sqrt(np.mean(np.square(z_Z)))
    if abs(deviation - 1) > allowed:
        lines.append(f"{name}: expected a deviation of 1 +- {allowed:.3f}, found {deviation:.3f}")
    # Draws exceed this once in some thousand times: 5.1 of a thousand, 6.1 of a million.
    largest = statistics.NormalDist().inv_cdf(1 - 2e-4 / z_Z.size)
    if np.abs(z_Z).max() > largest:
        lines.append(f"{name}: expected |z| <= {largest:.1f}, found {np.abs(z_Z).max():.1f}")
    return lines


# --- tests ----------------------------------------------------------------------------------------


def test_mask_is_like_independent_draws() -> None:
    """Rates, and correlations of rows, columns, triples and lags, over three seeds."""
    masks = (standardised(kept(seed)) for seed in (1, 2, 3))
    assert unlike_draws(masks) == []


@pytest.mark.slow
@pytest.mark.parametrize("domain", [CONTEXT, PERSISTENT, FEATURE])
def test_large_masks_are_like_independent_draws(domain: int) -> None:
    masks = (standardised(kept(seed, domain=domain, T=512, C=4096)) for seed in range(6))
    assert unlike_draws(masks) == []


def one_factor(words_T1: QueryWords, column_C: jax.Array, rate: float) -> jax.Array:
    """The mask with the same factor for every query."""
    factor_T1 = jnp.full_like(words_T1.factor, 0x7FEB352D)
    return dropout.keep(words_T1._replace(factor=factor_T1), column_C, rate)


def unmixed_columns(words_T1: QueryWords, column_C: jax.Array, rate: float) -> jax.Array:
    """The mask whose columns count in equal steps."""
    step = jnp.uint32(0x9E3779B9).astype(jnp.int32)
    return dropout.keep(words_T1, jnp.arange(column_C.size) * step, rate)


def no_columns(words_T1: QueryWords, column_C: jax.Array, rate: float) -> jax.Array:
    """Queries that drop all or nothing."""
    return dropout.keep(words_T1, jnp.zeros_like(column_C), rate)


@pytest.mark.parametrize(
    ("keep", "fault"),
    [(one_factor, "pairs of rows"), (unmixed_columns, "lags"), (no_columns, "rates of rows")],
)
def test_bad_masks_are_found(keep: Keep, fault: str) -> None:
    """The measures see what is wrong with masks that are cheaper still."""
    found = unlike_draws([standardised(kept(keep=keep))])
    assert any(line.startswith(f"{fault}: expected |z|") for line in found), found


def test_masks_do_not_depend_on_each_other() -> None:
    """Of seeds, rows, heads (also the two exchanged) and domains: all queries with all."""
    places = [
        dict(),
        dict(seed=2),
        dict(row=1),
        dict(head=1),
        dict(domain=PERSISTENT),
        dict(domain=FEATURE),
    ]
    masks = [standardised(kept(**place)) for place in places]
    for x_TC, y_TC in itertools.combinations(masks, 2):
        assert far_from_normal("pairs", (x_TC @ y_TC.T).ravel() / np.sqrt(x_TC.shape[1])) == []


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_rate(rate: float) -> None:
    """The share of dropped weights, in each of 16 heads."""
    words_T1 = dropout.query_words(3, 5, jnp.arange(16)[:, None, None], jnp.arange(64)[:, None], 0)
    column_C = dropout.column_words(3, 5, jnp.arange(16)[:, None, None], jnp.arange(256), 0)
    x_HTC = standardised(dropout.keep(words_T1, column_C, rate), rate)
    assert np.abs(x_HTC.mean((1, 2))).max() < 4 / np.sqrt(64 * 256)


def test_features_are_like_independent_draws() -> None:
    """Of one row, and of two rows and two sites together."""
    x_BTD = jnp.ones((2, 128, 512))
    row_B = jnp.arange(4, 6)
    by_site = [dropout.features(x_BTD, jnp.uint32(9), row_B, RATE, site) for site in (0, 1)]
    np.testing.assert_allclose(by_site[0].max(), 1 / (1 - RATE), rtol=1e-6)
    masks = [standardised(row_TD != 0) for states_BTD in by_site for row_TD in states_BTD]
    assert unlike_draws(masks) == []
    for x_TD, y_TD in itertools.combinations(masks, 2):
        assert far_from_normal("pairs", (x_TD @ y_TD.T).ravel() / np.sqrt(512)) == []


def test_index_may_be_negative() -> None:
    """Keys before the block have words as those within, and the words of a part are the same."""
    whole_C = dropout.column_words(1, 2, 3, jnp.arange(-40, 40), CONTEXT)
    part_C = dropout.column_words(1, 2, 3, jnp.arange(-3, 3, dtype=jnp.int32), CONTEXT)
    np.testing.assert_array_equal(part_C, whole_C[37:43])
    assert len(set(np.asarray(whole_C).tolist())) == 80
