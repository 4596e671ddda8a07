"""Commands called in this process or in one of its own, on the smallest run that there is."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from allattn import config, data, train
from allattn.__main__ import main
from configs import base

ROOT = Path(__file__).resolve().parents[2]
# What a test's own process needs in PYTHONPATH: the repository, and the helpers of all tests.
TEST_PATH = os.pathsep.join(map(str, [ROOT, ROOT / "tests" / "support"]))
TINY = {
    "dataset.name": "files",
    # As few symbols as the texts have.
    "dataset.numbering": "appearance",
    "model.depth": 1,
    "model.width": 16,
    "model.heads": 2,
    "model.persistent": 8,
    "model.vocab_size": 0,
    "model.dtype": "float32",
    "model.implementation": "reference",
    "model.span.limit": 32,
    "model.span.ramp": 4,
    "model.span.check_every": 4,
    "optimizer.name": "adam",
    "optimizer.learning_rate": 0.01,
    "optimizer.warmup": 4,
    "optimizer.clip": 1.0,
    "train.batch": 4,
    "train.block": 16,
    "train.steps": 10,
    "train.finetune_steps": 2,
    "train.log_every": 1,
    "checkpoint.every": 4,
    "evaluate.every": 4,
}


class Result(NamedTuple):
    """What a command left behind."""

    code: int
    out: str
    err: str

    def last(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


def settings(texts: Path | str, **changes: Any) -> dict[str, Any]:
    """Fields of the tiny run; a double underscore stands for a dot."""
    return {
        **TINY,
        "dataset.data_dir": str(texts),
        **{k.replace("__", "."): v for k, v in changes.items()},
    }


def flags(texts: Path, **changes: Any) -> list[str]:
    """Settings of the tiny run, for a command."""
    values = settings(texts, **changes)
    return [
        "--config=configs/base.py",
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]


def trainer(texts: Path | str, **changes: Any) -> train.Trainer:
    """What trains the tiny run, on a mesh of this process's devices."""
    c = base.get_config()
    c.update_from_flattened_dict(settings(texts, **changes))
    dataset = data.prepare_configured(c)
    return train.Trainer(config.with_vocabulary(c, dataset.vocabulary.size, dataset.name), dataset)


def trained(by: train.Trainer, steps: int) -> tuple[train.TrainState, int, list[float]]:
    """The state after some steps, its context length, and the losses."""
    state, context_length = by.fresh_state()
    losses = []
    for step in range(steps):
        state, values = by.step(state, context_length, by.batch(step))
        losses.append(float(values.compute()["nll"]))
    return state, context_length, losses


def call(*words: Any) -> Result:
    """One command in this process."""
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    # A sample of bytes may be no UTF-8.
    texts = [stream.buffer.getvalue().decode(errors="replace") for stream in (out, err)]
    return Result(code, *texts)


def process(*words: Any) -> Result:
    """One command in a process of its own."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "allattn", *map(str, words)],
        capture_output=True,
        cwd=ROOT,
        env=environment,
        timeout=120,
    )
    return Result(done.returncode, done.stdout.decode(), done.stderr.decode())


def write_texts(folder: Path) -> Path:
    """Texts of nine symbols in a new folder `texts`, which is returned."""
    letters = np.frombuffer(b"abcdefgh\n", np.uint8)
    texts = folder / "texts"
    texts.mkdir()
    for split, length in (("train", 1200), ("valid", 300), ("test", 400)):
        text = np.random.default_rng(length).choice(letters, length).tobytes()
        (texts / f"{split}.txt").write_bytes(bytes(letters) + text)
    return texts
