"""The paper's layer: attention over context and persistent vectors, and the ways to integrate them.

Sukhbaatar et al. 2019 (arXiv 1907.01470) replace the feed-forward sublayer by N persistent
key-value pairs per head, which every query attends to beside its context. Their ablation asks how
the two are best integrated. With C the context and P the persistent pairs of a head:

    joint         softmax over C and P together             the paper's layer, equations 5 to 11
    split         softmax over C + softmax over P           in every head
    head_split    one or the other                          half of the heads each
    single_head   softmax over C + softmax over P           the latter in one head of width D

To add an integration: a function beside the four with the same arguments, an entry in
`INTEGRATE`, its name in `INTEGRATIONS` here and in config_checks.py (and in
`TWO_SOFTMAX_INTEGRATIONS`, if it has two), an entry in `KINDS` of tests/support/tiny_model.py, its
definition in tests/model/test_layers.py, and a file under configs/ablations/.

Dimension key: B batch, T position in the block, S context key, L distance, N persistent pair, H
head, K head width, D model width, E all heads side by side.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from allattn.model.attention_layer import Operation
from allattn.model.config import ModelConfig
from allattn.model.norm import rms_norm
from allattn.model.span_attention import SpanAttention
from allattn.model.sublayers import DropoutSeeds

Array = jax.Array


class Pairs(NamedTuple):
    """Persistent pairs of a layer in the dtype of the activations, as they are stored."""

    key_HNK: Array
    value_HNK: Array
    # Offsets of the logits, float32; None: the pairs have none.
    bias_HN: Array | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of the operation that concern the pairs.

        They are stored so that the logit is q.key and the value sqrt(N) val. The operation divides
        every logit by sqrt(K) and takes values as they are, so both factors are applied here.
        """
        _, N, K = self.key_HNK.shape
        return {
            "persistent_key_HNK": self.key_HNK * math.sqrt(K),
            "persistent_value_HNK": self.value_HNK * math.sqrt(N),
            "persistent_bias_HN": self.bias_HN,
        }


# --- integrations


def joint(
    operation: Operation,
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    context: dict[str, Any],
    pairs: Pairs | None,
) -> tuple[Array, Array]:
    """One softmax over the context and the persistent pairs (arXiv 1907.01470, equations 5 to 9).

    Args:
      operation: `all_attention` with the arguments that every call has.
      query_BTHK: queries of all heads.
      key_BSHK: keys of the heads that attend to the context.
      value_BSHK: values of the same.
      context: arguments of the operation that concern the context.
      pairs: persistent pairs; None: there are none, and the context is all that is attended.

    Returns:
      out_BTHK of all heads, and as mass_BH the mean share of the weight on persistent pairs.
    """
    # Without pairs this is attention alone: `model.persistent` 0.
    options = dict(context)
    if pairs is not None:
        options |= pairs.options()
    out_BTHK, mass_BTH = operation(
        query_BTHK, key_BSHK, value_BSHK, **options, return_persistent_mass=True
    )
    return out_BTHK, mass_BTH.mean(1)


def split(
    operation: Operation,
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    context: dict[str, Any],
    pairs: Pairs,
) -> tuple[Array, Array]:
    """The sum of a softmax over the context and one over the persistent pairs, in every head.

    Arguments and results are those of `joint`.
    """
    # Both softmaxes see the same queries.
    options = pairs.options()
    context_BTHK = operation(query_BTHK, key_BSHK, value_BSHK, **context)
    persistent_out_BTHK = _persistent_softmax(operation, query_BTHK, key_BSHK, context, options)
    mass_BH = _half(query_BTHK)
    return context_BTHK + persistent_out_BTHK, mass_BH


def head_split(
    operation: Operation,
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    context: dict[str, Any],
    pairs: Pairs,
) -> tuple[Array, Array]:
    """The first half of the heads sees only the context, the other only the persistent pairs.

    The latter have no projections of keys and values, and no spans. Arguments and results are
    those of `joint`.
    """
    C = query_BTHK.shape[2] // 2
    options = pairs.options()

    # Heads of the context.
    context_query_BTHK = query_BTHK[:, :, :C]
    context_BTHK = operation(context_query_BTHK, key_BSHK, value_BSHK, **context)

    # Heads of the persistent pairs.
    persistent_query_BTHK = query_BTHK[:, :, C:]
    persistent_out_BTHK = _persistent_softmax(
        operation, persistent_query_BTHK, key_BSHK, context, options
    )

    # The output projection sees them side by side.
    out_BTHK = jnp.concatenate([context_BTHK, persistent_out_BTHK], axis=2)
    return out_BTHK, _half(query_BTHK)


def single_head(
    operation: Operation,
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    context: dict[str, Any],
    pairs: Pairs,
) -> tuple[Array, Array]:
    """As `split`, but the persistent pairs have one head as wide as the model.

    Arguments and results are those of `joint`.
    """
    B, T, H, K = query_BTHK.shape
    # The pairs are stored by heads, as in `split`, and joined for the one head that has them.
    key_1NE = _side_by_side(pairs.key_HNK)
    value_1NE = _side_by_side(pairs.value_HNK)
    options = Pairs(key_1NE, value_1NE, pairs.bias_HN).options()
    context_BTHK = operation(query_BTHK, key_BSHK, value_BSHK, **context)

    # The queries of all heads side by side are the one head's query.
    persistent_query_BTHK = query_BTHK.reshape(B, T, 1, H * K)
    persistent_out_BTHK = _persistent_softmax(
        operation, persistent_query_BTHK, key_BSHK, context, options
    )
    mass_BH = _half(query_BTHK)
    return context_BTHK + persistent_out_BTHK.reshape(B, T, H, K), mass_BH


def _persistent_softmax(
    operation: Operation,
    persistent_query_BTHK: Array,
    key_BSHK: Array,
    context: dict[str, Any],
    options: dict[str, Array],
) -> Array:
    """A softmax over the persistent pairs alone, as persistent_out_BTHK."""
    B, _, H, K = persistent_query_BTHK.shape
    # No keys, cut from those at hand: from constants alone, XLA cannot compile a shard_map inside
    # a scan.
    no_key_BSHK = key_BSHK[:, :0].reshape(B, 0, H, K)
    no_position_HLK = context["position_HLK"][:, :0].reshape(1, 0, K)
    return operation(
        persistent_query_BTHK, no_key_BSHK, no_key_BSHK, position_HLK=no_position_HLK, **options
    )


def _side_by_side(x_HNK: Array) -> Array:
    """Pairs of all heads as those of one head of width H K."""
    H, N, K = x_HNK.shape
    return x_HNK.transpose(1, 0, 2).reshape(1, N, H * K)


def _half(query_BTHK: Array) -> Array:
    """mass_BH of two softmaxes, which weigh the same, whatever is learned."""
    B, _, H, _ = query_BTHK.shape
    return jnp.full((B, H), 0.5)


def initial_bias(config: ModelConfig) -> float:
    """The offset with which pairs have `persistent_share` of the weight where logits are alike.

    docs/method.md, "Offsets of the pairs".
    """
    share = config.persistent_share
    if share == 0:
        return 0.0
    # As many distances as count, each by its m(d).
    count: float = config.limit
    if config.adaptive:
        distance_L = np.arange(1, config.limit + 1)
        span = config.init * config.limit
        count = float(np.clip((config.ramp + 1 - distance_L + span) / config.ramp, 0, 1).sum())
    return math.log(share / (1 - share) * count / config.persistent)


# --- the layer


# model.integration, and what computes it.
INTEGRATE: dict[str, Callable[..., tuple[Array, Array]]] = {
    "joint": joint,
    "split": split,
    "head_split": head_split,
    "single_head": single_head,
}


class AllAttention(SpanAttention):
    """h = LayerNorm(h + attention(h)), which is the whole layer (arXiv 1907.01470, equation 11)."""

    INTEGRATIONS = tuple(INTEGRATE)

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        H = config.heads
        K = config.head_width
        N = config.persistent
        if N == 0:
            return
        # Heads with persistent pairs: all, but in head_split those without a context.
        heads = H
        if config.integration == "head_split":
            heads = H - config.context_heads
        # Pairs of one head as wide as the model have one offset each.
        softmaxes = heads
        if config.integration == "single_head":
            softmaxes = 1
        if config.persistent_bias:
            bias_HN = jnp.full((softmaxes, N), initial_bias(config), jnp.float32)
            self.persistent_bias = nnx.Param(bias_HN)
        # The deviation of keys is 1 / sqrt(width of the head that has them). The order is that of
        # the draws: a run is repeated from its seed.
        key_HNK = jax.random.normal(rngs.params(), (heads, N, K)) / math.sqrt(config.pair_width)
        value_HNK = jax.random.normal(rngs.params(), (heads, N, K)) / math.sqrt(N)
        self.persistent_key = nnx.Param(key_HNK)
        self.persistent_value = nnx.Param(value_HNK)
        if config.qk_norm:
            self.persistent_key_gain = nnx.Param(jnp.ones(heads))

    def attend(
        self,
        h_BTD: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        position: Any,
        attention: Operation,
        dropout_seeds: DropoutSeeds | None = None,
        **starts: Any,
    ) -> tuple[Array, Array]:
        """Attention, residual and norm: as in `AttentionLayer`, with position_LK as position."""
        config = self.config
        query_BTHK = self.queries(h_BTD)

        # What every call of the operation has in common.
        weights = {}
        if dropout_seeds is not None:
            weights = dropout_seeds.weights(config.dropout)
        operation = functools.partial(attention, implementation=config.implementation, **weights)

        # The context and the persistent pairs, and the one or two softmaxes over them.
        context = self.context_options(position, starts)
        pairs = self._pairs(h_BTD.dtype)
        integrate = INTEGRATE[config.integration]
        out_BTHK, mass_BH = integrate(operation, query_BTHK, key_BSHK, value_BSHK, context, pairs)
        return self.leave(h_BTD, self.merge(out_BTHK, h_BTD)), mass_BH

    def _pairs(self, dtype: Any) -> Pairs | None:
        if self.config.persistent == 0:
            return None
        key_HNK = self.persistent_key[...]
        if self.config.qk_norm:
            # As long as a context key, less the factor by which `Pairs` makes its keys longer.
            gain_H = self.persistent_key_gain[...] / math.sqrt(self.config.pair_width)
            key_HNK = rms_norm(key_HNK) * gain_H[:, None, None]

        # Parameters are in float32; products are in the dtype of the activations.
        value_HNK = self.persistent_value[...]
        bias_HN = None
        if self.config.persistent_bias:
            bias_HN = self.persistent_bias[...]
        return Pairs(key_HNK.astype(dtype), value_HNK.astype(dtype), bias_HN)
