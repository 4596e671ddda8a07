"""The TPU kernels beyond the contract: they lower at real sizes, and the skew of a whole tile.

Dimension key: B batch, S context key, H head, K head width, T query of a tile, C key of a tile, W
column of the window.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import GEOMETRIES, arrays, call, options
from jax.experimental import pallas as pl

from allattn.attention.tpu import kernels

# Every geometry on the oldest kind, and one of each model on the newest; others lower like those.
QUICK = [(name, "TPU v4") for name in GEOMETRIES]
QUICK += [(name, "TPU7x") for name in ("enwik8_small", "transformer_xl")]
KINDS = ("TPU v4", "TPU v5 lite", "TPU v6 lite", "TPU7x")
ALL = [(name, kind) for name in GEOMETRIES for kind in KINDS]
SLOW = [pytest.param(*pair, marks=pytest.mark.slow) for pair in ALL if pair not in QUICK]


@pytest.mark.parametrize(("name", "kind"), [*QUICK, *SLOW])
def test_lowers_for_tpu(name: str, kind: str) -> None:
    """Forward and backward kernels at real sizes; there is no copy of keys or values around
    them.
    """
    shapes = jax.eval_shape(lambda: arrays(GEOMETRIES[name], jnp.bfloat16))
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), abstract_device=device)

    def loss(inputs: dict[str, Any]) -> jax.Array:
        return (
            call(inputs, **options(GEOMETRIES[name])).astype(jnp.float32).sum()
        )  # which implementation is the best

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == 2


def test_skew_of_a_whole_tile() -> None:
    """Real tiles have more than the eight rows of the other tests."""
    x_TW = np.random.default_rng(0).normal(size=(32, 256)).astype(np.float32)
    offset = 40

    def kernel(x, skewed, back):
        skewed[...] = kernels._skew(x[...], offset, 128)
        back[...] = kernels._unskew(skewed[...], offset, 256)

    shapes = [
        jax.ShapeDtypeStruct((32, 128), jnp.float32),
        jax.ShapeDtypeStruct((32, 256), jnp.float32),
    ]
    skewed_TC, back_TW = pl.pallas_call(kernel, out_shape=shapes, interpret=True)(x_TW)
    column_TC = offset + np.arange(128) - np.arange(32)[:, None]
    np.testing.assert_array_equal(skewed_TC, np.take_along_axis(x_TW, column_TC, 1))
    expected_TW = np.zeros_like(x_TW)
    np.put_along_axis(expected_TW, column_TC, np.asarray(skewed_TC), 1)
    np.testing.assert_array_equal(back_TW, expected_TW)
