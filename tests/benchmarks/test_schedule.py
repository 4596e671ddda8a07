"""The reader of libtpu's schedules, and the benchmark that multiplies them.

Dimension key: X bundle, U unit, B, T, S, H, K as in `benchmarks.schedule`.
"""

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allattn.errors import UserError
from benchmarks import attention, bundles, schedule

GOLDEN = Path(__file__).parents[1] / "golden"
LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: make test-tpu-compile installs it",
)


@pytest.fixture(scope="module")
def loop() -> bundles.Program:
    """What libtpu made of this kernel for v5e, with a grid of 3 and x in blocks of (8, 128):

    out[...] = x[...]
    if i == 1:
        out[...] += 1
    for _ in range(bounds[i]):
        out[...] = 2 * out[...] + 1
    """
    texts = [(GOLDEN / f"schedule_{name}.txt").read_text() for name in ("bundles", "units")]
    return bundles.parse(*texts)


@pytest.mark.parametrize("bounds", [(0, 1, 2), (5, 0, 7), (0, 0, 0)])
def test_loops_run_as_often_as_told(loop: bundles.Program, bounds: tuple[int, ...]) -> None:
    """Bounds from scalar memory, branches with their slots, transfers of blocks that differ."""
    arguments = {0: np.array(bounds, np.uint32)}
    count = bundles.run(loop, arguments, core=0, branch_slots=4, granule=32)
    # The body of the loop, the branch to it, the conditional, and the pipeline over the grid,
    # which has two steps more.
    for first, end, times in [
        (0x47, 0x4F, sum(bounds)),
        (0x43, 0x47, 3),
        (0x35, 0x3A, 1),
        (0x3A, 0x43, 3),
        (0xB, 0x27, 5),
        (0, 0xB, 1),
        (0x6C, 0x70, 1),
    ]:
        np.testing.assert_array_equal(count.times_X[first:end], times, hex(first))
    # Each step's block there and back, and the bounds.
    assert count.moved == 2 * 3 * 8 * 128 * 4 + 512
    # Three steps and the products of the loop: an addition and a multiplication each time.
    used = dict(zip(loop.units, count.times_X @ loop.used_XU, strict=True))
    assert used["VALU"] == 1 + 2 * sum(bounds) and used["MXU"] == 0


def test_regions_of_a_program(loop: bundles.Program) -> None:
    """The loop leads when it runs often, and all regions are the whole."""
    arguments = {0: np.array([100, 0, 50], np.uint32)}
    count = bundles.run(loop, arguments, core=0, branch_slots=4, granule=32)
    found = bundles.regions(loop, count.times_X)
    assert found[0][:3] == (0x47, 8, 150)
    assert sum(region.bundles * region.times for region in found) == count.cycles
    assert sum(region.share for region in found) == pytest.approx(1, abs=0.01)


def test_branches_on_vectors_are_refused(loop: bundles.Program) -> None:
    """A bound that is not known is no bound of 0."""
    with pytest.raises(RuntimeError, match="bundle 66: expected a branch that depends on sc"):
        bundles.run(loop, {}, core=0, branch_slots=4, granule=32)


def test_bytes_in_scalar_memory() -> None:
    """Rows of bytes, four to a word."""
    rows_XC = np.arange(6 * 8, dtype=np.int8).reshape(1, 6, 8)
    words_XC = bundles.words(rows_XC).reshape(2, 128)
    assert words_XC[0, 3] == int.from_bytes([3, 11, 19, 27], "little")
    assert words_XC[1, 0] == int.from_bytes([32, 40, 0, 0], "little")
    np.testing.assert_array_equal(bundles.words(np.float32([1, 2])), [0x3F800000, 0x40000000])


def test_required_products_of_the_schedule() -> None:
    """The benchmark of the operation counts the same ones."""
    subject = schedule.operation(64, 0.3, ["full", "zero"])
    geometry = argparse.Namespace(geometry="enwik8_small", rows=1)
    _, _, L, _, _ = schedule.GEOMETRY.of_operation()
    for name in ("full", "zero"):
        ((load, times),) = subject.loads[name]
        expected = attention.required_flops(geometry, attention.spans(name, L, 8))
        assert (load.flops["forward"], times) == (expected, 1)
        assert load.flops["backward"] == 2 * expected


def row(**changes: Any) -> dict[str, Any]:
    found = {
        "chip": "v5e",
        "kind": "operation",
        "K": 64,
        "dropout": 0.3,
        "spans": "full",
        "pass": "forward",
        "cycles": 1000,
        "transfer_cycles": 250,
        "flops": 1000 * 131072 * 0.5,
        "moved": 10,
        "steps": 4,
        "units": {"MXU": 0.6},
    }
    return {**found, **changes}


def test_shares_of_passes() -> None:
    """Both passes together are one sum, and the last line has what was asked for."""
    backward = row(**{"pass": "backward"}, cycles=3000, units={"MXU": 0.2})
    rows = [row(), backward, row(K=128), row(kind="splash", dropout=0.0)]
    assert schedule.shares(rows[:1]) == (0.5, 0.4)
    assert schedule.summary(rows, 64, 0.3) == {"v5e": {"full": {"forward": 0.5, "both": 0.25}}}
    cells = [line.split(" | ") for line in schedule.table(rows).splitlines()]
    assert ["0.30" in line for line in cells[2:]] == [False, False, True, False, False]
    # Two tenths of the work in four tenths of the cycles.
    paper = [row(spans="paper", cycles=400, flops=row()["flops"] / 5)]
    paper += [{**paper[0], "pass": "backward", "cycles": 1200}]
    assert "spans take 2.00 x their" in schedule.paper_costs([*rows, *paper])
    failed = {"chip": "v4", "kind": "splash", "K": 64, "dropout": 0.0, "error": "too large"}
    assert "too large" in schedule.table([failed])


def test_libtpu_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["schedule"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"expected libtpu \(pip install -e '.\[tpu\]'\), found"):
        schedule.main()


@pytest.mark.parametrize("flag", ["--chips=v5e,v3", "--widths=41", "--spans=half"])
def test_what_the_schedule_does_not_know(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["schedule", flag])
    with pytest.raises(SystemExit):
        schedule.main()
    assert "expected some of" in capsys.readouterr().err


@LIBTPU
def test_share_of_a_plain_product() -> None:
    """Its matrix units do all of its products, and nothing else: read on every chip."""
    cases = [schedule.Case(chip, "product", 2048, 0.0) for chip in schedule.CORES]
    rows = schedule.count(cases, spans=[])
    for found in rows:
        share, at_least = schedule.shares([found])
        assert share == pytest.approx(found["units"]["MXU"], rel=0.05)
        assert 0 < at_least < share <= 1
        # Four small units are never idle for long; two large ones wait for their results.
        assert share > 0.95 or found["chip"] in ("v6e", "tpu7x")


@LIBTPU
def test_the_command_of_one_chip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last line says the shares, and the rows are kept."""
    file = tmp_path / "rows.jsonl"
    flags = ["--chips=v5e", "--widths=64", "--dropout=0.3", "--spans=zero", f"--output={file}"]
    monkeypatch.setattr(sys, "argv", ["schedule", *flags, "--regions=2"])
    assert schedule.main() == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    shares = found["v5e"]["zero"]
    assert 0 < shares["forward"] < 1 and 0 < shares["both"] < 1
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["kind"] for row in kept} == {"operation", "splash", "causal-splash", "product"}
    assert all(len(row["regions"]) == 2 and row["libtpu"] for row in kept)
