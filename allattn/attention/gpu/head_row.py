"""Which keys the queries of one head of one row can reach, in tiles, and where their logits lie.

The work of the GPU kernels is cut into head rows: one head of one row of the batch. Within a head
row, query t and key j form a pair when j lies in a band below the diagonal. With query_start 6,
T 4, first_distance 1, span 2 and ramp R = 2 the band is

    key j         0  1  2  3  4  5  6  7  8  9
    query t = 0   .  r  r  r  1  1  q  .  .  .      q  the query itself, at key query_start + t
          t = 1   .  .  r  r  r  1  1  q  .  .      1  mask m = 1: distances first_distance to far
          t = 2   .  .  .  r  r  r  1  1  q  .      r  on the ramp, its two ties included
          t = 3   .  .  .  .  r  r  r  1  1  q      .  no pair
                     |                    |
               origin, oldest           newest

    distance   d = query_start + t - j
    reach      distances that count: 5 here, of which `far` - first_distance + 1 = 2 need no mask
    far        the farthest distance before the ramp: ceil(span) = 2
    origin     the oldest key within reach of query 0; it may be negative
    oldest     the oldest key of the band that exists: not before 0 or key_start
    newest     the newest key of the band that exists: not after S - 1; -1 if there is no band
    column     c = j - origin - t: 0 is the farthest distance within reach, reach - 1 the nearest

Tiles whose pairs all exist and lie before the ramp need no mask, which costs more than a product:
the methods `unmasked_...` find them. `tests/attention/test_pallas_gpu.py` compares any spans,
starts and sizes with the reference.

The logits by position of the head row lie in a scratch array, one row of `stride` numbers for each
query and a column for each distance. Key j of query t lies where

    (address - j) is a multiple of ALIGNED

so that the keys of a tile can be loaded and stored in pieces of ALIGNED numbers, although every row
of the band begins one key later than the one before. A row may thus begin up to 2 (ALIGNED - 1)
numbers after its first address.

Dimension key: T query of the tile, C key of the tile, D distance of the tile (farthest first), N
persistent pair of the tile, X any; B row, H head, U head row.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from allattn.attention import dropout
from allattn.attention.contract import Static
from allattn.attention.numerics import CallSizes

Array = jax.Array

# Numbers: 16 bytes of bfloat16, the most that one instruction moves.
ALIGNED = 8
# Added to the number of a query, key or column that does not exist: so far from all others that no
# comparison of the two finds a pair. Also keeps `origin` from being negative where it is divided.
AWAY = 2**30


@dataclasses.dataclass(frozen=True)
class Sizes(CallSizes):
    """Static sizes of one call; a tile of keys is also one of distances and of persistent pairs."""

    # T, rounded up to whole tiles of every kernel
    length: int
    # "cuda" or "rocm", for which the kernel is compiled; "": interpreted
    platform: str = ""

    def width(self, reach: Any) -> Any:
        """Columns of the scratch array that a head row's queries take, in whole tiles."""
        return pl.cdiv(reach + (reach > 0) * 2 * (ALIGNED - 1), self.key_tile) * self.key_tile

    @property
    def lanes(self) -> int:
        """The head width as a power of two: Triton knows no other sizes."""
        return max(16, pl.next_power_of_2(self.K))


class Scalars(NamedTuple):
    """What is known only at run time: small arrays in the caller, references in a kernel."""

    # first head row and number of head rows that the scratch array holds now
    chunk: Any
    # where a head row's logits begin, in rows of `length` numbers, counted from head row 0
    base_U: Any
    # see the drawing above
    reach_H: Any
    span_H: Any
    query_start_B: Any
    key_start_B: Any
    # dropout seed, row offset, head offset
    seed_and_offsets: Any


class TileRange(NamedTuple):
    """Tiles from the first to the last; there are none if last < first."""

    first: Any
    last: Any


def iota(length: int, axis: int) -> Array:
    """0, 1, 2, ... along an axis of two."""
    shape = (length, 1) if axis == 0 else (1, length)
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def indices(tile: Any, size: int, axis: int) -> Array:
    """Numbers of a tile's queries, keys, columns or pairs, down (axis 0) or across (axis 1)."""
    return tile * size + iota(size, axis)


@dataclasses.dataclass(frozen=True)
class HeadRow:
    """One head of one row: the band of the drawing, and its part of the scratch array."""

    static: Static
    sizes: Sizes
    scalars: Scalars
    # which head row, row and head of this call
    number: Array
    row: Array
    head: Array
    # the band
    reach: Array
    span: Array
    query_start: Array
    far: Array
    origin: Array
    oldest: Array
    newest: Array
    # tiles of columns within reach, numbers from one query to the next, and address of the first
    column_tiles: Array
    stride: Array
    base: Array

    @classmethod
    def load(cls, static: Static, sizes: Sizes, scalars: Scalars, number: Array) -> "HeadRow":
        """The head row of a number, from the scalars that are known before the kernel runs.

        Args:
          static, sizes: what is fixed when the call is traced.
          scalars: references to the small arrays of the call.
          number: int32, row * H + head.

        Returns:
          The head row, all of whose attributes are int32 scalars but for the span (float32).
        """
        row = jax.lax.div(number, sizes.H)
        head = jax.lax.rem(number, sizes.H)
        reach = scalars.reach_H[head]
        span = scalars.span_H[head]
        query_start = scalars.query_start_B[row]

        # distances: the last that counts, the last before the ramp
        last_distance = static.first_distance + reach - 1
        far = jnp.minimum(last_distance, jnp.ceil(span).astype(jnp.int32))

        # keys: the band cut to those that exist
        origin = query_start - static.first_distance - reach + 1
        oldest = jnp.maximum(origin, 0)
        newest = query_start + sizes.T - 1 - static.first_distance
        oldest = jnp.maximum(oldest, scalars.key_start_B[row])
        newest = jnp.where(reach > 0, jnp.minimum(newest, sizes.S - 1), -1)

        # the part of the scratch array; the hints let whole pieces be loaded
        column_tiles = pl.cdiv(reach, sizes.key_tile)
        stride = pl.multiple_of(sizes.width(reach), sizes.key_tile)
        base = (scalars.base_U[number] - scalars.base_U[scalars.chunk[0]]) * sizes.length
        return cls(
            static=static,
            sizes=sizes,
            scalars=scalars,
            number=number,
            row=row,
            head=head,
            reach=reach,
            span=span,
            query_start=query_start,
            far=far,
            origin=origin,
            oldest=oldest,
            newest=newest,
            column_tiles=column_tiles,
            stride=stride,
            base=pl.multiple_of(base, sizes.key_tile),
        )

    # --- tiles that hold a pair, and tiles that hold nothing but pairs before the ramp ------------

    def queries(self, tile: Any) -> Array:
        """Numbers of the queries of a tile, as (T, 1)."""
        return indices(tile, self.sizes.query_tile, 0)

    def key_tiles(self, query_tile: Any) -> TileRange:
        """Tiles of keys with a pair for any query of a tile."""
        first_query = query_tile * self.sizes.query_tile
        oldest = jnp.maximum(self.oldest, self.origin + first_query)
        last_key = self.query_start + first_query + self.sizes.query_tile - 1
        newest = last_key - self.static.first_distance
        return self.tiles_between(oldest, jnp.minimum(newest, self.newest))

    def unmasked_key_tiles(self, query_tile: Any) -> TileRange:
        """Tiles of keys all of which every query of a tile sees, before the ramp begins."""
        first_query = query_tile * self.sizes.query_tile
        last_query = first_query + self.sizes.query_tile - 1
        oldest = jnp.maximum(self.oldest, self.query_start + last_query - self.far)
        nearest = self.query_start + first_query - self.static.first_distance
        newest = jnp.minimum(self.newest, nearest)
        newest = jnp.where(last_query < self.sizes.T, newest, -1)
        return whole_tiles(oldest, newest, self.sizes.key_tile)

    def query_tiles(self, key_tile: Any) -> TileRange:
        """Tiles of queries with a pair for any key of a tile that holds one."""
        first = key_tile * self.sizes.key_tile - self.query_start + self.static.first_distance
        last = first + self.sizes.key_tile - 1 + self.reach - 1
        first = jnp.clip(first, 0, self.sizes.T - 1)
        first_tile = jax.lax.div(first, self.sizes.query_tile)
        last = jnp.clip(last, 0, self.sizes.T - 1)
        last_tile = jax.lax.div(last, self.sizes.query_tile)
        return TileRange(first_tile, last_tile)

    def unmasked_query_tiles(self, key_tile: Any) -> TileRange:
        """Tiles of queries all of which see every key of a tile, before the ramp begins."""
        first_key = key_tile * self.sizes.key_tile
        last_key = first_key + self.sizes.key_tile - 1
        first = jnp.maximum(last_key + self.static.first_distance - self.query_start, 0)
        last = jnp.minimum(first_key + self.far - self.query_start, self.sizes.T - 1)
        all_exist = (first_key >= self.oldest) & (last_key <= self.newest)
        return whole_tiles(first, jnp.where(all_exist, last, -1), self.sizes.query_tile)

    def unmasked_column_tiles(self, query_tile: Any) -> TileRange:
        """Tiles of columns that hold a pair for every query of a tile."""
        first_query = query_tile * self.sizes.query_tile
        last_query = first_query + self.sizes.query_tile - 1
        first = jnp.maximum(self.oldest - self.origin - first_query, 0)
        last = jnp.minimum(self.newest - self.origin - last_query, self.reach - 1)
        last = jnp.where(last_query < self.sizes.T, last, -1)
        return whole_tiles(first, last, self.sizes.key_tile)

    def unmasked_query_tiles_of_columns(self, column_tile: Any) -> TileRange:
        """Tiles of queries all of which have a pair in every column of a tile."""
        first_column = column_tile * self.sizes.key_tile
        last_column = first_column + self.sizes.key_tile - 1
        first = jnp.maximum(self.oldest - self.origin - first_column, 0)
        last = jnp.minimum(self.newest - self.origin - last_column, self.sizes.T - 1)
        last = jnp.where(last_column < self.reach, last, -1)
        return whole_tiles(first, last, self.sizes.query_tile)

    def tiles_between(self, oldest: Array, newest: Array) -> TileRange:
        """Tiles of keys that hold any key from the oldest to the newest."""
        last = jax.lax.div(newest, self.sizes.key_tile)
        first = jax.lax.div(oldest, self.sizes.key_tile)
        return TileRange(first, jnp.where(newest >= oldest, last, -1))

    # --- single pairs -----------------------------------------------------------------------------
    # Queries come as a column and keys as a row, or the other way round. What can be computed on
    # those is, so that a pair costs two instructions.

    def exists(self, query: Array, key: Array) -> Array:
        """Whether a pair of query and key counts."""
        key_exists = (key >= self.oldest) & (key <= self.newest)
        from_origin = jnp.where(key_exists, key - self.origin, -AWAY)
        column = from_origin - jnp.where(query < self.sizes.T, query, AWAY)
        # 0 <= column < reach in one comparison: without a sign, a negative number is a large one
        return column.astype(jnp.uint32) < self.reach.astype(jnp.uint32)

    def column_exists(self, query: Array, column: Array) -> Array:
        """Whether a pair of query and column counts."""
        query = jnp.where(query < self.sizes.T, query, AWAY)
        from_origin = query + jnp.where(column < self.reach, column, AWAY)
        keys = jnp.maximum(self.newest - self.oldest + 1, 0)
        from_oldest = from_origin - (self.oldest - self.origin)
        return from_oldest.astype(jnp.uint32) < keys.astype(jnp.uint32)

    def ramp(self, query: Array, key: Array, exists: Array) -> Array:
        """`span.ramp_position` of a pair, -1 where there is none."""
        # Sums of whole numbers are exact in float32; a query's part is computed once.
        query_part = (self.static.ramp + 1 - self.query_start - query).astype(jnp.float32)
        beyond = query_part + key.astype(jnp.float32)
        return jnp.where(exists, (beyond + self.span) / self.static.ramp, -1)

    def address(self, query: Array, key: Array) -> Array:
        """Where the logit of a pair lies in the scratch array: see the head of this file."""
        row = self.base + query * self.stride
        shifted = row - _align(query) - (_align(self.origin + AWAY) - AWAY)
        return shifted + key

    def address_of_column(self, query: Array, column: Array) -> Array:
        """The address of a pair that is given by its column."""
        shift = query - _align(query) + (self.origin + AWAY) - _align(self.origin + AWAY)
        return self.base + query * self.stride + shift + column

    # --- dropout ----------------------------------------------------------------------------------

    def keeps_keys(self, query: Array, key: Array) -> Array | None:
        """Which weights of keys dropout keeps; None: all."""
        if not self.static.dropout_rate:
            return None
        # The mask counts keys from the block's first query.
        return self._keeps(query, key - self.query_start, dropout.CONTEXT)

    def keeps_pairs(self, query: Array, pair: Array) -> Array | None:
        """Which weights of persistent pairs dropout keeps; None: all."""
        if not self.static.dropout_rate:
            return None
        return self._keeps(query, pair, dropout.PERSISTENT)

    def _keeps(self, query: Array, index: Array, domain: int) -> Array:
        """Which weights dropout keeps, of queries and the index of each column."""
        seed = self.scalars.seed_and_offsets[0]
        row_offset = self.scalars.seed_and_offsets[1]
        head_offset = self.scalars.seed_and_offsets[2]
        owner = (seed, row_offset + self.row, head_offset + self.head)
        query_words = dropout.query_words(*owner, query, dropout.CONTEXT)
        column_words = dropout.column_words(*owner, index, domain)
        return dropout.keep(query_words, column_words, self.static.dropout_rate)


def _align(number: Array) -> Array:
    """Round a number that is not negative down to a multiple of ALIGNED."""
    return jax.lax.div(number, ALIGNED) * ALIGNED


def whole_tiles(first: Array, last: Array, tile: int) -> TileRange:
    """Tiles that lie wholly between two numbers, both included."""
    return TileRange(jax.lax.div(first + tile - 1, tile), jax.lax.div(last + 1, tile) - 1)


# --- loops of a program ---------------------------------------------------------------------------


def for_head_row(
    static: Static, sizes: Sizes, scalars: Scalars, work: Callable[[HeadRow, Array], None]
) -> None:
    """Do part `axis 0` of the work of head row `axis 1` of the grid.

    Head rows that the scratch array does not hold now are left alone.
    """
    part = pl.program_id(0)
    slot = pl.program_id(1)
    first = scalars.chunk[0]
    head_rows = scalars.chunk[1]

    @pl.when(slot < head_rows)
    def _() -> None:
        work(HeadRow.load(static, sizes, scalars, first + slot), part)


def for_each_tile(tiles: TileRange, unmasked: TileRange, body: Callable, carry: Any) -> Any:
    """Carry a value through tiles, with a mask before and after those that need none.

    Args:
      tiles: all tiles.
      unmasked: tiles that need no mask; only those among `tiles` are visited.
      body: maps (masked, tile, carry) to the new carry, `masked` being known when tracing.
      carry: arrays, in any structure.

    Returns:
      The last carry.
    """
    # The loops run over [first, begin), [begin, end) and [end, last].
    first, last = tiles
    begin = jnp.clip(unmasked.first, first, jnp.maximum(last + 1, first))
    end = jnp.clip(unmasked.last + 1, begin, jnp.maximum(last + 1, begin))
    carry = jax.lax.fori_loop(first, begin, functools.partial(body, True), carry)
    carry = jax.lax.fori_loop(begin, end, functools.partial(body, False), carry)
    return jax.lax.fori_loop(end, last + 1, functools.partial(body, True), carry)
