"""From tokens to vectors and back to log-probabilities: the only code that knows the vocabulary.

Dimension key: B batch, T position, D model width, V vocabulary.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

Array = jax.Array


class TokenIO(nnx.Module):
    """Plain input embedding and output softmax, neither tied nor scaled (golden conventions: in_emb, out_emb)."""

    def __init__(self, vocab_size: int, width: int, rngs: nnx.Rngs):
        bound = 1 / math.sqrt(width)
        self.embedding = nnx.Param(jax.random.normal(rngs.params(), (vocab_size, width)))
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), (vocab_size, width), minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (vocab_size,), minval=-bound, maxval=bound))

    def embed(self, tokens_BT: Array, dtype: jnp.dtype) -> Array:
        """Vectors of tokens, as h_BTD in dtype."""
        return self.embedding[...].astype(dtype)[tokens_BT]

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
