"""The one expensive operation: joint attention over context and persistent key-value pairs.

`all_attention` checks its arguments, fills in the defaults and calls one of four implementations:
`reference` is the definition, in whole arrays; `xla` runs anywhere; `tpu` and `gpu` are fused
kernels. Read in this order: the docstring of `all_attention`, `contract` (what an implementation
receives, and the band of queries and keys as a picture), `reference`, then the others.

To add an implementation, do this:

1. Write a package beside `xla` with `all_attention(static, inputs, dynamic)`, as `contract` has
   them, that returns out_BTHK in the query's dtype and mass_BTH in float32. Raise
   NotImplementedError, with the implementation's name, for what it does not support.
2. Give it a backward pass with `jax.custom_vjp`: pass what the forward pass saves through
   `autodiff.name_for_remat`, and what the backward pass starts from through
   `autodiff.forbid_second_derivative`. Draw dropout from `dropout`, take m(d) from `span`.
3. Add its tile sizes to `tuning`: a class and a row of `DEFAULTS`, and its class to
   `contract.Tiles`.
4. Add its name to `IMPLEMENTATIONS` and its package to `_FUSED` below, and its name to
   `IMPLEMENTATIONS` in allattn/config_checks.py, so that a configuration may give it. If it is the
   fastest somewhere, say so in `best_here`.
5. Add small tiles to `SMALL_TILES` in tests/support/attention_cases.py and run
   tests/attention/test_attention.py, which takes its implementations from `IMPLEMENTATIONS`: values
   and gradients within 1e-5 of the definition in float64, dropout equal, second derivatives
   refused. Then measure with `python -m benchmarks.attention`.

Dimension key: B batch, T query position in the block, S context key, L distance, N persistent pair,
H head, K head width.
"""

import math
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allattn.attention import gpu, reference, tpu, tuning, xla
from allattn.attention.contract import pack

Array = jax.Array

# The names that a configuration may give, and the packages behind all of them but the definition.
IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
_FUSED: dict[str, types.ModuleType] = {"xla": xla, "pallas_tpu": tpu, "pallas_gpu": gpu}
# The least finite offset of a pair.
LEAST_BIAS = -1e20


def all_attention(
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    *,
    position_HLK: Array,
    position_query_BTHK: Array | None = None,
    first_distance: int = 1,
    persistent_key_HNK: Array | None = None,
    persistent_value_HNK: Array | None = None,
    persistent_bias_HN: Array | None = None,
    span_H: Array | None = None,
    ramp: int = 32,
    query_start: Array | int | None = None,
    key_start: Array | int = 0,
    dropout_rate: float = 0.0,
    dropout_seed: Array | int | None = None,
    row_offset: Array | int = 0,
    head_offset: Array | int = 0,
    span_epsilon: float = 0.0,
    scale: float | None = None,
    return_persistent_mass: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """One softmax over the keys within reach of each query and the head's persistent pairs.

    Query t sits at key index query_start + t, key j at distance d = query_start + t - j from it.
    The pair counts when first_distance <= d < first_distance + L and key_start <= j < S. Its weight
    is m(d) exp(scale (q.k_j + q'.p_d)), a persistent pair's exp(scale q.k_n + b_n), all divided by
    their sum (Sukhbaatar et al. 2019, arXiv 1907.01470, eq. 5 to 9, which leave b out; m(d) from
    arXiv 1905.07799, eq. 4). With no pair at all, output and gradients are 0. A pair's exp(logit)
    over the sum, the weight's derivative with regard to m, counts as 1e5 at most (it is larger only
    where m is almost 0).

    Args:
      query_BTHK: queries; float32, bfloat16 or (under x64) float64, which every other array shares.
      key_BSHK: context keys, oldest first.
      value_BSHK: context values.
      position_HLK: position keys, row i for distance first_distance + i; its H may be 1, shared by
        all heads.
      position_query_BTHK: queries for the position keys (Transformer-XL); None: the same queries.
      first_distance: 1 if the current token is not attended, 0 if it is.
      persistent_key_HNK: persistent keys, used as given; None: no pairs.
      persistent_value_HNK: persistent values, used as given.
      persistent_bias_HN: float32 or float64, added to the pairs' logits after the scale; -inf
        removes a pair, and any other number below -1e20 counts as that; None: 0.
      span_H: learned spans in tokens, float32, in [0, L]; None: all L distances count fully.
      ramp: length R of the span's soft end in tokens; a whole number of any type.
      query_start: int32, scalar or (B,), may be traced; None: S - T.
      key_start: int32, scalar or (B,), may be traced; keys before it do not exist.
      dropout_rate: probability of dropping a weight after normalisation.
      dropout_seed: integer that, with the weight's global place, decides what is dropped.
      row_offset: global index of row 0.
      head_offset: global index of head 0.
      span_epsilon: the divisor of the weights gains so much of the sum without m, over the pairs
        and the distances that the papers' code keeps (`span.kept_distances` of the largest span
        here): 1e-8 in their models. Without spans it has no effect.
      scale: factor of every logit; None: 1/sqrt(K).
      return_persistent_mass: also return the share of each query's weight that lies on persistent
        pairs.
      implementation: "reference", "xla", "pallas_tpu" or "pallas_gpu" (slowly interpreted
        elsewhere); None: the best here.

    Returns:
      out_BTHK in the query's dtype and, if asked for, mass_BTH in float32, before dropout and
      without a gradient.

    Raises:
      ValueError: an argument has the wrong shape, dtype or range.
      NotImplementedError: the named implementation does not support the case.

    Example:
      >>> query_BTHK = key_BSHK = value_BSHK = jnp.ones((1, 4, 2, 8))
      >>> position_HLK = jnp.zeros((2, 3, 8))
      >>> out_BTHK = all_attention(query_BTHK, key_BSHK, value_BSHK, position_HLK=position_HLK)
      >>> out_BTHK[0, :, 0, 0].tolist()  # the first query has no earlier key
      [0.0, 1.0, 1.0, 1.0]
    """
    # Shapes first: everything after reads sizes from them.
    _check_shapes(query_BTHK, key_BSHK, value_BSHK, position_HLK, position_query_BTHK)
    B, T, _, K = query_BTHK.shape
    S = key_BSHK.shape[1]
    _check_numbers(first_distance, dropout_rate, dropout_seed)
    pairs = _pairs(query_BTHK, persistent_key_HNK, persistent_value_HNK, persistent_bias_HN)
    spans = _spans(query_BTHK, position_HLK, span_H, ramp, span_epsilon)

    # Fill in the defaults. Whether some were left out decides which code an implementation builds.
    whole_context = query_start is None and isinstance(key_start, int) and key_start == 0
    hints = {"whole_context": whole_context, "one_query": position_query_BTHK is None}
    if position_query_BTHK is None:
        position_query_BTHK = query_BTHK
    if query_start is None:
        query_start = S - T
    if dropout_seed is None:
        dropout_seed = 0
    if scale is None:
        scale = K**-0.5
    if not implementation:
        implementation = best_here(query_BTHK.dtype, spans["span_epsilon"])

    # What every implementation receives, the definition too: plain numbers if they are static,
    # arrays if they are known only at run time.
    arguments: dict[str, Any] = {
        "position_HLK": position_HLK,
        "position_query_BTHK": position_query_BTHK,
        "first_distance": int(first_distance),
        **pairs,
        **spans,
        "query_start_B": _per_row("query_start", query_start, B),
        "key_start_B": _per_row("key_start", key_start, B),
        "dropout_rate": float(dropout_rate),
        "dropout_seed": jnp.asarray(dropout_seed).astype(jnp.uint32),
        "row_offset": jnp.asarray(row_offset, jnp.int32),
        "head_offset": jnp.asarray(head_offset, jnp.int32),
        "scale": float(scale),
    }
    inputs = (query_BTHK, key_BSHK, value_BSHK)
    out_BTHK, mass_BTH = _run(implementation, inputs, arguments, hints)
    return (out_BTHK, mass_BTH) if return_persistent_mass else out_BTHK


def _run(
    implementation: str,
    inputs: tuple[Array, Array, Array],
    arguments: dict[str, Any],
    hints: dict[str, bool],
) -> tuple[Array, Array]:
    """Output and persistent mass of an implementation.

    Args:
      implementation: its name.
      inputs: queries, keys and values.
      arguments: all others, as the definition takes them.
      hints: what those that are fused may rely on besides.

    Raises:
      NotImplementedError: there is no such implementation.
    """
    if implementation == "reference":
        return reference.all_attention(*inputs, **arguments)
    # The name comes from a configuration or a caller.
    if implementation not in _FUSED:
        raise NotImplementedError(
            f"implementation: expected one of {IMPLEMENTATIONS}, found {implementation!r}"
        )
    # Tile sizes follow from the sizes of the call.
    query_BTHK, _, _ = inputs
    _, T, _, K = query_BTHK.shape
    L = arguments["position_HLK"].shape[1]
    N = arguments["persistent_key_HNK"].shape[1]
    tiles = tuning.tiles(implementation, T=T, L=L, N=N, K=K)
    packed = pack(*inputs, **{**arguments, **hints}, tiles=tiles)
    return _FUSED[implementation].all_attention(*packed)


def best_here(dtype: Any, span_epsilon: float = 0.0) -> str:
    """The fastest implementation for the machine that the code is traced for."""
    # The kernels know these two dtypes, and no other normaliser.
    if span_epsilon or dtype not in (jnp.float32, jnp.bfloat16):
        return "xla"
    # Triton compiles for Ampere (8.0) and later: not for a T4 (7.5). AMD's are named otherwise.
    capability = getattr(jax.devices()[0], "compute_capability", "")
    major, _, _ = capability.partition(".")
    if major.isdecimal() and int(major) < 8:
        return "xla"
    platform, _ = tuning.device()
    return {"tpu": "pallas_tpu", "gpu": "pallas_gpu"}.get(platform, "xla")


# --- arguments -----------------------------------------------------------------------------------


def _whole_tokens(name: str, number: Any) -> int:
    """A whole number of any type (4, 4.0, numpy's 4) as Python's, for it is static."""
    try:
        whole = int(number)
    except (TypeError, ValueError, OverflowError):  # an array that is traced, NaN, infinity
        whole = None
    if whole is None or whole != number:
        raise ValueError(f"{name}: expected a whole number of tokens, found {number}")
    return whole


def _per_row(name: str, start: Array | int, rows: int) -> Array:
    """A start for every row, from one for all or one each."""
    start = jnp.asarray(start, jnp.int32)
    if start.shape not in ((), (rows,)):
        raise ValueError(f"{name}: expected a scalar or shape ({rows},), found shape {start.shape}")
    return jnp.broadcast_to(start, (rows,))


# --- checks: each names the argument, what was expected and what was found -----------------------


def _expect(name: str, array: Array, shape: tuple[int, ...], dtype: Any) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {array.shape}")
    if array.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype} as the query has, found {array.dtype}")


def _check_rank(**arrays: Array) -> None:
    """An array has as many dimensions as its name's suffix has letters."""
    for name, array in arrays.items():
        # "key_BSHK" has four.
        rank = len(name.rpartition("_")[2])
        if array.ndim != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, found shape {array.shape}")


def _check_shapes(
    query_BTHK: Array,
    key_BSHK: Array,
    value_BSHK: Array,
    position_HLK: Array,
    position_query_BTHK: Array | None,
) -> None:
    _check_rank(
        query_BTHK=query_BTHK, key_BSHK=key_BSHK, value_BSHK=value_BSHK, position_HLK=position_HLK
    )
    B, _, H, K = query_BTHK.shape
    dtype = query_BTHK.dtype
    # The query decides about batch, heads, width and dtype; all else is held against it.
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"query_BTHK: expected a floating-point dtype, found {dtype}")
    S = key_BSHK.shape[1]
    _expect("key_BSHK", key_BSHK, (B, S, H, K), dtype)
    _expect("value_BSHK", value_BSHK, (B, S, H, K), dtype)
    # The table may have one head, shared by all.
    heads = position_HLK.shape[0]
    if heads not in (1, H):
        raise ValueError(f"position_HLK: expected 1 or {H} heads, found {heads}")
    _expect("position_HLK", position_HLK, (heads, position_HLK.shape[1], K), dtype)
    if position_query_BTHK is not None:
        _expect("position_query_BTHK", position_query_BTHK, query_BTHK.shape, dtype)


def _pairs(
    query_BTHK: Array,
    persistent_key_HNK: Array | None,
    persistent_value_HNK: Array | None,
    persistent_bias_HN: Array | None,
) -> dict[str, Array | None]:
    """The arguments that concern persistent pairs; no pairs are N = 0 pairs."""
    _, _, H, K = query_BTHK.shape
    dtype = query_BTHK.dtype
    if persistent_key_HNK is None and persistent_value_HNK is None:
        if persistent_bias_HN is not None:
            raise ValueError(
                "persistent_bias_HN: expected None without pairs, found shape "
                f"{persistent_bias_HN.shape}"
            )
        persistent_key_HNK = jnp.zeros((H, 0, K), dtype)
        persistent_value_HNK = persistent_key_HNK
    if persistent_key_HNK is None:
        raise ValueError("persistent_key_HNK: expected an array beside its partner, found None")
    if persistent_value_HNK is None:
        raise ValueError("persistent_value_HNK: expected an array beside its partner, found None")
    # Any number of pairs is right, but keys and values have the same. -1 fits no shape.
    N = -1
    if persistent_key_HNK.ndim == 3:
        N = persistent_key_HNK.shape[1]
    _expect("persistent_key_HNK", persistent_key_HNK, (H, N, K), dtype)
    _expect("persistent_value_HNK", persistent_value_HNK, (H, N, K), dtype)
    return {
        "persistent_key_HNK": persistent_key_HNK,
        "persistent_value_HNK": persistent_value_HNK,
        "persistent_bias_HN": _pair_bias(persistent_bias_HN, (H, N)),
    }


def _pair_bias(bias_HN: Array | None, shape: tuple[int, int]) -> Array | None:
    """What is added to the logits of pairs, of this shape, as far as it makes a difference."""
    if bias_HN is None:
        return None
    if bias_HN.shape != shape:
        raise ValueError(f"persistent_bias_HN: expected shape {shape}, found {bias_HN.shape}")
    if bias_HN.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"persistent_bias_HN: expected dtype float32 or float64, found {bias_HN.dtype}"
        )
    if bias_HN.size == 0:
        return None
    # What removes a pair is -inf alone. Implementations have finite numbers of their own for what
    # does not count, and any real one lies far above them; its gradient is its own.
    finite_HN = jnp.where(jnp.isneginf(bias_HN), 0, bias_HN)
    least_HN = LEAST_BIAS + (finite_HN - jax.lax.stop_gradient(finite_HN))
    return jnp.where(finite_HN < LEAST_BIAS, least_HN, bias_HN)


def _spans(
    query_BTHK: Array, position_HLK: Array, span_H: Array | None, ramp: Any, span_epsilon: Any
) -> dict[str, Any]:
    """The arguments that concern spans."""
    H = query_BTHK.shape[2]
    L = position_HLK.shape[1]
    if not 0 <= span_epsilon < math.inf:
        raise ValueError(f"span_epsilon: expected a number, at least 0, found {span_epsilon}")
    # All distances count fully, and the two sums of the normaliser are one.
    if span_H is None:
        return {"span_H": None, "ramp": ramp, "span_epsilon": 0.0}
    ramp = _whole_tokens("ramp", ramp)
    if ramp < 1:
        raise ValueError(f"ramp: expected at least 1 token, found {ramp}")
    _check_span(span_H, H, L)
    # Within the table, with the gradient of the spans themselves: one outside can return.
    inside_H = span_H + jax.lax.stop_gradient(jnp.clip(span_H, 0, L) - span_H)
    return {"span_H": inside_H, "ramp": ramp, "span_epsilon": float(span_epsilon)}


def _check_span(span_H: Array, H: int, L: int) -> None:
    if span_H.shape != (H,):
        raise ValueError(f"span_H: expected shape ({H},), found {span_H.shape}")
    # The values of a traced array are not known yet; `_spans` clips them.
    if isinstance(span_H, jax.core.Tracer):
        return
    span = np.asarray(span_H, np.float64)
    inside = (span >= 0) & (span <= L)
    if not inside.all():
        raise ValueError(f"span_H: expected spans in [0, {L}], found {span[~inside][:1]}")


def _check_numbers(first_distance: Any, dropout_rate: Any, dropout_seed: Any) -> None:
    # The current token is attended (0) or it is not (1); nothing else is meant.
    if first_distance not in (0, 1):
        raise ValueError(f"first_distance: expected 0 or 1, found {first_distance}")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), found {dropout_rate}")
    # Dropout without a seed would drop the same weights in every step.
    if dropout_rate and dropout_seed is None:
        raise ValueError(
            f"dropout_seed: expected an integer with dropout_rate {dropout_rate}, found None"
        )
