"""Transformer-XL: the paper's numbers, and what is its own: empty memory, dropouts, initialisation.

Dimension key: X layer, B batch, T position in the block, S cached position, L distance, H head, D model width.
"""

from typing import Any

import golden_data as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from allattn import attention as attention_package
from allattn.baselines import Relative, TransformerXL, sinusoids
from allattn.model import Model

OUTPUT, GRADIENT = 2e-5, 1e-4
LAYERS = ["attn", "declayer", "declayer_prelnorm", "declayer_nomem"]
MODELS = ["plain", "plain_samelen_clamp"]


def bound(config, params: dict) -> TransformerXL:
    """A layer with these parameters; a file of attention alone leaves those of the feed-forward sublayer abstract."""
    graph, state = nnx.split(nnx.eval_shape(lambda: TransformerXL(config, nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def follow_layer(name: str, folder: str, dtype: Any, implementation: str) -> list[float]:
    """Errors of the output, then of every gradient."""
    g = golden.load(f"txl_{name}", folder)
    config, alone = golden.xl_config(g), name == "attn"
    prefix = "" if alone else "dec_attn."
    tensors = [{k[2:]: v.astype(dtype) for k, v in g.items() if k.startswith(kind)} for kind in ("p.", "g.")]
    params, d_params = (golden.xl_layer(take, config, prefix) for take in tensors)
    w_BTD, cot_BTD = (g[key].astype(dtype).transpose(1, 0, 2) for key in ("w", "cot"))
    mems_BSD = g["mems"].astype(dtype).transpose(1, 0, 2) if "mems" in g else w_BTD[:, :0]
    nearest_first_LD = g["r"][::-1, 0].astype(dtype)
    np.testing.assert_allclose(sinusoids(jnp.arange(len(nearest_first_LD)), config.width), nearest_first_LD, atol=1e-6)

    def attention(*arrays, **options):
        return attention_package.all_attention(*arrays, **{**options, "implementation": implementation})

    @jax.jit
    def run(*inputs):
        def loss(params, w_BTD, mems_BSD, *position):
            layer = bound(config, params)
            key_BSHK, value_BSHK = layer.project(jnp.concatenate([mems_BSD, w_BTD], axis=1))
            call = layer.attend if alone else layer
            out_BTD, _ = call(w_BTD, key_BSHK, value_BSHK, Relative(*position), attention, draws=None)
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
        golden.error(a, b) for a, b in zip(*map(jax.tree.leaves, (ours, tuple(theirs))), strict=True) if b.size
    ]


@pytest.mark.parametrize("implementation", attention_package.IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str, implementation: str) -> None:
    out, *gradients = follow_layer(name, "golden", np.float32, implementation)
    print(name, implementation, out, max(gradients))
    assert out <= OUTPUT and max(gradients) <= GRADIENT


@pytest.mark.parametrize("name", LAYERS)
def test_layer_float64(name: str) -> None:
    with jax.enable_x64(True):
        errors = follow_layer(name, "golden64", np.float64, "xla")
        print(name, errors[0], max(errors))
        assert max(errors) <= 1e-9


def follow_model(name: str, folder: str, dtype: str) -> tuple[float, float]:
    """Largest errors of values (NLL, log-probabilities, memories) and of gradients over the four blocks."""
    g = golden.load(f"txl_lm_{name}", folder)
    config = golden.xl_config(g, dtype=dtype)
    model, params, M = Model(config), golden.xl_params(g, config, "p.", dtype), int(g["block"])
    tokens_BT, errors = g["tokens"].T, []
    B, S = len(tokens_BT), config.limit

    @jax.jit
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
            errors.append(golden.error(cache_XBSD[layer], g[f"mems_{when}_last.{layer}"].transpose(1, 0, 2)))

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
    print(name, values, gradients)
    assert values <= OUTPUT and gradients <= GRADIENT


@pytest.mark.parametrize("name", MODELS)
def test_model_float64(name: str) -> None:
    with jax.enable_x64(True):
        values = follow_model(name, "golden64", "float64")
        print(name, values)
        assert max(values) <= 1e-9
