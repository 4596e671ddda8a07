"""The network: parameter counts, initialisation, causality, dropout of embeddings, precision.

Dimension key: X layer, B batch, T position in the block, S cached position, L distance, N
persistent pair, H head, K head width, D model width, V vocabulary.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from comparison import is_normal, is_uniform
from flax import nnx
from tiny_model import KINDS, geometry, random_params

from allattn import config as configuration
from allattn.attention import IMPLEMENTATIONS, all_attention
from allattn.model import Model, ModelConfig, Params, reach_projection
from allattn.model.all_attention_layer import AllAttention
from allattn.model.norm import layer_norm, normalise_heads, rms_norm
from allattn.model.token_io import SMALL_VOCABULARY, lookup

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PARAMETERS = {
    "enwik8_small": 38_501_725,
    "enwik8_large": 114_017_773,
    "text8_small": 38_320_300,
    "text8_large": 113_836_348,
    "wikitext103": 132_493_746,
    "enwik8_span": 38_538_541,
    "enwik8_span_large": 208_910_221,
    "text8_span": 38_357_116,
    "text8_span_large": 208_638_172,
    "enwik8_xl": 41_055_949,
    "enwik8_xl_large": 277_232_845,
    "text8_xl_large": 277_051_420,
    "wikitext103_xl": 151_107_538,
    "wikitext103_xl_large": 285_170_506,
}


# --- parameter counts and initialisation ----------------------------------------------------------


def test_parameter_counts() -> None:
    """Every file states its own in its docstring, and those of published models are exact."""
    stated = {}
    counted = {}
    for path in sorted(
        p for p in CONFIGS.rglob("*.py") if p.stem not in ("__init__", "base", "demo")
    ):
        model = Model(ModelConfig.from_config(configuration.load(str(path))))
        leaves = jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0)))
        counted[path.stem] = sum(math.prod(x.shape) for x in leaves)
        found = re.search(r"([\d,]+)\s+parameters", path.read_text())
        stated[path.stem] = int(found[1].replace(",", "")) if found else None
    assert stated == counted == {**counted, **PARAMETERS}
    # The reduced ablations compare equals.
    tiny = [count for name, count in counted.items() if re.fullmatch(r"(?!n\d).*_tiny", name)]
    joint = counted["joint_tiny"]
    assert len(tiny) >= 8 and max(abs(count - joint) for count in tiny) < joint / 1000


@pytest.fixture(scope="module")
def fresh() -> tuple[ModelConfig, Params]:
    config = geometry(
        depth=3, width=64, heads=4, persistent=48, vocab_size=500, limit=512, init=0.25
    )
    quick = {
        "xla_backend_optimization_level": 0
    }  # these programs take longer to optimise than to run
    return config, jax.jit(Model(config).init, compiler_options=quick)(jax.random.key(0))


def test_initialisation(fresh: tuple[ModelConfig, Params]) -> None:
    """docs/method.md, "Initialisation", with the deviations of the persistent pairs."""
    config, params = fresh
    layers = params["layers"]
    K = config.head_width
    N = config.persistent
    D = config.width
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    is_normal(params["io"]["embedding"], 1)
    is_normal(params["position"]["table"], 1)
    is_normal(layers["persistent_key"], 1 / math.sqrt(K))
    is_normal(layers["persistent_value"], 1 / math.sqrt(N))
    for array in (
        *(layers[name] for name in ("query", "key", "value", "output")),
        *params["io"].values(),
    ):
        if array is not params["io"]["embedding"]:
            is_uniform(array, 1 / math.sqrt(D))
    np.testing.assert_array_equal(layers["norm_scale"], 1)
    np.testing.assert_array_equal(layers["norm_bias"], 0)
    np.testing.assert_array_equal(layers["span"], 0.25)


def test_initialisation_repeats_nothing(fresh: tuple[ModelConfig, Params]) -> None:
    """No two tensors of equal size, nor two layers, share their random numbers."""
    config, params = fresh
    drawn = {"query", "key", "value", "output", "persistent_key", "persistent_value"}
    tensors = [x for name in drawn for x in params["layers"][name]] + [
        params["io"]["embedding"],
        params["io"]["kernel"],
    ]
    flat = [np.asarray(x).ravel() for x in tensors]
    for i, a in enumerate(flat):
        for b in flat[:i]:
            size = min(a.size, b.size)
            assert abs(np.corrcoef(a[:size], b[:size])[0, 1]) < 6 / math.sqrt(size)


# --- causality ------------------------------------------------------------------------------------


def by_position(model: Model, params: Params, T: int) -> np.ndarray:
    """How much final hidden state t (rows) depends on the embedding of position s (columns), as (T,
    T).
    """
    weights_D = np.random.default_rng(0).normal(size=model.config.width).astype(np.float32)

    @jax.jit
    @jax.jacobian
    def jacobian_TVD(
        embedding_VD,
    ):  # position t holds token t, so row t of the table is the embedding at t
        network = model.bind({**params, "io": {**params["io"], "embedding": embedding_VD}})
        cache_XBSD = model.empty_cache(1, model.config.limit)
        return network.train_forward(jnp.arange(T)[None], cache_XBSD).hidden_BTD[0] @ weights_D

    return np.abs(jacobian_TVD(params["io"]["embedding"])).sum(-1)


def test_causality_and_reach() -> None:
    """No state depends on a later token. Each depends on itself and on all that the two layers'
    longest spans and ramps reach, 3.5 + 4 + 1 tokens each with the last excluded, and on nothing
    farther."""
    T = 20
    farthest = 2 * 8
    model = Model(geometry(vocab_size=T, limit=16, implementation=None))
    params = random_params(model)
    params["layers"]["span"] = jnp.array([[3.5, 0.5], [1.5, 3.5]]) / 16
    influence_TT = by_position(model, params, T)
    distance_TT = np.arange(T)[:, None] - np.arange(T)
    seen_TT = (distance_TT >= 0) & (distance_TT <= farthest)
    assert (influence_TT[distance_TT < 0] == 0).all(), "a later token is seen"
    assert (influence_TT[distance_TT > farthest] == 0).all(), "a token beyond reach is seen"
    assert (influence_TT[seen_TT] > 0).all()


def one_layer(model: Model, params: Params) -> AllAttention:
    graph, state = nnx.split(model.bind(params).layers)
    return nnx.merge(graph, jax.tree.map(lambda x: x[0], state))


def test_current_token_is_not_attended() -> None:
    """Attention at t takes keys and values from earlier positions only; t itself enters through
    query and residual.
    """
    T = 9
    model = Model(geometry(depth=1, limit=16, adaptive=False))
    params = random_params(model)
    h_BTD = jnp.asarray(np.random.default_rng(0).normal(size=(1, T, 16)), jnp.float32)

    def attention_part(states_BTD: jax.Array) -> jax.Array:
        layer = one_layer(model, params)
        outputs = []

        def capture(*arrays, **options):
            outputs.append(all_attention(*arrays, **options))
            return outputs[-1]

        layer.attend(h_BTD, *layer.project(states_BTD), params["position"]["table"], capture)
        return outputs[0][0][0].reshape(T, -1).sum(-1)

    influence_TT = np.abs(jax.jit(jax.jacobian(attention_part))(h_BTD))[:, 0].sum(-1)
    assert (influence_TT[np.triu_indices(T)] == 0).all(), (
        "the current token is attended, or a later one"
    )
    assert (influence_TT[np.tril_indices(T, -1)] > 1e-6).all()


@pytest.mark.parametrize(
    ("span", "changes"), [(0.0, {}), (0.4, {}), (0.4, {"pre_norm": True, "qk_norm": True})]
)
def test_projections_follow_the_reach(span: float, changes: dict[str, Any]) -> None:
    """Within reach they are the plain products, gradients included; beyond it zeros; the cache gets
    no gradient.
    """
    model = Model(geometry(depth=1, limit=160, implementation="xla", **changes))
    params = random_params(model)
    params["layers"]["span"] = jnp.full((1, 2), span, jnp.float32)
    rng = np.random.default_rng(0)
    cache_BSD = jnp.asarray(rng.normal(size=(2, 160, 16)), jnp.float32)
    h_BTD = jnp.asarray(rng.normal(size=(2, 7, 16)), jnp.float32)
    visible = 64 if span == 0 else 128  # the buckets that hold 0 + 4 + 1 and 64 + 4 + 1 tokens
    weight_BSHK = jnp.asarray(rng.normal(size=(2, 167, 2, 8)), jnp.float32)

    def loss(params: Params, cache_BSD: jax.Array, h_BTD: jax.Array, reaching: bool) -> tuple:
        layer = one_layer(model, params)
        if reaching:
            key_BSHK, value_BSHK = layer.project_reach(
                cache_BSD[None], 0, h_BTD, layer.choose_length(160, 7)
            )
        else:
            states_BSD = jnp.concatenate([jax.lax.stop_gradient(cache_BSD), h_BTD], axis=1)
            here_S = (jnp.arange(167) >= 160 - visible)[:, None, None]
            key_BSHK, value_BSHK = (jnp.where(here_S, x, 0) for x in layer.project(states_BSD))
        return jnp.sum((key_BSHK + 2 * value_BSHK) * weight_BSHK), (key_BSHK, value_BSHK)

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True), static_argnums=3)
    for ours, plain in zip(
        *(jax.tree.leaves(run(params, cache_BSD, h_BTD, r)) for r in (True, False)), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "limit", "tile"),
    [
        ("reference", 128, 16),
        ("xla", 128, 16),
        pytest.param("pallas_tpu", 2048, reach_projection.LARGEST_TILE, marks=pytest.mark.slow),
    ],
)
def test_room_that_is_not_filled(
    implementation: str, limit: int, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On an accelerator keys and values far beyond reach are what was in memory, even no numbers:
    no output and no gradient has them.
    """
    model = Model(geometry(depth=1, limit=limit, implementation=implementation))
    params = random_params(model)
    params["layers"]["span"] = jnp.zeros((1, 2), jnp.float32)
    tokens_BT = jnp.arange(8)[None]
    cache_XBSD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, limit, 16)), jnp.float32)

    def gradients() -> tuple:
        def loss(params: Params) -> tuple:
            hidden_BTD = model.bind(params).train_forward(tokens_BT, cache_XBSD).hidden_BTD
            return jnp.sum(hidden_BTD**2), hidden_BTD

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    expected = gradients()
    monkeypatch.setattr(reach_projection, "LARGEST_TILE", tile)
    monkeypatch.setattr(jax.lax, "empty", lambda shape, dtype: jnp.full(shape, jnp.nan, dtype))
    jax.tree.map(np.testing.assert_array_equal, gradients(), expected)


def test_cache_beyond_reach_is_not_read() -> None:
    """States farther than span and ramp may hold anything; nearer ones matter."""
    model = Model(geometry(depth=1, implementation="xla"))
    params = random_params(model)
    tokens_BT = jnp.arange(6)[None]
    forward = jax.jit(
        lambda cache_XBSD: model.bind(params).train_forward(tokens_BT, cache_XBSD).hidden_BTD
    )
    cache_XBSD = jnp.asarray(np.random.default_rng(0).normal(size=(1, 1, 160, 16)), jnp.float32)
    reach = 48 + 4  # of the first query
    expected_BTD = forward(cache_XBSD)
    np.testing.assert_array_equal(
        forward(cache_XBSD.at[:, :, : 160 - reach].set(10.0)), expected_BTD
    )
    assert (
        np.abs(forward(cache_XBSD.at[:, :, 160 - reach].set(3.0)) - expected_BTD)[0, 0].max() > 1e-6
    )


# --- norm, dropout, precision ---------------------------------------------------------------------


def test_layer_norm_epsilon() -> None:
    """x / sqrt(variance + 1e-5), told apart from other constants by a variance of 1e-6."""
    x_BTD = jnp.array([[[1e-3, -1e-3, 1e-3, -1e-3]]]) + 0.5
    scale_D = jnp.array([1.0, 1.0, 2.0, 2.0])
    bias_D = jnp.array([0.0, 1.0, 0.0, 1.0])
    size = 1e-3 / math.sqrt(1e-6 + 1e-5)
    expected = [size, 1 - size, 2 * size, 1 - 2 * size]
    np.testing.assert_allclose(layer_norm(x_BTD, scale_D, bias_D)[0, 0], expected, rtol=1e-4)
    assert layer_norm(x_BTD.astype(jnp.bfloat16), scale_D, bias_D).dtype == jnp.bfloat16


def test_layer_norm_gradient() -> None:
    """The hand-written backward pass gives what differentiating the definition gives, in
    float64.
    """
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        h_BTD = jnp.asarray(rng.normal(size=(2, 3, 8)))
        weight_BTD = jnp.asarray(rng.normal(size=(2, 3, 8)))
        scale_D = jnp.asarray(rng.normal(size=8))
        bias_D = jnp.asarray(rng.normal(size=8))

        def plain(h_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array) -> jax.Array:
            centred_BTD = h_BTD - h_BTD.mean(-1, keepdims=True)
            return (
                centred_BTD / jnp.sqrt((centred_BTD**2).mean(-1, keepdims=True) + 1e-5) * scale_D
                + bias_D
            )

        def gradients(norm: Callable) -> tuple[jax.Array, ...]:
            return jax.grad(lambda *inputs: (norm(*inputs) * weight_BTD).sum(), argnums=(0, 1, 2))(
                h_BTD, scale_D, bias_D
            )

        for ours, expected in zip(gradients(layer_norm), gradients(plain), strict=True):
            np.testing.assert_allclose(ours, expected, rtol=1e-10, atol=1e-12)


def test_rms_norm() -> None:
    """A mean square of 1 times the head's gain; values and gradients of the definition, in float64;
    zeros stay zeros.
    """
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x_BTHK = jnp.asarray(rng.normal(size=(2, 3, 4, 8))).at[0, 0].set(0)
        weight_BTHK = jnp.asarray(rng.normal(size=(2, 3, 4, 8)))
        gain_H = jnp.asarray(rng.normal(size=4))

        def plain(x_BTHK: jax.Array, gain_H: jax.Array) -> jax.Array:
            size_BTH1 = jnp.sqrt((x_BTHK**2).mean(-1, keepdims=True) + 1e-6)
            return x_BTHK / size_BTH1 * gain_H[:, None]

        def value_and_gradients(norm: Callable) -> tuple:
            def loss(*inputs: jax.Array) -> jax.Array:
                return (norm(*inputs) * weight_BTHK).sum()

            return jax.value_and_grad(loss, argnums=(0, 1))(x_BTHK, gain_H)

        ours, expected = map(value_and_gradients, (normalise_heads, plain))
        for one, other in zip(*map(jax.tree.leaves, (ours, expected)), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12)
        assert (normalise_heads(x_BTHK, gain_H)[0, 0] == 0).all()
    assert rms_norm(jnp.ones((2, 8), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", ["joint", "transformer", "transformer_xl"])
def test_options_begin_as_nothing(kind: str) -> None:
    """Gates and scalars of a fresh network leave every state as it is, whatever its embedding; the
    factor of output projections is that of the numbers drawn.
    """
    plain = Model(geometry(**KINDS[kind]))
    options = {"residual_scalars": True, "output_gate": True, "output_scale": 0.1}
    model = Model(dataclasses.replace(plain.config, **options))
    quick = {"xla_backend_optimization_level": 0}
    drawn = jax.jit(plain.init, compiler_options=quick)(jax.random.key(0))
    params = jax.jit(model.init, compiler_options=quick)(jax.random.key(0))
    if kind != "transformer_xl":
        np.testing.assert_allclose(params["layers"]["output"], 0.1 * drawn["layers"]["output"])
    assert np.std(params["layers"]["output"]) < 0.11 * np.std(drawn["layers"]["output"])
    if "feed_forward" in drawn["layers"]:
        outer = [x["layers"]["feed_forward"]["outer"] for x in (params, drawn)]
        assert np.std(outer[0]) < 0.11 * np.std(outer[1])

    # The same parameters without the options' own.
    def shared(new: Params, old: Params) -> Params:
        return {
            name: shared(new[name], x) if isinstance(x, dict) else new[name]
            for name, x in old.items()
        }

    tokens_BT = jnp.arange(6)[None]
    found = []
    for one, numbers in ((model, params), (plain, shared(params, drawn))):

        def run(numbers: Params, one: Model = one) -> jax.Array:
            cache_XBSD = one.empty_cache(1, 16)
            return one.bind(numbers).train_forward(tokens_BT, cache_XBSD).hidden_BTD

        found.append(jax.jit(run, compiler_options=quick)(numbers))
    np.testing.assert_array_equal(*found)


def test_qk_norm_of_transformer_xl() -> None:
    """The sizes of queries and keys do not matter, those of position keys do."""
    model = Model(geometry(**KINDS["stable_xl"]))
    params = random_params(model)
    tokens_BT = jnp.arange(6)[None]
    cache_XBSD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 12, 16)), jnp.float32)

    @jax.jit
    def hidden(factors: dict[str, float]) -> jax.Array:
        layers = dict(params["layers"])
        for name, factor in factors.items():
            layers[name] = layers[name] * factor
        network = model.bind({**params, "layers": layers})
        return network.train_forward(tokens_BT, cache_XBSD).hidden_BTD

    expected_BTD = hidden({"query": 1.0, "key": 1.0, "relative": 1.0})
    long_BTD = hidden({"query": 7.0, "key": 30.0, "relative": 1.0})
    np.testing.assert_allclose(long_BTD, expected_BTD, atol=2e-4)
    other_BTD = hidden({"query": 1.0, "key": 1.0, "relative": 3.0})
    assert np.abs(other_BTD - expected_BTD).max() > 1e-2


def test_heads_of_width_128() -> None:
    """The usual width of new models, in all implementations that a configuration may name."""
    changes = {"width": 128, "heads": 1, "depth": 1, "persistent": 8, "limit": 16}
    tokens_BT = jnp.arange(8)[None]
    found = []
    for implementation in IMPLEMENTATIONS:
        model = Model(geometry(**changes, implementation=implementation))
        params = random_params(model)
        cache_XBSD = model.empty_cache(1, 16) + 0.1
        forward = jax.jit(lambda p, m=model, c=cache_XBSD: m.bind(p).train_forward(tokens_BT, c))
        found.append(forward(params).hidden_BTD)
    for hidden_BTD in found[1:]:
        np.testing.assert_allclose(hidden_BTD, found[0], atol=2e-5)


@pytest.mark.parametrize("vocabulary", [7, SMALL_VOCABULARY + 1])
def test_gradient_of_a_frequent_symbol(vocabulary: int) -> None:
    """In bfloat16 the sum of 3,000 ones would stay at 256; vectors are rows of the table in the
    asked dtype.
    """
    table_VD = jnp.asarray(np.random.default_rng(0).normal(size=(vocabulary, 4)), jnp.float32)
    tokens_BT = jnp.array([[3] * 3000 + [5] * 7])
    found_BTD, pull = jax.vjp(
        lambda table_VD: lookup(jnp.dtype("bfloat16"), table_VD, tokens_BT), table_VD
    )
    np.testing.assert_array_equal(found_BTD, table_VD.astype(jnp.bfloat16)[tokens_BT])
    expected_V = np.zeros(vocabulary)
    expected_V[3] = 3000
    expected_V[5] = 7
    np.testing.assert_array_equal(
        pull(jnp.ones_like(found_BTD))[0], np.repeat(expected_V[:, None], 4, axis=1)
    )


def dropped(
    model: Model, params: Params, tokens_BT: np.ndarray, seeds_X: jax.Array, row_offset: int = 0
) -> tuple:
    """Inputs of layer 0 and final hidden states, as (h_BTD, hidden_BTD)."""

    @jax.jit
    def run(params, tokens_BT, seeds_X, row_offset):
        cache_XBSD = model.empty_cache(tokens_BT.shape[0], model.config.limit)
        row_B = row_offset + jnp.arange(tokens_BT.shape[0])
        forward = model.bind(params).train_forward(tokens_BT, cache_XBSD, seeds_X, row_B)
        return forward.new[0], forward.hidden_BTD

    return tuple(np.asarray(x) for x in run(params, tokens_BT, seeds_X, row_offset))


def test_embedding_dropout() -> None:
    """It zeroes its share of the embedding's output and, by another draw, of the final state, and
    scales the rest.
    """
    T = 40
    rate = 0.25
    clean = Model(geometry(depth=1, vocab_size=4 * T, limit=16, adaptive=False))
    model = Model(dataclasses.replace(clean.config, embedding_dropout=rate))
    params = random_params(model)
    tokens_BT = np.arange(4 * T).reshape(4, T)
    h_BTD, hidden_BTD = dropped(model, params, tokens_BT, jnp.array([1, 2, 3], jnp.uint32))
    embedded_BTD = np.asarray(params["io"]["embedding"])[tokens_BT]
    np.testing.assert_allclose(h_BTD, np.where(h_BTD != 0, embedded_BTD / (1 - rate), 0), rtol=1e-6)
    after = {**params, "io": {**params["io"], "embedding": h_BTD.reshape(4 * T, -1)}}
    _, whole_BTD = dropped(clean, after, tokens_BT, jnp.array([1, 2, 3], jnp.uint32))
    np.testing.assert_allclose(
        hidden_BTD, np.where(hidden_BTD != 0, whole_BTD / (1 - rate), 0), atol=1e-5
    )
    for array in (h_BTD, hidden_BTD):
        assert (array == 0).mean() == pytest.approx(rate, abs=0.03)
    both = ((h_BTD == 0) & (hidden_BTD == 0)).mean()
    assert both == pytest.approx(rate**2, abs=0.02), "the two masks must be independent"


def test_dropout_does_not_depend_on_the_split() -> None:
    """Rows in parts, each told its offset, drop what the whole batch drops: embeddings, states and
    attention.
    """
    model = Model(geometry(embedding_dropout=0.2, dropout=0.3, limit=16))
    params = random_params(model)
    seeds_X = jnp.array([1, 2, 3, 4], jnp.uint32)
    tokens_BT = np.random.default_rng(0).integers(29, size=(4, 10))
    whole = dropped(model, params, tokens_BT, seeds_X)
    parts = [dropped(model, params, tokens_BT[i : i + 2], seeds_X, i) for i in (0, 2)]
    for array, *pieces in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(array == 0, np.concatenate(pieces) == 0)
        np.testing.assert_allclose(array, np.concatenate(pieces), atol=1e-5)
    wrong = dropped(model, params, tokens_BT[2:], seeds_X, 0)
    assert not np.allclose(wrong[0], whole[0][2:]), "the offset must matter"


def test_bfloat16() -> None:
    """Products in bfloat16 over float32 parameters: the loss is that of float32 to about its
    precision.
    """
    tokens_BT = np.random.default_rng(0).integers(29, size=(4, 33))
    losses = {}
    for dtype in ("float32", "bfloat16"):
        model = Model(geometry(dtype=dtype, limit=32))
        params = random_params(model)

        def loss(params, model=model):
            network = model.bind(params)
            forward = network.train_forward(tokens_BT[:, :-1], model.empty_cache(4, 32))
            assert forward.hidden_BTD.dtype == forward.new.dtype == jnp.dtype(model.config.dtype)
            nll_BT = network.io.nll(forward.hidden_BTD, tokens_BT[:, 1:])
            assert nll_BT.dtype == jnp.float32
            return nll_BT.mean()

        losses[dtype] = float(jax.jit(loss)(params))
        trees = (
            jax.eval_shape(model.init, jax.random.key(0)),
            jax.eval_shape(jax.grad(loss), params),
        )
        assert {x.dtype for x in jax.tree.leaves(trees)} == {jnp.dtype("float32")}
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.01)
    assert losses["bfloat16"] != losses["float32"]


def occurrences(jaxpr: Any, name: str) -> int:
    """How often a primitive stands in a program, in the programs inside it as well."""
    inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values()))]
    inner = [getattr(x, "jaxpr", x) for x in inner if hasattr(getattr(x, "jaxpr", x), "eqns")]
    return sum(eqn.primitive.name == name for eqn in jaxpr.eqns) + sum(
        occurrences(x, name) for x in inner
    )


@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "pallas_gpu"])
def test_what_is_recomputed(implementation: str) -> None:
    """`layer` runs the forward pass of the operation twice, `projections` once, and keeps less than
    all.
    """
    model = Model(geometry(implementation=implementation))
    params = jax.eval_shape(model.init, jax.random.key(0))
    cache_XBSD = model.empty_cache(2, 16)
    tokens_BT = jnp.zeros((2, 8), jnp.int32)
    mark = {"xla": "reduce_max"}.get(implementation, "pallas_call")

    def times_and_kept(remat: str) -> tuple[int, int]:
        def loss(params: Params) -> jax.Array:
            network = model.bind(params)
            return network.train_forward(tokens_BT, cache_XBSD, remat=remat).hidden_BTD.sum()

        _, back = jax.eval_shape(lambda params: jax.vjp(loss, params), params)
        program = jax.make_jaxpr(jax.grad(loss))(params)
        times = occurrences(program.jaxpr, mark)
        return times, sum(x.size for x in jax.tree.leaves(back))

    all_times, all_kept = times_and_kept("")
    times, kept = times_and_kept("projections")
    layer_times, layer_kept = times_and_kept("layer")
    assert layer_times > times == all_times > 0
    assert layer_kept < kept < all_kept
