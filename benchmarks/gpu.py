"""Everything that a GPU is asked for, in under nine minutes: one table, and a file of results.

Command:  python -m benchmarks.gpu [--geometry=enwik8_small --rows=64 --dtype=bfloat16]

Each line of the table is a run of another benchmark in a process of its own, so that one that fails
leaves the others. `share` is required products over the machine's own matrix product, measured in
the same run. Spans like the paper's are in paper_like_spans.json; how much longer they take than
their share of the work is the ratio of the two shares.
"""

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
SPANS = str(HERE / "paper_like_spans.json")
STEP = ("--dropout=0.3", "--seconds=5")  # of every training step


class Line(NamedTuple):
    """A line of the table."""

    name: str
    module: str  # of benchmarks
    options: tuple[str, ...]  # its flags, beside those that all lines have in common
    field: str  # of its JSON, which is reported as the share
    asked: float | None  # the least share; None: it is there to be compared


LINES = (
    Line(
        name="operation, full spans",
        module="attention",
        options=("--spans=full", "--dropout=0.3"),
        field="share_both",
        asked=0.25,
    ),
    Line(
        name="operation, paper-like spans",
        module="attention",
        options=(f"--spans={SPANS}", "--dropout=0.3", "--repeats=3"),
        field="share_both",
        asked=None,
    ),
    Line(
        name="training step, zero spans",
        module="train",
        options=("--spans=zero", *STEP),
        field="share",
        asked=0.40,
    ),
    Line(
        name="training step, paper-like spans",
        module="train",
        options=(f"--spans={SPANS}", *STEP),
        field="share",
        asked=0.25,
    ),
    Line(
        name="the same, remat projections",
        module="train",
        options=(f"--spans={SPANS}", *STEP, "--remat=projections"),
        field="share",
        asked=0.25,
    ),
    Line(
        name="zero spans, remat projections",
        module="train",
        options=("--spans=zero", *STEP, "--remat=projections"),
        field="share",
        asked=0.40,
    ),
    Line(
        name="operation, full spans, plain XLA",
        module="attention",
        options=("--implementation=xla", "--dropout=0.3", "--repeats=1"),
        field="share_both",
        asked=None,
    ),
    # needs PyTorch
    Line(
        name="FlexAttention, full spans",
        module="flex",
        options=("--spans=full",),
        field="share_both",
        asked=None,
    ),
)


def run(module: str, options: list[str], limit: float) -> dict[str, Any]:
    """The JSON line that a benchmark prints last, or what went wrong."""
    command = [sys.executable, "-m", f"benchmarks.{module}", *options]
    try:
        done = subprocess.run(
            command, cwd=HERE.parent, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no result in {limit:.0f} s"}
    if done.returncode:
        # The last line that names an error, since a traceback may be followed by warnings.
        lines = done.stderr.strip().splitlines() or ["no message"]
        errors = [line for line in lines if "Error" in line]
        return {"error": (errors or lines)[-1][:300]}
    return json.loads(done.stdout.splitlines()[-1])


def report(rows: list[dict[str, Any]]) -> str:
    """The table, and how paper-like spans compare with their share of the work."""
    lines = [f"{'':36}{'share':>8}{'asked':>8}{'ms or tokens/s':>16}{'matmul TFLOP/s':>16}"]
    for row in rows:
        asked = f"{row['asked']:.2f}" if row["asked"] else "-"
        if "error" in row:
            lines.append(f"{row['name']:36}{'-':>8}{asked:>8}  {row['error']}")
            continue
        speed = row.get("both_ms") or row.get("tokens_per_s")
        rate = sum(row["matmul_gflops"]) / 2e3
        lines.append(f"{row['name']:36}{row['share']:>8.3f}{asked:>8}{speed:>16}{rate:>16.1f}")
    # Uneven spans leave some of the work idle: how much longer they take than their products ask.
    shares = {row["name"]: row["share"] for row in rows}
    full = shares.get("operation, full spans")
    paper_like = shares.get("operation, paper-like spans")
    if full and paper_like:
        lines.append(
            f"paper-like spans take {full / paper_like:.2f} x their share of the time of full "
            "spans (asked: 1.30)"
        )
    return "\n".join(lines)


def main() -> None:
    """Run every line within the budget, print the table, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", default="enwik8_small")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds for all of it")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    arguments = parser.parse_args()
    began = time.perf_counter()
    rows: list[dict[str, Any]] = []
    common = [
        f"--geometry={arguments.geometry}",
        f"--rows={arguments.rows}",
        f"--dtype={arguments.dtype}",
    ]
    for line in LINES:
        left = arguments.budget - (time.perf_counter() - began)
        result = run(line.module, [*common, *line.options], left)
        share = result.get(line.field)
        rows.append({"name": line.name, "asked": line.asked, "share": share, **result})
        print(report(rows[-1:]).splitlines()[-1], flush=True)
    path = arguments.results / f"{datetime.date.today().isoformat()}-gpu.json"
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf8")
    print(f"\n{report(rows)}\n{path}")


if __name__ == "__main__":
    main()
