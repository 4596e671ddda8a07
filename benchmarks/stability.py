"""Does a deep network survive a short warm-up? The loss of every update, by kind of layer.

The paper's network of 18 layers of width 512 needs a warm-up of thousands of updates. Here it has
30, on the source text of Python's standard library: as it is, with normalised inputs of sublayers,
and with normalised queries and keys besides.

Command:  python -m benchmarks.stability [--updates=100] [--depth=18] [--width=512]
              [--kind=post_norm]

Prints a JSON row for each kind: the loss in nats and the norm of the gradient at every update, and
`leap`, the most that the mean loss of five updates rises above the least one before.
"""

import argparse
import json
import time
from typing import Any

import ml_collections
import numpy as np

from allattn import config, data, train
from allattn.configs import base
from benchmarks import machine

# What each kind changes of the paper's network.
KINDS: dict[str, dict[str, Any]] = {
    "post_norm": {},
    "pre_norm": {"pre_norm": True},
    "pre_norm_qk_norm": {"pre_norm": True, "qk_norm": True},
}
# Updates whose losses are averaged: a block may be harder than the one before.
WINDOW = 5


def configuration(arguments: argparse.Namespace, kind: str) -> ml_collections.ConfigDict:
    """The paper's network and rule on short blocks, with a warm-up of 30 updates."""
    c = base.get_config()
    c.dataset.name = "stdlib"
    c.model.depth = arguments.depth
    c.model.width = arguments.width
    c.model.heads = max(1, arguments.width // 64)
    c.model.persistent = 2 * arguments.width
    c.model.vocab_size = 0
    c.model.dtype = "float32"
    c.model.span.limit = 128
    c.model.update(KINDS[kind])
    c.optimizer.warmup = 30
    c.optimizer.name = arguments.optimizer
    c.optimizer.learning_rate = arguments.rate
    if arguments.optimizer == "adam":
        c.optimizer.clip = 1.0
    c.train.batch = arguments.rows
    c.train.block = 64
    c.train.steps = arguments.updates
    return c


def run(c: ml_collections.ConfigDict) -> dict[str, Any]:
    """Loss and norm of the gradient at every update."""
    dataset = data.prepare_configured(c)
    trainer = train.Trainer(
        config.with_vocabulary(c, dataset.vocabulary.size, dataset.name), dataset
    )
    state, context_length = trainer.fresh_state()
    losses = []
    norms = []
    for step in range(c.train.steps):
        state, metrics = trainer.step(state, context_length, trainer.batch(step))
        values = metrics.compute()
        losses.append(round(float(values["nll"]), 4))
        norms.append(round(float(values["gradient_norm"]), 4))
    return {"leap": round(leap(losses), 4), "nll": losses, "gradient_norm": norms}


def leap(losses: list[float]) -> float:
    """The most that the mean of `WINDOW` losses rises above the least such mean before it.

    A loss that is not a number counts as an infinite one.
    """
    means = np.convolve(losses, np.ones(WINDOW) / WINDOW, mode="valid")
    if not np.isfinite(means).all():
        return float("inf")
    return float((means - np.minimum.accumulate(means)).max())


def main() -> None:
    """Train every kind that is asked for, and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--depth", type=int, default=18)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--optimizer", default="adagrad")
    parser.add_argument("--rate", type=float, default=0.07)
    parser.add_argument("--kind", choices=KINDS, action="append")
    arguments = parser.parse_args()
    for kind in arguments.kind or KINDS:
        began = time.perf_counter()
        found = run(configuration(arguments, kind))
        row = {**vars(arguments), "kind": kind, "seconds": round(time.perf_counter() - began)}
        print(json.dumps({**row, **machine.provenance(), **found}), flush=True)


if __name__ == "__main__":
    main()
