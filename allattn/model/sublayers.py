"""What layers of every kind are built from: norm and residual, feed-forward, dropout of features.

Dimension key: B batch, T position in the block, D model width, F inner unit.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.attention import dropout
from allattn.model.config import ModelConfig
from allattn.model.norm import layer_norm

Array = jax.Array


# --- initialisation and dropout


def uniform(rngs: nnx.Rngs, fan_in: int, *shape: int) -> nnx.Param:
    """Weights or biases of a linear map, uniform within 1/sqrt(fan_in).

    Args:
      rngs: source of the draw.
      fan_in: features that the map reads.
      *shape: of the parameter.
    """
    bound = 1 / math.sqrt(fan_in)
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


def scaled(weights: nnx.Param, factor: float) -> nnx.Param:
    """Initial weights times a factor."""
    return nnx.Param(weights[...] * factor)


class DropoutSeeds(NamedTuple):
    """What one layer's dropout is a function of. With None instead, nothing is dropped."""

    seed: Array  # uint32
    row_B: Array  # global index of every row, int32

    def weights(self, rate: float) -> dict[str, Any]:
        """Arguments with which the operation drops attention weights."""
        return {"dropout_rate": rate, "dropout_seed": self.seed, "row_offset": self.row_B[0]}


def drop(dropout_seeds: DropoutSeeds | None, x_BTD: Array, rate: float, site: int = 0) -> Array:
    """Dropout of features.

    Args:
      dropout_seeds: of the layer; None: nothing is dropped.
      x_BTD: states or inner units.
      rate: probability of dropping, in [0, 1).
      site: number that sets this dropout apart from others of the same seed.

    Returns:
      x_BTD in its dtype, the features that stay scaled by 1 / (1 - rate).
    """
    if dropout_seeds is None or rate == 0:
        return x_BTD
    return dropout.features(x_BTD, dropout_seeds.seed, dropout_seeds.row_B, rate, site)


# --- sublayers


class Norm(nnx.Module):
    """Layer normalisation with its parameters."""

    def __init__(self, width: int):
        # The identity until they are trained.
        self.norm_scale = nnx.Param(jnp.ones(width))
        self.norm_bias = nnx.Param(jnp.zeros(width))

    def normalise(self, h_BTD: Array) -> Array:
        """States of which every one has mean 0 and variance 1 before scale and bias."""
        return layer_norm(h_BTD, self.norm_scale[...], self.norm_bias[...])


class Sublayer(Norm):
    """A map f with its norm and residual: LN(a h + b f(h)), or with pre_norm a h + b f(LN(h)).

    Both factors are 1 or, with residual_scalars, learned.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config.width)
        self.config = config
        if config.residual_scalars:
            self.residual_scale = nnx.Param(jnp.ones(()))
            self.branch_scale = nnx.Param(jnp.ones(()))

    def enter(self, h_BTD: Array) -> Array:
        """What f is applied to."""
        # Pre-norm: the residual path stays free of norms.
        if self.config.pre_norm:
            return self.normalise(h_BTD)
        return h_BTD

    def leave(self, h_BTD: Array, out_BTD: Array) -> Array:
        """The sublayer's output from its input and f's output."""
        if self.config.residual_scalars:
            h_BTD = h_BTD * self.residual_scale[...].astype(h_BTD.dtype)
            out_BTD = out_BTD * self.branch_scale[...].astype(h_BTD.dtype)
        if self.config.pre_norm:
            return h_BTD + out_BTD
        return self.normalise(h_BTD + out_BTD)


class FeedForward(Sublayer):
    """f(h) = W2 g(W1 h + b1) + b2, where g is ReLU or, in `ff_attention`, a softmax over the units.

    Dropout acts after g and, at a rate of its own, on f's output.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, output_dropout: float):
        super().__init__(config)
        D = config.width
        F = config.feed_forward
        # The order is that of the draws: a run is repeated from its seed.
        self.inner = uniform(rngs, D, D, F)
        self.inner_bias = uniform(rngs, D, F)
        self.outer = scaled(uniform(rngs, F, F, D), config.output_scale)
        self.outer_bias = uniform(rngs, F, D)
        self.activation = softmax if config.integration == "ff_attention" else jax.nn.relu
        self.output_dropout = output_dropout

    def __call__(self, h_BTD: Array, dropout_seeds: DropoutSeeds | None) -> Array:
        """The sublayer's output h_BTD."""
        # Products are in the dtype of the activations.
        inner_DF = self.inner[...].astype(h_BTD.dtype)
        inner_F = self.inner_bias[...].astype(h_BTD.dtype)
        outer_FD = self.outer[...].astype(h_BTD.dtype)
        outer_D = self.outer_bias[...].astype(h_BTD.dtype)

        # The units, then the way back to features.
        inner_BTF = self.activation(self.enter(h_BTD) @ inner_DF + inner_F)
        inner_BTF = drop(dropout_seeds, inner_BTF, self.config.dropout)
        out_BTD = inner_BTF @ outer_FD + outer_D
        # A site of its own: both dropouts share the layer's seed.
        out_BTD = drop(dropout_seeds, out_BTD, self.output_dropout, site=1)
        return self.leave(h_BTD, out_BTD)


def softmax(x_BTF: Array) -> Array:
    """Softmax over the last axis, statistics at least in float32, result in the input's dtype."""
    wide_BTF = x_BTF.astype(jnp.promote_types(x_BTF.dtype, jnp.float32))
    return jax.nn.softmax(wide_BTF).astype(x_BTF.dtype)
