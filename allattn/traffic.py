"""What the collectives of a training step are for, and which of them must not be.

A step may reduce gradients over rows, gather what fsdp splits, and reduce norms and metrics once; where heads are split
as well, it sums activations over `tensor`. Anything else is a mistake in the sharding, above all a collective inside
the attention operation.
"""

from collections import defaultdict
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from allattn import hlo, sharding
from allattn.train import Program

SMALL = 65_536  # bytes that norms and metrics may take together
GRADIENT, GATHER, METRICS, ACTIVATION = "gradient reduction", "fsdp gather", "norms and metrics", "activations"
BETWEEN = "sums between slices"


class Use(NamedTuple):
    """A collective and what it is for."""

    role: str  # "": nothing that a step needs
    axes: tuple[str, ...]  # of the mesh, along which it moves data
    collective: hlo.Collective


def judge(found: list[hlo.Collective], program: Program) -> list[Use]:
    """What every collective of a step is for.

    Args:
      found: from `hlo.collectives`, of a step on one slice.
      program: whose step it is; tells collectives of parameters by their sizes.
    """
    sizes = _parameter_sizes(program)
    uses = []
    for collective in found:
        axes = _axes(collective, program.mesh)
        uses.append(Use(_role(collective, axes, sizes, program.model.config.depth), axes, collective))
    return uses


def between_slices(found: list[hlo.Collective]) -> list[Use]:
    """What a step on several slices sends between them: sums, and nothing else."""
    far = [collective for collective in found if collective.kind.endswith(hlo.OVER_SLICES)]
    return [Use(BETWEEN if c.kind.startswith("all-reduce") else "", ("slices",), c) for c in far]


def _role(found: hlo.Collective, axes: tuple[str, ...], sizes: set[int], depth: int) -> str:
    reduces, once = found.kind in ("all-reduce", "reduce-scatter"), found.times == 1
    if sharding.OPERATION in found.place or found.times is None:
        return ""
    if reduces and once and max(found.sizes) <= depth:  # a number, or one for every layer
        return METRICS
    of_parameters = all(size in sizes for size in found.sizes)
    backward = once or "transpose(" in found.place or not found.place  # where several are joined, names may be lost
    if reduces and of_parameters and backward and set(axes) & set(sharding.ROWS):
        return GRADIENT
    if found.kind == "all-gather" and of_parameters and axes == ("fsdp",):
        return GATHER
    return ACTIVATION if found.kind == "all-reduce" and axes == ("tensor",) else ""


def _axes(found: hlo.Collective, mesh: Mesh) -> tuple[str, ...]:
    """Axes of the mesh along which devices of a group differ."""
    shape = tuple(mesh.shape[axis] for axis in sharding.AXES)
    places = np.stack(np.unravel_index(np.array(found.groups), shape))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, differs in zip(sharding.AXES, differ, strict=True) if differs)


def _parameter_sizes(program: Program) -> set[int]:
    """Elements that an array of parameters or of their gradients may have: of a layer or of all, whole or a shard."""
    config, shape = program.model.config, program.mesh.shape
    params = jax.eval_shape(program.model.init, jax.random.key(0))
    whole = {1, *(x.size for x in jax.tree.leaves(params))}
    whole |= {x.size // config.depth for x in jax.tree.leaves(params["layers"])}
    if config.layer == "transformer_xl":  # every layer computes its table of positions from parameters
        whole.add((config.limit + program.config.train.block) * config.width)
    parts = {1, shape["fsdp"], shape["tensor"], shape["fsdp"] * shape["tensor"]}
    return {size // part for size in whole for part in parts if size % part == 0}


def violations(uses: list[Use]) -> list[str]:
    """Collectives that have no business in a step, a line each."""
    lines = [f"{u.collective.kind} of {u.collective.bytes:,} bytes in {u.collective.place}" for u in uses if not u.role]
    if (small := sent(uses, METRICS)) > SMALL:
        lines.append(f"norms and metrics: expected at most {SMALL:,} bytes, found {small:,}")
    if (far := sent(uses, BETWEEN)) > (near := sent(uses, GRADIENT) + sent(uses, METRICS)):
        lines.append(f"between slices: expected no more than is summed within one, {near:,} bytes, found {far:,}")
    return lines


def sent(uses: list[Use], role: str) -> int:
    """Bytes of a step that are sent for a purpose."""
    return sum(u.collective.bytes * (u.collective.times or 1) for u in uses if u.role == role)


def summary(uses: list[Use]) -> list[dict[str, Any]]:
    """Uses that differ in origin or place alone, added up: role, kind, axes, times, count and bytes of a step."""
    groups: dict[tuple, list[hlo.Collective]] = defaultdict(list)
    for role, axes, found in uses:
        groups[role or "must not be", found.kind, axes, found.times or 1].append(found)
    rows = []
    for (role, kind, axes, times), group in sorted(groups.items()):
        row = {"role": role, "kind": kind, "axes": list(axes), "times": times, "count": len(group)}
        rows.append({**row, "bytes": times * sum(c.bytes for c in group), "from": sorted({origin(c) for c in group})})
    return rows


def origin(found: hlo.Collective) -> str:
    """Where a collective comes from, without what all names have in common."""
    if not found.place:
        return "no name"
    inside = "backward" if "transpose(" in found.place else "forward" if "jvp(" in found.place else "update"
    return f"{inside} {found.place.rpartition('/')[2].strip(')(')}"


def table(uses: list[Use]) -> list[str]:
    """The summary as lines of text."""
    lines = [f"  {'':20}{'kind':16}{'axes':20}{'MB of a step':>13}{'count':>7}{'times':>7}  from"]
    for row in summary(uses):
        figures = f"{row['bytes'] / 1e6:>13.3f}{row['count']:>7}{row['times']:>7}"
        lines.append(f"  {row['role']:20}{row['kind']:16}{','.join(row['axes']):20}{figures}  {', '.join(row['from'])}")
    return lines
