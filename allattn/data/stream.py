"""The training stream: which tokens a given step reads, as a pure function of the step.

The split is cut into as many rows as the batch has, and every row is read block after block; here
3 rows and blocks of 4 tokens:

    41 tokens   |0 . . . . . . . . . . .|13 . . . . . . . . . .|26 . . . . . . . . . .|39 .|
                 row 0                   row 1                  row 2                  unused

    pass 0 of a row   |0  1  2  3| 4  5  6  7| 8  9 10 11|12      offset 0
    pass 1 of a row    0  1 |2  3  4  5| 6  7  8  9|10 11 12      offset 2

The targets of a block are its tokens shifted by one, so a token is left after the last block. Pass
0 begins at 0, each later one at a random offset below one block (the same for all rows), so that
blocks are cut elsewhere in every pass. What a layer caches at one step is the context of the next;
at the first step of a pass the cache must be zeroed.

Offsets are drawn from (seed, draw), `_PASSES_PER_DRAW` passes at a time. The block of a step thus
depends on (tokens, batch, block, seed, step) alone: a run that resumes, on another number of
processes too, reads what it would have read. Held by tests/data/test_data_stream.py.

Dimension key: B row of the batch, T position in the block, W position in the window of tokens held
in memory.
"""

from bisect import bisect_right
from typing import Any, NamedTuple, Protocol

import numpy as np

from allattn.errors import UserError

# Tokens of every row that are read from the records at once.
_WINDOW_TOKENS = 65_536
# Passes whose offsets are drawn at once. Part of what a seed means: it must not change.
_PASSES_PER_DRAW = 4096


class TokenSource(Protocol):
    """Anything that has a length and gives a stretch of ids: `Tokens`, or a numpy array."""

    def __len__(self) -> int: ...
    def __getitem__(self, window: slice, /) -> np.ndarray: ...


class Batch(NamedTuple):
    """One block of every row.

    Attributes:
      inputs_BT: int32 ids.
      targets_BT: int32 ids, the inputs shifted by one.
      before: tokens of this pass before the block, int32; at 0 the cache must be zeroed first.
    """

    inputs_BT: Any
    targets_BT: Any
    before: Any


class Stream:
    """Reads a split as `batch` contiguous rows, block after block, pass after pass.

    Row b holds the tokens from b * (tokens // batch). A pass ends where no further block, and the
    target after it, fits in the row. The first begins at 0, each later one at an offset below one
    block, drawn from (seed, pass). The block at a step depends on (tokens, batch, block, seed,
    step) and nothing else, so any step can be asked for.

    Args:
      tokens: the ids of the split.
      batch: rows of the whole batch, over all processes.
      block: tokens per row and step.
      seed: of the offsets, not negative.
      rows: the rows that this process reads: a slice, or their numbers.

    Raises:
      UserError: the split is too short for one block of every row.
    """

    def __init__(
        self, tokens: TokenSource, batch: int, block: int, seed: int = 0, rows: Any = slice(None)
    ) -> None:
        if batch < 1 or block < 1 or seed < 0:
            raise UserError(
                f"batch and block must be at least 1 and seed 0, found {batch}, {block} and {seed}"
            )
        # A row needs a block and the target after its last token.
        self.row_length = len(tokens) // batch
        if self.row_length <= block:
            raise UserError(
                f"batch {batch} and block {block} leave no block in {len(tokens)} tokens: "
                f"a row has {self.row_length} and needs {block + 1}"
            )
        self.block_length = block
        self.seed = seed
        self._tokens = tokens
        self._rows = np.arange(batch)[rows]

        # The passes laid out so far. A draw has two arrays: offset and first step of its passes.
        self._draws: list[tuple[np.ndarray, np.ndarray]] = []
        # First step after each draw; entry 0 is the start.
        self._draw_ends = [0]

        # The window of every row, which begins at the same offset in all of them.
        self._window_begin = 0
        self._window_BW = np.zeros((len(self._rows), 0), np.int32)

    def block(self, step: int) -> Batch:
        """The block of a step (int, 0 or more): arrays of shape (rows of this process, block)."""
        _, offset, before = self._locate(step)
        length = self.block_length

        # Load another window unless this one holds the block and the target after it.
        begin = offset - self._window_begin
        if begin < 0 or begin + length + 1 > self._window_BW.shape[1]:
            self._load(offset)
            begin = offset - self._window_begin

        # Copies: the caller may keep or change them while the window moves.
        inputs_BT = np.ascontiguousarray(self._window_BW[:, begin : begin + length])
        targets_BT = np.ascontiguousarray(self._window_BW[:, begin + 1 : begin + length + 1])
        return Batch(inputs_BT, targets_BT, np.int32(before))

    def position(self, step: int) -> tuple[int, int]:
        """(pass, offset in the row) of a step."""
        return self._locate(step)[:2]

    def _locate(self, step: int) -> tuple[int, int, int]:
        """Pass, offset in the row, and tokens of the pass before the block."""
        if step < 0:
            raise ValueError(f"step must not be negative, found {step}")
        # Lay out passes until the step is among them.
        while self._draw_ends[-1] <= step:
            self._extend()
        # First the draw that the step falls into, then the pass within it.
        draw = bisect_right(self._draw_ends, step) - 1
        offsets, firsts = self._draws[draw]
        index = int(np.searchsorted(firsts, step, side="right")) - 1
        # Every step of a pass reads a block.
        before = (step - int(firsts[index])) * self.block_length
        return draw * _PASSES_PER_DRAW + index, int(offsets[index]) + before, before

    def _extend(self) -> None:
        """Lay out the passes of one more draw.

        There are many to a draw, so that a late step is found quickly even in a short text.
        """
        offsets = self._offsets(len(self._draws))
        # A pass has as many blocks as fit after its offset, with one target more.
        blocks = (self.row_length - 1 - offsets) // self.block_length
        ends = self._draw_ends[-1] + np.cumsum(blocks)
        self._draws.append((offsets, ends - blocks))
        self._draw_ends.append(int(ends[-1]))

    def _offsets(self, draw: int) -> np.ndarray:
        """Offsets of the passes of one draw; each below a block, and such that a block is left."""
        # In a short row a larger offset would leave no room for a block.
        bound = min(self.block_length, self.row_length - self.block_length)
        offsets = np.random.default_rng((self.seed, draw)).integers(bound, size=_PASSES_PER_DRAW)
        # The first pass begins at 0, as in the papers' code.
        if draw == 0:
            offsets[0] = 0
        return offsets

    def _load(self, offset: int) -> None:
        """Fill the window of every row from `offset`, or from earlier where the row ends."""
        # At least a block with its last target, at most the row.
        width = min(self.row_length, max(_WINDOW_TOKENS, self.block_length + 1))
        begin = min(offset, self.row_length - width)
        starts = [int(row) * self.row_length + begin for row in self._rows]
        # Only the rows of this process are read.
        self._window_BW = np.empty((len(starts), width), np.int32)
        for row, start in enumerate(starts):
            self._window_BW[row] = self._tokens[start : start + width]
        self._window_begin = begin
