"""Units of the GPU's work, one head of one row each: what they can reach, and how tiles of them are read and written.

Programs see whole arrays, with batch and position in rows, heads and their width in columns, and
load tiles of them. Column c of query t is the key that lies c places after the oldest key within
t's reach. In the scratch array the keys of all queries are aligned to ALIGNED numbers, so that they
can be loaded and stored in pieces of that many: a row begins up to twice as many places early.

Dimension key: T query of the tile, C key of the tile, D distance of the tile (farthest first), N
persistent pair of the tile, K head width, X any; B row, H head, U unit.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from allattn.attention import dropout
from allattn.attention.contract import Static
from allattn.attention.numerics import CallSizes

Array = jax.Array

ALIGNED = 8  # numbers: 16 bytes of bfloat16, the most that one instruction moves
AWAY = (
    2**30
)  # where a query or key is put that does not exist: so far from all others that it meets none
LOG2_E = math.log2(math.e)


@dataclasses.dataclass(frozen=True)
class Sizes(CallSizes):
    """Static sizes of one call; a tile of keys is also one of distances and of persistent pairs."""

    length: int  # T, rounded up to whole tiles of every kernel
    platform: str = ""  # that the kernel is compiled for; "": interpreted

    def width(self, reach: Any) -> Any:
        """Columns of the scratch array that a unit's rows take, in whole tiles."""
        return pl.cdiv(reach + (reach > 0) * 2 * (ALIGNED - 1), self.key_tile) * self.key_tile

    @property
    def lanes(self) -> int:
        """The head width as a power of two: Triton knows no other sizes."""
        return max(16, pl.next_power_of_2(self.K))


class Scalars(NamedTuple):
    """What is known only at run time, as references to small arrays."""

    chunk: Any  # first unit and number of units that the scratch array holds now
    base_U: Any  # where a unit's logits begin, in rows of `length` numbers, counted from unit 0
    reach_H: Any
    span_H: Any
    query_start_B: Any
    key_start_B: Any
    numbers: Any  # seed, row_offset, head_offset


SCALARS = len(Scalars._fields)


class Unit:
    """One head of one row: what its queries can reach, and where its logits by position lie."""

    def __init__(self, static: Static, sizes: Sizes, scalars: Scalars, number):
        self.static, self.sizes, self.scalars = static, sizes, scalars
        self.number = number
        self.row, self.head = jax.lax.div(number, sizes.H), jax.lax.rem(number, sizes.H)
        self.reach, self.span = scalars.reach_H[self.head], scalars.span_H[self.head]
        self.begin = scalars.query_start_B[self.row]  # key index at which query 0 sits
        self.far = jnp.minimum(
            static.first_distance + self.reach - 1, jnp.ceil(self.span).astype(jnp.int32)
        )
        self.origin = (
            self.begin - static.first_distance - self.reach + 1
        )  # key of query 0 in column 0
        oldest, newest = (
            jnp.maximum(self.origin, 0),
            self.begin + sizes.T - 1 - static.first_distance,
        )
        self.oldest = jnp.maximum(oldest, scalars.key_start_B[self.row])
        self.newest = jnp.where(self.reach > 0, jnp.minimum(newest, sizes.S - 1), -1)
        self.column_tiles = pl.cdiv(self.reach, sizes.key_tile)
        self.stride = pl.multiple_of(sizes.width(self.reach), sizes.key_tile)
        base = (scalars.base_U[number] - scalars.base_U[scalars.chunk[0]]) * sizes.length
        self.base = pl.multiple_of(base, sizes.key_tile)

    def queries(self, tile) -> Array:
        """Numbers of the queries of a tile, as (T, 1)."""
        return tile * self.sizes.query_tile + iota(self.sizes.query_tile, 0)

    def keys_of(self, tile) -> tuple[Array, Array]:
        """The first and the last tile of keys that a tile of queries can meet; last < first if none."""
        first_query = tile * self.sizes.query_tile
        oldest = jnp.maximum(self.oldest, self.origin + first_query)
        newest = self.begin + first_query + self.sizes.query_tile - 1 - self.static.first_distance
        return self.tiles(oldest, jnp.minimum(newest, self.newest))

    def tiles(self, oldest, newest) -> tuple[Array, Array]:
        """The first and the last tile of keys from the oldest to the newest; last < first if there are none."""
        last = jax.lax.div(newest, self.sizes.key_tile)
        return jax.lax.div(oldest, self.sizes.key_tile), jnp.where(newest >= oldest, last, -1)

    def queries_of(self, tile) -> tuple[Array, Array]:
        """The first and the last tile of queries that a tile of keys can meet."""
        first = tile * self.sizes.key_tile - self.begin + self.static.first_distance
        last = first + self.sizes.key_tile - 1 + self.reach - 1
        tiles = (jnp.clip(x, 0, self.sizes.T - 1) for x in (first, last))
        first, last = (jax.lax.div(x, self.sizes.query_tile) for x in tiles)
        return first, last

    def inside(self, tile) -> tuple[Array, Array]:
        """The first and the last tile of keys all of which every query of a tile sees, before the ramp begins."""
        first_query = tile * self.sizes.query_tile
        last_query = first_query + self.sizes.query_tile - 1
        oldest = jnp.maximum(self.oldest, self.begin + last_query - self.far)
        newest = jnp.minimum(self.newest, self.begin + first_query - self.static.first_distance)
        return _whole_tiles(
            oldest, jnp.where(last_query < self.sizes.T, newest, -1), self.sizes.key_tile
        )

    def queries_inside(self, tile) -> tuple[Array, Array]:
        """The first and the last tile of queries all of which see every key of a tile, before the ramp begins."""
        first_key = tile * self.sizes.key_tile
        last_key = first_key + self.sizes.key_tile - 1
        first = jnp.maximum(last_key + self.static.first_distance - self.begin, 0)
        last = jnp.minimum(first_key + self.far - self.begin, self.sizes.T - 1)
        whole = (first_key >= self.oldest) & (last_key <= self.newest)
        return _whole_tiles(first, jnp.where(whole, last, -1), self.sizes.query_tile)

    def columns_inside(self, tile) -> tuple[Array, Array]:
        """The first and the last tile of columns that hold a pair for every query of a tile."""
        first_query = tile * self.sizes.query_tile
        last_query = first_query + self.sizes.query_tile - 1
        first = jnp.maximum(self.oldest - self.origin - first_query, 0)
        last = jnp.minimum(self.newest - self.origin - last_query, self.reach - 1)
        return _whole_tiles(
            first, jnp.where(last_query < self.sizes.T, last, -1), self.sizes.key_tile
        )

    def queries_with_columns(self, tile) -> tuple[Array, Array]:
        """The first and the last tile of queries that have a pair in every column of a tile."""
        first_column = tile * self.sizes.key_tile
        last_column = first_column + self.sizes.key_tile - 1
        first = jnp.maximum(self.oldest - self.origin - first_column, 0)
        last = jnp.minimum(self.newest - self.origin - last_column, self.sizes.T - 1)
        return _whole_tiles(
            first, jnp.where(last_column < self.reach, last, -1), self.sizes.query_tile
        )

    def exists(self, query, key) -> Array:
        """Whether a pair of query and key counts; each is a row or a column, so that a pair costs two instructions."""
        place = jnp.where((key >= self.oldest) & (key <= self.newest), key - self.origin, -AWAY)
        column = place - jnp.where(query < self.sizes.T, query, AWAY)
        return column.astype(jnp.uint32) < self.reach.astype(
            jnp.uint32
        )  # a negative one is a large one

    def holds(self, query, column) -> Array:
        """Whether a column of the scratch array holds a pair of a query; each is a row or a column."""
        place = jnp.where(query < self.sizes.T, query, AWAY) + jnp.where(
            column < self.reach, column, AWAY
        )
        keys = jnp.maximum(self.newest - self.oldest + 1, 0)
        return (place - (self.oldest - self.origin)).astype(jnp.uint32) < keys.astype(jnp.uint32)

    def ramp(self, query, key, exists: Array) -> Array:
        """`span.ramp_position` of a pair, -1 where there is none; the sum of whole numbers is exact."""
        beyond = (self.static.ramp + 1 - self.begin - query).astype(jnp.float32) + key.astype(
            jnp.float32
        )
        return jnp.where(exists, (beyond + self.span) / self.static.ramp, -1)

    def place(self, query, key) -> Array:
        """Where the logit of a pair lies in the scratch array: as far from an aligned place as the key from one."""
        return (
            self.base
            + query * self.stride
            - _aligned(query)
            - (_aligned(self.origin + AWAY) - AWAY)
            + key
        )

    def place_of_column(self, query, column) -> Array:
        """The same for a pair given by its column."""
        early = query - _aligned(query) + (self.origin + AWAY) - _aligned(self.origin + AWAY)
        return self.base + query * self.stride + early + column

    def keeps(self, query, key=None, pair=None) -> Array | None:
        """Which weights of keys or of persistent pairs dropout keeps; None: all."""
        if not self.static.dropout_rate:
            return None
        seed, first_row, first_head = (self.scalars.numbers[i] for i in range(3))
        domain = dropout.CONTEXT if pair is None else dropout.PERSISTENT
        word = dropout.query_key(seed, first_row + self.row, first_head + self.head, query, domain)
        if (
            pair is None
        ):  # its index is the distance, the part of the query of which is added for all its keys at once
            word, pair = dropout.moved(word, self.begin + query), -key
        return dropout.keep(word, pair, self.static.dropout_rate)


def _aligned(number: Array) -> Array:
    """Rounded down; the number is not negative."""
    return jax.lax.div(number, ALIGNED) * ALIGNED


def _whole_tiles(first, last, tile: int) -> tuple[Array, Array]:
    """The tiles that lie wholly between two numbers."""
    return jax.lax.div(first + tile - 1, tile), jax.lax.div(last + 1, tile) - 1


def for_tiles(tiles: tuple, inside: tuple, body: Callable, carry: Any) -> Any:
    """Do all tiles from the first to the last: those inside need no mask, which costs more than a product."""
    (first, last), (begin, end) = tiles, inside
    begin = jnp.clip(begin, first, jnp.maximum(last + 1, first))
    end = jnp.clip(end + 1, begin, jnp.maximum(last + 1, begin))
    carry = jax.lax.fori_loop(first, begin, functools.partial(body, True), carry)
    carry = jax.lax.fori_loop(begin, end, functools.partial(body, False), carry)
    return jax.lax.fori_loop(end, last + 1, functools.partial(body, True), carry)


def iota(length: int, axis: int) -> Array:
    """0, 1, 2, ... along an axis of two."""
    return jax.lax.broadcasted_iota(jnp.int32, (length, 1) if axis == 0 else (1, length), axis)


def _columns(sizes: Sizes, head) -> tuple[Array, Array]:
    """Where a head's lanes lie among all heads', and which of them exist."""
    lane_1K = iota(sizes.lanes, 1)
    return head * sizes.K + lane_1K, lane_1K < sizes.K


def load(ref: Any, sizes: Sizes, head, row_X1, exists_X1) -> Array:
    """Rows of one head, 0 where they do not exist."""
    column_1K, lane_1K = _columns(sizes, head)
    shape = (row_X1.shape[0], sizes.lanes)
    where = (jnp.broadcast_to(x, shape) for x in (row_X1, column_1K))
    mask_XK = jnp.broadcast_to(exists_X1 & lane_1K, shape)
    return plgpu.load(ref.at[tuple(where)], mask=mask_XK, other=jnp.zeros((), ref.dtype))


def store(ref: Any, sizes: Sizes, head, row_X1, exists_X1, value_XK: Array) -> None:
    column_1K, lane_1K = _columns(sizes, head)
    row_X1 = jnp.where(
        exists_X1, row_X1, ref.shape[0]
    )  # interpreted, a negative row would be one from the end
    where = (jnp.broadcast_to(x, value_XK.shape) for x in (row_X1, column_1K))
    mask_XK = jnp.broadcast_to(exists_X1 & lane_1K, value_XK.shape)
    plgpu.store(ref.at[tuple(where)], value_XK.astype(ref.dtype), mask=mask_XK)


def load_queries(ref: Any, sizes: Sizes, unit: Unit, query_T1: Array) -> Array:
    return load(ref, sizes, unit.head, unit.row * sizes.T + query_T1, query_T1 < sizes.T)


def load_keys(ref: Any, sizes: Sizes, unit: Unit, key_C1: Array) -> Array:
    exists_C1 = (key_C1 >= unit.oldest) & (key_C1 <= unit.newest)
    return load(ref, sizes, unit.head, unit.row * sizes.S + key_C1, exists_C1)


def load_pairs(ref: Any, sizes: Sizes, head, pair_N1: Array) -> Array:
    """Persistent keys or values, which lie head by head."""
    return load(ref, sizes, 0, head * sizes.N + pair_N1, pair_N1 < sizes.N)


def load_positions(ref: Any, sizes: Sizes, unit: Unit, column_D1: Array) -> Array:
    """Position keys of some columns of the scratch array."""
    head = 0 if sizes.shared else unit.head
    row_D1 = head * sizes.L + unit.reach - 1 - column_D1
    return load(ref, sizes, 0, row_D1, column_D1 < unit.reach)


def load_statistic(ref: Any, sizes: Sizes, unit: Unit, query: Array) -> Array:
    """One number per query, from (B H T): log-sum-exp or delta, in the shape of the queries' numbers."""
    return plgpu.load(ref.at[unit.number * sizes.T + query], mask=query < sizes.T, other=0.0)


def exp2(sizes: Sizes, x: Array) -> Array:
    """2 to the power of x; with CUDA one instruction, which gives 0 for what is below the least normal number."""
    if sizes.platform != "cuda":
        return jnp.exp2(x)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return plgpu.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[like],
    )[0]


def zeros(sizes: Sizes, rows: int) -> Array:
    return jnp.zeros((rows, sizes.lanes), jnp.float32)


def for_unit(
    static: Static, sizes: Sizes, scalars: Scalars, work: Callable[[Unit, Array], None]
) -> None:
    """Do the work of a unit, axis 1 of the grid, if the scratch array holds it now; axis 0 is the program's part."""
    part, slot = pl.program_id(0), pl.program_id(1)
    first, units = scalars.chunk[0], scalars.chunk[1]

    @pl.when(slot < units)
    def _() -> None:
        work(Unit(static, sizes, scalars, first + slot), part)


def write(ref: Any, place: Array, exists: Array | None, value: Array) -> None:
    if exists is not None:  # interpreted, masked writes must not fall on the place of another pair
        place = jnp.where(exists, place, ref.shape[0])
    plgpu.store(ref.at[place], value, mask=exists)


def load_diagonal(ref: Any, unit: Unit, query, key, exists: Array | None) -> Array:
    """Numbers of pairs, 0 where there is none."""
    other = None if exists is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref.at[unit.place(query, key)], mask=exists, other=other)


def load_by_distance(masked: bool, ref: Any, unit: Unit, query, column) -> Array:
    """Numbers of pairs by query and column, 0 where there is none."""
    place = ref.at[unit.place_of_column(query, column)]
    if not masked:
        return plgpu.load(place)
    return plgpu.load(place, mask=unit.holds(query, column), other=jnp.zeros((), ref.dtype))
