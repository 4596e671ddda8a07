"""Transformer-XL (Dai et al. 2019, arXiv 1901.02860) on the same operation.

Dimension key: B batch, T position in the block, S context key, L distance, H head, K head width, D
model width, V vocabulary.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.model.adaptive_softmax import XL_DEVIATION, AdaptiveIO
from allattn.model.all_attention_layer import DropoutSeeds, Transformer, drop, project

if TYPE_CHECKING:
    from allattn.model import ModelConfig

Array = jax.Array


class Relative(NamedTuple):
    """What a layer needs to tell distances apart."""

    sinusoid_LD: Array  # row i for distance i
    content_HK: Array  # u of the paper, added to the queries of keys
    distance_HK: Array  # v of the paper, added to the queries of distances


class RelativePositions(nnx.Module):
    """Fixed sinusoids, and the two vectors added to queries, which all layers share (arXiv 1901.02860, section 3.3)."""

    def __init__(self, config: "ModelConfig"):
        shape = (config.heads, config.head_width)
        self.content, self.distance = nnx.Param(jnp.zeros(shape)), nnx.Param(jnp.zeros(shape))
        self.config = config

    def keys(self, cached: int, block: int, dtype: Any, draws: DropoutSeeds | None) -> Relative:
        """Sinusoids of the distances that a block behind `cached` states may see, the current token's 0 first.

        A query sees all states before it or, with `same_length`, the last `limit` ones, itself
        included; distances beyond `clamp` look like `clamp`.
        """
        config = self.config
        length = config.limit if config.same_length else cached + block
        sinusoid_LD = sinusoids(
            jnp.minimum(jnp.arange(length), config.clamp or length), config.width
        ).astype(dtype)
        if draws:  # no rows here: the block's rows share the encodings
            draws = draws._replace(row_B=jnp.zeros(1, jnp.int32))
        sinusoid_LD = drop(draws, sinusoid_LD[None], config.embedding_dropout, site=1)[0]
        return Relative(
            sinusoid_LD, self.content[...].astype(dtype), self.distance[...].astype(dtype)
        )


def sinusoids(distance_L: Array, width: int) -> Array:
    """Sines, then cosines, of distance / 10000^(2i / D), as (L, D)."""
    frequency = 10_000.0 ** (-jnp.arange(0, width, 2) / width)
    angle = distance_L[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=1)


class TransformerXL(Transformer):
    """Attention to memory, block and current token by relative positions, and a feed-forward sublayer."""

    INTEGRATIONS = ("joint",)
    ATTENDS_ZEROS = False  # a text begins with an empty memory

    @staticmethod
    def make_io(config: "ModelConfig", rngs: nnx.Rngs) -> AdaptiveIO:
        """One table, scaled by sqrt(D), for input and output; where there are cutoffs, one for each cluster."""
        division = config.division if config.cutoffs else 1
        clusters: dict[str, Any] = {"cutoffs": config.cutoffs, "division": division, "tied": True}
        return AdaptiveIO(config.vocab_size, config.width, rngs, **clusters, xl=True)

    @staticmethod
    def shared(config: "ModelConfig", rngs: nnx.Rngs) -> Any:
        """What all layers share."""
        return RelativePositions(config)

    @staticmethod
    def initialise(params: dict[str, Any], key: Array) -> dict[str, Any]:
        """Weights N(0, 0.02), u and v among them; scales of norms N(1, 0.02); biases 0. `io` draws its own."""
        leaves, tree = jax.tree_util.tree_flatten_with_path({**params, "io": {}})
        key = jax.random.fold_in(key, 2**31)  # apart from the draws of the modules

        def draw(number: int, name: str, old: Array) -> Array:
            if name.endswith("bias"):
                return jnp.zeros_like(old)
            noise = XL_DEVIATION * jax.random.normal(jax.random.fold_in(key, number), old.shape)
            return noise + 1 if name == "norm_scale" else noise

        drawn = [draw(i, path[-1].key, old) for i, (path, old) in enumerate(leaves)]
        return {**jax.tree.unflatten(tree, drawn), "io": params["io"]}

    def __init__(self, config: "ModelConfig", rngs: nnx.Rngs):
        super().__init__(config, rngs, output_dropout=config.dropout)
        self.relative = nnx.Param(
            jnp.zeros((config.width, config.heads, config.head_width))
        )  # projects the sinusoids

    def attend(
        self, h_BTD, key_BSHK, value_BSHK, position, attention, draws=None, **starts
    ) -> tuple[Array, Array]:
        """Attention, residual and norm: as in `AllAttention`, with the `Relative` of the block as position."""
        config = self.config
        query_BTHK = project(self.query[...], self.enter(h_BTD))
        position_LHK = project(self.relative[...], position.sinusoid_LD[None])[0]
        out_BTHK = attention(
            *(query_BTHK + position.content_HK, key_BSHK, value_BSHK),
            position_query_BTHK=query_BTHK + position.distance_HK,
            position_HLK=position_LHK.transpose(1, 0, 2),
            first_distance=0,
            implementation=config.implementation,
            **(draws.weights(config.attention_dropout) if draws else {}),
            **starts,
        )
        out_BTD = drop(draws, self.merge(out_BTHK), config.dropout, site=2)
        return self.leave(h_BTD, out_BTD), jnp.zeros(query_BTHK.shape[::2])  # no persistent pairs
