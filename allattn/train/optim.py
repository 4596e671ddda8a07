"""Learning-rate schedule and the update rules of the papers, as Optax transformations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

from allattn.config_checks import check_optimizer

Array = jax.Array


def schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """Rate of update n = count + 1: base min(1, n / warmup), a tenth of base in the fine-tune stage.

    With schedule "cosine", the rate also falls as (1 + cos(pi count / steps)) / 2 over train.steps.

    Args:
      config: the whole configuration.

    Returns:
      Function from the number of updates made so far (int32) to the rate of the next one.

    Raises:
      UserError: unknown schedule or name.
    """
    check_optimizer(config)
    falls = config.optimizer.schedule == "cosine"
    base, warmup, steps = (
        config.optimizer.learning_rate,
        config.optimizer.warmup,
        config.train.steps,
    )

    def rate(count: Array) -> Array:
        warm = base * jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        if falls:
            warm *= (1 + jnp.cos(jnp.pi * count / steps)) / 2
        return jnp.where(count < steps, warm, base / 10)

    return rate


class AdagradState(NamedTuple):
    """Updates made so far, and the sum of squared gradients of every parameter."""

    made: Array
    sums: optax.Updates


def paper_adagrad(learning_rate: optax.Schedule, clip: float) -> optax.GradientTransformation:
    """Adagrad whose clip scales the step of each tensor while the sums take the unclipped squares.

    step = rate min(1, clip / (|g| + 1e-10)); sums += g g; p -= step g / (sqrt(sums) + 1e-10)
    (../golden conventions, "Update rules"). The norm |g| is that of one layer's tensor: leaves
    under "layers" are stacked over layers, so theirs is taken per slice of the leading axis.

    Args:
      learning_rate: schedule.
      clip: largest norm of a tensor's gradient that gets the full rate; 0: no clipping.
    """

    def init(params: optax.Params) -> AdagradState:
        return AdagradState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def scale(path: tuple, gradient: Array) -> Array:
        if not clip:
            return jnp.ones((), gradient.dtype)
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        axes = tuple(range(int(stacked), gradient.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=axes, keepdims=True))
        return jnp.where(norm > clip, clip / (norm + 1e-10), 1)

    def update(gradients: optax.Updates, state: AdagradState, params: optax.Params | None = None):
        del params
        rate = learning_rate(state.made)
        sums = jax.tree.map(lambda s, g: s + g * g, state.sums, gradients)
        updates = jax.tree_util.tree_map_with_path(
            lambda path, g, s: (-rate * scale(path, g) * g / (jnp.sqrt(s) + 1e-10)).astype(g.dtype),
            gradients,
            sums,
        )
        return updates, AdagradState(state.made + 1, sums)

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """g min(1, largest / (|g| + 1e-6)) over all tensors, the rule under which the papers' Adam runs were made."""

    def update(
        gradients: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ):
        del params
        factor = jnp.minimum(1.0, largest / (optax.tree.norm(gradients) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """The transformation that `config.optimizer` names.

    Raises:
      UserError: unknown name.
    """
    c, rate = config.optimizer, schedule(config)
    if c.name == "adagrad":
        return paper_adagrad(rate, c.clip)
    clip = clip_by_global_norm(c.clip) if c.clip else optax.identity()
    if c.name == "adam":
        return optax.chain(clip, optax.adam(rate))
    return optax.chain(clip, optax.adamw(rate, weight_decay=c.weight_decay))
