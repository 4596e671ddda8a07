"""How tiles are loaded from the arrays of a GPU call, and stored into them.

Programs see whole arrays and load tiles of them. Arrays over positions have batch and position in
rows, heads and their width in columns: (B T, H K), which is their layout in memory. Arrays over
heads (tables and persistent pairs) have head and index in rows: (H L, K). The scratch array with
the logits by position is flat; `head_row` says where a pair lies in it.

Whatever does not exist is loaded as 0 and not stored. Interpreted, an index that is masked must
still name no number that another program owns, so stores put it behind the array's end.

Dimension key: T query of the tile, C key of the tile, D distance of the tile (farthest first), N
persistent pair of the tile, K head width, X any; B row, H head, U head row.
"""

from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from allattn.attention.gpu.head_row import HeadRow, Scalars, Sizes, iota

Array = jax.Array

InputsT = TypeVar("InputsT")
OutputsT = TypeVar("OutputsT")


class Refs(NamedTuple, Generic[InputsT, OutputsT]):
    """References of one kernel call, in the order in which Pallas passes them.

    Inputs and outputs are NamedTuples that stand beside their kernel. The caller fills them with
    arrays, the kernel receives them with references to those arrays.
    """

    scalars: Scalars
    inputs: InputsT
    # The outputs as they were before the call, if it updates arrays: the same memory as `outputs`.
    before: OutputsT
    outputs: OutputsT


# --- rows of one head -----------------------------------------------------------------------------


def load(ref: Any, sizes: Sizes, head: Any, row_X1: Array, exists_X1: Array) -> Array:
    """Load rows of one head, 0 where they do not exist.

    Args:
      ref: an array of rank two, with heads side by side in columns.
      sizes: static sizes of the call.
      head: which head's columns; 0 if heads lie in rows.
      row_X1: int32, rows of the array.
      exists_X1: bool, which of them exist.

    Returns:
      An array (X, lanes) in the reference's dtype, 0 in lanes beyond the head width.
    """
    # Triton wants every index in full.
    column_1K, lane_1K = _columns(sizes, head)
    shape = (row_X1.shape[0], sizes.lanes)
    mask_XK = jnp.broadcast_to(exists_X1 & lane_1K, shape)
    row_XK = jnp.broadcast_to(row_X1, shape)
    column_XK = jnp.broadcast_to(column_1K, shape)
    return plgpu.load(ref.at[row_XK, column_XK], mask=mask_XK, other=jnp.zeros((), ref.dtype))


def store(
    ref: Any, sizes: Sizes, head: Any, row_X1: Array, exists_X1: Array, value_XK: Array
) -> None:
    """Store rows of one head where they exist, in the reference's dtype; arguments as in `load`."""
    column_1K, lane_1K = _columns(sizes, head)
    # Interpreted, a negative row would be one counted from the end.
    row_X1 = jnp.where(exists_X1, row_X1, ref.shape[0])
    mask_XK = jnp.broadcast_to(exists_X1 & lane_1K, value_XK.shape)
    row_XK = jnp.broadcast_to(row_X1, value_XK.shape)
    column_XK = jnp.broadcast_to(column_1K, value_XK.shape)
    plgpu.store(ref.at[row_XK, column_XK], value_XK.astype(ref.dtype), mask=mask_XK)


def _columns(sizes: Sizes, head: Any) -> tuple[Array, Array]:
    """Where a head's lanes lie among all heads', and which of them exist."""
    lane_1K = iota(sizes.lanes, 1)
    return head * sizes.K + lane_1K, lane_1K < sizes.K


def load_queries(ref: Any, head_row: HeadRow, query_T1: Array) -> Array:
    """Load queries, or what has their shape, of a head row."""
    sizes = head_row.sizes
    return load(ref, sizes, head_row.head, head_row.row * sizes.T + query_T1, query_T1 < sizes.T)


def load_keys(ref: Any, head_row: HeadRow, key_C1: Array) -> Array:
    """Load context keys or values of a head row, 0 where no query sees them."""
    sizes = head_row.sizes
    # What no query sees may be anything, even NaN.
    exists_C1 = (key_C1 >= head_row.oldest) & (key_C1 <= head_row.newest)
    return load(ref, sizes, head_row.head, head_row.row * sizes.S + key_C1, exists_C1)


def load_pairs(ref: Any, sizes: Sizes, head: Any, pair_N1: Array) -> Array:
    """Load persistent keys or values, which lie head by head."""
    return load(ref, sizes, 0, head * sizes.N + pair_N1, pair_N1 < sizes.N)


def load_pair_bias(ref: Any, sizes: Sizes, head: Any, pair_1N: Array) -> Array:
    """Load what is added to pairs' logits, which lies head by head; -inf beyond the last one."""
    index_1N = head * sizes.N + pair_1N
    return plgpu.load(ref.at[index_1N], mask=pair_1N < sizes.N, other=-jnp.inf)


def load_positions(ref: Any, head_row: HeadRow, column_D1: Array) -> Array:
    """Load the position keys of some columns of the scratch array."""
    sizes = head_row.sizes
    # Column 0 is the farthest distance within reach, row reach - 1 of the head's table.
    head = 0 if sizes.shared else head_row.head
    row_D1 = head * sizes.L + head_row.reach - 1 - column_D1
    return load(ref, sizes, 0, row_D1, column_D1 < head_row.reach)


def load_statistic(ref: Any, head_row: HeadRow, query: Array) -> Array:
    """Load one number per query from (B H T), log-sum-exp or delta, in the shape of `query`."""
    sizes = head_row.sizes
    index = head_row.number * sizes.T + query
    return plgpu.load(ref.at[index], mask=query < sizes.T, other=0.0)


# --- the scratch array ----------------------------------------------------------------------------


def load_by_key(
    ref: Any, head_row: HeadRow, query: Array, key: Array, exists: Array | None
) -> Array:
    """Load numbers of pairs of query and key, 0 where there is none; `exists` None: all exist."""
    other = None if exists is None else jnp.zeros((), ref.dtype)
    return plgpu.load(ref.at[head_row.address(query, key)], mask=exists, other=other)


def load_by_column(masked: bool, ref: Any, head_row: HeadRow, query: Array, column: Array) -> Array:
    """Load numbers of pairs of query and column, 0 where there is none; not masked: all exist."""
    numbers = ref.at[head_row.address_of_column(query, column)]
    if not masked:
        return plgpu.load(numbers)
    exists = head_row.column_exists(query, column)
    return plgpu.load(numbers, mask=exists, other=jnp.zeros((), ref.dtype))


def store_at(ref: Any, address: Array, exists: Array | None, value: Array) -> None:
    """Store numbers of pairs where they exist; `exists` None: all do."""
    if exists is not None:
        # Interpreted, a masked store must not fall on the number of another pair.
        address = jnp.where(exists, address, ref.shape[0])
    plgpu.store(ref.at[address], value, mask=exists)


# --- arithmetic -----------------------------------------------------------------------------------


def exp2(sizes: Sizes, x: Array) -> Array:
    """2 to the power of x."""
    # With CUDA one instruction, which gives 0 below the least normal number.
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
    """The beginning of a sum over rows of one head, in float32."""
    return jnp.zeros((rows, sizes.lanes), jnp.float32)
