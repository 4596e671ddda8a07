"""A sweep over a folder: what fails leaves the rest, what has ended is not run again, and the table adds up."""

import csv
import json
import statistics
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_cli import ROOT, TINY

from allattn import sweep
from allattn.__main__ import main

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


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[str]]]:
    """A sweep of one good experiment with two seeds, and a broken one."""
    place = tmp_path_factory.mktemp("sweep")
    (place / "configs").mkdir()
    (place / "configs" / "good.py").write_text(CONFIG.format(published="2.25", body="c.model.persistent = 6"))
    (place / "configs" / "broken.py").write_text(CONFIG.format(published="-", body="c.model.no_such_field = 6"))
    (place / "configs" / "_part.py").write_text("raise RuntimeError\n")
    (place / "texts").mkdir()
    letters = np.frombuffer(b"abcdefgh\n", np.uint8)
    for split, length in (("train", 1200), ("valid", 300), ("test", 400)):
        text = np.random.default_rng(length).choice(letters, length).tobytes()
        (place / "texts" / f"{split}.txt").write_bytes(bytes(letters) + text)
    words = ["sweep", f"--configs={place / 'configs'}", f"--workdir={place / 'runs'}", "--seeds=2", "--budget=640"]
    fields = {**TINY, "dataset.data_dir": place / "texts"}
    del fields["model.persistent"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLATTN_DATA_DIR", str(place / "prepared"))
        patch.chdir(ROOT)
        yield place, words + [f"--config.{name}={value}" for name, value in fields.items()]


def test_a_broken_experiment_leaves_the_others(swept: tuple[Path, list[str]], capfd: pytest.CaptureFixture) -> None:
    place, words = swept
    assert main(words) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "2 of 4 runs failed" in error and "no_such_field" in error
    broken, good = csv.DictReader((place / "runs" / "sweep.csv").open())
    assert broken["config"] == "broken" and "no_such_field" in broken["failed"] and not broken["test"]
    scores = [json.loads((place / "runs" / f"good-seed{seed}" / "scores.json").read_text()) for seed in (0, 1)]
    assert scores[0]["bpc"] != scores[1]["bpc"]
    mean, deviation = (f([score["bpc"] for score in scores]) for f in (statistics.mean, statistics.stdev))
    assert good["test"] == f"{mean:.4f} ± {deviation:.4f}" and good["failed"] == ""
    assert good["steps"] == "10" and good["tokens"] == "640"  # of 64 tokens each
    assert good["published"] == "2.25 dev, 2.5 test bpc" and good["unit"] == "bpc, authors"
    assert f"| {good['test']} |" in (place / "runs" / "sweep.md").read_text()
    assert (place / "runs" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_the_budget_has_a_stage_at_a_tenth_of_the_rate(swept: tuple[Path, list[str]]) -> None:
    c = sweep.configuration.load("configs/base.py", {"train.batch": "4", "train.block": "16"})
    assert sweep._budget(c, 640) == {"train.steps": "9", "train.finetune_steps": "1"}
    assert sweep._budget(c, 0) == {}


def test_what_has_ended_is_not_run_again(
    swept: tuple[Path, list[str]], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the broken file the sweep succeeds, from the results that are there alone."""
    place, words = swept
    monkeypatch.setattr(sweep.subprocess, "run", lambda *_, **__: pytest.fail("a run was started"))
    assert main([*words, "--only=goo*"]) == 0 and "broken" not in capfd.readouterr().out
    (place / "configs" / "broken.py").unlink()
    assert main(words) == 0
    assert "| good |" in capfd.readouterr().out


def test_a_larger_budget_goes_on(swept: tuple[Path, list[str]]) -> None:
    place, words = swept
    (place / "configs" / "broken.py").unlink(missing_ok=True)
    assert main([*words, "--seeds=1", "--budget=768"]) == 0
    (row,) = csv.DictReader((place / "runs" / "sweep.csv").open())
    assert row["steps"] == "12" and row["seeds"] == "1"


def test_a_launcher_submits_once(swept: tuple[Path, list[str]]) -> None:
    """Runs that a launcher took are not failures, are not submitted again, and count once they have scores."""
    place, words = swept
    other = [word for word in words if not word.startswith("--workdir")]
    words = [*other, f"--workdir={place / 'launched'}", "--launcher=echo"]
    (place / "configs" / "broken.py").unlink(missing_ok=True)
    for _ in range(2):
        assert main(words) == 0
        (row,) = csv.DictReader((place / "launched" / "sweep.csv").open())
        assert row["failed"] == "submitted" and not row["test"]
    log = (place / "launched" / "good-seed1" / "log.txt").read_text()
    assert log.count("allattn train") == 1 and "--config.seed=1" in log


def test_a_folder_without_experiments_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["sweep", f"--configs={tmp_path}", f"--workdir={tmp_path / 'runs'}"]) == 2
    assert "--configs: expected a folder with experiment files" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
