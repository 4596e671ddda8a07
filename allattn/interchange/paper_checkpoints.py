"""Checkpoints of the papers' own code, imported and exported.

`paper_state_dicts.py` has the names and axes of their tensors, `state_files.py` reads their files.
Both directions only move numbers: a float32 checkpoint that is imported and exported again is the
same bit by bit. Ids are not renumbered: a checkpoint's vocabulary must have the order of ours,
which for adaptive-span is theirs.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from allattn import data
from allattn.config import with_vocabulary
from allattn.errors import UserError
from allattn.interchange import state_files
from allattn.interchange.paper_state_dicts import SOURCES, Entry, Source, State
from allattn.model import Model, ModelConfig, Params
from allattn.model.parameters import check_spans, parameter_count, parameter_name
from allattn.run import load
from allattn.storage import checkpoint

# Of names that do not fit, as many of a kind are in the message.
SHOWN_NAMES = 3
# Fields of config.model that no model of the papers' code has: there is no place for them.
OURS_ALONE = (
    "persistent_bias",
    "persistent_gain",
    "persistent_heads",
    "sinks",
    "qk_norm",
    "residual_scalars",
    "output_gate",
)
# How the names of tables end that have a row for every symbol of a text of bytes.
EMBEDDINGS = ("in_emb.weight", "word_emb.emb_layers.0.weight")


# --- parameters --------------------------------------------------------------------------------


def to_theirs(params: Params, entries: list[Entry]) -> State:
    """Our parameters under their names.

    Args:
      params: nested dict of arrays.
      entries: a table.

    Returns:
      Their state dict, without the copies and constants that their code stores beside it.
    """
    # Several of ours may make one of theirs, stacked by rows in the order of the table.
    parts: dict[str, list[np.ndarray]] = {}
    for entry in entries:
        ours = _at(params, entry.ours)
        if entry.layer is not None:
            ours = ours[entry.layer]
        parts.setdefault(entry.theirs, []).append(entry.to_theirs(ours))
    return {name: np.ascontiguousarray(np.concatenate(x)) for name, x in parts.items()}


def to_ours(state: State, abstract: Params, entries: list[Entry]) -> Params:
    """Their tensors as our parameters.

    Args:
      state: their state dict, without copies and constants.
      abstract: shapes and dtypes of our parameters.
      entries: a table.

    Returns:
      The parameters, nested as `abstract`.

    Raises:
      UserError: counts the keys that are missing, those that have no place here and those of
        another shape, and names the first of each.
    """
    _check_keys(state, abstract, entries)
    params = jax.tree.map(lambda x: np.empty(x.shape, x.dtype), abstract)
    for entry in entries:
        ours = _at(params, entry.ours)
        value = entry.to_ours(state[entry.theirs][entry.rows])
        # Written into the array, which may be one layer of several.
        if entry.layer is None:
            ours[...] = value
        else:
            ours[entry.layer] = value
    return params


def _check_keys(state: Mapping[str, Any], abstract: Params, entries: list[Entry]) -> None:
    """Refuse a state dict whose names or shapes are not those of the configuration."""
    expected = _expected_shapes(abstract, entries)
    missing = [name for name in expected if name not in state]
    homeless = [name for name in state if name not in expected]
    misshapen = [
        f"{name}: expected shape {shape}, found {state[name].shape}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    # All that is wrong in one message, the first of every kind by name.
    wrong = {
        "missing": missing,
        "with no place in this configuration": homeless,
        "of another shape": misshapen,
    }
    parts = [f"{len(x)} {kind} ({_first(x)})" for kind, x in wrong.items() if x]
    if parts:
        count = sum(map(len, wrong.values()))
        raise UserError(f"{count} keys do not fit the configuration: {'; '.join(parts)}")


def _expected_shapes(abstract: Params, entries: list[Entry]) -> dict[str, tuple[int, ...]]:
    """Shapes of their tensors, by name: those of what would be exported."""
    # The zeros are views of one number, so that no memory is needed.
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract)
    return {name: x.shape for name, x in to_theirs(zeros, entries).items()}


def _first(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    text = ", ".join(names[:SHOWN_NAMES])
    return f"{text}, ..." if len(names) > SHOWN_NAMES else text


def _at(params: Params, path: str) -> Any:
    """The leaf at a path; members of lists have numbers."""
    node: Any = params
    for name in path.split("/"):
        node = node[int(name) if name.isdigit() else name]
    return node


# --- files -------------------------------------------------------------------------------------


def convert(
    source: str, file: str, config: ml_collections.ConfigDict, workdir: str
) -> dict[str, Any]:
    """Import a checkpoint of theirs as a workdir for `evaluate`, `generate` and further training.

    Args:
      source: a name in SOURCES.
      file: a .pt file with a state dict (needs torch), or the same as .npz.
      config: the whole configuration; its data set gives the vocabulary.
      workdir: folder or bucket URL without a checkpoint.

    Returns:
      parameters (their number) and tensors (of the state dict).

    Raises:
      UserError: file, configuration, data and workdir do not fit each other, or the numbers are
        none that a trained network has.
    """
    # The network that the configuration and its data set describe.
    config = _in_their_numbering(config, file)
    dataset = data.prepare_configured(config)
    config = _with_their_normaliser(config, source, dataset.vocabulary)
    config = with_vocabulary(config, dataset.vocabulary.size, dataset.name)
    model = Model(ModelConfig.from_config(config))
    table = _source(source, config)
    _check_parameters(source, model)

    # Their parameters, each once, in our arrangement.
    state = _read(file, table, model)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    params = to_ours(state, abstract, table.entries(model.config))
    check_spans(params, file)

    # A checkpoint of step 0 without optimizer and cache.
    with checkpoint.Checkpointer(workdir) as checkpoints:
        steps = checkpoints.steps()
        if steps:
            raise UserError(
                f"--workdir: expected one without checkpoints, found steps {steps} in {workdir}"
            )
        meta = checkpoint.describe(0, config, dataset.vocabulary.to_json()) | {"params_only": True}
        checkpoints.save_params(0, params, meta)
    return {"parameters": parameter_count(params), "tensors": len(state)}


def _in_their_numbering(config: ml_collections.ConfigDict, file: str) -> ml_collections.ConfigDict:
    """Bytes of one's own text as the papers number them, unless the checkpoint has all 256."""
    c = config.dataset
    if c.name not in ("files", "stdlib") or c.unit != "byte" or c.numbering != "value":
        return config
    tensors = state_files.read(file)
    tables = [x for name, x in tensors.items() if name.endswith(EMBEDDINGS)]
    if any(table.shape[0] == 256 for table in tables):
        return config
    # The caller's configuration stays as it is.
    config = config.copy_and_resolve_references().lock()
    config.dataset.numbering = "appearance"
    return config


def _with_their_normaliser(
    config: ml_collections.ConfigDict, source: str, vocabulary: data.Vocabulary
) -> ml_collections.ConfigDict:
    """The normaliser of their code for models of words that have learned spans.

    Of such models logits reach hundreds, spans hide the largest of them, and the epsilon decides
    what is left. Of bytes they are small: it does not show, and no kernel has it.
    """
    model = config.model
    is_of_words = vocabulary.unit == "word" or len(model.adaptive_io.cutoffs) > 0
    if source not in SOURCES or not (is_of_words and model.span.adaptive):
        return config
    # The caller's configuration stays as it is.
    config = config.copy_and_resolve_references().lock()
    config.model.span.epsilon = SOURCES[source].epsilon
    return config


def _read(file: str, table: Source, model: Model) -> State:
    """The parameters of a state dict, each once; nothing is read that the model does not have."""
    # Names as the table has them.
    entries = table.entries(model.config)
    tensors, prefix = state_files.without_prefix(
        state_files.read(file), [entry.theirs for entry in entries]
    )
    if prefix not in ("", table.prefix):
        print(f"{file}: names are read without their prefix {prefix!r}", flush=True)

    # What is no parameter is not read, and a copy only where its original is there. Where one of
    # the two is missing, the check of the keys names it.
    for name in table.constants(model.config):
        tensors.pop(name, None)
    copies = {}
    for copy, original in table.copies(model.config).items():
        if copy in tensors and original in tensors:
            copies[copy] = tensors.pop(copy)
            _check_copy(file, copy, original, copies[copy].shape == tensors[original].shape)
    _check_keys(tensors, jax.eval_shape(model.init, jax.random.key(0)), entries)

    # The numbers, now that every shape is one of the model's.
    state = {name: state_files.numbers(file, name, x) for name, x in tensors.items()}
    for copy, tensor in copies.items():
        original = table.copies(model.config)[copy]
        value = state_files.numbers(file, copy, tensor)
        _check_copy(file, copy, original, np.array_equal(value, state[original]))
    return state


def _check_copy(file: str, copy: str, original: str, equal: bool) -> None:
    """Refuse a tensor that is stored a second time and differs."""
    if not equal:
        raise UserError(
            f"{file}: expected {copy} to equal {original}, with which it is shared, found another"
        )


def export(source: str, workdir: str, file: str, step: int | str | None = None) -> dict[str, Any]:
    """Write a run's parameters as a state dict of theirs, with all that their code stores in one.

    Args:
      source: a name in SOURCES.
      workdir: folder or bucket URL of the run.
      file: .npz to write.
      step: which checkpoint; None: the newest.

    Returns:
      parameters (their number) and tensors (of the state dict).

    Raises:
      UserError: no such checkpoint, one of another kind, or the file is there already.
    """
    # Found out before the run is loaded.
    path = Path(file)
    if path.exists() or not file.endswith(".npz") or not path.parent.is_dir():
        raise UserError(
            "--export: expected a new file that ends in .npz, in a folder that exists, "
            f"found {file}"
        )
    run = load(workdir, step)
    config = run.model.config
    table = _source(source, run.config)
    _check_parameters(source, run.model)

    # The parameters, then what their code stores beside them.
    params = jax.tree.map(np.asarray, run.params)
    state = to_theirs(params, table.entries(config))
    tensors = len(state)
    for copy, original in table.copies(config).items():
        state[copy] = state[original]
    state |= table.constants(config)

    # The names of a saved state dict.
    named: dict[str, Any] = {table.prefix + name: x for name, x in state.items()}
    np.savez(file, **named)
    return {"parameters": parameter_count(params), "tensors": tensors}


def _check_parameters(name: str, model: Model) -> None:
    """Refuse a model with parameters that a code base does not have, whatever field they are of."""
    theirs = {entry.ours for entry in SOURCES[name].entries(model.config)}
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    leaves, _ = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [parameter_name(path) for path, _ in leaves]
    ours = [path for path in paths if path not in theirs]
    if ours:
        raise UserError(
            f"--source={name}: expected parameters that its code has, found {_first(ours)}"
        )


def _source(name: str, config: ml_collections.ConfigDict) -> Source:
    """A code base that has the configuration's layers."""
    if name not in SOURCES:
        raise UserError(f"--source: expected one of {tuple(SOURCES)}, found {name!r}")
    # The papers' code has one softmax over context and persistent pairs.
    source = SOURCES[name]
    model = config.model
    if model.layer not in source.layers or model.integration != "joint":
        raise UserError(
            f"--source={name}: expected model.layer in {source.layers} and model.integration "
            f"joint, found {model.layer} and {model.integration}"
        )
    for field in OURS_ALONE:
        if model[field]:
            raise UserError(
                f"--source={name}: expected model.{field} {type(model[field])()!r}, as the papers' "
                f"models have none, found {model[field]!r}"
            )
    # Their layers have pairs or a feed-forward sublayer; one of the two codes has a choice of norm.
    if model.layer == "all_attention" and model.feed_forward:
        raise UserError(
            f"--source={name}: expected model.feed_forward 0 with all_attention, "
            f"found {model.feed_forward}"
        )
    if model.layer != "transformer_xl" and model.pre_norm:
        raise UserError(
            f"--source={name}: expected model.pre_norm False with {model.layer}, found True"
        )
    return source
