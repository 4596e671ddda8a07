"""Attention with learned position keys and adaptive spans: what two kinds of layers have in common.

Dimension key: B batch, T position in the block, S context key, L distance, H head, K head width,
D model width.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.attention.span import TRIM_STEP, reach
from allattn.model.adaptive_softmax import AdaptiveIO
from allattn.model.attention_layer import AttentionLayer
from allattn.model.config import ModelConfig
from allattn.model.reach_projection import lengths
from allattn.model.sublayers import DropoutSeeds
from allattn.model.token_io import TokenIO

Array = jax.Array


class Positions(nnx.Module):
    """One learned table of position keys for all layers and heads, nearest first."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.epsilon = config.epsilon
        self.table = nnx.Param(jax.random.normal(rngs.params(), (config.limit, config.head_width)))

    def keys(
        self, cached: int, block: int, dtype: Any, dropout_seeds: DropoutSeeds | None
    ) -> Array:
        """Position keys of a block behind `cached` states, as position_LK in dtype.

        The first query of the block sees no more distances than there are cached states. Those
        within the block are not more, and nothing is dropped here.
        """
        # At run time the context may be shorter than the limit, and the table is cut to it.
        del block, dropout_seeds
        limit = self.table.shape[0]
        length = min(limit, cached)
        # How many distances the papers' normaliser keeps shows in the last digits of the limit.
        if self.epsilon:
            length = max(0, length - (length - limit) % TRIM_STEP)
        return self.table[:length].astype(dtype)


class SpanAttention(AttentionLayer):
    """Attention whose heads learn how far they look (Sukhbaatar et al. 2019, arXiv 1905.07799)."""

    # Zero states stand for what was before the text.
    ATTENDS_ZEROS = True

    @staticmethod
    def make_io(config: ModelConfig, rngs: nnx.Rngs) -> TokenIO | AdaptiveIO:
        """Embedding and output softmax, adaptive ones where there are cutoffs."""
        # A small vocabulary, such as bytes, needs no clusters.
        if not config.cutoffs:
            return TokenIO(config.vocab_size, config.width, rngs)
        return AdaptiveIO(
            config.vocab_size,
            config.width,
            rngs,
            cutoffs=config.cutoffs,
            division=config.division,
            tied=config.tied,
        )

    @staticmethod
    def shared(config: ModelConfig, rngs: nnx.Rngs) -> Positions:
        """The table of position keys."""
        return Positions(config, rngs)

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        # z of the paper: the span as a fraction of the limit, one for each head with a context.
        if config.adaptive:
            self.span = nnx.Param(jnp.full((config.context_heads,), config.init, jnp.float32))

    def span_tokens(self) -> Array:
        """Learned spans z L in tokens, as (H,)."""
        return self.span[...] * self.config.limit

    def choose_length(self, S: int, T: int) -> Array | None:
        """Index in `lengths(S, T)` of the smallest length that holds a layer's reach."""
        # Fixed spans reach as far as the cache.
        if not self.config.adaptive:
            return None
        # A layer projects as far back as its farthest head looks. This also runs on stacked layers,
        # whose spans have a leading dimension.
        longest = jnp.max(self.span_tokens(), axis=-1)
        needed = reach(longest, self.config.ramp, 1, S)
        # The papers' normaliser also sees what their code keeps beyond.
        if self.config.epsilon:
            needed = jnp.minimum(needed + TRIM_STEP - 1, S)
        return jnp.searchsorted(jnp.array(lengths(S, T)), needed)

    def context_options(self, position_LK: Array, starts: dict[str, Any]) -> dict[str, Any]:
        """Arguments of the operation that concern the context: positions, spans, sinks and starts.

        Args:
          position_LK: position keys of the distances in the context, nearest first.
          starts: query_start and key_start of the operation.
        """
        # The table may be cut to the context, and spans must not exceed it.
        span_H = None
        if self.config.adaptive:
            span_H = _at_most(self.span_tokens(), position_LK.shape[0])
        return {
            "position_HLK": position_LK[None],
            "span_H": span_H,
            "ramp": self.config.ramp,
            "span_epsilon": self.config.epsilon,
            **self.sinks(position_LK.dtype),
            **starts,
        }


def _at_most(span_H: Array, L: int) -> Array:
    """Spans within the context length, with the gradient of the spans as they are."""
    return span_H + jax.lax.stop_gradient(jnp.minimum(span_H, L) - span_H)
