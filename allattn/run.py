"""A trained run, loaded from its workdir alone.

Dimension key: X layer, H head.
"""

import dataclasses
import functools
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import jax
import ml_collections
import numpy as np

from allattn import data, sharding
from allattn.config import from_json
from allattn.errors import UserError
from allattn.evaluation import protocols, scoring
from allattn.evaluation import sampling as sampler
from allattn.evaluation.sampling import Sampling
from allattn.model import Model, ModelConfig, Params
from allattn.sharding import processes
from allattn.storage import checkpoint, paths


@dataclasses.dataclass(frozen=True)
class Run:
    """A model with its parameters, configuration and vocabulary."""

    model: Model
    params: Params
    config: ml_collections.ConfigDict
    vocabulary: data.Vocabulary
    step: int

    def evaluate(
        self,
        split: str = "test",
        protocol: str | None = None,
        text: str | None = None,
        data_dir: str | None = None,
    ) -> dict[str, Any]:
        """Score a split of the run's data set, or a text file; of several processes each reads its share of the rows.

        Args:
          split: train, valid or test.
          protocol: authors, full or xl; None: as the configuration says.
          text: path or bucket URL of a file to score instead.
          data_dir: where the data set is, if not where training had it.

        Returns:
          split, protocol, step, nll, bpc, ppl and tokens; of words also ppl_words.

        Raises:
          UserError: a missing file, a symbol outside the vocabulary, too short a text, or processes
            that differ.
          PreemptedError: SIGTERM, for which this call takes the place of a handler, came while it
            scored.
        """
        protocol = protocol or self.config.evaluate.protocol
        found = functools.partial(self._tokens, split, text, data_dir)
        tokens, _ = processes.require_same_result(
            "task", found, lambda found: f"{protocol}, step {self.step}, {found[1]}"
        )
        mesh, options = (
            sharding.mesh_over_rows(),
            {"protocol": protocol, **protocols.options(self.config)},
        )
        params = sharding.put_on_mesh(mesh, self.params)
        with processes.Preemption() as stop:
            options |= {"mesh": mesh, "vocabulary": self.vocabulary, "stop": stop}
            scores = scoring.evaluate_tokens(self.model, params, tokens, **options)
        return {"split": text or split, "protocol": protocol, "step": self.step, **scores}

    def _tokens(self, split: str, text: str | None, data_dir: str | None) -> tuple[Any, str]:
        """What to score, and a name that nothing else has."""
        if text is not None:
            read = _read(text)
            return self.vocabulary.encode(
                read, close=True
            ), f"text {hashlib.sha256(read).hexdigest()[:16]}"
        c = self.config.dataset
        dataset = data.prepare(c.name, data_dir or c.data_dir or None, unit=c.unit)
        if dataset.vocabulary != self.vocabulary:
            raise UserError(
                f"{dataset.path}: expected the vocabulary of the checkpoint, found another"
            )
        return dataset.tokens(split), f"{split} of {dataset.full_name}"

    def generate(
        self, prompt: str | bytes, length: int = 200, sampling: Sampling = Sampling(), seed: int = 0
    ) -> Iterator[bytes]:
        """Continue a prompt.

        Args:
          prompt: text to start from, not empty.
          length: symbols to draw.
          sampling: temperature, top-k and top-p.
          seed: of the draws.

        Returns:
          The text of each symbol as it is drawn; words and line ends come with the space that goes
          before them.

        Raises:
          UserError: at once, for an empty prompt, one with a symbol outside the vocabulary, or a
            sampling option out of range.
        """
        prompt = os.fsencode(prompt)  # of a command line the bytes as they were typed
        ids = self.vocabulary.encode(prompt)
        return self._texts(
            sampler.generate(self.model, self.params, ids, length, sampling, seed), prompt
        )

    def _texts(self, tokens: Iterator[int], before: bytes) -> Iterator[bytes]:
        for token in tokens:
            text = self.vocabulary.decode(np.array([token]))
            joined = self.vocabulary.unit == "byte" or text == b"\n" or before[-1:].isspace()
            yield text if joined else b" " + text
            before = text

    def spans_XH(self) -> np.ndarray:
        """How far back every head of every layer looks.

        Returns:
          Spans in tokens, (layers, heads), float32; the limit where they are not learned.
        """
        config = self.model.config
        if not config.adaptive:
            return np.full((config.depth, config.context_heads), config.limit, np.float32)
        return np.asarray(self.params["layers"]["span"]) * np.float32(config.limit)


def _read(text: str) -> bytes:
    path = paths.parse("--text", text)
    with paths.reached(path):
        if not path.is_file():
            raise UserError(f"--text: expected a file, found none at {text}")
        return path.read_bytes()


def load(workdir: str | os.PathLike[str], step: int | str | None = None) -> Run:
    """The run in a workdir.

    Args:
      workdir: folder or bucket URL.
      step: a step, "best", or None for the newest.

    Returns:
      The run, its parameters whole on one device.

    Raises:
      UserError: no such checkpoint, or it cannot be read.
    """
    with checkpoint.Checkpointer(workdir, create=False) as checkpoints:
        number = processes.require_same_result(
            "checkpoint", functools.partial(checkpoints.resolve, step), str
        )
        meta = checkpoints.restore_meta(number)
        config = from_json(meta["config"])
        model = Model(ModelConfig.from_config(config))
        abstract = jax.eval_shape(model.init, jax.random.key(0))
        params = checkpoints.restore_params(checkpoint.on_one_device(abstract), number)
    return Run(model, params, config, data.Vocabulary.from_json(meta["vocabulary"]), number)


def evaluate(
    workdir: str | os.PathLike[str],
    split: str = "test",
    protocol: str | None = None,
    text: str | None = None,
    data_dir: str | None = None,
    step: int | str | None = None,
) -> dict[str, Any]:
    """Score a checkpoint, as `allattn evaluate` does.

    Args:
      workdir: folder or bucket URL of the run.
      split, protocol, text, data_dir: as in `Run.evaluate`.
      step: a step, "best", or None for the newest.

    Returns:
      As `Run.evaluate`.

    Raises:
      UserError, PreemptedError: as `load` and `Run.evaluate`.
    """
    return load(workdir, step).evaluate(split, protocol, text, data_dir)


def generate(
    workdir: str | os.PathLike[str],
    prompt: str | bytes,
    length: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    step: int | str | None = None,
) -> Iterator[bytes]:
    """Continue a prompt from a checkpoint, as `allattn generate` does.

    Args:
      workdir: folder or bucket URL of the run.
      prompt: text to start from, not empty.
      length: symbols to draw.
      temperature, top_k, top_p: as in `Sampling`.
      seed: of the draws.
      step: a step, "best", or None for the newest.

    Returns:
      The text of each symbol as it is drawn, as `Run.generate`.

    Raises:
      UserError: what `load` and `Run.generate` refuse.
    """
    return load(workdir, step).generate(prompt, length, Sampling(temperature, top_k, top_p), seed)
