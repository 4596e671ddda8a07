"""The reader of a step's compiled text, and the parts that its instructions are sorted into."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from allattn.model.reach_projection import lengths
from benchmarks import bundles, schedule, step_cycles
from benchmarks.compiled_text import Program
from benchmarks.step_cycles import Row

LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed: make test-tpu-compile installs it",
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def program() -> Program:
    """What libtpu made of a step, shortened: 18 layers, whose keys and values have two lengths."""
    return Program((GOLDEN / "step_compiled.txt").read_text())


def test_loops_and_branches_multiply(program: Program) -> None:
    """A loop's rounds; of two branches each its share."""
    times = {step.instruction.name: step.times for step in program.walk(lambda _: (0.25, 0.75))}
    assert times["layer"] == times["query"] == 18
    assert (times["fill.1"], times["copy.9"]) == (4.5, 13.5)
    assert times["cache"] == 1
    # What a fusion consists of is not executed by itself, nor is a branch that nobody takes.
    assert "cut.1" not in times
    assert "copy.9" not in {x.instruction.name for x in program.walk(lambda _: (1.0, 0.0))}


def test_bytes_of_instructions(program: Program) -> None:
    """What lies in HBM, and of an array that is cut or written in part that part."""
    moved = {
        step.instruction.name: program.moved(step) for step in program.walk(lambda _: (0.5, 0.5))
    }
    # One layer is read, and stays on the chip; one row is written, from there.
    assert moved["layer"] == 512 * 512 * 2 + 4
    assert moved["cache"] == 8 * 64 * 2 + 4
    # Nothing of a product on the chip; a begun copy once.
    assert moved["query"] == 0
    assert moved["copy-start.1"] == 8 * 64 * 2
    assert moved["fill.1"] == 640 * 512 * 2 + 4


@pytest.mark.parametrize(
    "name, part",
    [
        ("all_attention_forward.2", "operation's kernels"),
        ("query", "projections"),
        ("layer", "arrays of the scan"),
        ("norm", "norms and residuals"),
        ("fill.1", "keys and values laid out"),
        ("copy.9", "keys and values laid out"),
        ("update", "optimizer"),
        ("cache", "cache"),
        ("copy-start.1", "other"),
    ],
)
def test_parts_of_the_model(program: Program, name: str, part: str) -> None:
    steps = {step.instruction.name: step for step in program.walk(lambda _: (0.5, 0.5))}
    assert step_cycles.part_of(program, steps[name], "bf16[18,8,64]") == part


def test_branches_follow_the_spans() -> None:
    """Zero spans take the shortest length, full ones the longest, others both and between."""
    sizes = lengths(8192, 512)
    zero = step_cycles.shares_of("zero", 8192)(len(sizes))
    full = step_cycles.shares_of("full", 8192)(len(sizes))
    paper = np.array(step_cycles.shares_of("paper", 8192)(len(sizes)))
    assert zero[0] == full[-1] == 1
    assert paper.sum() == pytest.approx(1) and (paper > 0).sum() > 3
    np.testing.assert_allclose(paper * 18, np.round(paper * 18), atol=1e-9)


def test_shares_are_of_the_longer_time() -> None:
    """Of cycles and transfers the longer one, but nothing for what is moved beside other work."""
    second = schedule.CORES["v5e"].bandwidth
    clock = schedule.clock("v5e")
    row = Row("cache", "copy.1", "concatenate", "bf16[8]", 1, 10.0, second, False)
    kernel = row._replace(part="operation's kernels", cycles=3 * clock, bytes=0.0)
    rows = [row, kernel, row._replace(part="other", cycles=0.0, beside=True)]
    shares = step_cycles.summary(step_cycles.by_part({"zero": rows}, "v5e"))["zero"]
    assert (shares["cache"], shares["operation's kernels"], shares["other"]) == (0.25, 0.75, 0)
    found = step_cycles.text_of({"zero": rows}, "v5e", 1)
    assert "| zero | cache | 0.000 | 819000.000 |" in found and "| copy.1 |" in found


def test_instructions_that_share_a_program(program: Program, tmp_path: Path) -> None:
    """The program of one counts for others of its kind; what has none counts nothing."""
    for kind, text in [
        ("packed-bundles-post-ra", "schedule_bundles.txt"),
        ("pre-delay_hlo-static-per-bundle-utilization", "schedule_units.txt"),
    ]:
        (tmp_path / f"12-layer-34-{kind}.txt").write_text((GOLDEN / text).read_text())
    assert list(bundles.listed(tmp_path)) == ["layer"]
    schedules = step_cycles.Schedules(tmp_path, program, "v5e")
    body = program.computations["body"]
    layer = body["layer"]
    cycles = schedules.of(layer._replace(name="another"), body)
    assert cycles == schedules.of(layer, body) and cycles
    assert schedules.of(body["norm"], body) is None


@LIBTPU
@pytest.mark.slow
def test_the_step_beside_the_operation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With short spans in a long context nothing but the products is as long as the context.

    The last line says the shares, which add up, and the parts are kept.
    """
    found: dict[str, list[Row]] = {}
    measure = step_cycles.measure_all
    monkeypatch.setattr(
        step_cycles, "measure_all", lambda *work: found.update(measure(*work)) or found
    )
    file = tmp_path / "rows.jsonl"
    monkeypatch.setattr(sys, "argv", ["step_cycles", "--cases=zero-long", f"--output={file}"])
    assert step_cycles.main() == 0
    (shares,) = json.loads(capsys.readouterr().out.splitlines()[-1]).values()
    assert sum(shares.values()) == pytest.approx(1, abs=0.01)
    assert shares["operation's kernels"] > 0.3
    kept = [json.loads(line) for line in file.read_text().splitlines()]
    assert {row["part"]: row["share"] for row in kept} == shares
    for row in found["zero-long"]:
        # Keys and values of the context: cached and block. A part of them may be written.
        as_long = "8704" in row.result and row.bytes > row.times * 3e6 and not row.beside
        assert not as_long or row.part in step_cycles.REQUIRED, row
