"""The TPU kernels beyond the contract: they lower at real sizes, and whole tiles are exact."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_cases import GEOMETRIES, Case, arrays, call, error, exact, options, results

from allattn.attention import tuning
from allattn.attention.tpu import kept, skew

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


# Several blocks of queries and segments of keys, at both edges and inside, of both heads and of one
# alone.
LONG = Case(T=40, S=600, H=2, K=16, L=500, N=150, spans=(20.5, 460.0), ramp=32, dropout=0.3, B=1)


@pytest.mark.slow
def test_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The definition's values and gradients, as on a v4, which does not rotate by rows and does
    not multiply whole numbers.
    """
    tiles = tuning.TpuTiles(queries=8, keys=128, segment=256)
    monkeypatch.setitem(tuning.DEFAULTS, "pallas_tpu", tiles)
    monkeypatch.setattr(skew, "can_stride", lambda: False)
    monkeypatch.setattr(kept, "can_multiply", lambda: False)
    with jax.default_matmul_precision("highest"):
        found = results(LONG, arrays(LONG), "pallas_tpu")
    assert error(found, exact(LONG)) <= 1e-5
