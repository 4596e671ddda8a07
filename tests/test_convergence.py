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

from allattn import data, optim, train
from allattn.attention import all_attention
from allattn.model import Model, ModelConfig
from configs import base

SLICE = Path(__file__).resolve().parents[2] / "shared" / "data" / "enwik8_slice"
Draw = Callable[[np.random.Generator], np.ndarray]  # one batch of sequences, each one longer than the block

ROWS, BLOCK, STEPS = 16, 32, 300


def last_accuracy(symbols: int, depth: int, persistent: int, limit: int, draw: Draw, rule: Callable) -> float:
    """Train by Adam on fresh sequences; how often the likeliest symbol is the rule's, on sequences not trained on.

    Args:
      symbols: size of the vocabulary.
      depth: layers.
      persistent: persistent pairs per head.
      limit: context of every head.
      draw: makes a batch.
      rule: from a batch to the ids that the rule gives, -1 where it says nothing.
    """
    c = base.get_config()
    c.model.depth, c.model.width, c.model.heads, c.model.vocab_size = depth, 32, 2, symbols
    c.model.persistent, c.model.span.limit, c.model.span.adaptive = persistent, limit, False
    c.model.dtype, c.model.implementation = "float32", "reference"
    c.optimizer.name, c.optimizer.learning_rate, c.optimizer.warmup, c.optimizer.clip = "adam", 5e-3, 20, 1.0
    c.train.batch, c.train.block, c.train.steps = ROWS, BLOCK, STEPS
    model, optimizer = Model(ModelConfig.from_config(c)), optim.optimizer(c)
    params, rng = jax.jit(model.init)(jax.random.key(0)), np.random.default_rng(0)
    key = jax.random.key_data(jax.random.key(0))
    state = train.TrainState(jnp.int32(0), params, optimizer.init(params), model.empty_cache(ROWS, limit), key)
    step = jax.jit(train.make_train_step(model, optimizer, c, limit, all_attention), donate_argnums=0)
    for _ in range(STEPS):
        window_BT = draw(rng)
        state, _ = step(state, data.Batch(window_BT[:, :-1], window_BT[:, 1:], np.bool_(True)))
    window_BT, network = draw(rng), model.bind(state.params)
    forward = network.train_forward(window_BT[:, :-1], model.empty_cache(ROWS, limit))
    found_BT, expected_BT = network.io.logits(forward.hidden_BTD).argmax(-1), rule(window_BT)[:, 1:]
    return float((found_BT == expected_BT)[expected_BT >= 0].mean())


def additions(rng: np.random.Generator) -> np.ndarray:
    """Each symbol is the sum of the two before it modulo 7, but every fifth, at random, is any symbol."""
    x_BT = rng.integers(7, size=(ROWS, BLOCK + 1))
    for t in range(2, BLOCK + 1):
        x_BT[:, t] = np.where(rng.random(ROWS) < 0.2, x_BT[:, t], (x_BT[:, t - 1] + x_BT[:, t - 2]) % 7)
    return x_BT


def sums(x_BT: np.ndarray) -> np.ndarray:
    return np.pad((x_BT[:, 1:-1] + x_BT[:, :-2]) % 7, ((0, 0), (2, 0)), constant_values=-1)


def test_modular_addition_needs_persistent_vectors() -> None:
    """With one key in the context, attention without persistent vectors has constant weights: the layers are linear
    up to their norms, and what takes the place of the feed-forward layer must be the persistent vectors."""
    assert last_accuracy(7, 2, 64, 1, additions, sums) > 0.95
    assert last_accuracy(7, 2, 0, 1, additions, sums) < 0.75


PERIOD = 5


def repetitions(rng: np.random.Generator) -> np.ndarray:
    """A random word of five symbols, again and again."""
    return np.tile(rng.integers(16, size=(ROWS, PERIOD)), (1, math.ceil((BLOCK + 1) / PERIOD)))[:, : BLOCK + 1]


def copies(x_BT: np.ndarray) -> np.ndarray:
    return np.pad(x_BT[:, :-PERIOD], ((0, 0), (PERIOD, 0)), constant_values=-1)


def test_copying_needs_context() -> None:
    assert last_accuracy(16, 1, 16, PERIOD, repetitions, copies) > 0.95
    assert last_accuracy(16, 1, 16, 1, repetitions, copies) < 0.5


@pytest.mark.slow
def test_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute on Wikipedia text, through the whole of training. The score is one of a slice, not of enwik8."""
    if not SLICE.exists():
        pytest.skip("enwik8_slice, 4 MB of Wikipedia text, is not on this machine")
    monkeypatch.setenv("ALLATTN_DATA_DIR", str(tmp_path / "prepared"))
    (tmp_path / "texts").mkdir()
    for split, size in (("train", 3_750_000), ("valid", 20_000), ("test", 50_000)):
        (tmp_path / "texts" / f"{split}.txt").write_bytes((SLICE / f"{split}.txt").read_bytes()[:size])
    changes: dict[str, Any] = {"dataset.name": "files", "dataset.data_dir": str(tmp_path / "texts")}
    changes |= {"model.depth": 2, "model.width": 128, "model.heads": 4, "model.persistent": 128, "model.vocab_size": 0}
    changes |= {"model.dtype": "float32", "model.span.limit": 128, "model.span.check_every": 10}
    changes |= {"optimizer.name": "adam", "optimizer.learning_rate": 3e-3, "optimizer.warmup": 50}
    changes |= {"optimizer.clip": 1.0, "train.batch": 16, "train.block": 64, "train.steps": 500}
    changes |= {"train.finetune_steps": 50, "checkpoint.every": 1000, "evaluate.every": 1000}
    c = base.get_config()
    c.update_from_flattened_dict(changes)
    scores = train.train_and_evaluate(c.lock(), str(tmp_path / "run"))
    assert scores["split"] == "test" and scores["protocol"] == "authors" and scores["step"] == 550
    assert 1.5 < scores["bpc"] < 3.0
