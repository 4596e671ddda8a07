"""Everything that launch/colab.ipynb has one device compute, compiled for a device that need not be
here.

Dimension key: B row of a batch, T position in the block, V vocabulary.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from allattn import config, sharding, train
from allattn.evaluation import protocols, sampling, scoring
from allattn.model import Model
from allattn.planning import chips, compilation

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = "96"  # about as many symbols as the source text of a standard library has


def settings() -> dict[str, Any]:
    """The notebook's own, as its cell of parameters sets them."""
    cells = nbformat.read(ROOT / "launch" / "colab.ipynb", as_version=4).cells
    (cell,) = (cell for cell in cells if "parameters" in cell.metadata.get("tags", []))
    found: dict[str, Any] = {}
    exec(cell.source, found)
    return found


def compiled(machine: str) -> Iterator[tuple[str, str, int]]:
    """Name, text and bytes of memory of each: both runs' states, steps and scores, and the samples
    of the first.
    """
    found = settings()
    for pairs in ({}, {"model.persistent": str(found["OTHER_N"])}):
        changes = {
            "model.vocab_size": VOCABULARY,
            **{k: str(v) for k, v in found["OVERRIDES"].items()},
            **pairs,
        }
        c = config.load(str(ROOT / "configs" / f"{found['CONFIG']}.py"), changes)
        program = train.TrainProgram(c, sharding.make_mesh(c, chips.devices(machine)))
        made = Programs(program, "tpu" if chips.chip(machine).platform == "tpu" else "cuda")
        for part in (made.training, made.scoring, *([] if pairs else [made.sampling])):
            for name, lowered in part():
                ready = lowered.compile()
                yield (
                    f"N {c.model.persistent}, {name}",
                    ready.as_text(),
                    sum(compilation.memory(ready).values()),
                )


def attends(name: str) -> bool:
    """Whether there is attention in a program of this name, as in most."""
    return any(word in name for word in ("step", "authors", "full", "sample"))


class Programs:
    """What one run computes, lowered for a platform."""

    def __init__(self, program: train.TrainProgram, platform: str) -> None:
        self.program = program
        self.platform = platform
        self.config = program.config
        self.mesh = program.mesh
        self.model = program.model
        self.params = self.placed(jax.eval_shape(self.model.init, jax.random.key(0)))
        self.windowed = self.model.windowed(self.config.model.span.limit)

    def placed(self, tree: Any) -> Any:
        place = NamedSharding(self.mesh, P())
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)

    def shape(self, *shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return self.placed(jax.ShapeDtypeStruct(shape, dtype))

    def cache(self, model: Model, rows: int, length: int) -> Any:
        return self.placed(jax.eval_shape(lambda: model.empty_key_value(rows, length)))

    def lower(self, function: Any, *arguments: Any) -> jax.stages.Lowered:
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return function.trace(*arguments).lower(lowering_platforms=(self.platform,))

    def training(self) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """A fresh state, and the step for every length of context that a run grows to."""
        bucket = train.choose_context_length(self.config, 0.0)
        yield "state", self.lower(jax.jit(self.program.init_state(bucket)))
        while True:
            yield (
                f"step, context {bucket}",
                compilation.lower_step(self.program, self.platform, bucket),
            )
            if bucket == self.config.model.span.limit:
                return
            bucket = train.next_context_length(bucket, self.config.model.span.limit)

    def contexts(self) -> list[int]:
        """The shortest and the longest of those that scoring and sampling round to."""
        return [64, self.config.model.span.limit]

    def scoring(self) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """A block of both protocols."""
        block = self.config.train.block
        streams = {
            "authors": (self.model, protocols.AUTHORS_ROWS),
            "full": (self.windowed, self.config.evaluate.batch),
        }
        for protocol, (model, rows) in streams.items():
            for context in self.contexts():
                yield f"{protocol}, context {context}", self._scored(model, rows, context, block)

    def _scored(self, model: Model, rows: int, context: int, block: int) -> jax.stages.Lowered:
        cache = self.cache(model, rows, context + block)
        blocks = [
            self.shape(rows, block, dtype=dtype) for dtype in (jnp.int32, jnp.int32, jnp.bool)
        ]
        return self.lower(
            scoring.score_block, model, self.mesh, None, self.params, cache, self.shape(), *blocks
        )

    def sampling(self) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """One symbol, a block of a prompt, and the draw."""
        model = self.windowed
        place = self.shape()
        for context in self.contexts():
            cache = self.cache(model, 1, context + sampling.SLACK)
            for tokens in (1, sampling.PROMPT_BLOCK):
                arguments = (model, self.params, cache, self.shape(1, tokens), place, place)
                yield (
                    f"sample, context {context}, {tokens} tokens",
                    self.lower(sampling.advance, *arguments),
                )
            yield f"room, context {context}", self.lower(sampling._make_room, cache, context, place)
        key = self.placed(jax.eval_shape(lambda: jax.random.key(0)))
        logits_V = self.shape(int(VOCABULARY), dtype=jnp.float32)
        options = sampling.Sampling(temperature=0.7)
        yield "draw", self.lower(sampling.draw, logits_V, key, options)
