"""The one expensive operation: joint attention over context and persistent key-value pairs.

Dimension key: B batch, T query position in the block, S context key, L distance, N persistent pair,
H head, K head width.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allattn.attention import gpu, reference, tpu, tuning, xla
from allattn.attention.contract import pack

Array = jax.Array

IMPLEMENTATIONS = ("reference", "xla", "pallas_tpu", "pallas_gpu")
_FUSED = {"xla": xla, "pallas_tpu": tpu, "pallas_gpu": gpu}


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
    span_H: Array | None = None,
    ramp: int = 32,
    query_start: Array | int | None = None,
    key_start: Array | int = 0,
    dropout_rate: float = 0.0,
    dropout_seed: Array | int | None = None,
    row_offset: Array | int = 0,
    head_offset: Array | int = 0,
    scale: float | None = None,
    return_persistent_mass: bool = False,
    implementation: str | None = None,
) -> Array | tuple[Array, Array]:
    """One softmax over the keys within reach of each query and the head's persistent pairs.

    Query t sits at key index query_start + t, key j at distance d = query_start + t - j from it.
    The pair counts when first_distance <= d < first_distance + L and key_start <= j < S. Its weight
    is m(d) exp(scale (q.k_j + q'.p_d)), a persistent pair's exp(scale q.k_n), all divided by their
    sum (Sukhbaatar et al. 2019, arXiv 1907.01470, eq. 5 to 9; m(d) from arXiv 1905.07799, eq. 4).
    With no pair at all, output and gradients are 0. A pair's exp(logit) over the sum, the weight's
    derivative with regard to m, counts as 1e5 at most (it is larger only where m is almost 0).

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
      span_H: learned spans in tokens, float32, in [0, L]; None: all L distances count fully.
      ramp: length R of the span's soft end in tokens.
      query_start: int32, scalar or (B,), may be traced; None: S - T.
      key_start: int32, scalar or (B,), may be traced; keys before it do not exist.
      dropout_rate: probability of dropping a weight after normalisation.
      dropout_seed: integer that, with the weight's global place, decides what is dropped.
      row_offset: global index of row 0.
      head_offset: global index of head 0.
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
    """
    _check_rank(
        query_BTHK=query_BTHK, key_BSHK=key_BSHK, value_BSHK=value_BSHK, position_HLK=position_HLK
    )
    B, T, H, K = query_BTHK.shape
    S, L = key_BSHK.shape[1], position_HLK.shape[1]
    if persistent_key_HNK is None and persistent_value_HNK is None:
        persistent_key_HNK = persistent_value_HNK = jnp.zeros((H, 0, K), query_BTHK.dtype)
    _check_shapes(query_BTHK, key_BSHK, value_BSHK, position_HLK, position_query_BTHK)
    _check_persistent(query_BTHK, persistent_key_HNK, persistent_value_HNK)
    _check_numbers(H, L, first_distance, span_H, ramp, dropout_rate, dropout_seed)
    static_start = query_start is None and isinstance(key_start, int) and key_start == 0
    arguments: dict[str, Any] = {
        "position_HLK": position_HLK,
        "position_query_BTHK": query_BTHK if position_query_BTHK is None else position_query_BTHK,
        "first_distance": first_distance,
        "persistent_key_HNK": persistent_key_HNK,
        "persistent_value_HNK": persistent_value_HNK,
        "span_H": None
        if span_H is None
        else span_H + jax.lax.stop_gradient(jnp.clip(span_H, 0, L) - span_H),
        "ramp": ramp,
        "query_start_B": _per_row("query_start", S - T if query_start is None else query_start, B),
        "key_start_B": _per_row("key_start", key_start, B),
        "dropout_rate": float(dropout_rate),
        "dropout_seed": jnp.asarray(0 if dropout_seed is None else dropout_seed).astype(jnp.uint32),
        "row_offset": jnp.asarray(row_offset, jnp.int32),
        "head_offset": jnp.asarray(head_offset, jnp.int32),
        "scale": float(K**-0.5 if scale is None else scale),
    }
    implementation = implementation or best_here(query_BTHK.dtype)
    if implementation == "reference":
        out_BTHK, mass_BTH = reference.all_attention(query_BTHK, key_BSHK, value_BSHK, **arguments)
    elif implementation in _FUSED:
        run = _FUSED[implementation].all_attention
        arguments |= {"whole_context": static_start, "one_query": position_query_BTHK is None}
        arguments["tiles"] = tuning.tiles(
            implementation, T=T, L=L, N=arguments["persistent_key_HNK"].shape[1], K=K
        )
        out_BTHK, mass_BTH = run(*pack(query_BTHK, key_BSHK, value_BSHK, **arguments))
    else:
        raise NotImplementedError(
            f"implementation: expected one of {IMPLEMENTATIONS}, found {implementation!r}"
        )
    return (out_BTHK, mass_BTH) if return_persistent_mass else out_BTHK


def best_here(dtype: Any) -> str:
    """The fastest implementation for the machine that the code is traced for."""
    kernels = (
        {"tpu": "pallas_tpu", "gpu": "pallas_gpu"} if dtype in (jnp.float32, jnp.bfloat16) else {}
    )
    capability, _, _ = getattr(jax.devices()[0], "compute_capability", "").partition(".")
    if (
        capability.isdecimal() and int(capability) < 8
    ):  # Triton compiles for Ampere and later: not for a T4
        return "xla"
    return kernels.get(tuning.device()[0], "xla")


def _per_row(name: str, start: Array | int, rows: int) -> Array:
    start = jnp.asarray(start, jnp.int32)
    if start.shape not in ((), (rows,)):
        raise ValueError(f"{name}: expected a scalar or shape ({rows},), found shape {start.shape}")
    return jnp.broadcast_to(start, (rows,))


def _expect(name: str, array: Array, shape: tuple, dtype) -> None:
    if array.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, found {array.shape}")
    if array.dtype != dtype:
        raise ValueError(f"{name}: expected dtype {dtype} as the query has, found {array.dtype}")


def _check_rank(**arrays: Array) -> None:
    for name, array in arrays.items():
        rank = len(name.rpartition("_")[2])
        if array.ndim != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, found shape {array.shape}")


def _check_shapes(query_BTHK, key_BSHK, value_BSHK, position_HLK, position_query_BTHK) -> None:
    (B, _, H, K), dtype = query_BTHK.shape, query_BTHK.dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"query_BTHK: expected a floating-point dtype, found {dtype}")
    S, heads = key_BSHK.shape[1], position_HLK.shape[0]
    _expect("key_BSHK", key_BSHK, (B, S, H, K), dtype)
    _expect("value_BSHK", value_BSHK, (B, S, H, K), dtype)
    if heads not in (1, H):
        raise ValueError(f"position_HLK: expected 1 or {H} heads, found {heads}")
    _expect("position_HLK", position_HLK, (heads, position_HLK.shape[1], K), dtype)
    if position_query_BTHK is not None:
        _expect("position_query_BTHK", position_query_BTHK, query_BTHK.shape, dtype)


def _check_persistent(query_BTHK, persistent_key_HNK, persistent_value_HNK) -> None:
    if persistent_key_HNK is None or persistent_value_HNK is None:
        missing = "persistent_key_HNK" if persistent_key_HNK is None else "persistent_value_HNK"
        raise ValueError(f"{missing}: expected an array beside its partner, found None")
    N = persistent_key_HNK.shape[1] if persistent_key_HNK.ndim == 3 else -1
    shape = (query_BTHK.shape[2], N, query_BTHK.shape[3])
    _expect("persistent_key_HNK", persistent_key_HNK, shape, query_BTHK.dtype)
    _expect("persistent_value_HNK", persistent_value_HNK, shape, query_BTHK.dtype)


def _check_numbers(H, L, first_distance, span_H, ramp, dropout_rate, dropout_seed) -> None:
    if first_distance not in (0, 1):
        raise ValueError(f"first_distance: expected 0 or 1, found {first_distance}")
    if not 0 <= dropout_rate < 1:
        raise ValueError(f"dropout_rate: expected a number in [0, 1), found {dropout_rate}")
    if dropout_rate and dropout_seed is None:
        raise ValueError(
            f"dropout_seed: expected an integer with dropout_rate {dropout_rate}, found None"
        )
    if span_H is None:
        return
    if span_H.shape != (H,):
        raise ValueError(f"span_H: expected shape ({H},), found {span_H.shape}")
    if ramp < 1:
        raise ValueError(f"ramp: expected at least 1 token, found {ramp}")
    if not isinstance(span_H, jax.core.Tracer):
        span = np.asarray(span_H, np.float64)
        if not ((span >= 0) & (span <= L)).all():
            raise ValueError(
                f"span_H: expected spans in [0, {L}], found {span[(span < 0) | (span > L)][:1]}"
            )
