"""What a run of the demo costs besides its steps: starting, first and again, and saving.

Command:  python -m benchmarks.overhead
Prints JSON lines: seconds from the command to its first step, with nothing compiled before and with
everything, and their ratio (asked: below 1/3), medians of three. Then medians of a step beside
which nothing is written (`step_s`) and of the two costs of a save, in seconds and as shares of such
a step. `save`: how long it keeps the loop from its next step (asked: a share below 0.05).
`writing`: how much longer the steps after it take, together; where all cores compute, files can
only be written in the time of these steps. `step_after_save_s` is the first of them.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax

from allattn import config, data, sharding, train
from allattn.storage import checkpoint
from benchmarks.machine import provenance

DEMO = "configs/demo.py"
PAIRS, SAVES, BETWEEN = 3, 15, 8


def start(programs: str, workdir: str) -> float:
    """Seconds until a run, with a folder of compiled programs, has made and reported its first step."""
    settings = (
        "train.steps=1",
        "train.finetune_steps=0",
        "train.log_every=1",
        "evaluate.max_tokens=1000",
    )
    words = [
        "train",
        f"--config={DEMO}",
        f"--workdir={workdir}",
        *(f"--config.{word}" for word in settings),
    ]
    environment, began = {**os.environ, "JAX_COMPILATION_CACHE_DIR": programs}, time.perf_counter()
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-m", "allattn", *words]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if line.startswith("step 1/1"))
        found = time.perf_counter() - began
        run.kill()
    return found


def starts() -> dict[str, Any]:
    """The first start and the one after it: medians of several such pairs."""
    pairs = []
    for _ in range(PAIRS):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append([start(f"{folder}/programs", f"{folder}/run{i}") for i in range(2)])
    first, second = map(statistics.median, zip(*pairs, strict=True))
    ratios = [round(b / a, 3) for a, b in pairs]
    return {
        "first_start_s": first,
        "second_start_s": second,
        "start_ratio": second / first,
        "ratios": ratios,
    }


def saves() -> dict[str, float]:
    """Times of steps, of saves between them, and of the writing beside the steps after a save."""
    c = config.load(DEMO)
    dataset = data.prepare(c.dataset.name)
    trainer = train.Trainer(
        config.with_vocabulary(c, dataset.vocabulary.size, dataset.name), dataset
    )
    state, bucket = trainer.fresh_state()
    held: list[float] = []
    rounds: list[list[float]] = []  # the steps after each save

    def step(number: int) -> float:
        nonlocal state
        began = time.perf_counter()
        state, values = trainer.step(state, bucket, trainer.batch(number))
        jax.block_until_ready(values)
        return time.perf_counter() - began

    step(0)  # compiles
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpointer(folder) as checkpoints:
        for number in range(1, SAVES * BETWEEN, BETWEEN):
            began = time.perf_counter()
            checkpoints.save(
                number, state.params, state.optimizer, state.cache, trainer.meta(state, bucket)
            )
            held.append(time.perf_counter() - began)
            rounds.append([step(number + i) for i in range(BETWEEN)])
    return summary(held, rounds)


def summary(held: list[float], rounds: list[list[float]]) -> dict[str, float]:
    """What saves cost, from how long each held the loop and the times of the steps after it."""
    usual = statistics.median(
        time for steps in rounds for time in steps[BETWEEN // 2 :]
    )  # all is written by then
    kept, longer = statistics.median(held), statistics.median(map(sum, rounds)) - BETWEEN * usual
    costs = {
        "save_s": kept,
        "save_share": kept / usual,
        "writing_s": longer,
        "writing_share": longer / usual,
    }
    return {
        "step_s": usual,
        **costs,
        "step_after_save_s": statistics.median(steps[0] for steps in rounds),
    }


def main() -> None:
    """Both, as JSON."""
    sharding.use_cores_for(config.load(DEMO))  # as the command does, before JAX is first used
    measures: list[Any] = [starts, saves]
    for measure in measures:
        print(
            json.dumps({"benchmark": f"overhead.{measure.__name__}", **measure(), **provenance()}),
            flush=True,
        )


if __name__ == "__main__":
    main()
