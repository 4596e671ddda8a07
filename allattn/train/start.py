"""Where a run starts from: its own newest checkpoint, or the parameters of another run."""

from typing import TYPE_CHECKING, Any

from allattn.config import changed_fields, from_json
from allattn.config_checks import MAY_CHANGE_ON_RESUMING, MAY_CHANGE_ON_WARM_START
from allattn.errors import UserError
from allattn.model import Params
from allattn.storage import checkpoint

if TYPE_CHECKING:
    from allattn.train import Trainer, TrainState


def restore(
    trainer: "Trainer", checkpoints: checkpoint.Checkpointer
) -> "tuple[TrainState, int] | None":
    """The state of the newest readable checkpoint and its bucket; None in a new workdir.

    Raises:
      UserError: the workdir was made with another configuration, or none of its checkpoints can be
        read.
    """

    def abstract(meta: dict[str, Any]) -> tuple[Any, Any, Any]:
        free = MAY_CHANGE_ON_RESUMING
        if meta.get("params_only"):
            free = (*free, "optimizer.", "train.", "seed")
        changed = changed_fields(from_json(meta["config"]), trainer.config, free)
        if changed:
            raise UserError(
                f"{checkpoints.workdir} was made with another configuration: {'; '.join(changed)}. Choose another "
                f"--workdir, or go back to that configuration"
            )
        state = trainer.abstract_state(meta.get("bucket", 1))
        return state.params, state.optimizer, state.cache

    restored = checkpoints.restore_newest(abstract)
    if restored is None:
        return None
    *arrays, meta = restored
    return (
        trainer.fresh_state(arrays[0])
        if meta.get("params_only")
        else trainer.restored_state(tuple(arrays), meta)
    )


def warm_start(trainer: "Trainer") -> Params | None:
    """The newest parameters of the run that `train.init_from` names; None if it names none.

    Raises:
      UserError: no checkpoint there, or one of another model or vocabulary.
    """
    source = trainer.config.train.init_from
    if not source:
        return None
    with checkpoint.Checkpointer(source, create=False) as checkpoints:
        meta, place = checkpoints.restore_meta(), f"train.init_from: {source}"
        models = from_json(meta["config"]).model, trainer.config.model
        changed = changed_fields(*models, MAY_CHANGE_ON_WARM_START, ("there", "here"))
        if changed:
            raise UserError(
                f"{place}: expected the model of this configuration, found {'; '.join(changed)}"
            )
        if meta["vocabulary"] != trainer.dataset.vocabulary.to_json():
            raise UserError(
                f"{place}: expected the vocabulary of {trainer.dataset.name}, found another"
            )
        return checkpoints.restore_params(trainer.abstract_state(1).params)
