"""Where a run starts from: its own newest checkpoint, or the parameters of another run."""

from typing import Any

from allattn.config import changed_fields, from_json
from allattn.config_checks import MAY_CHANGE_ON_RESUMING, MAY_CHANGE_ON_WARM_START
from allattn.data import Dataset
from allattn.errors import UserError
from allattn.model import Params
from allattn.model.parameters import check_spans
from allattn.storage import checkpoint
from allattn.train.program import TrainProgram
from allattn.train.state import TrainState

# Begin the names of fields that may differ where parameters alone are restored.
FREE_WITHOUT_TRAINING_STATE = ("optimizer.", "train.", "seed")


def restore(
    program: TrainProgram, checkpoints: checkpoint.Checkpointer
) -> tuple[TrainState, int] | None:
    """The state of the newest readable checkpoint and its context length; None in a new workdir.

    Args:
      program: of the run.
      checkpoints: of its workdir.

    Raises:
      UserError: the workdir was made with another configuration, or none of its checkpoints can be
        read.
    """

    def abstract(meta: dict[str, Any]) -> tuple[Any, Any, Any]:
        """What to expect in a checkpoint, after a look at what it says of itself."""
        free: tuple[str, ...] = MAY_CHANGE_ON_RESUMING
        if meta.get("params_only"):
            free += FREE_WITHOUT_TRAINING_STATE
        changed = changed_fields(from_json(meta["config"]), program.config, free)
        if changed:
            raise UserError(
                f"{checkpoints.workdir} was made with another configuration: "
                f"{'; '.join(changed)}. Choose another --workdir, or go back to that configuration"
            )
        # Parameters alone have no cache, and so no context length.
        state = program.abstract_state(meta.get("bucket", 1))
        return state.params, state.optimizer, state.cache

    # Refused or restored, a checkpoint is read on the shardings of this run's mesh.
    restored = checkpoints.restore_newest(abstract)
    if restored is None:
        return None

    # Parameters that were converted from another implementation start a run at step 0.
    params, optimizer, cache_XBSD, meta = restored
    check_spans(params, f"the checkpoint of step {meta['step']} in {checkpoints.workdir}")
    if meta.get("params_only"):
        return program.fresh_state(params)
    return program.restored_state((params, optimizer, cache_XBSD), meta)


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
        meta = checkpoints.restore_meta()
        other_model = from_json(meta["config"]).model

        # The shapes of the parameters, and what each row of the embedding stands for, must agree.
        changed = changed_fields(
            other_model, program.config.model, MAY_CHANGE_ON_WARM_START, ("there", "here")
        )
        if changed:
            raise UserError(
                f"train.init_from: {source}: expected the model of this configuration, "
                f"found {'; '.join(changed)}"
            )
        if meta["vocabulary"] != dataset.vocabulary.to_json():
            raise UserError(
                f"train.init_from: {source}: expected the vocabulary of {dataset.name}, "
                f"found another"
            )

        # Parameters are the same for every context length.
        params = checkpoints.restore_params(program.abstract_state(1).params)
    check_spans(params, f"train.init_from: {source}")
    return params
