"""Speed of the operation alone, forward and with its gradients, beside the machine's own matrix product.

Command:  python -m benchmarks.attention --geometry=enwik8_small --spans=full [--dropout=0.3]
[--implementation=xla]
          python -m benchmarks.attention --geometry=enwik8_small --tune
`--spans` is full, zero, or a JSON file that lists spans in tokens, layer by layer and head by head:
each layer is timed. With dropout, the same work without it is timed in turn. Last line: JSON; share
counts required products only (3 x the forward's for both directions). Rows are spread over devices
as in training. With `--tune`, tile sizes are timed instead and the best enter the table that the
implementation looks them up in. Dimension key: B batch, T query position, S context key, L
distance, N persistent pair, H head, K head width, X layer.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from allattn import sharding
from allattn.attention import IMPLEMENTATIONS, best_here
from benchmarks import machine, tune

# heads, head width, span limit, queries, persistent pairs
GEOMETRIES = {
    "tiny": (4, 64, 256, 128, 512),
    "small-8": (4, 64, 1024, 256, 1024),
    "enwik8_small": (8, 64, 8192, 512, 1024),
    "enwik8_large": (8, 64, 8192, 512, 2048),
    "wikitext103": (8, 64, 2048, 256, 2048),
}
RAMP = 32


def spans(name: str, limit: int, heads: int) -> np.ndarray:
    """Spans in tokens, as (X, H), each at most the limit."""
    if name in ("full", "zero"):
        return np.full((1, heads), limit if name == "full" else 0, np.float32)
    listed_XH = np.array(json.loads(Path(name).read_text())["spans"], np.float32)
    return np.minimum(listed_XH[:, :heads], limit)


def required_flops(arguments: argparse.Namespace, span_XH: np.ndarray) -> float:
    """Products of the forward pass, mean over layers: query.key, weights.value, query.position; persistent pairs."""
    H, K, L, T, N = GEOMETRIES[arguments.geometry]
    reach_H = np.minimum(span_XH + RAMP, L).mean(0)
    return float(arguments.rows * T * K * 2 * (3 * reach_H + 2 * N).sum())


def inputs(arguments: argparse.Namespace) -> tuple[jax.Array, ...]:
    """Random query, key, value, position table, persistent keys and values."""
    H, K, L, T, N = GEOMETRIES[arguments.geometry]
    B, mesh = arguments.rows, sharding.mesh_over_rows()
    shapes = [(B, T, H, K), (B, T + L, H, K), (B, T + L, H, K), (1, L, K), (H, N, K), (H, N, K)]
    places = [NamedSharding(mesh, PartitionSpec(spec)) for spec in [sharding.ROWS] * 3 + [None] * 3]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    draw = jax.jit(
        lambda key, shape: jax.random.normal(key, shape, arguments.dtype), static_argnums=1
    )
    return tuple(
        jax.device_put(draw(*drawn), place)
        for *drawn, place in zip(keys, shapes, places, strict=True)
    )


def operation(arguments: argparse.Namespace, dropout: float) -> Callable[..., jax.Array]:
    """The operation as a function of its arrays and the spans."""
    attention = sharding.attention_over(sharding.mesh_over_rows(), arguments.rows)

    def run(
        query_BTHK,
        key_BSHK,
        value_BSHK,
        position_HLK,
        persistent_key_HNK,
        persistent_value_HNK,
        span_H,
    ):
        return attention(
            *(query_BTHK, key_BSHK, value_BSHK),
            position_HLK=position_HLK,
            persistent_key_HNK=persistent_key_HNK,
            persistent_value_HNK=persistent_value_HNK,
            span_H=span_H,
            ramp=RAMP,
            dropout_rate=dropout,
            dropout_seed=1,
            implementation=arguments.implementation or None,
        )

    return run


def both(run: Callable[..., jax.Array]) -> Callable[..., Any]:
    """The operation and the gradients of everything that goes into it."""

    def loss(*arrays: jax.Array) -> jax.Array:
        return run(*arrays).astype(jnp.float32).sum()

    return jax.grad(loss, argnums=tuple(range(7)))


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Medians, the things compared taken in turn; the time of several layers is their mean."""
    H, _, L, *_ = GEOMETRIES[arguments.geometry]
    span_XH, arrays = spans(arguments.spans, L, H), inputs(arguments)
    rates = sorted({0.0, arguments.dropout})
    code: dict[tuple[str, float], Callable] = {
        ("forward", r): jax.jit(operation(arguments, r)) for r in rates
    }
    code |= {("both", r): jax.jit(both(operation(arguments, r))) for r in rates}
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
    forward, gradients = means["forward", arguments.dropout], means["both", arguments.dropout]
    rate, flops = (before + after) / 2 * 1e9, required_flops(arguments, span_XH)
    return {
        **{
            name: getattr(arguments, name)
            for name in ("geometry", "spans", "rows", "dropout", "dtype")
        },
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
    H, K, L, T, N = GEOMETRIES[arguments.geometry]
    implementation = arguments.implementation or best_here(jnp.dtype(arguments.dtype))
    arrays, span_XH = inputs(arguments), spans(arguments.spans, L, H)
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


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=tuple(GEOMETRIES), default="small-8")
    parser.add_argument("--spans", default="full", help="full, zero, or a JSON file")
    parser.add_argument("--rows", type=int, default=8, help="B")
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--implementation", choices=("", *IMPLEMENTATIONS), default="")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--tune", action="store_true", help="measure tile sizes and enter the best in the table"
    )
    arguments = parser.parse_args()
    sharding.use_cores(arguments.rows)
    print(json.dumps(tune_tiles(arguments) if arguments.tune else measure(arguments)))


if __name__ == "__main__":
    main()
