"""The metrics of a training step, and the row that is logged of several."""

from collections.abc import Mapping
from typing import Any

import flax
from clu import metrics as clu_metrics

from allattn.evaluation.scores import metrics_of


# clu's collections are dataclasses of flax: only under this decorator is a subclass a pytree, which
# a jitted step can return. It is the one use of flax outside model/.
@flax.struct.dataclass
class TrainMetrics(clu_metrics.Collection):
    """Metrics of one or several steps, merged; spans and reach in tokens, nll in nats."""

    # First, since `jsonl.read_jsonl` tells the kinds of rows apart by their first name.
    nll: clu_metrics.Average.from_output("nll")  # type: ignore[valid-type]
    gradient_norm: clu_metrics.LastValue.from_output("gradient_norm")  # type: ignore[valid-type]
    # Learned spans, and the mean of min(limit, span + ramp), which the FLOP count needs.
    mean_span: clu_metrics.LastValue.from_output("mean_span")  # type: ignore[valid-type]
    max_span: clu_metrics.LastValue.from_output("max_span")  # type: ignore[valid-type]
    mean_reach: clu_metrics.LastValue.from_output("mean_reach")  # type: ignore[valid-type]
    # Mean share of the attention weight on persistent pairs.
    persistent_mass: clu_metrics.Average.from_output("persistent_mass")  # type: ignore[valid-type]


def summarise(
    values: Mapping[str, Any],
    seconds: float,
    tokens: int,
    flops: float = 0.0,
    peak_flops: float = 0.0,
    bytes_per_token: float = 1.0,
) -> dict[str, float]:
    """The numbers of an interval as they are logged.

    Args:
      values: from `TrainMetrics.compute()`.
      seconds: length of the interval.
      tokens: tokens read in it.
      flops: required FLOPs of it.
      peak_flops: FLOP/s that all devices together could do; 0: unknown.
      bytes_per_token: of the training text; only bpc depends on it.

    Returns:
      The values and bpc, ppl, tokens_per_s, and mfu (model FLOP/s utilisation) if the peak is
      known.
    """
    row = {name: float(value) for name, value in values.items()}
    row |= metrics_of(row["nll"], bytes_per_token)
    row["tokens_per_s"] = tokens / seconds
    if peak_flops:
        row["mfu"] = flops / seconds / peak_flops
    return row
