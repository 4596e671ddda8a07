"""Checkpoints of the papers' own code, imported and exported.

`paper_state_dicts.py` has the names and axes of their tensors. Both directions only move numbers: a
checkpoint that is imported and exported again is the same bit by bit. Ids are not renumbered: a
checkpoint's vocabulary must have the order of ours, which for adaptive-span is theirs.
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from allattn import data
from allattn.config import with_vocabulary
from allattn.errors import UserError
from allattn.interchange.paper_state_dicts import SOURCES, Entry, Source, State
from allattn.model import Model, ModelConfig, Params
from allattn.model.parameters import parameter_count
from allattn.run import load
from allattn.storage import checkpoint

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
      UserError: lists the keys that are missing, those that have no place here and those of another
        shape.
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


def _check_keys(state: State, abstract: Params, entries: list[Entry]) -> None:
    """Refuse a state dict whose keys or shapes are not those of the configuration."""
    # What would be exported says what is expected. The zeros are views of one number, so that no
    # memory is needed.
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), abstract)
    expected = {name: x.shape for name, x in to_theirs(zeros, entries).items()}

    # All that is wrong in one message: what is missing, what is too much, what has another shape.
    wrong = [f"{name} missing" for name in expected if name not in state]
    for name in state:
        if name not in expected:
            wrong.append(f"{name} has no place in this configuration")
    for name, shape in expected.items():
        if name in state and state[name].shape != shape:
            wrong.append(f"{name}: expected shape {shape}, found {state[name].shape}")
    if wrong:
        raise UserError(f"{len(wrong)} keys do not fit the configuration: {'; '.join(wrong)}")


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
      UserError: file, configuration, data and workdir do not fit each other.
    """
    # The network that the configuration and its data set describe.
    dataset = data.prepare(
        config.dataset.name, config.dataset.data_dir or None, unit=config.dataset.unit
    )
    config = with_vocabulary(config, dataset.vocabulary.size, dataset.name)
    model = Model(ModelConfig.from_config(config))
    table = _source(source, config)

    # Their parameters, each once, in our arrangement.
    state = _read(file)
    _drop_extras(state, table, model.config, file)
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    params = to_ours(state, abstract, table.entries(model.config))

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


def _drop_extras(state: State, table: Source, config: ModelConfig, file: str) -> None:
    """Remove from a state dict what is no parameter, and what is stored a second time."""
    for name in table.constants(config):
        state.pop(name, None)
    for copy, original in table.copies(config).items():
        # Where one of the two is missing, the check of the keys names it.
        if copy not in state or original not in state:
            continue
        value = state.pop(copy)
        if not np.array_equal(value, state[original]):
            raise UserError(
                f"{file}: expected {copy} to equal {original}, with which it is shared, "
                "found another"
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
    return source


# --- reading -----------------------------------------------------------------------------------


def _read(file: str) -> State:
    """A state dict from a file, its names without what a data-parallel wrapper puts before them."""
    if not Path(file).is_file():
        raise UserError(f"--checkpoint: expected a file, found none at {file}")
    state = _read_npz(file) if file.endswith(".npz") else _read_torch(file)
    return {name.removeprefix("module."): x for name, x in state.items()}


def _read_npz(file: str) -> State:
    # Another kind of file, or one that was cut short, raises one of many kinds of errors.
    try:
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"--checkpoint: {file} cannot be read as arrays by name: {error}"
        ) from error


def _read_torch(file: str) -> State:
    """The state dict of a .pt file: the whole of it, or its entry "model"."""
    try:
        import torch
    except ImportError:
        raise UserError(
            f"--checkpoint: {file} needs PyTorch: pip install 'allattn[torch]', or give an .npz"
        ) from None
    # A pickle can run any code when it is read: nothing but tensors is unpickled.
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle's errors are of many kinds
        raise UserError(
            f"--checkpoint: {file} holds no state dict (save `model.state_dict()`): "
            f"{str(error)[:200]}"
        ) from error
    # Their training code saves more beside it.
    if isinstance(content, Mapping):
        content = content.get("model", content)
    if not _is_state_dict(content, torch.Tensor):
        raise UserError(
            f"--checkpoint: {file}: expected a state dict of tensors, or one under `model`, "
            "found another"
        )
    return {name: x.numpy() for name, x in content.items()}


def _is_state_dict(content: Any, tensor: type) -> bool:
    if not isinstance(content, Mapping):
        return False
    return all(isinstance(x, tensor) for x in content.values())
