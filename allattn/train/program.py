"""What builds the training state and the jitted step for a configuration and a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from jax.sharding import Mesh

from allattn import sharding
from allattn.errors import UserError
from allattn.model import Model, ModelConfig, Params
from allattn.train import optim
from allattn.train.context import choose_context_length
from allattn.train.growth import grow_pairs
from allattn.train.state import TrainState, initial_state
from allattn.train.step import make_train_step


class TrainProgram:
    """Builds the training state and the jitted step for a configuration and a mesh.

    It needs no data, and the devices of the mesh need not be here: `allattn compile` uses it too.

    Args:
      config: the whole configuration.
      mesh: from `sharding.make_mesh`.

    Raises:
      UserError: a model or update rule that does not exist, or a dtype that JAX would replace.
    """

    def __init__(self, config: ml_collections.ConfigDict, mesh: Mesh):
        _check_dtype(config)
        self.config = config
        self.mesh = mesh
        self.model = Model(ModelConfig.from_config(config))
        self.optimizer = optim.optimizer(config, mesh)
        # Abstract state by context length.
        self._abstract: dict[int, TrainState] = {}

    # --- tracing: shapes, shardings and the step

    def init_state(self, context_length: int) -> Callable[[], TrainState]:
        """Function that makes the state of step 0; it is only traced until it is jitted."""
        return functools.partial(
            initial_state, self.model, self.optimizer, self.config, context_length
        )

    def abstract_state(self, context_length: int) -> TrainState:
        """Shapes, dtypes and shardings of the state with this context length.

        Raises:
          UserError: the mesh does not divide an array.
        """
        if context_length not in self._abstract:
            state = jax.eval_shape(self.init_state(context_length))
            self._abstract[context_length] = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                state,
                sharding.shardings(self.mesh, state),
            )
        return self._abstract[context_length]

    def _shardings(self, context_length: int) -> TrainState:
        return jax.tree.map(lambda x: x.sharding, self.abstract_state(context_length))

    def jitted_step(self, context_length: int) -> jax.stages.Wrapped:
        """The step for this context length; it writes into the memory of the state it receives."""
        # Rows and heads are attended where they lie; the rest is left to the compiler.
        attention = sharding.attention_over(self.mesh, self.config.train.batch)
        step = make_train_step(
            self.model, self.optimizer, self.config, context_length, attention, self.mesh
        )
        # The state keeps its shardings from step to step; metrics are left to the compiler.
        out_shardings = (self._shardings(context_length), None)
        return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)

    # --- states on the mesh

    def fresh_state(self, params: Params | None = None) -> tuple[TrainState, int]:
        """The state of step 0 and its context length.

        Args:
          params: parameters to start from, on the mesh; None: fresh ones.
        """
        # Parameters of another run bring spans that may need a longer context.
        longest = self.config.model.span.init
        if params and self.config.model.span.adaptive:
            longest = float(jnp.max(params["layers"]["span"]))
        context_length = choose_context_length(self.config, longest)

        # Jitted with its shardings, every device makes its own part and nothing is moved.
        init = self.init_state(context_length)
        state = jax.jit(init, out_shardings=self._shardings(context_length))()
        if params:
            state = dataclasses.replace(state, params=params)
        return state, context_length

    def grown(self, params: Params) -> Params:
        """Parameters of this run's model, from those of the same model with fewer pairs.

        Args:
          params: on the mesh; `growth.grow_pairs` says what becomes of them.
        """
        share = self.config.train.grown_share

        def grow(params: Params) -> Params:
            # Of these only keys of the new pairs are drawn: the compiler leaves out the rest.
            fresh = self.model.init(jax.random.key(self.config.seed))
            return grow_pairs(params, fresh, share)

        return jax.jit(grow, out_shardings=self._shardings(1).params)(params)

    def restored_state(
        self, arrays: tuple[Any, Any, Any], meta: dict[str, Any]
    ) -> tuple[TrainState, int]:
        """The state of a checkpoint and its context length.

        Args:
          arrays: params, optimizer and cache, on the mesh.
          meta: what `Trainer.meta` stored beside them.
        """
        # The name of the context length in every checkpoint so far.
        context_length = meta["bucket"]
        shardings = self._shardings(context_length)
        step = jax.device_put(jnp.int32(meta["step"]), shardings.step)
        key = jax.device_put(jnp.array(meta["key"], jnp.uint32), shardings.key)
        params, optimizer, cache_XBSD = arrays
        return TrainState(step, params, optimizer, cache_XBSD, key), context_length


def _check_dtype(config: ml_collections.ConfigDict) -> None:
    """Refuse float64 where JAX would compute in float32 without a word."""
    dtype = config.model.dtype
    if dtype == "float64" and jax.dtypes.canonicalize_dtype(dtype) != jnp.float64:
        raise UserError(
            "model.dtype: expected float32 or bfloat16, or JAX with 64 bits (JAX_ENABLE_X64=1 "
            "ahead of the command), found float64"
        )
