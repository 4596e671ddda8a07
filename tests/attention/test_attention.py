"""The contract of the operation, for every implementation.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    SMALL_TILES,
    Case,
    arrays,
    call,
    compiled,
    error,
    exact,
    options,
    program,
    results,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from new_process import fresh

from allattn import attention
from allattn.attention import tuning
from allattn.attention.tpu import skew

IMPLEMENTATIONS = [name for name in attention.IMPLEMENTATIONS if name != "reference"]
# Implementations that know the papers' normaliser; the others refuse it by name.
EPSILON = ("reference", "xla")


DEFAULTS = tuning.DEFAULTS  # before the fixture makes them small


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 8 queries, so that small cases have several."""
    monkeypatch.setattr(tuning, "DEFAULTS", SMALL_TILES)
    monkeypatch.setattr(tuning, "TABLE", [])
    # As most TPUs do; of few rows it is cheap here.
    monkeypatch.setattr(skew, "can_stride", lambda: True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", CASES)
def test_equals_reference(name: str, implementation: str) -> None:
    """Output, mass and gradients are the definition's, the same in a second run, and exactly 0
    where nothing is attended.
    """
    case = CASES[name]
    if case.epsilon and implementation not in EPSILON:
        pytest.skip(f"{implementation} has no span_epsilon")
    inputs = arrays(case)
    expected = exact(case)
    run = program(case, implementation)
    with jax.default_matmul_precision("highest"):
        found = run(inputs)
        again = run(inputs)
    assert error(found, expected) <= 1e-5
    for key, value in found.items():
        np.testing.assert_array_equal(value, again[key])
    for key, with_key in (("out", "out"), ("query", "out"), ("value", "value"), ("key", "value")):
        nothing = (expected[key] == 0) & (expected[with_key] == 0)
        assert not found[key][nothing].any(), key
    # A pair that an offset of -inf removes has no part in anything.
    for key in ("persistent_key_HNK", "persistent_value_HNK", "persistent_bias_HN"):
        if case.removed:
            assert not found[key][:, list(case.removed)].any(), key


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_removed_pairs(implementation: str) -> None:
    """A call in which -inf removes pairs equals one without them, dropout's draws included; one
    offset for all pairs, as low as may be, leaves only what float32 keeps of their differences.
    """
    case = Case(N=6, S=0, L=0, spans=None, dropout=0.3)
    inputs = arrays(case)
    run = output(case, implementation)

    def with_offsets(bias_HN: jax.Array) -> jax.Array:
        return run({**inputs, "persistent_bias_HN": bias_HN}, 7)

    none_HN = jnp.zeros((case.H, case.N))
    few = {name: inputs[name][:, :4] for name in ("persistent_key_HNK", "persistent_value_HNK")}
    close = dict(rtol=1e-5, atol=1e-6)
    removed = with_offsets(none_HN.at[:, 4:].set(-jnp.inf))
    np.testing.assert_allclose(removed, run({**inputs, **few}, 7), **close)
    # All the same, and then so far below 0 that all weights are.
    np.testing.assert_allclose(with_offsets(none_HN - 16), run(inputs, 7), **close)
    alike = run(arrays(dataclasses.replace(case, magnitude=0.0)), 7)
    np.testing.assert_allclose(with_offsets(none_HN - 1e30), alike, **close)


def test_nothing_to_attend() -> None:
    """A query without any key, and N = 0: output and gradients are exactly 0; the other queries are
    not touched.

    `test_equals_reference` asks the same of the other implementations, in the same case.
    """
    case = CASES["nothing to attend"]
    for found in (results(case, arrays(case), "reference"), exact(case)):
        assert not found["out"][:, :4].any() and found["out"][:, 4].any()
        assert not found["query"][:, :4].any() and not found["key"][:, :3].any()
        assert all(np.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation: str) -> None:
    """Products in bfloat16, sums in float32: near the float32 results."""
    starts = {"query_start": (2, 11), "key_start": (1, 9)}
    case = dataclasses.replace(CASES["ties and full"], **starts, dropout=0.3)
    inputs = arrays(case, jnp.bfloat16)
    same = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    expected = results(case, same, "reference")
    found = results(case, inputs, implementation)
    assert found["out"].dtype == jnp.bfloat16
    assert found["key"].dtype == jnp.bfloat16
    assert found["mass"].dtype == jnp.float32
    assert error(found, expected) <= 2e-2


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_span_gradient_over_a_large_hidden_logit(implementation: str) -> None:
    """The gradient of a span whose end hides a large logit.

    As in WikiText-103's first layer, whose inputs are sqrt(D) times as large as those of the
    others: e^60 and more.
    At the distance where m = 0 the derivative is min(exp(logit) / sum, 1e5) times what a weight
    there would add.
    """
    inputs = arrays(Case(B=1, T=1, S=8, H=1, K=4, L=8, N=0, magnitude=0), np.float32)
    inputs["query"] = jnp.ones_like(inputs["query"])
    inputs["span_H"] = jnp.array([2.0])
    value_S = np.arange(8.0)
    inputs["value"] = inputs["value"].at[..., 0].set(value_S[:, None])

    def first_of_output(
        span_H: jax.Array, excess: float
    ) -> jax.Array:  # ramp 2: the tie is distance 5, key 2
        key = (
            jnp.zeros_like(inputs["key"]).at[:, 2].set(excess / 2)
        )  # four lanes at a scale of 1 / 2
        positionless = inputs | {
            "key": key,
            "position_HLK": jnp.zeros_like(inputs["position_HLK"]),
            "span_H": span_H,
        }
        return call(positionless, ramp=2, implementation=implementation)[0, 0, 0, 0]

    mask_D = np.array([1, 1, 1, 0.5])  # distances 1 to 4: keys 6 to 3
    mean = (mask_D * value_S[6:2:-1]).sum() / mask_D.sum()
    gradient = compiled(implementation)(jax.grad(first_of_output))
    for excess in (3.0, 60.0, 200.0):
        found = gradient(inputs["span_H"], excess)[0]
        on_ramp = (
            value_S[3:5] - mean
        ).sum() / mask_D.sum()  # distances 4 and 3, whose m is 1/2 and, tied, 1
        at_tie = min(np.exp(excess) / mask_D.sum(), 1e5) * (value_S[2] - mean)
        np.testing.assert_allclose(found, (on_ramp + at_tie) / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ("capability", "expected"),
    [("7.5", "xla"), ("8.0", "pallas_gpu"), ("10.0", "pallas_gpu"), ("gfx942", "pallas_gpu")],
)
def test_gpus_that_triton_compiles_for(
    monkeypatch: pytest.MonkeyPatch, capability: str, expected: str
) -> None:
    gpu = types.SimpleNamespace(device_kind="a GPU", compute_capability=capability)
    monkeypatch.setattr(jax, "devices", lambda: [gpu])
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention.best_here(jnp.float32) == expected


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_logits(implementation: str) -> None:
    """Logits near 30 as precisely as others; of those near 60 float32 rounds so much that the
    definition itself loses up to 9e-6, and nobody loses twice that; of larger ones, where the
    exponential may overflow (m = 0 where the ramp ends, and the maximum is not taken over that
    logit), results are finite.
    """
    case = Case(H=4, spans=(0.0, 3.0, 5.0, 3e-4))
    near_30 = dataclasses.replace(case, magnitude=8.0)
    near_60 = dataclasses.replace(case, magnitude=15.0)
    larger = dataclasses.replace(case, magnitude=100.0)
    definition = program(case, "reference")
    run = program(case, implementation)
    with jax.default_matmul_precision("highest"):
        assert error(run(arrays(near_30)), exact(near_30)) <= 1e-5
        own = error(definition(arrays(near_60)), exact(near_60))
        assert error(run(arrays(near_60)), exact(near_60)) <= 2 * own <= 2e-5
        for found in (definition(arrays(larger)), run(arrays(larger))):
            for name, value in found.items():
                assert np.isfinite(value).all(), name


@pytest.mark.parametrize(
    "case", [CASES["ties and full"], Case(H=4, spans=(0.0, 3.0, 5.0, 3e-4), magnitude=15.0)]
)
def test_float64(case: Case) -> None:
    with jax.enable_x64(True):
        inputs = arrays(case, np.float64)
        assert error(results(case, inputs, "xla"), results(case, inputs, "reference")) <= 1e-9
        for name in ("pallas_tpu", "pallas_gpu"):
            with pytest.raises(
                NotImplementedError,
                match=f"{name}: expected dtype float32 or bfloat16, found float64",
            ):
                call(inputs, implementation=name)


# Of the kernels `test_equals_reference` asks the same more quickly: one that equals the definition,
# gradients too, is as causal as it is.
KERNELS = [pytest.param(name, marks=pytest.mark.slow) for name in ("pallas_tpu", "pallas_gpu")]


@pytest.mark.parametrize("implementation", ["reference", "xla", *KERNELS])
def test_deterministic(implementation: str) -> None:
    """Two programs, each traced anew; `test_equals_reference` runs one program twice."""
    case = CASES["dropout"]
    first = results(case, arrays(case), implementation)
    second = results(case, arrays(case), implementation)
    for name, value in first.items():
        np.testing.assert_array_equal(value, second[name])


@pytest.mark.parametrize("implementation", ["reference", "xla", *KERNELS])
def test_causality(implementation: str) -> None:
    """The gradient of the output at t with respect to later keys and values, and the current one,
    is exactly 0.
    """
    case = Case(T=6, S=14, spans=None)
    inputs = arrays(case)
    t = 2

    def at_t(key: jax.Array, value: jax.Array) -> jax.Array:
        return call({**inputs, "key": key, "value": value}, implementation=implementation)[
            :, t
        ].sum()

    gradients = compiled(implementation)(jax.grad(at_t, argnums=(0, 1)))
    for gradient in gradients(inputs["key"], inputs["value"]):
        assert not gradient[:, case.S - case.T + t :].any()
        assert gradient[:, case.S - case.T + t - 1].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_far_keys_are_not_touched(implementation: str) -> None:
    """Keys, values and positions that no head of small span can reach may be anything, even not a
    number.
    """
    case = Case(T=8, S=520, L=512, spans=(0.0, 20.0), H=2)
    inputs = arrays(case)
    run = program(case, implementation)
    clean = run(inputs)
    far = 300
    poisoned = {name: inputs[name].at[:, :far].set(jnp.nan) for name in ("key", "value")}
    poisoned["position_HLK"] = inputs["position_HLK"].at[:, case.L - far :].set(jnp.nan)
    found = run({**inputs, **poisoned})
    np.testing.assert_array_equal(found["out"], clean["out"])
    np.testing.assert_array_equal(found["query"], clean["query"])
    assert not found["key"][:, :far].any()


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_call_outside_jit(implementation: str) -> None:
    """A call that the user does not compile equals one that is compiled."""
    case = CASES["plain"]
    with jax.default_matmul_precision("highest"):
        found = call(arrays(case), implementation=implementation, **options(case))
    assert error({"out": found}, {"out": exact(case)["out"]}) <= 1e-5


def output(case: Case, implementation: str, **rest: Any) -> Callable[[dict, int], jax.Array]:
    """A compiled function from inputs and a seed to the output."""

    @compiled(implementation)
    def run(inputs: dict[str, Any], seed: int) -> jax.Array:
        settings = {**options(case), **rest, "dropout_seed": seed}
        return call(inputs, implementation=implementation, **settings)

    return run


@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_dropout_does_not_depend_on_the_cut(
    implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tile size, rows and heads done apart, and a longer table drop the same weights."""
    case = dataclasses.replace(CASES["dropout"], B=4, H=4, spans=(9.0, 30.0, 3.0, 0.0))
    inputs = arrays(case)
    whole_run = output(case, implementation)
    whole = whole_run(inputs, 7)
    close = dict(rtol=1e-5, atol=1e-6)
    assert not np.allclose(whole_run(inputs, 8), whole, **close)

    # The last head of the last two rows alone, with their places in the whole.
    part = {name: inputs[name][2:, :, 3:] for name in ("query", "key", "value")}
    of_heads = ("persistent_key_HNK", "persistent_value_HNK", "span_H")
    part |= {name: inputs[name][3:] for name in of_heads}
    part_run = output(case, implementation, row_offset=2, head_offset=3)
    found = part_run({**inputs, **part}, 7)
    np.testing.assert_allclose(found, whole[2:, :, 3:], **close)

    # Larger tiles, which take other paths through the same weights.
    monkeypatch.setattr(tuning, "DEFAULTS", DEFAULTS)
    np.testing.assert_allclose(output(case, implementation)(inputs, 7), whole, **close)

    # A longer context and table. Head 1 sees all distances of the shorter one, so more of this.
    before = ((0, 0), (90, 0), (0, 0), (0, 0))
    padded = {name: jnp.pad(inputs[name], before) for name in ("key", "value")}
    padded["position_HLK"] = jnp.pad(inputs["position_HLK"], ((0, 0), (0, 70), (0, 0)))
    others = [0, 2, 3]
    found = output(case, implementation)({**inputs, **padded}, 7)
    np.testing.assert_allclose(found[:, :, others], whole[:, :, others], **close)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [-0.7, 0.0])
def test_scale(scale: float, implementation: str) -> None:
    """A scale may have any sign, or make all logits equal."""
    case = CASES["plain"]
    with jax.enable_x64(True):
        expected = results(case, arrays(case, np.float64), "reference", scale=scale)
        expected = jax.tree.map(np.asarray, expected)
    with jax.default_matmul_precision("highest"):
        found = results(case, arrays(case), implementation, scale=scale)
    assert error(found, expected) <= 1e-5


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass keeps no array of T x S x H: under 64 MiB beyond inputs and outputs for a
    row of 8 heads.
    """
    monkeypatch.setattr(tuning, "DEFAULTS", DEFAULTS)
    case = Case(B=1, T=512, S=8704, H=8, K=64, L=8192, N=1024, spans=(8192.0,) * 8, ramp=32)
    shapes = jax.eval_shape(lambda: arrays(case))

    def loss(inputs: dict[str, Any]) -> jax.Array:
        return call(inputs, implementation="xla").sum()

    compiled = jax.jit(jax.grad(loss)).lower(shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 64 * 2**20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"key": np.zeros((2, 17, 3, 8), np.float32)},
            r"key_BSHK: expected shape \(2, 17, 2, 8\), found \(2, 17, 3",
        ),
        (
            {"value": np.zeros((2, 16, 2, 8), np.float32)},
            r"value_BSHK: expected shape \(2, 17, 2, 8\)",
        ),
        (
            {"value": np.zeros((2, 17, 2, 8), np.float16)},
            "value_BSHK: expected dtype float32 .* found float16",
        ),
        (
            {"query": np.zeros((2, 5, 8), np.float32)},
            r"query_BTHK: expected 4 dimensions, found shape \(2, 5, 8\)",
        ),
        (
            {"position_HLK": np.zeros((3, 12, 8), np.float32)},
            "position_HLK: expected 1 or 2 heads, found 3",
        ),
        (
            {"position_HLK": np.zeros((12, 8), np.float32)},
            r"position_HLK: expected 3 dimensions, found shape \(12, 8",
        ),
        ({"persistent_key_HNK": None}, "persistent_key_HNK: expected an array beside its partner"),
        (
            {"persistent_bias_HN": np.zeros((2, 6), np.float32)},
            r"persistent_bias_HN: expected shape \(2, 7\), found \(2, 6\)",
        ),
        (
            {"persistent_bias_HN": np.zeros((2, 7), np.float16)},
            "persistent_bias_HN: expected dtype float32 or float64, found float16",
        ),
        (
            {
                "persistent_key_HNK": None,
                "persistent_value_HNK": None,
                "persistent_bias_HN": np.zeros((2, 7), np.float32),
            },
            r"persistent_bias_HN: expected None without pairs, found shape \(2, 7\)",
        ),
        (
            {"span_H": np.array([0.0, 12.5], np.float32)},
            r"span_H: expected spans in \[0, 12\], found \[12.5\]",
        ),
        ({"span_H": np.zeros(3, np.float32)}, r"span_H: expected shape \(2,\), found \(3,\)"),
        (
            {"dropout_rate": 0.1},
            "dropout_seed: expected an integer with dropout_rate 0.1, found None",
        ),
        (
            {"dropout_rate": 1.0, "dropout_seed": 1},
            r"dropout_rate: expected a number in \[0, 1\), found 1.0",
        ),
        ({"first_distance": 2}, "first_distance: expected 0 or 1, found 2"),
        ({"span_epsilon": -1e-8}, "span_epsilon: expected a number, at least 0, found -1e-08"),
        ({"ramp": 3.5}, "ramp: expected a whole number of tokens, found 3.5"),
        ({"ramp": float("inf")}, "ramp: expected a whole number of tokens, found inf"),
        ({"ramp": 0.0}, "ramp: expected at least 1 token, found 0"),
        (
            {"query_start": np.zeros(3, int)},
            r"query_start: expected a scalar or shape \(2,\), found shape \(3,\)",
        ),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call({**arrays(CASES["plain"]), **change})


@pytest.mark.parametrize("ramp", [4.0, np.int64(4), np.float32(4)])
def test_whole_numbers_of_any_type(ramp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Implementations receive Python's integers, whatever whole numbers the caller gives.

    What they compute with a ramp of 4.0 is the business of the case "one head".
    """
    received: list[dict[str, Any]] = []

    def spy(*_: Any, **arguments: Any) -> tuple[None, None]:
        received.append(arguments)
        return None, None

    monkeypatch.setattr(attention.reference, "all_attention", spy)
    inputs = arrays(CASES["plain"])
    call(inputs, ramp=ramp, first_distance=np.int64(1), implementation="reference")
    for name, expected in (("ramp", 4), ("first_distance", 1)):
        found = received[0][name]
        assert type(found) is int and found == expected


def weights_by_hand(inputs: dict[str, Any], case: Case, kept: int) -> np.ndarray:
    """The papers' weights of one head and its last query, by distance and then by pair: softmax
    over what is kept, times m, over the sum plus epsilon.
    """
    L = case.L
    query_K = np.asarray(inputs["query"][0, -1, 0], np.float64)
    key_LK = np.asarray(inputs["key"][0, case.S - 2 : case.S - 2 - L : -1, 0], np.float64)
    by_distance_L = (key_LK + np.asarray(inputs["position_HLK"][0])) @ query_K
    by_pair_N = np.asarray(inputs["persistent_key_HNK"][0], np.float64) @ query_K
    logits_X = np.concatenate([by_distance_L, by_pair_N]) / np.sqrt(case.K)
    distance_L = np.arange(1, L + 1)
    logits_X[:L][distance_L > kept] = -np.inf
    softmax_X = np.exp(logits_X - logits_X.max())
    softmax_X /= softmax_X.sum()
    mask_L = np.clip((case.ramp + 1 - distance_L + case.spans[0]) / case.ramp, 0, 1)
    softmax_X[:L] *= mask_L
    return softmax_X / (softmax_X.sum() + case.epsilon)


@pytest.mark.parametrize("implementation", EPSILON)
@pytest.mark.parametrize(
    ("L", "spans", "kept"),
    [(150, (8.0, 9.0), 22), (150, (8.0, 18.5), 86), (60, (0.0, 0.0), 60), (150, (8.0, 148.0), 150)],
)
def test_span_epsilon(L: int, spans: tuple[float, float], kept: int, implementation: str) -> None:
    """Against the papers' definition, and with a shorter table that ends alike."""
    case = Case(B=1, T=2, S=L + 3, L=L, spans=spans, epsilon=0.2)
    inputs = arrays(case)
    # Values that show the weights: the number of a key or pair in one of two lanes.
    weight_X = weights_by_hand(inputs, case, kept)
    value_X = np.concatenate(
        [inputs["value"][0, L + 1 :: -1, 0][:L], inputs["persistent_value_HNK"][0]]
    )
    run = output(case, implementation)
    found = run(inputs, 7)[0, -1, 0]
    np.testing.assert_allclose(found, weight_X @ value_X, rtol=1e-4, atol=1e-5)
    table = inputs["position_HLK"][:, : kept + (L - kept) // 128 * 64]
    np.testing.assert_allclose(
        run({**inputs, "position_HLK": table}, 7)[0, -1, 0], found, rtol=1e-5
    )


@pytest.mark.parametrize("implementation", [x for x in IMPLEMENTATIONS if x not in EPSILON])
def test_kernels_refuse_epsilon(implementation: str) -> None:
    case = dataclasses.replace(CASES["plain"], epsilon=1e-8)
    with pytest.raises(NotImplementedError, match=f"{implementation}: expected span_epsilon 0"):
        call(arrays(case), implementation=implementation, **options(case))


def test_unknown_implementation() -> None:
    with pytest.raises(NotImplementedError, match="'magic'"):
        call(arrays(CASES["plain"]), implementation="magic")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_second_derivatives_are_refused(implementation: str) -> None:
    inputs = arrays(CASES["plain"])

    def slope(query: jax.Array) -> jax.Array:
        def loss(query: jax.Array) -> jax.Array:
            return (call({**inputs, "query": query}, implementation=implementation) ** 2).sum()

        return jax.grad(loss)(query).sum()

    with pytest.raises(NotImplementedError, match="all_attention: expected first derivatives only"):
        jax.grad(slope)(inputs["query"])


def check_any_case(draw: st.DataObject) -> None:
    """Every implementation agrees with the definition on a case of any sizes, starts and spans."""
    T = draw.draw(st.integers(1, 19))
    L = draw.draw(st.integers(0, 20))
    N = draw.draw(st.integers(0, 5))
    S = T + draw.draw(st.integers(0, 20))
    spans = (
        tuple(draw.draw(st.floats(0, L, width=16)) for _ in range(2))
        if draw.draw(st.booleans())
        else None
    )
    first = draw.draw(st.integers(0, 1))
    start = draw.draw(st.none() | st.integers(0, S - T))
    offsets = draw.draw(st.booleans())
    removed = draw.draw(st.sets(st.integers(0, 5), max_size=6 * offsets))
    case = Case(
        B=1,
        T=T,
        S=S,
        L=L,
        N=N,
        K=4,
        spans=spans,
        first_distance=first,
        query_start=start,
        offsets=offsets,
        removed=tuple(sorted(n for n in removed if n < N)),
    )
    expected = exact(case)
    for implementation in IMPLEMENTATIONS:
        with jax.default_matmul_precision("highest"):
            found = results(case, arrays(case), implementation)
        assert error(found, expected) <= 1e-5, implementation


ANY_CASE = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@settings(ANY_CASE, max_examples=3)
@given(draw=st.data())
def test_any_case(draw: st.DataObject) -> None:
    """Any sizes, starts and spans agree with the definition; CASES has the kinds one by one."""
    check_any_case(draw)


@pytest.mark.slow
@settings(ANY_CASE, max_examples=12)
@given(draw=st.data())
def test_many_cases(draw: st.DataObject) -> None:
    """The same for more of them."""
    check_any_case(draw)


MESH = """
import dataclasses, jax, numpy as np
from attention_cases import *
from allattn.attention import IMPLEMENTATIONS
from allattn.sharding import attention_over, make_mesh
from configs import base
c = base.get_config(); c.mesh.fsdp = c.mesh.tensor = 2; c.train.batch = 8
mesh = make_mesh(c)
case = dataclasses.replace(CASES["dropout"], B=8, H=4, spans=(9.0, 30.0, 3.0, 0.0), offsets=True)
inputs = arrays(case)
def run(operation, implementation):
    @compiled(implementation)
    def value_and_gradients(inputs):
        def loss(inputs):
            rest = dict(inputs)
            first = [rest.pop(n) for n in ("query", "key", "value")]
            settings = dict(dropout_rate=0.3, dropout_seed=5, ramp=4, implementation=implementation)
            return (operation(*first, **rest, **settings) ** 2).sum()
        return jax.value_and_grad(loss)(inputs)
    return value_and_gradients(inputs)
for implementation in IMPLEMENTATIONS[1:]:  # all but the definition
    single = run(all_attention, implementation)
    spread = run(attention_over(mesh, 8), implementation)
    for a, b in zip(jax.tree.leaves(single), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=implementation)
# The largest span of a layer is not that of a device's heads.
try:
    epsilon = dict(span_epsilon=1e-8, implementation="xla")
    rest = {n: x for n, x in inputs.items() if n not in ("query", "key", "value")}
    attention_over(mesh, 8)(inputs["query"], inputs["key"], inputs["value"], **rest, **epsilon)
    raise SystemExit("span_epsilon was not refused")
except NotImplementedError as error:
    assert "mesh.tensor 1" in str(error), error
print(mesh.size)
"""


def test_mesh() -> None:
    """2 x 2 x 2 devices give the outputs, gradients and dropout of one, in each implementation."""
    assert fresh(MESH, devices=8) == 8
