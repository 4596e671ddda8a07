"""From tokens to vectors and back to log-probabilities, over the whole vocabulary at once.

Beside adaptive_softmax.py this is the only code that knows the vocabulary. Both classes have the
same members: `embed`, `logits` and `nll`.

Dimension key: B batch, T position, D model width, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from allattn.model.sublayers import uniform

Array = jax.Array

# Most symbols of a table whose gradient is a product.
SMALL_VOCABULARY = 1024


class TokenIO(nnx.Module):
    """Plain input embedding and output softmax, neither tied nor scaled."""

    def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs):
        # The order is that of the draws: a run is repeated from its seed.
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, width)))
        self.kernel = uniform(rngs, width, vocab_size, width)
        self.bias = uniform(rngs, width, vocab_size)

    def embed(self, tokens_BT: Array, dtype: jnp.dtype) -> Array:
        """Vectors of tokens, as h_BTD in dtype."""
        return lookup(jnp.dtype(dtype), self.embedding[...], tokens_BT)

    def logits(self, h_BTD: Array) -> Array:
        """Unnormalised log-probabilities of the next token, as logits_BTV, at least in float32."""
        # The loss is at least in float32, whatever the activations are in.
        dtype = jnp.promote_types(h_BTD.dtype, jnp.float32)
        logits_BTV = jnp.einsum("btd,vd->btv", h_BTD.astype(dtype), self.kernel[...].astype(dtype))
        return logits_BTV + self.bias[...].astype(dtype)

    def nll(self, h_BTD: Array, targets_BT: Array) -> Array:
        """Negative log-likelihood of the targets in nats, as nll_BT, at least in float32."""
        # -log softmax at the target: the log of the sum, less the target's logit.
        logits_BTV = self.logits(h_BTD)
        target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT


# --- rows of a table, with a gradient of their own


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def lookup(dtype: jnp.dtype, table_VD: Array, tokens_BT: Array) -> Array:
    """Rows of a table in dtype; the gradient of the table is summed in the table's own dtype.

    A symbol such as the space occurs thousands of times in a block: a sum in bfloat16 would stop
    growing at 256 times the summand. The gradient of a small table is a product, which on a GPU,
    unlike a scatter, does not depend on an order.

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
    dtype: jnp.dtype, inputs: tuple[Array, Array], d_h_BTD: Array
) -> tuple[Array, None]:
    table_VD, tokens_BT = inputs
    # A large table: add every token's gradient to its row.
    if len(table_VD) > SMALL_VOCABULARY:
        return jnp.zeros_like(table_VD).at[tokens_BT].add(d_h_BTD.astype(table_VD.dtype)), None

    # A small one: a product with the tokens' one-hot rows, summed in the wider of both dtypes.
    one_hot_BTV = jax.nn.one_hot(tokens_BT, len(table_VD), dtype=dtype)
    sums: dict[str, Any] = {
        "precision": "highest",
        "preferred_element_type": jnp.promote_types(dtype, table_VD.dtype),
    }
    d_table_VD = jnp.einsum("btv,btd->vd", one_hot_BTV, d_h_BTD, **sums)
    return d_table_VD.astype(table_VD.dtype), None


lookup.defvjp(_lookup_forward, _lookup_backward)
