"""Speed of the operation alone, forward and with gradients, beside the machine's matrix product.

Command:  python -m benchmarks.attention --geometry=enwik8_small --spans=full
              [--dropout=0.3] [--implementation=xla]
          python -m benchmarks.attention --geometry=enwik8_small --tune

`--spans` is full, zero, or a JSON file that lists spans in tokens, layer by layer and head by head:
each layer is timed. With dropout, the same work without it is timed in turn. Rows are spread over
devices as in training. Last line: JSON; share counts required products only (3 x the forward's for
both directions).

With `--tune`, tile sizes are timed instead and the best enter the table that the implementation
looks them up in.

Dimension key: B batch, T query position, S context key, L distance, N persistent pair, H head, K
head width, X layer.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from allattn import sharding
from allattn.attention import IMPLEMENTATIONS, best_here
from benchmarks import machine, tune
from benchmarks.geometries import GEOMETRIES, OPERATIONS

RAMP = 32


def spans(name: str, limit: int, heads: int) -> np.ndarray:
    """Spans in tokens, as (X, H), each at most the limit."""
    if name == "full":
        return np.full((1, heads), limit, np.float32)
    if name == "zero":
        return np.zeros((1, heads), np.float32)
    listed_XH = np.array(json.loads(Path(name).read_text(encoding="utf8"))["spans"], np.float32)
    return np.minimum(listed_XH[:, :heads], limit)


def required_flops(arguments: argparse.Namespace, span_XH: np.ndarray) -> float:
    """Products of the forward pass, mean over layers.

    Three for every context key in reach (query.key, weights.value, query.position), two for every
    persistent pair.
    """
    H, K, L, T, N = GEOMETRIES[arguments.geometry].of_operation()
    reach_H = np.minimum(span_XH + RAMP, L).mean(0)
    return float(arguments.rows * T * K * 2 * (3 * reach_H + 2 * N).sum())


def inputs(arguments: argparse.Namespace) -> tuple[jax.Array, ...]:
    """Random query, key, value, position table, persistent keys and values."""
    H, K, L, T, N = GEOMETRIES[arguments.geometry].of_operation()
    B = arguments.rows
    S = T + L
    # What has batch rows is spread over the devices, the parameters are on each of them.
    mesh = sharding.mesh_over_rows()
    by_rows = NamedSharding(mesh, PartitionSpec(sharding.ROWS))
    whole = NamedSharding(mesh, PartitionSpec())
    sharded_shapes = [
        ((B, T, H, K), by_rows),
        ((B, S, H, K), by_rows),
        ((B, S, H, K), by_rows),
        ((1, L, K), whole),
        ((H, N, K), whole),
        ((H, N, K), whole),
    ]
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, arguments.dtype), static_argnums=1
    )
    keys = jax.random.split(jax.random.key(0), len(sharded_shapes))
    arrays = []
    for key, (shape, placement) in zip(keys, sharded_shapes, strict=True):
        arrays.append(jax.device_put(draw(key, shape), placement))
    return tuple(arrays)


def attend(attention: Callable, arrays: Sequence[jax.Array], **options: Any) -> jax.Array:
    """Call the operation on its seven arrays, those of the query, key, value, position, pairs and
    spans.
    """
    query_BTHK, key_BSHK, value_BSHK, position_HLK, *persistent_HNK, span_H = arrays
    return attention(
        query_BTHK,
        key_BSHK,
        value_BSHK,
        position_HLK=position_HLK,
        persistent_key_HNK=persistent_HNK[0],
        persistent_value_HNK=persistent_HNK[1],
        span_H=span_H,
        ramp=RAMP,
        **options,
    )


def operation(arguments: argparse.Namespace, dropout: float) -> Callable[..., jax.Array]:
    """The operation as a function of its arrays and the spans."""
    attention = sharding.attention_over(sharding.mesh_over_rows(), arguments.rows)
    options = {
        "dropout_rate": dropout,
        "dropout_seed": 1,
        "implementation": arguments.implementation or None,
    }
    return lambda *arrays: attend(attention, arrays, **options)


def both(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The operation and the gradients of everything that goes into it."""

    def loss(*arrays: jax.Array) -> jax.Array:
        return run(*arrays).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=tuple(range(7)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians, the things compared taken in turn; the time of several layers is their mean."""
    H, _, L, _, _ = GEOMETRIES[arguments.geometry].of_operation()
    span_XH = spans(arguments.spans, L, H)
    arrays = inputs(arguments)

    # What is timed, with and without dropout: forward, and forward with the gradients.
    code: dict[tuple[str, float], Callable] = {}
    for dropout in sorted({0.0, arguments.dropout}):
        code["forward", dropout] = jax.jit(operation(arguments, dropout))
        code["both", dropout] = jax.jit(both(operation(arguments, dropout)))

    # In turn, between two measurements of the matrix product.
    times: dict[tuple[str, float], list[list[float]]] = {
        name: [[] for _ in span_XH] for name in code
    }
    before = machine.matmul_gflops(arguments.dtype)
    for repeat in range(arguments.repeats + 1):
        for layer, span_H in enumerate(span_XH):
            for name, run in code.items():
                second = machine.seconds(functools.partial(run, *arrays, jnp.asarray(span_H)))
                if repeat:  # the first compiles
                    times[name][layer].append(second)
    after = machine.matmul_gflops(arguments.dtype)

    means = {
        name: statistics.mean(map(statistics.median, by_layer)) for name, by_layer in times.items()
    }
    forward = means["forward", arguments.dropout]
    gradients = means["both", arguments.dropout]
    rate = (before + after) / 2 * 1e9
    flops = required_flops(arguments, span_XH)
    return {
        "geometry": arguments.geometry,
        "spans": arguments.spans,
        "rows": arguments.rows,
        "dropout": arguments.dropout,
        "dtype": arguments.dtype,
        "implementation": arguments.implementation or "best here",
        "forward_ms": round(forward * 1e3, 2),
        "both_ms": round(gradients * 1e3, 2),
        "matmul_gflops": [round(before, 1), round(after, 1)],
        "share_forward": round(flops / forward / rate, 4),
        "share_both": round(3 * flops / gradients / rate, 4),
        "dropout_costs": round(gradients / means["both", 0.0], 3),
        **machine.provenance(),
    }


def tune_tiles(arguments: argparse.Namespace) -> dict[str, Any]:
    """Find the best tile sizes for forward and backward, and enter them in the table."""
    H, K, L, T, N = GEOMETRIES[arguments.geometry].of_operation()
    implementation = arguments.implementation or best_here(jnp.dtype(arguments.dtype))
    arrays = inputs(arguments)
    span_XH = spans(arguments.spans, L, H)
    code: dict[Any, Callable] = {}

    def seconds(tiles: Any) -> float:
        if tiles not in code:  # traced while these tiles are in force
            code[tiles] = jax.jit(both(operation(arguments, arguments.dropout)))
        return sum(
            machine.seconds(functools.partial(code[tiles], *arrays, jnp.asarray(span_H)))
            for span_H in span_XH
        )

    sizes = {"T": T, "L": L, "N": N, "K": K}
    row = tune.tune(implementation, sizes, seconds, arguments.repeats) | machine.provenance()
    tune.enter(
        row | {"geometry": arguments.geometry, "spans": arguments.spans, "dtype": arguments.dtype}
    )
    return row


def parser() -> argparse.ArgumentParser:
    """The flags."""
    found = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--geometry", choices=OPERATIONS, default="small-8")
    found.add_argument("--spans", default="full", help="full, zero, or a JSON file")
    found.add_argument("--rows", type=int, default=8, help="B")
    found.add_argument("--dropout", type=float, default=0.0)
    found.add_argument("--dtype", default="float32")
    found.add_argument("--implementation", choices=("", *IMPLEMENTATIONS), default="")
    found.add_argument("--repeats", type=int, default=9)
    found.add_argument(
        "--tune", action="store_true", help="measure tile sizes and enter the best in the table"
    )
    return found


def main() -> None:
    """Parse the flags, measure, print."""
    arguments = parser().parse_args()
    sharding.use_cores(arguments.rows)
    row = tune_tiles(arguments) if arguments.tune else measure(arguments)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
