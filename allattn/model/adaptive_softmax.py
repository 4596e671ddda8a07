"""From tokens to vectors and back to log-probabilities: the only code that knows the vocabulary.

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

Array = jax.Array

LOGITS = 1 << 25  # most logits that exist at once: 128 MiB of them in float32
SMALL_VOCABULARY = 1024  # symbols of a table whose gradient is a product
XL_DEVIATION = 0.02  # of Transformer-XL's initial weights
TAIL_SHARE = (
    1 / 32
)  # of a block's tokens, that a tail takes per round: about as many as it has in running text


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lookup(dtype: jnp.dtype, table_VD: Array, tokens_BT: Array) -> Array:
    """Rows of a table in dtype; the gradient of the table is summed in the table's own dtype.

    A block has a symbol such as the space thousands of times: sums in bfloat16 would stand still at
      256 times the
    summand. A small table's gradient is a product, which unlike a scatter on a GPU does not depend
    on an order.

    Args:
      dtype: of the result.
      table_VD: a vector for each symbol.
      tokens_BT: int32.

    Returns:
      The tokens' vectors, as h_BTD.
    """
    return table_VD[tokens_BT].astype(dtype)


def _lookup_forward(
    dtype: jnp.dtype, table_VD: Array, tokens_BT: Array
) -> tuple[Array, tuple[Array, Array]]:
    return lookup(dtype, table_VD, tokens_BT), (table_VD, tokens_BT)


def _lookup_backward(
    dtype: jnp.dtype, given: tuple[Array, Array], d_h_BTD: Array
) -> tuple[Array, None]:
    table_VD, tokens_BT = given
    if len(table_VD) > SMALL_VOCABULARY:
        return jnp.zeros_like(table_VD).at[tokens_BT].add(d_h_BTD.astype(table_VD.dtype)), None
    chosen_BTV = jax.nn.one_hot(tokens_BT, len(table_VD), dtype=dtype)
    sums: dict[str, Any] = {
        "precision": "highest",
        "preferred_element_type": jnp.promote_types(dtype, table_VD.dtype),
    }
    return jnp.einsum("btv,btd->vd", chosen_BTV, d_h_BTD, **sums).astype(table_VD.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)


def _uniform(rngs: nnx.Rngs, shape: Sequence[int], fan_in: int) -> nnx.Param:
    bound = 1 / math.sqrt(fan_in)
    return nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))


class TokenIO(nnx.Module):
    """Plain input embedding and output softmax, neither tied nor scaled (golden conventions: in_emb, out_emb)."""

    def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs):
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, width)))
        self.kernel = _uniform(rngs, (vocab_size, width), width)
        self.bias = _uniform(rngs, (vocab_size,), width)

    def embed(self, tokens_BT: Array, dtype: jnp.dtype) -> Array:
        """Vectors of tokens, as h_BTD in dtype."""
        return lookup(jnp.dtype(dtype), self.embedding[...], tokens_BT)

    def logits(self, h_BTD: Array) -> Array:
        """Unnormalised log-probabilities of the next token, as logits_BTV, at least in float32."""
        dtype = jnp.promote_types(h_BTD.dtype, jnp.float32)
        logits_BTV = jnp.einsum("btd,vd->btv", h_BTD.astype(dtype), self.kernel[...].astype(dtype))
        return logits_BTV + self.bias[...].astype(dtype)

    def nll(self, h_BTD: Array, targets_BT: Array) -> Array:
        """Negative log-likelihood of the targets in nats, as nll_BT, at least in float32."""
        logits_BTV = self.logits(h_BTD)
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


class AdaptiveIO(nnx.Module):
    """Adaptive input embedding and adaptive softmax (arXiv 1809.10853 and 1609.04309).

    Symbols are numbered by falling frequency and cut into clusters: a head (0) and tails. With P_i
      the projection and
    E_i the embedding of cluster i, d_i = D // division^i wide, and W_i = E_i when tied,

        embed(w) = sqrt(D) P_i E_i[w]
        log p(w) = log softmax([W_0; G] P_0' h + [b_0; g])[w]                                      w
        in the head log p(w) = log softmax([W_0; G] P_0' h + [b_0; g])[tail i] + log softmax(W_i
        P_i' h + b_i)[w]      in tail i

    (golden conventions, "Adaptive input / softmax"; there the tails' columns of the head, rows of G
    and g, come in reverse order). Division 1 needs no projections, and has none.

    Initialisation: embeddings N(0, 1), the rest uniform within 1/sqrt(fan-in), where that of a
      projection is d_i (as
    the golden parameters are; the method page does not name projections). Transformer-XL's: N(0,
    0.02), projections N(0, 0.01), biases 0.
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
        self.bounds = (0, *cutoffs, vocab_size)
        sizes = [high - low for low, high in pairwise(self.bounds)]
        widths = [width // division**i for i in range(len(sizes))]

        def draw(shape: Sequence[int], fan_in: int, deviation: float) -> nnx.Param:
            if xl:
                return nnx.Param(deviation * jax.random.normal(rngs.params(), shape))
            return _uniform(rngs, shape, fan_in)

        def projections(count: int) -> nnx.List:
            return nnx.List(
                [draw((width, d), d, 0.01) for d in widths[:count]] if division > 1 else []
            )

        table = [
            jax.random.normal(rngs.params(), shape) for shape in zip(sizes, widths, strict=True)
        ]
        self.embedding = nnx.List(
            [nnx.Param(XL_DEVIATION * x_nd if xl else x_nd) for x_nd in table]
        )
        self.projection = projections(len(sizes))
        self.bias = nnx.List([draw((n,), d, 0.0) for n, d in zip(sizes, widths, strict=True)])
        if cutoffs:
            self.tail_kernel = draw((len(cutoffs), width), width, XL_DEVIATION)
            self.tail_bias = draw((len(cutoffs),), width, 0.0)
        own = (
            []
            if tied
            else [draw((n, d), d, XL_DEVIATION) for n, d in zip(sizes, widths, strict=True)]
        )
        self.kernel, self.output_projection = (
            nnx.List(own),
            projections(int(xl) if tied else len(sizes)),
        )

    def embed(self, tokens_BT: Array, dtype: jnp.dtype) -> Array:
        """Vectors of tokens, as h_BTD in dtype."""
        width = self.embedding[0].shape[1]
        h_BTD = jnp.zeros((*tokens_BT.shape, width), dtype)
        for i, (low, high) in enumerate(pairwise(self.bounds)):
            inside_BT = (low <= tokens_BT) & (tokens_BT < high)
            row_BT = jnp.where(
                inside_BT, tokens_BT - low, high
            )  # no such row: zeros, and no gradient
            part_BTd = _take(self.embedding[i][...], row_BT).astype(dtype)
            h_BTD += (
                part_BTd @ self.projection[i][...].astype(dtype).T if self.projection else part_BTd
            )
        return h_BTD * math.sqrt(width)

    def logits(self, h_BTD: Array) -> Array:
        """Log-probabilities of the next token, normalised, as logits_BTV, at least in float32."""
        h_PD, words = h_BTD.reshape(-1, h_BTD.shape[-1]), self.bounds[1]
        head_Pn, *tails = (
            jax.nn.log_softmax(_product("pd,nd->pn", x_Pd, kernel_nd) + bias_n)
            for x_Pd, kernel_nd, bias_n in (self._cluster(i, h_PD) for i in range(len(self.bias)))
        )
        tails = [head_Pn[:, words + i, None] + tail_Pn for i, tail_Pn in enumerate(tails)]
        return jnp.concatenate([head_Pn[:, :words], *tails], axis=-1).reshape(*h_BTD.shape[:2], -1)

    def nll(self, h_BTD: Array, targets_BT: Array) -> Array:
        """Negative log-likelihood of the targets in nats, as nll_BT, at least in float32.

        Only the logits that a target needs are computed, and no more than `LOGITS` exist at once,
        in the backward
        pass too: the head takes all tokens, a tail those whose target it holds, both in rounds of a
          fixed number of
        gathered tokens. Shapes are static, while the number of rounds follows the block: one that
        has more tokens in a tail than a round holds takes more rounds, so none is dropped or
        approximated.

        Rows must be local to the device (`sharding.nll_over`), since tokens of all rows are
        gathered together.
        """
        h_PD, target_P, words = (
            h_BTD.reshape(-1, h_BTD.shape[-1]),
            targets_BT.reshape(-1),
            self.bounds[1],
        )
        cluster_P = sum(
            ((target_P >= low).astype(jnp.int32) for low in self.bounds[1:-1]),
            jnp.zeros_like(target_P),
        )
        column_P = jnp.where(target_P < words, target_P, words + cluster_P - 1)
        size = _round_size(len(target_P), words, 1)
        every_Q = jnp.arange(-(-len(target_P) // size) * size)
        nll_P = _nll(size, *self._cluster(0, h_PD), column_P, every_Q, len(every_Q) // size)
        for i, (low, high) in enumerate(pairwise(self.bounds[1:]), 1):
            size = _round_size(len(target_P), high - low, TAIL_SHARE)
            token_Q, rounds = _gathered(cluster_P == i, size)
            nll_P += _nll(size, *self._cluster(i, h_PD), target_P - low, token_Q, rounds)
        return nll_P.reshape(targets_BT.shape)

    def _cluster(self, i: int, h_PD: Array) -> tuple[Array, Array, Array]:
        """Projected states, kernel and biases of a cluster's logits; in the head the tails' columns stand last."""
        kernel_nd, bias_n = (self.kernel or self.embedding)[i][...], self.bias[i][...]
        if i == 0 and len(self.bounds) > 2:
            kernel_nd = jnp.concatenate([kernel_nd, self.tail_kernel[...]])
            bias_n = jnp.concatenate([bias_n, self.tail_bias[...]])
        own = self.output_projection
        projections = own if i < len(own) else self.projection
        x_Pd = h_PD @ projections[i][...].astype(h_PD.dtype) if projections else h_PD
        return x_Pd, kernel_nd, bias_n


def _product(subscripts: str, *arrays: Array) -> Array:
    """An einsum in the dtype of the first array, its sums at least in float32."""
    dtype = arrays[0].dtype
    wide = jnp.promote_types(dtype, jnp.float32)
    return jnp.einsum(subscripts, *(x.astype(dtype) for x in arrays), preferred_element_type=wide)


def _round_size(tokens: int, columns: int, share: float) -> int:
    """Tokens of one round: a share of the block, in equal parts that `LOGITS` allows; multiples of 8, as tiles are."""
    wanted = math.ceil(tokens * share)
    parts = math.ceil(wanted * columns / LOGITS)
    return 8 * math.ceil(wanted / parts / 8)


def _gathered(chosen_P: Array, size: int) -> tuple[Array, Array]:
    """The chosen tokens' indices in order, then P's up to whole rounds, as token_Q, and how many rounds have any."""
    P = len(chosen_P)
    (token_Q,) = jnp.nonzero(chosen_P, size=-(-P // size) * size, fill_value=P)
    return token_Q, -(-chosen_P.sum() // size)


def _take(table: Array, index: Array, fill: float = 0) -> Array:
    """Rows of a table; `fill`, and no gradient, for indices beyond the last."""
    return jnp.take(table, index, axis=0, mode="fill", fill_value=fill)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _nll(
    size: int,
    x_Pd: Array,
    kernel_nd: Array,
    bias_n: Array,
    column_P: Array,
    token_Q: Array,
    rounds: Array,
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
    return _nll_forward(size, x_Pd, kernel_nd, bias_n, column_P, token_Q, rounds)[0]


def _nll_forward(
    size: int, x_Pd, kernel_nd, bias_n, column_P, token_Q, rounds
) -> tuple[Array, tuple]:
    def one_round(number: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        token_C = jax.lax.dynamic_slice_in_dim(token_Q, number * size, size)
        logits_Cn = _product("cd,nd->cn", _take(x_Pd, token_C), kernel_nd) + bias_n
        sum_C = jax.nn.logsumexp(logits_Cn, axis=-1)
        target_C = jnp.take_along_axis(logits_Cn, _take(column_P, token_C)[:, None], axis=-1)[:, 0]
        nll_P, sum_P = found
        return nll_P.at[token_C].set(sum_C - target_C, mode="drop"), sum_P.at[token_C].set(
            sum_C, mode="drop"
        )

    zeros_P = jnp.zeros(len(x_Pd), jnp.promote_types(x_Pd.dtype, jnp.float32))
    nll_P, sum_P = jax.lax.fori_loop(0, rounds, one_round, (zeros_P, zeros_P))
    return nll_P, (x_Pd, kernel_nd, bias_n, column_P, token_Q, rounds, sum_P)


def _nll_backward(size: int, residuals: tuple, nll_bar_P: Array) -> tuple[Any, ...]:
    """The gradient; logits are computed again, and their softmax from the stored sums."""
    x_Pd, kernel_nd, bias_n, column_P, token_Q, rounds, sum_P = residuals

    def one_round(
        number: Array, gradients: tuple[Array, Array, Array]
    ) -> tuple[Array, Array, Array]:
        token_C = jax.lax.dynamic_slice_in_dim(token_Q, number * size, size)
        x_Cd = _take(x_Pd, token_C)
        logits_Cn = _product("cd,nd->cn", x_Cd, kernel_nd) + bias_n
        softmax_Cn = jnp.exp(logits_Cn - _take(sum_P, token_C, jnp.inf)[:, None])
        target_Cn = _take(column_P, token_C)[:, None] == jnp.arange(len(bias_n))
        bar_Cn = (softmax_Cn - target_Cn) * _take(nll_bar_P, token_C)[:, None]
        narrow_Cn = bar_Cn.astype(x_Pd.dtype)
        x_bar_Pd, kernel_bar_nd, bias_bar_n = gradients
        x_bar_Cd = _product("cn,nd->cd", narrow_Cn, kernel_nd).astype(x_Pd.dtype)
        return (
            x_bar_Pd.at[token_C].set(x_bar_Cd, mode="drop"),
            kernel_bar_nd + _product("cn,cd->nd", narrow_Cn, x_Cd).astype(kernel_nd.dtype),
            bias_bar_n + bar_Cn.sum(0).astype(bias_n.dtype),
        )

    zeros = tuple(jnp.zeros_like(array) for array in (x_Pd, kernel_nd, bias_n))
    return *jax.lax.fori_loop(0, rounds, one_round, zeros), None, None, None


_nll.defvjp(_nll_forward, _nll_backward)
