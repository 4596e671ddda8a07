"""What the training loop writes down: metrics read one step late, evaluations on dev, rows of the logs."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from allattn.attention import best_here
from allattn.errors import RunError
from allattn.model import Params, forward_flops
from allattn.train import metrics

if TYPE_CHECKING:
    from allattn.train import Trainer, TrainState

WATCHED = 3  # steps


class Recorder:
    """Turns the metrics of the steps into rows of the logs and lines on the screen."""

    def __init__(self, trainer: "Trainer", workdir: str, total: int, state: "TrainState") -> None:
        self._trainer, self._config = trainer, trainer.config
        self._workdir, self._watching = workdir, False
        self._writer = metrics.create_writer(workdir)
        self._progress = metrics.RunProgress(
            total, unit="ppl" if trainer.dataset.vocabulary.unit == "word" else "bpc"
        )
        self._pending: tuple[int, metrics.TrainMetrics] | None = None
        self._sum: metrics.TrainMetrics | None = None
        self._start = _start(trainer, state)
        self._step = self._logged = int(state.step)
        self._time = time.perf_counter()
        self._dev: dict[str, float] = {}

    def __enter__(self) -> "Recorder":
        self._progress.__enter__()
        self._progress.message(self._start)
        return self

    def __exit__(self, *error: Any) -> None:
        self._watch(stop=True)
        self._writer.flush()
        self._progress.__exit__(*error)

    def record(self, step: int, values: metrics.TrainMetrics) -> None:
        """Take the metrics of a step and read those of the step before."""
        self.flush()
        self._pending = (step, values)
        self._watch(
            stop=step == self._config.train.profile + WATCHED,
            start=step == self._config.train.profile,
        )

    def _watch(self, stop: bool, start: bool = False) -> None:
        """Let TensorBoard's profiler begin or end to watch process 0; what it saw goes into the workdir."""
        start = start and not jax.process_index()
        if start:
            jax.profiler.start_trace(self._workdir)
        elif stop and self._watching:
            jax.profiler.stop_trace()
        self._watching = start or (self._watching and not stop)

    def flush(self) -> None:
        """Read the metrics that are still on the device.

        Raises:
          RunError: the loss or the gradient of that step is not a number.
        """
        if self._pending is None:
            return
        (step, values), self._pending = self._pending, None
        self._step = step
        values = jax.device_get(values)
        found = values.compute()
        for what, name in (
            ("loss", "nll"),
            ("gradient", "gradient_norm"),
        ):  # a gradient spoils the parameters first
            if not math.isfinite(float(found[name])):
                raise RunError(
                    f"the {what} of step {step} is not a number; the last good checkpoint is kept"
                )
        self._sum = values if self._sum is None else self._sum.merge(values)
        if step % self._config.train.log_every == 0:
            self._log(step)

    def _log(self, step: int) -> None:
        assert self._sum is not None
        now, steps, train = time.perf_counter(), step - self._logged, self._config.train
        found, tokens = self._sum.compute(), steps * train.batch * train.block
        flops = (
            3
            * tokens
            * forward_flops(self._trainer.model.config, float(found["mean_reach"]), train.block)
        )
        peak = train.peak_flops * self._trainer.mesh.size
        row = metrics.summarise(found, max(now - self._time, 1e-9), tokens, flops, peak)
        self._writer.write_scalars(step, row)
        self._progress.update(step, {**row, **self._dev})
        self._sum, self._logged, self._time = None, step, now

    def evaluate(self, params: Params, stop: Callable[[], bool]) -> dict[str, float]:
        """Score dev and log it, unless `stop` says to stop there; the time this takes is not counted as training."""
        began, step = time.perf_counter(), self._step
        scores = self._trainer.evaluate(params, "valid", stop)
        self._dev = {
            f"dev_{name}": scores[name]
            for name in ("nll", "bpc", "ppl", "ppl_words")
            if name in scores
        }
        self._writer.write_scalars(step, self._dev)
        protocol = self._config.evaluate.protocol
        score = f"{scores['ppl']:.6g} ppl" if "ppl_words" in scores else f"{scores['bpc']:.4f} bpc"
        self._progress.message(f"step {step}: dev {score}, {protocol}, {scores['tokens']} tokens")
        self._time += time.perf_counter() - began
        return scores


def _start(trainer: "Trainer", state: "TrainState") -> str:
    """Where a run is computed, by what, and from which step on."""

    def several(number: int, what: str, ending: str) -> str:
        return f"{number} {what}{ending if number > 1 else ''}"

    model, step, mesh = trainer.model.config, int(state.step), trainer.mesh
    devices = several(mesh.size, f"{jax.devices()[0].device_kind} device", "s")
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    place = f"{several(jax.process_count(), 'process', 'es')}, {devices} (mesh {sizes})"
    implementation = model.implementation or best_here(jnp.dtype(model.dtype))
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    begins = f"goes on at step {step}" if step else "from step 0"
    return f"{place}, {implementation}, {parameters:,} parameters; {begins}"
