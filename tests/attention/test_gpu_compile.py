"""GPU kernels and a training step compiled for H100s that need not be here: `make
test-gpu-compile`.

Dimension key: B batch, S context key, D model width, H head, K head width.
"""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import notebook_programs
import pytest
from attention_cases import GEOMETRIES, arrays, call, options
from jax.sharding import AbstractDevice, AxisType, Mesh, NamedSharding, PartitionSpec

from allattn import config
from allattn.attention import gpu
from allattn.model.reach_projection import project
from allattn.planning import chips, compilation

pytest.importorskip(
    "jax_plugins.xla_cuda12",
    reason="no CUDA compiler is installed: make test-gpu-compile installs it",
)
KIND = chips.CHIPS["h100"].gpu.kind


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_compiles(name: str, dtype: str) -> None:
    """Projection and operation, forward and backward: they fit, and keys are never laid out anew
    between them.
    """
    (chip,) = chips.devices("h100:1")
    case = GEOMETRIES[name]
    place = NamedSharding(Mesh([chip], ("data",), axis_types=(AxisType.Auto,)), PartitionSpec())
    shapes = jax.eval_shape(lambda: arrays(case, dtype))
    D = case.H * case.K
    shapes["key"] = shapes["value"] = jax.ShapeDtypeStruct((D, case.H, case.K), dtype)
    shapes["states_BSD"] = jax.ShapeDtypeStruct((case.B, case.S, D), dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

    def loss(inputs: dict[str, Any]) -> jax.Array:
        states_BSD = inputs["states_BSD"]
        inputs = {k: x for k, x in inputs.items() if k != "states_BSD"}
        inputs |= {name: project(inputs[name], states_BSD) for name in ("key", "value")}
        return call(inputs, implementation="pallas_gpu", **options(case)).astype(jnp.float32).sum()

    described = AbstractDevice(device_kind=KIND, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh(
        (1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=described
    )
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile()
    text = compiled.as_text()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    keys = case.B * case.S * D * jnp.dtype(dtype).itemsize
    print(
        f"{name} {dtype} on {KIND}: temporary {temporary / 2**20:.0f} MiB, "
        f"of which keys {4 * keys / 2**20:.0f}"
    )
    assert (
        temporary < gpu.SCRATCH + 6 * keys
    )  # keys, values, their gradients, and what products need
    shape = rf"\w+\[(?:{case.B},{case.S}|{case.B * case.S}),(?:{D}|{case.H},{case.K})\]"
    moved = re.findall(
        rf"%[\w.]+ = {shape}\S* (?:copy|transpose)\((?!%broadcast)", text
    )  # zeros may be copied
    assert re.search(shape, text) and not moved, moved


def test_a_step_on_a_node() -> None:
    """Rows, parameters and heads split two ways: it fits, and sends nothing that it need not."""
    changes = {"mesh.fsdp": "2", "mesh.tensor": "2", "model.span.limit": "512"}
    c = config.load(
        str(Path(__file__).resolve().parents[2] / "configs" / "enwik8_small.py"), changes
    )
    found = compilation.compile_step(c, "enwik8_small", "h100:8")
    print(compilation.report(found, c))
    assert found.fits and found.collectives and found.unexpected == []


@pytest.mark.parametrize("machine", ["l4:1", "a100:1", "h100:1"])
def test_the_notebook_on_one_gpu(machine: str) -> None:
    """All that launch/colab.ipynb computes fits GPUs that Colab lends, kernels included. A T4 has
    none: plain XLA.
    """
    programs = list(notebook_programs.compiled(machine))
    assert len(programs) == 21
    for name, text, memory in programs:
        assert memory < chips.chip(machine).memory, name
        assert ("logits_by_position" in text) == notebook_programs.attends(name), name
