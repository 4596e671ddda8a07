"""A sweep over a folder: what fails leaves the rest, what has ended is not run again, and the table
adds up.
"""

import csv
import json
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from command_line import ROOT, TINY, call, write_texts

from allattn import sweep

CONFIG = '''"""A tiny model, 1,234 parameters.

Published: {published} dev,
           2.5 test bpc
Hardware:  none
"""

from configs import base


def get_config():
    c = base.get_config()
    {body}
    return c
'''


class Swept(NamedTuple):
    """A finished sweep: its folder, its command, and how it ended."""

    place: Path
    words: list[str]
    code: int
    error: str


def command(place: Path) -> list[str]:
    """A sweep over the experiments of a folder; two seeds of 640 tokens each."""
    words = [
        "sweep",
        f"--configs={place / 'configs'}",
        f"--workdir={place / 'runs'}",
        "--seeds=2",
        "--budget=640",
    ]
    # Runs shorter than an interval of the log are runs all the same.
    fields = {**TINY, "dataset.data_dir": place / "texts", "train.log_every": 1000}
    for name in ("model.persistent", "train.steps", "train.finetune_steps"):
        del fields[name]
    return words + [f"--config.{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    """A sweep of one good experiment and a broken one."""
    place = tmp_path_factory.mktemp("sweep")
    (place / "configs").mkdir()
    (place / "configs" / "good.py").write_text(
        CONFIG.format(published="2.25", body="c.model.persistent = 6")
    )
    (place / "configs" / "broken.py").write_text(
        CONFIG.format(published="-", body="c.model.no_such_field = 6")
    )
    (place / "configs" / "_part.py").write_text("raise RuntimeError\n")
    write_texts(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(place / "prepared"))
        patch.chdir(ROOT)
        ended = call(*command(place))
        yield Swept(place, command(place), ended.code, ended.err)


def test_a_broken_experiment_leaves_the_others(swept: Swept) -> None:
    runs = swept.place / "runs"
    assert swept.code == 2 and swept.error.count("\n") == 1
    assert "2 of 4 runs failed" in swept.error and "no_such_field" in swept.error
    broken, good = csv.DictReader((runs / "sweep.csv").open())
    assert (
        broken["config"] == "broken" and "no_such_field" in broken["failed"] and not broken["test"]
    )
    scores = [
        json.loads((runs / f"good-seed{seed}" / "scores.json").read_text()) for seed in (0, 1)
    ]
    assert scores[0]["bpc"] != scores[1]["bpc"]
    mean = statistics.mean([score["bpc"] for score in scores])
    deviation = statistics.stdev([score["bpc"] for score in scores])
    assert good["test"] == f"{mean:.4f} ± {deviation:.4f}" and good["failed"] == ""
    rows = [sweep.jsonl.read_jsonl(str(runs / f"good-seed{seed}")) for seed in (0, 1)]
    reach = statistics.mean(
        [row["mean_reach"] for row in each if "mean_reach" in row][-1] for each in rows
    )
    forward = (
        2 * 16 * (3 * reach + 2 * 6) + 4 * 16**2 * (2 + reach / 16) + 2 * 16 * 9
    )  # width 16, N 6, block 16, 9 symbols
    assert good["MFLOP"] == f"{3 * forward / 1e6:.3g}"
    assert good["steps"] == "10" and good["tokens"] == "640"  # of 64 tokens each
    assert good["published"] == "2.25 dev, 2.5 test bpc" and good["unit"] == "bpc, authors"
    assert f"| {good['test']} |" in (runs / "sweep.md").read_text()
    assert (runs / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_budget_keeps_the_share_of_the_decay() -> None:
    """A budget keeps the share of steps at a tenth of the learning rate."""
    c = sweep.configuration.load("configs/base.py", {"train.batch": "4", "train.block": "16"})
    assert sweep._budget(c, 64 * 160) == {
        "train.steps": "150",
        "train.finetune_steps": "10",
    }  # 450,000 and 30,000
    assert sweep._budget(c, 0) == {}


def test_what_has_ended_is_not_run_again(swept: Swept, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results that are there are enough, and those alone are asked for."""
    monkeypatch.setattr(sweep.subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    found = call(*swept.words, "--only=goo*")
    assert found.code == 0 and "| good |" in found.out and "broken" not in found.out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--budget=704", "train.steps: 10 in the workdir, 11 now"),
        ("--config.model.width=32", "model.width: 16 in the workdir, 32 now"),
        ("--config.seed=7", "--config.seed: a sweep sets it"),
        ("--config.train.steps=7", "--config.train.steps: a sweep sets it"),
        ("--config.train.batch=0", "train.batch: expected at least 1"),
        ("--seeds=0", "--seeds: expected at least 1"),
        ("--launcher='a", "--launcher"),
        ("--launcher=no-such-program", "--launcher"),
    ],
)
def test_other_settings_need_another_workdir(
    swept: Swept, tmp_path: Path, change: str, message: str
) -> None:
    """No score is reported under settings that it does not have; nothing is overwritten."""
    before = (swept.place / "runs" / "good-seed0" / "scores.json").read_text()
    place = f"--workdir={tmp_path}" if "launcher" in change else f"--workdir={swept.place / 'runs'}"
    found = call(*swept.words, "--only=good", place, change)
    assert found.code == 2 and message in found.err and found.err.count("\n") == 1
    assert (swept.place / "runs" / "good-seed0" / "scores.json").read_text() == before


def test_runs_without_a_log(swept: Swept, tmp_path: Path) -> None:
    """Their rows of the table lack what a log tells; foreign lines are no rows."""
    runs = tmp_path / "runs"
    shutil.copytree(swept.place / "runs", runs)
    (runs / "good-seed0" / "metrics.jsonl").unlink()
    (runs / "good-seed1" / "metrics.jsonl").write_text("no row\n")
    found = call(*swept.words, "--only=good", f"--workdir={runs}")
    assert found.code == 0
    (row,) = csv.DictReader((runs / "sweep.csv").open())
    assert (row["MFLOP"], row["seconds"], row["dev"]) == ("", "", "") and row["seeds"] == "2"
    assert (runs / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_waits_for_the_run(
    swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal tells both; the run saves its state before the sweep ends."""
    waits = []

    def wait(_: object) -> int:
        waits.append(None)
        if len(waits) == 1:
            raise KeyboardInterrupt
        return 130

    run = type("Popen", (), {"__init__": lambda *_, **__: None, "wait": wait})
    monkeypatch.setattr(sweep.subprocess, "Popen", run)
    found = call(*swept.words, "--only=good", f"--workdir={tmp_path}")
    assert (found.code, len(waits)) == (130, 2)
    assert found.err == "allattn: stopped by Ctrl-C; run again to resume\n"


def test_a_launcher_submits_once(swept: Swept, tmp_path: Path) -> None:
    """Runs that a launcher took are not failures, are not submitted again, and count once they have
    scores.
    """
    for _ in range(2):
        assert (
            call(*swept.words, "--only=good", f"--workdir={tmp_path}", "--launcher=echo").code == 0
        )
        (row,) = csv.DictReader((tmp_path / "sweep.csv").open())
        assert row["failed"].startswith("submitted") and not row["test"]
    log = (tmp_path / "good-seed1" / "log.txt").read_text()
    assert log.count("allattn train") == 1 and "--config.seed=1" in log


def test_a_folder_without_experiments_is_refused(tmp_path: Path) -> None:
    found = call("sweep", f"--configs={tmp_path}", f"--workdir={tmp_path / 'runs'}")
    assert found.code == 2 and "--configs: expected a folder with experiment files" in found.err
    assert not (tmp_path / "runs").exists()
    # Each flag by itself.
    found = call("sweep", "--configs=ablations", f"--workdir={tmp_path / 'runs'}", "--seeds=0")
    assert found.code == 2 and "--seeds: expected at least 1, found 0" in found.err
