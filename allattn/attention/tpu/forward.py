"""The forward TPU kernel: an online softmax over persistent pairs and keys, tile by tile.

One step of the grid holds a block of queries and a segment of keys of one group of heads. For each
tile of queries it works on the persistent pairs and the 256 nearest keys together, and then on the
other keys within reach (`tile.Tile`): tiles of 256 keys with the mask of the spans at both edges,
tiles of 512 without any mask between them. Those have two stages, which the compiler interleaves,

    save   logits of the next tile, and the running maximum      matrix unit, rotations
    use    weights of this tile, times the values                exponentials, matrix unit

so that neither waits for the other. The running maximum and all sums (Milakov and Gimelshein 2018,
arXiv 1805.02867) are as wide as a register: the maximum is the same in all lanes, and every lane
sums its own columns' weights until the end. Logits are kept without their scale: what a weight is
the exponential of, the difference of two, is then more exact.

Dimension key: T query of the tile, R row of the stack (T queries of each head), C key of a tile, Q
column of a block of 128, X pair or key, E the group's heads side by side.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from allattn.attention import dropout
from allattn.attention.contract import Static
from allattn.attention.numerics import LEAST_TOP, LOG2_E, NT_DIMENSIONS, dot, log_sum
from allattn.attention.span import MASKED_LOGIT
from allattn.attention.tpu import kept, skew
from allattn.attention.tpu.call import (
    Arguments,
    Grid,
    Step,
    loaded,
    operand_blocks,
    query_block,
    run,
    statistic_block,
)
from allattn.attention.tpu.operands import Operands, logit_unit, offsets_of, pair_steps
from allattn.attention.tpu.skew import LANES, lanes_of
from allattn.attention.tpu.tile import Blocks, Scalars, Sizes, Tile, stacked, stretch, unstacked

Array = jax.Array


class Outputs(NamedTuple):
    """What the kernel writes."""

    # (query_block, E)
    out: Any
    # (query_block, P): log-sum-exp, and the share of the weight on persistent pairs
    lse: Any
    mass: Any


class Scratch(NamedTuple):
    """The state of the online softmax, float32, and what passes from stage to stage."""

    # of every tile of queries in the block: (tiles, R, 128) and (tiles, R, E)
    top: Any
    total: Any
    pairs_top: Any
    pairs_total: Any
    sums: Any
    # the stacked queries (R, E)
    query: Any
    position_query: Any
    # what dropout knows of the queries; None without dropout
    kept: Any
    # two slots, one being saved and one in use: logits and weights (2, R, C), maximum and what the
    # sums so far shrink by (2, R, 128)
    logits: Any
    weights: Any
    new_top: Any
    shrink: Any
    # the last rotated blocks of the tile before, (1 or 2, R, 128)
    carried: Any


def forward_kernel(
    static: Static,
    sizes: Sizes,
    scalars: Scalars,
    inputs: Operands,
    outputs: Outputs,
    scratch: Scratch,
) -> None:
    """Grid (group, row, query block, segment of keys); all but the last may run at once."""
    group, row, query_block, segment = (pl.program_id(axis) for axis in range(4))

    def softmax_of(number: Array | int) -> _Softmax:
        first_query = query_block * sizes.query_block + number * sizes.query_tile
        # Its state lies in the scratch memory from segment to segment.
        tile = Tile(static, sizes, scalars, group, row, first_query)
        return _Softmax(tile, inputs, outputs, scratch, number)

    def one_tile(number: Array, _: None) -> None:
        # A tile ends beside the beginning of the next one. Before the first there is none: what is
        # written there is written again.
        if sizes.segments == 1:
            softmax_of(jnp.maximum(number - 1, 0)).finish()
        softmax = softmax_of(number)
        softmax.ask()
        if not softmax.begins_with_pairs:
            pl.when(segment == 0)(softmax.begin)
        softmax.attend(segment)
        if sizes.segments > 1:
            pl.when(segment == sizes.segments - 1)(softmax.finish)

    tiles = sizes.query_block // sizes.query_tile
    jax.lax.fori_loop(0, tiles, one_tile, None)
    if sizes.segments == 1:
        softmax_of(tiles - 1).finish()


def run_forward(static: Static, sizes: Sizes, scalars: Scalars, operands: Operands) -> Outputs:
    """Call the kernel: the output (B, T, H K), log-sum-exp and mass (B, G, T, P)."""

    def place(group: Array, row: Array, query_block: Array, segment: Array, *refs: Any) -> Step:
        tile_at = functools.partial(Tile, static, sizes, Scalars(*refs), group, row)
        first_query = query_block * sizes.query_block
        last_query = first_query + sizes.query_block - sizes.query_tile
        segment = loaded(segment, tile_at(first_query), tile_at(last_query))
        return Step(group, row, query_block, segment)

    # Blocks and shapes.
    statistic = statistic_block(sizes, place)
    output_blocks = Outputs(out=query_block(sizes, place), lse=statistic, mass=statistic)
    out = jax.ShapeDtypeStruct((sizes.B, sizes.T, sizes.H * sizes.K), operands.query.dtype)
    numbers = (sizes.B, sizes.groups, sizes.T, sizes.heads)
    shape = jax.ShapeDtypeStruct(numbers, jnp.float32)
    # The steps over segments share the state of the softmax, so they run in order.
    grid = (sizes.groups, sizes.B, sizes.T // sizes.query_block, sizes.segments)
    return run(
        functools.partial(forward_kernel, static, sizes),
        "all_attention_forward",
        Grid(grid, parallel_axes=3),
        scalars,
        Arguments(operands, Outputs(out, shape, shape)),
        Arguments(operand_blocks(sizes, place), output_blocks),
        _scratch(static, sizes, operands.query.dtype),
    )


def _scratch(static: Static, sizes: Sizes, dtype: Any) -> Scratch:
    tiles = sizes.query_block // sizes.query_tile
    pairs, _ = pair_steps(sizes)
    columns = max(pairs, sizes.key_tile, sizes.nearest_tile)
    spare = skew.window_blocks(0, sizes.remainder)
    state = pltpu.VMEM((tiles, sizes.rows, LANES), jnp.float32)
    passed = pltpu.VMEM((2, sizes.rows, LANES), jnp.float32)
    query = pltpu.VMEM((sizes.rows, sizes.lanes), dtype)
    dropped = None
    if static.dropout_rate:
        dropped = kept.scratch(sizes, columns)
    return Scratch(
        top=state,
        total=state,
        pairs_top=state,
        pairs_total=state,
        sums=pltpu.VMEM((tiles, sizes.rows, sizes.lanes), jnp.float32),
        query=query,
        position_query=None if static.one_query else query,
        kept=dropped,
        logits=pltpu.VMEM((2, sizes.rows, sizes.key_tile), jnp.float32),
        weights=pltpu.VMEM((2, sizes.rows, columns), dtype),
        new_top=passed,
        shrink=passed,
        carried=pltpu.VMEM((spare, sizes.rows, LANES), jnp.float32),
    )


class _Softmax:
    """The softmax of one tile of queries; of all heads of the group, or of one of them."""

    def __init__(
        self,
        tile: Tile,
        inputs: Operands,
        outputs: Outputs,
        scratch: Scratch,
        number: Array | int,
    ):
        self.tile = tile
        self.static = tile.static
        self.sizes = tile.sizes
        self.inputs = inputs
        self.outputs = outputs
        self.scratch = scratch
        # Its state, and its rows in the block of queries.
        self.number = number
        self.top = scratch.top.at[number]
        self.total = scratch.total.at[number]
        self.pairs_top = scratch.pairs_top.at[number]
        self.pairs_total = scratch.pairs_total.at[number]
        self.sums = scratch.sums.at[number]
        self.rows = stretch(number * self.sizes.query_tile, self.sizes.query_tile)
        # Whether all pairs and the nearest keys come first, and at once: then nothing has to be 0.
        _, pair_passes = pair_steps(self.sizes)
        self.begins_with_pairs = self.sizes.segments == 1 and pair_passes == 1
        # The scale, for exponentials to base 2; its sign is that of the queries.
        self.factor = logit_unit(self.static) * LOG2_E

    def ask(self) -> None:
        """Stack the queries of the group's heads."""
        self.scratch.query[...] = self._stacked(self.inputs.query[self.rows])
        if not self.static.one_query:
            position_query_TE = self.inputs.position_query[self.rows]
            self.scratch.position_query[...] = self._stacked(position_query_TE)
        # Words that all tiles of keys share.
        if self.static.dropout_rate:
            self.scratch.kept.lay_out(self.tile)

    def _stacked(self, query_TE: Array) -> Array:
        if self.static.scale <= 0:
            query_TE = query_TE * float(np.sign(self.static.scale))
        return stacked(self.sizes, query_TE)

    def begin(self) -> None:
        """An empty softmax."""
        self.top[...] = jnp.full(self.top.shape, LEAST_TOP, jnp.float32)
        self.total[...] = jnp.zeros(self.total.shape, jnp.float32)
        self.sums[...] = jnp.zeros(self.sums.shape, jnp.float32)
        self.pairs_top[...] = jnp.full(self.top.shape, LEAST_TOP, jnp.float32)
        self.pairs_total[...] = jnp.zeros(self.total.shape, jnp.float32)

    def attend(self, segment: Array) -> None:
        """Add what a segment has within reach, and in one of them the persistent pairs."""
        # Pairs, and the nearest keys of all.
        first, stop = self.tile.reached(segment)
        nearest = jnp.maximum(stop - self.sizes.nearest_tile // LANES, first)
        is_home = segment == self.tile.home()
        if self.sizes.segments == 1:
            self._pairs_and_nearest(segment, Blocks(nearest, stop))
        else:
            pl.when(is_home)(lambda: self._pairs_and_nearest(segment, Blocks(nearest, stop)))
        # Of few keys all are near.
        if self.sizes.has_few_keys:
            return
        stop = jnp.where(is_home, nearest, stop)

        # Keys that one head alone reaches are that head's.
        if self.sizes.heads > 1:
            head, common = self.tile.farthest_head()
            common = jnp.maximum(jnp.minimum(common, stop), first)
            alone = self._alone(head)
            pl.when(common > first)(lambda: alone._others(segment, Blocks(first, common)))
            first = common
        self._others(segment, Blocks(first, stop))

    def _alone(self, head: Array) -> "_Softmax":
        """The softmax of one head of the group, on its rows of the state."""
        rows = stretch(head * self.sizes.query_tile, self.sizes.query_tile)
        scratch = self.scratch
        shared = {"query": scratch.query.at[rows]}
        if scratch.position_query is not None:
            shared["position_query"] = scratch.position_query.at[rows]
        if scratch.kept is not None:
            shared["kept"] = scratch.kept.of_rows(rows)
        alone = _Softmax(
            self.tile.of_head(head),
            self.inputs,
            self.outputs,
            scratch._replace(**shared),
            self.number,
        )
        alone.top = scratch.top.at[self.number, rows]
        alone.total = scratch.total.at[self.number, rows]
        alone.sums = scratch.sums.at[self.number, rows]
        return alone

    # --- persistent pairs and the nearest keys

    def _pairs_and_nearest(self, segment: Array, blocks: Blocks) -> None:
        """Add the persistent pairs, and with the last of them the nearest keys.

        Both at once, so that the compiler can do the one while it waits for the other.
        """
        pairs, steps = pair_steps(self.sizes)
        if self.sizes.N:
            jax.lax.fori_loop(0, steps - 1, lambda step, _: self._pairs(step * pairs), None)
        masked, finish = self._masked_logits(segment, blocks, self.sizes.nearest_tile)
        if self.sizes.N:
            self._pairs((steps - 1) * pairs, masked, finish)
            return
        self.pairs_top[...] = jnp.full(self.top.shape, LEAST_TOP, jnp.float32)
        self.pairs_total[...] = jnp.zeros(self.total.shape, jnp.float32)
        top_RQ, shrink_RQ = self._raise_top(masked, first=self.begins_with_pairs)
        self._add([finish(top_RQ)], shrink_RQ)

    def _pairs(
        self,
        first: Array | int,
        others: Sequence[Array] = (),
        finish: Callable[[Array], "_Part"] | None = None,
    ) -> None:
        """Add persistent pairs, and the part of other logits beside them."""
        pairs, _ = pair_steps(self.sizes)
        chosen = stretch(first, pairs)
        logits = self._pair_logits(first, self.inputs.persistent_key[:, chosen])
        top_RQ, shrink_RQ = self._raise_top([*logits, *others], first=self.begins_with_pairs)
        weights = [self._weight(block_RQ, top_RQ) for block_RQ in logits]
        # Their share of all weights is a result of its own.
        self.pairs_top[...] = top_RQ
        _shrink_and_add(self.pairs_total, shrink_RQ, sum_of(weights))
        value_XE = self.inputs.persistent_value[chosen]
        parts = [_Part(weights, dropout.PERSISTENT, first, value_XE, slot=0)]
        if finish:
            parts.append(finish(top_RQ))
        self._add(parts, shrink_RQ)

    def _pair_logits(self, first: Array | int, key_EX: Array) -> list[Array]:
        """Logits of persistent pairs, in blocks of 128."""
        logits_RX = dot(self.scratch.query[...], key_EX)
        number_RQ = jax.lax.broadcasted_iota(jnp.int32, (self.sizes.rows, LANES), 1)
        blocks = []
        for column in range(0, key_EX.shape[1], LANES):
            block_RQ = logits_RX[:, column : column + LANES]
            # Pairs that only fill the step do not count; their offset says so where there are some.
            if self.sizes.has_offsets:
                block_RQ += offsets_of(self.sizes, self.inputs, first + column)
            elif self.sizes.N % key_EX.shape[1]:
                is_pair_RQ = number_RQ < self.sizes.N - first - column
                block_RQ = jnp.where(is_pair_RQ, block_RQ, MASKED_LOGIT)
            blocks.append(block_RQ)
        return blocks

    # --- keys

    def _others(self, segment: Array, blocks: Blocks) -> None:
        """Add the blocks of keys between two of a segment: inner tiles, and edges around them."""
        # The last tile of the edge before is worked on beside the first inner one, if there is one.
        cut = self.tile.cut(segment, blocks)
        # In one of several segments there is none, as a rule.
        beside: Any = 0
        if self.sizes.segments == 1:
            beside = jnp.minimum(cut.before, jnp.minimum(cut.tiles, 1))
        before = cut.before - beside

        def one(number: Array, _: None) -> None:
            self._edge(segment, cut.edge(jnp.where(number < before, number, number + beside)))

        jax.lax.fori_loop(0, before + cut.behind, one, None)
        edge = self.sizes.edge_tile // LANES
        self._inside(segment, Blocks(cut.first - beside * edge, cut.first), cut.tiles)

    def _edge(self, segment: Array, blocks: Blocks) -> None:
        """Add a tile with a mask."""
        masked, finish = self._masked_logits(segment, blocks, self.sizes.edge_tile)
        top_RQ, shrink_RQ = self._raise_top(masked)
        self._add([finish(top_RQ)], shrink_RQ)

    def _masked_logits(
        self, segment: Array, blocks: Blocks, columns: int
    ) -> tuple[list[Array], Callable[[Array], "_Part"]]:
        """Logits of a tile of so many keys, of which those of some blocks count, with a mask.

        Returns:
          The logits, in blocks of 128, and a function of the maximum that gives the weights.
        """
        local = self.tile.place(segment, blocks.first, columns)
        first_key = segment * self.sizes.segment + local
        chosen = stretch(local, columns)
        logits = self._logits(first_key, self.tile.keys(first_key, self.inputs.key[chosen]))

        # The soft mask m, and what counts at all.
        masks = []
        masked = []
        for b, block_RQ in enumerate(logits):
            start = blocks.first * LANES
            mask_RQ = self.tile.mask(first_key + b * LANES, start, blocks.stop * LANES)
            masked.append(jnp.where(mask_RQ > 0, block_RQ, MASKED_LOGIT))
            masks.append(mask_RQ)

        def finish(top_RQ: Array) -> _Part:
            bare = [self._weight(block_RQ, top_RQ) for block_RQ in masked]
            weights = [weight_RQ * mask for weight_RQ, mask in zip(bare, masks, strict=True)]
            value_CE = self.tile.keys(first_key, self.inputs.value[chosen])
            return _Part(weights, dropout.CONTEXT, first_key, value_CE, slot=1)

        return masked, finish

    def _inside(self, segment: Array, edge: Blocks, tiles: Array) -> None:
        """Tiles without a mask: the logits of one beside the weights of the one before.

        Args:
          segment: number of the segment.
          edge: the blocks before the first of them, which are added here too.
          tiles: how many there are.
        """
        # From the beginning of the segment.
        begin = edge.stop * LANES - segment * self.sizes.segment

        def at(number: Array | int) -> Array:
            # What is saved behind the last one is not used; it only has to lie inside.
            number = jnp.minimum(number, tiles - 1)
            return begin + number * self.sizes.key_tile

        def several(count: int, number: Array) -> None:
            # Tile `number` is saved in slot 0 before, and the one behind the last one after.
            for u in range(count):
                self._save((u + 1) % 2, segment, at(number + u + 1))
                self._use(u % 2, segment, at(number + u))

        # Four tiles in an iteration, and at the end two or one.
        fours = jax.lax.div(tiles, 4)
        left = tiles - 4 * fours

        @pl.when(tiles > 0)
        def _begin() -> None:
            if self.sizes.segments == 1:
                self._edge(segment, edge)
            self._carry(segment * self.sizes.segment + at(0))
            self._save(0, segment, at(0))

        jax.lax.fori_loop(0, fours, lambda four, _: several(4, 4 * four), None)
        pl.when(left >= 2)(lambda: several(2, 4 * fours))
        pl.when(jax.lax.rem(left, 2) == 1)(lambda: self._use(0, segment, at(tiles - 1)))

        # What was saved and not used has raised the maximum for nothing.
        @pl.when((tiles > 0) & (jax.lax.rem(left, 2) == 0))
        def _lower_top() -> None:
            self.top[...] = self.scratch.new_top[1, : self.sizes.rows]

    def _save(self, slot: int, segment: Array, local: Array) -> None:
        """The first stage."""
        first_key = segment * self.sizes.segment + local
        key_CE = self.inputs.key[stretch(local, self.sizes.key_tile)]
        # The maximum is that of all tiles so far, whether their weights are added or not.
        logits = self._logits(first_key, key_CE, carries=True)
        top_RQ, shrink_RQ = self._raise_top(logits)
        rows = slice(self.sizes.rows)
        self.scratch.new_top[slot, rows] = top_RQ
        self.scratch.shrink[slot, rows] = shrink_RQ
        for b, block_RQ in enumerate(logits):
            self.scratch.logits[slot, rows, lanes_of(b)] = block_RQ

    def _use(self, slot: int, segment: Array, local: Array) -> None:
        """The second stage."""
        rows = slice(self.sizes.rows)
        # Less the maximum that was known when these logits were saved.
        top_RQ = self.scratch.new_top[slot, rows]
        weights = []
        for b in range(self.sizes.key_tile // LANES):
            weights.append(self._weight(self.scratch.logits[slot, rows, lanes_of(b)], top_RQ))
        first_key = segment * self.sizes.segment + local
        value_CE = self.inputs.value[stretch(local, self.sizes.key_tile)]
        part = _Part(weights, dropout.CONTEXT, first_key, value_CE, slot)
        self._add([part], self.scratch.shrink[slot, rows])

    # --- steps of an online softmax

    def _logits(self, first_key: Array, key_CE: Array, carries: bool = False) -> list[Array]:
        """Logits by content and position, in blocks of 128 keys.

        Args:
          first_key: of the tile.
          key_CE: its keys.
          carries: the first blocks of the window are the last ones of the tile before, which
            `_carry` or that tile has left, and this tile leaves its last ones.
        """
        T = self.sizes.query_tile
        blocks = key_CE.shape[0] // LANES
        spare = skew.window_blocks(0, self.sizes.remainder)
        if carries:
            rotated = [self.scratch.carried[b, : self.sizes.rows] for b in range(spare)]
            rotated += self._rotated(first_key, spare, blocks)
            for b in range(spare):
                self.scratch.carried[b, : self.sizes.rows] = rotated[blocks + b]
        else:
            rotated = self._rotated(first_key, 0, spare + blocks)
        by_position = skew.skewed(rotated, T, self.tile.window(first_key)[1])

        by_content_RC = dot(self.scratch.query[...], key_CE, NT_DIMENSIONS)
        return [by_content_RC[:, lanes_of(b)] + block_RQ for b, block_RQ in enumerate(by_position)]

    def _rotated(self, first_key: Array, first: int, blocks: int) -> list[Array]:
        """Logits by position: blocks of the window above a tile of keys, rotated."""
        column, remainder = self.tile.window(first_key)
        window = stretch(column + first * LANES, blocks * LANES)
        query = self.scratch.query if self.static.one_query else self.scratch.position_query
        logits_RW = dot(query[...], self.inputs.position[:, window])
        T = self.sizes.query_tile
        strided = self.sizes.strided
        return [
            skew.rotate(logits_RW[:, lanes_of(b)], T, remainder, strided) for b in range(blocks)
        ]

    def _carry(self, first_key: Array) -> None:
        """Leave the first blocks of the window for a tile of keys."""
        spare = skew.window_blocks(0, self.sizes.remainder)
        for b, block_RQ in enumerate(self._rotated(first_key, 0, spare)):
            self.scratch.carried[b, : self.sizes.rows] = block_RQ

    def _raise_top(
        self, logits: Sequence[Array], first: bool = False
    ) -> tuple[Array, Array | None]:
        """The new maximum, and what was summed under the old one shrinks by; None at first."""
        top_R1 = jnp.max(functools.reduce(jnp.maximum, logits), axis=1, keepdims=True)
        if first:
            # A query that sees nothing gets no weight from logits that are masked.
            top_RQ = jnp.broadcast_to(jnp.maximum(top_R1, LEAST_TOP), self.top.shape)
            self.top[...] = top_RQ
            return top_RQ, None
        old_RQ = self.top[...]
        top_RQ = jnp.maximum(old_RQ, top_R1)
        self.top[...] = top_RQ
        return top_RQ, self._weight(old_RQ, top_RQ)

    def _weight(self, logits_RQ: Array, top_RQ: Array) -> Array:
        """Exponentials less the maximum."""
        return jnp.exp2((logits_RQ - top_RQ) * self.factor)

    def _add(self, parts: list["_Part"], shrink_RQ: Array | None) -> None:
        """Add weights and their values to the sums.

        Dropout comes after the normalisation: a dropped weight stays in the total.
        """
        # Sums of weights, then sums of values.
        weights = [weight_RQ for part in parts for weight_RQ in part.weights]
        _shrink_and_add(self.total, shrink_RQ, sum_of(weights))
        products = [self._times_values(part) for part in parts]
        _shrink_and_add(self.sums, shrink_RQ, sum_of(products))

    def _times_values(self, part: "_Part") -> Array:
        """The product of weights and values, (R, E)."""
        dtype = part.value_XE.dtype
        rows = slice(self.sizes.rows)
        # Weights after dropout, but for the factor 1 / (1 - rate).
        if self.static.dropout_rate:
            blocks = len(part.weights)
            keeps = self.scratch.kept.keeps(self.tile, part.domain, part.first, blocks)
        for b, weight_RQ in enumerate(part.weights):
            if self.static.dropout_rate:
                weight_RQ = jnp.where(keeps(b), weight_RQ, 0)
            self.scratch.weights[part.slot, rows, lanes_of(b)] = weight_RQ.astype(dtype)
        weight_RX = self.scratch.weights[part.slot, rows, : len(part.weights) * LANES]
        return dot(weight_RX, part.value_XE)

    # --- the end

    def finish(self) -> None:
        """Divide by the sum. A query without any pair has the output 0."""
        # Rows of one head are those of its queries.
        total_R1 = jnp.sum(self.total[...], axis=1, keepdims=True)
        pairs_R1 = jnp.sum(self.pairs_total[...], axis=1, keepdims=True)
        share_R1 = 1 / jnp.where(total_R1 > 0, total_R1, 1)
        out_RE = self.sums[...] * (share_R1 * (1 / (1 - self.static.dropout_rate)))
        out_TE = unstacked(self.sizes, out_RE)
        self.outputs.out[self.rows] = out_TE.astype(self.outputs.out.dtype)

        # The maximum has risen since the pairs were added.
        top_R1 = self.top[:, :1]
        lse_R1 = log_sum(top_R1 * (self.factor / LOG2_E), total_R1)
        mass_R1 = pairs_R1 * self._weight(self.pairs_top[:, :1], top_R1) * share_R1
        T = self.sizes.query_tile
        for p in range(self.sizes.heads):
            head = slice(p * T, (p + 1) * T)
            self.outputs.lse[self.rows, p : p + 1] = lse_R1[head]
            self.outputs.mass[self.rows, p : p + 1] = mass_R1[head]


class _Part(NamedTuple):
    """Weights, and what they are of."""

    # blocks of 128, before dropout
    weights: list[Array]
    # dropout's domain, and the number of the first key or pair
    domain: int
    first: Array | int
    value_XE: Array
    # where the weights are kept for the product
    slot: int


def sum_of(arrays: Sequence[Array]) -> Array:
    """The sum of arrays, elementwise."""
    return functools.reduce(jnp.add, arrays)


def _shrink_and_add(sums: Any, shrink_RQ: Array | None, more: Array) -> None:
    """Add to sums after they have shrunk; without, they begin here."""
    if shrink_RQ is not None:
        more = sums[...] * _as_wide(shrink_RQ, sums.shape[1]) + more
    sums[...] = more


def _as_wide(x_RQ: Array, lanes: int) -> Array:
    """A number for every row, as many columns wide as the group."""
    if lanes <= LANES:
        return x_RQ[:, :lanes]
    return jnp.concatenate([x_RQ] * (lanes // LANES), axis=1)
