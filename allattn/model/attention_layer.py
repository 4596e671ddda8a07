"""What the network needs of a layer of any kind: an interface, and the projections of all kinds.

    AttentionLayer                 projections of queries, keys, values and output
    |- SpanAttention               learned position keys and adaptive spans
    |  |- AllAttention             persistent pairs, integrated in one of six ways
    |  `- SpanTransformer          a feed-forward sublayer
    `- TransformerXL               sinusoids, relative positions, a feed-forward sublayer

To add a kind of layer:
1. A class in a file of its own, with every abstract member of `AttentionLayer`.
2. A name for it in `LAYERS` (network.py), and its integrations where the configuration is checked.
3. Rows for new parameters in the table of shardings (sharding/rules.py), a row in the table of
   initial values (`Model.init`), and its products in flops.py.
4. tests/support/tiny_model.py: an entry in `KINDS`, over which the tests of the network run.

Dimension key: X layer, B batch, T position in the block, S cached position (in keys and values:
cached and block), H head, K head width, D model width.
"""

import abc
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.model.adaptive_softmax import AdaptiveIO
from allattn.model.config import ModelConfig
from allattn.model.norm import normalise_heads
from allattn.model.reach_projection import (
    InputNorm,
    Kernels,
    lengths,
    project,
    project_both,
    project_one_of,
)
from allattn.model.sublayers import DropoutSeeds, FeedForward, Sublayer, scaled, uniform
from allattn.model.token_io import TokenIO

Array = jax.Array

# The operation `all_attention`, or the operation over a mesh.
Operation = Callable[..., Any]


class SharedPositions(Protocol):
    """What tells distances apart, one module for all layers."""

    def keys(self, cached: int, block: int, dtype: Any, dropout_seeds: DropoutSeeds | None) -> Any:
        """Positions of a block of `block` tokens behind `cached` states: what every layer gets."""


class AttentionLayer(Sublayer, abc.ABC):
    """A layer as the network sees it, with the parameters of one layer: the network stacks them."""

    # Values of model.integration that this kind has.
    INTEGRATIONS: tuple[str, ...]
    # Whether zero states stand for what was before the text, or nothing does.
    ATTENDS_ZEROS: bool
    # Whether a stack of pre_norm layers ends with a norm; the paper's Transformer-XL has none.
    FINAL_NORM = True
    # Kinds that have one set it.
    feed_forward: FeedForward | None = None

    # --- what the network around the layers needs

    @staticmethod
    @abc.abstractmethod
    def make_io(config: ModelConfig, rngs: nnx.Rngs) -> TokenIO | AdaptiveIO:
        """Embedding and output softmax."""

    @staticmethod
    @abc.abstractmethod
    def shared(config: ModelConfig, rngs: nnx.Rngs) -> SharedPositions:
        """What all layers share: the positions."""

    @staticmethod
    def initialise(config: ModelConfig, params: dict[str, Any], key: Array) -> dict[str, Any]:
        """Initial parameters of the whole network from those that the modules drew: the same."""
        del config, key
        return params

    # --- the layer

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config)
        D = config.width
        H = config.heads
        C = config.context_heads
        K = config.head_width
        # Every head has a query and a part of the output; C heads have keys and values as well.
        # The order is that of the draws: a run is repeated from its seed.
        self.query = uniform(rngs, D, D, H, K)
        self.key = uniform(rngs, D, D, C, K)
        self.value = uniform(rngs, D, D, C, K)
        self.output = scaled(uniform(rngs, D, H, K, D), config.output_scale)

        # What is not drawn: factors of 1, and of 0 for what is to be learned.
        if config.residual_scalars:
            self.embedding_scale = nnx.Param(jnp.zeros(()))
        if config.qk_norm:
            self.query_gain = nnx.Param(jnp.ones(H))
            self.key_gain = nnx.Param(jnp.ones(C))
        if config.output_gate:
            self.gate = nnx.Param(jnp.zeros((D, H)))
        if config.sinks:
            self.sink_bias = nnx.Param(jnp.zeros((C, config.sinks)))

    def receive(self, h_BTD: Array, embedded_BTD: Array) -> Array:
        """The layer's input: what the layer before gives and, with residual_scalars, the embedding.

        Args:
          h_BTD: output of the layer before.
          embedded_BTD: the embedding's output.
        """
        if not self.config.residual_scalars:
            return h_BTD
        return h_BTD + self.embedding_scale[...].astype(h_BTD.dtype) * embedded_BTD

    @abc.abstractmethod
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
        """Attention, residual and norm.

        Args:
          h_BTD: the layer's input.
          key_BSHK: keys of the context, the block included; from `project` or `project_reach`.
          value_BSHK: values of the same.
          position: from `keys` of the shared module.
          attention: the operation, or the operation over a mesh.
          dropout_seeds: of this layer; None: no dropout.
          **starts: query_start and key_start of the operation.

        Returns:
          The output h_BTD, and as mass_BH the mean share of the attention weight that lies on
          persistent pairs.
        """

    def __call__(
        self,
        h_BTD: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        position: Any,
        attention: Operation,
        dropout_seeds: DropoutSeeds | None = None,
        **starts: Any,
    ) -> tuple[Array, Array]:
        """The whole layer: `attend`, then the feed-forward sublayer where there is one."""
        h_BTD, mass_BH = self.attend(
            h_BTD, key_BSHK, value_BSHK, position, attention, dropout_seeds, **starts
        )
        # All sublayers share the layer's seed.
        if self.feed_forward is not None:
            h_BTD = self.feed_forward(h_BTD, dropout_seeds)
        return h_BTD, mass_BH

    # --- keys and values

    def project(self, states_BSD: Array) -> tuple[Array, Array]:
        """Keys and values of hidden states, as key_BSHK and value_BSHK."""
        key_BSHK, value_BSHK = project_both(self._kernels(), states_BSD)
        return self._normalised_keys(key_BSHK), value_BSHK

    def choose_length(self, S: int, T: int) -> Array | None:
        """How much of the cache a layer needs.

        On stacked layers it returns one index per layer, with one reduction over heads instead of
        one per layer: on a mesh each would be a collective.

        Args:
          S: states in the cache.
          T: tokens of the block.

        Returns:
          Index in `lengths(S, T)`, int32; None: all of the cache.
        """
        del S, T
        return None

    def project_reach(
        self, cache_XBSD: Array, x: Array | int, h_BTD: Array, choice: Array | None
    ) -> tuple[Array, Array]:
        """Keys and values of one layer's cache and block, as far back as any of its heads looks.

        Args:
          cache_XBSD: earlier inputs of all layers; the gradient does not enter them.
          x: the layer, int32, may be traced.
          h_BTD: the layer's inputs in this block.
          choice: the layer's index from `choose_length`.

        Returns:
          key_BSHK and value_BSHK; where no head looks they may be anything (reach_projection.py).
        """
        S = cache_XBSD.shape[2]
        T = h_BTD.shape[1]
        # Without learned spans there is nothing to choose.
        sizes: tuple[int, ...] = (S,)
        chosen: Array | int = 0
        if choice is not None:
            sizes = lengths(S, T)
            chosen = choice
        # The definition reads all keys, as a norm of keys does.
        filled = self.config.implementation == "reference" or self.config.qk_norm
        states = (x, self._kernels(), cache_XBSD, h_BTD)
        key_BSHK, value_BSHK = project_one_of(sizes, filled, chosen, *states)
        return self._normalised_keys(key_BSHK), value_BSHK

    def _kernels(self) -> Kernels:
        norm = None
        if self.config.pre_norm:
            norm = InputNorm(self.norm_scale[...], self.norm_bias[...])
        return Kernels(self.key[...], self.value[...], norm)

    def _normalised_keys(self, key_BSHK: Array) -> Array:
        # Inference caches what this returns, so that a key is normalised once.
        if not self.config.qk_norm:
            return key_BSHK
        return normalise_heads(key_BSHK, self.key_gain[...])

    # --- sinks

    def sinks(self, dtype: Any) -> dict[str, Any]:
        """Arguments of the operation for pairs that only take weight: key and value 0, an offset.

        Args:
          dtype: of the activations.
        """
        if not self.config.sinks:
            return {}
        bias_HN = self.sink_bias[...]
        zeros_HNK = jnp.zeros((*bias_HN.shape, self.config.head_width), dtype)
        return {
            "persistent_key_HNK": zeros_HNK,
            "persistent_value_HNK": zeros_HNK,
            "persistent_bias_HN": bias_HN,
        }

    # --- queries and output

    def queries(self, h_BTD: Array) -> Array:
        """Queries of all heads, for keys and positions alike, as query_BTHK."""
        query_BTHK = project(self.query[...], self.enter(h_BTD))
        if not self.config.qk_norm:
            return query_BTHK
        return normalise_heads(query_BTHK, self.query_gain[...])

    def merge(self, out_BTHK: Array, h_BTD: Array) -> Array:
        """The output projection of all heads, whose gates depend on the layer's input, as out_BTD.

        Args:
          out_BTHK: output of the operation.
          h_BTD: the layer's input.
        """
        # Between 0 and 2, and 1 at first.
        if self.config.output_gate:
            gate_BTH = 2 * jax.nn.sigmoid(self.enter(h_BTD) @ self.gate[...].astype(h_BTD.dtype))
            out_BTHK = out_BTHK * gate_BTH[..., None]
        # One product over heads side by side, as in `project`.
        B, T, H, K = out_BTHK.shape
        kernel_ED = self.output[...].astype(out_BTHK.dtype).reshape(H * K, self.config.width)
        return out_BTHK.reshape(B, T, H * K) @ kernel_ED
