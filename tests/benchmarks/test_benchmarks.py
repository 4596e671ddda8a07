"""The benchmarks run and say what they promise; how fast is not a test's business.

Dimension key: X layer, H head.
"""

import argparse
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import geometry

from allattn import config, config_checks
from allattn.model import ModelConfig, forward_flops
from benchmarks import (
    attention,
    compile,
    geometries,
    gpu,
    machine,
    overhead,
    peers,
    profile,
    stability,
    table,
    train,
    vocabulary,
)

ROOT = Path(__file__).resolve().parents[2]


def arguments(**changes: object) -> argparse.Namespace:
    fields = dict(
        geometry="tiny",
        spans="full",
        rows=1,
        dropout=0.1,
        dtype="float32",
        implementation="xla",
        repeats=1,
    )
    return argparse.Namespace(**{**fields, **changes})


@pytest.mark.parametrize("name", [n for n in geometries.GEOMETRIES if n not in ("tiny", "small-8")])
def test_geometries_of_the_configurations(name: str) -> None:
    c = config.load(str(ROOT / "configs" / f"{name}.py"))
    m = c.model
    sizes = (m.depth, m.width, m.heads, m.span.limit, c.train.block, m.persistent)
    assert geometries.GEOMETRIES[name] == sizes


def test_results_are_indexed() -> None:
    """The index names every file of results, and no other."""
    folder = ROOT / "benchmarks" / "results"
    linked = re.findall(r"\]\((\d[^)]*)\)", (folder / "README.md").read_text())
    files = [path.name for path in folder.iterdir() if path.name != "README.md"]
    assert sorted(linked) == sorted(files)


@pytest.fixture
def small_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine's rate from smaller matrices, in a fraction of the time."""
    monkeypatch.setattr(machine, "CPU_SIZE", 512)


def test_the_operation_alone(
    small_product: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several layers with spans of their own, as a line of the GPU's table has them."""
    flags = ["--geometry=tiny", "--rows=1", f"--spans={gpu.SPANS}", "--dropout=0.3", "--repeats=1"]
    monkeypatch.setattr(sys, "argv", ["attention", *flags])
    attention.main()
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["forward_ms"] < found["both_ms"] and 0 < found["share_both"] < 1


def test_required_flops_are_those_of_the_model() -> None:
    """What the operation needs is what the model needs beyond its projections and its output."""
    H, K, L, T, N = geometries.GEOMETRIES["small-8"].of_operation()
    span_XH = np.array([[0.0, 32.0, 100.0, L]])
    config = geometry(
        depth=1, width=H * K, heads=H, persistent=N, vocab_size=2, limit=L, ramp=attention.RAMP
    )
    reach = float(np.minimum(span_XH + attention.RAMP, L).mean())
    others = 8 * config.width**2 + 2 * config.width * config.vocab_size
    expected = 3 * T * (forward_flops(config, reach, T, cached=True) - others)
    assert attention.required_flops(
        arguments(geometry="small-8", rows=3), span_XH
    ) == pytest.approx(expected)


def test_peers_name_all_that_a_step_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken: list[str] = []

    def measure(arguments: argparse.Namespace) -> list:
        taken.append(train.configuration(arguments).model.dtype)
        return []

    monkeypatch.setattr(peers, "measure", measure)
    monkeypatch.setattr(
        sys, "argv", ["peers", f"--python={sys.executable}", f"--results={tmp_path}"]
    )
    peers.main()
    assert taken == ["float32", "float32"]


def test_required_flops_of_the_peers() -> None:
    """x-transformers: each query has L earlier states, the block up to itself and N pairs, and no
    position keys.
    """
    config = geometry(depth=3)
    T = 7
    D = config.width
    L = config.limit
    N = config.persistent
    pairs = sum(L + t + 1 + N for t in range(T)) / T
    expected = 3 * (2 * D * 2 * pairs + 8 * D**2 + 4 * D**2 * L / T) + 2 * D * config.vocab_size
    assert peers.required_flops(config, T, "x-transformers, fused") == pytest.approx(expected)
    assert peers.required_flops(config, T, peers.TORCH) == forward_flops(config, L, T)


def test_spans_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "spans.json"
    path.write_text(json.dumps({"spans": [[8, 16, 9000, 0], [1, 2, 3, 4]]}))
    np.testing.assert_array_equal(attention.spans(str(path), 256, 3), [[8, 16, 256], [1, 2, 3]])


def test_evaluation(
    small_product: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The benchmark evaluates here; training runs below, as a line of the GPU's table."""
    words = ["train", "--mode=evaluate", "--spans=zero", "--seconds=0.1"]
    monkeypatch.setattr(sys, "argv", words)
    train.main()
    assert_measured(json.loads(capsys.readouterr().out))


def assert_measured(row: dict[str, Any]) -> None:
    """What benchmarks.train promises of a row."""
    promised = {"tokens_per_s", "matmul_gflops", "share", "peak_memory_mb", "date", "commit"}
    assert promised <= set(row) and 0 < row["share"] < 1 and len(row["matmul_gflops"]) == 2


# --- the table of a GPU ---------------------------------------------------------------------------


MEASURED = "the same, remat projections"  # has every flag of a training step
GPU_WORDS = ["gpu", "--geometry=tiny", "--rows=2", "--dtype=float32"]


def flex_benchmark() -> ModuleType:
    """benchmarks.flex, with nothing in the place of PyTorch."""
    torch = "torch torch.nn torch.nn.attention torch.nn.attention.flex_attention"
    names = [*torch.split(), "benchmarks.peers_torch"]
    with mock.patch.dict(sys.modules, {name: mock.MagicMock() for name in names}):
        return importlib.import_module("benchmarks.flex")


def parsed(line: gpu.Line, options: list[str]) -> argparse.Namespace:
    """A line's flags as its benchmark reads them; those that it does not know end the test."""
    benchmarks = {"train": train, "attention": attention}
    benchmark = benchmarks.get(line.module) or flex_benchmark()
    found = benchmark.parser().parse_args(options)
    # What argparse takes as it is: a way to save memory, a file of spans.
    if line.module == "train":
        c = train.configuration(found)
        assert c.train.remat in config_checks.REMAT
        train.spans(c, found.spans)
    else:
        H, _, L, _, _ = geometries.GEOMETRIES[found.geometry].of_operation()
        attention.spans(found.spans, L, H)
    return found


def test_the_gpu_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every line's flags are its benchmark's, a failing one leaves the others, and the file holds
    what the table says. One line really measures, and the last one really fails.
    """
    # What a benchmark would say of a line that does not run.
    lines = iter(gpu.LINES)
    really = gpu.run
    quick = {
        "train": {"share": 0.5, "tokens_per_s": 9.0},
        "attention": {"share_both": 0.5, "both_ms": 9.0},
    }

    def run(module: str, options: list[str], limit: float) -> dict[str, Any]:
        line = next(lines)
        assert line.module == module and 0 < limit <= 530
        assert parsed(line, options).rows == 2
        if line.name == MEASURED:
            return really(module, [*options, "--seconds=0.1"], limit)
        if module == "flex":
            return really(module, options, limit)
        return {**quick[module], "matmul_gflops": [20.0, 20.0]}

    # The table and its file.
    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(sys, "argv", [*GPU_WORDS, f"--results={tmp_path}"])
    gpu.main()
    said = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())

    # Both hold every line, what was measured and what went wrong.
    assert [row["name"] for row in found] == [line.name for line in gpu.LINES]
    assert all(0 < row["share"] < 1 for row in found[:-1])
    assert_measured(next(row for row in found if row["name"] == MEASURED))
    last = found[-1]  # needs PyTorch, and a GPU that it sees
    assert last["share"] or ("torch" in last["error"].lower() and last["error"] in said)
    assert str(path) in said and "paper-like spans take 1.00 x" in said


@pytest.mark.slow
def test_every_line_of_the_gpu_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line measures; `test_the_gpu_table` asks the same of one, and parses the others."""
    monkeypatch.setattr(sys, "argv", [*GPU_WORDS, f"--results={tmp_path}"])
    gpu.main()
    (path,) = tmp_path.iterdir()
    found = json.loads(path.read_text())
    assert [row["name"] for row in found] == [line.name for line in gpu.LINES]
    assert all(0 < row["share"] < 1 for row in found[:-1])


def test_lines_that_fail() -> None:
    """A mistake is a row of the table, and a line is stopped when the time is over."""
    mistake = gpu.run("data", ["--steps=few"], 60)
    row = {"name": "x", "asked": None, "share": None, **mistake}
    assert "argument --steps: invalid int value: 'few'" in gpu.report([row])
    assert gpu.run("attention", [], 0.1) == {"error": "no result in 0 s"}


@pytest.mark.parametrize("module", ["train", "attention", "flex"])
def test_a_flag_that_is_not_known(module: str) -> None:
    line = gpu.Line("x", module, ("--nonsense=1",), "share", None)
    with pytest.raises(SystemExit):
        parsed(line, list(line.options))


def test_speeds_over_their_machines_rates() -> None:
    """The table divides both speeds by the rates of their machines.

    Twice the authors' tokens/s on a machine twice as fast is once their speed; the last row of a
    line counts.
    """
    line = table.Line("train", "tiny", "full", 2500, 1.3, 1.8)
    row = {
        "mode": "train",
        "geometry": "tiny",
        "spans": "full",
        "dropout": 0.0,
        "matmul_gflops": [329.0, 331.0],
    }
    rows = [
        row | {"tokens_per_s": 1.0},
        row | {"tokens_per_s": 5000.0},
        row | {"tokens_per_s": 1.0, "dropout": 0.3},
    ]
    assert table.ratio(table.find(rows, line), line) == pytest.approx(1.0)
    assert "5000" in table.report(rows) and table.find(rows[2:], line) is None


def test_memory_of_the_vocabulary() -> None:
    """At WikiText-103's, adaptive input and softmax need less than a third of what plain ones need,
    parameters apart and all together. Compiled, not run."""
    steps = (
        vocabulary.compiled(vocabulary.geometry(kind, "float32"), rows=8)
        for kind in ("plain", "adaptive")
    )
    plain, adaptive = map(vocabulary.memory, steps)
    assert plain["temporary"] > 8 * 256 * 267_735 * 4 / 2**20, "all logits at once"
    for name in ("temporary", "memory_mib"):
        assert plain[name] > 3 * adaptive[name]


def test_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both kinds of ids, over WikiText-103's clusters; narrow ones, as their width proves nothing.

    Either kind measures, and its ids visit the clusters as often as English does, or all alike.
    """
    wide = vocabulary.geometry

    def narrow(kind: str, dtype: str) -> ModelConfig:
        return dataclasses.replace(wide(kind, dtype), width=64, heads=2)

    monkeypatch.setattr(vocabulary, "geometry", narrow)
    fields = argparse.Namespace(rows=1, dtype="float32", repeats=1)
    for kind, frequent in (("adaptive", 0.937), ("worst", 0.075)):
        assert vocabulary.measure(kind, fields)["step_ms"] > 0
        ids_BT = vocabulary.tokens(64, worst=kind == "worst")
        assert (ids_BT < 20_000).mean() == pytest.approx(frequent, abs=0.01)


def test_profile_sums_by_kind(tmp_path: Path) -> None:
    """A profile sums by kind and counts nothing twice.

    A product and what is no product, in a loop: the loop itself has no line.
    """

    def step(x: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, 5, lambda _, x: jnp.sin(x @ x), x)

    x = jnp.ones((64, 64))
    run = jax.jit(step)
    run(x).block_until_ready()
    with jax.profiler.trace(str(tmp_path)):
        run(x).block_until_ready()
    found = profile.events(str(tmp_path))
    assert found["products"][1] == 5 and "while" not in found and len(found) > 1


def test_devices_of_the_overhead_benchmark() -> None:
    """The overhead is measured on the devices of the demo."""
    nothing = (
        "from benchmarks import overhead\n"
        "def nothing(): return {}\n"
        "overhead.starts = overhead.saves = nothing\n"
    )
    code = f"{nothing}overhead.main()"
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {
        "JAX_PLATFORMS": "cpu"
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True
    )
    batch = config.load(overhead.DEMO).train.batch
    cores = len(os.sched_getaffinity(0))
    devices = max(n for n in range(1, cores + 1) if batch % n == 0)
    assert [json.loads(line)["devices"] for line in done.stdout.splitlines()] == [
        f"{devices} cpu"
    ] * 2


def test_both_costs_of_a_save() -> None:
    """Shares of a step beside which nothing is written: how long the loop is held, how much longer
    its steps take.
    """
    steps = [3.0, 2.5, *[2.0] * (overhead.BETWEEN - 2)]
    found = overhead.summary([0.1, 0.1, 9.0], [steps, steps, [9.0] * overhead.BETWEEN])
    costs = {"save_s": 0.1, "save_share": 0.05, "writing_s": 1.5, "writing_share": 0.75}
    assert found == pytest.approx({"step_s": 2.0, **costs, "step_after_save_s": 3.0})


def test_rows_of_other_code_are_compiled_again(tmp_path: Path) -> None:
    """Compiled rows of other code are not taken over."""
    here = {"commit": "aaa", "jax": "1", "date": "d"}
    file = tmp_path / "rows.jsonl"
    assert compile.finished(file, here) == {}
    others = ({}, {"commit": "bbb"}, {"jax": "2"})
    rows = [{**here, "case": ["a", number], **other} for number, other in enumerate(others)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compile.finished(file, here) == {("a", 0): rows[0]}
    for commit in ("aaa-dirty", ""):  # of which there may be many
        file.write_text(json.dumps({**rows[0], "commit": commit}) + "\n")
        assert compile.finished(file, {**here, "commit": commit}) == {}


def test_a_checkout_with_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any file but the results, which a benchmark itself writes, marks the commit."""
    monkeypatch.chdir(tmp_path)
    assert machine.provenance()["commit"] == ""
    (tmp_path / "benchmarks/results").mkdir(parents=True)
    code = tmp_path / "code.py"
    result = tmp_path / "benchmarks/results/a.jsonl"
    code.touch()
    result.touch()
    for words in ("init -q", "add .", "-c user.name=a -c user.email=a commit -qm a"):
        subprocess.run(["git", *words.split()], check=True)
    result.write_text("{}")
    result.with_name("b.jsonl").touch()
    commit = machine.provenance()["commit"]
    assert commit and "-dirty" not in commit
    code.write_text("1")
    assert machine.provenance()["commit"] == f"{commit}-dirty"
    subprocess.run(["git", "checkout", "-q", "code.py"], check=True)
    code.with_name("new.py").touch()
    assert machine.provenance()["commit"] == f"{commit}-dirty"


def test_leap() -> None:
    """Of means over five updates; a loss that is no number is an infinite leap."""
    falling = [5.0 - i / 4 for i in range(12)]
    assert stability.leap(falling) == 0
    assert stability.leap([*falling, 2.25 + 5.0]) == pytest.approx(0.8)
    assert stability.leap([*falling, float("nan")]) == float("inf")


@pytest.mark.parametrize("kind", stability.KINDS)
def test_stability_is_of_the_paper(kind: str) -> None:
    """The network of `text8_small` but for norms, context and warm-up."""
    sizes = argparse.Namespace(depth=18, width=512, rows=4, updates=100)
    c = stability.configuration(
        argparse.Namespace(**vars(sizes), optimizer="adagrad", rate=0.07), kind
    )
    paper = config.load(str(ROOT / "configs" / "text8_small.py"))
    for name in ("depth", "width", "heads", "persistent", "integration"):
        assert c.model[name] == paper.model[name]
    assert c.optimizer.learning_rate == paper.optimizer.learning_rate
    assert (c.optimizer.clip, c.optimizer.warmup) == (paper.optimizer.clip, 30)
    config_checks.check_experiment(c)
