r"""Reads what a TPU's compiler makes of a step: its instructions, how often each, and their bytes.

The text (HLO) of a compiled program lists the instructions of every computation, shortened:

    %body (state: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
      %x = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} fusion(%a, %b), kind=kLoop, calls=%fused,
          metadata={op_name="jit(train_step)/jvp()/while/body/..."}, backend_config={...
          "estimated_cycles":"5206", ...}

`S(1)` behind a shape says that the array lies on the chip; without it, it lies in HBM. A loop
multiplies by its rounds, and of a `lax.switch` each branch counts for the share of the rounds that
take it.

Dimension key: none; the text has shapes, not arrays.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

# `ENTRY %main (...) -> ... {` or `%body (...) -> ... {`: groups ENTRY, name.
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
# Groups: name, the rest behind the equals sign.
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?([\w.\-]+) = (.*)$")
# Of that rest behind the result's type: groups opcode, what follows its parenthesis.
_OPCODE = re.compile(r"([\w\-]+)\((.*)$")
_OPERAND = re.compile(r"%([\w.\-]+)")
_COMMENT = re.compile(r"/\*.*?\*/")
# An array in a type: groups dtype, shape, layout.
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_WHILE = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRUE_FALSE = re.compile(r"true_computation=%?([\w.\-]+), false_computation=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONSTANT = re.compile(r"^(\d+)\)")
_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')

# Bytes of a number.
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f64": 8, "s64": 8}
# What moves nothing: it names, joins, allocates, or waits for what was begun before.
_NOTHING = {
    "bitcast",
    "constant",
    "copy-done",
    "custom-call",
    "get-tuple-element",
    "parameter",
    "slice-done",
    "tuple",
}
# What reads a part of its first operand.
_CUTS = {"dynamic-slice", "slice", "gather"}


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    # The type of its result, as written.
    result: str
    opcode: str
    operands: tuple[str, ...]
    # All that stands behind the operands' opening parenthesis.
    rest: str

    @property
    def estimate(self) -> int | None:
        """Cycles by the compiler's estimate, if it has one."""
        found = _ESTIMATE.search(self.rest)
        return int(found[1]) if found else None

    @property
    def op_name(self) -> str:
        """The functions that it comes from, joined by "/"; "" where the compiler lost them."""
        found = _OP_NAME.search(self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


class Step(NamedTuple):
    """An instruction as a run of the program meets it."""

    instruction: Instruction
    # The computation that it stands in, by name.
    computation: str
    # How often it is executed, a mean where branches differ.
    times: float
    # Whether it stands in a branch of a `lax.switch`.
    in_branch: bool


class Program:
    """The computations of a compiled program, by name."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        current: Computation = {}
        for line in text.splitlines():
            header = _COMPUTATION.match(line)
            if header is not None:
                current = self.computations.setdefault(header[2], {})
                if header[1]:
                    self.entry = header[2]
                continue
            found = _INSTRUCTION.match(line)
            if found is not None:
                instruction = _instruction(found[1], _COMMENT.sub("", found[2]))
                current[instruction.name] = instruction

    def walk(self, shares: Callable[[int], Sequence[float]]) -> Iterator[Step]:
        """All instructions that a run executes, but those inside fusions.

        Args:
          shares: from a number of branches to how often each is taken, in a sum of 1.
        """
        yield from self._walk(self.entry, 1, False, shares)

    def _walk(
        self,
        name: str,
        times: float,
        in_branch: bool,
        shares: Callable[[int], Sequence[float]],
    ) -> Iterator[Step]:
        for instruction in self.computations[name].values():
            if instruction.opcode == "while":
                body = _WHILE.search(instruction.rest)
                assert body is not None, instruction
                rounds = self._rounds(instruction.rest, body[1])
                yield from self._walk(body[2], times * rounds, in_branch, shares)
            elif instruction.opcode == "conditional":
                branches = _branches(instruction.rest)
                for branch, share in zip(branches, shares(len(branches)), strict=True):
                    if share:
                        yield from self._walk(branch, times * share, True, shares)
            else:
                yield Step(instruction, name, times, in_branch)

    def _rounds(self, loop: str, condition: str) -> int:
        """How often a loop runs: as the compiler says, or up to its condition's only number."""
        known = _TRIPS.search(loop)
        if known:
            return int(known[1])
        bounds = [
            int(found[1])
            for instruction in self.computations[condition].values()
            if instruction.opcode == "constant"
            for found in [_CONSTANT.match(instruction.rest)]
            if found
        ]
        # Rounds that only a run knows are not counted: there is one at the start of a text.
        return bounds[0] if len(bounds) == 1 else 0

    def called(self, instruction: Instruction) -> Computation:
        """What a fusion computes; nothing for other instructions."""
        found = _CALLS.search(instruction.rest)
        return self.computations[found[1]] if found else {}

    def has_product(self, instruction: Instruction) -> bool:
        """Whether it is a product of matrices, or a fusion with one in it."""
        if instruction.opcode in ("convolution", "dot"):
            return True
        return any(map(self.has_product, self.called(instruction).values()))

    # --- bytes

    def moved(self, step: Step) -> int:
        """Bytes that an instruction moves from and to HBM, each array once."""
        instruction = step.instruction
        if instruction.opcode in _NOTHING:
            return 0
        # A begun copy or cut has source and target in its result.
        if instruction.opcode.endswith("-start"):
            ends = _arrays(instruction.result)[:2]
            return min(map(_bytes, ends)) * sum(_in_hbm(end) > 0 for end in ends)
        computation = self.computations[step.computation]
        read = 0
        for index, name in enumerate(instruction.operands):
            # A computation may be named where an operand is.
            if name in computation:
                whole = sum(map(_in_hbm, _arrays(computation[name].result)))
                read += self._read(instruction, index, whole)
        return read + self._written(instruction, computation)

    def _read(self, instruction: Instruction, index: int, whole: int) -> int:
        """Bytes of an operand that are read: all, or the part that is cut out of it."""
        if index == 0 and instruction.opcode == "dynamic-update-slice":
            return 0
        if index == 0 and instruction.opcode in _CUTS:
            return min(whole, _size(instruction.result))
        # Inside a fusion, every use of the parameter.
        called = self.called(instruction)
        names = [
            x.name
            for x in called.values()
            if x.opcode == "parameter" and x.rest.startswith(f"{index})")
        ]
        if not names or not whole:
            return whole
        (name,) = names
        uses = [x for x in called.values() if name in x.operands]
        return min(whole, sum(self._read(use, use.operands.index(name), whole) for use in uses))

    def _written(self, instruction: Instruction, computation: Computation) -> int:
        """Bytes of the results in HBM: all, or the part that is put into an array."""
        whole = sum(map(_in_hbm, _arrays(instruction.result)))
        if instruction.opcode == "dynamic-update-slice":
            return min(whole, _size(computation[instruction.operands[1]].result))
        called = self.called(instruction)
        updates = [x for x in called.values() if x.opcode == "dynamic-update-slice"]
        for update in updates:
            whole -= _size(update.result)
            whole += _size(called[update.operands[1]].result)
        return max(whole, 0)


def _instruction(name: str, text: str) -> Instruction:
    """An instruction from what stands behind its equals sign."""
    # A tuple's type is in parentheses, which nest.
    end = text.index(" ")
    if text.startswith("("):
        depth = 0
        for place, letter in enumerate(text):
            depth += (letter == "(") - (letter == ")")
            if depth == 0:
                end = place + 1
                break
    found = _OPCODE.match(text[end:].strip())
    assert found is not None, text
    operands, _, _ = found[2].partition(")")
    return Instruction(name, text[:end], found[1], tuple(_OPERAND.findall(operands)), found[2])


def _branches(text: str) -> list[str]:
    """Computations of a conditional, the one of false or of 0 first."""
    found = _BRANCHES.search(text)
    if found:
        return [name.strip().lstrip("%") for name in found[1].split(",")]
    pair = _TRUE_FALSE.search(text)
    assert pair is not None, text
    return [pair[2], pair[1]]


def _arrays(result: str) -> list[tuple[str, str, str]]:
    """Arrays of a type: dtype, shape, layout."""
    return _ARRAY.findall(result)


def _size(result: str) -> int:
    """Bytes of all arrays of a type, wherever they lie."""
    return sum(map(_bytes, _arrays(result)))


def _bytes(array: tuple[str, str, str]) -> int:
    dtype, shape, _ = array
    return _BYTES.get(dtype, 4) * math.prod(int(size) for size in shape.split(",") if size)


def _in_hbm(array: tuple[str, str, str]) -> int:
    """Bytes of an array, if it lies in HBM."""
    if "S(" in array[2]:
        return 0
    return _bytes(array)
