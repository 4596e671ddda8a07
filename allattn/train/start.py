"""Where a run starts from: its own newest checkpoint, or the parameters of another run."""

import itertools
import logging
from typing import Any

import jax

from allattn.attention import dropout
from allattn.config import changed_fields, from_json
from allattn.config_checks import MAY_CHANGE_ON_RESUMING
from allattn.data import Dataset, Vocabulary
from allattn.errors import UserError
from allattn.model import Params
from allattn.model.parameters import check_spans
from allattn.storage import checkpoint
from allattn.train import growth
from allattn.train.program import TrainProgram
from allattn.train.state import TrainState
from allattn.train.trainer import Trainer

# Begin the names of fields that may differ where parameters alone are restored.
# model.span.epsilon is the papers': a run of our own may leave it out.
FREE_WITHOUT_TRAINING_STATE = ("optimizer.", "train.", "seed", "model.span.epsilon")


def restore(
    trainer: Trainer, checkpoints: checkpoint.Checkpointer
) -> tuple[TrainState, int] | None:
    """The state of the newest readable checkpoint and its context length; None in a new workdir.

    Everything that gives the numbers their meaning must be as it was: the configuration, and the
    symbols that the rows of the embedding stand for. Other text in these symbols is a choice, and
    another mask of dropout comes with a version: a line tells either.

    Args:
      trainer: of the run.
      checkpoints: of its workdir.

    Raises:
      UserError: the workdir was made with another configuration or vocabulary, or none of its
        checkpoints can be read.
    """

    def abstract(meta: dict[str, Any]) -> tuple[Any, Any, Any]:
        """What to expect in a checkpoint, after a look at what it says of itself."""
        free: tuple[str, ...] = MAY_CHANGE_ON_RESUMING
        if meta.get("params_only"):
            free += FREE_WITHOUT_TRAINING_STATE
        changed = changed_fields(from_json(meta["config"]), trainer.config, free)
        if changed:
            raise UserError(
                f"{checkpoints.workdir} was made with another configuration: "
                f"{'; '.join(changed)}. Choose another --workdir, or go back to that configuration"
            )
        difference = _first_difference(meta, trainer.dataset, ("in the workdir", "now"))
        if difference:
            raise UserError(
                f"{checkpoints.workdir} was made with another vocabulary: {difference}. "
                f"Choose another --workdir, or go back to that text"
            )
        # Parameters alone have no cache, and so no context length.
        state = trainer.abstract_state(meta.get("bucket", 1))
        return state.params, state.optimizer, state.cache

    # Refused or restored, a checkpoint is read on the shardings of this run's mesh.
    restored = checkpoints.restore_newest(abstract)
    if restored is None:
        trainer.recall_spikes({})
        return None

    # Parameters that were converted from another implementation start a run at step 0.
    params, optimizer, cache_XBSD, meta = restored
    check_spans(params, f"the checkpoint of step {meta['step']} in {checkpoints.workdir}")
    trainer.recall_spikes(meta)
    if meta.get("params_only"):
        return trainer.fresh_state(params)
    _check_text(meta, trainer, checkpoints.workdir)
    _tell_other_mask(meta, trainer, checkpoints.workdir)
    return trainer.restored_state((params, optimizer, cache_XBSD), meta)


def _first_difference(meta: dict[str, Any], dataset: Dataset, sides: tuple[str, str]) -> str:
    """Where a checkpoint's vocabulary is not that of the data; "" if it is the same."""
    vocabulary = Vocabulary.from_json(meta["vocabulary"])
    if vocabulary == dataset.vocabulary:
        return ""
    # The symbols first: they say more than how many there are.
    pairs = itertools.zip_longest(vocabulary.symbols, dataset.vocabulary.symbols)
    for number, (there, here) in enumerate(pairs):
        if there != here:
            return f"symbol {number} is {there!r:.40} {sides[0]}, {here!r:.40} {sides[1]}"
    # Whatever else belongs to it, such as the unit.
    before = vocabulary.to_json()
    after = dataset.vocabulary.to_json()
    name = next(name for name in after if before.get(name) != after[name])
    return f"{name}: {before.get(name)!r:.40} {sides[0]}, {after[name]!r:.40} {sides[1]}"


def _check_text(meta: dict[str, Any], trainer: Trainer, workdir: str) -> None:
    """Say that a run goes on with other text than it was trained on.

    Raises:
      UserError: there is nothing to train any more, and the scores would be of the other text.
    """
    # The name of own text is made from its contents; older checkpoints do not have it.
    now = trainer.dataset.full_name
    before = meta.get("dataset", now)
    if before == now:
        return
    train = trainer.config.train
    total = train.steps + train.finetune_steps
    if meta["step"] >= total:
        raise UserError(
            f"{workdir} is complete, {meta['step']} of {total} steps: expected its text, {before}, "
            f"found {now}; raise train.steps to go on with that, or choose another --workdir"
        )
    if not jax.process_index():
        print(
            f"other text than this run was trained on so far, in the same symbols: {before} "
            f"before, {now} from now on",
            flush=True,
        )


def _tell_other_mask(meta: dict[str, Any], trainer: Trainer, workdir: str) -> None:
    """Say that the rest of a run drops other weights than the version that began it would have."""
    # Checkpoints of the first generation do not have it.
    before = meta.get("dropout_mask", 1)
    now = dropout.GENERATION
    train = trainer.config.train
    complete = meta["step"] >= train.steps + train.finetune_steps
    if before == now or complete or not trainer.model.config.drops or jax.process_index():
        return
    logging.warning(
        "%s: dropout's mask was of generation %d until step %d, and is of generation %d from now "
        "on: the same distribution, other draws",
        workdir,
        before,
        meta["step"],
        now,
    )


def warm_start(program: TrainProgram, dataset: Dataset) -> Params | None:
    """The newest parameters of the run that `train.init_from` names; None if it names none.

    Args:
      program: of this run.
      dataset: of this run, whose vocabulary the other run must have had.

    Raises:
      UserError: no checkpoint there, or one of another model or vocabulary.
    """
    source = program.config.train.init_from
    if not source:
        return None
    with checkpoint.Checkpointer(source, create=False) as checkpoints:
        step = checkpoints.resolve()
        meta = checkpoints.restore_meta(step)
        with checkpoints.parsing(step):
            other_model = from_json(meta["config"]).model

        # The shapes of the parameters, and what each row of the embedding stands for, must agree;
        # pairs may be added.
        growth.check_models(other_model, program.config.model, source)
        difference = _first_difference(meta, dataset, ("there", "here"))
        if difference:
            raise UserError(
                f"train.init_from: {source}: expected the vocabulary of {dataset.name}, "
                f"found another: {difference}"
            )

        # Parameters are the same for every context length.
        wanted = program
        if growth.grows(other_model, program.config.model):
            wanted = TrainProgram(growth.pairs_of(program.config, other_model), program.mesh)
        params = checkpoints.restore_params(wanted.abstract_state(1).params)
    check_spans(params, f"train.init_from: {source}")
    if wanted is not program or program.config.train.grown_share:
        params = program.grown(params)
    return params
