"""Scaling on paper: step time and efficiency from 1 to 4096 chips.

Command:  python -m benchmarks.scaling [--config=enwik8_large] [--chip=v5e]

From required FLOPs, makers' rates and the collectives of compiled steps: reads the newest
benchmarks/results/*-compile.jsonl, and writes DATE-scaling.md and .png beside it. One thing is
measured, that a process has no more to do where there are more of them (benchmarks/processes.py).
`ASSUMED` says what the rest stands on.

The batch can be spread in two ways:

    weak      every chip has one row, so the batch grows with the chips
    strong    the batch stays: first its rows are spread, then its heads

Dimension key: X layer, H head.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import ml_collections
import numpy as np

from allattn import config
from allattn.model import ModelConfig, forward_flops
from allattn.planning.chips import CHIPS
from allattn.planning.communication import Purpose
from benchmarks import processes

# Draw into files; there may be no screen.
matplotlib.use("Agg")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# The share of a chip's peak rate that products reach.
SHARE = 0.35

# Seconds that a message takes to a neighbour, and to another slice.
HOP = 1e-6
CROSSING = 5e-5

# The numbers of chips in the tables.
CHIP_COUNTS = tuple(2**n for n in range(13))

# What the report says of this model of time; keep it true when `summing` changes.
ASSUMED = f"""\
- Products reach {SHARE:.0%} of the chip's bfloat16 peak; no accelerator was at hand to measure it.
  A slower chip scales better, a faster one worse.
- Nothing overlaps: a collective begins when computing ends. The column `overlapped` hides all of it
  behind computing.
- A sum over n chips moves 2 (n - 1) / n of its bytes out of each chip, over all its links at once
  (a small slice has fewer), and passes 2 (sides of the slice) neighbours, {HOP * 1e6:.0f} us each.
  Rates are the makers' (allattn/planning/chips.py).
- Between slices each chip sums its share of the slice's result, at its share of the host's network
  card, and waits {CROSSING * 1e6:.0f} us for each collective.
- With heads split, gradients that are summed over `tensor` as well are counted as those over rows.
- Bytes and numbers of collectives are those of the compiled step; those of gradients do not depend
  on the chips.
- Data, checkpoints and evaluation cost nothing, no chip is slower than another, and none fails."""

# Bytes of collectives, and how many there are.
Traffic = tuple[float, int]


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of a configuration computes and sends."""

    # Required products of one row.
    flops: float
    # Rows of the batch, and heads of a layer.
    rows: int
    heads: int
    # What every chip sums over rows.
    gradients: Traffic
    # What one row sums over `tensor`.
    activations: Traffic


# --- the model of time ---------------------------------------------------------------------------


def summing(traffic: Traffic, chips: int, name: str) -> float:
    """Seconds to sum arrays over chips.

    Args:
      traffic: bytes of the arrays, and the number of collectives.
      chips: how many; beyond the largest slice there are several slices.
      name: of the chip, as in `CHIPS`.
    """
    size, count = traffic
    chip = CHIPS[name]
    # A slice is a torus of two or three dimensions.
    sides = [int(side) for side in chip.shapes[-1].split("x")]
    dimensions = len(sides)
    slice_chips = int(np.prod(sides))
    inside = min(chips, slice_chips)
    slices = max(1, chips // slice_chips)
    # A reduce-scatter and an all-gather: each moves (n - 1) / n of the bytes, and passes all
    # neighbours of a side, for each dimension.
    hops = 2 * dimensions * (inside ** (1 / dimensions) - 1)
    seconds = 2 * size * (inside - 1) / inside / chip.ici + count * HOP * hops
    # Each chip has summed its share within the slice, and sums it with its like in the others.
    if slices > 1:
        share = 2 * size / inside * (slices - 1) / slices
        seconds += share / chip.dcn + count * CROSSING
    return seconds


def weak(step: Step, chips: int, name: str) -> tuple[float, float]:
    """Seconds of computing and of sending where every chip has one row, so that the batch grows."""
    # A chip computes the same and sends the same gradients, however many there are.
    computing = step.flops / CHIPS[name].flops / SHARE
    return computing, summing(step.gradients, chips, name)


def strong(step: Step, chips: int, name: str) -> tuple[float, float] | None:
    """Seconds of computing and of sending where the batch stays; None: no more to spread."""
    # First rows are spread, then heads.
    data = min(chips, step.rows)
    tensor = chips // data
    if tensor > step.heads:
        return None
    computing = step.flops * step.rows / chips / CHIPS[name].flops / SHARE
    # Each group of heads sums its own part of the gradients.
    gradient_bytes, gradient_count = step.gradients
    sending = summing((gradient_bytes / tensor, gradient_count), data, name)
    if tensor > 1:
        row_bytes, activation_count = step.activations
        rows_of_chip = step.rows // data
        sending += summing((row_bytes * rows_of_chip, activation_count), tensor, name)
    return computing, sending


def curve(step: Step, name: str) -> list[dict[str, Any]]:
    """Both ways of scaling, from 1 to 4096 chips.

    Returns:
      A row for each number of chips: `chips`, `weak` and `strong`, each of these None or `seconds`
      of a step, `efficiency`, and `overlapped`, the efficiency if sending hides behind computing.
    """
    return [
        {
            "chips": chips,
            "weak": _times(weak(step, chips, name)),
            "strong": _times(strong(step, chips, name)),
        }
        for chips in CHIP_COUNTS
    ]


def _times(seconds: tuple[float, float] | None) -> dict[str, float] | None:
    if seconds is None:
        return None
    computing, sending = seconds
    return {
        "seconds": computing + sending,
        "efficiency": computing / (computing + sending),
        "overlapped": computing / max(computing, sending),
    }


def stops(rows: list[dict[str, Any]], way: str) -> str:
    """Where a way of scaling ends, as a sentence.

    Args:
      rows: from `curve`.
      way: "weak" or "strong".
    """
    reached = [row for row in rows if row[way]]
    # More than half of every chip waits: that is where to stop.
    for row in reached:
        if row[way]["efficiency"] < 0.5:
            return f"less than half of every chip is used from {row['chips']} chips on"
    last = reached[-1]
    end = "" if last is rows[-1] else ", where rows and heads are used up"
    return f"{last[way]['efficiency']:.0%} at {last['chips']} chips{end}"


# --- reading what it stands on -------------------------------------------------------------------


def read(c: ml_collections.ConfigDict, name: str, reach: float, file: Path) -> Step:
    """The step of a configuration, from the file of compiled steps.

    Args:
      c: the configuration.
      name: of the configuration.
      reach: tokens that a head reaches, on average.
      file: JSON lines that benchmarks/compile.py wrote.
    """
    # The newest rows of the plain case: one slice, the batch in one part, nothing split by fsdp.
    rows = [json.loads(line) for line in reversed(file.read_text(encoding="utf8").splitlines())]
    plain = {"name": name, "slices": 1, "accumulation": 1}
    rows = [row for row in rows if plain.items() <= row.items() and row["mesh"]["fsdp"] == 1]
    # Gradients are read where heads are whole, and activations where they are split.
    whole = next((row for row in rows if row["mesh"]["tensor"] == 1), None)
    split = next((row for row in rows if row["mesh"]["tensor"] > 1), None)
    if not (whole and split):
        expected = f"{name} with heads spread and with none spread"
        sys.exit(f"{file}: expected {expected}; run python -m benchmarks.compile")
    # Activations grow with the rows of a device, gradients do not.
    size, count = _traffic(split, Purpose.ACTIVATION)
    rows_of_device = split["batch"] // split["mesh"]["data"]
    flops_per_token = 3 * forward_flops(ModelConfig.from_config(c), reach, c.train.block)
    return Step(
        flops=flops_per_token * c.train.block,
        rows=c.train.batch,
        heads=c.model.heads,
        gradients=_traffic(whole, Purpose.GRADIENT_REDUCTION),
        activations=(size / rows_of_device, count),
    )


def _traffic(row: dict[str, Any], purpose: Purpose) -> Traffic:
    """Bytes and number of the collectives of a compiled step that are for one purpose."""
    sent = [entry for entry in row["traffic"] if entry["role"] == purpose.value]
    size = sum(entry["bytes"] for entry in sent)
    count = sum(entry["count"] * entry["times"] for entry in sent)
    return size, count


def mean_reach(c: ml_collections.ConfigDict) -> float:
    """Tokens that heads reach on average, with the paper-like spans that all benchmarks assume."""
    file = ROOT / "benchmarks" / "paper_like_spans.json"
    spans_XH = np.array(json.loads(file.read_text(encoding="utf8"))["spans"])
    reach_XH = np.minimum(spans_XH + c.model.span.ramp, c.model.span.limit)
    return float(reach_XH.mean())


# --- reporting -----------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """A curve as a Markdown table."""
    # Three columns for each way.
    columns = (
        "chips",
        "a row each: step, ms",
        "efficiency",
        "overlapped",
        "batch kept: step, ms",
        "efficiency",
        "overlapped",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = [str(row["chips"]), *_cells(row["weak"]), *_cells(row["strong"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(times: dict[str, float] | None) -> list[str]:
    if times is None:
        return ["-"] * 3
    return [
        f"{times['seconds'] * 1e3:.3g}",
        f"{times['efficiency']:.0%}",
        f"{times['overlapped']:.0%}",
    ]


def measured(ratios: dict[str, Any]) -> str:
    """What several processes really did, as a Markdown table.

    Args:
      ratios: from `processes.measure`.
    """
    lines = [
        "Of a process that trains the demo's network with others, 8 rows each, over one by itself, "
        "per token:",
        "",
        "| processes | FLOPs of its program | CPU seconds of the threads that compute |",
        "|---|---|---|",
    ]
    # A row for each number of processes.
    rows = zip(ratios["processes"], ratios["flops_ratio"], ratios["cpu_s_ratio"], strict=True)
    lines += [f"| {count} | {flops:.4f} | {seconds:.2f} |" for count, flops, seconds in rows]
    lines.append("")
    cores = ratios["cores"]
    lines.append(f"CPU seconds are over those of as many processes at once; {cores} cores.")
    return "\n".join(lines)


def plot(curves: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Efficiency over chips, a line for each way and span."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, rows in curves.items():
        for way, label, style in (
            ("weak", "a row for each chip", "-"),
            ("strong", "batch kept", "--"),
        ):
            # A line ends where there is no more to spread.
            reached = [row for row in rows if row[way]]
            chips = [row["chips"] for row in reached]
            efficiency = [row[way]["efficiency"] for row in reached]
            axes.plot(chips, efficiency, style, label=f"{name}, {label}")
    axes.set(xscale="log", xlabel="chips", ylabel="efficiency", ylim=(0, 1.02), title=title)
    axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Print and write the tables and the plot."""
    arguments = _arguments()
    file = _newest_compiled()
    c = config.load(str(ROOT / "configs" / f"{arguments.config}.py"))
    reaches = {"full spans": float(c.model.span.limit), "spans like the paper's": mean_reach(c)}
    curves = {
        name: curve(read(c, arguments.config, reach, file), arguments.chip)
        for name, reach in reaches.items()
    }
    # One section for each length of spans, between what is assumed and what is measured.
    today = datetime.date.today()
    title = f"{arguments.config} on {arguments.chip}"
    sections = [
        f"# Scaling on paper: {title}, {today}",
        f"From {file.name}. Assumed:\n\n{ASSUMED}",
    ]
    sections += _sections(curves, reaches, c.train.batch)
    sections.append(f"## Measured\n\n{measured(processes.measure())}")
    text = "\n\n".join(sections) + "\n"
    path = arguments.output / f"{today}-scaling.md"
    path.write_text(text, encoding="utf8")
    plot(curves, title, path.with_suffix(".png"))
    print(text, end="")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # A node of GPUs is no torus, so the model of time does not hold for it.
    tpus = [name for name, chip in CHIPS.items() if chip.platform == "tpu"]
    parser.add_argument("--config", default="enwik8_large")
    parser.add_argument("--chip", default="v5e", choices=tpus)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


def _newest_compiled() -> Path:
    """The newest file of compiled steps; their names begin with the date."""
    files = sorted(RESULTS.glob("*-compile.jsonl"))
    if not files:
        expected = f"a file *-compile.jsonl in {RESULTS}"
        sys.exit(f"expected {expected}, found none; run python -m benchmarks.compile")
    return files[-1]


def _sections(
    curves: dict[str, list[dict[str, Any]]], reaches: dict[str, float], batch: int
) -> Iterator[str]:
    """A section of the report for each curve: where it ends, and its table."""
    for name, rows in curves.items():
        head = f"## With {name} (mean reach {reaches[name]:.0f} tokens)"
        each_row = f"A row for each chip: {stops(rows, 'weak')}."
        batch_kept = f"Batch kept at {batch}: {stops(rows, 'strong')}."
        yield f"{head}\n\n{each_row} {batch_kept}\n\n{table(rows)}"


if __name__ == "__main__":
    main()
