"""One training step, a pure function of options, state and batch.

Read `train_step` first: the functions below it are its steps, in their order. What varies with the
configuration lies behind them: accumulation in accumulation.py, update rules in optim.py, the mesh
in sharding/.

Do not change the order of operations without need: equal order is what lets two versions of this
file be compared as text (`make same-program`).

Dimension key: X layer, B batch, T position in the block, S cached position, H head, D model width.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from allattn import sharding
from allattn.attention import tuning
from allattn.data import Batch
from allattn.model import Model, Params
from allattn.train.accumulation import BatchRows, RowOutputs, mean_gradients
from allattn.train.metrics import TrainMetrics
from allattn.train.state import TrainState

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What a step is compiled for; none of it is traced."""

    model: Model
    optimizer: optax.GradientTransformation
    # The whole configuration.
    config: ml_collections.ConfigDict
    # Cached positions that the heads may look at.
    context_length: int
    # The operation, or the operation over a mesh.
    attention: Callable[..., Any]
    # Devices that rows are spread over; None: one.
    mesh: Mesh | None = None


def train_step(
    options: StepOptions, state: TrainState, batch: Batch
) -> tuple[TrainState, TrainMetrics]:
    """One update; returns the next state and what was measured on the way."""
    # What the pass over the rows depends on besides the parameters: earlier states, and dropout.
    cache_XBSD = cache_at_start_of_text(state.cache, batch.before)
    seeds_X = dropout_seeds(options.model, state)

    # Forward and backward, in parts where the whole batch would not fit in memory.
    rows = BatchRows(cache_XBSD, batch.inputs_BT, batch.targets_BT)
    gradient_fn = functools.partial(gradients_of_rows, options, seeds_X, batch.before)
    parts = options.config.train.accumulation
    shards = sharding.row_shards(options.mesh) if options.mesh else 1
    gradients, outputs = mean_gradients(gradient_fn, state.params, rows, parts, shards)

    # The papers' update rule; the spans stay in [0, 1].
    updates, optimizer_state = options.optimizer.update(gradients, state.optimizer, state.params)
    params = clip_spans(options.config, optax.apply_updates(state.params, updates))
    params = keep_removed(options.config, params, state.params)

    # The block becomes the newest part of the cache.
    cache_XBSD = shift_cache(cache_XBSD, outputs.new_XBTD)
    next_state = TrainState(state.step + 1, params, optimizer_state, cache_XBSD, state.key)
    return next_state, measure(options.config, params, gradients, outputs, batch.inputs_BT.size)


def keep_removed(config: ml_collections.ConfigDict, params: Params, before: Params) -> Params:
    """Pairs that an offset of -inf removes stay so: of it no decay and no average is a number."""
    if not config.model.persistent_bias:
        return params
    old_XHN = before["layers"]["persistent_bias"]
    new_XHN = params["layers"]["persistent_bias"]
    bias_XHN = jnp.where(jnp.isneginf(old_XHN), old_XHN, new_XHN)
    return {**params, "layers": {**params["layers"], "persistent_bias": bias_XHN}}


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    context_length: int,
    attention: Callable[..., Any],
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, TrainMetrics]]:
    """`train_step` with its options bound, to be jitted.

    Args:
      model: the network.
      optimizer: from `optim.optimizer`.
      config: the whole configuration.
      context_length: cached positions that the heads may look at; static.
      attention: the operation, or the operation over a mesh.
      mesh: devices that rows are spread over, each of which takes its share of every accumulated
        part; None: one.

    Returns:
      Function (state, batch) -> (state, metrics).
    """
    # A partial and not a closure: a traced program is called by the name of its function.
    options = StepOptions(model, optimizer, config, context_length, attention, mesh)
    return functools.partial(train_step, options)


# --- the steps of a step, in their order ---------------------------------------------------------


def cache_at_start_of_text(cache_XBSD: Array, before: Array) -> Array:
    """Zero states where no token of this pass over the text came before the block."""
    # A loop of one round or none: nothing is written where the cache stays as it is.
    begins = (before == 0).astype(jnp.int32)
    return jax.lax.fori_loop(
        0, begins, lambda _, cache_XBSD: jnp.zeros_like(cache_XBSD), cache_XBSD
    )


def dropout_seeds(model: Model, state: TrainState) -> Array | None:
    """Seeds of this step, uint32 (depth + 2,): layers, embedding, final state; None: no dropout."""
    if not model.config.drops:
        return None
    # Folded from the step, so that a run that resumes drops what it would have dropped.
    step_key = jax.random.fold_in(state.key, state.step)
    return jax.random.bits(step_key, (model.config.depth + 2,), jnp.uint32)


def gradients_of_rows(
    options: StepOptions,
    seeds_X: Array | None,
    before: Array,
    params: Params,
    rows: BatchRows,
    row_B: Array,
) -> tuple[Params, RowOutputs]:
    """Gradients of the loss of some rows, and their outputs."""
    # The cache also holds states beyond the context, in reserve for when it grows.
    reserve = max(0, rows.cache_XBSD.shape[2] - options.context_length)
    visible = rows._replace(cache_XBSD=rows.cache_XBSD[:, :, reserve:])

    loss_of_params = functools.partial(
        loss, options=options, rows=visible, row_B=row_B, seeds_X=seeds_X, before=before
    )
    gradients, outputs = jax.grad(loss_of_params, has_aux=True)(params)
    return gradients, outputs


def loss(
    params: Params,
    options: StepOptions,
    rows: BatchRows,
    row_B: Array,
    seeds_X: Array | None,
    before: Array,
) -> tuple[Array, RowOutputs]:
    """Mean negative log-likelihood of some rows in nats, plus the penalty on long spans.

    Args:
      params: of the network.
      options: of the step.
      rows: inputs, targets and the cache within the context.
      row_B: index of every row in the whole batch, int32.
      seeds_X: from `dropout_seeds`.
      before: tokens of this pass before the block, int32.
    """
    # The network on its parameters; tables that every row looks up are gathered once.
    mesh = options.mesh
    platform, _ = tuning.device()
    network = options.model.bind(sharding.gather_tables(mesh, params))
    forward = network.train_forward(
        rows.inputs_BT,
        rows.cache_XBSD,
        seeds_X,
        row_B,
        options.attention,
        before,
        recomputation(options.config, options.context_length, platform),
    )

    # What is minimised: the loss of every token, and the spans.
    nll_BT = sharding.nll_over(mesh)(network.io, forward.hidden_BTD, rows.targets_BT)
    penalty = span_penalty(options.config, params)

    # Means by row only: what remains is averaged once in a step, over all parts and devices.
    nll_B = nll_BT.mean(1)
    mass_B = forward.mass_XBH.mean((0, 2))
    mean_loss = nll_BT.mean() + penalty
    return mean_loss, RowOutputs(nll_B, mass_B, jax.lax.stop_gradient(forward.new))


def recomputation(config: ml_collections.ConfigDict, context_length: int, platform: str) -> str:
    """What the backward pass computes again, of `train.remat`'s choices.

    On a TPU at least the projections: to keep keys and values of the context in every layer, and to
    fetch them, takes longer than to project what the layer reaches. With a feed-forward sublayer,
    which would be computed again as well, that pays for contexts longer than the block.

    Args:
      config: the whole configuration.
      context_length: in tokens.
      platform: of the devices, such as `tpu`.
    """
    remat = config.train.remat
    pays = not config.model.feed_forward or context_length > config.train.block
    if platform == "tpu" and pays:
        return remat or "projections"
    return remat


def span_penalty(config: ml_collections.ConfigDict, params: Params) -> Array | float:
    """Coefficient x limit x mean over heads of the span, summed over layers ("Adaptive span")."""
    span = config.model.span
    if not span.adaptive:
        return 0.0
    return span.loss * span.limit * params["layers"]["span"].mean(1).sum()


def clip_spans(config: ml_collections.ConfigDict, params: Params) -> Params:
    """The parameters with every learned span in [0, 1], as a share of the limit."""
    if not config.model.span.adaptive:
        return params
    span_XH = jnp.clip(params["layers"]["span"], 0, 1)
    return {**params, "layers": {**params["layers"], "span": span_XH}}


def shift_cache(cache_XBSD: Array, new_XBTD: Array) -> Array:
    """Append a block's states and drop as many of the oldest.

    before   | a b c d e f |         S = 6, T = 2
    after    | c d e f G H |
    """
    X, B, S, D = cache_XBSD.shape
    T = new_XBTD.shape[2]
    if S <= T:
        return new_XBTD[:, :, T - S :]

    # What stays moves layer by layer, so that the donated cache is written in place.
    def move(x: Array, cache_XBSD: Array) -> Array:
        kept_XBSD = jax.lax.dynamic_slice(cache_XBSD, (x, 0, T, 0), (1, B, S - T, D))
        # It is read as a whole before it is put where its source lies.
        kept_XBSD = jax.lax.optimization_barrier(kept_XBSD)
        return jax.lax.dynamic_update_slice(cache_XBSD, kept_XBSD, (x, 0, 0, 0))

    cache_XBSD = jax.lax.fori_loop(0, X, move, cache_XBSD)
    return jax.lax.dynamic_update_slice_in_dim(cache_XBSD, new_XBTD, S - T, 2)


def measure(
    config: ml_collections.ConfigDict,
    params: Params,
    gradients: Params,
    outputs: RowOutputs,
    tokens: int,
) -> TrainMetrics:
    """Metrics of a step.

    Args:
      config: the whole configuration.
      params: after the update.
      gradients: means over the batch, before clipping.
      outputs: of all rows.
      tokens: read by the step.

    Returns:
      Spans and the mean reach, which the FLOP count needs, in tokens; nll in nats.
    """
    # Rows have equal length and parts equal size, so a mean of means is the mean.
    nll = jnp.mean(outputs.nll_B)
    mass = jnp.mean(outputs.mass_B)
    gradient_norm = optax.tree.norm(gradients)

    # Without learned spans every head reaches the limit.
    span = config.model.span
    span_XH = jnp.full((1, 1), float(span.limit))
    reach_XH = span_XH
    if span.adaptive:
        span_XH = params["layers"]["span"] * span.limit
        reach_XH = jnp.minimum(span_XH + span.ramp, span.limit)
    return TrainMetrics.single_from_model_output(
        nll=nll,
        tokens=tokens,
        gradient_norm=gradient_norm,
        mean_span=span_XH.mean(),
        max_span=span_XH.max(),
        mean_reach=reach_XH.mean(),
        persistent_mass=mass,
    )
