"""What the network needs of a layer of any kind: an interface, and the projections of all kinds.

    AttentionLayer                 projections of queries, keys, values and output
    |- SpanAttention               learned position keys and adaptive spans
    |  |- AllAttention             persistent pairs, integrated in one of four ways
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
from allattn.model.reach_projection import (
    Kernels,
    last_states,
    lengths,
    project,
    project_both,
    project_one_of,
)
from allattn.model.sublayers import DropoutSeeds, Sublayer, uniform
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
    def initialise(params: dict[str, Any], key: Array) -> dict[str, Any]:
        """Initial parameters of the whole network from those that the modules drew: the same."""
        del key
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
        self.output = uniform(rngs, D, H, K, D)

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
        """The whole layer, which is `attend` and what follows it: here nothing."""
        return self.attend(
            h_BTD, key_BSHK, value_BSHK, position, attention, dropout_seeds, **starts
        )

    # --- keys and values

    def project(self, states_BSD: Array) -> tuple[Array, Array]:
        """Keys and values of hidden states, as key_BSHK and value_BSHK."""
        return project_both(self._kernels(), self.enter(states_BSD))

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
          key_BSHK and value_BSHK, zeros where no head looks (reach_projection.py).
        """
        S = cache_XBSD.shape[2]
        T = h_BTD.shape[1]
        kernels = self._kernels()
        # The norm before the projections has parameters, which get a gradient from the cached
        # states as well.
        if self.config.pre_norm:
            cache_BSD = jax.lax.stop_gradient(last_states(cache_XBSD, x, S))
            return project_both(kernels, self.enter(jnp.concatenate([cache_BSD, h_BTD], axis=1)))
        # Without learned spans there is nothing to choose.
        if choice is None:
            return project_one_of((S,), 0, x, kernels, cache_XBSD, h_BTD)
        return project_one_of(lengths(S, T), choice, x, kernels, cache_XBSD, h_BTD)

    def _kernels(self) -> Kernels:
        return Kernels(self.key[...], self.value[...])

    # --- queries and output

    def queries(self, h_BTD: Array) -> Array:
        """Queries of all heads, as query_BTHK."""
        return project(self.query[...], self.enter(h_BTD))

    def merge(self, out_BTHK: Array) -> Array:
        """The output projection of all heads, as out_BTD."""
        # One product over heads side by side, as in `project`.
        B, T, H, K = out_BTHK.shape
        kernel_ED = self.output[...].astype(out_BTHK.dtype).reshape(H * K, self.config.width)
        return out_BTHK.reshape(B, T, H * K) @ kernel_ED
