"""Machines that code can be compiled for without having them: TPU slices, and nodes of GPUs."""

import os
from typing import Any, NamedTuple

from allattn.errors import UserError


class Chip(NamedTuple):
    """One device as JAX counts them, from its maker's public tables."""

    platform: str
    memory: float  # bytes of HBM
    flops: float  # bfloat16 products, FLOP/s
    ici: float  # bytes/s out of a chip to its neighbours, all links together (GPU: NVLink)
    dcn: float  # bytes/s out of a chip to other slices (GPU: to other nodes)
    shapes: tuple[str, ...]  # topologies of one slice
    kind: str = ""  # name of a GPU


GiB, GB, Gbit = 2.0**30, 1e9, 1e9 / 8
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")

# Google: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; half of the bidirectional ICI; the network cards of a host
# divided among its chips. A tpu7x chip is two devices, and a v4 chip one. NVIDIA: data sheets of H100 SXM and H200;
# half of the bidirectional NVLink, and one 400 Gbit/s card for each GPU, as in a DGX.
CHIPS = {
    "v4": Chip("tpu", 32 * GiB, 275e12, 150 * GB, 50 * Gbit, _CUBES),
    "v5e": Chip("tpu", 16 * GiB, 197e12, 200 * GB, 25 * Gbit, _FLAT),
    "v5p": Chip("tpu", 95 * GiB, 459e12, 600 * GB, 50 * Gbit, _CUBES),
    "v6e": Chip("tpu", 32 * GiB, 918e12, 400 * GB, 100 * Gbit, _FLAT),
    "tpu7x": Chip("tpu", 96 * GiB, 1153e12, 300 * GB, 50 * Gbit, _CUBES[:8]),
    "h100": Chip("gpu", 79 * GiB, 989e12, 450 * GB, 400 * Gbit, ("1", "2", "4", "8"), "NVIDIA H100 80GB HBM3"),
    "h200": Chip("gpu", 140 * GiB, 989e12, 450 * GB, 400 * Gbit, ("1", "2", "4", "8"), "NVIDIA H200"),
}
NEEDED = {"tpu": "libtpu (pip install -e '.[tpu]')", "gpu": "CUDA's compiler (as make test-gpu-compile does)"}

# What XLA needs to know of a GPU that is not there, from public data sheets.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: {memory:.0f}
  cuda_compute_capability {{ major: 9 }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 }}
device_description_str: "{kind}"
"""
_BANDWIDTH = {"h100": 3352320000000, "h200": 4800000000000}  # of memory, bytes/s


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
        raise UserError(f"--topology={topology}: expected {NEEDED[made_of.platform]}, found none: {first}") from error


def _tpu_devices(topology: str, slices: int) -> list[Any]:
    from jax.experimental import topologies

    # libtpu would look for the machine's own TPU, and warn that there is none
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_HOSTNAMES": "localhost"}
    quiet |= {"TPU_ACCELERATOR_TYPE": "v5litepod-4", "TPU_WORKER_ID": "0"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {"num_slices": slices} if slices > 1 else {}
    if topology.startswith("v4:"):
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    return list(topologies.get_topology_desc(platform="tpu", topology_name=topology, **options).devices)


def _gpu_devices(topology: str, slices: int) -> list[Any]:
    from jax.experimental import topologies

    name, _, count = topology.partition(":")
    target = _GPU.format(bandwidth=_BANDWIDTH[name], memory=CHIPS[name].memory, kind=CHIPS[name].kind)
    options = {"target_config": target, "topology": f"{slices}x1x{count}"}
    return list(topologies.get_topology_desc(name, platform="cuda", **options).devices)
