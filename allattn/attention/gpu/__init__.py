"""The operation as fused GPU kernels in Pallas (Triton).

Triton cannot skew a tile in registers. The logits by position are therefore one plain product per
unit (one head of one row), written to a scratch array of bounded size and read along its diagonals.
Units go through it in chunks: each takes as much of it as its span can reach, so that short spans
need one chunk, and full ones many. The backward pass recomputes the logits; their gradients take
their place in the scratch array. Here are the calls, grids and chunks; the kernels are in
`gpu_kernels`. On a CPU they run interpreted; on AMD's GPUs they are compiled but were never run.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width, U unit, G group of rows, P program of a unit, X and Y any.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from allattn.attention.autodiff import forbid_second_derivative, name_for_remat
from allattn.attention.contract import Dynamic, Inputs, Static
from allattn.attention.gpu import kernels
from allattn.attention.gpu.memory import Scalars, Sizes
from allattn.attention.span import reach

Array = jax.Array

SCRATCH = 2**28  # bytes
PROGRAMS = 16  # that share one unit's tiles of keys
# for sums over rows of the position table's gradient, of each head: at least as many as tiles of
# distances
PLACES = 32
GROUPS = 4  # of rows, whose gradients of the persistent pairs are added at the end


def all_attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments, as out and mass."""
    if inputs.query_BTHK.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(
            f"pallas_gpu: expected dtype float32 or bfloat16, found {inputs.query_BTHK.dtype}"
        )
    sizes = _sizes(static, inputs)
    needed = sizes.length * sizes.width(sizes.L) * inputs.query_BTHK.dtype.itemsize
    if needed > SCRATCH:
        raise NotImplementedError(
            f"pallas_gpu: expected at most {SCRATCH} bytes for the logits by position of one head of one row, "
            f"found T x L = {sizes.T} x {sizes.L}, which needs {needed}"
        )
    return _attention(static, inputs, dynamic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    return _attention_forward(static, inputs, dynamic)[0]


def _sizes(static: Static, inputs: Inputs) -> Sizes:
    (B, T, H, K), (S, L) = (
        inputs.query_BTHK.shape,
        (inputs.key_BSHK.shape[1], inputs.position_HLK.shape[1]),
    )
    N, shared = inputs.persistent_key_HNK.shape[1], inputs.position_HLK.shape[0] == 1
    query_tile = min(static.tiles.queries, max(16, pl.next_power_of_2(T)))
    return Sizes(
        B,
        T,
        S,
        L,
        N,
        H,
        K,
        query_tile,
        static.tiles.keys,
        shared,
        pl.cdiv(T, query_tile) * query_tile,
    )


def _rows(x: Array) -> Array:
    """The last dimension in columns, the others in rows; at least one row, since none cannot be passed."""
    return x.reshape(-1, x.shape[-1]) if x.size else jnp.zeros((1, x.shape[-1]), x.dtype)


def _heads_in_columns(x_BXHK: Array) -> Array:
    """(B, X, H, K) as (B X, H K), which is no copy."""
    B, X, H, K = x_BXHK.shape
    return _rows(x_BXHK.reshape(B * X, H * K))


def _is_array(x: Array | jax.ShapeDtypeStruct) -> bool:
    return not isinstance(x, jax.ShapeDtypeStruct)


def _like(x: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


class Call(NamedTuple):
    """The kernels of one call, and what they all read."""

    static: Static
    sizes: Sizes
    scalars: Scalars

    def run(
        self, kernel: Callable, grid: tuple, *arrays: Array, changed: tuple[Any, ...]
    ) -> tuple[Array, ...]:
        """Call a kernel, compiled for a GPU, interpreted elsewhere; what it changes comes last, and back.

        In place of an array that it writes as a whole, a ShapeDtypeStruct will do.
        """
        given = [i for i, x in enumerate(changed) if _is_array(x)]
        operands = (*self.scalars, *arrays, *(changed[i] for i in given))
        first, tiles = len(operands) - len(given), self.static.tiles

        def call(platform: str, *operands: Array) -> list[Array]:
            return pl.pallas_call(
                functools.partial(
                    kernel, self.static, dataclasses.replace(self.sizes, platform=platform)
                ),
                grid=grid,
                out_shape=[_like(x) for x in changed],
                input_output_aliases={first + n: i for n, i in enumerate(given)},
                compiler_params=plgpu.CompilerParams(
                    num_warps=tiles.warps,
                    num_stages=tiles.stages
                    if platform == "cuda"
                    else None,  # AMD's have less memory for stages
                ),
                interpret=not platform,
                name=kernel.__name__,
            )(*operands)

        compiled = {name: functools.partial(call, name) for name in ("cuda", "rocm")}
        return tuple(
            jax.lax.platform_dependent(*operands, **compiled, default=functools.partial(call, ""))
        )

    def query_grid(self) -> tuple[int, int]:
        return self.sizes.length // self.sizes.query_tile, self.sizes.B * self.sizes.H

    def for_each_chunk(self, dtype: Any, work: Callable, results: tuple, known: Array) -> tuple:
        """Carry results through chunks of units whose logits by position fit into the scratch array together.

        ShapeDtypeStructs among the results are made here, as arrays that were not written yet, and
        the scratch array as well, when `known` is: the scratch arrays of a forward and a backward
        pass never exist at once.
        """
        sizes, base_U = self.sizes, self.scalars.base_U
        units = sizes.B * sizes.H
        room = min(
            units * sizes.width(sizes.L), SCRATCH // jnp.dtype(dtype).itemsize // sizes.length
        )

        def chunk(carry: tuple) -> tuple:
            first, logits, results = carry
            end = (
                jnp.sum(base_U <= base_U[first] + room, dtype=jnp.int32) - 1
            )  # as many units as there is room for
            call = self._replace(
                scalars=self.scalars._replace(chunk=jnp.stack([first, end - first]))
            )
            return end, *work(call, logits, results)

        leaves, structure = jax.tree.flatten(
            (jax.ShapeDtypeStruct((max(1, room * sizes.length),), dtype), results)
        )
        made = iter(
            self.run(
                kernels.allocate, (1,), known, changed=tuple(x for x in leaves if not _is_array(x))
            )
        )
        logits, results = jax.tree.unflatten(
            structure, [x if _is_array(x) else next(made) for x in leaves]
        )
        return jax.lax.while_loop(
            lambda carry: carry[0] < units, chunk, (jnp.int32(0), logits, results)
        )[2]


def _call(static: Static, inputs: Inputs, dynamic: Dynamic) -> Call:
    sizes = _sizes(static, inputs)
    limit = sizes.L if sizes.S else 0
    reach_H = reach(inputs.span_H, static.ramp, static.first_distance, limit).astype(jnp.int32)
    base_U = jnp.cumsum(jnp.tile(sizes.width(reach_H), sizes.B))
    seed = jax.lax.bitcast_convert_type(dynamic.dropout_seed.astype(jnp.uint32), jnp.int32)
    scalars = Scalars(
        chunk=jnp.array([0, sizes.B * sizes.H], jnp.int32),
        base_U=jnp.concatenate([jnp.zeros(1, jnp.int32), base_U.astype(jnp.int32)]),
        reach_H=reach_H,
        span_H=inputs.span_H.astype(jnp.float32),
        query_start_B=dynamic.query_start_B,
        key_start_B=dynamic.key_start_B,
        numbers=jnp.stack([seed, dynamic.row_offset, dynamic.head_offset]).astype(jnp.int32),
    )
    return Call(static, sizes, scalars)


def _flat(inputs: Inputs) -> Inputs:
    """The arrays of all inputs but the spans in rows and columns, as the kernels read them."""
    query, position_query, key, value, *others, span_H = inputs
    heads = (_heads_in_columns(x_BXHK) for x_BXHK in (query, position_query, key, value))
    return Inputs._make((*heads, *map(_rows, others), span_H))


def _attention_forward(static: Static, inputs: Inputs, dynamic: Dynamic):
    inputs = forbid_second_derivative(
        inputs
    )  # a second derivative would enter the kernels here, which have none
    call, flat = _call(static, inputs, dynamic), _flat(inputs)
    sizes, grid = call.sizes, call.query_grid()
    context = (
        flat.query_BTHK,
        flat.key_BSHK,
        flat.value_BSHK,
        flat.persistent_key_HNK,
        flat.persistent_value_HNK,
    )

    def chunk(call: Call, logits: Array, results: tuple) -> tuple:
        positions = (flat.position_query_BTHK, flat.position_HLK)
        (logits,) = call.run(kernels.logits_by_position, grid, *positions, changed=(logits,))
        return logits, call.run(kernels.forward, grid, *context, logits, changed=results)

    statistic = jax.ShapeDtypeStruct((sizes.B * sizes.H * sizes.T,), jnp.float32)
    results = (_like(flat.query_BTHK), statistic, statistic)
    out_XE, lse, mass = call.for_each_chunk(
        inputs.query_BTHK.dtype, chunk, results, known=flat.query_BTHK
    )
    out_BTHK, lse = name_for_remat(out_XE.reshape(inputs.query_BTHK.shape), lse)
    mass_BHT = mass.reshape(sizes.B, sizes.H, sizes.T)
    return (out_BTHK, mass_BHT.transpose(0, 2, 1)), (inputs, out_BTHK, lse, dynamic)


def _attention_backward(static: Static, residuals: tuple, cotangents: tuple):
    (inputs, out_BTHK, lse, d_out_BTHK), dynamic = (
        forbid_second_derivative((*residuals[:3], cotangents[0])),
        residuals[3],
    )
    call, flat, d_out = _call(static, inputs, dynamic), _flat(inputs), _heads_in_columns(d_out_BTHK)
    sizes = call.sizes
    delta_BTH = jnp.sum(d_out_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1)
    given = (d_out, lse, delta_BTH.transpose(0, 2, 1).reshape(-1))
    query, position_query, key, value, position, *pairs, _ = flat
    by_unit, by_distance = (
        (PROGRAMS, sizes.B * sizes.H),
        (max(PLACES, pl.cdiv(sizes.L, sizes.key_tile)), sizes.H),
    )
    # two sums in registers leave room for few queries
    few = dataclasses.replace(sizes, query_tile=min(sizes.query_tile, static.tiles.few))

    def chunk(call: Call, logits: Array, results: tuple) -> tuple:
        d_keys, d_queries, sums = results
        grid = call.query_grid()
        (logits,) = call.run(
            kernels.logits_by_position, grid, position_query, position, changed=(logits,)
        )
        with_few = call._replace(sizes=few)
        changed = with_few.run(
            kernels.key_gradients, by_unit, query, key, value, *given, changed=(*d_keys, logits)
        )
        d_keys, logits = changed[:-1], changed[-1]
        operands = (query, key, position, *pairs, *given, logits)
        d_queries = call.run(kernels.query_gradients, grid, *operands, changed=d_queries)
        sums = call.run(
            kernels.position_gradients, by_distance, position_query, logits, changed=sums
        )
        return logits, (d_keys, d_queries, sums)

    d_span_UP = jax.ShapeDtypeStruct((sizes.B * sizes.H, PROGRAMS), jnp.float32)
    d_queries = (_like(query),) * (1 if static.one_query else 2)
    sums = (jnp.zeros((math.prod(by_distance) * sizes.key_tile, sizes.K), jnp.float32),)
    (d_key, d_value, d_span), d_queries, sums = call.for_each_chunk(
        query.dtype, chunk, ((_like(key), _like(value), d_span_UP), d_queries, sums), known=lse
    )
    table_XK = jax.ShapeDtypeStruct((sizes.H * max(1, sizes.L), sizes.K), jnp.float32)
    # one tile more than L has: those of the distances beyond a head's reach begin right behind it,
    # wherever that is
    (d_table_XK,) = call.run(
        kernels.position_sums,
        (pl.cdiv(sizes.L, sizes.key_tile) + 1, sizes.H),
        *sums,
        changed=(table_XK,),
    )
    d_position_HLK = d_table_XK[: sizes.H * sizes.L].reshape(sizes.H, sizes.L, sizes.K)
    gradients = (
        *(d_query.reshape(inputs.query_BTHK.shape) for d_query in d_queries),
        *[jnp.zeros_like(inputs.query_BTHK)] * (2 - len(d_queries)),
        d_key[: sizes.B * sizes.S].reshape(inputs.key_BSHK.shape),
        d_value[: sizes.B * sizes.S].reshape(inputs.value_BSHK.shape),
        d_position_HLK.sum(0, keepdims=True) if sizes.shared else d_position_HLK,
        *_persistent_gradients(call, inputs, (query, *pairs, *given)),
        d_span.reshape(sizes.B, sizes.H, PROGRAMS).sum((0, 2)) / static.ramp,
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), Inputs._make(gradients), inputs), None


def _persistent_gradients(
    call: Call, inputs: Inputs, operands: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Gradients of persistent keys and values, from sums over groups of rows."""
    sizes, pairs = call.sizes, (inputs.persistent_key_HNK, inputs.persistent_value_HNK)
    if not sizes.N:
        return pairs
    groups = min(GROUPS, sizes.B)
    sums_XK = jax.ShapeDtypeStruct((groups * sizes.H * sizes.N, sizes.K), jnp.float32)
    grid = (pl.cdiv(sizes.N, sizes.key_tile), sizes.H, groups)
    sums = call.run(kernels.persistent_gradients, grid, *operands, changed=(sums_XK, sums_XK))
    return tuple(
        sum_XK.reshape(groups, *x_HNK.shape).sum(0)
        for sum_XK, x_HNK in zip(sums, pairs, strict=True)
    )


_attention.defvjp(_attention_forward, _attention_backward)
