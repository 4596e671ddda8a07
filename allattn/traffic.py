"""What the collectives of a training step are for, and which of them must not be.

A step may reduce gradients over rows, gather what fsdp splits, and reduce norms and metrics once; where heads are split
as well, it sums activations over `tensor`. Anything else is a mistake in the sharding, above all a collective inside
the attention operation.
"""

import itertools
import math
from collections import defaultdict
from typing import Any, NamedTuple

import jax
import numpy as np

from allattn import hlo, sharding
from allattn.train import Program

SMALL = 65_536  # bytes that norms and metrics may take together; no activation is as small
TILE = 1024  # elements
GRADIENT, GATHER, METRICS, ACTIVATION = "gradient reduction", "fsdp gather", "norms and metrics", "activations"


class Use(NamedTuple):
    """A collective and what it is for."""

    role: str  # "": nothing that a step needs
    axes: tuple[str, ...]  # of the mesh, along which it moves data
    collective: hlo.Collective


def judge(found: list[hlo.Collective], program: Program) -> list[Use]:
    """What every collective of a step is for.

    Args:
      found: from `hlo.collectives`.
      program: whose step it is; tells collectives of parameters by their sizes.
    """
    return list(map(_Judge(program).use, found))


class _Judge:
    """Knows the mesh, and the sizes of what a step may send.

    The program for several slices is that of one of them. A sum over rows is three collectives there: a reduce-scatter
    within the slice, a sum between slices, and a gather of the sums. They have lost their names, small arrays are
    joined and others padded to whole tiles, so that they are judged by their sizes alone, and less strictly. On one
    slice the same mesh gives the same collectives with names.
    """

    def __init__(self, program: Program) -> None:
        self.shape, self.depth = dict(program.mesh.shape), program.model.config.depth
        self.slices = sharding.slices(list(program.mesh.devices.flat))
        self.sizes = _parameter_sizes(program, (*list(self.shape.values())[1:], self.shape["data"] // self.slices))

    def use(self, found: hlo.Collective) -> Use:
        axes = self.axes(found)
        return Use(self.role(found, axes), axes, found)

    def axes(self, found: hlo.Collective) -> tuple[str, ...]:
        """Axes of the mesh along which devices of a group differ."""
        if found.kind == hlo.BETWEEN_SLICES:
            return ("slices",)
        places = np.stack(np.unravel_index(np.array(found.groups), tuple(self.shape.values())))
        differ = (places != places[:, :, :1]).any(axis=(1, 2))
        return tuple(axis for axis, differs in zip(self.shape, differ, strict=True) if differs)

    def role(self, found: hlo.Collective, axes: tuple[str, ...]) -> str:
        reduces = found.kind in ("all-reduce", "reduce-scatter", hlo.BETWEEN_SLICES)
        if sharding.OPERATION in found.place or found.times is None:
            return ""
        if reduces and found.times == 1 and max(found.sizes) <= self.depth:  # a number, or one for every layer
            return METRICS
        # where collectives are joined, names may be lost
        backward = found.times == 1 or "transpose(" in found.place or not found.place
        over_rows, of_parameters = bool({*sharding.ROWS, "slices"} & set(axes)), self.of_parameters(found)
        if reduces and of_parameters and backward and over_rows:
            return GRADIENT
        if found.kind == "all-gather" and of_parameters and axes == ("fsdp",):
            return GATHER
        if found.kind == "all-gather" and of_parameters and over_rows and self.slices > 1:
            return GRADIENT
        return ACTIVATION if found.kind == "all-reduce" and axes == ("tensor",) else ""

    def of_parameters(self, found: hlo.Collective) -> bool:
        """Whether arrays have sizes of parameters or their gradients."""
        if self.slices == 1:
            return set(found.sizes) <= self.sizes
        padded = all(any(size <= sent < size + TILE for size in self.sizes) for sent in found.sizes)
        return found.bytes <= SMALL or padded


def _parameter_sizes(program: Program, split: tuple[int, ...]) -> set[int]:
    """Elements that an array of parameters or of their gradients may have: of a layer or of all, whole or a shard."""
    config = program.model.config
    params = jax.eval_shape(program.model.init, jax.random.key(0))
    whole = {1, *(x.size for x in jax.tree.leaves(params))}
    whole |= {x.size // config.depth for x in jax.tree.leaves(params["layers"])}
    if config.layer == "transformer_xl":  # every layer computes its table of positions from parameters
        whole.add((config.limit + program.config.train.block) * config.width)
    parts = {math.prod(chosen) for n in range(len(split) + 1) for chosen in itertools.combinations(split, n)}
    return {size // part for size in whole for part in parts if size % part == 0}


def violations(uses: list[Use]) -> list[str]:
    """Collectives that have no business in a step, a line each."""
    lines = [f"{u.collective.kind} of {u.collective.bytes:,} bytes in {u.collective.place}" for u in uses if not u.role]
    small = sum(u.collective.bytes for u in uses if u.role == METRICS)
    return lines + ([f"norms and metrics: expected at most {SMALL} bytes, found {small}"] if small > SMALL else [])


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
