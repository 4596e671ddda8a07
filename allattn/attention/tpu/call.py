"""How a TPU kernel is called: its grid, and which block of an array each of its steps sees.

Dimension key: X any.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from allattn.attention.tpu.operands import Operands, pair_steps, vmem
from allattn.attention.tpu.tile import Sizes, Tile

Array = jax.Array


class Grid(NamedTuple):
    """Points of a kernel: those of the first axes may run at once, those of the others in order."""

    shape: tuple[int, ...]
    parallel_axes: int

    def semantics(self) -> list[Literal["parallel", "arbitrary"]]:
        """What each axis is, in the words of the compiler."""
        parallel: list[Literal["parallel", "arbitrary"]] = ["parallel"] * self.parallel_axes
        return parallel + ["arbitrary"] * (len(self.shape) - self.parallel_axes)


class Arguments(NamedTuple):
    """Arrays, shapes or blocks of a kernel, each in the NamedTuple that the kernel receives."""

    inputs: Any
    outputs: Any


def run(
    kernel: Callable,
    name: str,
    grid: Grid,
    scalars: NamedTuple,
    arguments: Arguments,
    blocks: Arguments,
    scratch: Any,
) -> Any:
    """Call a kernel: compiled for a TPU, interpreted elsewhere.

    Args:
      kernel: function of (scalars, inputs, outputs, scratch), all of them references.
      name: of the compiled kernel.
      grid: its points.
      scalars: what is known before the kernel runs.
      arguments: arrays of the inputs, shapes of the outputs.
      blocks: of inputs and outputs, in the same structure.
      scratch: memory of a program, in the structure that the kernel expects.

    Returns:
      The outputs.
    """
    # Pallas passes references without structure, in this order.
    references = jax.tree.structure((scalars, *arguments, scratch))
    arrays = jax.tree.leaves((scalars, arguments.inputs))

    def with_names(*refs: Any) -> None:
        kernel(*jax.tree.unflatten(references, refs))

    def call(interpret: bool, *arrays: Array) -> list[Array]:
        return pl.pallas_call(
            with_names,
            out_shape=jax.tree.leaves(arguments.outputs),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=len(scalars),
                grid=grid.shape,
                in_specs=jax.tree.leaves(blocks.inputs),
                out_specs=jax.tree.leaves(blocks.outputs),
                scratch_shapes=jax.tree.leaves(scratch),
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=grid.semantics(), vmem_limit_bytes=vmem() * 15 // 16
            ),
            interpret=interpret,
            name=name,
        )(*arrays)

    compiled = functools.partial(call, False)
    interpreted = functools.partial(call, True)
    results = jax.lax.platform_dependent(*arrays, tpu=compiled, default=interpreted)
    return jax.tree.unflatten(jax.tree.structure(arguments.outputs), results)


# --- blocks ---------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What a point of a kernel's grid works on, in numbers of groups, rows and blocks."""

    group: Any
    row: Any
    query_block: Any
    segment: Any


def loaded(segment: Any, first: Tile, last: Tile) -> Any:
    """The segment, or the nearest one that a stretch of queries reaches: no other is loaded.

    Args:
      segment: number of a segment.
      first, last: the first and the last tile of queries.
    """
    sizes = first.sizes
    if sizes.segments == 1:
        return 0
    # The oldest key is the first tile's, the newest the last tile's.
    oldest = jax.lax.div(first.oldest, sizes.segment)
    return jnp.minimum(jnp.maximum(segment, oldest), last.home())


def operand_blocks(sizes: Sizes, place: Callable[..., Step]) -> Operands:
    """Blocks of what both kernels read.

    Args:
      sizes: static sizes of the call.
      place: from a grid point and the scalars' references to what is loaded there.
    """
    pairs, steps = pair_steps(sizes)
    position = pl.BlockSpec(
        (sizes.lanes, sizes.positions),
        lambda *point: (0 if sizes.shared else place(*point).group, 0),
        # What changes with the group alone needs no second buffer.
        pipeline_mode=pl.Buffered(1),
    )
    persistent_key = pl.BlockSpec(
        (sizes.lanes, pairs * steps),
        lambda *point: (place(*point).group, 0),
        pipeline_mode=pl.Buffered(1),
    )
    persistent_value = pl.BlockSpec(
        (pairs * steps, sizes.lanes),
        lambda *point: (0, place(*point).group),
        pipeline_mode=pl.Buffered(1),
    )
    offsets = None
    if sizes.has_offsets:
        offsets = offset_block(sizes, lambda *point: place(*point).group)
    query = query_block(sizes, place)
    key = pl.BlockSpec(
        (None, sizes.segment, sizes.lanes),
        lambda *point: (place(*point).row, place(*point).segment, place(*point).group),
    )
    return Operands(
        query=query,
        position_query=query,
        key=key,
        value=key,
        position=position,
        persistent_key=persistent_key,
        persistent_value=persistent_value,
        persistent_bias=offsets,
    )


def offset_block(sizes: Sizes, group: Callable[..., Any]) -> pl.BlockSpec:
    """The block of an array (G, P, N), from the function of a grid point that gives the group."""
    pairs, steps = pair_steps(sizes)
    return pl.BlockSpec(
        (None, sizes.heads, pairs * steps),
        lambda *point: (group(*point), 0, 0),
        pipeline_mode=pl.Buffered(1),
    )


def query_block(sizes: Sizes, place: Callable[..., Step]) -> pl.BlockSpec:
    """The block of an array (B, T, H K)."""
    return pl.BlockSpec(
        (None, sizes.query_block, sizes.lanes),
        lambda *point: (place(*point).row, place(*point).query_block, place(*point).group),
    )


def statistic_block(sizes: Sizes, place: Callable[..., Step]) -> pl.BlockSpec:
    """The block of an array (B, G, T, P), one number for every query and head."""
    return pl.BlockSpec(
        (None, None, sizes.query_block, sizes.heads),
        lambda *point: (place(*point).row, place(*point).group, place(*point).query_block, 0),
    )
