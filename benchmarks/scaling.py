"""Scaling on paper: step time and efficiency from 1 to 4096 chips, from FLOPs, chips' rates and compiled collectives.

Command:  python -m benchmarks.scaling [--config=enwik8_large] [--chip=v5e]
Reads the newest benchmarks/results/*-compile.jsonl, and writes DATE-scaling.md and .png beside it.
Measured here is one thing, that a process has no more to do where there are more of them
(benchmarks/processes.py). `ASSUMED` says what the rest stands on.
"""

import argparse
import dataclasses
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import matplotlib
import ml_collections
import numpy as np

from allattn import config
from allattn.model import ModelConfig, forward_flops
from allattn.planning import communication
from allattn.planning.chips import CHIPS
from benchmarks import processes

matplotlib.use("Agg")  # no screen

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHARE = 0.35  # of a chip's peak that products reach
HOP, CROSSING = 1e-6, 5e-5  # seconds that a message takes to a neighbour, and to another slice
ASSUMED = f"""\
- Products reach {SHARE:.0%} of the chip's bfloat16 peak; no accelerator was at hand to measure it. A slower chip scales
  better, a faster one worse.
- Nothing overlaps: a collective begins when computing ends. The column `overlapped` hides all of it behind computing.
- A sum over n chips moves 2 (n - 1) / n of its bytes out of each chip, over all its links at once (a small slice has
  fewer), and passes 2 (sides of the slice) neighbours, {HOP * 1e6:.0f} us each. Rates are the makers'
  (allattn/topology.py).
- Between slices each chip sums its share of the slice's result, at its share of the host's network card, and waits
  {CROSSING * 1e6:.0f} us for each collective.
- With heads split, gradients that are summed over `tensor` as well are counted as those over rows.
- Bytes and numbers of collectives are those of the compiled step; those of gradients do not depend on the chips.
- Data, checkpoints and evaluation cost nothing, no chip is slower than another, and none fails."""


@dataclasses.dataclass(frozen=True)
class Step:
    """What a step of a configuration computes and sends."""

    flops: float  # of one row: required products
    rows: int
    heads: int
    gradients: tuple[float, int]  # bytes that every chip sums over rows, in how many collectives
    activations: tuple[float, int]  # of one row over `tensor`, in how many collectives


# --- the model
#
#
# ---------------------------------------------------------------------------------------------------


def summing(sent: tuple[float, int], chips: int, name: str) -> float:
    """Seconds to sum arrays of so many bytes, in so many collectives, over chips of the kind named."""
    chip, (size, count) = CHIPS[name], sent
    dimensions = len(chip.shapes[0].split("x"))
    slice_chips = int(np.prod([int(n) for n in chip.shapes[-1].split("x")]))
    inside, slices = min(chips, slice_chips), max(1, chips // slice_chips)
    seconds = 2 * size * (inside - 1) / inside / chip.ici + count * HOP * 2 * dimensions * (
        inside ** (1 / dimensions) - 1
    )
    if slices > 1:
        seconds += 2 * size / inside * (slices - 1) / slices / chip.dcn + count * CROSSING
    return seconds


def weak(step: Step, chips: int, name: str) -> tuple[float, float]:
    """Seconds of computing and of sending where every chip has one row, so that the batch grows."""
    return step.flops / CHIPS[name].flops / SHARE, summing(step.gradients, chips, name)


def strong(step: Step, chips: int, name: str) -> tuple[float, float] | None:
    """The same where the batch stays, first its rows and then heads are spread; None: no more to spread."""
    data = min(chips, step.rows)
    tensor = chips // data
    if tensor > step.heads:
        return None
    computing = step.flops * step.rows / chips / CHIPS[name].flops / SHARE
    gradients = (step.gradients[0] / tensor, step.gradients[1])
    rows, (size, count) = step.rows // data, step.activations
    sending = summing(gradients, data, name) + (
        summing((size * rows, count), tensor, name) if tensor > 1 else 0
    )
    return computing, sending


def stops(rows: list[dict[str, Any]], way: str) -> str:
    """Where a way of scaling ends, in words."""
    half = next((row for row in rows if row[way] and row[way]["efficiency"] < 0.5), None)
    last = [row for row in rows if row[way]][-1]
    if half:
        return f"less than half of every chip is used from {half['chips']} chips on"
    end = "" if last is rows[-1] else ", where rows and heads are used up"
    return f"{last[way]['efficiency']:.0%} at {last['chips']} chips{end}"


def curve(step: Step, name: str) -> list[dict[str, Any]]:
    """Both ways of scaling, from 1 to 4096 chips."""
    rows = []
    for chips in (2**n for n in range(13)):
        row: dict[str, Any] = {"chips": chips, "weak": None, "strong": None}
        for way, found in (
            ("weak", weak(step, chips, name)),
            ("strong", strong(step, chips, name)),
        ):
            if found:
                computing, sending = found
                times = {
                    "seconds": computing + sending,
                    "efficiency": computing / (computing + sending),
                }
                row[way] = {**times, "overlapped": computing / max(computing, sending)}
        rows.append(row)
    return rows


# --- what it stands on
# -------------------------------------------------------------------------------------------


def read(c: ml_collections.ConfigDict, name: str, reach: float, file: Path) -> Step:
    """The step of a configuration from the file of compiled ones; spans that reach so far on average."""
    rows = [
        json.loads(line) for line in reversed(file.read_text().splitlines())
    ]  # the newest first
    plain = {"name": name, "slices": 1, "accumulation": 1}
    rows = [row for row in rows if plain.items() <= row.items() and row["mesh"]["fsdp"] == 1]
    whole = next((row for row in rows if row["mesh"]["tensor"] == 1), None)
    split = next((row for row in rows if row["mesh"]["tensor"] > 1), None)
    if not (whole and split):
        sys.exit(
            f"{file}: expected {name} with heads spread and with none spread; run python -m benchmarks.compile"
        )

    def sent(row: dict[str, Any], role: str) -> tuple[float, int]:
        uses = [use for use in row["traffic"] if use["role"] == role]
        return sum(use["bytes"] for use in uses), sum(use["count"] * use["times"] for use in uses)

    rows_there = split["batch"] // split["mesh"]["data"]
    size, count = sent(split, communication.ACTIVATION)
    flops = 3 * forward_flops(ModelConfig.from_config(c), reach, c.train.block) * c.train.block
    gradients = sent(whole, communication.GRADIENT)
    return Step(flops, c.train.batch, c.model.heads, gradients, (size / rows_there, count))


def mean_reach(c: ml_collections.ConfigDict) -> float:
    """Tokens that heads reach on average with the spans that all benchmarks assume to be like the paper's."""
    spans_XH = np.array(
        json.loads((ROOT / "benchmarks" / "paper_like_spans.json").read_text())["spans"]
    )
    return float(np.minimum(spans_XH + c.model.span.ramp, c.model.span.limit).mean())


# --- saying it
#
#
# ---------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> str:
    """A curve as a Markdown table."""
    lines = [
        "| chips | a row each: step, ms | efficiency | overlapped | batch kept: step, ms | efficiency | overlapped |"
    ]
    lines.append("|---" * 7 + "|")
    for row in rows:
        cells = [str(row["chips"])]
        for found in (row["weak"], row["strong"]):
            if found:
                cells += [
                    f"{found['seconds'] * 1e3:.3g}",
                    f"{found['efficiency']:.0%}",
                    f"{found['overlapped']:.0%}",
                ]
            else:
                cells += ["-"] * 3
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def measured(found: dict[str, Any]) -> str:
    """What several processes really did, as a Markdown table."""
    lines = [
        "Of a process that trains the demo's network with others, 8 rows each, over one by itself, per token:",
        "",
    ]
    lines += [
        "| processes | FLOPs of its program | CPU seconds of the threads that compute |",
        "|---|---|---|",
    ]
    rows = zip(found["processes"], found["flops_ratio"], found["cpu_s_ratio"], strict=True)
    lines += [f"| {count} | {flops:.4f} | {seconds:.2f} |" for count, flops, seconds in rows]
    return "\n".join(
        [
            *lines,
            "",
            f"CPU seconds are over those of as many processes at once; {found['cores']} cores.",
        ]
    )


def plot(curves: dict[str, list[dict[str, Any]]], title: str, path: Path) -> None:
    """Efficiency over chips, a line for each way and span."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4))
    for name, rows in curves.items():
        for way, label, style in (
            ("weak", "a row for each chip", "-"),
            ("strong", "batch kept", "--"),
        ):
            points = [(row["chips"], row[way]["efficiency"]) for row in rows if row[way]]
            axes.plot(*zip(*points, strict=True), style, label=f"{name}, {label}")
    axes.set(xscale="log", xlabel="chips", ylabel="efficiency", ylim=(0, 1.02), title=title)
    axes.set_xscale("log", base=2)
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    """Print and write the tables and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="enwik8_large")
    parser.add_argument(
        "--chip", default="v5e", choices=[n for n, c in CHIPS.items() if c.platform == "tpu"]
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    files = sorted(RESULTS.glob("*-compile.jsonl"))
    if not files:
        sys.exit(
            f"expected a file *-compile.jsonl in {RESULTS}, found none; run python -m benchmarks.compile"
        )
    c = config.load(str(ROOT / "configs" / f"{arguments.config}.py"))
    reaches = {"full spans": float(c.model.span.limit), "spans like the paper's": mean_reach(c)}
    curves = {
        name: curve(read(c, arguments.config, reach, files[-1]), arguments.chip)
        for name, reach in reaches.items()
    }
    title = f"{arguments.config} on {arguments.chip}"
    parts = [
        f"# Scaling on paper: {title}, {datetime.date.today()}",
        f"From {files[-1].name}. Assumed:\n\n{ASSUMED}",
    ]
    for name, rows in curves.items():
        ends = f"A row for each chip: {stops(rows, 'weak')}. Batch kept at {c.train.batch}: {stops(rows, 'strong')}."
        parts.append(
            f"## With {name} (mean reach {reaches[name]:.0f} tokens)\n\n{ends}\n\n{table(rows)}"
        )
    parts.append(f"## Measured\n\n{measured(processes.measure())}")
    text, path = "\n\n".join(parts) + "\n", arguments.output / f"{datetime.date.today()}-scaling.md"
    path.write_text(text)
    plot(curves, title, path.with_suffix(".png"))
    print(text, end="")


if __name__ == "__main__":
    main()
