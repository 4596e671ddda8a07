"""One training run: its state, its step and the loop around it."""

from allattn.train.trainer import (
    Trainer,
    TrainProgram,
    TrainState,
    check,
    choose_bucket,
    grow_cache,
    make_train_step,
    measure,
    next_bucket,
    train_and_evaluate,
)

__all__ = [
    "TrainProgram",
    "TrainState",
    "Trainer",
    "check",
    "choose_bucket",
    "grow_cache",
    "make_train_step",
    "measure",
    "next_bucket",
    "train_and_evaluate",
]
