"""Collectives of a compiled program, read from its text: which, how large, how often, between whom.

The text names every computation and the instructions in it. It is walked from the entry: a loop
multiplies by its number of rounds, of a conditional the branch that moves most counts.
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
OVER_SLICES = (
    " over slices"  # through the hosts: a send and a receive of one TPU slice with the others
)

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COLLECTIVE = re.compile(rf"= (.*?) ((?:ragged-)?(?:{'|'.join(KINDS)}))(-start)?\(")
_SEND = re.compile(r'= \((\w+)\[([\d,]*)\].* send\(.*megascale_transfer_type="(\w+)"')
_CALLS = re.compile(r"(?:calls|to_apply)=%?([\w.\-]+)")
_WHILE = re.compile(r" while\(.*condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(
    r"branch_computations=\{([^}]*)\}|true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)"
)
# Later parts of what was begun before: an asynchronous pair's, or on a TPU one's that runs within
# other work.
_CONTINUED = re.compile(
    r" async-(?:update|done)\(|async_collective_fusion_config\":\{\"flag_start\":\"(?!-1)"
)
_LIST = re.compile(r"(?:replica_groups|source_target_pairs)=\{(\{[^=]*?\})\}")
_IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
_TILED = re.compile(rf"replica_groups=\[([\d,]+)\]<={_IOTA}")
_MESH = re.compile(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({_IOTA}\))? \{{([^}}]*)\}}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One instruction that moves data between devices."""

    kind: str  # one of `KINDS`, where it is between slices with `OVER_SLICES` behind it
    sizes: tuple[int, ...]  # elements of each whole array: reduced, gathered, or to be scattered
    bytes: int  # of all of them
    groups: tuple[
        tuple[int, ...], ...
    ]  # devices of a slice that take part together, by their place in the mesh
    times: int | None  # how often a step does it; None: not known before it runs
    place: str  # names of the functions that it comes from


def collectives(text: str) -> list[Collective]:
    """All collectives of a program.

    Args:
      text: of a compiled program, as `as_text()` gives it, for CPUs, GPUs or TPUs.

    Returns:
      They in the order of the text, those of an asynchronous pair once.

    Raises:
      LookupError: a form of device groups that is not known.
    """
    return list(_Program(text).walk("ENTRY", 1))


class _Program:
    def __init__(self, text: str) -> None:
        self.lines: dict[str, list[str]] = {}
        inside: list[str] = []
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                inside = self.lines["ENTRY" if found[1] else found[2]] = []
            else:
                inside.append(line)
        devices = re.search(r"num_partitions=(\d+)", text)
        self.devices = int(devices[1]) if devices else 1

    def walk(self, name: str, times: int | None, caller: str = "") -> Iterator[Collective]:
        """Collectives of a computation and of those that it calls."""
        for line in self.lines[name]:
            if _CONTINUED.search(line):
                continue
            if found := _COLLECTIVE.search(line):
                yield self.collective(line, found, name, times, caller)
            elif found := _SEND.search(line):
                yield self.sent(found, times)
            elif found := _WHILE.search(line):
                rounds = self.rounds(line, found[1], found[2])
                yield from self.walk(found[2], times and rounds and times * rounds)
            elif found := _BRANCHES.search(line):
                names = [n.strip(" %") for n in (found[1] or f"{found[2]},{found[3]}").split(",")]
                branches = [list(self.walk(n, times)) for n in names]
                yield from max(
                    branches, key=lambda branch: sum(c.bytes * (c.times or 1) for c in branch)
                )
            elif found := _CALLS.search(line):
                yield from self.walk(found[1], times, line)

    def rounds(self, line: str, condition: str, body: str) -> int | None:
        """How often a loop runs: as the compiler noted, or the one number that its counter is compared with."""
        noted = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
        if noted:
            return int(noted[1])
        text = "\n".join(self.lines[condition])
        numbers = re.findall(r"[su]32\[\]\S* constant\((\d+)\)", text)
        if len(numbers) != 1 or "direction=LT" not in text:
            return None
        return -(-int(numbers[0]) // self.stride(text, "\n".join(self.lines[body])))

    def stride(self, condition: str, body: str) -> int:
        """What a round adds to the counter: 1, but where the compiler makes several rounds one."""
        place = re.search(r"get-tuple-element\(.*\), index=(\d+)", condition)
        results = re.search(r"ROOT .* tuple\((.*?)\)", body)
        if not place or not results:
            return 1
        counter = re.findall(r"%[\w.\-]+", results[1])[int(place[1])]
        added = re.search(rf"{re.escape(counter)} = \S+ add\(%[\w.\-]+, (%[\w.\-]+)\)", body)
        number = added and re.search(rf"{re.escape(added[1])} = \S+ constant\((\d+)\)", body)
        return int(number[1]) if number else 1

    def collective(
        self, line: str, found: re.Match, inside: str, times: int | None, caller: str
    ) -> Collective:
        kind, groups = found[2], tuple(map(tuple, _groups(line, self.devices)))
        arrays = self.joined(line, inside) or re.findall(r"\b(\w+)\[([\d,]*)\]", found[1])
        if (
            found[3] and kind != "all-reduce"
        ):  # operands, results, and for some the state of the transfer
            arrays = [array for array in arrays if array != ("u32", "")]
            arrays = arrays[len(arrays) // 2 :]
        sizes = [math.prod(map(int, filter(None, shape.split(",")))) for _, shape in arrays]
        if kind == "reduce-scatter":
            sizes = [size * len(groups[0]) for size in sizes]
        elif inside.startswith("all-reduce-scatter"):  # how a TPU writes a reduce-scatter
            kind = "reduce-scatter"
        moved = sum(size * _bytes(dtype) for size, (dtype, _) in zip(sizes, arrays, strict=True))
        place = re.search(r'op_name="([^"]*)"', line) or re.search(r'op_name="([^"]*)"', caller)
        return Collective(kind, tuple(sizes), moved, groups, times, place[1] if place else "")

    def sent(self, found: re.Match, times: int | None) -> Collective:
        kind = found[3].lower().replace("_", "-") + OVER_SLICES
        size = math.prod(_numbers(found[2]))
        return Collective(kind, (size,), size * _bytes(found[1]), ((),), times, "")

    def joined(self, line: str, inside: str) -> list[tuple[str, str]]:
        """Dtypes and shapes of the arrays that a GPU's compiler has put behind each other to sum them as one."""
        operand = re.search(r"\((%wrapped_concatenate[\w.\-]*)\)", line)
        if not operand:
            return []
        made = _CALLS.search(
            next(other for other in self.lines[inside] if f"{operand[1]} = " in other)
        )
        return (
            re.findall(r" = (\w+)\[([\d,]*)\]\S* parameter\(", "\n".join(self.lines[made[1]]))
            if made
            else []
        )


def _bytes(dtype: str) -> int:
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def _numbers(text: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", text)]


def _iota(shape: str, transposed: str | None) -> np.ndarray:
    """Devices in order, in a shape whose axes are then reordered."""
    array = np.arange(math.prod(_numbers(shape))).reshape(_numbers(shape))
    return array.transpose(_numbers(transposed)) if transposed else array


def _groups(line: str, devices: int) -> list[list[int]]:
    """Devices that take part together."""
    if found := _LIST.search(line):
        return [_numbers(group) for group in found[1].split("}")[:-1]]
    if found := _TILED.search(line):
        return _iota(found[2], found[3]).reshape(_numbers(found[1])).tolist()
    if found := _MESH.search(line):
        names, sizes = re.findall(r"'(\w+)'=", found[1]), _numbers(re.sub(r"'\w+'=", "", found[1]))
        ids = _iota(found[2], found[3]) if found[2] else np.arange(math.prod(sizes))
        over = [names.index(name) for name in re.findall(r"'(\w+)'", found[4])]
        last = [axis for axis in range(len(names)) if axis not in over] + over
        size = math.prod(sizes[axis] for axis in over)
        return ids.reshape(sizes).transpose(last).reshape(-1, size).tolist()
    if "replica_groups={}" in line:
        return [list(range(devices))]
    raise LookupError(f"no known form of device groups: {line.strip()[:200]}")
