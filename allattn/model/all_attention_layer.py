"""The paper's layer: attention over context and persistent vectors, and the ways to integrate them.

Sukhbaatar et al. 2019 (arXiv 1907.01470) replace the feed-forward sublayer by N persistent
key-value pairs per head, which every query attends to beside its context. Their ablation asks how
the two are best integrated. With C the context and P the persistent pairs of a head:

    joint         softmax over C and P together             the paper's layer, equations 5 to 11
    split         softmax over C + softmax over P           in every head
    head_split    one or the other                          half of the heads each
    single_head   softmax over C + softmax over P           the latter in one head of width D

Two more have the pairs in a sublayer of their own, with a norm and a residual, between attention
and what follows:

    sublayer      softmax over C, then softmax over P       without projections
    pattention    softmax over C, then GeLU over P          TokenFormer's, in one head of width D

To add an integration: a function beside `joint` with the same arguments, an entry in
`INTEGRATE`, its name in `INTEGRATIONS` here and in config_checks.py (and in `APART`, unless it has
one softmax over both), an entry in `KINDS` of tests/support/tiny_model.py, its definition in
tests/model/test_layers.py, and a file under configs/ablations/.

Dimension key: B batch, T position in the block, S context key, L distance, N persistent pair, H
head, K head width, D model width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from allattn.model.attention_layer import Operation
from allattn.model.config import ModelConfig
from allattn.model.norm import normalise_heads, rms_norm
from allattn.model.pairs import Pairs, attend_alone, join, pattention
from allattn.model.span_attention import SpanAttention
from allattn.model.sublayers import DropoutSeeds, FeedForward, Sublayer

Array = jax.Array


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
    # Without pairs this is attention alone: `model.persistent` 0. Sinks are pairs, too.
    options = dict(context)
    if pairs is not None and "persistent_bias_HN" in context:
        options |= join(pairs.options(), context)
    elif pairs is not None:
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
    """The sum of a softmax over the context and one over the persistent pairs.

    Both are in every head, or wide pairs (`single_head`) are in one head as wide as the model.
    Arguments and results are those of `joint`.
    """
    # Both softmaxes see the same queries.
    context_BTHK = operation(query_BTHK, key_BSHK, value_BSHK, **context)
    persistent_out_BTHK = attend_alone(operation, query_BTHK, key_BSHK, context, pairs)
    return context_BTHK + persistent_out_BTHK, _half(query_BTHK)


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

    # Heads of the context.
    context_query_BTHK = query_BTHK[:, :, :C]
    context_BTHK = operation(context_query_BTHK, key_BSHK, value_BSHK, **context)

    # Heads of the persistent pairs.
    persistent_query_BTHK = query_BTHK[:, :, C:]
    persistent_out_BTHK = attend_alone(operation, persistent_query_BTHK, key_BSHK, context, pairs)

    # The output projection sees them side by side.
    out_BTHK = jnp.concatenate([context_BTHK, persistent_out_BTHK], axis=2)
    return out_BTHK, _half(query_BTHK)


def apart(
    operation: Operation,
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    context: dict[str, Any],
    pairs: Pairs,
) -> tuple[Array, Array]:
    """The context alone: the persistent pairs are in the sublayer that follows.

    Arguments and results are those of `joint`.
    """
    del pairs
    return operation(query_BTHK, key_BSHK, value_BSHK, **context), _half(query_BTHK)


def _half(query_BTHK: Array) -> Array:
    """mass_BH of context and pairs apart, which weigh the same, whatever is learned."""
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
    "single_head": split,
    "sublayer": apart,
    "pattention": apart,
}
# Those whose pairs have a sublayer of their own.
SUBLAYERS = ("sublayer", "pattention")


class AllAttention(SpanAttention):
    """h = LayerNorm(h + attention(h)), which is the whole layer (arXiv 1907.01470, equation 11).

    It may have more: pairs in a sublayer of their own, and a feed-forward sublayer beside pairs.
    """

    INTEGRATIONS = tuple(INTEGRATE)

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        if config.persistent:
            self._make_pairs(config, rngs)
        # Both after the pairs: the order is that of the draws.
        if config.integration in SUBLAYERS:
            self.persistent_sublayer = Sublayer(config)
        if config.feed_forward:
            self.feed_forward = FeedForward(config, rngs, output_dropout=0.0)

    def _make_pairs(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        """Draw the pairs, and begin what belongs to them."""
        N = config.persistent
        # The papers' deviation of keys is 1 / sqrt(width of the head that has them); TokenFormer's
        # are 0.02, and 2 / (depth sqrt(D)) of values.
        key_divisor = math.sqrt(config.pair_width)
        value_divisor = math.sqrt(N)
        if config.integration == "pattention":
            key_divisor = 1 / 0.02
            value_divisor = config.depth * math.sqrt(config.width) / 2
        # The order is that of the draws: a run is repeated from its seed.
        shape = (config.stored_heads, N, config.head_width)
        self.persistent_key = nnx.Param(jax.random.normal(rngs.params(), shape) / key_divisor)
        self.persistent_value = nnx.Param(jax.random.normal(rngs.params(), shape) / value_divisor)

        # What is not drawn. Pairs of one head as wide as the model have one offset and one gain.
        if config.persistent_bias:
            bias_HN = jnp.full((config.pair_heads, N), initial_bias(config), jnp.float32)
            self.persistent_bias = nnx.Param(bias_HN)
        if config.persistent_gain:
            self.persistent_gain = nnx.Param(jnp.ones(config.pair_heads))
        # Pattention normalises its logits.
        if config.qk_norm and config.integration != "pattention":
            self.persistent_key_gain = nnx.Param(jnp.ones(config.stored_heads))
        if config.qk_norm and config.integration == "sublayer":
            self.persistent_query_gain = nnx.Param(jnp.ones(config.heads))

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
        """Attention, residual and norm: as in `AttentionLayer`, with position_LK as position.

        A sublayer of the pairs is part of it.
        """
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
        h_BTD = self.leave(h_BTD, self.merge(out_BTHK, h_BTD))

        # The sublayer that has only pairs.
        if pairs is None or config.integration not in SUBLAYERS:
            return h_BTD, mass_BH
        x_BTD = self.persistent_sublayer.enter(h_BTD)
        if config.integration == "pattention":
            out_BTD = pattention(x_BTD, pairs, dropout_seeds, config.dropout)
        else:
            out_BTD = self._attend_pairs(x_BTD, key_BSHK, operation, context, pairs)
        return self.persistent_sublayer.leave(h_BTD, out_BTD), mass_BH

    def _attend_pairs(
        self,
        x_BTD: Array,
        key_BSHK: Array,
        operation: Operation,
        context: dict[str, Any],
        pairs: Pairs,
    ) -> Array:
        """Attention to the pairs alone without projections, as out_BTD.

        Args:
          x_BTD: what the sublayer reads; cut into heads it is their queries.
          key_BSHK, operation, context, pairs: those of `attend_alone`.
        """
        query_BTHK = x_BTD.reshape(*x_BTD.shape[:2], self.config.heads, self.config.head_width)
        if self.config.qk_norm:
            query_BTHK = normalise_heads(query_BTHK, self.persistent_query_gain[...])

        # What the heads read is the output, side by side.
        out_BTHK = attend_alone(operation, query_BTHK, key_BSHK, context, pairs)
        return out_BTHK.reshape(x_BTD.shape)

    def _pairs(self, dtype: Any) -> Pairs | None:
        config = self.config
        if config.persistent == 0:
            return None
        key_HNK = self.persistent_key[...]
        if config.qk_norm and config.integration != "pattention":
            # As long as a context key, less the factor by which `Pairs` makes its keys longer.
            gain_H = self.persistent_key_gain[...] / math.sqrt(config.pair_width)
            key_HNK = rms_norm(key_HNK) * gain_H[:, None, None]

        # A gain on what is read is one on the values, unless a norm comes between.
        value_HNK = self.persistent_value[...]
        norm_H = None
        if config.persistent_gain == "gain":
            value_HNK = value_HNK * self.persistent_gain[...][:, None, None]
        if config.persistent_gain == "norm":
            norm_H = self.persistent_gain[...]
        bias_HN = None
        if config.persistent_bias:
            bias_HN = self.persistent_bias[...]

        # Parameters are in float32; products are in the dtype of the activations.
        return Pairs(
            key_HNK.astype(dtype), value_HNK.astype(dtype), config.wide_pairs, bias_HN, norm_H
        )
