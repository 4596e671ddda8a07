"""Generation, symbol by symbol, in constant time and memory per symbol.

A key/value cache holds the `context` positions that any head can look back to, and SLACK free ones:

    |<------ context ------>|<------ SLACK ------>|
    | older positions       | newer | free        |
                                    ^ position: where the next block is written

When no block fits any more, the last `context` positions move to the front; that is one copy per
SLACK symbols, where shifting at each symbol would be a copy per symbol. The prompt is read in
blocks of PROMPT_BLOCK and its rest one symbol at a time, so that two programs are compiled whatever
the lengths of prompt and text. Held by tests/evaluation/test_generate.py: logits equal those of the
training pass across shifts, and nothing is compiled again.

Dimension key: X layer, B batch (one), T position in the block, S cached position, E all heads side
by side, D model width, V vocabulary.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from allattn.config_checks import SEEDS
from allattn.errors import UserError
from allattn.evaluation.scoring import scoring_context
from allattn.model import KeyValue, Model, Params

Array = jax.Array

# Free positions in the cache: it is shifted once per this many tokens.
SLACK = 256
# Tokens of the prompt that are read at once.
PROMPT_BLOCK = 64
# Below it a temperature would divide by zero; the draw is then the likeliest symbol anyway.
LEAST_TEMPERATURE = 1e-30


class Sampling(NamedTuple):
    """How the next symbol is drawn.

    Args:
      temperature: logits are divided by it; 0: always the likeliest symbol.
      top_k: only so many of the likeliest; 0: all.
      top_p: only the likeliest that together reach this probability.

    Returns:
      What `Run.generate` takes as `sampling`.

    Example:
      >>> run = allattn.load(workdir)
      >>> pieces = run.generate("a", length=3, sampling=allattn.Sampling(temperature=0))
      >>> len(list(pieces))
      3
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def generate(
    model: Model,
    params: Params,
    prompt: np.ndarray,
    length: int,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[int]:
    """Continue a prompt, one symbol at a time.

    Args:
      model: the network.
      params: its parameters.
      prompt: int ids, (P,), at least one.
      length: symbols to draw.
      sampling: temperature, top-k and top-p.
      seed: of the draws.
      progress: called with the symbols that have been read, and those to read in all.

    Yields:
      The id of each symbol as it is drawn.

    Raises:
      UserError: empty prompt, or a sampling option out of range.
    """
    # Checked here and not in the generator, which would only refuse when it is first asked.
    _check(prompt, length, sampling, seed)
    ids = np.asarray(prompt, np.int32)
    return _stream(model, params, ids, length, sampling, jax.random.key(seed), progress)


def _check(prompt: np.ndarray, length: int, sampling: Sampling, seed: int) -> None:
    if len(prompt) == 0:
        raise UserError("--prompt: expected at least one symbol to start from, found none")
    # Written so that a temperature or top_p that is not a number is refused as well.
    in_range = (
        sampling.temperature >= 0
        and sampling.top_k >= 0
        and 0 < sampling.top_p <= 1
        and length >= 0
    )
    if not in_range:
        raise UserError(
            "expected temperature, top_k and length of at least 0 and top_p in (0, 1], "
            f"found temperature {sampling.temperature}, top_k {sampling.top_k}, "
            f"top_p {sampling.top_p}, length {length}"
        )
    if not 0 <= seed < SEEDS:
        raise UserError(f"--seed: expected a whole number from 0 to {SEEDS - 1}, found {seed}")


def _stream(
    model: Model,
    params: Params,
    prompt: np.ndarray,
    length: int,
    sampling: Sampling,
    key: Array,
    progress: Callable[[int, int], None],
) -> Iterator[int]:
    # Every query sees equally many distances, wherever in a block it stands.
    model = model.windowed(model.config.limit)
    context = scoring_context(model, params)
    # The first symbols attend to an empty context, as training begins.
    cache = model.empty_key_value(1, context + SLACK)
    position = context
    # Tokens read so far; Transformer-XL attends to no cache entry before the first.
    read = 0
    blocks = _prompt_blocks(prompt)
    for drawn in range(length):
        # Read what has not been read: the prompt at first, then the symbol drawn last.
        for block in blocks:
            # Where a block does not fit any more, the context moves to the front.
            if position + len(block) > context + SLACK:
                cache = _make_room(cache, context, position)
                position = context
            tokens_BT = jnp.asarray(block)[None]
            cache, logits_V = advance(model, params, cache, tokens_BT, position, read)
            position += len(block)
            read += len(block)
            progress(read, len(prompt) + length - 1)

        # A key per symbol, so that a seed gives the same text whatever its length.
        token = draw(logits_V, jax.random.fold_in(key, drawn), sampling)
        yield int(token)
        # It is read only when another symbol is asked for.
        blocks = [np.asarray(token, np.int32)[None]]


def _prompt_blocks(prompt: np.ndarray) -> list[np.ndarray]:
    """The prompt as whole blocks, then its rest one symbol at a time."""
    whole = len(prompt) // PROMPT_BLOCK * PROMPT_BLOCK
    blocks = [prompt[i : i + PROMPT_BLOCK] for i in range(0, whole, PROMPT_BLOCK)]
    singles = [prompt[i : i + 1] for i in range(whole, len(prompt))]
    return blocks + singles


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def advance(
    model: Model, params: Params, cache: KeyValue, tokens_BT: Array, position: Array, before: Array
) -> tuple[KeyValue, Array]:
    """Read a block and predict what follows it.

    Args:
      model: the network.
      params: its parameters.
      cache: keys and values, XBSE. It is donated.
      tokens_BT: ids of the block, int32.
      position: of the cache, where the block is written, int32.
      before: tokens read so far, int32.

    Returns:
      The extended cache, and logits_V of the next symbol.
    """
    network = model.bind(params)
    forward = network.cached_forward(tokens_BT, cache, position, before=before)

    def write(old_XBSE: Array, new_XBTE: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(old_XBSE, new_XBTE, position, 2)

    # Only the last position predicts something new.
    logits_BTV = network.io.logits(forward.hidden_BTD[:, -1:])
    return jax.tree.map(write, cache, forward.new), logits_BTV[0, 0]


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _make_room(cache: KeyValue, context: int, position: Array) -> KeyValue:
    """Move the last `context` entries to the front."""

    def move(entries_XBSE: Array) -> Array:
        begin = position - context
        last_XBSE = jax.lax.dynamic_slice_in_dim(entries_XBSE, begin, context, 2)
        return entries_XBSE.at[:, :, :context].set(last_XBSE)

    return jax.tree.map(move, cache)


@functools.partial(jax.jit, static_argnums=2)
def draw(logits_V: Array, key: Array, sampling: Sampling) -> Array:
    """Draw one symbol, after temperature, then top-k, then top-p.

    Args:
      logits_V: unnormalised log-probabilities.
      key: a random key.
      sampling: temperature, top-k and top-p; each choice is compiled.

    Returns:
      The id, an int32 scalar.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_V)
    # The largest logit becomes 0, so that the others stay finite however cold it is.
    logits_V = (logits_V - jnp.max(logits_V)) / max(sampling.temperature, LEAST_TEMPERATURE)

    # Top-k: the k-th largest logit is the smallest that is kept; ties with it are kept, too.
    sorted_V = jnp.sort(logits_V)[::-1]
    kept = len(sorted_V)
    if sampling.top_k > 0:
        kept = min(sampling.top_k, kept)
    smallest = sorted_V[kept - 1]
    sorted_V = jnp.where(sorted_V >= smallest, sorted_V, -jnp.inf)

    # Top-p: a symbol is kept while the likelier ones together have not reached p.
    reached_V = jnp.cumsum(jax.nn.softmax(sorted_V))
    before_V = reached_V - jax.nn.softmax(sorted_V)
    smallest = jnp.min(jnp.where(before_V < sampling.top_p, sorted_V, jnp.inf))
    return jax.random.categorical(key, jnp.where(logits_V >= smallest, logits_V, -jnp.inf))
