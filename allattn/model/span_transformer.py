"""The transformer with adaptive span (Sukhbaatar et al. 2019, arXiv 1905.07799).

Dimension key: B batch, T position in the block, S context key, L distance, H head, K head width,
D model width.
"""

from typing import Any

import jax
from flax import nnx

from allattn.model.attention_layer import Operation
from allattn.model.config import ModelConfig
from allattn.model.span_attention import SpanAttention
from allattn.model.sublayers import DropoutSeeds, FeedForward

Array = jax.Array


class SpanTransformer(SpanAttention):
    """Attention without persistent pairs, then a feed-forward sublayer: model.layer transformer."""

    # ff_attention: the feed-forward sublayer as attention to its units, a softmax instead of ReLU.
    INTEGRATIONS = ("joint", "ff_attention")

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        # Dropout acts on attention weights and inner units, not on outputs.
        self.feed_forward = FeedForward(config, rngs, output_dropout=0.0)

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
        query_BTHK = self.queries(h_BTD)

        # In evaluation, and at a rate of 0, nothing is dropped.
        weights = {}
        if dropout_seeds is not None:
            weights = dropout_seeds.weights(self.config.dropout)

        # The operation without pairs but sinks; without those, their share of the weight is 0.
        out_BTHK, mass_BTH = attention(
            query_BTHK,
            key_BSHK,
            value_BSHK,
            **self.context_options(position, starts),
            return_persistent_mass=True,
            implementation=self.config.implementation,
            **weights,
        )
        mass_BH = mass_BTH.mean(1)
        return self.leave(h_BTD, self.merge(out_BTHK, h_BTD)), mass_BH
