"""Adaptive input and adaptive softmax: rare symbols have narrow vectors and are seldom computed.

A vocabulary of words has hundreds of thousands of symbols, most of them rare: the logits of one
block of WikiText-103 (267,735 words, 8,192 tokens) would be 8.8 GB in float32. Adaptive softmax
(Grave et al. 2017, arXiv 1609.04309) numbers symbols by falling frequency and cuts them into
clusters. The first is the head, whose softmax also has one column for each other cluster, a tail:

    symbols       0 ............ c1 ............ c2 .................. V
    head          | n0 columns, one for tail 1, one for tail 2 |
    tail 1                       | n1 columns    |
    tail 2                                       | n2 columns          |

A token needs the head's logits and, if its target lies in a tail, those of that tail. Adaptive
input (Baevski and Auli 2019, arXiv 1809.10853) uses the same clusters, tail vectors being
narrower, and ties the output to the input.

The loss is computed in rounds. Shapes are static, but how many tokens of a block have targets in a
tail is known only at run time. A round takes a fixed number of such tokens, gathered from the
block, and a loop makes as many rounds as the block needs: no token is dropped, nothing is
approximated, and a tail that no token visits costs nothing. The backward pass makes the same
rounds and computes the logits again, so that no more than `LOGITS` of them exist at once.

`test_rounds_change_nothing` (tests/model/test_adaptive_io.py) compares losses and gradients with
those from all logits, `test_memory` holds the memory, and test_golden.py the authors' numbers.

Dimension key: B batch, T position, P token of the block (B x T), Q token in rounds (P padded), C
token of one round, D model width, V vocabulary, d width of a cluster's vectors, n columns of a
cluster (its symbols; in the head also one for each tail).
"""

import functools
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.model.sublayers import uniform

Array = jax.Array

# Most logits that exist at once: 128 MiB of them in float32.
LOGITS = 1 << 25
# Share of a block's tokens that a tail takes per round: about as many as it has in running text.
TAIL_SHARE = 1 / 32
# Deviations of Transformer-XL's initial weights, and of its clusters' projections.
XL_DEVIATION = 0.02
XL_PROJECTION_DEVIATION = 0.01


class AdaptiveIO(nnx.Module):
    """Adaptive input embedding and adaptive softmax.

    Cluster i has an embedding E_i and its projection P_i, and for the output a kernel W_i, a
    projection O_i and biases b_i, of which W_i = E_i and O_i = P_i when tied. G and g are the
    kernel and biases of the tails' columns in the head, and ' is the transpose:

        embed(w) = sqrt(D) P_i E_i[w]
        head(h)  = log softmax([W_0; G] O_0' h + [b_0; g])
        log p(w) = head(h)[w]                                                 for w in the head
        log p(w) = head(h)[tail i] + log softmax(W_i O_i' h + b_i)[w]         for w in tail i

    Vectors of cluster i are d_i = D // division^i wide. Division 1 needs no projections, and has
    none. docs/method.md, "Adaptive input and softmax"; initial values: `Model.init`.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        rngs: nnx.Rngs,
        *,
        cutoffs: Sequence[int],
        division: int,
        tied: bool,
        xl: bool = False,
    ):
        """Draw the parameters.

        Args:
          vocab_size: V.
          width: D.
          rngs: source of the draws.
          cutoffs: first symbol of each tail, increasing; may be empty.
          division: factor by which each cluster is narrower than the one before.
          tied: the output uses the embeddings and projections of the input.
          xl: Transformer-XL's initialisation, and an output projection of its own for the head
            though tied.
        """
        # First symbol of each cluster, and the end.
        self.bounds = (0, *cutoffs, vocab_size)
        sizes = [high - low for low, high in pairwise(self.bounds)]
        widths = [width // division**i for i in range(len(sizes))]
        clusters = list(zip(sizes, widths, strict=True))

        def draw(shape: Sequence[int], fan_in: int, deviation: float) -> nnx.Param:
            if xl:
                return nnx.Param(deviation * jax.random.normal(rngs.params(), shape))
            return uniform(rngs, fan_in, *shape)

        def draw_embedding(n: int, d: int) -> nnx.Param:
            embedding_nd = jax.random.normal(rngs.params(), (n, d))
            if xl:
                embedding_nd = XL_DEVIATION * embedding_nd
            return nnx.Param(embedding_nd)

        def draw_projections(count: int) -> nnx.List:
            if division == 1:
                return nnx.List([])
            return nnx.List([draw((width, d), d, XL_PROJECTION_DEVIATION) for d in widths[:count]])

        # Input, and what a tied output shares with it. The order, here and below, is that of the
        # draws: a run is repeated from its seed.
        self.embedding = nnx.List([draw_embedding(n, d) for n, d in clusters])
        self.projection = draw_projections(len(clusters))

        # Output.
        self.bias = nnx.List([draw((n,), d, 0.0) for n, d in clusters])
        if cutoffs:
            self.tail_kernel = draw((len(cutoffs), width), width, XL_DEVIATION)
            self.tail_bias = draw((len(cutoffs),), width, 0.0)

        # What a tied output takes from the input is not stored. Transformer-XL's head takes only
        # the embedding.
        kernels: list[nnx.Param] = []
        own_projections = len(clusters)
        if tied:
            own_projections = 1 if xl else 0
        else:
            kernels = [draw((n, d), d, XL_DEVIATION) for n, d in clusters]
        self.kernel = nnx.List(kernels)
        self.output_projection = draw_projections(own_projections)

    def embed(self, tokens_BT: Array, dtype: jnp.dtype) -> Array:
        """Vectors of tokens, as h_BTD in dtype."""
        width = self.embedding[0].shape[1]
        h_BTD = jnp.zeros((*tokens_BT.shape, width), dtype)
        for i, (low, high) in enumerate(pairwise(self.bounds)):
            # A token of another cluster looks up a row that does not exist: zeros, no gradient.
            inside_BT = (low <= tokens_BT) & (tokens_BT < high)
            row_BT = jnp.where(inside_BT, tokens_BT - low, high)
            part_BTd = _take(self.embedding[i][...], row_BT).astype(dtype)
            if self.projection:
                part_BTd = part_BTd @ self.projection[i][...].astype(dtype).T
            h_BTD += part_BTd
        return h_BTD * math.sqrt(width)

    def logits(self, h_BTD: Array) -> Array:
        """Log-probabilities of the next token, normalised, as logits_BTV, at least in float32."""
        B, T, D = h_BTD.shape
        h_PD = h_BTD.reshape(B * T, D)

        # The softmax of every cluster.
        clusters = []
        for i in range(len(self.bias)):
            x_Pd, kernel_nd, bias_n = self._cluster(i, h_PD)
            clusters.append(jax.nn.log_softmax(_product("pd,nd->pn", x_Pd, kernel_nd) + bias_n))
        head_Pn = clusters[0]

        # A symbol of a tail: the probability of the tail, and of the symbol within it.
        symbols = self.bounds[1]
        tails = [head_Pn[:, symbols + i, None] + tail_Pn for i, tail_Pn in enumerate(clusters[1:])]
        logits_PV = jnp.concatenate([head_Pn[:, :symbols], *tails], axis=-1)
        return logits_PV.reshape(B, T, -1)

    def nll(self, h_BTD: Array, targets_BT: Array) -> Array:
        """Negative log-likelihood of the targets, in rounds (the head of this file).

        Rows must be local to the device (`sharding.nll_over`), since tokens of all rows are
        gathered together.

        Args:
          h_BTD: final hidden states.
          targets_BT: int32.

        Returns:
          nll_BT in nats, at least in float32.
        """
        h_PD = h_BTD.reshape(-1, h_BTD.shape[-1])
        target_P = targets_BT.reshape(-1)
        P = len(target_P)
        symbols = self.bounds[1]

        # The cluster of every target, and its column in the head: its own or that of its tail.
        cluster_P = jnp.zeros_like(target_P)
        for low in self.bounds[1:-1]:
            cluster_P = cluster_P + (target_P >= low).astype(jnp.int32)
        column_P = jnp.where(target_P < symbols, target_P, symbols + cluster_P - 1)

        # The head takes all tokens.
        size = _round_size(P, symbols, 1)
        rounds = -(-P // size)
        every_Q = jnp.arange(rounds * size)
        nll_P = _nll(size, *self._cluster(0, h_PD), column_P, every_Q, rounds)

        # A tail takes those whose target it holds.
        for i, (low, high) in enumerate(pairwise(self.bounds[1:]), 1):
            size = _round_size(P, high - low, TAIL_SHARE)
            token_Q, tail_rounds = _gathered(cluster_P == i, size)
            nll_P += _nll(size, *self._cluster(i, h_PD), target_P - low, token_Q, tail_rounds)
        return nll_P.reshape(targets_BT.shape)

    def _cluster(self, i: int, h_PD: Array) -> tuple[Array, Array, Array]:
        """Projected states x_Pd, kernel_nd and bias_n of a cluster's logits."""
        # When tied there are no kernels, and the embeddings serve as such.
        kernels = self.kernel or self.embedding
        kernel_nd = kernels[i][...]
        bias_n = self.bias[i][...]
        # In the head the tails' columns come last.
        if i == 0 and len(self.bounds) > 2:
            kernel_nd = jnp.concatenate([kernel_nd, self.tail_kernel[...]])
            bias_n = jnp.concatenate([bias_n, self.tail_bias[...]])

        # The output's own projection, or else the input's; with division 1 there is neither.
        projections = self.projection
        if i < len(self.output_projection):
            projections = self.output_projection
        x_Pd = h_PD
        if projections:
            x_Pd = h_PD @ projections[i][...].astype(h_PD.dtype)
        return x_Pd, kernel_nd, bias_n


# --- rounds


def _round_size(tokens: int, columns: int, share: float) -> int:
    """Tokens of one round: a multiple of 8, as tiles are.

    Args:
      tokens: of the block.
      columns: logits of one token.
      share: of the block's tokens that a round should take. It takes fewer where `LOGITS` requires
        more rounds, which are then of equal size.
    """
    wanted = math.ceil(tokens * share)
    parts = math.ceil(wanted * columns / LOGITS)
    return 8 * math.ceil(wanted / parts / 8)


def _gathered(chosen_P: Array, size: int) -> tuple[Array, Array]:
    """Indices of the chosen tokens, and how many rounds have any.

    Args:
      chosen_P: bool.
      size: tokens of one round.

    Returns:
      token_Q in whole rounds, in order, P where there is no token left; and the number of rounds.
    """
    P = len(chosen_P)
    most_rounds = -(-P // size)
    (token_Q,) = jnp.nonzero(chosen_P, size=most_rounds * size, fill_value=P)
    return token_Q, -(-chosen_P.sum() // size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(
    size: int,
    x_Pd: Array,
    kernel_nd: Array,
    bias_n: Array,
    column_P: Array,
    token_Q: Array,
    rounds: Array | int,
) -> Array:
    """Negative log-likelihood of a softmax, as nll_P; 0 for tokens that no round takes.

    Args:
      size: C, tokens of one round.
      x_Pd: states.
      kernel_nd: weights.
      bias_n: biases.
      column_P: targets; those of tokens that no round takes are not looked at.
      token_Q: tokens of the rounds one after another; P and above: none.
      rounds: how many of the rounds to make, int32.
    """
    nll_P, _ = _nll_forward(size, x_Pd, kernel_nd, bias_n, column_P, token_Q, rounds)
    return nll_P


def _nll_forward(
    size: int,
    x_Pd: Array,
    kernel_nd: Array,
    bias_n: Array,
    column_P: Array,
    token_Q: Array,
    rounds: Array | int,
) -> tuple[Array, tuple]:
    def one_round(number: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        token_C = jax.lax.dynamic_slice_in_dim(token_Q, number * size, size)
        logits_Cn = _product("cd,nd->cn", _take(x_Pd, token_C), kernel_nd) + bias_n
        sum_C = jax.nn.logsumexp(logits_Cn, axis=-1)
        target_C = jnp.take_along_axis(logits_Cn, _take(column_P, token_C)[:, None], axis=-1)[:, 0]

        # Where a round has no token left, its index lies beyond the block and nothing is written.
        nll_P, sum_P = sums
        nll_P = nll_P.at[token_C].set(sum_C - target_C, mode="drop")
        sum_P = sum_P.at[token_C].set(sum_C, mode="drop")
        return nll_P, sum_P

    zeros_P = jnp.zeros(len(x_Pd), jnp.promote_types(x_Pd.dtype, jnp.float32))
    nll_P, sum_P = jax.lax.fori_loop(0, rounds, one_round, (zeros_P, zeros_P))
    # Of the forward pass, the backward pass needs one number per token.
    return nll_P, (x_Pd, kernel_nd, bias_n, column_P, token_Q, rounds, sum_P)


def _nll_backward(size: int, residuals: tuple, d_nll_P: Array) -> tuple[Any, ...]:
    """Gradients of states, kernel and biases: softmax - one-hot target, times the incoming one."""
    x_Pd, kernel_nd, bias_n, column_P, token_Q, rounds, sum_P = residuals

    def one_round(
        number: Array, gradients: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        # The logits again, and their softmax from the stored log-sums. Where a round has no token
        # left, the sum is infinite and the softmax 0.
        token_C = jax.lax.dynamic_slice_in_dim(token_Q, number * size, size)
        x_Cd = _take(x_Pd, token_C)
        logits_Cn = _product("cd,nd->cn", x_Cd, kernel_nd) + bias_n
        softmax_Cn = jnp.exp(logits_Cn - _take(sum_P, token_C, jnp.inf)[:, None])
        target_Cn = _take(column_P, token_C)[:, None] == jnp.arange(len(bias_n))
        d_logits_Cn = (softmax_Cn - target_Cn) * _take(d_nll_P, token_C)[:, None]

        # Products are in the dtype of the states, sums at least in float32.
        narrow_Cn = d_logits_Cn.astype(x_Pd.dtype)
        d_x_Pd, d_kernel_nd, d_bias_n = gradients
        d_x_Cd = _product("cn,nd->cd", narrow_Cn, kernel_nd).astype(x_Pd.dtype)
        d_x_Pd = d_x_Pd.at[token_C].set(d_x_Cd, mode="drop")
        d_kernel_nd += _product("cn,cd->nd", narrow_Cn, x_Cd).astype(kernel_nd.dtype)
        d_bias_n += d_logits_Cn.sum(0).astype(bias_n.dtype)
        return d_x_Pd, d_kernel_nd, d_bias_n

    zeros = (jnp.zeros_like(x_Pd), jnp.zeros_like(kernel_nd), jnp.zeros_like(bias_n))
    d_x_Pd, d_kernel_nd, d_bias_n = jax.lax.fori_loop(0, rounds, one_round, zeros)
    # No gradient of targets, tokens and number of rounds.
    return d_x_Pd, d_kernel_nd, d_bias_n, None, None, None


_nll.defvjp(_nll_forward, _nll_backward)


# --- products and rows


def _product(subscripts: str, x: Array, kernel: Array) -> Array:
    """An einsum in the dtype of the first array, its sums at least in float32."""
    wide = jnp.promote_types(x.dtype, jnp.float32)
    kernel = kernel.astype(x.dtype)
    return jnp.einsum(subscripts, x, kernel, preferred_element_type=wide)


def _take(table: Array, index: Array, fill: float = 0) -> Array:
    """Rows of a table; `fill`, and no gradient, for indices beyond the last."""
    return jnp.take(table, index, axis=0, mode="fill", fill_value=fill)
