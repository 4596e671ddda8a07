"""Transformer-XL: the paper's numbers, and what is its own: empty memory, dropouts, initialisation.

Dimension key: X layer, B batch, T position in the block, S cached position, L distance, H head, D
model width.
"""

import functools
import math
import re
from typing import Any

import golden_data as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_model import KINDS, geometry, random_params

from allattn import attention as attention_package
from allattn.attention import dropout
from allattn.model import Model, ModelConfig
from allattn.model.transformer_xl import Relative, TransformerXL, sinusoids
from configs import base

OUTPUT = 2e-5
GRADIENT = 1e-4
QUICK = {"xla_backend_optimization_level": 0}  # these programs take longer to optimise than to run
quick_jit = functools.partial(jax.jit, compiler_options=QUICK)
LAYERS = ["attn", "declayer", "declayer_prelnorm", "declayer_nomem"]
MODELS = ["plain", "plain_samelen_clamp", "adaptive", "adaptive_div2"]


def bound(config, params: dict) -> TransformerXL:
    """A layer with these parameters; a file of attention alone leaves those of the feed-forward
    sublayer abstract.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: TransformerXL(config, nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def follow_layer(name: str, folder: str, dtype: Any, implementation: str) -> list[float]:
    """Errors of the output, then of every gradient."""
    g = golden.load(f"txl_{name}", folder)
    config = golden.xl_config(g)
    alone = name == "attn"
    prefix = "" if alone else "dec_attn."
    tensors = [
        {k[2:]: v.astype(dtype) for k, v in g.items() if k.startswith(kind)}
        for kind in ("p.", "g.")
    ]
    params, d_params = (golden.xl_layer(take, config, prefix) for take in tensors)
    w_BTD = g["w"].astype(dtype).transpose(1, 0, 2)
    cot_BTD = g["cot"].astype(dtype).transpose(1, 0, 2)
    mems_BSD = g["mems"].astype(dtype).transpose(1, 0, 2) if "mems" in g else w_BTD[:, :0]
    nearest_first_LD = g["r"][::-1, 0].astype(dtype)
    np.testing.assert_allclose(
        sinusoids(jnp.arange(len(nearest_first_LD)), config.width), nearest_first_LD, atol=1e-6
    )

    def attention(*arrays, **options):
        return attention_package.all_attention(
            *arrays, **{**options, "implementation": implementation}
        )

    @quick_jit
    def run(*inputs):
        def loss(params, w_BTD, mems_BSD, *position):
            layer = bound(config, params)
            key_BSHK, value_BSHK = layer.project(jnp.concatenate([mems_BSD, w_BTD], axis=1))
            call = layer.attend if alone else layer
            out_BTD, _ = call(
                w_BTD, key_BSHK, value_BSHK, Relative(*position), attention, dropout_seeds=None
            )
            return jnp.sum(out_BTD * cot_BTD), out_BTD

        return jax.grad(loss, argnums=range(6), has_aux=True)(*inputs)

    biases = [g[f"{name}_bias"].astype(dtype) for name in ("r_w", "r_r")]
    ours, out_BTD = run(params, w_BTD, mems_BSD, nearest_first_LD, *biases)
    theirs = [d_params, g["grad_w"].transpose(1, 0, 2)]
    theirs += [g["grad_mems"].transpose(1, 0, 2) if "mems" in g else mems_BSD, g["grad_r"][::-1, 0]]
    theirs += [g["grad_r_w_bias"], g["grad_r_r_bias"]]
    ours[0].pop("relative") if "relative" not in d_params else None
    errors = [golden.error(out_BTD, g["out"].transpose(1, 0, 2))]
    return errors + [
        golden.error(a, b)
        for a, b in zip(*map(jax.tree.leaves, (ours, tuple(theirs))), strict=True)
        if b.size
    ]


@pytest.mark.parametrize(
    ("name", "implementation"),
    [
        *((name, "xla") for name in LAYERS),
        *(("declayer", other) for other in ("reference", "pallas_tpu", "pallas_gpu")),
    ],
)
def test_layer(name: str, implementation: str) -> None:
    out, *gradients = follow_layer(name, "golden", np.float32, implementation)
    assert out <= OUTPUT and max(gradients) <= GRADIENT


@pytest.mark.parametrize("name", LAYERS)
def test_layer_float64(name: str) -> None:
    with jax.enable_x64(True):
        assert max(follow_layer(name, "golden64", np.float64, "xla")) <= 1e-9


def follow_model(name: str, folder: str, dtype: str) -> tuple[float, float]:
    """Largest errors of values (NLL, log-probabilities, memories) and of gradients over the four
    blocks.
    """
    g = golden.load(f"txl_lm_{name}", folder)
    config = golden.xl_config(g, dtype=dtype)
    model = Model(config)
    params = golden.xl_params(g, config, "p.", dtype)
    M = int(g["block"])
    tokens_BT = g["tokens"].T
    errors = []
    B = len(tokens_BT)
    S = config.limit

    @quick_jit
    def run(params, cache_XBSD, inputs_BT, targets_BT, before):
        def loss(params):
            network = model.bind(params)
            forward = network.train_forward(inputs_BT, cache_XBSD, before=before)
            nll_BT = network.io.nll(forward.hidden_BTD, targets_BT)
            logp_BTV = jax.nn.log_softmax(network.io.logits(forward.hidden_BTD))
            return nll_BT.mean(), (nll_BT, logp_BTV, forward.new)

        return jax.grad(loss, has_aux=True)(params)

    def compare_memories(cache_XBSD: jax.Array, when: str) -> None:
        for layer in range(config.depth):
            errors.append(
                golden.error(cache_XBSD[layer], g[f"mems_{when}_last.{layer}"].transpose(1, 0, 2))
            )

    cache_XBSD = model.empty_cache(B, S) + 7.0  # what lies before the text must not matter
    for block in range(4):
        if block == 3:
            compare_memories(cache_XBSD, "before")
        window_BT = tokens_BT[:, block * M : (block + 1) * M + 1]
        gradients, found = run(params, cache_XBSD, window_BT[:, :-1], window_BT[:, 1:], block * M)
        errors.append(golden.error(found[0], g["nll"][block].T))
        cache_XBSD = jnp.concatenate([cache_XBSD, found[2]], axis=2)[:, :, M:]
    compare_memories(cache_XBSD, "after")
    errors.append(golden.error(found[1], g["logp_last"].transpose(1, 0, 2)))
    theirs = golden.xl_params(g, config, "g.", dtype)
    pairs = zip(*map(jax.tree.leaves, (gradients, theirs)), strict=True)
    return max(errors), max(golden.error(a, b) for a, b in pairs)


@pytest.mark.parametrize("name", MODELS)
def test_model(name: str) -> None:
    values, gradients = follow_model(name, "golden", "float32")
    assert values <= OUTPUT and gradients <= GRADIENT


@pytest.mark.parametrize("name", MODELS)
def test_model_float64(name: str) -> None:
    with jax.enable_x64(True):
        assert max(follow_model(name, "golden64", "float64")) <= 1e-9


# --- what is its own ------------------------------------------------------------------------------


def test_initialisation() -> None:
    """Weights and the two vectors N(0, 0.02), scales of norms N(1, 0.02), biases 0, nothing drawn
    twice.
    """
    model = Model(
        geometry(**{**KINDS["transformer_xl"], "width": 64, "depth": 4, "feed_forward": 128})
    )
    params = quick_jit(model.init)(jax.random.key(1))
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    drawn = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float64)
        for path, x in flat
    }
    noise = {
        name: x - name.endswith("norm_scale")
        for name, x in drawn.items()
        if not re.search(r"bias(/0)?$", name)
    }
    assert (
        all((drawn[name] == 0).all() for name in drawn.keys() - noise.keys()) and len(noise) == 12
    )
    for name, x in noise.items():
        assert abs(x.mean()) < 4 * 0.02 / math.sqrt(x.size), name
        assert x.std() == pytest.approx(0.02, rel=4 / math.sqrt(x.size)), name
    tensors = [
        x.ravel()[:64]
        for array in noise.values()
        for x in (array if array.ndim > 2 else array[None])
    ]
    correlation = np.corrcoef(tensors) - np.eye(len(tensors))
    assert np.abs(correlation).max() < 5.5 / math.sqrt(64)


def test_embedding_is_tied_and_scaled() -> None:
    model = Model(geometry(**KINDS["transformer_xl"]))
    params = random_params(model)
    assert params["io"].keys() == {"embedding", "bias"}
    io = model.bind(params).io
    table_VD = params["io"]["embedding"][0]
    np.testing.assert_allclose(io.embed(jnp.arange(9)[None], jnp.float32)[0], 4 * table_VD[:9])
    h_BTD = jnp.ones((1, 1, 16))
    np.testing.assert_allclose(
        io.logits(h_BTD)[0, 0],
        jax.nn.log_softmax(table_VD.sum(1) + params["io"]["bias"][0]),
        rtol=1e-5,
    )


def test_where_dropout_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, position encodings, attention's output, after ReLU, the feed-forward output, final
    state; and weights at a rate of their own. All draws differ."""
    c = base.get_config()
    model_fields = {
        "layer": "transformer_xl",
        "persistent": 0,
        "feed_forward": 24,
        "depth": 1,
        "width": 16,
        "heads": 2,
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "dtype": "float32",
        "implementation": "reference",  # few operations, as each runs by itself here
    }
    c.model.update(model_fields)
    c.model.span.update({"adaptive": False, "limit": 12})
    model = Model(ModelConfig.from_config(c))
    sites: list[tuple] = []
    weights: list[tuple] = []

    def features(x_BTD, seed, row_B, rate, site=0):
        sites.append((x_BTD.shape, float(rate), int(seed), site))
        return x_BTD

    def attention(*arrays, **options):
        weights.append((options["dropout_rate"], int(options["dropout_seed"])))
        return attention_package.all_attention(*arrays, **options)

    monkeypatch.setattr(dropout, "features", features)
    params = random_params(model)
    tokens_BT = jnp.zeros((3, 5), jnp.int32)
    with jax.disable_jit():
        seeds_X = jnp.array([7, 8, 9], jnp.uint32)
        model.bind(params).train_forward(
            tokens_BT, model.empty_cache(3, 12), seeds_X, attention=attention
        )
    state = (3, 5, 16)
    inner = (3, 5, 24)
    positions = (1, 17, 16)
    expected = [(positions, 0.1, 8, 1), (state, 0.1, 8, 0), (state, 0.1, 7, 2), (inner, 0.1, 7, 0)]
    assert sites == [*expected, (state, 0.1, 7, 1), (state, 0.1, 9, 0)]
    assert weights == [(0.2, 7)]


def test_memory_fills() -> None:
    """Cached states beyond those of this text do not exist; without `before` all of them do."""
    model = Model(geometry(**KINDS["transformer_xl"]))
    params = random_params(model)
    tokens_BT = jnp.arange(5)[None]
    cache_XBSD = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 12, 16)), jnp.float32)
    forward = jax.jit(
        lambda cache, before: (
            model.bind(params).train_forward(tokens_BT, cache, before=before).hidden_BTD
        )
    )
    for before in (0, 5, 12, 40):
        first = max(0, 12 - before)
        changed_XBSD = cache_XBSD.at[:, :, :first].set(9.0)
        np.testing.assert_array_equal(forward(changed_XBSD, before), forward(cache_XBSD, before))
        if first < 12:
            changed_XBSD = cache_XBSD.at[:, :, first].set(9.0)
            assert (forward(changed_XBSD, before) != forward(cache_XBSD, before)).any()
    np.testing.assert_allclose(forward(cache_XBSD, None), forward(cache_XBSD, 12), atol=1e-5)
