"""Small tasks that the network must solve, and must not solve without the part that they need.

Dimension key: B batch, T position in the block.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_model import random_params

from allattn import data, train
from allattn.attention import all_attention
from allattn.model import Model, ModelConfig
from allattn.train import optim
from configs import base

SLICE = Path(__file__).resolve().parents[3] / "shared" / "data" / "enwik8_slice"
Draw = Callable[
    [np.random.Generator], np.ndarray
]  # one batch of sequences, each one longer than the block

ROWS = 16
BLOCK = 32
STEPS = 250


def final_nll(symbols: int, depth: int, persistent: int, limit: int, draw: Draw) -> float:
    """Train by Adam on sequences that are all new; the mean loss of the last steps in nats.

    Args:
      symbols: size of the vocabulary.
      depth: layers.
      persistent: persistent pairs per head.
      limit: context of every head.
      draw: makes a batch.
    """
    c = base.get_config()
    c.model.depth = depth
    c.model.width = 32
    c.model.heads = 2
    c.model.vocab_size = symbols
    c.model.persistent = persistent
    c.model.span.limit = limit
    c.model.span.adaptive = False
    c.model.dtype = "float32"
    c.model.implementation = "reference"
    c.optimizer.name = "adam"
    c.optimizer.learning_rate = 5e-3
    c.optimizer.warmup = 20
    c.optimizer.clip = 1.0
    c.train.batch = ROWS
    c.train.block = BLOCK
    c.train.steps = STEPS
    model = Model(ModelConfig.from_config(c))
    optimizer = optim.optimizer(c)
    params = random_params(model)
    key = jax.random.key_data(jax.random.key(0))
    state = train.TrainState(
        jnp.int32(0), params, optimizer.init(params), model.empty_cache(ROWS, limit), key
    )
    step = jax.jit(
        train.make_train_step(model, optimizer, c, limit, all_attention), donate_argnums=0
    )
    rng = np.random.default_rng(0)
    losses = []
    for _ in range(STEPS):
        window_BT = draw(rng)
        state, values = step(state, data.Batch(window_BT[:, :-1], window_BT[:, 1:], np.int32(0)))
        losses.append(values)
    return float(np.mean([values.compute()["nll"] for values in losses[-50:]]))


NOISE = 0.2


def additions(rng: np.random.Generator) -> np.ndarray:
    """Each symbol is the sum of the two before it modulo 7, but every fifth, at random, is any
    symbol.
    """
    x_BT = rng.integers(7, size=(ROWS, BLOCK + 1))
    for t in range(2, BLOCK + 1):
        x_BT[:, t] = np.where(
            rng.random(ROWS) < NOISE, x_BT[:, t], (x_BT[:, t - 1] + x_BT[:, t - 2]) % 7
        )
    return x_BT


def test_addition_needs_persistent_vectors() -> None:
    """Addition modulo 7 needs persistent vectors.

    With one key in the context, attention without persistent vectors has constant weights: the
    layers are linear up to their norms, and what takes the place of the feed-forward layer must be
    the persistent vectors.
    """
    expected = 1 - NOISE * 6 / 7
    other = NOISE / 7
    least = -expected * math.log(expected) - 6 * other * math.log(
        other
    )  # for all but the first target of a row
    least = (least * (BLOCK - 1) + math.log(7)) / BLOCK
    assert final_nll(7, 2, 64, 1, additions) < least + 0.1
    assert least + 0.35 < final_nll(7, 2, 0, 1, additions) < math.log(7)


PERIOD = 5


def repetitions(rng: np.random.Generator) -> np.ndarray:
    """A random word of five symbols, again and again."""
    return np.tile(rng.integers(16, size=(ROWS, PERIOD)), (1, math.ceil((BLOCK + 1) / PERIOD)))[
        :, : BLOCK + 1
    ]


def test_copying_needs_context() -> None:
    """The symbol to copy is five back, the current one not counted: one layer that sees less cannot
    know it.
    """
    least = math.log(16) * (PERIOD - 1) / BLOCK  # the first word, whose first symbol is no target
    assert final_nll(16, 1, 16, PERIOD, repetitions) < least + 0.1
    assert least + 1.5 < final_nll(16, 1, 16, 1, repetitions) < math.log(16) + 0.1


@pytest.mark.slow
def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute on Wikipedia text, through the whole of training. The score is one of a slice, not
    of enwik8.
    """
    if not SLICE.exists():
        pytest.skip("enwik8_slice, 4 MB of Wikipedia text, is not on this machine")
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "prepared"))
    (tmp_path / "texts").mkdir()
    for split, size in (("train", 3_750_000), ("valid", 20_000), ("test", 50_000)):
        (tmp_path / "texts" / f"{split}.txt").write_bytes(
            (SLICE / f"{split}.txt").read_bytes()[:size]
        )
    changes: dict[str, Any] = {"dataset.name": "files", "dataset.data_dir": str(tmp_path / "texts")}
    # As many symbols as the text has, as in the papers' runs.
    changes["dataset.numbering"] = "appearance"
    changes |= {
        "model.depth": 2,
        "model.width": 128,
        "model.heads": 4,
        "model.persistent": 128,
        "model.vocab_size": 0,
    }
    changes |= {"model.dtype": "float32", "model.span.limit": 128, "model.span.check_every": 10}
    changes |= {"optimizer.name": "adam", "optimizer.learning_rate": 3e-3, "optimizer.warmup": 50}
    changes |= {"optimizer.clip": 1.0, "train.batch": 16, "train.block": 64, "train.steps": 500}
    changes |= {"train.finetune_steps": 50, "checkpoint.every": 1000, "evaluate.every": 1000}
    c = base.get_config()
    c.update_from_flattened_dict(changes)
    scores = train.train_and_evaluate(c.lock(), str(tmp_path / "run"))
    assert scores["split"] == "test" and scores["protocol"] == "authors" and scores["step"] == 550
    assert 1.5 < scores["bpc"] < 3.0
