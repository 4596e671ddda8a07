"""The network: a stack of layers of one kind between an embedding and a softmax, and its pure functions.

Dimension key: X layer, B batch, T position in the block, S cached position, H head, K head width,
E all heads side by side, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from allattn.attention import all_attention, autodiff
from allattn.config_checks import check_model
from allattn.model.all_attention_layer import (
    AllAttention,
    DropoutSeeds,
    Transformer,
    drop,
)
from allattn.model.transformer_xl import TransformerXL

Array = jax.Array
Params = dict[str, Any]

# train.remat: what of a layer is kept for the backward pass, which computes the rest again
RECOMPUTED = {
    "projections": jax.checkpoint_policies.save_only_these_names(autodiff.NAME),
    "layer": jax.checkpoint_policies.nothing_saveable,
}
LAYERS = {
    "all_attention": AllAttention,
    "transformer": Transformer,
    "transformer_xl": TransformerXL,
}


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Geometry of the network; the fields of `config.model`, whose comments in configs/base.py explain them."""

    depth: int
    width: int
    heads: int
    persistent: int
    vocab_size: int
    dropout: float
    embedding_dropout: float
    dtype: str
    limit: int
    adaptive: bool
    ramp: int
    init: float
    implementation: str | None = None
    cutoffs: tuple[int, ...] = ()
    division: int = 1
    tied: bool = True
    layer: str = "all_attention"
    integration: str = "joint"
    feed_forward: int = 0
    attention_dropout: float = 0.0
    pre_norm: bool = False
    # Transformer-XL in evaluation: every query sees `limit` distances, wherever in the block
    same_length: bool = False
    clamp: int = 0  # and distances beyond it look like it; 0: none does

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "ModelConfig":
        """Read and check `config.model`.

        Raises:
          UserError: a field is out of range, or names a model that this version does not have.
        """
        model, span = config.model, config.model.span
        check_model(config)
        shared = ["depth", "width", "heads", "persistent", "vocab_size", "dropout", "dtype"]
        shared += ["layer", "integration", "feed_forward", "attention_dropout", "pre_norm"]
        one_rate = (
            model.layer == "transformer_xl"
        )  # of embedding, positions and final state as well
        return cls(
            **{name: model[name] for name in shared},
            **{name: span[name] for name in ("limit", "adaptive", "ramp", "init")},
            **{name: model.adaptive_io[name] for name in ("cutoffs", "division", "tied")},
            embedding_dropout=model.dropout if one_rate else model.embedding_dropout,
            implementation=model.implementation or None,
        )

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def context_heads(self) -> int:
        """Heads that attend to the context."""
        return self.heads // 2 if self.integration == "head_split" else self.heads

    @property
    def drops(self) -> bool:
        """Whether training drops anything."""
        return max(self.dropout, self.embedding_dropout, self.attention_dropout) > 0


class Forward(NamedTuple):
    """What one pass over a block gives."""

    hidden_BTD: Array  # final hidden states, after embedding dropout
    new: Any  # what the cache gains: inputs_XBTD in training, KeyValue of (X, B, T, E) in inference
    mass_XBH: Array  # mean share of the attention weight on persistent pairs


class KeyValue(NamedTuple):
    """Cached keys and values of every layer, heads side by side as the kernels read them; exact in inference."""

    key_XBSE: Array
    value_XBSE: Array


class Network(nnx.Module):
    """Embedding, a stack of layers of one kind run by one scan, and the output softmax (in `io`)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, kind = config, LAYERS[config.layer]
        self.io = kind.make_io(config, rngs)
        self.position = kind.shared(config, rngs)
        stack = nnx.vmap(lambda layer_rngs: kind(config, layer_rngs), in_axes=0, out_axes=0)
        self.layers = stack(nnx.Rngs(params=jax.random.split(rngs.params(), config.depth)))

    def train_forward(
        self,
        tokens_BT,
        cache_XBSD,
        seeds_X=None,
        row_B=None,
        attention=all_attention,
        before=None,
        remat="",
    ) -> Forward:
        """One block in training: keys and values are recomputed from the cached inputs of each layer.

        Args:
          tokens_BT: int32.
          cache_XBSD: earlier inputs of every layer, oldest first, as far back as any head may look;
            the gradient does not enter them.
          seeds_X: uint32 (depth + 2,) dropout seeds: layers, embedding, final hidden state; None:
            no dropout.
          row_B: global index of every row, int32; None: 0, 1, ...
          attention: the operation, or the operation over a mesh.
          before: tokens of this text before the block, int32, may be traced; None: as many as the
            cache holds.
          remat: what the backward pass computes again, of `RECOMPUTED`; "": nothing.
        """
        (B, T), S = tokens_BT.shape, cache_XBSD.shape[2]
        row_B = jnp.arange(B) if row_B is None else row_B
        starts, chosen_X = self._key_start(S, before), self.layers.choose_length(S, T)

        def layer(layer: AllAttention, h_BTD, cache, positions, draws):
            x, chosen = cache
            key_BSHK, value_BSHK = layer.project_reach(cache_XBSD, x, h_BTD, chosen)
            out_BTD, mass_BH = layer(
                h_BTD, key_BSHK, value_BSHK, positions, attention, draws=draws, **starts
            )
            return out_BTD, (h_BTD, mass_BH)

        again = functools.partial(jax.checkpoint, policy=RECOMPUTED[remat]) if remat else None
        return self._scan(
            layer,
            tokens_BT,
            (jnp.arange(self.config.depth), chosen_X),
            (S, T),
            seeds_X,
            row_B,
            again,
        )

    def cached_forward(
        self, tokens_BT, cache: KeyValue, position=None, attention=all_attention, before=None
    ) -> Forward:
        """One block in inference, from cached keys and values.

        Args:
          tokens_BT: int32.
          cache: room for the block included; what lies from `position` on is overwritten.
          position: index in the cache at which the block begins, int32, may be traced; None: its
            last T places.
          attention: the operation, or the operation over a mesh.
          before: tokens of this text before the block, int32, may be traced; None: as many as the
            cache holds.
        """
        (B, T), S = tokens_BT.shape, cache.key_XBSE.shape[2]
        start = S - T if position is None else position
        starts = {"query_start": position, **self._key_start(start, before)}

        def layer(layer: AllAttention, h_BTD, cache: KeyValue, positions, draws):
            def write(old_BSE: Array, new_BTE: Array) -> Array:
                whole_BSE = jax.lax.dynamic_update_slice_in_dim(old_BSE, new_BTE, start, 1)
                return whole_BSE.reshape(B, S, -1, self.config.head_width)

            new = KeyValue(*(x_BTHK.reshape(B, T, -1) for x_BTHK in layer.project(h_BTD)))
            key_BSHK, value_BSHK = (write(*pair) for pair in zip(cache, new, strict=True))
            out_BTD, mass_BH = layer(
                h_BTD, key_BSHK, value_BSHK, positions, attention, draws=draws, **starts
            )
            return out_BTD, (new, mass_BH)

        return self._scan(layer, tokens_BT, cache, (S, 0), None, None)

    def _key_start(self, start: Array | int, before: Array | int | None) -> dict[str, Any]:
        """Where the keys that exist begin, for a block at `start`; zero states exist for the kinds that attend them."""
        if before is None or LAYERS[self.config.layer].ATTENDS_ZEROS:
            return {}
        return {"key_start": jnp.maximum(0, start - before)}

    def _scan(
        self,
        layer: Callable,
        tokens_BT,
        cache,
        visible: tuple[int, int],
        seeds_X,
        row_B,
        again: Callable | None = None,
    ) -> Forward:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        first, last = (
            None if seeds_X is None else DropoutSeeds(seeds_X[i], row_B) for i in (-2, -1)
        )
        positions = self.position.keys(*visible, dtype, first)
        layers, state = nnx.split(self.layers)

        def body(h_BTD, scanned):
            state, cache, seed = scanned
            draws = None if seed is None else DropoutSeeds(seed, row_B)
            return layer(nnx.merge(layers, state), h_BTD, cache, positions, draws)

        seeds = None if seeds_X is None else seeds_X[: config.depth]
        h_BTD = drop(first, self.io.embed(tokens_BT, dtype), config.embedding_dropout)
        h_BTD, (new, mass_XBH) = jax.lax.scan(
            again(body) if again else body, h_BTD, (state, cache, seeds)
        )
        return Forward(drop(last, h_BTD, config.embedding_dropout), new, mass_XBH)


class Model:
    """The network as pure functions of its parameters, which are a nested dict of arrays."""

    def __init__(self, config: ModelConfig):
        self.config = config
        abstract = nnx.eval_shape(lambda: Network(config, nnx.Rngs(0)))
        self._graph, self._state = nnx.split(abstract)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config)

    def init(self, key: Array) -> Params:
        """Fresh parameters from a random key, in float32 (initialisation: method page)."""
        params = nnx.to_pure_dict(nnx.state(Network(self.config, nnx.Rngs(key)), nnx.Param))
        return LAYERS[self.config.layer].initialise(params, key)

    def bind(self, params: Params) -> Network:
        """The network with these parameters, for use inside one traced function."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def windowed(self, length: int, clamp: int = 0) -> "Model":
        """The same network for evaluation, where every query sees `length` distances wherever in the block it is.

        That changes Transformer-XL alone, whose parameters do not depend on length and clamp; the
        others' queries see as many as they have position keys.
        """
        return Model(dataclasses.replace(self.config, limit=length, same_length=True, clamp=clamp))

    def empty_cache(self, rows: int, length: int) -> Array:
        """Zero states, as cache_XBSD; they are attended, but for Transformer-XL's."""
        return jnp.zeros((self.config.depth, rows, length, self.config.width), self.config.dtype)

    def empty_key_value(self, rows: int, length: int) -> KeyValue:
        """Keys and values of zero states, which are zeros since the projections have no bias."""
        config = self.config
        shape = (config.depth, rows, length, config.context_heads * config.head_width)
        return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def forward_flops(
    config: ModelConfig, mean_reach: float, block: int, cached: bool = False
) -> float:
    """Required products of one token's forward pass, in FLOPs; training requires three times as many.

    Args:
      config: geometry.
      mean_reach: mean over layers and heads of min(L, span + ramp), in tokens; of Transformer-XL
        its memory.
      block: T, over which the projections of the cached states are shared.
      cached: keys and values of earlier blocks are not projected again.

    Returns:
      Per layer 2 D (3 reach + 2 N) for attention (query.key, weights.value, query.position;
      query.persistent key, weights.persistent value), 8 D^2 for the four projections, 4 D^2 reach /
      T for keys and values of the cache and 4 D F for feed-forward; and 2 D V for the output. With
      `head_split`, half of the heads has only reach, keys and values, the other half only N.
      Transformer-XL's queries see the (T + 1) / 2 tokens of the block up to them as well; its
      projected sinusoids are not counted, since all rows share them. With adaptive input and
      softmax the output is 2 D (n + tails) for a head of n symbols, and 4 D^2 for its two
      projections, as a token of the head needs. Tails are left out, since how many tokens visit
      them is up to the text: the count is never too high.
    """
    D, context = config.width, config.context_heads / config.heads
    own_block = (block + 1) / 2 if config.layer == "transformer_xl" else 0
    persistent = 2 * config.persistent * ((1 - context) or 1)
    attention = 2 * D * (3 * (mean_reach + own_block) * context + persistent)
    projections = 4 * D * D * (1 + context + (0 if cached else context * mean_reach / block))
    feed_forward = 4 * D * config.feed_forward
    head = (
        config.cutoffs[0] + len(config.cutoffs) + 2 * D * (config.division > 1)
        if config.cutoffs
        else 0
    )
    return config.depth * (attention + projections + feed_forward) + 2 * D * (
        head or config.vocab_size
    )
