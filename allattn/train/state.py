"""The arrays that a run carries from one step to the next.

Dimension key: X layer, B batch, S cached position, D model width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_collections
import optax

from allattn.model import Model, Params
from allattn.train.context import next_context_length

Array = jax.Array


# A pytree whose leaves keep these names, which sharding.RULES matches.
@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "optimizer", "cache", "key"),
    meta_fields=(),
)
@dataclasses.dataclass
class TrainState:
    """Everything that a step reads and writes."""

    # Updates so far, int32.
    step: Array
    params: Params
    optimizer: optax.OptState
    # cache_XBSD: earlier inputs of every layer, oldest first.
    cache: Array
    # Random key of the run; the step's own key is folded from it.
    key: Array


def initial_state(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    context_length: int,
) -> TrainState:
    """The state of step 0.

    Args:
      model: the network.
      optimizer: from `optim.optimizer`.
      config: the whole configuration; its seed decides every random number of the run.
      context_length: cached positions that the heads may look at.

    Returns:
      Fresh parameters and optimizer state, and a cache of zero states that already has room for
      the next context length, so that a context that grows finds real states there.
    """
    key = jax.random.key(config.seed)
    params = model.init(key)

    room = next_context_length(context_length, config.model.span.limit)
    cache_XBSD = model.empty_cache(config.train.batch, room)

    # Dropout must not draw the numbers that the parameters were drawn from.
    run_key = jax.random.key_data(jax.random.fold_in(key, 1))
    step = jnp.zeros((), jnp.int32)
    return TrainState(step, params, optimizer.init(params), cache_XBSD, run_key)
