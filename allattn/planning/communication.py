"""What the collectives of a training step are for, and which of them no rule allows.

A step may send this and nothing else; sizes and counts are read from the compiled text:

gradient reduction
    Sums over `data` and `fsdp` of arrays as large as a parameter, or its part along `fsdp`. For
    each size, at most (parameters of that size) x `train.accumulation` sums (`allowed_reductions`).
    They are counted by size, since a sum of activations may be as large as that of a kernel's
    gradient: then it is one too many.
fsdp gather
    Gathers over `fsdp` of arrays as large as a parameter. A TPU may also send their parts around a
    ring while it multiplies. Together at most three times the parameters, four where the backward
    pass computes something again (`train.recomputation`).
whole matrices
    With `optimizer.name=muon`, gathers of gradients and of their means before the update, over
    `fsdp` and `tensor`: of each along each axis no more numbers than the parameters have.
norms and metrics
    Single numbers, or one for every layer, once a step, together at most 64 KiB.
activations
    With `mesh.tensor` > 1, sums over `tensor`: in a layer one forward and two backward (keys and
    values; queries), or all in one on Transformer-XL, and the forward one again where projections
    are computed again. A feed-forward sublayer has two more, and the step one behind the loss. They
    are named, but not counted.
sums between slices
    Of several TPU slices: no more bytes than are summed within one.
unexpected
    Anything else, above all a collective inside the attention operation. Each is a mistake in the
    sharding, and makes `allattn compile` fail.

Tests in tests/planning/test_compile.py put such mistakes into a step and expect to find them.

Dimension key: A axis of the mesh, G group of devices, N device in its group.
"""

import enum
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from allattn import sharding
from allattn.model.parameters import parameter_count
from allattn.planning.collectives import OVER_SLICES, Collective
from allattn.train import TrainProgram, recomputation

# Bytes that norms and metrics may take together.
MAX_METRIC_BYTES = 65_536

# Gathers of every parameter in a pass: forward, backward, and its gradient where that is sent round
# the same ring. Recomputation gathers it once more.
GATHERS_OF_A_PARAMETER = 3

# What Muon needs whole of every matrix: its gradient, and the mean of that.
WHOLE_MATRICES = 2


class Purpose(enum.Enum):
    """What a collective is for; the values are the words that are printed and stored."""

    # Over the rows' axes, in the backward pass.
    GRADIENT_REDUCTION = "gradient reduction"
    # Before a parameter is used.
    FSDP_GATHER = "fsdp gather"
    # Before Muon's update, which needs them as they are on one device.
    WHOLE_MATRICES = "whole matrices"
    # After the backward pass: reach of the spans, norm of the gradient, spans after the update.
    METRICS = "norms and metrics"
    # Where heads are split.
    ACTIVATION = "activations"
    # Where the mesh has several TPU slices.
    BETWEEN_SLICES = "sums between slices"
    # No rule allows it.
    UNEXPECTED = "unexpected"


class ClassifiedCollective(NamedTuple):
    """A collective and what it is for."""

    purpose: Purpose
    # Axes of the mesh along which it moves data; between slices ("slices",).
    axes: tuple[str, ...]
    collective: Collective


# --- what a collective is for --------------------------------------------------------------------


def classify(sent: Iterable[Collective], program: TrainProgram) -> list[ClassifiedCollective]:
    """What every collective of a step is for.

    Args:
      sent: collectives of a step on one slice, from `collectives.parse`.
      program: whose step it is; tells collectives of parameters by their sizes.

    Returns:
      The collectives that move data, in the order of the text.
    """
    # Only sizes tell collectives of parameters from others: the text has no names of arrays.
    parameter_sizes = set(allowed_reductions(program))
    depth = program.model.config.depth
    muon = _has_muon(program)
    classified = []
    for collective in sent:
        axes = _axes(collective, program.mesh)
        # Without axes each device sends to itself.
        if axes:
            purpose = _purpose(collective, axes, parameter_sizes, depth, muon)
            classified.append(ClassifiedCollective(purpose, axes, collective))
    return classified


def classify_between_slices(sent: Iterable[Collective]) -> list[ClassifiedCollective]:
    """What a step on several slices sends between them, and what it sends inside the operation.

    The compiler rewrites what happens within a slice beyond recognition, so all other collectives
    are left out: a step on one of the slices is classified instead.

    Args:
      sent: collectives of a step on several slices, from `collectives.parse`.

    Returns:
      The collectives between slices, then those inside the operation, which are unexpected.
    """
    between = []
    inside = []
    for collective in sent:
        if collective.kind.endswith(OVER_SLICES):
            # Gradients and metrics alone pass between slices, and both are sums.
            is_sum = collective.kind.startswith("all-reduce")
            purpose = Purpose.BETWEEN_SLICES if is_sum else Purpose.UNEXPECTED
            between.append(ClassifiedCollective(purpose, ("slices",), collective))
        if sharding.OPERATION in collective.op_name:
            inside.append(ClassifiedCollective(Purpose.UNEXPECTED, (), collective))
    return between + inside


def _purpose(
    collective: Collective,
    axes: tuple[str, ...],
    parameter_sizes: set[int],
    depth: int,
    muon: bool,
) -> Purpose:
    """The purpose of a collective within a slice.

    Args:
      collective: of a step on one slice.
      axes: along which it moves data.
      parameter_sizes: numbers in the arrays of parameters, from `allowed_reductions`.
      depth: layers of the model; arrays of one number for every layer are norms.
      muon: the update rule needs whole matrices.
    """
    # Inside the operation nothing is sent, and everything else runs a known number of times.
    if sharding.OPERATION in collective.op_name or collective.times is None:
        return Purpose.UNEXPECTED
    reduces = collective.kind in ("all-reduce", "reduce-scatter")
    once = collective.times == 1
    if reduces and once and max(collective.sizes) <= depth:
        return Purpose.METRICS
    # Norms may be joined with gradients.
    of_parameters = all(size in parameter_sizes or size <= depth for size in collective.sizes)
    # Gradients are summed in the backward pass. Where several are joined, names may be lost.
    backward = once or "transpose(" in collective.op_name or not collective.op_name
    over_rows = bool(set(axes) & set(sharding.ROWS))
    if reduces and of_parameters and backward and over_rows:
        return Purpose.GRADIENT_REDUCTION
    # A TPU sends a kernel's parts, or its gradient's, round a ring while it multiplies.
    gathers = collective.kind in ("all-gather", "collective-permute")
    if gathers and of_parameters and axes == ("fsdp",):
        return Purpose.FSDP_GATHER
    in_update = once and "jvp(" not in collective.op_name
    if muon and in_update and gathers and set(axes) <= {"fsdp", "tensor"}:
        return Purpose.WHOLE_MATRICES
    if collective.kind == "all-reduce" and axes == ("tensor",):
        return Purpose.ACTIVATION
    return Purpose.UNEXPECTED


def _axes(collective: Collective, mesh: Mesh) -> tuple[str, ...]:
    """Axes of the mesh along which the devices of a group differ."""
    shape = tuple(mesh.shape[axis] for axis in sharding.AXES)
    devices_GN = np.array(collective.groups)
    # Where every device is in the mesh, and whether that differs from the first one of its group.
    coordinate_AGN = np.stack(np.unravel_index(devices_GN, shape))
    differs_A = (coordinate_AGN != coordinate_AGN[:, :, :1]).any(axis=(1, 2))
    return tuple(axis for axis, differs in zip(sharding.AXES, differs_A, strict=True) if differs)


# --- collectives that no rule allows -------------------------------------------------------------


def unexpected(classified: list[ClassifiedCollective], program: TrainProgram) -> list[str]:
    """Collectives of a step that no rule allows.

    A sum or gather of activations may have the size of a parameter's, so these are counted as well:
    what is sent of parameters and gradients is no more than there is of them.

    Args:
      classified: from `classify`.
      program: whose step it is.

    Returns:
      A line for each mistake.
    """
    return [
        *_without_purpose(classified),
        *_too_many_metrics(classified),
        *_too_many_reductions(classified, program),
        *_too_many_gathers(classified, program),
        *_too_many_whole_matrices(classified, program),
    ]


def unexpected_between_slices(
    between: list[ClassifiedCollective], within: list[ClassifiedCollective]
) -> list[str]:
    """Collectives of a step on several slices that no rule allows.

    Args:
      between: from `classify_between_slices`.
      within: from `classify`, of a step on one of the slices.

    Returns:
      A line for each mistake.
    """
    lines = list(_without_purpose(between))
    sent = bytes_for(between, Purpose.BETWEEN_SLICES)
    # What is summed within a slice is summed between slices once more.
    gradients = bytes_for(within, Purpose.GRADIENT_REDUCTION)
    allowed = gradients + bytes_for(within, Purpose.METRICS)
    if sent > allowed:
        expected = f"no more than is summed within one, {allowed:,} bytes"
        lines.append(f"between slices: expected {expected}, found {sent:,}")
    return lines


def _without_purpose(classified: list[ClassifiedCollective]) -> Iterator[str]:
    for purpose, _, collective in classified:
        if purpose is Purpose.UNEXPECTED:
            yield f"{collective.kind} of {collective.bytes:,} bytes in {collective.op_name}"


def _too_many_metrics(classified: list[ClassifiedCollective]) -> Iterator[str]:
    sent = bytes_for(classified, Purpose.METRICS)
    if sent > MAX_METRIC_BYTES:
        purpose = Purpose.METRICS.value
        yield f"{purpose}: expected at most {MAX_METRIC_BYTES:,} bytes, found {sent:,}"


def _too_many_reductions(
    classified: list[ClassifiedCollective], program: TrainProgram
) -> Iterator[str]:
    """Gradient reductions of a size of which there are fewer parameters, for each axis of rows."""
    allowed = allowed_reductions(program)
    accumulation = program.config.train.accumulation
    purpose = Purpose.GRADIENT_REDUCTION
    for axis in sharding.ROWS:
        along_axis = [c for c in classified if c.purpose is purpose and axis in c.axes]
        for size, sent in _counts_by_size(along_axis).items():
            most = allowed[size] * accumulation
            # Smaller arrays are norms that were joined with gradients.
            if size > program.model.config.depth and sent > most:
                what = f"{purpose.value} over {axis} of {size:,} numbers"
                yield f"{what}: expected at most {most} times, found {sent}"


def _too_many_gathers(
    classified: list[ClassifiedCollective], program: TrainProgram
) -> Iterator[str]:
    """More numbers gathered than the passes over the parameters need."""
    train = program.config.train
    purpose = Purpose.FSDP_GATHER
    counts = _counts_by_size([c for c in classified if c.purpose is purpose])
    gathered = sum(size * count for size, count in counts.items())
    # Every part of an accumulated batch is a pass. Muon's gradients and means look alike.
    platform = program.mesh.devices.flat[0].platform
    again = recomputation(program.config, program.config.model.span.limit, platform)
    passes = train.accumulation * (GATHERS_OF_A_PARAMETER + bool(again))
    passes += WHOLE_MATRICES * _has_muon(program)
    most = passes * sum(size for _, size in _parameter_sizes(program))
    if gathered > most:
        yield f"{purpose.value}: expected at most {most:,} numbers, found {gathered:,}"


def _too_many_whole_matrices(
    classified: list[ClassifiedCollective], program: TrainProgram
) -> Iterator[str]:
    """More numbers made whole for Muon than gradients and means have, along `fsdp` and `tensor`."""
    purpose = Purpose.WHOLE_MATRICES
    counts = _counts_by_size([c for c in classified if c.purpose is purpose])
    gathered = sum(size * count for size, count in counts.items())
    most = 2 * WHOLE_MATRICES * parameter_count(_abstract_parameters(program))
    if gathered > most:
        yield f"{purpose.value}: expected at most {most:,} numbers, found {gathered:,}"


def _has_muon(program: TrainProgram) -> bool:
    return program.config.optimizer.name == "muon"


def _counts_by_size(classified: list[ClassifiedCollective]) -> Counter[int]:
    """How often a step sends arrays of every size."""
    counts: Counter[int] = Counter()
    for _, _, collective in classified:
        for size in collective.sizes:
            counts[size] += collective.times or 1
    return counts


# --- the sizes of parameters ---------------------------------------------------------------------


def allowed_reductions(program: TrainProgram) -> Counter[int]:
    """How often a step may sum gradients of every size: once for each array that has it.

    The table of positions is every layer's, and a compiler may leave its sum in each layer. A table
    that input and output share is read twice, so it is summed twice.

    Args:
      program: whose step it is.

    Returns:
      From numbers of an array on a device, whole or its part along `fsdp`, to the number of sums.
    """
    config = program.model.config
    parameters = _abstract_parameters(program)
    tied = "kernel" not in parameters["io"]
    sums_of_array = {"position": config.depth, "layers": config.depth, "io": 2 if tied else 1}
    allowed: Counter[int] = Counter()
    for branch, size in _parameter_sizes(program):
        layers = config.depth if branch == "layers" else 1
        for shards in {1, program.mesh.shape["fsdp"]}:
            # An axis that does not divide an array leaves it whole.
            if size % (layers * shards):
                continue
            allowed[size // layers // shards] += sums_of_array[branch]
            # The gradients of all layers may be summed at once.
            if layers > 1:
                allowed[size // shards] += 1
    # The table of positions that every layer of Transformer-XL computes from parameters.
    if config.layer == "transformer_xl":
        numbers = (config.limit + program.config.train.block) * config.width
        allowed[numbers // program.mesh.shape["tensor"]] += config.depth
    return allowed


def _parameter_sizes(program: TrainProgram) -> list[tuple[str, int]]:
    """Every array of parameters: the branch of the tree it is in, and its numbers on a device.

    Split along `tensor`, but whole along `fsdp`.
    """
    parameters = _abstract_parameters(program)
    shardings = jax.tree.leaves(sharding.shardings(program.mesh, parameters))
    sizes = []
    for (path, array), array_sharding in zip(
        jax.tree.leaves_with_path(parameters), shardings, strict=True
    ):
        parts = program.mesh.shape["tensor"] if "tensor" in array_sharding.spec else 1
        sizes.append((path[0].key, array.size // parts))
    return sizes


def _abstract_parameters(program: TrainProgram) -> Any:
    """Shapes and dtypes of the parameters."""
    return jax.eval_shape(program.model.init, jax.random.key(0))


# --- adding up -----------------------------------------------------------------------------------


def bytes_for(classified: list[ClassifiedCollective], purpose: Purpose) -> int:
    """Bytes of whole arrays that a step sends for a purpose."""
    sent = [c.collective for c in classified if c.purpose is purpose]
    return sum(collective.bytes * (collective.times or 1) for collective in sent)


def summary(classified: list[ClassifiedCollective]) -> list[dict[str, Any]]:
    """Rows that `allattn compile` prints and `benchmarks.compile` stores.

    Args:
      classified: from `classify` or `classify_between_slices`.

    Returns:
      A row for all collectives that have these in common: `role` (the purpose), `kind`, `axes`, and
      `times` that a step does each. In it: `count` of them, `bytes` of a step, and where they come
      `from`.
    """
    groups: dict[tuple, list[Collective]] = defaultdict(list)
    for purpose, axes, collective in classified:
        key = (purpose.value, collective.kind, axes, collective.times or 1)
        groups[key].append(collective)
    rows = []
    for (role, kind, axes, times), group in sorted(groups.items()):
        rows.append(
            {
                "role": role,
                "kind": kind,
                "axes": list(axes),
                "times": times,
                "count": len(group),
                "bytes": times * sum(collective.bytes for collective in group),
                "from": sorted({origin(collective) for collective in group}),
            }
        )
    return rows


def origin(collective: Collective) -> str:
    """The pass that a collective comes from and its innermost function, without other names."""
    if not collective.op_name:
        return "no name"
    # JAX's names of what differentiation makes: `jvp(...)`, and `transpose(jvp(...))` behind it.
    if "transpose(" in collective.op_name:
        pass_name = "backward"
    elif "jvp(" in collective.op_name:
        pass_name = "forward"
    else:
        pass_name = "update"
    innermost = collective.op_name.rpartition("/")[2].strip(")(")
    return f"{pass_name} {innermost}"


def table(classified: list[ClassifiedCollective]) -> list[str]:
    """The summary as lines of text."""
    lines = [f"  {'':20}{'kind':24}{'axes':20}{'MB of a step':>13}{'count':>7}{'times':>7}  from"]
    for row in summary(classified):
        names = f"{row['role']:20}{row['kind']:24}{','.join(row['axes']):20}"
        figures = f"{row['bytes'] / 1e6:>13.3f}{row['count']:>7}{row['times']:>7}"
        lines.append(f"  {names}{figures}  {', '.join(row['from'])}")
    return lines
