"""Leaps of the loss: what counts as one, and what a run that went back before one remembers.

With `train.restore_on_spike` a run whose loss leaps goes back to the last good checkpoint and on at
half the rate, once. Every process decides the same, since all read the same loss, and a run that is
resumed as well, since checkpoints keep what this file holds.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from allattn.errors import SpikeError

# A run that went back goes on at this share of every rate.
SLOWER = 0.5


@dataclasses.dataclass
class Spikes:
    """What a run knows of leaps of its loss."""

    # Nats above the lowest loss of a step so far that count as a leap; 0: none is looked for.
    threshold: float
    lowest_nll: float = math.inf
    # Share of the configuration's rates; below 1, the run has gone back.
    rate_factor: float = 1.0
    # The step whose loss leapt, and the one that the run went back to.
    spike_step: int = 0
    restored_step: int = 0

    @property
    def may_go_back(self) -> bool:
        """Whether the next leap takes the run back; otherwise it ends the run."""
        return self.threshold > 0 and not self.went_back

    @property
    def went_back(self) -> bool:
        """Whether the run has gone back."""
        return self.rate_factor < 1

    def check(self, step: int, nll: float) -> None:
        """Compare the loss of a step with the lowest so far.

        Args:
          step: updates made with it.
          nll: mean over its tokens, in nats; a number.

        Raises:
          SpikeError: it leapt.
        """
        if not self.threshold:
            return
        # Not the last loss but the lowest: a leap may take several steps.
        if nll - self.lowest_nll > self.threshold:
            raise SpikeError(
                f"the loss of step {step} leapt to {nll:.4g} nats: expected at most "
                f"{self.threshold:g} above the lowest, {self.lowest_nll:.4g}",
                step,
            )
        self.lowest_nll = min(self.lowest_nll, nll)

    def go_on_slower(self, spike_step: int, restored_step: int) -> None:
        """Remember that the run went back, and halve its rates."""
        self.rate_factor = SLOWER
        self.spike_step = spike_step
        self.restored_step = restored_step

    def described(self) -> dict[str, float]:
        """What became of the run, for its log and its scores; nothing if no loss leapt."""
        if not self.went_back:
            return {}
        return {
            "spike_step": self.spike_step,
            "restored_step": self.restored_step,
            "rate_factor": self.rate_factor,
        }

    def to_meta(self) -> dict[str, Any]:
        """What a checkpoint keeps; nothing where no leap is looked for and none was."""
        kept: dict[str, Any] = self.described()
        # JSON has no word for infinity, which it is before the first step.
        if self.threshold and math.isfinite(self.lowest_nll):
            kept["lowest_nll"] = self.lowest_nll
        return {"spikes": kept} if kept else {}

    def recall(self, meta: Mapping[str, Any]) -> None:
        """Take what a checkpoint kept; of nothing kept, what a new run begins with.

        Args:
          meta: of the checkpoint; empty for a new run.
        """
        # All of it is replaced, as the run is now where that checkpoint was.
        kept = meta.get("spikes", {})
        self.lowest_nll = float(kept.get("lowest_nll", math.inf))
        self.rate_factor = float(kept.get("rate_factor", 1.0))
        self.spike_step = int(kept.get("spike_step", 0))
        self.restored_step = int(kept.get("restored_step", 0))
