"""Machines that code can be compiled for without having them: TPU slices, and nodes of GPUs."""

import os
from typing import Any, NamedTuple

from allattn.errors import UserError


class Gpu(NamedTuple):
    """What XLA needs to know of a GPU that is not there."""

    kind: str  # its name
    capability: tuple[int, int]
    cores: int
    lanes: int  # float32 units of a core
    threads: int  # that a core holds
    shared: int  # KiB of a core's shared memory; a block may have all but one
    cache: int  # MiB of the L2
    clock: float  # GHz
    bandwidth: float  # of memory, bytes/s


class Chip(NamedTuple):
    """One device as JAX counts them, from its maker's public tables."""

    platform: str
    memory: float  # bytes of HBM
    flops: float  # bfloat16 products, FLOP/s
    ici: float  # bytes/s out of a chip to its neighbours, all links together (GPU: NVLink)
    dcn: float  # bytes/s out of a chip to other slices (GPU: to other nodes)
    shapes: tuple[str, ...]  # topologies of one slice
    gpu: Gpu | None = None


GiB, GB, Gbit = 2.0**30, 1e9, 1e9 / 8
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1",
    "2x2x2",
    "2x2x4",
    "2x4x4",
    "4x4x4",
    "4x4x8",
    "4x8x8",
    "8x8x8",
    "8x8x16",
    "8x16x16",
    "16x16x16",
)

# Google: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; half of the bidirectional ICI; the
# network cards of a host divided among its chips. A tpu7x chip is two devices, and a v4 chip one.
# NVIDIA: data sheets of H200, H100 SXM, A100 SXM of 40 GB, and L4; shared memory and threads:
# CUDA's programming guide, by compute capability. Half of the bidirectional NVLink (L4: PCIe), and
# one network card for each GPU, as in a DGX (L4: its share of a Google Cloud machine's).
_NODE = ("1", "2", "4", "8")
_H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 228, 50, 1.98, 3352e9)
_H200 = _H100._replace(kind="NVIDIA H200", bandwidth=4800e9)
_A100 = Gpu("NVIDIA A100-SXM4-40GB", (8, 0), 108, 64, 2048, 164, 40, 1.41, 1555e9)
_L4 = Gpu("NVIDIA L4", (8, 9), 58, 128, 1536, 100, 48, 2.04, 300e9)
CHIPS = {
    "v4": Chip("tpu", 32 * GiB, 275e12, 150 * GB, 50 * Gbit, _CUBES),
    "v5e": Chip("tpu", 16 * GiB, 197e12, 200 * GB, 25 * Gbit, _FLAT),
    "v5p": Chip("tpu", 95 * GiB, 459e12, 600 * GB, 50 * Gbit, _CUBES),
    "v6e": Chip("tpu", 32 * GiB, 918e12, 400 * GB, 100 * Gbit, _FLAT),
    "tpu7x": Chip("tpu", 96 * GiB, 1153e12, 300 * GB, 50 * Gbit, _CUBES[:8]),
    "l4": Chip("gpu", 22 * GiB, 121e12, 32 * GB, 12.5 * Gbit, _NODE, _L4),
    "a100": Chip("gpu", 39 * GiB, 312e12, 300 * GB, 200 * Gbit, _NODE, _A100),
    "h100": Chip("gpu", 79 * GiB, 989e12, 450 * GB, 400 * Gbit, _NODE, _H100),
    "h200": Chip("gpu", 140 * GiB, 989e12, 450 * GB, 400 * Gbit, _NODE, _H200),
}
NEEDED = {
    "tpu": "libtpu (pip install -e '.[tpu]')",
    "gpu": "CUDA's compiler (as make test-gpu-compile does)",
}

_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: {gpu.cores} fpus_per_core: {gpu.lanes}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {gpu.bandwidth:.0f} l2_cache_size: {cache} clock_rate_ghz: {gpu.clock}
  device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 }}
device_description_str: "{gpu.kind}"
"""


def chip(topology: str) -> Chip:
    """The chip that a topology such as `v5e:16x16` or `h100:8` is made of.

    Raises:
      UserError: it is none of those known, which are listed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or shape not in CHIPS[name].shapes:
        known = "; ".join(f"{name}:{{{','.join(found.shapes)}}}" for name, found in CHIPS.items())
        raise UserError(f"--topology: expected one of {known}; found {topology}")
    return CHIPS[name]


def devices(topology: str, slices: int = 1) -> list[Any]:
    """Descriptions of a topology's devices, for which JAX can compile.

    Args:
      topology: such as `v5e:16x16`, or `h100:8` for a node of eight.
      slices: how many of it, joined by the data centre's network.

    Raises:
      UserError: the topology is unknown, or the compiler for it is not installed.
    """
    made_of = chip(topology)
    if slices < 1 or slices > 1 and made_of.platform == "gpu":
        raise UserError(f"--slices: expected at least 1, and 1 for a node of GPUs, found {slices}")
    make = _tpu_devices if made_of.platform == "tpu" else _gpu_devices
    try:
        return make(topology, slices)
    except Exception as error:  # the plugins' own kinds
        first = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology={topology}: expected {NEEDED[made_of.platform]}, found none: {first}"
        ) from error


def _tpu_devices(topology: str, slices: int) -> list[Any]:
    from jax.experimental import topologies

    # libtpu would look for the machine's own TPU, and warn that there is none
    quiet = {
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    quiet |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_ID": "0"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    return list(
        topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices
    )


def _gpu_devices(topology: str, slices: int) -> list[Any]:
    from jax.experimental import topologies

    name, _, count = topology.partition(":")
    gpu, memory = CHIPS[name].gpu, CHIPS[name].memory
    assert gpu
    sizes = {
        "shared": gpu.shared * 1024,
        "block": (gpu.shared - 1) * 1024,
        "cache": gpu.cache * 2**20,
    }
    target = _TARGET.format(gpu=gpu, memory=memory, **sizes)
    options = {"target_config": target, "topology": f"{slices}x1x{count}"}
    return list(topologies.get_topology_desc(name, platform="cuda", **options).devices)
