"""Adaptive input and softmax against plain ones over WikiText-103's vocabulary: time and memory of embedding, loss and
their gradients, the model between them left out.

Command:  python -m benchmarks.vocabulary [--rows=8] [--repeats=3]
Last line: JSON. Each of `plain`, `adaptive` and `worst` runs in a process of its own: `step_ms`, the executable's
memory in MiB (`arguments`, `outputs` and `temporary`; `memory_mib` is their sum) and the process's `peak_rss_mib`.
`worst` is the adaptive one where every id is equally likely, so that most tokens visit a tail; the others have targets
about as frequent as in English. `time_ratio` and `memory_ratio` are plain over adaptive.
Dimension key: B batch, T position in the block.
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
import numpy as np

from allattn import config as configuration
from allattn.model import Model, ModelConfig
from benchmarks import machine

ROOT = Path(__file__).resolve().parents[1]
WIKITEXT = ROOT / "configs" / "wikitext103.py"
KINDS = ("plain", "adaptive", "worst")
SHARES = (0.937, 0.03, 0.03, 0.003)  # of the clusters in English running text; assumed, to about a hundredth


def tokens(cutoffs: tuple[int, ...], size: int, shape: tuple[int, int], worst: bool) -> np.ndarray:
    """Ids that visit the clusters as often as `SHARES` says, or all alike."""
    bounds, rng = np.array([0, *cutoffs, size]), np.random.default_rng(0)
    cluster_BT = rng.choice(len(SHARES), shape, p=np.diff(bounds) / size if worst else SHARES)
    return rng.integers(bounds[cluster_BT], bounds[cluster_BT + 1], dtype=np.int32)


def measure(kind: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compile and time one kind in this process."""
    c = configuration.load(str(WIKITEXT))
    whole = ModelConfig.from_config(c)
    changes: dict[str, Any] = {"cutoffs": ()} if kind == "plain" else {}
    model = Model(dataclasses.replace(whole, depth=1, persistent=0, dtype=arguments.dtype, **changes))
    params = jax.jit(model.init)(jax.random.key(0))
    io = params.pop("io")
    shape = (arguments.rows, c.train.block + 1)
    ids_BT = tokens(whole.cutoffs, whole.vocab_size, shape, kind == "worst")

    def loss(io: Any, ids_BT: jax.Array) -> jax.Array:
        bound = model.bind({**params, "io": io}).io
        return bound.nll(bound.embed(ids_BT[:, :-1], jax.numpy.dtype(arguments.dtype)), ids_BT[:, 1:]).mean()

    step = jax.jit(jax.value_and_grad(loss)).lower(io, ids_BT).compile()
    times = [machine.seconds(lambda: step(io, ids_BT)) for _ in range(1 + arguments.repeats)][1:]
    memory: Any = step.memory_analysis()
    parts = {name: getattr(memory, f"{name[:-1]}_size_in_bytes") / 2**20 for name in ("arguments", "outputs")}
    parts["temporary"] = memory.temp_size_in_bytes / 2**20
    return {
        "step_ms": round(1e3 * statistics.median(times), 1),
        **{name: round(size, 1) for name, size in parts.items()},
        "memory_mib": round(sum(parts.values()), 1),
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
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
        print(f"{kind}: {found[kind]}", flush=True)
    plain, adaptive = found["plain"], found["adaptive"]
    return {
        "benchmark": "vocabulary",
        **vars(arguments),
        **found,
        "time_ratio": round(plain["step_ms"] / adaptive["step_ms"], 2),
        "memory_ratio": round(plain["memory_mib"] / adaptive["memory_mib"], 2),
        "peak_rss_ratio": round(plain["peak_rss_mib"] / adaptive["peak_rss_mib"], 2),
        **machine.provenance(),
    }


def main() -> None:
    """Parse the flags, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=8, help="of a block of 256 tokens")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=KINDS, default="", help="one kind, in this process")
    arguments = parser.parse_args()
    found = measure(arguments.only, arguments) if arguments.only else compare(arguments)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
