"""The backward TPU kernel: all gradients, tile by tile of queries and keys.

One step of the grid holds a segment of keys and a block of queries of one group of heads. All
blocks of queries pass a segment before the next one comes, so gradients of keys and values stay on
the chip until they are complete. The weights come again from one log-sum-exp per query (as in
FlashAttention, Dao et al. 2022, arXiv 2205.14135). For each tile of queries the kernel works on the
tiles of keys within reach (`tile.Tile`): 256 keys with the mask of the spans at both edges, 512
keys without any mask between them. Each costs eight products,

    logits, and gradients of the weights     q k'  (q p' skewed)  do v'       keys stream
    gradients, from those of the logits      ds k                             keys or lanes stream
        of the position queries              p (ds unskewed)'                 lanes stream
        of values, keys and positions        do' w   q' ds   q' (ds unskewed)

whose last four come out turned, lanes first: so the 64 lanes of a head stream through the matrix
unit past the tile, and not the tile's 128 rows past the lanes.

No factor is applied to a weight: those of the scale and of dropout, 1 / (1 - rate), multiply
complete sums. Logits are in units of log2(e).

Dimension key: B batch, H head, K head width, S context key, L distance, N persistent pair; T query
of the tile, R row of the stack (T queries of each head), C key of a tile, X pair or key, Q column
of a block of 128, W column of the window of positions, E the group's heads side by side, P head of
the group.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from allattn.attention import dropout
from allattn.attention.contract import Inputs, Static
from allattn.attention.numerics import LOG2_E, NT_DIMENSIONS, dot
from allattn.attention.span import MAX_MASK_DERIVATIVE
from allattn.attention.tpu import kept, skew
from allattn.attention.tpu.call import (
    Arguments,
    Grid,
    Step,
    loaded,
    offset_block,
    operand_blocks,
    query_block,
    run,
    statistic_block,
)
from allattn.attention.tpu.operands import (
    SMALL_VMEM,
    Operands,
    heads_apart,
    logit_unit,
    offsets_of,
    pair_steps,
    vmem,
)
from allattn.attention.tpu.skew import LANES, SUBLANES, lanes_of
from allattn.attention.tpu.tile import Blocks, Scalars, Sizes, Tile, stacked, stretch, unstacked

Array = jax.Array

# Where there is little memory: keys of a tile, and keys that a step of the grid holds, at most; the
# latter are half as many if the table, the pairs and their gradients take more bytes than these.
SMALL_TILE = 2 * LANES
SMALL_STEP = 2 * SMALL_TILE
SMALL_GROUP = 9 * 2**20
# Of a logit less the log-sum-exp, where the span mask is 0 and nothing bounds it: exp(80) x 0 is 0,
# inf x 0 is not a number.
LARGEST_EXCESS = 80 * LOG2_E


class BackwardOperands(NamedTuple):
    """What the kernel reads: what the forward kernel reads, and three arrays more."""

    operands: Operands
    # (query_block, E)
    d_out: Any
    # (query_block, P): log-sum-exp, and out . d_out
    lse: Any
    delta: Any


class Gradients(NamedTuple):
    """What the kernel writes; all but gradients of keys and values in float32."""

    # (all T, E)
    d_query: Any
    # (E, segment)
    d_key: Any
    d_value: Any
    # (E, positions), and (E, N), but for the factors
    d_position: Any
    d_persistent_key: Any
    d_persistent_value: Any
    # (R, 128): parts of the sum over pairs on the ramp, but for the factors
    d_span: Any
    # (P, N), but for a factor; None where there are no offsets
    d_persistent_bias: Any = None
    # (all T, E); None where the same queries ask keys and positions: d_query then has both parts
    d_position_query: Any = None


class Scratch(NamedTuple):
    """What the kernel keeps between steps and stages."""

    # (E, segment), float32: sums over queries
    d_key: Any
    d_value: Any
    # of the tile of queries, stacked (R, E), and turned (E, T); the position queries turned have
    # the order of rows of `skew.unskewed`
    query: Any
    position_query: Any
    d_out: Any
    query_turned: Any
    position_query_turned: Any
    d_out_turned: Any
    # (R, 128), the same in all lanes
    lse: Any
    delta: Any
    # what dropout knows of the queries; None without dropout
    kept: Any
    # float32: (T, E); sums of gradients (R, E); of pairs, turned (E, T); and of positions, turned
    # (E, T), with reversed rows
    queries: Any
    d_query: Any
    d_query_of_pairs: Any
    d_position_query: Any
    # of the tile of keys, (R, C) or (R, X): float32; gradients of logits take the place of these
    logits: Any
    d_weights: Any
    # and as factors of products, the last one (R, W)
    weights_factor: Any
    d_logits_factor: Any
    d_window_factor: Any


def backward_kernel(
    static: Static,
    sizes: Sizes,
    scalars: Scalars,
    inputs: BackwardOperands,
    outputs: Gradients,
    scratch: Scratch,
) -> None:
    """Grid (group, row, segment of keys, query block); groups may run at once."""
    group, row, segment, query_block = (pl.program_id(axis) for axis in range(4))
    tile_at = functools.partial(Tile, static, sizes, scalars, group, row)
    # Sums begin at 0: those of the group, and those of the segment.
    is_first = (row == 0) & (segment == 0) & (query_block == 0)
    pl.when(is_first)(lambda: _start_group(tile_at(0), outputs))
    stretch = _reached(sizes, tile_at, segment)
    pl.when(query_block == 0)(lambda: _start_keys(sizes, outputs, scratch, stretch))

    def gradients_of(number: Array | int) -> _TileGradients:
        first_query = query_block * sizes.query_block + number * sizes.query_tile
        return _TileGradients(tile_at(first_query), inputs, outputs, scratch, number)

    # Every tile of queries adds its part.
    def one_tile(number: Array, _: None) -> None:
        # It ends beside the beginning of the next one. Before the first there is none: what is
        # written there is written again.
        if all_at_once(sizes):
            gradients_of(jnp.maximum(number - 1, 0)).finish()
        gradients_of(number).add(segment)

    tiles = sizes.query_block // sizes.query_tile
    jax.lax.fori_loop(0, tiles, one_tile, None)
    if all_at_once(sizes):
        gradients_of(tiles - 1).finish()

    # The last block of queries completes the gradients of keys and values.
    @pl.when(query_block == sizes.T // sizes.query_block - 1)
    def _finish() -> None:
        _finish_keys(static, sizes, outputs, scratch, stretch)


def all_at_once(sizes: Sizes) -> bool:
    """Whether a tile of queries meets all its keys in one step, and pairs in any case."""
    return sizes.segments == 1 and sizes.N > 0


def _start_group(tile: Tile, outputs: Gradients) -> None:
    """Sums over rows begin at 0."""
    sums = (outputs.d_persistent_key, outputs.d_persistent_value, outputs.d_persistent_bias)
    for output in (*sums, outputs.d_span):
        if output is not None:
            output[...] = jnp.zeros(output.shape, output.dtype)

    # Of the position table only columns that a window of any tile can have: the caller leaves out
    # the others.
    sizes = tile.sizes
    before = sizes.left + sizes.L - tile.farthest_reach() - 4 * LANES
    first = jax.lax.div(jnp.maximum(before, 0), LANES)

    def one(number: Array, _: None) -> None:
        chosen = stretch(number * LANES, LANES)
        outputs.d_position[:, chosen] = jnp.zeros((sizes.lanes, LANES), jnp.float32)

    jax.lax.fori_loop(first, sizes.positions // LANES, one, None)


def _reached(sizes: Sizes, tile_at: Callable[[int], Tile], segment: Array) -> Blocks:
    """The keys of a segment that any query of the row reaches, in tiles of an edge."""
    # The first tile of queries reaches the oldest of them, the last tile the newest.
    first_key = segment * sizes.segment
    oldest = jnp.maximum(tile_at(0).oldest - first_key, 0)
    newest = tile_at(sizes.T - sizes.query_tile).newest - first_key
    # Both ends lie inside the segment, the second not before the first.
    first = jnp.minimum(jax.lax.div(oldest, sizes.edge_tile), sizes.segment // sizes.edge_tile)
    stop = jnp.minimum(newest + sizes.edge_tile, sizes.segment)
    return Blocks(first, jnp.maximum(jax.lax.div(stop, sizes.edge_tile), first))


def _start_keys(sizes: Sizes, outputs: Gradients, scratch: Scratch, reached: Blocks) -> None:
    """Keys that no query reaches have the gradient 0; the sums of the others begin at 0."""

    def zero(*arrays: Any) -> Callable[[Array, None], None]:
        def one(number: Array, _: None) -> None:
            chosen = stretch(number * sizes.edge_tile, sizes.edge_tile)
            for array in arrays:
                array[:, chosen] = jnp.zeros((sizes.lanes, sizes.edge_tile), array.dtype)

        return one

    # Before and behind what is reached, and within it.
    zero_outputs = zero(outputs.d_key, outputs.d_value)
    jax.lax.fori_loop(0, reached.first, zero_outputs, None)
    jax.lax.fori_loop(reached.stop, sizes.segment // sizes.edge_tile, zero_outputs, None)
    jax.lax.fori_loop(*reached, zero(scratch.d_key, scratch.d_value), None)


def _finish_keys(
    static: Static, sizes: Sizes, outputs: Gradients, scratch: Scratch, reached: Blocks
) -> None:
    """Write the complete sums."""

    def one(number: Array, _: None) -> None:
        chosen = stretch(number * sizes.edge_tile, sizes.edge_tile)
        # With the factors that they lack.
        d_key_EC = scratch.d_key[:, chosen] * logit_factor(static)
        d_value_EC = scratch.d_value[:, chosen] * weight_factor(static)
        outputs.d_key[:, chosen] = d_key_EC.astype(outputs.d_key.dtype)
        outputs.d_value[:, chosen] = d_value_EC.astype(outputs.d_value.dtype)

    jax.lax.fori_loop(*reached, one, None)


def weight_factor(static: Static) -> float:
    """What a sum over kept weights lacks."""
    return 1 / (1 - static.dropout_rate)


def logit_factor(static: Static) -> float:
    """What a sum over gradients of logits lacks."""
    return static.scale * weight_factor(static)


# The fields of `Scratch` that are factors of products over a tile of keys.
_FACTORS = ("weights_factor", "d_logits_factor", "d_window_factor")


class _TileGradients:
    """What one tile of queries adds to all gradients; of all heads of the group, or of one."""

    def __init__(
        self,
        tile: Tile,
        inputs: BackwardOperands,
        outputs: Gradients,
        scratch: Scratch,
        number: Array | int,
    ):
        self.tile = tile
        # What is known, what is read and what is written.
        self.static = tile.static
        self.sizes = tile.sizes
        self.inputs = inputs
        self.operands = inputs.operands
        self.outputs = outputs
        self.scratch = scratch
        self.dtype = inputs.d_out.dtype
        self.number = number
        # Its rows in the block of queries, and in all queries.
        self.rows = stretch(number * self.sizes.query_tile, self.sizes.query_tile)
        self.all_rows = stretch(tile.first_query, self.sizes.query_tile)
        # Every head's lanes, and its rows in the stack.
        K = self.sizes.K
        heads = range(self.sizes.heads)
        self.heads: list[tuple[Any, slice]] = [
            (slice(p * K, (p + 1) * K), self._of_head(p)) for p in heads
        ]

    def add(self, segment: Array) -> None:
        """Add the part of a segment of keys; `finish` completes it if all is added at once."""
        if all_at_once(self.sizes):
            self._lay_out()
            first, stop = self.tile.reached(segment)
            nearest = jnp.maximum(stop - self.sizes.edge_tile // LANES, first)
            self._add_pairs_and_nearest(segment, Blocks(nearest, stop))
            self._add_reached(segment, Blocks(first, nearest))
            return
        pl.when(segment == 0)(self._start)
        # The pairs come with the segment of the newest key, so that most tiles are laid out once.
        reached = self.tile.reached(segment)
        has_work = reached.first < reached.stop
        has_pairs = segment == self.tile.home()
        if self.sizes.N:
            has_work |= has_pairs

        @pl.when(has_work)
        def _add() -> None:
            self._lay_out()
            if self.sizes.N:
                pl.when(has_pairs)(self._add_pairs)
            self._add_reached(segment, reached)
            self.finish()

    def _of_head(self, p: int) -> slice:
        """The rows of a head in the stack."""
        return slice(p * self.sizes.query_tile, (p + 1) * self.sizes.query_tile)

    # --- queries

    def _start(self) -> None:
        for output in (self.outputs.d_query, self.outputs.d_position_query):
            if output is not None:
                output[self.all_rows] = jnp.zeros(
                    (self.sizes.query_tile, self.sizes.lanes), jnp.float32
                )

    def _lay_out(self) -> None:
        """The tile's queries and numbers, as the products and the weights take them."""
        scratch = self.scratch
        # Stacked for products in which keys stream, turned for those in which lanes do.
        self._lay_out_queries(scratch.query, scratch.query_turned, self.operands.query)
        self._lay_out_queries(scratch.d_out, scratch.d_out_turned, self.inputs.d_out)
        # Queries that ask positions, their rows reversed.
        position_query_TE = self.operands.position_query[self.rows]
        if not self.static.one_query:
            scratch.position_query[...] = stacked(self.sizes, position_query_TE)
        scratch.queries[...] = position_query_TE.astype(jnp.float32)
        reversed_TE = skew.reversed_rows(scratch.queries, self.sizes.strided)
        scratch.position_query_turned[...] = reversed_TE.T.astype(self.dtype)

        # Numbers of every query as wide as a register: a column costs a permutation at every use.
        shape = (self.sizes.query_tile, LANES)
        lse_TP = self.inputs.lse[self.rows] * LOG2_E
        delta_TP = self.inputs.delta[self.rows] * (1 - self.static.dropout_rate)
        for p in range(self.sizes.heads):
            scratch.lse[self._of_head(p)] = jnp.broadcast_to(lse_TP[:, p : p + 1], shape)
            scratch.delta[self._of_head(p)] = jnp.broadcast_to(delta_TP[:, p : p + 1], shape)
        # What dropout knows of them, for keys and pairs alike.
        if self.static.dropout_rate:
            scratch.kept.lay_out(self.tile)
        # Sums over keys.
        for sums in (scratch.d_query, scratch.d_query_of_pairs, scratch.d_position_query):
            sums[...] = jnp.zeros(sums.shape, jnp.float32)

    def _lay_out_queries(self, stack: Any, turned: Any, x: Any) -> None:
        # Only registers of 32-bit numbers are turned.
        x_TE = x[self.rows]
        stack[...] = stacked(self.sizes, x_TE)
        turned[...] = x_TE.astype(jnp.float32).T.astype(self.dtype)

    def finish(self) -> None:
        """Write the gradients of the queries, or add them to those of other segments."""
        # Each row's own lanes.
        factor = logit_factor(self.static)
        d_query_TE = unstacked(self.sizes, self.scratch.d_query[...])
        if self.sizes.N:
            d_query_TE += self.scratch.d_query_of_pairs[...].T
        # What came from positions has reversed rows.
        self.scratch.queries[...] = self.scratch.d_position_query[...].T
        d_position_query_TE = skew.reversed_rows(self.scratch.queries, self.sizes.strided)
        # Where the same queries ask keys and positions, both parts are one gradient.
        if self.static.one_query:
            d_query_TE += d_position_query_TE
        else:
            self._put(self.outputs.d_position_query, d_position_query_TE * factor)
        self._put(self.outputs.d_query, d_query_TE * factor)

    def _put(self, output: Any, gradient_TE: Array) -> None:
        if not all_at_once(self.sizes):
            gradient_TE += output[self.all_rows]
        output[self.all_rows] = gradient_TE

    # --- persistent pairs

    def _add_pairs(self) -> None:
        for part in self._pairs():
            self._add(part)

    def _add_pairs_and_nearest(self, segment: Array, blocks: Blocks) -> None:
        """Both at once, so that the compiler can do the one while it waits for the other."""
        # Each has columns of the scratch memory of its own: pairs, then keys.
        parts = [part._replace(column=part.first) for part in self._pairs()]
        nearest = self._edge(segment, blocks, self.operands.persistent_value.shape[0])
        parts.insert(0, nearest)
        for part in parts:
            self._save(part)
        for part in parts:
            self._weigh(part)
            self._add_products(part)

    def _pairs(self) -> list["_Part"]:
        pairs = pairs_at_once(self.sizes)
        parts = []
        for first in range(0, self.operands.persistent_value.shape[0], pairs):
            # The sums over rows are in the outputs.
            chosen = slice(first, first + pairs)
            part = _Part(
                self.operands.persistent_key[:, chosen],
                self.operands.persistent_value[chosen],
                dropout.PERSISTENT,
                first,
                chosen,
                self.outputs.d_persistent_key,
                self.outputs.d_persistent_value,
                functools.partial(self._weight_of_pairs, first),
            )
            parts.append(part)
        return parts

    def _weight_of_pairs(
        self, first: int, column: int, excess_RQ: Array, d_weight_RQ: Array
    ) -> Array:
        # An offset of -inf removes a pair.
        if self.sizes.has_offsets:
            bias_RQ = offsets_of(self.sizes, self.operands, first + column)
            return jnp.exp2(excess_RQ + bias_RQ * (logit_unit(self.static) * LOG2_E))
        # Pairs that only fill the step do not count.
        # The keys of those are zeros, whose weights may overflow.
        weight_RQ = jnp.exp2(excess_RQ)
        number_RQ = jax.lax.broadcasted_iota(jnp.int32, weight_RQ.shape, 1)
        exist = self.sizes.N - first - column
        if exist < LANES:
            weight_RQ = jnp.where(number_RQ < exist, weight_RQ, 0)
        return weight_RQ

    # --- keys

    def _add_reached(self, segment: Array, blocks: Blocks) -> None:
        """Blocks of keys of a segment, all within reach of a head."""
        first, stop = blocks
        # Keys that one head alone reaches are that head's. Which one is known only at run time: its
        # lanes must then begin at a whole register's row where they are turned.
        turns_one = self.sizes.K % SUBLANES == 0 and not self.sizes.has_few_keys
        if self.sizes.heads > 1 and turns_one:
            head, common = self.tile.farthest_head()
            common = jnp.maximum(jnp.minimum(common, stop), first)
            alone = self._alone(head)
            pl.when(common > first)(lambda: alone._add_keys(segment, Blocks(first, common)))
            first = common
        self._add_keys(segment, Blocks(first, stop))

    def _alone(self, head: Array) -> "_TileGradients":
        """One head of the group, with its rows of what is stacked."""
        T = self.sizes.query_tile
        rows = stretch(head * T, T)
        scratch = self.scratch
        # Rows of one head are still as wide as the group, with zeros in the others' lanes.
        mine = {
            "query": scratch.query.at[rows],
            "d_out": scratch.d_out.at[rows],
            "lse": scratch.lse.at[rows],
            "delta": scratch.delta.at[rows],
            "d_query": scratch.d_query.at[rows],
        }
        if scratch.position_query is not None:
            mine["position_query"] = scratch.position_query.at[rows]
        if scratch.kept is not None:
            mine["kept"] = scratch.kept.of_rows(rows)
        # What passes from stage to stage has room for more rows.
        for name in ("logits", "d_weights", *_FACTORS):
            mine[name] = getattr(scratch, name).at[:T]
        outputs = self.outputs._replace(d_span=self.outputs.d_span.at[rows])
        # Of what is turned, the lanes of the head.
        of_head = self.tile.of_head(head)
        alone = _TileGradients(of_head, self.inputs, outputs, scratch._replace(**mine), self.number)
        alone.heads = [(stretch(head * self.sizes.K, self.sizes.K), slice(0, T))]
        return alone

    def _add_keys(self, segment: Array, blocks: Blocks) -> None:
        """Blocks of keys of a segment."""
        cut = self.tile.cut(segment, blocks)
        begin = cut.first * LANES - segment * self.sizes.segment

        def one_edge(number: Array, _: None) -> None:
            self._add(self._edge(segment, cut.edge(number)))

        def one_inside(number: Array, _: None) -> None:
            self._add(self._inside(segment, begin + number * self.sizes.key_tile))

        jax.lax.fori_loop(0, cut.before + cut.behind, one_edge, None)
        if not self.sizes.has_few_keys:
            jax.lax.fori_loop(0, cut.tiles, one_inside, None)

    def _edge(self, segment: Array, blocks: Blocks, column: int = 0) -> "_Part":
        """A tile with the mask of the spans, of which the keys of some blocks count."""
        local = self.tile.place(segment, blocks.first, self.sizes.edge_tile)
        first_key = segment * self.sizes.segment + local
        # Where no query looks keys and values may be anything, and become 0.
        chosen = stretch(local, self.sizes.edge_tile)
        counted = (blocks.first * LANES, blocks.stop * LANES)
        return self._keys(
            first_key,
            chosen,
            self.tile.keys(first_key, self.operands.key[chosen]),
            self.tile.keys(first_key, self.operands.value[chosen]),
            functools.partial(self._weight_on_edge, first_key, counted),
        )._replace(column=column)

    def _inside(self, segment: Array, local: Array) -> "_Part":
        """A tile whose pairs all exist, before the ramp."""
        chosen = stretch(local, self.sizes.key_tile)
        # All of them are reached, so all keys and values are numbers.
        first_key = segment * self.sizes.segment + local
        key_CE = self.operands.key[chosen]
        value_CE = self.operands.value[chosen]
        return self._keys(
            first_key, chosen, key_CE, value_CE, lambda _, excess, __: jnp.exp2(excess)
        )

    def _keys(
        self, first_key: Array, chosen: Any, key_CE: Array, value_CE: Array, weight_of: Callable
    ) -> "_Part":
        sums = (self.scratch.d_key, self.scratch.d_value)
        return _Part(key_CE, value_CE, dropout.CONTEXT, first_key, chosen, *sums, weight_of)

    def _weight_on_edge(
        self,
        first_key: Array,
        counted: tuple[Array, Array],
        column: int,
        excess_RQ: Array,
        d_weight_RQ: Array,
    ) -> Array:
        """Weights with the mask of the spans; adds the gradient of the spans."""
        # Weights before the span mask m, where a pair counts at all.
        exists_RQ, before_end_RQ = self.tile.pairs(first_key + column, *counted)
        counts_RQ = exists_RQ & (before_end_RQ >= 0)
        bare_RQ = jnp.where(counts_RQ, jnp.exp2(jnp.minimum(excess_RQ, LARGEST_EXCESS)), 0)

        # Gradient of the span, from the pairs on the ramp.
        d_mask_RQ = jnp.minimum(bare_RQ, MAX_MASK_DERIVATIVE) * d_weight_RQ
        ramp = self.static.ramp
        self.outputs.d_span[...] += jnp.where(before_end_RQ <= ramp, d_mask_RQ, 0)
        return bare_RQ * jnp.clip(before_end_RQ * (1 / ramp), 0, 1)

    # --- stages

    def _by_position(self, first_key: Array, columns: int) -> list[Array]:
        """Logits by position, in blocks of 128 keys."""
        sizes = self.sizes
        # The queries that ask positions.
        query = self.scratch.query
        if not self.static.one_query:
            query = self.scratch.position_query
        # From the window's columns to the keys'.
        window, remainder = self._window(first_key, columns)
        by_position_RW = dot(query[...], self.operands.position[:, window])
        rotated = []
        for b in range(skew.window_blocks(columns, remainder)):
            block_RQ = by_position_RW[:, lanes_of(b)]
            rotated.append(skew.rotate(block_RQ, sizes.query_tile, remainder, sizes.strided))
        return skew.skewed(rotated, sizes.query_tile, remainder)

    def _window(self, first_key: Array, columns: int) -> tuple[Any, Any]:
        """Columns of the position table above a tile of keys, and the remainder."""
        # One block more than the tile has, or two where the remainder is known only at run time.
        column, remainder = self.tile.window(first_key)
        return stretch(column, skew.window_blocks(columns, remainder) * LANES), remainder

    def _add(self, part: "_Part") -> None:
        # Two products with keys, then the weights, then all that is summed.
        self._save(part)
        self._weigh(part)
        self._add_products(part)

    def _save(self, part: "_Part") -> None:
        """Logits, and gradients of the weights."""
        # The longest way first.
        if part.domain == dropout.CONTEXT:
            by_position = self._by_position(part.first, part.columns)
        # Each row has the lanes of its own head, and zeros in the others'.
        axes = NT_DIMENSIONS if part.domain == dropout.CONTEXT else (1, 0)
        logits_RX = dot(self.scratch.query[...], part.key, axes)
        d_weight_RX = dot(self.scratch.d_out[...], part.value_XE, NT_DIMENSIONS)
        for b in range(part.columns // LANES):
            logits_RQ = logits_RX[:, lanes_of(b)]
            if part.domain == dropout.CONTEXT:
                logits_RQ = logits_RQ + by_position[b]
            self.scratch.logits[:, part.lanes_of(b)] = logits_RQ
            self.scratch.d_weights[:, part.lanes_of(b)] = d_weight_RX[:, lanes_of(b)]

    def _weigh(self, part: "_Part") -> None:
        """Weights, and gradients of the logits."""
        scratch = self.scratch
        factor = self.static.scale * LOG2_E
        if self.static.dropout_rate:
            blocks = part.columns // LANES
            keeps = scratch.kept.keeps(self.tile, part.domain, part.first, blocks)
        for b in range(part.columns // LANES):
            # Logits less the log-sum-exp, and what a weight that is kept adds.
            excess_RQ = scratch.logits[:, part.lanes_of(b)] * factor - scratch.lse[...]
            d_weight_RQ = scratch.d_weights[:, part.lanes_of(b)]
            if self.static.dropout_rate:
                kept_RQ = keeps(b)
                d_weight_RQ = jnp.where(kept_RQ, d_weight_RQ, 0)
            d_weight_RQ = d_weight_RQ - scratch.delta[...]
            # The gradient of a logit belongs to the weight before dropout.
            weight_RQ = part.weight_of(b * LANES, excess_RQ, d_weight_RQ)
            d_logits_RQ = weight_RQ * d_weight_RQ
            if self.static.dropout_rate:
                weight_RQ = jnp.where(kept_RQ, weight_RQ, 0)
            # As factors of products, and once more for the skew, which moves 32-bit numbers.
            scratch.weights_factor[:, part.lanes_of(b)] = weight_RQ.astype(self.dtype)
            scratch.d_logits_factor[:, part.lanes_of(b)] = d_logits_RQ.astype(self.dtype)
            if part.domain == dropout.CONTEXT:
                scratch.logits[:, part.lanes_of(b)] = d_logits_RQ
            elif self.sizes.has_offsets:
                self._add_offsets(part.first + b * LANES, d_logits_RQ)

    def _add_offsets(self, first: int, d_logits_RQ: Array) -> None:
        """Add to the gradients of the offsets of 128 pairs."""
        chosen = slice(first, first + LANES)
        for p in range(self.sizes.heads):
            d_bias_1Q = jnp.sum(d_logits_RQ[self._of_head(p)], axis=0, keepdims=True)
            self.outputs.d_persistent_bias[p : p + 1, chosen] += d_bias_1Q

    def _add_products(self, part: "_Part") -> None:
        """Add to the gradients of queries, and to those of keys and values or pairs."""
        scratch = self.scratch
        columns = part.all_columns
        # Of all heads at once; only each row's own lanes are kept.
        if part.domain == dropout.CONTEXT:
            scratch.d_query[...] += dot(scratch.d_logits_factor[:, columns], part.key)
        # Of each head alone.
        for lanes, rows in self.heads:
            weight_TX = scratch.weights_factor[rows, columns]
            d_logits_TX = scratch.d_logits_factor[rows, columns]
            part.d_value[lanes, part.chosen] += dot(scratch.d_out_turned[lanes], weight_TX)
            part.d_key[lanes, part.chosen] += dot(scratch.query_turned[lanes], d_logits_TX)
            if part.domain == dropout.PERSISTENT:
                d_query_KT = dot(part.key[lanes], d_logits_TX, NT_DIMENSIONS)
                scratch.d_query_of_pairs[lanes] += d_query_KT
        if part.domain == dropout.CONTEXT:
            self._add_position_products(part)

    def _add_position_products(self, part: "_Part") -> None:
        """Add to the gradients of queries and of the position table."""
        sizes = self.sizes
        scratch = self.scratch
        # From the keys' columns to the window's.
        window, remainder = self._window(part.first, part.columns)
        d_logits = scratch.logits.at[:, part.all_columns]
        blocks = skew.unskewed(d_logits, sizes.query_tile, remainder, sizes.strided)
        for b, block_RQ in enumerate(blocks):
            scratch.d_window_factor[:, lanes_of(b)] = block_RQ.astype(self.dtype)
        # Products of each head, with the same reversed rows on both sides.
        width = len(blocks) * LANES
        for lanes, rows in self.heads:
            d_window_TW = scratch.d_window_factor[rows, :width]
            turned_KT = scratch.position_query_turned[lanes]
            self.outputs.d_position[lanes, window] += dot(turned_KT, d_window_TW)
            position_KW = self.operands.position[lanes, window]
            scratch.d_position_query[lanes] += dot(position_KW, d_window_TW, NT_DIMENSIONS)


class _Part(NamedTuple):
    """Keys or pairs that are worked on at once."""

    # of keys (X, E), of pairs (E, X)
    key: Array
    value_XE: Array
    # dropout's domain, and the number of the first key or pair
    domain: int
    first: Any
    # where their sums are: which columns of what
    chosen: Any
    d_key: Any
    d_value: Any
    # function of a column and the block that begins there: logits less the log-sum-exp, and
    # gradients of the weights, less delta
    weight_of: Callable
    # where the tile begins in the scratch memory
    column: int = 0

    @property
    def columns(self) -> int:
        """How many keys or pairs."""
        return self.value_XE.shape[0]

    @property
    def all_columns(self) -> slice:
        """Their columns in the scratch memory."""
        return slice(self.column, self.column + self.columns)

    def lanes_of(self, block: int) -> slice:
        """The columns of a block of 128 in the scratch memory."""
        return lanes_of(self.column // LANES + block)


def pairs_at_once(sizes: Sizes) -> int:
    """Persistent pairs that are worked on at once: as many as fit a tile of keys and leave none."""
    # In whole blocks of 128, of which the pairs are padded to a multiple.
    pairs, steps = pair_steps(sizes)
    fitting = range(LANES, max(sizes.key_tile, LANES) + 1, LANES)
    return max(number for number in fitting if pairs * steps % number == 0)


# --- call -----------------------------------------------------------------------------------------


def run_backward(
    static: Static, sizes: Sizes, scalars: Scalars, inputs: BackwardOperands
) -> Gradients:
    """Call the kernel: all gradients as it lays them out."""
    sizes = _that_fit(sizes)

    def place(group: Array, row: Array, segment: Array, query_block: Array, *refs: Any) -> Step:
        tile_at = functools.partial(Tile, static, sizes, Scalars(*refs), group, row)
        segment = loaded(segment, tile_at(0), tile_at(sizes.T - sizes.query_tile))
        return Step(group, row, query_block, segment)

    # What the kernel reads.
    statistic = statistic_block(sizes, place)
    input_blocks = BackwardOperands(
        operands=operand_blocks(sizes, place),
        d_out=query_block(sizes, place),
        lse=statistic,
        delta=statistic,
    )
    # Gradients of queries add up over segments, those of table and pairs over rows: only groups may
    # run at once.
    grid = (sizes.groups, sizes.B, sizes.segments, sizes.T // sizes.query_block)
    dtype = inputs.d_out.dtype
    return run(
        functools.partial(backward_kernel, static, sizes),
        "all_attention_backward",
        Grid(grid, parallel_axes=1),
        scalars,
        Arguments(inputs, _shapes(static, sizes, dtype)),
        Arguments(input_blocks, _blocks(static, sizes)),
        _scratch(static, sizes, dtype),
    )


def _that_fit(sizes: Sizes) -> Sizes:
    """Sizes of steps that fit the chip's memory beside the gradients of a group."""
    if vmem() > SMALL_VMEM:
        return sizes
    # What a group keeps: arrays of two bytes, and their gradients of four.
    pairs, steps = pair_steps(sizes)
    group = 6 * sizes.lanes * (sizes.positions + 2 * pairs * steps)
    step = SMALL_STEP if group <= SMALL_GROUP else SMALL_STEP // 2
    return dataclasses.replace(
        sizes,
        query_block=sizes.query_tile,
        segment=min(sizes.segment, step),
        key_tile=min(sizes.key_tile, SMALL_TILE),
    )


def _by_kind(
    static: Static, queries: Any, keys: Any, table: Any, pairs: Any, offsets: Any, spans: Any
) -> Gradients:
    """Shapes or blocks of all gradients, from those of each kind."""
    found = Gradients(
        d_query=queries,
        d_key=keys,
        d_value=keys,
        d_position=table,
        d_persistent_key=pairs,
        d_persistent_value=pairs,
        d_persistent_bias=offsets,
        d_span=spans,
    )
    if static.one_query:
        return found
    return found._replace(d_position_query=queries)


def _shapes(static: Static, sizes: Sizes, dtype: Any) -> Gradients:
    # Gradients of keys and values come out turned; groups that share a table have one each.
    lanes = sizes.H * sizes.K
    pairs, steps = pair_steps(sizes)
    offsets = None
    if sizes.has_offsets:
        numbers = (sizes.groups, sizes.heads, pairs * steps)
        offsets = jax.ShapeDtypeStruct(numbers, jnp.float32)
    return _by_kind(
        static,
        queries=jax.ShapeDtypeStruct((sizes.B, sizes.T, lanes), jnp.float32),
        keys=jax.ShapeDtypeStruct((sizes.B, lanes, sizes.S), dtype),
        table=jax.ShapeDtypeStruct((lanes, sizes.positions), jnp.float32),
        pairs=jax.ShapeDtypeStruct((lanes, pairs * steps), jnp.float32),
        offsets=offsets,
        spans=jax.ShapeDtypeStruct((sizes.groups * sizes.rows, LANES), jnp.float32),
    )


def _blocks(static: Static, sizes: Sizes) -> Gradients:
    # Whatever changes with the group or row alone needs no second buffer.
    once: dict[str, Any] = {"pipeline_mode": pl.Buffered(1)}

    def of_group(rows: int, columns: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, columns), lambda group, *_: (group, 0), **once)

    # All queries of a row; every segment of keys, within reach or not.
    all_queries = (None, sizes.T, sizes.lanes)
    keys = (None, sizes.lanes, sizes.segment)
    pairs, steps = pair_steps(sizes)
    offsets = None
    if sizes.has_offsets:
        offsets = offset_block(sizes, lambda group, *_: group)
    return _by_kind(
        static,
        queries=pl.BlockSpec(all_queries, lambda group, row, *_: (row, 0, group), **once),
        keys=pl.BlockSpec(keys, lambda group, row, segment, *_: (row, group, segment)),
        table=of_group(sizes.lanes, sizes.positions),
        pairs=of_group(sizes.lanes, pairs * steps),
        offsets=offsets,
        spans=of_group(sizes.rows, LANES),
    )


def _scratch(static: Static, sizes: Sizes, dtype: Any) -> Scratch:
    # Over a segment, of a tile of queries, and of a tile of keys.
    T = sizes.query_tile
    keys = pltpu.VMEM((sizes.lanes, sizes.segment), jnp.float32)
    stack = pltpu.VMEM((sizes.rows, sizes.lanes), dtype)
    turned = pltpu.VMEM((sizes.lanes, T), dtype)
    number = pltpu.VMEM((sizes.rows, LANES), jnp.float32)
    sums = pltpu.VMEM((sizes.rows, sizes.lanes), jnp.float32)
    columns = max(sizes.key_tile, sizes.edge_tile)
    # The nearest keys are worked on beside pairs.
    both = columns
    if all_at_once(sizes):
        pairs, steps = pair_steps(sizes)
        both = max(both, pairs * steps + sizes.edge_tile)
    wide = pltpu.VMEM((sizes.rows, both), jnp.float32)
    factor = pltpu.VMEM((sizes.rows, both), dtype)
    # What not every call has.
    position_query: Any = None
    dropped: Any = None
    if not static.one_query:
        position_query = stack
    if static.dropout_rate:
        dropped = kept.scratch(sizes, columns)
    return Scratch(
        d_key=keys,
        d_value=keys,
        query=stack,
        position_query=position_query,
        d_out=stack,
        query_turned=turned,
        position_query_turned=turned,
        d_out_turned=turned,
        lse=number,
        delta=number,
        kept=dropped,
        queries=pltpu.VMEM((T, sizes.lanes), jnp.float32),
        d_query=sums,
        d_query_of_pairs=pltpu.VMEM((sizes.lanes, T), jnp.float32),
        d_position_query=pltpu.VMEM((sizes.lanes, T), jnp.float32),
        logits=wide,
        d_weights=wide,
        weights_factor=factor,
        d_logits_factor=factor,
        d_window_factor=pltpu.VMEM((sizes.rows, columns + 2 * LANES), dtype),
    )


def in_shape_of(
    inputs: Inputs, static: Static, sizes: Sizes, scalars: Scalars, gradients: Gradients
) -> Inputs:
    """All gradients in the shapes and dtypes of the inputs, with the factors that they lack."""
    # Back from the padded, reversed table; where a head does not reach, nothing was written.
    K = inputs.query_BTHK.shape[3]
    d_position_HKW = gradients.d_position.reshape(sizes.H, sizes.K, -1)
    d_position_HKL = d_position_HKW[:, :K, sizes.left : sizes.left + sizes.L]
    reached_H1L = jnp.arange(sizes.L)[::-1] < scalars.reach_H[:, None, None]
    d_position_HKL = jnp.where(reached_H1L, d_position_HKL, 0)
    # Heads that share the table have a gradient each: there is less to reverse after the sum.
    if sizes.shared:
        d_position_HKL = d_position_HKL.sum(0, keepdims=True)
    d_position_HKL = d_position_HKL[:, :, ::-1]
    # Where one array asks keys and positions, its whole gradient is that of the first.
    if gradients.d_position_query is None:
        d_position_query_BTHK = jnp.zeros_like(inputs.query_BTHK)
    else:
        d_position_query_BTHK = heads_apart(gradients.d_position_query, inputs.query_BTHK)
    # Without the pairs that only fill; no factor of the scale.
    d_bias_HN = None
    if gradients.d_persistent_bias is not None:
        d_bias_HN = gradients.d_persistent_bias.reshape(sizes.H, -1)[:, : sizes.N]
        d_bias_HN *= weight_factor(static)
    # The lanes and queries of every head.
    d_span_H = gradients.d_span.reshape(sizes.H, -1).sum(1)
    found = Inputs(
        query_BTHK=heads_apart(gradients.d_query, inputs.query_BTHK),
        position_query_BTHK=d_position_query_BTHK,
        key_BSHK=_turned_back(gradients.d_key, inputs.key_BSHK),
        value_BSHK=_turned_back(gradients.d_value, inputs.value_BSHK),
        position_HLK=d_position_HKL.transpose(0, 2, 1) * logit_factor(static),
        persistent_key_HNK=_pairs(sizes, gradients.d_persistent_key, K) * logit_factor(static),
        persistent_value_HNK=_pairs(sizes, gradients.d_persistent_value, K) * weight_factor(static),
        persistent_bias_HN=d_bias_HN,
        span_H=d_span_H * (weight_factor(static) / static.ramp),
    )
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), found, inputs)


def _turned_back(x_BES: Array, like_BSHK: Array) -> Array:
    """Gradients of keys or values in the shape of those."""
    B, S, H, K = like_BSHK.shape
    # A change of layout, which the products that follow take over.
    x_BHKS = x_BES.reshape(B, H, -1, x_BES.shape[2])[:, :, :K, :S]
    return x_BHKS.transpose(0, 3, 1, 2)


def _pairs(sizes: Sizes, x_EN: Array, K: int) -> Array:
    # Without the pairs and lanes that only fill.
    x_HKN = x_EN.reshape(sizes.H, sizes.K, -1)[:, :K, : sizes.N]
    return x_HKN.transpose(0, 2, 1)
