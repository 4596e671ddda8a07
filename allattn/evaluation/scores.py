"""Bits per byte and perplexity: one number, the mean negative log-likelihood, in other units.

Scores of a network whose numbers have run away may be NaN or infinite. JSON has no word for either,
so they are written as null, and what reports them says so and fails.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

from allattn.errors import RunError

# exp of little more than this is beyond a float64. The loss of a run that diverges may be.
LARGEST_NLL = 700.0


def metrics_of(nll: float, bytes_per_token: float = 1.0) -> dict[str, float]:
    """A mean negative log-likelihood in the three units in which the papers report it.

    Args:
      nll: mean over tokens, in nats.
      bytes_per_token: of the text that is scored; 1 where tokens are bytes.

    Returns:
      nll as it is, ppl = exp(nll), and bpc = nll / log 2 / bytes_per_token (bits per byte), in
      which models with different tokens compare.
    """
    bits = nll / math.log(2)
    return {"nll": nll, "bpc": bits / bytes_per_token, "ppl": perplexity(nll)}


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats, at most exp(700)."""
    return math.exp(min(nll, LARGEST_NLL))


def to_json(scores: Mapping[str, Any]) -> str:
    """Scores as one line of JSON; a number that is NaN or infinite is null there."""
    # The order of the scores stays as it is.
    lost = dict.fromkeys(_not_finite(scores))
    return json.dumps({**scores, **lost}, allow_nan=False)


def require_finite(scores: Mapping[str, Any]) -> None:
    """Fail where a score is NaN or infinite.

    Raises:
      RunError: names the scores.
    """
    names = _not_finite(scores)
    if names:
        raise RunError(
            f"{', '.join(names)}: expected finite scores, found NaN or infinity (null above): "
            f"the parameters of step {scores.get('step')} give no probabilities"
        )


def _not_finite(scores: Mapping[str, Any]) -> list[str]:
    """Names of the scores that are NaN or infinite."""
    return [name for name, x in scores.items() if isinstance(x, float) and not math.isfinite(x)]
