"""Speed of training and evaluation, beside the machine's own matrix product measured in the same run.

Command:  python -m benchmarks.train --geometry=small-8 --spans=full [--mode=evaluate]
[--seconds=20] Last line: JSON with tokens_per_s, matmul_gflops (before and after), share (required
FLOPs over that rate) and peak_memory_mb. Dimension key: X layer, H head, B batch, T position in the
block.
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
from allattn.evaluation import scoring
from allattn.model import Model, ModelConfig, forward_flops
from allattn.train import optim
from benchmarks import machine
from configs import base

# layers, width, heads, span limit, block, persistent pairs
GEOMETRIES = {
    "tiny": (4, 256, 4, 256, 128, 512),
    "small-8": (8, 256, 4, 1024, 256, 1024),
    "enwik8_small": (18, 512, 8, 8192, 512, 1024),
}
EVALUATED, VOCABULARY = 8, 205  # rows of the authors' protocol


def configuration(arguments: argparse.Namespace) -> ml_collections.ConfigDict:
    """A geometry as a configuration; the rate is 0, so that the spans stay as they are set."""
    c = base.get_config()
    m = c.model
    m.depth, m.width, m.heads, m.span.limit, c.train.block, m.persistent = GEOMETRIES[
        arguments.geometry
    ]
    c.train.batch, m.vocab_size, m.dropout = arguments.rows, VOCABULARY, arguments.dropout
    c.train.remat = arguments.remat
    m.dtype, m.implementation = arguments.dtype, arguments.implementation
    c.optimizer.learning_rate, m.span.loss = 0.0, 0.0
    return c


def spans(c: ml_collections.ConfigDict, name: str) -> np.ndarray:
    """z of every layer and head: all, nothing, 32 tokens in all heads but one that has all, or a file's spans."""
    limit, heads = c.model.span.limit, c.model.heads
    if name.endswith(".json"):
        tokens_XH = np.array(json.loads(Path(name).read_text())["spans"], np.float32)
        return np.minimum(np.resize(tokens_XH, (c.model.depth, heads)), limit) / limit
    tokens_H = {
        "full": [limit] * heads,
        "zero": [0] * heads,
        "mixed": [32] * (heads - 1) + [limit],
    }[name]
    return np.tile(np.array(tokens_H, np.float32) / limit, (c.model.depth, 1))


def trainer(
    c: ml_collections.ConfigDict, params: Any, model: Model, longest: float, mesh: Mesh
) -> Callable[[], Any]:
    """A function that makes one update of a running state."""
    bucket, limit = train.choose_context_length(c, longest), c.model.span.limit
    optimizer = optim.optimizer(c)
    cache_XBSD = model.empty_cache(c.train.batch, train.next_context_length(bucket, limit))
    key = jax.random.key_data(jax.random.key(0))
    state = train.TrainState(jnp.int32(0), params, optimizer.init(params), cache_XBSD, key)
    places, attention = (
        sharding.shardings(mesh, state),
        sharding.attention_over(mesh, c.train.batch),
    )
    step = train.make_train_step(model, optimizer, c, bucket, attention, mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, None))
    rng, holder = np.random.default_rng(0), [jax.device_put(state, places)]
    tokens_BT = rng.integers(VOCABULARY, size=(c.train.batch, c.train.block + 1), dtype=np.int32)
    place = sharding.Rows(mesh, c.train.batch).place
    batch = data.Batch(
        place(tokens_BT[:, :-1]), place(tokens_BT[:, 1:]), np.int32(c.model.span.limit)
    )

    def run() -> Any:
        holder[0], values = step(holder[0], batch)
        return values

    return run


def evaluator(
    c: ml_collections.ConfigDict, params: Any, model: Model, mesh: Mesh
) -> Callable[[], Any]:
    """A function that scores one block of 8 rows."""
    rng, block = np.random.default_rng(0), c.train.block
    tokens = rng.integers(VOCABULARY, size=EVALUATED * (block + 1), dtype=np.int32)
    plan, context = scoring.authors_plan(len(tokens), block), scoring.context_length(model, params)
    holder = [scoring.empty_cache(model, mesh, EVALUATED, context + block)]
    params = jax.device_put(params, sharding.shardings(mesh, params))
    arrays = [
        *map(sharding.Rows(mesh, EVALUATED).place, scoring.read_block(tokens, plan, block, 0))
    ]

    def run() -> Any:
        holder[0], nll = scoring.score_block(model, mesh, None, params, holder[0], context, *arrays)
        return nll

    return run


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the steps between two measurements of the matrix product."""
    evaluates = arguments.mode == "evaluate"
    rows = EVALUATED if evaluates else arguments.rows
    sharding.use_cores(rows)
    mesh = sharding.mesh_over_rows()
    c = configuration(arguments)
    config = ModelConfig.from_config(c)
    model, z_XH = Model(config), spans(c, arguments.spans)
    params = jax.jit(model.init)(jax.random.key(0))
    params["layers"]["span"] = jnp.asarray(z_XH)
    run = (
        evaluator(c, params, model, mesh)
        if evaluates
        else trainer(c, params, model, float(z_XH.max()), mesh)
    )
    before = machine.matmul_gflops(arguments.dtype)
    for _ in range(2):
        jax.block_until_ready(run())
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < arguments.seconds or len(times) < 3:
        times.append(machine.seconds(run))
    after = machine.matmul_gflops(arguments.dtype)
    tokens, second = rows * c.train.block, statistics.median(times)
    reach = float(np.minimum(z_XH * config.limit + config.ramp, config.limit).mean())
    flops = (
        tokens
        * forward_flops(config, reach, c.train.block, cached=evaluates)
        * (1 if evaluates else 3)
    )
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


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="tiny")
    parser.add_argument("--spans", default="full", help="full, zero, mixed, or a JSON file")
    parser.add_argument("--rows", type=int, default=8, help="of a training batch")
    parser.add_argument("--mode", choices=("train", "evaluate"), default="train")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementation", default="", help="of the attention operation")
    parser.add_argument("--remat", default="", help="train.remat")
    parser.add_argument("--seconds", type=float, default=20.0, help="least time to measure")
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
