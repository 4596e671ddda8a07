"""Machines that code can be compiled for without having them: TPU slices, and nodes of GPUs.

A machine is named by its chip and its shape, such as `v5e:16x16` (a TPU slice of 256 chips) or
`h100:8` (a node of eight GPUs). To add a chip: add a row to `CHIPS`, from its maker's public
tables; for a GPU also a `Gpu`, from which XLA decides what it can compile.
"""

import os
from typing import Any, NamedTuple

from allattn.errors import UserError


class Gpu(NamedTuple):
    """What XLA needs to know of a GPU that is not there."""

    # The name by which its maker calls it.
    kind: str
    # Compute capability of CUDA: major, minor.
    capability: tuple[int, int]
    # Streaming multiprocessors.
    cores: int
    # Float32 units of a multiprocessor.
    lanes: int
    # Threads that a multiprocessor holds.
    threads: int
    # Shared memory of a multiprocessor in KiB; a block may have all but one.
    shared: int
    # L2 cache in MiB.
    cache: int
    # Clock rate in GHz.
    clock: float
    # Memory bandwidth in bytes/s.
    bandwidth: float


class Chip(NamedTuple):
    """One device as JAX counts them, from its maker's public tables."""

    # "tpu" or "gpu".
    platform: str
    # HBM in bytes.
    memory: float
    # Peak rate of bfloat16 products in FLOP/s.
    flops: float
    # Bytes/s out of a chip to its neighbours, all links together (GPU: NVLink).
    ici: float
    # Bytes/s out of a chip to other slices (GPU: to other nodes).
    dcn: float
    # Topologies of one slice, or numbers of GPUs in a node.
    shapes: tuple[str, ...]
    # Of a GPU.
    gpu: Gpu | None = None


GiB = 2.0**30
GB = 1e9
Gbit = 1e9 / 8

# The shapes in which slices are offered: chips on a torus of two or of three dimensions.
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
_NODE = ("1", "2", "4", "8")

# NVIDIA: shared memory and threads from CUDA's programming guide, by compute capability; the rest
# from the data sheets of H200, H100 SXM, A100 SXM of 40 GB, and L4.
_H100 = Gpu(
    kind="NVIDIA H100 80GB HBM3",
    capability=(9, 0),
    cores=132,
    lanes=128,
    threads=2048,
    shared=228,
    cache=50,
    clock=1.98,
    bandwidth=3352e9,
)
_H200 = _H100._replace(kind="NVIDIA H200", bandwidth=4800e9)
_A100 = Gpu(
    kind="NVIDIA A100-SXM4-40GB",
    capability=(8, 0),
    cores=108,
    lanes=64,
    threads=2048,
    shared=164,
    cache=40,
    clock=1.41,
    bandwidth=1555e9,
)
_L4 = Gpu(
    kind="NVIDIA L4",
    capability=(8, 9),
    cores=58,
    lanes=128,
    threads=1536,
    shared=100,
    cache=48,
    clock=2.04,
    bandwidth=300e9,
)

CHIPS = {
    # Google: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}. ICI is half of the bidirectional
    # rate, DCN the network cards of a host divided among its chips. A tpu7x chip is two devices,
    # and a v4 chip one.
    #             platform   memory     flops        ici       dcn       shapes
    "v4": Chip("tpu", 32 * GiB, 275e12, 150 * GB, 50 * Gbit, _CUBES),
    "v5e": Chip("tpu", 16 * GiB, 197e12, 200 * GB, 25 * Gbit, _FLAT),
    "v5p": Chip("tpu", 95 * GiB, 459e12, 600 * GB, 50 * Gbit, _CUBES),
    "v6e": Chip("tpu", 32 * GiB, 918e12, 400 * GB, 100 * Gbit, _FLAT),
    "tpu7x": Chip("tpu", 96 * GiB, 1153e12, 300 * GB, 50 * Gbit, _CUBES[:8]),
    # NVIDIA: half of the bidirectional NVLink (L4: PCIe), and one network card for each GPU, as in
    # a DGX (L4: its share of a Google Cloud machine's).
    "l4": Chip("gpu", 22 * GiB, 121e12, 32 * GB, 12.5 * Gbit, _NODE, _L4),
    "a100": Chip("gpu", 39 * GiB, 312e12, 300 * GB, 200 * Gbit, _NODE, _A100),
    "h100": Chip("gpu", 79 * GiB, 989e12, 450 * GB, 400 * Gbit, _NODE, _H100),
    "h200": Chip("gpu", 140 * GiB, 989e12, 450 * GB, 400 * Gbit, _NODE, _H200),
}

# The compiler of a platform, and how to get it.
COMPILERS = {
    "tpu": "libtpu (pip install -e '.[tpu]')",
    "gpu": "CUDA's compiler (as make test-gpu-compile does)",
}

# libtpu would look for the machine's own TPU, and warn that there is none.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_ID": "0",
}

# XLA's description of a GPU (GpuTargetConfigProto, as text); sizes in bytes.
_GPU_TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {gpu.threads}
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {block}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {gpu.cores} fpus_per_core: {gpu.lanes}
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
    """The chip of a topology.

    Args:
      topology: such as `v5e:16x16` or `h100:8`.

    Raises:
      UserError: it is none of those known, which are listed.
    """
    name, _, shape = topology.partition(":")
    if name not in CHIPS or shape not in CHIPS[name].shapes:
        lists = [f"{name}:{{{','.join(chip.shapes)}}}" for name, chip in CHIPS.items()]
        raise UserError(f"--topology: expected one of {'; '.join(lists)}; found {topology}")
    return CHIPS[name]


def devices(topology: str, slices: int = 1) -> list[Any]:
    """Descriptions of a topology's devices, for which JAX can compile.

    Args:
      topology: such as `v5e:16x16`, or `h100:8` for a node of eight.
      slices: how many of it, joined by the data centre's network.

    Returns:
      One description for every device, in the order of the topology.

    Raises:
      UserError: the topology is unknown, or the compiler for it is not installed.
    """
    platform = chip(topology).platform
    if slices < 1 or (slices > 1 and platform == "gpu"):
        raise UserError(f"--slices: expected at least 1, and 1 for a node of GPUs, found {slices}")
    describe = _tpu_devices if platform == "tpu" else _gpu_devices
    # A compiler that is missing, or too old, raises errors of its plugin's own kinds.
    try:
        return describe(topology, slices)
    except Exception as error:
        line = str(error).splitlines()[0][:200]
        raise UserError(
            f"--topology={topology}: expected {COMPILERS[platform]}, found none: {line}"
        ) from error


def _tpu_devices(topology: str, slices: int) -> list[Any]:
    """Descriptions of TPU slices, from libtpu."""
    from jax.experimental import topologies

    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if slices > 1:
        options["num_slices"] = slices
    # Both cores of a v4 chip work as one device.
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"
    described = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    return list(described.devices)


def _gpu_devices(topology: str, slices: int) -> list[Any]:
    """Descriptions of the GPUs of a node, from CUDA's plugin."""
    from jax.experimental import topologies

    name, _, count = topology.partition(":")
    gpu = CHIPS[name].gpu
    assert gpu is not None
    target = _GPU_TARGET.format(
        gpu=gpu,
        memory=CHIPS[name].memory,
        shared=gpu.shared * 1024,
        block=(gpu.shared - 1) * 1024,
        cache=gpu.cache * 2**20,
    )
    # Slices x hosts of a slice x devices of a host.
    options = {"target_config": target, "topology": f"{slices}x1x{count}"}
    return list(topologies.get_topology_desc(name, platform="cuda", **options).devices)
