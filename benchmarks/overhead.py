"""What a run of the demo costs besides its steps: starting, first and again, and saving.

Command:  python -m benchmarks.overhead
Prints JSON lines: seconds from the command to its first step, with nothing compiled before and with everything, and
their ratio (asked: below 1/3), medians of three; then the median time of a step, how long saving keeps the loop from
its next step, that as a share of a step (asked: below 0.05), and the median time of the step after a save, while the
files are written.
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

from allattn import checkpoint, config, data, sharding, train
from benchmarks.machine import provenance

PAIRS, SAVES, BETWEEN = 3, 15, 6


def start(programs: str, workdir: str) -> float:
    """Seconds until a run, with a folder of compiled programs, has made and reported its first step."""
    settings = ("train.steps=1", "train.finetune_steps=0", "train.log_every=1", "evaluate.max_tokens=1000")
    words = ["train", "--config=configs/demo.py", f"--workdir={workdir}", *(f"--config.{word}" for word in settings)]
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
    return {"first_start_s": first, "second_start_s": second, "start_ratio": second / first, "ratios": ratios}


def saves() -> dict[str, float]:
    """Times of steps, and of saves between them."""
    c = config.load("configs/demo.py")
    sharding.use_cores_for(c)
    dataset = data.prepare(c.dataset.name)
    trainer = train.Trainer(config.with_vocabulary(c, dataset.vocabulary.size, dataset.name), dataset)
    state, bucket = trainer.fresh_state()
    made: list[float] = []
    after: list[float] = []
    blocked: list[float] = []

    def step(number: int) -> float:
        nonlocal state
        began = time.perf_counter()
        state, values = trainer.step(state, bucket, trainer.batch(number))
        jax.block_until_ready(values)
        return time.perf_counter() - began

    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpointer(folder) as checkpoints:
        for number in range(SAVES * BETWEEN):
            (after if number % BETWEEN == 0 else made).append(step(number))
            if number % BETWEEN == BETWEEN - 1:
                began = time.perf_counter()
                arrays = (state.params, state.optimizer, state.cache)
                checkpoints.save(number, *arrays, trainer.meta(state, bucket))
                blocked.append(time.perf_counter() - began)
    usual, kept = statistics.median(made), statistics.median(blocked)
    later = statistics.median(after[1:])
    return {"step_s": usual, "save_s": kept, "save_share": kept / usual, "step_after_save_s": later}


def main() -> None:
    """Both, as JSON."""
    measures: list[Any] = [starts, saves]
    for measure in measures:
        print(json.dumps({"benchmark": f"overhead.{measure.__name__}", **measure(), **provenance()}), flush=True)


if __name__ == "__main__":
    main()
