"""Figures of runs: their learning curves, and how far back their heads look.

A figure is drawn on its own, without matplotlib's global state: a notebook shows it where it is the
value of a cell, and `figure.savefig(file)` writes it.

Dimension key: X layer, H head.
"""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import matplotlib.figure
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from allattn.errors import UserError
from allattn.train.jsonl import read_jsonl

Rows = Sequence[Mapping[str, Any]]
Workdir = str | os.PathLike[str]
# One run or several.
Runs = Workdir | Rows | Sequence[Workdir] | Mapping[str, Workdir | Rows]

# What the axis of each score says.
UNITS = {
    "nll": "nats per symbol",
    "bpc": "bits per byte (bpc)",
    "ppl": "perplexity (ppl)",
}
# A smoothed curve is a mean over this share of a run's rows.
WINDOW = 1 / 25


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows by itself."""

    def _repr_png_(self) -> bytes:
        image = io.BytesIO()
        self.savefig(image, format="png", dpi=80)
        return image.getvalue()


# --- learning curves -----------------------------------------------------------------------------


def plot_curves(runs: Runs, unit: str | None = None) -> Figure:
    """Learning curves: the training score, smoothed, and the score on dev as points.

    Args:
      runs: a workdir (folder or bucket URL), several, or the same by the names that the legend is
        to have. Rows as `allattn.read_metrics` returns them may stand for a workdir.
      unit: nll, bpc or ppl; None: what the papers report, perplexity of words and bits per byte
        of everything else.

    Returns:
      The figure. A run that has logged nothing yet, or has no workdir yet, is in its legend.

    Raises:
      UserError: another unit.

    Example:
      >>> figure = allattn.plot_curves({"mine": workdir}, unit="bpc")
      >>> figure.axes[0].get_xlabel()
      'training step'
    """
    rows_by_name = {name: _rows(run) for name, run in _by_name(runs).items()}
    unit = unit or _usual_unit(rows_by_name.values())
    if unit not in UNITS:
        raise UserError(f"unit: expected one of {', '.join(UNITS)}, found {unit!r}")

    # A colour for each run.
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel=UNITS[unit])
    for number, (name, rows) in enumerate(rows_by_name.items()):
        _draw_run(axes, name, rows, unit, f"C{number}")
    axes.grid(alpha=0.3)
    if rows_by_name:
        axes.legend()
    return figure


def _by_name(runs: Runs) -> Mapping[str, Workdir | Rows]:
    """Runs by the names in the legend: the last folders of their workdirs where these differ."""
    if isinstance(runs, Mapping):
        return runs
    if isinstance(runs, str | os.PathLike):
        runs = [runs]
    # The rows of one run; without any, nothing tells them from no workdirs, nor need it.
    if runs and isinstance(runs[0], Mapping):
        return {"run": runs}  # type: ignore[dict-item]
    workdirs = [os.fspath(workdir) for workdir in runs]  # type: ignore[arg-type]
    names = [PurePosixPath(workdir).name for workdir in workdirs]
    if len(set(names)) < len(names):
        names = workdirs
    return dict(zip(names, workdirs, strict=True))


def _rows(run: Workdir | Rows) -> Rows:
    if not isinstance(run, str | os.PathLike):
        return run
    # A picture that is drawn while its run goes on begins before the run does.
    if not epath.Path(run).exists():
        return []
    return read_jsonl(os.fspath(run))


def _usual_unit(runs: Any) -> str:
    """Perplexity if all runs are of words: only those have a perplexity of words."""
    logged = [rows for rows in runs if rows]
    of_words = [any("dev_ppl_words" in row for row in rows) for rows in logged]
    return "ppl" if of_words and all(of_words) else "bpc"


def _draw_run(axes: Axes, name: str, rows: Rows, unit: str, color: str) -> None:
    """The curve and the points of a run."""
    steps, scores = _points(rows, unit)
    dev_steps, dev_scores = _points(rows, f"dev_{unit}")
    # The legend tells of a run before it has logged anything.
    label = f"{name}, training"
    if not len(steps):
        label = f"{name}, nothing logged yet"
    # Behind the smoothed curve the scores as they were logged.
    axes.plot(steps, scores, color=color, alpha=0.25, linewidth=1)
    axes.plot(steps, _smoothed(scores), color=color, label=label)
    if len(dev_steps):
        axes.plot(dev_steps, dev_scores, "o", color=color, markersize=4, label=f"{name}, dev")


def _points(rows: Rows, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have a number under a name; one that was lost is null."""
    found = [row for row in rows if isinstance(row.get(name), int | float)]
    steps = np.array([row["step"] for row in found], float)
    values = np.array([row[name] for row in found], float)
    return steps, values


def _smoothed(values: np.ndarray) -> np.ndarray:
    """Means over windows around each value, which narrow towards both ends."""
    count = len(values)
    half = int(count * WINDOW / 2)
    # As far from a value to both sides as there are values on both.
    places = np.arange(count)
    reach = np.minimum(half, np.minimum(places, count - 1 - places))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[places + reach + 1] - sums[places - reach]) / (2 * reach + 1)


# --- spans ---------------------------------------------------------------------------------------


def plot_spans(spans_XH: np.ndarray, limit: int, ramp: int, learned: bool = True) -> Figure:
    """The span of every head by layer, on an axis that is the same for all runs of a limit.

    Args:
      spans_XH: spans in tokens.
      limit: the longest span that a head can have, in tokens.
      ramp: tokens over which attention falls off beyond a span.
      learned: False: the figure says that they are not.

    Returns:
      The figure.
    """
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="layer", ylabel="span in tokens")
    axes.set_title(_span_title(spans_XH, limit, learned))
    axes.grid(alpha=0.3)

    # The heads of a layer side by side in the order of their numbers, over its name.
    X, H = spans_XH.shape
    offsets_H = (np.arange(H) - (H - 1) / 2) * 0.7 / max(1, H)
    layers_XH = np.arange(1, X + 1)[:, None] + offsets_H
    axes.scatter(layers_XH, spans_XH, s=18, alpha=0.8, label="a head")
    if H:
        axes.plot(np.arange(1, X + 1), spans_XH.mean(1), color="C1", label="mean of a layer")
    axes.axhline(limit, color="grey", linestyle="--", linewidth=1, label=f"limit, {limit}")

    # Most spans are far below the limit: equal up to a ramp, by their ratios from there on.
    axes.set_yscale("symlog", linthresh=max(1, ramp), base=2)
    axes.set_ylim(0, limit * 1.4)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False)
    return figure


def _span_title(spans_XH: np.ndarray, limit: int, learned: bool) -> str:
    if not spans_XH.size:
        return "no head attends to the context"
    if not learned:
        return f"spans are not learned: every head looks {limit} tokens back"
    return f"mean span {spans_XH.mean():.1f}, longest {spans_XH.max():.1f} of {limit} tokens"
