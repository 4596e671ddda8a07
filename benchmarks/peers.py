"""Ours beside PyTorch formulations of the same training step, taken in turn in one run.

Command:  python -m benchmarks.peers [--geometry=tiny --geometry=small-8]
              [--python=.venv-peers/bin/python]

The job: one update (forward, backward, Adagrad) at geometries of benchmarks/train.py with full
spans, float32, no dropout, one thread per core. In each round everybody has a turn, and so has the
machine's own matrix product; figures are medians over rounds. `products` are what one token
requires, relative to ours; `share` is these products over the matrix product. What the peers do and
what not is in PEERS; peers_torch.py has their code and runs in a process of its own, with a Python
that has PyTorch. The lines printed also go, as JSON, to a file under benchmarks/results.
"""

import argparse
import datetime
import functools
import json
import os
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from allattn import sharding
from allattn.model import Model, ModelConfig, forward_flops
from benchmarks import machine, train
from benchmarks.geometries import NETWORKS

ROOT = Path(__file__).parents[1]

# The contenders, and what each does and does not do.
XLA = "ours"
MIXED = "ours, mixed spans"
TORCH = "torch"
EXACT = "learned relative positions, exact; current token not attended; learned spans"
NEAR = (
    "relative positions by rotation; current token attended, T/2 more keys on average; "
    "no learned spans; post-norm"
)
PEERS = {
    XLA: f"{EXACT}, and less work where they are short; dropout the same however rows are spread; "
    "no T x S array",
    MIXED: "the same where all heads but one of a layer have learned a span of 32 tokens; "
    "the peers cannot use that",
    TORCH: f"{EXACT}, but the same work; T x S arrays, since PyTorch does not fuse a bias that "
    "has a gradient",
    "x-transformers, fused": f"{NEAR}; a T x S mask of booleans only",
    "x-transformers, unfused": f"{NEAR}; T x S arrays",
}
TURN = 1.5  # seconds of a turn, unless one step takes longer


def ours(arguments: argparse.Namespace, spans: str) -> Callable[[int], float]:
    """The seconds that some of our steps take, as a function of their number.

    Args:
      arguments: the flags, with one geometry.
      spans: as in benchmarks/train.py.
    """
    c = train.configuration(arguments)
    model = Model(ModelConfig.from_config(c))
    params = jax.jit(model.init)(jax.random.key(0))
    params["layers"]["span"] = jax.numpy.asarray(train.spans(c, spans))
    step = train.trainer(c, params, model, sharding.mesh_over_rows())

    def seconds(count: int) -> float:
        return machine.seconds(lambda: [step() for _ in range(count)])

    return seconds


def start(arguments: argparse.Namespace, config: ModelConfig, block: int) -> subprocess.Popen:
    """The child that trains the peers."""
    names = ("depth", "width", "heads", "limit", "persistent", "vocab_size", "ramp")
    job = {name: getattr(config, name) for name in names}
    job |= {"rows": arguments.rows, "block": block, "threads": os.cpu_count()}
    command = [arguments.python, "-m", "benchmarks.peers_torch", json.dumps(job)]
    return subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


def ask(child: subprocess.Popen, name: str, count: int) -> float:
    """The seconds that some steps of a peer take."""
    assert child.stdin and child.stdout
    child.stdin.write(json.dumps([name, count]) + "\n")
    child.stdin.flush()
    return json.loads(child.stdout.readline())


def take_turns(
    runs: dict[str, Callable[[int], float]], rounds: int
) -> tuple[dict[str, float], float]:
    """Everybody's time, in turn.

    Args:
      runs: by name, the seconds that some steps take as a function of their number.
      rounds: turns of each.

    Returns:
      Seconds per step of everybody and the rate of the matrix product in GFLOP/s, medians over
      rounds.
    """
    # Compile, then find how many steps fill a turn.
    for run in runs.values():
        run(2)
    counts = {name: max(1, round(TURN / run(1))) for name, run in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    rates = []
    for _ in range(rounds):
        rates.append(machine.matmul_gflops())
        for name, run in runs.items():
            times[name].append(run(counts[name]) / counts[name])
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return medians, statistics.median(rates)


def required_flops(config: ModelConfig, block: int, name: str) -> float:
    """Products that a token's forward pass requires, in FLOPs."""
    L = config.limit
    H = config.heads
    if name == MIXED:
        short = min(32 + config.ramp, L)
        return forward_flops(config, (short * (H - 1) + L) / H, block)
    required = forward_flops(config, L, block)
    if name in (XLA, TORCH):
        return required
    # x-transformers sees the block up to the query as well, and has no product with positions: two
    # products for each of these keys instead of three for each of the L.
    keys = L + (block + 1) / 2
    return required + config.depth * 2 * config.width * (2 * keys - 3 * L)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender."""
    c = train.configuration(arguments)
    config = ModelConfig.from_config(c)
    block = c.train.block

    # Ours in this process, the peers in the child.
    with start(arguments, config, block) as child:
        assert child.stdin and child.stdout
        versions = json.loads(child.stdout.readline())
        runs = {XLA: ours(arguments, "full"), MIXED: ours(arguments, "mixed")}
        runs |= {name: functools.partial(ask, child, name) for name in PEERS if name not in runs}
        seconds, rate = take_turns(runs, arguments.rounds)
        child.stdin.close()

    tokens = arguments.rows * block
    our_flops = required_flops(config, block, XLA)

    def row(name: str) -> dict[str, Any]:
        flops = required_flops(config, block, name)
        return {
            "geometry": arguments.geometry,
            "rows": arguments.rows,
            "dtype": arguments.dtype,
            "name": name,
            "tokens_per_s": round(tokens / seconds[name], 1),
            "matmul_gflops": round(rate, 1),
            "share": round(3 * flops * tokens / seconds[name] / rate / 1e9, 4),
            "products": round(flops / our_flops, 3),
            "ours_over_this": round(seconds[name] / seconds[XLA], 3),
            "rounds": arguments.rounds,
            **machine.provenance(),
            **versions,
        }

    return [row(name) for name in PEERS]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, and what the contenders are."""
    lines = [f"{'':10}{'':26}{'tokens/s':>10}{'share':>8}{'products':>10}{'ours is':>9}"]
    for row in rows:
        speed = f"{row['tokens_per_s']:>10}{row['share']:>8.3f}"
        compared = f"{row['products']:>10.2f}{row['ours_over_this']:>8.2f}x"
        lines.append(f"{row['geometry']:10}{row['name']:26}{speed}{compared}")
    lines += [f"{name}: {what}" for name, what in PEERS.items()]
    return "\n".join(lines)


def main() -> None:
    """Measure every geometry, print the table, append to the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--geometry", action="append", choices=NETWORKS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--python",
        default=str(ROOT / ".venv-peers/bin/python"),
        help="has torch and x-transformers",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results")
    parser.set_defaults(dropout=0.0, dtype="float32", implementation="", remat="")
    arguments = parser.parse_args()
    if not Path(arguments.python).exists():
        parser.error(
            "--python: expected a Python with torch and x-transformers (make bench-peers), "
            f"found no {arguments.python}"
        )
    sharding.use_cores(arguments.rows)
    rows: list[dict[str, Any]] = []
    for geometry in arguments.geometry or ("tiny", "small-8"):
        rows += measure(argparse.Namespace(**{**vars(arguments), "geometry": geometry}))
    path = arguments.results / f"{datetime.date.today().isoformat()}-peers.jsonl"
    with path.open("a", encoding="utf8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{table(rows)}\n{path}")


if __name__ == "__main__":
    main()
