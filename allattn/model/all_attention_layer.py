"""The layers of Sukhbaatar et al.: all-attention, the other ways to integrate persistent vectors, and feed-forward.

A kind of layer has `project` and `project_reach` (keys and values of its inputs), `attend`
(attention, residual, norm) and a call, which is `attend` and what follows it; and it says what the
network around it needs: `shared`, `make_io`, `ATTENDS_ZEROS` and `initialise`.

Dimension key: B batch, T position in the block, S cached position, L distance, N persistent pair, H
head, K head width, E all heads side by side, D model width, F inner unit.
"""

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.attention import dropout
from allattn.attention.span import reach
from allattn.attention.xla.tiles import reach_sizes
from allattn.model.adaptive_softmax import AdaptiveIO, TokenIO

if TYPE_CHECKING:
    from allattn.model import ModelConfig

Array = jax.Array

TWO_SOFTMAX_INTEGRATIONS = ("split", "head_split", "single_head")  # integrations with two softmaxes


class DropoutSeeds(NamedTuple):
    """What a layer's dropout draws from; None in its place: nothing is dropped."""

    seed: Array  # uint32
    row_B: Array  # global index of every row, int32

    def weights(self, rate: float) -> dict[str, Any]:
        """Arguments with which the operation drops attention weights."""
        return {"dropout_rate": rate, "dropout_seed": self.seed, "row_offset": self.row_B[0]}


def drop(draws: DropoutSeeds | None, x_BTD: Array, rate: float, site: int = 0) -> Array:
    """Features dropped at a rate; `site` tells apart what draws from the same seed."""
    if draws is None or not rate:
        return x_BTD
    return dropout.features(x_BTD, draws.seed, draws.row_B, rate, site)


def uniform(rngs: nnx.Rngs, fan_in: int, *shape: int) -> nnx.Param:
    """A linear map's weights or biases, within 1/sqrt(fan_in)."""
    bound = 1 / math.sqrt(fan_in)
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


class Positions(nnx.Module):
    """One learned table of position keys for all layers and heads, nearest first."""

    def __init__(self, config: "ModelConfig", rngs: nnx.Rngs):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (config.limit, config.head_width)))

    def keys(self, cached: int, block: int, dtype: Any, draws: DropoutSeeds | None) -> Array:
        """Position keys of a block behind `cached` states, as position_LK; the block's own length is not needed."""
        del block, draws
        return self.table[: min(self.table.shape[0], cached)].astype(dtype)


class Sublayer(nnx.Module):
    """A map f with its norm and residual: LN(h + f(h)), or with pre_norm h + f(LN(h))."""

    def __init__(self, config: "ModelConfig"):
        self.norm_scale, self.norm_bias = (
            nnx.Param(jnp.ones(config.width)),
            nnx.Param(jnp.zeros(config.width)),
        )
        self.config = config

    def enter(self, h_BTD: Array) -> Array:
        """What f is applied to."""
        return self._norm(h_BTD) if self.config.pre_norm else h_BTD

    def leave(self, h_BTD: Array, out_BTD: Array) -> Array:
        """The sublayer's output from its input and f's output."""
        return h_BTD + out_BTD if self.config.pre_norm else self._norm(h_BTD + out_BTD)

    def _norm(self, h_BTD: Array) -> Array:
        return layer_norm(h_BTD, self.norm_scale[...], self.norm_bias[...])


class AllAttention(Sublayer):
    """h = LayerNorm(h + attention(h)), which is the whole layer (arXiv 1907.01470, eq. 11), and its variants.

    `split` adds up two softmaxes, over the context and over the persistent pairs; in `single_head`
    the latter has one head as wide as the model; in `head_split` the first half of the heads sees
    the context alone, and the others, which have no key and value projections and no spans, the
    persistent pairs alone (arXiv 1907.01470, the ablation).
    """

    INTEGRATIONS: tuple[str, ...] = ("joint", *TWO_SOFTMAX_INTEGRATIONS)
    ATTENDS_ZEROS = True  # zero states stand for what was before the text

    @staticmethod
    def make_io(config: "ModelConfig", rngs: nnx.Rngs) -> TokenIO | AdaptiveIO:
        """Embedding and output softmax, adaptive ones where there are cutoffs."""
        if not config.cutoffs:
            return TokenIO(config.vocab_size, config.width, rngs)
        clusters: dict[str, Any] = {
            "cutoffs": config.cutoffs,
            "division": config.division,
            "tied": config.tied,
        }
        return AdaptiveIO(config.vocab_size, config.width, rngs, **clusters)

    @staticmethod
    def shared(config: "ModelConfig", rngs: nnx.Rngs) -> Any:
        """What all layers share: a module with a method `keys`, whose result `attend` gets."""
        return Positions(config, rngs)

    @staticmethod
    def initialise(params: dict[str, Any], key: Array) -> dict[str, Any]:
        """Initial parameters of the whole network from those that the modules drew: the same."""
        del key
        return params

    def __init__(self, config: "ModelConfig", rngs: nnx.Rngs):
        super().__init__(config)
        D, H, K, N, context = (
            config.width,
            config.heads,
            config.head_width,
            config.persistent,
            config.context_heads,
        )
        self.query, self.key, self.value = (
            uniform(rngs, D, D, heads, K) for heads in (H, context, context)
        )
        self.output = uniform(rngs, D, H, K, D)
        if N:
            heads, width = H - context or H, D if config.integration == "single_head" else K
            self.persistent_key = nnx.Param(
                jax.random.normal(rngs.params(), (heads, N, K)) / math.sqrt(width)
            )
            self.persistent_value = nnx.Param(
                jax.random.normal(rngs.params(), (heads, N, K)) / math.sqrt(N)
            )
        if config.adaptive:
            self.span = nnx.Param(jnp.full((context,), config.init, jnp.float32))

    def project(self, states_BSD: Array) -> tuple[Array, Array]:
        """Keys and values of hidden states, as key_BSHK and value_BSHK."""
        states_BSD = self.enter(states_BSD)
        return project(self.key[...], states_BSD), project(self.value[...], states_BSD)

    def choose_length(self, S: int, T: int) -> Array | None:
        """Index in `lengths(S, T)` of the least that holds the reach of a layer's spans; None if it is fixed.

        Of a stack of layers: of each, which on a mesh costs one look at all heads in place of one
          per layer.
        """
        if not self.config.adaptive:
            return None
        needed = reach(jnp.max(self.span_tokens(), axis=-1), self.config.ramp, 1, S)
        return jnp.searchsorted(jnp.array(lengths(S, T)), needed)

    def project_reach(
        self, cache_XBSD: Array, x: Array | int, h_BTD: Array, chosen: Array | None
    ) -> tuple:
        """Keys and values of layer x's cache and block, computed only for the states within reach of its spans.

        The others are zeros that no head looks at. The reach is known at run time, so code for each
        of a few lengths is compiled and the one that `choose_length` gave runs; it reads no more of
        the cache of all layers than it needs. The gradient does not enter the cached states.
        """
        S, T, kernels = cache_XBSD.shape[2], h_BTD.shape[1], (self.key[...], self.value[...])
        if self.config.pre_norm:  # whose parameters get a gradient from the cached states as well
            cache_BSD = jax.lax.stop_gradient(last_states(cache_XBSD, x, S))
            states_BSD = self.enter(jnp.concatenate([cache_BSD, h_BTD], axis=1))
            return project(kernels[0], states_BSD), project(kernels[1], states_BSD)
        sizes, which = ((S,), 0) if chosen is None else (lengths(S, T), chosen)
        return _project_one_of(sizes, which, x, kernels, cache_XBSD, h_BTD)

    def span_tokens(self) -> Array:
        """Learned spans z L in tokens, as (H,)."""
        return self.span[...] * self.config.limit

    def attend(
        self, h_BTD, key_BSHK, value_BSHK, position, attention, draws=None, **starts
    ) -> tuple[Array, Array]:
        """Attention, residual and norm.

        Args:
          h_BTD: the layer's input.
          key_BSHK, value_BSHK: context, the block included.
          position: from `keys` of the shared module; here position_LK, in the compute dtype,
            nearest first.
          attention: the operation, or the operation over a mesh.
          draws: of the dropout; None: no dropout.
          **starts: query_start and key_start of the operation.

        Returns:
          The output h_BTD, and as mass_BH the mean share of the weight that lies on persistent
          pairs.
        """
        config = self.config
        query_BTHK = project(self.query[...], self.enter(h_BTD))
        weights = draws.weights(config.dropout) if draws else {}
        operation = functools.partial(attention, implementation=config.implementation, **weights)
        span_H = _at_most(self.span_tokens(), position.shape[0]) if config.adaptive else None
        context = {"position_HLK": position[None], "span_H": span_H, "ramp": config.ramp, **starts}
        pairs = self._pairs(h_BTD.dtype) if config.persistent else {}
        if config.integration in TWO_SOFTMAX_INTEGRATIONS:
            out_BTHK = self._apart(operation, query_BTHK, key_BSHK, value_BSHK, context, pairs)
            mass_BH = jnp.full(
                query_BTHK.shape[::2], 0.5
            )  # two softmaxes weigh the same, whatever is learned
        else:
            arguments = {**context, **pairs, "return_persistent_mass": True}
            out_BTHK, mass_BTH = operation(query_BTHK, key_BSHK, value_BSHK, **arguments)
            mass_BH = mass_BTH.mean(1)
        return self.leave(h_BTD, self.merge(out_BTHK)), mass_BH

    def __call__(self, *inputs: Any, **options: Any) -> tuple[Array, Array]:
        """The whole layer, with the arguments and results of `attend`."""
        return self.attend(*inputs, **options)

    def _pairs(self, dtype: Any) -> dict[str, Array]:
        """Persistent pairs, stored so that the logit is q.key and the value sqrt(N) val; the operation scales both."""
        key_HNK, value_HNK = (
            self.persistent_key[...].astype(dtype),
            self.persistent_value[...].astype(dtype),
        )
        if self.config.integration == "single_head":
            key_HNK, value_HNK = (
                x.transpose(1, 0, 2).reshape(1, x.shape[1], -1) for x in (key_HNK, value_HNK)
            )
        _, N, K = key_HNK.shape
        return {
            "persistent_key_HNK": key_HNK * math.sqrt(K),
            "persistent_value_HNK": value_HNK * math.sqrt(N),
        }

    def _apart(
        self, operation: Callable, query_BTHK, key_BSHK, value_BSHK, context: dict, pairs: dict
    ) -> Array:
        """The context's softmax and the persistent pairs', by a call each."""
        (B, T, H, K), C = query_BTHK.shape, self.config.context_heads
        context_BTHK = operation(query_BTHK[:, :, :C], key_BSHK, value_BSHK, **context)
        heads, _, width = pairs["persistent_key_HNK"].shape
        asking_BTHK = query_BTHK[:, :, C % H :].reshape(
            B, T, heads, width
        )  # all heads, or those beyond the context's
        # No keys, cut from those at hand: from constants alone, XLA cannot compile a shard_map
        # inside a scan.
        nothing_BSHK = key_BSHK[:, :0].reshape(B, 0, heads, width)
        nowhere_HLK = context["position_HLK"][:, :0].reshape(1, 0, width)
        apart_BTHK = operation(
            asking_BTHK, nothing_BSHK, nothing_BSHK, position_HLK=nowhere_HLK, **pairs
        )
        if self.config.integration == "head_split":
            return jnp.concatenate([context_BTHK, apart_BTHK], axis=2)
        return context_BTHK + apart_BTHK.reshape(B, T, H, K)

    def merge(self, out_BTHK: Array) -> Array:
        """The output projection of all heads, as h_BTD."""
        kernel_ED = self.output[...].astype(out_BTHK.dtype).reshape(-1, self.config.width)
        return out_BTHK.reshape(*out_BTHK.shape[:2], -1) @ kernel_ED


class FeedForward(Sublayer):
    """f(h) = W2 g(W1 h + b1) + b2, where g is ReLU or, in `ff_attention`, a softmax over the inner units.

    Dropout acts after g and, at a rate of its own, on f's output.
    """

    def __init__(self, config: "ModelConfig", rngs: nnx.Rngs, output_dropout: float):
        super().__init__(config)
        D, F = config.width, config.feed_forward
        self.inner, self.inner_bias = uniform(rngs, D, D, F), uniform(rngs, D, F)
        self.outer, self.outer_bias = uniform(rngs, F, F, D), uniform(rngs, F, D)
        self.activation = softmax if config.integration == "ff_attention" else jax.nn.relu
        self.output_dropout = output_dropout

    def __call__(self, h_BTD: Array, draws: DropoutSeeds | None) -> Array:
        """The sublayer's output h_BTD."""
        inner_DF, inner_F, outer_FD, outer_D = (
            x[...].astype(h_BTD.dtype)
            for x in (self.inner, self.inner_bias, self.outer, self.outer_bias)
        )
        inner_BTF = self.activation(self.enter(h_BTD) @ inner_DF + inner_F)
        out_BTD = drop(draws, inner_BTF, self.config.dropout) @ outer_FD + outer_D
        return self.leave(h_BTD, drop(draws, out_BTD, self.output_dropout, site=1))


class Transformer(AllAttention):
    """Attention without persistent pairs, and a feed-forward sublayer (arXiv 1905.07799)."""

    INTEGRATIONS: tuple[str, ...] = ("joint", "ff_attention")

    def __init__(self, config: "ModelConfig", rngs: nnx.Rngs, output_dropout: float = 0.0):
        super().__init__(config, rngs)
        self.feed_forward = FeedForward(config, rngs, output_dropout)

    def __call__(self, *inputs: Any, **options: Any) -> tuple[Array, Array]:
        """The whole layer, with the arguments and results of `attend`."""
        h_BTD, mass_BH = self.attend(*inputs, **options)
        return self.feed_forward(h_BTD, options["draws"]), mass_BH


def project(kernel_DHK: Array, states_BSD: Array) -> Array:
    """One product with heads side by side, the layout that kernels read: a TPU would transpose that of an einsum."""
    D, H, K = kernel_DHK.shape
    kernel_DE = kernel_DHK.astype(states_BSD.dtype).reshape(D, H * K)
    return (states_BSD @ kernel_DE).reshape(*states_BSD.shape[:2], H, K)


def lengths(S: int, T: int) -> tuple[int, ...]:
    """The numbers of cached states for whose projection code is compiled: none below a quarter of the block but S.

    Beside a long block a few states more cost less than a choice.
    """
    return tuple(size for size in reach_sizes(S) if size >= T // 4 or size == S)


def last_states(cache_XBSD: Array, x: Array | int, length: int) -> Array:
    """The last `length` cached states of layer x, as cache_BSD."""
    _, B, S, D = cache_XBSD.shape
    return jax.lax.dynamic_slice(cache_XBSD, (x, 0, S - length, 0), (1, B, length, D))[0]


def project_last(S: int, kernels: tuple, cache_BSD: Array, h_BTD: Array) -> tuple:
    """Both projections of cached states and of the block, behind so many zeros that S states come before the block.

    Two products each, since to join the states first, in place of the results, takes longer (3 % of
    a step on a CPU).
    """
    before = S - cache_BSD.shape[1]

    def linear(kernel_DHK: Array) -> Array:
        parts = [project(kernel_DHK, cache_BSD), project(kernel_DHK, h_BTD)]
        return jnp.pad(jnp.concatenate(parts, axis=1), ((0, 0), (before, 0), (0, 0), (0, 0)))

    return tuple(linear(kernel_DHK) for kernel_DHK in kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project_one_of(
    sizes: tuple[int, ...], which: Array, x: Array, kernels: tuple, cache_XBSD: Array, h_BTD: Array
) -> tuple:
    """`project_last` with the chosen one of some lengths of layer x's cache.

    Its gradient is another choice, from the same inputs: differentiating a switch keeps the
      residuals of all branches.
    """

    def of(size: int) -> Callable:
        def branch(x: Array, kernels: tuple, cache_XBSD: Array, h_BTD: Array) -> tuple:
            return project_last(
                cache_XBSD.shape[2], kernels, last_states(cache_XBSD, x, size), h_BTD
            )

        return branch

    return jax.lax.switch(which, [of(size) for size in sizes], x, kernels, cache_XBSD, h_BTD)


def _project_forward(sizes: tuple[int, ...], *inputs: Any) -> tuple[tuple, tuple]:
    return _project_one_of(sizes, *inputs), inputs


def _project_backward(sizes: tuple[int, ...], inputs: tuple, cotangents: tuple) -> tuple:
    def gradient_of(size: int) -> Callable:
        def branch(
            x: Array, kernels: tuple, cache_XBSD: Array, h_BTD: Array, cotangents: tuple
        ) -> tuple:
            S = cache_XBSD.shape[2]
            states_BSD = jnp.concatenate([last_states(cache_XBSD, x, size), h_BTD], axis=1)

            def gradient(linear: Callable, of: Any, first: int) -> Any:
                return jax.vjp(linear, of)[1](tuple(d_BSHK[:, first:] for d_BSHK in cotangents))[0]

            # A kernel's in one product: cache and block apart would be summed over the devices of a
            # mesh apart.
            d_kernels = gradient(
                lambda kernels: tuple(project(k, states_BSD) for k in kernels), kernels, S - size
            )
            return d_kernels, gradient(
                lambda h_BTD: tuple(project(k, h_BTD) for k in kernels), h_BTD, S
            )

        return branch

    which, *arrays = inputs
    kernels, h_BTD = jax.lax.switch(
        which, [gradient_of(size) for size in sizes], *arrays, cotangents
    )
    return None, None, kernels, None, h_BTD


_project_one_of.defvjp(_project_forward, _project_backward)


def _at_most(span_H: Array, L: int) -> Array:
    """Spans within the context bucket, with the gradient of the unclipped ones."""
    return span_H + jax.lax.stop_gradient(jnp.minimum(span_H, L) - span_H)


def softmax(x_BTF: Array) -> Array:
    """Over the last axis, statistics at least in float32, result in the input's dtype."""
    return jax.nn.softmax(x_BTF.astype(jnp.promote_types(x_BTF.dtype, jnp.float32))).astype(
        x_BTF.dtype
    )


@jax.custom_vjp
def layer_norm(h_BTD: Array, scale_D: Array, bias_D: Array) -> Array:
    """Layer normalisation with epsilon 1e-5, statistics at least in float32, result in the input's dtype.

    Nothing but the input is kept for the backward pass.
    """
    x_BTD, _ = _normalised(h_BTD)
    return (x_BTD * scale_D.astype(x_BTD.dtype) + bias_D.astype(x_BTD.dtype)).astype(h_BTD.dtype)


def _normalised(h_BTD: Array) -> tuple[Array, Array]:
    """(h - mean) / sqrt(variance + 1e-5) and the divisor's inverse."""
    x_BTD = h_BTD.astype(jnp.promote_types(h_BTD.dtype, jnp.float32))
    x_BTD = x_BTD - x_BTD.mean(-1, keepdims=True)
    inverse_BT1 = jax.lax.rsqrt(jnp.square(x_BTD).mean(-1, keepdims=True) + 1e-5)
    return x_BTD * inverse_BT1, inverse_BT1


def _layer_norm_forward(
    h_BTD: Array, scale_D: Array, bias_D: Array
) -> tuple[Array, tuple[Array, Array, Array]]:
    return layer_norm(h_BTD, scale_D, bias_D), (h_BTD, scale_D, bias_D)


def _layer_norm_backward(
    given: tuple[Array, Array, Array], d_out_BTD: Array
) -> tuple[Array, Array, Array]:
    h_BTD, scale_D, bias_D = given
    x_BTD, inverse_BT1 = _normalised(h_BTD)
    d_out_BTD = d_out_BTD.astype(x_BTD.dtype)
    d_x_BTD = d_out_BTD * scale_D.astype(x_BTD.dtype)
    d_h_BTD = (
        d_x_BTD
        - d_x_BTD.mean(-1, keepdims=True)
        - x_BTD * (d_x_BTD * x_BTD).mean(-1, keepdims=True)
    )
    d_scale_D, d_bias_D = (d_out_BTD * x_BTD).sum((0, 1)), d_out_BTD.sum((0, 1))
    return (
        (d_h_BTD * inverse_BT1).astype(h_BTD.dtype),
        d_scale_D.astype(scale_D.dtype),
        d_bias_D.astype(bias_D.dtype),
    )


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
