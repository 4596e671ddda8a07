"""What the training loop writes down: metrics, evaluations on dev, rows of the logs.

Metrics are read one step late. To read those of the step that the device is computing would make
the host wait for it, and the device would then wait for the host to hand over the next step:

    host      hand over n | read n - 1 | hand over n + 1 | read n
    device                | compute n                    | compute n + 1
"""

import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from allattn.attention import best_here
from allattn.errors import NotANumberError
from allattn.model import ModelConfig, Params, forward_flops
from allattn.train import metrics
from allattn.train.logs import Logs
from allattn.train.progress import RunProgress
from allattn.train.spikes import Spikes

# Steps that `train.profile` watches.
PROFILED_STEPS = 3
# Metrics that must be numbers, and what a message calls them. The loss alone would show a gradient
# that spoils the parameters one step too late, when a checkpoint may hold them.
WATCHED = {"nll": "loss", "gradient_norm": "gradient"}
# Scores on dev that are logged, where there are any.
DEV_SCORES = ("nll", "bpc", "ppl", "ppl_words")


class Recorder:
    """Turns the metrics of the steps into rows of the logs and lines on the screen.

    Args:
      config: the whole configuration.
      workdir: folder or bucket URL of the logs; it exists.
      model: geometry of the network, for its FLOPs.
      devices: how many compute.
      words: symbols are words, so scores are perplexities; False: bits per byte.
      bytes_per_token: of the training text.
      evaluate: from parameters and `stop` to the scores on dev.
      spikes: what counts as a leap of the loss.
      first_step: updates made before this start.
      total_steps: updates of the whole run.
      start_message: first line on the screen.
    """

    def __init__(
        self,
        config: ml_collections.ConfigDict,
        workdir: str,
        *,
        model: ModelConfig,
        devices: int,
        words: bool,
        bytes_per_token: float,
        evaluate: Callable[[Params, Callable[[], bool]], dict[str, float]],
        spikes: Spikes,
        first_step: int,
        total_steps: int,
        start_message: str,
    ) -> None:
        self._config = config
        self._workdir = workdir
        self._model = model
        self._devices = devices
        self._bytes_per_token = bytes_per_token
        self._evaluate = evaluate
        self._spikes = spikes
        self._start_message = start_message

        # Where rows and lines go.
        self._logs = Logs(workdir, first_step)
        unit = "ppl" if words else "bpc"
        self._progress = RunProgress(total_steps, unit=unit)
        self._profiling = False

        # Metrics still on the device, and the sum of those read since the last row.
        self._pending: tuple[int, metrics.TrainMetrics] | None = None
        self._sum: metrics.TrainMetrics | None = None
        self._dev: dict[str, float] = {}

        # The step that was read last, the step of the last row, and when that was.
        self._step = first_step
        self._logged_step = first_step
        self._logged_time = time.perf_counter()

    def __enter__(self) -> "Recorder":
        self._progress.__enter__()
        self._progress.message(self._start_message)
        return self

    def __exit__(self, *error: Any) -> None:
        # The screen is given back whatever happens to the logs, as on a full disk.
        try:
            self._stop_profile()
            # What was read before an end of any kind is in the logs.
            self.log_rest()
            self._logs.close()
        finally:
            self._progress.__exit__(*error)

    def record(self, step: int, values: metrics.TrainMetrics) -> None:
        """Take the metrics of a step and read those of the step before.

        Raises:
          SpikeError: as `flush`.
        """
        self.flush()
        self._pending = (step, values)

        # The first steps compile, so the user names a later one to watch.
        profile = self._config.train.profile
        if step == profile:
            self._start_profile()
        elif step == profile + PROFILED_STEPS:
            self._stop_profile()

    def _start_profile(self) -> None:
        """Let TensorBoard's profiler watch process 0; what it sees goes into the workdir."""
        if not jax.process_index():
            jax.profiler.start_trace(self._workdir)
            self._profiling = True

    def _stop_profile(self) -> None:
        if self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False

    def flush(self) -> None:
        """Read the metrics that are still on the device.

        Raises:
          NotANumberError: the loss or the gradient of that step is not a number.
          SpikeError: the loss leapt.
        """
        if self._pending is None:
            return
        step, on_device = self._pending
        self._pending = None

        # All of them in one transfer.
        step_metrics = jax.device_get(on_device)
        values = step_metrics.compute()
        for name, description in WATCHED.items():
            if not math.isfinite(float(values[name])):
                raise NotANumberError(f"the {description} of step {step} is not a number", step)
        self._spikes.check(step, float(values["nll"]))
        self._step = step

        # A row tells of all steps since the last one.
        if self._sum is None:
            self._sum = step_metrics
        else:
            self._sum = self._sum.merge(step_metrics)
        if step % self._config.train.log_every == 0:
            self.log_rest()

    def log_return(self) -> None:
        """Write down that the run went back before a leap of its loss."""
        self._logs.write_scalars(self._step, self._spikes.described())

    def log_rest(self) -> None:
        """Write a row of the steps that were read since the last one, if there are any."""
        if self._sum is None:
            return
        step = self._step
        train = self._config.train
        now = time.perf_counter()
        values = self._sum.compute()

        # A training step computes three times what a forward pass does: gradients of states and of
        # parameters cost one each.
        tokens = (step - self._logged_step) * train.batch * train.block
        forward = forward_flops(self._model, float(values["mean_reach"]), train.block)
        row = metrics.summarise(
            values,
            seconds=max(now - self._logged_time, 1e-9),
            tokens=tokens,
            flops=3 * tokens * forward,
            peak_flops=train.peak_flops * self._devices,
            bytes_per_token=self._bytes_per_token,
        )
        self._logs.write_scalars(step, row)
        self._progress.update(step, {**row, **self._dev})

        self._sum = None
        self._logged_step = step
        self._logged_time = now

    def evaluate(self, params: Params, stop: Callable[[], bool]) -> dict[str, float]:
        """Score dev and log it; the time this takes does not count as training.

        Args:
          params: to score, on the mesh.
          stop: asked before every block whether to stop there.

        Returns:
          The scores.

        Raises:
          PreemptedError: it was stopped.
        """
        begin = time.perf_counter()
        scores = self._evaluate(params, stop)
        # Shown beside every training score from now on, until the next evaluation.
        self._dev = {f"dev_{name}": scores[name] for name in DEV_SCORES if name in scores}
        self._logs.write_scalars(self._step, self._dev)

        # The line on the screen.
        score = f"{scores['bpc']:.4f} bpc"
        if "ppl_words" in scores:
            score = f"{scores['ppl']:.6g} ppl"
        protocol = self._config.evaluate.protocol
        self._progress.message(
            f"step {self._step}: dev {score}, {protocol}, {scores['tokens']} tokens"
        )

        # As if the interval had begun that much later.
        self._logged_time += time.perf_counter() - begin
        return scores


def describe_start(model: ModelConfig, mesh: Mesh, parameters: int, step: int) -> str:
    """Where a run is computed, by what, and from which step on."""
    processes = _count(jax.process_count(), "process", "es")
    devices = _count(mesh.size, f"{jax.devices()[0].device_kind} device", "s")
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    implementation = model.implementation or best_here(jnp.dtype(model.dtype))
    begin = f"resumes at step {step}" if step else "from step 0"
    return (
        f"{processes}, {devices} (mesh {axes}), {implementation}, "
        f"{parameters:,} parameters; {begin}"
    )


def _count(number: int, noun: str, plural_ending: str) -> str:
    """A number and its noun, such as "2 processes"."""
    ending = plural_ending if number > 1 else ""
    return f"{number} {noun}{ending}"
