"""A run from its start to its scores, and the loop between."""

import contextlib
from typing import Any

import jax
import ml_collections
from etils import epath

from allattn import data
from allattn.config import changed_fields, from_json, to_json, with_vocabulary
from allattn.errors import PreemptedError, RunError, SpikeError
from allattn.evaluation import scores as reported
from allattn.model import Params
from allattn.model.parameters import parameter_count
from allattn.sharding import processes
from allattn.storage import checkpoint, paths
from allattn.train import start
from allattn.train.recorder import Recorder, describe_start
from allattn.train.spikes import SLOWER
from allattn.train.state import TrainState
from allattn.train.trainer import Trainer


def train_and_evaluate(
    config: ml_collections.ConfigDict, workdir: str, force: bool = False
) -> dict[str, Any]:
    """Train, or resume from the workdir's newest checkpoint, then score the test split.

    Args:
      config: the whole configuration (configs/base.py).
      workdir: folder or bucket URL of the run; at the end it holds the scores as scores.json as
        well.
      force: take the workdir over from the run that holds its lock.

    Returns:
      The scores of the test split (`scoring.evaluate_tokens`), with split, protocol and step.

    Raises:
      UserError: the configuration does not fit the data, the devices or the workdir, or differs
        between processes; another run holds the workdir.
      RunError: the loss is not a number, or leapt, and train.restore_on_spike does not help.
      PreemptedError: SIGTERM or SIGHUP came, as before a machine is taken away; the state is saved.
      StoppedByKeyboard: Ctrl-C, a KeyboardInterrupt; the state is saved.
    """
    # The order of a start. Do not change it:
    # 1. check configuration, data and devices, the same on all processes, before anything is
    #    written into the workdir
    # 2. if the workdir has a checkpoint, check that it was made with this configuration
    # 3. restore the state and the context length from it, or make a fresh state, with other
    #    parameters if init_from says so
    # 4. the stream needs only the step: nothing else is restored
    processes.require_same_text("configuration", to_json(config), _differences)
    has_begun = checkpoint.has_begun(workdir)

    def make_trainer() -> Trainer:
        dataset = data.prepare_configured(config)
        return Trainer(with_vocabulary(config, dataset.vocabulary.size, dataset.name), dataset)

    trainer = processes.require_same_result(
        "data set", make_trainer, lambda trainer: trainer.dataset.full_name
    )

    # A mistake in init_from is refused here, before there is a workdir. A run that has begun reads
    # it only if it turns out to have no checkpoint.
    initial = None
    if not has_begun:
        initial = start.warm_start(trainer, trainer.dataset)

    with processes.Preemption() as preemption:
        with checkpoint.Checkpointer(workdir, config.checkpoint.keep, force=force) as checkpoints:
            state = _train(trainer, checkpoints, initial, workdir, preemption)
        scores = {"split": "test", "protocol": config.evaluate.protocol, "step": int(state.step)}
        scores |= trainer.evaluate(state.params, "test", preemption)
    _keep_scores(trainer, state, workdir, scores)
    return scores


def _train(
    trainer: Trainer,
    checkpoints: checkpoint.Checkpointer,
    initial: Params | None,
    workdir: str,
    preemption: processes.Preemption,
) -> TrainState:
    """The loop, from where the run is; once more from a good checkpoint if the loss leapt.

    Raises:
      RunError: the loss leapt, or is not a number, and the run may not go back.
    """
    # Twice at most: a second leap ends the run.
    spike_step = None
    while True:
        # What a checkpoint says of its rates comes first, then what this start knows.
        state, context_length = _first_state(trainer, checkpoints, initial)
        if spike_step is not None:
            trainer.go_on_slower(spike_step, int(state.step))
        # The loop gives its arrays away: a second start reads those of init_from again.
        initial = None
        try:
            return _run(trainer, checkpoints, state, context_length, workdir, preemption)
        except SpikeError as error:
            _go_back(trainer, checkpoints, error)
            spike_step = error.step


def _first_state(
    trainer: Trainer, checkpoints: checkpoint.Checkpointer, initial: Params | None
) -> tuple[TrainState, int]:
    """The state of the newest checkpoint, or of a new run, and its context length."""
    restored = start.restore(trainer, checkpoints)
    if restored is None:
        initial = initial or start.warm_start(trainer, trainer.dataset)
        restored = trainer.fresh_state(initial)
    return restored


def _go_back(trainer: Trainer, checkpoints: checkpoint.Checkpointer, error: SpikeError) -> None:
    """Leave a checkpoint from before a leap as the newest, or end the run.

    Raises:
      RunError: the run does not go back, has done so before, or has no good checkpoint left.
    """
    spikes = trainer.spikes
    # The loss of a step is that of the parameters before it, which only a later loss can clear.
    # The checkpoint of step 0 comes from elsewhere.
    suspect = max(error.step - 1, 1)
    steps = checkpoints.steps()
    good = [step for step in steps if step < suspect]

    # A run that has saved nothing yet begins anew; one that has is not to lose all of it.
    if not spikes.may_go_back or (steps and not good):
        before = ""
        if spikes.went_back:
            before = f"; the run had gone back once, before the leap of step {spikes.spike_step}"
        raise RunError(f"{error}{before}; {_left(good)}") from error

    # Orbax writes no step at or before its newest, and this run is about to write them again.
    if not jax.process_index():
        print(f"{error}: going back to before it, and on at {SLOWER} of the rate", flush=True)
    checkpoints.set_aside_from(suspect)


def _left(good: list[int]) -> str:
    """What a run that failed has left."""
    if not good:
        return "there is no checkpoint from before"
    return f"the last good checkpoint is that of step {good[-1]}"


def _differences(leader: str, own: str) -> str:
    """Fields in which two processes differ; only where their data lie may do so."""
    changed = changed_fields(
        from_json(leader), from_json(own), ("dataset.data_dir",), ("on process 0", "there")
    )
    return "; ".join(changed)


def _run(
    trainer: Trainer,
    checkpoints: checkpoint.Checkpointer,
    state: TrainState,
    context_length: int,
    workdir: str,
    preemption: processes.Preemption,
) -> TrainState:
    """The loop. Metrics are read one step late, so that nothing waits for the device."""
    c = trainer.config
    first = int(state.step)
    total = c.train.steps + c.train.finetune_steps
    # A stop may have left a step without the evaluation that belongs to it.
    is_due = first > 0 and _evaluates(c, first) and checkpoints.score(first) is None
    if first >= total and not is_due:
        if not jax.process_index():
            print(f"{workdir} is complete: {first} of {total} steps", flush=True)
        return state

    with _recorder(trainer, workdir, total, state) as recorder:
        # The row stands where the run went back to, before those that it writes again.
        if trainer.spikes.went_back and trainer.spikes.restored_step == first:
            recorder.log_return()
        if is_due:
            dev_nll = _dev_score(recorder, state, preemption)
            if dev_nll is not None:
                checkpoints.add_score(first, dev_nll)
        # A signal since the start: there is nothing to save yet.
        if preemption():
            raise PreemptedError(f"stopped at step {first}", "run again to resume")

        for step in range(first, total):
            # Once in a while: is the context still long enough for the spans?
            if step % c.model.span.check_every == 0:
                recorder.flush()  # refuses spans that are not numbers
                state, context_length = trainer.grow(state, context_length)

            # The update. The device computes it while the metrics of the last one are read.
            state, values = trainer.step(state, context_length, trainer.batch(step))
            done = step + 1
            recorder.record(done, values)

            # Most steps end here.
            evaluates = _evaluates(c, done)
            if not (preemption() or evaluates or done % c.checkpoint.every == 0):
                continue
            recorder.flush()  # refuses a loss that is not a number, before it reaches a checkpoint
            if done == total or preemption.reached:
                recorder.log_rest()

            # A stop leaves time for a checkpoint only; the evaluation is made after resuming.
            dev_nll = None
            if evaluates:
                dev_nll = _dev_score(recorder, state, preemption)
            arrays = (state.params, state.optimizer, state.cache)
            checkpoints.save(done, *arrays, trainer.meta(state, context_length), dev_nll)
            if preemption.reached:
                raise PreemptedError(f"stopped at step {done}", "run again to resume")
    return state


def _evaluates(config: ml_collections.ConfigDict, step: int) -> bool:
    """Whether an evaluation on dev belongs to a step."""
    total = config.train.steps + config.train.finetune_steps
    return step % config.evaluate.every == 0 or step == total


def _dev_score(
    recorder: Recorder, state: TrainState, preemption: processes.Preemption
) -> float | None:
    """The score on dev in nats; None: the run is to stop."""
    if preemption.reached:
        return None
    with contextlib.suppress(PreemptedError):
        return recorder.evaluate(state.params, preemption)["nll"]
    return None


def _recorder(trainer: Trainer, workdir: str, total: int, state: TrainState) -> Recorder:
    """What writes the logs of this run."""
    config = trainer.model.config
    step = int(state.step)
    return Recorder(
        trainer.config,
        workdir,
        model=config,
        devices=trainer.mesh.size,
        words=trainer.dataset.vocabulary.unit == "word",
        bytes_per_token=trainer.dataset.bytes_per_token("train"),
        evaluate=lambda params, stop: trainer.evaluate(params, "valid", stop),
        spikes=trainer.spikes,
        first_step=step,
        total_steps=total,
        start_message=describe_start(config, trainer.mesh, parameter_count(state.params), step),
    )


def _keep_scores(trainer: Trainer, state: TrainState, workdir: str, scores: dict[str, Any]) -> None:
    """Leave the scores in the workdir, with what a comparison of runs needs besides."""
    train = trainer.config.train
    size = {
        "parameters": parameter_count(state.params),
        "trained_tokens": int(state.step) * train.batch * train.block,
    }
    told = trainer.spikes.described()
    text = reported.to_json({**scores, **size, **told}) + "\n"

    # A run that is complete leaves the file as it is when it is started again.
    path = epath.Path(workdir) / "scores.json"
    if jax.process_index():
        return
    if told:
        print(
            f"the loss leapt at step {told['spike_step']}: the run went back to step "
            f"{told['restored_step']}, and on at {told['rate_factor']} of the rate",
            flush=True,
        )
    with paths.reached(path):
        is_there = path.exists() and path.read_bytes() == text.encode()
    if not is_there:
        with paths.written(path):
            paths.replace(path, text)
