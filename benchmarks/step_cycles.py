"""Where the cycles of a training step go on a TPU, by the compiler's schedule: needs no TPU.

Command:  python -m benchmarks.step_cycles [--chip=v5e] [--cases=zero,paper] [--largest=10]
          (needs libtpu: pip install -e '.[tpu]')

Compiles the whole step of `enwik8_small`, one row a chip, for chips that are not here, and sorts
the instructions of the compiled text by the part of the model that they come from. libtpu writes
the program of each of them, of fusions and copies as of the operation's kernels; `bundles` counts
their cycles. Loops count with their rounds, and of the code for several lengths of a layer's
context what its spans choose.

What is compiled follows the spans as in training: `zero` for the shortest context, which is what a
run begins with; `zero-long`, `paper` and `full` for the longest. Paper-like spans are the layers of
paper_like_spans.json.

A program does not say how long it waits for HBM. `MB` is what an instruction moves between HBM and
the chip, and `transfers` the cycles that takes at the chip's bandwidth. The compiler fetches a part
while it works on another, so an instruction takes the longer of the two at least: `longer` adds
those up, and the shares are of that. What is fetched beside other work, and is there when it is
needed, counts in MB alone. Scalars, and collectives, which are not in a chip's program, have no
cycles. (The text's own `estimated_cycles` are 10 to 30 times those of the program.)

The last line is JSON: of each case the share of each part.

Dimension key: X layer, H head.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from allattn import config, sharding, train
from allattn.attention.span import reach
from allattn.errors import UserError
from allattn.model.reach_projection import lengths
from allattn.planning import chips, compilation
from benchmarks import attention, bundles, schedule
from benchmarks.compiled_text import Computation, Instruction, Program, Step
from benchmarks.machine import provenance

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "enwik8_small.py"

# Symbols of enwik8.
VOCABULARY = 205
# Those with one core for each device of JAX.
CHIPS = tuple(name for name, core in schedule.CORES.items() if core.cores == 1)


class Case(NamedTuple):
    """Spans, and whether they are found in the longest context or in the one they ask for."""

    spans: str
    longest: bool


CASES = {
    "zero": Case("zero", longest=False),
    "zero-long": Case("zero", longest=True),
    "paper": Case("paper", longest=True),
    "full": Case("full", longest=True),
}


class Cost(NamedTuple):
    """What an instruction takes."""

    cycles: float
    # Moved between HBM and the chip.
    bytes: float


class Row(NamedTuple):
    """An instruction, over the whole step."""

    part: str
    name: str
    # Where it comes from, without what all have in common.
    op_name: str
    # The shape of its first result.
    result: str
    # How often it is executed; a mean where branches differ.
    times: float
    # Of all times.
    cycles: float
    bytes: float
    # Whether it moves its bytes beside other work.
    beside: bool


# --- the parts of the model ----------------------------------------------------------------------

OPERATION = "operation's kernels"
PROJECTIONS = "projections"
LOSS_PRODUCTS = "products of embedding and loss"
# What the model cannot do without; the largest of all others are listed.
REQUIRED = (OPERATION, PROJECTIONS, LOSS_PRODUCTS)

# Of the layers, in this order the first that fits: a part, and what an op_name has in it.
_IN_LAYERS = (
    ("around the kernels", "/all_attention/"),
    ("keys and values laid out", "/cond/branch_"),
    ("arrays of the scan", "/while/body/jit(dynamic_"),
    ("norms and residuals", "/while/body/closed_call/"),
    ("embedding and loss", ""),
)
PARTS = (
    *REQUIRED,
    *(part for part, _ in _IN_LAYERS),
    "cache",
    "optimizer",
    "other",
)


def part_of(program: Program, step: Step, cache: str) -> str:
    """The part of the model that an instruction belongs to.

    Args:
      program: which it is of.
      step: the instruction.
      cache: the shape of the cache in the text, such as `bf16[18,1,8192,512]`.
    """
    instruction = step.instruction
    name = instruction.op_name
    if 'custom_call_target="tpu_custom_call"' in instruction.rest:
        return OPERATION
    if program.has_product(instruction):
        return PROJECTIONS if "/while/" in name else LOSS_PRODUCTS
    # What is differentiated is the model.
    if "jvp(" in name:
        return next(part for part, fragment in _IN_LAYERS if fragment in name)
    # A loop outside it goes over the cache; what lost its name in a branch is of keys and values.
    if instruction.result.startswith(cache) or "/while/" in name:
        return "cache"
    if step.in_branch:
        return "keys and values laid out"
    return "optimizer" if name else "other"


# --- compiling and counting ----------------------------------------------------------------------


class Compiled(NamedTuple):
    """A step that was compiled."""

    text: str
    # Cached positions that the heads may look at.
    context: int
    # The shape of the cache in the text.
    cache: str


def compile_step(chip: str, longest: bool, folder: Path) -> Compiled:
    """Compile the step; libtpu writes the schedules into a folder. The first of its process.

    Args:
      chip: one of `CHIPS`.
      longest: whether the context is the longest, or the one of spans that are 0.
      folder: where the schedules go.
    """
    os.environ["LIBTPU_INIT_ARGS"] = bundles.FLAGS.format(folder=folder)
    devices = chips.devices(schedule.CORES[chip].topology)
    c = config.load(str(CONFIG)).unlock()
    c.model.vocab_size = VOCABULARY
    c.train.batch = len(devices)
    c.mesh.data = len(devices)
    c.lock()
    program = train.TrainProgram(c, sharding.make_mesh(c, devices))
    context = c.model.span.limit
    if not longest:
        context = train.choose_context_length(c, 0.0)
    lowered = compilation.lower_step(program, "tpu", context)
    # A device has one row.
    X, _, S, D = program.abstract_state(context).cache.shape
    text = lowered.compile().as_text()
    assert text is not None
    return Compiled(text, context, f"bf16[{X},1,{S},{D}]")


class Schedules:
    """Cycles of instructions, by the programs that libtpu wrote."""

    def __init__(self, folder: Path, program: Program, chip: str):
        self._core = schedule.CORES[chip]
        self._texts = bundles.listed(folder)
        # Instructions that do the same have one program: where it is.
        self._alike: dict[tuple, str] = {}
        for computation in program.computations.values():
            for instruction in computation.values():
                if instruction.name in self._texts:
                    self._alike[_kind(instruction, computation)] = instruction.name

    def of(self, instruction: Instruction, computation: Computation) -> int | None:
        """Cycles of an instruction; None if it has no program, or one whose loops are unknown."""
        name = instruction.name
        if name not in self._texts:
            name = self._alike.get(_kind(instruction, computation), "")
        if not name:
            return None
        # What is in scalar memory counts layers, and chooses what is cut out: any one does.
        zeros = {number: np.zeros(128, np.uint32) for number in range(len(instruction.operands))}
        try:
            return self.run(name, zeros).cycles
        except (AssertionError, RuntimeError):
            return None

    def run(self, name: str, scalars: dict[int, np.ndarray]) -> bundles.Count:
        """What a program does with these operands in scalar memory."""
        core = self._core
        return bundles.run(self.program(name), scalars, 0, core.branch_slots, core.granule)

    @functools.cache  # noqa: B019 (as long as this object lives)
    def program(self, name: str) -> bundles.Program:
        """The program of an instruction."""
        return bundles.parse(*(text.read_text(encoding="utf8") for text in self._texts[name]))

    def kernel(self, name: str) -> str:
        """The instruction that is a kernel."""
        (found,) = [text for text in self._texts if text.split(".")[0] == name]
        return found


def _kind(instruction: Instruction, computation: Computation) -> tuple:
    """What instructions with one program have in common."""
    operands = [computation[name].result for name in instruction.operands if name in computation]
    return (instruction.opcode, instruction.result, *operands, instruction.estimate)


def kernels(
    schedules: Schedules, chip: str, context: int, spans: Sequence[str]
) -> dict[str, dict[str, Cost]]:
    """By spans and kernel: what a call of the operation's kernel takes, a mean over layers."""
    K = schedule.GEOMETRY.width // schedule.GEOMETRY.heads
    subject = schedule.operation(K, schedule.DROPOUT[-1], spans, context)
    ((first, _), *_), *_ = subject.loads.values()
    record = schedule.recorder(chip, subject.function, first.arguments)
    found = {}
    for name, loads in subject.loads.items():
        calls = sum(times for _, times in loads)
        costs = dict.fromkeys(subject.kernels.values(), Cost(0, 0))
        for load, times in loads:
            for kernel, call in record(*load.arguments).items():
                place = schedules.kernel(kernel)
                count = schedules.run(place, call.scalars)
                moved = count.moved + schedules.program(place).resident
                cost = costs[kernel]
                costs[kernel] = Cost(
                    cost.cycles + count.cycles * times / calls, cost.bytes + moved * times / calls
                )
        found[name] = costs
    return found


def shares_of(spans: str, context: int) -> Callable[[int], Sequence[float]]:
    """How often layers take each branch of a `lax.switch` over lengths.

    Args:
      spans: as `schedule` names them.
      context: length in tokens.
    """
    geometry = schedule.GEOMETRY
    sizes = lengths(context, geometry.block)
    listed = str(schedule.PAPER) if spans == "paper" else spans
    span_XH = attention.spans(listed, context, geometry.heads)
    reach_X = reach(span_XH.max(1), attention.RAMP, 1, context)
    chosen_X = np.searchsorted(sizes, reach_X)
    taken = np.bincount(chosen_X, minlength=len(sizes)) / len(chosen_X)

    def shares(branches: int) -> Sequence[float]:
        assert branches == len(sizes), f"expected {len(sizes)} branches, found {branches}"
        return taken.tolist()

    return shares


def rows_of(
    program: Program,
    schedules: Schedules,
    shares: Callable[[int], Sequence[float]],
    cache: str,
    of_kernels: dict[str, Cost],
) -> Iterator[Row]:
    """What a step executes; what has neither cycles nor bytes is left out.

    Args:
      program: of the step.
      schedules: of its instructions.
      shares: of the branches.
      cache: shape of the cache in the text.
      of_kernels: by the kernel's name, what a call takes.
    """
    for step in program.walk(shares):
        instruction = step.instruction
        computation = program.computations[step.computation]
        part = part_of(program, step, cache)
        if part == OPERATION:
            cost = of_kernels[instruction.name.split(".")[0]]
        else:
            cost = Cost(schedules.of(instruction, computation) or 0, program.moved(step))
        if any(cost):
            yield Row(
                part=part,
                name=instruction.name,
                op_name=instruction.op_name.removeprefix("jit(train_step)/"),
                result=instruction.result.split("{")[0].strip("("),
                times=step.times,
                cycles=cost.cycles * step.times,
                bytes=cost.bytes * step.times,
                beside=instruction.opcode.endswith("-start"),
            )


def measure(work: tuple[str, tuple[str, ...]]) -> dict[str, list[Row]]:
    """Compile a step in this process, and count it for several cases.

    Args:
      work: the chip, and names of `CASES`, all of one context.

    Returns:
      The rows by the name of the case.
    """
    chip, names = work
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as folder:
        compiled = compile_step(chip, CASES[names[0]].longest, Path(folder))
        return count(compiled, chip, names, Path(folder))


def count(
    compiled: Compiled, chip: str, names: Sequence[str], folder: Path
) -> dict[str, list[Row]]:
    """The rows of several cases, by their names, from what libtpu wrote into a folder."""
    program = Program(compiled.text)
    schedules = Schedules(folder, program, chip)
    listed = [CASES[name].spans for name in names]
    of_kernels = kernels(schedules, chip, compiled.context, listed)
    found = {}
    for name in names:
        spans = CASES[name].spans
        shares = shares_of(spans, compiled.context)
        rows = rows_of(program, schedules, shares, compiled.cache, of_kernels[spans])
        found[name] = list(rows)
    return found


# --- reporting -----------------------------------------------------------------------------------


def longer(row: Row, chip: str) -> float:
    """Cycles that an instruction takes at least: its own, or those of its transfers."""
    if row.beside:
        return 0
    return max(row.cycles, transfers(row.bytes, chip))


def transfers(moved: float, chip: str) -> float:
    """Cycles that it takes to move so many bytes at a chip's bandwidth."""
    return moved / schedule.CORES[chip].bandwidth * schedule.clock(chip)


def sums(rows: Sequence[Row], chip: str) -> dict[str, Any]:
    """What instructions take together."""
    moved = sum(row.bytes for row in rows)
    return {
        "cycles": round(sum(row.cycles for row in rows)),
        "bytes": round(moved),
        "transfers": round(transfers(moved, chip)),
        "longer": round(sum(longer(row, chip) for row in rows)),
    }


def by_part(found: dict[str, list[Row]], chip: str) -> list[dict[str, Any]]:
    """Of every case what its parts take, and their share of the step."""
    parts = []
    for case, rows in found.items():
        whole = sums(rows, chip)["longer"]
        for part in PARTS:
            taken = sums([row for row in rows if row.part == part], chip)
            share = round(taken["longer"] / whole, 4)
            parts.append({"chip": chip, "case": case, "part": part, **taken, "share": share})
    return parts


def table(parts: Sequence[dict[str, Any]]) -> str:
    """The parts of every case as a Markdown table."""
    names = ("case", "part", "Mcycles", "MB", "transfers", "longer", "share")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for case in dict.fromkeys(part["case"] for part in parts):
        chosen = [part for part in parts if part["case"] == case]
        numbers = ("cycles", "bytes", "transfers", "longer", "share")
        whole = {name: sum(part[name] for part in chosen) for name in numbers}
        for part in [*chosen, {"case": case, "part": "the step", **whole}]:
            millions = [f"{part[name] / 1e6:.3f}" for name in numbers[:4]]
            cells = [case, part["part"], *millions, f"{part['share']:.3f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def largest(rows: Sequence[Row], chip: str, number: int) -> str:
    """The largest instructions that are no required products, as a Markdown table."""
    names = ("instruction", "result", "part", "times", "Mcycles", "MB", "share", "from")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    whole = sum(longer(row, chip) for row in rows)
    others = [row for row in rows if row.part not in REQUIRED]
    others.sort(key=lambda row: -longer(row, chip))
    for row in others[:number]:
        share = longer(row, chip) / whole
        cells = [row.name, f"`{row.result}`", row.part, f"{row.times:.0f}"]
        cells += [f"{row.cycles / 1e6:.3f}", f"{row.bytes / 1e6:.1f}", f"{share:.3f}"]
        lines.append(f"| {' | '.join(cells)} | `{row.op_name}` |")
    return "\n".join(lines)


def summary(parts: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Of each case the share of each part."""
    shares: dict[str, dict[str, float]] = {}
    for part in parts:
        shares.setdefault(part["case"], {})[part["part"]] = part["share"]
    return shares


def text_of(found: dict[str, list[Row]], chip: str, number: int) -> str:
    """The table of the parts, and the largest instructions of each case."""
    texts = [table(by_part(found, chip))]
    for case, rows in found.items():
        texts.append(f"{case}: the largest instructions that are no required product")
        texts.append(largest(rows, chip, number))
    return "\n\n".join(texts)


def write(
    file: Path, found: dict[str, list[Row]], chip: str, number: int, here: dict[str, str]
) -> None:
    """Keep the parts as JSON lines, and the tables beside them."""
    lines = [json.dumps({**part, **here}) + "\n" for part in by_part(found, chip)]
    file.write_text("".join(lines), encoding="utf8")
    versions = f"{here['commit']}, jax {here['jax']}, libtpu {here['libtpu']}"
    head = (
        f"# A training step on {chip} by libtpu's schedule, {here['date']}\n\n"
        f"By `python -m benchmarks.step_cycles` at {versions}. No TPU was used; the head of "
        "`benchmarks/step_cycles.py` says what is counted.\n\n"
    )
    file.with_suffix(".md").write_text(f"{head}{text_of(found, chip, number)}\n", encoding="utf8")


# --- the command ---------------------------------------------------------------------------------


def measure_all(chip: str, names: Sequence[str], workers: int) -> dict[str, list[Row]]:
    """The rows of every case; each context has a process of its own."""
    work = []
    for longest in (False, True):
        if chosen := tuple(name for name in names if CASES[name].longest == longest):
            work.append((chip, chosen))
    found: dict[str, list[Row]] = {}
    with concurrent.futures.ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for rows in pool.map(measure, work):
            found.update(rows)
    return {name: found[name] for name in names}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chip", choices=CHIPS, default="v5e")
    parser.add_argument("--cases", type=schedule.listed(list(CASES)), default=list(CASES))
    parser.add_argument("--largest", type=int, default=10, help="instructions that are listed")
    parser.add_argument("--workers", type=int, default=2, help="that compile beside each other")
    parser.add_argument("--output", type=Path, help="a .jsonl for the parts, a .md beside it")
    return parser.parse_args()


def main() -> int:
    """Compile and count all cases; print the tables, then a line of JSON."""
    arguments = _arguments()
    schedule.require_libtpu()
    here = {**provenance(), "libtpu": importlib.metadata.version("libtpu")}
    chip = arguments.chip
    found = measure_all(chip, arguments.cases, arguments.workers)
    if arguments.output:
        write(arguments.output, found, chip, arguments.largest, here)
    print(text_of(found, chip, arguments.largest))
    print(json.dumps(summary(by_part(found, chip))))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: benchmarks.step_cycles: {error}", file=sys.stderr)
        sys.exit(2)
