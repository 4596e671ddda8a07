"""The GPU kernels beyond the contract: they lower for CUDA at real sizes, and units go through the
scratch in chunks.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import (
    CASES,
    GEOMETRIES,
    SMALL_TILES,
    Case,
    arrays,
    call,
    error,
    exact,
    options,
    program,
    results,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType

from allattn.attention import gpu, tuning

H100 = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_lowers_for_cuda(name: str) -> None:
    """All kernels at real sizes, chosen because a GPU is what the code is for."""
    shapes = jax.eval_shape(lambda: arrays(GEOMETRIES[name], jnp.bfloat16))

    def loss(inputs: dict[str, Any]) -> jax.Array:
        return call(inputs, **options(GEOMETRIES[name])).astype(jnp.float32).sum()

    mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("gpu.triton") + text.count("triton_kernel_call") == (
        10 if GEOMETRIES[name].N else 9
    )


@pytest.mark.parametrize("name", ["dropout", "two queries"])
def test_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scratch array with room for one head of one row, and not a byte less, gives the same
    numbers.
    """
    monkeypatch.setattr(tuning, "DEFAULTS", SMALL_TILES)
    case = dataclasses.replace(CASES[name], B=3)
    whole = results(case, arrays(case), "pallas_gpu")
    one = (
        (-(-case.T // 16) * 16) * (-(-(case.L + 14) // 16) * 16) * 4
    )  # a row begins up to 14 numbers early
    monkeypatch.setattr(gpu, "SCRATCH", one)
    assert error(results(case, arrays(case), "pallas_gpu"), whole) <= 1e-6
    monkeypatch.setattr(gpu, "SCRATCH", one - 1)
    with pytest.raises(NotImplementedError, match=f"which needs {one}"):
        results(case, arrays(case), "pallas_gpu")


def test_too_large_for_the_scratch() -> None:
    case = Case(B=1, T=8192, S=20000, H=1, K=16, L=16384, spans=None)
    with pytest.raises(
        NotImplementedError,
        match="pallas_gpu: expected at most 268435456 bytes .* T x L = 8192 x 16384",
    ):
        jax.eval_shape(lambda: call(arrays(case), implementation="pallas_gpu"))


def test_work_follows_the_spans() -> None:
    """Keys, values and positions beyond a head's reach are not read, whatever another head
    needs.
    """
    case = Case(B=1, T=16, S=300, H=2, L=256, spans=(0.0, 256.0))
    inputs = arrays(case)
    run = program(case, "pallas_gpu")
    clean = run(inputs)
    poisoned = {name: inputs[name].at[:, :200, 0].set(np.nan) for name in ("key", "value")}
    found = run({**inputs, **poisoned})
    np.testing.assert_array_equal(found["out"], clean["out"])
    np.testing.assert_array_equal(found["query"], clean["query"])


# Of bfloat16, the contract's test_bfloat16 asks the same more quickly.
HALF = pytest.param(jnp.bfloat16, 2e-2, marks=pytest.mark.slow)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 1e-5), HALF])
def test_training_geometry(dtype: Any, tolerance: float) -> None:
    """Tiles, block, pairs and width of `enwik8_small` at its first bucket; on a GPU with all heads,
    and more rows.
    """
    rows, heads = (16, 8) if jax.default_backend() == "gpu" else (1, 2)
    spans = (0.0, 2.5, 50.0, 96.0, 0.0, 31.0, 10.25, 64.0)[:heads]
    case = Case(
        B=rows, T=512, S=640, H=heads, K=64, L=128, N=1024, spans=spans, ramp=32, dropout=0.3
    )
    inputs = arrays(case, dtype)
    with jax.default_matmul_precision("highest"):
        expected = results(case, jax.tree.map(lambda x: x.astype(jnp.float32), inputs), "xla")
        assert error(results(case, inputs, "pallas_gpu"), expected) <= tolerance


def check_any_spans(draw: st.DataObject) -> None:
    """The kernels agree with the definition where tiles without a mask begin and end anywhere."""
    T = draw.draw(st.integers(1, 200))
    L = draw.draw(st.integers(128, 300))
    S = T + draw.draw(st.integers(0, 300))
    spans = tuple(draw.draw(st.floats(0, L, width=16)) for _ in range(2))
    starts = {
        "query_start": draw.draw(st.integers(0, S - T)),
        "key_start": draw.draw(st.integers(0, 40)),
    }
    case = Case(
        B=1,
        T=T,
        S=S,
        L=L,
        N=3,
        K=4,
        spans=spans,
        first_distance=draw.draw(st.integers(0, 1)),
        **starts,
    )
    expected = exact(case)
    with jax.default_matmul_precision("highest"):
        assert error(results(case, arrays(case), "pallas_gpu"), expected) <= 1e-5


@settings(max_examples=2, deadline=None, derandomize=True)
@given(draw=st.data())
def test_any_spans(draw: st.DataObject) -> None:
    """Where the tiles that need no mask begin and end follows from spans, starts and sizes."""
    check_any_spans(draw)


@pytest.mark.slow
@settings(max_examples=8, deadline=None, derandomize=True)
@given(draw=st.data())
def test_many_spans(draw: st.DataObject) -> None:
    """The same for more of them."""
    check_any_spans(draw)
