"""What a run reports: event files, JSONL, the metrics of steps, and lines on the screen."""

import json
import math
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from allattn.errors import UserError
from allattn.train import jsonl, metrics
from allattn.train.logs import Logs
from allattn.train.progress import RunProgress

ROOT = Path(__file__).parents[2]


def write(workdir: Path, rows: dict[int, dict[str, float]], first_step: int = 0) -> None:
    writer = Logs(str(workdir), first_step)
    for step, scalars in rows.items():
        writer.write_scalars(step, scalars)
    writer.close()


def test_event_files(tmp_path: Path) -> None:
    """TensorBoard itself reads back the numbers and the texts."""
    writer = Logs(str(tmp_path), 0)
    writer.write_scalars(1, {"nll": 2.5, "mean_span": np.float32(17)})
    writer.write_scalars(2, {"nll": jnp.float32(2.25)})
    writer.write_texts(2, {"sample": "été, 3 < 4\nnext line"})
    writer.flush()
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("nll")] == [(1, 2.5), (2, 2.25)]
    assert [(event.step, event.value) for event in events.Scalars("mean_span")] == [(1, 17.0)]
    assert events.PluginTagToContent("text").keys() == {"sample"}
    (text,) = events.Tensors("sample")
    assert text.step == 2
    assert text.tensor_proto.string_val[0].decode() == "été, 3 < 4\nnext line"
    writer.close()


def test_a_second_start_adds_to_the_event_files(tmp_path: Path) -> None:
    write(tmp_path, {1: {"nll": 3.0}})
    write(tmp_path, {2: {"nll": 2.0}}, first_step=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    # Also within one second: files are read in the order of their names.
    assert [(event.step, event.value) for event in events.Scalars("nll")] == [(1, 3.0), (2, 2.0)]


def test_resuming_hides_what_was_lost(tmp_path: Path) -> None:
    """After a kill at step 35 and a resume at 20, both logs have every step once.

    What a row of a partial interval told of is among what was lost.
    """
    write(tmp_path, {10: {"nll": 4.0}, 20: {"nll": 3.0}, 30: {"nll": 9.0}, 35: {"nll": 9.0}})
    write(tmp_path, {20: {"dev_nll": 5.0}, 30: {"nll": 2.0}, 40: {"nll": 1.0}}, first_step=20)
    expected = [(10, 4.0), (20, 3.0), (30, 2.0), (40, 1.0)]
    rows = jsonl.read_jsonl(str(tmp_path))
    assert [(row["step"], row["nll"]) for row in rows if "nll" in row] == expected
    assert [row["step"] for row in rows if "dev_nll" in row] == [20]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("nll")] == expected
    assert [event.step for event in events.Scalars("dev_nll")] == [20]


def test_lines_that_are_no_rows(tmp_path: Path) -> None:
    """They are passed over; so is a folder of that name."""
    write(tmp_path, {10: {"nll": 3.0}})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'not JSON\n\xff\n[1]\n3\nnull\n{"nll": 1}\n{"step": "ten"}\n\n')
    (tmp_path / "metrics-1.jsonl").mkdir()
    assert jsonl.read_jsonl(str(tmp_path)) == [{"step": 10, "nll": 3.0}]
    with pytest.raises(UserError, match="nowhere: expected the workdir of a run, found nothing"):
        jsonl.read_jsonl(str(tmp_path / "nowhere"))


def test_beginning_again(tmp_path: Path) -> None:
    """A run that left rows and no checkpoint begins again at step 0: those rows count no longer."""
    write(tmp_path, {3: {"nll": 9.0}})
    write(tmp_path, {5: {"nll": 1.0}})
    assert jsonl.read_jsonl(str(tmp_path)) == [{"step": 5, "nll": 1.0}]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("nll")] == [5]


def test_jsonl(tmp_path: Path) -> None:
    """A row is in the file as soon as it is written: a kill loses nothing."""
    writer = Logs(str(tmp_path), 0)
    writer.write_scalars(1, {"nll": np.float64(2.5), "max_span": jnp.int32(8)})
    writer.write_texts(1, {"sample": "été\u2028"})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "nll": 2.5, "max_span": 8.0},
        {"step": 1, "sample": "été\u2028"},
    ]
    writer.close()


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    write(tmp_path, {1: {"nll": math.nan, "bpc": math.inf, "ppl": -math.inf, "mfu": 0.5}})
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert jsonl.read_jsonl(str(tmp_path)) == [
        {"step": 1, "nll": None, "bpc": None, "ppl": None, "mfu": 0.5}
    ]


def test_steps_done_again_replace_the_older_rows(tmp_path: Path) -> None:
    """Also when the second start logs one number more; a row of another kind stays."""
    write(tmp_path, {10: {"nll": 3.0}, 20: {"nll": 2.0}, 30: {"nll": 1.0}})
    write(tmp_path, {20: {"dev_nll": 9.0}}, first_step=30)
    write(tmp_path, {20: {"nll": 2.5, "mfu": 0.1}, 30: {"nll": 1.5, "mfu": 0.1}}, first_step=30)
    assert jsonl.read_jsonl(str(tmp_path)) == [
        {"step": 10, "nll": 3.0},
        {"step": 20, "nll": 2.5, "mfu": 0.1},
        {"step": 20, "dev_nll": 9.0},
        {"step": 30, "nll": 1.5, "mfu": 0.1},
    ]


def test_a_row_that_a_kill_cut_short(tmp_path: Path) -> None:
    """It is passed over, and the row after it is whole."""
    write(tmp_path, {10: {"nll": 3.0}, 20: {"nll": 2.0}})
    path = tmp_path / "metrics.jsonl"
    os.truncate(path, path.stat().st_size - 4)
    write(tmp_path, {20: {"nll": 2.5}, 30: {"nll": 1.0}}, first_step=10)
    rows = jsonl.read_jsonl(str(tmp_path))
    assert [(row["step"], row["nll"]) for row in rows] == [(10, 3.0), (20, 2.5), (30, 1.0)]


def test_part_files_of_a_bucket(tmp_path: Path) -> None:
    """There every start has a file; the later one counts."""
    for name, nll in (
        ("metrics-1700000000000000001.jsonl", 2.0),
        ("metrics-1700000000000000002.jsonl", 1.0),
    ):
        (tmp_path / name).write_text(json.dumps({"step": 5, "nll": nll}) + "\n")
    assert jsonl.read_jsonl(str(tmp_path)) == [{"step": 5, "nll": 1.0}]


def test_where_nothing_can_be_appended(tmp_path: Path) -> None:
    """The file is written whole, at once if the last time is long ago and otherwise at the next
    flush.
    """
    writer = jsonl.JsonlWriter(str(tmp_path), 0)
    writer._appends = False
    writer.every = 3600.0
    writer.write_scalars(1, {"nll": 3.0})
    assert jsonl.read_jsonl(str(tmp_path)) == []
    writer.flush()
    assert [row["step"] for row in jsonl.read_jsonl(str(tmp_path))] == [1]
    writer.every = 0.0
    writer.write_scalars(2, {"nll": 2.0})
    assert [row["step"] for row in jsonl.read_jsonl(str(tmp_path))] == [1, 2]


def test_other_processes_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write(tmp_path, {1: {"nll": 1.0}})
    with RunProgress(total=10, every=0) as progress:
        progress.update(1, {"bpc": 1.0})
        progress.message("dev")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_importing_changes_nothing(tmp_path: Path) -> None:
    """No module of another name is ours, none is replaced, and TensorFlow stays away, even where it
    is installed: importing it takes seconds and the accelerator's memory.
    """
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("")
    code = f"""
import sys
from allattn import train
from allattn.train.logs import Logs
logs = Logs({str(tmp_path)!r}, 1)
logs.write_scalars(1, {{"nll": 1.0}})
logs.write_texts(1, {{"sample": "x"}})
logs.close()
assert "tensorflow" not in sys.modules
assert "tensorboard.compat.notf" not in sys.modules
for name, module in sys.modules.items():
    # What was imported from a file or is built in has a specification; what is put there has none.
    foreign = name.split(".")[0] not in ("__main__", "allattn")
    home = getattr(getattr(module, "__spec__", None), "origin", None) or ""
    assert not (foreign and "/allattn/" in home), name
    if name.startswith(("clu", "tensorboard", "tensorflow")):
        assert module.__spec__ is not None and module.__spec__.name == name, name
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def step_outputs(i: jax.Array) -> dict[str, jax.Array]:
    return {
        "nll": 2.0 + i,
        "gradient_norm": 10.0 * i,
        "mean_span": 3.0 * i,
        "max_span": 5.0 * i,
        "mean_reach": 7.0 * i,
        "persistent_mass": 0.5 * i,
    }


def test_train_metrics_in_jit() -> None:
    """Losses and masses are averaged over the steps, the rest is that of the last step."""

    @jax.jit
    def two_steps() -> metrics.TrainMetrics:
        first = metrics.TrainMetrics.single_from_model_output(**step_outputs(jnp.float32(0)))
        second = metrics.TrainMetrics.single_from_model_output(**step_outputs(jnp.float32(1)))
        return first.merge(second)

    merged = two_steps()
    third = jax.jit(
        lambda: metrics.TrainMetrics.single_from_model_output(**step_outputs(jnp.float32(2)))
    )()
    found = {name: float(value) for name, value in merged.merge(third).compute().items()}
    assert found == {
        "nll": 3.0,
        "gradient_norm": 20.0,
        "mean_span": 6.0,
        "max_span": 10.0,
        "mean_reach": 14.0,
        "persistent_mass": 0.5,
    }
    assert list(found)[0] == "nll", "read_jsonl tells the kinds of rows apart by their first name"
    assert float(merged.compute()["nll"]) == 2.5
    assert float(jax.device_get(third).compute()["nll"]) == 4.0


def test_summarise() -> None:
    values = {"nll": jnp.float32(math.log(8)), "mean_span": np.float32(4)}
    found = metrics.summarise(values, seconds=2.0, tokens=1000, flops=3e9, peak_flops=6e9)
    expected = {
        "nll": math.log(8),
        "mean_span": 4.0,
        "bpc": 3.0,
        "ppl": 8.0,
        "tokens_per_s": 500.0,
        "mfu": 0.25,
    }
    assert found == pytest.approx(expected, rel=1e-6)
    assert all(type(value) is float for value in found.values())


def test_summarise_without_a_peak() -> None:
    """No peak, no mfu; a loss beyond exp's range gives a huge number instead of an error."""
    found = metrics.summarise({"nll": 5000.0}, seconds=1.0, tokens=1)
    assert "mfu" not in found
    assert math.isfinite(found["ppl"]) and found["ppl"] > 1e300


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture) -> None:
    """One line per interval, and nothing else: no bar, no empty line at the end."""
    with RunProgress(total=1000, every=3600) as progress:
        for step in (10, 20, 30):
            progress.update(step, {"bpc": 1.23456, "tokens_per_s": 12345.6, "mean_span": 3.0})
        progress.message("step 30: [bold] 1.5 bpc")
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "step 10/1000  1.235 bpc  12,346 tokens/s  ETA -",
        "step 30: [bold] 1.5 bpc",
    ]
    assert captured.err == ""


def test_progress_foretells_the_end(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 steps in 100 seconds leave 9000 s for the 3600 that remain."""
    times = iter([5.0, 55.0, 105.0])
    monkeypatch.setattr(
        "allattn.train.progress.time", types.SimpleNamespace(monotonic=lambda: next(times))
    )
    with RunProgress(total=3680, every=60) as progress:
        for step in (40, 60, 80):
            progress.update(step, {"bpc": 2.0, "dev_bpc": 2.5})
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 40/3680  2.000 bpc  dev 2.500 bpc  ETA -",
        "step 80/3680  2.000 bpc  dev 2.500 bpc  ETA 2:30:00",
    ]


def test_progress_on_a_terminal(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A live line shows the steps and the numbers."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    with RunProgress(total=100) as progress:
        progress.update(50, {"bpc": 1.5})
        progress.message("step 50: [bold] 1.5 bpc")
    shown = capsys.readouterr().out
    assert "step 50/100" in shown and "1.500 bpc" in shown and "step 50: [bold] 1.5 bpc" in shown
