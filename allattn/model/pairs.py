"""Persistent pairs of a layer, and the two ways to attend to them alone.

A layer stores its pairs by heads. They belong to these heads or, if they are wide, side by side to
one head as wide as the model, whose query is the queries of all heads side by side.

    attend_alone    softmax over the pairs                          (arXiv 1907.01470, section 4)
    pattention      GeLU(A / |A| sqrt(N)) over the pairs, A = x K'  (TokenFormer, arXiv 2410.23168)

Dimension key: B batch, T position in the block, S context key, N persistent pair, H head, K head
width, D model width, E all heads side by side, 1 one number.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from allattn.model.norm import normalise_heads
from allattn.model.sublayers import DropoutSeeds, drop

Array = jax.Array

# Added to the norm |A|, as TokenFormer's code in JAX does.
PATTENTION_EPSILON = 1e-5
# The site of pattention's dropout in the seeds of a layer; the others are a feed-forward's and
# Transformer-XL's.
PATTENTION_SITE = 3


class Pairs(NamedTuple):
    """Persistent pairs of a layer in the dtype of the activations, as they are stored."""

    key_HNK: Array
    value_HNK: Array
    # Whether all heads side by side are one head of the pairs.
    wide: bool
    # Offsets of the logits, float32; None: the pairs have none.
    bias_HN: Array | None = None
    # Gains of the norm on what is read from pairs alone; None: there is no norm.
    norm_H: Array | None = None

    def options(self) -> dict[str, Any]:
        """Arguments of the operation that concern the pairs.

        They are stored so that the logit is q.key and the value sqrt(N) val. The operation divides
        every logit by sqrt(K) and takes values as they are, so both factors are applied here.
        """
        key_HNK = self.key_HNK
        value_HNK = self.value_HNK
        if self.wide:
            key_HNK = _side_by_side(key_HNK)
            value_HNK = _side_by_side(value_HNK)
        _, N, K = key_HNK.shape
        return {
            "persistent_key_HNK": key_HNK * math.sqrt(K),
            "persistent_value_HNK": value_HNK * math.sqrt(N),
            "persistent_bias_HN": self.bias_HN,
        }


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Pairs of the same heads in one softmax.

    Args:
      first: arguments of the operation that concern pairs.
      second: the same of others, which have offsets.
    """
    if first["persistent_bias_HN"] is None:
        H, N, _ = first["persistent_key_HNK"].shape
        first = {**first, "persistent_bias_HN": jnp.zeros((H, N), jnp.float32)}
    return {name: jnp.concatenate([x, second[name]], axis=1) for name, x in first.items()}


def attend_alone(
    operation: Any, query_BTHK: Array, key_BSHK: Array, context: dict[str, Any], pairs: Pairs
) -> Array:
    """A softmax over the persistent pairs alone.

    Args:
      operation: `all_attention` with the arguments that every call has.
      query_BTHK: queries of the heads that have pairs.
      key_BSHK: keys of the context, of which none is attended.
      context: arguments of the operation that concern the context.
      pairs: the pairs of these heads.

    Returns:
      What the heads read, as out_BTHK.
    """
    B, T, H, K = query_BTHK.shape
    # The queries of all heads side by side are the one head's query.
    if pairs.wide:
        query_BTHK = query_BTHK.reshape(B, T, 1, H * K)
    _, _, heads, width = query_BTHK.shape
    # No keys, cut from those at hand: from constants alone, XLA cannot compile a shard_map inside
    # a scan.
    no_key_BSHK = key_BSHK[:, :0].reshape(B, 0, heads, width)
    no_position_HLK = context["position_HLK"][:, :0].reshape(1, 0, width)
    out_BTHK = operation(
        query_BTHK,
        no_key_BSHK,
        no_key_BSHK,
        position_HLK=no_position_HLK,
        **pairs.options(),
    )
    return _normalised(out_BTHK, pairs).reshape(B, T, H, K)


def pattention(
    x_BTD: Array, pairs: Pairs, dropout_seeds: DropoutSeeds | None, rate: float
) -> Array:
    """TokenFormer's attention to parameters, which has no heads (arXiv 2410.23168, equation 5).

        A = x K'        out = GeLU(A / |A| sqrt(N)) V

    The norm of a row, |A|^2 = x (K' K) x', is known before any pair is visited, for D^2 products a
    token. Here A is an array, as the inner units of a feed-forward sublayer are, and its norm is
    read from it.

    Args:
      x_BTD: what the sublayer reads.
      pairs: wide pairs without offsets. Keys and values are used as they are stored.
      dropout_seeds: of the layer; None: no dropout.
      rate: of dropping a weight.

    Returns:
      out_BTD.
    """
    B, T, D = x_BTD.shape
    (key_ND,) = _side_by_side(pairs.key_HNK)
    (value_ND,) = _side_by_side(pairs.value_HNK)
    logits_BTN = jnp.einsum("btd,nd->btn", x_BTD, key_ND)

    # The norm at least in float32. Where it is 0 it has no derivative.
    wide_BTN = logits_BTN.astype(jnp.promote_types(x_BTD.dtype, jnp.float32))
    square_BT1 = jnp.square(wide_BTN).sum(-1, keepdims=True)
    norm_BT1 = jnp.sqrt(jnp.maximum(square_BT1, jnp.finfo(wide_BTN.dtype).tiny))
    unit_BTN = wide_BTN / (norm_BT1 + PATTENTION_EPSILON) * math.sqrt(len(key_ND))

    # The weights, which may be negative, and what they read.
    weight_BTN = jax.nn.gelu(unit_BTN, approximate=False).astype(x_BTD.dtype)
    weight_BTN = drop(dropout_seeds, weight_BTN, rate, PATTENTION_SITE)
    out_BTD = jnp.einsum("btn,nd->btd", weight_BTN, value_ND)
    return _normalised(out_BTD[:, :, None], pairs).reshape(B, T, D)


def _normalised(out_BTHK: Array, pairs: Pairs) -> Array:
    """What is read from the pairs alone, after its norm where there is one."""
    if pairs.norm_H is None:
        return out_BTHK
    return normalise_heads(out_BTHK, pairs.norm_H)


def _side_by_side(x_HNK: Array) -> Array:
    """Pairs of all heads as those of one head of width H K, x_1NE."""
    H, N, K = x_HNK.shape
    return x_HNK.transpose(1, 0, 2).reshape(1, N, H * K)
