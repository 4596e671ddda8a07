"""Figures of runs: what they show is what was logged, and nothing logged is no mistake."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from new_process import fresh
from tiny_model import KINDS, geometry, random_params

import allattn
from allattn import plots, run
from allattn.data import Vocabulary
from allattn.model import Model
from allattn.train.jsonl import JsonlWriter
from configs import base

NAMES = ("nll", "bpc", "ppl")


def rows(count: int = 40, every: int = 10, words: bool = False) -> list[dict[str, Any]]:
    """A row of every step, and every few of them one of dev; the third was lost."""
    found: list[dict[str, Any]] = []
    for step in range(1, count + 1):
        found.append({"step": step, **dict.fromkeys(NAMES, 100.0 / step)})
        if step % every == 0:
            found.append({"step": step, **{f"dev_{name}": 110.0 / step for name in NAMES}})
        if words and step % every == 0:
            found[-1]["dev_ppl_words"] = 120.0 / step
    if count:
        found[2] |= dict.fromkeys(NAMES, None)
    return found


def curves(figure: Figure) -> dict[str, np.ndarray]:
    """Everything with a label: its points, (points, 2)."""
    (axes,) = figure.axes
    return {line.get_label(): line.get_xydata() for line in axes.lines}


def test_curves_show_what_was_logged() -> None:
    figure = plots.plot_curves({"ours": rows(), "theirs": rows(20)})
    shown = curves(figure)
    assert {"ours, training", "ours, dev", "theirs, training", "theirs, dev"} < shown.keys()
    np.testing.assert_allclose(shown["ours, dev"], [[x, 110 / x] for x in (10, 20, 30, 40)])
    assert [x for x, _ in shown["theirs, training"]] == [1, 2, *range(4, 21)]
    (axes,) = figure.axes
    assert axes.get_xlabel() == "training step" and axes.get_ylabel() == "bits per byte (bpc)"
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_smoothing() -> None:
    """A line stays a line up to its ends, and noise of a high frequency goes."""
    line_T = np.arange(200.0)
    np.testing.assert_allclose(plots._smoothed(line_T), line_T)
    noise_T = np.resize([1.0, -1.0], 200)
    assert np.abs(plots._smoothed(noise_T)[10:-10]).max() < 0.2
    for few in ([], [3.0], [3.0, 4.0]):
        assert plots._smoothed(np.array(few)).tolist() == few


def test_runs_without_rows(tmp_path: Path) -> None:
    """A workdir that is not there yet, one that is empty, no run at all."""
    for runs in (tmp_path, tmp_path / "none", [tmp_path], {"new": []}, [], {}, rows(0)):
        figure = plots.plot_curves(runs)  # type: ignore[arg-type]
        assert figure._repr_png_()
        assert all("nothing logged yet" in text for text in texts(figure))


def texts(figure: Figure) -> list[str]:
    """Of the legend."""
    legend = figure.axes[0].get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def test_workdirs(tmp_path: Path) -> None:
    """Named by their folders, by their paths where two folders have one name."""
    for folder in ("a/x", "a/y", "b/x"):
        (tmp_path / folder).mkdir(parents=True)
        writer = JsonlWriter(str(tmp_path / folder), 0)
        writer.write_scalars(1, {"nll": 1.0, "bpc": 2.0})
        writer.close()
    assert texts(plots.plot_curves(tmp_path / "a/x")) == ["x, training"]
    both = [f"{tmp_path}/a/x", tmp_path / "a/y"]
    assert texts(allattn.plot_curves(both)) == ["x, training", "y, training"]
    same = [f"{tmp_path}/a/x", f"{tmp_path}/b/x"]
    assert texts(plots.plot_curves(same)) == [f"{name}, training" for name in same]


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        ({"a": rows(words=True)}, "perplexity (ppl)"),
        ({"a": rows(words=True), "b": rows()}, "bits per byte (bpc)"),
        ({"a": rows(words=True), "b": []}, "perplexity (ppl)"),
        (rows(), "bits per byte (bpc)"),
    ],
)
def test_units(runs: Any, expected: str) -> None:
    assert plots.plot_curves(runs).axes[0].get_ylabel() == expected
    assert plots.plot_curves(runs, unit="nll").axes[0].get_ylabel() == "nats per symbol"
    with pytest.raises(allattn.UserError, match="unit: expected one of nll, bpc, ppl, found 'x'"):
        plots.plot_curves(runs, unit="x")


@pytest.mark.parametrize("kind", ["joint", "single_head", "transformer_xl"])
def test_spans(kind: str) -> None:
    """A point for every head that attends to the context, at its span."""
    model = Model(geometry(**KINDS[kind]))
    loaded = run.Run(
        model, random_params(model), base.get_config(), Vocabulary("byte", ("\n", "a")), 1
    )
    figure = loaded.plot_spans()
    (axes,) = figure.axes
    points = axes.collections[0].get_offsets()
    np.testing.assert_allclose(points[:, 1], loaded.spans_XH().ravel(), rtol=1e-6)
    assert axes.get_xlabel() == "layer" and axes.get_ylabel() == "span in tokens"
    assert axes.get_title().startswith("spans are not learned") != model.config.adaptive
    assert figure._repr_png_()


@pytest.mark.parametrize("shape", [(0, 2), (2, 0), (1, 1), (36, 16)])
def test_spans_of_any_network(shape: Sequence[int]) -> None:
    assert plots.plot_spans(np.ones(shape, np.float32), 1024, 32)._repr_png_()


def test_no_global_state() -> None:
    """pyplot, which keeps every figure alive, is not imported."""
    code = """
import json, sys
import allattn
allattn.plot_curves([])
print(json.dumps("matplotlib.pyplot" in sys.modules))
"""
    assert fresh(code) is False
