"""A network small enough to compare number by number, with parameters that cost no compilation.

Dimension key: X layer, B batch, T position in the block, S cached position, H head, D model width,
V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allattn.model import Model, ModelConfig, Params

# Every kind of layer, as changes of `geometry`.
_FEEDS: dict[str, Any] = {"persistent": 0, "feed_forward": 24}
_STABLE: dict[str, Any] = {"qk_norm": True, "residual_scalars": True, "output_gate": True}
KINDS: dict[str, dict[str, Any]] = {
    "joint": {},
    **{name: {"integration": name} for name in ("split", "head_split", "single_head")},
    "bias": {"persistent_bias": True},
    "single_head_bias": {"integration": "single_head", "persistent_bias": True},
    "epsilon": {"epsilon": 0.05},
    "no_pairs": {"persistent": 0},
    "sublayer": {"integration": "sublayer", "persistent_gain": "norm", "sinks": 1},
    "wide_sublayer": {
        "integration": "sublayer",
        "persistent_heads": 1,
        "persistent_bias": True,
        "pre_norm": True,
        "qk_norm": True,
    },
    "pattention": {"integration": "pattention", "adaptive": False, "persistent_gain": "gain"},
    "pairs_and_feed_forward": {"feed_forward": 24, "sinks": 2, "persistent_gain": "gain"},
    "transformer": {"layer": "transformer", **_FEEDS},
    "ff_attention": {"layer": "transformer", "integration": "ff_attention", **_FEEDS},
    "transformer_xl": {"layer": "transformer_xl", **_FEEDS, "adaptive": False, "limit": 12},
    "pre_norm": {
        "layer": "transformer_xl",
        **_FEEDS,
        "adaptive": False,
        "limit": 12,
        "pre_norm": True,
    },
    "stable": {"pre_norm": True, **_STABLE},
    "stable_single_head": {"integration": "single_head", "pre_norm": True, "qk_norm": True},
    "stable_transformer": {"layer": "transformer", **_FEEDS, **_STABLE, "sinks": 2},
    "stable_xl": {
        "layer": "transformer_xl",
        **_FEEDS,
        "adaptive": False,
        "limit": 12,
        **_STABLE,
        "sinks": 1,
    },
}

# Parameters of which 1 changes nothing.
NEAR_ONE = ("norm_scale", "residual_scale", "branch_scale", "query_gain", "key_gain")
NEAR_ONE += ("persistent_key_gain", "persistent_query_gain", "persistent_gain")


def geometry(**changes: Any) -> ModelConfig:
    """Two layers of two heads that may look 160 tokens back, of which those of `random_params` use
    52.
    """
    fields: dict[str, Any] = dict(depth=2, width=16, heads=2, persistent=5, vocab_size=96)
    fields |= dict(
        dropout=0.0,
        embedding_dropout=0.0,
        dtype="float32",
        limit=160,
        adaptive=True,
        ramp=4,
        init=0.0,
    )
    return ModelConfig(**{**fields, "implementation": "reference", **changes})


def random_params(model: Model, seed: int = 0) -> Params:
    """Normal numbers everywhere (norms near 1 and 0), position keys flat enough that far tokens
    count, mixed spans.
    """
    rng = np.random.default_rng(seed)
    config = model.config

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        scale = {"embedding": 1.0, "table": 0.3, "norm_scale": 0.1, "norm_bias": 0.1}.get(
            name, config.width**-0.5
        )
        return jnp.asarray(rng.normal(name in NEAR_ONE, scale, leaf.shape), leaf.dtype)

    params = jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))
    if config.adaptive:
        spans_XH = np.resize([0.3, 0.15, 0.025, 0.25], (config.depth, config.context_heads))
        params["layers"]["span"] = jnp.asarray(spans_XH, jnp.float32)
    return params


def naive_forward(
    model: Model, params: Params, rows_RT: np.ndarray, block: int
) -> tuple[np.ndarray, np.ndarray]:
    """Training-mode forward passes over every whole block of every row, from a zero cache of the
    whole limit.

    Args:
      model: the network.
      params: its parameters.
      rows_RT: ids; the last of each row is only a target.
      block: tokens per pass.

    Returns:
      logits_RTV and nll_RT (float64) of the targets 1 to T - 1, up to a whole number of blocks.
    """

    quick = {"xla_backend_optimization_level": 0}  # it takes longer to optimise than to run

    @functools.partial(jax.jit, compiler_options=quick)
    def one_block(params, cache_XBSD, inputs_BT, targets_BT, before):
        network = model.bind(params)
        forward = network.train_forward(inputs_BT, cache_XBSD, before=before)
        cache_XBSD = jnp.concatenate([cache_XBSD, forward.new], axis=2)[:, :, inputs_BT.shape[1] :]
        return (
            cache_XBSD,
            network.io.logits(forward.hidden_BTD),
            network.io.nll(forward.hidden_BTD, targets_BT),
        )

    cache_XBSD = model.empty_cache(len(rows_RT), model.config.limit)
    logits = []
    nll = []
    for begin in range(0, (rows_RT.shape[1] - 1) // block * block, block):
        window_RT = rows_RT[:, begin : begin + block + 1]
        cache_XBSD, logits_RTV, nll_RT = one_block(
            params, cache_XBSD, window_RT[:, :-1], window_RT[:, 1:], begin
        )
        logits.append(np.asarray(logits_RTV))
        nll.append(np.asarray(nll_RT, np.float64))
    return np.concatenate(logits, axis=1), np.concatenate(nll, axis=1)
