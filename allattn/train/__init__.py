"""One training run: its state, its step and the loop around it.

Where to begin: `step.train_step` is one update on one screen, `loop.train_and_evaluate` a run from
its start to its scores. The rest, in the order in which a run needs it:

    state.py program.py      the arrays of a run, and what builds them and the step on a mesh
    memory.py                whether it fits in memory
    start.py                 from which checkpoint a run starts
    context.py               how far back the heads look, and when that grows
    accumulation.py optim.py gradients of a batch in parts, and the papers' update rules
    muon.py                  the update rule that knows matrices, and the table of them
    trainer.py               the pieces of a run: data, step, evaluation
    spikes.py                when a run goes back before a leap of its loss
    recorder.py metrics.py   what is measured, and what the logs and the screen show of it
    logs.py event_files.py jsonl.py progress.py   the writers
"""

from allattn.train.context import (
    choose_context_length,
    grow_cache,
    next_context_length,
)
from allattn.train.loop import train_and_evaluate
from allattn.train.program import TrainProgram
from allattn.train.state import TrainState
from allattn.train.step import StepOptions, make_train_step, measure, recomputation, train_step
from allattn.train.trainer import Trainer, check

__all__ = [
    "StepOptions",
    "TrainProgram",
    "TrainState",
    "Trainer",
    "check",
    "choose_context_length",
    "grow_cache",
    "make_train_step",
    "measure",
    "next_context_length",
    "recomputation",
    "train_and_evaluate",
    "train_step",
]
