"""Speed of training and evaluation, beside the machine's matrix product measured in the same run.

Command:  python -m benchmarks.train --geometry=small-8 --spans=full
              [--mode=evaluate] [--seconds=20]

Last line: JSON with tokens_per_s, matmul_gflops (before and after), share (required FLOPs over that
rate) and peak_memory_mb.

Dimension key: X layer, H head, B batch, R row of the evaluation, T position in the block.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

from allattn import data, sharding, train
from allattn.configs import base
from allattn.evaluation import protocols, scoring
from allattn.model import Model, ModelConfig, forward_flops
from allattn.train import optim
from benchmarks import machine
from benchmarks.geometries import GEOMETRIES, NETWORKS

VOCABULARY = 205  # symbols of enwik8


def configuration(arguments: argparse.Namespace) -> ml_collections.ConfigDict:
    """A geometry as a configuration; the rate is 0, so that the spans stay as they are set."""
    c = base.get_config()
    # The sizes.
    geometry = GEOMETRIES[arguments.geometry]
    c.model.depth = geometry.depth
    c.model.width = geometry.width
    c.model.heads = geometry.heads
    c.model.span.limit = geometry.limit
    c.model.persistent = geometry.persistent
    c.model.vocab_size = VOCABULARY
    c.train.block = geometry.block
    # What the flags say.
    c.train.batch = arguments.rows
    c.train.remat = arguments.remat
    c.model.dropout = arguments.dropout
    c.model.dtype = arguments.dtype
    c.model.implementation = arguments.implementation
    # Neither gradients nor their penalty change the spans.
    c.optimizer.learning_rate = 0.0
    c.model.span.loss = 0.0
    return c


def spans(c: ml_collections.ConfigDict, name: str) -> np.ndarray:
    """Spans of every layer and head as shares of the limit, z_XH.

    Args:
      c: the configuration.
      name: full; zero; mixed, 32 tokens in all heads but one that has all; or a JSON file of spans
        in tokens.
    """
    limit = c.model.span.limit
    heads = c.model.heads
    if name.endswith(".json"):
        tokens_XH = np.array(json.loads(Path(name).read_text(encoding="utf8"))["spans"], np.float32)
        return np.minimum(np.resize(tokens_XH, (c.model.depth, heads)), limit) / limit
    tokens_H = {
        "full": [limit] * heads,
        "zero": [0] * heads,
        "mixed": [32] * (heads - 1) + [limit],
    }[name]
    return np.tile(np.array(tokens_H, np.float32) / limit, (c.model.depth, 1))


def trainer(
    c: ml_collections.ConfigDict, params: Any, model: Model, mesh: Mesh
) -> Callable[[], Any]:
    """A function that makes one update of a running state."""
    limit = c.model.span.limit
    context = train.choose_context_length(c, float(jnp.max(params["layers"]["span"])))

    # The state of a run, on the mesh.
    optimizer = optim.optimizer(c)
    cache_XBSD = model.empty_cache(c.train.batch, train.next_context_length(context, limit))
    key = jax.random.key_data(jax.random.key(0))
    state = train.TrainState(jnp.int32(0), params, optimizer.init(params), cache_XBSD, key)
    shardings = sharding.shardings(mesh, state)
    state = jax.device_put(state, shardings)

    # The step that training makes.
    attention = sharding.attention_over(mesh, c.train.batch)
    step = train.make_train_step(model, optimizer, c, context, attention, mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    # A block from the middle of a text, so that the cache counts as full.
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(VOCABULARY, size=(c.train.batch, c.train.block + 1), dtype=np.int32)
    rows = sharding.Rows(mesh, c.train.batch)
    inputs_BT = rows.place(tokens_BT[:, :-1])
    targets_BT = rows.place(tokens_BT[:, 1:])
    batch = data.Batch(inputs_BT, targets_BT, np.int32(limit))

    def run() -> Any:
        nonlocal state
        state, values = step(state, batch)
        return values

    return run


def evaluator(
    c: ml_collections.ConfigDict, params: Any, model: Model, mesh: Mesh
) -> Callable[[], Any]:
    """A function that scores one block of 8 rows."""
    rng = np.random.default_rng(0)
    block = c.train.block
    rows = protocols.AUTHORS_ROWS
    tokens = rng.integers(VOCABULARY, size=rows * (block + 1), dtype=np.int32)
    plan = protocols.authors_plan(len(tokens), block)
    context = scoring.scoring_context(model, params)

    # Everything on the mesh: cache, parameters, the block.
    cache = scoring.empty_cache(model, mesh, rows, context + block)
    params = jax.device_put(params, sharding.shardings(mesh, params))
    spread = sharding.Rows(mesh, rows)
    arrays = [spread.place(x_RT) for x_RT in scoring.read_block(tokens, plan, block, 0)]

    def run() -> Any:
        nonlocal cache
        cache, sums = scoring.score_block(model, mesh, None, params, cache, context, *arrays)
        return sums

    return run


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the steps between two measurements of the matrix product."""
    evaluates = arguments.mode == "evaluate"
    rows = protocols.AUTHORS_ROWS if evaluates else arguments.rows
    sharding.use_cores(rows)
    mesh = sharding.mesh_over_rows()

    # The network with the spans asked for, and the call that is timed.
    c = configuration(arguments)
    config = ModelConfig.from_config(c)
    model = Model(config)
    z_XH = spans(c, arguments.spans)
    params = jax.jit(model.init)(jax.random.key(0))
    params["layers"]["span"] = jnp.asarray(z_XH)
    build = evaluator if evaluates else trainer
    run = build(c, params, model, mesh)

    # Two calls that do not count: the first compiles.
    before = machine.matmul_gflops(arguments.dtype)
    for _ in range(2):
        jax.block_until_ready(run())
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < arguments.seconds or len(times) < 3:
        times.append(machine.seconds(run))
    after = machine.matmul_gflops(arguments.dtype)

    # Training requires three times the products of the forward pass.
    tokens = rows * c.train.block
    second = statistics.median(times)
    reach = float(np.minimum(z_XH * config.limit + config.ramp, config.limit).mean())
    flops = tokens * forward_flops(config, reach, c.train.block, cached=evaluates)
    if not evaluates:
        flops *= 3
    return {
        "geometry": arguments.geometry,
        "spans": arguments.spans,
        "rows": rows,
        "mode": arguments.mode,
        "dropout": arguments.dropout,
        "dtype": arguments.dtype,
        "remat": arguments.remat,
        "tokens_per_s": round(tokens / second, 1),
        "matmul_gflops": [round(before, 1), round(after, 1)],
        "share": round(flops / second / 1e9 / ((before + after) / 2), 4),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "steps": len(times),
        **machine.provenance(),
    }


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--geometry", choices=NETWORKS, default="tiny")
    found.add_argument("--spans", default="full", help="full, zero, mixed, or a JSON file")
    found.add_argument("--rows", type=int, default=8, help="of a training batch")
    found.add_argument("--mode", choices=("train", "evaluate"), default="train")
    found.add_argument("--dropout", type=float, default=0.0)
    found.add_argument("--dtype", default="float32")
    found.add_argument("--implementation", default="", help="of the attention operation")
    found.add_argument("--remat", default="", help="train.remat")
    found.add_argument("--seconds", type=float, default=20.0, help="least time to measure")
    return found


def main() -> None:
    """Parse the flags, measure, print."""
    print(json.dumps(measure(parser().parse_args())))


if __name__ == "__main__":
    main()
