"""The mesh: devices arranged along the axes data, fsdp and tensor, and which sizes are refused.

A mesh is refused before anything is traced, with a line that names the setting to change, where
its product is not the number of devices, or where it does not divide the rows, the heads or the
slices. Widths that it must divide are checked by `rules.shardings`, array by array.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import ml_collections
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from allattn.errors import UserError
from allattn.sharding.rules import AXES


def make_mesh(config: ml_collections.ConfigDict, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh data x fsdp x tensor of a configuration.

    Args:
      config: the whole configuration; `mesh` has the size of every axis, and one of them may be
        -1, which takes the devices that the others leave.
      devices: those of the mesh, which need not be here; None: all that JAX sees.

    Returns:
      The mesh.

    Raises:
      UserError: the product does not fit the devices, or an axis the rows, the heads or the slices.
    """
    # `allattn compile` passes descriptions of devices that are elsewhere.
    if devices is None:
        devices = jax.devices()
    data, fsdp, tensor = _resolve_sizes(config, len(devices))
    _check_rows(config, data * fsdp)
    _check_heads(config, tensor)
    return _arrange((data, fsdp, tensor), devices)


def mesh_over_rows() -> Mesh:
    """The mesh of all devices with rows spread over them and parameters on each of them whole."""
    return _arrange((jax.device_count(), 1, 1), jax.devices())


def heads_to_spread(config: ml_collections.ConfigDict) -> int:
    """The number of heads that may be spread over `tensor`.

    It is 1 where the context and the persistent pairs have heads of their own: what a query
    projects would be sent from the devices of one kind of heads to those of the other, in every
    layer.

    Args:
      config: the whole configuration.
    """
    # In `sublayer` the pairs' heads cut what the others projected. Over `fsdp`, `tensor` and
    # accumulation together XLA gives that wrong numbers, and right ones where a constraint spreads
    # the output projection's result over rows alone, which should change no value.
    apart = ("head_split", "single_head", "sublayer", "pattention")
    if config.model.integration in apart or config.model.persistent_heads == 1:
        return 1
    return config.model.heads


# --- sizes and refusals --------------------------------------------------------------------------


def _resolve_sizes(config: ml_collections.ConfigDict, devices: int) -> list[int]:
    """The size of every axis, with -1 replaced by the number of devices that are left for it."""
    sizes = [config.mesh[axis] for axis in AXES]
    # At most one axis may be open, and no other one be less than 1.
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        named = dict(zip(AXES, sizes, strict=True))
        raise UserError(f"mesh: expected positive sizes and at most one -1, found {named}")
    # The open axis has what the others leave; where they do not divide it the product is too small.
    fixed = math.prod(size for size in sizes if size != -1)
    resolved = [devices // fixed if size == -1 else size for size in sizes]
    # The message shows the sizes as they were written, with the -1.
    if math.prod(resolved) != devices:
        written = " x ".join(map(str, sizes))
        raise UserError(f"mesh: expected data x fsdp x tensor = {devices} devices, found {written}")
    return resolved


def _check_rows(config: ml_collections.ConfigDict, row_groups: int) -> None:
    """Refuse a batch that cannot be split over the groups of devices and the accumulated parts."""
    # A row group is the devices along `tensor`: they share rows.
    batch = config.train.batch
    parts = row_groups * config.train.accumulation
    if batch % parts:
        expected = f"a multiple of data x fsdp x accumulation = {parts}"
        raise UserError(f"train.batch: expected {expected}, found {batch}")


def _check_heads(config: ml_collections.ConfigDict, tensor: int) -> None:
    """Refuse a `tensor` axis over which the heads cannot be spread."""
    heads = heads_to_spread(config)
    if heads % tensor == 0:
        return
    # Two kinds of heads make 1 the only size, whatever the number of heads.
    expected = f"a divisor of {heads} heads"
    if heads != config.model.heads:
        expected = f"1, as {config.model.integration} has heads of two kinds"
    raise UserError(f"mesh.tensor: expected {expected}, found {tensor}")


# --- devices -------------------------------------------------------------------------------------


def _arrange(sizes: Sequence[int], devices: Sequence[Any]) -> Mesh:
    """The mesh of these devices.

    Only the data centre's network, which is slower, joins the slices of a TPU. Devices of different
    slices therefore differ along `data` before they differ along any other axis.
    """
    data, fsdp, tensor = sizes
    slices = _slices(devices)
    if data % slices:
        raise UserError(f"mesh.data: expected a multiple of {slices} slices, found {data}")
    # Splitting a physical axis of a slice allows every factorisation of its devices.
    options: dict[str, Any] = {"devices": devices, "allow_split_physical_axes": True}
    # A hybrid mesh has each slice's devices side by side, and the slices along its first axis.
    if slices > 1:
        within_slice = (data // slices, fsdp, tensor)
        array = mesh_utils.create_hybrid_device_mesh(within_slice, (slices, 1, 1), **options)
    else:
        array = mesh_utils.create_device_mesh((data, fsdp, tensor), **options)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def _slices(devices: Sequence[Any]) -> int:
    """The number of TPU slices that the devices are in; 1 on CPUs and GPUs."""
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", 0) for device in devices})
