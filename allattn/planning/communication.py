"""What the collectives of a training step are for, and which of them must not be.

A step may reduce gradients over rows, gather what fsdp splits, and reduce norms and metrics once;
where heads are split as well, it sums activations over `tensor`. Anything else is a mistake in the
sharding, above all a collective inside the attention operation.
"""

from collections import Counter, defaultdict
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from allattn import sharding
from allattn.planning import collectives
from allattn.train import TrainProgram

SMALL = 65_536  # bytes that norms and metrics may take together
# of every parameter in a pass: forward, backward, and its gradient where that goes round the same
# ring
GATHERS = 3
GRADIENT, GATHER, METRICS, ACTIVATION = (
    "gradient reduction",
    "fsdp gather",
    "norms and metrics",
    "activations",
)
BETWEEN = "sums between slices"


class Use(NamedTuple):
    """A collective and what it is for."""

    role: str  # "": nothing that a step needs
    axes: tuple[str, ...]  # of the mesh, along which it moves data
    collective: collectives.Collective


def judge(found: list[collectives.Collective], program: TrainProgram) -> list[Use]:
    """What every collective of a step is for.

    Args:
      found: from `hlo.collectives`, of a step on one slice.
      program: whose step it is; tells collectives of parameters by their sizes.
    """
    sizes, uses = set(_sums(program)), []
    for collective in found:
        axes = _axes(collective, program.mesh)
        if not axes:
            continue  # each device with itself
        uses.append(
            Use(_role(collective, axes, sizes, program.model.config.depth), axes, collective)
        )
    return uses


def between_slices(found: list[collectives.Collective]) -> list[Use]:
    """What a step on several slices sends between them, sums and nothing else, and what is inside of the operation."""
    far = [collective for collective in found if collective.kind.endswith(collectives.OVER_SLICES)]
    inside = [
        Use("", (), collective) for collective in found if sharding.OPERATION in collective.place
    ]
    return [
        Use(BETWEEN if c.kind.startswith("all-reduce") else "", ("slices",), c) for c in far
    ] + inside


def _role(found: collectives.Collective, axes: tuple[str, ...], sizes: set[int], depth: int) -> str:
    reduces, once = found.kind in ("all-reduce", "reduce-scatter"), found.times == 1
    if sharding.OPERATION in found.place or found.times is None:
        return ""
    if reduces and once and max(found.sizes) <= depth:  # a number, or one for every layer
        return METRICS
    of_parameters = all(
        size in sizes or size <= depth for size in found.sizes
    )  # norms may be joined with gradients
    backward = (
        once or "transpose(" in found.place or not found.place
    )  # where several are joined, names may be lost
    if reduces and of_parameters and backward and set(axes) & set(sharding.ROWS):
        return GRADIENT
    if found.kind == "all-gather" and of_parameters and axes == ("fsdp",):
        return GATHER
    if found.kind == "collective-permute" and of_parameters and axes == ("fsdp",):
        # a TPU sends a kernel's parts, or its gradient's, round a ring while it multiplies
        return GATHER
    return ACTIVATION if found.kind == "all-reduce" and axes == ("tensor",) else ""


def _axes(found: collectives.Collective, mesh: Mesh) -> tuple[str, ...]:
    """Axes of the mesh along which devices of a group differ."""
    shape = tuple(mesh.shape[axis] for axis in sharding.AXES)
    places = np.stack(np.unravel_index(np.array(found.groups), shape))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, differs in zip(sharding.AXES, differ, strict=True) if differs)


def violations(uses: list[Use], program: TrainProgram) -> list[str]:
    """What a step sends that it must not, a line each.

    A sum or gather of activations may have the size of a parameter's, so these are counted as well:
    what is sent of parameters and gradients is no more than there is of them.

    Args:
      uses: from `judge`.
      program: whose step it is.
    """
    lines = _strangers(uses)
    if (small := sent(uses, METRICS)) > SMALL:
        lines.append(f"norms and metrics: expected at most {SMALL:,} bytes, found {small:,}")
    train, sums = program.config.train, _sums(program)
    for axis in sharding.ROWS:
        for size, found in _counts(
            [u.collective for u in uses if u.role == GRADIENT and axis in u.axes]
        ).items():
            if size > program.model.config.depth and found > (
                most := sums[size] * train.accumulation
            ):
                lines.append(
                    f"{GRADIENT} over {axis} of {size:,} numbers: expected at most {most} times, found {found}"
                )
    most = train.accumulation * (GATHERS + bool(train.remat)) * _parameters_of_a_device(program)
    counts = _counts([u.collective for u in uses if u.role == GATHER])
    if (gathered := sum(size * n for size, n in counts.items())) > most:
        lines.append(f"{GATHER}: expected at most {most:,} numbers, found {gathered:,}")
    return lines


def violations_between(far: list[Use], near: list[Use]) -> list[str]:
    """What a step on several slices sends that it must not, a line each.

    Args:
      far: from `between_slices`.
      near: from `judge`, of a step on one of the slices.
    """
    lines = _strangers(far)
    between, within = sent(far, BETWEEN), sent(near, GRADIENT) + sent(near, METRICS)
    if between > within:
        lines.append(
            f"between slices: expected no more than is summed within one, {within:,} bytes, found {between:,}"
        )
    return lines


def _strangers(uses: list[Use]) -> list[str]:
    found = [use.collective for use in uses if not use.role]
    return [f"{c.kind} of {c.bytes:,} bytes in {c.place}" for c in found]


def _sizes(program: TrainProgram) -> list[tuple[str, int]]:
    """Of every array of parameters: where it belongs, and its numbers on a device, whole along `fsdp`."""
    params = jax.eval_shape(program.model.init, jax.random.key(0))
    places = jax.tree.leaves(sharding.shardings(program.mesh, params))
    parts = [program.mesh.shape["tensor"] if "tensor" in place.spec else 1 for place in places]
    leaves = jax.tree.leaves_with_path(params)
    return [(path[0].key, x.size // n) for (path, x), n in zip(leaves, parts, strict=True)]


def _parameters_of_a_device(program: TrainProgram) -> int:
    return sum(size for _, size in _sizes(program))


def _sums(program: TrainProgram) -> Counter[int]:
    """How often a step may sum gradients of every size, whole or a part along `fsdp`: once for each array."""
    config, tied = (
        program.model.config,
        "kernel" not in jax.eval_shape(program.model.init, jax.random.key(0))["io"],
    )
    # The table of positions is every layer's, and a compiler may leave its sum in each; a tied
    # table is read twice.
    times = {"position": config.depth, "layers": config.depth, "io": 2 if tied else 1}
    found: Counter[int] = Counter()
    for where, size in _sizes(program):
        layers = config.depth if where == "layers" else 1
        for shard in {1, program.mesh.shape["fsdp"]}:
            if size % (layers * shard) == 0:
                found[size // layers // shard] += times[where]
                found[size // shard] += layers > 1  # of all layers at once
    if config.layer == "transformer_xl":
        found[_distances(program) // program.mesh.shape["tensor"]] += config.depth
    return found


def _distances(program: TrainProgram) -> int:
    """Numbers in the table of positions that every layer of Transformer-XL computes from parameters."""
    return (program.model.config.limit + program.config.train.block) * program.model.config.width


def _counts(found: list[collectives.Collective]) -> Counter[int]:
    """How often a step sends arrays of every size."""
    counts: Counter[int] = Counter()
    for collective in found:
        for size in collective.sizes:
            counts[size] += collective.times or 1
    return counts


def sent(uses: list[Use], role: str) -> int:
    """Bytes of a step that are sent for a purpose."""
    return sum(u.collective.bytes * (u.collective.times or 1) for u in uses if u.role == role)


def summary(uses: list[Use]) -> list[dict[str, Any]]:
    """Uses that differ in origin or place alone, added up: role, kind, axes, times, count and bytes of a step."""
    groups: dict[tuple, list[collectives.Collective]] = defaultdict(list)
    for role, axes, found in uses:
        groups[role or "must not be", found.kind, axes, found.times or 1].append(found)
    rows = []
    for (role, kind, axes, times), group in sorted(groups.items()):
        row = {"role": role, "kind": kind, "axes": list(axes), "times": times, "count": len(group)}
        rows.append(
            {
                **row,
                "bytes": times * sum(c.bytes for c in group),
                "from": sorted({origin(c) for c in group}),
            }
        )
    return rows


def origin(found: collectives.Collective) -> str:
    """Where a collective comes from, without what all names have in common."""
    if not found.place:
        return "no name"
    inside = (
        "backward"
        if "transpose(" in found.place
        else "forward"
        if "jvp(" in found.place
        else "update"
    )
    return f"{inside} {found.place.rpartition('/')[2].strip(')(')}"


def table(uses: list[Use]) -> list[str]:
    """The summary as lines of text."""
    lines = [f"  {'':20}{'kind':24}{'axes':20}{'MB of a step':>13}{'count':>7}{'times':>7}  from"]
    for row in summary(uses):
        figures = f"{row['bytes'] / 1e6:>13.3f}{row['count']:>7}{row['times']:>7}"
        lines.append(
            f"  {row['role']:20}{row['kind']:24}{','.join(row['axes']):20}{figures}  {', '.join(row['from'])}"
        )
    return lines
