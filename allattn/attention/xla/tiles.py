"""What the XLA implementation works on at a time: one head, a group of rows, a tile of queries, a window of keys.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width; inside one tile also: G row of the group, C column of the window of keys, R distance in
the bucket (farthest first), P the same padded to R + T + 1, A width and the span's bias.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from allattn.attention.contract import Dynamic, Inputs, Static
from allattn.attention.span import MASKED_LOGIT, log_span_mask
from allattn.attention.tuning import XlaTiles

Array = jax.Array

SMALLEST_BUCKET = 64


def buckets(limit: int) -> tuple[int, ...]:
    """Numbers of distances for which code is compiled: powers of two and, from 512 on, the steps halfway between."""
    sizes, size = [], SMALLEST_BUCKET
    while size < limit:
        sizes += [size, size * 3 // 2] if size >= 512 else [size]
        size *= 2
    return (*(s for s in sizes if s < limit), limit)


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
        """Queries of one row in a tile: few where a head sees little, since a window holds R + tile keys."""
        tile = min(self.length, self.tile_sizes.queries)
        while tile % 2 == 0 and tile > max(R // 4, self.tile_sizes.few):
            tile //= 2
        return tile

    def rows(self, R: int) -> int:
        """Rows in a tile: as many as keep its arrays small."""
        tile = self.tile(R)
        most = (
            max(1, self.tile_sizes.elements // (tile * (R + tile + self.N))) if self.together else 1
        )
        return max(rows for rows in range(1, self.B + 1) if self.B % rows == 0 and rows <= most)

    def tiles(self, R: int) -> int:
        """How many tiles the work has."""
        return self.B // self.rows(R) * (self.length // self.tile(R))


def work_shape(static: Static, inputs: Inputs) -> Shape:
    """Sizes, and the padding with which every window of keys lies inside the padded keys."""
    (B, T), S, L = (
        inputs.query_BTHK.shape[:2],
        inputs.key_BSHK.shape[1],
        inputs.position_HLK.shape[1],
    )
    whole, tile = static.whole_context, min(T, static.tiles.queries)
    length = -(-T // tile) * tile
    farthest = static.first_distance + L - 1
    left = max(0, farthest - (S - T)) if whole else farthest
    right = length + 1 - static.first_distance - (T if whole else 0)
    masked = left > 0 or not whole
    N = inputs.persistent_key_HNK.shape[1]
    return Shape(B, T, S, N, length, left, right, masked, whole, static.tiles)


class Head(NamedTuple):
    """One head's arrays, padded so that every window of keys and every tile of queries lies inside them.

    Keys and values have their width first: the products with them then run up to twice as fast on a
      CPU.
    """

    query_BTK: Array  # times the scale
    position_query_BTA: (
        Array  # times the scale, and a last column of ones that picks up the span's bias
    )
    key_BKS: Array
    value_BKS: Array
    position_KL: Array
    persistent_key_KN: Array
    persistent_value_KN: Array
    span: Array
    number: Array


def select_head(static: Static, inputs: Inputs, shape: Shape, head: Array) -> Head:
    """Cut one head out of the inputs, in the dtype of the statistics."""
    dtype = jnp.promote_types(inputs.query_BTHK.dtype, jnp.float32)

    def rows(x_BXHK: Array, before: int, after: int) -> Array:
        x_BXK = jax.lax.dynamic_index_in_dim(x_BXHK, head, 2, keepdims=False)
        return jnp.pad(x_BXK, ((0, 0), (before, after), (0, 0)))

    def queries(
        x_BTHK: Array,
    ) -> Array:  # scaled here, once, and not in every product; in float32, so exactly enough
        return rows(x_BTHK, 0, shape.length - shape.T).astype(dtype) * static.scale

    position_head = jnp.minimum(head, inputs.position_HLK.shape[0] - 1)
    return Head(
        query_BTK=queries(inputs.query_BTHK),
        position_query_BTA=jnp.pad(
            queries(inputs.position_query_BTHK), ((0, 0), (0, 0), (0, 1)), constant_values=1
        ),
        key_BKS=rows(inputs.key_BSHK, shape.left, shape.right).transpose(0, 2, 1).astype(dtype),
        value_BKS=rows(inputs.value_BSHK, shape.left, shape.right).transpose(0, 2, 1).astype(dtype),
        position_KL=inputs.position_HLK[position_head].T.astype(dtype),
        persistent_key_KN=inputs.persistent_key_HNK[head].T.astype(dtype),
        persistent_value_KN=inputs.persistent_value_HNK[head].T.astype(dtype),
        span=inputs.span_H[head],
        number=head,
    )


class Tile(NamedTuple):
    """Some queries of a group of rows, and their windows of keys."""

    query_GTK: Array
    position_query_GTA: Array
    key_GKC: Array
    value_GKC: Array
    absent_C: Array | None  # 0 where a key exists, MASKED_LOGIT elsewhere
    first_row: Array
    first_query: Array
    first_column: Array


def select_tile(
    static: Static, shape: Shape, R: int, head: Head, dynamic: Dynamic, number: Array
) -> Tile:
    """Cut tile `number` of a bucket out of a head: tiles of a row, then groups of rows."""
    G, T = shape.rows(R), shape.tile(R)
    tiles = shape.length // T
    first_row, first_query = number // tiles * G, number % tiles * T
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
    """Position keys of a bucket, farthest first, as position_AP: log m as a last row, and T + 1 columns of MASKED_LOGIT."""
    distance_R = static.first_distance + R - 1 - jnp.arange(R)
    bias_R = log_span_mask(distance_R, head.span, static.ramp).astype(head.position_KL.dtype)
    position_AR = jnp.concatenate([head.position_KL[:, :R][:, ::-1], bias_R[None]])
    beyond_A = jnp.zeros(position_AR.shape[0], position_AR.dtype).at[-1].set(MASKED_LOGIT)
    return jnp.concatenate(
        [position_AR, jnp.tile(beyond_A[:, None], (1, shape.tile(R) + 1))], axis=1
    )


def skew(by_distance_GTP: Array) -> Array:
    """Move row t right by t places: from padded distances (R + T + 1) to columns of the window (R + T)."""
    G, T, P = by_distance_GTP.shape
    return by_distance_GTP.reshape(G, -1)[:, : T * (P - 1)].reshape(G, T, P - 1)


def unskew(by_column_GTC: Array) -> Array:
    """The inverse of `skew`; its padding holds what lies outside the band, which is 0 for every gradient."""
    G, T, C = by_column_GTC.shape
    return jnp.pad(by_column_GTC.reshape(G, -1), ((0, 0), (0, T))).reshape(G, T, C + 1)
