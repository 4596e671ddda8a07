"""The evaluation protocols; the only code that computes a bpc or a perplexity.

Dimension key: X layer, R row of parallel work, T position in the block, S cached position, E all
heads side by side.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from allattn import sharding
from allattn.data import Vocabulary
from allattn.data.stream import TokenSource
from allattn.errors import PreemptedError, UserError
from allattn.model import KeyValue, Model, Params

Array = jax.Array

AUTHORS_ROWS, XL_ROWS = 8, 10
PROTOCOLS = ("authors", "full", "xl")


class Lengths(NamedTuple):
    """Of protocol `xl`, in tokens."""

    target: int  # of a block
    memory: int  # distances that every query sees
    clamp: int  # distances beyond it look like it; 0: none does


class Plan(NamedTuple):
    """Which tokens each row reads and which targets it scores, as indices into the split."""

    begin_R: np.ndarray  # first input token
    first_R: np.ndarray  # first target scored
    last_R: np.ndarray  # last target scored
    blocks: int

    def padded(self, multiple: int) -> "Plan":
        """The same with idle rows, which score nothing, up to a multiple of `multiple` rows."""
        idle = (0, -len(self.begin_R) % multiple)
        first_R, last_R = np.pad(self.first_R, idle), np.pad(self.last_R, idle, constant_values=-1)
        return Plan(np.pad(self.begin_R, idle), first_R, last_R, self.blocks)

    def part(self, rows: np.ndarray) -> "Plan":
        """Some of the rows."""
        return Plan(self.begin_R[rows], self.first_R[rows], self.last_R[rows], self.blocks)


def check_protocol(protocol: str, layer: str, place: str = "") -> None:
    """Refuse an unknown protocol, and `xl` where positions are learned; `place` begins the message."""
    if protocol not in PROTOCOLS:
        raise UserError(f"{place}protocol: expected one of {PROTOCOLS}, found {protocol!r}")
    if protocol == "xl" and layer != "transformer_xl":
        raise UserError(f"{place}protocol xl: expected model.layer transformer_xl, found {layer}")


def check_length(protocol: str, tokens: int, block: int, place: str = "") -> None:
    """Refuse a text that is too short for a protocol; `place` begins the message."""
    least = {"authors": AUTHORS_ROWS * (block + 1), "full": 2, "xl": 2 * XL_ROWS}[protocol]
    if tokens < least:
        raise UserError(
            f"{place}protocol {protocol}: expected at least {least} tokens, found {tokens}"
        )


def authors_plan(tokens: int, block: int) -> Plan:
    """8 streams from a zero cache, targets 1..floor((T-1)/M) M of each, the rest dropped."""
    check_length("authors", tokens, block)
    length = tokens // AUTHORS_ROWS
    blocks = (length - 1) // block
    begin_R = np.arange(AUTHORS_ROWS) * length
    return Plan(begin_R, begin_R + 1, begin_R + blocks * block, blocks)


def full_plan(tokens: int, block: int, rows: int, warm_up: int) -> Plan:
    """Targets 1..T-1, each once with its full context; a row first reads `warm_up` tokens that it does not score."""
    check_length("full", tokens, block)
    rows = max(1, min(rows, tokens - 1))
    bounds = 1 + np.arange(rows + 1) * (tokens - 1) // rows
    first_R, last_R = bounds[:-1], bounds[1:] - 1
    begin_R = np.maximum(0, first_R - 1 - warm_up)
    return Plan(begin_R, first_R, last_R, -(-int((last_R - begin_R).max()) // block))


def xl_plan(tokens: int, block: int) -> Plan:
    """10 streams, targets 1..T-1 of each, a short last block included; what does not fill the streams is dropped."""
    check_length("xl", tokens, block)
    length = tokens // XL_ROWS
    begin_R = np.arange(XL_ROWS) * length
    return Plan(begin_R, begin_R + 1, begin_R + length - 1, -(-(length - 1) // block))


def options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a configuration says of how to evaluate, as arguments of `evaluate_tokens`."""
    c = config.evaluate
    lengths = Lengths(c.target_length, c.memory_length, c.clamp_length)
    return {"block": config.train.block, "rows": c.batch, "lengths": lengths}


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
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Score a split.

    Args:
      model: the network.
      params: its parameters.
      tokens: ids of the split, (T,).
      protocol: "authors", "full" or "xl" (method page, "Evaluation protocols").
      block: tokens read at once; part of the definition of `authors`, without effect on the others.
      rows: rows that share the work of `full`; without effect on the result beyond rounding.
      lengths: of `xl`.
      mesh: devices that the rows are spread over; holds the parameters.
      vocabulary: where its symbols are words, `ppl_words` is reported as well.
      stop: asked before every block whether to stop there.

    Returns:
      nll (mean, nats), bpc, ppl and tokens (targets scored); for words also ppl_words, over the
      targets that are not the end of a line.

    Raises:
      UserError: unknown protocol, one that does not fit the model, or too few tokens.
      PreemptedError: it was stopped.
    """
    check_protocol(protocol, model.config.layer)
    if protocol == "xl":
        block, model = lengths.target, model.windowed(lengths.memory, lengths.clamp)
        plan = xl_plan(len(tokens), block)
    elif protocol == "full":
        model = model.windowed(model.config.limit)
        plan = full_plan(
            len(tokens), block, rows, model.config.depth * context_length(model, params)
        )
    else:
        plan = authors_plan(len(tokens), block)
    context = context_length(model, params)
    plan = plan.padded(sharding.row_shards(mesh))
    end_of_line = vocabulary.end_of_line if vocabulary and vocabulary.unit == "word" else None
    total = score(model, params, tokens, plan, block, context, mesh, end_of_line, stop)
    return summary(total, int((plan.last_R - plan.first_R + 1).sum()))


class Total(NamedTuple):
    """Sums over scored targets."""

    nll: Any  # nats
    word_nll: Any  # nats of those that are not the end of a line; 0 where symbols are not words
    words: Any  # how many those are


def summary(total: Total, tokens: int) -> dict[str, float]:
    """Mean negative log-likelihood in its three units, and the perplexity of words where there are any."""
    nll = total.nll / tokens
    found = {"nll": nll, "bpc": nll / math.log(2), "ppl": _perplexity(nll), "tokens": tokens}
    return found | ({"ppl_words": _perplexity(total.word_nll / total.words)} if total.words else {})


def _perplexity(nll: float) -> float:
    return math.exp(min(nll, 700))


def context_length(model: Model, params: Params) -> int:
    """How many earlier positions any head may look at, rounded up to 64 to share compiled code."""
    config = model.config
    if not config.adaptive:
        return config.limit
    longest = float(jnp.max(params["layers"]["span"])) * config.limit
    return min(config.limit, -(-(math.ceil(longest) + config.ramp) // 64) * 64)


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
) -> Total:
    """Sums of the scored targets' negative log-likelihoods; `end_of_line` is the id that is no word, None: no words."""
    rows, total = len(plan.begin_R), Total(0.0, 0.0, 0)
    spread = sharding.Rows(mesh, rows)
    mine, cache = plan.part(spread.local), empty_cache(model, mesh, rows, context + block)
    pending = total
    for number in range(plan.blocks):
        if stop():
            raise PreemptedError(
                "stopped while scoring: this machine is being taken away; run again to score"
            )
        arrays = (spread.place(x_RT) for x_RT in read_block(tokens, mine, block, number))
        cache, sums = score_block(model, mesh, end_of_line, params, cache, number * block, *arrays)
        total, pending = (
            _add(total, pending),
            sums,
        )  # read one block late, so that the device never waits
    return _add(total, pending)


def _add(total: Total, block: Total) -> Total:
    more = jax.device_get(block)  # the three at once
    return Total(*(before + float(x) for before, x in zip(total, more, strict=True)))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_cache(model: Model, mesh: Mesh, rows: int, length: int) -> KeyValue:
    """Keys and values of zero states, made in place on the mesh."""
    return sharding.constrain(mesh, model.empty_key_value(rows, length))


def read_block(
    tokens: TokenSource, plan: Plan, block: int, number: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """inputs_RT, targets_RT and scored_RT of a block; what lies beyond the split is token 0, not scored."""
    begin_R = plan.begin_R + number * block
    window_RT = np.zeros((len(begin_R), block + 1), np.int32)
    for row, begin in enumerate(begin_R):
        ids = tokens[int(begin) : int(begin) + block + 1]
        window_RT[row, : len(ids)] = ids
    target_RT = begin_R[:, None] + 1 + np.arange(block)
    scored_RT = (target_RT >= plan.first_R[:, None]) & (target_RT <= plan.last_R[:, None])
    return window_RT[:, :-1], window_RT[:, 1:], scored_RT


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def score_block(
    model: Model,
    mesh: Mesh,
    end_of_line,
    params: Params,
    cache: KeyValue,
    before,
    inputs_RT,
    targets_RT,
    scored_RT,
):
    """A block of every row after `before` tokens: the shifted cache and the sums over the scored targets."""
    network, (R, T) = model.bind(params), inputs_RT.shape
    attention = sharding.attention_over(mesh, R)
    forward = network.cached_forward(inputs_RT, cache, attention=attention, before=before)
    nll_RT = sharding.nll_over(mesh)(network.io, forward.hidden_BTD, targets_RT)

    def shift(old_XRSE: Array, new_XRTE: Array) -> Array:
        context_XRSE = jnp.concatenate([old_XRSE[:, :, :-T], new_XRTE], axis=2)[:, :, T:]
        return jnp.concatenate([context_XRSE, jnp.zeros_like(new_XRTE)], axis=2)

    cache = jax.tree.map(shift, cache, forward.new)
    word_RT = (
        jnp.zeros_like(scored_RT)
        if end_of_line is None
        else scored_RT & (targets_RT != end_of_line)
    )
    nll, word_nll = (jnp.sum(jnp.where(chosen_RT, nll_RT, 0)) for chosen_RT in (scored_RT, word_RT))
    return sharding.constrain(mesh, cache), Total(nll, word_nll, word_RT.sum())
