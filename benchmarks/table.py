"""The CPU figures beside those asked.

Command:  python -m benchmarks.table FILE.jsonl

FILE holds the rows that `make bench` prints. The authors' PyTorch code was timed on two cores whose
float32 matrix product ran at 165 GFLOP/s. A speed here is divided by theirs after both are divided
by the rate of their own machine's product. Where a file has several rows for a line, the last one
counts.
"""

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

AUTHORS_GFLOPS = 165.0


class Line(NamedTuple):
    """A figure asked for, and the row of the file that answers it."""

    # which row
    mode: str
    geometry: str
    spans: str
    # what is asked of it
    authors: float  # tokens/s of the authors' code
    least: float  # times the authors' speed
    aim: float


LINES = (
    Line("train", "small-8", "full", 211, 3.5, 5),
    Line("train", "small-8", "mixed", 211, 5, 8),
    Line("train", "tiny", "full", 2500, 1.3, 1.8),
    Line("evaluate", "small-8", "full", 767, 3, 4.5),
)


def find(rows: list[dict[str, Any]], line: Line) -> dict[str, Any] | None:
    """The last row of the measurement that a line names."""
    wanted = {"mode": line.mode, "geometry": line.geometry, "spans": line.spans, "dropout": 0.0}
    matching = [
        row for row in rows if all(row.get(name) == value for name, value in wanted.items())
    ]
    return matching[-1] if matching else None


def ratio(row: dict[str, Any], line: Line) -> float:
    """Times the authors' speed, both at equal rates of the matrix product."""
    rate = sum(row["matmul_gflops"]) / 2
    return float(row["tokens_per_s"] / line.authors * AUTHORS_GFLOPS / rate)


def report(rows: list[dict[str, Any]]) -> str:
    """The table as text."""
    lines = [f"{'':32}{'tokens/s':>10}{'GFLOP/s':>10}{'x authors':>11}{'asked':>7}{'aim':>6}"]
    for line in LINES:
        row = find(rows, line)
        name = f"{line.mode} {line.geometry}, {line.spans} spans"
        if row is None:
            lines.append(f"{name:32}{'-':>10}{'-':>10}{'-':>11}{line.least:>7}{line.aim:>6}")
            continue
        rate = sum(row["matmul_gflops"]) / 2
        figures = f"{row['tokens_per_s']:>10.0f}{rate:>10.0f}{ratio(row, line):>11.2f}"
        lines.append(f"{name:32}{figures}{line.least:>7}{line.aim:>6}")
    # What dropout costs the operation, for the two kinds of spans that are measured.
    timed_with_dropout = [row for row in rows if "dropout_costs" in row]
    for row in timed_with_dropout[-2:]:
        name = f"dropout {row['dropout']} costs, {row['geometry']}, {row['spans']}"
        lines.append(f"{name:52}{row['dropout_costs']:>11.2f}{1.25:>7}{1.1:>6}")
    return "\n".join(lines)


def main() -> None:
    """Print the table of a file."""
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f"expected a file of JSON lines, found {' '.join(sys.argv[1:]) or 'nothing'}")
    text = Path(sys.argv[1]).read_text(encoding="utf8")
    print(report([json.loads(line) for line in text.splitlines()]))


if __name__ == "__main__":
    main()
