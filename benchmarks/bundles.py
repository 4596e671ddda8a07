"""Reads the program that libtpu makes of a kernel, and runs its scalar half to count its cycles.

A TPU core issues one bundle of instructions each cycle, in order. What it does next is decided by
scalars alone: the grid, the branches and the bounds of loops are instructions of the scalar unit,
whose inputs (spans, starts) are known. So this module executes those instructions, as libtpu
prints them, and nothing else: it finds out how often every bundle runs without knowing the kernel.
A value that comes out of the vector units is unknown here, and so is all that follows from it; a
branch on such a value is refused. Bundles x times are the cycles, and with libtpu's table of the
units that each bundle uses, how busy every unit is. Transfers are instructions as well, so their
bytes are counted too; how long the core waits for them is not in the program, and not counted.

libtpu writes the program (`*-packed-bundles-post-ra.txt`) and the table (`*-pre-delay_*`) when it
compiles with LIBTPU_INIT_ARGS as `FLAGS` says. A line of the program is one bundle:

    0x85 PF: > { %s9_s2 = sadd.s32 1, %s7_s0  ;;  %13 = sbr.rel (!%p4_p1) target bundleno = 34 }

Names are those of single assignments (s9) and of registers (s2). The bundles that follow a branch,
`branch_slots` of them, are executed before it is taken.

Dimension key: U unit, X bundle.
"""

import itertools
import math
import operator
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

# What libtpu is told, to write this and no more into a folder; it reads the flags once a process.
FLAGS = (
    "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_emit_annotations=true"
    " --xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra|utilization"
)

# Bits of a register.
WORD = 0xFFFFFFFF


class Instruction(NamedTuple):
    """One scalar instruction, branch or transfer of a bundle."""

    # The name that it assigns, with its %; "" if none.
    result: str
    operation: str
    # The predicate without which it does nothing, "" if none, and whether that is negated.
    predicate: str = ""
    negated: bool = False
    # What the result is where the predicate fails; "": what it was.
    otherwise: str = ""
    # Names, numbers as text, or allocations.
    operands: tuple[str, ...] = ()
    # Terms of the address in scalar memory, if it loads or stores.
    address: tuple[str, ...] = ()


class Program(NamedTuple):
    """A kernel as libtpu schedules it."""

    # Of those bundles that have any, the scalar instructions on which a branch or a transfer
    # depends, in the order of evaluation.
    instructions: dict[int, list[Instruction]]
    # Uses of every unit by every bundle, and how many each unit can take.
    used_XU: np.ndarray
    capacity_U: np.ndarray
    units: tuple[str, ...]
    # Bytes of those operands and results that lie on the chip, not in HBM.
    resident: int


class Count(NamedTuple):
    """What one run of a program does."""

    # Times that every bundle is issued.
    times_X: np.ndarray
    # Bytes between HBM and the core.
    moved: int

    @property
    def cycles(self) -> int:
        """Cycles of the run: one for each bundle issued."""
        return int(self.times_X.sum())


# --- reading --------------------------------------------------------------------------------------

# `123-NAME-45-packed-bundles-post-ra.txt`: groups NAME, which is an instruction's, and the kind.
_FILE = re.compile(
    r"\d+-([^<].*)-\d+-(packed-bundles-post-ra|pre-delay_hlo-static-per-bundle-utilization)\.txt$"
)
# A comment without another in it.
_COMMENT = re.compile(r"/\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/")
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +(?:[A-Z]{2})?:[ >]*\{(.*)\} *$", re.MULTILINE)
_ATTRIBUTE = re.compile(r"\[(?:thread|resolvable):\$\w+\]")
_PREDICATE = re.compile(r"\((!?)(%\w+)(?:, (%\w+))?\)")
_ADDRESS = re.compile(r"\[smem:\[(.*?)\]\]")
_OPERATION = re.compile(r"(?:(%\w+) = )?([a-z][\w.]*)(.*)")
_TARGET = re.compile(r"target bundleno = (\d+)")
_OPERAND = re.compile(r"inlined_call_operand.*index: (\d+)")
# Operands in VMEM or in v4's CMEM.
_RESIDENT = re.compile(r"inlined_call_operand\.[vc]mem \[shape: [a-z]+(\d+)\[([\d,]*)\]")
# Scalar, predicate and control instructions; of all others only transfers from and to HBM and into
# scalar memory matter.
_SCALAR = re.compile(
    r"s(?!fence|halt|yncpa)\w+|p(?!op)\w+|int_to_ptr|scalar_\w+|inlined_\w+"
    r"|dma\.(?:hbm_to_|\w+_to_[hs])"
)


def read(folder: Path, kernel: str) -> Program:
    """The program of a kernel, from the folder that libtpu wrote.

    Args:
      folder: the one in `FLAGS`.
      kernel: the name that its `pallas_call` has.

    Raises:
      FileNotFoundError: there is no such kernel.
    """
    found = [texts for name, texts in listed(folder).items() if name.split(".")[0] == kernel]
    if not found:
        raise FileNotFoundError(f"{folder}: expected a program of {kernel}, found none")
    return parse(*(text.read_text(encoding="utf8") for text in found[0]))


def listed(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Program and table of everything that was compiled, by the name of its instruction.

    Instructions that are the same have one program, under the name of one of them.
    """
    programs: dict[str, Path] = {}
    tables: dict[str, Path] = {}
    for file in folder.iterdir():
        if found := _FILE.match(file.name):
            texts = programs if found[2].startswith("packed") else tables
            texts[found[1]] = file
    return {name: (programs[name], tables[name]) for name in programs if name in tables}


def parse(bundles: str, utilization: str) -> Program:
    """A program from the two texts that libtpu writes."""
    instructions = {}
    count = 0
    bundles = _without_comments(bundles)
    for number, body in _BUNDLE.findall(bundles):
        assert int(number, 16) == count, f"bundle {number} is out of order"
        parsed = [_instruction(part.strip()) for part in body.split(";;")]
        found = [instruction for instruction in parsed if instruction]
        # Loop variables have their values before anything else of the bundle.
        found.sort(key=lambda instruction: instruction.operation != "sphi")
        if found:
            instructions[count] = found
        count += 1
    units, capacity_U, used_XU = _table(utilization)
    # The table lacks the last bundle.
    missing = np.zeros((count - len(used_XU), len(units)), int)
    used_XU = np.concatenate([used_XU, missing])
    return Program(_deciding(instructions), used_XU, capacity_U, units, _resident(bundles))


def _deciding(instructions: dict[int, list[Instruction]]) -> dict[int, list[Instruction]]:
    """Branches, transfers, and what they depend on; most of the others compute addresses."""
    needed: set[str] = set()

    def decides(instruction: Instruction) -> bool:
        if instruction.operation == "sst":
            allocations = [term for term in instruction.address if term.startswith("#")]
            return not allocations or not needed.isdisjoint(allocations)
        if instruction.operation == "sbr.rel" or instruction.operation.startswith("dma"):
            return True
        return instruction.result in needed

    # From each on to what it depends on, until there is no more.
    known = -1
    while known < len(needed):
        known = len(needed)
        for bundle in reversed(instructions.values()):
            for instruction in filter(decides, bundle):
                needed.update(instruction.operands, instruction.address)
                needed.update((instruction.predicate, instruction.otherwise))
        needed.discard("")
    kept = {number: list(filter(decides, bundle)) for number, bundle in instructions.items()}
    return {number: bundle for number, bundle in kept.items() if bundle}


def _resident(bundles: str) -> int:
    """Bytes of what lies on the chip when the kernel starts, or when it ends."""
    total = 0
    for bits, shape in _RESIDENT.findall(bundles):
        sizes = [int(size) for size in shape.split(",") if size]
        total += int(bits) * math.prod(sizes) // 8
    return total


def _without_comments(text: str) -> str:
    """The text without its comments, in which there may be others."""
    left = 1
    while left:
        text, left = _COMMENT.subn("", text)
    return text


def _table(text: str) -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Names of the units, what they can take, and what every bundle uses."""
    _, units, capacity, _, *used = text.strip().splitlines()
    used_XU = np.array([line.split() for line in used], int)
    return tuple(units.split(", ")), np.array(capacity.split(), int), used_XU


def _instruction(text: str) -> Instruction | None:
    """An instruction, if it is one of the scalar unit or a transfer."""
    found = _OPERATION.match(text)
    if not found or not _SCALAR.match(found[2]):
        return None
    result, operation, rest = found.groups()
    # A branch has its target, an argument of the kernel its number, as the only operand.
    if operation.startswith("inlined_call_operand"):
        index = _OPERAND.search(text)
        assert index is not None, text
        return Instruction(result, "argument", operands=(index[1],))
    # A predicate, and what the result is without it.
    rest = _ATTRIBUTE.sub("", rest)
    condition: tuple[str, ...] = ("", "", "")
    if match := _PREDICATE.search(rest):
        condition = match.groups("")
        rest = rest.replace(match[0], "")
    # A place in scalar memory, the sum of several terms.
    address: list[str] = []
    if match := _ADDRESS.search(rest):
        address = [term.strip().lstrip("$") for term in match[1].split("+")]
        rest = rest.replace(match[0], "")
    if match := _TARGET.search(rest):
        rest = match[1]
    operands = [part.strip(" []") for part in rest.split(",")]
    return Instruction(
        result=result or "",
        operation=operation,
        predicate=condition[1],
        negated=condition[0] == "!",
        otherwise=condition[2],
        operands=tuple(part for part in operands if part),
        address=tuple(address),
    )


# --- running --------------------------------------------------------------------------------------
# A value is a number of 32 bits, None where it is unknown, or a text: an allocation's name, or
# "argument 3" for the address of the kernel's fourth operand.


def _signed(x: int) -> int:
    """A word as a number with a sign."""
    return x - 2 * (x & 2**31)


def _shift_right(x: int, places: int) -> int:
    """An arithmetic shift."""
    return _signed(x) >> places


# Operations of known numbers, by name without the type behind the dot.
_ARITHMETIC: dict[str, Callable[..., int]] = {
    "sadd": operator.add,
    "ssub": operator.sub,
    "smul": operator.mul,
    "smulhi": lambda x, y: x * y >> 32,
    "sand": operator.and_,
    "sor": operator.or_,
    "sxor": operator.xor,
    "sshll": lambda x, places: x << places,
    "sshrl": operator.rshift,
    "sshra": _shift_right,
    "pxor": operator.xor,
}
_ORDERED: dict[str, Callable[[int, int], Any]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "smin": min,
    "smax": max,
}


def _logic(operation: str, values: Sequence[Any]) -> Any:
    """Predicates, where one may be known though an operand is not."""
    negated = operation in ("pnand", "pnor", "pneg")
    decisive = int(operation in ("por", "pnor"))
    if decisive in values:
        return decisive ^ negated
    if None in values:
        return None
    return 1 - decisive ^ negated


def _compute(operation: str, values: Sequence[Any]) -> Any:
    """The result of an operation without side effects; None if it is unknown."""
    name, _, kind = operation.partition(".")
    # An address stays what it points to, wherever in it.
    address = isinstance(values[0], str) and name in ("sshll", "scalar_lea")
    if name in ("smov", "pmov", "int_to_ptr") or address:
        return values[0]
    if name in ("por", "pand", "pnand", "pnor", "pneg"):
        return _logic(name, values)
    if name == "scalar_select" and values[0] is not None:
        return values[2 - values[0]]
    if "f32" in kind or not all(isinstance(value, int) for value in values):
        return None
    if name in _ARITHMETIC:
        return _ARITHMETIC[name](*values) & WORD
    # Comparisons: `scmp.lt.s32.totalorder` and `smin.u32`.
    order = name
    if name == "scmp":
        order = kind.split(".")[0]
    if order not in _ORDERED:
        return None
    if "s32" in kind:
        values = [_signed(value) for value in values]
    return int(_ORDERED[order](*values)) & WORD


class _Machine:
    """The scalar unit: registers, scalar memory, and what was counted."""

    def __init__(self, arguments: dict[int, np.ndarray], core: int):
        self.arguments = arguments
        self.values: dict[str, Any] = {}
        # When a name was assigned last, for loop variables.
        self.assigned: dict[str, int] = {}
        self.time = 0
        # Allocation 0 is the number of the core.
        self.memory: dict[tuple[str, int] | None, Any] = {("#allocation0", 0): core}
        self.granules = 0
        # Operations that this module does not know.
        self.unknown: set[str] = set()

    def value(self, operand: str) -> Any:
        """A name's value, a number's, or an allocation as it is."""
        if operand in self.values:
            return self.values[operand]
        if operand.startswith("#"):
            return operand
        try:
            return int(operand, 0) & WORD
        except ValueError:
            return None

    def location(self, address: Sequence[str]) -> tuple[str, int] | None:
        """A place in scalar memory: an allocation and the number of a word."""
        allocation = ""
        word = 0
        for term in address:
            value = self.value(term)
            if value is None:
                return None
            if isinstance(value, str):
                allocation = value
            else:
                word = (word + value) & WORD
        return allocation, word

    def assign(self, name: str, value: Any) -> None:
        """Give a name its value."""
        self.time += 1
        self.values[name] = value
        self.assigned[name] = self.time

    def holds(self, instruction: Instruction) -> Any:
        """Whether an instruction is executed: 1, 0, or None where that is unknown."""
        if not instruction.predicate:
            return 1
        value = self.values.get(instruction.predicate)
        if value is None:
            return None
        return value ^ instruction.negated

    def execute(self, instruction: Instruction) -> None:
        """Execute what is not a branch."""
        holds = self.holds(instruction)
        operation = instruction.operation
        # Stores and transfers.
        if operation == "sst" or operation.startswith("dma"):
            if holds != 0:
                self._effect(instruction, holds)
            return
        if not instruction.result:
            return
        # Results, of which some are what they were.
        if holds == 0:
            if instruction.otherwise:
                self.assign(instruction.result, self.value(instruction.otherwise))
            return
        result = self._result(instruction)
        if holds is None and result != self.values.get(instruction.otherwise):
            result = None
        self.assign(instruction.result, result)

    def _result(self, instruction: Instruction) -> Any:
        """What an instruction computes."""
        operation = instruction.operation
        if operation == "argument":
            return f"argument {instruction.operands[0]}"
        if operation == "sld":
            # What is not known is stored nowhere.
            return self.memory.get(self.location(instruction.address))
        if operation == "sphi":
            # Both names are one register, so it holds what was assigned last.
            last = max(instruction.operands, key=lambda name: self.assigned.get(name, 0))
            return self.value(last)
        values = [self.value(operand) for operand in instruction.operands]
        # A division has two results, of which the quotient is taken first.
        if operation.startswith("sdivrem"):
            number, divisor = values
            if None in values:
                return [None, None]
            return list(divmod(number, divisor))
        if operation == "spop.drf":
            return values[0].pop(0)
        result = _compute(operation, values)
        if result is None and "f32" not in operation and None not in values:
            self.unknown.add(operation)
        return result

    def _effect(self, instruction: Instruction, holds: Any) -> None:
        """Store a word, or count and follow a transfer."""
        values = [self.value(operand) for operand in instruction.operands]
        if instruction.operation == "sst":
            place = self.location(instruction.address)
            assert place is not None, instruction
            self.memory[place] = None
            if holds:
                self.memory[place] = self._word(values[0])
            return
        source, size, target = values[:3]
        assert holds is not None and size is not None, instruction
        # Strides and other operands behind these matter to no one here.
        if "hbm" in instruction.operation:
            self.granules += size
        if instruction.operation.endswith("to_smem"):
            index = int(source.removeprefix("argument "))
            for word, value in enumerate(self.arguments.get(index, ())):
                self.memory[target, word] = int(value)

    def _word(self, value: Any) -> Any:
        """What is stored: of an argument that is one word, the word."""
        if isinstance(value, str) and value.startswith("argument "):
            known = self.arguments.get(int(value.removeprefix("argument ")))
            if known is not None and len(known) == 1:
                return int(known[0])
        return value


def words(array: np.ndarray) -> np.ndarray:
    """An operand as it lies in scalar memory, uint32.

    Numbers of 32 bits follow each other. Of those of 8 bits, (..., rows, columns), four rows share
    a word, and a row has 128.
    """
    if array.dtype.itemsize == 4:
        return array.reshape(-1).view(np.uint32)
    rows, columns = array.shape[-2:]
    padded_XC = np.zeros((math.ceil(rows / 4) * 4, 128), np.uint8)
    padded_XC[:rows, :columns] = array.reshape(rows, columns)
    bytes_XCB = padded_XC.reshape(-1, 4, 128).transpose(0, 2, 1)
    return np.ascontiguousarray(bytes_XCB).view(np.uint32).reshape(-1)


def run(
    program: Program, arguments: dict[int, np.ndarray], core: int, branch_slots: int, granule: int
) -> Count:
    """Follow a program from its first bundle to its last.

    Args:
      program: of a kernel.
      arguments: words of those operands that lie in scalar memory, by their number; uint32.
      core: which of the chip's cores runs it.
      branch_slots: bundles that a chip still executes behind a branch.
      granule: bytes in which a chip counts transfers.

    Returns:
      How often it issued each bundle, and what it moved.

    Raises:
      RuntimeError: a branch depends on a value from the vector units, or on an operation that is
        not known here.
    """
    machine = _Machine(arguments, core)
    bundles = len(program.used_XU)
    # Bundles begun less bundles left, at each bundle: their running sum are the times.
    change_X = np.zeros(bundles + 1, int)
    busy = sorted(program.instructions)
    following = _following(busy, bundles)
    at = 0
    first = 0
    branch: tuple[int, int] | None = None
    while True:
        # Nothing happens before the next bundle that has a scalar instruction.
        at = following[at]
        if branch and at > branch[0]:
            change_X[first] += 1
            change_X[branch[0] + 1] -= 1
            at = first = branch[1]
            branch = None
            continue
        if at >= bundles:
            break
        for instruction in program.instructions[at]:
            if instruction.operation != "sbr.rel":
                machine.execute(instruction)
                continue
            taken = machine.holds(instruction)
            if taken is None:
                raise RuntimeError(
                    f"bundle {at}: expected a branch that depends on scalars and operations that "
                    f"are known, found a vector or one of {sorted(machine.unknown)}"
                )
            if taken:
                branch = (at + branch_slots, int(instruction.operands[0]))
        at += 1
    change_X[first] += 1
    change_X[bundles] -= 1
    return Count(np.cumsum(change_X)[:-1], machine.granules * granule)


def _following(busy: Sequence[int], bundles: int) -> list[int]:
    """For every bundle the next one, itself included, that has a scalar instruction."""
    following = [bundles] * (bundles + 1)
    for bundle in busy:
        following[bundle] = bundle
    for bundle in range(bundles - 1, -1, -1):
        following[bundle] = min(following[bundle], following[bundle + 1])
    return following


# --- reporting ------------------------------------------------------------------------------------


class Region(NamedTuple):
    """Bundles that follow each other and are issued equally often."""

    first: int
    bundles: int
    times: int
    # Of all cycles of the program.
    share: float
    # By the unit's name, how busy it is.
    units: dict[str, float]


def regions(program: Program, times_X: np.ndarray) -> list[Region]:
    """A program in regions, those with the most cycles first.

    Args:
      program: of a kernel.
      times_X: how often each of its bundles is issued.
    """
    found = []
    # The regions begin where the times change.
    begins = [0, *(np.flatnonzero(np.diff(times_X)) + 1).tolist(), len(times_X)]
    for first, end in itertools.pairwise(begins):
        times = int(times_X[first])
        busy_U = program.used_XU[first:end].mean(0) / program.capacity_U
        units = dict(zip(program.units, busy_U.round(2).tolist(), strict=True))
        share = times * (end - first) / times_X.sum()
        found.append(Region(first, end - first, times, round(float(share), 4), units))
    return sorted(found, key=lambda region: -region.share)
