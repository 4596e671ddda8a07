"""Whether the arrays of a run can fit in memory at all, asked before anything is compiled.

A model that does not fit would be compiled for a while, and then wait for ever or be killed without
a word. What is counted here must be in memory at once, whatever the compiler does; it makes a lower
bound, so that nothing is refused that fits:

    parameters, optimizer, cache     the state
    gradients                        of all parameters, since the clip needs them together
    layer inputs                     of the block, which the cache gains
    logits                           of the rows of one accumulated part, unless in clusters

`allattn compile` tells what a step needs in full.
"""

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from allattn import sharding
from allattn.errors import UserError
from allattn.train.state import TrainState

GIBIBYTE = 2**30


def check_fits(config: ml_collections.ConfigDict, mesh: Mesh, state: TrainState) -> None:
    """Refuse a run whose arrays are larger than the memory of its devices.

    Args:
      config: the whole configuration.
      mesh: devices of the run.
      state: abstract, with shardings.

    Raises:
      UserError: says how large the arrays are, and how large the memory.
    """
    # A device whose memory is not known is given what it is asked for.
    limit = memory_of_device(mesh)
    sizes = bytes_of_device(config, mesh, state)
    total = sum(sizes.values())
    if limit is None or total <= limit:
        return
    # What takes how much, in the order of the table above.
    parts = ", ".join(f"{name} {_gibibytes(size)}" for name, size in sizes.items())
    raise UserError(
        f"model and train.batch: expected arrays within the {_gibibytes(limit)} of memory that a "
        f"{mesh.local_devices[0].platform} device has here, found at least {_gibibytes(total)} "
        f"({parts})"
    )


def bytes_of_device(
    config: ml_collections.ConfigDict, mesh: Mesh, state: TrainState
) -> dict[str, int]:
    """Bytes that a training step has in the memory of one device at least, by what they hold."""
    train = config.train
    model = config.model
    rows = train.batch // sharding.row_shards(mesh)

    # Activations: of every layer for all rows, and the logits of one part, in float32 or wider.
    states = model.depth * rows * train.block * model.width * jnp.dtype(model.dtype).itemsize
    logits = rows // train.accumulation * train.block * model.vocab_size * 4
    if model.adaptive_io.cutoffs:
        logits = 0
    return {
        "parameters": _bytes(state.params),
        "gradients": _bytes(state.params),
        "optimizer": _bytes(state.optimizer),
        "cache": _bytes(state.cache),
        "layer inputs": states,
        "logits": logits,
    }


def memory_of_device(mesh: Mesh) -> int | None:
    """Bytes of memory of one device of this process; None: not known."""
    device = mesh.local_devices[0]
    # Accelerators say it themselves.
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    # CPU devices share the machine's memory.
    memory = machine_memory()
    if memory is None:
        return None
    return memory // len(mesh.local_devices)


def machine_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory and swap that this process may use; None where Linux does not tell.

    Args:
      root: folder that holds `proc` and `sys`.
    """
    try:
        lines = (root / "proc" / "meminfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return None
    # Lines such as "MemTotal:  64 kB".
    kibibytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    memory = min([1024 * kibibytes["MemTotal"], *_group_limits(root)])
    return memory + 1024 * kibibytes.get("SwapTotal", 0)


def _group_limits(root: Path) -> list[int]:
    """Limits of the control groups that this process is in, such as a container's or a job's."""
    try:
        lines = (root / "proc" / "self" / "cgroup").read_text(encoding="utf8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        # Version 2 has one tree, version 1 one for each kind of resource.
        # Such as "0::/job" and "4:memory:/job".
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        tree = root / "sys" / "fs" / "cgroup" / kinds
        name = "memory.limit_in_bytes" if kinds else "memory.max"
        # A group has the limits of all groups around it.
        group = tree / path.lstrip("/")
        for folder in (group, *group.parents):
            limits += _number(folder / name)
    return limits


def _number(file: Path) -> list[int]:
    """The number in a file; nothing if there is none, as in a file that says "max"."""
    try:
        return [int(file.read_text(encoding="utf8"))]
    except (OSError, ValueError):
        return []


def _bytes(tree: Any) -> int:
    """Bytes of the arrays of a tree on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _gibibytes(number: int) -> str:
    return f"{number / GIBIBYTE:,.1f} GiB"
