"""A trained run, loaded from its workdir alone: its scores, its samples, its spans.

`load` restores it, `Run` is what comes out, and `evaluate` and `generate` are both in one call, as
the commands of the same names use them.

Dimension key: X layer, H head.
"""

import dataclasses
import functools
import hashlib
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import ml_collections
import numpy as np

from allattn import data, sharding
from allattn.config import from_json
from allattn.data.own_text import files_below
from allattn.errors import UserError
from allattn.evaluation import protocols, scoring
from allattn.evaluation import sampling as sampler
from allattn.evaluation.sampling import Sampling
from allattn.model import Model, ModelConfig, Params
from allattn.model.parameters import check_spans
from allattn.sharding import processes
from allattn.storage import checkpoint, paths

if TYPE_CHECKING:
    from allattn.plots import Figure


class _Scored(NamedTuple):
    """The tokens that are scored, how much text each stands for, and a name nothing else has."""

    tokens: data.TokenSource
    bytes_per_token: float
    name: str


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """A model with its parameters, configuration and vocabulary."""

    model: Model
    # Whole on one device.
    params: Params
    # As the run was started with; `model.vocab_size` is that of its data.
    config: ml_collections.ConfigDict
    vocabulary: data.Vocabulary
    # Updates made.
    step: int
    # Full name of the data that it was trained on last; "": an older checkpoint.
    dataset: str = ""

    def __repr__(self) -> str:
        c = self.config
        return f"Run({c.model.layer}, {c.dataset.name}, step {self.step})"

    def evaluate(
        self,
        split: str = "test",
        protocol: str | None = None,
        text: str | None = None,
        data_dir: str | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> dict[str, Any]:
        """Score a split of the run's data set, or a text file.

        Of several processes each reads its share of the rows.

        Args:
          split: train, valid or test.
          protocol: authors, full or xl; None: as the configuration says.
          text: path or bucket URL of a file, or a folder of files, to score instead; "-": standard
            input.
          data_dir: where the data set is, if not where training had it.
          progress: called with the blocks that are scored, and all of them, as it goes on.

        Returns:
          split, protocol, step, nll, bpc, ppl and tokens; of words also ppl_words.

        Raises:
          UserError: a missing file, a symbol outside the vocabulary, too short a text, or processes
            that differ.
          PreemptedError, StoppedByKeyboard: SIGTERM, SIGHUP or Ctrl-C came while it scored; this
            call replaces their handlers meanwhile.
        """
        protocol = protocol or self.config.evaluate.protocol

        # All processes must score the same tokens of the same checkpoint.
        read_tokens = functools.partial(self._tokens, split, text, data_dir)
        scored = processes.require_same_result(
            "task", read_tokens, lambda scored: f"{protocol}, step {self.step}, {scored.name}"
        )

        # Rows are spread over all devices, and every device holds all parameters.
        mesh = sharding.mesh_over_rows()
        params = sharding.put_on_mesh(mesh, self.params)
        with processes.Preemption() as preemption:
            scores = scoring.evaluate_tokens(
                self.model,
                params,
                scored.tokens,
                protocol=protocol,
                mesh=mesh,
                vocabulary=self.vocabulary,
                bytes_per_token=scored.bytes_per_token,
                stop=preemption,
                progress=progress,
                **protocols.options(self.config),
            )
        return {"split": text or split, "protocol": protocol, "step": self.step, **scores}

    def _tokens(self, split: str, text: str | None, data_dir: str | None) -> "_Scored":
        """What to score."""
        if text is not None:
            content = _read(text)
            digest = hashlib.sha256(content).hexdigest()[:16]
            # The added end of a last line counts as a byte as well as a token.
            if not content.endswith(b"\n"):
                content += b"\n" * bool(content)
            # Bytes, as they are numbered today, are all known; older runs knew those of their text.
            try:
                tokens = self.vocabulary.encode(content)
            except UserError as error:
                expected = "a file or folder in the run's symbols"
                raise UserError(f"--text: expected {expected}, found another: {error}") from None
            return _Scored(tokens, len(content) / max(1, len(tokens)), f"text {digest}")

        # The data set may have been prepared anew since, with other symbols.
        dataset = data.prepare_configured(self.config, data_dir)
        if dataset.vocabulary != self.vocabulary:
            raise UserError(
                f"{dataset.path}: expected the vocabulary of the checkpoint, found another"
            )
        if self.dataset not in ("", dataset.full_name):
            logging.warning(
                "other text than this run was trained on: %s then, %s now; its splits may overlap",
                self.dataset,
                dataset.full_name,
            )
        return _Scored(
            dataset.tokens(split),
            dataset.bytes_per_token(split),
            f"{split} of {dataset.full_name}",
        )

    def generate(
        self,
        prompt: str | bytes,
        length: int = 200,
        sampling: Sampling = Sampling(),
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[bytes]:
        """Continue a prompt.

        Args:
          prompt: text to start from, not empty.
          length: symbols to draw.
          sampling: temperature, top-k and top-p.
          seed: of the draws.
          progress: called with the symbols that have been read, and those to read in all.

        Returns:
          The text of each symbol as it is drawn; words and line ends come with the space that goes
          before them.

        Raises:
          UserError: at once, for an empty prompt, one with a symbol outside the vocabulary, or a
            sampling option out of range.
        """
        # A prompt of the command line comes as text; these are the bytes that were typed.
        prompt = os.fsencode(prompt)
        # At once, so that a prompt is refused here and not when its continuation is read.
        ids = self.vocabulary.encode(prompt)
        tokens = sampler.generate(self.model, self.params, ids, length, sampling, seed, progress)
        return self._texts(tokens, prompt)

    def _texts(self, tokens: Iterator[int], before: bytes) -> Iterator[bytes]:
        """The bytes of every token, words with the space that goes before them."""
        for token in tokens:
            text = self.vocabulary.decode(np.array([token]))
            # Bytes stand as they are; a line end needs no space, nor does what follows one.
            joined = self.vocabulary.unit != "word" or text == b"\n" or before[-1:].isspace()
            yield text if joined else b" " + text
            before = text

    def spans_XH(self) -> np.ndarray:
        """How far back every head of every layer looks.

        Returns:
          Spans in tokens, (layers, heads), float32; the limit where they are not learned.
        """
        config = self.model.config
        # Of heads that attend to persistent pairs alone there is no span.
        if not config.adaptive:
            return np.full((config.depth, config.context_heads), config.limit, np.float32)
        # A parameter is the share of the limit.
        share_XH = np.asarray(self.params["layers"]["span"])
        return share_XH * np.float32(config.limit)

    def plot_spans(self) -> "Figure":
        """Draw how far back every head of every layer looks.

        Returns:
          A matplotlib figure, which a notebook shows and `savefig` writes.
        """
        # matplotlib takes a while to import.
        from allattn import plots

        config = self.model.config
        return plots.plot_spans(self.spans_XH(), config.limit, config.ramp, config.adaptive)


def _read(text: str) -> bytes:
    """The content of a file or of a folder's files, here or in a bucket, or of standard input."""
    if text == "-":
        return sys.stdin.buffer.read()
    path = paths.parse("--text", text)
    # A missing file is the user's mistake, anything else may be the network.
    with paths.reached(path):
        if path.is_dir():
            return b"".join(file.read_bytes() for file in files_below(path))
        if not path.is_file():
            raise UserError(f"--text: expected a file or a folder of files, found none at {text}")
        return path.read_bytes()


def load(workdir: str | os.PathLike[str], step: int | str | None = None) -> Run:
    """The run in a workdir.

    Args:
      workdir: folder or bucket URL.
      step: a step, "best", "sound" (the newest that is as it was written), or None for the newest.

    Returns:
      The run, its parameters whole on one device.

    Raises:
      UserError: no such checkpoint, or it cannot be read.

    Example:
      >>> run = allattn.load(workdir, step="best")
      >>> spans_XH = run.spans_XH()
      >>> spans_XH.shape == (run.config.model.depth, run.config.model.heads)
      True
    """
    with checkpoint.Checkpointer(workdir, create=False) as checkpoints:
        # Which one is the newest may differ between processes, while another run writes there.
        number = processes.require_same_result(
            "checkpoint", functools.partial(checkpoints.resolve, step), str
        )

        try:
            return _restore(checkpoints, number)
        except checkpoint.DamagedError as error:
            raise UserError(f"{error}; {_advice(checkpoints, number)}") from error


def _restore(checkpoints: checkpoint.Checkpointer, step: int) -> Run:
    """The run as a checkpoint has it."""
    # The configuration gives the model, and the model the shapes of its parameters.
    meta = checkpoints.restore_meta(step)
    with checkpoints.parsing(step):
        config = from_json(meta["config"])
        model = Model(ModelConfig.from_config(config))
        vocabulary = data.Vocabulary.from_json(meta["vocabulary"])
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    params = checkpoints.restore_params(checkpoint.on_one_device(abstract), step)
    check_spans(params, f"checkpoint {step} in {checkpoints.workdir}")
    return Run(model, params, config, vocabulary, step, meta.get("dataset", ""))


def _advice(checkpoints: checkpoint.Checkpointer, damaged: int) -> str:
    """Which other checkpoint is sound."""
    others = [step for step in checkpoints.steps() if step != damaged]
    sound = checkpoints.sound_step(others)
    if sound is None:
        return "no other checkpoint there is known to be sound"
    return f"step {sound} is sound: --step=sound takes it"


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
      step: a step, "best", "sound", or None for the newest.

    Returns:
      As `Run.evaluate`.

    Raises:
      UserError, PreemptedError: as `load` and `Run.evaluate`.

    Example:
      >>> scores = allattn.evaluate(workdir, split="valid")
      >>> sorted(scores)
      ['bpc', 'nll', 'ppl', 'protocol', 'split', 'step', 'tokens']
    """
    run = load(workdir, step)
    return run.evaluate(split, protocol, text, data_dir)


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
      step: a step, "best", "sound", or None for the newest.

    Returns:
      The text of each symbol as it is drawn, as `Run.generate`.

    Raises:
      UserError: what `load` and `Run.generate` refuse.

    Example:
      >>> pieces = allattn.generate(workdir, prompt="abc", length=5, temperature=0.8, seed=1)
      >>> len(b"".join(pieces))
      5
    """
    run = load(workdir, step)
    return run.generate(prompt, length, Sampling(temperature, top_k, top_p), seed)
