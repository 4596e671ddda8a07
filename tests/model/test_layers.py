"""Ways to integrate persistent vectors and feed-forward sublayers, against their definitions
written out densely.

Dimension key: X layer, B batch, T position in the block, S context key, L distance, N persistent
pair, H head, K head width, D model width, F inner unit.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax
from tiny_model import KINDS, geometry, random_params

from allattn.attention import all_attention
from allattn.model import Model, ModelConfig, Params, forward_flops
from allattn.model.all_attention_layer import initial_bias
from allattn.model.network import LAYERS
from allattn.model.sublayers import DropoutSeeds, FeedForward

VARIANTS = {
    name: changes for name, changes in KINDS.items() if changes.get("layer") != "transformer_xl"
}


def dense_layer(
    config: ModelConfig, p: Params, h_BTD: np.ndarray, cache_BSD: np.ndarray, table_LK: np.ndarray
):
    """One layer as the definitions say, in float64: whole matrices, one softmax after another."""
    states_BSD = np.concatenate([cache_BSD, h_BTD], axis=1)
    L = config.limit
    T = h_BTD.shape[1]
    S = states_BSD.shape[1]
    K = config.head_width
    input_BTD = entered(config, h_BTD, p)
    entered_BSD = entered(config, states_BSD, p)
    query_BHTK = unit(config, np.einsum("btd,dhk->bhtk", input_BTD, p["query"]), p, "query_gain")
    key_BHSK = unit(config, np.einsum("bsd,dhk->bhsk", entered_BSD, p["key"]), p, "key_gain")
    value_BHSK = np.einsum("bsd,dhk->bhsk", entered_BSD, p["value"])
    C = key_BHSK.shape[1]
    distance_TS = S - T + np.arange(T)[:, None] - np.arange(S)
    seen_TS = (distance_TS >= 1) & (distance_TS <= L)
    row_TS = np.clip(distance_TS - 1, 0, L - 1)
    by_distance_BHTL = query_BHTK[:, :C] @ table_LK.T
    logits_BHTS = query_BHTK[:, :C] @ key_BHSK.transpose(0, 1, 3, 2)
    logits_BHTS += np.take_along_axis(
        by_distance_BHTL, np.broadcast_to(row_TS, logits_BHTS.shape), axis=-1
    )
    logits_BHTS = np.where(seen_TS, logits_BHTS / math.sqrt(K), -np.inf)
    mask_HTS = np.ones((C, T, S))
    if config.adaptive:
        z_H11 = p["span"][:, None, None] * L
        mask_HTS = np.clip((config.ramp - distance_TS + 1 + z_H11) / config.ramp, 0, 1)

    def renormalised(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
        weight = softmax(logits, axis=-1) * mask
        return weight / (weight.sum(-1, keepdims=True) + config.epsilon)

    if not config.persistent:
        out_BHTK = renormalised(logits_BHTS, mask_HTS) @ value_BHSK
    else:
        pair_value_HNK = math.sqrt(config.persistent) * p["persistent_value"]
        bias_HN = p.get("persistent_bias", np.zeros(p["persistent_key"].shape[:2]))
        pairs = stored_key_HNK(config, p), pair_value_HNK, bias_HN
        out_BHTK = INTEGRATE[config.integration](
            query_BHTK, logits_BHTS, mask_HTS, value_BHSK, pairs, renormalised
        )
    if config.output_gate:
        gate_BTH = 2 / (1 + np.exp(-input_BTD @ p["gate"]))
        out_BHTK = out_BHTK * gate_BTH.transpose(0, 2, 1)[..., None]
    h_BTD = left(config, h_BTD, np.einsum("bhtk,hkd->btd", out_BHTK, p["output"]), p)
    if config.feed_forward:
        ff = p["feed_forward"]
        inner_BTF = entered(config, h_BTD, ff) @ ff["inner"] + ff["inner_bias"]
        soft = config.integration == "ff_attention"
        inner_BTF = softmax(inner_BTF, axis=-1) if soft else np.maximum(inner_BTF, 0)
        h_BTD = left(config, h_BTD, inner_BTF @ ff["outer"] + ff["outer_bias"], ff)
    return h_BTD


def entered(config: ModelConfig, h_BTD: np.ndarray, p: Params) -> np.ndarray:
    return norm(h_BTD, p) if config.pre_norm else h_BTD


def left(config: ModelConfig, h_BTD: np.ndarray, out_BTD: np.ndarray, p: Params) -> np.ndarray:
    if config.residual_scalars:
        h_BTD = p["residual_scale"] * h_BTD
        out_BTD = p["branch_scale"] * out_BTD
    return h_BTD + out_BTD if config.pre_norm else norm(h_BTD + out_BTD, p)


def unit(config: ModelConfig, x_BHTK: np.ndarray, p: Params, gain: str) -> np.ndarray:
    """Every head's vectors at a mean square of 1, times the head's gain."""
    if not config.qk_norm:
        return x_BHTK
    size_BHT1 = np.sqrt((x_BHTK**2).mean(-1, keepdims=True) + 1e-6)
    return x_BHTK / size_BHT1 * p[gain][:, None, None]


def stored_key_HNK(config: ModelConfig, p: Params) -> np.ndarray:
    """Persistent keys whose product with a query is the logit; as long as context keys."""
    if not config.qk_norm:
        return p["persistent_key"]
    width = config.width if config.integration == "single_head" else config.head_width
    return unit(config, p["persistent_key"], p, "persistent_key_gain") / math.sqrt(width)


def norm(x_BTD: np.ndarray, p: Params) -> np.ndarray:
    x_BTD = (x_BTD - x_BTD.mean(-1, keepdims=True)) / np.sqrt(x_BTD.var(-1, keepdims=True) + 1e-5)
    return x_BTD * p["norm_scale"] + p["norm_bias"]


def joint(query_BHTK, logits_BHTS, mask_HTS, value_BHSK, pairs, renormalised):
    key_HNK, pair_value_HNK, bias_HN = pairs
    pair_logits_BHTN = query_BHTK @ key_HNK.transpose(0, 2, 1) + bias_HN[:, None]
    S = logits_BHTS.shape[-1]
    ones = np.ones((*mask_HTS.shape[:2], key_HNK.shape[1]))
    weight = renormalised(
        np.concatenate([logits_BHTS, pair_logits_BHTN], -1),
        np.concatenate([mask_HTS, ones], axis=-1),
    )
    return weight[..., :S] @ value_BHSK + weight[..., S:] @ pair_value_HNK


def split(query_BHTK, logits_BHTS, mask_HTS, value_BHSK, pairs, renormalised):
    key_HNK, pair_value_HNK, bias_HN = pairs
    apart_BHTN = softmax(query_BHTK @ key_HNK.transpose(0, 2, 1) + bias_HN[:, None], axis=-1)
    return renormalised(logits_BHTS, mask_HTS) @ value_BHSK + apart_BHTN @ pair_value_HNK


def head_split(query_BHTK, logits_BHTS, mask_HTS, value_BHSK, pairs, renormalised):
    key_HNK, pair_value_HNK, bias_HN = pairs
    pair_query_BHTK = query_BHTK[:, query_BHTK.shape[1] // 2 :]
    apart_BHTN = softmax(pair_query_BHTK @ key_HNK.transpose(0, 2, 1) + bias_HN[:, None], axis=-1)
    return np.concatenate(
        [renormalised(logits_BHTS, mask_HTS) @ value_BHSK, apart_BHTN @ pair_value_HNK], axis=1
    )


def single_head(query_BHTK, logits_BHTS, mask_HTS, value_BHSK, pairs, renormalised):
    key_HNK, pair_value_HNK, bias_HN = pairs
    B, H, T, K = query_BHTK.shape
    N = key_HNK.shape[1]
    key_ND = key_HNK.transpose(1, 0, 2).reshape(N, H * K)
    pair_value_ND = pair_value_HNK.transpose(1, 0, 2).reshape(N, H * K)
    whole_BTD = query_BHTK.transpose(0, 2, 1, 3).reshape(B, T, H * K)
    stored_ND = key_ND * math.sqrt(H * K)  # and the scale is 1 / sqrt(D)
    logits_BTN = whole_BTD @ stored_ND.T / math.sqrt(H * K) + bias_HN[0]
    apart_BTD = softmax(logits_BTN, axis=-1) @ pair_value_ND
    apart_BHTK = apart_BTD.reshape(B, T, H, K).transpose(0, 2, 1, 3)
    return renormalised(logits_BHTS, mask_HTS) @ value_BHSK + apart_BHTK


INTEGRATE = {f.__name__: f for f in (joint, split, head_split, single_head)}


@pytest.mark.parametrize("name", VARIANTS)
def test_against_the_definition(name: str) -> None:
    """Hidden states of two layers on a cache of other states, and the share of weight on persistent
    pairs.
    """
    model = Model(geometry(**VARIANTS[name], limit=20, implementation=None))
    config = model.config
    params = random_params(model)
    rng = np.random.default_rng(0)
    cache_XBSD = rng.normal(size=(2, 2, 20, 16)).astype(np.float32)
    tokens_BT = rng.integers(29, size=(2, 7))
    quick = {"xla_backend_optimization_level": 0}  # it takes longer to optimise than to run
    run = jax.jit(lambda p, c: model.bind(p).train_forward(tokens_BT, c), compiler_options=quick)
    forward = run(params, cache_XBSD)
    exact = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    embedded_BTD = exact["io"]["embedding"][tokens_BT]
    h_BTD = embedded_BTD
    for number in range(2):
        layer = jax.tree.map(lambda x, i=number: x[i], exact["layers"])
        h_BTD = h_BTD + layer.get("embedding_scale", 0) * embedded_BTD
        h_BTD = dense_layer(
            config, layer, h_BTD, cache_XBSD[number].astype(np.float64), exact["position"]["table"]
        )
    if config.pre_norm:
        h_BTD = norm(h_BTD, exact["final"])
    np.testing.assert_allclose(forward.hidden_BTD, h_BTD, atol=2e-5, rtol=0)
    mass = forward.mass_XBH
    if name in ("joint", "bias", "epsilon", "stable"):
        assert ((mass > 0.1) & (mass < 0.9)).all()
    else:
        np.testing.assert_array_equal(mass, 0.5 if config.persistent else 0)


@pytest.mark.parametrize(
    ("changes", "count"),
    [({"init": 0.25, "ramp": 10}, 0.25 * 80 + 5.5), ({"adaptive": False}, 80)],
)
def test_share_of_the_pairs(changes: dict, count: float) -> None:
    """At initialisation the pairs have the share of the weight that is asked for."""
    changes = {"depth": 1, "width": 64, "heads": 8, "limit": 80, "persistent": 96, **changes}
    plain = geometry(**changes)
    config = dataclasses.replace(plain, persistent_bias=True, persistent_share=0.3)
    assert initial_bias(config) == pytest.approx(math.log(0.3 / 0.7 * count / 96))
    assert initial_bias(plain) == 0
    model = Model(config)
    states_XBSD = np.random.default_rng(0).normal(size=(1, 2, 80, 64)).astype(np.float32)
    tokens_BT = np.arange(32).reshape(2, 16)
    quick = {"xla_backend_optimization_level": 0}  # it takes longer to optimise than to run

    @functools.partial(jax.jit, compiler_options=quick)
    def mass() -> jax.Array:
        params = model.init(jax.random.key(0))
        return model.bind(params).train_forward(tokens_BT, states_XBSD).mass_XBH

    assert mass().mean() == pytest.approx(0.3, abs=0.03)


def test_feed_forward_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """After ReLU, at the rate of the attention weights, by row, position and unit alone; the rest
    is scaled up.
    """
    monkeypatch.setattr(FeedForward, "leave", lambda self, h_BTD, out_BTD: out_BTD)
    config = geometry(**{**KINDS["transformer"], "feed_forward": 16}, dropout=0.25)
    rate = 0.25
    layer = FeedForward(config, nnx.Rngs(0), 0.0)
    # Every unit is 1.
    layer.inner = nnx.Param(jnp.zeros((16, 16)))
    layer.inner_bias = nnx.Param(jnp.ones(16))
    layer.outer = nnx.Param(jnp.eye(16))
    layer.outer_bias = nnx.Param(jnp.zeros(16))
    h_BTD = jnp.zeros((30, 40, 16))
    row_B = jnp.arange(30)
    out_BTD = np.asarray(layer(h_BTD, DropoutSeeds(jnp.uint32(1), row_B)))
    assert set(np.unique(out_BTD)) == {np.float32(0), np.float32(1 / (1 - rate))}
    kept_BTD = out_BTD > 0
    assert kept_BTD.mean() == pytest.approx(
        1 - rate, abs=4 * math.sqrt(rate * (1 - rate) / kept_BTD.size)
    )
    for axis in range(3):
        assert np.ptp(kept_BTD.mean(tuple({0, 1, 2} - {axis}))) > 0, (
            "rows, positions and units have draws of their own"
        )
    np.testing.assert_array_equal(
        layer(h_BTD[7:], DropoutSeeds(jnp.uint32(1), row_B[7:])), out_BTD[7:]
    )
    assert (np.asarray(layer(h_BTD, DropoutSeeds(jnp.uint32(2), row_B))) != out_BTD).mean() > 0.3
    np.testing.assert_array_equal(layer(h_BTD, None), 1)


@pytest.mark.parametrize("name", ["joint", "transformer", "transformer_xl"])
def test_dropout_seeds_argument(name: str) -> None:
    """A layer takes its seeds by position or by name, and drops nothing without."""
    config = geometry(**{**KINDS[name], "dropout": 0.25, "limit": 12, "adaptive": False})
    layer = LAYERS[config.layer](config, nnx.Rngs(0))
    positions = layer.shared(config, nnx.Rngs(0)).keys(12, 5, jnp.float32, None)
    states_BSD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 17, 16)), jnp.float32)
    inputs = (states_BSD[:, 12:], *layer.project(states_BSD), positions, all_attention)
    seeds = DropoutSeeds(jnp.uint32(1), jnp.arange(2))
    without_BTD, _ = layer(*inputs)
    by_position_BTD, _ = layer(*inputs, seeds)
    by_name_BTD, _ = layer(*inputs, dropout_seeds=seeds)
    np.testing.assert_array_equal(without_BTD, layer(*inputs, None)[0])
    np.testing.assert_array_equal(by_position_BTD, by_name_BTD)
    assert (by_position_BTD != without_BTD).any()


@pytest.mark.parametrize(
    ("name", "per_layer"),
    [
        ("joint", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * (3 * 30 + 2 * 5)),
        ("split", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * (3 * 30 + 2 * 5)),
        ("single_head", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * (3 * 30 + 2 * 5)),
        ("head_split", 6 * 16**2 + 2 * 16**2 * 30 / 10 + 16 * (3 * 30 + 2 * 5)),
        ("no_pairs", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * 3 * 30),
        ("transformer", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * 3 * 30 + 4 * 16 * 24),
        ("transformer_xl", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * 3 * (30 + 5.5) + 4 * 16 * 24),
    ],
)
def test_flops(name: str, per_layer: float) -> None:
    """Products of one token by hand: reach 30, block 10."""
    assert forward_flops(geometry(**KINDS[name]), 30, 10) == pytest.approx(
        2 * per_layer + 2 * 16 * 96
    )
