"""Every model of the papers, compiled for TPU slices that need not be here: memory and collectives.

Command:  python -m benchmarks.compile    (needs libtpu: `make test-tpu-compile` installs it and
runs this)

Writes benchmarks/results/DATE-compile.md, and the same as JSON lines, from which a command that was
cut short resumes. Ends with exit code 1 if a step does not fit or has a collective that no rule
allows.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import json
import multiprocessing
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections

from allattn import config, sharding
from allattn.planning import chips, communication, compilation
from allattn.planning.communication import Purpose
from benchmarks.machine import provenance

ROOT = Path(__file__).resolve().parents[1]


class Case(NamedTuple):
    """A configuration and the machine that it is compiled for."""

    # A file of configs/, without its ending.
    config: str
    # The kind of chip, and how many slices of it; the shape is chosen by `largest`.
    chip: str = "v5e"
    slices: int = 1
    # 0: the configuration's.
    batch: int = 0
    fsdp: int = 1
    accumulation: int = 1


# The model with the most parameters.
LARGEST = "wikitext103_xl_large"

MODELS = sorted(
    file.stem
    for file in (ROOT / "configs").glob("*.py")
    if file.stem not in ("__init__", "base", "demo")
)
INTEGRATIONS = [
    f"ablations/text8_{name}" for name in ("split", "head_split", "single_head", "ff_attention")
]
CASES = [
    # Every model, and every integration of persistent vectors.
    *(Case(name) for name in MODELS + INTEGRATIONS),
    # Parameters split, and batches in two parts.
    *(Case(name, fsdp=16) for name in ("enwik8_large", "text8_small", "wikitext103")),
    Case("enwik8_xl_large", batch=256, fsdp=16),
    Case("enwik8_small", batch=256, accumulation=2),
    Case("enwik8_large", batch=256),
    # Other chips, and two slices.
    *(Case(LARGEST, chip) for chip in ("v4", "v5p", "v6e")),
    Case("enwik8_large", slices=2),
    Case(LARGEST, slices=2),
]

# The purposes that the table has a column for.
COLUMNS = (
    Purpose.GRADIENT_REDUCTION,
    Purpose.FSDP_GATHER,
    Purpose.ACTIVATION,
    Purpose.METRICS,
    Purpose.BETWEEN_SLICES,
)


# --- compiling -----------------------------------------------------------------------------------


def largest(c: ml_collections.ConfigDict, chip: str, slices: int) -> tuple[str, int]:
    """The largest slice whose chips rows and heads divide, with as few heads spread as possible.

    Args:
      c: the configuration.
      chip: as in `chips.CHIPS`.
      slices: how many there are.

    Returns:
      The topology, and the size of the mesh's axis `tensor`.

    Raises:
      LookupError: there is none.
    """
    heads = sharding.heads_to_spread(c)
    rows = c.train.batch // c.train.accumulation
    for shape in reversed(chips.CHIPS[chip].shapes):
        devices = slices * len(chips.devices(f"{chip}:{shape}"))
        # Heads are spread only where there are more chips than rows.
        for tensor in range(1, heads + 1):
            if heads % tensor or devices % tensor:
                continue
            # What is left is spread over rows, and the slices are a part of that.
            row_groups = devices // tensor
            if rows % row_groups == 0 and row_groups % slices == 0:
                return f"{chip}:{shape}", tensor
    raise LookupError(f"{chip}: no slice")


def run(case: Case) -> dict[str, Any]:
    """Compile a case.

    Returns:
      What is known of it, as a row of the file.
    """
    c = config.load(str(ROOT / "configs" / f"{case.config}.py")).unlock()
    if case.batch:
        c.train.batch = case.batch
    c.train.accumulation = case.accumulation
    c.mesh.fsdp = case.fsdp
    machine, c.mesh.tensor = largest(c, case.chip, case.slices)
    # The seconds are the compiler's, with tracing.
    began = time.perf_counter()
    name = Path(case.config).stem
    step = compilation.compile_step(c.lock(), name, machine, case.slices)
    seconds = time.perf_counter() - began
    # Collectives are stored as they are printed, and under the names that older files have.
    row = dataclasses.asdict(step)
    del row["collectives"]
    del row["unexpected"]
    return {
        **row,
        "fits": step.fits,
        "violations": step.unexpected,
        "traffic": communication.summary(step.collectives),
        "case": list(case),
        "accumulation": case.accumulation,
        "seconds": round(seconds, 1),
        "block": c.train.block,
        "depth": c.model.depth,
    }


def finished(file: Path, here: dict[str, str]) -> dict[tuple, dict[str, Any]]:
    """The rows of an interrupted run with the same code and versions, with which this one resumes.

    Args:
      file: JSON lines.
      here: from `provenance`.

    Returns:
      From case to row.
    """
    # Code with changes that are not committed has no name by which to recognise it.
    known = here["commit"] and not here["commit"].endswith("-dirty")
    if not known or not file.exists():
        return {}
    rows = [json.loads(line) for line in file.read_text(encoding="utf8").splitlines()]
    return {
        tuple(row["case"]): row
        for row in rows
        if row["commit"] == here["commit"] and row["jax"] == here["jax"]
    }


# --- reporting -----------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; bytes are of whole arrays, in a step, on each device."""
    names = [
        "config",
        "parameters",
        "machine",
        "data x fsdp x tensor",
        "batch",
        "arguments + temporaries + outputs, GiB",
        "of",
        "TFLOP of a device",
        *(f"{purpose.value}, MB" for purpose in COLUMNS),
        "result",
    ]
    # The head of the table, then a line for each case.
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for row in rows:
        lines.append(f"| {' | '.join(_cells(row))} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any]) -> list[str]:
    """The cells of a case, in the order of the table's columns."""
    # What it is: the mesh, and the batch.
    sizes = row["mesh"]
    devices = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    batch = f"{row['batch']}"
    if row["accumulation"] > 1:
        batch = f"{batch} in {row['accumulation']} parts"
    # What it needs, or what the compiler said.
    memory = row["overflow"]
    if row["memory"]:
        memory = " + ".join(f"{size / compilation.GIB:.2f}" for size in row["memory"].values())
    # What it sends.
    megabytes = [_bytes_for(row, purpose) / 1e6 for purpose in COLUMNS]
    result = "fits" if row["fits"] else "does not fit"
    return [
        row["name"],
        f"{row['parameters']:,}",
        machine(row),
        " x ".join(map(str, sizes.values())),
        batch,
        memory,
        f"{row['hbm'] / compilation.GIB:.0f}",
        f"{row['flops'] / devices / 1e12:.2f}",
        *(f"{size:.3g}" for size in megabytes),
        "; ".join([result, *row["violations"]]),
    ]


def _bytes_for(row: dict[str, Any], purpose: Purpose) -> int:
    return sum(entry["bytes"] for entry in row["traffic"] if entry["role"] == purpose.value)


def machine(row: dict[str, Any]) -> str:
    """The topology of a row, and how many of it."""
    slices = f"{row['slices']} x " if row["slices"] > 1 else ""
    return slices + row["topology"]


def activations(rows: list[dict[str, Any]]) -> str:
    """Activation all-reduces of every case with heads over `tensor`, a line each."""
    lines = []
    for row in rows:
        sent = [entry for entry in row["traffic"] if entry["role"] == Purpose.ACTIVATION.value]
        if not sent:
            continue
        # Those in the scan over layers happen once in each layer, the others once in a step.
        in_layer = [
            f"{entry['count']} in a layer, {entry['bytes'] / entry['times'] / 1e6:.3g} MB"
            for entry in sent
            if entry["times"] > 1
        ]
        in_step = [
            f"; {entry['count']} in the step, {entry['bytes'] / 1e6:.3g} MB"
            for entry in sent
            if entry["times"] == 1
        ]
        case = f"{row['name']} on {machine(row)}, tensor {row['mesh']['tensor']}"
        lines.append(f"- {case}: {', '.join(in_layer)}{''.join(in_step)}")
    return "\n".join(lines)


def report(rows: list[dict[str, Any]], commit: str) -> str:
    """The page of results."""
    return (
        f"# Training steps compiled for TPU slices, {datetime.date.today()}\n\n"
        f"By `python -m benchmarks.compile` at {commit}, jax {jax.__version__}; "
        "[docs/scaling.md](../../docs/scaling.md) says what the columns mean.\n\n"
        f"{table(rows)}\n\n"
        f"Activation all-reduces, forward and backward:\n\n{activations(rows)}\n"
    )


def main() -> int:
    """Compile all cases, write the table."""
    arguments = _arguments()
    # Whatever is here, it is only described.
    jax.config.update("jax_platforms", "cpu")
    file = arguments.output / f"{datetime.date.today()}-compile.jsonl"
    # Asked once: the workers take the code as it is now.
    here = provenance()
    rows_by_case = finished(file, here)
    cases = [
        case
        for case in CASES
        if fnmatch.fnmatch(case.config, arguments.only) and case not in rows_by_case
    ]
    with (
        multiprocessing.get_context("spawn").Pool(arguments.workers) as pool,
        file.open("a", encoding="utf8") as out,
    ):
        for result in pool.imap_unordered(run, cases):
            row = {**result, **here}
            rows_by_case[tuple(row["case"])] = row
            # Each row is kept at once, for a run that is interrupted.
            out.write(json.dumps(row) + "\n")
            out.flush()
            _print_progress(row)
        pool.close()
        pool.join()
    # In the order of the cases, however the workers finished.
    rows = [rows_by_case[case] for case in CASES if case in rows_by_case]
    file.with_suffix(".md").write_text(report(rows, here["commit"]), encoding="utf8")
    print(table(rows))
    return int(any(not row["fits"] or row["violations"] for row in rows))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that compile beside each other"
    )
    parser.add_argument("--only", default="*", help="pattern of the configurations")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args()


def _print_progress(row: dict[str, Any]) -> None:
    state = "fits" if row["fits"] else "does not fit"
    seconds = f"{row['seconds']} s"
    print(row["name"], row["topology"], state, *row["violations"], seconds, flush=True)


if __name__ == "__main__":
    sys.exit(main())
