"""Bits per symbol and perplexity: one number, the mean negative log-likelihood, in other units."""

import math

# exp of little more than this is beyond a float64. The loss of a run that diverges may be.
LARGEST_NLL = 700.0


def metrics_of(nll: float) -> dict[str, float]:
    """A mean negative log-likelihood in the three units in which the papers report it.

    Args:
      nll: mean over symbols, in nats.

    Returns:
      nll as it is, bpc = nll / log 2 (bits per symbol) and ppl = exp(nll).
    """
    return {"nll": nll, "bpc": nll / math.log(2), "ppl": perplexity(nll)}


def perplexity(nll: float) -> float:
    """exp of a mean negative log-likelihood in nats, at most exp(700)."""
    return math.exp(min(nll, LARGEST_NLL))
