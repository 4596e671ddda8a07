"""A loss that leaps: going back to a good checkpoint at half the rate, once."""

import json
import math
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
import pytest
from command_line import settings, write_texts
from several_processes import train as run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from allattn import train
from allattn.errors import RunError, SpikeError
from allattn.storage.checkpoint import Checkpointer
from allattn.train.jsonl import read_jsonl
from allattn.train.spikes import Spikes
from configs import base

# The rate rises until the loss leaps, at step 10 by this limit; at half of it, it does not.
LEAPS = {
    "optimizer__learning_rate": 1.0,
    "optimizer__warmup": 12,
    "optimizer__schedule": "constant",
    "train__steps": 16,
    "train__finetune_steps": 0,
    "train__restore_on_spike": 1.0,
    "checkpoint__every": 3,
    "evaluate__every": 16,
}
TOLD = {"spike_step": 10, "restored_step": 6, "rate_factor": 0.5}


@pytest.fixture
def texts(tmp_path: Path, own_data_dir: None) -> Path:
    return write_texts(tmp_path)


@pytest.fixture
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that cost nothing."""
    scores = {"nll": 1.0, "bpc": 1.4, "tokens": 9}
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *_: scores)


def leaping(texts: Path, **changes: Any) -> ml_collections.ConfigDict:
    c = base.get_config()
    c.update_from_flattened_dict(settings(texts, **{**LEAPS, **changes}))
    return c


def metas(workdir: Path) -> dict[int, dict[str, Any]]:
    """What every checkpoint says of leaps."""
    with Checkpointer(str(workdir), create=False) as checkpoints:
        return {s: checkpoints.restore_meta(s).get("spikes", {}) for s in checkpoints.steps()}


def test_what_is_a_leap() -> None:
    """A loss beyond the limit above the lowest so far, and none where none is looked for."""
    spikes = Spikes(2.0)
    for step, nll in enumerate((5.0, 3.0, 4.9, 3.5), start=1):
        spikes.check(step, nll)
    with pytest.raises(SpikeError, match="^the loss of step 5 leapt to 5.1 nats: .* lowest, 3$"):
        spikes.check(5, 5.1)
    off = Spikes(0.0)
    off.check(1, 1.0)
    off.check(2, 100.0)
    assert off.to_meta() == {} and not off.may_go_back


def test_what_a_checkpoint_keeps() -> None:
    """The lowest loss and the smaller rate; a checkpoint of before has neither."""
    spikes = Spikes(2.0)
    assert spikes.to_meta() == {} and spikes.may_go_back
    spikes.check(1, 3.0)
    spikes.go_on_slower(9, 4)
    resumed = Spikes(0.0)
    resumed.recall(json.loads(json.dumps(spikes.to_meta())))
    assert resumed == Spikes(0.0, 3.0, 0.5, 9, 4)
    # The smaller rate stays where leaps are looked for no longer.
    assert resumed.to_meta() == {"spikes": {**TOLD, "spike_step": 9, "restored_step": 4}}
    resumed.recall({})
    assert resumed == Spikes(0.0) and math.isinf(resumed.lowest_nll)


def test_a_leap_goes_back(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture, unscored: None
) -> None:
    """The run goes on from before the leap at half the rate, and says so everywhere.

    The loss of step 10 is that of the parameters of step 9, whose checkpoint is set aside.
    """
    train.train_and_evaluate(leaping(texts), str(tmp_path))
    out = capsys.readouterr().out
    assert "the loss of step 10 leapt to" in out and "resumes at step 6" in out
    line = "the loss leapt at step 10: the run went back to step 6, and on at 0.5 of the rate\n"
    assert line in out
    assert (tmp_path / "checkpoints-damaged" / "9").is_dir()
    assert TOLD.items() <= json.loads((tmp_path / "scores.json").read_text()).items()

    # Every step once, in both logs, and a row that tells of it.
    rows = read_jsonl(str(tmp_path))
    losses = [row["nll"] for row in rows if "nll" in row]
    assert [row["step"] for row in rows if "nll" in row] == list(range(1, 17))
    assert max(losses) < min(losses) + 1
    assert [row for row in rows if "spike_step" in row] == [{"step": 6, **TOLD}]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.value for event in events.Scalars("nll")] == pytest.approx(losses)
    # What a run needs that resumes here.
    assert metas(tmp_path)[16] == {**TOLD, "lowest_nll": min(losses)}


def test_no_number_goes_back_too(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unscored: None
) -> None:
    """Once; the second time it ends the run, which names the checkpoint that is left."""
    advance = train.Trainer.step
    rates = []

    def poison(self: train.Trainer, state: train.TrainState, *rest: Any) -> Any:
        if int(state.step) == 7:
            rates.append(self.spikes.rate_factor)
            state.params["io"]["bias"] = state.params["io"]["bias"] * np.nan
        return advance(self, state, *rest)

    monkeypatch.setattr(train.Trainer, "step", poison)
    message = (
        "^the loss of step 8 is not a number; the run had gone back once, before the leap of "
        "step 8; the last good checkpoint is that of step 6$"
    )
    with pytest.raises(RunError, match=message):
        train.train_and_evaluate(leaping(texts, optimizer__learning_rate=0.01), str(tmp_path))
    assert rates == [1.0, 0.5]


@pytest.mark.slow
def test_killed_before_and_behind_a_leap(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed before its first checkpoint at the smaller rate leaps again, and one
    behind that keeps the rate: both end as the run that was not killed, to the bit.
    """
    once = train.train_and_evaluate(leaping(texts), str(tmp_path / "once"))
    advance = train.Trainer.step
    left = 0

    def dies(self: train.Trainer, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return advance(self, *arguments)

    # Eleven updates until the loss of step 10 is read, five of them behind step 6.
    monkeypatch.setattr(train.Trainer, "step", dies)
    for updates in (11 + 2, 5 + 7):
        left = updates
        with pytest.raises(KeyboardInterrupt):
            train.train_and_evaluate(leaping(texts), str(tmp_path / "killed"))
    left = 100
    assert train.train_and_evaluate(leaping(texts), str(tmp_path / "killed")) == once
    assert left == 96
    assert metas(tmp_path / "killed") == metas(tmp_path / "once")
    runs = [read_jsonl(str(tmp_path / name)) for name in ("once", "killed")]
    losses = [[row["nll"] for row in rows if "nll" in row] for rows in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 16


@pytest.mark.slow
def test_without_a_checkpoint_it_begins_anew(texts: Path, tmp_path: Path) -> None:
    """The second leap ends it."""
    c = leaping(texts, optimizer__learning_rate=4.0, checkpoint__every=100)
    message = "gone back once, before the leap of step 3; there is no checkpoint from before$"
    with pytest.raises(RunError, match=message):
        train.train_and_evaluate(c, str(tmp_path / "run"))
    (told,) = [row for row in read_jsonl(str(tmp_path / "run")) if "spike_step" in row]
    assert told == {"step": 0, "spike_step": 3, "restored_step": 0, "rate_factor": 0.5}

    # With one alone, whose own loss leapt, it ends rather than losing everything.
    c = leaping(texts, checkpoint__every=9)
    with pytest.raises(RunError, match="leapt to .* nats: .*; there is no checkpoint from before$"):
        train.train_and_evaluate(c, str(tmp_path / "one"))
    assert list(metas(tmp_path / "one")) == [9]


@pytest.mark.slow
def test_two_processes_go_back_together(texts: Path, tmp_path: Path) -> None:
    with run(texts, tmp_path / "run", 2, 1, **{**LEAPS, "checkpoint__every": 2}) as two:
        results = two.results()
    assert [result.code for result in results] == [0, 0], results
    assert "going back to before it" in results[0].out
    last = metas(tmp_path / "run")[16]
    assert last["rate_factor"] == 0.5 and last["restored_step"] < last["spike_step"] - 1
