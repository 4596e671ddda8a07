"""The three evaluation protocols: which tokens each row reads, and which targets it scores.

A test score depends on how the text is cut: how many tokens a target has before it, and which
targets count. Scores of different protocols are not comparable, so a protocol is named beside every
score. A protocol is a `Plan`; `scoring.py` carries it out. Written T for the tokens of the split
and M for the tokens of a block:

    authors  The code of the all-attention paper (arXiv 1907.01470). 8 streams side by side, whole
             blocks from an empty cache, as in training; what does not fill a block is dropped.
    full     Every target once, each with all the context that the network can use. Rows only share
             the work, so neither their number nor M changes the result beyond rounding.
    xl       The code of Transformer-XL (arXiv 1901.02860). 10 streams side by side, with a longer
             memory than in training and clamped distances; a short last block counts as well.

What is scored (=), what is only read (-), what is dropped (x):

    authors, xl     |==========|==========|==========| ... |==========|xx     streams of T // rows
    of authors      =============x   of a stream ends with its last whole block of M
    full     row 0  ===============
             row 1           ------===============          reads `warm_up` tokens before its own
             row 2                          ------==========

Held by the coverage tests in tests/evaluation. Dimension key: R row of parallel work.
"""

from typing import Any, NamedTuple

import ml_collections
import numpy as np

from allattn.errors import UserError

PROTOCOLS = ("authors", "full", "xl")

# Streams that the two published protocols read side by side; part of their definition, since the
# first targets of a stream have little context.
AUTHORS_ROWS = 8
XL_ROWS = 10


class Lengths(NamedTuple):
    """Block, memory and clamp lengths of the `xl` protocol, in tokens."""

    # Tokens of a block.
    target: int
    # Distances that every query sees.
    memory: int
    # Farther distances look like this one; 0: none does.
    clamp: int


class Plan(NamedTuple):
    """Which tokens each row reads and which targets it scores, as indices into the split."""

    # First input token.
    begin_R: np.ndarray
    # First and last target scored.
    first_R: np.ndarray
    last_R: np.ndarray
    # Blocks that every row reads.
    blocks: int

    def padded(self, multiple: int) -> "Plan":
        """The same with idle rows, which score nothing, up to a multiple of `multiple` rows."""
        idle = (0, -len(self.begin_R) % multiple)
        # The last target of an idle row lies before its first, so that no target is in between.
        begin_R = np.pad(self.begin_R, idle)
        first_R = np.pad(self.first_R, idle)
        last_R = np.pad(self.last_R, idle, constant_values=-1)
        return Plan(begin_R, first_R, last_R, self.blocks)

    def part(self, rows: np.ndarray) -> "Plan":
        """The plan of some of the rows."""
        return Plan(self.begin_R[rows], self.first_R[rows], self.last_R[rows], self.blocks)

    def targets(self) -> int:
        """How many targets are scored."""
        return int((self.last_R - self.first_R + 1).sum())


def check_protocol(protocol: str, layer: str, where: str = "") -> None:
    """Refuse an unknown protocol, and `xl` where positions are learned.

    Args:
      protocol: the name asked for.
      layer: `model.layer` of the configuration.
      where: what the message begins with.

    Raises:
      UserError: says which protocols or layers there are.
    """
    # The name first, since what follows depends on it.
    if protocol not in PROTOCOLS:
        raise UserError(f"{where}protocol: expected one of {PROTOCOLS}, found {protocol!r}")
    # A learned position table ends with the context of training; only sinusoids reach further.
    if protocol == "xl" and layer != "transformer_xl":
        raise UserError(f"{where}protocol xl: expected model.layer transformer_xl, found {layer}")


def check_length(protocol: str, tokens: int, block: int, where: str = "") -> None:
    """Refuse a text that is too short for a protocol.

    Args:
      protocol: one of PROTOCOLS.
      tokens: length of the text.
      block: tokens read at once.
      where: what the message begins with.

    Raises:
      UserError: says how many tokens there must be.
    """
    shortest = {
        "authors": AUTHORS_ROWS * (block + 1),  # a block of every stream, and the target after it
        "full": 2,  # one target, and the token before it
        "xl": 2 * XL_ROWS,  # one target of every stream
    }
    if tokens < shortest[protocol]:
        raise UserError(
            f"{where}protocol {protocol}: expected at least {shortest[protocol]} tokens, "
            f"found {tokens}"
        )


def authors_plan(tokens: int, block: int) -> Plan:
    """The plan of `authors`: targets 1 to floor((T - 1) / M) M of each of 8 streams of T tokens.

    Args:
      tokens: of the split.
      block: M, tokens read at once.

    Raises:
      UserError: the split is too short.
    """
    check_length("authors", tokens, block)
    length = tokens // AUTHORS_ROWS
    # A stream of T tokens has T - 1 targets; only whole blocks of them are read.
    blocks = (length - 1) // block
    begin_R = np.arange(AUTHORS_ROWS) * length
    return Plan(begin_R, begin_R + 1, begin_R + blocks * block, blocks)


def full_plan(tokens: int, block: int, rows: int, warm_up: int) -> Plan:
    """The plan of `full`: targets 1 to T - 1 of the split, each once.

    Args:
      tokens: of the split.
      block: tokens read at once.
      rows: rows that share the targets; fewer where there are fewer targets.
      warm_up: tokens that a row reads before its first target without scoring them; with as many
        as the network can look back, its targets have their full context.

    Raises:
      UserError: the split is too short.
    """
    check_length("full", tokens, block)
    # Cut the targets 1 to T - 1 into stretches as equal as can be.
    rows = max(1, min(rows, tokens - 1))
    bounds = 1 + np.arange(rows + 1) * (tokens - 1) // rows
    first_R = bounds[:-1]
    last_R = bounds[1:] - 1
    # The input before the first target is one of those read anyway.
    begin_R = np.maximum(0, first_R - 1 - warm_up)
    # Rows that end earlier read on beyond their targets, which costs nothing more.
    longest = int((last_R - begin_R).max())
    blocks = -(-longest // block)
    return Plan(begin_R, first_R, last_R, blocks)


def xl_plan(tokens: int, block: int) -> Plan:
    """The plan of `xl`: targets 1 to T - 1 of each of 10 streams of T tokens.

    The short last block of the streams counts; what does not fill the streams is dropped.

    Args:
      tokens: of the split.
      block: tokens read at once.

    Raises:
      UserError: the split is too short.
    """
    check_length("xl", tokens, block)
    length = tokens // XL_ROWS
    # Rounded up: the last block of a stream may be short.
    blocks = -(-(length - 1) // block)
    begin_R = np.arange(XL_ROWS) * length
    return Plan(begin_R, begin_R + 1, begin_R + length - 1, blocks)


def options(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a configuration says of how to evaluate, as arguments of `scoring.evaluate_tokens`."""
    evaluate = config.evaluate
    lengths = Lengths(evaluate.target_length, evaluate.memory_length, evaluate.clamp_length)
    return {"block": config.train.block, "rows": evaluate.batch, "lengths": lengths}
