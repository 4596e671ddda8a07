"""Weak scaling, measured: what a process has to do where 1, 2 and 4 of them train together, with as many rows each.

Command:  python -m benchmarks.processes [--steps=40] [--config.a.b=value ...]
Real processes on this machine, started by launch/local.sh, with one device each, train the demo's
network over gloo. Last line: JSON with the FLOPs per token of a process's program, by the
compiler's count (of a loop's body once, however many processes there are), and the CPU seconds per
token of the threads that compute. Processes on one machine slow each other down, so the seconds of
those that train together are divided by those of as many that train at once, each by itself:
medians of three such pairs, five minutes in all. Needs Linux.
"""

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from allattn import config, data, sharding, train
from allattn.sharding import processes
from benchmarks.machine import provenance

ROOT = Path(__file__).resolve().parents[1]
COUNTS, ROWS, VOCABULARY = (1, 2, 4), 8, 96  # processes; rows of each
WARM, STEPS, REPEATS = 3, 40, 3


def work(words: Sequence[str], processes: int, steps: int) -> dict[str, float]:
    """What this process does for a token: FLOPs of its compiled step, and CPU seconds of steps that it makes."""
    changes = dict(word.removeprefix("--config.").split("=", 1) for word in words)
    changes |= {"train.batch": str(ROWS * processes), "model.vocab_size": str(VOCABULARY)}
    c = config.load(str(ROOT / "configs" / "demo.py"), changes)
    program, bucket = train.TrainProgram(c, sharding.make_mesh(c)), c.model.span.limit
    places = jax.tree.map(lambda x: x.sharding, program.abstract_state(bucket))
    state, batch = (
        jax.jit(program.init_state(bucket), out_shardings=places)(),
        random_batch(program),
    )
    step = program.jitted_step(bucket).lower(state, batch).compile()
    state = repeat(step, state, batch, WARM)
    began = computing()
    repeat(step, state, batch, steps)
    spent, flops = computing() - began, (step.cost_analysis() or {})["flops"]
    tokens = ROWS * c.train.block
    return {"flops": flops / tokens, "cpu_s": spent / steps / tokens}


def random_batch(program: train.TrainProgram) -> data.Batch:
    """A block of random symbols, of which this process draws its own rows."""
    c, rng = program.config, np.random.default_rng(processes.index())
    rows = sharding.Rows(program.mesh, c.train.batch)

    def draw() -> jax.Array:
        return rows.place(
            rng.integers(VOCABULARY, size=(len(rows.local), c.train.block), dtype=np.int32)
        )

    return data.Batch(draw(), draw(), np.int32(c.model.span.limit))


def repeat(
    step: jax.stages.Compiled, state: train.TrainState, batch: data.Batch, times: int
) -> train.TrainState:
    """The state after so many steps, each of which is waited for."""
    for _ in range(times):
        state, _ = jax.block_until_ready(step(state, batch))
    return state


def computing() -> float:
    """CPU seconds, in user mode, of the threads that compute; what talks to other processes and waits has its own."""
    ticks = 0
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # one that has ended
            if (thread / "comm").read_text().startswith("tf_XLA"):
                ticks += int((thread / "stat").read_text().rpartition(")")[2].split()[11])
    return ticks / os.sysconf("SC_CLK_TCK")


def at_once(processes: int, words: Sequence[str]) -> dict[str, float]:
    """The most that one of so many processes has to do."""
    program = [sys.executable, "-m", "benchmarks.processes", *words]
    command = ["launch/local.sh", f"--processes={processes}", "--tries=1", *program]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    found = [
        json.loads(text) for text in re.findall(r"{.*?}", done.stdout)
    ]  # others may write into the same line
    if done.returncode or len(found) != processes:
        raise RuntimeError(
            f"{processes} processes: expected a line of each, found {found}: {done.stderr[-2000:]}"
        )
    return {name: max(one[name] for one in found) for name in found[0]}


def measure(words: Sequence[str] = ()) -> dict[str, Any]:
    """Work per token where 1, 2 and 4 processes train together, and over that of processes that train by themselves."""
    pairs = [
        [(at_once(n, words), at_once(n, ["--alone", *words])) for n in COUNTS]
        for _ in range(REPEATS)
    ]
    found: dict[str, Any] = {"processes": COUNTS, "cores": os.cpu_count()}
    for name in ("flops", "cpu_s"):
        of_count = [
            [(joined[name], alone[name]) for joined, alone in column]
            for column in zip(*pairs, strict=True)
        ]
        found[f"{name}_per_token"] = [
            statistics.median(joined for joined, _ in column) for column in of_count
        ]
        found[f"{name}_ratio"] = [
            round(statistics.median(a / b for a, b in column), 4) for column in of_count
        ]
    return found


def main() -> None:
    """The command, or one of the processes that it starts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, kind in (("coordinator", str), ("processes", int), ("process", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=STEPS, help="that are timed")
    arguments, words = parser.parse_known_args()
    strange = [word for word in words if not word.startswith("--config.") or "=" not in word]
    if strange:
        parser.error(f"expected settings --config.name=value, found {' '.join(strange)}")
    if arguments.processes is None:
        found = measure([f"--steps={arguments.steps}", *words])
        print(json.dumps({"benchmark": "processes", **found, **provenance()}))
        return
    if not arguments.alone:
        processes.start(arguments.coordinator, arguments.processes, arguments.process)
    print(json.dumps(work(words, processes.count(), arguments.steps)), flush=True)
    processes.stop(0)


if __name__ == "__main__":
    main()
