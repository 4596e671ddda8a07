"""The operation's arguments as the TPU kernels read them: sizes, scalars, and arrays laid out.

Nothing that is as long as the context is copied, unless heads do not fill whole lanes.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width, G group of P heads that share lanes, E a group's heads side by side, X any length.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from allattn.attention.contract import Dynamic, Inputs, Static, seed_and_offsets
from allattn.attention.span import reach
from allattn.attention.tpu import kept, skew
from allattn.attention.tpu.skew import LANES
from allattn.attention.tpu.tile import Scalars, Sizes, round_up, stretch

Array = jax.Array

# Bytes of on-chip memory of a TPU v4, where a step of the grid holds fewer keys.
SMALL_VMEM = 16 * 2**20
SMALL_SEGMENT = 2048
# Tiles of queries that a step of the grid holds, at most.
QUERY_TILES = 4
# Keys of a tile at an edge, keys of the one nearest to the queries, and persistent pairs that are
# worked on at once, at most.
EDGE_TILE = 2 * LANES
NEAREST_TILE = 2 * LANES
PAIRS = 1024


class Operands(NamedTuple):
    """What both kernels read, laid out; or references to blocks of it, in a kernel."""

    # (B, T, H K) and (B, S, H K); in a kernel (query_block, E) and (segment, E)
    query: Any
    position_query: Any
    key: Any
    value: Any
    # (H K, positions), reversed; or (E, positions) if heads share it
    position: Any
    # (H K, N) and (N, H K), N padded to whole steps over the pairs
    persistent_key: Any
    persistent_value: Any
    # (G, P, N), float32, as logits before the scale; in a kernel (P, N); None: there are no
    # offsets
    persistent_bias: Any = None


# --- sizes ----------------------------------------------------------------------------------------


def vmem() -> int:
    """Bytes of on-chip memory of the TPU that the code is traced for."""
    # Interpreted there is none, and enough is assumed.
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return 8 * SMALL_VMEM


def sizes_of(static: Static, inputs: Inputs) -> Sizes:
    """Static sizes of a call."""
    B, T, H, K = inputs.query_BTHK.shape
    L = inputs.position_HLK.shape[1]
    S = max(inputs.key_BSHK.shape[1], 1)
    heads, K = _group(H, K)

    # Tiles of whole registers, which have 32 bytes in every column.
    rows = 32 // inputs.query_BTHK.dtype.itemsize
    query_tile = min(round_up(static.tiles.queries, rows), LANES, round_up(T, rows))
    tiles = -(-T // query_tile)
    query_tiles = max(n for n in range(1, QUERY_TILES + 1) if tiles % n == 0)
    edge_tile = min(EDGE_TILE, round_up(S, LANES))
    segment = _segment(static, S, edge_tile)
    key_tile = min(round_up(static.tiles.keys, LANES), segment)

    # Where the queries' place is static, windows of the position table begin at whole blocks.
    left = 3 * LANES
    remainder = None
    if static.whole_context and query_tile in (LANES, round_up(T, rows)):
        remainder = 0
        begin = S - T - static.first_distance - L + 1
        left += (begin - left) % LANES
    right = query_tile + key_tile + 2 * LANES
    right += -(left + L + right) % LANES
    return Sizes(
        B=B,
        T=tiles * query_tile,
        S=S,
        L=L,
        N=inputs.persistent_key_HNK.shape[1],
        H=H,
        K=K,
        query_tile=query_tile,
        key_tile=key_tile,
        shared=inputs.position_HLK.shape[0] == 1,
        heads=heads,
        query_block=query_tiles * query_tile,
        segment=segment,
        edge_tile=edge_tile,
        nearest_tile=min(NEAREST_TILE, segment),
        remainder=remainder,
        left=left,
        right=right,
        strided=skew.can_stride(),
        multiplies=kept.can_multiply(),
        has_offsets=inputs.persistent_bias_HN is not None,
    )


def _group(H: int, K: int) -> tuple[int, int]:
    """How many heads share lanes, and the width of each.

    Heads side by side that fill whole lanes; if they do not, each is padded to whole lanes.
    """
    heads = max(1, LANES // K)
    if H * K <= LANES:
        heads = H
    fills_lanes = heads * K % LANES == 0 or heads >= H
    if H % heads or not fills_lanes:
        return 1, round_up(K, LANES)
    return heads, K


def _segment(static: Static, S: int, edge_tile: int) -> int:
    """Keys that a step of the grid holds: all, or a power of two, by which the kernels divide."""
    most = static.tiles.segment
    if vmem() <= SMALL_VMEM:
        most = min(most, SMALL_SEGMENT)
    return min(most, round_up(S, edge_tile))


# --- arrays ---------------------------------------------------------------------------------------


def scalars_of(static: Static, inputs: Inputs, dynamic: Dynamic) -> Scalars:
    """What is known before a kernel runs."""
    L = inputs.position_HLK.shape[1]
    limit = L
    if inputs.key_BSHK.shape[1] == 0:
        limit = 0
    span_H = inputs.span_H.astype(jnp.float32)
    reach_H = reach(span_H, static.ramp, static.first_distance, limit).astype(jnp.int32)
    # A distance below span + 1 is before the ramp; on the tie it is on it.
    before_ramp_H = jnp.ceil(span_H).astype(jnp.int32)
    return Scalars(
        reach_H=reach_H,
        clear_H=jnp.minimum(before_ramp_H, static.first_distance + limit - 1),
        span_H=span_H,
        query_start_B=dynamic.query_start_B,
        key_start_B=dynamic.key_start_B,
        seed_and_offsets=seed_and_offsets(dynamic),
    )


def operands_of(static: Static, sizes: Sizes, inputs: Inputs, scalars: Scalars) -> Operands:
    """The inputs as the kernels read them."""
    bias_GPN = None
    if inputs.persistent_bias_HN is not None:
        bias_GPN = _offsets(static, sizes, inputs.persistent_bias_HN)
    return Operands(
        query=side_by_side(sizes, inputs.query_BTHK, sizes.T),
        position_query=side_by_side(sizes, inputs.position_query_BTHK, sizes.T),
        key=side_by_side(sizes, inputs.key_BSHK, sizes.S),
        value=side_by_side(sizes, inputs.value_BSHK, sizes.S),
        position=_table(sizes, inputs.position_HLK, scalars.reach_H),
        persistent_key=_pairs(sizes, inputs.persistent_key_HNK).T,
        persistent_value=_pairs(sizes, inputs.persistent_value_HNK),
        persistent_bias=bias_GPN,
    )


def side_by_side(sizes: Sizes, x_BXHK: Array, length: int) -> Array:
    """(B, X, H, K) as (B, length, H K).

    No copy, unless T is not whole tiles or heads do not fill whole lanes.
    """
    # Queries and lanes that do not exist are 0.
    B, X, H, K = x_BXHK.shape
    if length > X or sizes.K > K:
        padding = ((0, 0), (0, length - X), (0, 0), (0, sizes.K - K))
        x_BXHK = jnp.pad(x_BXHK, padding)
    return x_BXHK.reshape(B, length, H * sizes.K)


def heads_apart(x_BXE: Array, like_BXHK: Array) -> Array:
    """The inverse of `side_by_side`."""
    _, X, H, K = like_BXHK.shape
    return x_BXE.reshape(*x_BXE.shape[:2], H, -1)[:, :X, :, :K]


def joined(static: Static, inputs: Inputs) -> Inputs:
    """The inputs with the heads of queries, keys and values side by side, (B, X, H K)."""
    _, _, H, K = inputs.query_BTHK.shape
    return _reshaped(static, inputs, (H * K,))


def apart(static: Static, inputs: Inputs, H: int, K: int) -> Inputs:
    """The inverse of `joined`."""
    return _reshaped(static, inputs, (H, K))


def _reshaped(static: Static, inputs: Inputs, heads: tuple[int, ...]) -> Inputs:
    """The inputs with the heads of queries, keys and values in another shape."""

    def reshape(x: Array) -> Array:
        return x.reshape(*x.shape[:2], *heads)

    query = reshape(inputs.query_BTHK)
    # The same queries are one array, which is kept once.
    position_query = query
    if not static.one_query:
        position_query = reshape(inputs.position_query_BTHK)
    return inputs._replace(
        query_BTHK=query,
        position_query_BTHK=position_query,
        key_BSHK=reshape(inputs.key_BSHK),
        value_BSHK=reshape(inputs.value_BSHK),
    )


def _table(sizes: Sizes, position_HLK: Array, reach_H: Array) -> Array:
    """The position table, farthest distance first, with distances along the lanes."""
    # Every window lies inside the padded table, which is the same in every layer.
    pad_K = (0, sizes.K - position_HLK.shape[2])
    position_HLK = jnp.pad(position_HLK[:, ::-1], ((0, 0), (sizes.left, sizes.right), pad_K))
    position_HKL = position_HLK.transpose(0, 2, 1)
    # What no head looks at may be anything, and becomes 0.
    needed_H = reach_H
    if sizes.shared:
        needed_H = jnp.max(reach_H, keepdims=True)
    distance = sizes.left + sizes.L - 1 - jnp.arange(sizes.positions)
    needed_HKL = (distance < needed_H[:, None])[:, None]
    position_HKL = jnp.where(needed_HKL, position_HKL, 0)
    # Heads of a group that share it need it once each.
    if sizes.shared:
        position_HKL = jnp.broadcast_to(position_HKL, (sizes.heads, *position_HKL.shape[1:]))
    return position_HKL.reshape(-1, sizes.positions)


def pair_steps(sizes: Sizes) -> tuple[int, int]:
    """Persistent pairs that a kernel works on at once, and how often."""
    pairs = min(PAIRS, round_up(max(1, sizes.N), LANES))
    return pairs, -(-max(1, sizes.N) // pairs)


def _pairs(sizes: Sizes, x_HNK: Array) -> Array:
    """Persistent keys or values as (N, H K), padded with zeros to whole steps."""
    pairs, steps = pair_steps(sizes)
    H, N, K = x_HNK.shape
    padding = ((0, 0), (0, pairs * steps - N), (0, sizes.K - K))
    x_NHK = jnp.pad(x_HNK, padding).transpose(1, 0, 2)
    return x_NHK.reshape(-1, H * sizes.K)


def logit_unit(static: Static) -> float:
    """What the kernels' logits are multiplied by, whose sign is that of the queries."""
    return abs(static.scale) or 1


def offsets_of(sizes: Sizes, operands: Operands, first: Array | int) -> Array:
    """Offsets of 128 pairs on the rows of every head, (R, 128).

    Args:
      sizes: static sizes of the call.
      operands: references of a kernel.
      first: number of the first pair, of a whole block.
    """
    bias_PQ = operands.persistent_bias[:, stretch(first, LANES)]
    shape = (sizes.query_tile, LANES)
    heads = [jnp.broadcast_to(bias_PQ[p : p + 1], shape) for p in range(sizes.heads)]
    return jnp.concatenate(heads)


def _offsets(static: Static, sizes: Sizes, bias_HN: Array) -> Array:
    """Offsets of pairs as (G, P, N), and -inf for those that only fill a step."""
    pairs, steps = pair_steps(sizes)
    bias_HN = bias_HN.astype(jnp.float32) / logit_unit(static)
    missing = pairs * steps - bias_HN.shape[1]
    bias_HN = jnp.pad(bias_HN, ((0, 0), (0, missing)), constant_values=-jnp.inf)
    return bias_HN.reshape(sizes.groups, sizes.heads, -1)
