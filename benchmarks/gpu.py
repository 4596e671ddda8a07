"""Everything that a GPU is asked for, in under nine minutes: one table, and a file under benchmarks/results.

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
from typing import Any

HERE = Path(__file__).parent
SPANS = str(HERE / "paper_like_spans.json")

AGAIN = ["--dropout=0.3", "--seconds=5", "--remat=projections"]

# name, module, its options, the field to report, asked
LINES: tuple[tuple[str, str, list[str], str, float | None], ...] = (
    ("operation, full spans", "attention", ["--spans=full", "--dropout=0.3"], "share_both", 0.25),
    (
        "operation, paper-like spans",
        "attention",
        [f"--spans={SPANS}", "--dropout=0.3", "--repeats=3"],
        "share_both",
        None,
    ),
    (
        "training step, zero spans",
        "train",
        ["--spans=zero", "--dropout=0.3", "--seconds=5"],
        "share",
        0.40,
    ),
    (
        "training step, paper-like spans",
        "train",
        [f"--spans={SPANS}", "--dropout=0.3", "--seconds=5"],
        "share",
        0.25,
    ),
    ("the same, remat projections", "train", [f"--spans={SPANS}", *AGAIN], "share", 0.25),
    ("zero spans, remat projections", "train", ["--spans=zero", *AGAIN], "share", 0.40),
    (
        "operation, full spans, plain XLA",
        "attention",
        ["--implementation=xla", "--dropout=0.3", "--repeats=1"],
        "share_both",
        None,
    ),
    ("FlexAttention, full spans", "flex", ["--spans=full"], "share_both", None),  # needs torch
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
        lines = done.stderr.strip().splitlines() or ["no message"]
        return {
            "error": next((line for line in reversed(lines) if "Error" in line), lines[-1])[:300]
        }
    return json.loads(done.stdout.splitlines()[-1])


def report(found: list[dict[str, Any]]) -> str:
    """The table, and how paper-like spans compare with their share of the work."""
    lines = [f"{'':36}{'share':>8}{'asked':>8}{'ms or tokens/s':>16}{'matmul TFLOP/s':>16}"]
    for row in found:
        asked = f"{row['asked']:.2f}" if row["asked"] else "-"
        if "error" in row:
            lines.append(f"{row['name']:36}{'-':>8}{asked:>8}  {row['error']}")
            continue
        speed, rate = row.get("both_ms") or row.get("tokens_per_s"), sum(row["matmul_gflops"]) / 2e3
        lines.append(f"{row['name']:36}{row['share']:>8.3f}{asked:>8}{speed:>16}{rate:>16.1f}")
    shares = {row["name"]: row["share"] for row in found}
    full, like = (shares.get(f"operation, {kind} spans") for kind in ("full", "paper-like"))
    if full and like:
        lines.append(
            f"paper-like spans take {full / like:.2f} x their share of the time of full spans (asked: 1.30)"
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
    began, found = time.perf_counter(), []
    common = [
        f"--geometry={arguments.geometry}",
        f"--rows={arguments.rows}",
        f"--dtype={arguments.dtype}",
    ]
    for name, module, options, field, asked in LINES:
        result = run(module, common + options, arguments.budget - (time.perf_counter() - began))
        found.append({"name": name, "asked": asked, "share": result.get(field), **result})
        print(report(found[-1:]).splitlines()[-1], flush=True)
    path = arguments.results / f"{datetime.date.today().isoformat()}-gpu.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{report(found)}\n{path}")


if __name__ == "__main__":
    main()
