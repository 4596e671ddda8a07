"""The operation as two fused TPU kernels, forward and backward, in Pallas: calls, grids and blocks.

A tile of queries is multiplied with tiles of keys in the cache's own layout, (B, S, H K), with as
many heads side by side as fill 128 lanes. Only tiles within reach of the spans are loaded and
computed: the reaches are known before a kernel runs (scalar prefetch), and a block's index is
clamped to them. A block whose index stays the same is not loaded again.

The forward kernel walks, for each tile of queries, the tiles of keys within reach. The backward
kernel walks every tile of keys once and, for each, all tiles of queries, so that gradients of keys
and values stay on the chip until they are complete; those of the queries of a whole row do too.

The kernels are in `kernels`. On a CPU they run interpreted.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width, G group of P heads that share lanes, E all heads side by side, X any length.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from allattn.attention.autodiff import forbid_second_derivative, name_for_remat
from allattn.attention.contract import Dynamic, Inputs, Static, seed_and_offsets
from allattn.attention.span import reach
from allattn.attention.tpu.kernels import (
    LANES,
    BackwardInputs,
    BackwardOutputs,
    BackwardScratch,
    ForwardInputs,
    ForwardOutputs,
    ForwardScratch,
    Scalars,
    Sizes,
    TilePosition,
    backward_kernel,
    forward_kernel,
    group_reach,
    round_up,
)

Array = jax.Array

# Bytes of on-chip memory of a TPU v4, where tiles of keys are half as long.
SMALL_VMEM = 16 * 2**20


def all_attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments.

    Returns:
      out_BTHK in the query's dtype and mass_BTH in float32.

    Raises:
      NotImplementedError: the dtype is neither float32 nor bfloat16.
    """
    if inputs.query_BTHK.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"pallas_tpu: expected dtype float32 or bfloat16, found {inputs.query_BTHK.dtype}"
        )
    return _attention(static, inputs, dynamic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    results, _ = _attention_forward(static, inputs, dynamic)
    return results


# --- sizes ----------------------------------------------------------------------------------------


def _vmem() -> int:
    """Bytes of on-chip memory of the TPU that the code is traced for."""
    # Interpreted there is none, and the least is assumed.
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return SMALL_VMEM


class Lengths(NamedTuple):
    """Sizes of the inputs that a call pads."""

    S: int
    L: int
    N: int


def _lengths(inputs: Inputs) -> Lengths:
    return Lengths(
        S=inputs.key_BSHK.shape[1],
        L=inputs.position_HLK.shape[1],
        N=inputs.persistent_key_HNK.shape[1],
    )


def _sizes(static: Static, inputs: Inputs) -> Sizes:
    B, T, H, K = inputs.query_BTHK.shape
    S, L, N = _lengths(inputs)

    # Heads side by side that fill whole lanes; if they do not, each is padded to whole lanes.
    heads = H if H * K <= LANES else max(1, LANES // K)
    fills_lanes = heads * K % LANES == 0 or heads >= H
    if H % heads or not fills_lanes:
        heads = 1
        K = round_up(K, LANES)

    # Tiles of whole registers, which have 32 bytes in every column.
    rows = 32 // inputs.query_BTHK.dtype.itemsize
    most_keys = static.tiles.keys
    if _vmem() <= SMALL_VMEM:
        most_keys = static.tiles.keys // 2
    query_tile = min(static.tiles.queries, round_up(T, rows))
    return Sizes(
        B=B,
        T=round_up(T, query_tile),
        S=max(S, 1),
        L=L,
        N=N,
        H=H,
        K=K,
        query_tile=query_tile,
        key_tile=min(most_keys, round_up(max(S, 1), rows)),
        shared=inputs.position_HLK.shape[0] == 1,
        heads=heads,
    )


# --- arrays as the kernels read them --------------------------------------------------------------


def _scalars(static: Static, inputs: Inputs, dynamic: Dynamic) -> Scalars:
    lengths = _lengths(inputs)
    limit = lengths.L if lengths.S else 0
    reach_H = reach(inputs.span_H, static.ramp, static.first_distance, limit).astype(jnp.int32)
    numbers = seed_and_offsets(dynamic)
    return Scalars(
        reach_H=reach_H,
        span_H=inputs.span_H.astype(jnp.float32),
        query_start_B=dynamic.query_start_B,
        key_start_B=dynamic.key_start_B,
        seed_and_offsets=numbers,
    )


def _side_by_side(sizes: Sizes, x_BXHK: Array, length: int) -> Array:
    """(B, X, H, K) as (B, length, H K).

    No copy, unless T is not whole tiles or heads do not fill whole lanes.
    """
    # Queries and lanes that do not exist are 0.
    B, X, H, K = x_BXHK.shape
    if length > X or sizes.K > K:
        padding = ((0, 0), (0, length - X), (0, 0), (0, sizes.K - K))
        x_BXHK = jnp.pad(x_BXHK, padding)
    return x_BXHK.reshape(B, length, H * sizes.K)


def _heads_apart(x_BXE: Array, like_BXHK: Array) -> Array:
    """The inverse of `_side_by_side`."""
    B, X, H, K = like_BXHK.shape
    return x_BXE.reshape(*x_BXE.shape[:2], H, -1)[:, :X, :, :K]


def _operands(sizes: Sizes, inputs: Inputs, reach_H: Array) -> ForwardInputs:
    """The inputs as the kernels read them."""
    # The position table, farthest distance first, with distances in the last dimension, which lanes
    # fill. What no head looks at may be anything, and becomes 0.
    _, L, N = _lengths(inputs)
    needed_H = jnp.max(reach_H, keepdims=True) if sizes.shared else reach_H
    needed_HLK = (jnp.arange(L) < needed_H[:, None])[..., None]
    position_HLK = jnp.where(needed_HLK, inputs.position_HLK, 0)[:, ::-1]
    position_HKL = position_HLK.transpose(0, 2, 1)

    # Every window lies inside the padded table, and there is at least one persistent pair to pass.
    pad_K = (0, sizes.K - inputs.query_BTHK.shape[3])
    pad_L = (sizes.left, sizes.positions - sizes.left - L)
    pad_N = (0, max(1, N) - N)
    return ForwardInputs(
        query=_side_by_side(sizes, inputs.query_BTHK, sizes.T),
        position_query=_side_by_side(sizes, inputs.position_query_BTHK, sizes.T),
        key=_side_by_side(sizes, inputs.key_BSHK, sizes.S),
        value=_side_by_side(sizes, inputs.value_BSHK, sizes.S),
        position=jnp.pad(position_HKL, ((0, 0), pad_K, pad_L)),
        persistent_key=jnp.pad(inputs.persistent_key_HNK, ((0, 0), pad_N, pad_K)),
        persistent_value=jnp.pad(inputs.persistent_value_HNK, ((0, 0), pad_N, pad_K)),
    )


# --- calls ----------------------------------------------------------------------------------------


class Blocks(NamedTuple):
    """Blocks of every kind of operand: what of an array is on the chip at a point of the grid."""

    # a tile of queries, those of a whole row, a tile of keys
    query: pl.BlockSpec
    queries: pl.BlockSpec
    key: pl.BlockSpec
    # the group's position table, which all groups may share, and its gradient, which they do not
    position: pl.BlockSpec
    d_position: pl.BlockSpec
    # the group's persistent pairs, one number for each query of a tile, and one for each head
    persistent: pl.BlockSpec
    statistic: pl.BlockSpec
    span: pl.BlockSpec


def _blocks(sizes: Sizes, order: Callable) -> Blocks:
    """Blocks of every kind of operand.

    Args:
      sizes: static sizes of the call.
      order: maps a grid point and the scalars' references to (group, row, query tile, key tile).

    Returns:
      The blocks, whose indices depend on the grid point.
    """
    lanes = sizes.heads * sizes.K
    table = 1 if sizes.shared else sizes.heads

    def block(shape: tuple, index: Callable, **options: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *point: index(*order(*point)), **options)

    def table_index(g: Array, b: Array, t: Array, s: Array) -> tuple:
        return (0 if sizes.shared else g, 0, 0)

    # Whatever changes with the group alone needs no second buffer.
    once: dict[str, Any] = {"pipeline_mode": pl.Buffered(1)}
    table_shape = (table, sizes.K, sizes.positions)
    pairs_shape = (sizes.heads, max(1, sizes.N), sizes.K)
    statistic_shape = (None, None, sizes.query_tile, sizes.heads)
    return Blocks(
        query=block((None, sizes.query_tile, lanes), lambda g, b, t, s: (b, t, g)),
        queries=block((None, sizes.T, lanes), lambda g, b, t, s: (b, 0, g)),
        key=block((None, sizes.key_tile, lanes), lambda g, b, t, s: (b, s, g)),
        position=block(table_shape, table_index, **once),
        d_position=block(table_shape, lambda g, b, t, s: (g, 0, 0), **once),
        persistent=block(pairs_shape, lambda g, b, t, s: (g, 0, 0), **once),
        statistic=block(statistic_shape, lambda g, b, t, s: (b, g, t, 0)),
        span=block((None, sizes.heads, LANES), lambda g, b, t, s: (g, 0, 0)),
    )


def _input_blocks(blocks: Blocks) -> ForwardInputs:
    """Blocks of what both kernels read."""
    return ForwardInputs(
        query=blocks.query,
        position_query=blocks.query,
        key=blocks.key,
        value=blocks.key,
        position=blocks.position,
        persistent_key=blocks.persistent,
        persistent_value=blocks.persistent,
    )


class Grid(NamedTuple):
    """Points of a kernel: those of the first axes may run at once, those of the others in order."""

    shape: tuple[int, ...]
    parallel_axes: int

    def semantics(self) -> list[Literal["parallel", "arbitrary"]]:
        """What each axis is, in the words of the compiler."""
        parallel: list[Literal["parallel", "arbitrary"]] = ["parallel"] * self.parallel_axes
        return parallel + ["arbitrary"] * (len(self.shape) - self.parallel_axes)


class Operands(NamedTuple):
    """Arrays, shapes or blocks of a kernel, each in the NamedTuple that the kernel receives."""

    inputs: Any
    outputs: Any


def _run(
    kernel: Callable,
    name: str,
    grid: Grid,
    scalars: Scalars,
    operands: Operands,
    blocks: Operands,
    scratch: Any,
) -> Any:
    """Call a kernel: compiled for a TPU, interpreted elsewhere.

    Args:
      kernel: function of (scalars, inputs, outputs, scratch), all of them references.
      name: of the compiled kernel.
      grid: its points.
      scalars: what is known before the kernel runs.
      operands: arrays of the inputs, shapes of the outputs.
      blocks: of inputs and outputs, in the same structure.
      scratch: memory of a program, in the structure that the kernel expects.

    Returns:
      The outputs.
    """
    # Pallas passes references without structure, in this order.
    references = jax.tree.structure((scalars, *operands, scratch))
    arrays = jax.tree.leaves((scalars, operands.inputs))

    def with_names(*refs: Any) -> None:
        kernel(*jax.tree.unflatten(references, refs))

    def call(interpret: bool, *arrays: Array) -> list[Array]:
        return pl.pallas_call(
            with_names,
            out_shape=jax.tree.leaves(operands.outputs),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid.shape,
                in_specs=jax.tree.leaves(blocks.inputs),
                out_specs=jax.tree.leaves(blocks.outputs),
                scratch_shapes=jax.tree.leaves(scratch),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=grid.semantics(), vmem_limit_bytes=_vmem() * 7 // 8
            ),
            interpret=interpret,
            name=name,
        )(*arrays)

    compiled = functools.partial(call, False)
    interpreted = functools.partial(call, True)
    results = jax.lax.platform_dependent(*arrays, tpu=compiled, default=interpreted)
    return jax.tree.unflatten(jax.tree.structure(operands.outputs), results)


# --- forward --------------------------------------------------------------------------------------


def _attention_forward(
    static: Static, inputs: Inputs, dynamic: Dynamic
) -> tuple[tuple[Array, Array], tuple]:
    # A second derivative would enter the kernel here, which has none.
    inputs = forbid_second_derivative(inputs)
    sizes = _sizes(static, inputs)
    scalars = _scalars(static, inputs, dynamic)
    operands = _operands(sizes, inputs, scalars.reach_H)
    outputs = _run_forward(static, sizes, scalars, operands)

    # What the backward pass starts from is named, so that rematerialisation may keep it.
    out_BTHK = _heads_apart(outputs.out, inputs.query_BTHK)
    out_BTHK, lse_BGTP = name_for_remat(out_BTHK, outputs.lse)
    T = inputs.query_BTHK.shape[1]
    mass_BTGP = outputs.mass.transpose(0, 2, 1, 3)
    mass_BTH = mass_BTGP.reshape(sizes.B, sizes.T, sizes.H)[:, :T]
    return (out_BTHK, mass_BTH), (inputs, out_BTHK, lse_BGTP, dynamic)


def _run_forward(
    static: Static, sizes: Sizes, scalars: Scalars, inputs: ForwardInputs
) -> ForwardOutputs:
    """The forward kernel: the output (B, T, E), log-sum-exp and mass (B, G, T, P)."""
    groups = sizes.H // sizes.heads

    def order(group: Array, row: Array, query_tile: Array, step: Array, *scalars: Any) -> tuple:
        # No key tile beyond the reach of the group's spans is loaded.
        refs = Scalars(*scalars)
        farthest = group_reach(sizes, refs.reach_H, group)
        tile = TilePosition(static, sizes, refs, row, query_tile, farthest)
        return group, row, query_tile, tile.key_tile(step)

    # Blocks and shapes.
    blocks = _blocks(sizes, order)
    output_blocks = ForwardOutputs(out=blocks.query, lse=blocks.statistic, mass=blocks.statistic)
    out = jax.ShapeDtypeStruct((sizes.B, sizes.T, sizes.H * sizes.K), inputs.query.dtype)
    statistic = jax.ShapeDtypeStruct((sizes.B, groups, sizes.T, sizes.heads), jnp.float32)
    # The state of the softmax stays on the chip over the steps of a tile of queries.
    column = pltpu.VMEM((sizes.heads, sizes.query_tile, 1), jnp.float32)
    scratch = ForwardScratch(
        top=column,
        total=column,
        persistent_lse=column,
        sums=pltpu.VMEM((sizes.heads, sizes.query_tile, sizes.K), jnp.float32),
    )
    # The steps over key tiles share that memory, so they run in order.
    shape = (groups, sizes.B, sizes.T // sizes.query_tile, sizes.key_steps)
    return _run(
        functools.partial(forward_kernel, static, sizes),
        "all_attention_forward",
        Grid(shape, parallel_axes=3),
        scalars,
        Operands(inputs, ForwardOutputs(out, statistic, statistic)),
        Operands(_input_blocks(blocks), output_blocks),
        scratch,
    )


# --- backward -------------------------------------------------------------------------------------


def _attention_backward(
    static: Static, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[Inputs, None]:
    # The share of persistent pairs has no gradient.
    inputs, out_BTHK, lse_BGTP, dynamic = residuals
    d_out_BTHK, _ = cotangents
    differentiable = (inputs, out_BTHK, lse_BGTP, d_out_BTHK)
    inputs, out_BTHK, lse_BGTP, d_out_BTHK = forbid_second_derivative(differentiable)
    sizes = _sizes(static, inputs)
    scalars = _scalars(static, inputs, dynamic)

    # out . d_out of every query, in the layout of the log-sum-exp.
    delta_BTH = jnp.sum(d_out_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1)
    delta_BTH = jnp.pad(delta_BTH, ((0, 0), (0, sizes.T - delta_BTH.shape[1]), (0, 0)))
    delta_BTGP = delta_BTH.reshape(sizes.B, sizes.T, -1, sizes.heads)
    delta_BGTP = delta_BTGP.transpose(0, 2, 1, 3)

    # The kernel reads what the forward kernel read, and three arrays more.
    operands = BackwardInputs(
        **_operands(sizes, inputs, scalars.reach_H)._asdict(),
        d_out=_side_by_side(sizes, d_out_BTHK, sizes.T),
        lse=lse_BGTP,
        delta=delta_BGTP,
    )
    outputs = _run_backward(static, sizes, scalars, operands)
    return _in_shape_of(inputs, sizes, outputs), None


def _run_backward(
    static: Static, sizes: Sizes, scalars: Scalars, inputs: BackwardInputs
) -> BackwardOutputs:
    """The backward kernel: gradients of everything, in the kernels' layout."""
    groups = sizes.H // sizes.heads
    query_tiles = sizes.T // sizes.query_tile

    def loads(group: Array, row: Array, key_tile: Array, query_tile: Array, *scalars: Any) -> tuple:
        # Only tiles of keys that the first to the last query can reach are loaded.
        refs = Scalars(*scalars)
        farthest = group_reach(sizes, refs.reach_H, group)
        first = TilePosition(static, sizes, refs, row, 0, farthest)
        last = TilePosition(static, sizes, refs, row, query_tiles - 1, farthest)
        oldest = jnp.maximum(key_tile, first.key_tile(0))
        loaded = jnp.minimum(oldest, last.key_tile(sizes.key_tiles))
        return group, row, query_tile, loaded

    # Every tile of keys has gradients, within reach or not.
    def stores(group: Array, row: Array, key_tile: Array, query_tile: Array, *_: Any) -> tuple:
        return group, row, query_tile, key_tile

    blocks = _blocks(sizes, loads)
    input_blocks = BackwardInputs(
        **_input_blocks(blocks)._asdict(),
        d_out=blocks.query,
        lse=blocks.statistic,
        delta=blocks.statistic,
    )
    sums = pltpu.VMEM((sizes.key_tile, sizes.heads * sizes.K), jnp.float32)
    # Gradients of queries add up over key tiles, those of table and pairs over rows: only groups
    # may run at once.
    shape = (groups, sizes.B, sizes.key_tiles, query_tiles)
    return _run(
        functools.partial(backward_kernel, static, sizes),
        "all_attention_backward",
        Grid(shape, parallel_axes=1),
        scalars,
        Operands(inputs, _gradient_shapes(static, sizes, inputs.key.dtype)),
        Operands(input_blocks, _gradient_blocks(static, _blocks(sizes, stores))),
        BackwardScratch(d_key=sums, d_value=sums),
    )


def _gradient_shapes(static: Static, sizes: Sizes, dtype: Any) -> BackwardOutputs:
    """Shapes of all gradients in the kernels' layout; `dtype` is that of keys and values."""
    # Groups that share a table have a gradient each, which the caller adds up.
    groups = sizes.H // sizes.heads
    tables = groups if sizes.shared else sizes.H
    queries = jax.ShapeDtypeStruct((sizes.B, sizes.T, sizes.H * sizes.K), jnp.float32)
    keys = jax.ShapeDtypeStruct((sizes.B, sizes.S, sizes.H * sizes.K), dtype)
    pairs = jax.ShapeDtypeStruct((sizes.H, max(1, sizes.N), sizes.K), jnp.float32)
    return BackwardOutputs(
        d_query=queries,
        d_key=keys,
        d_value=keys,
        d_position=jax.ShapeDtypeStruct((tables, sizes.K, sizes.positions), jnp.float32),
        d_persistent_key=pairs,
        d_persistent_value=pairs,
        d_span=jax.ShapeDtypeStruct((groups, sizes.heads, LANES), jnp.float32),
        d_position_query=None if static.one_query else queries,
    )


def _gradient_blocks(static: Static, blocks: Blocks) -> BackwardOutputs:
    """Blocks of all gradients."""
    return BackwardOutputs(
        d_query=blocks.queries,
        d_key=blocks.key,
        d_value=blocks.key,
        d_position=blocks.d_position,
        d_persistent_key=blocks.persistent,
        d_persistent_value=blocks.persistent,
        d_span=blocks.span,
        d_position_query=None if static.one_query else blocks.queries,
    )


def _in_shape_of(inputs: Inputs, sizes: Sizes, outputs: BackwardOutputs) -> Inputs:
    """All gradients in the shapes and dtypes of the inputs."""
    # Heads that share the table have a gradient each group.
    _, L, N = _lengths(inputs)
    K = inputs.query_BTHK.shape[3]
    d_position = outputs.d_position
    if sizes.shared:
        d_position = d_position.sum(0, keepdims=True)
    d_query_BTHK = _heads_apart(outputs.d_query, inputs.query_BTHK)
    # Where one array asks keys and positions, its whole gradient is that of the first.
    if outputs.d_position_query is None:
        d_position_query_BTHK = jnp.zeros_like(inputs.query_BTHK)
    else:
        d_position_query_BTHK = _heads_apart(outputs.d_position_query, inputs.query_BTHK)
    d_key_BSHK = _heads_apart(outputs.d_key, inputs.key_BSHK)
    d_value_BSHK = _heads_apart(outputs.d_value, inputs.value_BSHK)
    # Back from the padded, reversed table.
    d_position_HKL = d_position[:, :K, sizes.left : sizes.left + L][:, :, ::-1]
    gradients = Inputs(
        query_BTHK=d_query_BTHK,
        position_query_BTHK=d_position_query_BTHK,
        key_BSHK=d_key_BSHK,
        value_BSHK=d_value_BSHK,
        position_HLK=d_position_HKL.transpose(0, 2, 1),
        persistent_key_HNK=outputs.d_persistent_key[:, :N, :K],
        persistent_value_HNK=outputs.d_persistent_value[:, :N, :K],
        span_H=outputs.d_span[:, :, 0].reshape(-1),
    )
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, inputs)


_attention.defvjp(_attention_forward, _attention_backward)
