"""The all-attention network: layers of joint attention over context and persistent vectors, and nothing else.

Dimension key: X layer, B batch, T position in the block, S cached position, L distance, N persistent pair, H head,
K head width, E all heads side by side, D model width, V vocabulary.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx

from allattn.adaptive_io import make_io
from allattn.attention import IMPLEMENTATIONS, all_attention, dropout
from allattn.attention.span import reach
from allattn.attention.tiles import buckets
from allattn.config import check_clusters, check_ranges
from allattn.errors import UserError

Array = jax.Array
Params = dict[str, Any]

DTYPES = ("float32", "bfloat16", "float64")


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
    remat: bool = False  # config.train.remat

    @classmethod
    def from_config(cls, config: ml_collections.ConfigDict) -> "ModelConfig":
        """Read and check `config.model`.

        Raises:
          UserError: a field is out of range, or names a model that this version does not have.
        """
        model, span = config.model, config.model.span
        check_ranges(config, "model.")
        choices = {"layer": ("all_attention",), "integration": ("joint",), "dtype": DTYPES}
        for name, known in {**choices, "implementation": ("", *IMPLEMENTATIONS)}.items():
            if model[name] not in known:
                raise UserError(f"model.{name}: expected one of {known}, found {model[name]!r}")
        if model.width % model.heads:
            raise UserError(f"model.heads: expected a divisor of model.width {model.width}, found {model.heads}")
        if span.init > 1:
            raise UserError(f"model.span.init: expected a number in [0, 1], found {span.init}")
        check_clusters(config)
        shared = ("depth", "width", "heads", "persistent", "vocab_size", "dropout", "embedding_dropout", "dtype")
        return cls(
            **{name: model[name] for name in shared},
            **{name: span[name] for name in ("limit", "adaptive", "ramp", "init")},
            **{name: model.adaptive_io[name] for name in ("cutoffs", "division", "tied")},
            implementation=model.implementation or None,
            remat=config.train.remat,
        )

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Forward(NamedTuple):
    """What one pass over a block gives."""

    hidden_BTD: Array  # final hidden states, after embedding dropout
    new: Any  # what the cache gains: inputs_XBTD in training, KeyValue of (X, B, T, E) in inference
    mass_X: Array  # mean share of the attention weight on persistent pairs


class KeyValue(NamedTuple):
    """Cached keys and values of every layer, heads side by side as the kernels read them; exact in inference."""

    key_XBSE: Array
    value_XBSE: Array


class Layer(nnx.Module):
    """h = LayerNorm(h + attention(h)), which is the whole layer (arXiv 1907.01470, eq. 11)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, H, K, N = config.width, config.heads, config.head_width, config.persistent
        bound = 1 / math.sqrt(D)

        def linear(*shape: int) -> nnx.Param:
            return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))

        self.query, self.key, self.value = linear(D, H, K), linear(D, H, K), linear(D, H, K)
        self.output = linear(H, K, D)
        if N:
            self.persistent_key = nnx.Param(jax.random.normal(rngs.params(), (H, N, K)) / math.sqrt(K))
            self.persistent_value = nnx.Param(jax.random.normal(rngs.params(), (H, N, K)) / math.sqrt(N))
        if config.adaptive:
            self.span = nnx.Param(jnp.full((H,), config.init, jnp.float32))
        self.norm_scale, self.norm_bias = nnx.Param(jnp.ones(D)), nnx.Param(jnp.zeros(D))
        self.config = config

    def project(self, states_BSD: Array) -> tuple[Array, Array]:
        """Keys and values of hidden states, as key_BSHK and value_BSHK."""
        return _project(self.key[...], states_BSD), _project(self.value[...], states_BSD)

    def project_reach(self, cache_BSD: Array, h_BTD: Array) -> tuple[Array, Array]:
        """Keys and values of cache and block, computed only for the cached states within reach of this layer's spans.

        The others are zeros that no head looks at. The reach is known at run time, so code for each of a few
        lengths is compiled and one of them runs. The gradient does not enter the cached states.
        """
        S, kernels = cache_BSD.shape[1], (self.key[...], self.value[...])
        if not self.config.adaptive:
            return _project_last(S, kernels, jax.lax.stop_gradient(cache_BSD), h_BTD)
        needed, sizes = reach(jnp.max(self.span_tokens()), self.config.ramp, 1, S), buckets(S)
        return _project_one_of(sizes, jnp.searchsorted(jnp.array(sizes), needed), kernels, cache_BSD, h_BTD)

    def span_tokens(self) -> Array:
        """Learned spans z L in tokens, as (H,)."""
        return self.span[...] * self.config.limit

    def attend(self, h_BTD, key_BSHK, value_BSHK, position_LK, attention, **options) -> tuple[Array, Array]:
        """Attention, residual and norm.

        Args:
          h_BTD: the layer's input.
          key_BSHK, value_BSHK: context, the block included.
          position_LK: position keys in the compute dtype, nearest first.
          attention: the operation, or the operation over a mesh.
          **options: query_start and dropout arguments of the operation.

        Returns:
          The layer's output h_BTD, and the mean weight on persistent pairs.
        """
        config, dtype = self.config, h_BTD.dtype
        L, persistent = position_LK.shape[0], {}
        if config.persistent:  # stored so that the logit is q.key and the value sqrt(N) val; the operation scales both
            key_HNK, value_HNK = self.persistent_key[...].astype(dtype), self.persistent_value[...].astype(dtype)
            persistent["persistent_key_HNK"] = key_HNK * math.sqrt(config.head_width)
            persistent["persistent_value_HNK"] = value_HNK * math.sqrt(config.persistent)
        out_BTHK, mass_BTH = attention(
            _project(self.query[...], h_BTD),
            *(key_BSHK, value_BSHK),
            position_HLK=position_LK[None],
            span_H=_at_most(self.span_tokens(), L) if config.adaptive else None,
            ramp=config.ramp,
            dropout_rate=config.dropout if options.get("dropout_seed") is not None else 0.0,
            return_persistent_mass=True,
            implementation=config.implementation,
            **persistent,
            **options,
        )
        out_BTD = out_BTHK.reshape(h_BTD.shape) @ self.output[...].astype(dtype).reshape(config.width, config.width)
        return layer_norm(h_BTD + out_BTD, self.norm_scale[...], self.norm_bias[...]), mass_BTH.mean()


def _project(kernel_DHK: Array, states_BSD: Array) -> Array:
    """One product with heads side by side, the layout that kernels read: a TPU would transpose that of an einsum."""
    D, H, K = kernel_DHK.shape
    kernel_DE = kernel_DHK.astype(states_BSD.dtype).reshape(D, H * K)
    return (states_BSD @ kernel_DE).reshape(*states_BSD.shape[:2], H, K)


def _project_last(length: int, kernels: tuple, cache_BSD: Array, h_BTD: Array) -> tuple:
    """Both projections of the last `length` cached states and of the block, behind zeros.

    Two products each: the backward pass needs the gradient of the block alone, not of the longer cache.
    """
    before = cache_BSD.shape[1] - length

    def linear(kernel_DHK: Array) -> Array:
        parts = [_project(kernel_DHK, cache_BSD[:, before:]), _project(kernel_DHK, h_BTD)]
        return jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (before, 0), (0, 0), (0, 0)))

    return tuple(linear(kernel_DHK) for kernel_DHK in kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_one_of(sizes: tuple[int, ...], which: Array, kernels: tuple, cache_BSD: Array, h_BTD: Array) -> tuple:
    """`_project_last` with the chosen one of some lengths.

    Its gradient is another choice, from the same inputs: differentiating a switch keeps the residuals of all branches.
    """
    branches = [functools.partial(_project_last, size) for size in sizes]
    return jax.lax.switch(which, branches, kernels, cache_BSD, h_BTD)


def _project_forward(sizes: tuple[int, ...], *inputs: Any) -> tuple[tuple, tuple]:
    return _project_one_of(sizes, *inputs), inputs


def _project_backward(sizes: tuple[int, ...], inputs: tuple, cotangents: tuple) -> tuple:
    def gradient_of(size: int) -> Callable:
        def branch(kernels: tuple, cache_BSD: Array, h_BTD: Array, cotangents: tuple) -> tuple:
            return jax.vjp(lambda k, h_BTD: _project_last(size, k, cache_BSD, h_BTD), kernels, h_BTD)[1](cotangents)

        return branch

    which, *arrays = inputs
    kernels, h_BTD = jax.lax.switch(which, [gradient_of(size) for size in sizes], *arrays, cotangents)
    return None, kernels, None, h_BTD


_project_one_of.defvjp(_project_forward, _project_backward)


def _at_most(span_H: Array, L: int) -> Array:
    """Spans within the context bucket, with the gradient of the unclipped ones."""
    return span_H + jax.lax.stop_gradient(jnp.minimum(span_H, L) - span_H)


def layer_norm(h_BTD: Array, scale_D: Array, bias_D: Array) -> Array:
    """Layer normalisation with epsilon 1e-5, statistics at least in float32, result in the input's dtype."""
    x_BTD = h_BTD.astype(jnp.promote_types(h_BTD.dtype, jnp.float32))
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    x_BTD = x_BTD * jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + 1e-5)
    return (x_BTD * scale_D.astype(x_BTD.dtype) + bias_D.astype(x_BTD.dtype)).astype(h_BTD.dtype)


class Network(nnx.Module):
    """Embedding, a stack of layers run by one scan, and the output softmax (in `io`)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.io = make_io(config.vocab_size, config.width, rngs, config.cutoffs, config.division, config.tied)
        self.position = nnx.Param(jax.random.normal(rngs.params(), (config.limit, config.head_width)))
        stack = nnx.vmap(lambda layer_rngs: Layer(config, layer_rngs), in_axes=0, out_axes=0)
        self.layers = stack(nnx.Rngs(params=jax.random.split(rngs.params(), config.depth)))

    def train_forward(self, tokens_BT, cache_XBSD, seeds_X=None, row_offset=0, attention=all_attention) -> Forward:
        """One block in training: keys and values are recomputed from the cached inputs of each layer.

        Args:
          tokens_BT: int32.
          cache_XBSD: earlier inputs of every layer, oldest first, as far back as any head may look; the gradient
            does not enter them.
          seeds_X: uint32 (depth + 2,) dropout seeds: layers, embedding, final hidden state; None: no dropout.
          row_offset: global index of row 0.
          attention: the operation, or the operation over a mesh.
        """

        def layer(layer: Layer, h_BTD, cache_BSD, position_LK, **options):
            key_BSHK, value_BSHK = layer.project_reach(cache_BSD, h_BTD)
            out_BTD, mass = layer.attend(h_BTD, key_BSHK, value_BSHK, position_LK, attention, **options)
            return out_BTD, (h_BTD, mass)

        return self._scan(layer, tokens_BT, cache_XBSD, cache_XBSD.shape[2], seeds_X, row_offset)

    def cached_forward(self, tokens_BT, cache: KeyValue, position=None, attention=all_attention) -> Forward:
        """One block in inference, from cached keys and values.

        Args:
          tokens_BT: int32.
          cache: room for the block included; what lies from `position` on is overwritten.
          position: index in the cache at which the block begins, int32, may be traced; None: its last T places.
          attention: the operation, or the operation over a mesh.
        """
        (B, T), S = tokens_BT.shape, cache.key_XBSE.shape[2]
        start = S - T if position is None else position

        def layer(layer: Layer, h_BTD, cache: KeyValue, position_LK, **options):
            def write(old_BSE: Array, new_BTE: Array) -> Array:
                whole_BSE = jax.lax.dynamic_update_slice_in_dim(old_BSE, new_BTE, start, 1)
                return whole_BSE.reshape(B, S, self.config.heads, -1)

            new = KeyValue(*(x_BTHK.reshape(B, T, -1) for x_BTHK in layer.project(h_BTD)))
            key_BSHK, value_BSHK = (write(*pair) for pair in zip(cache, new, strict=True))
            options["query_start"] = position
            out_BTD, mass = layer.attend(h_BTD, key_BSHK, value_BSHK, position_LK, attention, **options)
            return out_BTD, (new, mass)

        return self._scan(layer, tokens_BT, cache, S, None, 0)

    def _scan(self, layer: Callable, tokens_BT, cache, reachable: int, seeds_X, row_offset) -> Forward:
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        position_LK = self.position[: min(config.limit, reachable)].astype(dtype)
        layers, state = nnx.split(self.layers)

        def body(h_BTD, scanned):
            state, cache, seed = scanned
            options = {} if seed is None else {"dropout_seed": seed, "row_offset": row_offset}
            return layer(nnx.merge(layers, state), h_BTD, cache, position_LK, **options)

        seeds = None if seeds_X is None else seeds_X[: config.depth]
        h_BTD = self._embedding_dropout(self.io.embed(tokens_BT, dtype), seeds_X, -2, row_offset)
        body = jax.checkpoint(body) if config.remat else body
        h_BTD, (new, mass_X) = jax.lax.scan(body, h_BTD, (state, cache, seeds))
        return Forward(self._embedding_dropout(h_BTD, seeds_X, -1, row_offset), new, mass_X)

    def _embedding_dropout(self, h_BTD: Array, seeds_X: Array | None, which: int, row_offset) -> Array:
        rate = self.config.embedding_dropout
        if seeds_X is None or not rate:
            return h_BTD
        B, T, D = h_BTD.shape
        row_B11, query_T1 = row_offset + jnp.arange(B)[:, None, None], jnp.arange(T)[:, None]
        key_BT1 = dropout.query_key(seeds_X[which], row_B11, 0, query_T1, dropout.FEATURE)
        return jnp.where(dropout.keep(key_BT1, jnp.arange(D), rate), h_BTD / (1 - rate), 0).astype(h_BTD.dtype)


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
        return nnx.to_pure_dict(nnx.state(Network(self.config, nnx.Rngs(key)), nnx.Param))

    def bind(self, params: Params) -> Network:
        """The network with these parameters, for use inside one traced function."""
        state = jax.tree.map(lambda x: x, self._state)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(self._graph, state)

    def empty_cache(self, rows: int, length: int) -> Array:
        """Zero states, as cache_XBSD; all-attention models attend them."""
        return jnp.zeros((self.config.depth, rows, length, self.config.width), self.config.dtype)

    def empty_key_value(self, rows: int, length: int) -> KeyValue:
        """Keys and values of zero states, which are zeros since the projections have no bias."""
        config = self.config
        shape = (config.depth, rows, length, config.width)
        return KeyValue(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))


def forward_flops(config: ModelConfig, mean_reach: float, block: int, cached: bool = False) -> float:
    """Required products of one token's forward pass, in FLOPs; training requires three times as many.

    Args:
      config: geometry.
      mean_reach: mean over layers and heads of min(L, span + ramp), in tokens.
      block: T, over which the projections of the cached states are shared.
      cached: keys and values of earlier blocks are not projected again.

    Returns:
      Per layer 2 D (3 reach + 2 N) for attention (query.key, weights.value, query.position; query.persistent key,
      weights.persistent value), 8 D^2 for the four projections and 4 D^2 reach / T for keys and values of the cache;
      and 2 D V for the output. With adaptive input and softmax that is 2 D (n + tails) for a head of n symbols, and
      4 D^2 for its two projections, as a token of the head needs. Tails are left out, since how many tokens visit
      them is up to the text: the count is never too high.
    """
    D = config.width
    attention = 2 * D * (3 * mean_reach + 2 * config.persistent)
    projections = 8 * D * D + (0 if cached else 4 * D * D * mean_reach / block)
    head = config.cutoffs[0] + len(config.cutoffs) + 2 * D * (config.division > 1) if config.cutoffs else 0
    return config.depth * (attention + projections) + 2 * D * (head or config.vocab_size)
