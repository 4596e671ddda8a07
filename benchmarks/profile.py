"""Where a training step's time goes, by kind of operation.

Command:  python -m benchmarks.profile --geometry=small-8 --spans=full

Each line: time of one step (on a CPU of all its threads), share, number of calls, kind. On a CPU,
products are the operations that XLA runs as matrix products, whatever it calls them; nested scopes
(loops, calls) are left out, so that nothing counts twice. On a GPU a kind is a kernel; our own have
the names of their functions in allattn/attention/gpu.
"""

import argparse
import collections
import re
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

from allattn import sharding
from allattn.model import Model, ModelConfig
from benchmarks import train
from benchmarks.geometries import NETWORKS

# Names of operations in a CPU's trace.
PRODUCTS = re.compile(r"ynn_fusion|dot|.*matmul")
SCOPES = re.compile(
    r"while|call|conditional|Thunk|\$|end:|Wait|Rendezvous|Pjit|cpp_|shard_arg|.*Execute|.*Launch"
)


def events(folder: str) -> dict[str, tuple[float, int]]:
    """Milliseconds and calls of every kind of operation in a trace."""
    totals: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    path = next(Path(folder).rglob("*.xplane.pb"))
    on_gpu = jax.default_backend() == "gpu"
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for line in plane.lines:
            # On a GPU only its streams count, and every event of theirs is a kernel.
            if on_gpu and not ("GPU" in plane.name and "Stream" in line.name):
                continue
            for event in line.events:
                kind = event.name.split(".")[0]
                if not on_gpu and PRODUCTS.match(event.name):
                    kind = "products"
                if on_gpu or not SCOPES.match(kind):
                    spent, calls = totals[kind]
                    totals[kind] = (spent + event.duration_ns / 1e6, calls + 1)
    return totals


def main() -> None:
    """Trace one step after two, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", choices=NETWORKS, default="small-8")
    parser.add_argument("--spans", default="full", help="full, zero, mixed, or a JSON file")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--remat", default="", help="train.remat")
    parser.set_defaults(implementation="")
    arguments = parser.parse_args()
    sharding.use_cores(arguments.rows)

    # The same step as benchmarks/train.py times.
    c = train.configuration(arguments)
    model = Model(ModelConfig.from_config(c))
    params = jax.jit(model.init)(jax.random.key(0))
    params["layers"]["span"] = jnp.asarray(train.spans(c, arguments.spans))
    run = train.trainer(c, params, model, sharding.mesh_over_rows())

    # The first call compiles.
    jax.block_until_ready([run() for _ in range(2)])
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        totals = events(folder)
    total = sum(spent for spent, _ in totals.values())
    by_time = sorted(totals.items(), key=lambda item: -item[1][0])
    for kind, (spent, calls) in by_time[:30]:
        print(f"{spent:9.1f} ms {spent / total:6.1%} {calls:7} {kind}")


if __name__ == "__main__":
    main()
