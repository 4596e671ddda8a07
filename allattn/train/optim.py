"""Learning-rate schedule and the update rules of the papers, as Optax transformations.

The equations stand in docs/method.md, "Optimizers". Optax's own Adagrad and clipping are not used
because the papers' differ: their clip scales the step of each tensor, while the sums take the
gradient as it was, and their epsilons stand elsewhere. The recorded trajectories of
tests/train/test_train.py hold these rules to the authors' numbers.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from allattn.config_checks import check_optimizer
from allattn.model.parameters import parameter_name
from allattn.train.muon import matrices_by_muon

Array = jax.Array

# What the authors add to a norm or a root before they divide by it.
ADAGRAD_EPSILON = 1e-10
CLIP_EPSILON = 1e-6


def schedule(config: ml_collections.ConfigDict, base: float | None = None) -> optax.Schedule:
    """Learning rate: a linear warm-up, then constant or a cosine, then fine-tuning at a tenth.

    rate(n) = base min(1, n / warmup) for update n = count + 1. With schedule "cosine" it also falls
    as (1 + cos(pi count / steps)) / 2 over train.steps; with a cooldown as
    min(1, (steps - count) / (cooldown steps)), linearly over the last of them. After train.steps,
    in the fine-tune stage, it is base / 10, whatever it fell to before.

    Args:
      config: the whole configuration.
      base: the rate after the warm-up; None: optimizer.learning_rate.

    Returns:
      Function from the number of updates made so far (int32) to the rate of the next one.

    Raises:
      UserError: unknown schedule or name.
    """
    check_optimizer(config)
    falls = config.optimizer.schedule == "cosine"
    if base is None:
        base = config.optimizer.learning_rate
    warmup = config.optimizer.warmup
    steps = config.train.steps
    cooldown = config.optimizer.cooldown * steps

    def rate(count: Array) -> Array:
        # The warm-up begins at base / warmup, not at 0.
        warm = base * jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        if falls:
            warm *= (1 + jnp.cos(jnp.pi * count / steps)) / 2
        # The last update of train.steps still has the rate base / cooldown.
        if cooldown:
            warm *= jnp.minimum(1.0, (steps - count) / cooldown)
        return jnp.where(count < steps, warm, base / 10)

    return rate


class AdagradState(NamedTuple):
    """Updates so far, and the sum of squared gradients of every parameter."""

    # The names are keys of every checkpoint, and `made` of the table of shardings.
    made: Array
    sums: optax.Updates


def paper_adagrad(learning_rate: optax.Schedule, clip: float) -> optax.GradientTransformation:
    """Adagrad whose clip scales the step of each tensor while the sums take the unclipped squares.

        step  = rate min(1, clip / (|g| + 1e-10))
        sums += g g
        p    -= step g / (sqrt(sums) + 1e-10)

    The norm |g| is that of one layer's tensor: leaves under "layers" are stacked over layers, so
    their norms are taken per slice of the first axis.

    Args:
      learning_rate: schedule.
      clip: largest norm of a tensor's gradient that gets the full rate; 0: no clipping.
    """

    def init(params: optax.Params) -> AdagradState:
        return AdagradState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params))

    def clip_factor(path: tuple, gradient: Array) -> Array:
        """min(1, clip / norm) of a tensor, or of each layer's slice of it."""
        # A factor of 1 instead of none keeps one form of the update.
        if not clip:
            return jnp.ones((), gradient.dtype)
        # The first axis of what lies under "layers" counts layers, and is left out of the norm.
        stacked = any(getattr(key, "key", None) == "layers" for key in path)
        first_axis = 1 if stacked else 0
        axes = tuple(range(first_axis, gradient.ndim))
        norm = jnp.sqrt(jnp.sum(jnp.square(gradient), axis=axes, keepdims=True))
        return jnp.where(norm > clip, clip / (norm + ADAGRAD_EPSILON), 1)

    def update(gradients: optax.Updates, state: AdagradState, params: optax.Params | None = None):
        del params  # the rule does not depend on them

        # The sums take the whole gradient, whatever the clip makes of the step.
        rate = learning_rate(state.made)
        sums = jax.tree.map(lambda s, g: s + g * g, state.sums, gradients)

        def tensor_update(path: tuple, g: Array, s: Array) -> Array:
            step = -rate * clip_factor(path, g)
            return (step * g / (jnp.sqrt(s) + ADAGRAD_EPSILON)).astype(g.dtype)

        updates = jax.tree_util.tree_map_with_path(tensor_update, gradients, sums)
        return updates, AdagradState(state.made + 1, sums)

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Clipping of the papers' Adam runs: g min(1, largest / (|g| + 1e-6)), |g| over all tensors.

    Args:
      largest: norm of all gradients together above which they are scaled down.
    """

    def update(
        gradients: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ):
        del params  # the rule does not depend on them
        # The norm may be wider than a gradient, which keeps its dtype.
        norm = optax.tree.norm(gradients)
        factor = jnp.minimum(1.0, largest / (norm + CLIP_EPSILON))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), gradients), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def factors_by_name(factors: Mapping[str, float]) -> optax.GradientTransformation:
    """Updates of some parameters times a factor, which gives them a rate of their own.

    Args:
      factors: by the last part of a parameter's name, such as "span" of "layers/span"; the others
        are left as they are.
    """

    def update(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params  # the factors do not depend on them

        def scaled(path: tuple, x: Array) -> Array:
            return x * factors.get(parameter_name(path).rpartition("/")[2], 1)

        return jax.tree_util.tree_map_with_path(scaled, updates)

    return optax.stateless(update)


def optimizer(
    config: ml_collections.ConfigDict, mesh: Mesh | None = None, rate_factor: float = 1.0
) -> optax.GradientTransformation:
    """The transformation that `config.optimizer` names.

    To add one: a branch in `_rule`, its name in `OPTIMIZER_RULES` of config_checks.py, and its
    fields in configs/base.py and `FIELDS`. Its counters need a row in sharding/rules.py; its
    moments do not.

    Args:
      config: the whole configuration.
      mesh: devices that the parameters are spread over; None: one.
      rate_factor: share of the configuration's rates, of a run whose loss leapt.

    Raises:
      UserError: unknown name.
    """
    c = config.optimizer
    rule = _rule(config, mesh, rate_factor)
    # Keys of pairs and spans may have rates of their own. Without any the state has no place for
    # them, as it had none in older checkpoints.
    factors = {"persistent_key": c.pairs_rate, "span": c.span_rate}
    if all(factor == 1 for factor in factors.values()):
        return rule
    return optax.chain(rule, factors_by_name(factors))


def _rule(
    config: ml_collections.ConfigDict, mesh: Mesh | None, rate_factor: float
) -> optax.GradientTransformation:
    """The update rule, the same for all parameters of a kind."""
    c = config.optimizer
    rate = schedule(config, rate_factor * c.learning_rate)
    # The rule of the adaptive-span and all-attention papers, which clips by itself.
    if c.name == "adagrad":
        return paper_adagrad(rate, c.clip)

    # One clip over all tensors, as the papers' Adam runs have it.
    clip = clip_by_global_norm(c.clip) if c.clip else optax.identity()
    if c.name == "adam":
        return optax.chain(clip, optax.adam(rate))
    if c.name == "adamw":
        return optax.chain(clip, optax.adamw(rate, weight_decay=c.weight_decay))

    # Parameters that are no matrices have AdamW, at a rate of their own if one is named.
    adam_rate = schedule(config, rate_factor * (c.adam_rate or c.learning_rate))
    return optax.chain(clip, matrices_by_muon(rate, adam_rate, c.weight_decay, mesh))
