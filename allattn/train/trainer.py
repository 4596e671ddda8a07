"""The pieces of one run: its data, its step, its evaluation; loop.py drives them."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import ml_collections
import numpy as np

from allattn import data, sharding
from allattn.attention import dropout
from allattn.config_checks import check_training
from allattn.errors import NotANumberError
from allattn.evaluation import protocols, scoring
from allattn.model import Params
from allattn.storage import checkpoint
from allattn.train import optim
from allattn.train.context import choose_context_length, grow_cache
from allattn.train.memory import check_fits
from allattn.train.metrics import TrainMetrics
from allattn.train.program import TrainProgram
from allattn.train.spikes import Spikes
from allattn.train.state import TrainState


class Trainer(TrainProgram):
    """The pieces of one run, made from its configuration; `train_and_evaluate` drives them.

    Args:
      config: the whole configuration, with the size of the vocabulary.
      dataset: what it trains and is scored on.

    Raises:
      UserError: configuration, data and devices do not fit each other.
    """

    def __init__(self, config: ml_collections.ConfigDict, dataset: data.Dataset):
        check(config)
        super().__init__(config, sharding.make_mesh(config))
        self.dataset = dataset
        train = config.train

        # Every process reads the rows of its own devices.
        self.rows = sharding.Rows(self.mesh, train.batch)
        self.stream = data.Stream(
            dataset.tokens("train"), train.batch, train.block, config.seed, self.rows.local
        )
        # Compiled steps by context length, and the leaps of the loss that decide their rate.
        self._steps: dict[int, Callable] = {}
        self.spikes = Spikes(train.restore_on_spike)

        # Refuse at once what would fail at the first step or at the first evaluation: arrays that
        # the mesh does not divide or that no memory holds, and splits too short for the protocol.
        state = self.abstract_state(choose_context_length(config, config.model.span.init))
        check_fits(config, self.mesh, state)
        for split in ("valid", "test"):
            tokens = len(self._scored_tokens(split))
            message_start = f"{dataset.name}, split {split}: "
            protocols.check_length(config.evaluate.protocol, tokens, train.block, message_start)

    # --- a step

    def batch(self, step: int) -> data.Batch:
        """The block of a step, on the mesh."""
        # This process reads its rows, which become its part of the global arrays.
        block = self.stream.block(step)
        inputs_BT = self.rows.place(block.inputs_BT)
        targets_BT = self.rows.place(block.targets_BT)
        return data.Batch(inputs_BT, targets_BT, block.before)

    def step(
        self, state: TrainState, context_length: int, batch: data.Batch
    ) -> tuple[TrainState, TrainMetrics]:
        """One update, by the code compiled for this context length."""
        if context_length not in self._steps:
            self._steps[context_length] = self.jitted_step(context_length)
        return self._steps[context_length](state, batch)

    def go_on_slower(self, spike_step: int, restored_step: int) -> None:
        """Train with smaller rates from now on, as the run went back before a leap of its loss.

        Args:
          spike_step: whose loss leapt.
          restored_step: that the run went back to.
        """
        self.spikes.go_on_slower(spike_step, restored_step)
        self._take_rates()

    def recall_spikes(self, meta: Mapping[str, Any]) -> None:
        """Train with the rates that a checkpoint was trained with.

        Args:
          meta: of the checkpoint; empty for a new run.
        """
        self.spikes.recall(meta)
        self._take_rates()

    def _take_rates(self) -> None:
        """Make the update rule anew; the steps that are compiled have the rates of before."""
        self.optimizer = optim.optimizer(self.config, self.mesh, self.spikes.rate_factor)
        self._steps.clear()

    def grow(self, state: TrainState, context_length: int) -> tuple[TrainState, int]:
        """Choose the context length again from the spans, and make room in the cache if it grew.

        Raises:
          NotANumberError: a span is not a number.
        """
        if not self.config.model.span.adaptive:
            return state, context_length

        # A NaN would compare as shorter than everything and go unseen.
        longest = float(jnp.max(state.params["layers"]["span"]))
        if not math.isfinite(longest):
            step = int(state.step)
            raise NotANumberError(f"a span of step {step} is not a number", step)
        chosen = choose_context_length(self.config, longest, context_length)
        if chosen > context_length:
            cache_XBSD = grow_cache(state.cache, chosen, self.config.model.span.limit)
            state = dataclasses.replace(state, cache=cache_XBSD)
        return state, chosen

    # --- evaluations and checkpoints

    def evaluate(self, params: Params, split: str, stop: Callable[[], bool]) -> dict[str, float]:
        """Score a split as `config.evaluate` says.

        Args:
          params: on the mesh.
          split: valid or test.
          stop: asked before every block whether to stop there.

        Returns:
          As `scoring.evaluate_tokens`.

        Raises:
          PreemptedError: it was stopped.
        """
        return scoring.evaluate_tokens(
            self.model,
            params,
            self._scored_tokens(split),
            protocol=self.config.evaluate.protocol,
            mesh=self.mesh,
            vocabulary=self.dataset.vocabulary,
            bytes_per_token=self.dataset.bytes_per_token(split),
            stop=stop,
            **protocols.options(self.config),
        )

    def _scored_tokens(self, split: str) -> data.TokenSource:
        """A split as it is scored: of dev perhaps only the beginning, of test always all."""
        # A source and not an array: tokens are read as they are scored.
        tokens: data.TokenSource = self.dataset.tokens(split)
        most = self.config.evaluate.max_tokens
        if split == "valid" and most:
            return tokens[:most]
        return tokens

    def meta(self, state: TrainState, context_length: int) -> dict[str, Any]:
        """What a checkpoint says besides its arrays; `restored_state` reads it."""
        vocabulary = self.dataset.vocabulary.to_json()
        meta = checkpoint.describe(int(state.step), self.config, vocabulary)
        meta["dataset"] = self.dataset.full_name
        meta["key"] = np.asarray(state.key).tolist()
        # The name of the context length in every checkpoint so far.
        meta["bucket"] = context_length
        # Another version may draw other masks, which a run that goes on with it says.
        meta["dropout_mask"] = dropout.GENERATION
        return meta | self.spikes.to_meta()


def check(config: ml_collections.ConfigDict) -> None:
    """Refuse what cannot run, before anything is written.

    Raises:
      UserError: names the field, what was expected and what was found.
    """
    check_training(config)
    protocols.check_protocol(config.evaluate.protocol, config.model.layer, "evaluate.")
