"""Adaptive input and softmax against plain ones over WikiText-103's vocabulary: time and memory of
embedding, loss and their gradients, the model between them left out.

Command:  python -m benchmarks.vocabulary [--rows=8] [--repeats=3]
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
SHARES = (
    0.937,
    0.03,
    0.03,
    0.003,
)  # of the clusters in English running text; assumed, to about a hundredth


def geometry(kind: str, dtype: str) -> ModelConfig:
    """That of WikiText-103's model, with next to nothing between embedding and softmax."""
    config = ModelConfig.from_config(configuration.load(str(ROOT / "configs" / "wikitext103.py")))
    cutoffs = () if kind == "plain" else config.cutoffs
    return dataclasses.replace(config, depth=1, persistent=0, dtype=dtype, cutoffs=cutoffs)


def compiled(config: ModelConfig, rows: int) -> Any:
    """The step (parameters of `io`, ids of a block and the token after it) -> (loss, gradients), not yet run."""
    model = Model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))

    def loss(io_params: Any, ids_BT: jax.Array) -> jax.Array:
        io = model.bind(
            {**params, "io": io_params}
        ).io  # the rest stays abstract, since nothing looks at it
        return io.nll(io.embed(ids_BT[:, :-1], jnp.dtype(config.dtype)), ids_BT[:, 1:]).mean()

    ids_BT = jax.ShapeDtypeStruct((rows, BLOCK + 1), jnp.int32)
    return jax.jit(jax.value_and_grad(loss)).lower(params["io"], ids_BT).compile()


def memory(step: Any) -> dict[str, float]:
    """What an executable needs, in MiB."""
    found = step.memory_analysis()
    sizes = (found.argument_size_in_bytes, found.output_size_in_bytes, found.temp_size_in_bytes)
    named = dict(zip(("arguments", "outputs", "temporary"), sizes, strict=True))
    return {
        name: round(size / 2**20, 1) for name, size in {**named, "memory_mib": sum(sizes)}.items()
    }


def tokens(rows: int, worst: bool) -> np.ndarray:
    """Ids that visit the clusters as often as `SHARES` says, or all alike."""
    config, rng = geometry("adaptive", "float32"), np.random.default_rng(0)
    bounds = np.array([0, *config.cutoffs, config.vocab_size])
    share = np.diff(bounds) / config.vocab_size if worst else SHARES
    cluster_BT = rng.choice(len(SHARES), (rows, BLOCK + 1), p=share)
    return rng.integers(bounds[cluster_BT], bounds[cluster_BT + 1], dtype=np.int32)


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile and time one kind in this process."""
    config = geometry(kind, arguments.dtype)
    step, ids_BT = compiled(config, arguments.rows), tokens(arguments.rows, kind == "worst")
    io_params = jax.jit(lambda key: Model(config).init(key)["io"])(jax.random.key(0))
    times = [machine.seconds(lambda: step(io_params, ids_BT)) for _ in range(1 + arguments.repeats)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {
        "step_ms": round(1e3 * statistics.median(times[1:]), 1),
        **memory(step),
        "peak_rss_mib": peak,
    }


def compare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every kind in a process of its own, so that their peaks are apart."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "benchmarks.vocabulary", f"--only={kind}", *sys.argv[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{kind}: {done.stderr.strip()[-2000:]}")
        found[kind] = json.loads(done.stdout.splitlines()[-1])
        print(f"{kind}: {found[kind]}", file=sys.stderr, flush=True)
    ratios = {
        name: round(found["plain"][of] / found["adaptive"][of], 2)
        for name, of in (
            ("time_ratio", "step_ms"),
            ("memory_ratio", "memory_mib"),
            ("rss_ratio", "peak_rss_mib"),
        )
    }
    case = {
        "benchmark": "vocabulary",
        "rows": arguments.rows,
        "block": BLOCK,
        "dtype": arguments.dtype,
    }
    return {**case, **found, **ratios, **machine.provenance()}


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
    found = measure(arguments.only, arguments) if arguments.only else compare(arguments)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
