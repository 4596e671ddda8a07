"""The operation as fused GPU kernels in Pallas (Triton): calls, grids and chunks.

Triton cannot skew a tile in registers, which relative positions need. The logits by position are
therefore one plain product per head row (one head of one row of the batch), written to a scratch
array of bounded size and read along its diagonals. The backward pass recomputes the logits; their
gradients replace them in the scratch array.

Chunks. Kept whole, the scratch array would have B H T L numbers. Head rows go through it in chunks
instead: each takes as much of it as its span can reach, and a chunk is as many of them as fit, so
that short spans need one chunk, and full ones many. How many is known only at run time: a
`while_loop` runs the kernels of a chunk with a grid for all head rows, of which those outside the
chunk return at once. `test_chunks` in tests/attention/test_pallas_gpu.py holds it.

Where to read on: `head_row` (which keys a tile of queries can reach, with a drawing), `memory`
(loads and stores), `forward` and `backward` (the kernels). On a CPU they run interpreted; on AMD's
GPUs they are compiled but were never run.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width, E all heads side by side, U head row, G group of rows, P program of a head row, X and Y
any.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from allattn.attention.autodiff import forbid_second_derivative, name_for_remat
from allattn.attention.contract import (
    Dynamic,
    Inputs,
    Static,
    refuse_what_kernels_lack,
    seed_and_offsets,
)
from allattn.attention.gpu import backward, forward
from allattn.attention.gpu.head_row import Scalars, Sizes
from allattn.attention.gpu.memory import Refs
from allattn.attention.span import reach

Array = jax.Array

# Bytes of the scratch array.
SCRATCH = 2**28
# Programs that share one head row's tiles of keys.
PROGRAMS = 16
# Partial sums of the position table's gradient, of each head; at least one per tile of distances.
PARTIAL_SUMS = 32
# Groups of rows, whose gradients of the persistent pairs are added at the end.
GROUPS = 4


def all_attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    """The operation of `allattn.attention.all_attention`, whose docstring gives the arguments.

    Returns:
      out_BTHK in the query's dtype and mass_BTH in float32.

    Raises:
      NotImplementedError: there is a span_epsilon, the dtype is neither float32 nor bfloat16, or
        the logits by position of one head of one row do not fit into the scratch array.
    """
    refuse_what_kernels_lack("pallas_gpu", static, inputs)
    sizes = _sizes(static, inputs)
    needed = sizes.length * sizes.width(sizes.L) * inputs.query_BTHK.dtype.itemsize
    if needed > SCRATCH:
        raise NotImplementedError(
            f"pallas_gpu: expected at most {SCRATCH} bytes for the logits by position of one head "
            f"of one row, found T x L = {sizes.T} x {sizes.L}, which needs {needed}"
        )
    return _attention(static, inputs, dynamic)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(static: Static, inputs: Inputs, dynamic: Dynamic) -> tuple[Array, Array]:
    results, _ = _attention_forward(static, inputs, dynamic)
    return results


def _sizes(static: Static, inputs: Inputs) -> Sizes:
    B, T, H, K = inputs.query_BTHK.shape
    # Small blocks are one tile, of at least the 16 rows that a matrix unit takes.
    query_tile = min(static.tiles.queries, max(16, pl.next_power_of_2(T)))
    return Sizes(
        B=B,
        T=T,
        S=inputs.key_BSHK.shape[1],
        L=inputs.position_HLK.shape[1],
        N=inputs.persistent_key_HNK.shape[1],
        H=H,
        K=K,
        query_tile=query_tile,
        key_tile=static.tiles.keys,
        shared=inputs.position_HLK.shape[0] == 1,
        length=pl.cdiv(T, query_tile) * query_tile,
    )


# --- arrays as the kernels read them --------------------------------------------------------------


def _rows(x: Array) -> Array:
    """The last dimension in columns, the others in rows."""
    # No row at all cannot be passed to a kernel.
    if not x.size:
        return jnp.zeros((1, x.shape[-1]), x.dtype)
    return x.reshape(-1, x.shape[-1])


def _heads_in_columns(x_BXHK: Array) -> Array:
    """(B, X, H, K) as (B X, H K), which is no copy."""
    B, X, H, K = x_BXHK.shape
    return _rows(x_BXHK.reshape(B * X, H * K))


def _flat(inputs: Inputs) -> Inputs:
    """The inputs in rows and columns; the spans as they are, and offsets of pairs in one row."""
    bias_X = None
    if inputs.persistent_bias_HN is not None:
        bias_X = inputs.persistent_bias_HN.astype(jnp.float32).reshape(-1)
    return Inputs(
        query_BTHK=_heads_in_columns(inputs.query_BTHK),
        position_query_BTHK=_heads_in_columns(inputs.position_query_BTHK),
        key_BSHK=_heads_in_columns(inputs.key_BSHK),
        value_BSHK=_heads_in_columns(inputs.value_BSHK),
        position_HLK=_rows(inputs.position_HLK),
        persistent_key_HNK=_rows(inputs.persistent_key_HNK),
        persistent_value_HNK=_rows(inputs.persistent_value_HNK),
        span_H=inputs.span_H,
        persistent_bias_HN=bias_X,
    )


def _is_array(x: Array | jax.ShapeDtypeStruct) -> bool:
    return not isinstance(x, jax.ShapeDtypeStruct)


def _like(x: Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


# --- calls and chunks -----------------------------------------------------------------------------


class Call(NamedTuple):
    """What all kernels of one call of the operation share."""

    static: Static
    sizes: Sizes
    scalars: Scalars

    def run(self, kernel: Callable, grid: tuple[int, ...], inputs: Any, outputs: Any) -> Any:
        """Call a kernel: compiled for a GPU, interpreted elsewhere.

        Args:
          kernel: function of (static, sizes, refs), with refs as in `memory.Refs`; its name is that
            of the compiled kernel.
          grid: programs along every axis.
          inputs: arrays, in the structure that the kernel expects.
          outputs: the same: either arrays, which the kernel updates, or ShapeDtypeStructs of
            arrays that it writes as a whole.

        Returns:
          The outputs after the call, in the same structure.
        """
        updates = all(map(_is_array, jax.tree.leaves(outputs)))
        before = outputs if updates else ()
        # Pallas passes references without structure, in the order of operands and outputs.
        operands = jax.tree.leaves((self.scalars, inputs, before))
        references = jax.tree.structure(Refs(self.scalars, inputs, before, outputs))
        shapes = [_like(x) for x in jax.tree.leaves(outputs)]

        # An array that is updated is an operand, whose memory the output takes.
        updated = len(jax.tree.leaves(before))
        first = len(operands) - updated
        aliases = {first + i: i for i in range(updated)}

        def call(platform: str, *operands: Array) -> list[Array]:
            sizes = dataclasses.replace(self.sizes, platform=platform)

            def with_names(*refs: Any) -> None:
                kernel(self.static, sizes, jax.tree.unflatten(references, refs))

            # AMD's GPUs have less memory for stages.
            stages = self.static.tiles.stages if platform == "cuda" else None
            return pl.pallas_call(
                with_names,
                grid=grid,
                out_shape=shapes,
                input_output_aliases=aliases,
                compiler_params=plgpu.CompilerParams(
                    num_warps=self.static.tiles.warps, num_stages=stages
                ),
                interpret=not platform,
                name=kernel.__name__,
            )(*operands)

        results = jax.lax.platform_dependent(
            *operands,
            cuda=functools.partial(call, "cuda"),
            rocm=functools.partial(call, "rocm"),
            default=functools.partial(call, ""),
        )
        return jax.tree.unflatten(jax.tree.structure(outputs), results)

    def query_grid(self) -> tuple[int, int]:
        """A program for every tile of queries of every head row."""
        return self.sizes.length // self.sizes.query_tile, self.sizes.B * self.sizes.H

    def for_each_chunk(self, dtype: Any, work: Callable, results: Any, known: Array) -> Any:
        """Carry results through chunks of head rows whose logits fit into the scratch array.

        Args:
          dtype: of the scratch array.
          work: maps (call, logits, results) to the new logits and results; `call` knows the chunk.
          results: arrays in any structure, or ShapeDtypeStructs, for which arrays are allocated.
          known: an array. Nothing is allocated before it is known, so that the scratch arrays of a
            forward and a backward pass never exist at once.

        Returns:
          The results after the last chunk.
        """
        sizes = self.sizes
        base_U = self.scalars.base_U
        head_rows = sizes.B * sizes.H
        # Rows of `length` numbers: what all need, or what there is room for.
        needed = head_rows * sizes.width(sizes.L)
        room = min(needed, SCRATCH // jnp.dtype(dtype).itemsize // sizes.length)

        def unfinished(carry: tuple) -> Array:
            first, _, _ = carry
            return first < head_rows

        def chunk(carry: tuple) -> tuple:
            first, logits, results = carry
            # As many head rows as there is room for.
            end = jnp.sum(base_U <= base_U[first] + room, dtype=jnp.int32) - 1
            scalars = self.scalars._replace(chunk=jnp.stack([first, end - first]))
            logits, results = work(self._replace(scalars=scalars), logits, results)
            return end, logits, results

        scratch = jax.ShapeDtypeStruct((max(1, room * sizes.length),), dtype)
        logits, results = self._allocate((scratch, results), known)
        carry = (jnp.int32(0), logits, results)
        _, _, results = jax.lax.while_loop(unfinished, chunk, carry)
        return results

    def _allocate(self, arrays: Any, known: Array) -> Any:
        """The same structure with an array, not written yet, for every ShapeDtypeStruct."""
        missing = [x for x in jax.tree.leaves(arrays) if not _is_array(x)]
        allocated = iter(self.run(forward.allocate, (1,), known, missing))

        def fill(x: Any) -> Array:
            return x if _is_array(x) else next(allocated)

        return jax.tree.map(fill, arrays)


def _call(static: Static, inputs: Inputs, dynamic: Dynamic) -> Call:
    sizes = _sizes(static, inputs)

    # How much of the scratch array each head row takes.
    limit = sizes.L if sizes.S else 0
    reach_H = reach(inputs.span_H, static.ramp, static.first_distance, limit).astype(jnp.int32)
    base_U = jnp.cumsum(jnp.tile(sizes.width(reach_H), sizes.B))

    scalars = Scalars(
        chunk=jnp.array([0, sizes.B * sizes.H], jnp.int32),
        base_U=jnp.concatenate([jnp.zeros(1, jnp.int32), base_U.astype(jnp.int32)]),
        reach_H=reach_H,
        span_H=inputs.span_H.astype(jnp.float32),
        query_start_B=dynamic.query_start_B,
        key_start_B=dynamic.key_start_B,
        seed_and_offsets=seed_and_offsets(dynamic),
    )
    return Call(static, sizes, scalars)


# --- forward --------------------------------------------------------------------------------------


def _attention_forward(
    static: Static, inputs: Inputs, dynamic: Dynamic
) -> tuple[tuple[Array, Array], tuple]:
    # A second derivative would enter the kernels here, which have none.
    inputs = forbid_second_derivative(inputs)
    call = _call(static, inputs, dynamic)
    flat = _flat(inputs)
    sizes = call.sizes
    grid = call.query_grid()

    # The kernels of one chunk of head rows.
    def chunk(
        call: Call, logits: Array, results: forward.ForwardOutputs
    ) -> tuple[Array, forward.ForwardOutputs]:
        logits = _logits_by_position(call, flat, logits)
        context = forward.ForwardInputs(
            query=flat.query_BTHK,
            key=flat.key_BSHK,
            value=flat.value_BSHK,
            persistent_key=flat.persistent_key_HNK,
            persistent_value=flat.persistent_value_HNK,
            logits=logits,
            persistent_bias=flat.persistent_bias_HN,
        )
        return logits, call.run(forward.forward, grid, context, results)

    # All chunks; every number of the results is written by one of them.
    statistic = jax.ShapeDtypeStruct((sizes.B * sizes.H * sizes.T,), jnp.float32)
    results = forward.ForwardOutputs(out=_like(flat.query_BTHK), lse=statistic, mass=statistic)
    dtype = inputs.query_BTHK.dtype
    results = call.for_each_chunk(dtype, chunk, results, known=flat.query_BTHK)

    # What the backward pass starts from is named, so that rematerialisation may keep it.
    out_BTHK = results.out.reshape(inputs.query_BTHK.shape)
    out_BTHK, lse = name_for_remat(out_BTHK, results.lse)
    mass_BHT = results.mass.reshape(sizes.B, sizes.H, sizes.T)
    residuals = (inputs, out_BTHK, lse, dynamic)
    return (out_BTHK, mass_BHT.transpose(0, 2, 1)), residuals


def _logits_by_position(call: Call, flat: Inputs, logits: Array) -> Array:
    """The scratch array with the logits by position of a chunk."""
    inputs = forward.PositionLogitsInputs(flat.position_query_BTHK, flat.position_HLK)
    outputs = forward.PositionLogitsOutputs(logits)
    return call.run(forward.logits_by_position, call.query_grid(), inputs, outputs).logits


# --- backward -------------------------------------------------------------------------------------


class PerQuery(NamedTuple):
    """What the backward pass knows of every query, as the kernels read it."""

    # (B T, H K)
    d_out: Array
    # (B H T): log-sum-exp, and out . d_out
    lse: Array
    delta: Array


class Gradients(NamedTuple):
    """What the chunks of a backward pass write their part of, or add to."""

    # without the scratch array
    keys: backward.KeyGradientOutputs
    queries: backward.QueryGradientOutputs
    positions: backward.PositionSums


def _attention_backward(
    static: Static, residuals: tuple, cotangents: tuple[Array, Array]
) -> tuple[Inputs, None]:
    # The share of persistent pairs has no gradient.
    inputs, out_BTHK, lse, dynamic = residuals
    d_out_BTHK, _ = cotangents
    differentiable = (inputs, out_BTHK, lse, d_out_BTHK)
    inputs, out_BTHK, lse, d_out_BTHK = forbid_second_derivative(differentiable)

    # What the kernels read.
    call = _call(static, inputs, dynamic)
    flat = _flat(inputs)
    d_out = _heads_in_columns(d_out_BTHK)
    delta_BTH = jnp.sum(d_out_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1)
    per_query = PerQuery(d_out, lse, delta_BTH.transpose(0, 2, 1).reshape(-1))

    gradients = _gradients_in_chunks(call, flat, per_query)
    return _in_shape_of(inputs, call, flat, per_query, gradients), None


def _gradients_in_chunks(call: Call, flat: Inputs, per_query: PerQuery) -> Gradients:
    """Gradients of keys, values, spans, queries and (in partial sums) the position table."""
    sizes = call.sizes
    # At least one program and partial sum for every tile of distances.
    by_distance = (max(PARTIAL_SUMS, pl.cdiv(sizes.L, sizes.key_tile)), sizes.H)

    def chunk(call: Call, logits: Array, results: Gradients) -> tuple[Array, Gradients]:
        logits = _logits_by_position(call, flat, logits)
        # The gradients of the logits replace the logits, for the two kernels after it.
        keys = results.keys._replace(logits=logits)
        keys = _key_gradients(call, flat, per_query, keys)
        queries = _query_gradients(call, flat, per_query, keys.logits, results.queries)
        # Rows of this chunk add to the partial sums of the position table.
        inputs = backward.PositionGradientInputs(flat.position_query_BTHK, keys.logits)
        positions = call.run(backward.position_gradients, by_distance, inputs, results.positions)
        return keys.logits, Gradients(keys._replace(logits=None), queries, positions)

    # What the kernels write as a whole is not initialised; what they add to is.
    keys = backward.KeyGradientOutputs(
        d_key=_like(flat.key_BSHK),
        d_value=_like(flat.value_BSHK),
        d_span=jax.ShapeDtypeStruct((sizes.B * sizes.H, PROGRAMS), jnp.float32),
    )
    queries = backward.QueryGradientOutputs(d_query=_like(flat.query_BTHK))
    if not call.static.one_query:
        queries = queries._replace(d_position_query=_like(flat.query_BTHK))
    sums, heads = by_distance
    sums_XK = jnp.zeros((sums * heads * sizes.key_tile, sizes.K), jnp.float32)
    results = Gradients(keys, queries, backward.PositionSums(sums_XK))
    dtype = flat.query_BTHK.dtype
    return call.for_each_chunk(dtype, chunk, results, known=per_query.lse)


def _key_gradients(
    call: Call, flat: Inputs, per_query: PerQuery, keys: backward.KeyGradientOutputs
) -> backward.KeyGradientOutputs:
    """Gradients of keys and values, of the spans, and of the logits of a chunk."""
    sizes = call.sizes
    # Two sums in registers leave room for few queries.
    query_tile = min(sizes.query_tile, call.static.tiles.few)
    call = call._replace(sizes=dataclasses.replace(sizes, query_tile=query_tile))
    inputs = backward.KeyGradientInputs(
        query=flat.query_BTHK,
        key=flat.key_BSHK,
        value=flat.value_BSHK,
        d_out=per_query.d_out,
        lse=per_query.lse,
        delta=per_query.delta,
    )
    grid = (PROGRAMS, sizes.B * sizes.H)
    return call.run(backward.key_gradients, grid, inputs, keys)


def _query_gradients(
    call: Call,
    flat: Inputs,
    per_query: PerQuery,
    d_logits: Array,
    queries: backward.QueryGradientOutputs,
) -> backward.QueryGradientOutputs:
    """Gradients of the queries of a chunk."""
    inputs = backward.QueryGradientInputs(
        query=flat.query_BTHK,
        key=flat.key_BSHK,
        position=flat.position_HLK,
        persistent_key=flat.persistent_key_HNK,
        persistent_value=flat.persistent_value_HNK,
        d_out=per_query.d_out,
        lse=per_query.lse,
        delta=per_query.delta,
        d_logits=d_logits,
        persistent_bias=flat.persistent_bias_HN,
    )
    return call.run(backward.query_gradients, call.query_grid(), inputs, queries)


def _in_shape_of(
    inputs: Inputs, call: Call, flat: Inputs, per_query: PerQuery, gradients: Gradients
) -> Inputs:
    """All gradients in the shapes and dtypes of the inputs."""
    sizes = call.sizes
    keys = gradients.keys
    d_position_HLK = _position_gradient(call, gradients.positions)
    d_query_BTHK = gradients.queries.d_query.reshape(inputs.query_BTHK.shape)
    # Where one array asks keys and positions, its whole gradient is that of the first.
    if call.static.one_query:
        d_position_query_BTHK = jnp.zeros_like(inputs.query_BTHK)
    else:
        d_position_query = gradients.queries.d_position_query
        d_position_query_BTHK = d_position_query.reshape(inputs.query_BTHK.shape)
    # Without any key the arrays have one row.
    d_key_BSHK = keys.d_key[: sizes.B * sizes.S].reshape(inputs.key_BSHK.shape)
    d_value_BSHK = keys.d_value[: sizes.B * sizes.S].reshape(inputs.value_BSHK.shape)
    if sizes.shared:
        d_position_HLK = d_position_HLK.sum(0, keepdims=True)
    # Once for all chunks: these need no logits by position.
    d_pairs = _persistent_gradients(call, inputs, flat, per_query)
    # Every program has its part of a head row's span.
    d_span_BHP = keys.d_span.reshape(sizes.B, sizes.H, PROGRAMS)
    all_gradients = Inputs(
        query_BTHK=d_query_BTHK,
        position_query_BTHK=d_position_query_BTHK,
        key_BSHK=d_key_BSHK,
        value_BSHK=d_value_BSHK,
        position_HLK=d_position_HLK,
        persistent_key_HNK=d_pairs.d_key,
        persistent_value_HNK=d_pairs.d_value,
        persistent_bias_HN=d_pairs.d_bias,
        span_H=d_span_BHP.sum((0, 2)) / call.static.ramp,
    )
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), all_gradients, inputs)


def _position_gradient(call: Call, sums: backward.PositionSums) -> Array:
    """The gradient of the position table of every head, as (H, L, K), from its partial sums."""
    sizes = call.sizes
    table_XK = jax.ShapeDtypeStruct((sizes.H * max(1, sizes.L), sizes.K), jnp.float32)
    # One tile more than L has: those of the distances beyond a head's reach begin right behind it,
    # wherever that is.
    grid = (pl.cdiv(sizes.L, sizes.key_tile) + 1, sizes.H)
    outputs = call.run(backward.position_sums, grid, sums, backward.TableOutputs(table_XK))
    return outputs.d_table[: sizes.H * sizes.L].reshape(sizes.H, sizes.L, sizes.K)


def _persistent_gradients(
    call: Call, inputs: Inputs, flat: Inputs, per_query: PerQuery
) -> backward.PersistentGradientOutputs:
    """Gradients of the pairs in the shapes of the inputs, from sums over groups of rows."""
    sizes = call.sizes
    pairs = backward.PersistentGradientOutputs(
        inputs.persistent_key_HNK, inputs.persistent_value_HNK, inputs.persistent_bias_HN
    )
    if not sizes.N:
        return pairs
    operands = backward.PersistentGradientInputs(
        query=flat.query_BTHK,
        persistent_key=flat.persistent_key_HNK,
        persistent_value=flat.persistent_value_HNK,
        d_out=per_query.d_out,
        lse=per_query.lse,
        delta=per_query.delta,
        persistent_bias=flat.persistent_bias_HN,
    )
    # A program for every tile of pairs and group of rows; the groups are added here.
    groups = min(GROUPS, sizes.B)
    # In rows as the kernel has them, a group after the other.
    outputs = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((groups * sizes.H * sizes.N, *x.shape[2:]), jnp.float32),
        pairs,
    )
    grid = (pl.cdiv(sizes.N, sizes.key_tile), sizes.H, groups)
    sums = call.run(backward.persistent_gradients, grid, operands, outputs)
    return jax.tree.map(lambda sum_X, x: sum_X.reshape(groups, *x.shape).sum(0), sums, pairs)


_attention.defvjp(_attention_forward, _attention_backward)
