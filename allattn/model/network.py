"""The network: a stack of layers of one kind between an embedding and a softmax.

A token's way, and where to read it:

1. Its vector is looked up in a table, over the whole vocabulary (token_io.py) or by clusters of
   falling frequency (adaptive_softmax.py).
2. The scan in `Network._scan` takes it through the layers. Each layer gets the states before the
   block from a cache: in training the inputs of every layer, whose keys and values are computed
   anew (`train_forward`, reach_projection.py); in inference keys and values (`cached_forward`).
3. A layer attends to the context, up to its heads' spans, and to its persistent pairs
   (all_attention_layer.py, the paper's layer; the operation itself is allattn/attention). The
   baselines have a feed-forward sublayer instead of pairs (span_transformer.py,
   transformer_xl.py).
4. The final hidden state becomes a loss or logits in `io`, the object that the token came from.

`Network` is a Flax module and lives only inside traced functions. `Model` is the same network as
pure functions of a nested dict of arrays, which is all that training, evaluation and storage see.

Read the files in this order: config.py, network.py, attention_layer.py, span_attention.py,
all_attention_layer.py, pairs.py, sublayers.py, span_transformer.py, transformer_xl.py, token_io.py,
adaptive_softmax.py. You can skip reach_projection.py, norm.py and flops.py at first.

Dimension key: X layer, B batch, T position in the block, S cached position, H head, K head width,
E all heads side by side, D model width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.attention import all_attention, autodiff
from allattn.model.all_attention_layer import AllAttention
from allattn.model.attention_layer import AttentionLayer, Operation
from allattn.model.config import ModelConfig
from allattn.model.span_transformer import SpanTransformer
from allattn.model.sublayers import DropoutSeeds, Norm, drop
from allattn.model.transformer_xl import TransformerXL

Array = jax.Array
Params = dict[str, Any]

# train.remat: what of a layer is kept for the backward pass, which computes the rest again.
RECOMPUTED = {
    "projections": jax.checkpoint_policies.save_only_these_names(autodiff.NAME),
    "layer": jax.checkpoint_policies.nothing_saveable,
}
# model.layer, and the class of each kind.
LAYERS: dict[str, type[AttentionLayer]] = {
    "all_attention": AllAttention,
    "transformer": SpanTransformer,
    "transformer_xl": TransformerXL,
}


class Forward(NamedTuple):
    """What one pass over a block gives."""

    # Final hidden states, after embedding dropout.
    hidden_BTD: Array
    # What the cache gains: new_XBTD, the layers' inputs, in training; KeyValue in inference.
    new: Any
    # Mean share of the attention weight on persistent pairs.
    mass_XBH: Array


class KeyValue(NamedTuple):
    """Cached keys and values of every layer, for inference.

    Heads lie side by side, as kernels read them.
    """

    key_XBSE: Array
    value_XBSE: Array


class NetworkSeeds(NamedTuple):
    """What the dropout of the whole network is a function of."""

    # uint32 (depth + 2,): one for each layer, then of the embedding and of the final hidden state.
    seeds_X: Array
    # Global index of every row, int32.
    row_B: Array

    def embedding(self) -> DropoutSeeds:
        """Of the embedding's dropout."""
        return DropoutSeeds(self.seeds_X[-2], self.row_B)

    def output(self) -> DropoutSeeds:
        """Of the final hidden state's dropout."""
        return DropoutSeeds(self.seeds_X[-1], self.row_B)


# --- the network


class Network(nnx.Module):
    """Embedding, layers of one kind run by one scan, and the output softmax (in `io`)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        kind = LAYERS[config.layer]
        # The order is that of the draws: a run is repeated from its seed.
        self.io = kind.make_io(config, rngs)
        self.position = kind.shared(config, rngs)
        # Every parameter of a layer gets a leading dimension X.
        stack = nnx.vmap(lambda layer_rngs: kind(config, layer_rngs), in_axes=0, out_axes=0)
        self.layers = stack(nnx.Rngs(params=jax.random.split(rngs.params(), config.depth)))
        # Nothing normalises the sum of pre_norm's sublayers, unless this does.
        if config.pre_norm and kind.FINAL_NORM:
            self.final = Norm(config.width)

    def train_forward(
        self,
        tokens_BT: Array,
        cache_XBSD: Array,
        seeds_X: Array | None = None,
        row_B: Array | None = None,
        attention: Operation = all_attention,
        before: Array | int | None = None,
        remat: str = "",
    ) -> Forward:
        """One block in training, from the cached inputs of every layer.

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
        B, T = tokens_BT.shape
        S = cache_XBSD.shape[2]
        if row_B is None:
            row_B = jnp.arange(B)
        seeds = None
        if seeds_X is not None:
            seeds = NetworkSeeds(seeds_X, row_B)

        # What is the same in every layer is computed once, outside the scan.
        starts = self._key_start(S, before)
        choice_X = self.layers.choose_length(S, T)

        def run(layer, h_BTD, numbers, positions, dropout_seeds):
            # The whole cache is at hand, so that a layer reads no more of it than it reaches.
            x, choice = numbers
            key_BSHK, value_BSHK = layer.project_reach(cache_XBSD, x, h_BTD, choice)
            out_BTD, mass_BH = layer(
                h_BTD, key_BSHK, value_BSHK, positions, attention, dropout_seeds, **starts
            )
            # The layer's input is what the cache gains.
            return out_BTD, (h_BTD, mass_BH)

        recompute = None
        if remat:
            recompute = functools.partial(jax.checkpoint, policy=RECOMPUTED[remat])
        numbers_X = (jnp.arange(self.config.depth), choice_X)
        return self._scan(run, tokens_BT, numbers_X, (S, T), seeds, recompute)

    def cached_forward(
        self,
        tokens_BT: Array,
        cache: KeyValue,
        position: Array | int | None = None,
        attention: Operation = all_attention,
        before: Array | int | None = None,
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
        B, T = tokens_BT.shape
        S = cache.key_XBSE.shape[2]
        K = self.config.head_width
        # The block may begin anywhere in the cache, so that a cache with room is written in place.
        start = S - T if position is None else position
        starts = {"query_start": position, **self._key_start(start, before)}

        def write(old_BSE: Array, new_BTE: Array) -> Array:
            """Keys or values of cache and block, as (B, S, H, K)."""
            whole_BSE = jax.lax.dynamic_update_slice_in_dim(old_BSE, new_BTE, start, 1)
            return whole_BSE.reshape(B, S, -1, K)

        def run(layer, h_BTD, cache, positions, dropout_seeds):
            # The block's keys and values enter the cache before it is read.
            key_BTHK, value_BTHK = layer.project(h_BTD)
            new = KeyValue(key_BTHK.reshape(B, T, -1), value_BTHK.reshape(B, T, -1))
            key_BSHK = write(cache.key_XBSE, new.key_XBSE)
            value_BSHK = write(cache.value_XBSE, new.value_XBSE)
            out_BTD, mass_BH = layer(
                h_BTD, key_BSHK, value_BSHK, positions, attention, dropout_seeds, **starts
            )
            return out_BTD, (new, mass_BH)

        # The S cached positions include the block.
        return self._scan(run, tokens_BT, cache, (S, 0))

    def _key_start(self, start: Array | int, before: Array | int | None) -> dict[str, Any]:
        """Where the keys that exist begin, for a block at `start`.

        Kinds that attend zero states need no such bound: the cache holds zeros before the text.
        """
        if before is None or LAYERS[self.config.layer].ATTENDS_ZEROS:
            return {}
        return {"key_start": jnp.maximum(0, start - before)}

    def _scan(
        self,
        run: Callable[..., Any],
        tokens_BT: Array,
        per_layer: Any,
        visible: tuple[int, int],
        seeds: NetworkSeeds | None = None,
        recompute: Callable[[Callable], Callable] | None = None,
    ) -> Forward:
        """Embedding, all layers, and dropout of the final states.

        Args:
          run: function (layer, h_BTD, its slice of per_layer, positions, dropout_seeds) ->
            (out_BTD, (what the cache gains, mass_BH)).
          tokens_BT: int32.
          per_layer: arrays whose first dimension is layers.
          visible: states before the block, and tokens of the block, that positions are needed for.
          seeds: of all dropout; None: no dropout.
          recompute: from a function to one that keeps less for the backward pass; None: it keeps
            all it needs.
        """
        config = self.config
        dtype = jnp.dtype(config.dtype)

        # Positions are dropped with the embedding's seed (Transformer-XL).
        embedding_seeds = None
        output_seeds = None
        if seeds is not None:
            embedding_seeds = seeds.embedding()
            output_seeds = seeds.output()
        positions = self.position.keys(*visible, dtype, embedding_seeds)

        # A scan takes arrays, so each step of it puts its layer together again from its parameters.
        layers, parameters_X = nnx.split(self.layers)

        embedded_BTD = drop(
            embedding_seeds, self.io.embed(tokens_BT, dtype), config.embedding_dropout
        )

        def body(h_BTD: Array, scanned: tuple) -> tuple[Array, Any]:
            parameters, of_layer, seed = scanned
            layer_seeds = None
            if seeds is not None:
                layer_seeds = DropoutSeeds(seed, seeds.row_B)
            layer = nnx.merge(layers, parameters)
            h_BTD = layer.receive(h_BTD, embedded_BTD)
            return run(layer, h_BTD, of_layer, positions, layer_seeds)

        # What this drops is computed again, layer by layer, in the backward pass.
        if recompute is not None:
            body = recompute(body)
        layer_seeds_X = None
        if seeds is not None:
            layer_seeds_X = seeds.seeds_X[: config.depth]

        # From tokens to the final hidden state.
        scanned_X = (parameters_X, per_layer, layer_seeds_X)
        h_BTD, (new, mass_XBH) = jax.lax.scan(body, embedded_BTD, scanned_X)
        if config.pre_norm and LAYERS[config.layer].FINAL_NORM:
            h_BTD = self.final.normalise(h_BTD)
        return Forward(drop(output_seeds, h_BTD, config.embedding_dropout), new, mass_XBH)


# --- the same as pure functions


class Model:
    """The network as pure functions of its parameters, which are a nested dict of arrays."""

    def __init__(self, config: ModelConfig):
        self.config = config
        # The structure alone: no parameter is drawn here.
        abstract = nnx.eval_shape(lambda: Network(config, nnx.Rngs(0)))
        self._graph, self._state = nnx.split(abstract)

    # Models are static arguments of jitted functions: those of one geometry share a program.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self.config == other.config

    def __hash__(self) -> int:
        return hash(self.config)

    def init(self, key: Array) -> Params:
        """Fresh parameters from a random key, in float32.

        N(m, s) is a normal distribution of deviation s; U(n) is uniform within 1/sqrt(n), n being
        the features that the map reads. D model width, H heads, K head width, N persistent pairs,
        F inner units, d width of a cluster, X layers.

            parameter                           shape       all_attention,         transformer_xl
                                                            transformer
            layers/query                        X D H K     U(D)                   N(0, 0.02)
            layers/key, value                   X D H K     U(D)                   N(0, 0.02)
            layers/output (7)                   X H K D     U(D)                   N(0, 0.02)
            layers/relative                     X D H K     -                      N(0, 0.02)
            layers/persistent_key               X H N K     N(0, 1/sqrt(K)) (1)    -
            layers/persistent_value             X H N K     N(0, 1/sqrt(N))        -
            layers/persistent_bias (5)          X H N       0 (6)                  -
            layers/persistent_gain (5)          X H         1                      -
            layers/sink_bias                    X H sinks   0                      0
            layers/persistent_sublayer/ (9)
                norm_scale, norm_bias           X D         1, 0                   -
            layers/span                         X H         model.span.init        -
            layers/norm_scale                   X D         1                      N(1, 0.02)
            layers/norm_bias                    X D         0                      0
            layers/feed_forward/inner           X D F       U(D)                   N(0, 0.02)
            layers/feed_forward/inner_bias      X F         U(D)                   0
            layers/feed_forward/outer (7)       X F D       U(F)                   N(0, 0.02)
            layers/feed_forward/outer_bias      X D         U(F)                   0
            layers/feed_forward/norm_scale      X D         1                      N(1, 0.02)
            layers/feed_forward/norm_bias       X D         0                      0
          with model.pre_norm:
            final/norm_scale                    D           1                      -
            final/norm_bias                     D           0                      -
          with model.qk_norm:
            layers/query_gain, key_gain (8)     X H         1                      1
            layers/persistent_key_gain (8)      X H         1                      -
            layers/persistent_query_gain (9)    X H         1                      -
          with model.output_gate:
            layers/gate                         X D H       0                      0
          with model.residual_scalars, and the first two in other sublayers as well:
            layers/residual_scale               X           1                      1
            layers/branch_scale                 X           1                      1
            layers/embedding_scale              X           0                      0
          always:
            position/table                      L K         N(0, 1)                -
            position/content, distance          H K         -                      N(0, 0.02)
            io/embedding                        V D         N(0, 1)                -
            io/kernel                           V D         U(D)                   -
            io/bias                             V           U(D)                   -
          with cutoffs, for cluster i of n symbols; transformer_xl always, with one cluster or more:
            io/embedding/i                      n d         N(0, 1)                N(0, 0.02)
            io/projection/i (2)                 D d         U(d)                   N(0, 0.01)
            io/bias/i                           n           U(d)                   0
            io/tail_kernel                      tails D     U(D)                   N(0, 0.02)
            io/tail_bias                        tails       U(D)                   0
            io/kernel/i (3)                     n d         U(d)                   -
            io/output_projection/i (2, 3)       D d         U(d)                   N(0, 0.01) (4)

        (1) N(0, 1/sqrt(D)) of pairs as wide as the model; in pattention N(0, 0.02), and values
        N(0, 2/(X sqrt(D))). (2) Only with a division above 1. (3) Only when not tied.
        (4) Of the head alone, though tied. (5) Only with the field of that name; H is 1 for pairs
        as wide as the model. (6) Or what model.persistent_share asks for, docs/method.md.
        (7) Times model.output_scale. (8) In head_split, of the heads that have one. (9) In sublayer
        and pattention, of which the latter has no query_gain; with model.residual_scalars also
        residual_scale and branch_scale.
        """
        params = nnx.to_pure_dict(nnx.state(Network(self.config, nnx.Rngs(key)), nnx.Param))
        return LAYERS[self.config.layer].initialise(self.config, params, key)

    def bind(self, params: Params) -> Network:
        """The network with these parameters, for use inside one traced function."""
        # A copy, since parameters are written into the state.
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def windowed(self, length: int, clamp: int = 0) -> "Model":
        """The same network for evaluation, where every query sees `length` distances in any place.

        That changes Transformer-XL alone, whose parameters do not depend on length and clamp. The
        queries of the others see as many distances as there are position keys.
        """
        return Model(dataclasses.replace(self.config, limit=length, same_length=True, clamp=clamp))

    def empty_cache(self, rows: int, length: int) -> Array:
        """Zero states, as cache_XBSD; they are attended, except by Transformer-XL."""
        return jnp.zeros((self.config.depth, rows, length, self.config.width), self.config.dtype)

    def empty_key_value(self, rows: int, length: int) -> KeyValue:
        """Keys and values of zero states, which are zeros since the projections have no bias."""
        config = self.config
        # In head_split only half of the heads have keys and values.
        shape = (config.depth, rows, length, config.context_heads * config.head_width)
        return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
