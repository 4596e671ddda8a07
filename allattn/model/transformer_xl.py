"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860) on the same operation.

Section 3.3 of the paper: the logit of a query and a key is, before the scale,

    (q + u) . k  +  (q + v) . W r(distance)

where r is a fixed sinusoid, W projects it (one for each layer), and u and v are two vectors for
each head that all layers share. The operation computes the second product by its position keys.

Dimension key: B batch, T position in the block, S context key, L distance, H head, K head width, D
model width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.model.adaptive_softmax import XL_DEVIATION, AdaptiveIO
from allattn.model.attention_layer import AttentionLayer, Operation
from allattn.model.config import ModelConfig
from allattn.model.reach_projection import project
from allattn.model.sublayers import DropoutSeeds, FeedForward, drop

Array = jax.Array

# Parameters that begin as constants, and those that model.output_scale makes smaller.
NOT_DRAWN = (
    "residual_scale",
    "branch_scale",
    "embedding_scale",
    "query_gain",
    "key_gain",
    "gate",
)
OUTPUT_PROJECTIONS = ("output", "outer")


# --- positions


class Relative(NamedTuple):
    """What a layer needs to tell distances apart."""

    sinusoid_LD: Array  # row i for distance i
    content_HK: Array  # u of the paper, added to the queries of keys
    distance_HK: Array  # v of the paper, added to the queries of distances


class RelativePositions(nnx.Module):
    """Fixed sinusoids, and the two vectors added to queries, which all layers share."""

    def __init__(self, config: ModelConfig):
        # Drawn by `TransformerXL.initialise`.
        shape = (config.heads, config.head_width)
        self.content = nnx.Param(jnp.zeros(shape))
        self.distance = nnx.Param(jnp.zeros(shape))
        self.config = config

    def keys(
        self, cached: int, block: int, dtype: Any, dropout_seeds: DropoutSeeds | None
    ) -> Relative:
        """Sinusoids of the distances that a block may see, the current token's 0 first.

        A query sees all states before it or, with `same_length`, the last `limit` ones, itself
        included. Distances beyond `clamp` look like `clamp`.

        Args:
          cached: states before the block.
          block: tokens of the block.
          dtype: of the result.
          dropout_seeds: of the encodings' dropout; None: no dropout.
        """
        config = self.config
        # How far a query of the block may look, the current token's distance 0 included.
        length = cached + block
        if config.same_length:
            length = config.limit
        # Distances that were never seen in training can be made to look like the farthest seen.
        farthest = length
        if config.clamp > 0:
            farthest = config.clamp
        distance_L = jnp.minimum(jnp.arange(length), farthest)
        sinusoid_LD = sinusoids(distance_L, config.width).astype(dtype)

        # The rows of the batch share the encodings, so there is one row to drop from.
        if dropout_seeds is not None:
            dropout_seeds = dropout_seeds._replace(row_B=jnp.zeros(1, jnp.int32))
        sinusoid_BLD = sinusoid_LD[None]
        sinusoid_BLD = drop(dropout_seeds, sinusoid_BLD, config.embedding_dropout, site=1)
        return Relative(
            sinusoid_BLD[0], self.content[...].astype(dtype), self.distance[...].astype(dtype)
        )


def sinusoids(distance_L: Array, width: int) -> Array:
    """Sines, then cosines, of distance / 10000^(2i / D), as (L, D)."""
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = distance_L[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


# --- the layer


class TransformerXL(AttentionLayer):
    """Attention to memory, block and current token by relative positions, then feed-forward."""

    INTEGRATIONS = ("joint",)
    # A text begins with an empty memory.
    ATTENDS_ZEROS = False
    FINAL_NORM = False

    @staticmethod
    def make_io(config: ModelConfig, rngs: nnx.Rngs) -> AdaptiveIO:
        """One table, scaled by sqrt(D), for input and output; with cutoffs, one per cluster."""
        # A single cluster needs no projection.
        division = config.division if config.cutoffs else 1
        return AdaptiveIO(
            config.vocab_size,
            config.width,
            rngs,
            cutoffs=config.cutoffs,
            division=division,
            tied=True,
            xl=True,
        )

    @staticmethod
    def shared(config: ModelConfig, rngs: nnx.Rngs) -> RelativePositions:
        """Sinusoids and the two vectors of queries."""
        del rngs
        return RelativePositions(config)

    @staticmethod
    def initialise(config: ModelConfig, params: dict[str, Any], key: Array) -> dict[str, Any]:
        """The paper's code draws every parameter alike, whatever the modules drew.

        Weights are N(0, 0.02), u and v among them; scales of norms N(1, 0.02); biases 0. `io`
        draws its own. What the paper does not have stays as the modules set it.
        """
        leaves, tree = jax.tree_util.tree_flatten_with_path({**params, "io": {}})
        # A key of its own: the modules have drawn from `key`.
        key = jax.random.fold_in(key, 2**31)

        # The number of a parameter in the tree decides its key.
        def draw(number: int, name: str, old: Array) -> Array:
            if name in NOT_DRAWN:
                return old
            if name.endswith("bias"):
                return jnp.zeros_like(old)
            noise = XL_DEVIATION * jax.random.normal(jax.random.fold_in(key, number), old.shape)
            if name in OUTPUT_PROJECTIONS:
                noise = noise * config.output_scale
            return noise + 1 if name == "norm_scale" else noise

        drawn = [draw(i, path[-1].key, old) for i, (path, old) in enumerate(leaves)]
        return {**jax.tree.unflatten(tree, drawn), "io": params["io"]}

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.feed_forward = FeedForward(config, rngs, output_dropout=config.dropout)
        # W of the paper, which projects the sinusoids. `initialise` draws it.
        self.relative = nnx.Param(jnp.zeros((config.width, config.heads, config.head_width)))

    def attend(
        self,
        h_BTD: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        position: Relative,
        attention: Operation,
        dropout_seeds: DropoutSeeds | None = None,
        **starts: Any,
    ) -> tuple[Array, Array]:
        """Attention, residual and norm: as in `AttentionLayer`."""
        config = self.config
        query_BTHK = self.queries(h_BTD)
        position_LHK = project(self.relative[...], position.sinusoid_LD[None])[0]

        # Keys and distances have queries of their own.
        content_query_BTHK = query_BTHK + position.content_HK
        distance_query_BTHK = query_BTHK + position.distance_HK
        position_HLK = position_LHK.transpose(1, 0, 2)
        weights = {}
        if dropout_seeds is not None:
            weights = dropout_seeds.weights(config.attention_dropout)
        out_BTHK, mass_BTH = attention(
            content_query_BTHK,
            key_BSHK,
            value_BSHK,
            position_query_BTHK=distance_query_BTHK,
            position_HLK=position_HLK,
            first_distance=0,
            return_persistent_mass=True,
            implementation=config.implementation,
            **weights,
            **self.sinks(h_BTD.dtype),
            **starts,
        )

        # Sites 0 and 1 are those of the feed-forward sublayer.
        out_BTD = drop(dropout_seeds, self.merge(out_BTHK, h_BTD), config.dropout, site=2)
        return self.leave(h_BTD, out_BTD), mass_BTH.mean(1)
