"""Calls of the operation that several tests share: their sizes, their inputs, and how results are
compared.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from allattn.attention import all_attention, tuning
from benchmarks import geometries


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes and options of one call; the defaults are a call with everything in it."""

    B: int = 2
    T: int = 5
    S: int = 17
    H: int = 2
    K: int = 8
    L: int = 12
    N: int = 7
    spans: tuple[float, ...] | None = (0.0, 3.5)
    ramp: int | float = 4
    first_distance: int = 1
    position_heads: int = 1
    two_queries: bool = False
    query_start: int | tuple[int, ...] | None = None
    key_start: int | tuple[int, ...] = 0
    dropout: float = 0.0
    magnitude: float = 1.0  # of the queries
    # Whether pairs have offsets, and which pairs an offset of -inf removes.
    offsets: bool = False
    removed: tuple[int, ...] = ()
    epsilon: float = 0.0


CASES = {
    "plain": Case(),
    "no spans": Case(spans=None, ramp=0),
    "ties and full": Case(H=4, spans=(0.0, 3.0, 12.0, 11.25)),
    "spans that hide large logits": Case(
        H=4, spans=(0.0, 3.0, 5.0, 3e-4), magnitude=8.0, dropout=0.3, two_queries=True
    ),
    "nothing to attend": Case(N=0, query_start=0, key_start=3, spans=None),
    "nothing but ties": Case(T=8, N=0, spans=(0.0, 1.0), ramp=1, query_start=0, key_start=3),
    "one query": Case(T=1),
    "one head": Case(H=1, spans=(5.5,), ramp=4.0),
    "several tiles": Case(T=21, S=60, L=30, spans=(9.0, 30.0)),
    "tiles without a mask": Case(T=33, S=150, L=100, spans=(50.5, 100.0), dropout=0.2),
    "block longer than context": Case(T=21, S=24, L=3, spans=(0.5, 3.0), ramp=2),
    "empty cache": Case(T=9, S=9),
    "no context": Case(S=0, L=0, spans=None),
    "keys without distances": Case(L=0, spans=None),
    "no persistent pairs": Case(N=0),
    "current token": Case(first_distance=0),
    "two queries": Case(two_queries=True, position_heads=2, first_distance=0, spans=None, N=0),
    "memory that fills": Case(
        two_queries=True,
        position_heads=2,
        first_distance=0,
        spans=None,
        N=0,
        L=17,
        key_start=3,
        dropout=0.3,
    ),
    "starts by row": Case(query_start=(2, 11), key_start=(1, 9)),
    "many keys": Case(T=21, S=700, L=640, spans=(40.5, 600.0), dropout=0.2),
    "many keys with starts": Case(
        T=9,
        S=700,
        L=640,
        spans=(640.0, 300.25),
        query_start=(690, 455),
        key_start=(3, 130),
        two_queries=True,
        first_distance=0,
    ),
    "dropout": Case(T=21, S=60, L=30, spans=(9.0, 30.0), dropout=0.3),
    "dropout with starts": Case(query_start=(2, 11), key_start=(1, 9), dropout=0.3),
    "offsets": Case(T=21, S=60, L=30, N=140, offsets=True, removed=(0, 5, 139), dropout=0.3),
    "every pair removed": Case(
        N=3, offsets=True, removed=(0, 1, 2), query_start=0, key_start=3, spans=None
    ),
    # Span and ramp are 13 distances; 22 are the next that are congruent to 150 modulo 64.
    "epsilon": Case(
        T=21,
        S=180,
        L=150,
        spans=(8.5, 3.0),
        offsets=True,
        removed=(1,),
        dropout=0.3,
        magnitude=3.0,
        epsilon=0.1,
    ),
    "epsilon with starts": Case(
        query_start=(2, 11), key_start=(3, 9), N=0, epsilon=0.1, first_distance=0
    ),
    "offsets alone": Case(S=0, L=0, spans=None, offsets=True, removed=(1,), two_queries=True),
}


def arrays(case: Case, dtype: Any = np.float32, seed: int = 0) -> dict[str, Any]:
    """Random inputs of a case."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape).astype(np.float32), dtype)

    B = case.B
    T = case.T
    S = case.S
    H = case.H
    K = case.K
    L = case.L
    N = case.N
    found = {
        "query": case.magnitude * normal(B, T, H, K),
        "key": normal(B, S, H, K),
        "value": normal(B, S, H, K),
    }
    found["position_HLK"] = normal(case.position_heads, L, K)
    found["persistent_key_HNK"] = normal(H, N, K)
    found["persistent_value_HNK"] = normal(H, N, K)
    if case.offsets:
        removed_N = np.isin(np.arange(N), case.removed)
        bias_HN = 2 * normal(H, N).astype(jnp.promote_types(dtype, jnp.float32))
        found["persistent_bias_HN"] = jnp.where(removed_N, -jnp.inf, bias_HN)
    if case.two_queries:
        found["position_query_BTHK"] = normal(B, T, H, K)
    if case.spans is not None:
        found["span_H"] = jnp.asarray(case.spans, jnp.promote_types(dtype, jnp.float32))
    return found


def options(case: Case) -> dict[str, Any]:
    """The options of a case; the starts are traced where they are given."""
    found: dict[str, Any] = {
        "first_distance": case.first_distance,
        "ramp": case.ramp,
        "dropout_rate": case.dropout,
        "span_epsilon": case.epsilon,
    }
    found |= {"dropout_seed": 7} if case.dropout else {}
    for name in ("query_start", "key_start"):
        start = getattr(case, name)
        found[name] = start if start is None or start == 0 else jnp.array(start)
    return found


def call(inputs: dict[str, Any], **rest: Any) -> Any:
    """The operation on a dictionary of inputs."""
    inputs = dict(inputs)
    return all_attention(
        inputs.pop("query"), inputs.pop("key"), inputs.pop("value"), **inputs, **rest
    )


def for_this_machine() -> Any:
    """Within it, what is traced on a CPU is traced for it alone.

    Else a kernel is traced for every platform that the program may be lowered for. The tests that
    lower for TPU and GPU do that, as do those of models and training.
    """

    def default(*operands: Any, default: Callable, **others: Callable) -> Any:
        return default(*operands)

    if jax.default_backend() != "cpu":
        return contextlib.nullcontext()
    return mock.patch.object(jax.lax, "platform_dependent", default)


def compiled(implementation: str) -> Callable[[Callable], Callable]:
    """Decorator that compiles a function which calls an implementation, for this machine.

    On a CPU an interpreted kernel and the definition take longer to optimise than to run. "xla",
    which users run there, is compiled as for them.
    """
    quick = implementation != "xla" and jax.default_backend() == "cpu"
    options: Any = {"xla_backend_optimization_level": 0} if quick else None

    def decorate(function: Callable) -> Callable:
        @functools.wraps(function)
        def traced(*arrays: Any) -> Any:
            with for_this_machine():
                return function(*arrays)

        return jax.jit(traced, compiler_options=options)

    return decorate


def program(case: Case, implementation: str, **rest: Any) -> Callable[[dict], dict[str, Any]]:
    """A compiled function from the inputs of a case to output, persistent mass and every gradient
    of sum(out * cotangent).
    """
    rng = np.random.default_rng(1)
    cotangent = jnp.asarray(rng.normal(size=(case.B, case.T, case.H, case.K)), jnp.float32)

    def loss(inputs: dict[str, Any]) -> tuple:
        settings = {**options(case), "implementation": implementation, **rest}
        out, mass = call(inputs, return_persistent_mass=True, **settings)
        return jnp.sum(out.astype(cotangent.dtype) * cotangent), (out, mass)

    @compiled(implementation)
    def run(inputs: dict[str, Any]) -> dict[str, Any]:
        gradients, (out, mass) = jax.grad(loss, has_aux=True)(inputs)
        return {"out": out, "mass": mass, **gradients}

    return run


def results(case: Case, inputs: dict[str, Any], implementation: str, **rest: Any) -> dict[str, Any]:
    """Output, persistent mass and every gradient, of a program that is run once."""
    return program(case, implementation, **rest)(inputs)


@functools.lru_cache(maxsize=4)
def exact(case: Case) -> dict[str, Any]:
    """The definition in float64, computed once for the implementations that are held against it."""
    with jax.enable_x64(True):
        found = results(case, arrays(case, np.float64), "reference")
        return jax.tree.map(np.asarray, found)


def largest_entry(x: Any) -> float:
    return float(np.abs(np.asarray(x, np.float64)).max(initial=0))


def error(ours: dict[str, Any], reference: dict[str, Any]) -> float:
    """Largest error over largest entry; gradients that vanish in theory are held against the
    largest gradient.
    """
    largest = max(map(largest_entry, reference.values()))
    errors = []
    for name, expected in reference.items():
        found = np.asarray(ours[name], np.float64)
        assert found.shape == expected.shape and np.isfinite(found).all(), name
        scale = largest_entry(expected)
        if scale <= 1e-9 * largest:
            scale = largest
        difference = largest_entry(found - np.asarray(expected, np.float64))
        errors.append(difference / max(scale, 1e-30))
    return float(np.max(errors))


# Small cases then have several; 16 is the least that Triton multiplies.
SMALL_TILES = {
    "xla": tuning.XlaTiles(queries=8),
    "pallas_tpu": tuning.TpuTiles(queries=8, keys=128, segment=256),
    "pallas_gpu": tuning.GpuTiles(queries=16, keys=16, few=16),
}


def _all_attention(name: str, dropout: float) -> Case:
    """The operation of one layer of a model, for two rows."""
    H, K, L, T, N = geometries.GEOMETRIES[name].of_operation()
    spans = (0.0,) * H
    return Case(B=2, T=T, S=T + L, H=H, K=K, L=L, N=N, spans=spans, ramp=32, dropout=dropout)


def _transformer_xl(name: str, dropout: float) -> Case:
    """The same of Transformer-XL, where memory and block together are S keys at S distances."""
    H, K, L, T, _ = geometries.GEOMETRIES[name].of_operation()
    return Case(
        B=2,
        T=T,
        S=T + L,
        H=H,
        K=K,
        L=T + L,
        N=0,
        spans=None,
        first_distance=0,
        position_heads=H,
        two_queries=True,
        dropout=dropout,
    )


# the operation of one layer of the papers' models
GEOMETRIES = {
    "enwik8_small": _all_attention("enwik8_small", dropout=0.3),
    "enwik8_large": _all_attention("enwik8_large", dropout=0.4),
    "wikitext103": _all_attention("wikitext103", dropout=0.3),
    "transformer_xl": _transformer_xl("enwik8_xl", dropout=0.1),
    "wikitext103_xl": _transformer_xl("wikitext103_xl", dropout=0.1),
}
# The same with offsets, of pairs that do not fill the last step over them.
GEOMETRIES["offsets"] = dataclasses.replace(GEOMETRIES["enwik8_small"], N=1000, offsets=True)
