"""Where a tile of queries lies among the keys: which blocks of keys its heads reach, which of them
need no mask, and which columns of the position table stand above them.

A group of P heads shares 128 lanes, and a tile is T queries of each, stacked: T rows of the first
head, T of the second. Keys are counted in blocks of 128. `contract` draws the band of queries and
keys; a tile of queries meets it like this, with a letter for a block of keys,

    queries of the tile     . . e e i i i i i i e .       e  an edge: some pairs do not count fully
                                a   c           d b       i  inside: all count, m = 1
                                                          .  out of reach, never visited

Dimension key: T query of the tile, R row of the stack, C key of a tile, Q column of a block of 128,
E the group's heads side by side; B row of the batch, H head.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from allattn.attention import dropout
from allattn.attention.contract import Static
from allattn.attention.numerics import CallSizes
from allattn.attention.tpu.skew import LANES

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sizes(CallSizes):
    """Static sizes of one call; T is padded to whole tiles, and a query tile is T of the key."""

    # P, side by side in one block.
    heads: int
    # Queries and keys that one step of the grid holds: several tiles of each.
    query_block: int
    segment: int
    # Keys of a tile at an edge, and of the one nearest to the queries.
    edge_tile: int
    nearest_tile: int
    # The columns by which windows begin later than whole blocks; None: known only at run time.
    remainder: int | None
    # Columns of the position table before its first and behind its last distance.
    left: int
    right: int
    # Whether the TPU rotates each row by one column more, and whether it multiplies whole numbers.
    strided: bool
    multiplies: bool
    # Whether numbers are added to the logits of pairs.
    has_offsets: bool

    @property
    def rows(self) -> int:
        """R, rows of the stack."""
        return self.heads * self.query_tile

    @property
    def lanes(self) -> int:
        """E, columns of the group."""
        return self.heads * self.K

    @property
    def groups(self) -> int:
        """Groups of heads."""
        return self.H // self.heads

    @property
    def positions(self) -> int:
        """Columns of the padded position table."""
        return self.left + self.L + self.right

    @property
    def has_few_keys(self) -> bool:
        """Whether tiles with a mask are all that is worth its code."""
        return self.segments == 1 and self.segment <= self.nearest_tile

    @property
    def segments(self) -> int:
        """Steps of the grid over all keys."""
        return -(-self.S // self.segment)


def round_up(number: int, multiple: int) -> int:
    """The next multiple that is not below a number."""
    return -(-number // multiple) * multiple


class Scalars(NamedTuple):
    """What is known before a kernel runs (scalar prefetch): small int32 arrays, float32 spans.

    Holds arrays in the caller, references in the kernel.
    """

    # Rows of the position table that a head needs; the last distance at which m is 1 without
    # being on the ramp; the span.
    reach_H: Any
    clear_H: Any
    span_H: Any
    query_start_B: Any
    key_start_B: Any
    # dropout seed, row offset, head offset
    seed_and_offsets: Any


class Blocks(NamedTuple):
    """A stretch of blocks of keys; scalars, known at run time."""

    first: Any
    stop: Any


class Cut:
    """Blocks of keys, cut into tiles: with a mask at both edges, without one between.

    The edge before covers whole tiles; what fills no inner tile belongs to the edge behind.

    Attributes:
      first: block with which the first inner tile begins, where the edge before ends.
      tiles: how many inner tiles there are.
      before, behind: how many tiles with a mask there are before and behind those.
    """

    def __init__(self, sizes: Sizes, blocks: Blocks, clear: Blocks):
        self._edge = sizes.edge_tile // LANES
        self._start, self._stop = blocks
        # In blocks of 128 keys, as all here.
        inner = sizes.key_tile // LANES
        # Few keys are not worth the code of inner tiles.
        self.first = self._stop
        if not sizes.has_few_keys:
            before = jnp.maximum(self._tiles(clear.first - self._start), 0)
            self.first = jnp.minimum(self._start + before * self._edge, self._stop)
        # Inner tiles as far as no mask is needed, and the rest.
        unmasked = jnp.minimum(clear.stop, self._stop) - self.first
        self.tiles = jax.lax.div(jnp.maximum(unmasked, 0), inner)
        self._rest = self.first + self.tiles * inner
        # Both edges, each in tiles of its own.
        self.before = self._tiles(self.first - self._start)
        self.behind = self._tiles(self._stop - self._rest)

    def edge(self, number: Array) -> Blocks:
        """The blocks of a tile with a mask; those behind are counted on from those before.

        The last one at an edge may have fewer blocks than a tile.
        """
        # An edge ends where the inner tiles begin, or where the blocks end.
        is_before = number < self.before
        after = self._rest + (number - self.before) * self._edge
        first = jnp.where(is_before, self._start + number * self._edge, after)
        return Blocks(first, jnp.where(is_before, self.first, self._stop))

    def _tiles(self, blocks: Array) -> Array:
        return jax.lax.div(blocks + self._edge - 1, self._edge)


class Tile:
    """A tile of queries of a group of heads.

    Attributes:
      begin: key index at which its first query sits.
      first_query: number of that query in the row.
      oldest, newest: keys within reach of any query and head; newest is -1 if there is none.
      first_clear, last_clear: the keys between them count fully for every query and head.
    """

    def __init__(
        self,
        static: Static,
        sizes: Sizes,
        scalars: Scalars,
        group: Array,
        row: Array,
        first_query: Array | int,
    ):
        self.static = static
        self.sizes = sizes
        self.scalars = scalars
        self.group = group
        self.row = row
        self.first_query = first_query
        self.begin = scalars.query_start_B[row] + first_query
        self._find_reach()
        self._find_clear()

    def of_head(self, head: Array) -> "Tile":
        """The same queries of one head of the group, in the lanes of all."""
        sizes = dataclasses.replace(self.sizes, heads=1, K=self.sizes.lanes)
        number = self.group * self.sizes.heads + head
        return Tile(self.static, sizes, self.scalars, number, self.row, self.first_query)

    def farthest_head(self) -> tuple[Array, Array]:
        """The head that reaches farthest, and the first block of keys that another one reaches."""
        # The two largest reaches of the heads, one after the other.
        farthest = jnp.int32(-1)
        second = jnp.int32(-1)
        head = jnp.int32(0)
        for p, reach in enumerate(self._heads(self.scalars.reach_H)):
            second = jnp.maximum(second, jnp.minimum(farthest, reach))
            head = jnp.where(reach > farthest, p, head)
            farthest = jnp.maximum(farthest, reach)
        # What the second one reaches at least two heads reach.
        oldest = self.begin - (self.static.first_distance + second - 1)
        return head, jax.lax.div(jnp.maximum(oldest, 0), LANES)

    def _heads(self, of_H: Any) -> list[Array]:
        """What a table of scalars says of the group's heads."""
        return [of_H[self.group * self.sizes.heads + p] for p in range(self.sizes.heads)]

    def farthest_reach(self) -> Array:
        """Rows of the position table that any head of the group needs."""
        return functools.reduce(jnp.maximum, self._heads(self.scalars.reach_H))

    def _find_reach(self) -> None:
        # From the farthest key of the first query to the nearest of the last, if they exist.
        reach = self.farthest_reach()
        nearest = self.static.first_distance
        farthest = self.begin - (nearest + reach - 1)
        newest = jnp.minimum(self.begin + self.sizes.query_tile - 1 - nearest, self.sizes.S - 1)
        self.oldest = jnp.maximum(jnp.maximum(farthest, self.scalars.key_start_B[self.row]), 0)
        self.newest = jnp.where(reach > 0, newest, -1)

    def _find_clear(self) -> None:
        # The last query is the farthest from a key, the first the nearest.
        clear = functools.reduce(jnp.minimum, self._heads(self.scalars.clear_H))
        first = self.begin + self.sizes.query_tile - 1 - clear
        self.first_clear = jnp.maximum(jnp.maximum(first, self.scalars.key_start_B[self.row]), 0)
        self.last_clear = jnp.minimum(self.begin - self.static.first_distance, self.sizes.S - 1)

    # --- blocks of keys

    def reached(self, segment: Array | int) -> Blocks:
        """a and b: the blocks of a segment within reach."""
        first, stop = self._of_segment(segment)
        a = jnp.maximum(jax.lax.div(self.oldest, LANES), first)
        b = jnp.minimum(jax.lax.div(self.newest + LANES, LANES), stop)
        none = (self.newest < self.oldest) | (b <= a)
        return Blocks(a, jnp.where(none, a, b))

    def clear(self, segment: Array | int) -> Blocks:
        """c and d: the blocks of a segment that need no mask; none if d is not behind c."""
        first, stop = self._of_segment(segment)
        c = jnp.maximum(jax.lax.div(self.first_clear + LANES - 1, LANES), first)
        d = jnp.minimum(jax.lax.div(jnp.maximum(self.last_clear + 1, 0), LANES), stop)
        return Blocks(c, d)

    def cut(self, segment: Array, blocks: Blocks) -> Cut:
        """Tiles of some blocks of a segment."""
        return Cut(self.sizes, blocks, self.clear(segment))

    def home(self) -> Array:
        """The segment of the nearest keys; the first if there are none."""
        if self.sizes.segments == 1:
            return jnp.int32(0)
        return jax.lax.div(jnp.maximum(self.newest, 0), self.sizes.segment)

    def _of_segment(self, segment: Array | int) -> tuple[Array | int, Array | int]:
        blocks = self.sizes.segment // LANES
        return segment * blocks, (segment + 1) * blocks

    # --- keys, positions and pairs

    def place(self, segment: Array, block: Array, columns: int) -> Array:
        """Where in its segment a tile of so many keys begins that holds a block.

        With that block, or earlier where it would not lie inside.
        """
        # In blocks from the beginning of the segment.
        last = (self.sizes.segment - columns) // LANES
        first_block = segment * (self.sizes.segment // LANES)
        return jnp.minimum(block - first_block, last) * LANES

    def window(self, first_key: Array) -> tuple[Array, Any]:
        """First column of the window above a tile of keys, and the remainder."""
        # The column of (query 0, first key): the table is reversed.
        last = self.static.first_distance + self.sizes.L - 1
        column = self.sizes.left + last - self.begin + first_key - LANES
        remainder: Any = self.sizes.remainder
        if remainder is None:
            remainder = column & (LANES - 1)
        return column - remainder, remainder

    def keys(self, first_key: Array, x_CE: Array) -> Array:
        """Keys or values, zero where no query looks: what lies there may be anything."""
        index_C1 = first_key + jax.lax.broadcasted_iota(jnp.int32, (x_CE.shape[0], 1), 0)
        return jnp.where((index_C1 >= self.oldest) & (index_C1 <= self.newest), x_CE, 0)

    def _distances(self, first_key: Array) -> Array:
        """Distance of every query and a block of 128 keys."""
        shape = (self.sizes.rows, LANES)
        row_RQ = jax.lax.rem(jax.lax.broadcasted_iota(jnp.int32, shape, 0), self.sizes.query_tile)
        return self.begin - first_key + row_RQ - jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def pairs(self, first_key: Array, start: Array, stop: Array) -> tuple[Array, Array]:
        """Which pairs of a block of 128 keys exist, and how many tokens before its head's ramp ends
        each of them lies.

        Args:
          first_key: of the block.
          start, stop: keys outside of them do not count here.
        """
        # Which keys count for any query.
        lane_1Q = jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        first = jnp.maximum(self.oldest, start) - first_key
        behind = jnp.minimum(self.newest + 1, stop) - first_key
        counts_1Q = (lane_1Q >= first) & (lane_1Q < behind)
        # Which distances the table has.
        distance_RQ = self._distances(first_key)
        nearest = self.static.first_distance
        exists_RQ = (distance_RQ >= nearest) & (distance_RQ < nearest + self.sizes.L) & counts_1Q
        # Whole tokens first: a short span is less than the rounding of a sum with tokens.
        span_R1 = self._by_head(self._heads(self.scalars.span_H), (self.sizes.rows, 1))
        return exists_RQ, (self.static.ramp + 1 - distance_RQ).astype(jnp.float32) + span_R1

    def mask(self, first_key: Array, start: Array, stop: Array) -> Array:
        """The soft mask m of a block; 0 where a pair does not exist. Arguments as of `pairs`."""
        exists_RQ, before_end_RQ = self.pairs(first_key, start, stop)
        return jnp.where(exists_RQ, jnp.clip(before_end_RQ * (1 / self.static.ramp), 0, 1), 0)

    # --- dropout

    def query_words(self) -> dropout.QueryWords:
        """Words of the tile's queries, (R, 128): the same in all lanes."""
        query_1T = self.queries()
        words = [dropout.query_words(*owner, query_1T, dropout.CONTEXT) for owner in self.owners()]
        return jax.tree.map(lambda *heads: jnp.concatenate([*map(in_all_lanes, heads)]), *words)

    def queries(self) -> Array:
        """Numbers of the queries, (1, T)."""
        shape = (1, self.sizes.query_tile)
        return self.first_query + jax.lax.broadcasted_iota(jnp.int32, shape, 1)

    def column_words(self, first: Array | int, domain: int) -> Array:
        """Words of 128 keys or pairs, (R, 128): the same in all rows of a head.

        Args:
          first: number of the first key or pair.
          domain: `dropout.CONTEXT` or `dropout.PERSISTENT`.
        """
        first = self.column_index(first, domain)
        index_1Q = first + jax.lax.broadcasted_iota(jnp.int32, (1, LANES), 1)
        shape = (self.sizes.query_tile, LANES)
        words = []
        for owner in self.owners():
            word_1Q = dropout.column_words(*owner, index_1Q, domain)
            words.append(jnp.broadcast_to(word_1Q, shape))
        return jnp.concatenate(words)

    def column_index(self, first: Array | int, domain: int) -> Array | int:
        """What dropout calls a key or pair; arguments as of `column_words`."""
        # Keys are counted from the first query of the block.
        if domain == dropout.CONTEXT:
            return first - (self.begin - self.first_query)
        return first

    def owners(self) -> list[tuple[Array, Array, Array]]:
        """Seed, global row and global head of every head of the group."""
        seed = self.scalars.seed_and_offsets[0]
        row = self.scalars.seed_and_offsets[1] + self.row
        head = self.scalars.seed_and_offsets[2] + self.group * self.sizes.heads
        return [(seed, row, head + p) for p in range(self.sizes.heads)]

    def _by_head(self, numbers: list[Array], shape: tuple[int, ...]) -> Array:
        """A number for each head, on the rows of the head."""
        row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
        found = jnp.full(shape, numbers[0])
        for p, number in enumerate(numbers[1:], 1):
            found = jnp.where(row >= p * self.sizes.query_tile, number, found)
        return found


def in_all_lanes(x_1T: Array) -> Array:
    """What the lanes have, as rows (T, 128) that are the same in all lanes."""
    return jnp.broadcast_to(x_1T, (LANES, x_1T.shape[1])).T


def stretch(first: Any, size: int) -> Any:
    """So many rows or columns from an aligned one."""
    if isinstance(first, int):
        return pl.ds(first, size)
    return pl.ds(pl.multiple_of(first, math.gcd(size, LANES)), size)


def stacked(sizes: Sizes, x_TE: Array) -> Array:
    """The rows of every head below each other, (R, E), each zero in the lanes of other heads.

    So one product over all lanes is each head's own.
    """
    if sizes.heads == 1:
        return x_TE
    lane_TE = jax.lax.broadcasted_iota(jnp.int32, x_TE.shape, 1)
    own = [jax.lax.div(lane_TE, sizes.K) == p for p in range(sizes.heads)]
    # A mask of 32 bits selects among numbers of 32 bits.
    wide_TE = x_TE.astype(jnp.float32)
    return jnp.concatenate([jnp.where(own_TE, wide_TE, 0) for own_TE in own]).astype(x_TE.dtype)


def unstacked(sizes: Sizes, x_RE: Array) -> Array:
    """The inverse of `stacked`: of every head's rows its own lanes, (T, E)."""
    T = sizes.query_tile
    found_TE = x_RE[:T]
    lane_TE = jax.lax.broadcasted_iota(jnp.int32, found_TE.shape, 1)
    for p in range(1, sizes.heads):
        found_TE = jnp.where(lane_TE >= p * sizes.K, x_RE[p * T : (p + 1) * T], found_TE)
    return found_TE
