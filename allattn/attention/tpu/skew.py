"""From positions to keys: rows of a tile of logits, each moved one column more than the row above.

The logits of queries and positions come as a rectangle of queries and distances, a window of the
reversed table. A key lies one distance farther from every next query, so row t of the window moves
t columns to the right to stand above its keys, and gradients move back. With 3 queries, 2 keys and
numbers that are distances (query t and key j are t - j + 5 apart),

    window of every query          skewed            of query t and key j
    t = 0   7  6 [5  4] 3          5  4
    t = 1   7 [6  5] 4  3    ->    6  5
    t = 2  [7  6] 5  4  3          7  6

A rotation of 128 lanes stays inside a register, so the window is cut into blocks of 128 columns.
Each block is rotated once, row t by t; what leaves a block on the right has come in on its left,
and belongs to the next block. So a block of the tile takes of two rotated neighbours, by lane:

    window   | block 0 | block 1 | block 2 |       rotated by row      tile, block 0, row t
                                                   lanes < t           from block 0
                                                   lanes >= t          from block 1

Rows of the heads that share lanes stand below each other, T of each, T a multiple of 8 and at most
128. A window begins `remainder` columns before a tile of keys begins in it, modulo 128: 0 where the
place of the queries is static, else known at run time, and then a third neighbour has a part.

Dimension key: R row of a stack of P heads' tiles of T queries, C key of the tile, W column of the
window, Q column of a block of 128.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

Array = jax.Array

# Columns of a register, and rows of one of 32-bit numbers.
LANES = 128
SUBLANES = 8


def lanes_of(block: int) -> slice:
    """The columns of a block of 128."""
    return slice(block * LANES, (block + 1) * LANES)


def can_stride() -> bool:
    """Whether the TPU that the code is traced for rotates each row by one column more.

    A v4 does not, and an interpreted kernel would be slow to compile.
    """
    try:
        return pltpu.get_tpu_info().generation > 4
    except ValueError:
        return False


def window_blocks(columns: int, remainder: Any) -> int:
    """Blocks of the window that a tile of so many keys needs."""
    # Known to be 0 when the code is traced.
    spare = 1 if _is_zero(remainder) else 2
    return columns // LANES + spare


def rotate(block_RQ: Array, T: int, remainder: Any, strided: bool) -> Array:
    """Rotate row t of every head t - remainder columns to the right, within a block of 128."""
    parts = [block_RQ[row : row + T] for row in range(0, block_RQ.shape[0], T)]
    if strided:
        back = _modulo_lanes(LANES - remainder)
        rotated = [pltpu.roll(part_TQ, back, 1, stride=1, stride_axis=0) for part_TQ in parts]
    else:
        rotated = [_rotate_by_places(part_TQ, 1, remainder) for part_TQ in parts]
    return jnp.concatenate(rotated)


def skewed(rotated: list[Array], T: int, remainder: Any) -> list[Array]:
    """Blocks of the tile, out[t, c] = window[t, 128 + remainder + c - t].

    Args:
      rotated: the window's blocks (R, 128), each through `rotate`.
      T: queries of one head.
      remainder: as of `rotate`.
    """
    row_RQ, lane_RQ = _places(rotated[0].shape, T)
    blocks = []
    for b in range(len(rotated) - window_blocks(0, remainder)):
        block_RQ = jnp.where(lane_RQ < row_RQ - remainder, rotated[b], rotated[b + 1])
        if not _is_zero(remainder):
            beyond_RQ = lane_RQ >= LANES + row_RQ - remainder
            block_RQ = jnp.where(beyond_RQ, rotated[b + 2], block_RQ)
        blocks.append(block_RQ)
    return blocks


def unskewed(tile: Any, T: int, remainder: Any, strided: bool) -> list[Array]:
    """The inverse of `rotate` and `skewed`: blocks of the window, zero where no key stands.

    There is no rotation to the left. But rows in the opposite order, rotated to the right, move to
    the left, one less each: so within every eight the rows come out reversed, which `reversed_rows`
    does to whatever is multiplied with them. Reading a register's rows in another order is free.

    Args:
      tile: reference (R, C), float32.
      T: queries of one head.
      remainder: as of `rotate`.
      strided: as of `can_stride`; if not, the rows keep their order.
    """
    # Every block of keys rotated back, with nothing before the first and behind the last.
    R, C = tile.shape
    zeros_RQ = jnp.zeros((R, LANES), jnp.float32)
    rotated = [zeros_RQ] * window_blocks(0, remainder)
    for column in range(0, C, LANES):
        rotated.append(_rotated_back(tile, slice(column, column + LANES), T, remainder, strided))
    rotated += [zeros_RQ] * window_blocks(0, remainder)

    # A block of the window has keys of two neighbours, or three.
    row_RQ, lane_RQ = _places((R, LANES), T)
    if strided:
        row_RQ = row_RQ ^ (SUBLANES - 1)
    blocks = []
    for b in range(window_blocks(C, remainder)):
        newer = b + window_blocks(0, remainder)
        block_RQ = jnp.where(
            lane_RQ < LANES - row_RQ + remainder, rotated[newer - 1], rotated[newer]
        )
        if not _is_zero(remainder):
            older_RQ = lane_RQ < remainder - row_RQ
            block_RQ = jnp.where(older_RQ, rotated[newer - 2], block_RQ)
        blocks.append(block_RQ)
    return blocks


def reversed_rows(x: Any, strided: bool) -> Array:
    """Rows in the order in which `unskewed` leaves them.

    Args:
      x: reference (R, X), float32.
      strided: as of `can_stride`.
    """
    if not strided:
        return x[...]
    flip = SUBLANES - 1 - jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, x.shape[1]), 0)
    eights = range(0, x.shape[0], SUBLANES)
    return jnp.concatenate(
        [jnp.take_along_axis(x[row : row + SUBLANES], flip, axis=0) for row in eights]
    )


def _rotated_back(tile: Any, columns: slice, T: int, remainder: Any, strided: bool) -> Array:
    """One block of keys, row t of every head rotated t - remainder columns to the left."""
    R, _ = tile.shape
    if not strided:
        parts = [tile[row : row + T, columns] for row in range(0, R, T)]
        return jnp.concatenate([_rotate_by_places(part_TQ, -1, remainder) for part_TQ in parts])
    flip = SUBLANES - 1 - jax.lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 0)
    eights = []
    for row in range(0, R, SUBLANES):
        reversed_eight = jnp.take_along_axis(tile[row : row + SUBLANES, columns], flip, axis=0)
        # The first of them is the last row of the eight.
        back = _modulo_lanes(remainder + LANES - (row % T + SUBLANES - 1))
        eights.append(pltpu.roll(reversed_eight, back, 1, stride=1, stride_axis=0))
    return jnp.concatenate(eights)


def _rotate_by_places(part_TQ: Array, sign: int, remainder: Any) -> Array:
    """Rotate row t by t - remainder columns to the right (sign 1) or left (-1): a permutation."""
    row_TQ, lane_TQ = _places(part_TQ.shape, part_TQ.shape[0])
    from_TQ = _modulo_lanes(lane_TQ - sign * (row_TQ - remainder))
    return jnp.take_along_axis(part_TQ, from_TQ, axis=1)


def _places(shape: tuple[int, ...], T: int) -> tuple[Array, Array]:
    """Row within the head, and lane."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    lane = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jax.lax.rem(row, T), lane


def _is_zero(remainder: Any) -> bool:
    return isinstance(remainder, int) and remainder == 0


def _modulo_lanes(columns: Any) -> Any:
    return columns & (LANES - 1)
