"""What the XLA implementation works on at a time.

One head, a group of rows, a tile of queries, and the window of consecutive keys that they can see.
At the end are `skew` and `unskew`, with a picture: logits by distance become logits by key.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width; inside one tile also: G row of the group, C column of the window of keys, R distance
within reach (farthest first), P the same padded to R + T + 1, A head width and one column more,
which carries log m.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from allattn.attention.contract import Dynamic, Inputs, Static
from allattn.attention.span import MASKED_LOGIT, log_span_mask
from allattn.attention.tuning import XlaTiles

Array = jax.Array

# Below so few distances, code of its own saves nothing.
SMALLEST_REACH_SIZE = 64
# From so many on, a power of two is so far from the next that a step halfway between pays.
FIRST_HALF_STEP = 512


def reach_sizes(limit: int) -> tuple[int, ...]:
    """Numbers of distances for which code is compiled, ascending; the last is the limit.

    Powers of two and, from 512 on, the steps halfway between: a reach known only at run time is
    rounded up to one of them.
    """
    sizes = []
    size = SMALLEST_REACH_SIZE
    while size < limit:
        sizes.append(size)
        half_step = size * 3 // 2
        if size >= FIRST_HALF_STEP and half_step < limit:
            sizes.append(half_step)
        size *= 2
    return (*sizes, limit)


class Shape(NamedTuple):
    """Static sizes of the work on one head."""

    B: int
    T: int
    S: int
    N: int
    length: int  # T, rounded up to whole tiles
    left: int  # zero keys before the first, so that every window lies inside
    right: int
    masked: bool  # whether a window can hold keys that do not exist
    together: bool  # whether all rows have their windows at the same place
    tile_sizes: XlaTiles

    def tile(self, R: int) -> int:
        """Queries of one row in a tile.

        Few where a head sees little, since a window holds R + tile keys.
        """
        tile = min(self.length, self.tile_sizes.queries)
        while tile % 2 == 0 and tile > max(R // 4, self.tile_sizes.few):
            tile //= 2
        return tile

    def rows(self, R: int) -> int:
        """Rows in a tile: as many as keep its arrays small."""
        # Rows whose windows lie at different places cannot share a tile.
        most = 1
        if self.together:
            tile = self.tile(R)
            weights = tile * (R + tile + self.N)
            most = max(1, self.tile_sizes.elements // weights)
        # A divisor of B, so that all groups are alike.
        return max(rows for rows in range(1, self.B + 1) if self.B % rows == 0 and rows <= most)

    def tiles(self, R: int) -> int:
        """How many tiles the work has."""
        groups = self.B // self.rows(R)
        return groups * (self.length // self.tile(R))


def work_shape(static: Static[XlaTiles], inputs: Inputs) -> Shape:
    """Sizes, and the padding with which every window of keys lies inside the padded keys."""
    B, T, _, _ = inputs.query_BTHK.shape
    S = inputs.key_BSHK.shape[1]
    L = inputs.position_HLK.shape[1]
    tile = min(T, static.tiles.queries)
    length = -(-T // tile) * tile
    # Query 0 may sit anywhere from key 0 to key S, unless it is known to sit at key S - T.
    farthest = static.first_distance + L - 1
    if static.whole_context:
        left = max(0, farthest - (S - T))
        right = length + 1 - static.first_distance - T
    else:
        left = farthest
        right = length + 1 - static.first_distance
    return Shape(
        B=B,
        T=T,
        S=S,
        N=inputs.persistent_key_HNK.shape[1],
        length=length,
        left=left,
        right=right,
        masked=left > 0 or not static.whole_context,
        together=static.whole_context,
        tile_sizes=static.tiles,
    )


class Head(NamedTuple):
    """One head's arrays, padded so that every window of keys and tile of queries lies inside them.

    Keys and values have their width first: the products with them then run up to twice as fast on a
    CPU.
    """

    # Times the scale; the position query also has a last column of ones, which picks up the span's
    # bias.
    query_BTK: Array
    position_query_BTA: Array
    # S padded by `Shape.left` and `Shape.right` keys of zeros.
    key_BKS: Array
    value_BKS: Array
    position_KL: Array
    persistent_key_KN: Array
    persistent_value_KN: Array
    span: Array
    number: Array
    # Added to the pairs' logits; None: nothing is.
    persistent_bias_N: Array | None


def select_head(static: Static, inputs: Inputs, shape: Shape, head: Array) -> Head:
    """Cut one head out of the inputs, in the dtype of the statistics."""
    dtype = jnp.promote_types(inputs.query_BTHK.dtype, jnp.float32)

    def rows(x_BXHK: Array, before: int, after: int) -> Array:
        x_BXK = jax.lax.dynamic_index_in_dim(x_BXHK, head, 2, keepdims=False)
        return jnp.pad(x_BXK, ((0, 0), (before, after), (0, 0)))

    # Scaled here once, and not in every product: in float32, so exactly enough.
    def queries(x_BTHK: Array) -> Array:
        return rows(x_BTHK, 0, shape.length - shape.T).astype(dtype) * static.scale

    def keys(x_BSHK: Array) -> Array:
        return rows(x_BSHK, shape.left, shape.right).transpose(0, 2, 1).astype(dtype)

    bias_N = None
    if inputs.persistent_bias_HN is not None:
        bias_N = inputs.persistent_bias_HN[head].astype(dtype)
    # A table shared by all heads has only head 0.
    position_head = jnp.minimum(head, inputs.position_HLK.shape[0] - 1)
    return Head(
        query_BTK=queries(inputs.query_BTHK),
        position_query_BTA=jnp.pad(
            queries(inputs.position_query_BTHK), ((0, 0), (0, 0), (0, 1)), constant_values=1
        ),
        key_BKS=keys(inputs.key_BSHK),
        value_BKS=keys(inputs.value_BSHK),
        position_KL=inputs.position_HLK[position_head].T.astype(dtype),
        persistent_key_KN=inputs.persistent_key_HNK[head].T.astype(dtype),
        persistent_value_KN=inputs.persistent_value_HNK[head].T.astype(dtype),
        span=inputs.span_H[head],
        number=head,
        persistent_bias_N=bias_N,
    )


class Tile(NamedTuple):
    """Some queries of a group of rows, and their windows of keys."""

    query_GTK: Array
    position_query_GTA: Array
    key_GKC: Array
    value_GKC: Array
    # 0 where a key exists, MASKED_LOGIT elsewhere; None: all exist.
    absent_C: Array | None
    # Where the tile begins: its row in the batch, its query, its window's first padded key.
    first_row: Array
    first_query: Array
    first_column: Array


def select_tile(
    static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, number: Array
) -> Tile:
    """Cut tile `number` out of a head that sees R distances.

    Tiles are counted along a row first, then over groups of rows.
    """
    G = shape.rows(R)
    T = shape.tile(R)
    tiles = shape.length // T
    first_row = number // tiles * G
    first_query = number % tiles * T
    # The window begins at the farthest key of the tile's first query.
    oldest = dynamic.query_start_B[first_row] + first_query - (static.first_distance + R - 1)
    first_column = oldest + shape.left

    def queries(x_BTK: Array) -> Array:
        return jax.lax.dynamic_slice(x_BTK, (first_row, first_query, 0), (G, T, x_BTK.shape[2]))

    def window(x_BKS: Array) -> Array:
        return jax.lax.dynamic_slice(
            x_BKS, (first_row, 0, first_column), (G, x_BKS.shape[1], R + T)
        )

    absent_C = None
    if shape.masked:
        index_C = oldest + jnp.arange(R + T)
        exists_C = (index_C >= jnp.maximum(dynamic.key_start_B[first_row], 0)) & (index_C < shape.S)
        absent_C = jnp.where(exists_C, 0.0, MASKED_LOGIT).astype(head.query_BTK.dtype)
    return Tile(
        query_GTK=queries(head.query_BTK),
        position_query_GTA=queries(head.position_query_BTA),
        key_GKC=window(head.key_BKS),
        value_GKC=window(head.value_BKS),
        absent_C=absent_C,
        first_row=first_row,
        first_query=first_query,
        first_column=first_column,
    )


def padded_positions(static: Static, shape: Shape, R: int, head: Head) -> Array:
    """Position keys of R distances, farthest first, padded by T + 1 columns, as position_AP.

    The last row is log m, and MASKED_LOGIT in the padding.
    """
    distance_R = static.first_distance + R - 1 - jnp.arange(R)
    bias_R = log_span_mask(distance_R, head.span, static.ramp).astype(head.position_KL.dtype)
    position_AR = jnp.concatenate([head.position_KL[:, :R][:, ::-1], bias_R[None]])
    # What the skew moves outside the band: no position, and masked.
    beyond_A = jnp.zeros(position_AR.shape[0], position_AR.dtype).at[-1].set(MASKED_LOGIT)
    padding_AX = jnp.tile(beyond_A[:, None], (1, shape.tile(R) + 1))
    return jnp.concatenate([position_AR, padding_AX], axis=1)


def skew(by_distance_GTP: Array) -> Array:
    """Move row t right by t: from padded distances (R + T + 1) to columns of the window (R + T).

    Logits by distance are one product for all queries. The key at a distance lies one column
    further to the right with every query. Cutting the flat array into rows that are one number
    shorter moves row t right by t, and its padding comes to lie outside the band. With T = 3
    queries and R = 2 distances, far f and near n, and padding -:

        f0 n0  -  -  -  -                          f0 n0  -  -  -
        f1 n1  -  -  -  -   the first 15 numbers    - f1 n1  -  -
        f2 n2  -  -  -  -   in rows of 5            -  - f2 n2  -
    """
    G, T, P = by_distance_GTP.shape
    return by_distance_GTP.reshape(G, -1)[:, : T * (P - 1)].reshape(G, T, P - 1)


def unskew(by_column_GTC: Array) -> Array:
    """The inverse of `skew`, from columns of the window to padded distances.

    The padding holds what lies outside the band, which is 0 for every gradient: T zeros at the end
    of the flat array, and then rows that are one number longer.
    """
    G, T, C = by_column_GTC.shape
    return jnp.pad(by_column_GTC.reshape(G, -1), ((0, 0), (0, T))).reshape(G, T, C + 1)
