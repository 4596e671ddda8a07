r"""Collectives of a compiled program: which, how large, how often, between which devices.

The text (HLO) names every computation and lists its instructions. It is walked from the entry: a
loop multiplies by its number of rounds, and of a conditional the branch that moves most bytes
counts. What the forms look like, shortened; `TEXT` in tests/planning/test_compile.py has each of
them whole:

    a computation     %body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
    a collective      %x = f32[4,8]{1,0} all-reduce(%h), replica_groups={{0,2},{1,3}}, to_apply=%add
    an asynchronous   %y = (f32[2,8], f32[4,8]) all-gather-start(%h), replica_groups=[4,2]<=[8]
    pair              %z = f32[4,8] all-gather-done(%y)
    a TPU's           %f = bf16[4,8] fusion(%h), calls=%all-reduce-scatter.1
    between slices    %s = (bf16[2,8], ...) send(%h), ..., _xla_megascale_transfer_type="ALL_REDUCE"
    a loop            %w = (...) while(%state), condition=%below, body=%body
    a conditional     %c = f32[4] conditional(%which, ...), branch_computations={%short, %long}

Shapes are of one device. How a form of the device groups is read is at `_groups`.

Dimension key: none; the text has shapes, not arrays.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)

# What stands behind the kind of a collective that goes through the hosts: a send and a receive of
# one TPU slice with the others.
OVER_SLICES = " over slices"

# --- forms of lines ------------------------------------------------------------------------------

# `ENTRY %main (...) -> ... {` or `%body (...) -> ... {`: groups ENTRY, name.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")

# `= f32[4,8] all-reduce(` or `= (...) all-gather-start(`: groups result, kind, -start.
_COLLECTIVE = re.compile(rf"= (.*?) ((?:ragged-)?(?:{'|'.join(KINDS)}))(-start)?\(")

# `= (bf16[2,8,128], ...) send(`: groups dtype, shape, kind.
_SEND = re.compile(r'= \((\w+)\[([\d,]*)\].* send\(.*megascale_transfer_type="(\w+)"')

# A line that runs another computation once: a fusion, a call.
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")

# Groups: condition, body.
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")

# Groups: the list of branches, or the two of a boolean.
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)"
)

# Later parts of a collective that was begun before: of an asynchronous pair, or on a TPU of one
# that runs within other work. They are no further collectives.
_CONTINUED = re.compile(
    r" async-(?:update|done)\(|async_collective_fusion_config\":\{\"flag_start\":\"(?!-1)"
)

# An array in a result, such as `bf16[4,8]`: groups dtype, shape.
_ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")

# The names of the functions that an instruction comes from.
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# Device groups: `{{0,2},{1,3}}`.
_LIST = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[^=]*?\})\}")

# Devices in order, in a shape whose axes are then reordered: `[2,2,2]T(2,1,0)`.
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"

# Device groups: `[4,2]<=[2,2,2]T(2,1,0)`, four groups of two.
_TILED = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")

# Device groups: `mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}`, along the axis b.
_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    # One of `KINDS`; between slices with `OVER_SLICES` behind it.
    kind: str
    # Elements of each whole array: reduced, the result of a gather, or what is scattered.
    sizes: tuple[int, ...]
    # Bytes of all of them.
    bytes: int
    # Devices of a slice that take part together, by their index in the mesh.
    groups: tuple[tuple[int, ...], ...]
    # How often a step does it; None: known only when it runs.
    times: int | None
    # Names of the functions that it comes from, joined by "/"; "" where the compiler lost them.
    op_name: str


def parse(text: str) -> list[Collective]:
    """All collectives of a program.

    Args:
      text: a compiled program, from `as_text()`, for CPUs, GPUs or TPUs.

    Returns:
      The collectives, in the order of the text; an asynchronous pair counts once.

    Raises:
      LookupError: a form of device groups that is not known.
    """
    return list(_Program(text).walk("ENTRY", 1))


class _Program:
    """The computations of a program, by name."""

    def __init__(self, text: str) -> None:
        # The lines of every computation.
        self.lines: dict[str, list[str]] = {}
        current: list[str] = []
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header is None:
                current.append(line)
                continue
            name = "ENTRY" if header[1] else header[2]
            current = []
            self.lines[name] = current
        # The devices of one slice.
        partitions = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(partitions[1]) if partitions else 1

    def walk(self, name: str, times: int | None, caller: str = "") -> Iterator[Collective]:
        """Collectives of a computation and of those that it calls.

        Args:
          name: of the computation.
          times: how often a step runs it; None: not known.
          caller: the line that calls it, which may have the names of the functions it comes from.
        """
        for line in self.lines[name]:
            if _CONTINUED.search(line):
                continue
            if match := _COLLECTIVE.search(line):
                yield self.collective(line, match, name, times, caller)
            elif match := _SEND.search(line):
                yield self.send(match, times)
            elif match := _WHILE.search(line):
                condition, body = match.groups()
                yield from self.walk(body, _product(times, self.rounds(line, condition, body)))
            elif match := _BRANCHES.search(line):
                yield from self.largest_branch(match, times)
            elif match := _CALLS.search(line):
                yield from self.walk(match[1], times, line)

    def largest_branch(self, match: re.Match, times: int | None) -> list[Collective]:
        """Collectives of the branch of a conditional that moves most bytes."""
        names = match[1] or f"{match[2]},{match[3]}"
        branches = [list(self.walk(name.strip(" %"), times)) for name in names.split(",")]
        return max(branches, key=_bytes_moved)

    # --- loops

    def rounds(self, line: str, condition: str, body: str) -> int | None:
        """The number of rounds of a loop; None: not known before it runs."""
        # The compiler may have noted it.
        noted = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if noted:
            return int(noted[1])
        # Otherwise the condition compares a counter with one number.
        condition_text = "\n".join(self.lines[condition])
        limits = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", condition_text)
        if len(limits) != 1 or "direction=LT" not in condition_text:
            return None
        stride = self.stride(condition_text, "\n".join(self.lines[body]))
        return math.ceil(int(limits[0]) / stride)

    def stride(self, condition_text: str, body_text: str) -> int:
        """What a round adds to the counter: 1, or more where the compiler joins several rounds."""
        # The counter's index in the state, from the condition, and its new value, from the body.
        index = re.search(r"get-tuple-element\(.*\), index=(\d+)", condition_text)
        state = re.search(r"ROOT .* tuple\((.*?)\)", body_text)
        if not index or not state:
            return 1
        counter = re.findall(r"%[\w.\-]+", state[1])[int(index[1])]
        # `%add.5 = u32[] add(%counter, %constant.2)`, `%constant.2 = u32[] constant(2)`
        added = re.search(rf"{re.escape(counter)} = \S+ add\(%[\w.\-]+, (%[\w.\-]+)\)", body_text)
        if not added:
            return 1
        number = re.search(rf"{re.escape(added[1])} = \S+ constant\((\d+)\)", body_text)
        return int(number[1]) if number else 1

    # --- one collective

    def collective(
        self, line: str, match: re.Match, computation: str, times: int | None, caller: str
    ) -> Collective:
        """The collective of a line that `_COLLECTIVE` matches."""
        result, kind, start = match.groups()
        groups = tuple(tuple(group) for group in _groups(line, self.devices))
        arrays = self.concatenated_arrays(line, computation) or _ARRAY.findall(result)
        # The result of an asynchronous start lists operands, results, and for some kinds the state
        # of the transfer.
        if start and kind != "all-reduce":
            arrays = [array for array in arrays if array != ("u32", "")]
            arrays = arrays[len(arrays) // 2 :]
        sizes = [math.prod(_numbers(shape)) for _, shape in arrays]
        # A reduce-scatter's result is a part. A TPU writes it as an all-reduce, of the whole, in a
        # computation with a name of its own.
        if kind == "reduce-scatter":
            sizes = [size * len(groups[0]) for size in sizes]
        elif computation.startswith("all-reduce-scatter"):
            kind = "reduce-scatter"
        total = sum(size * _bytes_of(dtype) for size, (dtype, _) in zip(sizes, arrays, strict=True))
        op_name = _OP_NAME.search(line) or _OP_NAME.search(caller)
        return Collective(
            kind=kind,
            sizes=tuple(sizes),
            bytes=total,
            groups=groups,
            times=times,
            op_name=op_name[1] if op_name else "",
        )

    def send(self, match: re.Match, times: int | None) -> Collective:
        """The collective between slices of a line that `_SEND` matches."""
        dtype, shape, transfer = match.groups()
        size = math.prod(_numbers(shape))
        return Collective(
            kind=transfer.lower().replace("_", "-") + OVER_SLICES,
            sizes=(size,),
            bytes=size * _bytes_of(dtype),
            groups=((),),
            times=times,
            op_name="",
        )

    def concatenated_arrays(self, line: str, computation: str) -> list[tuple[str, str]]:
        """Dtypes and shapes of the arrays that a GPU's compiler concatenates to sum them as one.

        Empty where the operand is no concatenation.
        """
        operand = re.search(r"\((%wrapped_concatenate[\w.\-]*)\)", line)
        if not operand:
            return []
        # The line that computes the operand names the computation whose parameters are the arrays.
        definition = next(other for other in self.lines[computation] if f"{operand[1]} = " in other)
        called = _CALLS.search(definition)
        if not called:
            return []
        concatenation = "\n".join(self.lines[called[1]])
        return re.findall(r" = (\w+)\[([\d,]*)\]\S* parameter\(", concatenation)


def _product(times: int | None, rounds: int | None) -> int | None:
    """Rounds of a loop that runs so many times; None where one of both is not known."""
    if times is None or rounds is None:
        return None
    return times * rounds


def _bytes_moved(branch: list[Collective]) -> int:
    return sum(collective.bytes * (collective.times or 1) for collective in branch)


def _bytes_of(dtype: str) -> int:
    """Bytes of an element: the number in `f32` counts bits, and `pred` has none."""
    bits = re.search(r"\d+", dtype)
    if not bits:
        return 1
    return max(1, int(bits[0]) // 8)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# --- device groups -------------------------------------------------------------------------------


def _groups(line: str, devices: int) -> list[list[int]]:
    """Devices that take part together, from one of four forms.

    Args:
      line: an instruction.
      devices: how many there are.
    """
    # {{0,2},{1,3}}: the groups themselves.
    if match := _LIST.search(line):
        return [_numbers(group) for group in match[1].split("}")[:-1]]
    # [4,2]<=[2,2,2]T(2,1,0): devices in order in the second shape, its axes reordered, then read
    # as four groups of two.
    if match := _TILED.search(line):
        shape, order, transposed = match.groups()
        return _iota(order, transposed).reshape(_numbers(shape)).tolist()
    # mesh['a'=1,'b'=4,'c'=2] {'b'}: along the axes that are named last.
    if match := _MESH.search(line):
        return _mesh_groups(match)
    # {}: all devices.
    if "replica_groups={}" in line:
        return [list(range(devices))]
    raise LookupError(f"no known form of device groups: {line.strip()[:200]}")


def _mesh_groups(match: re.Match) -> list[list[int]]:
    """Groups of devices that differ along some axes of a mesh."""
    mesh, order, transposed, along = match.groups()
    names = re.findall(r"'(\w+)'=", mesh)
    sizes = _numbers(re.sub(r"'\w+'=", "", mesh))
    # Without `device_ids` the devices are in order.
    ids = np.arange(math.prod(sizes))
    if order:
        ids = _iota(order, transposed)
    # Move the axes of the groups behind the others; the rest is one group after another.
    group_axes = [names.index(name) for name in re.findall(r"'(\w+)'", along)]
    other_axes = [axis for axis in range(len(names)) if axis not in group_axes]
    group_size = math.prod(sizes[axis] for axis in group_axes)
    reordered = ids.reshape(sizes).transpose(other_axes + group_axes)
    return reordered.reshape(-1, group_size).tolist()


def _iota(shape: str, transposed: str | None) -> np.ndarray:
    """Devices in order, in a shape whose axes are then reordered."""
    sizes = _numbers(shape)
    array = np.arange(math.prod(sizes)).reshape(sizes)
    if transposed is None:
        return array
    return array.transpose(_numbers(transposed))
