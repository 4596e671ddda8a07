"""Scores of a split: the sums that an evaluation protocol asks for, and what is reported of them.

The plan of a protocol (`protocols.py`) is carried out block by block. The cache of keys and values
holds the last `context` positions; the block's own are appended while it is scored:

    cache, as S        |<----- context ----->|<- block ->|
    before a block     | earlier positions   | zeros     |
    while it is scored | earlier positions   | its own   |   attention sees both
    after it           | the last of both    | zeros     |   shifted left by a block

Dimension key: X layer, R row of parallel work, B batch (the rows), T position in the block, S
cached position, E all heads side by side, D model width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from allattn import sharding
from allattn.attention.span import TRIM_STEP
from allattn.data import Vocabulary
from allattn.data.stream import TokenSource
from allattn.errors import PreemptedError
from allattn.evaluation.protocols import (
    Lengths,
    Plan,
    authors_plan,
    check_protocol,
    full_plan,
    xl_plan,
)
from allattn.evaluation.scores import metrics_of, perplexity
from allattn.model import KeyValue, Model, Params

Array = jax.Array

# The context is rounded up to a multiple of this many positions, so that networks whose spans
# differ a little share compiled code.
CONTEXT_STEP = 64


class Total(NamedTuple):
    """Sums over scored targets."""

    # Negative log-likelihood of all of them, nats.
    nll: Any
    # The same of those that are not the end of a line, and how many they are; 0 where symbols are
    # not words.
    word_nll: Any
    words: Any


# --- a split -----------------------------------------------------------------------------------


def evaluate_tokens(
    model: Model,
    params: Params,
    tokens: TokenSource,
    *,
    protocol: str,
    block: int,
    rows: int = 8,
    lengths: Lengths = Lengths(80, 2100, 820),
    mesh: Mesh,
    vocabulary: Vocabulary | None = None,
    bytes_per_token: float = 1.0,
    stop: Callable[[], bool] = lambda: False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, float]:
    """Score a split.

    Args:
      model: the network.
      params: its parameters.
      tokens: ids of the split, (T,).
      protocol: "authors", "full" or "xl" (docs/method.md, "Evaluation protocols").
      block: tokens read at once; part of the definition of `authors`, without effect on the others.
      rows: rows that share the work of `full`; without effect on the result beyond rounding.
      lengths: of `xl`.
      mesh: devices that the rows are spread over; holds the parameters.
      vocabulary: where its symbols are words, `ppl_words` is reported as well.
      bytes_per_token: of the whole split; only `bpc` depends on it.
      stop: asked before every block whether to stop there.
      progress: called before every block with the blocks that are done, and all of them.

    Returns:
      nll (mean over tokens, nats), bpc (bits per byte), ppl and tokens (targets scored); for words
      also ppl_words, over the targets that are not the end of a line.

    Raises:
      UserError: unknown protocol, one that does not fit the model, or too few tokens.
      PreemptedError: it was stopped.
    """
    check_protocol(protocol, model.config.layer)

    # A protocol says how far queries see, how many tokens are read at once, and what is scored.
    if protocol == "xl":
        block = lengths.target
        model = model.windowed(lengths.memory, lengths.clamp)
        plan = xl_plan(len(tokens), block)
    elif protocol == "full":
        model = model.windowed(model.config.limit)
        # Each layer looks back by one context, so a state depends on `depth` of them.
        warm_up = model.config.depth * scoring_context(model, params)
        plan = full_plan(len(tokens), block, rows, warm_up)
    else:
        plan = authors_plan(len(tokens), block)
    context = scoring_context(model, params)

    # Rows are spread evenly over the mesh; idle ones fill it.
    plan = plan.padded(sharding.row_shards(mesh))
    # Bytes have a bpc; a perplexity of words without line ends is reported for words alone.
    end_of_line = None
    if vocabulary and vocabulary.unit == "word":
        end_of_line = vocabulary.end_of_line
    total = score(model, params, tokens, plan, block, context, mesh, end_of_line, stop, progress)
    return summary(total, plan.targets(), bytes_per_token)


def scoring_context(model: Model, params: Params) -> int:
    """How many earlier positions any head may look at, rounded up to share compiled code.

    Training has a margin for spans that grow (`train.context`); parameters that stay need none.
    """
    config = model.config
    # Without learned spans every head sees the whole limit.
    if not config.adaptive:
        return config.limit
    # Spans are stored as shares of the limit; the soft mask ends `ramp` positions after them.
    longest = float(jnp.max(params["layers"]["span"])) * config.limit
    reach = math.ceil(longest) + config.ramp
    # The papers' normaliser also sees what their code keeps beyond.
    if config.epsilon:
        reach += TRIM_STEP - 1
    return min(config.limit, -(-reach // CONTEXT_STEP) * CONTEXT_STEP)


def summary(total: Total, tokens: int, bytes_per_token: float = 1.0) -> dict[str, float]:
    """Mean negative log-likelihood in its three units, and the perplexity of words if any."""
    scores = metrics_of(total.nll / tokens, bytes_per_token)
    scores["tokens"] = tokens
    if total.words:
        scores["ppl_words"] = perplexity(total.word_nll / total.words)
    return scores


# --- its blocks --------------------------------------------------------------------------------


def score(
    model: Model,
    params: Params,
    tokens: TokenSource,
    plan: Plan,
    block: int,
    context: int,
    mesh: Mesh,
    end_of_line: int | None,
    stop: Callable[[], bool],
    progress: Callable[[int, int], None],
) -> Total:
    """Sums of the scored targets' negative log-likelihoods.

    Args:
      model: the network, its window as the protocol says.
      params: its parameters.
      tokens: ids of the split, (T,).
      plan: which tokens the rows read and score; rows are a multiple of the mesh's row shards.
      block: tokens read at once.
      context: positions that the cache holds.
      mesh: devices that the rows are spread over.
      end_of_line: the id that is no word; None: symbols are not words.
      stop: asked before every block whether to stop there.
      progress: called before every block with the blocks that are done, and all of them.

    Raises:
      PreemptedError: it was stopped.
    """
    rows = len(plan.begin_R)
    spread = sharding.Rows(mesh, rows)
    # Of several processes each reads the tokens of its own rows only.
    local_plan = plan.part(spread.local)
    # Every row begins with an empty context, as training does.
    cache = empty_cache(model, mesh, rows, context + block)
    total = Total(0.0, 0.0, 0)
    pending = total
    for number in range(plan.blocks):
        # A sum over part of a split is no score, so nothing is returned.
        if stop():
            raise PreemptedError("stopped while scoring", "run again to score")
        progress(number, plan.blocks)
        arrays = [spread.place(x_RT) for x_RT in read_block(tokens, local_plan, block, number)]
        cache, sums = score_block(model, mesh, end_of_line, params, cache, number * block, *arrays)
        # Sums are fetched one block late, so that the device never waits for this loop.
        total = _add(total, pending)
        pending = sums
    return _add(total, pending)


def _add(total: Total, block: Total) -> Total:
    sums = jax.device_get(block)  # the three in one transfer
    return Total(*(before + float(x) for before, x in zip(total, sums, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(model: Model, mesh: Mesh, rows: int, length: int) -> KeyValue:
    """Keys and values of zero states, created on the mesh."""
    return sharding.constrain(mesh, model.empty_key_value(rows, length))


def read_block(
    tokens: TokenSource, plan: Plan, block: int, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The arrays of one block of every row of a plan.

    Args:
      tokens: ids of the split, (T,).
      plan: which tokens the rows read and score.
      block: tokens of a row.
      number: of the block, from 0.

    Returns:
      inputs_RT and targets_RT, int32, and scored_RT, bool. What lies beyond the split is token 0
      and not scored.
    """
    begin_R = plan.begin_R + number * block
    # One token more than a block, since the targets are the inputs shifted by one.
    window_RT = np.zeros((len(begin_R), block + 1), np.int32)
    # Near the end of the split there are fewer tokens; the rest of the window stays 0.
    for row, begin in enumerate(begin_R):
        ids = tokens[int(begin) : int(begin) + block + 1]
        window_RT[row, : len(ids)] = ids
    # Index into the split of every target: it tells the row's own from those of its neighbours.
    target_RT = begin_R[:, None] + 1 + np.arange(block)
    scored_RT = (target_RT >= plan.first_R[:, None]) & (target_RT <= plan.last_R[:, None])
    return window_RT[:, :-1], window_RT[:, 1:], scored_RT


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def score_block(
    model: Model,
    mesh: Mesh,
    end_of_line: int | None,
    params: Params,
    cache: KeyValue,
    before: Array,
    inputs_RT: Array,
    targets_RT: Array,
    scored_RT: Array,
) -> tuple[KeyValue, Total]:
    """Score a block of every row.

    Args:
      model: the network.
      mesh: devices that the rows are spread over.
      end_of_line: the id that is no word; None: symbols are not words.
      params: parameters of the network.
      cache: keys and values, XRSE with S = context + T; the last T are free. It is donated.
      before: tokens that every row has read, int32.
      inputs_RT, targets_RT: ids, int32.
      scored_RT: which targets count, bool.

    Returns:
      The cache shifted by a block, and the sums over the scored targets.
    """
    # The network on this block, its rows spread over the mesh.
    network = model.bind(params)
    R, T = inputs_RT.shape
    attention = sharding.attention_over(mesh, R)
    forward = network.cached_forward(inputs_RT, cache, attention=attention, before=before)
    nll_RT = sharding.nll_over(mesh)(network.io, forward.hidden_BTD, targets_RT)

    def shift(old_XRSE: Array, new_XRTE: Array) -> Array:
        """Write the block's entries over the free ones, drop the oldest, append free ones."""
        context_XRSE = jnp.concatenate([old_XRSE[:, :, :-T], new_XRTE], axis=2)[:, :, T:]
        return jnp.concatenate([context_XRSE, jnp.zeros_like(new_XRTE)], axis=2)

    cache = jax.tree.map(shift, cache, forward.new)

    # Line ends are symbols like others in `nll`; the perplexity of words leaves them out.
    word_RT = _scored_words(end_of_line, targets_RT, scored_RT)
    nll = jnp.sum(jnp.where(scored_RT, nll_RT, 0))
    word_nll = jnp.sum(jnp.where(word_RT, nll_RT, 0))
    return sharding.constrain(mesh, cache), Total(nll, word_nll, word_RT.sum())


def _scored_words(end_of_line: int | None, targets_RT: Array, scored_RT: Array) -> Array:
    """Which of the scored targets are words, bool; none where symbols are not words."""
    if end_of_line is None:
        return jnp.zeros_like(scored_RT)
    return scored_RT & (targets_RT != end_of_line)
