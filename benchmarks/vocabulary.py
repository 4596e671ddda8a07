"""Adaptive input and softmax against plain ones over WikiText-103's vocabulary.

Command:  python -m benchmarks.vocabulary [--rows=8] [--repeats=3]

Measured are time and memory of embedding, loss and their gradients, without the model between them.
Last line: JSON. Each of `plain`, `adaptive` and `worst` runs in a process of its own: `step_ms`,
the executable's memory in MiB (`arguments`, `outputs` and `temporary`; `memory_mib` is their sum)
and the process's `peak_rss_mib`. `worst` is the adaptive one where every id is equally likely, so
that most tokens visit a tail; the others have targets about as frequent as in English. The ratios
are plain over adaptive. Dimension key: B batch, T position in the block.
"""

import argparse
import dataclasses
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allattn import config as configuration
from allattn.model import Model, ModelConfig
from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("plain", "adaptive", "worst")
BLOCK = 256
# Of the clusters in English running text; assumed, to about a hundredth.
SHARES = (0.937, 0.03, 0.03, 0.003)


def geometry(kind: str, dtype: str) -> ModelConfig:
    """WikiText-103's model with next to nothing between embedding and softmax."""
    config = ModelConfig.from_config(configuration.load(str(ROOT / "configs" / "wikitext103.py")))
    cutoffs = () if kind == "plain" else config.cutoffs
    return dataclasses.replace(config, depth=1, persistent=0, dtype=dtype, cutoffs=cutoffs)


def compiled(config: ModelConfig, rows: int) -> Any:
    """The compiled step, not yet run.

    It takes the parameters of `io` and the ids of a block with the token after it, and returns the
    loss and the gradients.
    """
    model = Model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(io_params: Any, ids_BT: jax.Array) -> jax.Array:
        # The other parameters stay abstract, since nothing reads them.
        io = model.bind({**params, "io": io_params}).io
        hidden_BTD = io.embed(ids_BT[:, :-1], jnp.dtype(config.dtype))
        return io.nll(hidden_BTD, ids_BT[:, 1:]).mean()

    ids_BT = jax.ShapeDtypeStruct((rows, BLOCK + 1), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(params["io"], ids_BT).compile()


def memory(step: Any) -> dict[str, float]:
    """What an executable needs, in MiB."""
    analysis = step.memory_analysis()
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
    }
    sizes["memory_mib"] = sum(sizes.values())
    return {name: round(size / 2**20, 1) for name, size in sizes.items()}


def tokens(rows: int, worst: bool) -> np.ndarray:
    """Ids that visit the clusters as often as `SHARES` says, or all alike."""
    config = geometry("adaptive", "float32")
    rng = np.random.default_rng(0)
    # A cluster for every token, then one of its ids.
    bounds = np.array([0, *config.cutoffs, config.vocab_size])
    share = np.diff(bounds) / config.vocab_size if worst else SHARES
    cluster_BT = rng.choice(len(SHARES), (rows, BLOCK + 1), p=share)
    return rng.integers(bounds[cluster_BT], bounds[cluster_BT + 1], dtype=np.int32)


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile and time one kind in this process."""
    config = geometry(kind, arguments.dtype)
    step = compiled(config, arguments.rows)
    ids_BT = tokens(arguments.rows, kind == "worst")
    io_params = jax.jit(lambda key: Model(config).init(key)["io"])(jax.random.key(0))
    times = [machine.seconds(lambda: step(io_params, ids_BT)) for _ in range(1 + arguments.repeats)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "step_ms": round(1e3 * statistics.median(times[1:]), 1),
        **memory(step),
        "peak_rss_mib": peak,
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every kind in a process of its own, so that each has a peak of its own."""
    results: dict[str, Any] = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.vocabulary", f"--only={kind}", *sys.argv[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{kind}: {done.stderr.strip()[-2000:]}")
        results[kind] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind}: {results[kind]}", file=sys.stderr, flush=True)

    def ratio(field: str) -> float:
        return round(results["plain"][field] / results["adaptive"][field], 2)

    return {
        "benchmark": "vocabulary",
        "rows": arguments.rows,
        "block": BLOCK,
        "dtype": arguments.dtype,
        **results,
        "time_ratio": ratio("step_ms"),
        "memory_ratio": ratio("memory_mib"),
        "rss_ratio": ratio("peak_rss_mib"),
        **machine.provenance(),
    }


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=8, help="of a block of 256 tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=KINDS, help="one kind, in this process")
    arguments = parser.parse_args()
    row = measure(arguments.only, arguments) if arguments.only else compare(arguments)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
