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
from scipy.special import erf, softmax
from tiny_model import KINDS, geometry, random_params

from allattn.attention import all_attention
from allattn.model import Model, ModelConfig, Params, forward_flops
from allattn.model.all_attention_layer import initial_bias
from allattn.model.network import LAYERS
from allattn.model.pairs import Pairs, pattention
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

    # A sink is a place of the context with an offset for its logit and a value of 0.
    if config.sinks:
        bias_BHTN = np.broadcast_to(p["sink_bias"][:, None], (*logits_BHTS.shape[:3], config.sinks))
        logits_BHTS = np.concatenate([logits_BHTS, bias_BHTN], axis=-1)
        mask_HTS = np.concatenate([mask_HTS, np.ones((C, T, config.sinks))], axis=-1)
        zeros_BHNK = np.zeros((*value_BHSK.shape[:2], config.sinks, K))
        value_BHSK = np.concatenate([value_BHSK, zeros_BHNK], axis=2)

    def renormalised(logits: np.ndarray, mask: np.ndarray) -> np.ndarray:
        weight = softmax(logits, axis=-1) * mask
        return weight / (weight.sum(-1, keepdims=True) + config.epsilon)

    alone = not config.persistent or config.integration in ("sublayer", "pattention")
    if alone:
        out_BHTK = renormalised(logits_BHTS, mask_HTS) @ value_BHSK
    else:
        pair_value_HNK = math.sqrt(config.persistent) * p["persistent_value"]
        if config.persistent_gain == "gain":
            pair_value_HNK = pair_value_HNK * p["persistent_gain"][:, None, None]
        bias_HN = p.get("persistent_bias", np.zeros(p["persistent_key"].shape[:2]))
        pairs = stored_key_HNK(config, p), pair_value_HNK, bias_HN
        out_BHTK = INTEGRATE[config.integration](
            query_BHTK, logits_BHTS, mask_HTS, value_BHSK, pairs, renormalised
        )
    if config.output_gate:
        gate_BTH = 2 / (1 + np.exp(-input_BTD @ p["gate"]))
        out_BHTK = out_BHTK * gate_BTH.transpose(0, 2, 1)[..., None]
    h_BTD = left(config, h_BTD, np.einsum("bhtk,hkd->btd", out_BHTK, p["output"]), p)
    if config.integration in ("sublayer", "pattention"):
        own = p["persistent_sublayer"]
        read = {"sublayer": sublayer, "pattention": token_attention}[config.integration]
        h_BTD = left(config, h_BTD, read(config, p, entered(config, h_BTD, own)), own)
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
    wide = config.integration == "single_head" or config.persistent_heads == 1
    width = config.width if wide else config.head_width
    return unit(config, p["persistent_key"], p, "persistent_key_gain") / math.sqrt(width)


def norm(x_BTD: np.ndarray, p: Params) -> np.ndarray:
    x_BTD = (x_BTD - x_BTD.mean(-1, keepdims=True)) / np.sqrt(x_BTD.var(-1, keepdims=True) + 1e-5)
    return x_BTD * p["norm_scale"] + p["norm_bias"]


def sublayer(config: ModelConfig, p: Params, x_BTD: np.ndarray) -> np.ndarray:
    """Pairs alone: queries are the input cut into heads, the output is the heads side by side."""
    B, T, D = x_BTD.shape
    query_BHTK = x_BTD.reshape(B, T, config.heads, -1).transpose(0, 2, 1, 3)
    query_BHTK = unit(config, query_BHTK, p, "persistent_query_gain")
    key_HNK = stored_key_HNK(config, p)
    value_HNK = math.sqrt(config.persistent) * p["persistent_value"]
    # As wide as the model: one head.
    if config.persistent_heads == 1:
        query_BHTK = query_BHTK.transpose(0, 2, 1, 3).reshape(B, 1, T, D)
        key_HNK = np.concatenate(list(key_HNK), axis=-1)[None]
        value_HNK = np.concatenate(list(value_HNK), axis=-1)[None]
    logits_BHTN = query_BHTK @ key_HNK.transpose(0, 2, 1)
    if config.persistent_bias:
        logits_BHTN = logits_BHTN + p["persistent_bias"][:, None]
    out_BHTK = softmax(logits_BHTN, axis=-1) @ value_HNK
    if config.persistent_gain == "norm":
        size_BHT1 = np.sqrt((out_BHTK**2).mean(-1, keepdims=True) + 1e-6)
        out_BHTK = out_BHTK / size_BHT1 * p["persistent_gain"][:, None, None]
    return out_BHTK.transpose(0, 2, 1, 3).reshape(B, T, D)


def token_attention(config: ModelConfig, p: Params, x_BTD: np.ndarray) -> np.ndarray:
    """TokenFormer's: GeLU(A / |A| sqrt(N)) V with A = X K', and a gain on it."""
    key_ND = np.concatenate(list(p["persistent_key"]), axis=-1)
    value_ND = np.concatenate(list(p["persistent_value"]), axis=-1)
    logits_BTN = x_BTD @ key_ND.T
    norm_BT1 = np.sqrt((logits_BTN**2).sum(-1, keepdims=True)) + 1e-5
    unit_BTN = logits_BTN / norm_BT1 * math.sqrt(config.persistent)
    weight_BTN = unit_BTN * 0.5 * (1 + erf(unit_BTN / math.sqrt(2)))
    gain_1 = p.get("persistent_gain", np.ones(1))
    return gain_1 * (weight_BTN @ value_ND)


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
    if config.integration == "joint" and (config.persistent or config.sinks):
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


def test_pairs_as_wide_as_the_model() -> None:
    """`single_head` is `split` with one head of pairs."""
    wide = Model(geometry(integration="split", persistent_heads=1))
    named = Model(geometry(integration="single_head"))
    params = random_params(named)
    tokens_BT = np.arange(6)[None]
    found = []
    for model in (wide, named):
        cache_XBSD = model.empty_cache(1, 16)
        forward = jax.jit(lambda p, m=model, c=cache_XBSD: m.bind(p).train_forward(tokens_BT, c))
        found.append(forward(params).hidden_BTD)
    np.testing.assert_array_equal(*found)


def test_pattention() -> None:
    """The formula in float64, with its gradients; a row of zeros reads zeros and has a gradient
    of 0; weights are dropped.
    """
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x_BTD = jnp.asarray(rng.normal(size=(2, 3, 8))).at[0, 1].set(0)
        key_HNK = jnp.asarray(0.02 * rng.normal(size=(2, 5, 4)))
        value_HNK = jnp.asarray(rng.normal(size=(2, 5, 4)))
        weight_BTD = jnp.asarray(rng.normal(size=(2, 3, 8)))

        def ours(x_BTD, key_HNK, value_HNK):
            out_BTD = pattention(x_BTD, Pairs(key_HNK, value_HNK, True), None, 0.0)
            return (out_BTD * weight_BTD).sum()

        def formula(x_BTD, key_HNK, value_HNK):
            key_ND = jnp.concatenate(list(key_HNK), axis=-1)
            value_ND = jnp.concatenate(list(value_HNK), axis=-1)
            logits_BTN = x_BTD @ key_ND.T
            # Of zeros the plain norm has no derivative.
            is_zero_BT1 = (x_BTD == 0).all(-1, keepdims=True)
            square_BT1 = jnp.where(is_zero_BT1, 1, (logits_BTN**2).sum(-1, keepdims=True))
            unit_BTN = logits_BTN / (jnp.sqrt(square_BT1) + 1e-5) * math.sqrt(5)
            gelu_BTN = unit_BTN * 0.5 * (1 + jax.lax.erf(unit_BTN / math.sqrt(2)))
            return (jnp.where(is_zero_BT1, 0, gelu_BTN) @ value_ND * weight_BTD).sum()

        arrays = (x_BTD, key_HNK, value_HNK)
        found = jax.value_and_grad(ours, argnums=(0, 1, 2))(*arrays)
        expected = jax.value_and_grad(formula, argnums=(0, 1, 2))(*arrays)
        # The gradient of a row of zeros only has to be finite.
        assert np.isfinite(found[1][0]).all()
        for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            off = np.array(np.abs(one - other))
            if one.shape == x_BTD.shape:
                off[0, 1] = 0
            assert off.max() <= 1e-12 * max(1, np.abs(other).max())

    # Values that tell the weights apart.
    eye_HNK = jnp.eye(8)[None]
    x_BTD = jnp.asarray(rng.normal(size=(8, 64, 8)), jnp.float32)
    seeds = DropoutSeeds(jnp.uint32(1), jnp.arange(8))
    pairs = Pairs(eye_HNK, eye_HNK, True)
    dropped_BTN = pattention(x_BTD, pairs, seeds, 0.25)
    whole_BTN = pattention(x_BTD, pairs, None, 0.25)
    kept_BTN = dropped_BTN != 0
    np.testing.assert_allclose(dropped_BTN, jnp.where(kept_BTN, whole_BTN / 0.75, 0), rtol=1e-5)
    assert kept_BTN.mean() == pytest.approx(0.75, abs=0.03)


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
        ("sublayer", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * (3 * 30 + 2 * 5)),
        ("pattention", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * (3 * 30 + 2 * 5)),
        ("stable", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * (3 * 30 + 2 * 5) + 2 * 16 * 2),
        ("transformer_xl", 8 * 16**2 + 4 * 16**2 * 30 / 10 + 2 * 16 * 3 * (30 + 5.5) + 4 * 16 * 24),
    ],
)
def test_flops(name: str, per_layer: float) -> None:
    """Products of one token by hand: reach 30, block 10."""
    assert forward_flops(geometry(**KINDS[name]), 30, 10) == pytest.approx(
        2 * per_layer + 2 * 16 * 96
    )
