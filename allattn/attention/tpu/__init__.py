"""The operation as two fused TPU kernels, forward and backward, in Pallas.

A tile of queries meets tiles of keys in the cache's own layout, (B, S, H K) with as many heads side
by side as fill 128 lanes. Only tiles within reach of the spans are loaded and computed: the reaches
are known before a kernel runs (scalar prefetch). The backward pass walks every key tile once, so
that gradients of keys and values stay on the chip until they are complete. Here are the calls,
blocks and grids; the kernels are in `tpu_kernels`. On a CPU they run interpreted.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width, G group of P heads that share lanes, E all heads side by side, X any length.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from allattn.attention.autodiff import forbid_second_derivative, name_for_remat
from allattn.attention.contract import Dynamic, Inputs, Static
from allattn.attention.span import reach
from allattn.attention.tpu.kernels import (
    LANES,
    Place,
    Sizes,
    backward_kernel,
    forward_kernel,
    group_reach,
    round_up,
)

Array = jax.Array

SMALL_VMEM = 16 * 2**20  # of TPU v4, where half the keys fit


def all_attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments, as out and mass."""
    if inputs.query_BTHK.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"pallas_tpu: expected dtype float32 or bfloat16, found {inputs.query_BTHK.dtype}"
        )
    return _attention(static, inputs, dynamic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    return _attention_forward(static, inputs, dynamic)[0]


def _vmem() -> int:
    """Bytes of on-chip memory of the TPU that the code is traced for; the least there is where it is none."""
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return SMALL_VMEM


def _sizes(static: Static, inputs: Inputs) -> Sizes:
    (B, T, H, K), (S, L, N) = inputs.query_BTHK.shape, _lengths(inputs)
    heads = H if H * K <= LANES else max(1, LANES // K)
    if (
        H % heads or heads * K % LANES and heads < H
    ):  # such heads do not fill whole lanes side by side
        heads, K = 1, round_up(K, LANES)
    rows = 32 // inputs.query_BTHK.dtype.itemsize  # of one register
    most = static.tiles.keys if _vmem() > SMALL_VMEM else static.tiles.keys // 2
    tiles = min(static.tiles.queries, round_up(T, rows)), min(most, round_up(max(S, 1), rows))
    return Sizes(
        B,
        round_up(T, tiles[0]),
        max(S, 1),
        L,
        N,
        H,
        K,
        *tiles,
        inputs.position_HLK.shape[0] == 1,
        heads,
    )


def _lengths(inputs: Inputs) -> tuple[int, int, int]:
    return (
        inputs.key_BSHK.shape[1],
        inputs.position_HLK.shape[1],
        inputs.persistent_key_HNK.shape[1],
    )


def _scalars(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, ...]:
    S, L, _ = _lengths(inputs)
    reach_H = reach(inputs.span_H, static.ramp, static.first_distance, L if S else 0).astype(
        jnp.int32
    )
    seed = jax.lax.bitcast_convert_type(dynamic.dropout_seed.astype(jnp.uint32), jnp.int32)
    numbers = jnp.stack([seed, dynamic.row_offset, dynamic.head_offset]).astype(jnp.int32)
    return (
        reach_H,
        inputs.span_H.astype(jnp.float32),
        dynamic.query_start_B,
        dynamic.key_start_B,
        numbers,
    )


def _side_by_side(sizes: Sizes, x_BXHK: Array, length: int) -> Array:
    """(B, X, H, K) as (B, length, H K): no copy unless T is not whole tiles or heads do not fill whole lanes."""
    B, X, H, K = x_BXHK.shape
    padding = ((0, 0), (0, length - X), (0, 0), (0, sizes.K - K))
    return (jnp.pad(x_BXHK, padding) if any(map(any, padding)) else x_BXHK).reshape(
        B, length, H * sizes.K
    )


def _apart(x_BXE: Array, like_BXHK: Array) -> Array:
    """The inverse of `_side_by_side`."""
    B, X, H, K = like_BXHK.shape
    return x_BXE.reshape(*x_BXE.shape[:2], H, -1)[:, :X, :, :K]


def _operands(sizes: Sizes, inputs: Inputs, reach_H: Array) -> tuple[Array, ...]:
    """Query, position query, key, value, position table, persistent keys and values as the kernels read them."""
    (_, L, N), K = _lengths(inputs), inputs.query_BTHK.shape[3]
    pad_K = (0, sizes.K - K)
    needed_H = jnp.max(reach_H, keepdims=True) if sizes.shared else reach_H
    needed_HLK = (jnp.arange(L) < needed_H[:, None])[
        ..., None
    ]  # what no head looks at may be anything
    after = sizes.positions - sizes.left - L
    position_HKL = jnp.where(needed_HLK, inputs.position_HLK, 0)[:, ::-1].transpose(
        0, 2, 1
    )  # so that it fills lanes
    pairs = (inputs.persistent_key_HNK, inputs.persistent_value_HNK)
    return (
        *(
            _side_by_side(sizes, x, sizes.T)
            for x in (inputs.query_BTHK, inputs.position_query_BTHK)
        ),
        *(_side_by_side(sizes, x, sizes.S) for x in (inputs.key_BSHK, inputs.value_BSHK)),
        jnp.pad(position_HKL, ((0, 0), pad_K, (sizes.left, after))),
        *(jnp.pad(x_HNK, ((0, 0), (0, max(1, N) - N), pad_K)) for x_HNK in pairs),
    )


def _specs(sizes: Sizes, order: Callable) -> dict[str, pl.BlockSpec]:
    """Blocks of every kind of operand; `order` gives (group, row, query tile, key tile) of a grid point."""
    lanes, table = sizes.heads * sizes.K, 1 if sizes.shared else sizes.heads

    def spec(shape: tuple, index: Callable, **options: Any) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda *point: index(*order(*point)), **options)

    once: dict[str, Any] = {
        "pipeline_mode": pl.Buffered(1)
    }  # what changes with the group alone needs no second buffer

    by_group = (sizes.heads, max(1, sizes.N), sizes.K)
    return {
        "query": spec((None, sizes.query_tile, lanes), lambda g, b, t, s: (b, t, g)),
        "queries": spec((None, sizes.T, lanes), lambda g, b, t, s: (b, 0, g)),
        "key": spec((None, sizes.key_tile, lanes), lambda g, b, t, s: (b, s, g)),
        "position": spec(
            (table, sizes.K, sizes.positions),
            lambda g, b, t, s: (0 if sizes.shared else g, 0, 0),
            **once,
        ),
        "d_position": spec((table, sizes.K, sizes.positions), lambda g, b, t, s: (g, 0, 0), **once),
        "persistent": spec(by_group, lambda g, b, t, s: (g, 0, 0), **once),
        "statistic": spec(
            (None, None, sizes.query_tile, sizes.heads), lambda g, b, t, s: (b, g, t, 0)
        ),
        "span": spec((None, sizes.heads, LANES), lambda g, b, t, s: (g, 0, 0)),
    }


def _run(
    kernel: Callable,
    name: str,
    grid: tuple,
    parallel: int,
    specs: tuple,
    shapes: list,
    scratch: list,
    *arrays,
):
    """Call a kernel: compiled for a TPU, interpreted elsewhere."""

    def call(interpret: bool, *arrays: Array) -> list[Array]:
        axes: tuple[Literal["parallel", "arbitrary"], ...] = ("parallel", "arbitrary")
        semantics = [axes[axis >= parallel] for axis in range(len(grid))]
        return pl.pallas_call(
            kernel,
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=5,
                grid=grid,
                in_specs=specs[0],
                out_specs=specs[1],
                scratch_shapes=scratch,
            ),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=semantics, vmem_limit_bytes=_vmem() * 7 // 8
            ),
            interpret=interpret,
            name=name,
        )(*arrays)

    return jax.lax.platform_dependent(
        *arrays, tpu=functools.partial(call, False), default=functools.partial(call, True)
    )


def _attention_forward(static: Static, inputs: Inputs, dynamic: Dynamic):
    inputs = forbid_second_derivative(
        inputs
    )  # a second derivative would enter the kernel here, which has none
    sizes, scalars = _sizes(static, inputs), _scalars(static, inputs, dynamic)
    groups, H = sizes.H // sizes.heads, sizes.H

    def order(
        group, row, query_tile, step, *scalars
    ):  # no key tile beyond the reach of the group's spans is loaded
        farthest = group_reach(sizes, scalars[0], group)
        return (
            group,
            row,
            query_tile,
            Place(static, sizes, scalars, row, query_tile, farthest).key_tile(step),
        )

    spec = _specs(sizes, order)
    statistic = jax.ShapeDtypeStruct((sizes.B, groups, sizes.T, sizes.heads), jnp.float32)
    column = pltpu.VMEM((sizes.heads, sizes.query_tile, 1), jnp.float32)
    out_BTE, lse_BGTP, mass_BGTP = _run(
        functools.partial(forward_kernel, static, sizes),
        "all_attention_forward",
        (groups, sizes.B, sizes.T // sizes.query_tile, sizes.key_steps),
        3,
        (
            [
                spec[n]
                for n in ("query", "query", "key", "key", "position", "persistent", "persistent")
            ],
            [spec["query"], spec["statistic"], spec["statistic"]],
        ),
        [
            jax.ShapeDtypeStruct((sizes.B, sizes.T, H * sizes.K), inputs.query_BTHK.dtype),
            statistic,
            statistic,
        ],
        [column, column, column, pltpu.VMEM((sizes.heads, sizes.query_tile, sizes.K), jnp.float32)],
        *scalars,
        *_operands(sizes, inputs, scalars[0]),
    )
    out_BTHK, lse_BGTP = name_for_remat(_apart(out_BTE, inputs.query_BTHK), lse_BGTP)
    mass_BTH = mass_BGTP.transpose(0, 2, 1, 3).reshape(sizes.B, sizes.T, H)[
        :, : inputs.query_BTHK.shape[1]
    ]
    return (out_BTHK, mass_BTH), (inputs, out_BTHK, lse_BGTP, dynamic)


def _attention_backward(static: Static, residuals: tuple, cotangents: tuple):
    (inputs, out_BTHK, lse_BGTP, d_out_BTHK), dynamic = (
        forbid_second_derivative((*residuals[:3], cotangents[0])),
        residuals[3],
    )
    sizes, scalars = _sizes(static, inputs), _scalars(static, inputs, dynamic)
    groups, table = sizes.H // sizes.heads, 1 if sizes.shared else sizes.heads
    delta_BTH = jnp.sum(d_out_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1)
    delta_BTH = jnp.pad(delta_BTH, ((0, 0), (0, sizes.T - delta_BTH.shape[1]), (0, 0)))
    delta_BGTP = delta_BTH.reshape(sizes.B, sizes.T, groups, sizes.heads).transpose(0, 2, 1, 3)

    def order(group, row, key_tile, query_tile, *scalars):
        farthest = group_reach(sizes, scalars[0], group)
        places = [
            Place(static, sizes, scalars, row, t, farthest)
            for t in (0, sizes.T // sizes.query_tile - 1)
        ]
        loaded = jnp.minimum(
            jnp.maximum(key_tile, places[0].key_tile(0)), places[1].key_tile(sizes.key_tiles)
        )
        return group, row, query_tile, loaded

    loads = _specs(sizes, order)
    stores = _specs(
        sizes, lambda group, row, key_tile, query_tile, *_: (group, row, query_tile, key_tile)
    )
    queries = jax.ShapeDtypeStruct((sizes.B, sizes.T, sizes.H * sizes.K), jnp.float32)
    keys = jax.ShapeDtypeStruct((sizes.B, sizes.S, sizes.H * sizes.K), inputs.key_BSHK.dtype)
    pairs = jax.ShapeDtypeStruct((sizes.H, max(1, sizes.N), sizes.K), jnp.float32)
    names = (
        "query",
        "query",
        "key",
        "key",
        "position",
        "persistent",
        "persistent",
        "query",
        "statistic",
        "statistic",
    )
    sums = pltpu.VMEM((sizes.key_tile, sizes.heads * sizes.K), jnp.float32)
    others = 0 if static.one_query else 1
    (
        d_query,
        d_key,
        d_value,
        d_position,
        d_persistent_key,
        d_persistent_value,
        d_span,
        *d_position_query,
    ) = _run(
        functools.partial(backward_kernel, static, sizes),
        "all_attention_backward",
        (groups, sizes.B, sizes.key_tiles, sizes.T // sizes.query_tile),
        1,
        (
            [loads[n] for n in names],
            [
                *(
                    stores[n]
                    for n in (
                        "queries",
                        "key",
                        "key",
                        "d_position",
                        "persistent",
                        "persistent",
                        "span",
                    )
                ),
                *[stores["queries"]] * others,
            ],
        ),
        [
            *(queries, keys, keys),
            jax.ShapeDtypeStruct((groups * table, sizes.K, sizes.positions), jnp.float32),
            *(pairs, pairs, jax.ShapeDtypeStruct((groups, sizes.heads, LANES), jnp.float32)),
            *[queries] * others,
        ],
        [sums, sums],
        *scalars,
        *_operands(sizes, inputs, scalars[0]),
        _side_by_side(sizes, d_out_BTHK, sizes.T),
        lse_BGTP,
        delta_BGTP,
    )
    (_, L, N), K = _lengths(inputs), inputs.query_BTHK.shape[3]
    d_position = d_position.sum(0, keepdims=True) if sizes.shared else d_position
    gradients = Inputs(
        _apart(d_query, inputs.query_BTHK),
        _apart(d_position_query[0], inputs.query_BTHK)
        if others
        else jnp.zeros_like(inputs.query_BTHK),
        _apart(d_key, inputs.key_BSHK),
        _apart(d_value, inputs.value_BSHK),
        d_position[:, :K, sizes.left : sizes.left + L][:, :, ::-1].transpose(0, 2, 1),
        d_persistent_key[:, :N, :K],
        d_persistent_value[:, :N, :K],
        d_span[:, :, 0].reshape(-1),
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), gradients, inputs), None


_attention.defvjp(_attention_forward, _attention_backward)
