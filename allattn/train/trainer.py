"""Training: one pure step, and the loop around it.

Dimension key: X layer, A part of an accumulated batch, B batch, T position in the block, S cached
position, H head, D model width.
"""

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from etils import epath
from jax.sharding import Mesh

from allattn import data, sharding
from allattn.config import changed_fields, from_json, to_json, with_vocabulary
from allattn.config_checks import check_training
from allattn.errors import PreemptedError, RunError
from allattn.evaluation import protocols, scoring
from allattn.model import Model, ModelConfig, Params
from allattn.sharding import processes
from allattn.storage import checkpoint
from allattn.train import metrics, optim, start
from allattn.train.recorder import Recorder

Array = jax.Array

SMALLEST_BUCKET = 128


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "params", "optimizer", "cache", "key"),
    meta_fields=(),
)
@dataclasses.dataclass
class TrainState:
    """Everything that a step reads and writes."""

    step: Array  # updates made, int32
    params: Params
    optimizer: optax.OptState
    cache: Array  # cache_XBSD: earlier inputs of every layer, oldest first
    key: Array  # random key of the run; the step's own is folded from it


# --- context buckets
# ---------------------------------------------------------------------------------------------


def next_bucket(bucket: int, limit: int) -> int:
    """The bucket after this one: twice as long, up to the limit."""
    return min(2 * bucket, limit)


def choose_bucket(config: ml_collections.ConfigDict, longest_span: float, current: int = 0) -> int:
    """The smallest of 128, 256, ..., limit that holds the longest reach and a margin; never below the current one."""
    span = config.model.span
    if not span.adaptive:
        return span.limit
    needed = min(span.limit, math.ceil(longest_span * span.limit) + span.ramp + span.margin)
    bucket = max(current, min(SMALLEST_BUCKET, span.limit))
    while bucket < needed:
        bucket = next_bucket(bucket, span.limit)
    return bucket


def grow_cache(cache_XBSD: Array, bucket: int, limit: int) -> Array:
    """Room for the bucket after this one, on the old side, so that the next growth meets real states."""
    missing = next_bucket(bucket, limit) - cache_XBSD.shape[2]
    return (
        jnp.pad(cache_XBSD, ((0, 0), (0, 0), (missing, 0), (0, 0))) if missing > 0 else cache_XBSD
    )


# --- the step
#
#
# ----------------------------------------------------------------------------------------------------


def make_train_step(
    model: Model,
    optimizer: optax.GradientTransformation,
    config: ml_collections.ConfigDict,
    bucket: int,
    attention: Callable[..., Any],
    mesh: Mesh | None = None,
) -> Callable[[TrainState, data.Batch], tuple[TrainState, metrics.TrainMetrics]]:
    """The pure step for one context bucket.

    Args:
      model: the network.
      optimizer: from `optim.optimizer`.
      config: the whole configuration.
      bucket: cached positions that the heads may look at; static.
      attention: the operation, or the operation over a mesh.
      mesh: devices that rows are spread over, each of which takes its share of every accumulated
        part; None: one.

    Returns:
      Function (state, batch) -> (state, metrics).
    """
    span, parts = config.model.span, config.train.accumulation
    shards, nll_of = sharding.row_shards(mesh) if mesh else 1, sharding.nll_over(mesh)

    def split(x_BX: Array, axis: int) -> Array:
        """Rows to (parts, rows of a part), each shard's rows staying where they are."""
        rows = x_BX.shape[axis] // (shards * parts)
        shape = (*x_BX.shape[:axis], shards, parts, rows, *x_BX.shape[axis + 1 :])
        x_AX = jnp.moveaxis(x_BX.reshape(shape), axis + 1, 0)
        return x_AX.reshape(parts, *x_BX.shape[:axis], shards * rows, *x_BX.shape[axis + 1 :])

    def join(x_AX: Array, axis: int) -> Array:
        rows = x_AX.shape[axis + 1] // shards
        shape = (parts, *x_AX.shape[1 : axis + 1], shards, rows, *x_AX.shape[axis + 2 :])
        x_BX = jnp.moveaxis(x_AX.reshape(shape), 0, axis + 1)
        return x_BX.reshape(
            *x_AX.shape[1 : axis + 1], parts * shards * rows, *x_AX.shape[axis + 2 :]
        )

    def loss(params: Params, cache_XBSD, inputs_BT, targets_BT, row_B, seeds_X, before):
        network = model.bind(sharding.gather_tables(mesh, params))
        forward = network.train_forward(
            inputs_BT, cache_XBSD, seeds_X, row_B, attention, before, config.train.remat
        )
        nll_BT = nll_of(network.io, forward.hidden_BTD, targets_BT)
        penalty = 0.0
        if span.adaptive:  # coefficient x limit x mean over heads of z, summed over layers
            penalty = span.loss * span.limit * params["layers"]["span"].mean(1).sum()
        measured = (
            nll_BT.mean(1),
            forward.mass_XBH.mean((0, 2)),
        )  # of rows, which are summed once in a step
        return nll_BT.mean() + penalty, (measured, jax.lax.stop_gradient(forward.new))

    def train_step(state: TrainState, batch: data.Batch) -> tuple[TrainState, metrics.TrainMetrics]:
        cache_XBSD = jnp.where(batch.before == 0, 0, state.cache).astype(state.cache.dtype)
        seeds_X = None
        if model.config.drops:
            step_key = jax.random.fold_in(state.key, state.step)
            seeds_X = jax.random.bits(step_key, (config.model.depth + 2,), jnp.uint32)

        def part(gradients: Params, taken: tuple) -> tuple[Params, tuple]:
            cache_part, *rows = taken
            visible_XBSD = cache_part[:, :, max(0, cache_part.shape[2] - bucket) :]
            arguments = (state.params, visible_XBSD, *rows, seeds_X, batch.before)
            (_, aux), new = jax.value_and_grad(loss, has_aux=True)(*arguments)
            return jax.tree.map(jnp.add, gradients, new), aux

        zeros = jax.tree.map(jnp.zeros_like, state.params)
        by_row = (batch.inputs_BT, batch.targets_BT, jnp.arange(batch.inputs_BT.shape[0]))
        if parts == 1:
            gradients, (measured, new_XBTD) = part(zeros, (cache_XBSD, *by_row))
        else:
            taken = (split(cache_XBSD, 1), *(split(x, 0) for x in by_row))
            gradients, (measured, new_AXBTD) = jax.lax.scan(part, zeros, taken)
            gradients = jax.tree.map(lambda g: g / parts, gradients)
            new_XBTD = join(new_AXBTD, 1)
        updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        if span.adaptive:
            params["layers"]["span"] = jnp.clip(params["layers"]["span"], 0, 1)
        cache_XBSD = jnp.concatenate([cache_XBSD, new_XBTD], axis=2)[:, :, new_XBTD.shape[2] :]
        state = TrainState(state.step + 1, params, optimizer_state, cache_XBSD, state.key)
        nll, mass = jax.tree.map(jnp.mean, measured)
        values = measure(
            config, params, nll, mass, optax.tree.norm(gradients), batch.inputs_BT.size
        )
        return state, values

    return train_step


def measure(
    config: ml_collections.ConfigDict, params: Params, nll, mass, norm, tokens: int
) -> metrics.TrainMetrics:
    """The step's metrics; spans and the mean reach (which the FLOP count needs) in tokens."""
    span = config.model.span
    tokens_XH = jnp.full((1, 1), float(span.limit))
    reach_XH = tokens_XH
    if span.adaptive:
        tokens_XH = params["layers"]["span"] * span.limit
        reach_XH = jnp.minimum(tokens_XH + span.ramp, span.limit)
    return metrics.TrainMetrics.single_from_model_output(
        nll=nll,
        tokens=tokens,
        gradient_norm=norm,
        mean_span=tokens_XH.mean(),
        max_span=tokens_XH.max(),
        mean_reach=reach_XH.mean(),
        persistent_mass=mass,
    )


# --- the loop
#
#
# ----------------------------------------------------------------------------------------------------


class TrainProgram:
    """What a configuration says of state and step, on a mesh; no data are read."""

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.model = Model(ModelConfig.from_config(config))
        self._abstract: dict[int, TrainState] = {}
        self.optimizer = optim.optimizer(config)

    def init_state(self, bucket: int) -> Callable[[], TrainState]:
        """Function that makes the state of step 0; it is only traced until it is jitted with its shardings."""
        train, limit = self.config.train, self.config.model.span.limit

        def init() -> TrainState:
            key = jax.random.key(self.config.seed)
            params = self.model.init(key)
            cache_XBSD = self.model.empty_cache(train.batch, next_bucket(bucket, limit))
            run_key = jax.random.key_data(jax.random.fold_in(key, 1))
            return TrainState(
                jnp.zeros((), jnp.int32), params, self.optimizer.init(params), cache_XBSD, run_key
            )

        return init

    def abstract_state(self, bucket: int) -> TrainState:
        """Shapes, dtypes and shardings of the state with this bucket."""
        if bucket not in self._abstract:
            state = jax.eval_shape(self.init_state(bucket))
            places = sharding.shardings(self.mesh, state)
            placed = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places
            )
            self._abstract[bucket] = placed
        return self._abstract[bucket]

    def jitted_step(self, bucket: int) -> jax.stages.Wrapped:
        """The step for this bucket, which takes the place of the state that it is given."""
        attention = sharding.attention_over(self.mesh, self.config.train.batch)
        step = make_train_step(
            self.model, self.optimizer, self.config, bucket, attention, self.mesh
        )
        places = jax.tree.map(lambda x: x.sharding, self.abstract_state(bucket))
        return jax.jit(step, donate_argnums=0, out_shardings=(places, None))


class Trainer(TrainProgram):
    """The pieces of one run, made from its configuration; `train_and_evaluate` drives them."""

    def __init__(self, config: ml_collections.ConfigDict, dataset: data.Dataset):
        check(config)
        super().__init__(config, sharding.make_mesh(config))
        self.dataset, self.rows, train = (
            dataset,
            sharding.Rows(self.mesh, config.train.batch),
            config.train,
        )
        self.stream = data.Stream(
            dataset.tokens("train"), train.batch, train.block, config.seed, self.rows.local
        )
        self._steps: dict[int, Callable] = {}
        self.abstract_state(
            choose_bucket(config, config.model.span.init)
        )  # refuses what the mesh does not divide
        for split in ("valid", "test"):
            tokens, place = len(self._split(split)), f"{dataset.name}, split {split}: "
            protocols.check_length(config.evaluate.protocol, tokens, train.block, place)

    def fresh_state(self, params: Params | None = None) -> tuple[TrainState, int]:
        """The state of step 0, made in place on the mesh, and its bucket; with other parameters if they are given."""
        longest = self.config.model.span.init
        if params and self.config.model.span.adaptive:
            longest = float(jnp.max(params["layers"]["span"]))
        bucket = choose_bucket(self.config, longest)
        places = jax.tree.map(lambda x: x.sharding, self.abstract_state(bucket))
        state = jax.jit(self.init_state(bucket), out_shardings=places)()
        return dataclasses.replace(state, params=params or state.params), bucket

    def restored_state(
        self, arrays: tuple[Any, Any, Any], meta: dict[str, Any]
    ) -> tuple[TrainState, int]:
        """The state of a checkpoint, from its params, optimizer and cache and what it says besides, and its bucket."""
        places = self.abstract_state(meta["bucket"])
        step = jax.device_put(jnp.int32(meta["step"]), places.step.sharding)
        key = jax.device_put(jnp.array(meta["key"], jnp.uint32), places.key.sharding)
        return TrainState(step, *arrays, key), meta["bucket"]

    def batch(self, step: int) -> data.Batch:
        """The block of a step, on the mesh."""
        block, place = self.stream.block(step), self.rows.place
        return data.Batch(place(block.inputs_BT), place(block.targets_BT), block.before)

    def step(
        self, state: TrainState, bucket: int, batch: data.Batch
    ) -> tuple[TrainState, metrics.TrainMetrics]:
        """One update, by the code compiled for this bucket."""
        if bucket not in self._steps:
            self._steps[bucket] = self.jitted_step(bucket)
        return self._steps[bucket](state, batch)

    def grow(self, state: TrainState, bucket: int) -> tuple[TrainState, int]:
        """Choose the bucket again from the spans of this step, and make room in the cache if it grew."""
        if not self.config.model.span.adaptive:
            return state, bucket
        longest = float(jnp.max(state.params["layers"]["span"]))
        if not math.isfinite(longest):
            raise RunError(
                f"a span of step {int(state.step)} is not a number; the last good checkpoint is kept"
            )
        chosen = choose_bucket(self.config, longest, bucket)
        if chosen > bucket:
            state.cache = grow_cache(state.cache, chosen, self.config.model.span.limit)
        return state, chosen

    def evaluate(self, params: Params, split: str, stop: Callable[[], bool]) -> dict[str, float]:
        """Score a split as `config.evaluate` says, unless `stop` says to stop before its end."""
        options = {"protocol": self.config.evaluate.protocol, **protocols.options(self.config)}
        options |= {"mesh": self.mesh, "vocabulary": self.dataset.vocabulary, "stop": stop}
        return scoring.evaluate_tokens(self.model, params, self._split(split), **options)

    def _split(self, split: str) -> data.TokenSource:
        tokens: data.TokenSource = self.dataset.tokens(split)
        most = self.config.evaluate.max_tokens
        return tokens[:most] if split == "valid" and most else tokens

    def meta(self, state: TrainState, bucket: int) -> dict[str, Any]:
        """What a checkpoint says besides its arrays."""
        step = int(state.step)
        described = checkpoint.describe(step, self.config, self.dataset.vocabulary)
        return {**described, "key": np.asarray(state.key).tolist(), "bucket": bucket}


def check(config: ml_collections.ConfigDict) -> None:
    """Refuse what cannot run, before anything is written."""
    check_training(config)
    protocols.check_protocol(config.evaluate.protocol, config.model.layer, "evaluate.")


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str) -> dict[str, Any]:
    """Train, or go on where the workdir's newest checkpoint stands, then score the test split.

    Args:
      config: the whole configuration (configs/base.py).
      workdir: folder or bucket URL of the run; at the end it holds the scores as scores.json as
        well.

    Returns:
      The scores of the test split (`evaluate.evaluate_tokens`), with split, protocol and step.

    Raises:
      UserError: the configuration does not fit the data, the devices or the workdir, or differs
        between processes.
      RunError: the loss is not a number.
      PreemptedError: this machine is being taken away; the state is saved.
    """
    # The order of a start:
    # 1. check configuration, data and devices, the same on all processes, before anything is
    # written into the workdir 2. if the workdir has a checkpoint, check that it was made with this
    # configuration 3. restore the state and the bucket from it, or make a fresh state, with other
    # parameters if init_from says so 4. the stream needs only the step: nothing else is restored
    processes.require_same_text("configuration", to_json(config), _differences)
    c, begun = config.dataset, checkpoint.has_begun(workdir)

    def make_trainer() -> Trainer:
        dataset = data.prepare(c.name, c.data_dir or None, unit=c.unit)
        return Trainer(with_vocabulary(config, dataset.vocabulary.size, dataset.name), dataset)

    trainer = processes.require_same_result(
        "data set", make_trainer, lambda made: made.dataset.full_name
    )
    initial = None if begun else start.warm_start(trainer)  # refused before there is a workdir
    with processes.Preemption() as stop:
        with checkpoint.Checkpointer(workdir, config.checkpoint.keep) as checkpoints:
            restored = start.restore(trainer, checkpoints)
            state, bucket = restored or trainer.fresh_state(initial or start.warm_start(trainer))
            state = _run(trainer, checkpoints, state, bucket, workdir, stop)
        scores = {"split": "test", "protocol": config.evaluate.protocol, "step": int(state.step)}
        scores |= trainer.evaluate(state.params, "test", stop)
    _keep_scores(trainer, state, workdir, scores)
    return scores


def _differences(theirs: str, mine: str) -> str:
    """Fields that differ between two processes; only the place of their data, which must be the same, may differ."""
    places = ("on process 0", "there")
    return "; ".join(
        changed_fields(from_json(theirs), from_json(mine), ("dataset.data_dir",), places)
    )


def _keep_scores(trainer: Trainer, state: TrainState, workdir: str, scores: dict[str, Any]) -> None:
    """Leave the scores in the workdir, with what a comparison of runs needs besides."""
    train = trainer.config.train
    size = {"parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params))}
    size["trained_tokens"] = int(state.step) * train.batch * train.block
    path, text = epath.Path(workdir) / "scores.json", json.dumps({**scores, **size}) + "\n"
    if not jax.process_index() and not (path.exists() and path.read_text() == text):
        path.write_text(text)


def _run(
    trainer: Trainer,
    checkpoints: checkpoint.Checkpointer,
    state: TrainState,
    bucket: int,
    workdir: str,
    stop: processes.Preemption,
) -> TrainState:
    """The loop. Metrics are read one step late, so that nothing waits for the device."""
    c, first = trainer.config, int(state.step)
    total = c.train.steps + c.train.finetune_steps
    if first >= total:
        if not jax.process_index():
            print(f"{workdir} is complete: {first} of {total} steps", flush=True)
        return state
    with Recorder(trainer, workdir, total, state) as recorder:
        for step in range(first, total):
            if step % c.model.span.check_every == 0:
                recorder.flush()  # refuses spans that are not numbers
                state, bucket = trainer.grow(state, bucket)
            state, values = trainer.step(state, bucket, trainer.batch(step))
            done, dev = step + 1, None
            recorder.record(done, values)
            evaluates = done % c.evaluate.every == 0 or done == total
            if not (stop() or evaluates or done % c.checkpoint.every == 0):
                continue
            recorder.flush()  # refuses a loss that is not a number, before it reaches a checkpoint
            if evaluates and not stop.reached:
                with contextlib.suppress(PreemptedError):
                    dev = recorder.evaluate(state.params, stop)["nll"]
            arrays = (state.params, state.optimizer, state.cache)
            checkpoints.save(done, *arrays, trainer.meta(state, bucket), dev)
            if stop.reached:
                raise PreemptedError(
                    f"stopped at step {done}: this machine is being taken away; run again to go on"
                )
    return state
