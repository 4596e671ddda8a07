"""Streaming generation with a key/value cache no longer than the spans need; constant time per token.

Dimension key: X layer, B batch (one), T position in the block, S cached position, E all heads side
by side, V vocabulary.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from allattn.errors import UserError
from allattn.evaluation.scoring import context_length
from allattn.model import KeyValue, Model, Params

Array = jax.Array

SLACK = 256  # free places in the cache: it is shifted once per this many tokens
PROMPT_BLOCK = 64


class Sampling(NamedTuple):
    """How the next symbol is drawn."""

    temperature: float = 1.0  # 0: always the likeliest
    top_k: int = 0  # only the k likeliest; 0: all
    top_p: float = 1.0  # only the likeliest that together reach this probability


def generate(
    model: Model,
    params: Params,
    prompt: np.ndarray,
    length: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
) -> Iterator[int]:
    """Continue a prompt, one symbol at a time.

    Args:
      model: the network.
      params: its parameters.
      prompt: int ids, (P,), at least one.
      length: symbols to draw.
      sampling: temperature, top-k and top-p.
      seed: of the draws.

    Yields:
      The id of each symbol as it is drawn.

    Raises:
      UserError: empty prompt, or a sampling option out of range.
    """
    if len(prompt) == 0:
        raise UserError("--prompt: expected at least one symbol to start from, found none")
    if (
        not sampling.temperature >= 0
        or sampling.top_k < 0
        or not 0 < sampling.top_p <= 1
        or length < 0
    ):
        found = f"temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}, length {length}"
        raise UserError(
            f"expected temperature, top_k and length of at least 0 and top_p in (0, 1], found {found}"
        )
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed: expected a number from 0 to 2^63 - 1, found {seed}")
    return _stream(
        model, params, np.asarray(prompt, np.int32), length, sampling, jax.random.key(seed)
    )


def _stream(
    model, params, prompt: np.ndarray, length: int, sampling: Sampling, key: Array
) -> Iterator[int]:
    model = model.windowed(model.config.limit)
    context = context_length(model, params)
    cache, position, read = model.empty_key_value(1, context + SLACK), context, 0
    blocks = [
        prompt[i : i + PROMPT_BLOCK]
        for i in range(0, len(prompt) // PROMPT_BLOCK * PROMPT_BLOCK, PROMPT_BLOCK)
    ]
    blocks += [prompt[i : i + 1] for i in range(len(blocks) * PROMPT_BLOCK, len(prompt))]
    for drawn in range(length):
        for block in blocks:
            if position + len(block) > context + SLACK:
                cache, position = _make_room(cache, context, position), context
            tokens_BT = jnp.asarray(block)[None]
            cache, logits_V = advance(model, params, cache, tokens_BT, position, read)
            position, read = position + len(block), read + len(block)
        token = draw(logits_V, jax.random.fold_in(key, drawn), sampling)
        yield int(token)
        blocks = [np.asarray(token, np.int32)[None]]


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    model: Model, params: Params, cache: KeyValue, tokens_BT, position, before
) -> tuple[KeyValue, Array]:
    """Read a block at `position` of the cache, after `before` tokens: the extended cache and the next logits_V."""
    network = model.bind(params)
    forward = network.cached_forward(tokens_BT, cache, position, before=before)

    def write(old_XBSE: Array, new_XBTE: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old_XBSE, new_XBTE, position, 2)

    logits_BTV = network.io.logits(forward.hidden_BTD[:, -1:])
    return jax.tree.map(write, cache, forward.new), logits_BTV[0, 0]


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _make_room(cache: KeyValue, context: int, position: Array) -> KeyValue:
    """Move the last `context` entries to the front."""
    return jax.tree.map(
        lambda c: c.at[:, :, :context].set(
            jax.lax.dynamic_slice_in_dim(c, position - context, context, 2)
        ),
        cache,
    )


@functools.partial(jax.jit, static_argnums=2)
def draw(logits_V: Array, key: Array, sampling: Sampling) -> Array:
    """Draw one symbol from logits_V, after temperature, then top-k, then top-p."""
    if sampling.temperature == 0:
        return jnp.argmax(logits_V)
    logits_V = (logits_V - jnp.max(logits_V)) / max(
        sampling.temperature, 1e-30
    )  # finite however cold
    sorted_V = jnp.sort(logits_V)[::-1]
    smallest = sorted_V[min(sampling.top_k or len(sorted_V), len(sorted_V)) - 1]
    sorted_V = jnp.where(sorted_V >= smallest, sorted_V, -jnp.inf)
    before_V = jnp.cumsum(jax.nn.softmax(sorted_V)) - jax.nn.softmax(
        sorted_V
    )  # probability of the likelier ones
    smallest = jnp.min(jnp.where(before_V < sampling.top_p, sorted_V, jnp.inf))
    return jax.random.categorical(key, jnp.where(logits_V >= smallest, logits_V, -jnp.inf))
