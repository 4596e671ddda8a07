"""The GPU kernels compiled to machine code for an H100 that need not be here: `make test-gpu-compile`.

Dimension key: B batch, S context key, D model width, H head, K head width.
"""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from attention_cases import GEOMETRIES, arrays, call, options
from jax.sharding import AbstractDevice, AxisType, Mesh, NamedSharding, PartitionSpec

from allattn.attention import pallas_gpu
from allattn.layers import project

pytest.importorskip("jax_plugins.xla_cuda12", reason="no CUDA compiler is installed: make test-gpu-compile installs it")
KIND = "NVIDIA H100 80GB HBM3"
# What XLA needs to know of a chip that is not there, from its public data sheet.
H100 = f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84929347584
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 }}
device_description_str: "{KIND}"
"""


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_compiles(name: str, dtype: str) -> None:
    """Projection and operation, forward and backward: they fit, and keys are never laid out anew between them."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc("h100", platform="cuda", target_config=H100, topology="1x1x1").devices
    case = GEOMETRIES[name]
    place = NamedSharding(Mesh([chips[0]], ("data",), axis_types=(AxisType.Auto,)), PartitionSpec())
    shapes = jax.eval_shape(lambda: arrays(case, dtype))
    D = case.H * case.K
    shapes["key"] = shapes["value"] = jax.ShapeDtypeStruct((D, case.H, case.K), dtype)
    shapes["states_BSD"] = jax.ShapeDtypeStruct((case.B, case.S, D), dtype)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes)

    def loss(inputs: dict[str, Any]) -> jax.Array:
        states_BSD, inputs = inputs["states_BSD"], {k: x for k, x in inputs.items() if k != "states_BSD"}
        inputs |= {name: project(inputs[name], states_BSD) for name in ("key", "value")}
        return call(inputs, implementation="pallas_gpu", **options(case)).astype(jnp.float32).sum()

    described = AbstractDevice(device_kind=KIND, num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=described)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(jax.grad(loss)).trace(shapes).lower(lowering_platforms=("cuda",))
    compiled = lowered.compile()
    text, temporary = compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes
    keys = case.B * case.S * D * jnp.dtype(dtype).itemsize
    print(f"{name} {dtype} on {KIND}: temporary {temporary / 2**20:.0f} MiB, of which keys {4 * keys / 2**20:.0f}")
    assert temporary < pallas_gpu.SCRATCH + 6 * keys  # keys, values, their gradients, and what products need
    shape = rf"\w+\[(?:{case.B},{case.S}|{case.B * case.S}),(?:{D}|{case.H},{case.K})\]"
    moved = re.findall(rf"%[\w.]+ = {shape}\S* (?:copy|transpose)\((?!%broadcast)", text)  # zeros may be copied
    assert re.search(shape, text) and not moved, moved
