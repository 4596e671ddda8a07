"""What a run of the demo costs besides its steps: starting, first and again, and saving.

Command:  python -m benchmarks.overhead

Prints JSON lines, medians of several:

overhead.starts
    Seconds from the command to its first step, with nothing compiled before and with everything,
    and their ratio (asked: below 1/3).
overhead.saves
    `step_s`: a step beside which nothing is written. `save_s`: how long a save keeps the loop from
    its next step (asked: a share of a step below 0.05). `writing_s`: how much longer the steps
    after it take, together; where all cores compute, files can only be written in the time of these
    steps. `step_after_save_s`: the first of them. Shares are of `step_s`.
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

# A run that ends after its first step and scores almost nothing.
ONE_STEP = (
    "--config.train.steps=1",
    "--config.train.finetune_steps=0",
    "--config.train.log_every=1",
    "--config.evaluate.max_tokens=1000",
)

# Pairs of a first start and the one after it.
PAIRS = 3

# Saves, and steps from one to the next: enough of them that all is written before they end.
SAVES = 15
BETWEEN = 8


# --- starting ------------------------------------------------------------------------------------


def starts() -> dict[str, Any]:
    """The first start and the one after it: medians of several such pairs."""
    first_s = []
    second_s = []
    for _ in range(PAIRS):
        # A folder of compiled programs that is empty for the first run of a pair.
        with tempfile.TemporaryDirectory() as folder:
            first_s.append(start(f"{folder}/programs", f"{folder}/run0"))
            second_s.append(start(f"{folder}/programs", f"{folder}/run1"))
    first = statistics.median(first_s)
    second = statistics.median(second_s)
    return {
        "first_start_s": first,
        "second_start_s": second,
        "start_ratio": second / first,
        "ratios": [round(b / a, 3) for a, b in zip(first_s, second_s, strict=True)],
    }


def start(programs: str, workdir: str) -> float:
    """Seconds until a run has reported its first step.

    Args:
      programs: the folder of compiled programs.
      workdir: of the run.
    """
    command = [sys.executable, "-m", "allattn", "train", f"--config={DEMO}", f"--workdir={workdir}"]
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": programs,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    began = time.perf_counter()
    with subprocess.Popen(
        [*command, *ONE_STEP], env=environment, stdout=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if line.startswith("step 1/1"))
        seconds = time.perf_counter() - began
        # What follows the first step is not measured.
        run.kill()
    return seconds


# --- saving --------------------------------------------------------------------------------------


def saves() -> dict[str, float]:
    """Times of steps, of saves between them, and of the writing beside the steps after a save."""
    trainer = _trainer()
    state, context_length = trainer.fresh_state()

    def step(number: int) -> float:
        nonlocal state
        began = time.perf_counter()
        state, values = trainer.step(state, context_length, trainer.batch(number))
        jax.block_until_ready(values)
        return time.perf_counter() - began

    # The first step compiles.
    step(0)
    save_s: list[float] = []
    steps_s: list[list[float]] = []
    with tempfile.TemporaryDirectory() as folder, checkpoint.Checkpointer(folder) as checkpoints:
        for number in range(1, SAVES * BETWEEN, BETWEEN):
            # What a save says besides the arrays is a part of what the loop waits for.
            began = time.perf_counter()
            meta = trainer.meta(state, context_length)
            checkpoints.save(number, state.params, state.optimizer, state.cache, meta)
            save_s.append(time.perf_counter() - began)
            steps_s.append([step(number + i) for i in range(BETWEEN)])
    return summary(save_s, steps_s)


def _trainer() -> train.Trainer:
    """The demo's trainer, as the command makes it."""
    c = config.load(DEMO)
    # The size of the vocabulary is known when the text is prepared.
    dataset = data.prepare(c.dataset.name)
    c = config.with_vocabulary(c, dataset.vocabulary.size, dataset.name)
    return train.Trainer(c, dataset)


def summary(save_s: list[float], steps_s: list[list[float]]) -> dict[str, float]:
    """What saves cost.

    Args:
      save_s: seconds that each save kept the loop from its next step.
      steps_s: seconds of the `BETWEEN` steps after each save.
    """
    # By the second half of the steps all is written.
    quiet_s = [seconds for steps in steps_s for seconds in steps[BETWEEN // 2 :]]
    # Medians, since a step now and then waits for something else on the machine.
    step = statistics.median(quiet_s)
    save = statistics.median(save_s)
    writing = statistics.median(sum(steps) for steps in steps_s) - BETWEEN * step
    return {
        "step_s": step,
        "save_s": save,
        "save_share": save / step,
        "writing_s": writing,
        "writing_share": writing / step,
        "step_after_save_s": statistics.median(steps[0] for steps in steps_s),
    }


def main() -> None:
    """Measure both, and print them as JSON."""
    # As the command does, before JAX is first used.
    sharding.use_cores_for(config.load(DEMO))
    measures: list[Any] = [starts, saves]
    for measure in measures:
        row = {"benchmark": f"overhead.{measure.__name__}", **measure(), **provenance()}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
