"""Weak scaling, measured: what a process has to do where 1, 2 and 4 of them train together.

Command:  python -m benchmarks.processes [--steps=40] [--config.a.b=value ...]

Real processes on this machine, started by launch/local.sh, with one device and as many rows each,
train the demo's network over gloo. Last line: JSON with the FLOPs per token of a process's program,
by the compiler's count (of a loop's body once, however many processes there are), and the CPU
seconds per token of the threads that compute. Processes on one machine slow each other down, so the
seconds of those that train together are divided by those of as many that train at once, each by
itself: medians of three such pairs, five minutes in all. Needs Linux.
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
from allattn.sharding import processes as running
from benchmarks.machine import provenance

ROOT = Path(__file__).resolve().parents[1]

# Numbers of processes, and rows of each.
COUNTS = (1, 2, 4)
ROWS = 8

# Symbols of the random text.
VOCABULARY = 96

# Steps before those that are timed, and timed steps.
WARM = 3
STEPS = 40

# Pairs of training together and alone.
REPEATS = 3


# --- one of the processes ------------------------------------------------------------------------


def work(words: Sequence[str], processes: int, steps: int) -> dict[str, float]:
    """What this process does for a token.

    Args:
      words: settings, each as `--config.a.b=value`.
      processes: how many train together.
      steps: how many are timed.

    Returns:
      `flops` of its compiled step and `cpu_s` of the steps that it makes, per token.
    """
    c = _config(words, processes)
    program = train.TrainProgram(c, sharding.make_mesh(c))
    context_length = c.model.span.limit
    # The step is compiled before anything is timed, and its FLOPs are the compiler's count.
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract_state(context_length))
    state = jax.jit(program.init_state(context_length), out_shardings=shardings)()
    batch = random_batch(program)
    step = program.jitted_step(context_length).lower(state, batch).compile()
    flops = (step.cost_analysis() or {})["flops"]
    # The first steps fill caches and connect the processes.
    state = repeat(step, state, batch, WARM)
    before = computing()
    repeat(step, state, batch, steps)
    cpu_s = computing() - before
    tokens = ROWS * c.train.block
    return {"flops": flops / tokens, "cpu_s": cpu_s / steps / tokens}


def _config(words: Sequence[str], processes: int) -> Any:
    """The demo's configuration with the settings of the command and rows for all processes."""
    # The batch grows with the processes, so that each always has as many rows.
    settings = [word.removeprefix("--config.").split("=", 1) for word in words]
    changes = {name: value for name, value in settings}
    changes["train.batch"] = str(ROWS * processes)
    changes["model.vocab_size"] = str(VOCABULARY)
    return config.load(str(ROOT / "configs" / "demo.py"), changes)


def random_batch(program: train.TrainProgram) -> data.Batch:
    """A block of random symbols, of which this process draws its own rows."""
    c = program.config
    rng = np.random.default_rng(running.index())
    rows = sharding.Rows(program.mesh, c.train.batch)

    def draw() -> jax.Array:
        shape = (len(rows.local), c.train.block)
        return rows.place(rng.integers(VOCABULARY, size=shape, dtype=np.int32))

    return data.Batch(draw(), draw(), np.int32(c.model.span.limit))


def repeat(
    step: jax.stages.Compiled, state: train.TrainState, batch: data.Batch, times: int
) -> train.TrainState:
    """The state after so many steps, each of which is waited for."""
    for _ in range(times):
        state, _ = jax.block_until_ready(step(state, batch))
    return state


def computing() -> float:
    """CPU seconds of the threads that compute, in user mode.

    Threads that talk to other processes and wait for them have names of their own.
    """
    ticks = 0
    for thread in Path("/proc/self/task").iterdir():
        # One that has ended in the meantime has no files.
        with contextlib.suppress(OSError):
            if (thread / "comm").read_text(encoding="utf8").startswith("tf_XLA"):
                # Fields behind the name, which may have spaces; the twelfth is user time.
                fields = (thread / "stat").read_text(encoding="utf8").rpartition(")")[2].split()
                ticks += int(fields[11])
    return ticks / os.sysconf("SC_CLK_TCK")


# --- all of them ---------------------------------------------------------------------------------


def measure(words: Sequence[str] = ()) -> dict[str, Any]:
    """Work per token of processes that train together, and its ratio to training alone.

    Args:
      words: what every process is called with besides.

    Returns:
      `processes`, `cores`, and for `flops` and `cpu_s` a median for each number of processes: per
      token where they train together (`..._per_token`), and over that of as many processes that
      train at once by themselves (`..._ratio`).
    """
    together: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    alone: dict[int, list[dict[str, float]]] = {count: [] for count in COUNTS}
    # Together and alone in turns, so that a machine that becomes slower slows both.
    for _ in range(REPEATS):
        for count in COUNTS:
            together[count].append(at_once(count, words))
            alone[count].append(at_once(count, ["--alone", *words]))
    figures: dict[str, Any] = {"processes": COUNTS, "cores": os.cpu_count()}
    for name in ("flops", "cpu_s"):
        per_token = []
        ratios = []
        for count in COUNTS:
            pairs = [(a[name], b[name]) for a, b in zip(together[count], alone[count], strict=True)]
            per_token.append(statistics.median(a for a, _ in pairs))
            ratios.append(round(statistics.median(a / b for a, b in pairs), 4))
        figures[f"{name}_per_token"] = per_token
        figures[f"{name}_ratio"] = ratios
    return figures


def at_once(processes: int, words: Sequence[str]) -> dict[str, float]:
    """The most that one of several processes has to do, of those that run at once.

    Args:
      processes: how many.
      words: what each is called with; with `--alone` each trains by itself.

    Raises:
      RuntimeError: a process failed.
    """
    program = [sys.executable, "-m", "benchmarks.processes", *words]
    command = ["launch/local.sh", f"--processes={processes}", "--tries=1", *program]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    # Processes may write into the same line, so it is not read line by line.
    results = [json.loads(text) for text in re.findall(r"{.*?}", done.stdout)]
    if done.returncode or len(results) != processes:
        expected = f"{processes} processes: expected a line of each, found {results}"
        raise RuntimeError(f"{expected}: {done.stderr[-2000:]}")
    # The slowest process decides how fast all of them train.
    return {name: max(result[name] for result in results) for name in results[0]}


def main() -> None:
    """The command, or one of the processes that it starts."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # What launch/local.sh tells each process.
    parser.add_argument("--coordinator", type=str, help=argparse.SUPPRESS)
    parser.add_argument("--processes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--process", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    # What a user may say.
    parser.add_argument("--steps", type=int, default=STEPS, help="that are timed")
    arguments, words = parser.parse_known_args()
    unknown = [word for word in words if not word.startswith("--config.") or "=" not in word]
    if unknown:
        parser.error(f"expected settings --config.name=value, found {' '.join(unknown)}")
    if arguments.processes is None:
        figures = measure([f"--steps={arguments.steps}", *words])
        print(json.dumps({"benchmark": "processes", **figures, **provenance()}))
        return
    if not arguments.alone:
        running.start(arguments.coordinator, arguments.processes, arguments.process)
    print(json.dumps(work(words, running.count(), arguments.steps)), flush=True)
    running.stop(0)


if __name__ == "__main__":
    main()
