"""Every model of the papers, compiled for TPU slices that need not be here: does it fit, what does it send?

Command:  python -m benchmarks.compile    (with libtpu; `make test-tpu-compile` installs it and runs
this) Writes benchmarks/results/DATE-compile.md, and the same as JSON lines, from which a command
that was cut short goes on; ends with exit code 1 if a step does not fit or has a collective that
must not be.
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
from benchmarks.machine import provenance

ROOT = Path(__file__).resolve().parents[1]
MAX_MASK_DERIVATIVE = "wikitext103_xl_large"


class Case(NamedTuple):
    """A configuration and the machine that it is compiled for."""

    config: str
    chip: str = "v5e"
    slices: int = 1
    batch: int = 0  # 0: the configuration's
    fsdp: int = 1
    accumulation: int = 1


MODELS = sorted(
    p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in ("__init__", "base", "demo")
)
INTEGRATIONS = [
    f"ablations/text8_{name}" for name in ("split", "head_split", "single_head", "ff_attention")
]
CASES = [
    *map(Case, MODELS + INTEGRATIONS),
    *(Case(name, fsdp=16) for name in ("enwik8_large", "text8_small", "wikitext103")),
    Case("enwik8_xl_large", batch=256, fsdp=16),
    Case("enwik8_small", batch=256, accumulation=2),
    Case("enwik8_large", batch=256),
    *(Case(MAX_MASK_DERIVATIVE, chip) for chip in ("v4", "v5p", "v6e")),
    Case("enwik8_large", slices=2),
    Case(MAX_MASK_DERIVATIVE, slices=2),
]


def largest(c: ml_collections.ConfigDict, chip: str, slices: int) -> tuple[str, int]:
    """The largest slice whose chips rows and heads divide, and over how many heads are spread, as few as possible."""
    heads, rows = sharding.heads_to_spread(c), c.train.batch // c.train.accumulation
    for shape in reversed(chips.CHIPS[chip].shapes):
        count = slices * len(chips.devices(f"{chip}:{shape}"))
        for tensor in (n for n in range(1, heads + 1) if heads % n == 0):
            if (
                count % tensor == 0
                and rows % (count // tensor) == 0
                and count // tensor % slices == 0
            ):
                return f"{chip}:{shape}", tensor
    raise LookupError(f"{chip}: no slice")


def run(case: Case) -> dict[str, Any]:
    """Compile a case; what is known of it, for a file."""
    c = config.load(str(ROOT / "configs" / f"{case.config}.py")).unlock()
    c.train.batch, c.train.accumulation = case.batch or c.train.batch, case.accumulation
    c.mesh.fsdp = case.fsdp
    machine, c.mesh.tensor = largest(c, case.chip, case.slices)
    began = time.perf_counter()
    found = compilation.compile_step(c.lock(), Path(case.config).stem, machine, case.slices)
    row = {
        name: value
        for name, value in dataclasses.asdict(found).items()
        if name not in ("uses", "broken")
    }
    row |= {
        "fits": found.fits,
        "violations": found.broken,
        "traffic": communication.summary(found.uses),
    }
    row |= {"case": list(case), "accumulation": case.accumulation}
    return {
        **row,
        "seconds": round(time.perf_counter() - began, 1),
        "block": c.train.block,
        "depth": c.model.depth,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table; bytes are of whole arrays, in a step, on each device."""
    roles = (
        communication.GRADIENT,
        communication.GATHER,
        communication.ACTIVATION,
        communication.METRICS,
        communication.BETWEEN,
    )
    lines = [
        "| config | parameters | machine | data x fsdp x tensor | batch | arguments + temporaries + outputs, GiB "
        "| of | TFLOP of a device | " + " | ".join(f"{role}, MB" for role in roles) + " | result |",
        "|---" * (9 + len(roles)) + "|",
    ]
    for row in rows:
        memory = (
            " + ".join(f"{size / compilation.GIB:.2f}" for size in row["memory"].values())
            or row["overflow"]
        )
        devices = row["mesh"]["data"] * row["mesh"]["fsdp"] * row["mesh"]["tensor"]
        sent = [
            sum(use["bytes"] for use in row["traffic"] if use["role"] == role) / 1e6
            for role in roles
        ]
        result = "fits" if row["fits"] else "does not fit"
        cells = [row["name"], f"{row['parameters']:,}", machine(row)]
        batch = f"{row['batch']}" + (
            f" in {row['accumulation']} parts" if row["accumulation"] > 1 else ""
        )
        cells += [" x ".join(map(str, row["mesh"].values())), batch, memory]
        cells += [f"{row['hbm'] / compilation.GIB:.0f}", f"{row['flops'] / devices / 1e12:.2f}"]
        cells += [
            *(f"{megabytes:.3g}" for megabytes in sent),
            "; ".join([result, *row["violations"]]),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def machine(row: dict[str, Any]) -> str:
    """The topology of a row, and how many of it."""
    return (f"{row['slices']} x " if row["slices"] > 1 else "") + row["topology"]


def activations(rows: list[dict[str, Any]]) -> str:
    """Activation all-reduces of every case with heads over `tensor`: how many in a layer, of how many bytes."""
    lines = []
    for row in rows:
        uses = [u for u in row["traffic"] if u["role"] == communication.ACTIVATION]
        inside, once = ([u for u in uses if (u["times"] > 1) is looped] for looped in (True, False))
        if uses:
            each = ", ".join(
                f"{u['count']} in a layer, {u['bytes'] / u['times'] / 1e6:.3g} MB" for u in inside
            )
            rest = "".join(f"; {u['count']} in the step, {u['bytes'] / 1e6:.3g} MB" for u in once)
            lines.append(
                f"- {row['name']} on {machine(row)}, tensor {row['mesh']['tensor']}: {each}{rest}"
            )
    return "\n".join(lines)


def finished(file: Path, here: dict[str, str]) -> dict[tuple, dict[str, Any]]:
    """The rows by case of an interrupted run with the same code and versions, with which this one goes on."""
    known = here["commit"] and not here["commit"].endswith("-dirty")
    rows = (
        [json.loads(line) for line in file.read_text().splitlines()]
        if known and file.exists()
        else []
    )
    return {
        tuple(row["case"]): row
        for row in rows
        if all(row[name] == here[name] for name in ("commit", "jax"))
    }


def main() -> int:
    """Compile all cases, write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that compile beside each other"
    )
    parser.add_argument("--only", default="*", help="pattern of the configurations")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # whatever is here
    file = arguments.output / f"{datetime.date.today()}-compile.jsonl"
    here = provenance()  # once: the workers take the code as it is now
    done = finished(file, here)
    cases = [
        case for case in CASES if fnmatch.fnmatch(case.config, arguments.only) and case not in done
    ]
    with (
        multiprocessing.get_context("spawn").Pool(arguments.workers) as pool,
        file.open("a") as out,
    ):
        for row in pool.imap_unordered(run, cases):
            done[tuple(row["case"])] = row = {**row, **here}
            out.write(json.dumps(row) + "\n")
            out.flush()
            state = "fits" if row["fits"] else "does not fit"
            print(
                row["name"],
                row["topology"],
                state,
                *row["violations"],
                f"{row['seconds']} s",
                flush=True,
            )
        pool.close()
        pool.join()
    rows = [done[case] for case in CASES if case in done]
    text = (
        f"# Training steps compiled for TPU slices, {datetime.date.today()}\n\n"
        f"By `python -m benchmarks.compile` at {here['commit']}, jax {jax.__version__}; [docs/scaling.md]"
        f"(../../docs/scaling.md) says what the columns mean.\n\n{table(rows)}\n\n"
        f"Activation all-reduces, forward and backward:\n\n{activations(rows)}\n"
    )
    file.with_suffix(".md").write_text(text)
    print(table(rows))
    return int(any(not row["fits"] or row["violations"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
